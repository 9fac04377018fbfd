"""An MLP's kept neurons on stock PyTorch: products with their rows of ``up``, a sum of their rows of ``down``."""
import torch
from torch import Tensor

from .backward import products
from .decode import SUM, wide_of, widened

PIECES = 8  # of a token's sum: threads share them, and a constant gives the same bits for any number of threads


def sparse_mlp(
    x: Tensor | None, kept: Tensor, up: Tensor | None, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    """Rows of a weight are read where they lie, if their numbers lie side by side in the dtype of ``kept``.

    In 16 bits each product, each h and each piece of a sum is then rounded once before the result is.
    """
    wide = wide_of(*(t for t in (x, kept, up, up_bias, down, down_bias) if t is not None))
    if len(kept) == 1:
        one = kept.reshape(-1)
        neurons = one.nonzero().squeeze(1)
        count = neurons.numel()
        step = max(-(-count // PIECES), 1)
        pieces = torch.arange(0, PIECES * step + 1, step, device=kept.device).clamp_(max=count)
        rows, hidden = torch.zeros_like(neurons), one.index_select(0, neurons)
    else:
        rows, neurons = kept.nonzero(as_tuple=True)
        hidden, pieces = kept[rows, neurons], _pieces(rows, len(kept))
    if x is not None and up is not None:
        product = products(x, up, neurons, pieces, rows, kept.dtype if up.dtype == x.dtype else wide)
        hidden = hidden * (product if up_bias is None else product + up_bias[neurons])
    out = _sums(hidden, neurons, pieces, down, kept.dtype, wide)
    return (out if down_bias is None else out + down_bias).to(kept.dtype)


def _pieces(rows: Tensor, number: int) -> Tensor:
    """Where the pieces of each of so many rows begin, and where the last one ends."""
    ends = torch.searchsorted(rows, torch.arange(number + 1, device=rows.device))
    shares = ends.diff()[:, None] * torch.arange(PIECES, device=rows.device) // PIECES
    return torch.cat([(ends[:-1, None] + shares).flatten(), ends[-1:]])


def _sums(
    hidden: Tensor, neurons: Tensor, pieces: Tensor, down: Tensor, dtype: torch.dtype, wide: torch.dtype
) -> Tensor:
    """(B, D_out) in ``wide``: each row's sum of ``hidden`` times rows of ``down``, piece by piece."""
    rows = pieces.numel() // PIECES
    if neurons.numel() == 0:
        return down.new_zeros(rows, down.shape[1], dtype=wide)
    def summed(table: Tensor, at: Tensor) -> Tensor:
        parts = torch.embedding_bag(table, at, pieces, False, SUM, False, hidden.to(table.dtype), True)[0]
        return parts.view(rows, PIECES, -1).sum(1, dtype=wide)

    if down.dtype == dtype and down.stride(1) == 1:
        return summed(down, neurons)
    return torch.cat([summed(table, at) for _, table, at in widened(down, neurons, wide)], 1)
