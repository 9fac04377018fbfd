"""What the benchmarks make of rows from a GPU, with made-up rows: shares of roofs, targets, predictions, figures; and
the parts that only a GPU times, run small in Triton's interpreter."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import checks
import derived
import guarded
import inputs
import jobs
import operations
import ours
import predict
import pytest
import registry
import report
import roofs
import rows
import run
import sizes
import timing
import torch
import verdicts
from benchmark_rows import operation_row, timed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICE = "NVIDIA H200"  # made up: nothing here was measured
S1, S2 = ({"B": 4096, "d": 768, "F": F, "k": 32} for F in (32768, 131072))
READ_MS = 4096 * 32768 * 2 / 4e12 * 1e3  # one read of S1 in bf16 at the copy rate below


def row(op, case, ms, provider="ours", **changes):
    sizes_ = registry.find(op).sizes if op in {o.id for o in registry.OPS} else "BF"
    shape = {k: v for k, v in (S2 if case == "S2" else S1).items() if k in sizes_}
    op, _, mode = op.partition("-")
    made = dict(op=op, mode=mode or "forward", case=case, group=case, shape=shape, provider=provider)
    gpu = dict(dtype="bfloat16", device=DEVICE, driver="1", cuda="13", bytes=1, peak_mem_bytes=10**6)
    return operation_row(**{**made, **gpu, **timed(ms), **changes})


def roof_rows():
    """4 TB/s copied, 5 TB/s gathered, 800 TFLOP/s in bf16."""
    about = dict(kind="roof", group="roof", shape={}, baseline=True, peak_mem_bytes=None)
    return [
        row("copy", "roof", 1.0, "torch", bytes=4 * 10**9, dtype="float32", **about),
        row("memset", "roof", 1.0, "torch", bytes=3 * 10**9, dtype="float32", **about),
        row("gemm", "roof", 1.0, "torch", flops=800 * 10**9, **about),
        row("gather", "roof", 1.0, "Triton", bytes=5 * 10**9, dtype="int32", **about),
    ]


def gpu_rows(good=True):
    """Every target just met, or just missed."""
    near = 0.99 if good else 1.01
    gathered = 4096 * 32 * 768 * 2
    made = [
        row("topk", "S2", 1.0 * near, bytes=int(0.85 * 4e9)),
        row("topk", "S2", 4.0, "torch.topk", baseline=True),
        row("topk", "S2", 2.0, "FlashInfer top_k"),
        row("batch_topk", "S1", 0.07 + 0.080 * near),
        row("batch_topk", "S1", 0.07, verdicts.GROUP_MAXIMA, yardstick=True),
        row("norm_match", "S1", 99.0),
        row("norm_match", "S1", 2.5 * READ_MS * near, "ours, capacity"),
        row("encode", "S1", 1.12 * 0.26 * near),
        row("encode", "S1", 0.26, verdicts.GEMM_ALONE, yardstick=True),
        row("decode", "S1", gathered / (0.7 * 5e12) * 1e3 * near),
    ]
    return roof_rows() + made


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("good", "verdict"), [(True, verdicts.MET), (False, verdicts.MISSED)])
def test_targets_are_met_to_the_limit_and_missed_beyond(good, verdict):
    judged = verdicts.targets(gpu_rows(good), DEVICE)
    assert [found for _, _, found in judged] == [verdict] * 5
    for target, value, _ in judged:  # within the 1 % by which the rows are off the limit (2 for 1 / 0.99)
        assert value == pytest.approx(target.limit, rel=0.011)


@pytest.mark.parametrize("lacking", range(4))
def test_a_target_without_its_rows_is_not_measured(lacking):
    without = [
        lambda r: r["op"] == "copy",  # the roof
        lambda r: r.get("yardstick"),
        lambda r: r["provider"].startswith("ours"),
        lambda r: r["op"] == "gather",
    ][lacking]
    judged = verdicts.targets([r for r in gpu_rows() if not without(r)], DEVICE)
    missing = [{0, 2}, {1, 3}, set(range(5)), {4}][lacking]
    for number, (_, value, verdict) in enumerate(judged):
        assert (verdict == verdicts.NOT_MEASURED) == (value is None) == (number in missing)


def test_targets_of_another_dtype_size_or_device_do_not_count():
    other = [r | {"dtype": "float32"} if r["kind"] == "operation" else r for r in gpu_rows()]
    assert {verdict for _, _, verdict in verdicts.targets(other, DEVICE)} == {verdicts.NOT_MEASURED}
    assert {verdict for _, _, verdict in verdicts.targets(gpu_rows(), "another GPU")} == {verdicts.NOT_MEASURED}


def test_an_older_commit_judges_nothing():
    old = {"commit": "b" * 40, "utc": "2025-01-01T00:00:00Z"}
    mixed = [r | (old if r["kind"] == "operation" else {}) for r in gpu_rows()]
    assert {verdict for _, _, verdict in verdicts.targets(mixed, DEVICE)} == {verdicts.NOT_MEASURED}
    made = [row("topk", "S1", 0.1, **old), row("topk", "S2", 0.1)]
    predicted = [prediction("topk", 100.0), prediction("topk", 100.0, shape="S2")]
    assert [line[1] for line in verdicts.predictions(made, predicted)] == ["S2, bfloat16"]


def test_every_target_is_measured_by_the_registry():
    """The rows that targets are computed from are those that a run on a GPU writes."""
    for target in verdicts.TARGETS:
        op = registry.find(target.op_id)
        assert (target.case, torch.bfloat16) in [(case.name, dtype) for case, dtype in sizes.cases(op, GPU)]
    yardsticks = {p.name for op in registry.OPS for p in op.providers if p.yardstick}
    assert yardsticks == {verdicts.GROUP_MAXIMA, verdicts.GEMM_ALONE}
    assert "ours, capacity" in {p.name for p in registry.find("norm_match").providers}


# --- shares and the report -----------------------------------------------------------------------------------------


def test_shares_are_of_the_roof_that_binds():
    made = roof_rows()
    gathered = 4096 * 32 * 768 * 2
    cases = [
        (row("topk", "S1", 2.0, bytes=4 * 10**9), ("copy", 0.5)),
        (row("encode", "S1", 4.0, flops=800 * 10**9), ("gemm", 0.25)),
        (row("decode", "S1", gathered / 5e9 * 2), ("gather", 0.5)),
        (row("decode-backward_weight", "S1", gathered / 5e9 * 4), ("gather", 0.25)),
    ]
    for measured, (bound, share) in cases:
        found = derived.share_of_roof(measured, made)
        assert found[0] == bound and found[1] == pytest.approx(share)
    assert derived.share_of_roof(row("encode", "S1", 1.0, dtype="float32"), made) is None
    assert derived.share_of_roof(row("topk", "S1", 1.0, device="elsewhere"), made) is None


def test_the_summary_shows_roof_baseline_and_every_other():
    text = report.summary(gpu_rows())
    (line,) = [line for line in text.splitlines() if line.startswith("| topk")]
    for shown in ("86 % copy", "4.04×", "torch.topk, 4 ms", "2.02× FlashInfer top_k"):
        assert shown in line
    assert "| decode, of the L2 gather rate" in text and "met" in text


def test_the_report_has_verdicts_roofs_and_yardsticks():
    text = report.markdown(gpu_rows(good=False), [Path("roofline-bfloat16.png")])
    assert text.count("**missed**") == 5
    assert f"Targets, {DEVICE}" in text and "![roofline-bfloat16]" in text
    for roof in ("copy 4000.0 GB/s", "memset 3000.0", "bfloat16 GEMM 800 TFLOP/s", "rows gathered from L2 5000.0"):
        assert roof in text
    assert "GEMM alone (yardstick)" in text and "% of gather" in text


def test_a_cpu_report_has_no_targets():
    cpu = [r | {"cuda": None, "driver": None, "peak_mem_bytes": None} for r in gpu_rows()]
    text = report.markdown(cpu, [])
    assert "Targets" not in text and "On a GPU" in text and "| decode, of" not in report.summary(cpu)


def test_figures_from_gpu_rows(tmp_path):
    plot = pytest.importorskip("plot", reason="the figures need matplotlib")
    files, _ = plot.draw_all(gpu_rows(), tmp_path)
    assert {path.name for path in files} == {"operations-S2-bfloat16.png", "roofline-bfloat16.png"}


# --- predictions ---------------------------------------------------------------------------------------------------


def prediction(op, microseconds, mode="forward", shape="S1", gpu="H200"):
    return {"prediction": True, "gpu": gpu, "op": op, "mode": mode, "shape": shape, "dtype": "bf16",
            "predicted_microseconds": microseconds}  # fmt: skip


@pytest.mark.parametrize(
    ("ms", "verdict"), [(0.150, "confirmed"), (0.067, "confirmed"), (0.151, "**refuted**"), (0.066, "**refuted**")]
)
def test_a_prediction_is_confirmed_within_a_factor_of_one_and_a_half(ms, verdict):
    (line,) = verdicts.predictions([row("topk", "S1", ms)], [prediction("topk", 100.0)])
    assert line == ["topk", "S1, bfloat16", "0.1 ms", derived.fmt_ms(ms), derived.fmt_ratio(ms / 0.1), verdict]


def test_predictions_are_compared_where_both_exist():
    predicted = [prediction("topk", 100.0, shape="S2"), prediction("topk", 100.0, gpu="B200"),
                 prediction("norm_match", 100.0), prediction("decode", 60.0),
                 prediction("decode", 40.0, mode="backward")]  # fmt: skip
    made = [row("topk", "S1", 0.1), row("norm_match", "S1", 9.0), row("norm_match", "S1", 0.1, "ours, capacity")]
    assert [line[0] for line in verdicts.predictions(made, predicted)] == ["norm_match"]
    made += [row("decode", "S1", 0.05), row("decode-backward_values", "S1", 0.03)]
    assert [line[0] for line in verdicts.predictions(made, predicted)] == ["norm_match"]
    made += [row("decode-backward_weight", "S1", 0.02)]
    both = verdicts.predictions(made, predicted)[1]
    assert both[0] == "decode and its gradients" and both[2:] == ["0.1 ms", "0.1 ms", "1.00×", "confirmed"]
    assert "## Predictions" in report.markdown(made, [], predicted=predicted)


def test_the_stored_predictions_are_read():
    stored = rows.ROOT / "benchmarks" / "results" / "kernel-report" / "prediction.jsonl"
    assert stored == run.PREDICTED and stored.exists()
    alone = ("topk", "batch_topk", "norm_match", "threshold", "to_dense")
    made = [row(op, "S1", 1.0) for op in (*alone, *verdicts.BOTH_WAYS)]
    predicted = [json.loads(line) for line in stored.read_text().splitlines()]
    assert len(verdicts.predictions(made, predicted)) == 6


# --- what is timed -------------------------------------------------------------------------------------------------


def tiny(**changes):
    return dataclasses.replace(sizes.Case("tiny", B=24, d=20, F=96, k=5), **changes)


def test_gathers_sum_the_rows_that_are_named():
    calls = roofs.gathers(CPU, table_rows=11, words=5, sums=3, rows_of_a_sum=7, configurations=((4, 1), (8, 2)))
    generator = torch.Generator().manual_seed(roofs.SEED)
    table = torch.randint(-100, 100, (11, 5), dtype=torch.int32, generator=generator)
    chosen = torch.randint(11, (3, 7), dtype=torch.int32, generator=generator)
    assert list(calls) == [(4, 1), (8, 2)]
    for call in calls.values():
        assert torch.equal(call(), table[chosen.long()].sum(1, dtype=torch.int32))


def test_roofs_of_a_cpu(monkeypatch):
    monkeypatch.setattr(roofs, "time_interleaved", lambda variants, *_, **__: [timing.summarize([1.0])] * len(variants))
    monkeypatch.setattr(roofs, "_streams", lambda *_: iter(()))  # a gigabyte
    made = roofs.roof(CPU, 0.0)
    assert [(r["op"], r["dtype"], r["flops"]) for r in made] == [
        ("gemm", "float32", 2 * 2048**3), ("gemm", "bfloat16", 2 * 2048**3)
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["other value", "swapped", "one more", "one less"])
def test_a_wrong_encoding_is_noticed(change):
    op = registry.find("encode")
    i = op.make_inputs(tiny(), torch.float32, CPU, 0)
    values, columns = op.baseline.build(i)()
    if change == "other value":
        values = values * torch.tensor([1.0, 1, 1.001, 1, 1])
    elif change == "swapped":
        columns = (i.x @ i.weight + i.bias).topk(6).indices[:, [0, 1, 2, 3, 5]]
        values = (i.x @ i.weight + i.bias).gather(1, columns).relu()
    elif change == "one more":
        values, columns = (i.x @ i.weight + i.bias).relu().topk(6)
    else:
        values, columns = values[:, 1:], columns[:, 1:]
    with pytest.raises(AssertionError, match=r"encode: addmm \+ torch.topk"):
        checks.check_encode(i, op.baseline, (values, columns))


def test_a_yardstick_has_a_check_of_its_own():
    op = registry.find("encode")
    (gemm,) = [p for p in op.providers if p.yardstick]
    i = op.make_inputs(tiny(), torch.bfloat16, CPU, 0)
    registry.check_provider(op, gemm, i)
    liar = dataclasses.replace(gemm, build=lambda i: lambda: (i.x @ i.weight) * 1.1)
    with pytest.raises(AssertionError, match="GEMM alone"):
        registry.check_provider(op, liar, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_maxima_alone_are_those_of_the_groups(dtype):
    op = registry.find("batch_topk")
    (maxima,) = [p for p in op.providers if p.yardstick]
    i = inputs.pre_inputs(tiny(F=1030, k=2), dtype, CPU, 0)
    registry.check_provider(op, maxima, i)
    with pytest.raises(AssertionError, match="other maxima"):
        checks.check_group_maxima(i, maxima, ours.group_maxima(i)() + 1)


def test_yardsticks_are_marked_in_their_rows_and_nowhere_else():
    op = registry.find("encode")
    chosen = tuple(p for p in op.providers if p.name in ("ours", "GEMM alone"))
    made = operations.measure_cell(dataclasses.replace(op, providers=chosen), tiny(), torch.float32, CPU, 0.0)
    assert [r.get("yardstick") for r in made] == [None, True] and not rows.failures(made)
    (cell,) = derived.cells(made)
    assert cell.others == []


def test_an_absent_library_is_named_once(monkeypatch):
    monkeypatch.setattr(registry.Provider, "is_installed", lambda self: self.package is None)
    (line,) = [line for line in jobs.left_out(GPU, run.STAGES) if line.startswith("is not installed")]
    named = line.partition(": ")[2].split("; ")
    assert len(named) == len(set(named)) and {"flashinfer", "sae_lens", "sparsify", "dictionary_learning"} <= set(named)


def test_the_most_important_comes_first():
    planned = jobs.plan(GPU, "default", run.STAGES)
    assert {job.stage for job in planned} == set(run.STAGES)
    assert len({job.name for job in planned}) == len(planned)
    places = {job.name: place for place, job in enumerate(planned)}
    ids = {op.id for op in registry.OPS}
    assert {job.name.split()[0] for job in planned[: len(ids) + 1]} >= ids  # each once before anything comes twice
    order = ["decode S1 bfloat16", "topk S1 bfloat16", "training step S1 bfloat16",
             "reconstruction TopK k=32 sae_engine seed 0", "parts of a step S1", "topk S2 bfloat16",
             "reconstruction TopK k=32 sae_engine seed 1", "training step S2 bfloat16", "topk S1 bfloat16 compiled",
             "topk k=512 bfloat16"]  # fmt: skip
    assert sorted(order, key=places.__getitem__) == order
    for stages in (["operations"], ["steps", "parts"], ["compiled", "sweeps"]):
        assert {job.stage for job in jobs.plan(GPU, "default", stages)} == set(stages)


@pytest.mark.parametrize(
    ("submission_ms", "cycles"), [(0.0, 2_000_000), (0.4, 2_000_000), (3.0, 12_000_000), (500.0, 40_000_000)]
)
def test_the_queue_stays_busy_while_a_call_is_submitted(submission_ms, cycles):
    assert timing.spin_cycles(submission_ms) == cycles


def test_the_compiled_step_is_right(monkeypatch):
    """Traced; generating code takes half a minute."""
    import steps
    import stock

    monkeypatch.setattr(stock, "compiled", lambda f: torch.compile(f, dynamic=False, backend="eager"))
    (contestant,) = [c for c in steps.CONTESTANTS if c.compiled]
    setup = steps.make_setup(dataclasses.replace(steps.TINY, B=24, F=128, k=4), CPU)
    steps.check(contestant, contestant.build(setup), setup, steps.true_error(setup))


class FakeGraph:
    def replay(self):
        self.replays = getattr(self, "replays", 0) + 1


@pytest.fixture
def fake_graphs(monkeypatch):
    """What happens to the device while a CUDA graph is made of a call, in order."""
    happened, mode = [], ["default"]

    @contextlib.contextmanager
    def capture(graph):
        happened.append("capture")
        yield

    def set_mode(wanted):
        mode[0] = wanted

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: happened.append(f"back on {stream}"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(timing, "_events", lambda call, device, cycles: call() or 0.25)
    return happened, mode


def test_a_row_on_a_gpu_says_what_the_host_and_a_graph_take(fake_graphs):
    happened, mode = fake_graphs
    found = guarded.beside_the_device(lambda: happened.append(mode[0]), torch.device("cuda"))
    assert found["graph_ms"] == 0.25 and found["host_ms"] >= 0 and "no_graph" not in found
    assert happened == ["default"] * timing.SUBMISSIONS + ["error", "capture", "default", "back on stream"]


def test_a_call_that_waits_is_not_captured_and_its_row_says_so(fake_graphs):
    happened, mode = fake_graphs

    def waits():
        if mode[0] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    found = guarded.beside_the_device(waits, torch.device("cuda"))
    assert found["no_graph"] == "raised RuntimeError: called a synchronizing CUDA operation"
    assert "graph_ms" not in found and "capture" not in happened and mode == ["default"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(fake_graphs):
    happened, _ = fake_graphs

    def refuses():
        if "capture" in happened:
            raise RuntimeError("not permitted when stream is capturing")

    assert "not permitted" in guarded.beside_the_device(refuses, torch.device("cuda"))["no_graph"]
    assert happened == ["capture", "back on stream"]


def test_host_and_graph_stand_beside_the_device_time():
    made = [row("topk", "S1", 0.1)]
    made[0] |= {"host_ms": 0.0123, "no_graph": "it waits"}
    text = report.markdown(made, [])
    assert "CUDA graph" in text and "12.3 µs" in text and "it waits" in text


def test_what_merging_slabs_costs_is_the_mean_of_what_was_counted(monkeypatch):
    """Of slabs as wide as those that were counted; of wider ones, with what a slab costs that holds nothing."""
    numbers = {"merges": {"C": 100, "k": 2, "instructions": [90, 50, 40], "bytes": [9, 6, 3]}}
    monkeypatch.setattr(predict, "counted", lambda: numbers)
    cost = lambda latents, width, k=2: predict.counted_merges(  # noqa: E731
        SimpleNamespace(arguments={"C": width, "K": k}), SimpleNamespace(F=latents)
    )
    assert cost(400, 100) == [60, 6] and cost(250, 100) == [70, 7.5] and cost(600, 200) == [70 + 40, 7.5 + 3]
    for latents, k in ((500, 2), (400, 3)):
        with pytest.raises(ValueError, match=f"k={k}"):
            cost(latents, 100, k)


def test_the_predictions_of_steps_say_that_they_are_predictions():
    found = Path(predict.__file__).parent / "results" / "kernel-report" / "prediction-steps.jsonl"
    for line in map(json.loads, found.read_text().splitlines()):
        assert line["prediction"] and line["floor_microseconds"] < line["predicted_microseconds"]
        assert abs(sum(part["microseconds"] for part in line["parts"]) - line["predicted_microseconds"]) < 1
        assert sum(part["launches"] for part in line["parts"]) == line["launches"]
