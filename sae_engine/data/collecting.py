"""Activations to disk, shard by shard, so that a run that was cut off can be carried on and a finished one extended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import dtype_in, flag
from .._files import only_writer, replace_file
from ._require import require
from .activations import batch_rows, cast, check_finite, check_stream, progress_bar
from .contexts import Contexts, TokenBatch, check_int, token_batches
from .models import LanguageModel
from .places import find_place
from .sites import Site
from .store import DTYPES, FORMAT, KEY, MANIFEST, ActivationStore, RowTokens, folder_in, read_manifest, verify_shards

# Of the texts that are being read; those of earlier calls stand in "earlier", as the same fields and two counts.
_OF_TEXTS = ("text_source", "max_tokens")
# What a run writes as it goes on; all other fields are settings, in which two calls have to agree.
_PROGRESS = ("format", "sae_engine", "earlier", "shards", "tokens", "documents", "complete")


def collect_activations(
    lm: LanguageModel,
    texts: Iterable[Any],
    out_dir: str | Path,
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    context_length: int | None = None,
    batch_size: int = 8,
    drop_first: bool = True,
    separator: str | int | None = "eos",
    first_token: str | int | None = "bos",
    exclude_tokens: Collection[str | int] = (),
    exclude_positions: Collection[int] = (),
    max_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float16,
    shard_tokens: int = 65536,
    token_ids: bool = True,
    text_source: str | None = None,
    resume: bool = True,
    extend: bool = False,
    progress: bool = True,
) -> ActivationStore:
    """Write the rows of :func:`stream_activations` to a folder of shards, and return the store.

    The folder holds ``shard-00000.safetensors`` … and ``manifest.json``. A shard is one tensor ``activations``
    (tokens, d_model) and, for each row, its token, as :class:`RowTokens` has it. Every file is written to a temporary
    name and renamed, so an interrupted run leaves whole shards only.

    The same call again compares the shards' checksums, tokenizes the texts anew, runs no forward pass for what is
    already there, and ends with the same bits as a run that was never interrupted. On a complete folder it compares
    checksums and does not read ``texts``. With a larger ``max_tokens`` it goes on where the earlier one stopped. What
    a run left that failed before its first shard is in nobody's way.

    Args:
        lm, texts, layer, site, context_length, batch_size, drop_first, separator, first_token, exclude_tokens,
            exclude_positions, max_tokens: as :func:`stream_activations` has them.
        out_dir: folder; made when missing.
        dtype: of the shards: float16, bfloat16 or float32.
        shard_tokens: rows per shard; the last has the rest.
        token_ids: also store which token each row is of (16 bytes a row).
        text_source: what the texts are, in words, for the manifest.
        resume: carry on with an earlier run's shards. False: an earlier run in ``out_dir`` is an error.
        extend: add the rows of these texts, at most ``max_tokens``, behind those that a finished collection holds of
            other texts. Settings must be the same. Texts whose ``text_source`` it holds already are not added twice;
            texts without are. An extension that was cut off is carried on by the same call.
        progress: show a bar on standard error.

    Raises:
        TypeError, ValueError: as :func:`stream_activations`; also ``dtype`` or ``shard_tokens``; a manifest
            that differs from this request (names the field); texts that differ from those of the finished
            shards; a damaged shard (names the file); no text at all; an activation that overflows ``dtype``.
        FileExistsError: ``resume=False`` and ``out_dir`` holds a collection.
        FileNotFoundError: ``extend=True`` and ``out_dir`` holds none.
        NotADirectoryError: ``out_dir`` is a file.
        RuntimeError: another call, of this process or another, is collecting into ``out_dir``.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = collect_activations(lm, ["A text."], folder, layer=1, progress=False)
        ...     more = collect_activations(lm, ["More."], folder, layer=1, extend=True, progress=False)
        ...     store.complete, len(more) > len(store), more.row_tokens().documents.unique().tolist()
        (True, True, [0, 1])
    """
    contexts, max_tokens = check_stream(
        lm, texts, layer, site, max_tokens, context_length=context_length, batch_size=batch_size,
        drop_first=drop_first, separator=separator, first_token=first_token, exclude_tokens=exclude_tokens,
        exclude_positions=exclude_positions,
    )  # fmt: skip
    dtype = dtype_in("dtype", dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    shard_tokens = check_int("shard_tokens", shard_tokens, 1)
    if text_source is not None and not isinstance(text_source, str):
        raise TypeError(f"text_source must be a string or None, got {text_source!r}")
    for name, value in (("token_ids", token_ids), ("resume", resume), ("extend", extend), ("progress", progress)):
        flag(name, value)
    place = find_place(lm.model, site, layer)
    require("safetensors.torch")  # before any work, not after the first shard's
    folder = folder_in("out_dir", out_dir)
    request = {
        "model": lm.name,
        "revision": lm.revision,
        "sha256": lm.sha256,
        "model_dtype": _dtype_name(next(lm.model.parameters()).dtype),
        "layer": place.site.layer,
        "site": place.site.place,
        "d_model": place.width,
        **contexts.words,
        "max_tokens": max_tokens,
        "dtype": _dtype_name(dtype),
        "shard_tokens": shard_tokens,
        "token_ids": token_ids,
        "text_source": text_source,
    }
    if not extend:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"out_dir: the folder {str(folder)!r} cannot be made: {error.strerror}") from error
    elif not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"out_dir: {str(folder)!r} holds no collection to extend")
    busy = f"out_dir: another call is collecting into {str(folder)!r}: wait for it, stop it, or name another folder"
    with only_writer(folder, busy):
        manifest = _begin(folder, request, resume, extend)
        if not manifest["complete"]:
            documents = sum(part["documents"] for part in manifest["earlier"])
            _collect(lm, texts, replace(contexts, documents_before=documents), folder, manifest, progress)
    return ActivationStore(folder)


# ------------------------------------------------------------------------------ what is there, and how to go on


def _begin(folder: Path, request: dict[str, Any], resume: bool, extend: bool) -> dict[str, Any]:
    """The manifest to go on from: a new one, or an earlier run's, compared with the request and its shards checked."""
    there = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if there is None or not there["shards"]:  # a run that failed before its first shard has nothing to lose
        fresh = {"earlier": [], "shards": [], "tokens": 0, "complete": False}
        manifest = {"format": FORMAT, **request, "sae_engine": _version(), **fresh}
        _write_manifest(folder, manifest)
        return manifest
    if not resume and not extend:
        raise FileExistsError(f"out_dir: {str(folder)!r} already holds a collection, and resume=False")
    for field in {**request, **there}:
        if field not in (*_PROGRESS, *_OF_TEXTS) and there.get(field) != request.get(field):
            raise _differs(folder, there, field, request.get(field))
    verify_shards(folder, there)
    return _go_on(folder, there, request, extend)


def _go_on(folder: Path, there: dict[str, Any], request: dict[str, Any], extend: bool) -> dict[str, Any]:
    source, limit = request["text_source"], request["max_tokens"]
    rows = there["tokens"] - sum(part["tokens"] for part in there["earlier"])  # of the last texts
    if there["complete"] and any((part["text_source"], part["max_tokens"]) == (source, limit)
                                 for part in there["earlier"] if source or not extend):  # fmt: skip
        return there
    is_last = there["text_source"] == source and (source is not None or not (extend and there["complete"]))
    if extend and not is_last:
        if not there["complete"]:
            raise ValueError(
                f"extend: the collection in {str(folder)!r} of {there['text_source']!r} was cut off: finish it first"
            )
        if any(part["text_source"] == source for part in there["earlier"] if source):
            raise ValueError(f"max_tokens: {str(folder)!r} holds rows of {source!r} and others behind them: they stay")
        part = {field: there[field] for field in _OF_TEXTS}
        # Format 1 counted no documents. Where their number is not known, no number is taken twice all the same.
        counts = {"tokens": rows, "documents": there.get("documents", rows)}
        return {**there, **request, "earlier": [*there["earlier"], {**part, **counts}], "complete": False}
    if not is_last:
        raise _differs(folder, there, "text_source", source)
    if there["earlier"] and not there["complete"] and not extend:
        raise ValueError(
            f"extend: in {str(folder)!r} an extension by {source!r} was cut off; this call with extend=True carries on"
        )
    if limit == there["max_tokens"]:
        return there
    if limit is not None and limit < rows:
        raise _differs(folder, there, "max_tokens", limit)
    return {**there, **request, "complete": False}


def _differs(folder: Path, there: dict[str, Any], field: str, asked: Any) -> ValueError:
    state = "a finished" if there["complete"] else "an unfinished"
    return ValueError(
        f"{field}: {folder / MANIFEST} has {there.get(field)!r}, this call asks for {asked!r}; it is {state} "
        f"collection of {there['tokens']} rows: go on with its settings, name another folder, or delete this one"
    )


# -------------------------------------------------------------------------------------------------- writing


def _collect(
    lm: LanguageModel,
    texts: Iterable[Any],
    contexts: Contexts,
    folder: Path,
    manifest: dict[str, Any],
    progress: bool,
) -> None:
    """Run the model from the first missing row on, a shard at a time."""
    dtype, limit, size = DTYPES[manifest["dtype"]], manifest["max_tokens"], manifest["shard_tokens"]
    stored = manifest["tokens"] - sum(part["tokens"] for part in manifest["earlier"])
    documents = contexts.documents_before
    seen = 0  # rows of the stream so far, stored or not
    tokens_seen = 0
    text_hash = hashlib.sha256()
    buffer: list[dict[str, Tensor]] = []
    buffered = 0
    with progress_bar(progress, limit, stored) as bar:
        for batch in token_batches(lm, texts, contexts):
            text_hash.update(batch.hashed())
            tokens_seen += batch.input_ids.numel()
            documents = max(documents, int(batch.documents.max()) + 1)
            before, seen = seen, seen + len(batch.kept)
            if before < stored <= seen and manifest["shards"][-1]["text_sha256"] != text_hash.hexdigest():
                raise ValueError(
                    f"texts are not those that the shards in {str(folder)!r} were made from; to add others to a "
                    "finished collection, pass extend=True"
                )
            if seen > max(before, stored):
                # The whole batch is run even if part of it is stored: a row's last bits depend on its batch.
                (rows,) = batch_rows(lm, batch, Site.of(manifest["site"], manifest["layer"]))
                part = slice(max(0, stored - before), None if limit is None else limit - before)
                check_finite(rows[part], before + part.start, lm, batch, part.start)
                buffer.append(_columns(batch, rows, part, dtype, manifest["token_ids"]))
                buffered += len(rows[part])
                bar.update(len(rows[part]))
            while buffered >= size:
                merged = _merged(buffer)
                _write_shard(folder, manifest, {k: t[:size] for k, t in merged.items()}, text_hash.hexdigest())
                buffer, buffered = [{k: t[size:] for k, t in merged.items()}], buffered - size
            if limit is not None and seen >= limit:
                break
    if seen < stored:
        raise ValueError(f"texts are shorter than those that the shards in {str(folder)!r} were made from")
    if buffered:
        _write_shard(folder, manifest, _merged(buffer), text_hash.hexdigest())
    if not seen:
        why = "every token of them is excluded" if tokens_seen else "there is no text in them"
        raise ValueError(f"texts: {why}")
    manifest |= {"documents": documents - contexts.documents_before, "complete": True}
    _write_manifest(folder, manifest)


def _columns(batch: TokenBatch, rows: Tensor, part: slice, dtype: torch.dtype, token_ids: bool) -> dict[str, Tensor]:
    """What a shard holds, of some rows of a batch."""
    columns = {KEY: cast(rows[part], dtype).cpu()}
    if token_ids:
        kept = batch.kept[part]
        found = (batch.input_ids, batch.documents, batch.offsets, batch.positions)
        columns |= {k: t.flatten()[kept].int() for k, t in zip(RowTokens._fields, found, strict=True)}
    return columns


def _merged(buffer: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([columns[name] for columns in buffer]) for name in buffer[0]}


def _write_shard(folder: Path, manifest: dict[str, Any], columns: dict[str, Tensor], text_sha256: str) -> None:
    name = f"shard-{len(manifest['shards']):05d}.safetensors"
    data = require("safetensors.torch").save({key: t.contiguous() for key, t in columns.items()})
    replace_file(folder / name, lambda temporary: temporary.write_bytes(data))
    shard = {"file": name, "tokens": len(columns[KEY]), "sha256": hashlib.sha256(data).hexdigest()}
    # text_sha256: of all token ids that had been read when this shard was full; resuming compares it.
    manifest["shards"].append({**shard, "text_sha256": text_sha256})
    manifest["tokens"] += shard["tokens"]
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps({**manifest, "format": FORMAT}, indent=2) + "\n"
    replace_file(folder / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version() -> str:
    try:
        return metadata.version("sae-engine")
    except metadata.PackageNotFoundError:
        return "not installed"
