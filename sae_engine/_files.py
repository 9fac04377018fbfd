"""Files that are whole or not there."""
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: threads are kept apart, processes are not
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # of :func:`only_writer`
_NAMING = threading.Lock()


@contextmanager
def as_a_whole(*folders: Path, writes: bool) -> Iterator[None]:
    """Held while files of ``folders`` that belong together get their names, or are read: two saves are not mixed.

    An advisory lock of the folder itself, between threads and processes, and on file systems that share locks between
    machines. Where the file system has none, nothing is held; the window is that between two renames.
    """
    with ExitStack() as held:
        if writes:
            held.enter_context(_NAMING)
        for folder in sorted(set(folders)) if fcntl is not None else ():
            with suppress(OSError):
                opened = os.open(folder, os.O_RDONLY)
                held.callback(os.close, opened)  # and with it the lock
                fcntl.flock(opened, fcntl.LOCK_EX if writes else fcntl.LOCK_SH)
        yield


@contextmanager
def only_writer(folder: Path, refusal: str) -> Iterator[None]:
    """Held by the one that writes to ``folder`` for a while; another is refused at once, by RuntimeError(refusal).

    An advisory lock of a file there, which ends with the process, however that ends: one that is killed
    leaves the file, which is in nobody's way. Where the file system has no locks, or nothing can be written, nobody is
    kept apart.
    """
    path = folder / LOCK
    with ExitStack() as held:
        with suppress(OSError):
            while fcntl is not None:
                opened = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
                held.callback(os.close, opened)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RuntimeError(refusal) from None
                if path.exists() and os.path.samestat(os.fstat(opened), path.stat()):
                    held.callback(path.unlink, missing_ok=True)  # while the lock is held
                    break  # otherwise whoever held it has removed it in between
        yield


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Runs ``write`` on a temporary name beside ``path``, then renames it: nobody ever sees half a file."""
    replace_files({path: write})


def replace_files(writes: dict[Path, Callable[[Path], object]]) -> None:
    """As :func:`replace_file`, for files that belong together: none is renamed before all are written.

    A file has the permissions that it would have if it were opened and written under its own name. Temporaries have
    names of their own, so that any number of threads, processes and machines can write at a time; one that is killed
    leaves its temporaries, whose names begin with a dot, which nothing here ever reads.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in writes.items():
            temporary = temporaries[path] = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            with temporary.open("xb") as created:
                mode = os.fstat(created.fileno()).st_mode
            write(temporary)
            # Some writers, safetensors 0.8 among them, make a file of their own that only its owner may read.
            temporary.chmod((path.stat().st_mode if path.is_file() else mode) & 0o777)
        with as_a_whole(*(path.parent for path in writes), writes=True):
            for path, temporary in temporaries.items():
                os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """The file, or the names in the folder, are on the disk when this returns."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """A file of safetensors. A full disk is an OSError, as of any other file, and no error of a kind of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
