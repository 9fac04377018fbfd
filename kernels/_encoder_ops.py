"""Contracts of the encoder: its product, its gradient at the codes, and a training step's pass."""

import torch

from . import _terms, densified
from ._contract import define, differentiable, once_differentiable, sum_by_latent
from .dispatch import implement, library, ops, resolve
from .stock import limits
from .stock import linear as stock_linear
from .stock import linear_16bit as stock_16bit

# --- linear: the encoder's product on a CPU -------------------------------------------------------------------------

library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
implement("linear", stock_linear.linear)


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


implement("encode_entries", _encode_entries)


@torch.library.register_fake("sae_engine::encode_entries", lib=library)
def _(x, weight, bias, center, entries, *_):
    return torch.empty_like(entries)


library.define(
    "encoder_gradient(Tensor x, Tensor grad, Tensor latent_offsets, Tensor latent_rows, Tensor latent_positions,"
    " ScalarType dtype, str backend) -> Tensor"
)


def _encoder_gradient(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    """``decode_backward_weight``, row-major as (D, F). On a CPU some latents at a time, transposed in the cache."""
    transposed, num_latents = (latent_offsets, latent_rows, latent_positions), latent_offsets.shape[0] - 1
    step = max(limits.TRANSPOSED_IN_CACHE // max(x.shape[1], 1), 1)
    in_chunks = x.is_cpu and resolve(backend, x, grad) == "torch" and num_latents > step
    if not in_chunks or densified.pays("decode_backward_weight", (x, grad, *transposed)):
        return ops.decode_backward_weight(x, grad, *transposed, dtype, backend).T.contiguous()
    out = x.new_empty((x.shape[1], num_latents), dtype=dtype)
    sparse = densified.DENSE_CHOICE.set(False)  # of the whole; some latents alone may be denser
    for start in range(0, num_latents, step):
        bounds = latent_offsets[start : start + step + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        transposed = bounds - entries.start, latent_rows[entries], latent_positions[entries]
        out[:, start : start + step] = ops.decode_backward_weight(x, grad, *transposed, dtype, backend).T
    densified.DENSE_CHOICE.reset(sparse)
    return out


implement("encoder_gradient", _encoder_gradient)


@torch.library.register_fake("sae_engine::encoder_gradient", lib=library)
def _(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    return x.new_empty((x.shape[1], latent_offsets.shape[0] - 1), dtype=dtype)


once_differentiable("encoder_gradient")


def _encode_entries_context(ctx, inputs, output):
    x, weight, bias, center, _, indices, offsets, *by_latent, ctx.backend = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, center)]
    ctx.save_for_backward(x, weight, indices, offsets, *by_latent)


def _encode_entries_backward(ctx, grad):
    x, weight, indices, offsets, *by_latent = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_center = ctx.needs_input_grad[:4]
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

# --- the latent pass: every gradient of a training step that belongs to a latent, latent by latent -------------------


@define(
    f"latent_gradients(Tensor x, Tensor weight, Tensor? along, {_terms.SCHEMA}, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
def _(x, weight, along, *terms_dtype_backend):
    """Gradients of W_dec (F, D_out), W_enc.T (F, D_in) and b_enc (F,) in ``dtype``, summed over all terms."""
    dtype, num_latents = terms_dtype_backend[-2], weight.shape[0]
    return (
        weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty((num_latents, x.shape[1]), dtype=dtype),
        weight.new_empty(num_latents, dtype=dtype),
    )


@define(
    "latent_adam(Tensor(a!)[] parameters, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies,"
    f" Tensor x, Tensor? along, {_terms.SCHEMA}, Tensor step, Tensor lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool unit_rows, Tensor? skip) -> (Tensor, Tensor)",
)
def _(parameters, exp_avgs, exp_avg_sqs, copies, x, *rest):
    """Adam's step of W_dec, W_enc.T and b_enc in place; returns d(center) (D_in,) and the squared gradient norm ()."""
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=wide), x.new_empty((), dtype=wide)


once_differentiable("latent_gradients")
