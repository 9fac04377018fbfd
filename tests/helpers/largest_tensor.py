"""How large the tensors are that operators make: what must not become a matrix of tokens and latents."""

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """While entered, ``seen`` becomes the number of elements of the largest tensor that an operator returns.

    ``counts`` says which tensors are looked at; default all.
    """

    def __init__(self, counts=lambda tensor: True):
        super().__init__()
        self.seen, self._counts = 0, counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and self._counts(leaf):
                self.seen = max(self.seen, leaf.numel())
        return out
