"""README.md of a published repository: a YAML header that the hub reads, and what a user has to know."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..checkpoints._checkpoint import Checkpoint, words
from ..checkpoints._places import hub_name
from ..provenance import Provenance

_DENSITY = ("`sparsity.safetensors` beside the weights has, for each latent, log10 of the share of tokens on which it "
            "fires, as SAELens writes it: −10 where it never did.")  # fmt: skip
_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def card(
    checkpoints: Mapping[str, Checkpoint], repo_id: str, layouts: Sequence[str], description: str, license: str | None,
    sparsity: Mapping[str, Tensor],
) -> str:
    """The whole file. What is said of an autoencoder is what its checkpoint says; nothing is guessed."""
    models = sorted({name for c in checkpoints.values() if (name := hub_name(words(c)[0]))})
    texts = sorted({c.provenance.text for c in checkpoints.values() if c.provenance and c.provenance.text})
    header = {
        "license": license, "library_name": "saelens" if "saelens" in layouts else None,
        "base_model": [name for name in models if "/" in name],
        "datasets": [text for text in texts if _DATASET.fullmatch(text)],
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "saelens", "sae-engine"],
    }  # fmt: skip
    # JSON's strings and lists are YAML's.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items() if value]
    parts = [
        "\n".join(["---", *lines, "---"]),
        f"# {repo_id.partition('/')[2]}",
        description.strip(),
        f"Sparse autoencoders of {', '.join(f'`{name}`' for name in models) or 'a model that is not named'}.",
        "\n".join([
            "| folder | rule | d_in | latents | input | target | normalization | L0 | never fired |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(name, c, sparsity.get(name)) for name, c in checkpoints.items()),
        ]),
        _DENSITY if sparsity and "saelens" in layouts else "",
        _loading(repo_id, next(iter(checkpoints))) if "saelens" in layouts else "",
        *(f"Trained on {text}." for text in texts),
        *(_scale(name, c.provenance) for name, c in checkpoints.items() if c.provenance),
        _others(layouts),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _loading(repo_id: str, name: str) -> str:
    return (
        f"```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained({repo_id!r}, {name!r})\n```\n\n"
        "```python\nimport sae_engine as se\n\n"
        f"sae = se.SparseAutoencoder.from_pretrained({f'{repo_id}/{name}'!r})\n```"
    )


def _scale(name: str, known: Provenance) -> str:
    if known.activation_scale is None:
        return ""
    targets = "" if known.target_scale is None else f", and its targets by {known.target_scale:.6g}"
    return (f"`{name}`: in training rows were multiplied by {known.activation_scale:.6g}{targets}. That is in the "
            "weights, which take them as they are.")  # fmt: skip


def _row(name: str, c: Checkpoint, shares: Tensor | None) -> str:
    d_in, d_sae = c.tensors["W_enc"].shape
    _, hook, target = words(c)
    options = ", ".join(f"{key}={value}" for key, value in c.options.items() if key in ("k", "widths"))
    cells = [f"`{name}`", f"{c.activation.__name__}({options})" if options else c.activation.__name__, str(d_in),
             str(d_sae), hook or "–", target or "–", c.normalize_activations]  # fmt: skip
    cells += ["–", "–"] if shares is None else [f"{shares.sum():.4g}", f"{(shares == 0).double().mean():.2%}"]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _others(layouts: Sequence[str]) -> str:
    said = {
        "saebench": "`saebench/` holds the same weights for SAEBench's runner of dictionary_learning repositories.",
        "circuit-tracer": "`circuit-tracer/` holds them as a transcoder set: `--transcoder_set OWNER/REPOSITORY/"
                          "circuit-tracer`.",
    }  # fmt: skip
    return "\n".join(said[layout] for layout in layouts if layout in said)
