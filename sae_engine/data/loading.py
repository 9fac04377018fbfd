"""Options of loading a language model: what transformers' ``from_pretrained`` takes, and what that needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._require import require_installed

_OWN = ("device_map", "quantization_config", "trust_remote_code")  # of from_pretrained, arguments here too


def loading_options(from_pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` takes, as arguments of :func:`load_language_model`.

    Example:
        >>> loading_options({"device_map": "auto", "attn_implementation": "eager"})
        {'device_map': 'auto', 'model_kwargs': {'attn_implementation': 'eager'}}
    """
    own = {name: value for name, value in from_pretrained.items() if name in _OWN}
    others = {name: value for name, value in from_pretrained.items() if name not in _OWN}
    return own | ({"model_kwargs": others} if others else {})


def check_packages(options: Mapping[str, Any]) -> None:
    """ImportError where a package is missing that these options need; asked before anything is downloaded."""
    config = options.get("quantization_config")
    said = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    of_bytes = any(said.get(name) or said.get(f"_{name}") for name in ("load_in_8bit", "load_in_4bit"))
    if of_bytes:
        require_installed("bitsandbytes", "quantization_config: loading in 8 or 4 bits")
    if of_bytes or options.get("device_map") is not None:
        require_installed("accelerate", "quantization_config" if of_bytes else "device_map")
