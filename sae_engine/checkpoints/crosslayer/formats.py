"""The formats of crosscoders and cross-layer transcoders: which one a folder is in, reading it, writing it."""
from __future__ import annotations

from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ... import _checks as check
from ..._files import as_a_whole
from ...distributed.agreement import Agreement
from ...distributed.layout import Ownership
from . import circuit_tracer, clt_forge, dictionary_learning, gemma_scope_2, ours, transcoder_set
from ._record import Cut, Record, build

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ...crosscoder import Crosscoder

FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (ours, circuit_tracer, transcoder_set, gemma_scope_2, dictionary_learning)
}
READ = FORMATS | {clt_forge.NAME: clt_forge}  # which is not written


def detect(path: str | PathLike) -> str | None:
    """The format of the crosscoder in the folder ``path``, by its files' names; None where it is none.

    Raises:
        ValueError: it may be of several formats.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     se.Crosscoder.clt(2, 4, 16, se.TopK(2)).save_pretrained(folder)
        ...     detect(folder)
        'sae_engine'
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    found = [name for name, module in READ.items() if module.owns(folder)]
    if len(found) > 1:
        raise ValueError(f"{folder} may have any of the formats {found}: name one")
    return found[0] if found else None


def load(
    cls: type[Crosscoder], path: str | PathLike, *, format: str = "auto", device: Any = None,
    dtype: torch.dtype | str | None = None, mesh: DeviceMesh | None = None,
) -> Crosscoder:  # fmt: skip
    """A crosscoder of class ``cls``; see :meth:`sae_engine.Crosscoder.from_pretrained`.

    Raises:
        As there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(se.Crosscoder.clt(2, 4, 16, se.TopK(2)), folder)
        ...     load(se.Crosscoder, folder).d_sae
        16
    """
    if format not in ("auto", *READ):
        raise ValueError(f"format must be one of {['auto', *READ]}, got {format!r}")
    dtype = None if dtype is None else check.dtype_in("dtype", dtype)
    device, folder = check.device_or_default(device), Path(path).expanduser()
    with as_a_whole(folder, writes=False):
        if mesh is not None:
            return _load_slices(cls, folder, format, mesh, device=device, dtype=dtype)
        record, file = _read(folder, format)
        return build(cls, record.settled([record.seen]), file, device=device, dtype=dtype)


def _read(folder: Path, format: str, cut: Cut | None = None) -> tuple[Record, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be the folder of a crosscoder; there is none at {str(folder)!r}")
    name = detect(folder) if format == "auto" else format
    if name is None or not READ[name].owns(folder):
        held = sorted(place.name for place in folder.iterdir())[:8]
        wanted = f"of a known format ({', '.join(READ)})" if name is None else f"of the format {name!r}"
        raise ValueError(f"{folder} holds no crosscoder {wanted}: it has {held}")
    return READ[name].load(folder, cut)


def _load_slices(cls: type[Crosscoder], folder: Path, format: str, mesh: DeviceMesh, **options: Any) -> Crosscoder:
    """The same over a mesh: each rank reads its own latents. All ranks call it."""
    agreement = Agreement.of(mesh)
    with agreement.all_or_none("loaded"):
        record, file = _read(folder, format, lambda num_latents: Ownership.on(mesh, num_latents).mine)
    seen = agreement.said(record.seen)
    with agreement.all_or_none("loaded"):
        return build(cls, record.settled(seen), file, mesh=mesh, **options)


def save(coder: Crosscoder, path: str | PathLike, *, format: str = ours.NAME) -> None:
    """Writes a crosscoder; see :meth:`sae_engine.Crosscoder.save_pretrained`.

    Raises:
        As there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(se.Crosscoder([4, 4], [4, 4], 16, se.ReLU()), folder, format="dictionary_learning_crosscoder")
        ...     detect(folder)
        'dictionary_learning_crosscoder'
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if coder.shards is not None:
        if format != ours.NAME:
            raise ValueError(f"format must be {ours.NAME!r} for a crosscoder on a mesh, got {format!r}: load that one "
                             "without a mesh and save it again")  # fmt: skip
        ours.save_slices(coder, Path(path).expanduser())
        return
    FORMATS[format].save(coder, Path(path).expanduser())
