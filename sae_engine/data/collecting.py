"""Activations to disk, shard by shard, so that a run that was cut off can be carried on and a finished one extended."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
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
from .places import Place, find_place
from .quantized import quantized
from .sites import Site
from .store import DTYPES, FORMAT, KEY, MANIFEST, ActivationStore, RowTokens, folder_in, read_manifest, verify_shards

# Fields about the texts being read. Those of earlier calls stand in "earlier": the same fields and two counts.
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
    max_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float16,
    shard_tokens: int = 65536,
    token_ids: bool = True,
    text_source: str | None = None,
    resume: bool = True,
    extend: bool = False,
    progress: bool = True,
    **contexts: Any,
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
        lm, texts, layer, site, max_tokens, contexts: as :func:`stream_activations` has them.
        out_dir: folder; made when missing.
        dtype: of the shards: float16, bfloat16, float32, or int8: half of float16, with a mean and a deviation for each
            dimension of a shard and a scale for each row; some 5e-5 of the rows' variance is lost.
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
    (store,) = _collected(None, **locals())
    return store


def collect_sites(
    lm: LanguageModel, texts: Iterable[Any], out_dir: str | Path, sites: Sequence[str | Site], **settings: Any
) -> list[ActivationStore]:
    """Write the rows of several sites, of one pass of the language model, each to a folder of its own in ``out_dir``.

    The rows of all stores are of the same tokens, in the same order: :class:`StoreStream` takes them together. The same
    call again carries on each of them.

    Args:
        lm, texts: as :func:`collect_activations` has them.
        out_dir: folder of the folders, which are named after the sites: ``blocks.3.hook_resid_pre``.
        sites: as :meth:`Site.of` reads them, each with its block.
        settings: all others of :func:`collect_activations`, but ``layer`` and ``site``.

    Returns:
        The stores, in the order of ``sites``.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: as :func:`collect_activations`; ValueError also where ``sites`` is
            empty or names a site twice.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     before, after = collect_sites(lm, ["A text."], folder, ["resid_pre_layer_1", "resid_post_layer_1"],
        ...                                   progress=False)
        ...     after.path.name, len(before) == len(after)
        ('blocks.1.hook_resid_post', True)
    """
    if named := {"layer", "site"} & settings.keys():
        raise TypeError(f"{sorted(named)[0]}: sites says it, as 'blocks.3.hook_resid_pre'")
    if isinstance(sites, (str, Site)) or not isinstance(sites, Sequence):
        raise TypeError(f"sites must be a sequence of sites, got {sites!r}")
    found = [Site.of(site) for site in sites]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"sites must name at least one site, and each once, got {list(map(str, found))}")
    given = inspect.signature(collect_activations).bind(lm, texts, out_dir, **settings)
    given.apply_defaults()
    return _collected(found, **given.arguments)


def _collected(
    sites: Sequence[Site] | None,  # None: site and layer, in out_dir itself
    lm: LanguageModel,
    texts: Iterable[Any],
    out_dir: str | Path,
    layer: int | None,
    site: str | Site,
    max_tokens: int | None,
    dtype: torch.dtype | str,
    shard_tokens: int,
    token_ids: bool,
    text_source: str | None,
    resume: bool,
    extend: bool,
    progress: bool,
    contexts: dict[str, Any],
) -> list[ActivationStore]:
    first = (layer, site) if sites is None else (None, sites[0])
    settings, max_tokens = check_stream(lm, texts, *first, max_tokens, **contexts)
    stored_as = "int8" if dtype in (torch.int8, "int8") else _dtype_name(dtype_in("dtype", dtype))
    if stored_as not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    shard_tokens = check_int("shard_tokens", shard_tokens, 1)
    if text_source is not None and not isinstance(text_source, str):
        raise TypeError(f"text_source must be a string or None, got {text_source!r}")
    for name, value in (("token_ids", token_ids), ("resume", resume), ("extend", extend), ("progress", progress)):
        flag(name, value)
    found = [Site.of(site, layer)] if sites is None else [Site.of(one) for one in sites]
    places = [find_place(lm.of(one).model, one) for one in found]
    require("safetensors.torch")  # before any work, not after the first shard's
    folder = folder_in("out_dir", out_dir)
    folders = [folder] if sites is None else [folder / str(place.site) for place in places]
    request = {
        **_of_place(lm, places[0]),
        **settings.words,
        "max_tokens": max_tokens,
        "dtype": stored_as,
        "shard_tokens": shard_tokens,
        "token_ids": token_ids,
        "text_source": text_source,
    }
    with ExitStack() as held:
        for folder in folders:
            _prepare(folder, extend)
            busy = f"out_dir: another call is collecting into {str(folder)!r}: wait for it, stop it, or name another"
            held.enter_context(only_writer(folder, f"{busy} folder"))
        begun = [
            _Collection(folder, _begin(folder, {**request, **_of_place(lm, place)}, resume, extend))
            for folder, place in zip(folders, places, strict=True)
        ]
        holds = {tuple((part["text_source"], part["max_tokens"]) for part in [*one.manifest["earlier"], one.manifest])
                 for one in begun}  # fmt: skip
        if len(holds) > 1:
            raise ValueError(f"out_dir: in {str(out_dir)!r}, collections hold different texts: extend each alone")
        if unfinished := [collection for collection in begun if not collection.manifest["complete"]]:
            before = {sum(part["documents"] for part in collection.manifest["earlier"]) for collection in unfinished}
            _collect(lm, texts, replace(settings, documents_before=max(before)), unfinished, progress)
    return [ActivationStore(folder) for folder in folders]


# ------------------------------------------------------------------------------ what is there, and how to go on


def _prepare(folder: Path, extend: bool) -> None:
    if extend:
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError(f"out_dir: {str(folder)!r} holds no collection to extend")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"out_dir: the folder {str(folder)!r} cannot be made: {error.strerror}") from error


def _of_place(lm: LanguageModel, place: Place) -> dict[str, Any]:
    owner = lm.of(place.site)
    model = {"model": owner.name, "revision": owner.revision, "sha256": owner.sha256,
             "model_dtype": _dtype_name(next(owner.model.parameters()).dtype)}  # fmt: skip
    return model | {"layer": place.site.layer, "site": place.site.place, "d_model": place.width}


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
        # Format 1 did not count documents. There are no more of them than rows, so new ones are numbered from there on.
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
    lm: LanguageModel, texts: Iterable[Any], contexts: Contexts, collections: list[_Collection], progress: bool
) -> None:
    """Run the model from the first row on that a collection lacks, a shard at a time."""
    limit = collections[0].manifest["max_tokens"]
    in_all = min(collection.stored for collection in collections)
    documents = contexts.documents_before
    seen = 0  # rows of the stream so far, stored or not
    tokens_seen = 0
    text_hash = hashlib.sha256()
    with progress_bar(progress, limit, in_all) as bar:
        for batch in token_batches(lm, texts, contexts):
            text_hash.update(batch.hashed())
            tokens_seen += batch.input_ids.numel()
            documents = max(documents, int(batch.documents.max()) + 1)
            before, seen = seen, seen + len(batch.kept)
            for collection in collections:
                collection.check(before, seen, text_hash.hexdigest())
            lacking = [collection for collection in collections if seen > max(before, collection.stored)]
            if lacking:
                # The whole batch is run even if part of it is stored: a row's last bits depend on its batch.
                found = batch_rows(lm, batch, *(collection.site for collection in lacking))
                for collection, rows in zip(lacking, found, strict=True):
                    collection.add(lm, batch, rows, before)
                    collection.write(text_hash.hexdigest())
                bar.update(min(seen, seen if limit is None else limit) - max(before, in_all))
            if limit is not None and seen >= limit:
                break
    for collection in collections:
        if seen < collection.stored:
            where = str(collection.folder)
            raise ValueError(f"texts are shorter than those that the shards in {where!r} were made from")
        collection.write(text_hash.hexdigest(), rest=True)
    if not seen:
        why = "every token of them is excluded" if tokens_seen else "there is no text in them"
        raise ValueError(f"texts: {why}")
    for collection in collections:
        collection.manifest |= {"documents": documents - contexts.documents_before, "complete": True}
        _write_manifest(collection.folder, collection.manifest)


class _Collection:
    """What is in one folder, and what a run adds to it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.site = Site.of(manifest["site"], manifest["layer"])
        # Rows of these texts that are there.
        self.stored: int = manifest["tokens"] - sum(part["tokens"] for part in manifest["earlier"])
        self._buffer: list[dict[str, Tensor]] = []
        self._buffered = 0

    def check(self, before: int, seen: int, text_sha256: str) -> None:
        """Where the last shard that was there ends: whether the same tokens were read until then."""
        if before < self.stored <= seen and self.manifest["shards"][-1]["text_sha256"] != text_sha256:
            raise ValueError(
                f"texts are not those that the shards in {str(self.folder)!r} were made from; to add others to a "
                "finished collection, pass extend=True"
            )

    def add(self, lm: LanguageModel, batch: TokenBatch, rows: Tensor, before: int) -> None:
        """Those of a batch's rows that are not there, of which ``before`` came before it."""
        limit = self.manifest["max_tokens"]
        part = slice(max(0, self.stored - before), None if limit is None else limit - before)
        check_finite(rows[part], before + part.start, lm, batch, part.start)
        columns = {KEY: cast(rows[part], DTYPES[self.manifest["dtype"]]).cpu()}
        if self.manifest["token_ids"]:
            kept = batch.kept[part]
            found = (batch.input_ids, batch.documents, batch.offsets, batch.positions)
            columns |= {k: t.flatten()[kept].int() for k, t in zip(RowTokens._fields, found, strict=True)}
        self._buffer.append(columns)
        self._buffered += len(rows[part])

    def write(self, text_sha256: str, *, rest: bool = False) -> None:
        """The shards that are full; with ``rest`` the last one too."""
        size = self.manifest["shard_tokens"]
        while self._buffered >= size or (rest and self._buffered):
            merged = {name: torch.cat([columns[name] for columns in self._buffer]) for name in self._buffer[0]}
            self._write_shard({name: t[:size] for name, t in merged.items()}, text_sha256)
            self._buffer = [{name: t[size:] for name, t in merged.items()}]
            self._buffered = max(0, self._buffered - size)

    def _write_shard(self, columns: dict[str, Tensor], text_sha256: str) -> None:
        name, rows = f"shard-{len(self.manifest['shards']):05d}.safetensors", len(columns[KEY])
        if self.manifest["dtype"] == "int8":
            columns = {**columns, **quantized(columns[KEY], KEY)}
        data = require("safetensors.torch").save({key: t.contiguous() for key, t in columns.items()})
        replace_file(self.folder / name, lambda temporary: temporary.write_bytes(data))
        # text_sha256: of all token ids that had been read when this shard was full; resuming compares it.
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "text_sha256": text_sha256}
        self.manifest["shards"].append({"file": name, "tokens": rows, **sums})
        self.manifest["tokens"] += rows
        _write_manifest(self.folder, self.manifest)


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
