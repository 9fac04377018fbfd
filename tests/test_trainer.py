"""A run from a configuration to autoencoders on the disk; killed, resumed, alone and in company."""
from __future__ import annotations

import errno
import math
import random
import shutil
import signal
from typing import Any

import killed_runs
import pytest
import torch
from killed_runs import Kill, outcome
from short_runs import SAE, settings, timeless

import sae_engine as se
from sae_engine.checkpoints.saelens import sparsity_in
from sae_engine.training import checkpoint
from sae_engine.training.callbacks import Callback, Interrupted
from sae_engine.training.metering import Densities
from sae_engine.training.run import Run
from sae_engine.training.trainer import Trainer, resume, train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Processes that a test runner starts ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("finished") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train(settings(folder))
    torch.set_num_threads(before)
    return run


def last(run: Run) -> checkpoint.Saved:
    saved, complaints = checkpoint.newest(run.folder)
    assert saved is not None and not complaints
    return saved


def assert_same(run: Run, other: Run) -> None:
    """Weights, moments, counters, cursors and metrics, bit for bit."""
    one, two = last(run), last(other)
    assert one.update == two.update
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, two.tensors[name]), name
    assert {**one.plain, "metrics_bytes": 0} == {**two.plain, "metrics_bytes": 0}
    assert timeless(run) == timeless(other)


def test_a_run_trains_and_leaves_what_it_promises(finished):
    names = {place.name for place in finished.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "report.md", "report.html", "checkpoints", "sae"} <= names
    assert "auto" not in (finished.folder / "config.yaml").read_text().replace("runs/auto", "")
    lines = timeless(finished)
    losses = [line["losses/mse_loss"] for line in lines if "losses/mse_loss" in line]
    assert [line["step"] for line in lines if "losses/mse_loss" in line] == [5, 10, 15, 20, 24]
    assert losses[-1] < losses[0]
    evaluations = [line for line in lines if "evaluation/fvu" in line]
    assert [line["step"] for line in evaluations] == [12, 24]
    assert 0 < evaluations[-1]["evaluation/fvu"] < 1 and evaluations[-1]["evaluation/l0"] == 8


def test_it_leaves_how_often_each_latent_fires_and_publishes_it(finished, tmp_path):
    (folder,) = (finished.folder / "sae").iterdir()
    shares = sparsity_in(folder)
    assert shares.shape == (128,) and float(shares.sum()) == pytest.approx(8, abs=1e-3)  # as many as each token keeps
    assert {place.name for place in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    hook = SAE["hook_name"]
    done = finished.push("me/saes", folder=tmp_path / "out", dry_run=True)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{hook}/sparsity.safetensors" in done.files and "| 8 | " in text
    assert f"rows were multiplied by {finished.saes()[folder.name].provenance.activation_scale:.6g}. That" in text
    assert torch.allclose(sparsity_in(tmp_path / "out" / hook), shares, atol=1e-9)


def test_the_folder_of_a_run_is_told_from_that_of_an_autoencoder(finished, tmp_path):
    (folder,) = (finished.folder / "sae").iterdir()
    with pytest.raises(ValueError, match=f"is the folder of a run: name one of its autoencoders: {folder}$"):
        se.SparseAutoencoder.from_pretrained(finished.folder)
    shutil.copy(finished.folder / "metrics.jsonl", tmp_path)
    with pytest.raises(ValueError, match="is the folder of a run: it has not ended and has none yet"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


def test_densities_are_of_the_last_updates():
    """Windows of 2: behind update 5 those of updates 3 to 5, without the one that was left out."""
    density, one = Densities(3, 2, torch.device("cpu")), torch.tensor([1.0, 0.0, 4.0])
    assert density.shares() is None
    for update in range(1, 6):
        skipped = torch.tensor(update == 4)
        density.add(torch.full((3,), torch.nan) if skipped else update * one, 10 * update, skipped)
    again = Densities(3, 2, torch.device("cpu"))
    again.load(density.state())
    assert again.shares().tolist() == [0.1, 0.0, 0.4] and again.counts.sum(0).tolist() == [8, 0, 32, 80]


def test_what_it_trained_takes_activations_as_the_model_has_them(finished):
    """The scale of the input is in the weights: FVU of the saved autoencoder is that of the last evaluation."""
    (sae,) = finished.saes().values()
    lm = se.data.load_language_model()
    x = torch.cat(list(se.data.stream_activations(lm, se.data.evaluation_text()[:2], site="blocks.1.hook_resid_pre",
                                                  context_length=32, max_tokens=256)))  # fmt: skip
    residual = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert residual < 1
    assert sae.provenance.model == "embedded" and sae.provenance.layer == 1 and sae.provenance.site == "resid_pre"
    assert sae.provenance.first_token == "bos" and "first" in sae.provenance.excluded
    (trained,) = [t for n, t in last(finished).tensors.items() if n.endswith("/sae/W_dec")]
    assert not torch.equal(trained, sae.W_dec)  # which is in other units


def test_a_finished_run_can_be_resumed_and_stays_what_it_was(finished):
    before = timeless(finished), last(finished)
    again = resume(finished.folder)
    after = timeless(again), last(again)
    assert before[0] == after[0] and before[1].update == after[1].update


KILLS = 7  # of one run

@pytest.fixture(scope="module")
def processes():
    return killed_runs.context()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_was_not(finished, processes, tmp_path, seed):
    """Killed after a random number of updates, or at a random place in the writing of a checkpoint, again and again."""
    draw, folder, kills = random.Random(seed), tmp_path / "run", 0
    while kills < KILLS:
        kill = Kill("update", draw.randint(1, 6)) if draw.random() < 0.4 else Kill("sync", draw.randint(1, 8))
        if outcome(processes, settings(folder), folder, kill) == "finished":
            break
        kills += 1
    assert kills >= 4
    if kills == KILLS:
        assert outcome(processes, settings(folder), folder, None) == "finished"
    assert_same(finished, Run(folder))


# --- several autoencoders -------------------------------------------------------------------------------------------

COMPANY = [
    SAE | {"name": "plain"},
    SAE | {"name": "wide", "d_sae": 256, "seed": 3},
    {"name": "batch", "hook_name": "blocks.2.hook_mlp_out", "architecture": "batchtopk", "k": 4, "d_sae": 96},
    {"name": "coder", "hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.2.hook_mlp_out",
     "architecture": "jumprelu", "d_sae": 64},
]  # fmt: skip


def trained(run: Run, name: str) -> dict[str, torch.Tensor]:
    """The parameters and moments of one autoencoder of a run."""
    return {key: t for key, t in last(run).tensors.items() if key.startswith(f"{name}/")}


def test_each_of_several_has_the_bits_that_it_has_alone(tmp_path):
    together = train(settings(tmp_path / "together", saes=COMPANY))
    for sae in COMPANY:
        name = sae["name"]
        alone = train(settings(tmp_path / name, saes=[sae]))
        mine, theirs = trained(alone, name), trained(together, name)
        assert mine.keys() == theirs.keys() and len(mine) > 8
        assert all(torch.equal(t, theirs[key]) for key, t in mine.items()), name
        lines = [
            [line[f"{prefix}{key}"] for line in run.metrics() if f"{prefix}{key}" in line]
            for run, prefix in ((alone, ""), (together, f"{name}/"))
            for key in ("losses/mse_loss", "evaluation/fvu")
        ]
        assert lines[0] == lines[2] and len(lines[0]) == 5
        assert lines[1] == lines[3] and len(lines[1]) == 2
    assert set(together.saes()) == {sae["name"] for sae in COMPANY}


# --- where rows come from --------------------------------------------------------------------------------------------


def rows(count: int = 640, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 8, generator=generator) @ torch.randn(8, width, generator=generator) + 3.0


def test_from_memory(tmp_path):
    inputs, outputs = rows(), rows(width=12)
    transcoder = {"name": "t", "hook_name": "model.a", "hook_name_out": "model.b", "architecture": "topk", "k": 4,
                  "d_sae": 32}  # fmt: skip
    run = Trainer(settings(tmp_path / "run", saes=[transcoder], data__training_tokens=64 * 60,
                           optim__lr=0.01), dataset=[inputs, outputs]).train()  # fmt: skip
    (sae,) = run.saes().values()
    error = (sae(inputs).detach() - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum()
    fvu = [1 - line["metrics/explained_variance"] for line in run.metrics()]
    assert fvu[-1] < 0.5 * fvu[0]
    assert error == pytest.approx(fvu[-1], rel=0.2)
    assert not any("evaluation/fvu" in line for line in run.metrics())  # there is no text to hold out
    with pytest.raises(ValueError, match=r"dataset must hold a tensor for each of \['model.a', 'model.b'\], got 1"):
        train(settings(tmp_path / "other", saes=[transcoder]), dataset=inputs)


def test_from_a_store_with_and_without_its_model(tmp_path):
    lm = se.data.load_language_model()
    se.data.collect_activations(lm, se.data.evaluation_text()[:2], tmp_path / "store", site="blocks.1.hook_resid_pre",
                                context_length=32, max_tokens=1000, shard_tokens=300, progress=False)  # fmt: skip
    stored = {"data__store_path": str(tmp_path / "store")}
    run = train(settings(tmp_path / "a", **stored))
    assert [line["step"] for line in run.metrics() if "evaluation/fvu" in line] == [12, 24]
    provenance = next(iter(run.saes().values())).provenance
    assert (provenance.model, provenance.layer, provenance.dtype) == ("embedded", 1, "float16")
    alone = train(settings(tmp_path / "b", **stored, eval__eval_tokens=0))
    assert not any("evaluation/fvu" in line for line in alone.metrics())
    name = run.config.saes[0].name
    assert all(torch.equal(t, trained(alone, name)[key]) for key, t in trained(run, name).items())
    other = [SAE | {"hook_name": "blocks.2.hook_resid_pre"}]
    with pytest.raises(ValueError, match=r"data.store_path: .* holds no activations of blocks.2.*; it holds blocks.1"):
        train(settings(tmp_path / "c", **stored, saes=other))


def test_a_model_and_documents_that_are_in_memory_already(tmp_path):
    lm = se.data.load_language_model()
    texts = se.data.evaluation_text()
    options: dict[str, Any] = {"data__eval_fraction_documents": 3}
    run = Trainer(settings(tmp_path / "a", **options), model=lm.model, tokenizer=lm.tokenizer, dataset=texts).train()
    same = Trainer(settings(tmp_path / "b", **options), model=lm, dataset=texts).train()
    name = run.config.saes[0].name
    assert all(torch.equal(t, trained(same, name)[key]) for key, t in trained(run, name).items())


# --- how it ends, and what is refused --------------------------------------------------------------------------------


class At(Callback):
    """Does something after one update."""

    def __init__(self, update: int, act) -> None:
        self.at, self.act, self.seen = update, act, []

    def on_update(self, trainer) -> None:
        if trainer.update == self.at:
            self.act(trainer)

    def on_start(self, trainer) -> None:
        self.seen.append("start")

    def on_log(self, trainer, metrics) -> None:
        self.seen.append("log")

    def on_evaluate(self, trainer, metrics) -> None:
        self.seen.append("evaluate")

    def on_checkpoint(self, trainer, folder) -> None:
        self.seen.append(folder.name)

    def on_end(self, trainer) -> None:
        self.seen.append("end")


def test_a_signal_that_is_ignored_stays_so(finished, tmp_path):
    """So a shell keeps Ctrl-C from what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = train(settings(tmp_path / "run"), callbacks=[At(8, lambda _: signal.raise_signal(signal.SIGINT))])
    assert_same(finished, run)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_tidily_and_it_goes_on_where_it_stopped(finished, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"{number.name}: .*sae-engine train --resume {tmp_path / 'run'}") as stopped:
        train(settings(tmp_path / "run"), callbacks=[At(8, lambda _: signal.raise_signal(number))])
    assert stopped.value.signal == number and signal.getsignal(number) is before
    run = Run(tmp_path / "run")
    assert last(run).update == 8
    assert (run.folder / "report.md").exists() and run.saes()
    resume(run.folder)
    assert_same(finished, run)


def test_moments_in_bfloat16_go_on_where_they_stopped(tmp_path):
    """The random bits of their rounding follow from the update, which is all that they need to be saved."""
    folders = tmp_path / "whole", tmp_path / "stopped"
    made = [settings(folder, optim__moments="bfloat16", data__training_tokens=64 * 6, eval__eval_steps=0)
            for folder in folders]  # fmt: skip
    whole = train(made[0])
    with pytest.raises(Interrupted):
        train(made[1], callbacks=[At(3, lambda _: signal.raise_signal(signal.SIGINT))])
    kept = last(Run(folders[1])).tensors
    assert sum(t.dtype == torch.bfloat16 for t in kept.values()) == 4
    assert_same(whole, resume(folders[1]))


def test_a_second_signal_ends_it_at_once(tmp_path):
    def twice(_) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        train(settings(tmp_path / "run"), callbacks=[At(8, twice)])
    assert not isinstance(stopped.value, Interrupted)
    assert last(Run(tmp_path / "run")).update == 6


def test_callbacks_hear_of_everything_in_order(tmp_path):
    told = At(0, None)
    train(settings(tmp_path / "run"), callbacks=[told])
    step = "step-{:09d}".format
    assert told.seen == [step(0), "start", "log", step(6), "log", "evaluate", step(12), "log", step(18), "log", "log",
                         "evaluate", step(24), "end"]  # fmt: skip
    with pytest.raises(TypeError, match=r"callbacks must hold objects of training\.Callback"):
        Trainer(settings(tmp_path / "other"), callbacks=[print])


def test_a_full_disk_ends_a_run_and_nothing_is_lost(finished, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(_) -> None:
        monkeypatch.setattr("safetensors.torch.save_file", full)

    with pytest.raises(OSError, match="No space left on device"):
        train(settings(tmp_path / "run"), callbacks=[At(8, fill)])
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert last(Run(tmp_path / "run")).update == 6
    assert_same(finished, resume(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, caplog):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(settings(folder), callbacks=[At(8, lambda _: signal.raise_signal(signal.SIGINT))])
    file = checkpoint.listed(folder)[8] / "saes.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    run = resume(folder)
    assert "saes.safetensors is damaged" in caplog.text and "an earlier checkpoint is taken" in caplog.text
    assert_same(finished, run)


def test_folders_that_are_taken_are_refused(finished, tmp_path):
    with pytest.raises(FileExistsError, match="is there already: resume it with: sae-engine train --resume"):
        train(settings(finished.folder))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is there already: name another folder"):
        train(settings(tmp_path / "other"))
    assert [place.name for place in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is there already"):
        train(settings(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="it is not the folder of a run"):
        resume(tmp_path / "other")


def test_two_trainings_of_one_folder(tmp_path):
    def again(trainer) -> None:
        with pytest.raises(RuntimeError, match="output_path: another process is training"):
            resume(trainer.folder)

    train(settings(tmp_path / "run"), callbacks=[At(8, again)])


@pytest.mark.parametrize(("change", "message"), [
    ("optim.lr=1", "optim: a run that is resumed keeps its optim"),
    ("saes.0.k=4", "saes: a run that is resumed keeps its saes"),
    ("data.context_size=16", "data: a run that is resumed keeps its data"),
    ("data.training_tokens=9999999", "data.training_tokens: the learning rate decays from update"),
    ("optim.lrr=1", "optim.lrr"),
])  # fmt: skip
def test_what_may_not_change_when_a_run_is_resumed(finished, change, message):
    with pytest.raises(ValueError, match=message):
        resume(finished.folder, settings=[change])


def test_what_may_change_when_a_run_is_resumed(tmp_path):
    def stop(_) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(settings(tmp_path / "run"), callbacks=[At(8, stop)])
    changes = ["logger.logging_steps=2", "output.save_total_limit=1", f"data.training_tokens={64 * 30}"]
    run = resume(tmp_path / "run", settings=changes)
    assert last(run).update == 30 and len(checkpoint.listed(run.folder)) == 1
    assert run.config.data.training_tokens == 64 * 30


def test_a_training_that_cannot_be_saved_by_number_is_stopped(tmp_path):
    """Weights that are no numbers any more give no finite loss: after twenty such batches the run ends and says so."""

    def break_it(trainer) -> None:
        with torch.no_grad():
            next(iter(trainer.trainees.values())).sae.W_dec.fill_(math.nan)

    options = {"data__training_tokens": 64 * 60}
    with pytest.raises(FloatingPointError, match=r"the last \d+ batches gave no finite loss"):
        train(settings(tmp_path / "run", **options), callbacks=[At(3, break_it)])
    (skipped,) = [line["details/skipped_batches"] for line in Run(tmp_path / "run").metrics() if line["step"] == 25]
    assert skipped == 22


def test_the_schedule_ends_at_zero_and_spans_the_run(finished):
    rates = {line["step"]: line["details/current_learning_rate"] for line in finished.metrics()
             if "details/current_learning_rate" in line}  # fmt: skip
    assert rates[24] == 0 < rates[20] <= rates[15] == finished.config.optim.lr


def test_the_small_preset_ends_within_its_band(tmp_path):
    """Measured: FVU 0.596 and 0.655 of the cross-entropy recovered, L0 8 (Python 3.11's library as the text)."""
    run = train(se.training.preset("embedded-tiny", [f"output.output_path={tmp_path}/run", "logger.progress=false"]))
    last_line = [line for line in run.metrics() if "evaluation/fvu" in line][-1]
    assert 0.55 < last_line["evaluation/fvu"] < 0.64
    assert 0.58 < last_line["evaluation/ce_recovered"] < 0.73
    assert last_line["evaluation/l0"] == 8


def test_documents_with_contexts_of_their_own_are_trained_on_evaluated_and_resumed(tmp_path):
    """``packing: false``: each document has contexts of its own; that padding is not seen, test_padding shows."""
    texts = [f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 3) for n in range(90)]
    few = {"data__eval_fraction_documents": 8, "data__training_tokens": 64 * 12}
    trainer = Trainer(settings(tmp_path / "run", data__packing=False, **few), dataset=texts)
    run = trainer.train()
    assert trainer.plan.contexts is not None and not trainer.plan.contexts.packing
    assert run.metrics()[-1]["evaluation/l0"] == 8 and 0 < run.metrics()[-1]["evaluation/fvu"] < 2
    shutil.copytree(run.folder, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000000012")
    assert_same(resume(tmp_path / "cut", dataset=texts), run)


def test_an_autoencoder_that_was_saved_is_trained_further_to_the_end(finished, tmp_path):
    """On rows scaled as in the first training, which its files say: other text, the same numbers at the start."""
    source = finished.folder / "sae" / next(iter(finished.saes()))
    run = train(settings(tmp_path / "run", saes=[SAE | {"from_pretrained": str(source)}], seed=1))
    (before,), (after,) = finished.saes().values(), run.saes().values()
    assert before.W_dec.shape == after.W_dec.shape and not torch.equal(before.W_dec, after.W_dec)
    assert before.provenance.activation_scale == after.provenance.activation_scale == last(run).plain["saes"][
        str(run.config.saes[0].name)]["scales"][0]  # fmt: skip
    norms = next(t for name, t in last(run).tensors.items() if name.endswith("/sae/W_dec")).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    first = next(line for line in run.metrics() if "metrics/explained_variance" in line)
    untrained = next(line for line in finished.metrics() if "metrics/explained_variance" in line)
    assert first["metrics/explained_variance"] > untrained["metrics/explained_variance"] + 0.1
    assert run.metrics()[-1]["evaluation/fvu"] < finished.metrics()[-1]["evaluation/fvu"]


def test_a_run_that_dies_while_its_report_is_written_is_reported_again(tmp_path, monkeypatch):
    from sae_engine.reports import run as report

    class Killed(BaseException):
        pass

    def dies(text, path):
        path.write_text(text[:100])
        raise Killed

    config = settings(tmp_path / "run", saes=[SAE | {"hook_name": "model.a"}], data__training_tokens=64 * 6)
    rows = torch.randn(256, 16)
    with monkeypatch.context() as patched:
        patched.setattr(report, "write_text", dies)
        with pytest.raises(Killed):
            train(config, dataset=rows)
    run = Run(tmp_path / "run")
    assert not (run.folder / "report.md").exists()  # not a part of it either
    assert [path.name for path in run.report()] == ["report.md", "report.html"]
    resumed = resume(run.folder, dataset=rows)
    assert len(resumed.saes()) == 1 and (run.folder / "report.html").read_text().rstrip().endswith("</html>")
