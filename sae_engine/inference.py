"""From a trained rule to what it amounts to afterwards: thresholds found anew, and one threshold for each latent."""
from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from . import _checks as check
from .autoencoder import SparseAutoencoder
from .rules import Activation, BatchTopK, FeatureChoice, JumpReLU, PerSource


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
        >>> sae, activations = se.SparseAutoencoder(4, 16, se.BatchTopK(2)), torch.randn(4096, 4)
        >>> sae = calibrate_threshold(sae, activations.split(1024)).eval()
        >>> 1.8 < sae.encode(activations).l0.float().mean() < 2.2
        tensor(True)
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
                codes = sae.encode(check.floating("batches", x))
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


def inference_form(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The autoencoder with its batch rule replaced by the thresholds it learned, as :class:`JumpReLU`, in eval mode.

    Parameters are shared, not copied. This is the form in which SAELens exports BatchTopK and Matryoshka, and the one
    in which :class:`FeatureChoice` has a checkpoint (``save_pretrained``); ``state_dict`` keeps the training form.
    Each source of a :class:`Crosscoder` has a JumpReLU of its own, also where one rule chose for all.
    Thresholds are rounded down to fp32, which changes no comparison with pre-activations of fp32 or less.

    Raises:
        TypeError: the rule has no learned threshold.
        RuntimeError: it has not learned one yet.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.BatchTopK(2))
        >>> _ = sae(torch.randn(32, 4))  # the threshold learns from a forward in training
        >>> type(inference_form(sae).activation).__name__
        'JumpReLU'
    """
    jumps = [_jumprelu(source.activation, sae.d_sae) for source in sae.sources]
    form = copy.copy(sae)
    form._modules = dict(sae._modules)
    form.activation = jumps[0] if len(jumps) == 1 and not isinstance(sae.activation, PerSource) else PerSource(jumps)
    form.training = False
    form.activation.eval()
    return form


def _jumprelu(rule: Activation, d_sae: int) -> JumpReLU:
    """The thresholds that a rule has come to."""
    if isinstance(rule, JumpReLU):
        theta: Tensor = rule._theta().detach()
    elif isinstance(rule, BatchTopK):
        rule._require_threshold()
        theta = rule.inference_threshold() if isinstance(rule, FeatureChoice) else rule.threshold
    else:
        raise TypeError(f"sae must have a rule with learned thresholds, got {type(rule).__name__}")
    jump = JumpReLU(d_sae, device=theta.device)
    with torch.no_grad():
        rounded = theta.float()
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        jump.threshold.copy_(torch.where(rounded.double() > theta.double(), below, rounded))
    return jump
