"""What this machine can do, as rows of their own: copy, memset, GEMM in each dtype, and on a GPU gathers out of its L2.

Shares of a roof are shares of these, measured on the same card in the same run, never of a data sheet.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from progress import announce
from rows import Row, environment, now_utc
from timing import OtherLoad, Timing, method, time_interleaved

from sae_kernels.stock import linear as stock_linear

SEED = 0
STREAM_ELEMENTS = {"cuda": 1 << 30, "cpu": 1 << 26}
GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
Timed = tuple[Timing, float | None]  # and the load of other processes
# Gathers: rows as wide as 768 16-bit numbers of a table that every L2 since sm_80 holds with room to spare.
TABLE_ROWS, ROW_BYTES, SUMS, ROWS_OF_A_SUM = 8192, 1536, 4096, 32
GATHER_CONFIGURATIONS = tuple(itertools.product((4, 8, 16), (1, 2, 4)))  # rows in flight, warps


def roof(device: torch.device, budget_seconds: float) -> list[Row]:
    """Rows of kind "roof"."""
    with torch.no_grad():
        return list(_roofs(device, budget_seconds))


def _roofs(device: torch.device, seconds: float) -> Iterator[Row]:
    yield from _streams(device, seconds)
    yield from _gemms(device, seconds)
    if device.type == "cuda":
        yield _gather(device, seconds)


def _streams(device: torch.device, seconds: float) -> Iterator[Row]:
    elements = STREAM_ELEMENTS[device.type]
    source = torch.zeros(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    copy = functools.partial(target.copy_, source)
    for op, moved, call in (("copy", 2 * size, copy), ("memset", size, target.zero_)):
        (timed,) = _timed([call], device, seconds)
        yield _row(device, op, "float32", {"elements": elements}, timed, moved=moved)


def _gemms(device: torch.device, seconds: float) -> Iterator[Row]:
    on_gpu = device.type == "cuda"
    side = GEMM_SIDE[device.type]
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if on_gpu else [])):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products = [functools.partial(multiply, a, b) for multiply in (torch.matmul, stock_linear.linear)]
        timed = min(_timed(products[: 1 if on_gpu else 2], device, seconds), key=lambda timed: timed[0].ms_p50)
        yield _row(device, "gemm", str(dtype).removeprefix("torch."), {"side": side}, timed,
                   moved=3 * side * side * a.element_size(), flops=2 * side**3)  # fmt: skip


def _gather(device: torch.device, seconds: float) -> Row:
    calls = gathers(device)
    fastest = min(_timed(list(calls.values()), device, seconds), key=lambda timed: timed[0].ms_p50)
    shape = {"table_rows": TABLE_ROWS, "row_bytes": ROW_BYTES, "sums": SUMS, "rows_of_a_sum": ROWS_OF_A_SUM}
    return _row(device, "gather", "int32", shape, fastest, moved=SUMS * ROWS_OF_A_SUM * ROW_BYTES, provider="Triton",
                note=f"the fastest of {len(calls)} configurations")  # fmt: skip


def gathers(
    device: torch.device, table_rows: int = TABLE_ROWS, words: int = ROW_BYTES // 4, sums: int = SUMS,
    rows_of_a_sum: int = ROWS_OF_A_SUM, configurations: tuple[tuple[int, int], ...] = GATHER_CONFIGURATIONS,
) -> dict[tuple[int, int], Callable[[], torch.Tensor]]:  # fmt: skip
    """By rows in flight and warps: a call that sums random rows of a table, in int32, which costs one addition a word.

    What a decoder's gather does, less everything that is not the gather.
    """
    from gather import gather_sums  # device code: needs Triton

    generator = torch.Generator(device).manual_seed(SEED)
    table = torch.randint(-100, 100, (table_rows, words), dtype=torch.int32, device=device, generator=generator)
    chosen = torch.randint(table_rows, (sums, rows_of_a_sum), dtype=torch.int32, device=device, generator=generator)
    return {config: functools.partial(gather_sums, table, chosen, *config) for config in configurations}


def _timed(calls: list[Callable[[], object]], device: torch.device, seconds: float) -> list[Timed]:
    announce("this machine's own rates")
    others = OtherLoad()
    timings = time_interleaved([[call] for call in calls], device, budget_seconds=seconds)
    load = others.cores()
    return [(timing, load) for timing in timings]


def _row(
    device: torch.device, op: str, dtype: str, shape: dict[str, int], timed: Timed, *,
    moved: int, flops: int = 0, provider: str = "torch", note: str = "",
) -> Row:  # fmt: skip
    timing, other_load = timed
    return {
        "kind": "roof", "op": op, "mode": "forward", "case": "roof", "group": "roof", "shape": shape, "dtype": dtype,
        "provider": provider, "baseline": True, "note": note, "seed": SEED, "method": method(device),
        **environment(device), **timing.fields(), "bytes": moved, "flops": flops, "peak_mem_bytes": None,
        "other_load": other_load, "utc": now_utc(),
    }  # fmt: skip
