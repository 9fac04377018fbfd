"""The operations as data: sizes, inputs, who provides them, how a result is checked, what it cannot avoid moving.

A provider's ``build(inputs)`` prepares what is not timed and returns the call that is. Exactly one provider of each
operation is the baseline: the stock PyTorch that gives the same kind of result, at its best setting. Others are what
people also write (dense results, compiled code, other libraries); their notes say where their result differs in kind.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import cub
import plain
import torch
import traffic
from checks import (
    check_autoencoder,
    check_dense,
    check_encode,
    check_energy_share,
    check_error,
    check_flat,
    check_gemm,
    check_group_maxima,
    check_norm_match,
    check_selection,
    check_sum,
    expected_batch_topk,
    expected_decode,
    expected_feature_topm,
    expected_threshold,
    expected_topk,
    expected_value_gradient,
    expected_weight_gradient,
    nearest_prefix,
    once,
)
from derived import GEMM_ALONE, GROUP_MAXIMA
from inputs import (
    Inputs,
    autoencoder_inputs,
    codes_inputs,
    encoder_inputs,
    energy_share_inputs,
    feature_topm_inputs,
    norm_match_inputs,
    pre_inputs,
    threshold_inputs,
    total,
)
from others import cute_dsl_available, cute_dsl_topk, flashinfer_topk, saelens_topk, sparsify_decode, sparsify_encode
from ours import encoded, error, group_maxima, value_gradient, weight_gradient
from sizes import Case
from stock import (
    Output,
    above_compressed,
    above_dense,
    bag_autoencoder,
    bag_error,
    bag_gradient,
    bags,
    column_topk,
    compiled,
    dense_autoencoder,
    dense_decode,
    dense_encode,
    dense_weight_gradient,
    energy_share_dense,
    flat_topk,
    flat_topk_dense,
    gathered,
    norm_match_dense,
    topk_dense,
    topk_relu,
)
from torch import Tensor

from sae_engine import functional
from sae_kernels.operations import OPERATIONS, Traffic


@dataclass(frozen=True)
class Provider:
    """One implementation. ``note`` says where its result or its input differs in kind from the baseline's.

    Of several ``baseline``, the first that runs is the cell's. A ``yardstick`` is a part of the operation that targets
    are stated in; it has a check of its own. ``lowest``: of tied entries it promises those of lowest index, as ours
    does, and is held to it. ``package`` is what it imports, ``distribution`` where that is installed under another
    name. ``available`` says why it cannot run, or None; ``version`` asks for what no distribution says.
    """

    name: str
    build: Callable[[Inputs], Callable[[], Output]]
    baseline: bool = False
    compiled: bool = False
    gpu_only: bool = False
    package: str | None = None
    distribution: str | None = None
    note: str = ""
    yardstick: bool = False
    lowest: bool = False
    available: Callable[[], str | None] | None = None
    version: Callable[[], str | None] | None = None
    check: Callable[[Inputs, Provider, Output], None] | None = None

    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def packages(self) -> dict[str, str]:
        """The versions of what it runs, beyond torch and Triton, for its row."""
        name = self.distribution or self.package
        if name is None:
            return {}
        try:
            found = metadata.version(name) if self.version is None else self.version()
        except metadata.PackageNotFoundError:
            return {}
        return {name: found} if found else {}

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        if self.gpu_only and device.type != "cuda":
            return "needs a GPU"
        if not self.is_installed():
            return f"{self.package} is not installed"
        reason = self.available() if self.available is not None else None
        if reason is not None:
            return reason
        if self.compiled and device.type != "cuda":
            compilers = filter(None, [os.environ.get("CXX"), "g++", "clang++"])
            if not any(map(shutil.which, compilers)):
                return "torch.compile finds no C++ compiler"
        return None


@dataclass(frozen=True)
class Op:
    """One operation in one mode. ``is_plain``: it has no baseline but what defines it."""

    name: str
    mode: str
    title: str
    sizes: str
    make_inputs: Callable[[Case, torch.dtype, torch.device, int], Inputs]
    providers: tuple[Provider, ...]
    traffic: Callable[[Inputs], Traffic]
    check: Callable[[Inputs, Provider, Output], None]
    is_plain: bool = False

    @property
    def operator(self) -> str:
        """Of the table, if it is one."""
        return self.name if self.mode == "forward" else f"{self.name}_{self.mode}"

    @property
    def id(self) -> str:
        return self.name if self.mode == "forward" else f"{self.name}-{self.mode}"

    @property
    def baseline(self) -> Provider:
        return next(provider for provider in self.providers if provider.baseline)


# --- traffic -------------------------------------------------------------------------------------------------------


def distinct(i: Inputs) -> int:
    """Latents that an autoencoder's codes name."""
    pre = torch.addmm(i.sae.b_enc, i.x - i.sae.b_dec, i.sae.W_enc)
    return int(pre.topk(i.k, sorted=False).indices.unique().numel())


def moved(name: str, arguments: Callable[[Inputs], tuple]) -> Callable[[Inputs], Traffic]:
    """What an operation of the table moves, given the arguments of its operator."""
    return lambda i: OPERATIONS[name].traffic(*arguments(i))


def entries(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return i.codes.values, i.codes.indices, i.codes.offsets


# --- the table -----------------------------------------------------------------------------------------------------

DENSE = "dense result"
CHANCE = "ties at the cut left to chance"
# Other libraries' kernels, each by default and under our tie rule; a compiled one is timed at the quoted sizes alone.
ROW_TOPK_KERNELS: tuple[tuple[str, Callable, dict[str, Any]], ...] = (
    ("torch.topk, CuTe DSL", cute_dsl_topk,
     {"available": lambda: None if cute_dsl_available() else "torch has no CuTe DSL here",
      "distribution": "nvidia-cutlass-dsl"}),
    ("FlashInfer top_k", flashinfer_topk, {"package": "flashinfer", "distribution": "flashinfer-python"}),
    ("CUB DeviceBatchedTopK", cub.topk,
     {"available": cub.unavailable, "compiled": True, "distribution": "CUB", "version": cub.version}),
)  # fmt: skip

OPS: tuple[Op, ...] = (
    Op(
        "topk", "forward", "row top-k", "BFk", pre_inputs,
        (
            Provider("ours", lambda i: lambda: functional.topk(i.pre, i.k)),
            Provider("torch.topk", lambda i: lambda: topk_relu(i.pre, i.k), baseline=True),
            Provider("torch.topk + scatter", lambda i: lambda: topk_dense(i.pre, i.k), note=DENSE),
            Provider("torch.compile", lambda i: bound(compiled(topk_relu), i.pre, i.k), compiled=True),
            *(
                Provider(
                    f"{name}{', lowest index' if lowest else ''}", build(lowest=lowest), gpu_only=True, lowest=lowest,
                    note="" if lowest else CHANCE, **options,
                )
                for name, build, options in ROW_TOPK_KERNELS for lowest in (False, True)
            ),
            Provider("SAELens TopK", saelens_topk, package="sae_lens", note=DENSE),
        ),
        moved("topk", lambda i: (i.pre, None, None, i.k, False, True)),
        check_selection("topk", expected_topk, batch=False),
    ),
    Op(
        "batch_topk", "forward", "batch top-k (mutual choice)", "BFk", pre_inputs,
        (
            Provider("ours", lambda i: lambda: functional.batch_topk(i.pre, i.k)),
            Provider("flat torch.topk", lambda i: lambda: flat_topk(i.pre, total(i)), baseline=True),
            Provider("flat torch.topk + scatter", lambda i: lambda: flat_topk_dense(i.pre, total(i)), note=DENSE),
            Provider("torch.compile", lambda i: bound(compiled(flat_topk), i.pre, total(i)), compiled=True),
            Provider(
                GROUP_MAXIMA, group_maxima, gpu_only=True, yardstick=True, check=check_group_maxima,
                note="one pass, no selection",
            ),
        ),
        moved("batch_topk", lambda i: (i.pre, None, total(i))),
        check_selection("batch_topk", expected_batch_topk, batch=True),
    ),
    Op(
        "feature_topm", "forward", "feature choice", "BFk", feature_topm_inputs,
        (
            Provider("ours", lambda i: lambda: functional.feature_topm(i.pre, i.m, total=i.total)),
            Provider(
                "column torch.topk", lambda i: lambda: column_topk(i.pre, i.m, i.most), baseline=True,
                note="not sorted by token",
            ),
        ),
        moved("feature_topm", lambda i: (i.pre, i.m, i.total)),
        check_selection("feature_topm", expected_feature_topm, batch=True),
    ),
    Op(
        "norm_match", "forward", "norm match (top-AFA)", "BFk", norm_match_inputs,
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
                "sort + cumsum", lambda i: lambda: norm_match_dense(i.pre, i.target, i.weight_norm),
                baseline=True, note=DENSE,
            ),
            Provider(
                "torch.compile", lambda i: bound(compiled(norm_match_dense), i.pre, i.target, i.weight_norm),
                compiled=True, note=DENSE,
            ),
        ),
        moved("norm_match", lambda i: (i.pre, i.target, i.weight_norm, False, int(nearest_prefix(i)[1].sum()))),
        check_norm_match,
    ),
    Op(
        "energy_share", "forward", "energy share (top-p)", "BFk", energy_share_inputs,
        (
            Provider("ours", lambda i: lambda: functional.energy_share(i.pre, i.share)),
            Provider(
                "ours, capacity", lambda i: lambda: functional.energy_share(i.pre, i.share, capacity=i.capacity),
                gpu_only=True, note="no host read",
            ),
            Provider(
                "sort + cumsum", lambda i: lambda: energy_share_dense(i.pre, i.share), baseline=True, note=DENSE,
            ),
            Provider(
                "torch.compile", lambda i: bound(compiled(energy_share_dense), i.pre, i.share), compiled=True,
                note=DENSE,
            ),
        ),
        moved("norm_match", lambda i: (i.pre, i.share, None, True, i.pre.shape[0] * i.k)),
        check_energy_share,
    ),
    Op(
        "threshold", "forward", "threshold", "BFk", threshold_inputs,
        (
            Provider("ours", lambda i: lambda: functional.threshold(i.pre, i.theta)),
            Provider(
                "ours, capacity",
                lambda i: lambda: functional.threshold(i.pre, i.theta, capacity=i.capacity),
                gpu_only=True, note="no host read",
            ),
            Provider("nonzero + index", lambda i: lambda: above_compressed(i.pre, i.theta), baseline=True),
            Provider("torch.where", lambda i: lambda: above_dense(i.pre, i.theta), note=DENSE),
        ),
        moved("threshold", lambda i: (i.pre, i.theta, None, int((i.pre > i.theta).sum()), False)),
        check_selection("threshold", expected_threshold, batch=False),
    ),
    Op(
        "encode", "forward", "encoder + row top-k", "BdFk", encoder_inputs,
        (
            Provider("ours", encoded),
            Provider(
                "addmm + torch.topk", lambda i: lambda: dense_encode(i.x, i.weight, i.bias, i.k), baseline=True
            ),
            Provider(
                "torch.compile", lambda i: bound(compiled(dense_encode), i.x, i.weight, i.bias, i.k), compiled=True
            ),
            Provider(
                "sparsify", sparsify_encode, package="sparsify", distribution="eai-sparsify",
                note="also returns pre-activations",
            ),
            Provider(
                GEMM_ALONE, lambda i: lambda: i.x @ i.weight, yardstick=True, check=check_gemm,
                note="no bias, no selection",
            ),
        ),
        lambda i: traffic.encode_topk(i.case.B, i.case.d, i.case.F, i.k, i.x.element_size()),
        check_encode,
    ),
    Op(
        "decode", "forward", "decode", "BdFki", codes_inputs,
        (
            Provider("ours", lambda i: lambda: functional.decode(i.codes, i.weight, i.bias)),
            Provider(
                "embedding_bag", lambda i: lambda: bags(i.values, i.columns, i.weight) + i.bias, baseline=True
            ),
            Provider("dense matmul", dense_decode, note="dense codes given"),
            Provider(
                "torch.compile", lambda i: bound(compiled(gathered), i.values, i.columns, i.weight, i.bias),
                compiled=True, note="of gather, multiply, sum",
            ),
            Provider("sparsify", sparsify_decode, package="sparsify", distribution="eai-sparsify"),
        ),
        moved("decode", lambda i: (*entries(i), i.weight, i.bias, i.weight.dtype, None, None, None)),
        check_sum("decode", expected_decode),
    ),
    Op(
        "decode_error", "forward", "decode, residual and squared error", "BdFki", codes_inputs,
        (
            Provider("ours", error),
            Provider(
                "embedding_bag, subtract, square",
                lambda i: bound(bag_error, i.values, i.columns, i.weight, i.bias, i.grad), baseline=True,
            ),
        ),
        moved("decode_error", lambda i: (*entries(i), i.weight, i.bias, i.grad, i.weight.dtype)),
        check_error,
    ),
    Op(
        "decode", "backward_values", "decode, gradient of values", "BdFki", codes_inputs,
        (
            Provider("ours", value_gradient),
            Provider("embedding_bag backward", bag_gradient("values"), baseline=True),
            Provider(
                "gather + bmm",
                lambda i: lambda: torch.bmm(i.weight[i.columns], i.grad[:, :, None])[:, :, 0],
                baseline=True,  # in bfloat16 on a GPU: torch has no gradient of embedding_bag's weights there
            ),
        ),
        moved("decode_backward_values", lambda i: (i.grad, *entries(i), i.weight)),
        check_flat(check_sum("decode-backward_values", expected_value_gradient)),
    ),
    Op(
        "decode", "backward_weight", "decode, gradient of weight", "BdFki", codes_inputs,
        (
            Provider("ours", weight_gradient, note="transposing included"),
            Provider("embedding_bag backward", bag_gradient("weight"), baseline=True),
            Provider("dense matmul", dense_weight_gradient, note="dense codes given"),
        ),
        moved("decode_backward_weight", lambda i: (i.grad, i.values.flatten(), *i.codes.by_latent, i.weight.dtype)),
        check_sum("decode-backward_weight", expected_weight_gradient),
    ),
    Op(
        "to_dense", "forward", "codes to dense", "BFki", codes_inputs,
        (
            Provider("ours", lambda i: lambda: i.codes.to_dense()),
            Provider(
                "zeros + scatter",
                lambda i: lambda: i.values.new_zeros(i.case.B, i.case.F).scatter_(1, i.columns, i.values),
                baseline=True,
            ),
        ),
        moved("to_dense", lambda i: (*entries(i), i.case.F)),
        check_dense,
    ),
    Op(
        "autoencoder", "forward", "TopK autoencoder, forward", "BdFk", autoencoder_inputs,
        (
            Provider("ours", lambda i: lambda: i.sae(i.x)),
            Provider("dense eager", lambda i: lambda: dense_autoencoder(i.x, i.sae, i.k), baseline=True),
            Provider("torch.topk + embedding_bag", lambda i: lambda: bag_autoencoder(i.x, i.sae, i.k)),
            Provider(
                "torch.compile", lambda i: bound(compiled(dense_autoencoder), i.x, i.sae, i.k),
                compiled=True, note="of dense eager",
            ),
        ),
        lambda i: traffic.autoencoder_forward(
            i.case.B, i.case.F, i.case.d, total(i), i.x.element_size(),
            distinct=once(i, "distinct", lambda: distinct(i)),
        ),
        check_autoencoder,
    ),
)  # fmt: skip


OPS += tuple(
    Op(
        row.name, "forward", row.name, "BdFk", partial(plain.inputs_of, row),
        (
            Provider("ours", partial(plain.run_by, row, "auto")),
            Provider("reference", partial(plain.run_by, row, "reference"), baseline=True, note="the definition"),
            Provider("stock PyTorch", partial(plain.run_by, row, "torch"), gpu_only=True),
        ),
        lambda i, row=row: row.traffic(*i.arguments), partial(plain.check, row), is_plain=True,
    )
    for row in OPERATIONS.values() if row.name not in {op.operator for op in OPS}
)  # fmt: skip


def bound(function: Callable, *args) -> Callable[[], Output]:
    return lambda: function(*args)


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


def check_provider(op: Op, provider: Provider, inputs: Inputs) -> Callable[[], Output]:
    """The provider's call on ``inputs``, after its result has been compared with the truth.

    checks.Wrong: it differs; names operation and provider.
    """
    call = provider.build(inputs)
    (provider.check or op.check)(inputs, provider, call())
    return call
