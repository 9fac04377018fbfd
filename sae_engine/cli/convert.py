"""``sae-engine convert``: an autoencoder's checkpoint in another library's format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    from sae_engine.checkpoints.crosslayer import formats as crosslayer
    from sae_engine.checkpoints.formats import FORMATS, READ, RESIDUALS

    parser = commands.add_parser(
        "convert",
        help="an autoencoder's checkpoint from one library's format to another's",
        description="Read a checkpoint of SAELens, sparsify, dictionary_learning, OpenAI, Gemma Scope, Llama Scope, "
        "circuit-tracer or BatchTopK and write it in another format, whole or not at all. What that cannot hold is "
        "refused. Crosscoders and cross-layer transcoders have formats of their own, the last in these lists.",
    )
    parser.add_argument("source", metavar="SRC", help="folder, file of weights, or hub owner/repository[/folder]")
    parser.add_argument("target", metavar="DST", type=Path, help="folder; of formats of one file also that file")
    parser.add_argument("--format", required=True, choices=[*FORMATS, *crosslayer.FORMATS], help="what to write")
    parser.add_argument("--from", dest="origin", default="auto", choices=("auto", *READ, *crosslayer.READ),
                        help="what SRC is")
    parser.add_argument("--force", action="store_true", help="write where something is already")
    parser.add_argument("--inference", action="store_true", help="BatchTopK as a JumpReLU with its learned threshold")
    parser.add_argument("--fold-decoder-norms", action="store_true", help="decoder rows of norm 1 (ReLU, JumpReLU)")
    parser.add_argument("--activation-scale", type=float, metavar="S", help="for SAELens' expected_average_only_in")
    parser.add_argument("--residual", choices=RESIDUALS, default=None, help="what SRC was trained on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine import Crosscoder
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
    if isinstance(written, Crosscoder):
        print(f"{args.target}: {args.format}, {written!r}".partition("\n")[0])
        print(written.card)
        return 0
    d_in, d_sae = written.tensors["W_enc"].shape
    print(f"{args.target}: {args.format}, {written.activation.__name__}, d_in {d_in}, d_sae {d_sae}")
    print(written.card)
    return 0
