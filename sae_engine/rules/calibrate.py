"""The threshold of a batch rule, found anew on activations of one's choice."""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _checks as check
from ..activations import BatchTopK
from ..autoencoder import SparseAutoencoder


def calibrate_threshold(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> SparseAutoencoder:
    """Sets the learned thresholds of ``sae``'s batch rule to what ``batches`` say, and nothing else.

    The batch rule cuts each batch; the mean of the cuts becomes the threshold (of :class:`FeatureChoice` also the mean
    of each latent's cuts), with which ``.eval()`` keeps about k entries a token of such activations. For activations
    that differ from those of the training, for an autoencoder whose weights were changed since, or where the running
    mean was slow (SAELens' and dictionary_learning's conventions).

    Args:
        sae: with a rule of the kind of :class:`BatchTopK`. Its mode, counters and densities stay as they are.
        batches: each ``(*batch_shape, d_in)``; large ones, since the cut of a batch of few tokens is noisy.

    Returns:
        ``sae``, changed in place. Nothing waits for the device.

    Raises:
        TypeError: the rule learns no threshold from batches.
        ValueError: ``batches`` holds none.

    Example:
        >>> calibrate_threshold(sae, activations.split(4096)).eval()
    """
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    rule = sae.activation
    if not isinstance(rule, BatchTopK):
        raise TypeError(f"sae must have a rule that learns a threshold from batches, got {type(rule).__name__}")
    thresholds = {name: t for name, t in rule.named_buffers() if name.endswith("threshold")}
    before = {name: t.clone() for name, t in thresholds.items()}
    training, number = sae.training, 0
    try:
        sae.train()
        for threshold in thresholds.values():
            threshold.fill_(-1.0)
        with torch.no_grad():
            for number, x in enumerate(batches, start=1):
                codes = sae._encode(check.floating("batches", x), rule, "auto", False)[0]
                rule.move_thresholds(codes, 1 / number)  # the plain mean of all batches so far
        if number == 0:
            raise ValueError("batches must hold at least one batch of activations, got none")
    except BaseException:
        for name, threshold in thresholds.items():
            threshold.copy_(before[name])
        raise
    finally:
        sae.train(training)
    return sae
