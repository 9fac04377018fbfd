"""Features as an export that Neuronpedia imports (hijohnnylin/neuronpedia, its neuronpedia-utils as of ebb8426).

    FOLDER/MODEL/LAYER-SET/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl      one line each
    FOLDER/MODEL/LAYER-SET/features/batch-0.jsonl.gz                                      a line for each latent
    FOLDER/MODEL/LAYER-SET/activations/batch-0.jsonl.gz                                   a line for each context
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._files import replace_file
from ..autoencoder import SparseAutoencoder
from ..data.contexts import check_int
from ..data.models import LanguageModel
from ..data.sites import Site
from ..data.store import folder_in
from ._shown import Words, check, chosen_latents, geometry, histogram, lenses_of, written_by
from .contexts import Context, max_activating
from .stored import Features

SIZE = 128  # latents in a file
_ID = re.compile(r"[\w.-]+")


def write_neuronpedia(
    features: Features,
    sae: SparseAutoencoder,
    folder: str | Path,
    *,
    lm: LanguageModel,
    model_id: str,
    set_name: str,
    release: str,
    creator: str,
    creator_id: str = "",
    description: str = "",
    url: str | None = None,
    hf_repo_id: str | None = None,
    latents: int | Sequence[int] | None = None,
    contexts: int = 20,
) -> Path:
    """Write features as a source that Neuronpedia's administrators import: contexts, histograms, logits, neighbours.

    What Neuronpedia has and this does not: correlated neurons and features, and the histogram of all logits. Those
    fields are empty; so is the vector of a latent that writes to several sites, whose logits are those that a page
    shows first.

    Args:
        features, sae, lm: what belongs together, as :func:`~sae_engine.latents.write_dashboard` has it.
        folder: the export's; made when missing.
        model_id: Neuronpedia's name of the model, as ``"gpt2-small"``.
        set_name: of the set of sources without the layer, as ``"res-jb"``: the source is ``8-res-jb``.
        release: the release's identifier.
        creator, creator_id: who made it, and that person's identifier there, which the importer may fill in.
        description: of the set, as ``"Residual Stream - 32k"``.
        url, hf_repo_id: where more is said, and where the weights are.
        latents: as :func:`~sae_engine.latents.write_dashboard`; by default all.
        contexts: of each latent, each as long as the model saw it.

    Returns:
        the folder of the source.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range, or does not belong to the features;
            these are of no block, or of several sites.

    Source: hijohnnylin/neuronpedia, ``utils/neuronpedia-utils``, commit ebb8426.

    Example:
        >>> import tempfile
        >>> lm = se.data.load_language_model()
        >>> sae, place = se.SparseAutoencoder(lm.d_model, 512, se.TopK(8)), {"layer": 2, "site": "resid_post"}
        >>> names = {"model_id": "embedded", "set_name": "res-me", "release": "mine", "creator": "Me"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     features = se.latents.collect(sae, lm, ["A text."], folder, progress=False, **place)
        ...     source = se.latents.write_neuronpedia(features, sae, folder + "/export", lm=lm, latents=3, **names)
        ...     source.name, sorted(file.name for file in source.iterdir())
        ('2-res-me', ['activations', 'features', 'model.jsonl', 'release.jsonl', 'source.jsonl', 'sourceset.jsonl'])
    """
    check(features, sae, lm)
    if not isinstance(lm, LanguageModel):
        raise TypeError("lm must be given: Neuronpedia shows tokens as text")
    for name, value in (("model_id", model_id), ("set_name", set_name), ("release", release)):
        if not isinstance(value, str) or not _ID.fullmatch(value) or value in (".", ".."):
            raise ValueError(f"{name} must be of letters, digits, '.', '_' and '-', got {value!r}")
    contexts, m = check_int("contexts", contexts, 0), features.manifest
    if m["layer"] is None:
        where = f"{m['site']!r} is in no block" if m.get("sites") is None else f"these read {m['sites']}"
        raise ValueError(f"features: a source of Neuronpedia has a layer, and {where}")
    chosen = chosen_latents(features, latents)
    source_id = f"{m['layer']}-{set_name}"
    target = folder_in("folder", folder) / model_id / source_id
    for part in ("features", "activations"):
        (target / part).mkdir(parents=True, exist_ok=True)
    own = {"modelId": model_id, "creatorId": creator_id, "createdAt": datetime.now(timezone.utc).isoformat()}
    of_latent = {**own, "layer": source_id}
    export = _Export(features, sae, lm, chosen, of_latent)
    for number, first in enumerate(range(0, len(chosen), SIZE)):
        lines, activations = [], []
        for place in range(first, min(first + SIZE, len(chosen))):
            found = max_activating(features, chosen[place], contexts, window=m["context_length"]) if contexts else []
            lines.append(export.latent(place, found))
            activations += [export.context(context) for context in found]
        _write_lines(target / "features" / f"batch-{number}.jsonl.gz", lines)
        _write_lines(target / "activations" / f"batch-{number}.jsonl.gz", activations)
    public = {"visibility": "PUBLIC", "creatorId": creator_id, "createdAt": own["createdAt"]}
    about: dict[str, dict[str, Any]] = {
        "release": {"name": release, "description": description, "descriptionShort": description,
                    "creatorName": creator, "creatorNameShort": creator, "urls": [url] if url else [], **public},
        "model": {"id": model_id, "displayName": model_id, "displayNameShort": model_id, "instruct": False,
                  "layers": lm.num_layers, "dimension": lm.d_model, "updatedAt": own["createdAt"], **public},
        "sourceset": {"modelId": model_id, "name": set_name, "creatorName": creator, "releaseName": release,
                      "description": description, **public},
        "source": {"id": source_id, "modelId": model_id, "setName": set_name, "dataset": m["text_source"],
                   "num_prompts": export.contexts, "num_tokens_in_prompt": m["context_length"],
                   "hfRepoId": hf_repo_id, "hfFolderId": None, "hasDashboards": True, **public},
    }  # fmt: skip
    for name, line in about.items():
        _write_lines(target / f"{name}.jsonl", [line])
    return target


class _Export:
    """Lines for latents and contexts."""

    def __init__(
        self, features: Features, sae: SparseAutoencoder, lm: LanguageModel, chosen: list[int], own: dict[str, Any]
    ) -> None:
        self.features, self.sae, self.chosen, self.own = features, sae, chosen, own
        self.words = Words(lm.tokenizer)
        lenses, _ = lenses_of(features, sae, lm, chosen, first_only=True)
        self.lens = lenses[0].lens if lenses else None
        self.one_site = len(written_by(features, sae)) == 1
        self.hook = str(Site.of(features.manifest["site"], features.manifest["layer"]))
        self.contexts = int((features.tokens().positions == 0).sum())

    def latent(self, place: int, contexts: list[Context]) -> dict[str, Any]:
        latent = self.chosen[place]
        values = self.features.by_latent(latent).values
        counts, low, high = histogram(values)
        width = (high - low) / len(counts)
        nearest = geometry(self.sae, torch.tensor([latent], device="cpu"))["n"][0]
        largest = max((context.activation for context in contexts), default=0.0)
        line: dict[str, Any] = {
            **self.own, "index": str(latent), "maxActApprox": largest, "hasVector": self.one_site,
            "hookName": self.hook,
            "vector": [float(f"{value:.6g}") for value in self.sae.W_dec[latent].detach().float().tolist()
                       if self.one_site],
            "vectorDefaultSteerStrength": largest, "frac_nonzero": len(values) / self.features.manifest["encoded"],
            "freq_hist_data_bar_heights": counts,
            "freq_hist_data_bar_values": [low + width * (bar + 0.5) for bar in range(len(counts))],
            "topkCosSimIndices": [i for i, _ in nearest], "topkCosSimValues": [value for _, value in nearest],
        }  # fmt: skip
        for name in ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
                     "correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
                     "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
                     "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
                     "pos_str", "pos_values", "neg_str", "neg_values"):  # fmt: skip
            line[name] = []
        if self.lens is not None:
            raised, raised_by, lowered, lowered_by = (part[place].tolist() for part in self.lens)
            line |= {"pos_str": [self.words(token) for token in raised], "pos_values": raised_by,
                     "neg_str": [self.words(token) for token in lowered], "neg_values": lowered_by}  # fmt: skip
        return line

    def context(self, context: Context) -> dict[str, Any]:
        values = context.activations.tolist()
        name = f"{self.own['modelId']}/{self.own['layer']}/{context.latent}/{context.token}"
        return {
            **self.own, "id": "c" + hashlib.sha256(name.encode()).hexdigest()[:24], "index": str(context.latent),
            "tokens": [self.words(token) for token in context.token_ids.tolist()], "values": values,
            "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)), "minValue": min(values),
        }  # fmt: skip


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    data = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, 5, mtime=0)
    replace_file(path, partial(Path.write_bytes, data=data))
