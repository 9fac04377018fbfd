"""What operations cannot avoid: bytes and floating-point operations, from their arguments. Imports torch only."""
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._terms import NUMBER_OF_LISTS, terms_of


class Traffic(NamedTuple):
    """What an operation cannot avoid.

    ``bytes``: every input element that can influence the result once, every element of the result once. What an
    implementation moves beyond them (temporaries, second passes) shows as a lower share of the machine's bandwidth.
    ``flops``: floating-point additions and multiplications, two per multiply-add; comparisons, conversions and integer
    work count nothing, so pure selections have 0.
    """

    bytes: int
    flops: int

    def __add__(self, other):  # one operation after the other, the result between them counted as both say
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)


def nbytes(*tensors: Any) -> int:
    """Bytes of all tensors in ``tensors``, lists and tuples of them included."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tensors) if isinstance(t, Tensor))


def code_bytes(values: Tensor, rows: int) -> int:
    """Bytes of compressed rows: values, int32 indices and int64 offsets.

    Transposed codes count the same: each entry then has a row where it had a latent.
    """
    return values.numel() * (values.element_size() + 4) + (rows + 1) * 8


def named_bytes(weight: Tensor, *indices: Tensor) -> int:
    """Bytes of the rows of ``weight`` that codes name; of as many as can be on the meta device, which has no values."""
    named = torch.cat(indices)
    rows = min(named.numel(), weight.shape[0]) if named.is_meta else int(named.unique().numel())
    return rows * weight.shape[1] * weight.element_size()


def _pass_traffic(x: Tensor, weight: Tensor | None, lists: tuple) -> Traffic:
    """What both forms of the latent pass read, ``weight`` where given, and their sums. Every entry counts as gated,
    with nothing offered."""
    terms = terms_of(lists)
    read = nbytes(x) + sum(code_bytes(t.values, x.shape[0]) + nbytes(t.grad) for t in terms)
    flops = sum(t.values.numel() * (4 * t.grad.shape[1] + 2 * x.shape[1] + 1) for t in terms)
    return Traffic(read + (0 if weight is None else named_bytes(weight, *(t.indices for t in terms))), flops)


def gradient_traffic(x: Tensor, weight: Tensor, along: Tensor | None, *lists_dtype: Any) -> Traffic:
    return _pass_traffic(x, weight, lists_dtype[:NUMBER_OF_LISTS]) + Traffic(nbytes(along), 0)


def adam_traffic(parameters, exp_avgs, exp_avg_sqs, copies, x, along, *rest) -> Traffic:
    """Parameters and moments are read and written, copies written; without copies the gradients use the weights.

    Flops of a parameter: decay 2, moments 7, root and quotient 6, norm 2; d(center) 2 of an encoder's parameter;
    projection 6 and scaling 3 of a decoder's.
    """
    lists, unit_rows = rest[:NUMBER_OF_LISTS], rest[NUMBER_OF_LISTS + 6]
    weight, encoder = parameters[:2]
    sums = _pass_traffic(x, copies[0] if copies else None, lists)  # without copies, parameters that are read anyway
    numbers = sum(p.numel() for p in parameters)
    flops = 17 * numbers + 2 * encoder.numel() + (9 * weight.numel() if unit_rows else 0)
    return sums + Traffic(2 * nbytes(parameters, exp_avgs, exp_avg_sqs) + nbytes(copies, along), flops)
