"""Bytes and flops of what is timed and is no operation of the table (``kernels/operations.py``), from its sizes.

Itemsizes are bytes per element. What bytes and flops count is said there, at ``Traffic``.
"""

from sae_kernels.operations import Traffic

INDEX = 4  # int32


def linear(rows: int, width: int, latents: int, itemsize: int, *, bias: bool = True) -> Traffic:
    """The encoder GEMM (rows, width) @ (width, latents) + bias."""
    elements = rows * width + width * latents + rows * latents + (latents if bias else 0)
    return Traffic(elements * itemsize, 2 * rows * width * latents + (rows * latents if bias else 0))


def encode_topk(rows: int, width: int, latents: int, k: int, itemsize: int, *, bias: bool = True) -> Traffic:
    """The encoder GEMM and k entries of each row: the matrix between them is written and, at best, not read again."""
    return linear(rows, width, latents, itemsize, bias=bias) + Traffic(rows * k * (itemsize + INDEX), 0)


def autoencoder_forward(
    rows: int, latents: int, width: int, entries: int, itemsize: int, *, distinct: int | None = None
) -> Traffic:
    """Encoder, selection, decoder as one: parameters and input once, the reconstruction once, nothing in between."""
    distinct = min(entries, latents) if distinct is None else distinct
    parameters = width * latents + latents + distinct * width + width
    flops = 2 * rows * width * latents + rows * latents + 2 * entries * width + 2 * rows * width
    return Traffic((parameters + 2 * rows * width) * itemsize, flops)
