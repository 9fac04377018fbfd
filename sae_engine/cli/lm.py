"""``sae-engine lm``: activation sparsity of a language model, fitted and reported."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._options import add_model, add_text, load_model, open_texts

RULES = {"threshold": "Threshold", "top-share": "TopShare"}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "lm",
        help="activation sparsity inside a language model: fit a rule, report what it costs",
        description="A rule says which of a language model's activations are kept; what the others multiply is not "
        "read. fit learns it from texts, report says what is kept, skipped and lost on others.",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    fit = actions.add_parser("fit", help="learn a rule from texts, to a folder", description=_FIT)
    fit.add_argument("out", metavar="OUT", type=Path, help="folder for the rule's two files")
    fit.add_argument("--rule", choices=tuple(RULES), default="threshold",
                     help="a threshold a layer, or the same number of entries a token; threshold")  # fmt: skip
    fit.add_argument("--sparsity", type=float, required=True, metavar="S", help="share of entries to drop, as 0.5")
    fit.add_argument("--weigh", default="", metavar="WHAT",
                     help="by what magnitudes are multiplied: up, up_rms, down or up*down; nothing")  # fmt: skip
    fit.add_argument("--at", choices=("gate", "hidden", "inputs"), default="gate",
                     help="the gate of gated MLPs, the input of MLPs' last matrices, or all inputs; gate")  # fmt: skip
    fit.add_argument("--compensate", action="store_true", help="what is dropped counts as its mean")
    fit.add_argument("--layers", nargs="+", type=int, default=None, metavar="N", help="blocks; all")
    _add_shared(fit)
    fit.set_defaults(run=_run_fit, tokens=65_536)
    report = actions.add_parser("report", help="what a rule keeps, skips and costs on texts", description=_REPORT)
    report.add_argument("rule", metavar="RULE", type=Path, help="folder that fit has written, or the word 'exact'")
    report.add_argument("--out", type=Path, default=None, metavar="FILE", help="the same as JSON")
    _add_shared(report)
    report.set_defaults(run=_run_report)


_FIT = "Run a language model over texts and learn what a rule needs of each layer. Up to three passes."
_REPORT = (
    "Run a language model over texts, plain and with the rule in force, and print a table: what each layer keeps, what "
    "it does not read, and the perplexity before and after. 'exact' skips the zeros that the model makes itself."
)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_model(parser, unsaid="the embedded model, or what the rule was fitted on")
    add_text(parser, text="evaluation")
    parser.add_argument("--context-length", type=int, default=None, metavar="N", help="tokens; at most 256")


def _run_fit(args: argparse.Namespace) -> int:
    from sae_engine import lm as sparsity

    rule = getattr(sparsity, RULES[args.rule])(args.sparsity, weigh=args.weigh, compensate=args.compensate)
    lm = load_model(args, args.model, args.revision)
    texts, source = open_texts(args.text, args.suffixes)
    rule.fit(lm, texts, at=args.at, layers=args.layers, tokens=args.tokens, context_length=args.context_length,
             batch_size=args.batch_size)  # fmt: skip
    rule.model["text"] = source
    rule.save(args.out)
    kept = [one.density for one in rule.layers.values()]
    print(f"{args.out}: {rule!r}, {len(kept)} modules of {lm.name}, {min(kept):.1%} to {max(kept):.1%} kept on "
          f"{rule.model['tokens']:,} tokens")  # fmt: skip
    return 0


def _run_report(args: argparse.Namespace) -> int:
    import sae_engine as se
    from sae_engine import lm as sparsity

    exact = str(args.rule) == "exact"
    rule = None if exact else sparsity.load(args.rule)
    model, revision = args.model, args.revision
    if model is None and rule is not None:
        model, revision = rule.model.get("name"), rule.model.get("revision")
    lm = load_model(args, model, revision)
    if rule is None:
        se.accelerate(lm)
    else:
        sparsity.sparsify(lm, rule)
    texts, _ = open_texts(args.text, args.suffixes)
    found = sparsity.report(lm, texts, tokens=args.tokens, context_length=args.context_length,
                            batch_size=args.batch_size)  # fmt: skip
    print(found)
    if args.out is not None:
        args.out.write_text(json.dumps({"rule": repr(rule) if rule else "exact", "model": lm.name, **asdict(found)},
                                       indent=1) + "\n", encoding="utf-8")  # fmt: skip
    return 0
