"""The folder that a run leaves: what it was, how it went, and what it trained."""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..autoencoder import SparseAutoencoder
from ..checkpoints.opened import opened
from ..crosscoder import Crosscoder
from .callbacks import resume_command
from .config import TrainConfig
from .trackers import read_metrics

if TYPE_CHECKING:
    from ..latents.publishing import Published

# What is told of an autoencoder at the end.
_TOLD = {"evaluation/fvu": "FVU", "evaluation/l0": "L0", "evaluation/dead": "dead",
         "evaluation/ce_recovered": "CE recovered"}  # fmt: skip
CONFIG, METRICS, SAES = "config.yaml", "metrics.jsonl", "sae"


class Run:
    """A run by its folder, whether it is under way, finished or was cut off.

    Attributes:
        folder: holds ``config.yaml`` (complete: every ``auto`` is a number), ``metrics.jsonl``, ``report.md`` and
            ``report.html``, ``checkpoints/`` and, once it has ended, ``sae/NAME/``.

    Raises:
        FileNotFoundError: the folder holds no run.

    Example:
        >>> Run("runs/nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: folder: 'runs/nowhere' holds no config.yaml: it is not the folder of a run
    """

    def __init__(self, folder: str | os.PathLike, *, _elsewhere: bool = False) -> None:
        self.folder = Path(folder).expanduser()  # or elsewhere, on a disk that this process need not see
        if not _elsewhere and not (self.folder / CONFIG).is_file():
            raise FileNotFoundError(f"folder: {str(folder)!r} holds no {CONFIG}: it is not the folder of a run")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {', '.join(str(sae.name) for sae in self.config.saes)})"

    @property
    def config(self) -> TrainConfig:
        """As it was resolved when the run began."""
        return TrainConfig.from_yaml(self.folder / CONFIG)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, each with its ``step``; one that a kill has cut off is left out."""
        file = self.folder / METRICS
        return read_metrics(file) if file.is_file() else []

    def summary(self) -> str:
        """What a terminal is told when the run has ended: a line for each autoencoder, and where things are."""
        lines, names = self.metrics(), [str(sae.name) for sae in self.config.saes]
        told = []
        for name in names:
            prefix = f"{name}/" if len(names) > 1 else ""
            last = {key: line[prefix + key] for line in lines for key in _TOLD if prefix + key in line}
            numbers = ", ".join(f"{what} {last[key]:.3g}" for key, what in _TOLD.items() if key in last)
            told.append(f"{name}: {numbers}" if numbers else name)
        return "\n".join([*told, f"report: {self.folder / 'report.md'}", f"autoencoders: {self.folder / SAES}"])

    def saes(self) -> dict[str, SparseAutoencoder]:
        """Name → autoencoder, in evaluation mode, for activations as the model has them.

        Raises:
            FileNotFoundError: the run has not ended; its state is in ``checkpoints/``, and resuming ends it.
        """
        found = {}
        for sae in self.config.saes:
            place = self.folder / SAES / str(sae.name)
            if not place.is_dir():
                raise FileNotFoundError(
                    f"{place} is not there yet: the run has not ended; {resume_command(self.folder)}"
                )
            found[str(sae.name)] = opened(place).eval()
        return found

    def push(self, repo_id: str | None = None, **options: Any) -> Published:
        """Publishes the autoencoders as :func:`sae_engine.latents.publishing.push` does, which takes the options.

        Args:
            repo_id: ``owner/repository``; by default ``output.hub_model_id`` of the configuration.

        Raises:
            ValueError: neither is given; or as that function.
            FileNotFoundError: the run has not ended.
        """
        from ..checkpoints.saelens import sparsity_in
        from ..latents.publishing import push
        from ..latents.publishing_sites import push_crosscoder

        repo_id = self.config.output.hub_model_id if repo_id is None else repo_id
        if repo_id is None:
            raise ValueError("repo_id must be given: the run's output.hub_model_id names no repository")
        if any(sae.has_sites for sae in self.config.saes):
            if len(self.config.saes) > 1:
                raise ValueError(f"repo_id: a crosscoder has a repository of its own: push the folders in "
                                 f"{self.folder / SAES} one by one")  # fmt: skip
            (coder,) = self.saes().values()
            assert isinstance(coder, Crosscoder)
            return push_crosscoder(coder, repo_id, **options)
        hooks = {str(sae.name): sae.reads[0] for sae in self.config.saes}
        alone = len(set(hooks.values())) == len(hooks)
        folders = {name: hooks[name] if alone else f"{hooks[name]}/{name}" for name in hooks}
        found = {folders[name]: sparsity_in(self.folder / SAES / name) for name in hooks}
        options.setdefault("sparsity", {name: shares for name, shares in found.items() if shares is not None})
        return push({folders[name]: sae for name, sae in self.saes().items()}, repo_id, **options)

    def report(self) -> list[Path]:
        """Writes ``report.md`` and ``report.html`` anew from what is there."""
        from ..reports.run import write

        return write(self.folder)
