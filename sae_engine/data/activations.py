"""The residual stream of a causal language model, read by forward hooks.

Sites, for block ``layer`` of ``num_layers``:

``resid_pre``   what enters the block.
``mlp_out``     what its MLP module returns, before any norm that the block applies to it.
``resid_post``  what leaves the block; for the last block this is before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import dtype_in
from ._require import require
from .contexts import Contexts, TokenBatch, check_int, contexts_of, token_batches
from .models import LanguageModel
from .padding import padding_of

SITES = ("resid_pre", "mlp_out", "resid_post")

# GPT-2, GPT-J, BLOOM, Falcon; GPT-NeoX, Pythia; Llama, Gemma, Qwen, Mistral, Phi; OPT.
_BLOCK_PATHS = ("transformer.h", "gpt_neox.layers", "model.layers", "model.decoder.layers")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")  # fc2: OPT's block is its own MLP


class _Reached(Exception):
    """Raised by the hook to leave the forward pass: what comes after is not needed."""


def read_activations(
    model: nn.Module, input_ids: Tensor, *, layer: int, site: str = "resid_pre", attention_mask: Tensor | None = None
) -> Tensor:
    """Activations of one batch of token ids; the forward pass stops there, later layers are not computed.

    Args:
        model: a Hugging Face causal language model. Its mode and hooks are as before afterwards.
        input_ids: ``(B, T)`` integers on the model's device.
        layer: block, ``0 <= layer < num_hidden_layers``.
        site: one of :data:`SITES`.
        attention_mask: ``(B, T)``, 1 or True for tokens and 0 or False for padding, on the left, on the right or on
            both sides of each row's tokens; None: nothing is padding. Padding changes no token's activations: left
            padding is moved to the right before the model sees it, so a row's first token has position 0.

    Returns:
        ``(B, T, d_model)``, in the model's dtype, outside autograd; 0 at padding.

    Raises:
        TypeError: ``input_ids``, ``attention_mask`` or ``layer`` is not of integers.
        ValueError: ``layer`` or ``site`` is out of range, ``input_ids`` is not 2-D, ``attention_mask`` has another
            shape, padding between tokens or a row of padding alone, the model's blocks are not found,
            or hidden states there are not (batch, tokens, d_model), as XLNet's and Gemma 3n's.
        RuntimeError: the forward pass never reached the site.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> read_activations(lm.model, ids, layer=1).shape == (1, 3, lm.d_model)
        True
    """
    _check_ids(input_ids)
    padding = padding_of(input_ids, attention_mask)
    if padding is None:
        return _read(model, input_ids, torch.ones_like(input_ids), layer, site)
    return padding.back(_read(model, padding.input_ids, padding.attention_mask, layer, site))


def _read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: int, site: str) -> Tensor:
    target = _hook_target(model, layer, site)
    if input_ids.shape[0] == input_ids.shape[1] > 1:  # (tokens, batch, d_model) would have the same shape
        parts = slice(None, 1), slice(1, None)
        return torch.cat([_read(model, input_ids[part], attention_mask[part], layer, site) for part in parts])
    found: list[Tensor] = []

    def read(hidden: Tensor) -> Tensor:
        found.append(hidden)
        raise _Reached

    with _evaluating(model), _hooked(target, site, read), torch.inference_mode(), suppress(_Reached):
        _forward(model, input_ids, attention_mask)
    if not found:
        raise _never_reached(model, layer, site)
    # The copy, made outside inference mode, is an ordinary tensor: autograd may save it, an SAE may train on it.
    return _by_token(found[0], input_ids, target).clone()


def run_with_replacement(
    model: nn.Module,
    input_ids: Tensor,
    replace: Callable[[Tensor], Tensor],
    *,
    layer: int,
    site: str = "resid_pre",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits of the model with the site's activations replaced on the way: ``replace`` maps (B, T, d_model) to itself.

    What ``replace`` returns is cast to the model's dtype, so that returning its argument changes no bit.

    Args:
        model, input_ids, layer, site, attention_mask: as :func:`read_activations` has them.
        replace: called once, outside autograd; it must not write to its argument, which is 0 at padding.

    Returns:
        ``(B, T, vocabulary)``, in the model's dtype; 0 at padding.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`read_activations`; ValueError also where ``replace`` returns
            another shape.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> logits = run_with_replacement(lm.model, ids, torch.zeros_like, layer=1)
        >>> logits.shape[:2]
        torch.Size([1, 3])
    """
    _check_ids(input_ids)
    if (padding := padding_of(input_ids, attention_mask)) is not None:
        def on_tokens(hidden: Tensor) -> Tensor:
            return padding.into(_checked(replace, padding.back(hidden)), hidden)

        logits = _replaced(model, padding.input_ids, padding.attention_mask, on_tokens, layer, site)
        return padding.back(logits)
    return _replaced(model, input_ids, torch.ones_like(input_ids), lambda x: _checked(replace, x), layer, site)


def _checked(replace: Callable[[Tensor], Tensor], before: Tensor) -> Tensor:
    after = replace(before)
    if not isinstance(after, Tensor) or after.shape != before.shape:
        got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise ValueError(f"replace must return a tensor of shape {tuple(before.shape)}, got {got}")
    return after


def _replaced(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    replace: Callable[[Tensor], Tensor],
    layer: int,
    site: str,
) -> Tensor:
    target = _hook_target(model, layer, site)
    if input_ids.shape[0] == input_ids.shape[1] > 1:  # as (tokens, batch, d_model) would be: one row tells
        _read(model, input_ids[:1], attention_mask[:1], layer, site)
    reached = False

    def write(hidden: Tensor) -> Tensor:
        nonlocal reached
        reached = True
        return replace(_by_token(hidden, input_ids, target)).to(hidden).reshape(hidden.shape)

    with _evaluating(model), _hooked(target, site, write), torch.no_grad():
        logits = _forward(model, input_ids, attention_mask).logits
    if not reached:
        raise _never_reached(model, layer, site)
    return logits


def stream_activations(
    lm: LanguageModel,
    texts: Iterable[Any],
    *,
    layer: int,
    site: str = "resid_pre",
    context_length: int | None = None,
    batch_size: int = 8,
    drop_first: bool = True,
    separator: str | int | None = "eos",
    first_token: str | int | None = "bos",
    exclude_tokens: Collection[str | int] = (),
    exclude_positions: Collection[int] = (),
    dtype: torch.dtype | str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Activations of texts, batch by batch, in the order of the text.

    The tokens of each non-empty document are followed by the separator, and all documents form one
    stream, which is cut into runs of ``context_length - 1`` tokens. A context is ``first_token``
    followed by one run, so every token of the stream
    is in exactly one context. The last run may be shorter; it is a context of its own length, alone in its
    batch. Nothing is padded.

    Batches of token ids are run as they are given, padded or not: nothing is put before their rows or between them.

    Args:
        lm: from :func:`load_language_model`.
        texts: documents, each a string or its token ids in one dimension; or batches, each a mapping with
            ``input_ids`` (B, T) and, where some are padding, ``attention_mask``, as tokenizers and data loaders give
            them, or ``input_ids`` alone. Consumed lazily.
        layer: block, ``0 <= layer < lm.num_layers``.
        site: one of :data:`SITES`.
        context_length: tokens per context, at least 2; default ``min(lm.max_length, 256)``. Batches may be shorter.
        batch_size: contexts per forward pass.
        drop_first: leave out each context's first position, whose activations are far larger than all others
            and the same everywhere. With ``first_token``, one row per token of the stream remains.
        separator: what stands behind each document: ``"eos"``, ``"bos"``, ``"pad"``, a token id, or None for nothing.
        first_token: what stands before each context, likewise; ``"bos"`` is the end-of-text token where the
            tokenizer has no other, as GPT-2. None: nothing, and a run has ``context_length`` tokens.
        exclude_tokens: leave out the rows of these tokens, by name or id: ``["bos", "eos", "pad", 198]``. The model
            sees them all the same.
        exclude_positions: leave out these positions of each context, counted from 0 at its first token that is no
            padding. ``drop_first`` leaves out position 0.
        dtype: of the result; None is the model's.
        max_tokens: stop after exactly so many rows; None is all.
        progress: show a bar on standard error.

    Yields:
        ``(tokens, d_model)`` on the model's device; ``tokens`` is at most ``batch_size * context_length``.

    Raises:
        TypeError: an argument or a document is not of the kind above (documents: when they are reached).
        ValueError: an argument is out of range, the tokenizer has no such token or there is none, or an activation is
            not finite (names the text, and the module that was first).

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> batches = stream_activations(lm, ["A text.", "Another one."], layer=1)
        >>> [x.shape[1] == lm.d_model for x in batches]
        [True]
        >>> padded = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
        >>> next(stream_activations(lm, [padded], layer=1, drop_first=False)).shape[0]
        2
    """
    contexts, max_tokens = check_stream(
        lm, texts, layer, site, max_tokens, context_length=context_length, batch_size=batch_size,
        drop_first=drop_first, separator=separator, first_token=first_token, exclude_tokens=exclude_tokens,
        exclude_positions=exclude_positions,
    )  # fmt: skip
    dtype = None if dtype is None else dtype_in("dtype", dtype)

    def generate() -> Iterator[Tensor]:
        done = 0
        with progress_bar(progress, max_tokens) as bar:
            for batch in token_batches(lm, texts, contexts):
                rows = batch_rows(lm, batch, layer, site)[: None if max_tokens is None else max_tokens - done]
                if not len(rows):
                    continue
                check_finite(rows, done, lm, batch)
                done += len(rows)
                bar.update(len(rows))
                yield rows.to(dtype or rows.dtype)
                if done == max_tokens:
                    return

    return generate()


# ------------------------------------------------------------------- what store.py shares with the above


def check_stream(
    lm: LanguageModel, texts: Iterable[Any], layer: int, site: str, max_tokens: int | None, **settings: Any
) -> tuple[Contexts, int | None]:
    """Every check of :func:`stream_activations` that needs no text: its settings and the most rows."""
    if not isinstance(lm, LanguageModel):
        raise TypeError(f"lm must be a LanguageModel (see load_language_model), got {type(lm).__name__}")
    if isinstance(texts, (str, bytes, Mapping, Tensor)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be an iterable of documents or batches, got {type(texts).__name__}")
    _hook_target(lm.model, layer, site)
    contexts = contexts_of(lm, **settings)
    return contexts, None if max_tokens is None else check_int("max_tokens", max_tokens, 1)


def batch_rows(lm: LanguageModel, batch: TokenBatch, layer: int, site: str) -> Tensor:
    """``(rows, d_model)`` of one batch: of the tokens that are kept."""
    device = next(lm.model.parameters()).device
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    if not len(batch.kept):
        return torch.empty(0, lm.d_model, dtype=next(lm.model.parameters()).dtype, device=device)
    activations = read_activations(lm.model, batch.input_ids.to(device), layer=layer, site=site, attention_mask=mask)
    return activations.flatten(0, 1)[batch.kept.to(device)]


def check_finite(rows: Tensor, first: int, lm: LanguageModel, batch: TokenBatch, skipped: int = 0) -> None:
    """ValueError that says where in the texts the first row that is not finite lies, and which module was first.

    ``first`` is the number in the stream of the first of ``rows``, before which ``skipped`` of the batch were left out.
    """
    finite = rows.isfinite().all(1)
    if bool(finite.all()):
        return
    wrong, row = int((~finite).sum()), int((~finite).nonzero()[0])
    context, at = divmod(int(batch.kept[skipped + row]), batch.input_ids.shape[1])
    module, place = _first_overflow(lm, batch, context)
    document = int(batch.documents[context, at])  # what was put before the context is of none
    at = at if place is None else place
    near = batch.input_ids[context, max(0, at - 8) : at + 1].tolist()
    text = f"token ids {near}" if lm.tokenizer is None else repr(lm.tokenizer.decode(near))
    dtype = str(next(lm.model.parameters()).dtype).removeprefix("torch.")
    way_out = "load it in bfloat16 or float32" if dtype == "float16" else "its weights may be damaged"
    raise ValueError(
        f"texts: {wrong} of {len(rows)} activations are not finite, the first is row {first + row} of the stream. In "
        f"{dtype}, {lm.name!r} makes such numbers of document {document} after {text}, first in "
        f"{module}; {way_out}, or leave this text out"
    )


def _first_overflow(lm: LanguageModel, batch: TokenBatch, context: int) -> tuple[str, int | None]:
    """Which module is the first to return a number that is not finite, of one context, and at which of its tokens.

    Rows do not say it: where one token's values are infinite, attention makes NaN of them before that token too.
    """
    device = next(lm.model.parameters()).device
    ids = batch.input_ids[context : context + 1]
    mask = None if batch.attention_mask is None else batch.attention_mask[context : context + 1]
    if (padding := padding_of(ids, mask)) is not None:
        ids, mask = padding.input_ids, padding.attention_mask
    found: list[tuple[str, int | None]] = []

    def look(name: str, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or bool(hidden.isfinite().all()):
            return
        place = None
        if hidden.shape[:2] == ids.shape:
            place = int((~hidden[0].isfinite()).flatten(1).any(1).nonzero()[0])
            place += 0 if padding is None else int(padding.first)
        found.append((f"module {name!r}", place))
        raise _Reached

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: look(name, output))
        for name, module in lm.model.named_modules()
    ]
    try:
        with _evaluating(lm.model), torch.inference_mode(), suppress(_Reached):
            _forward(lm.model, ids.to(device), (torch.ones_like(ids) if mask is None else mask).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ("no module, where this context is alone in its batch", None)


def progress_bar(show: bool, total: int | None, done: int = 0) -> Any:
    tqdm = require("tqdm") if show else None
    return tqdm.tqdm(total=total, initial=done, unit="tok", unit_scale=True) if tqdm else _NoBar()


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def update(self, count: int) -> None:
        """Shows nothing."""


# ------------------------------------------------------------------------------------------ inside a model


def _by_token(hidden: Tensor, input_ids: Tensor, target: nn.Module) -> Tensor:
    """(B, T, d_model) of hidden states of that shape, or of (B * T, d_model), as OPT's MLP sees them; no others."""
    if hidden.shape[:-1] == input_ids.shape or hidden.shape[:-1] == (input_ids.numel(),):
        return hidden.reshape(*input_ids.shape, -1)
    raise ValueError(
        f"layer: a {type(target).__name__} has hidden states of shape {tuple(hidden.shape)} for "
        f"{tuple(input_ids.shape)} (batch, tokens): only (batch, tokens, d_model) can be read, since rows in another "
        "order would belong to other tokens"
    )


def _check_ids(input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (B, T) with at least one token, got shape {tuple(input_ids.shape)}")


def _forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    vocabulary = _vocabulary(model)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):  # on a GPU, an assertion that ends the process
        wrong, most = low if low < 0 else high, "" if vocabulary is None else f"..{vocabulary - 1}"
        raise ValueError(f"input_ids: {wrong} is no token of {type(model).__name__}, whose ids are 0{most}")
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def _vocabulary(model: nn.Module) -> int | None:
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _never_reached(model: nn.Module, layer: int, site: str) -> RuntimeError:
    return RuntimeError(f"the forward pass of {type(model).__name__} never reached layer {layer}, site {site!r}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _hooked(target: nn.Module, site: str, use: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What stands at ``site`` of the hooked module goes through ``use``, which returns what takes its place."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (use(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": use(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
            return type(output)((use(output[0]), *output[1:]))
        if isinstance(output, Tensor):
            return use(output)
        raise TypeError(
            f"layer: a {type(target).__name__} returns a {type(output).__name__} at site {site!r}, in which nothing "
            "says what the hidden states are: tensors, tuples and lists that begin with them can be read"
        )

    if site == "resid_pre":
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _hook_target(model: nn.Module, layer: int, site: str) -> nn.Module:
    if site not in SITES:
        raise ValueError(f"site must be one of {SITES}, got {site!r}")
    blocks = _blocks(model)
    layer = check_int("layer", layer, 0, len(blocks) - 1)
    if site != "mlp_out":
        return blocks[layer]
    for name in _MLP_NAMES:
        if isinstance(child := getattr(blocks[layer], name, None), nn.Module):
            return child
    kind = type(blocks[layer]).__name__
    raise ValueError(f"site 'mlp_out': block {kind} has no MLP among {_MLP_NAMES}")


def _blocks(model: nn.Module) -> nn.ModuleList:
    for path in _BLOCK_PATHS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found
    config = getattr(model, "config", None)
    count = config.get_text_config().num_hidden_layers if config is not None else None
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    if len(lists) == 1:
        return next(iter(lists.values()))
    raise ValueError(
        f"model: the blocks of {type(model).__name__} were not found: none of {_BLOCK_PATHS} is a ModuleList, and of "
        f"its ModuleLists {sorted(lists)} have num_hidden_layers={count} entries (one was expected)"
    )
