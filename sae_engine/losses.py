"""Losses and reconstruction quality, with the conventions said once. x and x_hat are (*batch_shape, d)."""
import torch
from torch import Tensor

from . import functional
from .codes import SparseCodes


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d, mean over tokens, in fp32: the reconstruction loss."""
    return (x_hat.float() - x.float()).square().sum(-1).mean()


def fvu(x_hat: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over the squared distance from the batch mean."""
    flat, flat_hat = x.float().flatten(0, -2), x_hat.float().flatten(0, -2)
    return (flat_hat - flat).square().sum() / (flat - flat.mean(0)).square().sum()


def norm_match(codes: SparseCodes, x: Tensor) -> Tensor:
    """Squared gap between the norms of codes and input, mean over tokens, in fp32: top-AFA's second loss term.

    ``mean((||f|| - ||x||)^2)``; the authors add it with a weight ``afa_coeff`` of 1/128 to 1/16 to the reconstruction
    error per element, and take x as it is, not centred by b_dec. Differentiable in the codes' values.
    Source: Lee et al. 2025, arXiv:2503.24277.
    """
    ones = torch.ones(codes.num_latents, 1, device=codes.device)
    energy = functional.decode(codes.replace(values=codes.values.float().square()), ones)[..., 0]
    return (energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt() - x.float().norm(dim=-1)).square().mean()
