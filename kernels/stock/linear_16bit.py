"""Products of 16-bit matrices by fp32 sums, which a second operator biases and rounds. Torch only, any device."""
import torch
from torch import Tensor

from .limits import WIDE_ELEMENTS
from .linear import linear


def linear_16bit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, F) in ``dtype``; see ``reference.linear_16bit``. Products of 16-bit numbers are exact in fp32."""
    return (_linear_16bit_cpu if x.is_cpu else _linear_16bit)(x, weight, bias, dtype)


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
    if x.is_cpu or grad.dtype != x.dtype:  # fp32: a CPU multiplies it faster
        grad, x, weight = grad.float(), x.float(), weight.float()
    return grad @ weight.T if needs_x else None, x.T @ grad if needs_weight else None


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
