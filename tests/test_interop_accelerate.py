"""Accelerated objects of SAELens, dictionary_learning and sparsify do what the plain ones do: `make test-interop`."""

import copy
import math

import pytest
import torch
from library_objects import (
    CODERS,
    DEAD,
    DICTIONARIES,
    FEW_DEAD,
    INFERENCE,
    MARKS,
    SPARSE,
    TRAINING,
    B,
    D,
    F,
    coder,
    coder_forward,
    coder_train,
    dictionary_forward,
    dictionary_train,
    sae_forward,
    sae_lens,
    sae_train,
    sparsify,
    with_parameters,
)

import sae_engine as se

pytestmark = MARKS


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
