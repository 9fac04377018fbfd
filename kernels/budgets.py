"""Shares by rank: the integer budgets of feature choice, and how far latents fall short of Zipf's law."""
import functools

import torch
from torch import Tensor


def shares(total: float, least: float, most: float, num_latents: int, exponent: float, shift: float) -> Tensor:
    """(F,) float64, descending: shares of ``total`` that fall as 1 / (rank + shift)^exponent, ranks counted from 1.

    Cut at ``most`` and raised to ``least``, all others scaled to fit; their sum is ``total`` or rounded below it.
    """
    log_weight = -exponent * torch.log(torch.arange(1, num_latents + 1, dtype=torch.float64) + shift)
    scaled = lambda log_scale: (log_weight + log_scale).exp().clamp(least, most)  # noqa: E731
    low, high = -800.0, 800.0 - float(log_weight[-1])  # every share at its least, every share at its most
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(scaled(middle).sum()) <= total else (low, middle)
    return scaled(low)


def by_rank(total: int, rows: int, num_latents: int, exponent: float, shift: float) -> Tensor:
    """(F,) int32, descending: ``shares`` of at most ``rows`` and, where ``total`` gives every latent one, at least 1.

    Rounded down; what that leaves goes to the largest remainders, ties to the lower rank: the sum is exact.
    """
    exact = shares(total, 1 if total >= num_latents else 0, rows, num_latents, exponent, shift)
    counts = exact.floor()
    left = total - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:left]] += 1  # a share that was cut leaves none
    return counts.int()


@functools.lru_cache(maxsize=32)
def _on_device(law, device: torch.device, *args) -> Tensor:
    with torch.inference_mode(False):
        return law(*args).to(device)


def budgets(density: Tensor, total: int, rows: int, exponent: float, shift: float) -> Tensor:
    """``by_rank`` handed to the latents in descending order of ``density`` (F,), ties to the lower latent."""
    counts = _on_device(by_rank, density.device, total, rows, density.shape[0], exponent, shift)
    return torch.empty_like(counts).scatter_(0, density.argsort(descending=True, stable=True), counts)


def zipf_shortfall(density: Tensor, k: float, exponent: float, shift: float) -> Tensor:
    """(F,) in [0, 1]: what each density lacks of its share of ``k`` latents a token; one unset (-1) lacks nothing."""
    due = _on_device(shares, density.device, k, 0, 1, density.shape[0], exponent, shift)
    due = torch.empty_like(due).scatter_(0, density.argsort(descending=True, stable=True), due)
    short = torch.where(due > 0, 1 - density.double() / due, 0.0).clamp(0, 1)
    return torch.where(density < 0, 0.0, short).to(density.dtype)
