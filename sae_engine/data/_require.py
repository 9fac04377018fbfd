"""Imports of packages that only data/ needs."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def require_installed(package: str, what: str) -> None:
    """An ImportError that says what to install, where it is missing; a package that is there is not imported."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{what} needs the package {package!r}: pip install {package}", name=package)


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
