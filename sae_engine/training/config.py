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
from typing import Any, Literal, TypeAlias

from ..data.sites import Site
from ._faults import (
    ConfigError,
    as_tuples,
    auto,
    device,
    flag,
    one_of,
    optional,
    positions,
    real,
    repository,
    separator,
    settle,
    text,
    trackers,
    whole,
)
from .architectures import Auto
from .sae_config import SAEConfig, named, plain

__all__ = ["ConfigError", "DataConfig", "EvalConfig", "LoggerConfig", "ModelConfig", "OptimConfig", "OutputConfig",
           "SAEConfig", "TrainConfig"]  # fmt: skip

Resolved: TypeAlias = Any  # a TrainConfig or a part of one, in which numbers stand where the types allow "auto" too
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        model_name: hub name, folder, or ``"embedded"``, the small model in this package.
        revision: branch, tag or commit of a hub model.
        dtype: None: the checkpoint's.
        llm_device: where it runs; None: where the autoencoders are.
        tokenizer_name: of a tokenizer that is not the model's.
        model_from_pretrained_kwargs: handed to transformers: ``device_map``, ``quantization_config``,
            ``trust_remote_code``, ``attn_implementation``.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> ModelConfig(model_name="openai-community/gpt2", dtype="bfloat16").dtype
        'bfloat16'
    """

    model_name: str = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    llm_device: str | None = None
    tokenizer_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settle(self, model_name=text, revision=optional(text), dtype=optional(one_of(*_DTYPES)),
               llm_device=optional(device), tokenizer_name=optional(text))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how its activations reach the autoencoders.

    Args:
        dataset_path: ``"stdlib"`` (the standard library of this Python), a file or folder of text, ``.jsonl``,
            ``.parquet``, or a hub name, which is streamed, its files in an order that the run's ``seed`` says.
        dataset_name, split, column: of a hub data set; the column also of JSON lines and parquet.
        context_size: tokens of a context; auto: the model's longest, at most 1024.
        packing: whether documents fill contexts behind each other; else each has its own, padded.
        prepend_bos: whether each context begins with the BOS token.
        separator: behind each document: ``"eos"``, ``"bos"``, a token's id, or None, also as ``"none"``.
        seqpos_slice: the positions of a context whose rows are kept: from, and to or None.
        exclude_special_tokens: keep no rows of special tokens.
        max_norm_multiple: drop rows whose norm exceeds that many times the median.
        store_path: folder of an :class:`~sae_engine.data.ActivationStore` to train from, not a model; of several
            sites, of the folders that :func:`~sae_engine.data.collect_sites` writes.
        store_batch_size_prompts: contexts in a forward pass.
        shuffle_tokens: rows of a chunk; auto: 262,144 on a GPU, 16,384 on a CPU, or the least that fits.
        shuffle_chunks: chunks that are mixed at a time; their product is the reach of the shuffle.
        prefetch: whether the language model runs ahead, on a stream of its own; auto: on a GPU.
        training_tokens: rows of training in all; auto: 1 M of the embedded model, else 100 M.
        eval_fraction_documents: every so-many-th document is held out.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> DataConfig(dataset_path="corpus.jsonl", column="content", training_tokens=10**7).packing
        True
    """

    dataset_path: str = "stdlib"
    dataset_name: str | None = None
    split: str = "train"
    column: str = "text"
    context_size: Auto | int = "auto"
    packing: bool = True
    prepend_bos: bool = True
    separator: str | int | None = "eos"
    seqpos_slice: tuple[int | None, int | None] = (1, None)
    exclude_special_tokens: bool = True
    max_norm_multiple: float | None = None
    store_path: str | None = None
    store_batch_size_prompts: int = 8
    shuffle_tokens: Auto | int = "auto"
    shuffle_chunks: int = 8
    prefetch: Auto | bool = "auto"
    training_tokens: Auto | int = "auto"
    eval_fraction_documents: int = 256

    def __post_init__(self) -> None:
        as_tuples(self, "seqpos_slice")
        if self.separator == "none":
            object.__setattr__(self, "separator", None)
        settle(
            self, dataset_path=text, dataset_name=optional(text), split=text, column=text, context_size=auto(whole(2)),
            packing=flag, prepend_bos=flag, separator=separator, seqpos_slice=positions, exclude_special_tokens=flag,
            max_norm_multiple=optional(real()), store_path=optional(text), store_batch_size_prompts=whole(),
            shuffle_tokens=auto(whole()), shuffle_chunks=whole(), prefetch=auto(flag), training_tokens=auto(whole()),
            eval_fraction_documents=whole(2),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, its schedule, and what counts as a dead latent.

    Args:
        lr: auto: the architecture's own, times min(4, sqrt(20,000 / updates)) where that is above 1; of an autoencoder
            ``from_pretrained``, times min(1, sqrt(updates / 400)).
        adam_beta1: auto: the architecture's own, 0.9, or 0 where the paper has that.
        adam_beta2, adam_eps, weight_decay: as in ``torch.optim.Adam``.
        train_batch_size_tokens: rows of a batch, over all processes.
        lr_warm_up_steps: updates of the linear rise; auto: 1,000, in short runs 5 %.
        lr_decay_steps: updates of the linear fall to 0 at the end; auto: a fifth.
        sparsity_warm_up_steps: updates over which the weight of a sparsity loss rises; auto: the architecture's own, 0
            with ``from_pretrained``.
        max_grad_norm: clip the norm of all gradients together.
        gradient_accumulation_steps: batches of an update.
        dead_after: tokens without firing after which a latent is dead; auto: 10 M, in short runs 10 % of the tokens.
        compute_dtype: of products and codes; None: that of the parameters.
        moments: of Adam, for the encoder's and the decoder's weights; ``bfloat16`` saves 4 bytes a weight.
        memory_budget: bytes of pre-activations at a time; None: an eighth of the device's memory.
        nonfinite: what happens to a batch with NaN or Inf: ``"skip"`` or ``"raise"``.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> OptimConfig(lr=3e-4, train_batch_size_tokens=8192).adam_beta2
        0.999
    """

    lr: Auto | float = "auto"
    adam_beta1: Auto | float = "auto"
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    train_batch_size_tokens: int = 4096
    lr_warm_up_steps: Auto | int = "auto"
    lr_decay_steps: Auto | int = "auto"
    sparsity_warm_up_steps: Auto | int = "auto"
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    dead_after: Auto | int = "auto"
    compute_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    moments: Literal["float32", "bfloat16"] = "float32"
    memory_budget: int | None = None
    nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        settle(
            self, lr=auto(real()), adam_beta1=auto(real("share")), adam_beta2=real("share"), adam_eps=real(),
            weight_decay=real("from 0"), train_batch_size_tokens=whole(), lr_warm_up_steps=auto(whole(0)),
            lr_decay_steps=auto(whole(0)), sparsity_warm_up_steps=auto(whole(0)), max_grad_norm=optional(real()),
            gradient_accumulation_steps=whole(), dead_after=auto(whole()), compute_dtype=optional(one_of(*_DTYPES)),
            moments=one_of("float32", "bfloat16"), memory_budget=optional(whole()), nonfinite=one_of("skip", "raise"),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measuring on held-out text.

    Args:
        eval_steps: updates between two evaluations, 0: at the end alone; auto: a tenth of the run.
        eval_tokens: tokens of one; auto: 65,536, of the embedded model 16,384.
        dataset_path: the text; None: the documents that training leaves out.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> EvalConfig(eval_steps=0).eval_tokens
        'auto'
    """

    eval_steps: Auto | int = "auto"
    eval_tokens: Auto | int = "auto"
    dataset_path: str | None = None

    def __post_init__(self) -> None:
        settle(self, eval_steps=auto(whole(0)), eval_tokens=auto(whole(0)), dataset_path=optional(text))


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Where numbers go beside ``metrics.jsonl``.

    Args:
        report_to: of ``"wandb"``, ``"tensorboard"`` and ``"trackio"``.
        logging_steps: updates between two lines; auto: a hundredth of the run, at most 100.
        run_name: None: that of the run folder.
        project: of wandb and trackio.
        progress: a line on the terminal.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> LoggerConfig(report_to=["tensorboard"]).report_to
        ('tensorboard',)
    """

    report_to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    logging_steps: Auto | int = "auto"
    run_name: str | None = None
    project: str = "sae-engine"
    progress: bool = True

    def __post_init__(self) -> None:
        as_tuples(self, "report_to")
        settle(self, report_to=trackers, logging_steps=auto(whole()), run_name=optional(text), project=text,
               progress=flag)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written.

    Args:
        output_path: the run folder; ``auto`` as its last part is a name that no folder has yet.
        save_steps: updates between two checkpoints; auto: a tenth of the run, at most 5,000.
        save_total_limit: checkpoints that are kept.
        push_to_hub, hub_model_id: publish the autoencoders at the end, and where.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> OutputConfig(output_path="runs/gpt2").save_total_limit
        2
    """

    output_path: str = "runs/auto"
    save_steps: Auto | int = "auto"
    save_total_limit: int = 2
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        lacking = self.push_to_hub is True and self.hub_model_id is None
        settle(self, ("hub_model_id", "must say where to, with push_to_hub" if lacking else None), output_path=text,
               save_steps=auto(whole()), save_total_limit=whole(), push_to_hub=flag,
               hub_model_id=optional(repository))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: the language model, its text, and the autoencoders that one pass trains.

    Args:
        model, data, optim, eval, logger, output: its parts.
        other_models: language models that are given the same tokens, for crosscoders of several: their places are
            spelled ``blocks.3.hook_resid_post@1``, ``@2`` and so on.
        saes: at least one.
        sweep: values for fields of an entry of ``saes``; each entry is trained with each combination of them.
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
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        as_tuples(self, "saes", "other_models")
        own = {"seed": whole(0), "device": auto(device)}
        faults = [(name, what) for name, holds in own.items() if (what := holds(getattr(self, name))) is not None]
        faults += [(name, f"must be a {kind.__name__}, got {getattr(self, name)!r}") for name, kind in _PARTS.items()
                  if not isinstance(getattr(self, name), kind)]  # fmt: skip
        if not (isinstance(self.saes, tuple) and self.saes and all(isinstance(s, SAEConfig) for s in self.saes)):
            faults.append(("saes", "must hold at least one autoencoder"))
        others = self.other_models
        if not isinstance(others, tuple) or not all(isinstance(one, ModelConfig) for one in others):
            faults.append(("other_models", f"must be a list of models, got {others!r}"))
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
        for number, sae in enumerate(self.saes):
            for site, name in zip(sae.sites, sae.site_fields, strict=True):
                model = Site.of(site).model
                if model > len(self.other_models) or (model and not sae.has_sites):
                    only = "only crosscoders read other models" if not sae.has_sites else "other_models names too few"
                    yield f"saes.{number}.{name}", f"must be a place of model, and {only}, got {site}"
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
            TopKSAE(k=16)
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
