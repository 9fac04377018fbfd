"""A batch in cells: a block of tokens by a block of latents, the same ones on any mesh.

Whatever is summed over tokens or latents is summed in cells of one size, and their sums are added as trees. So it has
the same bits wherever a cell lies. Where the cells' entries begin is read by the host.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sae_kernels._terms import GIVEN, Term, lists_of
from sae_kernels.ops import ops

from ..codes import SparseCodes

ALIGNED = 64  # bytes: libraries may choose another kernel, and so other bits, for what begins elsewhere


def aligned(part: Tensor) -> Tensor:
    """The same numbers at an address as fresh memory has it."""
    return part.clone() if part.data_ptr() % ALIGNED else part


def of_tokens(codes: SparseCodes, blocks: int) -> Iterator[tuple[slice, SparseCodes]]:
    """Each block of tokens: which entries are theirs, and the codes that these are."""
    rows = codes.rows // blocks
    for number, (first, last) in enumerate(itertools.pairwise(codes.offsets[::rows].tolist())):
        offsets = codes.offsets[number * rows : (number + 1) * rows + 1] - first
        yield slice(first, last), replace(
            codes, values=codes.values[first:last], indices=codes.indices[first:last], offsets=offsets,
            batch_shape=(rows,), k=None, required=None, _transposed=[],
        )  # fmt: skip


def of_latents(codes: SparseCodes, latents: slice) -> tuple[Tensor, SparseCodes]:
    """Of the codes, all of whose entries belong to a row, the entries of some latents: their places, and themselves."""
    inside = (codes.indices >= latents.start) & (codes.indices < latents.stop)
    before = torch.cat([codes.offsets.new_zeros(1), inside.cumsum(0)])
    place = inside.nonzero()[:, 0]
    return place, replace(
        codes, values=codes.values[place], indices=codes.indices[place], offsets=before[codes.offsets], _transposed=[]
    )


class Gradients:
    """The gradients of W_dec, W_enc and b_enc that terms of a latent pass add up to, for some latents at a time.

    Args:
        terms: as :class:`~sae_kernels._terms.Term` describes them, of codes that are not dense.
        x: (rows, d_in), what the encoder multiplied.
        decoder: (F, d_out), as gradients are taken with it now; later it may be another.
        blocks: of the rows.
    """

    def __init__(self, terms: Iterable[Term], x: Tensor, decoder: Tensor, blocks: int, backend: str) -> None:
        self._wide = torch.promote_types(decoder.dtype, torch.float32)
        self._terms = [_given(term, decoder, self._wide, backend) for term in terms]
        self._bounds = [term.offsets[:: (len(term.offsets) - 1) // blocks].tolist() for term in self._terms]
        self._x, self._decoder, self._blocks, self._backend = x, decoder, blocks, backend

    def of(self, latents: slice) -> list[Tensor]:
        """(n, d_out), (n, d_in) and (n,), in fp32 or wider: sums over all rows, block by block."""
        own = [_of_latents(term, latents) for term in self._terms]
        total = _tree_sum(self._of_cell(own, latents, number) for number in range(self._blocks))
        return [tensor.contiguous() for tensor in total]

    def _of_cell(self, terms: list[Term], latents: slice, number: int) -> list[Tensor]:
        size = len(self._x) // self._blocks
        rows = slice(number * size, (number + 1) * size)
        cells = [_of_rows(term, rows, slice(*bounds[number : number + 2]))
                 for term, bounds in zip(terms, self._bounds, strict=True)]  # fmt: skip
        return list(ops.latent_gradients(
            aligned(self._x[rows]), self._decoder[latents], None, *lists_of(cells), self._wide, self._backend
        ))  # fmt: skip


def _tree_sum(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """As ``wire.tree_sum`` of a power of two of parts, of which a logarithm are held at a time, and written to."""
    held: list[tuple[int, Sequence[Tensor]]] = []
    for part in parts:
        height = 0
        while held and held[-1][0] == height:
            part, height = [a.add_(b) for a, b in zip(held.pop()[1], part, strict=True)], height + 1
        held.append((height, part))
    ((_, total),) = held
    return list(total)


def _given(term: Term, decoder: Tensor, wide: torch.dtype, backend: str) -> Term:
    """The term with the gradients at its entries, which no longer ask for the decoder."""
    if term.mode == GIVEN:
        return term
    inner = ops.decode_backward_values(
        term.grad, term.values.to(wide), term.indices, term.offsets, decoder, backend
    )
    return term._replace(offered=term.at_entries(inner), mode=GIVEN)


def _of_latents(term: Term, latents: slice) -> Term:
    """What the term adds to some latents."""
    offsets = term.latent_offsets[latents.start : latents.stop + 1]
    first, last = offsets[[0, -1]].tolist()
    return term._replace(
        latent_offsets=offsets - first, latent_rows=term.latent_rows[first:last],
        latent_positions=term.latent_positions[first:last],
    )  # fmt: skip


def _of_rows(term: Term, rows: slice, entries: slice) -> Term:
    """What some rows of the term, whose entries are these, add."""
    inside = (term.latent_rows >= rows.start) & (term.latent_rows < rows.stop)
    before = torch.cat([term.latent_offsets.new_zeros(1), inside.cumsum(0)])
    return Term(
        aligned(term.grad[rows]), term.values[entries], term.offered[entries], term.indices[entries],
        term.offsets[rows.start : rows.stop + 1] - entries.start, before[term.latent_offsets],
        term.latent_rows[inside] - rows.start, term.latent_positions[inside] - entries.start, term.mode,
    )  # fmt: skip
