"""Crosscoders of three layers with nothing at 0, for files and for other libraries; and files as those write them."""

import json

import torch
from pair_loop import SITES, D, F, coder
from safetensors.torch import save_file

import sae_engine as se

MODEL = "openai-community/gpt2"
READ = tuple(f"blocks.{layer}.hook_resid_mid" for layer in range(SITES))
WRITTEN = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(SITES))


def made(wiring, rule, **options):
    """In fp32; its rules have learned thresholds of their own, and it knows where it belongs."""
    found = coder(wiring, rule, dtype=torch.float32, **options)
    with torch.no_grad():
        for source in found.sources:
            if isinstance(source.activation, se.JumpReLU):
                source.activation.threshold.uniform_(0.05, 0.3)
            elif isinstance(source.activation, se.BatchTopK):
                source.activation.k = 3
                source.activation.threshold.fill_(0.1234567)
    found.provenance = se.Provenance(model=MODEL, sites=READ, target_sites=WRITTEN)
    return found.eval()


def forge(folder, crosses=True, shards=1, seed=3):
    """A checkpoint of CLT-Forge's; returns its reconstruction of (B, layers, d) by its formulas, dense."""
    g = torch.Generator().manual_seed(seed)
    pairs = torch.triu_indices(SITES, SITES) if crosses else torch.arange(SITES).expand(2, -1)
    new = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    state = {"W_enc": new(SITES, D, F), "b_enc": new(SITES, F), "W_dec": new(pairs.shape[1], F, D),
             "b_dec": new(pairs.shape[1], D), "log_threshold": new(SITES, F) / 4 - 1,
             "estimated_norm_scaling_factor_in": new(SITES).abs() + 0.5,
             "estimated_norm_scaling_factor_out": new(SITES).abs() + 0.5,
             "feature_count": torch.zeros(SITES, F, dtype=torch.long)}  # fmt: skip
    folder.mkdir()
    along = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
    for rank in range(shards):
        part = {n: t.chunk(shards, along[n])[rank].contiguous() if n in along else t for n, t in state.items()}
        save_file(part, folder / ("clt_weights.safetensors" if shards == 1 else f"rank{rank}_clt_weights.safetensors"))
    config = {"n_layers": SITES, "d_in": D, "d_latent": F, "cross_layer_decoders": crosses, "model_name": "gpt2"}
    (folder / "clt_cfg.json").write_text(json.dumps(config))

    def run(x):
        s = {name: t.double() for name, t in state.items()}
        pre = torch.einsum("bnd,ndf->bnf", x * s["estimated_norm_scaling_factor_in"][:, None], s["W_enc"]) + s["b_enc"]
        z = pre * (pre > s["log_threshold"].exp())
        out = torch.zeros_like(x)
        for number, (read, written) in enumerate(pairs.T.tolist()):
            out[:, written] += z[:, read] @ s["W_dec"][number] + s["b_dec"][number]
        return out / s["estimated_norm_scaling_factor_out"][:, None]

    return run


def theirs(folder, id, k=None, scales=None, seed=5):
    """A crosscoder of dictionary_learning's; returns its latents and reconstruction by its formulas, dense."""
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    state = {"encoder.weight": new(2, D, F), "encoder.bias": new(F), "decoder.weight": new(2, F, D),
             "decoder.bias": new(2, D), "code_normalization_id": torch.tensor(id)}  # fmt: skip
    if k is not None:
        state |= {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(4.0)}
    mean, scale = torch.zeros(2, D), torch.ones(2)
    if scales is not None:
        mean, scale = new(2, D), torch.tensor(scales)
    nothing = torch.full((2, D), torch.nan)
    state |= {"activation_mean": mean if scales else nothing, "activation_std": new(2, D).abs() if scales else nothing,
              "activation_global_scale": scale, "target_rms": torch.tensor(1.0)}  # fmt: skip
    folder.mkdir()
    torch.save(state, folder / "ae.pt")

    def run(x):
        s = {name: t.double() for name, t in state.items() if t.is_floating_point()}
        seen = (x - mean) * scale[:, None]
        f = (torch.einsum("bld,ldf->bf", seen, s["encoder.weight"]) + s["encoder.bias"]).relu()
        norms = s["decoder.weight"].norm(dim=2)
        norm = {1: norms.sum(0), 2: norms.square().sum(0).sqrt(), 4: torch.ones(F)}[id]
        if k is not None:
            f = f * (f * norm > s["threshold"])
        out = torch.einsum("bf,lfd->bld", f, s["decoder.weight"]) + s["decoder.bias"]
        return f, out / (scale[:, None] + (1e-8 if scales else 0)) + mean

    return run
