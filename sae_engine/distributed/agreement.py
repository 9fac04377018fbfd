"""What the ranks of a mesh tell one another from host to host: that they agree, that they are there, what went wrong.

A rank says in a small store that it has come to a meeting before it waits for the others. So one that never comes, dead
or stuck, has a name when the wait fails, and whoever notices first says it for all.
"""
from __future__ import annotations

import json
import os
import platform
import socket
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as check
from .wire import Wire

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT_SECONDS = 300.0
GRACE_SECONDS = 2.0  # for those that are only late, before a rank that has not come is named
KINDS = ("step", "aligned", "said", "agreed", "saved", "loaded")  # of meetings; all ranks are at the same one
_NOBODY = "-"


class Agreement:
    """The host's side of a mesh. One for each mesh, by :meth:`of`; all of its ranks call the same methods in order.

    Args:
        mesh: whose ranks these are.
        timeout: seconds to wait for one that does not answer.

    Raises:
        RuntimeError: the ranks cannot reach one another.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        self.ranks: list[int] = mesh.mesh.flatten().tolist()
        self.timeout = check.positive("timeout", timeout)
        seconds = timedelta(seconds=self.timeout)
        group = dist.new_group(self.ranks, timeout=seconds, backend="gloo", use_local_synchronization=True)
        self.wire = Wire(group)
        self.rank, self.size = self.wire.rank, self.wire.size
        self.calls = 0
        self._ended = ""  # why the ranks have parted
        self._keeps = False  # whether the store lives in this process
        self._store = self._opened(seconds)
        self._store.set(f"at {self.rank}", "0")
        self._store.set(f"error {self.rank}", json.dumps([-1, ""]))
        self._store.set_timeout(timedelta(seconds=GRACE_SECONDS))  # of what follows: those who opened it are there
        self._processes = self.said([socket.gethostname(), os.getpid()])

    @classmethod
    def of(cls, mesh: DeviceMesh, timeout: float | None = None) -> Agreement:
        """The one of this mesh, which its first use makes, with ``timeout`` seconds or 300."""
        if mesh not in _AGREEMENTS:
            _AGREEMENTS[mesh] = cls(mesh, TIMEOUT_SECONDS if timeout is None else timeout)
        return _AGREEMENTS[mesh]

    def meet(self, kind: str, number: int = 0, error: BaseException | None = None) -> list[int]:
        """Every rank's ``number``, once all have come; nothing of a device is read or waited for.

        Args:
            kind: of :data:`KINDS`: what this rank is about to do.
            number: rows that it brings, or what else the others have to know.
            error: what has gone wrong here, which the others are told; the caller raises it itself.

        Raises:
            RuntimeError: another rank has an error, is at another meeting, or does not come: names it.
        """
        self.calls += 1
        with self._waiting():
            status = -1 if error is not None else KINDS.index(kind)
            met = self.wire.hosts([number, self.calls, status], "rows, calls, status")
            if any(status < 0 for _, _, status in met):
                words = [*self._texts("" if error is None else _line(error))]
        if error is None and (failed := [rank for rank, (_, _, status) in enumerate(met) if status < 0]):
            raise RuntimeError("; ".join(f"rank {self.ranks[rank]}: {words[rank]}" for rank in failed))
        places = [(f"{KINDS[status]!r}, meeting {calls}") for _, calls, status in met if status >= 0]
        if len({*places}) > 1:
            raise RuntimeError("the ranks are not at the same place: " + self._each(places))
        return [number for number, _, _ in met]

    def said(self, value: Any) -> list[Any]:
        """Every rank's value, of JSON's types.

        Raises:
            RuntimeError: as :meth:`meet`.
        """
        self.calls += 1
        with self._waiting():
            return [json.loads(text) for text in self._texts(json.dumps(value))]

    def agree(self, **fields: Any) -> None:
        """All ranks have the same fields, of JSON's types.

        Raises:
            RuntimeError: one has another; names field, ranks and values.
        """
        every = self.said(fields)
        names = dict.fromkeys(name for one in every for name in one)
        wrong = []
        for name in names:
            values = [json.dumps(one.get(name), sort_keys=True) for one in every]
            if len({*values}) > 1:
                usual = Counter(values).most_common(1)[0][0]
                others = [rank for rank, value in enumerate(values) if value != usual]
                wrong.append(f"{name} is {usual} on rank {self.ranks[values.index(usual)]} and "
                             + ", ".join(f"{values[rank]} on rank {self.ranks[rank]}" for rank in others))  # fmt: skip
        if wrong:
            raise RuntimeError("all ranks must be given the same: " + "; ".join(wrong))

    @contextmanager
    def all_or_none(self, kind: str) -> Iterator[None]:
        """A part of some work that all ranks do: what one fails at is raised by all, before any of them goes on.

        Raises:
            RuntimeError: another rank has failed or does not answer: names it.
            As raised inside otherwise.
        """
        try:
            yield
        except Exception as error:
            if is_of_a_collective(error):
                raise self.parted(error) from error
            self.meet(kind, error=error)
            raise
        self.meet(kind)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What fails inside is told to the others; where that is because another rank is gone, the error names it.

        Raises:
            RuntimeError: a collective has failed; names the rank on whose account.
            As raised inside otherwise.
        """
        try:
            yield
        except Exception as error:
            if is_of_a_collective(error):
                raise self.parted(error) from error
            if not self._ended:
                self._confess(error)
            raise

    def parted(self, error: BaseException) -> RuntimeError:
        """What to raise in place of a collective's ``error``: it names the rank on whose account that failed."""
        return RuntimeError(self._ended or self._verdict(error))

    def lost(self, rank: int, error: BaseException) -> None:
        """Another rank is gone, as only this one knows, by the ``error`` of its wait for it: so all will say."""
        try:
            self._declare(self._silence([rank], error))
        except RuntimeError as gone:
            self._first_gone(gone)

    def linger(self, missing: Sequence[int]) -> None:
        """Until all ranks but those ``missing`` know why they have parted, or should."""
        if self._keeps:
            self._linger(lambda rank: rank in missing)

    # --- who is there ---------------------------------------------------------------------------------------------

    def _opened(self, seconds: timedelta) -> dist.Store:
        """torchrun's store, which outlives every rank; without one, a store that the first rank keeps."""
        hosts = self._texts(socket.gethostname())
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            kept: dist.Store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=seconds)
            # a name of its own: what an earlier mesh of these processes left there, or a live one keeps, is not ours
            name = self._texts(uuid.uuid4().hex)[0]
            store: dist.Store = dist.PrefixStore(f"sae_engine/{name}", kept)
        else:
            self._keeps = self.rank == 0
            host = "127.0.0.1" if len({*hosts}) == 1 else os.environ.get("MASTER_ADDR", hosts[0])
            options: dict[str, Any] = {"wait_for_workers": False, "timeout": seconds}
            own = dist.TCPStore(host, 0, is_master=True, **options) if self._keeps else None
            port = self.wire.hosts([0 if own is None else own.port], "said")[0][0]
            store = own or dist.TCPStore(host, port, is_master=False, **options)
        if self.rank == 0:
            store.set("verdict", _NOBODY)
        return store

    def _texts(self, text: str) -> list[str]:
        own = torch.frombuffer(bytearray(text.encode()) or bytearray(b" "), dtype=torch.uint8)
        lengths = [length for (length,) in self.wire.hosts([len(own)], "said")]
        padded = torch.cat([own, own.new_zeros(max(lengths) - len(own))])
        every = self.wire.gather(padded, "said")
        return [bytes(row[:length].tolist()).decode().strip() for row, length in zip(every, lengths, strict=True)]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around what waits for the others."""
        if self._ended:
            raise RuntimeError(f"the ranks of this mesh have parted: {self._ended}")
        self._come(str(self.calls))
        try:
            yield
        except RuntimeError as error:
            if self._ended or not is_of_a_collective(error):
                raise
            raise self.parted(error) from error

    def _come(self, where: str) -> None:
        try:
            self._store.set(f"at {self.rank}", where)
        except RuntimeError as error:  # torch's errors of stores are
            raise RuntimeError(self._first_gone(error)) from error

    def _verdict(self, error: BaseException) -> str:
        """On whose account a wait has failed: what another rank has said of itself, or who has not come."""
        try:
            self._store.set(f"at {self.rank}", f"{self.calls}!")  # past it, as far as it could
            missing, errors = self._missing()
            said = self._silence(missing, error) if missing else (
                f"the connection between the ranks broke at meeting {self.calls}: {_line(error)}")  # fmt: skip
            return self._tell("; ".join(errors) or said, missing)
        except RuntimeError as lost:
            return self._first_gone(lost)

    def _silence(self, missing: Sequence[int], error: BaseException) -> str:
        seconds = f"within {self.timeout:g} s" if "imed out" in str(error) else "any more"
        names = ", ".join(f"{self.ranks[rank]}{self._how(rank)}" for rank in missing)
        return f"rank {names} does not answer {seconds}, at meeting {self.calls}"

    def _missing(self) -> tuple[list[int], list[str]]:
        """The ranks that have not come here, once those that were only late have had their time; and what others that
        have failed by themselves have said of it.
        """
        seen, since = None, time.monotonic()
        while True:
            places, errors = self._places(), self._errors()
            failed = [rank for rank, (calls, _) in enumerate(errors) if calls == int(places[rank].rstrip("!"))]
            behind = [rank for rank, place in enumerate(places) if not place.endswith("!") and rank not in failed]
            words = [f"rank {self.ranks[rank]}: {errors[rank][1]}" for rank in failed]
            if words or not behind or self._told() != _NOBODY:
                return [], words
            if seen != places:
                seen, since = places, time.monotonic()
            if dead := [rank for rank in behind if self._is_dead(rank)]:
                return dead, []
            if time.monotonic() - since > GRACE_SECONDS:
                at = [int(place.rstrip("!")) for place in places]
                late = [rank for rank in behind if at[rank] < max(at)]
                return late or behind, []
            time.sleep(0.02)

    def _places(self) -> list[str]:
        """The meeting that each rank has come to, with a mark where it has given up there."""
        return [place.decode() for place in self._store.multi_get([f"at {rank}" for rank in range(self.size)])]

    def _errors(self) -> list[list]:
        """At which meeting each rank has failed by itself last, and what it said."""
        return [json.loads(said) for said in self._store.multi_get([f"error {rank}" for rank in range(self.size)])]

    def _confess(self, error: BaseException) -> None:
        """Says what this rank has failed at by itself: it is still there, but may not come any more."""
        try:
            self._store.set(f"error {self.rank}", json.dumps([self.calls, _line(error)]))
            if self._keeps:
                self._linger(lambda rank: self._errors()[rank][0] == self.calls)
        except RuntimeError:  # the store is gone, with the first rank: there is nobody to tell
            return

    def _is_dead(self, rank: int) -> bool:
        """Whether a process of this machine has ended; of another machine nobody here knows."""
        host, process = self._processes[rank]
        if host != self._processes[self.rank][0] or not Path("/proc/self/stat").exists():
            return False
        try:  # one that has ended, and that its parent has not asked for yet, is a zombie
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _how(self, rank: int) -> str:
        host, process = self._processes[rank]
        return f" (process {process} on {host}{' has ended' * self._is_dead(rank)})"

    def _told(self) -> str:
        return self._store.get("verdict").decode()

    def _tell(self, text: str, missing: Sequence[int] = ()) -> str:
        """What all ranks but those ``missing`` will say: ``text``, unless another was first."""
        told = self._declare(text)
        self.linger(missing)
        return told

    def _declare(self, text: str) -> str:
        self._ended = self._store.compare_set("verdict", _NOBODY, text).decode()
        self._store.set(f"at {self.rank}", f"{self.calls}!")
        self._store.set(f"knows {self.rank}", "")
        return self._ended

    def _linger(self, needs_nothing: Callable[[int], bool]) -> None:
        """The rank with which the store goes waits for those that still have to read it."""
        until = time.monotonic() + GRACE_SECONDS
        left = {*range(self.size)} - {self.rank}
        while left and time.monotonic() < until:
            left = {rank for rank in left if not (needs_nothing(rank) or self._store.check([f"knows {rank}"])
                                                  or self._is_dead(rank))}  # fmt: skip
            time.sleep(0.01)

    def _first_gone(self, error: BaseException) -> str:
        self._ended = (f"rank {self.ranks[0]}{self._how(0)} does not answer any more, at meeting {self.calls}: "
                       f"{_line(error)}")  # fmt: skip
        return self._ended

    def _each(self, values: list[str]) -> str:
        return ", ".join(f"rank {rank} at {value}" for rank, value in zip(self.ranks, values, strict=True))


_AGREEMENTS: weakref.WeakKeyDictionary[DeviceMesh, Agreement] = weakref.WeakKeyDictionary()


def is_of_a_collective(error: BaseException) -> bool:
    """Whether a collective has failed, and not what one rank computes by itself."""
    if isinstance(error, dist.DistError):
        return True
    said = ("gloo", "connection closed by peer", "application timeout")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)


def fingerprint(sae: Any, **options: Any) -> dict[str, Any]:
    """What has to be the same on all ranks: sizes, rule, ``options`` and versions, for :meth:`Agreement.agree`."""
    rule = sae.activation
    triton = None
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:  # PackageNotFoundError is one: it is not installed
        pass
    table = os.environ.get("SAE_AUTOTUNE_TABLE") or None
    return {
        "d_in": sae.d_in, "d_sae": sae.d_sae, "d_out": sae.d_out, "activation": repr(rule),
        "dtype": str(sae.b_dec.dtype), "skip": sae.W_skip is not None,
        "apply_b_dec_to_input": sae.apply_b_dec_to_input, "normalize_activations": sae.normalize_activations,
        "rescale_acts_by_decoder_norm": sae.rescale_acts_by_decoder_norm,
        "torch": torch.__version__, "triton": triton, "python": platform.python_version(),
        "SAE_AUTOTUNE_TABLE": None if table is None else Path(table).read_text(encoding="utf-8"),
        **options,
    }  # fmt: skip


def aligned(
    batches: Iterable[Tensor], mesh: DeviceMesh, *, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """This rank's batches, then empty ones until every rank's have ended: a rank with fewer does not leave the others.

    A training step takes an empty batch: a rank without rows of its own still computes its latents for the others.

    Args:
        batches: ``(rows, d)`` each, as many as this rank has, also none.
        mesh: whose ranks these are.
        device: of the empty batches; by default that of the mesh.

    Raises:
        RuntimeError: another rank does not come, or its batches failed: names it.
        ValueError: the ranks' rows are not of one width and dtype.

    Example:
        >>> for x in aligned(batches, mesh):  # doctest: +SKIP
        ...     step(x)
    """
    agreement = Agreement.of(mesh)
    source, none_left = iter(batches), None
    while True:
        error, batch = None, None
        try:
            batch = next(source, None)
            if batch is not None:
                check.floating("batches", batch, dims=2)
        except Exception as raised:
            error = raised
        left = agreement.meet("aligned", int(batch is not None), error=error)
        if error is not None:
            raise error
        if not any(left):
            return
        if none_left is None:
            kinds = agreement.said(None if batch is None else [batch.shape[1], str(batch.dtype)])
            known = {tuple(one) for one in kinds if one is not None}
            if len(known) > 1:
                raise ValueError(f"batches must have one width and dtype on all ranks, got {sorted(known)}")
            ((width, name),) = known
            dtype = getattr(torch, name.removeprefix("torch."))
            none_left = torch.empty(0, width, dtype=dtype, device=device or mesh.device_type)
        yield none_left if batch is None else batch


def _line(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
