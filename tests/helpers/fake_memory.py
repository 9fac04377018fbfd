"""Memory of programs that would not fit here: tensors without numbers, whose bytes are counted while they live.

What operators take inside themselves is not seen: ``sae_engine.testing.allocated_by`` sees it, of programs that run.
"""

from __future__ import annotations

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Living(TorchDispatchMode):
    """While entered, tensors are fake; ``now`` and ``peak`` are the bytes of those that live. Whoever reads one gets 0.

    Example:
        >>> with Living() as memory:
        ...     x = torch.zeros(250) + 1
        >>> memory.now, memory.peak
        (1000, 2000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._fake = FakeTensorMode()

    def __enter__(self):
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, identity: int, nbytes: int) -> None:
        self._known.discard(identity)
        self.now -= nbytes
