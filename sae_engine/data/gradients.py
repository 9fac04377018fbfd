"""The language model's own gradient at the activations that are read: what GradientTopK ranks by."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import _check_ids, _evaluating, _forward, _hook_target, _hooked, _never_reached


def read_gradients(
    model: nn.Module, input_ids: Tensor, *, layer: int, site: str = "resid_pre"
) -> tuple[Tensor, Tensor]:
    """Activations of one batch of token ids, and the gradient of the model's loss with respect to them.

    The loss is the next-token cross-entropy of the unchanged model, summed over all tokens, so that a token's gradient
    does not depend on the size of the batch; nothing is computed for layers before the site or for parameters. The last
    position of a context predicts nothing, and its gradient is 0.

    Args:
        model: a Hugging Face causal language model. Its mode and hooks are as before afterwards.
        input_ids: ``(B, T)`` integers on the model's device, without padding, ``T >= 2``.
        layer, site: as in :func:`read_activations`.

    Returns:
        (activations, gradients), each ``(B, T, d_model)`` in the model's dtype, outside autograd.

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
    _check_ids(input_ids)
    if input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (B, T) with T >= 2, got shape {tuple(input_ids.shape)}")
    target = _hook_target(model, layer, site)
    found: list[Tensor] = []

    def leaf(hidden: Tensor) -> Tensor:
        found.append(hidden.detach().clone().requires_grad_())
        return found[-1]

    with _evaluating(model), _hooked(target, site, leaf), torch.inference_mode(False), torch.enable_grad():
        input_ids = input_ids.clone()  # autograd saves it, and may not save what inference mode made
        logits = _forward(model, input_ids).logits
        if not found:
            raise _never_reached(model, layer, site)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, found)
    shape = (*input_ids.shape, -1)  # OPT's MLP sees its tokens flattened
    return found[0].detach().reshape(shape), gradient.reshape(shape)
