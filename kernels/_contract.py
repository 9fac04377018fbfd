"""What every contract is written with: its definition, fake and gradient. Imports torch only.

An operation lives once in ``torch.library`` under ``sae_engine::``; its last argument names the back end
(``dispatch.py``). ``reference.py`` says what each means.
"""
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .dispatch import dispatch, implement, library, ops
from .operations import OPERATIONS


def define(signature: str, plain: Callable | None = None):
    """Registers ``signature`` (its `str backend` is appended) and returns the decorator for its fake.

    What the operator runs follows from its row in ``operations.py``. What ``torch.func`` sees in its place is the
    reference, or ``plain`` where the sizes of the reference's results follow from data.
    """
    name, arguments = signature.split("(", 1)
    library.define(f"{name}({arguments.replace(') ->', ', str backend) ->', 1)}")
    plain = plain or getattr(reference, name)
    implement(name, functools.partial(dispatch, OPERATIONS[name]), lambda *args: plain(*args[:-1]))
    return torch.library.register_fake(f"sae_engine::{name}", lib=library)


def differentiable(name: str, setup_context, backward) -> None:
    """Registers the gradient of an operation."""
    torch.library.register_autograd(f"sae_engine::{name}", backward, setup_context=setup_context, lib=library)


def not_differentiable(name: str, why: str) -> None:
    """Differentiating the operation raises, where it would otherwise return zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(f"sae_engine::{name} {why}")

    differentiable(name, lambda ctx, inputs, output: None, backward)


def once_differentiable(name: str) -> None:
    """Refuses to differentiate a gradient again."""
    not_differentiable(name, "is itself a gradient and cannot be differentiated again")


def weight_gradient_backward(ctx, outer: Tensor):
    """Gradients of each latent's sum of value * grad[row], from that at the sums, ``outer`` (F, D).

    The sum is what a decoder computes, with the rows of ``grad`` in the place of its weight.
    """
    grad, values, latent_offsets, latent_rows, positions = ctx.saved_tensors
    outer, turned = outer.contiguous(), values[positions]
    latent_rows = latent_rows.clamp(max=max(grad.shape[0] - 1, 0))  # entries of unused capacity belong to no row
    at_grad = at_values = None
    if ctx.needs_input_grad[0]:
        by_row = ops.by_latent(latent_rows, latent_offsets, grad.shape[0], ctx.backend)
        at_grad = ops.decode_backward_weight(outer, turned, *by_row, grad.dtype, ctx.backend)
    if ctx.needs_input_grad[1]:
        inner = ops.decode_backward_values(outer, turned, latent_rows, latent_offsets, grad, ctx.backend)
        at_values = torch.zeros_like(values).index_put((positions,), inner)
    return at_grad, at_values, *(None,) * (len(ctx.needs_input_grad) - 2)


def stored_entries(count: int | None):
    """The number of entries that a data-dependent rule stores: its capacity, or unknown until it has run."""
    return torch.library.get_ctx().new_dynamic_size() if count is None else count


def empty_rows(pre: Tensor, count):
    """Values, indices and offsets of compressed rows of ``pre`` (B, F) with ``count`` entries, for fakes."""
    indices = pre.new_empty(count, dtype=torch.int32)
    return pre.new_empty(count), indices, pre.new_empty(pre.shape[0] + 1, dtype=torch.int64)


def sum_by_latent(entries, by_latent, rows, dtype, backend):
    """(F,) sums of ``entries`` (N,) over each latent's entries, in a fixed order: index_put's order varies."""
    ones = entries.new_ones(rows, 1)
    return ops.decode_backward_weight(ones, entries, *by_latent, dtype, backend)[:, 0]
