"""Whether operations on codes gather or densify, as a test wants it."""
from sae_kernels.stock.densified import DENSE_SHARE


def force_dense(share: float) -> dict[str, dict[str, float]]:
    """A ``densified.DENSE_SHARE`` under which operations on codes always gather (inf) or always densify (0)."""
    return {kind: dict.fromkeys(shares, share) for kind, shares in DENSE_SHARE.items()}
