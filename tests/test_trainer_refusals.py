"""What a run refuses: in one line that names the field, before anything of it is on the disk."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import SAE, settings

from sae_engine.cli import main
from sae_engine.data.models import EMBEDDED_FOLDER
from sae_engine.training.callbacks import resume_command
from sae_engine.training.config import ConfigError, TrainConfig
from sae_engine.training.plan import _batch_rows
from sae_engine.training.ranks import Ranks
from sae_engine.training.run import Run
from sae_engine.training.settings import configured
from sae_engine.training.trainer import Trainer, resume

MEMORY = {"name": "a", "hook_name": "model.a", "architecture": "topk", "k": 4, "d_sae": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("One short document.")
    (folder / "other.jsonl").write_text('{"txt": "a text"}\n' * 300)
    (folder / "ids.jsonl").write_text('{"input_ids": [5, 99999]}\n' * 300)
    mute = folder / "mute"
    mute.mkdir()
    for file in EMBEDDED_FOLDER.iterdir():
        if "token" not in file.name and "vocab" not in file.name and "merges" not in file.name:
            shutil.copy(file, mute)
    return folder


@pytest.mark.parametrize(("changes", "message"), [
    ({"saes": [SAE, SAE | {"hook_name": "blocks.99.hook_mlp_out"}]}, r"saes\.1\.hook_name: layer must be in 0\.\.3"),
    ({"data__dataset_path": "{}/nowhere.txt"}, r"data\.dataset_path: '.*nowhere\.txt' does not exist"),
    ({"data__dataset_path": "{}/empty.txt"}, r"data\.dataset_path: there is no text in .*empty\.txt"),
    ({"data__dataset_path": "{}/short.txt"}, r"eval: .*short\.txt has no document to hold out"),
    ({"data__dataset_path": "{}/other.jsonl"}, r"data\.column: .*other\.jsonl has no 'text', it has 'txt'"),
    ({"data__dataset_path": "{}/ids.jsonl", "data__column": "input_ids"},
     r"data\.dataset_path: document 0 of .*ids\.jsonl, column 'input_ids' holds token id 99999, and 'embedded' has"),
    ({"data__split": "test"}, r"data\.split: is for data sets on the hub, got 'test'"),
    ({"data__separator": 10**6}, r"data\.separator: must be in 0\.\.4095, got 1000000"),
    ({"model__model_name": "{}/nowhere"}, r"model\.model_name: the folder '.*nowhere' does not exist"),
    ({"model__model_name": "{}/mute"}, r"data\.prepend_bos: must be false: no tokenizer of .* has a BOS"),
    ({"model__model_name": "{}/mute", "data__prepend_bos": False}, r"data\.separator: .* has no tokenizer to say what"),
    ({"model__tokenizer_name": "{}/nowhere"}, r"model\.tokenizer_name: is neither a folder that exists nor"),
    ({"model__llm_device": "cuda:99"}, r"model\.llm_device: 'cuda:99' cannot be used"),
    ({"eval__dataset_path": "{}/nowhere.txt"}, r"eval\.dataset_path: '.*nowhere\.txt' does not exist"),
    ({"output__output_path": "{}/short.txt/run"}, r"output\.output_path: .*Not a directory"),
    ({"saes": [SAE | {"aux_k": 999}]}, r"saes\.0\.aux_k: must not exceed d_sae = 128, got 999"),
    ({"optim__cuda_graphs": True}, r"saes\.0: optim\.cuda_graphs must be false on cpu: graphs are a GPU's"),
    ({"output__hub_model_id": "a b/c"}, r"output\.hub_model_id: must be 'owner/repository', got 'a b/c'"),
    ({"saes": [SAE | {"from_pretrained": "{}/nowhere", "normalize_activations": "none"}]},
     r"saes\.0\.from_pretrained: must be a folder or a file of weights; there is none at"),
])  # fmt: skip
def test_a_fault_is_one_line_with_its_place_and_nothing_is_written(files, tmp_path, changes, message):
    changed = settings(tmp_path / "run", **changes)
    filled = _filled(changed, str(files))
    with pytest.raises((ValueError, OSError), match=rf"^{message}") as raised:
        Trainer(filled).train()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def _filled(value: Any, folder: str) -> Any:
    """``value`` with a folder for each pair of braces in its words."""
    if isinstance(value, dict):
        return {key: _filled(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, folder) for inner in value]
    return value.replace("{}", folder) if isinstance(value, str) else value


@pytest.mark.parametrize(("rows", "message"), [
    (torch.full((300, 16), float("nan")), "saes: a: the first 256 rows of activations have a mean norm of nan"),
    (torch.zeros(300, 16), r"saes: a: the first 256 rows .* mean norm of 0\.0, which must be finite and above 0"),
    (torch.ones(300), r"dataset must have 2 dimension"),
])  # fmt: skip
def test_rows_that_cannot_be_trained_on(tmp_path, rows, message):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=message):
        Trainer(settings(tmp_path / "run", saes=[MEMORY]), dataset=rows).train()
    assert list((tmp_path / "run").iterdir()) == []  # the folder was there, and is as it was


@pytest.mark.parametrize(("changes", "message"), [
    ({"saes": [MEMORY | {"architecture": "jumprelu", "k": None}]}, "with JumpReLU: only TopK, AbsTopK, BatchTopK are"),
    ({"optim__gradient_accumulation_steps": 2}, "with gradient_accumulation_steps = 2"),
    ({}, None),
])  # fmt: skip
def test_steps_that_no_graph_can_hold_are_named(tmp_path, changes, message):
    changes = {"saes": [MEMORY], "data__training_tokens": 64 * 2, **changes}
    changes["saes"] = [{name: value for name, value in changes["saes"][0].items() if value is not None}]
    trainer = Trainer(settings(tmp_path / "run", **changes), dataset=torch.randn(300, 16))
    trainer.train()
    why = trainer.trainees["a"]._why_not_captured(torch.device("cuda"))
    assert why is None if message is None else why.startswith(message)


def test_a_run_goes_on_in_its_own_folder(tmp_path):
    """Wherever that lies by now; another one is not to be named."""
    folder, moved = tmp_path / "run", tmp_path / "another place, moved"
    rows = torch.randn(300, 16)
    Trainer(settings(folder, saes=[MEMORY], data__training_tokens=64 * 2), dataset=rows).train()
    folder.rename(moved)
    with pytest.raises(ValueError, match=r"^output\.output_path: a run goes on in its own folder"):
        resume(moved, settings=[f"output.output_path={tmp_path / 'third'}"], dataset=rows)
    run = resume(moved, dataset=rows)
    assert run.folder == moved and run.config.output.output_path == str(moved)
    assert [place.name for place in tmp_path.iterdir()] == [moved.name]
    assert resume_command(moved) == f"sae-engine train --resume '{moved}'"


def test_a_hub_that_refuses_is_heard_before_the_first_update_and_at_the_end_costs_nothing(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    class Api:
        def create_repo(self, repo_id, exist_ok, private=False):
            asked.append(repo_id)
            if len(asked) in refused:
                raise OSError("403 Forbidden")
            return "https://hub"

    monkeypatch.setattr(hub, "HfApi", Api)
    config = settings(tmp_path / "run", saes=[MEMORY | {"hook_name": "blocks.1.hook_resid_pre"}],
                      data__training_tokens=128, output__push_to_hub=True, output__hub_model_id="me/saes")  # fmt: skip
    refused = {1, 3}
    with pytest.raises(OSError, match=r"^output\.hub_model_id: 403 Forbidden"):
        Trainer(config, dataset=torch.randn(300, 16)).train()
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError, match=r"^output\.push_to_hub: the run has ended and .* --to me/saes: 403"):
        Trainer(config, dataset=torch.randn(300, 16)).train()
    assert asked == ["me/saes"] * 3 and len(Run(tmp_path / "run").saes()) == 1


def test_the_command_line_says_it_in_one_line(files, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"""
        saes: [{{hook_name: blocks.1.hook_resid_pre, d_sae: 64}}]
        data: {{dataset_path: "{files}/other.jsonl", context_size: 32, shuffle_tokens: 512, shuffle_chunks: 2}}
        optim: {{train_batch_size_tokens: 64}}
    """)
    assert main(["train", str(config), "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "error: data.column:" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("setting", "said"), [
    ("model.model_name=/nowhere", "model.model_name: is neither a folder that exists nor a hub name: '/nowhere'"),
    ("saes.0.hook_name=blocks.9.hook_resid_pre", "saes.0.hook_name: blocks.9.hook_resid_pre: layer must be in 0..3"),
    ("saes.0.hook_name=transformer.h.1.nothing", "saes.0.hook_name: site: GPT2Block has no module 'nothing'"),
    ("saes.0.aux_k=999", "saes.0.aux_k: must not exceed d_sae = 256, got 999"),
])  # fmt: skip
def test_a_configuration_that_is_only_printed_is_refused_alike(setting, said, capsys):
    assert main(["train", "--preset", "embedded-tiny", "--set", setting, "--print-config"]) == 1
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out


def test_without_the_hub_a_configuration_is_printed_with_what_is_known(tmp_path, monkeypatch, capsys):
    def refuses(*_, **__):
        raise ConnectionError("no network")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "model_info", refuses)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    assert main(["train", "--preset", "gpt2-topk-32k", "--set", "saes.0.k=7", "--print-config"]) == 0
    shown = capsys.readouterr()
    assert "model.model_name: the hub did not answer" in shown.err and "stays auto" in shown.err
    (tmp_path / "run.yaml").write_text(shown.out)
    printed = TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert printed.saes[0].architecture.k == 7 and printed.optim.lr == "auto"


def test_the_name_of_a_preset_is_no_file(capsys):
    assert main(["train", "embedded"]) == 1
    assert "there is no file 'embedded'; did you mean --preset embedded?" in capsys.readouterr().err


def test_a_batch_that_processes_cannot_share_is_refused_by_its_field(tmp_path):
    config = configured(settings(tmp_path, optim__train_batch_size_tokens=64))
    assert _batch_rows(config, Ranks(rank=1, world=4)) == 16
    said = r"^optim\.train_batch_size_tokens: must be a multiple of the 3 processes, got 64$"
    with pytest.raises(ConfigError, match=said):
        _batch_rows(config, Ranks(rank=1, world=3))
