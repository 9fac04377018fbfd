"""What comes after training: which tokens latents fire on, pages that show it, steering, publishing."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .contexts import Context, max_activating
    from .dashboard import write_dashboard
    from .delphi import write_delphi
    from .features import collect
    from .lens import Lens, logit_lens
    from .neuronpedia import write_neuronpedia
    from .publishing import Published, push
    from .publishing_sites import push_crosscoder
    from .sources import of_source
    from .steering import ablate, steer
    from .stored import Features, FeatureTokens, LatentEntries

__all__ = [
    "Context",
    "FeatureTokens",
    "Features",
    "LatentEntries",
    "Lens",
    "Published",
    "ablate",
    "collect",
    "logit_lens",
    "max_activating",
    "of_source",
    "push",
    "push_crosscoder",
    "steer",
    "write_dashboard",
    "write_delphi",
    "write_neuronpedia",
]

_MODULES = {
    "contexts": {"Context", "max_activating"},
    "dashboard": {"write_dashboard"},
    "delphi": {"write_delphi"},
    "features": {"collect"},
    "lens": {"Lens", "logit_lens"},
    "neuronpedia": {"write_neuronpedia"},
    "publishing": {"Published", "push"},
    "publishing_sites": {"push_crosscoder"},
    "sources": {"of_source"},
    "steering": {"ablate", "steer"},
    "stored": {"FeatureTokens", "Features", "LatentEntries"},
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
