"""The gradients of a training step latent by latent, stored, or used up at once by Adam.

Math      per entry the slope <grad[row], W_dec[f]> + offered, gated; per latent sums of value * grad[row] (W_dec),
          slope * x[row] (W_enc.T) and slope (b_enc); then Adam of these rows and their moments, in place
Grid      (F / GROUP,), after (N / SPLIT,) for runs of SPLIT entries of one latent; rows that no tile holds, and an
          encoder whose rows are strided, take a second launch over stored gradients, chunk by chunk of the latents
Traffic   N*(D_out*s_g + D_in*s_x) gathered; 24 bytes a parameter read and written by Adam in fp32, s_c more for a copy
Numerics  fp32, entries in order, partial sums in order, no atomics: bitwise reproducible
Source    Kingma & Ba 2014, arXiv:1412.6980; the index by latent: Gao et al. 2024, arXiv:2406.04093; one pass: ours
"""
import functools
import itertools
import math

import torch
import triton
import triton.language as tl

from . import _tuning, densified
from ._device import at_most, only_if
from ._terms import GATED, GIVEN, NUMBER_OF_LISTS, Term, terms_of

# A matrix (F, D) reaches a kernel as (pointer, stride of latents, stride of columns); parameters as four of these:
# weights, first moment, second moment, and the copy or None. A term is a tuple in the order of `_arguments`. What is
# absent is told by flags, and something else stands in its place: Triton 3.6 loses its way in tuples that hold None.
_GIVEN = tl.constexpr(GIVEN)
_GATED = tl.constexpr(GATED)


@triton.jit
def _at(matrix, latent, columns):
    return matrix[0] + latent * matrix[1] + columns.to(tl.int64) * matrix[2]


@triton.jit
def _gated(inner, term, value, position, present, MODE: tl.constexpr, OFFERED: tl.constexpr):
    """Gradients at the pre-activations from the inner products (``Term.at_entries``)."""
    if MODE == _GIVEN:
        return tl.load(term[3] + position, mask=present, other=0.0).to(tl.float32)
    else:
        slope = inner
        if OFFERED:
            slope += tl.load(term[3] + position, mask=present, other=0.0).to(tl.float32)
        return tl.where(present & (value != 0), slope, 0.0) if MODE == _GATED else tl.where(present, slope, 0.0)


@triton.jit
def _add_entries(
    dec, enc, bias, term, x_ptr, stride_xb, weight, entry, end, offs_out, mask_out, offs_in, mask_in,
    MODE: tl.constexpr, OFFERED: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """The three sums of a latent plus what its next IN_FLIGHT entries before ``end`` bring."""
    entries = entry + tl.arange(0, IN_FLIGHT)
    present = entries < end
    row = tl.load(term[5] + entries, mask=present, other=0).to(tl.int64)
    position = tl.load(term[6] + entries, mask=present, other=0)
    value = tl.load(term[2] + position, mask=present, other=0.0).to(tl.float32)
    at = row[:, None] * term[1] + offs_out[None, :]  # [IN_FLIGHT, BLOCK_OUT]
    grad = tl.load(term[0] + at, mask=present[:, None] & mask_out[None, :], other=0.0).to(tl.float32)
    at = row[:, None] * stride_xb + offs_in[None, :]  # [IN_FLIGHT, BLOCK_IN]
    x = tl.load(x_ptr + at, mask=present[:, None] & mask_in[None, :], other=0.0).to(tl.float32)
    inner = value if MODE == _GIVEN else tl.sum(grad * weight[None, :], axis=1)
    slope = _gated(inner, term, value, position, present, MODE, OFFERED)
    dec += tl.sum(value[:, None] * grad, axis=0)
    enc += tl.sum(slope[:, None] * x, axis=0)
    return dec, enc, bias + tl.sum(slope, axis=0)


@triton.jit
def _window_kernel(
    x_ptr, indices_ptr, term, weight,  # [B, D_in], [N] int32 in; partial sums of the term out, fp32
    F, D_OUT, D_IN, stride_xb,
    MODE: tl.constexpr, OFFERED: tl.constexpr, SPLIT: tl.constexpr, IN_FLIGHT: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """SPLIT entries from a multiple of SPLIT on: their sums, where they all belong to one latent."""
    window = tl.program_id(0).to(tl.int64)
    entry = window * SPLIT
    end = entry + SPLIT
    if end <= tl.load(term[4] + F):
        latent = tl.load(indices_ptr + tl.load(term[6] + entry))
        if latent == tl.load(indices_ptr + tl.load(term[6] + end - 1)):
            offs_out, offs_in = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
            mask_out, mask_in = offs_out < D_OUT, offs_in < D_IN
            row = tl.load(_at(weight, latent.to(tl.int64), offs_out), mask=mask_out, other=0.0).to(tl.float32)
            dec, enc = tl.zeros((BLOCK_OUT,), tl.float32), tl.zeros((BLOCK_IN,), tl.float32)
            bias = tl.full((), 0.0, tl.float32)
            while entry < end:
                dec, enc, bias = _add_entries(dec, enc, bias, term, x_ptr, stride_xb, row, entry, end,
                                              offs_out, mask_out, offs_in, mask_in, MODE, OFFERED, IN_FLIGHT)
                entry += IN_FLIGHT
            tl.store(term[7][0] + window * D_OUT + offs_out, dec, mask=mask_out)
            tl.store(term[7][1] + window * D_IN + offs_in, enc, mask=mask_in)
            tl.store(term[7][2] + window, bias)


@triton.jit
def _moved(state, latent, columns, mask, keep, old, grad, corrections, settings, REPLICATED: tl.constexpr):
    """Moves the moments by ``grad``, where ``keep``, and returns the weights that follow from ``old``.

    Where the tile is REPLICATED several warps read each number and one writes it: they wait for one another in between.
    """
    step_size, root = corrections
    beta1, rest1, beta2, rest2, eps, weight_decay = settings
    grad += weight_decay * old
    at = _at(state[1], latent, columns), _at(state[2], latent, columns)
    first = beta1 * tl.load(at[0], mask=mask, other=0.0).to(tl.float32) + rest1 * grad
    second = beta2 * tl.load(at[1], mask=mask, other=1.0).to(tl.float32) + rest2 * grad * grad  # no 0 / 0 beside it
    if REPLICATED:
        tl.debug_barrier()
    tl.store(at[0], first.to(at[0].dtype.element_ty), mask=only_if(keep, mask))
    tl.store(at[1], second.to(at[1].dtype.element_ty), mask=only_if(keep, mask))
    return old - step_size * first / (tl.sqrt_rn(second) / root + eps)


@triton.jit
def _put(state, latent, columns, mask, new, COPIED: tl.constexpr):
    """Stores weights, and rounds the parameter as it now is into the copy."""
    at = _at(state[0], latent, columns)
    new = new.to(at.dtype.element_ty)
    tl.store(at, new, mask=mask)
    if COPIED:
        at = _at(state[3], latent, columns)
        tl.store(at, new.to(tl.float32).to(at.dtype.element_ty), mask=mask)


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _latents_kernel(
    x_ptr, terms, weight, along_ptr, base,  # [B, D_in], tuples, matrix, [F] or None, matrices and [F] or None; in
    dec_ptr, enc_ptr, slopes_ptr,           # [F, D_out], [F, D_in], [F] out, each or None, from latent `first` on
    decoder, encoder, bias,                 # parameters in and out, each or None
    corrections_ptr, skip_ptr,              # [2] fp32, [] or None; in
    center_ptr, square_ptr,                 # [programs, D_in], [programs] out, fp32
    first, stop, D_OUT, D_IN, stride_xb, stride_df, stride_ef, settings,
    MODES: tl.constexpr, OFFERED: tl.constexpr, BASE: tl.constexpr, MOVED: tl.constexpr,
    COPIED: tl.constexpr, UNIT_ROWS: tl.constexpr, REPLICATED: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    IN_FLIGHT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """GROUP latents one after the other: sums over their entries, then stored or used up."""
    program = tl.program_id(0).to(tl.int64)
    offs_out, offs_in = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    mask_out, mask_in = offs_out < D_OUT, offs_in < D_IN
    latent = first + program * GROUP
    last = tl.minimum(latent + GROUP, stop)
    if MOVED[0]:
        corrections = (tl.load(corrections_ptr), tl.load(corrections_ptr + 1))
        keep = latent >= 0
        if skip_ptr is not None:
            keep = tl.load(skip_ptr) == 0
    center = tl.zeros((BLOCK_IN,), tl.float32)
    square = tl.full((), 0.0, tl.float32)
    while latent < last:
        dec, enc = tl.zeros((BLOCK_OUT,), tl.float32), tl.zeros((BLOCK_IN,), tl.float32)
        slopes = tl.full((), 0.0, tl.float32)
        row = tl.load(_at(weight, latent, offs_out), mask=mask_out, other=0.0).to(tl.float32)
        if along_ptr is not None:
            dec += tl.load(along_ptr + latent).to(tl.float32) * row
        if BASE:
            dec += tl.load(_at(base[0], latent, offs_out), mask=mask_out, other=0.0)
            enc += tl.load(_at(base[1], latent, offs_in), mask=mask_in, other=0.0)
            slopes += tl.load(base[2] + latent)
        for i in tl.static_range(len(MODES)):
            term = terms[i]
            entry = tl.load(term[4] + latent)
            end = tl.load(term[4] + latent + 1)
            while entry < end:
                window = entry // SPLIT
                border = (window + 1) * SPLIT
                if (entry == window * SPLIT) & (border <= end):
                    dec += tl.load(term[7][0] + window * D_OUT + offs_out, mask=mask_out, other=0.0)
                    enc += tl.load(term[7][1] + window * D_IN + offs_in, mask=mask_in, other=0.0)
                    slopes += tl.load(term[7][2] + window)
                    entry = border
                else:
                    border = tl.minimum(border, end)
                    dec, enc, slopes = _add_entries(dec, enc, slopes, term, x_ptr, stride_xb, row, entry, border,
                                                    offs_out, mask_out, offs_in, mask_in, MODES[i], OFFERED[i],
                                                    IN_FLIGHT)
                    entry = tl.minimum(entry + IN_FLIGHT, border)
        if dec_ptr is not None:
            at = dec_ptr + (latent - first) * stride_df + offs_out
            tl.store(at, dec.to(dec_ptr.dtype.element_ty), mask=mask_out)
        if enc_ptr is not None:
            at = enc_ptr + (latent - first) * stride_ef + offs_in
            tl.store(at, enc.to(enc_ptr.dtype.element_ty), mask=mask_in)
        if slopes_ptr is not None:
            tl.store(slopes_ptr + (latent - first), slopes.to(slopes_ptr.dtype.element_ty))
        if MOVED[0]:
            old = row
            if COPIED[0]:  # `row` is the copy's
                old = tl.load(_at(decoder[0], latent, offs_out), mask=mask_out, other=0.0).to(tl.float32)
            if UNIT_ROWS:
                dec -= tl.sum(dec * old, axis=0) / _or_one(tl.sum(old * old, axis=0)) * old
            square += tl.sum(dec * dec, axis=0)
            new = _moved(decoder, latent, offs_out, mask_out, keep, old, dec, corrections, settings, REPLICATED[0])
            if UNIT_ROWS:
                new = new / _or_one(tl.sqrt_rn(tl.sum(new * new, axis=0)))
            _put(decoder, latent, offs_out, only_if(keep, mask_out), new, COPIED[0])
        if MOVED[1]:
            old = tl.load(_at(encoder[0], latent, offs_in), mask=mask_in, other=0.0).to(tl.float32)
            center -= slopes * old
            square += tl.sum(enc * enc, axis=0)
            new = _moved(encoder, latent, offs_in, mask_in, keep, old, enc, corrections, settings, REPLICATED[1])
            _put(encoder, latent, offs_in, only_if(keep, mask_in), new, COPIED[1])
        if MOVED[2]:
            none = tl.full((), 0, tl.int32)
            old = tl.load(_at(bias[0], latent, none)).to(tl.float32)
            square += slopes * slopes
            new = _moved(bias, latent, none, keep | True, keep, old, slopes, corrections, settings, True)
            _put(bias, latent, none, keep, new, COPIED[2])
        latent += 1
    if MOVED[1]:
        tl.store(center_ptr + program * D_IN + offs_in, center, mask=mask_in)
    if MOVED[0]:
        tl.store(square_ptr + program, square)


@triton.jit
def _matrix_kernel(
    grad_ptr, slopes_ptr, state, corrections_ptr, skip_ptr,  # [stop - first, D] used up, [stop - first] or None
    center_ptr, square_ptr,  # [programs, D] where slopes are given, [programs]; out, fp32
    first, stop, D, settings,
    COPIED: tl.constexpr, UNIT_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Adam of BLOCK_F latents of one matrix of any strides from stored gradients, BLOCK_D columns at a time."""
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK_F + tl.arange(0, BLOCK_F)
    latent = (first + local)[:, None]
    inside = latent < stop
    corrections = (tl.load(corrections_ptr), tl.load(corrections_ptr + 1))
    keep = first >= 0
    if skip_ptr is not None:
        keep = tl.load(skip_ptr) == 0
    square = tl.zeros((BLOCK_F,), tl.float32)
    along = tl.zeros((BLOCK_F,), tl.float32)
    norm = tl.zeros((BLOCK_F,), tl.float32)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + local, mask=first + local < stop, other=0.0)
    if UNIT_ROWS:
        for tile in range(0, tl.cdiv(D, BLOCK_D)):
            columns = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            mask = inside & (columns < D)
            grad = tl.load(grad_ptr + local[:, None] * D + columns, mask=mask, other=0.0)
            old = tl.load(_at(state[0], latent, columns), mask=mask, other=0.0).to(tl.float32)
            along += tl.sum(grad * old, axis=1)
            norm += tl.sum(old * old, axis=1)
        along = along / _or_one(norm)
        norm = tl.zeros((BLOCK_F,), tl.float32)
    for tile in range(0, tl.cdiv(D, BLOCK_D)):
        columns = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        mask = inside & (columns < D)
        grad = tl.load(grad_ptr + local[:, None] * D + columns, mask=mask, other=0.0)
        old = tl.load(_at(state[0], latent, columns), mask=mask, other=0.0).to(tl.float32)
        if slopes_ptr is not None:
            at = program * D + tile * BLOCK_D + tl.arange(0, BLOCK_D)
            # rounded before they are added: fused, lanes that add one another's products end with different sums
            part = tl.where(mask, slopes[:, None] * old, 0.0)
            tl.store(center_ptr + at, -tl.sum(part, axis=0), mask=tile * BLOCK_D + tl.arange(0, BLOCK_D) < D)
        if UNIT_ROWS:
            grad -= along[:, None] * old
        square += tl.sum(grad * grad, axis=1)
        new = _moved(state, latent, columns, mask, keep, old, grad, corrections, settings, False)
        if UNIT_ROWS:
            norm += tl.sum(new * new, axis=1)
            tl.store(grad_ptr + local[:, None] * D + columns, new, mask=mask)  # the gradient has done its work
        else:
            _put(state, latent, columns, only_if(keep, mask), new, COPIED)
    if UNIT_ROWS:
        norm = _or_one(tl.sqrt_rn(norm))
        tl.debug_barrier()  # what other threads of this program stored is read
        for tile in range(0, tl.cdiv(D, BLOCK_D)):
            columns = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
            mask = inside & (columns < D)
            new = tl.load(grad_ptr + local[:, None] * D + columns, mask=mask, other=0.0)
            _put(state, latent, columns, only_if(keep, mask), new / norm[:, None], COPIED)
    tl.store(square_ptr + program, tl.sum(square, axis=0))


@triton.jit
def _slopes_kernel(
    weight_ptr, term, indices_ptr, out_ptr,  # [F, D], a term, [N] int32; [N] out, fp32
    F, D, stride_wf, stride_wd,
    MODE: tl.constexpr, OFFERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Gradients at the pre-activations of BLOCK_N entries whose rows no tile holds."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = entries < tl.load(term[4] + F)
    row = tl.load(term[5] + entries, mask=present, other=0).to(tl.int64)
    position = tl.load(term[6] + entries, mask=present, other=0)
    value = tl.load(term[2] + position, mask=present, other=0.0).to(tl.float32)
    latent = tl.load(indices_ptr + position, mask=present, other=0).to(tl.int64)
    inner = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(0, tl.cdiv(D, BLOCK_D)):
        columns = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        mask = present[:, None] & (columns < D)
        grad = tl.load(term[0] + row[:, None] * term[1] + columns, mask=mask, other=0.0).to(tl.float32)
        at = latent[:, None] * stride_wf + columns.to(tl.int64) * stride_wd
        inner += grad * tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    slope = _gated(tl.sum(inner, axis=1), term, value, position, present, MODE, OFFERED)
    tl.store(out_ptr + position, slope, mask=present)


@triton.jit
def _corrections_kernel(out_ptr, step_ptr, lr_ptr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """lr / (1 - beta1 ** step) and sqrt(1 - beta2 ** step), through fp64: at first the differences are small."""
    step = tl.load(step_ptr).to(tl.float64)
    first = 1.0 - tl.exp(step * LOG_BETA1)
    second = 1.0 - tl.exp(step * LOG_BETA2)
    tl.store(out_ptr, (tl.load(lr_ptr).to(tl.float64) / first).to(tl.float32))
    tl.store(out_ptr + 1, tl.sqrt(second).to(tl.float32))


def _matrix(tensor):
    """A matrix as kernels take it; a vector is one of a single column."""
    return tensor, tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0


def _filled(some, substitute) -> tuple:
    return tuple(substitute if one is None else one for one in some)


def _with_unit_stride(tensor):
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Sums:
    """The sums over the entries of the terms, for any range of latents, of columns that fit a tile."""

    def __init__(self, x, weight, along, terms: list[Term], base):
        self.x, self.weight, self.along = x, weight, along
        self.base = None if base is None else (_matrix(base[0]), _matrix(base[1]), base[2])
        blocks = [max(triton.next_power_of_2(width), 16) for width in (weight.shape[1], x.shape[1])]
        warps = _tuning.pass_warps(max(blocks))
        self.replicated = tuple(_tuning.is_replicated(block, warps) for block in blocks)
        self.shape = dict(
            D_OUT=weight.shape[1], D_IN=x.shape[1], stride_xb=x.stride(0), SPLIT=_tuning.SPLIT_PASS,
            BLOCK_OUT=blocks[0], BLOCK_IN=blocks[1], IN_FLIGHT=_tuning.pass_entries(max(blocks)),
            **_tuning.options(warps), **at_most(_tuning.PASS_REGISTERS),
        )  # fmt: skip
        self.modes = tuple(term.mode for term in terms)
        self.offered = tuple(term.offered.numel() > 0 for term in terms)
        self.terms = tuple((*self._arguments(term), self._partial(term)) for term in terms)

    @staticmethod
    def _arguments(term: Term) -> tuple:
        """What kernels know as `term[0]` to `term[6]`; Triton 3.6 takes no None in a tuple within a tuple."""
        return (term.grad, term.grad.stride(0), term.values, term.offered, term.latent_offsets, term.latent_rows,
                term.latent_positions)  # fmt: skip

    def _partial(self, term: Term):
        """Sums of windows of SPLIT entries that belong to one latent, so that no program walks far through one."""
        windows = term.values.numel() // _tuning.SPLIT_PASS
        room = max(windows, 1)  # without any there would be another kernel to compile
        shapes = (room, self.weight.shape[1]), (room, self.x.shape[1]), (room,)
        partial = tuple(torch.empty(shape, dtype=torch.float32, device=self.x.device) for shape in shapes)
        if windows:
            _window_kernel[(windows,)](
                self.x, term.indices, (*self._arguments(term), partial), _matrix(self.weight), F=self.weight.shape[0],
                MODE=term.mode, OFFERED=term.offered.numel() > 0, **self.shape,
            )  # fmt: skip
        return partial

    def run(self, latents: slice, grads, *, group=1, state=(None, None, None), adam=None, center=None, square=None):
        """Stores the sums of ``latents`` into ``grads``, whose columns are contiguous, or lets Adam use them up."""
        _latents_kernel[(triton.cdiv(latents.stop - latents.start, group),)](
            self.x, self.terms, _matrix(self.weight), self.along, self.base,
            *grads, *(None if four is None else _filled(four, four[0]) for four in state),
            adam and adam.corrections, adam and adam.skip, center, square,
            first=latents.start, stop=latents.stop, settings=adam and adam.settings,
            stride_df=0 if grads[0] is None else grads[0].stride(0),
            stride_ef=0 if grads[1] is None else grads[1].stride(0),
            MODES=self.modes, OFFERED=self.offered, BASE=self.base is not None,
            MOVED=tuple(four is not None for four in state),
            COPIED=tuple(four is not None and four[3] is not None for four in state),
            UNIT_ROWS=adam is not None and adam.unit_rows, REPLICATED=self.replicated, GROUP=group, **self.shape,
        )  # fmt: skip


def _slopes(weight, term: Term):
    """(N,) fp32: the term's gradients at the pre-activations; undefined at entries that belong to no row."""
    slopes = torch.empty(term.values.numel(), dtype=torch.float32, device=weight.device)
    if slopes.numel():
        entries, columns = _tuning.SLOPES_TILE
        _slopes_kernel[(triton.cdiv(slopes.numel(), entries),)](
            weight, _Sums._arguments(term), term.indices, slopes, F=weight.shape[0], D=weight.shape[1],
            stride_wf=weight.stride(0), stride_wd=weight.stride(1), MODE=term.mode, OFFERED=term.offered.numel() > 0,
            BLOCK_N=entries, BLOCK_D=columns,
            **_tuning.options(4),
        )  # fmt: skip
    return slopes


def _sums(x, weight, along, lists) -> list[tuple[slice, _Sums]]:
    """The sums in one piece where a tile holds the rows; else by columns, with slopes that are there before."""
    terms = [Term._make((*map(_with_unit_stride, term[:-1]), term.mode)) for term in terms_of(lists)]
    x, along = _with_unit_stride(x), None if along is None else along.contiguous()
    dense = [term for term in terms if term.is_dense]
    terms = [term for term in terms if not term.is_dense]
    base = densified.latent_gradients(x, weight, dense, torch.float32) if dense else None
    tile = _tuning.PASS_TILE
    pieces = triton.cdiv(max(weight.shape[1], x.shape[1]), tile)
    if pieces == 1:
        return [(slice(None), _Sums(x, weight, along, terms, base))]
    given = [
        term if term.mode == GIVEN else term._replace(offered=_slopes(weight, term), mode=GIVEN) for term in terms
    ]
    found = []
    for columns in (slice(n * tile, (n + 1) * tile) for n in range(pieces)):
        parts = [term._replace(grad=term.grad[:, columns]) for term in given]
        part = None if base is None else (base[0][:, columns], base[1][:, columns], base[2])
        found.append((columns, _Sums(x[:, columns], weight[:, columns], along, parts, part)))
    return found


def launch_gradients(x, weight, along, *lists_and_dtype):
    """Gradients (F, D_out), (F, D_in), (F,) in ``dtype``; see ``reference.latent_gradients``."""
    *lists, dtype = lists_and_dtype
    num_latents = weight.shape[0]
    shapes = weight.shape, (num_latents, x.shape[1]), (num_latents,)
    grads = tuple(weight.new_empty(shape, dtype=dtype) for shape in shapes)
    if num_latents:
        for columns, sums in _sums(x, weight, along, lists):
            sums.run(slice(0, num_latents), (grads[0][:, columns], grads[1][:, columns], grads[2]))
    return grads


class _Adam:
    """What every launch of one step of Adam is told."""

    def __init__(self, step, lr, beta1, beta2, eps, weight_decay, unit_rows, skip):
        self.corrections = torch.empty(2, dtype=torch.float32, device=step.device)
        logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
        _corrections_kernel[(1,)](self.corrections, step, lr, *logs, **_tuning.options(1))
        self.settings = beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay
        self.unit_rows = unit_rows
        self.skip = skip if skip is None or skip.dtype == torch.bool else skip != 0

    def of_stored(self, grad, state, latents: slice, *, slopes=None, unit_rows=False):
        """Adam of ``latents`` of one matrix; the partial sums of d(center), where ``slopes`` are given, and norm."""
        block_f, block_d = _tuning.stored_tile(by_columns=state[0][1] == 1)
        programs, width = triton.cdiv(latents.stop - latents.start, block_f), 1 if grad.dim() == 1 else grad.shape[1]
        center = None if slopes is None else grad.new_empty(programs, width)
        square = grad.new_empty(programs)
        _matrix_kernel[(programs,)](
            grad, slopes, _filled(state, state[0]), self.corrections, self.skip, center, square,
            first=latents.start, stop=latents.stop, D=width, settings=self.settings,
            COPIED=state[3] is not None, UNIT_ROWS=unit_rows,
            BLOCK_F=block_f, BLOCK_D=block_d, **_tuning.options(_tuning.stored_warps(block_f * block_d)),
        )  # fmt: skip
        return center, square


def launch_adam(parameters, exp_avgs, exp_avg_sqs, copies, x, along, *rest):
    """d(center) (D_in,) and the squared norm (); see ``reference.latent_adam``."""
    lists, options = rest[:NUMBER_OF_LISTS], rest[NUMBER_OF_LISTS:]
    weight, encoder = parameters[:2]
    (num_latents, d_out), d_in = weight.shape, x.shape[1]
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if num_latents == 0:
        return x.new_zeros(d_in, dtype=wide), x.new_zeros((), dtype=wide)
    adam = _Adam(*options)
    tensors = itertools.zip_longest(parameters, exp_avgs, exp_avg_sqs, copies)
    state: list = [tuple(None if t is None else _matrix(t) for t in four) for four in tensors]
    state += [None] * (3 - len(state))
    pieces = _sums(x, copies[0] if copies else weight, along, lists)
    group = _tuning.PASS_GROUP
    if len(pieces) == 1 and encoder.stride(1) == 1:
        programs = triton.cdiv(num_latents, group)
        center, square = new((programs, d_in)), new(programs)
        every = slice(0, num_latents)
        pieces[0][1].run(every, (None,) * 3, group=group, state=state, adam=adam, center=center, square=square)
        return center.sum(0).to(wide), square.sum().to(wide)

    # Gradients of rows that no tile holds, or of an encoder whose rows are strided, are stored, some latents at a time.
    whole = len(pieces) == 1  # then those of the decoder and the bias still are not
    chunk = min(_tuning.stored_latents(d_in if whole else d_in + d_out), num_latents)
    centers, squares = [], []
    stored = None if whole else new((chunk, d_out)), new((chunk, d_in)), new(chunk)
    for start in range(0, num_latents, chunk):
        latents = slice(start, min(start + chunk, num_latents))
        for columns, sums in pieces:
            grads = (*(None if t is None else t[:, columns] for t in stored[:2]), stored[2])
            if whole:
                squares.append(new(triton.cdiv(latents.stop - latents.start, group)))
                fused = dict(group=group, state=(state[0], None, state[2]), adam=adam, square=squares[-1])
            sums.run(latents, grads, **(fused if whole else {}))
        center, square = adam.of_stored(stored[1], state[1], latents, slopes=stored[2])
        centers.append(center)
        squares.append(square)
        if not whole:
            squares.append(adam.of_stored(stored[0], state[0], latents, unit_rows=adam.unit_rows)[1])
            if state[2] is not None:
                squares.append(adam.of_stored(stored[2], state[2], latents)[1])
    return torch.cat(centers).sum(0).to(wide), torch.cat(squares).sum().to(wide)
