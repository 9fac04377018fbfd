"""What ``"auto"`` means in a configuration: a number, once the model's widths and the length of the run are known.

The rules are those of the papers and libraries that the architectures name, for runs of any length. Short runs, of
fewer than 20,000 updates, are ours: a larger learning rate, a warm-up of 5 % and latents that count as dead after 10 %
of the tokens, so that what is made for billions of tokens does something within a million. An autoencoder that is
trained further has at most the rate of a long run, and a smaller one in few updates, which would not make up for what a
large one undoes first.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._slabs import total_memory_bytes
from ..data.sites import Site
from ._faults import ConfigError, within
from .config import TrainConfig
from .sae_config import SAEConfig

if TYPE_CHECKING:
    from ..data.store import ActivationStore

SHORT = 20_000  # updates
_WARM_UP = 1_000
_FASTEST = 4.0  # times the rate of a long run. FVU after 192 updates: .31 at that rate, .25 at 2 × it, .21 at 4 × it
# Updates from which further training has the rate of a long run. FVU .121 before; 20 updates at ¼, 1 and 4 × that rate:
# .121, .123, .134; 100 updates: .1205, .1209, .124.
_FURTHER = 400
_DEAD_AFTER = 10_000_000
_CHUNK = {"cuda": 262_144, "cpu": 16_384}
_MIB = 2**20
_MEMORY_SHARE = 8  # of all memory, whatever is free: the same run has the same chunks, and so the same bits


def resolved(
    config: TrainConfig, widths: Sequence[tuple[int, int]], *, max_length: int, device_type: str, embedded: bool
) -> TrainConfig:
    """The configuration of the same run in which no ``"auto"`` is left, and no sweep.

    What differs between autoencoders (learning rates of different widths, say) stands in their entries, and then
    ``optim`` has the first one's.

    Args:
        widths: of the rows and of what is reconstructed, for each autoencoder of ``config.expanded()``; of a
            crosscoder, of the first places.
        max_length: of the language model's contexts.
        device_type: ``"cuda"`` or ``"cpu"``: where the autoencoders go unless the configuration says it.
        embedded: whether the language model is the embedded one, whose runs are short.

    Raises:
        ConfigError: something does not fit the model: more latents are kept than there are, a context is longer than
            the model's, a batch larger than the run.
        ValueError: ``widths`` are not one for each autoencoder.

    Example:
        >>> from sae_engine.training.presets import preset
        >>> config = resolved(preset("embedded"), [(256, 256)], max_length=256, device_type="cpu", embedded=True)
        >>> config.optim.lr, config.optim.dead_after, config.saes[0].aux_k, config.data.context_size
        (0.00181, 100000, 128, 256)
    """
    config = config.expanded()
    if len(widths) != len(config.saes):
        raise ValueError(f"widths must have one pair for each of {len(config.saes)} autoencoders, got {len(widths)}")
    config = replace(config, device=device_type if config.device == "auto" else config.device)
    config = _data(config, max_length, embedded)
    updates = config.updates
    saes: list[SAEConfig] = []
    faults: list[tuple[str, str]] = []
    for number, (sae, (d_in, _)) in enumerate(zip(config.saes, widths, strict=True)):
        try:
            saes.append(_sae(sae, d_in))
        except ConfigError as error:
            faults += error.below(f"saes.{number}").faults
    if faults:
        raise ConfigError(faults)
    return _run(_optim(replace(config, saes=tuple(saes)), updates), updates, embedded)


def widths_of(config: TrainConfig) -> tuple[list[tuple[int, int]], int, bool]:
    """What :func:`resolved` wants to know, without a model's weights where its configuration says it: the widths, the
    longest context, and whether the model is the embedded one.

    Raises:
        OSError: there is no such model, or the hub does not answer and the model is not in its cache.
        ValueError: there is no such site in the model.
        ImportError: transformers is not installed.

    Example:
        >>> from sae_engine.training.presets import preset
        >>> widths_of(preset("embedded"))
        ([(256, 256)], 256, True)
    """
    saes = config.expanded().saes
    if config.data.store_path is not None:
        stores = stores_of(config)
        of_site = {site: store.d_model for site, store in stores.items()}
        pairs = [(of_site[Site.of(sae.reads[0])], of_site[Site.of(sae.writes[0])]) for sae in saes]
        return pairs, next(iter(stores.values())).manifest["context_length"], False
    from ..data.models import EMBEDDED, model_sizes

    model, wide = config.model, config.model.model_from_pretrained_kwargs
    with within("model", model, "model_name"):
        width, length, layers = model_sizes(model.model_name, revision=model.revision,
                                            trust_remote_code=bool(wide.get("trust_remote_code")))  # fmt: skip
    for number, sae in enumerate(saes):
        for site, field in zip(sae.sites, sae.site_fields, strict=True):
            layer = Site.of(site).layer
            if layer is not None and layer >= layers:
                what = f"{site}: layer must be in 0..{layers - 1}, got {layer}"
                raise ConfigError([(f"saes.{number}.{field}", what)])
    others = {site for sae in saes for site in sae.sites}
    known = {site: width for site in others if _on_the_stream(site) and not Site.of(site).model}
    if missing := others - known.keys():
        known |= _measured(config, missing)
    pairs = [(known[sae.reads[0]], known[sae.writes[0]]) for sae in saes]
    return pairs, length, model.model_name == EMBEDDED


def stores_of(config: TrainConfig) -> dict[Site, ActivationStore]:
    """The collections of the sites that the autoencoders read: ``data.store_path`` itself, or the folders in it, as
    :func:`~sae_engine.data.collect_sites` writes them.

    Raises:
        ConfigError: ``store_path`` is not given, or holds no activations of a site.
        ValueError, OSError: a collection is damaged or not whole.

    Example:
        >>> import tempfile
        >>> from sae_engine.training.config import DataConfig
        >>> lm, folder = se.data.load_language_model(), tempfile.mkdtemp()
        >>> _ = se.data.collect_activations(lm, ["A text of some tokens."], folder, layer=2, progress=False)
        >>> saes = [SAEConfig(hook_name="blocks.2.hook_resid_pre")]
        >>> [str(site) for site in stores_of(TrainConfig(saes=saes, data=DataConfig(store_path=folder)))]
        ['blocks.2.hook_resid_pre']
    """
    from ..data.store import MANIFEST, ActivationStore

    if config.data.store_path is None:
        raise ConfigError([("data.store_path", "must be given")])
    path = Path(config.data.store_path).expanduser()
    below = [] if (path / MANIFEST).exists() else sorted(place.parent for place in path.glob(f"*/{MANIFEST}"))
    found = {}
    with within("data", config.data, "store_path"):
        stores = [ActivationStore(folder) for folder in below or [path]]
    for store in stores:
        found[Site.of(store.manifest["site"], store.manifest["layer"])] = store
    for site in (wanted := [Site.of(name) for sae in config.expanded().saes for name in sae.sites]):
        if site not in found:
            there = ", ".join(map(str, found))
            raise ConfigError([("data.store_path", f"{str(path)!r} holds no activations of {site}; it holds {there}")])
    return {site: found[site] for site in wanted}


def _on_the_stream(site: str) -> bool:
    """Whether a site's rows are as wide as the residual stream in every model."""
    return Site.of(site).name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")


def _measured(config: TrainConfig, sites: set[str]) -> dict[str, int]:
    """The widths of any sites, in the model itself."""
    from ..data.loading import loading_options
    from ..data.models import load_language_model
    from ..data.places import find_place

    named = config.model
    with within("model", named, "model_name"):
        lm = load_language_model(named.model_name, revision=named.revision, dtype=named.dtype,
                                 **loading_options(named.model_from_pretrained_kwargs))  # fmt: skip
    models = [lm, *(load_language_model(other.model_name, revision=other.revision, dtype=other.dtype,
                                        **loading_options(other.model_from_pretrained_kwargs))
                    for other in config.other_models)]  # fmt: skip
    found = {}
    for number, sae in enumerate(config.expanded().saes):
        for site, field in zip(sae.sites, sae.site_fields, strict=True):
            if site in sites:
                with within(f"saes.{number}", sae, field):
                    found[site] = find_place(models[Site.of(site).model].model, site).width
    return found


# ------------------------------------------------------------------------------------------------ the rules


def _filled(part: Any, **values: Any) -> Any:
    """A part of the configuration with numbers where it has ``"auto"``."""
    return replace(part, **{name: value for name, value in values.items() if getattr(part, name) == "auto"})


def _data(config: TrainConfig, max_length: int, embedded: bool) -> TrainConfig:
    data, optim = config.data, config.optim
    if data.context_size != "auto" and data.context_size > max_length:
        raise ConfigError([("data.context_size", f"must not exceed the model's {max_length}, got {data.context_size}")])
    device = torch.device(config.device)
    step = data.shuffle_chunks * optim.train_batch_size_tokens
    chunk = max(round(_CHUNK["cuda" if device.type == "cuda" else "cpu"] / step), 1) * step
    data = _filled(data, context_size=min(max_length, 1024), shuffle_tokens=chunk,
                   prefetch=device.type == "cuda" and not optim.cuda_graphs,
                   training_tokens=1_000_000 if embedded else 100_000_000)  # fmt: skip
    return replace(config, data=data)


def _sae(sae: SAEConfig, d_in: int) -> SAEConfig:
    d_sae = sae.sized(d_in)
    kind = sae.architecture.resolved(d_in, d_sae, sae.normalize_activations)
    sae = _filled(sae, aux_k=min(max(d_in // (2 * sae.sources), 1), d_sae), normalize_decoder=sae.unit_rows)
    if sae.aux_k > d_sae:  # type: ignore[operator]
        raise ConfigError([("aux_k", f"must not exceed d_sae = {d_sae}, got {sae.aux_k}")])
    return replace(sae, architecture=kind, d_sae=d_sae, expansion_factor=None)


def _optim(config: TrainConfig, updates: int) -> TrainConfig:
    short = updates < SHORT
    factor = min(_FASTEST, math.sqrt(SHORT / updates)) if short else 1.0
    further = min(1.0, math.sqrt(updates / _FURTHER))
    tokens = config.data.training_tokens
    assert tokens != "auto"
    optim = _filled(
        config.optim,
        lr_warm_up_steps=updates // 20 if short else _WARM_UP,
        lr_decay_steps=updates // 5,
        dead_after=max(min(_DEAD_AFTER, tokens // 10), 1) if short else _DEAD_AFTER,
    )
    device = torch.device(config.device)
    here = device.type != "cuda" or torch.cuda.is_available()  # else it is another machine's memory
    if optim.memory_budget is None and here:
        share = total_memory_bytes(device) // _MEMORY_SHARE
        optim = replace(optim, memory_budget=max(share // _MIB, 1) * _MIB)
    config = replace(config, optim=optim)
    own: dict[str, list[Any]] = {
        "lr": [_rate(sae, further if sae.from_pretrained else factor) for sae in config.saes],
        "adam_beta1": [sae.architecture.adam_beta1 for sae in config.saes],
        "sparsity_warm_up_steps": [0 if sae.from_pretrained else sae.architecture.sparsity_warm_up(updates)
                                   for sae in config.saes],
    }
    for name, values in own.items():
        if getattr(config.optim, name) == "auto":
            config = _each(config, name, values)
    return config


def _rate(sae: SAEConfig, factor: float) -> float:
    """The architecture's own, times ``factor``, in four digits."""
    return float(f"{sae.architecture.learning_rate(sae.sized(1)) * factor:.4g}")


def _each(config: TrainConfig, name: str, values: Sequence[Any]) -> TrainConfig:
    """A number for each autoencoder that does not say it itself: in ``optim`` where they agree."""
    said = [getattr(sae, name) for sae in config.saes]
    taken = [value if own is None else own for value, own in zip(values, said, strict=True)]
    config = replace(config, optim=replace(config.optim, **{name: taken[0]}))
    if len(set(taken)) == 1:
        return config
    saes = [replace(sae, **{name: value}) for sae, value in zip(config.saes, taken, strict=True)]
    return replace(config, saes=tuple(saes))


def _run(config: TrainConfig, updates: int, embedded: bool) -> TrainConfig:
    return replace(
        config,
        eval=_filled(config.eval, eval_steps=max(updates // 10, 1), eval_tokens=16_384 if embedded else 65_536),
        logger=_filled(config.logger, logging_steps=min(max(updates // 100, 1), 100)),
        output=replace(_filled(config.output, save_steps=min(max(updates // 10, 1), 5_000)),
                       output_path=_output(config)),
    )  # fmt: skip


def _output(config: TrainConfig) -> str:
    """The run folder, with a name that no folder has yet in place of ``auto``."""
    path = Path(config.output.output_path)
    if path.name != "auto":
        return config.output.output_path
    model = Path(config.data.store_path or config.model.model_name).name
    many = "" if len(config.saes) == 1 else f"-and-{len(config.saes) - 1}-more"
    name = f"{model}-{config.saes[0].name}{many}"
    names = (name, *(f"{name}-{number}" for number in range(2, 10_000)))
    return str(next(path.with_name(free) for free in names if not path.with_name(free).exists()))
