"""The parts of a run's configuration, but for the autoencoders: see :mod:`sae_engine.training.config`."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ._faults import (
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
        prefetch: whether the language model runs ahead, on a stream of its own; auto: on a GPU, unless
            ``optim.cuda_graphs``.
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
        cuda_graphs: whether steps are replayed as CUDA graphs: the same numbers, without what the host takes for each
            step. On a GPU, for TopK, AbsTopK and BatchTopK, where one process trains and an update is one batch;
            anything else is refused. The language model cannot run ahead then: a graph cannot be recorded while
            another thread asks for memory.

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
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        settle(
            self, lr=auto(real()), adam_beta1=auto(real("share")), adam_beta2=real("share"), adam_eps=real(),
            weight_decay=real("from 0"), train_batch_size_tokens=whole(), lr_warm_up_steps=auto(whole(0)),
            lr_decay_steps=auto(whole(0)), sparsity_warm_up_steps=auto(whole(0)), max_grad_norm=optional(real()),
            gradient_accumulation_steps=whole(), dead_after=auto(whole()), compute_dtype=optional(one_of(*_DTYPES)),
            moments=one_of("float32", "bfloat16"), memory_budget=optional(whole()), nonfinite=one_of("skip", "raise"),
            cuda_graphs=flag,
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
class MeshConfig:
    """The processes of ``torchrun`` that train together; a number in its place is ``latent``.

    Args:
        latent: over how many the latents of each autoencoder are cut: each process has some of them whole, with their
            moments, and sees the tokens of all of these processes.
        node: machines over which the latents are cut besides, ``latent`` processes on each.
        data: how many such groups there are. Each has all latents, and sees the tokens of its own processes; gradients
            are added over groups. :func:`sae_engine.distributed.estimate` says which mesh suits which sizes.
        timeout: seconds after which a process that does not answer is given up; the longest that one may be behind.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> MeshConfig(latent=4, data=2).processes
        8
    """

    latent: int = 1
    node: int = 1
    data: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        settle(self, latent=whole(), node=whole(), data=whole(), timeout=real())

    @property
    def processes(self) -> int:
        """All of them."""
        return self.shards * self.data

    @property
    def shards(self) -> int:
        """Those over which latents are cut."""
        return self.latent * self.node
