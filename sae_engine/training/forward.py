"""The forward half of a step: each rule's codes of a batch, slab by slab, and what the decoder makes of them."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing
from sae_kernels.ops import ops
from sae_kernels.stock.linear import Reused, linear, rows_at_once, whole_rows_from
from sae_kernels.stock.linear_16bit import linear_operand

from .. import functional
from .._encoder import product
from .._running import Running, WholeRows, as_tensor
from .._slabs import is_by_row, rectangles, running_of, widest
from .._sources import below_one_another, parts_of, running_over
from .._window import Dropped, RunningWindow
from ..autoencoder import SparseAutoencoder
from ..codes import SparseCodes
from ..distributed.blocks import aligned, of_tokens
from ..distributed.passes import of_mesh
from ..distributed.shards import Shards
from ..distributed.wire import tree_sum
from ..functional import EncodeInfo
from ..rules.base import Activation
from ..rules.per_source import PerSource, chooses_alone

if TYPE_CHECKING:
    from ..losses import Loss
    from .backward import DeadLatents

UNTRANSPOSED = (None, None, None)  # no gradient is asked of these sums


class Weights(NamedTuple):
    """The parameters themselves, or copies of them in the dtype of the computation."""

    decoder: Tensor  # (F, d_out)
    encoder: Tensor  # (F, d_in): W_enc transposed


@dataclass
class Part:
    """What one rule kept of one source's latents."""

    rule: Activation
    context: dict[str, Tensor]
    codes: SparseCodes  # (B,)
    values: Tensor  # (N,) what the decoder multiplies: codes.values, with decoder norms divided out
    entries: Tensor | None  # (N,) pre-activations that the rule saw, where its values have a derivative of their own
    pre: Tensor | None  # (B, F) of them, where the rule's gradient is dense
    dropped: Dropped | None  # what else its thresholds learn from, where codes do not hold it


Found = tuple[SparseCodes, Tensor | None, Tensor | None, Dropped | None]  # codes, entries, pre and dropped of a Part


@dataclass
class OfSource:
    """A source of the autoencoder and what a batch needs of it."""

    source: Any  # a SparseAutoencoder, or a Source of a Crosscoder
    weights: Weights
    norms: Tensor | None  # (F,) of the decoder's rows, where rules see pre-activations times norms
    operand: Tensor  # (B, d_in or more) what the encoder multiplies, and columns that say nothing
    buffer: PreActivations
    backend: str
    is_only: bool  # whether nobody else writes to the buffer
    shards: Shards | None = None  # with blocks, which products are made of and sums over latents added by

    @property
    def encoded(self) -> Tensor:
        """(B, d_in) in the dtype of the computation."""
        return self.operand[:, : self.weights.encoder.shape[1]]

    @property
    def tokens(self) -> int:
        return self.operand.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.operand.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: fp32, or fp64 where the computation is."""
        return torch.promote_types(self.dtype, torch.float32)

    def selected(
        self, rules: Sequence[Activation], contexts: list[dict[str, Any]], shared: Sequence[Running], first: int,
        elements: int | None, apart: Sequence[bool],
    ) -> list[Found]:  # fmt: skip
        """What each of ``rules`` keeps, from pre-activations of which ``elements`` exist at a time; None: all.

        ``shared`` choose among all sources: they see this one's pre-activations as rows ``first`` and following.
        ``apart`` says of which rules codes are to hold nothing but what is kept.
        """
        wanted = [rule.needs_entries for rule in rules]
        with torch.enable_grad():  # a rule whose thresholds do not learn needs no window
            windows = [
                rule.running_apart(self.tokens, self.source.d_sae, backend=self.backend)
                if alone and rule.running_apart is not None else None for rule, alone in zip(rules, apart, strict=True)
            ]  # fmt: skip
        if elements is None:
            return list(self._at_once(rules, contexts, wanted, windows, shared, first))
        return list(self._in_slabs(rules, contexts, wanted, windows, shared, first, elements))

    def _at_once(self, rules, contexts, wanted, windows, shared, first: int) -> Iterator[Found]:
        pre = self._pre_activations(slice(0, self.tokens), slice(0, self.source.d_sae))
        for rule, context, wants, window in zip(rules, contexts, wanted, windows, strict=True):
            if window is not None:
                window.add(pre, slice(0, self.tokens), slice(0, self.source.d_sae))
                yield _found(window)
                continue
            context.update({name: as_tensor(t) for name, t in context.items()})
            with torch.enable_grad():  # a rule that learns from what it keeps stores more then
                codes = rule.select(pre, backend=self.backend, **context).detach()
            entries = ops.gather(pre, codes.indices, codes.offsets, self.backend) if wants else None
            kept = None if rule.entry_values is not None else pre if self.is_only else pre.clone()
            yield codes, entries, kept, None
        for running in shared:
            with torch.enable_grad():
                running.add(pre, slice(first, first + self.tokens), slice(0, self.source.d_sae))

    def _in_slabs(self, rules, contexts, wanted, windows, shared, first: int, elements: int) -> Iterator[Found]:
        """The same of rules whose gradient is sparse."""
        d_sae = self.source.d_sae
        with torch.enable_grad():  # as above
            running, shape = running_of(
                rules, contexts, self.tokens, d_sae, elements, self.backend, dense_gradient=True,
                whole_rows_from=whole_rows_from(self.operand, self.weights.encoder.T),
            )
        if self.shards is not None and self.shards.blocks is not None:
            of_rows = any(isinstance(of_rule, WholeRows) for of_rule in running)
            shape = (self.cell[0], d_sae) if of_rows else (self.tokens, self.cell[1])
        for of_rule, wants in zip(running, wanted, strict=True):
            of_rule.wants_entries = wants
        running = [of_rule if window is None else window for of_rule, window in zip(running, windows, strict=True)]
        for tokens, latents in rectangles(self.tokens, d_sae, shape):
            pre = self._pre_activations(tokens, latents)
            with torch.enable_grad():
                for of_rule in running:
                    of_rule.add(pre, tokens, latents)
                for of_rule in shared:
                    of_rule.add(pre, slice(first + tokens.start, first + tokens.stop), latents)
            del pre  # before the next one is made
        for of_rule in running:
            yield _found(of_rule)

    def part(self, rule: Activation, context: dict[str, Any], found: Found) -> Part:
        codes, entries, pre, dropped = found
        values = codes.values if self.norms is None else (codes.values / self.norms_at(codes)).to(codes.values.dtype)
        return Part(rule, context, codes, values, entries, pre, dropped)

    def _pre_activations(self, tokens: slice, latents: slice) -> Tensor:
        """(tokens, latents) that the rules see, in the dtype of the computation."""
        if self.shards is not None and self.shards.blocks is not None:
            shape = tokens.stop - tokens.start, latents.stop - latents.start
            pre = self.operand.new_empty(shape)
            for of_tokens, of_latents in rectangles(*shape, self.cell):
                pre[of_tokens, of_latents] = self._product(_within(tokens, of_tokens), _within(latents, of_latents))
            return pre
        return self._product(tokens, latents)

    def _product(self, tokens: slice, latents: slice) -> Tensor:
        """The same in memory that the next one may be written to."""
        x, weight, bias = self.operand[tokens], self.weights.encoder[latents].to(self.dtype), self.source._encoder_bias
        if self.shards is not None and self.shards.blocks is not None:
            x, weight = aligned(x), aligned(weight)
        bias, scale = (None if t is None else t[latents] for t in (bias, self.norms))
        return self.buffer.product(x, weight.T, bias, scale)

    @property
    def cell(self) -> tuple[int, int]:
        """Tokens and latents of a block."""
        tokens, latents = (1, 1) if self.shards is None else (self.shards.token_blocks, self.shards.latent_blocks)
        return self.tokens // tokens, self.source.d_sae // latents

    @functools.cached_property
    def divisors(self) -> Tensor:
        """The norms, or 1 where they are 0: such a row decodes to 0, whatever it is divided by."""
        assert self.norms is not None
        return torch.where(self.norms == 0, 1.0, self.norms)

    def norms_at(self, codes: SparseCodes) -> Tensor:
        """(N,) divisors, read at the codes."""
        return functional.at_latents(self.divisors, codes)

    def sums(self, codes: SparseCodes, values: Tensor) -> Tensor:
        """(rows, d_out) of decoder rows times ``values`` (N,), in fp32 or wider."""
        decoder, backend = self.weights.decoder, self.backend
        pieces = 1 if self.shards is None else self.shards.latent_blocks
        if pieces > 1:
            codes = codes._runs([codes.num_latents // pieces * (n + 1) for n in range(pieces)])
        out = ops.decode(values, codes.indices, codes.offsets, decoder, None, self.wide, *UNTRANSPOSED, backend)
        return out if pieces == 1 else tree_sum(out.view(-1, pieces, out.shape[1]).unbind(1))


def _found(running: Running) -> Found:
    codes, entries = running.finish()
    if isinstance(running, RunningWindow):  # whose values are the pre-activations
        return codes, codes.values, None, running.dropped
    return codes.detach(), entries, None, None


def _within(whole: slice, part: slice) -> slice:
    return slice(whole.start + part.start, whole.start + part.stop)


@dataclass
class Kept:
    """What one rule kept of the batch."""

    rule: Activation
    codes: SparseCodes  # of all sources
    parts: list[Part]  # of each source


@dataclass
class Forward:
    """A batch on its way through the autoencoder. Objectives read it."""

    sae: SparseAutoencoder
    sources: list[OfSource]
    x: Tensor  # (B, d_in) as the encoder sees it, before b_dec
    given: Tensor  # (B, d_out) to be reconstructed, as it came
    info: EncodeInfo
    counters: DeadLatents
    backend: str
    shards: Shards | None = None  # of whose latents these are one; ``x`` and ``given`` are then one rank's tokens
    kept: list[Kept] = field(default_factory=list)
    runs: dict[int, SparseCodes] = field(default_factory=dict)  # (B, widths): codes cut at nested prefixes' widths
    known: dict[str, Tensor] = field(default_factory=dict)  # what several losses, or cells of one, read
    _residuals: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sae: SparseAutoencoder, weights: Sequence[Weights], x: Tensor, given: Tensor, info: EncodeInfo, *,
        dtype: torch.dtype, counters: DeadLatents, buffer: PreActivations, backend: str, shards: Shards | None = None,
    ) -> Forward:  # fmt: skip
        """Of a batch ``x`` (B, d_in); ``dtype`` is that of products, codes, and what is gathered for sums."""
        seen, center, sources = x, sae.b_dec if sae.apply_b_dec_to_input else None, sae.sources
        if shards is not None or len(sources) > 1:
            seen, center = (seen if center is None else seen - center).to(dtype), None
        seen = seen if shards is None else shards.gather_rows(seen, "x")
        inputs = [seen[:, source.reads] for source in sources]
        operands = inputs if len(sources) > 1 else [linear_operand(inputs[0], center, dtype)]
        return cls(
            sae,
            [OfSource(
                source, of_source, sae._norms_of(source) if sae.rescale_acts_by_decoder_norm else None,
                operand, buffer, backend, len(sources) == 1, shards,
            ) for source, of_source, operand in zip(sources, weights, operands, strict=True)],
            x, given, info, counters, backend, shards,
        )  # fmt: skip

    @functools.cached_property
    def dead(self) -> Tensor:
        """(F,) bool, as before this batch; of several sources (sources, F)."""
        mask = self.counters.mask
        several = len(self.sources)
        return mask if several == 1 else mask.view(several, len(mask) // several)

    @functools.cached_property
    def target(self) -> Tensor:
        """(B, d_out) in fp32 or wider. The error alone does without it."""
        return self.given.to(self.wide)

    @property
    def tokens(self) -> int:
        """Of the whole batch, of all ranks."""
        return self.x.shape[0] if self.shards is None else self.shards.tokens

    def of_all_ranks(self, rows: Tensor, name: str) -> Tensor:
        """(B, …) of the ranks of a group, from one's."""
        return rows if self.shards is None else self.shards.gather_rows(rows, name)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """(one rank's tokens, …) of sums over all latents, from (B, …) of those over one rank's."""
        return sums if self.shards is None else self.shards.sum_parts(sums, "x_hat")

    def sum_rows(self, rows: Tensor) -> Tensor:
        """The sum over the first dimension, a row for each token of one rank: with blocks, by pieces as a tree."""
        return self.over_tokens([piece.sum(0) for piece in self.pieces_of(rows)])

    def over_tokens(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of what each of :meth:`pieces_of` adds: of one rank's, with blocks of the whole batch's."""
        if (shards := self.by_blocks) is None:
            return parts[0]
        return shards.sum_everywhere(tree_sum(parts), "gradients of all ranks")

    def pieces_of(self, rows: Tensor) -> list[Tensor]:
        """A row for each token of one rank, with blocks by blocks."""
        return [rows] if self.shards is None else self.shards.pieces_of(rows)

    def sum_all(self, rows: Tensor) -> Tensor:
        """() the sum of all elements, a row for each token of one rank: with blocks (blocks,), of each block."""
        if self.by_blocks is None:
            return rows.sum()
        return self.by_blocks.of_my_blocks([piece.sum() for piece in self.pieces_of(rows)])

    @property
    def by_blocks(self) -> Shards | None:
        """The shards, where everything is summed block by block."""
        return None if self.shards is None or self.shards.blocks is None else self.shards

    def total(self, number: Tensor) -> Tensor:
        """A number that is a sum over latents, of all ranks."""
        return number if self.shards is None else self.shards.sum(number, "dead")

    def spread(self, rows: Tensor) -> Tensor:
        """() squared distances of rows, one for each token, from their mean."""
        if self.shards is not None:
            return self.shards.spread(rows, "spread").to(self.wide)
        mean = rows.mean(0, dtype=self.wide)
        return torch.sub(rows, mean, out=torch.empty_like(rows, dtype=self.wide)).square_().sum()

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: fp32, or fp64 where the computation is."""
        return torch.promote_types(self.dtype, torch.float32)

    def encode(
        self, rules: Sequence[Activation], context: dict[str, Any], memory_budget: int, losses: Sequence[Loss] = ()
    ) -> None:
        """Fills ``kept``, rule by rule, from pre-activations of which ``memory_budget`` bytes exist at a time.

        Where each of ``losses`` knows its slope at what the first rule drops, codes are without what it dropped. With
        blocks, and in a CUDA graph, they hold it as zeros.
        """
        may_drop = bool(losses) and self.by_blocks is None and not capturing(self.x)
        may_drop = may_drop and all(loss.at_dropped is not None for loss in losses)
        first_rules = rules[0] if isinstance(rules[0], PerSource) else rules[:1]
        may_drop = may_drop and any(rule.running_apart is not None for rule in first_rules)
        given = {**self.sae._context(self.x, list(rules)), **context}
        if self.shards is not None:
            given = {name: of_mesh(self.shards, name, t) for name, t in given.items()}
        if any("dead_mask" in rule.context_keys for rule in rules):
            given.setdefault("dead_mask", self.dead)
        for name in context.keys() - frozenset().union(*(rule.context_keys for rule in rules)):
            raise TypeError(f"no rule of this step takes {name}")
        several, room = len(self.sources), memory_budget // self.dtype.itemsize
        latents = self.sae.d_sae if self.shards is None else widest(rules, self.sae.d_sae)
        tokens, first = self.sources[0].tokens, self.sources[0]
        rows = rows_at_once(tokens, first.operand, first.weights.encoder.T)
        if rows < tokens and several == 1 and self.shards is None and all(map(is_by_row, rules)):
            room = min(room, rows * latents)
        elements = None if tokens * latents <= room else room
        if may_drop and elements is not None:  # a selection of what is dropped has a matrix of its own
            elements = max(elements // 2, 1)
        alone = [several == 1 or chooses_alone(rule, several) for rule in rules]
        shared = []
        for rule, mine in zip(rules, alone, strict=True):
            if not mine:
                shared.append(running_over(rule, several * tokens, self.sae.d_sae, self.backend))
                shared[-1].wants_entries = rule.needs_entries
        parts: list[list[Part]] = [[] for _ in rules]
        for number, source in enumerate(self.sources):
            own = [(rule[number] if isinstance(rule, PerSource) else rule, of_rule)
                   for rule, of_rule, mine in zip(rules, parts, alone, strict=True) if mine]  # fmt: skip
            contexts = [
                {name: given[name] if several == 1 else given[name][number]
                 for name in rule.context_keys & given.keys()}
                for rule, _ in own
            ]  # fmt: skip
            apart = [may_drop and of_rule is parts[0] for _, of_rule in own]
            found = source.selected([rule for rule, _ in own], contexts, shared, number * tokens, elements, apart)
            for (rule, of_rule), of_context, kept in zip(own, contexts, found, strict=True):
                of_rule.append(source.part(rule, of_context, kept))
        finished = iter(shared)
        for rule, mine, of_rule in zip(rules, alone, parts, strict=True):
            if mine:
                codes = of_rule[0].codes if several == 1 else below_one_another([part.codes for part in of_rule])
            else:
                codes, entries = next(finished).finish()
                codes = replace(codes.detach(), batch_shape=(several, tokens))
                divided = parts_of(codes, several)
                sizes = [part.values.shape[0] for part in divided]
                at = [None] * several if entries is None else entries.split(sizes)
                for source, part, mine in zip(self.sources, divided, at, strict=True):
                    of_rule.append(source.part(rule, {}, (part, mine, None, None)))
            self.kept.append(Kept(rule, codes, of_rule))

    def decode(self, number: int) -> Tensor:
        """(B, d_out) weighted sums of decoder rows, for the codes of that number, in fp32 or wider; no b_dec."""
        parts = self.kept[number].parts
        if len(parts) == 1:
            return self._over_ranks(self.sources[0].sums(parts[0].codes, parts[0].values))
        return self._over_ranks(self._all_sums(parts, None, None)[0])

    def _all_sums(self, parts: Sequence[Part], bias: Tensor | None, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """What all decoders make of their codes, plus ``bias``, minus ``target``; with that, squared norms (B,)."""
        return ops.decode_sources(
            [part.values for part in parts], [part.codes.indices for part in parts],
            [part.codes.offsets for part in parts], [of.weights.decoder for of in self.sources],
            [of.source.writes.start for of in self.sources], self.sae.d_out, bias, target, self.wide, self.backend,
        )  # fmt: skip

    def by_latent(self, codes: SparseCodes, entries: Tensor) -> Tensor:
        """(F,) sums of ``entries`` (N,) in a fixed order; of several (n, N) at a time, (n, F)."""
        if entries.dim() == 2:
            return torch.stack([self.by_latent(codes, row) for row in entries])
        if (shards := self.by_blocks) is None:
            return self._by_latent(codes, entries)
        blocks = of_tokens(codes, shards.token_blocks)
        return shards.of_batch([self._by_latent(part, entries[where]) for where, part in blocks], "sums of latents")

    def _by_latent(self, codes: SparseCodes, entries: Tensor) -> Tensor:
        ones = entries.new_ones(codes.rows, 1, dtype=self.wide)
        return ops.decode_backward_weight(ones, entries.to(self.wide), *codes.by_latent, self.wide, self.backend)[:, 0]

    def residual(self, number: int) -> tuple[Tensor, Tensor]:
        """(B, d_out) the autoencoder's output for those codes minus the target; its squared norm (B,). Once."""
        if number not in self._residuals:
            parts, info = self.kept[number].parts, self.info
            is_plain = info.std is None and info.mean is None and info.skipped is None
            if is_plain and len(parts) == 1 and self.shards is None:
                codes, values = parts[0].codes, parts[0].values
                self._residuals[number] = ops.decode_error(
                    values, codes.indices, codes.offsets, self.sources[0].weights.decoder, self.sae.b_dec, self.given,
                    self.wide, self.backend,
                )  # fmt: skip
            elif is_plain and len(parts) > 1 and self.shards is None:
                self._residuals[number] = self._all_sums(parts, self.sae.b_dec, self.given)
            else:
                residual = self._output(number).sub_(self.target)
                self._residuals[number] = residual, torch.linalg.vecdot(residual, residual)
        return self._residuals[number]

    def forget_residuals(self) -> None:
        """Once all losses have been taken: their memory serves the backward half."""
        self._residuals.clear()

    def nested_residuals(self, number: int, widths: Sequence[int]) -> Tensor:
        """(B, widths, d_out) the output of each prefix of the latents minus the target; the last is the residual."""
        (part,) = self.kept[number].parts  # rules that nest their latents have one source
        if self.shards is not None:
            widths = self.shards.widths_of_mine(widths)
        runs = self.runs[number] = part.codes._runs(widths)
        parts = self.sources[0].sums(runs, part.values).view(-1, len(widths), self.sae.d_out)
        prefixes = self._over_ranks(parts).cumsum(1)
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
        if self.info.skipped is not None:
            skipped = self.info.skipped.to(self.wide)
            for weight, read, written in self.sae._skips():
                parts = [rows @ weight.T.to(self.wide) for rows in map(aligned, self.pieces_of(skipped[:, read]))]
                out[..., written] += torch.cat(parts)[:, None]
        return out


class PreActivations:
    """The encoder's product: on a CPU in memory that serves every step; a GPU's allocator keeps memory at hand."""

    def __init__(self) -> None:
        self._memory = Reused()  # oneDNN's small products stay in memory of its own

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """``(x @ weight + bias) * scale`` (rows, F), overwritten by the next call; ``x`` is a ``linear_operand``."""
        if x.is_cpu and x.dtype in (torch.float32, torch.float64):
            return linear(x, weight, bias if bias is None else bias.to(x.dtype), scale, memory=self._memory.like(x))
        out = product(x, weight, bias, x.dtype)
        return out if scale is None else out.mul_(scale)
