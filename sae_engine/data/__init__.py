"""Real activations: any Hugging Face causal language model, read by hooks, streamed or cached in shards.

Importing this needs torch alone; transformers, safetensors and tqdm are imported by what uses them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .activations import read_activations, read_sites, stream_activations
    from .collecting import collect_activations, collect_sites
    from .contexts import ContextSettings
    from .gradients import read_gradients
    from .models import EMBEDDED_FOLDER, LanguageModel, load_language_model, weights_sha256
    from .replacing import run_with_replacement, run_with_replacements
    from .shared import check_same_tokens, together
    from .sites import SITES, Site
    from .sources import open_source
    from .store import ActivationStore, RowTokens
    from .stream import RowStream, StoreStream
    from .text import HELD_OUT_MODULES, evaluation_text, iter_text_files, stdlib_texts

__all__ = [
    "EMBEDDED_FOLDER",
    "HELD_OUT_MODULES",
    "SITES",
    "ActivationStore",
    "ContextSettings",
    "LanguageModel",
    "RowStream",
    "RowTokens",
    "Site",
    "StoreStream",
    "check_same_tokens",
    "collect_activations",
    "collect_sites",
    "evaluation_text",
    "iter_text_files",
    "load_language_model",
    "open_source",
    "read_activations",
    "read_gradients",
    "read_sites",
    "run_with_replacement",
    "run_with_replacements",
    "stdlib_texts",
    "stream_activations",
    "together",
    "weights_sha256",
]

_MODULES = {
    "activations": {"read_activations", "read_sites", "stream_activations"},
    "collecting": {"collect_activations", "collect_sites"},
    "contexts": {"ContextSettings"},
    "gradients": {"read_gradients"},
    "models": {"EMBEDDED_FOLDER", "LanguageModel", "load_language_model", "weights_sha256"},
    "replacing": {"run_with_replacement", "run_with_replacements"},
    "shared": {"check_same_tokens", "together"},
    "sites": {"SITES", "Site"},
    "sources": {"open_source"},
    "store": {"ActivationStore", "RowTokens"},
    "stream": {"RowStream", "StoreStream"},
    "text": {"HELD_OUT_MODULES", "evaluation_text", "iter_text_files", "stdlib_texts"},
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
