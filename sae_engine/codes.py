"""SparseCodes: what every selection returns and every operation downstream takes."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae_kernels.dispatch import transforming
from sae_kernels.ops import ops, uniform_offsets

from ._checks import deep, floating, number_in, same_device, shaped
from ._checks import widths as checked_widths


class ByLatent(NamedTuple):
    """The same entries sorted by (latent, row): latent f owns ``offsets[f]:offsets[f + 1]``."""

    offsets: Tensor  # (F + 1,) int64
    rows: Tensor  # (N,) int32, the token of each entry
    positions: Tensor  # (N,) int64, where the entry stands in ``values``


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Sparse activations as compressed rows.

    Row r owns entries ``offsets[r]:offsets[r + 1]``, its indices ascending. A stored entry may be 0: counting rules
    store exactly N entries, so that N is known without asking the device. Zeros do not count as fired.

    Codes move, change their dtype and are scaled as tensors are, and stay the same entries: ``codes.cpu()``,
    ``codes.half()``, ``2 * codes``, ``codes / scale``. ``torch.save(codes, path)`` writes them;
    ``torch.load(path, weights_only=True)`` reads them once ``sae_engine`` is imported, and raises ValueError where the
    file does not hold sound codes.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]))
        >>> codes
        SparseCodes(batch_shape=(2,), d_sae=3, mean_l0=1.5, dtype=torch.float32, device=cpu)
        >>> codes.indices.tolist(), codes.offsets.tolist()
        ([1, 2, 0], [0, 2, 3])
        >>> (codes * torch.tensor([1.0, 1.0, 0.0])).to_dense()  # latent 2 is ablated
        tensor([[0., 1., 0.],
                [2., 0., 0.]])

    Attributes:
        values: ``(N,)`` activations, the dtype of the pre-activations. Differentiable.
        indices: ``(N,)`` int32 latents.
        offsets: ``(rows + 1,)`` int64.
        batch_shape: leading dimensions of the pre-activations; their product is ``rows``.
        num_latents: F.
        k: entries per row where every row stores the same number, otherwise None.
        required: entries that the rule asked for, a device scalar, where a capacity was given; see :meth:`check`.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    batch_shape: tuple[int, ...]
    num_latents: int
    k: int | None = None
    required: Tensor | None = None
    _transposed: list[ByLatent] = field(default_factory=list, repr=False)  # cache of by_latent, shared by replace()

    @property
    def shape(self) -> torch.Size:
        """(*batch_shape, F)."""
        return torch.Size((*self.batch_shape, self.num_latents))

    @property
    def rows(self) -> int:
        """Number of rows: the product of ``batch_shape``."""
        return self.offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def l0(self) -> Tensor:
        """Non-zero values of each row, (*batch_shape,) int64."""
        if self.k is not None:
            return (self.values.detach().view(self.rows, self.k) != 0).sum(1).view(self.batch_shape)
        fired = torch.cat([self.offsets.new_zeros(1), (self.values.detach() != 0).cumsum(0)])
        return fired[self.offsets].diff().view(self.batch_shape)

    @property
    def by_latent(self) -> ByLatent:
        """The transposed (CSC) index. Sorted once, then cached: forward and backward passes share it."""
        if torch.compiler.is_compiling():  # the graph holds the sort once anyway; a cache would be a side effect
            return self._transpose()
        if not self._transposed:
            with torch.inference_mode(False):  # what is cached may serve a backward pass later
                self._transposed.append(self._transpose())
        return self._transposed[0]

    def _transpose(self) -> ByLatent:
        return ByLatent(*ops.by_latent(self.indices, self.offsets, self.num_latents, "auto"))

    def transposed_for(self, *learned: Tensor | None) -> tuple[Tensor | None, ...]:
        """The transposed index where a gradient of ``learned`` will ask for it, else three times None.

        Example:
            >>> SparseCodes.from_dense(torch.eye(2)).transposed_for(torch.ones(2))
            (None, None, None)
        """
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
            return self.by_latent
        return None, None, None

    def check(self) -> SparseCodes:
        """Raises RuntimeError where the rule asked for more entries than its capacity. Reads the device once.

        Example:
            >>> SparseCodes.from_dense(torch.eye(2)).check().l0.tolist()
            [1, 1]
        """
        self._owned()
        return self

    def _owned(self) -> int:
        """Entries that belong to a row; raises as :meth:`check` does. Reads the device once with a capacity."""
        if self.required is None:
            return self.values.shape[0]
        owned = int(self.required)
        if owned > self.values.shape[0]:
            raise RuntimeError(
                f"capacity={self.values.shape[0]} is too small: the rule keeps {owned} entries; "
                "raise capacity, or leave it out to let the size follow the data"
            )
        return owned

    def assert_fits(self) -> None:
        """As :meth:`check`, on the device: nothing waits, and an overflow ends the program's work there."""
        if self.required is not None and not transforming():  # there everything fits
            torch._assert_async(
                self.required <= self.values.shape[0],
                f"capacity={self.values.shape[0]} is too small for the entries that the rule keeps",
            )

    def validate(self) -> None:
        """Under ``SAE_CHECK=1``: raises ValueError where indices or offsets break the format."""
        if deep():
            self._check_numbers()

    def _check_numbers(self) -> None:
        if bool(((self.indices < 0) | (self.indices >= self.num_latents)).any()):
            raise ValueError(f"codes.indices must lie in [0, {self.num_latents}), got {self.indices.min().item()}"
                             f" to {self.indices.max().item()}")  # fmt: skip
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if bool((self.offsets.diff() < 0).any()) or first != 0 or last > self.values.shape[0]:
            raise ValueError(f"codes.offsets must ascend from 0 to at most {self.values.shape[0]}")

    def to_dense(self) -> Tensor:
        """(*batch_shape, F) with zeros elsewhere. Differentiable.

        Example:
            >>> SparseCodes.from_topk(torch.tensor([[5.0]]), torch.tensor([[1]]), 3).to_dense()
            tensor([[0., 5., 0.]])
        """
        return ops.to_dense(self.values, self.indices, self.offsets, self.num_latents, "auto").view(self.shape)

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """(values, indices), each (*batch_shape, K) with K the longest row.

        Short rows end in value 0 at their lowest unused latents, so that the indices of a row stay distinct. Reads the
        device once (twice with a capacity) unless every row stores the same number of entries.

        Raises:
            RuntimeError: a capacity was too small.

        Example:
            >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]))
            >>> codes.to_padded()
            (tensor([[1., 3.],
                    [2., 0.]]), tensor([[1, 2],
                    [0, 1]], dtype=torch.int32))
        """
        if self.k is not None:
            shape = (*self.batch_shape, self.k)
            return self.values.view(shape), self.indices.view(shape)
        self.check()
        counts = self.offsets.diff()
        width = int(counts.max()) if self.rows else 0
        shape = (*self.batch_shape, width)
        if width == 0:
            return self.values.new_zeros(shape), self.indices.new_zeros(shape)
        column = torch.arange(width, device=self.device)
        present = column < counts[:, None]
        entry = torch.where(present, self.offsets[:-1, None] + column, 0)
        values = torch.where(present, self.values[entry], 0.0)
        indices = torch.where(present, self.indices[entry], width)
        # A row stores no more of the first K latents than it has entries, so the unused ones suffice to fill it up.
        used = torch.zeros(self.rows, width + 1, dtype=torch.uint8, device=self.device)
        used.scatter_(1, indices.long().clamp(max=width), 1)
        unused = used[:, :width].sort(dim=1, stable=True).indices
        fill = unused.gather(1, (column - counts[:, None]).clamp(min=0))
        return values.view(shape), torch.where(present, indices, fill.int()).view(shape)

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, num_latents: int) -> SparseCodes:
        """Codes from (*batch_shape, k) ``values`` and integer ``indices``, distinct within a row and in any order.

        Raises:
            TypeError: ``values`` is not floating-point, or ``indices`` not of integers.
            ValueError: their shapes or devices differ, or a row has more than ``num_latents`` entries.

        Example:
            >>> codes = SparseCodes.from_topk(torch.tensor([[5.0, 4.0]]), torch.tensor([[2, 0]]), num_latents=3)
            >>> codes.values.tolist(), codes.indices.tolist()  # each row by ascending latent
            ([4.0, 5.0], [0, 2])
        """
        if values.shape != indices.shape or values.dim() == 0:
            raise ValueError(f"indices must have the shape of values {tuple(values.shape)}, got {tuple(indices.shape)}")
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        floating("values", values)
        same_device("indices", indices, values)
        k = values.shape[-1]
        if k > num_latents:
            raise ValueError(f"values must have at most num_latents = {num_latents} entries a row, got {k}")
        rows = values.shape[:-1].numel()
        indices, order = indices.reshape(rows, k).sort(dim=1)
        if deep() and not bool(((indices >= 0) & (indices < num_latents)).all() & (indices.diff(dim=1) > 0).all()):
            raise ValueError(f"indices must lie in [0, {num_latents}) and be distinct within a row")
        return cls(
            values.reshape(rows, k).gather(1, order).flatten(), indices.int().flatten(),
            uniform_offsets(rows, k, values.device), tuple(values.shape[:-1]), num_latents, k,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCodes:
        """The non-zero entries (NaN included) of a (*batch_shape, F) tensor. Differentiable; reads the device once.

        Raises:
            TypeError: ``dense`` is not floating-point.

        Example:
            >>> SparseCodes.from_dense(torch.tensor([[0.0, 5.0], [0.0, 0.0]])).offsets
            tensor([0, 1, 1])
        """
        floating("dense", dense)
        matrix = dense.reshape(-1, dense.shape[-1]) if dense.shape[-1] else dense.reshape(dense.shape[:-1].numel(), 0)
        row, column = (matrix.detach() != 0).nonzero(as_tuple=True)
        bounds = torch.arange(matrix.shape[0] + 1, device=dense.device)
        return cls(
            values=matrix[row, column],
            indices=column.int(),
            offsets=torch.searchsorted(row, bounds),
            batch_shape=tuple(dense.shape[:-1]),
            num_latents=dense.shape[-1],
        )

    def to_sparse_csr(self) -> Tensor:
        """A (rows, F) ``torch.sparse_csr`` tensor; stored zeros stay stored. Reads the device once with a capacity.

        Raises:
            RuntimeError: a capacity was too small.

        Example:
            >>> SparseCodes.from_dense(torch.eye(2)).to_sparse_csr().col_indices()
            tensor([0, 1])
        """
        values, indices = self.values, self.indices
        if self.required is not None:
            owned = self._owned()
            values, indices = values[:owned], indices[:owned]
        size = (self.rows, self.num_latents)
        # The operator itself: in front of it, torch 2.11's constructor warns that nothing was said about checking the
        # tensor's invariants even where that was said. Who switches these checks on for all tensors has them here too.
        return torch.ops.aten.sparse_compressed_tensor(
            self.offsets, indices.long(), values, size, dtype=values.dtype, layout=torch.sparse_csr, device=self.device
        )

    def replace(self, *, values: Tensor) -> SparseCodes:
        """The same entries with other values, (N,): steering.

        Raises:
            TypeError: ``values`` is not floating-point.
            ValueError: its shape or device is another.

        Example:
            >>> codes = SparseCodes.from_dense(torch.eye(2))
            >>> codes.replace(values=codes.values * 3).to_dense()
            tensor([[3., 0.],
                    [0., 3.]])
        """
        floating("values", values)
        if values.shape != self.values.shape or values.device != self.device:
            raise ValueError(
                f"values must be {tuple(self.values.shape)} on {self.device}, "
                f"got {tuple(values.shape)} on {values.device}"
            )
        return replace(self, values=values)

    def split_latents(self, widths: Sequence[int]) -> SparseCodes:
        """The same entries as rows of shape (*batch_shape, len(widths)): run i holds latents widths[i-1]..widths[i]-1.

        ``widths`` ascend and end with F. No entry moves and its index stays what it is: only offsets are new.

        Raises:
            TypeError, ValueError: ``widths`` are no such integers.

        Example:
            >>> codes = SparseCodes.from_dense(torch.tensor([[1.0, 2.0, 3.0]]))
            >>> codes.split_latents([1, 3]).l0
            tensor([[1, 2]])
        """
        return self._runs(checked_widths(widths, self.num_latents))

    def _runs(self, widths: Sequence[int]) -> SparseCodes:
        """:meth:`split_latents` of widths as they are: some may be equal, or 0."""
        number = len(widths)
        # Filled on the device: a tensor made of a list would come from the host, which waits and cannot be captured.
        bounds = torch.cat([torch.full((1,), width, dtype=torch.int32, device=self.device) for width in widths])
        run = torch.searchsorted(bounds, self.indices, right=True)
        entry = torch.arange(self.values.shape[0], device=self.device)
        row = torch.searchsorted(self.offsets[1:].contiguous(), entry, right=True)
        key = row * number + run.clamp(max=number - 1)  # ascends; entries of unused capacity lie past the last row
        offsets = torch.searchsorted(key, torch.arange(self.rows * number + 1, device=self.device))
        return replace(self, offsets=offsets, batch_shape=(*self.batch_shape, number), k=None, _transposed=[])

    def detach(self) -> SparseCodes:
        """The same codes, cut off from autograd."""
        return replace(self, values=self.values.detach())

    def to(self, *args, **kwargs) -> SparseCodes:
        """As ``Tensor.to``: the device applies to all tensors, the dtype to the values alone.

        Raises:
            TypeError: the dtype is not a floating one.

        Example:
            >>> SparseCodes.from_dense(torch.eye(2)).to(torch.float64).dtype
            torch.float64
        """
        values = floating("codes.to(...)", self.values.to(*args, **kwargs))
        if values.device == self.device:
            return replace(self, values=values)
        later = kwargs.get("non_blocking", [given for given in args if isinstance(given, bool)][:1] == [True])
        moved = {name: t.to(values.device, non_blocking=later) for name in ("indices", "offsets", "required")
                 if (t := getattr(self, name)) is not None}  # fmt: skip
        return replace(self, values=values, **moved, _transposed=[])

    def cpu(self) -> SparseCodes:
        """The codes on the CPU; as they are where they lie there already. Waits for their device.

        Example:
            >>> SparseCodes.from_dense(torch.eye(2)).cpu().device
            device(type='cpu')
        """
        return self.to("cpu")

    def cuda(self, device: torch.device | int | None = None, *, non_blocking: bool = False) -> SparseCodes:
        """The codes on a GPU: ``device``, an index or a CUDA device; by default the current one.

        Raises:
            ValueError: ``device`` is no CUDA device.

        Example:
            >>> codes = SparseCodes.from_dense(torch.eye(2)).cuda()  # doctest: +SKIP
        """
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        if chosen.type != "cuda":
            raise ValueError(f"device must be a CUDA device, got {device!r}: use codes.to(device)")
        return self.to(chosen, non_blocking=non_blocking)

    def double(self) -> SparseCodes:
        """The same entries with values in float64. ``SparseCodes.from_dense(torch.eye(2)).double()``"""
        return self.to(torch.float64)

    def float(self) -> SparseCodes:
        """The same entries with values in float32. ``SparseCodes.from_dense(torch.eye(2)).float()``"""
        return self.to(torch.float32)

    def half(self) -> SparseCodes:
        """The same entries with values in float16. ``SparseCodes.from_dense(torch.eye(2)).half()``"""
        return self.to(torch.float16)

    def bfloat16(self) -> SparseCodes:
        """The same entries with values in bfloat16. ``SparseCodes.from_dense(torch.eye(2)).bfloat16()``"""
        return self.to(torch.bfloat16)

    __array_ufunc__ = None  # numpy leaves ``np.float32(2) * codes`` to __rmul__

    def __mul__(self, other) -> SparseCodes:
        """The same entries, their values times a number, a scalar tensor, or at each latent a tensor (d_sae,).

        Dtypes promote as those of tensors do. Differentiable in both. At a tensor, torch.compile breaks its graph.

        Raises:
            TypeError: ``other`` is neither a number nor a real tensor.
            ValueError: it is a tensor of another shape.

        Example:
            >>> (2 * SparseCodes.from_dense(torch.eye(2))).values
            tensor([2., 2.])
        """
        return replace(self, values=self.values * self._at_entries(other))

    __rmul__ = __mul__

    def __truediv__(self, other) -> SparseCodes:
        """As multiplication: the values over a number, a scalar tensor or, at each latent, a tensor (d_sae,).

        Example:
            >>> (SparseCodes.from_dense(torch.eye(2)) / torch.tensor([2.0, 4.0])).values
            tensor([0.5000, 0.2500])
        """
        return replace(self, values=self.values / self._at_entries(other))

    def __neg__(self) -> SparseCodes:
        """The same entries with the opposite sign. ``-SparseCodes.from_dense(torch.eye(2))``"""
        return replace(self, values=-self.values)

    def _at_entries(self, other):
        """A factor as the values take it."""
        if isinstance(other, Tensor) and not other.is_complex():
            if other.dim() == 0:
                return other
            if other.shape != (self.num_latents,):
                raise ValueError(f"codes are multiplied and divided by a scalar or a tensor ({self.num_latents},), one "
                                 f"number per latent, got shape {tuple(other.shape)}; use codes.replace(values=…)")
            return at_latents(other if other.is_floating_point() else other.to(self.dtype), self)
        if (number := number_in(other)) is None:
            kind = other.dtype if isinstance(other, Tensor) else type(other).__name__
            raise TypeError(f"codes are multiplied and divided by a number or a real tensor, () or "
                            f"({self.num_latents},), got {kind}")  # fmt: skip
        return number

    def __repr__(self) -> str:
        """Sizes, and the mean L0: without waiting for a device, where only a bound on it is known."""
        rows, stored = self.rows, self.values.shape[0]
        parts = [f"batch_shape={self.batch_shape}, d_sae={self.num_latents}"]
        if rows and self.values.is_cpu and type(self.values) in (Tensor, torch.nn.Parameter):  # numbers are there
            parts.append(f"mean_l0={float(self.l0.double().mean()):.4g}")
        elif rows and self.required is None:
            parts.append(f"mean_l0<={stored / rows:.4g}")
        if self.required is not None:
            parts.append(f"capacity={stored}")
        parts.append(f"dtype={self.dtype}, device={self.device}")
        if self.values.requires_grad:
            parts.append("requires_grad=True")
        return f"SparseCodes({', '.join(parts)})"

    def __copy__(self) -> SparseCodes:
        return replace(self)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("codes of a single row have no length")
        return self.batch_shape[0]

    def __bool__(self) -> bool:
        return True  # as other objects are, however many rows there are

    def __getitem__(self, rows) -> SparseCodes:
        """Rows selected over the leading dimensions, as indexing a (*batch_shape,) tensor would.

        Reads the device once (twice with a capacity) unless every row stores the same number of entries; a list or a
        boolean mask as ``rows`` costs the wait that it costs any tensor.
        """
        chosen = torch.arange(self.rows, device=self.device).view(self.batch_shape)[rows]
        batch_shape, chosen = tuple(chosen.shape), chosen.flatten()
        if self.k is not None:
            entry = (chosen[:, None] * self.k + torch.arange(self.k, device=self.device)).flatten()
            offsets = uniform_offsets(chosen.numel(), self.k, self.device)
        else:
            self.check()
            counts = self.offsets.diff()[chosen]
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            number = int(offsets[-1])
            shift = torch.repeat_interleave(self.offsets[chosen] - offsets[:-1], counts, output_size=number)
            entry = torch.arange(number, device=self.device) + shift
        return SparseCodes(self.values[entry], self.indices[entry], offsets, batch_shape, self.num_latents, self.k)


def at_latents(vector: Tensor, codes: SparseCodes) -> Tensor:
    """``vector[codes.indices]``: a quantity per latent (F,), read at the entries (N,).

    Differentiable in ``vector``, with the same bits on every run, which indexing does not promise.

    Raises:
        TypeError: ``vector`` is not floating-point.
        ValueError: it is not (F,), or on another device.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]]))
        >>> at_latents(torch.tensor([10.0, 20.0, 30.0]), codes)
        tensor([20., 30., 10.])
    """
    floating("vector", vector, dims=1)
    shaped("vector", vector, (codes.num_latents,), codes.values, why="one per latent")
    return ops.at_latents(vector, codes.indices, codes.offsets, *codes.transposed_for(vector), "auto")
