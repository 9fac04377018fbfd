"""The last part of a step: gradients latent by latent, and Adam, at once or one after the other."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae_kernels._rounding import are_narrow
from sae_kernels.ops import ops
from sae_kernels.reference import without_parallel_part
from sae_kernels.stock.moments import FusedAdam, Keys, keys

from .. import _checks as check
from ..autoencoder import SparseAutoencoder, decoder_norms
from ..distributed.share import everyones
from ._over_groups import Part
from .backward import Backward
from .forward import Weights

ON_GPU = 1 << 26  # elements of a temporary: a chunk costs a GPU a dozen launches, and fills it many times over


def rows_of_a_chunk(d_sae: int, d_out: int, device_type: str) -> int:
    """Rows of the decoder's gradient that are worked on at a time, lest temporaries be as large as itself."""
    return -(-d_sae // 16) if device_type == "cpu" else max(ON_GPU // d_out, 1)


def latent_adam(
    terms: tuple[list, ...], x: Tensor, along: Tensor | None, parameters: list[Tensor], exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor], copies: list[Tensor], *, step: Tensor, lr: Tensor, betas: tuple[float, float],
    eps: float, weight_decay: float, unit_rows: bool, skip: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients that ``terms`` add up to, used up by Adam as they come: ``reference.latent_adam``."""
    center, square = ops.latent_adam(
        parameters, exp_avgs, exp_avg_sqs, copies, x, along, *terms, step, lr, *betas, eps, weight_decay,
        unit_rows, skip, backend,
    )  # fmt: skip
    # Kernels write through pointers: whoever caches by version has to hear of it.
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *copies])
    return center, square


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` whose update is made by a :class:`TrainStep`.

    State and ``state_dict`` are torch's: ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter, in its layout. The
    learning rate is a tensor on the device. ``moments`` is the dtype of those of W_dec and W_enc. Where groups of ranks
    have the same latents, the moments are of the ``part`` that this rank updates.
    """

    def __init__(
        self, sae: SparseAutoencoder, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        moments: torch.dtype,
    ) -> None:  # fmt: skip
        self.part = None if sae.shards is None or sae.shards.across is None else Part(sae)
        # In the order of the operator, which tells them apart by it.
        self.matrices = [matrix for source in sae.sources for matrix in (source.W_dec, source.W_enc)]
        learned = [p for p in sae.parameters() if p.requires_grad]
        if not learned:
            raise ValueError("sae has no parameter that requires a gradient")
        lr = check.positive("lr", lr)
        super().__init__(learned, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # Only now the tensor: torch would compare it with 0, and so wait for the device.
        self.options["lr"] = torch.full((), lr, dtype=torch.float32, device=learned[0].device)
        for p in learned:
            kept = moments if any(p is matrix for matrix in self.matrices) else p.dtype
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(self.mine(p), dtype=kept, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(self.mine(p), dtype=kept, memory_format=torch.preserve_format),
            }

    def mine(self, parameter: Tensor) -> Tensor:
        """Of a parameter, what this rank updates."""
        return parameter.detach() if self.part is None else self.part.of(parameter)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """Runs the update of a :class:`TrainStep`; there is no other."""
        if closure is None:
            raise RuntimeError("this optimizer steps inside TrainStep: call the step, not the optimizer")
        return closure()

    @property
    def options(self) -> dict:
        """The one parameter group."""
        return self.param_groups[0]

    def counted(self, parameters: list[Tensor], skipped: Tensor | None) -> Tensor:
        """Advances the parameters' step counters, unless ``skipped`` () float32 is 1; returns one of them."""
        counters = [self.state[p]["step"] for p in parameters]
        if skipped is None:
            torch._foreach_add_(counters, 1.0)
        else:  # a single tensor would be read by the host, as a number
            torch._foreach_add_(counters, [1 - skipped] * len(counters))
        return counters[0]

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        return state["exp_avg"], state["exp_avg_sq"]

    def apply(self, gradients: dict[Tensor, Tensor], skipped: Tensor | None) -> None:
        """torch's fused Adam on the parameters with these gradients, unless ``skipped`` () float32 is 1.

        Of what has latents, on this rank's part, whose gradients these are.
        """
        if not gradients:
            return
        options, parameters = self.options, list(gradients)
        mine = [self.mine(p) for p in parameters]
        # Latents of a row-major encoder are not together in memory: they are updated elsewhere.
        held = [view if is_together(view) else view.contiguous() for view in mine]
        views = [
            [contiguous_view(t, like=here) for t in (here, gradients[p].to(p.dtype), *self.moments(p))]
            for p, here in zip(parameters, held, strict=True)
        ]
        rows, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*views, strict=True))
        update = FusedAdam(
            found_inf=skipped, beta1=options["betas"][0], beta2=options["betas"][1], lr=options["lr"],
            weight_decay=options["weight_decay"], eps=options["eps"],
        )  # fmt: skip
        self.counted(parameters, skipped)
        update(rows, grads, exp_avgs, exp_avg_sqs, [self.state[p]["step"] for p in parameters],
               [self._keys(p, here) for p, here in zip(parameters, held, strict=True)])  # fmt: skip
        for view, here in zip(mine, held, strict=True):
            if here is not view:
                view.copy_(here)

    def _keys(self, parameter: Tensor, mine: Tensor) -> Keys | None:
        """How this step rounds the moments of a matrix, where it does, as :func:`contiguous_view` shows them."""
        if self.moments(parameter)[0].dtype == parameter.dtype:
            return None
        number = next(n for n, matrix in enumerate(self.matrices) if matrix is parameter) % 2
        latents, width = reversed(mine.shape) if number else mine.shape
        by_column = number == 1 and mine.is_contiguous()
        return keys(self.state[parameter]["step"], number, slice(0, latents), width, by_column=by_column)

    def load_state_dict(self, state_dict: dict) -> None:
        """From a state of ours or of ``torch.optim.Adam`` over the same parameters.

        It is copied into the tensors that are here, each in its parameter's layout: a captured CUDA graph points to
        them.

        Raises:
            ValueError: moments are in bfloat16 there and in float32 here, or the other way round.
        """
        rate, ours = self.options["lr"], [self.state[p] for p in self.options["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        theirs = [state_dict["state"].get(number, {}) for number in numbers]
        for p, mine, saved in zip(self.options["params"], ours, theirs, strict=False):  # torch compares their number
            for name in ("exp_avg", "exp_avg_sq"):
                if name in saved and are_narrow(saved[name], p) != are_narrow(mine[name], p):
                    raise ValueError(
                        f"{name} of a parameter of shape {tuple(p.shape)} was saved in {saved[name].dtype} and is kept "
                        f"in {mine[name].dtype} here: make the step with moments={saved[name].dtype}"
                    )
        # torch would copy all moments, in the dtype of the parameters, to the device, where they may not fit twice.
        super().load_state_dict({**state_dict, "state": {}})
        rate.fill_(self.options["lr"])
        self.options.update(lr=rate, fused=True, foreach=None, capturable=False)
        for p, mine, saved in zip(self.options["params"], ours, theirs, strict=True):
            for name, tensor in mine.items():
                value = torch.as_tensor(saved.get(name, 0.0))  # nothing there: it has not stepped yet
                if value.data_ptr() != tensor.data_ptr():  # a checkpoint of a mesh is read into these very tensors
                    tensor.copy_(value)
            self.state[p] = mine


def is_together(tensor: Tensor) -> bool:
    """Whether it or its transpose is contiguous."""
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.T.is_contiguous())


def contiguous_view(tensor: Tensor, *, like: Tensor) -> Tensor:
    """``tensor`` or its transpose, as makes ``like`` contiguous: fused kernels look at memory, not at strides."""
    if like.is_contiguous():
        return tensor.contiguous()
    if like.dim() == 2 and like.T.is_contiguous():
        return tensor.T.contiguous()
    raise ValueError(f"a parameter of shape {tuple(like.shape)} and strides {like.stride()} has holes in memory")


class Copies:
    """The weights in the dtype of the computation, made again where somebody else has written the parameters.

    That is noticed by the parameters' versions and addresses; what is written in place through ``.data`` or NumPy moves
    neither, and nothing short of reading all parameters before each step would tell: ``TrainStep.refresh`` is for that.
    Where they are not ``kept``, the parameters serve themselves.
    """

    def __init__(self, sae: SparseAutoencoder, dtype: torch.dtype, *, kept: bool = True) -> None:
        self.sae, self.dtype, self.kept = sae, dtype, kept
        self.weights: list[Weights] | None = None  # of each source
        self.made_of: tuple[tuple[int, int], ...] = ()

    @property
    def needed(self) -> bool:
        return self.kept and self.dtype != self.sae.sources[0].W_dec.dtype

    def current(self) -> list[Weights]:
        masters = [Weights(source.W_dec.detach(), source.W_enc.detach().T) for source in self.sae.sources]
        if not self.needed:
            return masters
        if self.weights is None or self.made_of != self._state():
            if self.weights is None or self.weights[0].decoder.device != masters[0].decoder.device:
                self.weights = [
                    Weights(*(torch.empty(t.shape, dtype=self.dtype, device=t.device) for t in of_source))
                    for of_source in masters
                ]
            for copies, of_source in zip(self.weights, masters, strict=True):
                for copy, master in zip(copies, of_source, strict=True):
                    copy.copy_(master)
            self.written()
        return self.weights

    def written(self) -> None:
        """The copies hold what the parameters hold now."""
        self.made_of = self._state()

    def _state(self) -> tuple[tuple[int, int], ...]:
        matrices = (t for source in self.sae.sources for t in (source.W_dec, source.W_enc))
        return tuple((t._version, t.data_ptr()) for t in matrices)


class Update:
    """Turns the backward half of one or several calls into new parameters."""

    def __init__(
        self, sae: SparseAutoencoder, optimizer: Adam, copies: Copies, *, unit_rows: bool, grad_clip: float | None,
        accumulate: int, backend: str,
    ) -> None:  # fmt: skip
        self.sae, self.optimizer, self.copies = sae, optimizer, copies
        self.shards = sae.shards  # with them, ``sae`` is one rank's share
        self.unit_rows, self.grad_clip, self.accumulate = unit_rows, grad_clip, accumulate
        self.backend = backend
        self.stored: dict[Tensor, Tensor] = {}  # W_enc's is (F, d_in): transposed

    def forget(self) -> None:
        """What is stored of an update that is not to be."""
        self.stored = {}

    def can_be_fused(self, pending: Backward) -> bool:
        """Whether nothing needs the gradients whole."""
        alone = self.grad_clip is None and self.accumulate == 1 and self.optimizer.part is None
        return alone and not pending.dense and all(matrix.requires_grad for matrix in self.optimizer.matrices)

    def fused(self, pending: Backward, skip: Tensor | None) -> Tensor:
        """One pass over the latents of each source that sums, and steps at once. Returns the norm of all gradients."""
        sae, optimizer = self.sae, self.optimizer
        with_bias = sae.b_enc.requires_grad
        options, weights = optimizer.options, self.copies.current()
        skipped = None if skip is None else skip.to(torch.float32)
        count = optimizer.counted([*optimizer.matrices, *((sae.b_enc,) if with_bias else ())], skipped)
        squares = []
        for number, (source, mine) in enumerate(zip(sae.sources, pending.sources, strict=True)):
            learned = [source.W_dec, source.W_enc, *((sae.b_enc,) if with_bias else ())]
            states = zip(*((p.detach(), *optimizer.moments(p)) for p in learned), strict=True)
            parameters, exp_avgs, exp_avg_sqs = (
                [state[0], state[1].T, *(_of_source(bias, number) for bias in state[2:])] for state in states
            )
            how = {
                "step": count, "lr": options["lr"], "betas": options["betas"], "eps": options["eps"],
                "weight_decay": options["weight_decay"], "unit_rows": self.unit_rows, "skip": skip,
                "backend": self.backend,
            }  # fmt: skip
            tensors = parameters, exp_avgs, exp_avg_sqs, list(weights[number]) if self.copies.needed else []
            center, square = latent_adam(mine.terms, mine.x, mine.along, *tensors, **how)
            squares.append(square)
        self.copies.written()
        of_weights = square if len(squares) == 1 else torch.stack(squares).sum()
        if self.shards is None:
            small, total = self._over_ranks(self._small(pending, center), of_weights)
        else:
            small, total = self._over_ranks(self._small(pending, None), of_weights, center)
        optimizer.apply(small, skipped)
        return total.sqrt()

    def _over_ranks(
        self, gradients: dict[Tensor, Tensor], square: Tensor | None, center: Tensor | None = None
    ) -> tuple[dict[Tensor, Tensor], Tensor]:
        """Gradients, those of what every rank has summed over the ranks; and the sum () of all squares.

        ``square`` () is that of gradients which are not among these. ``center`` is b_dec's part through the encoder,
        where that is not in them: sums over tokens and over latents are trees of their own.
        """
        wide = torch.promote_types(self.sae.b_dec.dtype, torch.float32)
        square = self.sae.b_dec.new_zeros((), dtype=wide) if square is None else square
        if self.shards is None:
            squares = [g.square().sum().to(square.dtype) for g in gradients.values()]
            return gradients, torch.stack([square, *squares]).sum()
        known = everyones(self.sae)
        of_everyone = [p for p in gradients if any(p is q for q in known)]
        squares = [g.square().sum().to(wide) for p, g in gradients.items() if all(p is not q for q in of_everyone)]
        mine = torch.stack([square.to(wide), *squares]).sum()
        given = [mine[None], *(gradients[p] for p in of_everyone)]
        if center is not None and self.sae.apply_b_dec_to_input and self.sae.b_dec.requires_grad:
            given.append(center)
            of_everyone.append(self.sae.b_dec)
        packed = torch.cat([tensor.flatten().to(wide) for tensor in given])
        sizes = [tensor.numel() for tensor in given]
        total, *sums = self.shards.sum_everywhere(packed, "gradients of all ranks").split(sizes)
        summed: dict[Tensor, Tensor] = {}
        for p, gradient in zip(of_everyone, sums, strict=True):
            summed[p] = gradient.view(p.shape) + summed.get(p, 0.0)
        return {**gradients, **summed}, torch.stack([total[0], *(g.square().sum() for g in summed.values())]).sum()

    def _small(self, pending: Backward, center: Tensor | None) -> dict[Tensor, Tensor]:
        """Gradients of everything but the weights and b_enc, with b_dec's part through the encoder.

        There is one only with a single source.
        """
        small = dict(pending.small)
        if self.sae.apply_b_dec_to_input and center is not None:
            small[self.sae.b_dec] = center + small.get(self.sae.b_dec, 0.0)
        return {p: g for p, g in small.items() if p.requires_grad}

    def store(self, pending: Backward) -> None:
        """Adds the gradients of one call, divided by the number of calls."""
        sae, biases = self.sae, []
        whole: dict[Tensor, Tensor] = {}
        for source, weights, mine in zip(sae.sources, self.copies.current(), pending.sources, strict=True):
            wide = torch.promote_types(weights.decoder.dtype, torch.float32)
            decoder, encoder, bias = ops.latent_gradients(
                mine.x, weights.decoder, mine.along, *mine.terms, wide, self.backend
            )
            for dense in mine.dense:
                encoder += dense.to(wide).T @ mine.x[: len(dense) * mine.repeats : mine.repeats].to(wide)
                bias += dense.sum(0, dtype=wide)
            center = -(source.W_enc.detach().to(wide) @ bias)
            whole |= {source.W_dec: decoder, source.W_enc: encoder}
            biases.append(bias)
        whole[sae.b_enc] = torch.stack(biases) if sae.b_enc.dim() == 2 else biases[0]
        whole |= self._small(pending, center)
        for p, gradient in whole.items():
            if p.requires_grad:
                gradient = gradient if self.accumulate == 1 else gradient / self.accumulate
                self.stored[p] = self.stored[p] + gradient if p in self.stored else gradient

    def apply_stored(self, skip: Tensor | None) -> Tensor:
        """Remove the parallel part, clip, Adam, rescale. Returns the norm before clipping."""
        sae, part, gradients = self.sae, self.optimizer.part, self.stored
        self.stored = {}
        gradients = gradients if part is None else part.summed(gradients)
        decoders = [source.W_dec for source in sae.sources if source.W_dec.requires_grad] if self.unit_rows else []
        for decoder in decoders:
            if decoder in gradients:
                size = rows_of_a_chunk(decoder.shape[0], decoder.shape[1], decoder.device.type)
                pairs = zip(gradients[decoder].split(size), self.optimizer.mine(decoder).split(size), strict=True)
                for grad, rows in pairs:
                    grad.copy_(without_parallel_part(grad, rows))
        if self.shards is None:
            norm = torch.nn.utils.get_total_norm(gradients.values())
        else:
            gradients, squares = self._over_ranks(gradients, None)
            norm = squares.sqrt()
        if self.grad_clip is not None:
            torch._foreach_mul_(list(gradients.values()), (self.grad_clip / (norm + 1e-6)).clamp(max=1))
        for source in sae.sources:
            if source.W_enc in gradients:
                gradients[source.W_enc] = gradients[source.W_enc].T
        self.optimizer.apply(gradients, None if skip is None else skip.to(torch.float32))
        for rows in map(self.optimizer.mine, decoders):
            norms = decoder_norms(rows)[:, None]
            unchanged = norms == 0 if skip is None else (norms == 0) | skip
            rows.div_(torch.where(unchanged, 1.0, norms))
        if part is not None:
            part.hand_out(gradients)
        return norm


def _of_source(bias: Tensor, number: int) -> Tensor:
    """(F,) of a source, from b_enc or a moment of it: that of one source, or (sources, F)."""
    return bias if bias.dim() == 1 else bias[number]
