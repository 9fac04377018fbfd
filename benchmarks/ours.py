"""Our operations where a public function does more than what is timed, and our yardsticks."""

from __future__ import annotations

import os
from collections.abc import Callable

from inputs import Inputs, total
from stock import Output
from torch import Tensor

import sae_engine as se
from sae_engine import functional
from sae_kernels.ops import ops


def backend_of(tensor: Tensor) -> str:
    return os.environ.get("SAE_BACKEND") or ("triton" if tensor.is_cuda else "torch")


def value_gradient(i: Inputs) -> Callable[[], Output]:
    c, backend = i.codes, backend_of(i.grad)
    return lambda: ops.decode_backward_values(i.grad, c.values, c.indices, c.offsets, i.weight, backend)


def error(i: Inputs) -> Callable[[], Output]:
    """Residual and squared norms, with the gradient of the output for a target."""
    c, backend = i.codes, backend_of(i.weight)
    target, dtype = i.grad, i.weight.dtype
    return lambda: ops.decode_error(c.values, c.indices, c.offsets, i.weight, i.bias, target, dtype, backend)


def weight_gradient(i: Inputs) -> Callable[[], Output]:
    """Transposing the codes is part of it: ``embedding_bag``'s backward sorts too."""
    c, backend = i.codes, backend_of(i.grad)

    def run() -> Tensor:
        transposed = ops.by_latent(c.indices, c.offsets, c.num_latents, backend)
        return ops.decode_backward_weight(i.grad, c.values, *transposed, i.weight.dtype, backend)

    return run


def encoded(i: Inputs) -> Callable[[], Output]:
    """Codes and pre-activations."""
    select = se.TopK(i.k)
    return lambda: functional.encode_with(i.x, i.weight, i.bias, select=select, keep_pre=True)


def group_maxima(i: Inputs) -> Callable[[], Output]:
    """The first pass of batch top-k by itself: one read of the matrix, from which everything else follows."""
    from sae_kernels.device import _groups, _launch, _tuning  # device code

    grouping = _tuning.batch_groups(*i.pre.shape, total(i))
    if grouping is None:
        raise RuntimeError(f"batch_topk takes no group maxima at {tuple(i.pre.shape)}, k = {i.k}")
    i.group_size = grouping.size
    maxima = _groups.plan_maxima(_launch.layout(i.pre), None, grouping, magnitude=False, relu=True, numbered=True)
    return lambda: maxima.of(i.pre, None)
