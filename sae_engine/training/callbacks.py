"""What a run tells others: its callbacks, and how it ends when it is asked to."""
from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """What a user's own code may do during a run; each method does nothing unless it is overridden.

    Whatever draws random numbers of torch's in them is resumed exactly too. Of several processes each has callbacks of
    its own; where latents are not cut over them, the first one alone hears of evaluations and checkpoints.

    Example:
        >>> class Announce(Callback):
        ...     def on_log(self, trainer, metrics):
        ...         print(trainer.update, metrics["metrics/l0"])
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first update, of a resumed run too."""

    def on_update(self, trainer: Trainer) -> None:
        """After each update; ``trainer.update`` counts it."""

    def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """After a line of metrics."""

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last update, its evaluation and its checkpoint."""


class Interrupted(KeyboardInterrupt):
    """A run ended tidily because it was asked to, by Ctrl-C or SIGTERM: it has its checkpoint and can be resumed.

    Attributes:
        signal: its number; a program that ends for it does so with status 128 + signal.
        run: the folder.

    Example:
        >>> str(Interrupted(signal.SIGTERM, Path("runs/a")))
        'SIGTERM: the run is saved; resume it with: sae-engine train --resume runs/a'
    """

    def __init__(self, number: int, run: Path) -> None:
        super().__init__(f"{signal.Signals(number).name}: the run is saved; resume it with: {resume_command(run)}")
        self.signal, self.run = int(number), run


def resume_command(run: Path) -> str:
    """What goes on with the run, with as many processes as torchrun has started here."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    started = "" if processes == "1" else f"torchrun --nproc-per-node={processes} --no-python "
    return f"{started}sae-engine train --resume {shlex.quote(str(run))}"
