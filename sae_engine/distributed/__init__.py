"""Several devices: latents and tokens over ranks, with one device's results. Needs ``torch.distributed`` alone."""
from .estimate import Estimate, Hardware, Layout, estimate

__all__ = ["Estimate", "Hardware", "Layout", "estimate"]
