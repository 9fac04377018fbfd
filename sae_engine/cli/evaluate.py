"""``sae-engine eval``: how good autoencoders are."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ._options import (
    add_contexts,
    add_model_and_text,
    check_model,
    contexts_in,
    layer_and_site,
    load_model,
    open_texts,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="how good an autoencoder is: reconstruction, sparsity, loss recovered",
        description="Measure autoencoders, transcoders and crosscoders, in any format that can be read, on the "
        "activations of a language model and in their place, print a table, and write JSON, Markdown and pictures. "
        "Unless given, model, layer, site and what says which tokens have rows are those that each one's files name; "
        "where they name no model, layer or site, these have to be given.",
    )
    parser.add_argument("sae", metavar="SAE", nargs="+", help="folder, file of weights, or hub name as in convert")
    add_model_and_text(parser, text="evaluation", unsaid=("what its files say",) * 3)
    add_contexts(parser, context_length="what its files say, at most 256", separator="what its files say, eos",
                 first_token="what its files say, bos", excluded="what its files say, all have rows",
                 keep_first="what its files say, not kept")  # fmt: skip
    parser.add_argument(
        "--normalize", choices=("none", "token"), default=None,
        help="what the autoencoder was trained on: the model's activations, or each token normalized by its mean and "
        "standard deviation; what its files say, none",
    )  # fmt: skip
    parser.add_argument("--target-site", default=None, metavar="SITE", help="of a transcoder: where its output belongs")
    parser.add_argument("--ppl", type=float, default=None, metavar="P", help="also PPL-P%% sparsity (some passes more)")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for eval.json, eval.md and PNGs")
    parser.add_argument("--no-figures", action="store_true", help="no PNGs; matplotlib is then not needed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.checkpoints.opened import opened
    from sae_engine.metrics.place import place_of
    from sae_engine.reports import evaluation as report

    if args.out is not None and not args.no_figures and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the pictures need the package matplotlib: pip install matplotlib, or give --no-figures")
    names = _names(args.sae)
    saes = {name: opened(path) for name, path in zip(names, args.sae, strict=True)}
    layer, site = (args.layer, None) if args.site is None else layer_and_site(args.site, args.layer)
    said = {"model": args.model, "revision": args.revision, "layer": layer, "site": site,
            "target_site": args.target_site, "normalize": args.normalize}  # fmt: skip
    places = {name: place_of(sae, name, **said) for name, sae in saes.items()}  # all of them before any is measured
    measured = {}
    for wanted in dict.fromkeys((place.model, place.revision) for place in places.values()):  # each is loaded once
        lm = load_model(args, *wanted)
        for name, place in places.items():
            if (place.model, place.revision) == wanted:
                check_model(name, saes[name], place, lm)
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


def _measured_at_sites(coder: Any, place: Any, lm: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The measurements of a crosscoder; where it is of several models, the others are loaded here."""
    from sae_engine.data import together
    from sae_engine.metrics import evaluate_sites
    from sae_engine.metrics.place import hub_name

    if args.ppl is not None:
        raise ValueError("--ppl is for autoencoders at one place, and this is a crosscoder")
    names = list(dict.fromkeys(place.models or [place.model]))
    lm = together(lm, *(load_model(args, hub_name(name), None) for name in names[1:]))
    coder.to(next(lm.model.parameters()).device)
    texts, source = open_texts(args.text, args.suffixes)
    result = evaluate_sites(
        coder, lm, texts, sites=place.sites, target_sites=place.target_sites,
        batch_size=args.batch_size, max_tokens=args.tokens, progress=not args.quiet, **contexts_in(args),
    )  # fmt: skip
    result["setting"]["text"] = source
    return result


def _measured(sae: Any, place: Any, lm: Any, args: argparse.Namespace) -> dict[str, Any]:
    from sae_engine.metrics import evaluate, ppl_sparsity

    if place.sites is not None:
        return _measured_at_sites(sae, place, lm, args)
    options: dict[str, Any] = {
        "layer": place.layer, "site": place.site, "target_layer": place.target_layer, "target_site": place.target_site,
        "normalize": place.normalize, "batch_size": args.batch_size, "max_tokens": args.tokens,
        **contexts_in(args),
    }  # fmt: skip
    sae.to(next(lm.model.parameters()).device)
    texts, source = open_texts(args.text, args.suffixes)
    result = evaluate(sae, lm, texts, progress=not args.quiet, **options)
    result["setting"]["text"] = source
    if args.ppl is not None:
        texts, _ = open_texts(args.text, args.suffixes)
        result["ppl_sparsity"] = ppl_sparsity(sae, lm, texts, rise=args.ppl / 100, **options)
    return result


def _names(sources: list[str]) -> list[str]:
    """What the columns are called: the last part of folders and hub names, or all of it where two are called alike."""
    short = [Path(source).resolve().name for source in sources]
    if len(set(short)) == len(short):
        return short
    if len({Path(source).resolve() for source in sources}) < len(sources):
        raise ValueError(f"SAE: the same autoencoder was given twice: {', '.join(sources)}")
    return sources
