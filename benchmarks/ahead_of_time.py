"""Launches compiled ahead of time for GPUs that need not be there, and what their binaries cost.

A stub driver names the target and every launch stops after its compilation, so meta tensors of the true shapes do.
Registers, spills, shared memory and instructions are read from the binary itself: SASS through the cuobjdump of
Triton's own package, AMD's assembly as it stands. ``TRITON_INTERPRET`` must not be set: there is nothing to compile.
"""
import collections
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Target(NamedTuple):
    """A GPU to compile for, and what one of its SMs (CUs, on AMD) shares among the programs it holds."""

    gpu: GPUTarget
    shared: int  # bytes, less what the driver keeps of each program
    shared_kept: int  # bytes of each program that the driver keeps
    warps: int
    programs: int


# CUDA programming guide, table of compute capabilities (10.0 as 9.0); CDNA 3 ISA and LLVM's AMDGPU usage.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 << 10, 1024, 64, 32),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 << 10, 1024, 64, 32),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 << 10, 1024, 64, 32),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 0, 32, 16),
}


class StubDriver(DriverBase):
    """As much of a driver as compilation asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return self.target  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0


class Launch(NamedTuple):
    """One launch that was compiled and not run."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name: pointers are meta tensors
    options: dict[str, Any]  # num_warps and whatever else is Triton's, not the kernel's
    compiled: Any

    @property
    def binary(self) -> str:
        """Names the binary: equal where Triton compiled nothing anew."""
        return self.compiled.hash


@contextlib.contextmanager
def compiling(target: str, record: Callable[[Launch], object]) -> Iterator[None]:
    """Compiles every launch made inside for ``target`` and hands it to ``record``; nothing runs."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels have no binaries, unset it")
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        grid = tuple(grid)
        if min(grid) < 1 or grid[0] >= 2**31 or max(grid[1:], default=1) >= 2**16:
            raise RuntimeError(f"{self.__name__} cannot be launched on grid {grid}")
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False))
        bound |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        record(Launch(self.__name__, grid, bound, options, compiled))

    before = driver._active
    driver.set_active(StubDriver(TARGETS[target].gpu))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = before


# --- what a binary costs -------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    place: int
    jumps_to: int | None  # the place that a branch names
    loads: int  # bits from global memory, a thread
    stores: int


class Binary(NamedTuple):
    """What one compiled kernel takes. Spills are bytes a thread; the loop is the one that loads most."""

    registers: int
    spills: int
    shared: int
    occupancy: float  # resident warps over the most that an SM holds
    limited_by: str
    loads: dict[int, int]  # bits a thread -> instructions that load from global memory
    stores: dict[int, int]
    instructions: int | None = None
    loop_instructions: int | None = None
    loop_bytes: int | None = None  # that a thread loads in one pass; in the whole kernel where no loop loads
    search_instructions: int | None = None  # of the inner loops that load nothing


def wide(accesses: dict[int, int]) -> int:
    """Instructions of 16 bytes a thread or more."""
    return sum(count for bits, count in accesses.items() if bits >= 128)


def read_binary(compiled: Any, target: str, *, disassemble: bool = True) -> Binary:
    """Resources and instructions of what :func:`compiling` handed over.

    NVIDIA's disassembler takes a third of a second each time it starts. Without it the widths of loads and stores are
    those of the PTX, whose vectors SASS neither splits nor joins, and instructions stay unknown.
    """
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    code: list[Instruction] = []
    if TARGETS[target].gpu.backend != "cuda":
        registers, spills, code = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills, text = _cuobjdump(compiled.asm["cubin"], disassemble)
        if disassemble:
            code = _read_sass(text)
    occupancy, limited_by = _occupancy(TARGETS[target], registers, shared, warps)
    resources = registers, spills, shared, occupancy, limited_by
    if not code:
        loads, stores = (_widths(_ptx_accesses(compiled.asm["ptx"], kind)) for kind in ("ld", "st"))
        return Binary(*resources, loads, stores)
    bodies = [code[i.jumps_to : i.place + 1] for i in code if i.jumps_to is not None and i.jumps_to < i.place]
    # of nested loops the inner one; of an unrolled loop and its remainder the unrolled one
    loading = sorted((body for body in bodies if _loaded(body)), key=len)
    inner = [b for n, b in enumerate(loading) if not any(b[0].place <= a[0].place <= b[-1].place for a in loading[:n])]
    body = max(inner, key=_loaded, default=code)
    loads, stores = (_widths(getattr(i, kind) for i in code) for kind in ("loads", "stores"))
    search = sum(len(b) for b in bodies if not _loaded(b) and not any(
        b is not a and b[0].place <= a[0].place <= b[-1].place for a in bodies))  # fmt: skip
    return Binary(*resources, loads, stores, len(code), len(body), _loaded(body), search)


def _loaded(code: list[Instruction]) -> int:
    return sum(i.loads for i in code) // 8


def _widths(accesses: Iterable[int]) -> dict[int, int]:
    return dict(sorted(collections.Counter(bits for bits in accesses if bits).items(), reverse=True))


def _occupancy(target: Target, registers: int, shared: int, warps: int) -> tuple[float, str]:
    if target.gpu.backend == "cuda":
        of_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256 registers
        by_registers = (65536 // of_warp // 4 * 4) // warps  # four schedulers
    else:
        of_wave = max(-(-registers // 8) * 8, 8)
        by_registers = min(512 // of_wave, 8) * 4 // warps  # four SIMDs of 512 registers a lane, 8 waves each
    limits = {
        "registers": by_registers,
        "shared memory": target.shared // (shared + target.shared_kept) if shared else target.programs,
        "warps": target.warps // warps,
        "programs": target.programs,
    }
    programs = min(limits.values())
    # Where several limits bind, the one that is named is the hardware's own, since the others could not help.
    limited_by = next(name for name in ("warps", "programs", "registers", "shared memory") if limits[name] == programs)
    return programs * warps / target.warps, limited_by


def _cuobjdump(cubin: bytes, disassemble: bool) -> tuple[int, int, str]:
    """Registers, bytes of stack (spills) and, where asked for, the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", *(["-sass"] if disassemble else []), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{CUOBJDUMP} names no registers: {text:.200}")
    return int(found[1]), int(found[2]), text


def _ptx_accesses(ptx: str, kind: str) -> Iterator[int]:
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.[a-zA-Z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        yield int(vector or 1) * int(bits)


def _read_sass(text: str) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;\n]*);", text)
    while lines and lines[-1][1] in ("NOP", "BRA"):  # padding, and the loop in which a finished warp is caught
        lines.pop()
    places = {int(address, 16): place for place, (address, _, _) in enumerate(lines)}
    code = []
    for place, (_, name, operands) in enumerate(lines):
        opcode, *modifiers = name.split(".")
        jump = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if opcode == "BRA" else None
        bits = next((int(m) for m in modifiers if m in ("64", "128", "256")), 32)
        bits = next((int(m[1:]) for m in modifiers if m in ("U16", "S16", "U8", "S8")), bits)
        loads, stores = bits * (opcode in ("LDG", "LDGSTS")), bits * (opcode == "STG")
        code.append(Instruction(place, places.get(int(jump[1], 16)) if jump else None, loads, stores))
    return code


def _read_amdgcn(text: str) -> tuple[int, int, list[Instruction]]:
    """Registers, bytes of stack and spilled registers, and the instructions."""
    usage = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.split(".Lfunc_end")[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([a-z]\w+)\s*(.*?)\s*(?:;.*)?$", line):
            lines.append((found[1], found[2]))
    code = []
    for place, (name, operands) in enumerate(lines):
        access = re.match(r"(?:global|buffer|flat)_(load|store)_[us]?(dwordx\d|dword|short|byte)", name)
        bits = 0 if access is None else AMD_BITS[access[2]]
        jump = labels.get(operands) if name.startswith(("s_cbranch", "s_branch")) else None
        is_load = access is not None and access[1] == "load"
        code.append(Instruction(place, jump, bits * is_load, bits * (not is_load)))
    return usage["vgpr_count"], max(usage["vgpr_spill_count"], usage["private_segment_fixed_size"]), code


AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
