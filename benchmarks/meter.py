"""Bytes that kernels load and store, counted in Triton's interpreter (``TRITON_INTERPRET=1``), on any machine.

What counts: the lanes of a load or store that its mask lets through, in bytes of the pointer's element; lanes of one
instruction of one program that share an address count once, as the hardware fetches it once. An atomic counts as a
load and a store. Every instruction of every program counts anew (``loaded``, ``stored``): what caches and memory
together must deliver. ``loaded_once`` and ``stored_once`` count each address once: what memory must deliver to an
SM whose cache forgets nothing. Stock operators between the kernels are not seen.
"""
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


class Counts(NamedTuple):
    """Bytes."""

    loaded: int = 0
    stored: int = 0
    loaded_once: int = 0
    stored_once: int = 0

    def __add__(self, other):
        return Counts(*map(sum, zip(self, other, strict=True)))

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


class _Storage:
    """The accesses to one storage; it is kept alive, so that no other takes its address."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = tensor.untyped_storage()
        self.bytes = {"load": 0, "store": 0}
        self.seen: dict[str, np.ndarray] = {kind: np.zeros(self.storage.nbytes(), dtype=bool) for kind in self.bytes}
        self.size = tensor.element_size()

    def counts(self) -> Counts:
        once = (int(seen.sum()) * self.size for seen in self.seen.values())
        return Counts(*self.bytes.values(), *once)


class Launch(NamedTuple):
    """One launch, and the bytes of each of its pointer arguments that it touched."""

    kernel: str
    grid: tuple[int, ...]
    loaded: dict[str, int]
    stored: dict[str, int]


class Meter:
    """What was counted. A tensor stands for its storage, views for the whole of it."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._storages: dict[int, _Storage] = {}
        self._ranges: list[tuple[int, int, str, _Storage]] = []

    def of(self, *tensors: torch.Tensor) -> Counts:
        """The bytes of these tensors."""
        places = {t.untyped_storage().data_ptr() for t in tensors}
        return sum((s.counts() for place, s in self._storages.items() if place in places), Counts())

    @property
    def total(self) -> Counts:
        """The bytes of all tensors, scratch included."""
        return sum((s.counts() for s in self._storages.values()), Counts())

    def _enter(self, kernel: str, grid: tuple[int, ...], arguments: list[tuple[str, Any, Any]]) -> None:
        """``arguments``: name, what was passed, and the host's copy that the interpreter works on."""
        self.launches.append(Launch(kernel, grid, {}, {}))
        self._ranges = []
        for name, device, host in arguments:
            if isinstance(device, torch.Tensor):
                place = device.untyped_storage().data_ptr()
                storage = self._storages.setdefault(place, _Storage(device))
                start = host.untyped_storage().data_ptr()
                self._ranges.append((start, start + host.untyped_storage().nbytes(), name, storage))

    def _count(self, kind: str, pointers: Any, mask: Any) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        places, wanted = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        addresses = np.unique(places[wanted])
        if not addresses.size:
            return
        found = next((r for r in self._ranges if r[0] <= int(addresses[0]) and int(addresses[-1]) < r[1]), None)
        if found is None:
            raise RuntimeError(f"{self.launches[-1].kernel}: a {kind} lies outside of its arguments")
        start, _, name, storage = found
        storage.bytes[kind] += addresses.size * size
        storage.seen[kind][(addresses - np.uint64(start)).astype(np.int64)] = True
        storage.size = size
        of_launch = self.launches[-1].loaded if kind == "load" else self.launches[-1].stored
        of_launch[name] = of_launch.get(name, 0) + addresses.size * size


def _leaves(name: str, device: Any, host: Any) -> Iterator[tuple[str, Any, Any]]:
    """The arguments within an argument that is a tuple."""
    if not isinstance(device, tuple):
        yield name, device, host
        return
    for place, pair in enumerate(zip(device, host, strict=True)):
        yield from _leaves(f"{name}[{place}]", *pair)


@contextlib.contextmanager
def metering() -> Iterator[Meter]:
    """Counts what the interpreted kernels launched inside move."""
    meter = Meter()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    to_host = executor._init_args_hst

    def counted_load(self, ptrs, mask, *rest, **named):
        meter._count("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def counted_store(self, ptrs, value, mask, *rest, **named):
        meter._count("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    def counted_atomic(self, operation, ptr, val, mask, *rest, **named):
        meter._count("load", ptr, mask)
        meter._count("store", ptr, mask)
        return atomic(self, operation, ptr, val, mask, *rest, **named)

    def entering(self, args_dev, kwargs):
        args, named = to_host(self, args_dev, kwargs)
        names = [*self.arg_names[: len(args_dev)], *kwargs]
        arguments = zip(names, [*args_dev, *kwargs.values()], [*args, *named.values()], strict=True)
        meter._enter(self.fn.__name__, tuple(self.grid), [leaf for one in arguments for leaf in _leaves(*one)])
        return args, named

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_atomic),
        mock.patch.object(executor, "_init_args_hst", entering),
    ):
        yield meter
