"""Where b_dec starts, and losses that grow."""
import threading

import pytest
import torch

import sae_engine as se
from sae_engine import initial
from sae_engine.initial import geometric_median
from sae_engine.losses.pre_activation import PreActivation
from sae_engine.losses.warmed import Warmed


def distances(x, point):
    return (x.double() - point.double()).norm(dim=1).sum()


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_point_beside_the_geometric_median_is_nearer(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 6, generator=generator).mul(torch.linspace(0.1, 3, 6)).to(dtype)
    x[0] *= 1000
    median = geometric_median(x)
    assert median.dtype == torch.promote_types(dtype, torch.float32)
    best = distances(x, median)
    for scale in (1e-3, 1e-1, 10):
        beside = median + scale * torch.randn(200, 6, generator=generator)
        assert min(distances(x, point) for point in beside) >= best * (1 - 1e-6)
    assert best <= distances(x, x.float().mean(0)) * (1 + 1e-6)


def test_of_equal_rows_it_is_that_row():
    assert torch.equal(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_of_split_rows_it_is_that_of_all():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    parts = x.split(20)
    barrier, shared, found = threading.Barrier(len(parts)), [None] * len(parts), [None] * len(parts)

    def reduce_of(number):
        def reduce(tensor):
            shared[number] = tensor.clone()
            barrier.wait()
            total = torch.stack(shared).sum(0)
            barrier.wait()
            tensor.copy_(total)

        return reduce

    def work(number):
        found[number] = geometric_median(parts[number], reduce_of(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(point, found[0]) for point in found)
    torch.testing.assert_close(found[0], geometric_median(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [torch.ones(0, 3), torch.ones(3), torch.ones(2, 3, dtype=torch.int64)])
def test_what_has_no_median_is_refused(x):
    with pytest.raises((TypeError, ValueError), match=r"^x must"):
        geometric_median(x)


@pytest.mark.parametrize("make", [
    lambda: (se.ReLU(), se.losses.L1(2.0)),
    lambda: (se.Gated(32), se.losses.GateLoss(0.5)),
    lambda: (se.JumpReLU(32, threshold=0.1, bandwidth=0.5), se.losses.StepL0(0.3)),
    lambda: (se.JumpReLU(32, threshold=0.9, bandwidth=0.5), PreActivation(0.3), se.losses.StepL0(0.0)),
    lambda: (se.TopK(3), se.losses.MultiTopK()),
], ids=["L1", "gate", "step", "pre-activation", "multi"])  # fmt: skip
def test_a_warmed_loss_is_the_loss_times_its_factor(make):
    """In a training step and under autograd: as the same loss with a smaller coefficient, or by gradients scaled."""
    gradients = {}
    for way in ("step", "autograd"):
        torch.manual_seed(0)
        rule, loss, *others = make()
        sae = se.SparseAutoencoder(8, 32, rule, dtype=torch.float64)
        x = torch.randn(16, 8, dtype=torch.float64)
        warmed = Warmed(loss)
        warmed.set(0.25)
        if way == "autograd":
            se.losses.evaluate(sae, x, [warmed, *others])["loss"].backward()
            gradients[way] = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
            continue
        before = {n: p.detach().clone() for n, p in sae.named_parameters()}
        # After one step of Adam from zero moments, the first moment is (1 - beta1) times the gradient.
        step = se.training.TrainStep(sae, lr=1e-3, losses=[warmed, *others], normalize_decoder=False)
        step(x)
        gradients[way] = {
            n: step.optimizer.state[p]["exp_avg"] / 0.1 for n, p in sae.named_parameters() if p in step.optimizer.state
        }
        assert any(not torch.equal(before[n], p) for n, p in sae.named_parameters())
    for name, expected in gradients["autograd"].items():
        tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-6  # a rule's own parameters are fp32
        torch.testing.assert_close(gradients["step"][name], expected, rtol=tolerance, atol=tolerance)


def test_only_a_loss_can_be_warmed():
    with pytest.raises(TypeError, match="loss must be a Loss"):
        Warmed(2.0)


@pytest.mark.parametrize("make", [
    lambda rule: se.SparseAutoencoder(8, 60, rule(), dtype=torch.float64),
    lambda rule: se.SparseAutoencoder(8, 60, rule(), normalize_activations="layer_norm"),
    lambda rule: se.Crosscoder.clt(3, 8, 60, [rule(), rule(), rule()]),
], ids=["centred", "layer norm", "clt"])  # fmt: skip
@pytest.mark.parametrize("rule", [lambda: se.JumpReLU(60, threshold=0.3), lambda: se.LogJumpReLU(60, threshold=0.2)])
def test_latents_fire_on_the_share_of_rows_that_is_asked_for(make, rule, monkeypatch):
    monkeypatch.setattr(initial, "MOST_NUMBERS", 400 * 7)  # some latents at a time
    torch.manual_seed(0)
    sae = make(rule)
    with torch.no_grad():
        sae.b_dec.normal_()
    x = torch.randn(400, sae.d_in, dtype=sae.b_dec.dtype) * 3 + 1
    assert se.init_firing(sae, x, 6) is sae
    fires = sae.encode(x).to_dense() != 0
    assert torch.equal(fires.sum(-2), torch.full_like(fires.sum(-2), 40))  # a tenth of the rows


def test_latents_fire_at_first_on_one_row_at_least_and_rows_may_be_many(monkeypatch):
    sae, x = se.SparseAutoencoder(8, 60, se.JumpReLU(60)), torch.randn(101, 8)
    assert torch.equal((se.init_firing(sae, x[:20], 1).encode(x[:20]).to_dense() != 0).sum(0), torch.ones(60).long())
    monkeypatch.setattr(initial, "MOST_ROWS", 50)  # 34 of them, every third
    assert torch.equal((se.init_firing(sae, x, 30).encode(x[::3]).to_dense() != 0).sum(0), torch.full((60,), 17))


@pytest.mark.parametrize(("sae", "x", "l0", "match"), [
    (torch.nn.Linear(8, 60), torch.randn(9, 8), 4, "sae must be a SparseAutoencoder"),
    (se.TopK(2), torch.randn(9, 8), 4, "sae must have a JumpReLU"),
    (se.JumpReLU(60), torch.randn(1, 8), 4, "x must have at least two rows"),
    (se.JumpReLU(60), torch.randn(9, 7), 4, "x must have d_in = 8"), (se.JumpReLU(60), torch.randn(9, 8), 60, "l0"),
    (se.JumpReLU(60), torch.randn(9, 8), 0, "l0"), (se.JumpReLU(60), torch.ones(9, 8).long(), 4, "x must"),
], ids=["module", "rule", "rows", "width", "many", "none", "ints"])  # fmt: skip
def test_what_cannot_be_set_to_fire_is_refused(sae, x, l0, match):
    sae = se.SparseAutoencoder(8, 60, sae) if isinstance(sae, se.Activation) else sae
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=match):
        se.init_firing(sae, x, l0)
    assert all(torch.equal(before[name], t) for name, t in sae.state_dict().items())
