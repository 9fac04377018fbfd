"""Whether operations on codes gather or densify, as a test wants it."""
from sae_kernels.stock import densified


def force_dense(share: float) -> dict[str, dict[str, float]]:
    """A ``densified.DENSE_SHARE`` under which operations on codes always gather (inf) or always densify (0)."""
    return {kind: dict.fromkeys(shares, share) for kind, shares in densified.DENSE_SHARE.items()}


def back_end_of(path, monkeypatch):
    """The back end of a path: one that is made to gather, or "torch" for the dense path, which serves them all."""
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(0.0 if path == "dense" else float("inf")))
    return "torch" if path == "dense" else path
