"""Several sites of a model, read and replaced in one forward pass: each sees what those before it have left."""

import pytest
import torch
from tiny_models import MODELS

from sae_engine.data import read_sites, run_with_replacements
from sae_engine.data.places import find_place

IDS = torch.tensor([[5, 17, 99, 3, 64, 28], [42, 8, 15, 16, 23, 110]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
INSIDE = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
EVERYWHERE = [f"{site}_layer_{layer}" if "mlp_in" not in site else f"blocks.{layer}.mlp.hook_in"
              for layer in range(3) for site in INSIDE]  # fmt: skip


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("mask", [None, MASK])
def test_giving_back_what_was_read_changes_no_bit(model, mask):
    clean = run_with_replacements(model, IDS, {EVERYWHERE[0]: lambda _: None}, attention_mask=mask)
    seen = {}

    def same(site):
        return lambda x: seen.setdefault(site, x).clone()

    found = run_with_replacements(model, IDS, {site: same(site) for site in EVERYWHERE}, attention_mask=mask)
    assert torch.equal(found, clean)
    for site, x in zip(EVERYWHERE, read_sites(model, IDS, EVERYWHERE, attention_mask=mask), strict=True):
        assert torch.equal(seen[site], x), site
    if mask is None:
        assert torch.equal(clean, model(IDS).logits)
    assert torch.equal(run_with_replacements(model, IDS, dict.fromkeys(EVERYWHERE, lambda x: None),
                                             attention_mask=mask), clean)  # fmt: skip


def test_later_sites_see_what_earlier_replacements_made(model):
    """Against a model whose MLPs are exchanged for functions of what they are given: the replacement model itself."""
    given, read = {}, {}

    def exchanged(layer):
        def output(_module, args, out):
            given[layer] = args[0]
            return torch.tanh(args[0]) * (layer + 1)

        return output

    mlps = [find_place(model, "mlp_out", layer).module for layer in range(3)]
    handles = [mlp.register_forward_hook(exchanged(layer)) for layer, mlp in enumerate(mlps)]
    expected = model(IDS).logits
    for handle in handles:
        handle.remove()

    def uses(layer):
        def reads(x):
            read[layer] = x

        def writes(_):
            return torch.tanh(read[layer]) * (layer + 1)

        return {f"blocks.{layer}.mlp.hook_in": reads, f"blocks.{layer}.hook_mlp_out": writes}

    found = run_with_replacements(model, IDS, uses(0) | uses(1) | uses(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(read[layer], given[layer]) for layer in range(3))
    alone = run_with_replacements(model, IDS, uses(2))
    assert not torch.allclose(alone, expected) and not torch.equal(read[2], given[2])


def test_what_cannot_be_run_is_refused(model):
    site = "blocks.1.hook_mlp_out"
    with pytest.raises(TypeError, match="uses must map"):
        run_with_replacements(model, IDS, [site])
    with pytest.raises(ValueError, match="at least one"):
        run_with_replacements(model, IDS, {})
    with pytest.raises(ValueError, match="hook_mlp_out twice"):
        run_with_replacements(model, IDS, {site: torch.zeros_like, "mlp_out_layer_1": torch.zeros_like})
    with pytest.raises(ValueError, match=r"shape \(2, 6, 32\) at blocks.1.hook_mlp_out"):
        run_with_replacements(model, IDS, {site: lambda x: x[:, 1:]})
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.2"):
        run_with_replacements(model, IDS, {"blocks.3.hook_mlp_out": torch.zeros_like})
    with pytest.raises(TypeError, match="input_ids"):
        run_with_replacements(model, IDS.float(), {site: torch.zeros_like})
