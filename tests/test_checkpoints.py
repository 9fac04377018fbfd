"""Checkpoints of every format: round trips, what a format cannot hold, how formats are told apart."""

import warnings

import pytest
import torch
from checkpoint_cases import RULES, B, D, F, build, write
from safetensors.torch import save_file

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.testing import assert_same

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
    *(("gemma_scope_2", "JumpReLU", {"apply_b_dec_to_input": False, **o}) for o in ({}, {"skip": True}, {"d_out": 7})),
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
    ("gemma_scope_2", "JumpReLU", {"rescale_acts_by_decoder_norm": True, "skip": True}),
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
    ("gemma_scope_2", "TopK", {}, "TopK"),
    ("gemma_scope_2", "JumpReLU", {"normalize_activations": "layer_norm"}, "layer_norm"),
    ("batchtopk", "AbsTopK", {}, "AbsTopK"),
    ("batchtopk", "TopK", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input=False"),
    ("batchtopk", "ReLU", {"d_out": 7}, "transcoder"),
]


def ids(case):
    format, rule, options, *_ = case
    return "-".join([format, rule, *(f"{n}={v}" for n, v in options.items())])


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

    @pytest.mark.parametrize("rule", ["BatchTopK", "MutualChoice"])
    def test_what_saelens_loads_as_a_training_form_alone_is_said(self, rule, tmp_path):
        sae = build(rule)
        with pytest.warns(UserWarning, match=r"SAE\.load_from_disk refuses 'batchtopk'.* save inference_form\(sae\)"):
            sae.save_pretrained(tmp_path / "sae")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            se.inference_form(sae).save_pretrained(tmp_path / "inference")
            build("TopK").save_pretrained(tmp_path / "other")

    @pytest.mark.parametrize(("rule", "options"), [
        ("ReLU", {}), ("ReLU", {"apply_b_dec_to_input": False}), ("JumpReLU", {}),
        ("JumpReLU", {"d_out": 7, "skip": True}),
        ("TopK", {"rescale_acts_by_decoder_norm": True}), ("BatchTopK", {"rescale_acts_by_decoder_norm": True}),
    ], ids=str)  # fmt: skip
    def test_decoder_norms_folded_on_loading(self, rule, options, tmp_path):
        sae = build(rule, **options).double()
        with torch.no_grad():
            sae.W_dec.mul_(torch.rand(F, 1, dtype=torch.float64) + 0.5)
            sae.W_dec[3] = 0
            if rule == "JumpReLU":
                sae.activation.threshold.fill_(0.25)
        sae.save_pretrained(tmp_path)
        plain = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
        folded = se.SparseAutoencoder.from_pretrained(tmp_path, fold_decoder_norms=True).eval()
        norms = torch.ones(F, dtype=torch.float64)
        norms[3] = 0
        torch.testing.assert_close(folded.W_dec.detach().norm(dim=1), norms)
        assert not folded.rescale_acts_by_decoder_norm
        x = torch.randn(200, D, dtype=torch.float64)
        torch.testing.assert_close(folded(x), plain(x), rtol=0, atol=1e-13)  # as in what is folded
        scale = 1 if options.get("rescale_acts_by_decoder_norm") else plain.W_dec.norm(dim=1)
        latents = plain.encode(x).to_dense() * scale
        kept = norms.bool()
        torch.testing.assert_close(folded.encode(x).to_dense()[:, kept], latents[:, kept], rtol=0, atol=1e-13)

    def test_decoder_norms_that_cannot_be_folded(self, tmp_path):
        write("saelens", tmp_path, rule="TopK")
        with pytest.raises(ValueError, match="fold_decoder_norms must be False: TopK would keep other latents"):
            se.SparseAutoencoder.from_pretrained(tmp_path, fold_decoder_norms=True)
        with pytest.raises(TypeError, match="fold_decoder_norms"):
            se.SparseAutoencoder.from_pretrained(tmp_path, fold_decoder_norms="yes")

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
