"""A run as its folder tells it: ``config.yaml`` and ``metrics.jsonl``, and nothing else."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..training.config_files import read_yaml
from ..training.sae_config import SAEConfig
from ..training.trackers import read_metrics, without_secrets

# What an evaluation is called, and the number of training batches that stands in for it before the first.
_FINAL = {"fvu": ("evaluation/fvu", "metrics/explained_variance"), "l0": ("evaluation/l0", "metrics/l0"),
          "dead": ("evaluation/dead", None), "recovered": ("evaluation/ce_recovered", None)}  # fmt: skip

Curve = tuple[list[float], list[float]]  # tokens, values


@dataclass(frozen=True)
class Trained:
    """One autoencoder of a run. ``numbers``: fvu, l0, dead (share), recovered; NaN where they are not known."""

    run: str
    name: str
    site: str
    architecture: str
    settings: str
    d_sae: int | None
    is_evaluated: bool
    numbers: dict[str, float]

    @property
    def series(self) -> tuple[str, str, int | None]:
        """Those that differ in their sparsity alone: a frontier joins them."""
        return self.site, self.architecture, self.d_sae


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run; ``lines`` are those of ``metrics.jsonl``."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @cached_property
    def names(self) -> list[str]:
        return [str(entry.get("name") or f"sae-{number}") for number, entry in enumerate(self.config["saes"])]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def tokens(self) -> list[float]:
        """Trained on by each line."""
        return [float(line.get("tokens", line["step"] * self._update)) for line in self.lines]

    @property
    def total_tokens(self) -> int | None:
        """Of the whole run: whole updates."""
        wanted = self.section("data").get("training_tokens")
        return wanted // self._update * self._update if isinstance(wanted, int) else None

    @property
    def _update(self) -> int:
        optim = self.section("optim")
        return optim.get("train_batch_size_tokens", 4096) * optim.get("gradient_accumulation_steps", 1)

    @property
    def is_finished(self) -> bool:
        return bool(self.tokens) and self.total_tokens is not None and self.tokens[-1] >= self.total_tokens

    @cached_property
    def columns(self) -> dict[str, Curve]:
        """Every number that any line has, by its key, in the order in which they were first written."""
        found: dict[str, Curve] = {}
        for tokens, line in zip(self.tokens, self.lines, strict=True):
            for key, value in line.items():
                if key not in ("step", "tokens", "time"):
                    xs, ys = found.setdefault(key, ([], []))
                    xs.append(tokens)
                    ys.append(float(value))
        return found

    def curve(self, key: str, name: str | None = None) -> Curve:
        """Values of a key of the run, or of an autoencoder, at the tokens of their lines."""
        return self.columns.get(self._prefix(name) + key, ([], []))

    def last(self, key: str, name: str | None = None) -> float:
        """The last value of a key; NaN where there is none."""
        return (self.curve(key, name)[1] or [math.nan])[-1]

    def keys(self, prefix: str, name: str | None = None) -> list[str]:
        """Keys that begin with ``prefix``, without the autoencoder's name."""
        before = self._prefix(name)
        return [key.removeprefix(before) for key in self.columns if key.startswith(before + prefix)]

    def _prefix(self, name: str | None) -> str:
        """What stands before the keys of an autoencoder; before those of a run's only one, its name need not."""
        if name is None or (len(self.names) == 1 and not self._is_prefixed):
            return ""
        return f"{name}/"

    @cached_property
    def _is_prefixed(self) -> bool:
        return any(key.startswith(f"{self.names[0]}/") for key in self.columns)

    @cached_property
    def trained(self) -> list[Trained]:
        return [self._trained(entry, name) for entry, name in zip(self.config["saes"], self.names, strict=True)]

    def _trained(self, entry: dict[str, Any], name: str) -> Trained:
        is_evaluated = bool(self.curve("evaluation/fvu", name)[1])
        numbers = {}
        for short, (evaluated, training) in _FINAL.items():
            value = self.last(evaluated if is_evaluated or training is None else training, name)
            numbers[short] = 1 - value if short == "fvu" and not is_evaluated else value
        site = _places(entry.get("hook_name", "?"))
        if entry.get("hook_name_out"):
            site += f" → {_places(entry['hook_name_out'])}"
        if isinstance(entry.get("hook_name"), list):
            site += f", {entry.get('wiring')}"
        shared = {field.name for field in fields(SAEConfig)}  # the others are the architecture's
        settings = ", ".join(
            f"{key} {_written(value)}" for key, value in entry.items()
            if key not in shared and value is not None
        )  # fmt: skip
        kind, d_sae = str(entry.get("architecture", "?")), entry.get("d_sae")
        return Trained(self.name, name, site, kind, settings, d_sae, is_evaluated, numbers)


def read_run(folder: str | Path) -> RunRecord:
    """The record of a run folder, of one that is still written to as well.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no run folder, or what is in it is damaged; names the file.
        ImportError: PyYAML is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}")
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no run folder: it has no {' and no '.join(missing)}")
    path = folder / "config.yaml"
    try:
        config = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text, {error}") from None
    saes = config.get("saes") if isinstance(config, dict) else None
    if not isinstance(saes, list) or not saes or not all(isinstance(entry, dict) for entry in saes):
        raise ValueError(f"{path}: no configuration of a run: 'saes' must be a list of autoencoders")
    return RunRecord(folder, without_secrets(config), read_metrics(folder / "metrics.jsonl"))


def _places(said: Any) -> str:
    """A place, or the first and the last of a crosscoder's."""
    if not isinstance(said, list):
        return str(said)
    return f"{said[0]} … {said[-1]}" if len(said) > 1 else str(said[0])


def distinct(names: Sequence[str]) -> list[str]:
    """What tells names apart: the words in which they differ, or where they are not alike, all but their beginning."""
    words = [re.findall(r"[^-_./ :,]+", name) for name in names]
    if len(set(names)) < 2:
        return list(names)
    if len({len(found) for found in words}) == 1:
        differing = [len(set(column)) > 1 for column in zip(*words, strict=True)]
        short = [" ".join(itertools.compress(found, differing)) for found in words]
        if len(set(short)) == len(set(names)):
            return short
    same = next((n for n, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1), 0)
    same = max((n + 1 for n in range(same) if names[0][n] in "-_./ :,"), default=0)
    return [name[same:] or name for name in names]


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
