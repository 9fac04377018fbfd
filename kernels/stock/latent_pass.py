"""The latent pass in fast stock PyTorch: a step's gradients by latent, and Adam on them."""
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .._rounding import are_narrow
from .._terms import GIVEN, NUMBER_OF_LISTS, Term, terms_of
from . import densified, limits, moments
from .backward import decode_backward_values, row_products
from .decode import bags, full_bags, wide_of
from .dense import to_dense


class _LatentPass:
    """The gradients of chunks of latents, from what all chunks share: entries, with slopes, in order of latents.

    Chunk n has the latents from ``bounds[n]`` to ``bounds[n + 1]``. There are several on a CPU alone, where reading a
    number from a tensor waits for no device.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, along: Tensor | None, terms: list[Term], dtype: torch.dtype, bounds: list[int]
    ) -> None:
        self.x, self.weight, self.along, self.dtype, self.bounds = x.to(dtype), weight, along, dtype, bounds
        self.bias = self.x.new_zeros(weight.shape[0])
        self.sums = [self._prepared(term) for term in terms]

    def _prepared(self, term: Term) -> Callable[[int], tuple[Tensor, Tensor]]:
        """The term's sums over a chunk, as a function of its number; its part of ``bias`` is added here."""
        rows, num_latents, x, bounds = term.offsets.numel() - 1, self.weight.shape[0], self.x, self.bounds  # not self
        grad, values = term.grad.to(self.dtype), term.values.to(self.dtype)
        inner = values
        if term.mode != GIVEN:
            dense = densified.is_dense(
                "decode_backward_values", values.numel(), rows, num_latents, values.device.type, term.grad.dtype,
                self.weight.dtype,
            )  # fmt: skip
            product = densified.decode_backward_values if dense else decode_backward_values
            inner = product(term.grad, values, term.indices, term.offsets, self.weight)
        slopes = term.at_entries(inner).to(self.dtype)
        if term.is_dense:
            values, slopes = (to_dense(t, term.indices, term.offsets, num_latents) for t in (values, slopes))
            self.bias += slopes.sum(0)

            def products(number: int) -> tuple[Tensor, Tensor]:
                latents = slice(bounds[number], bounds[number + 1])
                return values[:, latents].T @ grad, slopes[:, latents].T @ x

            return products
        values, slopes = values[term.latent_positions], slopes[term.latent_positions]
        row = term.latent_rows.clamp(max=max(rows - 1, 0))
        ends = term.latent_offsets.to(row.dtype)
        one = slopes.new_ones(min(rows, 1), 1, dtype=torch.float64)  # sums of single numbers cost little
        self.bias += bags(slopes.double(), torch.zeros_like(row), ends, one)[:, 0]
        if len(bounds) == 2:
            return lambda number: (bags(values, row, ends, grad), bags(slopes, row, ends, x))
        firsts = ends[bounds].tolist()

        def sums(number: int) -> tuple[Tensor, Tensor]:
            first, entries = firsts[number], slice(firsts[number], firsts[number + 1])
            mine, bags_of = row[entries], ends[bounds[number] : bounds[number + 1] + 1] - first
            return full_bags(values[entries], mine, bags_of, grad), full_bags(slopes[entries], mine, bags_of, x)

        return sums

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Gradients of a chunk's rows of the decoder and of the transposed encoder."""
        latents = slice(self.bounds[number], self.bounds[number + 1])
        parts = [sums(number) for sums in self.sums]
        if self.along is not None or not parts:
            scale = self.bias.new_zeros(()) if self.along is None else self.along[latents, None].to(self.dtype)
            rows = self.weight[latents].to(self.dtype)
            parts.append((scale * rows, self.x.new_zeros(len(rows), self.x.shape[1])))
        decoder, encoder = parts[0]
        for more_decoder, more_encoder in parts[1:]:
            decoder, encoder = decoder.add_(more_decoder), encoder.add_(more_encoder)
        return decoder, encoder


def latent_gradients(x, weight, along, *lists_and_dtype):
    *lists, dtype = lists_and_dtype
    whole = _LatentPass(x, weight, along, terms_of(lists), wide_of(x, weight), [0, weight.shape[0]])
    return tuple(grad.to(dtype) for grad in (*whole.of(0), whole.bias))


def latent_adam(parameters, exp_avgs, exp_avg_sqs, copies, x, along, *rest):
    """On a CPU latents go through in chunks: torch's fused Adam finds a gradient in the cache and uses it up there.

    On a GPU torch's fused Adam of fp32 weights takes beta1 and beta2 as fp32 numbers: 1 - 0.999 is then off by 1.3e-5.
    """
    lists, (step, lr, beta1, beta2, eps, weight_decay, unit_rows, skip) = rest[:NUMBER_OF_LISTS], rest[NUMBER_OF_LISTS:]
    weight, encoder = parameters[:2]
    wide, row_major = torch.promote_types(weight.dtype, torch.float32), encoder.stride(1) != 1
    num_latents = size = weight.shape[0]
    if weight.is_cpu:
        size = min(limits.latents_in_cache(weight.shape[1] + x.shape[1]), num_latents)
    bounds = [*range(0, num_latents, max(size, 1)), num_latents]
    latent_pass = _LatentPass(x, copies[0] if copies else weight, along, terms_of(lists), wide, bounds)
    center, energies = x.new_zeros(x.shape[1], dtype=wide), [x.new_zeros(0, dtype=wide)]
    skipped = None if skip is None else skip != 0
    adam = moments.FusedAdam(
        found_inf=None if skipped is None else skipped.float(),  # it asks whether that is 1
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        latents = slice(start, end)
        places = [[t[latents] for t in tensors] for tensors in (parameters, exp_avgs, exp_avg_sqs)]
        grads = [*latent_pass.of(number), latent_pass.bias[latents]][: len(parameters)]
        center.addmv_(places[0][1].T.to(wide), latent_pass.bias[latents], alpha=-1)
        if row_major:  # a row-major W_enc, seen latent by latent, is copied along its rows
            places = [[tensors[0], tensors[1].T, *tensors[2:]] for tensors in places]
        state = [[t if are_narrow(t, p) else t.contiguous() for t, p in zip(tensors, places[0], strict=True)]
                 for tensors in places]  # fused Adam ignores strides  # fmt: skip
        keys = [moments.keys(step, matrix, latents, p.shape[1], by_column=matrix == 1 and row_major)
                if are_narrow(m, p) else None
                for matrix, (p, m) in enumerate(zip(parameters, exp_avgs, strict=True))]  # fmt: skip
        if unit_rows:
            rows = state[0][0].to(wide)
            squares = row_products(rows, rows)
            share = row_products(grads[0], rows) / torch.where(squares == 0, 1.0, squares)
            grads[0].addcmul_(share[:, None], rows, value=-1)
        energies += [row_products(grad, grad) for grad in grads[:2]]  # one sum of all would err a hundred times as much
        if row_major:
            grads[1] = grads[1].T.contiguous()
        used = [grad.to(parameter.dtype) for parameter, grad in zip(state[0], grads, strict=True)]
        adam(state[0], used, state[1], state[2], [step] * len(used), keys)
        if unit_rows:
            rows = state[0][0].to(wide)
            norms = row_products(rows, rows).sqrt_()
            unchanged = norms == 0 if skipped is None else (norms == 0) | skipped
            state[0][0] /= torch.where(unchanged, 1.0, norms)[:, None]
        for before, after in zip(places, state, strict=True):
            for place, new in zip(before, after, strict=True):
                if place.data_ptr() != new.data_ptr():
                    place.copy_(new)
        for copy, parameter in zip(copies, parameters, strict=False):
            copy, new = copy[latents], parameter[latents]
            copy.copy_(new if skipped is None else torch.where(skipped, copy, new))
        del grads, used, state, places  # their memory serves the next chunk
    if len(parameters) > 2:
        energies.append(latent_pass.bias.square())
    return center, torch.cat(energies).sum()
