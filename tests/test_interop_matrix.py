"""16 objects of other libraries under the ecosystem's calls, accelerated against plain: `make test-interop`."""
import copy
import warnings

import pytest
import torch
from library_objects import CODERS, DICTIONARIES, INFERENCE, MARKS, TRAINING, D

import sae_engine as se

pytestmark = MARKS

OBJECTS = {
    **{f"sae_lens {n}": INFERENCE[n] for n in ("topk", "topk rescaled", "abstopk", "jumprelu", "standard")},
    **{f"training {n}": TRAINING[n] for n in ("topk", "batchtopk", "matryoshka", "jumprelu step", "standard")},
    **{n: DICTIONARIES[n] for n in ("AutoEncoderTopK", "BatchTopKSAE", "Matryoshka", "JumpRelu")},
    "coder": CODERS["coder"], "coder skip": CODERS["coder skip"],
}  # fmt: skip
assert len(OBJECTS) == 16


def batch():
    return torch.randn(72, D, generator=torch.Generator().manual_seed(4))


def output(module, x):
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def of_parameters(module, x):
    def loss(parameters):
        out = torch.func.functional_call(module, parameters, (x,))
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    return torch.func.grad(loss)({n: p.detach() for n, p in module.named_parameters()})


def penalty(module, x):
    """Second-order gradients of every parameter: of the gradient at the input."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(output(module, x).pow(3).sum(), x, create_graph=True)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for h, p in zip(grads, parameters, strict=True)]


def features(module, x):
    encoded = module.encode(x)
    return encoded[0] if isinstance(encoded, tuple) else encoded


def steered(how):
    def call(module, x):
        if not hasattr(module, "b_dec") or "SparseCoder" in type(module).__name__:
            return ()  # its decode takes the values and indices it is given
        with torch.set_grad_enabled(how == "in place"):
            f = features(module, x)
        if how == "in place":
            f[:, 5] = 3.0
        elif how == "data":
            f.data[:, 5] = 3.0
        elif how == "numpy":
            f.numpy()[:, 5] = 3.0
        elif how == "dlpack":
            torch.from_dlpack(f)[:, 5] = 3.0
        else:
            changed = f.clone()
            changed[:, 5] = 3.0
            f.data = changed
        return module.decode(f)

    return call


def trained_on_inference(module, x):
    with torch.inference_mode():
        x = x * 1
    output(module, x).square().sum().backward()
    return [p.grad for p in module.parameters() if p.grad is not None]


def exported(module, x):
    return torch.export.export(module, (x,)).module()(x)


def traced(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, (x,), check_trace=False)(x)


def moved(module, x):
    return output(module.double().to("cpu"), x.double())


def under(context):
    def call(module, x):
        with context():
            return output(module, x)

    return call


CALLS = {
    "deepcopy": lambda m, x: output(copy.deepcopy(m), x), "dtype": moved,
    "state_dict": lambda m, x: [m.load_state_dict({n: t.clone() for n, t in m.state_dict().items()}), output(m, x)][1],
    "no_grad": under(torch.no_grad), "inference_mode": under(torch.inference_mode), "func.grad": of_parameters,
    "vmap": lambda m, x: torch.vmap(lambda part: output(m, part))(x.view(4, 18, D)),
    "jvp": lambda m, x: torch.func.jvp(lambda x: output(m, x), (x,), (torch.ones_like(x),))[1], "penalty": penalty,
    "inference input": trained_on_inference, "export": exported, "trace": traced,
    **{f"steered by {how}": steered(how) for how in ("in place", "data", "numpy", "dlpack", "assignment")},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", OBJECTS)
def test_accelerated_as_plain(make, call):
    """The same numbers; where the plain object cannot, neither must the accelerated one be wrong: nothing is asked."""
    plain, x = OBJECTS[make](), batch()
    try:
        expected = CALLS[call](plain, x)
    except Exception as error:  # whatever a library raises of itself
        pytest.skip(f"the plain object does not: {type(error).__name__}")
    got = CALLS[call](se.accelerate(OBJECTS[make]()), x)
    if call in ("penalty", "func.grad", "inference input"):  # sums that cancel: to a few roundings of the largest
        got, expected = (list(t.values()) if isinstance(t, dict) else t for t in (got, expected))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
    else:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", OBJECTS)
def test_torchscript_is_refused(make):
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot take .*torch.export"):
        torch.jit.script(se.accelerate(OBJECTS[make]()))
