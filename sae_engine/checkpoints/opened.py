"""An autoencoder or a crosscoder, whichever a checkpoint is."""
from __future__ import annotations

from os import PathLike
from typing import Any

from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from .formats import holds_crosscoder


def opened(path: str | PathLike, **options: Any) -> SparseAutoencoder:
    """What :meth:`SparseAutoencoder.from_pretrained` or :meth:`Crosscoder.from_pretrained` makes of ``path``.

    Raises:
        As these.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     se.Crosscoder.clt(2, 4, 16, se.TopK(2)).save_pretrained(folder)
        ...     type(opened(folder)).__name__
        'Crosscoder'
    """
    kind = Crosscoder if options.get("format", "auto") == "auto" and holds_crosscoder(path) else SparseAutoencoder
    return kind.from_pretrained(path, **options)
