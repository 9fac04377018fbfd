"""Configurations that are ready to run, by name."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from ._faults import ConfigError, nearest
from .architectures import JumpReLUSAE, TanhJumpReLUSAE, TopKSAE
from .config import DataConfig, EvalConfig, ModelConfig, OptimConfig, SAEConfig, TrainConfig
from .config_files import with_settings


def _embedded() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(training_tokens=1_000_000),
        saes=(SAEConfig(hook_name="blocks.2.hook_resid_pre", architecture=TopKSAE(k=32), d_sae=2048),),
        optim=OptimConfig(train_batch_size_tokens=512),  # Adam learns by updates: FVU .11 after 290 k tokens, 4096: .19
    )


def _embedded_tiny() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(training_tokens=16_384, context_size=64, shuffle_tokens=1024, shuffle_chunks=2),
        saes=(SAEConfig(hook_name="blocks.1.hook_resid_pre", architecture=TopKSAE(k=8), d_sae=256),),
        optim=OptimConfig(train_batch_size_tokens=512),
        eval=EvalConfig(eval_steps=16, eval_tokens=1024),
    )


def _embedded_clt() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(training_tokens=150_000),
        saes=(SAEConfig(
            name="clt", hook_name="blocks.{0..3}.hook_resid_mid", hook_name_out="blocks.{0..3}.hook_mlp_out",
            wiring="causal", architecture=TanhJumpReLUSAE(l0_coefficient=4.0), d_sae=1024,
            normalize_activations="standardize", b_dec_init="mean", aux_k_coefficient=0.0,
        ),),
        optim=OptimConfig(train_batch_size_tokens=512),
    )  # fmt: skip


def _gpt2() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(model_name="openai-community/gpt2"),
        data=DataConfig(dataset_path="HuggingFaceFW/fineweb", dataset_name="sample-10BT", training_tokens=500_000_000),
        saes=(SAEConfig(hook_name="blocks.8.hook_resid_pre", architecture=TopKSAE(k=32), d_sae=32_768),),
    )


def _gemma2() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(model_name="google/gemma-2-2b", dtype="bfloat16"),
        data=DataConfig(dataset_path="HuggingFaceFW/fineweb", dataset_name="sample-10BT", context_size=1024,
                        training_tokens=4_000_000_000),
        saes=(SAEConfig(hook_name="blocks.12.hook_resid_post", architecture=JumpReLUSAE(), d_sae=16_384),),
    )  # fmt: skip


PRESETS: dict[str, tuple[str, Callable[[], TrainConfig]]] = {
    "embedded": ("TopK on the embedded model, minutes on two cores of a CPU, no network", _embedded),
    "embedded-tiny": ("the same in seconds, to see that everything runs", _embedded_tiny),
    "embedded-clt": ("a cross-layer transcoder of the embedded model by the published recipe, minutes", _embedded_clt),
    "gpt2-topk-32k": ("TopK, 32,768 latents on GPT-2 small before block 8, 500 M tokens of FineWeb", _gpt2),
    "gemma2-2b-jumprelu": ("JumpReLU as Gemma Scope's, 16,384 latents behind block 12, 4 G tokens of FineWeb", _gemma2),
}


def preset(name: str, settings: Sequence[str] = ()) -> TrainConfig:
    """A configuration by its name; :data:`PRESETS` has them with what each is.

    Args:
        settings: changes, as :func:`~sae_engine.training.config_files.with_settings` takes them.

    Raises:
        ConfigError: there is none of that name, or a setting is wrong.

    Example:
        >>> preset("gpt2-topk-32k", ["saes.0.k=64"]).saes[0].architecture
        TopKSAE(k=64, over_sources=False)
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError([("--preset", f"must be one of {known}, got {name!r}{nearest(str(name), PRESETS)}")])
    config = PRESETS[name][1]()
    return with_settings(config, settings) if settings else config
