"""TrainStep: one optimizer step of a sparse autoencoder, sparse from the selection to the last moment of Adam."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing, resolve
from sae_kernels.stock import densified

from .. import _checks as check
from .._slabs import default_budget_bytes
from .._sources import numbered
from ..autoencoder import SparseAutoencoder
from ..codes import SparseCodes
from ..crosscoder import Crosscoder
from ..distributed.shards import Shards, check_rules
from ..losses import Loss, Pull, losses_for
from ..losses.base import checked_target
from ..rules import PerSource
from ._over_blocks import BlockedUpdate, check_blocks
from ._over_shards import (
    agree_on_options,
    as_wholes,
    check_over_shards,
    locals_of,
    of_all_ranks,
)
from .backward import DeadLatents, Finite, backward
from .forward import Forward, PreActivations
from .memory import keep_freed_memory
from .optimizer import Adam, Copies, Update


class TrainStep:
    """A whole training step: ``step(x)`` encodes, selects, decodes, differentiates and updates ``sae`` in place.

    Only the encoder's forward product is dense. Gradients follow the codes latent by latent, and where nothing needs
    them whole, Adam uses them up as they come: no gradient of the weights is ever stored. The result is that of
    ``loss.backward()`` and ``torch.optim.Adam`` with exact dense semantics, latents that did not fire included.

    Args:
        sae: in training mode, on the device to train on; its parameters may have no ``.grad``. Its ``W_enc`` is laid
            out latent by latent, unless it was made with ``contiguous_parameters=True``.
        lr: learning rate. It lies on the device, in ``step.optimizer.param_groups[0]["lr"]``.
        betas, eps, weight_decay: as in ``torch.optim.Adam``; weight decay is coupled (L2).
        losses: added to the reconstruction error, as ``losses.AuxK()``, ``losses.L1(3.0)`` or one of your own
            (:class:`losses.Loss`). A rule that cannot be trained without one is refused without it
            (:func:`losses.losses_for`); a Matryoshka rule's error is that of its nested prefixes.
        normalize_decoder: keep the decoder's rows at norm 1: the part of the gradient along them is removed before
            Adam, they are rescaled after it. ``"auto"``: unless it is a :class:`Crosscoder`, whose norms say where a
            latent writes. None: unless the autoencoder rescales by decoder norm.
        grad_clip: largest norm of all gradients together. Gradients are then stored, as with
            ``accumulate``.
        compute_dtype: of the products and codes, such as ``"bfloat16"``; parameters, sums and Adam stay as they
            are. Default: the parameters'.
        copies: whether copies of both weights in ``compute_dtype`` are kept from step to step. Without them, 2 bytes a
            weight less in 16 bits, the encoder's is made anew for each slab of pre-activations, and sums over codes
            gather the decoder's rows as they are, which are twice as many bytes and not rounded.
        moments: dtype of Adam's moments of ``W_dec`` and ``W_enc``. Default: the parameters'. ``"bfloat16"``, beside
            float32 parameters, keeps 4 bytes a weight less: both moments are rounded by chance after the weights have
            moved by the exact ones, up or down as makes the mean right, because to the nearest a second moment would
            not decay. The chance is a hash of update and place, so that a run repeats and resumes bit for bit.
        scheduler: makes a learning-rate scheduler of the optimizer, for example
            ``lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)``; it advances with each update.
        accumulate: calls whose gradients are averaged into one update.
        dead_after: tokens without firing after which a latent is dead.
        memory_budget: bytes of pre-activations that may exist at a time; what is more passes by in slabs of latents, or
            of tokens for rules that need whole rows, and the same codes are kept. Default: a quarter of the memory that
            is free at the first step.
        density_interval: steps between two reads of the device, where there is something to read: how dense the codes
            of a rule with ``capacity`` are, and how many latents may be dead.
        dense: whether sums over codes go through GEMMs. Default: where codes are dense enough for that to be faster.
        nonfinite: what happens to a batch with NaN or Inf in its input, loss or gradients. Its update changes nothing
            either way: no parameter, moment, counter or threshold. ``"raise"``: FloatingPointError, at once on a CPU;
            on a GPU in a later call, since nothing waits for the device. ``"skip"``: it is counted in
            :attr:`skipped`. The learning-rate schedule goes on. With ``accumulate`` it takes the whole update with it.
        blocks: with a mesh, how many blocks latents and tokens are cut into, each rank having as many. Products are
            made and sums added block by block, as trees: parameters, moments and losses then have the same bits on
            every mesh of 1, 2, 4, … ranks, in groups or not, which must divide it. Default: one for each rank.
        backend: as everywhere.

    With gradients that are stored, the order is: remove the parallel part, clip, Adam, rescale.
    Nothing waits for the device with rules that keep a fixed number of entries or have a ``capacity``, but for those
    reads. ``sae_engine.losses`` and any ``torch.optim`` optimizer train the same model the ordinary way.

    A step can be captured in a CUDA graph, by :class:`CapturedStep` or after :meth:`warm_up`. The graph updates
    parameters, moments, counters and thresholds where they lie; what only the host counts (``calls``, ``scheduler``,
    :class:`FeatureChoice`'s phase) stands still while it is replayed; :meth:`replayed` moves the first two on.
    :meth:`load_state_dict` writes into the same tensors; whoever else writes parameters between replays calls
    :meth:`refresh` afterwards.

    Raises:
        TypeError: the rule cannot be trained without a loss that is missing, or an argument is of another kind.
        ValueError: an argument is out of range; names it.
        RuntimeError: in a call, where ``sae`` is in eval mode, or a parameter has a ``.grad``.

    Example:
        >>> sae = SparseAutoencoder(4, 16, se.TopK(2))
        >>> step = TrainStep(sae, lr=1e-3, losses=se.losses.AuxK(4))
        >>> report = step(torch.randn(8, 4))
        >>> sorted(report)
        ['auxk', 'dead', 'fvu', 'grad_norm', 'l0', 'loss', 'squared_error']
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        losses: Loss | Sequence[Loss] = (),
        normalize_decoder: bool | str | None = "auto",
        grad_clip: float | None = None,
        compute_dtype: torch.dtype | str | None = None,
        copies: bool = True,
        moments: torch.dtype | str | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        accumulate: int = 1,
        dead_after: int = 10_000_000,
        memory_budget: int | None = None,
        density_interval: int = 100,
        dense: bool | None = None,
        nonfinite: str = "raise",
        blocks: int | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae must be a SparseAutoencoder, got {type(sae).__name__}")
        self.sae, self.shards = sae, sae.shards
        self.losses = losses_for(sae, losses)
        if sae.shards is not None:
            check_over_shards(self.losses)
        self.blocks = None if blocks is None else check_blocks(sae, self.losses, blocks, dense)
        share = sae.share
        _check_norms(sae, self.losses)
        unit_rows = {None: not sae.rescale_acts_by_decoder_norm, "auto": not isinstance(sae, Crosscoder)}
        self.normalize_decoder = check.flag(
            "normalize_decoder", unit_rows.get(normalize_decoder, normalize_decoder)  # type: ignore[arg-type]
        )
        given = share.b_dec.dtype if compute_dtype is None else compute_dtype
        self.compute_dtype = check.dtype_in("compute_dtype", given)
        self.accumulate = check.integer_k(accumulate, name="accumulate")
        self.memory_budget = None if memory_budget is None else check.integer_k(memory_budget, name="memory_budget")
        self.density_interval = check.integer_k(density_interval, name="density_interval")
        self.dense = dense if dense is None else check.flag("dense", dense)
        self.backend = resolve(backend, share.b_dec)
        share._lay_out_by_latent()
        if share.b_dec.is_cpu:
            keep_freed_memory()
        self.optimizer = Adam(
            share, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moments=_checked_moments(moments, sae)
        )
        self.scheduler = None if scheduler is None else _checked_scheduler(scheduler(self.optimizer))
        self.dead = DeadLatents(
            share.d_sae * len(share.sources), dead_after=dead_after, read_interval=density_interval,
            device=share.b_dec.device, shards=sae.shards, every=sae.d_sae * len(sae.sources),
        )
        self.calls = 0
        self._dense_now: bool | None = None  # the last decision for a rule with capacity
        self._warming_up = False
        self._copies = Copies(share, self.compute_dtype, kept=check.flag("copies", copies))
        self._pre_activations = PreActivations()
        self._update = (Update if blocks is None else BlockedUpdate)(
            share, self.optimizer, self._copies, unit_rows=self.normalize_decoder, backend=self.backend,
            grad_clip=None if grad_clip is None else check.positive("grad_clip", grad_clip), accumulate=self.accumulate,
        )  # fmt: skip
        self._seen: Seen | None = None  # since the last update
        self.seen: Seen | None = None  # between the two last updates
        self._finite = Finite(nonfinite, share.b_dec.device, 1 if sae.shards is None else sae.shards.groups)
        if sae.shards is not None:
            agree_on_options(sae, self.losses, {
                "lr": float(lr), "betas": list(betas), "eps": eps, "weight_decay": weight_decay,
                "moments": str(moments), "normalize_decoder": self.normalize_decoder, "grad_clip": grad_clip,
                "accumulate": self.accumulate,
                "compute_dtype": str(self.compute_dtype), "dead_after": self.dead.dead_after, "dense": dense,
                "memory_budget": memory_budget, "density_interval": density_interval, "nonfinite": nonfinite,
                "backend": self.backend, "blocks": blocks,
            })  # fmt: skip

    @property
    def skipped(self) -> int:
        """Batches whose update was left out because something was not finite. Reads the device."""
        return int(self._finite.count)

    def __repr__(self) -> str:
        """Rule, losses, learning rate (where it lies on a GPU, that it does: nothing is read), dtype and calls."""
        lr, losses = self.optimizer.options["lr"], ", ".join(map(repr, self.losses))
        rate = f"<on {lr.device}>" if isinstance(lr, Tensor) and not lr.is_cpu else f"{float(lr):g}"
        return (f"TrainStep({self.sae.activation!r}, losses=[{losses}], lr={rate}, "
                f"compute_dtype={self.compute_dtype}, calls={self.calls})")  # fmt: skip

    def __call__(self, x: Tensor, target: Tensor | None = None, **context: Tensor) -> dict[str, Tensor]:
        """One step on a batch.

        Args:
            x: ``(*batch_shape, d_in)``.
            target: ``(*batch_shape, d_out)``, what to reconstruct; default ``x``.
            context: what the rule needs and the autoencoder does not know, as in :meth:`SparseAutoencoder.encode`.

        Returns:
            Scalars on the device, none of them waited for: ``loss``, and its summands by name (``squared_error``,
            ``auxk``, …; ``squared_error`` also where the errors of nested prefixes are summed in its place); ``fvu``,
            squared error over the target's squared distance from its batch mean; ``l0``, mean non-zero values a token;
            ``dead``, share of dead latents; ``grad_norm``, of all gradients as they reach Adam (before clipping), where
            the call updates; ``overflow``, with a ``capacity``: whether it was too small, in which case parameters,
            optimizer and counters are what they were.
        """
        try:
            x, target = self._checked(x, target)
        except Exception as error:
            if self.shards is not None:
                self.shards.agreement.meet("step", 0, error)  # which ends the other ranks, too
            raise
        if self.shards is not None:
            self.shards.begin(len(x), self.blocks)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.shards is None:
                report, bad = self._step(x, target, context)
            else:
                with self.shards.agreement.watched():
                    report, bad = self._step(x, target, context)
            self._finite.note(bad)
        return report

    def warm_up(self, x: Tensor, target: Tensor | None = None, **context: Tensor) -> dict[str, Tensor]:
        """A training step as a CUDA graph will run it; call it, on batches of the graph's shape, before the capture.

        It is an ordinary step, in arguments, result and errors. But as in a capture, auxiliary selections take place
        also where no latent can be dead yet, so that all kernels are compiled and loaded, which a capture forbids, and
        everything that lives on is made outside the graph's memory.
        """
        self._warming_up = True
        try:
            return self(x, target, **context)
        finally:
            self._warming_up = False

    def replayed(self, tokens: int = 0) -> None:
        """Told by whoever replays a captured step, on so many tokens: what only the host counts moves on."""
        self.calls += 1
        self.dead.tokens += tokens
        if self.scheduler is not None:
            self.scheduler.step()
        self._finite.told()

    def refresh(self) -> None:
        """Renews the copies of the weights in ``compute_dtype``, in place, after somebody else has written parameters.

        A call notices that by itself, but for what was written through ``.data`` or NumPy; a replayed graph does not.
        """
        with torch.no_grad():
            self._copies.current()

    def _step(
        self, x: Tensor, target: Tensor, context: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a call returns, and the flag of a batch that was not finite."""
        forward, numbers = self._forward(x, target, context)
        main, tokens = forward.kept[0].codes, forward.tokens
        overflow = None if main.required is None else main.required > main.values.shape[0]
        if self.shards is not None and getattr(self.sae.activation, "capacity", None) is None:
            overflow = None  # there is room for all that a rank may have to keep
        with densified.choosing(self._density(main)):
            spread = forward.spread(target)
            found: list[tuple[Tensor, Pull | None]] = [
                (forward.sum_all(x.new_zeros(len(x), dtype=forward.wide)), None) if number is None
                else loss.pull(forward, number) for loss, number in zip(self.losses, numbers, strict=True)
            ]  # fmt: skip
            losses = {loss.name: value for loss, (value, _) in zip(self.losses, found, strict=True)}
            whole = [loss.sum() if loss.dim() else loss for loss in losses.values()]  # of blocks, with blocks
            report = {"loss": torch.stack([loss.to(forward.wide) for loss in whole]).sum(), **losses}
            squares = forward.sum_all(forward.residual(0)[1])
            report["squared_error"] = squares / tokens
            report["fvu"] = squares / spread
            report["l0"] = (main.values != 0).sum()
            forward.forget_residuals()
            pending = backward(forward, [pull for _, pull in found if pull is not None])
            del forward, found  # their memory serves the update
            self.calls += 1
            bad = self._finite.of(report["loss"], pending, has_capacity=main.required is not None)
            if self.shards is not None:
                report, overflow, bad = of_all_ranks(self.shards, report, overflow, bad, list(losses))
            report["l0"] = report["l0"] / tokens
            fired = _firing(main, len(self.sae.sources), self.shards).float()
            since = self._seen = Seen(fired, tokens, _either(overflow, bad)).after(self._seen)
            if self._update.can_be_fused(pending):
                grad_norm = self.optimizer.step(lambda: self._update.fused(pending, since.skip))
            else:
                self._update.store(pending)
                if self.calls % self.accumulate == 0:
                    grad_norm = self.optimizer.step(lambda: self._update.apply_stored(since.skip))
        if bad is None or not bad.is_cpu or not bool(bad):
            self._teach(main, bad)
        if self.calls % self.accumulate == 0:
            report["grad_norm"] = grad_norm
            self.dead.count(since.fired > 0, since.tokens, since.skip)
            self.seen, self._seen = since, None
            if self.scheduler is not None and not capturing(x):
                self.scheduler.step()
        report["dead"] = self.dead.share()
        if overflow is not None:
            report["overflow"] = overflow
        return report, bad

    def _teach(self, codes: SparseCodes, unless: Tensor | None) -> None:
        """Rules learn from what they kept; where ``unless`` () is set on the device, their buffers stay as they are."""
        rule = self.sae.share.activation
        buffers = list(rule.buffers())
        before = None if unless is None else [b.clone() for b in buffers]
        with torch.enable_grad():  # that is when they learn
            rule.update(codes)
        if unless is not None and before is not None:
            for buffer, kept in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(unless, kept, buffer))

    def _forward(self, x: Tensor, target: Tensor, context: dict[str, Any]) -> tuple[Forward, list[int | None]]:
        """The batch encoded for all losses, and the number of each one's codes."""
        sae, weights = self.sae.share, self._copies.current()
        if self.shards is not None:
            self.memory_budget = self.shards.memory_budget(self.memory_budget)
        elif self.memory_budget is None:
            self.memory_budget = default_budget_bytes(x.device)
        seen, info = sae._normalized(x)
        if "gradient" in context:
            gradient = check.matrix(check.floating("gradient", context.pop("gradient")))
            context["attribution"] = sae._attribution(gradient, seen, info)
        forward = Forward.of(
            sae, weights, seen, target, info, dtype=self.compute_dtype, counters=self.dead,
            buffer=self._pre_activations, backend=self.backend, shards=self.shards,
        )  # fmt: skip
        dead_at_most = self.sae.d_sae if self._warming_up else self.dead.at_most(forward.tokens)
        rules = [sae.activation]
        numbers: list[int | None] = []
        for loss in self.losses:
            rule = loss.rule(sae, dead_at_most)
            if rule is not None and self.shards is not None:
                rule.shards = self.shards
            if rule is not None and all(rule is not known for known in rules):
                rules.append(rule)
            numbers.append(None if rule is None else next(n for n, known in enumerate(rules) if rule is known))
        if self.shards is not None:
            check_rules(rules)
        forward.encode(rules, context, self.memory_budget, () if self._warming_up else self.losses)
        return forward, numbers

    def _density(self, codes: SparseCodes) -> bool | None:
        """Whether sums over codes go through GEMMs; None: their number of entries decides."""
        if self.blocks is not None:
            return False  # a product of other shapes has other bits
        if self.dense is not None or codes.required is None:
            return self.dense
        if self.shards is not None:  # its part of what all ranks keep: the device is not asked
            entries = codes.values.shape[0] // self.shards.everyone.size
            return densified.is_dense(
                "decode_backward_weight", entries, codes.rows, codes.num_latents, codes.device.type
            )
        if self.calls % self.density_interval == 0 and not capturing(codes.values):
            entries = int(codes.required)
            self._dense_now = densified.is_dense(
                "decode_backward_weight", entries, codes.rows, codes.num_latents, codes.device.type
            )
        return self._dense_now

    def _checked(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        sae = self.sae
        if not sae.training:
            raise RuntimeError("sae is in evaluation mode: call sae.train() before a training step")
        for name, p in sae.named_parameters():
            if p.grad is not None:
                raise RuntimeError(f"{name}.grad is not None: a training step owns the gradients; set it to None")
        check.floating("x", x)
        given, x = x, sae._side_by_side(x)
        if x.shape[-1] != sae.d_in:
            raise ValueError(f"x must have d_in = {sae.d_in} in its last dimension, got shape {tuple(x.shape)}")
        check.same_device("x", x, sae.b_dec)
        if x.numel() == 0 and self.shards is None:
            raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
        return check.matrix(x.detach()), checked_target(sae, given, target)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides the autoencoder, to resume bit for bit; save that one too.

        On a mesh tensors are DTensors over the same memory, for :func:`sae_engine.distributed.save_state`.
        """
        if self.calls % self.accumulate:
            left = self.accumulate - self.calls % self.accumulate
            raise RuntimeError(f"gradients are being accumulated: save after {left} more call(s)")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "dead": self.dead.state_dict(),
            "calls": self.calls,
            "dense_now": self._dense_now,
            "memory_budget": self.memory_budget,
        }
        return state if self.shards is None else as_wholes(self.sae, self.optimizer, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From :meth:`state_dict`, of a step over an autoencoder of the same shape with the same arguments.

        Load the autoencoder's own state first. Tensors are written in place: a captured CUDA graph goes on from them.
        """
        missing = {"optimizer", "scheduler", "dead", "calls", "dense_now", "memory_budget"} - state.keys()
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}: it is not the state of a TrainStep")
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ValueError("state was saved with a scheduler and there is none here, or the other way round")
        state = state if self.shards is None else locals_of(state)
        self.dead.load_state_dict(state["dead"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.calls, self._dense_now, self.memory_budget = state["calls"], state["dense_now"], state["memory_budget"]
        self._seen = None
        self._update.forget()
        self.refresh()


def _check_norms(sae: SparseAutoencoder, losses: Sequence[Loss]) -> None:
    """A step follows the norm of a decoder row over all sites, not the sum of norms at each."""
    if not isinstance(sae, Crosscoder) or sae.decoder_norm == "joint":
        return
    by_norms = [type(loss).__name__ for loss in losses if loss.weighs_by_norms]
    rules = sae.activation if isinstance(sae.activation, PerSource) else [sae.activation]
    if sae.rescale_acts_by_decoder_norm:
        by_norms += [type(rule).__name__ for rule in rules if not rule.has_gate]
    if by_norms:
        raise ValueError(
            f"decoder_norm must be 'joint' with {', '.join(by_norms)}, whose gradient reaches the norms, got 'sum': "
            "train it by losses.evaluate(...)['loss'].backward()"
        )


def _checked_moments(moments: torch.dtype | str | None, sae: SparseAutoencoder) -> torch.dtype:
    """The dtype of the weights' moments: that of the parameters, or bfloat16 beside float32."""
    parameters = sae.b_dec.dtype
    given = parameters if moments is None else check.dtype_in("moments", moments)
    if given != parameters and (given, parameters) != (torch.bfloat16, torch.float32):
        raise ValueError(
            f"moments must be {parameters}, as the parameters are, or torch.bfloat16 beside float32 ones, got {given}"
        )
    return given


def _checked_scheduler(scheduler: Any) -> Any:
    """A scheduler whose ``step`` can be called after an update, which knows of no metric."""
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must make a learning-rate scheduler of the optimizer, got {scheduler!r}")
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise TypeError(
            f"scheduler must make one that steps without arguments: {type(scheduler).__name__}.step needs "
            f"{', '.join(needed)}; leave it out, and step one of your own on step.optimizer where the metric is known"
        )
    return scheduler


def _firing(codes: SparseCodes, sources: int, shards: Shards | None) -> Tensor:
    """(sources F,) int32: the tokens on which each latent has a value other than 0; unused capacity holds zeros."""
    codes = codes if sources == 1 else numbered(codes, sources)
    counts = codes.indices.new_zeros(codes.num_latents, dtype=torch.int32)
    counts.scatter_add_(0, codes.indices.long(), (codes.values != 0).int())
    return counts if shards is None else shards.over_groups(counts, "fired")


class Seen(NamedTuple):
    """What the calls that make an update together have seen."""

    fired: Tensor  # (sources F,) the tokens on which each latent fired
    tokens: int
    skip: Tensor | None  # whether the update must not happen

    def after(self, before: Seen | None) -> Seen:
        if before is None:
            return self
        return Seen(before.fired + self.fired, before.tokens + self.tokens, _either(before.skip, self.skip))


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b
