"""The decoder's gradients at the values and at the weights, by ``embedding_bag`` and its own gradients."""
import torch

from .decode import SUM, bags, wide_of, widened
from .dense import entries_of_each_row, rows_of


def decode_backward_values(grad, values, indices, offsets, weight):
    """The per-sample-weight gradient of ``embedding_bag``: no (N, D) temporary."""
    if values.numel() == 0 or grad.shape[0] == 0:
        return torch.zeros_like(values)
    wide = wide_of(grad, weight)
    whole = entries_of_each_row(offsets, values.numel()) is not None  # every entry has a row
    rows, ends = rows_of(offsets, values.numel()).to(indices.dtype), offsets.to(indices.dtype)
    mine = rows if whole else rows.clamp(max=grad.shape[0] - 1)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward
    if weight.dtype == wide or not weight.is_cpu:
        out = products(grad.to(wide), weight.to(wide), indices, ends, mine, SUM)
    else:
        out = grad.new_zeros(values.numel(), dtype=wide)
        for columns, table, at in widened(weight, indices, wide):
            out += products(grad[:, columns].to(wide), table, at, ends, mine, SUM)
    return (out if whole else torch.where(rows < grad.shape[0], out, 0.0)).to(values.dtype)


def decode_backward_weight(grad, values, latent_offsets, latent_rows, latent_positions, dtype):
    """``embedding_bag`` over the transposed codes: each latent is a bag of rows of the gradient."""
    wide = dtype if values.dtype == grad.dtype == dtype else wide_of(grad, values)
    rows = latent_rows.clamp(max=max(grad.shape[0] - 1, 0))
    return bags(values.to(wide)[latent_positions], rows, latent_offsets, grad.to(wide)).to(dtype)
