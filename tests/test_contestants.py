"""Other libraries' kernels in the benchmarks: called as documented, held to what they promise; and published times."""

import importlib
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import cub
import others
import peers
import published
import pytest
import registry
import report
import sizes
import steps
import torch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOPK = registry.find("topk")
TINY = sizes.Case("tiny", B=8, d=16, F=64, k=4)


def provider(name):
    (found,) = [p for p in TOPK.providers if p.name == name]
    return found


def tied():
    """Rows of small integers, of which most tie at the cut."""
    inputs = TOPK.make_inputs(TINY, torch.float32, CPU, 0)
    inputs.pre = inputs.pre.round()
    return inputs


def highest_index(pre, k):
    """A correct top-k that keeps the last of tied entries, against our rule."""
    values, indices = pre.flip(1).sort(dim=1, descending=True, stable=True)
    return values[:, :k], pre.shape[1] - 1 - indices[:, :k]


def lowest_index(pre, k):
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


# --- FlashInfer ----------------------------------------------------------------------------------------------------


def flashinfer(monkeypatch, top_k):
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(top_k=top_k))


def test_flashinfer_is_called_as_its_documentation_says(monkeypatch):
    """``top_k(input, k, sorted, deterministic, tie_break) -> (values, indices)``: tie_break 1 prefers small indices."""
    calls = []

    def top_k(input, k, sorted=False, deterministic=False, tie_break=0):
        calls.append((deterministic, tie_break))
        return (lowest_index if tie_break == 1 else highest_index)(input, k)

    flashinfer(monkeypatch, top_k)
    for name in ("FlashInfer top_k", "FlashInfer top_k, lowest index"):
        registry.check_provider(TOPK, provider(name), tied())
    assert calls == [(False, 0), (True, 1)]


def test_who_promises_the_lowest_index_is_held_to_it(monkeypatch):
    flashinfer(monkeypatch, lambda input, k, deterministic=False, tie_break=0: highest_index(input, k))
    registry.check_provider(TOPK, provider("FlashInfer top_k"), tied())
    with pytest.raises(AssertionError, match="lowest index differs from the reference: other entries"):
        registry.check_provider(TOPK, provider("FlashInfer top_k, lowest index"), tied())


def test_a_flashinfer_without_tie_breaks_says_so(monkeypatch):
    flashinfer(monkeypatch, lambda input, k, sorted=False: lowest_index(input, k))
    with pytest.raises(NotImplementedError, match="tie_break"):
        registry.check_provider(TOPK, provider("FlashInfer top_k, lowest index"), tied())


# --- torch's CuTe DSL ----------------------------------------------------------------------------------------------


@pytest.fixture
def cute_dsl(monkeypatch):
    """torch's override, which takes one size and follows ``use_deterministic_algorithms``."""
    impl = SimpleNamespace(_cond=lambda pre, k: k == TINY.k)
    monkeypatch.setitem(sys.modules, "torch._native.ops.topk", SimpleNamespace(cutedsl_impl=impl))
    seen = []

    def topk(pre, k):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory))
        return (lowest_index if seen[-1][0] else highest_index)(pre, k)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    return seen


def test_the_cute_dsl_is_timed_only_where_torch_takes_it(cute_dsl):
    inputs = tied()
    for lowest in (False, True):
        others.cute_dsl_topk(lowest=lowest)(inputs)()
    assert cute_dsl == [(False, True), (True, False)]  # the filling of new memory is not timed
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    inputs.k = TINY.k + 1
    with pytest.raises(NotImplementedError, match=r"k = 5 of 64 in torch\.float32"):
        others.cute_dsl_topk(lowest=False)(inputs)


def test_without_the_dsl_the_provider_is_missing(monkeypatch):
    monkeypatch.setattr(torch.backends, "python_native", SimpleNamespace(available_dsls=["triton"]), raising=False)
    assert "CuTe DSL" in provider("torch.topk, CuTe DSL").missing(GPU)
    monkeypatch.delattr(torch.backends, "python_native")
    assert "CuTe DSL" in provider("torch.topk, CuTe DSL, lowest index").missing(GPU)


def test_this_torch_still_says_which_sizes_its_dsl_takes():
    """The one private name that the benchmark leans on."""
    if not hasattr(torch.backends, "python_native"):
        pytest.skip("this torch has no kernels in the CuTe DSL")
    impl = pytest.importorskip("torch._native.ops.topk.cutedsl_impl", reason="this torch has no top-k in the CuTe DSL")
    assert impl._cond(torch.zeros(4, 64), 4) is False  # no CUDA tensor


# --- CUB -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit with CUB 3.6's headers and an nvcc that only says what it was asked."""
    headers = tmp_path / "include" / "cub"
    (headers / "device").mkdir(parents=True)
    (headers / "device" / cub.HEADER.name).touch()
    (headers / "version.cuh").write_text("#define CUB_VERSION 300600 // one value\n")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'cub_topk.cu(1): error: no compiler' >&2\nexit 2\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cub.shutil, "which", lambda name: str(nvcc))
    monkeypatch.setattr(cub, "_packaged", lambda name: iter(()))
    for cached in (cub.unavailable, cub.version):
        cached.cache_clear()
    yield tmp_path
    for cached in (cub.unavailable, cub.version):
        cached.cache_clear()


def test_cub_is_compiled_from_the_headers_that_are_there(toolkit):
    assert cub.unavailable() is None and cub.version() == "3.6.0"
    assert provider("CUB DeviceBatchedTopK").packages() == {"CUB": "3.6.0"}
    command = cub.command(toolkit / "x.so", torch.bfloat16, 1 << 17, "sm_90")
    assert {"-DKEY=__nv_bfloat16", "-DMOST=131072", "-arch=sm_90", str(toolkit / "include")} <= set(command)
    with pytest.raises(RuntimeError, match=r"nvcc: .*no compiler"):
        cub._library(torch.float32, 64, "sm_90")


def test_without_headers_cub_is_missing(toolkit):
    (toolkit / "include" / cub.HEADER).unlink()
    assert "cuda-cccl" in provider("CUB DeviceBatchedTopK").missing(GPU) and cub.version() is None


@pytest.mark.parametrize("lowest", [False, True])
def test_cub_gets_pointers_sizes_and_the_tie_rule(lowest, monkeypatch):
    """Its wrapper is asked for the size of its storage first, then for the result."""
    calls = []

    def cub_topk(storage, size, keys, values, indices, rows, width, k, lowest, stream):
        calls.append((storage.value, lowest.value, rows.value, width.value, k.value))
        size._obj.value = 48
        return 0

    monkeypatch.setattr(cub, "_library", lambda dtype, most, architecture: SimpleNamespace(cub_topk=cub_topk))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    values, indices = cub.topk(lowest=lowest)(tied())()
    assert values.shape == indices.shape == (TINY.B, TINY.k)
    assert [call[1:] for call in calls] == 2 * [(int(lowest), TINY.B, TINY.F, TINY.k)]
    assert calls[0][0] is None and calls[1][0]


def test_an_error_of_cub_is_raised(monkeypatch):
    failing = SimpleNamespace(cub_topk=lambda *_: 801)  # cudaErrorNotSupported: a GPU older than 9.0
    monkeypatch.setattr(cub, "_library", lambda *_: failing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match="CUDA error 801"):
        cub.topk(lowest=True)(tied())


# --- versions ------------------------------------------------------------------------------------------------------


def test_a_row_names_the_versions_of_what_it_ran():
    installed = registry.Provider("x", None, distribution="torch")
    assert installed.packages() == {"torch": importlib.metadata.version("torch")}
    assert registry.Provider("x", None, package="no_such_package").packages() == {}
    assert registry.Provider("x", None).packages() == {}
    made = {p.name for p in TOPK.providers if p.lowest}
    assert made == {f"{name}, lowest index" for name, *_ in registry.ROW_TOPK_KERNELS}


# --- published times -----------------------------------------------------------------------------------------------


def step_row(case, provider, ms, **changes):
    return {
        "kind": "step", "case": case.name, "group": case.group, "shape": case.shape("BdFki"), "dtype": "bfloat16",
        "provider": provider, "contestant": "ours", "baseline": False, "auxk": False, "note": "no optimizer",
        "device": "a GPU", "driver": "1", "cuda": "13", "torch": "2.13.0", "triton": "3", "python": "3.11",
        "commit": "a" * 40, "dirty": False, "packages": {}, "seed": 0, "method": "none", "ms_p50": ms, "ms_p20": ms,
        "ms_p80": ms, "samples": 9, "peak_mem_bytes": 1, "utc": "2026-01-01T00:00:00Z",
    } | changes  # fmt: skip


def test_published_times_stand_beside_ours_as_not_measured():
    text = report.markdown([step_row(sizes.WIDE, "ours, forward + backward", 60.0)], [])
    (line,) = [line for line in text.splitlines() if "B=4096 d=2688 F=344064 k=32" in line and "NVIDIA" in line]
    assert "134 ms" in line and "not measured here" in line and "H100" in line
    (mine,) = [line for line in text.splitlines() if "ours, forward + backward" in line]
    assert "60 ms" in mine and "torch 2.13.0" in mine and "bfloat16" in mine
    for times in published.TIMES:
        assert times.source.startswith("https://") and times.source in text
    assert "NVIDIA" not in report.markdown([step_row(sizes.S1, "ours", 60.0)], [])


def test_published_sizes_get_forward_and_backward_alone():
    assert {case for case, _ in steps.published_cases(GPU)} == {times.case for times in published.TIMES}
    assert steps.published_cases(CPU) == []
    assert steps.contestants(sizes.WIDE) == steps.FORWARD_BACKWARD != steps.contestants(sizes.S1)


def test_forward_and_backward_gives_every_gradient_and_updates_nothing():
    case = replace(sizes.WIDE, B=16, d=24, F=128, k=4)
    setup = steps.make_setup(case, CPU)
    expected = steps.true_error(setup)
    before = [p.detach().clone() for p in setup.shared.parameters()]
    gradients = []
    for contestant in steps.FORWARD_BACKWARD:
        steps.check(contestant, contestant.build(setup), setup, expected)
        gradients.append([p.grad.clone() for p in setup.shared.parameters()])
    for ours, dense in zip(*gradients, strict=True):
        # both sum fp32 products of d, F or B terms in an order of their own: sqrt(n) roundings of the largest entry
        allowed = 4 * math.sqrt(case.F) * torch.finfo(torch.float32).eps * float(dense.abs().max())
        assert float((ours - dense).abs().max()) <= allowed
    for parameter, unchanged in zip(setup.shared.parameters(), before, strict=True):
        assert torch.equal(parameter, unchanged)


def test_a_wrong_forward_is_not_timed():
    setup = steps.make_setup(replace(sizes.WIDE, B=16, d=24, F=128, k=4), CPU)
    wrong = steps.Contestant("wrong", steps.forward_backward(lambda sae, x: 2 * steps.our_error(sae, x)), updates=False)
    right, liar = peers.measure(setup.case, torch.float32, CPU, "quick", (wrong, steps.FORWARD_BACKWARD[1]))
    assert right["provider"] == "dense PyTorch, forward + backward" and right["ms_p50"] > 0
    assert liar["provider"] == "wrong" and liar["failed"].startswith("WRONG") and "ms_p50" not in liar

