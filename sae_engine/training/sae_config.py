"""The configuration of one autoencoder: how it stands in a file, how it is swept, what is built of it."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..autoencoder import SparseAutoencoder
from ..crosscoder import Crosscoder
from ..data.sites import Site
from ..rules import Activation
from ._faults import (
    ConfigError,
    as_tuples,
    auto,
    flag,
    name_of_folder,
    nearest,
    one_of,
    optional,
    place,
    places,
    real,
    settle,
    spread,
    text,
    whole,
)
from .architectures import Architecture, Auto, TopAFASAE, TopKSAE, architecture_named
from .first_weights import directions, own_draws, start_crosscoder, start_from

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """One autoencoder: where it reads, what it is, how it starts. In a file the fields of the architecture stand
    beside the others: ``{hook_name: blocks.8.hook_resid_pre, architecture: topk, k: 64, d_sae: 32768}``.

    Args:
        name: of its folder and its metrics; None: made of place, architecture and what is swept.
        hook_name: the place in the model, as TransformerLens or Hugging Face names it, or the path of any module. A
            list of places makes a crosscoder; ``blocks.{0..11}.hook_resid_mid`` stands for a list.
        hook_name_out: of a transcoder: the place that it reconstructs; of a crosscoder, a list of them.
        wiring: of a crosscoder, as :class:`~sae_engine.Crosscoder` has it: ``"joint"``, ``"causal"`` (a cross-layer
            transcoder), ``"each"`` or ``"local"`` (a transcoder for each layer).
        architecture: one of :mod:`sae_engine.training.architectures`.
        d_sae: latents; of a crosscoder those of each source. None: ``expansion_factor`` times the width of the place.
        normalize_activations: ``"expected_average_only_in"``: rows are scaled by one number, to a mean norm of
            sqrt(d_in), of a crosscoder at each place; ``"standardize"``, of a crosscoder: at each place a mean is taken
            away and the rest scaled to a mean square of 1; ``"layer_norm"``; ``"none"``.
        b_dec_init: where ``b_dec`` starts: ``"geometric_median"`` or ``"mean"`` of the first rows, or ``"zeros"``.
        aux_k_coefficient: weight of AuxK, which revives dead latents; 0: none.
        aux_k: latents of its reconstruction; auto: half of d_in, which the sources of a crosscoder share.
        normalize_decoder: keep the decoder's rows at norm 1; auto: yes, but for crosscoders, whose norms say something.
        decoder_norm: of a crosscoder, the norm of a latent's decoder row: over all places, ``"joint"``, or the sum of
            those at each, ``"sum"``.
        rescale_acts_by_decoder_norm: of a crosscoder: whether its rule sees pre-activations times those norms; rows are
            then to be taken as they are.
        seed: of the first weights; None: the run's.
        from_pretrained: folder or hub name of an autoencoder to start from. Rows are scaled as it says that they were
            in its training; one that does not say it needs ``normalize_activations: none``. A crosscoder starts as it
            is for the model's own rows, however they are scaled now. ``b_dec_init`` then says nothing.
        lr, adam_beta1, sparsity_warm_up_steps: in place of those of ``optim``, for this one; None: those.

    Raises:
        ConfigError: an argument is of another kind or out of range.

    Example:
        >>> from sae_engine.training.architectures import TopKSAE
        >>> config = SAEConfig(hook_name="blocks.8.hook_resid_pre", architecture=TopKSAE(k=64), d_sae=32768)
        >>> config.to_dict()["architecture"], config.to_dict()["k"]
        ('topk', 64)
    """

    name: str | None = None
    hook_name: str | tuple[str, ...]
    hook_name_out: str | tuple[str, ...] | None = None
    wiring: Literal["joint", "causal", "each", "local"] = "joint"
    architecture: Architecture = field(default_factory=TopKSAE)
    d_sae: int | None = None
    expansion_factor: float | None = 16
    normalize_activations: Literal["expected_average_only_in", "standardize", "layer_norm", "none"] = (
        "expected_average_only_in"
    )
    b_dec_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    aux_k_coefficient: float = 1 / 32
    aux_k: Auto | int = "auto"
    normalize_decoder: Auto | bool = "auto"
    decoder_norm: Literal["joint", "sum"] = "joint"
    rescale_acts_by_decoder_norm: bool = False
    seed: int | None = None
    from_pretrained: str | None = None
    lr: float | None = None
    adam_beta1: float | None = None
    sparsity_warm_up_steps: int | None = None

    def __post_init__(self) -> None:
        as_tuples(self, "hook_name", "hook_name_out")
        for side in ("hook_name", "hook_name_out"):
            object.__setattr__(self, side, spread(getattr(self, side)))
        sized = None
        if self.d_sae is None and self.expansion_factor is None:
            sized = "must be given where expansion_factor is not"
        elif isinstance(self.d_sae, int) and getattr(self.architecture, "k", 0) > self.d_sae:
            sized = f"k must not exceed d_sae = {self.d_sae}, got {getattr(self.architecture, 'k')}"  # noqa: B009
        settle(
            self, ("k" if sized and sized.startswith("k") else "d_sae", sized and sized.removeprefix("k ")),
            *(self._of_a_crosscoder() if self.has_sites else self._of_one_place()),
            *(self._of_a_transcoder() if self.hook_name_out is not None and not self.has_sites else ()),
            name=optional(name_of_folder), hook_name=places, hook_name_out=optional(places),
            wiring=one_of("joint", "causal", "each", "local"), architecture=_architecture,
            d_sae=optional(whole()), expansion_factor=optional(real()),
            normalize_activations=one_of("expected_average_only_in", "standardize", "layer_norm", "none"),
            decoder_norm=one_of("joint", "sum"), rescale_acts_by_decoder_norm=flag,
            b_dec_init=one_of("geometric_median", "mean", "zeros"), aux_k_coefficient=real("from 0"),
            aux_k=auto(whole()), normalize_decoder=auto(flag), seed=optional(whole(0)), from_pretrained=optional(text),
            lr=optional(real()), adam_beta1=optional(real("share")), sparsity_warm_up_steps=optional(whole(0)),
        )  # fmt: skip

    def _of_one_place(self) -> Iterator[tuple[str, str]]:
        for name, plain_value in (("decoder_norm", "joint"), ("rescale_acts_by_decoder_norm", False)):
            if getattr(self, name) != plain_value:
                yield name, f"must be {plain_value} for one place: it is a crosscoder's, whose hook_name is a list"
        if self.normalize_activations == "standardize":
            yield "normalize_activations", ("must not be standardize for one place: it is a crosscoder's, whose "
                                            "hook_name is a list")  # fmt: skip

    def _of_a_transcoder(self) -> Iterator[tuple[str, str]]:
        if self.normalize_activations == "layer_norm":
            yield "normalize_activations", ("must not be layer_norm with hook_name_out: what is reconstructed has a "
                                            "mean and a spread of its own")  # fmt: skip
        if isinstance(self.architecture, TopAFASAE):
            yield "hook_name_out", ("must not be given for top_afa, which compares latents with the norm of what is "
                                    "read, as if that were reconstructed")  # fmt: skip

    def _of_a_crosscoder(self) -> Iterator[tuple[str, str]]:
        if not isinstance(self.hook_name, tuple) or not isinstance(self.hook_name_out, tuple | None):
            yield "hook_name_out", f"must be a list as hook_name is, got {self.hook_name_out!r} for {self.hook_name!r}"
            return
        for name, sites in (("hook_name", self.reads), ("hook_name_out", self.writes)):
            if len({Site.of(site) for site in sites if place(site) is None}) < len(sites):
                yield name, f"must name each place once, got {', '.join(sites)}"
        if self.wiring in ("causal", "local") and len(self.reads) != len(self.writes):
            yield "wiring", f"{self.wiring!r} needs as many places to write as to read, got {len(self.writes)}"
        if self.normalize_activations == "layer_norm":
            yield "normalize_activations", "must not be layer_norm with several places"
        if self.rescale_acts_by_decoder_norm and self.normalize_activations != "none":
            yield "normalize_activations", ("must be none with rescale_acts_by_decoder_norm: scales by place would "
                                            "change the norms that the rule sees")  # fmt: skip
        if self.architecture.context:
            yield "architecture", f"{self.architecture.tag} must not be given with several places: it reads another"

    @property
    def has_sites(self) -> bool:
        """Whether it is a crosscoder: it reads, or reconstructs, a list of places."""
        return isinstance(self.hook_name, tuple) or isinstance(self.hook_name_out, tuple)

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the places that it reads."""
        return self.hook_name if isinstance(self.hook_name, tuple) else (self.hook_name,)

    @property
    def writes(self) -> tuple[str, ...]:
        """The names of the places that it reconstructs."""
        if self.hook_name_out is None:
            return self.reads
        return self.hook_name_out if isinstance(self.hook_name_out, tuple) else (self.hook_name_out,)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of all places whose rows it is trained with: what it reads, reconstructs, and gives its rule."""
        out = () if self.hook_name_out is None else self.writes
        return (*self.reads, *out, *self.architecture.context.values())

    @property
    def site_fields(self) -> tuple[str, ...]:
        """Which field says each of :attr:`sites`."""
        out = () if self.hook_name_out is None else self.writes
        fields = ["hook_name"] * len(self.reads) + ["hook_name_out"] * len(out)
        return (*fields, *("architecture" for _ in self.architecture.context))

    @property
    def sources(self) -> int:
        """How many sets of latents it has: one for each place that it reads, unless all are read together."""
        return 1 if self.wiring == "joint" else len(self.reads)

    @property
    def unit_rows(self) -> bool:
        """Whether the decoder's rows are kept at norm 1."""
        return not self.has_sites if self.normalize_decoder == "auto" else self.normalize_decoder

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a file, the architecture's own fields beside the others.

        Example:
            >>> SAEConfig(hook_name="blocks.1.hook_mlp_out").to_dict()["hook_name"]
            'blocks.1.hook_mlp_out'
        """
        return dict(_flat(self))

    def sized(self, d_in: int) -> int:
        """The number of latents over rows of that width.

        Example:
            >>> SAEConfig(hook_name="blocks.1.hook_mlp_out").sized(768)
            12288
        """
        return self.d_sae if self.d_sae is not None else max(round(self.expansion_factor * d_in), 1)  # type: ignore

    def build(
        self, d_in: int, d_out: int, *, steps: int, seed: int, device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32, widths: tuple[Sequence[int], Sequence[int]] | None = None,
        mesh: DeviceMesh | None = None,
    ) -> SparseAutoencoder:  # fmt: skip
        """The autoencoder in training mode, with its first weights: unit rows, tied unless it is a transcoder, and the
        same on every device.

        Args:
            d_in, d_out: width of the rows, and of what is reconstructed; of a crosscoder, of its first places.
            widths: of a crosscoder: of all places that it reads, and that it reconstructs.
            steps: updates of the training.
            seed: of the weights, where the configuration has none. The global generator is left alone.
            mesh: to cut the latents over: every process draws the weights of one device, and keeps its own.

        Raises:
            ConfigError: more latents are to be kept than there are, or ``from_pretrained`` holds something else.

        Example:
            >>> config = SAEConfig(hook_name="blocks.1.hook_mlp_out", d_sae=64)
            >>> config.build(8, 8, steps=100, seed=0).W_enc.shape
            torch.Size([8, 64])
        """
        if self.has_sites:
            made = self._crosscoder(*(widths or ([d_in], [d_out])), steps, seed, dtype, mesh)
            return made.train() if mesh is not None else made.to(device).train()
        coder = self.hook_name_out is not None  # b_dec and the decoder's rows belong to another place than the input
        d_sae = self.sized(d_in)
        kind = self.architecture.resolved(d_in, d_sae, self.normalize_activations)
        layer_norm = "layer_norm" if self.normalize_activations == "layer_norm" else "none"
        if getattr(kind, "k", 0) > d_sae:
            raise ConfigError([("k", f"must not exceed d_sae = {d_sae}, got {getattr(kind, 'k')}")])  # noqa: B009
        with own_draws(mesh):  # what the constructor draws is drawn anew below
            sae = SparseAutoencoder(
                d_in, d_sae, kind.build_rule(d_sae, steps), d_out=d_out, dtype=dtype, mesh=mesh,
                device="cpu" if mesh is None else mesh.device_type, normalize_activations=layer_norm,
                apply_b_dec_to_input=not coder,
            )  # fmt: skip
        if self.from_pretrained is not None:
            scaled = self.normalize_activations == "expected_average_only_in"
            start_from(sae, self.from_pretrained, unit_rows=self.unit_rows, scaled=scaled)
        else:
            generator = torch.Generator("cpu").manual_seed(seed if self.seed is None else self.seed)
            mine = slice(0, d_sae) if sae.shards is None else sae.shards.mine
            share = sae.share
            with torch.no_grad():
                share.W_dec.copy_(directions(d_sae, d_out, generator, mine))
                tied = d_in == d_out and not coder
                share.W_enc.copy_((share.W_dec if tied else directions(d_sae, d_in, generator, mine)).T)
            kind.prepare(sae)
        return sae.train() if mesh is not None else sae.to(device).train()

    def _crosscoder(
        self, reads: Sequence[int], writes: Sequence[int], steps: int, seed: int, dtype: torch.dtype,
        mesh: DeviceMesh | None,
    ) -> Crosscoder:  # fmt: skip
        """Its first weights are those of :class:`~sae_engine.Crosscoder` on a CPU; a rule with a state for each latent
        is made for each source."""
        d_sae = self.sized(reads[0])
        kind = self.architecture.resolved(reads[0], d_sae, self.normalize_activations)

        def rule() -> Activation:
            return kind.build_rule_of(self.sources, d_sae, steps)

        one = rule()
        of_latents = any(t.dim() for t in (*one.parameters(), *one.buffers()))
        with own_draws(mesh):
            torch.manual_seed(seed if self.seed is None else self.seed)
            try:
                coder = Crosscoder(
                    reads, writes, d_sae, [rule() for _ in range(self.sources)] if of_latents else one,
                    wiring=self.wiring, dtype=dtype, decoder_norm=self.decoder_norm, mesh=mesh,
                    device="cpu" if mesh is None else mesh.device_type,
                    rescale_acts_by_decoder_norm=self.rescale_acts_by_decoder_norm,
                )  # fmt: skip
            except ValueError as error:
                raise ConfigError([("architecture", f"{kind.tag} does not fit a crosscoder: {error}")]) from None
            if mesh is not None and mesh.device_type != "cpu":
                torch.manual_seed(seed if self.seed is None else self.seed)
                coder._draw_weights("cpu")
        if self.from_pretrained is not None:
            start_crosscoder(coder, self.from_pretrained)
        return coder


# ------------------------------------------------------------------------------------------------ as dictionaries


def _flat(sae: SAEConfig) -> Iterator[tuple[str, Any]]:
    for entry in fields(sae):
        value = getattr(sae, entry.name)
        if entry.name == "architecture":
            yield "architecture", value.tag
            yield from plain(value).items()
        else:
            yield entry.name, plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, SAEConfig):
        return dict(_flat(value))
    if is_dataclass(value):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def named(sae: SAEConfig, swept: dict[str, Any]) -> SAEConfig:
    """The entry with values of the sweep, and a name that says them."""
    try:
        changed = _changed(sae, swept)
    except ConfigError as error:
        raise error.below("sweep") from None
    place = _briefly(changed.reads) + (f"-to-{_briefly(changed.writes)}" if changed.hook_name_out else "")
    wired = [changed.wiring] if changed.has_sites else []
    said = [place, *wired, _words(changed.architecture.tag)] if sae.name is None else [sae.name]
    known = {"hook_name", "hook_name_out", "wiring", "architecture"} if sae.name is None else set()
    said += [f"{name}{_words(value)}" for name, value in swept.items() if name not in known]
    return replace(changed, name="-".join(said))


def _changed(sae: SAEConfig, swept: dict[str, Any]) -> SAEConfig:
    """The entry with other values of fields, its architecture's among them."""
    kind = _architecture_of(sae, swept.get("architecture", sae.architecture.tag))
    own, general = ({entry.name for entry in fields(one)} for one in (kind, sae))
    others = {name: value for name, value in swept.items() if name not in own and name != "architecture"}
    if unknown := sorted(others.keys() - general):
        raise ConfigError([(unknown[0], f"{kind.tag} has no such field{nearest(unknown[0], own | general)}")])
    kind = replace(kind, **{name: value for name, value in swept.items() if name in own})
    return replace(sae, architecture=kind, **others)


def _architecture_of(sae: SAEConfig, tag: object) -> Architecture:
    """The entry's architecture, or another one with what both have in common."""
    kind = architecture_named(tag)
    if isinstance(sae.architecture, kind) and sae.architecture.tag == tag:
        return sae.architecture
    shared = {entry.name: getattr(sae.architecture, entry.name) for entry in fields(kind)
              if hasattr(sae.architecture, entry.name)}  # fmt: skip
    return kind(**shared)


def _briefly(sites: Sequence[str]) -> str:
    """Places as a part of a name: ``blocks.0.hook_resid_mid_11.hook_resid_mid`` would say no more than the ends."""
    return _words(sites[0]) if len(sites) == 1 else f"{_words(sites[0])}_to_{_words(sites[-1])}"


def _words(value: Any) -> str:
    """A value as a part of a name."""
    if isinstance(value, float):
        value = f"{value:g}"
    return re.sub(r"[^\w.+=@-]+", "_", "_".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _architecture(value: Any) -> str | None:
    if isinstance(value, Architecture):
        return _unfit(type(value))
    return f"must be one of sae_engine.training.architectures, such as TopKSAE(k=32), got {value!r}"


def architecture_in_a_file(tag: object) -> type[Architecture]:
    """The class that a file names.

    Raises:
        ConfigError: there is none, or a user's is not one that can stand in a file.

    Example:
        >>> architecture_in_a_file("topk").__name__
        'TopKSAE'
    """
    kind = architecture_named(tag)
    if (what := _unfit(kind)) is not None:
        raise ConfigError([("architecture", what)])
    return kind


def _unfit(kind: type[Architecture]) -> str | None:
    """What keeps a class from standing in a file and being read again."""
    if "__dataclass_fields__" not in kind.__dict__:
        return f"must be a dataclass: {kind.__name__} lacks @dataclass(frozen=True, kw_only=True)"
    if "<locals>" in kind.tag:
        return f"must be at the top of a module, where a configuration finds it, got {kind.tag}"
    if taken := sorted({entry.name for entry in fields(kind)} & {entry.name for entry in fields(SAEConfig)}):
        return f"must not have fields that every entry of saes has: {kind.__name__} has {', '.join(taken)}"
    return None
