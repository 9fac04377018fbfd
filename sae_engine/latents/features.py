"""Codes and tokens of a text to disk, shard by shard; a run that was cut off is carried on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import dtype_in, flag
from .._files import only_writer, replace_file
from ..autoencoder import SparseAutoencoder
from ..data._require import require
from ..data.activations import batch_rows, check_finite, check_model, check_stream, progress_bar
from ..data.contexts import TokenBatch, check_int, token_batches
from ..data.models import LanguageModel, memory_sha256
from ..data.places import evaluating
from ..data.sites import Site
from ..data.store import folder_in
from ..metrics.place import contexts_for
from ..metrics.splice import Normalization
from ._belonging import read_by
from .stored import DTYPES, FORMAT, MANIFEST, Features, FeatureTokens, check_sha256, check_shard, read_manifest

# What a run writes as it goes on; all other fields are settings, in which two calls have to agree.
_PROGRESS = ("shards", "tokens", "entries", "encoded", "complete")


def collect(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    documents: Iterable[Any],
    folder: str | Path,
    *,
    layer: int | None = None,
    site: str | Site | None = None,
    normalize: str | None = None,
    max_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float16,
    shard_tokens: int = 262144,
    text_source: str | None = None,
    progress: bool = True,
    **contexts: Any,
) -> Features:
    """Write which latents fire on which tokens of a text, and return what reads it.

    One pass of the language model. The folder holds ``features.json`` and ``shard-00000.safetensors`` …, each with
    ``indices`` (int32) and ``values`` of all entries, ``counts`` of each token, and which token it is: 6 bytes an entry
    with values in float16, 21 bytes a token. Every file is written under another name and renamed.

    The same call again compares checksums, tokenizes the text anew, runs no forward pass for what is there, and ends
    with the same bits as a run that was not interrupted. On finished features it reads no text.

    Args:
        sae: its rule runs as in eval mode.
        lm, documents: as :func:`sae_engine.data.stream_activations` has them.
        folder: made when missing.
        layer, site, normalize: where the autoencoder belongs, and what its input is; by default what
            ``sae.provenance`` says. A source of several sites (:func:`of_source`) has them from the crosscoder's.
        max_tokens: stop after so many tokens that are encoded; None is all.
        dtype: of the values: float16 (11 bits; what it rounds to 0 is not stored) or float32.
        shard_tokens: tokens of a shard, which is closed at the end of the batch with which it reaches them.
        text_source: what the text is, in words, for the manifest.
        progress: show a bar on standard error.
        contexts: any of :class:`sae_engine.data.ContextSettings`, by name; by default what ``sae.provenance`` says of
            them. Tokens that are left out are stored without codes.

    Raises:
        TypeError, ValueError: an argument is not as above; a manifest differs from this request (names the field);
            the text is another than that of the finished shards, or none; a shard is damaged; a value overflows
            ``dtype``, an activation is not finite.
        RuntimeError: the rule has no threshold yet, or another call is collecting into ``folder``.
        NotADirectoryError: ``folder`` is a file.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     collect(sae, lm, ["A text."], folder, layer=2, site="resid_post", progress=False).codes(1).k is None
        True
    """
    check_model(lm)
    sites, normalization = read_by(sae, lm, layer=layer, site=site, normalize=normalize)
    contexts = contexts_for(sae, lm, contexts)
    settings, max_tokens = check_stream(lm, documents, None, sites[0], max_tokens, **contexts)
    dtype = dtype_in("dtype", dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if text_source is not None and not isinstance(text_source, str):
        raise TypeError(f"text_source must be a string or None, got {text_source!r}")
    flag("progress", progress)
    target = folder_in("folder", folder)
    encoder = _Encoder(sae, normalization, dtype)
    one = sites[0] if len(sites) == 1 else None
    request = {
        "format": FORMAT, "model": lm.name, "revision": lm.revision, "sha256": lm.sha256,
        "model_dtype": _word(next(lm.model.parameters()).dtype), "sae": repr(sae.activation),
        "sae_sha256": memory_sha256(sae), "d_in": sae.d_in, "d_sae": sae.d_sae, "layer": one and one.layer,
        "site": one and one.place, "normalize": normalization.kind, **settings.words,
        "max_tokens": max_tokens, "dtype": _word(dtype), "shard_tokens": check_int("shard_tokens", shard_tokens, 1),
        "text_source": text_source,
    }  # fmt: skip
    if one is None:
        request |= {"sites": [str(site) for site in sites], "models": [lm.of(site).name for site in sites],
                    "other_sha256": [other.sha256 for other in lm.others]}  # fmt: skip
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"folder: {str(folder)!r} cannot be made: {error.strerror}") from error
    with only_writer(target, f"folder: features are being collected into {str(folder)!r} by another call"):
        manifest = _begin(target, request)
        if not manifest["complete"]:
            with evaluating(sae):
                batches = token_batches(lm, documents, settings)
                _collect(lm, encoder, batches, target, manifest, sites, progress)
    return Features(target)


class _Encoder:
    """From rows of activations to entries on the CPU: values, latents, and how many a row has."""

    def __init__(self, sae: SparseAutoencoder, normalization: Normalization, dtype: torch.dtype) -> None:
        self.sae, self.normalization, self.dtype = sae, normalization, dtype
        with torch.no_grad(), evaluating(sae):
            sae.encode(sae.W_dec.new_zeros(1, sae.d_in))  # a rule that cannot run says so before the model does

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, _ = self.normalization.into(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        codes = self.sae.encode(x).cpu()
        values = codes.values.to(self.dtype)
        if not bool(values.isfinite().all()):
            largest = float(codes.values.abs().max())
            raise ValueError(f"dtype: a latent's activation of {largest:.6g} is none in {_word(self.dtype)}")
        fired = values != 0
        row = torch.repeat_interleave(torch.arange(codes.rows, device="cpu"), codes.offsets.diff())
        counts = torch.bincount(row[fired], minlength=codes.rows)
        return values[fired], codes.indices[fired], counts.int()


def _begin(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    there = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if there is None or not there["shards"]:  # a run that failed before its first shard has nothing to lose
        manifest = {**request, "shards": [], "tokens": 0, "entries": 0, "encoded": 0, "complete": False}
        _write_manifest(folder, manifest)
        return manifest
    for field in {**request, **there}:
        if field not in _PROGRESS and there.get(field) != request.get(field):
            raise ValueError(
                f"{field}: {folder / MANIFEST} has {there.get(field)!r}, this call asks for {request.get(field)!r}: "
                "go on with its settings, name another folder, or delete this one"
            )
    for shard in there["shards"]:
        check_shard(folder, shard, there)
        check_sha256(folder, shard)
    return there


def _collect(
    lm: LanguageModel, encoder: _Encoder, batches: Iterable[TokenBatch], folder: Path, manifest: dict[str, Any],
    sites: Sequence[Site], progress: bool,
) -> None:  # fmt: skip
    """Run the model from the first batch on that no shard holds. Shards end where batches do."""
    stored = sum(shard["batches"] for shard in manifest["shards"])
    limit = manifest["max_tokens"]
    text_hash = hashlib.sha256()
    buffer: list[dict[str, Tensor]] = []
    number = seen = 0
    with progress_bar(progress, limit, manifest["encoded"]) as bar:
        for number, batch in enumerate(batches, start=1):
            text_hash.update(batch.hashed())
            kept = batch.kept if limit is None else batch.kept[: limit - seen]
            if number == stored and manifest["shards"][-1]["text_sha256"] != text_hash.hexdigest():
                raise ValueError(f"documents are not those that the shards in {str(folder)!r} were made from")
            if number > stored:
                parts = batch_rows(lm, batch, *sites)
                for site, part in zip(sites, parts, strict=True):
                    check_finite(part, seen, lm.of(site), batch)
                rows = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], 1)
                buffer.append(_columns(batch, kept, encoder(rows[: len(kept)])))
                bar.update(len(kept))
                if sum(len(columns["token_ids"]) for columns in buffer) >= manifest["shard_tokens"]:
                    _write_shard(folder, manifest, buffer, text_hash.hexdigest())
                    buffer = []
            seen += len(kept)
            if limit is not None and seen >= limit:
                break
    if number < stored:
        raise ValueError(f"documents are shorter than those that the shards in {str(folder)!r} were made from")
    if not seen:
        raise ValueError(f"documents: {'every token of them is excluded' if number else 'there is no text in them'}")
    if buffer:
        _write_shard(folder, manifest, buffer, text_hash.hexdigest())
    manifest["complete"] = True
    _write_manifest(folder, manifest)


def _columns(batch: TokenBatch, kept: Tensor, entries: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """What a shard holds of a batch: its tokens, up to the end of the context with the last that is encoded."""
    shape = batch.input_ids.shape
    present = torch.ones(shape, dtype=torch.bool, device="cpu")
    if batch.attention_mask is not None:
        present &= batch.attention_mask.bool()
    if len(kept) < len(batch.kept):
        present[int(kept[-1]) // shape[1] + 1 :] = False
    encoded = torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
    encoded[kept] = True
    values, indices, own_counts = entries
    counts = torch.zeros(shape.numel(), dtype=torch.int32, device="cpu")
    counts[kept] = own_counts
    columns = (batch.input_ids, batch.documents, batch.offsets, batch.positions)
    chosen = present.flatten()
    found = [t.flatten()[chosen].int() for t in columns]
    tokens = dict(zip(FeatureTokens._fields, [*found, encoded[chosen]], strict=True))
    return {**tokens, "counts": counts[chosen], "values": values, "indices": indices}


def _write_shard(folder: Path, manifest: dict[str, Any], buffer: list[dict[str, Tensor]], text_sha256: str) -> None:
    columns = {name: torch.cat([part[name] for part in buffer]).contiguous() for name in buffer[0]}
    name = f"shard-{len(manifest['shards']):05d}.safetensors"
    data = require("safetensors.torch").save(columns)
    replace_file(folder / name, lambda temporary: temporary.write_bytes(data))
    shard = {"tokens": len(columns["token_ids"]), "entries": len(columns["values"]),
             "encoded": int(columns["encoded"].sum())}  # fmt: skip
    # text_sha256: of all token ids that had been read when this shard was closed; carrying on compares it.
    manifest["shards"].append({"file": name, **shard, "batches": len(buffer), "text_sha256": text_sha256,
                               "sha256": hashlib.sha256(data).hexdigest()})  # fmt: skip
    for field, count in shard.items():
        manifest[field] += count
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    replace_file(folder / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
