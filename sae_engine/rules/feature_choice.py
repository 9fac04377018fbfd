"""Feature Choice: every latent chooses its tokens."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing

from .. import _checks as check
from .. import functional
from .._running import Running, RunningLatents
from ..codes import SparseCodes
from .base import above, apply_but, captured_size, kept_values
from .batch_topk import BatchTopK
from .density import fired_share


@dataclass
class _Counted:
    """What the host knows of the count of training forwards, which the device holds in ``forwards``.

    The host's count is at least that; a flag says whether the two are known to agree. A shard's copy of a rule shares
    the object.
    """

    forwards: int
    is_settled: bool


BUDGETS = ("zipf", "uniform")
INFERENCE = ("latent", "global")


class FeatureChoice(BatchTopK):
    """Each latent keeps its m_j strongest tokens of the batch, ``int(k * tokens)`` in all; thresholds afterwards.

    In ``.train()`` the budgets m_j follow the rank of each latent's running density
    (:func:`functional.feature_budgets`); equal densities rank by index, so that a run which starts here and not with
    Mutual Choice starts from that order. For the first ``mutual_steps`` training forwards the rule is Mutual Choice,
    from which the densities then come. A forward under ``torch.compile`` cannot count them: there,
    :meth:`end_mutual_choice` ends the phase.

    Each training forward under grad moves ``threshold`` () towards the smallest positive value kept at all, each
    latent's ``latent_threshold`` (d_sae,) towards the smallest that it kept, and ``density`` (d_sae,) towards the share
    of tokens on which it fired. ``.eval()`` keeps what exceeds the thresholds. All are saved with the module, in
    float64, -1 while unset; a latent that never fired takes the global threshold.

    Args:
        d_sae: number of latents.
        k: average entries per token, int or float.
        budgets: ``"zipf"``, shares that fall as ``1 / (rank + shift)^exponent``, or ``"uniform"``.
        exponent, shift: of Zipf's law.
        mutual_steps: training forwards under the batch's common budget before latents choose.
        inference: ``"latent"``: a threshold per latent in eval; ``"global"``: one for all.
        density_lr, threshold_lr: weight of the newest batch in the running means.

    Ayonrinde 2024, arXiv:2411.02124. No code of the author's is public: the formula of the budgets, their rounding,
    the running densities and the thresholds are ours.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.
        RuntimeError: in eval, where no threshold was learned yet.

    Example:
        >>> pre = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
        >>> FeatureChoice(2, 1, budgets="uniform")(pre)  # each latent keeps its strongest token
        tensor([[0., 2.],
                [3., 0.]])
    """

    latent_threshold: Tensor
    density: Tensor
    selects_over_shards = True
    entry_values = kept_values

    def __init__(
        self, d_sae: int, k: float, *, budgets: str = "zipf", exponent: float = 1.0, shift: float = 0.0,
        mutual_steps: int = 0, inference: str = "latent", density_lr: float = 0.01, threshold_lr: float = 0.1,
        device=None,
    ) -> None:  # fmt: skip
        super().__init__(k, threshold_lr=threshold_lr, device=device)
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        check.number_k(k, d_sae)
        self.exponent, self.shift = check.budget_law(exponent, shift)
        for name, value, known in (("budgets", budgets, BUDGETS), ("inference", inference, INFERENCE)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        self.density_lr = check.positive("density_lr", density_lr)
        if self.density_lr > 1:
            raise ValueError(f"density_lr must satisfy 0 < density_lr <= 1, got {density_lr}")
        self.budgets, self.inference = budgets, inference
        self.mutual_steps = check.count("mutual_steps", mutual_steps)
        for name in ("latent_threshold", "density"):
            self.register_buffer(name, torch.full((d_sae,), -1.0, dtype=torch.float64, device=device))
        self._exact = ("threshold", "latent_threshold", "density")
        self._count_forwards()
        self._host = _Counted(0, self.mutual_steps == 0)

    @property
    def phase(self) -> str:
        """``"mutual"`` or ``"feature"``: which choice the next training forward makes.

        Where the host's count says that the phase is over, the device is asked, once: a batch that ``TrainStep`` left
        out has not moved its count, and the host need not have heard of it.
        """
        may_ask = not torch.compiler.is_compiling() and not capturing(self.forwards)
        if not self._host.is_settled and self._host.forwards >= self.mutual_steps and may_ask:
            self._counted_are(int(self.forwards))
        return "mutual" if self._host.forwards < self.mutual_steps else "feature"

    @property
    def settled(self) -> bool:  # type: ignore[override]
        return self.phase == "feature"

    def end_mutual_choice(self) -> None:
        """From the next training forward on, latents choose."""
        self._counted_are(max(self._host.forwards, self.mutual_steps))
        self.forwards.fill_(self._host.forwards)

    def _counted_are(self, forwards: int) -> None:
        self._host.forwards, self._host.is_settled = forwards, forwards >= self.mutual_steps

    def _select(self, pre: Tensor, backend: str) -> SparseCodes:
        self._check_width(pre)
        if self.training and self.phase == "mutual":
            return functional.batch_topk(pre, self.k, backend=backend)
        if self.training:
            tokens = pre.shape[:-1].numel()  # over shards latents choose by running()
            return functional.feature_topm(pre, self.latent_budgets(tokens), total=self.total(tokens), backend=backend)
        self._require_threshold()
        return functional.threshold(
            pre, self.inference_threshold(), capacity=captured_size(pre), backend=backend
        )

    @property
    def scope(self) -> str:
        """What competes in the next training forward."""
        return "batch" if self.phase == "mutual" else "latent"

    def latent_budgets(self, tokens: int) -> Tensor:
        """(d_sae,) int32: tokens that each latent keeps of a training batch."""
        exponent = 0.0 if self.budgets == "uniform" else self.exponent
        total = self.total(tokens)
        density, shards = self.density, self.shards
        if shards is not None:
            density = shards.all_latents(density, "densities")
        budgets = functional.feature_budgets(density, total, tokens, exponent=exponent, shift=self.shift)
        return budgets if shards is None else budgets[shards.mine]

    def running(self, tokens: int, num_latents: int, *, backend: str = "auto") -> Running | None:
        """As :meth:`BatchTopK.running`; where latents choose, the host reads the budgets."""
        self._check_latents(num_latents)
        if not self.training:
            return self._running_threshold(tokens, num_latents, backend, self.inference_threshold())
        if self.phase == "mutual":
            return super().running(tokens, num_latents, backend=backend)
        budgets = self.latent_budgets(tokens if self.shards is None else self.shards.tokens)
        return RunningLatents(tokens, num_latents, backend, budgets, self.shards)

    def _dense(self, pre: Tensor) -> Tensor:
        if self.training:
            return super()._dense(pre)
        self._check_width(pre)
        self._require_threshold()
        return above(pre, self.inference_threshold())

    def inference_threshold(self) -> Tensor:
        """What ``.eval()`` compares with: () or (d_sae,) float64."""
        if self.inference == "global":
            return self.threshold
        return torch.where(self.latent_threshold < 0, self.threshold, self.latent_threshold)

    def update(self, codes: SparseCodes) -> None:
        if not (self._learns() and (codes.rows or self.shards is not None)):
            return
        super().update(codes)
        with torch.no_grad():
            functional.move_threshold(self.density, fired_share(codes, self.shards), self.density_lr)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:  # no checkpoint's second run
            self._host.forwards += 1

    def move_thresholds(self, codes: SparseCodes, rate: float, teaches: Tensor | None = None) -> None:
        super().move_thresholds(codes, rate, teaches)
        values, latents = codes.values.detach().double(), codes.indices.long()
        smallest = torch.full_like(self.latent_threshold, torch.inf)
        smallest.scatter_reduce_(0, latents, torch.where(values > 0, values, torch.inf), "amin")
        if self.shards is not None:
            smallest = self.shards.least_over_groups(smallest, "thresholds")
        functional.move_threshold(self.latent_threshold, smallest, rate)

    def _check_width(self, pre: Tensor) -> None:
        self._check_latents(check.pre_activations(pre).shape[-1])

    def _check_latents(self, num_latents: int) -> None:
        if num_latents != self.d_sae:
            raise ValueError(f"pre must have d_sae = {self.d_sae} latents, got {num_latents}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if f"{prefix}forwards" in state_dict:
            self._counted_are(int(state_dict[f"{prefix}forwards"]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn, recurse: bool = True):
        return apply_but(self._exact, self, super()._apply, fn, recurse)
