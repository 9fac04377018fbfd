"""Triton's front end takes every launch, whatever it makes of the sizes.

Triton compiles an argument that is 1 into the kernel as a constant, which a loop then cannot change. The interpreter
knows no such constants, and common shapes have none. Each launch is only lowered to Triton's IR here, in a tenth of a
second and in a process where TRITON_INTERPRET is not set; this file, run as a program, is that process.
"""
import os
import subprocess
import sys

import pytest

FEW = [(1, 1, 1, 1), (3, 5, 40, 7), (2, 5, 100_000, 1)]  # B, d, F, k
MANY = [*FEW, (3, 5, 5, 1), (3, 5, 40, 1), (1, 5, 40, 7), (3, 1, 40, 7), (3, 5, 40, 40), (2, 16, 16, 1),
        (1, 768, 32768, 1), (4096, 1, 32768, 1), (2, 16, 300, 300), (1, 1, 40, 1)]  # fmt: skip


def lowered(arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_launch_at_the_edges(dtype):
    """One row, one latent, one entry; and each argument that may be 1 at other shapes taken for one."""
    done = lowered([dtype, "few"])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_launch_at_many_edges():
    done = lowered(["float32", "many"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_changes_its_argument_is_found():
    done = lowered(["planted"])
    assert done.returncode == 1 and "changed type" in done.stderr, done.stdout + done.stderr


# --- the process without the interpreter ---------------------------------------------------------------------------


def lower_only():
    """From now on Triton lowers what it is to compile, also with each integer argument as the constant 1."""
    import types

    import triton.compiler
    import triton.compiler.compiler as compiler
    from triton._C.libtriton import ir

    def lower(source, target, options):
        backend = compiler.make_backend(target)
        parsed = backend.parse_options(dict(options or {}, **source.parse_options()))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)

    seen = set()

    def compile_(source, target=None, options=None, _env_vars=None):
        lower(source, target, options)
        for place, parameter in enumerate(source.fn.params):
            kind = source.signature.get(parameter.name)
            if kind not in ("i32", "i64") or parameter.do_not_specialize:
                continue
            signature = {**source.signature, parameter.name: "constexpr"}
            key = source.fn.__name__, place, str(sorted(signature.items())), str(source.constants)
            if key not in seen:
                seen.add(key)
                lower(compiler.ASTSource(source.fn, signature, {**source.constants, (place,): 1}), target, options)
        metadata = types.SimpleNamespace(num_warps=4, shared=0)
        return types.SimpleNamespace(asm={}, metadata=metadata, hash=source.hash(), name=source.fn.__name__)

    triton.compiler.compile = compiler.compile = compile_  # before the first kernel asks for it


def refused(dtype, shapes):
    """What Triton says of the launches it refuses."""
    import torch

    from sae_engine import kernel_report as report

    for shape in shapes:
        for case in report.CASES.values():
            cell = case, report.Shape("B={} d={} F={} k={}".format(*shape), *shape), getattr(torch, dtype)
            try:
                report.run_cell(cell, "sm_80")
            except Exception as error:  # whatever a compiler raises
                root = error
                while root.__cause__ is not None:
                    root = root.__cause__
                yield f"{case.name}, {cell[1].name}, {dtype}: {error!r}"[:2000] + f"\n  {root!r}"


def refused_planted():
    """The same of a selection whose count of entries is left to be a constant, as it once was."""
    from sae_kernels import row_topk

    row_topk._row_wide_kernel.params[row_topk._row_wide_kernel.arg_names.index("K")].__dict__["do_not_specialize"] = 0
    return refused("bfloat16", [(2, 5, 5, 1)])


if __name__ == "__main__":
    lower_only()
    planted = sys.argv[1] == "planted"
    found = list(refused_planted() if planted else refused(sys.argv[1], MANY if sys.argv[2] == "many" else FEW))
    sys.exit("\n".join(found) or None)
