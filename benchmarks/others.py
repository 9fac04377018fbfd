"""Other libraries' operations, through their public interfaces; each is imported where it is first built."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from inputs import Inputs
from stock import Output
from torch import Tensor


def flashinfer_topk(*, lowest: bool) -> Callable[[Inputs], Callable[[], Output]]:
    """Radix selection of each row, unsorted: https://docs.flashinfer.ai/generated/flashinfer.top_k.html

    ``lowest``: ``tie_break`` 1 keeps the lowest of tied indices, and implies ``deterministic``
    (https://github.com/flashinfer-ai/flashinfer/pull/3095); by default chance decides.
    """

    def build(i: Inputs) -> Callable[[], Output]:
        import flashinfer

        options = {"deterministic": True, "tie_break": 1} if lowest else {}
        if not options.keys() <= inspect.signature(flashinfer.top_k).parameters.keys():
            raise NotImplementedError("this FlashInfer's top_k has no tie_break")

        def run() -> tuple[Tensor, Tensor]:
            values, indices = flashinfer.top_k(i.pre, i.k, **options)
            return values.relu(), indices

        return run

    return build


def cute_dsl_available() -> bool:
    """Whether this torch has kernels in the CuTe DSL and what they need; a torch without CUDA has not."""
    native = getattr(torch.backends, "python_native", None)
    return native is not None and "cutedsl" in native.available_dsls


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic algorithms, without the filling of new memory that comes with them and would be timed."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def cute_dsl_topk(*, lowest: bool) -> Callable[[Inputs], Callable[[], Output]]:
    """``torch.topk`` where torch routes it to its own kernel in the CuTe DSL, which wants sorted results.

    Since torch 2.13, with nvidia-cutlass-dsl and apache-tvm-ffi installed, in fp32 for k of 64 to 1024 (16 and 32 at
    some widths): https://github.com/pytorch/pytorch/pull/184926; later also in bf16:
    https://github.com/pytorch/pytorch/pull/196599.
    ``lowest``: under deterministic algorithms ties keep the lowest index; by default chance decides.
    """

    def build(i: Inputs) -> Callable[[], Output]:
        from torch._native.ops.topk import cutedsl_impl  # only it says which sizes it takes

        if not cutedsl_impl._cond(i.pre, i.k):
            where = f"k = {i.k} of {i.pre.shape[1]} in {i.pre.dtype}"
            raise NotImplementedError(f"torch does not route {where} to its CuTe DSL kernel")

        def run() -> tuple[Tensor, Tensor]:
            if not lowest:
                values, indices = i.pre.topk(i.k)
            else:
                with _deterministic():
                    values, indices = i.pre.topk(i.k)
            return values.relu(), indices

        return run

    return build


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
