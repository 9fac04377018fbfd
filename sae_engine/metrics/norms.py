"""What a code's norm says of its input: the epsilon-LBO, the ZF plot, and truncated tails (CETT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from ..autoencoder import SparseAutoencoder, decoder_norms
from ..codes import SparseCodes
from .sparsity import check_codes, owned_entries

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BANDS = (0.25, 0.5, 1.0)
_GOLDEN = 0.6180339887498949


class EpsilonLBO:
    """How well a code's norm matches its input's: epsilon-LBO, and the points of the ZF plot.

    Per token ``eps = | ||z||^2 - ||f||^2 | / ((F - 1) ||f||^2)``, where z is the hidden state that the autoencoder is
    given, not centred by b_dec, and f the kept activations times the norms of their decoder rows, with ||b_dec|| as
    one entry more. The ZF plot shows ||f|| against ||z||, with bands ``||f|| = ||z|| / sqrt(1 +- eps (F - 1))``.

    eps is summed in fp64 over all tokens. The points, and the quantiles that are taken from them, are all tokens up to
    ``points``; of a longer stream about half as many or more, spread evenly over it by their position (a Weyl
    sequence), so that they do not depend on the batching either.

    Args:
        decoder_norm: (F,), norms of the decoder rows; ones where codes hold them already
            (``rescale_acts_by_decoder_norm``).
        b_dec: (d,), or None without.
        points: tokens to keep.

    Source: Lee et al. 2025, arXiv:2503.24277.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric = EpsilonLBO(torch.ones(3))
        >>> metric.update(se.SparseCodes.from_dense(torch.tensor([[3.0, 4.0, 0.0]])), torch.tensor([[0.0, 5.0]]))
        >>> metric.compute()["epsilon_lbo"]
        0.0
    """

    def __init__(self, decoder_norm: Tensor, b_dec: Tensor | None = None, *, points: int = 16384) -> None:
        check.floating("decoder_norm", decoder_norm, dims=1)
        if b_dec is not None:
            check.floating("b_dec", b_dec, dims=1)
        self._weights = decoder_norm.detach().double().square()[:, None]
        self._bias = self._weights.new_zeros(()) if b_dec is None else b_dec.detach().double().square().sum()
        self._bias = self._bias.to(self._weights.device)
        self.limit = check.integer_k(points, name="points")
        self.tokens = 0
        self._sum = self._weights.new_zeros(())
        self._share = 1.0
        self._parts: list[tuple[Tensor, Tensor]] = []  # positions (on the host) and points (n, 2) of the kept tokens

    @torch.no_grad()
    def update(self, codes: SparseCodes, z: Tensor, *, scale: Tensor | None = None) -> None:
        """Adds the tokens of ``codes``; ``z``: (*batch_shape, d), what they encode. May be empty.

        ``scale`` (*batch_shape,) is what each token was divided by before: the plot's norms are multiplied by it, which
        spreads out tokens that were normalized to one norm. No other result depends on it.
        """
        F = self._weights.shape[0]
        check_codes(codes, F)
        check.same_device("codes", codes.values, self._weights)
        check.floating("z", z)
        check.shaped("z", z, (*codes.batch_shape, z.shape[-1]), codes.values, why="one row per row of codes")
        if scale is not None:
            check.floating("scale", scale)
            check.shaped("scale", scale, codes.batch_shape, codes.values, why="one per row of codes")
        if codes.rows == 0:
            return
        squares = codes.replace(values=codes.values.double().square())
        f = functional.decode(squares, self._weights).flatten() + self._bias
        energy = check.matrix(z).double().square().sum(1)
        self._sum += ((energy - f).abs() / f).sum()
        positions = torch.arange(self.tokens, self.tokens + len(f), dtype=torch.float64, device="cpu")
        self.tokens += len(f)
        points = torch.stack([energy, f], 1).sqrt()
        self._keep(positions, points if scale is None else points * scale.double().reshape(-1, 1))

    def _keep(self, positions: Tensor, points: Tensor) -> None:
        """The choice is made on the host, from positions alone: the device is not waited for."""
        self._parts.append(self._chosen(positions, points))
        while sum(len(kept) for kept, _ in self._parts) > self.limit:
            self._share /= 2
            positions, points = (torch.cat(tensors) for tensors in zip(*self._parts, strict=True))
            self._parts = [self._chosen(positions, points)]

    def _chosen(self, positions: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (positions * _GOLDEN % 1 < self._share).nonzero().flatten()
        return positions[chosen], points[chosen.to(points.device, non_blocking=True)]

    def compute(self) -> dict[str, Any]:
        """Plain numbers; the stream may go on afterwards.

        ``tokens``; ``epsilon_lbo``: mean over tokens; ``epsilon_lbo_median``; ``norm_ratio_quantiles`` of ||f|| / ||z||
        by level (the papers' number is the median); ``bands``: for eps (F - 1) = 0.25, 0.5 and 1 the two ratios
        between which ||f|| / ||z|| lies (the upper is infinite at 1) and ``band_shares``, the shares of the points
        that do; ``zf_points``: pairs (||z||, ||f||), times the tokens' scale.

        Raises:
            RuntimeError: no token has been seen.
        """
        if not self.tokens:
            raise RuntimeError("nothing was measured: update() has seen no token")
        others = self._weights.shape[0] - 1
        points = torch.cat([points for _, points in self._parts]).cpu()
        scaled = ((points[:, 0] / points[:, 1]).square() - 1).abs()  # eps (F - 1)
        levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
        ratios = (points[:, 1] / points[:, 0]).quantile(levels).tolist()
        return {
            "tokens": self.tokens,
            "epsilon_lbo": _over(self._sum.item() / self.tokens, others),
            "epsilon_lbo_median": _over(scaled.quantile(0.5).item(), others),
            "norm_ratio_quantiles": dict(zip(QUANTILES, ratios, strict=True)),
            "bands": {e: ((1 + e) ** -0.5, (1 - e) ** -0.5 if e < 1 else torch.inf) for e in BANDS},
            "band_shares": {e: (scaled <= e).double().mean().item() for e in BANDS},
            "zf_points": points.tolist(),
        }


def _over(value: float, count: int) -> float:
    return value / count if count else float("nan")


class TailTruncation:
    """CETT: what leaving out small contributions costs, at several thresholds.

    A latent's contribution to a token is ``value * W_dec[latent]``; a threshold drops those of smaller norm. CETT
    (cumulative errors of tail truncation) is the norm of the dropped sum over the norm of the whole sum, mean over
    tokens; a token whose sum is 0 counts as 0. b_dec is no contribution. Summed in fp64.

    Args:
        W_dec: (F, d), the rows that the values multiply (unit rows where codes hold their norms).
        thresholds: ascending norms, at least one.

    Source: Luo et al. 2024, arXiv:2411.02335 (Sparsing Law), for the neurons of an MLP; taken to autoencoders here.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric = TailTruncation(torch.eye(2), [2.0])
        >>> metric.update(se.SparseCodes.from_dense(torch.tensor([[1.0, 3.0]])))
        >>> metric.compute()["l0_kept"]
        [1.0]
    """

    def __init__(self, W_dec: Tensor, thresholds: Sequence[float]) -> None:
        check.floating("W_dec", W_dec, dims=2)
        self.thresholds = [float(check.positive("thresholds", t)) for t in thresholds]
        if not self.thresholds or any(a >= b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)):
            raise ValueError(f"thresholds must be ascending numbers, at least one, got {self.thresholds}")
        self._rows = W_dec.detach()
        self._norms = self._rows.to(torch.promote_types(W_dec.dtype, torch.float32)).norm(dim=1)
        self._errors = torch.zeros(len(self.thresholds), dtype=torch.float64, device=W_dec.device)
        self._kept = torch.zeros(len(self.thresholds) + 1, dtype=torch.int64, device=W_dec.device)
        self.tokens = 0

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Adds the tokens of ``codes``. May be empty. One decode for each threshold."""
        check_codes(codes, self._rows.shape[0])
        if codes.rows == 0:
            return
        owned, indices = owned_entries(codes)
        values = torch.where(owned, codes.values, 0.0)
        magnitudes = values.abs() * self._norms[indices]
        whole = self._norm(codes, values)
        self._kept[-1] += (values != 0).sum()
        for place, threshold in enumerate(self.thresholds):
            dropped = magnitudes < threshold
            error = self._norm(codes, torch.where(dropped, values, 0.0))
            nothing = (error == 0) & (whole == whole)  # dropped; NaN stays
            self._errors[place] += torch.where(nothing, 0.0, error / whole).sum()
            self._kept[place] += ((values != 0) & ~dropped).sum()
        self.tokens += codes.rows

    def _norm(self, codes: SparseCodes, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return functional.decode(codes.replace(values=values), self._rows).flatten(0, -2).double().norm(dim=1)

    def compute(self) -> dict[str, Any]:
        """Plain numbers: ``tokens``, ``l0`` of the codes, and by threshold ``thresholds``, ``cett``, ``l0_kept`` and
        ``off``, the share of the d_sae latents that is off on average.

        Raises:
            RuntimeError: no token has been seen.
        """
        if not self.tokens:
            raise RuntimeError("nothing was measured: update() has seen no token")
        *kept, every = (self._kept.double() / self.tokens).tolist()
        return {
            "tokens": self.tokens, "l0": every, "thresholds": list(self.thresholds),
            "cett": (self._errors / self.tokens).tolist(), "l0_kept": kept,
            "off": [1 - l0 / self._rows.shape[0] for l0 in kept],
        }  # fmt: skip


def contributing_rows(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """Norms (F,) and rows (F, d) that the values of the codes multiply."""
    rows = sae.W_dec.detach()
    norms = decoder_norms(rows)
    if sae.rescale_acts_by_decoder_norm:  # the codes hold the norms
        rows = (rows / torch.where(norms == 0, 1.0, norms)[:, None]).to(rows.dtype)
        norms = torch.ones_like(norms)
    return norms, rows
