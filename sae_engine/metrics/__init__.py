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
from .sparsity import Sparsity

__all__ = [
    "EpsilonLBO",
    "NextTokenLoss",
    "Reconstruction",
    "Sparsity",
    "TailTruncation",
    "decoder_cosines",
    "decoder_similarity",
    "evaluate",
    "evaluate_during",
    "loss_recovered",
    "ppl_sparsity",
]
