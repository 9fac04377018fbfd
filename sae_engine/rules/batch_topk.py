"""Rules of one budget for the whole batch, and the threshold that they leave behind."""
from __future__ import annotations

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing, transforming

from .. import _checks as check
from .. import functional
from .._running import Running, RunningBatch, RunningThreshold
from ..codes import SparseCodes
from .base import Activation, above, apply_but, captured_size, kept_values


class BatchTopK(Activation):
    """``int(k * tokens)`` entries of the batch in training, a learned threshold afterwards.

    In ``.train()`` each forward under grad moves ``threshold`` towards its smallest positive kept value: the first
    sets it, later ones move it by ``threshold_lr``. ``.eval()`` keeps ``pre > threshold``; before anything was
    learned that raises RuntimeError. The threshold is saved with the module, -1 while unset, and stays float64.
    Under activation checkpointing use ``use_reentrant=False``: the reentrant kind runs its forward without grad, which
    learns nothing.

    Args:
        k: average entries per token, int or float.
        threshold_lr: weight of the newest batch in the running mean, which lags about ``1 / threshold_lr`` forwards
            behind a cut that moves while the autoencoder learns. :func:`calibrate_threshold` finds it anew.
        threshold_start: training forwards at the beginning from which the threshold learns nothing.
        initial_threshold: where the mean starts; None: at the first batch's value, and unset until then.
        device: of the threshold; an autoencoder takes its rule along to its own.

    SAELens' convention is ``threshold_lr=0.01, initial_threshold=0.0``; dictionary_learning's is ``threshold_lr=0.001,
    threshold_start=1001`` (it learns once its step, counted from 0, exceeds 1000). After a few hundred forwards
    these means still hold much of the first batches, and eval keeps a quarter fewer entries than k; hence our default.
    With any of them a batch that keeps nothing positive moves nothing.

    Bussmann et al. 2024, arXiv:2412.06410.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: in eval, where no threshold was learned yet.

    Example:
        >>> pre = torch.tensor([[0.5, 2.0, -3.0, 1.0], [0.0, 4.0, 3.0, 1.0]])
        >>> rule = BatchTopK(1)
        >>> rule(pre)
        tensor([[0., 0., 0., 0.],
                [0., 4., 3., 0.]])
        >>> rule.eval()(torch.tensor([[5.0, 1.0, 3.5, 0.0]])), rule.threshold.item()
        (tensor([[5.0000, 0.0000, 3.5000, 0.0000]]), 3.0)
    """

    threshold: Tensor
    forwards: Tensor
    scope = "batch"
    selects_over_shards = True
    entry_values = kept_values
    _exact: tuple[str, ...] = ("threshold",)  # buffers that no cast of the module touches

    def __init__(
        self, k: float, *, threshold_lr: float = 0.1, threshold_start: int = 0, initial_threshold: float | None = None,
        device=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k = check.number_k(k)
        self.threshold_lr = check.positive("threshold_lr", threshold_lr)
        if self.threshold_lr > 1:
            raise ValueError(f"threshold_lr must satisfy 0 < threshold_lr <= 1, got {threshold_lr}")
        self.threshold_start = check.count("threshold_start", threshold_start)
        if initial_threshold is not None:
            initial_threshold = check.from_zero("initial_threshold", initial_threshold)
        self.initial_threshold = initial_threshold
        first = -1.0 if initial_threshold is None else float(initial_threshold)
        device = check.device_or_default(device)
        self.register_buffer("threshold", torch.full((), first, dtype=torch.float64, device=device))
        if threshold_start:
            self._count_forwards()
        self._seen: tuple[int, int] | None = None  # the threshold last read: eval waits for the device once

    def _count_forwards(self) -> None:
        self.register_buffer("forwards", torch.zeros_like(self.threshold))
        self._exact = (*self._exact, "forwards")

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        if self.training:
            return functional.batch_topk(pre, self.k, backend=backend)
        self._require_threshold()
        return functional.threshold(pre, self.threshold, capacity=captured_size(pre), backend=backend)

    def total(self, tokens: int) -> int:
        """Entries kept of a training batch."""
        return int(self.k * tokens)

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> Running | None:
        if not self.training:
            return self._running_threshold(tokens, num_latents, backend, self.threshold)
        check.number_k(self.k, num_latents if self.shards is None else self.shards.num_latents)
        total = self.total(tokens if self.shards is None else self.among * self.shards.tokens)
        return RunningBatch(tokens, num_latents, backend, total, self.shards, self.among)

    def _running_threshold(self, tokens: int, num_latents: int, backend: str, theta: Tensor) -> RunningThreshold:
        self._require_threshold()
        return RunningThreshold(tokens, num_latents, backend, theta, capacity=captured_size)

    def _dense(self, pre: Tensor) -> Tensor:
        if self.training:
            return super()._dense(pre)
        self._require_threshold()
        return above(pre, self.threshold)

    def _learns(self) -> bool:
        """Whether this forward teaches the threshold; inside ``torch.func`` none does: nothing is written."""
        return self.training and torch.is_grad_enabled() and not transforming()

    def update(self, codes: SparseCodes) -> None:
        if not self._learns():
            return
        with torch.no_grad():
            teaches = None
            if "forwards" in self._exact:
                functional.move_threshold(self.forwards, self.forwards + 1, 1.0)
                teaches = self.forwards > self.threshold_start
            self.move_thresholds(codes, self.threshold_lr, teaches)

    def move_thresholds(self, codes: SparseCodes, rate: float, teaches: Tensor | None = None) -> None:
        """Moves what is learned from a batch by ``rate`` towards what cut this one, unless ``teaches`` () is False."""
        values = codes.values.detach().double()
        smallest = torch.where(values > 0, values, torch.inf)
        smallest = smallest.min() if smallest.shape[0] else self.threshold.new_full((), torch.inf)
        if self.shards is not None:
            smallest = self.shards.everyone.least(smallest, "threshold")
        if teaches is not None:
            smallest = torch.where(teaches, smallest, torch.inf)
        functional.move_threshold(self.threshold, smallest, rate)

    def _require_threshold(self) -> None:
        message = "threshold is unset: train first, load a trained module, or call .train() for the batch rule"
        if torch.compiler.is_compiling():
            torch._assert_async(self.threshold >= 0, message)
            return
        seen = None if self.threshold.is_inference() else (id(self.threshold), self.threshold._version)
        if seen is None or seen != self._seen:
            if capturing(self.threshold):  # where the host cannot ask: the replay does
                torch._assert_async(self.threshold >= 0, message)
                return
            if not bool(self.threshold >= 0):
                raise RuntimeError(message)
            self._seen = seen

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._seen = None  # a new tensor may have the old one's identity and version
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        return apply_but(self._exact, self, super()._apply, fn, recurse)


class MutualChoice(BatchTopK):
    """Token-feature matches chosen under one budget for the batch: the selection rule of :class:`BatchTopK`.

    Ayonrinde 2024, arXiv:2411.02124.

    Raises:
        As :class:`BatchTopK`.

    Example:
        >>> MutualChoice(1).select(torch.tensor([[1.0, 2.0], [0.0, -1.0]])).l0
        tensor([2, 0])
    """
