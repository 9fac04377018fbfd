"""The encoder: its product, what rules select of it, and gradients that follow the codes. Public in ``functional``."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kernels.dispatch import capturing, transforming
from sae_kernels.ops import ops
from sae_kernels.stock.linear import rows_at_once, whole_rows_from
from sae_kernels.stock.linear_16bit import linear_operand

from . import _checks as check
from ._cat import cat
from ._running import PER_TOKEN, Running, as_tensor
from ._slabs import NeedsWhole, default_budget_bytes, is_by_row, rectangles, running_of, widest
from .codes import SparseCodes, at_latents


class EncodeInfo(NamedTuple):
    """What decoding needs to know of the input; None where it does not.

    Example:
        >>> sae = se.SparseAutoencoder(4, 16, se.TopK(2), normalize_activations="center")
        >>> sae.encode_with(torch.ones(3, 4)).info.mean.shape
        torch.Size([3, 1])
    """

    mean: Tensor | None = None  # (*batch_shape, 1), layer norm and centring
    std: Tensor | None = None  # (*batch_shape, 1), layer norm
    skipped: Tensor | None = None  # (*batch_shape, d_in), the input of the skip connection


class Encoded(NamedTuple):
    """Everything that one pass through an encoder gives: what :func:`encode_with` returns.

    Example:
        >>> encoded = se.SparseAutoencoder(4, 16, se.TopK(2)).encode_with(torch.ones(3, 4))
        >>> encoded.codes[0].shape, encoded.pre
        (torch.Size([3, 16]), None)
    """

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
    memory_budget: int | None = None,
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
        memory_budget: as in :func:`encode_with`.
        context: what ``select`` names in its ``context_keys``.

    Returns:
        The codes, over ``(*batch_shape, F)``; values have the dtype of the pre-activations.

    Raises:
        TypeError: ``select`` is no activation module, or its context is incomplete or has a name too many.
        ValueError: a shape or a device does not fit those of ``x``.

    Example:
        >>> W_enc = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
        >>> encode(torch.tensor([[2.0, 3.0]]), W_enc, select=se.TopK(1)).to_dense()
        tensor([[0., 3., 0.]])
    """
    if isinstance(select, list | tuple):
        raise TypeError(f"select must be one activation module, got {len(select)}: encode_with takes several")
    return encode_with(
        x, W_enc, b_enc, select=select, b_dec=b_dec, scale=scale, pre=pre, keep_pre=False,
        memory_budget=memory_budget, backend=backend, **context,
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
    memory_budget: int | None = None,
    backend: str = "auto",
    **context: Tensor,
) -> Encoded:
    """:func:`encode` with several rules, which select from the same pre-activations and share one backward pass.

    Args:
        select: an activation module, or a sequence of them.
        keep_pre: whether the pre-activations come along. They are then differentiable (unless ``pre`` was given), by
            way of the (tokens, F) matrix that the codes alone spare.
        memory_budget: bytes of pre-activations that may exist at a time where they are not kept. What is more passes by
            in slabs of latents, or of tokens for rules that need whole rows. Default: a quarter of the memory that is
            free, and whatever it takes for rules that need the whole batch at once.
        context: handed to each activation that names it in its ``context_keys``.
        x, W_enc, b_enc, b_dec, scale, pre: as in :func:`encode`.

    Returns:
        ``codes``, one for each rule, and ``pre``, None without ``keep_pre``. Under 16-bit autocast ``pre`` is the fp32
        sum with the fp32 bias, rounded once.

    Raises:
        TypeError, ValueError: as :func:`encode`; and ValueError where ``select`` is empty.
        RuntimeError: a rule needs more than ``memory_budget``; says which.

    Example:
        >>> rules = se.TopK(1), se.TopK(2)
        >>> (one, two), _, pre = encode_with(torch.tensor([[2.0, 3.0]]), torch.eye(2), select=rules, keep_pre=True)
        >>> one.indices.tolist(), two.indices.tolist(), pre
        ([1], [0, 1], tensor([[2., 3.]]))
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
    dtype = linear_dtype(x, W_enc)
    memory_budget = None if memory_budget is None else check.integer_k(memory_budget, name="memory_budget")
    turners = [getattr(rule, "entry_values", None) for rule in rules]
    result_dtype = dtype if pre is None else pre.dtype
    slabs = None
    if pre is None and not keep_pre:
        slabs = _slabs_for(rules, contexts, x, W_enc, dtype, memory_budget, backend)
    if slabs is not None:
        codes, entries = _in_slabs(rules, *slabs, x, W_enc, b_enc, b_dec, scale, dtype, torch.is_grad_enabled())
    else:
        given = pre is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and (keep_pre or None in turners)):
            if pre is not None:
                unscaled = pre = pre.detach()
            else:
                unscaled = linear(x if b_dec is None else x - b_dec, W_enc, b_enc)
                pre = unscaled if scale is None else (unscaled * scale).to(dtype)
        contexts = [{name: as_tensor(t) for name, t in mine.items()} for mine in contexts]
        codes = [
            rule.select(pre if turner is None else pre.detach(), backend=backend, **mine)
            for rule, turner, mine in zip(rules, turners, contexts, strict=True)
        ]
        entries = []
        if torch.is_grad_enabled():  # without gradients the values are what was selected
            matrix = check.matrix(unscaled.detach())
            entries = [
                None if turner is None else ops.gather(matrix, c.indices, c.offsets, backend)
                for turner, c in zip(turners, codes, strict=True)
            ]
            if given and scale is not None:
                entries = [_divided(e, scale, c) for e, c in zip(entries, codes, strict=True)]
    sparse = [number for number, of_rule in enumerate(entries) if of_rule is not None]
    if sparse:
        attached = _as_encoded(
            [entries[n] for n in sparse], [codes[n] for n in sparse], x, W_enc, b_enc, b_dec, dtype, backend
        )
        for n, pre_entries in zip(sparse, attached, strict=True):
            if scale is not None:
                pre_entries = (pre_entries * at_latents(scale, codes[n])).to(result_dtype)
            codes[n] = codes[n].replace(values=rules[n].entry_values(pre_entries, codes[n], **contexts[n]))
    return Encoded(tuple(codes), pre=pre if keep_pre else None)


def _divided(entries: Tensor | None, scale: Tensor, codes: SparseCodes) -> Tensor | None:
    """Pre-activations (N,) as they were before ``scale`` (F,) multiplied them."""
    if entries is None:
        return None
    at = scale.detach()[codes.indices.long()]
    return torch.where(at == 0, 0.0, entries / at).to(entries.dtype)


# --- pre-activations that never exist whole --------------------------------------------------------------------------

SMALL = 1 << 26  # bytes of pre-activations for which nobody asks how much memory is free


def _slabs_for(
    rules: tuple, contexts: list[dict[str, Any]], x: Tensor, W_enc: Tensor, dtype: torch.dtype,
    memory_budget: int | None, backend: str,
) -> tuple[list[Running], tuple[int, int]] | None:  # fmt: skip
    """What the rules keep as slabs pass by, and their shape; None where the whole matrix may, or has to, be there."""
    budget = memory_budget
    if budget is None and (torch.compiler.is_compiling() or transforming() or capturing(x)):
        return None  # a compiled graph is run with other numbers of tokens, perhaps on machines with other memory
    tokens, num_latents = x.shape[:-1].numel(), W_enc.shape[1]
    sharded = any(getattr(rule, "shards", None) is not None for rule in rules)
    needed = tokens * (widest(rules, num_latents) if sharded else num_latents) * dtype.itemsize
    rows, from_rows = tokens, None
    if dtype == x.dtype and not sharded and not torch.compiler.is_compiling():
        like = x.new_empty(tokens, 0)  # of the shape in rows, without a copy of what has gaps
        rows, from_rows = rows_at_once(tokens, like, W_enc), whole_rows_from(like, W_enc)
    if rows < tokens and all(map(is_by_row, rules)):
        most = rows * num_latents * dtype.itemsize
        budget = most if budget is None else min(budget, most)
    if budget is None:
        if needed <= SMALL:
            return None
        budget = default_budget_bytes(x.device)
    if needed <= budget:
        return None
    flat = [
        {
            name: t.reshape(tokens, *t.shape[x.dim() - 1 :]) if name in PER_TOKEN and isinstance(t, Tensor) else t
            for name, t in mine.items()
        }
        for mine in contexts
    ]
    try:
        return running_of(
            rules, flat, tokens, num_latents, budget // dtype.itemsize, backend,
            dense_gradient=torch.is_grad_enabled(), whole_rows_from=from_rows,
        )  # fmt: skip
    except NeedsWhole:
        if memory_budget is None:
            return None
        raise


@torch.no_grad()
def _in_slabs(
    rules: tuple, running: list[Running], shape: tuple[int, int], x: Tensor, W_enc: Tensor, b_enc: Tensor | None,
    b_dec: Tensor | None, scale: Tensor | None, dtype: torch.dtype, learns: bool,
) -> tuple[list[SparseCodes], list[Tensor | None]]:  # fmt: skip
    """The codes of each rule, and the pre-activations at them before ``scale``, where they are to be differentiated."""
    # The difference by itself: neither the compiler nor a transform knows how to write one to a part of a tensor.
    operand = linear_operand(check.matrix(x if b_dec is None else x - b_dec), None, dtype)
    sparse = [learns and getattr(rule, "entry_values", None) is not None for rule in rules]
    for of_rule, wanted in zip(running, sparse, strict=True):
        of_rule.wants_entries = wanted
    for tokens, latents in rectangles(operand.shape[0], W_enc.shape[1], shape):
        pre = product(operand[tokens], W_enc[:, latents], None if b_enc is None else b_enc[latents], dtype)
        if scale is not None:
            pre = (pre * scale[latents]).to(dtype)
        with torch.set_grad_enabled(learns):
            for of_rule in running:
                of_rule.add(pre, tokens, latents)
        del pre  # before the next one is made
    found = [of_rule.finish() for of_rule in running]
    codes = [replace(c, batch_shape=tuple(x.shape[:-1])) for c, _ in found]
    entries = [e if wanted else None for (_, e), wanted in zip(found, sparse, strict=True)]
    if scale is not None:
        entries = [_divided(e, scale, c) for e, c in zip(entries, codes, strict=True)]
    return codes, entries


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
            x, *parameters, entries, codes.indices, codes.offsets, *codes.transposed_for(*parameters), backend
        )

    if len(codes) == 1 or any(c.required is not None for c in codes):  # unused capacity may only follow the last row
        return [attached(centred, e, c) for e, c in zip(entries, codes, strict=True)]
    below = cat([replace(c.detach(), batch_shape=(c.rows,)) for c in codes])
    together = attached(centred.repeat(len(codes), 1), torch.cat(entries), below)
    return list(together.split([e.shape[0] for e in entries]))


def linear(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, *, result_dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ W_enc + b_enc``; 16-bit results (autocast, or 16-bit inputs) are rounded once, after the bias.

    ``result_dtype`` wider than 16 bits leaves the fp32 sums of 16-bit operands unrounded.

    Raises:
        TypeError: an argument is not floating-point; names it.
        ValueError: shapes or devices do not fit together; names the argument.

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.0, 1.0]))
        tensor([[1., 3.]])
    """
    _check_linear(x, W_enc, b_enc)
    dtype = linear_dtype(x, W_enc)
    out = product(check.matrix(x).to(dtype), W_enc, b_enc, dtype if result_dtype is None else result_dtype)
    return out.view(*x.shape[:-1], W_enc.shape[1])


def product(operand: Tensor, W_enc: Tensor, b_enc: Tensor | None, result_dtype: torch.dtype) -> Tensor:
    """(B, F): :func:`linear` of a matrix in the dtype of the computation, or of a :func:`linear_operand`, unchecked."""
    with torch.autocast(operand.device.type, enabled=False):
        weight = W_enc.to(operand.dtype)
        if operand.dtype in (torch.float32, torch.float64):
            bias = None if b_enc is None else b_enc.to(operand.dtype)
            if operand.is_cpu:  # by one of two libraries
                out = ops.linear(operand, weight, bias)
            else:
                out = operand @ weight if bias is None else torch.addmm(bias, operand, weight)
        else:
            out = ops.linear_16bit(operand, weight, b_enc, result_dtype, "auto")
    return out.to(result_dtype)


def _check_linear(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> None:
    check.floating("x", x)
    check.floating("W_enc", W_enc, dims=2)
    check.same_device("W_enc", W_enc, x)
    if x.shape[-1] != W_enc.shape[0]:
        raise ValueError(f"x must have d_in = {W_enc.shape[0]} in its last dimension, got shape {tuple(x.shape)}")
    if b_enc is not None:
        check.floating("b_enc", b_enc, dims=1)
        check.shaped("b_enc", b_enc, W_enc.shape[1:], x, why="one per latent")


def linear_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    """The autocast dtype if active, else what x and W_enc promote to."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(x.dtype, W_enc.dtype)
