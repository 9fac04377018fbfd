"""The registry under pytest-benchmark, at the small CPU size:

    pytest benchmarks/bench_operations.py --benchmark-only

Each result is compared with the reference before it is timed. ``benchmarks/run.py`` makes the committed numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
from registry import OPS, Op, Provider, check_provider
from sizes import SMALL

CPU = torch.device("cpu")
CASES = [
    pytest.param(op, provider, id=f"{op.id}-{provider.name.replace(' ', '_')}")
    for op in OPS
    for provider in op.providers
    if provider.missing(CPU) is None and not provider.compiled
]


@pytest.mark.parametrize(("op", "provider"), CASES)
def test_operation(benchmark, op: Op, provider: Provider):
    benchmark.group = op.id
    with torch.no_grad():
        inputs = op.make_inputs(SMALL, torch.float32, CPU, 0)
        call = check_provider(op, provider, inputs)
        benchmark.extra_info.update(SMALL.shape(op.sizes), bytes=op.traffic(inputs).bytes)
        benchmark.pedantic(call, warmup_rounds=1, rounds=10)
