"""What each kind of rule keeps of pre-activations that pass by in rectangles and never exist whole.

The codes are those of the whole matrix, whatever the cutting: bit for bit, ties, NaN and zeros included.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_kernels.ops import ops
from sae_kernels.reference import ordered_keys, relu
from sae_kernels.stock.dense import uniform_offsets

from . import _checks as check
from .codes import SparseCodes

if TYPE_CHECKING:
    from .distributed.shards import Shards

PER_TOKEN = frozenset({"target_norm", "attribution"})  # context with a row for each token; other context is per latent

Score = Callable[[Tensor, slice, slice], Tensor]


class Product:
    """``x @ weight / divisors`` (*batch_shape, F) that is computed where it is looked at: an ``attribution``.

    Args:
        x: (*batch_shape, d).
        weight: (d, F).
        divisors: (F,), or None.
        linear: ``functional.linear``, which stands above this file.
    """

    def __init__(self, x: Tensor, weight: Tensor, divisors: Tensor | None, linear: Callable[[Tensor, Tensor], Tensor]):
        self._x, self._weight, self._divisors, self._linear = x, weight, divisors, linear

    def whole(self) -> Tensor:
        """(*batch_shape, F)."""
        return self._of(self._x, slice(None))

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """(tokens, latents): a part. Tokens are numbered over all of ``batch_shape``."""
        return self._of(check.matrix(self._x)[place[0]], place[1])

    def _of(self, x: Tensor, latents: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            out = self._linear(x, self._weight[:, latents])
            return out if self._divisors is None else out / self._divisors[latents]


def as_tensor(context: Tensor | Product) -> Tensor:
    return context.whole() if isinstance(context, Product) else context


def _of_tokens(context: Tensor | Product, tokens: slice) -> Tensor:
    return context[tokens, slice(None)] if isinstance(context, Product) else context[tokens]


class Running(ABC):
    """What a rule keeps of a batch, of which it sees one rectangle after the other.

    The rectangles of a token come in ascending order of latents; their order and sizes are free otherwise. A shard of
    the latents is a rectangle like any other.

    Args:
        tokens, num_latents: of the whole matrix.
        backend: as everywhere.

    Attributes:
        wants_entries: whether :meth:`finish` is asked for the pre-activations at the codes, where those are not the
            values. Set before anything is added.

    Example:
        >>> pre = torch.tensor([[0.5, 2.0, 1.0, 3.0]])
        >>> running = se.TopK(2).running(tokens=1, num_latents=4)
        >>> for latents in (slice(0, 2), slice(2, 4)):
        ...     running.add(pre[:, latents], slice(0, 1), latents)
        >>> running.finish()[0].indices
        tensor([1, 3], dtype=torch.int32)
    """

    wants_entries = False

    def __init__(self, tokens: int, num_latents: int, backend: str) -> None:
        self.tokens, self.num_latents, self.backend = tokens, num_latents, backend

    @abstractmethod
    def add(self, pre: Tensor, tokens: slice, latents: slice) -> None:
        """Takes the pre-activations (tokens, latents) of a rectangle; the tensor may be overwritten afterwards."""

    @abstractmethod
    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        """The codes (tokens, num_latents), and the pre-activations at them where they are wanted."""

    def entries_at(self, pre: Tensor, codes: SparseCodes) -> Tensor | None:
        """(N,) of ``pre`` (rows, latents), where they are wanted."""
        return ops.gather(pre, codes.indices, codes.offsets, self.backend) if self.wants_entries else None


class InParts(Running):
    """A rule that decides each entry of a rectangle as it would in the whole matrix."""

    def __init__(self, tokens: int, num_latents: int, backend: str) -> None:
        super().__init__(tokens, num_latents, backend)
        self._parts: list[tuple[SparseCodes, slice, slice]] = []
        self._entries: list[Tensor] = []

    @abstractmethod
    def select(self, pre: Tensor, tokens: slice, latents: slice) -> SparseCodes:
        """The codes of a rectangle, in its own numbering."""

    def add(self, pre: Tensor, tokens: slice, latents: slice) -> None:
        codes = self.select(pre, tokens, latents).detach()
        self._parts.append((codes, tokens, latents))
        if (entries := self.entries_at(pre, codes)) is not None:
            self._entries.append(entries)

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        return joined(self._parts, self._entries, self.tokens, self.num_latents)


class WholeRows(InParts):
    """A rule that decides each token alone: it is given all latents of some tokens at a time."""

    def __init__(self, rule: Any, context: dict[str, Any], tokens: int, num_latents: int, backend: str) -> None:
        super().__init__(tokens, num_latents, backend)
        self.rule, self.context = rule, context

    def select(self, pre: Tensor, tokens: slice, latents: slice) -> SparseCodes:
        of_these = {name: _of_tokens(t, tokens) if name in PER_TOKEN else t for name, t in self.context.items()}
        return self.rule.select(pre, backend=self.backend, **of_these)


class RunningThreshold(InParts):
    """Every entry above its latent's threshold; see ``functional.threshold``.

    Args:
        theta: a number, () or (F,).
        capacity: of the whole, where the number of entries must not be asked for.
        values: makes the values of what is kept, where those are not the pre-activations.
    """

    def __init__(
        self, tokens: int, num_latents: int, backend: str, theta: Tensor | float, *, bandwidth: float | None = None,
        values: Callable[[Tensor, SparseCodes], Tensor] | None = None, capacity: Callable[[Tensor], int | None],
    ) -> None:  # fmt: skip
        super().__init__(tokens, num_latents, backend)
        self._theta, self._bandwidth, self._values, self._capacity = theta, bandwidth, values, capacity

    def select(self, pre: Tensor, tokens: slice, latents: slice) -> SparseCodes:
        theta = check.theta(self._theta, pre, self.num_latents)[latents]
        capacity = self._capacity(pre)
        values, indices, offsets, required = ops.threshold(pre, theta, self._bandwidth, capacity, False, self.backend)
        return SparseCodes(values, indices, offsets, (pre.shape[0],), pre.shape[1],
                           required=None if capacity is None else required)  # fmt: skip

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        codes, entries = super().finish()
        if self._values is not None:
            codes = codes.replace(values=self._values(codes.values, codes))
        return codes, entries


class RunningTopK(Running):
    """The k entries of each token that rank first. Those of the latents seen so far are held; each slab is merged in.

    Args:
        score: (rows, latents) what ranks in place of a rectangle's pre-activations.
        mask, magnitude, relu: as in ``functional.topk``; the mask is one of all latents.
        values: makes the values of what is kept, from what ``functional.topk`` returns.
        shards: over which the latents are cut, of which these are one.
    """

    def __init__(
        self, tokens: int, num_latents: int, backend: str, k: int, *, score: Score | None = None,
        mask: Tensor | None = None, magnitude: bool = False, relu: bool = True,
        values: Callable[[Tensor, SparseCodes], Tensor] | None = None, shards: Shards | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokens, num_latents, backend)
        self._wanted = check.integer_k(k, num_latents if shards is None else shards.num_latents)
        self.k, self._shards = min(self._wanted, num_latents), shards
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_latents,)):
            raise ValueError(
                f"mask must be boolean with shape ({num_latents},) in slabs, one for each "
                f"latent, got {mask.dtype} with shape {tuple(mask.shape)}"
            )
        self._score, self._mask, self._magnitude, self._relu, self._values = score, mask, magnitude, relu, values
        self._held: tuple[Tensor, Tensor | None, Tensor] | None = None  # (tokens, k) pre-activations, scores, latents

    def add(self, pre: Tensor, tokens: slice, latents: slice) -> None:
        score = None if self._score is None else self._score(pre, tokens, latents)
        if self._held is None:
            shape = self.tokens, self.k
            scores = None if score is None else score.new_empty(shape)
            self._held = pre.new_empty(shape), scores, pre.new_empty(shape, dtype=torch.int32)
        values, scores, indices = (None if t is None else t[tokens] for t in self._held)
        assert values is not None and indices is not None
        if not pre.shape[1]:
            return
        if latents.start == 0 and pre.shape[1] >= self.k:
            mask = None if self._mask is None else self._mask[latents]
            _, first = ops.topk(pre, score, mask, self.k, self._magnitude, False, self.backend)
            indices.copy_(first.view(indices.shape))
            torch.gather(pre, 1, indices.long(), out=values)
            if scores is not None and score is not None:
                torch.gather(score, 1, indices.long(), out=scores)
            return
        kept = max(min(self.k - latents.start, pre.shape[1]), 0)  # of the first k latents, all
        if kept:
            columns = slice(latents.start, latents.start + kept)
            values[:, columns] = pre[:, :kept]
            indices[:, columns] = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=pre.device)
            if scores is not None and score is not None:
                scores[:, columns] = score[:, :kept]
        if kept < pre.shape[1]:
            ops.merge_topk(
                values, scores, indices, pre[:, kept:], None if score is None else score[:, kept:], self._mask,
                latents.start + kept, self._magnitude, self.backend,
            )  # fmt: skip

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        assert self._held is not None
        entries, scores, latents = self._held
        values = torch.where(entries <= 0, 0.0, entries) if self._relu else entries
        if self._mask is not None:
            values = torch.where(self._mask[latents.long()], values, 0.0)
        offsets = uniform_offsets(self.tokens, self.k, values.device)
        codes = SparseCodes(values.flatten(), latents.flatten(), offsets, (self.tokens,), self.num_latents, self.k)
        if self._values is not None:
            codes = codes.replace(values=self._values(codes.values, codes))
        found = entries.flatten() if self.wants_entries else None
        if self._shards is None:
            return codes, found
        by = scores if scores is not None else entries.abs() if self._magnitude else entries
        allowed = None if self._mask is None else self._mask[latents.long()]
        return self._shards.narrowed(codes, self._shards.kept_of_rows(by, allowed, self._wanted).flatten(), found)


class RunningOverSources(RunningTopK):
    """Each row's k first are held, the rows of a source below those of another; of a token's rows k are kept at last.

    Nothing waits for the device: how many entries are kept is known.
    """

    def __init__(
        self, rows: int, num_latents: int, backend: str, k: int, sources: int, shards: Shards | None = None
    ) -> None:
        whole = num_latents if shards is None else shards.num_latents
        self._of_token, self._sources = check.integer_k(k, whole * sources), sources
        super().__init__(rows, num_latents, backend, min(k, whole), shards=shards)

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        assert self._held is not None
        entries, _, latents = self._held
        tokens, held, device = self.tokens // self._sources, entries.shape[1], entries.device
        if self._shards is not None:
            kept = self._shards.kept_of_rows(entries, None, self._of_token, self._sources)
            offsets = uniform_offsets(self.tokens, held, device)
            values = torch.where(entries <= 0, 0.0, entries)
            codes = SparseCodes(values.flatten(), latents.flatten(), offsets, (self.tokens,), self.num_latents)
            found = entries.flatten() if self.wants_entries else None
            room = min(tokens * self._of_token, kept.numel())
            return self._shards.narrowed(codes, kept.flatten(), found, room=room)
        by_token = entries.view(self._sources, tokens, held).transpose(0, 1).reshape(tokens, -1)
        _, kept = ops.topk(by_token, None, None, self._of_token, False, False, self.backend)
        kept, token = kept.view(tokens, self._of_token).long(), torch.arange(tokens, device=device)[:, None]
        source, place = kept // held, kept % held
        flat = ((source * tokens + token) * held + place).flatten().sort().values
        offsets = torch.searchsorted(flat, torch.arange(self.tokens + 1, device=device) * held)
        found = entries.flatten()[flat]
        values = torch.where(found <= 0, 0.0, found)
        codes = SparseCodes(values, latents.flatten()[flat], offsets, (self.tokens,), self.num_latents)
        return codes, found if self.wants_entries else None


class _ByFlatPosition(Running):
    """A rule whose entries compete beyond their row: what may still be kept is held, in order of flat position."""

    def __init__(self, tokens: int, num_latents: int, backend: str) -> None:
        super().__init__(tokens, num_latents, backend)
        self._held: tuple[Tensor, Tensor, Tensor | None] | None = None  # values, flat positions, entries

    @abstractmethod
    def candidates(self, pre: Tensor, latents: slice) -> SparseCodes:
        """The entries of a rectangle that may be kept in the whole matrix."""

    @abstractmethod
    def kept(self, values: Tensor, flat: Tensor) -> Tensor | None:
        """Ascending positions of the held entries that may still be kept; None: all of them."""

    def add(self, pre: Tensor, tokens: slice, latents: slice) -> None:
        codes = self.candidates(pre, latents)
        entries = self.entries_at(pre, codes)
        rows = _rows_of(codes)
        found = codes.values, (tokens.start + rows) * self.num_latents + latents.start + codes.indices, entries
        if self._held is not None:
            found = _in_order(self._held, found)
        kept = self.kept(found[0], found[1])
        self._held = found if kept is None else _taken(found, kept)

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        assert self._held is not None
        values, flat, entries = self._held
        bounds = torch.arange(self.tokens + 1, device=flat.device) * self.num_latents
        indices, offsets = (flat % self.num_latents).int(), torch.searchsorted(flat, bounds)
        return SparseCodes(values, indices, offsets, (self.tokens,), self.num_latents), entries


class RunningBatch(_ByFlatPosition):
    """The ``total`` entries of the batch with the largest relu(pre), ties to the lowest flat position.

    With ``shards`` those of the latents of all shards, of which these are one; of ``among`` sources, each one's tokens
    below another's.
    """

    def __init__(
        self, tokens: int, num_latents: int, backend: str, total: int, shards: Shards | None = None, among: int = 1
    ) -> None:
        super().__init__(tokens, num_latents, backend)
        self._wanted, self._shards, self._among = total, shards, among
        self._total = total if shards is None else min(total, tokens * num_latents)
        self._cut: Tensor | None = None  # () the least value that can still be kept, on a CPU, where nobody waits

    def candidates(self, pre: Tensor, latents: slice) -> SparseCodes:
        shape = (pre.shape[0],), pre.shape[1]
        if self._cut is not None:
            # An entry equal to the cut may precede one that is held: the largest number below it is exceeded by both.
            below = torch.nextafter(self._cut, torch.zeros_like(self._cut)).expand(pre.shape[1])
            values, indices, offsets, _ = ops.threshold(pre, below, None, None, False, self.backend)
            if values.shape[0] <= self._total:
                return SparseCodes(values, indices, offsets, *shape)
        total = min(self._total, pre.numel())
        values, indices, offsets = ops.batch_topk(pre, None, total, self.backend)
        return SparseCodes(values, indices, offsets, *shape)

    def kept(self, values: Tensor, flat: Tensor) -> Tensor | None:
        if values.shape[0] < self._total:
            return None
        kept = ops.batch_topk(values[None], None, self._total, self.backend)[1].long()
        if values.is_cpu and self._total and not torch.compiler.is_compiling():
            least = values[kept].amin().to(torch.promote_types(values.dtype, torch.float32))
            self._cut = least if bool(least > 0) else None  # of zeros the first count, and NaN is no number
        return kept

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        codes, entries = super().finish()
        if self._shards is None:
            return codes, entries
        return self._shards.narrowed(codes, self._shards.kept_of_batch(codes, self._wanted, among=self._among), entries)


class RunningLatents(_ByFlatPosition):
    """Each latent's ``budgets`` (F,) entries with the largest relu(pre), ties to the lowest token.

    Reads the device for the budgets, once. With ``shards`` they are those of the tokens of all groups of ranks.
    """

    def __init__(
        self, tokens: int, num_latents: int, backend: str, budgets: Tensor, shards: Shards | None = None
    ) -> None:
        super().__init__(tokens, num_latents, backend)
        self._budgets, self._shards = budgets, shards
        self._on_host = budgets.cpu()

    def candidates(self, pre: Tensor, latents: slice) -> SparseCodes:
        budgets = self._budgets[latents].clamp(max=pre.shape[0])
        total = int(self._on_host[latents].clamp(max=pre.shape[0]).sum())
        self._are_settled = pre.shape[0] == self.tokens  # such latents have seen all of their tokens
        values, indices, offsets = ops.feature_topm(pre, budgets, total, self.backend)
        return SparseCodes(values, indices, offsets, (pre.shape[0],), pre.shape[1])

    def kept(self, values: Tensor, flat: Tensor) -> Tensor | None:
        if self._are_settled:
            return None
        return _first_of_latents(values, flat % self.num_latents, self._budgets)

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        codes, entries = super().finish()
        kept = None if self._shards is None else self._shards.kept_of_latents(codes, self._budgets)
        return (codes, entries) if kept is None or self._shards is None else self._shards.narrowed(codes, kept, entries)


# --- entries and codes of several rectangles -------------------------------------------------------------------------


def joined(
    parts: list[tuple[SparseCodes, slice, slice]], entries: list[Tensor], tokens: int, num_latents: int
) -> tuple[SparseCodes, Tensor | None]:
    """The codes of rectangles as those of the whole matrix; a token's latents ascend from part to part.

    With a capacity the result has that of the first part, and the device is not asked how full they are.
    """
    first = parts[0][0]
    if len(parts) == 1 and parts[0][1:] == (slice(0, tokens), slice(0, num_latents)):
        return first, entries[0] if entries else None
    device, dtype = first.offsets.device, first.offsets.dtype
    counts = torch.zeros(tokens, dtype=dtype, device=device)
    for codes, rows, _ in parts:
        counts[rows] += codes.offsets.diff()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    room = first.values.shape[0] if first.required is not None else sum(codes.values.shape[0] for codes, *_ in parts)
    out = [first.values.new_empty(room + 1), first.indices.new_empty(room + 1)]  # and one for what does not fit
    out += [entries[0].new_empty(room + 1)] if entries else []
    if first.required is not None:  # what nobody owns
        for whole in out:
            whole.zero_()
    place_of_row = offsets[:-1].clone()
    for number, (codes, rows, latents) in enumerate(parts):
        row = _rows_of(codes)
        position = torch.arange(row.shape[0], device=device)
        start = torch.cat([place_of_row[rows] - codes.offsets[:-1], counts.new_full((1,), room)])  # of no row: beyond
        place = (position + start[row]).clamp(max=room)
        values = codes.values, codes.indices + latents.start, *entries[number : number + 1]
        for whole, part in zip(out, values, strict=True):
            whole[place] = part
        place_of_row[rows] += codes.offsets.diff()
    required = None
    if first.required is not None:
        required = torch.stack([codes.required for codes, *_ in parts if codes.required is not None]).sum()
        offsets = offsets.clamp(max=room)
    of_rows = all(latents == slice(0, num_latents) for *_, latents in parts)
    k = first.k if of_rows and all(codes.k == first.k for codes, *_ in parts) else None
    codes = SparseCodes(out[0][:room], out[1][:room], offsets, (tokens,), num_latents, k, required=required)
    return codes, out[2][:room] if entries else None


def _rows_of(codes: SparseCodes) -> Tensor:
    """The row (N,) of each entry; entries that belong to no row get the number of rows. Looks at no value."""
    entries = codes.values.shape[0]
    counts = torch.cat([codes.offsets.diff(), entries - codes.offsets[-1:]])
    return torch.repeat_interleave(counts, output_size=entries)


def _in_order(a: tuple[Tensor, Tensor, Tensor | None], b: tuple[Tensor, Tensor, Tensor | None]):
    """Two lists of values, ascending flat positions and entries as one list."""
    at_a, at_b = a[1], b[1]
    place = torch.cat([
        torch.arange(at_a.shape[0], device=at_a.device) + torch.searchsorted(at_b, at_a),
        torch.arange(at_b.shape[0], device=at_b.device) + torch.searchsorted(at_a, at_b),
    ])  # fmt: skip
    merged = []
    for x, y in zip(a, b, strict=True):
        both = None if x is None or y is None else torch.cat([x, y])
        merged.append(None if both is None else torch.empty_like(both).scatter_(0, place, both))
    return tuple(merged)


def _taken(entries: tuple[Tensor, Tensor, Tensor | None], kept: Tensor):
    return tuple(None if t is None else t[kept] for t in entries)


def _first_of_latents(values: Tensor, latents: Tensor, budgets: Tensor) -> Tensor:
    """Ascending positions of each latent f's ``budgets[f]`` entries with the largest relu(value), ties to the first.

    Reads the device for their number.
    """
    order = ordered_keys(relu(values)).argsort(descending=True, stable=True)
    order = order[latents[order].argsort(stable=True)]
    latent = latents[order]
    rank = torch.arange(latent.shape[0], device=latent.device) - torch.searchsorted(latent, latent)
    return order[rank < budgets[latent]].sort().values
