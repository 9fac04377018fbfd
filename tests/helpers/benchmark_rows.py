"""Rows as a run of the benchmarks leaves them, made up."""


def operation_row(**changes):
    row = {
        "kind": "operation", "op": "topk", "mode": "forward", "case": "main", "group": "main",
        "shape": {"B": 2048, "F": 16384, "k": 32}, "dtype": "float32", "provider": "ours", "baseline": False,
        "note": "", "seed": 0, "method": "clock", "device": "test device", "driver": None, "cuda": None, "torch": "2",
        "triton": "3", "python": "3.11", "commit": "a" * 40, "dirty": False, "ms_p50": 2.0, "ms_p20": 1.9,
        "ms_p80": 2.1, "samples": 9, "bytes": 10**8, "flops": 0, "peak_mem_bytes": None,
        "utc": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return row | changes


def reconstruction_row(**changes):
    row = {
        "kind": "reconstruction", "rule": "TopK", "knob_name": "k", "knob": 16, "provider": "sae_engine", "seed": 0,
        "model": "toy", "revision": None, "sha256": "0" * 64, "d": 8, "layer": 1, "site": "resid_pre", "space": "raw",
        "first_positions": "dropped", "text": "none", "train_tokens": 100, "eval_tokens": 50, "d_sae": 32,
        "batch_tokens": 10, "steps": 10, "method": "Adam", "device": "test device", "driver": None, "cuda": None,
        "torch": "2", "triton": "3", "python": "3.11", "commit": None, "dirty": None, "mse": 0.2, "mse_train": 0.2,
        "fvu": 0.3, "l0": 16.0, "dead_fraction": 0.0, "tokens_per_second": 1e4, "seconds": 1.0,
        "utc": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return row | changes
