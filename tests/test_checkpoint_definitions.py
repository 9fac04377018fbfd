"""Checkpoints mean what their formats say: formulas, conventions of centring and scaling, cards."""

import copy
import json

import numpy as np
import pytest
import torch
from checkpoint_cases import RULES, B, D, F, build, write
from safetensors.torch import load_file, save_file

import sae_engine as se
from sae_engine.checkpoints.card import SourceCard, residual_of
from sae_engine.checkpoints.convert import convert
from sae_engine.testing import assert_same


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

    @pytest.mark.parametrize("skip", [False, True])
    def test_gemma_scope_2(self, skip, tmp_path):
        g = torch.Generator().manual_seed(3)
        shapes = {"w_enc": (D, F), "w_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        t = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
        t["threshold"] = torch.rand(F, generator=g) * 2
        extra = {"affine_skip_connection": torch.randn(D, D, generator=g).double()} if skip else {}
        save_file(t | extra, tmp_path / "params.safetensors")
        cfg = {"architecture": "jump_relu", "type": "transcoder", "width": F, "model_name": "google/gemma-3-1b-pt",
               "hf_hook_point_in": "model.layers.3.mlp.input",
               "hf_hook_point_out": "model.layers.3.mlp.output"}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(cfg))
        x = torch.randn(B, D, dtype=torch.float64)
        pre = x @ t["w_enc"] + t["b_enc"]
        out = torch.where(pre > t["threshold"], pre, 0) @ t["w_dec"] + t["b_dec"]
        sae = se.SparseAutoencoder.from_pretrained(tmp_path)
        torch.testing.assert_close(sae(x), out + x @ extra["affine_skip_connection"] if skip else out)
        assert (sae.card.model_name, sae.card.hook_name) == ("google/gemma-3-1b-pt", "model.layers.3.mlp.input")
        assert "its target is model.layers.3.mlp.output" in str(sae.card)
        (tmp_path / "config.json").unlink()
        assert_same(se.SparseAutoencoder.from_pretrained(tmp_path).W_enc.detach(), sae.W_enc.detach())
        save_file(t | {"w_dec": torch.randn(F, 3, D).double()}, tmp_path / "params.safetensors")
        with pytest.raises(ValueError, match=r"w_dec has shape \(40, 3, 12\): this is a crosscoder or cross-layer"):
            se.SparseAutoencoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize("fields", [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}, {"activation_fn": "topk", "k": 4},
        {"activation_fn_str": "TopK", "k": 4, "activation_fn_kwargs": {}}, {"architecture": "topk", "k": 4},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "architecture": "standard", "metadata": {}},
    ], ids=str)  # fmt: skip
    def test_saelens_top_k_wherever_its_k_is(self, fields, tmp_path):
        write("saelens", tmp_path)
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **fields}))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert type(loaded.activation) is se.TopK and loaded.activation.k == 4

    @pytest.mark.parametrize(("fields", "complaint"), [
        ({"activation_fn_str": "topk"}, "says top-k and not how many"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "says top-k and not how many"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": "{'k': 4}"}, r"put the number .* \(activation_fn_k"),
        ({"activation_fn": "topk", "k": None}, "says top-k and not how many"),
        ({"activation_fn": "topk", "k": "four"}, "k must be an int"),
        ({"architecture": "jumprelu", "activation_fn": "topk", "k": 4}, "contradicts architecture 'jumprelu'"),
        ({"k": 4}, "says k = 4 and architecture 'standard'"),
        ({"activation_fn_str": "relu", "activation_fn_kwargs": {"k": 4}}, "says k = 4 and architecture 'standard'"),
        ({"architecture": "standard", "metadata": {}, "k": 4}, "says k = 4 and architecture 'standard'"),
        ({"architecture": "standard", "metadata": {}, "activation_fn": "tanh-relu"}, "'tanh-relu' is not supported"),
    ], ids=str)  # fmt: skip
    def test_saelens_top_k_never_becomes_another_rule(self, fields, complaint, tmp_path):
        write("saelens", tmp_path)
        (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **fields}))
        with pytest.raises(ValueError, match=complaint):
            se.SparseAutoencoder.from_pretrained(tmp_path)

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


    @pytest.mark.parametrize("absent", [("threshold",), ("k", "threshold")], ids=str)
    @pytest.mark.parametrize("said", ["AutoEncoderTopK", "BatchTopKSAE", "MatroyshkaBatchTopKSAE"])
    def test_dictionary_learning_of_2024(self, said, absent, tmp_path):
        """Without buffers that came later, and with a class's name as it was spelt."""
        rule = "TopK" if said == "AutoEncoderTopK" else "BatchTopK"
        sae = write("dictionary_learning", tmp_path, rule=rule)
        held = torch.load(tmp_path / "ae.pt", weights_only=True)
        if said == "MatroyshkaBatchTopKSAE":
            held = {"W_enc": held["encoder.weight"].T, "W_dec": held["decoder.weight"].T, "b_enc": held["encoder.bias"],
                    "b_dec": held["b_dec"], "k": held["k"], "group_sizes": torch.tensor([10, 30])}  # fmt: skip
        torch.save({name: value for name, value in held.items() if name not in absent}, tmp_path / "ae.pt")
        trainer = {"trainer_class": "Trainer", "dict_class": said, "k": sae.activation.k}
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert type(loaded.activation) is type(sae.activation) and loaded.activation.k == sae.activation.k
        assert_same(loaded.W_enc.detach(), sae.W_enc.detach())
        if rule == "BatchTopK":
            assert loaded.activation.threshold == -1  # never learned: .eval() says so
        del trainer["k"]
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        if "k" in absent:
            with pytest.raises(ValueError, match=r"holds no k: put it into config\.json beside it, as trainer\.k"):
                se.SparseAutoencoder.from_pretrained(tmp_path)
        else:
            assert se.SparseAutoencoder.from_pretrained(tmp_path).activation.k == sae.activation.k


class TestConventions:
    def test_the_factor_of_a_training_run_lies_beside_its_weights(self, tmp_path):
        sae = write("saelens", tmp_path, rule="ReLU")
        cfg = {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": {},
               "normalize_activations": "expected_average_only_in"}  # fmt: skip
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        scaler = tmp_path / "activation_scaler.json"
        scaler.write_text('{"scaling_factor": 0.25}')
        x = torch.randn(B, D)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        # a power of 2 changes no rounding
        torch.testing.assert_close(loaded(x), sae(x * 0.25) / 0.25, rtol=0, atol=0)
        assert "0.25 times" in loaded.card.normalization
        by_argument = se.SparseAutoencoder.from_pretrained(tmp_path, activation_scale=0.5)
        torch.testing.assert_close(by_argument(x), sae(x * 0.5) / 0.5, rtol=0, atol=0)
        scaler.write_text('{"scaling_factor": null}')
        with pytest.raises(ValueError, match=r"neither it nor activation_scaler\.json says by how much: pass"):
            se.SparseAutoencoder.from_pretrained(tmp_path)
        for wrong in ('"0.25"', "0", "-1", "NaN", "true"):
            scaler.write_text(f'{{"scaling_factor": {wrong}}}')
            with pytest.raises(ValueError, match=r"activation_scaler\.json: scaling_factor must be a positive number"):
                se.SparseAutoencoder.from_pretrained(tmp_path)

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
