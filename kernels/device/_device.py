"""What several kernels share: ordered keys, the k-th largest key, keeping exactly k of them; a launch option."""
import triton
import triton.language as tl

KEY_MAX = tl.constexpr(2**31 - 1)  # every NaN
INF_KEY = tl.constexpr(0x7F800000)
ONE_KEY = tl.constexpr(0x3F800000)
# Below the key of every number, also once shifted: lanes outside the row; masked entries are one above.
ABSENT = tl.constexpr(-(2**31))


@triton.jit
def ordered_key(x):
    """fp32 -> int32 with the same order; -0 equals +0, every NaN is KEY_MAX."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, KEY_MAX, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def relu(x):
    """max(x, 0) with NaN kept."""
    return tl.where((x > 0) | (x != x), x, 0.0)


@triton.jit
def scores(pre_ptr, weight_ptr, cols, present, stride_pf, stride_wf, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    """A tile of a row of pre, and of r = relu(pre) * weight.

    Without weights r is pre itself, negative numbers included: a caller that only asks whether r exceeds a positive
    number gets the same answer as after a ReLU, and is spared one.
    """
    at = cols.to(tl.int64) if WIDE else cols
    value = tl.load(pre_ptr + at * stride_pf, mask=present, other=0.0)
    r = value.to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols * stride_wf, mask=present, other=0.0)
        r = tl.maximum(r, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight
    return value, r


@triton.jit
def load_key(
    score_ptr, mask_ptr,  # row pointers: [F], [F] or unused
    cols, present, stride_f, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr,
):
    """Keys of a tile of a row, shifted right by SHIFT (_tuning.key_shift); lanes that are not `present` are ABSENT."""
    score = tl.load(score_ptr + cols * stride_f, mask=present, other=0).to(tl.float32)
    if MAGNITUDE:
        score = tl.abs(score)
    if RELU:
        score = relu(score)
    key = ordered_key(score) >> SHIFT
    if HAS_MASK:
        key = tl.where(tl.load(mask_ptr + cols * stride_mf, mask=present, other=0) != 0, key, (ABSENT >> SHIFT) + 1)
    return tl.where(present, key, ABSENT >> SHIFT)


@triton.jit
def load_group_maxima(
    score_ptr, mask_ptr,  # row pointers: [F], [F] or unused
    cols, present, stride_f, stride_mf,
    MAGNITUDE: tl.constexpr, RELU: tl.constexpr, HAS_MASK: tl.constexpr, SHIFT: tl.constexpr, G: tl.constexpr,
):
    """The largest key of each group of G lanes of a tile.

    A maximum that keeps NaN commutes with the key and costs an instruction per pair of 16-bit values, where the key
    costs ten per value: the neighbours that one 16-byte load brings are reduced as floats.
    """
    lanes: tl.constexpr = cols.shape[0]
    neighbours: tl.constexpr = 128 // score_ptr.dtype.element_ty.primitive_bitwidth
    lowest: tl.constexpr = 0.0 if MAGNITUDE else float("-inf")
    score = tl.load(score_ptr + cols * stride_f, mask=present, other=lowest).to(tl.float32)
    if MAGNITUDE:
        score = tl.abs(score)
    if HAS_MASK:
        allowed = tl.load(mask_ptr + cols * stride_mf, mask=present, other=0) != 0
        score = tl.where(allowed, score, lowest)
    for step in tl.static_range(3):
        if (2 << step <= G) & (2 << step <= neighbours):
            left, right = tl.split(tl.reshape(score, (lanes >> (step + 1), 2)))
            score = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    if RELU:
        score = relu(score)
    key = ordered_key(score) >> SHIFT
    maxima = tl.max(tl.reshape(key, (lanes // G, key.shape[0] * G // lanes)), axis=1)
    if HAS_MASK:
        some = tl.max(tl.reshape(allowed.to(tl.int32), (lanes // G, G)), axis=1)
        maxima = tl.where(some == 1, maxima, (ABSENT >> SHIFT) + 1)
    return maxima


@triton.jit
def only_if(condition, mask):
    """The mask of a block where the scalar `condition` holds, otherwise nothing.

    Compiled, `mask & condition` says the same. The interpreter broadcasts a scalar comparison to a block of int32, and
    that of Triton 3.9 takes no mask but a boolean one.
    """
    return tl.where(condition, mask, False)


@triton.jit
def middle(lo, hi):
    """ceil((lo + hi) / 2) without overflow."""
    return (lo | hi) - ((lo ^ hi) >> 1)


@triton.jit
def kth_largest(key, lo, hi, k):
    """A t in [lo, hi] with count(key > t) < k <= count(key >= t), given count(key >= lo) >= k and hi >= max(key)."""
    while lo < hi:
        mid = middle(lo, hi)
        count = tl.sum((key >= mid).to(tl.int32), axis=0)
        lo = tl.where(count >= k, mid, lo)
        # an exact count ends the search: everything from mid up is the answer
        hi = tl.where(count == k, mid, tl.where(count > k, hi, mid - 1))
    return lo


@triton.jit
def keep_first(key, cut, quota):
    """Mask of the keys above `cut` and the first `quota` equal to it, and each kept lane's position among them.

    One scan serves both: the high half counts keys above, the low half keys equal, hence at most 32,768 lanes.
    """
    tl.static_assert(key.shape[0] <= 32768)
    above = (key > cut).to(tl.int32)
    equal = (key == cut).to(tl.int32)
    scan = tl.cumsum((above << 16) | equal, axis=0)
    equal_rank = scan & 0xFFFF
    keep = (above == 1) | ((equal == 1) & (equal_rank <= quota))
    return keep, (scan >> 16) + tl.minimum(equal_rank, quota) - 1


@triton.jit
def owner_end(offsets_ptr, entry, owners):
    """Where the row (or latent) ends to which an entry belongs, of ``owners`` that offsets separate: by bisection."""
    lo = tl.full((), 0, tl.int32)  # offsets[lo] <= entry < offsets[hi], or hi is owners
    hi = lo + owners
    while hi - lo > 1:
        mid = (lo + hi) // 2
        before = tl.load(offsets_ptr + mid) <= entry
        lo = tl.where(before, mid, lo)
        hi = tl.where(before, hi, mid)
    return tl.load(offsets_ptr + hi)


def at_most(registers: int) -> dict:
    """The launch option that limits the registers of a thread; AMD's compiler and the interpreter have none."""
    if triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": registers}
