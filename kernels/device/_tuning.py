"""Launch configurations: a deterministic function of shapes and dtype, each with its reason.

Nothing here reads the device or the clock, so two processes never choose differently. What :func:`searched` decorates
a table can replace, which ``make tune`` has filled: see ``_autotune.py``.
"""
import math
from typing import NamedTuple

import torch

from ._autotune import searched

MAX_TILE = 8192  # lanes of one tile that stays in registers, at 16 warps
MIN_TILE = 512  # lanes below which a program of its own gains nothing


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def key_shift(dtype: torch.dtype) -> int:
    """Low bits of an fp32 key that carry no order for values of ``dtype``: fewer rounds, fewer digits."""
    return {torch.bfloat16: 16, torch.float16: 13}.get(dtype, 0)


def num_warps(lanes: int) -> int:
    """16 lanes a thread: with 32, selection takes 200 registers and spills on some GPUs. No thread is without lanes."""
    return min(max(lanes // 512, min(lanes // 64, 4), 1), 16)


def _around(number: int, least: int, most: int) -> list[int]:
    """Half of it, itself and twice, within bounds."""
    return [n for n in (number // 2, number, 2 * number) if least <= n <= most]


class Tile(NamedTuple):
    """Lanes of one step over a row, and the warps that share them."""

    block: int
    warps: int


def _tiles_around(tile: Tile, *_: object) -> list[Tile]:
    return [Tile(block, warps) for block in _around(tile.block, 16, 4096) for warps in _around(tile.warps, 1, 16)]


@searched(_tiles_around)
def digit_tile(num_latents: int) -> Tile:
    """Tile of the passes that count whole rows: 8 lanes a thread, a 16-byte load of 16-bit values."""
    block = stream_block(num_latents, 2048)
    return Tile(block, min(max(block // 256, 1), 8))


@searched(_tiles_around, key=lambda k: (round(math.log2(k)),))
def list_tile(k: float) -> Tile:
    """Tile of the passes over a row's survivors: two to four times k lanes, as there are hardly more than k survivors.

    4 lanes a thread, each a scattered load of a sector; up to k = 64 one or two warps, whose sums need few barriers.
    """
    block = min(max(next_power_of_2(math.ceil(4 * k)), 128), 1024)
    return Tile(block, block // 128)


def unlisted_block(tile: Tile) -> int:
    """Columns of one step over a row whose candidates fit no list, by the warps of the list's ``tile``: 16 a thread.

    That is two 16-byte loads of 16-bit values. The list's own tile is as short as lists are: a whole row would take it
    thousands of steps.
    """
    return 512 * tile.warps


# Where groups do not pay, batch top-k learns from a sample near which digit the cut lies.
SAMPLED = 2**18  # entries of the sample: of continuous data it leaves two or three digits in which the cut can lie
SAMPLED_RUN = 64  # neighbours of it in one row: whole sectors of memory, from as many places as possible
SAMPLE_TILE = Tile(1024, 4)
SAMPLE_ERRORS = 4  # standard errors allowed on either side: one matrix in ten thousand has to be counted once more


def sampled_runs(rows: int, num_latents: int) -> int:
    """Runs of the sample; 0 for matrices so small that counting them whole takes hardly more additions."""
    enough = rows * num_latents >= 16 * SAMPLED and num_latents >= SAMPLED_RUN
    return SAMPLED // SAMPLED_RUN if enough else 0


def sampled_ranks(number: int, share: float) -> tuple[int, int]:
    """Between which ranks of a sample of ``number`` entries lies the last of the largest ``share`` of a matrix."""
    expected = share * number
    most = SAMPLE_ERRORS * math.sqrt(expected * max(1 - share, 0.0)) + 1
    return max(math.floor(expected - most), 1), min(math.ceil(expected + most), number)


def options(warps: int) -> dict[str, int | bool]:
    """What every launch passes to Triton. Multiply-adds fuse; it is said because Triton's default has changed."""
    return {"num_warps": warps, "enable_fp_fusion": True}


class Groups(NamedTuple):
    """Group size of the group-maxima theorem, and the tiles that follow from it."""

    size: int  # G, latents of a group
    number: int  # ceil(F / G)
    block: int  # latents of one streaming tile
    warps: int


def _balanced_size(num_latents: float, k: float) -> int:
    """G near sqrt(F / k) balances the two stages; F / G >= 4 k keeps the second to a quarter of the first at most."""
    size = 1 << max(round(math.log2(max(num_latents / k, 1)) / 2), 0)
    while size > 1 and num_latents < 4 * k * size:
        size //= 2
    return size


def _groups_around(found: Groups, extent: int, most: int, largest_block: int) -> list[Groups]:
    """Other sizes of a group, tiles and warps; a tile holds whole groups."""
    return [
        Groups(size, -(-extent // size), block, warps)
        for size in _around(found.size, 2, most)
        for block in _around(found.block, max(size, 16), largest_block)
        for warps in _around(found.warps, 1, 16)
    ]


@searched(
    lambda found, rows, num_latents, total: _groups_around(found, num_latents, found.block, MAX_TILE),
    key=lambda rows, num_latents, total: (num_latents, round(math.log2(total / rows))),
)
def batch_groups(rows: int, num_latents: int, total: int) -> Groups | None:
    """Groups for ``total`` entries of a whole matrix, each inside one row and one tile; None: too many to pay."""
    block = stream_block(num_latents)
    size = min(_balanced_size(num_latents, total / rows), block)
    return None if size == 1 else Groups(size, -(-num_latents // size), block, num_warps(block))


class WideRow(NamedTuple):
    """Sizes of the selection of many entries of a row, or of the groups of a very long one."""

    groups: Groups | None  # None: the row itself stands for its maxima
    sets: int  # sets of groups whose maxima bound the cut
    capacity: int  # of the list of entries that reach the bound
    block: int  # of them in one step; the first stay in registers
    warps: int

    @property
    def step(self) -> int:
        """Groups and candidates of one step: 4 a thread, since with 8 their positions spill beside 16 warps."""
        return 128 * self.warps


def wide_row(rows: int, num_latents: int, k: int) -> WideRow:
    """Four sets for each entry while they fit a tile: in random data 1.13 groups an entry then reach the bound.

    The list has room for twice as many entries that reach the bound as are kept.
    """
    size = _balanced_size(num_latents, k)
    sets, capacity = (max(next_power_of_2(n * k), MIN_TILE) for n in (4, 2))
    sets = min(sets, MAX_TILE)
    groups = None
    if size > 1:
        block, warps = maxima_tile(rows, num_latents, size)
        groups = Groups(size, -(-num_latents // size), block, warps)
    # 8 entries a thread: their keys, columns and positions are held at once, and 16 would spill
    return WideRow(groups, sets, capacity, min(capacity, MAX_TILE // 2), num_warps(sets))


# Of fewer rows than this, each row's maxima are taken by several programs: an SM needs some 23 KB in flight (4.3 TB/s *
# 700 ns / 132 SMs, which nobody has measured), and a program of 4 warps with 4 loads of 16 bytes a thread has 8.
SPLIT_ROWS = 4 * 132


@searched(
    lambda tile, rows, num_latents, size: [t for t in _tiles_around(tile) if t.block >= size],
    key=lambda rows, num_latents, size: (num_latents, size),
)
def maxima_tile(rows: int, num_latents: int, size: int) -> Tile:
    """Tile of a pass that only takes maxima, two 16-byte loads of 16-bit values a thread; short ones for few rows."""
    block = max(stream_block(num_latents, 1024 if rows < SPLIT_ROWS else 4096), size)
    return Tile(block, min(max(block // 512, 1), 8))


class Sets(NamedTuple):
    """Sets of groups whose maxima bound the cut, and how many of them one program takes."""

    size: int  # groups of a set
    number: int
    warps: int


@searched(
    lambda sets, number, k: [sets._replace(warps=warps) for warps in _around(sets.warps, 1, 16)],
    key=lambda number, k: (number, round(math.log2(k))),
)
def sets_of_groups(number: int, k: float) -> Sets:
    """At least four sets for each entry, where a row has so many groups: then 1.13 groups an entry reach the bound.

    That is for random data; with half as many sets it is 1.36. Eight sets a thread; groups come by 16-byte loads.
    """
    return Sets(1 << max(int(math.log2(number / (4 * k))), 0), 1024, 4)


@searched(
    lambda tiles, number: [
        (groups, candidates, warps)
        for groups in _around(tiles[0], 16, 2048)
        for candidates in _around(tiles[1], 16, 2048)
        for warps in _around(tiles[2], 1, 16)
    ]
)
def survivor_tiles(number: int) -> tuple[int, int, int]:
    """Groups and candidates of one step, and warps: 8 of either a thread."""
    return stream_block(number, 512), 512, 2


def _row_groups_around(found: Groups, num_latents: int, k: int) -> list[Groups]:
    """Those whose stages fit one tile, and none whose second stage is wider than the widest that has been compiled."""
    widest = max(next_power_of_2(found.number), next_power_of_2(k) * found.size)
    return [
        groups for groups in _groups_around(found, num_latents, MAX_TILE, MAX_TILE)
        if max(next_power_of_2(groups.number), next_power_of_2(k) * groups.size) <= min(2 * widest, MAX_TILE)
    ]  # fmt: skip


@searched(_row_groups_around)
def row_groups(num_latents: int, k: int) -> Groups | None:
    """Groups for k entries of a row; None when a stage would not fit one tile."""
    size = _balanced_size(num_latents, k)
    while -(-num_latents // size) > MAX_TILE:
        size *= 2
    number = -(-num_latents // size)
    lanes = max(next_power_of_2(number), next_power_of_2(k) * size)
    if size == 1 or lanes > MAX_TILE:
        return None
    warps = max(num_warps(lanes), 8 if num_latents > 65536 else 1)
    # 64 latents a thread: eight loads in flight, since the selection's registers leave few programs to an SM.
    # Rows that are not aligned load latent by latent; beside the widest selection 32 of them spill on sm_80.
    latents = 8 if num_latents % 16 and lanes == MAX_TILE else 64
    return Groups(size, number, max(stream_block(num_latents, 32 * latents * warps), size), warps)


@searched(
    lambda found, rows, num_latents, total, stride=1: _groups_around(found, rows, 256, 1024),
    key=lambda rows, num_latents, total, stride=1: (num_latents, round(math.log2(total / rows)), stride == 1),
)
def groups_of_rows(rows: int, num_latents: int, total: int, stride: int = 1) -> Groups | None:
    """Groups of rows for ``total`` entries shared out over columns ``stride`` apart; None: too many to pay.

    A column has ``total / num_latents`` entries of ``rows``: at k entries a row this is k of ``num_latents``, whatever
    the number of rows, and one binary serves all batches.
    """
    size = min(_balanced_size(num_latents, total / rows), 256)  # more rows in one program leave too few programs
    # 8 columns a thread: one 16-byte load of 16-bit numbers a row; 4 where columns are scattered, an address each
    widest = 1024 if stride == 1 else 512
    block = stream_block(num_latents, widest)
    return None if size == 1 else Groups(size, -(-rows // size), block, max(4 * block // widest, 1))


class CandidateTile(NamedTuple):
    """Tile of the pass that ranks each column's groups."""

    groups: int
    columns: int
    warps: int


# 32 columns are a 128-byte line of maxima; the groups go by in tiles of 8 lanes a thread. With 16 lanes a thread needs
# 124 to 205 registers, by the version of Triton, and spills with one of them; with 8 it needs at most 118.
CANDIDATE_TILE = CandidateTile(64, 32, 8)


@searched(lambda block, candidates: _around(block, 128, 2048), key=lambda candidates: (round(math.log2(candidates)),))
def candidate_block(candidates: float) -> int:  # a warp has 128 lanes
    """Tile of one column's candidates, of which there are ``candidates`` on average.

    Four times the average, because budgets differ; twice where that is a single warp. Both were fastest on an H200.
    """
    return 128 if candidates < 96 else min(1 << round(math.log2(4 * candidates)), 1024)


UNGROUPED_BLOCK = 1024  # tile of a column of which every row is a candidate


@searched(lambda warps, block: _around(warps, 1, 16))
def candidate_warps(block: int) -> int:
    """4 lanes a thread: loads are scattered, a sector each, and one warp needs no barrier. 8 spill in Triton 3.6."""
    return min(block // 128, 8)


MOST_MERGED = 16384  # entries that a row holds, with as many listed ones: the lanes of one scan


def merge_lanes(k: int) -> int:
    """Lanes for what a row holds and as many listed columns: a slab of random data lists 0.7 * k or fewer, from the
    second slab on."""
    return max(next_power_of_2(2 * k), 128)


@searched(_tiles_around)
def merge_tile(width: int, lanes: int) -> Tile:
    """16 latents a thread and, up to 16 warps, 4 lanes of what is merged; twice as many take twice the registers."""
    warps = min(max(lanes // 128, 1), 16)
    return Tile(stream_block(width, min(512 * warps, 4096)), warps)


def stream_block(num_latents: int, most: int = 4096) -> int:
    """Tile of a streaming pass: 16 bytes a thread and several loads in flight, no wider than the row needs."""
    return max(min(next_power_of_2(num_latents), most), 16)


@searched(lambda tile, num_latents, itemsize: [t for t in _tiles_around(tile) if t.block >= 32])  # whole words
def bitmask_tile(num_latents: int, itemsize: int) -> Tile:
    """Columns and warps of the pass that sets the bits of what a threshold keeps.

    8 columns of 16 bits a thread, or 16 of 32: on an H200 either takes a sixth less so than the other way round.
    """
    block = max(stream_block(num_latents, 2048), 32)
    return Tile(block, num_warps(block * 4 // itemsize))


# Splits into which few rows are cut, about: the warps of the writer that share 132 SMs, 24 each.
BITMASK_SPLITS = 24 * 132


class WriteTile(NamedTuple):
    """Tiles of the pass that writes the entries whose bits are set."""

    words: int  # of the bitmask, 32 columns each
    dense: int  # lanes of 8 columns in one step, where many bits are set
    warps: int


@searched(
    lambda tile, num_latents: [
        WriteTile(words, dense, warps)
        for words in _around(tile.words, 2, 1024)
        for dense in _around(tile.dense, 2, 256)
        for warps in _around(tile.warps, 1, 4)
    ]
)
def write_tile(num_latents: int) -> WriteTile:
    """One warp a row, which needs no barrier: 80 registers, so that 24 rows share an SM and hide their latencies.

    4 words a thread, a 16-byte load of the bitmask; 8 columns where many bits are set:
    their positions fill the registers.
    """
    words = max(min(next_power_of_2(-(-num_latents // 32)), 128), 2)
    return WriteTile(words, min(4 * words, 32), 1)


@searched(_tiles_around)
def compact_tile(num_latents: int) -> Tile:
    """Tile of the compaction of whole rows: the positions of a scan and the addresses they become take the registers.

    8 lanes a thread, a 16-byte load of 16-bit values.
    """
    block = stream_block(num_latents, 2048)
    return Tile(block, num_warps(2 * block))


class NormTile(NamedTuple):
    """Tiles of norm matching's cut."""

    block: int  # columns of a streaming tile; a lane has 8 of them, and sets aside by itself what may be the cut
    slots: int  # of a lane for that
    sample: int  # columns that say where the cut may be; 0: the row is small enough to be set aside whole
    warps: int


NORM_REGISTERS = 128  # a thread of norm matching's cut may have: 16 warps share an SM; without a limit it takes 168


def norm_tile(num_latents: int) -> NormTile:
    """2 lanes a thread of a warp of 32: two 16-byte loads in flight, and 32 entries a thread in the last search.

    A sample of F / 32 leaves about F / sqrt(sample) entries in question, a quarter of the slots, so that hardly a lane
    overflows; searching the sample costs some 6 instructions for each of the row's F. Longer rows need twice the slots.

    Half the block and half the warps were faster on an H200 where few are kept (284 µs for 392 at F 32,768, d 768), and
    slower where half are: with half the slots rows take twice the passes.
    """
    block = max(min(next_power_of_2(num_latents) // 2, 4096 if num_latents > 65536 else 2048), 256)
    sample = 0 if num_latents <= 2 * block else max(min(next_power_of_2(num_latents) // 32, 4096), 1024)
    # Rows that are not aligned are loaded column by column, for which two lanes a thread would spill.
    return NormTile(block, 16, sample, max(block // (256 if num_latents % 16 else 512), 1))


def shares_of_row(rows: int) -> int:
    """Programs for one row in passes whose rows can be divided: a few per SM, however few the rows."""
    return -(-1024 // rows)


@searched(lambda block, width: _around(block, 16, 2048))
def decode_block(width: int) -> int:
    """Columns of a decoder tile: a warp's, 27 µs on an H200 where a tile of 1024 columns takes 38 (d 768).

    A row's indices are read for each of its tiles, out of a cache; 768 columns fill no tile of a power of two.
    """
    return max(min(next_power_of_2(width), 256), 16)


@searched(lambda warps, block: _around(warps, 1, 8))
def decode_warps(block: int) -> int:
    """8 columns a thread, one 16-byte load of 16-bit weights."""
    return min(max(block // 256, 1), 4)


@searched(lambda block, width: _around(block, 16, 2048))
def weight_block(width: int) -> int:
    """Columns of a tile of the decoder's gradient: few entries belong to one latent, so wide tiles pay."""
    return max(min(next_power_of_2(width), 1024), 16)


@searched(lambda warps, block, itemsize: _around(warps, 1, 8))
def weight_warps(block: int, itemsize: int) -> int:
    """32 bytes a thread: 16 columns of 16 bits take 45 µs on an H200, 8 take 58 (F 32,768, d 768)."""
    return min(max(block * itemsize // 1024, 1), 4)


PASS_TILE = 8192  # most columns of a row that the latent pass keeps in registers, three to five times, at 16 warps
PASS_REGISTERS = 128  # of a thread, so that 16 warps share an SM; without a limit the compiler takes 168
ROUNDED_PASS_REGISTERS = 168  # of few warps that round moments too: 12 share an SM. Of 8 it would hold one program, and
# a step (F 344,064, d 2,688: benchmarks/wide.py) takes an H200 30.1 ms with 128 registers and 38.7 with 168.
PASS_GROUP = 8  # latents of one program: their share of d(center) is one row of partial sums, 1 % of Adam's traffic


@searched(lambda warps, block: _around(warps, 1, 16))
def pass_warps(block: int) -> int:
    """16 columns a thread, two 16-byte loads of 16-bit rows, up to 16 warps.

    On an H200 Adam's pass takes 474 µs so, and 580 with 8 columns (F 32,768, d 768); 9.1 and 11.5 ms (131,072, 4,096).
    """
    return min(max(block // 512, 1), 16)


def is_replicated(elements: int, warps: int) -> bool:
    """Whether a tile has fewer elements than its program has threads, which then hold copies; waves are 64 wide.

    Whoever changes such a tile in place makes its warps wait for one another between the last load and the first store.
    """
    return elements < 64 * warps


@searched(lambda entries, block, replicated: _around(entries, 2 if replicated else 1, 4))
def pass_entries(block: int, replicated: bool) -> int:
    """Entries whose rows of gradient and input are in flight beside Adam's numbers: one leaves registers for 16 warps.

    Two where warps hold copies of a row, since with one each warp would write its sum to the same shared memory.
    """
    return 2 if replicated else 1


@searched(lambda entries, block: _around(entries, 1, 4))
def split_entries(block: int) -> int:
    """As :func:`pass_entries`, for the pass that only sums."""
    return 2 if block <= 4096 else 1


def stored_tile(by_columns: bool) -> tuple[int, int]:
    """Latents and columns of a tile of Adam's pass over stored gradients: 8 numbers a thread.

    Along the contiguous side a tile has at least 256 bytes.
    """
    return (64, 32) if by_columns else (8, 256)


def stored_warps(elements: int) -> int:
    """8, and never so many that they hold copies of a tile's ``elements``, which the pass changes in place."""
    return next(warps for warps in (8, 4, 2, 1) if warps == 1 or not is_replicated(elements, warps))


def stored_latents(width: int) -> int:
    """Latents whose fp32 gradients, ``width`` numbers each, are stored at a time: 256 MiB, whole tiles."""
    return max((1 << 26) // width // 64, 1) * 64


ENTRIES_IN_FLIGHT = 4  # independent row loads in the decoder's inner loop; more cost registers and hide no more latency
SPLIT_ROW = 256  # entries of a row that the decoder has summed by a program of their own: a row of thousands takes a
# few times as long as one of 32, not a hundred times, and rows of common lengths are never cut.
SPLIT_LATENT = 128  # entries of one latent that its gradient has summed by a program of their own
VALUES_BLOCK = 8  # entries that share one load of their row's gradient, which with 4 is a fifth of what is loaded


def splits_of_row(entries: int, rows: int) -> int:
    """Programs for the value gradients of one row: a step each for common rows; a row of thousands has several.

    They share nothing: every VALUES_BLOCK entries load the row's gradient anew as it is.
    """
    return max(min(next_power_of_2(-(-entries // max(rows, 1))) // VALUES_BLOCK, 32), 8)


def is_wide(*extents: int) -> bool:
    """Whether offsets inside one row pass 31 bits (a transposed matrix: F times its stride)."""
    return any(extent >= 2**31 for extent in extents)
