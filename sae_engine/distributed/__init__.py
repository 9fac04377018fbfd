"""Several devices: each rank has some latents whole, every token passes every rank, and the answers are one device's.

``from_env`` makes a mesh, ``SparseAutoencoder(..., mesh=mesh)`` an autoencoder over it. This package stands below that
class, which calls ``passes``: what stands above it is imported when it is asked for.
"""
from .estimate import Estimate, Hardware, Layout, estimate
from .mesh import from_env

__all__ = ["Estimate", "Hardware", "Layout", "estimate", "from_env"]
