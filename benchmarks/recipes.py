"""The selection rules that ``rules.py`` compares, as data: how each is trained, and brought to an L0.

A rule that sets its number of entries itself is built for it. One that does not is *steered*: after each step a number
of its own (a penalty's weight, a target's scale, a count that it only aims at) moves by a share of how far, in
logarithms, the batch's L0 lay from the wanted one. Steering is ours; papers sweep the number instead. What the library
has no architecture for, because it is steered or needs gradients, is one of our own, as a user would write it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

import sae_engine as se
from sae_engine.losses import AFA, GateLoss, Loss, LossInput, l1
from sae_engine.training import Architecture
from sae_engine.training.architectures import (
    AbsTopKSAE,
    BatchTopKSAE,
    FeatureChoiceSAE,
    JumpReLUSAE,
    MatryoshkaBatchTopKSAE,
    SampledTopKSAE,
    TopKSAE,
)

THRESHOLD_RATE = 0.05  # of running thresholds: these runs are too short for the usual 0.01 to catch up
STEERING_RATE = 0.1
AFA_COEFF = 1 / 32
THRESHOLDS = "held-out tokens by the learned thresholds, scaled to the L0 on training tokens"
BANDWIDTH = 0.1  # of JumpReLU's estimator, beside thresholds of about 1


@dataclass(frozen=True)
class Recipe:
    """One rule of the comparison. ``prepare`` changes first weights by the rule and one batch."""

    name: str
    architecture: Callable[[int, int], Architecture]  # k, d_sae
    method: str
    prepare: Callable[[se.SparseAutoencoder, int, Tensor], None] | None = None  # sae, k, x
    scaled: bool = True  # whether scale_encoder applies
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


# --- steered rules -------------------------------------------------------------------------------------------------


class Steered(se.Activation):
    """A rule whose ``strength`` follows how many entries a token it keeps: more strength where more than ``l0``.

    It is a logarithm in a buffer, so that a checkpoint holds it, and nothing waits for the device.
    """

    level: Tensor
    l0: float

    def steer_to(self, l0: float) -> None:
        self.l0 = l0
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))

    @property
    def strength(self) -> Tensor:
        return self.level.exp()

    def update(self, codes: se.SparseCodes) -> None:
        super().update(codes)
        kept = (codes.values != 0).sum() / codes.rows
        self.level += STEERING_RATE * (kept.clamp(min=0.5).double().log() - math.log(self.l0))


class SteeredReLU(Steered, se.ReLU):
    """Strength is the weight of an L1 penalty."""

    def __init__(self, l0: float) -> None:
        super().__init__()
        self.steer_to(l0)


class SteeredGated(Steered, se.Gated):
    """Strength is the weight of the gate's L1 penalty."""

    def __init__(self, d_sae: int, l0: float) -> None:
        super().__init__(d_sae)
        self.steer_to(l0)


class SteeredStatisticalTopK(Steered, se.StatisticalTopK):
    """Strength divides the number of entries that is aimed at."""

    def __init__(self, l0: float) -> None:
        super().__init__(l0)
        self.steer_to(l0)

    def _shifted(self, pre: Tensor) -> Tensor:
        self.k = min(max(self.l0 / self.strength.item(), 0.1), pre.shape[-1] / 4)
        return super()._shifted(pre)


class SteeredTopAFA(Steered, se.TopAFA):
    """Strength divides the norm that a code is to have."""

    entry_values = se.rules.kept_values

    def __init__(self, l0: float) -> None:
        super().__init__()
        self.steer_to(l0)

    def _select(self, pre: Tensor, backend: str, **context: Any) -> se.SparseCodes:
        self.target_scale = 1 / self.strength.item()
        return super()._select(pre, backend, **context)


class SteeredL1(Loss):
    name = "l1"
    provides = frozenset({"sparsity"})

    def value(self, batch: LossInput) -> Tensor:
        penalty = l1(batch.codes, weight_norm=batch.decoder_norms)
        return batch.sae.activation.strength.to(penalty.dtype) * penalty


class SteeredGateLoss(Loss):
    name = "gate"
    provides = frozenset({"gate"})

    def __init__(self) -> None:
        self._unsteered = GateLoss(0.0, weigh_by_norm=False)

    def rule(self, sae: se.SparseAutoencoder, dead_at_most: int) -> se.Activation | None:
        return self._unsteered.rule(sae, dead_at_most)

    def value(self, batch: LossInput) -> Tensor:
        penalty = l1(batch.codes)
        return self._unsteered.value(batch) + batch.sae.activation.strength.to(penalty.dtype) * penalty


class NormOfTarget(AFA):
    """AFA against the rule's own target, scaled and centred: the authors' ||x|| would pull values away from where the
    rule cuts, without end."""

    def value(self, batch: LossInput) -> Tensor:
        target = batch.rule.target_scale * (batch.x - batch.sae.b_dec.detach())
        return self.coefficient * batch.target.shape[1] * se.losses.afa(batch.codes, target)

    pull = Loss.pull


# --- their architectures, as a configuration names them ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SteeredSAE(Architecture):
    """Of a rule that is built for ``l0``."""

    l0: float
    rule: ClassVar[Callable[[float], se.Activation]]

    def build_rule(self, d_sae: int, steps: int) -> se.Activation:
        return type(self).rule(self.l0)


@dataclass(frozen=True, kw_only=True)
class SteeredReLUSAE(SteeredSAE):
    rule = SteeredReLU

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [SteeredL1()]


@dataclass(frozen=True, kw_only=True)
class SteeredGatedSAE(SteeredSAE):
    def build_rule(self, d_sae: int, steps: int) -> se.Activation:
        return SteeredGated(d_sae, self.l0)

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [SteeredGateLoss()]


@dataclass(frozen=True, kw_only=True)
class SteeredStatisticalTopKSAE(SteeredSAE):
    rule = SteeredStatisticalTopK


@dataclass(frozen=True, kw_only=True)
class SteeredTopAFASAE(SteeredSAE):
    rule = SteeredTopAFA

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [NormOfTarget(AFA_COEFF)]


@dataclass(frozen=True, kw_only=True)
class GradientTopKSAE(Architecture):
    """The gradients are rows of a place of their own."""

    k: int
    context = {"gradient": "model.gradients"}  # noqa: RUF012 - as its base class has it

    def build_rule(self, d_sae: int, steps: int) -> se.Activation:
        return se.GradientTopK(self.k)


# --- how rules start, and end --------------------------------------------------------------------------------------


def sparse_target(sae: se.SparseAutoencoder, k: int, x: Tensor) -> None:
    """The encoder as TopK would have it, and the strength at which the target is the norm of what TopK keeps."""
    top = se.TopK(k)
    scale_encoder(sae, x, select=top)
    kept = sae.encode_with(x, select=top).codes[0].values.view(len(x), k).norm(dim=1)
    sae.activation.level.copy_(((x - sae.b_dec).norm(dim=1) / kept).mean().log())


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
    Recipe("TopK", lambda k, F: TopKSAE(k=k), ""),
    Recipe("BatchTopK", lambda k, F: BatchTopKSAE(k=k, topk_threshold_lr=THRESHOLD_RATE),
           f"also mutual choice; {THRESHOLDS}", calibrated=True),
    Recipe("FeatureChoice", lambda k, F: FeatureChoiceSAE(
               k=k, mutual_share=0.5, topk_threshold_lr=THRESHOLD_RATE, density_lr=THRESHOLD_RATE),
           f"mutual choice in the first half, then Zipf budgets, thresholds per latent; {THRESHOLDS}",
           calibrated=True),
    Recipe("MatryoshkaBatchTopK", lambda k, F: MatryoshkaBatchTopKSAE(
               k=k, widths=(F // 16, F // 4, F), topk_threshold_lr=THRESHOLD_RATE),
           f"mean of the errors of d_sae / 16, d_sae / 4 and all latents; {THRESHOLDS}", calibrated=True),
    Recipe("SampledTopK", lambda k, F: SampledTopKSAE(k=k, pool=4.0, topk_threshold_lr=THRESHOLD_RATE),
           f"pool of 4 k latents by L2 norm in training, all latents afterwards; {THRESHOLDS}",
           calibrated=True),
    Recipe("GradientTopK", lambda k, F: GradientTopKSAE(k=k),
           "beta 1, gradient of the summed next-token loss; held-out tokens by plain TopK, without a gradient",
           inference=lambda sae: se.TopK(sae.activation.k)),
    Recipe("AbsTopK", lambda k, F: AbsTopKSAE(k=k), ""),
    Recipe("StatisticalTopK", lambda k, F: SteeredStatisticalTopKSAE(l0=k), "the count aimed at is steered"),
    Recipe("top-AFA", lambda k, F: SteeredTopAFASAE(l0=k),
           f"target_scale, in rule and loss, starts at what TopK keeps, is steered; afa_coeff {AFA_COEFF}",
           prepare=sparse_target, scaled=False),
    Recipe("JumpReLU", lambda k, F: JumpReLUSAE(
               l0_target=k, jumprelu_init_threshold=cut(k, F), jumprelu_bandwidth=BANDWIDTH),
           f"d (L0 / target - 1)^2 added; bandwidth {BANDWIDTH}; thresholds start where L0 latents fire"),
    Recipe("Gated", lambda k, F: SteeredGatedSAE(l0=k),
           "L1 penalty of the gate, its weight steered; b_gate starts where L0 latents fire", prepare=closed),
    Recipe("ReLU", lambda k, F: SteeredReLUSAE(l0=k),
           "L1 penalty, its weight steered; b_enc starts where L0 latents fire", prepare=biased),
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
