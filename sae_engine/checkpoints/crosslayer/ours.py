"""This library's own layout, which holds everything: ``crosscoder.json`` and a file for each source.

``source_0.safetensors``, … hold W_enc (d_sae, width read), latent by latent as in memory, W_dec (d_sae, width
written), b_enc (d_sae,) and, behind ``rule.``, what the source's rule has learned; ``shared.safetensors`` has b_dec,
W_skip and a rule that serves all sources.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ... import rules
from ..._files import write_tensors
from ...provenance import Provenance
from .._checkpoint import text_writer, write_files
from .._reading import WeightFile, read_json
from ..card import RAW, SourceCard
from ._record import RULE, Record, Rule, numbered, same, tensor_of

if TYPE_CHECKING:
    from ...crosscoder import Crosscoder

NAME = "sae_engine"
CONFIG, SHARED = "crosscoder.json", "shared.safetensors"
_SOURCE = r"source_(\d+)\.safetensors"
FORMAT = 1


def owns(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load(folder: Path) -> tuple[Record, Path]:
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
        return found | {name: t for name, t in one.read().items() if name.startswith(RULE)}

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
    several = isinstance(coder.activation, rules.PerSource)
    made = [source.activation for source in coder.sources] if several else [coder.activation]
    config: dict[str, Any] = {
        "format": FORMAT, "reads": list(coder.read_widths), "writes": list(coder.written_widths), "d_sae": coder.d_sae,
        "wiring": [[[sites.start, sites.stop] for sites in pair] for pair in coder.wiring],
        "one_rule": not several, "rules": [[type(rule).__name__, rule.options()] for rule in made],
        "decoder_norm": coder.decoder_norm, "rescale_acts_by_decoder_norm": coder.rescale_acts_by_decoder_norm,
        "card": None if coder.card is None else coder.card.to_dict(),
        "provenance": None if coder.provenance is None else coder.provenance.to_dict(),
    }  # fmt: skip
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError) as error:
        raise TypeError(f"activation has options that no checkpoint holds: {error}") from None

    def state(rule: rules.Activation) -> dict[str, Tensor]:
        return {f"{RULE}{name}": t.detach().cpu().contiguous() for name, t in rule.state_dict().items()}

    def tensors(s: int) -> dict[str, Tensor]:
        source = coder.sources[s]
        found = {"W_enc": source.W_enc.detach().cpu().T.contiguous(), "W_dec": source.W_dec.detach().cpu().contiguous(),
                 "b_enc": source.b_enc.detach().cpu().clone()}  # fmt: skip
        return found | (state(source.activation) if several else {})

    shared = {"b_dec": coder.b_dec.detach().cpu().contiguous()}
    shared |= {f"W_skip.{t}": weight.detach().cpu().contiguous() for t, weight in enumerate(coder.W_skip or ())}
    shared |= {} if several else state(coder.activation)
    writes: dict[str, Any] = {
        f"source_{s}.safetensors": lambda file, s=s: write_tensors(file, tensors(s)) for s in range(len(coder.sources))
    }
    writes |= {SHARED: lambda file: write_tensors(file, shared), CONFIG: text_writer(text)}
    write_files(folder, writes)
