"""Which latents have not fired for long: counters on the device, in tokens."""
from __future__ import annotations

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing

from .. import _checks as check


class DeadLatents:
    """Tokens since each latent last fired (value ≠ 0), and a bound on how many are dead that costs no waiting.

    Args:
        d_sae: number of latents.
        dead_after: tokens without firing after which a latent counts as dead (Gao et al. 2024: 10 million).
        read_interval: steps between two reads of the device, which happen only once enough tokens have passed for any
            latent to be dead. The bound holds for all steps between.

    Attributes:
        since_fired: (d_sae,) int64.
        tokens: seen so far, on the host.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> dead = DeadLatents(3, dead_after=10)
        >>> dead.count(torch.tensor([True, False, False]), batch_tokens=10)
        >>> dead.mask
        tensor([False,  True,  True])
    """

    def __init__(self, d_sae: int, *, dead_after: int = 10_000_000, read_interval: int = 100, device=None) -> None:
        self.dead_after = check.integer_k(dead_after, name="dead_after")
        self.read_interval = check.integer_k(read_interval, name="read_interval")
        self.since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.tokens = 0
        self._bound, self._holds_until = 0, self.dead_after - 1  # no counter exceeds `tokens`
        self._captured = False  # replays move the counters and not `tokens`

    @property
    def mask(self) -> Tensor:
        """(d_sae,) bool, True for dead latents."""
        return self.since_fired >= self.dead_after

    def at_most(self, batch_tokens: int) -> int:
        """No more latents than this are dead now: exact on a CPU, else read at most once in ``read_interval`` steps.

        All of them while a CUDA graph is captured, and from then on: the host does not hear of replays, so that it
        would have to ask the device each time. :meth:`load_state_dict` starts anew.
        """
        self._captured |= capturing(self.since_fired)
        if self._captured:
            return self.since_fired.numel()
        if self.tokens <= self._holds_until:
            return self._bound
        # Nobody waits for a CPU tensor: it is read each time.
        ahead = (self.read_interval - 1) * batch_tokens if self.since_fired.is_cuda else 0
        self._bound = int((self.since_fired + ahead >= self.dead_after).sum())
        self._holds_until = self.tokens + ahead
        return self._bound

    def count(self, fired: Tensor, batch_tokens: int, skip: Tensor | None = None) -> None:
        """After a batch: ``fired`` (d_sae,) bool; where ``skip`` () is set, the batch does not count."""
        if skip is None:
            self.since_fired.add_(batch_tokens).masked_fill_(fired, 0)
        else:
            counted = torch.where(fired, 0, self.since_fired + batch_tokens)
            self.since_fired.copy_(torch.where(skip, self.since_fired, counted))
        self.tokens += batch_tokens

    def state_dict(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "since_fired": self.since_fired.clone(), "tokens": self.tokens,
            "bound": self._bound, "holds_until": self._holds_until,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        check.shaped("since_fired", state["since_fired"].to(self.since_fired.device), self.since_fired.shape,
                     self.since_fired, why="one per latent")  # fmt: skip
        self.since_fired.copy_(state["since_fired"])
        self.tokens, self._bound, self._holds_until = state["tokens"], state["bound"], state["holds_until"]
        self._captured = False
