"""Reading files that somebody else wrote: nothing in them is run, and nothing larger than they are is made."""
from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data._require import require

MAX_JSON_BYTES = 16 * 2**20
# Arrays of an .npz may be compressed. Trained weights hardly shrink, zero biases do: this much growth is plausible.
MAX_GROWTH, GROWTH_SLACK = 16, 64 * 2**20
_YAML = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")  # the last is how some are spelled
_SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")


@dataclass(frozen=True)
class WeightFile:
    """A file of tensors. ``kind``: "safetensors", "torch" (a zip) or "npz".

    ``cut`` maps the number of latents to the slice of them that is to be read; None: all are.
    """

    path: Path
    kind: str
    cut: Callable[[int], slice] | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        """What it holds, without reading the tensors."""
        if self.kind == "safetensors":
            return frozenset(_safetensors(self.path, names_only=True))
        if self.kind == "npz":
            return frozenset(entry.filename.removesuffix(".npy") for entry in _entries(self.path))
        return frozenset(self.read())

    def read(self) -> dict[str, Any]:
        """Tensors by name; a torch file's dictionary may hold other values too."""
        return self._contents

    @cached_property
    def _contents(self) -> dict[str, Any]:
        return {"safetensors": _safetensors, "torch": _torch, "npz": _npz}[self.kind](self.path)


@dataclass(frozen=True)
class Source:
    """What a folder, or a file and its neighbours, holds.

    Attributes:
        place: what was asked for.
        folder: where its files lie.
        weights: files of tensors.
        configs: the objects in JSON files.
        damaged: files that look like one of these and are not, with what is wrong.
    """

    place: Path
    folder: Path
    weights: tuple[WeightFile, ...]
    configs: dict[Path, dict[str, Any]]
    damaged: dict[Path, ValueError]


def look_at(place: Path) -> Source:
    """Everything at ``place`` that may belong to a checkpoint, by content.

    Hidden files are passed over unless ``place`` is one: temporaries of a save that was killed, ``.DS_Store`` and such.

    Raises:
        FileNotFoundError: there is nothing at ``place``.
        ValueError: ``place`` is a file, and not one of tensors.
    """
    if not place.exists():
        raise FileNotFoundError(f"path must be a folder or a file of weights; there is none at {str(place)!r}")
    folder = place if place.is_dir() else place.parent
    weights: list[WeightFile] = []
    configs: dict[Path, dict[str, Any]] = {}
    damaged: dict[Path, ValueError] = {}
    for file in [*sorted(folder.iterdir()), *_apart(folder)]:
        if not file.is_file() or (file.name.startswith(".") and file != place):
            continue
        try:
            kind = _kind(file)
            if file.name in _YAML:
                configs[file] = read_yaml(file)
            elif kind == "json" or file.suffix == ".json":
                configs[file] = read_json(file)
            elif place in (folder, file) and kind is not None:
                found = WeightFile(file, kind)
                _ = found.names  # a file that cannot be opened is damaged, here and not later
                weights.append(found)
            elif place in (folder, file) and (file == place or file.suffix in _SUFFIXES):
                raise ValueError(f"{file} is no safetensors file, torch.save archive or .npz")
        except ValueError as error:
            if file == place:
                raise
            damaged[file] = error
    if place != folder and not weights:
        raise ValueError(f"{place} holds no weights: name the folder, or its file of weights")
    return Source(place, folder, tuple(weights), configs, damaged)


def _apart(folder: Path) -> list[Path]:
    """Files of the same checkpoint in another folder: Llama Scope's weights lie one below their configuration."""
    config, below = "hyperparams.json", "checkpoints"
    if (folder / config).is_file() and (folder / below).is_dir():
        return sorted((folder / below).iterdir())
    return [folder.parent / config] if folder.name == below else []


def _kind(file: Path) -> str | None:
    with file.open("rb") as stream:
        head = stream.read(9)
    # The header's length, little-endian and far below 2**40, then the header: no text begins with such zeros.
    if head[5:8] == b"\0\0\0" and head[8:] == b"{":
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        names = [entry.filename for entry in _entries(file)]
        if any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return "torch"
        return "npz" if names and all(name.endswith(".npy") for name in names) else None
    if head[:1] == b"\x80":
        raise ValueError(
            f"{file} is a bare pickle, which is never opened here; if it is torch's format of before 1.6, "
            "load and save it once with torch"
        )
    return "json" if head.lstrip()[:1] == b"{" else None


def _entries(file: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{file} is not a whole zip archive: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes: too many for a configuration")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    if "weight_map" in value:
        raise ValueError(f"{file} is an index of weights in several files, which is not followed: join them into one")
    return value


def read_yaml(file: Path) -> dict[str, Any]:
    yaml = require("yaml")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes: too many for a configuration")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold names and values, got {type(value).__name__}")
    # Weights and Biases writes each value below a name of its own.
    return {name: entry["value"] if isinstance(entry, dict) and "value" in entry else entry
            for name, entry in value.items()}  # fmt: skip


def _safetensors(file: Path, *, names_only: bool = False) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if not names_only:
            return load_file(file)
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys())
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(f"{file} is not a whole safetensors file of known dtypes: {error}") from error


def _torch(file: Path) -> dict[str, Any]:
    """A dictionary saved by torch. Tensors are mapped from the file, so that none can exceed it."""
    packed = [entry.filename for entry in _entries(file) if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{file} holds compressed records ({packed[0]}), which torch never writes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storage classes, which are the file's and not the user's
            contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged pickle raises is as open as the pickle
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be loaded as tensors alone (weights_only=True): {reason}") from error
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise ValueError(f"{file} must hold a dictionary of named tensors, got {type(contents).__name__}")
    size = file.stat().st_size
    for name, value in contents.items():
        if not isinstance(value, Tensor):
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{file}: {name} must be an ordinary dense tensor")
        if value.numel() * value.element_size() > size:
            raise ValueError(f"{file}: {name} has shape {tuple(value.shape)}, more than the {size} bytes of the file")
    return contents


def _npz(file: Path) -> dict[str, Tensor]:
    import numpy as np

    size, total = file.stat().st_size, 0
    tensors = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                total += entry.file_size
                if total > MAX_GROWTH * size + GROWTH_SLACK:
                    raise ValueError(f"it has {size} bytes and unpacks to more than {total}")
                with archive.open(entry) as stream:
                    shape, dtype, header = _npy_header(stream)
                if prod(shape) * dtype.itemsize + header != entry.file_size:
                    raise ValueError(f"{entry.filename} declares shape {shape} of {dtype}, which is not what it holds")
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(arrays[name]))
    except (ValueError, TypeError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{file} is not a whole .npz of plain arrays: {error}") from error
    return tensors


def _npy_header(stream: Any) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype and length of an .npy header."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an .npy of version {version}")
    shape, _, dtype = readers[version](stream)
    return shape, dtype, stream.tell()
