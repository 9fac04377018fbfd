"""What a rule has learned, as two files."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replace_files, write_tensors
from ..data._require import require
from .places import Found, by_input
from .rules import PLACES, Learned, Weighed

CONFIG, TENSORS = "activation_sparsity.json", "activation_sparsity.safetensors"
FORMAT = 1
SAMPLES = 1024


def fingerprint(found: Found) -> str:
    """A hash of a thousand numbers of the last matrix, evenly spread, rounded to bfloat16.

    It tells models and their further training apart, and not the dtypes in which one is loaded.
    """
    weight = by_input(found.down).detach()
    count = weight.numel()
    places = torch.arange(min(SAMPLES, count), dtype=torch.int64, device=weight.device) * max(count // SAMPLES, 1)
    numbers: Tensor = weight[places // weight.shape[1], places % weight.shape[1]]
    return hashlib.sha256(numbers.bfloat16().view(torch.int16).cpu().numpy().tobytes()).hexdigest()


def save(rule: Weighed, folder: str | Path) -> None:
    if not rule.layers:
        raise RuntimeError(f"{rule!r} has not been fitted: there is nothing to save")
    require("safetensors")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT, "rule": type(rule).__name__, "sparsity": rule.sparsity, "weigh": rule.weigh,
        "compensate": rule.compensate, "straight_through": rule.straight_through, "at": rule.at, "model": rule.model,
        "layers": {name: {"density": one.density, "fingerprint": one.fingerprint} for name, one in rule.layers.items()},
    }  # fmt: skip
    tensors = {f"{name}.{kind}": t.contiguous().cpu() for name, one in rule.layers.items()
               for kind, t in one.tensors().items()}  # fmt: skip
    replace_files({
        folder / TENSORS: lambda path: write_tensors(path, tensors),
        folder / CONFIG: lambda path: path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8"),
    })


def read(folder: str | Path, rules: dict[str, type[Weighed]]) -> Weighed:
    """See :func:`sae_engine.lm.load`; ``rules`` by name."""
    require("safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} holds no {CONFIG}")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise ValueError(f"it has format {config['format']}, and this version reads up to {FORMAT}")
        options = {name: config[name] for name in ("weigh", "compensate", "straight_through")}
        rule = rules[config["rule"]](config["sparsity"], **options)
        rule.at, rule.model = config["at"], config["model"]
        if rule.at not in PLACES:
            raise ValueError(f"at must be one of {PLACES}, got {rule.at!r}")
        tensors = load_file(folder / TENSORS)
        for name, known in config["layers"].items():
            kinds = {kind: tensors.pop(f"{name}.{kind}", None) for kind in ("scale", "threshold", "mean")}
            rule.layers[name] = Learned(**kinds, density=known["density"], fingerprint=known["fingerprint"])
            missing = [kind for kind, needed in (
                ("threshold", rule.FITS), ("mean", rule.compensate), ("scale", rule.weigh != "")
            ) if needed and kinds[kind] is None]  # fmt: skip
            if missing:
                raise ValueError(f"{TENSORS} lacks {name}.{missing[0]}")
        if tensors:
            raise ValueError(f"{TENSORS} holds {sorted(tensors)[0]!r}, which {CONFIG} does not name")
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    return rule
