"""Which mesh suits which sizes: the arithmetic, against sums that are written out here."""
from __future__ import annotations

import pytest
import torch
from forked_ranks import mesh_of, outcomes, succeeded

import sae_engine as se
from sae_engine.distributed import Hardware, estimate
from sae_engine.testing import allocated_by

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
])  # fmt: skip
def test_refusals(changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        estimate(**{**WIDE, "tokens": 2**15, "devices": 8, **changes})


def test_hardware_is_checked():
    with pytest.raises(ValueError, match="link_bytes_per_second must be positive and finite, got 0"):
        Hardware(link_bytes_per_second=0)


# --- beside steps of ranks that are there -----------------------------------------------------------------------------

SIZES = {"d_in": 64, "d_sae": 2**13, "k": 32, "tokens": 512}
BUDGET = 1 << 20


def steps_on_two(rank, size, folder):
    return _steps(rank, size, aux_k=0)


def steps_on_four(rank, size, folder):
    return _steps(rank, size, aux_k=0)


def steps_with_auxk(rank, size, folder):
    return _steps(rank, size, aux_k=16)


def steps_over_groups(rank, size, folder):
    return _steps(rank, size, aux_k=0, data=2)


def _steps(rank, size, aux_k, data=1):
    """What a rank sends in a step, by name, and what a step takes at most beyond what it keeps."""
    mesh = mesh_of(size, data)
    sae = se.SparseAutoencoder(SIZES["d_in"], SIZES["d_sae"], se.TopK(SIZES["k"]), mesh=mesh)
    losses = [se.losses.AuxK(aux_k)] if aux_k else []
    step = se.training.TrainStep(sae, lr=1e-3, memory_budget=BUDGET, losses=losses, dead_after=1)
    x = torch.randn(SIZES["tokens"] // size, SIZES["d_in"])
    step(x)
    sae.shards.wire.bytes.clear()
    peak = allocated_by(lambda: step(x)).peak
    return [dict(sae.shards.wire.bytes), peak]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    sizes = {"steps_on_two": 2, "steps_on_four": 4, "steps_with_auxk": 2, "steps_over_groups": 4}
    return outcomes(__file__, sizes, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("case", "ranks", "data", "aux_k"), [
    ("steps_on_two", 2, 1, 0), ("steps_on_four", 4, 1, 0), ("steps_with_auxk", 2, 1, 16),
    ("steps_over_groups", 2, 2, 0),
])  # fmt: skip
def test_ranks_send_what_is_estimated_and_hold_no_more(ran, case, ranks, data, aux_k):
    known = estimate(**SIZES, devices=ranks * data, aux_k=aux_k, compute_dtype="float32", memory_budget=BUDGET)
    (one,) = (mesh for mesh in known.meshes if mesh.latent == ranks)
    names = {"x": "x", "candidates": "candidates", "counts": "counts", "x_hat": "parts of the output",
             "gradient": "gradient of the output"}  # fmt: skip
    if data > 1:
        names |= {"gradients over groups": "gradients over data", "parameters over groups": "parameters over data",
                  "fired": "fired over data"}  # fmt: skip
    for sent, peak in succeeded(ran[case]):
        assert {names[name]: sent[name] for name in names} == {part: one.sent_bytes[part] for part in names.values()}
        beside = "rows", "pre-activations", "codes", "copies", "update", "gradients over data"
        takes = sum(one.memory_bytes[part] for part in beside)
        chunk = SIZES["d_sae"] // ranks // 16 * 2 * SIZES["d_in"] * 4
        assert aux_k or takes / 2 < peak
        # Between groups gloo's threads hold buffers for a while after they have been sent.
        assert aux_k or data > 1 or peak <= takes + 1.5 * chunk
