"""What the host does for one call: the kernels that it launches, and the stock operators between them."""

import copy

import kernel_report
import pytest
import torch
from played_cuda import never_arrives
from torch import Tensor

import sae_engine as se
from sae_engine import functional
from sae_engine.losses import AuxK
from sae_engine.training import TrainStep
from sae_kernels.device import _launch
from sae_kernels.ops import ops

B, D, F, K = 4096, 768, 32768, 32


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def counted(monkeypatch):
    """Launches that are made on meta tensors and not run, and what else would launch a kernel on a GPU."""
    launched: list[str] = []
    monkeypatch.setattr(_launch.Launch, "__call__", lambda self, *_, **__: launched.append(self.kernel.__name__))
    monkeypatch.setattr("sae_engine.training.backward._sent", never_arrives)
    with kernel_report._as_if_on_a_gpu() as stock, torch.no_grad():
        yield launched, stock.torch_kernels


# Launches of ours and stock operators of one call. More of either is host time: raise a number only with its reason.
CALLS = {
    "topk": (lambda: functional.topk(meta(B, F), K), 1, 1),
    "topk of few rows": (lambda: functional.topk(meta(17, F), K), 2, 1),
    "batch_topk": (lambda: functional.batch_topk(meta(B, F), K), 5, 0),
    "batch_topk, fp32": (lambda: functional.batch_topk(meta(B, F, dtype=torch.float32), K), 6, 0),
    "norm_match": (lambda: functional.norm_match(meta(B, F), meta(B, dtype=torch.float32), capacity=B * K), 2, 1),
    "energy_share": (lambda: functional.energy_share(meta(B, F), 0.9, capacity=B * K), 2, 2),  # and fills in the shares
    "threshold": (lambda: functional.threshold(meta(B, F), meta(F, dtype=torch.float32), capacity=B * K), 2, 1),
    "feature_topm": (
        lambda: functional.feature_topm(meta(B, F), meta(F, dtype=torch.int32), total=B * K), 3, 9),
    "decode": (lambda: functional.decode(codes(), meta(F, D)), 2, 0),
    "sparse_mlp": (lambda: functional.sparse_mlp(meta(8, D), meta(8, F), meta(F, D), meta(F, D), None, meta(D)), 4, 0),
    "to_dense": (lambda: codes().to_dense(), 1, 1),
    "by_latent": (lambda: codes().by_latent, 1, 6),
    "value gradients": (
        lambda: ops.decode_backward_values(meta(B, D), *arrays(), meta(F, D), "triton"), 1, 1),
    "16-bit product": (lambda: functional.linear(meta(B, D), meta(D, F), meta(F, dtype=torch.float32)), 1, 2),
    "16-bit product of few rows": (
        lambda: functional.linear(meta(128, D), meta(D, F), meta(F, dtype=torch.float32)), 0, 2),
}  # fmt: skip


def arrays() -> tuple[Tensor, Tensor, Tensor]:
    return meta(B * K), meta(B * K, dtype=torch.int32), meta(B + 1, dtype=torch.int64)


def codes() -> se.SparseCodes:
    return se.SparseCodes(*arrays(), (B,), F, K)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_launches_no_more_than_it_did(name, counted):
    call, kernels, operators = CALLS[name]
    launched, stock = counted
    call()
    assert (len(launched), len(stock)) == (kernels, operators), (launched, stock)


# The same of a training step in bf16, which is one step of the optimizer as well. 13 to 17 of the operators find out
# whether the batch was finite, and leave its update out.
STEPS = {
    "TopK": (se.TopK(K), {}, 8, 66),
    "BatchTopK": (se.BatchTopK(K), {}, 12, 79),
    "TopK and AuxK": (se.TopK(K), {"losses": AuxK()}, 13, 96),
    "TopK, stored gradients": (se.TopK(K), {"grad_clip": 1.0}, 7, 89),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_launches_no_more_than_it_did(name, counted):
    rule, options, kernels, operators = STEPS[name]
    launched, stock = counted
    with torch.device("meta"):
        sae = se.SparseAutoencoder(D, F, copy.deepcopy(rule))
    step, x = TrainStep(sae, lr=1e-3, compute_dtype=torch.bfloat16, **options), meta(B, D, dtype=torch.float32)
    step.warm_up(x)
    launched.clear(), stock.clear()
    step.warm_up(x)  # with all that a step can contain
    assert (len(launched), len(stock)) == (kernels, operators), (launched, stock)


def test_a_training_step_makes_its_plans_once(counted, monkeypatch):
    made = []
    plan = _launch.Launch.__init__
    monkeypatch.setattr(_launch.Launch, "__init__", lambda self, *a, **k: (made.append(1), plan(self, *a, **k))[0])
    _launch.forget_plans()
    with torch.device("meta"):
        sae = se.SparseAutoencoder(D, F, se.TopK(K))
    step = TrainStep(sae, lr=1e-3, compute_dtype=torch.bfloat16)
    step(meta(B, D))
    assert len(made) == len(counted[0])
    for _ in range(2):
        step(meta(B, D))
    assert len(made) == len(counted[0]) / 3


def test_a_plan_is_made_once_for_each_layout(counted, monkeypatch):
    made = []
    plan = _launch.Launch.__init__
    monkeypatch.setattr(_launch.Launch, "__init__", lambda self, *a, **k: (made.append(1), plan(self, *a, **k))[0])
    _launch.forget_plans()
    for matrix in (meta(B, F), meta(F, B).T):
        functional.batch_topk(matrix, K)
        first = len(made)
        functional.batch_topk(matrix.clone(memory_format=torch.preserve_format), K)
        assert len(made) == first > 0
    assert first == 10, "another layout has its own plan"


def test_plans_follow_what_tests_change(counted, monkeypatch):
    from sae_kernels.device import _tuning

    launched, _ = counted
    functional.topk(meta(B, F), K)
    monkeypatch.setattr(_tuning, "SPLIT_ROWS", B + 1)
    functional.topk(meta(B, F), K)
    assert len(launched) == 1 + 2
