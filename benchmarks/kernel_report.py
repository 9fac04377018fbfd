"""What the kernels cost, without a GPU: every launch of every operation, compiled for GPUs that need not be there.

The operations run on meta tensors, forward and backward, at the sizes of the benchmarks; each Triton launch on the way
is compiled with the meta-parameters it would have, and its binary read. `make kernel-report` prints what this module
finds. An operation's own calls come from its row in ``kernels/operations.py``.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out, in worker processes too

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sae_engine import functional
from sae_engine._files import replace_file
from sae_engine.codes import SparseCodes
from sae_engine.rules import TopK
from sae_kernels import dispatch
from sae_kernels.operations import OPERATIONS, Maker
from sae_kernels.ops import ops

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPE_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}

# Streaming passes: kernels that read contiguous rows of their first argument, which 16-byte loads are due to serve.
STREAMS = {"_group_max_kernel", "_column_group_max_kernel", "_row_topk_kernel", "_norm_cut_kernel",
           "_bitmask_kernel", "_merge_topk_kernel"}  # fmt: skip
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
    """A call. ``build(shape, dtype)`` allocates its inputs and returns it; ``gradient``: it runs backward as well."""

    name: str
    build: Callable[[Shape, torch.dtype], Callable[[], Any]]
    gradient: bool = True


def _meta(*shape: int, dtype: torch.dtype, learned: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=learned)


def _resized(shape: Shape, changes: Mapping[str, float]) -> Shape:
    """``shape`` with some of its sizes replaced; ``share``: k as a share of the latents."""
    sizes = dict(changes)
    if "share" in sizes:
        sizes["k"] = max(int(sizes.pop("share") * shape.F), 1)
    found = replace(shape, **sizes)
    return replace(found, k=min(found.k, found.F))


def case(name: str) -> Case:
    """A call of an operation of the table: its name, and after it an example of its arguments, a regime, or both.

    ``"topk"``, ``"topk mask"``, ``"topk k=2048"``, ``"topk k=2048 mask"``.
    """
    operation, _, rest = name.partition(" ")
    row = OPERATIONS[operation]
    regime = max((r for r in row.regimes if rest.startswith(r)), key=len, default="")
    example = rest.removeprefix(regime).strip()

    def build(shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
        arguments = list(row.example(_resized(shape, row.regimes.get(regime, {})), dtype, "meta", example))
        for place, parameter in enumerate(row.operator._schema.arguments[:-1]):
            if parameter.name in row.gradients and arguments[place] is not None:
                arguments[place] = arguments[place].detach().requires_grad_()
        return functools.partial(getattr(ops, row.name), *arguments, "triton")

    return Case(name, build, bool(row.gradients))


# --- calls that are more than one operation --------------------------------------------------------------------------


def _codes(shape: Shape, dtype: torch.dtype) -> SparseCodes:
    values, indices, offsets = Maker(shape, dtype, "meta").codes()
    return SparseCodes(values.requires_grad_(), indices, offsets, (shape.B,), shape.F)


def _decode(shape: Shape, dtype: torch.dtype, *, weight_dtype: torch.dtype | None = None) -> Callable[[], Any]:
    """The public function: its gradients need the codes by latent, which the call makes."""
    weight = Maker(shape, dtype, "meta").weight(weight_dtype).requires_grad_()
    b_dec = _meta(shape.d, dtype=FP32, learned=True)
    return lambda: functional.decode(_codes(shape, dtype), weight, b_dec)


def _encode(shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    x, weight = _meta(shape.B, shape.d, dtype=dtype, learned=True), _meta(shape.F, shape.d, dtype=dtype, learned=True)
    b_enc, b_dec = (_meta(size, dtype=dtype, learned=True) for size in (shape.F, shape.d))
    return lambda: functional.encode(x, weight.t(), b_enc, select=TopK(shape.k), b_dec=b_dec)


def _cases() -> dict[str, Case]:
    """Every operation with each example of its arguments and in each of its regimes; the calls above in their place."""
    found = [Case("decode", _decode), Case("decode fp32 weight", functools.partial(_decode, weight_dtype=FP32)),
             Case("encode", _encode)]  # fmt: skip
    found += [case(f"{row.name} {part}".strip())
              for row in OPERATIONS.values() for part in (*row.examples, *row.regimes)]  # fmt: skip
    found.append(case("topk k=2048 mask"))
    cases: dict[str, Case] = {}
    for one in found:
        cases.setdefault(one.name, one)
    return cases


CASES = _cases()
Cell = tuple[Case, Shape, torch.dtype]
SHAPES = {shape.name: shape for shape in (S1, S2, S3, WIDE, PRIMES)}

# What has spilled before or is a kernel's hardest case, beside every operation at S1 in bf16: case, shape, dtype.
WATCHED = """
topk k=512, S2, bf16
topk k=2048, S2, bf16
topk k=4096, S2, bf16
topk mask, S3, bf16
topk few rows, S1, bf16
topk few rows F=2^21 k=64, S1, fp32
topk, primes, fp16
batch_topk, primes, bf16
batch_topk, S3, fp32
batch_topk quarter kept, S1, bf16
feature_topm, S1, fp32
norm_match unweighted, S2, fp32
norm_match share, S1, bf16
threshold window, S1, bf16
latent_adam two terms, S1, bf16
latent_adam, S3, bf16
"""
CLOSELY = ("sm_90", "gfx942")  # one GPU of each make
WATCHED_CLOSELY = """
encode, S1, bf16
topk, S3, bf16
topk score, S1, fp32
feature_topm quarter kept, primes, fp16
norm_match, S2, bf16
threshold scalar, S1, bf16
decode fp32 weight, S1, bf16
decode, S3, bf16
decode, d=16384, bf16
latent_gradients dense term, S1, bf16
latent_adam dense term, S1, bf16
latent_adam, S1, fp32
latent_adam row-major, S3, bf16
latent_adam bf16 moments, S1, bf16
latent_adam bf16 moments, S3, bf16
latent_adam row-major bf16 moments, S3, bf16
latent_adam, d=16384, bf16
latent_adam free rows, d=16384, bf16
"""


def full_cells() -> list[Cell]:
    """Every case at S1, S2 and S3 in bf16 and fp32, and at the other shapes in fp16."""
    sizes = [(shape, dtype) for shape in (S1, S2, S3) for dtype in (BF16, FP32)] + [(shape, FP16) for shape in OTHERS]
    cells = [(case, shape, dtype) for shape, dtype in sizes for case in CASES.values()]
    return cells + [(case, WIDE, BF16) for case in CASES.values() if case.name.startswith(("latent", "decode"))]


def quick_cells(target: str) -> list[Cell]:
    """Each operation once, and what is watched: what a test suite has time for."""
    watched = WATCHED + (WATCHED_CLOSELY if target in CLOSELY else "")
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    lines = [line.split(", ") for line in watched.split("\n") if line]
    return [(CASES[name], S1, BF16) for name in OPERATIONS] + [
        (CASES[name], SHAPES[shape], dtypes[dtype]) for name, shape, dtype in lines
    ]


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
    """Whether an operator launches no kernel: a view, an allocation, a question about types."""
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
            result = next(t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad)
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
    width = launch.arguments.get("C", launch.arguments.get("F", 1))  # of a slab, or of all latents
    if launch.kernel not in STREAMS or width % 16 or first.stride(-1) != 1:
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
    An MLP's few tokens are 1, 2, 4 or 8 in a binary: that many. Two kinds of cells are left out: a transposed matrix,
    whose stride is the number of tokens, and on AMD matrices of 2 GiB or more, since Triton addresses smaller ones with
    32 bits there and so keeps two binaries for either side.
    """
    anew: list[Row] = []
    for case, shape, dtype in cells:
        if "transposed" in case.name or (target == "gfx942" and shape.B * shape.F * dtype.itemsize >= 2**31):
            continue
        few = (1, 2, 4) if case.name.startswith("sparse_mlp") else ()
        own = [shape, *(replace(shape, B=tokens) for tokens in (FEW, *few))]
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
    # What is compiled anew follows from the sizes, for all GPUs of one make alike.
    anew = compiled_anew(quick_cells(target), target) if target in CLOSELY or not quick else []
    return {"rows": report(quick_cells(target) if quick else full_cells(), target, disassemble=not quick),
            "compiled_anew": anew}  # fmt: skip


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
# splits of the latent pass keep one address, written once and read once a pass or step. So does the matrix' update that
# rounds the moments of rows of 16,384 numbers (sm_80, sm_90).
KNOWN_SPILLS = {"latents": 56, "norm_cut": 8, "pass_split": 8, "matrix": 8}
# Triton 3.8 alone keeps more: norm matching's cut the addresses of its first loads (fp32, sm_80), two passes of batch
# top-k one or two numbers. In the binary none is touched in the loop that reads the matrix, but the digits' one number,
# once in 900 instructions. Triton 3.9 does as 3.8, but for the digits; norm matching's write keeps one address (sm_80),
# read once a tile, in some 570 instructions. The sparse MLP's sum of kept rows reads one address a step, in some 640
# (3.8). The latent pass of rows of 4,096 numbers that rounds moments keeps 48 bytes by 3.6, which an H200 showed to be
# faster (`_tuning.ROUNDED_PASS_REGISTERS`), and by 3.9 twice as many: 33 loads a latent, in 3,000 instructions.
SPILLS_BY_TRITON = {
    "3.8": {"norm_cut": 80, "survivors": 8, "digit": 8, "down": 24},
    "3.9": {"norm_cut": 80, "survivors": 8, "write_kept": 8, "latents": 104},
}


def known_spills(kernel: str, triton: str) -> int:
    """Bytes a thread that ``kernel`` may keep in memory as this Triton compiles it."""
    of_version = SPILLS_BY_TRITON.get(".".join(triton.split(".")[:2]), {})
    return max(of_version.get(kernel, 0), KNOWN_SPILLS.get(kernel, 0))


def defects(whole: dict[str, Any]) -> list[str]:
    """Every case in which a binary does what the shipped configurations promise not to do, in words."""
    named = [("{target} {kernel} ({case}, {shape} {dtype})".format(**row), row) for row in whole["rows"]]
    return [
        *(f"{name}: {row['spills']} bytes a thread are spilled"
          for name, row in named if row["spills"] > known_spills(row["kernel"], whole["versions"]["triton"])),
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
