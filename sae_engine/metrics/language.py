"""What a reconstruction is worth to the language model: next-token loss and divergence of its predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

CHUNK_ELEMENTS = 1 << 24  # of the fp32 temporaries over the vocabulary


class NextTokenLoss:
    """Cross-entropy of next tokens over a stream of contexts, and the divergence from another run's predictions.

    One of these for each run: the clean model, the model with the reconstruction in place, and with zeros in place
    (:func:`sae_engine.data.run_with_replacement` gives the logits). Token losses are computed in fp32 and summed in
    fp64 on the device; nothing waits for it before :meth:`compute`.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was predicted.

    Example:
        >>> loss = NextTokenLoss()
        >>> loss.update(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
        >>> round(loss.compute()["ce"], 4)  # log 4
        1.3863
    """

    def __init__(self) -> None:
        self.predicted = self.positions = self.compared = 0
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, logits: Tensor, input_ids: Tensor, *, clean: Tensor | None = None) -> None:
        """Adds one batch of contexts.

        Args:
            logits: (B, T, vocabulary), any floating dtype. Those of position t predict ``input_ids[:, t + 1]``, so the
                last position's predict nothing.
            input_ids: (B, T) integers.
            clean: the clean model's logits, to add up KL(clean || this run) over all T positions. For all batches or
                for none.
        """
        check.floating("logits", logits, dims=3)
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            kind = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise TypeError(f"input_ids must be a tensor of integers, got {kind}")
        check.shaped("input_ids", input_ids, tuple(logits.shape[:2]), logits, why="one per position of logits")
        if clean is not None:
            check.floating("clean", clean, dims=3)
            check.shaped("clean", clean, tuple(logits.shape), logits, why="that of logits")
        if self.positions and (clean is not None) != bool(self.compared):
            raise ValueError("clean must be given for all batches or for none")
        contexts, length, vocabulary = logits.shape
        if self._sums is None:
            self._sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        # The last position of a context has no next token: cross_entropy leaves -100 out.
        labels = torch.cat([input_ids[:, 1:], input_ids.new_full((contexts, 1), -100)], 1).flatten().long()
        flat = logits.flatten(0, 1)
        rows = max(CHUNK_ELEMENTS // max(vocabulary, 1), 1)
        for start in range(0, len(flat), rows):
            chosen = slice(start, start + rows)
            scores = flat[chosen].float().log_softmax(-1)
            losses = torch.nn.functional.nll_loss(scores, labels[chosen], reduction="none")
            self._sums[0] += losses.double().sum()
            if clean is not None:
                true = clean.flatten(0, 1)[chosen].float().log_softmax(-1)
                # Terms of probability 0 are 0, whatever the other run makes of them.
                self._sums[1] += torch.where(true == -torch.inf, 0.0, true.exp() * (true - scores)).double().sum()
        self.predicted += contexts * max(length - 1, 0)
        self.positions += contexts * length
        self.compared += contexts * length if clean is not None else 0

    def compute(self) -> dict[str, Any]:
        """``ce`` (nats per predicted token), ``predicted``, and ``kl`` (nats per position) where clean logits came.

        Raises:
            RuntimeError: no token was predicted.
        """
        if not self.predicted or self._sums is None:
            raise RuntimeError("nothing was measured: update() has seen no token that is predicted")
        ce, kl = self._sums.tolist()
        result = {"ce": ce / self.predicted, "predicted": self.predicted}
        return {**result, "kl": kl / self.compared} if self.compared else result


def loss_recovered(clean: float, spliced: float, ablated: float) -> float:
    """(ablated - spliced) / (ablated - clean) of cross-entropies: 1 for a perfect reconstruction, 0 for one that is as
    bad as zeros, below 0 for worse. NaN where zeros cost nothing.

    Example:
        >>> loss_recovered(clean=3.0, spliced=3.5, ablated=5.0)
        0.75
    """
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")
