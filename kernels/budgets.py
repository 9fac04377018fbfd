"""Shares by rank: the integer budgets of feature choice, and how far latents fall short of Zipf's law.

Everything is computed where the densities are, and nothing is read back: no call waits for the device.
"""
import torch
from torch import Tensor

HALVINGS = 64  # of an interval of log scales below 1600 + log(F): down to the last bit of a float64
REMEMBERED = 32  # results that are kept, by the arguments that they follow from


def shares(
    total: float, least: float, most: float, num_latents: int, exponent: float, shift: float, device: torch.device
) -> Tensor:
    """(F,) float64, descending: shares of ``total`` that fall as 1 / (rank + shift)^exponent, ranks counted from 1.

    Cut at ``most`` and raised to ``least``, all others scaled to fit; their sum is ``total`` or rounded below it.
    """
    rank = torch.arange(1, num_latents + 1, dtype=torch.float64, device=device)
    log_weight = -exponent * torch.log(rank + shift)
    scaled = lambda log_scale: (log_weight + log_scale).exp().clamp(least, most)  # noqa: E731
    low = torch.full_like(log_weight[0], -800.0)  # every share at its least
    high = 800.0 - log_weight[-1]  # every share at its most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = scaled(middle).sum() <= total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return scaled(low)


def by_rank(
    total: int, rows: int, num_latents: int, exponent: float, shift: float, device: torch.device
) -> Tensor:
    """(F,) int32, descending: ``shares`` of at most ``rows`` and, where ``total`` gives every latent one, at least 1.

    Rounded down; what that leaves goes to the largest remainders, ties to the lower rank: the sum is exact.
    """
    exact = shares(total, 1 if total >= num_latents else 0, rows, num_latents, exponent, shift, device)
    counts = exact.floor()
    first = (exact - counts).argsort(descending=True, stable=True)
    one_more = torch.arange(num_latents, device=device) < total - counts.sum()  # a share that was cut leaves none
    return counts.scatter_add_(0, first, one_more.double()).int()


_laws: dict[tuple, Tensor] = {}


def _once(law, *args) -> Tensor:
    """``law(*args)``, remembered. What a CUDA graph's capture computes is there only once the graph has run: it is the
    graph's own, and not remembered."""
    key = law, *args
    if key not in _laws:
        with torch.inference_mode(False):
            found = law(*args)
        if found.is_cuda and torch.cuda.is_current_stream_capturing():
            return found
        while len(_laws) >= REMEMBERED:
            _laws.pop(next(iter(_laws)), None)
        _laws[key] = found
        return found
    return _laws[key]


def budgets(density: Tensor, total: int, rows: int, exponent: float, shift: float) -> Tensor:
    """``by_rank`` handed to the latents in descending order of ``density`` (F,), ties to the lower latent."""
    counts = _once(by_rank, total, rows, density.shape[0], exponent, shift, density.device)
    return torch.empty_like(counts).scatter_(0, density.argsort(descending=True, stable=True), counts)


def zipf_shortfall(density: Tensor, k: float, exponent: float, shift: float) -> Tensor:
    """(F,) in [0, 1]: what each density lacks of its share of ``k`` latents a token; one unset (-1) lacks nothing."""
    due = _once(shares, k, 0, 1, density.shape[0], exponent, shift, density.device)
    due = torch.empty_like(due).scatter_(0, density.argsort(descending=True, stable=True), due)
    short = torch.where(due > 0, 1 - density.double() / due, 0.0).clamp(0, 1)
    return torch.where(density < 0, 0.0, short).to(density.dtype)
