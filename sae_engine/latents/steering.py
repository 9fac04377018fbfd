"""Steering: a model that runs with some latents raised, held at a value, or taken out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._checks import flag, integer_in, number_in
from ..autoencoder import SparseAutoencoder, decoder_norms
from ..codes import SparseCodes
from ..data.models import LanguageModel
from ..data.places import evaluating
from ..data.sites import Site
from ._belonging import Belonging, belonging

MODES = ("add", "set")


def steer(
    model: nn.Module | LanguageModel,
    sae: SparseAutoencoder,
    latents: Mapping[int, float],
    *,
    mode: str = "add",
    drop_first: bool = False,
    layer: int | None = None,
    site: str | Site | None = None,
    target_layer: int | None = None,
    target_site: str | Site | None = None,
    normalize: str | None = None,
) -> AbstractContextManager[nn.Module]:
    """A context in which the model runs with latents of an autoencoder changed, at every token.

    At each token the activation at the site becomes ``x + sum_j (new_j - old_j) * W_dec[j]``: what the latents add to
    the reconstruction changes, and nothing else. What the autoencoder does not explain of ``x`` stays, and so do the
    bits of every token where nothing changes. Tokens are treated one by one: a batch gives what its rows give alone,
    and ``generate`` with a cache of keys and values what it gives without. Forward passes, ``generate`` and gradients
    work as usual; the model's mode, dtype and parameters stay as they are.

    Contexts may be nested, also at one site: the inner one sees what the outer one has made of the activations.

    Args:
        model: a Hugging Face causal language model, or what ``load_language_model`` gave.
        sae: an autoencoder or a transcoder, on the device of the model's block. Its rule runs as in eval mode.
        latents: latent → amount, in units of its activation (``codes.values``).
        mode: ``"add"``: ``new = old + amount``, whether the latent is active or not. ``"set"``: ``new = amount``.
        drop_first: leave each row's first token, padding aside, as it is. Autoencoders are seldom trained on it, and
            what they make of its large activations is not meant.
        layer, site: where the autoencoder belongs; by default what ``sae.provenance`` says.
        target_layer, target_site: where a transcoder's output belongs; likewise.
        normalize: as :func:`sae_engine.metrics.evaluate` has it; by default what ``sae.provenance`` says.

    Returns:
        a context manager that gives the model. Its hooks are gone when it is left, by an exception too.

    Raises:
        TypeError: an argument is of another kind, or the rule needs what an autoencoder does not know
            (``GradientTopK``).
        ValueError: no such latent or place, an amount that is not finite, or an unknown ``mode``; names it.
        RuntimeError: the rule has no threshold yet; when the model runs: a transcoder's target comes before its input,
            or, with ``drop_first``, something else than the model was called.

    Source: Templeton et al. 2024, Scaling Monosemanticity (clamping with the error kept).

    Example:
        >>> lm = se.data.load_language_model()
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> with se.steer(lm, sae, {3: 20.0}, site="blocks.2.hook_resid_post") as model:
        ...     steered = model(ids).logits
        >>> torch.equal(steered, lm.model(ids).logits)
        False
    """
    if not isinstance(latents, Mapping):
        raise TypeError(f"latents must be a mapping from latents to amounts, as {{3: 5.0}}, got {latents!r}")
    flag("drop_first", drop_first)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    amounts = []
    for latent, amount in latents.items():
        number = number_in(amount)
        if number is None:
            raise TypeError(f"latents: the amount of latent {latent!r} must be a number, got {amount!r}")
        if not math.isfinite(number):
            raise ValueError(f"latents: the amount of latent {latent!r} must be finite, got {amount!r}")
        amounts.append(float(number))
    where = belonging(
        model, sae, layer=layer, site=site, target_layer=target_layer, target_site=target_site, normalize=normalize
    )
    edit = _Edit(sae, where, list(latents), amounts, keeps_old=mode == "add")
    return _hooked(where, edit, _Firsts() if drop_first else None)


def ablate(
    model: nn.Module | LanguageModel,
    sae: SparseAutoencoder,
    latents: Iterable[int],
    *,
    drop_first: bool = False,
    layer: int | None = None,
    site: str | Site | None = None,
    target_layer: int | None = None,
    target_site: str | Site | None = None,
    normalize: str | None = None,
) -> AbstractContextManager[nn.Module]:
    """A context in which the model runs without what some latents contribute, at every token.

    Args:
        latents: the latents to take out.
        the others: as :func:`steer` has them.

    Returns:
        as :func:`steer`, with ``mode="set"`` and 0 for each latent.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`steer`.

    Example:
        >>> lm = se.data.load_language_model()
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> read = lambda: se.data.read_activations(lm.model, ids, site="blocks.3.hook_resid_pre")
        >>> clean = read()
        >>> active = sae.encode(clean).to_padded()[1][0, -1].tolist()
        >>> with se.ablate(lm, sae, active, site="blocks.2.hook_resid_post"):
        ...     torch.equal(read(), clean)
        False
    """
    if isinstance(latents, (str, bytes, Mapping)) or not isinstance(latents, Iterable):
        raise TypeError(f"latents must be a sequence of latents, as [3, 5], got {latents!r}")
    chosen = list(latents)
    return steer(
        model, sae, dict.fromkeys(chosen, 0.0), mode="set", drop_first=drop_first, layer=layer, site=site,
        target_layer=target_layer, target_site=target_site, normalize=normalize,
    )  # fmt: skip


class _Edit:
    """From what an autoencoder reads, (tokens, d_in), to what is added where it writes, (tokens, d_out)."""

    @torch.no_grad()
    def __init__(
        self, sae: SparseAutoencoder, where: Belonging, latents: list[int], amounts: list[float], *, keeps_old: bool
    ) -> None:
        for latent in latents:
            number = integer_in(latent)
            if number is None:
                raise TypeError(f"latents must be integers, got {latent!r}")
            if not 0 <= number < sae.d_sae:
                raise ValueError(f"latents must be in 0..{sae.d_sae - 1}, got {latent!r}")
        if not latents:
            raise ValueError("latents must name at least one latent, got none")
        self.sae, self.normalization = sae, where.normalization
        wide = torch.promote_types(sae.W_dec.dtype, torch.float32)
        chosen = torch.tensor(latents, device=sae.W_dec.device)
        # What an activation of 1 adds. Where codes hold the norms of the decoder's rows, those are divided out.
        unit = torch.ones(len(latents), dtype=wide, device=sae.W_dec.device)
        if sae.rescale_acts_by_decoder_norm:
            norms = decoder_norms(sae.W_dec[chosen]).to(wide)
            unit = torch.where(norms == 0, 0.0, 1 / norms)
        self.weights = torch.zeros(sae.d_sae, dtype=wide, device=chosen.device).index_put((chosen,), unit)
        self.added = (unit * unit.new_tensor(amounts)) @ sae.W_dec[chosen].to(wide)
        self.keeps_old = keeps_old
        # Without a scale for each token, what "add" adds is the same everywhere, and nothing has to be encoded.
        scaled = sae.normalize_activations == "layer_norm" or where.normalization.kind != "none"
        self.is_constant = keeps_old and not scaled
        if not self.is_constant:  # so that a rule that cannot run says so here, not inside the model
            self(sae.W_dec.new_zeros(1, sae.d_in))

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_constant:
            return self.added.expand(len(x), -1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x, scale = self.normalization.into(x)
        with evaluating(self.sae):
            (codes,), info, _ = self.sae.encode_with(x)
        change = self.added if self.keeps_old else self.added - self._contribution(codes)
        for factor in (info.std, None if scale is None else scale[1]):
            change = change if factor is None else change * factor
        return change

    def _contribution(self, codes: SparseCodes) -> Tensor:
        """(tokens, d_out): what the chosen latents add now."""
        codes = codes * self.weights.to(codes.dtype)
        return functional.decode(codes, self.sae.W_dec)


class _Firsts:
    """Which tokens of a call of the model are the first of their rows, as its mask and its cache say."""

    def __init__(self) -> None:
        self._here: Tensor | None = None

    def look(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if not isinstance(given, Tensor):
            raise TypeError("drop_first: the model was called without input_ids and inputs_embeds")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("drop_first: attention_mask must be (batch, tokens), where padding is, or None")
        before = 0 if cache is None else int(cache.get_seq_length())
        at = before + torch.arange(given.shape[1], device=given.device)
        first = at.new_zeros(len(given), 1) if mask is None else mask.to(given.device).int().argmax(1, keepdim=True)
        self._here = at == first

    def forget(self, *_: Any) -> None:
        self._here = None

    def kept(self, change: Tensor) -> Tensor:
        """``change`` (tokens, width), and 0 at first tokens."""
        if self._here is None or self._here.numel() != len(change):
            raise RuntimeError("drop_first: call the model itself, whose arguments say where rows begin")
        return change.masked_fill(self._here.flatten()[:, None].to(change.device), 0.0)


@contextmanager
def _hooked(where: Belonging, edit: _Edit, firsts: _Firsts | None) -> Iterator[nn.Module]:
    pending: list[Tensor] = []  # of a transcoder: between its input and its target

    def change_at(x: Tensor) -> Tensor:
        return edit(x) if firsts is None else firsts.kept(edit(x))

    def read(x: Tensor) -> None:
        pending[:] = [change_at(x)]

    def write(y: Tensor) -> Tensor:
        if not pending:
            raise RuntimeError(f"target_site: {where.target.site} comes before the input, {where.place.site}")
        return _plus(y, pending.pop())

    with ExitStack() as hooks:
        if firsts is not None:
            hooks.callback(where.model.register_forward_pre_hook(firsts.look, with_kwargs=True).remove)
            hooks.callback(where.model.register_forward_hook(firsts.forget, always_call=True).remove)
        use: Callable[[Tensor], Tensor]
        if where.is_transcoder and not edit.is_constant:
            hooks.enter_context(where.place.hooked(None, read))
            use = write
        else:
            use = lambda x: _plus(x, change_at(x))  # noqa: E731
        hooks.enter_context(where.target.hooked(None, use))
        yield where.model


def _plus(x: Tensor, change: Tensor) -> Tensor:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + change).to(x.dtype)
