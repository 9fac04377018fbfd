"""Run folders as the trainer writes them, of numbers that are made up: for tests of what reads them."""

import json
import math
from pathlib import Path

LINES = 60
BATCH = 4096


def entry(k, *, layer=2, d_sae=2048, **fields):
    name = f"blocks.{layer}.hook_resid_pre-topk-k{k}" + ("" if d_sae == 2048 else f"-d{d_sae}")
    return {"name": name, "hook_name": f"blocks.{layer}.hook_resid_pre", "architecture": "topk", "k": k, "d_sae": d_sae,
            "normalize_activations": "expected_average_only_in", "aux_k": 128, "seed": None, **fields}  # fmt: skip


def config(saes, *, name="run", tokens=60 * BATCH, **data):
    return {
        "model": {"model_name": "embedded", "dtype": None, "model_from_pretrained_kwargs": {}},
        "data": {"dataset_path": "stdlib", "split": "train", "context_size": 128, "training_tokens": tokens, **data},
        "saes": saes, "sweep": {},
        "optim": {"lr": 4e-4, "train_batch_size_tokens": BATCH, "gradient_accumulation_steps": 1},
        "logger": {"report_to": [], "run_name": None}, "output": {"output_path": f"runs/{name}"}, "seed": 0,
    }  # fmt: skip


def lines(saes, *, count=LINES, every=6, timed=True):
    """Losses that fall, an evaluation at every so-many-th line, times."""
    found = []
    for step in range(1, count + 1):
        line = {"step": step, "tokens": step * BATCH, "time": f"2026-01-31T12:00:{step % 60:02d}+00:00"}
        for n, sae in enumerate(saes):
            before = "" if len(saes) == 1 else f"{sae['name']}/"
            k = sae.get("k", 32)
            fvu = 0.9 / math.sqrt(k) + 1.6 * math.exp(-step / 12) + 0.004 * math.sin(step + n)
            line |= {
                f"{before}losses/overall_loss": 300 * fvu + 2, f"{before}losses/mse_loss": 300 * fvu,
                f"{before}losses/auxiliary_reconstruction_loss": 2.0 * math.exp(-step / 30),
                f"{before}metrics/explained_variance": 1 - fvu, f"{before}metrics/l0": float(k),
                f"{before}sparsity/dead_features": max(0, 200 - 3 * step) // (n + 1),
                f"{before}details/current_learning_rate": 4e-4 * min(1, step / 5, (count - step) / (0.2 * count)),
            }  # fmt: skip
            if every and step % every == 0:
                line |= {
                    f"{before}evaluation/fvu": fvu * 1.03, f"{before}evaluation/l0": float(k),
                    f"{before}evaluation/dead": 0.02 / (n + 1), f"{before}evaluation/ce_clean": 3.1,
                    f"{before}evaluation/ce_spliced": 3.1 + fvu, f"{before}evaluation/ce_ablated": 9.4,
                    f"{before}evaluation/ce_recovered": 1 - fvu / 6.3,
                }  # fmt: skip
        if timed:
            line |= {
                "performance/tokens_per_second": 5200 + 400 * math.sin(step), "performance/starved": 0.04,
                "performance/seconds/language_model": 0.21, "performance/seconds/step": 0.55,
                "performance/seconds/shuffle": 0.012, "performance/seconds/evaluation": 0.3 if step % 6 == 0 else 0.0,
                "data/tokens": step * 4400, "data/rows": step * 4200, "data/norm": 3 * step,
            }  # fmt: skip
        found.append(line)
    return found


def write_run(folder, saes, *, made=None, **options) -> Path:
    """A run folder. JSON is YAML, so that no package is needed to write it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = config(saes, name=folder.name) if made is None else made
    (folder / "config.yaml").write_text(json.dumps(found), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines(saes, **options))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder
