"""Losses, as formulas of tensors and as objects.

The functions are the formulas: ``squared_error(x_hat, x)``, ``auxk(codes, W_dec, residual)``, … An object
(:class:`AuxK`, :class:`L1`, :class:`StepL0`, …) is such a formula with its weight and with the rule whose codes it
reads; a :class:`~sae_engine.training.TrainStep` takes a list of them, and :func:`evaluate` gives the same sums for
``loss.backward()``. A loss of your own is a subclass of :class:`Loss`.
"""
from .auxiliary import AFA, AuxK, AuxZipf, MultiTopK
from .base import Loss, LossInput, NestedReconstruction, Pull, Reconstruction, losses_for
from .evaluation import evaluate
from .formulas import afa, auxk, fvu, mse, squared_error
from .pre_activation import PreActivation
from .rule_formulas import aux_zipf, gated, l1, matryoshka, step_l0, tanh_l0, target_l0
from .sparsity import L1, GateLoss, StepL0, TanhL0

__all__ = [
    "AFA",
    "L1",
    "AuxK",
    "AuxZipf",
    "GateLoss",
    "Loss",
    "LossInput",
    "MultiTopK",
    "NestedReconstruction",
    "PreActivation",
    "Pull",
    "Reconstruction",
    "StepL0",
    "TanhL0",
    "afa",
    "aux_zipf",
    "auxk",
    "evaluate",
    "fvu",
    "gated",
    "l1",
    "losses_for",
    "matryoshka",
    "mse",
    "squared_error",
    "step_l0",
    "tanh_l0",
    "target_l0",
]
