"""Which model and which place in it an autoencoder is evaluated at: what its files say, or the user."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..autoencoder import SparseAutoencoder
from ..checkpoints._places import hub_name
from ..data.sites import Site
from ..provenance import Provenance

if TYPE_CHECKING:
    from ..data import LanguageModel


class Place(NamedTuple):
    """What :func:`~sae_engine.metrics.evaluate` needs to know; ``model`` None is the embedded one."""

    model: str | None
    revision: str | None
    sha256: str | None  # of the model's weights, where nothing but the file named it
    layer: int
    site: str
    target_layer: int | None
    target_site: str | None
    normalize: str
    sites: tuple[str, ...] | None = None  # of a crosscoder, in place of layer and site
    target_sites: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None  # of a crosscoder of several models, that of each site


def place_of(
    sae: SparseAutoencoder, name: str, *, model: str | None = None, revision: str | None = None,
    layer: int | None = None, site: str | None = None, target_site: str | None = None, normalize: str | None = None,
) -> Place:  # fmt: skip
    """What the arguments say, and where they are None, what ``sae.provenance`` says; nothing is guessed.

    Raises:
        ValueError: neither says the place, or a transcoder's target; names ``name``, what is known, and the options of
            ``sae-engine eval`` that say the rest.
    """
    said = sae.provenance or Provenance()
    if sae.has_sites or said.sites is not None:  # the second: a source of several sites
        return _of_sites(said, name, model, revision)
    found_site = said.site if site is None else site
    found_layer = said.layer if layer is None else layer
    target = said.target_site if target_site is None else target_site
    is_transcoder = target is not None or sae.d_out != sae.d_in or sae.W_skip is not None
    missing = []
    if found_layer is None:
        missing.append("--layer")
    if not _is_site(found_site, found_layer):
        missing.append("--site")
    if is_transcoder and not _is_site(target, found_layer):
        missing.append("--target-site")
    if missing:
        if said.model is None and model is None:
            missing.insert(0, "--model")
        *first, last = missing
        options = f"{', '.join(first)} and {last}" if first else last
        raise ValueError(f"{name}: its files do not say where it can be evaluated ({said}): give {options}")
    assert found_layer is not None and found_site is not None
    own_model = model is None and said.model is not None
    return Place(
        model=hub_name(said.model) if own_model else model,
        revision=said.revision if own_model and revision is None else revision,
        sha256=said.sha256 if own_model and revision is None else None,
        layer=found_layer, site=found_site,
        target_layer=None if not is_transcoder else said.target_layer if target_site is None else None,
        target_site=target,
        normalize=normalize or said.normalize or "none",
    )  # fmt: skip


def _of_sites(said: Provenance, name: str, model: str | None, revision: str | None) -> Place:
    if said.sites is None:
        raise ValueError(f"{name}: its files do not say at which places it can be evaluated ({said}): load it, set its "
                         "provenance with all sites, and save it again")  # fmt: skip
    own_model = model is None and said.model is not None
    return Place(
        hub_name(said.model) if own_model else model, said.revision if own_model and revision is None else revision,
        said.sha256 if own_model and revision is None else None, 0, said.sites[0], None, None, "none",
        sites=said.sites, target_sites=said.target_sites, models=None if model is not None else said.models,
    )  # fmt: skip


def contexts_for(sae: SparseAutoencoder, lm: LanguageModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """:class:`~sae_engine.data.ContextSettings` by name: those given, and of the others what ``sae.provenance`` says.

    That holds as far as ``lm`` can: contexts are no longer than its own, and a separator that its tokenizer lacks,
    which files of SAELens may name, stands nowhere.
    """
    found = _contexts(sae.provenance or Provenance())
    if "context_length" in found:
        found["context_length"] = min(found["context_length"], lm.max_length)
    word = found.get("separator")
    if isinstance(word, str) and getattr(lm.tokenizer, f"{word}_token_id", None) is None:
        found["separator"] = None
    return found | dict(given)


def _contexts(said: Provenance) -> dict[str, Any]:
    """What provenance says about rows."""
    found: dict[str, Any] = {} if said.context_length is None else {"context_length": said.context_length}
    found |= {name: token(word) for name in ("separator", "first_token") if (word := getattr(said, name)) is not None}
    if said.excluded is not None:
        positions = [word.split()[1] for word in said.excluded if word.startswith("position ")]
        others = [word for word in said.excluded if word != "first" and not word.startswith("position ")]
        found |= {"drop_first": "first" in said.excluded, "exclude_tokens": [token(word) for word in others],
                  "exclude_positions": [int(position) for position in positions]}  # fmt: skip
    return found


def token(word: str) -> str | int | None:
    """A token's name or id as :func:`~sae_engine.data.stream_activations` takes it, which refuses what is neither.

    Example:
        >>> token("eos"), token("13"), token("none")
        ('eos', 13, None)
    """
    return None if word == "none" else int(word) if word.lstrip("-").isdecimal() else word


def _is_site(site: str | None, layer: int | None) -> bool:
    """Whether something can be read there; of files that name another library's places, some cannot."""
    try:
        return site is not None and bool(Site.of(site, layer or 0).name)
    except ValueError:
        return False
