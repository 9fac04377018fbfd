"""Crosscoders over the ranks of a mesh, each case held to one process: for tests/test_mesh.py, as ``mesh_cases``."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mesh_cases import F64, NoGlobalMatrix, close, data_of, same_gradients, same_state, step_of, whole
from mesh_selections import my_rows
from pair_loop import SITES, WIDTHS, D, number_of_sources, rules

import sae_engine as se
from sae_engine.distributed.wire import shares
from sae_engine.losses import L1, AuxK, MultiTopK, PreActivation, TanhL0

B, F = 14, 18
FOLDER = []  # that all ranks write to
CODERS = {  # rule, wiring, options
    "joint": ("topk", "joint", {}),
    "clt": ("topk", "causal", {}),
    "clt of one budget": ("batch", "causal", {}),
    "clt of budgets": ("batches", "causal", {}),
    "clt of a token's budget": ("token", "causal", {}),
    "each, mixed rules": ("mixed", "each", {"skip": True}),
    "windows, thresholds": ("jumprelu", [(range(0, 2), (0, 2)), (1, 2), (range(1, 3), range(1, 3))], {}),
    "decoder norms": ("topk", "causal", {"rescale_acts_by_decoder_norm": True}),
    "local, all": ("relu", "local", {}),
}


def pair(name, mesh, *, latents=F, dtype=F64):
    rule, wiring, options = CODERS[name]
    number, made = number_of_sources(wiring), []
    for over in (None, mesh):
        torch.manual_seed(0 if over is None or dist.get_rank() == 0 else 7)  # rank 0's counts
        made.append(se.Crosscoder(WIDTHS, WIDTHS, latents, rules(rule, number, latents), wiring=wiring, dtype=dtype,
                                  mesh=over, **options))  # fmt: skip
    one, many = made
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p, q in zip(one.parameters(), many.parameters(), strict=True):
            assert torch.equal(p, whole(q))
        for name, p in many.named_parameters():
            if name.startswith("activation"):
                continue
            alone = one.get_parameter(name)
            if name in ("b_enc", "b_dec") or name.startswith("W_skip"):
                alone.copy_(torch.randn(alone.shape, generator=g, dtype=F64) * 0.2)
            elif name.startswith("W_enc"):
                alone.mul_(3)
            cut = next((placement.dim for placement in p.placements if placement.is_shard()), None)
            p.to_local().copy_(alone if cut is None else alone.narrow(
                cut, many.shards.mine.start, p.to_local().shape[cut]))  # fmt: skip
    return one, many


def batches(steps, tokens=B):
    g = torch.Generator().manual_seed(4)
    return zip(*(torch.randn(steps, tokens, SITES, D, generator=g, dtype=F64) for _ in range(2)), strict=True)


def encodes(mesh, rank, size, name):
    one, many = pair(name, mesh)
    mine = my_rows(B, rank, size)
    for x, _ in batches(2):
        same_gradients(one, many, x, mine)
    with torch.no_grad():
        (a,), info, _ = one.encode_with(x)
        (b,), own, _ = many.encode_with(x[mine])
        first = a.to_dense()
        first = first[mine] if len(one.wiring) == 1 else first[:, mine]
        close(first, b.to_dense(), "codes", 1e-12)
        for sites in (None, SITES - 1):
            close(one.decode(a, info, sites=sites)[mine], many.decode(b, own, sites=sites), "decode", 1e-12)
        close(one.eval()(x)[mine], many.eval()(x[mine]), "eval", 1e-12)


STEPS = {  # coder, options of the step, number of steps
    "joint": ("joint", {}, 20),
    "clt": ("clt", {"losses": [AuxK(3)], "dead_after": 30}, 20),
    "clt of one budget": ("clt of one budget", {}, 20),
    "a token's budget": ("clt of a token's budget", {"losses": [MultiTopK(), AuxK(3)], "dead_after": 30}, 20),
    "a token's budget, slabs": ("clt of a token's budget", {"memory_budget": 8 * B * 3}, 4),
    "clt of budgets, slabs": ("clt of budgets", {"memory_budget": 8 * B * 3}, 4),
    "one budget, slabs": ("clt of one budget", {"memory_budget": 8 * B * 3}, 4),
    "each, mixed rules": ("each, mixed rules", {"grad_clip": 0.5}, 4),
    "thresholds": ("windows, thresholds", {"losses": [TanhL0(0.05)]}, 4),
    "lifted to thresholds": ("windows, thresholds", {"losses": [TanhL0(0.05), PreActivation(0.01)]}, 4),
    "decoder norms": ("decoder norms", {}, 4),
    "accumulated, unit rows": ("clt", {"accumulate": 2, "normalize_decoder": True}, 4),
    "L1": ("local, all", {"losses": [L1(0.01)]}, 4),
}


def trains(mesh, rank, size, name, tokens=B, latents=F, steps=None):
    which, how, number = STEPS[name]
    number = number if steps is None else steps
    one, many = pair(which, mesh, latents=latents)
    alone, together = step_of(one, **how), step_of(many, **how)
    mine, tolerance = my_rows(tokens, rank, size), 2e-5 if "thresholds" in name else 1e-12
    for x, target in batches(number, tokens):
        theirs, ours = alone(x, target), together(x[mine], target[mine])
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            if tokens > 1 or key != "fvu":  # which divides by the distances between tokens
                close(value, ours[key], key, max(tolerance, 1e-11) if value.dtype == F64 else 2e-6)
    same_state(one, many, alone, together, tolerance)


def trains_on_uneven_tokens(mesh, rank, size):
    """Ranks without a token, and ranks without a latent."""
    for name in ("clt", "clt of one budget", "a token's budget", "lifted to thresholds"):
        trains(mesh, rank, size, name, size - 1, steps=5)
        trains(mesh, rank, size, name, 2 * size + 1, 9, steps=5)


def sends_what_the_formula_says(mesh, rank, size):
    """And makes no tensor of all tokens by all latents, nor of a whole weight: of sizes that :class:`NoGlobalMatrix`
    knows, which are no others'."""
    groups, latents = data_of(mesh), 40
    ranks, s = size // groups, F64.itemsize  # of a group
    rows = shares(B, size)[rank // ranks * ranks :][:ranks]
    mine, longest, others, all_others = rows[rank % ranks], max(rows), ranks - 1, size - 1
    foreign, own = sum(rows) - mine, shares(latents, ranks)[rank % ranks]
    updated = shares(own, groups)
    bins = [8 * ((1 << 15) + 1), *[8 * (1 << 16)] * 3]
    for name, (written, sources) in {"joint": ([3 * D], 1), "clt": ([3 * D, 2 * D, D], 3),
                                     "clt of one budget": ([3 * D, 2 * D, D], 3)}.items():  # fmt: skip
        of_latents = sum(written) + sources * (1 if sources > 1 else 3) * D + sources  # weights and biases, of each
        want = {
            "x": others * longest * 3 * D * s, "spread": all_others * 8 * (3 * D + 1), "x_hat": foreign * 3 * D * s,
            "gradient": others * longest * 3 * D * s, "report": all_others * 8 * 6,
            "gradients of all ranks": all_others * (3 * D + 1) * s, "dead": 2 * others * 8 // ranks,
            "fired": 2 * (groups - 1) * own * sources * 4 // groups,
            "gradients over groups": (own - updated[rank // ranks]) * of_latents * s,
            "parameters over groups": (groups - 1) * max(updated) * of_latents * s,
        }  # fmt: skip
        if "budget" in name:
            want |= {
                "histogram": sum(2 * all_others * number // size for number in bins),
                "ties": others * sum(rows) * 4 * sources, "threshold": 2 * all_others * 8 // size,
                "ties of groups": (2 * others * 8 // ranks + (groups - 1) * 8) * sources * (groups > 1),
            }  # fmt: skip
        else:
            want |= {"candidates": foreign * 4 * s * sources, "counts": others * mine * 4 * sources}
        _, many = pair(name, mesh, latents=latents)
        step = step_of(many)
        many.shards.wire.bytes.clear()
        with NoGlobalMatrix(mesh):
            for x, target in batches(3):
                step(x[my_rows(B, rank, size)], target[my_rows(B, rank, size)])
        sent = {key: number for key, number in many.shards.wire.bytes.items() if number}
        assert sent == {key: 3 * number for key, number in want.items() if number}, (name, sent, want)


def ties_go_to_one_device_s_entries(mesh, rank, size):
    """Of one budget for all sources: source by source, then token by token; of a token's, by latent."""
    x = next(iter(batches(1)))[0]
    for name in ("clt of one budget", "clt of a token's budget"):
        one, many = pair(name, mesh)
        with torch.no_grad():
            for coder in (one, many.share):
                for p in (*coder.W_enc, coder.b_enc):
                    p.zero_()
                coder.b_enc.fill_(0.5)
            if "token" in name:  # the last source's second half ranks first
                one.b_enc[-1, F // 2 :] = 0.75
                many.share.b_enc[-1, max(F // 2 - many.shards.mine.start, 0) :] = 0.75
                one.activation.k = many.activation.k = one.activation.k + F // 2
            a, b = one.encode(x), many.encode(x[my_rows(B, rank, size)])
        assert torch.equal(a.to_dense()[:, my_rows(B, rank, size)], b.to_dense()), name
        assert a.to_dense().flatten(1).any(1).sum() < SITES, name  # the budget ends within a source


def goes_on_from_a_checkpoint(mesh, rank, size):
    """On another mesh of as many ranks, where there is one."""
    other = se.distributed.from_env(**({"data": 2, "latent": size // 2} if "data" not in mesh.mesh_dim_names else {}))
    for which, how in (("clt", {"losses": [AuxK(3)], "dead_after": 30}), ("clt of one budget", {})):
        one, many = pair(which, mesh)
        alone, together = step_of(one, **how), step_of(many, **how)
        mine = my_rows(B, rank, size)
        given = list(batches(4))
        for x, target in given[:2]:
            alone(x, target), together(x[mine], target[mine])
        place = Path(FOLDER[0], which.replace(" ", "_") + "".join(map(str, mesh.mesh.shape)))
        se.distributed.save_state({"sae": many.state_dict(), "step": together.state_dict()}, place, mesh)
        _, again = pair(which, other)
        resumed = step_of(again, **how)
        state = se.distributed.load_state({"sae": again.state_dict(), "step": resumed.state_dict()}, place, other)
        again.load_state_dict(state["sae"])
        resumed.load_state_dict(state["step"])
        for x, target in given[2:]:
            alone(x, target), resumed(x[mine], target[mine])
        same_state(one, again, alone, resumed, 1e-12)


def writes_the_folder_of_one_process(mesh, rank, size):
    """Byte for byte; thresholds of a latent each, one of all sources, and skips."""
    for name in ("windows, thresholds", "clt of one budget", "each, mixed rules", "joint"):
        one, many = pair(name, mesh)
        place = Path(FOLDER[0], "-".join(["folder", *map(str, mesh.mesh.shape), name.replace(" ", "")]))
        with torch.no_grad():
            for of_one, of_many in zip(one.activation.parameters(), many.share.activation.parameters(), strict=True):
                of_one.copy_(torch.arange(F) / F)
                of_many.copy_(of_one[many.shards.mine])
        many.save_pretrained(place)
        alone = place.with_name(f"{place.name}-{rank}")
        one.save_pretrained(alone)
        written = {file.name: file.read_bytes() for file in place.iterdir()}
        assert written == {file.name: file.read_bytes() for file in alone.iterdir()}, name
        assert len(written) == len(one.sources) + 2


def is_folded_where_it_lies(mesh, rank, size):
    """Of means and scales of each site; the copy's tensors are its own, and the same in its share."""
    g = torch.Generator().manual_seed(8)
    parts = [(torch.randn(SITES * D, generator=g, dtype=F64), torch.rand(SITES, generator=g, dtype=F64) + 0.5)
             for _ in range(2)]  # fmt: skip
    standards = [se.Standardization((D,) * SITES, mean, scale) for mean, scale in parts]
    for name in ("each, mixed rules", "windows, thresholds"):
        one, many = pair(name, mesh)
        before = {key: whole(t).clone() for key, t in many.state_dict().items()}
        alone, folded = (se.fold_standardization(coder, *standards) for coder in (one, many))
        for (key, p), (_, q) in zip(alone.state_dict().items(), folded.state_dict().items(), strict=True):
            close(p, whole(q), key, 1e-12)
            assert torch.equal(before[key], whole(many.state_dict()[key])), key
        x, mine = next(batches(1))[0], my_rows(B, rank, size)
        with torch.no_grad():
            close(alone(x)[mine], folded(x[mine]), "folded", 1e-12)
        close(one.site_norms(), many.site_norms(), "norms by site", 1e-12)


def draws_elsewhere_what_one_device_draws(mesh, rank, size):
    """Where a GPU's ranks train, as on a CPU: more latents than are drawn at once, of a seed of all ranks."""
    made = [torch.manual_seed(5) and se.Crosscoder([2, 3], [3], 4200, se.TopK(2), mesh=over) for over in (None, mesh)]
    with torch.no_grad():
        for p in made[1].share.parameters():
            p.zero_()
    torch.manual_seed(5)
    made[1]._draw_weights("cpu")
    for name in ("W_enc.0", "W_dec.0"):
        assert torch.equal(made[0].get_parameter(name), whole(made[1].get_parameter(name))), name


def is_refused_by_name(mesh, rank, size):
    _, many = pair("clt", mesh)
    with pytest.raises(ValueError, match="format must be 'sae_engine' for a crosscoder on a mesh, got 'trans"):
        many.save_pretrained(FOLDER[0], format="transcoder_set")
    with pytest.raises(ValueError, match="keep_pre must be False on a mesh"):
        many.encode_with(next(batches(1))[0], keep_pre=True)
    if F % size == 0:
        with pytest.raises(ValueError, match="blocks must be None with a crosscoder"):
            step_of(many, blocks=size)


def cases(first=0, every=1):
    """All of them, or of coders and steps some."""
    for name in [*CODERS][first::every]:
        yield f"crosscoder encodes: {name}", lambda *at, name=name: encodes(*at, name)
    for name in [*STEPS][first::every]:
        yield f"crosscoder steps: {name}", lambda *at, name=name: trains(*at, name)
    yield "crosscoder steps: uneven tokens", trains_on_uneven_tokens
    yield "crosscoder steps: bytes", sends_what_the_formula_says
    yield "crosscoder: goes on from a checkpoint", goes_on_from_a_checkpoint
    yield "crosscoder: folder", writes_the_folder_of_one_process
    yield "crosscoder: refused", is_refused_by_name
    yield "crosscoder: folded", is_folded_where_it_lies
    yield "crosscoder: drawn elsewhere", draws_elsewhere_what_one_device_draws
    yield "crosscoder: ties", ties_go_to_one_device_s_entries
