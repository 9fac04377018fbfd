"""Files that are whole or not there."""
import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Runs ``write`` on a temporary name beside ``path``, then renames it: nobody ever sees half a file."""
    replace_files({path: write})


def replace_files(writes: dict[Path, Callable[[Path], object]]) -> None:
    """As :func:`replace_file`, for files that belong together: none is renamed before all are written."""
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in writes}
    try:
        for path, write in writes.items():
            write(temporaries[path])
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
