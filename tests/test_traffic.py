"""The bytes that kernels load and store, counted in the interpreter, against the unavoidable ones."""
import pytest
import torch
from density import force_dense

from sae_engine import SparseCodes
from sae_engine import functional as f
from sae_engine.testing import make_pre
from sae_kernels._terms import GATED, Term, lists_of
from sae_kernels.device import _tuning
from sae_kernels.operations import OPERATIONS
from sae_kernels.ops import ops
from sae_kernels.stock import densified

pytestmark = pytest.mark.interpreter

FP32, BF16 = torch.float32, torch.bfloat16
ONCE = 1.10  # an input that is streamed once and whose candidates are read again
GATHER = 1.15


def floor_of(name, *arguments):
    """The bytes that a call of the operator cannot avoid."""
    return OPERATIONS[name].traffic(*arguments).bytes


def repeated(entries, weight):
    """Bytes of the rows of a matrix that are asked for again."""
    return entries * weight.shape[1] * weight.element_size()


@pytest.fixture
def metering():
    from meter import metering  # imports triton, which must not happen before conftest.py has spoken

    return metering


# --- the meter itself ----------------------------------------------------------------------------------------------


def test_meter_counts_what_a_copy_moves(metering):
    indices, offsets = torch.tensor([4, 9, 9, 0], dtype=torch.int32), torch.tensor([0, 2, 2, 4])
    dense = torch.randn(3, 50)
    with metering() as meter:
        ops.gather(dense, indices, offsets, "triton")
    assert meter.of(dense) == (16, 0, 16, 0)
    assert meter.of(indices) == (16, 0, 16, 0)
    assert meter.of(offsets) == (3 * 2 * 8, 0, 4 * 8, 0)  # each row loads its two ends, which neighbours share
    assert [launch.kernel for launch in meter.launches] == ["_gather_kernel"]
    assert meter.launches[0].grid == (3,) and meter.launches[0].stored == {"out_ptr": 16}
    assert meter.total.moved == 16 + 16 + 48 + 16


def test_meter_counts_repeats_and_leaves_what_is_masked_off(metering):
    values, indices = torch.randn(3), torch.tensor([1, 1, 1], dtype=torch.int32)
    offsets, weight = torch.tensor([0, 1, 2, 3]), torch.randn(8, 5)
    with metering() as meter:
        ops.decode(values, indices, offsets, weight, None, FP32, None, None, None, "triton")
    counts = meter.of(weight)
    assert (counts.loaded, counts.loaded_once) == (3 * 5 * 4, 5 * 4)


def test_meter_sees_nothing_outside(metering):
    pre = torch.randn(2, 64)
    with metering() as meter:
        pass
    f.topk(pre, 3, backend="triton")
    assert meter.launches == [] and meter.total.moved == 0


# --- selections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_latents", "k"), [(8192, 32), (8192, 8), (4096, 1), (16384, 48)])
def test_topk_reads_the_pre_activations_once(num_latents, k, dtype, metering):
    pre = make_pre("normal", (2, num_latents), dtype)
    floor = floor_of("topk", pre, None, None, k, False, True)
    with metering() as meter:
        codes = f.topk(pre, k, backend="triton")
    read, written = meter.of(pre), meter.of(codes.values, codes.indices)
    assert read.loaded_once == pre.nbytes and written.stored == written.stored_once == 2 * k * (dtype.itemsize + 4)
    assert read.loaded + written.moved <= ONCE * floor
    # beside it: group maxima and chosen groups, written and read back inside a program, 4 bytes each
    groups = _tuning.row_groups(num_latents, k)
    scratch = meter.total.moved - read.moved - written.moved
    assert scratch <= 2 * 2 * 4 * (groups.number + 2 * k * groups.size)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_latents", "k"), [(8192, 32), (8192, 8), (16384, 16)])
def test_batch_topk_reads_the_pre_activations_once(num_latents, k, dtype, metering):
    rows = 4
    pre = make_pre("normal", (rows, num_latents), dtype)
    floor = floor_of("batch_topk", pre, None, rows * k)
    with metering() as meter:
        codes = f.batch_topk(pre, k, backend="triton")
    read, written = meter.of(pre), meter.of(codes.values, codes.indices)
    assert read.loaded_once == pre.nbytes and written.stored == written.stored_once
    assert read.loaded + written.moved <= ONCE * floor


@pytest.mark.parametrize(("off", "most"), [(1, 0.1), (8, 1)], ids=["told", "misled"])
def test_batch_topk_counts_one_by_one_only_what_is_near_the_cut(off, most, metering, monkeypatch):
    """Where a quarter is kept groups do not pay. Tiles of 2048 numbers that have as many digits take more than one
    addition for every two entries, but for a sample. If that misleads, they are counted as they were without it."""
    monkeypatch.setattr(_tuning, "SAMPLED", 2**12)
    rows, num_latents = 8, 16384
    pre = torch.exp2(16 * torch.rand(rows, num_latents)).to(BF16)
    runs = torch.arange(64)
    start = (runs * 40503 % 65536 * (num_latents // 64) >> 16) * 64
    pre[(runs * rows // 64)[:, None], start[:, None] + torch.arange(64)] *= off
    with metering() as meter:
        codes = f.batch_topk(pre, num_latents // 4, backend="triton")
    assert torch.equal(codes.indices, f.batch_topk(pre, num_latents // 4, backend="reference").indices)
    sample, near, digit = meter.launches[:3]
    assert sample.loaded["score_ptr"] == 2**12 * 2 and near.loaded["score_ptr"] == pre.nbytes
    assert digit.loaded.get("score_ptr", 0) == (0 if off == 1 else pre.nbytes)
    added = sum(one.stored.get("counts_ptr", 0) for one in (near, digit)) + sample.stored["sample_ptr"]
    # the sample, four of its standard errors on either side, and a few sums of each tile
    assert added / 8 <= most * pre.numel()


def test_batch_topk_streams_rows_of_few_positives(metering):
    """Nothing bounds the cut but zero, and no list has room: each pass reads the row once, by tiles that are wide."""
    from sae_kernels.device import _launch, batch_topk  # these import triton

    rows, num_latents, k = 4, 8192, 16
    pre = -torch.rand(rows, num_latents).to(BF16)
    pre[:, ::1024] = 1  # 8 a row
    with metering() as meter:
        codes = f.batch_topk(pre, k, backend="triton")
    assert torch.equal(codes.indices, f.batch_topk(pre, k, backend="reference").indices)
    survivors = next(launch for launch in meter.launches if launch.kernel == "_survivors_kernel")
    assert survivors.loaded["score_ptr"] == pre.nbytes  # twice, when their columns were listed as well
    plan = batch_topk._plan(_launch.layout(pre), None, rows * k)
    warps = plan.row_counts.options["num_warps"]
    assert plan.row_counts.following["BLOCK"] == 128 and plan.row_counts.following["STREAM"] == 512 * warps


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_latents", "k", "most"), [(65536, 2048, 1.3), (131072, 4096, 1.4), (262144, 512, ONCE)])
def test_wide_rows_are_read_hardly_more_than_once(num_latents, k, most, dtype, metering):
    """Where no tile holds the groups or their entries."""
    pre = make_pre("normal", (1, num_latents), dtype)
    groups = _tuning.wide_row(1, num_latents, k).groups
    assert _tuning.row_groups(num_latents, k) is None and groups is not None
    with metering() as meter:
        codes = f.topk(pre, k, backend="triton")
    read, written = meter.of(pre), meter.of(codes.values, codes.indices)
    assert written.stored == written.stored_once == k * (dtype.itemsize + 4)
    assert read.loaded + written.moved <= most * floor_of("topk", pre, None, None, k, False, True)
    # beside it: maxima, written once and read twice; chosen groups; columns, read again for entries beyond a tile
    size = 2 if dtype == BF16 and groups.number <= 2**15 else 4
    scratch = meter.total.moved - read.moved - written.moved
    assert scratch <= 3 * size * groups.number + 1.6 * k * (size * (1 + groups.size) + 5 * 4)


def bitmask_moved(meter) -> int:
    """Bytes of a bit for each latent, written and read back."""
    return sum(launch.stored.get("bits_ptr", 0) + launch.loaded.get("bits_ptr", 0) for launch in meter.launches)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("bandwidth", [None, 0.1])
@pytest.mark.parametrize("num_latents", [8192, 12345])
def test_threshold_reads_the_pre_activations_once(num_latents, bandwidth, dtype, metering):
    """And of what it keeps, each entry a second time: one in forty-four here."""
    pre, theta = make_pre("normal", (2, num_latents), dtype), torch.full((num_latents,), 2.0)
    with metering() as meter:
        codes = f.threshold(pre, theta, bandwidth=bandwidth, backend="triton")
    entries = codes.values.numel()
    assert 0.02 < entries / pre.numel() < 0.03
    assert meter.of(pre).loaded == pre.nbytes + entries * dtype.itemsize
    written = meter.of(codes.values, codes.indices)
    assert written.stored == written.stored_once == entries * (dtype.itemsize + 4) and written.loaded == 0
    assert bitmask_moved(meter) <= 2.02 * pre.numel() / 8
    moved = meter.of(pre).loaded + written.stored + bitmask_moved(meter)
    assert moved <= 1.16 * floor_of("threshold", pre, theta, bandwidth, entries, False)


def test_threshold_reads_dense_rows_twice(metering):
    pre = make_pre("normal", (2, 8192), BF16)
    with metering() as meter:
        codes = f.threshold(pre, 0.0, backend="triton")
    assert 0.45 < codes.values.numel() / pre.numel() < 0.55
    assert meter.of(pre).loaded == 2 * pre.nbytes


SPARSE, HALF_KEPT = (0.2, 1.1, 0.02, 1.3), (0.999, 2.75, 1, 2.5)


@pytest.mark.parametrize(
    ("share", "passes", "write", "most", "num_latents", "dtype"),
    [(*SPARSE, 12288, BF16), (*SPARSE, 32768, BF16), (*SPARSE, 32768, FP32), (*SPARSE, 131072, BF16),
     (*HALF_KEPT, 12288, BF16), (*HALF_KEPT, 32768, FP32)],
)  # fmt: skip
def test_norm_match_reads_the_pre_activations_once_where_few_are_kept(
    share, passes, write, most, num_latents, dtype, metering
):
    """The sample can tell where sparse rows end, and the bitmask tells the writer what it keeps.

    Where half of all latents are kept, the cut takes the row's energy, some rows another pass, and the writer reads all
    of it. A cache that holds a row reads it from memory once a launch.
    """
    rows = 2 if share < 0.9 else 4  # of which one may take another pass
    pre, weight = make_pre("normal", (rows, num_latents), dtype), torch.rand(num_latents) + 0.5
    target = share * (pre.float().relu() * weight).norm(dim=1)
    with metering() as meter:
        codes = f.norm_match(pre, target, weight_norm=weight, backend="triton")
    entries = codes.values.numel()
    assert share < 0.9 or 0.38 < entries / pre.numel() < 0.44
    cut, writer = meter.launches
    assert cut.loaded["pre_ptr"] <= passes * pre.nbytes and writer.loaded["pre_ptr"] <= write * pre.nbytes
    aside = cut.stored.get("scratch_ptr", 0) + cut.loaded.get("scratch_ptr", 0)
    assert aside <= 0.35 * pre.nbytes
    assert meter.of(codes.values, codes.indices).stored == entries * (dtype.itemsize + 4)
    floor = floor_of("norm_match", pre, target, None, False, entries)
    read = cut.loaded["pre_ptr"] + writer.loaded["pre_ptr"]
    assert read + aside + bitmask_moved(meter) + entries * (dtype.itemsize + 4) <= most * floor
    assert meter.of(pre).loaded_once == pre.nbytes


@pytest.mark.parametrize(("kind", "passes"), [("giants", 3.2), ("equal", 2.1)])
@pytest.mark.parametrize("share", [0.9, 0.999])
def test_norm_match_needs_few_passes_where_the_sample_tells_nothing(share, kind, passes, metering):
    """Of 32 entries that hold most of the energy a sample of one in 32 sees one, if any: some 2 to 3 passes, once 9 to
    15. Rows of one number take one, where they took 34, and are read again up to the last entry that they keep."""
    pre = torch.full((2, 32768), 0.3)
    if kind == "giants":
        pre = torch.randn(2, 32768) * 0.05
        pre.scatter_(1, torch.rand(2, 32768).topk(32, 1).indices, torch.rand(2, 2, 32).log().sum(0) * -2)
    pre = pre.to(BF16)
    target = share * pre.float().relu().norm(dim=1)
    with metering() as meter:
        f.norm_match(pre, target, backend="triton")
    assert meter.launches[0].loaded["pre_ptr"] <= passes * pre.nbytes


@pytest.mark.parametrize(("kind", "passes"), [("giants", 1.1), ("normal", 2.2), ("short", 1.0), ("far from 1", 2.2)])
def test_energy_share_reads_a_row_once_or_twice(kind, passes, metering):
    """And its sample, a thirty-second of it, with each pass. Short rows take one, and those whose share lies in their
    largest entries; others one more, as do sparse rows of which the sample sees nothing and whose unit had to be found.
    In fp32: where entries tie at the cut, as in bf16 they often do, a row is read again up to the last that it keeps.
    """
    pre = torch.randn(2, 4096 if kind == "short" else 32768)
    if kind in ("giants", "far from 1"):
        pre = pre * 0.05 if kind == "giants" else -pre.abs()
        giants = torch.rand(2, 2, 32).log().sum(0) * (-2 if kind == "giants" else -(2**50))
        pre.scatter_(1, torch.rand(2, 32768).topk(32, 1).indices, giants)
    with metering() as meter:
        codes = f.energy_share(pre, 0.7, backend="triton")
    assert torch.equal(codes.indices, f.energy_share(pre, 0.7, backend="reference").indices)
    assert meter.launches[0].loaded["pre_ptr"] <= passes * pre.nbytes


def test_norm_match_reads_nothing_outside_rows_of_which_everything_may_be_kept(metering):
    """Ties that no lane can set aside; the last words of the bitmask hold so few columns that they are read bit by bit.

    The meter refuses loads outside of the arguments.
    """
    pre = torch.full((1, 8192 + 20), 0.3)
    target = 0.9995 * pre.norm(dim=1)  # kept up to the last tile
    with metering():
        codes = f.norm_match(pre, target, backend="triton")
    assert torch.equal(codes.indices, f.norm_match(pre, target, backend="reference").indices)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_merge_topk_reads_a_slab_once_and_writes_what_changes(dtype, metering):
    """Its tiles in which something exceeds what is held come twice more, from the cache; where nothing does, what ranks
    of what is held is all that is read beside the slab."""
    seen, slab = make_pre("normal", (2, 1024), dtype), make_pre("normal", (2, 2048), dtype, seed=1)
    for most in (torch.inf, 1.0):
        values, latents = (t.view(2, 8) for t in ops.topk(seen, None, None, 8, False, False, "torch"))
        before, part = latents.clone(), slab.clamp(max=most)
        with metering() as meter:
            ops.merge_topk(values, None, latents, part, None, None, 1024, False, "triton")
        changed = int((latents != before).sum())
        assert meter.of(part).loaded_once == part.nbytes and (changed > 0) == (most > 1)
        if changed == 0:
            assert meter.total.moved == part.nbytes + values.nbytes
        assert meter.of(part).loaded <= (3.1 if changed else 1) * part.nbytes
        assert meter.of(latents).stored == 4 * changed and meter.of(values).stored == dtype.itemsize * changed


@pytest.mark.parametrize("gated", [True, False])
def test_sparse_mlp_reads_each_row_of_the_union_once_for_8_tokens(gated, metering):
    """And nothing of a row that no token keeps. Nine tokens: two blocks, the second of one."""
    num_neurons, d, d_out = 60, 48, 80
    kept = torch.where(torch.rand(9, num_neurons) < 0.05, torch.randn(9, num_neurons), 0.0).bfloat16()
    kept[:, 5], kept[:8, 6], kept[8, 7] = 0.0, 1.0, 1.0
    x, up, down = (torch.randn(*shape).bfloat16() for shape in ((9, d), (num_neurons, d), (num_neurons, d_out)))
    with metering() as meter:
        ops.sparse_mlp(x if gated else None, kept, up if gated else None, None, down, None, "triton")
    blocks = [(rows != 0).any(0) for rows in (kept[:8], kept[8:])]
    read, distinct = sum(int(union.sum()) for union in blocks), int((blocks[0] | blocks[1]).sum())
    for weight, is_read in ((up, gated), (down, True)):
        row = weight.shape[1] * 2
        assert meter.of(weight).loaded == (read * row if is_read else 0)
        assert meter.of(weight).loaded_once == (distinct * row if is_read else 0)
    needed = OPERATIONS["sparse_mlp"].traffic(x if gated else None, kept, up if gated else None, None, down, None)
    once = sum(meter.of(t).loaded_once for t in (kept, down, *((x, up) if gated else ())))
    assert once + 9 * d_out * 2 == needed.bytes


# --- codes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch):
    """Codes of 4 rows with 32 entries each, which are gathered however dense they are, and their sizes."""
    monkeypatch.setattr(densified, "DENSE_SHARE", force_dense(float("inf")))
    monkeypatch.setenv("SAE_BACKEND", "triton")
    return f.topk(make_pre("normal", (4, 96), BF16), 32)


WIDTH = 256


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_decode_gathers_each_entry_once(dtype, sparse, metering):
    weight, bias = torch.randn(96, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    distinct = sparse.indices.unique().numel()
    with metering() as meter:
        out = f.decode(sparse, weight, bias)
    codes = sparse.values, sparse.indices, sparse.offsets
    floor = floor_of("decode", *codes, weight, bias, out.dtype, None, None, None)
    once, repeats = meter.total, repeated(128 - distinct, weight)
    assert once.loaded_once + once.stored_once <= GATHER * floor
    assert once.moved <= GATHER * (floor + repeats)
    assert meter.of(out).stored == out.nbytes


def test_decode_error_reads_the_target_once_and_writes_the_residual_once(sparse, metering):
    weight, bias, target = torch.randn(96, WIDTH).to(BF16), torch.randn(WIDTH), torch.randn(4, WIDTH)
    distinct = sparse.indices.unique().numel()
    codes = sparse.values, sparse.indices, sparse.offsets
    with metering() as meter:
        residual, squares = ops.decode_error(*codes, weight, bias, target, FP32, "triton")
    floor = floor_of("decode_error", *codes, weight, bias, target, FP32)
    repeats = repeated(128 - distinct, weight)
    assert meter.total.loaded_once + meter.total.stored_once <= GATHER * floor
    assert meter.total.moved <= GATHER * (floor + repeats) + 3 * bias.nbytes  # a row each reads the bias
    assert meter.of(target).loaded == target.nbytes and meter.of(residual).stored == residual.nbytes
    assert meter.of(squares).stored == squares.nbytes


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_value_gradients_gather_each_entry_once(dtype, sparse, metering):
    weight, grad = torch.randn(96, WIDTH).to(dtype), torch.randn(4, WIDTH).to(dtype)
    distinct = sparse.indices.unique().numel()
    with metering() as meter:
        ops.decode_backward_values(grad, sparse.values, sparse.indices, sparse.offsets, weight, "triton")
    floor = floor_of("decode_backward_values", grad, sparse.values, sparse.indices, sparse.offsets, weight)
    repeats = repeated(128 - distinct, weight)
    assert meter.total.loaded_once + meter.total.stored_once <= GATHER * floor
    assert meter.total.moved <= GATHER * (floor + repeats)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_weight_gradients_gather_each_entry_once(skewed, dtype, sparse, metering, monkeypatch):
    rows, entries, latents = 4, 128, 96
    if skewed:  # one latent takes every entry: its sum is split, and the parts are written and read
        monkeypatch.setattr(_tuning, "SPLIT_LATENT", 32)
        sparse = SparseCodes(sparse.values, torch.full_like(sparse.indices, 7), sparse.offsets, (rows,), latents)
    grad, transposed = torch.randn(rows, WIDTH).to(dtype), sparse.by_latent
    with metering() as meter:
        ops.decode_backward_weight(grad, sparse.values, *transposed, dtype, "triton")
    # the codes arrive transposed: offsets per latent; row, position and value per entry
    codes = (latents + 1) * 8 + entries * (4 + 8 + 2)
    once = codes + (rows + latents) * WIDTH * dtype.itemsize
    parts = 2 * 4 * WIDTH * 4 if skewed else 0
    repeats = repeated(entries - rows, grad)
    assert meter.total.moved <= GATHER * (once + repeats + parts)
    chunks = (latents + 1) * 8  # counted per latent, by stock operators
    assert meter.total.loaded_once + meter.total.stored_once <= GATHER * (once + parts + chunks)


def test_sources_read_the_target_once_and_write_their_sum_once(sparse, metering):
    """Three sources, of which each writes a part of what the one before it writes."""
    rows, entries, starts = 4, 128, (0, WIDTH // 2, WIDTH * 3 // 4)
    codes = [[part] * 3 for part in (sparse.values, sparse.indices, sparse.offsets)]
    weights = [torch.randn(96, WIDTH - start).to(BF16) for start in starts]
    bias, target = torch.randn(WIDTH), torch.randn(rows, WIDTH)
    with metering() as meter:
        residual, _ = ops.decode_sources(*codes, weights, [*starts], WIDTH, bias, target, FP32, "triton")
    assert (meter.of(residual).stored, meter.of(residual).loaded) == (rows * WIDTH * 4, 0)
    assert meter.of(target).loaded == rows * WIDTH * 4
    assert [meter.of(weight).loaded for weight in weights] == [entries * (WIDTH - start) * 2 for start in starts]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_latent_pass_moves_each_parameter_once(dtype, sparse, metering):
    """Gradient, moments and weights of a step: bf16 products with copies, or fp32 without."""
    rows, entries, latents = 4, 128, 96
    grad, x = torch.randn(rows, WIDTH).to(dtype), torch.randn(rows, WIDTH).to(dtype)
    state = [[torch.rand(latents, WIDTH), torch.rand(latents, WIDTH), torch.rand(latents)] for _ in range(3)]
    copies = [] if dtype == FP32 else [p.to(dtype) for p in state[0][:2]]
    transposed = sparse.by_latent
    term = Term(grad, sparse.values, sparse.values[:0], sparse.indices, sparse.offsets, *transposed, GATED)
    options = torch.tensor(1.0), torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.0, True, None
    arguments = *state, copies, x, None, *lists_of([term]), *options
    with metering() as meter:
        ops.latent_adam(*arguments, "triton")
    # the kernel reads the decoder's copy of every latent; a row of gradient and one of input come for each entry
    floor = floor_of("latent_adam", *arguments)
    if copies:
        floor += repeated(latents - sparse.indices.unique().numel(), copies[0])
    repeats = 2 * repeated(entries - rows, grad)
    center = -(-latents // _tuning.PASS_GROUP) * (WIDTH + 1) * 4
    assert meter.total.moved <= GATHER * (floor + repeats + center)
    assert meter.total.loaded_once + meter.total.stored_once <= GATHER * (floor + center)


def test_wide_rows_are_gathered_twice_and_no_gradient_is_stored(sparse, metering, monkeypatch):
    """Free rows of several tiles: decoder rows for the slopes, then gradient and input, tile by tile, into Adam."""
    monkeypatch.setattr(_tuning, "PASS_TILE", WIDTH // 4)
    rows, entries, latents = 4, 128, 96
    grad, x = torch.randn(rows, WIDTH).to(BF16), torch.randn(rows, WIDTH).to(BF16)
    state = [[torch.rand(latents, WIDTH), torch.rand(latents, WIDTH), torch.rand(latents)] for _ in range(3)]
    copies = [p.to(BF16) for p in state[0][:2]]
    term = Term(grad, sparse.values, sparse.values[:0], sparse.indices, sparse.offsets, *sparse.by_latent, GATED)
    options = torch.tensor(1.0), torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.0, False, None
    arguments = *state, copies, x, None, *lists_of([term]), *options
    with metering() as meter:
        ops.latent_adam(*arguments, "triton")
    row = WIDTH * BF16.itemsize
    gathered = entries * row * (3 + 1 / _tuning.VALUES_BLOCK)  # decoder and gradient for slopes; gradient and input
    entry = (3 + 1) * (4 + 8 + 2 + 4) * entries  # row, position, value, slope, of every tile; two of a latent a tile
    adam = 2 * sum(t.numel() * t.element_size() for three in state for t in three)
    adam += sum(copy.numel() * copy.element_size() for copy in copies)
    slopes = 4 * entries * 4
    center = -(-latents // _tuning.PASS_GROUP) * (WIDTH + 4) * 4
    ends = 4 * latents * 16
    assert meter.total.moved <= GATHER * (adam + gathered + entry + slopes + center + ends)


def test_to_dense_writes_each_entry_once(metering):
    codes = f.topk(make_pre("normal", (3, 200)), 5, backend="triton")
    with metering() as meter:
        dense = ops.to_dense(codes.values, codes.indices, codes.offsets, 200, "triton")
    assert meter.of(dense).stored == 15 * 4  # beside the zeros, which a stock operator writes
    assert meter.total.loaded == 15 * 8 + 3 * 16
