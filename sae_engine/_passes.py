"""What a training step asks of the operators beyond ``functional``: the same operations on raw entries, unchecked."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sae_kernels import densified as dense_way
from sae_kernels._terms import GATED, GIVEN, Term, lists_of
from sae_kernels.ops import ops
from sae_kernels.reference import ordered_keys, relu, without_parallel_part
from sae_kernels.stock import limits
from sae_kernels.stock.dense import rows_of

from .codes import ByLatent, SparseCodes

__all__ = [
    "CHUNK_ELEMENTS", "GATED", "GIVEN", "WIDE_ELEMENTS", "Term", "at_rows", "decode", "decode_error", "densified",
    "entries_of", "fired", "first_of_latents", "is_dense", "largest", "latent_adam",
    "latent_gradients", "latents_in_cache", "sum_by_latent", "sum_by_row", "term_of", "value_gradients",
    "without_parallel_part",
]

NOT_TURNED = (None, None, None)
CHUNK_ELEMENTS, latents_in_cache = limits.CHUNK_ELEMENTS, limits.latents_in_cache  # sizes of temporaries on a CPU
WIDE_ELEMENTS = limits.WIDE_ELEMENTS


@contextmanager
def densified(choice: bool | None) -> Iterator[None]:
    """Within it sums over codes go through GEMMs or gathers as ``choice`` says; None leaves that to their density."""
    token = dense_way.DENSE_CHOICE.set(choice)
    try:
        yield
    finally:
        dense_way.DENSE_CHOICE.reset(token)


def is_dense(operation: str, codes: SparseCodes, *, entries: int | None = None) -> bool:
    """Whether an operation on these codes goes through a GEMM, which needs no turned codes.

    ``entries``: how many there really are, where that is known to be fewer than there is room for.
    """
    entries = codes.values.shape[0] if entries is None else entries
    return dense_way.is_dense(operation, entries, codes.rows, codes.num_latents, codes.device.type)


def entries_of(matrix: Tensor, codes: SparseCodes, backend: str) -> Tensor:
    """(N,) of ``matrix`` (rows, F) at the codes."""
    return ops.gather(matrix, codes.indices, codes.offsets, backend)


def largest(matrix: Tensor, total: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices and offsets of the ``total`` entries of ``matrix`` with the largest relu."""
    return ops.batch_topk(matrix, None, total, backend)


def first_of_latents(values: Tensor, latents: Tensor, budgets: Tensor) -> Tensor:
    """Ascending positions of each latent f's ``budgets[f]`` entries with the largest relu(value), ties to the first.

    Reads the device for their number.
    """
    order = ordered_keys(relu(values)).argsort(descending=True, stable=True)
    order = order[latents[order].argsort(stable=True)]
    latent = latents[order]
    rank = torch.arange(latent.shape[0], device=latent.device) - torch.searchsorted(latent, latent)
    return order[rank < budgets[latent]].sort().values


def decode(codes: SparseCodes, values: Tensor, weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """(rows, d_out) in ``dtype``: the sum of weight rows, ``values`` (N,) standing in for those of the codes."""
    return ops.decode(values, codes.indices, codes.offsets, weight, None, dtype, *NOT_TURNED, backend)


def decode_error(
    codes: SparseCodes, values: Tensor, weight: Tensor, bias: Tensor, target: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(rows, d_out) the same plus ``bias`` minus ``target``, in the target's dtype; its squared norm (rows,)."""
    return ops.decode_error(values, codes.indices, codes.offsets, weight, bias, target, target.dtype, backend)


def value_gradients(grad: Tensor, codes: SparseCodes, values: Tensor, weight: Tensor, backend: str) -> Tensor:
    """(N,) inner products of each entry's row of ``grad`` and of ``weight``, in the dtype of ``values``."""
    return ops.decode_backward_values(grad, values, codes.indices, codes.offsets, weight, backend)


def sum_by_latent(entries: Tensor, codes: SparseCodes, dtype: torch.dtype, backend: str) -> Tensor:
    """(F,) sums of ``entries`` (N,) in a fixed order."""
    ones = entries.new_ones(codes.rows, 1)
    return ops.decode_backward_weight(ones, entries, *codes.by_latent, dtype, backend)[:, 0]


def sum_by_row(entries: Tensor, codes: SparseCodes, backend: str) -> Tensor:
    """(rows,) sums of ``entries`` (N,), in their dtype."""
    ones = entries.new_ones(codes.num_latents, 1)
    return decode(codes, entries, ones, entries.dtype, backend)[:, 0]


def at_rows(vector: Tensor, codes: SparseCodes) -> Tensor:
    """(N,) of a quantity per row, read at the entries; 0 at those that belong to no row."""
    rows = rows_of(codes.offsets, codes.values.shape[0])
    return torch.cat([vector, vector.new_zeros(1)])[rows]


def fired(codes: SparseCodes) -> Tensor:
    """(F,) bool: latents with a value other than 0."""
    place = torch.where(codes.values != 0, codes.indices, codes.num_latents).long()
    return place.new_zeros(codes.num_latents + 1, dtype=torch.bool).index_fill_(0, place, True)[:-1]


def term_of(codes: SparseCodes, values: Tensor, grad: Tensor, offered: Tensor | None, mode: int) -> Term:
    """One output's part in the latent pass; codes that are dense are not turned."""
    if is_dense("decode_backward_weight", codes):
        turned = ByLatent(codes.offsets.new_empty(0), codes.indices.new_empty(0), codes.offsets.new_empty(0))
    else:
        turned = codes.by_latent
    offered = values.new_empty(0) if offered is None else offered
    return Term(
        grad, values, offered, codes.indices, codes.offsets, turned.offsets, turned.rows, turned.positions, mode
    )


def latent_gradients(
    terms: Sequence[Term], x: Tensor, weight: Tensor, along: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_dec (F, d_out), W_enc.T (F, d_in) and b_enc (F,)."""
    return ops.latent_gradients(x, weight, along, *lists_of(list(terms)), dtype, backend)


def latent_adam(
    terms: Sequence[Term], x: Tensor, along: Tensor | None, parameters: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], copies: list[Tensor], *, step: Tensor, lr: Tensor, betas: tuple[float, float],
    eps: float, weight_decay: float, unit_rows: bool, skip: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same gradients, used up by Adam as they come; ``sae_kernels.reference.latent_adam`` says what it does."""
    center, square = ops.latent_adam(
        parameters, exp_avgs, exp_avg_sqs, copies, x, along, *lists_of(list(terms)), step, lr, *betas, eps,
        weight_decay, unit_rows, skip, backend,
    )  # fmt: skip
    # Kernels write through pointers: whoever caches by version has to hear of it.
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *copies])
    return center, square
