"""One whole training step, sparse from end to end: see :class:`TrainStep`. Losses are in ``sae_engine.losses``."""
from ..losses import Loss
from .captured import CapturedStep
from .forward import DeadLatents
from .memory import peak_bytes
from .step import TrainStep

__all__ = ["CapturedStep", "DeadLatents", "Loss", "TrainStep", "peak_bytes"]
