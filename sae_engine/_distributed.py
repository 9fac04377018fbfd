"""A batch rule over several ranks: how many of the group's entries are this rank's."""
import torch
import torch.distributed as dist
from torch import Tensor

from sae_kernels.reference import eligible, ordered_keys, relu


def batch_share(pre: Tensor, mask: Tensor | None, k: float, group) -> int:
    """This rank's part of the ``int(k * all ranks' tokens)`` entries with the largest relu(pre) (rows, F).

    Ties go to the lower rank, then to the lower flat index. Only keys of possible winners travel: at most the
    budget's number of int64 from each rank. Reads the device twice (token counts, share).
    """
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros(2, dtype=torch.int64, device=pre.device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([pre.shape[0], pre.numel()], device=pre.device), group=group)
    tokens, entries = torch.stack(sizes).T.tolist()
    total = int(k * sum(tokens))
    most = min(total, max(entries))
    if most == 0:
        return 0
    keys = torch.where(eligible(mask, pre), ordered_keys(relu(pre)).long(), -1).flatten()
    best = keys.new_full((most,), -2)  # below a masked entry: belongs to nobody
    mine = min(most, keys.numel())
    best[:mine] = keys.topk(mine).values
    gathered = [torch.empty_like(best) for _ in range(ranks)]
    dist.all_gather(gathered, best, group=group)
    every = torch.stack(gathered)
    cut = every.flatten().kthvalue(every.numel() - total + 1).values
    above, tied = (every > cut).sum(1), (every == cut).sum(1)
    left = total - above.sum() - (tied.cumsum(0) - tied)
    share = above + left.clamp(min=0).minimum(tied)
    return int(share[dist.get_rank(group)])
