"""What a training step does besides where latents are cut over a mesh."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import SparseAutoencoder
from ..distributed.agreement import fingerprint
from ..distributed.shards import Shards
from ..distributed.share import local
from ..losses import Loss


def check_over_shards(losses: Sequence[Loss]) -> None:
    """Raises TypeError for what cannot be where a rank sees the codes of its own latents only."""
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


def of_all_ranks(
    shards: Shards, report: dict[str, Tensor], overflow: Tensor | None, bad: Tensor | None, losses: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """A step's numbers, of which each rank has a summand, and its flags, which one rank sets for all.

    ``losses`` names those whose sum is ``report["loss"]``.
    """
    loss = report["loss"]
    flags = [loss.new_zeros(()) if flag is None else flag.to(loss.dtype) for flag in (overflow, bad)]
    *numbers, overflows, bads = shards.sums([*report.values(), *flags], "report")
    report = dict(zip(report, numbers, strict=True))
    report |= {name: report[name].to(loss.dtype) for name in losses}
    report["loss"] = torch.stack([report[name] for name in losses]).sum()
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
    since_fired, sources = state["dead"]["since_fired"], len(sae.sources)
    if sources > 1:  # a rank's latents are next to one another in each of them
        since_fired = since_fired.view(sources, len(since_fired) // sources)
    dead = {**state["dead"], "since_fired": sae.shards.as_whole(since_fired, since_fired.dim() - 1)}
    return {**state, "optimizer": {**state["optimizer"], "state": moments}, "dead": dead}


def locals_of(state: Any) -> Any:
    """What :func:`as_wholes` was given."""
    if isinstance(state, Tensor):
        return local(state)
    if isinstance(state, Mapping):
        return {key: locals_of(value) for key, value in state.items()}
    return [locals_of(value) for value in state] if isinstance(state, list) else state
