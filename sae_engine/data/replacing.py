"""Logits of a causal language model with other activations in the place of its own, at one site or at several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from .activations import check_ids
from .padding import Padding, padding_of
from .places import Place, evaluating, find_place, model_forward, never_reached
from .sites import Site

Use = Callable[[Tensor], Tensor | None]


def run_with_replacement(
    model: nn.Module,
    input_ids: Tensor,
    replace: Callable[[Tensor], Tensor],
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits of the model with the site's activations replaced on the way: ``replace`` maps (B, T, d_model) to itself.

    What ``replace`` returns is cast to the model's dtype, so that returning its argument changes no bit.

    Args:
        model, input_ids, layer, site, attention_mask: as :func:`read_activations` has them.
        replace: called once, outside autograd; it must not write to its argument, which is 0 at padding.

    Returns:
        ``(B, T, vocabulary)``, in the model's dtype; 0 at padding.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`read_activations`; ValueError also where ``replace`` returns
            another shape.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> logits = run_with_replacement(lm.model, ids, torch.zeros_like, layer=1)
        >>> logits.shape[:2]
        torch.Size([1, 3])
    """
    check_ids(input_ids)
    return _run(model, input_ids, [(find_place(model, site, layer), replace, False)], attention_mask)


def run_with_replacements(
    model: nn.Module,
    input_ids: Tensor,
    uses: Mapping[str | Site, Use],
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Logits of the model with the activations of several sites read, and perhaps replaced, in one forward pass.

    A site sees what the replacements before it made of the model: so a replacement model is run, in which a
    transcoder at layer 3 reads what those at layers 0 to 2 have left.

    Args:
        model, input_ids, attention_mask: as :func:`read_activations` has them.
        uses: by site, with its block, a function of its activations (B, T, width), which are 0 at padding. It returns
            what takes their place, or None to leave them as they are. Each is called once, outside autograd, when the
            model gets there; it must not write to its argument.

    Returns:
        ``(B, T, vocabulary)``, in the model's dtype; 0 at padding.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`run_with_replacement`; ValueError also where ``uses`` is empty or
            names a site twice.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm, seen = load_language_model(), []
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> uses = {"blocks.0.hook_mlp_out": torch.zeros_like, "blocks.1.hook_resid_pre": seen.append}
        >>> logits = run_with_replacements(lm.model, ids, uses)
        >>> len(seen), logits.shape[:2]
        (1, torch.Size([1, 3]))
    """
    check_ids(input_ids)
    if not isinstance(uses, Mapping):
        raise TypeError(f"uses must map sites to functions, got {type(uses).__name__}")
    if not uses:
        raise ValueError("uses must name at least one site, got none")
    places = [(find_place(model, site), use, True) for site, use in uses.items()]
    names = [place.site for place, _, _ in places]
    if twice := {str(site) for site in names if names.count(site) > 1}:
        raise ValueError(f"uses must name each site once, got {sorted(twice)[0]} twice")
    return _run(model, input_ids, places, attention_mask)


def _run(
    model: nn.Module, input_ids: Tensor, places: list[tuple[Place, Use, bool]], attention_mask: Tensor | None
) -> Tensor:
    padding = padding_of(input_ids, attention_mask)
    ids = input_ids if padding is None else padding.input_ids
    mask = torch.ones_like(input_ids) if padding is None else padding.attention_mask
    reached: set[Site] = set()
    with evaluating(model), ExitStack() as hooks, torch.no_grad():
        for place, use, may_leave in places:
            hooks.enter_context(place.hooked(ids.shape, _written(place.site, use, may_leave, padding, reached)))
        logits = model_forward(model, ids, mask).logits
    for place, _, _ in places:
        if place.site not in reached:
            raise never_reached(model, place.site)
    return logits if padding is None else padding.back(logits)


def _written(site: Site, use: Use, may_leave: bool, padding: Padding | None, reached: set[Site]) -> Use:
    """``use`` with its result checked, on tokens in the caller's order."""

    def write(hidden: Tensor) -> Tensor | None:
        reached.add(site)
        before = hidden if padding is None else padding.back(hidden)
        after = use(before)
        if after is None and may_leave:
            return None
        if not isinstance(after, Tensor) or after.shape != before.shape:
            got = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            where = f" at {site}" if may_leave else ""
            raise ValueError(f"replace must return a tensor of shape {tuple(before.shape)}{where}, got {got}")
        return after if padding is None else padding.into(after, hidden)

    return write
