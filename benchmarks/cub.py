"""CUB's row top-k as a contestant: ``cub_topk.cu`` compiled by nvcc, called through ctypes on torch's stream.

``cub::DeviceBatchedTopK`` is C++ alone: CUDA's Python packages bring its headers (cuda-cccl 1.2.1 has CUB 3.6) and no
function that calls it. Its lowest-index tie rule needs a GPU of compute capability 9.0 or newer:
https://nvidia.github.io/cccl/unstable/cub/device_topk_requirements.html
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from inputs import Inputs
from torch import Tensor

SOURCE = Path(__file__).resolve().parent / "cub_topk.cu"
KEYS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
HEADER = Path("cub", "device", "device_batched_topk.cuh")
COMPILE_SECONDS = 150


def _packaged(name: str) -> Iterator[Path]:
    """Where an installed package lies; a namespace package may lie in several places."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the parent
        return
    if found is not None:
        yield from map(Path, found.submodule_search_locations or ())


def _nvcc() -> Path | None:
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    places = [*map(Path, homes), *_packaged("nvidia.cu13"), Path("/usr/local/cuda")]
    found = shutil.which("nvcc") or next((p / "bin" / "nvcc" for p in places if (p / "bin" / "nvcc").exists()), None)
    return Path(found) if found else None


def _headers() -> Path | None:
    """The first folder of headers that holds ``HEADER``: cuda-cccl's, then the toolkit's (13.5 has it)."""
    places = [p / "include" for p in _packaged("cuda.cccl.headers")]
    nvcc = _nvcc()
    if nvcc is not None:
        include = nvcc.resolve().parent.parent / "include"
        places += [include, include / "cccl"]
    return next((place for place in places if (place / HEADER).exists()), None)


@functools.cache
def unavailable() -> str | None:
    """Why CUB cannot take part here, or None."""
    if _nvcc() is None:
        return "no nvcc to compile cub::DeviceBatchedTopK"
    if _headers() is None:
        return "no headers of CUB 3.5 or newer (pip install cuda-cccl, or CUDA Toolkit 13.5)"
    return None


@functools.cache
def version() -> str | None:
    """``3.6.0`` of the headers that would be compiled; None without any."""
    headers = _headers()
    if headers is None:
        return None
    number = re.search(r"#\s*define CUB_VERSION (\d+)", (headers / "cub" / "version.cuh").read_text())
    return f"{n // 100000}.{n // 100 % 1000}.{n % 100}" if number and (n := int(number[1])) else None


def command(target: Path, dtype: torch.dtype, most: int, architecture: str) -> list[str]:
    """Compiles a library for one dtype of keys, rows of at most ``most`` and an architecture such as ``sm_90``."""
    nvcc, headers = _nvcc(), _headers()
    assert nvcc is not None and headers is not None
    libraries = [folder for name in ("lib64", "lib") if (folder := nvcc.resolve().parent.parent / name).is_dir()]
    return [
        str(nvcc), "-std=c++17", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static",
        f"-DKEY={KEYS[dtype]}", f"-DMOST={most}",
        # what a GPU older than 9.0 cannot do is then an error of the call, not of the compilation
        "-DCUB_DISABLE_TOPK_UNSUPPORTED_ARCH_ASSERT",
        "-I", str(headers), *(f"-L{folder}" for folder in libraries), "-o", str(target), str(SOURCE),
    ]  # fmt: skip


@functools.cache
def _library(dtype: torch.dtype, most: int, architecture: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:  # a loaded library stays when its file goes
        target = Path(folder) / "cub_topk.so"
        done = subprocess.run(
            command(target, dtype, most, architecture), capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"nvcc: {(errors or done.stderr.splitlines() or ['no message'])[0].strip()}")
        return ctypes.CDLL(str(target))


def topk(*, lowest: bool) -> Callable[[Inputs], Callable[[], tuple[Tensor, Tensor]]]:
    """``lowest``: of equal values at the cut those of lowest index are kept; otherwise chance decides."""

    def build(i: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
        pre, k = i.pre, i.k
        rows, width = pre.shape
        most = 1 << (width - 1).bit_length()
        library = _library(pre.dtype, most, "sm_{}{}".format(*torch.cuda.get_device_capability(pre.device)))

        def call(storage: Tensor | None, size: ctypes.c_size_t, values: Tensor, indices: Tensor) -> None:
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (pre, values, indices)]
            error = library.cub_topk(
                ctypes.c_void_p(storage.data_ptr() if storage is not None else None), ctypes.byref(size), *pointers,
                *map(ctypes.c_longlong, (rows, width, k)), ctypes.c_int(lowest),
                ctypes.c_void_p(torch.cuda.current_stream(pre.device).cuda_stream),
            )  # fmt: skip
            if error:
                raise RuntimeError(f"cub::DeviceBatchedTopK: CUDA error {error}")

        def outputs() -> tuple[Tensor, Tensor]:
            return pre.new_empty(rows, k), torch.empty(rows, k, dtype=torch.int32, device=pre.device)

        size = ctypes.c_size_t()
        call(None, size, *outputs())
        storage = torch.empty(max(size.value, 1), dtype=torch.uint8, device=pre.device)

        def run() -> tuple[Tensor, Tensor]:
            values, indices = outputs()
            call(storage, size, values, indices)
            return values.relu(), indices

        return run

    return build
