"""Language models to read activations from: a local folder, a hub name, or the embedded model."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._checks import device_in, dtype_in, first_line, flag
from .._files import file_sha256
from ._require import require
from .loading import check_packages
from .sites import Site

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "embedded_model"
EMBEDDED = "embedded"
HUB_TIMEOUT_SECONDS = 5.0

# Arguments of from_pretrained that loading itself sets.
_DECIDED = ("local_files_only", "output_loading_info", "ignore_mismatched_sizes")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SAFETENSORS, _PICKLED = "model*.safetensors", "pytorch_model*.bin"

logger = logging.getLogger(__name__)


class HubUnavailable(OSError):
    """The hub did not answer, and what was asked for is not in its cache."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model in eval mode, with what a table made from it has to name.

    ``revision`` is the hub's commit, None for a folder. ``sha256`` is that of the weight file; of several
    files it is the sha256 of the lines ``"<sha256>  <file name>\\n"`` in the order of their names.

    Example:
        >>> lm = load_language_model()
        >>> lm.name, lm.d_model, lm.num_layers
        ('embedded', 256, 4)
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    revision: str | None
    sha256: str = field(repr=False)
    d_model: int
    num_layers: int
    max_length: int
    is_embedded: bool
    others: tuple[LanguageModel, ...] = ()  # that are given the same tokens: see sae_engine.data.together

    def of(self, site: Site) -> LanguageModel:
        """The one that a site is in: itself, or of several the one of ``site.model``.

        Raises:
            ValueError: there are not so many.
        """
        if site.model > len(self.others):
            raise ValueError(f"site {str(site)!r}: there is no model {site.model} beside {self.name!r}, which has "
                             f"{len(self.others)} others: data.together() takes them")  # fmt: skip
        return self if site.model == 0 else self.others[site.model - 1]


def load_language_model(
    name_or_path: str | Path | nn.Module | None = None,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    fallback: bool = False,
) -> LanguageModel:
    """Load a causal language model and its tokenizer with transformers, or take one that is loaded already.

    Args:
        name_or_path: None or ``"embedded"`` for the small model inside this package; a local folder; or a
            hub name such as ``"openai-community/gpt2"``, from the hub when it answers within seconds,
            otherwise from its local cache; or the model itself, which stays where and as it is, but for eval mode
            and parameters that require no gradients. Its ``sha256`` is then that of its weights in memory.
        tokenizer: of a model that is given itself, or in place of the folder's.
        revision: branch, tag or commit of a hub model.
        device: where the model goes; None is the CPU. Not together with ``device_map``.
        dtype: floating dtype of the model; None is the checkpoint's own (of the embedded model, whose files hold
            float16 to be small, float32).
        device_map, quantization_config: as transformers takes them; such a model stays on the devices that they say.
        trust_remote_code: run code that comes with the model.
        model_kwargs: what else transformers' ``from_pretrained`` takes: ``{"attn_implementation": "eager"}``.
        fallback: when the hub does not answer and the cache has no such model, take the embedded model
            instead and log one warning that says so. A name that the hub refuses, or a folder that does not
            exist, is an error all the same.

    Returns:
        :class:`LanguageModel`, in eval mode, parameters not requiring gradients. Where the folder holds no tokenizer,
        ``tokenizer`` is None, and texts have to be token ids.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: ``name_or_path`` is neither folder nor hub name, or ``revision`` comes with no hub name; there is no
            such ``device`` or ``dtype``; weights or tokenizer are damaged (names the file where it is one of
            safetensors), weights lack parameters of the model, or the model is not causal or does not say how long a
            context may be.
        OSError: no such model, the hub does not answer, or the folder has no weights.
        ImportError: transformers is not installed, or not what ``device_map`` (accelerate) or ``quantization_config``
            (bitsandbytes) needs.

    Example:
        >>> load_language_model("embedded", dtype="bfloat16").model.dtype
        torch.bfloat16
    """
    if isinstance(name_or_path, nn.Module):
        given = {"revision": revision, "device": device, "dtype": dtype, "device_map": device_map,
                 "quantization_config": quantization_config, "model_kwargs": model_kwargs}  # fmt: skip
        if unfit := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{unfit[0]}: a model that is loaded already stays as it is; load it with that instead")
        return _loaded(name_or_path, tokenizer)
    if name_or_path is not None and not isinstance(name_or_path, (str, Path)):
        raise TypeError(f"name_or_path must be a string, a Path, a model or None, got {name_or_path!r}")
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"revision must be a string or None, got {revision!r}")
    dtype = None if dtype is None else dtype_in("dtype", dtype)
    if device is not None and device_map is not None:
        raise ValueError(f"device: {device!r} and device_map={device_map!r} both say where the model goes; give one")
    device = torch.device("cpu") if device is None else device_in("device", device)
    if device.type == "meta":
        raise ValueError("device: 'meta' holds no numbers; a model that computes needs another")
    flag("fallback", fallback)
    flag("trust_remote_code", trust_remote_code)
    options = {"device_map": device_map, "quantization_config": quantization_config,
               "trust_remote_code": trust_remote_code}  # fmt: skip
    options = {option: value for option, value in options.items() if value} | _checked_kwargs(model_kwargs, options)

    check_packages(options)
    if name_or_path == "":
        raise ValueError("name_or_path must name a folder or a hub model, got an empty string")
    name = EMBEDDED if name_or_path is None else str(name_or_path)
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
    if name == EMBEDDED or folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is for hub models, got {revision!r} with name_or_path={name!r}")
        return _load_folder(folder, name, None, device, dtype, tokenizer, options)
    if folder.is_file():
        raise NotADirectoryError(f"name_or_path: {name!r} is a file; name the folder that holds the model")
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"name_or_path: the folder {name!r} does not exist")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"name_or_path is neither a folder that exists nor a hub name: {name!r}")
    try:
        folder, commit = _hub_folder(name, revision, trust_remote_code)
    except HubUnavailable as error:
        if not fallback:
            raise
        logger.warning("%s; using the embedded model instead (a small model, not %s)", error, name)
        return _load_folder(EMBEDDED_FOLDER, EMBEDDED, None, device, dtype, None, {})
    return _load_folder(folder, name, commit, device, dtype, tokenizer, options)


def _checked_kwargs(model_kwargs: Mapping[str, Any] | None, own: Mapping[str, Any]) -> dict[str, Any]:
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(name, str) for name in model_kwargs):
        raise TypeError(f"model_kwargs must map names to values, got {model_kwargs!r}")
    for name in model_kwargs:
        if name in ("dtype", "torch_dtype", "revision", *(n for n in own if n != "quantization_config" or own[n])):
            raise ValueError(f"model_kwargs: {name!r} has an argument of its own")
        if name in _DECIDED:
            raise ValueError(f"model_kwargs: {name!r} is not for the caller to say: weights must be whole")
    return dict(model_kwargs)


def weights_sha256(folder: str | Path) -> str:
    """The sha256 of a model folder's weights, as :class:`LanguageModel` defines it.

    Raises:
        FileNotFoundError: the folder has no ``model*.safetensors`` and no ``pytorch_model*.bin``.

    Example:
        >>> len(weights_sha256(EMBEDDED_FOLDER))
        64
    """
    files = _weight_files(Path(folder))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} has no weights ({_SAFETENSORS} or {_PICKLED})")
    digests = [file_sha256(file) for file in files]
    if len(files) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(_SAFETENSORS)) or sorted(folder.glob(_PICKLED))


def _load_folder(
    folder: Path,
    name: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    tokenizer: Any,
    options: dict[str, Any],
) -> LanguageModel:
    transformers = require("transformers")
    sha256 = weights_sha256(folder)
    with without_progress_bar(folder == EMBEDDED_FOLDER):  # loading 8 MB takes no time
        if folder == EMBEDDED_FOLDER and dtype is None:
            dtype = torch.float32
        model = _model_in(transformers, folder, name, {"dtype": dtype or "auto", **options})
    if "device_map" not in options and not getattr(model, "is_quantized", False):
        model = model.to(device=device)
    model = model.eval().requires_grad_(False)
    if tokenizer is None:
        trusted = {option: value for option, value in options.items() if option == "trust_remote_code"}
        tokenizer = _tokenizer_in(transformers, folder, name, trusted)
    return _described(model, tokenizer, name, revision, sha256, is_embedded=folder == EMBEDDED_FOLDER)


def _loaded(model: nn.Module, tokenizer: Any) -> LanguageModel:
    """A model that somebody else has loaded, under the name that its configuration has."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"name_or_path: a {type(model).__name__} is no model of transformers, it has no config")
    sha256 = memory_sha256(model)
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    revision = getattr(config, "_commit_hash", None)
    model = model.eval().requires_grad_(False)
    return _described(model, tokenizer, name, revision, sha256, is_embedded=False)


def memory_sha256(module: nn.Module) -> str:
    """The sha256 of what ``state_dict`` holds: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            if not value.is_meta:  # those of an offloaded model lie elsewhere
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(
    model: Any, tokenizer: Any, name: str, revision: str | None, sha256: str, *, is_embedded: bool
) -> LanguageModel:
    config = model.config.get_text_config()  # of a multimodal model, the language part
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        sha256=sha256,
        d_model=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_length=_max_length(config, tokenizer, name),
        is_embedded=is_embedded,
    )


def _model_in(transformers: Any, folder: Path, name: str, options: dict[str, Any]) -> Any:
    """The model with all of its weights: transformers fills what a file lacks with random numbers."""
    _check_whole(folder)
    for file in folder.glob(_SAFETENSORS):
        try:
            with require("safetensors").safe_open(file, framework="pt"):
                pass
        except Exception as error:  # safetensors has its own exceptions
            raise ValueError(f"name_or_path: {str(file)!r} is cut off or damaged: {error}") from error
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ImportError, OSError):
        raise
    except Exception as error:  # of torch, safetensors, pickle, json and transformers
        raise ValueError(
            f"name_or_path: {name!r} cannot be loaded as a causal language model: {first_line(error)}"
        ) from error
    # transformers names a weight of another shape with both shapes.
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have in another shape")):
        if wrong := sorted(map(str, info[key])):
            raise ValueError(
                f"name_or_path: the weights of {name!r} {what} {len(wrong)} parameters of {type(model).__name__}, "
                f"which would be random numbers: {', '.join(wrong[:3])}{', …' if len(wrong) > 3 else ''}"
            )
    return model


def _check_whole(folder: Path) -> None:
    """OSError where weights lie in several files and one is missing: a cache may hold some of them."""
    kind = _SAFETENSORS if any(folder.glob(_SAFETENSORS)) else _PICKLED
    for index in folder.glob(f"{kind}.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(file for file in named if not (folder / file).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"name_or_path: {str(index)!r} is damaged: {error!r}") from error
        if missing:
            raise FileNotFoundError(
                f"name_or_path: {str(folder)!r} lacks {len(missing)} of {len(named)} files of weights, as "
                f"{missing[0]!r}: load it once more with a network, or copy them"
            )


def _tokenizer_in(transformers: Any, folder: Path, name: str, options: dict[str, Any]) -> Any:
    """The folder's tokenizer; None where it holds none, for which transformers makes one that knows no token."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        if not _has_tokenizer(folder):
            return None
        raise ValueError(f"name_or_path: the tokenizer of {name!r} cannot be read: {first_line(error)}") from error
    files = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    is_of_bytes = len(files) == 1  # such a tokenizer, ByT5's among them, has no file
    return tokenizer if is_of_bytes or any((folder / file).is_file() for file in files) else None


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("*token*")) or any(folder.glob("*vocab*"))


def load_tokenizer(name_or_path: str) -> Any:
    """A tokenizer by itself, of a folder or of a hub name as :func:`load_language_model` takes them.

    Raises:
        OSError: there is none, or the hub does not answer and its cache holds none.
        ValueError: it is damaged.
        ImportError: transformers is not installed.

    Example:
        >>> load_tokenizer(str(EMBEDDED_FOLDER)).eos_token_id == load_language_model().tokenizer.eos_token_id
        True
    """
    transformers = require("transformers")
    folder = EMBEDDED_FOLDER if name_or_path == EMBEDDED else Path(name_or_path).expanduser()
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(name_or_path):
            raise FileNotFoundError(f"name_or_path is neither a folder that exists nor a hub name: {name_or_path!r}")
        source, commit = _hub_config(name_or_path, None, "tokenizer_config.json")
        try:
            return transformers.AutoTokenizer.from_pretrained(source, revision=commit)
        except Exception as error:  # of json and transformers
            raise ValueError(f"the tokenizer of {name_or_path!r} cannot be read: {first_line(error)}") from error
    tokenizer = _tokenizer_in(transformers, folder, name_or_path, {})
    if tokenizer is None:
        raise FileNotFoundError(f"name_or_path: {name_or_path!r} holds no tokenizer")
    return tokenizer


def vocabulary_size(lm: LanguageModel) -> int:
    """How many tokens the model can embed: at least its configuration's, at most what some pad their tables to.

    Example:
        >>> vocabulary_size(load_language_model())
        4096
    """
    model: Any = lm.model
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return model.config.get_text_config().vocab_size if weight is None else len(weight)


def model_sizes(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[int, int, int]:
    """The width of a model's residual stream, its longest context and its layers, from its configuration alone.

    Raises:
        OSError: no such model, or the hub does not answer and its cache does not hold the configuration.
        ValueError: the configuration cannot be read, or does not say them.
        ImportError: transformers is not installed.

    Example:
        >>> model_sizes("embedded")
        (256, 256, 4)
    """
    transformers = require("transformers")
    folder = EMBEDDED_FOLDER if name_or_path == EMBEDDED else Path(name_or_path).expanduser()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    if not folder.is_dir():
        if name_or_path.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(name_or_path):
            raise FileNotFoundError(f"name_or_path is neither a folder that exists nor a hub name: {name_or_path!r}")
        folder, options["revision"] = _hub_config(name_or_path, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # of json and transformers
        raise ValueError(
            f"name_or_path: the configuration of {name_or_path!r} cannot be read: {first_line(error)}"
        ) from error
    config = config.get_text_config()
    return config.hidden_size, _max_length(config, None, name_or_path), config.num_hidden_layers


def _hub_config(name: str, revision: str | None, file: str = "config.json") -> tuple[Any, str | None]:
    """Where transformers finds a small file of a hub model: its name and commit, or the folder of the cache."""
    hub = require("huggingface_hub")
    try:
        return name, hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    except Exception as error:  # as below
        cached = hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent, None
        raise HubUnavailable(
            f"the hub did not answer for the {file} of {name!r} ({first_line(error)}), and its cache does not hold it"
        ) from error


def _max_length(config: Any, tokenizer: Any, name: str) -> int:
    """The longest context: what the config says under one of its names, else what the tokenizer says."""
    names = ("max_position_embeddings", "seq_length", "max_seq_len")  # the last two: BLOOM, MPT
    for source, key in (*((config, name) for name in names), (tokenizer, "model_max_length")):
        value = getattr(source, key, None)
        if isinstance(value, int) and 0 < value < 10**9:  # a tokenizer without a limit says 10**30
            return value
    raise ValueError(f"name_or_path: neither config nor tokenizer of {name!r} says how long a context may be")


@contextmanager
def without_progress_bar(hidden: bool = True) -> Iterator[None]:
    """Inside, transformers shows no bar while it loads, where ``hidden``."""
    logging_ = require("transformers").utils.logging
    was_shown = logging_.is_progress_bar_enabled()
    if hidden:
        logging_.disable_progress_bar()
    try:
        yield
    finally:
        if hidden and was_shown:
            logging_.enable_progress_bar()


def _hub_folder(name: str, revision: str | None, with_code: bool) -> tuple[Path, str]:
    """Folder and commit of a hub model: what the hub says now, else what its cache holds."""
    hub = require("huggingface_hub")
    errors = require("huggingface_hub.errors")
    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        # Asked first, with a short limit: a download would retry for minutes on a machine without a network.
        info = hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        present = {entry.rfilename for entry in info.siblings or ()}
        weights = _SAFETENSORS if any(Path(file).match(_SAFETENSORS) for file in present) else _PICKLED
        patterns = ["*.json", "*.txt", "*.model", weights, *(["*.py"] if with_code else [])]
        folder = Path(
            hub.snapshot_download(
                name,
                revision=info.sha,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # other formats live in sub-folders
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )
        return folder, info.sha
    except refusals as error:
        refused = f"the hub refused name_or_path={name!r}, revision={revision!r}: {first_line(error)}"
        raise OSError(refused) from error
    except Exception as error:  # each version of the hub's client has its own network errors
        cached = hub.try_to_load_from_cache(name, "config.json", revision=revision)
        silent = f"the hub did not answer for {name!r} ({first_line(error)})"
        if not isinstance(cached, str):
            raise HubUnavailable(silent) from error
        folder = Path(cached).parent
        if not _weight_files(folder):
            raise HubUnavailable(f"{silent}, and its cache holds the model without its weights") from error
        if not _has_tokenizer(folder):  # which does not say that the repository has none
            logger.warning("%s; its cache holds no tokenizer: load it once with a network, or give token ids", silent)
        return folder, folder.name
