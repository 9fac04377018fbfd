"""The compiler takes every launch, whatever it makes of the sizes.

Triton compiles an argument that is 1 into the kernel as a constant, which a loop then cannot change, and which Triton
3.6 loses in a tuple within a tuple. The interpreter knows no such constants, and common shapes have few. Each launch is
only lowered to Triton's IR for that, in a tenth of a second. Those of small rows, whose loops and layouts are not those
of common sizes, become binaries. Both happen in a process where TRITON_INTERPRET is not set; this file, run as a
program, is that process. `make test-versions` runs it with every Triton.
"""
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FEW = [(1, 1, 1, 1), (3, 5, 40, 7), (2, 5, 100_000, 1)]  # B, d, F, k
MANY = [(1, 1, 1, 1), (3, 5, 5, 1), (1, 5, 40, 7), (3, 1, 40, 7), (3, 5, 40, 40), (1, 768, 32768, 1),
        (4096, 1, 32768, 1)]  # fmt: skip
# Rows of norm matching in one step and in two, aligned and not; of the other kernels, aligned.
SMALL = [(3, 5, 37, 7), (3, 5, 200, 7), (3, 5, 208, 7), (3, 5, 1500, 7)]


def lowered(arguments):
    kept = "TRITON_CACHE_DIR"
    environment = {name: value for name, value in os.environ.items() if name == kept or not name.startswith("TRITON_")}
    tools = str(Path(__file__).resolve().parent.parent / "benchmarks")
    environment["PYTHONPATH"] = os.pathsep.join([tools, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_launch_at_the_edges():
    """One row, one latent, one entry; and each argument that may be 1 at other shapes taken for one."""
    done = lowered(["bfloat16", "few"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_small_rows_have_binaries():
    done = lowered(["float32", "small"])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_launch_at_many_edges():
    done = lowered(["float32", "many"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_changes_its_argument_is_found():
    done = lowered(["planted"])
    assert done.returncode == 1 and "changed type" in done.stderr, done.stdout + done.stderr


def test_numbers_in_a_tuple_within_a_tuple_are_found():
    refuse_nested_numbers({"plain": "*fp32", "flat": ("*fp32", "i32", "constexpr"), "nested": (("*fp32", "*i32"),)})
    for number in ("i64", "constexpr"):
        with pytest.raises(TypeError, match="base"):
            refuse_nested_numbers({"base": (("*fp32", number), "*fp32")})


def test_a_loop_that_hands_a_tensor_on_at_another_place_is_found():
    line = "%9:2 = scf.while (%a = %x, %b = %y, %c = %z) : ({}) -> ({}) {{"
    for entering, leaving in (("i32, i1, tensor<8xi32>", "i32, tensor<8xi32>"), ("i1, tensor<8xi32>", "i32")):
        assert displaced_tensors(line.format(entering, leaving))
    for entering, leaving in (("tensor<8xi32>, i32, i1", "tensor<8xi32>, i32"), ("i32, i1", "i1")):
        assert not displaced_tensors(line.format(entering, leaving))
    assert displaced_tensors("%9 = scf.while (%a = %x, %b = %y) : (i1, tensor<8xi32>) -> tensor<8xi32> {")


# --- the process without the interpreter ---------------------------------------------------------------------------


def lower_only():
    """From now on Triton lowers what it is to compile, also with each integer argument as the constant 1.

    The latter is done once for each of a kernel's forms: sizes of tiles change no statement, switches do.
    """
    import types

    import triton.compiler
    import triton.compiler.compiler as compiler
    from triton._C.libtriton import ir

    def lower(source, target, options):
        refuse_nested_numbers(source.signature)
        backend = compiler.make_backend(target)
        parsed = backend.parse_options(dict(options or {}, **source.parse_options()))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)

    seen = set()

    def compile_(source, target=None, options=None, _env_vars=None):
        lower(source, target, options)
        switches = {
            place: value if isinstance(value, bool) or value in (None, 0, 1) else type(value).__name__
            for place, value in source.constants.items() if source.fn.params[place[0]].is_constexpr
        }  # fmt: skip
        for place, parameter in enumerate(source.fn.params):
            kind = source.signature.get(parameter.name)
            if kind not in ("i32", "i64") or parameter.do_not_specialize:
                continue
            signature = {**source.signature, parameter.name: "constexpr"}
            key = source.fn.__name__, place, str(switches)
            if key not in seen:
                seen.add(key)
                lower(compiler.ASTSource(source.fn, signature, {**source.constants, (place,): 1}), target, options)
        metadata = types.SimpleNamespace(num_warps=4, shared=0)
        return types.SimpleNamespace(asm={}, metadata=metadata, hash=source.hash(), name=source.fn.__name__)

    triton.compiler.compile = compiler.compile = compile_  # before the first kernel asks for it


def refuse_nested_numbers(signature):
    """In a tuple within a tuple there are pointers alone: Triton 3.6 loses numbers that are constants there."""
    for name, kind in signature.items():
        inner = [part for part in kind if isinstance(part, tuple)] if isinstance(kind, tuple) else []
        if not all(isinstance(part, str) and part.startswith("*") for parts in inner for part in parts):
            raise TypeError(f"{name} has a tuple with more than pointers in it: {kind}")


def displaced_tensors(ir):
    """Loops whose tensors are not at the same places among what enters and what leaves, as results have been dropped.

    Triton up to 3.8 takes the one's place for the other's where it changes a tensor's layout, and fails if it can.
    """
    found = []
    for loop in re.finditer(r"scf\.while .* : \((.*)\) -> \(?(.*?)\)? \{", ir):
        entering, leaving = (
            [(place, one) for place, one in enumerate(types.split(", ")) if one.startswith("tensor")]
            for types in loop.groups()
        )
        if entering != leaving:
            found.append(loop[0])
    return found


def refused(dtype, shapes, target="sm_80", only=""):
    """What Triton says of the launches it refuses, and loops that it compiles by luck."""
    import functools

    import kernel_report as report
    import torch

    from sae_engine import functional

    def strided(shape, dtype):  # wide rows of these spill: the report leaves them out
        pre, target = torch.empty(shape.F, shape.B, dtype=dtype, device="meta"), torch.empty(shape.B, device="meta")
        return functools.partial(functional.norm_match, pre.t(), target, capacity=shape.B * shape.k)

    for shape in shapes:
        for case in (*report.CASES.values(), report.Case("norm_match transposed", strided, gradient=False)):
            if not case.name.startswith(only):
                continue
            if shapes is SMALL and shape[2] != 208 and not case.name.startswith("norm_match"):
                continue
            cell = case, report.Shape("B={} d={} F={} k={}".format(*shape), *shape), getattr(torch, dtype)
            try:
                for _, launch in report.run_cell(cell, target).launches:
                    for loop in displaced_tensors(launch.compiled.asm.get("ttir", "")):
                        yield f"{case.name}, {cell[1].name}, {dtype}, {launch.kernel}: {loop}"
            except Exception as error:  # whatever a compiler raises
                root = error
                while root.__cause__ is not None:
                    root = root.__cause__
                yield f"{case.name}, {cell[1].name}, {dtype}: {error!r}"[:2000] + f"\n  {root!r}"


def refused_planted():
    """The same of a selection whose count of entries is left to be a constant, as it once was."""
    from sae_kernels.device import row_topk

    row_topk._row_wide_kernel.params[row_topk._row_wide_kernel.arg_names.index("K")].__dict__["do_not_specialize"] = 0
    return refused("bfloat16", [(2, 5, 5, 1)], only="topk")


if __name__ == "__main__":
    if sys.argv[-1] == "small":
        found = list(refused(sys.argv[1], SMALL, "sm_90"))
    else:
        lower_only()
        is_planted, shapes = sys.argv[1] == "planted", MANY if sys.argv[-1] == "many" else FEW
        found = list(itertools.islice(refused_planted(), 1) if is_planted else refused(sys.argv[1], shapes))
    sys.exit("\n".join(found) or None)
