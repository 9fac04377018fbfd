"""Whether a run can be trained by the processes that there are, asked before anything is loaded."""
from __future__ import annotations

from collections.abc import Iterator

from ._faults import ConfigError
from .config import SAEConfig, TrainConfig
from .ranks import Ranks

_STEPS, _WIDTH, _LATENTS = 1000, 1024, 4096  # of what is built to look at it, where they are not known yet


def check_mesh(config: TrainConfig, ranks: Ranks) -> None:
    """Nothing, where ``config.mesh`` fits.

    Raises:
        ConfigError: there are other processes than it says, or an autoencoder's latents cannot be cut.
    """
    mesh = config.mesh
    if mesh is None:
        return
    if mesh.processes != ranks.world:
        start = f"torchrun --nproc-per-node={mesh.processes} --no-python sae-engine train …"
        there = "is 1" if ranks.world == 1 else f"are {ranks.world}"
        raise ConfigError([("mesh", f"must be of all processes: latent * data = {mesh.processes}, and there {there}; "
                            f"start them with: {start}")])  # fmt: skip
    if mesh.cuts_latents:
        config = config.expanded()
        steps = _STEPS if config.data.training_tokens == "auto" else config.updates
        faults = [(f"saes.{number}.architecture", what) for number, sae in enumerate(config.saes)
                  for what in _unfit(sae, steps)]  # fmt: skip
        if faults:
            raise ConfigError(faults)


def _unfit(sae: SAEConfig, steps: int) -> Iterator[str]:
    """Why its latents cannot be cut over processes."""
    d_sae = _LATENTS if sae.d_sae is None else sae.d_sae
    try:
        kind = sae.architecture.resolved(_WIDTH, d_sae, sae.normalize_activations)
        rule, losses = kind.build_rule(d_sae, steps), kind.losses(_WIDTH, _WIDTH)
    except ConfigError:  # which is said once widths are known
        return
    if not rule.selects_over_shards:
        yield (f"must be one whose rule selects where latents are cut over processes (mesh.latent): "
               f"{type(rule).__name__} cannot say how (Activation.selects_over_shards)")  # fmt: skip
    for loss in losses:
        if not loss.adds_over_shards:
            yield (f"must be one whose losses are sums over tokens or entries where latents are cut over processes "
                   f"(mesh.latent): {loss!r} does not say that it is one (Loss.adds_over_shards)")  # fmt: skip
