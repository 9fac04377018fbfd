"""One whole training step, sparse from end to end: see :class:`TrainStep`."""
from .dead import DeadLatents
from .memory import peak_bytes
from .objectives import AFA, AuxK, AuxZipf, MultiTopK
from .step import TrainStep

__all__ = ["AFA", "AuxK", "AuxZipf", "DeadLatents", "MultiTopK", "TrainStep", "peak_bytes"]
