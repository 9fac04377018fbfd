"""SparseAutoencoder: parameters, conventions and the forward pass around a selection rule."""
from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional
from ._decoder_rows import decoder_norms, unit_rows
from ._encoder import linear_dtype
from ._running import Product
from .codes import SparseCodes
from .distributed import passes
from .functional import Encoded, EncodeInfo
from .provenance import Provenance
from .rules.base import Activation

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .checkpoints.card import SourceCard
    from .distributed.shards import Shards

__all__ = ["SparseAutoencoder"]

NORMALIZATIONS = ("none", "layer_norm", "center")
LAYER_NORM_EPS = 1e-5


class SparseAutoencoder(nn.Module):
    """Encoder, selection rule, decoder. Parameters are named and shaped as SAELens does.

    ``encode``: ``select((x - b_dec) @ W_enc + b_enc)``; ``decode``: ``codes @ W_dec + b_dec``; ``forward`` does both.

    Args:
        d_in: width of the input.
        d_sae: number of latents.
        activation: the selection rule, for example ``TopK(32)``.
        d_out: width of the output where it is not the input's (a transcoder). ``b_dec`` is (d_out,) and is subtracted
            from the input only where the widths agree.
        skip: add a linear map ``W_skip`` (d_out, d_in) of the input to the output; starts at zero.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding.
        normalize_activations: ``"none"``, or ``"layer_norm"``: each token minus its mean, over its standard deviation
            (unbiased) + 1e-5; after decoding times the standard deviation, plus the mean, as SAELens and OpenAI do;
            or ``"center"``: each token minus its mean, which is added after decoding. An autoencoder of a mean-centred
            residual stream (TransformerLens) so takes a raw one (Hugging Face) as well.
        rescale_acts_by_decoder_norm: the rule sees, and codes hold, ``pre * ||W_dec row||``; ``decode`` divides.
        decoder_init_norm: norm of the decoder rows at the start. ``W_enc`` starts as ``W_dec.T``, biases as 0.
        dtype: of the parameters, as ``torch.bfloat16`` or ``"bfloat16"``.
        device: of the parameters. The rule's parameters and buffers go to the device too, in their own dtypes.
        contiguous_parameters: how ``W_enc`` lies in memory; results are the same to rounding. True: row-major, which
            LBFGS, ``parameters_to_vector`` and FSDP2 need of every parameter. False: latent-contiguous, strides
            (1, d_in), with which a :class:`~sae_engine.training.TrainStep` is 3 to 19 % faster; all else hardly
            notices. None: row-major, until a ``TrainStep`` lays it out anew for itself; on a mesh by latent.
        mesh: a ``DeviceMesh`` over whose ranks the latents are cut, as :func:`sae_engine.distributed.from_env` makes
            it. Parameters are DTensors; every rank brings its own tokens and gets its own codes and outputs, which are
            those of one device. A gradient is that of the sum of all ranks' losses.

    With :class:`TopAFA` and :class:`Gated` there is no encoder bias: ``b_enc`` is 0 and not trained.

    Attributes:
        card: where it was loaded from and what its input has to be, a :class:`~sae_engine.checkpoints.card.SourceCard`;
            None for one made here. It is saved along.
        provenance: where it belongs and what it was trained on, a :class:`Provenance`; None where nothing says so. Set
            it after training on a store: ``sae.provenance = store.provenance``. It is saved along.

    Raises:
        TypeError: ``activation`` is no rule, or an argument is of another kind; names it.
        ValueError: an argument is out of range, or the rule keeps more entries than there are latents.
        TypeError: with a mesh, the rule cannot say how it selects where each rank has some of the latents.

    Example:
        >>> sae = SparseAutoencoder(4, 16, se.TopK(2))
        >>> x = torch.randn(3, 4)
        >>> codes = sae.encode(x)
        >>> codes.shape, sae.decode(codes).shape
        (torch.Size([3, 16]), torch.Size([3, 4]))
        >>> torch.equal(sae(x), sae.decode(codes))
        True
    """

    has_sites: ClassVar[bool] = False  # whether it reads and writes several, as a Crosscoder does
    activation: Activation
    W_skip: Tensor | None
    card: SourceCard | None
    _provenance: Provenance | None = None
    shards: Shards | None = None  # with a mesh: which latents are whose
    _share: tuple[SparseAutoencoder, ...] = ()

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        d_out: int | None = None,
        skip: bool = False,
        apply_b_dec_to_input: bool = True,
        normalize_activations: str = "none",
        rescale_acts_by_decoder_norm: bool = False,
        decoder_init_norm: float = 1.0,
        contiguous_parameters: bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        self.d_in = check.integer_k(d_in, name="d_in")
        self.d_sae = check.integer_k(d_sae, name="d_sae")
        self.d_out = self.d_in if d_out is None else check.integer_k(d_out, name="d_out")
        if not isinstance(activation, Activation):
            raise TypeError(f"activation must be an sae_engine activation such as TopK(32), got {activation!r}")
        if normalize_activations not in NORMALIZATIONS:
            raise ValueError(f"normalize_activations must be one of {NORMALIZATIONS}, got {normalize_activations!r}")
        if normalize_activations != "none" and self.d_out != d_in:
            raise ValueError(
                f"normalize_activations={normalize_activations!r} needs d_out = d_in, got d_out={d_out}, d_in={d_in}"
            )
        dtype = None if dtype is None else check.dtype_in("dtype", dtype)
        device = check.device_or_default(device)
        decoder_init_norm = check.positive("decoder_init_norm", decoder_init_norm)
        check.flag("skip", skip)
        if contiguous_parameters is not None:
            check.flag("contiguous_parameters", contiguous_parameters)
        if getattr(activation, "sources", 1) > 1:
            raise ValueError(f"activation must choose among the latents of one source, {type(activation).__name__} "
                             "does among those of several, a Crosscoder's")  # fmt: skip
        k = getattr(activation, "k", None)
        if k is not None and k > d_sae:
            raise ValueError(f"activation keeps k={k} of d_sae={d_sae} latents: k must not exceed d_sae")
        self.card = None
        self.activation = activation
        self.apply_b_dec_to_input = check.flag("apply_b_dec_to_input", apply_b_dec_to_input) and self.d_out == d_in
        self.normalize_activations = normalize_activations
        self.rescale_acts_by_decoder_norm = check.flag("rescale_acts_by_decoder_norm", rescale_acts_by_decoder_norm)
        if mesh is not None:
            self.shards = passes.shards_of(mesh, self, device, dtype)
            device = torch.device(self.shards.mesh.device_type) if device is None else device

        options: dict[str, Any] = {"dtype": dtype, "device": device, "shards": self.shards}
        W_dec = unit_rows(d_sae, self.d_out, **options) * decoder_init_norm
        W_enc = W_dec.clone() if self.d_out == d_in else unit_rows(d_sae, d_in, **options) * decoder_init_norm
        by_latent = contiguous_parameters is False or (mesh is not None and contiguous_parameters is None)
        self.W_enc = nn.Parameter(W_enc.T if by_latent else W_enc.T.contiguous())
        del options["shards"]
        self._may_lay_out = contiguous_parameters is None
        self.W_dec = nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(torch.zeros(len(W_dec), **options), requires_grad=activation.encoder_bias)
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **options))
        self.register_parameter("W_skip", nn.Parameter(torch.zeros(self.d_out, d_in, **options)) if skip else None)
        self.register_state_dict_post_hook(_contiguous)
        self.activation.to(self.W_enc.device)  # its dtypes are its own: a threshold stays as exact as it was made
        if self.shards is not None:
            self._share = (passes.split(self, self.shards),)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._share:
            passes.rejoin(self, self._share[0])
        return self

    @property
    def share(self) -> SparseAutoencoder:
        """With a mesh, this rank's latents as an autoencoder of so many, in the same memory; otherwise itself."""
        return passes.as_it_is_now(self, self._share[0]) if self._share else self

    def encode(
        self, x: Tensor, *, memory_budget: int | None = None, backend: str = "auto", **context: Tensor
    ) -> SparseCodes:
        """Codes of ``x`` (*batch_shape, d_in), over (*batch_shape, d_sae).

        Args:
            memory_budget: bytes of pre-activations that may exist at a time, as in :func:`functional.encode_with`.
            context: what the rule needs and the autoencoder does not know. ``gradient`` (*batch_shape, d_out), the
                gradient of the language model's loss at the reconstructed activations, becomes
                :class:`GradientTopK`'s ``attribution``.

        Raises:
            TypeError: ``x`` is no floating-point tensor, or the context is not what the rule takes.
            ValueError: ``x`` has another width or device than the autoencoder.

        Example:
            >>> SparseAutoencoder(4, 16, se.TopK(2)).encode(torch.ones(3, 4)).to_padded()[1].shape
            torch.Size([3, 2])
        """
        return self.encode_with(
            x, select=None, keep_pre=False, memory_budget=memory_budget, backend=backend, **context
        ).codes[0]

    def encode_with(
        self, x: Tensor, *, select: Any = None, keep_pre: bool = False, memory_budget: int | None = None,
        backend: str = "auto", **context: Tensor,
    ) -> Encoded:  # fmt: skip
        """:meth:`encode` with what a pass gives beside the codes of the autoencoder's own rule.

        Args:
            select: other rules than :attr:`activation`, one or a sequence; they share one matrix product and one
                backward pass: ``encode_with(x, select=[sae.activation, AuxTopK(256)], dead_mask=dead)``.
            keep_pre: whether the pre-activations (*batch_shape, d_sae) that the rules saw come along, differentiable.
                A backward pass then holds on to the whole matrix, which codes alone spare it.
            memory_budget: bytes of pre-activations that may exist at a time, as in :func:`functional.encode_with`.
            context: as in :meth:`encode`, for all of the rules.

        Returns:
            ``codes``, a tuple with one for each rule; ``info``, what :meth:`decode` needs of the input with layer
            norm, centring or skip; ``pre``, None without ``keep_pre``.

        Raises:
            TypeError, ValueError: as :meth:`encode`; and ValueError where ``select`` is empty.

        Example:
            >>> sae = SparseAutoencoder(4, 16, se.TopK(2))
            >>> rules = [sae.activation, se.TopK(4)]
            >>> (own, wider), info, pre = sae.encode_with(torch.ones(3, 4), select=rules, keep_pre=True)
            >>> own.k, wider.k, pre.shape
            (2, 4, torch.Size([3, 16]))
        """
        if self.shards is not None:
            return passes.encode_with(self, x, select, keep_pre, memory_budget, backend, context)
        rules = self.activation if select is None else select
        x, info = self._normalized(x)
        known: dict[str, Any] = {**self._context(x, rules), **context}
        if "gradient" in known:
            known["attribution"] = self._attribution(known.pop("gradient"), x, info)
        scale = self._norms_of(self) if self.rescale_acts_by_decoder_norm else None
        b_dec = self.b_dec if self.apply_b_dec_to_input else None
        encoded = functional.encode_with(
            x, self.W_enc, self._encoder_bias, b_dec=b_dec, scale=scale, select=rules, keep_pre=keep_pre,
            memory_budget=memory_budget, backend=backend, **known,
        )  # fmt: skip
        return encoded._replace(info=info)

    def decode(self, codes: SparseCodes, info: EncodeInfo | None = None, *, backend: str = "auto") -> Tensor:
        """(*batch_shape, d_out). ``info`` from :meth:`encode_with` is needed with layer norm, centring or skip.

        Raises:
            TypeError: ``codes`` is no :class:`SparseCodes`.
            ValueError: it has other latents than the autoencoder, or ``info`` lacks what is needed.

        Example:
            >>> sae = SparseAutoencoder(4, 16, se.TopK(2), normalize_activations="layer_norm")
            >>> (codes,), info, _ = sae.encode_with(torch.randn(3, 4))
            >>> sae.decode(codes, info).shape
            torch.Size([3, 4])
        """
        if not isinstance(codes, SparseCodes):
            raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}")
        if codes.num_latents != self.d_sae:
            raise ValueError(f"codes must have d_sae = {self.d_sae} latents, got {codes.num_latents}")
        info = EncodeInfo() if info is None else info
        needed: dict[str, tuple[Tensor | None, ...]] = {}
        if self.normalize_activations == "layer_norm":
            needed["normalize_activations"] = (info.mean, info.std)
        if self.normalize_activations == "center":
            needed["normalize_activations"] = (info.mean,)
        if self.W_skip is not None:
            needed["skip"] = (info.skipped,)
        for cause, parts in needed.items():
            for part in parts:
                if part is None or part.shape[:-1] != codes.batch_shape:
                    raise ValueError(
                        f"info is needed because of {cause}, for the same {tuple(codes.batch_shape)} tokens as codes: "
                        "pass encode_with(x).info"
                    )
        if self.shards is not None:
            return passes.decode_own(self, codes, info, backend)
        codes = self._divided_by_norms(codes)
        dtype = linear_dtype(codes.values, self.W_dec)
        wide = torch.promote_types(dtype, torch.float32) if needed else dtype  # what is summed up is rounded once
        out = functional.decode(codes, self.W_dec, self.b_dec, result_dtype=wide, backend=backend)
        return self._finished(out, info, dtype)

    def _divided_by_norms(self, codes: SparseCodes) -> SparseCodes:
        """What the decoder multiplies: where codes hold values times norms, these are divided out."""
        if not self.rescale_acts_by_decoder_norm:
            return codes
        norms = self._norms_of(self)
        norms = torch.where(norms == 0, 1.0, norms)  # a zero row decodes to zero, whatever it is divided by
        values = codes.values / functional.at_latents(norms, codes)
        return codes.replace(values=values.to(codes.values.dtype))

    def _finished(self, out: Tensor, info: EncodeInfo, dtype: torch.dtype) -> Tensor:
        """The sums of decoder rows with layer norm and centring undone and the skip connection added, in ``dtype``."""
        if info.std is not None:
            out = out * info.std
        if info.mean is not None:
            out = out + info.mean
        if self.W_skip is not None and info.skipped is not None:
            out = out + functional.linear(info.skipped, self.W_skip.T, result_dtype=out.dtype)
        return out.to(dtype)

    def forward(self, x: Tensor, **context: Tensor) -> Tensor:
        """The reconstruction (*batch_shape, d_out). In training, rules with a threshold learn from this call.

        ``context`` as in :meth:`encode`.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
        if self.shards is not None:
            return passes.forward(self, x, context)
        (codes,), info, _ = self.encode_with(
            x, select=None, keep_pre=False, memory_budget=None, backend="auto", **context
        )
        codes.assert_fits()
        self.activation.update(codes)
        return self.decode(codes, info)

    @torch.no_grad()
    def _attribution(self, gradient: Tensor, x: Tensor, info: EncodeInfo) -> Product:
        """(*batch_shape, d_sae): what the loss changes by per unit of each code, by way of the reconstruction."""
        check.floating("gradient", gradient)
        check.shaped("gradient", gradient, (*x.shape[:-1], self.d_out), x, why="that of the reconstruction")
        if info.std is not None:
            gradient = gradient * info.std
        norms = self._norms_of(self).clamp(min=1e-30) if self.rescale_acts_by_decoder_norm else None
        return Product(gradient.detach(), self.W_dec.detach().T, norms, functional.linear)

    @property
    def provenance(self) -> Provenance | None:
        return self._provenance

    @provenance.setter
    def provenance(self, value: Provenance | None) -> None:
        if value is not None:
            if not isinstance(value, Provenance):
                raise TypeError(f"provenance must be a Provenance or None, got {type(value).__name__}")
            for name, got, width in (("d", value.d, self.d_in), ("d_target", value.d_target, self.d_out)):
                if got not in (None, width):
                    raise ValueError(f"provenance has {name} = {got}, the autoencoder {width}: it is another place's")
        self._provenance = value

    @property
    def sources(self) -> tuple[Any, ...]:
        """Sets of latents with an encoder and a decoder each: itself alone; several of a :class:`Crosscoder`."""
        return (self,)

    reads = property(lambda self: slice(0, self.d_in), doc="Columns of the input that the latents read: all.")
    writes = property(lambda self: slice(0, self.d_out), doc="Columns of the output that they write: all.")

    def _norms_of(self, source: Any) -> Tensor:
        """(F,) decoder norms of a source, fp32 or wider; differentiable."""
        return decoder_norms(source.W_dec)

    def _skips(self) -> list[tuple[Tensor, slice, slice]]:
        """Linear maps past the latents: each weight (d_out, d_in), and the columns that it reads and writes."""
        return [] if self.W_skip is None else [(self.W_skip, self.reads, self.writes)]

    def _side_by_side(self, x: Tensor, *, of: str = "reads", name: str = "x") -> Tensor:
        """``x`` (*batch, sites, d) of several sites as (*batch, sites * d)."""
        return x

    @property
    def _encoder_bias(self) -> Tensor | None:
        return self.b_enc if self.activation.encoder_bias else None

    @torch.no_grad()
    def _lay_out_by_latent(self) -> None:
        """Makes ``W_enc`` latent-contiguous, in other memory, unless ``contiguous_parameters=True`` forbids it.

        The parameter stays the same object. For a moment there are two of it.
        """
        plain = type(self.W_enc) is nn.Parameter  # a subclass may keep its numbers elsewhere
        if plain and self._may_lay_out and self.W_enc.is_contiguous():
            self.W_enc.data = self.W_enc.data.T.contiguous().T

    def _normalized(self, x: Tensor) -> tuple[Tensor, EncodeInfo]:
        """What the encoder sees of ``x``, and what decoding needs to know of it."""
        check.floating("x", x)
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x must have d_in = {self.d_in} in its last dimension, got shape {tuple(x.shape)}")
        check.same_device("x", x, self.W_enc)
        info = EncodeInfo(skipped=x if self.W_skip is not None else None)
        if self.normalize_activations == "none":
            return x, info
        # In fp32 or wider: in 16 bits an offset that all of a token's numbers share would leave few bits of the rest.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean(-1, keepdim=True)
        if self.normalize_activations == "layer_norm":
            std = wide.std(-1, keepdim=True)
            info, wide = info._replace(mean=mean, std=std), (wide - mean) / (std + LAYER_NORM_EPS)
        else:
            info, wide = info._replace(mean=mean), wide - mean
        return wide.to(torch.promote_types(x.dtype, self.W_enc.dtype)), info

    def _context(self, x: Tensor, select) -> dict[str, Tensor]:
        """What the rules asked for and the autoencoder knows, constant for autograd, in fp32 or wider."""
        rules = select if isinstance(select, list | tuple) else (select,)
        wanted = frozenset().union(*(getattr(rule, "context_keys", ()) for rule in rules))
        context = {}
        if "target_norm" in wanted:
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            # Codes have to be as long as what decoder rows add up to, x - b_dec, whether the encoder subtracts b_dec
            # too or has it folded into b_enc. The b_dec of a transcoder to another width belongs to another space.
            centred = wide - self.b_dec.detach() if self.d_out == self.d_in else wide
            context["target_norm"] = centred.norm(dim=-1)
        if "weight_norm" in wanted:
            norms = decoder_norms(self.W_dec.detach())
            context["weight_norm"] = torch.ones_like(norms) if self.rescale_acts_by_decoder_norm else norms
        return context

    def save_pretrained(self, path: str | PathLike, format: str | None = None) -> None:
        """Writes a checkpoint, whole or not at all; files that are there are replaced.

        Args:
            path: a folder; of formats of one file (``"openai"``, ``"gemma_scope"``) also that file's name.
            format: ``"saelens"``, which holds everything, or another of :data:`sae_engine.checkpoints.formats.FORMATS`.
                Decoder norms, and ``b_dec`` on the input, are folded into the encoder where a format knows neither. Of
                a :class:`Crosscoder` ``"sae_engine"``, or another of ``checkpoints.crosslayer.formats.FORMATS``.

        Raises:
            ValueError: ``format`` is unknown or cannot hold this autoencoder; says what would be lost.
            TypeError: the activation is not one of this library's.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     SparseAutoencoder(4, 16, se.TopK(2)).save_pretrained(folder)
            ...     SparseAutoencoder.from_pretrained(folder).activation
            TopK(k=2)
        """
        from .checkpoints import formats

        formats.save(self, path, format=format)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike, *, format: str = "auto", device=None, dtype: torch.dtype | str | None = None,
        activation_scale: float | None = None, residual: str | None = None, fold_decoder_norms: bool = False,
        mesh: DeviceMesh | None = None,
    ):  # fmt: skip
        """An autoencoder from a checkpoint of SAELens, sparsify, dictionary_learning, OpenAI, Gemma Scope, Llama Scope,
        circuit-tracer or BatchTopK.

        What its input has to be stands in :attr:`card`: ``print(sae.card)``.

        Args:
            path: a folder, a file of weights, or ``owner/repository[/folder][/file]`` of the Hugging Face hub.
            format: ``"auto"`` decides by what the files hold; or a key of
                :data:`sae_engine.checkpoints.formats.READ`. Folders of crosscoders, and of whole transcoder sets, are
                read by :class:`Crosscoder`'s; its formats are ``checkpoints.crosslayer.formats.READ``.
            device: where the parameters go; the default device.
            dtype: of the parameters; that of the file. Thresholds keep theirs.
            activation_scale: what multiplied the activations in training, for SAELens' ``expected_average_only_in``:
                sqrt(d_in) over their mean norm; by default what ``activation_scaler.json`` beside the files says. It
                is folded into the weights.
            residual: ``"mean-centred"`` or ``"raw"``, what it was trained on, where the card would be wrong.
                One trained on mean-centred activations is loaded with ``normalize_activations="center"``.
            fold_decoder_norms: give the decoder's rows norm 1, and encoder and thresholds their norms, so that a latent
                is as large as what it adds; for ReLU and JumpReLU, whose reconstruction stays the same.
            mesh: a ``DeviceMesh`` to cut the latents over: all ranks call it, and each reads its own.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ConnectionError: the hub does not answer.
            ValueError: a file is damaged, hostile, of no known format, or describes something this class cannot be;
                says what is wrong. Pickles are opened as tensors alone (``weights_only=True``).

        Example:
            >>> path = "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre"  # doctest: +SKIP
            >>> sae = SparseAutoencoder.from_pretrained(path)  # doctest: +SKIP
        """
        from .checkpoints import formats

        return formats.load(
            cls, path, format=format, device=device, dtype=dtype, activation_scale=activation_scale, residual=residual,
            fold_decoder_norms=fold_decoder_norms, mesh=mesh,
        )  # fmt: skip

    __prepare_scriptable__ = check.no_torchscript

    def extra_repr(self) -> str:
        square = self.d_in == self.d_out
        options = {
            "d_out": "" if square else self.d_out, "skip": self.W_skip is not None,
            "apply_b_dec_to_input": "False" if square and not self.apply_b_dec_to_input else "",
            "normalize_activations": "" if self.normalize_activations == "none" else repr(self.normalize_activations),
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm, "dtype": self.W_enc.dtype,
            "device": self.W_enc.device,
        }  # fmt: skip
        unusual = "".join(f", {name}={value}" for name, value in options.items() if value)
        return f"d_in={self.d_in}, d_sae={self.d_sae}{unusual}"


def _contiguous(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """``state_dict`` holds row-major copies of latent-contiguous ``W_enc``: safetensors takes no other layout."""
    for name in [name for name in state if name == f"{prefix}W_enc" or name.startswith(f"{prefix}W_enc.")]:
        is_asked_for = isinstance(state[name], nn.Parameter)  # itself, by keep_vars=True
        if not is_asked_for and module.shards is None:
            state[name] = state[name].contiguous()
