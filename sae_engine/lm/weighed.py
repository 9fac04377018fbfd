"""Rules that keep what is large: by a threshold a layer, or by a share of each token's entries."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import functional
from ..data.models import LanguageModel
from .files import read, save
from .fit import fit
from .rules import Learned, Weighed

R = TypeVar("R", bound="_Fitted")


class _Fitted(Weighed):
    """What both rules can do."""

    def fit(
        self: R, lm: LanguageModel | nn.Module, texts: Iterable[Any], *, at: str = "gate",
        layers: Iterable[int] | None = None, tokens: int = 65_536, context_length: int | None = None,
        batch_size: int = 8,
    ) -> R:  # fmt: skip
        """Learns what it needs of each layer from a language model that runs on texts; the model is left as it was.

        All layers learn from the plain model. Scores are counted in 2^16 bins of their fp32 bits, so that no
        activations are kept; there are up to three passes over the texts, whose token ids are held in memory.

        Args:
            lm: with its tokenizer, or a model where texts are token ids. Not one that is sparsified already.
            texts: strings, or one-dimensional tensors of token ids.
            at: ``"gate"``, the activated gate of gated MLPs: rows of W_up and columns of W_down are skipped;
                ``"hidden"``, the input of an MLP's last matrix; ``"inputs"``, those of every linear layer of a block.
            layers: numbers of the blocks; default all.
            tokens: of the texts, all positions.
            context_length, batch_size: as :func:`sae_engine.data.stream_activations`.

        Returns:
            the rule itself.

        Raises:
            CannotAccelerate (a TypeError): nothing in the model can be taken so; says why.
            ValueError, TypeError: an argument is out of range, or weighs what is not there.
            RuntimeError: the texts hold no token.

        Example:
            >>> from sae_engine.data import evaluation_text, load_language_model
            >>> lm = load_language_model()
            >>> rule = se.lm.Threshold(0.5).fit(lm, evaluation_text()[:1], at="hidden", tokens=256)
            >>> len(rule.layers)
            4
        """
        return fit(self, lm, texts, at=at, layers=layers, tokens=tokens, context_length=context_length,
                   batch_size=batch_size)  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Writes ``activation_sparsity.json`` and ``.safetensors``, which :func:`load` reads.

        Raises:
            RuntimeError: the rule has not been fitted, and there is nothing to save.
            OSError: the folder cannot be written.

        Example:
            >>> rule.save("somewhere")  # doctest: +SKIP
        """
        save(self, folder)


@dataclass
class Threshold(_Fitted):
    """Keeps an entry where ``|p_i| * c_i > tau``, tau a quantile over the layer's calibration tokens.

    ===============  =======================================  ==========================================
    ``weigh``        c_i                                      the published rule
    ===============  =======================================  ==========================================
    ``""``           1                                        CATS (at the gate), TEAL (at the inputs)
    ``"up"``         mean of abs(u_i) over tokens              CHESS (at the gate)
    ``"up_rms"``     root of the mean of u_i^2
    ``"down"``       norm of the vector that i multiplies     Sparsing Law (hidden), WINA (inputs)
    ``"up*down"``    mean of abs(u_i) times that norm
    ===============  =======================================  ==========================================

    u is W_up x of a gated MLP. NaN is kept.

    Args:
        sparsity: share of a layer's entries that are dropped, in [0, 1); 0.9 keeps a tenth.
        weigh: see above.
        compensate: a dropped contribution counts as its mean over the calibration tokens where it was dropped, in place
            of 0. It costs no byte more, since the sum of the means is a bias.
        straight_through: where gradients are taken, they pass dropped entries as well.

    Source: Lee et al. 2024, arXiv:2404.08763 (CATS); He et al. 2024, arXiv:2409.01366 (CHESS); Liu et al. 2024,
    arXiv:2408.14690 (TEAL); Luo et al. 2024, arXiv:2411.02335 (Sparsing Law).

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> Threshold(0.5, weigh="down").needs_fit
        True
    """

    FITS: ClassVar[bool] = True

    def select(self, p: Tensor, learned: Learned) -> tuple[Tensor, Tensor]:
        assert learned.threshold is not None
        return self.finish(p, (learned.score(p.detach()) <= learned.threshold).logical_not_())


@dataclass
class TopShare(_Fitted):
    """Keeps the same number of entries of each token: the largest by ``|p_i| * c_i``, ties to the lower index.

    Arguments and weights as of :class:`Threshold`; of F entries ``round((1 - sparsity) * F)`` are kept, at least one.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Source: Chen et al. 2025, arXiv:2505.19427 (WINA, with ``weigh="down"``); Wang et al. 2024, arXiv:2407.10969
    (Q-Sparse, with ``straight_through``).

    Example:
        >>> TopShare(0.75).select(torch.tensor([[1.0, -4.0, 2.0, 3.0]]), None)[0]
        tensor([[ 0., -4.,  0.,  0.]])
    """

    FITS: ClassVar[bool] = False

    def select(self, p: Tensor, learned: Learned) -> tuple[Tensor, Tensor]:
        score = (learned or Learned()).score(p.detach())
        k = max(round((1 - self.sparsity) * p.shape[-1]), 1)
        codes = functional.topk(p.detach(), k, score=score, relu=False)
        kept = codes.replace(values=torch.ones_like(codes.values)).to_dense() != 0
        return self.finish(p, kept)


RULES: dict[str, type[Weighed]] = {"Threshold": Threshold, "TopShare": TopShare}


def load(folder: str | Path) -> Weighed:
    """A rule from the files that its ``save`` has written.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, or of a later version; names it.

    Example:
        >>> import tempfile
        >>> from sae_engine.data import evaluation_text, load_language_model
        >>> rule = se.lm.TopShare(0.5, weigh="down")
        >>> rule = rule.fit(load_language_model(), evaluation_text()[:1], at="hidden", tokens=32, context_length=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rule.save(folder)
        ...     se.lm.load(folder) == rule
        True
    """
    return read(folder, RULES)
