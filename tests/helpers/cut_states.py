"""A state that is cut over ranks, and whether it is all there."""

import torch

F, D = 10, 4  # on 3 and 4 ranks uneven shards


def whole(filled=True):
    """What one device would hold; W_enc lies by latents."""
    draw = torch.Generator().manual_seed(0)
    made = {name: torch.randn(*shape, generator=draw, dtype=dtype) for name, shape, dtype in (
        ("W_dec", (F, D), torch.float32), ("W_enc", (F, D), torch.float32), ("b_dec", (D,), torch.float64),
        ("moment", (F, D), torch.bfloat16))}  # fmt: skip
    made["fired"] = torch.arange(F)
    return {name: t if filled else torch.zeros_like(t) for name, t in made.items()}


def state_of(mesh, rank, size, *, filled=True, calls=7):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    tensors = whole(filled)
    mine = slice(*(min(n * -(-F // size), F) for n in (rank, rank + 1)))

    def along(dim, part, shape, stride):
        return DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride)

    cut = {name: along(0, t[mine].clone(), t.shape, t.stride()) for name, t in tensors.items() if len(t) == F}
    cut["W_enc"] = along(1, tensors["W_enc"][mine].clone().T, (D, F), (1, D))
    cut["b_dec"] = DTensor.from_local(tensors["b_dec"].clone(), mesh, [Replicate()], run_check=False)
    optimizer = {"state": {0: {"exp_avg": cut.pop("moment"), "step": torch.tensor(float(calls))}}, "lr": 1e-3}
    return {"sae": cut, "step": {"optimizer": optimizer, "calls": calls, "scheduler": None}}


def bits(state):
    """Of every tensor, joined."""
    found = {name: t.full_tensor() for name, t in state["sae"].items()}
    found["moment"] = state["step"]["optimizer"]["state"][0]["exp_avg"].full_tensor()
    found["W_enc"] = found["W_enc"].T
    return found


def is_whole(state):
    return {name: torch.equal(t, bits(state)[name]) for name, t in whole().items()}
