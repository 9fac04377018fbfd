"""Crosscoders on the hub: a repository that is read back, by circuit-tracer's layout too, and a card; nothing else."""

import pytest
import torch
from crosscoder_cases import MODEL, made

import sae_engine as se
from sae_engine.checkpoints.crosslayer import formats
from sae_engine.cli import main
from sae_engine.latents import push_crosscoder
from sae_engine.training.config import OutputConfig, SAEConfig, TrainConfig


@pytest.mark.parametrize(("wiring", "rule", "format"), [
    ("causal", "topk", "sae_engine"), ("causal", "batch", "circuit_tracer_clt"), ("local", "relu", "transcoder_set"),
    ("joint", "batch", "dictionary_learning_crosscoder"),
])  # fmt: skip
def test_a_repository_is_read_back(wiring, rule, format, tmp_path):
    coder, uploaded = made(wiring, rule), []

    class Hub:
        def create_repo(self, repo_id, **options):
            uploaded.append((repo_id, options))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            uploaded.append(formats.detect(options["folder_path"]))

    done = push_crosscoder(coder, "me/coder", folder=tmp_path / "out", format=format, license="mit", api=Hub())
    assert done.url == "https://hub/me/coder" and uploaded[1] == format
    again, x = se.Crosscoder.from_pretrained(tmp_path / "out").eval(), torch.randn(5, 3, 6)
    assert torch.equal(again(x), coder(x))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'base_model: ["{MODEL}"]' in card and "license: " in card and "blocks.2.hook_resid_mid" in card
    kinds = {"causal": "A cross-layer transcoder", "local": "A set of transcoders", "joint": "A crosscoder"}
    assert kinds[wiring] in card and done.files.keys() == {file.name for file in (tmp_path / "out").iterdir()}


def test_what_is_refused_leaves_nothing(tmp_path):
    coder = made("causal", "topk")
    with pytest.raises(ValueError, match="the rule TopK"):
        push_crosscoder(coder, "me/coder", folder=tmp_path / "out", dry_run=True, format="circuit_tracer_clt")
    with pytest.raises(ValueError, match="dry_run=True"):
        push_crosscoder(coder, "me/coder", dry_run=True)
    with pytest.raises(ValueError, match="repo_id must be"):
        push_crosscoder(coder, "coder", folder=tmp_path / "out", dry_run=True)
    with pytest.raises(TypeError, match="coder must be a Crosscoder"):
        push_crosscoder(se.SparseAutoencoder(4, 8, se.TopK(2)), "me/coder", folder=tmp_path / "out", dry_run=True)
    coder.provenance = None
    with pytest.raises(ValueError, match="does not say where it belongs"):
        push_crosscoder(coder, "me/coder", folder=tmp_path / "out", dry_run=True)
    assert not any(tmp_path.iterdir())
    (tmp_path / "kept").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        push_crosscoder(made("causal", "topk"), "me/coder", folder=tmp_path, dry_run=True)


def test_the_command_line(tmp_path, capsys):
    made("local", "relu").save_pretrained(tmp_path / "set")
    common = ["push", str(tmp_path / "set"), "--to", "me/set", "--dry-run", "--folder"]
    assert main([*common, str(tmp_path / "own")]) == 0 and formats.detect(tmp_path / "own") == "sae_engine"
    assert main([*common, str(tmp_path / "traced"), "--layout", "circuit-tracer"]) == 0
    assert formats.detect(tmp_path / "traced") == "transcoder_set"
    assert "nothing was uploaded" in capsys.readouterr().out
    assert main([*common, str(tmp_path / "no"), "--layout", "saelens"]) == 1
    assert "--layout: a crosscoder has circuit-tracer" in capsys.readouterr().err
    two = [*common[:1], str(tmp_path / "set"), str(tmp_path / "own"), *common[2:], str(tmp_path / "no")]
    assert main(two) == 1 and "a repository of its own, and 2 were given" in capsys.readouterr().err


def test_a_run_of_several_that_would_be_published_together_is_refused():
    saes = [SAEConfig(hook_name=("a.x", "b.x")), SAEConfig(hook_name="a.x")]
    with pytest.raises(ValueError, match=r"output\.push_to_hub: must be false with a crosscoder among others"):
        TrainConfig(saes=saes, output=OutputConfig(push_to_hub=True, hub_model_id="me/coder"))
