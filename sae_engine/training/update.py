"""The last part of a step: gradients latent by latent, and Adam, at once or one after the other."""
from __future__ import annotations

import torch
from torch import Tensor

from .. import _passes
from ..autoencoder import SparseAutoencoder
from .adam import Adam
from .backward import Backward
from .forward import Weights

ON_GPU = 1 << 26  # elements of a temporary: a piece costs a GPU a dozen launches, and fills it many times over


def rows_of_a_piece(d_sae: int, d_out: int, device_type: str) -> int:
    """Rows of the decoder's gradient that are worked on at a time, lest temporaries be as large as itself."""
    return -(-d_sae // 16) if device_type == "cpu" else max(ON_GPU // d_out, 1)


class Copies:
    """The weights in the dtype of the computation, made again where somebody else has written the parameters.

    That is noticed by the parameters' versions and addresses; what is written through ``.data`` in place goes unseen.
    """

    def __init__(self, sae: SparseAutoencoder, dtype: torch.dtype) -> None:
        self.sae, self.dtype = sae, dtype
        self.weights: Weights | None = None
        self.made_of: tuple[tuple[int, int], ...] = ()

    @property
    def needed(self) -> bool:
        return self.dtype != self.sae.W_dec.dtype

    def current(self) -> Weights:
        masters = self.sae.W_dec.detach(), self.sae.W_enc.detach().T
        if not self.needed:
            return Weights(*masters)
        if self.weights is None or self.made_of != self._state():
            if self.weights is None or self.weights.decoder.device != masters[0].device:
                self.weights = Weights(*(torch.empty(t.shape, dtype=self.dtype, device=t.device) for t in masters))
            for copy, master in zip(self.weights, masters, strict=True):
                copy.copy_(master)
            self.written()
        return self.weights

    def written(self) -> None:
        """The copies hold what the parameters hold now."""
        self.made_of = self._state()

    def _state(self) -> tuple[tuple[int, int], ...]:
        return tuple((t._version, t.data_ptr()) for t in (self.sae.W_dec, self.sae.W_enc))


class Update:
    """Turns the backward half of one or several calls into new parameters."""

    def __init__(
        self, sae: SparseAutoencoder, optimizer: Adam, copies: Copies, *, unit_rows: bool, grad_clip: float | None,
        accumulate: int, reduce, backend: str,
    ) -> None:  # fmt: skip
        self.sae, self.optimizer, self.copies = sae, optimizer, copies
        self.unit_rows, self.grad_clip, self.accumulate, self.reduce = unit_rows, grad_clip, accumulate, reduce
        self.backend = backend
        self.stored: dict[Tensor, Tensor] = {}  # W_enc's is (F, d_in): transposed

    def can_be_fused(self, pending: Backward) -> bool:
        """Whether nothing needs the gradients whole."""
        alone = self.grad_clip is None and self.reduce is None and self.accumulate == 1
        return alone and not pending.dense and self.sae.W_dec.requires_grad and self.sae.W_enc.requires_grad

    def fused(self, pending: Backward, skip: Tensor | None) -> Tensor:
        """One pass over the latents that sums, and steps at once. Returns the norm of all gradients."""
        sae, optimizer = self.sae, self.optimizer
        learned = [sae.W_dec, sae.W_enc, *((sae.b_enc,) if sae.b_enc.requires_grad else ())]
        states = zip(*((p.detach(), *optimizer.moments(p)) for p in learned), strict=True)
        parameters, exp_avgs, exp_avg_sqs = (
            [t.T if p is sae.W_enc else t for p, t in zip(learned, state, strict=True)] for state in states
        )
        weights = self.copies.current()
        options = optimizer.options
        center, square = _passes.latent_adam(
            pending.terms, pending.x, pending.along, parameters, exp_avgs, exp_avg_sqs,
            list(weights) if self.copies.needed else [],
            step=optimizer.counted(learned, skip), lr=options["lr"], betas=options["betas"], eps=options["eps"],
            weight_decay=options["weight_decay"], unit_rows=self.unit_rows, skip=skip, backend=self.backend,
        )  # fmt: skip
        self.copies.written()
        small = self._small(pending, center)
        optimizer.apply(small, skip)
        return torch.stack([square, *(g.square().sum().to(square.dtype) for g in small.values())]).sum().sqrt()

    def _small(self, pending: Backward, center: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of everything but the weights and b_enc, with b_dec's part through the encoder."""
        small = dict(pending.small)
        if self.sae.apply_b_dec_to_input:
            small[self.sae.b_dec] = center + small.get(self.sae.b_dec, 0.0)
        return {p: g for p, g in small.items() if p.requires_grad}

    def store(self, pending: Backward) -> None:
        """Adds the gradients of one call, divided by the number of calls."""
        sae, weights = self.sae, self.copies.current()
        wide = torch.promote_types(weights.decoder.dtype, torch.float32)
        decoder, encoder, bias = _passes.latent_gradients(
            pending.terms, pending.x, weights.decoder, pending.along, wide, self.backend
        )
        for dense in pending.dense:
            encoder += dense.to(wide).T @ pending.x[:: pending.repeats].to(wide)
            bias += dense.sum(0, dtype=wide)
        center = -(sae.W_enc.detach().to(wide) @ bias)
        whole = {sae.W_dec: decoder, sae.W_enc: encoder, sae.b_enc: bias, **self._small(pending, center)}
        for p, gradient in whole.items():
            if p.requires_grad:
                gradient = gradient if self.accumulate == 1 else gradient / self.accumulate
                self.stored[p] = self.stored[p] + gradient if p in self.stored else gradient

    def apply_stored(self, also_reduce: list[Tensor], skip: Tensor | None) -> Tensor:
        """Average, remove the parallel part, clip, Adam, rescale. Returns the norm before clipping."""
        sae, gradients = self.sae, self.stored
        self.stored = {}
        if self.reduce is not None:
            self.reduce([*gradients.values(), *also_reduce])
        if self.unit_rows and sae.W_dec in gradients:
            size = rows_of_a_piece(sae.d_sae, sae.d_out, sae.W_dec.device.type)
            for grad, rows in zip(gradients[sae.W_dec].split(size), sae.W_dec.detach().split(size), strict=True):
                grad.copy_(_passes.without_parallel_part(grad, rows))
        norm = torch.nn.utils.get_total_norm(gradients.values())
        if self.grad_clip is not None:
            torch._foreach_mul_(list(gradients.values()), (self.grad_clip / (norm + 1e-6)).clamp(max=1))
        if sae.W_enc in gradients:
            gradients[sae.W_enc] = gradients[sae.W_enc].T
        self.optimizer.apply(gradients, skip)
        if self.unit_rows and sae.W_dec.requires_grad:
            rows = sae.W_dec.norm(dim=1, keepdim=True)
            unchanged = rows == 0 if skip is None else (rows == 0) | skip
            sae.W_dec.div_(torch.where(unchanged, 1.0, rows))
        return norm
