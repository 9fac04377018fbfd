"""One of the autoencoders that a run trains: its step, the scale of its activations, its sums between two log lines."""
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..initial import geometric_median
from ..losses import AuxK, Loss
from ..losses.warmed import Warmed
from ..provenance import Provenance
from ..rules import AbsTopK, BatchTopK, TopK
from ..standardization import Standardization, copy_of, fold_standardization
from ._architecture import Architecture
from .captured import CapturedStep
from .config import Resolved, SAEConfig, TrainConfig
from .first_weights import folded, own_draws
from .forward import PreActivations
from .metering import Densities, Sums
from .schedule import lr_factor, warm_up_factor
from .step import TrainStep

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Places = tuple[tuple[int, ...], tuple[int, ...]]
Scales = tuple[tuple[float, ...], tuple[float, ...]]

Mean = Callable[[list[Tensor]], None]  # over processes, in place

# Rules with as many entries as shapes say, all of whose work the device does: a graph of a step takes no more memory.
CAPTURED = (TopK, AbsTopK, BatchTopK)
SCALED, STANDARDIZED = "expected_average_only_in", "standardize"
# What a step reports, under the names that SAELens gives them; other summands of the loss are losses/<name>.
_NAMES = {
    "loss": "losses/overall_loss", "squared_error": "losses/mse_loss", "auxk": "losses/auxiliary_reconstruction_loss",
    "fvu": "metrics/explained_variance", "l0": "metrics/l0", "dead": "sparsity/dead_features",
    "grad_norm": "details/grad_norm", "overflow": "details/overflow",
}  # fmt: skip


class Trainee:
    """An autoencoder on its way. What it learns depends on its own configuration and on the rows alone.

    Args:
        config: its entry of ``saes``, complete: no ``auto`` left.
        run: the whole configuration, likewise.
        places: numbers, among the sites of the stream, of what it reads and of what it reconstructs: one of each, but
            for crosscoders.
        context: likewise, of what its rule is given beside the pre-activations, by name.
        widths: of all sites.
        total: updates of the run.
        device: to train on.
        mean: of a few numbers over the processes that train it together; None with one.
        mesh: of these processes; None where there is one alone.
        buffer: memory for pre-activations, which all trainees of a run share: they step one after the other.
        pool: likewise the memory of their CUDA graphs; None on a CPU.
    """

    def __init__(
        self, config: SAEConfig, run: TrainConfig, *, places: Places, context: Mapping[str, int],
        widths: tuple[int, ...], total: int, device: torch.device, mean: Mean | None, buffer: PreActivations,
        mesh: DeviceMesh | None = None, pool=None,
    ) -> None:  # fmt: skip
        assert config.name is not None
        self.config, self.name, self.mean = config, config.name, mean
        self.reads, self.writes = places
        self.context = context
        of_places = [widths[n] for n in self.reads], [widths[n] for n in self.writes]
        d_in, d_out = of_places[0][0], of_places[1][0]
        optim: Resolved = run.optim_of(config)
        self.optim = optim
        self.sae = config.build(d_in, d_out, steps=total, seed=run.seed, device=device, widths=of_places, mesh=mesh)
        # What multiplies its inputs, and its targets, at each place.
        self.scales: Scales = (1.0,) * len(self.reads), (1.0,) * len(self.writes)
        # What is taken away before, of all places side by side.
        self.means: tuple[Tensor, Tensor] | None = None
        if config.normalize_activations == STANDARDIZED:
            self.means = tuple(torch.zeros(sum(side), device=device) for side in of_places)  # type: ignore[assignment]
        rises = config.architecture.sparsity_name()
        losses: list[Loss] = [
            Warmed(loss, device) if loss.name in rises else loss for loss in config.architecture.losses(d_in, d_out)
        ]
        self.warmed = [loss for loss in losses if isinstance(loss, Warmed)]
        resolved: Resolved = config
        if config.aux_k_coefficient:
            losses.append(AuxK(resolved.aux_k, resolved.aux_k_coefficient))
        self._factor = functools.partial(
            lr_factor, warm_up=optim.lr_warm_up_steps, decay=optim.lr_decay_steps, total=total
        )
        self.step = TrainStep(
            self.sae, lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps,
            weight_decay=optim.weight_decay, losses=losses, normalize_decoder=config.unit_rows,
            grad_clip=optim.max_grad_norm, compute_dtype=optim.compute_dtype,
            moments=optim.moments, accumulate=optim.gradient_accumulation_steps,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor),
            dead_after=optim.dead_after, memory_budget=optim.memory_budget, nonfinite=optim.nonfinite,
        )  # fmt: skip
        self.step._pre_activations = buffer
        if optim.cuda_graphs and (why := self._why_not_captured(device)) is not None:
            raise ValueError(f"optim.cuda_graphs must be false {why}")
        self._call = CapturedStep(self.step, pool=pool) if optim.cuda_graphs else self.step
        self.sums = Sums(device)
        update = optim.train_batch_size_tokens * optim.gradient_accumulation_steps
        window = -(-optim.dead_after // update)
        self.densities = Densities(self.sae.share.d_sae, window, device, config.sources)

    def _why_not_captured(self, device: torch.device) -> str | None:
        """What keeps its steps from being replayed as CUDA graphs."""
        rule = self.sae.activation
        if device.type != "cuda":
            return f"on {device}: graphs are a GPU's"
        if self.sae.shards is not None:
            return "where several processes train"
        if self.step.accumulate != 1:
            return f"with gradient_accumulation_steps = {self.step.accumulate}"
        if type(rule) not in CAPTURED:
            return f"with {type(rule).__name__}: only {', '.join(kind.__name__ for kind in CAPTURED)} are captured"
        if self.config.sources > 1 and isinstance(rule, BatchTopK):
            return f"with {type(rule).__name__} over several places: the host reads how they share the batch's budget"
        return None

    @torch.no_grad()
    def begin(self, rows: tuple[Tensor, ...], ranks: int) -> None:
        """Scale and ``b_dec``, from the first rows of all sites, of all ``ranks``; or as they were saved."""
        if self.config.from_pretrained is not None and isinstance(self.sae, Crosscoder):
            self._scale_places(rows)
            if self.config.normalize_activations != "none":  # its weights are those for rows as they come
                back = (standard.inverse() for standard in self._standards(self.sae))
                self.sae.load_state_dict(fold_standardization(self.sae, *back).state_dict())
            return
        if self.config.from_pretrained is not None:
            known = self.sae.provenance
            if self.config.normalize_activations == SCALED and known is not None and known.activation_scale is not None:
                self.scales = (known.activation_scale,), (known.target_scale or known.activation_scale,)
            return
        self._scale_places(rows)
        if self.config.b_dec_init != "zeros":
            self._start_b_dec(rows, ranks)
        if type(self.config.architecture).start is not Architecture.start:
            device = self.sae.share.b_dec.device
            seen = self._seen(lambda number, scale: rows[number].to(device, torch.float32) * scale, 0)
            self.config.architecture.start(self.sae, seen)

    def _start_b_dec(self, rows: tuple[Tensor, ...], ranks: int) -> None:
        at = 0
        for number, scale in zip(self.writes, self.scales[1], strict=True):
            b_dec = self.sae.share.b_dec
            target = rows[number].to(b_dec.device, torch.float32)
            if self.means is not None:
                target = target - self.means[1][at : at + target.shape[1]]
            target = target * scale
            if self.sae.normalize_activations != "none":
                target = self.sae._normalized(target)[0]
            b_dec[at : at + target.shape[1]].copy_(self._middle(target, ranks))
            at += target.shape[1]

    def _scale_places(self, rows: tuple[Tensor, ...]) -> None:
        places = dict.fromkeys((*self.reads, *self.writes))
        if self.config.normalize_activations == STANDARDIZED:
            means = {n: self._mean(rows[n]) for n in places}
            of_site = {n: self._scale(rows[n].to(means[n].device) - means[n], mean_square=True) for n in places}
            self.means = tuple(torch.cat([means[n] for n in numbers]) for numbers in (self.reads, self.writes))  # type: ignore
        elif self.config.normalize_activations == SCALED:
            of_site = {n: self._scale(rows[n]) for n in places}
        else:
            return
        self.scales = tuple(of_site[n] for n in self.reads), tuple(of_site[n] for n in self.writes)
        self._spread_scales()

    def _spread_scales(self) -> None:
        """Over the columns of all places, on the device, where means are taken away too."""
        if self.means is not None:
            self._columns = [standard.columns.to(torch.float32) for standard in self._standards(self.sae)]

    def _standards(self, coder: Any) -> tuple[Standardization, Standardization]:
        """What the rows of the places that it reads, and of those that it reconstructs, go through."""
        b_dec = coder.share.b_dec
        means = self.means or (b_dec.new_zeros(coder.d_in), b_dec.new_zeros(coder.d_out))
        read, written = (
            Standardization(widths, mean, torch.tensor(scales, dtype=torch.float64, device=mean.device))
            for widths, mean, scales in zip((coder.read_widths, coder.written_widths), means, self.scales, strict=True)
        )
        return read, written

    def _mean(self, rows: Tensor) -> Tensor:
        """(d,) of rows of one place, on the device that is trained on."""
        return self._over_all(rows.to(self.sae.share.b_dec.device, torch.float32).mean(0))

    def _middle(self, target: Tensor, ranks: int) -> Tensor:
        """Where ``b_dec`` starts, of rows of one place."""
        if self.config.b_dec_init == "mean":
            return self._over_all(target.mean(0))
        return geometric_median(target, None if self.mean is None else lambda sums: self._over_all(sums).mul_(ranks))

    def _scale(self, rows: Tensor, *, mean_square: bool = False) -> float:
        """√d over the mean norm of rows, or over the root of their mean squared norm."""
        norms = rows.to(torch.float32).norm(dim=1)
        mean = self._over_all(norms.square().mean().double() if mean_square else norms.mean().double())
        if not 0 < float(mean) < float("inf"):
            kind = "squared norm" if mean_square else "norm"
            raise ValueError(f"saes: {self.name}: the first {len(rows)} rows of activations have a mean {kind} of "
                             f"{float(mean)}, which must be finite and above 0")  # fmt: skip
        return (rows.shape[1] / float(mean)) ** 0.5 if mean_square else rows.shape[1] ** 0.5 / float(mean)

    def _over_all(self, own: Tensor) -> Tensor:
        """The mean of a few numbers over all processes, in place."""
        if self.mean is not None:
            self.mean([own])
        return own

    def train(self, rows: Callable[[int, float], Tensor], update: int) -> None:
        """One call of the step; ``rows(site, scale)`` gives the batch as it is to be seen."""
        for loss in self.warmed:
            loss.set(warm_up_factor(update, self.optim.sparsity_warm_up_steps))
        x = self._seen(rows, 0)
        target = None if self.writes == self.reads else self._seen(rows, 1)
        context = {name: rows(site, 1.0) for name, site in self.context.items()}
        self.sums.add(self._call(x, target, **context), self.step._finite.count)
        if self.step.seen is not None and self.step.calls % self.step.accumulate == 0:
            self.densities.add(*self.step.seen)

    def _seen(self, rows: Callable[[int, float], Tensor], side: int) -> Tensor:
        """The rows of all places that it reads (0), or reconstructs (1), side by side as it is trained on them."""
        numbers = (self.reads, self.writes)[side]
        if self.means is None:
            return _beside(rows, numbers, self.scales[side])
        return (_beside(rows, numbers, (1.0,) * len(numbers)) - self.means[side]) * self._columns[side]

    def rate(self, update: int) -> float:
        """The learning rate of the update after ``update`` of them."""
        return self.optim.lr * self._factor(update)

    def metrics(self) -> dict[str, Tensor]:
        """Means since the last call, under SAELens' names, on the device; the sums begin anew."""
        found = self.sums.taken()
        named = {_NAMES.get(name, f"losses/{name}"): value for name, value in found.items()}
        named["metrics/explained_variance"] = 1 - named["metrics/explained_variance"]
        named["sparsity/dead_features"] = named["sparsity/dead_features"] * self.config.sources * self.sae.d_sae
        return named

    def exported(self, provenance: Provenance | None = None) -> SparseAutoencoder:
        """A copy in evaluation mode for activations as the model has them: the scale is in its weights. One on a mesh
        has a copy there, which all processes make together."""
        if isinstance(self.sae, Crosscoder):
            is_raw = all(scale == 1 for scale in (*self.scales[0], *self.scales[1])) and self.means is None
            coder = copy_of(self.sae) if is_raw else fold_standardization(self.sae, *self._standards(self.sae))
            coder.provenance = provenance
            return coder.eval()
        ((scale,), (target_scale,)) = self.scales
        if provenance is not None and self.config.normalize_activations == SCALED:
            is_coder = self.writes != self.reads
            provenance = replace(provenance, activation_scale=scale, target_scale=target_scale if is_coder else None)
        with own_draws(None if self.sae.shards is None else self.sae.shards.mesh):
            sae = folded(self.sae, scale, target_scale, Path(self.name))
        sae.provenance = provenance
        return sae.eval()

    def state(self) -> dict[str, Any]:
        """All that its next step depends on, tensors among it; the same in all processes."""
        scales = [each[0] if len(each) == 1 else list(each) for each in self.scales]
        means = {} if self.means is None else {"means": list(self.means)}
        return {"sae": dict(self.sae.state_dict()), "step": self.step.state_dict(), "scales": scales, **means,
                "densities": self.densities.state(self.sae.shards)}  # fmt: skip

    def shares(self) -> Tensor | None:
        """(sources d_sae,) how often each latent fires; None before the first update. On a mesh all processes ask."""
        return self.densities.shares(self.sae.shards)

    def own_state(self) -> dict[str, Any]:
        """What this process has counted, in JSON's types."""
        return {"sums": self.sums.state(), "skipped": int(self.step._finite.count)}

    def load(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.step.load_state_dict(state["step"])
        self.densities.load(state["densities"])
        self.step._finite.count.fill_(own["skipped"])
        reads, writes = (each if isinstance(each, list) else [each] for each in state["scales"])
        self.scales = tuple(reads), tuple(writes)
        if "means" in state:
            self.means = tuple(mean.to(self.sae.share.b_dec.device) for mean in state["means"])  # type: ignore
            self._spread_scales()
        self.sums.load(own["sums"])


def _beside(rows: Callable[[int, float], Tensor], numbers: tuple[int, ...], scales: tuple[float, ...]) -> Tensor:
    """The rows of all these sites, side by side."""
    found = [rows(number, scale) for number, scale in zip(numbers, scales, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, 1)
