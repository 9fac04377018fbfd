"""torch.func, torch.export, TorchScript, inference mode and steering in place, on every rule and its autoencoder."""
import warnings

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import sae_engine as se

D, F = 5, 12
RULES = {
    "TopK": lambda: se.TopK(3), "AbsTopK": lambda: se.AbsTopK(3), "BatchTopK": lambda: se.BatchTopK(2),
    "MatryoshkaBatchTopK": lambda: se.MatryoshkaBatchTopK(2, widths=[6, F]), "SampledTopK": lambda: se.SampledTopK(2),
    "FeatureChoice": lambda: se.FeatureChoice(F, 2), "TopAFA": lambda: se.TopAFA(), "Gated": lambda: se.Gated(F),
    "ReLU": lambda: se.ReLU(), "JumpReLU": lambda: se.JumpReLU(F, threshold=0.1, bandwidth=0.5),
    "StatisticalTopK": lambda: se.StatisticalTopK(2),
}  # fmt: skip


@pytest.fixture(params=RULES)
def sae(request):
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(D, F, RULES[request.param](), dtype=torch.float64)
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec, sae.b_dec):
            p.normal_()
    sae(batch(6))  # teaches a threshold where there is one
    return sae


def batch(*shape):
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_gradients_of_functions_are_those_of_autograd(sae):
    x, learned = batch(6), {n: p for n, p in sae.named_parameters() if p.requires_grad}

    def loss(parameters, x=x):
        return functional_call(sae, parameters, (x,)).pow(2).sum()

    state = {n: b.clone() for n, b in sae.named_buffers()}
    detached = {n: p.detach() for n, p in learned.items()}
    ours = grad(loss)(detached)
    for n, b in sae.named_buffers():  # a function writes nothing
        assert torch.equal(b, state[n]), n
    expected = torch.autograd.grad(loss(learned), list(learned.values()), allow_unused=True)
    for name, want in zip(learned, expected, strict=True):
        torch.testing.assert_close(ours[name], torch.zeros_like(ours[name]) if want is None else want)
    per_sample = vmap(grad(loss), in_dims=(None, 0))(detached, x.view(3, 2, D))
    for number, part in enumerate(x.view(3, 2, D)):
        torch.testing.assert_close({n: g[number] for n, g in per_sample.items()}, grad(loss)(detached, part))


def test_forward_mode_is_reverse_mode_and_vmap_is_a_loop(sae):
    x, direction = batch(4), batch(4).flip(0)
    out, tangent = jvp(sae, (x,), (direction,))
    torch.testing.assert_close(tangent, torch.einsum("bdce,ce->bd", jacrev(sae)(x), direction))
    with torch.no_grad():  # which teaches no rule
        torch.testing.assert_close(out, sae(x))
        for mode in (True, False):
            sae.train(mode)
            loop = torch.stack([sae(part) for part in x.view(2, 2, D)])
            torch.testing.assert_close(vmap(sae)(x.view(2, 2, D)), loop)


def test_a_hessian_is_that_of_two_backward_passes():
    sae = se.SparseAutoencoder(D, F, se.TopK(3), dtype=torch.float64)
    x = batch(4)

    def loss(b_dec):
        return functional_call(sae, {"b_dec": b_dec}, (x,)).pow(3).sum()

    torch.testing.assert_close(hessian(loss)(sae.b_dec.detach()), torch.autograd.functional.hessian(loss, sae.b_dec))


def test_compiled_gradients_of_functions(compile_backend):
    torch._dynamo.reset()
    sae, x = se.SparseAutoencoder(D, F, se.TopK(3)), batch(4).float()
    call = grad(lambda b_dec: functional_call(sae, {"b_dec": b_dec}, (x,)).pow(2).sum())
    b_dec = sae.b_dec.detach()
    torch.testing.assert_close(torch.compile(call, backend=compile_backend)(b_dec), call(b_dec))


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["TopK", "ReLU", "JumpReLU"])
def test_exported_for_any_number_of_tokens(name):
    sae = se.SparseAutoencoder(D, F, RULES[name]())
    tokens = torch.export.Dim("tokens")
    for module, width in ((sae, D), (sae.activation, F)):
        module.eval()
        program = torch.export.export(module, (torch.randn(6, width),), dynamic_shapes=[{0: tokens}])
        more = torch.randn(9, width)
        torch.testing.assert_close(program.module()(more), module(more))


def test_torchscript_is_refused_by_name():
    sae = se.SparseAutoencoder(D, F, se.TopK(3))
    wrapped = torch.nn.Sequential(torch.nn.Linear(D, F), se.TopK(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        for module in (sae, wrapped, se.SparseDecoder(F, D)):
            with pytest.raises(RuntimeError, match=r"torch.jit.script cannot take .*torch.export"):
                torch.jit.script(module)
        for module in (sae, wrapped):
            with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot take .*torch.export"):
                torch.jit.trace(module, (torch.randn(6, D),))


def test_what_inference_mode_made_can_be_trained_on(sae):
    with torch.inference_mode():
        x = batch(6) * 1
        codes = sae.encode(x)
    assert x.is_inference() and codes.values.is_inference()
    for call in (lambda x: sae(x), lambda x: sae.decode(codes), lambda x: se.functional.linear(x, sae.W_enc)):
        sae.zero_grad()
        call(x).sum().backward()
        assert any(p.grad is not None for p in sae.parameters())


def test_activations_are_steered_in_place_with_gradients_on(sae):
    """Ablation as interpretability code writes it: the rest keeps its gradient, what was written has none."""
    rule = sae.activation
    if isinstance(rule, se.TopAFA):
        pytest.skip("needs the autoencoder's norms: the codes are steered, not the matrix")
    pre = torch.randn(6, F, dtype=torch.float64, requires_grad=True)
    acts = rule(pre)
    kept = (acts != 0).detach()
    acts[..., 5] = 3.0
    weight = torch.rand(6, F, dtype=torch.float64)
    (acts * weight).sum().backward()
    kept[:, 5] = False
    assert (acts[..., 5] == 3).all() and pre.grad[kept].all()
    if not isinstance(rule, se.StatisticalTopK):  # whose thresholds are functions of the whole row
        assert not pre.grad[:, 5].any()
