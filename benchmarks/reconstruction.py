"""Reconstruction error: sparse autoencoders trained on a language model's residual stream, ours against dense PyTorch.

    python benchmarks/run.py --only reconstruction                             # the embedded model
    python benchmarks/run.py --only reconstruction --model openai-community/gpt2 --layer 8 --full
    python benchmarks/run.py --only reconstruction --model path/to/folder --layer 3

Every rule is trained through sae_engine for each k (or afa_coeff) and seed. The control is the same training in plain
dense PyTorch (``torch.topk``, scatter, dense matmuls) from the same initial weights on the same batches: it must reach
the same error. Inputs are normalized token by token, (x − mean) / (std + 1e-5) with the unbiased std, and all errors
are in that space. No auxiliary loss. ``benchmarks/README.md`` has the method.
"""

from __future__ import annotations

import functools
import itertools
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from guarded import failed
from progress import announce
from rows import ROOT, Row, environment, now_utc, short
from stock import step_with_unit_rows
from timing import OtherLoad, synchronize
from torch import Tensor, nn

import sae_engine as se
from sae_engine.data import (
    ActivationStore,
    LanguageModel,
    collect_activations,
    evaluation_text,
    load_language_model,
    stdlib_texts,
)
from sae_engine.metrics import Reconstruction, Sparsity

CACHE = ROOT / ".cache" / "activations"
SPACE = "per-token normalized: (x - mean) / (std_unbiased + 1e-5)"
OURS, DENSE = "sae_engine", "dense PyTorch"
NORMALIZE_EPS = 1e-5
LEARNING_RATE, BETAS = 3e-4, (0.9, 0.99)
CALIBRATION_BATCHES = 8  # of training tokens, from which BatchTopK's threshold is found once it is trained
MEAN_TOKENS = 8192  # b_dec starts as the mean of so many
WARM_STEPS = 5  # left out of tokens per second


METHOD = f"Adam {LEARNING_RATE}, betas {BETAS}, unit-norm decoder rows, b_dec from the mean, no auxiliary loss"
METHODS = {
    "TopK": "tied unit-norm initial weights",
    "BatchTopK": "tied unit-norm initial weights, held-out tokens by a threshold from "
                 f"{CALIBRATION_BATCHES} training batches",
    "top-AFA": "the authors' initial weights (Kaiming-uniform encoder, its directions as decoder)",
}


@dataclass(frozen=True)
class Budget:
    """The size of an autoencoder, and the tokens that it is trained and measured on."""

    d_sae: int
    batch_tokens: int
    train_tokens: int
    eval_tokens: int | None  # None: all of the evaluation text

    @property
    def steps(self) -> int:
        return self.train_tokens // self.batch_tokens


@dataclass(frozen=True)
class Setting(Budget):
    """What all runs of one table share."""

    seeds: tuple[int, ...]
    ks: tuple[int, ...]
    afa_coeffs: tuple[float, ...]
    control_ks: tuple[int, ...]  # the control is trained at these only, or at all with --full
    control_afa_coeffs: tuple[float, ...]


QUICK = Setting(512, 256, 256 * 40, 4096, (0,), (16,), (1 / 32,), (16,), (1 / 32,))
DEFAULT = Setting(
    d_sae=2048, batch_tokens=512, train_tokens=512 * 140, eval_tokens=16384, seeds=(0, 1), ks=(16, 32, 64),
    afa_coeffs=(1 / 128, 1 / 32), control_ks=(32,), control_afa_coeffs=(1 / 32,),
)  # fmt: skip
FULL = Setting(
    d_sae=12288, batch_tokens=4096, train_tokens=4096 * 600, eval_tokens=None, seeds=(0, 1, 2), ks=(32, 64, 128, 256),
    afa_coeffs=(1 / 128, 1 / 64, 1 / 32, 1 / 16), control_ks=(32, 64, 128, 256),
    control_afa_coeffs=(1 / 128, 1 / 64, 1 / 32, 1 / 16),
)  # fmt: skip
SETTINGS = {"quick": QUICK, "default": DEFAULT, "full": FULL}


@dataclass(frozen=True)
class Run:
    """One training: a rule, its knob (k, or afa_coeff for top-AFA), an implementation and a seed."""

    rule: str  # "TopK", "BatchTopK" or "top-AFA"
    knob: float
    implementation: str
    seed: int

    @property
    def knob_name(self) -> str:
        return "afa_coeff" if self.rule == "top-AFA" else "k"


def plan(setting: Setting) -> list[Run]:
    """All runs, those that have a control first, and of the first seed; a control follows the run that it controls."""
    runs = [
        (knob not in controlled, seed, Run(rule, knob, OURS, seed))
        for rule, knobs, controlled in (
            ("TopK", setting.ks, setting.control_ks),
            ("BatchTopK", setting.ks, setting.control_ks),
            ("top-AFA", setting.afa_coeffs, setting.control_afa_coeffs),
        )
        for knob in knobs
        for seed in setting.seeds
    ]
    planned = []
    for alone, seed, run in sorted(runs, key=lambda entry: (entry[1], entry[0])):
        planned += [run] if alone else [run, Run(run.rule, run.knob, DENSE, seed)]
    return planned


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activations:
    """Collected training and held-out rows, and what a table has to say about them."""

    train: ActivationStore
    held_out: ActivationStore
    mean: Tensor  # (d,) of the first training tokens, normalized
    about: Row


def collect(
    lm: LanguageModel, layer: int, site: str, budget: Budget, *, cache: Path | None = None, progress: bool = False
) -> Activations:
    """Activations of the standard library's text to train on and of the fixed evaluation text to test on; cached."""
    documents = training_documents()
    python = platform.python_version()
    text = f"standard library of Python {python} without the held-out modules, documents in random order (seed 0)"
    folder = (cache or CACHE) / f"{lm.sha256[:12]}-layer{layer}-{site}"
    options: dict[str, Any] = {"layer": layer, "site": site, "batch_size": 16, "progress": progress}
    train = collect_activations(
        lm, documents, folder / f"train-{budget.train_tokens}-python{python}", max_tokens=budget.train_tokens,
        text_source=text, **options,
    )  # fmt: skip
    held_out = collect_activations(
        lm, evaluation_text(), folder / f"evaluation-{budget.eval_tokens or 'all'}", max_tokens=budget.eval_tokens,
        text_source="sae_engine.data.evaluation_text()", **options,
    )  # fmt: skip
    if len(train) < budget.train_tokens:
        raise ValueError(f"the text has {len(train)} tokens, {budget.train_tokens} were asked for")
    name = "embedded model (GPT-2 architecture)" if lm.is_embedded else lm.name
    about = {
        "model": name, "revision": lm.revision, "sha256": lm.sha256, "d": lm.d_model, "layer": layer, "site": site,
        "space": SPACE, "first_positions": "dropped", "text": text, "train_tokens": len(train),
        "eval_tokens": len(held_out),
    }  # fmt: skip
    first = next(train.batches(min(MEAN_TOKENS, len(train)), shuffle=False, dtype=torch.float32))
    return Activations(train, held_out, normalized(first).mean(0), about)


def training_documents() -> list[str]:
    """The standard library's text without the held-out modules, in an order that is random and always the same."""
    documents = list(stdlib_texts())
    random.Random(0).shuffle(documents)
    return documents


def normalized(x: Tensor) -> Tensor:
    """Each token minus its mean, over its unbiased standard deviation + 1e-5."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + NORMALIZE_EPS)


# --- models --------------------------------------------------------------------------------------------------------


RULES: dict[str, Callable[[float], se.Activation]] = {
    "TopK": lambda knob: se.TopK(int(knob)), "BatchTopK": lambda knob: se.BatchTopK(int(knob)),
    "top-AFA": lambda knob: se.TopAFA(),
}  # fmt: skip


class EngineModel(se.SparseAutoencoder):
    """An autoencoder of sae_engine: codes all the way."""

    def reconstruct(self, x: Tensor) -> tuple[Tensor, se.SparseCodes]:
        codes = self.encode(x)
        self.activation.update(codes)
        return self.decode(codes), codes

    measured = reconstruct

    def norm_gap(self, codes: se.SparseCodes, x: Tensor) -> Tensor:
        return se.losses.afa(codes, x)

    def calibrate(self, batches: list[Tensor]) -> None:
        se.calibrate_threshold(self, batches)


class DenseModel(nn.Module):
    """The same autoencoder as people write it: stock operators, dense activations, dense matmuls."""

    def __init__(self, run: Run, start: se.SparseAutoencoder) -> None:
        super().__init__()
        self.run = run
        self.W_enc = nn.Parameter(start.W_enc.detach().clone(memory_format=torch.contiguous_format))
        self.W_dec = nn.Parameter(start.W_dec.detach().clone())
        self.b_enc = nn.Parameter(start.b_enc.detach().clone(), requires_grad=run.rule != "top-AFA")
        self.b_dec = nn.Parameter(start.b_dec.detach().clone())
        self.threshold: Tensor | None = None

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - self.b_dec
        acts = torch.relu(centred @ self.W_enc + self.b_enc)
        kept = acts * self._mask(acts.detach(), centred.detach())
        return kept @ self.W_dec + self.b_dec, kept

    def _mask(self, acts: Tensor, centred: Tensor) -> Tensor:
        mask = torch.zeros_like(acts)
        if self.run.rule == "TopK":
            return mask.scatter_(1, acts.topk(int(self.run.knob)).indices, 1.0)
        if self.run.rule == "BatchTopK":
            if not self.training:
                return (acts > self.threshold).to(acts)
            positions = acts.flatten().topk(int(self.run.knob) * len(acts)).indices
            return mask.view(-1).scatter_(0, positions, 1.0).view_as(acts)
        energy, order = (acts * self.W_dec.detach().norm(dim=1)).square().sort(dim=1, descending=True)
        norms = energy.cumsum(1).sqrt()
        count = (norms - centred.norm(dim=1, keepdim=True)).abs().argmin(1, keepdim=True) + 1
        return mask.scatter_(1, order, (torch.arange(acts.shape[1], device=acts.device) < count).to(acts))

    def norm_gap(self, kept: Tensor, x: Tensor) -> Tensor:
        return (kept.norm(dim=1) - x.norm(dim=1)).square().mean()

    def calibrate(self, batches: list[Tensor]) -> None:
        """The threshold that cuts the batches as the batch rule does, on average."""
        with torch.no_grad():
            kept = [self.reconstruct(x)[1] for x in batches]
        self.threshold = torch.stack([acts[acts > 0].min().double() for acts in kept]).mean()

    def measured(self, x: Tensor) -> tuple[Tensor, se.SparseCodes]:
        x_hat, kept = self.reconstruct(x)
        return x_hat, se.SparseCodes.from_dense(kept)


def build(run: Run, mean: Tensor, d_sae: int) -> EngineModel | DenseModel:
    """Initial weights depend on rule, seed and ``mean`` (d,), where b_dec starts: run and control start alike."""
    torch.manual_seed(run.seed)
    options: dict[str, Any] = {"contiguous_parameters": False, "device": mean.device}
    model = EngineModel(len(mean), d_sae, RULES[run.rule](run.knob), **options)
    with torch.no_grad():
        model.b_dec.copy_(mean)
        if run.rule == "top-AFA":  # the authors' start: at it, the norm of the activations is the input's
            nn.init.kaiming_uniform_(model.W_enc)
            model.W_dec.copy_(model.W_enc.T / model.W_enc.norm(dim=0)[:, None])
    return model if run.implementation == OURS else DenseModel(run, model)


# --- training ------------------------------------------------------------------------------------------------------


def training_step(model: EngineModel | DenseModel, optimizer: torch.optim.Optimizer, x: Tensor, run: Run) -> Tensor:
    """One step; returns the squared error per element, before it."""
    x_hat, codes = model.reconstruct(x)
    error = (x_hat - x).square().mean()
    loss = error if run.rule != "top-AFA" else error + run.knob * model.norm_gap(codes, x)
    loss.backward()
    step_with_unit_rows(optimizer, model.W_dec)
    return error.detach()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=LEARNING_RATE, betas=BETAS)


def batches(activations: ActivationStore, setting: Setting, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Normalized batches of one pass; the same seed gives the same."""
    options: dict[str, Any] = {"seed": seed, "device": device, "dtype": torch.float32, "drop_last": True}
    for x in activations.batches(setting.batch_tokens, **options):
        yield normalized(x)


def train(run: Run, data: Activations, setting: Setting, device: torch.device) -> Row:
    """Trains once and evaluates on the held-out tokens: one row, which says what went wrong if something did."""
    about = {
        "kind": "reconstruction", "rule": run.rule, "knob_name": run.knob_name, "knob": run.knob,
        "provider": run.implementation, "seed": run.seed, **data.about, "d_sae": setting.d_sae,
        "batch_tokens": setting.batch_tokens, "steps": setting.steps,
        "method": f"{METHOD}; {METHODS[run.rule]}", **environment(device),
    }  # fmt: skip
    try:
        return {**about, **_trained(run, data, setting, device, about), "utc": now_utc()}
    except Exception as error:
        return failed(about, error, device)


def _trained(run: Run, data: Activations, setting: Setting, device: torch.device, about: Row) -> Row:
    """The numbers of a row."""
    where = f"{run.rule} {run.knob_name}={run.knob:g} {run.implementation} seed {run.seed}"
    announce(where, [about])
    model = build(run, data.mean.to(device), setting.d_sae)
    optimizer = make_optimizer(model)
    errors, started, others = [], time.perf_counter(), OtherLoad()
    for step, x in enumerate(batches(data.train, setting, run.seed, device)):
        if step == WARM_STEPS:
            synchronize(device)
            started = time.perf_counter()
        errors.append(training_step(model, optimizer, x, run))
        announce(f"{where}: step {step + 1} of {setting.steps}", [about])
    synchronize(device)
    seconds = time.perf_counter() - started
    other_load = others.cores()
    timed_tokens = (len(errors) - WARM_STEPS) * setting.batch_tokens
    last = torch.stack(errors[-max(len(errors) // 20, 1) :]).mean().item()
    if run.rule == "BatchTopK":
        once_more = batches(data.train, setting, run.seed, device)
        model.calibrate(list(itertools.islice(once_more, CALIBRATION_BATCHES)))
    announce(f"{where}: held-out tokens", [about])
    return {
        **quality(model.eval().measured, data.held_out, setting, device), "mse_train": short(last),
        "tokens_per_second": short(timed_tokens / seconds), "seconds": short(seconds), "other_load": other_load,
    }  # fmt: skip


@torch.no_grad()
def quality(
    run: Callable[[Tensor], tuple[Tensor, se.SparseCodes]], held_out: ActivationStore, budget: Budget,
    device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Error per element, fraction of variance unexplained, entries per token, latents that fire on no token or on many.

    ``run`` gives the reconstruction of a batch (tokens, d), and its codes.
    """
    reconstruction, sparsity = Reconstruction(space=SPACE), Sparsity(budget.d_sae)
    for rows in held_out.batches(budget.batch_tokens, shuffle=False, device=device, dtype=torch.float32):
        x = normalized(rows)
        x_hat, codes = run(x)
        reconstruction.update(x_hat, x)
        sparsity.update(codes)
    found = reconstruction.compute() | sparsity.compute()
    return {name: short(found[name]) for name in ("mse", "fvu", "l0", "dead_fraction", "dense_fraction")}


@functools.lru_cache(maxsize=1)
def activations(
    device: torch.device, setting: Setting, model: str | None = None, layer: int | None = None,
    site: str = "resid_pre", cache: Path | None = None,
) -> Activations:  # fmt: skip
    """Collects what is missing; all runs of a process share it.

    Args:
        model: as :func:`sae_engine.data.load_language_model`; None is the embedded model.
        layer: None takes the one at two thirds of the depth, as layer 8 of GPT-2's 12.
        cache: folder for activations; None is ``.cache/activations``.
    """
    announce("collecting activations of the language model")
    lm = load_language_model(model, device=device, fallback=True)
    layer = round(lm.num_layers * 2 / 3) if layer is None else layer
    return collect(lm, layer, site, setting, cache=cache)
