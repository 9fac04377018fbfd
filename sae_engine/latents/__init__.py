"""What comes after training: which tokens latents fire on, pages that show it, steering, publishing."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .steering import ablate, steer

__all__ = [
    "ablate",
    "steer",
]

_MODULES = {
    "steering": {"ablate", "steer"},
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
