"""Codes of several sources: one encoder each, below one another, and what is selected from all of them at once."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from sae_kernels.dispatch import transforming
from sae_kernels.ops import ops

from ._encoder import _as_encoded, _divided, linear, linear_dtype
from ._running import Running
from ._slabs import default_budget_bytes, rectangles, slab_shape
from .codes import SparseCodes, at_latents
from .functional import decode


def parts_of(codes: SparseCodes, sources: int) -> tuple[SparseCodes, ...]:
    """The codes (*batch) of each source, from those of all (sources, *batch). Entries are views.

    Where rows differ in length the device is read once, for the sources' bounds.

    Example:
        >>> codes = SparseCodes.from_dense(torch.eye(4).view(2, 2, 4))
        >>> [part.indices.tolist() for part in parts_of(codes, 2)]
        [[0, 1], [2, 3]]
    """
    if sources == 1:
        return (codes,)
    rows, shape = codes.rows // sources, codes.batch_shape[1:]
    if codes.k is not None:
        ends = [rows * codes.k * s for s in range(sources + 1)]
    else:
        codes.check()
        ends = codes.offsets[::rows].cpu().tolist() if rows else [0] * (sources + 1)
    return tuple(
        SparseCodes(
            codes.values[first:end], codes.indices[first:end], codes.offsets[s * rows : (s + 1) * rows + 1] - first,
            shape, codes.num_latents, codes.k,
        )
        for s, (first, end) in enumerate(pairwise(ends))
    )  # fmt: skip


def below_one_another(parts: Sequence[SparseCodes]) -> SparseCodes:
    """The inverse of :func:`parts_of`: codes (sources, *batch), from those (*batch) of each; of a single one, its own.

    Example:
        >>> one = SparseCodes.from_dense(torch.eye(2))
        >>> below_one_another([one, one]).shape, below_one_another([one]).shape
        (torch.Size([2, 2, 2]), torch.Size([2, 2]))
    """
    if len(parts) == 1:
        return parts[0]
    sizes = [0]
    for part in parts:
        sizes.append(sizes[-1] + part.check().values.shape[0])
    same = all(part.k == parts[0].k for part in parts)
    return SparseCodes(
        values=torch.cat([part.values for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        offsets=torch.cat([parts[0].offsets[:1], *(p.offsets[1:] + n for p, n in zip(parts, sizes, strict=False))]),
        batch_shape=(len(parts), *parts[0].batch_shape),
        num_latents=parts[0].num_latents,
        k=parts[0].k if same else None,
    )


def numbered(codes: SparseCodes, sources: int) -> SparseCodes:
    """The same entries over the latents of all sources: latent f of source s is s F + f.

    A quantity for each source and latent, (sources, F), is then read by ``functional.at_latents(quantity.flatten(),
    numbered(codes, sources))``.

    Example:
        >>> numbered(SparseCodes.from_dense(torch.eye(4).view(2, 2, 4)), 2).indices.tolist()
        [0, 1, 6, 7]
    """
    if sources == 1:
        return codes
    rows = codes.rows // sources
    first = torch.arange(sources, device=codes.device, dtype=torch.int32) * codes.num_latents
    counts = codes.offsets[:: max(rows, 1)].diff() if rows else codes.offsets.new_zeros(sources)
    shift = torch.repeat_interleave(first, counts, output_size=codes.values.shape[0])
    return replace(codes, indices=codes.indices + shift, num_latents=codes.num_latents * sources, _transposed=[])


def running_over(rule: Any, rows: int, num_latents: int, backend: str) -> Running:
    """What a rule keeps of ``rows`` of all sources together, which pass by one source after the other.

    Raises:
        TypeError: the rule has no way of seeing them so.
    """
    make = getattr(rule, "running", None)
    running = None if make is None else make(rows, num_latents, backend=backend)
    if running is None or getattr(rule, "entry_values", None) is None:
        raise TypeError(
            f"activation {type(rule).__name__} cannot choose among the latents of all sources, which are never there "
            "at once: pass a sequence with one rule for each source"
        )
    return running


def decode_together(
    written: Sequence[tuple[SparseCodes, Tensor, int]], batch_shape: Sequence[int], width: int, dtype: torch.dtype,
    backend: str,
) -> Tensor:  # fmt: skip
    """(*batch_shape, width) in ``dtype``, fp32 or wider: what several sources write, side by side or over one another.

    One launch makes it, which reads and writes the output once, with gradients or without. Transforms of ``torch.func``
    and ``torch.compile`` see one decoder after the other.

    Args:
        written: of each source its codes (*batch_shape), decoder rows (F, some columns), and the first of these.
    """
    if len(written) > 1 and not transforming() and not torch.compiler.is_compiling():
        codes, weights, firsts = zip(*written, strict=True)
        indexed = []
        for of_source, weight in zip(codes, weights, strict=True):
            of_source.validate()
            indexed.append((of_source.indices, of_source.offsets, *of_source.transposed_for(weight)))
        out = _Sums.apply(firsts, width, dtype, backend, *(c.values for c in codes), *weights, *chain(*indexed))
        return out.view(*batch_shape, width)
    out = written[0][0].values.new_zeros((*batch_shape, width), dtype=dtype)
    for of_source, weight, first in written:
        out[..., first : first + weight.shape[1]] += decode(of_source, weight, result_dtype=dtype, backend=backend)
    return out


class _Sums(torch.autograd.Function):
    """The launch of :func:`decode_together`; of every source values, then weights, then five tensors of its codes."""

    @staticmethod
    def forward(ctx, firsts, width, dtype, backend, *tensors):
        ctx.firsts, ctx.backend = firsts, backend
        ctx.save_for_backward(*tensors)
        values, weights, indexed = _sorted_by_kind(tensors)
        indices, offsets, *_ = zip(*indexed, strict=True)
        out, _ = ops.decode_sources(
            list(values), list(indices), list(offsets), list(weights), list(firsts), width, None, None, dtype, backend
        )
        return out

    @staticmethod
    def backward(ctx, grad):
        values, weights, indexed = _sorted_by_kind(ctx.saved_tensors)
        needs_values, needs_weights, _ = _sorted_by_kind(ctx.needs_input_grad[4:])
        grad = grad.contiguous()
        at_values: list[Tensor | None] = [None] * len(values)
        at_weights: list[Tensor | None] = [None] * len(values)
        for s, (first, weight, (indices, offsets, *by_latent)) in enumerate(
            zip(ctx.firsts, weights, indexed, strict=True)
        ):
            own = grad[:, first : first + weight.shape[1]]  # a view: kernels take any strides
            if needs_values[s]:
                at_values[s] = ops.decode_backward_values(own, values[s], indices, offsets, weight, ctx.backend)
            if needs_weights[s]:
                at_weights[s] = ops.decode_backward_weight(own, values[s], *by_latent, weight.dtype, ctx.backend)
        return *(None,) * 4, *at_values, *at_weights, *(None,) * (5 * len(values))


def _sorted_by_kind(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], list[Sequence[Any]]]:
    """The values, the weights and the groups of five of :class:`_Sums`."""
    number = len(tensors) // 7
    indexed = tensors[2 * number :]
    return tensors[:number], tensors[number : 2 * number], [indexed[i : i + 5] for i in range(0, len(indexed), 5)]


def encode_together(
    rule: Any, xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    scales: Sequence[Tensor | None], *, memory_budget: int | None, backend: str,
) -> SparseCodes:  # fmt: skip
    """Codes (sources, *batch, F) of one rule whose entries compete across sources, differentiated sparsely.

    Args:
        rule: with ``running`` and ``entry_values``.
        xs: of each source (*batch, d_in), as ``weights`` (d_in, F), ``biases`` (F,) and ``scales`` (F,) are.
        memory_budget: bytes of pre-activations that may exist at a time.

    Raises:
        TypeError: the rule has no way of seeing one source after the other.
    """
    number, batch_shape, num_latents = len(xs), tuple(xs[0].shape[:-1]), weights[0].shape[1]
    tokens, dtype = xs[0].shape[:-1].numel(), linear_dtype(xs[0], weights[0])
    learns = torch.is_grad_enabled()
    running = running_over(rule, number * tokens, num_latents, backend)
    running.wants_entries = learns
    budget = default_budget_bytes(xs[0].device) if memory_budget is None else memory_budget
    shape = slab_shape(tokens, num_latents, max(budget // dtype.itemsize, 1))
    for s, (x, weight, bias, scale) in enumerate(zip(xs, weights, biases, scales, strict=True)):
        matrix = x.reshape(tokens, x.shape[-1])
        for rows, latents in rectangles(tokens, num_latents, shape):
            with torch.no_grad():
                pre = linear(matrix[rows], weight[:, latents], None if bias is None else bias[latents])
                pre = pre if scale is None else (pre * scale[latents]).to(dtype)
            running.add(pre, slice(s * tokens + rows.start, s * tokens + rows.stop), latents)
            del pre  # before the next one is made
    codes, entries = running.finish()
    codes = replace(codes.detach(), batch_shape=(number, *batch_shape))
    if entries is None:
        return codes
    attached = []
    parts = parts_of(codes, number)
    of_source = entries.split([part.values.shape[0] for part in parts])
    for x, weight, bias, scale, part, mine in zip(xs, weights, biases, scales, parts, of_source, strict=True):
        unscaled = mine if scale is None else _divided(mine, scale, part)
        (seen,) = _as_encoded([unscaled], [part], x, weight, bias, None, dtype, backend)
        attached.append(seen if scale is None else (seen * at_latents(scale, part)).to(dtype))
    return codes.replace(values=rule.entry_values(torch.cat(attached), codes))
