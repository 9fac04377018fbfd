"""What several subcommands share: which model, which place in it, which text, on which device."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

INTERRUPTED = 130  # the exit status that a shell reports for Ctrl-C


def add_model_and_text(
    parser: argparse.ArgumentParser, *, text: str, unsaid: tuple[str, str, str], several_sites: bool = False
) -> None:
    """What says which activations: the model, the place in it, and the text.

    ``text`` is the default of ``--text``; ``unsaid`` says, for --help, what model, layer and site are unless given.
    """
    model, layer, site = unsaid
    add_model(parser, unsaid=model)
    parser.add_argument("--layer", type=int, default=None, help=f"block; {layer}")
    parser.add_argument(
        "--site", default=None, action="append" if several_sites else "store",
        help="resid_pre, attn_out, resid_mid, mlp_out, resid_post, …, as TransformerLens and transformers spell them "
        "(blocks.3.hook_resid_post, model.layers.3), or a module's name, ':input' behind it for what it is given; "
        + ("again for several in one pass; " if several_sites else "") + site,
    )  # fmt: skip
    add_text(parser, text=text)


def add_model(parser: argparse.ArgumentParser, *, unsaid: str) -> None:
    """What says which language model, and how it is loaded: for :func:`load_model`."""
    parser.add_argument("--model", default=None, metavar="NAME", help=f"hub name or local folder; {unsaid}")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    parser.add_argument("--model-dtype", default=None, metavar="DTYPE", help="of the model; its checkpoint's")
    parser.add_argument(
        "--device-map", default=None, metavar="MAP", help="of transformers, in place of --device: auto, or JSON"
    )
    parser.add_argument("--quantization", choices=("8bit", "4bit"), default=None, help="of the model, by bitsandbytes")
    parser.add_argument("--attn-implementation", default=None, metavar="NAME", help="of transformers: eager, sdpa, …")
    parser.add_argument(
        "--model-kwargs", default=None, metavar="JSON",
        help="""what else from_pretrained of transformers takes: {"max_memory": {"0": "20GiB"}}""",
    )  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 …; a GPU if there is one")


def add_text(parser: argparse.ArgumentParser, *, text: str) -> None:
    """What says which text, and how much of it: for :func:`open_texts`."""
    parser.add_argument("--tokens", type=int, default=None, metavar="N", help="all of the text")
    parser.add_argument(
        "--text", nargs="+", default=[text], metavar="PATH",
        help="text files or folders, or the word 'stdlib' (this Python's standard library) or "
        f"'evaluation' (the fixed evaluation text); {text}",
    )  # fmt: skip
    parser.add_argument("--suffixes", nargs="+", default=[".txt", ".md", ".py", ".rst"], help="read from folders")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="contexts per forward pass")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_contexts(parser: argparse.ArgumentParser, **unsaid: str) -> None:
    """What says which rows: of contexts, and of their tokens. ``unsaid`` is what each is unless given, in words."""
    what = "eos, bos, pad or an id"
    parser.add_argument(
        "--context-length", type=int, default=None, metavar="N", help=f"tokens; {unsaid['context_length']}"
    )
    for name, place in (("separator", "behind each document"), ("first_token", "before each context")):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=None, metavar="TOKEN", help=f"{place}: {what}, or none; {unsaid[name]}")
    parser.add_argument("--exclude", nargs="*", default=None, metavar="TOKEN",
                        help=f"no rows of these tokens: {what}; {unsaid['excluded']}")  # fmt: skip
    parser.add_argument("--exclude-positions", nargs="*", default=None, type=int, metavar="N", help="nor of these")
    parser.add_argument("--keep-first", action=argparse.BooleanOptionalAction, default=None,
                        help=f"rows of each context's first position; {unsaid['keep_first']}")  # fmt: skip


def contexts_in(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_contexts` was told, as sae_engine.data takes it; what it was not told is left out."""
    from sae_engine.metrics.place import token

    said: dict[str, Any] = {"context_length": args.context_length, "exclude_positions": args.exclude_positions}
    said |= {"drop_first": None if args.keep_first is None else not args.keep_first}
    said |= {"exclude_tokens": None if args.exclude is None else [token(word) for word in args.exclude]}
    found = {name: value for name, value in said.items() if value is not None}
    words = {"separator": args.separator, "first_token": args.first_token}
    return found | {name: token(word) for name, word in words.items() if word is not None}


def layer_and_site(site: str, layer: int | None) -> tuple[int | None, str]:
    """Layer and site that two options say together; the layer is None where neither says it."""
    from sae_engine.data import SITES, Site

    if site in SITES and layer is None:
        return None, site
    found = Site.of(site, layer)
    return found.layer, found.place


def load_model(args: argparse.Namespace, model: str | None, revision: str | None, *, fallback: bool = False) -> Any:
    """A language model, on the device that the arguments name, and loaded as they say."""
    import torch

    from sae_engine.data import load_language_model
    from sae_engine.data.loading import loading_options
    from sae_engine.data.models import without_progress_bar

    device = args.device
    if device is None and args.device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    said = {} if args.model_kwargs is None else _json_object("--model-kwargs", args.model_kwargs)
    device_map, bits, attention = args.device_map, args.quantization, args.attn_implementation
    if device_map is not None and device_map.startswith("{"):
        device_map = _json_object("--device-map", device_map)
    options = {
        "--device-map": ("device_map", device_map), "--attn-implementation": ("attn_implementation", attention),
        "--trust-remote-code": ("trust_remote_code", args.trust_remote_code or None),
        "--quantization": ("quantization_config", None if bits is None else {f"load_in_{bits}": True}),
    }  # fmt: skip
    for option, (name, value) in options.items():
        if value is not None and name in said:
            raise ValueError(f"--model-kwargs: {option} says {name!r} as well; give one of them")
        said |= {} if value is None else {name: value}
    with without_progress_bar(args.quiet):
        return load_language_model(
            model, revision=revision, device=device, dtype=args.model_dtype, fallback=fallback, **loading_options(said)
        )


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option}: {text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, as {{\"a\": 1}}, got {text!r}")
    return value


def check_model(name: str, sae: Any, place: Any, lm: Any) -> None:
    """Checks that the model is the one that the autoencoder was trained on, where only its files have named it."""
    if place.sha256 is not None and place.sha256 != lm.sha256:
        raise ValueError(
            f"{name} was trained on a model {lm.name!r} whose weights had the sha256 {place.sha256}, and these have "
            f"{lm.sha256}: give --model to use it there all the same"
        )
    width = getattr(sae, "read_widths", (sae.d_in,))[0]
    if place.model is None and width != lm.d_model:
        raise ValueError(
            f"{name}: its files do not say which model it belongs to, and it is {width} wide, while {lm.name!r} is "
            f"{lm.d_model}: give --model"
        )


def open_texts(words: list[str], suffixes: list[str]) -> tuple[Any, str]:
    """The documents that ``--text`` names, and how the manifest names them."""
    from sae_engine.data import evaluation_text, iter_text_files, stdlib_texts

    if words == ["stdlib"]:
        return stdlib_texts(), f"standard library of Python {platform.python_version()}"
    if words == ["evaluation"]:
        return evaluation_text(), "evaluation text"
    if alone := {"stdlib", "evaluation"} & set(words):
        raise ValueError(f"--text: the word {sorted(alone)[0]!r} stands alone, not among {len(words)}; files are paths")
    return iter_text_files(words, suffixes), "files: " + " ".join(words)
