"""The architectures that a configuration can name: for each its selection rule, its losses, and how it is trained.

``architecture: topk`` in a file is :class:`TopKSAE` here, and ``architecture: my_module:MySAE`` a class of the user's.
Names are SAELens' where it has the architecture. Defaults, of the optimizer too, are those of the paper that each class
names, or of the implementation that made it known.
"""
from __future__ import annotations

import functools
import importlib
import math
import sys
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch

from .. import rules
from ..autoencoder import SparseAutoencoder
from ..initial import init_sparse
from ..losses import AFA, L1, GateLoss, Loss, NestedReconstruction, StepL0
from ._architecture import Architecture, numbers
from ._faults import Check, ConfigError, auto, nearest, one_of, optional, rate, real, settle, whole, widths
from .counting import AbsTopKSAE, TopKSAE
from .cross_layer import TanhJumpReLUSAE

Auto = Literal["auto"]
_AUTO_WIDTHS = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)  # 2048, 6144, 14336, 30720, 65536 in the paper
_GEMMA_SCOPE = 1e-3  # its bandwidth and first threshold, for rows of mean squared norm 1


@dataclass(frozen=True, kw_only=True)
class _Averaging(Architecture):
    """Keeps k entries a token on average."""

    k: float = 32

    def __post_init__(self) -> None:
        settle(self, k=real(), **self._checks())

    def _checks(self) -> dict[str, Check]:
        return {}


@dataclass(frozen=True, kw_only=True)
class StatisticalTopKSAE(_Averaging):
    """``statistical_topk``: what exceeds mean + σ·Q of its row, about k. You et al. 2025, arXiv:2506.06644.

    Raises:
        ConfigError: ``k`` is not positive.

    Example:
        >>> StatisticalTopKSAE(k=16).build_rule(1024, 100)
        StatisticalTopK(k=16)
    """

    tag = "statistical_topk"

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.StatisticalTopK(self.k)


@dataclass(frozen=True, kw_only=True)
class BatchTopKSAE(_Averaging):
    """``batchtopk``: k latents a token on average over a batch; a learned threshold afterwards. Bussmann et al. 2024,
    arXiv:2412.06410; mutual choice, Ayonrinde 2024, arXiv:2411.02124.

    ``k`` may be a fraction; ``topk_threshold_lr`` is the share by which a batch moves the threshold.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> BatchTopKSAE(k=16).build_rule(1024, 100)
        BatchTopK(k=16)
    """

    tag = "batchtopk"
    topk_threshold_lr: float = 0.1

    def _checks(self) -> dict[str, Check]:
        return {"topk_threshold_lr": rate}

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.BatchTopK(self.k, threshold_lr=self.topk_threshold_lr)


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """``matryoshka_batchtopk``: as ``batchtopk``; nested prefixes of the latents reconstruct. Bussmann et al. 2025,
    arXiv:2503.17547. The loss is the mean of the prefixes' errors, as in dictionary_learning.

    Args:
        k: average entries per token.
        widths: latents of each prefix, ascending, the last all of them; ``"auto"``: the shares of the paper, 1/32,
            3/32, 7/32, 15/32 and 1.
        topk_threshold_lr: share by which a batch moves the threshold.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> MatryoshkaBatchTopKSAE().resolved(768, 65536, "none").widths
        (2048, 6144, 14336, 30720, 65536)
    """

    tag = "matryoshka_batchtopk"
    widths: Auto | tuple[int, ...] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.widths, list):
            object.__setattr__(self, "widths", tuple(self.widths))
        super().__post_init__()

    def _checks(self) -> dict[str, Check]:
        return super()._checks() | {"widths": auto(widths)}

    def resolved(self, d_in: int, d_sae: int, normalize_activations: str) -> Architecture:
        if self.widths != "auto":
            if self.widths[-1] != d_sae:
                raise ConfigError([("widths", f"must end with d_sae = {d_sae}, got {list(self.widths)}")])
            return self
        return replace(self, widths=tuple(sorted({max(round(share * d_sae), 1) for share in _AUTO_WIDTHS})))

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.MatryoshkaBatchTopK(self.k, numbers(self, "widths"), threshold_lr=self.topk_threshold_lr)

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [NestedReconstruction(numbers(self, "widths"), "mean")]


@dataclass(frozen=True, kw_only=True)
class SampledTopKSAE(BatchTopKSAE):
    """``sampled_topk``: as ``batchtopk``, among the batch's best ``pool`` · k latents. Oozeer et al. 2025,
    arXiv:2508.21324.

    Args:
        k: average entries per token.
        pool: latents in the pool, in units of k.
        score: by which they are ranked, ``"l2"`` or ``"entropy"``.
        topk_threshold_lr: share by which a batch moves the threshold.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> SampledTopKSAE(k=8, pool=2.0).build_rule(1024, 100)
        SampledTopK(k=8, pool=2.0)
    """

    tag = "sampled_topk"
    pool: float = 4.0
    score: Literal["l2", "entropy"] = "l2"

    def _checks(self) -> dict[str, Check]:
        pool = real()
        return super()._checks() | {
            "pool": lambda value: pool(value) or (None if value >= 1 else f"must be at least 1, got {value}"),
            "score": one_of("l2", "entropy"),
        }

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.SampledTopK(self.k, pool=self.pool, score=self.score, threshold_lr=self.topk_threshold_lr)


@dataclass(frozen=True, kw_only=True)
class FeatureChoiceSAE(BatchTopKSAE):
    """``feature_choice``: each latent keeps its strongest tokens, k a token in all. Ayonrinde 2024, arXiv:2411.02124.

    Args:
        k: average entries per token.
        budgets: ``"zipf"`` or ``"uniform"``: how they are spread over the latents.
        mutual_share: of the updates, the first, in which latents and tokens choose each other, so that the budgets can
            follow how often each latent fires. Ours: half.
        topk_threshold_lr, density_lr: shares by which a batch moves thresholds and densities.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> FeatureChoiceSAE(k=8).build_rule(1024, steps=100).mutual_steps
        50
    """

    tag = "feature_choice"
    budgets: Literal["zipf", "uniform"] = "zipf"
    mutual_share: float = 0.5
    density_lr: float = 0.05

    def _checks(self) -> dict[str, Check]:
        return super()._checks() | {
            "budgets": one_of("zipf", "uniform"), "mutual_share": real("share"), "density_lr": rate,
        }  # fmt: skip

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.FeatureChoice(
            d_sae, self.k, budgets=self.budgets, mutual_steps=int(steps * self.mutual_share),
            density_lr=self.density_lr, threshold_lr=self.topk_threshold_lr,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JumpReLUSAE(Architecture):
    """``jumprelu``: a learned threshold per latent. Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope, Lieberum
    et al. 2024, arXiv:2408.05147, whose Adam (β₁ 0, 7e-5) and sparsity warm-up are the defaults.

    Args:
        l0_coefficient: weight of the L0 norm, beside a squared error summed over d; with ``l0_target``, of
            ``d (L0 / target - 1)^2``.
        l0_target: latents a token that are aimed at, as in dictionary_learning; None: what the coefficient leads to.
        jumprelu_bandwidth: of the estimator of the threshold's gradient.
        jumprelu_init_threshold: where thresholds start.

    The last two are lengths of pre-activations. Gemma Scope's 0.001 belongs to rows of mean squared norm 1, so
    ``"auto"`` is 0.001 sqrt(d_in) for rows that are scaled to a norm of sqrt(d_in); such thresholds need many thousand
    updates to rise. With ``l0_target`` they start where that many latents fire, and the bandwidth is 0.1 (ours). For
    rows that are taken as they are there is no such number, and ``"auto"`` is refused.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> JumpReLUSAE().resolved(2304, 16384, "expected_average_only_in").jumprelu_bandwidth
        0.048
    """

    tag = "jumprelu"
    adam_beta1 = 0.0
    l0_coefficient: float = 1.0
    l0_target: float | None = None
    jumprelu_bandwidth: Auto | float = "auto"
    jumprelu_init_threshold: Auto | float = "auto"
    _rule: ClassVar[Any] = rules.JumpReLU

    def __post_init__(self) -> None:
        settle(self, l0_coefficient=real("from 0"), l0_target=optional(real()), jumprelu_bandwidth=auto(real()),
               jumprelu_init_threshold=auto(real()))  # fmt: skip

    def learning_rate(self, d_sae: int) -> float:
        return 7e-5

    def sparsity_warm_up(self, steps: int) -> int:
        return min(10_000, steps // 20)

    def resolved(self, d_in: int, d_sae: int, normalize_activations: str) -> Architecture:
        open = [name for name in ("jumprelu_bandwidth", "jumprelu_init_threshold") if getattr(self, name) == "auto"]
        if open and normalize_activations == "none":
            raise ConfigError((name, "must be a number, since rows that are not normalized have any length: a share "
                               "of what pre-activations are like") for name in open)  # fmt: skip
        found = dict.fromkeys(open, round(_GEMMA_SCOPE * math.sqrt(d_in), 6))
        if self.l0_target is not None:  # pre-activations start as standard normal: unit rows times norms of sqrt(d)
            share = min(self.l0_target / d_sae, 0.5)
            first = round(max(NormalDist().inv_cdf(1 - share), _GEMMA_SCOPE), 6)
            found = {name: first if name == "jumprelu_init_threshold" else 0.1 for name in open}
        return replace(self, **found)

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return self._rule(d_sae, threshold=numbers(self, "jumprelu_init_threshold"),
                          bandwidth=numbers(self, "jumprelu_bandwidth"))  # fmt: skip

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        if self.l0_target is None:
            return [StepL0(self.l0_coefficient)]
        return [StepL0(self.l0_coefficient * d_out, target=self.l0_target)]

    def sparsity_name(self) -> tuple[str, ...]:
        return (StepL0.name,)


@dataclass(frozen=True, kw_only=True)
class LogJumpReLUSAE(JumpReLUSAE):
    """``log_jumprelu``: as ``jumprelu``, with the threshold's logarithm as the parameter, as SAELens has it.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> LogJumpReLUSAE(jumprelu_init_threshold=0.5, jumprelu_bandwidth=0.1).build_rule(16, 100).threshold[0].item()
        0.5
    """

    tag = "log_jumprelu"
    _rule = rules.LogJumpReLU


@dataclass(frozen=True, kw_only=True)
class StandardSAE(Architecture):
    """``standard``: ReLU and an L1 penalty times decoder norms. Bricken et al. 2023; Anthropic's update of April 2024,
    whose weight of 5, learning rate of 5e-5 and sparsity warm-up over 5 % are the defaults.

    Raises:
        ConfigError: ``l1_coefficient`` is negative or no number.

    Example:
        >>> StandardSAE(l1_coefficient=2.0).losses(768, 768)
        [L1(coefficient=2.0)]
    """

    tag = "standard"
    l1_coefficient: float = 5.0

    def __post_init__(self) -> None:
        settle(self, l1_coefficient=real("from 0"))

    def learning_rate(self, d_sae: int) -> float:
        return 5e-5

    def sparsity_warm_up(self, steps: int) -> int:
        return steps // 20

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.ReLU()

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [L1(self.l1_coefficient)]

    def sparsity_name(self) -> tuple[str, ...]:
        return (L1.name,)


@dataclass(frozen=True, kw_only=True)
class GatedSAE(Architecture):
    """``gated``: a gate of the same directions decides what fires. Rajamanoharan et al. 2024, arXiv:2404.16014, with
    its Adam (β₁ 0, 3e-4); the weight is SAELens'.

    Its one loss trains the gate and holds its penalty, so there is no sparsity warm-up: a gate without a loss would
    learn nothing.

    Raises:
        ConfigError: ``l1_coefficient`` is negative or no number.

    Example:
        >>> GatedSAE().losses(768, 768)
        [GateLoss(l1=1.0, weigh_by_norm=True)]
    """

    tag = "gated"
    adam_beta1 = 0.0
    l1_coefficient: float = 1.0

    def __post_init__(self) -> None:
        settle(self, l1_coefficient=real("from 0"))

    def learning_rate(self, d_sae: int) -> float:
        return 3e-4

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.Gated(d_sae)

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [GateLoss(self.l1_coefficient)]


@dataclass(frozen=True, kw_only=True)
class TopAFASAE(Architecture):
    """``top_afa``: as many latents of each token as bring the code's norm nearest to the input's. Lee et al. 2025,
    arXiv:2503.24277.

    Args:
        afa_coefficient: weight of the gap between the norms, the authors' ``afa_coeff``.
        l0_at_start: latents a token at the start, which scales the encoder (ours); None: the authors' scale, with which
            nearly half of all latents fire at first.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> TopAFASAE().losses(768, 768)
        [AFA(coefficient=0.03125)]
    """

    tag = "top_afa"
    afa_coefficient: float = 1 / 32
    l0_at_start: int | None = None

    def __post_init__(self) -> None:
        settle(self, afa_coefficient=real(), l0_at_start=optional(whole()))

    def build_rule(self, d_sae: int, steps: int) -> rules.Activation:
        return rules.TopAFA()

    def losses(self, d_in: int, d_out: int) -> list[Loss]:
        return [AFA(self.afa_coefficient)]

    def prepare(self, sae: SparseAutoencoder) -> None:
        if self.l0_at_start is not None:
            init_sparse(sae, self.l0_at_start)
        elif sae.d_in == sae.d_out:  # the variance of init_as_top_afa, around directions that are drawn already
            with torch.no_grad():
                sae.W_enc.mul_(math.sqrt(2 * sae.d_in / sae.d_sae))


# --------------------------------------------------------------------------------------------- by their names

ARCHITECTURES: dict[str, type[Architecture]] = {
    kind.tag: kind for kind in (
        TopKSAE, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReLUSAE, StandardSAE, GatedSAE, AbsTopKSAE, LogJumpReLUSAE,
        FeatureChoiceSAE, StatisticalTopKSAE, SampledTopKSAE, TopAFASAE, TanhJumpReLUSAE,
    )
}  # fmt: skip
# Rules that no configuration trains: by the name that one would look for, the class and the reason.
REFUSED: dict[str, tuple[type[rules.Activation], str]] = {
    "gradient_topk": (rules.GradientTopK, "it ranks latents by the gradient of the language model's loss, which a "
                      "stream of activations does not have; sae_engine.data.read_gradients and a TrainStep train it"),
    "mutual_choice": (rules.MutualChoice, "it is the rule of batchtopk: say batchtopk"),
    "aux_topk": (rules.AuxTopK, "it selects for AuxK alone: see aux_k and aux_k_coefficient"),
    "aux_zipf_topk": (rules.AuxZipfTopK, "it selects for an auxiliary loss alone"),
    "top_k_over_sources": (rules.TopKOverSources, "say topk, and over_sources: true"),
    "per_source": (rules.PerSource, "it is what a crosscoder makes of any rule: give several places as hook_name"),
}  # fmt: skip


def architecture_named(tag: object) -> type[Architecture]:
    """The class of an architecture; that of a user, named ``module:Class``, is imported.

    Raises:
        ConfigError: there is none of that name, or none that a configuration can train.

    Example:
        >>> architecture_named("topk").__name__
        'TopKSAE'
    """
    if isinstance(tag, str) and tag in ARCHITECTURES:
        return ARCHITECTURES[tag]
    if isinstance(tag, str) and tag in REFUSED:
        raise ConfigError([("architecture", f"{tag} cannot be trained from a configuration: {REFUSED[tag][1]}")])
    if isinstance(tag, str) and ":" in tag:
        return _of_a_user(tag)
    known = ", ".join(ARCHITECTURES)
    raise ConfigError([("architecture", f"must be one of {known}, or module:Class of your own, got {tag!r}"
                        f"{nearest(str(tag), ARCHITECTURES)}")])  # fmt: skip


def _of_a_user(tag: str) -> type[Architecture]:
    module, _, name = tag.partition(":")
    try:
        # The program itself may define some, and is not imported a second time under its own name.
        found = functools.reduce(getattr, name.split("."), sys.modules.get(module) or importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([("architecture", f"{tag!r} cannot be imported: {error}; is its folder in PYTHONPATH?")]
                          ) from error  # fmt: skip
    if not (isinstance(found, type) and issubclass(found, Architecture)):
        raise ConfigError([("architecture", f"{tag!r} must be a class derived from Architecture, got {found!r:.80}")])
    return found
