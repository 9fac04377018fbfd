"""Activations of a causal language model at any site, read by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import dtype_in
from ._require import require
from .contexts import Contexts, TokenBatch, check_int, contexts_of, token_batches
from .models import LanguageModel
from .padding import padding_of
from .places import Place, Reached, evaluating, find_place, input_device, model_forward, never_reached
from .sites import Site


def read_activations(
    model: nn.Module,
    input_ids: Tensor,
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Activations of one batch of token ids; the forward pass stops there, later layers are not computed.

    Args:
        model: a Hugging Face causal language model. Its mode and hooks are as before afterwards.
        input_ids: ``(B, T)`` integers on the model's device.
        layer: block, ``0 <= layer < num_hidden_layers``; None where ``site`` says it.
        site: as :meth:`Site.of` reads it: one of :data:`SITES`, TransformerLens' names, or any module's.
        attention_mask: ``(B, T)``, 1 or True for tokens and 0 or False for padding, on the left, on the right or on
            both sides of each row's tokens; None: nothing is padding. Padding changes no token's activations: left
            padding is moved to the right before the model sees it, so a row's first token has position 0.

    Returns:
        ``(B, T, width)``, in the model's dtype, outside autograd; 0 at padding. The width is d_model, but for ``z``,
        ``mlp_post`` and modules.

    Raises:
        TypeError: ``input_ids``, ``attention_mask`` or ``layer`` is not of integers.
        ValueError: ``layer`` or ``site`` is out of range, ``input_ids`` is not 2-D, ``attention_mask`` has another
            shape, padding between tokens or a row of padding alone, the model's blocks are not found,
            hidden states there are not (batch, tokens, d_model), as XLNet's and Gemma 3n's, or what the model has
            there cannot be shown to be the site.
        RuntimeError: the forward pass never reached the site.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> read_activations(lm.model, ids, layer=1).shape == (1, 3, lm.d_model)
        True
    """
    check_ids(input_ids)
    place = find_place(model, site, layer)
    padding = padding_of(input_ids, attention_mask)
    if padding is None:
        return _read(model, input_ids, torch.ones_like(input_ids), [place])[0]
    return padding.back(_read(model, padding.input_ids, padding.attention_mask, [place])[0])


def read_sites(
    model: nn.Module, input_ids: Tensor, sites: Sequence[str | Site], *, attention_mask: Tensor | None = None
) -> list[Tensor]:
    """Activations of several sites in one forward pass, which stops behind the last of them.

    Args:
        model, input_ids, attention_mask: as :func:`read_activations` has them.
        sites: as :meth:`Site.of` reads them, each with its block.

    Returns:
        One ``(B, T, width)`` for each of ``sites``, in their order.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`read_activations`; ValueError also where ``sites`` is empty.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> sites = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
        >>> middle, added, after = read_sites(lm.model, ids, sites)
        >>> torch.allclose(middle + added, after, atol=1e-4)
        True
    """
    check_ids(input_ids)
    if isinstance(sites, (str, Site)) or not isinstance(sites, Sequence):
        raise TypeError(f"sites must be a sequence of sites, got {sites!r}")
    if not sites:
        raise ValueError("sites must name at least one site, got none")
    places = [find_place(model, site) for site in sites]
    padding = padding_of(input_ids, attention_mask)
    if padding is None:
        return _read(model, input_ids, torch.ones_like(input_ids), places)
    return [padding.back(x) for x in _read(model, padding.input_ids, padding.attention_mask, places)]


def _read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, places: Sequence[Place]) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def reader(number: int) -> Callable[[Tensor], None]:
        def read(hidden: Tensor) -> None:
            # A copy, since a model may add to the tensor in place; made outside inference mode, it is an ordinary
            # tensor: autograd may save it, an SAE may train on it.
            with torch.inference_mode(False), torch.no_grad():
                found[number] = hidden.clone()
            if len(found) == len(places):
                raise Reached

        return read

    with evaluating(model), ExitStack() as hooks, torch.inference_mode(), suppress(Reached):
        for number, place in enumerate(places):
            hooks.enter_context(place.hooked(input_ids.shape, reader(number)))
        model_forward(model, input_ids, attention_mask)
    for number, place in enumerate(places):
        if number not in found:
            raise never_reached(model, place.site)
    return [found[number] for number in range(len(places))]


def stream_activations(
    lm: LanguageModel,
    texts: Iterable[Any],
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    dtype: torch.dtype | str | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    **contexts: Any,
) -> Iterator[Tensor]:
    """Activations of texts, batch by batch, in the order of the text.

    Args:
        lm: from :func:`load_language_model`.
        texts: documents, each a string or its token ids in one dimension; or batches, each a mapping with
            ``input_ids`` (B, T) and, where some are padding, ``attention_mask``, as tokenizers and data loaders give
            them, or ``input_ids`` alone. Consumed lazily.
        layer, site: as :func:`read_activations` has them.
        dtype: of the result; None is the model's.
        max_tokens: stop after exactly so many rows; None is all.
        progress: show a bar on standard error.
        contexts: how documents become contexts and which tokens become rows: any of ``context_length``,
            ``batch_size``, ``drop_first``, ``separator``, ``first_token``, ``exclude_tokens`` and
            ``exclude_positions``, as :class:`ContextSettings` explains them.

    Yields:
        ``(tokens, d_model)`` on the model's device; ``tokens`` is at most ``batch_size * context_length``.

    Raises:
        TypeError: an argument or a document is not of the kind above (documents: when they are reached).
        ValueError: an argument is out of range, the tokenizer has no such token or there is none, or an activation is
            not finite (names the text, and the module that was first) or overflows ``dtype``.

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
    settings, max_tokens = check_stream(lm, texts, layer, site, max_tokens, **contexts)
    dtype, place = None if dtype is None else dtype_in("dtype", dtype), Site.of(site, layer)

    def generate() -> Iterator[Tensor]:
        done = 0
        with progress_bar(progress, max_tokens) as bar:
            for batch in token_batches(lm, texts, settings):
                (rows,) = batch_rows(lm, batch, place)
                rows = rows[: None if max_tokens is None else max_tokens - done]
                if not len(rows):
                    continue
                check_finite(rows, done, lm, batch)
                done += len(rows)
                bar.update(len(rows))
                yield rows if dtype is None else cast(rows, dtype)
                if done == max_tokens:
                    return

    return generate()


# ------------------------------------------------------------------- what store.py shares with the above


def check_stream(
    lm: LanguageModel,
    texts: Iterable[Any],
    layer: int | None,
    site: str | Site,
    max_tokens: int | None,
    **contexts: Any,
) -> tuple[Contexts, int | None]:
    """Every check of :func:`stream_activations` that needs no text: its settings and the most rows."""
    check_model(lm)
    if isinstance(texts, (str, bytes, Mapping, Tensor)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be an iterable of documents or batches, got {type(texts).__name__}")
    place = Site.of(site, layer)
    find_place(lm.of(place).model, place)
    return contexts_of(lm, **contexts), None if max_tokens is None else check_int("max_tokens", max_tokens, 1)


def check_model(lm: LanguageModel) -> None:
    if not isinstance(lm, LanguageModel):
        raise TypeError(f"lm must be a LanguageModel (see load_language_model), got {type(lm).__name__}")


def batch_rows(lm: LanguageModel, batch: TokenBatch, *sites: Site) -> tuple[Tensor, ...]:
    """``(rows, width)`` of one batch for each site, in one pass of each model: of the tokens that are kept."""
    found: dict[int, Tensor] = {}
    for number in dict.fromkeys(site.model for site in sites):  # a pass of each model
        mine = {place: site for place, site in enumerate(sites) if site.model == number}
        model = lm.of(next(iter(mine.values()))).model
        device = input_device(model)
        if not len(batch.kept):
            dtype = next(model.parameters()).dtype
            found |= {place: torch.empty(0, find_place(model, site).width, dtype=dtype, device=device)
                      for place, site in mine.items()}  # fmt: skip
            continue
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        hidden = read_sites(model, batch.input_ids.to(device), list(mine.values()), attention_mask=mask)
        rows = [x.flatten(0, 1)[batch.kept.to(x.device)] for x in hidden]
        found |= dict(zip(mine, rows, strict=True))
    return tuple(found[place] for place in range(len(sites)))


def cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that are finite, in another dtype; an overflow is an error, since an infinite value would go unseen."""
    found = rows.to(dtype)
    if not bool(found.isfinite().all()):
        name, largest = str(dtype).removeprefix("torch."), f"{float(rows.abs().max()):.6g}"
        raise ValueError(f"dtype: an activation of {largest} overflows {name}; use bfloat16 or float32")
    return found


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
    device = input_device(lm.model)
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
        raise Reached

    with evaluating(lm.model), torch.inference_mode(), ExitStack() as hooks, suppress(Reached):
        for name, module in lm.model.named_modules():
            handle = module.register_forward_hook(lambda _module, _args, output, name=name: look(name, output))
            hooks.callback(handle.remove)
        model_forward(lm.model, ids.to(device), (torch.ones_like(ids) if mask is None else mask).to(device))
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


def check_ids(input_ids: Tensor) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be (B, T) with at least one token, got shape {tuple(input_ids.shape)}")
