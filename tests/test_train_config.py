"""Configurations: what they mean, how they are read, and every way in which they can be wrong."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine import cli, rules
from sae_engine.checkpoints._checkpoint import build, of
from sae_engine.checkpoints._folding import fold_input_scale
from sae_engine.training import TrainStep
from sae_engine.training.architectures import ARCHITECTURES, REFUSED, JumpReLUSAE, MatryoshkaBatchTopKSAE, TopKSAE
from sae_engine.training.auto import resolved, widths_of
from sae_engine.training.config import (
    ConfigError,
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    SAEConfig,
    TrainConfig,
)
from sae_engine.training.config_files import json_schema, read_yaml, with_settings
from sae_engine.training.presets import PRESETS, preset
from sae_engine.training.schedule import lr_factor, warm_up_factor

PLACE = "blocks.2.hook_resid_pre"


def config_of(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return TrainConfig.from_yaml(file)


def of_model(config, *, width=64, device_type="cpu", embedded=False):
    pairs = [(width, width)] * len(config.expanded().saes)
    return resolved(config, pairs, max_length=2048, device_type=device_type, embedded=embedded)


# -------------------------------------------------------------------------------------------------- files


def test_a_file_as_the_documentation_has_it(tmp_path):
    config = config_of(tmp_path, """
model: {model_name: openai-community/gpt2}
data: {dataset_path: HuggingFaceFW/fineweb, dataset_name: sample-10BT, training_tokens: 500e6}
saes: [{hook_name: blocks.8.hook_resid_pre, architecture: topk, d_sae: 32768}]
sweep: {k: [32, 64, 128]} # × saes
optim: {lr: 1e-3, adam_eps: 1}
output: {output_path: runs/gpt2}
""")
    assert config.data.training_tokens == 500_000_000 and isinstance(config.data.training_tokens, int)
    assert config.optim.lr == 0.001 and config.optim.adam_eps == 1
    assert [sae.architecture.k for sae in config.expanded().saes] == [32, 64, 128]
    assert config.updates == 122_070
    assert config == replace(config, model=ModelConfig(model_name="openai-community/gpt2"))


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("5e6", 5e6), ("500E+6", 5e8), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("1_000", 1000), ("0x10", 16),
    (".inf", float("inf")), ("on", "on"), ("yes", "yes"), ("off", "off"), ("true", True), ("1:30", "1:30"),
    ("2026-01-01", "2026-01-01"), ("010", "010"), ("~", None), ("null", None), ("'5'", "5"), ("e5", "e5"),
])  # fmt: skip
def test_scalars(text, value):
    found = read_yaml(text, "text")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("tag", ARCHITECTURES)
def test_what_is_written_is_read_back(tag, tmp_path):
    data = DataConfig(separator=0, training_tokens=10**7, max_norm_multiple=1 / 3)
    model = ModelConfig(model_name="yes", model_from_pretrained_kwargs={"a": {"b": [1, "1", 1e-7]}, "c": None})
    config = TrainConfig(data=data, model=model, logger=LoggerConfig(report_to=["wandb"]), sweep={"seed": [1, 2]},
                         saes=[SAEConfig(hook_name=PLACE, architecture=ARCHITECTURES[tag]())])  # fmt: skip
    for one in (config, of_model(config)):
        assert config_of(tmp_path, one.to_yaml()) == one
        assert TrainConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert config.to_dict()["saes"][0]["architecture"] == tag


BAD = [
    ("3", ["a configuration must be a mapping of names to values, got 3"]),
    ("{}", ["saes: must be given"]),
    ("saes: []", ["saes: must hold at least one autoencoder"]),
    ("saes: 3", ["saes: must be a list, got 3"]),
    ("saes: [{hook_nam: x.y}]",
     ["saes.0.hook_nam: unknown; did you mean hook_name?", "saes.0.hook_name: must be given"]),
    ("saes: [S]\nmodle: {}", ["modle: unknown; did you mean model?"]),
    ("saes: [S]\nlr: 1e-3", ["lr: unknown; did you mean optim.lr?"]),
    ("saes: [S]\noptim: {training_tokens: 3}", ["optim.training_tokens: unknown; did you mean data.training_tokens?"]),
    ("saes: [{hook_name: a.b, architecture: jumprelu, k: 3}]",
     ["saes.0.k: unknown; it is a field of topk, batchtopk, matryoshka_batchtopk, abstopk, feature_choice, "
      "statistical_topk, sampled_topk, and this is jumprelu"]),
    ("saes: [{hook_name: a.b, architecture: topkk}]",
     ["saes.0.architecture: must be one of topk, ", "did you mean topk?"]),
    ("saes: [{hook_name: a.b, architecture: gradient_topk}]", ["saes.0.architecture: gradient_topk cannot be trained"]),
    ("saes: [{hook_name: a.b, k: '64', d_sae: 1.5, seed: true}]",
     ["saes.0.k: must be an int, got '64'", "saes.0.d_sae: must be an int, got 1.5", "saes.0.seed: must be an int"]),
    ("saes: [S]\noptim: {lr: fast}\ndata: {packing: on}\nseed: -1\ndevice: gpu",
     ["optim.lr: must be 'auto' or a number, got 'fast'", "data.packing: must be true or false, got 'on'",
      "seed: must be at least 0, got -1", "device: must be a device such as cpu or cuda:1, got 'gpu'"]),
    ("saes: [{hook_name: blocks.1.hook_foo}, {hook_name: a.b, k: 64, d_sae: 32}]",
     ["saes.0.hook_name: must be one of resid_pre, z, attn_out", "saes.1.k: must not exceed d_sae = 32, got 64"]),
    ("saes: [{hook_name: resid_pre}]", ["saes.0.hook_name: layer must be given"]),
    ("saes: [{hook_name: a.b, name: a/b}]", ["saes.0.name: must be a name for a folder"]),
    ("saes: [{hook_name: a.b, name: x}, {hook_name: c.d, name: x}]", ["saes: two are named x"]),
    ("saes: [{hook_name: a.b, d_sae: null, expansion_factor: null}]", ["saes.0.d_sae: must be given where"]),
    ("saes: [{hook_name: a.b, architecture: matryoshka_batchtopk, widths: [4, 2]}]",
     ["saes.0.widths: must be positive"]),
    ("saes: [{hook_name: a.b, architecture: sampled_topk, pool: .5}]", ["saes.0.pool: must be at least 1, got 0.5"]),
    ("saes: [{hook_name: a.b, k: 0, lr: .nan}, 3]", ["saes.0.k: must be at least 1, got 0", "saes.0.lr: must be finite",
                                                   "saes.1: must be a mapping"]),
    ("saes: [S]\ndata: {shuffle_tokens: 4096}",
     ["data.shuffle_tokens: must be a multiple of shuffle_chunks · train_batch_size_tokens = 32768, got 4096"]),
    ("saes: [S]\ndata: {prefetch: true}\noptim: {cuda_graphs: true}",
     ["data.prefetch: must be false with optim.cuda_graphs"]),
    ("saes: [S]\ndata: {training_tokens: 4095}", ["data.training_tokens: must be at least an update's 4096, got 4095"]),
    ("saes: [S]\ndata: {context_size: 8, seqpos_slice: [9, null]}", ["data.seqpos_slice: keeps none of 8 positions"]),
    ("saes: [S]\ndata: {seqpos_slice: [1]}", ["data.seqpos_slice: must have more entries"]),
    ("saes: [S]\ndata: {separator: sep, dataset_path: ''}",
     ["data.dataset_path: must be a word", "data.separator: must be"]),
    ("saes: [S]\nlogger: {report_to: [wand]}", ["logger.report_to.0: must be 'wandb', 'tensorboard' or 'trackio'"]),
    ("saes: [S]\noutput: {push_to_hub: true}", ["output.hub_model_id: must say where to"]),
    ("saes: [S]\nsweep: {k: 3}", ["sweep.k: must be a list, got 3"]),
    ("saes: [S]\nsweep: {k: [0]}", ["sweep.k: must be at least 1, got 0"]),
    ("saes: [S]\nsweep: {kk: [1]}", ["sweep.kk: topk has no such field; did you mean k?"]),
    ("saes: [S]\nsweep: {architecture: [relu]}", ["sweep.architecture: must be one of"]),
    ("saes: [S]\nsaes: []", ["'saes' is given twice"]),
    ("saes: [", ["run.yaml: while parsing"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "faults"), BAD, ids=[text[:60] for text, _ in BAD])
def test_every_fault_is_a_line_with_its_path(text, faults, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text.replace("S", f"{{hook_name: {PLACE}}}"))
    for fault in faults:
        assert fault in str(caught.value)
    starts = {fault.partition(":")[0] for fault in faults if ": " in fault}
    assert {path for path, _ in caught.value.faults if path} <= starts  # and nothing is said twice or besides
    assert len(caught.value.faults) == len({*caught.value.faults})


@pytest.mark.parametrize(("make", "fault"), [
    (lambda: SAEConfig(hook_name=3), "hook_name: must be a word, got 3"),
    (lambda: SAEConfig(hook_name=PLACE, architecture="topk"), "architecture: must be one of sae_engine.training"),
    (lambda: TrainConfig(saes=[], model="gpt2"),
     "model: must be a ModelConfig, got 'gpt2'\nsaes: must hold at least one"),
    (lambda: TrainConfig(saes=[SAEConfig(hook_name=PLACE)], sweep=[3]), "sweep: must be a mapping"),
    (lambda: TopKSAE(k=2.5), "k: must be an int, got 2.5"),
    (lambda: OptimConfig(lr="fast"), "lr: must be a number, got 'fast', which is not 'auto' either"),
    (lambda: MatryoshkaBatchTopKSAE().build_rule(64, 10), "widths: is still 'auto'"),
])  # fmt: skip
def test_python_says_it_too(make, fault):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(fault)
    assert pickle.loads(pickle.dumps(caught.value)).faults == caught.value.faults  # as processes hand it on


def test_settings():
    config = with_settings(preset("embedded"), ["saes.0.k=64", "data.training_tokens=5e6", "optim.lr=1e-3",
                                                "logger.report_to=[wandb]", "model.revision=main",
                                                "model.model_from_pretrained_kwargs.device_map=auto"])  # fmt: skip
    assert (config.saes[0].architecture, config.data.training_tokens) == (TopKSAE(k=64), 5_000_000)
    assert config.model.model_from_pretrained_kwargs == {"device_map": "auto"}
    other = with_settings(config, ["saes.0.architecture=jumprelu"])  # which has no k
    assert other.saes[0].architecture == JumpReLUSAE()
    for setting, fault in [
        ("saes.1.k=3", "saes.1: must be a number below 1"), ("sae.0.k=3", "sae: unknown; did you mean saes?"),
        ("optim.lr", "--set: must be PATH=VALUE"), ("optim.learning=3", "optim.learning: unknown; there are"),
        ("optim.lr.x=3", "optim.lr.x: unknown"), ("saes.0.k=[", "--set saes.0.k: while parsing"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            with_settings(config, [setting])
        assert str(caught.value).startswith(fault)


def test_a_sweep_has_names_of_its_own():
    config = TrainConfig(saes=[SAEConfig(hook_name=PLACE), SAEConfig(hook_name=PLACE, name="mine")],
                         sweep={"architecture": ["topk", "batchtopk"], "hook_name": [PLACE, "a.b:input"]})  # fmt: skip
    assert [sae.name for sae in config.expanded().saes] == [
        f"{PLACE}-topk", "a.b_input-topk", f"{PLACE}-batchtopk", "a.b_input-batchtopk",
        f"mine-architecturetopk-hook_name{PLACE}", "mine-architecturetopk-hook_namea.b_input",
        f"mine-architecturebatchtopk-hook_name{PLACE}", "mine-architecturebatchtopk-hook_namea.b_input",
    ]  # fmt: skip
    assert config.expanded().expanded() == config.expanded()
    twice = TrainConfig(saes=[SAEConfig(hook_name=PLACE, seed=s) for s in (0, 1)]).expanded()
    assert [sae.name for sae in twice.saes] == [f"{PLACE}-topk", f"{PLACE}-topk-2"]


def test_the_schema_describes_files():
    schema = json_schema(TrainConfig)
    entries = schema["properties"]["saes"]["items"]["discriminator"]["mapping"]
    assert entries.keys() == ARCHITECTURES.keys()
    names = schema["$defs"]["TopKSAEEntry"]["properties"]
    assert {"hook_name", "k", "d_sae"} <= names.keys() and "l1_coefficient" not in names


# -------------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_is_left_open(name):
    config = of_model(preset(name), width=256, embedded=preset(name).model.model_name == "embedded")
    assert "auto" not in config.to_yaml()
    assert of_model(config, width=256) == config


def test_long_runs_are_trained_as_published():
    optim = of_model(preset("gpt2-topk-32k"), width=768).optim
    assert optim.lr == pytest.approx(2e-4 / 2**0.5, rel=1e-3)  # rounded to four digits
    assert (optim.adam_beta1, optim.lr_warm_up_steps, optim.dead_after) == (0.9, 1000, 10_000_000)
    assert optim.lr_decay_steps == 500_000_000 // 4096 // 5
    gemma = of_model(preset("gemma2-2b-jumprelu"), width=2304)
    assert (gemma.optim.adam_beta1, gemma.optim.lr, gemma.optim.sparsity_warm_up_steps) == (0.0, 7e-5, 10_000)
    assert gemma.saes[0].architecture.jumprelu_bandwidth == 0.001 * 48  # rows of norm 48 instead of 1


def test_thresholds_start_where_the_target_fires():
    [config] = of_model(TrainConfig(saes=[SAEConfig(hook_name=PLACE, architecture=JumpReLUSAE(l0_target=16))])).saes
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(7))
    codes = config.build(64, 64, steps=10, seed=0).encode(8 * x / x.norm(dim=1, keepdim=True))
    assert 12 < (codes.values > 0).sum() / 256 < 20  # of 1024


def test_short_runs_are_trained_faster():
    for tokens, factor in ((4096 * 20_000, 1.0), (4096 * 5_000, 2.0), (4096 * 192, 4.0)):
        config = TrainConfig(saes=[SAEConfig(hook_name=PLACE, d_sae=2**14)], data=DataConfig(training_tokens=tokens))
        config = of_model(config)
        assert config.optim.lr == pytest.approx(2e-4 * factor)
        assert config.optim.lr_warm_up_steps == tokens // 4096 // 20
        assert config.optim.dead_after == (10_000_000 if factor == 1 else tokens // 10)


def test_each_autoencoder_has_its_own_numbers():
    """They are what it would have alone, whatever it is trained beside."""
    saes = [SAEConfig(hook_name=PLACE, d_sae=2**12), SAEConfig(hook_name=PLACE, d_sae=2**14, lr=1e-2),
            SAEConfig(hook_name=PLACE, architecture=JumpReLUSAE())]  # fmt: skip
    data = DataConfig(training_tokens=4096 * 20_000)
    together = of_model(TrainConfig(saes=saes, data=data))
    for sae, alone in zip(together.saes, saes, strict=True):
        config = of_model(TrainConfig(saes=[alone], data=data))
        assert together.optim_of(sae) == config.optim_of(config.saes[0])
    assert [together.optim_of(sae).lr for sae in together.saes] == [4e-4, 1e-2, 7e-5]


def test_what_does_not_fit_the_model(tmp_path):
    for sae, data, fault in [
        (SAEConfig(hook_name=PLACE, architecture=TopKSAE(k=2000)), {},
         "saes.0.k: must not exceed d_sae = 1024, got 2000"),
        (SAEConfig(hook_name=PLACE), {"context_size": 4096}, "data.context_size: must not exceed the model's 2048"),
        (SAEConfig(hook_name=PLACE, architecture=JumpReLUSAE(), normalize_activations="none"), {},
         "saes.0.jumprelu_bandwidth: must be a number, since rows that are not normalized"),
        (SAEConfig(hook_name=PLACE, architecture=MatryoshkaBatchTopKSAE(widths=[4, 8])), {},
         "saes.0.widths: must end with d_sae = 1024, got [4, 8]"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            of_model(TrainConfig(saes=[sae], data=DataConfig(**data)))
        assert str(caught.value).startswith(fault)
    with pytest.raises(ValueError, match="widths must have one pair"):
        resolved(preset("embedded"), [], max_length=256, device_type="cpu", embedded=True)


def test_the_run_folder_has_a_name_that_is_free(tmp_path):
    config = TrainConfig(saes=[SAEConfig(hook_name=PLACE, name="a")])
    config = with_settings(config, [f"output.output_path={tmp_path / 'auto'}"])
    for name in ("embedded-a", "embedded-a-2"):
        assert of_model(config).output.output_path == str(tmp_path / name)
        (tmp_path / name).mkdir()


def test_widths_come_from_a_store(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 40)
    out = str(tmp_path / "store")
    assert cli.main(["collect", out, "--text", str(text), "--site", "blocks.1.mlp.hook_post", "--tokens", "64",
                     "--context-length", "32", "--device", "cpu", "--quiet"]) == 0  # fmt: skip
    config = TrainConfig(saes=[SAEConfig(hook_name="blocks.1.mlp.hook_post")], data=DataConfig(store_path=out))
    assert widths_of(config) == ([(1024, 1024)], 32, False)
    assert widths_of(replace(config, data=DataConfig()))[0] == [(1024, 1024)]  # of the model itself
    wrong = replace(config, saes=(*config.saes, SAEConfig(hook_name=PLACE)))
    with pytest.raises(ConfigError, match=rf"^data.store_path: .* holds no activations of {PLACE}; it holds blo"):
        widths_of(wrong)
    (tmp_path / "store").rename(tmp_path / "below")
    assert widths_of(replace(config, data=DataConfig(store_path=str(tmp_path))))[0] == [(1024, 1024)]


@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (1, 1), (10, 20), (60, 60), (100, 100)])
def test_the_schedule_spans_the_run(warm_up, decay):
    """It rises, holds, falls, never wastes an update on a rate of 0, and ends where the run does."""
    factors = [lr_factor(update, warm_up=warm_up, decay=decay, total=100) for update in range(101)]
    assert min(factors[:100]) > 0 and max(factors) <= 1
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] == (1 / warm_up if warm_up > 1 else 1.0)
    assert factors[99] == (1 / decay if decay else 1.0) and factors[100] == (0.0 if decay else 1.0)
    assert [warm_up_factor(update, warm_up) for update in range(5)] == [lr_factor(
        update, warm_up=warm_up, decay=0, total=100) for update in range(5)]  # fmt: skip
    with pytest.raises(ValueError, match="update"):
        lr_factor(-1, warm_up=warm_up, decay=decay, total=100)


# -------------------------------------------------------------------------------------------------- autoencoders


def test_every_rule_is_trained_or_refused():
    trained = {type(kind().resolved(64, 256, "layer_norm").build_rule(256, 100)) for kind in ARCHITECTURES.values()}
    refused = {kind for kind, _ in REFUSED.values()}
    every = {kind for name in rules.__all__ if isinstance(kind := getattr(rules, name), type)
             and issubclass(kind, se.Activation) and kind is not se.Activation}  # fmt: skip
    assert trained | refused == every and not trained & refused


@pytest.mark.parametrize("tag", ARCHITECTURES)
def test_every_architecture_trains(tag):
    config = TrainConfig(saes=[SAEConfig(hook_name=PLACE, architecture=ARCHITECTURES[tag](), d_sae=64)])
    config = of_model(config, width=16)
    [sae_config] = config.saes
    sae = sae_config.build(16, 16, steps=config.updates, seed=0)
    kind, optim = sae_config.architecture, config.optim_of(sae_config)
    losses = [*kind.losses(16, 16), se.losses.AuxK(k=sae_config.aux_k, coefficient=sae_config.aux_k_coefficient)]
    assert set(kind.sparsity_name()) <= {loss.name for loss in losses}
    assert (config.optim.sparsity_warm_up_steps > 0) == bool(kind.sparsity_name())
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    step = TrainStep(sae, lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), losses=losses)
    for seed in range(2):
        x = torch.randn(128, 16, generator=torch.Generator().manual_seed(seed))
        report = step(x * 4 / x.norm(dim=1).mean())
        assert torch.isfinite(report["loss"])
    moved = {name for name, tensor in sae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"W_enc", "W_dec", "b_dec"} <= moved
    assert {f"activation.{name}" for name, _ in sae.activation.named_parameters()} <= moved


def test_first_weights_are_those_of_the_seed():
    config = SAEConfig(hook_name=PLACE, d_sae=32, architecture=TopKSAE(k=4))
    state = torch.get_rng_state()
    first, again = (config.build(8, 8, steps=10, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.W_enc, again.W_enc) and torch.equal(first.W_enc, first.W_dec.T)
    assert torch.equal(replace(config, seed=3).build(8, 8, steps=10, seed=4).W_enc, first.W_enc)
    assert not torch.equal(config.build(8, 8, steps=10, seed=4).W_enc, first.W_enc)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(32))
    coder = config.build(8, 6, steps=10, seed=3)
    assert coder.W_dec.shape == (32, 6) and coder.W_enc.shape == (8, 32) and coder.training


@pytest.mark.parametrize(("start", "low", "high"), [(8, 4, 16), (None, 80, 128)])
def test_top_afa_starts_as_its_authors_or_sparse(start, low, high):
    architecture = ARCHITECTURES["top_afa"](l0_at_start=start)
    sae = SAEConfig(hook_name=PLACE, d_sae=256, architecture=architecture).build(64, 64, steps=10, seed=12345)
    assert low < sae.encode(torch.randn(64, 64)).l0.float().mean() < high


def test_a_transcoder_is_not_tied():
    config = SAEConfig(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.hook_mlp_out", d_sae=32,
                       architecture=TopKSAE(k=4))  # fmt: skip
    coder = config.build(8, 8, steps=10, seed=3)
    assert not coder.apply_b_dec_to_input and not torch.equal(coder.W_enc, coder.W_dec.T)
    with pytest.raises(ConfigError, match="normalize_activations: must not be layer_norm with hook_name_out"):
        replace(config, normalize_activations="layer_norm")
    with pytest.raises(ConfigError, match="hook_name_out: must not be given for top_afa"):
        replace(config, architecture=ARCHITECTURES["top_afa"]())


@pytest.mark.parametrize(("tag", "target"), [(tag, target) for tag in ARCHITECTURES for target in (None, "blocks.3.mlp")
                                             if target is None or tag != "top_afa"])  # fmt: skip
def test_what_was_trained_on_scaled_rows_takes_them_as_they_are(tag, target):
    """By every rule it keeps the same latents, which say the same."""
    kind = ARCHITECTURES[tag]().resolved(16, 64, "expected_average_only_in")
    config = SAEConfig(hook_name=PLACE, hook_name_out=target, architecture=kind, d_sae=64)
    sae = config.build(16, 16, steps=1, seed=0)
    x = 3 * torch.randn(64, 16) + 1
    scale, target_scale = 0.25, 0.25 if target is None else 2.0  # powers of 2: nothing is rounded
    step = TrainStep(sae, lr=1e-3, losses=kind.losses(16, 16))
    for _ in range(2):
        step(x * scale, None if target is None else x * target_scale)
    folded = build(se.SparseAutoencoder, fold_input_scale(of(sae), scale, target_scale), Path("x")).eval()
    codes, found = sae.eval().encode(x * scale), folded.encode(x)
    assert torch.equal(codes.indices, found.indices) and torch.equal(codes.offsets, found.offsets)
    torch.testing.assert_close(folded.decode(found), sae.decode(codes) / target_scale)


def test_a_run_may_start_from_what_was_saved(tmp_path):
    made = SAEConfig(hook_name=PLACE, d_sae=32, architecture=TopKSAE(k=4)).build(8, 8, steps=10, seed=3)
    made.save_pretrained(tmp_path)
    start = SAEConfig(hook_name=PLACE, d_sae=32, architecture=TopKSAE(k=8), normalize_activations="none",
                      from_pretrained=str(tmp_path))  # fmt: skip
    found = start.build(8, 8, steps=10, seed=4)
    assert torch.equal(found.W_enc, made.W_enc) and found.activation.k == 8 and found.training
    for changed, fault in (({"d_sae": 64}, "has d_sae = 32, not 64"),
                           ({"architecture": ARCHITECTURES["abstopk"](k=4)}, "is a TopK, not a AbsTopK")):  # fmt: skip
        with pytest.raises(ConfigError, match=fault):
            replace(start, **changed).build(8, 8, steps=10, seed=4)
    scaled = replace(start, normalize_activations="expected_average_only_in")
    with pytest.raises(ConfigError, match=r"normalize_activations: must be none: .* does not say by what its rows"):
        scaled.build(8, 8, steps=10, seed=4)
    with torch.no_grad():
        made.W_dec.mul_(2)
    made.provenance = se.Provenance(activation_scale=0.5)  # its decoder has twice the norm for it
    made.save_pretrained(tmp_path)
    again = scaled.build(8, 8, steps=10, seed=4)
    assert torch.equal(again.W_dec, made.W_dec / 2) and torch.equal(again.W_enc, made.W_enc * 2)
    with pytest.raises(ConfigError, match=r"normalize_decoder: must be false: rows .*, or normalize_activations exp"):
        start.build(8, 8, steps=10, seed=4)
    made.provenance = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"normalize_decoder: must be false: rows of .* be scaled to 1$"):
        start.build(8, 8, steps=10, seed=4)
    assert replace(start, normalize_decoder=False).build(8, 8, steps=10, seed=4).W_dec.norm(dim=1).min() > 1.9


# -------------------------------------------------------------------------------------------------- command line


def test_the_rate_of_further_training_is_at_most_that_of_a_long_run():
    saes = [SAEConfig(hook_name=PLACE, d_sae=2**14, from_pretrained=source) for source in (None, "somewhere")]
    config = TrainConfig(saes=saes, data=DataConfig(training_tokens=2_000_000))
    found = resolved(config, [(8, 8)] * 2, max_length=64, device_type="cpu", embedded=False)
    assert found.updates == 488 and [found.optim_of(sae).lr for sae in found.saes] == [8e-4, 2e-4]
    few = resolved(replace(config, data=DataConfig(training_tokens=25 * 4096)), [(8, 8)] * 2, max_length=64,
                   device_type="cpu", embedded=False)  # fmt: skip
    assert [few.optim_of(sae).lr for sae in few.saes] == [8e-4, 5e-5]  # which few updates do not undo
    jumps = [replace(sae, architecture=ARCHITECTURES["jumprelu"]()) for sae in saes]
    found = resolved(replace(config, saes=jumps), [(8, 8)] * 2, max_length=64, device_type="cpu", embedded=False)
    first, further = (found.optim_of(sae).sparsity_warm_up_steps for sae in found.saes)
    assert first > 0 and further == 0


def test_the_printed_configuration_is_the_run_s(tmp_path, capsys):
    assert cli.main(["train", "--preset", "embedded", "--print-config", "--set", "saes.0.k=16", "--output", "out"]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.00181  # auto\n" in text and "k: 16\n" in text and "output_path: out\n" in text
    assert "auto" not in config_of(tmp_path, text).to_yaml()
    assert cli.main(["train", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == config_of(tmp_path, text).to_yaml()
    assert cli.main(["train", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(TrainConfig)


def test_errors_of_the_command_are_lines(tmp_path, capsys):
    for arguments, lines in [
        (["--preset", "embeded"], ["a fault in the configuration:", "did you mean embedded?"]),
        (["--preset", "embedded", "--set", "saes.0.kk=3", "--set", "optim.lr=x"],
         ["2 faults in the configuration:", "saes.0.kk: unknown; did you mean k?",
          "optim.lr: must be 'auto' or a number"]),
        ([], ["give one of CONFIG.yaml, --preset (embedded, "]),
        (["x.yaml", "--preset", "embedded"], ["give one of CONFIG.yaml"]),
        (["--resume", "run", "--preset", "embedded"],
         ["--resume goes on with the run's own configuration, without --pre"]),
        ([str(tmp_path / "none.yaml")], ["none.yaml"]),
        (["--preset", "gpt2-topk-32k", "--set", "model.model_name=nobody/none", "--set",
          f"output.output_path={tmp_path / 'run'}"],
         ["the hub did not answer for 'nobody/none'"]),
        (["--preset", "embedded", "--set", "model.model_name=./none", "--print-config"],
         ["model.model_name: is neither a folder that exists nor a hub name: './none'"]),
    ]:  # fmt: skip
        assert cli.main(["train", *arguments]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(lines) and said[0].startswith("sae-engine: error: ")
        for line, wanted in zip(said, lines, strict=True):
            assert wanted in line


def test_what_from_pretrained_takes_reaches_it(monkeypatch):
    import transformers

    from sae_engine.training.plan import _language_model

    seen, original = [], transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained",
                        lambda folder, **options: (seen.append(options), original(folder, **options))[1])
    saes = [SAEConfig(hook_name="blocks.2.mlp.hook_post", d_sae=64, architecture=TopKSAE(k=4))]  # of no known width
    named = ModelConfig(model_from_pretrained_kwargs={"attn_implementation": "eager", "trust_remote_code": True})
    config = TrainConfig(model=named, saes=saes)
    assert widths_of(config)[0] == [(1024, 1024)]
    assert _language_model(named, "model", torch.device("cpu"), None, None).model.config._attn_implementation == "eager"
    assert [(options["attn_implementation"], options["trust_remote_code"]) for options in seen] == [("eager", True)] * 2
