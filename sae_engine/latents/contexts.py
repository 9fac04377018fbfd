"""The contexts in which a latent fires most."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel
from .features import collect
from .stored import Features


@dataclass(frozen=True)
class Context:
    """Some tokens of a text around one on which a latent fires.

    Attributes:
        latent: which.
        activation: at the token in the middle of it, the largest in the model's context.
        token: that token's number among all tokens of the features.
        peak: its place in the tensors below.
        document: the number of its document.
        token_ids, activations, positions: (tokens,): the tokens, the latent's activations, 0 where it does not fire,
            and the places in the context that the model saw.
        tokens: the tokens as text; None without a tokenizer.

    Example:
        >>> context = Context(3, 1.5, 7, 1, 0, torch.tensor([5, 6]), torch.tensor([0.0, 1.5]), torch.tensor([6, 7]),
        ...                   ("sat", " down"))
        >>> print(context)
        1.500  sat« down»
    """

    latent: int
    activation: float
    token: int
    peak: int
    document: int
    token_ids: Tensor
    activations: Tensor
    positions: Tensor
    tokens: tuple[str, ...] | None = None

    def __str__(self) -> str:
        words = self.tokens or tuple(f"[{token}]" for token in self.token_ids.tolist())
        marked = (f"«{word}»" if index == self.peak else word for index, word in enumerate(words))
        return f"{self.activation:.3f}  " + "".join(marked).replace("\n", "↵")


def max_activating(
    features: Features | SparseAutoencoder,
    latent: int,
    n: int = 10,
    *,
    window: int = 40,
    tokenizer: Any = None,
    lm: LanguageModel | None = None,
    documents: Iterable[Any] | None = None,
    **options: Any,
) -> list[Context]:
    """The contexts in which a latent fires most, the largest activation (by magnitude) first.

    A context is what the model saw at once; of each, the token with the largest activation counts, and tokens around
    it are shown. Equal activations come in the order of the text, so that the same features give the same list.

    Args:
        features: what :func:`collect` wrote; or an autoencoder, with ``lm`` and ``documents``, which are then encoded
            to a temporary folder.
        latent: which latent.
        n: how many contexts; fewer come where it fires in fewer.
        window: tokens that are shown, three quarters of them before the peak where the context reaches so far.
        tokenizer: makes text of the tokens; that of ``lm``.
        lm, documents, options: as :func:`collect` has them, where ``features`` is an autoencoder.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> lm = se.data.load_language_model()
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> texts = ["A text about cats.", "Another text."]
        >>> place = {"layer": 2, "site": "resid_post"}
        >>> latent = int(sae.encode(se.data.read_activations(lm.model, torch.tensor([[5, 6]]), **place)).indices[-1])
        >>> found = se.max_activating(sae, latent, 3, lm=lm, documents=texts, **place)
        >>> sorted(c.activation for c in found) == [c.activation for c in found][::-1]
        True
    """
    if isinstance(features, SparseAutoencoder):
        if lm is None or documents is None:
            missing = "lm" if lm is None else "documents"
            raise TypeError(f"{missing} must be given with an autoencoder; or give the Features that collect() wrote")
        with tempfile.TemporaryDirectory() as folder:
            found = collect(features, lm, documents, folder, **{"progress": False, **options})
            return max_activating(found, latent, n, window=window, tokenizer=tokenizer or lm.tokenizer)
    if not isinstance(features, Features):
        raise TypeError(f"features must be Features or a SparseAutoencoder, got {type(features).__name__}")
    if unknown := [*options, *(name for name, value in (("documents", documents),) if value is not None)]:
        raise TypeError(f"{unknown[0]} is for an autoencoder; features are encoded already")
    n, window = check_int("n", n, 1), check_int("window", window, 1)
    tokenizer = tokenizer or (None if lm is None else lm.tokenizer)
    tokens, values = features.by_latent(latent)
    order = values.float().abs().sort(descending=True, stable=True).indices  # tokens ascend, so ties stay in text order
    contexts: list[Context] = []
    while len(order) and len(contexts) < n:
        token = int(tokens[order[0]])
        first, last = _bounds(features, token)
        contexts.append(_context(features, latent, token, (first, last), window, (tokens, values), tokenizer))
        at = tokens[order]
        order = order[(at < first) | (at >= last)]
    return contexts


def _bounds(features: Features, token: int) -> tuple[int, int]:
    """The first token of the model's context, and the first behind it."""
    first = token - int(features.tokens(token, token + 1).positions)
    length = features.manifest["context_length"]
    positions = features.tokens(token, min(first + length, len(features))).positions
    ends = (positions[1:] == 0).nonzero()
    return first, token + (1 + int(ends[0]) if len(ends) else len(positions))


def _context(
    features: Features, latent: int, token: int, bounds: tuple[int, int], window: int,
    entries: tuple[Tensor, Tensor], tokenizer: Any,
) -> Context:  # fmt: skip
    first, last = bounds
    start = max(first, min(token - window * 3 // 4, last - window))
    stop = min(start + window, last)
    found = features.tokens(start, stop)
    tokens, values = entries
    low, high = torch.searchsorted(tokens, torch.tensor([start, stop], device="cpu")).tolist()
    activations = torch.zeros(stop - start, device="cpu")
    activations[tokens[low:high] - start] = values[low:high].float()
    text = None if tokenizer is None else tuple(tokenizer.decode([t]) for t in found.token_ids.tolist())
    return Context(
        latent=latent, activation=float(activations[token - start]), token=token, peak=token - start,
        document=int(found.documents[token - start]), token_ids=found.token_ids, activations=activations,
        positions=found.positions, tokens=text,
    )  # fmt: skip
