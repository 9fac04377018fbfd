"""Checkpoints against the libraries themselves: what they write we read, what we write they read, same outputs.

`make test-interop` installs them. Everything runs in fp64 where the library allows it. Tolerances: a result is a sum of
at most F = 48 products of size 1, added in two orders, so that it may differ by 2 · 48 · eps · 48: 5e-13 in fp64, and
in fp32 3e-4, of which the 48 addends at their largest are rarely there at once.
"""
import json

import pytest
import torch
from checkpoint_cases import write_circuit_tracer, write_llama_scope

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.checkpoints.convert import convert

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
]

D, F, B = 16, 48, 64
FP64, FP32 = 5e-13, 3e-4


def peer(module, install):
    return pytest.importorskip(module, reason=f"needs {install}: make test-interop")


@pytest.fixture
def sae_lens():
    return peer("sae_lens", "sae-lens")


@pytest.fixture
def sparsify(monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # else it takes a Triton decoder, for CPU tensors too
    return peer("sparsify", "eai-sparsify")


@pytest.fixture
def dictionary_learning():
    peer("nnsight", "nnsight")
    return peer("dictionary_learning", "dictionary-learning")


def randomised(module):
    """Every parameter away from its start, thresholds positive."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.4)
            if name.endswith("threshold"):
                parameter.abs_()
    return module


def inputs(dtype=torch.float64):
    return torch.randn(B, D, dtype=dtype, generator=torch.Generator().manual_seed(7)) * 2 + 1


def assert_close(actual, expected, atol):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_computes(ours, encode, decode, x, atol):
    """The same latents kept, and to rounding the same latents and reconstructions."""
    latents = encode(x)
    mine = ours.encode(x).to_dense()
    assert torch.equal(mine != 0, latents != 0)
    assert 0 < int((mine != 0).sum()) < mine.numel()
    assert_close(mine, latents, atol)
    assert_close(ours(x), decode(latents), atol)


class TestSAELens:
    VARIANTS = (
        ("standard", {}), ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"apply_b_dec_to_input": False}), ("jumprelu", {}), ("jumprelu", {"apply_b_dec_to_input": False}),
        ("gated", {}), ("gated", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 5}), ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "normalize_activations": "layer_norm"}),
        ("abstopk", {"k": 5}), ("abstopk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("transcoder", {"d_out": 9, "apply_b_dec_to_input": False}),
        ("skip_transcoder", {"d_out": 9, "apply_b_dec_to_input": False}),
        ("jumprelu_transcoder", {"d_out": 9, "apply_b_dec_to_input": False}),
        *(("jumprelu_skip_transcoder", {"d_out": width, "apply_b_dec_to_input": False}) for width in (9, D)),
    )  # fmt: skip
    COUNTING = (
        ("topk", {"k": 5}), ("abstopk", {"k": 5}), ("batchtopk", {"k": 4.5, "topk_threshold_lr": 0.3}),
        ("matryoshka_batchtopk", {"k": 4.0, "matryoshka_widths": [12, 48]}),
    )  # fmt: skip
    TRAINED = (
        ("standard", {}), ("jumprelu", {"jumprelu_bandwidth": 0.2}), *COUNTING,
        *((architecture, options | {"rescale_acts_by_decoder_norm": False}) for architecture, options in COUNTING),
    )  # fmt: skip

    def make(self, architecture, options, training=False):
        from sae_lens import registry

        find = registry.get_sae_training_class if training else registry.get_sae_class
        sae_class, config_class = find(architecture)
        torch.manual_seed(3)
        return randomised(sae_class(config_class(d_in=D, d_sae=F, dtype="float64", **options))).eval()

    def functions(self, theirs, x):
        """Their encode and decode; a skip connection is in their forward alone."""
        return theirs.encode, lambda latents: theirs(x)

    @pytest.mark.parametrize(("architecture", "options"), VARIANTS, ids=str)
    def test_theirs_is_read(self, sae_lens, architecture, options, tmp_path):
        theirs, x = self.make(architecture, options), inputs()
        theirs.save_model(tmp_path)
        assert formats.detect(tmp_path) == "saelens"
        ours = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
        assert ours.card.architecture == architecture
        assert_computes(ours, *self.functions(theirs, x), x, FP64)

    @pytest.mark.parametrize(("architecture", "options"), [v for v in VARIANTS if v[0] != "gated"], ids=str)
    def test_ours_is_read_and_their_file_comes_back(self, sae_lens, architecture, options, tmp_path):
        theirs, x = self.make(architecture, options), inputs()
        theirs.save_model(tmp_path / "theirs")
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs").eval()
        ours.save_pretrained(tmp_path / "ours")
        again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
        assert type(again) is type(theirs) and again.cfg.architecture() == architecture
        for name, value in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[name].to(value.dtype), self.kept(name, value)), name
        if architecture.startswith("jumprelu"):
            theirs.threshold.data = self.kept("threshold", theirs.threshold.data)
        assert_computes(ours, *self.functions(again, x), x, FP64)
        assert torch.equal(again(x), theirs(x))

    @staticmethod
    def kept(name, value):
        return value.float().to(value.dtype) if name == "threshold" else value  # JumpReLU's threshold is fp32 here

    @pytest.mark.parametrize(("architecture", "options"), TRAINED, ids=str)
    def test_training_checkpoints(self, sae_lens, architecture, options, tmp_path):
        """Its training form by the batch rule, its inference export, and ours made of the training form: all one."""
        theirs, x = self.make(architecture, options, training=True), inputs()
        batched = "batchtopk" in architecture
        if batched:
            theirs.topk_threshold = torch.tensor(0.7123456789, dtype=torch.float64)
        theirs.save_model(tmp_path / "training")
        theirs.save_inference_model(tmp_path / "inference")
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "training").train(batched)
        with torch.no_grad():
            assert_computes(ours, theirs.encode, theirs.decode, x, FP64)
        if batched:
            assert ours.activation.k == options["k"]
            assert ours.activation.threshold_lr == options.get("topk_threshold_lr", 0.01)
            ours.save_pretrained(tmp_path / "ours")
            again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "ours")
            assert again.cfg.k == options["k"] and again.topk_threshold.item() == 0.7123456789
            assert torch.equal(again.encode(x), theirs.encode(x))
        if architecture == "jumprelu":
            assert ours.activation.bandwidth == 0.2
        exported = sae_lens.SAE.load_from_disk(tmp_path / "inference")
        trained = se.SparseAutoencoder.from_pretrained(tmp_path / "training").eval()
        thresholds = batched or architecture == "jumprelu"  # other rules are at inference what they are in training
        inferring = se.inference_form(trained) if thresholds else trained
        read = se.SparseAutoencoder.from_pretrained(tmp_path / "inference").eval()
        if batched:
            exported.threshold.data = exported.threshold.data.float().double()
            assert torch.equal(inferring.activation.threshold, read.activation.threshold)
            assert type(read.activation) is type(inferring.activation) is se.JumpReLU
        for each in (inferring, read):
            assert_computes(each, exported.encode, exported.decode, x, FP64)

    @pytest.mark.parametrize("rescale", [False, True])
    @pytest.mark.parametrize("architecture", ["batchtopk", "topk", "standard", "jumprelu"])
    def test_expected_average_scaling_folds_as_theirs_does(self, sae_lens, architecture, rescale, tmp_path):
        scale = 0.41
        counts = {"k": 5, "rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
        theirs = self.make(architecture, {"normalize_activations": "expected_average_only_in", **counts}, training=True)
        if architecture == "batchtopk":
            theirs.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
        theirs.save_model(tmp_path / "unfolded")
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "unfolded", activation_scale=scale)
        theirs.fold_activation_norm_scaling_factor(scale)
        theirs.save_model(tmp_path / "folded")
        folded = se.SparseAutoencoder.from_pretrained(tmp_path / "folded")
        for name, value in folded.state_dict().items():
            # one product or quotient of fp64 numbers each
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-15, atol=0, msg=name)
        x = inputs()
        with torch.no_grad():
            assert_computes(ours, theirs.encode, theirs.decode, x, FP64)

    def test_their_metadata_is_the_card(self, sae_lens, tmp_path):
        theirs = self.make("topk", {"k": 5})
        theirs.cfg.metadata.model_name = "gpt2"
        theirs.cfg.metadata.hook_name = "blocks.8.hook_resid_pre"
        theirs.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
        theirs.cfg.metadata.prepend_bos, theirs.cfg.metadata.sequence_separator_token = True, "eos"
        theirs.save_model(tmp_path / "theirs")
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs")
        assert (ours.card.model_name, ours.card.hook_name) == ("gpt2", "blocks.8.hook_resid_pre")
        assert ours.card.residual == "mean-centred" and ours.normalize_activations == "center"
        ours.save_pretrained(tmp_path / "ours")
        again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
        assert again.cfg.metadata.hook_name == "blocks.8.hook_resid_pre"
        assert (again.cfg.metadata.prepend_bos, again.cfg.metadata.sequence_separator_token) == (True, "eos")
        x = inputs()
        x = x - x.mean(-1, keepdim=True)  # what TransformerLens gives it
        assert_close(ours(x), again(x), FP64)

    def test_gemma_scope_as_saelens_reads_it(self, sae_lens, tmp_path, monkeypatch):
        from sae_lens.loading import pretrained_sae_loaders as loaders

        ours = se.SparseAutoencoder(D, F, se.JumpReLU(F), apply_b_dec_to_input=False)
        randomised(ours).save_pretrained(tmp_path / "params.npz", format="gemma_scope")
        monkeypatch.setattr(loaders, "hf_hub_download", lambda **kwargs: str(tmp_path / "params.npz"))
        cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_5", cfg_overrides={"d_in": D, "d_sae": F}
        )
        cfg["normalize_activations"] = "none"
        theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
        theirs.load_state_dict(state)
        assert_computes(ours.eval(), theirs.encode, theirs.decode, inputs(torch.float32), FP32)

    def test_llama_scope_as_saelens_reads_it(self, sae_lens, tmp_path, monkeypatch):
        from sae_lens.loading import pretrained_sae_loaders as loaders

        write_llama_scope(tmp_path, d=D, d_sae=F)
        files = {"hyperparams.json": "hyperparams.json", "final.safetensors": "checkpoints/final.safetensors"}

        def download(repo_id, filename, **options):
            return str(tmp_path / files[filename.rpartition("/")[2]])

        monkeypatch.setattr(loaders, "hf_hub_download", download)
        cfg, state, _ = loaders.llama_scope_sae_huggingface_loader(
            "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", cfg_overrides={"dtype": "float32"}
        )
        theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
        theirs.load_state_dict(state)
        theirs.fold_activation_norm_scaling_factor(D**0.5 / 6.3125)
        ours = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
        assert theirs.cfg.metadata.hook_name == "blocks.8.hook_resid_post" and ours.provenance.layer == 8
        assert_computes(ours, theirs.encode, theirs.decode, inputs(torch.float32), FP32)

    def test_circuit_tracers_transcoders_as_saelens_reads_them(self, sae_lens, tmp_path, monkeypatch):
        from sae_lens.loading import pretrained_sae_loaders as loaders

        write_circuit_tracer(tmp_path, d=D, d_sae=F)
        (tmp_path / "wandb-config.yaml").write_text(
            f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 8}}\n"
        )
        monkeypatch.setattr(
            loaders, "hf_hub_download", lambda repo_id, filename, **options: str(tmp_path / filename)
        )
        cfg, state, _ = loaders.mwhanna_transcoder_huggingface_loader("mwhanna/qwen3-0.6b", "layer_3.safetensors")
        theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
        theirs.load_state_dict(state)
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "layer_3.safetensors").eval()
        assert (theirs.cfg.metadata.hook_name, ours.provenance.site) == ("blocks.3.mlp.hook_in", "mlp_in")
        assert_computes(ours, theirs.encode, theirs.decode, inputs(torch.float32), FP32)


class TestSparsify:
    @pytest.mark.parametrize(
        "options",
        [{"num_latents": F}, {"expansion_factor": 3}, {"num_latents": F, "transcode": True},
         {"num_latents": F, "skip_connection": True, "transcode": True}],
        ids=str,
    )  # fmt: skip
    def test_both_ways(self, sparsify, options, tmp_path):
        config = sparsify.SparseCoderConfig(k=5, **options)
        torch.manual_seed(3)
        theirs = randomised(sparsify.SparseCoder(D, config, dtype=torch.float64))
        theirs.save_to_disk(tmp_path / "theirs")
        assert formats.detect(tmp_path / "theirs") == "sparsify"
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs")
        assert ours.d_sae == F and type(ours.activation) is se.TopK
        ours.save_pretrained(tmp_path / "ours", format="sparsify")
        again = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
        assert again.cfg.transcode == theirs.cfg.transcode
        for name, value in theirs.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        x = inputs()
        for each in (theirs, again):
            out = each(x)
            latents = torch.zeros(B, F, dtype=x.dtype).scatter(1, out.latent_indices, out.latent_acts)
            assert_computes(ours, lambda x, latents=latents: latents, lambda latents, out=out: out.sae_out, x, FP64)

    def test_their_trained_file_for_saelens(self, sparsify, sae_lens, tmp_path):
        """What SAELens' own loader gets wrong: W_dec's orientation, num_latents 0, the subtracted b_dec."""
        torch.manual_seed(3)
        theirs = randomised(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=5, expansion_factor=3)))
        theirs.save_to_disk(tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "saelens", to="saelens")
        converted = sae_lens.SAE.load_from_disk(tmp_path / "saelens")
        x = inputs(torch.float32)
        assert_close(converted(x), theirs(x).sae_out, FP32)


class TestDictionaryLearning:
    KEPT = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder")
    FOLDED = ("MatryoshkaBatchTopKSAE", "GatedAutoEncoder")  # read as their inference form

    def make(self, name):
        from dictionary_learning import dictionary
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

        torch.manual_seed(3)
        modules = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
        kind = next(getattr(module, name) for module in modules if hasattr(module, name))
        counted = {"k": 5} if "TopK" in name else {}
        groups = {"group_sizes": [8, 40]} if "Matryoshka" in name else {}
        made = randomised(kind(D, F, **counted, **groups))
        if "BatchTopK" in name:
            made.threshold.fill_(0.7123456)
        if name == "MatryoshkaBatchTopKSAE":
            made.W_enc.data = made.W_enc.data.contiguous()
        return made

    def write(self, theirs, folder, **trainer):
        folder.mkdir()
        torch.save(theirs.state_dict(), folder / "ae.pt")
        trainer |= {"dict_class": type(theirs).__name__, "k": 5, "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))

    @pytest.mark.parametrize("name", KEPT + FOLDED)
    def test_theirs_is_read(self, dictionary_learning, name, tmp_path):
        theirs, x = self.make(name).double(), inputs()
        if name == "AutoEncoder":  # it loads in fp32 always
            theirs, x = theirs.float(), x.float()
        self.write(theirs, tmp_path / "theirs")
        assert formats.detect(tmp_path / "theirs") == "dictionary_learning"
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs").eval()
        assert ours.card.architecture == name and ours.card.model_name == "EleutherAI/pythia-70m"
        if "threshold" in dict(theirs.named_parameters()):
            theirs.threshold.data = theirs.threshold.data.float().double()  # fp32 here
        tolerance = FP32 if x.dtype == torch.float32 else FP64
        with torch.no_grad():
            assert_computes(ours, theirs.encode, theirs.decode, x, tolerance)
            if "BatchTopK" in name:
                ours.train()
                assert_computes(ours, lambda x: theirs.encode(x, use_threshold=False), theirs.decode, x, tolerance)

    @pytest.mark.parametrize("name", KEPT)
    def test_ours_is_read_and_their_file_comes_back(self, dictionary_learning, name, tmp_path):
        from dictionary_learning.utils import load_dictionary

        theirs, x = self.make(name), inputs(torch.float32)
        self.write(theirs, tmp_path / "theirs")
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs").eval()
        ours.save_pretrained(tmp_path / "ours", format="dictionary_learning")
        again, config = load_dictionary(str(tmp_path / "ours"), device="cpu")
        assert type(again) is type(theirs) and config["trainer"]["layer"] == 3
        with torch.no_grad():
            if name == "AutoEncoder":  # it normalizes what it loads
                assert_close(again(x), theirs(x), FP32)
            else:
                for key, value in theirs.state_dict().items():
                    assert torch.equal(again.state_dict()[key], value), key
                assert torch.equal(again(x), theirs(x))
            if name != "AutoEncoder":
                assert_computes(ours, again.encode, again.decode, x, FP32)

    @pytest.mark.parametrize("name", FOLDED)
    def test_what_comes_back_as_its_inference_form(self, dictionary_learning, name, tmp_path):
        from dictionary_learning.utils import load_dictionary

        theirs, x = self.make(name), inputs(torch.float32)
        self.write(theirs, tmp_path / "theirs")
        convert(tmp_path / "theirs", tmp_path / "ours", to="dictionary_learning")
        again, _ = load_dictionary(str(tmp_path / "ours"), device="cpu")
        with torch.no_grad():
            assert_close(again(x), theirs(x), FP32)

    def test_their_trainers_configuration(self, dictionary_learning, tmp_path):
        self.write(self.make("BatchTopKSAE"), tmp_path / "theirs", threshold_beta=0.9, norm_factor=13.5)
        ours = se.SparseAutoencoder.from_pretrained(tmp_path / "theirs")
        assert ours.activation.threshold_lr == 0.1 and "activations over 13.5" in str(ours.card)
