"""Training steps as data: whole steps, optimizer included, of ours, of plain PyTorch and of other libraries.

A contestant's ``build(setup)`` prepares what is not timed and returns the call that is: one step on the next batch,
which returns the mean squared error (summed over d) before its update. All start from the same weights, take the same
batches, run a TopK autoencoder with the reconstruction error as their loss, and step with torch's fused Adam where
their code lets a caller choose. A note says what a step includes beyond that. Yardsticks are parts of a step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property

import stock
import torch
from guarded import Wrong
from inputs import normal, seeded
from registry import Provider
from rows import installed
from sizes import MAIN, PUBLISHED, S1, S2, S3, SMALL, Case
from stock import step_with_unit_rows, topk_dense
from torch import Tensor, nn

import sae_engine as se
from sae_engine.losses import AuxK
from sae_engine.training import CapturedStep, TrainStep

LEARNING_RATE = 1e-4
BATCHES = 2
UNIT_ROWS = "unit-norm rows"  # the gradient's part along a decoder row is removed, rows are rescaled
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")  # distributions, for the versions in a row
SEED = 0
TF32_EPS = 2.0**-10  # TF32 keeps ten bits of a mantissa


@dataclass
class Setup:
    """What all contestants share: sizes, batches, initial weights, the dtype of their products, who is dead."""

    case: Case
    device: torch.device
    dtype: torch.dtype  # float32, or bfloat16 for autocast over fp32 parameters
    x: list[Tensor]  # (B, d) each
    W_dec: Tensor  # (F, d), unit rows; the encoder starts as its transpose
    b_enc: Tensor  # (F,), 0 but for skewed firing
    dead: Tensor  # (F,) bool
    learning_rate: float = LEARNING_RATE

    @cached_property
    def shared(self) -> se.SparseAutoencoder:
        """One for all contestants that do not update it: at the widest sizes a GPU holds no more."""
        return self.autoencoder(contiguous_parameters=True)

    def batches(self) -> Iterator[Tensor]:
        return itertools.cycle(self.x)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def load(self, **places: Tensor) -> None:
        """Copies the initial weights into parameters: W_dec, W_dec_T, W_enc, W_enc_T, b_enc, whichever are given."""
        sources = {"W_dec": self.W_dec, "W_dec_T": self.W_dec.T, "W_enc": self.W_dec.T, "W_enc_T": self.W_dec,
                   "b_enc": self.b_enc}  # fmt: skip
        for name, place in places.items():
            place.data = sources[name].clone(memory_format=torch.contiguous_format)

    def autoencoder(self, **options) -> se.SparseAutoencoder:
        sae = se.SparseAutoencoder(self.case.d, self.case.F, se.TopK(self.case.k), device=self.device, **options)
        with torch.no_grad():
            sae.W_dec.copy_(self.W_dec)
            sae.W_enc.copy_(self.W_dec.T)
            sae.b_enc.copy_(self.b_enc)
        return sae


def make_setup(case: Case, device: torch.device, dtype: torch.dtype = torch.float32, *, seed: int = SEED) -> Setup:
    """Normal inputs and random unit rows, so that pre-activations are nearly normal; biases skew them if asked to."""
    generator = seeded(device, seed)
    W_dec = normal(case.F, case.d, dtype=torch.float32, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    x = [normal(case.B, case.d, dtype=torch.float32, generator=generator) for _ in range(BATCHES)]
    b_enc = torch.zeros(case.F, device=device)
    if case.indices == "zipf":
        b_enc = skewed_biases(case.F, case.k).to(device)[torch.randperm(case.F, device=device, generator=generator)]
    dead = torch.arange(case.F, device=device) % 3 == 0
    return Setup(case, device, dtype, x, W_dec, b_enc, dead)


def skewed_biases(num_latents: int, k: int, most: float = 0.9) -> Tensor:
    """(F,) biases under which normal pre-activations exceed one common level with probability min(c / rank, most).

    c is such that k latents exceed it on average: TopK then fires latents about as often, as a Zipf law says.
    """
    rank = torch.arange(1, num_latents + 1, dtype=torch.float64)
    low, high = 0.0, float(num_latents)
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if (c / rank).clamp(max=most).sum() < k else (low, c)
    level = 4.0  # well above 0: what is kept is positive
    return (level + torch.special.ndtri((low / rank).clamp(max=most))).float()


@dataclass(frozen=True)
class Contestant(Provider):
    """A provider of steps. ``kind``: "yardstick", "ours", "PyTorch" or "peer". ``dead``: a third of latents is.

    One that does not ``update`` its parameters runs forward and backward alone, on parameters that it may share.
    """

    kind: str = "peer"
    dead: bool = False
    updates: bool = True
    on_gpu: bool = False  # alone

    def missing(self, device: torch.device) -> str | None:
        if self.package == "sparsify" and device.type == "cpu" and os.environ.get("SPARSIFY_DISABLE_TRITON") != "1":
            return "on a CPU sparsify needs SPARSIFY_DISABLE_TRITON=1 (make bench-peers sets it)"
        if self.on_gpu and device.type == "cpu":
            return "needs a GPU"
        return super().missing(device)


# --- yardsticks ----------------------------------------------------------------------------------------------------


def encoder_gemm(s: Setup) -> Callable[[], None]:
    weight, bias, batches = s.W_dec.T.to(s.dtype), s.b_enc.to(s.dtype), itertools.cycle([x.to(s.dtype) for x in s.x])

    def run() -> None:
        with torch.no_grad():  # the fastest there is
            se.functional.linear(next(batches), weight, bias)

    return run


def fused_adam(s: Setup) -> Callable[[], None]:
    """Over parameters of an autoencoder's shapes, gradients given."""
    d, F = s.case.d, s.case.F
    shapes = [(d, F), (F, d), (F,), (d,)]
    parameters = [nn.Parameter(torch.randn(shape, device=s.device) * 0.03) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.Adam(parameters, lr=1e-6, fused=True)
    return lambda: optimizer.step() and None


# --- ours ----------------------------------------------------------------------------------------------------------


def train_step(*, contiguous: bool = False, aux: AuxK | None = None) -> Callable[[Setup], Callable[[], Tensor]]:
    def build(s: Setup) -> Callable[[], Tensor]:
        step = TrainStep(
            s.autoencoder(contiguous_parameters=contiguous), lr=s.learning_rate, losses=() if aux is None else aux,
            compute_dtype=None if s.dtype == torch.float32 else s.dtype,
        )  # fmt: skip
        batches = s.batches()

        def run() -> Tensor:
            if aux is not None:  # dead in every step
                step.dead.since_fired.masked_fill_(s.dead, step.dead.dead_after)
                step.dead.tokens = max(step.dead.tokens, step.dead.dead_after)
            return step(next(batches))["squared_error"]

        return run

    return build


def captured_step(s: Setup) -> Callable[[], Tensor]:
    step, batches = CapturedStep(TrainStep(s.autoencoder(), lr=s.learning_rate, compute_dtype=s.dtype)), s.batches()
    return lambda: step(next(batches))["squared_error"]


def plain_path(s: Setup) -> Callable[[], Tensor]:
    """``sae(x)``, ``loss.backward()`` and torch's optimizer, whose parameters lie row-major."""
    sae, batches = s.autoencoder(contiguous_parameters=True), s.batches()
    optimizer = torch.optim.Adam(sae.parameters(), lr=s.learning_rate, fused=True)

    def run() -> Tensor:
        x = next(batches)
        with s.autocast():
            loss = se.losses.squared_error(sae(x), x)
        loss.backward()
        step_with_unit_rows(optimizer, sae.W_dec)
        return loss.detach()

    return run


def forward_backward(error: Callable[[se.SparseAutoencoder, Tensor], Tensor]) -> Callable[[Setup], Callable]:
    """Forward and backward without an optimizer, gradients made afresh each time. In fp32, products may use TF32."""

    def build(s: Setup) -> Callable[[], Tensor]:
        sae, batches = s.shared, s.batches()

        def run() -> Tensor:
            x, before = next(batches), torch.get_float32_matmul_precision()
            sae.zero_grad(set_to_none=True)
            torch.set_float32_matmul_precision("high")
            try:
                with s.autocast():
                    loss = error(sae, x)
                loss.backward()
            finally:
                torch.set_float32_matmul_precision(before)
            return loss.detach()

        return run

    return build


def our_error(sae: se.SparseAutoencoder, x: Tensor) -> Tensor:
    return se.losses.squared_error(sae(x), x)


def stock_error(sae: se.SparseAutoencoder, x: Tensor) -> Tensor:
    return dense_error(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.activation.k)


# --- plain PyTorch -------------------------------------------------------------------------------------------------


def dense_error(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    kept = topk_dense(torch.addmm(b_enc, x - b_dec, W_enc), k)
    return (torch.addmm(b_dec, kept, W_dec) - x).square().sum(1).mean()


class DenseAutoencoder(nn.Module):
    """Parameters of :func:`dense_error`, contiguous."""

    def __init__(self, s: Setup) -> None:
        super().__init__()
        self.W_enc, self.W_dec, self.b_enc = (nn.Parameter(torch.empty(0, device=s.device)) for _ in range(3))
        self.b_dec = nn.Parameter(torch.zeros(s.case.d, device=s.device))
        s.load(W_enc=self.W_enc, W_dec=self.W_dec, b_enc=self.b_enc)


def dense(*, compiled: bool = False) -> Callable[[Setup], Callable[[], Tensor]]:
    def build(s: Setup) -> Callable[[], Tensor]:
        sae, batches = DenseAutoencoder(s), s.batches()
        optimizer = torch.optim.Adam(sae.parameters(), lr=s.learning_rate, fused=True)
        error = stock.compiled(dense_error) if compiled else dense_error

        def run() -> Tensor:
            with s.autocast():
                loss = error(next(batches), sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, s.case.k)
            loss.backward()
            step_with_unit_rows(optimizer, sae.W_dec)
            return loss.detach()

        return run

    return build


# --- other libraries -----------------------------------------------------------------------------------------------


def sparsify(*, auxk: bool = False) -> Callable[[Setup], Callable[[], Tensor]]:
    """The order of sparsify.Trainer: unit rows, forward, backward, parallel part, optimizer, counters.

    Its Trainer cannot be given a fused Adam or activations (it runs a language model); its SparseCoder is public and
    takes any optimizer.
    """

    def build(s: Setup) -> Callable[[], Tensor]:
        with redirect_stdout(None):  # it prints which decoder it takes
            from sparsify import SparseCoder, SparseCoderConfig
        sae = SparseCoder(s.case.d, SparseCoderConfig(num_latents=s.case.F, k=s.case.k), device=s.device)
        s.load(W_enc_T=sae.encoder.weight, W_dec=sae.W_dec, b_enc=sae.encoder.bias)
        optimizer = torch.optim.Adam(sae.parameters(), lr=s.learning_rate, fused=True)
        since_fired = torch.zeros(s.case.F, dtype=torch.long, device=s.device)
        did_fire = torch.zeros(s.case.F, dtype=torch.bool, device=s.device)
        batches = s.batches()

        def run() -> Tensor:
            x = next(batches)
            sae.set_decoder_norm_to_unit_norm()
            with s.autocast():
                out = sae(x=x, y=x, dead_mask=s.dead if auxk else None)
            did_fire[out.latent_indices.flatten()] = True
            (out.fvu + out.auxk_loss / 32 if auxk else out.fvu).backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                since_fired.add_(len(x))
                since_fired[did_fire] = 0
                did_fire.zero_()
                return (out.sae_out - x).square().sum(1).mean()

        return run

    return build


def dictionary_learning(*, auxk: bool = False) -> Callable[[Setup], Callable[[], Tensor]]:
    """``TopKTrainer.update`` itself; its optimizer is replaced by a fused one."""

    def build(s: Setup) -> Callable[[], Tensor]:
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = TopKTrainer(
            steps=1_000_000, activation_dim=s.case.d, dict_size=s.case.F, k=s.case.k, layer=0, lm_name="none",
            lr=s.learning_rate, warmup_steps=0, device=str(s.device), seed=SEED,
        )  # fmt: skip
        s.load(W_enc_T=trainer.ae.encoder.weight, W_dec_T=trainer.ae.decoder.weight, b_enc=trainer.ae.encoder.bias)
        trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=s.learning_rate, fused=True)
        trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
        batches = s.batches()

        def run() -> Tensor:
            if auxk:
                trainer.num_tokens_since_fired.masked_fill_(s.dead, trainer.dead_feature_threshold)
            with s.autocast():  # as its training loop does; 1: step 0 moves b_dec to the geometric median
                return torch.tensor(trainer.update(1, next(batches)))

        return run

    return build


def sae_lens(*, sparse: bool = False, auxk: bool = False, rescale: bool = False) -> Callable:
    """``SAETrainer.step`` itself; its optimizer is replaced by a fused one."""

    def build(s: Setup) -> Callable[[], Tensor]:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae = TopKTrainingSAE(TopKTrainingSAEConfig(
            d_in=s.case.d, d_sae=s.case.F, k=s.case.k, device=str(s.device), use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=rescale,
        ))  # fmt: skip
        s.load(W_enc=sae.W_enc, W_dec=sae.W_dec, b_enc=sae.b_enc)
        batches = s.batches()
        trainer: SAETrainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=1_000_000 * s.case.B, train_batch_size_samples=s.case.B, lr=s.learning_rate,
                lr_end=s.learning_rate, device=str(s.device), autocast=s.dtype == torch.bfloat16,
            ),
            sae, batches,
        )  # fmt: skip
        trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=s.learning_rate, fused=True)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)

        def run() -> Tensor:
            if auxk:
                trainer.n_forward_passes_since_fired.masked_fill_(s.dead, trainer.cfg.dead_feature_window + 1)
            return trainer.step(next(batches)).losses["mse_loss"].detach()

        return run

    return build


# --- the table -----------------------------------------------------------------------------------------------------

CLIPPED = "gradient norm clipped"
SAELENS = f"{CLIPPED}, firing counts; no unit-norm rows"
CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("encoder GEMM", encoder_gemm, kind="yardstick", note="part of a step"),
    Contestant("fused Adam", fused_adam, kind="yardstick", note="part of a step; gradients given"),
    Contestant("ours", train_step(), kind="ours", note=f"TrainStep; {UNIT_ROWS}, dead counting, FVU, L0"),
    Contestant("ours, captured", captured_step, kind="ours", on_gpu=True,
               note="CapturedStep: a CUDA graph, whose memory is not counted"),
    Contestant("ours, contiguous", train_step(contiguous=True), kind="ours", note="TrainStep, W_enc row-major"),
    Contestant("ours, plain path", plain_path, kind="ours", note=f"sae(x), backward, torch's Adam; {UNIT_ROWS}"),
    Contestant("dense PyTorch", dense(), kind="PyTorch", baseline=True, note=UNIT_ROWS),
    Contestant("dense, torch.compile", dense(compiled=True), kind="PyTorch", compiled=True,
               note=f"loss and gradients compiled; {UNIT_ROWS}"),
    Contestant("sparsify", sparsify(), package="sparsify", note=f"{UNIT_ROWS}, dead counting"),
    Contestant("dictionary_learning", dictionary_learning(), package="dictionary_learning",
               note=f"{UNIT_ROWS}, dead counting, {CLIPPED}: no way around it"),
    Contestant("SAELens", sae_lens(), package="sae_lens", note=f"{SAELENS}; rescale_acts_by_decoder_norm off"),
    Contestant("SAELens, sparse", sae_lens(sparse=True), package="sae_lens", note=f"{SAELENS}; sparse activations"),
    Contestant("ours + AuxK", train_step(aux=AuxK()), kind="ours", dead=True, note=f"TrainStep; {UNIT_ROWS}"),
    Contestant("sparsify + AuxK", sparsify(auxk=True), package="sparsify", dead=True,
               note=f"{UNIT_ROWS}; its AuxK does not reach the encoder"),
    Contestant("dictionary_learning + AuxK", dictionary_learning(auxk=True), package="dictionary_learning", dead=True,
               note=f"{UNIT_ROWS}, {CLIPPED}"),
    Contestant("SAELens + AuxK", sae_lens(auxk=True), package="sae_lens", dead=True, note=SAELENS),
)  # fmt: skip

FORWARD_BACKWARD: tuple[Contestant, ...] = (
    Contestant("ours, forward + backward", forward_backward(our_error), kind="ours", updates=False,
               note="sae(x), loss.backward(); no optimizer; TF32 allowed"),
    Contestant("dense PyTorch, forward + backward", forward_backward(stock_error), kind="PyTorch", updates=False,
               baseline=True, note="no optimizer; TF32 allowed"),
)  # fmt: skip

TINY = Case("tiny", B=64, d=32, F=512, k=8, group="tiny")
LONG = Case("B=32768", B=32768, d=768, F=32768, k=32, group="B=32768")


def cases(device: torch.device, extent: str) -> list[tuple[Case, torch.dtype]]:
    """``extent``: "quick" (a smoke run), "default" or "full"."""
    if device.type != "cuda":
        return {"quick": [(TINY, torch.float32)], "default": [(MAIN, torch.float32)],
                "full": [(MAIN, torch.float32), (SMALL, torch.float32)]}[extent]  # fmt: skip
    sizes = {"quick": [S1], "default": [S1, S2, S3, LONG], "full": [S1, S2, S3, LONG]}[extent]
    return [(case, torch.bfloat16) for case in sizes]


def contestants(case: Case) -> tuple[Contestant, ...]:
    """Whole steps; forward and backward alone at the sizes of published times, which were taken so."""
    return FORWARD_BACKWARD if case.group == "published" else CONTESTANTS


def published_cases(device: torch.device) -> list[tuple[Case, torch.dtype]]:
    """The sizes of :mod:`published`, which only a GPU can be asked for."""
    if device.type != "cuda":
        return []
    return [(case, dtype) for dtype in (torch.bfloat16, torch.float32) for case in PUBLISHED]


def check(contestant: Contestant, call: Callable[[], Tensor | None], s: Setup, expected: float) -> None:
    """The first error must be the right one, and the same batch's must be lower after two updates.

    Entries that trade places at the cut are nearly equal, so errors differ by roundings: a few of each sum of B * d.
    """
    if contestant.kind == "yardstick":
        call()
        return
    errors = [float(call()) for _ in range(BATCHES + 1)]  # type: ignore[arg-type]
    roundings = 64 * torch.finfo(torch.float32).eps if s.dtype == torch.float32 else 2 * torch.finfo(s.dtype).eps
    if not contestant.updates and s.device.type == "cuda" and s.dtype == torch.float32:
        roundings = 2 * TF32_EPS
    if contestant.name.startswith("dictionary_learning") and contestant.dead:
        roundings = 1 / 32  # it returns the whole loss: AuxK's share is at most its weight times about 1
        expected += 1 / 32
    if not abs(errors[0] - expected) <= roundings * expected:
        raise Wrong(f"{contestant.name}: the first error is {errors[0]:.6g}, not {expected:.6g}")
    if contestant.updates and not errors[BATCHES] < errors[0]:
        raise Wrong(f"{contestant.name}: the error does not fall: {errors}")


@torch.no_grad()
def true_error(s: Setup) -> float:
    """Of the first batch before any update, in fp64, a few rows at a time."""
    W_dec, b_enc = s.W_dec.double(), s.b_enc.double()
    total = 0.0
    for x in s.x[0].double().split(256):
        values, columns = (x @ W_dec.T + b_enc).topk(s.case.k)
        kept = torch.zeros(len(x), s.case.F, dtype=x.dtype, device=x.device).scatter_(1, columns, values.relu())
        total += float((kept @ W_dec - x).square().sum())
    return total / len(s.x[0])


def peer_versions() -> dict[str, str]:
    """Of the installed ones."""
    return {name: version for name in PEERS if (version := installed(name)) is not None}
