"""Whether several language models take the same token ids: then a row of each is of the same token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .models import LanguageModel, vocabulary_size


def check_same_tokens(lms: Sequence[LanguageModel]) -> None:
    """Checks that all of ``lms`` have one tokenizer, by its vocabulary, or, without tokenizers, as many tokens.

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


def together(*lms: LanguageModel) -> LanguageModel:
    """The first of several language models, which reads the others too: crosscoders of several models are made so.

    A site of the second is spelled ``blocks.3.hook_resid_post@1``, of the third with ``@2``. Text becomes tokens by the
    first one's tokenizer, and every model is given these.

    Raises:
        TypeError: one is no :class:`LanguageModel`.
        ValueError: they do not share a tokenizer, or the contexts of one are shorter than the first one's; names both.

    Example:
        >>> from sae_engine.data import load_language_model, stream_activations
        >>> both = together(load_language_model(), load_language_model())
        >>> next(stream_activations(both, ["A text."], site="blocks.1.hook_resid_post@1")).shape[1]
        256
    """
    check_same_tokens(lms)
    if not lms:
        raise ValueError("together() takes at least one model, got none")
    for other in lms[1:]:
        if other.max_length < lms[0].max_length:
            raise ValueError(f"models must take contexts as long as the first: {other.name!r} takes {other.max_length} "
                             f"tokens, {lms[0].name!r} {lms[0].max_length}")  # fmt: skip
    return replace(lms[0], others=tuple(lms[1:]))


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab())
