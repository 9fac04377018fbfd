"""The trainers of SAELens, dictionary_learning and sparsify, unchanged, on accelerated objects: `make test-interop`."""

import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from library_objects import MARKS, AutoEncoderTopK, BatchTopKSAE, saes, sparsify
from ranks import run_ranks

import sae_engine as se

os.environ.setdefault("WANDB_MODE", "disabled")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

pytestmark = MARKS

ROOT = Path(__file__).resolve().parent.parent
B, D, F, STEPS = 64, 16, 160, 50
EPS = torch.finfo(torch.float32).eps


def batches(moved):
    """Activations of a few hidden directions; ``moved`` by one rounding."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(40, D, generator=generator)
    for _ in range(STEPS):
        weights = torch.rand(B, 40, generator=generator) * (torch.rand(B, 40, generator=generator) < 0.1)
        yield (weights @ basis) * (1 + EPS if moved else 1)


def train_sae_lens(name, options, moved, tmp_path):
    torch.manual_seed(0)
    sae = getattr(saes, name)(getattr(saes, f"{name}Config")(d_in=D, d_sae=F, **options))
    cfg = SAETrainerConfig(
        total_training_samples=B * STEPS, train_batch_size_samples=B, lr=3e-3, lr_end=3e-4, dead_feature_window=8,
        feature_sampling_window=20, logger=LoggingConfig(log_to_wandb=False), n_checkpoints=1,
        checkpoint_path=str(tmp_path), save_final_checkpoint=True,
    )  # fmt: skip
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches(moved))
    losses, train_step = [], trainer._train_step

    def observed(**step):
        output = train_step(**step)
        losses.append({"loss": output.loss.item(), **{n: v.item() for n, v in output.losses.items()}})
        return output

    trainer._train_step = observed
    trainer.fit()
    assert trainer.dead_neurons.any()
    return sae, losses, {"since": trainer.n_forward_passes_since_fired, "frequency": trainer.act_freq_scores}


def train_dictionary(trainer_class, options, moved, tmp_path):
    trainer = trainer_class(
        steps=STEPS, activation_dim=D, dict_size=F, k=5, layer=0, lm_name="none", seed=0, lr=3e-3, warmup_steps=2,
        threshold_start_step=5, device="cpu", **options,
    )  # fmt: skip
    trainer.dead_feature_threshold = 4 * B
    losses, dead = [], 0
    for step, x in enumerate(batches(moved)):
        losses.append({"loss": trainer.update(step, x)})
        dead = max(dead, trainer.dead_features)
    assert dead > 0 and trainer.ae.threshold > 0
    return trainer.ae, losses, {"since": trainer.num_tokens_since_fired}


def train_sparsify(_, options, moved, tmp_path):
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=D, n_layer=2, n_head=2)).eval()
    if moved:
        with torch.no_grad():
            model.transformer.wte.weight.mul_(1 + EPS)
    tokens = torch.randint(50, (8 * STEPS, 16), generator=torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    config = sparsify.TrainConfig(
        sparsify.SparseCoderConfig(num_latents=F, k=5, **options), batch_size=8, layers=[0], lr=3e-3, optimizer="adam",
        lr_warmup_steps=2, auxk_alpha=1 / 32, dead_feature_threshold=1024, log_to_wandb=False, save_dir=str(tmp_path),
        save_every=10**9,
    )  # fmt: skip
    trainer = sparsify.Trainer(config, dataset, model)
    (coder,) = trainer.saes.values()
    losses = []
    handle = coder.register_forward_hook(
        lambda module, inputs, out: losses.append(
            {"fvu": out.fvu.item(), "auxk": out.auxk_loss.item(), "multi": out.multi_topk_fvu.item()}
        )
    )
    trainer.fit()
    handle.remove()
    assert any(loss["auxk"] > 0 for loss in losses)
    return coder, losses, {"since": next(iter(trainer.num_tokens_since_fired.values()))}


TRAINERS = {
    "SAETrainer topk": (train_sae_lens, "TopKTrainingSAE", {"k": 5}, "sae_lens"),
    "SAETrainer batchtopk": (train_sae_lens, "BatchTopKTrainingSAE", {"k": 4.5}, "sae_lens"),
    "SAETrainer matryoshka": (
        train_sae_lens, "MatryoshkaBatchTopKTrainingSAE",
        {"k": 4.5, "matryoshka_widths": [32, F], "use_matryoshka_aux_loss": True}, "sae_lens",
    ),
    "TopKTrainer": (train_dictionary, TopKTrainer, {}, "dictionary_learning"),
    "BatchTopKTrainer": (train_dictionary, BatchTopKTrainer, {}, "dictionary_learning"),
    "MatryoshkaBatchTopKTrainer": (
        train_dictionary, MatryoshkaBatchTopKTrainer, {"group_fractions": [0.25, 0.75]}, "dictionary_learning",
    ),
    "sparsify Trainer": (train_sparsify, None, {}, "sparsify"),
    "sparsify Trainer multi": (train_sparsify, None, {"multi_topk": True}, "sparsify"),
}  # fmt: skip


@pytest.mark.parametrize(("train", "what", "options", "library"), list(TRAINERS.values()), ids=list(TRAINERS))
def test_same_losses_for_fifty_steps(train, what, options, library, tmp_path):
    """To rounding: no further from the plain run than four times what one rounding of its inputs moves that run."""
    runs = {}
    for kind in ("plain", "moved", "accelerated"):
        with se.accelerated(library) if kind == "accelerated" else nullcontext():
            runs[kind] = train(what, options, kind == "moved", tmp_path / kind)
    assert ["accelerated" in repr(runs[kind][0]) for kind in runs] == [False, False, True]
    (_, plain, counts), (_, moved, _), (_, ours, our_counts) = runs.values()
    assert len(plain) == len(ours) == STEPS and plain[0].keys() == ours[0].keys()
    for name in plain[0]:
        series = [torch.tensor([step[name] for step in run], dtype=torch.float64) for run in (plain, moved, ours)]
        expected, control, actual = series
        allowed = 4 * ((control - expected).abs().max() + STEPS * EPS * expected.abs().max())
        assert (actual - expected).abs().max() <= allowed, name
    assert plain[-1] != plain[0]
    for name, count in counts.items():
        assert torch.equal(our_counts[name], count), name


def test_sae_trainer_with_sparse_activations(tmp_path):
    """SAELens' own sparse path does not run on a CPU; ours gives what its dense path gives."""
    _, dense, counts = train_sae_lens("TopKTrainingSAE", {"k": 5}, False, tmp_path)
    with se.accelerated("sae_lens"):
        _, sparse, ours = train_sae_lens("TopKTrainingSAE", {"k": 5, "use_sparse_activations": True}, False, tmp_path)
    for a, b in zip(sparse, dense, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # rounding, grown over 50 steps of Adam
    assert torch.equal(ours["since"], counts["since"])


def test_training_runner(tmp_path):
    """LanguageModelSAETrainingRunner makes its SAE from the registry, and trains it on a model's activations."""
    from datasets import Dataset
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    results = []
    for accelerated in (True, False):
        torch.manual_seed(0)
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=1, d_model=D, n_ctx=16, d_head=8, n_heads=2, d_vocab=50, act_fn="gelu", d_mlp=32, device="cpu",
                seed=0,
            )
        )  # fmt: skip
        tokens = torch.randint(50, (200, 16), generator=torch.Generator().manual_seed(1))
        dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
        cfg = LanguageModelSAERunnerConfig(
            sae=saes.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=5), model_name="none", dataset_path="none",
            hook_name="blocks.0.hook_resid_pre", is_dataset_tokenized=True, streaming=False, context_size=16,
            training_tokens=20 * B, train_batch_size_tokens=B, n_batches_in_buffer=4, store_batch_size_prompts=4,
            prepend_bos=False, lr=3e-3, device="cpu", seed=0, output_path=str(tmp_path / str(accelerated)),
            logger=LoggingConfig(log_to_wandb=False), n_checkpoints=0,
        )  # fmt: skip
        with se.accelerated("sae_lens") if accelerated else nullcontext():
            runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
        assert ("accelerated" in repr(runner.sae)) is accelerated
        results.append(runner.run().state_dict())
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-4)  # 20 steps of Adam of 3e-3
    loaded = saes.SAE.load_from_disk(tmp_path / "True")
    assert type(loaded) is saes.TopKSAE


def test_fused_adam_steps_as_plain_adam():
    """Gradients have the parameters' own strides: a fused Adam on a CPU would take others for theirs, silently."""
    results = []
    for accelerated, fused in ((True, True), (False, False)):
        torch.manual_seed(0)
        ae = AutoEncoderTopK(D, F, 5)
        ae = se.accelerate(ae) if accelerated else ae
        optimizer = torch.optim.Adam(ae.parameters(), lr=1e-2, fused=fused)
        for _, x in zip(range(5), batches(False), strict=False):
            optimizer.zero_grad()
            (ae(x) - x).square().sum(1).mean().backward()
            optimizer.step()
        results.append(ae.state_dict())
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-5)


RANK = """
import copy, warnings
warnings.simplefilter("ignore")
from torch.nn.parallel import DistributedDataParallel
import sae_engine as se

name = sys.argv[4]
torch.manual_seed(0)
if name == "sparsify":
    from sparsify import SparseCoder, SparseCoderConfig
    module = SparseCoder(16, SparseCoderConfig(num_latents=160, k=5))
elif name == "sae_lens":
    from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
    module = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=160, k=5))
else:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    module = AutoEncoderTopK(16, 160, 5)
x = torch.randn(256, 16)
grads = []
for module in (module, se.accelerate(copy.deepcopy(module))):  # the hooks of one may outlive it, on its own parameters
    parallel = DistributedDataParallel(module)
    out = parallel(x.chunk(size)[rank])
    out = out.sae_out if name == "sparsify" else out
    (out - x.chunk(size)[rank]).square().sum(1).mean().backward()
    grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
for n, expected in grads[0].items():
    torch.testing.assert_close(grads[1][n], expected, msg=n)
open(f"{folder}/{rank}.ok", "w").close()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("sparsify", 2), ("dictionary_learning", 2), ("sae_lens", 1)])
def test_distributed_data_parallel(name, size, tmp_path):
    run_ranks(RANK, tmp_path, name, size=size, timeout=240)
    assert all((tmp_path / f"{rank}.ok").exists() for rank in range(size))


def test_dict_class():
    """TopKTrainer(dict_class=…) takes an accelerated class."""
    for cls, trainer_class in ((AutoEncoderTopK, TopKTrainer), (BatchTopKSAE, BatchTopKTrainer)):
        trainer = trainer_class(
            steps=10, activation_dim=D, dict_size=F, k=3, layer=0, lm_name="none", warmup_steps=1, device="cpu",
            dict_class=se.accelerate(cls),
        )  # fmt: skip
        assert "accelerated" in repr(trainer.ae) and isinstance(trainer.ae, cls)
        assert trainer.update(0, next(batches(False))) > 0


def test_the_lines_of_the_documentation():
    (short,), (block,) = (
        [found for found in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
         if "se.accelerate(" in found] for file in ("README.md", "docs/your_library.md"))  # fmt: skip
    sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=5))
    names = {"se": se, "sae": sae, "TopKTrainer": TopKTrainer, "steps": 2000, "d_in": D, "d_sae": F, "k": 5}
    try:
        exec(short, names)
        assert "accelerated" in repr(saes.TopKSAE(saes.TopKSAEConfig(d_in=D, d_sae=F, k=5)))
        se.restore("sae_lens")
        exec(block, names)
        assert "accelerated" in repr(names["trainer"].ae) and type(names["sae"]) is saes.TopKTrainingSAE
        assert "accelerated" in repr(saes.TopKSAE(saes.TopKSAEConfig(d_in=D, d_sae=F, k=5)))
    finally:
        se.restore("sae_lens")
    assert "accelerated" not in repr(saes.TopKSAE(saes.TopKSAEConfig(d_in=D, d_sae=F, k=5)))


def script(path, *arguments):
    """A script's output, run from elsewhere in the environment of this process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / path), *arguments], cwd=Path(sys.executable).anchor,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sae_lens", "dictionary_learning", "sparsify"])
def test_examples(name):
    lines = script(f"examples/{name}_training.py", "2").splitlines()
    assert sum(line.startswith("2 steps in") for line in lines) == 2 and lines[-1].endswith("as fast")


@pytest.mark.slow
def test_benchmark(tmp_path):
    out = script("benchmarks/interop.py", "--size", "64", "16", "128", "4", "--seconds", "0", "--out", str(tmp_path))
    (rows,) = tmp_path.glob("*/interop.jsonl")
    providers = [json.loads(line)["provider"] for line in rows.read_text().splitlines()]
    assert providers == ["plain", "accelerated"] * 6 and out.count("×") == 6
