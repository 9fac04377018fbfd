"""SAELens' autoencoders on sae_engine's operations; what :func:`accelerate` turns them into. Written for sae-lens 6.54.

Encode, decode, forward and the training forward pass follow SAELens' own, step by step: the same conversions, hook
points, norms and losses, with the selection exact, the decoder sparse, and gradients that follow the codes.

What stays dense, and why. The encoder's matrix product and ``hidden_pre``: the output of a training step has it.
``feature_acts``, a dense matrix as in SAELens: the trainer counts what fires on it. With SAELens' own
``use_sparse_activations=True`` (TopK) it is a sparse COO tensor instead, and no matrix but ``hidden_pre`` is made.
Neither is on the way of the reconstruction's gradient in a training step. Where somebody listens at
``hook_sae_acts_pre``, SAELens' own code runs between there and the activations. ReLU and JumpReLU run SAELens' dense
formula from more than 1/16 of active latents on. Their other auxiliary terms (``lp_norm`` other than 1,
``pre_act_loss``) are SAELens' own, on the dense matrices.

AuxK here has no ReLU and no ``b_dec``; it takes min(d_in // 2, dead) dead latents of each token, is scaled by
min(dead / (d_in // 2), 1), and shares its backward pass with the activations. It asks the device how many are dead,
as SAELens does.
"""
from __future__ import annotations

from typing import Any

from . import _base as core
from ._sae_lens import check_activation
from ._sae_lens_thresholded import JumpReLUSAE, JumpReLUTrainingSAE, StandardSAE, StandardTrainingSAE
from ._sae_lens_topk import (
    AbsTopKSAE,
    AbsTopKTrainingSAE,
    BatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    TopKSAE,
    TopKTrainingSAE,
)

CLASSES = core.table(
    TopKSAE, TopKTrainingSAE, AbsTopKSAE, AbsTopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE,
    JumpReLUSAE, JumpReLUTrainingSAE, StandardSAE, StandardTrainingSAE,
)  # fmt: skip
EXACT: dict[type, type] = {}


def check(sae: Any, plain: type) -> None:
    """Raises CannotAccelerate where our methods would not do what those of ``sae`` do."""
    ours = CLASSES[plain]
    core.check_module(sae, ours, ("W_enc", "W_dec", "b_enc", "b_dec"))
    check_activation(sae, ours._activation)  # type: ignore[attr-defined]
