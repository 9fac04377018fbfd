"""The rule that matches the norm of the code with that of the input."""
from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes
from .base import Activation, captured_size, kept_values


class TopAFA(Activation):
    """As many entries of each token as bring the code's norm nearest to the input's. Lee et al. 2025, arXiv:2503.24277.

    Context: ``target_norm`` (*batch_shape,), the norm of the centred input; ``weight_norm`` (F,), the norms of the
    decoder rows. ``capacity`` as in :func:`functional.norm_match`. ``target_scale`` multiplies the target: below 1 it
    keeps fewer entries. The authors have no such factor; it is ours, as is :func:`init_sparse`, which starts sparse.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        TypeError: a call lacks part of the context.

    Example:
        >>> rule, context = TopAFA(), {"target_norm": torch.tensor([5.0]), "weight_norm": torch.ones(3)}
        >>> rule(torch.tensor([[3.0, 1.0, 4.0]]), **context)
        tensor([[3., 0., 4.]])
    """

    context_keys = frozenset({"target_norm", "weight_norm"})
    encoder_bias = False
    selects_over_shards = True
    entry_values = kept_values

    def __init__(self, *, capacity: int | None = None, target_scale: float = 1.0) -> None:
        super().__init__()
        self.capacity = check.capacity_of(capacity)
        self.target_scale = check.positive("target_scale", target_scale)

    def _select(self, pre: Tensor, backend: str, *, target_norm: Tensor, weight_norm: Tensor) -> SparseCodes:
        capacity = captured_size(pre) if self.capacity is None else self.capacity
        if self.target_scale != 1:
            target_norm = target_norm * self.target_scale
        if self.shards is not None:
            return self.shards.norm_match(check.matrix(pre), target_norm, weight_norm, capacity)
        return functional.norm_match(pre, target_norm, weight_norm=weight_norm, capacity=capacity, backend=backend)
