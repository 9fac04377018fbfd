"""What the accelerated classes of every library share: rules, dense views of codes, and who is listening.

Other libraries hand dense matrices from method to method. Three tools keep those matrices as their owners know them
while the gradients stay sparse. :func:`pre_activations` returns the (tokens, F) pre-activations as a differentiable
tensor that costs nothing until somebody differentiates through it. :func:`remember` notes which codes a dense matrix
was made of, and :func:`decode_dense` decodes by them. Which gradient the matrix itself gets is settled in the backward
pass: whoever still holds the matrix can look at its gradient, so it gets the whole one; where nobody holds it, the
gradient goes to the codes alone.

A transposed copy of a weight lives for one forward pass and its backward pass, never longer. These libraries write to
parameters through ``.data`` (unit-norm decoders, folded norms), which neither identity nor version of the tensor
records, so a copy that outlived the pass would be silently stale.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.weak import WeakTensorKeyDictionary

from sae_kernels.dispatch import transforming

from .. import functional
from .._checks import FLOATS, no_torchscript
from .._encoder import linear_dtype
from ..codes import SparseCodes

# Share of entries above which codes of data-dependent rules do not pay: their owner's dense code runs instead.
DENSE_SHARE = 1 / 16


class CannotAccelerate(TypeError):
    """The object cannot run on sae_engine's operations; the message says why. Nothing was changed.

    Example:
        >>> se.accelerate(nn.Linear(2, 2))
        Traceback (most recent call last):
        sae_engine.acceleration._base.CannotAccelerate: ...
    """


class TopRule:
    """The k entries of each row that rank first, all columns or those of ``mask``; see :func:`functional.topk`.

    With ``straight`` an entry that ReLU sets to 0 passes its gradient on all the same.
    """

    context_keys: frozenset[str] = frozenset()

    def __init__(self, k: int, *, relu=True, magnitude=False, mask: Tensor | None = None, straight=False) -> None:
        self.k, self.relu, self.magnitude, self.mask, self.straight = k, relu, magnitude, mask, straight

    def select(self, pre: Tensor, *, backend: str = "auto") -> SparseCodes:
        return functional.topk(
            pre, self.k, relu=self.relu, magnitude=self.magnitude, mask=self.mask, backend=backend
        )

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        if self.straight:
            return pre + (codes.values - pre).detach()
        return torch.where(codes.values == 0, 0.0, pre) if self.relu else pre


class BudgetRule:
    """The ``total`` largest entries of relu(pre) in the whole batch; see :func:`functional.batch_topk`."""

    context_keys: frozenset[str] = frozenset()

    def __init__(self, total: int) -> None:
        self.total = total

    def select(self, pre: Tensor, *, backend: str = "auto") -> SparseCodes:
        rows, latents = pre.shape[:-1].numel(), pre.shape[-1]
        # The mean over rows that gives exactly this total: a half more than it, so that rounding cannot take one off.
        k = min((self.total + 0.5) / rows, latents) if rows else latents
        return functional.batch_topk(pre, k, backend=backend)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        return torch.where(codes.values == 0, 0.0, pre)


class AboveRule:
    """Every entry above ``theta``, a number or (F,), which is constant; see :func:`functional.threshold`."""

    context_keys: frozenset[str] = frozenset()

    def __init__(self, theta: Any) -> None:
        self.theta = theta.detach() if isinstance(theta, Tensor) else theta

    def select(self, pre: Tensor, *, backend: str = "auto") -> SparseCodes:
        return functional.threshold(pre, self.theta, backend=backend)

    def entry_values(self, pre: Tensor, codes: SparseCodes) -> Tensor:
        return torch.where(codes.values == 0, 0.0, pre)


def too_dense(pre: Tensor, theta: Tensor | float) -> bool:
    """Whether more of ``pre`` exceeds ``theta`` than codes pay for. Reads the device once."""
    return int((pre.detach() > theta).sum()) > DENSE_SHARE * pre.numel()


class _Attached(torch.autograd.Function):
    """Values that are known already, as the function of the encoder's input and parameters that they are.

    ``pre = (x - b_dec) @ W_enc + b_enc``, times ``scale``, behind a ReLU with ``relu``. The backward pass is the dense
    one, and runs only where a gradient arrives; with ``through=False`` it passes nothing.
    """

    @staticmethod
    def forward(ctx, pre, x, W_enc, b_enc, b_dec, scale, relu, through):
        ctx.through = through
        ctx.dtype = linear_dtype(x, W_enc)
        out = pre.detach()
        ctx.save_for_backward(x, W_enc, b_enc, b_dec, scale, out if relu else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        if not ctx.through:
            return (None,) * 8
        x, W_enc, b_enc, b_dec, scale, out = ctx.saved_tensors
        needs_x, needs_W, needs_b, needs_center, needs_scale = ctx.needs_input_grad[1:6]
        with torch.autocast(x.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            if out is not None:
                flat = torch.where(out.reshape(flat.shape) > 0, flat, 0.0)
            centred = (x if b_dec is None else x - b_dec).reshape(-1, x.shape[-1]).to(ctx.dtype)
            grad_scale = None
            if scale is not None:
                if needs_scale:
                    unscaled = functional.linear(centred, W_enc.to(ctx.dtype), b_enc, result_dtype=flat.dtype)
                    grad_scale = (flat * unscaled).sum(0).to(scale.dtype)
                flat = flat * scale
            grad_b = flat.sum(0).to(b_enc.dtype) if needs_b else None
            flat = flat.to(ctx.dtype)
            grad_W = (centred.T @ flat).to(W_enc.dtype) if needs_W else None
            grad_x = grad_center = None
            if needs_x or needs_center:
                grad_x = (flat @ W_enc.to(ctx.dtype).T).view(x.shape)
                if needs_center:
                    wide = torch.promote_types(ctx.dtype, torch.float32)
                    grad_center = -grad_x.reshape(-1, x.shape[-1]).sum(0, dtype=wide).to(b_dec.dtype)
                grad_x = grad_x.to(x.dtype) if needs_x else None
        return None, grad_x, grad_W, grad_b, grad_center, grad_scale, None, None


def pre_activations(
    pre: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, scale: Tensor | None = None,
    *, relu: bool = False, through: bool = True,
) -> Tensor:  # fmt: skip
    """``pre`` with the dense gradient that it has; nothing is kept for it but what its arguments keep alive."""
    if not torch.is_grad_enabled():
        return pre
    if x.is_inference():
        x = x.clone()
    return _Attached.apply(pre, x, W_enc, b_enc, b_dec, scale, relu, through)


# ------------------------------------------------------------------------------------------ dense matrices and codes

_codes_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # dense matrix -> (its version, its codes)


def remember(dense: Tensor, codes: SparseCodes) -> Tensor:
    """Notes that ``dense`` holds ``codes`` and nothing else, for as long as it lives and is not written to."""
    if not (torch.compiler.is_compiling() or dense.is_inference()):
        _codes_of[dense] = (dense._version, codes)
    return dense


def codes_of(dense: Tensor) -> SparseCodes | None:
    """The codes that ``dense`` was made of; None where that is not known, or has been overwritten.

    Writes through ``.data``, NumPy or DLPack raise no version, so the numbers are compared. Reads the device once.
    """
    if torch.compiler.is_compiling() or transforming() or dense.is_inference():
        return None
    version, codes = _codes_of.get(dense, (None, None))
    if codes is None or version != dense._version or not _holds(dense.detach(), codes.detach()):
        return None
    return codes


@torch.no_grad()
def _holds(dense: Tensor, codes: SparseCodes) -> bool:
    """Whether ``dense`` has the codes' values at their places and nothing elsewhere."""
    if dense.shape != codes.shape or dense.dtype != codes.dtype or dense.device != codes.device:
        return False
    if dense.layout == torch.sparse_coo:  # it shares the codes' values, and has indices of its own
        shared = dense._values().data_ptr() == codes.values.data_ptr()
        return shared and torch.equal(dense._indices()[-1], codes.indices.long())
    row = torch.repeat_interleave(codes.offsets.diff(), output_size=codes.values.shape[0])
    there = dense.reshape(codes.rows, -1)[row, codes.indices.long()]
    same = (there == codes.values).all() & (dense.count_nonzero() == codes.values.count_nonzero())
    return bool(same)


class _UnlessHeld(torch.autograd.Function):
    """The identity on values (N,), whose gradient arrives by way of the dense matrix instead while that is held."""

    @staticmethod
    def forward(ctx, values, held):
        ctx.held = held
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.held() is None else None), None


class _WhileHeld(torch.autograd.Function):
    """The identity on a reconstruction, which also gives the dense matrix its gradient while that is held."""

    @staticmethod
    def forward(ctx, out, dense, W_dec, inverse_norm, held):
        ctx.held = held
        ctx.save_for_backward(W_dec, inverse_norm)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        dense = ctx.held()
        if dense is None:
            return grad, None, None, None, None
        W_dec, inverse_norm = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            at_dense = grad @ W_dec.T.to(grad.dtype)
            if inverse_norm is not None:
                at_dense = at_dense * inverse_norm.to(grad.dtype)
            return grad, at_dense.to(dense.dtype), None, None, None


def decode_dense(dense: Tensor, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, inverse_norm: Tensor | None = None):
    """``(dense * inverse_norm) @ W_dec + b_dec`` by way of the codes that ``dense`` holds; any dtype of autocast."""
    if not (torch.is_grad_enabled() and dense.requires_grad):
        return decode(codes, W_dec, b_dec, inverse_norm)
    held = weakref.ref(dense)
    codes = codes.replace(values=_UnlessHeld.apply(codes.values, held))
    out = decode(codes, W_dec, b_dec, inverse_norm)
    return _WhileHeld.apply(out, dense, W_dec, inverse_norm, held)


def decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, inverse_norm: Tensor | None = None) -> Tensor:
    """``(codes * inverse_norm) @ W_dec + b_dec`` in what the operands promote to, whatever autocast says."""
    with torch.autocast(codes.device.type, enabled=False):
        if inverse_norm is not None:
            codes = codes.replace(values=codes.values * functional.at_latents(inverse_norm, codes))
        return functional.decode(codes, W_dec, b_dec)


def of_latents(codes: SparseCodes, start: int, stop: int) -> SparseCodes:
    """The entries of the latents ``start`` to ``stop``, over all F latents. Reads the device once."""
    inside = (codes.indices >= start) & (codes.indices < stop)
    before = torch.cat([codes.offsets.new_zeros(1), inside.cumsum(0)])
    entries = inside.nonzero()[:, 0]
    return SparseCodes(
        codes.values[entries], codes.indices[entries], before[codes.offsets], codes.batch_shape, codes.num_latents
    )


def per_row(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Values and int64 indices, (*batch_shape, k), of codes whose rows all have k entries."""
    shape = (*codes.batch_shape, codes.k or 0)
    return codes.values.view(shape), codes.indices.long().view(shape)


# ------------------------------------------------------------------------------------------ listeners


def plain_wanted() -> bool:
    """Whether a transform of ``torch.func``, ``torch.export`` or ``torch.jit.trace`` looks into what runs now.

    The library's own code runs then: what these make of it, an operator of ours could not add to.
    """
    return transforming() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def listened(module: nn.Module) -> bool:
    """Whether calling ``module`` could do more than its forward does: any hook on it, or on all modules."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or any(
        (
            nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks,
            nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks,
        )
    )  # fmt: skip


def refuse(obj: Any, reason: str) -> CannotAccelerate:
    return CannotAccelerate(f"{type(obj).__module__}.{type(obj).__qualname__} cannot be accelerated: {reason}")


# ------------------------------------------------------------------------------------------ classes


def table(*classes: type) -> dict[type, type]:
    """Class of theirs -> class of ours. Ours name theirs as their last base, and take its name."""
    for cls in classes:
        cls._plain = cls.__bases__[-1]  # type: ignore[attr-defined]
        cls.__prepare_scriptable__ = no_torchscript  # type: ignore[attr-defined]
    return {cls.__bases__[-1]: cls for cls in classes}


def check_module(module: nn.Module, ours: type, weights: tuple[str, ...]) -> None:
    """What every library's check asks: methods that are the class's own, and parameters that our operations take."""
    replaced = sorted(
        name for name in module.__dict__
        if callable(module.__dict__[name]) and any(name in cls.__dict__ for cls in ours.__mro__[: _depth(ours)])
    )  # fmt: skip
    if replaced:
        raise refuse(module, f"{', '.join(replaced)} was replaced on the object, and would go on hiding ours")
    for name in weights:
        parameter = module.get_parameter(name)
        if parameter.dtype not in FLOATS or parameter.layout != torch.strided:
            raise refuse(module, f"{name} is {parameter.dtype}, {parameter.layout}: it must be a dense float tensor")
        if type(parameter.data) is not Tensor:
            raise refuse(module, f"{name} holds a {type(parameter.data).__name__}, which our operations do not take")


def _depth(ours: type) -> int:
    """How many classes stand before theirs in the order of methods."""
    return ours.__mro__.index(ours.__bases__[-1])
