"""Trainer: a configuration to trained autoencoders, in one pass of a language model, with checkpoints and logs.

What a run does follows from its configuration alone: a run that was killed, and went on from its last checkpoint, ends
with the bits of one that was not (on a CPU with as many threads; a GPU's matrix products may differ).
"""
from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _saved_state as saved_state
from .._files import LOCK, only_writer, replace_file
from ..autoencoder import SparseAutoencoder
from ..checkpoints.saelens import save_sparsity
from ..data._require import require
from . import checkpoint, saving
from ._faults import within
from .callbacks import Callback, Interrupted, resume_command
from .config import Resolved, TrainConfig
from .dealt import counted
from .forward import PreActivations
from .logs import Logs
from .meshes import check_mesh, settled
from .plan import planned
from .ranks import distributed
from .run import CONFIG, SAES, Run
from .settings import changed, configured
from .trainee import Trainee

SKIPPED_IN_A_ROW = 20  # batches without a finite loss, after which a run ends


def train(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike, *, model: Any = None, tokenizer: Any = None,
    dataset: Any = None, callbacks: Sequence[Callback] = (),
) -> Run:  # fmt: skip
    """Trains what a configuration describes, and returns the run: its folder, its metrics, its autoencoders.

    In processes that ``torchrun`` has started all of them call it, and it returns in all when everything is written.
    They join one process group, unless there is one, which stays until they end.

    Args:
        config: a :class:`TrainConfig`, a dictionary of its form, the path of a YAML file, or the name of a preset.
        model, tokenizer, dataset, callbacks: as :class:`Trainer` takes them.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: as :meth:`Trainer.train`.
        Interrupted: Ctrl-C or SIGTERM; the run is saved, and :func:`resume` carries on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quick = ["data.training_tokens=2048", "logger.progress=false", f"output.output_path={folder}/run"]
        ...     run = train(se.training.preset("embedded-tiny", quick))
        ...     [sae.d_sae for sae in run.saes().values()]
        [256]
    """
    return Trainer(config, model=model, tokenizer=tokenizer, dataset=dataset, callbacks=callbacks).train()


def resume(
    run: str | os.PathLike, *, settings: Sequence[str] = (), model: Any = None, tokenizer: Any = None,
    dataset: Any = None, callbacks: Sequence[Callback] = (),
) -> Run:  # fmt: skip
    """Goes on with a run from its newest checkpoint that is whole; a finished one is only evaluated and written again.

    Args:
        run: its folder, on the disk of the first process; others need not see it.
        settings: changes, as ``"output.save_steps=100"``: of ``logger`` and ``output``, and of
            ``data.training_tokens`` as long as the learning rate has not begun to decay.
        model, tokenizer, dataset, callbacks: as the run had them.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a setting may not change any more (names it), or no checkpoint is whole.
        As :func:`train` otherwise.

    Example:
        >>> resume("runs/nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: run: 'runs/nowhere' holds no config.yaml: it is not the folder of a run
    """
    from .config_files import read_yaml

    file = Path(run).expanduser() / CONFIG
    text = distributed().gathered(file.read_text(encoding="utf-8") if file.is_file() else None)[0]
    if text is None:
        raise FileNotFoundError(f"run: {str(run)!r} holds no {CONFIG}: it is not the folder of a run")
    return Trainer(
        TrainConfig.from_dict(read_yaml(text, str(file)) or {}), model=model, tokenizer=tokenizer, dataset=dataset,
        callbacks=callbacks, _resumes=file.parent, _settings=settings,
    ).train()  # fmt: skip


class Trainer:
    """A run with its parts at hand: for callbacks, for a model or texts that are in memory already.

    Args:
        config: as :func:`train` takes it.
        model: a loaded Hugging Face model (or a :class:`~sae_engine.data.LanguageModel`) in place of
            ``config.model``; with its ``tokenizer``.
        dataset: in place of ``data.dataset_path``: documents in memory, strings or token ids, or what else
            :func:`~sae_engine.data.open_source` takes. Or the rows themselves, in place of model and text: a tensor
            ``(rows, width)``, or one for each site in the order in which ``saes`` name them; nothing is held out then.
        callbacks: of :class:`Callback`.

    Attributes:
        update: updates made so far.
        total: updates of the whole run.
        trainees: name → what is being trained; ``trainer.trainees["a"].sae`` is the autoencoder in training form.
        folder: of the run.

    Raises:
        TypeError, ValueError, OSError: the configuration or an argument is wrong; names it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     quick = ["data.training_tokens=2048", "logger.progress=false", f"output.output_path={folder}/run"]
        ...     trainer = Trainer(se.training.preset("embedded-tiny", quick))
        ...     run = trainer.train()
        ...     trainer.update
        4
    """

    def __init__(
        self, config: TrainConfig | Mapping[str, Any] | str | os.PathLike, *, model: Any = None, tokenizer: Any = None,
        dataset: Any = None, callbacks: Sequence[Callback] = (), _resumes: Path | None = None,
        _settings: Sequence[str] = (),
    ) -> None:  # fmt: skip
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks must hold objects of training.Callback, got {callback!r}")
        self.config: Resolved = configured(config)
        self.callbacks = tuple(callbacks)
        self.update, self.total = 0, 0
        self.trainees: dict[str, Trainee] = {}
        self._given = {"model": model, "tokenizer": tokenizer, "dataset": dataset}
        self._resumes, self._settings = _resumes, _settings
        self._asked: int | None = None  # the signal that asked for an end

    def train(self) -> Run:
        """Trains to the end, evaluates, writes the autoencoders and the report.

        Raises:
            TypeError, ValueError: the configuration is wrong (names the field), or the data are.
            FileExistsError: the run's folder holds another run.
            RuntimeError: another process writes there.
            OSError: the disk is full or not writable; what was written before is whole.
            FloatingPointError: no batch has a finite loss any more.
            Interrupted: Ctrl-C or SIGTERM; the run is saved.
        """
        with ExitStack() as stack:
            self.ranks = distributed()
            if torch.get_default_device().type != "cpu":  # every device is named; what names none is meant for the CPU
                stack.enter_context(torch.device("cpu"))
            if self._resumes is None:
                self.config = settled(self.config, self.ranks)
            saved = self._found()
            check_mesh(self.config, self.ranks, goes_on=self._resumes is not None)
            if self.config.mesh is not None:
                self.ranks = self.ranks._replace(parts=saving.parts_of(saved, self.ranks))
            self.plan = planned(self.config, **self._given, ranks=self.ranks)
            if self.ranks.parts:
                self.ranks = self.ranks.on_mesh(self.config.mesh, self.plan.device)
            self._settle_folder()
            self.ranks.alone(lambda: self._claim(stack))
            self.run = Run(self.folder, _elsewhere=not self.ranks.writes)
            stack.callback(saved_state.set_random_state, saved_state.random_state())
            torch.manual_seed(self.config.seed)  # for whatever a rule, a loss or a callback of the user's draws
            self._build()
            if saved is None:
                self._begin()
            else:
                self._load(saved)
            self.plan.check_evaluation()
            stack.enter_context(self._signals())
            self._open_logs(stack, saved)
            if saved is None:
                self._save()
            self._tell("on_start")
            self._updates()
            self._end()
        return self.run

    # --- before the first update ---------------------------------------------------------------------------------

    def _found(self) -> checkpoint.Saved | None:
        """The checkpoint to go on from."""
        if self._resumes is None:
            return None
        saved = saving.newest(self._resumes, self.ranks, on_mesh=self.config.mesh is not None)
        self.config = changed(self.config, self._settings, 0 if saved is None else saved.update)
        return saved

    def _settle_folder(self) -> None:
        """The folder of the first process is everybody's, and that of a resumed run is where it lies now."""
        config = self.plan.config
        path = str(self._resumes or self.ranks.gathered(config.output.output_path)[0])
        self.config = replace(config, output=replace(config.output, output_path=path))
        self.folder = Path(path).expanduser()

    def _claim(self, stack: ExitStack) -> None:
        """This process is the only one that writes into the run's folder, which is new unless the run is resumed."""
        if self._resumes is None and self.folder.exists() and (
            not self.folder.is_dir() or any(place.name != LOCK for place in self.folder.iterdir())
        ):
            how = f"resume it with: {resume_command(self.folder)}; or " if (self.folder / CONFIG).exists() else ""
            raise FileExistsError(f"output_path: {str(self.folder)!r} is there already: {how}name another folder")
        with within("output", self.config.output, "output_path"):
            is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            where = f"output_path: another process is training in {str(self.folder)!r}"
            stack.enter_context(only_writer(self.folder, f"{where}; wait for it, stop it, or name another folder"))
            if self._resumes is None:
                stack.callback(self._leave, is_new)
            replace_file(self.folder / CONFIG, lambda path: path.write_text(self.config.to_yaml(), encoding="utf-8"))
        self._reserve()

    def _reserve(self) -> None:
        """The repository in which the autoencoders are to be published: a refusal had better be heard now."""
        output = self.config.output
        if output.push_to_hub:
            with within("output", output, "hub_model_id"):
                require("huggingface_hub").HfApi().create_repo(output.hub_model_id, exist_ok=True)

    def _leave(self, is_new: bool) -> None:
        """Nothing stays of a run that could not begin: without a checkpoint there is nothing to go on from."""
        if checkpoint.listed(self.folder):
            return
        for place in self.folder.iterdir():  # which was empty
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if is_new:
            self.folder.rmdir()

    def _build(self) -> None:
        config, plan = self.config, self.plan
        self.total = config.updates
        buffer = PreActivations()
        pool = torch.cuda.graph_pool_handle() if plan.device.type == "cuda" else None
        mean = None if self.ranks.world == 1 else self.ranks.mean
        for number, (sae, places) in enumerate(zip(config.saes, plan.places, strict=True)):
            with within(f"saes.{number}", sae):
                self.trainees[str(sae.name)] = Trainee(
                    sae, config, places=places, context=plan.context(sae), widths=plan.stream.widths,
                    total=self.total, device=plan.device, mean=mean, buffer=buffer, mesh=self.ranks.mesh, pool=pool,
                )  # fmt: skip

    def _begin(self) -> None:
        with within("data", self.config.data, "dataset_path"):
            rows = self.plan.stream.first_chunk()
        for trainee in self.trainees.values():
            trainee.begin(rows, self.ranks.world)

    def _load(self, saved: checkpoint.Saved) -> None:
        saving.load(self.folder, saved, self.trainees, self.plan.stream, self.ranks)
        self.update = saved.update

    def _open_logs(self, stack: ExitStack, saved: checkpoint.Saved | None) -> None:
        self._logs = Logs(self.config, self.folder, update=self.update, total=self.total, writes=self.ranks.writes,
                          saved=None if saved is None else saved.plain)  # fmt: skip
        stack.callback(self._logs.finish)

    # --- updates --------------------------------------------------------------------------------------------------

    def _updates(self) -> None:
        config, clock = self.config, self._logs.clock
        while self.update < self.total:
            for _ in range(config.optim.gradient_accumulation_steps):
                with clock.part("activations"):
                    rows = self.plan.stream.next()
                seen = functools.lru_cache(maxsize=None)(functools.partial(_scaled, rows, self.plan.device))
                with clock.part("step"):
                    for trainee in self.trainees.values():
                        trainee.train(seen, self.update)
            self.update += 1
            ends = self.update == self.total
            self._tell("on_update")
            if self.update % config.logger.logging_steps == 0 or ends:
                with clock.part("logging"):
                    self._log()
            if ends or (config.eval.eval_steps and self.update % config.eval.eval_steps == 0):
                with clock.part("evaluation"):
                    self._evaluate()
            stops = self.ranks.largest(self._asked or 0)
            if ends or stops or self.update % config.output.save_steps == 0:
                with clock.part("saving"):
                    self._save()
            if stops and not ends:
                self._logs.status = "interrupted"
                self._write()
                raise Interrupted(stops, self.folder)

    def _end(self) -> None:
        self._write()
        self._logs.status = "finished"
        self._tell("on_end")
        self.ranks.gathered(None)  # the others leave when all is there, and do not wait for what may take hours
        if self.ranks.writes and self.config.output.push_to_hub:
            try:
                self.run.push()
            except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
                command = f"sae-engine push {shlex.quote(str(self.folder))} --to {self.config.output.hub_model_id}"
                raise RuntimeError(f"output.push_to_hub: the run has ended and is whole, but is not published; to try "
                                   f"again: {command}: {' '.join(str(error).split())}") from error  # fmt: skip

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the update at hand; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        before: dict[int, Any] = {}

        def ask(number: int, _frame: Any) -> None:
            self._asked = int(number)
            for known, handler in before.items():
                signal.signal(known, handler)

        for known in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(known) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
                before[known] = signal.signal(known, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    # --- what is written --------------------------------------------------------------------------------------------

    def _log(self) -> None:
        """Starts a line of metrics on its way from the device, and writes the one before, which has arrived."""
        self._flush()
        found = {name: trainee.metrics() for name, trainee in self.trainees.items()}
        names = [self._named(name, key) for name, metrics in found.items() for key in metrics]
        values = torch.stack([value for metrics in found.values() for value in metrics.values()])
        in_a_row = torch.stack([trainee.sums.in_a_row for trainee in self.trainees.values()]).amin()
        skipped = {
            self._named(name, "details/skipped_batches"): trainee.step._finite.count
            for name, trainee in self.trainees.items()
        }
        whole = torch.cat([values, torch.stack([*skipped.values(), in_a_row]).to(values)])
        rates: dict[str, float] = {
            self._named(name, "details/current_learning_rate"): trainee.rate(self.update)
            for name, trainee in self.trainees.items()
        }
        counts = self.plan.stream.counts
        if self.ranks.mesh is not None:
            counts = counted(self.ranks.gathered(counts))
        known = rates | {f"data/{name}": float(count) for name, count in counts.items()}
        self._logs.start(self.update, [*names, *skipped], whole, known)

    def _flush(self) -> None:
        """Writes the line that is on its way."""
        if (arrived := self._logs.arrived()) is None:
            return
        metrics, in_a_row = arrived
        self._tell("on_log", metrics)
        if in_a_row >= SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the last {int(in_a_row)} batches gave no finite loss to any autoencoder: the learning rate may "
                f"be too high, or the activations are broken; the newest checkpoint is "
                f"of update {max(checkpoint.listed(self.folder), default=0)}"
            )

    def _evaluate(self) -> None:
        """On held-out documents. On a mesh all processes do it, each with the same documents and its own latents, and
        the first one writes."""
        self._flush()
        found = self.plan.evaluated({name: self._exported(name) for name in self.trainees})
        metrics = {self._named(name, key): value for name, numbers in found.items() for key, value in numbers.items()}
        if metrics:
            self._logs.record(metrics, self.update)
            if self.ranks.writes:
                self.run.report()
            self._tell("on_evaluate", metrics)

    def _save(self) -> None:
        """A checkpoint of this update."""
        self._flush()
        folder = saving.save(self.folder, self.update, self.trainees, self.plan.stream, self.ranks, self._logs,
                             self.config.output.save_total_limit)  # fmt: skip
        self._tell("on_checkpoint", folder)

    def _write(self) -> None:
        """The autoencoders as others load them, and the report."""
        for name, trainee in self.trainees.items():
            self._exported(name).save_pretrained(self.folder / SAES / name)
            if (shares := trainee.shares()) is not None and self.ranks.writes:
                save_sparsity(shares, self.folder / SAES / name)
        if self.ranks.writes:
            self.run.report()

    def _exported(self, name: str) -> SparseAutoencoder:
        return self.trainees[name].exported(self.plan.provenance(name))

    def _named(self, trainee: str, key: str) -> str:
        return key if len(self.trainees) == 1 else f"{trainee}/{key}"


def _scaled(rows: tuple[Tensor, ...], device: torch.device, site: int, scale: float) -> Tensor:
    there = rows[site].to(device, torch.float32)
    return there if scale == 1 else there * scale
