"""Publishing a crosscoder on the Hugging Face hub: its files at the repository's root, and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoints._places import hub_name
from ..checkpoints.crosslayer import formats
from ..checkpoints.crosslayer._record import wiring_of
from ..crosscoder import Crosscoder
from ..inference import inference_form
from ..rules import BatchTopK
from ._repository import Published, check_destination, published

_KINDS = {"causal": "A cross-layer transcoder", "local": "A set of transcoders, one for each layer"}


def push_crosscoder(
    coder: Crosscoder,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    dry_run: bool = False,
    format: str = "sae_engine",
    description: str = "",
    license: str | None = None,
    private: bool = False,
    api: Any = None,
) -> Published:
    """Write a crosscoder as a repository, in one of its formats, with a card, and upload it to the Hugging Face hub.

    A repository in the format ``"circuit_tracer_clt"`` or ``"transcoder_set"`` is one that circuit-tracer takes by its
    name. Formats of thresholds get those that a batch rule has learned.

    Args:
        coder: whose ``provenance`` says its model and its sites.
        repo_id, folder, dry_run, description, license, private, api: as :func:`push` takes them.
        format: one of ``checkpoints.crosslayer.formats.FORMATS``.

    Raises:
        TypeError: ``coder`` is no :class:`~sae_engine.Crosscoder`, or an argument is of another kind.
        ValueError: it does not say its sites, the format cannot hold it, ``repo_id`` is no name, ``dry_run`` comes
            without ``folder``.
        FileExistsError: ``folder`` holds something.

    Example:
        >>> import tempfile
        >>> clt = se.Crosscoder.clt(2, 4, 16, se.ReLU())
        >>> clt.provenance = se.Provenance(
        ...     model="openai-community/gpt2", sites=["resid_mid_layer_0", "resid_mid_layer_1"],
        ...     target_sites=["mlp_out_layer_0", "mlp_out_layer_1"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = push_crosscoder(clt, "me/clt", folder=folder, dry_run=True, format="circuit_tracer_clt")
        ...     sorted(done.files)[:3]
        ['README.md', 'W_dec_0.safetensors', 'W_dec_1.safetensors']
    """
    check_destination(repo_id, folder, dry_run, private)
    if not isinstance(coder, Crosscoder):
        raise TypeError(f"coder must be a Crosscoder, got {type(coder).__name__}")
    if coder.provenance is None or coder.provenance.sites is None:
        raise ValueError("coder does not say where it belongs: set its provenance, as Provenance(model=…, sites=[…])")
    has_batch_rule = any(isinstance(source.activation, BatchTopK) for source in coder.sources)
    if has_batch_rule and format not in ("sae_engine", "dictionary_learning_crosscoder"):
        form = inference_form(coder)
        assert isinstance(form, Crosscoder)
        coder = form

    def write(root: Path) -> None:
        formats.save(coder, root, format=format)
        (root / "README.md").write_text(_card(coder, repo_id, format, description, license), encoding="utf-8")

    return published(write, repo_id, folder=folder, dry_run=dry_run, private=private, api=api)


def _card(coder: Crosscoder, repo_id: str, format: str, description: str, license: str | None) -> str:
    known = coder.provenance
    assert known is not None and known.sites is not None
    models = [name for name in dict.fromkeys(known.models or [known.model]) if name]
    named = [found for name in models if (found := hub_name(name)) is not None]
    header = {
        "license": license, "base_model": [name for name in named if "/" in name],
        "tags": ["crosscoder", "sparse-autoencoder", "mechanistic-interpretability", "sae-engine"],
    }  # fmt: skip
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items() if value]
    rules = sorted({repr(source.activation) for source in coder.sources})
    kind = _KINDS.get(wiring_of(coder), "A crosscoder")
    facts = [
        ("reads", ", ".join(known.sites)), ("writes", ", ".join(known.target_sites or known.sites)),
        ("sources", str(len(coder.sources))), ("latents of each", f"{coder.d_sae:,}"),
        ("rule", rules[0] if len(rules) == 1 else f"{len(rules)} rules, one for each source"), ("format", format),
    ]  # fmt: skip
    parts = [
        "\n".join(["---", *lines, "---"]), f"# {repo_id.partition('/')[2]}", description.strip(),
        f"{kind} of {' and '.join(f'`{name}`' for name in named) or 'a model that is not named'}.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts)]),
        f"```python\nimport sae_engine as se\n\ncoder = se.Crosscoder.from_pretrained({repo_id!r})\n```",
        f"Trained on {known.text}." if known.text else "",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"
