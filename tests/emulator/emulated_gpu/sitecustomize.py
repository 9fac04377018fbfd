"""A GPU that the emulator plays, for whole programs: put this folder and the emulator's on PYTHONPATH.

Python imports ``sitecustomize`` when it starts. From then on, once torch is imported, this process seems to have one
CUDA device: tensors that are asked for on it lie in the CPU's memory and say that they lie on the device, Triton
compiles for sm_90 and the emulator runs what it compiled, and the parts of ``torch.cuda`` that the project calls answer
for the device. Events read the clock, so times are those of the emulation and mean nothing.

The benchmarks' sizes shrink to what an emulator finishes (``EMULATED_GPU_OPERATIONS`` names the operations that take
part; all by default). torch.compile is left out: it compiles for the device that torch knows.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import time
import types

NAME = "Emulated GPU"
GIB = 1 << 30


def emulate(torch):
    """What follows the import of torch."""
    os.environ["TRITON_INTERPRET"] = "0"  # compiled code is what is run
    from torch.overrides import TorchFunctionMode

    device = torch.device("cuda", 0)
    properties = types.SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=80 * GIB, L2_cache_size=1 << 16
    )
    where, is_cuda = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__

    def here(value):
        asked = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return "cpu" if asked and torch.device(value).type == "cuda" else value

    class OnTheDevice(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function == where:
                return device
            if function == is_cuda:
                return True
            if function is torch.device:
                return function(*args, **(kwargs or {}))
            kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
            if function is torch.mm and "out_dtype" in kwargs:  # which torch has on a GPU alone
                return torch.mm(*(factor.to(kwargs["out_dtype"]) for factor in args))
            return function(*map(here, args), **kwargs)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, here(device))

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self, stream=None):
            self.at = time.perf_counter()

        def elapsed_time(self, other):
            return max((other.at - self.at) * 1e3, 1e-6)

        def synchronize(self):
            pass

    def nothing():
        """A function that does nothing, a new one each time: the compiler keeps a rule for each function of torch."""
        return lambda *_, **__: None

    autocast = torch.autocast
    answers = {
        "is_available": lambda: True, "is_initialized": lambda: True, "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *_: NAME, "get_device_capability": lambda *_: (9, 0), "Event": Event,
        "get_device_properties": lambda *_: properties, "mem_get_info": lambda *_: (60 * GIB, 80 * GIB),
        "current_stream": lambda *_: types.SimpleNamespace(cuda_stream=0),
    }  # fmt: skip
    answers |= {name: nothing() for name in (
        "_lazy_init", "_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed",
        "manual_seed_all",
    )}  # fmt: skip
    answers |= {name: lambda *_: 0 for name in ("memory_allocated", "memory_reserved", "max_memory_allocated")}
    answers |= {name: lambda *_: contextlib.nullcontext() for name in ("device_of", "device")}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.version.cuda = "emulated"
    torch.autocast = lambda kind, *args, **options: autocast(here(kind), *args, **options)
    torch.Generator = Generator
    torch.set_default_device = nothing()  # what lies nowhere else lies here
    fork_rng = torch.random.fork_rng
    torch.random.fork_rng = lambda devices=(), **options: fork_rng(devices=[], **options)
    torch.compile = lambda function=None, **_: function if function is not None else lambda f: f
    OnTheDevice().__enter__()


def emulated_triton(_):
    """Triton's launches go to the emulator, which is shown the tensors as they are: on the CPU."""
    import torch

    import ptx_emulator
    from ptx_emulator import driver

    launch = driver._Launcher.__call__

    def unmasked(*args, **options):
        with torch._C.DisableTorchFunction():
            return launch(*args, **options)

    driver._Launcher.__call__ = unmasked
    ptx_emulator.install(arch=90)


def on_the_device(dispatch):
    """Within an operator tensors say where they lie; back ends are chosen as for the device that they play."""
    import torch

    resolve = dispatch.resolve

    def resolved(backend, *tensors):
        is_wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
        if not is_wide and (backend or os.environ.get("SAE_BACKEND") or "auto") in ("auto", "triton"):
            return "triton"
        return resolve(backend, *tensors)

    dispatch.resolve = resolved


def small_sizes(sizes):
    from dataclasses import replace

    tiny = {"B": 8, "d": 64, "F": 512, "k": 4}
    for name in ("SMALL", "MAIN", "S1", "S2", "S3", "WIDE", "DEEP"):
        setattr(sizes, name, replace(getattr(sizes, name), **tiny))
    sizes.PUBLISHED = (sizes.WIDE, sizes.DEEP)
    sizes.SWEEP = tuple(replace(case, **tiny) for case in sizes.SWEEP[:1])


def small_steps(steps):
    steps.LONG = steps.S1
    few = ("encoder GEMM", "fused Adam", "ours", "dense PyTorch")
    steps.CONTESTANTS = tuple(c for c in steps.CONTESTANTS if c.name in few)


def few_operations(registry):
    asked = os.environ.get("EMULATED_GPU_OPERATIONS")
    if asked:
        registry.OPS = tuple(op for op in registry.OPS if op.id in asked.split(","))


def small_roofs(roofs):
    roofs.STREAM_ELEMENTS["cuda"], roofs.GEMM_SIDE["cuda"] = 1 << 12, 64
    roofs.gathers.__defaults__ = (64, 64, 8, 4, roofs.GATHER_CONFIGURATIONS[:1])


AFTER = {
    "torch": emulate, "triton": emulated_triton, "sae_kernels.dispatch": on_the_device, "sizes": small_sizes,
    "steps": small_steps, "registry": few_operations, "roofs": small_roofs,
}  # fmt: skip


class Follow(importlib.abc.MetaPathFinder):
    """Calls what ``AFTER`` has for a module once that has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), AFTER.pop(name)(module))
        return spec


sys.meta_path.insert(0, Follow())
