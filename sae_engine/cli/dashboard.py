"""``sae-engine dashboard``: a static page of an autoencoder's latents."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from .features import add_encoding, encoded, opened


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "dashboard",
        help="a static page of what latents fire on and what they write",
        description="Write index.html and what it loads, to be opened as a file or put on a web server: the contexts "
        "in which each latent fires most, its activations, the tokens that it raises and lowers, its nearest others.",
    )
    parser.add_argument("sae", metavar="SAE", help="folder, file of weights, or hub name as in convert")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the page")
    add_encoding(parser)
    parser.add_argument("--features", type=Path, default=None, metavar="DIR",
                        help="keep the codes there, or take those that `sae-engine features` left there")  # fmt: skip
    parser.add_argument("--latents", nargs="+", default=["most", "1000"], metavar="N",
                        help="which, or 'most N': those that fire most often, or 'all'; most 1000")  # fmt: skip
    parser.add_argument("--contexts", type=int, default=10, metavar="N", help="of each latent; 10")
    parser.add_argument("--window", type=int, default=40, metavar="N", help="tokens of a context that are shown; 40")
    parser.add_argument("--title", default=None, help="of the page; model and site")
    parser.add_argument("--neuronpedia", nargs="+", default=None, metavar="NAME=VALUE",
                        help="also as Neuronpedia imports it, in OUT/neuronpedia: model_id=gpt2-small "
                        "set_name=res-me release=mine creator=Me, perhaps description=, url=, hf_repo_id=")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sae_engine.latents import Features, write_dashboard, write_neuronpedia

    latents, names = _latents(args.latents), _names(args.neuronpedia)
    sae, lm, place = opened(args)
    options: dict[str, Any] = {"latents": latents, "contexts": args.contexts, "window": args.window}
    with tempfile.TemporaryDirectory() as temporary:
        if args.features is not None and (args.features / "features.json").is_file() and args.text == ["evaluation"]:
            features = Features(args.features)  # no text was asked for: theirs is taken, whatever it is
        else:
            features = encoded(args, sae, lm, place, args.features or Path(temporary) / "features")
        print(write_dashboard(features, sae, args.out, lm=lm, title=args.title, **options))
        if names:
            print(write_neuronpedia(features, sae, args.out / "neuronpedia", lm=lm, latents=latents, **names))
    return 0


def _names(words: list[str] | None) -> dict[str, Any]:
    """What --neuronpedia says, each by its name."""
    needed = ("model_id", "set_name", "release", "creator")
    found: dict[str, Any] = dict(word.split("=", 1) for word in words or () if "=" in word)
    known = {*needed, "description", "url", "hf_repo_id"}
    if words and (len(found) < len(words) or set(found) - known or set(needed) - set(found)):
        raise ValueError(f"--neuronpedia must be {' '.join(f'{name}=…' for name in needed)}, got {' '.join(words)!r}")
    return found


def _latents(words: list[str]) -> int | list[int] | None:
    if words == ["all"]:
        return None
    numbers = words[1:] if words[0] == "most" else words
    if not all(word.isdecimal() for word in numbers) or (words[0] == "most" and len(numbers) != 1):
        raise ValueError(f"--latents must be numbers, 'most N' or 'all', got {' '.join(words)!r}")
    return int(numbers[0]) if words[0] == "most" else [int(word) for word in numbers]
