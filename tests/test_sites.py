"""Sites: how they are spelt, which module they are in each kind of block, and what is refused because it cannot be."""

import pytest
import torch
from tiny_models import MODELS
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sae_engine.data import SITES, Site, read_activations, read_gradients, read_sites, run_with_replacement
from sae_engine.data.places import find_place

TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BLOCKS = {  # what makes each of them differ from Llama's
    "gemma2": TINY,  # a norm behind each branch
    "gemma3_text": TINY,
    "olmo2": TINY,  # norms behind branches alone
    "glm4": TINY,
    "granite": {**TINY, "residual_multiplier": 0.22},
    "bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4, "eos_token_id": 1},  # modules that
    "mpt": {"vocab_size": 128, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},  # add the residual
    "gptj": {"vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "falcon": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},  # in place
    "phi": {**TINY, "num_key_value_heads": 4},
    "mixtral": {**TINY, "num_local_experts": 4},
}
PARALLEL = {"gptj", "falcon", "phi"}  # attention beside the MLP
IDS = torch.tensor([[5, 17, 99, 3, 64, 28], [42, 8, 15, 16, 23, 110]])


def make(kind, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BLOCKS.get(kind, TINY), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms that are fresh hide what stands before them
                parameter.add_(torch.rand_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no fp64
    return model.double().eval()


@pytest.fixture(params=BLOCKS)
def family(request):
    return request.param, make(request.param)


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def stream_without(model, module):
    """What leaves block 1 when ``module`` returns zeros."""
    handle = module.register_forward_hook(lambda _m, _a, out: (0 * out[0],) if isinstance(out, tuple) else 0 * out)
    try:
        return read_activations(model, IDS, layer=1, site="resid_post")
    finally:
        handle.remove()


def test_the_stream_is_the_sum_of_what_its_branches_add(family):
    kind, model = family
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post", *([] if kind in PARALLEL else ["resid_mid"])]
    pre, attention, mlp, post, *middle = read_sites(model, IDS, [Site(name, 1) for name in names])
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-12, atol=1e-12)
    for x in (pre, attention, mlp):
        assert x.abs().max() > 1e-3
    with torch.no_grad():
        states = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True).hidden_states
    torch.testing.assert_close(pre, states[1], rtol=0, atol=0)
    torch.testing.assert_close(post, states[2], rtol=0, atol=0)
    # The MLP's share by taking it away in the model: its last linear map, or its norm's output, is set to zero.
    block = blocks_of(model)[1]
    last = {"gemma2": "post_feedforward_layernorm", "gemma3_text": "post_feedforward_layernorm",
            "olmo2": "post_feedforward_layernorm", "glm4": "post_mlp_layernorm", "bloom": "mlp.dense_4h_to_h",
            "mpt": "ffn.down_proj", "gptj": "mlp.fc_out", "falcon": "mlp.dense_4h_to_h", "phi": "mlp.fc2"}  # fmt: skip
    without = stream_without(model, block.get_submodule(last.get(kind, "mlp")))
    torch.testing.assert_close(post - without, mlp, rtol=1e-12, atol=1e-12)
    if kind in PARALLEL:
        with pytest.raises(ValueError, match=r"'resid_mid' of a .* stand beside each other"):
            read_activations(model, IDS, layer=1, site="resid_mid")
    else:
        torch.testing.assert_close(middle[0], without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("site", ["attn_out", "resid_mid", "mlp_out"])
def test_replacing_a_site_changes_the_stream_by_the_difference(family, site):
    kind, model = family
    if kind in PARALLEL and site == "resid_mid":
        pytest.skip("attention and MLP stand beside each other")
    with torch.no_grad():
        clean = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(run_with_replacement(model, IDS, lambda x: x.clone(), layer=1, site=site), clean)
    assert not torch.allclose(run_with_replacement(model, IDS, lambda x: 2 * x, layer=1, site=site), clean)
    before = read_activations(model, IDS, layer=1, site="resid_mid") if kind not in PARALLEL else None
    seen = []
    place = find_place(model, "resid_post", 1)
    with place.hooked(IDS.shape, lambda x: seen.append(x.clone())):
        run_with_replacement(model, IDS, torch.zeros_like, layer=1, site=site)
    if site == "mlp_out" and before is not None:
        torch.testing.assert_close(seen[0], before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["granite", "falcon"])
def test_gradients_reach_a_site_that_is_scaled_or_added_to_in_place(kind):
    model = make(kind)
    x, gradient = read_gradients(model, IDS, layer=1, site="mlp_out")
    post = read_gradients(model, IDS, layer=1, site="resid_post")[1]
    assert torch.equal(x, read_activations(model, IDS, layer=1, site="mlp_out"))
    torch.testing.assert_close(gradient, post, rtol=1e-9, atol=1e-12)  # what is added has the gradient of the sum


def test_a_stream_of_several_parts_is_refused():
    """Gemma 3n's hidden states are (4, batch, tokens, d)."""
    layers = ["sliding_attention", "full_attention"] * 2
    model = make("gemma3n_text", num_hidden_layers=4, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8,
                 intermediate_size=[64] * 4, layer_types=layers, num_kv_shared_layers=0, laurel_rank=8,
                 activation_sparsity_pattern=[0.0] * 4)  # fmt: skip
    for site in ("resid_pre", "mlp_out", "resid_post"):
        with pytest.raises(ValueError, match=r"hidden states of shape \(4, 2, 5, 32\)"):
            read_activations(model, IDS, layer=1, site=site)


def test_blocks_that_return_lists():
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["openai-gpt"](vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ).eval()
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(read_activations(model, IDS, layer=1, site="resid_post"), out.hidden_states[2])
    assert torch.equal(run_with_replacement(model, IDS, lambda x: x, layer=1, site="resid_post"), out.logits)
    with pytest.raises(ValueError, match=r"'mlp_out' of a Block: .* normalized"):  # a norm is behind
        read_activations(model, IDS, layer=1, site="mlp_out")


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox"])
def test_inner_sites_and_modules_are_what_the_modules_are_given_and_return(name):
    model = MODELS[name]().double().eval()
    attention, out, mlp, neurons = {
        "gpt2": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
        "llama": ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
        "opt": ("self_attn", "self_attn.out_proj", "fc1", "fc2"),
        "gpt_neox": ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    }[name]  # fmt: skip
    path = find_place(model, "resid_pre", 1).path
    seen = {}
    handles = [
        model.get_submodule(f"{path}.{module}").register_forward_hook(
            lambda _m, args, result, module=module: seen.__setitem__(module, (args[0] if args else None, result))
        )
        for module in {attention, out, mlp, neurons}
    ]
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    for handle in handles:
        handle.remove()
    shape = (*IDS.shape, -1)
    for site, expected in (
        ("z", seen[out][0]), ("mlp_in", seen[mlp][0]), ("mlp_post", seen[neurons][0]), (f"{out}:input", seen[out][0]),
        (out, seen[out][1]), (f"{path}.{neurons}", seen[neurons][1]),
    ):  # fmt: skip
        assert torch.equal(read_activations(model, IDS, layer=1, site=site), expected.reshape(shape)), site
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert torch.equal(read_activations(model, IDS, site=head), logits)


def test_an_exchanged_module_is_found_anew():
    model = MODELS["llama"]().eval()
    first = read_activations(model, IDS, layer=1, site="mlp_out")
    model.model.layers[1].mlp = model.model.layers[2].mlp
    second = read_activations(model, IDS, layer=1, site="mlp_out")
    assert not torch.equal(first, second) and find_place(model, "mlp_out", 1).module is model.model.layers[2].mlp


# ---------------------------------------------------------------------------------------------- spellings

SPELT = {
    "resid_post": ["blocks.3.hook_resid_post", "model.layers.3", "transformer.h.3", "layers.3", "resid_post_layer_3",
                   "blocks.3.hook_out", "model.language_model.layers.3:output", "blocks.3.resid_post"],
    "resid_pre": ["blocks.3.hook_resid_pre", "hidden_states.3", "hidden_states[3]", "gpt_neox.layers.3:input"],
    "resid_mid": ["blocks.3.hook_resid_mid", "blocks.3.hook_mlp_in"],
    "attn_out": ["blocks.3.hook_attn_out", "attn_out_layer_3", "model.layers.3.attn_out"],
    "mlp_out": ["blocks.3.hook_mlp_out", "mlp_out_layer3"],
    "z": ["blocks.3.attn.hook_z", "blocks.3.hook_z"],
    "mlp_post": ["blocks.3.mlp.hook_post"],
    "mlp_in": ["blocks.3.mlp.hook_in"],
    "self_attn.o_proj": ["model.layers.3.self_attn.o_proj", "blocks.3.self_attn.o_proj",
                         "layers.3.self_attn.o_proj:output"],
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT)
def test_all_spellings_are_one_site(name):
    site = Site.of(name, 3)
    assert (site.name, site.layer) == (name, 3) and SPELT[name]
    for spelling in [*SPELT[name], str(site)]:
        assert Site.of(spelling) == Site.of(spelling, 3) == Site.of(site.place, site.layer) == site, spelling


@pytest.mark.parametrize("name", ["hook_z", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out"])
def test_a_hook_without_its_block_takes_the_layer(name):
    assert str(Site.of(name, 3)) == str(Site.of(f"blocks.3.{name}"))


def test_modules_outside_blocks_and_their_inputs():
    for text in ("lm_head:input", "transformer.ln_f", "model.vision_tower.encoder.patch", "blocks.0.mlp:input"):
        assert str(Site.of(text)) == text and Site.of(str(Site.of(text))) == Site.of(text)
    assert Site.of("model.vision_tower.layers.3").layer is None  # no block of the language model
    assert set(SITES) == {s for s in SITES if Site.of(str(Site(s, 0))) == Site(s, 0)}


@pytest.mark.parametrize(
    ("site", "layer", "error", "match"),
    [
        ("resid_post", None, ValueError, "layer must be given"),
        ("blocks.3.hook_resid_post", 4, ValueError, "layer: 4 was given, and .* block 3"),
        ("blocks.3.hook_resid_past", None, ValueError, "site must be one of"),
        ("blocks.3.mlp.hook_out", None, ValueError, "before or after a norm"),
        ("blocks.3.ln2.hook_normalized", None, ValueError, "mlp_in for what the MLP is given"),
        ("resid_post", -1, ValueError, "layer"), ("resid_post", 1.0, TypeError, "layer"), ("", 1, ValueError, "site"),
        ("resid_post", True, TypeError, "layer"), (3, 1, TypeError, "site"), ("mlp:inside", 1, ValueError, "site"),
        ("resid_mid:input", 1, ValueError, "site"), ("hook_z", None, ValueError, "site"),
    ],
)  # fmt: skip
def test_what_is_no_site(site, layer, error, match):
    with pytest.raises(error, match=match):
        Site.of(site, layer)


def test_the_model_of_a_site():
    second = Site.of("blocks.3.hook_resid_post@1")
    assert (second.name, second.layer, second.model) == ("resid_post", 3, 1) != ("resid_post", 3, 0)
    assert second != Site.of("resid_post", 3) and str(second) == "blocks.3.hook_resid_post@1"
    for site in (second, Site.of("model.layers.3.mlp.up_proj:input@2"), Site.of("resid_mid@1", 2)):
        assert Site.of(str(site)) == site == Site.of(site.place, site.layer)


def test_several_sites_in_one_pass_are_those_of_one_each():
    model = MODELS["llama"]().eval()
    passes = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    sites = ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre", "model.layers.1.mlp.up_proj", "blocks.1.hook_mlp_out"]
    for site in sites:
        find_place(model, site)
    passes.clear()
    together = read_sites(model, IDS, sites)
    assert len(passes) == 1
    handle.remove()
    for site, x in zip(sites, together, strict=True):
        assert torch.equal(x, read_activations(model, IDS, site=site))
    with pytest.raises(TypeError, match="sites"):
        read_sites(model, IDS, "blocks.1.hook_mlp_out")
    with pytest.raises(ValueError, match="sites"):
        read_sites(model, IDS, [])
