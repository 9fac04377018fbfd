"""What every test gets: Triton's interpreter where there is no GPU, a seed, and memory that hurts if unwritten.

With PTX_EMULATOR_ARCH set (`make test-compiled`) the kernels are compiled instead, and run by the emulator of
tests/emulator.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
import types
import warnings
from pathlib import Path

# Under pytest-xdist the processes share the cores; this has to be said before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from on_the_gpu import NOT_EMULATED, ON_THE_GPU
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode

HELPERS = {file.stem for file in (Path(__file__).parent / "helpers").glob("*.py")}
pytest.register_assert_rewrite(*sorted(HELPERS - sys.modules.keys()))  # so that their assertions tell values, too

COMPILED_FOR = os.environ.get("PTX_EMULATOR_ARCH")
if COMPILED_FOR:
    assert not torch.cuda.is_available(), "the emulator runs kernels on CPU tensors: set CUDA_VISIBLE_DEVICES="
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton reads TRITON_INTERPRET when it is imported, and it already has been"
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The first compilation of a process makes the compiler's table of torch functions. It must find torch as it is: made
# while `poisoned_empty` holds, it would list our stand-ins, and the true torch.empty would be unknown to it for good.
torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
# So does the table of functions that heed the default device: without the true torch.empty in it, the weights of an
# nn.Linear would stay on the CPU of a machine with a GPU.
_device_constructors()

# Far outside every index, offset and count: reading it as one of them fails, or at least differs.
UNWRITTEN_INT = {
    torch.uint8: 0xA5,
    torch.int8: -0x5B,
    torch.int16: -0x5A5B,
    torch.int32: -0x5A5A5A5B,
    torch.int64: -0x5A5A5A5A5A5A5A5B,
}


# Unless asked to run everything: `make test-versions`, whose other Tritons the emulator does not run.
SKIPS_SLOW = os.environ.get("TRITON_INTERPRET") == "1" and not os.environ.get("INTERPRET_ALL")

# A file is one process's: the longest ones come first, lest one of them be begun when the others have ended.
LONG_FILES = ("test_kernel_report", "test_frontend", "test_gpu_rehearsal", "test_autotune", "test_row_topk",
              "test_norm_match", "test_batch_topk", "test_traffic", "test_decode", "test_threshold", "test_bench_run",
              "test_registration", "test_selection_properties", "test_loss_objects")  # fmt: skip


class _Watched(types.ModuleType):
    """``_tuning`` as tests change it: launchers then plan their launches anew."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        launch = sys.modules.get("sae_kernels.device._launch")
        if launch is not None:
            launch.forget_plans()


def pytest_configure(config):
    from sae_kernels.device import _tuning

    _tuning.__class__ = _Watched
    if COMPILED_FOR:
        from sae_kernels import dispatch

        # The permission to give CPU tensors to Triton, as long as no test takes it back.
        dispatch.interprets_triton = lambda: "TRITON_INTERPRET" not in os.environ
        config.pluginmanager.import_plugin("ptx_emulator.pytest_plugin")


def pytest_ignore_collect(collection_path):
    """Where kernels are compiled, files that launch none need no second run, nor an import."""
    if COMPILED_FOR and collection_path.name.startswith("test_") and collection_path.parent.name != "emulator":
        return collection_path.stem not in ON_THE_GPU - NOT_EMULATED or None
    return None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.stem) if item.path.stem in LONG_FILES else len(LONG_FILES))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and (COMPILED_FOR or torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="looks into Triton's interpreter"))
        if item.get_closest_marker("compiled") and not COMPILED_FOR:
            item.add_marker(pytest.mark.skip(reason="runs compiled kernels: make test-compiled"))
        if item.get_closest_marker("emulated") and SKIPS_SLOW and not _launches_nothing(item):
            item.add_marker(pytest.mark.skip(reason="slow in the interpreter: make test-compiled-quick"))
    if COMPILED_FOR:
        others = [item for item in items if _launches_nothing(item)]
        config.hook.pytest_deselected(items=others)
        kept = [item for item in items if not _launches_nothing(item)]
        items[:] = sorted(kept, key=lambda item: item.name == "test_every_kernel_was_met")  # this one comes last


def _launches_nothing(item):
    """Whether the test names another back end."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend", parameters.get("path")) in ("torch", "dense", "reference")


@pytest.fixture(autouse=True)
def _default_device(request):
    """Tensors that a test makes lie on the GPU where there is one."""
    if not torch.cuda.is_available() or request.module.__name__.rpartition(".")[2] not in ON_THE_GPU:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    """One seed per test, and the default back end."""
    monkeypatch.delenv("SAE_BACKEND", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def no_waiting():
    """A context in which waiting for the GPU is an error."""

    @contextlib.contextmanager
    def refusing():
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says once that this mode is a prototype, having set it
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refusing


def _poison(tensor):
    """Fill a real tensor with NaN, or with an integer that nothing writes; leave what is only being traced alone."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        unwritten = float("nan")
    elif tensor.dtype == torch.bool:
        unwritten = True
    elif tensor.dtype in UNWRITTEN_INT:
        unwritten = UNWRITTEN_INT[tensor.dtype]
    else:
        return tensor
    with torch.no_grad():
        return tensor.fill_(unwritten)


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # The compiler traces this very function, and fake or proxy modes see every call: neither may see a fill.
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return tensor
        return _poison(tensor)

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """`torch.empty` and its kin return NaN everywhere, so that an element nobody wrote is a red test and no flake."""
    if request.node.get_closest_marker("no_poison") or request.node.get_closest_marker("serial"):
        if (known := sys.modules.get("torch._dynamo.trace_rules")) is not None:
            known.clear_lru_cache()  # by what it knew a function, where the test that first needed it had these
        return
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(scope="session", autouse=True)
def _same_interpreter():
    """Triton's interpreter as strict as its newest version, and right about the smallest bf16 numbers, in any version.

    Masks have to be boolean, as in Triton 3.9. Of a scalar comparison that is broadcast to a block the interpreter
    makes an integer, so that `block & scalar` is no mask: `_device.only_if` is. Subnormal bf16 numbers, which the
    interpreter widens wrongly, are widened as compiled kernels do it, by appending 16 zero bits.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert = builder.cast_impl

    def refusing(method, mask_at):
        def checked(self, *args, **kwargs):
            mask = np.asarray((kwargs["mask"] if "mask" in kwargs else args[mask_at]).data)
            if mask.dtype != np.bool_:
                raise TypeError(f"{method.__name__}: a mask of {mask.dtype}, which Triton 3.9 refuses")
            return method(self, *args, **kwargs)

        return checked

    def converted(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.bfloat16, tl.float32):
            return convert(self, src, dst_type)
        bits = src.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2), ("create_atomic_rmw", 3)):
            patch.setattr(builder, name, refusing(getattr(builder, name), mask_at))
        patch.setattr(builder, "cast_impl", converted)
        yield


@pytest.fixture(scope="session")
def compile_backend():
    """For `torch.compile(backend=…)`: Inductor, or without a C++ compiler for the CPU all but code generation."""
    compilers = filter(None, [os.environ.get("CXX"), "g++", "clang++"])
    return "inductor" if torch.cuda.is_available() or any(map(shutil.which, compilers)) else "aot_eager"
