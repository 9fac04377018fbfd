"""What ``sae-engine eval`` shows and writes of :func:`evaluate`'s results: a table, JSON, Markdown and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from .._files import replace_files

Result = dict[str, Any]

# Section, key, what the table calls it, how it is written.
LINES: tuple[tuple[str, str, str, str], ...] = (
    ("reconstruction", "mse", "MSE per element", ".5g"),
    ("reconstruction", "nmse", "NMSE (by squared norm)", ".4f"),
    ("reconstruction", "fvu", "FVU", ".4f"),
    ("reconstruction", "fvu_by_site", "  FVU, site by site", ".4f"),
    ("reconstruction", "explained_variance", "explained variance, 1 - FVU", ".4f"),
    ("reconstruction", "explained_variance_centred", "explained variance, error centred", ".4f"),
    ("reconstruction", "explained_variance_per_token", "explained variance, mean of tokens", ".4f"),
    ("reconstruction", "cosine", "cosine", ".4f"),
    ("reconstruction", "l2_ratio", "norm of output over input", ".4f"),
    ("sparsity", "l0", "L0", ".2f"),
    ("sparsity", "l0_by_source", "  L0, source by source", ".2f"),
    ("sparsity", "l0_quantiles", "L0, quantiles 5 25 50 75 95 %", "g"),
    ("sparsity", "dead_fraction", "dead latents", ".2%"),
    ("sparsity", "dense_fraction", "dense latents", ".2%"),
    ("decoder", "max_cosine_mean", "nearest decoder cosine, mean", ".4f"),
    ("decoder", "max_cosine_quantiles", "nearest decoder cosine, quantiles", ".3f"),
    ("decoder", "cross_layer_share", "squared decoder norms in later layers", ".2%"),
    ("decoder", "cross_layer_by_source", "  source by source", ".2%"),
    ("decoder", "relative_norm_quantiles", "decoder norms, 0 first model, 1 second; quantiles", ".3f"),
    ("norms", "epsilon_lbo", "epsilon-LBO", ".4g"),
    ("norms", "norm_ratio_quantiles", "norm of code over input, quantiles", ".3f"),
    ("tail", "cett", "CETT", ".3f"),
    ("tail", "l0_kept", "  L0 left at that CETT", ".1f"),
    ("language", "ce_clean", "cross-entropy, clean", ".4f"),
    ("language", "ce_spliced", "cross-entropy, reconstruction", ".4f"),
    ("language", "ce_ablated", "cross-entropy, zeros", ".4f"),
    ("language", "loss_recovered", "loss recovered", ".4f"),
    ("language", "kl_spliced", "KL, reconstruction", ".4f"),
    ("language", "kl_ablated", "KL, zeros", ".4f"),
    ("ppl_sparsity", "rise", "perplexity may rise by", ".2%"),
    ("ppl_sparsity", "l0_kept", "  L0 left at that rise", ".1f"),
    ("ppl_sparsity", "off", "  latents off at that rise", ".3%"),
)
COLOURS = ("#0f6fb4", "#c8501e", "#2f8a4c", "#7d4bb0", "#b0892a", "#5b6470")
INK, FAINT = "#22262b", "#d9dde2"


def table(results: dict[str, Result]) -> str:
    """One column a result, named by its key; Markdown that reads in a terminal too."""
    lines = [["", *results]]
    for section, key, name, form in LINES:
        values = [(result.get(section) or {}).get(key) for result in results.values()]
        if any(value is not None for value in values):
            lines.append([name, *("-" if value is None else _written(value, form) for value in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(fields: Sequence[str]) -> str:
        pairs = enumerate(zip(fields, widths, strict=True))
        return "| " + " | ".join(f.rjust(w) if i else f.ljust(w) for i, (f, w) in pairs) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([padded(lines[0]), rule, *map(padded, lines[1:])])


def _written(value: Any, form: str) -> str:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(_written(part, form) for part in value)
    return format(value, form)


def setting_text(results: dict[str, Result]) -> str:
    """What the numbers were measured on: once where all results share it, else for each; then what each is."""
    lines = []
    for describe in (_model_text, _place_text, _text_text, _space_text):
        texts = {name: describe(result) for name, result in results.items()}
        shared = len(set(texts.values())) == 1
        lines += [next(iter(texts.values()))] if shared else [f"{name}: {text}" for name, text in texts.items()]
    lines += [f"{name}: {r['setting']['d_sae']} latents, {r['setting']['activation']}" for name, r in results.items()]
    if any(result["setting"]["first_positions"] == "dropped" for result in results.values()):
        lines.append("each context's first position stays as it is in every run, the one with zeros too")
    return "\n".join(f"- {line}" for line in lines)


def _model_text(result: Result) -> str:
    setting = result["setting"]
    revision = f", revision {setting['revision']}" if setting["revision"] else ""
    return f"model: {setting['model']}{revision}, sha256 of the weights `{setting['sha256']}`"


def _place_text(result: Result) -> str:
    setting = result["setting"]
    if "sites" in setting:
        written = f" to {' '.join(setting['target_sites'])}" if setting["target_sites"] else ""
        place = f"{' '.join(setting['sites'])}{written}, replaced with codes {setting['codes']}"
    else:
        place = f"layer {setting['layer']}, {setting['site']}"
    target = f" to layer {setting['target_layer']}, {setting['target_site']}" if "target_site" in setting else ""
    excluded = [*setting["exclude_tokens"], *(f"position {number}" for number in setting["exclude_positions"])]
    without = f"; without {', '.join(excluded)}" if excluded else ""
    return (
        f"activations: {place}{target}, d = {setting['d']}; contexts of "
        f"{setting['context_length']}, first positions {setting['first_positions']}; first token "
        f"{setting['first_token']}, separator {setting['separator']}{without}"
    )


def _space_text(result: Result) -> str:
    return f"space of the errors: {result['reconstruction']['space']}"


def _text_text(result: Result) -> str:
    return f"text: {result['setting']['text']}, {result['reconstruction']['tokens']:,} tokens"


def write(results: dict[str, Result], folder: Path, *, figures: bool) -> list[Path]:
    """Writes eval.json, eval.md and, with ``figures``, three PNGs: all of them whole, or none."""
    pictures = draw(results) if figures else {}
    parts = ["# Evaluation", setting_text(results), table(results), *(f"![{name}]({name}.png)" for name in pictures)]
    files: dict[str, bytes] = {
        "eval.json": (json.dumps(_plain(results), indent=1, allow_nan=False) + "\n").encode(),
        "eval.md": ("\n\n".join(parts) + "\n").encode(),
        **{f"{name}.png": picture for name, picture in pictures.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_files({folder / name: _writer(content) for name, content in files.items()})
    return [folder / name for name in files]


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _plain(value: Any) -> Any:
    """As JSON has it: what is no number is null."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------- figures


def draw(results: dict[str, Result]) -> dict[str, bytes]:
    """PNGs by name: ``density`` of the latents, ``frontier`` of error against L0, ``zf`` of code and input norms."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.axisbelow": True,
             "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT}  # fmt: skip
    drawn = {}
    with rc_context(style):
        for name, fill in (("density", _density), ("frontier", _frontier), ("zf", _zf)):
            figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
            fill(figure.add_subplot(), results)
            buffer = BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            drawn[name] = buffer.getvalue()
    return drawn


def _coloured(results: dict[str, Result]) -> list[tuple[str, Result, str]]:
    return [(name, r, COLOURS[i % len(COLOURS)]) for i, (name, r) in enumerate(results.items())]


def _density(axes: Any, results: dict[str, Result]) -> None:
    for name, result, colour in _coloured(results):
        sparsity = result["sparsity"]
        histogram = sparsity["density_histogram"]
        label = f"{name}: {sparsity['dead']} dead, {sparsity['dense']} dense of {sparsity['d_sae']}"
        axes.stairs(histogram["counts"], histogram["edges"], color=colour, linewidth=1.4, label=label)
    axes.set_xlabel("log10 of the share of tokens on which a latent fires")
    axes.set_ylabel("latents")
    axes.set_title("Firing density", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8)


def _frontier(axes: Any, results: dict[str, Result]) -> None:
    for name, result, colour in _coloured(results):
        axes.plot([result["sparsity"]["l0"]], [result["reconstruction"]["mse"]], "o", color=colour, label=name)
    axes.set_xlabel("L0")
    axes.set_ylabel("squared error per element")
    space = next(iter(results.values()))["reconstruction"]["space"]
    axes.set_title(f"Error against sparsity ({space.partition(':')[0]} space)", loc="left", fontweight="bold")
    axes.legend(frameon=False, fontsize=8)


def _zf(axes: Any, results: dict[str, Result]) -> None:
    low, high = math.inf, -math.inf
    bands: dict[Any, Any] = {}
    for name, result, colour in _coloured(results):
        if result.get("norms") is None:  # a transcoder
            continue
        bands = bands or result["norms"]["bands"]
        points = [point for point in result["norms"]["zf_points"] if all(map(math.isfinite, point))]
        if points:
            z, f = zip(*points, strict=True)
            axes.scatter(z, f, s=2, alpha=0.3, linewidths=0, color=colour, label=name)
            low, high = min(low, min(z)), max(high, max(z))
    if low <= high:
        ends = [0.98 * low, 1.02 * high]
        axes.plot(ends, ends, color=INK, linewidth=1.0, label="||f|| = ||z||")
        for (level, (below, above)), dash in zip(bands.items(), ("-", "--", ":"), strict=True):
            for place, ratio in enumerate((below, above)):
                if math.isfinite(ratio):
                    label = f"ε (F - 1) = {level:g}" if place == 0 else None
                    axes.plot(ends, [ratio * x for x in ends], color="#8a8f98", linewidth=0.9, linestyle=dash,
                              label=label)  # fmt: skip
    axes.set_xlabel("||z||, norm of the input")
    axes.set_ylabel("||f||, norm of the code")
    axes.set_title("ZF plot", loc="left", fontweight="bold")
    if low <= high:
        axes.legend(frameon=False, fontsize=8, markerscale=4)
