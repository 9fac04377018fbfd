"""sae-engine: exact, fast sparse activations for sparse autoencoders."""
from . import functional, losses, metrics, training
from .activations import AbsTopK, Activation, AuxTopK, BatchTopK, JumpReLU, MutualChoice, ReLU, TopAFA, TopK
from .autoencoder import EncodeInfo, SparseAutoencoder, SparseDecoder
from .codes import ByLatent, SparseCodes, cat
from .rules import (
    AuxZipfTopK,
    FeatureChoice,
    Gated,
    GradientTopK,
    LogJumpReLU,
    MatryoshkaBatchTopK,
    RunningDensity,
    SampledTopK,
    StatisticalTopK,
    inference_form,
    init_as_top_afa,
    init_sparse,
)

__version__ = "0.1.0"

__all__ = [
    "AbsTopK",
    "Activation",
    "AuxTopK",
    "AuxZipfTopK",
    "BatchTopK",
    "ByLatent",
    "EncodeInfo",
    "FeatureChoice",
    "Gated",
    "GradientTopK",
    "JumpReLU",
    "LogJumpReLU",
    "MatryoshkaBatchTopK",
    "MutualChoice",
    "ReLU",
    "RunningDensity",
    "SampledTopK",
    "SparseAutoencoder",
    "SparseCodes",
    "SparseDecoder",
    "StatisticalTopK",
    "TopAFA",
    "TopK",
    "cat",
    "functional",
    "inference_form",
    "init_as_top_afa",
    "init_sparse",
    "losses",
    "metrics",
    "training",
]
