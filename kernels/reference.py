"""What every operation means, in plain PyTorch, written to be read. Slow, any device, fp64 included.

Shapes: ``pre`` is (B, F). Compressed rows are ``values`` (N,), ``indices`` (N,) int32 and ``offsets`` (B + 1,)
int64; row b owns entries ``offsets[b]:offsets[b + 1]``, indices ascending. With a ``capacity`` the arrays are
that long, whatever lies past ``offsets[-1]`` belongs to no row, and ``required`` says how many entries there were.

The transforms of ``torch.func`` and forward-mode AD look into what runs, and an operator shows them nothing: they get
what stands here (``_contract.define``). So what a forward pass calls is written with functions that they know, of sizes
that no data decides, and its derivatives are right in any order. Which entries are kept is a constant to them.
"""
import torch
from torch import Tensor

from ._rounding import are_narrow, rounded, rounding_bits
from ._terms import NUMBER_OF_LISTS, terms_of


def ordered_keys(x: Tensor) -> Tensor:
    """Integers that sort as ``x`` does: -0 equals +0, every NaN ties above +Inf."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    top = torch.iinfo(integer).max
    bits = (x.detach() + 0.0).view(integer)
    return torch.where(x.isnan(), top, bits ^ ((bits >> (8 * x.element_size() - 1)) & top))


def relu(x: Tensor) -> Tensor:
    """max(x, 0) with NaN kept and -0 turned into +0."""
    return torch.where((x > 0) | x.isnan(), x, 0.0)


def eligible(mask: Tensor | None, pre: Tensor) -> Tensor:
    """The mask, (F,) or (B, F), as (B, F); no mask makes every entry eligible."""
    return torch.ones_like(pre, dtype=torch.bool) if mask is None else mask.expand(pre.shape)


def ranking(score: Tensor, mask: Tensor) -> Tensor:
    """int64 keys of ``score``; masked entries tie below everything, -Inf included."""
    return torch.where(mask, ordered_keys(score).long(), torch.iinfo(torch.int64).min)


def first_k(keys: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` largest keys of each row in ascending order; ties go to the lowest position."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, D) @ weight (D, F) + bias (F,), rounded once."""
    wide = accumulation_dtype(x)
    out = x.to(wide) @ weight.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def linear_16bit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same of 16-bit operands, fp32 sums with an fp32 bias rounded once to ``dtype``, theirs or fp32.

    ``x`` may have further columns: those that ``stock.linear_16bit.with_scales`` wrote, which say nothing.
    """
    return linear(x[:, : weight.shape[0]].float(), weight.float(), bias).to(dtype)


def encode_entries(
    x: Tensor, weight: Tensor, bias: Tensor | None, center: Tensor | None, entries: Tensor, indices: Tensor,
    offsets: Tensor, *_index,
) -> Tensor:
    """(N,): x (B, D) @ weight (D, F) + bias (F,) at each entry, in the dtype of ``entries``, which are its values.

    ``x`` is the input minus ``center`` (D,), a function of it.
    """
    if center is not None:
        x = x - (center - center.detach()).to(x.dtype)
    wide = accumulation_dtype(x, weight)
    return gather(linear(x.to(wide), weight.to(x.dtype).to(wide), bias), indices, offsets).to(entries.dtype)


def topk(pre: Tensor, score: Tensor | None, mask: Tensor | None, k: int, magnitude: bool, apply_relu: bool):
    """The k entries of each row that rank first. Returns values (B*k,), indices (B*k,)."""
    mask = eligible(mask, pre)
    by = pre.abs() if magnitude else pre if score is None else score
    kept = first_k(ranking(by, mask), k)
    values = torch.where(mask, relu(pre) if apply_relu else pre, 0.0).gather(1, kept)
    return values.flatten(), kept.flatten().int()


@torch.no_grad()
def merge_topk(
    values: Tensor, scores: Tensor | None, latents: Tensor, pre: Tensor, score: Tensor | None, mask: Tensor | None,
    first: int, magnitude: bool,
) -> None:
    """Merges a slab ``pre`` (B, C) into the k entries that each row holds, in place: of both, the k that rank first.

    A row holds ``values`` and ``latents`` (B, k), ascending and below ``first``, and, where a ``score`` (B, C) ranks,
    the ``scores`` of its entries. The slab's latents are ``first`` to ``first + C``; ``mask`` (F,) covers all latents.
    """
    columns = torch.arange(first, first + pre.shape[1], dtype=latents.dtype, device=latents.device)
    among = torch.cat([latents, columns.expand(pre.shape)], 1)
    new = torch.cat([values, pre], 1)
    new_scores = new.abs() if magnitude else new
    if scores is not None and score is not None:
        new_scores = torch.cat([scores, score], 1)
    allowed = torch.ones_like(new, dtype=torch.bool) if mask is None else mask[among.long()]
    kept = first_k(ranking(new_scores, allowed), latents.shape[1])
    values.copy_(new.gather(1, kept))
    latents.copy_(among.gather(1, kept))
    if scores is not None:
        scores.copy_(new_scores.gather(1, kept))


def batch_topk(pre: Tensor, mask: Tensor | None, total: int):
    """The ``total`` entries of the whole matrix with the largest relu(pre)."""
    mask = eligible(mask, pre)
    return compress(torch.where(mask, relu(pre), 0.0), first_k(ranking(relu(pre), mask).flatten(), total))


def feature_topm(pre: Tensor, m: Tensor, total: int):
    """The m[j] rows of each latent j with the largest relu(pre); ``total`` is the sum of m."""
    order = ordered_keys(relu(pre)).sort(dim=0, descending=True, stable=True).indices
    kept = order.argsort(dim=0) < m
    return compress(relu(pre), first_k(kept.flatten().int(), total))


def norm_match(pre: Tensor, target: Tensor, weight_norm: Tensor | None, is_share: bool, capacity: int | None):
    """The prefix of each row, ranked by relu(pre) * weight_norm, whose norm lies nearest to ``target`` (B,).

    With ``is_share`` the smallest whose energy reaches ``target`` times the row's.
    """
    return compress_kept(relu(pre), norm_matched(pre, target, weight_norm, is_share), capacity)


def norm_match_storing_all(pre: Tensor, target: Tensor, weight_norm: Tensor | None, is_share: bool, capacity=None):
    """The same for ``torch.func``: see :func:`store_all`."""
    kept = norm_matched(pre, target, weight_norm, is_share)
    return store_all(torch.where(kept, relu(pre), 0.0), kept)


def norm_matched(pre: Tensor, target: Tensor, weight_norm: Tensor | None, is_share: bool) -> Tensor:
    """(B, F) bool: what :func:`norm_match` keeps."""
    wide = torch.float64 if pre.dtype == torch.float64 else torch.float32
    score = relu(pre.detach()).to(wide)
    if weight_norm is not None:
        score = score * weight_norm.to(wide)
    target = target.detach().double()
    order = ordered_keys(score).sort(dim=-1, descending=True, stable=True).indices
    energy = score.gather(1, order).double().square().cumsum(-1)
    if is_share:
        count = (energy < (target * energy[:, -1])[:, None]).sum(-1) + 1
        everything = (target >= 1) & score.isfinite().all(-1)
    else:
        count = (energy.sqrt() - target[:, None]).abs().argmin(-1) + 1
        everything = target >= energy[:, -1].sqrt()
    positive = (score > 0) | score.isnan()
    count = torch.where(everything, pre.shape[1], count)
    return (order.argsort(dim=-1) < count[:, None]) & positive


def threshold(pre: Tensor, theta: Tensor, bandwidth: float | None, capacity: int | None, magnitude: bool):
    """Entries above theta (F,), with ``magnitude`` those that exceed it in magnitude; with ``bandwidth``, which goes
    with values alone, every entry above theta - bandwidth / 2, those up to theta as 0."""
    wide = pre.abs().to(theta.dtype) if magnitude else pre.to(theta.dtype)
    kept = (wide > (theta if bandwidth is None else theta - bandwidth / 2)) | pre.isnan()
    values = torch.where((wide > theta) | pre.isnan(), pre, 0.0)
    return compress_kept(values, kept, capacity)


def threshold_storing_all(pre: Tensor, theta: Tensor, bandwidth: float | None, capacity=None, magnitude=False):
    """The same for ``torch.func``: see :func:`store_all`. With ``bandwidth`` theta has the slope of ``ops.py``."""
    known, cut = pre.detach().to(theta.dtype), theta.detach()
    known = known.abs() if magnitude else known
    kept = (known > cut) | known.isnan()
    dense = torch.where(kept, pre, 0.0)
    if bandwidth is not None:  # a term that is 0, with the slope of the rectangle estimator and the slope of that
        inside = (known - cut).abs() < bandwidth / 2
        dense = dense + torch.where(inside, (cut.square() - theta.square()) / (2 * bandwidth), 0.0).to(pre.dtype)
    return store_all(dense, kept)


def compress(dense: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``dense`` (B, F) at ascending flat ``positions`` (N,) as compressed rows."""
    rows, num_latents = dense.shape
    counts = torch.zeros(rows + 1, dtype=torch.int64, device=dense.device)
    counts = counts.scatter_add(0, positions // max(num_latents, 1) + 1, torch.ones_like(positions))
    return dense.flatten().gather(0, positions), (positions % max(num_latents, 1)).int(), counts.cumsum(0)


def compress_kept(dense: Tensor, kept: Tensor, capacity: int | None = None):
    """The entries of ``dense`` (B, F) where ``kept``, padded or cut to ``capacity``; and how many they are."""
    values, indices, offsets = compress(dense, kept.flatten().nonzero()[:, 0])
    required = offsets[-1].clone()
    if capacity is None:
        return values, indices, offsets, required
    extra = max(capacity - values.numel(), 0)
    values, indices = (torch.cat([t, t.new_zeros(extra)])[:capacity] for t in (values, indices))
    return values, indices, offsets.clamp(max=capacity), required


def store_all(dense: Tensor, kept: Tensor):
    """What stands for :func:`compress_kept` where no size may follow from data: every entry of ``dense`` (B, F), which
    is 0 where it is not kept, whatever the capacity."""
    everything = torch.arange(dense.numel(), device=dense.device)
    return *compress(dense, everything), kept.sum()


def rows_of(offsets: Tensor, n: int) -> Tensor:
    """The row of each of ``n`` entries; entries past ``offsets[-1]`` get row B."""
    ends = torch.zeros(n + 1, dtype=torch.int64, device=offsets.device)
    return ends.scatter_add(0, offsets[1:], torch.ones_like(offsets[1:])).cumsum(0)[:n]


def places(indices: Tensor, offsets: Tensor, num_latents: int) -> Tensor:
    """Flat positions (N,) in a (B + 1, F) matrix, whose last row takes the entries that belong to none."""
    return rows_of(offsets, indices.numel()) * num_latents + indices.long().clamp(max=max(num_latents - 1, 0))


def to_dense(values: Tensor, indices: Tensor, offsets: Tensor, num_latents: int) -> Tensor:
    """(B, F): the values at their places, 0 elsewhere."""
    dense = values.new_zeros(offsets.numel(), num_latents)
    return dense.flatten().scatter(0, places(indices, offsets, num_latents), values).view(dense.shape)[:-1].clone()


def gather(dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """(N,): ``dense`` (B, F) read at each entry, 0 for entries that belong to no row."""
    padded = torch.cat([dense, dense.new_zeros(1, dense.shape[1])])
    return padded.flatten().gather(0, places(indices, offsets, dense.shape[1]))


def at_latents(vector: Tensor, indices: Tensor, *_index) -> Tensor:
    """(N,): ``vector`` (F,) read at the latent of each entry."""
    return vector[indices.long()]


def by_latent(indices: Tensor, offsets: Tensor, num_latents: int):
    """The transposed (CSC) index: latent_offsets (F + 1,), then rows and positions sorted by (latent, row)."""
    rows = rows_of(offsets, indices.numel())
    latents = torch.where(rows < offsets.numel() - 1, indices.long(), num_latents)
    latents, positions = latents.sort(stable=True)
    counts = torch.zeros(num_latents + 2, dtype=torch.int64, device=indices.device)
    starts = counts.scatter_add(0, latents + 1, torch.ones_like(latents)).cumsum(0)
    return starts[:-1], rows[positions].int(), positions


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 when an input is, otherwise fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def decode(
    values: Tensor, indices: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *_index
) -> Tensor:
    """(B, D): each row's sum of value * weight[index], plus bias."""
    wide = accumulation_dtype(values, weight)
    out = to_dense(values, indices, offsets, weight.shape[0]).to(wide) @ weight.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def decode_error(
    values: Tensor, indices: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(B, D): ``decode`` minus ``target``, in ``dtype``; and its squared norm (B,) before that rounding."""
    wide = accumulation_dtype(values, weight)
    residual = decode(values, indices, offsets, weight, bias, wide) - target.to(wide)
    return residual.to(dtype), residual.square().sum(1)


def decode_sources(
    values: list[Tensor], indices: list[Tensor], offsets: list[Tensor], weights: list[Tensor], firsts: list[int],
    width: int, bias: Tensor | None, target: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(B, width): to the columns from ``firsts`` on each source adds what its weight decodes; plus bias, minus target.

    With a target its squared norm (B,) before that is rounded into ``dtype`` comes along; without one (0,).
    """
    wide = accumulation_dtype(*values, *weights)
    out = weights[0].new_zeros(offsets[0].shape[0] - 1, width, dtype=wide)
    for first, weight, *codes in zip(firsts, weights, values, indices, offsets, strict=True):
        out[:, first : first + weight.shape[1]] += decode(codes[0], codes[1], codes[2], weight, None, wide)
    out = out if bias is None else out + bias.to(wide)
    if target is None:
        return out.to(dtype), out.new_zeros(0)
    residual = out - target.to(wide)
    return residual.to(dtype), residual.square().sum(1)


def decode_backward_values(grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """(N,): each entry's inner product of its row of ``grad`` (B, D) and its row of ``weight`` (F, D)."""
    wide = accumulation_dtype(grad, weight)
    return gather(grad.to(wide) @ weight.to(wide).T, indices, offsets).to(values.dtype)


def sparse_mlp(
    x: Tensor | None, kept: Tensor, up: Tensor | None, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    """(B, D_out): ``h @ down + down_bias``, h being ``kept`` (B, F), times ``x @ up.T + up_bias`` if there is ``up``.

    ``x`` (B, D), ``up`` (F, D), ``down`` (F, D_out). A neuron at 0 in ``kept`` is not kept: it has no part in its
    token's sum, whatever stands in its rows of the weights. Rounded once, to the dtype of ``kept``.
    """
    wide = accumulation_dtype(*(t for t in (x, kept, up, up_bias, down, down_bias) if t is not None))
    is_kept, hidden, down = kept != 0, kept.to(wide), down.to(wide)
    if x is not None and up is not None:
        hidden = hidden * linear(x.to(wide), up.to(wide).T, up_bias)
    hidden = torch.where(is_kept, hidden, 0.0)
    sums = [h @ torch.where(keeps[:, None], down, 0.0) for h, keeps in zip(hidden, is_kept, strict=True)]
    out = torch.stack(sums) if sums else down.new_zeros(0, down.shape[1])
    return (out if down_bias is None else out + down_bias.to(wide)).to(kept.dtype)


def decode_backward_weight(
    grad: Tensor, values: Tensor, latent_offsets: Tensor, rows: Tensor, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    """(F, D): each latent's sum of value * grad[row] over its entries."""
    wide = accumulation_dtype(grad, values)
    out = grad.new_zeros(latent_offsets.numel() - 1, grad.shape[1], dtype=wide)
    latents = rows_of(latent_offsets, positions.numel())
    owned = latents < out.shape[0]
    terms = values[positions].to(wide)[:, None] * grad.to(wide)[rows.long().clamp(max=max(grad.shape[0] - 1, 0))]
    return out.index_add_(0, latents[owned], terms[owned]).to(dtype)


def latent_gradients(x: Tensor, weight: Tensor, along: Tensor | None, *lists_and_dtype):
    """Gradients of the decoder (F, D_out), the transposed encoder (F, D_in) and its bias (F,), summed over the terms.

    A term is one decoder output ``codes @ weight`` whose codes come from ``x @ encoder + bias`` (``_terms.Term``).
    ``along`` (F,) adds ``along[f] * weight[f]``: what losses on a latent's norm ask for.
    """
    *lists, dtype = lists_and_dtype
    wide = accumulation_dtype(x, weight)
    x, weight = x.to(wide), weight.to(wide)
    grad_weight = torch.zeros_like(weight) if along is None else along.to(wide)[:, None] * weight
    grad_encoder, grad_bias = x.new_zeros(weight.shape[0], x.shape[1]), x.new_zeros(weight.shape[0])
    for term in terms_of(lists):
        grad = term.grad.to(wide)
        inner = gather(grad @ weight.T, term.indices, term.offsets)
        values, slopes = (
            to_dense(t.to(wide), term.indices, term.offsets, weight.shape[0])
            for t in (term.values, term.at_entries(inner))
        )
        grad_weight += values.T @ grad
        grad_encoder += slopes.T @ x
        grad_bias += slopes.sum(0)
    return grad_weight.to(dtype), grad_encoder.to(dtype), grad_bias.to(dtype)


def latent_adam(parameters, exp_avgs, exp_avg_sqs, copies, x: Tensor, along: Tensor | None, *rest):
    """One step of Adam (Kingma & Ba 2014, arXiv:1412.6980; coupled weight decay as torch.optim.Adam's), in place.

    ``parameters``: W_dec (F, D_out), W_enc.T (F, D_in) and, where it is trained, b_enc (F,); the moments likewise.
    ``copies``: none, or the weights in the dtype of the computation, which the gradients are taken with and which are
    written anew. ``step`` () counts this step too. ``unit_rows``: the part of W_dec's gradient along its row is removed
    before, its rows are scaled to norm 1 after. Where ``skip`` () is not 0, nothing changes. A weight's moments in
    bfloat16 beside fp32 parameters are :func:`_rounding.rounded` after the parameter has moved by the exact ones.

    Returns d(center) (D_in,), the gradient at what was subtracted from the input, by way of the encoder as it was; and
    the sum of squares () of the gradients that Adam saw, before weight decay.
    """
    lists, (step, lr, beta1, beta2, eps, weight_decay, unit_rows, skip) = rest[:NUMBER_OF_LISTS], rest[NUMBER_OF_LISTS:]
    weight, encoder = parameters[:2]
    wide = torch.promote_types(weight.dtype, torch.float32)
    grads = latent_gradients(x, copies[0] if copies else weight, along, *lists, wide)
    center = -(grads[2] @ encoder.to(wide))
    grads = ((without_parallel_part(grads[0], weight) if unit_rows else grads[0]), *grads[1:])[: len(parameters)]
    step = step.double()  # 1 - beta ** step is small at first
    for number, (parameter, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        decayed = grad + weight_decay * parameter.to(wide)
        first = beta1 * exp_avg.to(parameter.dtype) + (1 - beta1) * decayed
        second = beta2 * exp_avg_sq.to(parameter.dtype) + (1 - beta2) * decayed.square()
        root = (second / (1 - beta2**step)).sqrt() + eps
        moved = parameter - lr * first / (1 - beta1**step) / root
        if unit_rows and parameter is weight:
            moved = scaled_to_unit_rows(moved)
        if are_narrow(exp_avg, parameter):
            num_latents, width = parameter.shape
            bits = rounding_bits(step, number, num_latents, width, parameter.device)
            first, second = rounded(first, bits[0]), rounded(second, bits[1])
        for tensor, new in ((exp_avg, first), (exp_avg_sq, second), (parameter, moved)):
            tensor.copy_(new if skip is None else torch.where(skip != 0, tensor.to(new.dtype), new))
    for copy, parameter in zip(copies, parameters, strict=False):
        copy.copy_(parameter if skip is None else torch.where(skip != 0, copy.to(parameter.dtype), parameter))
    return center, sum(grad.square().sum() for grad in grads)


def without_parallel_part(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` (F, D) minus, row by row, its projection on ``weight``; rows of zeros have no direction."""
    weight = weight.to(grad.dtype)
    square = weight.square().sum(1, keepdim=True)
    along = (grad * weight).sum(1, keepdim=True) / torch.where(square == 0, 1.0, square)
    return grad - along * weight


def scaled_to_unit_rows(weight: Tensor) -> Tensor:
    """``weight`` (F, D) with rows of norm 1; rows of zeros stay."""
    norm = weight.norm(dim=1, keepdim=True)
    return weight / torch.where(norm == 0, 1.0, norm)
