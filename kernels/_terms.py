"""What the latent pass sums over: the decoder's outputs of one step, each with its codes and its gradient.

A training step decodes more than once: the main codes, an auxiliary selection, a wider k. Operators take lists, so a
term travels as the i-th element of nine of them.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# How the gradient at a term's pre-activations follows from that of its values.
GATED, GIVEN = 0, 1

SCHEMA = (
    "Tensor[] grads, Tensor[] values, Tensor[] offered, Tensor[] indices, Tensor[] offsets,"
    " Tensor[] latent_offsets, Tensor[] latent_rows, Tensor[] latent_positions, int[] modes"
)
NUMBER_OF_LISTS = 9


class Term(NamedTuple):
    """One output ``decode(codes, weight)`` of a step.

    Entry n, of latent f in row b, has the value gradient ``<grad[b], weight[f]> + offered[n]`` (``offered`` may be
    empty). At the pre-activation that becomes, with GATED, the same where ``values[n]`` is not 0, else 0. With GIVEN it
    is ``offered[n]`` itself.
    """

    grad: Tensor  # (B, D_out), of the output
    values: Tensor  # (N,), what the decoder multiplied
    offered: Tensor  # (N,) or (0,)
    indices: Tensor  # (N,) int32
    offsets: Tensor  # (B + 1,) int64
    latent_offsets: Tensor  # (F + 1,) int64; these three are empty for dense codes: GEMMs need no such index
    latent_rows: Tensor  # (N,) int32
    latent_positions: Tensor  # (N,) int64
    mode: int

    @property
    def is_dense(self) -> bool:
        return self.latent_offsets.numel() == 0

    def at_entries(self, inner: Tensor) -> Tensor:
        """The gradient at the pre-activations (N,) from the inner products ``<grad[b], weight[f]>`` (N,)."""
        if self.mode == GIVEN:
            return self.offered
        if self.offered.numel():
            inner = inner + self.offered
        return torch.where(self.values != 0, inner, 0.0)


def terms_of(lists: Sequence) -> list[Term]:
    """The terms whose elements the operator received as lists; the arrays of their codes without strides."""
    packed = [[t.contiguous() if isinstance(t, Tensor) and t.dim() == 1 else t for t in elements] for elements in lists]
    return [Term(*elements) for elements in zip(*packed, strict=True)]


def lists_of(terms: list[Term]) -> tuple[list, ...]:
    """The terms as an operator's arguments."""
    return tuple(list(elements) for elements in zip(*terms, strict=True)) or ([],) * NUMBER_OF_LISTS
