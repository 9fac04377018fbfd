"""sae-engine: exact, fast sparse activations for sparse autoencoders."""
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import (
    _saved_codes,  # noqa: F401 - pickles and compiled functions know SparseCodes by it
    distributed,
    functional,
    losses,
    metrics,
    training,
)
from ._cat import cat
from .autoencoder import SparseAutoencoder
from .codes import ByLatent, SparseCodes
from .crosscoder import Crosscoder
from .decoder import SparseDecoder
from .functional import Encoded, EncodeInfo
from .inference import calibrate_threshold, inference_form
from .initial import init_as_top_afa, init_firing, init_sparse
from .provenance import Provenance
from .rules import (
    AbsTopK,
    Activation,
    AuxTopK,
    AuxZipfTopK,
    BatchTopK,
    FeatureChoice,
    Gated,
    GradientTopK,
    JumpReLU,
    LogJumpReLU,
    MatryoshkaBatchTopK,
    MutualChoice,
    ReLU,
    RunningDensity,
    SampledTopK,
    StatisticalTopK,
    TopAFA,
    TopK,
)
from .standardization import Standardization, fold_standardization

if _TYPE_CHECKING:
    from . import lm
    from .acceleration.switch import CannotAccelerate, accelerate, accelerated, restore
    from .latents import ablate, max_activating, steer
    from .training import Run, Trainer, train

__version__ = "0.2.0"

__all__ = [
    "AbsTopK",
    "Activation",
    "AuxTopK",
    "AuxZipfTopK",
    "BatchTopK",
    "ByLatent",
    "CannotAccelerate",
    "Crosscoder",
    "EncodeInfo",
    "Encoded",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "LogJumpReLU",
    "MatryoshkaBatchTopK",
    "MutualChoice",
    "Provenance",
    "ReLU",
    "Run",
    "RunningDensity",
    "SampledTopK",
    "SparseAutoencoder",
    "SparseCodes",
    "SparseDecoder",
    "Standardization",
    "StatisticalTopK",
    "TopAFA",
    "TopK",
    "Trainer",
    "ablate",
    "accelerate",
    "accelerated",
    "calibrate_threshold",
    "cat",
    "distributed",
    "fold_standardization",
    "functional",
    "inference_form",
    "init_as_top_afa",
    "init_firing",
    "init_sparse",
    "lm",
    "losses",
    "max_activating",
    "metrics",
    "restore",
    "steer",
    "train",
    "training",
]


def __getattr__(name: str):
    if name in ("CannotAccelerate", "accelerate", "accelerated", "restore"):  # other libraries are not everyone's
        from .acceleration import switch

        return getattr(switch, name)
    if name in ("ablate", "latents", "lm", "max_activating", "steer"):  # nor are language models
        from importlib import import_module

        if name == "lm":
            return import_module(".lm", __name__)
        latents = import_module(".latents", __name__)
        return latents if name == "latents" else getattr(latents, name)
    if name in ("Run", "Trainer", "train"):  # nor is a training of them
        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
