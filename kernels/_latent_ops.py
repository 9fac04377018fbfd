"""Contracts of what works latent by latent: the encoder's gradient at the codes, a training step's pass, an MLP's kept
neurons."""
import torch

from . import _terms
from ._contract import define, differentiable, not_differentiable, once_differentiable, weight_gradient_backward
from .dispatch import implement, library, ops, resolve
from .stock import densified, limits

# --- encoder_gradient: of the encoder's weight, in its own layout ----------------------------------------------------

library.define(
    "encoder_gradient(Tensor x, Tensor grad, Tensor latent_offsets, Tensor latent_rows, Tensor latent_positions,"
    " ScalarType dtype, str backend) -> Tensor"
)


def _encoder_gradient(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    """``decode_backward_weight``, row-major as (D, F).

    On a CPU it is made for some latents at a time, which are transposed while the cache holds them.
    """
    transposed, num_latents = (latent_offsets, latent_rows, latent_positions), latent_offsets.shape[0] - 1
    step = max(limits.TRANSPOSED_IN_CACHE // max(x.shape[1], 1), 1)
    in_chunks = x.is_cpu and resolve(backend, x, grad) == "torch" and num_latents > step
    if not in_chunks or densified.pays("decode_backward_weight", (x, grad, *transposed)):
        return ops.decode_backward_weight(x, grad, *transposed, dtype, backend).T.contiguous()
    out = x.new_empty((x.shape[1], num_latents), dtype=dtype)
    with densified.choosing(False):  # decided above for all latents together; a part of them may be denser
        for start in range(0, num_latents, step):
            bounds = latent_offsets[start : start + step + 1]
            entries = slice(int(bounds[0]), int(bounds[-1]))
            transposed = bounds - entries.start, latent_rows[entries], latent_positions[entries]
            out[:, start : start + step] = ops.decode_backward_weight(x, grad, *transposed, dtype, backend).T
    return out


implement("encoder_gradient", _encoder_gradient)


@torch.library.register_fake("sae_engine::encoder_gradient", lib=library)
def _(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    return x.new_empty((x.shape[1], latent_offsets.shape[0] - 1), dtype=dtype)



def _encoder_gradient_context(ctx, inputs, output):
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


differentiable(
    "encoder_gradient", _encoder_gradient_context, lambda ctx, outer: weight_gradient_backward(ctx, outer.T)
)

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

# --- decode_sources: what several sources of latents write, side by side or over one another --------------------------


@define(
    "decode_sources(Tensor[] values, Tensor[] indices, Tensor[] offsets, Tensor[] weights, int[] firsts, int width,"
    " Tensor? bias, Tensor? target, ScalarType dtype) -> (Tensor, Tensor)",
)
def _(values, indices, offsets, weights, firsts, width, bias, target, dtype, backend):
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (*values, *weights)) else torch.float32
    rows = offsets[0].shape[0] - 1
    return (
        weights[0].new_empty((rows, width), dtype=dtype),
        weights[0].new_empty(0 if target is None else rows, dtype=wide),
    )


not_differentiable("decode_sources", "has no gradient here: decode each source where one is asked for")

# --- sparse_mlp: the neurons of an MLP that its tokens keep ----------------------------------------------------------


@define("sparse_mlp(Tensor? x, Tensor kept, Tensor? up, Tensor? up_bias, Tensor down, Tensor? down_bias) -> Tensor")
def _(x, kept, up, up_bias, down, down_bias, backend):
    return kept.new_empty((kept.shape[0], down.shape[1]))


not_differentiable("sparse_mlp", "has no gradient: run the dense MLP where one is asked for")
