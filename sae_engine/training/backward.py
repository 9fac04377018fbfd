"""The backward half of a step: from the losses' pulls to the terms of the latent pass and the small gradients.

And what a step counts: latents that are dead, and batches that are not finite.
"""
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels._terms import GATED, GIVEN, NUMBER_OF_LISTS, Term
from sae_kernels.dispatch import capturing
from sae_kernels.ops import ops
from sae_kernels.stock.densified import is_dense

from .. import _checks as check
from ..codes import ByLatent, SparseCodes
from ..distributed.blocks import aligned
from ..distributed.shards import Shards
from ..losses import Pull
from .forward import Forward, Kept
from .through_rule import norm_slopes, through_rule, through_window


class SourceBackward(NamedTuple):
    """Everything that the gradients of one source's weights follow from, not yet summed over the latents.

    Where a loss reconstructs from nested prefixes, the codes of a token lie in ``repeats`` rows, one for each range of
    latents between two widths, because the gradient at the decoder differs from range to range.
    """

    terms: tuple[list, ...]  # the elements of all terms, as an operator takes them
    x: Tensor  # (B * repeats, d_in), what the encoder multiplied
    repeats: int
    along: Tensor | None  # (F,): adds along[f] * W_dec[f] to the decoder's gradient
    dense: list[Tensor]  # (B, F) gradients at the pre-activations of rules whose gradient is dense


class Backward(NamedTuple):
    """What the gradients of all parameters follow from."""

    sources: list[SourceBackward]
    small: dict[Tensor, Tensor]  # of b_dec (but for its part through the encoder), W_skip and the rules
    at_decoders: Sequence[Tensor] = ()  # (B, d_out) each: all terms hold columns of them

    @property
    def dense(self) -> list[Tensor]:
        return [gradient for source in self.sources for gradient in source.dense]


def backward(forward: Forward, pulls: Sequence[Pull]) -> Backward:
    small: dict[Tensor, Tensor] = {}
    pulled = []
    for number, kept in enumerate(forward.kept):
        mine = [pull for pull in pulls if pull.number == number]
        if not mine:
            continue
        for pull in mine:
            for parameter, gradient in (pull.parameters or {}).items():
                _add(small, parameter, gradient)
        at_decoder = _at_decoder(forward, mine, small)
        if at_decoder is not None and len(forward.sources) > 1:  # of which each source then takes columns
            at_decoder = forward.of_all_ranks(at_decoder.to(forward.dtype), "gradient")
        at_values, at_norms, at_entries, everywhere, dropped = (
            _total(getattr(pull, name) for pull in mine)
            for name in ("values", "norms", "entries", "everywhere", "dropped")
        )
        reaches_norms = at_norms is not None or (at_values is not None and forward.sources[0].norms is not None)
        if reaches_norms and getattr(forward.sae, "decoder_norm", "joint") != "joint":
            raise ValueError("decoder_norm must be 'joint' with a loss whose gradient reaches the norms, got 'sum'")
        pulled.append(Pulled(
            number, at_decoder, _of_sources(kept, at_values), at_norms, _of_sources(kept, at_entries), everywhere,
            dropped,
        ))  # fmt: skip
    sources = [_of_source(forward, number, pulled, small) for number in range(len(forward.sources))]
    viewed = len(sources) > 1 and forward.shards is None and all(of.everywhere is None for of in pulled)
    return Backward(sources, small, [of.at_decoder for of in pulled if viewed and of.at_decoder is not None])


class Pulled(NamedTuple):
    """The gradients at the codes of one number, from all losses."""

    number: int
    at_decoder: Tensor | None  # (B, d_out), or (B, repeats, d_out)
    at_values: Sequence[Tensor | None]  # of each source (N,)
    at_norms: Tensor | None  # (F,), of several sources (sources, F)
    at_entries: Sequence[Tensor | None]  # of each source (N,)
    everywhere: Tensor | None  # as at_norms
    dropped: Tensor | None  # as at_norms


def _of_sources(kept: Kept, at_values: Tensor | None) -> Sequence[Tensor | None]:
    if at_values is None or len(kept.parts) == 1:
        return [at_values] * len(kept.parts)
    return at_values.split([part.codes.values.shape[0] for part in kept.parts])


def _of_source(forward: Forward, s: int, pulled: Sequence[Pulled], small: dict[Tensor, Tensor]) -> SourceBackward:
    """What the gradients of source ``s`` follow from; those of its rule's parameters are added to ``small``."""
    mine, wide, several = forward.sources[s], forward.wide, len(forward.sources) > 1
    repeats = max((runs.batch_shape[-1] for runs in forward.runs.values()), default=1)
    terms: tuple[list, ...] = tuple([] for _ in range(NUMBER_OF_LISTS))
    x = mine.encoded if repeats == 1 else mine.encoded.repeat_interleave(repeats, 0)
    dense: list[Tensor] = []
    along = None
    if has_base := any(of_number.everywhere is not None for of_number in pulled):
        mean = x.mean(0, keepdim=True, dtype=wide).to(x.dtype)
        x = torch.cat([x, mean if len(x) else torch.zeros_like(mean)])  # a group of ranks may have no token
    for number, at_decoder, of_values, at_norms, of_entries, everywhere, dropped in pulled:
        part, at_values = forward.kept[number].parts[s], of_values[s]
        codes = _in_rows(part.codes, forward.runs.get(number), repeats)
        reached = at_decoder is not None
        if at_decoder is None:
            grad = forward.given.new_zeros(codes.rows, mine.source.d_out, dtype=forward.dtype)
        else:
            own = at_decoder[..., mine.source.writes].to(forward.dtype)
            grad = _of_rows(own if several else forward.of_all_ranks(own, "gradient"), repeats)
        if at_norms is not None:  # the slope of a row's norm is its direction
            norms = mine.source.W_dec.to(wide).norm(dim=1)
            slopes = at_norms[s] if several else at_norms
            along = _total([along, slopes / torch.where(norms == 0, 1.0, norms)])
        if part.rule.has_gate:
            offered = at_values
            if at_values is not None and mine.norms is not None:
                offered = at_values * mine.norms_at(part.codes)
                along = _total([along, forward.by_latent(part.codes, at_values * part.values) / mine.divisors])
            values = part.values
            if has_base:
                offered = torch.zeros_like(values, dtype=wide) if offered is None else offered
                codes, values, grad, offered = _with_base(codes, values, grad, offered, None)
            _append(terms, term_of(codes, values, grad, offered, GATED))
            continue
        decoder, values = mine.weights.decoder, part.values.to(wide)
        inner = values * 0
        if reached:
            inner = ops.decode_backward_values(
                grad, values, codes.indices, codes.offsets, decoder, forward.backend
            )
        at_codes = inner if mine.norms is None else inner / mine.norms_at(part.codes)
        at_codes = at_codes if at_values is None else at_codes + at_values
        at_pre, parameters = through_rule(part, at_codes, forward)
        for parameter, gradient in parameters.items():
            _add(small, parameter, gradient)
        if part.dropped is not None:
            slope = None if dropped is None else dropped[s] if several else dropped
            for parameter, gradient in through_window(part, mine, forward, grad, inner, slope).items():
                _add(small, parameter, gradient)
        if part.rule.entry_values is None:
            dense.append(at_pre if mine.norms is None else at_pre * mine.norms)
            offered = torch.zeros_like(inner)
        else:
            offered = at_pre.to(wide) if mine.norms is None else at_pre.to(wide) * mine.norms_at(part.codes)
        if (at_entries := of_entries[s]) is not None:
            offered = offered + at_entries
        values = part.values
        if has_base:
            base = None if everywhere is None else (everywhere[s] if several else everywhere) * codes.rows
            codes, values, grad, offered = _with_base(codes, values, grad, offered, base)
        _append(terms, term_of(codes, values, grad, offered, GIVEN))
        if mine.norms is not None:
            slopes = norm_slopes(part, forward, at_pre, inner, mine.divisors)
            along = _total([along, slopes / mine.divisors])
    return SourceBackward(terms, x, repeats, along, dense)


def _with_base(
    codes: SparseCodes, values: Tensor, grad: Tensor, offered: Tensor, base: Tensor | None
) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
    """A term with one row more: of the mean input, on which each latent has the slope ``base`` (F,), or none.

    What a slope that all tokens share adds to the gradients of W_enc and b_enc is so found by the same pass.
    """
    grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
    owned = codes.offsets[-1:]
    if base is None:
        offsets, indices = torch.cat([codes.offsets, owned]), codes.indices
    else:
        offsets = torch.cat([codes.offsets, owned + base.shape[0]])
        indices = torch.cat([codes.indices, torch.arange(base.shape[0], dtype=torch.int32, device=base.device)])
        values = torch.cat([values, values.new_zeros(base.shape[0])])
        offered = torch.cat([offered, base.to(offered.dtype)])
    rows = codes.rows + 1
    wider = replace(codes, values=values, indices=indices, offsets=offsets, batch_shape=(rows,), k=None, _transposed=[])
    return wider, values, grad, offered


def term_of(codes: SparseCodes, values: Tensor, grad: Tensor, offered: Tensor | None, mode: int) -> Term:
    """One output's part in the latent pass; dense codes need no transposed index."""
    if is_dense("decode_backward_weight", codes.values.shape[0], codes.rows, codes.num_latents, codes.device.type):
        index = ByLatent(codes.offsets.new_empty(0), codes.indices.new_empty(0), codes.offsets.new_empty(0))
    else:
        index = codes.by_latent
    offered = values.new_empty(0) if offered is None else offered
    return Term(grad, values, offered, codes.indices, codes.offsets, *index, mode)


def _append(lists: tuple[list, ...], term: Term) -> None:
    for elements, element in zip(lists, term, strict=True):
        elements.append(element)


def _in_rows(codes: SparseCodes, runs: SparseCodes | None, repeats: int) -> SparseCodes:
    """The same entries in ``repeats`` rows a token: in runs of latents, or all in the first."""
    if repeats == 1:
        return codes
    if runs is None:
        ends = codes.offsets[1:].repeat_interleave(repeats, output_size=codes.rows * repeats)
        runs = replace(codes, offsets=torch.cat([codes.offsets[:1], ends]), k=None, _transposed=[])
    return replace(runs, batch_shape=(codes.rows * repeats,), _transposed=[])


def _of_rows(grad: Tensor, repeats: int) -> Tensor:
    """(B * repeats, d_out) from (B, d_out), which is then the first row's, or from (B, repeats, d_out)."""
    if repeats > 1 and grad.dim() == 2:
        grad = torch.nn.functional.pad(grad[:, None], (0, 0, 0, repeats - 1))
    return grad.flatten(0, -2)


def _total(tensors: Iterable[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return functools.reduce(torch.add, present) if present else None


def _add(small: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    small[parameter] = small[parameter] + gradient if parameter in small else gradient


def _at_decoder(forward: Forward, pulls: list[Pull], small: dict[Tensor, Tensor]) -> Tensor | None:
    """(B, d_out) at the sum of decoder rows; what passes b_dec and W_skip on its way is added to ``small``.

    With nested prefixes (B, repeats, d_out), at the sums of each run of latents: a run is part of its own prefix and of
    all wider ones.
    """
    sae, info = forward.sae, forward.info
    outputs = _scaled_outputs(pulls)
    flat, nested = ([output for output in outputs if output.dim() == dims] for dims in (2, 3))
    decoded = _total(pull.decoded for pull in pulls)
    whole = _total([*flat, *(output.sum(1) for output in nested)])
    if whole is None:
        return decoded
    if info.skipped is not None:
        for weight, read, written in sae._skips():
            pairs = zip(forward.pieces_of(whole[:, written]), forward.pieces_of(info.skipped[:, read]), strict=True)
            _add(small, weight, forward.over_tokens([aligned(a).T @ aligned(b.to(whole.dtype)) for a, b in pairs]))
    if info.std is not None:
        whole, flat = whole * info.std, [output * info.std for output in flat]
    _add(small, sae.b_dec, forward.sum_rows(whole))
    decoded = _total([decoded, *flat])
    if not nested:
        return decoded
    runs = _total(output.flip(1).cumsum(1).flip(1) for output in nested)
    assert runs is not None
    runs = runs if info.std is None else runs * info.std[:, None]
    return runs if decoded is None else runs + decoded[:, None]


def _scaled_outputs(pulls: list[Pull]) -> list[Tensor]:
    """The pulls' gradients at the output; where there is one, in the residual's memory, which nobody reads any more."""
    pairs = [(pull.output, pull.scale) for pull in pulls if pull.output is not None]
    multiply = Tensor.mul_ if len(pairs) == 1 else Tensor.mul
    return [output if scale == 1 else multiply(output, scale) for output, scale in pairs]


# --- which latents are dead: counted on the device, read when that is needed -----------------------------------------


class DeadLatents:
    """Tokens since each latent last fired (value ≠ 0), and a bound on how many are dead that costs no waiting.

    Args:
        d_sae: number of latents.
        dead_after: tokens without firing after which a latent counts as dead (Gao et al. 2024: 10 million).
        read_interval: steps between two reads of the device, which happen only once enough tokens have passed for any
            latent to be dead. The bound holds for all steps between.
        shards: over which latents are cut, of which these are some of ``every``; the bound is on those of all.

    Attributes:
        since_fired: (d_sae,) int64.
        tokens: seen so far, on the host.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> dead = DeadLatents(3, dead_after=10)
        >>> dead.count(torch.tensor([True, False, False]), batch_tokens=10)
        >>> dead.mask
        tensor([False,  True,  True])
    """

    def __init__(
        self, d_sae: int, *, dead_after: int = 10_000_000, read_interval: int = 100, device=None,
        shards: Shards | None = None, every: int | None = None,
    ) -> None:  # fmt: skip
        self.shards, self.every = shards, d_sae if every is None else every
        self.dead_after = check.integer_k(dead_after, name="dead_after")
        self.read_interval = check.integer_k(read_interval, name="read_interval")
        self.since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens, self._bound, self._holds_until = 0, 0, self.dead_after - 1  # no counter exceeds `tokens`
        self.assumed: int | None = None  # while a graph is captured that is replayed where this bound holds
        self._captured = False  # by somebody else: replays move the counters and not `tokens`

    @property
    def mask(self) -> Tensor:
        """(d_sae,) bool, True for dead latents."""
        return self.since_fired >= self.dead_after

    def share(self) -> Tensor:
        """() of all latents, dead ones."""
        if self.shards is None:
            return self.mask.mean(dtype=torch.float32)
        return self.shards.wire.add(self.mask.sum(), "dead").float() / self.every

    def at_most(self, batch_tokens: int) -> int:
        """No more latents than this are dead now: exact on a CPU, else read at most once in ``read_interval`` steps.

        All of them once a CUDA graph was captured for no bound in particular: the host does not hear of its replays.
        """
        if self.assumed is not None:
            return self.assumed
        self._captured |= capturing(self.since_fired)
        if self._captured:
            return self.every
        if self.tokens <= self._holds_until:
            return self._bound
        ahead = (self.read_interval - 1) * batch_tokens if self.since_fired.is_cuda else 0  # for a CPU nobody waits
        number = (self.since_fired + ahead >= self.dead_after).sum()
        self._bound = int(number if self.shards is None else self.shards.wire.add(number, "dead"))
        self._holds_until = self.tokens + ahead
        return self._bound

    def count(self, fired: Tensor, batch_tokens: int, skip: Tensor | None = None) -> None:
        """After a batch: ``fired`` (d_sae,) bool; where ``skip`` () is set, the batch does not count."""
        self.since_fired.add_(batch_tokens)
        if skip is not None:
            fired = fired > skip
            self.since_fired.add_(skip, alpha=-batch_tokens)
        self.since_fired.masked_fill_(fired, 0)
        self.tokens += batch_tokens

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        until = self.tokens - 1 if self._captured else self._holds_until
        since_fired = self.since_fired.clone()
        return {"since_fired": since_fired, "tokens": self.tokens, "bound": self._bound, "holds_until": until}

    def load_state_dict(self, state: dict) -> None:
        since_fired = state["since_fired"].to(self.since_fired.device).flatten()
        check.shaped("since_fired", since_fired, self.since_fired.shape, self.since_fired, why="one per latent")
        self.since_fired.copy_(since_fired)
        self.tokens, self._bound, self._holds_until = state["tokens"], state["bound"], state["holds_until"]
        self._captured = False


# --- batches that are not finite: found on the device, told to the host when that costs no waiting -----------------

MODES = ("raise", "skip")


class Finite:
    """Counts such batches in ``count`` () int64, on the device, and raises for them with ``mode="raise"``.

    ``groups`` of ranks each have a summand of the gradients.
    """

    def __init__(self, mode: str, device: torch.device, groups: int = 1) -> None:
        if mode not in MODES:
            raise ValueError(f"nonfinite must be one of {MODES}, got {mode!r}")
        self.mode, self.groups = mode, groups
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._told = 0  # of the count, how many were raised for
        self._on_the_way: tuple[Tensor, torch.cuda.Event] | None = None

    def of(self, loss: Tensor, pending: Backward, *, has_capacity: bool) -> Tensor | None:
        """A flag () that the batch's update must not happen; None where the host knows that it may (on a CPU).

        A gradient is a sum of products of slopes with inputs or values, and so at most the product of their norms.
        Where that has a finite square, which is what Adam keeps, an update writes nothing that is not finite.
        """
        by_kind = zip(*(source.terms for source in pending.sources), strict=True)
        grads, values, offered, _, offsets, *_ = ([*chain.from_iterable(lists)] for lists in by_kind)
        if has_capacity:  # what lies behind the last row is nobody's
            values, offered = ([_owned(t, ends) for t, ends in zip(ts, offsets, strict=True)]
                               for ts in (values, offered))  # fmt: skip
        slopes = [*(pending.at_decoders or grads), *offered, *pending.dense, *pending.small.values()]
        slopes += [source.along for source in pending.sources if source.along is not None]
        multiplied = [*(source.x for source in pending.sources), *values]
        loss = loss.sum() if loss.dim() else loss  # of pieces, where they are summed as a tree
        numbers = torch.stack([loss, *torch._foreach_norm([*slopes, *multiplied], 2, dtype=loss.dtype)])
        if self.groups > 1:  # as if each had as much as this one: none of them may
            numbers[1 : 1 + len(slopes)] *= self.groups
        if not numbers.is_cpu:
            return _is_too_large(numbers, len(slopes))
        is_bad = _is_too_large_by_host(numbers, len(slopes))
        return torch.ones((), dtype=torch.bool, device="cpu") if is_bad else None

    def note(self, bad: Tensor | None) -> None:
        """After the update: counts, and starts telling the host."""
        if bad is not None:
            self.count.add_(bad)
        if not capturing(self.count):
            self.told()

    def told(self) -> None:
        """Raises FloatingPointError, with "raise", where the host has heard of a batch that was not finite."""
        if self.mode != "raise":
            return
        if self.count.is_cpu:
            return self._raise_for(int(self.count))
        if self._on_the_way is not None and self._on_the_way[1].query():
            number = int(self._on_the_way[0])
            self._on_the_way = None
            self._raise_for(number)
        if self._on_the_way is None:
            self._on_the_way = _sent(self.count)

    def _raise_for(self, number: int) -> None:
        new, self._told = number - self._told, number
        if new > 0:
            late = "" if self.count.is_cpu else " (of an earlier call: a GPU tells later)"
            raise FloatingPointError(
                f"input, loss or gradients of {new} batch(es) held NaN or Inf, or numbers too large{late}; parameters, "
                'moments and counters are those before it. Look at the batch, or pass nonfinite="skip" to leave it out'
            )


def _is_too_large(numbers: Tensor, slopes: int) -> Tensor:
    """() bool, whether a loss or the square of a bound on gradients is not finite; where the device decides.

    ``numbers`` are the loss, the norms of ``slopes`` slopes and those of what they are multiplied by.
    """
    of_slopes, of_multiplied = numbers[1 : 1 + slopes].sum(), numbers[1 + slopes :].sum()
    bound = torch.addcmul(of_slopes, of_slopes, of_multiplied)
    return torch.addcmul(numbers[0], bound, bound) * 0 != 0  # of NaN and of Inf: NaN


def _is_too_large_by_host(numbers: Tensor, slopes: int) -> bool:
    """The same on a CPU, which has read five numbers before it has called an operator."""
    loss, *norms = numbers.tolist()
    bound = sum(norms[:slopes]) * (1 + sum(norms[slopes:]))
    return not abs(loss + bound * bound) <= torch.finfo(numbers.dtype).max  # nor does NaN


def _sent(number: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A GPU's number on its way to the host, and the event that says when it is there."""
    there, event = torch.empty_like(number, device="cpu", pin_memory=True), torch.cuda.Event()
    there.copy_(number, non_blocking=True)
    event.record()
    return there, event


def _owned(entries: Tensor, offsets: Tensor) -> Tensor:
    """The entries (N,) that belong to a row, 0 for the others."""
    return torch.where(torch.arange(entries.numel(), device=entries.device) < offsets[-1], entries, 0.0)
