"""From a site's name to the module of a model that is hooked there, checked on a few tokens before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .branches import Branches, main_part, with_main_part
from .sites import SITES, Site

# Looked for first, since a model may have a second stack of the same length (encoders, drafts).
_BLOCK_PATHS = (
    "transformer.h", "gpt_neox.layers", "model.layers", "model.decoder.layers", "model.language_model.layers",
    "language_model.model.layers", "backbone.layers", "rwkv.blocks",
)  # fmt: skip
_STREAM_ARGUMENTS = ("hidden_states", "hidden_state", "hidden", "x", "inputs")
_OF_BLOCK = {"resid_pre": True, "resid_post": False}  # whether it is the block's input


class Reached(Exception):
    """Raised by a hook to leave the forward pass: what comes after is not needed."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a site is read: what ``module`` is given or returns.

    ``width`` is that of its rows. The site's activations are ``scale`` times what stands there, plus what enters the
    module ``stream``, if there is one: ``resid_mid`` is the stream plus what attention adds.
    """

    site: Site
    path: str
    module: nn.Module
    width: int
    scale: float = 1.0
    stream: nn.Module | None = None

    @contextmanager
    def hooked(self, shape: torch.Size | None, use: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """While a batch of ``shape`` (B, T) passes, the site's activations go through ``use``.

        ``use`` maps (B, T, width) to what takes their place, or returns None to leave them. Where ``shape`` is None,
        batches of any shape may pass, and ``use`` is given rows (tokens, width), of which it must treat each alone.
        """
        entered: list[Tensor] = []

        def through(there: Tensor) -> Tensor:
            rows = _by_token(there, shape, self.module, self.site)
            before = rows if self.scale == 1 else rows * self.scale
            base = _by_token(entered[0], shape, self.module, self.site) if self.stream is not None else None
            before = before if base is None else base + before
            after = use(before)
            if after is None or after is there:
                return there
            after = after.to(before)
            change = after if base is None else after - base
            change = change if self.scale == 1 else change / self.scale
            if change is not after and not change.requires_grad:  # what stays keeps its bits, however - and / round
                change = torch.where(after == before, rows, change)
            return change.reshape(there.shape).clone()  # the model may add to it in place, as Falcon does

        def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[:] = [_argument(self.stream, args, kwargs)[1]]

        handles = [hook_input(self.module, through) if self._is_input else hook_output(self.module, through)]
        if self.stream is not None:
            handles.append(self.stream.register_forward_pre_hook(entering, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _is_input(self) -> bool:
        return _OF_BLOCK.get(self.site.name, self.site.is_input or self.site.name in ("z", "mlp_in", "mlp_post"))


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_PLACES: WeakKeyDictionary[nn.Module, dict[Site, Place]] = WeakKeyDictionary()


def find_place(model: nn.Module, site: str | Site, layer: int | None = None) -> Place:
    """Where a model has a site, made sure of by a forward pass over a few tokens; remembered for each model.

    Rows must be (batch, tokens, width) there, what leaves a block must be what enters the next, and of what a branch
    adds to the residual stream it is shown by replacing it that it is added, alone and whole (``branches.py``).

    Raises:
        TypeError, ValueError: as :meth:`Site.of`; the model has no such block or module, or what it has there cannot
            be shown to be the site: names the reason.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> place = find_place(load_language_model().model, "blocks.1.hook_mlp_out")
        >>> place.path, place.width
        ('transformer.h.1.mlp', 256)
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"model must be a causal language model, as load_language_model().model; got {got}")
    found = Site.of(site, layer)
    known = _PLACES.setdefault(model, {})
    place = known.get(found)
    if place is None or _submodule(model, place.path) is not place.module:  # the second: a module was exchanged
        place = known[found] = _find(model, found)
    return place


def _find(model: nn.Module, site: Site) -> Place:
    with evaluating(model), torch.no_grad():
        if site.layer is None:
            return _of_module(model, site, site.name, None)
        path, blocks = _blocks(model)
        if site.layer >= len(blocks):
            raise ValueError(f"layer must be in 0..{len(blocks) - 1}, got {site.layer}")
        path = f"{path}.{site.layer}"
        block = blocks[site.layer]
        if site.name not in SITES:
            return _of_module(model, site, f"{path}.{site.name}", block)
        width, args, kwargs = _residual(model, site, blocks, site.layer)
        if site.name in _OF_BLOCK:
            return Place(site, path, block, width)
        branches = Branches(block, args, kwargs, _argument(block, args, kwargs)[1], site.name)
        if site.name in ("z", "mlp_in", "mlp_post"):
            name, width = branches.projection(site.name)
            return Place(site, f"{path}.{name}", block.get_submodule(name), width)
        if site.name == "mlp_out":
            name, scale = branches.mlp()
        else:
            name, scale = branches.attention(must_precede_mlp=site.name == "resid_mid")
        stream = block if site.name == "resid_mid" else None
        return Place(site, f"{path}.{name}", block.get_submodule(name), width, scale, stream)


def _residual(
    model: nn.Module, site: Site, blocks: nn.ModuleList, layer: int
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """The stream's width, and the arguments of block ``layer``; ValueError unless its stream can be read."""
    ids = few_tokens(model)
    block = blocks[layer]
    following = blocks[layer + 1] if layer + 1 < len(blocks) else None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: dict[str, Tensor] = {}

    def arguments(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def seen(name: str, *, last: bool) -> Callable[[Tensor], Tensor]:
        def keep(hidden: Tensor) -> Tensor:
            states[name] = _by_token(hidden, ids.shape, block, site).clone()
            if last:
                raise Reached
            return hidden

        return keep

    only_input = site.name == "resid_pre"
    handles = [block.register_forward_pre_hook(arguments, with_kwargs=True)]
    handles.append(hook_input(block, seen("in", last=only_input)))
    if not only_input:
        handles.append(hook_output(block, seen("out", last=following is None), site))
        if following is not None:
            handles.append(hook_input(following, seen("next", last=True)))
    try:
        with suppress(Reached):
            model_forward(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    if "in" not in states or (not only_input and "out" not in states):
        raise never_reached(model, site)
    if len(calls) != 1:
        kind = type(block).__name__
        raise ValueError(f"layer: a {kind} is run {len(calls)} times for a token: which time is not said")
    width = states["in"].shape[-1]
    expected = _hidden_size(model)
    if expected not in (None, width) or ("out" in states and states["out"].shape[-1] != width):
        got = width if width != expected else states["out"].shape[-1]
        raise ValueError(
            f"layer: a {type(block).__name__} has hidden states of width {got}, and the model's hidden_size is "
            f"{expected}: they are no residual stream of that width"
        )
    args, kwargs = calls[0]
    for name, given in (*enumerate(args), *kwargs.items()):
        if isinstance(given, Tensor) and given.dim() == 4 and (*given.shape[:2], given.shape[3]) == (*ids.shape, width):
            raise ValueError(
                f"layer: a {type(block).__name__} is given former states of the stream too (argument {name!r}, of "
                f"shape {tuple(given.shape)}): what enters and leaves it is a part of the residual stream"
            )
    if "next" in states and not torch.equal(states["next"], states["out"]):
        raise ValueError(
            f"site {str(site)!r}: what leaves {type(block).__name__} {layer} is not what enters the next block of "
            f"{type(model).__name__}, which changes the stream between them: read 'resid_pre' of layer {layer + 1}"
        )
    return width, args, kwargs


def _of_module(model: nn.Module, site: Site, path: str, block: nn.Module | None) -> Place:
    module = _submodule(model, path)
    base = getattr(model, "base_model_prefix", "")
    if module is None and block is None and base:  # sparsify and others name modules from the model without its head
        path = f"{base}.{path}"
        module = _submodule(model, path)
    if module is None:
        near = block if block is not None else model
        names = ", ".join(name for name, _ in near.named_children())
        raise ValueError(
            f"site: {type(near).__name__} has no module {site.name!r}; its own begin with {names}, and without a "
            f"module's name a site is one of {', '.join(SITES)}"
        )
    ids = few_tokens(model)
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(_by_token(hidden, ids.shape, module, site).clone())
        return hidden

    def leave(*_: Any) -> None:
        raise Reached

    handles = [hook_input(module, keep) if site.is_input else hook_output(module, keep, site)]
    if block is not None and block is not module:
        handles.append(block.register_forward_hook(leave))
    try:
        with suppress(Reached):
            model_forward(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise never_reached(model, site)
    if len(found) > 1:
        raise ValueError(f"site: module {path!r} is run {len(found)} times for a token: which time is not said")
    return Place(site, path, module, found[0].shape[-1])


# ------------------------------------------------------------------------------------------ inside a model


def hook_input(module: nn.Module, use: Callable[[Tensor], Tensor]) -> Any:
    """Have what ``module`` is given go through ``use``."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, hidden = _argument(module, args, kwargs)
        if name is None:
            return (use(hidden), *args[1:]), kwargs
        return args, {**kwargs, name: use(hidden)}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def hook_output(module: nn.Module, use: Callable[[Tensor], Tensor], site: Site | None = None) -> Any:
    """Have what ``module`` returns go through ``use``."""

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if (hidden := main_part(output)) is not None:
            return with_main_part(output, use(hidden))
        where = "" if site is None else f" at site {site.place!r}"
        raise TypeError(
            f"layer: a {type(module).__name__} returns a {type(output).__name__}{where}, in which nothing "
            "says what the hidden states are: tensors, tuples and lists that begin with them can be read"
        )

    return module.register_forward_hook(after)


def _argument(module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """Name (None: the first that has none) and value of the argument that is the hidden states."""
    if args and isinstance(args[0], Tensor):
        return None, args[0]
    for name in _STREAM_ARGUMENTS if not args else ():
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise ValueError(
        f"layer: a {type(module).__name__} is given {len(args)} arguments and {', '.join(kwargs) or 'no more'}: which "
        "of them are the hidden states is not known"
    )


def _by_token(hidden: Tensor, shape: torch.Size | None, target: nn.Module, site: Site) -> Tensor:
    """(B, T, width) of hidden states of that shape, or of (B * T, width), as OPT's MLP sees them; no others.

    Where no shape is asked for, (B * T, width) of either.
    """
    if shape is None:
        return hidden.reshape(-1, hidden.shape[-1])
    if hidden.shape[:-1] == shape or hidden.shape[:-1] == (shape.numel(),):
        return hidden.reshape(*shape, -1)
    raise ValueError(
        f"layer: a {type(target).__name__} has hidden states of shape {tuple(hidden.shape)} for "
        f"{tuple(shape)} (batch, tokens): only (batch, tokens, d_model) can be read, since rows in another "
        "order would belong to other tokens"
    )


def model_forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    vocabulary = _vocabulary(model)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):  # on a GPU, an assertion that ends the process
        wrong, most = low if low < 0 else high, "" if vocabulary is None else f"..{vocabulary - 1}"
        raise ValueError(f"input_ids: {wrong} is no token of {type(model).__name__}, whose ids are 0{most}")
    length, longest = input_ids.shape[1], getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest and any(
        isinstance(module, nn.Embedding) and module.num_embeddings < length for module in model.modules()
    ):  # a table of positions that ends; rotations go on
        raise ValueError(f"input_ids: rows of {length} tokens, and {type(model).__name__} has {longest} positions")
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def few_tokens(model: nn.Module) -> Tensor:
    """(2, 5) token ids to look into a model with: from the middle of the vocabulary, away from tokens for images."""
    vocabulary = _vocabulary(model) or 20
    return ((torch.arange(10, device="cpu") + vocabulary // 2) % vocabulary).view(2, 5).to(input_device(model))


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its token ids: that of its embeddings, which may not be that of its last layers."""
    try:
        return model.get_input_embeddings().weight.device  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        first = next(model.parameters(), None)
        return torch.device("cpu") if first is None else first.device


def _vocabulary(model: nn.Module) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _text_config(model: nn.Module) -> Any:
    """Of a multimodal model, the language part's; None of a model that has no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _hidden_size(model: nn.Module) -> int | None:
    size = getattr(_text_config(model), "hidden_size", None)
    return size if isinstance(size, int) else None


def never_reached(model: nn.Module, site: Site) -> RuntimeError:
    where = f"layer {site.layer}, site {site.place!r}"
    return RuntimeError(f"the forward pass of {type(model).__name__} never reached {where}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in the mode that it was in.

    One thread at a time: hooks belong to the model, so what one thread reads or replaces would affect the batch of
    another, such as the thread in which :class:`RowStream` reads ahead.
    """
    with _LOCKS.setdefault(model, RLock()):
        training = [module for module in model.modules() if module.training]
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for path in _BLOCK_PATHS:
        if isinstance(found := _submodule(model, path), nn.ModuleList):
            return path, found
    config = _text_config(model)
    counts = {getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers")}
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts}
    if len(lists) == 1:
        return next(iter(lists.items()))
    raise ValueError(
        f"model: the blocks of {type(model).__name__} were not found: none of {_BLOCK_PATHS} is a ModuleList, and of "
        f"its ModuleLists {sorted(lists)} have num_hidden_layers={getattr(config, 'num_hidden_layers', None)} entries "
        "(one was expected)"
    )
