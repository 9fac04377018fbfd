"""Runs beside SAELens and TransformerLens: the places that are read, and what SAELens loads of a run's folder."""
from typing import Any

import pytest
import torch
from short_runs import settings

from sae_engine.checkpoints.saelens import sparsity_in
from sae_engine.data import read_sites
from sae_engine.training.trainer import Trainer

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the libraries' own
]

HOOKS = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "mlp.hook_post",
         "hook_resid_post")  # fmt: skip


def test_places_are_those_of_transformer_lens():
    """The same weights in both. TransformerLens splits heads and adds biases elsewhere: equal but for roundings, of
    sums of at most 128 products."""
    lens = pytest.importorskip("transformer_lens", reason="needs transformer-lens: make test-interop")
    from tiny_models import tiny_gpt2
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    torch.manual_seed(0)
    model: Any = tiny_gpt2().model
    own = model.config
    for parameter in model.parameters():  # GPT-2's own start has no biases, and products of next to nothing
        torch.nn.init.normal_(parameter, std=0.3)
    config = lens.HookedTransformerConfig(
        n_layers=own.n_layer, d_model=own.n_embd, n_ctx=own.n_positions, d_head=own.n_embd // own.n_head,
        n_heads=own.n_head, d_mlp=4 * own.n_embd, d_vocab=own.vocab_size, act_fn=own.activation_function,
        normalization_type="LN", eps=own.layer_norm_epsilon, device="cpu", original_architecture="GPT2LMHeadModel",
    )  # fmt: skip
    hooked = lens.HookedTransformer(config).eval()
    hooked.load_state_dict(convert_gpt2_weights(model, config), strict=False)  # its causal masks are buffers
    ids = torch.randint(0, own.vocab_size, (2, 17))
    _, theirs = hooked.run_with_cache(ids)
    places = [f"blocks.{layer}.{hook}" for layer in range(own.n_layer) for hook in HOOKS]
    for place, found in zip(places, read_sites(model, ids, places), strict=True):
        expected = theirs[place].flatten(2)
        assert expected.abs().max() > 0.1, place
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, at=place: f"{at}: {text}")


@pytest.mark.parametrize("sae", [
    {"architecture": "topk", "k": 8},
    {"architecture": "jumprelu", "jumprelu_init_threshold": 0.05, "jumprelu_bandwidth": 0.1},
    {"architecture": "standard"},
    {"architecture": "gated"},
    {"architecture": "topk", "k": 8, "normalize_activations": "layer_norm"},
    {"architecture": "topk", "k": 8, "hook_name_out": "blocks.2.hook_mlp_out"},
    {"architecture": "jumprelu", "jumprelu_init_threshold": 0.05, "jumprelu_bandwidth": 0.1,
     "hook_name_out": "blocks.2.hook_mlp_out"},
], ids=lambda sae: "-".join(map(str, sae.values())))  # fmt: skip
def test_sae_lens_loads_what_a_run_leaves(sae, tmp_path):
    """Rules of a batch lie in a run's folder as SAELens' trainers know them; ``push`` writes what loads everywhere."""
    lens = pytest.importorskip("sae_lens", reason="needs sae-lens: make test-interop")
    generator = torch.Generator().manual_seed(0)
    x = 20 * (torch.randn(1024, 8, generator=generator) @ torch.randn(8, 16, generator=generator) + 3)
    sae = {"name": "a", "hook_name": "blocks.2.hook_resid_pre", "d_sae": 64, "lr": 0.003, **sae}
    config = settings(tmp_path / "run", saes=[sae], data__training_tokens=64 * 16, output__save_steps=16)
    run = Trainer(config, dataset=[x, 3 * x.flip(1)] if "hook_name_out" in sae else x).train()
    theirs, ours = lens.SAE.load_from_disk(run.folder / "sae" / "a", device="cpu"), run.saes()["a"]
    assert theirs.cfg.metadata.hook_name == sae["hook_name"]
    with torch.no_grad():
        codes, found = theirs.encode(x), ours.encode(x).to_dense()
        assert 0 < (codes != 0).sum() < codes.numel()
        torch.testing.assert_close(codes, found, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.decode(codes), ours(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "log_jumprelu"])
def test_sae_lens_loads_what_a_run_publishes(architecture, tmp_path, monkeypatch):
    """Batch rules with the threshold that they have learned, and how often latents fire."""
    lens = pytest.importorskip("sae_lens", reason="needs sae-lens: make test-interop")
    x = 20 * (torch.randn(1024, 16, generator=torch.Generator().manual_seed(0)) + 1)
    own = {"jumprelu_init_threshold": 0.5, "jumprelu_bandwidth": 0.1} if "jump" in architecture else {"k": 8}
    sae = {"name": "a", "hook_name": "blocks.2.hook_resid_pre", "architecture": architecture, "d_sae": 64, **own}
    config = settings(tmp_path / "run", saes=[sae], data__training_tokens=64 * 16, output__save_steps=16)
    run = Trainer(config, dataset=x).train()
    run.push("someone/saes", folder=tmp_path / "pushed", dry_run=True)
    theirs = lens.SAE.load_from_disk(tmp_path / "pushed" / sae["hook_name"], device="cpu")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setattr(loaders, "hf_hub_download", lambda filename, **_: str(tmp_path / "pushed" / filename))
    *_, logs = loaders.sae_lens_huggingface_loader("someone/saes", sae["hook_name"])
    assert torch.allclose(10 ** logs.double(), sparsity_in(run.folder / "sae" / "a"), atol=1e-9) and logs.shape == (64,)
    with torch.no_grad():
        codes, found = theirs.encode(x), run.saes()["a"].encode(x).to_dense()
        assert 0 < (codes != 0).sum() < codes.numel()
        near = (codes > 0) != (found > 0)  # at the threshold either may round to either side
        assert near.sum() <= 2
        torch.testing.assert_close(codes[~near], found[~near], rtol=1e-4, atol=1e-4)
