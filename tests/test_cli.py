"""The console command: what it prints, what it writes, how it fails."""

import json
import shutil
import subprocess
import sys

import pytest
import transformers

from sae_engine import cli
from sae_engine.cli import info
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


def test_how_the_model_is_loaded(text_file, tmp_path, monkeypatch, capsys):
    seen = {}

    def load(folder, **options):
        seen.update(options)
        options.pop("device_map", None), options.pop("quantization_config", None)  # accelerate, bitsandbytes
        return original(folder, **options)

    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr("sae_engine.data.loading.require_installed", lambda *_: None)
    arguments = ["collect", str(tmp_path / "out"), "--tokens", "20", "--text", text_file, "--quiet",
                 "--batch-size", "1", "--context-length", "16", "--model-dtype", "bfloat16", "--trust-remote-code",
                 "--device-map", '{"": "cpu"}', "--attn-implementation", "eager", "--quantization", "8bit"]  # fmt: skip
    assert cli.main([*arguments, "--model-kwargs", '{"low_cpu_mem_usage": true}']) == 0
    assert ActivationStore(tmp_path / "out").manifest["model_dtype"] == "bfloat16"
    assert (seen["device_map"], seen["attn_implementation"], seen["trust_remote_code"]) == ({"": "cpu"}, "eager", True)
    assert (seen["quantization_config"], seen["low_cpu_mem_usage"]) == ({"load_in_8bit": True}, True)
    capsys.readouterr()
    assert cli.main([*arguments, "--model-kwargs", '{"attn_implementation": "sdpa"}']) == 1
    assert "--model-kwargs: --attn-implementation says 'attn_implementation' as well" in capsys.readouterr().err


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

    from sae_kernels import dispatch

    monkeypatch.setattr(dispatch, "has_triton", lambda: installed)
    monkeypatch.setattr(dispatch, "interprets_triton", lambda: interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    status = info.triton_status()
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


@pytest.mark.parametrize(
    ("arguments", "layer", "site", "width"),
    [
        (["--site", "blocks.1.hook_attn_out"], 1, "attn_out", 256),
        (["--site", "transformer.h.1"], 1, "resid_post", 256),
        (["--site", "z", "--layer", "1"], 1, "z", 256),
        (["--site", "transformer.h.1.mlp.c_proj:input"], 1, "mlp.c_proj:input", 1024),
        (["--site", "transformer.ln_f"], None, "transformer.ln_f", 256),
    ],
)
def test_sites_by_any_name(text_file, tmp_path, arguments, layer, site, width):
    out = str(tmp_path / "out")
    options = ["--tokens", "40", "--text", text_file, "--device", "cpu", "--quiet"]
    assert cli.main(["collect", out, *options, *arguments]) == 0
    store = ActivationStore(out)
    assert (store.manifest["layer"], store.manifest["site"], store.d_model) == (layer, site, width)
    assert store.tensor().shape == (40, width)


def test_several_sites_go_to_a_folder_each(text_file, tmp_path, capsys):
    arguments = ["collect", str(tmp_path / "out"), "--tokens", "40", "--text", text_file, "--device", "cpu", "--quiet",
                 "--site", "resid_pre", "--site", "blocks.1.hook_mlp_out", "--dtype", "int8"]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in out] == [
        str(tmp_path / "out" / name) for name in ("blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out")]  # fmt: skip
    assert "ActivationStore(40 x 256 int8, embedded layer 2 resid_pre)" in out[0]
    assert len(ActivationStore(tmp_path / "out" / "blocks.1.hook_mlp_out")) == 40


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
        (["--model", "nobody/none"], "hub did not answer for 'nobody/none'"),
        (["--device", "gpu"], "device must be a device's name"),
        (["--device", "cuda:99"], "device: 'cuda:99' cannot be used on this machine"),
        (["--model", ""], "name_or_path must name"),
        (["--text", "stdlib", __file__], "--text: the word 'stdlib' stands alone"),
        (["--text", __file__, "--separator", "sep"], "separator must be a token id or one of"),
        (["--text", __file__, "--exclude", "pad"], "exclude_tokens: the tokenizer of 'embedded' has no PAD token"),
        (["--text", __file__, "--exclude-positions", "-1"], "exclude_positions must be in 0..255, got -1"),
        (["--text", __file__, "--extend"], "no collection to extend"),
        (["--site", "blocks.1.hook_resid_past"], "site must be one of resid_pre"),
        (["--model-dtype", "int8"], "dtype must be float32, bfloat16"),
        (["--device-map", "auto"], "device: 'cpu' and device_map='auto' both say where the model goes"),
        (["--model-kwargs", "{attn"], "--model-kwargs: '{attn' is no JSON"),
        (["--model-kwargs", "[1]"], "--model-kwargs must be a JSON object"),
        (["--model-kwargs", '{"dtype": "bfloat16"}'], "model_kwargs: 'dtype' has an argument of its own"),
    ]:
        assert cli.main(["collect", out, "--device", "cpu", *arguments]) == 1
        err = capsys.readouterr().err
        assert err.startswith("sae-engine: error: ")
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["unknown"])


def test_a_folder_that_is_none_is_an_error(text_file, capsys):
    below = text_file + "/x"
    for out, message in (("", "out_dir must name a folder"), (text_file, "is a file"), (below, "cannot be made")):
        assert cli.main(["collect", out, "--text", text_file, "--device", "cpu", "--quiet"]) == 1
        assert message in capsys.readouterr().err


def test_collect_with_less_than_all_tokens_and_more_text(text_file, tmp_path, capsys):
    out, more = tmp_path / "out", tmp_path / "more.txt"
    more.write_text("Another text.\n" * 20)
    arguments = ["collect", str(out), "--device", "cpu", "--quiet", "--separator", "none", "--exclude", "eos", "13",
                 "--exclude-positions", "1", "2"]  # fmt: skip
    for _ in range(2):  # the same command again adds nothing
        assert cli.main([*arguments, "--text", text_file]) == 0
    first = ActivationStore(out)
    for _ in range(2):
        assert cli.main([*arguments, "--text", str(more), "--extend"]) == 0
    store = ActivationStore(out)
    assert len(store) > len(first) and store.provenance.text == f"files: {text_file}; files: {more}"
    assert store.row_tokens().positions.min() == 3 and not store.row_tokens().token_ids.eq(13).any()
    assert store.provenance.separator == "none"
    assert cli.main(["verify", str(out), str(out)]) == 0
    assert capsys.readouterr().out.count("2 shards, sound\n") == 2
    shard = out / store.manifest["shards"][0]["file"]
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    for command in (["verify", str(out)], [*arguments, "--text", str(more)]):
        assert cli.main(command) == 1
        assert "shard-00000.safetensors is damaged: its sha256" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "has no manifest.json" in capsys.readouterr().err


def test_text_without_a_token_and_a_model_without_a_tokenizer(tmp_path, capsys):
    (empty := tmp_path / "empty.txt").write_text("")
    arguments = ["collect", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--text", str(empty)]) == 1
    assert "texts: there is no text in them" in capsys.readouterr().err
    (tmp_path / "some.txt").write_text("Some text.")
    assert cli.main([*arguments, "--layer", "1", "--text", str(tmp_path)]) == 0  # the folder is in nobody's way
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_FOLDER, model, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    assert cli.main([*arguments, "--model", str(model), "--text", str(tmp_path)]) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_interrupt_is_status_130(monkeypatch, text_file, tmp_path, capsys):
    import sae_engine.data.collecting as collecting

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting, "batch_rows", interrupt)
    assert cli.main(["collect", str(tmp_path / "out"), "--text", text_file, "--device", "cpu", "--quiet"]) == 130
    assert "run the same command again" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- eval


@pytest.fixture
def sae_folder(tmp_path):
    """A function that saves a small autoencoder, on a place that its configuration may name."""
    import torch

    import sae_engine as se

    def make(name="small", hook_name=None, width=256):
        torch.manual_seed(len(name))
        folder = tmp_path / name
        se.SparseAutoencoder(width, 64, se.TopK(4)).save_pretrained(folder)
        if hook_name is not None:
            cfg = json.loads((folder / "cfg.json").read_text())
            cfg["metadata"]["hook_name"] = hook_name
            (folder / "cfg.json").write_text(json.dumps(cfg))
        return str(folder)

    return make


QUICK = ["--tokens", "200", "--context-length", "64", "--device", "cpu", "--quiet"]
PLACE = ["--layer", "2", "--site", "resid_pre"]


def test_eval_prints_a_table_and_writes_all_of_it(sae_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    out = tmp_path / "out"
    folders = [sae_folder("one"), sae_folder("other")]
    arguments = ["eval", *folders, "--normalize", "token", "--ppl", "5", "--out", str(out), "--model",
                 "embedded"]  # fmt: skip
    assert cli.main([*arguments, *PLACE, *QUICK]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    for word in (" one |", " other |", "FVU", "loss recovered", "epsilon-LBO", "CETT", "layer 2, resid_pre",
                 "per-token normalized", "evaluation text, 200 tokens", weights_sha256(EMBEDDED_FOLDER)):  # fmt: skip
        assert word in shown
    names = ["density.png", "eval.json", "eval.md", "frontier.png", "zf.png"]
    assert sorted(path.name for path in out.iterdir()) == names  # and no temporary file
    for name in names:
        assert (out / name).read_bytes().startswith(b"\x89PNG") == name.endswith(".png")
    results = json.loads((out / "eval.json").read_text())
    assert list(results) == ["one", "other"]
    assert results["one"]["sparsity"]["l0"] == 4.0
    assert len(results["one"]["norms"]["zf_points"]) == 200
    text = (out / "eval.md").read_text()
    assert "| loss recovered" in text and "![zf](zf.png)" in text
    assert results["one"]["language"] != results["other"]["language"]
    assert f"{results['other']['language']['loss_recovered']:.4f}" in text


def test_eval_without_pictures(sae_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out, folder = tmp_path / "out", sae_folder()
    assert cli.main(["eval", folder, "--out", str(out), *QUICK]) == 1
    assert "--no-figures" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["eval", folder, "--out", str(out), "--no-figures", *PLACE, *QUICK]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "eval.md"]


def test_eval_takes_the_place_that_the_configuration_names(sae_folder, capsys):
    folder = sae_folder("named", "blocks.3.hook_mlp_out")
    assert cli.main(["eval", folder, *QUICK]) == 0
    shown, err = capsys.readouterr()
    assert "layer 3, mlp_out" in shown
    assert "named: its files name no model: measured on the embedded one" in err
    assert cli.main(["eval", folder, "--layer", "1", *QUICK]) == 0
    assert "layer 1, mlp_out" in capsys.readouterr().out
    other = sae_folder("other", "blocks.1.hook_resid_pre")
    assert cli.main(["eval", folder, other, *QUICK]) == 0  # each in its own
    out = capsys.readouterr().out
    assert "named: activations: layer 3, mlp_out" in out and "other: activations: layer 1, resid_pre" in out
    assert out.count("model: ") == out.count("text: ") == 1


def test_eval_has_the_rows_that_the_files_say(tmp_path, capsys):
    """Those that the autoencoder was trained on, unless the command says otherwise."""
    import sae_engine as se

    sae = se.SparseAutoencoder(256, 64, se.TopK(4))
    sae.provenance = se.Provenance(model="embedded", layer=1, site="resid_post", context_length=48, separator="none",
                                   first_token="none", excluded=("13", "eos", "position 2"))  # fmt: skip
    sae.save_pretrained(tmp_path / "sae")
    arguments = ["eval", str(tmp_path / "sae"), "--tokens", "200", "--device", "cpu", "--quiet", "--no-figures",
                 "--out", str(tmp_path)]  # fmt: skip
    names = ("context_length", "first_positions", "separator", "first_token", "exclude_tokens", "exclude_positions")
    found = {}
    for key, said in {
        "theirs": [],
        "other": ["--context-length", "64", "--no-keep-first", "--separator", "eos", "--first-token", "bos",
                  "--exclude", "--exclude-positions"],
    }.items():  # fmt: skip
        assert cli.main([*arguments, *said]) == 0
        found[key] = json.loads((tmp_path / "eval.json").read_text())["sae"]
    settings = {key: tuple(result["setting"][name] for name in names) for key, result in found.items()}
    assert settings["theirs"] == (48, "kept", "none", "none", ["13", "eos"], [2])
    assert settings["other"] == (64, "dropped", "eos", "bos", [], [])
    shown = capsys.readouterr().out
    assert "first positions kept; first token none, separator none; without 13, eos, position 2" in shown
    assert [result["reconstruction"]["tokens"] for result in found.values()] == [200, 200]
    lm, texts = se.data.load_language_model(), se.data.evaluation_text()
    rows = se.data.stream_activations(
        lm, texts, layer=1, site="resid_post", context_length=48, drop_first=False, separator=None, first_token=None,
        exclude_tokens=[13, "eos"], exclude_positions=[2], max_tokens=200,
    )  # fmt: skip
    sae.eval()
    fvu = se.metrics.Reconstruction()
    for x in rows:
        fvu.update(sae(x), x)
    assert abs(fvu.compute()["fvu"] - found["theirs"]["reconstruction"]["fvu"]) < 1e-6  # of sums in another order


def test_eval_asks_for_the_place_that_nothing_says(sae_folder, tmp_path, capsys):
    """It guesses neither layer nor site, and one autoencoder's place is not another's."""
    silent, named = sae_folder(), sae_folder("named", "blocks.3.hook_mlp_out")
    odd = sae_folder("odd", "blocks.1.ln2.hook_normalized")
    for arguments, message in [
        ([silent], "small: its files do not say where"),
        ([named, silent], "small: its files do not say where"),
        ([silent], "give --model, --layer and --site"),
        ([silent, "--model", "embedded"], "give --layer and --site"),
        ([silent, "--layer", "1"], "give --model and --site"),
        ([odd], "(model not known, layer 1, ln2.hook_normalized): give --model and --site"),
    ]:
        assert cli.main(["eval", *arguments, *QUICK]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("format", "name"), [("dictionary_learning", "x"), ("batchtopk", "x"), ("sparsify", "x"),
                                              ("openai", "resid_post_mlp_v5_32k/1.pt")])  # fmt: skip
def test_eval_of_every_format(format, name, tmp_path, capsys):
    import sae_engine as se

    place = tmp_path / name
    normalize = "layer_norm" if format == "openai" else "none"  # which is what it means there
    sae = se.SparseAutoencoder(256, 64, se.TopK(4), normalize_activations=normalize)
    sae.provenance = se.Provenance(model="embedded", layer=1, site="resid_post", d=256)
    sae.save_pretrained(place, format)
    assert cli.main(["eval", str(place), *QUICK]) == 0  # of OpenAI's file, its name and folder say it
    assert "layer 1, resid_post" in capsys.readouterr().out


def test_eval_of_the_model_that_the_files_name(tmp_path, capsys):
    import sae_engine as se

    sae = se.SparseAutoencoder(256, 64, se.TopK(4))
    for provenance, message in [
        (se.Provenance(model="nobody/none", layer=1, site="resid_post"), "hub did not answer for 'nobody/none'"),
        (se.Provenance(model="embedded", sha256="0" * 64, layer=1, site="resid_post"), "had the sha256 " + "0" * 64),
    ]:
        sae.provenance = provenance
        sae.save_pretrained(tmp_path)
        assert cli.main(["eval", str(tmp_path), *QUICK]) == 1
        assert message in capsys.readouterr().err
        assert cli.main(["eval", str(tmp_path), "--model", "embedded", *QUICK]) == 0
        assert "layer 1, resid_post" in capsys.readouterr().out


def test_eval_of_a_transcoder(tmp_path, capsys):
    """Beside an autoencoder: each against its own target."""
    import sae_engine as se

    coder = se.SparseAutoencoder(256, 64, se.ReLU(), apply_b_dec_to_input=False, skip=True)
    coder.provenance = se.Provenance(model="embedded", layer=1, site="resid_pre")
    coder.save_pretrained(tmp_path / "coder")
    sae = se.SparseAutoencoder(256, 64, se.TopK(4))
    sae.provenance = coder.provenance
    sae.save_pretrained(tmp_path / "sae")
    folders = [str(tmp_path / "sae"), str(tmp_path / "coder")]
    assert cli.main(["eval", *folders, *QUICK]) == 1
    assert "coder: its files do not say where it can be evaluated" in (err := capsys.readouterr().err)
    assert err.endswith("give --target-site\n")
    coder.provenance = se.Provenance(model="embedded", layer=1, site="mlp_in", target_layer=1, target_site="mlp_out")
    coder.save_pretrained(tmp_path / "coder")
    out = tmp_path / "out"
    assert cli.main(["eval", *folders, "--out", str(out), *QUICK]) == 0
    assert "coder: activations: layer 1, mlp_in to layer 1, mlp_out" in capsys.readouterr().out
    results = json.loads((out / "eval.json").read_text())
    assert results["coder"]["norms"] is None and results["sae"]["norms"] is not None
    assert results["coder"]["language"]["ce_ablated"] != results["sae"]["language"]["ce_ablated"]


def test_eval_errors_are_one_line_and_write_nothing(sae_folder, tmp_path, capsys):
    out = tmp_path / "out"
    folder = sae_folder()
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "there is none at"),
        ([sae_folder("wide", width=128)], "and it is 128 wide, while 'embedded' is 256: give --model"),
        ([sae_folder("wide", width=128), "--model", "embedded"], "d_in = 256, the width of 'embedded' at"),
        ([folder, "--layer", "8"], "layer must be in 0..3, got 8"),
        ([folder, "--model", "nobody/none"], "hub did not answer for 'nobody/none'"),
        ([folder, "--ppl", "-1"], "rise must be positive"),
        ([folder, folder], "given twice"),
        ([folder, "--text", str(tmp_path / "nowhere.txt")], "nowhere.txt"),
    ]:
        assert cli.main(["eval", *PLACE, *arguments, "--out", str(out), "--no-figures", *QUICK]) == 1
        err = capsys.readouterr().err
        assert err.startswith("sae-engine: error: ")
        assert message in err
        assert err.count("\n") == 1
    assert not out.exists()


def test_eval_says_when_the_text_is_too_short(sae_folder, text_file, capsys):
    arguments = ["eval", sae_folder(), "--text", text_file, *PLACE, *QUICK, "--tokens", "999999"]
    assert cli.main(arguments) == 0
    assert "fewer than --tokens 999999" in capsys.readouterr().err


def test_what_is_no_number_is_null_in_json_and_nan_in_the_table(sae_folder, tmp_path, capsys):
    import torch

    import sae_engine as se

    folder = tmp_path / "broken"
    sae = se.SparseAutoencoder(256, 64, se.TopK(4))
    with torch.no_grad():
        sae.b_dec.fill_(float("nan"))
    sae.save_pretrained(folder)
    out = tmp_path / "out"
    assert cli.main(["eval", str(folder), "--out", str(out), "--no-figures", *PLACE, *QUICK]) == 0
    assert "nan" in capsys.readouterr().out
    result = json.loads((out / "eval.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert result["broken"]["reconstruction"]["fvu"] is None


def test_fallback_is_said_once_on_standard_error(text_file, tmp_path):
    command = [sys.executable, "-m", "sae_engine.cli", "collect", str(tmp_path / "out"), "--model",
               "nobody/none", "--fallback",
               "--text", text_file, "--tokens", "50", "--quiet", "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [line] = done.stderr.splitlines()
    assert line.startswith("sae-engine: WARNING: the hub did not answer for 'nobody/none'")
    assert "using the embedded model" in line
    assert "embedded layer 2" in done.stdout


def test_a_reader_that_goes_is_no_error():
    line = f"{sys.executable} -m sae_engine.cli info | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


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
