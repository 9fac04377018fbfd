"""Between codes and matrices: a matrix at the codes, codes as a matrix, the transposed index of codes."""
import torch
from torch import Tensor


def uniform_offsets(rows: int, k: int, device: torch.device) -> Tensor:
    """Offsets (rows + 1,) of rows that hold ``k`` entries each."""
    if k == 0:
        return torch.zeros(rows + 1, dtype=torch.int64, device=device)
    return torch.arange(0, rows * k + 1, k, dtype=torch.int64, device=device)


def entries_of_each_row(offsets: Tensor, entries: int) -> int | None:
    """How many entries every row owns, where that is one number and on a CPU, which may look; else None."""
    rows = offsets.numel() - 1
    if not (offsets.is_cpu and rows and entries) or entries % rows:
        return None
    k = entries // rows
    if rows == 1:
        return k if offsets.tolist() == [0, k] else None
    return k if torch.equal(offsets, torch.arange(0, entries + 1, k, device=offsets.device)) else None


def rows_of_uniform(entries: int, k: int, device: torch.device) -> Tensor:
    """The row (N,) int64 of each entry, of rows that own ``k`` each."""
    if entries == k:
        return torch.zeros(entries, dtype=torch.int64, device=device)
    return torch.arange(entries // k, device=device).repeat_interleave(k)


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """The row (N,) int64 of each entry; entries that belong to no row get row B."""
    k = entries_of_each_row(offsets, entries)
    if k is not None:
        return rows_of_uniform(entries, k, offsets.device)
    counts = torch.cat([offsets.diff(), entries - offsets[-1:]])
    return torch.repeat_interleave(torch.arange(offsets.numel(), device=offsets.device), counts, output_size=entries)


def to_dense(values: Tensor, indices: Tensor, offsets: Tensor, num_latents: int) -> Tensor:
    """(B, F) without a host read: entries that belong to no row land in a row that is cut off."""
    k = entries_of_each_row(offsets, values.numel())
    if k is not None:
        dense = values.new_zeros(values.numel() // k, num_latents)
        return dense.scatter_(1, indices.reshape(-1, k).long(), values.reshape(-1, k))
    rows = rows_of(offsets, values.numel())
    dense = values.new_zeros(offsets.numel(), num_latents)
    dense.view(-1)[rows * num_latents + indices.clamp(max=num_latents - 1)] = values
    return dense.resize_(offsets.numel() - 1, num_latents)  # a view of an operator could not be written to


def gather(dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    k = entries_of_each_row(offsets, indices.numel())
    if k is not None:
        return dense.gather(1, indices.view(-1, k).long()).flatten()
    rows = rows_of(offsets, indices.numel())
    if dense.shape[0] == 0:
        return dense.new_zeros(indices.numel())
    owned = rows < dense.shape[0]
    return torch.where(owned, dense[rows.clamp(max=dense.shape[0] - 1), indices.long()], 0.0)


def by_latent(indices: Tensor, offsets: Tensor, num_latents: int):
    rows = rows_of(offsets, indices.numel())
    latents = torch.where(rows < offsets.numel() - 1, indices, num_latents)
    latents, positions = latents.sort(stable=True)
    bounds = torch.arange(num_latents + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(latents, bounds), rows[positions].int(), positions
