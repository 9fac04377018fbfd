"""The contract of every operation: schema, dispatch by back end, fake and gradient. Imports torch only.

An operation lives once in ``torch.library`` under ``sae_engine::``; its last argument names the back end, so the
choice is visible to the compiler and never guessed from the device. The implementation is imported when it is
first called, which is why a machine without Triton can import this file. ``reference.py`` says what each means.
"""
import functools
import importlib

import torch
from torch import Tensor

from . import _autotune, _terms, _tuning, budgets, cpu_gemm

BACKENDS = ("triton", "torch", "reference")

_library = torch.library.Library("sae_engine", "DEF")
ops = torch.ops.sae_engine


@functools.cache
def _implementation(name: str, launcher: str, backend: str):
    if backend == "triton":
        stem, function = launcher.split(".")
    else:
        stem, function = {"torch": "torch_backend"}.get(backend, backend), name
    return getattr(importlib.import_module(f".{stem}", __package__), function)


def _is_dense(name: str, args: tuple) -> bool:
    """Whether an operation on codes does better as a GEMM: decided by shapes alone, hence alike on every run."""
    if name == "decode":
        values, _, offsets, weight = args[:4]
        rows, columns = offsets.numel() - 1, weight.shape[0]
    elif name == "decode_backward_values":
        grad, values, _, _, weight = args[:5]
        rows, columns = grad.shape[0], weight.shape[0]
    elif name == "decode_backward_weight":
        grad, values, latent_offsets = args[:3]
        rows, columns = grad.shape[0], latent_offsets.numel() - 1
    else:
        return False
    return _tuning.is_dense(name, values.numel(), rows, columns, values.device.type)


# Their kernels take the arrays of a code's entries without strides.
_ON_ENTRIES = {"decode", "decode_backward_values", "decode_backward_weight", "to_dense", "gather", "by_latent"}


_IN_PLACE = {"latent_adam"}  # what a search must try on copies


def _run(name: str, launcher: str, *args):
    first = args[0][0] if isinstance(args[0], list) else args[0]
    kind = first.device.type
    if torch.is_autocast_enabled(kind):  # dtypes were decided by the caller; a GEMM in here must not decide anew
        with torch.autocast(kind, enabled=False):
            return _run(name, launcher, *args)
    backend, inputs = args[-1], args[:-1]
    if name in _ON_ENTRIES:
        inputs = tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in inputs)
    if backend != "reference" and _is_dense(name, inputs):
        return _implementation(name, "", "densified")(*inputs)
    run = _implementation(name, launcher, backend)
    if backend != "triton":
        return run(*inputs)
    with torch.cuda.device_of(first):  # Triton launches on the current device, which need not be the tensors'
        if _autotune.is_on():
            return _autotune.run(launcher, run, inputs, mutates=name in _IN_PLACE)
        return run(*inputs)


def _define(signature: str, launcher: str):
    """Registers ``signature`` (its `str backend` is appended) and returns the decorator for its fake."""
    name, arguments = signature.split("(", 1)
    _library.define(f"{name}({arguments.replace(') ->', ', str backend) ->', 1)}")
    _library.impl(name, functools.partial(_run, name, launcher), "CompositeExplicitAutograd")
    return torch.library.register_fake(f"sae_engine::{name}", lib=_library)


def _differentiable(name: str, setup_context, backward) -> None:
    torch.library.register_autograd(f"sae_engine::{name}", backward, setup_context=setup_context, lib=_library)


def _not_differentiable(name: str, why: str) -> None:
    """Differentiating the operation raises, where it would otherwise return zeros."""

    def backward(ctx, *grads):
        raise RuntimeError(f"sae_engine::{name} {why}")

    _differentiable(name, lambda ctx, inputs, output: None, backward)


def _once_differentiable(name: str) -> None:
    _not_differentiable(name, "is itself a gradient and cannot be differentiated again")


def _sizes(count: int | None):
    """The number of entries that a data-dependent rule stores: its capacity, or unknown until it has run."""
    return torch.library.get_ctx().new_dynamic_size() if count is None else count


def _rows(pre: Tensor, count):
    indices = pre.new_empty(count, dtype=torch.int32)
    return pre.new_empty(count), indices, pre.new_empty(pre.shape[0] + 1, dtype=torch.int64)


def uniform_offsets(rows: int, k: int, device: torch.device) -> Tensor:
    """Offsets (rows + 1,) of rows that hold ``k`` entries each."""
    return torch.arange(rows + 1, dtype=torch.int64, device=device) * k


# --- topk: k entries of each row -----------------------------------------------------------------------------------


@_define(
    "topk(Tensor pre, Tensor? score, Tensor? mask, SymInt k, bool magnitude, bool relu) -> (Tensor, Tensor)",
    "row_topk.launch",
)
def _(pre, score, mask, k, magnitude, relu, backend):
    values, indices, _ = _rows(pre, pre.shape[0] * k)
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


_differentiable("topk", _topk_context, _topk_backward)

# --- batch_topk: `total` entries of the whole matrix ---------------------------------------------------------------


@_define("batch_topk(Tensor pre, Tensor? mask, SymInt total) -> (Tensor, Tensor, Tensor)", "batch_topk.launch")
def _(pre, mask, total, backend):
    return _rows(pre, total)


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


_differentiable("batch_topk", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 3))

# --- encode_topk, encode_batch_topk: the encoder's product and a selection from it -----------------------------------


def _architecture(device: torch.device) -> str:
    """What ``_tuning.FUSED_ENCODER`` is keyed by: sm_90, gfx942; elsewhere the kind of device."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, groups, magnitude: bool, rank_relu: bool, backend: str):
    """x @ weight + bias; the maxima of its groups of latents, where the kernel that takes them along is the choice."""
    size = None if groups is None else groups.size
    rows, width = x.shape
    if backend == "triton" and _tuning.fuses_encoder(rows, width, size, x.dtype, _architecture(x.device)):
        return _run("encode", "encode.launch", x, weight, bias, size, magnitude, rank_relu, backend)
    return _run("linear", "", x, weight, bias, "torch" if backend == "triton" else backend), None


def _encode_topk(x, weight, bias, k, magnitude, relu, backend):
    groups = _tuning.row_groups(weight.shape[1], k)
    pre, maxima = _product(x, weight, bias, groups, magnitude, False, backend)
    known = () if maxima is None else (maxima,)
    return pre, *_run("topk", "row_topk.launch", pre, None, None, k, magnitude, relu, *known, backend)


def _encode_batch_topk(x, weight, bias, total, backend):
    rows = x.shape[0]
    groups = _tuning.batch_groups(rows, weight.shape[1], total) if total else None
    pre, maxima = _product(x, weight, bias, groups, False, True, backend)
    known = () if maxima is None else (maxima,)
    return pre, *_run("batch_topk", "batch_topk.launch", pre, None, total, *known, backend)


def _alike(name: str, run, *args):
    """Product and selection are one operation to a search, and their groups the same under any table."""
    if args[-1] == "triton" and _autotune.is_on():
        return _autotune.run(name, run, args, mutates=False)
    return run(*args)


_library.define(
    "encode_topk(Tensor x, Tensor weight, Tensor? bias, SymInt k, bool magnitude, bool relu, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("encode_topk", functools.partial(_alike, "encode.topk", _encode_topk), "CompositeExplicitAutograd")
_library.define(
    "encode_batch_topk(Tensor x, Tensor weight, Tensor? bias, SymInt total, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl(
    "encode_batch_topk", functools.partial(_alike, "encode.batch_topk", _encode_batch_topk), "CompositeExplicitAutograd"
)


@torch.library.register_fake("sae_engine::encode_topk", lib=_library)
def _(x, weight, bias, k, magnitude, relu, backend):
    """Pre-activations (B, F), and ``topk``'s values and indices; x (B, D) and weight (D, F) have one dtype."""
    values, indices, _ = _rows(x, x.shape[0] * k)
    return x.new_empty((x.shape[0], weight.shape[1])), values, indices


@torch.library.register_fake("sae_engine::encode_batch_topk", lib=_library)
def _(x, weight, bias, total, backend):
    """Pre-activations (B, F), and ``batch_topk``'s values, indices and offsets."""
    return x.new_empty((x.shape[0], weight.shape[1])), *_rows(x, total)


for _name in ("encode_topk", "encode_batch_topk"):
    _not_differentiable(_name, "leaves the gradient of what it keeps to encode_entries")

# --- feature_topm: m[j] entries of each latent j -------------------------------------------------------------------


@_define("feature_topm(Tensor pre, Tensor m, SymInt total) -> (Tensor, Tensor, Tensor)", "feature_topm.launch")
def _(pre, m, total, backend):
    return _rows(pre, total)


_differentiable("feature_topm", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 3))

# --- norm_match: the prefix of each row whose norm is nearest to a target ------------------------------------------


@_define(
    "norm_match(Tensor pre, Tensor target_norm, Tensor? weight_norm, SymInt? capacity)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "norm_match.launch",
)
def _(pre, target_norm, weight_norm, capacity, backend):
    return *_rows(pre, _sizes(capacity)), pre.new_empty((), dtype=torch.int64)


_differentiable("norm_match", _compressed_context, lambda ctx, grad, *_: (_compressed_grad(ctx, grad), *(None,) * 4))

# --- threshold: entries above theta --------------------------------------------------------------------------------


@_define(
    "threshold(Tensor pre, Tensor theta, float? bandwidth, SymInt? capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    "threshold.launch",
)
def _(pre, theta, bandwidth, capacity, backend):
    return *_rows(pre, _sizes(capacity)), pre.new_empty((), dtype=torch.int64)


def _threshold_context(ctx, inputs, output):
    pre, theta, ctx.bandwidth, _, ctx.backend = inputs
    values, indices, offsets, _ = output
    ctx.num_latents = pre.shape[1]
    # The estimator of theta's gradient needs pre where the stored value is 0: pre itself is alive, a copy is not.
    ctx.save_for_backward(values, indices, offsets, *(() if ctx.bandwidth is None else (pre, theta)))
    ctx.set_materialize_grads(False)


def _threshold_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    values, indices, offsets, *window = ctx.saved_tensors
    grad_theta = None
    kept = grad
    if window:
        kept = torch.where(values == 0, 0.0, grad)
        if ctx.needs_input_grad[1]:
            grad_theta = _rectangle_gradient(ctx, grad, indices, offsets, *window)
    return ops.to_dense(kept, indices, offsets, ctx.num_latents, ctx.backend), grad_theta, None, None, None


def _rectangle_gradient(ctx, grad, indices, offsets, pre, theta):
    """d(theta) = -(theta / bandwidth) * sum of grad over entries with |pre - theta| < bandwidth / 2."""
    distance = ops.gather(pre, indices, offsets, ctx.backend).to(theta.dtype) - theta[indices.long()]
    inside = torch.where(distance.abs() < ctx.bandwidth / 2, grad.to(theta.dtype), 0.0)
    latent_offsets, rows, positions = ops.by_latent(indices, offsets, ctx.num_latents, ctx.backend)
    ones = inside.new_ones(offsets.numel() - 1, 1)
    summed = ops.decode_backward_weight(ones, inside, latent_offsets, rows, positions, theta.dtype, ctx.backend)
    return -(theta / ctx.bandwidth) * summed[:, 0]


_differentiable("threshold", _threshold_context, _threshold_backward)

# --- decode: each row's weighted sum of weight rows ----------------------------------------------------------------


@_define(
    "decode(Tensor values, Tensor indices, Tensor offsets, Tensor weight, Tensor? bias, ScalarType dtype,"
    " Tensor? latent_offsets, Tensor? latent_rows, Tensor? latent_positions) -> Tensor",
    "decode.launch",
)
def _(values, indices, offsets, weight, bias, dtype, latent_offsets, latent_rows, latent_positions, backend):
    return weight.new_empty((offsets.shape[0] - 1, weight.shape[1]), dtype=dtype)


@_define(
    "decode_backward_values(Tensor grad, Tensor values, Tensor indices, Tensor offsets, Tensor weight) -> Tensor",
    "backward.launch_values",
)
def _(grad, values, indices, offsets, weight, backend):
    return torch.empty_like(values)


@_define(
    "decode_backward_weight(Tensor grad, Tensor values, Tensor latent_offsets, Tensor latent_rows,"
    " Tensor latent_positions, ScalarType dtype) -> Tensor",
    "backward.launch_weight",
)
def _(grad, values, latent_offsets, latent_rows, latent_positions, dtype, backend):
    return grad.new_empty((latent_offsets.shape[0] - 1, grad.shape[1]), dtype=dtype)


def _decode_context(ctx, inputs, output):
    values, indices, offsets, weight, bias, _, *by_latent, ctx.backend = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, offsets, weight, *by_latent)


def _decode_backward(ctx, grad):
    values, indices, offsets, weight, *by_latent = ctx.saved_tensors
    grad = grad.contiguous()
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
    return grad_values, None, None, grad_weight, grad_bias, *(None,) * 5


_differentiable("decode", _decode_context, _decode_backward)
_once_differentiable("decode_backward_values")
_once_differentiable("decode_backward_weight")

# --- to_dense and gather: codes to a matrix, a matrix at the codes -------------------------------------------------


@_define(
    "to_dense(Tensor values, Tensor indices, Tensor offsets, SymInt num_latents) -> Tensor", "dense.launch_to_dense"
)
def _(values, indices, offsets, num_latents, backend):
    return values.new_empty((offsets.shape[0] - 1, num_latents))


@_define("gather(Tensor dense, Tensor indices, Tensor offsets) -> Tensor", "dense.launch_gather")
def _(dense, indices, offsets, backend):
    return dense.new_empty(indices.shape[0])


def _to_dense_context(ctx, inputs, output):
    _, indices, offsets, _, ctx.backend = inputs
    ctx.save_for_backward(indices, offsets)


def _gather_context(ctx, inputs, output):
    dense, indices, offsets, ctx.backend = inputs
    ctx.num_latents = dense.shape[1]
    ctx.save_for_backward(indices, offsets)


_differentiable(
    "to_dense",
    _to_dense_context,
    lambda ctx, grad: (ops.gather(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None),
)
_differentiable(
    "gather",
    _gather_context,
    lambda ctx, grad: (ops.to_dense(grad, *ctx.saved_tensors, ctx.num_latents, ctx.backend), None, None, None),
)

# --- by_latent: rows -> latents, once per step ---------------------------------------------------------------------


@_define(
    "by_latent(Tensor indices, Tensor offsets, SymInt num_latents) -> (Tensor, Tensor, Tensor)",
    "dense.launch_by_latent",
)
def _(indices, offsets, num_latents, backend):
    latent_offsets = offsets.new_empty(num_latents + 1)
    return latent_offsets, torch.empty_like(indices), indices.new_empty(indices.shape[0], dtype=torch.int64)

# --- at_latents: a vector over latents, read at the codes ------------------------------------------------------------

_library.define(
    "at_latents(Tensor vector, Tensor indices, Tensor offsets, Tensor? latent_offsets, Tensor? latent_rows,"
    " Tensor? latent_positions, str backend) -> Tensor"
)
_library.impl("at_latents", lambda vector, indices, *_: vector[indices.long()], "CompositeExplicitAutograd")


@torch.library.register_fake("sae_engine::at_latents", lib=_library)
def _(vector, indices, offsets, latent_offsets, latent_rows, latent_positions, backend):
    return vector.new_empty(indices.shape[0])


def _sum_by_latent(entries, by_latent, rows, dtype, backend):
    """(F,) sums of ``entries`` (N,) over each latent's entries, in a fixed order: index_put's order varies."""
    ones = entries.new_ones(rows, 1)
    return ops.decode_backward_weight(ones, entries, *by_latent, dtype, backend)[:, 0]


def _at_latents_context(ctx, inputs, output):
    vector, indices, offsets, *by_latent, ctx.backend = inputs
    ctx.num_latents = vector.shape[0]
    ctx.save_for_backward(indices, offsets, *by_latent)


def _at_latents_backward(ctx, grad):
    indices, offsets, *by_latent = ctx.saved_tensors
    if by_latent[0] is None:
        by_latent = ops.by_latent(indices, offsets, ctx.num_latents, ctx.backend)
    return _sum_by_latent(grad, by_latent, offsets.numel() - 1, grad.dtype, ctx.backend), *(None,) * 6


_differentiable("at_latents", _at_latents_context, _at_latents_backward)

# --- move_threshold: the running threshold of batch rules ------------------------------------------------------------

_library.define("move_threshold(Tensor(a!) threshold, Tensor smallest, float rate) -> ()")


def _move_threshold(threshold, smallest, rate):
    """Moves ``threshold`` towards the batch's ``smallest`` positive value: while unset (-1) all the way, else by rate.

    Not where nothing positive was kept (+Inf), and not in the second run of a checkpointed forward, which is known
    when it runs, not when it is traced: hence an operator.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    moved = torch.where(threshold < 0, smallest, threshold.lerp(smallest, rate))
    threshold.copy_(torch.where(smallest.isfinite(), moved, threshold))


_library.impl("move_threshold", _move_threshold, "CompositeExplicitAutograd")
torch.library.register_fake("sae_engine::move_threshold", lambda threshold, smallest, rate: None, lib=_library)

# --- feature_budgets: tokens per latent of feature choice ------------------------------------------------------------

_library.define("feature_budgets(Tensor density, SymInt total, SymInt rows, float exponent, float shift) -> Tensor")
_library.impl("feature_budgets", budgets.budgets, "CompositeExplicitAutograd")


@torch.library.register_fake("sae_engine::feature_budgets", lib=_library)
def _(density, total, rows, exponent, shift):
    return torch.empty_like(density, dtype=torch.int32)


_library.define("zipf_shortfall(Tensor density, float k, float exponent, float shift) -> Tensor")
_library.impl("zipf_shortfall", budgets.zipf_shortfall, "CompositeExplicitAutograd")
torch.library.register_fake("sae_engine::zipf_shortfall", lambda density, *_: torch.empty_like(density), lib=_library)

# --- linear: the encoder's product on a CPU -------------------------------------------------------------------------

_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", cpu_gemm.linear, "CompositeExplicitAutograd")


@torch.library.register_fake("sae_engine::linear", lib=_library)
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


_differentiable("linear", _linear_context, _linear_backward)

# --- encode_entries: pre-activations at the codes, whose gradient never becomes a matrix -----------------------------

_library.define(
    "encode_entries(Tensor x, Tensor weight, Tensor? bias, Tensor? center, Tensor entries, Tensor indices,"
    " Tensor offsets, Tensor? latent_offsets, Tensor? latent_rows, Tensor? latent_positions, str backend) -> Tensor"
)


def _encode_entries(x, weight, bias, center, entries, *_):
    """``entries`` (N,) of x @ weight + bias, as the function of x (B, D), weight (D, F), bias and center that they are.

    x already is the input minus ``center`` (D,), which is here for its gradient alone.
    """
    return entries.clone()


_library.impl("encode_entries", _encode_entries, "CompositeExplicitAutograd")


@torch.library.register_fake("sae_engine::encode_entries", lib=_library)
def _(x, weight, bias, center, entries, *_):
    return torch.empty_like(entries)


_library.define(
    "encoder_gradient(Tensor x, Tensor grad, Tensor latent_offsets, Tensor latent_rows, Tensor latent_positions,"
    " ScalarType dtype, str backend) -> Tensor"
)


def _encoder_gradient(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    """``decode_backward_weight``, row-major as (D, F). On a CPU some latents at a time, transposed in the cache."""
    turned, num_latents = (latent_offsets, latent_rows, latent_positions), latent_offsets.shape[0] - 1
    step = max(_tuning.TRANSPOSED_IN_CACHE // max(x.shape[1], 1), 1)
    in_chunks = x.is_cpu and backend == "torch" and num_latents > step
    if not in_chunks or _is_dense("decode_backward_weight", (x, grad, *turned)):
        return ops.decode_backward_weight(x, grad, *turned, dtype, backend).T.contiguous()
    out = x.new_empty((x.shape[1], num_latents), dtype=dtype)
    sparse = _tuning.DENSE_CHOICE.set(False)  # of the whole; some latents alone may be denser
    for start in range(0, num_latents, step):
        bounds = latent_offsets[start : start + step + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        turned = bounds - entries.start, latent_rows[entries], latent_positions[entries]
        out[:, start : start + step] = ops.decode_backward_weight(x, grad, *turned, dtype, backend).T
    _tuning.DENSE_CHOICE.reset(sparse)
    return out


_library.impl("encoder_gradient", _encoder_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("sae_engine::encoder_gradient", lib=_library)
def _(x, grad, latent_offsets, latent_rows, latent_positions, dtype, backend):
    return x.new_empty((x.shape[1], latent_offsets.shape[0] - 1), dtype=dtype)


_once_differentiable("encoder_gradient")


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
        grad_bias = _sum_by_latent(grad, by_latent, x.shape[0], wide, ctx.backend)
        if needs_center:
            with torch.autocast(x.device.type, enabled=False):
                grad_center = -(weight.to(wide) @ grad_bias).to(ctx.dtypes[3])
        grad_bias = grad_bias.to(ctx.dtypes[2]) if needs_bias else None
    return grad_x, grad_weight, grad_bias, grad_center, *(None,) * 7


_differentiable("encode_entries", _encode_entries_context, _encode_entries_backward)

# --- the latent pass: every gradient of a training step that belongs to a latent, latent by latent -------------------


@_define(
    f"latent_gradients(Tensor x, Tensor weight, Tensor? along, {_terms.SCHEMA}, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "latent_pass.launch_gradients",
)
def _(x, weight, along, *terms_dtype_backend):
    """Gradients of W_dec (F, D_out), W_enc.T (F, D_in) and b_enc (F,) in ``dtype``, summed over all terms."""
    dtype, num_latents = terms_dtype_backend[-2], weight.shape[0]
    return (
        weight.new_empty(weight.shape, dtype=dtype),
        weight.new_empty((num_latents, x.shape[1]), dtype=dtype),
        weight.new_empty(num_latents, dtype=dtype),
    )


@_define(
    "latent_adam(Tensor(a!)[] parameters, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies,"
    f" Tensor x, Tensor? along, {_terms.SCHEMA}, Tensor step, Tensor lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool unit_rows, Tensor? skip) -> (Tensor, Tensor)",
    "latent_pass.launch_adam",
)
def _(parameters, exp_avgs, exp_avg_sqs, copies, x, *rest):
    """Adam's step of W_dec, W_enc.T and b_enc in place; returns d(center) (D_in,) and the squared gradient norm ()."""
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    return x.new_empty(x.shape[1], dtype=wide), x.new_empty((), dtype=wide)


_once_differentiable("latent_gradients")
