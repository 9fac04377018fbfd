"""What the kernels cost, without a GPU: every launch of the public functions, compiled for GPUs that need not be there.

The public functions run on meta tensors, forward and backward, at the sizes of the benchmarks; each Triton launch on
the way is compiled with the meta-parameters it would have, and its binary read. `make kernel-report` prints what this
module finds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sae_engine import functional
from sae_engine._files import replace_file
from sae_engine.rules import TopK
from sae_engine.training.backward import term_of
from sae_engine.training.optimizer import latent_adam
from sae_kernels import dispatch
from sae_kernels._terms import GATED, GIVEN, Term, lists_of
from sae_kernels.ops import ops

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPE_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

# Streaming passes: kernels that read contiguous rows of their first argument, which 16-byte loads are due to serve.
STREAMS = {"_group_max_kernel", "_column_group_max_kernel", "_row_topk_kernel", "_norm_cut_kernel",
           "_bitmask_kernel"}  # fmt: skip
# What a kernel's main loop loads for each element, where that is not its first argument and vectors along it.
MAIN_OPERANDS = {"_decode_kernel": ("weight_ptr",), "_row_split_kernel": ("weight_ptr",),
                 "_values_kernel": ("weight_ptr",), "_scatter_kernel": ("indices_ptr", "values_ptr"),
                 "_gather_kernel": ("indices_ptr", "dense_ptr"),
                 "_entry_rows_kernel": ("indices_ptr",), "_encode_kernel": ()}  # fmt: skip
ALONG_THE_ROW = ("mask_ptr", "weight_ptr", "floor_ptr", "theta_ptr")


@dataclass(frozen=True)
class Shape:
    """B tokens, width d, F latents, k entries a token."""

    name: str
    B: int
    d: int
    F: int
    k: int


S1, S2, S3 = Shape("S1", 4096, 768, 32768, 32), Shape("S2", 4096, 768, 131072, 32), Shape("S3", 4096, 4096, 131072, 64)
# Shapes that flatter nobody: a small model's with many entries a row, primes, one that is tiny.
WIDE = Shape("d=16384", 4096, 16384, 65536, 64)  # rows that do not fit one tile of the latent pass
MANY, PRIMES = Shape("F=12288 k=512", 4096, 768, 12288, 512), Shape("primes", 1009, 577, 12289, 37)
OTHERS = (MANY, PRIMES, Shape("tiny", 3, 5, 40, 7))


@dataclass(frozen=True)
class Case:
    """A call of a public function. ``build(shape, dtype)`` allocates its inputs and returns the call."""

    name: str
    build: Callable[[Shape, torch.dtype], Callable[[], Any]]
    gradient: bool = True


def _meta(*shape: int, dtype: torch.dtype, learned: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learned)


def _topk(shape: Shape, dtype: torch.dtype, *, rows: int | None = None, latents: int | None = None,
          k: int | None = None, score: bool = False, magnitude: bool = False, mask: str = "",
          transposed: bool = False):  # fmt: skip
    shape = replace(shape, B=rows or shape.B, F=latents or shape.F)
    size = (shape.F, shape.B) if transposed else (shape.B, shape.F)
    pre = _meta(*size, dtype=dtype, learned=True)
    masks = {"row": (shape.F,), "matrix": (shape.B, shape.F)}
    return functools.partial(
        functional.topk, pre.t() if transposed else pre, min(k or shape.k, shape.F), magnitude=magnitude,
        score=_meta(shape.B, shape.F, dtype=FP32) if score else None,
        mask=_meta(*masks[mask], dtype=torch.bool) if mask else None,
    )  # fmt: skip


def _batch_topk(shape: Shape, dtype: torch.dtype, *, mask: bool = False, share: float | None = None):
    k = shape.k if share is None else share * shape.F
    allowed = _meta(shape.F, dtype=torch.bool) if mask else None
    return functools.partial(functional.batch_topk, _meta(shape.B, shape.F, dtype=dtype, learned=True), k, mask=allowed)


def _feature_topm(shape: Shape, dtype: torch.dtype, *, share: float | None = None, transposed: bool = False):
    size = (shape.F, shape.B) if transposed else (shape.B, shape.F)
    pre = _meta(*size, dtype=dtype, learned=True)
    total = int(shape.B * (shape.k if share is None else share * shape.F))
    return functools.partial(
        functional.feature_topm, pre.t() if transposed else pre, _meta(shape.F, dtype=torch.int32), total=total
    )


def _norm_match(shape: Shape, dtype: torch.dtype, *, weighted: bool, transposed: bool = False):
    size = (shape.F, shape.B) if transposed else (shape.B, shape.F)
    pre = _meta(*size, dtype=dtype, learned=True)
    return functools.partial(
        functional.norm_match, pre.t() if transposed else pre, _meta(shape.B, dtype=FP32),
        weight_norm=_meta(shape.F, dtype=FP32) if weighted else None, capacity=shape.B * shape.k,
    )  # fmt: skip


def _energy_share(shape: Shape, dtype: torch.dtype, *, weighted: bool):
    return functools.partial(
        functional.energy_share, _meta(shape.B, shape.F, dtype=dtype, learned=True), 0.9,
        weight_norm=_meta(shape.F, dtype=FP32) if weighted else None, capacity=shape.B * shape.k,
    )  # fmt: skip


def _threshold(shape: Shape, dtype: torch.dtype, *, scalar: bool = False, bandwidth: float | None = None):
    return functools.partial(
        functional.threshold, _meta(shape.B, shape.F, dtype=dtype, learned=True),
        0.1 if scalar else _meta(shape.F, dtype=FP32, learned=bandwidth is not None), bandwidth=bandwidth,
        capacity=shape.B * shape.k,
    )  # fmt: skip


def _codes(shape: Shape, dtype: torch.dtype) -> Any:
    from sae_engine.codes import SparseCodes

    entries = shape.B * shape.k
    return SparseCodes(_meta(entries, dtype=dtype, learned=True), _meta(entries, dtype=torch.int32),
                       _meta(shape.B + 1, dtype=torch.int64), (shape.B,), shape.F)  # fmt: skip


def _decode(shape: Shape, dtype: torch.dtype, *, weight_dtype: torch.dtype | None = None, bias: bool = True):
    weight = _meta(shape.F, shape.d, dtype=weight_dtype or dtype, learned=True)
    b_dec = _meta(shape.d, dtype=FP32, learned=True) if bias else None
    # codes are made in the call: each call transposes its own
    return lambda: functional.decode(_codes(shape, dtype), weight, b_dec)


def _decode_error(shape: Shape, dtype: torch.dtype):
    """What a training step asks for: products in ``dtype``, bias and target in fp32."""
    weight, b_dec = _meta(shape.F, shape.d, dtype=dtype), _meta(shape.d, dtype=FP32)
    target = _meta(shape.B, shape.d, dtype=FP32)
    codes = _codes(shape, dtype).detach()
    entries = codes.values, codes.indices, codes.offsets
    return lambda: ops.decode_error(*entries, weight, b_dec, target, FP32, "triton")


def _encode(shape: Shape, dtype: torch.dtype):
    x, weight = _meta(shape.B, shape.d, dtype=dtype, learned=True), _meta(shape.F, shape.d, dtype=dtype, learned=True)
    b_enc, b_dec = (_meta(size, dtype=dtype, learned=True) for size in (shape.F, shape.d))
    return lambda: functional.encode(x, weight.t(), b_enc, select=TopK(shape.k), b_dec=b_dec)


def _to_dense(shape: Shape, dtype: torch.dtype):
    return lambda: _codes(shape, dtype).to_dense()


def _terms(shape: Shape, dtype: torch.dtype, number: int, dense: bool) -> list[Term]:
    """Terms with sparse codes, where the shape's are, and before them one that is ``dense``, however sparse it is."""
    found = []
    for mode in (GATED, GIVEN, GATED)[:number]:
        codes = _codes(shape, dtype).detach()
        offered = None if mode == GATED else codes.values
        found.append(term_of(codes, codes.values, _meta(shape.B, shape.d, dtype=dtype), offered, mode))
    if dense:
        transposed = "latent_offsets", "latent_rows", "latent_positions"
        found.insert(0, found[0]._replace(**{name: getattr(found[0], name).new_empty(0) for name in transposed}))
    return found


def _latent_gradients(shape: Shape, dtype: torch.dtype, *, dense: bool = False):
    x, weight = _meta(shape.B, shape.d, dtype=dtype), _meta(shape.F, shape.d, dtype=dtype)
    along = _meta(shape.F, dtype=FP32)
    return lambda: ops.latent_gradients(x, weight, along, *lists_of(_terms(shape, dtype, 1, dense)), FP32, "triton")


def _latent_adam(
    shape: Shape, dtype: torch.dtype, *, terms: int = 1, dense: bool = False, row_major: bool = False
):  # fmt: skip
    """The step of fp32 parameters, computed in ``dtype``."""
    x = _meta(shape.B, shape.d, dtype=dtype)
    state = [[_meta(shape.F, shape.d, dtype=FP32), _meta(shape.F, shape.d, dtype=FP32), _meta(shape.F, dtype=FP32)]
             for _ in range(3)]  # fmt: skip
    if row_major:
        for tensors in state:
            tensors[1] = _meta(shape.d, shape.F, dtype=FP32).t()
    copies = [] if dtype == FP32 else [_meta(shape.F, shape.d, dtype=dtype) for _ in range(2)]
    number = _meta(dtype=FP32)
    return lambda: latent_adam(
        _terms(shape, dtype, terms, dense), x, None, state[0], state[1], state[2], copies, step=number, lr=number,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, unit_rows=True, skip=_meta(dtype=torch.bool), backend="triton",
    )  # fmt: skip


CASES = {
    case.name: case
    for case in (
        Case("topk", _topk),
        Case("topk mask", functools.partial(_topk, mask="row"), gradient=False),
        Case("topk matrix mask", functools.partial(_topk, mask="matrix"), gradient=False),
        Case("topk score", functools.partial(_topk, score=True), gradient=False),
        Case("topk magnitude", functools.partial(_topk, magnitude=True), gradient=False),
        Case("topk transposed", functools.partial(_topk, transposed=True), gradient=False),
        Case("topk k=512", functools.partial(_topk, k=512), gradient=False),
        Case("topk few rows", functools.partial(_topk, rows=1), gradient=False),
        Case("topk few rows F=2^21 k=64", functools.partial(_topk, rows=1, latents=2**21, k=64), gradient=False),
        Case("topk F=2^21 k=512", functools.partial(_topk, rows=1024, latents=2**21, k=512), gradient=False),
        Case("topk k=4096", functools.partial(_topk, k=4096), gradient=False),
        Case("topk k=2048", functools.partial(_topk, k=2048), gradient=False),
        Case("topk k=2048 mask", functools.partial(_topk, k=2048, mask="row"), gradient=False),
        Case("batch_topk", _batch_topk),
        Case("batch_topk mask", functools.partial(_batch_topk, mask=True), gradient=False),
        Case("batch_topk quarter kept", functools.partial(_batch_topk, share=0.25), gradient=False),
        Case("feature_topm", _feature_topm),
        Case("feature_topm quarter kept", functools.partial(_feature_topm, share=0.25), gradient=False),
        Case("feature_topm transposed", functools.partial(_feature_topm, transposed=True), gradient=False),
        Case("norm_match", functools.partial(_norm_match, weighted=True)),
        Case("norm_match unweighted", functools.partial(_norm_match, weighted=False), gradient=False),
        Case("energy_share", functools.partial(_energy_share, weighted=True), gradient=False),
        Case("energy_share unweighted", functools.partial(_energy_share, weighted=False), gradient=False),
        Case("threshold", _threshold),
        Case("threshold scalar", functools.partial(_threshold, scalar=True), gradient=False),
        Case("threshold window", functools.partial(_threshold, bandwidth=0.1)),
        Case("decode", _decode),
        Case("decode fp32 weight", functools.partial(_decode, weight_dtype=FP32)),
        Case("decode no bias", functools.partial(_decode, bias=False), gradient=False),
        Case("decode error", _decode_error, gradient=False),
        Case("encode", _encode),
        Case("to_dense", _to_dense),
        Case("latent_adam", _latent_adam, gradient=False),
        Case("latent_adam two terms", functools.partial(_latent_adam, terms=2), gradient=False),
        Case("latent_adam three terms", functools.partial(_latent_adam, terms=3), gradient=False),
        Case("latent_adam dense term", functools.partial(_latent_adam, dense=True), gradient=False),
        Case("latent_adam row-major", functools.partial(_latent_adam, row_major=True), gradient=False),
        Case("latent_gradients", _latent_gradients, gradient=False),
        Case("latent_gradients dense term", functools.partial(_latent_gradients, dense=True), gradient=False),
    )
}

Cell = tuple[Case, Shape, torch.dtype]


def full_cells() -> list[Cell]:
    """Every case at S1, S2 and S3 in bf16 and fp32, and at the other shapes in fp16."""
    sizes = [(shape, dtype) for shape in (S1, S2, S3) for dtype in (BF16, FP32)] + [(shape, FP16) for shape in OTHERS]
    cells = [(case, shape, dtype) for shape, dtype in sizes for case in CASES.values()]
    return cells + [(case, WIDE, BF16) for case in CASES.values() if case.name.startswith(("latent", "decode"))]


def quick_cells(target: str) -> list[Cell]:
    """A case or two for each kernel and for what has spilled before: what a test suite has time for."""
    chosen = [("topk", S1, BF16), ("batch_topk", S1, BF16), ("norm_match", S1, BF16), ("threshold window", S1, BF16),
              ("decode", S1, BF16), ("decode error", S1, BF16), ("topk k=512", S2, BF16), ("topk k=2048", S2, BF16),
              ("topk mask", S3, BF16),
              ("topk k=4096", S2, BF16), ("topk few rows", S1, BF16), ("topk few rows F=2^21 k=64", S1, FP32),
              ("topk", PRIMES, FP16), ("batch_topk", PRIMES, BF16), ("batch_topk", S3, FP32),
              ("batch_topk quarter kept", S1, BF16),
              ("norm_match unweighted", S2, FP32), ("energy_share unweighted", S1, BF16),
              ("latent_adam two terms", S1, BF16), ("latent_adam", S3, BF16), ("feature_topm", S1, FP32)]  # fmt: skip
    if target in ("sm_90", "gfx942"):  # one of each make looks closer
        chosen += [("encode", S1, BF16), ("threshold scalar", S1, BF16), ("topk score", S1, FP32), ("topk", S3, BF16),
                   ("feature_topm", S1, BF16), ("feature_topm quarter kept", PRIMES, FP16),
                   ("decode", S3, BF16), ("decode fp32 weight", S1, BF16), ("latent_adam", S1, FP32),
                   ("latent_adam row-major", S3, BF16), ("latent_gradients", S1, BF16),
                   ("latent_adam dense term", S1, BF16), ("latent_gradients dense term", S1, BF16),
                   ("latent_adam", WIDE, BF16), ("decode", WIDE, BF16), ("norm_match", S2, BF16)]  # fmt: skip
    return [(CASES[name], shape, dtype) for name, shape, dtype in chosen]


# --- running -------------------------------------------------------------------------------------------------------


class _Launching(TorchDispatchMode):
    """Our operators do on meta tensors what they do on a GPU: they call their launchers, not their fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_kernels: list[tuple[str, int]] = []  # name, bytes of its tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "sae_engine":
            # torch's fused Adam works in place, and has nothing for meta tensors
            result = None if func.overloadpacket is torch.ops.aten._fused_adam_ else func(*args, **(kwargs or {}))
            if not _moves_nothing(func):
                read = () if func.__name__.startswith("new_") else (args, kwargs)  # a dtype and device only
                touched = [t for t in pytree.tree_leaves((read, result)) if isinstance(t, Tensor)]
                self.torch_kernels.append((str(func), sum(t.numel() * t.element_size() for t in touched)))
            return result
        with self:  # an operator may call others
            on_tensors = torch.library.get_kernel(func, "CPU")
            return on_tensors.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


def _moves_nothing(func: Any) -> bool:
    """Views, allocations and questions about types, which launch no kernel."""
    if func.namespace == "profiler":
        return True
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return aliases or func.__name__.split(".")[0] in (
        "empty", "empty_like", "new_empty", "detach", "empty_strided", "promote_types"
    )  # fmt: skip


@contextlib.contextmanager
def _as_if_on_a_gpu() -> Iterator[_Launching]:
    """Meta tensors are taken for a GPU's; autocast, which is off, does not know their device."""
    with (
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
        mock.patch.dict(os.environ, {"SAE_BACKEND": "triton"}),
        mock.patch.object(dispatch, "interprets_triton", return_value=True),
        _Launching() as mode,
    ):
        yield mode


@dataclass
class CellLaunches:
    """What one case launches, in order: (forward or backward, the launch), and the stock operators beside them."""

    launches: list[tuple[str, Any]] = field(default_factory=list)
    torch_kernels: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # name, bytes of its tensors


def run_cell(cell: Cell, target: str) -> CellLaunches:
    """Runs one case on meta tensors, forward and, where it has one, backward."""
    compile_ = importlib.import_module("ahead_of_time")  # imports Triton
    case, shape, dtype = cell
    found, mode = CellLaunches(), "forward"
    with _as_if_on_a_gpu() as stock, compile_.compiling(target, lambda launch: found.launches.append((mode, launch))):
        call = case.build(shape, dtype)
        stock.torch_kernels.clear()
        result = call()
        found.torch_kernels[mode] = list(stock.torch_kernels)
        if case.gradient:
            stock.torch_kernels.clear()
            mode = "backward"
            result = result if isinstance(result, Tensor) else result.values
            result.backward(torch.empty_like(result))
            found.torch_kernels[mode] = list(stock.torch_kernels)
    return found


Row = dict[str, Any]
FEW = 2  # rows


def report(cells: list[Cell], target: str, *, disassemble: bool = True) -> list[Row]:
    """One row for each distinct binary that the cells launch on ``target``, in the order of its first launch.

    Without ``disassemble`` NVIDIA's binaries have no numbers of instructions, and take a third of the time.
    """
    compile_ = importlib.import_module("ahead_of_time")  # imports Triton
    rows: dict[str, Row] = {}
    for cell in cells:
        case, shape, dtype = cell
        for mode, launch in run_cell(cell, target).launches:
            if launch.binary in rows:
                row = rows[launch.binary]
                row["launches"] += 1
                continue
            binary = compile_.read_binary(launch.compiled, target, disassemble=disassemble)
            rows[launch.binary] = {
                "target": target, "kernel": launch.kernel.strip("_").removesuffix("_kernel"),
                "case": f"{case.name}, {mode}", "shape": shape.name, "dtype": DTYPE_NAMES[dtype],
                "grid": list(launch.grid), "warps": launch.compiled.metadata.num_warps,
                "registers": binary.registers, "spills": binary.spills, "shared": binary.shared,
                "occupancy": round(binary.occupancy, 3), "limited_by": binary.limited_by,
                "loads": binary.loads, "wide_loads": compile_.wide(binary.loads),
                "wide_loads_due": wide_loads_due(launch, compile_.TARGETS[target].gpu.warp_size),
                "stores": binary.stores, "instructions": binary.instructions,
                "instructions_per_element": instructions_per_element(launch, binary),
                "fp_fusion": launch.options.get("enable_fp_fusion"),
                "launches": 1,
            }  # fmt: skip
    return list(rows.values())


def wide_loads_due(launch: Any, warp_size: int) -> int:
    """16-byte loads a thread that a streaming pass needs for one tile, 0 for rows that cannot have them."""
    first = next(iter(launch.arguments.values()))
    if launch.kernel not in STREAMS or launch.arguments["F"] % 16 or first.stride(-1) != 1:
        return 0
    if launch.arguments.get("HAS_MAXIMA"):  # streamed by another kernel
        return 0
    return launch.arguments["BLOCK"] * first.element_size() // (16 * warp_size * launch.compiled.metadata.num_warps)


def instructions_per_element(launch: Any, binary: Any) -> float | None:
    """Instructions of the main loop for each element that a thread loads in it; None where it loads none."""
    names = MAIN_OPERANDS.get(launch.kernel, (next(iter(launch.arguments)), *ALONG_THE_ROW))
    operands = [launch.arguments.get(name) for name in names]
    # a vector of stride 0 is one number, loaded once
    size = sum(t.element_size() for t in operands if isinstance(t, Tensor) and t.stride(-1) != 0)
    return round(binary.loop_instructions / (binary.loop_bytes / size), 2) if binary.loop_bytes and size else None


def compiled_anew(cells: list[Cell], target: str, batches: tuple[int, ...] = (1, 17, 1000, 4097)) -> list[Row]:
    """Binaries that a cell's case compiles at other numbers of tokens and neither at its own nor at FEW: none.

    Rows are streamed by one program each where they are many, by several where they are few: two sets of binaries.
    Two kinds of cells are left out: a transposed matrix, whose stride is the number of tokens, and on AMD matrices of
    2 GiB or more, since Triton addresses smaller ones with 32 bits there and so keeps two binaries for either side.
    """
    anew: list[Row] = []
    for case, shape, dtype in cells:
        if "transposed" in case.name or (target == "gfx942" and shape.B * shape.F * dtype.itemsize >= 2**31):
            continue
        own = [shape, replace(shape, B=FEW)]
        known = {launch.binary for size in own for _, launch in run_cell((case, size, dtype), target).launches}
        for batch in batches:
            for mode, launch in run_cell((case, replace(shape, B=batch), dtype), target).launches:
                if launch.binary not in known:
                    known.add(launch.binary)
                    anew.append({"target": target, "kernel": launch.kernel, "case": f"{case.name}, {mode}",
                                 "shape": shape.name, "dtype": DTYPE_NAMES[dtype], "B": batch})  # fmt: skip
    return anew


def collect(target: str, quick: bool) -> dict[str, list[Row]]:
    """The rows of one target, and what its launches compile anew when only the number of tokens changes."""
    return {"rows": report(quick_cells(target) if quick else full_cells(), target, disassemble=not quick),
            "compiled_anew": compiled_anew(quick_cells(target), target)}  # fmt: skip


def collect_all(targets: Sequence[str] = TARGETS, *, quick: bool = False, jobs: int = 1) -> dict[str, Any]:
    """The whole report: versions, rows, what compiles anew, and the defects among them. ``jobs`` processes."""
    if jobs == 1:
        found = [collect(target, quick) for target in targets]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found = list(pool.map(collect, targets, [quick] * len(targets)))
    whole: dict[str, Any] = {"versions": {name: metadata.version(name) for name in ("triton", "torch")}}
    whole |= {key: [row for part in found for row in part[key]] for key in ("rows", "compiled_anew")}
    return {**whole, "defects": defects(whole)}


# Bytes a thread that a kernel's configuration keeps in memory, where that was measured to be faster than fewer warps.
# The latent pass beats itself with more registers (480 µs with 128 of them, 530 with 144, 541 with 168: NVIDIA H200, F
# 32,768, d 768; 24 bytes on sm_90, 56 on sm_100, where nothing was measured). By Triton 3.9 norm matching's cut and the
# splits of the latent pass keep one address, written once and read once a pass or step.
KNOWN_SPILLS = {"latents": 56, "norm_cut": 8, "pass_split": 8}


def defects(whole: dict[str, Any]) -> list[str]:
    """What the shipped configurations promise not to do."""
    named = [("{target} {kernel} ({case}, {shape} {dtype})".format(**row), row) for row in whole["rows"]]
    return [
        *(f"{name}: {row['spills']} bytes a thread are spilled"
          for name, row in named if row["spills"] > KNOWN_SPILLS.get(row["kernel"], 0)),
        *(f"{name}: {row['wide_loads']} of {row['wide_loads_due']} 16-byte loads"
          for name, row in named if row["wide_loads"] < row["wide_loads_due"]),
        *(f"{name}: leaves fp fusion to Triton's default" for name, row in named if row["fp_fusion"] is None),
        *("{target} {kernel} ({case}, {shape} {dtype}): compiled anew for {B} tokens".format(**row)
          for row in whole["compiled_anew"]),
    ]  # fmt: skip


# --- presentation --------------------------------------------------------------------------------------------------

COLUMNS = ("kernel", "case", "shape", "dtype", "warps", "registers", "spills", "shared", "loads", "stores",
           "instructions", "instructions_per_element", "occupancy", "limited_by")  # fmt: skip


def markdown(whole: dict[str, Any]) -> str:
    """The report as one table for each target."""
    rows = whole["rows"]
    lines = [
        "# What the kernels cost, read from their binaries",
        "",
        "Compiled ahead of time by Triton " + whole["versions"]["triton"] + "; no GPU took part and nothing here is a "
        "time. One row for each binary, under the first call that launches it. Spills: bytes a thread. Shared: bytes a "
        "program. Loads and stores: instructions on global memory by bits a thread. Instructions per element: those of "
        "the loop that loads most, for each element that a thread loads there. Occupancy: resident warps over an "
        "SM's most, and what limits them. `make kernel-report` makes this file.",
        "",
        f"{len(rows)} binaries, {len(whole['defects'])} defects (spills, loads narrower than 16 bytes where rows are "
        "streamed, compilation anew when only the number of tokens changes)" + (":" if whole["defects"] else "."),
        *(f"- {defect}" for defect in whole["defects"]),
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += ["", f"## {target}", "", "| " + " | ".join(c.replace("_", " ") for c in COLUMNS) + " |",
                  "|" + "---|" * len(COLUMNS)]  # fmt: skip
        lines += ["| " + " | ".join(_shown(row[c]) for c in COLUMNS) + " |" for row in rows if row["target"] == target]
    return "\n".join(lines) + "\n"


def as_json(whole: dict[str, Any]) -> str:
    """The report as JSON, one line for each row."""
    parts = [f'"versions": {json.dumps(whole["versions"])}']
    for key in ("defects", "compiled_anew", "rows"):
        parts.append(f'"{key}": [' + ",".join("\n" + json.dumps(row) for row in whole[key]) + "]")
    return "{" + ",\n".join(parts) + "}\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count}×{bits}" for bits, count in value.items()) or "–"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Registers, spills, loads and occupancy of every kernel's binary.")
    parser.add_argument("--arch", action="append", choices=tuple(TARGETS), help="all of them by default")
    parser.add_argument("--quick", action="store_true", help="a few calls for each kernel: what the tests hold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, not to the terminal")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes, one architecture each")
    args = parser.parse_args(argv)
    whole = collect_all(tuple(dict.fromkeys(args.arch or TARGETS)), quick=args.quick, jobs=args.jobs)
    tables = markdown(whole)
    for path, text in ((args.json, as_json(whole)), (args.markdown, tables)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    if args.markdown is None:
        print(tables, end="")
    for defect in whole["defects"]:
        print(f"kernel_report: {defect}", file=sys.stderr)
    return 1 if whole["defects"] else 0


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
