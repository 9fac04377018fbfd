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

import torch
from torch import Tensor

from sae_kernels.dispatch import transforming
from sae_kernels.ops import ops
from sae_kernels.stock.dense import uniform_offsets
from sae_kernels.stock.linear import one_row as one_row  # for modules, which see no back end

from . import _checks as check
from ._encoder import Encoded, EncodeInfo, encode, encode_with, linear, linear_dtype
from ._prefixes import energy_share, norm_match, sized
from .codes import SparseCodes, at_latents

__all__ = [
    "EncodeInfo", "Encoded", "at_latents", "batch_topk", "decode", "decode_prefixes", "encode", "encode_with",
    "energy_share", "feature_budgets", "feature_topm", "largest", "linear", "move_threshold", "norm_match",
    "sparse_mlp", "threshold", "topk", "zipf_shortfall",
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

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> codes = topk(torch.tensor([[0.5, 2.0, -1.0, 3.0]]), 2)
        >>> codes.indices.tolist(), codes.values.tolist()
        ([1, 3], [2.0, 3.0])
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


def batch_topk(pre: Tensor, k: float, *, mask: Tensor | None = None, backend: str = "auto") -> SparseCodes:
    """The ``int(k * tokens)`` entries of the whole batch with the largest relu(pre): BatchTopK, mutual choice.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable; entries kept at 0 pass no gradient.
        k: average entries per token, int or float, ``0 < k <= F``. A budget of 0 gives empty codes.
        mask: boolean ``(F,)`` or ``pre.shape``, True = may be kept; where too few are eligible, the lowest flat
            positions among the masked fill up at value 0 and without gradient.

    Returns:
        Codes with exactly ``int(k * tokens)`` entries, ascending in (row, latent). No host synchronisation.

    Source: Bussmann et al. 2024, arXiv:2412.06410; Ayonrinde 2024, arXiv:2411.02124 (mutual choice).

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> pre = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
        >>> batch_topk(pre, 1.5).to_dense()  # 1.5 of each token, on average
        tensor([[1., 2., 3.],
                [0., 0., 0.]])
    """
    check.pre_activations(pre)
    k = check.number_k(k, pre.shape[-1])
    matrix = check.matrix(pre)
    mask = check.mask_for(mask, pre)
    return _largest(pre, matrix, mask, int(k * matrix.shape[0]), backend)


def _largest(pre: Tensor, matrix: Tensor, mask: Tensor | None, total: int, backend: str) -> SparseCodes:
    values, indices, offsets = ops.batch_topk(matrix, mask, total, backend)
    return SparseCodes(values, indices, offsets, tuple(pre.shape[:-1]), pre.shape[-1])


def largest(pre: Tensor, total: int, *, backend: str = "auto") -> SparseCodes:
    """The ``total`` entries (all, where there are fewer) of ``pre`` (*batch_shape, F) with the largest relu(pre).

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> largest(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), 2).to_dense()
        tensor([[0., 2.],
                [3., 0.]])
    """
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

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> pre = torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]])
        >>> feature_topm(pre, torch.tensor([1, 2, 0])).to_dense()
        tensor([[0., 2., 0.],
                [3., 1., 0.]])
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

    Raises:
        TypeError: ``density`` is not floating-point, or a number is of the wrong kind.
        ValueError: ``density`` is not (F,), or ``total`` exceeds ``tokens * F``.

    Example:
        >>> feature_budgets(torch.tensor([0.1, 0.5, 0.2]), 11, tokens=8)
        tensor([2, 6, 3], dtype=torch.int32)
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

    Raises:
        TypeError: ``density`` is not floating-point, or a number is of the wrong kind.
        ValueError: ``density`` is not (F,), or ``k`` exceeds F.

    Example:
        >>> zipf_shortfall(torch.tensor([0.5, 0.0, 0.125]), 1)
        tensor([0.0833, 1.0000, 0.5417])
    """
    check.floating("density", density, dims=1)
    k = check.number_k(k, density.shape[0])
    return ops.zipf_shortfall(density.detach(), float(k), *check.budget_law(exponent, shift))


def threshold(
    pre: Tensor,
    theta: Tensor | float,
    *,
    magnitude: bool = False,
    bandwidth: float | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> SparseCodes:
    """Every entry above its latent's threshold; NaN is kept and counted.

    Args:
        pre: ``(*batch_shape, F)`` pre-activations. Differentiable: kept entries pass their gradient.
        theta: a number, a scalar tensor or ``(F,)``. Compared in fp32 (fp64 for fp64 ``pre``); a wider theta is
            rounded down, which changes no comparison.
        magnitude: keeps the entries whose magnitude exceeds theta, with their signs. Not together with ``bandwidth``.
        bandwidth: width of the rectangle estimator. Stores every ``pre > theta - bandwidth / 2`` with value
            ``pre * (pre > theta)``, and gives theta its gradient
            ``-(theta / bandwidth) * sum(grad over |pre - theta| < bandwidth / 2)``. Without it theta has none.
        capacity: as in :func:`norm_match`.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU).

    Raises:
        TypeError: ``pre`` is not floating-point, or an argument is of the wrong kind; names it.
        ValueError: an argument is out of range, or its shape or device does not fit ``pre``; names it.

    Example:
        >>> threshold(torch.tensor([[0.5, 2.0, 1.0]]), torch.tensor([0.0, 3.0, 0.5])).to_dense()
        tensor([[0.5000, 0.0000, 1.0000]])
        >>> threshold(torch.tensor([[0.5, -2.0, 1.0]]), 0.75, magnitude=True).to_dense()
        tensor([[ 0., -2.,  1.]])
    """
    check.pre_activations(pre)
    theta = check.theta(theta, pre, pre.shape[-1])
    magnitude = check.flag("magnitude", magnitude)
    if bandwidth is None:
        theta = theta.detach()
    elif magnitude:
        raise ValueError(f"bandwidth must be None with magnitude=True, got {bandwidth}: it is for pre > theta")
    else:
        bandwidth = float(check.positive("bandwidth", bandwidth))
    capacity = check.capacity_of(capacity)
    return sized(pre, capacity, ops.threshold(check.matrix(pre), theta, bandwidth, capacity, magnitude, backend))


def decode(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None, *, result_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of each row's active decoder vectors.

    ``out[b] = sum over row b's entries of value * W_dec[index] (+ b_dec)``

    Args:
        codes: over ``(*batch_shape, F)``; ``values`` differentiable.
        W_dec: ``(F, d_out)``, any strides. Differentiable.
        b_dec: ``(d_out,)`` or None. Differentiable.
        result_dtype: wider than 16 bits leaves the fp32 sums of 16-bit operands unrounded.

    Returns:
        ``(*batch_shape, d_out)`` in ``result_dtype``; by default the autocast dtype if active, else
        ``promote_types(values, W_dec)``.

    Cost: reads N weight rows and N (value, index) pairs, writes the output once. Dense codes go through a GEMM.
    Numerics: fp32 accumulation; forward and gradients bitwise reproducible. Source: Gao et al. 2024, arXiv:2406.04093.

    Raises:
        TypeError: ``codes`` is no :class:`SparseCodes`, or a weight is not floating-point.
        ValueError: a shape or a device does not fit the codes; names the argument.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 1.0]]))
        >>> decode(codes, torch.tensor([[1.0, 1.0], [0.0, 3.0], [5.0, 0.0]]))
        tensor([[5., 6.]])
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
    dtype = linear_dtype(codes.values, W_dec) if result_dtype is None else result_dtype
    index = codes.transposed_for(W_dec)
    out = ops.decode(codes.values, codes.indices, codes.offsets, W_dec, b_dec, dtype, *index, backend)
    return out.view(*codes.batch_shape, W_dec.shape[1])


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

    Raises:
        TypeError: ``codes`` is no :class:`SparseCodes`, or a weight is not floating-point.
        ValueError: a shape or a device does not fit the codes; names the argument.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 2.0]]))
        >>> decode_prefixes(codes, torch.eye(2), widths=[1, 2])
        tensor([[[1., 0.],
                 [1., 2.]]])
    """
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}")
    widths = check.widths(widths, codes.num_latents)
    check.floating("W_dec", W_dec, dims=2)
    dtype = linear_dtype(codes.values, W_dec)
    wide = torch.promote_types(dtype, torch.float32)
    runs = codes.split_latents(widths)
    with torch.autocast(codes.device.type, enabled=False):
        parts = decode(runs.replace(values=runs.values.to(wide)), W_dec, backend=backend)
        out = parts.cumsum(-2)
        return (out if b_dec is None else out + b_dec.to(wide)).to(dtype)


def sparse_mlp(
    x: Tensor | None, kept: Tensor, up: Tensor | None, down: Tensor, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, backend: str = "auto",
) -> Tensor:
    """An MLP of which each token keeps few neurons, for one token or a few: inference only.

    ``out = h @ down + down_bias``, with ``h = kept * (x @ up.T + up_bias)`` where ``kept`` is not 0, and 0 elsewhere;
    without ``up``, ``h = kept``.

    Args:
        x: ``(*batch_shape, d_in)``, or None without ``up``.
        kept: ``(*batch_shape, F)``: of a gated MLP the activations of its gate, otherwise of its neurons; 0 where a
            token does not keep one. NaN and infinities are kept.
        up: ``(F, d_in)``, as ``nn.Linear`` stores it, or None.
        down: ``(F, d_out)``: a row a neuron, the transpose of what ``nn.Linear`` stores. Rows that lie whole are read
            where they are; of another layout the rows that are used are copied.
        up_bias, down_bias: ``(F,)`` and ``(d_out,)``, or None.

    Returns:
        ``(*batch_shape, d_out)`` in the dtype of ``kept``, that of ``x`` as well; weights and biases may have others.

    Cost: reads the rows of both weights that some token keeps: on a GPU once for each 8 tokens, on a CPU once for each
    token. Where more than about half of them are kept, or there are many tokens, the dense MLP is faster.

    Numerics: sums in fp32 or wider, rounded once; on a CPU each product, each h and each eighth of a sum of 16-bit
    numbers is rounded to 16 bits as well. Same bits on every run and for any number of threads. A row of a weight that
    a token does not keep leaves no trace in its result, whatever it holds. Source: the dense MLP; skipping as in Liu et
    al. 2023, arXiv:2310.17157 (Deja Vu), and Lee et al. 2024, arXiv:2404.08763 (CATS).

    Raises:
        TypeError: an argument is no floating-point tensor, or ``x`` has another dtype than ``kept``; names it.
        ValueError: a shape or a device does not fit, only one of ``x`` and ``up`` is given, or a gradient would be
            asked of an argument, which this has not; names it.

    Example:
        >>> x, gate = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0, 0.0]])  # one neuron of three is kept
        >>> up, down = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.eye(3)
        >>> sparse_mlp(x, gate, up, down)  # 3 * (1 + 2)
        tensor([[0., 9., 0.]])
    """
    named = {"x": x, "kept": kept, "up": up, "down": down, "up_bias": up_bias, "down_bias": down_bias}
    check.floating("kept", kept)
    check.floating("down", down, dims=2)
    shapes = {"down": ((kept.shape[-1], down.shape[1]), "a row a neuron"), "down_bias": (down.shape[1:], "d_out")}
    if (x is None) != (up is None):
        raise ValueError(f"x and up go together, got only {'up' if x is None else 'x'}")
    if up is None and up_bias is not None:
        raise ValueError("up_bias needs up, which is None")
    if x is not None:
        check.floating("x", x)
        if x.dtype != kept.dtype:
            raise TypeError(f"x must have the dtype of kept, {kept.dtype}, got {x.dtype}")
        shapes |= {"x": ((*kept.shape[:-1], x.shape[-1]), "that of kept but for the last dimension"),
                   "up": ((kept.shape[-1], x.shape[-1]), "a row a neuron, of d_in"),
                   "up_bias": (kept.shape[-1:], "one a neuron")}  # fmt: skip
    for name, tensor in named.items():
        if tensor is None or tensor is kept:
            continue
        shape, why = shapes[name]
        check.floating(name, tensor, dims=len(shape))
        check.shaped(name, tensor, shape, kept, why=why)
    if torch.is_grad_enabled() and not transforming():
        asked = [name for name, tensor in named.items() if tensor is not None and tensor.requires_grad]
        if asked:
            raise ValueError(f"sparse_mlp has no gradient, and {asked[0]} requires one: call it under torch.no_grad(), "
                             "or run the dense MLP")  # fmt: skip
    rows = None if x is None else check.matrix(x)
    out = ops.sparse_mlp(rows, check.matrix(kept), up, up_bias, down, down_bias, backend)
    return out.view(*kept.shape[:-1], down.shape[1])


def move_threshold(threshold: Tensor, smallest: Tensor, rate: float) -> None:
    """Moves ``threshold``, in place, towards ``smallest``: all the way while it is unset (-1), then by ``rate``.

    Element by element, for any shape that both share: a threshold per latent, a running density.

    Does nothing where ``smallest`` is not finite, nor in the second run of a checkpointed forward, nor inside a
    transform of ``torch.func``, whose functions write to nothing.

    Raises:
        TypeError: ``threshold`` is not floating-point, or ``rate`` is no number.
        ValueError: ``smallest`` has another shape or device.

    Example:
        >>> cut = torch.tensor(-1.0)
        >>> for smallest in (2.0, 4.0):
        ...     move_threshold(cut, torch.tensor(smallest), 0.25)
        >>> cut
        tensor(2.5000)
    """
    check.floating("threshold", threshold, dims=threshold.dim())
    check.shaped("smallest", smallest, threshold.shape, threshold, why="that of threshold")
    rate = check.from_zero("rate", rate)
    if not transforming():
        ops.move_threshold(threshold, smallest, rate)
