"""The benchmarks of training steps at toy sizes: contestants that are right, parts that add up, tables and figures."""

import dataclasses
from pathlib import Path

import peers
import pytest
import report
import step
import step_report
import steps
import torch
import trainer
from benchmark_rows import ACTIVATIONS, step_row

BENCHMARKS = Path(peers.__file__).parent
CPU = torch.device("cpu")
TINY = dataclasses.replace(steps.TINY, B=24, F=128, k=4)
FAST = [c for c in steps.CONTESTANTS if not (c.compiled or c.package or c.missing(CPU))]


@pytest.fixture
def setup():
    return steps.make_setup(TINY, CPU)


# --- contestants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", ["uniform", "zipf"])
@pytest.mark.parametrize("contestant", FAST, ids=lambda c: c.name)
def test_every_contestant_is_right(contestant, indices):
    s = steps.make_setup(dataclasses.replace(TINY, indices=indices), CPU)
    steps.check(contestant, contestant.build(s), s, steps.true_error(s))


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("contestant", [c for c in steps.CONTESTANTS if c.package], ids=lambda c: c.name)
def test_other_libraries_are_right(contestant, setup, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    pytest.importorskip(contestant.package)
    steps.check(contestant, contestant.build(setup), setup, steps.true_error(setup))


def test_a_wrong_step_is_noticed(setup):
    dense = next(c for c in steps.CONTESTANTS if c.baseline)
    expected = steps.true_error(setup)
    right = dense.build(setup)
    with pytest.raises(AssertionError, match="first error"):
        steps.check(dense, lambda: right() * 1.001, setup, expected)
    with pytest.raises(AssertionError, match="does not fall"):
        steps.check(dense, lambda: torch.tensor(expected), setup, expected)


def test_steps_of_all_kinds_agree(setup):
    """Ten steps of ours, by either path, are dense PyTorch's: a few roundings of a mean of B * d squares a step."""
    named = {c.name: c.build(setup) for c in FAST}
    errors = {name: [float(named[name]()) for _ in range(10)] for name in ("ours", "ours, plain path", "dense PyTorch")}
    for name in ("ours", "ours, plain path"):
        assert errors[name] == pytest.approx(errors["dense PyTorch"], rel=64 * torch.finfo(torch.float32).eps)


def test_names_are_those_of_the_report():
    names = [c.name for c in steps.CONTESTANTS]
    assert len(set(names)) == len(names)
    assert {step_report.GEMM, step_report.ADAM, step_report.OURS, f"{step_report.OURS} + AuxK"} <= set(names)
    assert [c.baseline for c in steps.CONTESTANTS].count(True) == 1


def test_aux_contestants_have_dead_latents(setup, monkeypatch):
    """In every step, also after some of them fired."""
    reports = []

    class Spy(steps.TrainStep):
        def __call__(self, *args):
            reports.append(super().__call__(*args))
            return reports[-1]

    monkeypatch.setattr(steps, "TrainStep", Spy)
    call = next(c for c in FAST if c.dead).build(setup)
    for _ in range(3):
        call()
    assert all(float(found["auxk"]) > 0 for found in reports) and len(reports) == 3


def test_skewed_biases_follow_zipf():
    biases = steps.skewed_biases(512, 8)
    probability = torch.special.ndtr((biases - 4.0).double())
    assert probability.sum().item() == pytest.approx(8, rel=1e-4)  # ndtri in fp32 loses some of the tail
    assert probability[0].item() == pytest.approx(0.9, rel=1e-4)
    assert (probability[100] / probability[201]).item() == pytest.approx(202 / 101, rel=1e-3)


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", ["uniform", "zipf"])
def test_parts_compute_the_same(indices):
    s = steps.make_setup(dataclasses.replace(TINY, indices=indices), CPU)
    with torch.no_grad():
        ours, codes = step.our_parts(s)
        dense = step.dense_parts(s)
        assert list(ours) == [*step.PARTS, step.WHOLE]
        close = {"rtol": 1e-4, "atol": 1e-6}  # sums of 32 products in two orders
        torch.testing.assert_close(ours[step.GEMM](), dense[step.GEMM](), **close)
        torch.testing.assert_close(ours[step.SELECTION]().to_dense(), dense[step.SELECTION](), **close)
        torch.testing.assert_close(ours[step.DECODE](), dense[step.DECODE](), **close)
        rows_of = torch.arange(TINY.B).repeat_interleave(TINY.k)
        at_codes = dense[step.VALUES]()[rows_of, codes.indices.long()]
        torch.testing.assert_close(ours[step.VALUES](), at_codes, **close)


def test_rows_of_parts():
    found = step.measure(dataclasses.replace(TINY, indices="zipf"), torch.float32, CPU, "quick")
    parts = step_report.parts_of(found)
    assert parts.keys() == {step.OURS, step.DENSE}
    for times in parts.values():
        named = sum(ms for part, ms in times.items() if part != step_report.WHOLE)
        assert named == pytest.approx(times[step_report.WHOLE])
    assert found[0]["share_of_first"] > 0.5  # skewed: one latent fires on most tokens


# --- tables and figures --------------------------------------------------------------------------------------------


def synthetic_rows():
    made = [
        step_row(provider="encoder GEMM", contestant="yardstick", ms_p50=80.0),
        step_row(provider="fused Adam", contestant="yardstick", ms_p50=20.0), step_row(),
        step_row(provider="dense PyTorch", contestant="PyTorch", baseline=True, ms_p50=390.0),
        step_row(provider="SAELens", contestant="peer", ms_p50=650.0, note="gradient norm clipped"),
        step_row(provider="ours + AuxK", auxk=True, ms_p50=200.0),
        step_row(provider="SAELens + AuxK", contestant="peer", auxk=True, ms_p50=800.0),
    ]  # fmt: skip
    for provider in (step.OURS, step.DENSE):
        for part, ms in [*((part, 10.0) for part in step.PARTS), (step.WHOLE, 66.0)]:
            made.append(step_row(kind="part", provider=provider, part=part, ms_p50=ms, share_of_first=0.25))
    for provider, errors in (("sae_engine", [4.0, 2.0]), ("dense PyTorch", [4.0, 2.02])):
        made.append(step_row(**ACTIVATIONS, kind="curve", provider=provider, errors=errors, k=1))
    return made


def test_report_from_rows():
    text = report.markdown(synthetic_rows(), [Path("step-main-float32.png"), Path("step-parts.png")])
    flat = text.replace(" ", "")
    assert "Floor (GEMM + fused Adam): 100 ms" in text
    assert "|**ours**||130(124–136)|1.30×||" in flat
    assert "|densePyTorch||390(124–136)|3.90×|3.00×|" in flat  # 3 times ours
    assert "|SAELens+AuxK||800(124–136)|8.00×|4.00×|" in flat  # 4 times ours with AuxK
    assert "|therest|6|6|" in flat  # 66 less 6 parts of 10
    assert "0.99 % apart" in text  # 2 against 2.02
    assert "sae-lens 6" in text and "25.0 % of the tokens" in text
    assert text.count("](step-main-float32.png)") == 1
    operation = step_row(kind="operation", op="topk", mode="forward", bytes=1, flops=0)
    assert "training step" not in report.markdown([operation], [])


def test_figures_from_rows(tmp_path):
    plot = pytest.importorskip("plot", reason="the figures need matplotlib")
    files, _ = plot.draw_all(synthetic_rows(), tmp_path)
    assert sorted(path.name for path in files) == ["step-curve.png", "step-main-float32.png", "step-parts.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


# --- measuring -----------------------------------------------------------------------------------------------------


def test_steps_that_fail_get_rows_that_say_so(monkeypatch):
    few = [c for c in steps.CONTESTANTS if c.name in ("encoder GEMM", "fused Adam", "ours", "dense PyTorch")]
    absent = dataclasses.replace(few[-1], name="absent", package="no_such_library", baseline=False)
    failing = dataclasses.replace(few[-1], name="failing", kind="ours", build=lambda s: 1 / 0, baseline=False)
    wrong = dataclasses.replace(few[-1], name="wrong", build=lambda s: lambda: torch.ones(()), baseline=False)
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "0")  # restored afterwards: the job sets it
    found = peers.measure(TINY, torch.float32, CPU, "quick", (*few, absent, failing, wrong), without=["fused Adam"])
    assert [r["provider"] for r in found if "failed" not in r] == ["encoder GEMM", "ours", "dense PyTorch"]
    assert all(r["ms_p50"] > 0 for r in found if "failed" not in r)
    failed = {r["provider"]: r["failed"] for r in found if "failed" in r}
    assert failed["failing"].startswith("raised ZeroDivisionError")
    assert failed["wrong"].startswith("WRONG: wrong: the first error is 1")
    assert failed.keys() == {"failing", "wrong"}


# --- a run beside its step -----------------------------------------------------------------------------------------


def test_a_run_and_its_loop_are_timed_between_the_same_updates_by_turns(monkeypatch):
    """On a clock that only updates move: a run's take 3, a loop's 2, the cold ones 100 each."""
    now, turns, known = 0.0, [], trainer.Timed.updated

    def turn(name, original, seconds):
        def updated(self, update):
            nonlocal now
            now += 100 if update <= self.between[0] else seconds
            known(self, update)

        def one(config, rows, timed):
            turns.append(name)
            monkeypatch.setattr(trainer.Timed, "updated", updated)
            return original(config, rows, timed)

        return one

    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now)
    monkeypatch.setattr(trainer, "run_of", turn("run", trainer.run_of, 3))
    monkeypatch.setattr(trainer, "loop_of", turn("loop", trainer.loop_of, 2))
    monkeypatch.setattr(trainer, "seconds", lambda run: {"activations": 1.0, "step": 2.0, "logging": 1.0, "whole": 4.0})
    row = trainer.from_memory(trainer.Memory(8, 64, 16, cold=2, timed=4, rounds=2), CPU)
    assert turns == ["loop", "run", "run", "loop"]
    assert row.split(" | ")[4:9] == ["8", "5", "**66.7%**", "66.7% to 66.7%", "66.7%"]
