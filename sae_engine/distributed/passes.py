"""Encoding and decoding where latents are cut over a mesh: a rank's own tokens in, its own codes and outputs out."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import functional
from .._decoder_rows import decoder_norms
from .._running import PER_TOKEN, Product
from ..codes import SparseCodes
from ..functional import Encoded, EncodeInfo
from .mesh import checked_mesh
from .shards import Shards, check_rules
from .share import as_it_is_now, attached, copied, over_shards, rejoin, split

if TYPE_CHECKING:
    from ..autoencoder import SparseAutoencoder

__all__ = ["as_it_is_now", "copied", "decode_own", "encode_with", "forward", "rejoin", "shards_of", "split"]


def shards_of(mesh: object, sae: SparseAutoencoder, device: torch.device | None, dtype: torch.dtype | None) -> Shards:
    """Raises TypeError or ValueError, naming ``mesh``, where it is none that latents can be cut over; and RuntimeError
    where the ranks are not about to make the same autoencoder."""
    shards = Shards(checked_mesh(mesh, sae.d_sae, device), sae.d_sae)
    names = ("d_in", "d_sae", "d_out", "apply_b_dec_to_input", "normalize_activations", "rescale_acts_by_decoder_norm",
             "read_widths", "written_widths", "wiring", "decoder_norm")  # fmt: skip
    found = {name: getattr(sae, name) for name in names if hasattr(sae, name)}
    options = {name: repr(value) if isinstance(value, list | tuple) else value for name, value in found.items()}
    shards.agreement.agree(activation=repr(sae.activation), dtype=str(dtype or torch.get_default_dtype()), **options)
    return shards


def encode_with(
    sae: SparseAutoencoder, x: Tensor, select: Any, keep_pre: bool, memory_budget: int | None, backend: str,
    context: dict[str, Any],
) -> Encoded:  # fmt: skip
    """As ``SparseAutoencoder.encode_with``, of my tokens."""
    if keep_pre:
        raise ValueError("keep_pre must be False on a mesh, where no rank has the pre-activations of all latents")
    codes, info, mine = _encoded(sae, x, select, memory_budget, backend, context)
    return Encoded(tuple(replace(_shards(mine).to_owners(c), batch_shape=tuple(x.shape[:-1])) for c in codes), info)


def forward(sae: SparseAutoencoder, x: Tensor, context: dict[str, Any]) -> Tensor:
    """As ``SparseAutoencoder.forward``, of my tokens: no code goes anywhere, only sums of decoder rows do."""
    (codes,), info, mine = _encoded(sae, x, None, None, "auto", context)
    sae.share.activation.update(codes)
    return _decoded(mine, codes, info, tuple(x.shape[:-1]), "auto")


def decode_own(sae: SparseAutoencoder, codes: SparseCodes, info: EncodeInfo, backend: str) -> Tensor:
    """As ``SparseAutoencoder.decode``, from the codes of my tokens."""
    mine = attached(sae)
    shards = _shards(mine)
    shards.begin(codes.rows)
    return _decoded(mine, shards.to_latents(codes), info, codes.batch_shape, backend)


def _encoded(
    sae: SparseAutoencoder, x: Tensor, select: Any, memory_budget: int | None, backend: str, context: dict[str, Any]
) -> tuple[tuple[SparseCodes, ...], EncodeInfo, SparseAutoencoder]:
    """Codes of my latents for the tokens of all ranks of the group, one for each rule; and what :func:`decode` needs.

    The parameters of the share that comes along are functions of those of ``sae``.
    """
    given, info = sae._normalized(x)
    mine = attached(sae)
    shards = _shards(mine)
    listed = list(select) if isinstance(select, list | tuple) else [sae.activation if select is None else select]
    check_rules(listed)
    rules = [mine.activation if rule is sae.activation else over_shards(rule, shards) for rule in listed]
    rows = check.matrix(given)
    if memory_budget is not None:
        memory_budget = check.integer_k(memory_budget, name="memory_budget")
    if "attribution" in context:
        raise ValueError("attribution must be given as gradient on a mesh, where no rank has that of all latents")
    shards.begin(len(rows))
    known: dict[str, Any] = {**mine._context(rows, rules), **context}
    if "gradient" in known:
        known["attribution"] = mine._attribution(known.pop("gradient"), given, info)
    known = {name: of_mesh(shards, name, tensor) for name, tensor in known.items()}
    dtype = functional.linear_dtype(rows, mine.W_enc)
    centred = (rows - mine.b_dec if mine.apply_b_dec_to_input else rows).to(dtype)
    scale = decoder_norms(mine.W_dec) if mine.rescale_acts_by_decoder_norm else None
    encoded = functional.encode_with(
        shards.gather_rows(centred, "x"), mine.W_enc, mine._encoder_bias, scale=scale, select=rules,
        memory_budget=shards.memory_budget(memory_budget), backend=backend, **known,
    )  # fmt: skip
    return encoded.codes, info, mine


def _decoded(
    mine: SparseAutoencoder, codes: SparseCodes, info: EncodeInfo, batch_shape: tuple[int, ...], backend: str
) -> Tensor:
    """(*batch_shape, d_out) of my tokens, from codes of my latents for all tokens."""
    codes = mine._divided_by_norms(codes)
    dtype = functional.linear_dtype(codes.values, mine.W_dec)
    wide = torch.promote_types(dtype, torch.float32)
    part = functional.decode(codes, mine.W_dec, result_dtype=wide, backend=backend)
    out = _shards(mine).sum_parts(part, "x_hat") + mine.b_dec
    return mine._finished(out.view(*batch_shape, mine.d_out), info, dtype)


def of_mesh(shards: Shards, name: str, tensor: Any) -> Any:
    """A rule's context for the tokens of all ranks and my latents, from that of mine and all, or mine alone."""
    if name in PER_TOKEN:
        if isinstance(tensor, Product):
            return Product(shards.gather_rows(check.matrix(tensor._x), name), tensor._weight, tensor._divisors,
                           functional.linear)  # fmt: skip
        return shards.gather_rows(tensor.flatten(), name)
    is_whole = isinstance(tensor, Tensor) and tensor.shape == (shards.num_latents,) and shards.size > 1
    return tensor[shards.mine] if is_whole else tensor


def _shards(share: SparseAutoencoder) -> Shards:
    shards = share.activation.shards
    assert shards is not None
    return shards
