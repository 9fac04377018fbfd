"""Autoencoders with nothing at 0, and checkpoints of them in every format."""

import torch

import sae_engine as se

D, F, B = 12, 40, 9
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4),
    "BatchTopK": lambda: se.BatchTopK(3, threshold_lr=0.2),
    "MutualChoice": lambda: se.MutualChoice(4), "TopAFA": lambda: se.TopAFA(capacity=200 * F), "ReLU": se.ReLU,
    "JumpReLU": lambda: se.JumpReLU(F, bandwidth=0.2),
}  # fmt: skip


def build(rule, *, format=None, **options):
    """An autoencoder with nothing at 0, except what the format has no place for."""
    torch.manual_seed(1)
    sae = se.SparseAutoencoder(D, F, RULES[rule](), **{"decoder_init_norm": 0.7, **options})
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip") and p.requires_grad:
                p.normal_(std=0.1)
        if format == "batchtopk" and rule not in ("ReLU", "JumpReLU"):
            sae.b_enc.zero_()  # these have none there
        if rule == "JumpReLU":
            sae.activation.threshold.uniform_(0.05, 0.3)
        elif hasattr(sae.activation, "threshold"):
            sae.activation.threshold.fill_(0.123456789)  # no float32
    return sae


def write(format, folder, rule=None, **options):
    """A checkpoint of a format, in ``folder``."""
    rules = {"gemma_scope": "JumpReLU", "gemma_scope_2": "JumpReLU", "openai": "ReLU"}
    sae = build(rule or rules.get(format, "TopK"), format=format, **options)
    sae.save_pretrained(folder, format=format)
    return sae
