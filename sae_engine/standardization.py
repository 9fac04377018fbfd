"""Sites on one scale: what a cross-layer coder is trained on, and its weights for activations as the model has them."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks as check
from ._wiring import widths_of
from .crosscoder import Crosscoder
from .distributed import passes

__all__ = ["Standardization", "fold_standardization"]


@dataclass(frozen=True, eq=False)
class Standardization:
    """Activations of several sites less a fixed mean, times one number a site: errors of all sites then count alike.

    Residual streams grow from layer to layer, so that without it a sum of errors is that of the last layers.

    Args:
        widths: of the sites, which lie side by side.
        mean: (sum of widths,).
        scale: (sites,), positive.

    Source: Lindsey et al. 2024, Ameisen et al. 2025.

    Raises:
        TypeError, ValueError: an argument is of another kind, shape or sign; names it.

    Example:
        >>> x = torch.randn(1000, 6) * torch.tensor([1.0, 1.0, 1.0, 50.0, 50.0, 50.0]) + 3
        >>> standard = Standardization.of(x, [3, 3])
        >>> [round(float(part.std()), 1) for part in standard(x).split(3, dim=1)]
        [1.0, 1.0]
        >>> torch.allclose(standard.undo(standard(x)), x, atol=1e-4)
        True
    """

    widths: tuple[int, ...]
    mean: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", widths_of("widths", self.widths))
        check.floating("mean", self.mean, dims=1)
        check.shaped("mean", self.mean, (sum(self.widths),), self.mean, why="one a column of all sites")
        check.floating("scale", self.scale, dims=1)
        check.shaped("scale", self.scale, (len(self.widths),), self.mean, why="one a site")
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise ValueError(f"scale must be positive and finite, got {self.scale.tolist()}")

    @classmethod
    def of(cls, x: Tensor, widths: Sequence[int]) -> Standardization:
        """From activations: their mean, and by site one over the root mean square of what is left.

        Args:
            x: ``(*batch_shape, sum of widths)``, or ``(*batch_shape, sites, d)``.
            widths: of the sites.

        Raises:
            TypeError, ValueError: an argument is of another kind or shape, or a site does not vary; names it.

        Example:
            >>> Standardization.of(torch.tensor([[1.0], [3.0]]), [1]).scale
            tensor([1.])
        """
        widths = widths_of("widths", widths)
        check.floating("x", x)
        if tuple(x.shape[-2:]) == (len(widths), widths[0]) and x.shape[-1] != sum(widths):
            x = x.flatten(-2)
        if x.shape[-1] != sum(widths) or x.numel() == 0:
            raise ValueError(f"x must be (*batch_shape, {sum(widths)}) with a token at least, got {tuple(x.shape)}")
        rows = check.matrix(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
        mean = rows.mean(0)
        power = torch.stack([part.square().mean() for part in (rows - mean).split(widths, dim=1)])
        if not bool(((power > 0) & power.isfinite()).all()):
            raise ValueError(f"x must vary at each site and be finite, its mean squares are {power.tolist()}")
        return cls(widths, mean, power.rsqrt())

    @property
    def columns(self) -> Tensor:
        """(sum of widths,) the scale of each column."""
        widths = torch.tensor(self.widths, device=self.scale.device)
        return torch.repeat_interleave(self.scale, widths, output_size=sum(self.widths))

    def __call__(self, x: Tensor) -> Tensor:
        """Standardised activations (*batch_shape, sum of widths), in the dtype of ``x``."""
        wide = torch.promote_types(x.dtype, self.mean.dtype)
        return ((x.to(wide) - self.mean) * self.columns).to(x.dtype)

    def undo(self, y: Tensor) -> Tensor:
        """The inverse: ``(*batch_shape, sum of widths)`` as the model has them, in the dtype of ``y``."""
        return (y.to(torch.promote_types(y.dtype, self.mean.dtype)) / self.columns + self.mean).to(y.dtype)


    def inverse(self) -> Standardization:
        """What takes standardised activations back, as a standardisation: to fold a coder for them.

        Example:
            >>> standard = Standardization.of(torch.tensor([[1.0], [5.0]]), [1])
            >>> standard.inverse()(standard(torch.tensor([[3.0], [4.0]]))).tolist()
            [[3.0], [4.0]]
        """
        return Standardization(self.widths, -self.mean * self.columns, 1 / self.scale)


@torch.no_grad()
def fold_standardization(
    coder: Crosscoder, reads: Standardization, writes: Standardization | None = None
) -> Crosscoder:
    """A copy for activations as the model has them, of a coder that was trained on standardised ones.

    Its codes are those of ``coder`` on ``reads(x)``, its output is ``writes.undo`` of the coder's. Weights are folded
    in fp64 and rounded once. Of a coder on a mesh the copy lies there, too.

    Args:
        coder: trained on ``reads(x)`` to reconstruct ``writes(y)``.
        reads: of the sites that are read.
        writes: of those that are reconstructed; those that are read by default.

    Raises:
        TypeError: ``coder`` is no :class:`Crosscoder`.
        ValueError: widths are others, or the coder ranks by decoder norms, which scales by site change.

    Example:
        >>> clt, x = se.Crosscoder.clt(2, 4, 16, se.TopK(2)), 100 * torch.randn(50, 8)
        >>> standard = Standardization.of(x, [4, 4])
        >>> raw = fold_standardization(clt, standard)
        >>> torch.allclose(raw(x), standard.undo(clt(standard(x))), atol=1e-2)
        True
    """
    if not isinstance(coder, Crosscoder):
        raise TypeError(f"coder must be a Crosscoder, got {type(coder).__name__}")
    writes = reads if writes is None else writes
    for name, given, widths in (("reads", reads, coder.read_widths), ("writes", writes, coder.written_widths)):
        if given.widths != widths:
            raise ValueError(f"{name} must have the widths {widths} of the coder, got {given.widths}")
    if coder.rescale_acts_by_decoder_norm:
        raise ValueError("rescale_acts_by_decoder_norm must be False: scales by site would change the norms that the "
                         "coder ranks by")  # fmt: skip
    folded = copy_of(coder)
    trained, share = coder.share, folded.share
    into, out_of = reads.columns.double(), writes.columns.double()
    shift = reads.mean.double() * into
    b_dec = trained.b_dec.double() / out_of + writes.mean.double()
    for source, new in zip(trained.sources, share.sources, strict=True):
        W_enc = source.W_enc.double()
        new.b_enc.copy_(source.b_enc.double() - shift[source.reads] @ W_enc)
        new.W_enc.copy_(into[source.reads, None] * W_enc)
        new.W_dec.copy_(source.W_dec.double() / out_of[source.writes])
    for (weight, read, written), (new_weight, *_) in zip(trained._skips(), share._skips(), strict=True):
        scaled = weight.double() / out_of[written, None]
        b_dec[written] -= scaled @ shift[read]
        new_weight.copy_(scaled * into[read])
    share.b_dec.copy_(b_dec)
    return folded


def copy_of(coder: Crosscoder) -> Crosscoder:
    """With tensors of its own; of one on a mesh there."""
    return copy.deepcopy(coder) if coder.shards is None else passes.copied(coder)
