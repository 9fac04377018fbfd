"""The operations inside ``torch.func`` (grad, vmap, jvp, jacrev, …) and forward-mode AD: plain PyTorch, any back end.

Those transforms look into what runs, and an operator of ``torch.library`` shows them nothing. So here every operation
that a forward pass calls is written with functions that they know, of sizes that no data decides: right, of any order
of derivatives, and as slow and large as dense code is. Which entries are kept is a constant here too. Rules that keep
as many as the data says store every entry here, those that they do not keep as 0, whatever capacity they were given.
"""
import torch
from torch import Tensor

from . import reference
from .stock.dense import uniform_offsets


def _by(dense: Tensor) -> Tensor:
    return reference.ordered_keys(reference.relu(dense.detach()))


def topk(pre, score, mask, k, magnitude, apply_relu, backend):
    mask = reference.eligible(mask, pre)
    by = (pre.abs() if magnitude else pre if score is None else score).detach()
    kept = reference.first_k(reference.ranking(by, mask), k)
    values = torch.where(mask, reference.relu(pre) if apply_relu else pre, 0.0).gather(1, kept)
    return values.flatten(), kept.flatten().int()


def batch_topk(pre, mask, total, backend):
    mask = reference.eligible(mask, pre)
    keys = reference.ranking(reference.relu(pre.detach()), mask).flatten()
    return _compressed(torch.where(mask, reference.relu(pre), 0.0), reference.first_k(keys, total))


def feature_topm(pre, m, total, backend):
    order = _by(pre).sort(dim=0, descending=True, stable=True).indices
    kept = order.argsort(dim=0) < m
    return _compressed(reference.relu(pre), _first_true(kept, total))


def norm_match(pre, target, weight_norm, is_share, capacity, backend):
    kept = reference.norm_matched(pre.detach(), target.detach(), weight_norm, is_share)
    return _every(torch.where(kept, reference.relu(pre), 0.0), kept)


def threshold(pre, theta, bandwidth, capacity, backend):
    known, cut = pre.detach().to(theta.dtype), theta.detach()
    kept = (known > cut) | known.isnan()
    dense = torch.where(kept, pre, 0.0)
    if bandwidth is not None:  # a term that is 0, with the slope of the rectangle estimator and the slope of that
        inside = (known - cut).abs() < bandwidth / 2
        dense = dense + torch.where(inside, (cut.square() - theta.square()) / (2 * bandwidth), 0.0).to(pre.dtype)
    return _every(dense, kept)


def _every(dense: Tensor, kept: Tensor):
    """Codes that store every entry, most of them as 0, and how many are kept."""
    rows, num_latents = dense.shape
    indices = torch.arange(num_latents, dtype=torch.int32, device=dense.device).repeat(rows)
    return dense.flatten(), indices, uniform_offsets(rows, num_latents, dense.device), kept.sum()


def _first_true(kept: Tensor, total: int) -> Tensor:
    """Ascending flat positions of the ``total`` entries that are True."""
    return kept.flatten().int().sort(descending=True, stable=True).indices[:total]


def _compressed(dense: Tensor, positions: Tensor):
    """Values, indices and offsets of the entries at ascending flat ``positions`` (N,) of ``dense`` (B, F)."""
    rows, num_latents = dense.shape
    counts = torch.zeros(rows + 1, dtype=torch.int64, device=dense.device)
    counts = counts.scatter_add(0, positions // num_latents + 1, torch.ones_like(positions))
    return dense.flatten().gather(0, positions), (positions % num_latents).int(), counts.cumsum(0)


def _rows_of(offsets: Tensor, entries: int) -> Tensor:
    """The row (N,) of each entry, B for those that belong to none."""
    starts = torch.zeros(entries + 1, dtype=torch.int64, device=offsets.device)
    return starts.scatter_add(0, offsets[1:], torch.ones_like(offsets[1:])).cumsum(0)[:entries]


def _places(indices: Tensor, offsets: Tensor, num_latents: int) -> Tensor:
    """Flat positions (N,) in a (B + 1, F) matrix, whose last row takes what belongs to none."""
    return _rows_of(offsets, indices.shape[0]) * num_latents + indices.long().clamp(max=num_latents - 1)


def to_dense(values, indices, offsets, num_latents, backend):
    rows = offsets.shape[0] - 1
    flat = values.new_zeros((rows + 1) * num_latents)
    return flat.scatter(0, _places(indices, offsets, num_latents), values)[: rows * num_latents].view(rows, num_latents)


def gather(dense, indices, offsets, backend):
    spare = dense.new_zeros(1, dense.shape[1])
    return torch.cat([dense, spare]).flatten().gather(0, _places(indices, offsets, dense.shape[1]))


def by_latent(indices, offsets, num_latents, backend):
    rows = _rows_of(offsets, indices.shape[0])
    latents = torch.where(rows < offsets.shape[0] - 1, indices.long(), num_latents)
    latents, positions = latents.sort(stable=True)
    counts = torch.zeros(num_latents + 2, dtype=torch.int64, device=indices.device)
    starts = counts.scatter_add(0, latents + 1, torch.ones_like(latents)).cumsum(0)
    return starts[:-1], rows[positions].int(), positions


def at_latents(vector, indices, *_):
    return vector[indices.long()]


def decode(values, indices, offsets, weight, bias, dtype, *_):
    wide = reference.accumulation_dtype(values, weight)
    out = to_dense(values, indices, offsets, weight.shape[0], "").to(wide) @ weight.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def decode_error(values, indices, offsets, weight, bias, target, dtype, backend):
    wide = reference.accumulation_dtype(values, weight)
    residual = decode(values, indices, offsets, weight, bias, wide) - target.to(wide)
    return residual.to(dtype), residual.square().sum(1)


def linear(x, weight, bias):
    return reference.linear(x, weight, bias)


def linear_16bit(x, weight, bias, dtype, backend):
    return reference.linear_16bit(x, weight, bias, dtype)


def encode_entries(x, weight, bias, center, entries, indices, offsets, *_):
    """The product again, at the entries: ``entries`` holds no derivative."""
    if center is not None:
        x = x - (center - center.detach()).to(x.dtype)
    wide = reference.accumulation_dtype(x, weight)
    pre = reference.linear(x.to(wide), weight.to(x.dtype).to(wide), bias)
    return gather(pre, indices, offsets, "").to(entries.dtype)
