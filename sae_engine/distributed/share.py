"""A rank's share of an autoencoder: its own latents, as an autoencoder of so many, in the memory of the whole one."""
from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .shards import Shards, check_rules
from .sums import SummedGradient, SummedLatents

if TYPE_CHECKING:
    from ..autoencoder import SparseAutoencoder
    from ..rules.base import Activation

CUT = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # along which dimension parameters have latents; others are everyone's


def split(sae: SparseAutoencoder, shards: Shards) -> SparseAutoencoder:
    """Makes the parameters of ``sae``, which are those of my latents, DTensors over all; returns my share.

    Its rule, as it comes, knows all latents.

    Raises:
        TypeError: the rule cannot say how it selects over shards.
    """
    check_rules([sae.activation])
    share = _copied(sae)
    share.d_sae = shards.mine.stop - shards.mine.start
    share._modules = {"activation": _split_rule(sae.activation, shards)}
    for name, p in share._parameters.items():
        if p is not None:
            whole = shards.as_whole(p.detach(), CUT.get(name))
            sae._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
    share._may_lay_out = sae._may_lay_out = False
    return share


def over_shards(rule: Activation, shards: Shards) -> Activation:
    """A rule without tensors of its own, as it selects among my latents; the one that is given stays what it was."""
    mine = _copied(rule)
    mine.shards = shards
    return mine


def _split_rule(rule: Activation, shards: Shards) -> Activation:
    mine = over_shards(rule, shards)
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


OWN = frozenset({"_parameters", "_buffers", "_modules", "shards", "d_sae", "_seen"})  # attributes of a share's rule


def as_it_is_now(sae: SparseAutoencoder, share: SparseAutoencoder) -> SparseAutoencoder:
    """The share in the mode, with the rule's options and with the frozen parameters that ``sae`` has at the moment."""
    share.training = sae.training
    mine, rule = share.activation, sae.activation
    mine.__dict__.update({name: value for name, value in rule.__dict__.items() if name not in OWN})
    for part, whole in ((share, sae), (mine, rule)):
        for name, p in part._parameters.items():
            other = whole._parameters[name]
            if p is not None and other is not None and p.requires_grad != other.requires_grad:
                p.requires_grad_(other.requires_grad)
    return share


def rejoin(sae: SparseAutoencoder, share: SparseAutoencoder) -> None:
    """After the tensors of ``sae`` have moved: its share has the same memory again."""
    for mine, whole in ((share, sae), (share.activation, sae.activation)):
        pairs: list[tuple[Any, Any]] = [(mine._parameters, whole._parameters), (mine._buffers, whole._buffers)]
        for tensors, others in pairs:
            for name, tensor in tensors.items():
                if tensor is not None and tensor is not others[name]:
                    tensor.data = local(others[name].detach())


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
    copied = _copied(share)
    copied._modules = {"activation": _copied(share.activation)}
    shards: Any = share.activation.shards
    for mine, whole in ((copied, sae), (copied.activation, sae.activation)):
        for name, p in whole._parameters.items():
            if p is None or not p.requires_grad or not p.dim():
                continue
            placements = p.placements  # type: ignore[attr-defined]
            part = p.to_local(grad_placements=placements)  # type: ignore[attr-defined]
            if all(placement.is_replicate() for placement in placements):
                part = SummedGradient.apply(part, shards.everyone, name)
            elif shards.across is not None:
                by_latent = part.T if CUT.get(name) == 1 else part
                part = SummedLatents.apply(by_latent, shards.across, name)
                part = part.T if CUT.get(name) == 1 else part
            mine._parameters[name] = part
    return copied
