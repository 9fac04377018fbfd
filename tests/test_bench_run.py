"""``make bench`` comes back with a report whatever happens: wrong and raising cells, killed processes, Ctrl-C.

Most of it with processes that only speak as ``worker.py`` does, which start at once; one run is whole and real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rows
import run
import supervisor

BENCHMARKS = Path(run.__file__).parent
PATIENCE = 240  # seconds for what takes a few: other tests may use the cores
ABOUT = {
    "kind": "operation", "op": "topk", "mode": "forward", "case": "main", "group": "main",
    "shape": {"B": 2048, "F": 16384, "k": 32}, "dtype": "float32", "note": "", "seed": 0, "method": "clock",
    "device": "a machine", "driver": None, "cuda": None, "torch": "2", "triton": "3", "python": "3.11",
    "commit": "a" * 40, "dirty": False,
}  # fmt: skip

# Speaks as worker.py does. JOBS: by name, what becomes of each provider of a job.
SPEAKER = """
import json, os, signal, sys, time
ABOUT, JOBS, LAUNCHES = {about!r}, {jobs!r}, {launches!r}
def say(**message): print(json.dumps(message), flush=True)
with open(LAUNCHES, "a") as file: file.write(str(os.getpid()) + "\\n")
if len(open(LAUNCHES).readlines()) > {most}: sys.exit(7)
say(device="a machine", slug="a-machine", torch="2", jobs=list(JOBS), remarks=["GPU: not measured (none here)"])
for line in sys.stdin:
    order = json.loads(line)
    name = list(JOBS)[order["job"]]
    for provider, fate in JOBS[name].items():
        if provider in order["without"]:
            continue
        row = ABOUT | dict(case=name, provider=provider, baseline=provider != "ours")
        say(now=f"checking {{provider}}", at_stake=[row])
        if fate == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if fate == "lost": say(lost="raised AcceleratorError: illegal address"); sys.exit()
        if fate == "hangs": time.sleep(3600)
        if fate == "raises": say(rows=[row | dict(failed="raised OutOfResources: shared memory", utc="2026")])
        if fate == "wrong": say(rows=[row | dict(failed="WRONG: other entries", utc="2026")])
        if fate == "right":
            say(rows=[row | dict(ms_p50=1.0, ms_p20=1.0, ms_p80=1.0, samples=3, bytes=1, flops=0, peak_mem_bytes=None,
                                 other_load=0.0, utc="2026-01-01T00:00:00Z")])
    say(done=True, failed="raised RuntimeError: no inputs" if "job" in JOBS[name] else None)
"""


@pytest.fixture
def speaker(tmp_path):
    def make(jobs, *, most=99):
        script = tmp_path / "speaker.py"
        launches = str(tmp_path / "launches")
        script.write_text(SPEAKER.format(about=ABOUT, jobs=jobs, launches=launches, most=most))
        return [sys.executable, str(script)]

    return make


@pytest.fixture
def bench(tmp_path, capsys):
    """run.py in this process: status, what it showed, its rows, its report."""

    def go(worker, *arguments):
        out = tmp_path / "results"
        with pytest.raises(SystemExit) as ended:
            run.main(["--out", str(out), *arguments], worker=worker)
        folder = out / "a-machine"
        report = (folder / "report.md").read_text() if folder.exists() else ""
        return ended.value.code, capsys.readouterr().out, rows.load(folder / "operations.jsonl"), report

    return go


def outcome(found):
    return {(row["case"], row["provider"]): row.get("failed", "numbers") for row in found}


GOOD = {"ours": "right", "torch.topk": "right"}


def test_rows_are_shown_as_they_come_and_reported(speaker, bench):
    status, shown, found, report = bench(speaker({"topk": GOOD, "decode": GOOD}))
    assert status == 0 and set(outcome(found).values()) == {"numbers"} and len(found) == 4
    assert "topk topk float32: ours 1 ms" in shown and "report.md" in shown
    assert "### topk" in report and "GPU: not measured" in report and "to come" not in report


@pytest.mark.parametrize(
    ("fate", "reason"),
    [("raises", "raised OutOfResources: shared memory"), ("wrong", "WRONG: other entries"),
     ("killed", "its process was killed by SIGKILL"), ("lost", "raised AcceleratorError: illegal address")],
)  # fmt: skip
@pytest.mark.parametrize("culprit", ["ours", "a library"])
def test_what_fails_is_a_row_and_costs_nobody_else_their_numbers(speaker, bench, fate, reason, culprit):
    jobs = {"one": {culprit: fate, "torch.topk": "right", "last": "right"}, "two": GOOD}
    status, shown, found, report = bench(speaker(jobs))
    made = outcome(found)
    assert made.pop(("one", culprit)) == reason
    assert made == dict.fromkeys([("one", "torch.topk"), ("one", "last"), ("two", "ours"), ("two", "torch.topk")],
                                 "numbers")  # fmt: skip
    line = f"topk one float32, {culprit}: {reason}"
    assert line in shown and f"- {line}" in report and "### two" in report
    assert status == int(culprit == "ours" or fate == "wrong")


def test_every_provider_of_a_cell_may_kill_its_process(speaker, bench):
    _, _, found, _ = bench(speaker({"one": {"ours": "killed", "torch.topk": "lost"}, "two": GOOD}))
    assert sum("failed" in row for row in found) == 2 and outcome(found)["two", "ours"] == "numbers"


def test_a_process_that_hangs_is_ended(speaker, bench, monkeypatch):
    monkeypatch.setattr(run, "SILENT_SECONDS", 2.0)
    status, _, found, _ = bench(speaker({"one": {"ours": "hangs", "torch.topk": "right"}, "two": GOOD}))
    made = outcome(found)
    assert status == 1 and made["one", "ours"] == "said nothing for 2 s"
    assert made["one", "torch.topk"] == made["two", "ours"] == "numbers"


def test_what_is_begun_in_time_is_ended_soon_after(speaker, bench, monkeypatch):
    monkeypatch.setattr(supervisor, "grace", lambda seconds: 1.0)
    status, _, found, report = bench(speaker({"one": GOOD, "two": {"ours": "hangs"}, "three": GOOD}), "--seconds", "35")
    assert set(outcome(found)) == {("one", "ours"), ("one", "torch.topk")}
    assert status == 0 and "- two: out of time" in report
    assert "left out for want of time (1 of 3 jobs): three" in report


def test_without_time_the_report_says_what_is_left_out(speaker, bench):
    status, shown, found, report = bench(speaker({"one": GOOD, "two": GOOD}), "--seconds", "0")
    assert status == 0 and found == []
    assert "Nothing has been measured" in report and "(2 of 2 jobs): one; two" in report and "one; two" in shown


def test_a_job_without_rows_that_raises_is_named(speaker, bench):
    status, _, _, report = bench(speaker({"one": GOOD | {"job": "raises no row"}, "two": GOOD}))
    assert status == 1 and "- one: raised RuntimeError: no inputs" in report and "### two" in report


def test_where_no_process_starts_any_more_the_report_stands(speaker, bench):
    status, _, found, report = bench(speaker({"one": {"ours": "killed"}, "two": GOOD}, most=1))
    assert status == 1 and outcome(found) == {("one", "ours"): "its process was killed by SIGKILL"}
    assert "no process comes up any more: its process ended with status 7" in report and "jobs): one; two" in report


def test_where_none_starts_at_all_it_says_so(speaker, bench):
    status, shown, _, _ = bench(speaker({"one": GOOD}, most=0))
    assert status == 1 and "nothing has been measured: its process ended with status 7" in shown


def test_older_numbers_give_way_to_a_failure(speaker, bench):
    assert outcome(bench(speaker({"one": GOOD}))[2])["one", "ours"] == "numbers"
    _, _, found, report = bench(speaker({"one": {"ours": "wrong", "torch.topk": "right"}}))
    assert outcome(found) == {("one", "ours"): "WRONG: other entries", ("one", "torch.topk"): "numbers"}
    assert "| **ours**" not in report


def test_the_summary_is_of_what_this_run_has_measured(speaker, bench):
    bench(speaker({"one": GOOD}))
    _, shown, _, report = bench(speaker({"two": GOOD}))
    assert "two, float32" in shown and "one, float32" not in shown and "### one" in report
    assert "2 results of earlier runs stand in the report alone" in shown


def start(worker, out, *arguments):
    program = (  # a test suite that runs in the background ignores SIGINT, and so would what it starts
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); import run; run.main(sys.argv[1:], {worker!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, "--out", str(out), *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_writes_its_report(speaker, tmp_path, how, status):
    worker = speaker({"one": GOOD, "two": {"ours": "hangs"}})
    process = start(worker, tmp_path)
    try:
        for line in process.stdout:
            if line.startswith("topk one"):
                break
        process.send_signal(how)
        shown, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    report = (tmp_path / "a-machine" / "report.md").read_text()
    assert process.returncode == status, shown
    assert "### one" in report and "- interrupted" in report and "to come" not in report
    assert "report.md" in shown


def test_killed_it_leaves_the_report_of_what_there_was(speaker, tmp_path):
    worker = speaker({"one": GOOD, "two": GOOD, "three": {"ours": "hangs"}})
    process = start(worker, tmp_path)
    report = tmp_path / "a-machine" / "report.md"
    try:
        deadline = time.monotonic() + PATIENCE
        while not (report.exists() and "1 of 3 jobs were to come" in report.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
        os.kill(int((tmp_path / "launches").read_text()), signal.SIGKILL)  # worker.py would end by itself
    assert "### two" in report.read_text()


# --- the real one --------------------------------------------------------------------------------------------------

# worker.py at toy sizes, with one operation, and contestants that lie, raise and kill.
PATCHED = """
import dataclasses, os, signal, sys
sys.path.insert(0, {benchmarks!r})
import torch
torch.set_num_threads(1)
import curve, reconstruction, registry, roofs, sizes
tiny = sizes.Case("tiny", B=24, d=20, F=96, k=5)
op = registry.find("topk")
ours, baseline = op.providers[:2]
def raising(i): raise NotImplementedError("PTXAS error")
def killing(i): os.kill(os.getpid(), signal.SIGKILL)
fates = dict(liar=lambda i: lambda: torch.zeros_like(i.pre), raiser=raising, killer=killing)
more = [dataclasses.replace(baseline, name=name, baseline=False, build=build) for name, build in fates.items()]
registry.OPS = (dataclasses.replace(op, providers=(ours, baseline, *more)),)
sizes.cases = lambda *_: [(tiny, torch.float32)]
roofs.roof = lambda *_: []
import pathlib
reconstruction.CACHE = pathlib.Path({cache!r})
reconstruction.SETTINGS["quick"] = reconstruction.Setting(
    d_sae=64, batch_tokens=64, train_tokens=64 * 8, eval_tokens=128, seeds=(0,), ks=(4,), afa_coeffs=(1 / 32,),
    control_ks=(4,), control_afa_coeffs=(),
)
curve.TOKENS, curve.STEPS["quick"] = 64, 2
import operations
operations.BUDGET_SECONDS["quick"] = 0.0
import worker
worker.main()
"""


def test_the_main_job_end_to_end(tmp_path, capsys):
    script = tmp_path / "patched.py"
    script.write_text(PATCHED.format(benchmarks=str(BENCHMARKS), cache=str(tmp_path / "cache")))
    with pytest.raises(SystemExit) as ended:
        run.main(["--quick", "--device", "cpu", "--seconds", str(PATIENCE), "--out", str(tmp_path / "results")],
                 worker=[sys.executable, str(script)])  # fmt: skip
    shown = capsys.readouterr().out
    assert ended.value.code == 1, shown  # the liar
    (folder,) = [path for path in (tmp_path / "results").iterdir() if path.is_dir()]
    assert folder.name.startswith("cpu-") and folder.name.endswith("-quick")
    made = {row["provider"]: row.get("failed", "numbers") for row in rows.load(folder / "operations.jsonl")}
    assert made["ours"] == made["torch.topk"] == "numbers"
    assert made["liar"].startswith("WRONG: topk: liar differs") and "SIGKILL" in made["killer"]
    assert made["raiser"] == "raised NotImplementedError: PTXAS error"
    steps = rows.load(folder / "peers.jsonl")
    assert {"ours", "dense PyTorch", "ours + AuxK"} <= {row["provider"] for row in steps if "ms_p50" in row}
    assert not rows.failures(steps)
    trained = rows.load(folder / "reconstruction.jsonl")
    assert [row["provider"] for row in trained] == ["sae_engine", "dense PyTorch"] * 2 + ["sae_engine"]
    assert all(row["mse"] > 0 for row in trained)
    assert [len(row["errors"]) for row in rows.load(folder / "curve.jsonl")] == [2] * 4
    assert len(rows.load(folder / "step.jsonl")) == 2 * 13
    report = (folder / "report.md").read_text()
    for text in ("| **ours**", "## A training step", "## Reconstruction", "The same loss", "WRONG: topk: liar"):
        assert text in report, report
    assert "top-AFA" in shown and "MSE" in shown and "left out" not in shown
    assert json.loads((folder / "step.jsonl").read_text().splitlines()[0])["commit"]


@pytest.mark.parametrize(
    ("device", "said"), [("meta", "cpu and cuda"), ("nonsense", "no such kind"), ("cuda", "no GPU")]
)
def test_devices_that_are_not_there_are_refused(tmp_path, device, said):
    import torch
    from worker import chosen_device

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=said):
        chosen_device(device)
    if device == "meta":  # once through the process that measures
        with pytest.raises(SystemExit, match=said):
            run.main(["--device", device, "--out", str(tmp_path)])


@pytest.mark.parametrize(("only", "stages"), [
    ([], run.STAGES), (["--only", "training"], ("steps", "parts", "curve")),
    (["--only", "quality"], ("reconstruction",)),
    (["--only", "sizes", "quality", "operations"], ("operations", "reconstruction", "sizes")),
], ids=str)  # fmt: skip
def test_stages_are_chosen_alone_or_together(only, stages):
    assert run.parse(only).only == stages


def test_bad_arguments_are_explained(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "everything"])
    assert "--only" in capsys.readouterr().err


def test_the_script_starts_with_a_safe_path():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--help"], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "--seconds" in done.stdout, done.stderr


def test_the_first_row_waits_for_torch_and_us_alone():
    """What takes seconds to import is imported by the jobs that need it."""
    program = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
before = set(sys.modules)
import jobs, run, worker
slow = {{"transformers", "matplotlib", "scipy", "sympy", "triton", "datasets", "torch._dynamo", "torch._inductor"}}
assert not slow & (set(sys.modules) - before), slow & (set(sys.modules) - before)
assert jobs.plan(torch.device("cpu"), "default", run.STAGES)[0].name == "decode small float32"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


def test_the_process_that_waits_needs_no_torch():
    """It shows its first line at once, and holds no device."""
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)
