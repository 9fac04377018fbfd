"""Initial weights of top-AFA autoencoders: the authors', and a scale of the encoder that starts sparse."""
from __future__ import annotations

import math
from statistics import NormalDist

import torch

from . import _checks as check
from .autoencoder import SparseAutoencoder
from .rules import TopAFA


@torch.no_grad()
def init_as_top_afa(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The authors' initial weights: ``W_enc`` Kaiming-uniform over d_sae, ``W_dec`` its transpose with unit rows.

    The activations' energy then equals the input's on average, so top-AFA starts by keeping nearly half of all latents.
    Biases become 0. Source: the code of Lee et al. 2025, arXiv:2503.24277.

    Raises:
        TypeError: ``sae`` is no :class:`SparseAutoencoder`.
        ValueError: its output is not as wide as its input.

    Example:
        >>> sae = init_as_top_afa(se.SparseAutoencoder(4, 16, se.TopAFA()))
        >>> sae.W_dec.norm(dim=1).detach().round(decimals=4).unique()
        tensor([1.])
    """
    _require_square(sae)
    drawn = torch.empty(sae.d_in, sae.d_sae, dtype=torch.float32, device=sae.W_enc.device)
    torch.nn.init.kaiming_uniform_(drawn)  # variance 2 / d_sae
    sae.W_enc.copy_(drawn)
    sae.W_dec.copy_((drawn / drawn.norm(dim=0)).T)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    return sae


@torch.no_grad()
def init_sparse(sae: SparseAutoencoder, l0: int) -> SparseAutoencoder:
    """Scales ``W_enc`` so that top-AFA keeps about ``l0`` latents of an input that its directions do not know.

    Pre-activations of such an input x are normal with a standard deviation s * ||x||, s the mean norm of the encoder's
    columns over sqrt(d_in). The l0 largest of F of them have the energy ``F s^2 ||x||^2 (t phi(t) + Q(t))`` with
    ``Q(t) = l0 / F``; setting it to the target's, ``(target_scale ||x||)^2``, gives the scale. Decoder rows are taken
    to have one norm. Ours: the authors have no such option. Other parameters stay as they are.

    Args:
        l0: latents per token at the start, ``1 <= l0 < d_sae / 2``.

    Raises:
        TypeError: ``sae`` is no :class:`SparseAutoencoder`, or ``l0`` no integer.
        ValueError: its output is not as wide as its input, or ``l0`` is out of range.

    Example:
        >>> sae = init_sparse(se.SparseAutoencoder(64, 1024, se.TopAFA()), 16)
        >>> 8 < sae.encode(torch.randn(128, 64)).l0.float().mean() < 32
        tensor(True)
    """
    _require_square(sae)
    l0 = check.integer_k(l0, sae.d_sae, name="l0")
    if not 2 * l0 < sae.d_sae:
        raise ValueError(f"l0 must lie below half of d_sae = {sae.d_sae}, which is what is positive, got {l0}")
    normal, tail = NormalDist(), l0 / sae.d_sae
    t = normal.inv_cdf(1 - tail)
    energy = sae.d_sae * (t * normal.pdf(t) + tail)  # of the l0 largest of d_sae standard normal numbers
    norm = float(sae.W_dec.float().norm(dim=1).mean())
    spread = math.sqrt(float(sae.W_enc.float().square().mean()))  # of pre-activations, per unit of ||x||
    target = sae.activation.target_scale if isinstance(sae.activation, TopAFA) else 1.0
    sae.W_enc.mul_(target / (spread * norm * math.sqrt(energy)))
    return sae


def _require_square(sae: SparseAutoencoder) -> None:
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    if sae.d_in != sae.d_out:
        raise ValueError(f"sae must have d_out = d_in, got d_in={sae.d_in}, d_out={sae.d_out}")
