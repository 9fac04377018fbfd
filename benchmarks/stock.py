"""What stock PyTorch users write, at its best setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from inputs import Inputs
from torch import Tensor

import sae_engine as se
from sae_kernels import reference

Output = Any


def topk_relu(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = pre.topk(k, sorted=False)
    return values.relu(), indices


def topk_dense(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu())


def flat_topk(pre: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return pre.relu().flatten().topk(total, sorted=False)


def flat_topk_dense(pre: Tensor, total: int) -> Tensor:
    flat = pre.relu().flatten()
    values, positions = flat.topk(total, sorted=False)
    return torch.zeros_like(flat).scatter_(0, positions, values).view_as(pre)


@torch.no_grad()
def step_with_unit_rows(optimizer: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """A step on decoder rows of norm 1: their gradient loses its part along the row, and the rows are rescaled."""
    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    optimizer.step()
    optimizer.zero_grad()
    W_dec /= W_dec.norm(dim=1, keepdim=True)


def column_topk(pre: Tensor, m: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each column's top-k for the largest budget ``most``, of which it keeps as many as its own budget says."""
    values, rows = pre.relu().topk(most, dim=0)
    kept = torch.arange(most, device=pre.device)[:, None] < m
    return values[kept], rows[kept], kept.nonzero()[:, 1]


def norm_match_dense(pre: Tensor, target: Tensor, weight_norm: Tensor) -> Tensor:
    """Sort, running sum, nearest prefix in norm space, scatter (methods of Lee et al. 2025)."""
    kept = pre.relu()
    energy, order = (kept.float() * weight_norm).square_().sort(dim=1, descending=True)
    count = (energy.cumsum_(1).sqrt_() - target[:, None]).abs_().argmin(1, keepdim=True) + 1
    prefix = torch.arange(pre.shape[1], device=pre.device) < count
    return torch.zeros_like(pre).scatter_(1, order, torch.where(prefix, kept.gather(1, order), 0.0))


def energy_share_dense(pre: Tensor, share: Tensor) -> Tensor:
    """Sort, running sum of squares, the first prefix that holds the share, scatter."""
    kept, order = pre.relu().sort(dim=1, descending=True)
    energy = kept.float().square().cumsum(1)
    before = torch.nn.functional.pad(energy, (1, -1))
    return torch.zeros_like(pre).scatter_(1, order, torch.where(before < share[:, None] * energy[:, -1:], kept, 0.0))


def above_compressed(pre: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = (pre > theta).nonzero(as_tuple=True)
    return pre[rows, columns], rows, columns


def above_dense(pre: Tensor, theta: Tensor) -> Tensor:
    return torch.where(pre > theta, pre, 0.0)


def bag_error(values: Tensor, columns: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Output:
    residual = bags(values, columns, weight) + bias - target
    return residual, residual.float().square().sum(1)


def bags(values: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(columns, weight, mode="sum", per_sample_weights=values)


def gathered(values: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (values[..., None] * weight[columns]).sum(1) + bias


def dense_autoencoder(x: Tensor, sae: se.SparseAutoencoder, k: int) -> Tensor:
    return torch.addmm(sae.b_dec, topk_dense(torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc), k), sae.W_dec)


def bag_autoencoder(x: Tensor, sae: se.SparseAutoencoder, k: int) -> Tensor:
    values, columns = topk_relu(torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc), k)
    return bags(values, columns, sae.W_dec) + sae.b_dec


def dense_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return topk_relu(torch.addmm(bias, x, weight), k)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def bag_gradient(wanted: str) -> Callable[[Inputs], Callable[[], Output]]:
    """The gradient as autograd computes it from ``embedding_bag``: the graph is made once, its backward is timed."""

    def build(i: Inputs) -> Callable[[], Output]:
        leaf = getattr(i, wanted).detach().clone().requires_grad_()
        with torch.enable_grad():
            out = bags(**{"values": i.values, "columns": i.columns, "weight": i.weight, wanted: leaf})
        return lambda: torch.autograd.grad(out, leaf, i.grad, retain_graph=True)[0]

    return build


def dense_codes(i: Inputs) -> Tensor:
    return reference.to_dense(i.codes.values, i.codes.indices, i.codes.offsets, i.case.F)


def dense_decode(i: Inputs) -> Callable[[], Output]:
    dense = dense_codes(i)
    return lambda: torch.addmm(i.bias, dense, i.weight)


def dense_weight_gradient(i: Inputs) -> Callable[[], Output]:
    dense = dense_codes(i)
    return lambda: dense.T @ i.grad
