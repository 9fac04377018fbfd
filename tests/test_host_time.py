"""Host time is measured on the path that a GPU takes, with compiled kernels and a driver that launches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, *names):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "host_time.py"), *names, "--seconds", "0", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip


def test_a_row_says_what_the_host_does_for_a_call(tmp_path):
    done = run(tmp_path, "topk", "to_dense", "functional.topk")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*/host-time.jsonl")
    rows = {row["op"]: row for row in map(json.loads, written.read_text().splitlines())}
    assert {op: (row["launches"], row["stock_operators"]) for op, row in rows.items()} == {
        "topk": (1, 0), "to_dense": (1, 1), "functional.topk": (1, 1)
    }  # fmt: skip
    for op, row in rows.items():
        assert 0 < row["host_us_min"] <= row["host_us_p50"] and row["samples"] >= 20, row
        assert op in done.stdout and row["commit"] and row["torch"], row


def test_an_unknown_call_is_refused_with_those_that_there_are(tmp_path):
    done = run(tmp_path, "topq")
    assert done.returncode == 2 and "topq" in done.stderr and "batch_topk" in done.stderr
