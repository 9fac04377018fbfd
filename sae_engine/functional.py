"""The operations, as ordinary functions: check the arguments, bring them to canonical shape, call the operator.

Every selection takes pre-activations ``(*batch_shape, F)`` with any strides and returns :class:`SparseCodes`. Which
entries are kept is a constant for autograd; gradients flow through the kept values. Keys, ties and NaN are the same
everywhere: -0 equals +0, NaN of either sign ranks above +Inf, ties go to the lowest index (flat index for batch
rules), so the indices are equal bit for bit on every back end.

Every function takes ``backend``: ``"auto"`` (CUDA: Triton, otherwise torch), ``"triton"``, ``"torch"`` or
``"reference"``. An explicit back end that cannot run raises RuntimeError; an unknown one ValueError. Shapes, dtypes
and devices are checked before anything is launched: TypeError or ValueError, naming the argument.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.ops import ops
from sae_kernels.stock.dense import uniform_offsets
from sae_kernels.stock.linear import by_onednn

from . import _checks as check
from .codes import SparseCodes, _transposed_for, at_latents, cat

__all__ = [
    "EncodeInfo", "Encoded", "batch_topk", "decode", "decode_prefixes", "encode", "encode_with", "feature_budgets",
    "feature_topm", "norm_match", "threshold", "topk", "zipf_shortfall",
]


def topk(
    pre: Tensor,
    k: int,
    *,
    score: Tensor | None = None,
    magnitude: bool = False,
    relu: bool | None = None,
    mask: Tensor | None = None,
    sorted: bool = False,
    backend: str = "auto",
) -> SparseCodes:
    """The k entries of each row that rank first.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable.
        k: entries per row, ``1 <= k <= F``.
        score: ranks instead of ``pre``; same shape. Constant for autograd.
        magnitude: rank by ``|pre|`` (AbsTopK).
        relu: apply ReLU to the kept values, after ranking; a zero then passes no gradient. Default ``not magnitude``.
        mask: boolean ``(F,)`` or ``pre.shape``, True = may be kept. A row with fewer than k eligible entries fills up
            with its lowest-index masked latents, at value 0 and without gradient.
        sorted: order each row by descending rank instead of ascending index. The codes then serve reading only.

    Returns:
        Codes with exactly ``k * rows`` entries; values have the dtype of ``pre``.

    Cost: reads ``pre`` once. Source: Gao et al. 2024, arXiv:2406.04093; AbsTopK: Zhu et al. 2025, arXiv:2510.00404.
    """
    check.pre_activations(pre)
    k = check.integer_k(k, pre.shape[-1])
    if score is not None:
        if magnitude:
            raise ValueError("score cannot be combined with magnitude=True: both say what ranks")
        check.floating("score", score)
        check.shaped("score", score, pre.shape, pre, why="that of pre")
        score = check.matrix(score.detach())
    relu = not magnitude if relu is None else relu
    matrix = check.matrix(pre)
    mask = check.mask_for(mask, pre)
    values, indices = ops.topk(matrix, score, mask, k, magnitude, relu, backend)
    if sorted:
        values, indices = _by_rank(values, indices, matrix, score, mask, k, magnitude)
    offsets = uniform_offsets(matrix.shape[0], k, pre.device)
    return SparseCodes(values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1], k)


def _by_rank(values, indices, pre, score, mask, k, magnitude) -> tuple[Tensor, Tensor]:
    """Entries of each row by descending key; stable, so that ties stay in ascending order of index."""
    from sae_kernels.reference import ranking  # keys are defined once

    by = pre.abs() if magnitude else pre if score is None else score
    columns = indices.view(-1, k).long()
    allowed = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.expand(pre.shape).gather(1, columns)
    order = ranking(by.detach().gather(1, columns), allowed).sort(dim=1, descending=True, stable=True).indices
    return values.view(-1, k).gather(1, order).flatten(), indices.view(-1, k).gather(1, order).flatten()


def batch_topk(
    pre: Tensor, k: float, *, mask: Tensor | None = None, group=None, backend: str = "auto"
) -> SparseCodes:
    """The ``int(k * tokens)`` entries of the whole batch with the largest relu(pre): BatchTopK, mutual choice.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable; entries kept at 0 pass no gradient.
        k: average entries per token, int or float, ``0 < k <= F``. A budget of 0 gives empty codes.
        mask: boolean ``(F,)`` or ``pre.shape``, True = may be kept; where too few are eligible, the lowest flat
            positions among the masked fill up at value 0 and without gradient.
        group: a ``torch.distributed`` process group over which the batch extends: the budget is then
            ``int(k * all ranks' tokens)``, ties go to the lower rank first, and each rank's number of entries follows
            the data (two host reads). Default: each rank selects alone.

    Returns:
        Codes with exactly ``int(k * tokens)`` entries, ascending in (row, latent). No host synchronisation.

    Source: Bussmann et al. 2024, arXiv:2412.06410; Ayonrinde 2024, arXiv:2411.02124 (mutual choice).
    """
    check.pre_activations(pre)
    k = check.number_k(k, pre.shape[-1])
    matrix = check.matrix(pre)
    mask = check.mask_for(mask, pre)
    if group is None:
        total = int(k * matrix.shape[0])
    else:
        from ._distributed import batch_share

        total = batch_share(matrix.detach(), mask, k, group)
    return _largest(pre, matrix, mask, total, backend)


def _largest(pre: Tensor, matrix: Tensor, mask: Tensor | None, total: int, backend: str) -> SparseCodes:
    values, indices, offsets = ops.batch_topk(matrix, mask, total, backend)
    return SparseCodes(values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1])


def largest(pre: Tensor, total: int, *, backend: str = "auto") -> SparseCodes:
    """The ``total`` entries (all, where there are fewer) of ``pre`` (*batch_shape, F) with the largest relu(pre)."""
    matrix = check.matrix(check.pre_activations(pre))
    return _largest(pre, matrix, None, min(total, pre.numel()), backend)


def feature_topm(
    pre: Tensor, m: int | Tensor, *, total: int | None = None, backend: str = "auto"
) -> SparseCodes:
    """The m_j tokens of each latent j with the largest relu(pre): feature choice.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable; entries kept at 0 pass no gradient.
        m: tokens per latent, an int or ``(F,)`` integers, ``0 <= m <= tokens``.
        total: the sum of a tensor ``m``, where it is known: the host then reads nothing. On a CPU and under
            ``SAE_CHECK=1`` it is compared with the sum.

    Returns:
        Codes with exactly ``total`` entries, ascending in (row, latent). Ties within a latent go to the lowest row.

    Source: Ayonrinde 2024, arXiv:2411.02124 (feature choice). No code of the author's is public: that ReLU comes
    before the ranking, and how ties are broken, are ours.
    """
    check.pre_activations(pre)
    matrix = check.matrix(pre)
    m, total = check.budgets(m, total, matrix)
    values, indices, offsets = ops.feature_topm(matrix, m, total, backend)
    return SparseCodes(values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1])


def feature_budgets(
    density: Tensor, total: int, tokens: int, *, exponent: float = 1.0, shift: float = 0.0
) -> Tensor:
    """Budgets m (F,) int32 for :func:`feature_topm` that fall with the rank of a latent and sum up to ``total``.

    ``m_j ~ 1 / (rank_j + shift)^exponent``, rank 1 for the largest ``density``, ties to the lower latent. No budget
    passes ``tokens``: what would goes to the other ranks in proportion. Where ``total >= F`` every latent gets one
    token at least; where it is less, the last ranks get none. Rounded by largest remainder.

    Args:
        density: ``(F,)``, how often each latent fires. Only its order counts.
        total: the budget of the batch, ``0 <= total <= tokens * F``.
        exponent: 1 is Zipf's law, 0 shares the budget out evenly.

    Source: Zipf and uniform budgets are Ayonrinde's (2024, arXiv:2411.02124); the formula, the bounds and the rounding
    are ours, since no code of the author's is public.
    """
    check.floating("density", density, dims=1)
    total, tokens = check.count("total", total), check.count("tokens", tokens)
    if total > tokens * density.shape[0]:
        raise ValueError(
            f"total must satisfy 0 <= total <= {tokens * density.shape[0]} (tokens * latents), got {total}"
        )
    return ops.feature_budgets(density.detach(), total, tokens, *check.budget_law(exponent, shift))


def zipf_shortfall(density: Tensor, k: float, *, exponent: float = 1.0, shift: float = 0.0) -> Tensor:
    """How far each latent's density falls short of its share under Zipf's law, as a part of that share.

    ``max(1 - density_j / share_j, 0)``, where the shares fall as ``1 / (rank_j + shift)^exponent``, none exceeds 1 and
    their sum is ``k``: 1 for a latent that never fires, 0 for one that fires often enough. An unset density (-1) lacks
    nothing.

    Args:
        density: ``(F,)``, the share of tokens on which each latent fires.
        k: latents per token, int or float.

    Returns:
        ``(F,)`` in the dtype of ``density``.

    Ours, after the idea of aux_zipf_loss: Ayonrinde 2024, arXiv:2411.02124.
    """
    check.floating("density", density, dims=1)
    k = check.number_k(k, density.shape[0])
    return ops.zipf_shortfall(density.detach(), float(k), *check.budget_law(exponent, shift))


def norm_match(
    pre: Tensor,
    target_norm: Tensor,
    *,
    weight_norm: Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> SparseCodes:
    """The prefix of each row whose norm lies nearest to a target: top-AFA.

    Rank by ``r = fp32(relu(pre)) * fp32(weight_norm)``; of all prefixes keep the first that minimises
    ``|sqrt(sum r^2) - target_norm|``, at least one entry, unscaled. A target at or above the row's norm keeps every
    positive entry; entries with r = 0 are never kept. A row whose largest r is not finite keeps that entry alone.
    Where the two nearest prefixes differ by less than 1e-6 (relative), either may be kept.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable.
        target_norm: ``(*batch_shape,)``, for top-AFA the norm of the centred input. Constant for autograd.
        weight_norm: ``(F,)`` norms of the decoder rows; default 1. Constant for autograd.
        capacity: entries to allocate. Without it the host reads the number of entries, once; with it nothing waits,
            and :meth:`SparseCodes.check` reports an overflow.

    Source: Lee et al. 2025, arXiv:2503.24277, from the authors' code.
    """
    check.pre_activations(pre)
    check.floating("target_norm", target_norm, dims=pre.dim() - 1)
    check.shaped("target_norm", target_norm, pre.shape[:-1], pre, why="one per row of pre")
    wide = torch.promote_types(pre.dtype, torch.float32)
    if weight_norm is not None:
        check.floating("weight_norm", weight_norm, dims=1)
        check.shaped("weight_norm", weight_norm, pre.shape[-1:], pre, why="one per latent")
        weight_norm = weight_norm.detach().to(wide)
    check.not_negative("target_norm", target_norm)
    check.not_negative("weight_norm", weight_norm)
    target = target_norm.detach().to(wide).reshape(-1)
    capacity = check.capacity_of(capacity)
    return _sized(
        pre, capacity, ops.norm_match(check.matrix(pre), target, weight_norm, capacity, backend)
    )


def threshold(
    pre: Tensor,
    theta: Tensor | float,
    *,
    bandwidth: float | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> SparseCodes:
    """Every entry above its latent's threshold; NaN is kept and counted.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable: kept entries pass their gradient.
        theta: a number, a scalar tensor or ``(F,)``. Compared in fp32 (fp64 for fp64 ``pre``); a wider theta is
            rounded down, which changes no comparison.
        bandwidth: width of the rectangle estimator. Stores every ``pre > theta - bandwidth / 2`` with value
            ``pre * (pre > theta)``, and gives theta its gradient
            ``-(theta / bandwidth) * sum(grad over |pre - theta| < bandwidth / 2)``. Without it theta has none.
        capacity: as in :func:`norm_match`.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU).
    """
    check.pre_activations(pre)
    theta = _theta(theta, pre)
    if bandwidth is None:
        theta = theta.detach()
    else:
        bandwidth = float(check.positive("bandwidth", bandwidth))
    capacity = check.capacity_of(capacity)
    return _sized(pre, capacity, ops.threshold(check.matrix(pre), theta, bandwidth, capacity, backend))


def _theta(theta: Tensor | float, pre: Tensor) -> Tensor:
    """theta as (F,) in the dtype of the comparison."""
    wide = torch.promote_types(pre.dtype, torch.float32)
    if not isinstance(theta, Tensor):
        if (number := check.number_in(theta)) is None:
            raise TypeError(f"theta must be a number or a tensor, got {type(theta).__name__}")
        theta = torch.full((), number, dtype=torch.float64, device=pre.device)  # a fill: nothing comes from the host
    check.floating("theta", theta, dims=theta.dim())
    if theta.dim() > 1 or (theta.dim() == 1 and theta.shape[0] != pre.shape[-1]):
        raise ValueError(f"theta must be a scalar or have shape {(pre.shape[-1],)}, got {tuple(theta.shape)}")
    check.same_device("theta", theta, pre)
    rounded = theta.to(wide)
    if theta.dtype != wide and theta.dtype == torch.float64:
        below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        rounded = torch.where(rounded.detach() > theta.detach(), below, rounded)
    return rounded.expand(pre.shape[-1])


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Weighted sum of each row's active decoder vectors.

    ``out[b] = sum over row b's entries of value * W_dec[index] (+ b_dec)``

    Args:
        codes: over ``(*batch_shape, F)``; ``values`` differentiable.
        W_dec: ``(F, d_out)``, any strides. Differentiable.
        b_dec: ``(d_out,)`` or None. Differentiable.

    Returns:
        ``(*batch_shape, d_out)`` in the autocast dtype if active, else ``promote_types(values, W_dec)``.

    Cost: reads N weight rows and N (value, index) pairs, writes the output once. Dense codes go through a GEMM.
    Numerics: fp32 accumulation; forward and gradients bitwise reproducible. Source: Gao et al. 2024, arXiv:2406.04093.
    """
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}: SparseDecoder takes dense tensors too")
    check.floating("W_dec", W_dec, dims=2)
    check.same_device("W_dec", W_dec, codes.values)
    codes.validate()
    if W_dec.shape[0] != codes.num_latents:
        raise ValueError(f"W_dec must have {codes.num_latents} rows (one per latent), got {tuple(W_dec.shape)}")
    if b_dec is not None:
        check.floating("b_dec", b_dec, dims=1)
        check.shaped("b_dec", b_dec, W_dec.shape[1:], W_dec, why="d_out")
    dtype = _decoded_dtype(codes, W_dec)
    index = _transposed_for(codes, W_dec)
    out = ops.decode(codes.values, codes.indices, codes.offsets, W_dec, b_dec, dtype, *index, backend)
    return out.view(*codes.batch_shape, W_dec.shape[1])


def _decoded_dtype(codes: SparseCodes, W_dec: Tensor) -> torch.dtype:
    """The autocast dtype if active, else what values and W_dec promote to."""
    kind = codes.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(codes.values.dtype, W_dec.dtype)


def decode_prefixes(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None, *, widths: Sequence[int], backend: str = "auto"
) -> Tensor:
    """Reconstructions from nested prefixes of the latents, in one pass over the codes.

    ``out[..., i, :] = sum over entries with index < widths[i] of value * W_dec[index] (+ b_dec)``

    Indices ascend within a row, so the latents between two widths are a run of the row's entries. The runs are decoded
    as rows of their own, each decoder row read once, and summed up from prefix to prefix.

    Args:
        codes: over ``(*batch_shape, F)``; ``values`` differentiable.
        W_dec, b_dec: as in :func:`decode`.
        widths: ascending, the last F.

    Returns:
        ``(*batch_shape, len(widths), d_out)`` in the dtype of :func:`decode`; sums in fp32 or wider, rounded once.

    Source: Bussmann et al. 2025, arXiv:2503.17547 (Matryoshka); the pass is ours.
    """
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}")
    widths = check.widths(widths, codes.num_latents)
    check.floating("W_dec", W_dec, dims=2)
    dtype = _decoded_dtype(codes, W_dec)
    wide = torch.promote_types(dtype, torch.float32)
    runs = codes.split_latents(widths)
    with torch.autocast(codes.device.type, enabled=False):
        parts = decode(runs.replace(values=runs.values.to(wide)), W_dec, backend=backend)
        out = parts.cumsum(-2)
        return (out if b_dec is None else out + b_dec.to(wide)).to(dtype)


class EncodeInfo(NamedTuple):
    """What decoding needs to know of the input; None where it does not."""

    mean: Tensor | None = None  # (*batch_shape, 1), layer norm and centring
    std: Tensor | None = None  # (*batch_shape, 1), layer norm
    skipped: Tensor | None = None  # (*batch_shape, d_in), the input of the skip connection


class Encoded(NamedTuple):
    """Everything that one pass through an encoder gives: what :func:`encode_with` returns."""

    codes: tuple[SparseCodes, ...]  # one for each rule
    info: EncodeInfo = EncodeInfo()  # for SparseAutoencoder.decode
    pre: Tensor | None = None  # (*batch_shape, F) that the rules saw, where keep_pre asked for them


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    select: Any,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
    pre: Tensor | None = None,
    backend: str = "auto",
    **context: Tensor,
) -> SparseCodes:
    """Linear encoder and selection, ``select(((x - b_dec) @ W_enc + b_enc) * scale)``, differentiated sparsely.

    The gradient never becomes a (tokens, F) matrix: each latent sums over the tokens that keep it, in a fixed order.

    Args:
        x: ``(*batch_shape, d_in)``. Differentiable.
        W_enc: ``(d_in, F)``, any strides. Differentiable.
        b_enc: ``(F,)`` or None. Differentiable.
        select: an activation module. ``select.select`` chooses; ``select.entry_values``, where the module has it, turns
            the pre-activations at the chosen entries into values. Without it the gradient goes through the dense
            pre-activations.
        b_dec: ``(d_in,)``, subtracted from ``x``, or None. Differentiable.
        scale: ``(F,)``, multiplies the pre-activations before selection (decoder norms), or None. Differentiable.
        pre: what is selected from, ``(*batch_shape, F)`` and multiplied by ``scale``, where it is known already: it is
            then taken as it is, in its own dtype. Constant for autograd: gradients go by way of the others.
        context: what ``select`` names in its ``context_keys``.

    Returns:
        The codes, over ``(*batch_shape, F)``; values have the dtype of the pre-activations.

    Raises:
        TypeError: ``select`` is no activation module, or its context is incomplete or has a name too many.
        ValueError: a shape or a device does not fit those of ``x``.
    """
    if isinstance(select, list | tuple):
        raise TypeError(f"select must be one activation module, got {len(select)}: encode_with takes several")
    return encode_with(
        x, W_enc, b_enc, select=select, b_dec=b_dec, scale=scale, pre=pre, keep_pre=False, backend=backend, **context
    ).codes[0]


def encode_with(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None = None,
    *,
    select: Any,
    b_dec: Tensor | None = None,
    scale: Tensor | None = None,
    pre: Tensor | None = None,
    keep_pre: bool = False,
    backend: str = "auto",
    **context: Tensor,
) -> Encoded:
    """:func:`encode` with several rules, which select from the same pre-activations and share one backward pass.

    Args:
        select: an activation module, or a sequence of them.
        keep_pre: whether the pre-activations come along. They are then differentiable (unless ``pre`` was given), by
            way of the (tokens, F) matrix that the codes alone spare.
        context: handed to each activation that names it in its ``context_keys``.
        x, W_enc, b_enc, b_dec, scale, pre: as in :func:`encode`.

    Returns:
        ``codes``, one for each rule, and ``pre``, None without ``keep_pre``. Under 16-bit autocast ``pre`` is the fp32
        sum with the fp32 bias, rounded once.

    Raises:
        TypeError, ValueError: as :func:`encode`; and ValueError where ``select`` is empty.
    """
    rules = tuple(select) if isinstance(select, list | tuple) else (select,)
    contexts = _contexts(rules, context)
    _check_linear(x, W_enc, b_enc)
    if b_dec is not None:
        check.floating("b_dec", b_dec, dims=1)
        check.shaped("b_dec", b_dec, x.shape[-1:], x, why="d_in")
    if scale is not None:
        check.floating("scale", scale, dims=1)
        check.shaped("scale", scale, W_enc.shape[1:], x, why="one per latent")
    if pre is not None:
        check.floating("pre", pre)
        check.shaped("pre", pre, (*x.shape[:-1], W_enc.shape[1]), x, why="one per token and latent")
    dtype = _linear_dtype(x, W_enc)
    given, result_dtype = pre is not None, dtype if pre is None else pre.dtype
    turners = [getattr(rule, "entry_values", None) for rule in rules]
    with torch.set_grad_enabled(torch.is_grad_enabled() and (keep_pre or None in turners)):
        if pre is not None:
            unscaled = pre = pre.detach()
        else:
            unscaled = linear(x if b_dec is None else x - b_dec, W_enc, b_enc)
            pre = unscaled if scale is None else (unscaled * scale).to(dtype)
    codes = [
        rule.select(pre if turner is None else pre.detach(), backend=backend, **mine)
        for rule, turner, mine in zip(rules, turners, contexts, strict=True)
    ]
    sparse = [number for number, turner in enumerate(turners) if turner is not None]
    if sparse and torch.is_grad_enabled():  # without gradients the values are what was selected
        matrix = check.matrix(unscaled.detach())
        entries = [ops.gather(matrix, codes[n].indices, codes[n].offsets, backend) for n in sparse]
        if given and scale is not None:
            scales = [scale.detach()[codes[n].indices.long()] for n in sparse]
            entries = [torch.where(s == 0, 0.0, e / s).to(e.dtype) for e, s in zip(entries, scales, strict=True)]
        entries = _as_encoded(entries, [codes[n] for n in sparse], x, W_enc, b_enc, b_dec, dtype, backend)
        for n, pre_entries in zip(sparse, entries, strict=True):
            if scale is not None:
                pre_entries = (pre_entries * at_latents(scale, codes[n])).to(result_dtype)
            codes[n] = codes[n].replace(values=rules[n].entry_values(pre_entries, codes[n], **contexts[n]))
    return Encoded(tuple(codes), pre=pre if keep_pre else None)


def _contexts(rules: tuple, context: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of several rules gets of ``context``; a single rule gets, and checks, all of it."""
    if not rules:
        raise ValueError("select must hold at least one activation module, got none")
    for rule in rules:
        if not callable(getattr(rule, "select", None)):
            raise TypeError(f"select must be an activation module such as TopK(32), got {type(rule).__name__}")
    if len(rules) == 1:
        return [context]
    known: list[frozenset[str]] = [getattr(rule, "context_keys", frozenset()) for rule in rules]
    for name in frozenset(context).difference(*known):
        raise TypeError(f"none of the activations in select takes {name}")
    return [{name: context[name] for name in keys.intersection(context)} for keys in known]


def _as_encoded(entries, codes, x, W_enc, b_enc, b_dec, dtype, backend) -> list[Tensor]:
    """Pre-activations ``entries``, a tensor for each of ``codes``, as functions of the encoder's input and parameters.

    Several codes are laid below one another, over as many copies of ``x``: one pass over the latents serves them all.
    """
    centred = check.matrix((x if b_dec is None else x - b_dec.detach()).to(dtype))
    parameters = W_enc, b_enc, b_dec

    def attached(x: Tensor, entries: Tensor, codes: SparseCodes) -> Tensor:
        return ops.encode_entries(
            x, *parameters, entries, codes.indices, codes.offsets, *_transposed_for(codes, *parameters), backend
        )

    if len(codes) == 1 or any(c.required is not None for c in codes):  # unused capacity cannot lie between rows
        return [attached(centred, e, c) for e, c in zip(entries, codes, strict=True)]
    below = cat([replace(c.detach(), batch_shape=(c.rows,)) for c in codes])
    together = attached(centred.repeat(len(codes), 1), torch.cat(entries), below)
    return list(together.split([e.shape[0] for e in entries]))


def move_threshold(threshold: Tensor, smallest: Tensor, rate: float) -> None:
    """Moves ``threshold``, in place, towards ``smallest``: all the way while it is unset (-1), then by ``rate``.

    Element by element, for any shape that both share: a threshold per latent, a running density.

    Does nothing where ``smallest`` is not finite, nor in the second run of a checkpointed forward.
    """
    ops.move_threshold(threshold, smallest, rate)


def linear(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, *, result_dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ W_enc + b_enc``; 16-bit results (autocast, or 16-bit inputs) are rounded once, after the bias.

    ``result_dtype`` wider than 16 bits leaves the fp32 sums of 16-bit operands unrounded.
    """
    _check_linear(x, W_enc, b_enc)
    dtype = _linear_dtype(x, W_enc)
    result_dtype = dtype if result_dtype is None else result_dtype
    with torch.autocast(x.device.type, enabled=False):
        flat, weight = check.matrix(x).to(dtype), W_enc.to(dtype)
        if dtype in (torch.float32, torch.float64):
            bias = None if b_enc is None else b_enc.to(dtype)
            decided_when_run = torch.compiler.is_compiling() and flat.is_cpu
            if decided_when_run or by_onednn(flat, weight):
                out = ops.linear(flat, weight, bias)
            else:
                out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        else:
            out = ops.linear_16bit(flat, weight, b_enc, result_dtype, "auto")
    return out.to(result_dtype).view(*x.shape[:-1], W_enc.shape[1])


def _check_linear(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> None:
    check.floating("x", x)
    check.floating("W_enc", W_enc, dims=2)
    check.same_device("W_enc", W_enc, x)
    if x.shape[-1] != W_enc.shape[0]:
        raise ValueError(f"x must have d_in = {W_enc.shape[0]} in its last dimension, got shape {tuple(x.shape)}")
    if b_enc is not None:
        check.floating("b_enc", b_enc, dims=1)
        check.shaped("b_enc", b_enc, W_enc.shape[1:], x, why="one per latent")


def _linear_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    """The autocast dtype if active, else what x and W_enc promote to."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x.dtype, W_enc.dtype)


def _sized(pre: Tensor, capacity: int | None, result: tuple[Tensor, ...]) -> SparseCodes:
    values, indices, offsets, required = result
    return SparseCodes(
        values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1],
        required=None if capacity is None else required,
    )
