"""How much memory a training step needs, as a formula; ``tests/test_memory.py`` holds the steps to it."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sae_kernels.stock import limits
from sae_kernels.stock.linear import by_onednn, latents_at_once, rows_at_once, whole_rows_from
from sae_kernels.stock.linear_16bit import adds_bias_in_product, operand_width

from .. import _checks as check
from .._slabs import slab_shape
from .optimizer import ON_GPU, rows_of_a_chunk


@functools.cache
def keep_freed_memory() -> None:
    """From now on glibc keeps up to 64 MB of freed memory for the process, where it has given it back to the system.

    A step's temporaries of some MB would come from there anew each time, a page fault for every 4 kB of them. How much
    glibc keeps follows the largest block below 32 MB that the process has freed, so one is freed here, without having
    been written to. It does nothing to other allocators, nor where the environment sets glibc's bounds.
    """
    bytes(limits.KEPT_BY_ALLOCATOR - (1 << 16))


def peak_bytes(
    tokens: int, d_in: int, d_sae: int, k: int, *, memory_budget: int, d_out: int | None = None, k_aux: int = 0,
    dtype: torch.dtype | str = torch.float32, compute_dtype: torch.dtype | str | None = None, row_major: bool = False,
    stored: bool = False, copies: bool = True, moments: torch.dtype | str | None = None, device_type: str = "cpu",
    sources: Sequence[tuple[int, int]] | None = None, latent: int | None = None, data: int = 1,
    blocks: int | None = None,
) -> int:  # fmt: skip
    """Upper bound of what a :class:`TrainStep` with TopK needs beyond parameters, moments, batch and stored gradients.

    In elements, with B tokens, F latents, slabs of R tokens and C latents that fit ``memory_budget``, N = B (k + k_aux)
    entries and one or (with ``k_aux``) two outputs:

    ============================  ==========================================================================
    pre-activations               R C in the compute dtype: one buffer. Where oneDNN multiplies, of whole rows: 256 of
                                  them, or what fits 32 MiB, if that is 160 or more
    copies                        F (d_in + d_out) in the compute dtype, where that is not the parameters'
    dead counters                 F int64
    encoding                      the centred batch, N entries twice, and tiles of bounded size for top-k
    backward pass                 B (d_in + outputs * d_out) in fp32, 12 words an entry, 8 words a latent; or on a GPU
                                  as much in the compute dtype and, in fp32, F d_in / 8, at most 2^26 elements, and
                                  64 elements an entry
    a chunk of latents            on a CPU: its gradients and an eighth, twice with two outputs; ``row_major`` 3.5 and 4
    stored gradients' temporary   2 / 16 of the decoder's gradient; on a GPU 2 of at most 2^26 elements
    moments in bfloat16           a chunk's of one weight in fp32, and random bits: on a GPU where gradients are stored
    ============================  ==========================================================================

    Encoding and backward pass do not overlap: the larger counts; pre-activations belong to the encoding on a GPU, whose
    allocator keeps memory at hand, and to both on a CPU. On a CPU, which multiplies no mixed dtypes, 16-bit
    products and sums also take an fp32 copy of one weight at a time. Rows whose k-th entry ties with others are looked
    at whole, a tile at a time; that is not counted, nor are cuBLAS' workspaces, which a process has once (32 MiB on an
    H100) and torch's allocator lists.

    A rank of a mesh with ``latent`` ranks in each of ``data`` groups needs what one process with F / latent latents and
    B / data tokens does, and with these B and F besides, where U latents are one block:

    ============================  ==========================================================================
    rows from and for others      B d_in gathered, and B d_out of the gradient, in the compute dtype; B d_out of a
                                  rank's part of the output and as much of what others have made, in fp32
    candidates                    24 bytes for each of B (k + k_aux)
    between groups                gradients are stored, and twice one weight's beside them: what others have sent, and
                                  what is sent back
    ``blocks``                    pre-activations of a block of latents at least, and of a block of tokens by one of
                                  latents; the output once for each block of latents of the rank and half of that
                                  again; gradients of U latents for each group and for each level of the tree over
                                  blocks of tokens, and between groups those of one weight twice for each; those of all
                                  latents only where they are stored
    ============================  ==========================================================================

    Args:
        memory_budget: of the step.
        k_aux: entries a token of an auxiliary selection.
        row_major: whether the autoencoder was made with ``contiguous_parameters=True``.
        stored: whether gradients are stored (``grad_clip``, ``accumulate``).
        copies, moments: of the step; without copies the encoder's latents of one slab are copied at a time.
        sources: of a :class:`Crosscoder`, widths that each source reads and writes; ``d_in`` and ``d_out`` are then
            those of all sites side by side, ``d_sae``, ``k`` and ``k_aux`` those of each source. There are then the
            pre-activations of one source at a time, the entries of all, and chunks as wide as the widest's.
        latent: ranks of a group, over which latents are cut; None without a mesh. ``tokens``, ``d_sae`` and ``k`` are
            then those of all ranks together.
        data: groups of ranks.
        blocks: of the step.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> peak_bytes(4096, 768, 16384, 32, memory_budget=2**28) < 2**30
        True
        >>> one, two = (peak_bytes(4096, 768, 2**20, 32, memory_budget=2**34, latent=g) for g in (1, 2))
        >>> 0.5 < two / one < 0.55
        True
    """
    sizes = {"tokens": tokens, "d_in": d_in, "d_sae": d_sae, "k": k, "memory_budget": memory_budget}
    tokens, d_in, d_sae, k, memory_budget = (check.integer_k(size, name=name) for name, size in sizes.items())
    d_out = d_in if d_out is None else check.integer_k(d_out, name="d_out")
    k_aux, dtype = check.count("k_aux", k_aux), check.dtype_in("dtype", dtype)
    compute = dtype if compute_dtype is None else check.dtype_in("compute_dtype", compute_dtype)
    widths = [(d_in, d_out)] if sources is None else check.pairs_of_widths("sources", sources)
    mesh = _mesh_of(tokens, d_sae, latent, data, blocks)
    if mesh is not None:
        tokens, d_sae, k, k_aux = mesh.tokens, mesh.latents, min(k, mesh.latents), min(k_aux, mesh.latents)
        stored = stored or (mesh.data > 1 and blocks is None)
    number, widest, total = len(widths), max(map(sum, widths)), sum(map(sum, widths))
    reads, writes = (max(column) for column in zip(*widths, strict=True))
    narrow = compute in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(compute, torch.float32).itemsize
    outputs = 2 if k_aux else 1
    weight = torch.empty(d_sae, 1, dtype=compute, device="cpu").T
    of_onednn = device_type == "cpu" and by_onednn(weight.T, weight)
    by_rows = weight if of_onednn and number == 1 and mesh is None else None
    rows, columns = _shape(tokens, d_sae, memory_budget // compute.itemsize, by_rows)
    if mesh is not None and mesh.blocks is not None and columns < d_sae:
        rows, columns = tokens, mesh.latents_of_a_block
    entries = tokens * (k + k_aux) * number

    resident, pre = 8 * d_sae * number, rows * columns * compute.itemsize
    if mesh is not None:
        resident += mesh.rows_bytes(d_in, d_out * outputs, compute.itemsize, wide) + 24 * entries // number
    if compute != dtype:
        resident += (d_sae * total if check.flag("copies", copies) else columns * reads) * compute.itemsize

    times = 2 if number == 1 else 3  # of several sources, the codes of each beside those of all
    in_product = narrow and device_type != "cpu" and adds_bias_in_product(tokens, reads)
    one_launch = in_product and number == 1  # centres the batch, rounds it, and makes it an operand
    encoding = tokens * operand_width(d_in) * compute.itemsize if one_launch else 2 * tokens * d_in * wide
    encoding += times * entries * (compute.itemsize + 4) + 48 * rows * (k + k_aux + 32)
    tile = min(rows * columns, limits.CHUNK_ELEMENTS)  # of top-k by groups: maxima, and what it looks among
    maxima = 1 / next(iter(limits.column_groups(d_sae, k)), 1)
    encoding += int(tile * min(maxima + 16 * (k + 9) / d_sae, 1) * compute.itemsize)
    if columns < d_sae:  # what is held of earlier slabs, and the groups that a piece of this one looks at
        piece = min(max(limits.MERGED_SCORES // columns, 1), rows)
        encoding += 16 * entries // number + 32 * piece * (k + k_aux) * wide
    if k_aux:  # columns of dead latents
        encoding += min(rows * columns, limits.CHUNK_ELEMENTS) * compute.itemsize
    if narrow and device_type == "cpu":  # fp32 copies of some weights, and fp32 sums on their way to 16 bit
        most = limits.WIDE_ELEMENTS["cpu"]
        encoding += 4 * (min(rows * columns, most) + min(columns * reads, most))
    elif in_product and adds_bias_in_product(rows, reads):  # operands that hold the bias, and the bias
        most, width = limits.WIDE_ELEMENTS["cuda"], operand_width(reads)
        encoding += 2 * min(columns * width, most) + 4 * d_sae + (0 if one_launch else 2 * rows * width)
    elif narrow:  # fp32 sums of few rows
        encoding += 4 * min(rows * columns, limits.WIDE_ELEMENTS["cuda"])

    of_tokens = tokens * (d_in + outputs * d_out)
    backward = of_tokens * wide + 12 * wide * entries + 8 * wide * d_sae * number
    width = widest
    if device_type == "cpu":
        chunk = min(d_sae, limits.latents_in_cache(width)) * width * wide
        if not stored and blocks is None:
            backward += int(chunk * (max(3.5, outputs + 2) if row_major else max(1.125, outputs)))
        if narrow:
            backward += d_sae * max(reads, writes) * wide
    else:  # partial sums: of the gradient at the encoder's input, a row of every eight latents; of frequent latents
        most = limits.WIDE_ELEMENTS["cuda"]
        partial = 4 * min(-(-d_sae // 8) * reads, max(most, reads))
        partial += 4 * entries * (widest + 1) // limits.pass_split(widest)
        backward += max(partial - of_tokens * (wide - compute.itemsize), 0)
    if stored:
        chunk = min(rows_of_a_chunk(d_sae, writes, device_type), d_sae) * writes
        backward += 2 * chunk * wide + (outputs - 1) * d_sae * width * wide
        backward += d_sae * reads * wide if row_major else 0
    if mesh is not None:
        backward += mesh.gradient_bytes(reads, writes, wide)
        pre += mesh.cell_bytes(compute.itemsize)
    if moments is not None and check.dtype_in("moments", moments) != dtype:
        backward += _rounding_bytes(reads, writes, d_sae, stored, device_type)
    if device_type != "cpu":
        return resident + max(pre + encoding, backward)
    in_slabs = row_major and columns < d_sae  # which oneDNN is not asked for
    if of_onednn and not in_slabs:
        at_once = columns if row_major else latents_at_once(rows, columns, weight)
        if at_once == columns:  # oneDNN allocates its result: no buffer stays
            return resident + max(pre + encoding, backward)
        encoding += rows * at_once * wide  # on the way to the buffer
    return resident + pre + max(encoding, backward)


def _shape(tokens: int, d_sae: int, elements: int, weight: torch.Tensor | None) -> tuple[int, int]:
    """Of the pre-activations that exist at a time. ``weight``: of d_sae columns, where oneDNN multiplies by it."""
    whole_rows = False
    if weight is not None:
        elements = min(elements, rows_at_once(tokens, weight.T, weight) * d_sae)
        least = whole_rows_from(weight.T, weight)
        whole_rows = least is not None and elements >= least * d_sae
    return slab_shape(tokens, d_sae, elements, whole_rows=whole_rows)


class _Mesh(NamedTuple):
    """Of one rank, what lies on it and what it exchanges: its group's tokens, its latents, groups, and blocks."""

    tokens: int
    latents: int
    ranks: int  # of a group
    data: int
    blocks: int | None

    @property
    def latents_of_a_block(self) -> int:
        return self.latents * self.ranks // (self.blocks or self.ranks)

    def rows_bytes(self, d_in: int, d_out: int, itemsize: int, wide: int) -> int:
        """Rows that are gathered, and parts of sums; of several blocks one part each, and what a tree adds of them."""
        parts = 1 if self.blocks is None else self.blocks // self.ranks
        of_blocks = 0 if parts == 1 else parts + parts // 2
        return self.tokens * (d_in * itemsize + d_out * (itemsize + (2 + of_blocks) * wide))

    def cell_bytes(self, itemsize: int) -> int:
        """A product of a block of tokens by one of latents, on its way to the pre-activations."""
        if self.blocks is None:
            return 0
        return -(-self.tokens * self.data // self.blocks) * self.latents_of_a_block * itemsize

    def gradient_bytes(self, reads: int, writes: int, wide: int) -> int:
        """With blocks gradients of one; between groups what comes of one weight, and whole weights on their way back.
        """
        at_a_time, widest, held = self.latents, max(reads, writes), 0
        if self.blocks is not None:
            at_a_time = min(self.latents_of_a_block, max(ON_GPU // (reads + writes), 1))
            levels = (self.blocks // self.data).bit_length()
            held = (self.data + levels) * at_a_time * (reads + writes + 1) * wide
        if self.data == 1:
            return held
        on_the_way = 2 * self.data * at_a_time if self.blocks is not None else 0
        return max(held + on_the_way * widest * wide, 2 * self.latents * widest * wide)


def _mesh_of(tokens: int, d_sae: int, latent: int | None, data: int, blocks: int | None) -> _Mesh | None:
    if latent is None:
        if data != 1 or blocks is not None:
            raise ValueError(f"latent must be given with data or blocks, got data={data!r}, blocks={blocks!r}")
        return None
    latent, data = check.integer_k(latent, d_sae, name="latent"), check.integer_k(data, name="data")
    if blocks is not None:
        blocks, ranks = check.integer_k(blocks, name="blocks"), latent * data
        if blocks & (blocks - 1) or blocks % ranks or d_sae % blocks or tokens % blocks:
            raise ValueError(f"blocks must be a power of two that {ranks} ranks divide, and that divides d_sae = "
                             f"{d_sae} and tokens = {tokens}, got {blocks}")  # fmt: skip
    return _Mesh(-(-tokens // data), -(-d_sae // latent), latent, data, blocks)


def _rounding_bytes(d_in: int, d_out: int, d_sae: int, stored: bool, device_type: str) -> int:
    """Exact moments of the latents that are updated at a time, and the random bits of those that are rounded."""
    if device_type != "cpu" and not stored:
        return 0  # in registers
    width, whole = max(d_in, d_out), d_sae * max(d_in, d_out)
    exact = limits.WIDE_ELEMENTS[device_type] if stored else limits.latents_in_cache(d_in + d_out) * width
    random = limits.ROUNDED_IN_CACHE if device_type == "cpu" else exact
    return 2 * 4 * (min(exact, whole) + min(random, whole))


class StateBytes(NamedTuple):
    """Bytes of what a training step keeps, and what its update moves of that (:func:`state_bytes`)."""

    parameters: int
    moments: int
    copies: int
    moved: int  # parameters and moments read and written, copies written

    @property
    def kept(self) -> int:
        return self.parameters + self.moments + self.copies


def state_bytes(
    d_in: int, d_sae: int, *, d_out: int | None = None, dtype: torch.dtype | str = torch.float32,
    compute_dtype: torch.dtype | str | None = None, moments: torch.dtype | str | None = None, copies: bool = True,
) -> StateBytes:  # fmt: skip
    """What a :class:`TrainStep` keeps from step to step for an autoencoder without a skip connection.

    A weight in fp32 is kept in this many bytes, and an update moves this many of them:

    =======================================  ====  =====
    in 16-bit computation                    kept  moved
    =======================================  ====  =====
    as it comes                              14    26
    ``moments="bfloat16"``                   10    18
    ``moments="bfloat16", copies=False``     8     16
    =======================================  ====  =====

    A rule's own parameters, counters of steps and of dead latents (8 bytes a latent) are not counted. What a step needs
    besides while it runs is :func:`peak_bytes`, in which the copies are counted too.

    Args:
        d_in, d_sae, d_out: of the autoencoder; ``d_out`` is ``d_in`` by default.
        dtype: of the parameters.
        compute_dtype, moments, copies: of the step.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> state_bytes(4096, 2**20, compute_dtype="bfloat16", moments="bfloat16", copies=False).kept // 10**9
        68
    """
    d_in, d_sae = check.integer_k(d_in, name="d_in"), check.integer_k(d_sae, name="d_sae")
    d_out = d_in if d_out is None else check.integer_k(d_out, name="d_out")
    dtype = check.dtype_in("dtype", dtype)
    compute = dtype if compute_dtype is None else check.dtype_in("compute_dtype", compute_dtype)
    of_weights = dtype if moments is None else check.dtype_in("moments", moments)
    weights, vectors = d_sae * (d_in + d_out), d_sae + d_out
    parameters = (weights + vectors) * dtype.itemsize
    kept = 2 * (weights * of_weights.itemsize + vectors * dtype.itemsize)
    copied = weights * compute.itemsize if check.flag("copies", copies) and compute != dtype else 0
    return StateBytes(parameters, kept, copied, 2 * (parameters + kept) + copied)
