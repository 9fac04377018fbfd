"""The configuration of a run that begins, in any form; and of one that goes on, with what may still change."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .config import Resolved, TrainConfig
from .config_files import with_settings
from .presets import PRESETS, preset


def configured(config: TrainConfig | Mapping[str, Any] | str | os.PathLike) -> TrainConfig:
    """A configuration in any of the forms in which it may be given."""
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, Mapping):
        return TrainConfig.from_dict(dict(config))
    if isinstance(config, str) and config in PRESETS:
        return preset(config)
    if isinstance(config, (str, os.PathLike)):
        return TrainConfig.from_yaml(config)
    raise TypeError(f"config must be a TrainConfig, a dictionary, a path or the name of a preset, got {config!r:.80}")


# What may change when a run is resumed; training_tokens only before the learning rate decays.
CHANGEABLE = ("logger", "output")


def changed(config: Resolved, settings: Sequence[str], update: int) -> TrainConfig:
    """``config`` with what may still be changed of it.

    Raises:
        ValueError: a setting may not; names it.
    """
    if not settings:
        return config
    new = with_settings(config, settings)
    before, after = config.to_dict(), new.to_dict()
    if before["output"]["output_path"] != after["output"]["output_path"]:
        raise ValueError("output.output_path: a run goes on in its own folder, which may be moved or copied before")
    for section in before.keys() | after.keys():
        if section in CHANGEABLE or before.get(section) == after.get(section):
            continue
        if section == "mesh":
            if config.mesh is None or new.mesh is None:
                raise ValueError(f"mesh: a run that began on a mesh, and no other, goes on over another one, "
                                 f"got {before['mesh']} and {after['mesh']}")  # fmt: skip
            continue
        longer = section == "data" and {**before["data"], "training_tokens": after["data"]["training_tokens"]}
        if longer != after[section]:
            raise ValueError(
                f"{section}: a run that is resumed keeps its {section}; only {', '.join(CHANGEABLE)} and, before the "
                "learning rate decays, data.training_tokens may change"
            )
        begins = min(config.updates, new.updates) - config.optim.lr_decay_steps
        if update > begins:
            raise ValueError(
                f"data.training_tokens: the learning rate decays from update {begins} on and {update} are made: it "
                "may not change any more"
            )
    return new
