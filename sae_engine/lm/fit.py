"""What rules learn from a language model on texts: thresholds, weights of entries, means of what is dropped."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..acceleration._base import CannotAccelerate
from ..autoencoder import decoder_norms
from ..data import contexts
from ..data.models import LanguageModel, load_language_model
from ..data.places import evaluating, hook_input, input_device, model_forward
from .files import fingerprint
from .layers import skipping
from .places import Found, by_input, find
from .rules import PLACES, Learned, Weighed

W = TypeVar("W", bound=Weighed)

BITS = 16  # leading bits of a score in fp32, without its sign, that name its bin: eight are of the mantissa


@torch.no_grad()
def fit(
    rule: W, lm: LanguageModel | nn.Module, texts: Iterable[Any], *, at: str, layers: Iterable[int] | None,
    tokens: int, context_length: int | None, batch_size: int,
) -> W:  # fmt: skip
    """See :meth:`sae_engine.lm.Threshold.fit`. The rule is changed once everything has been learned."""
    if at not in PLACES:
        raise ValueError(f"at must be one of {PLACES}, got {at!r}")
    if "up" in rule.weigh and at != "gate":
        raise ValueError(f'weigh={rule.weigh!r} weighs by W_up x, which there is at="gate" alone, got at={at!r}')
    tokens = contexts.check_int("tokens", tokens, 1)
    lm = plain(lm if isinstance(lm, LanguageModel) else load_language_model(lm))
    found, _ = find(lm.model, at, layers)
    batches = token_ids(lm, texts, tokens, context_length, batch_size)
    learned = fitted_on(found)
    if rule.weigh:
        scales = scales_of(rule.weigh, lm, found, batches)
        for name, scale in scales.items():
            learned[name].scale = scale
    if rule.FITS:
        for name, counts in counted(lm, found, batches, learned).items():
            learned[name].threshold = quantile(counts, rule.sparsity)
    trial = type(rule)(rule.sparsity, weigh=rule.weigh)
    for name, (mean, density) in dropped(trial, lm, found, batches, learned).items():
        learned[name].density = density
        learned[name].mean = mean if rule.compensate else None
    rule.layers, rule.at = learned, at
    rule.model = {"name": lm.name, "revision": lm.revision, "sha256": lm.sha256,
                  "tokens": sum(ids.numel() for ids in batches)}  # fmt: skip
    return rule


def plain(lm: LanguageModel) -> LanguageModel:
    """The model itself; refused where it skips weights, since rules learn from what it does without them."""
    if skipping(lm.model):
        raise CannotAccelerate(f"{lm.name!r} skips weights already: fit on the plain model, se.restore(model) first")
    return lm


def fitted_on(found: list[Found]) -> dict[str, Learned]:
    """Room for what is learned, by module."""
    return {one.name: Learned(fingerprint=fingerprint(one)) for one in found}


def token_ids(
    lm: LanguageModel, texts: Iterable[Any], tokens: int | None, context_length: int | None, batch_size: int
) -> list[Tensor]:
    """(contexts, length) batches of as many tokens at most, the last one cut to whole contexts.

    Raises:
        RuntimeError: there is none.
    """
    length = min(lm.max_length, 256) if context_length is None else context_length
    length = contexts.check_int("context_length", length, 2, lm.max_length)
    batch_size = contexts.check_int("batch_size", batch_size, 1)
    batches: list[Tensor] = []
    left = tokens
    for ids in contexts.context_batches(lm, texts, length, batch_size):
        if left is not None:
            ids = ids[: max(left // ids.shape[1], 1 if not batches else 0)]
            left -= ids.numel()
        if len(ids):
            batches.append(ids)
        if (left is not None and left <= 0) or not len(ids):
            break
    if not batches:
        raise RuntimeError("nothing was measured: the texts hold no token")
    return batches


def run(lm: LanguageModel, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """Token ids and logits, batch by batch."""
    device = input_device(lm.model)
    with evaluating(lm.model):
        for ids in batches:
            moved = ids.to(device)
            out = model_forward(lm.model, moved, torch.ones_like(moved))
            yield moved, out.logits


Look = Callable[[str, Tensor, "Tensor | None"], None]  # the module's name, p (rows, F), u (rows, F) of gated MLPs


@contextmanager
def watched(found: Iterable[Found], look: Look) -> Iterator[None]:
    """Calls ``look`` with what a rule would decide about, whenever a module runs."""
    handles = [hook_input(one.module, _looking(one, look)) for one in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _looking(one: Found, look: Look) -> Callable[[Tensor], Tensor]:
    def seen(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if one.halves is None:
            look(one.name, rows, None)
        else:
            (gate, gate_bias), (up, up_bias) = one.halves.matrices(one.module)
            a = one.halves.activated(one.module, F.linear(rows, gate, gate_bias))
            look(one.name, a, F.linear(rows, up, up_bias))
        return x

    return seen


def watched_pass(lm: LanguageModel, found: list[Found], batches: list[Tensor], look: Look) -> None:
    with watched(found, look):
        for _ in run(lm, batches):
            pass


def scales_of(weigh: str, lm: LanguageModel, found: list[Found], batches: list[Tensor]) -> dict[str, Tensor]:
    """(F,) fp32 by module: what entries are worth."""
    norms = {one.name: decoder_norms(by_input(one.down)).float() for one in found}
    if weigh == "down":
        return norms
    sums: dict[str, Tensor] = {}
    power = 2 if weigh == "up_rms" else 1

    def look(name: str, p: Tensor, u: Tensor | None) -> None:
        assert u is not None
        total = u.double().abs().pow(power).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    watched_pass(lm, found, batches, look)
    tokens = sum(ids.numel() for ids in batches)
    means = {name: (total / tokens).pow(1 / power).float() for name, total in sums.items()}
    return {name: mean * norms[name] for name, mean in means.items()} if weigh == "up*down" else means


def counted(
    lm: LanguageModel, found: list[Found], batches: list[Tensor], learned: dict[str, Learned]
) -> dict[str, Tensor]:
    """(2^16,) int64 by module: scores by the leading bits of their fp32 form, which order them."""
    counts = {one.name: torch.zeros(1 << BITS, dtype=torch.int64, device=one.device) for one in found}
    at = {one.name: learned[one.name].to(one.device) for one in found}

    def look(name: str, p: Tensor, u: Tensor | None) -> None:
        bins = at[name].score(p).float().flatten().view(torch.int32) >> (31 - BITS)
        counts[name] += torch.bincount(bins, minlength=1 << BITS)

    watched_pass(lm, found, batches, look)
    return counts


def quantile(counts: Tensor, share: float) -> Tensor:
    """() fp32: what about ``share`` of the scores do not exceed, straight within a bin, whose ends differ by 1/256.

    Example:
        >>> counts = torch.zeros(1 << 16, dtype=torch.int64)
        >>> counts[torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32) >> 15] = 1
        >>> 2.0 <= float(quantile(counts, 0.5)) < 2.01
        True
    """
    below = counts.cumsum(0)
    wanted = share * float(below[-1])
    place = int(torch.searchsorted(below.double(), torch.tensor(wanted, dtype=torch.float64, device=below.device)))
    if place == 0:  # zeros, and what is not far from them
        return torch.zeros((), device=counts.device)
    ends = (torch.tensor([place, place + 1], dtype=torch.int32, device="cpu") << (31 - BITS)).view(torch.float32)
    inside = (wanted - float(below[place - 1])) / max(float(counts[place]), 1.0)
    return (ends[0] + (ends[1] - ends[0]) * inside).to(counts.device)


def dropped(
    rule: Weighed, lm: LanguageModel, found: list[Found], batches: list[Tensor], learned: dict[str, Learned]
) -> dict[str, tuple[Tensor, float]]:
    """By module: (F,) fp32 means of what was dropped, 0 where nothing ever was; the share of entries kept."""
    sums = {one.name: torch.zeros(3, one.width, dtype=torch.float64, device=one.device) for one in found}
    at = {one.name: learned[one.name].to(one.device) for one in found}

    def look(name: str, p: Tensor, u: Tensor | None) -> None:
        _, kept = rule.select(p, at[name])
        assert kept is not None
        h = p if u is None else p * u
        sums[name] += torch.stack([torch.where(kept, 0.0, h.double()).sum(0), (~kept).sum(0), kept.sum(0)])

    watched_pass(lm, found, batches, look)
    found_in = {}
    for name, (total, dropped, kept) in sums.items():
        mean = (total / dropped.clamp(min=1)).float()
        found_in[name] = mean, float(kept.sum() / (kept.sum() + dropped.sum()))
    return found_in
