"""The language model's own gradient at the activations that are read: what GradientTopK ranks by."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activations import _hook_target


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
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (B, T) with T >= 2, got shape {tuple(input_ids.shape)}")
    target = _hook_target(model, layer, site)
    found: list[Tensor] = []

    def leaf(hidden: Tensor) -> Tensor:
        found.append(hidden.detach().clone().requires_grad_())
        return found[-1]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if args:
            return (leaf(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": leaf(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return (leaf(output[0]), *output[1:]) if isinstance(output, tuple) else leaf(output)

    if site == "resid_pre":
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(after)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            input_ids = input_ids.clone()  # autograd saves it, and may not save what inference mode made
            mask = torch.ones_like(input_ids)
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum"
            )
            if not found:
                raise RuntimeError(f"the forward pass of {type(model).__name__} never reached layer {layer}, {site!r}")
            (gradient,) = torch.autograd.grad(loss, found)
    finally:
        handle.remove()
        for module in training:
            module.training = True
    shape = (*input_ids.shape, -1)  # OPT's MLP sees its tokens flattened
    return found[0].detach().reshape(shape), gradient.reshape(shape)
