"""Metrics that stream: ``update`` with batches on the device, ``compute`` once; only ``compute`` waits for the device.

Each class says what it means by its words; ``evaluate`` takes them all together for an autoencoder on the activations
of a language model, and ``sae-engine eval`` prints and draws what it returns.
"""

from .decoder import decoder_cosines, decoder_similarity
from .evaluation import evaluate, evaluate_during
from .language import NextTokenLoss, loss_recovered
from .norms import EpsilonLBO, TailTruncation
from .perplexity import ppl_sparsity
from .reconstruction import Reconstruction
from .replacement import evaluate_sites, evaluate_sites_during
from .sites import LatentScaling, SiteReconstruction, cross_layer_share, relative_norms
from .sparsity import SourceSparsity, Sparsity

__all__ = [
    "EpsilonLBO",
    "LatentScaling",
    "NextTokenLoss",
    "Reconstruction",
    "SiteReconstruction",
    "SourceSparsity",
    "Sparsity",
    "TailTruncation",
    "cross_layer_share",
    "decoder_cosines",
    "decoder_similarity",
    "evaluate",
    "evaluate_during",
    "evaluate_sites",
    "evaluate_sites_during",
    "loss_recovered",
    "ppl_sparsity",
    "relative_norms",
]
