"""Activations on disk: safetensors shards and a manifest, written so that a cut-off run can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import dtype_in
from .._files import replace_file
from ..provenance import Provenance
from ._require import require
from .activations import batch_rows, check_int, check_stream, context_batches, progress_bar
from .models import LanguageModel, file_sha256

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_KEY = "activations"
_PROGRESS_FIELDS = ("sae_engine", "shards", "tokens", "complete")  # the rest of a manifest is the request


def collect_activations(
    lm: LanguageModel,
    texts: Iterable[str],
    out_dir: str | Path,
    *,
    layer: int,
    site: str = "resid_pre",
    context_length: int | None = None,
    batch_size: int = 8,
    drop_first: bool = True,
    max_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float16,
    shard_tokens: int = 65536,
    text_source: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> ActivationStore:
    """Write the rows of :func:`stream_activations` to a folder of shards, and return the store.

    The folder holds ``shard-00000.safetensors`` … (one tensor ``activations`` (tokens, d_model) each) and
    ``manifest.json``. Every file is written to a temporary name and renamed, so an interrupted run leaves
    whole shards only. The same call again tokenizes the texts anew, runs no forward pass for what is already
    there, and ends with the same bits as a run that was never interrupted. On a complete folder it does
    nothing and does not read ``texts``.

    Args:
        lm, texts, layer, site, context_length, batch_size, drop_first, max_tokens: as
            :func:`stream_activations` has them.
        out_dir: folder; made when missing.
        dtype: of the shards: float16, bfloat16 or float32.
        shard_tokens: rows per shard; the last has the rest.
        text_source: what the texts are, in words, for the manifest.
        resume: carry on with an earlier run's shards. False: an earlier run in ``out_dir`` is an error.
        progress: show a bar on standard error.

    Raises:
        TypeError, ValueError: as :func:`stream_activations`; also ``dtype`` or ``shard_tokens``; a manifest
            that differs from this request (names the field); texts that differ from those of the finished
            shards; a damaged shard (names the file); no text at all; an activation that overflows ``dtype``.
        FileExistsError: ``resume=False`` and ``out_dir`` holds a manifest.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = collect_activations(lm, ["A text."], folder, layer=1, progress=False)
        ...     store.complete, store.d_model == lm.d_model
        (True, True)
    """
    context_length, batch_size, max_tokens = check_stream(
        lm, texts, layer, site, context_length, batch_size, drop_first, max_tokens
    )
    dtype = dtype_in("dtype", dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    shard_tokens = check_int("shard_tokens", shard_tokens, 1)
    if text_source is not None and not isinstance(text_source, str):
        raise TypeError(f"text_source must be a string or None, got {text_source!r}")
    require("safetensors.torch")  # before any work, not after the first shard's
    folder = Path(out_dir)
    request = {
        "format": FORMAT,
        "model": lm.name,
        "revision": lm.revision,
        "sha256": lm.sha256,
        "model_dtype": _dtype_name(next(lm.model.parameters()).dtype),
        "layer": int(layer),
        "site": site,
        "d_model": lm.d_model,
        "context_length": context_length,
        "batch_size": batch_size,
        "drop_first": drop_first,
        "max_tokens": max_tokens,
        "dtype": _dtype_name(dtype),
        "shard_tokens": shard_tokens,
        "text_source": text_source,
    }
    manifest = _start(folder, request, resume)
    if manifest["complete"]:
        return ActivationStore(folder)
    _collect(lm, texts, folder, manifest, progress)
    return ActivationStore(folder)


def _start(folder: Path, request: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The manifest to go on from: an earlier run's, compared with the request and its shards checked, or a new one."""
    if not (folder / MANIFEST).exists():
        manifest = {**request, "sae_engine": _version(), "shards": [], "tokens": 0, "complete": False}
        folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, manifest)
        return manifest
    if not resume:
        raise FileExistsError(f"out_dir: {str(folder)!r} already holds a collection, and resume=False")
    manifest = _read_manifest(folder)
    for field in {**request, **manifest}:
        if field not in _PROGRESS_FIELDS and manifest.get(field) != request.get(field):
            there, asked = manifest.get(field), request.get(field)
            raise ValueError(f"{field}: {folder / MANIFEST} has {there!r}, this call asks for {asked!r}")
    for shard in manifest["shards"]:
        _check_shard(folder, shard, manifest)
    return manifest


def _collect(
    lm: LanguageModel, texts: Iterable[str], folder: Path, manifest: dict[str, Any], progress: bool
) -> None:
    """Run the model from the first missing row on, a shard at a time."""
    dtype, limit, size = DTYPES[manifest["dtype"]], manifest["max_tokens"], manifest["shard_tokens"]
    stored = manifest["tokens"]
    seen = 0  # rows of the stream so far, stored or not
    text_hash = hashlib.sha256()
    buffer: list[Tensor] = []
    buffered = 0
    with progress_bar(progress, limit, stored) as bar:
        for ids in context_batches(lm, texts, manifest["context_length"], manifest["batch_size"]):
            text_hash.update(ids.numpy().tobytes())
            before, seen = seen, seen + ids[:, int(manifest["drop_first"]) :].numel()
            if before < stored <= seen and manifest["shards"][-1]["text_sha256"] != text_hash.hexdigest():
                raise ValueError(f"texts are not those that the shards in {str(folder)!r} were made from")
            if seen > stored:
                # The whole batch is run even if part of it is stored: a row's last bits depend on its batch.
                rows = batch_rows(lm, ids, manifest["layer"], manifest["site"], manifest["drop_first"])
                rows = rows[max(0, stored - before) : None if limit is None else limit - before]
                _check_finite(rows, max(before, stored), lm, texts_at=ids)
                buffer.append(_cast(rows, dtype))
                buffered += len(rows)
                bar.update(len(rows))
            while buffered >= size:
                merged = torch.cat(buffer)
                _write_shard(folder, manifest, merged[:size], text_hash.hexdigest())
                buffer, buffered = [merged[size:]], buffered - size
            if limit is not None and seen >= limit:
                break
    if seen < stored:
        raise ValueError(f"texts are shorter than those that the shards in {str(folder)!r} were made from")
    if buffered:
        _write_shard(folder, manifest, torch.cat(buffer), text_hash.hexdigest())
    if not manifest["tokens"]:
        raise ValueError("texts: there is no text in them")
    manifest["complete"] = True
    _write_manifest(folder, manifest)


class ActivationStore:
    """Collected activations: rows of shape (d_model,), read shard by shard.

    Args:
        path: folder written by :func:`collect_activations`.
        allow_incomplete: also open a collection that was cut off.

    Attributes:
        path, manifest, d_model, dtype, complete, provenance; ``len(store)`` is the number of rows.

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: the manifest or a shard is damaged (names the file), or the collection is incomplete.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = collect_activations(lm, ["A text."], folder, layer=1, progress=False)
        ...     sum(len(x) for x in ActivationStore(folder).batches(2)) == len(ActivationStore(folder))
        True
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.d_model: int = self.manifest["d_model"]
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.complete: bool = self.manifest["complete"]
        if not self.complete and not allow_incomplete:
            done = self.manifest["tokens"]
            raise ValueError(
                f"path: the collection in {str(path)!r} was cut off after {done} rows; collect again to finish it, "
                "or pass allow_incomplete=True"
            )
        for shard in self.manifest["shards"]:
            _check_shard(self.path, shard, self.manifest)

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def __repr__(self) -> str:
        m = self.manifest
        shape = f"{len(self)} x {self.d_model} {m['dtype']}"
        cut_off = "" if self.complete else ", incomplete"
        return f"ActivationStore({shape}, {m['model']} layer {m['layer']} {m['site']}{cut_off})"

    @property
    def provenance(self) -> Provenance:
        """Which activations these are, for the autoencoder that is trained on them."""
        m = self.manifest
        return Provenance(
            model=m["model"], revision=m["revision"], sha256=m["sha256"], layer=m["layer"], site=m["site"],
            d=m["d_model"], normalize="none", model_dtype=m["model_dtype"], dtype=m["dtype"], tokenizer=m["model"],
            text=m["text_source"], context_length=m["context_length"], separator="eos",
            excluded=("first",) if m["drop_first"] else (),
        )  # fmt: skip

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest; ValueError names the first that differs."""
        for shard in self.manifest["shards"]:
            if file_sha256(self.path / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.path / shard['file']} is damaged: its sha256 is not the manifest's")

    def tensor(self, dtype: torch.dtype | str | None = None) -> Tensor:
        """All rows in the order of the text, ``(len(self), d_model)``, on the CPU; ``dtype=None`` as stored."""
        shards = [self._load(index) for index in range(len(self.manifest["shards"]))]
        rows = torch.cat(shards) if shards else torch.empty(0, self.d_model, dtype=self.dtype)
        return rows if dtype is None else rows.to(dtype_in("dtype", dtype))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        drop_last: bool = False,
        buffer_shards: int = 4,
    ) -> Iterator[Tensor]:
        """One pass over all rows, each exactly once.

        Args:
            batch_size: rows per batch; the last has the rest, unless ``drop_last``.
            shuffle: take the shards in random order, ``buffer_shards`` at a time, and shuffle the rows of
                those together. False: the order of the text.
            seed: of the shuffle; the same seed gives the same batches. Use another for each epoch.
            device, dtype: of the batches; None is the CPU, and the stored dtype.
            drop_last: leave out a last, smaller batch.
            buffer_shards: how many shards are in memory at once (twice that for a moment, while they are mixed).

        Yields:
            ``(batch_size, d_model)``.

        Raises:
            TypeError, ValueError: ``batch_size``, ``buffer_shards`` or ``seed`` is not a fit integer.
        """
        batch_size, seed = check_int("batch_size", batch_size, 1), check_int("seed", seed, 0)
        buffer_shards = check_int("buffer_shards", buffer_shards, 1)
        dtype = self.dtype if dtype is None else dtype_in("dtype", dtype)
        return self._batches(batch_size, shuffle, seed, device, dtype, drop_last, buffer_shards)

    def _batches(
        self,
        batch_size: int,
        shuffle: bool,
        seed: int,
        device: str | torch.device | None,
        dtype: torch.dtype,
        drop_last: bool,
        buffer_shards: int,
    ) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        count = len(self.manifest["shards"])
        order = torch.randperm(count, generator=generator).tolist() if shuffle else range(count)
        step = buffer_shards if shuffle else 1
        rest = torch.empty(0, self.d_model, dtype=self.dtype)
        for first in range(0, count, step):
            rows = torch.cat([rest, *(self._load(index) for index in order[first : first + step])])
            if shuffle:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            whole = len(rows) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield rows[start : start + batch_size].to(device=device, dtype=dtype)
            rest = rows[whole:].clone()  # a view would keep the whole buffer alive
        if len(rest) and not drop_last:
            yield rest.to(device=device, dtype=dtype)

    def _load(self, index: int) -> Tensor:
        file = self.path / self.manifest["shards"][index]["file"]
        try:
            return require("safetensors.torch").load_file(file)[_KEY]
        except Exception as error:  # the file was sound when the store was opened
            raise ValueError(f"{file} is missing or damaged: {error}") from error


# ------------------------------------------------------------------------------------------------- files


def _write_shard(folder: Path, manifest: dict[str, Any], rows: Tensor, text_sha256: str) -> None:
    name = f"shard-{len(manifest['shards']):05d}.safetensors"
    data = require("safetensors.torch").save({_KEY: rows.contiguous()})
    replace_file(folder / name, lambda temporary: temporary.write_bytes(data))
    shard = {"file": name, "tokens": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    # text_sha256: of all token ids that had been read when this shard was full; resuming compares it.
    manifest["shards"].append({**shard, "text_sha256": text_sha256})
    manifest["tokens"] += len(rows)
    _write_manifest(folder, manifest)


def _check_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Compare a shard's header, and so its length, with the manifest. Reads no activations."""
    file = folder / shard["file"]
    expected = [shard["tokens"], manifest["d_model"]]
    try:
        with require("safetensors").safe_open(file, framework="pt") as opened:
            part = opened.get_slice(_KEY)
            shape, dtype = part.get_shape(), part.get_dtype()
    except Exception as error:  # safetensors has its own exceptions for truncated files and foreign headers
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    if shape != expected or dtype != {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[manifest["dtype"]]:
        raise ValueError(f"{file} is damaged: it holds {dtype} {shape}, the manifest says {expected}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(folder)!r} has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        sound = manifest["dtype"] in DTYPES and manifest["tokens"] == sum(s["tokens"] for s in manifest["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not sound or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is damaged, or of another format than {FORMAT}")
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2) + "\n"
    replace_file(folder / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _check_finite(rows: Tensor, first: int, lm: LanguageModel, texts_at: Tensor) -> None:
    """ValueError that says where in the texts the first row that is not finite lies, and how many there are."""
    finite = rows.isfinite().all(1)
    if bool(finite.all()):
        return
    wrong, row = int((~finite).sum()), int((~finite).nonzero()[0])
    text = lm.tokenizer.decode(texts_at.flatten().tolist())
    dtype = _dtype_name(next(lm.model.parameters()).dtype)
    raise ValueError(
        f"texts: {wrong} of {len(rows)} activations are not finite, the first at token {first + row} of the stream, in "
        f"the contexts that begin with {text[:60]!r}: {lm.name!r} computes in {dtype}; load it in bfloat16 or float32, "
        "or leave this text out"
    )


def _cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """To the stored dtype, on the CPU; an overflow is an error, since a clipped or infinite value would go unseen."""
    stored = rows.to(device="cpu", dtype=dtype)
    if not bool(stored.isfinite().all()):
        largest = f"{float(rows.abs().max()):.6g}"
        raise ValueError(f"dtype: an activation of {largest} overflows {_dtype_name(dtype)}; use bfloat16 or float32")
    return stored


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version() -> str:
    try:
        return metadata.version("sae-engine")
    except metadata.PackageNotFoundError:
        return "not installed"
