"""That a run met every kernel that the package launches."""

import ast
import os
from pathlib import Path

import pytest

import ptx_emulator

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def _jitted(node):
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def launched_kernels() -> set[str]:
    """What stands before `[grid](…)` in kernels/, and every jitted function whose name ends in `_kernel`."""
    names = set()
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if _jitted(node) and node.name.endswith("_kernel"):
                names.add(node.name)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                names.update({ast.unparse(node.func.value)} if "_kernel" in ast.unparse(node.func.value) else ())
    return names


def test_kernels_are_found_in_the_sources():
    assert {"_row_topk_kernel", "_latents_kernel", "_write_kept_kernel"} <= launched_kernels()


@pytest.mark.compiled
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="a process of several sees a part of the launches")
def test_every_kernel_was_met():
    """Runs last. A new kernel needs a small test with the marker `sanitizer` that launches it."""
    assert launched_kernels() - ptx_emulator.kernels == set()
