"""Products of 16-bit matrices by fp32 sums, which a second operator biases and rounds. Torch only, any device."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .limits import WIDE_ELEMENTS
from .linear import linear

# How a GPU has the product itself add an fp32 bias: three pieces hold the 24 bits of an fp32 number, its first, and
# what is left, in two. In fp16, which lacks fp32's range, the scales stretch it: biases up to 2^19 are exact to 2^-33.
SCALES = {torch.bfloat16: (1.0, 1.0), torch.float16: (2.0**8, 2.0**-8)}
PIECES = 3


def operand_width(d: int) -> int:
    """Room for d numbers and the scales, in rows of whole 128 bytes, which cuBLAS multiplies at its full rate."""
    return -(-(d + PIECES) // 64) * 64


def adds_bias_in_product(rows: int, d: int) -> bool:
    """Whether that is the way of so many rows: for fewer, a wider copy of the weights costs more than it spares."""
    return 2 * rows > d


def with_scales(x: Tensor, center: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """(B, width): x (B, D) less ``center`` (D,), rounded to ``dtype``; then the scales of the pieces, and of zeros.

    On a GPU one launch makes the difference, rounds it and writes it here.
    """
    d, dtype = x.shape[1], x.dtype if dtype is None else dtype
    first, others = SCALES[dtype]
    if center is None and dtype == x.dtype and first == others:
        return F.pad(x, (0, operand_width(d) - d), value=first)
    out = x.new_empty(x.shape[0], operand_width(d), dtype=dtype)
    if center is None:
        out[:, :d].copy_(x)
    else:
        torch.sub(x, center, out=out[:, :d])
    out[:, d:].fill_(others)
    if first != others:
        out[:, d].fill_(first)
    return out


def linear_operand(x: Tensor, center: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` (B, D) less ``center`` (D,), rounded to ``dtype``: what is multiplied by one slab of weights after another.

    For 16-bit products on a GPU with scales, which each product would write anew.
    """
    if is_extended(x, dtype):
        return with_scales(x, center, dtype)
    return (x if center is None else x - center).to(dtype)


def is_extended(x: Tensor, dtype: torch.dtype) -> bool:
    return x.is_cuda and dtype.itemsize == 2 and adds_bias_in_product(*x.shape)


def linear_16bit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, F) in ``dtype``; see ``reference.linear_16bit``. Products of 16-bit numbers are exact in fp32."""
    return (_linear_16bit_cpu if x.is_cpu else _linear_16bit)(x[:, : weight.shape[0]], weight, bias, dtype)


def _linear_16bit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The tensor cores' fp32 sums, which one operator biases and rounds; row chunks bound them to 256 MiB."""
    if dtype == torch.float32:
        product = torch.mm(x, weight, out_dtype=dtype)
        return product if bias is None else product.add_(bias)
    out = torch.empty(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)
    bias = None if bias is None else bias.float()
    step = max(WIDE_ELEMENTS["cuda"] // max(weight.shape[1], 1), 1)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        product = torch.mm(x[rows], weight, out_dtype=torch.float32)
        if bias is None:
            out[rows] = product
        else:
            torch.add(product, bias, out=out[rows])
        del product  # before the next one is made
    return out


def gradients(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool):
    """Of x and weight in their dtype. A gradient of that dtype is multiplied as it is, with fp32 sums."""
    further, x = x.shape[1] - weight.shape[0], x[:, : weight.shape[0]]
    if x.is_cpu or grad.dtype != x.dtype:  # fp32: a CPU multiplies it faster
        grad, x, weight = grad.float(), x.float(), weight.float()
    at_x = grad @ weight.T if needs_x else None
    at_x = at_x if at_x is None or not further else F.pad(at_x, (0, further))
    return at_x, x.T @ grad if needs_weight else None


def _linear_16bit_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The fp32 product of the rounded operands, biased and rounded once; fp32 copies are of some latents at a time.

    One row times latents that lie whole needs none, where nothing is added before the sums are rounded.
    """
    if x.shape[0] == 1 and bias is None and dtype == x.dtype and weight.stride(0) == 1:
        return torch.mv(weight.T, x[0])[None]
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)
    wide = x.float()
    bias = x.new_zeros(()).expand(weight.shape[1]) if bias is None else bias
    step = max(WIDE_ELEMENTS["cpu"] // max(x.shape[0], x.shape[1], 1), 128)
    for start in range(0, weight.shape[1], step):
        latents = slice(start, start + step)
        out[:, latents] = linear(wide, weight[:, latents].float(), None).add_(bias[latents].float())
    return out
