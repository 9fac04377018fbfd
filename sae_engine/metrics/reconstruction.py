"""Reconstruction error over a stream of batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

CHUNK_ELEMENTS = 1 << 22  # of the fp64 temporaries


class Reconstruction:
    """How far reconstructions lie from their inputs.

    Everything is summed in fp64 on the device of the inputs, each token alone and variances by merging centred sums
    (Chan et al.), so the order and the batching of the stream change results by roundings of fp64 only. Nothing waits
    for the device before :meth:`compute`.

    Args:
        space: what ``x`` and ``x_hat`` are, in words ("raw", "per-token normalized" …): errors in two spaces do not
            compare, so every table has to name it.
        centre: (d,), a fixed mean for ``explained_variance_per_token``. Each token's ratio needs the mean before the
            stream has ended; where the literature takes the batch's own, results depend on the batching.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: ``compute()`` before any token was seen.

    Example:
        >>> metric, x = Reconstruction(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric.update(x / 2, x)
        >>> found = metric.compute()
        >>> found["mse"], found["squared_error"], found["fvu"]
        (0.125, 0.25, 0.25)
    """

    def __init__(self, *, space: str = "raw", centre: Tensor | None = None) -> None:
        if not isinstance(space, str):
            raise TypeError(f"space must be a string that names the space, got {space!r}")
        if centre is not None:
            check.floating("centre", centre, dims=1)
        self.space, self.centre = space, centre
        self.tokens, self.d = 0, 0

    @torch.no_grad()
    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Adds tokens. ``x_hat`` and ``x``: (*batch_shape, d), any floating dtypes, on one device. May be empty."""
        check.floating("x", x)
        check.floating("x_hat", x_hat)
        check.shaped("x_hat", x_hat, x.shape, x, why="that of x")
        d = x.shape[-1]
        if self.tokens and d != self.d:
            raise ValueError(f"x must have d = {self.d} in its last dimension, as before, got {tuple(x.shape)}")
        if self.centre is not None:
            check.shaped("centre", self.centre, (d,), x, why="one per dimension of x")
        x, x_hat = check.matrix(x), check.matrix(x_hat)
        if x.numel() == 0:
            return
        if not self.tokens:
            self.d = d
            self._sums = torch.zeros(8, dtype=torch.float64, device=x.device)
            self._spread, self._error_spread = _Spread(x), _Spread(x)
        rows = max(CHUNK_ELEMENTS // d, 1)
        for start in range(0, len(x), rows):
            self._add(x_hat[start : start + rows].double(), x[start : start + rows].double())

    def _add(self, x_hat: Tensor, x: Tensor) -> None:
        error = x_hat - x
        squared, energy, energy_hat = (t.square().sum(1) for t in (error, x, x_hat))
        product, norm, norm_hat = (x * x_hat).sum(1), energy.sqrt(), energy_hat.sqrt()
        distance = energy if self.centre is None else (x - self.centre.double()).square().sum(1)
        self._sums += torch.stack([
            squared.sum(), energy.sum(), energy_hat.sum(), product.sum(), (squared / energy).sum(),
            (squared / distance).sum(), (product / (norm * norm_hat)).sum(), (norm_hat / norm).sum(),
        ])  # fmt: skip
        self._spread.update(x)
        self._error_spread.update(error)
        self.tokens += len(x)

    def compute(self) -> dict[str, Any]:
        """Plain numbers; the stream may go on afterwards.

        ``space``, ``tokens``, ``d``;
        ``mse``: squared error per element; ``squared_error``: the same summed over d, per token;
        ``nmse``: all squared error over all squared norm; ``nmse_per_token``: mean of each token's ratio;
        ``fvu``: squared error over the squared distance from the stream's mean; ``explained_variance``: 1 - fvu (Gao et
        al. 2024; SAELens' ``explained_variance``);
        ``explained_variance_centred``: 1 - variance of the error over variance of x, which forgives a constant offset
        (dictionary_learning's ``frac_variance_explained``, there batch by batch);
        ``explained_variance_per_token``: mean over tokens of 1 - squared error over squared distance from ``centre``
        (SAELens' ``explained_variance_legacy``, there about each batch's mean); None without ``centre``;
        ``cosine``: mean over tokens; ``l2_ratio``: mean of ||x_hat|| / ||x||; ``relative_bias``: sum ||x_hat||^2 over
        sum <x_hat, x> (Rajamanoharan et al. 2024, arXiv:2404.16014, equation 10).

        NaN anywhere in the stream makes the results NaN, and 0/0 (a token that is all zeros, a constant stream) does
        the same to the ratios that it enters.

        Raises:
            RuntimeError: no token has been seen.
        """
        if not self.tokens:
            raise RuntimeError("nothing was measured: update() has seen no token")
        n, sums = self.tokens, self._sums
        squared, energy, energy_hat, product, per_token, per_distance, cosine, ratio = sums.unbind()
        variance, error_variance = self._spread.total(), self._error_spread.total()
        values = torch.stack([
            squared / (n * self.d), squared / n, squared / energy, per_token / n, squared / variance,
            1 - squared / variance, 1 - error_variance / variance, 1 - per_distance / n, cosine / n, ratio / n,
            energy_hat / product,
        ]).tolist()  # fmt: skip
        names = ("mse", "squared_error", "nmse", "nmse_per_token", "fvu", "explained_variance",
                 "explained_variance_centred", "explained_variance_per_token", "cosine", "l2_ratio",
                 "relative_bias")  # fmt: skip
        result = {"space": self.space, "tokens": n, "d": self.d, **dict(zip(names, values, strict=True))}
        if self.centre is None:
            result["explained_variance_per_token"] = None
        return result


class _Spread:
    """Squared distances from the mean, one sum a dimension, merged batch by batch without cancellation."""

    def __init__(self, x: Tensor) -> None:
        self.count = 0
        self.mean, self.spread = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(2))

    def update(self, x: Tensor) -> None:
        """x: (n, d) fp64, n > 0."""
        mean = x.mean(0)
        step, count = mean - self.mean, self.count + len(x)
        self.spread += (x - mean).square().sum(0) + step.square() * (self.count * len(x) / count)
        self.mean += step * (len(x) / count)
        self.count = count

    def total(self) -> Tensor:
        return self.spread.sum()
