"""The documentation: its blocks run as they stand, its commands exist, its links lead somewhere.

`make docs` renders the pages, every warning an error; that they say the truth is seen here, with what `make test` has.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in sorted(DOCS.glob("**/*.md"))
         if "_build" not in path.parts}  # fmt: skip
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()} | {
    "README": (ROOT / "README.md").read_text(encoding="utf-8")
}
CELL = re.compile(r"```\{code-cell\}[^\n]*\n(?::[^\n]*\n)*(.*?)```", re.DOTALL)
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUNNING = [name for name, text in TEXTS.items() if CELL.search(text)]
# Blocks that need more than this package and a CPU, and the tests that run them.
ELSEWHERE = {
    "README": "tests/test_readme.py, tests/test_interop_trainers.py",
    "your_library": "tests/test_interop_trainers.py",
    "checkpoints": "test_the_lines_on_checkpoints",
    "waits": "test_the_lines_on_cuda_graphs",
    "several_gpus": "test_the_lines_on_several_gpus",
}
NOTEBOOKS = [pytest.param(path, id=path.stem, marks=[pytest.mark.interop] if "sae_lens" in path.stem else [])
             for path in sorted((ROOT / "examples").glob("*.ipynb"))]  # fmt: skip


def run(blocks, names):
    for block in blocks:
        exec(block, names)
    return names


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("name", RUNNING)
def test_blocks_run_in_order(name, tmp_path, monkeypatch, capsys):
    if "matplotlib" in TEXTS[name]:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = run(CELL.findall(TEXTS[name]), {})
    assert capsys.readouterr().out
    for metric in [found for found in names.values() if isinstance(found, se.metrics.Reconstruction)]:
        sae, x = names["sae"], names["x"]
        whole = float(se.losses.fvu(sae(x), x).detach())  # in fp32, where the metric sums in fp64
        assert metric.compute()["fvu"] == pytest.approx(whole, rel=1e-4)  # no page hands it the two the wrong way round


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebooks_run(path, tmp_path, monkeypatch, capsys):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    source = ["".join(cell["source"]) for cell in cells]
    for package in ("matplotlib", "sae_lens"):
        if any(f"import {package}" in text for text in source):
            pytest.importorskip(package)
    assert all(not cell["outputs"] for cell in cells)  # what they print is made, never kept
    monkeypatch.chdir(tmp_path)
    run(source, {})
    assert capsys.readouterr().out


def test_every_other_block_runs_elsewhere():
    assert {name for name, text in TEXTS.items() if FENCE.search(text)} <= ELSEWHERE.keys()


def test_the_lines_on_checkpoints(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hub" / "blocks.8.hook_resid_pre"
    se.SparseAutoencoder(16, 64, se.ReLU()).save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    names = run(FENCE.findall(TEXTS["checkpoints"])[:1], {"se": se})
    assert "mean-centred" in capsys.readouterr().out
    assert se.SparseAutoencoder.from_pretrained("mine").card == names["sae"].card


def test_the_lines_on_several_gpus(tmp_path):
    """As torchrun starts them, on CPUs; and what they leave."""
    (program,) = FENCE.findall(TEXTS["several_gpus"])
    (tmp_path / "train.py").write_text(program, encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints" / "4" / "state.json").is_file()
    assert se.SparseAutoencoder.from_pretrained(tmp_path / "sae").d_sae == 4096


@pytest.mark.gpu
def test_the_lines_on_cuda_graphs():
    step = se.training.TrainStep(se.SparseAutoencoder(16, 64, se.TopK(4), device="cuda"), lr=1e-3)
    batches = torch.randn(5, 8, 16, device="cuda")
    names = run(FENCE.findall(TEXTS["waits"]), {"se": se, "step": step, "batches": batches})
    assert step.calls == 5 and float(names["report"]["l0"]) <= 4


def commands():
    for name, text in TEXTS.items():
        for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if "sae-engine" in words:
                    yield pytest.param(words[words.index("sae-engine") + 1 :], id=f"{name}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist(words, monkeypatch):
    """Each is parsed as the console would, and not run."""
    parsed = []
    original = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        parsed.append(found)
        found.run = lambda args: 0
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            assert cli.main(words) == 0
        except SystemExit:
            pytest.fail(said.getvalue())
    assert parsed


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README" else PAGES[name].parent
    links = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL))
    missing = [link for link in links if "://" not in link and not link.startswith("#")
               and not (folder / link.partition("#")[0]).exists()]  # fmt: skip
    assert missing == []


def test_every_page_is_in_a_table_of_contents():
    listed = {"index"}
    for name, text in TEXTS.items():
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            pages = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(Path(name).parent / page).as_posix() for page in pages}
    assert listed == PAGES.keys()


def test_configurations_are_read(tmp_path):
    (lines,) = re.findall(r"^```yaml\n(.*?)^```", TEXTS["train"], re.DOTALL | re.MULTILINE)
    (tmp_path / "run.yaml").write_text(lines, encoding="utf-8")
    config = se.training.TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert [sae.architecture.k for sae in config.expanded().saes] == [32, 64, 128]
    assert config.data.training_tokens == 500_000_000


def test_configurations_of_crosscoders_are_read(tmp_path):
    clt, diff, budgets = re.findall(r"^```yaml\n(.*?)^```", TEXTS["crosslayer"], re.DOTALL | re.MULTILINE)
    (tmp_path / "run.yaml").write_text(clt, encoding="utf-8")
    (entry,) = se.training.TrainConfig.from_yaml(tmp_path / "run.yaml").saes
    assert (entry.wiring, entry.sources, entry.reads[11]) == ("causal", 12, "blocks.11.hook_resid_mid")
    (tmp_path / "run.yaml").write_text(diff, encoding="utf-8")
    config = se.training.TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert config.saes[0].sources == 1 and config.other_models[0].model_name == "google/gemma-2-2b-it"
    (tmp_path / "run.yaml").write_text(budgets, encoding="utf-8")
    each, of_all = se.training.TrainConfig.from_yaml(tmp_path / "run.yaml").saes
    assert each.architecture.k * each.sources == of_all.architecture.k and of_all.architecture.over_sources


def test_every_rule_has_its_lines():
    rules = {name for name in se.__all__ if isinstance(getattr(se, name), type)
             and issubclass(getattr(se, name), se.Activation)}  # fmt: skip
    helpers = {"Activation", "AuxTopK", "AuxZipfTopK"}  # what rules are made from; selections of losses
    assert {name for name in rules - helpers if f"`{name}(" not in TEXTS["rules"]} == set()
