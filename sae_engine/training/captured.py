"""A training step as a CUDA graph: what the host does for a step becomes a copy and one launch."""
from __future__ import annotations

import torch
from torch import Tensor

from .step import TrainStep

EAGER_CALLS = 2  # they compile every kernel, and make everything that lives on outside the graph's memory


class CapturedStep:
    """``step(x)`` of a :class:`TrainStep`, from the third batch on as the replay of a CUDA graph.

    Each call is one training step on its batch, with the numbers that the step itself gives. A step launches dozens of
    small operators, which takes the host a millisecond or two however small the batch: where the GPU needs less than
    that, this is faster. The graph keeps its own memory: as much as a step needs at its peak.

    Batches of another shape or dtype than the first one's, such as the last of an epoch, run as they come, and so does
    everything while a rule still changes what it does (:attr:`Activation.settled`). Auxiliary selections take place
    from the start, also where no latent can be dead yet.

    Args:
        step: on a GPU, without ``accumulate`` and ``reduce``. It may be called itself in between, and saved.

    Raises:
        TypeError: ``step`` is no :class:`TrainStep`.
        ValueError: its autoencoder is not on a GPU, or it accumulates or reduces gradients.

    Example:
        >>> step = CapturedStep(TrainStep(sae, lr=1e-4, compute_dtype=torch.bfloat16))  # doctest: +SKIP
        >>> for x in batches:  # doctest: +SKIP
        ...     report = step(x)
    """

    def __init__(self, step: TrainStep) -> None:
        if not isinstance(step, TrainStep):
            raise TypeError(f"step must be a TrainStep, got {type(step).__name__}")
        device = step.sae.share.b_dec.device
        if device.type != "cuda":
            raise ValueError(f"step must train on a GPU to be captured, got an autoencoder on {device}")
        if step.accumulate != 1:
            raise ValueError(f"step must have accumulate=1 to be captured, got {step.accumulate}")
        if step.has_reduce:
            raise ValueError("step must have reduce=None to be captured: processes may not wait inside a graph")
        self.step = step
        self._given: dict[str, tuple] | None = None  # shape and dtype of each argument
        self._eager_left = EAGER_CALLS
        self._static: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._report: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"CapturedStep({self.step!r}, captured={self._graph is not None})"

    def __call__(self, x: Tensor, target: Tensor | None = None, **context: Tensor) -> dict[str, Tensor]:
        """One step on a batch: arguments, result and errors are those of :meth:`TrainStep.__call__`.

        The scalars that are returned lie in the graph's memory: the next call overwrites them.
        """
        step = self.step
        arguments = {"x": x, **({} if target is None else {"target": target}), **context}
        given = {name: (t.shape, t.dtype) for name, t in arguments.items()}
        if not step.sae.activation.settled or (self._given is not None and self._given != given):
            return step(**arguments)
        if self._eager_left:
            report = step.warm_up(**arguments)
            self._given, self._eager_left = given, self._eager_left - 1
            return report
        if self._graph is None:
            self._capture(arguments)
        assert self._graph is not None
        for name, t in arguments.items():
            self._static[name].copy_(t)
        step.refresh()
        self._graph.replay()
        step.replayed()
        return self._report

    def _capture(self, arguments: dict[str, Tensor]) -> None:
        """Records a step; nothing of it takes place yet."""
        self._static = {name: t.detach().clone() for name, t in arguments.items()}
        graph = torch.cuda.CUDAGraph()
        calls = self.step.calls
        try:
            with torch.cuda.graph(graph):
                self._report = self.step(**self._static)
        finally:
            self.step.calls = calls
        self._graph = graph
