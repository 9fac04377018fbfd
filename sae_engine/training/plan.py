"""From a configuration to what a run works with: the language model, the stream of its activations, the places."""
from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..data.contexts import Contexts, contexts_of, rows_in_words
from ..data.loading import loading_options
from ..data.memory import TensorStream
from ..data.models import LanguageModel, load_language_model, load_tokenizer
from ..data.places import find_place
from ..data.shared import together
from ..data.sites import Site
from ..data.sources import Source, open_source
from ..data.store import ActivationStore
from ..data.stream import RowStream, StoreStream
from ..metrics.evaluation import evaluate_during
from ..metrics.replacement import evaluate_sites_during
from ..provenance import Provenance
from ._faults import ConfigError, within
from .auto import resolved, stores_of
from .config import ModelConfig, Resolved, SAEConfig, TrainConfig
from .dealt import DealtStreams, OneStream, dealt
from .ranks import Ranks

Places = tuple[tuple[int, ...], tuple[int, ...]]
Stream = OneStream | DealtStreams
SPECIAL = ("bos", "eos", "pad")


@dataclass
class Plan:
    """All that is made of a configuration before the autoencoders are.

    Attributes:
        config: complete: no ``auto`` is left, and ``saes`` holds each autoencoder of a sweep.
        device: to train on.
        stream: rows of all sites.
        sites: in the stream's order.
        places: of each autoencoder, the numbers of the sites that it reads and reconstructs; one of each but for
            crosscoders.
        provenances: of each autoencoder.
        lm, source, contexts: None where a run trains from a store without them.
    """

    config: Resolved
    device: torch.device
    stream: Stream
    sites: tuple[Site, ...]
    places: tuple[Places, ...]
    provenances: dict[str, Provenance]
    lm: LanguageModel | None = None
    source: Source | None = None
    contexts: Contexts | None = None
    _held_out: list[Any] | None = field(default=None, repr=False)
    _baselines: dict[Hashable, float] = field(default_factory=dict, repr=False)

    def provenance(self, name: str) -> Provenance:
        return self.provenances[name]

    def context(self, sae: SAEConfig) -> dict[str, int]:
        """What its rule is given beside the pre-activations: the numbers of these sites."""
        return {name: self.sites.index(Site.of(site)) for name, site in sae.architecture.context.items()}

    def evaluated(self, saes: dict[str, SparseAutoencoder]) -> dict[str, dict[str, float]]:
        """Each one's numbers on text that none of them was trained on; nothing where there is none."""
        if self.lm is None or not self.config.eval.eval_tokens:
            return {}
        self.stream.settle()  # a thread that reads ahead has the language model
        assert self.contexts is not None
        contexts = self.contexts
        found = {}
        options: dict[str, Any] = dict(
            context_length=contexts.length, batch_size=contexts.batch_size,
            drop_first=0 in contexts.excluded_positions, separator=contexts.separator,
            first_token=contexts.first_token, exclude_tokens=contexts.excluded_tokens, packing=contexts.packing,
            exclude_positions=[p for p in contexts.excluded_positions if p],
            max_tokens=self.config.eval.eval_tokens,
        )  # fmt: skip
        for name, (reads, writes) in zip(saes, self.places, strict=True):
            sae, target = saes[name], None if reads == writes else [self.sites[number] for number in writes]
            if isinstance(sae, Crosscoder):
                found[name] = evaluate_sites_during(
                    sae, self.lm, self._documents(), sites=[self.sites[number] for number in reads],
                    target_sites=target, **options,
                )  # fmt: skip
                continue
            found[name] = evaluate_during(
                sae, self.lm, self._documents(), site=self.sites[reads[0]],
                target_site=None if target is None else target[0], baselines=self._baselines, **options,
            )  # fmt: skip
        return found

    def check_evaluation(self) -> None:
        """Whether there is something to evaluate on, and can be, which a run had better know before it trains."""
        if self.lm is None or not self.config.eval.eval_tokens:
            return
        for sae in self.config.saes:
            if context := sorted(sae.architecture.context):
                raise ConfigError([("eval.eval_tokens", f"must be 0: the rule of {sae.name} needs "
                                    f"{', '.join(context)}, which an evaluation does not have")])  # fmt: skip
        self._documents()

    def _documents(self) -> list[Any]:
        """Text that no autoencoder of the run is trained on, as much as an evaluation reads."""
        if self._held_out is None:
            assert self.source is not None
            source = self.source
            if (path := self.config.eval.dataset_path) is not None:
                with within("eval", self.config.eval, "dataset_path"):
                    source = open_source(path, column=self.config.data.column, hold_out=None)
                    self._held_out = _first_documents(source, self.config.eval.eval_tokens)
            else:
                tokens = self.config.eval.eval_tokens
                with within("data", self.config.data, "dataset_path"):
                    self._held_out = source.held_out(tokens, tokens=tokens)
            if not self._held_out:
                raise ValueError(
                    f"eval: {source.description} has no document to hold out: it has fewer than "
                    f"data.eval_fraction_documents = {self.config.data.eval_fraction_documents}; lower that, name a "
                    "text in eval.dataset_path, or set eval.eval_tokens to 0"
                )
        return self._held_out


def planned(config: TrainConfig, *, model: Any, tokenizer: Any, dataset: Any, ranks: Ranks) -> Plan:
    """The plan of one process.

    Args:
        config: as the user wrote it.
        model, tokenizer, dataset: in place of what the configuration names; or None.

    Raises:
        TypeError, ValueError, OSError, ImportError: what the configuration names is not there, or does not fit.
    """
    config = config.expanded()
    device = _device(config.device, ranks)
    config = replace(config, device=device.type)
    rows = [dataset] if isinstance(dataset, Tensor) else dataset
    if isinstance(rows, (list, tuple)) and rows and all(_are_rows(x) for x in rows):
        return _in_memory(config, device, rows, ranks)
    stores = None if config.data.store_path is None else list(stores_of(config).values())
    if stores is not None and config.eval.eval_tokens == 0:  # nothing else asks for the model
        return _stored(config, device, stores, ranks, None)
    lm = _language_model(config.model, "model", device, model, tokenizer)
    if config.other_models:
        lm = together(lm, *(_language_model(other, f"other_models.{number}", device, None, None)
                            for number, other in enumerate(config.other_models)))  # fmt: skip
    if stores is not None:
        return _stored(config, device, stores, ranks, lm, dataset)
    sites, places = _places(config.saes)
    widths = [_width(lm, config.saes, site) for site in sites]
    config = _complete(config, device, widths, places, lm)
    contexts, source = _contexts(lm, config), _source(config, dataset, lm, 0, 1)
    data: Resolved = config.data
    batch_rows = _batch_rows(config, ranks)

    def stream_of(rank: int, world: int, alone: bool) -> RowStream:
        text = source if world == 1 else _source(config, dataset, lm, rank, world)
        return RowStream(
            lm, text, sites, contexts, chunk_rows=data.shuffle_tokens, chunks=data.shuffle_chunks,
            batch_rows=batch_rows, seed=config.seed, rank=rank, world=world, max_norm_multiple=data.max_norm_multiple,
            device=device, prefetch=data.prefetch and alone,  # two that read ahead would wait for each other's model
        )  # fmt: skip

    stream = dealt(ranks, stream_of)
    seen = Provenance(
        model=lm.name, revision=lm.revision, sha256=lm.sha256, normalize="none",
        model_dtype=_name(next(lm.model.parameters()).dtype), text=source.description,
        **rows_in_words(contexts.words),
    )  # fmt: skip
    names = [lm.name, *(other.name for other in lm.others)] if lm.others else None
    provenances = _provenances(config, seen, sites, places, widths, names)
    return Plan(config, device, stream, sites, places, provenances, lm, source, contexts)


def _width(lm: LanguageModel, saes: Sequence[SAEConfig], site: Site) -> int:
    for number, sae in enumerate(saes):
        for place, name in zip(sae.sites, sae.site_fields, strict=True):
            if Site.of(place) == site:
                with within(f"saes.{number}", sae, name):
                    return find_place(lm.of(site).model, site).width
    raise AssertionError(f"{site} is of no autoencoder")


def _in_memory(config: TrainConfig, device: torch.device, rows: Sequence[Tensor], ranks: Ranks) -> Plan:
    """Rows that the caller has, one tensor for each site that ``saes`` name, in the order in which they name them."""
    sites, places = _places(config.saes)
    if len(rows) != len(sites):
        raise ValueError(f"dataset must hold a tensor for each of {[str(site) for site in sites]}, got {len(rows)}")
    for x in rows:
        check.floating("dataset", x, dims=2)
    config = _complete(config, device, [x.shape[1] for x in rows], places, None)
    options = {"batch_rows": _batch_rows(config, ranks), "seed": config.seed, "chunk_rows": _chunk_rows(config)}
    stream = dealt(ranks, lambda rank, world, _: TensorStream(rows, rank=rank, world=world, **options))
    provenances = _provenances(config, Provenance(), sites, places, stream.widths)
    return Plan(config, device, stream, sites, places, provenances)


def _stored(
    config: TrainConfig, device: torch.device, stores: list[ActivationStore], ranks: Ranks, lm: LanguageModel | None,
    dataset: Any = None,
) -> Plan:  # fmt: skip
    """From the disk. A language model is for evaluations alone, and has to be the one of the collections."""
    sites, places = _places(config.saes)
    seen = stores[0].provenance
    if lm is not None and lm.sha256 != seen.sha256:
        raise ValueError(
            f"model.model_name: {str(config.data.store_path)!r} was collected from {seen.model!r}, whose weights are "
            f"not those of {lm.name!r}, on which it would be evaluated; name that one, or set eval.eval_tokens to 0"
        )
    manifest = stores[0].manifest
    length = {"context_size": manifest["context_length"]}
    config = replace(config, data=replace(config.data, **length))
    config = _complete(config, device, [store.d_model for store in stores], places, lm)
    options: dict[str, Any] = {"batch_rows": _batch_rows(config, ranks), "seed": config.seed,
                               "chunk_rows": _chunk_rows(config)}  # fmt: skip
    stream = dealt(ranks, lambda rank, world, _: StoreStream(stores, rank=rank, world=world, **options))
    provenances = _provenances(config, seen, sites, places, stream.widths)
    if lm is None:
        return Plan(config, device, stream, sites, places, provenances)
    contexts = contexts_of(
        lm, context_length=manifest["context_length"], batch_size=manifest["batch_size"],
        drop_first=manifest["drop_first"], separator=_token(manifest["separator"]),
        first_token=_token(manifest["first_token"]), exclude_positions=manifest["exclude_positions"],
        exclude_tokens=[_token(word) for word in manifest["exclude_tokens"]],
    )  # fmt: skip
    source = _source(config, dataset, lm, 0, 1)
    return Plan(config, device, stream, sites, places, provenances, lm, source, contexts)


def _token(word: str) -> Any:
    """A token as :func:`contexts_of` takes it, from how a manifest has it."""
    return None if word == "none" else int(word) if word.lstrip("-").isdecimal() else word


def _are_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _complete(
    config: TrainConfig, device: torch.device, widths: Sequence[int], places: Sequence[Places],
    lm: LanguageModel | None,
) -> TrainConfig:  # fmt: skip
    """Without ``auto``."""
    return resolved(
        config, [(widths[reads[0]], widths[writes[0]]) for reads, writes in places],
        max_length=1024 if lm is None else lm.max_length, device_type=device.type,
        embedded=lm is not None and lm.is_embedded,
    )  # fmt: skip


def _source(config: TrainConfig, dataset: Any, lm: LanguageModel, rank: int, world: int) -> Source:
    data = config.data
    with within("data", data, "dataset_path"):
        return open_source(
            data.dataset_path if dataset is None else dataset, dataset_name=data.dataset_name, split=data.split,
            column=data.column, hold_out=data.eval_fraction_documents, rank=rank, world=world,
            seed=config.seed, tokenizer=lm.tokenizer,
        )  # fmt: skip


def _provenances(
    config: TrainConfig, seen: Provenance, sites: Sequence[Site], places: Sequence[Places],
    widths: Sequence[int], names: Sequence[str] | None = None,
) -> dict[str, Provenance]:  # fmt: skip
    """Of each autoencoder: its own place in what all of them have seen."""
    found = {}
    for sae, (reads, writes) in zip(config.saes, places, strict=True):
        if sae.has_sites:
            read, written = (tuple(str(sites[number]) for number in numbers) for numbers in (reads, writes))
            models = None if names is None else tuple(names[sites[number].model] for number in reads)
            known = replace(seen, layer=None, site=None, sites=read, models=models,
                            d=sum(widths[number] for number in reads))  # fmt: skip
            if reads != writes:
                known = replace(known, target_sites=written, d_target=sum(widths[number] for number in writes))
            found[str(sae.name)] = known
            continue
        (into,), (out,) = reads, writes
        known = replace(seen, layer=sites[into].layer, site=sites[into].place, d=widths[into])
        if into != out:
            target: dict[str, Any] = {"target_layer": sites[out].layer, "target_site": sites[out].place}
            known = replace(known, **target, d_target=widths[out])
        found[str(sae.name)] = known
    return found


def _first_documents(source: Source, limit: int) -> list[Any]:
    """At most ``limit`` documents of its first epoch."""
    found: list[Any] = []
    for cursor, document in source.documents():
        if cursor["epoch"] or len(found) == limit:
            break
        found.append(document)
    return found


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device of a process: of several on one machine each has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = check.device_in("device", name)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _language_model(
    named: ModelConfig, part: str, device: torch.device, model: Any, tokenizer: Any
) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    if model is not None:
        return load_language_model(model, tokenizer=tokenizer)
    if tokenizer is None and named.tokenizer_name is not None:
        with within(part, named, "tokenizer_name"):
            tokenizer = load_tokenizer(named.tokenizer_name)
    options = loading_options(named.model_from_pretrained_kwargs)
    if "device_map" not in options:
        own = named.llm_device
        options["device"] = device if own is None else check.device_in(f"{part}.llm_device", own)
    with within(part, named, "model_name"):
        return load_language_model(
            named.model_name, tokenizer=tokenizer, revision=named.revision, dtype=named.dtype, **options
        )


def _places(saes: tuple[SAEConfig, ...]) -> tuple[tuple[Site, ...], tuple[Places, ...]]:
    """All sites, each once, and the numbers of those that each autoencoder reads and reconstructs."""
    sites: dict[Site, int] = {}

    def number(name: str) -> int:
        return sites.setdefault(Site.of(name), len(sites))

    places = []
    for sae in saes:
        numbers = tuple(number(name) for name in sae.sites)  # those of its rule too
        reads = numbers[: len(sae.reads)]
        writes = reads if sae.hook_name_out is None else numbers[len(reads) :][: len(sae.writes)]
        places.append((reads, writes))
    return tuple(sites), tuple(places)


def _contexts(lm: LanguageModel, config: TrainConfig) -> Contexts:
    data: Resolved = config.data
    first, last = data.seqpos_slice
    length = data.context_size
    left_out = sorted({*range(length)} - {*range(length)[first:last]})
    special = [word for word in SPECIAL if getattr(lm.tokenizer, f"{word}_token_id", None) is not None]
    if data.prepend_bos and not {"bos", "eos"} & {*special}:
        raise ConfigError([("data.prepend_bos", f"must be false: no tokenizer of {lm.name!r} has a BOS or EOS token")])
    with within("data", data):
        return contexts_of(
            lm, context_length=length, batch_size=data.store_batch_size_prompts, drop_first=False,
            exclude_positions=left_out, separator=None if data.separator == "none" else data.separator,
            first_token="bos" if data.prepend_bos else None, packing=data.packing,
            exclude_tokens=special if data.exclude_special_tokens else (),
        )


def _batch_rows(config: TrainConfig, ranks: Ranks) -> int:
    tokens, streams = config.optim.train_batch_size_tokens, ranks.streams
    if tokens % streams:
        what = f"must be a multiple of the {streams} processes, got {tokens}"
        raise ConfigError([("optim.train_batch_size_tokens", what)])
    return tokens // streams


def _chunk_rows(config: Resolved) -> int:
    return config.data.shuffle_tokens


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
