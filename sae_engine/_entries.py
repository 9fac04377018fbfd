"""What belongs to the entries of codes: quantities read there, the index that gradients need, and their soundness."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kernels.ops import ops

from ._checks import floating, shaped

if TYPE_CHECKING:
    from .codes import SparseCodes


def at_latents(vector: Tensor, codes: SparseCodes) -> Tensor:
    """``vector[codes.indices]``: a quantity per latent (F,), read at the entries (N,).

    Differentiable in ``vector``, with the same bits on every run, which indexing does not promise.

    Raises:
        TypeError: ``vector`` is not floating-point.
        ValueError: it is not (F,), or on another device.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]))
        >>> at_latents(torch.tensor([10.0, 20.0, 30.0]), codes)
        tensor([20., 30., 10.])
    """
    floating("vector", vector, dims=1)
    shaped("vector", vector, (codes.num_latents,), codes.values, why="one per latent")
    return ops.at_latents(vector, codes.indices, codes.offsets, *transposed_for(codes, vector), "auto")


def transposed_for(codes: SparseCodes, *learned: Tensor | None) -> tuple[Tensor | None, ...]:
    """The codes' transposed index where a gradient of ``learned`` will ask for it, else three times None."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return codes.by_latent
    return None, None, None


def check_numbers(codes: SparseCodes) -> None:
    """Raises ValueError where indices or offsets break the format. Reads the device."""
    if bool(((codes.indices < 0) | (codes.indices >= codes.num_latents)).any()):
        raise ValueError(f"codes.indices must lie in [0, {codes.num_latents}), got {codes.indices.min().item()}"
                         f" to {codes.indices.max().item()}")  # fmt: skip
    first, last = int(codes.offsets[0]), int(codes.offsets[-1])
    if bool((codes.offsets.diff() < 0).any()) or first != 0 or last > codes.values.shape[0]:
        raise ValueError(f"codes.offsets must ascend from 0 to at most {codes.values.shape[0]}")
