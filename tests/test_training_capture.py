"""TrainStep without waiting for the device: what a captured CUDA graph may rely on, and captured steps themselves."""

import copy

import pytest
import torch
from training_cases import B, D, F, assert_parameters_close, make

import sae_engine as se
from sae_engine.losses import AuxK
from sae_engine.testing import assert_same
from sae_engine.training import CapturedStep, TrainConfig, TrainStep
from sae_engine.training.architectures import BatchTopKSAE, TopKSAE
from sae_engine.training.config_parts import DataConfig, EvalConfig, LoggerConfig, OptimConfig, OutputConfig
from sae_engine.training.sae_config import SAEConfig


def test_a_loaded_state_is_written_where_a_captured_graph_looks():
    """Moments, counters, learning rate and 16-bit copies stay the tensors that they were."""

    def build():
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        return sae, TrainStep(sae, lr=1e-2, dead_after=30, compute_dtype=torch.bfloat16)

    def places(sae, step):
        moments = [t for p in sae.parameters() for t in step.optimizer.state[p].values()]
        return [step.optimizer.options["lr"], step.dead.since_fired, *moments, *step._copies.current()[0]]

    batches = torch.randn(5, B, D)
    sae, step = build()
    for x in batches[:2]:
        step(x)
    step.optimizer.options["lr"].fill_(5e-3)
    weights, state = copy.deepcopy(sae.state_dict()), copy.deepcopy(step.state_dict())
    expected = [step(x)["loss"] for x in batches[2:4]]
    other, second = build()
    second(batches[4])
    before = places(other, second)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    after = places(other, second)
    assert all(a is b for a, b in zip(before, after, strict=True))
    for copied, master in zip(after[-2:], (other.W_dec, other.W_enc.T), strict=True):
        assert torch.equal(copied, master.bfloat16())
    assert second.optimizer.options["lr"].item() == torch.tensor(5e-3).item()
    assert_same(tuple(second(x)["loss"] for x in batches[2:4]), tuple(expected))


def test_copies_are_renewed_in_place_after_somebody_wrote_the_weights():
    sae = make(se.TopK(4), dtype=torch.float32)
    step = TrainStep(sae, lr=1e-2, compute_dtype=torch.bfloat16)
    step(torch.randn(B, D))
    held = step._copies.weights
    with torch.no_grad():
        sae.W_dec.mul_(2)
    step.refresh()
    assert step._copies.weights is held and torch.equal(held[0].decoder, sae.W_dec.bfloat16())


def test_a_warm_up_is_a_step_that_also_makes_the_auxiliary_selection():
    """Nothing is dead yet: an ordinary step leaves AuxK out, and a capture, which cannot know, does not."""
    batches = torch.randn(3, B, D)
    (plain, ordinary), (warm, warming) = ((sae, TrainStep(sae, lr=1e-2, losses=[AuxK(5)])) for sae in
                                          (make(se.TopK(4), dtype=torch.float32) for _ in range(2)))  # fmt: skip
    seen = []
    rule = AuxK.rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AuxK, "rule", lambda aux, sae, dead: seen.append(dead) or rule(aux, sae, dead))
        for x in batches:
            expected, found = ordinary(x), warming.warm_up(x)
            assert expected.keys() == found.keys()
            torch.testing.assert_close(found["loss"], expected["loss"])
    assert seen == [0, F] * 3
    assert_parameters_close(plain, warm)
    warming(batches[0])
    with pytest.raises(ValueError, match="d_in"):
        warming.warm_up(torch.randn(B, D + 1))
    assert not warming._warming_up


def test_a_capture_is_remembered_until_a_state_is_loaded(monkeypatch):
    """The host hears of no replay: afterwards it neither asks the device each time nor trusts an old answer."""
    dead = se.training.DeadLatents(8, dead_after=100)
    assert dead.at_most(10) == 0
    state = dead.state_dict()
    monkeypatch.setattr("sae_engine.training.backward.capturing", lambda tensor: True)
    assert dead.at_most(10) == 8
    monkeypatch.setattr("sae_engine.training.backward.capturing", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: pytest.fail("the device was read"))
    assert dead.at_most(10) == 8
    replayed = dead.state_dict()
    dead.load_state_dict(state)
    assert dead.at_most(10) == 0
    monkeypatch.undo()
    replayed["since_fired"].fill_(100)  # by replays, of which the host has counted none
    dead.load_state_dict(replayed)
    assert dead.at_most(10) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [lambda: se.TopK(4), lambda: se.BatchTopK(3.5), lambda: se.TopAFA(capacity=B * F)],
                         ids=["TopK", "BatchTopK", "TopAFA"])  # fmt: skip
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])
def test_nothing_waits_for_the_device(rule, dense, no_waiting):
    sae = make(rule(), dtype=torch.float32)
    step = TrainStep(sae, lr=1e-3, losses=[AuxK(5)], compute_dtype=torch.bfloat16, dense=dense)
    x = torch.randn(B, D)
    step.warm_up(x)  # compiles, reads the free memory and, with a capacity, the density
    with no_waiting():
        step(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dead_after", [10_000_000, 5 * B])
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "FeatureChoice"])
def test_a_captured_step_trains_as_the_step_does(rule, dead_after):
    """Also a batch of another shape on the way, weights that somebody else writes, a schedule, and latents that die."""
    rules = {
        "TopK": lambda: se.TopK(4), "BatchTopK": lambda: se.BatchTopK(4),
        "FeatureChoice": lambda: se.FeatureChoice(F, 3, mutual_steps=2),
    }  # fmt: skip
    saes = [make(rules[rule](), dtype=torch.float32) for _ in range(2)]
    steps = [
        TrainStep(sae, lr=1e-2, losses=[AuxK(5)], compute_dtype=torch.bfloat16, density_interval=3,
                  dead_after=dead_after,
                  scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        for sae in saes
    ]  # fmt: skip
    captured = CapturedStep(steps[1])
    for number, rows in enumerate([B] * 6 + [B // 2] + [B] * 4):
        x = torch.randn(rows, D)
        expected, report = steps[0].warm_up(x), captured(x)
        for name, scalar in expected.items():
            torch.testing.assert_close(report[name], scalar, msg=f"{name}, call {number}")
        assert_same((steps[1].seen.fired,), (steps[0].seen.fired,))
        if number == 7:
            with torch.no_grad():
                for sae in saes:
                    sae.W_enc.mul_(1.01)
    assert steps[0].calls == steps[1].calls == 11 and steps[0].dead.tokens == steps[1].dead.tokens
    dies = dead_after < 100 and rule != "FeatureChoice"  # under which every latent fires on every batch
    assert captured._graphs.keys() == ({False, True} if dies else {False})
    assert_parameters_close(*saes)
    lrs = [float(step.optimizer.param_groups[0]["lr"]) for step in steps]
    assert lrs[0] == lrs[1] < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", [TopKSAE(k=4), BatchTopKSAE(k=4)], ids=["TopK", "BatchTopK"])
def test_a_run_replays_steps_and_resumes_with_the_same_numbers(architecture, tmp_path):
    """Two autoencoders in turn, latents that die, a resume in the middle; and the run whose steps are not replayed."""
    rows = torch.randn(400, D)

    def config(name, **optim):
        entries = [SAEConfig(name=f"seed{seed}", hook_name="model.rows", d_sae=F, aux_k=4, architecture=architecture,
                             seed=seed) for seed in (0, 1)]  # fmt: skip
        return TrainConfig(
            saes=entries, data=DataConfig(training_tokens=12 * 40), device="cuda", logger=LoggerConfig(progress=False),
            optim=OptimConfig(train_batch_size_tokens=40, dead_after=160, lr=1e-2, **optim),
            eval=EvalConfig(eval_tokens=0),
            output=OutputConfig(output_path=str(tmp_path / name), save_steps=6),
        )  # fmt: skip

    class Stop(se.training.Callback):
        def on_update(self, trainer):
            if trainer.update == 7:
                trainer._asked = 2

    def state(run):
        return [t for sae in run.saes().values() for t in sae.state_dict().values()]

    plain = se.training.Trainer(config("plain"), dataset=rows)
    replayed = se.training.Trainer(config("replayed", cuda_graphs=True), dataset=rows)
    runs = [trainer.train() for trainer in (plain, replayed)]
    graphs = [trainee._call._graphs.keys() for trainee in replayed.trainees.values()]
    assert graphs == [{False, True}] * 2
    torch.testing.assert_close(state(runs[1]), state(runs[0]))
    with pytest.raises(se.training.Interrupted):
        se.train(config("stopped", cuda_graphs=True), dataset=rows, callbacks=[Stop()])
    resumed = se.training.resume(tmp_path / "stopped", dataset=rows)
    torch.testing.assert_close(state(resumed), state(runs[1]))


def test_what_cannot_be_captured_is_refused():
    sae = se.SparseAutoencoder(D, F, se.TopK(4), device="cpu")
    with pytest.raises(ValueError, match="GPU"):
        CapturedStep(TrainStep(sae, lr=1e-2))
    with pytest.raises(TypeError, match="TrainStep"):
        CapturedStep(sae)
    if torch.cuda.is_available():
        sae = sae.cuda()
        with pytest.raises(ValueError, match="accumulate"):
            CapturedStep(TrainStep(sae, lr=1e-2, accumulate=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sparse"])  # codes this small would go through GEMMs
def test_a_step_in_a_cuda_graph(dense):
    saes = [make(se.TopK(4), dtype=torch.float32) for _ in range(2)]
    eager, graphed = (TrainStep(sae, lr=1e-2, losses=[AuxK(5)], dense=dense) for sae in saes)
    batches = torch.randn(6, B, D)
    for x in batches[:2]:  # compiles, and makes what lives on
        eager(x)
        graphed.warm_up(x)
    static, graph = batches[2].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        report = graphed(static)
    for x in batches[2:]:
        static.copy_(x)
        graph.replay()
        expected = eager(x)
        torch.testing.assert_close(report["loss"], expected["loss"])
    assert_parameters_close(*saes)
