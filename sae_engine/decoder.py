"""SparseDecoder: a linear decoder of codes, by itself."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from ._decoder_rows import unit_rows
from .codes import SparseCodes


class SparseDecoder(nn.Module):
    """A linear decoder that takes codes or a dense tensor: ``codes @ W_dec + b_dec``.

    A dense input gets the dense gradient at every entry, zeros included; codes get it at their entries.

    Args:
        d_sae: number of latents.
        d_in: width of the output.
        bias: whether to have ``b_dec`` (d_in,).

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        ValueError: an input has another number of latents.

    Example:
        >>> decoder = SparseDecoder(16, 4)
        >>> decoder(se.functional.topk(torch.ones(3, 16), 2)).shape, decoder(torch.ones(3, 16)).shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """

    b_dec: Tensor | None

    def __init__(self, d_sae: int, d_in: int, *, bias: bool = True, dtype=None, device=None) -> None:
        super().__init__()
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        self.d_in = check.integer_k(d_in, name="d_in")
        dtype = None if dtype is None else check.dtype_in("dtype", dtype)
        device = check.device_or_default(device)
        self.W_dec = nn.Parameter(unit_rows(d_sae, d_in, dtype=dtype, device=device))
        self.register_parameter("b_dec", nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device)) if bias else None)

    def forward(self, codes: SparseCodes | Tensor) -> Tensor:
        """(*batch_shape, d_in)."""
        if isinstance(codes, SparseCodes):
            return functional.decode(codes, self.W_dec, self.b_dec)
        check.floating("codes", codes)
        if codes.shape[-1] != self.d_sae:
            raise ValueError(f"codes must have d_sae = {self.d_sae} in the last dimension, got {tuple(codes.shape)}")
        return functional.linear(codes, self.W_dec, self.b_dec)

    __prepare_scriptable__ = check.no_torchscript

    def extra_repr(self) -> str:
        return f"d_sae={self.d_sae}, d_in={self.d_in}, bias={self.b_dec is not None}"
