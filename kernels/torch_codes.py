"""The operations on codes in fast stock PyTorch, most of them an ``embedding_bag``. See ``torch_backend.py``."""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import densified
from .densified import rows_of


def gather(dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    rows = rows_of(offsets, indices.numel())
    if dense.shape[0] == 0:
        return dense.new_zeros(indices.numel())
    owned = rows < dense.shape[0]
    return torch.where(owned, dense[rows.clamp(max=dense.shape[0] - 1), indices.long()], 0.0)


def by_latent(indices: Tensor, offsets: Tensor, num_latents: int):
    rows = rows_of(offsets, indices.numel())
    latents = torch.where(rows < offsets.numel() - 1, indices, num_latents)
    latents, positions = latents.sort(stable=True)
    bounds = torch.arange(num_latents + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(latents, bounds), rows[positions].int(), positions


def wide_of(*tensors: Tensor) -> torch.dtype:
    """What products of the tensors are summed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def bags(weights: Tensor, indices: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of table rows, one a bag; a last bag takes the entries that belong to no row, and is cut off."""
    if indices.numel() == 0 or table.shape[0] == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    ends = F.pad(offsets, (0, 1), value=indices.numel()).to(indices.dtype)
    return F.embedding_bag(
        indices, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )[:-1]


def decode(values, indices, offsets, weight, bias, dtype, *_by_latent):
    """``embedding_bag``, which sums 16-bit rows in fp32 and rounds once; in fp32 where more is to come than that."""
    if bias is None and values.dtype == weight.dtype == dtype:
        return bags(values, indices, offsets, weight)
    wide = wide_of(values, weight)
    out = bags(values.to(wide), indices, offsets, weight.to(wide))
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(dtype)


def decode_error(values, indices, offsets, weight, bias, target, dtype):
    out = decode(values, indices, offsets, weight, None, wide_of(values, weight))
    return densified.error_of(out, bias, target, dtype)


def decode_backward_values(grad, values, indices, offsets, weight):
    """The per-sample-weight gradient of ``embedding_bag``: no (N, D) temporary."""
    if values.numel() == 0 or grad.shape[0] == 0:
        return torch.zeros_like(values)
    wide = wide_of(grad, weight)
    rows = rows_of(offsets, values.numel()).to(indices.dtype)
    out = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(wide), weight.to(wide), indices, offsets.to(indices.dtype), rows.clamp(max=grad.shape[0] - 1), 0
    )
    return torch.where(rows < grad.shape[0], out, 0.0).to(values.dtype)


def decode_backward_weight(grad, values, latent_offsets, latent_rows, latent_positions, dtype):
    """``embedding_bag`` over the codes turned around: each latent is a bag of rows of the gradient."""
    wide = dtype if values.dtype == grad.dtype == dtype else wide_of(grad, values)
    rows = latent_rows.clamp(max=max(grad.shape[0] - 1, 0))
    return bags(values.to(wide)[latent_positions], rows, latent_offsets, grad.to(wide)).to(dtype)
