"""What the host does for one call on the CUDA path, in microseconds; no GPU takes part.

    python benchmarks/host_time.py [NAME …]

A GPU whose host takes longer to submit a call than the GPU takes to run it stands idle. Here the operations, public
functions on top of them, and training steps run as they would on one, at the benchmarks' first size: on meta tensors of
true shapes, with kernels compiled for an H100 (minutes, the first time) and launches that end where the driver would be
called. Stock operators are counted, and run on meta tensors, which takes about as long as their dispatch on a GPU and
leaves out what the driver adds, a few microseconds for each. Rows go to ``results/<device>/host-time.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out; the repository root stays out

import ahead_of_time
import kernel_report
import torch
from rows import Row, device_slug, environment, now_utc, store
from sizes import S1
from timing import OtherLoad
from torch import Tensor
from triton.runtime.driver import driver

import sae_engine as se
from sae_engine import functional
from sae_engine.losses import AuxK
from sae_engine.training import TrainStep
from sae_kernels import dispatch
from sae_kernels.operations import OPERATIONS, Maker
from sae_kernels.ops import ops

TARGET = "sm_90"
CPU = torch.device("cpu")  # that the host's time is of
LEAST_SAMPLES = 20


# --- a device of which only the host's side exists ------------------------------------------------------------------


class _Launcher:
    """In place of the driver's launch."""

    made = 0

    def __init__(self, source: object, metadata: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        _Launcher.made += 1


class _Utilities:
    def load_binary(self, *of_a_kernel: object) -> tuple:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, threads at most

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class _Driver(ahead_of_time.StubDriver):
    launcher_cls = _Launcher
    utils = _Utilities()


def _fused_adam(parameters: Any, *others: Any, **options: Any) -> None:
    """In place, and without a kernel for meta tensors."""


def _remembered(operator: Any, meta: Callable) -> Callable:
    """What ``meta`` allocates, without asking it again: PyTorch has some meta kernels in C++ and others in Python,
    which take longer than any dispatch to a GPU."""
    writes = next((n for n, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write), None)
    known: dict[tuple, tuple[bool, list[tuple]]] = {}

    def run(*args: Any, **options: Any) -> Any:
        if writes is not None:
            return args[writes] if writes < len(args) else options["out"]
        key = *map(_described, args), *options.items()
        if key not in known:
            found = meta(*args, **options)
            alone = isinstance(found, Tensor)
            known[key] = alone, [(t.shape, t.stride(), t.dtype) for t in ([found] if alone else found)]
        alone, results = known[key]
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in results]
        return made[0] if alone else tuple(made)

    return run


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    return tuple(map(_described, argument)) if isinstance(argument, list) else argument


def _in_python() -> dict[Any, Callable]:
    """PyTorch's functional operators with tensors alone as results whose meta kernels are written in Python."""
    import torch._meta_registrations as registrations
    from torch._decomp import global_decomposition_table

    registered = {
        entry.split("/")[1] for entry in registrations._meta_lib_dont_use_me_use_register_meta._op_impls
    }  # fmt: skip
    found: dict[Any, Callable] = {}
    for table in ("meta", "post_autograd", "pre_autograd"):
        for operator, run in global_decomposition_table[table].items():
            if not isinstance(operator, torch._ops.OpOverload):
                continue
            name, returns = operator.name().partition("::")[2], operator._schema.returns
            tensors = returns and all("Tensor" in str(r.type) for r in returns)
            others = any(part in name for part in ("empty", "_out", "foreach"))
            if name in registered and tensors and not others and (".out" not in name or len(returns) == 1):
                found.setdefault(operator, run)
    return found


def _goes_straight(args: tuple) -> bool:
    """As ``dispatch`` decides for a GPU's tensors; meta tensors it leaves to the dispatcher."""
    return not any(type(a) is list for a in args) and not dispatch._is_observed()


def _no_autocast(kind: str) -> bool:
    """Autocast, which is off, does not know meta tensors."""
    return False


def _autocast(kind: str, *, enabled: bool) -> contextlib.nullcontext:
    return contextlib.nullcontext()


@contextlib.contextmanager
def host_alone() -> Iterator[None]:
    """Inside, calls on meta tensors do all that a GPU's host does, up to the driver."""
    ours, stock = torch.library.Library("sae_engine", "IMPL"), torch.library.Library("aten", "IMPL")
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("sae_engine::"):
            kernel = torch.library.get_kernel(name, "CPU")
            ours.impl(name.split("::")[1], lambda *a, kernel=kernel: kernel.call_boxed(on_cpu, *a), "Meta")
    for operator, run in _in_python().items():
        stock.impl(operator.name().partition("::")[2], _remembered(operator, run), "Meta", allow_override=True)
    stock.impl("_fused_adam_.tensor_lr", _fused_adam, "Meta")
    before = driver._active
    driver.set_active(_Driver(ahead_of_time.TARGETS[TARGET].gpu))
    with (
        mock.patch.dict("os.environ", {"SAE_BACKEND": "triton"}),
        mock.patch.object(dispatch, "interprets_triton", return_value=True),
        mock.patch.object(dispatch, "_goes_straight", _goes_straight),
        mock.patch.object(torch, "is_autocast_enabled", _no_autocast),
        mock.patch.object(torch, "autocast", _autocast),
        torch.no_grad(),
    ):
        try:
            yield
        finally:
            driver._active = before
            ours._destroy()
            stock._destroy()


# --- what is measured ------------------------------------------------------------------------------------------------


def _step(rule: se.activations.Activation, **options: Any) -> Callable[[], object]:
    with torch.device("meta"):
        sae = se.SparseAutoencoder(S1.d, S1.F, rule)
    step, x = TrainStep(sae, lr=1e-4, compute_dtype=torch.bfloat16, **options), torch.empty(S1.B, S1.d, device="meta")
    return lambda: step.warm_up(x)  # with all that a step can contain: no latent can be dead yet


def calls() -> dict[str, Callable[[], object]]:
    """Operations, public functions and training steps at S1 in bf16, by name."""
    found: dict[str, Callable[[], object]] = {
        name: functools.partial(getattr(ops, name), *row.example(S1, torch.bfloat16, "meta"), "triton")
        for name, row in OPERATIONS.items()
    }
    make = Maker(S1, torch.bfloat16, "meta")
    pre, x, W_dec = make.pre(), make.normal(S1.B, S1.d), make.weight()
    codes = functional.topk(pre, S1.k)
    return {
        **found,
        "functional.topk": lambda: functional.topk(pre, S1.k),
        "functional.encode": lambda: functional.encode(x, W_dec.T, select=se.TopK(S1.k)),
        "functional.decode": lambda: functional.decode(codes, W_dec),
        "step, TopK": _step(se.TopK(S1.k)),
        "step, BatchTopK": _step(se.BatchTopK(S1.k)),
        "step, TopK + AuxK": _step(se.TopK(S1.k), losses=AuxK()),
        "step, TopK, stored gradients": _step(se.TopK(S1.k), grad_clip=1.0),
    }


def stock_operators(call: Callable[[], object]) -> int:
    """Of PyTorch's, those that would launch a kernel."""
    with kernel_report._Launching() as seen:
        call()
    return len(seen.torch_kernels)


def measure(name: str, call: Callable[[], object], seconds: float) -> Row:
    """The row of one call."""
    for _ in range(3):
        call()
    _Launcher.made = 0
    call()
    launches, others = _Launcher.made, OtherLoad()
    taken: list[float] = []
    ends = time.perf_counter() + seconds
    clock = time.thread_time  # nothing is waited for: it differs from the wall's by what other processes take
    while len(taken) < LEAST_SAMPLES or time.perf_counter() < ends:
        started = clock()
        result = call()
        taken.append((clock() - started) * 1e6)
        del result  # freed outside the measured time
    load = others.cores()
    return {
        "kind": "host time", "op": name, "case": S1.name, "shape": S1.shape("BdFk"), "dtype": "bfloat16",
        "target": TARGET, "method": "thread_time; stub driver, meta tensors", **environment(CPU),
        "host_us_min": round(min(taken), 1), "host_us_p50": round(statistics.median(taken), 1), "samples": len(taken),
        "launches": launches, "stock_operators": stock_operators(call), "other_load": load, "utc": now_utc(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what the host does for one call on the CUDA path.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of calls; default: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one call")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    found: list[Row] = []
    print(f"{'':<30}{'µs, least':>12}{'median':>10}{'launches':>10}{'operators':>11}")
    with host_alone():
        known = calls()
        if unknown := set(options.names) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: the calls are {', '.join(known)}")
        for name in options.names or known:
            row = measure(name, known[name], options.seconds)
            found.append(row)
            print(f"{name:<30}{row['host_us_min']:>12.0f}{row['host_us_p50']:>10.0f}{row['launches']:>10}"
                  f"{row['stock_operators']:>11}", flush=True)  # fmt: skip
    store(options.out / device_slug(CPU) / "host-time.jsonl", found)


if __name__ == "__main__":
    main()
