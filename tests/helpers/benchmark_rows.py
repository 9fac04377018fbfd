"""Rows as a run of the benchmarks leaves them, made up."""

MADE_UP = {
    "seed": 0, "device": "test device", "driver": None, "cuda": None, "torch": "2", "triton": "3", "python": "3.11",
    "commit": "a" * 40, "dirty": False, "utc": "2026-01-01T00:00:00Z",
}  # fmt: skip
# Of what is trained on activations.
ACTIVATIONS = {
    "model": "toy", "revision": None, "sha256": "0" * 64, "d": 8, "layer": 1, "site": "resid_pre", "space": "raw",
    "first_positions": "dropped", "text": "none", "train_tokens": 100, "eval_tokens": 50, "d_sae": 32,
    "batch_tokens": 10, "steps": 10,
}  # fmt: skip


def timed(ms):
    return {"ms_p50": ms, "ms_p20": 0.95 * ms, "ms_p80": 1.05 * ms, "samples": 9}


def operation_row(**changes):
    return {
        "kind": "operation", "op": "topk", "mode": "forward", "case": "main", "group": "main",
        "shape": {"B": 2048, "F": 16384, "k": 32}, "dtype": "float32", "provider": "ours", "baseline": False,
        "note": "", "method": "clock", **MADE_UP, **timed(2.0), "bytes": 10**8, "flops": 0, "peak_mem_bytes": None,
        **changes,
    }  # fmt: skip


def reconstruction_row(**changes):
    return {
        "kind": "reconstruction", "rule": "TopK", "knob_name": "k", "knob": 16, "provider": "sae_engine",
        **ACTIVATIONS, "method": "Adam", **MADE_UP, "commit": None, "dirty": None, "mse": 0.2, "mse_train": 0.2,
        "fvu": 0.3, "l0": 16.0, "dead_fraction": 0.0, "tokens_per_second": 1e4, "seconds": 1.0, **changes,
    }  # fmt: skip


def rule_row(**changes):
    return {
        "kind": "rule", "rule": "TopK", "k": 32, **ACTIVATIONS, "loss_tokens": 10, "method": "m", "recipe": "r",
        **MADE_UP, "mse": 0.1, "fvu": 0.2, "l0": float(changes.get("k", 32)), "dead_fraction": 0.0,
        "dense_fraction": 0.0, "loss_recovered": 0.9, "ce_clean": 1.0, "ce_spliced": 1.1, "ce_ablated": 2.0,
        "strength": None, "tokens_per_second": 1e4, "seconds": 1.0, "other_load": 0.0, **changes,
    }  # fmt: skip


def step_row(**changes):
    return {
        "kind": "step", "case": "main", "group": "main", "dtype": "float32", "method": "clock",
        "shape": {"B": 2, "d": 3, "F": 4, "k": 1, "indices": "uniform"}, "provider": "ours", "contestant": "ours",
        "baseline": False, "auxk": False, "note": "", **MADE_UP, "packages": {"sae-lens": "6"}, **timed(130.0),
        "peak_mem_bytes": None, "other_load": 0.0, **changes,
    }  # fmt: skip
