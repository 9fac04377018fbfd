"""A CUDA device that is played on the CPU, to see where a program would wait for a real one.

Tensors of it say that they lie on ``cuda:0`` and hold their numbers in main memory. PyTorch's operators run on the
CPU, autograd as ever. Our operations run the launchers that a GPU would, with kernels that do nothing, and take their
results from the reference: launchers are where one could wait, kernels have tests of their own. What a real device
would have to be waited for raises :class:`Waits`: reading a tensor, a result whose size follows from values, a copy
from or to the host. So does what a CUDA graph's capture refuses. Tensors on two devices, or a CPU generator for a CUDA
tensor, are the errors that they are.

Not played: streams, sparse tensors, and time.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from sae_kernels.dispatch import IMPLEMENTED, resolve

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
SIZED_BY_VALUES = {
    aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim, aten.unique_consecutive,
    aten.repeat_interleave, aten.multinomial, aten.histc,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_, aten.copy}
ONLY_ON_CUDA = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.addmm.dtype: lambda c, a, b, dtype: c.to(dtype) + a.to(dtype) @ b.to(dtype),
}  # fmt: skip
BETWEEN_DEVICES = COPIES | INDEXING | {aten.set_}


class Underway:
    """An event that has not happened yet."""

    def query(self) -> bool:
        return False


def never_arrives(number: Tensor) -> tuple[Tensor, Underway]:
    return number, Underway()


class Waits(RuntimeError):
    """The host would wait for the device here."""


class OnCuda(torch.Tensor):
    """A tensor of the played device. To C++ it lies on the meta device, which autograd can work with anywhere."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self):
        return f"OnCuda({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Played.active.call(func, args, kwargs or {})


class Played(TorchDispatchMode):
    """While entered, ``device="cuda"`` means the played device. ``waits`` counts what would have waited.

    With :meth:`refusing`, a wait is an error; with :meth:`capturing` so is a kernel that was not launched before, which
    a capture would have to load.
    """

    active: Played

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._refused = self._captures = False
        self._launched: set[tuple] = set()
        self._patches = contextlib.ExitStack()

    @contextlib.contextmanager
    def refusing(self):
        self._refused = True
        try:
            yield self
        finally:
            self._refused = False

    @contextlib.contextmanager
    def capturing(self):
        self._captures = True
        try:
            with self.refusing():
                yield self
        finally:
            self._captures = False

    def waited(self, why: str) -> None:
        self.waits.append(why)
        if self._refused:
            raise Waits(why)

    def __enter__(self):
        import pytest
        from triton.runtime.interpreter import InterpretedFunction

        patch = self._patches.enter_context(pytest.MonkeyPatch.context())
        answers = {
            "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0,
            "get_device_capability": (9, 0), "mem_get_info": (1 << 30, 1 << 31), "memory_reserved": 0,
            "memory_allocated": 0, "is_bf16_supported": True,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._captures)
        patch.setattr(torch.cuda, "synchronize", lambda *_: self.waited("torch.cuda.synchronize"))
        # A build without CUDA has neither pinned memory nor events: what is sent to the host never arrives.
        patch.setattr("sae_engine.training.backward._sent", never_arrives)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, functools.partial(_from_host, getattr(torch, name)))
        patch.setattr(InterpretedFunction, "run", lambda kernel, *a, **k: self._launch(kernel, a, k))
        Played.active = self
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._patches.close()

    def _launch(self, kernel, args, kwargs) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        plain = kernel.kwargs.get("do_not_specialize") or ()
        variant = kernel.fn.__name__, *((name, _specialised(v, name in plain)) for name, v in given.items())
        if self._captures and variant not in self._launched:
            raise Waits(f"{kernel.fn.__name__} is first launched, and so loaded, while a graph is captured")
        self._launched.add(variant)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def call(self, func, args, kwargs):
        inputs = pytree.tree_leaves((args, kwargs))
        played = [t for t in inputs if isinstance(t, OnCuda)]
        if func.namespace == "sae_engine" and played:
            run = IMPLEMENTED[func.overloadpacket.__name__]
            with _again(self):
                found = run(*args, **kwargs)
            if not isinstance(args[-1], str) or resolve(args[-1], *played) != "triton":
                return found
            return _shown(run(*pytree.tree_map(_held, args[:-1]), "reference"), {})
        if func.namespace == "aten" and func._can_decompose():  # below autograd, what is made of others comes as it is
            with _again(self):
                return func.decompose(*args, **kwargs)
        device = kwargs.get("device")
        lands = bool(played) if device is None else torch.device(device).type != "cpu"
        self._check(func, inputs, played, lands, kwargs)
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        own = {id(t.held): t for t in played}
        args, kwargs = pytree.tree_map(_held, (args, kwargs))
        found = ONLY_ON_CUDA.get(func, func)(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})
        if not lands:
            return found
        return _shown(found, own)

    def _check(self, func, inputs, played, lands, kwargs) -> None:
        packet = func.overloadpacket
        here = [t for t in inputs if isinstance(t, Tensor) and not isinstance(t, OnCuda)]
        if lands and any(isinstance(g, torch.Generator) and g.device.type == "cpu" for g in inputs):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if packet in COPIES:
            crosses = (bool(played) and bool(here)) if packet is not aten._to_copy else lands != bool(played)
            if crosses and not _non_blocking(func, inputs, kwargs):
                self.waited(f"{func}: a copy between host and device")
        elif played and any(t.dim() for t in here) and packet not in BETWEEN_DEVICES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cpu and cuda:0")
        if not played:
            return
        if packet in READS:
            self.waited(f"{func}: the host reads the device")
        if packet in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self.waited(f"{func}: the size of its result follows from values")
        if packet in INDEXING:
            indices = [t for t in inputs if isinstance(t, Tensor)][1:]
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices[:1]):
                self.waited(f"{func}: a mask as an index")
            if any(t.dim() for t in here):
                self.waited(f"{func}: indices from the host")


def _from_host(make, data, *, device=None, **options):
    """``torch.tensor`` and its like, which copy below every mode."""
    device = torch.get_default_device() if device is None else torch.device(device)
    if isinstance(data, OnCuda) or device.type == "cpu":
        return make(data, **options)
    with torch.device("cpu"):
        made = make(data, **options)
    return made.to(CUDA)


def _non_blocking(func, inputs, kwargs) -> bool:
    if "non_blocking" in kwargs:
        return bool(kwargs["non_blocking"])
    return func.overloadpacket is not aten._to_copy and any(leaf is True for leaf in inputs)


def _held(leaf):
    return leaf.held if isinstance(leaf, OnCuda) else leaf


def _shown(found, own: dict[int, OnCuda]):
    """Results as tensors of the played device; ``own``: those there are already, by what they hold."""

    def shown(leaf):
        if type(leaf) is not Tensor:
            return leaf
        return own[id(leaf)] if id(leaf) in own else OnCuda(leaf)

    return pytree.tree_map(shown, found)


def _specialised(value, plain: bool):
    """What Triton compiles anew for, of one argument; ``plain`` where it was told not to look at the value."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value.bit_length() > 31 if plain else "one" if value == 1 else value % 16 == 0, value.bit_length() > 31
    return value if isinstance(value, bool | str | type(None)) else type(value).__name__


@contextlib.contextmanager
def _again(mode: TorchDispatchMode):
    """The mode, inside a call that it handles."""
    _push_mode(mode)
    try:
        yield
    finally:
        _pop_mode()
