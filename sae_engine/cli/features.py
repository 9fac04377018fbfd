"""``sae-engine features``: which latents of an autoencoder fire on which tokens, to a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ._options import (
    INTERRUPTED,
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
        "features",
        help="which latents fire on which tokens, to a folder",
        description="Run a language model and an autoencoder over text and keep the codes, 6 bytes an entry, and the "
        "tokens as safetensors shards, with an index by latents: for sae_engine.latents.Features, "
        "sae-engine dashboard, or delphi. Ctrl-C leaves whole shards; the same command again carries on.",
    )
    parser.add_argument("sae", metavar="SAE", help="folder, file of weights, or hub name as in convert")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    add_encoding(parser)
    parser.add_argument("--format", choices=("sae-engine", "delphi"), default="sae-engine",
                        help="delphi: also as delphi caches latents, in OUT/delphi")  # fmt: skip
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="of delphi's, files of latents; 5")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.latents import write_delphi

    sae, lm, place = opened(args)
    try:
        features = encoded(args, sae, lm, place, args.out)
    except KeyboardInterrupt:
        print(f"sae-engine: interrupted; whole shards stay in {args.out}, run the same command again to carry on",
              file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    dead = int((features.counts() == 0).sum())  # which makes the index
    print(f"{args.out}: {features!r}, {dead} latents dead")
    if args.format == "delphi":
        print(write_delphi(features, args.out / "delphi", splits=args.splits))
    return 0


# -------------------------------------------------------------------------------------- what dashboard shares with it


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """What says which text is encoded, and how."""
    own = "what its files say"
    add_model_and_text(parser, text="evaluation", unsaid=(own,) * 3)
    add_contexts(parser, context_length=f"{own}, at most 256", separator=f"{own}, eos", first_token=f"{own}, bos",
                 excluded=f"{own}, none", keep_first=f"{own}, left out")  # fmt: skip
    parser.add_argument("--normalize", choices=("none", "token"), default=None, help=f"as in eval; {own}, none")
    parser.add_argument("--source", type=int, default=None, metavar="N",
                        help="of a crosscoder or cross-layer transcoder, whose latents, counted from 0")  # fmt: skip
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the activations")


def opened(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The autoencoder, the model that it belongs to, and where in it."""
    from sae_engine import Crosscoder, Provenance
    from sae_engine.checkpoints.opened import opened as open_coder
    from sae_engine.data import together
    from sae_engine.latents import of_source
    from sae_engine.metrics.place import hub_name, place_of

    name = Path(args.sae).resolve().name
    sae = open_coder(args.sae)
    if isinstance(sae, Crosscoder) and args.source is not None:
        sae = of_source(sae, args.source)
    elif isinstance(sae, Crosscoder) or args.source is not None:
        said = "nothing" if args.source is None else args.source
        raise ValueError(
            f"--source must say which source of a crosscoder, and nothing else has any: {name} is a "
            f"{type(sae).__name__}, got {said}"
        )
    layer, site = (args.layer, None) if args.site is None else layer_and_site(args.site, args.layer)
    # Nothing is written to a transcoder's target: it need not be known.
    target = (sae.provenance or Provenance()).target_site
    place = place_of(
        sae, name, model=args.model, revision=args.revision, layer=layer, site=site, normalize=args.normalize,
        target_site="mlp_out" if target in (None, "unknown") else None,
    )  # fmt: skip
    if place.sites is not None and (args.site is not None or args.layer is not None):
        raise ValueError(f"--site: source {args.source} of {name} reads the sites that its files name, {place.sites}")
    lm = load_model(args, place.model, place.revision)
    check_model(name, sae, place, lm)
    others = list(dict.fromkeys(place.models or ()))[1:]
    lm = together(lm, *(load_model(args, hub_name(other), None) for other in others))
    if place.model is None:
        print(f"sae-engine: {name}: its files name no model: the embedded one is taken, for want of --model",
              file=sys.stderr)  # fmt: skip
    return sae.to(next(lm.model.parameters()).device), lm, place


def encoded(args: argparse.Namespace, sae: Any, lm: Any, place: Any, folder: Path) -> Any:
    """The features of the text that the arguments name, collected or carried on in ``folder``."""
    from sae_engine.latents import collect

    texts, source = open_texts(args.text, args.suffixes)
    where = {} if place.sites is not None else {"layer": place.layer, "site": place.site}
    features = collect(
        sae, lm, texts, folder, **where, normalize=place.normalize, text_source=source,
        batch_size=args.batch_size, max_tokens=args.tokens, dtype=args.dtype, progress=not args.quiet,
        **contexts_in(args),
    )  # fmt: skip
    if args.tokens is not None and features.manifest["encoded"] < args.tokens:
        print(f"sae-engine: the text had {features.manifest['encoded']} tokens, fewer than --tokens {args.tokens}",
              file=sys.stderr)  # fmt: skip
    return features
