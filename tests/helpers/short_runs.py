"""The settings of a run of seconds on the embedded model, to be varied, and what two runs have in common."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sae_engine.training.run import Run

SAE = {"hook_name": "blocks.1.hook_resid_pre", "architecture": "topk", "k": 8, "d_sae": 128}
SETTINGS: dict[str, Any] = {
    "model": {"model_name": "embedded"},
    "data": {"context_size": 32, "store_batch_size_prompts": 4, "training_tokens": 64 * 24, "shuffle_tokens": 256,
             "shuffle_chunks": 2},
    "saes": [SAE],
    "optim": {"train_batch_size_tokens": 64, "dead_after": 512},
    "eval": {"eval_steps": 12, "eval_tokens": 256},
    "logger": {"logging_steps": 5, "progress": False},
    "output": {"save_steps": 6},
}  # fmt: skip


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings with other values of ``section__field``, or of whole sections."""
    found = {name: dict(part) if isinstance(part, dict) else part for name, part in SETTINGS.items()}
    found["output"]["output_path"] = str(folder)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            found[section] = {**found.get(section, {}), field: value}
        else:
            found[section] = value
    return found


def timeless(run: Run) -> list[dict[str, Any]]:
    """The metrics without what depends on when they were written; NaN equals itself."""
    return [
        {key: "nan" if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()
         if key != "time" and not key.startswith("performance/")}
        for line in run.metrics()
    ]  # fmt: skip
