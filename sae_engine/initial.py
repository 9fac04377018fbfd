"""Initial values: b_dec and b_enc from activations, and the weights of top-AFA autoencoders."""
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from statistics import NormalDist

import torch
from torch import Tensor

from . import _checks as check
from . import functional
from .autoencoder import SparseAutoencoder
from .crosscoder import Crosscoder
from .rules import JumpReLU, TopAFA
from .rules.per_source import rule_of

MEDIAN_ITERATIONS, MEDIAN_TOLERANCE = 100, 1e-6
MOST_ROWS, MOST_NUMBERS = 8192, 1 << 24  # that are looked at, and pre-activations that exist at a time


@torch.no_grad()
def geometric_median(x: Tensor, reduce: Callable[[Tensor], object] | None = None) -> Tensor:
    """(d,) the point whose distances to the rows of ``x`` (tokens, d) have the smallest sum, in fp32 or wider.

    Where the decoder's bias starts: unlike the mean it does not follow a few giant activations. By Weiszfeld's
    iteration from the mean, until a step moves it by less than 1e-6 of its distance from the rows, at most 100 times.

    Args:
        reduce: sums a tensor over processes that hold other rows, in place; all of them get the same point.

    Raises:
        TypeError: ``x`` is no floating-point matrix.
        ValueError: it has no row.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [900.0, 0.5]])
        >>> bool(geometric_median(rows)[0] < 2)
        True
    """
    check.floating("x", x, dims=2)
    if not len(x):
        raise ValueError("x must hold at least one row, got none")
    rows = x.to(torch.promote_types(x.dtype, torch.float32))

    def weighted(weights: Tensor) -> tuple[Tensor, Tensor]:
        """The mean under these weights (tokens,), and their sum."""
        sums = torch.cat([weights @ rows, weights.sum()[None]]).double()
        if reduce is not None:
            reduce(sums)
        return (sums[:-1] / sums[-1]).to(rows.dtype), sums[-1]

    median, count = weighted(rows.new_ones(len(rows)))
    for _ in range(MEDIAN_ITERATIONS):
        distances = (rows - median).norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny ** 0.5)
        moved, inverse = weighted(1 / distances)
        step, spread = (moved - median).norm().double(), count / inverse
        median = moved
        if bool(step <= MEDIAN_TOLERANCE * spread):
            break
    return median


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
    norms, energies = sae.share.W_dec.float().norm(dim=1), sae.share.W_enc.float().square()
    if sae.shards is not None:
        norms, energies = (sae.shards.all_latents(of_mine, "scale") for of_mine in (norms, energies.mean(0)))
    norm = float(norms.mean())
    spread = math.sqrt(float(energies.mean()))  # of pre-activations, per unit of ||x||
    target = sae.activation.target_scale if isinstance(sae.activation, TopAFA) else 1.0
    sae.W_enc.mul_(target / (spread * norm * math.sqrt(energy)))
    return sae


@torch.no_grad()
def init_firing(sae: SparseAutoencoder, x: Tensor, l0: int) -> SparseAutoencoder:
    """Sets ``b_enc`` so that each latent exceeds its threshold in ``l0 / d_sae`` of the rows of ``x``, one at least.

    So cross-layer transcoders start, where latents that read little would otherwise never fire and others always. Of
    many rows at most 8,192 are looked at, spread evenly. On a mesh every rank brings rows of its own, and all of them
    count, one rank's below another's.

    Args:
        sae: with a :class:`JumpReLU` as its rule, a :class:`Crosscoder` also with one for each source.
        x: (tokens, d_in), as ``sae`` takes it; of a crosscoder, all sites side by side.
        l0: latents a token at the start, of each source; ``1 <= l0 < d_sae``.

    Source: CLT-Forge's code; the thresholds are those of Ameisen et al. 2025 (Circuit Tracing).

    Raises:
        TypeError: ``sae`` is no :class:`SparseAutoencoder`, its rule no :class:`JumpReLU`, or ``x`` no float matrix.
        ValueError: ``l0`` is out of range, ``x`` has another width, or there are fewer than two rows.

    Example:
        >>> sae, x = se.SparseAutoencoder(8, 64, se.JumpReLU(64)), torch.randn(256, 8)
        >>> init_firing(sae, x, 4).encode(x).l0.float().mean()
        tensor(4.)
    """
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    l0 = check.integer_k(l0, name="l0")
    if l0 >= sae.d_sae:
        raise ValueError(f"l0 must lie below d_sae = {sae.d_sae}, got {l0}")
    share = sae.share
    for number in range(len(sae.sources)):
        rule = rule_of(share.activation, number)
        if not isinstance(rule, JumpReLU):
            raise TypeError(f"sae must have a JumpReLU as its rule, got {rule!r}")
    x = _some_of_all(sae, sae._normalized(check.floating("x", x, dims=2))[0])
    x = x - share.b_dec if sae.apply_b_dec_to_input else x
    firing = min(max(round(l0 / sae.d_sae * len(x)), 1), len(x) - 1)
    for number, source in enumerate(share.sources):
        theta = rule_of(share.activation, number)._theta()  # type: ignore[operator]
        for latents in torch.arange(share.d_sae, device="cpu").split(max(MOST_NUMBERS // len(x), 1)):
            some = slice(int(latents[0]), int(latents[-1]) + 1)
            pre = functional.linear(x[:, source.reads], source.W_enc[:, some]).T.contiguous()
            below, above = (pre.kthvalue(len(x) - firing + n, dim=1).values for n in (0, 1))  # at the border
            source.b_enc[some] = (theta[some] - (below + above) / 2).to(source.b_enc.dtype)
    return sae


def _some_of_all(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """At most ``MOST_ROWS`` of the rows of all ranks, spread evenly."""
    shards, every = sae.shards, [len(x)]
    if shards is not None:
        shards.begin(len(x))
        every = shards.every_rows
    if sum(every) < 2:
        raise ValueError(f"x must have at least two rows, got {sum(every)}")
    apart = -(-sum(every) // MOST_ROWS)
    if shards is None:
        return x[::apart]
    firsts = [-before % apart for before in accumulate(every, initial=0)]  # of each rank's rows, the first to look at
    mine = x[firsts[shards.everyone.rank] :: apart]
    looked_at = [len(range(first, rows, apart)) for first, rows in zip(firsts, every, strict=False)]
    return shards.everyone.gather_rows(mine, looked_at, "first rows")


def _require_square(sae: SparseAutoencoder) -> None:
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
    if isinstance(sae, Crosscoder):
        raise TypeError("sae must be an autoencoder of one site: a Crosscoder has initial weights of its own")
    if sae.d_in != sae.d_out:
        raise ValueError(f"sae must have d_out = d_in, got d_in={sae.d_in}, d_out={sae.d_out}")
