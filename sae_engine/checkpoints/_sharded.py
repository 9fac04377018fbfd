"""A SAELens folder of an autoencoder whose latents are cut over ranks, and back: each rank its slices of one file."""
from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._files import replace_files
from ..distributed.agreement import Agreement
from ..distributed.layout import Ownership
from ..distributed.lent_disk import LentDisk
from . import saelens
from ._checkpoint import DIMENSIONS, WEIGHTS, Checkpoint, build, of, text_writer

if TYPE_CHECKING:
    from ..distributed.shards import Shards

PIECE_BYTES = 1 << 26  # that are written at a time
# As safetensors names them and orders them in a file: wide ones first, so that all lie aligned.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.bool: "BOOL"}  # fmt: skip


class Slice(NamedTuple):
    """A rank's ``part`` of a tensor: along ``dim`` it begins at ``first`` of ``total``; with None it is the whole."""

    part: Tensor
    dim: int | None
    first: int
    total: int

    @property
    def shape(self) -> list[int]:
        return [self.total if dim == self.dim else size for dim, size in enumerate(self.part.shape)]


def save(sae, path: str | PathLike) -> None:
    """Writes what :func:`.saelens.save` would of the whole autoencoder, byte for byte. All ranks call it.

    The folder is one of the first rank's disk; ranks that do not see it send their slices there.

    Raises:
        TypeError: its rule has options that JSON cannot hold.
        OSError: the disk is full.
        RuntimeError: a rank has failed or does not answer: names it.
    """
    layout = sae.shards.layout

    def prepared() -> Folder:
        c = replace(of(sae.share), card=sae.card, provenance=sae.provenance, options=sae.activation.options())
        tensors, content = saelens.prepared(c, layout.num_latents)
        slices = {name: _slice(name, t, sae, layout) for name, t in tensors.items()}
        return Folder({saelens.WEIGHTS: slices}, {saelens.CONFIG: text_writer(content)}, saelens.METADATA)

    written(sae.shards, Path(path), prepared)


class Folder(NamedTuple):
    """What is to be written: slices of the tensors of each file of safetensors, which all have the same metadata; and
    other files, whole."""

    files: Mapping[str, Mapping[str, Slice]]
    others: Mapping[str, Callable[[Path], object]]
    metadata: Mapping[str, str] | None


def written(shards: Shards, folder: Path, prepared: Callable[[], Folder]) -> None:
    """Writes a folder of which each rank has slices, whole or not at all. All ranks call it."""
    agreement = Agreement.of(shards.mesh)
    temporary: dict[str, Path] = {}
    made: list[Path] = []
    try:
        with agreement.all_or_none("saved"):
            files, others, metadata = prepared()
            headers = {file: _header(slices, metadata) for file, slices in files.items()}
            if agreement.rank == 0:
                made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                for file, slices in files.items():
                    header = headers[file][0]
                    place = folder / f".{file}.{secrets.token_hex(8)}.tmp"
                    with place.open("xb") as opened:
                        temporary[file] = place
                        opened.write(header)
                        opened.truncate(len(header) + sum(_bytes(s) for s in slices.values()))
        names = agreement.said({file: place.name for file, place in temporary.items()})[0]
        disk = LentDisk(agreement, all((folder / name).is_file() for name in names.values()))
        with agreement.all_or_none("saved"), disk.lent(folder):
            for file, slices in files.items():
                header, offsets = headers[file]
                with disk.open(folder / names[file], "r+b") as opened:
                    for key, one in slices.items():
                        if agreement.rank == 0 or (one.dim is not None and shards.group == 0):
                            _write(opened, len(header) + offsets[key], one)
                    opened.flush()
                    if not disk.is_borrowed:  # the first rank syncs what it is sent
                        os.fsync(opened.fileno())
        with agreement.all_or_none("saved"):
            if agreement.rank == 0:
                moves = {folder / file: partial(os.replace, place) for file, place in temporary.items()}
                replace_files({**moves, **{folder / name: write for name, write in others.items()}})
                made = []
    finally:
        for place in temporary.values():
            place.unlink(missing_ok=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def load(
    cls, found: Callable[[Callable[[int], slice]], tuple[Checkpoint, Path]], mesh: Any, *, device, dtype
):
    """The autoencoder over ``mesh`` of which ``found`` reads the latents that it is told to, and no others."""
    agreement = Agreement.of(mesh)
    with agreement.all_or_none("loaded"):
        c, file = found(lambda num_latents: Ownership.on(mesh, num_latents).mine)
    names = mesh.mesh_dim_names or ()
    groups = mesh.mesh.shape[names.index("data")] if "data" in names else 1
    d_sae = sum(agreement.said(c.tensors["W_enc"].shape[1])) // groups
    with agreement.all_or_none("loaded"):
        sae = build(cls, c, file, device=device, dtype=dtype, d_sae=d_sae, mesh=mesh)
    return sae


def _slice(name: str, tensor: Tensor, sae, layout: Ownership) -> Slice:
    dim = DIMENSIONS[name].index("F") if name in WEIGHTS and "F" in DIMENSIONS[name] else None
    whole = sae.activation.state_dict().get(name)
    if whole is not None and any(p.is_shard() for p in getattr(whole, "placements", ())):
        dim = 0
    return Slice(tensor.contiguous(), dim, layout.mine.start, layout.num_latents)


def _bytes(one: Slice) -> int:
    return one.part.element_size() * torch.Size(one.shape).numel()


def _header(slices: Mapping[str, Slice], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where each tensor lies behind it."""
    order = sorted(slices, key=lambda name: (-slices[name].part.element_size(), name))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offsets, end = {}, 0
    for name in order:
        offsets[name], end = end, end + _bytes(slices[name])
        entries[name] = {"dtype": NAMES[slices[name].part.dtype], "shape": slices[name].shape,
                         "data_offsets": [offsets[name], end]}  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _write(file: Any, base: int, one: Slice) -> None:
    part = one.part
    if one.dim == 1:  # a run of each row
        for row in range(len(part)):
            file.seek(base + (row * one.total + one.first) * part.element_size())
            file.write(_raw(part[row]))
        return
    width = part[:1].nbytes if part.dim() else part.nbytes
    file.seek(base + (one.first if one.dim == 0 else 0) * width)
    pieces = part.split(max(PIECE_BYTES // max(width, 1), 1)) if part.dim() else [part]
    for piece in pieces:
        file.write(_raw(piece))


def _raw(tensor: Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
