"""What a training step does besides where latents are cut over a mesh."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_kernels._terms import GIVEN, Term, lists_of, terms_of
from sae_kernels.ops import ops

from .. import _checks as check
from ..autoencoder import SparseAutoencoder
from ..distributed.agreement import fingerprint
from ..distributed.shards import Shards
from ..distributed.share import local
from ..losses import AuxK, AuxZipf, Loss, MultiTopK, Reconstruction
from ..losses.base import NestedReconstruction

if TYPE_CHECKING:
    from .backward import SourceBackward


def check_over_shards(losses: Sequence[Loss], reduce: object) -> None:
    """Raises TypeError for what cannot be where a rank sees the codes of its own latents only."""
    if reduce is not None:
        raise TypeError(f"reduce must be None with a mesh, whose ranks train on one batch together, got {reduce!r}")
    for loss in losses:
        if not loss.adds_over_shards:
            raise TypeError(
                f"losses must hold sums over tokens or over entries where latents are cut over a mesh: {loss!r} does "
                "not say that it is one (Loss.adds_over_shards)"
            )


def agree_on_options(sae: SparseAutoencoder, losses: Sequence[Loss], options: dict[str, Any]) -> None:
    """Raises RuntimeError where a rank was given other options; names them."""
    assert sae.shards is not None
    sae.shards.agreement.agree(**fingerprint(sae, losses=list(map(repr, losses)), **options))


def check_blocks(sae: SparseAutoencoder, losses: Sequence[Loss], blocks: int, options: dict[str, Any]) -> int:
    """The pieces of latents and tokens on each rank.

    Raises:
        ValueError: ``blocks`` cannot be, with this mesh, these latents, this rule, these losses or options.
    """
    blocks = check.integer_k(blocks, name="blocks")
    size = 0 if sae.shards is None else sae.shards.size
    if sae.shards is None:
        raise ValueError(f"blocks must be None without a mesh, got {blocks}")
    if sae.shards.groups > 1:
        raise ValueError(f"blocks must be None on a mesh with the dimension 'data', got {blocks}: each of its groups "
                         "sums over its own tokens")  # fmt: skip
    if blocks & (blocks - 1) or size & (size - 1) or blocks % size or sae.d_sae % blocks:
        raise ValueError(f"blocks must be a power of two that divides d_sae = {sae.d_sae} and that the number of "
                         f"ranks, a power of two as well, divides; got blocks={blocks} over {size} ranks")  # fmt: skip
    rule = sae.activation
    if rule.entry_values is None or list(rule.learned_parameters()) or sae.W_skip is not None:
        raise ValueError(f"blocks must be None with a skip connection and with rules that have parameters or a dense "
                         f"gradient: their sums are not made by blocks, got blocks={blocks} with {rule!r}")  # fmt: skip
    for loss in losses:
        if not isinstance(loss, (Reconstruction, NestedReconstruction, AuxK, MultiTopK)) or isinstance(loss, AuxZipf):
            raise ValueError(f"blocks must be None with {loss!r}, which is not a sum over tokens, got {blocks}")
    for name, value in options.items():
        if value:
            raise ValueError(f"blocks must be None with {name}={value!r}, got {blocks}")
    return blocks // size


def by_pieces(
    mine: SourceBackward, tensors: tuple[list[Tensor], ...], decoder: Tensor, pieces: int, backend: str
) -> Iterator[tuple]:
    """The arguments of the latent pass, piece by piece of the latents. The host reads where the pieces' entries begin.

    Args:
        tensors: parameters, both moments and copies, each by latent.
        decoder: what gradients are taken with.
    """
    wide = torch.promote_types(decoder.dtype, torch.float32)
    terms = [_given(term, decoder, wide, backend) for term in terms_of(mine.terms)]
    size = decoder.shape[0] // pieces
    for start in range(0, decoder.shape[0], size):
        latents = slice(start, start + size)
        along = None if mine.along is None else mine.along[latents]
        parts = [[tensor[latents] for tensor in of_kind] for of_kind in tensors]
        yield lists_of([_cut(term, latents) for term in terms]), mine.x, along, *parts


def _given(term: Term, decoder: Tensor, wide: torch.dtype, backend: str) -> Term:
    """The term with the gradients at its entries, which no longer ask for the decoder."""
    if term.mode == GIVEN:
        return term
    inner = ops.decode_backward_values(
        term.grad, term.values.to(wide), term.indices, term.offsets, decoder, backend
    )
    return term._replace(offered=term.at_entries(inner), mode=GIVEN)


def _cut(term: Term, latents: slice) -> Term:
    """What the term adds to some latents."""
    offsets = term.latent_offsets[latents.start : latents.stop + 1]
    first, last = offsets[[0, -1]].tolist()
    return term._replace(
        latent_offsets=offsets - first, latent_rows=term.latent_rows[first:last],
        latent_positions=term.latent_positions[first:last],
    )  # fmt: skip


def of_all_ranks(
    shards: Shards, report: dict[str, Tensor], overflow: Tensor | None, bad: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """A step's numbers, of which each rank has a summand, and its flags, which one rank sets for all."""
    loss = report["loss"]
    flags = [loss.new_zeros(()) if flag is None else flag.to(loss.dtype) for flag in (overflow, bad)]
    *numbers, overflows, bads = shards.sums([*report.values(), *flags], "report")
    report = dict(zip(report, numbers, strict=True))
    is_bad = (bads > 0) | ~report["loss"].isfinite()
    if is_bad.is_cpu:  # nobody waits for it
        return report, None if overflow is None else overflows > 0, is_bad if bool(is_bad) else None
    return report, None if overflow is None else overflows > 0, is_bad


def as_wholes(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A step's state, of my latents, as that of all: DTensors over the same memory.

    Of moments each rank has those of the latents that it updates.
    """
    assert sae.shards is not None
    whole, names = dict(sae.named_parameters()), {id(p): name for name, p in sae.share.named_parameters()}
    moments = {}
    for number, p in enumerate(optimizer.param_groups[0]["params"]):
        placements = getattr(whole[names[id(p)]], "placements", ())
        dim = next((placement.dim for placement in placements if placement.is_shard()), None)
        moments[number] = {name: sae.shards.as_whole(t, dim, updated=True) if t.dim() else t
                           for name, t in state["optimizer"]["state"][number].items()}  # fmt: skip
    dead = {**state["dead"], "since_fired": sae.shards.as_whole(state["dead"]["since_fired"], 0)}
    return {**state, "optimizer": {**state["optimizer"], "state": moments}, "dead": dead}


def locals_of(state: Any) -> Any:
    """What :func:`as_wholes` was given."""
    if isinstance(state, Tensor):
        return local(state)
    if isinstance(state, Mapping):
        return {key: locals_of(value) for key, value in state.items()}
    return [locals_of(value) for value in state] if isinstance(state, list) else state
