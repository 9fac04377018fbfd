"""Every selection rule at the same L0: on the same activations, with the same budget, over several seeds.

    python benchmarks/rules.py                                          # the embedded model, 144 runs, under an hour
    python benchmarks/rules.py --seconds 240                            # so much of what is missing of them
    python benchmarks/rules.py --quick                                  # a smoke run, apart from the real results
    python benchmarks/rules.py --model openai-community/gpt2 --layer 8  # beside the published numbers
    python benchmarks/rules.py --rules TopK BatchTopK --l0 32 64

A row is stored as soon as it is measured: interrupted, the same command carries on, and a cell that has a row is not
measured again (``--again`` does). The report, ``rules.md`` and its picture, is made from the rows alone.
``benchmarks/README.md`` has the method; ``recipes.py`` has the rules.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import reconstruction
import runs
import torch
from progress import ProgressBar
from recipes import RECIPES, Recipe, Steered, calibrate, find, scale_encoder
from reconstruction import BETAS, Budget
from rows import ROOT, Row, cell, device_slug, environment, load, now_utc, short, store
from timing import OtherLoad
from torch import Tensor

import sae_engine as se
from sae_engine import metrics
from sae_engine.data import ActivationStore, LanguageModel, evaluation_text, load_language_model
from sae_engine.data.contexts import context_batches
from sae_engine.training import Trainer

METHOD = (
    "Adam {learning_rate:g}, betas {betas}; unit-norm decoder rows, tied initial weights, the encoder scaled to the "
    f"least error on the first batch, b_dec from the mean of {runs.MEAN_BATCHES} batches; no auxiliary loss"
)

CALIBRATION_TOKENS = 4096


@dataclass(frozen=True)
class Setting(Budget):
    """What all runs of one table share."""

    loss_tokens: int  # of the evaluation text, for the spliced model
    l0s: tuple[int, ...]
    seeds: tuple[int, ...]
    learning_rate: float


QUICK = Setting(512, 256, 256 * 30, 2048, 512, (16,), (0,), 1e-3)
DEFAULT = Setting(2048, 512, 512 * 200, 16384, 4096, (16, 32, 64, 128), (0, 1, 2), 1e-3)
FULL = Setting(12288, 4096, 4096 * 600, None, 65536, (16, 32, 64, 128), (0, 1, 2), 3e-4)


# --- one run -------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe, k: int, seed: int, rows: Tensor, *more: Tensor, setting: Setting,
    told: Callable[[int], object] = lambda update: None, parts: int = runs.PARTS,
) -> runs.Trained:  # fmt: skip
    """One pass over ``rows``, in the order that ``seed`` gives; ``more``: gradients, for a rule that needs them."""
    entry = runs.entry(recipe.architecture(k, setting.d_sae), setting.d_sae)
    trained = runs.train(
        entry, rows, *more, batch=setting.batch_tokens, steps=setting.steps, seed=seed, lr=setting.learning_rate,
        betas=BETAS, parts=parts, start=functools.partial(prepare, recipe, k, setting.batch_tokens), told=told,
    )  # fmt: skip
    if recipe.calibrated:
        some = runs.batches(rows, batch=min(CALIBRATION_TOKENS, len(rows)), seed=seed)
        calibrate(trained.sae, k, some.next()[0])
    return trained


@torch.no_grad()
def prepare(recipe: Recipe, k: int, batch: int, trainer: Trainer) -> None:
    """First weights that depend on the rule and, for their scale, on one batch."""
    (trainee,) = trainer.trainees.values()
    first = [rows[:batch] for rows in trainer.plan.stream.first_chunk()]
    x = first[trainee.reads[0]]
    if recipe.prepare is not None:
        recipe.prepare(trainee.sae, k, x)
    if recipe.scaled:
        scale_encoder(trainee.sae, x, **{name: first[site] for name, site in trainee.context.items()})


def read_all_gradients(lm: LanguageModel, store: ActivationStore, layer: int, site: str) -> Tensor:
    """(rows, d) of the store: the gradient of the summed next-token loss in the normalized space of the rows."""
    from sae_engine.data import read_gradients

    device, found, count = next(lm.model.parameters()).device, [], 0
    documents = reconstruction.training_documents()
    for ids in context_batches(lm, documents, store.manifest["context_length"], store.manifest["batch_size"]):
        activations, gradients = (
            t[:, 1:].flatten(0, 1) for t in read_gradients(lm.model, ids.to(device), layer=layer, site=site)
        )
        scale = activations.std(-1, keepdim=True) + reconstruction.NORMALIZE_EPS
        found.append((gradients * scale).to("cpu", torch.float16))
        count += len(gradients)
        if count >= len(store):
            break
    return torch.cat(found)[: len(store)]


class Data:
    """Training and held-out rows of one place in a language model, and the model itself."""

    def __init__(self, lm: LanguageModel, layer: int, site: str, setting: Setting, cache: Path | None, progress: bool):
        activations = reconstruction.collect(lm, layer, site, setting, cache=cache, progress=progress)
        self.activations, self.about = activations, activations.about
        self.lm, self.place = lm, {"layer": layer, "site": site}
        self.context_length = min(lm.max_length, 256)
        measured = self.context_length - 1  # the first position of each context is left as it is
        self.loss_tokens = -(-setting.loss_tokens // measured) * measured

        self.rows = activations.rows(next(lm.model.parameters()).device)

    @functools.cached_property
    def gradients(self) -> Tensor:
        return read_all_gradients(self.lm, self.activations.train, **self.place).to(self.rows.device)

    def more(self, recipe: Recipe) -> list[Tensor]:
        """What the rule of a recipe is given beside the rows."""
        return [self.gradients] if recipe.architecture(1, 16).context else []


@torch.no_grad()
def evaluate(recipe: Recipe, sae: se.SparseAutoencoder, data: Data, setting: Setting, device: torch.device) -> Row:
    """Held-out tokens in the form that inference has, thresholds instead of batch rules; and the spliced model."""
    if recipe.inference is not None:
        sae.activation = recipe.inference(sae)
    sae.eval()

    def run(x: Tensor) -> tuple[Tensor, se.SparseCodes]:
        codes = sae.encode(x)
        return sae.decode(codes), codes

    language = metrics.evaluate(
        sae, data.lm, evaluation_text(), **data.place, normalize="token", context_length=data.context_length,
        max_tokens=data.loss_tokens,
    )["language"]  # fmt: skip
    losses = {name: short(language[name]) for name in ("ce_clean", "ce_spliced", "ce_ablated", "loss_recovered")}
    return reconstruction.quality(run, data.activations.held_out, setting, device) | losses


# --- all runs ------------------------------------------------------------------------------------------------------


def identity(recipe: Recipe, k: int, seed: int, data: Data, setting: Setting, device: torch.device) -> Row:
    """Everything in a row that is no measurement."""
    method = METHOD.format(learning_rate=setting.learning_rate, betas=BETAS)
    return {
        "kind": "rule", "rule": recipe.name, "k": k, "seed": seed, **data.about, "d_sae": setting.d_sae,
        "batch_tokens": setting.batch_tokens, "steps": setting.steps, "loss_tokens": data.loss_tokens,
        "method": method, "recipe": recipe.method, **environment(device),
    }  # fmt: skip


def measure(
    device: torch.device, setting: Setting, recipes: Sequence[Recipe], *, done: Sequence[Row] = (),
    model: str | None = None, layer: int | None = None, site: str = "resid_pre", cache: Path | None = None,
    progress: bool = True, seconds: float = math.inf,
) -> Iterator[Row]:  # fmt: skip
    """Yields one row per run, seed by seed, so that an interrupted job has every rule; leaves out what is ``done``, and
    what would begin after so many ``seconds``; the first run is never left out."""
    until = time.monotonic() + seconds
    lm = load_language_model(model, device=device)
    layer = round(lm.num_layers * 2 / 3) if layer is None else layer
    data = Data(lm, layer, site, setting, cache, progress)
    there = {cell(row) for row in done}
    runs = []
    for seed in setting.seeds:
        for k in setting.l0s:
            for recipe in recipes:
                row = identity(recipe, k, seed, data, setting, device)
                if cell(row) not in there:
                    runs.append((recipe, k, seed, row))
    with ProgressBar(total=len(runs) * setting.steps, desc="training", unit="step", disable=not progress) as bar:
        for number, (recipe, k, seed, row) in enumerate(runs):
            if number and time.monotonic() > until:
                print(f"\n{len(runs) - number} of {len(runs)} runs are left; the same command carries on",
                      file=sys.stderr)  # fmt: skip
                return
            bar.set_postfix_str(f"{recipe.name} L0={k} seed {seed}")
            others = OtherLoad()
            trained = train(recipe, k, seed, data.rows, *data.more(recipe), setting=setting,
                            told=lambda _: bar.update())  # fmt: skip
            rule = trained.sae.activation
            yield {
                **row, "other_load": others.cores(),
                **evaluate(recipe, trained.sae, data, setting, device),
                "strength": short(float(rule.strength)) if isinstance(rule, Steered) else None,
                "tokens_per_second": short(trained.tokens_per_second), "seconds": short(trained.seconds),
                "utc": now_utc(),
            }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare selection rules at the same L0.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a smoke run of a minute or two; kept apart")
    extent.add_argument("--full", action="store_true", help="d_sae 12288, 2.5 M tokens: for a GPU")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help=f"of {', '.join(r.name for r in RECIPES)}")
    parser.add_argument("--l0", nargs="+", type=int, metavar="N", help="entries per token to compare at")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N")
    parser.add_argument("--model", help="hub name or folder (default: the embedded model)")
    parser.add_argument("--layer", type=int, help="default: two thirds of the depth")
    parser.add_argument("--site", default="resid_pre", choices=("resid_pre", "mlp_out", "resid_post"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="begin nothing after so long")
    parser.add_argument("--again", action="store_true", help="measure cells that have rows already")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: the report from stored rows")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    import rules_report

    options = parse(arguments)
    device = torch.device(options.device)
    setting = QUICK if options.quick else FULL if options.full else DEFAULT
    setting = dataclasses.replace(
        setting, l0s=tuple(options.l0 or setting.l0s), seeds=tuple(options.seeds or setting.seeds)
    )
    try:
        recipes = [find(name) for name in options.rules] if options.rules else list(RECIPES)
        if not all(0 < k < setting.d_sae for k in setting.l0s):
            raise ValueError(f"--l0 must lie between 1 and {setting.d_sae - 1}, got {setting.l0s}")
    except ValueError as error:
        sys.exit(str(error))
    folder = options.out / (device_slug(device) + ("-quick" if options.quick else ""))
    file = folder / "rules.jsonl"
    if not options.report_only:
        done = [] if options.again else load(file)
        place = {"model": options.model, "layer": options.layer, "site": options.site}
        try:
            for row in measure(device, setting, recipes, done=done, seconds=options.seconds, **place):
                store(file, [row])
        except KeyboardInterrupt:
            print("\ninterrupted; the rows so far are kept, the same command carries on", file=sys.stderr)
            sys.exit(130)
    rows = load(file)
    if not rows:
        sys.exit(f"{file} holds no rows: nothing has been measured")
    print(rules_report.write(rows, folder))


if __name__ == "__main__":
    main()
