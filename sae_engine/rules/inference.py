"""What a trained rule amounts to afterwards: one threshold per latent."""
from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..activations import BatchTopK, JumpReLU
from ..autoencoder import SparseAutoencoder
from .feature_choice import FeatureChoice


def inference_form(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The autoencoder with its batch rule replaced by the thresholds it learned, as :class:`JumpReLU`, in eval mode.

    Parameters are shared, not copied. This is the form in which SAELens exports BatchTopK and Matryoshka, and the one
    in which :class:`FeatureChoice` has a checkpoint (``save_pretrained``); ``state_dict`` keeps the training form.
    Thresholds are rounded down to fp32, which changes no comparison with pre-activations of fp32 or less.

    Raises:
        TypeError: the rule has no learned threshold.
        RuntimeError: it has not learned one yet.
    """
    rule = sae.activation
    if isinstance(rule, JumpReLU):
        theta: Tensor = rule._theta().detach()
    elif isinstance(rule, BatchTopK):
        rule._require_threshold()
        theta = rule.inference_threshold() if isinstance(rule, FeatureChoice) else rule.threshold
    else:
        raise TypeError(f"sae must have a rule with learned thresholds, got {type(rule).__name__}")
    jump = JumpReLU(sae.d_sae, device=theta.device)
    with torch.no_grad():
        rounded = theta.float()
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        jump.threshold.copy_(torch.where(rounded.double() > theta.double(), below, rounded))
    form = copy.copy(sae)
    form._modules = dict(sae._modules)
    form.activation = jump
    form.training = jump.training = False
    return form
