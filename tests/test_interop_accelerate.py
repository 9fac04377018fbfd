"""Accelerated objects of SAELens, dictionary_learning and sparsify do what the plain ones do: `make test-interop`."""

import copy
import io
import math
import os
import pickle
import warnings

import pytest
import torch

import sae_engine as se
from sae_engine.acceleration import _base as core

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify chooses its decoder once, when it is imported
REASON = "needs {}: make test-interop"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    saes = pytest.importorskip("sae_lens.saes", reason=REASON.format("sae-lens"))
    pytest.importorskip("dictionary_learning", reason=REASON.format("dictionary-learning"))
    sparsify = pytest.importorskip("sparsify", reason=REASON.format("eai-sparsify"))
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sae_lens.saes.sae import TrainStepInput

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),  # of these libraries and their dependencies
]

B, D, F = 72, 12, 200  # more tokens than FEW_TOKENS, so that dictionary_learning's decoder is sparse
SIZE = {"d_in": D, "d_sae": F}
DEAD = torch.arange(F) % 3 == 0
FEW_DEAD = (torch.arange(F) > 4) & (torch.arange(F) < 8)  # fewer than d_in // 2


def sae_lens(name, bias=0.0, **options):
    return lambda: with_parameters(getattr(saes, name)(getattr(saes, f"{name}Config")(**SIZE, **options)), bias)


def with_parameters(module, bias=0.0):
    """Every parameter random, the same on every call; the encoder's bias, where given, so low that few latents fire."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "threshold":
                p.fill_(0.4)
                continue
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            if name in ("b_enc", "encoder.bias"):
                p.add_(bias)
    return module


def threshold_at(value, make):
    def with_threshold():
        module = make()
        module.threshold = torch.tensor(value)
        return module

    return with_threshold


def below_zero(module):
    """Thresholds that let negative pre-activations by, for the ReLU to stop."""
    with_parameters(module, SPARSE).threshold.data.fill_(-0.5)
    return module


JUMP = {"jumprelu_bandwidth": 0.5, "target_l0": 5.0}
SPARSE, DENSE = -2.5, 0.0  # encoder biases at which rules that follow the data make codes, and do not

INFERENCE = {
    "topk": sae_lens("TopKSAE", k=5),
    "topk rescaled": sae_lens("TopKSAE", k=5, rescale_acts_by_decoder_norm=True),
    "abstopk": sae_lens("AbsTopKSAE", k=5),
    "jumprelu": sae_lens("JumpReLUSAE", SPARSE),
    "jumprelu dense": sae_lens("JumpReLUSAE", DENSE),
    "standard": sae_lens("StandardSAE", SPARSE),
    "standard dense": sae_lens("StandardSAE", DENSE),
    "layer norm": sae_lens("TopKSAE", k=5, normalize_activations="layer_norm", apply_b_dec_to_input=False),
}
TRAINING = {
    "topk": sae_lens("TopKTrainingSAE", k=5),
    "topk plain": sae_lens("TopKTrainingSAE", k=5, rescale_acts_by_decoder_norm=False, aux_loss_coefficient=0.5),
    "abstopk": sae_lens("AbsTopKTrainingSAE", k=5),
    "batchtopk": sae_lens("BatchTopKTrainingSAE", k=5.3),
    "matryoshka": sae_lens("MatryoshkaBatchTopKTrainingSAE", k=5.3, matryoshka_widths=[20, 90, F]),
    "matryoshka aux": sae_lens(
        "MatryoshkaBatchTopKTrainingSAE", k=5.3, matryoshka_widths=[20, 90, F], use_matryoshka_aux_loss=True
    ),
    "jumprelu step": sae_lens("JumpReLUTrainingSAE", SPARSE, **JUMP),
    "jumprelu tanh": sae_lens("JumpReLUTrainingSAE", SPARSE, **JUMP, jumprelu_sparsity_loss_mode="tanh"),
    "jumprelu quadratic ste": sae_lens(
        "JumpReLUTrainingSAE", SPARSE, **JUMP, jumprelu_sparsity_loss_mode="quadratic", jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=0.01,
    ),
    "jumprelu dense": sae_lens("JumpReLUTrainingSAE", DENSE, **JUMP),
    "standard": sae_lens("StandardTrainingSAE", SPARSE),
    "standard l2": sae_lens("StandardTrainingSAE", SPARSE, lp_norm=2.0),
    "standard dense": sae_lens("StandardTrainingSAE", DENSE),
}  # fmt: skip
DICTIONARIES = {
    "AutoEncoderTopK": lambda: with_parameters(AutoEncoderTopK(D, F, 5)),
    "BatchTopKSAE": threshold_at(0.9, lambda: with_parameters(BatchTopKSAE(D, F, 5), -0.5)),
    "BatchTopKSAE unset": lambda: with_parameters(BatchTopKSAE(D, F, 5)),
    "Matryoshka": threshold_at(0.9, lambda: with_parameters(MatryoshkaBatchTopKSAE(D, F, 5, [20, 80, 100]), -0.5)),
    "JumpRelu": lambda: with_parameters(JumpReluAutoEncoder(D, F), SPARSE),
    "JumpRelu below 0": lambda: below_zero(JumpReluAutoEncoder(D, F)),
    "JumpRelu dense": lambda: with_parameters(JumpReluAutoEncoder(D, F), DENSE),
}


def coder(**options):
    return lambda: with_parameters(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=5, **options)))


CODERS = {
    "coder": coder(),
    "coder multi": coder(multi_topk=True),
    "coder skip": coder(transcode=True, skip_connection=True),
}


# ------------------------------------------------------------------------------------------ what is called on them


def sae_forward(sae, x):
    f = sae.encode(x)
    return {"f": f, "decoded": sae.decode(f), "out": sae(x)}


def sae_train(dead):
    def call(sae, x):
        step = TrainStepInput(
            sae_in=x, coefficients={"l0": 0.1, "l1": 0.1}, dead_neuron_mask=dead, n_training_steps=1,
            is_logging_step=False,
        )  # fmt: skip
        out = sae.training_forward_pass(step)
        return {"loss": out.loss, "out": out.sae_out, "f": out.feature_acts, "pre": out.hidden_pre, **out.losses}

    return call


def dictionary_forward(ae, x):
    f = ae.encode(x)
    return {"f": f, "decoded": ae.decode(f), "out": ae(x), "out and f": ae(x, output_features=True)[0]}


def dictionary_train(ae, x):
    options = {"AutoEncoderTopK": {"return_topk": True}, "JumpReluAutoEncoder": {"output_pre_jump": True}}
    f, *others = ae.encode(x, **options.get(type(ae).__name__, {"return_active": True, "use_threshold": False}))
    if type(ae).__name__ == "AutoEncoderTopK":
        order = others[1].argsort(-1)
        others[:2] = [t.gather(-1, order) for t in others[:2]]
    return {"f": f, "decoded": ae.decode(f), **{f"other {n}": t for n, t in enumerate(others)}}


def coder_forward(sae, x):
    acts, indices, pre = sae.encode(x)
    order = indices.argsort(-1)
    return {
        "acts": acts.gather(-1, order), "indices": indices.gather(-1, order), "pre": pre.detach(),
        "decoded": sae.decode(acts, indices),
    }  # fmt: skip


def coder_train(dead):
    def call(sae, x):
        out = sae(x=x, y=None if not sae.cfg.transcode else x.flip(0), dead_mask=dead)
        order = out.latent_indices.argsort(-1)
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        return {"loss": loss, "out": out.sae_out, "indices": out.latent_indices.gather(-1, order)}

    return call


def cases():
    for kind, makers, calls in (
        ("sae_lens", INFERENCE, {"forward": sae_forward}),
        ("sae_lens training", TRAINING, {
            "forward": sae_forward, "train": sae_train(None), "dead": sae_train(DEAD), "few dead": sae_train(FEW_DEAD),
        }),
        ("dictionary_learning", DICTIONARIES, {"forward": dictionary_forward, "train": dictionary_train}),
        ("sparsify", CODERS, {
            "forward": coder_forward, "train": coder_train(None), "dead": coder_train(DEAD),
            "few dead": coder_train(FEW_DEAD),
        }),
    ):  # fmt: skip
        for name, make in makers.items():
            for what, call in calls.items():
                yield pytest.param(make, call, id=f"{kind}-{name}-{what}")


def run(module, call, x, weight_seed=2):
    """Results of a call, and the gradients of a loss that all of its differentiable results enter."""
    x = x.detach().clone().to(next(module.parameters()).dtype).requires_grad_()
    results = call(module, x)
    generator = torch.Generator().manual_seed(weight_seed)
    total = 0
    for t in results.values():
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if t.requires_grad:
            total = total + (t * weight.to(t.dtype)).sum()
    total.backward()
    gradients = {n: p.grad for n, p in (("x", x), *module.named_parameters()) if p.grad is not None}
    return {n: t.detach() for n, t in results.items()}, gradients


def assert_as_good(ours, theirs, truth, eps):
    """CONTRIBUTING's budget: twice the error of the plain library against fp64, and one rounding."""
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        if not expected.is_floating_point():
            assert torch.equal(ours[name], theirs[name]), name
            continue
        error, theirs_error = ((t[name].double() - expected).abs().max() for t in (ours, theirs))
        # A mean over B * D numbers, where luck may spare theirs every error: log2(B * D) roundings of a pairwise sum.
        roundings = math.log2(B * D) if expected.dim() == 0 else 1
        budget = 2 * (theirs_error + roundings * eps * expected.abs().max())
        assert error <= budget, f"{name}: {error} against {theirs_error}"


@pytest.mark.parametrize(("make", "call"), list(cases()))
@pytest.mark.parametrize("shape", [(B,), (4, B // 4)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_and_gradients_are_the_plain_ones(make, call, shape, training):
    plain, fast, truth = make().train(training), make().train(training), make().to(torch.float64).train(training)
    x = torch.randn(*shape, D)
    if len(shape) == 2:
        skip_what_the_library_cannot(plain, call, x)
    strides = {n: p.stride() for n, p in fast.named_parameters()}
    assert se.accelerate(fast) is fast and isinstance(fast, type(plain)) and type(fast) is not type(plain)
    (ours, our_gradients), (theirs, their_gradients), (expected, gradients) = (
        run(m, call, x) for m in (fast, plain, truth)
    )
    assert_as_good(ours, theirs, expected, torch.finfo(torch.float32).eps)
    assert_as_good(our_gradients, their_gradients, gradients, torch.finfo(torch.float32).eps)
    for name, gradient in our_gradients.items():
        assert name == "x" or gradient.stride() == strides[name]


def skip_what_the_library_cannot(plain, call, x):
    """What fails on the plain object for inputs of three dimensions, in the libraries' own code."""
    try:
        run(copy.deepcopy(plain), call, x)
    except (RuntimeError, IndexError, ValueError) as error:
        pytest.skip(f"{type(plain).__name__} does not take this itself: {error}")


BFLOAT = [p for p in cases() if "dense" not in p.id]


@pytest.mark.parametrize(("make", "call"), BFLOAT)
def test_under_bf16_autocast(make, call):
    """One bf16 rounding of the pre-activations apart: activations that both keep differ by no more, and an activation
    that one alone keeps lies no further from the row's last."""
    plain, fast = make(), se.accelerate(make())
    x = torch.randn(B, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = ({n: t.detach() for n, t in call(m, x).items()} for m in (fast, plain))
    assert ours.keys() == theirs.keys()
    rounding = torch.finfo(torch.bfloat16).eps  # two half units in the last place: the product's, and the sum's
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
    if "f" in ours:
        a, b = ours["f"].float(), theirs["f"].float()
        slack = 2 * rounding * max(a.abs().max(), b.abs().max())
        both = (a != 0) & (b != 0)
        assert both.sum() > 0.9 * (b != 0).sum()
        assert (a - b)[both].abs().max() <= slack
    if "loss" in ours:  # bf16 products of the plain decoder, summed in squares
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=8 * rounding, atol=0)


# ------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize("make", [INFERENCE["topk"], INFERENCE["jumprelu"], TRAINING["topk"], TRAINING["batchtopk"]])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_fire_with_the_same_tensors(make, grad):
    plain, fast = make(), se.accelerate(make())
    x = torch.randn(B, D)
    with torch.set_grad_enabled(grad):
        (out, cache), (expected, wanted) = (m.run_with_cache(x) for m in (fast, plain))
    assert list(cache) == list(wanted) and len(cache) >= 5
    torch.testing.assert_close(out, expected)
    for name in wanted:
        torch.testing.assert_close(cache[name], wanted[name])


@pytest.mark.parametrize("point", ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
@pytest.mark.parametrize("in_place", [True, False])
def test_hooks_intervene(point, in_place):
    x = torch.randn(B, D)

    def change(t, hook):
        if in_place:
            with torch.no_grad():
                t[:, ::2] = 0.5
            return None
        return t * 1.5 + 0.1

    for training in (False, True):
        outs = []
        for accelerated in (True, False):
            sae = (TRAINING if training else INFERENCE)["topk"]()
            sae = se.accelerate(sae) if accelerated else sae
            with torch.no_grad():
                outs.append(sae.run_with_hooks(x, fwd_hooks=[(point, change)]))
        torch.testing.assert_close(*outs)


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_backward_hooks_see_the_whole_gradient(point):
    x, seen = torch.randn(B, D), []
    for sae in (se.accelerate(TRAINING["topk"]()), TRAINING["topk"]()):
        sae.hook_dict[point].add_hook(lambda g, hook: seen.append(g.clone()), dir="bwd")
        sae_train(DEAD)(sae, x)["loss"].backward()
    torch.testing.assert_close(*(g[0] if isinstance(g, tuple) else g for g in seen))


def test_hooks_of_a_training_step():
    x, results = torch.randn(B, D), []
    for sae in (se.accelerate(TRAINING["batchtopk"]()), TRAINING["batchtopk"]()):
        names = []
        for name, point in sae.hook_dict.items():
            point.add_hook(lambda t, hook, name=name, names=names: names.append((name, t.detach().clone())))
        results.append((sae_train(DEAD)(sae, x)["loss"], names))
    (loss, ours), (expected, theirs) = results
    torch.testing.assert_close(loss, expected)
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------ gradients of the features


@pytest.mark.parametrize("make", [INFERENCE["topk rescaled"], DICTIONARIES["AutoEncoderTopK"]])
@pytest.mark.parametrize("how", ["grad", "retain_grad", "hook"])
def test_features_that_somebody_holds_get_their_whole_gradient(make, how):
    x, gradients = torch.randn(B, D), []
    for module in (se.accelerate(make()), make()):
        f = module.encode(x)
        seen = []
        if how == "hook":
            f.register_hook(seen.append)
        loss = (module.decode(f) ** 2).sum()
        if how == "grad":
            seen = torch.autograd.grad(loss, f)
        else:
            f.retain_grad()
            loss.backward()
            seen = seen or [f.grad]
        gradients.append(seen[0])
    assert (gradients[1] != 0).all(1).any()  # whole: not at the kept entries alone
    torch.testing.assert_close(*gradients)


def test_features_that_were_changed_are_decoded_as_they_are():
    for make in (INFERENCE["topk"], DICTIONARIES["AutoEncoderTopK"]):
        x, outs = torch.randn(B, D), []
        for module in (se.accelerate(make()), make()):
            with torch.no_grad():
                f = module.encode(x)
                f[:, ::7] = 1.0
                outs.append(module.decode(f))
        torch.testing.assert_close(*outs)


def test_sparse_activations():
    """SAELens' use_sparse_activations: a sparse tensor with the same entries, through the whole training pass."""
    sparse = se.accelerate(sae_lens("TopKTrainingSAE", k=5, use_sparse_activations=True)())
    dense = TRAINING["topk"]()
    x = torch.randn(B, D)
    ours, theirs = sae_train(DEAD)(sparse, x), sae_train(DEAD)(dense, x)
    assert ours["f"].layout == torch.sparse_coo
    torch.testing.assert_close(ours["f"].to_dense(), theirs["f"])
    torch.testing.assert_close(ours["loss"], theirs["loss"])
    torch.testing.assert_close(sparse.decode(sparse.encode(x)), dense(x))
    assert sparse.encode(x.view(4, -1, D)).shape == (4, B // 4, F)


# ------------------------------------------------------------------------------------------ sparsify's gradient


@pytest.mark.parametrize("options", [{}, {"multi_topk": True}], ids=["auxk", "multi"])
def test_exact_gradients_reach_the_encoder(options):
    """Against a dense formula of the same loss; by default the encoder hears of the activations alone."""
    x, dead = torch.randn(B, D), None if options else DEAD
    make = coder(**options)
    grads = {}
    for exact in (True, False):
        module = se.accelerate(make(), exact=exact)
        out = module(x=x, dead_mask=dead)
        (out.auxk_loss + out.multi_topk_fvu).backward()
        grads[exact] = module.encoder.weight.grad
        assert ("exact" if exact else "as in sparsify") in repr(module)
    assert grads[False] is None or (grads[False] == 0).all()

    plain = make()
    centred = x - plain.b_dec
    pre = torch.relu(centred @ plain.encoder.weight.T + plain.encoder.bias)
    total = (x - x.mean(0)).pow(2).sum()

    def decoded(p, k):
        values, indices = p.topk(k)
        return torch.zeros_like(p).scatter(1, indices, values) @ plain.W_dec

    if options:
        loss = (decoded(pre, 20) + plain.b_dec - x).pow(2).sum() / total
    else:
        error = (x - decoded(pre, 5) - plain.b_dec).detach()
        loss = (decoded(torch.where(DEAD, pre, -torch.inf), D // 2) - error).pow(2).sum() / total
    loss.backward()
    torch.testing.assert_close(grads[True], plain.encoder.weight.grad)


def test_gradients_through_zeros_of_the_relu():
    """Rows with fewer than k positive pre-activations: sparsify passes gradients to the entries that fill them up."""
    x = torch.randn(B, D)
    gradients = {}
    for kind in ("plain", "default", "exact"):
        module = with_parameters(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=5)), SPARSE)
        module = module if kind == "plain" else se.accelerate(module, exact=kind == "exact")
        out = module(x=x)
        assert (out.latent_acts == 0).any() and (out.latent_acts > 0).any()
        kept = torch.zeros(F, dtype=torch.bool)
        kept[out.latent_indices[out.latent_acts > 0]] = True
        out.fvu.backward()
        gradients[kind] = module.encoder.bias.grad
        assert bool((gradients[kind][~kept] != 0).any()) is (kind != "exact")
    torch.testing.assert_close(gradients["exact"][kept], dense_bias_gradient(x)[kept])


def dense_bias_gradient(x):
    module = with_parameters(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=5)), SPARSE)
    pre = torch.relu((x - module.b_dec) @ module.encoder.weight.T + module.encoder.bias)
    values, indices = pre.topk(5)
    out = torch.zeros_like(pre).scatter(1, indices, values) @ module.W_dec + module.b_dec
    ((x - out).square().sum() / (x - x.mean(0)).square().sum()).backward()
    return module.encoder.bias.grad


# ------------------------------------------------------------------------------------------ in place, and undone

EVERY = {
    **{f"sae_lens {n}": m for n, m in {**INFERENCE, **{f"training {n}": m for n, m in TRAINING.items()}}.items()},
    **DICTIONARIES,
    **CODERS,
}


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_in_place_and_undone(make):
    module, plain = make(), make()
    before = dict(module.__dict__)
    parameters = {n: (p, p.data_ptr(), p.stride()) for n, p in module.named_parameters()}
    keys, text = list(module.state_dict()), repr(module)
    assert se.accelerate(se.accelerate(module)) is module
    assert {n: (p, p.data_ptr(), p.stride()) for n, p in module.named_parameters()} == parameters
    assert list(module.state_dict()) == keys and "accelerated by sae_engine" in repr(module)
    x = torch.randn(B, D)
    with torch.no_grad():
        module(x)
    assert module.__dict__.keys() == before.keys()
    se.restore(module)
    assert type(module) is type(plain) and repr(module) == text and module.__dict__.keys() == before.keys()
    with torch.no_grad():
        assert all(map(torch.equal, *(o if isinstance(o, tuple) else (o,) for o in (module(x), plain(x)))))


@pytest.mark.parametrize("make", list(EVERY.values()), ids=list(EVERY))
def test_copies_and_pickles(make):
    module, x = se.accelerate(make()), torch.randn(B, D)
    copies = [copy.deepcopy(module)]
    try:
        pickle.dumps(make())
    except (AttributeError, pickle.PicklingError):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(module)  # SAELens keeps lambdas on its objects
    else:
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        copies += [pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        expected = module(x)
        for copied in copies:
            assert type(copied) is type(module) and copied is not module
            assert all(map(torch.equal, *(o if isinstance(o, tuple) else (o,) for o in (copied(x), expected))))


def test_saved_by_the_accelerated_loaded_by_the_plain(tmp_path):
    x = torch.randn(B, D)
    sae = se.accelerate(TRAINING["topk"]())
    sae.save_model(tmp_path / "sae")
    loaded = saes.TopKTrainingSAE.load_from_disk(tmp_path / "sae")
    assert type(loaded) is saes.TopKTrainingSAE
    torch.testing.assert_close(loaded(x), sae(x))
    batch = se.accelerate(TRAINING["batchtopk"]())
    sae_train(None)(batch, x)
    batch.save_inference_model(tmp_path / "inference")
    loaded = saes.SAE.load_from_disk(tmp_path / "inference")
    assert type(loaded) is saes.JumpReLUSAE and loaded.threshold[0] == batch.topk_threshold.float() > 0
    ae = se.accelerate(DICTIONARIES["AutoEncoderTopK"]())
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    loaded = AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")
    assert type(loaded) is AutoEncoderTopK
    torch.testing.assert_close(loaded(x), ae(x))
    module = se.accelerate(CODERS["coder"]())
    module.save_to_disk(tmp_path / "coder")
    loaded = sparsify.SparseCoder.load_from_disk(tmp_path / "coder")
    assert type(loaded) is sparsify.SparseCoder
    torch.testing.assert_close(loaded(x=x).sae_out, module(x=x).sae_out)


@pytest.mark.parametrize("make", [TRAINING["topk"], *list(DICTIONARIES.values())[:4], CODERS["coder"]])
def test_weights_written_past_autograd_are_seen(make):
    """The libraries write through .data, which versions do not record: nothing here outlives a call."""
    x, outs = torch.randn(B, D), []
    for accelerated in (True, False):
        module = make()
        module = se.accelerate(module) if accelerated else module
        for p in list(module.parameters())[:3]:
            module(x)
            version = p._version
            p.data.mul_(0.9)
            p.data = p.data + 0.01
            assert p._version == version
        out = module(x)
        outs.append(out[0] if isinstance(out, tuple) else out)
    torch.testing.assert_close(*outs)


# ------------------------------------------------------------------------------------------ all objects made after


def test_all_objects_made_inside():
    classes = saes.TopKTrainingSAE, saes.StandardTrainingSAE, AutoEncoderTopK
    inits = [c.__dict__.get("__init__") for c in classes]
    with se.accelerated():
        made = {name: make() for name, make in EVERY.items()}
        from_dict = saes.TrainingSAE.from_dict({**SIZE, "k": 3, "architecture": "topk"})
    for module in (*made.values(), from_dict):
        assert "accelerated by sae_engine" in repr(module)
    assert [c.__dict__.get("__init__") for c in classes] == inits
    assert "accelerated" not in repr(EVERY["sae_lens topk"]()) + repr(CODERS["coder"]())


def test_one_library_until_restored():
    assert se.accelerate("dictionary_learning") == "dictionary_learning"
    try:
        with se.accelerated("dictionary_learning"):  # what was on before stays on after
            pass
        assert "accelerated" in repr(AutoEncoderTopK(D, F, 3)) and "accelerated" not in repr(CODERS["coder"]())
    finally:
        se.restore("dictionary_learning")
    assert "accelerated" not in repr(AutoEncoderTopK(D, F, 3))


def test_a_class_for_dict_class():
    ours = se.accelerate(AutoEncoderTopK)
    assert issubclass(ours, AutoEncoderTopK) and isinstance(ours(D, F, 3), AutoEncoderTopK)
    assert se.restore(ours) is AutoEncoderTopK


def test_what_cannot_be_accelerated_is_made_plain_with_a_warning():
    with se.accelerated("sparsify"), pytest.warns(UserWarning, match="groupmax"):
        module = coder(activation="groupmax")()
    assert type(module) is sparsify.SparseCoder


# ------------------------------------------------------------------------------------------ refused


class Mine(AutoEncoderTopK):
    def encode(self, x, **options):
        return super().encode(x, **options) * 2


def with_attribute(make, name, value):
    module = make()
    setattr(module, name, value)
    return module


REFUSED = {
    "another architecture": (lambda: sae_lens("GatedSAE")(), "no operations for this class"),
    "another dictionary": (lambda: AutoEncoder(D, F), "no operations for this class"),
    "a subclass": (lambda: Mine(D, F, 3), "subclass of AutoEncoderTopK"),
    "activation": (lambda: with_attribute(INFERENCE["topk"], "activation_fn", torch.nn.ReLU()), "activation_fn"),
    "method": (lambda: with_attribute(INFERENCE["topk"], "encode", lambda x: x), "encode was replaced"),
    "groupmax": (coder(activation="groupmax"), "groupmax"),
    "layer": (lambda: with_attribute(DICTIONARIES["AutoEncoderTopK"], "encoder", torch.nn.Sequential()), "encoder"),
    "integers": (lambda: with_integers(DICTIONARIES["JumpRelu"]()), "W_enc"),
    "wrapped": (lambda: torch.nn.DataParallel(CODERS["coder"]()), "wraps"),
    "compiled": (lambda: torch.compile(CODERS["coder"](), backend="eager"), "compiled"),
}


def with_integers(module):
    module.W_enc = torch.nn.Parameter(module.W_enc.to(torch.int32), requires_grad=False)
    return module


@pytest.mark.parametrize(("make", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_refused_with_the_reason_and_unchanged(make, reason):
    module = make()
    cls, state = type(module), dict(module.__dict__)
    with pytest.raises(se.CannotAccelerate, match=reason):
        se.accelerate(module)
    assert type(module) is cls and module.__dict__ == state


def test_an_activation_replaced_later_is_an_error():
    module = se.accelerate(INFERENCE["topk"]())
    module.activation_fn = torch.nn.ReLU()
    with pytest.raises(se.CannotAccelerate, match="activation_fn"):
        module(torch.randn(B, D))


# ------------------------------------------------------------------------------------------ compiled


COMPILED = INFERENCE["topk"], TRAINING["topk"], DICTIONARIES["AutoEncoderTopK"], CODERS["coder"]


@pytest.mark.parametrize("make", COMPILED)
def test_compiled(make, compile_backend):
    torch._dynamo.reset()
    module, x = se.accelerate(make()), torch.randn(B, D)
    compiled = torch.compile(copy.deepcopy(module), backend=compile_backend)
    results = []
    for m in (compiled, module):
        out = m(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in m.parameters())])
    for a, b in zip(*results, strict=True):  # sums that cancel are as exact as large ones: to a few roundings of those
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(b.dtype).eps * float(b.abs().max()))


def test_no_dense_gradient_in_a_training_step():
    """Of all tensors of the backward pass none has tokens times latents elements, AuxK included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    rows, latents = 4096, 1024
    sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(d_in=4, d_sae=latents, k=2))
    out = sae_train(torch.arange(latents) < 100)(se.accelerate(sae), torch.randn(rows, 4))
    with Largest() as largest:
        out["loss"].backward()
    assert 0 < largest.seen < rows * latents / 16


def test_codes_are_remembered_weakly():
    module = se.accelerate(INFERENCE["topk"]())
    f = module.encode(torch.randn(B, D))
    assert core.codes_of(f) is not None
    entries = len(core._codes_of)
    del f
    assert len(core._codes_of) == entries - 1
