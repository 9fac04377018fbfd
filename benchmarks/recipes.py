"""The selection rules that ``rules.py`` compares, as data: how each is built, trained, and brought to an L0.

A rule that sets its number of entries itself is built for it. One that does not is *steered*: after each step a number
of its own (a penalty's weight, a target's scale, a count that it only aims at) moves by a share of how far, in
logarithms, the batch's L0 lay from the wanted one. Steering is ours; papers sweep the number instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

import sae_engine as se
from sae_engine.losses import AFA, L1, GateLoss, Loss, LossInput, NestedReconstruction, StepL0

THRESHOLD_RATE = 0.05  # of running thresholds: these runs are too short for the usual 0.01 to catch up
STEERING_RATE = 0.1
AFA_COEFF = 1 / 32
THRESHOLDS = "held-out tokens by the learned thresholds, scaled to the L0 on training tokens"
BANDWIDTH = 0.1  # of JumpReLU's estimator, beside thresholds of about 1

Build = Callable[[int, int, int], se.Activation]  # k, d_sae, steps of the training
Losses = Callable[[se.SparseAutoencoder, "Level"], list[Loss]]


@dataclass(frozen=True)
class Recipe:
    """One rule of the comparison.

    ``losses`` are those beside the squared error (summed over d, per token). The level's strength begins at ``start``,
    and steering moves it; ``steer`` puts it into the autoencoder where it is no weight of a loss. ``prepare`` changes
    initial values.
    """

    name: str
    build: Build
    method: str
    losses: Losses = lambda sae, level: []
    steered: bool = False
    start: float = 1.0
    steer: Callable[[se.SparseAutoencoder, float, int], None] | None = None  # sae, strength, k
    prepare: Callable[[se.SparseAutoencoder, int, Tensor], float | None] | None = None  # sae, k, x; may give a start
    scaled: bool = True  # whether scale_encoder applies
    gradients: bool = False  # whether the rule needs the language model's, as the context `gradient`
    inference: Callable[[se.SparseAutoencoder], se.Activation] | None = None  # another rule on held-out tokens
    calibrated: bool = False  # whether calibrate applies after training


def cut(k: int, d_sae: int) -> float:
    """What k of d_sae standard normal numbers exceed: such are the pre-activations of unit rows and normalized tokens
    at the start, so rules with a threshold or a bias start near their L0 instead of at half of all latents."""
    return NormalDist().inv_cdf(1 - k / d_sae)


@dataclass(frozen=True)
class Claim:
    """What a paper says of its rule, so that the report can say where it did not hold here."""

    rule: str
    metric: str
    better_than: str
    source: str


class Level:
    """The steered number of one run, as a logarithm."""

    def __init__(self, recipe: Recipe, k: int, start: float | None = None) -> None:
        self.recipe, self.k, self.value = recipe, k, math.log(recipe.start if start is None else start)

    @property
    def strength(self) -> float:
        return math.exp(self.value)

    def move(self, l0: Tensor) -> None:
        """More strength where more entries a token than wanted were kept. Reads the device."""
        if self.recipe.steered:
            self.value += STEERING_RATE * (math.log(max(l0.item(), 0.5)) - math.log(self.k))


# --- losses beside the reconstruction error ------------------------------------------------------------------------


class Steered(Loss):
    """The loss that ``make`` gives for the strength of the moment."""

    def __init__(self, make: Callable[[float], Loss], level: Level) -> None:
        self._make, self._level = make, level
        self.name, self.provides = self._now.name, self._now.provides

    @property
    def _now(self) -> Loss:
        return self._make(self._level.strength)

    def rule(self, sae: se.SparseAutoencoder, dead_at_most: int) -> se.Activation | None:
        return self._now.rule(sae, dead_at_most)

    def value(self, batch: LossInput) -> Tensor:
        return self._now.value(batch)


class NormOfTarget(AFA):
    """AFA against the rule's own target, scaled and centred: the authors' ||x|| would pull values away from where the
    rule cuts, without end."""

    def value(self, batch: LossInput) -> Tensor:
        target = batch.rule.target_scale * (batch.x - batch.sae.b_dec.detach())
        return self.coefficient * batch.target.shape[1] * se.losses.afa(batch.codes, target)

    pull = Loss.pull


# --- how rules start, and are steered ------------------------------------------------------------------------------


def aim(sae: se.SparseAutoencoder, strength: float, k: int) -> None:
    sae.activation.k = min(max(k / strength, 0.1), sae.d_sae / 4)


def scale_target(sae: se.SparseAutoencoder, strength: float, k: int) -> None:
    sae.activation.target_scale = 1 / strength


def sparse_target(sae: se.SparseAutoencoder, k: int, x: Tensor) -> float:
    """The encoder as TopK would have it, and the strength at which the target is the norm of what TopK keeps."""
    top = se.TopK(k)
    scale_encoder(sae, x, select=top)
    kept = sae.encode_with(x, select=top).codes[0].values.view(len(x), k).norm(dim=1)
    return ((x - sae.b_dec).norm(dim=1) / kept).mean().item()


def closed(sae: se.SparseAutoencoder, k: int, x: Tensor) -> None:
    sae.activation.b_gate.fill_(-cut(k, sae.d_sae))


def biased(sae: se.SparseAutoencoder, k: int, x: Tensor) -> None:
    sae.b_enc.fill_(-cut(k, sae.d_sae))


@torch.no_grad()
def scale_encoder(sae: se.SparseAutoencoder, x: Tensor, **context: Any) -> None:
    """Scales what the encoder gives by the one factor that lowers the error on ``x`` most.

    A sum of k unit rows that overlap is too long, the more so the larger k; without this, short runs would compare how
    well each rule's shrinking of values happens to make up for it.
    """
    x_hat = sae.decode(sae.encode_with(x, **context).codes[0]) - sae.b_dec
    factor = (x_hat * (x - sae.b_dec)).sum() / x_hat.square().sum()
    for parameter in (sae.W_enc, sae.b_enc, *sae.activation.parameters()):
        parameter.mul_(factor)


@torch.no_grad()
def calibrate(sae: se.SparseAutoencoder, k: int, x: Tensor) -> None:
    """Scales the thresholds that the rule has learned by the factor at which ``x`` keeps k entries a token.

    Running means lag behind weights that still move fast, and a rule with a pool has none afterwards.
    """
    sae.eval()
    rule = sae.activation
    learned = rule.inference_threshold() if isinstance(rule, se.FeatureChoice) else rule.threshold
    pre = sae.encode_with(x, keep_pre=True).pre
    ratios = pre.double() / learned.clamp(min=torch.finfo(torch.float32).tiny)
    # the largest that is not kept: kept entries lie above
    factor = se.functional.batch_topk(ratios, k + 1 / len(x)).values.min()
    for name, buffer in rule.named_buffers():
        if "threshold" in name:
            buffer.copy_(torch.where(buffer > 0, buffer * factor, buffer))


# --- rules ---------------------------------------------------------------------------------------------------------

RECIPES: tuple[Recipe, ...] = (
    Recipe("TopK", lambda k, F, steps: se.TopK(k), ""),
    Recipe("BatchTopK", lambda k, F, steps: se.BatchTopK(k, threshold_lr=THRESHOLD_RATE),
           f"also mutual choice; {THRESHOLDS}", calibrated=True),
    Recipe("FeatureChoice", lambda k, F, steps: se.FeatureChoice(
               F, k, mutual_steps=steps // 2, threshold_lr=THRESHOLD_RATE, density_lr=THRESHOLD_RATE),
           f"mutual choice in the first half, then Zipf budgets, thresholds per latent; {THRESHOLDS}",
           calibrated=True),
    Recipe("MatryoshkaBatchTopK", lambda k, F, steps: se.MatryoshkaBatchTopK(
               k, (F // 16, F // 4, F), threshold_lr=THRESHOLD_RATE),
           f"mean of the errors of d_sae / 16, d_sae / 4 and all latents; {THRESHOLDS}",
           lambda sae, level: [NestedReconstruction(sae.activation.widths, "mean")], calibrated=True),
    Recipe("SampledTopK", lambda k, F, steps: se.SampledTopK(k, pool=4.0, threshold_lr=THRESHOLD_RATE),
           f"pool of 4 k latents by L2 norm in training, all latents afterwards; {THRESHOLDS}",
           calibrated=True),
    Recipe("GradientTopK", lambda k, F, steps: se.GradientTopK(k),
           "beta 1, gradient of the summed next-token loss; held-out tokens by plain TopK, without a gradient",
           gradients=True, inference=lambda sae: se.TopK(sae.activation.k)),
    Recipe("AbsTopK", lambda k, F, steps: se.AbsTopK(k), ""),
    Recipe("StatisticalTopK", lambda k, F, steps: se.StatisticalTopK(k), "the count aimed at is steered",
           steered=True, steer=aim),
    Recipe("top-AFA", lambda k, F, steps: se.TopAFA(),
           f"target_scale, in rule and loss, starts at what TopK keeps, is steered; afa_coeff {AFA_COEFF}",
           lambda sae, level: [NormOfTarget(AFA_COEFF)],
           steered=True, steer=scale_target, prepare=sparse_target, scaled=False),
    Recipe("JumpReLU", lambda k, F, steps: se.JumpReLU(F, threshold=cut(k, F), bandwidth=BANDWIDTH),
           f"d (L0 / target - 1)^2 added; bandwidth {BANDWIDTH}; thresholds start where L0 latents fire",
           lambda sae, level: [StepL0(float(sae.d_out), target=level.k)]),
    Recipe("Gated", lambda k, F, steps: se.Gated(F),
           "L1 penalty of the gate, its weight steered; b_gate starts where L0 latents fire",
           lambda sae, level: [Steered(partial(GateLoss, weigh_by_norm=False), level)], steered=True, prepare=closed),
    Recipe("ReLU", lambda k, F, steps: se.ReLU(), "L1 penalty, its weight steered; b_enc starts where L0 latents fire",
           lambda sae, level: [Steered(L1, level)], steered=True, prepare=biased),
)  # fmt: skip

CLAIMS = (
    Claim("BatchTopK", "fvu", "TopK", "Bussmann et al. 2024, arXiv:2412.06410"),
    Claim("FeatureChoice", "fvu", "TopK", "Ayonrinde 2024, arXiv:2411.02124"),
    Claim("FeatureChoice", "dead_fraction", "TopK", "Ayonrinde 2024, arXiv:2411.02124"),
    Claim("GradientTopK", "loss_recovered", "TopK", "Olmo et al. 2024, arXiv:2411.10397"),
    Claim("AbsTopK", "fvu", "TopK", "Zhu et al. 2025, arXiv:2510.00404"),
    Claim("top-AFA", "fvu", "TopK", "Lee et al. 2025, arXiv:2503.24277"),
    Claim("top-AFA", "fvu", "BatchTopK", "Lee et al. 2025, arXiv:2503.24277"),
    Claim("JumpReLU", "fvu", "TopK", "Rajamanoharan et al. 2024, arXiv:2407.14435"),
    Claim("JumpReLU", "fvu", "Gated", "Rajamanoharan et al. 2024, arXiv:2407.14435"),
    Claim("Gated", "fvu", "ReLU", "Rajamanoharan et al. 2024, arXiv:2404.16014"),
    Claim("TopK", "fvu", "ReLU", "Gao et al. 2024, arXiv:2406.04093"),
)

# Squared error per element at k, GPT-2 small resid_pre, F = 12288, 82 M tokens of OpenWebText, per-token normalized:
# the logs of the authors of top-AFA (Lee et al. 2025, arXiv:2503.24277).
PUBLISHED: dict[tuple[str, int], dict[int, float]] = {
    ("TopK", 6): {32: 0.0649, 64: 0.0513, 128: 0.0392, 256: 0.0264},
    ("BatchTopK", 6): {32: 0.0628, 64: 0.0495, 128: 0.0369, 256: 0.0237},
    ("TopK", 7): {32: 0.0743, 64: 0.0587, 128: 0.0448, 256: 0.0293},
    ("BatchTopK", 7): {32: 0.0726, 64: 0.0572, 128: 0.0427, 256: 0.0270},
    ("TopK", 8): {32: 0.0824, 64: 0.0653, 128: 0.0498, 256: 0.0322},
    ("BatchTopK", 8): {32: 0.0807, 64: 0.0636, 128: 0.0480, 256: 0.0301},
}
# top-AFA at layer 8: afa_coeff -> (L0, squared error per element).
PUBLISHED_TOP_AFA = {
    1 / 128: (1579, 0.00335), 1 / 64: (1973, 0.000184), 1 / 32: (2104, 0.000208), 1 / 16: (2419, 0.000171),
}  # fmt: skip
PUBLISHED_BUDGET = "F = 12288, 82 M tokens of OpenWebText, per-token normalized space (Lee et al. 2025, authors' logs)"


def find(name: str) -> Recipe:
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise ValueError(f"no rule is called {name!r}; there are {', '.join(r.name for r in RECIPES)}")
