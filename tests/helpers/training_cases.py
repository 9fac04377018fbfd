"""Autoencoders, losses and steps that the tests of training share."""

import torch

import sae_engine as se
from sae_engine.losses import AFA, L1, AuxK, MultiTopK
from sae_engine.training import TrainStep

B, D, F = 14, 6, 40
F64 = torch.float64
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4), "BatchTopK": lambda: se.BatchTopK(3.5),
    "TopAFA": lambda: se.TopAFA(), "ReLU": lambda: se.ReLU(),
    "JumpReLU": lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8),
}  # fmt: skip
AUX = {
    "none": (), "auxk": (AuxK(5),), "auxk-saelens": (AuxK.saelens(),), "multi": (MultiTopK(3),),
    "afa": (AFA(),), "all": (AuxK(30), MultiTopK(2, 0.5), AFA(0.1)),
}  # fmt: skip


def make(rule, *, dtype=F64, seed=0, **options):
    """An autoencoder with random parameters, decoder rows of any norm, and no two alike."""
    torch.manual_seed(seed)
    sae = se.SparseAutoencoder(D, F, rule, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if not name.startswith("activation") and p.requires_grad:
                p.copy_(torch.randn(p.shape, dtype=F64) * (0.4 if "W" in name else 0.2))
    return sae


def train_step(sae, *, losses=(), **options):
    """A step of the reconstruction alone also where the rule is not trained without a sparsity loss."""
    losses = [*losses] if isinstance(losses, list | tuple) else [losses]
    return TrainStep(sae, losses=[*losses, L1(0.0)] if sae.activation.needs() else losses, **options)


def some_dead(step):
    """Every third latent counts as dead; returns which."""
    step.dead.since_fired[::3] = step.dead.dead_after
    step.dead.tokens = step.dead.dead_after
    return step.dead.mask


def assert_parameters_close(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
