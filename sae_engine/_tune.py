"""``sae-engine tune``: fills a table of launch configurations for the shapes that one names, on the GPU that is here.

Every operation of a training step runs once at each shape with ``SAE_AUTOTUNE=1``; the search itself, and what a table
means, is in ``sae_kernels/_autotune.py``.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sae_kernels import _autotune, _tuning

from . import _passes, functional


class Shape(NamedTuple):
    """B tokens, width d, F latents, k entries a token."""

    B: int
    d: int
    F: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``4096,768,32768,32``: B, d, F, k."""
        try:
            found = cls(*map(int, text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"a shape must be four integers B,d,F,k, got {text!r}") from None
        if min(found) < 1 or found.k > found.F:
            raise ValueError(f"a shape must have sizes of at least 1 and k ≤ F, got {text!r}")
        return found


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def calls(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The operations of a training step, each under its name, on normal pre-activations and uniform codes."""
    B, d, F, k = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, dtype=torch.float32, device=device, generator=generator).to(dtype)

    pre = normal(B, F)
    strongest = pre.relu().float().topk(k).values
    target, level = strongest.norm(dim=1), strongest[:, -1].mean().expand(F)
    budgets = functional.feature_budgets(torch.rand(F, device=device, generator=generator), B * k, B)
    yield "topk", lambda: functional.topk(pre, k, backend="triton")
    yield "batch_topk", lambda: functional.batch_topk(pre, k, backend="triton")
    yield "feature_topm", lambda: functional.feature_topm(pre, budgets, total=B * k, backend="triton")
    yield "norm_match", lambda: functional.norm_match(pre, target, capacity=4 * B * k, backend="triton")
    yield "threshold", lambda: functional.threshold(pre, level, capacity=4 * B * k, backend="triton")
    codes = functional.topk(pre, k, backend="torch").detach()
    yield "to_dense", lambda: codes.to_dense()
    grad, x, weight, bias = normal(B, d), normal(B, d), normal(F, d), normal(d)

    def decode() -> None:
        values, w = codes.values.clone().requires_grad_(), weight.clone().requires_grad_()
        functional.decode(codes.replace(values=values), w, bias, backend="triton").backward(grad)

    yield "decode", decode
    term = _passes.term_of(codes, codes.values, grad, None, _passes.GATED)
    yield "latent_gradients", lambda: _passes.latent_gradients([term], x, weight, None, torch.float32, "triton")

    def adam() -> None:
        state = [[normal(*size, dtype=torch.float32).abs_() for size in ((F, d), (F, d), (F,))] for _ in range(3)]
        copies = [] if dtype == torch.float32 else [weight.clone(), normal(F, d)]
        one = torch.ones((), device=device)
        _passes.latent_adam(
            [term], x, None, state[0], state[1], state[2], copies, step=one, lr=one * 1e-4, betas=(0.9, 0.999),
            eps=1e-8, weight_decay=0.0, unit_rows=True, skip=None, backend="triton",
        )  # fmt: skip

    yield "latent_adam", adam


def tune(
    shapes: list[Shape], dtypes: list[str], device: torch.device, table: Path | None, say: Callable[[str], object]
) -> tuple[Path, list[dict[str, Any]]]:
    """The table's path, and all that it holds now. RuntimeError: there is nothing here to compare times on."""
    path = _autotune.default_path() if table is None else table
    if _autotune.timer is _autotune.gpu_ms and device.type != "cuda":
        raise RuntimeError("a search compares times on a GPU, and torch sees none here")
    wanted = {"SAE_AUTOTUNE": "1", "SAE_AUTOTUNE_TABLE": str(path)}
    # codes gather, however many entries: a GEMM has no configuration of ours
    token = _tuning.DENSE_CHOICE.set(False)
    try:
        with mock.patch.dict(os.environ, wanted):
            for shape in shapes:
                for dtype in dtypes:
                    for name, call in calls(shape, DTYPES[dtype], device):
                        say(f"{name}, B={shape.B} d={shape.d} F={shape.F} k={shape.k}, {dtype}")
                        call()
    finally:
        _tuning.DENSE_CHOICE.reset(token)
    return path, _autotune.entries(path)
