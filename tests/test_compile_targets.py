"""The kernels compile ahead of time for every target, without spills, with 16-byte loads where rows are streamed."""
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_targets.py")
KERNELS = Path(__file__).parents[1] / "kernels"
# Bytes a thread. Triton 3.6 lays the masked 8192-lane selection and norm matching out a little less tightly on sm_80.
SPILLS = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 7) else 32


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills_and_with_wide_loads(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--json", "--jobs", "1", "--target", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)

    source = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert {row["kernel"] for row in rows} == set(re.findall(r"def (_\w+_kernel)\(", source)), "a kernel has no case"
    assert not [row for row in rows if row["spills"] > SPILLS]
    assert not [row for row in rows if row["wide_loads"] < row["wide_loads_due"]]
    streams = {row["kernel"] for row in rows if row["wide_loads_due"]}
    assert {"_row_topk_kernel", "_row_cut_kernel", "_group_max_kernel", "_norm_cut_kernel", "_count_kernel"} <= streams
