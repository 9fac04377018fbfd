"""Bytes and flops of each operation, as functions of its sizes. Pure Python: no torch, no device.

``bytes`` are the unavoidable ones: every input element that can influence the result once, every output element once.
What an implementation moves beyond them (temporaries, second passes) is its own affair and shows as a lower share of
the machine's bandwidth. ``flops`` count floating-point additions and multiplications, two per multiply-add;
comparisons, conversions and integer work count nothing, so pure selections have 0.

Sizes: ``rows`` B tokens, ``latents`` F, ``width`` d, ``entries`` N stored entries over all rows. Itemsizes are bytes
per element; indices are int32, offsets and positions int64, norms and thresholds fp32.
"""
from collections.abc import Sequence
from typing import NamedTuple

INDEX = 4  # int32: latents, rows of a transposed index
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


def encode_topk(rows: int, width: int, latents: int, k: int, itemsize: int, *, bias: bool = True) -> Traffic:
    """The encoder GEMM and k entries of each row: the matrix between them is written and, at best, not read again."""
    return linear(rows, width, latents, itemsize, bias=bias) + Traffic(rows * k * (itemsize + INDEX), 0)


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


def decode_error(
    rows: int, latents: int, width: int, entries: int, value_itemsize: int, weight_itemsize: int,
    target_itemsize: int = WIDE, out_itemsize: int = WIDE, *, distinct: int | None = None, bias: bool = True,
) -> Traffic:
    """The same, less a target: reads that once, and writes the residual and each row's squared norm."""
    decoded = decode(rows, latents, width, entries, value_itemsize, weight_itemsize, out_itemsize,
                     distinct=distinct, bias=bias)
    return decoded + Traffic(rows * width * target_itemsize + rows * WIDE, 3 * rows * width)


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


def _latent_sums(
    rows: int, latents: int, d_out: int, d_in: int, entries: Sequence[int], itemsize: int, distinct: int | None
) -> Traffic:
    """What both forms of the latent pass read, and the sums: per term its codes and gradient; x and the weight once."""
    distinct = min(sum(entries), latents) if distinct is None else distinct
    read = sum(_codes(n, rows, itemsize) + rows * d_out * itemsize for n in entries)
    read += (rows * d_in + distinct * d_out) * itemsize
    return Traffic(read, sum(entries) * (4 * d_out + 2 * d_in + 1))


def latent_gradients(
    rows: int, latents: int, d_out: int, d_in: int, entries: Sequence[int], itemsize: int, out_itemsize: int = WIDE,
    *, distinct: int | None = None,
) -> Traffic:
    """Gradients of decoder, encoder and bias, stored. ``entries`` of each term; slopes are GATED, nothing offered."""
    written = latents * (d_out + d_in + 1) * out_itemsize
    return _latent_sums(rows, latents, d_out, d_in, entries, itemsize, distinct) + Traffic(written, 0)


def latent_adam(
    rows: int, latents: int, d_out: int, d_in: int, entries: Sequence[int], itemsize: int,
    parameter_itemsize: int = WIDE, *, copies: bool = True, unit_rows: bool = True, distinct: int | None = None,
) -> Traffic:
    """The same used up by Adam. A parameter and its two moments are read and written: 24 bytes in fp32.

    ``copies`` in the type of the computation: 2 more written in 16 bit, 26 a parameter; the decoder's copy is read, in
    place of its weights, where a latent has entries. Without copies the weights are read once for both.
    Flops of a parameter: decay 2, moments 7, root and quotient 6, norm 2; d(center) 2 of an encoder's parameter;
    projection 6 and scaling 3 of a decoder's.
    """
    weights = latents * (d_out + d_in)
    state = 6 * (weights + latents) * parameter_itemsize
    sums = _latent_sums(rows, latents, d_out, d_in, entries, itemsize, distinct if copies else 0)
    flops = 17 * (weights + latents) + 2 * latents * d_in + (9 * latents * d_out if unit_rows else 0)
    return sums + Traffic(state + (weights * itemsize if copies else 0) + (d_in + 1) * WIDE, flops)


def by_latent(rows: int, latents: int, entries: int) -> Traffic:
    """The transposed index: offsets per latent, and the row and position of each entry."""
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
