"""Which implementation runs: asked for explicitly it runs or raises, and never falls back."""
import importlib.util
import os

import torch
from torch import Tensor

from sae_kernels.ops import BACKENDS


def _finds_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False


_HAS_TRITON = _finds_triton()  # once: torch.compile looks through a cache, and not into the import system


def has_triton() -> bool:
    """Whether Triton can be imported here; nothing is imported to find out."""
    return _HAS_TRITON


def interprets_triton() -> bool:
    """Whether Triton runs its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "", "off", "false")


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The back end's name for an operation on ``tensor``.

    ``"auto"`` is ``SAE_BACKEND`` where that is set, otherwise Triton for CUDA tensors (fp64 excepted, which Triton
    does not take) and torch for all others.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: Triton was asked for and cannot run on ``tensor``.
        TypeError: Triton was asked for and ``tensor`` is fp64.
    """
    if backend == "auto":
        backend = os.environ.get("SAE_BACKEND") or "auto"
    if backend == "auto":
        return "triton" if tensor.is_cuda and tensor.dtype != torch.float64 and has_triton() else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise RuntimeError('backend="triton" needs the package triton, which is not installed')
        if not (tensor.is_cuda or interprets_triton()):
            raise RuntimeError(
                f'backend="triton" needs a CUDA tensor, got one on {tensor.device}; '
                "set TRITON_INTERPRET=1 before triton is imported to run its kernels on a CPU (slowly)"
            )
        if tensor.dtype == torch.float64:
            raise TypeError('backend="triton" takes float32, bfloat16 and float16, got float64: use backend="torch"')
    return backend


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured that operations on ``tensor`` go into: the host cannot read it then."""
    if torch.compiler.is_compiling():  # what is traced runs later, and a size that is decided then is in no graph
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
