"""Crosscoders of three layers with nothing at 0, for files and for other libraries."""

import torch
from pair_loop import SITES, coder

import sae_engine as se

MODEL = "openai-community/gpt2"
READ = tuple(f"blocks.{layer}.hook_resid_mid" for layer in range(SITES))
WRITTEN = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(SITES))


def made(wiring, rule, **options):
    """In fp32; its rules have learned thresholds of their own, and it knows where it belongs."""
    found = coder(wiring, rule, dtype=torch.float32, **options)
    with torch.no_grad():
        for source in found.sources:
            if isinstance(source.activation, se.JumpReLU):
                source.activation.threshold.uniform_(0.05, 0.3)
            elif isinstance(source.activation, se.BatchTopK):
                source.activation.k = 3
                source.activation.threshold.fill_(0.1234567)
    found.provenance = se.Provenance(model=MODEL, sites=READ, target_sites=WRITTEN)
    return found.eval()
