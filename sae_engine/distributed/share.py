"""A rank's share of an autoencoder: its own latents, as an autoencoder of so many, in the memory of the whole one."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..rules.per_source import PerSource
from .shards import Shards, check_rules
from .sums import SummedGradient, SummedLatents

if TYPE_CHECKING:
    from ..autoencoder import SparseAutoencoder
    from ..rules.base import Activation

CUT = {"W_enc": -1, "W_dec": 0, "b_enc": -1}  # along which dimension parameters have latents; others are everyone's


def cut_of(name: str, tensor: Tensor) -> int | None:
    """The dimension along which the parameter of an autoencoder of that name has latents; None: there is none.

    Example:
        >>> cut_of("W_enc.2", torch.empty(4, 16)), cut_of("b_dec", torch.empty(4))
        (1, None)
    """
    dim = CUT.get(name.partition(".")[0])
    return dim if dim is None else dim % tensor.dim()


def everyones(sae: SparseAutoencoder) -> list[Tensor]:
    """The parameters that have no latents, and are the same on every rank."""
    return [sae.b_dec, *(weight for weight, _, _ in sae._skips())]


def split(sae: SparseAutoencoder, shards: Shards) -> SparseAutoencoder:
    """Makes the parameters of ``sae``, which are those of my latents, DTensors over all; returns my share.

    Its rule, as it comes, knows all latents.

    Raises:
        TypeError: the rule cannot say how it selects over shards.
    """
    check_rules([sae.activation])
    share = _copied(sae)
    share.d_sae = shards.mine.stop - shards.mine.start
    among = 1 if isinstance(sae.activation, PerSource) else len(sae.sources)
    share._modules = {name: _split_rule(module, shards, among) if name == "activation" else _copied(module)
                      for name, module in sae._modules.items()}  # fmt: skip
    for prefix, whole in _lists(sae):
        for name, p in whole._parameters.items():
            if p is not None:
                of_all = shards.as_whole(p.detach(), cut_of(prefix or name, p))
                whole._parameters[name] = nn.Parameter(of_all, requires_grad=p.requires_grad)
    share._may_lay_out = sae._may_lay_out = False
    return share


def _lists(sae: Any) -> list[tuple[str, Any]]:
    """What holds the autoencoder's own parameters: itself, and its lists of some for each source, with their names."""
    return [("", sae), *((name, module) for name, module in sae._modules.items() if name != "activation")]


def over_shards(rule: Activation, shards: Shards, among: int = 1) -> Activation:
    """A rule without tensors of its own, as it selects among my latents, of so many sources; the one that is given
    stays what it was."""
    mine = _copied(rule)
    mine.shards, mine.among = shards, among
    if isinstance(rule, PerSource):
        mine.rules = nn.ModuleList([over_shards(one, shards) for one in rule])
    return mine


def _split_rule(rule: Any, shards: Shards, among: int) -> Activation:
    mine = over_shards(rule, shards, among)
    if isinstance(rule, PerSource):
        mine.rules = nn.ModuleList([_split_rule(one, shards, 1) for one in rule])
    if hasattr(rule, "d_sae"):
        mine.d_sae = shards.mine.stop - shards.mine.start
    pairs: list[tuple[Any, Any]] = [(mine._parameters, rule._parameters), (mine._buffers, rule._buffers)]
    for tensors, whole in pairs:
        for name, tensor in tensors.items():
            if tensor is None or not tensor.dim():
                continue  # a scalar is the same tensor in both: every rank moves it alike
            dim = 0 if tensor.shape[0] == shards.num_latents else None
            part = tensor.detach()[shards.mine].clone() if dim == 0 else tensor.detach()
            of_all: Tensor = shards.as_whole(part, dim)
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
                of_all = nn.Parameter(of_all, requires_grad=tensor.requires_grad)
            tensors[name], whole[name] = part, of_all
    return mine


def _copied(module: Any) -> Any:
    """A module of the same attributes and tensors whose dictionaries are its own."""
    copied = copy.copy(module)
    copied.__dict__.update(module.__dict__)  # what copies leave out, too
    for name in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[name] = dict(module.__dict__[name])
    return copied


OWN = frozenset({"_parameters", "_buffers", "_modules", "shards", "among", "d_sae", "_seen"})  # of a share's rule


def _pairs(mine: Any, whole: Any) -> Iterator[tuple[Any, Any]]:
    """Each module of a share that is not also the whole one's, and the one there."""
    if mine is not whole:
        yield mine, whole
        for name, module in mine._modules.items():
            yield from _pairs(module, whole._modules[name])


def as_it_is_now(sae: SparseAutoencoder, share: SparseAutoencoder) -> SparseAutoencoder:
    """The share in the mode, with the rule's options and with the frozen parameters that ``sae`` has at the moment."""
    share.training = sae.training
    for mine, whole in _pairs(share.activation, sae.activation):
        mine.__dict__.update({name: value for name, value in whole.__dict__.items() if name not in OWN})
    for mine, whole in _pairs(share, sae):
        for name, p in mine._parameters.items():
            other = whole._parameters[name]
            if p is not None and other is not None and p.requires_grad != other.requires_grad:
                p.requires_grad_(other.requires_grad)
    return share


def rejoin(sae: SparseAutoencoder, share: SparseAutoencoder) -> None:
    """After the tensors of ``sae`` have moved: its share has the same memory again."""
    for mine, whole in _pairs(share, sae):
        pairs: list[tuple[Any, Any]] = [(mine._parameters, whole._parameters), (mine._buffers, whole._buffers)]
        for tensors, others in pairs:
            for name, tensor in tensors.items():
                if tensor is not None and tensor is not others[name]:
                    tensor.data = local(others[name].detach())


def copied(sae: Any) -> Any:
    """A copy on the same mesh, with tensors of its own: of each rank its own latents, once."""
    memo: dict[int, Any] = {id(sae.shards): sae.shards}
    for mine, whole in _pairs(sae._share[0], sae):
        pairs: list[tuple[Any, Any]] = [(mine._parameters, whole._parameters), (mine._buffers, whole._buffers)]
        for tensors, others in pairs:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in memo:
                    new = memo[id(others[name])] = _like(others[name], others[name].detach().clone())
                    if tensor is not others[name]:
                        memo[id(tensor)] = _like(tensor, local(new.detach()))
    return copy.deepcopy(sae, memo)


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a DTensor; any other tensor is the same everywhere."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def attached(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The share of ``sae`` with parameters that are functions of the whole one's, for autograd.

    Every rank's loss is a summand of the loss. What several ranks have alike gets thus the sum of their gradients, as a
    tree: of all ranks for replicated parameters, of all groups for latents.
    """
    share = sae.share
    if not torch.is_grad_enabled():
        return share
    copied = _copied_whole(share)
    shards: Any = share.activation.shards
    names = {id(module): name for name, module in _lists(sae)}
    for mine, whole in _pairs(copied, sae):
        for name, p in whole._parameters.items():
            if p is None or not p.requires_grad or not p.dim():
                continue
            placements = p.placements
            part = p.to_local(grad_placements=placements)
            if all(placement.is_replicate() for placement in placements):
                part = SummedGradient.apply(part, shards.everyone, name)
            elif shards.across is not None:
                of_parameter = names.get(id(whole)) or name
                second = id(whole) in names and cut_of(of_parameter, part) == 1
                by_latent = part.T if second else part
                part = SummedLatents.apply(by_latent, shards.across, of_parameter)
                part = part.T if second else part
            mine._parameters[name] = part
    return copied


def _copied_whole(module: Any) -> Any:
    copied = _copied(module)
    copied._modules.update({name: _copied_whole(one) for name, one in module._modules.items()})
    return copied
