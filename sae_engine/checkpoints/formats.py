"""The formats of the field: which one a checkpoint is in, reading it, writing it, and from one to another."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from .. import _checks as check
from .._files import as_a_whole
from . import _sharded as sharded
from . import (
    batchtopk,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hub,
    llama_scope,
    openai,
    saelens,
    sparsify,
)
from ._checkpoint import Checkpoint, Files, build, of
from ._folding import unit_decoder_rows
from ._reading import Source, WeightFile, look_at
from .card import CENTRED, RAW, UNKNOWN
from .crosslayer import formats as crosslayer
from .crosslayer import transcoder_set

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FORMATS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (saelens, sparsify, dictionary_learning, openai, gemma_scope, gemma_scope_2, batchtopk)
}  # fmt: skip
READ = FORMATS | {module.NAME: module for module in (llama_scope, circuit_tracer)}  # the last two are not written
RESIDUALS = (RAW, CENTRED)
Found = tuple[Path, str | None, str | None]  # a place on this machine; of the hub also repository, name with commit


def detect(path: str | PathLike) -> str:
    """The format of the checkpoint at ``path``, a folder or a file, by what its files hold; names do not matter.

    Raises:
        FileNotFoundError: there is nothing, or one of its two files is missing.
        ValueError: it is damaged, of no known format, or several checkpoints.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(se.SparseAutoencoder(4, 16, se.TopK(2)), folder, format="sparsify")
        ...     detect(folder)
        'sparsify'
    """
    return _choose(look_at(Path(path)), "auto")[0].NAME


def load(
    cls, path: str | PathLike, *, format: str = "auto", device=None, dtype: torch.dtype | str | None = None,
    activation_scale: float | None = None, residual: str | None = None, fold_decoder_norms: bool = False,
    mesh: DeviceMesh | None = None,
):  # fmt: skip
    """An autoencoder of class ``cls``; see :meth:`sae_engine.SparseAutoencoder.from_pretrained`.

    Raises:
        As there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(se.SparseAutoencoder(4, 16, se.TopK(2)), folder)
        ...     load(se.SparseAutoencoder, folder).d_sae
        16
    """
    dtype = None if dtype is None else check.dtype_in("dtype", dtype)
    device = check.device_or_default(device)
    check.flag("fold_decoder_norms", fold_decoder_norms)
    if cls.has_sites:
        given = {"activation_scale": activation_scale, "residual": residual, "fold_decoder_norms": fold_decoder_norms}
        if said := [name for name, value in given.items() if value not in (None, False)]:
            raise ValueError(f"{said[0]} must be left out, got {given[said[0]]!r}: a crosscoder has none")
        return crosslayer.load(cls, _find(path)[0], format=format, device=device, dtype=dtype, mesh=mesh)
    at = _find(path)  # a hub is asked once
    if format == "auto" and _is_crosscoder(at[0]):
        raise ValueError(f"{path!s} is a crosscoder: Crosscoder.from_pretrained loads it")

    def found(cut: Callable[[int], slice] | None = None) -> tuple[Checkpoint, Path]:
        c, file = read(path, format=format, activation_scale=activation_scale, residual=residual, cut=cut, at=at)
        return unit_decoder_rows(c) if fold_decoder_norms else c, file

    if mesh is not None:
        return sharded.load(cls, found, mesh, device=device, dtype=dtype)
    return build(cls, *found(), device=device, dtype=dtype)


def holds_crosscoder(path: str | PathLike) -> bool:
    """Whether a folder is a crosscoder's and nothing else; a set of transcoders is also an autoencoder for each layer.

    Raises:
        ValueError: the folder may be of several formats.
    """
    return _is_crosscoder(_find(path)[0])


def _is_crosscoder(place: Path) -> bool:
    return crosslayer.detect(place) not in (None, transcoder_set.NAME)


def read(
    path: str | PathLike, *, format: str = "auto", activation_scale: float | None = None,
    residual: str | None = None, cut: Callable[[int], slice] | None = None, at: Found | None = None,
) -> tuple[Checkpoint, Path]:  # fmt: skip
    """The checkpoint at ``path``, and the file to name when it cannot be built.

    ``cut`` maps the number of latents to the slice of them that is read; None: all are. ``at``: where the checkpoint
    was found, if it has been looked for already.
    """
    known(format, ["auto", *READ])
    if residual is not None and residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {RESIDUALS} or None, got {residual!r}")
    place, repository, source = _find(path) if at is None else at
    with as_a_whole(place if place.is_dir() else place.parent, writes=False):
        module, files = _choose(look_at(place), format)
        if cut is not None:
            if module is llama_scope or files.weights.kind == "npz":
                raise ValueError(f"mesh must be None: the format {module.NAME!r} cannot be read by slices; convert the "
                                 "checkpoint to format='saelens' first")  # fmt: skip
            files = replace(files, weights=replace(files.weights, cut=cut))
        if module is saelens:
            c = saelens.load(files, activation_scale=activation_scale)
        elif activation_scale is None:
            c = module.load(files)
        else:
            raise ValueError(f"activation_scale must be None: {place} has the format {module.NAME!r}, which has none")
    assert c.card is not None
    card = c.card if source is None else replace(c.card, source=source)
    if residual is None and card.residual == UNKNOWN and repository in hub.CENTRED:
        residual = CENTRED
    c = replace(c, card=card if residual is None else replace(card, residual=residual))
    if residual == RAW and c.normalize_activations == "center":
        assert c.card is not None
        c = replace(c, normalize_activations="none", card=replace(c.card, normalization="none"))
    return c.taking_raw_residuals() if residual == CENTRED else c, files.weights.path


def save(sae, path: str | PathLike, *, format: str | None = None) -> None:
    """Writes an autoencoder; see :meth:`sae_engine.SparseAutoencoder.save_pretrained`.

    Raises:
        As there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(se.SparseAutoencoder(4, 16, se.ReLU()), folder, format="dictionary_learning")
        ...     detect(folder)
        'dictionary_learning'
    """
    if sae.has_sites:
        crosslayer.save(sae, path, format="sae_engine" if format is None else format)
        return
    format = "saelens" if format is None else format
    known(format)
    if sae.shards is None:
        FORMATS[format].save(of(sae), path)
    elif format == saelens.NAME:
        sharded.save(sae, path)
    else:
        raise ValueError(f"format must be {saelens.NAME!r} for an autoencoder on a mesh, got {format!r}: load that one "
                         "without a mesh and save it again")  # fmt: skip


def known(format: str, names: Sequence[str] = tuple(FORMATS)) -> None:
    if format not in names:
        raise ValueError(f"format must be one of {list(names)}, got {format!r}")


def _find(path: str | PathLike) -> Found:
    """Where it lies; of the hub also the repository and the name with the commit."""
    place = Path(path).expanduser()
    if place.exists() or not isinstance(path, str) or not hub.is_name(path):
        return place, None, None
    return hub.fetch(path)


def _choose(source: Source, format: str) -> tuple[ModuleType, Files]:
    """The format whose weights and configuration these are; where that is open, the clearest complaint."""
    whole: list[tuple[ModuleType, list[WeightFile], Path | None]] = []
    halves: list[tuple[ModuleType, list[WeightFile], Path | None]] = []
    for module in READ.values() if format == "auto" else [READ[format]]:
        fitting = [w for w in source.weights if w.kind == module.KIND]
        own = [w for w in fitting if module.owns_weights(w.names)]
        config = next((file for file, config in source.configs.items() if module.owns_config(config)), None)
        if own and (config is not None or not module.CONFIG_REQUIRED):
            whole.append((module, own, config))
        elif config is not None:
            halves.insert(0, (module, fitting, config))
        elif own:
            halves.append((module, own, None))
    if len(whole) > 1:
        raise ValueError(f"{source.place} may have any of the formats {[m.NAME for m, _, _ in whole]}: name one")
    if not whole and (source.place / "metrics.jsonl").is_file():  # what a training left
        inside = [str(file.parent) for name in ("cfg.json", "crosscoder.json")
                  for file in sorted(source.place.glob(f"sae/*/{name}"))]  # fmt: skip
        what = f"name one of its autoencoders: {', '.join(inside)}" if inside else "it has not ended and has none yet"
        raise ValueError(f"{source.place} is the folder of a run: {what}")
    if not whole and source.damaged:
        raise next(iter(source.damaged.values()))
    if not whole and not halves:
        held = sorted(w.path.name for w in source.weights) or "no weights"
        wanted = f"of a known format ({', '.join(READ)})" if format == "auto" else f"of the format {format!r}"
        raise ValueError(f"{source.place} holds no checkpoint {wanted}: it has {held}")
    module, weights, config = (whole or halves)[0]
    if config is None and module.CONFIG_REQUIRED:
        file = source.folder / module.CONFIG
        if file.exists():
            raise ValueError(f"{file} is no configuration of the format {module.NAME!r}: its fields are missing")
        raise FileNotFoundError(f"{file} is missing: {weights[0].path.name} has weights of the format {module.NAME!r}")
    if not weights:
        file = source.folder / module.WEIGHTS
        raise FileNotFoundError(f"{file} is missing: {config} describes a checkpoint of the format {module.NAME!r}")
    if len(weights) > 1:
        names = sorted(w.path.name for w in weights)
        raise ValueError(f"{source.place} holds several checkpoints of the format {module.NAME!r}, {names}: name one")
    return module, Files(weights[0], config, source.configs.get(config) if config else None)
