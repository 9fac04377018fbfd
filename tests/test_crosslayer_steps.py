"""The benchmark of cross-layer steps: what is timed does the same work, and what does not is noticed."""
import crosslayer
import pytest
import torch

SIZE = (3, 24, 64, 4, 16, 0)  # layers, d, F, k, tokens


def test_an_update_is_that_of_the_dense_form():
    assert crosslayer.checked(SIZE, "cpu", "torch") < 1e-5


def test_another_update_is_noticed(monkeypatch):
    dense = crosslayer.dense

    def detached(coder, x, k, *, by_pair):
        return dense(coder, x, k, by_pair=by_pair) + 1e-3 * coder.b_dec

    monkeypatch.setattr(crosslayer, "dense", detached)
    with pytest.raises(RuntimeError, match="differs from the dense one"):
        crosslayer.checked(SIZE, "cpu", "torch")


def test_variants_of_a_gpu_begin_with_the_same_loss(monkeypatch):
    monkeypatch.setitem(crosslayer.GPU_SIZES, "tiny", (3, 32, 128, 4, 64, 0))
    losses = {name: float(make()()) for name, make in crosslayer.variants("tiny", "cpu").items()
              if name != crosslayer.COMPILED}  # fmt: skip
    assert len(losses) == 4
    for loss in losses.values():
        assert abs(loss - losses[crosslayer.DENSE]) < 1e-3 * losses[crosslayer.DENSE]


@pytest.mark.parametrize("name", crosslayer.SIZES)
def test_steps_of_a_cpu_begin_with_the_same_loss(name, monkeypatch):
    layers, _, _, _, _, factor = crosslayer.SIZES[name]
    monkeypatch.setitem(crosslayer.SIZES, name, (layers, 16, 64, 4, 24, factor))
    torch.manual_seed(0)
    crosslayer.check(crosslayer.calls_of(name))
