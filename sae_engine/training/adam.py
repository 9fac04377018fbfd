"""Adam's state in torch's own form, so that schedulers and checkpoints of ``torch.optim`` apply."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from .. import _checks as check


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` whose update is made by a :class:`TrainStep`.

    State and ``state_dict`` are torch's: ``step``, ``exp_avg`` and ``exp_avg_sq`` of each parameter, in its layout. The
    learning rate is a tensor on the device.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        learned = [p for p in module.parameters() if p.requires_grad]
        if not learned:
            raise ValueError("sae has no parameter that requires a gradient")
        lr = check.positive("lr", lr)
        super().__init__(learned, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # Only now the tensor: torch would compare it with 0, and so wait for the device.
        self.options["lr"] = torch.full((), lr, dtype=torch.float32, device=learned[0].device)
        for p in learned:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """Runs the update of a :class:`TrainStep`; there is no other."""
        if closure is None:
            raise RuntimeError("this optimizer steps inside TrainStep: call the step, not the optimizer")
        return closure()

    @property
    def options(self) -> dict:
        """The one parameter group."""
        return self.param_groups[0]

    def counted(self, parameters: list[Tensor], skip: Tensor | None) -> Tensor:
        """Advances the parameters' step counters, except where ``skip`` () is set; returns one of them."""
        counters = [self.state[p]["step"] for p in parameters]
        if skip is None:
            torch._foreach_add_(counters, 1.0)
        else:  # a single tensor would be read by the host, as a number
            torch._foreach_add_(counters, [(~skip).to(torch.float32)] * len(counters))
        return counters[0]

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        return state["exp_avg"], state["exp_avg_sq"]

    def apply(self, gradients: dict[Tensor, Tensor], skip: Tensor | None) -> None:
        """torch's fused Adam on the parameters with these gradients; nothing changes where ``skip`` () is set."""
        if not gradients:
            return
        options, parameters = self.options, list(gradients)
        views = [
            [contiguous_view(t, like=p) for t in (p, gradients[p].to(p.dtype), *self.moments(p))] for p in parameters
        ]
        rows, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*views, strict=True))
        adam(
            rows, grads, exp_avgs, exp_avg_sqs, [], [self.state[p]["step"] for p in parameters], fused=True,
            found_inf=None if skip is None else skip.to(torch.float32), amsgrad=False, beta1=options["betas"][0],
            beta2=options["betas"][1], lr=options["lr"], weight_decay=options["weight_decay"], eps=options["eps"],
            maximize=False,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict) -> None:
        """From a state of ours or of ``torch.optim.Adam`` over the same parameters.

        It is copied into the tensors that are here, each in its parameter's layout: a captured CUDA graph points to
        them.
        """
        rate, states = self.options["lr"], dict(self.state)
        super().load_state_dict(state_dict)
        rate.fill_(self.options["lr"])
        self.options.update(lr=rate, fused=True, foreach=None, capturable=False)
        for p, ours in states.items():
            for name, tensor in ours.items():
                tensor.copy_(torch.as_tensor(self.state[p].get(name, 0.0)))  # nothing there: it has not stepped yet
            self.state[p] = ours


def contiguous_view(tensor: Tensor, *, like: Tensor) -> Tensor:
    """``tensor`` or its transpose, as makes ``like`` contiguous: fused kernels look at memory, not at strides."""
    if like.is_contiguous():
        return tensor.contiguous()
    if like.dim() == 2 and like.T.is_contiguous():
        return tensor.T.contiguous()
    raise ValueError(f"a parameter of shape {tuple(like.shape)} and strides {like.stride()} has holes in memory")
