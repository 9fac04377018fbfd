"""A batch in chunks of rows: what each rule keeps of the chunks, merged into what it keeps of the whole, exactly."""
from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import _passes, functional
from ..codes import SparseCodes, cat
from ..rules.base import Activation

SHARE_OF_FREE_MEMORY = 4  # pre-activations get a quarter of it


def free_memory_bytes(device: torch.device) -> int:
    """Memory that nobody uses at the moment; half of all of it where the system does not say."""
    if device.type == "cuda":  # the driver counts as used what torch's allocator keeps for later
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 4 << 30
    return free if pages == "SC_AVPHYS_PAGES" else free // 2


def default_budget_bytes(device: torch.device) -> int:
    return free_memory_bytes(device) // SHARE_OF_FREE_MEMORY


def rows_within(budget_bytes: int, d_sae: int, dtype: torch.dtype) -> int:
    """Rows of pre-activations that fit into ``budget_bytes``; at least one."""
    return max(budget_bytes // (d_sae * dtype.itemsize), 1)


class PreActivations:
    """The encoder's product. MKL writes it to memory that serves every step: fresh memory costs a fifth more.

    (oneDNN allocates its result itself; on a GPU, PyTorch's allocator keeps memory at hand.)
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight + bias`` (rows, F), overwritten by the next call."""
        if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or functional.by_onednn(x, weight):
            return functional.linear(x, weight, bias)
        size = x.shape[0] * weight.shape[1]
        if self._memory is None or self._memory.dtype != x.dtype or self._memory.numel() < size:
            self._memory = None  # before its successor is made
            self._memory = x.new_empty(size)
        out = self._memory[:size].view(x.shape[0], weight.shape[1])
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias.to(x.dtype), x, weight, out=out)


class Parts:
    """What one rule keeps of a batch of ``rows`` tokens, chunk by chunk.

    A rule of scope "row" keeps of each chunk what it keeps of the batch. Others name candidates
    (``Activation.candidates``); of those seen so far the first under (value descending, flat index ascending) stay, of
    the whole batch or of each latent.
    """

    def __init__(self, rule: Activation, rows: int, num_latents: int, backend: str) -> None:
        self.rule, self.rows, self.num_latents, self.backend = rule, rows, num_latents, backend
        self.wants_entries = rule.entry_values is not None and not rule.has_gate
        self.codes: list[SparseCodes] = []
        self.entries: list[Tensor] = []
        self.running: tuple[Tensor, Tensor, Tensor | None] | None = None  # values, flat positions, entries

    def add(self, pre: Tensor, start: int, context: dict[str, Tensor]) -> None:
        """Rows ``start:`` of the batch, as pre-activations (chunk, F)."""
        whole = pre.shape[0] == self.rows
        if whole or self.rule.scope == "row":
            if not whole and self.rule.entry_values is None:
                raise self._needs_whole(pre)
            with torch.enable_grad():  # a rule that learns from what it keeps stores more then
                codes = self.rule.select(pre, backend=self.backend, **context).detach()
            self.codes.append(codes)
            if self.wants_entries:
                self.entries.append(_passes.entries_of(pre, codes, self.backend))
            return
        if self.rule.candidates is None:
            raise self._needs_whole(pre)
        codes = self.rule.candidates(pre, self.rows, backend=self.backend, **context)
        row = torch.repeat_interleave(codes.offsets.diff(), output_size=codes.values.shape[0])
        flat = (start + row) * codes.num_latents + codes.indices
        entries = _passes.entries_of(pre, codes, self.backend) if self.wants_entries else None
        self._keep(codes.values, flat, entries)

    def _keep(self, values: Tensor, flat: Tensor, entries: Tensor | None) -> None:
        if self.running is not None:
            values, flat = torch.cat([self.running[0], values]), torch.cat([self.running[1], flat])
            entries = _both(self.running[2], entries)
        if self.rule.scope == "latent":
            kept = _passes.first_of_latents(values, flat % self.num_latents, self.rule.latent_budgets(self.rows))
        else:
            total = min(self.rule.total(self.rows), values.shape[0])
            kept = _passes.largest(values[None], total, self.backend)[1].long()
        self.running = values[kept], flat[kept], None if entries is None else entries[kept]

    def _needs_whole(self, pre: Tensor) -> RuntimeError:
        needed = self.rows * pre.shape[1] * pre.element_size()
        return RuntimeError(
            f"{type(self.rule).__name__} needs the pre-activations of the whole batch at once ({needed:,} bytes): "
            f"raise memory_budget to that, or use smaller batches"
        )

    def merged(self) -> tuple[SparseCodes, Tensor | None]:
        """The codes of the batch, and the pre-activations at them where the rule's values have their own derivative."""
        if self.running is not None:
            (values, flat, entries), num_latents = self.running, self.num_latents
            bounds = torch.arange(self.rows + 1, device=flat.device) * num_latents
            offsets = torch.searchsorted(flat, bounds)
            return SparseCodes(values, (flat % num_latents).int(), offsets, (self.rows,), num_latents), entries
        if len(self.codes) == 1:
            return self.codes[0], self.entries[0] if self.entries else None
        if self.codes[0].required is None:
            return cat(self.codes), torch.cat(self.entries) if self.entries else None
        return _below_within_capacity(self.codes, self.entries)


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _below_within_capacity(codes: list[SparseCodes], entries: list[Tensor]) -> tuple[SparseCodes, Tensor | None]:
    """``cat`` of codes with a capacity into one of the same capacity, without asking the device how full they are."""
    capacity = codes[0].values.shape[0]
    base = codes[0].offsets.new_zeros(())
    spare = capacity  # one place more, for what does not fit
    out = [codes[0].values.new_zeros(capacity + 1), codes[0].indices.new_zeros(capacity + 1)]
    if entries:
        out.append(entries[0].new_zeros(capacity + 1))
    offsets = [codes[0].offsets[:1]]
    position = torch.arange(capacity, device=base.device)
    for number, part in enumerate(codes):
        place = torch.where(position < part.offsets[-1], base + position, spare).clamp(max=spare)
        for whole, piece in zip(out, (part.values, part.indices, *entries[number : number + 1]), strict=True):
            whole[place] = piece
        offsets.append((part.offsets[1:] + base).clamp(max=capacity))
        assert part.required is not None
        base = base + part.required
    first = codes[0]
    merged = SparseCodes(
        out[0][:capacity], out[1][:capacity], torch.cat(offsets), (sum(c.rows for c in codes),), first.num_latents,
        required=base,
    )  # fmt: skip
    return merged, out[2][:capacity] if entries else None
