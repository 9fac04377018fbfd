"""Whether several language models take the same token ids: then a row of each is of the same token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .models import LanguageModel, vocabulary_size


def check_same_tokens(lms: Sequence[LanguageModel]) -> None:
    """That all of ``lms`` have one tokenizer, by its vocabulary; without tokenizers, as many tokens.

    A base model and what was made of it by further training usually share one. A few tokens that only one of them
    knows are a difference as well: text that holds them would be other tokens to the other.

    Raises:
        TypeError: one is no :class:`LanguageModel`.
        ValueError: vocabularies differ: says in how many tokens, and names one.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> check_same_tokens([lm, lm])
    """
    for lm in lms:
        if not isinstance(lm, LanguageModel):
            raise TypeError(f"models must hold LanguageModels (see load_language_model), got {type(lm).__name__}")
    for other in lms[1:]:
        first = lms[0]
        names = f"{first.name!r} and {other.name!r}"
        if first.tokenizer is None or other.tokenizer is None:
            if vocabulary_size(first) != vocabulary_size(other):
                sizes = vocabulary_size(first), vocabulary_size(other)
                raise ValueError(f"models must share a tokenizer: {names} have {sizes[0]} and {sizes[1]} tokens")
            continue
        one, two = _vocabulary(first.tokenizer), _vocabulary(other.tokenizer)
        if one != two:
            differing = sorted(word for word in one.keys() | two.keys() if one.get(word) != two.get(word))
            word = differing[0]
            raise ValueError(
                f"models must share a tokenizer: {len(differing)} tokens of {names} differ, as {word!r}, which is "
                f"{one.get(word, 'none')} and {two.get(word, 'none')}"
            )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab())
