"""An update whose sums are made block by block, of tokens and of latents, and so have the same bits on any mesh."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels._terms import terms_of
from sae_kernels.reference import without_parallel_part
from sae_kernels.stock.moments import FusedAdam, keys

from .. import _checks as check
from ..autoencoder import SparseAutoencoder, decoder_norms
from ..distributed.blocks import Gradients, aligned
from ..distributed.wire import tree_sum
from ..losses import AFA, L1, AuxK, GateLoss, Loss, MultiTopK, Reconstruction, StepL0, TanhL0
from ..losses.base import NestedReconstruction
from ..losses.warmed import Warmed
from .backward import Backward
from .optimizer import ON_GPU, Update, rows_of_a_chunk

SUMMED = (Reconstruction, NestedReconstruction, AuxK, MultiTopK, AFA, L1, StepL0, TanhL0, GateLoss)


def check_blocks(sae: SparseAutoencoder, losses: Sequence[Loss], blocks: int, dense: bool | None) -> int:
    """``blocks`` of all latents and of all tokens.

    Raises:
        ValueError: they cannot be, with this mesh, these latents, this rule, these losses or ``dense``.
    """
    blocks = check.integer_k(blocks, name="blocks")
    if sae.shards is None:
        raise ValueError(f"blocks must be None without a mesh, got {blocks}")
    ranks = sae.shards.size * sae.shards.groups
    if blocks & (blocks - 1) or ranks & (ranks - 1) or blocks % ranks or sae.d_sae % blocks:
        raise ValueError(f"blocks must be a power of two that divides d_sae = {sae.d_sae} and that the number of "
                         f"ranks, a power of two as well, divides; got blocks={blocks} over {ranks} ranks")  # fmt: skip
    rule = sae.share.activation
    if sae.has_sites:
        raise ValueError(f"blocks must be None with a crosscoder, whose places are summed over, got {blocks}")
    if rule.entry_values is None:
        raise ValueError(f"blocks must be None with rules that have a dense gradient, got {blocks} with {rule!r}")
    if "attribution" in rule.context_keys:
        raise ValueError(f"blocks must be None with rules that rank by attributions, whose products are not made by "
                         f"blocks, got {blocks} with {rule!r}")  # fmt: skip
    learned = [p for p in rule.learned_parameters() if p.requires_grad]
    if any(p.shape != (sae.share.d_sae,) for p in learned) or (learned and rule.context_keys):
        raise ValueError("blocks must be None with rules whose parameters are not one for each latent, or that learn "
                         f"and have context, got {blocks} with {rule!r}")  # fmt: skip
    for loss in losses:
        inner = loss.loss if isinstance(loss, Warmed) else loss
        if not isinstance(inner, SUMMED) or getattr(inner, "target", None) is not None:
            raise ValueError(f"blocks must be None with {loss!r}, whose sums are not made by blocks, got {blocks}")
    if dense:
        raise ValueError(f"blocks must be None with dense=True, whose products have other sizes, got {blocks}")
    return blocks


class Unit(NamedTuple):
    """Some latents of a block, of those that this rank updates."""

    block: int
    start: int
    stop: int

    @property
    def latents(self) -> slice:
        return slice(self.start, self.stop)


class BlockedUpdate(Update):
    """As :class:`Update`. Gradients of a block are used up before the next one's are made, where nothing needs all.

    Those of a unit of latents are sums over blocks of tokens, as a tree, of all groups of ranks; a group's sums go to
    the rank that updates the latents, in each call, so that calls are accumulated in an order that no mesh changes.
    """

    _units_stored: dict[Unit, dict[Tensor, Tensor]]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._units_stored = {}

    def forget(self) -> None:
        super().forget()
        self._units_stored = {}

    def can_be_fused(self, pending: Backward) -> bool:
        return self.grad_clip is None and self.accumulate == 1

    def fused(self, pending: Backward, skip: Tensor | None) -> Tensor:
        return self._stepped(self._gradients(pending), self._of_everyone(pending), skip)

    def store(self, pending: Backward) -> None:
        for unit, gradients in self._gradients(pending):
            self._add(self._units_stored.setdefault(unit, {}), gradients)
        self._add(self.stored, self._of_everyone(pending))

    def apply_stored(self, skip: Tensor | None) -> Tensor:
        units, of_everyone = self._units_stored, self.stored
        self.forget()
        return self._stepped(units.items(), of_everyone, skip)

    def _add(self, stored: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> None:
        for p, gradient in gradients.items():
            gradient = gradient if self.accumulate == 1 else gradient / self.accumulate
            stored[p] = stored[p] + gradient if p in stored else gradient

    # --- what is whose ----------------------------------------------------------------------------------------------

    def _units(self) -> Iterator[Unit]:
        """Of the latents that this rank updates, block by block."""
        assert self.shards is not None
        size = self.sae.d_sae // self.shards.latent_blocks
        most = max(ON_GPU // (self.sae.d_in + self.sae.d_out), 1)
        for block in range(self.shards.latent_blocks // self.shards.groups):
            for start in range(block * size, (block + 1) * size, most):
                yield Unit(block, start, min(start + most, (block + 1) * size))

    def _by_latent(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Something of a parameter, a row for each latent."""
        return tensor.T if parameter is self.sae.W_enc else tensor

    def _of_latents(self) -> list[Tensor]:
        """The parameters that have latents and learn."""
        sae = self.sae
        return [p for p in self.optimizer.options["params"] if p is not sae.b_dec and p is not sae.W_skip]

    # --- gradients --------------------------------------------------------------------------------------------------

    def _gradients(self, pending: Backward) -> Iterator[tuple[Unit, dict[Tensor, Tensor]]]:
        """Of the whole batch. Parameters may be written before the next unit is asked for."""
        sae, shards = self.sae, self.shards
        assert shards is not None
        (mine,), updated = pending.sources, shards.updated
        decoder = self.copies.current()[0].decoder
        sums = Gradients(terms_of(mine.terms), mine.x, decoder, shards.token_blocks, self.backend)
        width = updated.stop - updated.start
        small = {p: pending.small[p][updated] for p in self._of_latents() if p in pending.small}
        along = None if mine.along is None else mine.along[updated]
        for unit in self._units():
            of_groups = [sums.of(slice(n * width + unit.start, n * width + unit.stop)) for n in range(shards.groups)]
            of_weights = of_groups[0] if shards.across is None else [
                tree_sum(list(shards.across.scatter_rows(torch.cat(parts), [unit.stop - unit.start] * shards.groups,
                                                         "gradients over groups")))
                for parts in zip(*of_groups, strict=True)
            ]  # fmt: skip
            found = dict(zip((sae.W_dec, sae.W_enc, sae.b_enc), of_weights, strict=True))
            if along is not None:
                here = decoder[updated][unit.latents].to(found[sae.W_dec].dtype)
                found[sae.W_dec] = found[sae.W_dec] + along[unit.latents, None] * here
            yield unit, found | {p: gradient[unit.latents] for p, gradient in small.items()}

    def _of_everyone(self, pending: Backward) -> dict[Tensor, Tensor]:
        """Those of what has no latents, but for b_dec's part through the encoder."""
        known = (self.sae.b_dec, self.sae.W_skip)
        return {p: g for p, g in pending.small.items() if p.requires_grad and any(p is one for one in known)}

    # --- the step ---------------------------------------------------------------------------------------------------

    def _stepped(
        self, units: Iterable[tuple[Unit, dict[Tensor, Tensor]]], of_everyone: dict[Tensor, Tensor],
        skip: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Remove the parallel part, clip, Adam, rescale. Returns the norm before clipping."""
        shards, sae, learned = self.shards, self.sae, self._of_latents()
        assert shards is not None
        skipped = None if skip is None else skip.to(torch.float32)
        if learned:
            self.optimizer.counted(learned, skipped)
        held: list[tuple[Unit, dict[Tensor, Tensor]]] = []
        sums: dict[int, list[Tensor]] = {}
        for unit, gradients in units:
            sums.setdefault(unit.block, []).append(self._summed(unit, gradients))
            if self.grad_clip is None:
                self._update(unit, gradients, skip, skipped)
            else:
                held.append((unit, gradients))
        of_blocks = torch.stack([tree_sum(of_block) for of_block in sums.values()])
        every = shards.everyone.gather(of_blocks, "squares and b_dec")  # by group, then by rank, of which each has some
        every = every.unflatten(0, (shards.groups, shards.size)).transpose(0, 1).flatten(0, 2)
        total, center = tree_sum(list(every)).split([1, sae.d_in])
        if sae.apply_b_dec_to_input and sae.b_dec.requires_grad:
            of_everyone = {**of_everyone, sae.b_dec: center + of_everyone.get(sae.b_dec, 0.0)}
        norm = torch.stack([total[0], *(g.square().sum() for g in of_everyone.values())]).sum().sqrt()
        if self.grad_clip is not None:
            scale = (self.grad_clip / (norm + 1e-6)).clamp(max=1)
            of_everyone = {p: gradient * scale for p, gradient in of_everyone.items()}
            for unit, gradients in held:
                self._update(unit, {p: gradient * scale for p, gradient in gradients.items()}, skip, skipped)
                gradients.clear()
        self.optimizer.apply(of_everyone, skipped)
        if self.optimizer.part is not None:
            self.optimizer.part.hand_out(learned)
        return norm

    def _summed(self, unit: Unit, gradients: dict[Tensor, Tensor]) -> Tensor:
        """(1 + d_in,) the sum of squares and b_dec's gradient through the encoder; removes what is not learned, and the
        part along unit rows.
        """
        sae, optimizer = self.sae, self.optimizer
        bias = gradients[sae.b_enc]
        encoder = aligned(self._by_latent(sae.W_enc, optimizer.mine(sae.W_enc))[unit.latents].to(bias.dtype))
        center = -(bias @ encoder)
        for p in [p for p in gradients if not p.requires_grad]:
            del gradients[p]
        if self.unit_rows and sae.W_dec in gradients:
            gradient, rows = gradients[sae.W_dec], optimizer.mine(sae.W_dec)[unit.latents]
            size = rows_of_a_chunk(len(rows), rows.shape[1], rows.device.type)
            for part, of_part in zip(gradient.split(size), rows.split(size), strict=True):
                part.copy_(without_parallel_part(part, of_part))
        squares = [aligned(gradient).square().sum().to(bias.dtype) for gradient in gradients.values()]
        return torch.cat([torch.stack([bias.new_zeros(()), *squares]).sum()[None], center])

    def _update(
        self, unit: Unit, gradients: dict[Tensor, Tensor], skip: Tensor | None, skipped: Tensor | None
    ) -> None:
        """Adam on a unit, and norm 1 of its decoder rows again."""
        optimizer, options = self.optimizer, self.optimizer.options
        adam = FusedAdam(
            found_inf=skipped, beta1=options["betas"][0], beta2=options["betas"][1], lr=options["lr"],
            weight_decay=options["weight_decay"], eps=options["eps"],
        )  # fmt: skip
        held, places, all_keys = [], [], []
        for p, gradient in gradients.items():
            of_p = [self._by_latent(p, t)[unit.latents] for t in (optimizer.mine(p), *optimizer.moments(p))]
            together = [t.contiguous() for t in of_p]
            held.append([together[0], gradient.to(p.dtype).contiguous(), *together[1:]])
            places += [(t, copy) for t, copy in zip(of_p, together, strict=True) if t is not copy]
            all_keys.append(self._keys_of(p, unit) if of_p[1].dtype != p.dtype else None)
        if held:
            rows, grads, exp_avgs, exp_avg_sqs = map(list, zip(*held, strict=True))
            steps = [optimizer.state[p]["step"] for p in gradients]
            adam(rows, grads, exp_avgs, exp_avg_sqs, steps, all_keys)
        for place, copy in places:
            place.copy_(copy)
        if self.unit_rows and self.sae.W_dec in gradients:
            rows_of_unit = optimizer.mine(self.sae.W_dec)[unit.latents]
            norms = decoder_norms(rows_of_unit)[:, None]
            unchanged = norms == 0 if skip is None else (norms == 0) | skip
            rows_of_unit.div_(torch.where(unchanged, 1.0, norms))

    def _keys_of(self, parameter: Tensor, unit: Unit):
        """By which the moments of a matrix are rounded: of the latents' places among all."""
        assert self.shards is not None
        number = next(n for n, matrix in enumerate(self.optimizer.matrices) if matrix is parameter)
        first = self.shards.mine.start + self.shards.updated.start
        latents = slice(first + unit.start, first + unit.stop)
        return keys(self.optimizer.state[parameter]["step"], number, latents, self.sae.d_out if number == 0 else
                    self.sae.d_in)  # fmt: skip
