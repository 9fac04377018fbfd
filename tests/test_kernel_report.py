"""The kernels compile ahead of time for every target: no spills, 16-byte loads where rows are streamed, one binary for
all batch sizes. No GPU takes part; the compiler runs in processes of its own, where TRITON_INTERPRET is not set."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kernel_report
import pytest

KERNELS = Path(__file__).parents[1] / "kernels"
TOOLS = KERNELS.parent / "benchmarks"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What one test has compiled the next one need not; nothing of it is from another run."""
    return tmp_path_factory.mktemp("cache")


def run(code, cache):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, cache):
    """What the command line says of all targets."""
    folder = tmp_path_factory.mktemp("kernels")
    command = ["--quick", "--json", str(folder / "report.json")]
    done = run(f"import kernel_report; raise SystemExit(kernel_report.main({command}))", cache)
    assert (folder / "report.json").exists(), done.stderr
    return json.loads((folder / "report.json").read_text()), done


@pytest.mark.slow
@pytest.mark.parametrize("target", kernel_report.TARGETS)
def test_every_kernel_keeps_its_promises(target, compiled):
    whole, done = compiled
    rows = [row for row in whole["rows"] if row["target"] == target]
    source = "".join(path.read_text() for path in KERNELS.rglob("*.py"))
    everywhere = target in ("sm_90", "gfx942")
    kernels = {row["kernel"] for row in rows}
    assert kernels == set(re.findall(r"def _(\w+)_kernel\(", source)) or not everywhere, "a kernel has no case"
    assert not [row for row in whole["compiled_anew"] if row["target"] == target]
    triton = whole["versions"]["triton"]
    assert not [row for row in rows if row["spills"] > kernel_report.known_spills(row["kernel"], triton)]
    assert not [row for row in rows if row["wide_loads"] < row["wide_loads_due"]]
    assert not [row for row in rows if row["fp_fusion"] is not True]
    streams = {row["kernel"] for row in rows if row["wide_loads_due"]}
    expected = {"row_topk", "merge_topk", "group_max", "column_group_max", "norm_cut", "bitmask"}
    # with 64 threads a warp a thread of the streaming pass has four columns, 16 bytes in fp32 alone: no quick cell
    assert streams == (expected - {"bitmask"} if target == "gfx942" else expected)
    assert f"## {target}" in done.stdout and done.returncode == (1 if whole["defects"] else 0)


LAUNCHES = """
import kernel_report as report
for shape in (report.S1, report.S2, report.S3):
    for dtype, most in ((report.BF16, 5), (report.FP32, 6)):
        found = report.run_cell((report.CASES["batch_topk"], shape, dtype), "sm_90")
        kernels = [launch.kernel for mode, launch in found.launches if mode == "forward"]
        assert len(kernels + found.torch_kernels["forward"]) == most, (kernels, found.torch_kernels)
    found = report.run_cell((report.CASES["topk"], shape, report.BF16), "sm_90")
    assert [launch.kernel for mode, launch in found.launches if mode == "forward"] == ["_row_topk_kernel"]
    for name, first in (("threshold", "_bitmask_kernel"), ("norm_match", "_norm_cut_kernel")):
        found = report.run_cell((report.CASES[name], shape, report.BF16), "sm_90")
        kernels = [launch.kernel for mode, launch in found.launches if mode == "forward"]
        assert kernels == [first, "_write_kept_kernel"]
        assert [name for name, _ in found.torch_kernels["forward"]] == ["aten.zeros.default"]
few = report.run_cell((report.CASES["topk few rows"], report.S1, report.BF16), "sm_90").launches
few = [(one.kernel, one.grid) for mode, one in few if mode == "forward"]
assert few == [("_group_max_kernel", (1, 32)), ("_row_topk_kernel", (1,))]
"""


@pytest.mark.slow
def test_selections_take_few_launches(cache):
    """Batch top-k six at most, threshold and norm match three, stock operators' among them.

    And the rows of a small batch are streamed by many programs.
    """
    done = run(LAUNCHES, cache)
    assert done.returncode == 0, done.stderr


DISASSEMBLE = """
import kernel_report as report
import ahead_of_time
for target in ("sm_90", "gfx942"):
    launches = report.run_cell((report.CASES["decode"], report.S1, report.BF16), target).launches
    launch = next(launch for _, launch in launches if launch.kernel == "_decode_kernel")
    full, quick = (ahead_of_time.read_binary(launch.compiled, target, disassemble=d) for d in (True, False))
    assert full[:5] == quick[:5], (full, quick)
    assert full.loads[128] >= 2 and sum(full.loads.values()) < 64, full.loads
    assert 0 < full.loop_instructions < full.instructions, full
    # four rows of 256 columns, two bytes each, shared by the threads of the program
    threads = launch.compiled.metadata.num_warps * ahead_of_time.TARGETS[target].gpu.warp_size
    assert 4 * 256 * 2 // threads <= full.loop_bytes <= 4 * 256 * 2 // threads + 64, full.loop_bytes
    assert report.instructions_per_element(launch, full) < 20
"""


@pytest.mark.slow
def test_instructions_of_the_main_loop_are_read_from_the_binary(cache):
    done = run(DISASSEMBLE, cache)
    assert done.returncode == 0, done.stderr


PREDICT = """
import runpy, sys
import kernel_report as report
predict = runpy.run_path(sys.argv[1])
predict["rows"].__globals__["CASES"] = ("topk", "decode")
found = list(predict["rows"]([report.S1], report.BF16))
assert [(r["op"], r["mode"]) for r in found][:3] == [("topk", "forward"), ("decode", "forward"), ("decode", "backward")]
for r in found:
    assert r["prediction"] is True and r["predicted_microseconds"] >= r["floor_microseconds"] > 0, r
    assert abs(sum(part["microseconds"] for part in r["parts"]) - r["predicted_microseconds"]) < 0.1, r
# one read of 4096 x 32768 bf16 at 4.3 TB/s takes 62.4 us
assert 62.4 < found[0]["floor_microseconds"] < 63 and "not measurements" in predict["markdown"](found)
"""


@pytest.mark.slow
def test_predictions_say_so_and_lie_above_the_floor(cache):
    script = KERNELS.parent / "benchmarks" / "predict.py"
    done = run(f"import sys; sys.argv[1:] = [{str(script)!r}]\n{PREDICT}", cache)
    assert done.returncode == 0, done.stderr


RECOMPILE = """
import functools
import torch
import kernel_report as report
from sae_engine import functional

def batch_in_the_kernel(shape, dtype):  # an argument that follows the number of tokens, as a launch must not have
    pre = torch.empty(shape.F, shape.B, dtype=dtype, device="meta", requires_grad=True)
    return functools.partial(functional.topk, pre.t(), shape.k)

case = report.Case("strided by tokens", batch_in_the_kernel)
assert report.compiled_anew([(case, report.S1, report.BF16)], "sm_90"), "nothing was compiled anew"
"""


@pytest.mark.slow
def test_a_launch_that_depends_on_the_batch_is_found(cache):
    done = run(RECOMPILE, cache)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_have_no_binaries():
    code = "import kernel_report as r; r.run_cell((r.CASES['topk'], r.S1, r.BF16), 'sm_90')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TOOLS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize("arguments", [["--arch", "sm_42"], ["--jobs", "0"]])
def test_command_line_names_what_is_wrong(arguments, capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(arguments)
    said = capsys.readouterr().err
    assert arguments[0] in said and arguments[1] in said


def test_what_one_triton_spills_is_known_of_that_one():
    known = [kernel_report.known_spills("norm_cut", triton) for triton in ("3.7.1", "3.8.0", "3.9.0")]
    assert known[1] == known[2] > known[0] and kernel_report.known_spills("decode", "3.8.0") == 0


def test_defects_are_named_and_shown(monkeypatch, capsys, tmp_path):
    row = {
        "target": "sm_90", "kernel": "bitmask", "case": "threshold, forward", "shape": "S1", "dtype": "bf16",
        "warps": 4, "registers": 255, "spills": 0, "shared": 0, "occupancy": 0.125, "limited_by": "registers",
        "loads": {128: 2}, "wide_loads": 2, "wide_loads_due": 2, "stores": {}, "instructions": None,
        "instructions_per_element": None,
        "fp_fusion": True,
    }  # fmt: skip
    bad = [{"spills": 8}, {"wide_loads": 1}, {"fp_fusion": None}]
    parts = {"rows": [row, *({**row, **change} for change in bad)],
             "compiled_anew": [{**{key: row[key] for key in ("target", "kernel", "case", "shape", "dtype")}, "B": 17}]}
    monkeypatch.setattr(kernel_report, "collect", lambda target, quick: parts)
    assert kernel_report.main(["--arch", "sm_90", "--markdown", str(tmp_path / "new" / "report.md")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    for number, word in enumerate(("8 bytes a thread", "1 of 2 16-byte loads", "fp fusion", "17 tokens")):
        assert word in shown.err.splitlines()[number]
        assert word in (tmp_path / "new" / "report.md").read_text()


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "resident"),
    [
        ("sm_90", 32, 0, 4, 64),  # everything fits
        ("sm_90", 64, 0, 4, 32),  # 2,048 registers a warp
        ("sm_90", 65, 0, 4, 28),  # 2,304 of them: 28 warps
        ("sm_90", 255, 0, 8, 8),
        ("sm_90", 32, 100 << 10, 4, 8),  # two programs' shared memory
        ("sm_80", 32, 100 << 10, 4, 4),
        ("sm_90", 16, 0, 1, 32),  # 32 programs at most
        ("gfx942", 64, 0, 4, 32),
        ("gfx942", 128, 0, 4, 16),  # four waves a SIMD
        ("gfx942", 16, 40 << 10, 4, 4),
    ],
)
def test_occupancy(target, registers, shared, warps, resident):
    import ahead_of_time

    share, _ = ahead_of_time._occupancy(ahead_of_time.TARGETS[target], registers, shared, warps)
    assert share * ahead_of_time.TARGETS[target].warps == resident


def test_loads_of_ptx_are_counted_by_width():
    import ahead_of_time

    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
    @%p1 st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
    """
    assert list(ahead_of_time._ptx_accesses(ptx, "ld")) == [128, 128, 16]
    assert list(ahead_of_time._ptx_accesses(ptx, "st")) == [64]


def test_loop_that_loads_most_is_the_inner_one(monkeypatch):
    import ahead_of_time

    sass = "\n".join(
        f"        /*{16 * place:04x}*/   {text} ;"
        for place, text in enumerate([
            "MOV R1, R2", "LDG.E.U16 R4, [R2]", "@P0 LDG.E.128 R4, desc[UR4][R2.64]", "FADD R1, R2, R3",
            "STG.E.64 [R2], R4", "@!P0 BRA 0x20", "@P1 BRA 0x10", "EXIT", "BRA 0x80", "NOP",
        ])
    )  # fmt: skip
    code = ahead_of_time._read_sass(sass)
    assert len(code) == 8 and [i.jumps_to for i in code if i.jumps_to is not None] == [2, 1]
    assert [i.loads for i in code[:5]] == [0, 16, 128, 0, 0] and code[4].stores == 64
    asm = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(num_warps=4, shared=0))
    monkeypatch.setattr(ahead_of_time, "_cuobjdump", lambda cubin, disassemble: (32, 0, sass))
    binary = ahead_of_time.read_binary(asm, "sm_90")
    assert (binary.loop_instructions, binary.loop_bytes, binary.instructions) == (4, 16, 8)
