"""sae_engine.data.read_gradients: the language model's gradient at a site, by a hook."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import sae_engine as se
from sae_engine.data import read_activations, read_gradients

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def ids(rows=2, length=7):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "resid_post"])
def test_activations_are_those_that_are_read_and_gradients_finite_differences(model, site):
    model = model.double()
    tokens = ids()
    x, g = read_gradients(model, tokens, layer=1, site=site)
    assert torch.equal(x, read_activations(model, tokens, layer=1, site=site))
    assert g.shape == x.shape == (2, 7, 16) and not (g.requires_grad or x.requires_grad or g.is_inference())
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = next(m for n, m in model.named_modules() if n.endswith((".h.1", ".layers.1")))
    target = block if site != "mlp_out" else block.mlp
    losses = []
    for step in (1e-5, -1e-5):
        def moved(module, args, output, step=step):
            if isinstance(output, tuple):
                return (output[0] + step * direction, *output[1:])
            return output + step * direction

        def moved_before(module, args, kwargs, step=step):
            if args:
                return (args[0] + step * direction, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + step * direction}

        handle = (
            target.register_forward_pre_hook(moved_before, with_kwargs=True)
            if site == "resid_pre" else target.register_forward_hook(moved)
        )  # fmt: skip
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        losses.append(loss)
    slope = (losses[0] - losses[1]) / 2e-5
    # central differences err by step^2, cancellation by eps * loss / step; the loss itself is made in fp32 logits
    torch.testing.assert_close((g * direction).sum(), slope, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_behind(model):
    model.train()
    flags = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with torch.inference_mode():
        x, g = read_gradients(model, ids(), layer=2)
    assert model.training and all(m.training for m in model.modules())
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    sae = se.SparseAutoencoder(16, 64, se.GradientTopK(4))
    sae(x, gradient=g).sum().backward()  # ordinary tensors: an SAE trains on them
    assert sae.W_enc.grad.any()


def test_a_gradient_does_not_depend_on_its_neighbours(model):
    tokens = ids(3)
    whole, alone = read_gradients(model, tokens, layer=1)[1], read_gradients(model, tokens[:1], layer=1)[1]
    torch.testing.assert_close(whole[:1], alone)
    assert not whole[:, -1].any() and whole[:, 0].any()


@pytest.mark.parametrize(
    ("tokens", "kwargs", "name"),
    [
        (torch.zeros(2, 5), {}, "input_ids"), (torch.zeros(5, dtype=torch.int64), {}, "input_ids"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "input_ids"), (ids(), {"layer": 9}, "layer"),
        (ids(), {"site": "attn_in"}, "site"),
    ],
)  # fmt: skip
def test_arguments_are_checked(tokens, kwargs, name):
    with pytest.raises((TypeError, ValueError), match=name):
        read_gradients(FAMILIES["gpt2"](), tokens, **{"layer": 1, **kwargs})
