"""Losses and reconstruction quality, with the conventions said once. x and x_hat are (*batch_shape, d)."""
from torch import Tensor


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d, mean over tokens, in fp32: the reconstruction loss."""
    return (x_hat.float() - x.float()).square().sum(-1).mean()


def fvu(x_hat: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over the squared distance from the batch mean."""
    flat, flat_hat = x.float().flatten(0, -2), x_hat.float().flatten(0, -2)
    return (flat_hat - flat).square().sum() / (flat - flat.mean(0)).square().sum()
