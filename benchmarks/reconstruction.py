"""Reconstruction error: sparse autoencoders trained on a language model's residual stream, ours against dense PyTorch.

    python benchmarks/run.py --only reconstruction                             # the embedded model
    python benchmarks/run.py --only reconstruction --model openai-community/gpt2 --layer 8 --full
    python benchmarks/run.py --only reconstruction --model path/to/folder --layer 3

Every rule is trained by ``sae_engine.train`` for each k (or afa_coeff) and seed. The control is the same training in
plain dense PyTorch (``torch.topk``, scatter, dense matmuls) from the same initial weights on the same batches: it must
reach the same error. Inputs are normalized token by token, (x − mean) / (std + 1e-5) with the unbiased std, and all
errors are in that space. No auxiliary loss. ``benchmarks/README.md`` has the method.
"""

from __future__ import annotations

import functools
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs
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
from sae_engine.data.memory import TensorStream
from sae_engine.metrics import Reconstruction, Sparsity
from sae_engine.training import Architecture
from sae_engine.training.architectures import BatchTopKSAE, TopAFASAE, TopKSAE

CACHE = ROOT / ".cache" / "activations"
SPACE = "per-token normalized: (x - mean) / (std_unbiased + 1e-5)"
OURS, DENSE = "sae_engine", "dense PyTorch"
NORMALIZE_EPS = 1e-5
LEARNING_RATE, BETAS, EPS = 3e-4, (0.9, 0.99), 1e-8  # of Adam, over the error per element
CALIBRATION_BATCHES = 8  # of training tokens, from which BatchTopK's threshold is found once it is trained

METHOD = (f"Adam {LEARNING_RATE}, betas {BETAS}, unit-norm decoder rows, b_dec from the mean of {runs.MEAN_BATCHES} "
          "batches, no auxiliary loss")  # fmt: skip
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
    about: Row

    def rows(self, device: torch.device) -> Tensor:
        """(tokens, d) of all training rows, normalized."""
        return normalized(self.train.tensor().to(device, torch.float32))


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
    return Activations(train, held_out, about)


def training_documents() -> list[str]:
    """The standard library's text without the held-out modules, in an order that is random and always the same."""
    documents = list(stdlib_texts())
    random.Random(0).shuffle(documents)
    return documents


def normalized(x: Tensor) -> Tensor:
    """Each token minus its mean, over its unbiased standard deviation + 1e-5."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + NORMALIZE_EPS)


# --- models --------------------------------------------------------------------------------------------------------


ARCHITECTURES: dict[str, Callable[[float], Architecture]] = {
    "TopK": lambda knob: TopKSAE(k=int(knob)), "BatchTopK": lambda knob: BatchTopKSAE(k=int(knob)),
    "top-AFA": lambda knob: TopAFASAE(afa_coefficient=knob),
}  # fmt: skip


class DenseModel(nn.Module):
    """The control: an autoencoder as people write it, of stock operators, dense activations, dense matmuls."""

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

    def step(self, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        """One step of training; the squared error per element, before it."""
        x_hat, kept = self.reconstruct(x)
        error = (x_hat - x).square().mean()
        loss = error if self.run.rule != "top-AFA" else error + self.run.knob * self.norm_gap(kept, x)
        loss.backward()
        step_with_unit_rows(optimizer, self.W_dec)
        return error.detach()


# --- training ------------------------------------------------------------------------------------------------------


Measure = Callable[[Tensor], tuple[Tensor, se.SparseCodes]]  # the reconstruction of a batch (tokens, d), and its codes


@dataclass(frozen=True)
class Fitted:
    """A trained model, in the form that held-out rows meet."""

    measured: Measure
    W_dec: Tensor
    errors: list[float]  # squared, per element, in training: a mean for each of its parts
    tokens_per_second: float
    seconds: float


def fit(
    run: Run, rows: Tensor, budget: Budget, *, parts: int = runs.PARTS,
    told: Callable[[int], object] = lambda step: None,
) -> Fitted:  # fmt: skip
    """Trains on each of ``rows`` (tokens, d) once. Ours is a run of :func:`sae_engine.train`; its control starts from
    the same weights and sees the same batches."""
    sae = runs.entry(ARCHITECTURES[run.rule](run.knob), budget.d_sae)
    size: dict[str, Any] = {"batch": budget.batch_tokens, "seed": run.seed}
    again = runs.batches(rows, **size)
    some = [again.next()[0] for _ in range(min(CALIBRATION_BATCHES, budget.steps))]
    begin = functools.partial(_as_authors, seed=run.seed) if run.rule == "top-AFA" else None
    if run.implementation == OURS:
        found = runs.train(  # whose error is summed over d
            sae, rows, steps=budget.steps, lr=LEARNING_RATE, betas=BETAS, eps=EPS * rows.shape[1], parts=parts,
            start=begin and (lambda trainer: begin(trainer.trainees["sae"].sae)), told=told, **size,
        )  # fmt: skip
        if run.rule == "BatchTopK":
            se.calibrate_threshold(found.sae, some)
        return Fitted(
            _measured(found.sae.eval()), found.sae.W_dec, found.errors, found.tokens_per_second, found.seconds
        )
    first = runs.first_weights(sae, rows, steps=budget.steps, **size)
    if begin is not None:
        begin(first)
    control = DenseModel(run, first)
    errors, seconds = _trained_densely(control, runs.batches(rows, **size), budget.steps, parts, told)
    if run.rule == "BatchTopK":
        control.calibrate(some)
    tokens = (budget.steps - budget.steps // parts) * budget.batch_tokens
    return Fitted(control.eval().measured, control.W_dec, errors, tokens / seconds, seconds)


@torch.no_grad()
def _as_authors(sae: se.SparseAutoencoder, *, seed: int) -> None:
    """The first weights of top-AFA's authors, but for ``b_dec``."""
    b_dec = sae.b_dec.clone()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        se.init_as_top_afa(sae)
    sae.b_dec.copy_(b_dec)


def _measured(sae: se.SparseAutoencoder) -> Measure:
    def run(x: Tensor) -> tuple[Tensor, se.SparseCodes]:
        codes = sae.encode(x)
        return sae.decode(codes), codes

    return run


def _trained_densely(
    model: DenseModel, batches: TensorStream, steps: int, parts: int, told: Callable[[int], object]
) -> tuple[list[float], float]:
    """Errors of each part, and the seconds of all but the first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    every, errors, started = max(steps // parts, 1), [], time.perf_counter()
    for step in range(steps):
        if step == every:
            synchronize(model.W_dec.device)
            started = time.perf_counter()
        errors.append(model.step(optimizer, batches.next()[0]))
        told(step + 1)
    synchronize(model.W_dec.device)
    return [part.mean().item() for part in torch.stack(errors).split(every)], time.perf_counter() - started


def train(run: Run, data: Activations, setting: Setting, device: torch.device) -> Row:
    """Trains once and evaluates on the held-out tokens: one row, which says what went wrong if something did."""
    about = {
        "kind": "reconstruction", "rule": run.rule, "knob_name": run.knob_name, "knob": run.knob,
        "provider": run.implementation, "seed": run.seed, **data.about, "d_sae": setting.d_sae,
        "batch_tokens": setting.batch_tokens, "steps": setting.steps,
        "method": f"{METHOD}; {METHODS[run.rule]}", **environment(device),
    }  # fmt: skip
    try:
        return {**about, **_numbers(run, data, setting, device, about), "utc": now_utc()}
    except Exception as error:
        return failed(about, error, device)


def _numbers(run: Run, data: Activations, setting: Setting, device: torch.device, about: Row) -> Row:
    """What was measured of a run."""
    where = f"{run.rule} {run.knob_name}={run.knob:g} {run.implementation} seed {run.seed}"
    announce(where, [about])
    others = OtherLoad()
    fitted = fit(
        run, data.rows(device), setting,
        told=lambda step: announce(f"{where}: step {step} of {setting.steps}", [about]),
    )  # fmt: skip
    other_load = others.cores()
    announce(f"{where}: held-out tokens", [about])
    return {
        **quality(fitted.measured, data.held_out, setting, device), "mse_train": short(fitted.errors[-1]),
        "tokens_per_second": short(fitted.tokens_per_second), "seconds": short(fitted.seconds),
        "other_load": other_load,
    }  # fmt: skip


@torch.no_grad()
def quality(run: Measure, held_out: ActivationStore, budget: Budget, device: torch.device) -> dict[str, float]:
    """Error per element, fraction of variance unexplained, entries per token, latents that fire on no token or on
    many."""
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
