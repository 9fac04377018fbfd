"""``sae-engine collect``: activations of a language model to a folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ._options import INTERRUPTED, add_contexts, add_model_and_text, contexts_in, layer_and_site, load_model, open_texts


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "collect",
        help="activations of a language model to a folder of safetensors shards",
        description="Run a language model over text and keep one site's activations as safetensors shards with a "
        "manifest; of several sites, each in a folder of its own inside OUT. Ctrl-C leaves whole shards; the same "
        "command again carries on.",
    )
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    unsaid = "the embedded model", "two thirds of the way up (GPT-2: 8)", "resid_pre"
    add_model_and_text(parser, text="stdlib", unsaid=unsaid, several_sites=True)
    parser.add_argument(
        "--fallback", action="store_true", help="the embedded model in place of --model when the hub does not answer"
    )
    dtypes = "float16", "bfloat16", "float32", "int8"
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="of the shards")
    parser.add_argument("--shard-tokens", type=int, default=65536, metavar="N", help="rows per shard")
    add_contexts(parser, context_length="at most 256", separator="eos", first_token="bos", excluded="all have rows",
                 keep_first="not kept")  # fmt: skip
    parser.add_argument("--no-token-ids", action="store_true", help="do not store which token each row is of")
    parser.add_argument("--extend", action="store_true", help="add the text to what a finished collection holds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.data import SITES, Site, collect_activations, collect_sites

    texts, text_source = open_texts(args.text, args.suffixes)
    lm = load_model(args, args.model, args.revision, fallback=args.fallback)
    if lm.tokenizer is None:
        raise ValueError(f"--model: {lm.name!r} has no tokenizer, without which no text can be read")
    sites = []
    for said in args.site or ["resid_pre"]:
        layer, site = layer_and_site(said, args.layer)
        sites.append(Site.of(site, lm.num_layers * 2 // 3 if layer is None and site in SITES else layer))
    settings = dict(
        batch_size=args.batch_size,
        max_tokens=args.tokens,
        dtype=args.dtype,
        shard_tokens=args.shard_tokens,
        token_ids=not args.no_token_ids,
        extend=args.extend,
        text_source=text_source,
        progress=not args.quiet,
        **contexts_in(args),
    )
    try:
        if len(sites) == 1:
            stores = [collect_activations(lm, texts, args.out, site=sites[0], **settings)]
        else:
            stores = collect_sites(lm, texts, args.out, sites, **settings)
    except KeyboardInterrupt:
        print(f"sae-engine: interrupted; whole shards stay in {args.out}, run the same command again to carry on",
              file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    if args.tokens is not None and len(stores[0]) < args.tokens:
        print(f"sae-engine: the text had {len(stores[0])} tokens, fewer than --tokens {args.tokens}", file=sys.stderr)
    for store in stores:
        print(f"{store.path}: {store!r}")
    return 0
