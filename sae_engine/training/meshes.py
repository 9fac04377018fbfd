"""Whether a run can be trained by the processes that there are, asked before anything is loaded."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ._architecture import Architecture
from ._faults import ConfigError
from .config import MeshConfig, SAEConfig, TrainConfig
from .ranks import Ranks

_STEPS, _WIDTH, _LATENTS = 1000, 1024, 4096  # of what is built to look at it, where they are not known yet


def settled(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """With the mesh of all processes where several have been started and none is named."""
    if config.mesh is not None or ranks.world == 1:
        return config
    return replace(config, mesh=MeshConfig(data=ranks.world))


def check_mesh(config: TrainConfig, ranks: Ranks, *, goes_on: bool) -> None:
    """Nothing, where ``config.mesh`` fits, of a run that begins or goes on.

    Raises:
        ConfigError: there are other processes than it says, or an autoencoder's latents cannot be cut.
    """
    mesh = config.mesh
    if mesh is None:
        if ranks.world > 1:
            raise ConfigError([("mesh", f"must be given where several processes train: the run began without one, and "
                                f"there are {ranks.world}; go on in one, without torchrun")])  # fmt: skip
        return
    if mesh.processes != ranks.world:
        start = f"start them with: torchrun --nproc-per-node={mesh.processes} --no-python sae-engine train …"
        there = "is 1" if ranks.world == 1 else f"are {ranks.world}"
        other = f", or go on over those that there are: --set mesh={ranks.world}" * goes_on
        said = f"must be of all processes: latent * node * data = {mesh.processes}, and there {there}; {start}{other}"
        raise ConfigError([("mesh", said)])
    if faults := _faults(config):
        raise ConfigError(faults)


def _faults(config: TrainConfig) -> list[tuple[str, str]]:
    config = config.expanded()
    steps = _STEPS if config.data.training_tokens == "auto" else config.updates
    return [(f"saes.{number}.architecture", what) for number, sae in enumerate(config.saes)
            for what in _unfit(sae, steps)]  # fmt: skip


def _unfit(sae: SAEConfig, steps: int) -> Iterator[str]:
    """Why its latents cannot be cut over processes."""
    d_sae = _LATENTS if sae.d_sae is None else sae.d_sae
    try:
        kind = sae.architecture.resolved(_WIDTH, d_sae, sae.normalize_activations)
        rule, losses = kind.build_rule(d_sae, steps), kind.losses(_WIDTH, _WIDTH)
    except (TypeError, ValueError):  # which is said where it is made, of the widths that there are
        return
    if type(kind).start is not Architecture.start and not kind.starts_over_shards:
        yield (f"must be one whose start heeds the ranks of a mesh: {kind.tag} does not say that it does "
               "(Architecture.starts_over_shards)")  # fmt: skip
    if not rule.selects_over_shards:
        yield (f"must be one whose rule selects over the processes of a mesh: {type(rule).__name__} cannot say how "
               "(Activation.selects_over_shards)")  # fmt: skip
    for loss in losses:
        if not loss.adds_over_shards:
            yield (f"must be one whose losses are sums over tokens or entries on a mesh: {loss!r} does not say that it "
                   "is one (Loss.adds_over_shards)")  # fmt: skip
