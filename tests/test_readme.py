"""The README's example runs as it stands, and what it calls exists."""
import re
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine.data import load_language_model

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.no_poison
def test_the_example_on_real_activations(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    lines = BLOCKS[0].replace("200 * 1024", "40 * 1024")  # the example, a fifth as long
    assert lines != BLOCKS[0]
    exec(lines, names)
    fvu = float(re.search(r"FVU ([\d.]+)", capsys.readouterr().out).group(1))
    assert fvu < 0.5  # it has learned: the mean alone leaves 1.0


def test_the_drop_in_lines():
    class Self:
        pass

    x, W_enc, b_enc, W_dec, b_dec = (torch.randn(s) for s in ((5, 16), (16, 256), (256,), (256, 16), (16,)))
    names = {
        "self": Self(), "se": se, "pre": x @ W_enc, "x": x, "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec,
        "b_dec": b_dec, "d_sae": 256, "d_in": 16,
    }  # fmt: skip
    (lines,) = [block for block in BLOCKS if "SparseDecoder(" in block]
    exec(lines, names)
    assert names["x_hat"].shape == x.shape
    assert names["self"].activation(names["pre"]).shape == names["pre"].shape


def test_the_lines_on_checkpoints(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hub" / "blocks.8.hook_resid_pre"
    se.SparseAutoencoder(16, 64, se.ReLU()).save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    names = {"se": se}
    (lines,) = [block for block in BLOCKS if "save_pretrained(" in block]
    exec(lines, names)
    assert "mean-centred" in capsys.readouterr().out
    assert se.SparseAutoencoder.from_pretrained("mine").card == names["sae"].card


def test_the_lines_on_latents(tmp_path, monkeypatch, capsys):
    (lines,) = [block for block in BLOCKS if "max_activating(" in block]
    lm = load_language_model()
    sae = se.SparseAutoencoder(lm.d_model, 400, se.TopK(200))
    sae.provenance = se.Provenance(model="embedded", layer=2, site="resid_pre")
    se.latents.collect(sae, lm, ["Some text, of twelve tokens or so."], tmp_path / "OUT", progress=False)
    monkeypatch.chdir(tmp_path)
    exec(lines, {"se": se, "sae": sae, "lm": lm})
    found, _, generated = capsys.readouterr().out.partition("\n")
    assert "«" in found and generated.startswith("The")


def test_the_lines_on_a_training_step():
    (lines,) = [block for block in BLOCKS if "TrainStep(" in block]
    names = {"se": se, "sae": se.SparseAutoencoder(16, 64, se.TopK(4)), "batches": torch.randn(3, 8, 16)}
    exec(lines, names)
    assert {"loss", "fvu", "l0", "dead", "grad_norm"} <= names["report"].keys()


def test_the_configuration_of_a_run(tmp_path):
    (lines,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text(lines, encoding="utf-8")
    config = se.training.TrainConfig.from_yaml(tmp_path / "run.yaml")
    assert [sae.architecture.k for sae in config.expanded().saes] == [32, 64, 128]
    assert config.data.training_tokens == 500_000_000


@pytest.mark.gpu
def test_the_lines_on_cuda_graphs():
    (lines,) = [block for block in BLOCKS if "CapturedStep" in block]
    step = se.training.TrainStep(se.SparseAutoencoder(16, 64, se.TopK(4), device="cuda"), lr=1e-3)
    names = {"se": se, "step": step, "batches": torch.randn(5, 8, 16, device="cuda")}
    exec(lines, names)
    assert step.calls == 5 and float(names["report"]["l0"]) <= 4


def test_every_module_of_the_table_exists():
    for name in re.findall(r"^\| `(\w+)\([^|]*\|", README, re.MULTILINE):
        assert hasattr(se, name) or hasattr(se.functional, name), name


def test_the_lines_on_language_models(capsys):
    (lines,) = [block for block in BLOCKS if "sparsify(" in block]
    short = lines.replace("tokens=8192", "tokens=256").replace("tokens=4096", "tokens=256")
    assert short != lines
    exec(short, {})
    assert "perplexity" in capsys.readouterr().out
