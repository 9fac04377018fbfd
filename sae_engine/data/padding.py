"""Padded batches of token ids: on the left, on the right or on both sides, as an ``attention_mask`` says.

Left padding is moved to the right before the model sees it. Each row's first token then has position 0 whatever the
architecture makes positions from (learned embeddings, rotations, ALiBi, a recurrent state), and a causal model cannot
see what comes after a token. So rows with padding equal the rows without it, and no table of architectures says how.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """A padded batch with its tokens moved to the front of each row, and the way back.

    ``input_ids`` and ``attention_mask`` (B, T) are what the model is given; ``first`` (B,) is where each row's first
    token stood.
    """

    input_ids: Tensor
    attention_mask: Tensor
    first: Tensor

    def into(self, t: Tensor, hidden: Tensor) -> Tensor:
        """``hidden`` with the tokens of ``t`` (B, T, ...), which is in the caller's order; padding stays as it is.

        Attention gives padding a weight of 0, but 0 times an infinity is NaN.
        """
        return torch.where(self._present(t), _rolled(t, self.first), hidden)

    def back(self, t: Tensor) -> Tensor:
        """(B, T, ...) in the model's order, in the caller's, with 0 at padding."""
        return _rolled(t.masked_fill(~self._present(t), 0), -self.first)

    def _present(self, t: Tensor) -> Tensor:
        return self.attention_mask.bool().view(*t.shape[:2], *(1,) * (t.ndim - 2))


def padding_of(input_ids: Tensor, attention_mask: Tensor | None) -> Padding | None:
    """None where nothing is padded.

    Raises:
        TypeError: ``attention_mask`` is not a tensor of integers or booleans.
        ValueError: it has another shape than ``input_ids``, holds other numbers than 0 and 1, has padding between
            tokens, or a row without a token.

    Example:
        >>> padding = padding_of(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))
        >>> padding.input_ids.tolist(), padding.attention_mask.tolist()
        ([[5, 6, 5]], [[1, 1, 0]])
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point() or attention_mask.is_complex():
        got = getattr(attention_mask, "dtype", type(attention_mask).__name__)
        raise TypeError(f"attention_mask must be a tensor of 0 and 1, of integers or booleans, got {got}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.to(input_ids.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold 0 (padding) and 1 (a token) alone")
    mask = mask.bool()
    if bool(mask.all()):
        return None
    lengths, first = mask.sum(1), mask.int().argmax(1)
    at = torch.arange(mask.shape[1], device=mask.device)
    is_run = (mask == ((at >= first[:, None]) & (at < (first + lengths)[:, None]))).all(1)
    if not bool((is_run & (lengths > 0)).all()):
        row = int((~is_run | (lengths == 0)).nonzero()[0])
        what = "no token" if int(lengths[row]) == 0 else "padding between tokens"
        raise ValueError(
            f"attention_mask: row {row} has {what}; each row must be one run of ones, with zeros on the left, on the "
            "right or on both sides"
        )
    # Padding may hold any number, as -100. A token of the row is one that every model can embed.
    tokens = _rolled(input_ids, first)
    present = at < lengths[:, None]
    return Padding(torch.where(present, tokens, tokens[:, :1]), present.to(torch.int64), first)


def _rolled(t: Tensor, by: Tensor) -> Tensor:
    """Each row of (B, T, ...) moved to the left by so many places, the front to the end."""
    if not bool(by.any()):
        return t
    length = t.shape[1]
    source = (torch.arange(length, device=t.device) + by[:, None]) % length
    return t[torch.arange(len(t), device=t.device)[:, None], source]
