"""Selections over the shards of a mesh, held to the reference on hard cases: the first cases of ``mesh_ranks``."""

import torch

import sae_engine as se
from sae_engine._running import RunningLatents
from sae_engine.distributed.shards import Shards
from sae_engine.distributed.wire import shares
from sae_kernels import reference

F64 = torch.float64


def my_rows(tokens, rank, size):
    rows = shares(tokens, size)
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def hard_matrices(dtype):
    """Name, pre (rows, F), mask (F,), k: the same on every rank."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    yield "random", draw(13, 97), None, 8
    yield "three values", draw(13, 64).sign() * 0.5, None, 9
    yield "all equal", torch.full((6, 40), 0.25), None, 7
    yield "zeros", torch.zeros(6, 40), None, 7
    yield "negative", -draw(7, 33).abs(), None, 5
    special = draw(12, 50)
    special[special.abs() < 0.4] = 0.0
    special[torch.rand(12, 50, generator=g) < 0.1] = -0.0
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        special[torch.rand(12, 50, generator=g) < 0.06] = value
    yield "NaN, Inf, -0", special, None, 6
    yield "more than a shard", draw(5, 21), None, 17
    yield "empty shard", draw(5, 9), None, 2
    yield "fewer tokens than ranks", draw(1, 30), None, 3
    yield "mask", draw(9, 48), torch.rand(48, generator=g) < 0.3, 11
    yield "mask, too few", draw(9, 48).sign(), torch.rand(48, generator=g) < 0.1, 11


def as_bool(codes):
    return se.SparseCodes(
        torch.ones_like(codes.values), codes.indices, codes.offsets, codes.batch_shape, codes.num_latents
    ).to_dense() != 0  # fmt: skip


def selects_as_the_reference(mesh, rank, size, trims):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name, matrix, mask, k in hard_matrices(dtype):
            check_selection(mesh, rank, size, trims, name, matrix.to(dtype), mask, k)


def check_selection(mesh, rank, size, trims, name, pre, mask, k):
    shards = Shards(mesh, pre.shape[1])
    shards.begun(shares(len(pre), size))
    shards.trims = trims
    mine, first = shards.mine, sum(shards.every_rows[: shards.group * shards.size])
    here = slice(first, first + shards.rows_here)
    part = pre[here, mine].contiguous()
    allowed = reference.eligible(mask, pre)
    score = pre.float() * (1 + (torch.arange(pre.shape[1]) % 5).float())
    total = int((k + 0.5) * len(pre))
    budgets = (torch.arange(pre.shape[1]) % (len(pre) + 1)).int()

    def best(by, number=k, over=allowed):
        keys = reference.ranking(by, over)
        return torch.zeros_like(over).scatter_(1, reference.first_k(keys, number), True)

    def of_batch(over):
        keys = reference.ranking(reference.relu(pre), over).flatten()
        kept = torch.zeros_like(keys, dtype=torch.bool)
        kept[reference.first_k(keys, total)] = True
        return kept.view(pre.shape)

    def selected(rule, **context):
        rule.shards = shards
        codes = rule.select(part, **context)
        assert codes.rows == len(part) and codes.num_latents == part.shape[1]
        assert trims or codes.values.numel() >= int(codes.offsets[-1]), "room"
        return codes

    def holds(what, codes, want):
        assert torch.equal(as_bool(codes), want[here, mine]), (what, name, pre.dtype)

    if mask is None:
        holds("TopK", selected(se.TopK(k)), best(pre))
        holds("AbsTopK", selected(se.AbsTopK(k)), best(pre.abs()))
        attribution = score.sign() * (torch.arange(pre.shape[1]) % 3)
        graded = pre.to(score.dtype if pre.dtype != F64 else F64) * (1 + attribution.to(
            score.dtype if pre.dtype != F64 else F64).abs())  # fmt: skip
        rule = se.GradientTopK(k)
        holds("GradientTopK", selected(rule, attribution=attribution[here, mine]), best(graded))
        holds("BatchTopK", selected(se.BatchTopK(k + 0.5)), of_batch(allowed))
        holds("JumpReLU", selected(se.JumpReLU(part.shape[1], threshold=0.2).eval()) if part.shape[1] else
              shards.batch_topk(part, 0, None, "auto"), (pre > 0.2) | pre.isnan())  # fmt: skip
        for target in (torch.linspace(0.0, 9.0, len(pre)), torch.full((len(pre),), torch.inf)):
            norms = 0.5 + torch.arange(pre.shape[1]) % 3
            want = reference.norm_matched(pre, target, norms, False)
            holds("TopAFA", selected(se.TopAFA(), target_norm=target[here], weight_norm=norms[mine]), want)
        if part.shape[1]:
            running = RunningLatents(len(part), part.shape[1], "auto", budgets[mine], shards)
            running.add(part, slice(0, len(part)), slice(0, part.shape[1]))
            codes, _ = running.finish()
            dense = reference.feature_topm(pre, budgets, int(budgets.sum()))
            want = reference.to_dense(torch.ones_like(dense[0]), *dense[1:], pre.shape[1]) != 0
            holds("feature choice", codes, want)
    else:
        holds("AuxTopK", selected(se.rules.AuxTopK(k), dead_mask=mask[mine]), best(pre))
        holds("batch with a mask", shards.batch_topk(part, total, mask[mine], "auto"), of_batch(allowed))
    slabs(shards, part, mask, k, holds, best(pre))


def slabs(shards, part, mask, k, holds, want):
    """The same of a shard that passes by in two slabs."""
    width = shards.mine.stop - shards.mine.start
    rule = se.TopK(k) if mask is None else se.rules.AuxTopK(k)
    rule.shards = shards
    context = {} if mask is None else {"dead_mask": mask[shards.mine]}
    running = rule.running(len(part), width, **context)
    for latents in (slice(0, width // 2), slice(width // 2, width)):
        running.add(part[:, latents].contiguous(), slice(0, len(part)), latents)
    holds("in slabs", running.finish()[0], want)


def matching_norms_is_exact(mesh, rank, size):
    """Long rows, where sums in another order would show: integers give the same at every number of ranks."""
    g = torch.Generator().manual_seed(1)
    pre, target = torch.randn(16, 20000, generator=g), torch.linspace(1, 60, 16)
    shards = Shards(mesh, 20000)
    shards.begun(shares(16, size))
    here = slice(16 // shards.groups * shards.group, 16 // shards.groups * (shards.group + 1))
    codes = shards.norm_match(pre[here, shards.mine], target[here], None, None)
    want = reference.norm_matched(pre, target, None, False)
    assert torch.equal(as_bool(codes), want[here, shards.mine])
