"""Rows of the benchmarks: stored, replaced, compared, and what reports and figures make of them."""

import json
from pathlib import Path

import derived
import pytest
import reconstruction
import report
import rows
import torch
from benchmark_rows import operation_row, reconstruction_row


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    import plot

    return plot


def test_where_the_baseline_does_not_run_the_next_one_is_it():
    ours, first, second, other = (
        operation_row(provider=name, baseline=name in ("first", "second"), ms_p50=ms)
        for name, ms in (("ours", 1.0), ("first", 2.0), ("second", 3.0), ("other", 4.0))
    )
    for found, baseline, others in (
        ([ours, first, second, other], first, [second, other]), ([ours, second, other], second, [other]),
        ([ours, other], None, [other]),
    ):  # fmt: skip
        (cell,) = derived.cells(found)
        assert cell.baseline is baseline and cell.others == others
        ratio = derived.fmt_ratio(derived.speed_up(ours, cell))
        assert ratio == (f"{baseline['ms_p50']:.2f}×" if baseline else ""), "no nan×"


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "b" * 40)
    assert rows._revision.__wrapped__() == {"commit": "b" * 40, "dirty": False}
    monkeypatch.setenv("BENCH_COMMIT", "main")
    with pytest.raises(ValueError, match="BENCH_COMMIT"):
        rows._revision.__wrapped__()


def test_rows_come_back_as_they_were(tmp_path):
    file = tmp_path / "deep" / "rows.jsonl"
    written = [operation_row(), operation_row(provider="torch.topk", baseline=True, ms_p50=0.1 + 0.2)]
    rows.store(file, written)
    assert rows.load(file) == written
    assert [path.name for path in file.parent.iterdir()] == ["rows.jsonl"]


def test_a_row_replaces_the_one_with_its_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows.store(file, [operation_row(), operation_row(provider="other")])
    rows.store(file, [operation_row(ms_p50=1.0, utc="2026-01-02T00:00:00Z")])
    assert {row["provider"]: row["ms_p50"] for row in rows.load(file)} == {"other": 2.0, "ours": 1.0}
    rows.store(file, [operation_row(commit="b" * 40)])
    assert len(rows.load(file)) == 3  # another commit is another key
    assert len(rows.latest(rows.load(file))) == 2


def test_rows_of_an_uncommitted_tree_do_not_stay():
    dirty = operation_row(commit="c" * 40, dirty=True)
    assert rows.merged([dirty], [operation_row()]) == [operation_row()]
    assert rows.merged([dirty], [operation_row(provider="other")])[0] == dirty


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(operation_row()) + "\n{half a r", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        rows.load(file)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    rows.write_atomically(file, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rows.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows.write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_row_says_where_it_was_measured():
    found = rows.environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert set(found) == {"device", *rows.PROVENANCE}
    assert rows.device_slug(torch.device("cpu")).startswith("cpu-")


def test_a_failure_takes_the_place_of_older_numbers_and_gives_it_back():
    worked, later = operation_row(), operation_row(utc="2026-01-03T00:00:00Z")
    broke = rows.failure({k: v for k, v in worked.items() if k not in rows.MEASURED}, "WRONG: other entries")
    assert rows.merged([worked], [broke]) == [broke]
    other = operation_row(provider="other")
    assert rows.with_numbers([worked, other, broke]) == [other] and rows.failures([worked, other, broke]) == [broke]
    text = report.markdown([other, broke], [])
    assert "- topk main float32, ours: WRONG: other entries" in text and "| **ours**" not in text
    assert rows.merged([broke], [later]) == [later]


# --- tables and figures --------------------------------------------------------------------------------------------


def synthetic_rows():
    made = [
        operation_row(kind="roof", op="copy", case="roof", group="roof", provider="torch", bytes=10**8, ms_p50=1.0),
        operation_row(),
        operation_row(provider="torch.topk", baseline=True, ms_p50=4.0),
        operation_row(provider="torch.topk + scatter", note="dense result", ms_p50=40.0),
    ]
    for size in (1024, 2048, 4096):
        for provider, ms in (("ours", 1.0), ("torch.topk", 3.0)):
            shape = {"B": 8, "F": size, "k": 4}
            made.append(operation_row(case=f"F={size}", group="sweep-F", shape=shape, provider=provider,
                                      baseline=provider != "ours", ms_p50=ms * size))  # fmt: skip
    for rule, knobs in (("TopK", (16, 32)), ("BatchTopK", (16, 32)), ("top-AFA", (1 / 32,))):
        for knob in knobs:
            for seed in (0, 1):
                for provider in (reconstruction.OURS, reconstruction.DENSE):
                    name = "afa_coeff" if rule == "top-AFA" else "k"
                    made.append(reconstruction_row(rule=rule, knob=knob, knob_name=name, seed=seed, provider=provider,
                                                   l0=float(max(knob, 8)), mse=1 / (max(knob, 8) + seed)))  # fmt: skip
    return made


def test_figures_from_rows(tmp_path, plot):
    files, _ = plot.draw_all(synthetic_rows(), tmp_path)
    assert sorted(path.name.split("-")[0] for path in files) == ["operations", "reconstruction", "roofline", "sweep"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_a_figure_is_drawn_again_where_its_rows_have_changed(tmp_path, plot):
    made = synthetic_rows()
    files, _ = plot.draw_all(made, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files}
    assert plot.draw_all(made, tmp_path, seconds=-1.0) == (files, [])
    faster = [row | {"ms_p50": 1.5} if row["provider"] == "ours" and row["case"] == "main" else row for row in made]
    there, left = plot.draw_all(faster, tmp_path, seconds=-1.0)
    assert sorted(left) == ["operations-main-float32", "roofline-float32"] and len(there) == len(files) - 2
    assert plot.draw_all(faster, tmp_path) == (files, [])
    assert sorted(path.stem for path in files if path.stat().st_mtime_ns != before[path]) == sorted(left)


def test_what_is_of_another_commit_says_so():
    old = {"commit": "b" * 40, "torch": "1", "utc": "2025-06-01T00:00:00Z"}
    made = [
        operation_row(), operation_row(provider="torch.topk", baseline=True, ms_p50=4.0),
        operation_row(provider="torch.compile", ms_p50=0.5, **old), operation_row(case="small", group="small", **old),
        *(reconstruction_row(seed=s, dirty=False, **(old if s else {"commit": "a" * 40})) for s in (0, 1)),
    ]  # fmt: skip
    text, said = report.markdown(made, []), "of bbbbbbb, torch 1, 2025-06-01"
    marked = [line for line in text.splitlines() if said in line]
    assert [line.split("|")[2].split("(")[0].strip() for line in marked[:2]] == ["torch.compile", "**ours**"]
    assert f"sae_engine († {said})" in marked[2] and "0.2000 0.2000†" in marked[2] and len(marked) == 3
    assert "Slower than other code" not in text  # than what another commit's run showed
    assert f"4.00× torch.compile ({said})" not in report.summary(made[:2])
    assert f"0.25× torch.compile ({said})" in report.summary(made)
    assert "of bbbbbbb" not in report.markdown(made[:2], [])


def test_report_from_rows():
    made = synthetic_rows()
    text = report.markdown(made, [Path("operations-main-float32.png")], ["decode: red"])
    assert "| **ours**" in text
    assert "2.00×" in text  # 4 ms against 2 ms
    assert "| 50 | 50 |".replace(" ", "") in text.replace(" ", "")  # 1e8 bytes in 2 ms, half of the copy's rate
    assert "GPU" in text and "not measured" in text
    assert "0" * 64 in text  # the model's sha256
    assert "decode: red" in text
    assert "0.000 % apart" in text
    assert "2.00×" in report.summary(made)


def test_numbers_read_well():
    assert [derived.fmt_ms(ms) for ms in (0.0123, 0.5, 12.34, 1234.5)] == ["12.3 µs", "0.5 ms", "12.3 ms", "1,234 ms"]
    assert derived.knob_text({"knob_name": "afa_coeff", "knob": 1 / 32}) == "afa_coeff = 1/32"
