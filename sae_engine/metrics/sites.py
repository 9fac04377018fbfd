"""What is measured of an autoencoder that reads and writes several sites: errors and decoder norms by site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..codes import SparseCodes
from .reconstruction import Reconstruction
from .sparsity import check_codes, owned_entries


class SiteReconstruction:
    """:class:`Reconstruction` of each site and of all of them beside each other.

    Args:
        widths: of the sites, in the order of the columns.
        space: as :class:`Reconstruction` has it.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric, x = SiteReconstruction([1, 2]), torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, -2.0]])
        >>> metric.update(x * torch.tensor([1.0, 0.5, 0.5]), x)
        >>> found = metric.compute()
        >>> [site["fvu"] for site in found["sites"]], found["fvu"]
        ([0.0, 0.25], 0.2)
    """

    def __init__(self, widths: Sequence[int], *, space: str = "raw") -> None:
        if isinstance(widths, str) or not isinstance(widths, Sequence) or not widths:
            raise ValueError(f"widths must be a sequence of at least one width, got {widths!r}")
        self.widths = [check.integer_k(width, name="widths") for width in widths]
        self._whole = Reconstruction(space=space)
        self._sites = [Reconstruction(space=space) for _ in self.widths]

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Adds tokens. ``x_hat`` and ``x``: (*batch_shape, sum of the widths)."""
        check.floating("x", x)
        if x.shape[-1] != sum(self.widths):
            raise ValueError(f"x must have {sum(self.widths)} columns, of {self.widths}, got shape {tuple(x.shape)}")
        self._whole.update(x_hat, x)
        for site, y_hat, y in zip(self._sites, x_hat.split(self.widths, -1), x.split(self.widths, -1), strict=True):
            site.update(y_hat, y)

    def compute(self) -> dict[str, Any]:
        """What :meth:`Reconstruction.compute` says of all columns, ``fvu_by_site``, and in ``sites`` what it says of
        each site.

        Raises:
            RuntimeError: no token has been seen.
        """
        sites = [site.compute() for site in self._sites]
        return {**self._whole.compute(), "fvu_by_site": [site["fvu"] for site in sites], "sites": sites}


def cross_layer_share(site_norms: Tensor) -> dict[str, Any]:
    """How much of the decoder lies in other layers than a source's own: squared norms there over all squared norms.

    Args:
        site_norms: (sources, d_sae, sites), norms of what a latent writes to each site; source s belongs to site s.

    Returns:
        ``share``: of all sources; ``sources``: of each, NaN where one has no norm at all; ``latents_above``: the share
        of the latents that have more than half of their squared norm elsewhere.

    Source: the share of feature norms that cross layers says whether a cross-layer transcoder uses what it has beyond
    transcoders of single layers, for which it is 0.

    Raises:
        TypeError, ValueError: ``site_norms`` is not of that kind, or has fewer sites than sources.

    Example:
        >>> cross_layer_share(torch.tensor([[[3.0, 4.0]], [[0.0, 5.0]]]))
        {'share': 0.32, 'sources': [0.64, 0.0], 'latents_above': 0.5}
    """
    check.floating("site_norms", site_norms, dims=3)
    sources, _, sites = site_norms.shape
    if sites < sources:
        raise ValueError(f"site_norms must have a site of its own for each of {sources} sources, got {sites} sites")
    squares = site_norms.detach().double().square()
    own = squares.diagonal(dim1=0, dim2=2).T  # (sources, d_sae)
    whole = squares.sum(2)
    elsewhere = (whole - own).clamp(min=0)  # a difference of sums, which rounds
    return {
        "share": (elsewhere.sum() / whole.sum()).item(),
        "sources": (elsewhere.sum(1) / whole.sum(1)).tolist(),
        "latents_above": (elsewhere > whole / 2).double().mean().item(),
    }


def relative_norms(site_norms: Tensor) -> Tensor:
    """Of a crosscoder of two models, to which of them each latent belongs: 0 the first, 1 the second, ½ both alike.

    ``((second - first) / max(first, second) + 1) / 2`` of the norms of a latent's two decoder rows.

    Args:
        site_norms: (..., d_sae, 2).

    Returns:
        (..., d_sae), in the dtype of ``site_norms``; NaN of a latent that writes nothing.

    Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"; Minder et al. 2025,
    arXiv:2504.02922, whose scale this is.

    Raises:
        TypeError, ValueError: ``site_norms`` is no floating-point tensor, or has not two sites.

    Example:
        >>> relative_norms(torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [2.0, 1.0]]))
        tensor([0.0000, 0.5000, 1.0000, 0.2500])
    """
    check.floating("site_norms", site_norms)
    if site_norms.dim() < 2 or site_norms.shape[-1] != 2:
        raise ValueError(f"site_norms must be (..., d_sae, 2), got shape {tuple(site_norms.shape)}")
    first, second = site_norms.unbind(-1)
    return ((second - first) / torch.maximum(first, second) + 1) / 2


class LatentScaling:
    """By how much each latent would have to be multiplied to explain some activations best, it alone.

    For latent j with codes f_j and decoder rows d_j it is the least-squares β_j of ``y ≈ β_j f_j d_j``. With the
    second model's activations as y (or its error with the latent taken out, ``y - x_hat + f_j d_j``, whose β is that
    of the error plus 1), a latent that is said to belong to the first model alone has β near 0; where it is near 1 the
    norms alone have misled.

    Args:
        directions: (d_sae, d), what a unit of each latent adds: ``W_dec`` at the columns of one site.

    Source: Minder et al. 2025, arXiv:2504.02922, which solves it for each latent alone; here all latents share a pass.

    Raises:
        TypeError, ValueError: an argument is of another kind or shape; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric = LatentScaling(torch.eye(2))
        >>> metric.update(se.SparseCodes.from_dense(torch.tensor([[2.0, 0.0], [0.0, 1.0]])), torch.ones(2, 2))
        >>> metric.compute()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, directions: Tensor) -> None:
        check.floating("directions", directions, dims=2)
        self.directions = directions.detach()
        self.tokens = 0
        shape, device = directions.shape[:1], directions.device
        self._along, self._power = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))

    def update(self, codes: SparseCodes, y: Tensor) -> None:
        """Adds the tokens of ``codes``; ``y``: (*batch_shape, d)."""
        F, d = self.directions.shape
        check_codes(codes, F)
        check.floating("y", y)
        check.shaped("y", y, (*codes.batch_shape, d), codes.values, why="one row per row of codes")
        # The gradient of <y, decoded> by a code is <y_b, d_j>, which the decoder's backward pass has at the codes.
        with torch.inference_mode(False), torch.enable_grad():
            values = codes.values.detach().clone().requires_grad_()
            decoded = functional.decode(codes.replace(values=values), self.directions.to(values.dtype))
            (along,) = torch.autograd.grad(decoded, values, y.detach().clone().to(decoded.dtype))
        owned, latents = owned_entries(codes)
        kept = torch.where(owned, codes.values.detach(), 0).double()
        self._along.index_add_(0, latents, kept * torch.where(owned, along, 0).double())
        self._power.index_add_(0, latents, kept.square())
        self.tokens += codes.rows

    def compute(self) -> Tensor:
        """(d_sae,) fp64 on the device; NaN of a latent that never fired, or that writes nothing.

        Raises:
            RuntimeError: no token has been seen.
        """
        if not self.tokens:
            raise RuntimeError("nothing was measured: update() has seen no token")
        return self._along / (self._power * self.directions.double().square().sum(1))
