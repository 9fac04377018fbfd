"""The latent pass in fast stock PyTorch: a step's gradients by latent, and Adam on them."""
from collections.abc import Callable

import torch
from torch import Tensor

from .._rounding import are_narrow
from .._terms import GIVEN, NUMBER_OF_LISTS, Term, terms_of
from . import densified, limits, moments
from .backward import decode_backward_values
from .decode import bags, wide_of
from .dense import to_dense


class _LatentPass:
    """The gradients of any range of latents, from what all ranges share: entries, with slopes, in order of latents."""

    def __init__(self, x: Tensor, weight: Tensor, along: Tensor | None, terms: list[Term], dtype: torch.dtype):
        self.x, self.weight, self.along, self.dtype = x.to(dtype), weight, along, dtype
        self.bias = self.x.new_zeros(weight.shape[0])
        self.sums = [self._prepared(term) for term in terms]

    def _prepared(self, term: Term) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """The term's sums over a range of latents, as a function of the range; its part of ``bias`` is added here."""
        rows, num_latents, x = term.offsets.numel() - 1, self.weight.shape[0], self.x  # no cycle through self
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
            return lambda latents: (values[:, latents].T @ grad, slopes[:, latents].T @ x)
        values, slopes = values[term.latent_positions], slopes[term.latent_positions]
        row = term.latent_rows.clamp(max=max(rows - 1, 0))
        ends = term.latent_offsets.to(row.dtype)
        one = slopes.new_ones(min(rows, 1), 1, dtype=torch.float64)  # sums of single numbers cost little
        self.bias += bags(slopes.double(), torch.zeros_like(row), ends, one)[:, 0]

        def sums(latents: slice) -> tuple[Tensor, Tensor]:
            bounds, entries = ends[latents.start : latents.stop + 1], slice(0, values.numel())
            if latents.stop - latents.start < num_latents:  # on a CPU only, where reading waits for nothing
                entries = slice(int(bounds[0]), int(bounds[-1]))
                bounds = bounds - entries.start
            mine = row[entries]
            return bags(values[entries], mine, bounds, grad), bags(slopes[entries], mine, bounds, x)

        return sums

    def of(self, latents: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows ``latents`` of the decoder and of the transposed encoder, and of that part of the bias."""
        parts = [sums(latents) for sums in self.sums]
        if self.along is not None or not parts:
            scale = self.bias.new_zeros(()) if self.along is None else self.along[latents, None].to(self.dtype)
            count = latents.stop - latents.start
            parts.append((scale * self.weight[latents].to(self.dtype), self.x.new_zeros(count, self.x.shape[1])))
        decoder, encoder = parts[0]
        for more_decoder, more_encoder in parts[1:]:
            decoder, encoder = decoder.add_(more_decoder), encoder.add_(more_encoder)
        return decoder, encoder, self.bias[latents]


def latent_gradients(x, weight, along, *lists_and_dtype):
    *lists, dtype = lists_and_dtype
    grads = _LatentPass(x, weight, along, terms_of(lists), wide_of(x, weight)).of(slice(0, weight.shape[0]))
    return tuple(grad.to(dtype) for grad in grads)


def latent_adam(parameters, exp_avgs, exp_avg_sqs, copies, x, along, *rest):
    """On a CPU latents go through in chunks: torch's fused Adam finds a gradient in the cache and uses it up there.

    On a GPU torch's fused Adam of fp32 weights takes beta1 and beta2 as fp32 numbers: 1 - 0.999 is then off by 1.3e-5.
    """
    lists, (step, lr, beta1, beta2, eps, weight_decay, unit_rows, skip) = rest[:NUMBER_OF_LISTS], rest[NUMBER_OF_LISTS:]
    weight, encoder = parameters[:2]
    wide = torch.promote_types(weight.dtype, torch.float32)
    latent_pass = _LatentPass(x, copies[0] if copies else weight, along, terms_of(lists), wide)
    center, square = x.new_zeros(x.shape[1], dtype=wide), x.new_zeros((), dtype=wide)
    found_inf = None if skip is None else (skip != 0).float()  # fused Adam asks whether it is 1
    adam = moments.FusedAdam(
        found_inf=found_inf, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps
    )
    num_latents, row_major = weight.shape[0], encoder.stride(1) != 1
    chunk = max(num_latents, 1)
    if weight.device.type == "cpu":
        chunk = limits.latents_in_cache(weight.shape[1] + x.shape[1])
    for start in range(0, num_latents, chunk):
        latents = slice(start, min(start + chunk, num_latents))
        places = [[t[latents] for t in tensors] for tensors in (parameters, exp_avgs, exp_avg_sqs)]
        if row_major:  # a row-major W_enc, seen latent by latent, is copied along its rows
            places = [[tensors[0], tensors[1].T, *tensors[2:]] for tensors in places]
        state = [[t if are_narrow(t, p) else t.contiguous() for t, p in zip(tensors, places[0], strict=True)]
                 for tensors in places]  # fused Adam ignores strides  # fmt: skip
        keys = [moments.keys(step, number, latents, p.shape[1], by_column=number == 1 and row_major)
                if are_narrow(m, p) else None
                for number, (p, m) in enumerate(zip(parameters, exp_avgs, strict=True))]  # fmt: skip
        grads = latent_pass.of(latents)
        center -= grads[2] @ encoder[latents].to(wide)
        if unit_rows:
            rows = state[0][0].to(wide)
            squares = torch.linalg.vecdot(rows, rows)
            share = torch.linalg.vecdot(grads[0], rows) / torch.where(squares == 0, 1.0, squares)
            grads[0].addcmul_(share[:, None], rows, value=-1)
        square += sum(_energy(grad) for grad in grads[: len(parameters)])
        used = [grads[0], grads[1].T.contiguous() if row_major else grads[1], grads[2]]
        used = [grad.to(parameter.dtype) for parameter, grad in zip(state[0], used, strict=False)]
        adam(state[0], used, state[1], state[2], [step - 1 for _ in used], keys)
        if unit_rows:
            norms = torch.linalg.vector_norm(state[0][0], dim=1, keepdim=True, dtype=wide)
            unchanged = norms == 0 if skip is None else (norms == 0) | (skip != 0)
            state[0][0] /= torch.where(unchanged, 1.0, norms)
        for before, after in zip(places, state, strict=True):
            for place, new in zip(before, after, strict=True):
                if place.data_ptr() != new.data_ptr():
                    place.copy_(new)
        for copy, parameter in zip(copies, parameters, strict=False):
            copy, new = copy[latents], parameter[latents]
            copy.copy_(new if skip is None else torch.where(skip != 0, copy, new))
        del grads, used, state  # their memory serves the next chunk
    return center, square


def _energy(t: Tensor) -> Tensor:
    """The sum of squares, row by row: a CPU's dot product of all errs a hundred times as much."""
    return torch.linalg.vector_norm(t, dim=-1).square().sum()
