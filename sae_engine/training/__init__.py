"""Training: one step, sparse from end to end (:class:`TrainStep`), and whole runs from a configuration (:func:`train`).

Losses are in ``sae_engine.losses``. What runs need beside torch is imported with the first of their names.
"""
from importlib import import_module
from typing import TYPE_CHECKING

from ..losses import Loss
from .backward import DeadLatents
from .captured import CapturedStep
from .memory import peak_bytes, state_bytes
from .step import TrainStep

if TYPE_CHECKING:
    from ._architecture import Architecture
    from .callbacks import Callback, Interrupted
    from .config import TrainConfig
    from .presets import preset
    from .run import Run
    from .trainer import Trainer, resume, train

__all__ = ["Architecture", "Callback", "CapturedStep", "DeadLatents", "Interrupted", "Loss", "Run", "TrainConfig",
           "TrainStep", "Trainer", "peak_bytes", "preset", "resume", "state_bytes", "train"]  # fmt: skip

_RUNS = {
    "_architecture": {"Architecture"}, "callbacks": {"Callback", "Interrupted"}, "config": {"TrainConfig"},
    "presets": {"preset"}, "run": {"Run"}, "trainer": {"Trainer", "resume", "train"},
}  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in _RUNS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
