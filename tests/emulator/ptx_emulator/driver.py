"""A Triton driver whose device is the emulator: unmodified launches on CPU tensors run compiled PTX."""

import collections
import contextlib
import gc
import struct
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import _allocation

from . import hopper, runtime
from .assemble import assemble
from .parse import parse

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class LaunchRecord(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    steps: int
    findings: list
    counters: object
    program: object


class Settings:
    """Read at every launch, so they may be changed between two."""

    checks = ("mem", "shared_race", "global_race", "init")
    seed = 0
    resident = 1  # CTAs that run interleaved
    quantum = 0  # a warp is preempted after a random number of instructions, at most this; 0: at barriers only
    sms = 132
    count = False  # instructions, sectors and bank conflicts, in the record of each launch
    raise_on = "severe"  # or "all", "none"
    max_steps = 4_000_000_000


settings = Settings()
records: collections.deque[LaunchRecord] = collections.deque(maxlen=10000)
findings: list[runtime.Finding] = []  # of all launches
kernels: set[str] = set()  # names of all that were launched
_programs: dict[tuple[str, bytes], object] = {}


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        key = (name, bytes(kernel))
        if key not in _programs:
            _programs[key] = assemble(parse(kernel.decode()), name)
        return None, _programs[key], 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED.get(_arch, 232448), "max_num_regs": 65536,
                "multiprocessor_count": settings.sms, "warpSize": 32, "sm_clock_rate": 1980000,
                "mem_clock_rate": 2619000, "mem_bus_width": 5120}  # fmt: skip

    def set_printf_fifo_size(self, size):
        pass


def _storage(tensor):
    if isinstance(tensor, torch.Tensor):
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    base = getattr(tensor, "base", None)  # triton's wrappers
    if isinstance(base, torch.Tensor):
        return _storage(base)
    return None


def _living_tensors():
    """For one launch: is an access outside the arguments' memory one to a tensor that is alive all the same?

    The search is slow, and a kernel that misses once misses often: it is given up after a few misses in vain.
    """
    patience = 8

    def miss(address, size, lo, hi):
        nonlocal patience
        if patience == 0:
            return 0
        for thing in gc.get_objects():
            try:
                if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.layout != torch.strided:
                    continue
                if thing.device.type == "cpu":
                    start, end = _storage(thing)
                    if start <= address and address + size <= end:
                        lo[0], hi[0] = start, end
                        return 1
            except Exception:  # a fake or functional tensor has no memory
                continue
        patience -= 1
        return 0

    return miss


def _descriptor_parts(value, meta):
    """What Triton's launchers make of a tensor descriptor: with TMA the tensor map, without it its fields twice."""
    rank = len(value.shape)
    fields = [*zip(["i32"] * rank, value.shape, strict=True), *zip(["i64"] * rank, value.strides, strict=True)]
    if meta is not None:
        return [("nvTmaDesc", hopper.encode_descriptor(value, meta)), *fields]
    flags = [value.padding == "nan"]
    if hasattr(value, "round_f32_to_tf32"):  # from Triton 3.7 on
        flags.append(value.round_f32_to_tf32)
    wide = [("i64", number) for number in (*value.shape, *value.strides)]
    return [("*", value.base), *wide, *(("i1", flag) for flag in flags), *fields]


class _Launcher:
    def __init__(self, src, metadata):
        self.metadata = metadata
        self.tensordesc = getattr(metadata, "tensordesc_meta", None)
        self.signature = list(src.signature.values())
        self.num_ctas = getattr(metadata, "num_ctas", 1) or 1

    def __call__(self, x, y, z, stream, function, kernel_metadata, launch_metadata, enter, leave, *args):
        program = function
        if x * y * z == 0:
            return
        if self.num_ctas != 1:
            raise NotImplementedError("the emulator runs no clusters of CTAs")
        kept, values, ranges = [], [], []

        def flatten(kind, value):
            if isinstance(kind, tuple):
                for k, v in zip(kind, value, strict=True):
                    flatten(k, v)
            elif kind != "constexpr":
                values.append((kind, value))

        descriptors = iter(self.tensordesc or ())
        for kind, value in zip(self.signature, args, strict=True):
            if isinstance(kind, str) and kind.startswith("tensordesc"):
                ranges.append(_storage(value.base))
                values.extend(_descriptor_parts(value, next(descriptors, None)))
            else:
                flatten(kind, value)
        for size, align, allocator in (
            (self.metadata.global_scratch_size, self.metadata.global_scratch_align, _allocation._allocator),
            (self.metadata.profile_scratch_size, self.metadata.profile_scratch_align, _allocation._profile_allocator),
        ):
            scratch = None
            if size:
                try:
                    scratch = allocator.get()(x * y * z * size, align, stream)
                except RuntimeError:
                    scratch = torch.empty(x * y * z * size + align, dtype=torch.uint8)
                kept.append(scratch)
            values.append(("*i8", scratch))
        params = bytearray(program.params_size)
        expected = program.entry.params
        if len(values) != len(expected):
            raise RuntimeError(f"{program.name} takes {len(expected)} parameters, got {len(values)}")
        for (kind, value), param in zip(values, expected, strict=True):
            data = self._pack(kind, value, ranges)
            if len(data) > param.size:
                raise RuntimeError(
                    f"{program.name}: parameter {param.name} has {param.size} bytes, got {len(data)} ({kind})"
                )
            params[param.offset : param.offset + len(data)] = data
        ranges = sorted({r for r in ranges if r and r[1] > r[0]})
        if enter is not None:
            enter(launch_metadata)
        threads = program.entry.threads[0] if program.entry.threads else self.metadata.num_warps * 32
        found, steps, counters = runtime.launch(
            program, (x, y, z), threads, max(self.metadata.shared, program.module.shared_static), bytes(params), ranges,
            checks=settings.checks, seed=settings.seed, resident=settings.resident, quantum=settings.quantum,
            sms=settings.sms, miss=_living_tensors(), count=settings.count, max_steps=settings.max_steps,
        )  # fmt: skip
        if leave is not None:
            leave(launch_metadata)
        kernels.add(program.name)
        records.append(
            LaunchRecord(
                program.name, (x, y, z), threads // 32, steps, found, counters, program if settings.count else None
            )
        )
        findings.extend(found)
        worst = [f for f in found if f.severe or settings.raise_on == "all"]
        if worst and settings.raise_on != "none":
            raise runtime.EmulatorError(worst)

    def _pack(self, kind, value, ranges):
        if kind[0] == "*":
            if value is None:
                return struct.pack("<Q", 0)
            if hasattr(value, "data_ptr"):
                if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    raise RuntimeError(f"the emulator takes CPU tensors, got one on {value.device}")
                ranges.append(_storage(value))
                return struct.pack("<Q", value.data_ptr())
            return struct.pack("<Q", int(value))
        if kind == "nvTmaDesc":
            return bytes(value)
        if kind in ("fp32", "f32"):
            return struct.pack("<f", value)
        if kind == "fp64":
            return struct.pack("<d", value)
        if kind == "fp16":
            return struct.pack("<e", value)
        if kind == "bf16":
            return torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
        width = {"i1": 1, "u1": 1}.get(kind) or int(kind[1:]) // 8
        return (int(value) % (1 << 8 * width)).to_bytes(width, "little")


class EmulatorDriver(DriverBase):
    def __init__(self):
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return nvidia_driver.ty_to_cpp(ty)

    def get_current_target(self):
        return GPUTarget("cuda", _arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        def once(call, *, quantiles=None, **kwargs):
            before = sum(r.steps for r in records)
            call()
            steps = float(sum(r.steps for r in records) - before)
            return [steps] * len(quantiles) if quantiles else steps

        return once

    def get_current_device(self):
        return _arch  # Triton keeps what it compiled by this number

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return divmod(_arch, 10)

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0, dtype=torch.int32)

    def clear_cache(self, cache):
        pass

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args


_arch = 80
_patched = False


def _without_ptxas():
    """The last stage hands the PTX on, and a cache of its own keeps it apart from true binaries."""
    global _patched
    if _patched:
        return
    _patched = True
    backend = nvidia.CUDABackend
    make_cubin, hash_ = backend.make_cubin, backend.hash

    def emulated():
        return isinstance(triton.runtime.driver._active, EmulatorDriver)

    backend.make_cubin = lambda self, src, metadata, opt, capability: (
        src.encode() if emulated() else make_cubin(self, src, metadata, opt, capability)
    )
    backend.hash = lambda self: f"ptx-emulator-{self.target.arch}" if emulated() else hash_(self)


def install(arch: int = 80, num_sms: int = 132, seed: int = 0, checks=True, **options) -> EmulatorDriver:
    """Makes the emulator Triton's driver. ``options``: the other attributes of Settings."""
    global _arch
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels are not compiled at all")
    _without_ptxas()
    _arch = arch
    settings.sms, settings.seed = num_sms, seed
    settings.checks = Settings.checks if checks is True else tuple(checks or ())
    for name, value in options.items():
        if not hasattr(Settings, name):
            raise TypeError(f"no setting {name!r}")
        setattr(settings, name, value)
    runtime.library()
    driver = EmulatorDriver()
    triton.runtime.driver.set_active(driver)
    return driver


@contextlib.contextmanager
def installed(arch: int, **options):
    """The emulator of ``arch`` inside, and what there was before afterwards. Takes what `install` takes."""
    global _arch
    before, arch_before, settings_before = triton.runtime.driver._active, _arch, dict(vars(settings))
    try:
        yield install(arch, **options)
    finally:
        _arch = arch_before
        vars(settings).clear()
        vars(settings).update(settings_before)
        triton.runtime.driver._active = before


@contextlib.contextmanager
def configured(**options):
    """Settings for the launches made inside."""
    before = {name: getattr(settings, name) for name in options}
    try:
        for name, value in options.items():
            setattr(settings, name, value)
        yield settings
    finally:
        for name, value in before.items():
            setattr(settings, name, value)
