"""What the ranks of a mesh do in tests/test_mesh.py: each case holds itself to one process, on every rank.

``mesh_ranks`` says which case is whose.
"""

from unittest.mock import patch

import torch
from mesh_selections import my_rows
from torch.utils._python_dispatch import TorchDispatchMode

import sae_engine as se
from sae_engine.distributed.wire import shares
from sae_engine.losses import AFA, L1, AuxK, AuxZipf, GateLoss, MultiTopK, StepL0, TanhL0
from sae_engine.testing import allocated_by
from sae_engine.training import TrainStep, peak_bytes, state_bytes

B, D, F = 14, 6, 40
F64 = torch.float64
CUT = {"W_enc": 1, "W_dec": 0, "b_enc": 0}


# --- the autoencoder, against one process ----------------------------------------------------------------------------

RULES = {
    "TopK": (lambda: se.TopK(4), {}),
    "TopK of more than a shard": (lambda: se.TopK(17), {}),
    "AbsTopK": (lambda: se.AbsTopK(4), {}),
    "BatchTopK": (lambda: se.BatchTopK(3.5), {}),
    "Matryoshka": (lambda: se.MatryoshkaBatchTopK(3, widths=[8, 40]), {}),
    "TopAFA": (se.TopAFA, {}),
    "ReLU": (se.ReLU, {}),
    "JumpReLU": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8), {}),
    "LogJumpReLU": (lambda: se.LogJumpReLU(F, threshold=0.3, bandwidth=0.8), {}),
    "Gated": (lambda: se.Gated(F), {}),
    "FeatureChoice": (lambda: se.FeatureChoice(F, 3, mutual_steps=1), {}),
    "SampledTopK": (lambda: se.SampledTopK(3, pool=2.0), {}),
    "StatisticalTopK": (lambda: se.StatisticalTopK(4), {}),
    "decoder norms": (lambda: se.TopK(4), {"rescale_acts_by_decoder_norm": True}),
    "layer norm": (lambda: se.TopK(4), {"normalize_activations": "layer_norm"}),
    "skip": (lambda: se.TopK(4), {"d_out": 5, "skip": True}),
}


def fill(sae):
    """Parameters that are the same for any number of ranks."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name.startswith("activation") or not p.requires_grad:
                continue
            numbers = torch.randn(p.shape, generator=g, dtype=F64) * (0.4 if "W" in name else 0.2)
            if sae.shards is not None:
                p, dim = p.to_local(), CUT.get(name)
                numbers = numbers if dim is None else numbers.narrow(dim, sae.shards.mine.start, p.shape[dim])
            p.copy_(numbers)
    return sae


def pair(make, mesh, *, dtype=F64, **options):
    one = fill(se.SparseAutoencoder(D, F, make(), dtype=dtype, **options))
    return one, fill(se.SparseAutoencoder(D, F, make(), dtype=dtype, mesh=mesh, **options))


def data_of(mesh):
    return mesh["data"].size() if "data" in mesh.mesh_dim_names else 1


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def close(a, b, what, tolerance):
    assert torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True), (
        what, (a.double() - b.double()).abs().max(),
    )  # fmt: skip


def same_gradients(one, many, x, mine):
    """Of a weighted sum of the outputs, and these: those of one process on all rows, of a mesh on each rank's."""
    out, part = one(x), many(x[mine])
    close(out[mine], part, "output", 1e-12)
    weight = torch.arange(out.numel(), dtype=F64).view(out.shape).sin()
    one.zero_grad()
    many.zero_grad()
    (out * weight).sum().backward()
    (part * weight[mine]).sum().backward()
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None or not whole(q.grad).any(), name
        else:  # parameters of rules are in fp32
            close(p.grad, whole(q.grad), name, 1e-11 if p.dtype == F64 else 3e-6)


def encodes(mesh, rank, size, rule):
    make, options = RULES[rule]
    one, many = pair(make, mesh, **options)
    mine = my_rows(B, rank, size)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=F64)
    for _ in range(2):
        same_gradients(one, many, x, mine)
    chosen = torch.arange(B)[mine]
    with torch.no_grad():
        (a,), info, _ = one.encode_with(x)
        (b,), own, _ = many.encode_with(x[mine])
        assert torch.equal(a[chosen].indices, b.indices) and torch.equal(a[chosen].offsets, b.offsets)
        assert b.shape == (len(chosen), F)
        close(one.decode(a, info)[mine], many.decode(b, own), "decode", 1e-12)
        close(one.eval()(x)[mine], many.eval()(x[mine]), "eval", 1e-12)


def encodes_by_other_rules(mesh, rank, size):
    """Rules that are not the autoencoder's own, with context of all latents or of my tokens, stay what they were."""
    one, many = pair(lambda: se.TopK(4), mesh)
    mine = my_rows(B, rank, size)
    g = torch.Generator().manual_seed(2)
    x, gradient = (torch.randn(B, D, generator=g, dtype=F64) for _ in range(2))
    dead = torch.rand(F, generator=g) < 0.4
    graded, auxiliary = se.GradientTopK(3), se.rules.AuxTopK(5)
    with torch.no_grad():
        given = {"select": [auxiliary, graded], "dead_mask": dead}
        a = one.encode_with(x, gradient=gradient, **given).codes
        b = many.encode_with(x[mine], gradient=gradient[mine], **given).codes
        for theirs, ours in zip(a, b, strict=True):
            close(theirs.to_dense()[mine], ours.to_dense(), "values", 1e-12)
        assert graded.shards is None and auxiliary.shards is None
        close(one.encode(x).to_dense()[mine], many.encode(x[mine]).to_dense(), "own rule", 1e-12)


# --- the training step, against one process --------------------------------------------------------------------------

STEPS = {
    "TopK": (lambda: se.TopK(4), {}, {}, 20),
    "AuxK": (lambda: se.TopK(4), {}, {"losses": [AuxK(5)], "dead_after": 30}, 20),
    "AuxK of SAELens": (lambda: se.TopK(4), {}, {"losses": [AuxK.saelens()], "dead_after": 30}, 5),
    "MultiTopK": (lambda: se.TopK(4), {}, {"losses": [MultiTopK()]}, 4),
    "AbsTopK": (lambda: se.AbsTopK(4), {}, {}, 4),
    "BatchTopK": (lambda: se.BatchTopK(3.5), {}, {}, 20),
    "Matryoshka": (lambda: se.MatryoshkaBatchTopK(3, widths=[8, 40]), {}, {}, 4),
    "TopAFA": (se.TopAFA, {}, {}, 4),
    "AFA": (se.TopAFA, {}, {"losses": [AFA(1 / 32)]}, 4),
    "GateLoss": (lambda: se.Gated(F), {}, {"losses": [GateLoss(0.1)]}, 4),
    "GateLoss, norms": (lambda: se.Gated(F), {"rescale_acts_by_decoder_norm": True},
                        {"losses": [GateLoss(0.1)], "normalize_decoder": False}, 4),
    "L1": (se.ReLU, {}, {"losses": [L1(0.1)]}, 4),
    "StepL0": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8), {}, {"losses": [StepL0(0.1)]}, 4),
    "StepL0, aimed": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8), {},
                      {"losses": [StepL0(0.5, target=4.0)]}, 4),
    "TanhL0": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.8), {}, {"losses": [TanhL0(0.1)]}, 4),
    "TanhL0, narrow windows": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=0.1), {}, {"losses": [TanhL0(0.1)]}, 4),
    "TanhL0, wide windows": (lambda: se.JumpReLU(F, threshold=0.3, bandwidth=9.0), {}, {"losses": [TanhL0(0.1)]}, 4),
    "FeatureChoice": (lambda: se.FeatureChoice(F, 3, mutual_steps=2), {}, {}, 4),
    "AuxZipf": (lambda: se.FeatureChoice(F, 3), {}, {"losses": [AuxZipf(4)]}, 4),
    "SampledTopK": (lambda: se.SampledTopK(3, pool=2.0), {}, {}, 4),
    "StatisticalTopK": (lambda: se.StatisticalTopK(4), {}, {}, 4),
    "decoder norms": (lambda: se.TopK(4), {"rescale_acts_by_decoder_norm": True}, {"normalize_decoder": False}, 4),
    "layer norm": (lambda: se.TopK(4), {"normalize_activations": "layer_norm"}, {"losses": [AuxK(4)]}, 4),
    "skip": (lambda: se.TopK(4), {"skip": True}, {"grad_clip": 0.5}, 4),
    "clipped": (lambda: se.TopK(4), {}, {"grad_clip": 0.5}, 4),
    "accumulated": (lambda: se.BatchTopK(3), {}, {"accumulate": 2}, 4),
    "weight decay": (lambda: se.TopK(4), {}, {"normalize_decoder": False, "weight_decay": 0.01}, 4),
    "slabs": (lambda: se.TopK(4), {}, {"memory_budget": 8 * B * 3}, 4),
    "slabs of a batch": (lambda: se.BatchTopK(3.5), {}, {"memory_budget": 8 * B * 3}, 4),
    "slabs of whole rows": (se.TopAFA, {}, {"memory_budget": 8 * F * 5}, 4),
}
IN_FP32 = ("StepL0", "StepL0, aimed", "TanhL0", "TanhL0, narrow windows", "TanhL0, wide windows", "GateLoss",
           "GateLoss, norms")  # the rule's parameter and its loss


def batches(steps, tokens=B, dtype=F64):
    return torch.randn(steps, tokens, D, generator=torch.Generator().manual_seed(4), dtype=F64).to(dtype)


def step_of(sae, **options):
    # Adam's eps: 1e-8 would make another parameter of the noise in a gradient that vanishes
    return TrainStep(sae, lr=2**-7, eps=1e-3, **options)


def trains(mesh, rank, size, name):
    make, options, how, number = STEPS[name]
    one, many = pair(make, mesh, **options)
    alone, together = step_of(one, **how), step_of(many, **how)
    mine, tolerance = my_rows(B, rank, size), 2e-5 if name in IN_FP32 else 1e-12
    for x in batches(number):
        theirs, ours = alone(x), together(x[mine])
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            close(value, ours[key], key, max(tolerance, 1e-11) if value.dtype == F64 else 2e-6)
    same_state(one, many, alone, together, tolerance)


def same_state(one, many, alone, together, tolerance):
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        close(p, whole(q), name, tolerance)
    for (name, p), (_, q) in zip(one.named_buffers(), many.named_buffers(), strict=True):
        close(p, whole(q), name, 1e-12)
    since_fired = alone.dead.since_fired.view(len(one.sources), -1)[:, many.shards.mine]
    assert torch.equal(since_fired.flatten(), together.dead.since_fired)
    shards = many.shards
    every = shards.everyone.gather(many.b_dec.detach().to_local(), "test")
    assert (every == every[0]).all(), "what every rank has differs"
    if shards.across is not None:
        for tensor in (*many.share.parameters(), *many.share.buffers()):
            every = shards.across.gather(tensor.detach().contiguous(), "test")
            assert (every == every[0]).all(), "what every group has differs"


def skips_together(mesh, rank, size, how):
    """Nothing changes on any rank where one has no room, or a number that is none; the next batch counts again."""
    groups = data_of(mesh)  # whose ranks have room for an entry of each token
    capacity = 3 * B if groups == 1 else 4 * size * sum(shares(B, size)[: size // groups]) // 5
    make = (lambda: se.TopAFA(capacity=capacity)) if how == "overflow" else (lambda: se.TopK(4))
    one, many = pair(make, mesh)
    alone, together = step_of(one, nonfinite="skip"), step_of(many, nonfinite="skip")
    x, y = batches(2)
    mine = my_rows(B, rank, size)
    if how == "overflow":  # the last rank's latents are all that fire, on the last group's tokens
        shards = many.shards
        x = x * torch.arange(size).repeat_interleave(torch.tensor(shares(B, size))).ge(size - shards.size)[:, None]
        with torch.no_grad():
            many.share.W_enc.mul_(0.25 if shards.rank == shards.size - 1 else 1e-4)
        before = [whole(p).clone() for p in many.parameters()]
        report = together(x[mine] * 100)
        assert bool(report["overflow"])
        assert all(torch.equal(a, whole(b)) for a, b in zip(before, many.parameters(), strict=True))
        assert not together.dead.since_fired.any()
        return
    alone(y)
    broken = x.clone()
    broken[-1, 0] = torch.nan
    before = [whole(p).clone() for p in many.parameters()]
    together(broken[mine])
    assert together.skipped == 1
    assert all(torch.equal(a, whole(b)) for a, b in zip(before, many.parameters(), strict=True))
    together(y[mine])
    same_state(one, many, alone, together, 1e-12)


def trains_on_uneven_tokens(mesh, rank, size):
    """Fewer tokens than ranks, a rank with none, and fewer latents than the shards' size would fill."""
    for tokens in (size - 1, 2 * size + 1):
        one, many = pair(lambda: se.TopK(4), mesh)
        alone, together = step_of(one, losses=[AuxK(5)], dead_after=3), step_of(
            many, losses=[AuxK(5)], dead_after=3)  # fmt: skip
        mine = my_rows(tokens, rank, size)
        for x in batches(4, tokens):
            alone(x)
            together(x[mine])
        same_state(one, many, alone, together, 1e-12)


def empty_shards_train(mesh, rank, size):
    """Nine latents over four ranks are three, three, three and none."""
    options = {"dtype": F64}
    torch.manual_seed(0)
    one = se.SparseAutoencoder(D, 9, se.TopK(2), **options)
    torch.manual_seed(0 if rank == 0 else 7)  # what ranks draw from is rank 0's
    many = se.SparseAutoencoder(D, 9, se.TopK(2), mesh=mesh, **options)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(p, whole(q))
    alone, together = step_of(one), step_of(many)
    for x in batches(4):
        alone(x)
        together(x[my_rows(B, rank, size)])
    same_state(one, many, alone, together, 1e-12)


def starts_alike(mesh, rank, size):
    """More than one block of rows, of which ranks have parts."""
    torch.manual_seed(5)
    one = se.SparseAutoencoder(2, 9000, se.TopK(2), d_out=3)
    torch.manual_seed(5 + rank)
    many = se.SparseAutoencoder(2, 9000, se.TopK(2), d_out=3, mesh=mesh)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.equal(p, whole(q))


class NoGlobalMatrix(TorchDispatchMode):
    """Refuses every tensor of all tokens by all latents, in any orientation or flat (but raw bytes); and where ranks of
    a group share the latents, every one of all latents by the width of a site or more.
    """

    def __init__(self, mesh):
        super().__init__()
        self.shares = mesh.size() > data_of(mesh)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else (out,):
            seen = isinstance(t, torch.Tensor) and t.dtype != torch.uint8
            if seen and ({B, F} <= set(t.shape) or t.numel() == B * F):
                raise AssertionError(f"{func} made {tuple(t.shape)}: all tokens by all latents")
            if seen and self.shares and F in t.shape and t.numel() >= F * D:
                raise AssertionError(f"{func} made {tuple(t.shape)}: a whole weight")
        return out


def sends_what_the_formula_says(mesh, rank, size):
    groups = data_of(mesh)
    ranks = size // groups  # of a group
    rows = shares(B, size)[rank // ranks * ranks :][:ranks]
    mine, longest, others, all_others = rows[rank % ranks], max(rows), ranks - 1, size - 1
    foreign = sum(rows) - mine
    latents = shares(F, ranks)[rank % ranks]
    updated = shares(latents, groups)
    for dtype in (F64, torch.float32):
        s = dtype.itemsize
        each = {
            "x": others * longest * D * s, "spread": all_others * 8 * (D + 1),
            "x_hat": foreign * D * s, "gradient": others * longest * D * s, "report": all_others * 8 * 6,
            "gradients of all ranks": all_others * ((D if groups > 1 else 2 * D) + 1) * s,
            "dead": 2 * others * 8 // ranks, "fired": 2 * (groups - 1) * latents * 4 // groups,
            "gradients over groups": (latents - updated[rank // ranks]) * (2 * D + 1) * s,
            "parameters over groups": (groups - 1) * max(updated) * (2 * D + 1) * s,
        }  # fmt: skip
        top = 8 * s - 16
        bins = [8 * ((1 << 15) + 1), *[8 * (1 << 16) for _ in range(0, top, 16)]]
        of_rule = {
            "TopK": {"candidates": foreign * 4 * s, "counts": others * mine * 4},
            "BatchTopK": {"histogram": sum(2 * all_others * n // size for n in bins), "ties": others * sum(rows) * 4,
                          "ties of groups": (2 * others * 8 // ranks + (groups - 1) * 8) * (groups > 1),
                          "threshold": 2 * all_others * 8 // size},
        }  # fmt: skip
        for name, rule in (("TopK", lambda: se.TopK(4)), ("BatchTopK", lambda: se.BatchTopK(3.5))):
            many = fill(se.SparseAutoencoder(D, F, rule(), dtype=dtype, mesh=mesh))
            step = step_of(many)
            many.shards.wire.bytes.clear()
            with NoGlobalMatrix(mesh):
                for x in batches(3, dtype=dtype):
                    step(x[my_rows(B, rank, size)])
            want = {key: 3 * number for key, number in {**each, **of_rule[name]}.items() if number}
            sent = {key: number for key, number in many.shards.wire.bytes.items() if number}
            assert sent == want, (name, sent, want)


def room_in_place_of_lengths(mesh, rank, size):
    """As on a GPU, where the host does not ask how many codes there are."""
    for make in (lambda: se.TopK(4), lambda: se.BatchTopK(3.5), se.TopAFA):
        one, many = pair(make, mesh)
        many.shards.trims = False
        alone, together = step_of(one, losses=[AuxK(5)], dead_after=30), step_of(
            many, losses=[AuxK(5)], dead_after=30)  # fmt: skip
        for x in batches(4):
            report = alone(x)
            assert together(x[my_rows(B, rank, size)]).keys() == report.keys()
        same_state(one, many, alone, together, 1e-12)


def in_16_bits(mesh, rank, size):
    """Products and codes in bfloat16 beside parameters in fp32: as near as one process is to fp64."""
    one, many = pair(lambda: se.TopK(4), mesh, dtype=torch.float32)
    alone, together = step_of(one, compute_dtype="bfloat16"), step_of(many, compute_dtype="bfloat16")
    for x in batches(4, dtype=torch.float32):
        report, ours = alone(x), together(x[my_rows(B, rank, size)])
        close(report["loss"], ours["loss"], "loss", 2**-8)


def needs_what_the_formula_says(mesh, rank, size):
    """What a rank allocates for an autoencoder and its steps: the bound of one process with its latents, and rows."""
    tokens, width, latents, k, budget = 512, 64, 1 << 15, 32, 4 << 20
    steps = []

    def run():
        sae = se.SparseAutoencoder(width, latents, se.TopK(k), mesh=mesh)
        steps.append(TrainStep(sae, lr=1e-3, memory_budget=budget))
        x = torch.randn(tokens // size, width)
        for _ in range(2):
            steps[0](x)

    measured = allocated_by(run).peak
    state = state_bytes(width, latents // size)
    formula = state.kept + peak_bytes(tokens, width, latents, k, memory_budget=budget, latent=size)
    assert 0.8 * formula < measured <= formula, (measured, formula)


def decides_together(mesh, rank, size):
    """Also where one device would take whole rows of some tokens at a time."""
    with patch("sae_engine.training.forward.whole_rows_from", lambda *_: 1):
        one, many = pair(lambda: se.TopK(4), mesh)
        how = {"memory_budget": 8 * F * 3}
        alone, together = step_of(one, **how), step_of(many, **how)
        for x in batches(3):
            alone(x)
            together(x[my_rows(B, rank, size)])
    same_state(one, many, alone, together, 1e-12)


def repeats(mesh, rank, size):
    """A run has the bits of the run before."""
    found = []
    for _ in range(2):
        sae = fill(se.SparseAutoencoder(D, F, se.BatchTopK(3.5), mesh=mesh))
        step = step_of(sae, losses=[AuxK(5)], dead_after=30)
        for x in batches(6, dtype=torch.float32):
            step(x[my_rows(B, rank, size)])
        found.append([whole(p).clone() for p in sae.parameters()])
    assert all(map(torch.equal, *found))


def lays_out_row_by_row(mesh, rank, size):
    """Latents of an encoder that lies row by row are not together in memory; its moments may be narrow."""
    mine = my_rows(B, rank, size)
    for how in ({}, {"moments": "bfloat16"}):
        alike = []
        for layout in (True, None):
            sae = fill(se.SparseAutoencoder(D, F, se.TopK(4), mesh=mesh, contiguous_parameters=layout))
            step = step_of(sae, **how)
            for x in batches(4, dtype=torch.float32):
                step(x[mine])
            alike.append([whole(p).clone() for p in sae.parameters()])
        for p, q in zip(*alike, strict=True):
            close(p, q, how, 1e-5)
