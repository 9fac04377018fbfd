"""The operations that have back ends, as one table. Imports torch only.

Whatever treats all operations alike reads it: dispatch, generic tests, benchmarks, the kernel report, the search for
launch configurations. A row says where an operation's implementations lie, what its arguments look like, whether its
back ends agree bit for bit, and what it cannot avoid moving. What it means stands in ``reference.py``; schema, fake and
gradient in ``ops.py``.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import budgets
from ._terms import GATED, GIVEN, Term, lists_of
from ._traffic import Traffic, adam_traffic, code_bytes, gradient_traffic, named_bytes, nbytes
from .stock import dense

FP32, BF16 = torch.float32, torch.bfloat16

# --- arguments -------------------------------------------------------------------------------------------------------


class Maker:
    """Makes an operator's arguments at some sizes: B tokens, width d, F latents, k entries a token.

    Seeded normal numbers and codes of k latents a token, each latent as likely as any other. On the meta device nothing
    is drawn, and tensors have their shapes alone.
    """

    def __init__(self, sizes: Any, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
        """``sizes`` has the attributes B, d, F and k."""
        self.B, self.d, self.F, self.k = sizes.B, sizes.d, sizes.F, sizes.k
        self.dtype, self.device = dtype, torch.device(device)
        self.is_meta = self.device.type == "meta"
        self.generator = None if self.is_meta else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.is_meta:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        drawn = torch.randn(shape, dtype=FP32, device=self.device, generator=self.generator)
        return drawn.to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        if self.is_meta:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.rand(shape, device=self.device, generator=self.generator).to(dtype)

    def number(self, value: float) -> Tensor:
        return torch.full((), value, dtype=FP32, device=self.device)

    def pre(self) -> Tensor:
        return self.normal(self.B, self.F)

    def mask(self, *shape: int) -> Tensor:
        return self.uniform(*shape) < 0.6

    def strongest(self, pre: Tensor) -> Tensor:
        """(B, k): the largest positive numbers of each row: norms and thresholds that follow from them keep about k."""
        if self.is_meta:
            return torch.empty(self.B, self.k, dtype=FP32, device=self.device)
        return pre.relu().float().topk(self.k).values

    def latents(self) -> tuple[Tensor, Tensor]:
        """Indices and offsets of codes."""
        offsets = torch.arange(self.B + 1, device=self.device) * self.k
        if self.is_meta:
            return torch.empty(self.B * self.k, dtype=torch.int32, device=self.device), offsets
        return self.uniform(self.B, self.F).topk(self.k).indices.sort().values.flatten().int(), offsets

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, indices and offsets."""
        return self.normal(self.B * self.k), *self.latents()

    def by_latent(self, indices: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same entries by latent."""
        if self.is_meta:
            kinds = (self.F + 1, torch.int64), (indices.numel(), torch.int32), (indices.numel(), torch.int64)
            return tuple(torch.empty(n, dtype=kind, device=self.device) for n, kind in kinds)  # type: ignore[return-value]
        return dense.by_latent(indices, offsets, self.F)

    def transposed_codes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, and the three arrays of the codes by latent."""
        values, indices, offsets = self.codes()
        return values, *self.by_latent(indices, offsets)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(self.F, self.d, dtype=dtype)

    def terms(self, *modes: int, dense_first: bool = False) -> tuple[list, ...]:
        """A term of each mode, as an operator's arguments; one that comes as GEMMs has no codes by latent."""
        found: list[Term] = []
        for mode in modes:
            values, indices, offsets = self.codes()
            offered = values[:0] if mode == GATED else self.normal(self.B * self.k)
            by_latent = self.by_latent(indices, offsets)
            if dense_first and not found:
                by_latent = tuple(t[:0] for t in by_latent)  # type: ignore[assignment]
            found.append(Term(self.normal(self.B, self.d), values, offered, indices, offsets, *by_latent, mode))
        return lists_of(found)

    def adam(
        self, *modes: int, dense_first: bool = False, row_major: bool = False, moments: torch.dtype | None = None,
        unit_rows: bool = True,
    ) -> tuple:  # fmt: skip
        """A step of fp32 parameters, computed in the dtype, of which there are copies where it is another.

        ``moments``: the dtype of the weights' moments, where that is another than the parameters'.
        """
        wide = torch.promote_types(self.dtype, FP32)
        state = [[self.uniform(*size, dtype=wide) for size in ((self.F, self.d), (self.F, self.d), (self.F,))]
                 for _ in range(3)]  # fmt: skip
        for tensors in state[1:] if moments is not None else ():
            tensors[:2] = [t.to(moments) for t in tensors[:2]]
        if row_major:
            for tensors in state:
                tensors[1] = tensors[1].T.contiguous().T
        copies = [] if self.dtype == wide else [t.to(self.dtype) for t in state[0][:2]]
        terms = self.terms(*modes, dense_first=dense_first)
        options = self.number(1), self.number(1e-3), 0.9, 0.999, 1e-8, 0.0, unit_rows
        return *state, copies, self.normal(self.B, self.d), None, *terms, *options, None


# --- the table -------------------------------------------------------------------------------------------------------

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Operation:
    """One operator of ``torch.ops.sae_engine`` that every back end implements.

    Args:
        name: of the operator, and of the functions in ``reference.py`` and ``stock/``.
        launcher: ``"stem.function"`` in ``device/``; the stock version lies in the file of the same stem.
        examples: makes its arguments, less the back end. The first, "", is a call as it is made most; the others use
            what else there is, each under its name.
        gradients: names of the arguments that gradients flow to.
        is_exact: back ends agree bit for bit; otherwise they are sums, and agree to rounding.
        packed_vectors: its kernels take one-dimensional arguments without strides.
        reads: bytes read, and written in place, where those are not all arguments once.
        flops: of the arguments; 0 by default.
        regimes: by name, sizes at which its kernels go another way, as what differs from the usual sizes.
    """

    name: str
    launcher: str
    examples: Mapping[str, Callable[[Maker], Arguments]]
    gradients: tuple[str, ...] = ()
    is_exact: bool = True
    packed_vectors: bool = False
    reads: Callable[..., int] = nbytes
    flops: Callable[..., int] = lambda *_: 0
    regimes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return self.launcher.split(".")[0]

    @property
    def operator(self) -> Any:
        return getattr(torch.ops.sae_engine, self.name).default

    def example(
        self, sizes: Any, dtype: torch.dtype, device: torch.device | str = "cpu", name: str = "", seed: int = 0
    ) -> Arguments:
        """Arguments, less the back end, at ``sizes`` (attributes B, d, F, k)."""
        return self.examples[name](Maker(sizes, dtype, device, seed))

    def apart(self, arguments: Arguments) -> list:
        """The arguments with copies of those that a call writes in place."""
        parameters = self.operator._schema.arguments
        return [pytree.tree_map(lambda t: None if t is None else t.clone(), a) if p.alias_info else a
                for a, p in zip(arguments, parameters, strict=False)]  # fmt: skip

    def outcome(self, results: Any, arguments: Sequence) -> list[Tensor]:
        """Every tensor that a call has left: its results, and what it has written in place."""
        parameters = self.operator._schema.arguments
        written = [a for a, p in zip(arguments, parameters, strict=False) if p.alias_info]
        return [leaf for leaf in pytree.tree_leaves((results, written)) if isinstance(leaf, Tensor)]

    def results_on_meta(self, *arguments: Any) -> Any:
        """Results of a call in shape and dtype alone.

        Raises:
            ValueError: their size follows from the data, and no capacity says what it is.
        """
        for place, parameter in enumerate(self.operator._schema.arguments[:-1]):
            if parameter.name == "capacity" and arguments[place] is None:
                raise ValueError(f"{self.name}: how many entries are kept follows from the data; give it as capacity")
        on_meta = pytree.tree_map(lambda a: a.detach().to("meta") if isinstance(a, Tensor) else a, arguments)
        return self.operator(*on_meta, "reference")

    def traffic(self, *arguments: Any) -> Traffic:
        """What a call with these arguments, less the back end, cannot avoid. A rule whose number of entries follows
        from the data is given it as its capacity."""
        return Traffic(self.reads(*arguments) + nbytes(self.results_on_meta(*arguments)), self.flops(*arguments))


MOST_OF_A_SLAB = 4096  # latents: 32 MiB of as many tokens in bf16, which an L2 cache holds


def _merge_topk(make: Maker, *, masked: bool = False, scored: bool = False, magnitude: bool = False) -> Arguments:
    """A slab of latents behind F earlier ones, of which each token holds the k that rank first."""
    seen, width = make.pre(), min(make.F, MOST_OF_A_SLAB)
    held = (seen.abs() if magnitude else seen).topk(make.k).indices.sort().values
    scores, score = (make.normal(make.B, n, dtype=FP32) if scored else None for n in (make.k, width))
    mask = make.mask(make.F + width) if masked else None
    return (seen.gather(1, held), scores, held.int(), make.normal(make.B, width), score, mask, make.F, magnitude)


def _merge_topk_reads(values, scores, latents, pre, score, mask, first, magnitude) -> int:
    """An upper bound: what is held is counted as written too. Where scores rank, ``pre`` is read at what is kept alone;
    of the mask, the slab's part and what is held."""
    rows, width = pre.shape
    slab = nbytes(pre) if score is None else nbytes(score) + rows * min(values.shape[1], width) * pre.element_size()
    return slab + 2 * nbytes(values, scores, latents) + (0 if mask is None else width + min(first, latents.numel()))


def _norm_match(make: Maker, *, weighted: bool = True) -> Arguments:
    pre, weight_norm = make.pre(), 1 + make.uniform(make.F) if weighted else None
    score = pre if weight_norm is None else pre.float() * weight_norm
    return pre, make.strongest(score).norm(dim=1), weight_norm, False, make.B * make.k


def _threshold(
    make: Maker, bandwidth: float | None = None, *, scalar: bool = False, magnitude: bool = False
) -> Arguments:
    pre = make.pre()
    level = make.strongest(pre)[:, -1].mean()
    theta = level.expand(make.F) if scalar else level + 0.1 * make.uniform(make.F)
    return pre, theta, bandwidth, make.B * make.k, magnitude


def _feature_topm(make: Maker, pre: Tensor) -> Arguments:
    """Budgets as feature choice makes them."""
    total = make.B * make.k
    if make.is_meta:
        return pre, torch.empty(make.F, dtype=torch.int32, device=make.device), total
    return pre, budgets.budgets(make.uniform(make.F), total, make.B, 1.0, 0.0), total


def _decode(make: Maker, *, weight_dtype: torch.dtype | None = None, plain: bool = False) -> Arguments:
    values, indices, offsets = make.codes()
    weight, bias = make.weight(weight_dtype), None if plain else make.normal(make.d, dtype=FP32)
    by_latent = (None,) * 3 if plain else make.by_latent(indices, offsets)
    return values, indices, offsets, weight, bias, weight.dtype, *by_latent


def _decode_reads(values, indices, offsets, weight, *bias_target) -> int:
    """The codes, each row of the weight that they name, and of what follows the tensors that are read."""
    return nbytes(values, indices, offsets, bias_target) + named_bytes(weight, indices)


def _decode_flops(values, indices, offsets, weight, bias, *_) -> int:
    return weight.shape[1] * (2 * values.numel() + (0 if bias is None else offsets.numel() - 1))


def _decode_sources(make: Maker, *, plain: bool = False) -> Arguments:
    """Two sources, of which the second writes the later columns alone."""
    codes, first = (make.codes(), make.codes()), make.d // 2
    weights = [make.weight(), make.normal(make.F, make.d - first)]
    bias, target = make.normal(make.d, dtype=FP32), make.normal(make.B, make.d, dtype=FP32)
    both = (None, None) if plain else (bias, target)
    return *map(list, zip(*codes, strict=True)), weights, [0, first], make.d, *both, FP32


def _sources_read(values, indices, offsets, weights, firsts, width, *bias_target) -> int:
    named = sum(named_bytes(weight, of) for weight, of in zip(weights, indices, strict=True))
    return nbytes(values, indices, offsets, bias_target) + named


def _sources_flops(values, indices, offsets, weights, firsts, width, bias, target, dtype) -> int:
    rows = offsets[0].numel() - 1
    products = sum(2 * v.numel() * weight.shape[1] for v, weight in zip(values, weights, strict=True))
    return products + rows * width * ((bias is not None) + 3 * (target is not None))


def _sparse_mlp(make: Maker, *, gated: bool = True, biased: bool = False, wide: bool = False) -> Arguments:
    """k neurons of each token, at least; ``down`` has half as many columns again as ``up``."""
    kept, width = make.pre(), make.d + make.d // 2
    if not make.is_meta:
        kept = torch.where(kept >= kept.topk(make.k).values[:, -1:], kept, 0.0)
    dtype = torch.promote_types(make.dtype, FP32) if wide else make.dtype
    up_bias, down_bias = (make.normal(n, dtype=FP32) if biased else None for n in (make.F, width))
    x, up = (make.normal(make.B, make.d), make.weight(dtype)) if gated else (None, None)
    return x, kept, up, up_bias if gated else None, make.normal(make.F, width, dtype=dtype), down_bias


def _sparse_mlp_traffic(x, kept, up, up_bias, down, down_bias) -> Traffic:
    """Of the weights, the rows that some token keeps; on the meta device, which has no values, all of them."""
    num_neurons = down.shape[0]
    union, entries = num_neurons, kept.numel()
    if not kept.is_meta:
        union, entries = int((kept != 0).any(0).sum()), int(kept.count_nonzero())
    used = nbytes(up, up_bias, down) * union // max(num_neurons, 1)
    width = down.shape[1] + (0 if up is None else up.shape[1])
    once = (up is not None) + (up_bias is not None)  # bias and gate of a product
    flops = entries * (2 * width + once) + (0 if down_bias is None else kept.shape[0] * down.shape[1])
    return Traffic(nbytes(x, kept, down_bias) + used, flops)


ROW_TOPK_REGIMES = {
    "few rows": {"B": 1}, "k=512": {"k": 512}, "k=2048": {"k": 2048}, "k=4096": {"k": 4096},
    "few rows F=2^21 k=64": {"B": 1, "F": 2**21, "k": 64}, "F=2^21 k=512": {"B": 1024, "F": 2**21, "k": 512},
}  # fmt: skip

_ROWS = (
    Operation(
        "topk", "row_topk.launch", gradients=("pre",), regimes=ROW_TOPK_REGIMES,
        examples={
            "": lambda make: (make.pre(), None, None, make.k, False, True),
            "mask": lambda make: (make.pre(), None, make.mask(make.F), make.k, False, True),
            "matrix mask": lambda make: (make.pre(), None, make.mask(make.B, make.F), make.k, False, False),
            "score": lambda make: (make.pre(), make.normal(make.B, make.F, dtype=FP32), None, make.k, False, True),
            "magnitude": lambda make: (make.pre(), None, None, make.k, True, False),
            "transposed": lambda make: (make.normal(make.F, make.B).T, None, None, make.k, False, True),
        },
    ),
    Operation(
        "merge_topk", "merge_topk.launch", packed_vectors=True, regimes={"k=512": {"k": 512}, "k=4096": {"k": 4096}},
        examples={
            "": _merge_topk,
            "mask": lambda make: _merge_topk(make, masked=True),
            "score": lambda make: _merge_topk(make, scored=True),
            "magnitude": lambda make: _merge_topk(make, magnitude=True),
        },
        reads=_merge_topk_reads,
    ),
    Operation(
        "batch_topk", "batch_topk.launch", gradients=("pre",), regimes={"quarter kept": {"share": 0.25}},
        examples={
            "": lambda make: (make.pre(), None, make.B * make.k),
            "mask": lambda make: (make.pre(), make.mask(make.F), make.B * make.k),
        },
    ),
    Operation(
        "feature_topm", "feature_topm.launch", gradients=("pre",), regimes={"quarter kept": {"share": 0.25}},
        examples={
            "": lambda make: _feature_topm(make, make.pre()),
            "transposed": lambda make: _feature_topm(make, make.normal(make.F, make.B).T),
        },
    ),
    Operation(
        "norm_match", "norm_match.launch", gradients=("pre",), packed_vectors=True,
        examples={
            "": _norm_match,
            "unweighted": lambda make: _norm_match(make, weighted=False),
            "share": lambda make: (make.pre(), make.uniform(make.B), None, True, make.B * make.F),
        },
        # score, square, sum of every element
        flops=lambda pre, target, weight_norm, is_share, capacity: (2 + (weight_norm is not None)) * pre.numel(),
    ),
    Operation(
        "threshold", "threshold.launch", gradients=("pre", "theta"),
        examples={
            "": _threshold,
            "scalar": lambda make: _threshold(make, scalar=True),
            "window": lambda make: _threshold(make, 0.1),
            "magnitude": lambda make: _threshold(make, magnitude=True),
        },
    ),
    Operation(
        "decode", "decode.launch", gradients=("values", "weight", "bias"), is_exact=False, packed_vectors=True,
        examples={
            "": _decode,
            "fp32 weight": lambda make: _decode(make, weight_dtype=torch.promote_types(make.dtype, FP32)),
            "no bias": lambda make: _decode(make, plain=True),
        },
        reads=lambda values, indices, offsets, weight, bias, *_: _decode_reads(values, indices, offsets, weight, bias),
        flops=_decode_flops,
    ),
    Operation(
        "decode_error", "decode.launch_error", gradients=("values", "weight", "bias", "target"), is_exact=False,
        packed_vectors=True,
        # what a training step asks for: products in the dtype, bias and target in fp32
        examples={
            "": lambda make: (*make.codes(), make.weight(), make.normal(make.d, dtype=FP32),
                              make.normal(make.B, make.d, dtype=FP32), FP32),
        },
        reads=_decode_reads,
        # of each output: subtract, square, sum
        flops=lambda *arguments: _decode_flops(*arguments) + 3 * arguments[5].numel(),
    ),
    Operation(
        "decode_sources", "decode.launch_sources", is_exact=False,
        examples={"": _decode_sources, "sums": lambda make: _decode_sources(make, plain=True)},
        reads=_sources_read, flops=_sources_flops,
    ),
    Operation(
        "decode_backward_values", "backward.launch_values", is_exact=False, packed_vectors=True,
        examples={"": lambda make: (make.normal(make.B, make.d), *make.codes(), make.weight())},
        reads=lambda grad, values, indices, offsets, weight: (
            nbytes(grad, indices, offsets) + named_bytes(weight, indices)),
        flops=lambda grad, values, *_: 2 * values.numel() * grad.shape[1],
    ),
    Operation(
        "decode_backward_weight", "backward.launch_weight", is_exact=False, packed_vectors=True,
        examples={"": lambda make: (make.normal(make.B, make.d), *make.transposed_codes(), make.dtype)},
        reads=lambda grad, values, *_: nbytes(grad) + code_bytes(values, grad.shape[0]),
        flops=lambda grad, values, *_: 2 * values.numel() * grad.shape[1],
    ),
    Operation(
        "to_dense", "dense.launch_to_dense", gradients=("values",), packed_vectors=True,
        examples={"": lambda make: (*make.codes(), make.F)},
    ),
    Operation(
        "gather", "dense.launch_gather", gradients=("dense",), packed_vectors=True,
        examples={"": lambda make: (make.pre(), *make.latents())},
        reads=lambda dense, indices, offsets: nbytes(indices, offsets) + indices.numel() * dense.element_size(),
    ),
    Operation(
        "by_latent", "dense.launch_by_latent", packed_vectors=True,
        examples={"": lambda make: (*make.latents(), make.F)},
    ),
    Operation(
        "sparse_mlp", "sparse_mlp.launch", is_exact=False, packed_vectors=True, regimes={"one token": {"B": 1}},
        examples={
            "": _sparse_mlp,
            "biases": lambda make: _sparse_mlp(make, biased=True),
            "not gated": lambda make: _sparse_mlp(make, gated=False),
            "fp32 weights": lambda make: _sparse_mlp(make, wide=True),
        },
        reads=lambda *arguments: _sparse_mlp_traffic(*arguments).bytes,
        flops=lambda *arguments: _sparse_mlp_traffic(*arguments).flops,
    ),
    Operation(
        "linear_16bit", "linear_16bit.launch", gradients=("x", "weight", "bias"), is_exact=False,
        examples={
            "": lambda make: _linear_16bit(make, make.normal(make.F, dtype=FP32)),
            "no bias": lambda make: _linear_16bit(make, None),
        },
        flops=lambda x, weight, bias, dtype: x.shape[0] * weight.shape[1] * (2 * x.shape[1] + (bias is not None)),
    ),
    Operation(
        "latent_gradients", "latent_pass.launch_gradients", is_exact=False,
        examples={
            "": lambda make: _latent_gradients(make, make.terms(GATED)),
            "two terms": lambda make: _latent_gradients(make, make.terms(GATED, GIVEN), make.uniform(make.F)),
            "dense term": lambda make: _latent_gradients(make, make.terms(GATED, dense_first=True)),
        },
        reads=lambda *arguments: gradient_traffic(*arguments).bytes,
        flops=lambda *arguments: gradient_traffic(*arguments).flops,
    ),
    Operation(
        "latent_adam", "latent_pass.launch_adam", is_exact=False,
        examples={
            "": lambda make: make.adam(GATED),
            "two terms": lambda make: make.adam(GATED, GIVEN),
            "three terms": lambda make: make.adam(GATED, GIVEN, GATED),
            "dense term": lambda make: make.adam(GATED, dense_first=True),
            "row-major": lambda make: make.adam(GATED, row_major=True),
            "free rows": lambda make: make.adam(GATED, unit_rows=False),
            "bf16 moments": lambda make: make.adam(GATED, moments=BF16),
            "row-major bf16 moments": lambda make: make.adam(GATED, moments=BF16, row_major=True),
        },
        reads=lambda *arguments: adam_traffic(*arguments).bytes,
        flops=lambda *arguments: adam_traffic(*arguments).flops,
    ),
)  # fmt: skip


def _linear_16bit(make: Maker, bias: Tensor | None) -> Arguments:
    """bf16 where the dtype is wider. The weight is stored latent by latent."""
    narrow = make.dtype if make.dtype.itemsize == 2 else BF16
    weight = make.normal(make.F, make.d, dtype=narrow).T
    return make.normal(make.B, make.d, dtype=narrow), weight, bias, narrow if bias is not None else FP32


def _latent_gradients(make: Maker, terms: tuple[list, ...], along: Tensor | None = None) -> Arguments:
    return make.normal(make.B, make.d), make.weight(), along, *terms, torch.promote_types(make.dtype, FP32)


def in_fp64(arguments: Sequence) -> Any:
    """The same arguments in double precision, the dtype of the result among them."""

    def wide(a: Any) -> Any:
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.double()
        return torch.float64 if isinstance(a, torch.dtype) else a

    return pytree.tree_map(wide, arguments)


OPERATIONS = {operation.name: operation for operation in _ROWS}
