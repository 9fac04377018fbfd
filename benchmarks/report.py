"""The report: Markdown tables as a pure function of stored rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import reasons
from derived import (
    BOUND_BY,
    HOST_HEADER,
    Cell,
    bandwidth_gbps,
    cells,
    dated,
    failure_text,
    fmt_ms,
    fmt_ratio,
    fmt_spread,
    gathered_gbps,
    host_columns,
    is_ours,
    knob_text,
    means,
    newest,
    note_text,
    older_text,
    op_id,
    pictures,
    rate_tflops,
    roof_of,
    same_code,
    shape_text,
    share_of_roof,
    speed_up,
    table,
)
from rows import Row, failures, with_numbers
from step_report import sections
from verdicts import prediction_table, predictions, target_table

NOT_MEASURED = "not measured"
BUSY_CORES = 0.15  # other processes' load above which a report says so


def summary(rows: Iterable[Row]) -> str:
    """What the terminal shows: ours beside its roof, the baseline and everything else; verdicts; then the errors."""
    rows = with_numbers(rows)
    lines = []
    last = newest(rows) if rows else {}
    for cell in cells(rows):
        if cell.ours and cell.baseline:
            size = cell.case if cell.case.endswith(cell.dtype) else f"{cell.case}, {cell.dtype}"
            size += f", k={cell.shape['k']}" if "k" in cell.shape else ""
            ours = cell.ours["ms_p50"]
            share = share_of_roof(cell.ours, rows)
            beside = (f"{fmt_ratio(r['ms_p50'] / ours)} {dated(r['provider'], [r], last)}" for r in cell.others)
            base = dated(cell.baseline["provider"], [cell.baseline], last)
            lines.append([
                dated(cell.op_id, [cell.ours], last), size, fmt_ms(ours),
                f"{100 * share[1]:.0f} % {share[0]}" if share else "",
                fmt_ratio(speed_up(cell.ours, cell)), f"{base}, {fmt_ms(cell.baseline['ms_p50'])}",
                ", ".join(beside),
            ])  # fmt: skip
    parts = []
    if lines:
        header = ("operation", "size", "ours", "of roof", "speed-up", "over the baseline", "over others")
        versions = dict.fromkeys(f"torch {row['torch']}" for row in rows if row["kind"] == "operation")
        parts.append(f"Beside {', '.join(versions)}:\n\n{table(header, lines, left=2)}")
    parts += [target_table(rows, device) for device in _gpus(rows)]
    parts += [_reconstruction_table(found, last) for found in by_setting(rows, "reconstruction").values()]
    return "\n\n".join(parts)


def markdown(
    rows: Iterable[Row], figures: Sequence[Path], skipped: Sequence[str] = (), predicted: Iterable[dict] = ()
) -> str:
    """The whole report. ``figures`` lie beside it; ``skipped`` are lines about what has no numbers and no row;
    ``predicted`` are rows of ``predict.py``."""
    rows = list(rows)
    absent = [*map(failure_text, failures(rows)), *skipped]
    rows = with_numbers(rows)
    operations = [row for row in rows if row["kind"] == "operation"]
    parts = ["# Benchmarks", machine(rows)]
    if operations:
        for device in _gpus(operations):
            parts += [f"## Targets, {device}", TARGETS_TEXT, target_table(rows, device)]
        parts += ["## Operations", _legend(rows)]
        parts += [pictures(figures, prefix) for prefix in ("roofline", "operations", "sweep")]
        groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
        for cell in cells(rows):
            groups[cell.case, cell.dtype].append(cell)
        for (case, dtype), found in groups.items():
            widest = max((cell.shape for cell in found), key=len)
            made_by = ", ".join(dict.fromkeys(f"torch {row['torch']}" for cell in found for row in cell.rows))
            parts += [f"### {case}, {dtype}, {made_by}: {shape_text(widest)}", _operations_table(found, rows)]
            slower = reasons.remarks(found)
            parts += ["Slower than other code:\n\n" + "\n".join(f"- {line}" for line in slower)] if slower else []
        if not any(row["cuda"] for row in operations):
            parts.append(f"On a GPU (S1, S2, S3 in bf16 and fp32; sweeps over F and k): {NOT_MEASURED}.")
    compared = predictions(rows, predicted)
    if compared:
        parts += ["## Predictions", PREDICTIONS_TEXT, prediction_table(compared)]
    parts += sections(rows, figures)
    trained = by_setting(rows, "reconstruction")
    if trained:
        parts += ["## Reconstruction", pictures(figures, "reconstruction")]
        for found in trained.values():
            parts += [setting_text(found), _reconstruction_table(found, newest(rows)), _agreement(found)]
            slower = [] if found[0]["cuda"] else reasons.training_remarks(means(found))
            parts += ["Slower than dense:\n\n" + "\n".join(f"- {line}" for line in slower)] if slower else []
    if absent:
        parts += ["## Without numbers", "\n".join(f"- {line}" for line in absent)]
    return "\n\n".join(filter(None, parts)) + "\n"


TARGETS_TEXT = (
    "Against the roofs and yardsticks of the same card and run: one read of the matrix at the copy bandwidth, one pass "
    "of group maxima, the bare cuBLAS product, gathers of random rows out of the L2 cache. Where a row is missing, the "
    "target is not measured."
)
PREDICTIONS_TEXT = (
    "Predicted by `benchmarks/predict.py` from binaries compiled without a GPU, before anything was measured. "
    "Confirmed: within a factor of 1.5, either way. What is refuted is to be explained: the model or the kernel."
)


def _gpus(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["device"] for row in rows if row["kind"] == "operation" and row["cuda"]))


def machine(rows: Sequence[Row]) -> str:
    if not rows:
        return "Nothing has been measured."
    lines = []
    for row in rows:
        commit = "not committed" if row["commit"] is None else row["commit"][:12]
        commit += " with uncommitted changes" if row["dirty"] else ""
        versions = [f"Python {row['python']}", f"torch {row['torch']}", f"triton {row['triton'] or 'not installed'}"]
        versions += [f"CUDA {row['cuda']}, driver {row['driver']}"] if row["cuda"] else []
        line = f"{row['device']}; {', '.join(versions)}; commit {commit}"
        if line not in lines:
            lines.append(line)
    dates = sorted(row["utc"] for row in rows)
    lines.append(f"measured {dates[0]} to {dates[-1]}")
    loads = [row["other_load"] for row in rows if row.get("other_load") is not None]
    if loads:
        lines.append(
            f"other processes kept {mean(loads):.1f} CPU cores busy on average, {max(loads):.1f} at most"
            + (": **the machine was not quiet, times are too long**" if mean(loads) > BUSY_CORES else "")
        )
    if len({(row["commit"], row["dirty"], row["torch"]) for row in rows}) > 1:
        lines.append("where a line is of another commit or torch than the last, it says so: ratios to it compare both")
    return "\n".join(f"- {line}" for line in lines)


def _legend(rows: Sequence[Row]) -> str:
    text = [
        "Median milliseconds of one call (20th–80th percentile). Every result was compared with the reference "
        "at this very size, just before it was timed. GB/s counts the unavoidable bytes: each input once, each output "
        "once. The baseline is stock PyTorch with the same kind of result, at its best setting."
    ]
    for device in dict.fromkeys(row["device"] for row in rows):
        copy = roof_of(rows, device, "copy")
        if copy:
            rates = [f"copy {bandwidth_gbps(copy):.1f} GB/s"]
            memset, gather = roof_of(rows, device, "memset"), roof_of(rows, device, "gather")
            rates += [f"memset {bandwidth_gbps(memset):.1f} GB/s"] if memset else []
            for dtype in ("float32", "bfloat16", "float16"):
                gemm = roof_of(rows, device, "gemm", dtype)
                rates += [f"{dtype} GEMM {rate_tflops(gemm):.3g} TFLOP/s"] if gemm else []
            rates += [f"rows gathered from L2 {bandwidth_gbps(gather):.1f} GB/s"] if gather else []
            text.append(f"Measured roof of {device}: {', '.join(rates)}.")
    return "\n\n".join(text)


def _operations_table(found: Sequence[Cell], rows: Sequence[Row]) -> str:
    last = newest(rows)
    on_gpu = any(row["peak_mem_bytes"] is not None for cell in found for row in cell.rows)
    gathers = {row["device"]: gather for row in rows if (gather := roof_of(rows, row["device"], "gather"))}
    header = ["operation", "provider", "ms", "speed-up", "GB/s", "% of copy", "% of GEMM"]
    header += [*(["% of gather"] if gathers else []), *(["peak MB", *HOST_HEADER] if on_gpu else [])]
    lines = []
    for cell in found:
        for row in cell.rows:
            copy = roof_of(rows, row["device"], "copy")
            gemm = roof_of(rows, row["device"], "gemm", row["dtype"])
            provider = f"**{row['provider']}**" if is_ours(row) else row["provider"]
            kind = ["baseline"] if row is cell.baseline else ["yardstick"] if row.get("yardstick") else []
            versions = [f"{name} {version}" for name, version in row.get("packages", {}).items()]
            remarks = [*kind, *versions, note_text(row, last)]
            provider += f" ({said})" if (said := ", ".join(filter(None, remarks))) else ""
            first = row is cell.rows[0]
            line = [
                cell.op_id if first else "", provider, fmt_spread(row),
                "" if row.get("yardstick") else fmt_ratio(speed_up(row, cell)), f"{bandwidth_gbps(row):.3g}",
                f"{100 * bandwidth_gbps(row) / bandwidth_gbps(copy):.0f}" if copy else "",
                f"{100 * rate_tflops(row) / rate_tflops(gemm):.0f}" if gemm and row["flops"] else "",
            ]  # fmt: skip
            if gathers:
                gather = gathers.get(row["device"]) if BOUND_BY.get(op_id(row)) == "gather" else None
                line.append(f"{100 * gathered_gbps(row) / bandwidth_gbps(gather):.0f}" if gather else "")
            if on_gpu:
                line.append("" if row["peak_mem_bytes"] is None else f"{row['peak_mem_bytes'] / 1e6:.0f}")
                line += host_columns(row)
            lines.append(line)
    return table(header, lines, left=2)


def by_setting(rows: Iterable[Row], kind: str) -> dict[tuple, list[Row]]:
    """Rows of autoencoders trained on activations, by what all runs of one table share."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    shared = ("sha256", "layer", "site", "space", "d_sae", "train_tokens", "eval_tokens", "batch_tokens", "device")
    for row in rows:
        if row["kind"] == kind:
            groups[tuple(row[name] for name in shared)].append(row)
    return groups


def setting_text(found: Sequence[Row]) -> str:
    first = found[0]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in found})))
    methods = dict.fromkeys((row["rule"], row["method"]) for row in found)
    by_method: dict[str, list[str]] = defaultdict(list)
    for rule, text in methods:
        by_method[text].append(rule)
    revision = f", revision {first['revision']}" if first["revision"] else ""
    facts = [
        f"model: {first['model']}{revision}, sha256 of the weights `{first['sha256']}`",
        f"activations: layer {first['layer']}, {first['site']}, d = {first['d']}; each context's first position "
        f"{first['first_positions']}",
        f"space: {first['space']}; all errors are in it",
        f"autoencoder: {first['d_sae']} latents; {first['train_tokens']:,} training tokens, {first['steps']} steps of "
        f"{first['batch_tokens']}",
        f"training text: {first['text']}",
        f"held-out text: sae_engine.data.evaluation_text(), {first['eval_tokens']:,} tokens",
        f"seeds: {seeds}; float32, torch {', '.join(sorted({row['torch'] for row in found}))}",
        *(f"{', '.join(rules)}: {text}" for text, rules in by_method.items()),
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def _reconstruction_table(found: Sequence[Row], last: Row) -> str:
    header = ("rule", "setting", "trained by", "MSE", "MSE of each seed", "FVU", "L0", "dead", "tokens/s")
    seeds: dict[tuple, list[Row]] = defaultdict(list)
    for row in found:
        seeds[row["rule"], row["knob"], row["provider"]].append(row)
    lines = []
    for m in means(found):
        each = sorted(seeds[m["rule"], m["knob"], m["provider"]], key=lambda row: row["seed"])
        rule = "BatchTopK = mutual choice" if m["rule"] == "BatchTopK" else m["rule"]
        old = [row for row in each if not same_code(row, last)]
        mark = "† " * (len(old) < len(each))  # only some of the seeds are older
        by = f"{m['provider']} ({mark}{older_text(old, last)})" if old else m["provider"]
        errors = (f"{row['mse']:.4f}{mark.strip() * (row in old)}" for row in each)
        lines.append([
            rule, knob_text(m), by, f"{m['mse']:.4f}", " ".join(errors),
            f"{m['fvu']:.4f}", f"{m['l0']:.1f}", f"{100 * m['dead_fraction']:.1f} %", f"{m['tokens_per_second']:,.0f}",
        ])  # fmt: skip
    return table(header, lines, left=3)


def _agreement(found: Sequence[Row]) -> str:
    """Ours against the control, seed by seed, beside what another seed changes."""
    pairs = []
    for row in found:
        control = next(
            (r for r in found if r["provider"] != row["provider"] and row["provider"] == "sae_engine"
             and (r["rule"], r["knob"], r["seed"]) == (row["rule"], row["knob"], row["seed"])), None,
        )  # fmt: skip
        if control:
            pairs.append((row, control))
    if not pairs:
        return "No dense control has been trained at this setting."
    lines = []
    for rule, knob in dict.fromkeys((a["rule"], a["knob"]) for a, _ in pairs):
        mine = [(a, b) for a, b in pairs if (a["rule"], a["knob"]) == (rule, knob)]
        gap = max(abs(a["mse"] - b["mse"]) / b["mse"] for a, b in mine)
        errors = [b["mse"] for _, b in mine]
        spread = (max(errors) - min(errors)) / max(errors)
        between = f"two seeds differ by {100 * spread:.2f} %" if len(errors) > 1 else "one seed"
        lines.append(
            f"- {rule}, {knob_text(mine[0][0])}: at most {100 * gap:.3f} % apart from dense PyTorch on the same seed; "
            f"{between}"
        )
    return "Agreement with the dense control (held-out MSE, same initial weights, same batches):\n\n" + "\n".join(lines)
