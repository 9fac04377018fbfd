"""From the gradients at what a rule kept to those at the pre-activations, the decoder norms and its own parameters."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_kernels.ops import ops

from .. import functional
from .._window import Dropped
from ..distributed.blocks import of_tokens
from .forward import Forward, OfSource, Part

AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of a product that is summed and forgotten


def norm_slopes(part: Part, forward: Forward, at_pre: Tensor, inner: Tensor, divisors: Tensor) -> Tensor:
    """(F,) gradient of the decoder norms: up through what the rule sees, down through what the decoder divides out."""
    if part.entries is not None:
        seen = forward.by_latent(part.codes, at_pre.to(forward.wide) * part.entries)
    else:
        assert part.pre is not None
        seen = (at_pre.to(forward.wide) * part.pre).sum(0)
    return (seen - forward.by_latent(part.codes, inner * part.values)) / divisors


def through_rule(part: Part, at_codes: Tensor, forward: Forward) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """Gradients at the pre-activations, of the entries or (B, F), and of the rule's own parameters."""
    rule = part.rule
    seen = part.pre if rule.entry_values is None else part.entries
    assert seen is not None
    learned = [p for p in rule.learned_parameters() if p.requires_grad]
    shards = forward.by_blocks
    if shards is None or not learned:
        return _of_rule(part, seen, at_codes, learned, forward.backend)
    at_pre, found = torch.zeros_like(seen), []
    for where, codes in of_tokens(part.codes, shards.token_blocks):
        of_block = replace(part, codes=codes)
        at_pre[where], of_parameters = _of_rule(of_block, seen[where], at_codes[where], learned, forward.backend)
        found.append(of_parameters)
    return at_pre, {
        p: shards.of_batch([of_block[p] for of_block in found], "gradients of the rule") for p in found[0]
    }  # fmt: skip


def _of_rule(
    part: Part, seen: Tensor, at_codes: Tensor, learned: Sequence[Tensor], backend: str
) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """The same, from the pre-activations that the rule has ``seen``."""
    rule, seen = part.rule, seen.detach().requires_grad_()
    with torch.enable_grad():
        if rule.entry_values is None:
            values = rule.select(seen, backend=backend, **part.context).values
        else:
            values = rule.entry_values(seen, part.codes, **part.context)
    grads = torch.autograd.grad(values, [seen, *learned], at_codes.to(values.dtype), allow_unused=True)
    at_pre = torch.zeros_like(seen) if grads[0] is None else grads[0]
    return at_pre, {p: g for p, g in zip(learned, grads[1:], strict=True) if g is not None}


def through_window(
    part: Part, source: OfSource, forward: Forward, grad: Tensor, inner: Tensor, slope: Tensor | None
) -> dict[Tensor, Tensor]:
    """The gradient of a rule's thresholds from what they dropped within their windows.

    Args:
        grad: (B, d_out) at the sums of decoder rows.
        inner: (N,) its products with the decoder rows of the codes.
        slope: (F,) at each value that was dropped, beside ``grad``.
    """
    dropped, wide, decoder = part.dropped, forward.wide, source.weights.decoder
    assert dropped is not None
    sums, number = _over(dropped, grad, decoder, wide, forward.backend)
    if not dropped.within:  # everything, less the codes and what lies below
        total = grad.sum(0, dtype=wide)
        rows = decoder.split(max(AT_ONCE["cpu"] // decoder.shape[1], 1))
        every = torch.cat([some.to(wide) @ total for some in rows])
        of_kept, kept = forward.by_latent(part.codes, torch.stack([inner, torch.ones_like(inner)]))
        sums, number = every - of_kept - sums, len(grad) - kept - number
    if source.norms is not None:
        sums = sums / source.divisors
    rule: Any = part.rule
    return rule.of_window(sums if slope is None else sums + slope * number)


def _over(
    dropped: Dropped, grad: Tensor, decoder: Tensor, wide: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(F,) in ``wide`` the sum of ``grad`` times its decoder row over each latent's entries, and their number."""
    tokens, latents = len(grad), len(decoder)
    if dropped.mask is not None:
        sums, number = (torch.zeros(latents, dtype=wide, device=grad.device) for _ in range(2))
        rows = max(AT_ONCE["cuda" if grad.is_cuda else "cpu"] // max(latents, 1), 1)
        for first in range(0, tokens, rows):
            mask = dropped.mask[first : first + rows].to(wide)
            product = functional.linear(grad[first : first + rows], decoder.T, result_dtype=wide)
            sums += torch.linalg.vecdot(product, mask, dim=0)
            number += mask.sum(0)
        return sums, number
    assert dropped.indices is not None and dropped.offsets is not None
    ones = torch.ones(dropped.indices.shape[0], dtype=wide, device=grad.device)
    slopes = ops.decode_backward_values(grad, ones, dropped.indices, dropped.offsets, decoder, backend)
    index = ops.by_latent(dropped.indices, dropped.offsets, latents, backend)
    every_token = ones.new_ones(tokens, 1)
    sums = ops.decode_backward_weight(every_token, slopes, *index, wide, backend)[:, 0]
    return sums, index[0].diff().to(wide)
