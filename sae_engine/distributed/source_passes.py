"""As :mod:`passes`, of a crosscoder: the latents of each of its sources are cut over the ranks alike."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks as check
from .. import functional
from .._sources import below_one_another, parts_of
from ..codes import SparseCodes
from ..functional import Encoded, EncodeInfo
from ..rules.base import Activation
from ..rules.per_source import chooses_alone
from .shards import Shards, check_rules
from .share import attached, over_shards

if TYPE_CHECKING:
    from ..crosscoder import Crosscoder


def encode_with(
    coder: Crosscoder, x: Tensor, rules: Sequence[Activation], keep_pre: bool, memory_budget: int | None, backend: str,
    context: dict[str, Any],
) -> Encoded:  # fmt: skip
    """As ``Crosscoder.encode_with``, of my tokens."""
    if keep_pre:
        raise ValueError("keep_pre must be False on a mesh, where no rank has the pre-activations of all latents")
    encoded, info, tokens, mine = _encoded(coder, x, rules, memory_budget, backend, context)
    shards, sources = _shards(mine), len(coder.wiring)
    codes = []
    for of_all in encoded:
        owned = [replace(shards.to_owners(part), batch_shape=tokens) for part in parts_of(of_all, sources)]
        codes.append(below_one_another(owned))
    return Encoded(tuple(codes), info)


def forward(coder: Crosscoder, x: Tensor, context: dict[str, Any]) -> Tensor:
    """The sites side by side, of my tokens: no code goes anywhere, only sums of decoder rows do."""
    (codes,), info, tokens, mine = _encoded(coder, x, (coder.activation,), None, "auto", context)
    coder.share.activation.update(codes)
    return _decoded(mine, codes, info, tokens, slice(0, coder.d_out), "auto")


def decode_own(
    coder: Crosscoder, codes: SparseCodes, info: EncodeInfo | None, columns: slice, backend: str
) -> Tensor:
    """As ``Crosscoder.decode``, from the codes of my tokens."""
    mine, of_mine = _to_latents(coder, codes)
    tokens = codes.batch_shape if len(coder.wiring) == 1 else codes.batch_shape[1:]
    return _decoded(mine, of_mine, info, tokens, columns, backend)


def sums_own(coder: Crosscoder, codes: SparseCodes) -> Tensor:
    """(my tokens, d_out) of decoder rows alone, from the codes of my tokens."""
    mine, of_mine = _to_latents(coder, codes)
    return _shards(mine).sum_parts(mine._sums(of_mine), "x_hat")


def _to_latents(coder: Crosscoder, codes: SparseCodes) -> tuple[Any, SparseCodes]:
    """The share, and codes of its latents for the tokens of all ranks of the group."""
    mine, sources = attached(coder), len(coder.wiring)
    shards = _shards(mine)
    shards.begin(codes.rows // sources)
    return mine, below_one_another([shards.to_latents(part) for part in parts_of(codes, sources)])


def sums_of(coder: Crosscoder, number: int, x: Tensor) -> Tensor:
    """(my tokens, width written) of one source's decoder rows, from my rows of the sites that it reads."""
    mine: Any = attached(coder)
    shards = _shards(mine)
    shards.begin(len(x))
    return shards.sum_parts(mine._own_sums_of(number, shards.gather_rows(x, "x")), "x_hat")


def site_norms(coder: Crosscoder) -> Tensor:
    """(sources, d_sae, written sites) of all latents, without gradient."""
    mine: Any = coder.share
    by_latent = mine._own_site_norms().detach().transpose(0, 1).contiguous()
    return _shards(mine).all_latents(by_latent, "site norms").transpose(0, 1)


def _encoded(
    coder: Crosscoder, x: Tensor, rules: Sequence[Activation], memory_budget: int | None, backend: str,
    context: dict[str, Any],
) -> tuple[tuple[SparseCodes, ...], EncodeInfo, tuple[int, ...], Any]:  # fmt: skip
    """Codes of my latents for the tokens of all ranks of the group, one for each rule; what decoding needs; my tokens'
    shape; and the share whose parameters are functions of the crosscoder's."""
    given, info = coder._normalized(x)
    mine: Any = attached(coder)
    shards, sources = _shards(mine), len(coder.wiring)
    check_rules(rules)
    own = [mine.activation if rule is coder.activation else
           over_shards(rule, shards, 1 if chooses_alone(rule, sources) else sources) for rule in rules]  # fmt: skip
    rows = check.matrix(given)
    if memory_budget is not None:
        memory_budget = check.integer_k(memory_budget, name="memory_budget")
    shards.begin(len(rows))
    every = shards.gather_rows(rows.to(functional.linear_dtype(rows, mine.b_dec)), "x")
    known = {name: t[..., shards.mine] if isinstance(t, Tensor) and t.shape[-1:] == (coder.d_sae,) else t
             for name, t in context.items()}  # fmt: skip
    found = mine._encoded(every, own, False, shards.memory_budget(memory_budget), backend, known)
    return found.codes, info, tuple(given.shape[:-1]), mine


def _decoded(
    mine: Any, codes: SparseCodes, info: EncodeInfo | None, tokens: Sequence[int], columns: slice, backend: str
) -> Tensor:
    """(*tokens, columns) of mine, from codes of my latents for all tokens."""
    sums = _shards(mine).sum_parts(mine._sums(codes, columns, backend), "x_hat")
    return mine._past_decoders(sums.view(*tokens, sums.shape[-1]), codes, info, columns)


def _shards(share: Any) -> Shards:
    shards: Shards | None = share.activation.shards
    assert shards is not None
    return shards
