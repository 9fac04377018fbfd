"""SparseDecoder and SparseAutoencoder: conventions, gradients against dense autograd in fp64, saving and loading."""
import copy
import json
import subprocess
import sys

import pytest
import torch

import sae_engine as se
from sae_engine.testing import assert_same

D, F, B = 12, 40, 9
ACTIVATIONS = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4), "BatchTopK": lambda: se.BatchTopK(3.5),
    "MutualChoice": lambda: se.MutualChoice(4), "TopAFA": lambda: se.TopAFA(), "ReLU": lambda: se.ReLU(),
    "JumpReLU": lambda: se.JumpReLU(F, threshold=0.1),
}  # fmt: skip
VARIANTS = {
    "plain": {}, "rescaled": {"rescale_acts_by_decoder_norm": True, "decoder_init_norm": 0.3},
    "layer_norm": {"normalize_activations": "layer_norm"}, "center": {"normalize_activations": "center"},
    "no_b_dec": {"apply_b_dec_to_input": False},
    "skip": {"skip": True}, "transcoder": {"d_out": 7, "skip": True},
}  # fmt: skip


def build(activation="TopK", **kwargs):
    torch.manual_seed(1)
    sae = se.SparseAutoencoder(D, F, ACTIVATIONS[activation](), dtype=torch.float64, **kwargs)
    with torch.no_grad():  # biases and skip off zero, so that every term is tested
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip") and p.requires_grad:
                p.normal_(std=0.1)
    return sae


def densely(sae, x):
    """The forward pass in dense PyTorch, given which entries were kept."""
    mean, std = 0.0, 1.0
    inner = x
    if sae.normalize_activations == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        inner = (x - mean) / (std + 1e-5)
    elif sae.normalize_activations == "center":
        mean = x.mean(-1, keepdim=True)
        inner = x - mean
    if sae.apply_b_dec_to_input:
        inner = inner - sae.b_dec
    pre = inner @ sae.W_enc + sae.b_enc
    norms = sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else torch.ones(F, dtype=x.dtype)
    pre = pre * norms
    kept = sae.encode(x.detach()).to_dense().detach() != 0
    out = (pre * kept / norms) @ sae.W_dec + sae.b_dec
    out = out * std + mean
    return out if sae.W_skip is None else out + x @ sae.W_skip.T


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gradient_equals_dense_autograd_in_fp64(activation, variant):
    sae = build(activation, **VARIANTS[variant])
    twin = copy.deepcopy(sae)
    for shape in ((B, D), (2, 3, D)):
        x = torch.randn(shape, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outs = [sae(inputs[0]), densely(twin, inputs[1])]
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)
        weight = torch.randn_like(outs[0])
        for out in outs:
            (out * weight).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-11)
        for (name, p), q in zip(sae.named_parameters(), twin.parameters(), strict=True):
            if name == "activation.threshold":
                continue  # has its own estimator: test_threshold.py
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=name)
        sae.zero_grad()
        twin.zero_grad()


def test_parameters_are_named_and_shaped_as_in_saelens():
    for activation in ACTIVATIONS:
        sae = se.SparseAutoencoder(D, F, ACTIVATIONS[activation]())
        shapes = {n: tuple(p.shape) for n, p in sae.named_parameters() if "." not in n}
        assert shapes == {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    assert all(p.is_contiguous() for p in sae.parameters())


def test_initial_weights():
    sae = se.SparseAutoencoder(D, F, se.TopK(3), decoder_init_norm=0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_dec.any()


def test_afa_has_no_encoder_bias_and_matches_the_inputs_norm():
    sae = se.SparseAutoencoder(D, F, se.TopAFA())
    assert not sae.b_enc.requires_grad
    x = torch.randn(50, D) + 0.3
    with torch.no_grad():
        sae.b_dec.fill_(0.2)
    (codes,), _, pre = sae.encode_with(x, keep_pre=True)
    expected = se.functional.norm_match(pre, (x - sae.b_dec).norm(dim=1), weight_norm=sae.W_dec.norm(dim=1))
    assert_same(codes.detach().to_dense(), expected.detach().to_dense())


def test_training_lowers_the_loss():
    sae = se.SparseAutoencoder(D, F, se.BatchTopK(4))
    basis = torch.randn(20, D)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = (torch.rand(64, 20) * (torch.rand(64, 20) < 0.15)) @ basis
        optimizer.zero_grad()
        loss = se.losses.squared_error(sae(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert sae.eval()(x).shape == x.shape and sae.activation.threshold > 0


def test_bf16_pre_activations_are_rounded_once():
    """Under autocast pre = bf16(fp32 accumulator + fp32 bias), whatever the back end's GEMM likes to do."""
    sae = se.SparseAutoencoder(D, F, se.TopK(4))
    with torch.no_grad():
        sae.b_enc.normal_()
    x = torch.randn(B, D)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        (codes,), _, pre = sae.encode_with(x, keep_pre=True)
        out = sae(x)
    exact = x.bfloat16().double() @ sae.W_enc.bfloat16().double() + sae.b_enc.double()
    assert pre.dtype == codes.values.dtype == out.dtype == torch.bfloat16
    # fp32 accumulation errs by far less than half a bf16 ulp, so only numbers near a rounding boundary may differ
    assert (pre != exact.bfloat16()).float().mean() < 0.01
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in sae.parameters())


def test_a_zero_decoder_row_rescales_to_zero():
    sae = build(rescale_acts_by_decoder_norm=True, activation="ReLU")
    with torch.no_grad():
        sae.W_dec[4] = 0
    x = torch.randn(B, D, dtype=torch.float64)
    sae(x).square().sum().backward()
    assert sae(x).isfinite().all() and sae.W_dec.grad.isfinite().all()


@pytest.mark.parametrize("kwargs", [{"apply_b_dec_to_input": False}, {}], ids=["b_dec not subtracted", "subtracted"])
def test_afa_target_is_the_norm_of_the_centred_input(kwargs):
    sae = se.SparseAutoencoder(D, F, se.TopAFA(), **kwargs)
    with torch.no_grad():
        sae.b_dec.fill_(0.5)
    x = torch.randn(B, D)
    (codes,), _, pre = sae.encode_with(x, keep_pre=True)
    expected = se.functional.norm_match(pre, (x - sae.b_dec).norm(dim=1), weight_norm=sae.W_dec.norm(dim=1))
    assert_same(codes.indices, expected.indices)


def test_pre_activations_carry_their_gradient():
    """An auxiliary loss on what encode returns reaches the encoder."""
    sae = build("TopK")
    pre = sae.encode_with(torch.randn(B, D, dtype=torch.float64), keep_pre=True).pre
    dead = torch.arange(F) % 3 == 0
    auxiliary = se.functional.topk(pre, 3, mask=dead, relu=False)
    se.functional.decode(auxiliary, sae.W_dec.detach()).square().sum().backward()
    assert all(sae.get_parameter(name).grad.abs().sum() > 0 for name in ("W_enc", "b_enc", "b_dec"))


def test_a_custom_rule_keeps_its_own_values_and_gradients():
    class Halved(se.TopK):
        def __init__(self, k):
            super().__init__(k)
            self.gain = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def _select(self, pre, backend):
            codes = super()._select(pre, backend)
            return codes.replace(values=codes.values * self.gain)

    sae = se.SparseAutoencoder(D, F, Halved(4), dtype=torch.float64)
    x = torch.randn(B, D, dtype=torch.float64)
    (codes,), _, pre = sae.encode_with(x, keep_pre=True)
    torch.testing.assert_close(codes.to_dense(), sae.activation(pre))
    sae(x).sum().backward()
    assert sae.activation.gain.grad != 0 and sae.W_enc.grad.abs().sum() > 0


def test_an_overflowing_capacity_is_reported():
    with torch.device("cpu"):  # on a GPU it ends the process's work there: below
        sae = se.SparseAutoencoder(D, F, se.TopAFA(capacity=3))
        with pytest.raises(RuntimeError, match="capacity=3"):
            sae(torch.randn(B, D))
        with pytest.raises(RuntimeError, match="capacity=3"):
            sae.activation(torch.randn(B, F), target_norm=torch.ones(B) * 9, weight_norm=torch.ones(F))


OVERFLOW = """
import torch, sae_engine as se
sae = se.SparseAutoencoder(16, 64, se.TopAFA(capacity=3), device="cuda")
sae(torch.zeros(8, 16, device="cuda"))  # nothing overflows; kernels are loaded, which after an assertion fails
sae(torch.randn(8, 16, device="cuda"))
print("not waited for", flush=True)  # before the assertion ends the process
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_an_overflowing_capacity_ends_the_work_on_a_gpu():
    """In a process of its own: a failed assertion on the device leaves no CUDA context to go on with."""
    done = subprocess.run([sys.executable, "-c", OVERFLOW], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr
    assert done.stdout == "not waited for\n"


@pytest.mark.parametrize("activation", ["TopK", "JumpReLU"])
def test_two_runs_give_the_same_bits(activation):
    """Large enough for several threads, with everything that is read per latent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(4):
            torch.manual_seed(0)
            rule = se.TopK(64) if activation == "TopK" else se.JumpReLU(512, threshold=0.5, bandwidth=0.5)
            sae = se.SparseAutoencoder(16, 512, rule, rescale_acts_by_decoder_norm=True)
            sae(torch.randn(1024, 16)).square().sum().backward()
            runs.append([p.grad for p in sae.parameters()])
        for other in runs[1:]:
            assert_same(other, runs[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_bf16_pre_activations_on_a_gpu():
    x, weight = torch.randn(300, 64, device="cuda"), torch.randn(64, 5000, device="cuda")
    bias = torch.randn(5000, device="cuda")
    exact = x.bfloat16().double() @ weight.bfloat16().double() + bias.double()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for needs_grad in (False, True):
            with torch.set_grad_enabled(needs_grad):
                pre = se.functional.linear(x, weight, bias)
            assert pre.dtype == torch.bfloat16
            assert (pre != exact.bfloat16()).float().mean() < 0.01  # only numbers near a rounding boundary


def test_info_is_asked_for():
    sae = build(normalize_activations="layer_norm")
    x = torch.randn(B, D, dtype=torch.float64) * 5 + 2
    (codes,), info, pre = sae.encode_with(x)
    assert pre is None
    assert_same(sae.decode(codes, info).detach(), sae(x).detach())
    with pytest.raises(ValueError, match="info"):
        sae.decode(codes)
    for wrong in (se.EncodeInfo(), info._replace(std=info.std[:1])):
        with pytest.raises(ValueError, match="info"):
            sae.decode(codes, wrong)
    for options in ({"skip": True}, {"normalize_activations": "center"}):
        with pytest.raises(ValueError, match="info"):
            build(**options).decode(codes)
    with pytest.raises(TypeError, match="codes"):
        build().decode(codes.to_dense())
    with pytest.raises(ValueError, match="codes"):
        build().decode(se.functional.topk(torch.randn(3, F + 1), 2))


def test_decoder_takes_codes_and_dense_tensors():
    decoder = se.SparseDecoder(F, D)
    pre = torch.randn(2, B, F)
    codes = se.functional.topk(pre, 4)
    dense = codes.to_dense().detach().requires_grad_()
    torch.testing.assert_close(decoder(codes), decoder(dense))
    weight = torch.randn(2, B, D)
    (decoder(dense) * weight).sum().backward()
    torch.testing.assert_close(dense.grad, weight @ decoder.W_dec.T)  # zeros get their gradient too
    assert se.SparseDecoder(F, D, bias=False)(codes).shape == (2, B, D)


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, D), (1, 2, 3, D)], ids=str)
@pytest.mark.parametrize("activation", ["TopK", "BatchTopK", "TopAFA", "ReLU"])
def test_any_leading_dimensions(activation, shape):
    sae = se.SparseAutoencoder(D, F, ACTIVATIONS[activation]())
    x = torch.randn(shape)
    assert sae(x).shape == shape and sae.encode(x).shape == (*shape[:-1], F)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: se.SparseAutoencoder(0, F, se.TopK(2)), ValueError, "d_in"),
        (lambda: se.SparseAutoencoder(D, 2.0, se.TopK(2)), TypeError, "d_sae"),
        (lambda: se.SparseAutoencoder(D, F, torch.nn.ReLU()), TypeError, "activation"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(F + 1)), ValueError, "k"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2), normalize_activations="batch"), ValueError, "normalize"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2), dtype=torch.int8), TypeError, "dtype"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2))(torch.randn(3, D + 1)), ValueError, "x must have d_in"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2))(torch.ones(3, D, dtype=torch.int32)), TypeError, "x"),
        (lambda: se.SparseDecoder(F, D)(torch.randn(3, F + 1)), ValueError, "codes"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2), decoder_init_norm=float("nan")), ValueError, "decoder_init"),
        (lambda: se.SparseAutoencoder(D, F, se.TopK(2), skip="no"), TypeError, "skip"),
    ],
)
def test_arguments_are_checked(make, error, name):
    with pytest.raises(error, match=name):
        make()


class TestPretrained:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_round_trip_is_exact(self, activation, variant, tmp_path):
        if variant == "rescaled" and activation in ("JumpReLU", "ReLU", "TopAFA"):
            variant = "plain"  # these fold: see below
        sae = build(activation, **VARIANTS[variant]).float()
        if hasattr(sae.activation, "threshold"):
            with torch.no_grad():
                sae.activation.threshold.fill_(0.123456789)
        sae.save_pretrained(tmp_path / "sae")
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "sae")
        assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]
        assert type(loaded.activation) is type(sae.activation) and loaded.W_enc.is_contiguous()
        for key, value in sae.state_dict().items():
            assert_same(loaded.state_dict()[key], value)
        x = torch.randn(B, D)
        assert_same(loaded.eval()(x).detach(), sae.eval()(x).detach())

    @pytest.mark.parametrize("activation", ["JumpReLU", "ReLU", "TopAFA"])
    def test_rules_that_saelens_does_not_rescale_are_folded(self, activation, tmp_path):
        sae = build(activation, **VARIANTS["rescaled"])
        sae.save_pretrained(tmp_path)
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        assert not loaded.rescale_acts_by_decoder_norm
        torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
        x = torch.randn(B, D, dtype=torch.float64)
        torch.testing.assert_close(loaded.eval()(x), sae.eval()(x))

    def test_loads_under_inference_mode(self, tmp_path):
        sae = build("BatchTopK").float()
        sae(torch.randn(B, D))
        sae.save_pretrained(tmp_path)
        with torch.inference_mode():
            loaded = se.SparseAutoencoder.from_pretrained(tmp_path).eval()
            x = torch.randn(B, D)
            assert_same(loaded(x), sae.eval()(x))
        loaded(torch.randn(B, D)).sum().backward()  # its parameters are ordinary ones

    def test_file_has_saelens_keys(self, tmp_path):
        from safetensors.torch import load_file

        sae = build("BatchTopK")
        sae(torch.randn(B, D, dtype=torch.float64))
        sae.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "sae_weights.safetensors")
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        assert set(weights) == {"W_enc", "W_dec", "b_enc", "b_dec", "topk_threshold"}
        assert weights["topk_threshold"].dtype == torch.float64 and weights["W_enc"].shape == (D, F)
        assert cfg["architecture"] == "batchtopk" and cfg["k"] == 3.5 and cfg["d_sae"] == F

    def test_a_configuration_as_saelens_writes_it(self, tmp_path):
        sae = build("JumpReLU").float()
        sae.save_pretrained(tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        cfg["metadata"] = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre"}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path)
        x = torch.randn(B, D)
        assert_same(loaded.eval()(x).detach(), sae.eval()(x).detach())

    @pytest.mark.parametrize(
        ("damage", "error", "message"),
        [
            (lambda f: (f / "cfg.json").unlink(), FileNotFoundError, "cfg.json is missing"),
            (lambda f: (f / "sae_weights.safetensors").unlink(), FileNotFoundError, "safetensors is missing"),
            (lambda f: (f / "cfg.json").write_text("{"), ValueError, "not JSON"),
            (lambda f: (f / "cfg.json").write_text("[]"), ValueError, "JSON object"),
            (lambda f: edit(f, architecture="gated_transformer"), ValueError, "gated_transformer"),
            (lambda f: edit(f, d_sae=F + 1), ValueError, "shape"),
            (lambda f: edit(f, d_sae=2**61), ValueError, "shape"),
            (lambda f: edit(f, apply_b_dec_to_input="false"), ValueError, "apply_b_dec_to_input"),
            (lambda f: edit(f, reshape_activations="hook_z"), ValueError, "hook_z"),
            (lambda f: (f / "cfg.json").write_text("[" * 100_000), ValueError, "not JSON"),
            (lambda f: rename(f, "b_enc", None), ValueError, "lacks b_enc"),
            (lambda f: rename(f, "b_enc", "b_enc", torch.int8), ValueError, "floating-point"),
            (lambda f: edit(f, d_sae="many"), ValueError, "d_sae"),
            (lambda f: edit(f, k=0), ValueError, "k"),
            (lambda f: edit(f, normalize_activations="whiten"), ValueError, "whiten"),
            (lambda f: cut(f / "sae_weights.safetensors"), ValueError, "whole safetensors"),
            (lambda f: rename(f, "W_dec", "decoder.weight"), ValueError, "lacks W_dec"),
            (lambda f: rename(f, None, "extra"), ValueError, "extra"),
        ],
    )
    def test_damaged_or_foreign_files_are_refused(self, damage, error, message, tmp_path):
        build().save_pretrained(tmp_path)
        damage(tmp_path)
        with pytest.raises(error, match=message):
            se.SparseAutoencoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize("metadata", [None, [], "text", {"sae_engine": None}, {"sae_engine": {"options": 3}}])
    def test_foreign_metadata_is_ignored(self, metadata, tmp_path):
        build().save_pretrained(tmp_path)
        edit(tmp_path, metadata=metadata)
        assert type(se.SparseAutoencoder.from_pretrained(tmp_path).activation) is se.TopK

    @pytest.mark.parametrize("which", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
    def test_a_failed_save_leaves_the_old_files(self, which, tmp_path, monkeypatch):
        build().save_pretrained(tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

        def fails(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr(which, fails)
        with pytest.raises(OSError, match="disk full"):
            build("ReLU").save_pretrained(tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            se.SparseAutoencoder.from_pretrained(tmp_path / "nowhere")


def edit(folder, **changes):
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def rename(folder, old, new, dtype=None):
    from safetensors.torch import load_file, save_file

    file = folder / "sae_weights.safetensors"
    tensors = load_file(file)
    moved = tensors.pop(old) if old else torch.zeros(1)
    if new:
        tensors[new] = moved.to(dtype or moved.dtype)
    save_file(tensors, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "center"])
def test_16_bit_inputs_are_normalized_as_wider_ones(normalization, dtype):
    """Into a 16-bit module too: its input is rounded after it was normalized, and not before."""
    sae = se.SparseAutoencoder(D, F, se.TopK(4), normalize_activations=normalization).eval()
    x = (torch.randn(30, D) + 20).to(dtype)
    assert torch.equal(sae(x), sae(x.float()))
    narrow = copy.deepcopy(sae).to(dtype)
    seen, info = narrow._normalized(x)
    expected, wide = sae._normalized(x.float())
    assert narrow(x).dtype == seen.dtype == dtype and torch.equal(seen, expected.to(dtype))
    for ours, theirs in zip(info[:2], wide[:2], strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_16_bit_modules_are_those_of_the_same_numbers_in_fp32(dtype):
    """What a rule compares with, and what multiplies its pre-activations, is taken in fp32 and not rounded before."""
    afa, scaled = (se.SparseAutoencoder(D, F, rule, rescale_acts_by_decoder_norm=rescaled, decoder_init_norm=0.7)
                   for rule, rescaled in ((se.TopAFA(), False), (se.TopK(4), True)))  # fmt: skip
    x = (torch.randn(30, D) + 20).to(dtype)
    for sae in (afa, scaled):
        torch.nn.init.normal_(sae.b_dec, 20)
        sae.to(dtype)
    context = afa._context(x, afa.activation)
    centred = x.double() - afa.b_dec.double()
    norms = afa.W_dec.double().norm(dim=1)
    for name, exact in (("target_norm", centred.norm(dim=1)), ("weight_norm", norms)):
        torch.testing.assert_close(context[name], exact.float(), rtol=1e-5, atol=0)  # D sums in fp32, at most D * eps
    # One rounding each: of the product, of its multiple by the norm, and of what is divided by the norm again.
    (codes,), _, pre = scaled.encode_with(x, keep_pre=True)
    plain = copy.deepcopy(scaled)
    plain.rescale_acts_by_decoder_norm = False
    unscaled = plain.encode_with(x, keep_pre=True).pre
    norms = scaled.W_dec.float().norm(dim=1)
    assert torch.equal(pre, (unscaled.float() * norms).to(dtype))
    divided = codes.replace(values=(codes.values.float() / norms[codes.indices.long()]).to(dtype))
    assert torch.equal(scaled.decode(codes), se.functional.decode(divided, scaled.W_dec, scaled.b_dec))


@pytest.mark.parametrize("variant", [{"skip": True}, {"normalize_activations": "layer_norm"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_16_bit_modules_add_up_is_rounded_once(dtype, variant):
    sae, x = build(**variant).to(dtype), torch.randn(64, D, dtype=dtype)
    (codes,), info, _ = sae.encode_with(x)
    info_wide = info._replace(**{name: t.double() for name, t in info._asdict().items() if t is not None})
    exact = copy.deepcopy(sae).double().decode(codes.replace(values=codes.values.double()), info_wide)
    error = (sae.decode(codes, info).double() - exact).abs()
    # Half a unit in the last place, and what fp32 sums of terms below 16 are off by.
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs() + 16 * 2**-22).all())
