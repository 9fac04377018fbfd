"""Imports of packages that only data/ needs."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str) -> Any:
    """The module, or an ImportError that says what to install."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there and something inside it is broken: not ours to explain
            raise
        message = f"sae_engine.data needs the package {package!r}: pip install {package}"
        raise ImportError(message, name=package) from error
