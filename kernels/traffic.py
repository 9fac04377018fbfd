"""Bytes and flops of each operation, as functions of its sizes. Pure Python: no torch, no device.

``bytes`` are the unavoidable ones: every input element that can influence the result once, every output element once.
What an implementation moves beyond them (temporaries, second passes) is its own affair and shows as a lower share of
the machine's bandwidth. ``flops`` count floating-point additions and multiplications, two per multiply-add;
comparisons, conversions and integer work count nothing, so pure selections have 0.

Sizes: ``rows`` B tokens, ``latents`` F, ``width`` d, ``entries`` N stored entries over all rows. Itemsizes are bytes
per element; indices are int32, offsets and positions int64, norms and thresholds fp32.
"""
from typing import NamedTuple

INDEX = 4  # int32: latents, rows of a turned code
OFFSET = 8  # int64: offsets, positions
WIDE = 4  # fp32: norms, targets, thresholds


class Traffic(NamedTuple):
    """What an operation cannot avoid."""

    bytes: int
    flops: int

    def __add__(self, other):  # one operation after the other, the result between them counted as both say
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)


def _codes(entries: int, rows: int, itemsize: int) -> int:
    """Bytes of compressed rows: values, indices, offsets."""
    return entries * (itemsize + INDEX) + (rows + 1) * OFFSET


def linear(rows: int, width: int, latents: int, itemsize: int, *, bias: bool = True) -> Traffic:
    """The encoder GEMM (rows, width) @ (width, latents) + bias."""
    elements = rows * width + width * latents + rows * latents + (latents if bias else 0)
    return Traffic(elements * itemsize, 2 * rows * width * latents + (rows * latents if bias else 0))


def topk(rows: int, latents: int, k: int, itemsize: int) -> Traffic:
    """k entries of each row: reads the matrix, writes values and indices (offsets follow from k)."""
    return Traffic(rows * latents * itemsize + rows * k * (itemsize + INDEX), 0)


def batch_topk(rows: int, latents: int, entries: int, itemsize: int) -> Traffic:
    """``entries`` of the whole matrix as compressed rows."""
    return Traffic(rows * latents * itemsize + _codes(entries, rows, itemsize), 0)


def feature_topm(rows: int, latents: int, entries: int, itemsize: int) -> Traffic:
    """``entries`` shared out over the latents by budgets (int32), as compressed rows."""
    return Traffic(rows * latents * itemsize + latents * INDEX + _codes(entries, rows, itemsize), 0)


def norm_match(rows: int, latents: int, entries: int, itemsize: int, *, weight_norm: bool = True) -> Traffic:
    """The prefix of each row nearest in norm to its target. Flops: score, square, sum of every element."""
    read = rows * latents * itemsize + rows * WIDE + (latents * WIDE if weight_norm else 0)
    return Traffic(read + _codes(entries, rows, itemsize) + OFFSET, (2 + weight_norm) * rows * latents)


def threshold(rows: int, latents: int, entries: int, itemsize: int) -> Traffic:
    """Entries above a threshold per latent."""
    read = rows * latents * itemsize + latents * WIDE
    return Traffic(read + _codes(entries, rows, itemsize) + OFFSET, 0)


def decode(
    rows: int, latents: int, width: int, entries: int, value_itemsize: int, weight_itemsize: int,
    out_itemsize: int | None = None, *, distinct: int | None = None, bias: bool = True,
) -> Traffic:
    """Weighted sum of decoder rows. ``distinct`` latents occur in the codes (default: as many as can)."""
    distinct = min(entries, latents) if distinct is None else distinct
    out_itemsize = weight_itemsize if out_itemsize is None else out_itemsize
    read = _codes(entries, rows, value_itemsize) + (distinct + bias) * width * weight_itemsize
    return Traffic(read + rows * width * out_itemsize, 2 * entries * width + bias * rows * width)


def decode_gathered_bytes(width: int, entries: int, weight_itemsize: int) -> int:
    """Bytes of decoder rows that the gather asks for, repeats included: what caches, not memory, must deliver."""
    return entries * width * weight_itemsize


def decode_backward_values(
    rows: int, latents: int, width: int, entries: int, value_itemsize: int, weight_itemsize: int, grad_itemsize: int,
    *, distinct: int | None = None,
) -> Traffic:
    """One inner product of ``width`` per entry."""
    distinct = min(entries, latents) if distinct is None else distinct
    read = rows * width * grad_itemsize + distinct * width * weight_itemsize + entries * INDEX + (rows + 1) * OFFSET
    return Traffic(read + entries * value_itemsize, 2 * entries * width)


def decode_backward_weight(
    rows: int, latents: int, width: int, entries: int, value_itemsize: int, weight_itemsize: int, grad_itemsize: int
) -> Traffic:
    """Gradient of every decoder row from the codes as rows: reads codes and gradient, writes (latents, width)."""
    read = rows * width * grad_itemsize + _codes(entries, rows, value_itemsize)
    return Traffic(read + latents * width * weight_itemsize, 2 * entries * width)


def by_latent(rows: int, latents: int, entries: int) -> Traffic:
    """The codes turned around: offsets per latent, and the row and position of each entry."""
    read = entries * INDEX + (rows + 1) * OFFSET
    return Traffic(read + (latents + 1) * OFFSET + entries * (INDEX + OFFSET), 0)


def to_dense(rows: int, latents: int, entries: int, itemsize: int) -> Traffic:
    """Codes as a matrix, zeros included."""
    return Traffic(_codes(entries, rows, itemsize) + rows * latents * itemsize, 0)


def gather(rows: int, entries: int, itemsize: int) -> Traffic:
    """A matrix read at the codes: the entries of it, not the whole."""
    return Traffic(_codes(entries, rows, itemsize) + entries * itemsize, 0)


def autoencoder_forward(
    rows: int, latents: int, width: int, entries: int, itemsize: int, *, distinct: int | None = None
) -> Traffic:
    """Encoder, selection, decoder as one: parameters and input once, the reconstruction once, nothing in between."""
    distinct = min(entries, latents) if distinct is None else distinct
    parameters = width * latents + latents + distinct * width + width
    flops = 2 * rows * width * latents + rows * latents + 2 * entries * width + 2 * rows * width
    return Traffic((parameters + 2 * rows * width) * itemsize, flops)
