"""Codes on disk: which latents fire on which tokens, written shard by shard, read by tokens and by latents."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._files import file_sha256
from ..codes import SparseCodes
from ..data._require import require
from ..data.contexts import check_int, rows_in_words
from ..data.store import folder_in
from ..provenance import Provenance
from ._index import Index

MANIFEST = "features.json"
FORMAT = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_IN_FILES = {"float16": "F16", "float32": "F32"}
_SHARDS_HELD = 32
_OF_TOKENS = {"token_ids": "I32", "documents": "I32", "offsets": "I32", "positions": "I32", "encoded": "BOOL"}
_REQUIRED = ("model", "revision", "sha256", "model_dtype", "sae", "sae_sha256", "d_in", "d_sae", "layer", "site",
             "normalize", "context_length", "separator", "drop_first", "exclude_tokens", "text_source", "max_tokens",
             "complete")  # fmt: skip


class FeatureTokens(NamedTuple):
    """Which tokens these are: tensors ``(tokens,)``, int32, ``encoded`` bool.

    ``token_ids``: the token. ``documents``: the number of its document, from 0; -1 for what was put before a context.
    ``offsets``: its place in the document. ``positions``: its place in the context that the model saw; each context
    begins with 0. ``encoded``: whether the autoencoder was given it; the others (each context's first, excluded tokens)
    are there to be read and have no codes.
    """

    token_ids: Tensor
    documents: Tensor
    offsets: Tensor
    positions: Tensor
    encoded: Tensor


class LatentEntries(NamedTuple):
    """Where one latent fires: ``tokens`` (n,) int64, the numbers of the tokens, ascending, and ``values`` (n,)."""

    tokens: Tensor
    values: Tensor


class Features:
    """What :func:`~sae_engine.latents.collect` wrote: codes and tokens of a text, read without a language model.

    Opening compares every file's header with the manifest and reads no codes; :meth:`verify` compares checksums. The
    first question about a latent sorts all entries by latents, once: the index is kept in the folder, as large as the
    codes, and every later one reads that latent's entries alone.

    Args:
        path: folder that :func:`~sae_engine.latents.collect` wrote.
        allow_incomplete: also open what was cut off.

    Attributes:
        path, manifest, d_sae, dtype, complete, provenance; ``len(features)`` is the number of tokens.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: no manifest there.
        ValueError: the manifest or a shard is damaged (names the file), or incomplete.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = se.latents.collect(sae, lm, ["A text."], folder, layer=2, site="resid_post", progress=False)
        ...     codes, tokens = features.codes(), features.tokens()
        ...     latent = int(codes.indices[0])
        ...     found = features.by_latent(latent)
        >>> codes.shape == (len(tokens.token_ids), 512), bool(codes.l0[0] == 0), tokens.encoded[:2].tolist()
        (True, True, [False, True])
        >>> torch.equal(codes.to_dense()[found.tokens, latent], found.values)
        True
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False) -> None:
        self.path = folder_in("path", path)
        self.manifest = read_manifest(self.path)
        self.d_sae: int = self.manifest["d_sae"]
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.complete: bool = self.manifest["complete"]
        if not self.complete and not allow_incomplete:
            raise ValueError(
                f"path: the features in {str(path)!r} were cut off after {self.manifest['tokens']} tokens; collect "
                "again to finish them, or pass allow_incomplete=True"
            )
        for shard in self.manifest["shards"]:
            check_shard(self.path, shard, self.manifest)
        self._index: Index | None = None
        self._held: OrderedDict[int, FeatureTokens] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest["tokens"]

    def __repr__(self) -> str:
        m = self.manifest
        cut_off = "" if self.complete else ", incomplete"
        mean = m["entries"] / max(m["encoded"], 1)
        return f"Features({len(self)} tokens, d_sae={self.d_sae}, mean_l0={mean:.1f}, {m['dtype']}{cut_off})"

    @property
    def provenance(self) -> Provenance:
        """Which activations were encoded."""
        m = self.manifest
        return Provenance(
            model=m["model"], revision=m["revision"], sha256=m["sha256"], layer=m["layer"], site=m["site"],
            sites=m.get("sites"), models=m.get("models"), d=m["d_in"], normalize=m["normalize"],
            model_dtype=m["model_dtype"], text=m["text_source"],
            **rows_in_words(m),
        )  # fmt: skip

    def codes(self, start: int = 0, stop: int | None = None) -> SparseCodes:
        """Codes of the tokens ``start`` to ``stop``, over (tokens, d_sae), on the CPU.

        Raises:
            TypeError, ValueError: ``start`` and ``stop`` are no range of tokens, or a shard is damaged.

        Example:
            >>> import tempfile
            >>> lm = se.data.load_language_model()
            >>> sae = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     features = se.latents.collect(sae, lm, ["A text."], folder, layer=2, site="resid_post")
            ...     features.codes(1, 3).shape
            torch.Size([2, 512])
        """
        none = torch.empty(0, dtype=torch.int32, device="cpu")
        parts = [(none.to(self.dtype), none, none)]
        for index, rows in self._shards_of(start, stop):
            parts.append(self._opened(index, lambda file, rows=rows: _codes_of(file, rows)))
        values, indices, counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
        return SparseCodes(values, indices, offsets, (len(counts),), self.d_sae)

    def tokens(self, start: int = 0, stop: int | None = None) -> FeatureTokens:
        """Which tokens ``start`` to ``stop`` are.

        Raises:
            TypeError, ValueError: as :meth:`codes`.
        """
        none = torch.empty(0, dtype=torch.int32, device="cpu")
        parts = [[none] * 4 + [none.bool()]]
        for index, rows in self._shards_of(start, stop):
            parts.append([t[rows] for t in self._tokens_of(index)])
        return FeatureTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def by_latent(self, latent: int) -> LatentEntries:
        """Every token on which a latent fires, and its activation there.

        Raises:
            TypeError, ValueError: ``latent`` is no latent.
            OSError: the index is not there yet, and the folder cannot be written to.
        """
        latent = check_int("latent", latent, 0, self.d_sae - 1)
        return LatentEntries(*self.index().entries(latent))

    def counts(self) -> Tensor:
        """(d_sae,) int64: on how many tokens each latent fires. Over ``manifest["encoded"]`` that is its density."""
        return self.index().counts()

    def index(self) -> Index:
        """The entries sorted by latents; made where it is missing, or belongs to fewer shards."""
        if self._index is None:
            shards = self.manifest["shards"]
            self._index = Index.open(self.path / "by_latent", shards, self.d_sae, self.dtype, self._all_codes)
        return self._index

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest; ValueError names the first that differs."""
        for shard in self.manifest["shards"]:
            check_sha256(self.path, shard)

    def _all_codes(self) -> Iterator[SparseCodes]:
        first = 0
        for shard in self.manifest["shards"]:
            yield self.codes(first, first + shard["tokens"])
            first += shard["tokens"]

    def _shards_of(self, start: int, stop: int | None) -> Iterator[tuple[int, slice]]:
        stop = len(self) if stop is None else check_int("stop", stop, 0, len(self))
        start = check_int("start", start, 0, stop)
        first = 0
        for index, shard in enumerate(self.manifest["shards"]):
            low, high = max(start - first, 0), min(stop - first, shard["tokens"])
            if low < high:
                yield index, slice(low, high)
            first += shard["tokens"]

    def _tokens_of(self, index: int) -> FeatureTokens:
        """Of one shard; those of the last few are kept, since the contexts of a latent are looked up one by one."""
        if index not in self._held:
            read = lambda file: FeatureTokens(*(file.get_tensor(name) for name in FeatureTokens._fields))  # noqa: E731
            self._held[index] = self._opened(index, read)
            if len(self._held) > _SHARDS_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(index)
        return self._held[index]

    def _opened(self, index: int, read: Any) -> Any:
        file = self.path / self.manifest["shards"][index]["file"]
        try:
            with require("safetensors").safe_open(file, framework="pt") as opened:
                return read(opened)
        except Exception as error:  # the file was sound when the features were opened
            raise ValueError(f"{file} is missing or damaged: {error}") from error


def _codes_of(file: Any, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and counts of some of a shard's tokens."""
    counts = file.get_tensor("counts")
    before = int(counts[: rows.start].sum())
    entries = slice(before, before + int(counts[rows].sum()))
    return file.get_slice("values")[entries], file.get_slice("indices")[entries], counts[rows]


# -------------------------------------------------------------------------------- what collecting shares with this


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"path: {str(folder)!r} has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if missing := [key for key in _REQUIRED if key not in manifest]:
            raise KeyError(missing[0])
        sound = manifest["format"] == FORMAT and manifest["dtype"] in DTYPES and manifest["d_sae"] > 0
        for name in ("tokens", "entries", "encoded"):
            sound &= manifest[name] == sum(shard[name] for shard in manifest["shards"])
        for shard in manifest["shards"]:
            sound &= {"sha256", "text_sha256", "batches"} <= set(shard) and Path(shard["file"]).name == shard["file"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not sound:
        raise ValueError(f"{file} is damaged, or of another format than {FORMAT}")
    return manifest


def check_shard(folder: Path, shard: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Compare a shard's header, and so its length, with the manifest. Reads no codes."""
    file = folder / shard["file"]
    expected = {name: (dtype, [shard["tokens"]]) for name, dtype in {**_OF_TOKENS, "counts": "I32"}.items()}
    expected |= {"values": (_IN_FILES[manifest["dtype"]], [shard["entries"]]), "indices": ("I32", [shard["entries"]])}
    try:
        with require("safetensors").safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dictionary
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # safetensors has its own exceptions for truncated files and foreign headers
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    for name, there in expected.items():
        if found.get(name) != there:
            raise ValueError(f"{file} is damaged: its {name} are {found.get(name)}, the manifest says {there}")


def check_sha256(folder: Path, shard: dict[str, Any]) -> None:
    if file_sha256(folder / shard["file"]) != shard["sha256"]:
        raise ValueError(f"{folder / shard['file']} is damaged: its sha256 is not the manifest's; collect anew")
