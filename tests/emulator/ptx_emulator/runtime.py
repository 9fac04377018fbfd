"""Builds the interpreter (once, kept by the hash of its sources) and launches assembled programs in it."""

import ctypes
import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy

from . import ops
from .assemble import INS, Program

HERE = pathlib.Path(__file__).resolve().parent
# Beside the other caches of the repository, which git ignores: tests/emulator/ptx_emulator lies three folders below it.
CACHE = pathlib.Path(os.environ.get("PTX_EMULATOR_CACHE", HERE.parents[2] / ".cache" / "ptx_emulator"))
FLAGS = ["-O2", "-ftree-vectorize", "-march=native", "-mprefer-vector-width=512", "-fno-strict-aliasing", "-fwrapv",
         "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-std=c++17", "-w"]  # fmt: skip

KINDS = {1: "global access out of bounds", 2: "misaligned access", 3: "shared access out of bounds",
         4: "race on shared memory", 5: "race on global memory inside a CTA", 6: "race on global memory between CTAs",
         7: "read of shared memory never written", 8: "warp does not converge at a .sync instruction", 9: "deadlock",
         10: "step limit", 11: "device assertion", 12: "trap", 13: "unsupported instruction",
         14: "shuffle from an inactive lane", 15: "lanes of one store write different values to one address",
         16: "atomic and plain accesses of one address, unordered",
         17: "asynchronous copy read before it was waited for", 18: "mbarrier arrivals differ from its count",
         19: "write to read-only memory", 20: "unordered writes of the same value",
         21: "operand of a product written without fence.proxy.async", 22: "tensor memory that is not allocated",
         23: "race on tensor memory", 24: "read of tensor memory never written",
         25: "tensor memory or its accesses left behind"}  # fmt: skip
CHECK_BITS = {"mem": 1, "shared_race": 2, "global_race": 4, "init": 8}
SEVERE = set(KINDS) - {15, 16, 20}  # reported, not raised


class Ranges(ctypes.Structure):
    _fields_ = [("lo", ctypes.c_uint64), ("hi", ctypes.c_uint64)]


MISS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, *2 * [ctypes.POINTER(ctypes.c_uint64)])
TYPES = {"s32": ctypes.c_int32, "s64": ctypes.c_int64, "u64": ctypes.c_uint64, "pointer": ctypes.c_void_p, "miss": MISS,
         "grid": ctypes.c_int32 * 3, "text": ctypes.c_char * 64}  # fmt: skip


def _fields(text):
    """The members of a struct of machine.h, written as there: a type and its names in each line."""
    return [(name, TYPES[kind]) for kind, *names in map(str.split, text.strip().splitlines()) for name in names]


class Report(ctypes.Structure):
    _fields_ = _fields("""
        s32 kind pc other_pc lane warp other_warp
        s64 cta other_cta
        u64 addr
        s64 count
        text text
    """)


class Launch(ctypes.Structure):
    _fields_ = _fields("""
        pointer code
        s64 ncode
        pointer ext image
        s64 image_size regs_size
        pointer specials
        s64 nspecials
        pointer params
        s64 params_size
        grid grid
        s32 threads
        s64 shared_size local_size
        u64 seed
        s32 checks resident quantum granule_shared granule_global
        pointer ranges
        s64 nranges
        miss miss
        pointer reports
        s64 max_reports nreports
        pointer counts sectors requests conflicts
        u64 max_steps steps sm_count
    """)


class Finding(NamedTuple):
    kernel: str
    kind: str
    severe: bool
    where: str
    other: str | None
    detail: str
    count: int

    def __str__(self):
        other = f"\n    other side: {self.other}" if self.other else ""
        return f"{self.kernel}: {self.kind} ({self.detail}; {self.count} times)\n    at {self.where}{other}"


class EmulatorError(RuntimeError):
    """What a check found; ``findings`` has all of it."""

    def __init__(self, findings):
        self.findings = findings
        super().__init__("\n" + "\n".join(map(str, findings)))


_library = None


def compiler() -> str | None:
    """The C++ compiler that builds the interpreter: $CXX, or g++ where there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def library():
    """The interpreter, built when it is first needed.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    global _library
    if _library is None:
        sources = {path.name: path.read_bytes() for path in [*HERE.glob("*.h"), HERE / "runtime.cpp"]}
        sources |= {"ops_enum.inc": ops.enumeration().encode(), "ops_cases.inc": ops.cases().encode()}
        digest = hashlib.sha256(repr((sorted(sources.items()), FLAGS, _cpu())).encode()).hexdigest()[:16]
        built = CACHE / f"emulator-{digest}.so"
        if not built.exists():
            if compiler() is None:
                raise RuntimeError(f"no C++ compiler {os.environ.get('CXX', 'g++')!r}: the emulator is built with g++")
            CACHE.mkdir(parents=True, exist_ok=True)
            with open(CACHE / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together wait for the first one's
                if not built.exists():
                    _build(sources, built)
        _library = ctypes.CDLL(str(built))
        sizes = [ctypes.c_int() for _ in range(3)]
        _library.emu_sizes(*map(ctypes.byref, sizes))
        assert [s.value for s in sizes] == [INS.itemsize, ctypes.sizeof(Launch), ctypes.sizeof(Report)], [
            s.value for s in sizes
        ]
    return _library


def _build(sources: dict[str, bytes], built: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        for name, data in sources.items():
            (pathlib.Path(folder) / name).write_bytes(data)
        out = pathlib.Path(folder) / "emulator.so"
        subprocess.run([compiler(), *FLAGS, "runtime.cpp", "-o", str(out)], cwd=folder, check=True)
        out.rename(built)


def _cpu() -> str:
    try:
        return next(line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


class Counters(NamedTuple):
    """Executed by warps, by PTX instruction (the order of ``Program.opcodes``)."""

    counts: numpy.ndarray
    sectors: numpy.ndarray
    requests: numpy.ndarray
    conflicts: numpy.ndarray


def launch(
    program: Program, grid, threads: int, shared: int, params: bytes, ranges, *, checks=tuple(CHECK_BITS),
    seed: int = 0, resident: int = 1, quantum: int = 0, sms: int = 132, miss=None, count: bool = False,
    max_steps: int = 4_000_000_000,
):  # fmt: skip
    """Runs the grid. Returns the findings, the number of warp instructions, and Counters where asked for."""
    reports = (Report * 64)()
    ranges = [*ranges, *program.global_ranges]
    found_ranges = (Ranges * max(1, len(ranges)))(*(Ranges(*r) for r in ranges))
    n = len(program.code)
    arrays = [numpy.zeros(n, numpy.uint64) for _ in range(4)] if count else [None] * 4
    image = numpy.frombuffer(bytes(program.image) or b"\0", numpy.uint8)
    buffer = numpy.frombuffer(params or b"\0", numpy.uint8)
    bits = sum(CHECK_BITS[name] for name in checks) | (16 if count else 0)

    def pointer(a):
        return None if a is None else a.ctypes.data

    L = Launch(
        code=pointer(program.code), ncode=n, ext=pointer(program.ext), image=pointer(image),
        image_size=len(program.image), regs_size=program.regs_size, specials=pointer(program.specials),
        nspecials=len(program.specials), params=pointer(buffer), params_size=len(params), grid=TYPES["grid"](*grid),
        threads=threads, shared_size=shared, local_size=program.entry.local_size, seed=seed, checks=bits,
        resident=resident, quantum=quantum, granule_shared=program.granule_shared,
        granule_global=program.granule_global, ranges=ctypes.addressof(found_ranges), nranges=len(ranges),
        miss=MISS(miss) if miss else MISS(), reports=ctypes.addressof(reports), max_reports=64, nreports=0,
        counts=pointer(arrays[0]), sectors=pointer(arrays[1]), requests=pointer(arrays[2]),
        conflicts=pointer(arrays[3]), max_steps=max_steps, steps=0, sm_count=sms,
    )  # fmt: skip
    library().emu_run(ctypes.byref(L))
    findings = []
    for r in reports[: L.nreports]:
        detail = (
            f"{r.text.decode()}{', ' if r.text else ''}address {r.addr:#x}, CTA {r.cta} warp {r.warp} lane {r.lane}"
        )
        if r.other_pc >= 0:
            detail += f", against CTA {r.other_cta} warp {r.other_warp}"
        findings.append(Finding(program.name, KINDS[r.kind], r.kind in SEVERE, program.where(r.pc),
                                program.where(r.other_pc) if r.other_pc >= 0 else None, detail, r.count))  # fmt: skip
    return findings, L.steps, Counters(*arrays) if count else None
