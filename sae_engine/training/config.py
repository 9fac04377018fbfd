"""The configuration of a training run: frozen dataclasses under SAELens' names, else Hugging Face's, else ours.

``"auto"`` is a value that :func:`sae_engine.training.auto.resolved` makes a number of; the run folder's configuration
has none. Files are read by :mod:`sae_engine.training.config_files`. What can be wrong is said all at once, in a
:class:`ConfigError`; pydantic, which checks kinds, is needed for files and dictionaries alone.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, TypeAlias

from .. import _checks as check
from ..data.sites import Site
from ._faults import ConfigError, as_tuples, auto, device, settle, whole
from .config_parts import DataConfig, EvalConfig, LoggerConfig, MeshConfig, ModelConfig, OptimConfig, OutputConfig
from .sae_config import SAEConfig, named, plain

__all__ = ["ConfigError", "DataConfig", "EvalConfig", "LoggerConfig", "MeshConfig", "ModelConfig", "OptimConfig",
           "OutputConfig", "SAEConfig", "TrainConfig"]  # fmt: skip

Resolved: TypeAlias = Any  # a TrainConfig or a part of one, in which numbers stand where the types allow "auto" too


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: the language model, its text, and the autoencoders that one pass trains.

    Args:
        model, data, optim, eval, logger, output: its parts.
        other_models: language models that are given the same tokens, for crosscoders of several: their places are
            spelled ``blocks.3.hook_resid_post@1``, ``@2`` and so on.
        saes: at least one.
        sweep: values for fields of an entry of ``saes``; each entry is trained with each combination of them.
        mesh: the processes that train together, as ``{latent: 4, data: 2}``; a number alone is ``latent``. None: all
            that torchrun has started, as ``data``.
        seed: of weights, documents' order and shuffle.
        device: of the autoencoders; auto: a GPU where there is one.

    Raises:
        ConfigError: something is of another kind, out of range, or does not fit something else.

    Example:
        >>> config = TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre")], sweep={"k": [16, 32]})
        >>> [sae.name for sae in config.expanded().saes]
        ['blocks.2.hook_resid_pre-topk-k16', 'blocks.2.hook_resid_pre-topk-k32']
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    other_models: tuple[ModelConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    saes: tuple[SAEConfig, ...]
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    mesh: MeshConfig | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        as_tuples(self, "saes", "other_models")
        if (processes := check.integer_in(self.mesh)) is not None:
            object.__setattr__(self, "mesh", MeshConfig(latent=processes))
        own = {"seed": whole(0), "device": auto(device)}
        faults = [(name, what) for name, holds in own.items() if (what := holds(getattr(self, name))) is not None]
        faults += [(name, f"must be a {kind.__name__}, got {getattr(self, name)!r}") for name, kind in _PARTS.items()
                  if not isinstance(getattr(self, name), kind)]  # fmt: skip
        if not (isinstance(self.saes, tuple) and self.saes and all(isinstance(s, SAEConfig) for s in self.saes)):
            faults.append(("saes", "must hold at least one autoencoder"))
        others = self.other_models
        if not isinstance(others, tuple) or not all(isinstance(one, ModelConfig) for one in others):
            faults.append(("other_models", f"must be a list of models, got {others!r}"))
        if not isinstance(self.mesh, MeshConfig | None):
            faults.append(("mesh", f"must be a MeshConfig, or a number of processes, got {self.mesh!r}"))
        if not isinstance(self.sweep, dict):
            faults.append(("sweep", f"must be a mapping of fields to lists of values, got {self.sweep!r}"))
        if faults:
            raise ConfigError(faults)
        settle(self, *self._relations(), seed=whole(0))
        self.expanded()  # for its faults

    def _relations(self) -> Iterator[tuple[str, str | None]]:
        """What does not fit together."""
        data, batch = self.data, self.optim.train_batch_size_tokens
        if data.shuffle_tokens != "auto" and data.shuffle_tokens % (data.shuffle_chunks * batch):
            least = data.shuffle_chunks * batch
            yield "data.shuffle_tokens", (f"must be a multiple of shuffle_chunks · train_batch_size_tokens = {least}, "
                                          f"got {data.shuffle_tokens}")  # fmt: skip
        if data.prefetch is True and self.optim.cuda_graphs:
            yield "data.prefetch", "must be false with optim.cuda_graphs, got true"
        for number, sae in enumerate(self.saes):
            for site, name in zip(sae.sites, sae.site_fields, strict=True):
                model = Site.of(site).model
                if model > len(self.other_models) or (model and not sae.has_sites):
                    only = "only crosscoders read other models" if not sae.has_sites else "other_models names too few"
                    yield f"saes.{number}.{name}", f"must be a place of model, and {only}, got {site}"
            if self.mesh is not None and sae.d_sae is not None and sae.d_sae < self.mesh.shards:
                least = self.mesh.shards
                yield f"saes.{number}.d_sae", f"must be at least mesh.latent * mesh.node = {least}, got {sae.d_sae}"
        if self.output.push_to_hub and len(self.saes) > 1 and any(sae.has_sites for sae in self.saes):
            yield "output.push_to_hub", "must be false with a crosscoder among others: it has a repository of its own"
        update = batch * self.optim.gradient_accumulation_steps
        if data.training_tokens != "auto" and data.training_tokens < update:
            yield "data.training_tokens", f"must be at least an update's {update}, got {data.training_tokens}"
        if data.context_size != "auto" and len(range(data.context_size)[slice(*data.seqpos_slice)]) == 0:
            yield "data.seqpos_slice", f"keeps none of {data.context_size} positions, got {list(data.seqpos_slice)}"

    def expanded(self) -> TrainConfig:
        """Every autoencoder that is trained: ``saes`` times ``sweep``, each with a name of its own, and no sweep.

        Raises:
            ConfigError: a value of the sweep is not one that the field takes.

        Example:
            >>> config = TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre", name="a")], sweep={"seed": [0, 1]})
            >>> [(sae.name, sae.seed) for sae in config.expanded().saes]
            [('a-seed0', 0), ('a-seed1', 1)]
        """  # noqa: E501
        if not self.sweep and all(sae.name is not None for sae in self.saes):
            names = [sae.name for sae in self.saes]
            if twice := sorted({str(name) for name in names if names.count(name) > 1}):
                raise ConfigError([("saes", f"two are named {twice[0]}")])
            return self
        saes = [named(sae, dict(zip(self.sweep, values, strict=True)))
                for sae in self.saes for values in itertools.product(*self._swept())]  # fmt: skip
        taken: dict[str, int] = {}
        for number, sae in enumerate(saes):
            count = taken[str(sae.name)] = taken.get(str(sae.name), 0) + 1
            if count > 1:
                saes[number] = replace(sae, name=f"{sae.name}-{count}")
        return replace(self, saes=tuple(saes), sweep={})

    def _swept(self) -> list[list[Any]]:
        for name, values in self.sweep.items():
            if name == "name":
                raise ConfigError([("sweep.name", "cannot be swept: names are made of what is")])
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError([(f"sweep.{name}", f"must be a list of values, got {values!r}")])
        return [list(values) for values in self.sweep.values()]

    def optim_of(self, sae: SAEConfig) -> OptimConfig:
        """The optimizer of one of ``saes``: ``optim``, with what the entry says itself.

        Example:
            >>> sae = SAEConfig(hook_name="blocks.2.hook_resid_pre", lr=1e-3)
            >>> TrainConfig(saes=[sae]).optim_of(sae).lr
            0.001
        """
        own = {name: getattr(sae, name) for name in ("lr", "adam_beta1", "sparsity_warm_up_steps")}
        return replace(self.optim, **{name: value for name, value in own.items() if value is not None})

    @property
    def updates(self) -> int:
        """Of the whole run: ``training_tokens`` over the tokens of an update. What is left over is not trained on.

        Example:
            >>> TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre")],
            ...             data=DataConfig(training_tokens=10**6)).updates
            244
        """
        if self.data.training_tokens == "auto":
            raise ConfigError([("data.training_tokens", "is still 'auto', which resolved() makes a number of")])
        return self.data.training_tokens // (
            self.optim.train_batch_size_tokens * self.optim.gradient_accumulation_steps)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As a file has it: of words, numbers, lists and dictionaries alone.

        Example:
            >>> TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre")]).to_dict()["saes"][0]["k"]
            32
        """
        return plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration that :meth:`to_dict` gave, or that someone wrote; what is not said has its default.

        Raises:
            ConfigError: names are unknown, values of another kind or out of range: all of them at once.
            ImportError: pydantic is not installed.

        Example:
            >>> try:
            ...     TrainConfig.from_dict({"saes": [{"hook_nam": "blocks.2.hook_resid_pre", "k": 0}], "seed": "a"})
            ... except ConfigError as error:
            ...     print(error)
            saes.0.hook_name: must be given
            saes.0.hook_nam: unknown; did you mean hook_name?
            seed: must be an int, got 'a'
            saes.0.k: must be at least 1, got 0
        """
        from . import config_files

        return config_files.from_dict(cls, values)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> TrainConfig:
        """The configuration of a YAML file. ``1e-3`` and ``500e6`` are numbers in it, ``on`` and ``yes`` are words.

        Raises:
            ConfigError: as :meth:`from_dict`, and where the file is no YAML.
            OSError: the file cannot be read.
            ImportError: pydantic or PyYAML is not installed.

        Example:
            >>> import tempfile, pathlib
            >>> file = pathlib.Path(tempfile.mkdtemp(), "run.yaml")
            >>> _ = file.write_text("saes: [{hook_name: blocks.2.hook_resid_pre, k: 16}]")
            >>> TrainConfig.from_yaml(file).saes[0].architecture
            TopKSAE(k=16, over_sources=False)
        """
        from . import config_files

        return config_files.from_yaml(cls, path)

    def to_yaml(self) -> str:
        """The text of a file that :meth:`from_yaml` reads back.

        Raises:
            ConfigError: ``model_from_pretrained_kwargs`` hold what YAML cannot.
            ImportError: PyYAML is not installed.

        Example:
            >>> print(TrainConfig(saes=[SAEConfig(hook_name="blocks.2.hook_resid_pre")]).to_yaml().splitlines()[0])
            model:
        """
        from . import config_files

        return config_files.to_yaml(self.to_dict())


_PARTS = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "eval": EvalConfig, "logger": LoggerConfig,
          "output": OutputConfig}  # fmt: skip
