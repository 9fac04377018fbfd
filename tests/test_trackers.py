"""Where the numbers of a run go. The packages of others are played where nobody has installed them."""

import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae_engine.training.trackers import (
    Guarded,
    JsonLines,
    Progress,
    TensorBoard,
    Tracker,
    Trackio,
    Wandb,
    read_metrics,
    trackers_for,
)

NAN, INF = math.nan, math.inf


def logger(*report_to, project="lab"):
    return SimpleNamespace(report_to=report_to, project=project)


# ------------------------------------------------------------------------------------------------ JSON lines


@pytest.fixture
def lines(tmp_path):
    made = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    yield made
    made.finish()


def test_numbers_come_back_bit_for_bit(lines):
    values = {"a/third": 1 / 3, "a/small": 5e-324, "a/large": 1.7976931348623157e308, "a/minus": -0.0,
              "a/count": 2**53 + 1}  # fmt: skip
    lines.start({}, "run")
    lines.log({"tokens": 4096, **values}, step=7)
    lines.log({"a/tensor": torch.tensor(0.1), "a/half": torch.tensor(0.1, dtype=torch.float16)}, step=8)
    first, second = read_metrics(lines.path)
    assert list(first) == ["step", "tokens", "time", *values]
    assert {key: repr(first[key]) for key in values} == {key: repr(value) for key, value in values.items()}
    assert second["a/tensor"] == torch.tensor(0.1).item()


def test_what_is_no_number_is_null_in_json_and_nan_when_read(lines):
    lines.log({"a": NAN, "b": INF, "c": -INF, "d": 1.0}, step=1)
    text = lines.path.read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["a"], found["b"], found["c"], found["d"]) == (None, None, None, 1.0)
    (line,) = read_metrics(lines.path)
    assert all(math.isnan(line[key]) for key in "abc")


@pytest.mark.parametrize(("metrics", "error", "named"), [
    ({"step": 1.0}, ValueError, "'step'"), ({"time": 1.0}, ValueError, "'time'"),
    ({"loss": "0.5"}, TypeError, "'loss'"), ({"loss": None}, TypeError, "'loss'"),
    ({"loss": torch.zeros(2)}, TypeError, "'loss'"),
])  # fmt: skip
def test_a_line_that_is_refused_writes_nothing(lines, metrics, error, named):
    with pytest.raises(error, match=named):
        lines.log({"a": 1.0, **metrics}, step=1)
    assert not lines.path.exists() or lines.path.read_bytes() == b""


def test_a_torn_line_is_cut_off(lines):
    for step in (1, 2):
        lines.log({"a": 0.5}, step=step)
    lines.finish()
    whole = lines.path.read_bytes()
    second = whole.index(b"\n") + 1
    for length in range(second, len(whole)):  # wherever the second line was torn
        lines.path.write_bytes(whole[:length])
        assert [line["step"] for line in read_metrics(lines.path)] == [1]
    again = JsonLines(lines.path)
    again.start({}, "run")
    again.log({"a": 1.5}, step=3)
    again.finish()
    assert [(line["step"], line["a"]) for line in read_metrics(lines.path)] == [(1, 0.5), (3, 1.5)]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": 1}', '{"step": "1"}', '{"step": 1, "a": "b"}', "\0\0"])
def test_damage_amid_the_lines_is_named(lines, line):
    lines.log({"a": 1.0}, step=1)
    with lines.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(lines.path)


def test_lines_after_a_checkpoint_are_cut_off(lines):
    lines.log({"a": 1.0}, step=1)
    length = lines.sync()
    assert length == lines.path.stat().st_size
    lines.log({"a": 2.0}, step=2)
    lines.finish()
    resumed = JsonLines(lines.path)
    resumed.truncate(length)
    resumed.log({"a": 3.0}, step=2)
    resumed.finish()
    assert [(line["step"], line["a"]) for line in read_metrics(lines.path)] == [(1, 1.0), (2, 3.0)]
    with pytest.raises(ValueError, match=r"metrics\.jsonl must have at least 99999 bytes"):
        lines.truncate(99999)


def test_a_killed_process_leaves_its_lines(tmp_path):
    """kill -9 straight after a line: nothing waited in a buffer."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from sae_engine.training.trackers import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "for step in range(3): lines.log({'a': step / 3}, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [line["a"] for line in read_metrics(path)] == [0, 1 / 3, 2 / 3]


def test_a_full_disk_leaves_whole_lines(lines, monkeypatch):
    lines.log({"a": 1.0}, step=1)
    real, room = os.write, [10]

    def nearly_full(file, data):
        if not room[0]:
            raise OSError(28, "No space left on device")
        written, room[0] = real(file, data[: room[0]]), 0
        return written

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        lines.log({"a": 2.0}, step=2)
    monkeypatch.setattr(os, "write", real)
    lines.log({"a": 3.0}, step=3)
    assert [line["step"] for line in read_metrics(lines.path)] == [1, 3]


# ---------------------------------------------------------------------------------------- other people's


class Unsteady(Tracker):
    name = "unsteady"

    def __init__(self, failing):
        self.failing, self.calls = failing, []

    def _call(self, name):
        self.calls.append(name)
        if name in self.failing:
            raise ConnectionError("no\nnetwork")

    def start(self, config, name, id=None):
        self._call("start")
        return "new"

    def log(self, metrics, step):
        self._call("log")

    def histogram(self, name, values, step):
        self._call("histogram")

    def finish(self, status="finished"):
        self._call("finish")


def used(tracker, id=None):
    found = tracker.start({"seed": 0}, "run", id)
    for step in (1, 2):
        tracker.log({"a": 1.0}, step)
        tracker.histogram("h", torch.zeros(3), step)
    tracker.finish()
    return found


def test_failures_of_others_are_said_once_and_stop_nothing(caplog):
    inner = Unsteady({"log", "histogram", "finish"})
    assert used(Guarded(inner)) == "new"
    assert inner.calls == ["start", "log", "histogram", "log", "histogram", "finish"]  # tried again each time
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("unsteady: ConnectionError: no network. The run goes on")


def test_what_cannot_be_started_is_left_alone(caplog):
    inner = Unsteady({"start"})
    assert used(Guarded(inner), id="known") == "known"
    assert (inner.calls, len(caplog.records)) == (["start"], 1)


def test_tokens_and_passwords_stay_at_home():
    class Told(Tracker):
        def start(self, config, name, id=None):
            self.config = config

    told = Told()
    kwargs = {"token": "hf_abc", "use_auth_token": "hf_def", "hub": [{"API_KEY": "k"}], "trust_remote_code": True}
    Guarded(told).start({"model": {"model_from_pretrained_kwargs": kwargs}, "training_tokens": 5}, "run")
    hidden = {**kwargs, "token": "***", "use_auth_token": "***", "hub": [{"API_KEY": "***"}]}
    assert told.config == {"model": {"model_from_pretrained_kwargs": hidden}, "training_tokens": 5}


def test_the_keyboard_interrupts_through_a_guard():
    class Interrupted(Tracker):
        def log(self, metrics, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted()).log({}, 1)


@pytest.mark.parametrize("report_to", [("wandbb",), ("wandb", "wandb"), "wandb"])
def test_unknown_trackers_are_refused(tmp_path, report_to):
    with pytest.raises(ValueError, match=r"logger\.report_to must be some of \('wandb', 'tensorboard', 'trackio'\)"):
        trackers_for(SimpleNamespace(report_to=report_to, project="lab"), tmp_path)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_package_is_refused_before_the_run(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        trackers_for(logger(name), tmp_path)


class Recorded:
    """A run of wandb's or trackio's: what it was told, and how far it had come."""

    def __init__(self, options):
        self.id = self.name = options.get("id") or options["name"]
        self.step = self._next_step = 20
        self.options, self.lines, self.ended = options, [], []

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def finish(self, **options):
        self.ended.append(options)


@pytest.fixture
def played(monkeypatch):
    """A module of that name whose runs have come to step 20, with what was made of it."""

    def play(name):
        runs = []

        def init(**options):
            runs.append(Recorded(options))
            return runs[-1]

        module = types.ModuleType(name)
        module.init, module.Histogram = init, lambda values: ("histogram", values.tolist())
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return play


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_new_run_is_told_everything(tmp_path, played, name):
    runs = played(name)
    _, tracker = trackers_for(logger(name), tmp_path)
    assert tracker.name == name
    assert tracker.start({"seed": 3}, "gpt2") == "gpt2"
    tracker.log({"tokens": 4096, "sae-a/metrics/l0": torch.tensor(32.0), "b": NAN}, step=10)
    tracker.histogram("density", torch.tensor([0.5, -INF, NAN]), step=10)
    tracker.histogram("nothing", [INF], step=10)
    tracker.finish("interrupted")
    (run,) = runs
    assert {key: run.options[key] for key in ("project", "name", "config")} == {
        "project": "lab", "name": "gpt2", "config": {"seed": 3}}  # fmt: skip
    (step, metrics), density = run.lines
    assert (step, metrics["tokens"], metrics["sae-a/metrics/l0"]) == (10, 4096, 32.0)
    assert math.isnan(metrics["b"])
    assert density == (10, {"density": ("histogram", [0.5])})
    assert run.ended == [{"exit_code": 1} if name == "wandb" else {}]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_not_told_twice(tmp_path, played, name):
    """It had come to step 20 before it was killed, the checkpoint is from before."""
    runs = played(name)
    tracker = Wandb("lab", tmp_path) if name == "wandb" else Trackio("lab")
    assert tracker.start({}, "gpt2", id="abc") == "abc"
    for step in (18, 19, 20, 21):
        tracker.log({"a": step}, step)
        tracker.histogram("h", [float(step)], step)
    tracker.finish()
    (run,) = runs
    assert [step for step, _ in run.lines] == [20, 20, 21, 21]
    assert run.options["resume"] == "allow"
    assert run.ended == [{"exit_code": 0} if name == "wandb" else {}]


@pytest.fixture
def writers(monkeypatch):
    """torch's writer for TensorBoard, played: without the package it cannot be imported."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            self.folder, self.purge_step, self.calls = Path(folder), purge_step, []
            made.append(self)

        def __getattr__(self, name):
            return lambda *arguments: self.calls.append((name, *arguments))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    return made


def test_tensorboard_lies_in_the_run_folder(tmp_path, writers):
    _, tracker = trackers_for(logger("tensorboard"), tmp_path)
    id = tracker.start({"seed": 3}, "gpt2")
    assert writers == []  # nothing is written before the first number
    tracker.log({"a": 1.0}, step=10)
    tracker.histogram("h", torch.tensor([0.25, NAN]), step=10)
    tracker.finish()
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (tmp_path / "tensorboard", None)
    names = [call[0] for call in writer.calls]
    assert names == ["add_text", "add_scalar", "flush", "add_histogram", "close"]
    assert '"seed": 3' in writer.calls[0][2]
    assert writer.calls[1][1:] == ("a", 1.0, 10)
    assert writer.calls[3][2].tolist() == [0.25]
    resumed = TensorBoard(tmp_path / "tensorboard")
    assert resumed.start({}, "gpt2", id) == id
    resumed.log({"a": 1.0}, step=6)
    assert writers[1].purge_step == 6


# ------------------------------------------------------------------------------------------------ progress


class Screen(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """What a terminal would show: a carriage return goes back to the beginning of the line."""
        rows = []
        for text in self.getvalue().split("\n"):
            row = ""
            for part in text.split("\r"):
                row = part + row[len(part) :]
            rows.append(row.rstrip())
        return rows


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def bar(stream, total=1_000_000):
    clock = Clock()
    return Progress(total, True, stream=stream, clock=clock), clock


def test_elsewhere_a_line_every_half_minute():
    stream = io.StringIO()
    progress, clock = bar(stream)
    for second in range(0, 101):
        clock.now = 1000.0 + second
        progress.update(5000 * second, None if second == 0 else 0.5 if second <= 35 else 0.0)
    progress.update(1_000_000, 2.5)
    progress.update(1_000_000)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "  0 % of 1.00M tokens",
        " 15 % of 1.00M tokens, 5.00k tokens/s, 2:50 left, waited for activations 50 %",
        " 30 % of 1.00M tokens, 5.00k tokens/s, 2:20 left, waited for activations 29 %",
        " 45 % of 1.00M tokens, 5.00k tokens/s, 1:50 left, waited for activations 4 %",  # of the last minute
        "100 % of 1.00M tokens, 10.0k tokens/s, 1:40 in all, waited for activations 20 %",  # of the whole
    ]
    assert "\r" not in stream.getvalue()


def test_a_terminal_has_one_line_and_notes_above():
    stream = Screen()
    progress, clock = bar(stream)
    for tick in range(0, 1000):
        clock.now = 1000.0 + tick / 100
        progress.update(50 * tick)
        if tick == 500:
            progress.note("step 500: FVU 0.31")
    drawn = stream.getvalue().count("% of")
    progress.close()
    assert stream.shown() == ["step 500: FVU 0.31", "  4 % of 1.00M tokens, 5.00k tokens/s, 3:10 left", ""]
    assert 90 <= drawn <= 110  # not a thousand times


def test_a_narrow_terminal_does_not_wrap(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((30, 20)))
    stream = Screen()
    progress, clock = bar(stream)
    for second in (0, 1, 2):
        clock.now = 1000.0 + second
        progress.update(1000 * second, 0.5)
    assert [len(row) <= 29 for row in stream.shown()] == [True]


def test_a_resumed_run_has_the_rate_of_its_own():
    stream = io.StringIO()
    progress, clock = bar(stream)
    progress.update(900_000)
    clock.now += 50
    progress.update(950_000)
    assert stream.getvalue().splitlines()[-1] == " 95 % of 1.00M tokens, 1.00k tokens/s, 0:50 left"


def test_the_rate_is_that_of_the_last_minute():
    stream = io.StringIO()
    progress, clock = bar(stream, total=10_000_000)
    tokens = 0
    for second in range(0, 300, 30):
        clock.now = 1000.0 + second
        tokens += 30_000 if second < 150 else 300_000  # ten times as fast from then on
        progress.update(tokens)
    assert "10.0k tokens/s" in stream.getvalue().splitlines()[-1]


def test_nothing_is_shown_unasked_or_to_a_terminal_that_is_gone():
    stream = io.StringIO()
    silent = Progress(100, False, stream=stream)
    silent.update(50, 0.5)
    silent.note("evaluation")
    silent.close()
    assert stream.getvalue() == ""
    progress, _ = bar(stream)
    stream.close()
    progress.update(10)
    progress.note("evaluation")
    progress.close()


@pytest.mark.parametrize(("total", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_a_total_that_is_none_is_refused(total, error):
    with pytest.raises(error, match="total_tokens"):
        Progress(total)


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (3.25, "3.2"), (9.99, "10"), (950, "950"), (999.9, "1.00k"), (5200, "5.20k"), (99_960, "100k"),
    (999_600, "1.00M"), (500e6, "500M"), (4e9, "4.00G"), (1.5e13, "15.0T"),
])  # fmt: skip
def test_numbers_are_short(number, text):
    from sae_engine.training.progress import _short

    assert _short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599.9, "1:00:00"), (3725, "1:02:05"),
                                              (90_000, "1 d 1 h")])  # fmt: skip
def test_durations_are_short(seconds, text):
    from sae_engine.training.progress import _duration

    assert _duration(seconds) == text
