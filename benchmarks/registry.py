"""The operations as data: sizes, inputs, who provides them, how a result is checked, what it cannot avoid moving.

A provider's ``build(inputs)`` prepares what is not timed and returns the call that is. Exactly one provider of each
operation is the baseline: the stock PyTorch that gives the same kind of result, at its best setting. Others are what
people also write (dense results, compiled code, other libraries); their notes say where their result differs in kind.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sae_engine as se
from sae_engine import SparseCodes, _passes, functional
from sae_kernels import reference, traffic
from sae_kernels.ops import ops
from sae_kernels.traffic import Traffic

Inputs = SimpleNamespace
Output = Any
CHECK_ROWS = 32  # tokens of the input on which results are compared before anything is timed


@dataclass(frozen=True)
class Case:
    """One size: B tokens, width d, F latents, k entries a token, and how popular the latents are."""

    name: str
    B: int
    d: int
    F: int
    k: int
    indices: str = "uniform"  # or "zipf": popularity falls as 1 / rank, as SAE latents' does
    group: str = "main"  # which figure a case belongs to

    def shape(self, sizes: str) -> dict[str, int | str]:
        """The sizes that an operation depends on, by letter; "i" stands for the distribution of the indices."""
        chosen: dict[str, int | str] = {letter: getattr(self, letter) for letter in sizes if letter != "i"}
        return {**chosen, "indices": self.indices} if "i" in sizes else chosen


@dataclass(frozen=True)
class Provider:
    """One implementation. ``note`` says where its result or its input differs in kind from the baseline's."""

    name: str
    build: Callable[[Inputs], Callable[[], Output]]
    baseline: bool = False
    compiled: bool = False
    gpu_only: bool = False
    package: str | None = None
    note: str = ""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.gpu_only and device.type != "cuda":
            return "needs a GPU"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.compiled and device.type != "cuda":
            compilers = filter(None, [os.environ.get("CXX"), "g++", "clang++"])
            if not any(map(shutil.which, compilers)):
                return "torch.compile finds no C++ compiler"
        return None


@dataclass(frozen=True)
class Op:
    """One operation in one mode. ``tests`` are the files that must be green before it is timed."""

    name: str
    mode: str
    title: str
    sizes: str
    tests: tuple[str, ...]
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    providers: tuple[Provider, ...]
    traffic: Callable[[Inputs], Traffic]
    check: Callable[[Inputs, Provider, Output], None]

    @property
    def id(self) -> str:
        return self.name if self.mode == "forward" else f"{self.name}-{self.mode}"

    @property
    def baseline(self) -> Provider:
        return next(provider for provider in self.providers if provider.baseline)


# --- sizes ---------------------------------------------------------------------------------------------------------

SMALL = Case("small", B=512, d=256, F=4096, k=32, group="small")
MAIN = Case("main", B=2048, d=768, F=16384, k=32)
S1 = Case("S1", B=4096, d=768, F=32768, k=32, group="S1")
S2 = Case("S2", B=4096, d=768, F=131072, k=32, group="S2")
S3 = Case("S3", B=4096, d=4096, F=131072, k=64, group="S3")
SWEEP = (
    *(replace(S1, name=f"F={F}", F=F, group="sweep-F") for F in (8192, 16384, 32768, 65536, 131072, 262144)),
    *(replace(S1, name=f"k={k}", k=k, group="sweep-k") for k in (8, 16, 32, 64, 128, 256, 512)),
)
FP32, BF16 = torch.float32, torch.bfloat16
BF16_ON_CPU = {"topk", "batch_topk", "decode"}  # the others would time conversions


def cases(op: Op, device: torch.device, extent: str = "default") -> list[tuple[Case, torch.dtype]]:
    """What to time: ``extent`` is "quick" (a smoke run), "default" or "full"."""
    if extent not in ("quick", "default", "full"):
        raise ValueError(f"extent must be quick, default or full, got {extent!r}")
    if device.type != "cuda":
        chosen = [(SMALL, FP32)] if extent == "quick" else [(MAIN, FP32), (SMALL, FP32)]
        if op.name in BF16_ON_CPU and op.mode == "forward" and extent != "quick":
            chosen.append((MAIN, BF16))
        main, dtype = (SMALL if extent == "quick" else MAIN), FP32
    else:
        chosen = [(S1, BF16)] if extent == "quick" else [(S1, BF16), (S2, BF16), (S3, BF16), (S1, FP32)]
        if extent != "quick":
            chosen += [(case, BF16) for case in SWEEP]
        main, dtype = S1, BF16
    if "i" in op.sizes:
        chosen.append((replace(main, name=f"{main.name}, skewed", indices="zipf", group=f"{main.group}-zipf"), dtype))
    if op.name == "norm_match":  # where top-AFA is published: a row keeps an eighth of its latents
        wide = replace(main, name=f"{main.name}, wide rows", k=main.F // 8, group=f"{main.group}-wide")
        chosen.append((wide, dtype))
    return chosen


# --- inputs --------------------------------------------------------------------------------------------------------


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _normal(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, device=generator.device, generator=generator, dtype=torch.float32).to(dtype)


def _pre(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = _generator(device, seed)
    return Inputs(pre=_normal(case.B, case.F, dtype=dtype, generator=generator), k=case.k, case=case)


def _feature_topm_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Budgets that fall as 1 / rank and sum up to k entries a token: feature choice's, its latents in random order."""
    inputs = _pre(case, dtype, device, seed)
    inputs.total = _total(inputs)
    popularity = torch.rand(case.F, device=device, generator=_generator(device, seed + 1))
    inputs.m = functional.feature_budgets(popularity, inputs.total, case.B)
    inputs.most = int(inputs.m.max())
    return inputs


def _norm_match_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Targets near the norm of each row's k strongest entries, so that about k entries a row are kept."""
    inputs = _pre(case, dtype, device, seed)
    generator = _generator(device, seed + 1)
    inputs.weight_norm = 1 + 0.1 * torch.rand(case.F, device=device, generator=generator)
    jitter = 1 + 0.01 * torch.rand(case.B, device=device, generator=generator)
    score = inputs.pre.relu().float() * inputs.weight_norm
    inputs.target = score.topk(case.k, sorted=False).values.norm(dim=1) * jitter
    inputs.capacity = 2 * case.B * case.k
    return inputs


def _threshold_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """A threshold per latent, near the level that k of F normal numbers exceed."""
    inputs = _pre(case, dtype, device, seed)
    level = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * case.k / case.F, dtype=torch.float64)))
    jitter = 0.05 * torch.rand(case.F, device=device, generator=_generator(device, seed + 1))
    inputs.theta = level + jitter
    inputs.capacity = 2 * case.B * case.k
    return inputs


def _codes_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Codes of k distinct latents a row, drawn by popularity; decoder; gradient of the output."""
    generator = _generator(device, seed)
    log_p = torch.zeros(case.F, device=device)
    if case.indices == "zipf":
        ranks = torch.arange(1, case.F + 1, device=device)
        log_p = -ranks.log()[torch.randperm(case.F, device=device, generator=generator)]
    chunk = max((1 << 27) // case.F, 1)
    indices = []
    for start in range(0, case.B, chunk):  # the k largest of log p + Gumbel noise: k draws without replacement
        noise = torch.rand(min(chunk, case.B - start), case.F, device=device, generator=generator)
        noise = noise.clamp_(1e-10, 1 - 1e-6).log_().neg_().log_().neg_()
        indices.append(noise.add_(log_p).topk(case.k, sorted=False).indices.sort(1).values)
    columns = torch.cat(indices)
    values = _normal(case.B, case.k, dtype=dtype, generator=generator).abs_() + 0.1
    codes = SparseCodes.from_topk(values, columns, case.F)
    weight = _normal(case.F, case.d, dtype=FP32, generator=generator)
    weight = (weight / weight.norm(dim=1, keepdim=True)).to(dtype)
    return Inputs(
        codes=codes, values=values, columns=columns, weight=weight, case=case,
        bias=_normal(case.d, dtype=dtype, generator=generator),
        grad=_normal(case.B, case.d, dtype=dtype, generator=generator),
        distinct=int(codes.indices.unique().numel()),
    )


def _autoencoder_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sae = se.SparseAutoencoder(case.d, case.F, se.TopK(case.k), dtype=dtype, device=device)
    x = _normal(case.B, case.d, dtype=dtype, generator=_generator(device, seed))
    return Inputs(sae=sae.requires_grad_(False), x=x, k=case.k, case=case)


def _encode_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Weights contiguous along a latent, as an autoencoder stores them."""
    generator = _generator(device, seed)
    weight = _normal(case.F, case.d, dtype=FP32, generator=generator)
    return Inputs(
        x=_normal(case.B, case.d, dtype=dtype, generator=generator), k=case.k, case=case,
        weight=(weight / weight.norm(dim=1, keepdim=True)).to(dtype).T,
        bias=_normal(case.F, dtype=dtype, generator=generator) / 8,
    )


# --- what stock PyTorch users write --------------------------------------------------------------------------------


def _topk_relu(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = pre.topk(k, sorted=False)
    return values.relu(), indices


def _topk_dense(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu())


def _encode_stock(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _topk_relu(torch.addmm(bias, x, weight), k)


def _encode_ours(i: Inputs, fused: bool | None) -> Callable[[], Output]:
    def run() -> tuple[SparseCodes, Tensor]:
        with _passes.encoder_choice(fused):
            return functional.encode(i.x, i.weight, i.bias, select=se.TopK(i.k), return_pre=True)

    return run


def _batch_topk(pre: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return pre.relu().flatten().topk(total, sorted=False)


def _batch_topk_dense(pre: Tensor, total: int) -> Tensor:
    flat = pre.relu().flatten()
    values, positions = flat.topk(total, sorted=False)
    return torch.zeros_like(flat).scatter_(0, positions, values).view_as(pre)


def _feature_topm(pre: Tensor, m: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns' top-k for the largest budget, of which each keeps its own."""
    values, rows = pre.relu().topk(most, dim=0)
    kept = torch.arange(most, device=pre.device)[:, None] < m
    return values[kept], rows[kept], kept.nonzero()[:, 1]


def _norm_match_dense(pre: Tensor, target: Tensor, weight_norm: Tensor) -> Tensor:
    """Sort, running sum, nearest prefix in norm space, scatter (methods of Lee et al. 2025)."""
    kept = pre.relu()
    energy, order = (kept.float() * weight_norm).square_().sort(dim=1, descending=True)
    count = (energy.cumsum_(1).sqrt_() - target[:, None]).abs_().argmin(1, keepdim=True) + 1
    prefix = torch.arange(pre.shape[1], device=pre.device) < count
    return torch.zeros_like(pre).scatter_(1, order, torch.where(prefix, kept.gather(1, order), 0.0))


def _above_compressed(pre: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = (pre > theta).nonzero(as_tuple=True)
    return pre[rows, columns], rows, columns


def _above_dense(pre: Tensor, theta: Tensor) -> Tensor:
    return torch.where(pre > theta, pre, 0.0)


def _bags(values: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(columns, weight, mode="sum", per_sample_weights=values)


def _gathered(values: Tensor, columns: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (values[..., None] * weight[columns]).sum(1) + bias


def _dense_autoencoder(x: Tensor, sae: se.SparseAutoencoder, k: int) -> Tensor:
    return torch.addmm(sae.b_dec, _topk_dense(torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc), k), sae.W_dec)


def _bag_autoencoder(x: Tensor, sae: se.SparseAutoencoder, k: int) -> Tensor:
    values, columns = _topk_relu(torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc), k)
    return _bags(values, columns, sae.W_dec) + sae.b_dec


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _saelens_topk(i: Inputs) -> Callable[[], Output]:
    from sae_lens.saes.topk_sae import TopK

    module = TopK(i.k)
    return lambda: module(i.pre)


def _bag_gradient(wanted: str) -> Callable[[Inputs], Callable[[], Output]]:
    """The gradient as autograd computes it from ``embedding_bag``: the graph is made once, its backward is timed."""

    def build(i: Inputs) -> Callable[[], Output]:
        leaf = getattr(i, wanted).detach().clone().requires_grad_()
        with torch.enable_grad():
            out = _bags(**{"values": i.values, "columns": i.columns, "weight": i.weight, wanted: leaf})
        return lambda: torch.autograd.grad(out, leaf, i.grad, retain_graph=True)[0]

    return build


def _dense_codes(i: Inputs) -> Tensor:
    return reference.to_dense(i.codes.values, i.codes.indices, i.codes.offsets, i.case.F)


def _dense_decode(i: Inputs) -> Callable[[], Output]:
    dense = _dense_codes(i)
    return lambda: torch.addmm(i.bias, dense, i.weight)


def _dense_weight_gradient(i: Inputs) -> Callable[[], Output]:
    dense = _dense_codes(i)
    return lambda: dense.T @ i.grad


def _our_value_gradient(i: Inputs) -> Callable[[], Output]:
    c, backend = i.codes, _backend(i.grad)
    return lambda: ops.decode_backward_values(i.grad, c.values, c.indices, c.offsets, i.weight, backend)


def _our_weight_gradient(i: Inputs) -> Callable[[], Output]:
    """Turning the codes is part of it: ``embedding_bag``'s backward sorts too."""
    c, backend = i.codes, _backend(i.grad)

    def run() -> Tensor:
        turned = ops.by_latent(c.indices, c.offsets, c.num_latents, backend)
        return ops.decode_backward_weight(i.grad, c.values, *turned, i.weight.dtype, backend)

    return run


def _backend(tensor: Tensor) -> str:
    return os.environ.get("SAE_BACKEND") or ("triton" if tensor.is_cuda else "torch")


# --- checks --------------------------------------------------------------------------------------------------------


def _require(holds: bool, op: str, provider: Provider, what: str) -> None:
    if not holds:
        raise AssertionError(f"{op}: {provider.name} differs from the reference: {what}")


def _as_dense(output: Output, like: Tensor) -> Tensor:
    """Any of the forms in which providers return a selection, as a matrix."""
    dense = torch.zeros_like(like)
    match output:
        case SparseCodes():
            return output.check().to_dense()
        case Tensor():
            return output
        case (values, rows, columns):
            dense[rows, columns] = values
        case (values, indices) if values.dim() == 2:
            dense.scatter_(1, indices.long(), values)
        case (values, positions):
            dense.view(-1)[positions] = values
    return dense


def _check_selection(name: str, expected: Callable[[Inputs], Tensor], *, batch: bool) -> Callable:
    """Ours must keep the very same entries; others the same values, since stock operators break ties as they like."""

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        want, got = expected(i), _as_dense(output, i.pre)
        if provider.name.startswith("ours"):
            _require(torch.equal(want, got), name, provider, "other entries")
            return
        want, got = (t.flatten() if batch else t for t in (want, got))
        same = torch.equal(want.sort(-1).values, got.sort(-1).values)
        _require(same, name, provider, "other values")

    return check


def _check_norm_match(i: Inputs, provider: Provider, output: Output) -> None:
    """Kept values are unscaled, and no prefix is nearer by more than rounding: 1e-6 ours, 1e-4 a running fp32 sum."""
    kept = _as_dense(output, i.pre)
    values, indices, offsets, _ = reference.norm_match(i.pre, i.target, i.weight_norm, None)
    best = reference.to_dense(values, indices, offsets, i.case.F)
    _require(bool(((kept == 0) | (kept == i.pre)).all()), "norm_match", provider, "values that are not the input's")
    distance, least = (
        ((t.double() * i.weight_norm).norm(dim=1) - i.target.double()).abs() for t in (kept, best)
    )
    rounding = (1e-6 if provider.name.startswith("ours") else 1e-4) * i.target.double()
    _require(bool((distance <= least + rounding).all()), "norm_match", provider, "a prefix that is not the nearest")


def _check_sum(name: str, expected: Callable[[Inputs, torch.dtype], Tensor]) -> Callable:
    """Within twice the reference's own error in the tested dtype plus a rounding (CONTRIBUTING, Tolerances).

    Stock operators may round every partial sum to the tested dtype: they get one rounding per entry.
    """

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        dtype = output.dtype
        truth, honest = expected(i, torch.float64), expected(i, dtype)
        error, yardstick = ((t.double() - truth).abs().max().item() for t in (output, honest))
        roundings = 1 if provider.name.startswith("ours") else max(i.case.k, 8)
        allowed = 2 * (yardstick + roundings * torch.finfo(dtype).eps * truth.abs().max().item())
        _require(output.shape == truth.shape, name, provider, f"shape {tuple(output.shape)}")
        _require(error <= allowed, name, provider, f"error {error:.3g}, allowed {allowed:.3g}")

    return check


def _expected_topk(i: Inputs) -> Tensor:
    values, indices = reference.topk(i.pre, None, None, i.k, False, True)
    return torch.zeros_like(i.pre).scatter_(1, indices.view(-1, i.k).long(), values.view(-1, i.k))


def _expected_batch_topk(i: Inputs) -> Tensor:
    values, indices, offsets = reference.batch_topk(i.pre, None, _total(i))
    return reference.to_dense(values, indices, offsets, i.case.F)


def _expected_feature_topm(i: Inputs) -> Tensor:
    return reference.to_dense(*reference.feature_topm(i.pre, i.m, i.total), i.case.F)


def _expected_decode(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    values, weight, bias = (t.to(dtype) for t in (c.values, i.weight, i.bias))
    return reference.decode(values, c.indices, c.offsets, weight, bias, dtype)


def _expected_value_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    values, weight, grad = (t.to(dtype) for t in (c.values, i.weight, i.grad))
    return reference.decode_backward_values(grad, values, c.indices, c.offsets, weight)


def _expected_weight_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    c = i.codes
    turned = reference.by_latent(c.indices, c.offsets, c.num_latents)
    return reference.decode_backward_weight(i.grad.to(dtype), c.values.to(dtype), *turned, dtype)


def _check_autoencoder(i: Inputs, provider: Provider, output: Output) -> None:
    """Row by row in norm. GEMMs round differently, so entries within a rounding of the cut may be swapped; decoder rows
    have unit norm, so each swap moves the result by at most twice the cut."""
    sae, dtype = i.sae, output.dtype
    x, weight = i.x.double(), sae.W_dec.double()
    pre = x @ sae.W_enc.double()  # biases are zero
    values, columns = pre.topk(i.k)
    truth = torch.einsum("bk,bkd->bd", values.relu(), weight[columns])
    cut = values[:, -1:]
    eps = torch.finfo(dtype).eps
    rounding = 2 * eps * cut + 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps * x.norm(dim=1, keepdim=True)
    swaps = ((pre - cut).abs() <= rounding).sum(1) - 1
    allowed = 2 * swaps * cut[:, 0] + 2 * i.k * eps * truth.norm(dim=1)
    error = (output.double() - truth).norm(dim=1)
    worst = (error - allowed).argmax()
    what = f"error {error[worst]:.3g} of a row, allowed {allowed[worst]:.3g}"
    _require(bool((error <= allowed).all()), "autoencoder", provider, what)


def _check_encode(i: Inputs, provider: Provider, output: Output) -> None:
    """The product by error; of ours also the selection from it, entry by entry; of others the kept values by error."""
    truth = i.x.double() @ i.weight.double() + i.bias.double()
    honest = reference.linear(i.x, i.weight, i.bias)
    if isinstance(output, Tensor):
        got = output
    elif provider.name.startswith("ours"):
        codes, got = output
        values, indices = reference.topk(got, None, None, i.k, False, True)
        same = torch.equal(codes.indices, indices) and torch.equal(codes.values, values)
        _require(same, "encode", provider, "other entries than those of its pre-activations")
    else:  # the k-th largest of two vectors differ by no more than the vectors do
        truth, honest = (t.topk(i.k).values.relu() for t in (truth, honest))
        got = output[0].sort(dim=1, descending=True).values
    error, yardstick = ((t.double() - truth).abs().max().item() for t in (got, honest))
    roundings = 1 if provider.name.startswith("ours") else 2  # stock products may round before the bias
    allowed = 2 * (yardstick + roundings * torch.finfo(got.dtype).eps * truth.abs().max().item())
    _require(got.shape == truth.shape, "encode", provider, f"shape {tuple(got.shape)}")
    _require(error <= allowed, "encode", provider, f"error {error:.3g}, allowed {allowed:.3g}")


def _check_flat(check: Callable) -> Callable:
    """Gradients of values come as (B, k) from stock operators and as (N,) from ours."""
    return lambda i, provider, output: check(i, provider, output.flatten())


def _check_dense(i: Inputs, provider: Provider, output: Output) -> None:
    _require(torch.equal(output, _dense_codes(i)), "to_dense", provider, "another matrix")


# --- traffic -------------------------------------------------------------------------------------------------------


def _total(i: Inputs) -> int:
    return int(i.k * i.case.B)


def _kept(i: Inputs, select: Callable[[], SparseCodes]) -> int:
    if not hasattr(i, "kept"):
        i.kept = int(select().offsets[-1])
    return i.kept


def _codes_traffic(function: Callable[..., Traffic], **options: str) -> Callable[[Inputs], Traffic]:
    """Values, weight and output or gradient have one itemsize; an option is read from the inputs' attribute."""

    def of(i: Inputs) -> Traffic:
        itemsizes = [i.weight.element_size()] * 3
        named = {name: getattr(i, attribute) for name, attribute in options.items()}
        return function(i.case.B, i.case.F, i.case.d, i.codes.values.numel(), *itemsizes, **named)

    return of


# --- the table -----------------------------------------------------------------------------------------------------

DENSE = "dense result"

OPS: tuple[Op, ...] = (
    Op(
        "topk", "forward", "row top-k", "BFk", ("test_row_topk.py",), _pre,
        (
            Provider("ours", lambda i: lambda: functional.topk(i.pre, i.k)),
            Provider("torch.topk", lambda i: lambda: _topk_relu(i.pre, i.k), baseline=True),
            Provider("torch.topk + scatter", lambda i: lambda: _topk_dense(i.pre, i.k), note=DENSE),
            Provider("torch.compile", lambda i: _bound(_compiled(_topk_relu), i.pre, i.k), compiled=True),
            Provider("SAELens TopK", _saelens_topk, package="sae_lens", note=DENSE),
        ),
        lambda i: traffic.topk(i.case.B, i.case.F, i.k, i.pre.element_size()),
        _check_selection("topk", _expected_topk, batch=False),
    ),
    Op(
        "encode", "forward", "encoder and row top-k", "BdFk", ("test_encode.py", "test_encode_maxima.py"),
        _encode_inputs,
        (
            Provider("ours", lambda i: _encode_ours(i, None)),
            Provider(
                "ours, fused", lambda i: _encode_ours(i, True), gpu_only=True, note="group maxima from the product"
            ),
            Provider(
                "ours, stock product", lambda i: _encode_ours(i, False), note="group maxima by a pass of their own"
            ),
            Provider(
                "addmm + torch.topk", lambda i: lambda: _encode_stock(i.x, i.weight, i.bias, i.k), baseline=True
            ),
            Provider(
                "torch.compile", lambda i: _bound(_compiled(_encode_stock), i.x, i.weight, i.bias, i.k), compiled=True
            ),
            Provider(
                "addmm", lambda i: lambda: torch.addmm(i.bias, i.x, i.weight), note="the product alone, no selection"
            ),
        ),
        lambda i: traffic.encode_topk(i.case.B, i.case.d, i.case.F, i.k, i.x.element_size()),
        _check_encode,
    ),
    Op(
        "batch_topk", "forward", "batch top-k (mutual choice)", "BFk", ("test_batch_topk.py",), _pre,
        (
            Provider("ours", lambda i: lambda: functional.batch_topk(i.pre, i.k)),
            Provider("flat torch.topk", lambda i: lambda: _batch_topk(i.pre, _total(i)), baseline=True),
            Provider("flat torch.topk + scatter", lambda i: lambda: _batch_topk_dense(i.pre, _total(i)), note=DENSE),
            Provider("torch.compile", lambda i: _bound(_compiled(_batch_topk), i.pre, _total(i)), compiled=True),
        ),
        lambda i: traffic.batch_topk(i.case.B, i.case.F, _total(i), i.pre.element_size()),
        _check_selection("batch_topk", _expected_batch_topk, batch=True),
    ),
    Op(
        "feature_topm", "forward", "feature choice", "BFk", ("test_feature_topm.py",), _feature_topm_inputs,
        (
            Provider("ours", lambda i: lambda: functional.feature_topm(i.pre, i.m, total=i.total)),
            Provider(
                "column torch.topk", lambda i: lambda: _feature_topm(i.pre, i.m, i.most), baseline=True,
                note="not sorted by token",
            ),
        ),
        lambda i: traffic.feature_topm(i.case.B, i.case.F, i.total, i.pre.element_size()),
        _check_selection("feature_topm", _expected_feature_topm, batch=True),
    ),
    Op(
        "norm_match", "forward", "norm match (top-AFA)", "BFk", ("test_norm_match.py",), _norm_match_inputs,
        (
            Provider("ours", lambda i: lambda: functional.norm_match(i.pre, i.target, weight_norm=i.weight_norm)),
            Provider(
                "ours, capacity",
                lambda i: lambda: functional.norm_match(
                    i.pre, i.target, weight_norm=i.weight_norm, capacity=i.capacity
                ),
                gpu_only=True, note="no host read",
            ),
            Provider(
                "sort + cumsum", lambda i: lambda: _norm_match_dense(i.pre, i.target, i.weight_norm),
                baseline=True, note=DENSE,
            ),
            Provider(
                "torch.compile", lambda i: _bound(_compiled(_norm_match_dense), i.pre, i.target, i.weight_norm),
                compiled=True, note=DENSE,
            ),
        ),
        lambda i: traffic.norm_match(
            i.case.B, i.case.F,
            _kept(i, lambda: functional.norm_match(i.pre, i.target, weight_norm=i.weight_norm)), i.pre.element_size(),
        ),
        _check_norm_match,
    ),
    Op(
        "threshold", "forward", "threshold", "BFk", ("test_threshold.py",), _threshold_inputs,
        (
            Provider("ours", lambda i: lambda: functional.threshold(i.pre, i.theta)),
            Provider(
                "ours, capacity",
                lambda i: lambda: functional.threshold(i.pre, i.theta, capacity=i.capacity),
                gpu_only=True, note="no host read",
            ),
            Provider("nonzero + index", lambda i: lambda: _above_compressed(i.pre, i.theta), baseline=True),
            Provider("torch.where", lambda i: lambda: _above_dense(i.pre, i.theta), note=DENSE),
        ),
        lambda i: traffic.threshold(
            i.case.B, i.case.F, _kept(i, lambda: functional.threshold(i.pre, i.theta)), i.pre.element_size()
        ),
        _check_selection("threshold", lambda i: _above_dense(i.pre, i.theta), batch=False),
    ),
    Op(
        "decode", "forward", "decode", "BdFki", ("test_decode.py",), _codes_inputs,
        (
            Provider("ours", lambda i: lambda: functional.decode(i.codes, i.weight, i.bias)),
            Provider(
                "embedding_bag", lambda i: lambda: _bags(i.values, i.columns, i.weight) + i.bias, baseline=True
            ),
            Provider("dense matmul", _dense_decode, note="dense codes given"),
            Provider(
                "torch.compile", lambda i: _bound(_compiled(_gathered), i.values, i.columns, i.weight, i.bias),
                compiled=True, note="of gather, multiply, sum",
            ),
        ),
        _codes_traffic(traffic.decode, distinct="distinct"),
        _check_sum("decode", _expected_decode),
    ),
    Op(
        "decode", "backward_values", "decode, gradient of values", "BdFki", ("test_decode.py",), _codes_inputs,
        (
            Provider("ours", _our_value_gradient),
            Provider("embedding_bag backward", _bag_gradient("values"), baseline=True),
            Provider(
                "gather + bmm",
                lambda i: lambda: torch.bmm(i.weight[i.columns], i.grad[:, :, None])[:, :, 0],
            ),
        ),
        _codes_traffic(traffic.decode_backward_values, distinct="distinct"),
        _check_flat(_check_sum("decode-backward_values", _expected_value_gradient)),
    ),
    Op(
        "decode", "backward_weight", "decode, gradient of weight", "BdFki", ("test_decode.py",), _codes_inputs,
        (
            Provider("ours", _our_weight_gradient, note="turning included"),
            Provider("embedding_bag backward", _bag_gradient("weight"), baseline=True),
            Provider("dense matmul", _dense_weight_gradient, note="dense codes given"),
        ),
        _codes_traffic(traffic.decode_backward_weight),
        _check_sum("decode-backward_weight", _expected_weight_gradient),
    ),
    Op(
        "to_dense", "forward", "codes to dense", "BFki", ("test_codes.py",), _codes_inputs,
        (
            Provider("ours", lambda i: lambda: i.codes.to_dense()),
            Provider(
                "zeros + scatter",
                lambda i: lambda: i.values.new_zeros(i.case.B, i.case.F).scatter_(1, i.columns, i.values),
                baseline=True,
            ),
        ),
        lambda i: traffic.to_dense(i.case.B, i.case.F, i.codes.values.numel(), i.values.element_size()),
        _check_dense,
    ),
    Op(
        "autoencoder", "forward", "TopK autoencoder, forward", "BdFk", ("test_autoencoder.py",), _autoencoder_inputs,
        (
            Provider("ours", lambda i: lambda: i.sae(i.x)),
            Provider("dense eager", lambda i: lambda: _dense_autoencoder(i.x, i.sae, i.k), baseline=True),
            Provider("torch.topk + embedding_bag", lambda i: lambda: _bag_autoencoder(i.x, i.sae, i.k)),
            Provider(
                "torch.compile", lambda i: _bound(_compiled(_dense_autoencoder), i.x, i.sae, i.k),
                compiled=True, note="of dense eager",
            ),
        ),
        lambda i: traffic.autoencoder_forward(
            i.case.B, i.case.F, i.case.d, _total(i), i.x.element_size(),
            distinct=_distinct(i),
        ),
        _check_autoencoder,
    ),
)  # fmt: skip


def _bound(function: Callable, *args) -> Callable[[], Output]:
    return lambda: function(*args)


def _distinct(i: Inputs) -> int:
    if not hasattr(i, "distinct"):
        i.distinct = int(i.sae.encode(i.x).indices.unique().numel())
    return i.distinct


def find(op_id: str) -> Op:
    """The operation of an id such as ``topk`` or ``decode-backward_weight``."""
    for op in OPS:
        if op.id == op_id:
            return op
    raise ValueError(f"no operation {op_id!r}; there are {', '.join(op.id for op in OPS)}")


def input_bytes(inputs: Inputs) -> int:
    """Bytes of all tensors in the inputs, parameters and codes included."""
    tensors: dict[int, Tensor] = {}
    for value in vars(inputs).values():
        held = value.parameters() if isinstance(value, torch.nn.Module) else torch.utils._pytree.tree_leaves(value)
        tensors |= {id(t): t for t in held if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_inputs(op: Op, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """The first tokens' worth of a case: little enough for the reference, at the width that will be timed."""
    return op.make_inputs(replace(case, B=min(case.B, CHECK_ROWS)), dtype, device, seed)


def check_provider(op: Op, provider: Provider, inputs: Inputs) -> None:
    """Runs a provider and compares it with the reference. AssertionError: it differs; names operation and provider."""
    op.check(inputs, provider, provider.build(inputs)())
