"""Provenance: which activations an autoencoder was trained on, in the terms of :mod:`sae_engine.data`."""
from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

from . import _checks as check

__all__ = ["Provenance"]

_FACTORS = ("activation_scale", "target_scale")
_WORDS = ("excluded", "sites", "target_sites", "models")  # several of each
_INTEGERS = {"layer": 0, "target_layer": 0, "d": 1, "d_target": 1, "context_length": 1}  # name → the least it can be


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an autoencoder belongs, and what it has seen. None stands for what is not known; nothing is guessed.

    :attr:`ActivationStore.provenance <sae_engine.data.ActivationStore.provenance>` makes it from a manifest,
    ``sae.provenance = store.provenance`` gives it to an autoencoder, every checkpoint keeps what its format can hold,
    and ``sae-engine eval`` takes model and place from it.

    Attributes:
        model: hub name or folder of the language model; ``"embedded"`` for the one in this package.
        revision: commit of a hub model.
        sha256: of the model's weights, as :class:`~sae_engine.data.LanguageModel` has it.
        layer, site: the place in the model, as :func:`~sae_engine.data.read_activations` takes it.
        target_layer, target_site: of a transcoder, the place that its output belongs to; None for an autoencoder,
            the site ``"unknown"`` for a transcoder whose files do not name it.
        sites, target_sites: of a crosscoder, all places that it reads and reconstructs, each with its layer, as
            ``"blocks.3.hook_resid_mid"``; ``layer`` and ``site`` are then None, and ``target_sites`` too where it
            reconstructs what it reads.
        models: of a crosscoder of several models, the model of each of ``sites``; ``model`` is the first.
        d, d_target: width of the input and, of a transcoder, of the target; of all sites together.
        normalize: what was done to a row before the autoencoder saw it, as :func:`~sae_engine.metrics.evaluate` takes
            it: ``"none"`` or ``"token"``.
        model_dtype, dtype: of the model that computed the activations, and of the activations as stored: ``"float16"``.
        tokenizer, text: where token ids and text come from, in words.
        context_length: tokens per context.
        separator: what stood between documents: ``"eos"``, ``"none"``.
        first_token: what was put before each context: ``"bos"``, ``"none"``.
        excluded: tokens whose rows were left out: ``"first"`` for each context's first position, ``"position 3"`` for
            another, ``"bos"``, ``"eos"``, ``"pad"``, or an id in digits.
        activation_scale, target_scale: what its rows and, of a transcoder, its targets were multiplied by in training.
            It is in the weights, which take rows as they are.

    Raises:
        TypeError, ValueError: an attribute is of another kind or out of range; names it.

    Example:
        >>> place = Provenance(model="openai-community/gpt2", layer=8, site="resid_pre", d=768)
        >>> print(place)
        openai-community/gpt2, layer 8, resid_pre, d = 768
        >>> Provenance.from_dict(place.to_dict()) == place
        True
    """

    model: str | None = None
    revision: str | None = None
    sha256: str | None = None
    layer: int | None = None
    site: str | None = None
    target_layer: int | None = None
    target_site: str | None = None
    sites: tuple[str, ...] | None = None
    target_sites: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    d: int | None = None
    d_target: int | None = None
    normalize: str | None = None
    model_dtype: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    text: str | None = None
    context_length: int | None = None
    separator: str | None = None
    first_token: str | None = None
    excluded: tuple[str, ...] | None = None
    activation_scale: float | None = None
    target_scale: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None:
                continue
            if name in _INTEGERS:
                number = check.integer_in(value)
                if number is None:
                    raise TypeError(f"{name} must be an int or None, got {value!r}")
                if number < _INTEGERS[name]:
                    raise ValueError(f"{name} must be at least {_INTEGERS[name]}, got {value!r}")
                object.__setattr__(self, name, number)
            elif name in _FACTORS:
                factor = check.number_in(value)
                if factor is None:
                    raise TypeError(f"{name} must be a number or None, got {value!r}")
                if not 0 < factor < inf:
                    raise ValueError(f"{name} must be positive and finite, got {value!r}")
                object.__setattr__(self, name, float(factor))
            elif name in _WORDS:
                is_sequence = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
                if not is_sequence:
                    raise TypeError(f"{name} must be a sequence of strings or None, got {value!r}")
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None, got {value!r}")
        if self.models is not None and (self.sites is None or len(self.models) != len(self.sites)):
            raise ValueError(f"models must name the model of each of sites {self.sites}, got {self.models!r}")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        width = "" if self.d is None else f", d = {self.d}"
        if self.sites is not None:
            models = " and ".join(dict.fromkeys(self.models or ())) or f"{self.model or 'model not known'}{revision}"
            target = "" if self.target_sites is None else f" to {_briefly(self.target_sites)}"
            return f"{models}, {_briefly(self.sites)}{target}{width}"
        layer = "layer not known" if self.layer is None else f"layer {self.layer}"
        target = ""
        if self.target_site is not None:
            other = f"layer {self.target_layer}, " if self.target_layer not in (None, self.layer) else ""
            target = f" to {other}{self.target_site}"
        return f"{self.model or 'model not known'}{revision}, {layer}, {self.site or 'site not known'}{target}{width}"

    def to_dict(self) -> dict[str, Any]:
        """What is known, in JSON's types alone."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if name in _WORDS else value for name, value in known.items()}

    @classmethod
    def from_dict(cls, value: object) -> Provenance | None:
        """What :meth:`to_dict` made; unknown names are passed over. None where it is no such thing.

        Example:
            >>> Provenance.from_dict({"layer": "eight"}) is None
            True
        """
        if not isinstance(value, dict):
            return None
        try:
            return cls(**{field.name: value[field.name] for field in fields(cls) if field.name in value})
        except (TypeError, ValueError):
            return None


def _briefly(sites: tuple[str, ...]) -> str:
    """``blocks.0.hook_resid_mid … blocks.11.hook_resid_mid``."""
    return " ".join(sites) if len(sites) < 3 else f"{sites[0]} … {sites[-1]} ({len(sites)})"
