"""kernels/dispatch.py: which calls leave PyTorch's dispatcher out, and that all others do not."""
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kernels import dispatch
from sae_kernels.ops import ops


@pytest.fixture
def path(monkeypatch):
    """Calls ``run`` and returns how the operator in it was called: "direct" or "dispatched"."""
    taken = []
    straight = dispatch._goes_straight
    monkeypatch.setattr(dispatch, "_goes_straight", lambda args: taken.append(straight(args)) or taken[-1])

    def of(run):
        taken.clear()
        run()
        return "direct" if taken == [True] else "dispatched"

    return of


def gathered(dense=None):
    dense = torch.arange(6.0).view(2, 3) if dense is None else dense
    return ops.gather(dense, torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 1, 2]), "torch")


def test_an_eager_call_without_a_gradient_is_direct(path):
    assert path(gathered) == "direct"
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    with torch.no_grad():
        assert path(lambda: gathered(parameter)) == "direct"
    assert gathered().tolist() == [1.0, 5.0]
    assert gathered().tolist() == ops.gather.default(
        torch.arange(6.0).view(2, 3), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 1, 2]), "torch"
    ).tolist()  # fmt: skip


def test_gradients_are_recorded(path):
    dense = torch.ones(2, 3, requires_grad=True)
    assert path(lambda: gathered(dense)) == "dispatched"
    gathered(dense).sum().backward()
    assert dense.grad is not None and dense.grad.tolist() == [[0, 1, 0], [0, 0, 1]]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_observers_see_the_operator(path):
    with Seen() as seen:
        assert path(gathered) == "dispatched"
    assert "sae_engine.gather.default" in seen.names
    with torch.profiler.profile() as profile:
        gathered()
    assert any(event.name == "sae_engine::gather" for event in profile.events())

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Functions():
        assert path(gathered) == "dispatched"


def test_transforms_and_other_kinds_of_tensors_are_dispatched(path):
    meta = torch.ones(2, 3, device="meta")
    args = meta, torch.zeros(2, dtype=torch.int32, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    assert ops.gather(*args, "torch").shape == (2,)
    assert path(lambda: ops.gather(*args, "torch")) == "dispatched"

    class Own(torch.Tensor):
        pass

    assert path(lambda: gathered(torch.ones(2, 3).as_subclass(Own))) == "dispatched"


def test_what_is_compiled_holds_the_operator():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    found = torch.compile(gathered, backend=keep, fullgraph=True)()
    assert found.tolist() == [1.0, 5.0]
    assert "sae_engine.gather" in graphs[0].code


def test_operators_that_write_keep_their_versions():
    threshold = torch.tensor(-1.0)
    before = threshold._version
    ops.move_threshold(threshold, torch.tensor(2.0), 0.1)
    assert threshold == 2 and threshold._version > before
