"""The decoder's gradients at the values and at the weights, by ``embedding_bag`` and its own gradients."""
import torch
from torch import Tensor

from . import limits
from .decode import SUM, bags, wide_of, widened
from .dense import entries_of_each_row, rows_of, rows_of_uniform

PRODUCTS = torch.ops.aten._embedding_bag_per_sample_weights_backward  # of two tables' rows, without copying a row


def decode_backward_values(grad, values, indices, offsets, weight):
    """The per-sample-weight gradient of ``embedding_bag``: no (N, D) temporary."""
    if values.numel() == 0 or grad.shape[0] == 0:
        return torch.zeros_like(values)
    shared = grad.dtype == weight.dtype == values.dtype  # summed in fp32 and rounded once as it is
    wide = values.dtype if shared else wide_of(grad, weight)
    k = entries_of_each_row(offsets, values.numel())  # then every entry has a row
    rows = rows_of(offsets, values.numel()) if k is None else rows_of_uniform(values.numel(), k, offsets.device)
    rows, ends = rows.to(indices.dtype), offsets.to(indices.dtype)
    if weight.is_cpu and _latents_come_again(grad, indices, weight):
        return _in_order_of_latents(grad, indices, offsets, rows, weight, wide).to(values.dtype)
    if k is not None:
        return products(grad, weight, indices, ends, rows, wide).to(values.dtype)
    out = products(grad, weight, indices, ends, rows.clamp(max=grad.shape[0] - 1), wide)
    return torch.where(rows < grad.shape[0], out, 0.0).to(values.dtype)


def products(
    grad: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """(N,) <grad[row], weight[index]>, in the ``dtype`` that both have, or in one as wide as either."""
    summed = torch.float32 if dtype == torch.bfloat16 and not weight.is_cpu else dtype  # torch for CUDA has no bfloat16
    if weight.dtype == summed:
        return PRODUCTS(grad.to(summed), weight, indices, offsets, rows, SUM)
    out = grad.new_zeros(indices.numel(), dtype=summed)
    for columns, table, at in widened(weight, indices, summed):
        out += PRODUCTS(grad[:, columns].to(summed), table, at, offsets, rows, SUM)
    return out.to(dtype)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """(R,) the dot product of each row of ``a`` (R, D) with that of ``b``, of one dtype.

    A CPU's ``vecdot`` multiplies first and sums then, in three times the time.
    """
    if not a.is_cpu:
        return torch.linalg.vecdot(a, b)
    rows = torch.arange(a.shape[0] + 1, dtype=torch.int32, device="cpu")
    return PRODUCTS(a, b, rows[:-1], rows, rows[:-1], SUM)


def _rows_in_cache(grad: Tensor) -> int:
    return max(limits.GATHERED_IN_CACHE // max(grad.shape[1], 1), 1)


def _latents_come_again(grad: Tensor, indices: Tensor, weight: Tensor) -> bool:
    """Whether sorting by latent pays: the cache does not hold the weight, and as many of the gradient's rows as it does
    hold ask for at least half of the latents.

    With fewer entries sorting costs more than it saves.
    """
    chunks = max(grad.shape[0] / _rows_in_cache(grad), 1)
    return weight.numel() >= 2 * limits.GATHERED_IN_CACHE and 2 * indices.numel() >= weight.shape[0] * chunks


def _in_order_of_latents(
    grad: Tensor, indices: Tensor, offsets: Tensor, rows: Tensor, weight: Tensor, wide: torch.dtype
) -> Tensor:
    """The same products (N,), those of one latent one after the other.

    So the weight is read in order, and once for all rows of the gradient that the cache holds; in the order of the rows
    each entry would wait for its latent. What is wider than the weight is made of some latents at a time.
    """
    out = grad.new_zeros(indices.numel(), dtype=wide)  # what lies behind the last row stays 0
    num_latents, step = weight.shape[0], _rows_in_cache(grad)
    at_once = num_latents if weight.dtype == wide else min(step, num_latents)
    firsts = range(0, num_latents, at_once)
    bounds = torch.tensor([*firsts, num_latents], dtype=indices.dtype, device="cpu")
    for start in range(0, grad.shape[0], step):
        part = grad[start : start + step].to(wide)
        entries = slice(int(offsets[start]), int(offsets[start + part.shape[0]]))
        latents, order = indices[entries].sort()
        mine, ends = (rows[entries] - start)[order], torch.searchsorted(latents, bounds).tolist()
        inner = []
        for first, low, high in zip(firsts, ends, ends[1:], strict=False):
            some = weight[first : first + at_once].to(wide)
            inner.append(PRODUCTS(some, part, mine[low:high], bounds, latents[low:high] - first, SUM))
        out[entries].scatter_(0, order, torch.cat(inner))
    return out


def decode_backward_weight(grad, values, latent_offsets, latent_rows, latent_positions, dtype):
    """``embedding_bag`` over the transposed codes: each latent is a bag of rows of the gradient."""
    wide = dtype if values.dtype == grad.dtype == dtype else wide_of(grad, values)
    rows = latent_rows.clamp(max=max(grad.shape[0] - 1, 0))
    return bags(values.to(wide)[latent_positions], rows, latent_offsets, grad.to(wide)).to(dtype)
