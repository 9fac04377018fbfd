"""The first weights of what is trained: drawn, those of an autoencoder that was saved, and for other scales."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._decoder_rows import BLOCK
from ..autoencoder import SparseAutoencoder
from ..checkpoints._checkpoint import build, of
from ..checkpoints._folding import fold_input_scale
from ..crosscoder import Crosscoder
from ..rules import PerSource
from ._faults import ConfigError, within

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def directions(rows: int, width: int, generator: torch.Generator, mine: slice) -> torch.Tensor:
    """(mine, width) of so many unit rows. Pieces of thousands of rows are the numbers that would be drawn at once."""
    starts = [number * BLOCK for number in range(max(rows // BLOCK, 1))]
    found = []
    for start, end in zip(starts, [*starts[1:], rows], strict=True):
        drawn = torch.randn(end - start, width, generator=generator, device="cpu")
        drawn = drawn[max(mine.start - start, 0) : max(mine.stop - start, 0)]
        found.append(drawn / drawn.norm(dim=1, keepdim=True))
    return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def own_draws(mesh: DeviceMesh | None) -> Iterator[None]:
    """What is drawn inside, on the CPU or on the device of a mesh, moves no generator outside."""
    on_gpu = mesh is not None and mesh.device_type == "cuda"
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
        yield


def folded(sae: SparseAutoencoder, scale: float, target_scale: float, place: Path) -> SparseAutoencoder:
    """A copy for activations as they are, of one that was trained on ``scale`` times them; of my latents on a mesh."""
    c = of(sae.share)
    c = replace(c, card=sae.card, provenance=sae.provenance, options=sae.activation.options())
    c = fold_input_scale(c, scale, target_scale)
    mesh = None if sae.shards is None else sae.shards.mesh
    return build(SparseAutoencoder, c, place, device=sae.share.W_dec.device, d_sae=sae.d_sae, mesh=mesh)


@torch.no_grad()
def start_from(sae: SparseAutoencoder, source: str, *, unit_rows: bool, scaled: bool) -> None:
    """Copies the weights of an autoencoder that was saved, for the rows as it was trained on where they are scaled."""
    shards = sae.shards
    mesh = None if shards is None else shards.mesh
    with within("from_pretrained", None), own_draws(mesh):
        found = SparseAutoencoder.from_pretrained(source, mesh=mesh)
    if scaled:
        known = found.provenance
        if known is None or known.activation_scale is None:
            what = f"must be none: {source} does not say by what its rows were multiplied in training"
            raise ConfigError([("normalize_activations", what)])
        target_scale = known.target_scale or known.activation_scale
        with own_draws(mesh):
            found = folded(found, 1 / known.activation_scale, 1 / target_scale, Path(source))
    sae.provenance = found.provenance
    for name in ("d_in", "d_out", "d_sae", "normalize_activations", "apply_b_dec_to_input",
                 "rescale_acts_by_decoder_norm"):  # fmt: skip
        if getattr(found, name) != (wanted := getattr(sae, name)):
            raise ConfigError([("from_pretrained", f"{source} has {name} = {getattr(found, name)}, not {wanted}")])
    if type(found.activation) is not type(sae.activation):
        raise ConfigError([("from_pretrained", f"{source} is a {type(found.activation).__name__}, not a "
                            f"{type(sae.activation).__name__}: name its architecture")])  # fmt: skip
    if found.W_skip is not None:
        raise ConfigError([("from_pretrained", f"{source} has a skip connection, which no configuration trains")])
    norms = found.share.W_dec.float().norm(dim=1)
    norms = norms if shards is None else shards.all_latents(norms, "norms")
    if unit_rows and bool(((norms - 1).abs() > 1e-3).any()):
        known = found.provenance
        other = known is not None and known.activation_scale is not None and not scaled
        way_out = ", or normalize_activations expected_average_only_in, as in its training" * other
        raise ConfigError([("normalize_decoder", f"must be false: rows of {source} have norms from {norms.min():.3g} "
                            f"to {norms.max():.3g}, and would be scaled to 1{way_out}")])  # fmt: skip
    _copy_weights(found, sae)


@torch.no_grad()
def start_crosscoder(coder: Crosscoder, source: str) -> None:
    """Copies the weights of a crosscoder that was saved."""
    mesh = None if coder.shards is None else coder.shards.mesh
    with within("from_pretrained", None), own_draws(mesh):
        found = Crosscoder.from_pretrained(source, mesh=mesh)
    if not isinstance(found, Crosscoder):
        raise ConfigError([("from_pretrained", f"{source} is a {type(found).__name__}, not a crosscoder")])
    for name in ("read_widths", "written_widths", "wiring", "d_sae", "decoder_norm", "rescale_acts_by_decoder_norm"):
        if getattr(found, name) != (wanted := getattr(coder, name)):
            raise ConfigError([("from_pretrained", f"{source} has {name} = {getattr(found, name)}, not {wanted}")])
    kinds = [[type(rule).__name__ for rule in (one if isinstance(one, PerSource) else [one])]
             for one in (found.activation, coder.activation)]  # fmt: skip
    if kinds[0] != kinds[1]:
        raise ConfigError([("from_pretrained", f"{source} keeps latents by {', '.join(dict.fromkeys(kinds[0]))}, not "
                            f"{', '.join(dict.fromkeys(kinds[1]))}: name its architecture")])  # fmt: skip
    if found.W_skip is not None:
        raise ConfigError([("from_pretrained", f"{source} has a skip connection, which no configuration trains")])
    coder.provenance = found.provenance
    _copy_weights(found, coder)


def _copy_weights(found: SparseAutoencoder, sae: SparseAutoencoder) -> None:
    """Of my latents, on a mesh; but for what counts the forwards of a training, which starts at 0."""
    held = dict(found.share.named_parameters()) | dict(found.share.named_buffers())
    for name, tensor in (*sae.share.named_parameters(), *sae.share.named_buffers()):
        if name in held and not name.endswith("forwards"):
            tensor.copy_(held[name])
