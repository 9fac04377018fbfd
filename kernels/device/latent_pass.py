"""The gradients of a training step latent by latent, stored, or used up at once by Adam.

Math      per entry the slope <grad[row], W_dec[f]> + offered, gated; per latent sums of value * grad[row] (W_dec),
          slope * x[row] (W_enc.T) and slope (b_enc); then Adam of these rows and their moments, in place
Grid      (F / GROUP,), after (N / SPLIT,) for runs of SPLIT entries of one latent; rows that no tile holds go tile by
          tile, after the slopes, which take whole rows. An encoder whose rows are strided, and unit rows that no tile
          holds, take a second launch over stored gradients, chunk by chunk of the latents
Traffic   N*(D_out*s_g + D_in*s_x) gathered, N*D_out*s_w more where slopes come first; 24 bytes a parameter read and
          written by Adam in fp32, 16 with moments in bfloat16, s_c more for a copy, 8 more for a stored gradient
Numerics  fp32, entries in order, partial sums in order, no atomics: bitwise reproducible; moments in bfloat16
          rounded by a hash of step and place, after the update
Source    Kingma & Ba 2014, arXiv:1412.6980; the index by latent: Gao et al. 2024, arXiv:2406.04093; one pass: ours
"""
import functools
import itertools
import math

import torch
import triton

from .._rounding import are_narrow
from .._terms import GIVEN, NUMBER_OF_LISTS, Term, terms_of
from ..stock import densified, limits
from . import _tuning
from ._latent_kernels import (
    _factors_kernel,
    _latents_kernel,
    _matrix_kernel,
    _pass_split_kernel,
)
from ._launch import Launch, planned, with_unit_stride
from ._value_gradients import value_gradients


def _matrix(tensor):
    """A matrix as kernels take it; a vector is one of a single column."""
    return tensor, tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0


def _side_by_side(matrices) -> tuple:
    """Several as kernels take them; the first stands in the place of one that is None."""
    return tuple(part for one in matrices for part in (matrices[0] if one is None else one))


@planned
def _tile(d_out: int, d_in: int, stride_xb: int, split: int) -> tuple[dict, tuple[bool, bool]]:
    """What all launches over rows of these widths share, and which of a row's two tiles lie several times in a program.
    """
    blocks = [max(triton.next_power_of_2(width), 16) for width in (d_out, d_in)]
    warps = _tuning.pass_warps(max(blocks))
    shared = dict(
        D_OUT=d_out, D_IN=d_in, stride_xb=stride_xb, SPLIT=split, BLOCK_OUT=blocks[0], BLOCK_IN=blocks[1], warps=warps,
        most_registers=_tuning.PASS_REGISTERS,
    )  # fmt: skip
    return shared, (_tuning.is_replicated(blocks[0], warps), _tuning.is_replicated(blocks[1], warps))


@planned
def _splits(widths: tuple, splits: int, num_latents: int, mode: int, offered: bool) -> Launch:
    shared = _tile(*widths)[0]
    in_flight = _tuning.split_entries(max(shared["BLOCK_OUT"], shared["BLOCK_IN"]))
    return Launch(
        _pass_split_kernel, (splits,), F=num_latents, MODE=mode, OFFERED=offered, IN_FLIGHT=in_flight, **shared
    )


@planned
def _latents(
    widths: tuple, strides: tuple, modes: tuple, offered: tuple, moved: tuple, copied: tuple, unit_rows: bool,
    rounds: bool, group: int, settings: tuple | None,
) -> Launch:  # fmt: skip
    shared, replicated = _tile(*widths)
    if rounds and shared["warps"] < 8:
        shared = shared | {"most_registers": _tuning.ROUNDED_PASS_REGISTERS}
    return Launch(
        _latents_kernel, (), stride_df=strides[0], stride_ef=strides[1], settings=settings, MODES=modes,
        OFFERED=offered, MOVED=moved, COPIED=copied, UNIT_ROWS=unit_rows, REPLICATED=replicated,
        GROUP=group, **shared,
        IN_FLIGHT=_tuning.pass_entries(max(shared["BLOCK_OUT"], shared["BLOCK_IN"]), any(replicated)),
    )  # fmt: skip


@planned
def _factors(beta1: float, beta2: float) -> Launch:
    first, second = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    return Launch(_factors_kernel, (1,), warps=1, LOG_BETA1=first, LOG_BETA2=second)


@planned
def _matrix_update(
    width: int, matrix: int, by_columns: bool, copied: bool, unit_rows: bool, settings: tuple
) -> tuple[int, Launch]:
    """Latents of one program, and the launch."""
    block_f, block_d = _tuning.stored_tile(by_columns)
    return block_f, Launch(
        _matrix_kernel, (), warps=_tuning.stored_warps(block_f * block_d), D=width, settings=settings, MATRIX=matrix,
        COPIED=copied, UNIT_ROWS=unit_rows, BLOCK_F=block_f, BLOCK_D=block_d,
    )  # fmt: skip


def _of_columns(four, columns: slice):
    """Weights, moments and copy, where there is one, of some columns of a matrix."""
    return tuple(None if t is None else _matrix(t[:, columns]) for t in four)


def _summed(parts: list):
    """Over the first dimension of all."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).sum(0)


class _Sums:
    """The sums over the entries of the terms, for any range of latents, of columns that fit a tile."""

    def __init__(self, x, weight, along, terms: list[Term], base):
        self.x, self.weight, self.along = x, _matrix(weight), along
        self.base = None if base is None else (*_matrix(base[0]), *_matrix(base[1]), base[2])
        split = limits.pass_split(weight.shape[1] + x.shape[1])
        self.widths = weight.shape[1], x.shape[1], x.stride(0), split
        self.modes = tuple(term.mode for term in terms)
        self.offered = tuple(term.offered.numel() > 0 for term in terms)
        self.terms = tuple((*self._arguments(term), *self._partial(term, weight.shape[0])) for term in terms)
        self.strides = tuple(term.grad.stride(0) for term in terms)

    @staticmethod
    def _arguments(term: Term) -> tuple:
        """What kernels know as `term[0]` to `term[5]`; behind them come the partial sums."""
        return term.grad, term.values, term.offered, term.latent_offsets, term.latent_rows, term.latent_positions

    def _partial(self, term: Term, num_latents: int):
        """Sums of splits of SPLIT entries that belong to one latent, so that no program walks far through one."""
        splits = term.values.numel() // self.widths[3]
        room = max(splits, 1)  # without any there would be another kernel to compile
        shapes = (room, self.widths[0]), (room, self.widths[1]), (room,)
        partial = tuple(torch.empty(shape, dtype=torch.float32, device=self.x.device) for shape in shapes)
        if splits:
            launch = _splits(self.widths, splits, num_latents, term.mode, term.offered.numel() > 0)
            launch(self.x, term.indices, (*self._arguments(term), *partial), term.grad.stride(0), self.weight)
        return partial

    def run(
        self, latents: slice, grads, *, group=1, state=(None, None, None), adam=None, center=None, square=None,
        first_column=None,
    ):  # fmt: skip
        """Stores the sums of ``latents`` into ``grads``, whose columns are contiguous, or lets Adam use them up.

        Of rows that no tile holds, these are the columns from ``first_column`` on.
        """
        launch = _latents(
            self.widths, tuple(0 if t is None else t.stride(0) for t in grads[:2]), self.modes, self.offered,
            tuple(four is not None for four in state),
            tuple(four is not None and four[3] is not None for four in state),
            adam is not None and adam.unit_rows, adam is not None and adam.rounds, group, adam and adam.settings,
        )  # fmt: skip
        launch(
            self.x, self.terms, self.strides, self.weight, self.along, self.base,
            *grads, *(None if four is None else _side_by_side(four) for four in state),
            adam and adam.factors, adam and adam.skip, center, square, latents.start, latents.stop, first_column,
            grid=(triton.cdiv(latents.stop - latents.start, group),),
        )  # fmt: skip


def _with_slopes(term: Term, weight) -> Term:
    """The same term with its gradients at the pre-activations, in fp32, found row by row of the codes."""
    inner = value_gradients(term.grad, term.indices, term.offsets, weight, torch.float32)
    return term._replace(offered=term.at_entries(inner), mode=GIVEN)


def _sums(x, weight, along, lists) -> list[tuple[slice, _Sums]]:
    """The sums in one piece where a tile holds the rows; else by columns, with slopes that are there before."""
    terms = [Term._make((*map(with_unit_stride, term[:-1]), term.mode)) for term in terms_of(lists)]
    x, along = with_unit_stride(x), None if along is None else along.contiguous()
    dense = [term for term in terms if term.is_dense]
    terms = [term for term in terms if not term.is_dense]
    base = densified.latent_gradients(x, weight, dense, torch.float32) if dense else None
    tile = _tuning.PASS_TILE
    pieces = triton.cdiv(max(weight.shape[1], x.shape[1]), tile)
    if pieces == 1:
        return [(slice(None), _Sums(x, weight, along, terms, base))]
    given = [term if term.mode == GIVEN else _with_slopes(term, weight) for term in terms]
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

    def __init__(self, step, lr, beta1, beta2, eps, weight_decay, unit_rows, skip, *, rounds: bool):
        self.factors = torch.empty(3, dtype=torch.float32, device=step.device)
        _factors(beta1, beta2)(self.factors, step, lr)
        self.settings = beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay
        self.unit_rows, self.rounds = unit_rows, rounds
        self.skip = skip if skip is None or skip.dtype == torch.bool else skip != 0

    def of_stored(self, grad, state, latents: slice, *, matrix, slopes=None, unit_rows=False):
        """Adam of ``latents`` of one matrix; the partial sums of d(center), where ``slopes`` are given, and norm."""
        width = 1 if grad.dim() == 1 else grad.shape[1]
        block, launch = _matrix_update(
            width, matrix, state[0][1] == 1, state[3] is not None, unit_rows, self.settings
        )  # fmt: skip
        programs = triton.cdiv(latents.stop - latents.start, block)
        center = None if slopes is None else grad.new_empty(programs, width)
        square = grad.new_empty(programs)
        launch(
            grad, slopes, _side_by_side(state), self.factors, self.skip, center, square, latents.start,
            latents.stop, grid=(programs,),
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
    adam = _Adam(*options, rounds=are_narrow(exp_avgs[0], weight))
    tensors = [*itertools.zip_longest(parameters, exp_avgs, exp_avg_sqs, copies)]
    state = [tuple(None if t is None else _matrix(t) for t in four) for four in tensors]
    bias = state[2] if len(state) > 2 else None
    pieces = _sums(x, copies[0] if copies else weight, along, lists)
    whole, group = len(pieces) == 1, _tuning.PASS_GROUP
    # Columns are independent of one another but for unit rows. Gradients that need whole rows, and those of an encoder
    # whose rows are strided, are stored, some latents at a time.
    is_fused = whole or not adam.unit_rows, encoder.stride(1) == 1
    widths = [0 if fused else width for fused, width in zip(is_fused, (d_out, d_in), strict=True)]
    if all(is_fused):  # the partial sums of d(center) would take 2 GB of a million latents
        most = max(limits.WIDE_ELEMENTS["cuda"] // d_in, 1) * group
    else:
        most = _tuning.stored_latents(sum(widths))
    chunk = min(most, num_latents)
    stored = [None if fused else new((chunk, width)) for fused, width in zip(is_fused, widths, strict=True)]
    slopes = None if is_fused[1] else new(chunk)
    centers: list[list] = [[] for _ in pieces]
    squares = []
    for start in range(0, num_latents, chunk):
        latents = slice(start, min(start + chunk, num_latents))
        programs = triton.cdiv(latents.stop - latents.start, group)
        for number, (columns, sums) in enumerate(pieces):
            of_columns = state if whole else [_of_columns(four, columns) for four in tensors[:2]]
            mine = [four if fused and width else None
                    for four, fused, width in zip(of_columns, is_fused, sums.widths, strict=False)]  # fmt: skip
            mine.append(bias if number == 0 else None)
            center = None if mine[1] is None else new((programs, sums.widths[1]))
            square = None if all(four is None for four in mine) else new(programs)
            sums.run(
                latents, (*(None if t is None else t[:, columns] for t in stored), slopes), group=group, state=mine,
                adam=adam if square is not None else None, center=center, square=square,
                first_column=None if whole else columns.start,
            )  # fmt: skip
            if center is not None:
                centers[number].append(center if chunk == num_latents else center.sum(0, keepdim=True))
            center = None  # before the next one is made
            if square is not None:
                squares.append(square)
        if stored[0] is not None:
            squares.append(adam.of_stored(stored[0], state[0], latents, matrix=0, unit_rows=adam.unit_rows)[1])
        if stored[1] is not None:
            center, square = adam.of_stored(stored[1], state[1], latents, matrix=1, slopes=slopes)
            centers[0].append(center)
            squares.append(square)
    found = [_summed(of_columns) for of_columns in centers if of_columns]
    return (found[0] if len(found) == 1 else torch.cat(found)).to(wide), _summed(squares).to(wide)
