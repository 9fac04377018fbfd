"""What a threshold learns from beside what it keeps, as pre-activations pass by in rectangles."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels.ops import ops
from sae_kernels.stock.densified import is_dense

from . import _checks as check
from ._running import InParts, joined
from .codes import SparseCodes


class Dropped(NamedTuple):
    """Entries that a rule did not keep and that its thresholds ask for: no codes, since only their gradients count.

    Either some entries of a (tokens, F) matrix by their place, or, where there are too many for that, a mask of them.
    """

    indices: Tensor | None  # (N,) int32 latents, ascending within a token
    offsets: Tensor | None  # (tokens + 1,)
    mask: Tensor | None  # (tokens, F) bool, in place of the two
    within: bool  # those within the window; else those below it, of which the others are what all leave over


class RunningWindow(InParts):
    """The entries above each latent's threshold; apart from them, in :attr:`dropped`, what its gradient asks for.

    A threshold learns from the entries within ``bandwidth / 2`` of it. Those above it are among the codes. For the
    others either they or all entries below the window are held: the sum over them is that over everything, less the
    codes and what lies below. Which are fewer is asked of some tokens of the first rectangle; where both are so many
    that a product of whole matrices is faster, it is a mask of the former.

    Args:
        theta: (F,).
        bandwidth: of the window.

    Attributes:
        dropped: once :meth:`finish` was called.
    """

    TOKENS_ASKED = 64

    def __init__(self, tokens: int, num_latents: int, backend: str, theta: Tensor, bandwidth: float) -> None:
        super().__init__(tokens, num_latents, backend)
        self._theta, self._bandwidth = theta, bandwidth
        self._within: bool | None = None  # until some tokens were asked
        self._mask: Tensor | None = None
        self._dropped: list[tuple[SparseCodes, slice, slice]] = []
        self.dropped: Dropped | None = None

    def select(self, pre: Tensor, tokens: slice, latents: slice) -> SparseCodes:
        theta = check.theta(self._theta, pre, self.num_latents)[latents]
        floor = theta - self._bandwidth / 2
        if self._within is None:
            self._decide(pre, theta, floor)
        if self._mask is not None:
            self._mask[tokens, latents] = (pre > floor) & (pre <= theta)
        elif self._within:
            self._dropped.append((self._above(torch.where(pre > theta, -torch.inf, pre), floor), tokens, latents))
        else:  # not above the floor: what is negative exceeds the largest number below the negative floor
            limit = torch.nextafter(-floor, torch.full_like(floor, -torch.inf))
            self._dropped.append((self._above(-pre, limit), tokens, latents))
        return self._above(pre, theta)

    def _above(self, pre: Tensor, theta: Tensor) -> SparseCodes:
        values, indices, offsets, _ = ops.threshold(pre, theta, None, None, False, self.backend)
        return SparseCodes(values, indices, offsets, (pre.shape[0],), pre.shape[1])

    def _decide(self, pre: Tensor, theta: Tensor, floor: Tensor) -> None:
        """Costs a GPU one wait more, beside those for the number of entries."""
        asked = pre[:: max(pre.shape[0] // self.TOKENS_ASKED, 1)]
        above_floor, kept = torch.stack([(asked > floor).sum(), (asked > theta).sum()]).cpu().tolist()
        within, below = above_floor - kept, asked.numel() - above_floor
        self._within = within <= below
        entries = min(within, below) * self.tokens // max(len(asked), 1)
        if is_dense("decode_backward_values", entries, self.tokens, pre.shape[1], pre.device.type, pre.dtype):
            self._within, self._mask = True, pre.new_zeros(self.tokens, self.num_latents, dtype=torch.bool)

    def finish(self) -> tuple[SparseCodes, Tensor | None]:
        indices = offsets = None
        if self._mask is None:
            codes, _ = joined(self._dropped, [], self.tokens, self.num_latents)
            indices, offsets = codes.indices, codes.offsets
        self._dropped.clear()
        self.dropped = Dropped(indices, offsets, self._mask, bool(self._within))
        return super().finish()
