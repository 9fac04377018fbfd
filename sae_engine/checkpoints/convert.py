"""From one format to another."""
from __future__ import annotations

from os import PathLike
from pathlib import Path

from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..inference import inference_form
from ..rules import BatchTopK
from . import _folding as folding
from . import formats
from ._checkpoint import Checkpoint, build, of
from .crosslayer import formats as crosslayer


def convert(
    source: str | PathLike, target: str | PathLike, *, to: str, format: str = "auto", force: bool = False,
    inference: bool = False, activation_scale: float | None = None, residual: str | None = None,
    fold_decoder_norms: bool = False,
) -> Checkpoint | Crosscoder:  # fmt: skip
    """Reads ``source`` and writes ``target`` in the format ``to``: whole, or not at all.

    Args:
        to: of an autoencoder, or one of ``checkpoints.crosslayer.formats.FORMATS``: of a crosscoder.
        force: write where something is already; files of other names stay.
        inference: give BatchTopK its inference form, JumpReLU.
        format, activation_scale, residual, fold_decoder_norms: of ``source``, as
            :meth:`sae_engine.SparseAutoencoder.from_pretrained` takes them.

    Returns:
        what was written; a crosscoder as it is.

    Raises:
        FileExistsError: there is something at ``target``.
        ValueError: ``source`` cannot be read, ``to`` cannot hold it, or its decoder's norms cannot be folded: says why.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     se.SparseAutoencoder(4, 16, se.TopK(2)).save_pretrained(f"{folder}/ours")
        ...     _ = convert(f"{folder}/ours", f"{folder}/theirs", to="sparsify")
        ...     formats.detect(f"{folder}/theirs")
        'sparsify'
    """
    formats.known(to, [*formats.FORMATS, *crosslayer.FORMATS])
    target = Path(target)
    if not force and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"target {str(target)!r} exists: name another, or force it")
    if to in crosslayer.FORMATS:
        coder = Crosscoder.from_pretrained(
            source, format=format, device="cpu", activation_scale=activation_scale, residual=residual,
            fold_decoder_norms=fold_decoder_norms,
        )  # fmt: skip
        if inference and any(isinstance(part.activation, BatchTopK) for part in coder.sources):
            coder = inference_form(coder)
        crosslayer.save(coder, target, format=to)
        return coder
    c, file = formats.read(source, format=format, activation_scale=activation_scale, residual=residual)
    sae = build(SparseAutoencoder, c, file, device="cpu")  # what cannot be built is not converted
    if inference and isinstance(sae.activation, BatchTopK):
        c = folding.fold_decoder_norms(of(inference_form(sae)))  # as SAELens exports them
    else:
        c = of(sae)
    if fold_decoder_norms:  # of what is written: the inference form can be folded where BatchTopK cannot
        c = folding.unit_decoder_rows(c)
    formats.FORMATS[to].save(c, target)
    return c
