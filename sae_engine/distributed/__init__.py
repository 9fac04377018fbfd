"""Several devices: each rank has some latents whole, every token passes every rank, and the answers are one device's.

``from_env`` makes a mesh, ``SparseAutoencoder(..., mesh=mesh)`` an autoencoder over it. This package stands below that
class, which calls ``passes``: what stands above it is imported when it is asked for.
"""
from importlib import import_module
from typing import TYPE_CHECKING

from .estimate import Estimate, Hardware, MeshEstimate, estimate
from .mesh import from_env

if TYPE_CHECKING:
    from .agreement import aligned
    from .checkpoint import load_state, save_state

__all__ = ["Estimate", "Hardware", "MeshEstimate", "aligned", "estimate", "from_env", "load_state", "save_state"]

# What imports torch.distributed.checkpoint, which takes a second.
_LATER = {"agreement": {"aligned"}, "checkpoint": {"load_state", "save_state"}}


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
