"""torch's checkpoints where some ranks do not see the disk that they lie on."""
from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from .lent_disk import LentDisk


class Writer(dcp.FileSystemWriter):
    """Each rank's file of tensors, on the first rank's disk."""

    def __init__(self, folder: Path, disk: LentDisk) -> None:
        super().__init__(folder, sync_files=not disk.is_borrowed)  # the first rank syncs what it is sent
        self._disk = disk
        if disk.is_borrowed:
            self.fs = _Files(disk, {})

    def write_data(self, *args: Any) -> Any:
        with self._disk.lent(Path(self.path)):
            return super().write_data(*args)


class Reader(dcp.FileSystemReader):
    """The same, read. ``listing`` is a borrower's copy of the file that says what lies where."""

    def __init__(self, folder: Path, disk: LentDisk, listing: bytes | None) -> None:
        super().__init__(folder)
        self._disk = disk
        if listing is not None:
            self.fs = _Files(disk, {".metadata": listing})

    def read_data(self, *args: Any) -> Any:
        with self._disk.lent(Path(self.path)):
            return super().read_data(*args)


class _Files(FileSystem):
    """Of a borrower: nothing is made or looked for on its own disk."""

    def __init__(self, disk: LentDisk, known: dict[str, bytes]) -> None:
        self._disk, self._known = disk, known

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:  # type: ignore[override]
        if (name := Path(path).name) in self._known:
            yield io.BytesIO(self._known[name])
            return
        with self._disk.open(Path(path), mode) as file:
            yield file

    def mkdir(self, path: Any) -> None:
        pass

    def exists(self, path: Any) -> bool:
        return False
