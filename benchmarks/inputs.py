"""Seeded inputs of the operations: what every provider of one gets."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from sizes import FP32, Case
from torch import Tensor

import sae_engine as se
from sae_engine import SparseCodes, functional

Inputs = SimpleNamespace


def seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, device=generator.device, generator=generator, dtype=torch.float32).to(dtype)


def total(i: Inputs) -> int:
    """Entries of the whole batch."""
    return int(i.k * i.case.B)


def pre_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = seeded(device, seed)
    return Inputs(pre=normal(case.B, case.F, dtype=dtype, generator=generator), k=case.k, case=case)


def feature_topm_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Budgets that fall as 1 / rank and sum up to k entries a token: feature choice's, its latents in random order."""
    inputs = pre_inputs(case, dtype, device, seed)
    inputs.total = total(inputs)
    popularity = torch.rand(case.F, device=device, generator=seeded(device, seed + 1))
    inputs.m = functional.feature_budgets(popularity, inputs.total, case.B)
    inputs.most = int(inputs.m.max())
    return inputs


def norm_match_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Targets near the norm of each row's k strongest entries, so that about k entries a row are kept."""
    inputs = pre_inputs(case, dtype, device, seed)
    generator = seeded(device, seed + 1)
    inputs.weight_norm = 1 + 0.1 * torch.rand(case.F, device=device, generator=generator)
    jitter = 1 + 0.01 * torch.rand(case.B, device=device, generator=generator)
    score = inputs.pre.relu().float() * inputs.weight_norm
    inputs.target = score.topk(case.k, sorted=False).values.norm(dim=1) * jitter
    inputs.capacity = 2 * case.B * case.k
    return inputs


def energy_share_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Shares near that of each row's k strongest entries, so that about k entries a row are kept."""
    inputs = pre_inputs(case, dtype, device, seed)
    energy = inputs.pre.relu().float().square()
    inputs.share = energy.topk(case.k, sorted=False).values.sum(1) / energy.sum(1) * 0.999
    inputs.capacity = 2 * case.B * case.k
    return inputs


def threshold_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A threshold per latent, near the level that k of F normal numbers exceed."""
    inputs = pre_inputs(case, dtype, device, seed)
    level = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * case.k / case.F, dtype=torch.float64)))
    jitter = 0.05 * torch.rand(case.F, device=device, generator=seeded(device, seed + 1))
    inputs.theta = level + jitter
    inputs.capacity = 2 * case.B * case.k
    return inputs


def codes_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Codes of k distinct latents a row, drawn by popularity; decoder; gradient of the output."""
    generator = seeded(device, seed)
    log_p = torch.zeros(case.F, device=device)
    if case.indices == "zipf":
        ranks = torch.arange(1, case.F + 1, device=device)
        log_p = -ranks.log()[torch.randperm(case.F, device=device, generator=generator)]
    chunk = max((1 << 27) // case.F, 1)
    indices = []
    for start in range(0, case.B, chunk):  # the k largest of log p + Gumbel noise: k draws without replacement
        noise = torch.rand(min(chunk, case.B - start), case.F, device=device, generator=generator)
        noise = noise.clamp_(1e-10, 1 - 1e-6).log_().neg_().log_().neg_()
        indices.append(noise.add_(log_p).topk(case.k, sorted=False).indices.sort(1).values)
    columns = torch.cat(indices)
    values = normal(case.B, case.k, dtype=dtype, generator=generator).abs_() + 0.1
    codes = SparseCodes.from_topk(values, columns, case.F)
    weight = normal(case.F, case.d, dtype=FP32, generator=generator)
    weight = (weight / weight.norm(dim=1, keepdim=True)).to(dtype)
    return Inputs(
        codes=codes, values=values, columns=columns, weight=weight, case=case,
        bias=normal(case.d, dtype=dtype, generator=generator),
        grad=normal(case.B, case.d, dtype=dtype, generator=generator),
    )


def autoencoder_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sae = se.SparseAutoencoder(case.d, case.F, se.TopK(case.k), dtype=dtype, device=device)
    x = normal(case.B, case.d, dtype=dtype, generator=seeded(device, seed))
    return Inputs(sae=sae.requires_grad_(False), x=x, k=case.k, case=case)


def encoder_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Directions of norm 1, stored latent by latent as an autoencoder stores them, and small biases."""
    generator = seeded(device, seed)
    weight = normal(case.F, case.d, dtype=FP32, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    return Inputs(
        x=normal(case.B, case.d, dtype=dtype, generator=generator), weight=weight.to(dtype).T,
        bias=(0.1 * normal(case.F, dtype=FP32, generator=generator)).to(dtype), k=case.k, case=case,
    )
