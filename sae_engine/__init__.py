"""sae-engine: exact, fast sparse activations for sparse autoencoders."""
from . import functional, losses, training
from .activations import AbsTopK, Activation, AuxTopK, BatchTopK, JumpReLU, MutualChoice, ReLU, TopAFA, TopK
from .autoencoder import EncodeInfo, SparseAutoencoder, SparseDecoder
from .codes import ByLatent, SparseCodes, cat

__version__ = "0.1.0"

__all__ = [
    "AbsTopK",
    "Activation",
    "AuxTopK",
    "BatchTopK",
    "ByLatent",
    "EncodeInfo",
    "JumpReLU",
    "MutualChoice",
    "ReLU",
    "SparseAutoencoder",
    "SparseCodes",
    "SparseDecoder",
    "TopAFA",
    "TopK",
    "cat",
    "functional",
    "losses",
    "training",
]
