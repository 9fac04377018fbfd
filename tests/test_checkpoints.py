"""Checkpoints of every format: round trips, what a format cannot hold, detection, conventions, cards, conversion."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_engine as se
from sae_engine import cli
from sae_engine.checkpoints import formats, hub
from sae_engine.checkpoints.card import SourceCard, residual_of
from sae_engine.checkpoints.convert import convert
from sae_engine.testing import assert_same

D, F, B = 12, 40, 9
RULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4),
    "BatchTopK": lambda: se.BatchTopK(3, threshold_lr=0.2),
    "MutualChoice": lambda: se.MutualChoice(4), "TopAFA": lambda: se.TopAFA(capacity=200 * F), "ReLU": se.ReLU,
    "JumpReLU": lambda: se.JumpReLU(F, bandwidth=0.2),
}  # fmt: skip
# Where a format holds a rule and its options as they are: ours → format → ours is then the identity.
HELD = [
    *(("saelens", rule, options) for rule in RULES for options in ({}, {"normalize_activations": "layer_norm"},
      {"normalize_activations": "center"}, {"apply_b_dec_to_input": False}, {"skip": True})),
    *(("saelens", rule, {"rescale_acts_by_decoder_norm": True}) for rule in ("TopK", "AbsTopK", "BatchTopK")),
    *(("saelens", rule, {"d_out": 7, "skip": skip}) for rule in ("TopK", "ReLU", "JumpReLU") for skip in (False, True)),
    *(("sparsify", "TopK", options) for options in ({}, {"skip": True}, {"apply_b_dec_to_input": False})),
    *(("dictionary_learning", rule, {}) for rule in ("TopK", "BatchTopK", "MutualChoice", "ReLU")),
    *(("dictionary_learning", rule, {"apply_b_dec_to_input": False}) for rule in ("ReLU", "JumpReLU")),
    ("openai", "ReLU", {}), ("openai", "TopK", {"normalize_activations": "layer_norm"}),
    ("gemma_scope", "JumpReLU", {"apply_b_dec_to_input": False}),
    *(("batchtopk", rule, {"normalize_activations": norm}) for rule in ("TopK", "BatchTopK", "MutualChoice", "TopAFA",
      "ReLU") for norm in ("none", "layer_norm", "center")),
    ("batchtopk", "JumpReLU", {"apply_b_dec_to_input": False}),
]  # fmt: skip
# What a format computes with other parameters.
FOLDED = [
    ("saelens", "ReLU", {"rescale_acts_by_decoder_norm": True}),
    ("saelens", "JumpReLU", {"rescale_acts_by_decoder_norm": True}),
    ("sparsify", "TopK", {"rescale_acts_by_decoder_norm": True}),
    ("dictionary_learning", "TopK", {"apply_b_dec_to_input": False}),
    ("dictionary_learning", "BatchTopK", {"rescale_acts_by_decoder_norm": True}),
    ("dictionary_learning", "JumpReLU", {}),
    ("openai", "ReLU", {"apply_b_dec_to_input": False}),
    ("gemma_scope", "JumpReLU", {"rescale_acts_by_decoder_norm": True}),
    ("batchtopk", "ReLU", {"apply_b_dec_to_input": False}),
    ("batchtopk", "JumpReLU", {}),
]
# What would be lost: the error has to say so.
LOST = [
    ("sparsify", "AbsTopK", {}, "AbsTopK"),
    ("sparsify", "TopK", {"normalize_activations": "layer_norm"}, "layer_norm"),
    ("sparsify", "TopK", {"d_out": 7}, "d_out=7"),
    ("dictionary_learning", "AbsTopK", {}, "AbsTopK"),
    ("dictionary_learning", "TopAFA", {}, "TopAFA"),
    ("dictionary_learning", "TopK", {"skip": True}, "skip"),
    ("dictionary_learning", "ReLU", {"normalize_activations": "center"}, "center"),
    ("openai", "JumpReLU", {}, "JumpReLU"),
    ("openai", "TopK", {}, "normalize_activations='none'"),
    ("openai", "ReLU", {"normalize_activations": "layer_norm"}, "layer_norm"),
    ("openai", "ReLU", {"skip": True}, "skip"),
    ("gemma_scope", "BatchTopK", {}, "BatchTopK"),
    ("gemma_scope", "JumpReLU", {"skip": True}, "skip"),
    ("gemma_scope", "JumpReLU", {"dtype": torch.bfloat16}, "bfloat16"),
    ("gemma_scope", "JumpReLU", {"normalize_activations": "center"}, "center"),
    ("batchtopk", "AbsTopK", {}, "AbsTopK"),
    ("batchtopk", "TopK", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input=False"),
    ("batchtopk", "ReLU", {"d_out": 7}, "transcoder"),
]


def build(rule, *, format=None, **options):
    """An autoencoder with nothing at 0, except what the format has no place for."""
    torch.manual_seed(1)
    sae = se.SparseAutoencoder(D, F, RULES[rule](), **{"decoder_init_norm": 0.7, **options})
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip") and p.requires_grad:
                p.normal_(std=0.1)
        if format == "batchtopk" and rule not in ("ReLU", "JumpReLU"):
            sae.b_enc.zero_()  # these have none there
        if rule == "JumpReLU":
            sae.activation.threshold.uniform_(0.05, 0.3)
        elif hasattr(sae.activation, "threshold"):
            sae.activation.threshold.fill_(0.123456789)  # no float32
    return sae


def ids(case):
    format, rule, options, *_ = case
    return "-".join([format, rule, *(f"{n}={v}" for n, v in options.items())])


def write(format, folder, rule=None, **options):
    """A checkpoint of a format, in ``folder``."""
    rules = {"gemma_scope": "JumpReLU", "openai": "ReLU"}
    sae = build(rule or rules.get(format, "TopK"), format=format, **options)
    sae.save_pretrained(folder, format=format)
    return sae


class TestRoundTrips:
    @pytest.mark.parametrize("case", HELD, ids=ids)
    def test_what_is_held_comes_back_bit_for_bit(self, case, tmp_path):
        format, rule, options = case
        sae = build(rule, format=format, **options)
        sae.save_pretrained(tmp_path / "sae", format=format)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "sae")
        assert formats.detect(tmp_path / "sae") == format and type(loaded.activation) is type(sae.activation)
        state, expected = loaded.state_dict(), sae.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(state[name], value)
        for option in ("d_out", "apply_b_dec_to_input", "normalize_activations", "rescale_acts_by_decoder_norm"):
            assert getattr(loaded, option) == getattr(sae, option), option
        one_file = format in ("openai", "gemma_scope")  # these have no place for what only training needs
        for option in ("k",) if one_file else ("k", "threshold_lr", "bandwidth", "capacity"):
            assert getattr(loaded.activation, option, None) == getattr(sae.activation, option, None), option
        x = torch.randn(B, D)
        assert_same(loaded.eval()(x).detach(), sae.eval()(x).detach())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "case", [c for c in HELD if not c[2] or c[0] in ("openai", "gemma_scope")], ids=ids
    )
    def test_in_every_dtype(self, case, dtype, tmp_path):
        format, rule, options = case
        if format == "gemma_scope" and dtype == torch.bfloat16:
            options = None  # numpy has none: in LOST
        if options is not None:
            sae = build(rule, format=format, **options).to(dtype)
            sae.save_pretrained(tmp_path, format=format)
            loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
            for name, value in sae.state_dict().items():
                assert_same(loaded.state_dict()[name], value)
            assert se.SparseAutoencoder.from_pretrained(tmp_path, dtype=torch.float32).W_enc.dtype == torch.float32

    @pytest.mark.parametrize("case", FOLDED, ids=ids)
    def test_what_is_folded_computes_the_same(self, case, tmp_path):
        format, rule, options = case
        sae = build(rule, format=format, **options).double()
        sae.save_pretrained(tmp_path, format=format)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        x = torch.randn(200, D, dtype=torch.float64)
        for each in (sae, loaded):
            each.eval()
        assert torch.equal(loaded.encode(x).to_dense() != 0, sae.encode(x).to_dense() != 0)
        # fp64 sums of at most 40 terms of size 1, each rounded a few times: 40 · 4 · 2**-53 is 2e-14
        torch.testing.assert_close(loaded.encode(x).to_dense(), sae.encode(x).to_dense(), rtol=0, atol=1e-13)
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("case", LOST, ids=ids)
    def test_what_would_be_lost_is_refused(self, case, tmp_path):
        format, rule, options, lost = case
        sae = build(rule, format=format, **options)
        with pytest.raises(ValueError, match=f"'{format}' cannot hold .*{lost}"):
            sae.save_pretrained(tmp_path / "new" / "sae", format=format)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("format", ["dictionary_learning", "batchtopk"])
    def test_integer_k_only(self, format, tmp_path):
        sae = se.SparseAutoencoder(D, F, se.BatchTopK(2.5))
        with pytest.raises(ValueError, match=r"fractional k=2\.5"):
            sae.save_pretrained(tmp_path / "sae", format=format)

    def test_encoder_bias_that_batchtopk_would_not_use(self, tmp_path):
        with pytest.raises(ValueError, match="an encoder bias with TopK"):
            build("TopK").save_pretrained(tmp_path / "sae", format="batchtopk")
        assert not (tmp_path / "sae").exists()

    def test_unset_threshold_stays_unset(self, tmp_path):
        for format in ("saelens", "dictionary_learning", "batchtopk"):
            sae = se.SparseAutoencoder(D, F, se.BatchTopK(3))
            sae.save_pretrained(tmp_path / format, format=format)
            loaded = se.SparseAutoencoder.from_pretrained(tmp_path / format).eval()
            with pytest.raises(RuntimeError, match="threshold is unset"):
                loaded(torch.randn(2, D))

    @pytest.mark.parametrize(("format", "name"), [("openai", "8.pt"), ("gemma_scope", "params.npz")])
    def test_formats_of_one_file_take_its_name(self, format, name, tmp_path):
        options = {"apply_b_dec_to_input": False} if format == "gemma_scope" else {}
        sae = build("JumpReLU" if format == "gemma_scope" else "ReLU", **options)
        sae.save_pretrained(tmp_path / "deep" / name, format=format)
        assert [p.name for p in (tmp_path / "deep").iterdir()] == [name]
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "deep" / name)
        assert_same(loaded.W_enc.detach(), sae.W_enc.detach())

    def test_arguments_are_checked(self, tmp_path):
        sae = write("saelens", tmp_path / "sae")
        with pytest.raises(ValueError, match="format must be one of"):
            sae.save_pretrained(tmp_path / "other", format="auto")
        with pytest.raises(ValueError, match="format must be one of"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "sae", format="sae_lens")
        with pytest.raises(ValueError, match="residual must be one of"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "sae", residual="centred")
        with pytest.raises(ValueError, match="activation_scale must be None"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "sae", activation_scale=2.0)
        write("sparsify", tmp_path / "other")
        with pytest.raises(ValueError, match="activation_scale must be None"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "other", activation_scale=2.0)
        with pytest.raises(ValueError, match="holds no checkpoint of the format 'openai'"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "sae", format="openai")


class TestDetection:
    @pytest.mark.parametrize("format", formats.FORMATS)
    def test_by_content_under_any_name(self, format, tmp_path):
        sae = write(format, tmp_path)
        for number, file in enumerate(sorted(tmp_path.iterdir())):
            file.rename(tmp_path / f"file{number}{'.json' if file.suffix == '.json' else '.bin'}")
        (tmp_path / "README.md").write_text("# a model")
        save_file({"sparsity": torch.zeros(F)}, tmp_path / "sparsity.safetensors")
        torch.save({"step": torch.zeros(1)}, tmp_path / "optimizer.pt")
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
        assert formats.detect(tmp_path) == format
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert_same(loaded.W_dec.detach(), sae.W_dec.detach())

    @pytest.mark.parametrize("format", formats.FORMATS)
    def test_a_file_of_weights_finds_its_configuration(self, format, tmp_path):
        sae = write(format, tmp_path)
        (file,) = [p for p in tmp_path.iterdir() if p.suffix != ".json"]
        assert formats.detect(file) == format
        assert_same(se.SparseAutoencoder.from_pretrained(str(file)).W_dec.detach(), sae.W_dec.detach())

    def test_several_checkpoints_have_to_be_named(self, tmp_path):
        write("gemma_scope", tmp_path)
        (tmp_path / "second.npz").write_bytes((tmp_path / "params.npz").read_bytes())
        with pytest.raises(ValueError, match=r"several checkpoints.*second\.npz.*name one"):
            formats.detect(tmp_path)
        assert formats.detect(tmp_path / "second.npz") == "gemma_scope"

    def test_a_second_format_beside_a_configuration(self, tmp_path):
        write("saelens", tmp_path)
        write("gemma_scope", tmp_path)
        with pytest.raises(ValueError, match=r"may have any of the formats \['saelens', 'gemma_scope'\]: name one"):
            formats.detect(tmp_path)

    def test_several_formats_have_to_be_named(self, tmp_path):
        write("gemma_scope", tmp_path)
        write("openai", tmp_path)
        with pytest.raises(ValueError, match=r"may have any of the formats \['openai', 'gemma_scope'\]: name one"):
            formats.detect(tmp_path)
        assert type(se.SparseAutoencoder.from_pretrained(tmp_path, format="openai").activation) is se.ReLU

    def test_two_classes_with_the_same_keys_need_their_configuration(self, tmp_path):
        write("dictionary_learning", tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="AutoEncoderTopK or a BatchTopKSAE"):
            se.SparseAutoencoder.from_pretrained(tmp_path)


class TestDefinitions:
    """Formats without a package to install: against their formula, in dense PyTorch."""

    @pytest.mark.parametrize("name", ["ReLU", "TopK"])
    def test_openai(self, name, tmp_path):
        g = torch.Generator().manual_seed(3)
        W, V = torch.randn(F, D, generator=g).double(), torch.randn(D, F, generator=g).double()
        pre_bias, latent_bias = torch.randn(D, generator=g).double(), torch.randn(F, generator=g).double()
        state = {
            "pre_bias": pre_bias, "encoder.weight": W, "latent_bias": latent_bias, "decoder.weight": V,
            "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "latents_activation_frequency": torch.ones(F),
            "latents_mean_square": torch.zeros(F), "activation": name,
            "activation_state_dict": {"k": 5, "postact_fn": "ReLU"} if name == "TopK" else {},
        }  # fmt: skip
        torch.save(state, tmp_path / "6.pt")
        x = torch.randn(B, D, dtype=torch.float64) * 3 + 1
        inner, mean, std = x, 0.0, 1.0
        if name == "TopK":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            inner = (x - mean) / (std + 1e-5)
        acts = (inner - pre_bias) @ W.T + latent_bias
        if name == "TopK":
            kept = acts.topk(5, dim=-1).indices
            acts = torch.zeros_like(acts).scatter(-1, kept, acts.gather(-1, kept))
        acts = acts.relu()
        out = (acts @ V.T + pre_bias) * std + mean
        sae = se.SparseAutoencoder.from_pretrained(tmp_path / "6.pt")
        torch.testing.assert_close(sae.encode(x).to_dense(), acts)
        torch.testing.assert_close(sae(x), out)
        assert sae.card.architecture == name and sae.card.residual == "raw"

    @pytest.mark.parametrize("unit_norm", [False, True])
    @pytest.mark.parametrize("kind", ["vanilla", "topk", "batchtopk", "jumprelu", "topafa"])
    def test_batchtopk_repositories(self, kind, unit_norm, tmp_path):
        g = torch.Generator().manual_seed(3)
        W, V = torch.randn(D, F, generator=g).double(), torch.randn(F, D, generator=g).double()
        b_dec, b_enc = torch.randn(D, generator=g).double(), torch.randn(F, generator=g).double()
        log_threshold = torch.randn(F, generator=g).double()
        state = {"W_enc": W, "W_dec": V, "b_enc": b_enc, "b_dec": b_dec}
        if kind == "jumprelu":
            state["jumprelu.log_threshold"] = log_threshold
        torch.save(state, tmp_path / "sae.pt")
        cfg = {"sae_type": kind, "act_size": D, "dict_size": F, "top_k": 4, "input_unit_norm": unit_norm,
               "bandwidth": 0.001, "dtype": "torch.float64"}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        x = torch.randn(B, D, dtype=torch.float64) * 3 + 1
        inner, mean, std = x, 0.0, 1.0
        if unit_norm:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            inner = (x - mean) / (std + 1e-5)
        centred = inner if kind == "jumprelu" else inner - b_dec
        acts = (centred @ W + (b_enc if kind in ("vanilla", "jumprelu") else 0)).relu()
        if kind == "topk":
            acts = torch.where(acts >= acts.topk(4).values[:, -1:], acts, 0)
        elif kind == "batchtopk":
            acts = torch.where(acts >= acts.flatten().topk(4 * B).values[-1], acts, 0)
        elif kind == "jumprelu":
            acts = torch.where(acts > log_threshold.exp().float(), acts, 0)  # thresholds are kept in fp32
        elif kind == "topafa":
            energy = (acts * V.norm(dim=1)) ** 2
            order = energy.argsort(dim=1, descending=True)
            gap = (energy.gather(1, order).cumsum(1).sqrt() - centred.norm(dim=1, keepdim=True)).abs()
            kept = torch.arange(F) <= gap.argmin(dim=1, keepdim=True)
            acts = acts * torch.zeros_like(acts, dtype=torch.bool).scatter(1, order, kept)
        sae = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert sae.training  # the batch rule: there is no threshold yet
        torch.testing.assert_close(sae.encode(x).to_dense(), acts)
        torch.testing.assert_close(sae(x), (acts @ V + b_dec) * std + mean)
        assert ("not used" in str(sae.card)) == (kind in ("topk", "batchtopk", "topafa"))

    def test_signed_sparsify_is_by_magnitude(self, tmp_path):
        """A field of its older versions."""
        sae = write("sparsify", tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        del cfg["sae_engine"]
        (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "signed": True}))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert type(loaded.activation) is se.AbsTopK and loaded.activation.k == 4
        assert_same(loaded.W_enc.detach(), sae.W_enc.detach())

    def test_gemma_scope(self, tmp_path):
        rng = np.random.default_rng(3)
        arrays = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
        threshold = rng.uniform(0, 2, F).astype(np.float32)
        np.savez_compressed(tmp_path / "params.npz", threshold=threshold, **arrays)
        x = torch.randn(B, D, dtype=torch.float64)
        W_enc, W_dec, b_enc, b_dec = (torch.from_numpy(a).double() for a in arrays.values())
        pre = x @ W_enc + b_enc
        acts = torch.where(pre > torch.from_numpy(threshold), pre, 0)
        sae = se.SparseAutoencoder.from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(sae.encode(x).to_dense(), acts)
        torch.testing.assert_close(sae(x), acts @ W_dec + b_dec)

    def test_saelens_before_version_6(self, tmp_path):
        """As the GPT-2 releases of 2024 are: no architecture, hook_point, a scaling_factor of 1."""
        sae = write("saelens", tmp_path, rule="ReLU")
        file = tmp_path / "sae_weights.safetensors"
        save_file(load_file(file) | {"scaling_factor": torch.ones(F)}, file)
        cfg = {
            "d_in": D, "d_sae": F, "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre",
            "dtype": "torch.float32", "device": "mps", "l1_coefficient": 8e-5, "normalize_activations": False,
        }  # fmt: skip
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert_same(loaded.W_enc.detach(), sae.W_enc.detach())
        assert type(loaded.activation) is se.ReLU and loaded.apply_b_dec_to_input
        assert (loaded.card.model_name, loaded.card.hook_name) == ("gpt2-small", "blocks.8.hook_resid_pre")
        assert loaded.card.residual == "unknown"
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        assert se.SparseAutoencoder.from_pretrained(tmp_path).activation.k == 3
        save_file(load_file(file) | {"scaling_factor": torch.full((F,), 2.0)}, file)
        with pytest.raises(ValueError, match="scaling_factor is not 1"):
            se.SparseAutoencoder.from_pretrained(tmp_path)


    def test_saelens_log_threshold(self, tmp_path):
        """Of its JumpReLU in training, before version 6."""
        sae = write("saelens", tmp_path, rule="JumpReLU")
        file = tmp_path / "sae_weights.safetensors"
        tensors = load_file(file)
        tensors["log_threshold"] = tensors.pop("threshold").double().log()
        save_file(tensors, file)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert_same(loaded.activation.threshold.detach(), sae.activation.threshold.detach())


class TestConventions:
    def test_centring_takes_raw_and_centred_residuals(self, tmp_path):
        """An SAE of a mean-centred stream, given the raw one, computes what it was trained to, plus the mean."""
        sae = build("TopK").double()
        x = torch.randn(B, D, dtype=torch.float64) + 5 * torch.randn(B, 1, dtype=torch.float64)
        mean = x.mean(-1, keepdim=True)
        sae.save_pretrained(tmp_path)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path, residual="mean-centred")
        assert loaded.normalize_activations == "center" and loaded.card.residual == "mean-centred"
        assert_same(loaded.encode(x).to_dense(), sae.encode(x - mean).to_dense())
        torch.testing.assert_close(loaded(x), sae(x - mean) + mean)
        torch.testing.assert_close(loaded(x - mean), sae(x - mean))
        assert (loaded(x) - x).norm() < 0.7 * (sae(x) - x).norm()  # what a wrong convention costs

    @pytest.mark.parametrize(
        ("kwargs", "hook", "model", "residual"),
        [
            ({"center_writing_weights": True}, "blocks.8.hook_resid_pre", "gpt2-small", "mean-centred"),
            ({"center_writing_weights": True}, "blocks.8.mlp.hook_post", "gpt2-small", "raw"),
            ({"center_writing_weights": True}, "blocks.8.hook_resid_pre", "google/gemma-2-2b", "raw"),
            ({"center_writing_weights": False}, "blocks.8.hook_resid_pre", "gpt2-small", "raw"),
            (None, "blocks.8.hook_resid_pre", "gpt2-small", "unknown"),
        ],
    )
    def test_what_saelens_metadata_says(self, kwargs, hook, model, residual, tmp_path):
        write("saelens", tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        cfg["metadata"] = {"model_name": model, "hook_name": hook, "model_from_pretrained_kwargs": kwargs}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert loaded.card.residual == residual
        assert loaded.normalize_activations == ("center" if residual == "mean-centred" else "none")
        loaded.save_pretrained(tmp_path / "again")
        metadata = json.loads((tmp_path / "again" / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["hook_name"]) == (model, hook)
        said = metadata.get("model_from_pretrained_kwargs")
        assert said == {"raw": {"center_writing_weights": False}, "unknown": None,
                        "mean-centred": {"center_writing_weights": True}}[residual]  # fmt: skip

    def test_a_transcoder_is_not_centred(self, tmp_path):
        """Its output is no residual stream of the same mean."""
        sae = build("ReLU", d_out=7)
        sae.save_pretrained(tmp_path)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path, residual="mean-centred")
        assert loaded.normalize_activations == "none" and loaded.card.residual == "mean-centred"

    def test_batchtopk_repositories_centre_gpt2(self, tmp_path):
        write("batchtopk", tmp_path)
        cfg = json.loads((tmp_path / "config.json").read_text())
        del cfg["sae_engine"]
        cfg |= {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre"}
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        assert se.SparseAutoencoder.from_pretrained(tmp_path).normalize_activations == "center"
        raw = se.SparseAutoencoder.from_pretrained(tmp_path, residual="raw")
        assert raw.normalize_activations == "none" and raw.card.residual == "raw"
        (tmp_path / "config.json").write_text(json.dumps(cfg | {"input_unit_norm": True}))
        normed = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert normed.normalize_activations == "layer_norm" and normed.card.residual == "mean-centred"

    @pytest.mark.parametrize("rescaled", [False, True])
    @pytest.mark.parametrize("rule", RULES)
    def test_expected_average_scaling_is_folded(self, rule, rescaled, tmp_path):
        scale = 0.37
        sae = build(rule, rescale_acts_by_decoder_norm=rescaled and rule in ("TopK", "AbsTopK", "BatchTopK")).double()
        sae.save_pretrained(tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
        with pytest.raises(ValueError, match="pass activation_scale"):
            se.SparseAutoencoder.from_pretrained(tmp_path)
        for wrong in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="activation_scale must be positive"):
                se.SparseAutoencoder.from_pretrained(tmp_path, activation_scale=wrong)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path, activation_scale=scale).eval()
        sae.eval()
        x = torch.randn(50, D, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), sae(x * scale) / scale)
        latents = sae.encode(x * scale).to_dense() / (scale if sae.rescale_acts_by_decoder_norm else 1)
        torch.testing.assert_close(loaded.encode(x).to_dense(), latents)
        assert "0.37 times the activations, folded" in str(loaded.card)

    @pytest.mark.parametrize("rule", RULES)
    def test_inference_form_computes_the_same(self, rule, tmp_path):
        sae = build(rule, rescale_acts_by_decoder_norm=rule == "BatchTopK").double().eval()
        sae.save_pretrained(tmp_path / "trained")
        convert(tmp_path / "trained", tmp_path / "inferring", to="saelens", inference=True)
        inferring = se.SparseAutoencoder.from_pretrained(tmp_path / "inferring").eval()
        is_batch = isinstance(sae.activation, se.BatchTopK)
        assert not (is_batch and inferring.rescale_acts_by_decoder_norm)
        assert type(inferring.activation) is (se.JumpReLU if is_batch else type(sae.activation))
        x = torch.randn(200, D, dtype=torch.float64)
        torch.testing.assert_close(inferring.encode(x).to_dense(), sae.encode(x).to_dense())
        torch.testing.assert_close(inferring(x), sae(x))
        if is_batch:
            se.SparseAutoencoder(D, F, se.BatchTopK(3)).save_pretrained(tmp_path / "new")
            with pytest.raises(RuntimeError, match="threshold is unset"):
                convert(tmp_path / "new", tmp_path / "not made", to="saelens", inference=True)
            assert not (tmp_path / "not made").exists()


class TestCard:
    CARD = SourceCard(
        "sparsify", "SparseCoder", source="a/b@123/layers.3", model_name="gpt2", hook_name="blocks.3.hook_resid_pre",
        normalization="center", residual="mean-centred", notes=("One note.",),
    )  # fmt: skip

    def test_prints(self):
        text = str(self.CARD)
        words = ("sparsify (SparseCoder), a/b@123/layers.3", "gpt2", "blocks.3", "added back", "over d", "One note")
        assert all(word in text for word in words)
        assert len(text.splitlines()) == 6

    @pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "batchtopk"])
    def test_is_saved_along(self, format, tmp_path):
        sae = build("TopK", format=format)
        assert sae.card is None
        sae.card = SourceCard("sparsify", "SparseCoder", notes=("One note.",))
        sae.save_pretrained(tmp_path, format=format)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert loaded.card == sae.card and copy.deepcopy(loaded).card == sae.card

    @pytest.mark.parametrize(
        "value",
        [None, 3, [], {}, {"format": "a"}, {"format": "a", "architecture": 3}, {"format": None, "architecture": "b"},
         *({"format": "a", "architecture": "b", **junk} for junk in ({"x": "y"}, {"notes": "text"}, {"notes": [1]}))],
        ids=str,
    )  # fmt: skip
    def test_junk_is_no_card(self, value):
        assert SourceCard.from_dict(value) is None

    def test_dictionaries_come_back(self):
        assert SourceCard.from_dict(json.loads(json.dumps(self.CARD.to_dict()))) == self.CARD
        assert residual_of(None, None, True) == "mean-centred" and residual_of(None, None, None) == "unknown"


class TestHub:
    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """A hub with one repository; what was asked of it."""
        snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
        write("saelens", snapshot / "layers.3", rule="ReLU")
        write("gemma_scope", snapshot / "layer_0" / "width_16k")
        asked = []

        def snapshot_download(repository, **kwargs):
            asked.append((repository, kwargs))
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    def test_a_folder_of_a_repository(self, served):
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layers.3")
        assert loaded.card.source == "a/b@0123abc/layers.3"
        ((repository, asked),) = served
        assert repository == "a/b" and asked["ignore_patterns"] == ["layers.3/*/*"]
        assert set(asked["allow_patterns"]) == {f"layers.3/*{s}" for s in (".json", ".safetensors", ".pt", ".npz")}

    def test_a_file_of_a_repository(self, served):
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layer_0/width_16k/params.npz")
        assert type(loaded.activation) is se.JumpReLU
        assert served[0][1]["allow_patterns"] == ["layer_0/width_16k/params.npz", "layer_0/width_16k/*.json"]

    def test_what_is_not_there(self, served, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"'a/b' holds no 'layers\.4'"):
            se.SparseAutoencoder.from_pretrained("a/b/layers.4")
        with pytest.raises(ValueError, match="holds no checkpoint of a known format"):
            se.SparseAutoencoder.from_pretrained("a/b")  # its folders were not named

    def test_known_releases_are_centred(self, served, monkeypatch):
        assert se.SparseAutoencoder.from_pretrained("a/b/layers.3").normalize_activations == "none"
        monkeypatch.setattr(hub, "CENTRED", {"a/b"})
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layers.3")
        assert loaded.normalize_activations == "center" and loaded.card.residual == "mean-centred"
        assert se.SparseAutoencoder.from_pretrained("a/b/layers.3", residual="raw").normalize_activations == "none"

    @pytest.mark.parametrize(
        "name", ["nowhere", "./a/b", "/a/b", "../a/b", "a/../b", "a/b/../../c", "~/a/b", "a/b/*", "a//b"]
    )
    def test_what_is_no_name_is_a_path(self, name, served):
        with pytest.raises(FileNotFoundError, match="path must be a folder or a file of weights"):
            se.SparseAutoencoder.from_pretrained(name)
        with pytest.raises(FileNotFoundError):
            se.SparseAutoencoder.from_pretrained(Path("a/b/layers.3"))  # a Path is never a name
        assert served == []

    def test_without_a_network(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ConnectionError, match="path='nobody/none' is not here, and the hub did not give it"):
            se.SparseAutoencoder.from_pretrained("nobody/none")

    def test_a_refusing_hub(self, monkeypatch):
        from huggingface_hub.errors import HFValidationError

        def refuse(*args, **kwargs):
            raise HFValidationError("no such name\nmore")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(FileNotFoundError, match=r"neither here nor on the hub: no such name$"):
            se.SparseAutoencoder.from_pretrained("nobody/none")


class TestConvert:
    def convert(self, *arguments):
        return cli.main(["convert", *map(str, arguments)])

    # A file of each format, into another that holds it.
    @pytest.mark.parametrize(
        ("origin", "rule", "options", "target"),
        [
            ("saelens", "TopK", {}, "sparsify"),
            ("sparsify", "TopK", {}, "dictionary_learning"),
            ("dictionary_learning", "JumpReLU", {"apply_b_dec_to_input": False}, "gemma_scope"),
            ("gemma_scope", "JumpReLU", {"apply_b_dec_to_input": False}, "saelens"),
            ("openai", "TopK", {"normalize_activations": "layer_norm"}, "saelens"),
            ("batchtopk", "TopK", {}, "saelens"),
            ("saelens", "ReLU", {}, "openai"),
            ("saelens", "TopAFA", {"normalize_activations": "layer_norm"}, "batchtopk"),
        ],
    )
    def test_there_and_back_is_exact(self, origin, rule, options, target, tmp_path, capsys):
        sae = write(origin, tmp_path / "a", rule=rule, **options)
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", target) == 0
        out = capsys.readouterr().out
        assert f"{target}, {rule}, d_in {D}, d_sae {F}" in out and f"from           {origin}" in out
        assert formats.detect(tmp_path / "b") == target
        assert self.convert(tmp_path / "b", tmp_path / "c", "--format", origin, "--from", target) == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "c")
        for name, value in sae.state_dict().items():
            assert_same(loaded.state_dict()[name], value)

    def test_batchtopk_for_inference(self, tmp_path, capsys):
        sae = write("saelens", tmp_path / "a", rule="BatchTopK").eval()
        assert self.convert(tmp_path / "a", tmp_path / "b.npz", "--format", "gemma_scope") == 1
        assert "cannot hold the rule BatchTopK" in capsys.readouterr().err
        assert not (tmp_path / "b.npz").exists()
        assert self.convert(tmp_path / "a", tmp_path / "b.npz", "--format", "gemma_scope", "--inference") == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "b.npz")
        x = torch.randn(B, D)
        # fp32, b_dec folded: one more rounding of sums of 12 terms of size 1
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=1e-5)

    def test_nothing_is_overwritten_unless_forced(self, tmp_path, capsys):
        write("saelens", tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "sae.safetensors").write_text("mine")
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", "sparsify") == 1
        assert "exists" in capsys.readouterr().err
        assert (tmp_path / "b" / "sae.safetensors").read_text() == "mine"
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", "sparsify", "--force") == 0
        assert formats.detect(tmp_path / "b") == "sparsify"
        (tmp_path / "empty").mkdir()
        assert self.convert(tmp_path / "a", tmp_path / "empty", "--format", "sparsify") == 0

    @pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "batchtopk", "gemma_scope"])
    def test_whole_or_not_at_all(self, format, tmp_path, monkeypatch):
        write("gemma_scope", tmp_path / "a") if format == "gemma_scope" else write(format, tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "cfg.json").write_text("mine")

        def fails(*args, **kwargs):
            raise OSError("disk full")

        for writer in ("safetensors.torch.save_file", "pathlib.Path.write_text", "torch.save", "numpy.savez"):
            with monkeypatch.context() as broken:
                broken.setattr(writer, fails)
                for target in ("b", "new/folder"):
                    status = self.convert(tmp_path / "a", tmp_path / target, "--format", format, "--force")
                    if status == 0:  # a writer that this format does not use
                        break
                else:
                    assert [p.name for p in (tmp_path / "b").iterdir()] == ["cfg.json"]
                    assert (tmp_path / "b" / "cfg.json").read_text() == "mine"
                    assert not (tmp_path / "new").exists()
                    return
            for file in (tmp_path / "b").iterdir():
                file.unlink()
            (tmp_path / "b" / "cfg.json").write_text("mine")
        pytest.fail("no writer was used")

    def test_options_of_the_source(self, tmp_path):
        write("saelens", tmp_path / "a")
        cfg = json.loads((tmp_path / "a" / "cfg.json").read_text()) | {"normalize_activations": True}  # of version 5
        (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
        arguments = (tmp_path / "a", tmp_path / "b", "--format", "saelens")
        assert self.convert(*arguments) == 1
        assert self.convert(*arguments, "--activation-scale", "0.5", "--residual", "mean-centred") == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "b")
        assert loaded.normalize_activations == "center" and "0.5 times" in loaded.card.normalization
