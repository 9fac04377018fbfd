"""Selections that keep a prefix of each row's ranked entries: the nearest to a norm, or a share of the energy."""
from __future__ import annotations

import torch
from torch import Tensor

from sae_kernels.ops import ops

from . import _checks as check
from .codes import SparseCodes

REACHED = 1 - 2**-21  # of a share: more than it, or an energy, is rounded by in fp32


def norm_match(
    pre: Tensor,
    target_norm: Tensor,
    *,
    weight_norm: Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> SparseCodes:
    """The prefix of each row whose norm lies nearest to a target: top-AFA.

    Rank by ``r = fp32(relu(pre)) * fp32(weight_norm)``; of all prefixes keep the first that minimises
    ``|sqrt(sum r^2) - target_norm|``, at least one entry, unscaled. A target at or above the row's norm keeps every
    positive entry; entries with r = 0 are never kept. A row whose largest r is not finite keeps that entry alone.
    Where the two nearest prefixes differ by less than 1e-6 (relative), either may be kept.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable.
        target_norm: ``(*batch_shape,)``, for top-AFA the norm of the centred input. Constant for autograd.
        weight_norm: ``(F,)`` norms of the decoder rows; default 1. Constant for autograd.
        capacity: entries to allocate. Without it the host reads the number of entries, once; with it nothing waits,
            and :meth:`SparseCodes.check` reports an overflow.

    Source: Lee et al. 2025, arXiv:2503.24277, from the authors' code.

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> codes = norm_match(torch.tensor([[3.0, 1.0, 4.0]]), torch.tensor([5.0]))
        >>> codes.indices.tolist()  # the norm of (4, 3) is 5
        [0, 2]
    """
    check.pre_activations(pre)
    check.floating("target_norm", target_norm, dims=pre.dim() - 1)
    check.shaped("target_norm", target_norm, pre.shape[:-1], pre, why="one per row of pre")
    check.not_negative("target_norm", target_norm)
    return _prefix(pre, target_norm.detach(), weight_norm, False, capacity, backend)


def energy_share(
    pre: Tensor,
    share: float | Tensor,
    *,
    weight_norm: Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> SparseCodes:
    """The smallest prefix of each row that holds a share of the row's energy: top-p of the squares.

    Rank by ``r = fp32(relu(pre)) * fp32(weight_norm)``; keep the first prefix with ``sum r^2 >= share * (the row's sum
    of r^2)``, unscaled; ties go to the lowest index. A share of 1 keeps every positive entry; entries with r = 0 are
    never kept. A row whose largest r is not finite keeps that entry alone. Sums and shares are rounded, so what lacks
    no more than 2^-21 of its goal counts as reaching it: 0.3 of ten equal entries are three. Where a prefix's energy
    lies within 1e-6 (relative) of the goal, the one that ends there or the next may be kept.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable.
        share: ``0 < share <= 1``, a number, or a tensor ``()`` or ``(*batch_shape,)``. Constant for autograd.
        weight_norm: ``(F,)`` norms of the decoder rows, which makes the energy that of the decoded latents one by one;
            default 1. Constant for autograd.
        capacity: as in :func:`norm_match`.

    Source: after the top-p rule of Szatkowski et al. 2025, arXiv:2509.00454. Squares, of what a ReLU leaves, and the
    decoder norms are ours.

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> energy_share(torch.tensor([[3.0, -9.0, 1.0, 2.0]]), 0.9).indices.tolist()  # 9 + 4 of 14
        [0, 3]
    """
    check.pre_activations(pre)
    share = check.share("share", share, pre)
    if isinstance(share, Tensor):
        target = torch.where(share >= 1, 1.0, share.double() * REACHED).expand(pre.shape[:-1])
    else:
        wide = torch.promote_types(pre.dtype, torch.float32)
        target = torch.full(pre.shape[:-1], share * REACHED if share < 1 else 1.0, dtype=wide, device=pre.device)
    return _prefix(pre, target, weight_norm, True, capacity, backend)


def _prefix(pre: Tensor, target: Tensor, weight_norm, is_share: bool, capacity, backend: str) -> SparseCodes:
    """What the two rules that rank by relu(pre) * weight_norm share; ``target`` (*batch_shape,)."""
    wide = torch.promote_types(pre.dtype, torch.float32)
    if weight_norm is not None:
        check.floating("weight_norm", weight_norm, dims=1)
        check.shaped("weight_norm", weight_norm, pre.shape[-1:], pre, why="one per latent")
        check.not_negative("weight_norm", weight_norm)
        weight_norm = weight_norm.detach().to(wide)
    capacity = check.capacity_of(capacity)
    target = target.to(wide).reshape(-1)
    kept = ops.norm_match(check.matrix(pre), target, weight_norm, is_share, capacity, backend)
    return sized(pre, capacity, kept)


def sized(pre: Tensor, capacity: int | None, result: tuple[Tensor, ...]) -> SparseCodes:
    """What an operation with a capacity returned, as codes of the shape of ``pre``."""
    values, indices, offsets, required = result
    return SparseCodes(
        values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1],
        required=None if capacity is None else required,
    )
