"""Every launch of the Triton kernels, compiled ahead of time for GPUs that need not be there.

A stub driver names the target, the launchers run on meta tensors of the true shapes, and each launch stops after its
compilation; registers, spills, shared memory and the width of loads are read from the binaries. No GPU is needed, and
TRITON_INTERPRET must not be set:

    python tests/compile_targets.py            # the cases that test_compile_targets.py holds, on every target
    python tests/compile_targets.py --full     # all shapes, dtypes and variants: half an hour
"""
import argparse
import collections
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sae_kernels import backward, batch_topk, decode, dense, feature_topm, latent_pass, norm_match, row_topk, threshold
from sae_kernels._terms import GATED, IDENTITY, Term, lists_of

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
SHAPES = {"S1": (4096, 768, 32768, 32), "S2": (4096, 768, 131072, 32), "S3": (4096, 4096, 131072, 64)}  # B, d, F, k


class StubDriver(DriverBase):
    """As much of a driver as compilation asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return self.target  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0


# --- cases: name -> a call of one launcher -------------------------------------------------------------------------


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def codes(rows, entries, dtype):
    return meta(entries, dtype=dtype), meta(entries, dtype=torch.int32), meta(rows + 1, dtype=torch.int64)


def by_latent(num_latents, entries):
    return (meta(num_latents + 1, dtype=torch.int64), meta(entries, dtype=torch.int32),
            meta(entries, dtype=torch.int64))  # fmt: skip


def topk_cases(name, rows, num_latents, k, dtype, variants=("plain",)):
    pre = meta(rows, num_latents, dtype=dtype)
    for variant in variants:
        score = meta(rows, num_latents, dtype=FP32) if variant == "score" else None
        shape = {"mask": (num_latents,), "matrix mask": (rows, num_latents)}.get(variant)
        mask = None if shape is None else meta(*shape, dtype=torch.bool)
        magnitude = variant == "magnitude"
        at = meta(num_latents, rows, dtype=dtype).t() if variant == "transposed" else pre
        yield f"topk {name} k={k} {variant}", functools.partial(
            row_topk.launch, at, score, mask, k, magnitude, not magnitude
        )


def selection_cases(name, rows, num_latents, k, dtype):
    """The rules whose row lengths depend on the data."""
    pre = meta(rows, num_latents, dtype=dtype)
    latent, target = meta(num_latents, dtype=FP32), meta(rows, dtype=FP32)
    mask = meta(num_latents, dtype=torch.bool)
    yield f"batch_topk {name}", functools.partial(batch_topk.launch, pre, None, rows * k)
    yield f"batch_topk {name} mask", functools.partial(batch_topk.launch, pre, mask, rows * k)
    yield f"batch_topk {name} quarter kept", functools.partial(batch_topk.launch, pre, None, pre.numel() // 4)
    budgets = meta(num_latents, dtype=torch.int32)
    yield f"feature_topm {name}", functools.partial(feature_topm.launch, pre, budgets, rows * k)
    yield f"feature_topm {name} quarter kept", functools.partial(feature_topm.launch, pre, budgets, pre.numel() // 4)
    at = meta(num_latents, rows, dtype=dtype).t()
    yield f"feature_topm {name} transposed", functools.partial(feature_topm.launch, at, budgets, rows * k)
    yield f"norm_match {name}", functools.partial(norm_match.launch, pre, target, None, rows * k)
    yield f"norm_match {name} weighted", functools.partial(norm_match.launch, pre, target, latent, rows * k)
    scalar = meta(1, dtype=FP32).expand(num_latents)
    yield f"threshold {name} scalar", functools.partial(threshold.launch, pre, scalar, None, rows * k)
    yield f"threshold {name}", functools.partial(threshold.launch, pre, latent, None, rows * k)
    yield f"threshold {name} window", functools.partial(threshold.launch, pre, latent, latent, rows * k)


def code_cases(name, rows, width, num_latents, k, dtype, weight_dtype):
    """Everything that happens to codes."""
    values, indices, offsets = codes(rows, rows * k, dtype)
    weight, bias = meta(num_latents, width, dtype=weight_dtype), meta(width, dtype=FP32)
    grad = meta(rows, width, dtype=weight_dtype)
    turned = by_latent(num_latents, rows * k)
    name = f"{name} {NAMES[weight_dtype]} weight"
    yield f"decode {name}", functools.partial(decode.launch, values, indices, offsets, weight, bias, weight_dtype)
    yield f"decode {name} no bias", functools.partial(decode.launch, values, indices, offsets, weight, None, FP32)
    yield f"values {name}", functools.partial(backward.launch_values, grad, values, indices, offsets, weight)
    yield f"weight {name}", functools.partial(backward.launch_weight, grad, values, *turned, FP32)
    yield f"to_dense {name}", functools.partial(dense.launch_to_dense, values, indices, offsets, num_latents)
    pre = meta(rows, num_latents, dtype=dtype)
    yield f"gather {name}", functools.partial(dense.launch_gather, pre, indices, offsets)
    yield f"by_latent {name}", functools.partial(dense.launch_by_latent, indices, offsets, num_latents)


def pass_cases(name, rows, width, num_latents, k, dtype, dtypes=(FP32,), terms=(1, 2)):
    """The latent pass of a step that computes in ``dtype``, its parameters in each of ``dtypes``."""
    x = meta(rows, width, dtype=dtype)

    def lists(number):
        modes = (GATED, IDENTITY, GATED)[:number]
        none = meta(0, dtype=dtype)
        found = []
        for mode in modes:
            values, *where = codes(rows, rows * k, dtype)
            turned = by_latent(num_latents, rows * k)
            found.append(Term(x, values, none if mode == GATED else values, *where, *turned, mode))
        return lists_of(found)

    def adam(parameter_dtype, number, strided):
        shapes = (num_latents, width), (num_latents, width), (num_latents,)
        tensors = [[meta(*shape, dtype=parameter_dtype) for shape in shapes] for _ in range(3)]
        copies = [meta(num_latents, width, dtype=dtype) for _ in range(2)] if parameter_dtype != dtype else []
        if strided:
            for each in tensors:
                each[1] = meta(width, num_latents, dtype=parameter_dtype).t()
        scalar, skip = meta(dtype=FP32), meta(dtype=torch.bool)
        latent_pass.launch_adam(
            *tensors, copies, x, None, *lists(number), scalar, scalar, 0.9, 0.999, 1e-8, 0.0, True, skip
        )

    name = f"{name} {NAMES[dtype]}"
    for parameter_dtype in dtypes:
        for number in terms:
            case = f"{name} {NAMES[parameter_dtype]} parameters"
            yield f"adam {case} {number} terms", functools.partial(adam, parameter_dtype, number, False)
        yield f"adam {case} strided", functools.partial(adam, parameter_dtype, 1, True)
    weight, along = meta(num_latents, width, dtype=dtype), meta(num_latents, dtype=FP32)
    yield f"latent_gradients {name}", lambda: latent_pass.launch_gradients(x, weight, along, *lists(1), FP32)


TOPK_VARIANTS = ("plain", "mask", "matrix mask", "score", "magnitude", "transposed")


def full_cases():
    for dtype in (BF16, FP16, FP32):
        for shape, (rows, width, num_latents, k) in SHAPES.items():
            name = f"{shape} {NAMES[dtype]}"
            yield from topk_cases(name, rows, num_latents, k, dtype, TOPK_VARIANTS)
            yield from topk_cases(name, rows, num_latents, 512, dtype, ("plain", "mask"))
            yield from topk_cases(name, rows, num_latents, 2048, dtype, ("plain", "mask"))
            yield from selection_cases(name, rows, num_latents, k, dtype)
            for weight_dtype in dict.fromkeys((dtype, FP32)):
                yield from code_cases(name, rows, width, num_latents, k, dtype, weight_dtype)
            yield from pass_cases(shape, rows, width, num_latents, k, dtype, dict.fromkeys((dtype, FP32)), (1, 2, 3))
        yield from pass_cases("d=16384", 4096, 16384, 65536, 64, dtype)
        # shapes that flatter nobody: a small model's with many entries a row, primes, one that is tiny
        for rows, width, num_latents, k in ((4096, 768, 12288, 512), (1000, 577, 12289, 37), (3, 5, 40, 7)):
            name = f"F={num_latents} d={width} {NAMES[dtype]}"
            yield from topk_cases(name, rows, num_latents, k, dtype, TOPK_VARIANTS)
            yield from selection_cases(name, rows, num_latents, k, dtype)
            yield from code_cases(name, rows, width, num_latents, k, dtype, dtype)
            yield from pass_cases(f"F={num_latents} d={width}", rows, width, num_latents, k, dtype)


HELD = re.compile(
    r"topk S3 bf16 k=64 (plain|mask)|topk S2 bf16 k=(512|2048) plain|topk S1 fp32 k=32 (score|magnitude)"
    r"|topk F=12289 d=577 fp16 k=37 plain|batch_topk S1 bf16|norm_match S1 bf16 weighted|norm_match S2 fp32"
    r"|feature_topm S1 (bf16|fp32 quarter kept)"
    r"|threshold S1 bf16( scalar| window)|(decode|values|weight) S3 bf16 bf16 weight|decode S1 bf16 fp32 weight no bias"
    r"|(to_dense|gather|by_latent) S1 bf16 bf16 weight"
)


def held_cases():
    """A case or two for each kernel: what the test suite has time for."""
    return (case for case in full_cases() if HELD.fullmatch(case[0]))


# --- compilation ---------------------------------------------------------------------------------------------------

# Kernels that stream contiguous rows of their first argument, and over how many passes; 16-byte loads are due there.
STREAMS = {"_group_max_kernel": 1, "_column_group_max_kernel": 1, "_row_topk_kernel": 1, "_row_cut_kernel": 1,
           "_norm_cut_kernel": 4, "_count_kernel": 1}  # fmt: skip


def nvidia_resources(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    operations = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loads = {name: count for name, count in operations.items() if name.startswith("LDG")}
    wide = sum(count for name, count in loads.items() if ".128" in name)
    local = sum(count for name, count in operations.items() if name.startswith(("STL", "LDL")))
    return dict(registers=registers, spills=max(stack, local), wide_loads=wide, other_loads=sum(loads.values()) - wide)


def amd_resources(compiled):
    asm = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", asm, re.MULTILINE)}
    loads = re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", asm)
    wide = loads.count("dwordx4")
    spills = max(usage[name] for name in ("vgpr_spill_count", "private_segment_fixed_size"))
    return dict(registers=usage["vgpr_count"], spills=spills, wide_loads=wide, other_loads=len(loads) - wide)


def compile_cases(target, cases):
    """One row of resources for each distinct kernel that the cases launch, in the order of their first launch."""
    gpu = TARGETS[target]
    resources = nvidia_resources if gpu.backend == "cuda" else amd_resources
    run, rows, case = JITFunction.run, {}, ""

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert min(grid) > 0 and grid[0] < 2**31 and max(grid[1:], default=1) < 2**16, f"{case}: grid {grid}"
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in rows:
            warps = compiled.metadata.num_warps
            streamed = STREAMS.get(self.__name__, 0) * kwargs.get("BLOCK", 0) * args[0].element_size()
            aligned = kwargs.get("F", 1) % 16 == 0 and args[0].stride(-1) == 1
            rows[compiled.hash] = dict(
                target=target, kernel=self.__name__, case=case, warps=warps, **resources(compiled),
                wide_loads_due=streamed // (16 * gpu.warp_size * warps) if aligned else 0,
                shared=compiled.metadata.shared,
            )

    driver.set_active(StubDriver(gpu))
    JITFunction.run = compile_only
    try:
        for name, launch in cases:
            case = name
            launch()
    finally:
        JITFunction.run = run
    return list(rows.values())


def compile_share(target, full, share, shares):
    cases = list(full_cases() if full else held_cases())
    return compile_cases(target, cases[share::shares])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case")
    parser.add_argument("--target", choices=TARGETS, action="append", help="this target only; may be given repeatedly")
    parser.add_argument("--json", action="store_true", help="rows as JSON in place of a Markdown table")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    shares = 8 if options.full else 1
    work = [(target, options.full, n, shares) for target in options.target or TARGETS for n in range(shares)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        rows = [row for future in [pool.submit(compile_share, *share) for share in work] for row in future.result()]
    if options.json:
        sys.stdout.write(json.dumps(rows))
        return
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    sys.stdout.write(f"Triton {triton.__version__}\n\n")
    sys.stdout.writelines(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
