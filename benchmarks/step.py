"""Where a training step's time goes: its parts one by one on the same inputs, ours beside dense PyTorch's.

``make bench ONLY=parts`` runs this alone, ``make bench`` among the rest.

Parts are timed alone, in turn with the whole steps; what the whole takes beyond the sum of its parts (counters, the
report, small gradients) is shown as the rest, and is negative where data stays in a cache from one part to the next.
Measured for even firing and for firing that follows a Zipf law, as latents of trained autoencoders do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from guarded import Entrant, Prepared, time_in_turn
from ours import backend_of
from progress import announce
from rows import Row, environment
from sizes import MAIN, S1, Case
from steps import LEARNING_RATE, SEED, TINY, DenseAutoencoder, Setup, dense, make_setup, train_step
from stock import step_with_unit_rows, topk_dense
from timing import method

from sae_engine import SparseCodes, functional
from sae_engine.training.backward import term_of
from sae_engine.training.forward import PreActivations
from sae_engine.training.optimizer import latent_adam
from sae_kernels._terms import GIVEN, lists_of
from sae_kernels.ops import ops

GEMM, SELECTION, DECODE = "encoder GEMM", "selection", "decode + loss"
TRANSPOSING, VALUES, WEIGHTS = "transposing the codes", "value gradients", "weight gradients + Adam"
PARTS = (GEMM, SELECTION, DECODE, TRANSPOSING, VALUES, WEIGHTS)
WHOLE = "whole step"
OURS, DENSE = "ours", "dense PyTorch"
BUDGET_SECONDS = {"quick": 0.2, "default": 8.0, "full": 30.0}
Calls = dict[str, Callable[[], object]]


def our_parts(s: Setup) -> tuple[Calls, SparseCodes]:
    """What TrainStep does with one objective, unit-norm rows and Adam, in parts; and the codes."""
    sae, x, backend = s.autoencoder(), s.x[0], backend_of(s.x[0])
    sae._lay_out_by_latent()  # as TrainStep does
    encoder, decoder = sae.W_enc.detach().to(s.dtype), sae.W_dec.detach().to(s.dtype)
    b_enc, b_dec = sae.b_enc.detach(), sae.b_dec.detach()
    buffer = PreActivations()

    def gemm() -> torch.Tensor:
        return buffer.product((x - b_dec).to(s.dtype), encoder, b_enc)

    def decode() -> torch.Tensor:
        """The gradient at the output; the error and the variance on the way."""
        error = ops.decode(
            codes.values, codes.indices, codes.offsets, decoder, None, torch.float32, None, None, None, backend
        ).add_(b_dec).sub_(x)
        error.square().sum(), (x - x.mean(0)).square().sum()
        return error.mul_(2 / len(x))

    def slopes() -> torch.Tensor:
        inner = ops.decode_backward_values(
            grad, codes.values.float(), codes.indices, codes.offsets, decoder, backend
        )
        return torch.where(codes.values != 0, inner, 0.0)

    pre = gemm()
    codes = functional.topk(pre, s.case.k)
    grad = decode().to(s.dtype)
    term = term_of(codes, codes.values, grad, slopes(), GIVEN)
    centred = (x - b_dec).to(s.dtype)
    parameters = [sae.W_dec.detach(), sae.W_enc.detach().T, b_enc]
    moments = [[torch.zeros_like(p, memory_format=torch.preserve_format) for p in parameters] for _ in range(2)]
    copies = [] if s.dtype == torch.float32 else [decoder, encoder.T]
    count, rate = torch.full((), 1000.0, device=s.device), torch.tensor(LEARNING_RATE, device=s.device)

    def update() -> object:
        return latent_adam(
            lists_of([term]), centred, None, parameters, *moments, copies, step=count, lr=rate, betas=(0.9, 0.999),
            eps=1e-8, weight_decay=0.0, unit_rows=True, skip=None, backend=backend,
        )  # fmt: skip

    calls: Calls = {
        GEMM: gemm, SELECTION: lambda: functional.topk(pre, s.case.k), DECODE: decode,
        TRANSPOSING: lambda: ops.by_latent(codes.indices, codes.offsets, s.case.F, backend), VALUES: slopes,
        WEIGHTS: update, WHOLE: train_step()(s),
    }  # fmt: skip
    return calls, codes


def dense_parts(s: Setup) -> Calls:
    """What autograd runs of the dense step, operator by operator; nothing is turned."""
    sae, x, k = DenseAutoencoder(s), s.x[0], s.case.k
    W_enc, W_dec, b_enc, b_dec = (p.detach().to(s.dtype) for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    centred = (x - b_dec).to(s.dtype)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE, fused=True)

    def decode() -> torch.Tensor:
        error = torch.addmm(b_dec, kept, W_dec) - x
        error.square().sum(1).mean()
        return error * (2 / len(x))

    def at_pre() -> torch.Tensor:
        at_kept = (grad @ W_dec.T).gather(1, columns)
        return torch.zeros_like(pre).scatter_(1, columns, torch.where(values > 0, at_kept, 0.0))

    pre = torch.addmm(b_enc, centred, W_enc)
    values, columns = pre.topk(k, sorted=False)
    kept = topk_dense(pre, k)
    grad = decode().to(s.dtype)
    slopes = at_pre()

    def update() -> None:
        sae.W_dec.grad, sae.W_enc.grad, sae.b_enc.grad = (
            t.float() for t in (kept.T @ grad, centred.T @ slopes, slopes.sum(0))
        )
        sae.b_dec.grad = grad.sum(0).float() - (slopes @ W_enc.T).sum(0).float()
        step_with_unit_rows(optimizer, sae.W_dec)

    return {
        GEMM: lambda: torch.addmm(b_enc, (x - b_dec).to(s.dtype), W_enc), SELECTION: lambda: topk_dense(pre, k),
        DECODE: decode, VALUES: at_pre, WEIGHTS: update, WHOLE: dense()(s),
    }  # fmt: skip


def cases(device: torch.device, extent: str) -> list[tuple[Case, torch.dtype]]:
    """Even firing, and skewed."""
    case = TINY if extent == "quick" else S1 if device.type == "cuda" else MAIN
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [(case, dtype), (replace(case, indices="zipf", name=f"{case.name}, skewed"), dtype)]


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, extent: str, *, without: Collection[str] = ()
) -> list[Row]:
    """A row for each part of our step and of the dense one. ``without``: sides that are left out."""
    where = f"parts of a step {case.name}"
    about = {
        "kind": "part", "case": case.name, "group": case.group, "shape": case.shape("BdFki"),
        "dtype": str(dtype).removeprefix("torch."), "seed": SEED, "method": method(device), **environment(device),
    }  # fmt: skip
    announce(f"{where}: inputs")
    setup = make_setup(case, device, dtype)
    with torch.no_grad():
        announce(f"{where}: ours")
        ours, codes = our_parts(setup)
        announce(f"{where}: dense PyTorch")
        sides = {OURS: ours, DENSE: dense_parts(setup)}
    share = float(codes.indices.bincount(minlength=case.F).max()) / case.B
    entrants = [
        Entrant({**about, "provider": side, "part": part}, functools.partial(_prepared, _right_mode(part, call), share))
        for side, parts in sides.items() if side not in without for part, call in parts.items()
    ]  # fmt: skip
    return time_in_turn(
        entrants, device, where, budget_seconds=BUDGET_SECONDS[extent] / (10 if device.type == "cuda" else 1)
    )


def _prepared(call: Callable[[], object], share: float) -> Prepared:
    call()
    return Prepared([call], {"share_of_first": share})


def _right_mode(part: str, call: Callable[[], object]) -> Callable[[], object]:
    """Whole steps set their own gradient mode, parts build no graph."""
    return call if part == WHOLE else torch.no_grad()(call)
