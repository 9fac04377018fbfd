"""``sae-engine features``, ``dashboard`` and ``push``."""

import json
import shutil

import pytest
import torch

import sae_engine as se
from sae_engine import cli
from sae_engine.latents import Features

TEXT = ["--text", "evaluation", "--tokens", "300", "--context-length", "32", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that gives the folder of an autoencoder of the embedded model, at that place."""
    made = {}

    def folder(layer=2, site="resid_pre", name="sae", **known):
        key = layer, site, name
        if key not in made:
            torch.manual_seed(layer)
            sae = se.SparseAutoencoder(256, 64, se.TopK(8))
            model = {} if known.pop("nameless", False) else {"model": "embedded"}
            sae.provenance = se.Provenance(**model, layer=layer, site=site, **known)
            made[key] = tmp_path_factory.mktemp("saes") / name
            sae.save_pretrained(made[key])
        return str(made[key])

    return folder


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_features_and_again_and_as_delphi_has_them(saved, tmp_path, capsys):
    out = tmp_path / "features"
    assert run("features", saved(), out, *TEXT) == 0
    features = Features(out)
    assert f"{out}: {features!r}, " in capsys.readouterr().out
    manifest = features.manifest
    assert (manifest["encoded"], manifest["context_length"], manifest["layer"], manifest["text_source"]) == (
        300, 32, 2, "evaluation text")  # fmt: skip
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert run("features", saved(), out, *TEXT, "--format", "delphi", "--splits", 2) == 0
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")} == before
    assert {file.name for file in (out / "delphi" / "blocks.2.hook_resid_pre").iterdir()} == {
        "config.json", "0_31.safetensors", "32_63.safetensors"}  # fmt: skip
    capsys.readouterr()
    assert run("features", saved(), out, *TEXT, "--dtype", "float32") == 1
    assert "dtype: " in (err := capsys.readouterr().err) and "has 'float16', this call asks for 'float32'" in err


def test_a_source_of_a_crosscoder(saved, tmp_path, capsys):
    torch.manual_seed(0)
    clt = se.Crosscoder.clt(2, 256, 32, se.TopK(4))
    clt.provenance = se.Provenance(
        model="embedded", sites=("blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid"),
        target_sites=("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"),
    )  # fmt: skip
    clt.save_pretrained(tmp_path / "clt")
    for number in (0, 1):
        features, page = tmp_path / f"features {number}", tmp_path / f"page {number}"
        assert run("features", tmp_path / "clt", features, *TEXT, "--source", number) == 0
        manifest = Features(features).manifest
        assert (manifest["layer"], manifest["site"], manifest["encoded"]) == (1 + number, "resid_mid", 300)
    assert run("dashboard", tmp_path / "clt", page, *TEXT, "--source", 1, "--latents", 3) == 0
    assert (page / "index.html").is_file()
    capsys.readouterr()
    for path, given in ((tmp_path / "clt", []), (saved(), ["--source", 0])):
        assert run("features", path, tmp_path / "out", *TEXT, *given) == 1
        assert "--source must say which source" in capsys.readouterr().err
    assert run("features", tmp_path / "clt", tmp_path / "out", *TEXT, "--source", 2) == 1
    assert "number must lie in 0..1" in capsys.readouterr().err


def test_what_the_files_say_of_rows_is_taken(saved, tmp_path):
    path = saved(name="said", context_length=16, separator="none", excluded=("first", "eos"))
    assert run("features", path, tmp_path / "out", "--tokens", 60, "--quiet", "--device", "cpu") == 0
    manifest = Features(tmp_path / "out").manifest
    assert (manifest["context_length"], manifest["separator"], manifest["exclude_tokens"]) == (16, "none", ["eos"])


def test_a_dashboard_with_features_that_stay_and_without(saved, tmp_path, capsys):
    kept, page = tmp_path / "kept", tmp_path / "page"
    assert run("dashboard", saved(), page, *TEXT, "--features", kept, "--latents", "most", 3, "--contexts", 2) == 0
    assert capsys.readouterr().out.strip() == str(page / "index.html")
    overview = json.loads((page / "latents.js").read_text()[len("window.saeLatents = ") : -2])
    assert len(overview["shown"]) == 3 and overview["encoded"] == Features(kept).manifest["encoded"] == 300
    assert run("dashboard", saved(), page, "--features", kept, "--latents", 7, 9, "--quiet") == 0  # as they are
    overview = json.loads((page / "latents.js").read_text()[len("window.saeLatents = ") : -2])
    assert sorted(overview["shown"]) == [7, 9] and overview["encoded"] == 300
    asked = ["dashboard", saved(), page, "--features", kept, "--latents", 7]
    asked += ["--neuronpedia", "model_id=embedded", "set_name=res-me", "release=mine"]
    assert run(*asked) == 1 == run(*asked, "creator=M", "more=1") == run(*asked, "creator=M", "word")
    assert "--neuronpedia must be model_id=… set_name=… release=… creator=…, got" in capsys.readouterr().err
    assert run(*asked, "creator=M") == 0
    assert (page / "neuronpedia" / "embedded" / "2-res-me" / "source.jsonl").exists()
    alone = tmp_path / "alone"
    assert run("dashboard", saved(), alone, *TEXT, "--latents", "all", "--contexts", 0, "--title", "Mine & yours") == 0
    assert "<h1>Mine &amp; yours</h1>" in (alone / "index.html").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "page", "alone"}
    for words in (("few",), ("most",), ("most", "3", "4"), ("3", "x")):
        assert run("dashboard", saved(), alone, *TEXT, "--latents", *words) == 1
        assert "--latents must be numbers, 'most N' or 'all'" in capsys.readouterr().err
    assert run("dashboard", saved(3), page, "--features", kept) == 1
    assert "sae is not the autoencoder whose features lie in" in capsys.readouterr().err


def test_a_transcoder_whose_target_is_not_named_has_features(tmp_path):
    sae = se.SparseAutoencoder(256, 64, se.TopK(8), apply_b_dec_to_input=False)
    sae.provenance = se.Provenance(model="embedded", layer=1, site="mlp_in", target_site="unknown")
    sae.save_pretrained(tmp_path / "sae")
    assert run("features", tmp_path / "sae", tmp_path / "out", *TEXT) == 0
    assert Features(tmp_path / "out").manifest["site"] == "mlp_in"


def test_push_shows_what_it_would_upload(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.md").write_text("Some *words*.")
    assert run("push", saved(), saved(3), "--to", "me/saes", "--dry-run", "--license", "mit",
               "--description", "words.md") == 0  # fmt: skip
    out = capsys.readouterr().out
    for name in ("README.md", "blocks.2.hook_resid_pre/cfg.json", "blocks.3.hook_resid_pre/sae_weights.safetensors"):
        assert f"{(tmp_path / 'saes' / name).stat().st_size:,}  {name}\n" in out
    assert "5 files, " in out and out.endswith(" bytes in saes; nothing was uploaded\n")
    assert "Some *words*." in (tmp_path / "saes" / "README.md").read_text()
    assert run("push", saved(), "--to", "me/saes", "--dry-run") == 1
    assert "folder: 'saes' is not empty" in capsys.readouterr().err


def test_push_takes_all_of_a_run_and_names(saved, tmp_path, capsys):
    for name in ("k_8", "k_9"):
        shutil.copytree(saved(), tmp_path / "run" / "sae" / name)
    from safetensors.torch import load_file, save_file

    logs = torch.full((64,), -2.0)
    save_file({"sparsity": logs}, tmp_path / "run" / "sae" / "k_9" / "sparsity.safetensors")
    arguments = ["--to", "me/saes", "--dry-run", "--folder"]
    assert run("push", tmp_path / "run", *arguments, tmp_path / "a") == 0
    hook = tmp_path / "a" / "blocks.2.hook_resid_pre"
    assert {path.name for path in hook.iterdir()} == {"k_8", "k_9"}  # at one hook: their own names are taken, too
    assert torch.allclose(load_file(hook / "k_9" / "sparsity.safetensors")["sparsity"], logs)
    assert not (hook / "k_8" / "sparsity.safetensors").exists()
    assert run("push", f"mine={saved()}", *arguments, tmp_path / "b") == 0
    assert (tmp_path / "b" / "mine" / "cfg.json").exists()
    capsys.readouterr()
    assert run("push", f"mine={saved()}", f"mine={saved(3)}", *arguments, tmp_path / "c") == 1
    assert "two would be the folder 'mine'" in capsys.readouterr().err


def test_push_uploads(saved, tmp_path, monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="transformers brings huggingface_hub")
    asked = []

    class Api:
        def create_repo(self, repo_id, **options):
            asked.append((repo_id, options))
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            asked.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert run("push", saved(), "--to", "me/saes", "--private") == 0
    assert asked == [("me/saes", {"exist_ok": True, "private": True}), "me/saes"]
    assert capsys.readouterr().out.endswith(": https://hub.example/me/saes\n")


def test_errors_are_one_line(saved, tmp_path, capsys):
    lost = saved(0, "blocks.0.hook_elsewhere", name="lost", nameless=True)
    out = tmp_path / "out"
    for said, arguments in (
        ("there is none at", ["features", tmp_path / "none", out]),
        ("give --model", ["features", lost, out]),
        ("repo_id must be 'owner/repository', got 'saes'", ["push", saved(), "--to", "saes", "--folder", out]),
        ("circuit-tracer cannot take", ["push", saved(), "--to", "a/b", "--dry-run", "--layout", "circuit-tracer",
                                        "--folder", out]),
    ):  # fmt: skip
        assert run(*arguments) == 1
        err = capsys.readouterr().err
        assert said in err and len(err.splitlines()) == 1 and not out.exists()


def test_the_only_source_of_a_joint_crosscoder_reads_all_its_sites(saved, tmp_path, capsys):
    torch.manual_seed(0)
    coder = se.Crosscoder([256, 256], [256, 256], 32, se.TopK(4))
    coder.provenance = se.Provenance(
        model="embedded", sites=("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    )  # fmt: skip
    coder.save_pretrained(tmp_path / "coder")
    page = tmp_path / "page"
    asked = ["dashboard", tmp_path / "coder", page, *TEXT, "--source", 0, "--latents", 3]
    assert run(*asked) == 0
    overview = json.loads((page / "latents.js").read_text()[len("window.saeLatents = ") : -2])
    assert overview["lenses"] == ["blocks.2.hook_resid_post", "blocks.1.hook_resid_post"]
    capsys.readouterr()
    assert run(*asked, "--layer", 1) == 1
    assert "--site: source 0 of coder reads the sites that its files name" in capsys.readouterr().err
