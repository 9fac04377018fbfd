"""This library's own layout, which holds everything: ``crosscoder.json`` and a file for each source.

``source_0.safetensors``, … hold W_enc (d_sae, width read), latent by latent as in memory, W_dec (d_sae, width
written), b_enc (d_sae,) and, behind ``rule.``, what the source's rule has learned; ``shared.safetensors`` has b_dec,
W_skip and a rule that serves all sources.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ... import rules
from ..._files import write_tensors
from ...provenance import Provenance
from .._checkpoint import text_writer, write_files
from .._reading import WeightFile, read_json
from .._sharded import Folder, Slice, written
from ..card import RAW, SourceCard
from ._record import RULE, Cut, Record, Rule, numbered, of_mine, same, tensor_of

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "sae_engine"
CONFIG, SHARED = "crosscoder.json", "shared.safetensors"
_SOURCE = r"source_(\d+)\.safetensors"
FORMAT = 1


def owns(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load(folder: Path, cut: Cut | None = None) -> tuple[Record, Path]:
    file = folder / CONFIG
    config, files = read_json(file), numbered(folder, _SOURCE)
    try:
        if config["format"] != FORMAT:
            raise ValueError(f"it has the format {config['format']!r}, and this version reads {FORMAT}")
        wiring = [tuple(range(*sites) for sites in pair) for pair in config["wiring"]]
        reads, writes, d_sae = config["reads"], config["writes"], config["d_sae"]
        made: list[Rule] = [(_rule(name), dict(options)) for name, options in config["rules"]]
        norm, rescale = config["decoder_norm"], config["rescale_acts_by_decoder_norm"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    same(folder, "the number of files source_….safetensors", len(files), len(wiring))
    if not (folder / SHARED).is_file():
        raise FileNotFoundError(f"{folder / SHARED} is missing")
    shared = WeightFile(folder / SHARED, "safetensors")

    def source(s: int) -> Mapping[str, Tensor]:
        one = WeightFile(files[s], "safetensors")
        found = {"W_enc": tensor_of(one, "W_enc", 2).T, "W_dec": tensor_of(one, "W_dec", 2),
                 "b_enc": tensor_of(one, "b_enc", 1)}  # fmt: skip
        found |= {name: t for name, t in one.read().items() if name.startswith(RULE)}
        return of_mine(one.path, found, d_sae, cut)

    skips = [tensor_of(shared, f"W_skip.{t}", 2) for t in range(len(writes))] if "W_skip.0" in shared.names else None
    card = SourceCard.from_dict(config.get("card")) or SourceCard(NAME, "Crosscoder", residual=RAW)
    return Record(
        reads, writes, wiring, d_sae, len(wiring), source, tensor_of(shared, "b_dec", 1), made, card,
        shared={name.removeprefix(RULE): t for name, t in shared.read().items() if name.startswith(RULE)}, skips=skips,
        decoder_norm=norm, rescale_acts_by_decoder_norm=rescale,
        provenance=Provenance.from_dict(config.get("provenance")), one_rule=config["one_rule"],
    ), file  # fmt: skip


def _rule(name: Any) -> type[rules.Activation]:
    if name not in rules.base.RULES:
        raise ValueError(f"the rule {name!r} is not known; import the module that defines it")
    return rules.base.RULES[name]


def save(coder: Crosscoder, folder: Path) -> None:
    text, tensors = text_of(coder), tensors_of(coder)
    writes: dict[str, Any] = {
        file: lambda place, made=made: write_tensors(place, made()) for file, made in tensors.items()
    }
    write_files(folder, {**writes, CONFIG: text_writer(text)})


def save_slices(coder: Crosscoder, folder: Path) -> None:
    """The same files of a crosscoder whose latents are cut over a mesh, byte for byte: each rank writes its own."""
    shards, share = coder.shards, cast("Crosscoder", coder.share)
    assert shards is not None
    cut = {name for name, t in coder.state_dict().items() if any(p.is_shard() for p in getattr(t, "placements", ()))}

    def prepared() -> Folder:
        files = {}
        for file, made in tensors_of(share).items():
            number = file.removeprefix("source_").removesuffix(".safetensors")
            rule = f"activation.rules.{number}."
            names = {f"W_enc.{number}": "W_enc", f"W_dec.{number}": "W_dec", "b_enc": "b_enc"}
            names |= {name: RULE + name.removeprefix(rule) for name in cut if name.startswith(rule)}
            of_latents = {names[name] for name in cut if name in names}
            files[file] = {
                name: Slice(t, 0 if name in of_latents else None, shards.mine.start, shards.num_latents)
                for name, t in made().items()
            }
        return Folder(files, {CONFIG: text_writer(text_of(coder))}, None)

    written(shards, folder, prepared)


def _rules_of(coder: Crosscoder) -> list[rules.Activation]:
    several = isinstance(coder.activation, rules.PerSource)
    return [source.activation for source in coder.sources] if several else [coder.activation]


def text_of(coder: Crosscoder) -> str:
    """What its configuration says.

    Raises:
        TypeError: a rule has options that JSON cannot hold.
    """
    config: dict[str, Any] = {
        "format": FORMAT, "reads": list(coder.read_widths), "writes": list(coder.written_widths), "d_sae": coder.d_sae,
        "wiring": [[[sites.start, sites.stop] for sites in pair] for pair in coder.wiring],
        "one_rule": not isinstance(coder.activation, rules.PerSource),
        "rules": [[type(rule).__name__, rule.options()] for rule in _rules_of(coder)],
        "decoder_norm": coder.decoder_norm, "rescale_acts_by_decoder_norm": coder.rescale_acts_by_decoder_norm,
        "card": None if coder.card is None else coder.card.to_dict(),
        "provenance": None if coder.provenance is None else coder.provenance.to_dict(),
    }  # fmt: skip
    try:
        return json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise TypeError(f"activation has options that no checkpoint holds: {error}") from None


def tensors_of(coder: Crosscoder) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The tensors of each file, which are made when that is written."""
    several = isinstance(coder.activation, rules.PerSource)

    def state(rule: rules.Activation) -> dict[str, Tensor]:
        return {f"{RULE}{name}": t.detach().cpu().contiguous() for name, t in rule.state_dict().items()}

    def of_source(s: int) -> dict[str, Tensor]:
        source = coder.sources[s]
        found = {"W_enc": source.W_enc.detach().cpu().T.contiguous(), "W_dec": source.W_dec.detach().cpu().contiguous(),
                 "b_enc": source.b_enc.detach().cpu().clone()}  # fmt: skip
        return found | (state(source.activation) if several else {})

    def shared() -> dict[str, Tensor]:
        found = {"b_dec": coder.b_dec.detach().cpu().contiguous()}
        found |= {f"W_skip.{t}": weight.detach().cpu().contiguous() for t, weight in enumerate(coder.W_skip or ())}
        return found | ({} if several else state(coder.activation))

    files: dict[str, Callable[[], dict[str, Tensor]]] = {
        f"source_{s}.safetensors": partial(of_source, s) for s in range(len(coder.sources))
    }
    return {**files, SHARED: shared}
