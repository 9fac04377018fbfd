"""Checkpoints of crosscoders: read back bit for bit, other libraries' by their own formulas, and what is refused."""

import json
import shutil

import pytest
import torch
from crosscoder_cases import MODEL, READ, forge, made, theirs
from pair_loop import SITES, WIRINGS, D, F, batch, coder
from safetensors.torch import load_file, save_file

import sae_engine as se
from sae_engine.checkpoints.convert import convert
from sae_engine.checkpoints.crosslayer import formats
from sae_engine.checkpoints.opened import opened
from sae_engine.cli import main

HELD = {  # format: wirings and rules that it holds
    "circuit_tracer_clt": [("causal", "jumprelu"), ("causal", "relu")],
    "transcoder_set": [("local", "jumprelu"), ("local", "relu")],
    "gemma_scope_2_clt": [("causal", "jumprelu"), ("each", "jumprelu")],
    "dictionary_learning_crosscoder": [("joint", "relu"), ("joint", "batch")],
}


def inputs():
    return batch(dtype=torch.float32)[0]


def assert_same(one, other):
    """Parameters, thresholds, wiring, place and results, bit for bit."""
    assert type(other) is se.Crosscoder and other.wiring == one.wiring
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    assert other.provenance == one.provenance
    assert repr(other.activation) == repr(one.activation)
    x = inputs()
    assert torch.equal(one(x), other.eval()(x))
    assert one.encode(x).values.any()


def read_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("rule", ["topk", "batch", "batches", "jumprelu", "relu", "mixed"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_own_format_holds_everything(wiring, rule, tmp_path):
    one = made(wiring, rule, skip=rule != "topk", decoder_norm="sum", rescale_acts_by_decoder_norm=rule == "batch")
    one.save_pretrained(tmp_path / "a")
    other = opened(tmp_path / "a")
    assert_same(one, other)
    assert (other.decoder_norm, other.rescale_acts_by_decoder_norm) == ("sum", rule == "batch")
    other.save_pretrained(tmp_path / "b")
    assert read_bytes(tmp_path / "a").keys() == read_bytes(tmp_path / "b").keys()
    weights = [{name: data for name, data in read_bytes(tmp_path / which).items() if name.endswith("tensors")}
               for which in ("a", "b")]  # fmt: skip
    assert weights[0] == weights[1]
    assert other.card.format == "sae_engine"


def test_own_format_holds_thresholds_below_0(tmp_path):
    one = made("causal", "jumprelu")
    with torch.no_grad():
        for source in one.sources:
            source.activation.threshold[::2] = -0.25
    one.save_pretrained(tmp_path / "ours")
    assert_same(one, opened(tmp_path / "ours"))
    one.save_pretrained(tmp_path / "theirs", format="circuit_tracer_clt")  # holds none below 0
    other, x = se.Crosscoder.from_pretrained(tmp_path / "theirs").eval(), inputs()
    assert all(source.activation.threshold.min() == 0 for source in other.sources)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(("rule", "value"), [("jumprelu", torch.nan), ("batch", -0.25), ("batch", torch.nan)])
def test_own_format_refuses_thresholds_that_no_rule_has(rule, value, tmp_path):
    one = made("causal", rule)
    with torch.no_grad():
        for source in one.sources:
            source.activation.threshold.fill_(value)
    one.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="threshold must not be negative or NaN"):
        opened(tmp_path)


def test_own_format_holds_sites_of_several_widths_and_dtypes(tmp_path):
    one = se.Crosscoder([3, 5], [4, 2, 1], 8, se.TopK(2), wiring=[((0, 2), (1, 3)), (1, (0, 2))], dtype="bfloat16")
    one.provenance = se.Provenance(model="a", sites=["x.a", "x.b"], models=["a", "b"], d=8)
    one.save_pretrained(tmp_path)
    other = se.Crosscoder.from_pretrained(tmp_path)
    assert other.wiring == one.wiring and other.b_dec.dtype == torch.bfloat16 and other.provenance == one.provenance
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert se.Crosscoder.from_pretrained(tmp_path, dtype="float32").b_dec.dtype == torch.float32


@pytest.mark.parametrize(("format", "wiring", "rule"), [(f, *each) for f, held in HELD.items() for each in held])
def test_other_formats_come_back_bit_for_bit(format, wiring, rule, tmp_path):
    one = made(wiring, rule, skip=format in ("transcoder_set", "gemma_scope_2_clt"))
    one.save_pretrained(tmp_path / "a", format=format)
    assert formats.detect(tmp_path / "a") == format
    other = se.Crosscoder.from_pretrained(tmp_path / "a")
    assert_same(one, other)
    other.save_pretrained(tmp_path / "b", format=format)
    kept = [{name: data for name, data in read_bytes(tmp_path / which).items() if name.endswith(("tensors", ".pt"))}
            for which in ("a", "b")]  # fmt: skip
    assert kept[0] == kept[1] and kept[0]


@pytest.mark.parametrize(("format", "wiring"), [(f, held[0][0]) for f, held in HELD.items() if "dict" not in f])
@pytest.mark.parametrize("decoder_norm", ["joint", "sum"])
def test_decoder_norms_are_folded_where_a_format_knows_none(format, wiring, decoder_norm, tmp_path):
    one = made(wiring, "jumprelu", rescale_acts_by_decoder_norm=True, decoder_norm=decoder_norm).double()
    one.save_pretrained(tmp_path, format=format)
    other = se.Crosscoder.from_pretrained(tmp_path).eval()
    x = inputs().double()
    assert not other.rescale_acts_by_decoder_norm
    assert torch.equal(one.encode(x).to_dense() != 0, other.encode(x).to_dense() != 0)
    # The norm of a row, and a product and a quotient by it, are rounded once each: a few eps of sums of F terms.
    torch.testing.assert_close(other(x), one(x), rtol=1e-13, atol=1e-13)


def test_a_batch_rule_is_written_as_thresholds(tmp_path):
    one = made("causal", "batch")
    one.save_pretrained(tmp_path / "training")
    with pytest.raises(ValueError, match="the rule BatchTopK, only ReLU or JumpReLU"):
        convert(tmp_path / "training", tmp_path / "theirs", to="circuit_tracer_clt")
    assert not (tmp_path / "theirs").exists()
    convert(tmp_path / "training", tmp_path / "theirs", to="circuit_tracer_clt", inference=True)
    other = se.Crosscoder.from_pretrained(tmp_path / "theirs").eval()
    x = inputs()
    assert torch.equal(other(x), one(x))  # in eval mode the batch rule is its threshold
    assert isinstance(other.activation[2], se.JumpReLU)


def test_a_set_is_its_transcoders(tmp_path):
    one, x = made("local", "jumprelu", skip=True), inputs()
    one.save_pretrained(tmp_path, format="transcoder_set")
    whole = se.Crosscoder.from_pretrained(tmp_path)(x)
    for layer in range(SITES):
        alone = se.SparseAutoencoder.from_pretrained(tmp_path / f"layer_{layer}.safetensors")
        assert type(alone) is se.SparseAutoencoder and alone.provenance.site == "resid_mid"
        torch.testing.assert_close(alone(x[:, layer]), whole[:, layer])
    with pytest.raises(ValueError, match="several checkpoints"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


def test_circuit_tracers_names_and_shapes(tmp_path):
    one = made("causal", "jumprelu")
    one.save_pretrained(tmp_path, format="circuit_tracer_clt")
    for layer in range(SITES):
        encoder = load_file(tmp_path / f"W_enc_{layer}.safetensors")
        shapes = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
        assert {name: t.shape for name, t in encoder.items()} == {f"{n}_{layer}": s for n, s in shapes.items()}
        (decoder,) = load_file(tmp_path / f"W_dec_{layer}.safetensors").values()
        assert decoder.shape == (F, SITES - layer, D)
        assert torch.equal(decoder[:, -1], one.W_dec[layer][:, -D:])
    config = (tmp_path / "config.yaml").read_text()
    assert f'model_name: "{MODEL}"' in config and 'feature_input_hook: "hook_resid_mid"' in config
    assert 'model_kind: "cross_layer_transcoder"' in config and 'feature_output_hook: "hook_mlp_out"' in config
    (tmp_path / "config.yaml").write_text(config.replace("hook_resid_mid", "mlp.hook_in", 1))  # edited by hand
    assert se.Crosscoder.from_pretrained(tmp_path).provenance.sites[1] == "blocks.1.mlp.hook_in"


def test_what_circuit_tracer_could_not_know_is_refused():
    one = made("causal", "relu")
    one.provenance = None
    with pytest.raises(ValueError, match="set its provenance"):
        one.save_pretrained("unused", format="circuit_tracer_clt")
    one.provenance = se.Provenance(sites=READ[::-1])
    with pytest.raises(ValueError, match="only one place in layers 0, 1, 2"):
        one.save_pretrained("unused", format="circuit_tracer_clt")


# ------------------------------------------------------------------------- formats by their libraries' own formulas


@pytest.mark.parametrize(("crosses", "shards"), [(True, 1), (False, 1), (True, 2)])
def test_clt_forge(crosses, shards, tmp_path):
    run, x = forge(tmp_path / "a", crosses, shards), batch()[0]
    ours = se.Crosscoder.from_pretrained(tmp_path / "a")
    assert ours.wiring == coder("causal" if crosses else "local").wiring
    assert ours.provenance.model == "gpt2" and ours.card.format == "clt_forge"
    # Folded weights are rounded to fp32 once: eps of the largest product, F + D of which are summed.
    torch.testing.assert_close(ours.double()(x), run(x), rtol=1e-5, atol=1e-5)


def test_clt_forge_that_is_not_read(tmp_path):
    forge(tmp_path / "a", shards=2)
    (tmp_path / "a" / "rank0_clt_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rank0_clt_weights.safetensors is missing"):
        se.Crosscoder.from_pretrained(tmp_path / "a")
    forge(tmp_path / "b")
    (tmp_path / "b" / "clt_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"clt_weights.safetensors is missing"):
        se.Crosscoder.from_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="format must be one of"):
        made("causal", "relu").save_pretrained(tmp_path / "c", format="clt_forge")


@pytest.mark.parametrize("scales", [None, (0.5, 2.0)])
@pytest.mark.parametrize(("id", "k"), [(1, None), (1, 4), (2, 4), (4, 4)])
def test_dictionary_learnings_crosscoders(id, k, scales, tmp_path):
    run, x = theirs(tmp_path / "a", id, k, scales), batch()[0][:, :2]
    assert formats.detect(tmp_path / "a") == "dictionary_learning_crosscoder"
    ours = opened(tmp_path / "a").double().eval()
    latents, out = run(x)
    torch.testing.assert_close(ours(x), out, rtol=1e-5, atol=1e-5)  # weights are fp32; folded ones are rounded to it
    assert torch.equal(ours.encode(x).to_dense() != 0, latents != 0) and 0 < int((latents != 0).sum()) < latents.numel()
    if k is not None:
        by_thresholds = scales is not None and id != 4
        assert isinstance(ours.activation, se.rules.PerSource if by_thresholds else se.BatchTopK)


def test_dictionary_learnings_crosscoders_that_are_not_read(tmp_path):
    theirs(tmp_path / "a", 1, 4)
    state = torch.load(tmp_path / "a" / "ae.pt")
    for change, message in (
        ({"code_normalization_id": torch.tensor(5)}, "DECOUPLED"),
        ({"decoder.bias": torch.zeros(3, D)}, "decoder.bias"), ({"surplus": torch.zeros(1)}, "surplus"),
        ({"activation_mean": torch.zeros(2, D), "activation_std": torch.ones(2, D),
          "activation_global_scale": torch.zeros(2)}, "activation_global_scale must be positive"),
    ):  # fmt: skip
        torch.save(state | change, tmp_path / "a" / "ae.pt")
        with pytest.raises(ValueError, match=message):
            se.Crosscoder.from_pretrained(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("lost", ["W_enc_0", "W_enc_1", "W_enc_2", "W_dec_0", "W_dec_1", "W_dec_2", "both of 2"])
def test_a_missing_layer_is_named(lost, tmp_path):
    made("causal", "jumprelu").save_pretrained(tmp_path, format="circuit_tracer_clt")
    for name in ["W_enc_2", "W_dec_2"] if lost == "both of 2" else [lost]:
        (tmp_path / f"{name}.safetensors").unlink()
    named = "W_enc_2" if lost == "both of 2" else lost
    with pytest.raises(ValueError, match=rf"{named}.safetensors is missing"):
        se.Crosscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("format", "wiring", "name"), [
    ("transcoder_set", "local", "layer_1"), ("gemma_scope_2_clt", "causal", "params_layer_1"),
    ("sae_engine", "causal", "source_1"),
])  # fmt: skip
def test_a_missing_file_of_other_formats_is_named(format, wiring, name, tmp_path):
    made(wiring, "jumprelu").save_pretrained(tmp_path, format=format)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name}.safetensors is missing"):
        se.Crosscoder.from_pretrained(tmp_path)


def test_a_last_file_that_is_missing_is_noticed_by_what_the_others_write(tmp_path):
    for format, name in (("gemma_scope_2_clt", "params_layer_2"), ("sae_engine", "source_2")):
        made("causal", "jumprelu").save_pretrained(tmp_path / format, format=format)
        (tmp_path / format / f"{name}.safetensors").unlink()
        with pytest.raises(ValueError, match="must be"):
            se.Crosscoder.from_pretrained(tmp_path / format)


def test_a_decoder_that_writes_where_nothing_is_wired_is_refused(tmp_path):
    made("causal", "jumprelu").save_pretrained(tmp_path, format="gemma_scope_2_clt")
    file = tmp_path / "params_layer_2.safetensors"
    held = load_file(file)
    held["w_dec"][3, 1, 2] = 1e-3
    save_file(held, file)
    with pytest.raises(ValueError, match=r"params_layer_2.*writes layers before 2, which layer 1 does not"):
        se.Crosscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("format", "wiring", "rule", "options", "message"), [
    ("circuit_tracer_clt", "each", "relu", {}, "the wiring 'each', only 'causal'"),
    ("circuit_tracer_clt", "causal", "topk", {}, "the rule TopK"),
    ("circuit_tracer_clt", "causal", "relu", {"skip": True}, "a skip connection"),
    ("transcoder_set", "causal", "relu", {}, "the wiring 'causal', only 'local'"),
    ("gemma_scope_2_clt", "causal", "relu", {}, "the rule ReLU"),
    ("gemma_scope_2_clt", "windows", "jumprelu", {}, "the wiring 'other'"),
    ("dictionary_learning_crosscoder", "causal", "relu", {}, "only 'joint'"),
    ("dictionary_learning_crosscoder", "joint", "topk", {}, "the rule TopK"),
    ("saelens", "joint", "relu", {}, "format must be one of"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(format, wiring, rule, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(wiring, rule, **options).save_pretrained(tmp_path / "a", format=format)
    assert not (tmp_path / "a").exists()


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"sites of different widths, \[4, 6\]"):
        se.Crosscoder([4, 6], [4, 6], 8, se.ReLU()).save_pretrained("unused", format="dictionary_learning_crosscoder")


def test_damaged_files_are_named(tmp_path):
    made("causal", "jumprelu").save_pretrained(tmp_path / "a", format="circuit_tracer_clt")
    for name, change, message in (
        ("W_enc_1", {"threshold_1": torch.full((F,), torch.nan)}, "threshold must not be negative or NaN"),
        ("W_enc_1", {"b_enc_1": torch.zeros(F + 1)}, "b_enc of source 1"),
        ("W_enc_1", {"W_skip_1": torch.zeros(D, D)}, "holds what the format does not have"),
        ("W_dec_1", {"W_dec_1": torch.zeros(F, SITES, D)}, "the shape of W_dec_1"),
        ("W_dec_0", {"W_dec_0": torch.zeros(F, SITES + 1, D)}, "W_enc_3.safetensors is missing"),
        ("W_dec_0", {"W_dec_0": torch.zeros(F, SITES, D, dtype=torch.int32)}, "must be a floating-point tensor"),
    ):  # fmt: skip
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        file = tmp_path / "b" / f"{name}.safetensors"
        save_file(load_file(file) | change, file)
        with pytest.raises(ValueError, match=message):
            se.Crosscoder.from_pretrained(tmp_path / "b")
    made("causal", "topk").save_pretrained(tmp_path / "ours")
    config = tmp_path / "ours" / "crosscoder.json"
    held = json.loads(config.read_text())
    for change, message in (({"format": 2}, "has the format 2"),
                            ({"rules": [["Nothing", {}]]}, "'Nothing' is not known"),
                            ({"wiring": [[[0, 1], [0, 9]]] * 3}, "cannot be built: wiring")):  # fmt: skip
        config.write_text(json.dumps(held | change))
        with pytest.raises(ValueError, match=message):
            se.Crosscoder.from_pretrained(tmp_path / "ours")


def test_autoencoders_and_crosscoders_are_told_apart(tmp_path):
    se.SparseAutoencoder(D, F, se.TopK(2)).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="holds no crosscoder"):
        se.Crosscoder.from_pretrained(tmp_path / "sae")
    made("joint", "relu").save_pretrained(tmp_path / "coder")
    with pytest.raises(ValueError, match="residual must be left out"):
        se.Crosscoder.from_pretrained(tmp_path / "coder", residual="raw")
    with pytest.raises(ValueError, match=r"is a crosscoder: Crosscoder.from_pretrained loads it"):
        se.SparseAutoencoder.from_pretrained(tmp_path / "coder")
    assert type(opened(tmp_path / "coder")) is se.Crosscoder and type(opened(tmp_path / "sae")) is se.SparseAutoencoder
    with pytest.raises(FileNotFoundError, match="path"):
        se.Crosscoder.from_pretrained(tmp_path / "nowhere")


def test_the_command_line_converts(tmp_path, capsys):
    made("causal", "jumprelu").save_pretrained(tmp_path / "ours")
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "circuit_tracer_clt"]
    assert main(arguments) == 0
    assert "circuit_tracer_clt, Crosscoder" in capsys.readouterr().out
    assert_same(made("causal", "jumprelu"), se.Crosscoder.from_pretrained(tmp_path / "theirs"))
    assert main(arguments) == 1 and "exists" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "set"), "--format", "transcoder_set"]) == 1
    assert "only 'local'" in capsys.readouterr().err
