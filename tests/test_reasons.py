"""benchmarks/reasons.py: no cell in which ours is slower goes without a word."""

import reasons
from derived import Cell
from registry import OPS


def cell(op_id, dtype, ours, **others):
    made_by = {"commit": "a", "dirty": False, "torch": "2"}
    rows = [{"provider": provider, "ms_p50": ms, **made_by} for provider, ms in {"ours": ours, **others}.items()]
    return Cell(op_id, "small", "small", {}, dtype, rows)


def test_a_slower_cell_has_its_reason_and_a_faster_one_none():
    (line,) = reasons.remarks([cell("decode", "float32", 2.0, bags=1.0), cell("decode", "float32", 1.0, bags=0.96)])
    assert line.startswith("decode: 0.50× the speed of bags; checks of the arguments")
    (line,) = reasons.remarks([cell("decode", "bfloat16", 2.0, bags=1.0, other=3.0)])
    assert "rounds once" in line
    (line,) = reasons.remarks([cell("batch_topk", "float32", 2.0, flat=1.0)])
    assert "no reason is known" in line


def test_a_yardstick_is_no_contestant():
    slow = cell("encode", "float32", 2.0)
    slow.rows.append({"provider": "GEMM alone", "ms_p50": 1.0, "yardstick": True})
    assert reasons.remarks([slow]) == []


def test_a_rule_that_trains_slower_has_its_reason():
    def mean(rule, is_ours, speed):
        return {"rule": rule, "knob_name": "k", "knob": 8, "is_ours": is_ours, "tokens_per_second": speed}

    (line,) = reasons.training_remarks([mean("top-AFA", True, 7.0), mean("top-AFA", False, 10.0)])
    assert line.startswith("top-AFA, k = 8: 0.70× the tokens/s of dense PyTorch; with its authors' initial weights")
    (line,) = reasons.training_remarks([mean("TopK", True, 7.0), mean("TopK", False, 10.0)])
    assert "no reason is known" in line
    assert reasons.training_remarks([mean("TopK", True, 9.6), mean("TopK", False, 10.0), mean("ReLU", True, 1.0)]) == []


def test_reasons_belong_to_operations():
    assert {op_id for op_id, _ in reasons.REASONS} <= {op.id for op in OPS}
