"""Predicted times of every operation on an H200 and an H100, for a machine without a GPU. Nothing here is measured.

    python benchmarks/predict.py                    # Markdown and JSON in benchmarks/results/kernel-report
    python benchmarks/predict.py --steps            # whole training steps alone, in prediction-steps.md and .jsonl
    python benchmarks/predict.py --mlps             # a sparse MLP alone, in prediction-mlps.md and .jsonl

Each launch is compiled for sm_90 and its binary read (kernel_report.py). Its predicted time is the largest of

- memory: bytes that DRAM must deliver, over the copy bandwidth, times the share of it that the loads in flight sustain
  (resident warps x bytes a pass, against bandwidth x latency: Little's law);
- L2: bytes that the kernel asks for, repeats included, over the rate from L2 to the SMs;
- issue: instructions of its warps (once through, the main loop as often as its stream needs, searches once for each
  bit of a key) over four a cycle and SM;

plus a gap between dependent launches. Stock operators cost the gap or their bytes. Code behind a branch that uniform
codes do not take is counted as issued, so what "issue" binds is a bound from above. A prediction is confirmed when the
measured time lies within a factor of 1.5; the report of a GPU run sets the two beside one another.

Of a whole step, which is TrainStep itself on tensors without numbers, each launch is predicted so, one after the other;
matrix products take the longer of their flops and their bytes. Where data decides what a kernel does, as in merging
slabs, its instructions and bytes are those that the emulator counted on normal numbers (counted.py). Its floor is the
encoder's product and the bytes that Adam moves.
"""
import argparse
import collections
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import kernel_report as report
import torch
import traffic

import sae_engine as se
from sae_engine._files import replace_file
from sae_engine.training import TrainStep, state_bytes
from sae_kernels.operations import OPERATIONS
from sae_kernels.ops import ops

# Bytes a second that a copy reads and writes. The H200's is the roof of the card in benchmarks/results/nvidia-h200; the
# H100's is the same share, nine tenths, of what its memory is specified for.
COPY = {"H200": 4.28e12, "H100": 3.0e12}
# Of the chip, which is the same: rows gathered from L2 and the bf16 GEMM, roofs of that H200 too.
L2, GEMM = 7.9e12, 800e12  # bytes, flops per second
SMS, CLOCK, LATENCY = 132, 1.98e9, 700e-9  # the latency of DRAM is assumed
GAP = 2.5e-6  # seconds from one dependent launch to the next inside a queue
SORT = 8 * GAP  # a radix sort is several launches
REACHING, SURVIVORS = 1.15, 1.17  # groups and entries that reach the bound, over those kept, of normal bf16 entries
FOUND = 256 * 8  # bytes of a histogram in which a program finds a digit
SHARE = 256 * 4  # bytes of the counts from which a program finds its place
SECTOR = 32  # bytes that a gather of a few moves
HELD = 50e6  # bytes that the L2 cache of both keeps

CASES = ("topk", "batch_topk", "norm_match", "threshold", "decode", "decode_error", "to_dense")


def union_of(shape):
    """Neurons that one of the tokens keeps, k each, any as likely as another."""
    return shape.F * (1 - (1 - shape.k / shape.F) ** shape.B)


def moved(launch, shape):
    """(bytes of DRAM, bytes asked for) of one launch; what was written just before and fits L2 costs no DRAM."""
    a = launch.arguments
    rows = launch.grid[0]
    size = lambda name: a[name].numel() * a[name].element_size()  # noqa: E731
    entries, width = shape.B * shape.k, shape.d
    distinct = shape.F * (1 - (1 - 1 / shape.F) ** entries)
    match launch.kernel:
        case "_group_max_kernel":
            return size("score_ptr") + size("maxima_ptr"), size("score_ptr") + size("maxima_ptr")
        case "_bound_kernel":
            return 0, size("maxima_ptr")
        case "_row_topk_kernel":
            once = size("score_ptr") + size("values_ptr") + size("indices_ptr")
            candidates = rows * a["KP"] * a["G"] * a["score_ptr"].element_size()
            if a["HAS_MAXIMA"]:
                once += size("maxima_ptr") + candidates - size("score_ptr")
                return once, once + 2 * size("chosen_ptr")
            return once, once + 2 * (size("maxima_ptr") + size("chosen_ptr")) + candidates
        case "_row_wide_kernel":
            known = size("maxima_ptr") if a["HAS_GROUPS"] else size("score_ptr")
            gathered = REACHING * rows * a["K"] * a["G"] * a["score_ptr"].element_size()
            written = size("values_ptr") + size("indices_ptr")
            return known + gathered + written, 2 * known + gathered + SURVIVORS * rows * a["K"] * 3 * SECTOR + written
        case "_survivors_kernel":
            gathered = REACHING * entries * a["G"] * a["score_ptr"].element_size()
            found = SURVIVORS * entries * (2 * 4 + SECTOR)
            return gathered, gathered + size("maxima_ptr") + found + rows * FOUND
        case "_digit_kernel" | "_row_count_kernel" | "_compact_kernel" if a["HAS_LIST"]:
            return 0, SURVIVORS * entries * (4 + SECTOR) + rows * FOUND * (1 + a.get("SECOND_DIGIT", 0))
        case "_sample_kernel":
            sampled = a["RUN"] * a["RUNS"] * a["score_ptr"].element_size()
            return sampled, sampled
        case "_digit_kernel" if a["HAS_SAMPLE"]:  # the cut lies in the sample's window, and nothing is left to count
            return 0, rows * FOUND
        case "_near_kernel" | "_digit_kernel" | "_row_count_kernel":
            whole = size("score_ptr")
            return whole, whole + rows * FOUND
        case "_compact_kernel":
            whole = size("pre_ptr")
            written = entries * (4 + a["pre_ptr"].element_size())
            return whole + written, whole + written
        case "_norm_cut_kernel":  # one pass and the sample, where few are kept; two passes where half are
            once = size("pre_ptr") + size("bits_ptr")
            return once, once + size("pre_ptr") * a["SAMPLE"] / shape.F
        case "_bitmask_kernel":
            return size("pre_ptr") + size("bits_ptr"), size("pre_ptr") + size("bits_ptr")
        case "_write_kept_kernel":
            written = size("values_ptr") + size("indices_ptr")
            gathered = entries * SECTOR * (1 + a["HAS_CUT"])
            return size("bits_ptr") + gathered, size("bits_ptr") + gathered + written + rows * SHARE
        case "_decode_kernel":
            row = width * a["weight_ptr"].element_size()
            tiles = size("out_ptr") + (size("target_ptr") if a["HAS_TARGET"] else 0)
            return distinct * row + tiles, entries * row + tiles
        case "_sources_kernel":  # of each source as many entries as these, and rows of its own width
            written = size("out_ptr") + (size("target_ptr") if a["HAS_TARGET"] else 0)
            widths = sum(stop - first for first, stop in zip(a["FIRSTS"], a["STOPS"], strict=True))
            weights = [source[3] for source in a["sources"]]  # of which one column tile after the other is gathered
            tiles = sum(w.shape[0] * a["BLOCK_D"] * w.element_size() for w in weights)
            row = widths * weights[0].element_size()
            return delivered(distinct * row, entries * row, tiles) + written, entries * row + written
        case "_values_kernel":
            row = a["D"] * a["weight_ptr"].element_size()
            return distinct * row + size("grad_ptr"), entries * row * (1 + 1 / a["BLOCK_N"])
        case "_weight_kernel":
            gathered = entries * width * a["grad_ptr"].element_size()
            return size("grad_ptr") + size("out_ptr"), gathered + size("out_ptr")
        case "_latent_split_kernel" | "_row_split_kernel":
            return 0, 0  # uniform latents and rows: none is split
        case "_scatter_kernel" | "_gather_kernel":
            return entries * SECTOR, entries * SECTOR
        case "_union_kernel":  # the marks were just written; each program counts what lies before its share
            return 0, size("kept_ptr") * (1 + launch.grid[0]) / 2 + 4 * union_of(shape)
        case "_up_kernel":  # tokens come from the cache for each tile of rows
            weight = union_of(shape) * a["D"] * a["weight_ptr"].element_size()
            return weight, weight + size("x_ptr") * union_of(shape) / a["BLOCK_U"]
        case "_down_kernel":
            weight = union_of(shape) * a["D"] * a["weight_ptr"].element_size()
            return weight, weight + launch.grid[1] * union_of(shape) * a["ROWS"] * 4 + size("partial_ptr")
        case "_sum_kernel":
            return 0, size("partial_ptr") + size("out_ptr")
        case "_entry_rows_kernel":
            return entries * 12, entries * 12
        case "_operand_kernel":
            copied = size("weight_ptr") + size("bias_ptr") + size("out_ptr")
            return copied, copied
        case "_merge_topk_kernel":
            return size("score_ptr") + size("values_ptr") + size("latents_ptr"), rows * counted_merges(launch, shape)[1]
        case "_latents_kernel":
            once, share = 0, (a["stop"] - a["first"]) / shape.F  # of the latents
            for number, tensors in enumerate((a["decoder"], a["encoder"], a["bias"])):
                if tensors is None:
                    continue
                parameter, *moments, copy = tensors[::3]  # each with its strides
                once += share * 2 * sum(t.numel() * t.element_size() for t in (parameter, *moments))
                once += share * copy.numel() * copy.element_size() if a["COPIED"][number] else 0
            if a["center_ptr"] is not None:
                once += size("x_ptr") + size("center_ptr")
            grad = a["terms"][0][0]
            if grad.nbytes > HELD:  # else it is there, and counts as little as any gather does
                row = a["D_OUT"] * grad.element_size()
                once += delivered(grad.shape[0] * row, share * entries * row, grad.shape[0] * row)
            return once, rows * counted_latents(a, shape)["bytes"]
        case "_factors_kernel" | "_pass_split_kernel":
            return 0, 0  # three numbers; uniform latents: none is split
    raise ValueError(f"{launch.kernel} has no model: add one to moved()")


@functools.cache
def counted():
    """What the emulator counted: counted.py."""
    return json.loads((Path(__file__).parent / "results" / "kernel-report" / "counted.json").read_text())


def counted_merges(launch, shape):
    """Instructions and bytes that a row costs, as the mean over all slabs after the first.

    In slab n, k / n of a row's entries exceed the least that it holds, whatever the slab's width is.
    """
    a, found = launch.arguments, counted()["merges"]
    slabs = -(-shape.F // a["C"]) - 1
    if (a["K"], True) != (found["k"], slabs <= len(found["bytes"])):
        raise ValueError(f"counted.py has not counted {slabs} merges of k={a['K']}: let it")
    mean = lambda numbers: sum(numbers[:slabs]) / slabs  # noqa: E731
    # A slab twice as wide costs twice as much, but for the merging itself, of which the last slabs have hardly any.
    more = a["C"] / found["C"] - 1
    return [mean(found[name]) + more * min(found[name]) for name in ("instructions", "bytes")]


def delivered(once, asked, gathered):
    """Bytes that DRAM delivers of ``asked``, where gathers go to and fro among ``gathered`` bytes."""
    return once + max(asked - once, 0) * max(1 - HELD / gathered, 0)


def counted_latents(a, shape):
    """Instructions and bytes of one program, which has GROUP latents: as counted, or from counts of other widths."""
    found, entries = counted()["latents"], shape.B * shape.k / shape.F
    for one in found:
        if one["d"] == a["D_OUT"] == a["D_IN"] and abs(one["entries_a_latent"] - entries) < 0.01:
            return one
    few, many = (one for one in found if one["d"] == 768)
    columns = (a["D_OUT"] + a["D_IN"]) / (2 * 768)
    share = (entries - few["entries_a_latent"]) / (many["entries_a_latent"] - few["entries_a_latent"])
    return {name: columns * (few[name] + share * (many[name] - few[name])) for name in ("instructions", "bytes")}


_binaries = {}


def predict(launch, shape, copy, compile_):
    """One launch: seconds, and which of the three it waits for."""
    binary = _binaries.get(launch.binary) or compile_.read_binary(launch.compiled, "sm_90")
    _binaries[launch.binary] = binary
    dram, asked = moved(launch, shape)
    warps = launch.compiled.metadata.num_warps
    programs = 1
    for extent in launch.grid:
        programs *= extent
    threads = programs * warps * 32
    passes = max(asked / (threads * binary.loop_bytes), 1) if binary.loop_bytes and asked else 1
    rounds = 32 - launch.arguments.get("SHIFT", 0)
    once = max(binary.instructions - binary.loop_instructions - binary.search_instructions, 0)
    if launch.kernel == "_write_kept_kernel":  # words of bits, around the loop over columns where many are set
        once *= -(-shape.F // (32 * launch.arguments["WORDS"]))
    issued = programs * warps * (once + passes * binary.loop_instructions + rounds * binary.search_instructions)
    if launch.kernel == "_merge_topk_kernel":
        issued = programs * counted_merges(launch, shape)[0]
    if launch.kernel == "_latents_kernel":
        issued = programs * counted_latents(launch.arguments, shape)["instructions"]
    in_flight = binary.occupancy * 64 * 32 * binary.loop_bytes
    share = min(in_flight / (copy / SMS * LATENCY), 1) if in_flight else 1
    waits = {
        "memory": dram / (copy * share),
        "L2": asked / L2,
        "issue": issued / (SMS * 4 * CLOCK),
    }
    bound = max(waits, key=waits.__getitem__)
    return {"kernel": launch.kernel, "microseconds": round(1e6 * (waits[bound] + GAP), 2), "bound": bound,
            "occupancy": round(binary.occupancy, 3), "dram_bytes": round(dram), "asked_bytes": round(asked),
            "warp_instructions": round(issued)}  # fmt: skip


def stock(name, size, copy):
    """A stock operator between the kernels: its bytes, or the gap."""
    seconds = max(size / copy, GAP) + (SORT if "sort" in name else 0)
    return {"kernel": name, "microseconds": round(1e6 * seconds, 2), "bound": "stock", "dram_bytes": size}


def floor(name, mode, shape, dtype):
    """What an operation cannot avoid, its backward by way of the operators that it calls; None where nothing is."""
    def of(operation):
        row = OPERATIONS[operation]
        return row.traffic(*row.example(shape, dtype, "meta"))

    if name == "decode":  # the codes by latent are made in its forward
        forward, backward = ("decode", "by_latent"), ("decode_backward_values", "decode_backward_weight")
        parts = forward if mode == "forward" else backward
        return of(parts[0]) + of(parts[1])
    return of(name) if mode == "forward" else None


def rows(shapes, dtype, gpu="H200"):
    import ahead_of_time

    copy = COPY[gpu]
    for shape in shapes:
        topk = 0.0
        for name in CASES:
            found = report.run_cell((report.CASES[name], shape, dtype), "sm_90")
            for mode in ("forward", "backward"):
                least = floor(name, mode, shape, dtype)
                if least is None:
                    continue
                parts = [predict(launch, shape, copy, ahead_of_time) for at, launch in found.launches if at == mode]
                parts += [stock(*kernel, copy) for kernel in found.torch_kernels[mode]]
                total = sum(part["microseconds"] for part in parts)
                topk = total if name == "topk" else topk
                yield row(gpu, name, mode, shape, dtype, total, 1e6 * least.bytes / copy, parts)
        gemm = traffic.linear(shape.B, shape.d, shape.F, dtype.itemsize)
        least = 1e6 * max(gemm.flops / GEMM, gemm.bytes / copy)
        # the tensor cores' fp32 sums are written, biased in place and rounded: 14 bytes beside the product
        total = least + 1e6 * (14 * shape.B * shape.F / copy + 3 * GAP)
        yield row(gpu, "encoder GEMM and topk", "forward", shape, dtype, total + topk, least,
                  [{"kernel": "GEMM, bias, rounding", "microseconds": round(total, 2), "bound": "stock"},
                   {"kernel": "topk", "microseconds": round(topk, 2), "bound": "see topk"}])  # fmt: skip


# --- whole steps -----------------------------------------------------------------------------------------------------

GPT2_CLT = report.Shape("GPT-2's 12 layers, d=768 F=24576 k=10, B=8192", 8192, 768, 24_576, 10)  # a source's sizes
LAYERS = 12
LIKE_FOR_LIKE = report.Shape("d=2688 F=344064", 4096, 2688, 344_064, 32)  # of the published step: 134 ms, no optimizer
# and bytes of a slab
STEPS = ((report.S2, None), (report.S2, 2**25), (LIKE_FOR_LIKE, None), (LIKE_FOR_LIKE, 2**25), (GPT2_CLT, None))
PADDING, PRODUCT = "aten.pad", "aten.mm"


def launches_of_step(shape, memory_budget):
    """All that one step launches, once another has gone before: our launches, and the names and bytes of torch's."""
    import ahead_of_time

    launches = []
    with report._as_if_on_a_gpu() as stock, ahead_of_time.compiling("sm_90", launches.append), torch.device("meta"):
        if shape is GPT2_CLT:
            sae = se.Crosscoder.clt(LAYERS, shape.d, shape.F, se.TopK(shape.k))
        else:
            sae = se.SparseAutoencoder(shape.d, shape.F, se.TopK(shape.k))
        step = TrainStep(
            sae, lr=1e-4, compute_dtype=report.BF16, memory_budget=memory_budget or 2**40,
            nonfinite="skip",  # no event of a GPU is asked
        )  # fmt: skip
        x = torch.empty(shape.B, sae.d_in, dtype=report.BF16)
        for _ in range(2):
            launches.clear()
            stock.torch_kernels.clear()
            step(x)
    return launches, list(stock.torch_kernels)


def steps(gpu):
    """A row for each of STEPS; ``parts`` has the sum over the launches of each kind."""
    import ahead_of_time

    copy = COPY[gpu]
    for shape, memory_budget in STEPS:
        launches, torch_kernels = launches_of_step(shape, memory_budget)
        layers = LAYERS if shape is GPT2_CLT else 1
        flops = layers * 2 * shape.B * shape.d * shape.F / sum(name.startswith(PRODUCT) for name, _ in torch_kernels)
        sums = collections.defaultdict(lambda: {"microseconds": 0.0, "launches": 0, "bound": ""})

        def add(part, sums=sums):
            one = sums[part["kernel"]]
            one["microseconds"] = round(one["microseconds"] + part["microseconds"], 2)
            one["launches"] += 1
            one["bound"] = part["bound"]

        for launch in launches:
            add(predict(launch, shape, copy, ahead_of_time))
        for name, size in torch_kernels:
            part = stock(name, size, copy)
            if name.startswith(PRODUCT):
                part["microseconds"] = round(1e6 * max(flops / GEMM, size / copy) + 1e6 * GAP, 2)
            elif not name.startswith((PADDING, "aten.sort")):
                part["kernel"] = "other stock operators"
            add(part)
        parts = sorted(({"kernel": name, **one} for name, one in sums.items()), key=lambda one: -one["microseconds"])
        moved = sum(state_bytes(shape.d, shape.F, d_out=written * shape.d, compute_dtype=report.BF16).moved
                    for written in range(1, layers + 1))  # fmt: skip
        product = traffic.linear(shape.B, shape.d, shape.F, 2)
        least = layers * max(product.flops / GEMM, product.bytes / copy) + moved / copy
        name = "step" if memory_budget is None else f"step, slabs of {memory_budget >> 20} MiB"
        total = sum(part["microseconds"] for part in parts)
        yield {**row(gpu, name, "training", shape, report.BF16, total, 1e6 * least, parts),
               "launches": sum(part["launches"] for part in parts)}  # fmt: skip


# --- a language model's MLP ------------------------------------------------------------------------------------------

# of Llama 3 8B, 5 % of its neurons kept
MLPS = (report.Shape("MLP 4096 x 14336, 1 token", 1, 4096, 14336, 717),
        report.Shape("MLP 4096 x 14336, 8 tokens", 8, 4096, 14336, 717))  # fmt: skip


def _sparse_mlp(shape, dtype):
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    x, kept, up, down = (empty(*sizes) for sizes in (
        (shape.B, shape.d), (shape.B, shape.F), (shape.F, shape.d), (shape.F, shape.d)))  # fmt: skip
    return functools.partial(ops.sparse_mlp, x, kept, up, None, down, None, "triton")


def mlps(gpu):
    """For each of MLPS the operation, and the whole gated MLP: with it, and dense by three products."""
    import ahead_of_time

    copy, dtype = COPY[gpu], report.BF16
    for shape in MLPS:
        found = report.run_cell((report.Case("", _sparse_mlp, gradient=False), shape, dtype), "sm_90")
        parts = [{**predict(launch, shape, copy, ahead_of_time), "launches": 1} for _, launch in found.launches]
        total = sum(part["microseconds"] for part in parts)
        matrix, vectors = shape.F * shape.d * 2, shape.B * (2 * shape.d + shape.F) * 2
        read = 2 * matrix * union_of(shape) / shape.F
        yield row(gpu, "sparse_mlp", "forward", shape, dtype, total, 1e6 * (read + vectors) / copy, parts)
        product = stock("product with a matrix", matrix, copy)
        product["microseconds"] += 1e6 * GAP
        small = [stock(name, 0, copy) for name in ("activation", "absolute value", "comparison", "where")]
        whole = [product, *small, *parts]
        yield row(gpu, "gated MLP, sparse", "forward", shape, dtype, sum(part["microseconds"] for part in whole),
                  1e6 * (matrix + read + vectors) / copy, whole)  # fmt: skip
        dense = [product] * 3 + [stock(name, 0, copy) for name in ("activation", "multiplication")]
        yield row(gpu, "gated MLP, dense", "forward", shape, dtype, sum(part["microseconds"] for part in dense),
                  1e6 * (3 * matrix + vectors) / copy, dense)  # fmt: skip


def row(gpu, name, mode, shape, dtype, microseconds, floor, parts):
    longest = max(parts, key=lambda part: part["microseconds"])
    return {"prediction": True, "gpu": gpu, "op": name, "mode": mode, "shape": shape.name,
            "dtype": report.DTYPE_NAMES[dtype], "predicted_microseconds": round(microseconds, 1),
            "floor_microseconds": round(floor, 1), "longest": longest["kernel"].strip("_"), "bound": longest["bound"],
            "launches": len(parts), "parts": parts}  # fmt: skip


COLUMNS = ("gpu", "op", "mode", "shape", "dtype", "predicted_microseconds", "floor_microseconds", "launches",
           "longest", "bound")  # fmt: skip


def markdown(found):
    head = [
        "# Predicted times on an H200 and an H100: predictions, not measurements",
        "",
        "From bytes, instructions and occupancy of the binaries compiled for sm_90, by the model at the top of "
        "`benchmarks/predict.py`; no GPU took part. Floor: the unavoidable bytes (`kernels/operations.py`) over the "
        "copy bandwidth (H200: 4.28 TB/s; H100: 3.0 TB/s, assumed), or the flops over the GEMM rate. Longest: the "
        "launch that takes most of the time, and what it waits for. A measured time within a factor of 1.5 confirms a "
        "row; what differs more refutes the model or shows a defect, and is to be explained.",
        "",
        "| " + " | ".join(c.replace("_microseconds", ", µs") for c in COLUMNS) + " | predicted / floor |",
        "|" + "---|" * (len(COLUMNS) + 1),
    ]
    for r in found:
        ratio = r["predicted_microseconds"] / r["floor_microseconds"]
        head.append("| " + " | ".join(str(r[c]) for c in COLUMNS) + f" | {ratio:.2f} |")
    return "\n".join(head) + "\n"


def of_parts(found):
    """A table for each step: what it spends its predicted time on."""
    lines = []
    for r in found:
        lines += ["", f"## {r['gpu']}, {r['shape']}, {r['op']}: {r['predicted_microseconds'] / 1000:.2f} ms", "",
                  "| launches | predicted, µs | number | bound |", "|---|---|---|---|"]  # fmt: skip
        for part in r["parts"]:
            kernel, microseconds = part["kernel"].strip("_"), part["microseconds"]
            lines.append(f"| {kernel} | {microseconds:.0f} | {part['launches']} | {part['bound']} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "kernel-report"
    parser.add_argument("--out", type=Path, default=default, help="folder for prediction.md and prediction.jsonl")
    parser.add_argument("--steps", action="store_true", help="whole training steps, in prediction-steps.md and .jsonl")
    parser.add_argument("--mlps", action="store_true", help="a sparse MLP, in prediction-mlps.md and .jsonl")
    options = parser.parse_args()
    if options.mlps:
        name, found = "prediction-mlps", [r for gpu in COPY for r in mlps(gpu)]
        text = markdown(found) + of_parts([r for r in found if r["op"] == "sparse_mlp"])
    elif options.steps:
        name, found = "prediction-steps", [r for gpu in COPY for r in steps(gpu)]
        text = markdown(found) + of_parts(found)
    else:
        name = "prediction"
        found = [r for gpu in COPY for r in rows((report.S1, report.S2, report.S3), report.BF16, gpu)]
        text = markdown(found)
    options.out.mkdir(parents=True, exist_ok=True)
    replace_file(options.out / f"{name}.md", lambda path: path.write_text(text, encoding="utf-8"))
    lines = "".join(json.dumps(r) + "\n" for r in found)
    replace_file(options.out / f"{name}.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
