"""The kernels of ``latent_pass.py``: entries summed latent by latent, and Adam on what comes of them."""
import triton
import triton.language as tl

from .._rounding import NOT_ROUNDED_UP
from .._terms import GIVEN
from ._device import only_if

# A matrix (F, D) reaches a kernel as (pointer, stride of latents, stride of columns). Several lie one after the other
# in a flat tuple: of a parameter weights, first moment, second moment and copy. A term is a tuple of pointers, in the
# order of `_arguments`. A tuple within a tuple holds pointers alone: Triton 3.6 loses constants there, and None and
# strides of 1 are constants. Flags say which of several matrices are absent; another pointer stands in their place.
_GIVEN = tl.constexpr(GIVEN)
_NOT_ROUNDED_UP = tl.constexpr(NOT_ROUNDED_UP)


@triton.jit
def _at(matrices, latent, columns, NUMBER: tl.constexpr = 0):
    """Addresses in one of the matrices."""
    AT: tl.constexpr = 3 * NUMBER
    return matrices[AT] + latent * matrices[AT + 1] + columns.to(tl.int64) * matrices[AT + 2]


@triton.jit
def _gated(inner, term, value, position, present, MODE: tl.constexpr, OFFERED: tl.constexpr):
    """Gradients at the pre-activations from the inner products (``Term.at_entries``)."""
    if MODE == _GIVEN:
        return tl.load(term[2] + position, mask=present, other=0.0).to(tl.float32)
    else:
        slope = inner
        if OFFERED:
            slope += tl.load(term[2] + position, mask=present, other=0.0).to(tl.float32)
        return tl.where(present & (value != 0), slope, 0.0)


@triton.jit
def _next_entries(term, entry, end, IN_FLIGHT: tl.constexpr):
    """Rows and positions of the IN_FLIGHT entries from ``entry`` on, as far as they lie before ``end``."""
    entries = entry + tl.arange(0, IN_FLIGHT)
    present = entries < end
    row = tl.load(term[4] + entries, mask=present, other=0).to(tl.int64)
    return row, tl.load(term[5] + entries, mask=present, other=0)


@triton.jit
def _add_entries(
    dec, enc, bias, term, stride_gb, x_ptr, stride_xb, weight, row, position, entry, end, offs_out, mask_out, offs_in,
    mask_in, MODE: tl.constexpr, OFFERED: tl.constexpr, IN_FLIGHT: tl.constexpr,
):
    """The three sums of a latent plus what its next IN_FLIGHT entries before ``end`` bring."""
    present = entry + tl.arange(0, IN_FLIGHT) < end
    value = tl.load(term[1] + position, mask=present, other=0.0).to(tl.float32)
    at = row[:, None] * stride_gb + offs_out[None, :]  # [IN_FLIGHT, BLOCK_OUT]
    grad = tl.load(term[0] + at, mask=present[:, None] & mask_out[None, :], other=0.0).to(tl.float32)
    at = row[:, None] * stride_xb + offs_in[None, :]  # [IN_FLIGHT, BLOCK_IN]
    x = tl.load(x_ptr + at, mask=present[:, None] & mask_in[None, :], other=0.0).to(tl.float32)
    inner = value if MODE == _GIVEN else tl.sum(grad * weight[None, :], axis=1)
    slope = _gated(inner, term, value, position, present, MODE, OFFERED)
    dec += tl.sum(value[:, None] * grad, axis=0)
    enc += tl.sum(slope[:, None] * x, axis=0)
    return dec, enc, bias + tl.sum(slope, axis=0)


@triton.jit
def _pass_split_kernel(
    x_ptr, indices_ptr, term, stride_gb, weight,  # [B, D_in], [N] int32 in; partial sums of the term out, fp32
    F, D_OUT, D_IN, stride_xb,
    MODE: tl.constexpr, OFFERED: tl.constexpr, SPLIT: tl.constexpr, IN_FLIGHT: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """SPLIT entries from a multiple of SPLIT on: their sums, where they all belong to one latent."""
    split = tl.program_id(0).to(tl.int64)
    entry = split * SPLIT
    end = entry + SPLIT
    if end <= tl.load(term[3] + F):
        latent = tl.load(indices_ptr + tl.load(term[5] + entry))
        if latent == tl.load(indices_ptr + tl.load(term[5] + end - 1)):
            offs_out, offs_in = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
            mask_out, mask_in = offs_out < D_OUT, offs_in < D_IN
            row = tl.load(_at(weight, latent.to(tl.int64), offs_out), mask=mask_out, other=0.0).to(tl.float32)
            dec, enc = tl.zeros((BLOCK_OUT,), tl.float32), tl.zeros((BLOCK_IN,), tl.float32)
            bias = tl.full((), 0.0, tl.float32)
            while entry < end:
                sample, position = _next_entries(term, entry, end, IN_FLIGHT)
                dec, enc, bias = _add_entries(dec, enc, bias, term, stride_gb, x_ptr, stride_xb, row, sample, position,
                                              entry, end, offs_out, mask_out, offs_in, mask_in, MODE, OFFERED,
                                              IN_FLIGHT)
                entry += IN_FLIGHT
            tl.store(term[6] + split * D_OUT + offs_out, dec, mask=mask_out)
            tl.store(term[7] + split * D_IN + offs_in, enc, mask=mask_in)
            tl.store(term[8] + split, bias)


@triton.jit
def _mixed(h):
    """``_rounding.mixed`` of uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _rounded(exact, random):
    """``_rounding.rounded``, still in fp32, which bfloat16 then holds exactly."""
    bits = exact.to(tl.int32, bitcast=True)
    random = tl.where((bits & 0x7FFFFFFF) >= _NOT_ROUNDED_UP, 0, random.to(tl.int32))
    return ((bits + random) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_moments(first, second, step, latent, columns, MATRIX: tl.constexpr):
    """Both moments rounded to bfloat16 by one hash of step and place (``_rounding.random_bits``).

    No part of it follows from the column alone: a loop over latents would hold that in registers.
    """
    key = _mixed(_mixed((2 * step.to(tl.int32) + MATRIX).to(tl.uint32)) ^ latent.to(tl.uint32))
    h = (key ^ columns.to(tl.uint32)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return _rounded(first, h & 0xFFFF), _rounded(second, h >> 16)


@triton.jit
def _moments(state, latent, columns, mask):
    """Both, as they are stored; where nothing lies such that no 0 is divided by 0."""
    first = tl.load(_at(state, latent, columns, 1), mask=mask, other=0.0)
    return first, tl.load(_at(state, latent, columns, 2), mask=mask, other=1.0)


@triton.jit
def _moved(state, latent, columns, first_column, mask, keep, old, moments, grad, factors, settings,
           MATRIX: tl.constexpr, REPLICATED: tl.constexpr):
    """Moves the moments by ``grad``, where ``keep``, and returns the weights that follow from ``old``.

    Rounding follows from a number's place, of which ``first_column`` is the first of ``columns``; None: 0.

    Where the tile is REPLICATED several warps read each number and one writes it: they wait for one another in between.
    Moments in bfloat16 beside fp32 weights are rounded by chance, and the weights follow from the exact ones.
    """
    step_size, root, step = factors
    beta1, rest1, beta2, rest2, eps, weight_decay = settings
    grad += weight_decay * old
    at = _at(state, latent, columns, 1), _at(state, latent, columns, 2)
    first = beta1 * moments[0].to(tl.float32) + rest1 * grad
    second = beta2 * moments[1].to(tl.float32) + rest2 * grad * grad
    if REPLICATED:
        tl.debug_barrier()
    kept = first, second
    if at[0].dtype.element_ty == tl.bfloat16 and state[0].dtype.element_ty == tl.float32:
        if first_column is not None:
            columns += first_column
        kept = _rounded_moments(first, second, step, latent, columns, MATRIX)
    tl.store(at[0], kept[0].to(at[0].dtype.element_ty), mask=only_if(keep, mask))
    tl.store(at[1], kept[1].to(at[1].dtype.element_ty), mask=only_if(keep, mask))
    return old - step_size * first / (tl.sqrt_rn(second) / root + eps)


@triton.jit
def _put(state, latent, columns, mask, new, COPIED: tl.constexpr):
    """Stores weights, and rounds the parameter as it now is into the copy."""
    at = _at(state, latent, columns)
    new = new.to(at.dtype.element_ty)
    tl.store(at, new, mask=mask)
    if COPIED:
        at = _at(state, latent, columns, 3)
        tl.store(at, new.to(tl.float32).to(at.dtype.element_ty), mask=mask)


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _latents_kernel(
    x_ptr, terms, strides_gb, weight,       # [B, D_in], tuples, their gradients' strides of rows, matrix; in
    along_ptr, base,                        # [F] or None; two matrices and [F], or None; in
    dec_ptr, enc_ptr, slopes_ptr,           # [F, D_out], [F, D_in], [F] out, each or None, from latent `first` on
    decoder, encoder, bias,                 # parameters in and out, each or None
    factors_ptr, skip_ptr,                  # [3] fp32 or None where nothing moves, [] or None; in
    center_ptr, square_ptr,                 # [programs, D_in], [programs] out, fp32
    first, stop, first_column, D_OUT, D_IN, stride_xb, stride_df, stride_ef, settings,
    MODES: tl.constexpr, OFFERED: tl.constexpr, MOVED: tl.constexpr,
    COPIED: tl.constexpr, UNIT_ROWS: tl.constexpr, REPLICATED: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    IN_FLIGHT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):
    """GROUP latents one after the other: sums over their entries, then stored or used up.

    Of rows that no tile holds, these are the columns from ``first_column`` on; None: whole rows.

    A program with 16 warps has an SM for itself, so that nothing is fetched while it waits. Where an encoder's row is a
    small part of a decoder's, as in a cross-layer transcoder, it and the bias are therefore loaded beside the decoder's
    row and moments, in 7 registers of a thread, and not each once the one before has been stored.
    """
    TOGETHER: tl.constexpr = 4 * BLOCK_IN <= BLOCK_OUT
    program = tl.program_id(0).to(tl.int64)
    offs_out, offs_in = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    mask_out, mask_in = offs_out < D_OUT, offs_in < D_IN
    latent = first + program * GROUP
    last = tl.minimum(latent + GROUP, stop)
    if factors_ptr is not None:
        factors = (tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2))
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
        if base is not None:
            dec += tl.load(_at(base, latent, offs_out), mask=mask_out, other=0.0)
            enc += tl.load(_at(base, latent, offs_in, 1), mask=mask_in, other=0.0)
            slopes += tl.load(base[6] + latent)
        for i in tl.static_range(len(MODES)):
            term = terms[i]
            entry = tl.load(term[3] + latent)
            end = tl.load(term[3] + latent + 1)
            sample, position = _next_entries(term, entry, end, IN_FLIGHT)
            while entry < end:
                split = entry // SPLIT
                border = (split + 1) * SPLIT
                if (entry == split * SPLIT) & (border <= end):
                    dec += tl.load(term[6] + split * D_OUT + offs_out, mask=mask_out, other=0.0)
                    enc += tl.load(term[7] + split * D_IN + offs_in, mask=mask_in, other=0.0)
                    slopes += tl.load(term[8] + split)
                    entry = border
                    sample, position = _next_entries(term, entry, end, IN_FLIGHT)
                else:
                    border = tl.minimum(border, end)
                    after = tl.minimum(entry + IN_FLIGHT, border)
                    # Loaded while those before them are summed: what is read at them would else wait for them, too.
                    following = _next_entries(term, after, end, IN_FLIGHT)
                    dec, enc, slopes = _add_entries(dec, enc, slopes, term, strides_gb[i], x_ptr, stride_xb, row,
                                                    sample, position, entry, border, offs_out, mask_out, offs_in,
                                                    mask_in, MODES[i], OFFERED[i], IN_FLIGHT)
                    sample, position = following
                    entry = after
        if dec_ptr is not None:
            at = dec_ptr + (latent - first) * stride_df + offs_out
            tl.store(at, dec.to(dec_ptr.dtype.element_ty), mask=mask_out)
        if enc_ptr is not None:
            at = enc_ptr + (latent - first) * stride_ef + offs_in
            tl.store(at, enc.to(enc_ptr.dtype.element_ty), mask=mask_in)
        if slopes_ptr is not None:
            tl.store(slopes_ptr + (latent - first), slopes.to(slopes_ptr.dtype.element_ty))
        none = tl.full((), 0, tl.int32)
        if MOVED[1] and TOGETHER:
            old_enc = tl.load(_at(encoder, latent, offs_in), mask=mask_in, other=0.0).to(tl.float32)
            of_enc = _moments(encoder, latent, offs_in, mask_in)
        if MOVED[2] and TOGETHER:
            old_bias = tl.load(_at(bias, latent, none)).to(tl.float32)
            of_bias = _moments(bias, latent, none, latent >= 0)
        if MOVED[0]:
            old = row
            if COPIED[0]:  # `row` is the copy's
                old = tl.load(_at(decoder, latent, offs_out), mask=mask_out, other=0.0).to(tl.float32)
            if UNIT_ROWS:
                dec -= tl.sum(dec * old, axis=0) / _or_one(tl.sum(old * old, axis=0)) * old
            square += tl.sum(dec * dec, axis=0)
            moments = _moments(decoder, latent, offs_out, mask_out)
            new = _moved(decoder, latent, offs_out, first_column, mask_out, keep, old, moments, dec, factors, settings,
                         0, REPLICATED[0])
            if UNIT_ROWS:
                new = new / _or_one(tl.sqrt_rn(tl.sum(new * new, axis=0)))
            _put(decoder, latent, offs_out, only_if(keep, mask_out), new, COPIED[0])
        if MOVED[1]:
            if not TOGETHER:
                old_enc = tl.load(_at(encoder, latent, offs_in), mask=mask_in, other=0.0).to(tl.float32)
            center -= slopes * old_enc
            square += tl.sum(enc * enc, axis=0)
            if not TOGETHER:
                of_enc = _moments(encoder, latent, offs_in, mask_in)
            new = _moved(encoder, latent, offs_in, first_column, mask_in, keep, old_enc, of_enc, enc, factors, settings,
                         1, REPLICATED[1])
            _put(encoder, latent, offs_in, only_if(keep, mask_in), new, COPIED[1])
        if MOVED[2]:
            if not TOGETHER:
                old_bias = tl.load(_at(bias, latent, none)).to(tl.float32)
            square += slopes * slopes
            if not TOGETHER:
                of_bias = _moments(bias, latent, none, latent >= 0)
            new = _moved(bias, latent, none, None, keep | True, keep, old_bias, of_bias, slopes, factors, settings, 2,
                         True)
            _put(bias, latent, none, keep, new, COPIED[2])
        latent += 1
    if MOVED[1]:
        tl.store(center_ptr + program * D_IN + offs_in, center, mask=mask_in)
    if factors_ptr is not None:
        tl.store(square_ptr + program, square)


@triton.jit
def _matrix_kernel(
    grad_ptr, slopes_ptr, state, factors_ptr, skip_ptr,  # [stop - first, D] used up, [stop - first] or None
    center_ptr, square_ptr,  # [programs, D] where slopes are given, [programs]; out, fp32
    first, stop, D, settings,
    MATRIX: tl.constexpr, COPIED: tl.constexpr, UNIT_ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Adam of BLOCK_F latents of one matrix of any strides from stored gradients, BLOCK_D columns at a time."""
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK_F + tl.arange(0, BLOCK_F)
    latent = (first + local)[:, None]
    inside = latent < stop
    factors = (tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2))
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
            old = tl.load(_at(state, latent, columns), mask=mask, other=0.0).to(tl.float32)
            along += tl.sum(grad * old, axis=1)
            norm += tl.sum(old * old, axis=1)
        along = along / _or_one(norm)
        norm = tl.zeros((BLOCK_F,), tl.float32)
    for tile in range(0, tl.cdiv(D, BLOCK_D)):
        columns = (tile * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        mask = inside & (columns < D)
        grad = tl.load(grad_ptr + local[:, None] * D + columns, mask=mask, other=0.0)
        old = tl.load(_at(state, latent, columns), mask=mask, other=0.0).to(tl.float32)
        if slopes_ptr is not None:
            at = program * D + tile * BLOCK_D + tl.arange(0, BLOCK_D)
            # rounded before they are added: fused, lanes that add one another's products end with different sums
            part = tl.where(mask, slopes[:, None] * old, 0.0)
            tl.store(center_ptr + at, -tl.sum(part, axis=0), mask=tile * BLOCK_D + tl.arange(0, BLOCK_D) < D)
        if UNIT_ROWS:
            grad -= along[:, None] * old
        square += tl.sum(grad * grad, axis=1)
        moments = _moments(state, latent, columns, mask)
        new = _moved(state, latent, columns, None, mask, keep, old, moments, grad, factors, settings, MATRIX, False)
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
def _factors_kernel(out_ptr, step_ptr, lr_ptr, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """lr / (1 - beta1 ** step), sqrt(1 - beta2 ** step), and the step. In fp64: 1 - beta ** step is small at first."""
    step = tl.load(step_ptr).to(tl.float64)
    first = 1.0 - tl.exp(step * LOG_BETA1)
    second = 1.0 - tl.exp(step * LOG_BETA2)
    tl.store(out_ptr, (tl.load(lr_ptr).to(tl.float64) / first).to(tl.float32))
    tl.store(out_ptr + 1, tl.sqrt(second).to(tl.float32))
    tl.store(out_ptr + 2, step.to(tl.float32))
