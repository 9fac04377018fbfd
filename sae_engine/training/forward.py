"""The forward half of a step: each rule's codes of a batch, chunk by chunk, and what the decoder makes of them."""
from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing
from sae_kernels.ops import ops
from sae_kernels.reference import ordered_keys, relu
from sae_kernels.stock.linear import linear

from .. import _checks as check
from .. import functional
from .._cat import cat
from ..autoencoder import SparseAutoencoder
from ..codes import SparseCodes
from ..functional import EncodeInfo
from ..rules.base import PER_TOKEN, Activation

UNTRANSPOSED = (None, None, None)  # no gradient is asked of these sums


class DeadLatents:
    """Tokens since each latent last fired (value ≠ 0), and a bound on how many are dead that costs no waiting.

    Args:
        d_sae: number of latents.
        dead_after: tokens without firing after which a latent counts as dead (Gao et al. 2024: 10 million).
        read_interval: steps between two reads of the device, which happen only once enough tokens have passed for any
            latent to be dead. The bound holds for all steps between.

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

    def __init__(self, d_sae: int, *, dead_after: int = 10_000_000, read_interval: int = 100, device=None) -> None:
        self.dead_after = check.integer_k(dead_after, name="dead_after")
        self.read_interval = check.integer_k(read_interval, name="read_interval")
        self.since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0
        self._bound, self._holds_until = 0, self.dead_after - 1  # no counter exceeds `tokens`
        self._captured = False  # replays move the counters and not `tokens`

    @property
    def mask(self) -> Tensor:
        """(d_sae,) bool, True for dead latents."""
        return self.since_fired >= self.dead_after

    def at_most(self, batch_tokens: int) -> int:
        """No more latents than this are dead now: exact on a CPU, else read at most once in ``read_interval`` steps.

        All of them while a CUDA graph is captured, and from then on: the host does not hear of replays, so that it
        would have to ask the device each time. :meth:`load_state_dict` starts anew.
        """
        self._captured |= capturing(self.since_fired)
        if self._captured:
            return self.since_fired.numel()
        if self.tokens <= self._holds_until:
            return self._bound
        # Nobody waits for a CPU tensor: it is read each time.
        ahead = (self.read_interval - 1) * batch_tokens if self.since_fired.is_cuda else 0
        self._bound = int((self.since_fired + ahead >= self.dead_after).sum())
        self._holds_until = self.tokens + ahead
        return self._bound

    def count(self, fired: Tensor, batch_tokens: int, skip: Tensor | None = None) -> None:
        """After a batch: ``fired`` (d_sae,) bool; where ``skip`` () is set, the batch does not count."""
        if skip is None:
            self.since_fired.add_(batch_tokens).masked_fill_(fired, 0)
        else:
            counted = torch.where(fired, 0, self.since_fired + batch_tokens)
            self.since_fired.copy_(torch.where(skip, self.since_fired, counted))
        self.tokens += batch_tokens

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "since_fired": self.since_fired.clone(), "tokens": self.tokens,
            "bound": self._bound, "holds_until": self._holds_until,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        check.shaped("since_fired", state["since_fired"].to(self.since_fired.device), self.since_fired.shape,
                     self.since_fired, why="one per latent")  # fmt: skip
        self.since_fired.copy_(state["since_fired"])
        self.tokens, self._bound, self._holds_until = state["tokens"], state["bound"], state["holds_until"]
        self._captured = False


class Weights(NamedTuple):
    """The weights in the dtype of the computation: the parameters themselves, or copies of them."""

    decoder: Tensor  # (F, d_out)
    encoder: Tensor  # (F, d_in): W_enc transposed


@dataclass
class Kept:
    """What one rule kept of the batch."""

    rule: Activation
    context: dict[str, Tensor]
    codes: SparseCodes
    values: Tensor  # (N,) what the decoder multiplies: codes.values, with decoder norms divided out
    entries: Tensor | None  # (N,) pre-activations that the rule saw, where its values have a derivative of their own
    pre: Tensor | None  # (B, F) of them, where the rule's gradient is dense


@dataclass
class Forward:
    """A batch on its way through the autoencoder. Objectives read it."""

    sae: SparseAutoencoder
    weights: Weights
    norms: Tensor | None  # (F,) of the decoder's rows, where rules see pre-activations times norms
    x: Tensor  # (B, d_in) as the encoder sees it, before b_dec
    target: Tensor  # (B, d_out), fp32 or wider
    info: EncodeInfo
    counters: DeadLatents
    buffer: PreActivations
    backend: str
    kept: list[Kept] = field(default_factory=list)
    runs: dict[int, SparseCodes] = field(default_factory=dict)  # (B, widths): codes cut at nested prefixes' widths
    _residuals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def dead(self) -> Tensor:
        """(F,) bool, as before this batch."""
        return self.counters.mask

    @functools.cached_property
    def encoded(self) -> Tensor:
        """(B, d_in) what the encoder multiplies, in the dtype of the computation."""
        x = self.x - self.sae.b_dec if self.sae.apply_b_dec_to_input else self.x
        return x.to(self.weights.encoder.dtype)

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: fp32, or fp64 where the computation is."""
        return torch.promote_types(self.weights.decoder.dtype, torch.float32)

    def encode(self, rules: Sequence[Activation], context: dict[str, Any], chunk_rows: int) -> None:
        """Fills ``kept``, rule by rule, from the pre-activations of ``chunk_rows`` tokens at a time."""
        given = {**self.sae._context(self.x, list(rules)), **context}
        if any("dead_mask" in rule.context_keys for rule in rules):
            given.setdefault("dead_mask", self.dead)
        contexts = [{name: given[name] for name in rule.context_keys & given.keys()} for rule in rules]
        for name in context.keys() - frozenset().union(*(rule.context_keys for rule in rules)):
            raise TypeError(f"no rule of this step takes {name}")
        parts = [Parts(rule, self.tokens, self.sae.d_sae, self.backend) for rule in rules]
        pre = None
        for start in range(0, self.tokens, chunk_rows):
            chunk = slice(start, min(start + chunk_rows, self.tokens))
            del pre  # before the next chunk's is made
            of_chunk = [{name: t[chunk] if name in PER_TOKEN else t for name, t in c.items()} for c in contexts]
            pre = self._pre_activations(chunk)
            for part, context in zip(parts, of_chunk, strict=True):
                part.add(pre, start, context)
        for rule, whole, part in zip(rules, contexts, parts, strict=True):
            codes, entries = part.merged()
            values = codes.values
            if self.norms is not None:
                values = (values / self.norms_at(codes)).to(values.dtype)
            self.kept.append(Kept(rule, whole, codes, values, entries, pre if rule.entry_values is None else None))

    def _pre_activations(self, rows: slice) -> Tensor:
        """(rows, F) that the rules see, in the dtype of the computation."""
        pre = self.buffer.product(self.encoded[rows], self.weights.encoder.T, self.sae._encoder_bias)
        return pre if self.norms is None else pre.mul_(self.norms)

    @property
    def divisors(self) -> Tensor:
        """The norms, or 1 where they are 0: such a row decodes to 0, whatever it is divided by."""
        assert self.norms is not None
        return torch.where(self.norms == 0, 1.0, self.norms)

    def norms_at(self, codes: SparseCodes) -> Tensor:
        """(N,) divisors, read at the codes."""
        return functional.at_latents(self.divisors, codes)

    def decode(self, number: int) -> Tensor:
        """(B, d_out) weighted sums of decoder rows, for the codes of that number, in fp32 or wider; no b_dec."""
        kept = self.kept[number]
        return self._sums(kept.codes, kept.values)

    def _sums(self, codes: SparseCodes, values: Tensor) -> Tensor:
        """(rows, d_out) of decoder rows times ``values`` (N,), in fp32 or wider."""
        decoder, backend = self.weights.decoder, self.backend
        return ops.decode(values, codes.indices, codes.offsets, decoder, None, self.wide, *UNTRANSPOSED, backend)

    def residual(self, number: int) -> tuple[Tensor, Tensor]:
        """(B, d_out) the autoencoder's output for those codes minus the target; its squared norm (B,). Once."""
        if number not in self._residuals:
            kept, info = self.kept[number], self.info
            skips = self.sae.W_skip is not None and info.skipped is not None
            if info.std is None and info.mean is None and not skips:
                self._residuals[number] = ops.decode_error(
                    kept.values, kept.codes.indices, kept.codes.offsets, self.weights.decoder, self.sae.b_dec,
                    self.target, self.target.dtype, self.backend,
                )  # fmt: skip
            else:
                residual = self._output(number).sub_(self.target)
                self._residuals[number] = residual, torch.linalg.vecdot(residual, residual)
        return self._residuals[number]

    def nested_residuals(self, number: int, widths: Sequence[int]) -> Tensor:
        """(B, widths, d_out) the output of each prefix of the latents minus the target; the last is the residual."""
        kept = self.kept[number]
        runs = self.runs[number] = kept.codes.split_latents(widths)
        parts = self._sums(runs, kept.values)
        prefixes = parts.view(self.tokens, len(widths), -1).cumsum(1)
        residuals = self._finished(prefixes.add_(self.sae.b_dec)).sub_(self.target[:, None])
        last = residuals[:, -1].contiguous()
        self._residuals[number] = last, torch.linalg.vecdot(last, last)
        return residuals

    def _output(self, number: int) -> Tensor:
        """(B, d_out) b_dec, layer norm and skip included."""
        return self._finished(self.decode(number).add_(self.sae.b_dec)[:, None])[:, 0]

    def _finished(self, out: Tensor) -> Tensor:
        """(B, any, d_out) with layer norm undone and the skip connection added."""
        if self.info.std is not None:
            out = out * self.info.std[:, None]
        if self.info.mean is not None:
            out = out + self.info.mean[:, None]
        if self.sae.W_skip is not None and self.info.skipped is not None:
            out = out + (self.info.skipped.to(self.wide) @ self.sae.W_skip.T.to(self.wide))[:, None]
        return out


# --- chunks of rows: what each rule keeps of them, merged into what it keeps of the whole, exactly -------------------

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


def total_memory_bytes(device: torch.device) -> int:
    """All memory of a device, or of the host; 16 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return 16 << 30


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
        if not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
            return functional.linear(x, weight, bias)

        def memory(size: int) -> Tensor:
            if self._memory is None or self._memory.dtype != x.dtype or self._memory.numel() < size:
                self._memory = None  # before its successor is made
                self._memory = x.new_empty(size)
            return self._memory[:size]

        return linear(x, weight, None if bias is None else bias.to(x.dtype), memory=memory)


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
                self.entries.append(ops.gather(pre, codes.indices, codes.offsets, self.backend))
            return
        if self.rule.candidates is None:
            raise self._needs_whole(pre)
        codes = self.rule.candidates(pre, self.rows, backend=self.backend, **context)
        row = torch.repeat_interleave(codes.offsets.diff(), output_size=codes.values.shape[0])
        flat = (start + row) * codes.num_latents + codes.indices
        entries = ops.gather(pre, codes.indices, codes.offsets, self.backend) if self.wants_entries else None
        self._keep(codes.values, flat, entries)

    def _keep(self, values: Tensor, flat: Tensor, entries: Tensor | None) -> None:
        if self.running is not None:
            values, flat = torch.cat([self.running[0], values]), torch.cat([self.running[1], flat])
            entries = _both(self.running[2], entries)
        if self.rule.scope == "latent":
            kept = _first_of_latents(values, flat % self.num_latents, self.rule.latent_budgets(self.rows))
        else:
            total = min(self.rule.total(self.rows), values.shape[0])
            kept = ops.batch_topk(values[None], None, total, self.backend)[1].long()
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


def _first_of_latents(values: Tensor, latents: Tensor, budgets: Tensor) -> Tensor:
    """Ascending positions of each latent f's ``budgets[f]`` entries with the largest relu(value), ties to the first.

    Reads the device for their number.
    """
    order = ordered_keys(relu(values)).argsort(descending=True, stable=True)
    order = order[latents[order].argsort(stable=True)]
    latent = latents[order]
    rank = torch.arange(latent.shape[0], device=latent.device) - torch.searchsorted(latent, latent)
    return order[rank < budgets[latent]].sort().values


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
