"""The first rank's disk, for ranks that do not see it: they send what they write there, piece by piece, and ask for
what they read. None holds more of a file than a piece.
"""
from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import is_of_a_collective

if TYPE_CHECKING:
    from .agreement import Agreement

PIECE_BYTES = 1 << 23  # that travel at a time
_DONE, _WRITE, _READ = range(3)
_LOST = -1  # in place of an error's number: a rank is gone, and no file is written or read any more


class LentDisk:
    """Who sees the first rank's disk, and the way to it for who does not. All ranks make one together.

    Args:
        agreement: of the ranks.
        sees: whether this one does, so that it opens files by itself.

    Attributes:
        borrowers: ranks that do not.
    """

    def __init__(self, agreement: Agreement, sees: bool) -> None:
        self._agreement, self._wire = agreement, agreement.wire
        self.borrowers = [rank for rank, each in enumerate(agreement.said(bool(sees))) if not each]
        if 0 in self.borrowers:
            raise OSError("path must be on a disk that the first rank sees, on which it has just written")
        self.is_borrowed = self._wire.rank in self.borrowers
        self.lenders = [rank for rank in range(self._wire.size) if rank not in self.borrowers]

    @contextmanager
    def lent(self, folder: Path) -> Iterator[None]:
        """Around a part of some work that all ranks do: in it borrowers may :meth:`open` files of ``folder``.

        The first rank serves them before its own part begins. What goes wrong with a borrower's file is an OSError of
        that borrower. A rank that is gone is noticed by the first one, at the latest when the others have been served
        once more, and told to all of them.
        """
        if self.borrowers and self._wire.rank == 0:
            self._serve(folder)
        try:
            yield
        finally:
            if self.borrowers and self._wire.rank > 0:
                self._ask(_DONE, "", 0, 0)
                self._answered("")

    @contextmanager
    def open(self, path: Path, mode: str) -> Iterator[IO[bytes]]:
        """A file that is there already for ``"r+b"``, a new one for ``"wb"``, or ``"rb"``."""
        if not self.is_borrowed:
            with path.open(mode) as file:
                yield file
            return
        raw: Any = _Borrowed(self, path.name, writes=mode != "rb")
        with io.BufferedReader(raw, PIECE_BYTES) if mode == "rb" else io.BufferedWriter(raw, 1 << 16) as file:
            yield file

    def whole(self, path: Path) -> bytes:
        """A small file. As in :meth:`open`, inside :meth:`lent`."""
        with self.open(path, "rb") as file:
            return file.read()

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """A borrower's, of at most a piece."""
        self._ask(_WRITE, name, offset, len(data))
        if len(data):
            self._wire.send(torch.frombuffer(data, dtype=torch.uint8), 0, "files")
        self._answered(name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A borrower's: fewer bytes at the end of the file."""
        self._ask(_READ, name, offset, length)
        found = torch.empty(self._answered(name), dtype=torch.uint8, device="cpu")
        if len(found):
            self._wire.receive(found, 0)
        return found.numpy().tobytes()

    def _ask(self, kind: int, name: str, offset: int, length: int) -> None:
        text = name.encode()
        self._wire.send(_numbers(kind, len(text), offset, length), 0, "files")
        if text:
            self._wire.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0, "files")

    def _answered(self, name: str) -> int:
        answer = _numbers(0, 0)
        self._wire.receive(answer, 0)
        error, length = answer.tolist()
        if error == _LOST:
            raise dist.DistBackendError("the first rank has lost another one")
        if error:
            raise OSError(error, os.strerror(error), name)
        return length

    def _serve(self, folder: Path) -> None:
        """Until everybody is done, in turns: who waits for one rank at a time hears at once that it is gone."""
        borrowers, others = list(self.borrowers), [rank for rank in self.lenders if rank > 0]
        answered: list[int] = []
        lost: dict[int, BaseException] = {}
        try:
            with ExitStack() as opened:
                files = _Lent(folder, opened)
                while left := borrowers or others:
                    for rank in list(left):
                        with self._noticed(rank, lost):
                            if not self._is_done(rank, files, is_lost=bool(lost)):
                                continue
                            answered.append(rank)
                        left.remove(rank)
                if not lost:
                    files.sync()
        finally:  # also where the disk is full, which is this rank's error
            for rank in answered:
                with self._noticed(rank, lost):
                    self._wire.send(_numbers(_LOST if lost else 0, 0), rank, "files")
        if lost:
            first, error = next(iter(lost.items()))
            self._agreement.linger([first])  # others may have waited too long for this rank, and will ask why
            raise dist.DistBackendError("a rank is gone") from error

    @contextmanager
    def _noticed(self, rank: int, lost: dict[int, BaseException]) -> Iterator[None]:
        """Around what needs a rank: where the connection to it breaks, all are told, and it counts as ``lost``."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_a_collective(error):
                raise
            lost[rank] = error
            self._agreement.lost(rank, error)

    def _is_done(self, rank: int, files: _Lent, *, is_lost: bool) -> bool:
        """Whether that is what a rank says; what else it asks for is answered."""
        request = _numbers(0, 0, 0, 0)
        self._wire.receive(request, rank)
        kind, letters, offset, length = request.tolist()
        if kind == _DONE:
            return True
        text = torch.empty(letters, dtype=torch.uint8, device="cpu")
        self._wire.receive(text, rank)
        given = torch.empty(length if kind == _WRITE else 0, dtype=torch.uint8, device="cpu")
        if len(given):
            self._wire.receive(given, rank)
        error, found = _LOST if is_lost else 0, b""
        try:
            if not is_lost:
                file = files.at(text.numpy().tobytes().decode(), offset, reads=kind == _READ)
                if kind == _WRITE:
                    file.write(given.numpy().data)
                else:
                    found = file.read(length)
        except OSError as failed:
            error = failed.errno or 5
        self._wire.send(_numbers(error, len(found)), rank, "files")
        if found:
            self._wire.send(torch.frombuffer(bytearray(found), dtype=torch.uint8), rank, "files")
        return False


class _Lent:
    """Files of the first rank's folder, which are opened once and closed by ``opened``."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder, self._opened = folder, opened
        self._files: dict[str, IO[bytes]] = {}

    def at(self, name: str, offset: int, *, reads: bool) -> IO[bytes]:
        if name not in self._files:
            place = self._folder / name
            mode = "rb" if reads else "r+b" if place.exists() else "xb"
            self._files[name] = self._opened.enter_context(place.open(mode))
        self._files[name].seek(offset)
        return self._files[name]

    def sync(self) -> None:
        """What was written is on the disk."""
        for file in self._files.values():
            if file.writable():
                file.flush()
                os.fsync(file.fileno())


class _Borrowed(io.RawIOBase):
    """A file of the first rank's, as io's buffers want it."""

    def __init__(self, disk: LentDisk, name: str, *, writes: bool) -> None:
        super().__init__()
        self._disk, self._name, self._writes, self._at = disk, name, writes, 0

    def readable(self) -> bool:
        return not self._writes

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the end of a borrowed file is not known")
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")[:PIECE_BYTES]
        self._disk.write(self._name, self._at, memoryview(bytearray(piece)) if piece.readonly else piece)
        self._at += len(piece)
        return len(piece)

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer).cast("B")
        found = self._disk.read(self._name, self._at, min(len(room), PIECE_BYTES))
        room[: len(found)] = found
        self._at += len(found)
        return len(found)


def _numbers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
