"""How Adam's moments in bfloat16 are rounded: up or down by chance, where the chance is a function of step and place.

To the nearest, a second moment would not decay: 0.999 times a bfloat16 rounds to itself. This is the meaning, in plain
integers; ``stock/moments.py`` and ``device/_latent_kernels.py`` have the same bits.
"""
import torch
from torch import Tensor

LOW = 0xFFFFFFFF  # numbers of 32 bits are kept in int64
NOT_ROUNDED_UP = 0x7F7F0000  # magnitudes from bfloat16's largest number on: finite numbers stay finite, NaN stays NaN


def are_narrow(moments: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in bfloat16 and it is not."""
    return moments.dtype == torch.bfloat16 and parameter.dtype == torch.float32


def mixed(h: Tensor) -> Tensor:
    """Another number of 32 bits for each, all of whose bits depend on all of the first's; one to one.

    Two rounds of multiply and xorshift; the constants are those that Wellons found in 2018 to change half of the bits
    for each bit that changes ("Prospecting for Hash Functions").
    """
    h = (h ^ (h >> 16)) * 0x7FEB352D & LOW
    h = (h ^ (h >> 15)) * 0x846CA68B & LOW
    return h ^ (h >> 16)


def latent_keys(step: Tensor, matrix: int, latents: Tensor) -> Tensor:
    """A number of 32 bits for each latent of a matrix (0: W_dec, 1: W_enc) at one step."""
    return mixed(mixed(2 * step.long() + matrix & LOW) ^ latents.long())


def random_bits(of_latent: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers from 0 to 2^16 - 1, for the first moment at a place and for the second: halves of one hash.

    Different columns of a latent have different hashes. Its key is mixed already, so the first shift of ``mixed`` is
    left out.
    """
    h = (of_latent ^ columns) * 0x7FEB352D & LOW
    h = (h ^ (h >> 15)) * 0x846CA68B & LOW
    h = h ^ (h >> 16)
    return h & 0xFFFF, h >> 16


def rounding_bits(step: Tensor, matrix: int, num_latents: int, width: int, device=None) -> tuple[Tensor, Tensor]:
    """(F, D) int64: the random bits of both moments of a matrix.

    A place has the same whatever lies around it and however the matrix is laid out, and others at every step.
    """
    latents, columns = (torch.arange(count, device=device) for count in (num_latents, width))
    return random_bits(latent_keys(step.to(latents.device), matrix, latents)[:, None], columns)


def rounded(exact: Tensor, random: Tensor) -> Tensor:
    """fp32 -> bfloat16, away from zero where the 16 bits that are cut off plus ``random`` carry, else towards it.

    Of 2^16 random numbers as many carry as the cut bits say: the mean is ``exact``, which bfloat16 itself stays.
    """
    bits = exact.view(torch.int32).long()
    random = torch.where((bits & 0x7FFFFFFF) >= NOT_ROUNDED_UP, 0, random)
    return ((bits + random) >> 16).to(torch.int16).view(torch.bfloat16)
