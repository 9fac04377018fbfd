"""Files that are whole or not there."""
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

# Held while files that belong together get their names: two threads that save into one folder do not mix theirs.
_NAMING = threading.Lock()


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
        with _NAMING:
            for path, temporary in temporaries.items():
                os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
