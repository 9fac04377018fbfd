"""A binary that was found once is launched directly, and another where dtype or alignment differ."""

import copy

import pytest
import torch
from triton.runtime.jit import JITFunction

import ptx_emulator
import sae_engine as se
from sae_engine import functional
from sae_engine.training import TrainStep
from sae_kernels.device import _launch

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True, scope="module")
def _emulator():
    with ptx_emulator.installed(arch=80, seed=1):
        yield


@pytest.fixture
def asked(monkeypatch):
    """The kernels for which Triton was asked for a binary."""
    names, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    _launch.forget_plans()
    return names


def topk(pre, backend):
    return functional.topk(pre, 5, backend=backend)


def batch_topk(pre, backend):
    return functional.batch_topk(pre, 3.5, backend=backend)


def threshold(pre, backend):
    return functional.threshold(pre, torch.full((pre.shape[1],), 0.5), backend=backend)  # its size follows the data


@pytest.mark.parametrize("operation", [topk, batch_topk, threshold])
def test_triton_is_asked_once_for_each_binary(operation, asked):
    memory = torch.randn(3 * 97 + 1)
    for _ in range(3):
        memory.normal_()
        for start in (0, 1):  # addresses that are multiples of 16, and not
            pre = memory[start : start + 3 * 97].view(3, 97)
            ours, meant = operation(pre, "triton"), operation(pre, "reference")
            for name in ("values", "indices", "offsets"):
                assert torch.equal(getattr(ours, name), getattr(meant, name)), name
    first = len(asked)
    # once for either alignment, and a kernel that reads scratch alone once
    assert first and max(map(asked.count, asked)) <= 2, asked
    operation(memory[:-1].view(3, 97), "triton")
    assert len(asked) == first


def test_a_training_step_asks_once_and_trains_as_the_reference_does(asked):
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(24, 80, se.TopK(4))
    twin = copy.deepcopy(sae)
    ours, meant = (TrainStep(s, lr=1e-2, dense=False, backend=b) for s, b in ((sae, "triton"), (twin, "reference")))
    number = []
    for _ in range(3):
        x = torch.randn(40, 24)
        torch.testing.assert_close(ours(x), meant(x), rtol=1e-4, atol=1e-5)
        number.append(len(asked))
    assert "_latents_kernel" in asked and number[0] == number[2], asked
    for p, q in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
