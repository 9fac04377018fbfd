"""A training step as a CUDA graph: what the host does for a step becomes a copy and one launch."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .step import Seen, TrainStep

EAGER_CALLS = 2  # they compile every kernel, and make everything that lives on outside the graph's memory


class _Graph(NamedTuple):
    """What is replayed, and what lies in its memory: the scalars that are returned, and what the step has seen."""

    graph: torch.cuda.CUDAGraph
    report: dict[str, Tensor]
    seen: Seen | None


class CapturedStep:
    """``step(x)`` of a :class:`TrainStep`, from the third batch on as the replay of a CUDA graph.

    Each call is one training step on its batch, with the numbers that the step itself gives. A step launches dozens of
    small operators, which takes the host some milliseconds however small the batch: where the GPU needs less than
    that, this is faster. The graph keeps its own memory: as much as a step needs at its peak.

    Batches of another shape or dtype than the first one's, such as the last of an epoch, run as they come, and so does
    everything while a rule still changes what it does (:attr:`Activation.settled`). With losses that look at dead
    latents there are two graphs: one without them, for as long as no latent can be dead, and one in which all may be.

    Args:
        step: on a GPU, without ``accumulate`` and a mesh. It may be called itself in between, and saved.
        pool: memory that it may share with graphs that are not replayed at the same time
            (``torch.cuda.graph_pool_handle()``); by default its own.

    Raises:
        TypeError: ``step`` is no :class:`TrainStep`.
        ValueError: its autoencoder is not on a GPU or on a mesh, or it accumulates gradients.

    Example:
        >>> step = CapturedStep(TrainStep(sae, lr=1e-4, compute_dtype=torch.bfloat16))  # doctest: +SKIP
        >>> for x in batches:  # doctest: +SKIP
        ...     report = step(x)
    """

    def __init__(self, step: TrainStep, *, pool=None) -> None:
        if not isinstance(step, TrainStep):
            raise TypeError(f"step must be a TrainStep, got {type(step).__name__}")
        device = step.sae.share.b_dec.device
        if device.type != "cuda":
            raise ValueError(f"step must train on a GPU to be captured, got an autoencoder on {device}")
        if step.accumulate != 1:
            raise ValueError(f"step must have accumulate=1 to be captured, got {step.accumulate}")
        if step.shards is not None:
            raise ValueError("step must have no mesh to be captured: processes may not wait inside a graph")
        self.step, self.pool = step, pool
        self._given: dict[str, tuple] | None = None  # shape and dtype of each argument
        self._eager_left = EAGER_CALLS
        self._static: dict[str, Tensor] = {}
        self._graphs: dict[bool, _Graph] = {}  # by whether latents may be dead
        rules = [[loss.rule(step.sae, dead) for dead in (0, step.sae.d_sae)] for loss in step.losses]
        self._asks = any((none is None) != (some is None) for none, some in rules)

    def __repr__(self) -> str:
        return f"CapturedStep({self.step!r}, captured={bool(self._graphs)})"

    def __call__(self, x: Tensor, target: Tensor | None = None, **context: Tensor) -> dict[str, Tensor]:
        """One step on a batch: arguments, result and errors are those of :meth:`TrainStep.__call__`.

        The scalars that are returned, and ``step.seen``, lie in the graph's memory: the next call overwrites them.
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
        tokens = x.shape[:-1].numel()
        may_be_dead = self._asks and step.dead.at_most(tokens) > 0
        if may_be_dead not in self._graphs:
            self._graphs[may_be_dead] = self._captured(arguments, may_be_dead)
        graph, report, seen = self._graphs[may_be_dead]
        for name, t in arguments.items():
            self._static[name].copy_(t)
        step.refresh()
        graph.replay()
        step.seen = seen
        step.replayed(tokens)
        return report

    def _captured(self, arguments: dict[str, Tensor], may_be_dead: bool) -> _Graph:
        """Records a step; nothing of it takes place yet."""
        step, dead = self.step, self.step.dead
        if not self._static:
            self._static = {name: t.detach().clone() for name, t in arguments.items()}
        graph = torch.cuda.CUDAGraph()
        before = step.calls, dead.tokens, step.seen
        dead.assumed = step.sae.d_sae if may_be_dead else 0
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                report = step(**self._static)
            seen = step.seen
        finally:
            step.calls, dead.tokens, step.seen = before
            dead.assumed = None
        self.pool = graph.pool()
        return _Graph(graph, report, seen)
