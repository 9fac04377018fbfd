"""Documents to contexts: what the language model is given, and which of its tokens become rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import flag, integer_in
from .models import LanguageModel, vocabulary_size
from .padding import padding_of

WORDS = ("bos", "eos", "pad")  # tokens that a tokenizer knows by name


class TokenBatch(NamedTuple):
    """One forward pass: token ids (B, T) int64, their mask where some are padding, and which become rows.

    ``documents`` and ``offsets`` (B, T) say which document a token is of and where in it, from 0; both are -1 for what
    stands before a context, and mean nothing at padding. ``positions`` (B, T) count from each row's first token.
    ``kept`` (rows,) are the places in (B * T) that become rows, ascending. All on the CPU.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    documents: Tensor
    offsets: Tensor
    positions: Tensor
    kept: Tensor

    def hashed(self) -> bytes:
        """What tells this batch from another."""
        return b"".join(t.numpy().tobytes() for t in (self.input_ids, self.attention_mask) if t is not None)


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """How documents become contexts and which tokens become rows: what all that read texts take by these names.

    The tokens of each non-empty document are followed by the separator, and all documents form one stream, which is cut
    into runs of ``context_length - 1`` tokens. A context is ``first_token`` followed by one run, so every token of the
    stream is in exactly one context. The last run may be shorter; it is a context of its own length, alone in its
    batch. Nothing is padded.

    Batches of token ids are run as they are given, padded or not: nothing is put before their rows or between them.

    Args:
        context_length: tokens per context, at least 2; default ``min(lm.max_length, 256)``. Batches may be shorter.
        batch_size: contexts per forward pass.
        drop_first: leave out each context's first position, whose activations are far larger than all others
            and the same everywhere. With ``first_token``, one row per token of the stream remains.
        separator: what stands behind each document: ``"eos"``, ``"bos"``, ``"pad"``, a token id, or None for nothing.
        first_token: what stands before each context, likewise; ``"bos"`` is the end-of-text token where the
            tokenizer has no other, as GPT-2. None: nothing, and a run has ``context_length`` tokens.
        exclude_tokens: leave out the rows of these tokens, by name or id: ``["bos", "eos", "pad", 198]``. The model
            sees them all the same.
        exclude_positions: leave out these positions of each context, counted from 0 at its first token that is no
            padding. ``drop_first`` leaves out position 0.

    Raises:
        TypeError: there is no such setting. What they are is checked where the model is known that they are for.

    Example:
        >>> ContextSettings(context_length=128, separator=None).first_token
        'bos'
    """

    context_length: int | None = None
    batch_size: int = 8
    drop_first: bool = True
    separator: str | int | None = "eos"
    first_token: str | int | None = "bos"
    exclude_tokens: Collection[str | int] = ()
    exclude_positions: Collection[int] = ()


@dataclass(frozen=True)
class Contexts:
    """:class:`ContextSettings`, checked for one model, its tokens by their ids.

    ``words`` is the same as a manifest has it: a token is ``"bos"``, ``"eos"``, ``"pad"`` or its id in digits. Not
    ``packing``: each document has contexts of its own, without a separator, padded on the right.
    """

    length: int
    batch_size: int
    first_token: int | None
    separator: int | None
    excluded_tokens: tuple[int, ...]
    excluded_positions: tuple[int, ...]
    words: dict[str, Any]
    packing: bool = True
    documents_before: int = 0

    @property
    def run(self) -> int:
        """How many tokens of documents a context has room for."""
        return self.length - (self.first_token is not None)

    def kept(self, input_ids: Tensor, positions: Tensor, present: Tensor) -> Tensor:
        keep = present
        for excluded, these in ((self.excluded_tokens, input_ids), (self.excluded_positions, positions)):
            if excluded:
                keep = keep & ~torch.isin(these, torch.tensor(excluded, device="cpu"))
        return keep.flatten().nonzero().squeeze(1)


def contexts_of(lm: LanguageModel, *, packing: bool = True, **settings: Any) -> Contexts:
    """What these :class:`ContextSettings` are for ``lm``; ``packing=False`` gives each document contexts of its own.

    Raises:
        TypeError, ValueError: a setting is of another kind or out of range, or the tokenizer has no such token.
    """
    said = ContextSettings(**settings)
    length = min(lm.max_length, 256) if said.context_length is None else said.context_length
    length = check_int("context_length", length, 2, lm.max_length)
    batch_size = check_int("batch_size", said.batch_size, 1)
    flag("drop_first", said.drop_first)
    flag("packing", packing)
    excluded = {"exclude_tokens": said.exclude_tokens, "exclude_positions": said.exclude_positions}
    for name, value in excluded.items():
        if isinstance(value, (str, bytes)) or not isinstance(value, Collection):
            raise TypeError(f"{name} must be a collection, as [0, 1], got {value!r}")
    positions = sorted({check_int("exclude_positions", value, 0, length - 1) for value in said.exclude_positions})
    tokens = tuple(_token(lm, "exclude_tokens", value) for value in said.exclude_tokens)
    return Contexts(
        length=length,
        batch_size=batch_size,
        first_token=_token(lm, "first_token", said.first_token),
        separator=_token(lm, "separator", said.separator),
        excluded_tokens=tuple(token for token in tokens if token is not None),
        excluded_positions=tuple(sorted({*positions, *([0] if said.drop_first else [])})),
        words={
            "context_length": length,
            "batch_size": batch_size,
            "drop_first": said.drop_first,
            "separator": _word(said.separator),
            "first_token": _word(said.first_token),
            "exclude_tokens": sorted({_word(value) for value in said.exclude_tokens}),
            "exclude_positions": positions,
        },
        packing=packing,
    )


def rows_in_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """``Contexts.words``, or the same fields of a manifest, as :class:`Provenance` has them."""
    left_out = words.get("exclude_positions", ())
    first = ["first"] if words["drop_first"] or 0 in left_out else []
    return {
        "context_length": words["context_length"], "separator": words["separator"],
        "first_token": words.get("first_token"),
        "excluded": (*first, *words["exclude_tokens"], *(f"position {position}" for position in left_out if position)),
    }  # fmt: skip


def token_batches(lm: LanguageModel, texts: Iterable[Any], contexts: Contexts) -> Iterator[TokenBatch]:
    """Batches in the order of the texts: of documents, packed or each by itself, or as they are given. Read lazily."""
    run = contexts.run
    size = contexts.batch_size * run
    alone: list[Tensor] = []  # where documents are not packed: rows
    pending = torch.empty(3, 0, dtype=torch.int64, device="cpu")  # token ids, documents, offsets
    are_given: bool | None = None  # as batches
    rows = 0  # of batches that were given
    for number, item in enumerate(texts):
        is_given = isinstance(item, Mapping) or getattr(item, "ndim", 1) == 2
        if are_given not in (None, is_given):
            kind = "a batch" if is_given else "a document"
            raise TypeError(f"texts: item {number} is {kind}, and what stands before it is not: {_AS}")
        are_given = is_given
        if is_given:
            batch = _given(item, number, contexts, rows)
            rows += len(batch.input_ids)
            yield batch
            continue
        ids = token_ids_of(lm, item, number, contexts.separator if contexts.packing else None)
        document = torch.full_like(ids, number + contexts.documents_before)
        tokens = torch.stack([ids, document, torch.arange(len(ids), device="cpu")])
        if not contexts.packing:
            alone += tokens.split(run, 1) if len(ids) else ()
            while len(alone) >= contexts.batch_size:
                yield unpacked(alone[: contexts.batch_size], contexts)
                alone = alone[contexts.batch_size :]
            continue
        pending = torch.cat([pending, tokens], 1)
        for start in range(0, pending.shape[1] - size + 1, size):
            yield packed(pending[:, start : start + size], contexts, run)
        pending = pending[:, pending.shape[1] // size * size :]
    if alone:
        yield unpacked(alone, contexts)
    whole = pending.shape[1] // run * run
    if whole:
        yield packed(pending[:, :whole], contexts, run)
    if whole < pending.shape[1]:
        yield packed(pending[:, whole:], contexts, pending.shape[1] - whole)


def context_batches(
    lm: LanguageModel, texts: Iterable[str], context_length: int, batch_size: int
) -> Iterator[Tensor]:
    """``(contexts, length)`` int64 token ids on the CPU, packed as :class:`ContextSettings` says."""
    contexts = contexts_of(lm, context_length=context_length, batch_size=batch_size)
    for number, batch in enumerate(token_batches(lm, texts, contexts)):
        if batch.attention_mask is not None:
            raise ValueError(f"texts: batch {number} is padded, which is for activations alone: give documents here")
        yield batch.input_ids


def check_int(name: str, value: int, low: int, high: int | None = None) -> int:
    if (number := integer_in(value)) is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'in {low}..{high}'}, got {value}")
    return number


# ------------------------------------------------------------------------------------------------ settings


def _token(lm: LanguageModel, name: str, value: str | int | None) -> int | None:
    """The id of a token that is given by name or by id; None, of ``first_token`` and ``separator``, is none."""
    if value is None and name != "exclude_tokens":
        return None
    if not isinstance(value, str):
        if integer_in(value) is None:
            raise TypeError(f"{name} must be a token id or one of {WORDS}, got {value!r}")
        return check_int(name, value, 0, vocabulary_size(lm) - 1)  # type: ignore[arg-type]
    if value not in WORDS:
        raise ValueError(f"{name} must be a token id or one of {WORDS}, got {value!r}")
    otherwise = "name it by its id" + ("" if name == "exclude_tokens" else f", or pass {name}=None for none")
    if lm.tokenizer is None:
        raise ValueError(f"{name}: {lm.name!r} has no tokenizer to say what {value!r} is; {otherwise}")
    found = getattr(lm.tokenizer, f"{value}_token_id", None)
    if found is None and name == "first_token" and value == "bos":
        found = lm.tokenizer.eos_token_id  # as GPT-2 was trained
    if found is None:
        raise ValueError(f"{name}: the tokenizer of {lm.name!r} has no {value.upper()} token; {otherwise}")
    return found


def _word(value: str | int | None) -> str:
    return "none" if value is None else str(value)


# -------------------------------------------------------------------------------------------------- batches


_AS = "texts are all documents (strings, or token ids in one dimension) or all batches (input_ids in two)"


def packed(block: Tensor, contexts: Contexts, run: int) -> TokenBatch:
    """A batch of token ids, documents and offsets (3, contexts * run)."""
    ids, documents, offsets = block.view(3, -1, run)
    if contexts.first_token is not None:
        front = (len(ids), 1)
        ids = torch.cat([torch.full(front, contexts.first_token, device="cpu"), ids], 1)
        documents, offsets = (torch.cat([torch.full(front, -1, device="cpu"), t], 1) for t in (documents, offsets))
    positions = torch.arange(ids.shape[1], device="cpu").expand(ids.shape)
    kept = contexts.kept(ids, positions, torch.ones_like(ids, dtype=torch.bool))
    return TokenBatch(ids, None, documents, offsets, positions, kept)


def unpacked(rows: Sequence[Tensor], contexts: Contexts) -> TokenBatch:
    """A batch of token ids, documents and offsets (3, tokens), a row each, padded on the right.

    A row that begins with ``first_token``, as a chat template may write it, gets no second one.
    """
    first = contexts.first_token
    if first is not None:
        before = torch.tensor([[first], [-1], [-1]], device="cpu")
        rows = [row if int(row[0, 0]) == first else torch.cat([before, row], 1) for row in rows]
    length = max(row.shape[1] for row in rows)
    block = torch.stack([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=-1) for row in rows], 1)
    lengths = torch.tensor([row.shape[1] for row in rows], device="cpu")
    positions = torch.arange(length, device="cpu").expand(len(rows), length)
    present = positions < lengths[:, None]
    ids, documents, offsets = block
    ids = ids.masked_fill(~present, 0)
    mask = None if bool(present.all()) else present.to(torch.int64)
    return TokenBatch(ids, mask, documents, offsets, positions, contexts.kept(ids, positions, present))


def _given(item: Any, number: int, contexts: Contexts, rows: int) -> TokenBatch:
    """A batch that the caller made; each of its rows is a document."""
    fields = item if isinstance(item, Mapping) else {"input_ids": item}
    if "input_ids" not in fields:
        hint = "; give the strings of its rows, one by one" if "text" in fields else ""
        raise ValueError(f"texts: batch {number} has no 'input_ids', only {sorted(map(str, fields))}{hint}")
    ids, mask = _integers(fields["input_ids"], f"texts: batch {number}: input_ids"), fields.get("attention_mask")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(
            f"texts: batch {number}: input_ids must be (B, T) with at least one token, got {tuple(ids.shape)}; token "
            "ids of one document are given as they are, without a name"
        )
    if ids.shape[1] > contexts.length:
        raise ValueError(
            f"texts: batch {number} has {ids.shape[1]} tokens a row, more than context_length={contexts.length}"
        )
    try:
        mask = None if mask is None else _integers(mask, "attention_mask")
        padding = padding_of(ids, mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"texts: batch {number}: {error}") from None
    positions = torch.arange(ids.shape[1], device="cpu").expand(ids.shape)
    present = torch.ones_like(ids, dtype=torch.bool)
    if padding is not None:
        assert mask is not None
        mask = mask.to(torch.int64)
        positions, present = positions - padding.first[:, None], mask.bool()
        ids = ids.masked_fill(~present, 0)  # whatever stands there: the same batch is the same batch
    documents = (torch.arange(len(ids), device="cpu") + rows + contexts.documents_before)[:, None].expand(ids.shape)
    kept = contexts.kept(ids, positions, present)
    return TokenBatch(ids, mask if padding is not None else None, documents, positions, positions, kept)


def token_ids_of(lm: LanguageModel, document: Any, number: int, separator: int | None) -> Tensor:
    """(tokens,) int64 of one document, with the separator behind it; an empty document has none."""
    if isinstance(document, str):
        ids = torch.tensor(_tokenize(lm, document, number), dtype=torch.int64, device="cpu")
    else:
        ids = _integers(document, f"texts: document {number}")
        if ids.ndim != 1:
            raise ValueError(f"texts: document {number} has shape {tuple(ids.shape)}: {_AS}")
    if separator is None or not len(ids):
        return ids
    return torch.cat([ids, torch.tensor([separator], device="cpu")])


def _integers(value: Any, name: str) -> Tensor:
    """int64 on the CPU; TypeError for anything but integers."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be token ids, got {type(value).__name__}")
    try:
        t = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        t = None
    if t is not None and not t.numel():  # of an empty list torch makes floats
        return t.to(torch.int64)
    if t is None or t.is_floating_point() or t.is_complex():
        got = type(value).__name__ if t is None or not isinstance(value, Tensor) else value.dtype
        said = "strings or token ids" if name.startswith("texts: document") else "integers"
        raise TypeError(f"{name} must be {said}, got {got}: {value!r:.80}")
    return t.to(torch.int64)


def _tokenize(lm: LanguageModel, document: str, number: int) -> list[int]:
    try:
        document.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which scraped text may hold
        raise ValueError(
            f"texts: document {number} holds {document[error.start]!a} at position {error.start}, which is no "
            "character: clean it, as by document.encode(errors='replace').decode()"
        ) from None
    if lm.tokenizer is None:
        raise ValueError(f"texts: {lm.name!r} has no tokenizer, so its documents must be token ids, not strings")
    # verbose=False: the warning about documents longer than the model's context does not apply to a stream.
    return lm.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] if document else []
