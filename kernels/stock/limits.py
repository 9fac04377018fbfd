"""Sizes of temporaries: what a CPU keeps in its caches, and what a GPU has memory for."""
import math

CHUNK_ELEMENTS = 1 << 24  # elements of the largest (rows, F) temporary of the torch back end
WIDE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # elements of the fp32 temporary of its 16-bit product
SCORES_IN_CACHE = 1 << 20  # scores of a chunk of rows that a CPU passes over several times: 4 MB in fp32
MERGED_SCORES = 1 << 22  # scores of a slab that a CPU merges at a time: of fewer, its threads would share too few rows
GATHERED_IN_CACHE = 3 << 19  # numbers of rows that a CPU gathers from, in any order, many times: 6 MB in fp32
TRANSPOSED_IN_CACHE = 3 << 16  # numbers of a gradient that a CPU transposes at a time: 768 kB in fp32
KEPT_BY_ALLOCATOR = 32 << 20  # bytes of a block; glibc gives larger ones back to the system, whatever its bounds
ROUNDED_IN_CACHE = 1 << 17  # numbers that a CPU rounds at a time: two arrays of random bits of 512 kB


def column_groups(num_latents: int, k: int) -> tuple[int, ...]:
    """Sizes of groups for top-k of a row on a CPU, and of groups of groups; none where the whole row is as fast.

    The larger, the fewer maxima are searched, and the more entries of the k groups that they lead to. Measured for F
    from 4,096 to 131,072 and k from 16 to 512.
    """
    for latents_an_entry, sizes in ((512, (8, 8)), (256, (8, 4)), (64, (4, 4)), (32, (4, 2))):
        if num_latents >= latents_an_entry * k and num_latents % math.prod(sizes) == 0:
            return sizes
    return ()


def pass_split(width: int) -> int:
    """Entries of one latent that a GPU's latent pass sums by a program of their own, ``width`` sums each.

    There is room for as many as there can be, although few latents have so many entries: 256 bytes an entry at most.
    """
    return max(64, 1 << max(-(-width // 64) - 1, 0).bit_length())


def latents_in_cache(width: int) -> int:
    """Latents whose gradients, weights and moments, ``width`` numbers each, stay in a CPU's last cache: 24 MB in fp32.

    Fewer, and the calls on each chunk take longer than its numbers. A multiple of 32, whole vector registers: fused
    Adam rounds what is left over in another way.
    """
    return max((3 << 19) // width // 32, 1) * 32
