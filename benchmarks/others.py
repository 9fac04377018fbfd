"""Other libraries' operations, through their public interfaces; each is imported where it is first built."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from inputs import Inputs
from stock import Output
from torch import Tensor


def flashinfer_topk(i: Inputs) -> Callable[[], Output]:
    """Radix selection of each row, unsorted: docs.flashinfer.ai, ``flashinfer.top_k``."""
    import flashinfer

    def run() -> tuple[Tensor, Tensor]:
        values, indices = flashinfer.top_k(i.pre, i.k)
        return values.relu(), indices

    return run


def saelens_topk(i: Inputs) -> Callable[[], Output]:
    from sae_lens.saes.topk_sae import TopK

    module = TopK(i.k)
    return lambda: module(i.pre)


def _sparse_coder(i: Inputs, device: torch.device, dtype: torch.dtype) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder takes no CPU tensors; read at import
    with redirect_stdout(None):  # it prints which decoder it takes
        from sparsify import SparseCoder, SparseCoderConfig
    config = SparseCoderConfig(num_latents=i.case.F, k=i.case.k)
    return SparseCoder(i.case.d, config, device=device, dtype=dtype).requires_grad_(False)


def sparsify_decode(i: Inputs) -> Callable[[], Output]:
    """``SparseCoder.decode``: on a GPU its own Triton kernel, on a CPU ``embedding_bag``."""
    coder = _sparse_coder(i, i.weight.device, i.weight.dtype)
    coder.W_dec.data, coder.b_dec.data = i.weight, i.bias
    return lambda: coder.decode(i.values, i.columns)


def sparsify_encode(i: Inputs) -> Callable[[], Output]:
    """``SparseCoder.encode`` with ``b_dec`` = 0; it also returns the pre-activations."""
    coder = _sparse_coder(i, i.x.device, i.x.dtype)
    coder.encoder.weight.data, coder.encoder.bias.data = i.weight.T, i.bias

    def run() -> tuple[Tensor, Tensor]:
        found = coder.encode(i.x)
        return found.top_acts, found.top_indices

    return run
