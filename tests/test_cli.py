"""The console command: what it prints, what it writes, how it fails."""

import json
import subprocess
import sys

import pytest

from sae_engine import cli
from sae_engine.data import EMBEDDED_FOLDER, ActivationStore, weights_sha256

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 100


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_text(TEXT)
    return str(file)


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["backends"]["reference"]["runs"] == facts["backends"]["torch"]["runs"] == "yes"
    assert facts["backends"]["triton"]["runs"] in ("natively", "interpreted", "no")
    assert facts["backends"]["triton"]["why"]
    assert "cpu" in facts["devices"]
    assert facts["embedded_model"]["sha256"] == weights_sha256(EMBEDDED_FOLDER)


def test_info_as_a_table(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "reference", "devices", weights_sha256(EMBEDDED_FOLDER)):
        assert word in out


@pytest.mark.parametrize(
    ("installed", "interpreted", "gpu", "runs", "why"),
    [
        (False, False, True, "no", "not installed"),
        (True, True, False, "interpreted", "TRITON_INTERPRET"),
        (True, False, False, "no", "no GPU"),
        (True, False, True, "natively", "H200"),
    ],
)
def test_why_triton_runs_or_not(monkeypatch, installed, interpreted, gpu, runs, why):
    import torch

    from sae_engine import _backend

    monkeypatch.setattr(_backend, "has_triton", lambda: installed)
    monkeypatch.setattr(_backend, "interprets_triton", lambda: interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    status = cli._triton_status()
    assert status["runs"] == runs
    assert why in status["why"]


def test_collect_and_again(text_file, tmp_path, capsys):
    arguments = ["collect", str(tmp_path / "out"), "--tokens", "300", "--layer", "1", "--site", "mlp_out", "--text",
                 text_file, "--dtype", "float32", "--shard-tokens", "128", "--device", "cpu"]  # fmt: skip
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "ActivationStore(300 x 256 float32, embedded layer 1 mlp_out)" in out
    assert "tok" in err  # the progress bar
    store = ActivationStore(tmp_path / "out")
    assert len(store) == 300
    assert store.manifest["text_source"] == f"files: {text_file}"
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*arguments, "--batch-size", "2"]) == 1
    assert "error: batch_size: " in capsys.readouterr().err


def test_collect_says_when_the_text_is_too_short(text_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["collect", out, "--tokens", "999999", "--text", text_file, "--device", "cpu", "--quiet"]) == 0
    assert "fewer than --tokens 999999" in capsys.readouterr().err
    assert ActivationStore(out).manifest["layer"] == 2  # two thirds of the way up


def test_fixed_texts(tmp_path):
    for word, source in (("evaluation", "evaluation text"), ("stdlib", "standard library of Python")):
        out = tmp_path / word
        assert cli.main(["collect", str(out), "--tokens", "64", "--text", word, "--device", "cpu", "--quiet"]) == 0
        assert ActivationStore(out).manifest["text_source"].startswith(source)


def test_errors_are_one_line_and_status_1(tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, message in [
        (["--text", str(tmp_path / "nowhere.txt")], "nowhere.txt"),
        (["--layer", "8"], "layer must be in 0..3, got 8"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "nobody/none", "--no-fallback"], "hub did not answer for 'nobody/none'"),
    ]:
        assert cli.main(["collect", out, "--device", "cpu", *arguments]) == 1
        err = capsys.readouterr().err
        assert err.startswith("sae-engine: error: ")
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["unknown"])


def test_interrupt_is_status_130(monkeypatch, text_file, tmp_path, capsys):
    import sae_engine.data.store as store

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "batch_rows", interrupt)
    assert cli.main(["collect", str(tmp_path / "out"), "--text", text_file, "--device", "cpu", "--quiet"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_fallback_is_said_once_on_standard_error(text_file, tmp_path):
    command = [sys.executable, "-m", "sae_engine.cli", "collect", str(tmp_path / "out"), "--model", "nobody/none",
               "--text", text_file, "--tokens", "50", "--quiet", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert line.startswith("sae-engine: WARNING: the hub did not answer for 'nobody/none'")
    assert "using the embedded model" in line
    assert "embedded layer 2" in done.stdout


def test_help_is_instant():
    code = """
import sys, sae_engine.cli
try:
    sae_engine.cli.main(["--help"])
except SystemExit:
    print("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
