"""Memory of a training step: measured by the allocator's record, against ``peak_bytes``.

The bound is the issue's: beyond parameters, moments and stored gradients, one buffer of pre-activations and one copy of
each weight in the compute dtype; all else is of the order of entries, batch, latents, or constant.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import fake_memory
import pytest
import torch
import wide

import sae_engine as se
from sae_engine.losses import AuxK
from sae_engine.testing import allocated_by
from sae_engine.training import TrainStep, peak_bytes, state_bytes
from sae_kernels.stock.linear import by_onednn

MIB = 1 << 20
WHOLE = 1 << 40  # a budget that everything fits
K = 32


def needed(tokens, width, latents, budget, *, row_major=False, k_aux=0, **options):
    """Measured bytes of two steps and what they keep, less moments and stored gradients; and the formula's."""
    sae = se.SparseAutoencoder(width, latents, se.TopK(K), contiguous_parameters=row_major)
    x = torch.randn(tokens, width)
    steps = []

    def run():
        step = TrainStep(sae, lr=1e-3, memory_budget=budget, losses=AuxK(k_aux) if k_aux else (), **options)
        for _ in range(2):  # the second with all state in place
            if k_aux:
                step.dead.since_fired.fill_(step.dead.dead_after)[::8] = 0
                step.dead.tokens = step.dead.dead_after
            step(x)
        steps.append(step)

    measured = allocated_by(run).peak
    state = steps[0].optimizer.state.values()
    apart = sum(t.numel() * t.element_size() for tensors in state for t in tensors.values())
    stored = "grad_clip" in options
    apart += sum(p.numel() * p.element_size() for p in sae.parameters()) if stored else 0
    formula = peak_bytes(
        tokens, width, latents, K, memory_budget=budget, k_aux=k_aux, row_major=row_major, stored=stored,
        **{name: options[name] for name in ("compute_dtype", "copies", "moments") if name in options},
    )  # fmt: skip
    return measured - apart, formula


CASES = [
    pytest.param(512, 64, 1 << 14, WHOLE, {}, id="F14"),
    pytest.param(512, 64, 1 << 14, 4 * MIB, {}, id="F14-chunks"),
    pytest.param(512, 64, 1 << 15, WHOLE, {}, id="F15"),
    pytest.param(512, 64, 1 << 15, 4 * MIB, {}, id="F15-chunks"),
    pytest.param(512, 64, 1 << 16, WHOLE, {}, id="F16"),
    pytest.param(512, 64, 1 << 16, 8 * MIB, {}, id="F16-chunks"),
    pytest.param(512, 64, 1 << 17, 8 * MIB, {}, id="F17-chunks"),
    pytest.param(512, 128, 1 << 15, 8 * MIB, {}, id="wide"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"row_major": True}, id="row-major"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"k_aux": 32}, id="AuxK"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"compute_dtype": torch.bfloat16}, id="bf16"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"compute_dtype": torch.bfloat16, "copies": False}, id="bf16-no-copies"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"moments": torch.bfloat16}, id="moments"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"moments": torch.bfloat16, "grad_clip": 1.0}, id="moments-stored"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"grad_clip": 1.0}, id="stored"),
    pytest.param(512, 64, 1 << 15, 8 * MIB, {"grad_clip": 1.0, "row_major": True}, id="stored-row-major"),
]


@pytest.mark.parametrize(("tokens", "width", "latents", "budget", "options"), CASES)
def test_peak_memory_is_within_the_formula(tokens, width, latents, budget, options):
    measured, formula = needed(tokens, width, latents, budget, **options)
    assert measured <= formula
    x = torch.empty(tokens, width)
    if "grad_clip" not in options or not by_onednn(x, x.T):  # else encoding counts, before any is stored
        assert measured > 0.75 * formula  # a bound that says something


STATES = {
    "as it comes": {}, "16-bit": {"compute_dtype": "bfloat16"},
    "narrow moments": {"compute_dtype": "bfloat16", "moments": "bfloat16"},
    "no copies": {"compute_dtype": "bfloat16", "moments": "bfloat16", "copies": False},
    "fp64": {"dtype": torch.float64, "compute_dtype": "float32"},
}  # fmt: skip


@pytest.mark.parametrize("options", STATES)
def test_what_a_step_keeps_is_what_the_formula_says(options):
    """Of what two steps leave in memory, without the parameters: moments, copies, and what is counted apart."""
    options = dict(STATES[options])
    dtype = options.pop("dtype", torch.float32)
    sae = se.SparseAutoencoder(24, 256, se.TopK(4), d_out=16, dtype=dtype)
    sae._lay_out_by_latent()  # which a step does once
    said = state_bytes(24, 256, d_out=16, dtype=dtype, **options)
    assert said.parameters == sum(p.numel() * p.element_size() for p in sae.parameters())
    x, target, steps = torch.randn(8, 24), torch.randn(8, 16), []

    def run():
        steps.append(TrainStep(sae, lr=1e-3, memory_budget=WHOLE, **options))
        for _ in range(2):
            steps[0](x, target)

    kept = allocated_by(run).kept
    buffer = steps[0]._pre_activations._memory._memory
    apart = (8 + 4) * 256 + (0 if buffer is None else buffer.numel() * buffer.element_size())  # dead counters, firing
    assert said.moments + said.copies <= kept - apart <= said.moments + said.copies + 200  # and scalars
    assert said.kept == said.parameters + said.moments + said.copies


def test_a_million_latents_of_4096_fit_80_gb():
    sizes, narrow = dict(d_in=4096, d_sae=1 << 20), dict(compute_dtype="bfloat16", moments="bfloat16")
    weights = 2 * 4096 << 20
    for options, kept, moved in (
        ({"compute_dtype": "bfloat16"}, 14, 26), (narrow, 10, 18), (narrow | {"copies": False}, 8, 16),
    ):  # fmt: skip
        found = state_bytes(**sizes, **options)
        assert found.kept == pytest.approx(kept * weights, rel=1e-3)
        assert found.moved == pytest.approx(moved * weights, rel=1e-3)
    assert state_bytes(**sizes, **narrow, copies=False).kept < 69e9 < 80e9 < state_bytes(**sizes, **narrow).kept


def test_chunks_bound_the_pre_activations():
    """Eight times the budget's worth of tokens needs no more of them: no B x F, whatever B."""
    few, _ = needed(128, 64, 1 << 15, 8 * MIB)
    many, _ = needed(1024, 64, 1 << 15, 8 * MIB)
    per_entry = 4 * 12 * 896 * K + 4 * 2 * 896 * 64  # 12 words an entry, x and the gradient at the output
    merging = 4 * 32 * K * 512  # groups of 32 that a piece of 512 rows of a slab looks at, less the few's
    assert many - few < per_entry + merging < 896 * (1 << 15) * 4 / 8


def test_nothing_stays_but_the_step_itself():
    """What a step leaves behind is its state: no cycle keeps a batch's tensors until Python looks for cycles."""
    sae = se.SparseAutoencoder(16, 512, se.TopK(4))
    step = TrainStep(sae, lr=1e-3, losses=AuxK(8))
    step.dead.since_fired[::3] = step.dead.tokens = step.dead.dead_after
    x = torch.randn(64, 16)
    step(x)
    kept = allocated_by(lambda: step(x)).kept
    assert kept - step.seen.fired.nbytes < 64  # scalars of the report and of the learning rate


def test_the_largest_published_size():
    """F = 2^20, d = 768, B = 4096: 16 GiB of pre-activations whole, 2 GiB of them in chunks, and little else."""
    sizes = dict(tokens=4096, d_in=768, d_sae=1 << 20, k=32)
    buffer, GIB = 2 << 30, 1 << 30
    in_chunks = peak_bytes(**sizes, memory_budget=buffer)
    assert buffer < in_chunks < buffer + GIB / 8
    copies = 2 * 768 * (1 << 20) * 2  # bf16
    narrow = peak_bytes(**sizes, memory_budget=buffer, compute_dtype=torch.bfloat16, device_type="cuda")
    assert buffer + copies < narrow < buffer + copies + GIB / 2
    assert peak_bytes(**sizes, memory_budget=WHOLE) > 16 * GIB


NARROW = {"compute_dtype": "bfloat16", "moments": "bfloat16", "copies": False}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # to see that nobody wrote parameters
@pytest.mark.parametrize(("width", "gigabytes"), [(4096, 69 * 1.02), (768, 14)])
def test_a_million_latents_fit(width, gigabytes):
    """F = 2^20, B = 32,768: parameters, moments, the batch and all that a step needs, on a card of 80 GB."""
    tokens, latents = 32_768, 1 << 20
    with fake_memory.Living() as memory:
        step = TrainStep(se.SparseAutoencoder(width, latents, se.TopK(K)), lr=1e-3, memory_budget=2**28, **NARROW)
        x = torch.randn(tokens, width, dtype=torch.bfloat16)
        kept, memory.peak = memory.now, memory.now
        for _ in range(2):
            step(x)
    state = state_bytes(width, latents, **NARROW)
    counters = 9 * latents + 2**20  # of the dead, on the way; and scalars
    assert state.kept <= kept - x.numel() * 2 <= state.kept + counters
    assert memory.peak <= gigabytes * 1e9
    formula = {budget: peak_bytes(tokens, width, latents, K, memory_budget=budget, device_type="cuda", **NARROW)
               for budget in (2**25, 2**28)}  # fmt: skip
    assert memory.peak - kept <= formula[2**28]
    assert state.kept + formula[2**25] <= gigabytes * 1e9


def test_allocations_are_measured_exactly():
    def call():
        first = torch.zeros(1000, dtype=torch.float64)  # 8,000
        second = first + first  # 16,000 together
        del first
        return second.float()  # 12,000 together

    found = allocated_by(call)
    assert found == (16_000, 0)
    held = []
    assert allocated_by(lambda: held.append(torch.zeros(250))) == (1_000, 1_000)
    numbers = torch.randn(1000)
    assert allocated_by(lambda: numbers.logsumexp(0)).peak >= 4_000  # inside operators too: the result is 4 bytes


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="memory_budget"):
        peak_bytes(8, 4, 16, 2, memory_budget=0)


@pytest.mark.gpu
def test_the_largest_published_size_on_a_gpu():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    budget = 2 << 30
    sae = se.SparseAutoencoder(768, 1 << 20, se.TopK(K), device="cuda")
    step = TrainStep(sae, lr=1e-3, memory_budget=budget, compute_dtype=torch.bfloat16)
    # The workspaces of cuBLAS, 32 MiB on an H100, are a process's and not a step's: the first products make them.
    small = se.SparseAutoencoder(768, 1 << 12, se.TopK(K), device="cuda")
    TrainStep(small, lr=1e-3, compute_dtype=torch.bfloat16)(torch.randn(64, 768, device="cuda"))
    del small
    before = torch.cuda.memory_allocated()  # parameters and moments
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(4096, 768, device="cuda")
    for _ in range(2):
        step(x)
    measured = torch.cuda.max_memory_allocated() - before - x.numel() * x.element_size()
    formula = peak_bytes(
        4096, 768, 1 << 20, K, memory_budget=budget, compute_dtype=torch.bfloat16, device_type="cuda"
    )
    assert measured <= formula


FAULTS = """
import resource
import torch
from sae_engine import SparseAutoencoder, TopK
from sae_engine.training import TrainStep

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
step, x = TrainStep(SparseAutoencoder(256, 2048, TopK(8)), lr=1e-3), torch.randn(2048, 256)
for _ in range(5):
    step(x)
rounds = []
for _ in range(3):  # the heap may still grow once; what it takes anew each time, it takes in all of them
    before = faults()
    for _ in range(4):
        step(x)
    rounds.append(faults() - before)
print(min(rounds))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_what_a_step_frees_serves_the_next():
    """A step that got its temporaries from the system took 3,500 page faults at this size, a tenth of its time."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500


def test_the_documentation_has_the_tables_of_wide_dictionaries():
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    for table in (wide.sizes(), wide.cards()):
        first = page.index(table[0])
        assert page[first : first + len(table)] == table
