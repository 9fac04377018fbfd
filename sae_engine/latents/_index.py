"""Entries sorted by latents, on disk: made in one pass over the shards, in the memory of one of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import replace_file
from ..codes import SparseCodes
from ..data._require import require

OFFSETS, TOKENS, VALUES, SAYS = "offsets.npy", "tokens.npy", "values.npy", "index.json"


class Index:
    """Where each latent fires: latent f owns ``offsets[f]:offsets[f + 1]`` of two files, which are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        numpy = require("numpy")
        self._offsets = torch.from_numpy(numpy.load(folder / OFFSETS, allow_pickle=False))
        self._tokens, self._values = (
            numpy.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (TOKENS, VALUES)
        )

    @classmethod
    def open(
        cls, folder: Path, shards: list[dict[str, Any]], d_sae: int, dtype: torch.dtype,
        codes: Callable[[], Iterator[SparseCodes]],
    ) -> Index:  # fmt: skip
        """The index in ``folder``, made anew where it is not that of these shards; ``codes`` gives them in turn."""
        of = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        if not _is_of(folder, of):
            _write(folder, of, shards, d_sae, dtype, codes)
        return cls(folder)

    def counts(self) -> Tensor:
        """(d_sae,) int64."""
        return self._offsets.diff()

    def entries(self, latent: int) -> tuple[Tensor, Tensor]:
        """Numbers of the tokens, int64, ascending, and the values there."""
        own = slice(int(self._offsets[latent]), int(self._offsets[latent + 1]))
        return torch.from_numpy(self._tokens[own].copy()).long(), torch.from_numpy(self._values[own].copy())


def _is_of(folder: Path, of: str) -> bool:
    try:
        said = json.loads((folder / SAYS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("of") == of and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in said.get("sizes", {"": 0}).items()
    )


def _write(
    folder: Path, of: str, shards: list[dict[str, Any]], d_sae: int, dtype: torch.dtype,
    codes: Callable[[], Iterator[SparseCodes]],
) -> None:  # fmt: skip
    """Two passes over the shards: how many entries each latent has, then each shard's to their places."""
    numpy = require("numpy")
    folder.mkdir(exist_ok=True)
    (folder / SAYS).unlink(missing_ok=True)  # without it, what lies there is no index until all of it is written
    counts = torch.zeros(d_sae, dtype=torch.int64, device="cpu")
    for part in codes():
        counts += torch.bincount(part.indices, minlength=d_sae)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
    total, last = int(offsets[-1]), sum(shard["tokens"] for shard in shards)
    kinds = {TOKENS: numpy.int32 if last <= 2**31 else numpy.int64, VALUES: _numpy_dtype(numpy, dtype)}
    names = {name: folder / f".{name}.{os.getpid()}.tmp" for name in kinds}
    try:
        files = {
            name: numpy.lib.format.open_memmap(path, mode="w+", dtype=kinds[name], shape=(total,))
            for name, path in names.items()
        }
        free, first = offsets[:-1].clone(), 0  # the next place of each latent, the number of the shard's first token
        for part in codes():
            own, rows, at = part.by_latent
            lengths = own.diff()
            places = torch.arange(len(rows), device="cpu") + torch.repeat_interleave(free - own[:-1], lengths)
            files[TOKENS][places.numpy()] = (rows.long() + first).numpy()
            files[VALUES][places.numpy()] = part.values[at].numpy()
            free += lengths
            first += part.rows
        for file in files.values():
            file.flush()
        del files
        for name, path in names.items():
            os.replace(path, folder / name)
    finally:
        for path in names.values():
            path.unlink(missing_ok=True)
    with (folder / OFFSETS).open("wb") as stream:
        numpy.save(stream, offsets.numpy(), allow_pickle=False)
    sizes = {name: (folder / name).stat().st_size for name in (OFFSETS, TOKENS, VALUES)}
    replace_file(folder / SAYS, lambda path: path.write_text(json.dumps({"of": of, "sizes": sizes}), encoding="utf-8"))


def _numpy_dtype(numpy: Any, dtype: torch.dtype) -> Any:
    return {torch.float16: numpy.float16, torch.float32: numpy.float32}[dtype]
