"""The console command ``sae-engine``: what can run here (``info``), activations to a folder (``collect``), how good an
autoencoder is (``eval``), a checkpoint in another format (``convert``), whether collected activations are sound
(``verify``).

A subcommand is one ``_add_<name>(commands)`` that declares its arguments and one ``_<name>(args) -> int`` that
runs; it imports what it needs itself, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 1 after an error (one line on stderr), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="sae-engine", description="Fast sparse autoencoders on real activations.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_info, _add_collect, _add_verify, _add_eval, _add_convert):
        add(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="sae-engine: %(levelname)s: %(message)s")
    try:
        return args.run(args)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        # One line, also of what other packages say in many.
        print(f"sae-engine: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sae-engine: interrupted", file=sys.stderr)
        return _INTERRUPTED


# -------------------------------------------------------------------------------------------------- info


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices and back ends: what can run here, and why not")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=_info)


def _info(args: argparse.Namespace) -> int:
    facts = collect_info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        print(section.replace("_", " "))
        for name, value in entries.items():
            if isinstance(value, dict):
                value = ", ".join(f"{v}" if k in ("runs", "why", "name") else f"{k} {v}" for k, v in value.items())
            print(f"  {name:<14} {'-' if value is None else value}")
    return 0


def collect_info() -> dict[str, dict[str, Any]]:
    """What ``sae-engine info`` reports: plain dictionaries, strings and numbers."""
    import torch

    from sae_engine import __version__
    from sae_engine.data import EMBEDDED_FOLDER, weights_sha256

    packages = ("torch", "triton", "transformers", "safetensors")
    versions: dict[str, Any] = {"sae_engine": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in packages} | {"cuda": torch.version.cuda}
    devices: dict[str, Any] = {"cpu": {"name": platform.machine(), "threads": torch.get_num_threads()}}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    always = {"runs": "yes", "why": "needs torch alone"}
    return {
        "versions": versions,
        "tested_versions": _tested_versions(versions),
        "devices": devices,
        "backends": {"reference": always, "torch": always, "triton": _triton_status()},
        "environment": {"SAE_BACKEND": os.environ.get("SAE_BACKEND", "auto"),
                        "SAE_AUTOTUNE_TABLE": os.environ.get("SAE_AUTOTUNE_TABLE")},
        "embedded_model": {"sha256": weights_sha256(EMBEDDED_FOLDER), "folder": str(EMBEDDED_FOLDER)},
    }


def _triton_status() -> dict[str, str]:
    """Whether Triton kernels run natively, interpreted or not at all, and why."""
    import torch

    from sae_kernels.dispatch import has_triton, interprets_triton

    if not has_triton():
        return {"runs": "no", "why": "the package triton is not installed"}
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return {"runs": "no", "why": f"triton cannot be imported: {error}"}
    if interprets_triton():
        return {"runs": "interpreted", "why": "TRITON_INTERPRET is set: on the CPU, slow, for tests"}
    if not torch.cuda.is_available():
        return {"runs": "no", "why": "no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels interpreted"}
    return {"runs": "natively", "why": f"on {torch.cuda.get_device_name()}"}


def _tested_versions(installed: dict[str, Any]) -> dict[str, str]:
    """The tested range of torch and of Triton, and whether what is installed lies outside it."""
    from sae_engine._versions import PACKAGES, oldest_and_newest, within_tested_range

    ranges = {name: " to ".join(oldest_and_newest(name)) for name in PACKAGES}
    for name in PACKAGES:
        if installed[name] is not None and not within_tested_range(name, installed[name]):
            ranges[name] += f": {installed[name]} lies outside, no test has been run with it"
    return ranges


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ----------------------------------------------------------------------------------------------- collect


def _add_collect(commands: Any) -> None:
    parser = commands.add_parser(
        "collect",
        help="activations of a language model to a folder of safetensors shards",
        description="Run a language model over text and keep one site's activations as safetensors shards with a "
        "manifest. Ctrl-C leaves whole shards; the same command again carries on.",
    )
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    unsaid = "the embedded model", "two thirds of the way up (GPT-2: 8)", "resid_pre"
    _add_model_and_text(parser, text="stdlib", unsaid=unsaid)
    parser.add_argument(
        "--fallback", action="store_true", help="the embedded model in place of --model when the hub does not answer"
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the shards")
    parser.add_argument("--shard-tokens", type=int, default=65536, metavar="N", help="rows per shard")
    tokens = "eos, bos, pad or an id"
    token: Any = {"type": _token, "metavar": "TOKEN"}
    parser.add_argument("--separator", default="eos", help=f"behind each document: {tokens}, or none; eos", **token)
    parser.add_argument("--first-token", default="bos", help=f"before each context: {tokens}, or none; bos", **token)
    parser.add_argument("--exclude", nargs="+", default=[], help=f"keep no rows of these tokens: {tokens}", **token)
    parser.add_argument("--exclude-positions", nargs="+", default=[], type=int, metavar="N", help="nor of these")
    parser.add_argument("--no-token-ids", action="store_true", help="do not store which token each row is of")
    parser.add_argument("--extend", action="store_true", help="add the text to what a finished collection holds")
    parser.set_defaults(run=_collect)


def _token(word: str) -> str | int | None:
    """A token as :func:`stream_activations` takes it; what it is none of, that says."""
    return None if word == "none" else int(word) if word.lstrip("-").isdecimal() else word


def _collect(args: argparse.Namespace) -> int:
    from sae_engine.data import SITES, collect_activations

    texts, text_source = _texts(args.text, args.suffixes)
    lm = _load_model(args, args.model, args.revision, fallback=args.fallback)
    if lm.tokenizer is None:
        raise ValueError(f"--model: {lm.name!r} has no tokenizer, without which no text can be read")
    layer, site = _site(args.site or "resid_pre", args.layer)
    if layer is None and site in SITES:
        layer = lm.num_layers * 2 // 3
    try:
        store = collect_activations(
            lm,
            texts,
            args.out,
            layer=layer,
            site=site,
            context_length=args.context_length,
            batch_size=args.batch_size,
            drop_first=not args.keep_first,
            separator=args.separator,
            first_token=args.first_token,
            exclude_tokens=args.exclude,
            exclude_positions=args.exclude_positions,
            max_tokens=args.tokens,
            dtype=args.dtype,
            shard_tokens=args.shard_tokens,
            token_ids=not args.no_token_ids,
            extend=args.extend,
            text_source=text_source,
            progress=not args.quiet,
        )
    except KeyboardInterrupt:
        print(f"sae-engine: interrupted; whole shards stay in {args.out}, run the same command again to carry on",
              file=sys.stderr)  # fmt: skip
        return _INTERRUPTED
    if args.tokens is not None and len(store) < args.tokens:
        print(f"sae-engine: the text had {len(store)} tokens, fewer than --tokens {args.tokens}", file=sys.stderr)
    print(f"{args.out}: {store!r}")
    return 0


# ----------------------------------------------------------------------------------------------- verify


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="whether collected activations are what was written, by their checksums",
        description="Read every shard of collections, compare its checksum with the manifest and look for rows that "
        "are not finite. The first that is damaged is named, and the status is then 1.",
    )
    parser.add_argument("folder", metavar="DIR", nargs="+", help="folder that collect wrote")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from sae_engine.data import ActivationStore

    for folder in args.folder:
        store = ActivationStore(folder, allow_incomplete=True)
        store.verify()
        for _ in store.batches(65536, shuffle=False):  # which refuses rows that are not finite
            pass
        print(f"{folder}: {store!r}, {len(store.manifest['shards'])} shards, sound")
    return 0


# -------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="how good an autoencoder is: reconstruction, sparsity, loss recovered",
        description="Measure autoencoders and transcoders, in any format that can be read, on the activations of a "
        "language model and in their place, print a table, and write JSON, Markdown and pictures. Unless given, model, "
        "layer and site are those that each one's files name; where they name none, they have to be given.",
    )
    parser.add_argument("sae", metavar="SAE", nargs="+", help="folder, file of weights, or hub name as in convert")
    _add_model_and_text(parser, text="evaluation", unsaid=("what its files say",) * 3)
    parser.add_argument(
        "--normalize", choices=("none", "token"), default=None,
        help="what the autoencoder was trained on: the model's activations, or each token normalized by its mean and "
        "standard deviation; what its files say, none",
    )  # fmt: skip
    parser.add_argument("--target-site", default=None, metavar="SITE", help="of a transcoder: where its output belongs")
    parser.add_argument("--ppl", type=float, default=None, metavar="P", help="also PPL-P%% sparsity (some passes more)")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for eval.json, eval.md and PNGs")
    parser.add_argument("--no-figures", action="store_true", help="no PNGs; matplotlib is then not needed")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from sae_engine import SparseAutoencoder
    from sae_engine.metrics import report
    from sae_engine.metrics.place import place_of

    if args.out is not None and not args.no_figures and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the pictures need the package matplotlib: pip install matplotlib, or give --no-figures")
    names = _names(args.sae)
    saes = {name: SparseAutoencoder.from_pretrained(path) for name, path in zip(names, args.sae, strict=True)}
    layer, site = (args.layer, None) if args.site is None else _site(args.site, args.layer)
    said = {"model": args.model, "revision": args.revision, "layer": layer, "site": site,
            "target_site": args.target_site, "normalize": args.normalize}  # fmt: skip
    places = {name: place_of(sae, name, **said) for name, sae in saes.items()}  # all of them before any is measured
    measured = {}
    for wanted in dict.fromkeys((place.model, place.revision) for place in places.values()):  # each is loaded once
        lm = _load_model(args, *wanted)
        for name, place in places.items():
            if (place.model, place.revision) == wanted:
                _check_model(name, saes[name], place, lm)
                measured[name] = _measured(saes[name], place, lm, args)
    results = {name: measured[name] for name in names}
    tokens = min(result["reconstruction"]["tokens"] for result in results.values())
    if args.tokens is not None and tokens < args.tokens:
        print(f"sae-engine: the text had {tokens} tokens, fewer than --tokens {args.tokens}", file=sys.stderr)
    for name in (name for name, place in places.items() if place.model is None):
        print(f"sae-engine: {name}: its files name no model: measured on the embedded one, for want of --model",
              file=sys.stderr)  # fmt: skip
    print(f"{report.setting_text(results)}\n\n{report.table(results)}")
    if args.out is not None:
        print(*report.write(results, args.out, figures=not args.no_figures), sep="\n")
    return 0


def _measured(sae: Any, place: Any, lm: Any, args: argparse.Namespace) -> dict[str, Any]:
    from sae_engine.metrics import evaluate, ppl_sparsity

    options: dict[str, Any] = {
        "layer": place.layer, "site": place.site, "target_layer": place.target_layer, "target_site": place.target_site,
        "normalize": place.normalize, "context_length": args.context_length, "batch_size": args.batch_size,
        "drop_first": not args.keep_first, "max_tokens": args.tokens,
    }  # fmt: skip
    sae.to(next(lm.model.parameters()).device)
    texts, source = _texts(args.text, args.suffixes)
    result = evaluate(sae, lm, texts, progress=not args.quiet, **options)
    result["setting"]["text"] = source
    if args.ppl is not None:
        texts, _ = _texts(args.text, args.suffixes)
        result["ppl_sparsity"] = ppl_sparsity(sae, lm, texts, rise=args.ppl / 100, **options)
    return result


def _check_model(name: str, sae: Any, place: Any, lm: Any) -> None:
    """That the model is the one that the autoencoder was trained on, where nobody has named it but its files."""
    if place.sha256 is not None and place.sha256 != lm.sha256:
        raise ValueError(
            f"{name} was trained on a model {lm.name!r} whose weights had the sha256 {place.sha256}, and these have "
            f"{lm.sha256}: give --model to evaluate it there all the same"
        )
    if place.model is None and sae.d_in != lm.d_model:
        raise ValueError(
            f"{name}: its files do not say which model it belongs to, and it is {sae.d_in} wide, while {lm.name!r} is "
            f"{lm.d_model}: give --model"
        )


def _names(sources: list[str]) -> list[str]:
    """What the columns are called: the last part of folders and hub names, or all of it where two are called alike."""
    short = [Path(source).resolve().name for source in sources]
    if len(set(short)) == len(short):
        return short
    if len({Path(source).resolve() for source in sources}) < len(sources):
        raise ValueError(f"SAE: the same autoencoder was given twice: {', '.join(sources)}")
    return sources


# ------------------------------------------------------------------------------- what two commands share


def _add_model_and_text(parser: argparse.ArgumentParser, *, text: str, unsaid: tuple[str, str, str]) -> None:
    """What says which activations: the model, the place in it, and the text.

    ``text`` is the default word, ``unsaid`` what model, layer and site are unless given.
    """
    model, layer, site = unsaid
    parser.add_argument("--model", default=None, metavar="NAME", help=f"hub name or local folder; {model}")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a hub model")
    parser.add_argument("--layer", type=int, default=None, help=f"block; {layer}")
    parser.add_argument(
        "--site", default=None,
        help="resid_pre, attn_out, resid_mid, mlp_out, resid_post, …, as TransformerLens and transformers spell them "
        "(blocks.3.hook_resid_post, model.layers.3), or a module's name, ':input' behind it for what it is given; "
        + site,
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, default=None, metavar="N", help="all of the text")
    parser.add_argument(
        "--text", nargs="+", default=[text], metavar="PATH",
        help="text files or folders, or the word 'stdlib' (this Python's standard library) or "
        f"'evaluation' (the fixed evaluation text); {text}",
    )  # fmt: skip
    parser.add_argument("--suffixes", nargs="+", default=[".txt", ".md", ".py", ".rst"], help="read from folders")
    parser.add_argument("--context-length", type=int, default=None, metavar="N", help="at most 256 by default")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="contexts per forward pass")
    parser.add_argument("--keep-first", action="store_true", help="keep each context's first position")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 …; a GPU if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _site(site: str, layer: int | None) -> tuple[int | None, str]:
    """Layer and site that two options say together; the layer is None where neither says it."""
    from sae_engine.data import SITES, Site

    if site in SITES and layer is None:
        return None, site
    found = Site.of(site, layer)
    return found.layer, found.place


def _load_model(args: argparse.Namespace, model: str | None, revision: str | None, *, fallback: bool = False) -> Any:
    """A language model, on the device that the arguments name."""
    import torch

    from sae_engine.data import load_language_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_language_model(model, revision=revision, device=device, fallback=fallback)


def _texts(words: list[str], suffixes: list[str]) -> tuple[Any, str]:
    """The documents that ``--text`` names, and how the manifest names them."""
    from sae_engine.data import evaluation_text, iter_text_files, stdlib_texts

    if words == ["stdlib"]:
        return stdlib_texts(), f"standard library of Python {platform.python_version()}"
    if words == ["evaluation"]:
        return evaluation_text(), "evaluation text"
    if alone := {"stdlib", "evaluation"} & set(words):
        raise ValueError(f"--text: the word {sorted(alone)[0]!r} stands alone, not among {len(words)}; files are paths")
    return iter_text_files(words, suffixes), "files: " + " ".join(words)


# ----------------------------------------------------------------------------------------------- convert


def _add_convert(commands: Any) -> None:
    from sae_engine.checkpoints.formats import FORMATS, RESIDUALS

    parser = commands.add_parser(
        "convert",
        help="an autoencoder's checkpoint from one library's format to another's",
        description="Read a checkpoint of SAELens, sparsify, dictionary_learning, OpenAI, Gemma Scope or BatchTopK and "
        "write it in another of these formats, whole or not at all. What the format cannot hold is refused.",
    )
    parser.add_argument("source", metavar="SRC", help="folder, file of weights, or hub owner/repository[/folder]")
    parser.add_argument("target", metavar="DST", type=Path, help="folder; of formats of one file also that file")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--from", dest="origin", default="auto", choices=("auto", *FORMATS), help="what SRC is")
    parser.add_argument("--force", action="store_true", help="write where something is already")
    parser.add_argument("--inference", action="store_true", help="BatchTopK as a JumpReLU with its learned threshold")
    parser.add_argument("--fold-decoder-norms", action="store_true", help="decoder rows of norm 1 (ReLU, JumpReLU)")
    parser.add_argument("--activation-scale", type=float, metavar="S", help="for SAELens' expected_average_only_in")
    parser.add_argument("--residual", choices=RESIDUALS, default=None, help="what SRC was trained on")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from sae_engine.checkpoints.convert import convert

    written = convert(
        args.source,
        args.target,
        to=args.format,
        format=args.origin,
        force=args.force,
        inference=args.inference,
        fold_decoder_norms=args.fold_decoder_norms,
        activation_scale=args.activation_scale,
        residual=args.residual,
    )
    d_in, d_sae = written.tensors["W_enc"].shape
    print(f"{args.target}: {args.format}, {written.activation.__name__}, d_in {d_in}, d_sae {d_sae}")
    print(written.card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
