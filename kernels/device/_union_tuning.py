"""Launch configurations of sums over the union of a few tokens' neurons, as ``_tuning.py`` has those of the others.

A card has some 132 SMs, of which each needs 23 KB in flight (``_tuning.SPLIT_ROWS`` says why). Grids are fixed, since
only the device knows how many neurons there are, and programs share them out evenly.
"""
from typing import NamedTuple

from ._autotune import searched
from ._tuning import _around, next_power_of_2

TOKENS = 8  # that share one union: of more tokens most neurons would be in it
SMS = 132


class MarkTiles(NamedTuple):
    """Tiles of the pass that lists the union."""

    block: int  # columns that are listed in one step
    ahead: int  # columns that are counted in one step, of those before
    share: int  # columns of a program, whole blocks
    warps: int


@searched(
    lambda tiles, rows, num_neurons: [
        tiles._replace(ahead=ahead, warps=warps)
        for ahead in _around(tiles.ahead, 32, 8192)
        for warps in _around(tiles.warps, 1, 8)
    ]
)
def mark_tiles(rows: int, num_neurons: int) -> MarkTiles:
    """Programs of 1024 columns, 32 at most: each counts all before its own, which is faster than another launch.

    64 numbers a thread are in flight while it counts.
    """
    block = max(min(next_power_of_2(num_neurons), 1024), 32)
    share = -(-num_neurons // (32 * block)) * block
    return MarkTiles(block, max(min(8192 // rows, next_power_of_2(num_neurons)), 32), share, 4)


class UnionTile(NamedTuple):
    """Rows of a weight and columns that one step reads, and warps."""

    neurons: int
    columns: int
    warps: int


def _tiles_around(tile: UnionTile, *_: int) -> list[UnionTile]:
    return [
        tile._replace(neurons=neurons, warps=warps)
        for neurons in _around(tile.neurons, 1, 32)
        for warps in _around(tile.warps, 1, 8)
        if neurons * tile.columns <= 128 * 32 * warps
    ]


@searched(_tiles_around)
def up_tile(rows: int, width: int, itemsize: int) -> UnionTile:
    """Two whole rows of ``up`` where they fit, so that few sums go through shared memory: 64 numbers a thread.

    Four rows where several tokens are multiplied with them, since tokens come from the cache anew for each tile, and 64
    bytes a thread: with more, numbers spill on one GPU or another.
    """
    neurons, most, numbers = (2, 4096, 64) if rows < 4 else (4, 2048, 64 // itemsize)
    columns = max(min(next_power_of_2(width), most), 16)
    return UnionTile(neurons, columns, min(max(neurons * columns // (32 * numbers), 1), 16))


def up_programs(tile: UnionTile, blocks: int, num_neurons: int) -> int:
    """16 warps for each SM, 64 KB of 16-bit numbers in flight."""
    return max(min(16 * SMS // tile.warps // blocks, -(-num_neurons // tile.neurons)), 1)


@searched(_tiles_around)
def down_tile(rows: int, width: int) -> UnionTile:
    """One warp, 8 columns a thread, a 16-byte load of 16-bit numbers: the sum over neurons stays inside each thread.

    16 rows in flight beside the sums of one token, 4 beside those of 8: more would spill. Rows not aligned are loaded
    column by column, which takes a register for each.
    """
    neurons = 4 if rows >= 4 else 8 if rows == 2 or width % 16 else 16
    return UnionTile(neurons, max(min(next_power_of_2(width), 256), 16), 1)


def down_parts(tile: UnionTile, blocks: int, num_neurons: int, width: int) -> int:
    """Parts of the union that are summed apart: 8 warps for each SM, as many as 230 registers a thread leave room for.

    16 KB of 16-bit numbers are in flight with 8 tokens, 64 KB with one.
    """
    tiles = -(-width // tile.columns)
    return max(min(8 * SMS // tile.warps // (tiles * blocks), -(-num_neurons // tile.neurons)), 1)


PARTS_AT_ONCE = 16  # that the last sum loads in one step
LAST_COLUMNS = 128  # of the last sum's tile, which one warp takes
