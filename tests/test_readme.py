"""The README's lines run as they stand; its commands and links are held by tests/test_docs.py."""
import re
from pathlib import Path

import pytest
import torch

import sae_engine as se

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
        "b_dec": b_dec, "d_sae": 256, "d_in": 16, "sae": se.SparseAutoencoder(16, 256, se.TopK(64)),
    }  # fmt: skip
    (lines,) = [block for block in BLOCKS if "SparseDecoder(" in block]
    exec(lines, names)
    assert names["x_hat"].shape == x.shape
    assert names["self"].activation(names["pre"]).shape == names["pre"].shape
    assert {"loss", "fvu", "l0", "dead", "grad_norm"} <= names["step"](x).keys()


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 130
