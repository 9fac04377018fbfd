"""The language model's own gradient at the activations that are read: what GradientTopK ranks by."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import check_ids
from .padding import padding_of
from .places import evaluating, find_place, model_forward, never_reached
from .sites import Site

_NOT_PREDICTED = -100


def read_gradients(
    model: nn.Module,
    input_ids: Tensor,
    *,
    layer: int | None = None,
    site: str | Site = "resid_pre",
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Activations of one batch of token ids, and the gradient of the model's loss with respect to them.

    The loss is the next-token cross-entropy of the unchanged model, summed over all tokens, so that a token's gradient
    does not depend on the size of the batch; nothing is computed for layers before the site or for parameters. The last
    token of a context predicts nothing, and its gradient is 0. Padding neither predicts nor is predicted.

    Args:
        model: a Hugging Face causal language model. Its mode and hooks are as before afterwards.
        input_ids: ``(B, T)`` integers on the model's device, ``T >= 2``.
        layer, site, attention_mask: as in :func:`read_activations`.

    Returns:
        (activations, gradients), each ``(B, T, d_model)`` in the model's dtype, outside autograd; 0 at padding.

    Raises:
        As :func:`read_activations`.

    Example:
        >>> from sae_engine.data import load_language_model
        >>> lm = load_language_model()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> x, gradient = read_gradients(lm.model, ids, layer=1)
        >>> x.shape == gradient.shape, gradient[0, -1].abs().max().item()
        (True, 0.0)
    """
    check_ids(input_ids)
    if input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (B, T) with T >= 2, got shape {tuple(input_ids.shape)}")
    padding = padding_of(input_ids, attention_mask)
    mask = torch.ones_like(input_ids)
    if padding is not None:
        input_ids, mask = padding.input_ids, padding.attention_mask
    place = find_place(model, site, layer)
    found: list[Tensor] = []

    def leaf(hidden: Tensor) -> Tensor:
        found.append(hidden.detach().clone().requires_grad_())
        return found[-1]

    with evaluating(model), place.hooked(input_ids.shape, leaf), torch.inference_mode(False), torch.enable_grad():
        input_ids = input_ids.clone()  # autograd saves it, and may not save what inference mode made
        logits = model_forward(model, input_ids, mask).logits
        if not found:
            raise never_reached(model, place.site)
        predicted = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, _NOT_PREDICTED)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), predicted.flatten(), ignore_index=_NOT_PREDICTED, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, found)
    shape = (*input_ids.shape, -1)  # OPT's MLP sees its tokens flattened
    x, gradient = found[0].detach().reshape(shape), gradient.reshape(shape)
    return (x, gradient) if padding is None else (padding.back(x), padding.back(gradient))
