"""Sizes of temporaries: what a CPU keeps in its caches, and what a GPU has memory for."""

CHUNK_ELEMENTS = 1 << 24  # of a (rows, F) temporary of the torch back end
WIDE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of an fp32 temporary of its 16-bit product
SCORES_IN_CACHE = 1 << 20  # scores of a chunk of rows that a CPU passes over several times: 4 MB in fp32
GATHERED_IN_CACHE = 3 << 19  # numbers of rows that a CPU gathers from, in any order, many times: 6 MB in fp32
TRANSPOSED_IN_CACHE = 3 << 16  # numbers of a gradient that a CPU transposes at a time: 768 kB in fp32
ROUNDED_IN_CACHE = 1 << 17  # numbers that a CPU rounds at a time: two arrays of random bits of 512 kB


def column_groups(num_latents: int, k: int) -> tuple[int, ...]:
    """Sizes of groups for top-k of a row on a CPU, and of groups of groups; none where the whole row is as fast.

    Each stage then searches about 8 k numbers. One stage of groups: sixteen columns a group while maxima outnumber
    entries sixteenfold, else eight, measured for F from 4,096 to 65,536 and k from 8 to 256.
    """
    if num_latents < 32 * k:
        return ()
    bits = (num_latents // (8 * k)).bit_length() - 1
    if bits >= 6 and num_latents % (1 << bits) == 0:
        return 1 << (bits + 1) // 2, 1 << bits // 2
    return next(((size,) for size in ((16, 8) if num_latents >= 256 * k else (8, 16)) if num_latents % size == 0), ())


def latents_in_cache(width: int) -> int:
    """Latents whose gradients, weights and moments, ``width`` numbers each, stay in a CPU's last cache: 24 MB in fp32.

    Fewer, and the calls on each chunk take longer than its numbers. A multiple of 32, whole vector registers: fused
    Adam rounds what is left over in another way.
    """
    return max((3 << 19) // width // 32, 1) * 32
