"""torch's fused Adam on moments that may be kept in bfloat16: the exact ones exist for some rows at a time."""
from collections.abc import Sequence

import torch
from torch import Tensor

from .._rounding import NOT_ROUNDED_UP, latent_keys
from . import limits

LARGEST = torch.tensor(NOT_ROUNDED_UP, dtype=torch.int32, device="cpu").view(torch.float32).item()
Keys = tuple[Tensor, Tensor]  # int32, of each row of a tensor and of each column: their exclusive or is hashed


def keys(step: Tensor, matrix: int, latents: slice, width: int, *, by_column: bool = False) -> Keys:
    """What decides how the moments of ``latents`` of a matrix are rounded (``_rounding.random_bits``).

    ``by_column``: for the transposed matrix, of a column in each row.
    """
    of_latent = latent_keys(step, matrix, torch.arange(latents.start, latents.stop, device=step.device))
    columns = torch.arange(width, dtype=torch.int32, device=step.device)
    of_latent = of_latent.to(torch.int32)
    return (columns, of_latent) if by_column else (of_latent, columns)


class FusedAdam:
    """torch's fused Adam with these options, on one list of tensors after the other.

    The memory that exact moments and random bits take serves all of them: to a CPU new pages cost more than the work.
    """

    def __init__(self, **options) -> None:
        self.options = options
        self._memory: dict[str, Tensor] = {}

    def __call__(
        self, parameters: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
        steps: list[Tensor], all_keys: list[Keys | None],
    ) -> None:  # fmt: skip
        """One step in place, which the counters ``steps`` count already; ``all_keys`` has those of narrow moments.

        Parameters and gradients are contiguous, and so are moments but for narrow ones.
        """
        tensors = list(zip(parameters, grads, exp_avgs, exp_avg_sqs, steps, strict=True))
        as_they_are = [five for five, its_keys in zip(tensors, all_keys, strict=True) if its_keys is None]
        if as_they_are:
            self._update(as_they_are)
        for (parameter, grad, *moments, step), its_keys in zip(tensors, all_keys, strict=True):
            if its_keys is None:
                continue
            most = max(limits.WIDE_ELEMENTS[parameter.device.type] // max(parameter.shape[1], 1), 1)
            for start in range(0, parameter.shape[0], most):
                rows = slice(start, start + most)
                places = [moment[rows] for moment in moments]
                exact = [one.copy_(place) for one, place in zip(
                    self._scratch("exact", places[0].shape, torch.float32, grad), places, strict=True)]  # fmt: skip
                self._update([(parameter[rows], grad[rows], *exact, step)])
                self._round(places, exact, its_keys[0][rows], its_keys[1])

    def _update(self, tensors: Sequence[tuple[Tensor, ...]]) -> None:
        for dtype in {parameter.dtype for parameter, *_ in tensors}:
            same = [five for five in tensors if five[0].dtype == dtype]
            parameters, grads, firsts, seconds, steps = map(list, zip(*same, strict=True))
            torch._fused_adam_(parameters, grads, firsts, seconds, [], steps, amsgrad=False, maximize=False,
                               grad_scale=None, **self.options)  # fmt: skip

    def _round(self, places: list[Tensor], exact: list[Tensor], of_row: Tensor, of_column: Tensor) -> None:
        """Both moments by one hash (``_rounding.random_bits``, ``rounded``), blocks of rows that stay in a cache.

        The hash is computed in int32: products are then the low halves, and the sign that shifts spread is masked off.
        """
        size = of_row.numel() if of_row.is_cuda else max(limits.ROUNDED_IN_CACHE // max(of_column.numel(), 1), 1)
        any_large = [one.is_cuda or not _all_below(LARGEST, one) for one in exact]  # a CPU waits for no answer
        for block in zip(of_row.split(size), *(t.split(size) for t in (*places, *exact)), strict=True):
            keys_of_rows, *of_block = block
            h, high = self._scratch("random", of_block[0].shape, torch.int32, of_row)
            torch.bitwise_xor(keys_of_rows[:, None], of_column, out=h)
            h *= 0x7FEB352D
            torch.bitwise_right_shift(h, 15, out=high)
            high &= 0x1FFFF
            h ^= high
            h *= 0x846CA68B - (1 << 32)
            torch.bitwise_right_shift(h, 16, out=high)
            h ^= high
            for place, one, random, may_be_large in zip(of_block[:2], of_block[2:], (h, high), any_large, strict=True):
                bits = one.view(torch.int32)
                random &= 0xFFFF
                if may_be_large:
                    random.masked_fill_((bits & 0x7FFFFFFF) >= NOT_ROUNDED_UP, 0)
                bits += random
                bits >>= 16
                place.view(torch.int16).copy_(bits)

    def _scratch(self, name: str, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two arrays, overwritten by the next call of the same name."""
        size = shape.numel()
        memory = self._memory.get(name)
        if memory is None or memory.shape[1] < size:
            memory = self._memory[name] = like.new_empty(2, size, dtype=dtype)
        return memory[0, :size].view(shape), memory[1, :size].view(shape)


def _all_below(bound: float, numbers: Tensor) -> bool:
    """Whether all magnitudes are; no NaN is. (A CPU's vector_norm takes twenty times as long.)"""
    low, high = (extreme.item() for extreme in numbers.aminmax())
    return -bound < low and high < bound
