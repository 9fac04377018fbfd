"""Which mesh suits which sizes: the arithmetic, against sums that are written out here."""
from __future__ import annotations

import pytest
import torch
from forked_ranks import mesh_of, outcomes, succeeded, waiting_for_gloo

import sae_engine as se
from sae_engine.distributed import Hardware, estimate
from sae_engine.testing import allocated_by
from sae_engine.training import peak_bytes
from sae_kernels.stock.limits import latents_in_cache

WIDE = {"d_in": 4096, "d_sae": 2**20, "k": 64}


def test_the_parts_of_a_step_on_eight_devices():
    tokens, d, k = 2**15, 4096, 64
    best = estimate(**WIDE, tokens=tokens, devices=8).best
    assert best[:3] == (8, 1, 1) and best.fits
    share, rates = 7 / 8, Hardware()
    sent = best.sent_bytes
    assert sent["x"] == share * tokens * d * 2 == sent["gradient of the output"]
    assert sent["parts of the output"] == share * tokens * d * 4
    assert sent["candidates"] + sent["counts"] == share * tokens * (k * 2 + 4)
    assert sent["gradients over data"] == 0
    # 943 MB that grow with the batch; what does not is below a thousandth
    assert sum(sent.values()) == pytest.approx(share * tokens * (d * 8 + k * 2 + 4), rel=1e-3)
    parts = best.milliseconds
    assert parts["encoder"] == 2e3 * tokens * d * 2**20 / 8 / rates.flops_16_bit
    assert parts["Adam"] == 26e3 * 2 * d * 2**20 / 8 / rates.memory_bytes_per_second
    chosen = sum(sent[name] for name in ("x", "gradient of the output", "parts of the output", "candidates", "counts"))
    assert parts["sending over latents"] == pytest.approx(1e3 * (chosen / 450e9 + 7 * 30e-6))
    assert best.step_milliseconds == sum(parts.values()) == pytest.approx(56.5, abs=0.05)
    assert best.tokens_per_second == tokens / best.step_milliseconds * 1e3
    latents = 2**20 / 8
    held = latents * (2 * d * (12 + 2) + 52) + tokens * d * (2 * 2 + 8) + 4e9 + 72 * tokens * k
    assert sum(best.memory_bytes.values()) == held


def test_latents_stay_in_a_node_and_tokens_go_over_nodes_where_the_dictionary_is_small():
    few, many = (estimate(4096, F, 64, tokens=2**18, devices=64).best for F in (2**17, 2**20))
    assert few.data > many.data and few.latent == many.latent == 8
    assert few.latent * few.node * few.data == 64
    by_mesh = {one[:3]: one for one in estimate(4096, 2**17, 64, tokens=2**18, devices=64).meshes}
    assert by_mesh[8, 1, 8].tokens_per_second > 1.3 * by_mesh[8, 8, 1].tokens_per_second
    one_link = estimate(**WIDE, tokens=2**18, devices=64, hardware=Hardware(devices_per_node=64))
    assert {one.node for one in one_link.meshes} == {1}
    assert one_link.best.communication < many.communication


def test_what_no_device_holds_is_said_and_comes_last():
    small = estimate(**WIDE, tokens=2**15, devices=2, hardware=Hardware(memory_bytes=80e9))
    assert [one.fits for one in small.meshes] == [True, False] and small.best.latent == 2
    none = estimate(**WIDE, tokens=2**15, devices=1, hardware=Hardware(memory_bytes=80e9))
    assert none.best is None
    assert "too large" in str(none) and "more than a device has" in str(none.meshes[0])
    assert "held by a rank: 65.9 GB\n" in str(small.best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32"])
def test_a_batch_rule_sends_histograms_and_ties_instead_of_candidates(dtype):
    meshes = estimate(64, 4096, 8, 512, 2, scope="batch", compute_dtype=dtype).meshes
    (two,) = (one for one in meshes if one.latent == 2)
    bins = 2**15 + 1 + (2**16 if dtype == "float32" else 0)
    assert two.sent_bytes["histograms"] == 8 * bins and two.sent_bytes["ties"] == 512 * 4
    assert two.sent_bytes["candidates"] == 0
    assert ("copies", 0.0) not in two.memory_bytes.items() or dtype == "float32"


def test_auxk_doubles_what_outputs_send():
    plain, with_dead = (estimate(64, 4096, 8, 512, 4, aux_k=a).meshes[-1].sent_bytes for a in (0, 16))
    for part in ("parts of the output", "gradient of the output", "counts"):
        assert with_dead[part] == 2 * plain[part]
    assert with_dead["candidates"] == 3 * plain["candidates"]


@pytest.mark.parametrize(("changes", "said"), [
    ({"devices": 0}, "devices must satisfy 1 <= devices, got 0"),
    ({"k": 2**21}, "k must satisfy 0 < k <= 1048576"),
    ({"scope": "column"}, "scope must be one of .* got 'column'"),
    ({"aux_k": -1}, "aux_k must satisfy"),
    ({"tokens": 1.5}, "tokens must be an int"),
    ({"hardware": "H200"}, "hardware must be a Hardware, got 'H200'"),
    ({"compute_dtype": "int8"}, "compute_dtype"),
    ({"sources": [4096]}, r"sources\[0\] must be a pair of widths, read and written, got 4096"),
    ({"blocks": 12}, "blocks must be a power of two that divides d_sae = 1048576 and tokens = 32768"),
    ({"blocks": 8, "sources": [(4096, 4096)]}, "of no crosscoder, got 8"),
    ({"blocks": 4}, "devices must be as many as .* divide blocks = 4, got 8"),
])  # fmt: skip
def test_refusals(changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        estimate(**{**WIDE, "tokens": 2**15, "devices": 8, **changes})


def test_hardware_is_checked():
    with pytest.raises(ValueError, match="link_bytes_per_second must be positive and finite, got 0"):
        Hardware(link_bytes_per_second=0)


# --- beside steps of ranks that are there -----------------------------------------------------------------------------

SIZES = {"d_in": 64, "d_sae": 2**13, "k": 32, "tokens": 512}
LAYERS = 3
BUDGET = 1 << 20
KINDS = {  # what is made on a mesh, what its step and the estimate are given, and what the estimate is besides
    "sae": (lambda mesh: se.SparseAutoencoder(64, 2**13, se.TopK(32), mesh=mesh), {}, {}),
    "AuxK": (lambda mesh: se.SparseAutoencoder(64, 2**13, se.TopK(32), mesh=mesh), {}, {"aux_k": 16}),
    "blocks": (lambda mesh: se.SparseAutoencoder(64, 2**13, se.TopK(32), mesh=mesh), {"blocks": 8}, {}),
    "joint": (lambda mesh: se.Crosscoder([64] * LAYERS, [64] * LAYERS, 2**13, se.TopK(32), mesh=mesh), {},
              {"d_in": 64 * LAYERS, "sources": [(64 * LAYERS, 64 * LAYERS)]}),
    "clt": (lambda mesh: se.Crosscoder.clt(LAYERS, 64, 2**13, se.TopK(32), mesh=mesh), {},
            {"d_in": 64 * LAYERS, "sources": [(64, 64 * (LAYERS - s)) for s in range(LAYERS)]}),
    "clt of one budget": (lambda mesh: se.Crosscoder.clt(LAYERS, 64, 2**13, se.BatchTopK(32), mesh=mesh), {},
                          {"d_in": 64 * LAYERS, "sources": [(64, 64 * (LAYERS - s)) for s in range(LAYERS)],
                           "scope": "batch"}),
}  # fmt: skip


def _steps(data):
    def on_ranks(rank, size, folder):
        """Of each kind what a rank sends in a step, by name, and what a step takes at most beyond what it keeps."""
        mesh, found = mesh_of(size, data), {}
        for name, (make, how, given) in KINDS.items():
            sae = make(mesh)
            how = {"losses": se.losses.AuxK(given["aux_k"]), "dead_after": 1} if "aux_k" in given else how
            step = se.training.TrainStep(sae, lr=1e-3, memory_budget=BUDGET, **how)
            x = torch.randn(SIZES["tokens"] // size, given.get("d_in", 64))
            step(x)
            sae.shards.wire.bytes.clear()
            with waiting_for_gloo():
                found[name] = [0, allocated_by(lambda step=step, x=x: step(x)).peak]
            found[name][0] = dict(sae.shards.wire.bytes)
        return found

    return on_ranks


steps_on_one = steps_on_two = steps_on_four = _steps(1)
steps_over_two_groups = steps_over_groups = _steps(2)
CASES = {"steps_on_one": (1, 1), "steps_on_two": (2, 1), "steps_on_four": (4, 1), "steps_over_two_groups": (1, 2),
         "steps_over_groups": (2, 2)}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sizes = {case: ranks * data for case, (ranks, data) in CASES.items()}
    return outcomes(__file__, sizes, tmp_path_factory.mktemp("ranks"))


PARTS = {"x": "x", "candidates": "candidates", "counts": "counts", "histogram": "histograms", "ties": "ties",
         "ties of groups": "ties", "x_hat": "parts of the output", "gradient": "gradient of the output",
         "gradients over groups": "gradients over data", "parameters over groups": "parameters over data",
         "fired": "fired over data", "spread": "sums", "report": "sums", "gradients of all ranks": "sums",
         "squares and b_dec": "sums", "dead": "sums"}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_send_what_is_estimated_and_hold_no_more(ran, case, name):
    (ranks, data), (_, how, given) = CASES[case], KINDS[name]
    known = estimate(**{**SIZES, **given, **how}, devices=ranks * data, compute_dtype="float32", memory_budget=BUDGET)
    (one,) = (mesh for mesh in known.meshes if mesh.latent == ranks)
    widths = given.get("sources", [(64, 64)])
    for of_all in succeeded(ran[case]):
        sent, peak = of_all[name]
        found = dict.fromkeys(one.sent_bytes, 0)
        assert sent.pop("threshold", 0) <= 16  # which a batch rule learns
        for part, number in sent.items():
            found[PARTS[part]] += number
        met = one.sent_bytes["rows, calls, status"]  # which hosts send one another
        expected = {**one.sent_bytes, "rows, calls, status": 0}
        if "aux_k" in given:  # what its spread and its report add, as the numbers of dead latents do
            assert 0 <= found["sums"] - expected["sums"] <= (ranks * data - 1) * 8 * (64 + 2) + 64
            found["sums"] = expected["sums"]
        assert found == expected and met == 24 * (ranks * data - 1)
        beside = "rows", "pre-activations", "codes", "copies", "update", "gradients"
        takes = sum(one.memory_bytes[part] for part in beside)
        width = max(map(sum, widths))
        chunk = 1.125 * min(SIZES["d_sae"] // ranks, latents_in_cache(width)) * width * 4 * (not how)
        if "aux_k" not in given and given.get("scope") != "batch":
            assert takes / 3 < peak <= takes + chunk, (peak, takes, chunk)
            formula = peak_bytes(
                SIZES["tokens"], given.get("d_in", 64), SIZES["d_sae"], SIZES["k"], memory_budget=BUDGET, latent=ranks,
                data=data, sources=given.get("sources"), **how,
            )  # fmt: skip
            stored = 4 * SIZES["d_sae"] // ranks * sum(map(sum, widths)) if data > 1 and not how else 0
            assert (formula + stored) / 2.5 < peak <= formula + stored, (peak, formula, stored)
