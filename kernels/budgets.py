"""Integer budgets of feature choice: how many tokens each rank of latents gets. Host arithmetic, once for each size."""
import functools

import torch
from torch import Tensor


def by_rank(total: int, rows: int, num_latents: int, exponent: float, shift: float) -> Tensor:
    """(F,) int32, descending: shares of ``total`` that fall as 1 / (rank + shift)^exponent, ranks counted from 1.

    Shares are cut at ``rows`` and, where ``total`` gives every latent one, raised to 1, all others scaled to fit; they
    are rounded down, and what that leaves goes to the largest remainders, ties to the lower rank. The sum is exact.
    """
    least = 1 if total >= num_latents else 0
    log_weight = -exponent * torch.log(torch.arange(1, num_latents + 1, dtype=torch.float64) + shift)
    shares = lambda log_scale: (log_weight + log_scale).exp().clamp(least, rows)  # noqa: E731
    low, high = -800.0, 800.0 - float(log_weight[-1])  # every share at its least, every share at its most
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle).sum()) <= total else (low, middle)
    exact = shares(low)
    counts = exact.floor()
    left = total - int(counts.sum())
    by_remainder = (exact - counts).argsort(descending=True, stable=True)
    while left:
        room = by_remainder[counts[by_remainder] < rows][:left]
        counts[room] += 1
        left -= room.numel()
    return counts.int()


@functools.lru_cache(maxsize=32)
def _on_device(total: int, rows: int, num_latents: int, exponent: float, shift: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return by_rank(total, rows, num_latents, exponent, shift).to(device)


def budgets(density: Tensor, total: int, rows: int, exponent: float, shift: float) -> Tensor:
    """``by_rank`` handed to the latents in descending order of ``density`` (F,), ties to the lower latent."""
    counts = _on_device(total, rows, density.shape[0], exponent, shift, density.device)
    return torch.empty_like(counts).scatter_(0, density.argsort(descending=True, stable=True), counts)
