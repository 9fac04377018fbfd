"""The contract of every operation: schema, dispatch by back end, fake and gradient. Imports torch only.

This file has what an autoencoder's forward pass calls; ``_latent_ops.py`` has what works latent by latent.
``reference.py`` says what each means.
"""
import torch

from . import _latent_ops, budgets, reference  # noqa: F401 (_latent_ops registers its operations)
from ._contract import define, differentiable, empty_rows, stored_entries, sum_by_latent, weight_gradient_backward
from .dispatch import implement, library, ops
from .stock import linear as stock_linear
from .stock import linear_16bit as stock_16bit
from .stock.dense import uniform_offsets

__all__ = ["ops"]

# --- linear: the encoder's product on a CPU -------------------------------------------------------------------------

library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
implement("linear", stock_linear.linear, reference.linear)


@torch.library.register_fake("sae_engine::linear", lib=library)
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[1])


def _linear_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        ops.linear(grad, weight.T, None) if needs_x else None,
        ops.linear(x.T, grad, None) if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


differentiable("linear", _linear_context, _linear_backward)

# --- linear_16bit: the encoder's product of 16-bit operands ----------------------------------------------------------

@define("linear_16bit(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor")
def _(x, weight, bias, dtype, backend):
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


def _linear_16bit_context(ctx, inputs, output):
    x, weight, bias = inputs[:3]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _linear_16bit_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    with torch.autocast(x.device.type, enabled=False):
        grads = stock_16bit.gradients(grad, x, weight, needs_x, needs_weight)
    grads = (None if t is None else t.to(x.dtype) for t in grads)
    grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
    return *grads, grad_bias, None, None


differentiable("linear_16bit", _linear_16bit_context, _linear_16bit_backward)

# --- topk: k entries of each row -----------------------------------------------------------------------------------


@define("topk(Tensor pre, Tensor? score, Tensor? mask, SymInt k, bool magnitude, bool relu) -> (Tensor, Tensor)")
def _(pre, score, mask, k, magnitude, relu, backend):
    values, indices, _ = empty_rows(pre, pre.shape[0] * k)
    return values, indices


def _topk_context(ctx, inputs, output):
    pre, _, mask, ctx.k, _, ctx.relu, ctx.backend = inputs
    values, indices = output
    ctx.rows, ctx.num_latents = pre.shape
    gate = values if ctx.relu else None if mask is None else mask
    ctx.save_for_backward(indices, gate)
    ctx.set_materialize_grads(False)


def _topk_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    indices, gate = ctx.saved_tensors
    offsets = uniform_offsets(ctx.rows, ctx.k, indices.device)
    if ctx.relu:
        grad = torch.where(gate <= 0, 0.0, grad)
    elif gate is not None:
        allowed = gate.expand(ctx.rows, ctx.num_latents).gather(1, indices.view(ctx.rows, ctx.k).long())
        grad = torch.where(allowed.flatten(), grad, 0.0)
    return ops.to_dense(grad, indices, offsets, ctx.num_latents, ctx.backend), *(None,) * 6


differentiable("topk", _topk_context, _topk_backward)

# --- merge_topk: the same of rows that pass by in slabs of latents ---------------------------------------------------


@define(
    "merge_topk(Tensor(a!) values, Tensor(b!)? scores, Tensor(c!) latents, Tensor pre, Tensor? score, Tensor? mask,"
    " SymInt first, bool magnitude) -> ()",
)
def _(values, scores, latents, pre, score, mask, first, magnitude, backend):
    """No gradient flows to a slab: the encoder's goes by way of the entries that are kept once all have passed."""


# --- batch_topk: `total` entries of the whole matrix ---------------------------------------------------------------


@define("batch_topk(Tensor pre, Tensor? mask, SymInt total) -> (Tensor, Tensor, Tensor)")
def _(pre, mask, total, backend):
    return empty_rows(pre, total)


def _compressed_context(ctx, inputs, output):
    ctx.backend, ctx.num_latents = inputs[-1], inputs[0].shape[1]
    values, indices, offsets = output[:3]
    ctx.save_for_backward(values, indices, offsets)
    ctx.set_materialize_grads(False)


def _compressed_grad(ctx, grad):
    """d(pre) of a rule that stores relu(pre): stored zeros pass nothing."""
    values, indices, offsets = ctx.saved_tensors
    if grad is None:
        return None
    return ops.to_dense(torch.where(values <= 0, 0.0, grad), indices, offsets, ctx.num_latents, ctx.backend)


differentiable("batch_topk", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 3))

# --- feature_topm: m[j] entries of each latent j -------------------------------------------------------------------


@define("feature_topm(Tensor pre, Tensor m, SymInt total) -> (Tensor, Tensor, Tensor)")
def _(pre, m, total, backend):
    return empty_rows(pre, total)


differentiable("feature_topm", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 3))

# --- norm_match: the prefix of each row whose norm is nearest to a target, or that holds a share of its energy -----


@define(
    "norm_match(Tensor pre, Tensor target, Tensor? weight_norm, bool is_share, SymInt? capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    plain=reference.norm_match_storing_all,
)
def _(pre, target, weight_norm, is_share, capacity, backend):
    return *empty_rows(pre, stored_entries(capacity)), pre.new_empty((), dtype=torch.int64)


differentiable("norm_match", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 5))

# --- threshold: entries above theta --------------------------------------------------------------------------------


@define(
    "threshold(Tensor pre, Tensor theta, float? bandwidth, SymInt? capacity, bool magnitude)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    plain=reference.threshold_storing_all,
)
def _(pre, theta, bandwidth, capacity, magnitude, backend):
    return *empty_rows(pre, stored_entries(capacity)), pre.new_empty((), dtype=torch.int64)


def _threshold_context(ctx, inputs, output):
    pre, theta, ctx.bandwidth, *_, ctx.backend = inputs
    values, indices, offsets, _ = output
    ctx.num_latents = pre.shape[1]
    # The estimator of theta's gradient needs pre where the stored value is 0: pre itself is alive, a copy is not.
    ctx.save_for_backward(values, indices, offsets, *(() if ctx.bandwidth is None else (pre, theta)))
    ctx.set_materialize_grads(False)


def _threshold_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    values, indices, offsets, *window = ctx.saved_tensors
    grad_theta = None
    kept = grad
    if window:
        kept = torch.where(values == 0, 0.0, grad)
        if ctx.needs_input_grad[1]:
            grad_theta = _rectangle_gradient(ctx, grad, indices, offsets, *window)
    return ops.to_dense(kept, indices, offsets, ctx.num_latents, ctx.backend), grad_theta, *(None,) * 4


def _rectangle_gradient(ctx, grad, indices, offsets, pre, theta):
    """d(theta) = -(theta / bandwidth) * sum of grad over entries with |pre - theta| < bandwidth / 2."""
    distance = ops.gather(pre, indices, offsets, ctx.backend).to(theta.dtype) - theta[indices.long()]
    inside = torch.where(distance.abs() < ctx.bandwidth / 2, grad.to(theta.dtype), 0.0)
    latent_offsets, rows, positions = ops.by_latent(indices, offsets, ctx.num_latents, ctx.backend)
    ones = inside.new_ones(offsets.numel() - 1, 1)
    summed = ops.decode_backward_weight(ones, inside, latent_offsets, rows, positions, theta.dtype, ctx.backend)
    return -(theta / ctx.bandwidth) * summed[:, 0]


differentiable("threshold", _threshold_context, _threshold_backward)

# --- decode: each row's weighted sum of weight rows ----------------------------------------------------------------


@define(
    "decode(Tensor values, Tensor indices, Tensor offsets, Tensor weight, Tensor? bias, ScalarType dtype,"
    " Tensor? latent_offsets, Tensor? latent_rows, Tensor? latent_positions) -> Tensor",
)
def _(values, indices, offsets, weight, bias, dtype, latent_offsets, latent_rows, latent_positions, backend):
    return weight.new_empty((offsets.shape[0] - 1, weight.shape[1]), dtype=dtype)


@define("decode_backward_values(Tensor grad, Tensor values, Tensor indices, Tensor offsets, Tensor weight) -> Tensor")
def _(grad, values, indices, offsets, weight, backend):
    return torch.empty_like(values)


@define(
    "decode_backward_weight(Tensor grad, Tensor values, Tensor latent_offsets, Tensor latent_rows,"
    " Tensor latent_positions, ScalarType dtype) -> Tensor",
)
def _(grad, values, latent_offsets, latent_rows, latent_positions, dtype, backend):
    return grad.new_empty((latent_offsets.shape[0] - 1, grad.shape[1]), dtype=dtype)


def _decode_context(ctx, inputs, output):
    values, indices, offsets, weight, bias, _, *by_latent, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, offsets, weight, *by_latent)


def _decode_backward(ctx, grad):
    values, indices, offsets, weight, *by_latent = ctx.saved_tensors
    grads = _gradients(ctx, grad.contiguous(), values, indices, offsets, weight, by_latent)
    return *grads, *(None,) * 5


def _gradients(ctx, grad, values, indices, offsets, weight, by_latent):
    """Of values, indices, offsets, weight and bias, from that of the decoder's output."""
    grad_values = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_values = ops.decode_backward_values(grad, values, indices, offsets, weight, ctx.backend)
    if ctx.needs_input_grad[3]:
        if by_latent[0] is None:
            by_latent = ops.by_latent(indices, offsets, weight.shape[0], ctx.backend)
        grad_weight = ops.decode_backward_weight(grad, values, *by_latent, weight.dtype, ctx.backend)
    if ctx.needs_input_grad[4]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_bias = grad.sum(0, dtype=wide).to(ctx.bias_dtype)
    return grad_values, None, None, grad_weight, grad_bias


differentiable("decode", _decode_context, _decode_backward)


@define(
    "decode_error(Tensor values, Tensor indices, Tensor offsets, Tensor weight, Tensor? bias, Tensor target,"
    " ScalarType dtype) -> (Tensor, Tensor)",
)
def _(values, indices, offsets, weight, bias, target, dtype, backend):
    wide = torch.promote_types(torch.promote_types(values.dtype, weight.dtype), torch.float32)
    rows = offsets.shape[0] - 1
    return weight.new_empty((rows, weight.shape[1]), dtype=dtype), weight.new_empty(rows, dtype=wide)


def _decode_error_context(ctx, inputs, output):
    values, indices, offsets, weight, bias, target, _, ctx.backend = inputs
    ctx.bias_dtype, ctx.target_dtype = None if bias is None else bias.dtype, target.dtype
    ctx.save_for_backward(values, indices, offsets, weight, None, None, None, output[0])


def _decode_error_backward(ctx, grad, grad_squares):
    """The gradient at the residual, of both outputs together, goes on as decode's."""
    *saved, residual = ctx.saved_tensors
    grad = grad + (2 * grad_squares[:, None] * residual).to(grad.dtype)
    values, indices, offsets, weight = saved[:4]
    grads = _gradients(ctx, grad.contiguous(), values, indices, offsets, weight, (None,) * 3)
    return *grads, -grad.to(ctx.target_dtype) if ctx.needs_input_grad[5] else None, None, None


differentiable("decode_error", _decode_error_context, _decode_error_backward)


# Gradients of gradients are sums of the same kinds: where autograd builds a graph of a backward pass, it meets these.


def _values_context(ctx, inputs, output):
    grad, _, indices, offsets, weight, ctx.backend = inputs
    ctx.save_for_backward(grad, indices, offsets, weight)


def _values_backward(ctx, outer):
    """Of <grad[row], weight[index]>, from ``outer`` (N,)."""
    grad, indices, offsets, weight = ctx.saved_tensors
    at_grad = at_weight = None
    if ctx.needs_input_grad[0]:
        at_grad = ops.decode(outer, indices, offsets, weight, None, grad.dtype, None, None, None, ctx.backend)
    if ctx.needs_input_grad[4]:
        by_latent = ops.by_latent(indices, offsets, weight.shape[0], ctx.backend)
        at_weight = ops.decode_backward_weight(grad, outer, *by_latent, weight.dtype, ctx.backend)
    return at_grad, None, None, None, at_weight, None


def _weight_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


differentiable("decode_backward_values", _values_context, _values_backward)
differentiable("decode_backward_weight", _weight_context, weight_gradient_backward)

# --- to_dense and gather: codes to a matrix, a matrix at the codes -------------------------------------------------


@define("to_dense(Tensor values, Tensor indices, Tensor offsets, SymInt num_latents) -> Tensor")
def _(values, indices, offsets, num_latents, backend):
    return values.new_empty((offsets.shape[0] - 1, num_latents))


@define("gather(Tensor dense, Tensor indices, Tensor offsets) -> Tensor")
def _(dense, indices, offsets, backend):
    return dense.new_empty(indices.shape[0])


def _to_dense_context(ctx, inputs, output):
    _, indices, offsets, _, ctx.backend = inputs
    ctx.save_for_backward(indices, offsets)


def _gather_context(ctx, inputs, output):
    dense, indices, offsets, ctx.backend = inputs
    ctx.num_latents = dense.shape[1]
    ctx.save_for_backward(indices, offsets)


differentiable(
    "to_dense",
    _to_dense_context,
    lambda ctx, grad: (ops.gather(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None),
)
differentiable(
    "gather",
    _gather_context,
    lambda ctx, grad: (ops.to_dense(grad, *ctx.saved_tensors, ctx.num_latents, ctx.backend), None, None, None),
)

# --- by_latent: rows -> latents, once per step ---------------------------------------------------------------------


@define("by_latent(Tensor indices, Tensor offsets, SymInt num_latents) -> (Tensor, Tensor, Tensor)")
def _(indices, offsets, num_latents, backend):
    latent_offsets = offsets.new_empty(num_latents + 1)
    return latent_offsets, torch.empty_like(indices), indices.new_empty(indices.shape[0], dtype=torch.int64)

# --- at_latents: a vector over latents, read at the codes ------------------------------------------------------------

library.define(
    "at_latents(Tensor vector, Tensor indices, Tensor offsets, Tensor? latent_offsets, Tensor? latent_rows,"
    " Tensor? latent_positions, str backend) -> Tensor"
)
implement("at_latents", reference.at_latents, reference.at_latents)


@torch.library.register_fake("sae_engine::at_latents", lib=library)
def _(vector, indices, offsets, latent_offsets, latent_rows, latent_positions, backend):
    return vector.new_empty(indices.shape[0])


def _at_latents_context(ctx, inputs, output):
    vector, indices, offsets, *by_latent, ctx.backend = inputs
    ctx.num_latents = vector.shape[0]
    ctx.save_for_backward(indices, offsets, *by_latent)


def _at_latents_backward(ctx, grad):
    indices, offsets, *by_latent = ctx.saved_tensors
    if by_latent[0] is None:
        by_latent = ops.by_latent(indices, offsets, ctx.num_latents, ctx.backend)
    return sum_by_latent(grad, by_latent, offsets.numel() - 1, grad.dtype, ctx.backend), *(None,) * 6


differentiable("at_latents", _at_latents_context, _at_latents_backward)

# --- encode_entries: pre-activations at the codes, whose gradient never becomes a matrix -----------------------------

library.define(
    "encode_entries(Tensor x, Tensor weight, Tensor? bias, Tensor? center, Tensor entries, Tensor indices,"
    " Tensor offsets, Tensor? latent_offsets, Tensor? latent_rows, Tensor? latent_positions, str backend) -> Tensor"
)


def _encode_entries(x, weight, bias, center, entries, *_):
    """``entries`` (N,) of x @ weight + bias, as the function of x (B, D), weight (D, F), bias and center that they are.

    x already is the input minus ``center`` (D,), which is here for its gradient alone.
    """
    return entries.clone()


implement("encode_entries", _encode_entries, reference.encode_entries)


@torch.library.register_fake("sae_engine::encode_entries", lib=library)
def _(x, weight, bias, center, entries, *_):
    return torch.empty_like(entries)


def _encode_entries_context(ctx, inputs, output):
    x, weight, bias, center, _, indices, offsets, *by_latent, ctx.backend = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, center)]
    ctx.save_for_backward(x, weight, center, indices, offsets, *by_latent)


def _encode_entries_backward(ctx, grad):
    x, weight, center, indices, offsets, *by_latent = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_center = ctx.needs_input_grad[:4]
    if needs_center and needs_weight and torch.is_grad_enabled():  # the weight's gradient is a function of the center
        x = x - (center - center.detach()).to(x.dtype)
    num_latents = weight.shape[1]
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_x = grad_weight = grad_bias = grad_center = None
    if by_latent[0] is None and (needs_weight or needs_bias or needs_center):
        by_latent = ops.by_latent(indices, offsets, num_latents, ctx.backend)
    if needs_x:
        columns = weight.T.to(x.dtype)  # the operand that the forward pass multiplied with
        grad_x = ops.decode(grad, indices, offsets, columns, None, x.dtype, None, None, None, ctx.backend)
    if needs_weight:
        if weight.stride(0) > weight.stride(1) == 1:  # autograd would copy another layout, at the expense of memory
            grad_weight = ops.encoder_gradient(x, grad, *by_latent, weight.dtype, ctx.backend)
        else:
            grad_weight = ops.decode_backward_weight(x, grad, *by_latent, weight.dtype, ctx.backend).T
    if needs_bias or needs_center:
        grad_bias = sum_by_latent(grad, by_latent, x.shape[0], wide, ctx.backend)
        if needs_center:
            with torch.autocast(x.device.type, enabled=False):
                grad_center = -(weight.to(wide) @ grad_bias).to(ctx.dtypes[3])
        grad_bias = grad_bias.to(ctx.dtypes[2]) if needs_bias else None
    return grad_x, grad_weight, grad_bias, grad_center, *(None,) * 7


differentiable("encode_entries", _encode_entries_context, _encode_entries_backward)

# --- move_threshold: the running threshold of batch rules ------------------------------------------------------------

library.define("move_threshold(Tensor(a!) threshold, Tensor smallest, float rate) -> ()")


def _move_threshold(threshold, smallest, rate):
    """Moves ``threshold`` towards the batch's ``smallest`` positive value: while unset (-1) all the way, else by rate.

    Not where nothing positive was kept (+Inf), and not in the second run of a checkpointed forward, which is known
    when it runs, not when it is traced: hence an operator.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    moved = torch.where(threshold < 0, smallest, threshold.lerp(smallest, rate))
    threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))


implement("move_threshold", _move_threshold)
torch.library.register_fake("sae_engine::move_threshold", lambda threshold, smallest, rate: None, lib=library)

# --- feature_budgets: tokens per latent of feature choice ------------------------------------------------------------

library.define("feature_budgets(Tensor density, SymInt total, SymInt rows, float exponent, float shift) -> Tensor")
implement("feature_budgets", budgets.budgets)


@torch.library.register_fake("sae_engine::feature_budgets", lib=library)
def _(density, total, rows, exponent, shift):
    return torch.empty_like(density, dtype=torch.int32)


library.define("zipf_shortfall(Tensor density, float k, float exponent, float shift) -> Tensor")
implement("zipf_shortfall", budgets.zipf_shortfall)
torch.library.register_fake("sae_engine::zipf_shortfall", lambda density, *_: torch.empty_like(density), lib=library)
