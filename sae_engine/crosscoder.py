"""Crosscoder: latents that read and write several layers or models; cross-layer transcoders among them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from ._decoder_rows import decoder_norms, norms_by_site, uniform_rows
from ._encoder import linear_dtype
from ._sources import below_one_another, decode_together, encode_together, parts_of
from ._wiring import columns_of, ranges_of, widths_of
from .autoencoder import SparseAutoencoder, _contiguous
from .codes import SparseCodes
from .distributed import passes, source_passes
from .functional import Encoded, EncodeInfo
from .rules import Activation
from .rules.per_source import chooses_alone, rule_for, rule_of
from .source import Source

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Crosscoder", "Source"]

DECODER_NORMS = ("joint", "sum")


class Crosscoder(SparseAutoencoder):
    """Latents that read and write several sites: layers of a model, or several models.

    A *source* is a set of ``d_sae`` latents with an encoder of its own, which reads some of the sites and writes some.
    Row f of its decoder is one vector over all of these, so that one gather serves them all.

    ``encode`` and ``forward`` take ``(*batch_shape, sites, d)`` where all widths are equal, or the sites side by side,
    ``(*batch_shape, sum of widths)``; ``forward`` answers in kind, ``decode`` side by side. ``b_dec`` is not subtracted
    from the input. Codes of several sources have batch shape ``(sources, *batch_shape)`` over ``d_sae`` latents.

    Args:
        reads: widths of the sites that are read.
        writes: widths of the sites that are reconstructed.
        d_sae: latents of each source.
        activation: the selection rule. One that ranks tokens (:class:`TopK`) chooses for each source, one that ranks
            a batch (:class:`BatchTopK`) among the latents of all sources. A sequence holds a rule for each source; so
            must those with a state for each latent (:class:`JumpReLU`) come.
        wiring: ``"joint"``, one source that reads and writes all sites: an acausal crosscoder, of two models a model
            diff. ``"causal"``, source s reads site s and writes s and all later ones: a cross-layer transcoder.
            ``"each"``, source s reads site s and writes all. ``"local"``, source s reads and writes site s: a set of
            transcoders. Or a pair ``(reads, writes)`` for each source, each the number of a site or the ``range`` of
            some.
        skip: add a linear map of each site read to the one of the same number; starts at zero.
        decoder_norm: what the norm of a latent is, by which ``rescale_acts_by_decoder_norm`` ranks:
            ``"joint"``, of its decoder row over all sites (cross-layer transcoders), or ``"sum"`` of those at
            each site (crosscoders).
        rescale_acts_by_decoder_norm: the rule sees, and codes hold, ``pre * norm``; ``decode`` divides.
        dtype: of the parameters.
        device: of the parameters and the rule.
        mesh: a ``DeviceMesh`` over whose ranks the latents of every source are cut, as of a
            :class:`SparseAutoencoder`.

    Weights start uniform, the encoder's within ``±d_sae^-1/2``, the decoder's within ``±(sum of writes)^-1/2``.

    Source: Lindsey et al. 2024 (Sparse Crosscoders), Ameisen et al. 2025 (Circuit Tracing).

    Attributes:
        W_enc: of each source (width read, d_sae), latent by latent in memory.
        W_dec: of each source (d_sae, width written).
        b_enc: (sources, d_sae).
        b_dec: (sum of writes,).
        W_skip: of each site (width written, width read), or None.
        sources: one :class:`Source` each.

    Raises:
        TypeError, ValueError: an argument is of another kind or out of range; names it.

    Example:
        >>> coder = Crosscoder([4, 6], [4, 6], 16, se.TopK(3))  # two models side by side
        >>> x = torch.randn(5, 10)
        >>> coder(x).shape, [y.shape[-1] for y in coder.split(coder(x))]
        (torch.Size([5, 10]), [4, 6])
        >>> clt = Crosscoder([4, 4, 4], [4, 4, 4], 16, se.TopK(3), wiring="causal")
        >>> codes = clt.encode(torch.randn(5, 3, 4))
        >>> codes.shape, clt.decode(codes, sites=2).shape
        (torch.Size([3, 5, 16]), torch.Size([5, 4]))
    """

    has_sites = True
    W_enc: nn.ParameterList  # type: ignore[assignment]
    W_dec: nn.ParameterList  # type: ignore[assignment]
    W_skip: nn.ParameterList | None  # type: ignore[assignment]

    def __init__(
        self,
        reads: Sequence[int],
        writes: Sequence[int],
        d_sae: int,
        activation: Activation | Sequence[Activation],
        *,
        wiring: Any = "joint",
        skip: bool = False,
        decoder_norm: str = "joint",
        rescale_acts_by_decoder_norm: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.read_widths, self.written_widths = widths_of("reads", reads), widths_of("writes", writes)
        self.wiring = ranges_of(wiring, len(self.read_widths), len(self.written_widths))
        self.d_in, self.d_out = sum(self.read_widths), sum(self.written_widths)
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        if decoder_norm not in DECODER_NORMS:
            raise ValueError(f"decoder_norm must be one of {DECODER_NORMS}, got {decoder_norm!r}")
        self.decoder_norm = decoder_norm
        self.rescale_acts_by_decoder_norm = check.flag("rescale_acts_by_decoder_norm", rescale_acts_by_decoder_norm)
        if check.flag("skip", skip) and len(self.read_widths) != len(self.written_widths):
            raise ValueError(f"skip maps each site to the one of its number, got {len(self.read_widths)} in reads and "
                             f"{len(self.written_widths)} in writes")  # fmt: skip
        self.activation = rule_for(activation, len(self.wiring), self.d_sae)
        self.normalize_activations, self.apply_b_dec_to_input, self.card = "none", False, None
        self._may_lay_out = False
        dtype = torch.get_default_dtype() if dtype is None else check.dtype_in("dtype", dtype)
        device = check.device_or_default(device)
        if mesh is not None:
            self.shards = passes.shards_of(mesh, self, device, dtype)
            device = torch.device(self.shards.mesh.device_type) if device is None else device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        of_latents, rows = self._first_weights(**options)
        self.W_enc = nn.ParameterList(columns.T for columns in of_latents)
        self.W_dec = nn.ParameterList(rows)
        self.b_enc = nn.Parameter(torch.zeros(len(rows), len(rows[0]), **options))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **options))
        skips = [torch.zeros(d_out, d_in, **options)
                 for d_in, d_out in zip(self.read_widths, self.written_widths, strict=False)]  # fmt: skip
        self.W_skip = nn.ParameterList(skips) if skip else None
        self.register_state_dict_post_hook(_contiguous)
        self.activation.to(self.b_dec.device)
        if self.shards is not None:
            self._share = (passes.split(self, self.shards),)

    @classmethod
    def clt(cls, layers: int, d: int, d_sae: int, activation: Activation | Sequence[Activation], **options: Any):
        """A cross-layer transcoder: the latents of layer s read it and write it and all later ones.

        Args:
            layers: number of layers.
            d: width of each.
            d_sae, activation: as of the class; ``options`` are its other arguments.

        Raises:
            TypeError, ValueError: as the class.

        Example:
            >>> Crosscoder.clt(3, 4, 16, se.TopK(2))(torch.randn(5, 3, 4)).shape
            torch.Size([5, 3, 4])
        """
        widths = [check.integer_k(d, name="d")] * check.integer_k(layers, name="layers")
        return cls(widths, widths, d_sae, activation, **{"wiring": "causal", **options})

    def _first_weights(self, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Of each source what its latents read, one a row, and what they write; on a mesh, those of mine.

        They are drawn where the ``options`` say: another device draws other numbers.
        """
        sides = (self.read_widths, self.d_sae**-0.5), (self.written_widths, self.d_out**-0.5)
        encoders, decoders = (
            [uniform_rows(self.d_sae, sum(widths[site] for site in of_source[side]), limit, shards=self.shards,
                          **options) for of_source in self.wiring]
            for side, (widths, limit) in enumerate(sides)
        )  # fmt: skip
        return encoders, decoders

    @torch.no_grad()
    def _draw_weights(self, device: str) -> None:
        """Gives both matrices the values that are drawn on another device."""
        drawn = self._first_weights(dtype=self.b_dec.dtype, device=device)
        for source, read, written in zip(self.share.sources, *drawn, strict=True):
            source.W_enc.copy_(read.T)
            source.W_dec.copy_(written)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(
            Source(self, number, columns_of(self.read_widths, read), columns_of(self.written_widths, written), read,
                   written)
            for number, (read, written) in enumerate(self.wiring)
        )  # fmt: skip

    def encode_with(
        self, x: Tensor, *, select: Any = None, keep_pre: bool = False, memory_budget: int | None = None,
        backend: str = "auto", **context: Tensor,
    ) -> Encoded:  # fmt: skip
        """:meth:`encode` with what a pass gives beside the codes, as :meth:`SparseAutoencoder.encode_with`.

        Of several sources, codes are (sources, *batch_shape, d_sae), and a context for each latent, as ``dead_mask``,
        is (sources, d_sae). ``keep_pre`` is for rules that choose for each source.

        Raises:
            TypeError, ValueError: as :meth:`encode`; and ValueError where ``select`` is empty, or ``keep_pre`` is asked
                for with a rule that chooses among all sources.

        Example:
            >>> clt = Crosscoder.clt(2, 4, 16, se.TopK(2))
            >>> clt.encode_with(torch.randn(5, 2, 4), keep_pre=True).pre.shape
            torch.Size([2, 5, 16])
        """
        rules = (self.activation,) if select is None else tuple(select) if isinstance(select, list | tuple) else (
            select,)  # fmt: skip
        if self.shards is not None:
            return source_passes.encode_with(self, x, rules, keep_pre, memory_budget, backend, context)
        return self._encoded(x, rules, keep_pre, memory_budget, backend, context)

    def _encoded(
        self, x: Tensor, rules: Sequence[Activation], keep_pre: bool, memory_budget: int | None, backend: str,
        context: dict[str, Tensor],
    ) -> Encoded:  # fmt: skip
        """By the latents that are here: on a mesh, those of a share."""
        x, info = self._normalized(x)
        sources = self.sources
        if not rules:
            raise ValueError("select must hold at least one activation module, got none")
        alone = [chooses_alone(rule, len(sources)) for rule in rules]
        if keep_pre and not all(alone):
            raise ValueError("keep_pre=True needs rules that choose for each source, not among all of them")
        scales = [self._norms_of(s) if self.rescale_acts_by_decoder_norm else None for s in sources]
        parts: list[list[SparseCodes]] = [[] for _ in rules]
        pres = []
        for source, scale in zip(sources, scales, strict=True):
            own = [rule_of(rule, source.number) for rule, mine in zip(rules, alone, strict=True) if mine]
            if not own:
                continue
            known = {name: of_source(t, source) for name, t in context.items()}
            encoded = functional.encode_with(
                x[..., source.reads], source.W_enc, source.b_enc, scale=scale, select=own, keep_pre=keep_pre,
                memory_budget=memory_budget, backend=backend, **known,
            )  # fmt: skip
            pres.append(encoded.pre)
            found = iter(encoded.codes)
            for of_rule, mine in zip(parts, alone, strict=True):
                if mine:
                    of_rule.append(next(found))
        codes = [
            below_one_another(of_rule) if mine else self._together(rule, x, scales, memory_budget, backend)
            for rule, mine, of_rule in zip(rules, alone, parts, strict=True)
        ]
        pre = None
        if keep_pre:
            pre = pres[0] if len(sources) == 1 else torch.stack([p for p in pres if p is not None])
        return Encoded(tuple(codes), info, pre)

    def _together(
        self, rule: Activation, x: Tensor, scales: Sequence[Tensor | None], memory_budget: int | None, backend: str
    ) -> SparseCodes:
        sources = self.sources
        return encode_together(
            rule, [x[..., s.reads] for s in sources], [s.W_enc for s in sources], [s.b_enc for s in sources], scales,
            memory_budget=memory_budget, backend=backend,
        )  # fmt: skip

    def decode(
        self, codes: SparseCodes, info: EncodeInfo | None = None, *, sites: int | None = None, backend: str = "auto"
    ) -> Tensor:
        """(*batch_shape, d_out), the sites side by side; or the columns of one of them.

        Args:
            codes: of all sources, as :meth:`encode` returns them.
            info: from :meth:`encode_with`; needed with ``skip``.
            sites: the number of the only site to reconstruct: only its columns of the decoders are read.

        Raises:
            TypeError: ``codes`` is no :class:`SparseCodes`.
            ValueError: it has other latents or sources, ``info`` lacks what is needed, or there is no such site.

        Example:
            >>> clt = Crosscoder.clt(2, 4, 16, se.TopK(2))
            >>> codes = clt.encode(torch.randn(5, 2, 4))
            >>> torch.allclose(clt.decode(codes, sites=1), clt.split(clt.decode(codes))[1], atol=1e-6)
            True
        """
        self._check_codes(codes)
        chosen = range(len(self.written_widths)) if sites is None else self._site(sites)
        columns = columns_of(self.written_widths, chosen)
        if self.W_skip is not None:
            tokens = codes.batch_shape if len(self.wiring) == 1 else codes.batch_shape[1:]
            if info is None or info.skipped is None or info.skipped.shape[:-1] != tokens:
                raise ValueError(f"info is needed because of skip, for the same {tuple(tokens)} tokens as codes: pass "
                                 "encode_with(x).info")  # fmt: skip
        if self.shards is not None:
            return source_passes.decode_own(self, codes, info, columns, backend)
        return self._past_decoders(self._sums(codes, columns, backend), codes, info, columns)

    def _sums_of(self, number: int, x: Tensor) -> Tensor:
        """(tokens, width written) of one source's decoder rows, from the rows of the sites that it reads alone."""
        if self.shards is not None:
            return source_passes.sums_of(self, number, x)
        return self._own_sums_of(number, x)

    def _all_sums(self, codes: SparseCodes) -> Tensor:
        """(tokens, d_out) of the decoder rows of all sources."""
        return self._sums(codes) if self.shards is None else source_passes.sums_own(self, codes)

    def _own_sums_of(self, number: int, x: Tensor) -> Tensor:
        source = self.sources[number]
        scale = self._norms_of(source) if self.rescale_acts_by_decoder_norm else None
        (codes,), _, _ = functional.encode_with(x, source.W_enc, source.b_enc, scale=scale, select=source.activation)
        return functional.decode(self._to_decode(codes, source), source.W_dec)

    def _past_decoders(self, sums: Tensor, codes: SparseCodes, info: EncodeInfo | None, columns: slice) -> Tensor:
        """What the sums of decoder rows become with ``b_dec`` and ``W_skip``."""
        out = sums + self.b_dec[columns]
        for weight, read, written in self._skips():
            if info is not None and info.skipped is not None and (at := _overlap(written, columns)) is not None:
                out[..., at[1]] += functional.linear(info.skipped[..., read], weight.T, result_dtype=out.dtype)
        return out.to(linear_dtype(codes.values, self.b_dec))

    def _sums(self, codes: SparseCodes, columns: slice | None = None, backend: str = "auto") -> Tensor:
        """(*batch_shape, columns) of decoder rows alone, without ``b_dec`` and ``W_skip``, in fp32 or wider."""
        columns = slice(0, self.d_out) if columns is None else columns
        parts = parts_of(codes, len(self.wiring))
        wide = torch.promote_types(linear_dtype(codes.values, self.b_dec), torch.float32)
        written = []
        for source, part in zip(self.sources, parts, strict=True):
            if (at := _overlap(source.writes, columns)) is not None:
                written.append((self._to_decode(part, source), source.W_dec[:, at[0]], at[1].start))
        return decode_together(written, parts[0].batch_shape, columns.stop - columns.start, wide, backend)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """The reconstruction, its sites as those of ``x`` come. In training, rules with a threshold learn from it.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
        if self.shards is not None:
            out = source_passes.forward(self, x, context)
        else:
            (codes,), info, _ = self._encoded(x, (self.activation,), False, None, "auto", context)
            codes.assert_fits()
            self.activation.update(codes)
            out = self.decode(codes, info)
        in_sites = x.shape[-1] != self.d_in and len(set(self.written_widths)) == 1
        return out.unflatten(-1, (len(self.written_widths), -1)) if in_sites else out

    def split(self, y: Tensor, *, of: str = "writes") -> tuple[Tensor, ...]:
        """The sites (*batch_shape, d) of a reconstruction, or of an input; views.

        Args:
            y: the sites side by side, or ``(*batch_shape, sites, d)``.
            of: ``"writes"`` or ``"reads"``: whose widths count.

        Raises:
            TypeError, ValueError: an argument is of another kind, or of neither form; names it.

        Example:
            >>> coder = Crosscoder([4, 2], [3], 16, se.TopK(2))
            >>> [part.shape[-1] for part in coder.split(torch.ones(5, 6), of="reads")]
            [4, 2]
        """
        if of not in ("writes", "reads"):
            raise ValueError(f"of must be 'writes' or 'reads', got {of!r}")
        widths = self.written_widths if of == "writes" else self.read_widths
        return self.flat(y, of=of, name="y").split(widths, dim=-1)

    def flat(self, x: Tensor, *, of: str = "reads", name: str = "x") -> Tensor:
        """(*batch_shape, sum of widths) of either form: the sites side by side.

        Args:
            x: ``(*batch_shape, sites, d)`` or already side by side.
            of: ``"reads"`` or ``"writes"``: whose widths count.
            name: of the argument, for errors.

        Raises:
            TypeError, ValueError: ``x`` is no floating-point tensor, or of neither form.

        Example:
            >>> Crosscoder.clt(2, 4, 16, se.TopK(2)).flat(torch.ones(5, 2, 4)).shape
            torch.Size([5, 8])
        """
        check.floating(name, x)
        widths = self.read_widths if of == "reads" else self.written_widths
        if x.shape[-1] == sum(widths):
            return x
        if x.dim() > 1 and len(set(widths)) == 1 and tuple(x.shape[-2:]) == (len(widths), widths[0]):
            return x.flatten(-2)
        both = f" or (*batch_shape, {len(widths)}, {widths[0]})" if len(set(widths)) == 1 else ""
        raise ValueError(f"{name} must be (*batch_shape, {sum(widths)}), the sites of widths {widths} side by side"
                         f"{both}, got shape {tuple(x.shape)}")  # fmt: skip

    def site_norms(self) -> Tensor:
        """(sources, d_sae, written sites) norms of what each latent writes at each site, fp32 or wider; differentiable
        unless the latents are cut over a mesh, whose ranks all ask for it.

        Example:
            >>> Crosscoder.clt(2, 4, 16, se.TopK(2)).site_norms()[1, :, 0].any().item()  # nothing is written before
            False
        """
        if self.shards is not None:
            return source_passes.site_norms(self)
        return self._own_site_norms()

    def _own_site_norms(self) -> Tensor:
        rows = []
        for source in self.sources:
            norms = norms_by_site(source.W_dec, [self.written_widths[t] for t in source.written_sites])
            before, after = source.written_sites.start, len(self.written_widths) - source.written_sites.stop
            rows.append(nn.functional.pad(norms, (before, after)))
        return torch.stack(rows)

    def norms_of(self, source: Source) -> Tensor:
        """(d_sae,) decoder norms of a source as ``decoder_norm`` defines them, fp32 or wider; differentiable.

        Raises:
            IndexError: the source is another's.

        Example:
            >>> coder = Crosscoder([4, 6], [4, 6], 16, se.TopK(3), decoder_norm="sum")
            >>> torch.equal(coder.norms_of(coder.sources[0]), coder.site_norms()[0].sum(1))
            True
        """
        W_dec = self.W_dec[source.number]
        if self.decoder_norm == "joint":
            return decoder_norms(W_dec)
        return norms_by_site(W_dec, [self.written_widths[t] for t in source.written_sites]).sum(1)

    def _norms_of(self, source: Any) -> Tensor:
        return self.norms_of(source)

    def _skips(self) -> list[tuple[Tensor, slice, slice]]:
        if self.W_skip is None:
            return []
        sites = [range(t, t + 1) for t in range(len(self.read_widths))]
        return [(weight, columns_of(self.read_widths, site), columns_of(self.written_widths, site))
                for weight, site in zip(self.W_skip, sites, strict=True)]  # fmt: skip

    def _side_by_side(self, x: Tensor, *, of: str = "reads", name: str = "x") -> Tensor:
        return self.flat(x, of=of, name=name)

    def _normalized(self, x: Tensor) -> tuple[Tensor, EncodeInfo]:
        x = self.flat(x)
        check.same_device("x", x, self.b_dec)
        return x, EncodeInfo(skipped=x if self.W_skip is not None else None)

    def _context(self, x: Tensor, select) -> dict[str, Tensor]:
        return {}  # no rule of its own takes any

    def _to_decode(self, codes: SparseCodes, source: Source) -> SparseCodes:
        """Codes of one source as its decoder multiplies them."""
        if not self.rescale_acts_by_decoder_norm:
            return codes
        norms = self._norms_of(source)
        values = codes.values / functional.at_latents(torch.where(norms == 0, 1.0, norms), codes)
        return codes.replace(values=values.to(codes.values.dtype))

    def _check_codes(self, codes: SparseCodes) -> None:
        if not isinstance(codes, SparseCodes):
            raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}")
        if codes.num_latents != self.d_sae:
            raise ValueError(f"codes must have d_sae = {self.d_sae} latents, got {codes.num_latents}")
        if len(self.wiring) > 1 and codes.batch_shape[:1] != (len(self.wiring),):
            raise ValueError(f"codes must have batch shape ({len(self.wiring)}, …), one a source, got "
                             f"{tuple(codes.batch_shape)}")  # fmt: skip

    def _site(self, number: Any) -> range:
        if (site := check.integer_in(number)) is None:
            raise TypeError(f"sites must be None or the number of a site, got {number!r}")
        if not 0 <= site < len(self.written_widths):
            raise ValueError(f"sites must lie in 0..{len(self.written_widths) - 1}, got {site}")
        return range(site, site + 1)

    def _lay_out_by_latent(self) -> None:
        """They are so from the start."""

    def extra_repr(self) -> str:
        shown = [f"reads={list(self.read_widths)}", f"writes={list(self.written_widths)}", f"d_sae={self.d_sae}",
                 f"sources={len(self.wiring)}"]  # fmt: skip
        options = {"skip": self.W_skip is not None, "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
                   "decoder_norm": "'sum'" if self.decoder_norm == "sum" else "", "dtype": self.b_dec.dtype,
                   "device": self.b_dec.device}  # fmt: skip
        return ", ".join([*shown, *(f"{name}={value}" for name, value in options.items() if value)])


def of_source(context: Any, source: Source) -> Any:
    """A source's part of a context for each latent of all sources."""
    several = isinstance(context, Tensor) and context.shape == (len(source.coder.wiring), source.d_sae)
    return context[source.number] if several else context


def _overlap(part: slice, whole: slice) -> tuple[slice, slice] | None:
    """Where two ranges of columns overlap, counted from the start of each; None where they do not."""
    first, end = max(part.start, whole.start), min(part.stop, whole.stop)
    if first >= end:
        return None
    return slice(first - part.start, end - part.start), slice(first - whole.start, end - whole.start)
