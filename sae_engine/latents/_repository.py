"""A repository of the Hugging Face hub as a folder: written beside its place, put there whole, and uploaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import flag
from ..checkpoints import hub
from ..data._require import require
from ..data.store import folder_in


class Published(NamedTuple):
    """What :func:`push` wrote: the folder, None if it was a temporary one; the files' names and sizes in bytes; the
    address of the repository, None on a dry run.
    """

    folder: Path | None
    files: dict[str, int]
    url: str | None


def check_destination(repo_id: Any, folder: str | Path | None, dry_run: bool, private: bool) -> None:
    """Raises TypeError or ValueError, by name, for what :func:`published` cannot take; looks at no folder."""
    flag("dry_run", dry_run), flag("private", private)
    if not isinstance(repo_id, str) or not hub.is_name(repo_id) or repo_id.count("/") != 1:
        raise ValueError(f"repo_id must be 'owner/repository', got {repo_id!r}")
    if dry_run and folder is None:
        raise ValueError("folder must be given with dry_run=True: it is all that such a run leaves")


def published(
    write: Callable[[Path], None], repo_id: str, *, folder: str | Path | None, dry_run: bool, private: bool, api: Any
) -> Published:
    """Has ``write`` fill a new folder, moves it to ``folder`` where one is named, and uploads it unless ``dry_run``.

    Raises:
        FileExistsError: ``folder`` holds something.
    """
    target = None if folder is None else folder_in("folder", folder)
    if target is not None and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"folder: {str(target)!r} is not empty; name another, or empty it")
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place, so that the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(prefix=".push-", dir=None if target is None else target.parent) as staging:
        root = Path(staging) / "repository"
        root.mkdir()
        write(root)
        if target is not None:
            if target.is_dir():
                target.rmdir()
            root = root.rename(target)
        files = {
            file.relative_to(root).as_posix(): file.stat().st_size for file in sorted(root.rglob("*")) if file.is_file()
        }
        url = None if dry_run else _upload(root, repo_id, private, api)
        return Published(None if target is None else root, files, url)


def _upload(root: Path, repo_id: str, private: bool, api: Any) -> str:
    api = require("huggingface_hub").HfApi() if api is None else api
    url = api.create_repo(repo_id, exist_ok=True, private=private)
    api.upload_folder(repo_id=repo_id, folder_path=str(root), commit_message="Sparse autoencoders by sae-engine")
    return str(url)
