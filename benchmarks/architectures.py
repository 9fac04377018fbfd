"""Every causal architecture of the installed transformers, built tiny: which sites are right, which are refused, why.

    python benchmarks/architectures.py                     # all of them, to results/architectures.md
    python benchmarks/architectures.py gemma2 bloom        # these, to standard output

What is read is compared with what the model itself says: its ``hidden_states``; behind the last block, its final norm.
What a branch adds has to make up the difference between what enters the block and what leaves it, and has to take along
all that the MLP's weights do: with other weights in the MLP, ``resid_post - mlp_out`` is what it was. A site that
differs is WRONG, and the program ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TABLE = Path(__file__).parent / "results" / "architectures.md"
CHECKED = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
MOST_PARAMETERS = 30_000_000
LAYERS = 3

_SIZES = {
    32: "hidden_size d_model n_embd embed_dim emb_dim embedding_size attention_hidden_size word_embed_proj_dim "
        "decoder_hidden_size embedding_dim",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner d_ff n_inner ffn_hidden_size "
        "moe_intermediate_size shared_expert_intermediate_size max_position_embeddings n_positions max_seq_len "
        "expert_ffn_hidden_size shared_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size "
        "lru_width ffn_size dim_ff n_ctx",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
            "num_encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_decoder_attention_heads num_encoder_attention_heads num_local_experts n_routed_experts num_experts "
       "linear_num_value_heads mamba_n_heads time_step_rank rotary_dim moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok top_k_experts linear_num_key_heads linear_num_value_heads n_groups "
       "moe_topk moe_k mamba_expand expand",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups num_kv_shared_layers_ "
       "moe_layer_start_index",
    8: "head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
       "linear_value_head_dim mamba_d_state mamba_headdim state_size laurel_rank hidden_size_per_layer_input "
       "index_head_dim mamba_head_dim swa_head_dim dim_head d_kv",
    16: "kv_lora_rank q_lora_rank mamba_d_head sliding_window chunk_size mamba_chunk_size",
    128: "vocab_size vocab_size_per_layer_input decoder_vocab_size n_vocab",
    0: "pad_token_id num_kv_shared_layers",
}  # fmt: skip
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1}
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": 4}, "gemma3n_text": {"intermediate_size": [64] * LAYERS, "layer_types": None,
    "activation_sparsity_pattern": [0.0] * LAYERS}, "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "big_bird": {"attention_type": "original_full"}, "bigbird_pegasus": {"attention_type": "original_full"},
}  # fmt: skip
_DECODERS = {"is_decoder": True, "is_encoder_decoder": False}
_MLP_WEIGHTS = (
    "mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "feedforward", "ffw", "fc1", "fc2", "mlp_block",
)  # fmt: skip


@dataclass
class Row:
    """One architecture: its sites that are right in every block, and those that are not, with the reason."""

    kind: str
    cls: str
    right: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        reasons: dict[str, list[str]] = {}
        for site, reason in self.refused.items():
            reasons.setdefault(reason, []).append(site)
        why = "; ".join(r if sites == ["all"] else f"{', '.join(sites)}: {r}" for r, sites in reasons.items())
        wrong = f"WRONG: {', '.join(self.wrong)}; " if self.wrong else ""
        return f"| `{self.kind}` | {self.cls} | {', '.join(self.right) or '–'} | {wrong}{why} |"


def tiny_config(kind: str) -> Any:
    """The configuration of an architecture with a few small layers; its language part, where it has several."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    default = cls()
    if hasattr(default, "text_config") and not isinstance(default.text_config, (dict, type(None))):
        default.text_config = _shrunk(type(default.text_config), default.text_config, {})
        return default
    return _shrunk(cls, default, _OWN.get(kind, {}))


def _shrunk(cls: Any, default: Any, own: dict[str, Any]) -> Any:
    sizes = {name: size for size, names in _SIZES.items() for name in names.split()}
    changes = {name: value for name, value in {**sizes, **_IDS, **_DECODERS}.items() if _has(default, name)}
    changes = {name: value for name, value in changes.items() if not isinstance(getattr(cls, name, None), property)}
    # Of two names for one attribute the configuration's own is set.
    changes = {name: value for name, value in changes.items() if name not in getattr(default, "attribute_map", {})}
    if hasattr(default, "head_dim") and "head_dim" not in (*changes, *getattr(default, "attribute_map", {})):
        changes["head_dim"] = 8
    if hasattr(default, "num_key_value_heads") and ("num_key_value_heads" not in changes or "kv_lora_rank" in changes):
        changes["num_key_value_heads"] = 4
    return cls(**{**changes, **own})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name) and (getattr(config, name) is not None or name.endswith("_id"))
    except Exception:
        return False


def tiny_model(kind: str) -> nn.Module:
    """That model with random weights in fp32, its norms' too. ValueError where it would not be tiny."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"not built tiny: {size / 1e6:.0f} million parameters are left")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 and parameter.is_floating_point():
                parameter.add_(0.5 * torch.rand_like(parameter))  # fresh norms hide what stands before them
    return model


def scan(kind: str) -> Row:
    """Build the architecture and try every site in every block."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    row = Row(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    ids = torch.tensor([[70, 81, 99, 83, 64, 28], [42, 88, 75, 76, 93, 110]])
    try:
        model = tiny_model(kind)
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_hidden_states=True)
        states = getattr(out, "hidden_states", None)
    except Exception as error:  # each architecture has its own ways to need more than token ids
        row.refused["all"] = f"not tried, it was not built or run: {_short(error)}"
        return row
    states = _from_the_first(model, ids, states)
    found = {site: _try(model, ids, site, states) for site in CHECKED}
    for site, (right, wrong, refusals) in found.items():
        if wrong:
            row.wrong.append(site)
        elif refusals and right:
            row.right.append(f"{site} (blocks {', '.join(map(str, right))})")
            row.refused[f"{site} elsewhere"] = refusals[0]
        elif right:
            row.right.append(site)
        else:
            row.refused[site] = refusals[0]
    return row


def _from_the_first(model: nn.Module, ids: Tensor, states: Any) -> Any:
    """``hidden_states`` with what enters the first block in front, which some models leave out (Mamba)."""
    first: list[Tensor] = []
    from sae_engine.data.places import find_place

    try:
        block = find_place(model, "resid_post", 0).module
    except (ValueError, TypeError, RuntimeError):
        return states
    handle = block.register_forward_hook(lambda _m, _a, out: first.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        handle.remove()
        if states is not None and _close(states[0], first[0]):
            return (model.get_input_embeddings()(ids), *states)
    return states


def _try(model: nn.Module, ids: Tensor, site: str, states: Any) -> tuple[list[int], list[int], list[str]]:
    """Blocks in which the site is right, those in which it is wrong, and the refusals of the others."""
    from sae_engine.data import read_activations

    right: list[int] = []
    wrong: list[int] = []
    refusals: list[str] = []
    for layer in range(LAYERS):
        try:
            x = read_activations(model, ids, layer=layer, site=site)
            (right if _is_right(model, ids, site, layer, x, states) else wrong).append(layer)
        except (ValueError, TypeError, RuntimeError) as error:
            if "layer must be in 0.." in str(error):
                break
            refusals.append(_short(error))
    return right, wrong, refusals


def _is_right(model: nn.Module, ids: Tensor, site: str, layer: int, x: Tensor, states: Any) -> bool:
    from sae_engine.data import read_activations
    from sae_engine.data.places import find_place

    def read(name: str) -> Tensor | None:
        try:
            return read_activations(model, ids, layer=layer, site=name)
        except ValueError:
            return None

    pre, post = read("resid_pre"), read("resid_post")
    if site == "resid_pre":
        return states is None or _close(x, states[layer])
    if site == "resid_post":
        if states is None:
            return False
        last = len(states) - 2
        return _close(x, states[layer + 1]) if layer < last else _is_before_final_norm(model, x, states[-1])
    attention, middle, mlp = read("attn_out"), read("resid_mid"), read("mlp_out")
    if pre is None or post is None:
        return False
    if site == "resid_mid":
        return mlp is not None and _close(x + mlp, post)
    if site == "attn_out":
        return mlp is not None and _close(pre + x + mlp, post) and (middle is None or _close(pre + x, middle))
    block = find_place(model, "resid_pre", layer).module
    named = [(name.split("."), p) for name, p in block.named_parameters()]
    weights = [p for parts, p in named  # a norm may hold an MLP of its own
               if set(parts) & set(_MLP_WEIGHTS) and not any("norm" in part for part in parts)]  # fmt: skip
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    other, without = read("mlp_out"), read("resid_post")
    with torch.no_grad():
        for p, value in zip(weights, kept, strict=True):
            p.copy_(value)
    if other is None or without is None or _close(other, x) or _close(x, post):
        return False
    whole = attention is None or _close(pre + attention + x, post)
    largest = max(float(t.abs().max()) for t in (without, other, post))  # what cancels in the differences
    return whole and bool(((without - other) - (post - x)).abs().max() <= 1e-4 * largest)


def _is_before_final_norm(model: nn.Module, x: Tensor, last: Tensor) -> bool:
    if _close(x, last):
        return True
    for name, module in model.named_modules():
        if any(part.isdigit() for part in name.split(".")) or len(list(module.parameters())) > 2:
            continue
        try:
            with torch.no_grad():
                if _close(module(x), last):
                    return True
        except Exception:  # no norm
            continue
    return False


def _close(a: Tensor, b: Tensor) -> bool:
    # Sums of a few terms in fp32, and norms of them: a thousand eps of the largest is far below what is looked for.
    return a.shape == b.shape and bool(((a - b).abs().max() <= 1e-4 * b.abs().max()) & a.isfinite().all())


def _short(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")
    for prefix in ("site 'resid_mid' of ", "site 'attn_out' of ", "site 'mlp_out' of ", "layer: ", "model: "):
        text = text.removeprefix(prefix)
    return text if len(text) <= 200 else text[:197] + "..."


def kinds() -> list[str]:
    """Every model type of AutoModelForCausalLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(rows: list[Row]) -> str:
    """The scan as Markdown."""
    import transformers

    tried = [row for row in rows if "all" not in row.refused]
    head = [
        "# Which sites can be read of which architecture",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}; made by "
        "`make architectures`, which says how each site is checked. Of "
        f"{len(rows)} model types, {len(tried)} were built tiny and run on token ids alone; in those nothing is WRONG "
        "where the word does not stand. A refusal is what a user gets.",
        "",
        "| model type | class | right, in every block | refused, and why |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *(row.line() for row in rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Which sites can be read of which architecture.")
    parser.add_argument("kinds", nargs="*", help="model types; all")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    rows = []
    for kind in args.kinds or kinds():
        rows.append(scan(kind))
        print(rows[-1].line(), flush=True)
    if not args.kinds:
        args.out.write_text(table(rows), encoding="utf-8")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
