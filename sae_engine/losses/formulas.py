"""Reconstruction error and what is measured against it. x and x_hat are (*batch_shape, d), not empty."""
import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d, mean over tokens, in fp32 or wider: the reconstruction loss.

    SAELens calls it ``mse_loss``. ``metrics.Reconstruction`` has it under this name too; its ``mse`` is per element.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> squared_error(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]]))
        tensor(3.)
    """
    x_hat, x = _pair(x_hat, x)
    return (x_hat - x).square().sum(-1).mean()


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error per element, in fp32 or wider: :func:`squared_error` over d, as ``metrics`` has it too.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> mse(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]]))
        tensor(1.)
    """
    x_hat, x = _pair(x_hat, x)
    return (x_hat - x).square().mean()


def fvu(x_hat: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained: squared error over the squared distance from the batch mean.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fvu(x / 2, x)
        tensor(0.2500)
    """
    x_hat, x = (check.matrix(t) for t in _pair(x_hat, x))
    return (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()


def auxk(codes: SparseCodes, W_dec: Tensor, residual: Tensor, *, normalize: bool = False) -> Tensor:
    """Squared error with which dead latents reconstruct what the others left: AuxK.

    ``mean over tokens of ||codes @ W_dec - residual||^2``, in fp32 or wider, without ``b_dec``. The residual
    (*batch_shape, d_out) is a constant for autograd; codes of :class:`AuxTopK` carry the gradient to the encoder.
    ``normalize`` divides by the residual's own squared distance from its batch mean, as OpenAI and dictionary_learning
    do; where that is 0 the loss is 0. Weights (1/32 with ``normalize``) and scales (min(dead / k_aux, 1) in SAELens and
    sparsify) are the caller's; :class:`AuxK` knows them. Source: Gao et al. 2024, arXiv:2406.04093.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        >>> auxk(codes, torch.eye(2), torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
        tensor(0.5000)
    """
    check.floating("residual", residual)
    residual = residual.detach()
    error = squared_error(functional.decode(codes, W_dec), residual)
    if not normalize:
        return error
    rows = check.matrix(residual).to(error.dtype)
    spread = (rows - rows.mean(0)).square().sum(1).mean()
    return torch.where(spread > 0, error / spread.clamp(min=torch.finfo(error.dtype).tiny), 0.0)


def afa(codes: SparseCodes, x: Tensor) -> Tensor:
    """Squared gap between the norms of codes and input, mean over tokens, in fp32 or wider: top-AFA's second loss term.

    ``mean((||f|| - ||x||)^2)``; the authors add it with a weight ``afa_coeff`` of 1/128 to 1/16 to the reconstruction
    error per element, and take x as it is, not centred by b_dec. Differentiable in the codes' values.
    Source: Lee et al. 2025, arXiv:2503.24277.

    Raises:
        TypeError: an argument is not floating-point, or of the wrong kind; names it.
        ValueError: a shape or a device does not fit the others; names the argument.

    Example:
        >>> codes = se.SparseCodes.from_dense(torch.tensor([[3.0, 4.0]]))
        >>> afa(codes, torch.tensor([[0.0, 3.0]]))  # the norms are 5 and 3
        tensor(4.)
    """
    check.floating("x", x)
    check.shaped("x", x, (*codes.batch_shape, x.shape[-1]), codes.values, why="one row per row of codes")
    wide = torch.promote_types(codes.values.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        ones = torch.ones(codes.num_latents, 1, dtype=wide, device=codes.device)
        energy = functional.decode(codes.replace(values=codes.values.to(wide).square()), ones)[..., 0]
        norm = energy.clamp(min=torch.finfo(wide).tiny).sqrt()  # the root's slope at 0 is infinite
        return (norm - x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=-1)).square().mean()


def _pair(x_hat: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    check.floating("x", x)
    check.floating("x_hat", x_hat)
    check.shaped("x_hat", x_hat, x.shape, x, why="that of x")
    wide = torch.promote_types(torch.promote_types(x.dtype, x_hat.dtype), torch.float32)
    return x_hat.to(wide), x.to(wide)
