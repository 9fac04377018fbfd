"""Checkpoints of the Hugging Face hub."""
from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from .._checks import first_line
from . import llama_scope

# A repository, then a folder or a file in it. No part begins with a dot, so none leads out of it.
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w=+-][\w.=+-]*)*)")
_DESCRIPTIONS = (".json", ".yaml")
_WEIGHTS = (".safetensors", ".pt", ".npz")
TIMEOUT_SECONDS = 10
LISTED = 20  # folders that an error names
# Trained on mean-centred activations, by the account of SAELens' list of releases; their files do not say so.
CENTRED = frozenset({
    "jbloom/GPT2-Small-SAEs-Reformatted", "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "tommmcgrath/gpt2-small-mlp-out-saes",
})  # fmt: skip


def is_name(name: str) -> bool:
    """Whether ``name`` can be ``owner/repository[/folder][/file]``."""
    return _NAME.fullmatch(name) is not None


def fetch(name: str) -> tuple[Path, str, str]:
    """Downloads what ``owner/repository[/folder][/file]`` names, or takes it from the hub's cache.

    Returns:
        where it lies, the repository, and the name with the commit.

    Raises:
        FileNotFoundError: the hub has no such repository, or nothing of that name in it; says what it has.
        ConnectionError: the hub does not answer and its cache does not have all of it.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ImportError(f"path={name!r} needs the package huggingface_hub, which transformers brings") from error
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"path must be a folder, a file or owner/repository[/folder], got {name!r}")
    repository, inside = match[1], match[2].strip("/")
    is_file = inside.endswith(_WEIGHTS)
    folder = inside.rpartition("/")[0] if is_file else inside
    prefix = f"{folder}/" if folder else ""
    described = [f"{prefix}*{suffix}" for suffix in _DESCRIPTIONS]
    wanted = [inside, *described] if is_file else [*described, *(f"{prefix}*{suffix}" for suffix in _WEIGHTS)]
    if folder.endswith(f"/{llama_scope.FOLDER}"):
        wanted.append(f"{folder.removesuffix(llama_scope.FOLDER)}{llama_scope.CONFIG}")

    def download(wanted: list[str], **options) -> Path:
        return Path(hub.snapshot_download(repository, allow_patterns=wanted, etag_timeout=TIMEOUT_SECONDS, **options))

    try:
        snapshot = download(wanted, ignore_patterns=[f"{prefix}*/*"])  # a repository holds hundreds, a folder each
        if not is_file and (snapshot / inside / llama_scope.CONFIG).is_file():
            snapshot = download([f"{prefix}{llama_scope.WEIGHTS}"])
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"path={name!r} is neither here nor on the hub: {first_line(error)}") from error
    except Exception as error:  # each version of the hub's client has its own network errors
        reason = first_line(error)
        raise ConnectionError(f"path={name!r} is not here, and the hub did not give it: {reason}") from error
    place = snapshot / inside
    held = [*place.glob("*"), *place.glob(f"{llama_scope.FOLDER}/*")]
    if not place.is_file() and not any(file.suffix in _WEIGHTS for file in held):
        _refuse(name, repository, inside, snapshot.name)
    return place, repository, f"{repository}@{snapshot.name}" + (f"/{inside}" if inside else "")


def _refuse(name: str, repository: str, inside: str, commit: str) -> NoReturn:
    """Why nothing came: without a network the client hands out whatever part of a repository lies in its cache."""
    import huggingface_hub as hub

    try:
        files = hub.HfApi().list_repo_files(repository, revision=commit)
    except Exception as error:
        raise ConnectionError(
            f"path={name!r}: of {inside or 'this repository'!r} the cache holds a part at most, and the hub did not "
            f"answer ({first_line(error)}): load it once with a network"
        ) from error
    folders = sorted({file.rpartition("/")[0] for file in files if file.endswith(_WEIGHTS)} - {""})
    below = [folder for folder in folders if folder.startswith(f"{inside}/")] if inside else folders
    listed = below or folders
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    hint = f"; weights are in {listed[:LISTED]}{more}: name one, as {repository}/{listed[0]}" if listed else ""
    where = f" in {inside!r}" if inside else ""
    raise FileNotFoundError(f"path={name!r}: the repository {repository!r} holds no weights{where}{hint}")
