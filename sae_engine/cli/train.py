"""``sae-engine train``: autoencoders from a configuration."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training.run import Run


def add(commands: Any) -> None:
    from ..training.presets import PRESETS

    presets = "; ".join(f"{name}: {what}" for name, (what, _) in PRESETS.items())
    parser = commands.add_parser(
        "train",
        help="autoencoders of a language model, from a configuration to a folder with a report",
        description="Train autoencoders on the activations of a language model, all of them from one pass. Ctrl-C ends "
        f"tidily and says how to go on. Under torchrun all processes train together. Presets: {presets}.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?", help="the configuration")
    parser.add_argument("--preset", metavar="NAME", help=f"one that comes with the package: {', '.join(PRESETS)}")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="PATH=VALUE",
        help="change the configuration, as --set saes.0.k=64 --set optim.lr=1e-3; with --resume what may still change",
    )  # fmt: skip
    parser.add_argument("--output", metavar="DIR", help="the run folder: output.output_path")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run of that folder")
    parser.add_argument(
        "--print-config", action="store_true",
        help="print the configuration, every auto resolved (but where the hub, which has the model's sizes, does not "
        "answer); train nothing",
    )
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of configurations")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..training.config import ConfigError, TrainConfig

    if args.print_schema:
        from ..training.config_files import json_schema

        print(json.dumps(json_schema(TrainConfig), indent=2))
        return 0
    try:
        if args.resume is not None:
            return _resume(args)
        config = _config(args)
        if args.print_config:
            print(_resolved(config), end="")
            return 0
        from ..training.trainer import train

        return _ended(lambda: train(config))
    except ConfigError as error:
        many = f"{len(error.faults)} faults" if len(error.faults) > 1 else "a fault"
        print(f"sae-engine: error: {many} in the configuration:", *str(error).splitlines(), sep="\n  ", file=sys.stderr)
        return 1


def _config(args: argparse.Namespace) -> Any:
    """The configuration that the arguments make together."""
    from ..training.config import TrainConfig
    from ..training.config_files import with_settings
    from ..training.presets import PRESETS, preset

    if args.config in PRESETS and args.preset is None and not Path(args.config).exists():
        raise FileNotFoundError(f"CONFIG.yaml: there is no file {args.config!r}; did you mean --preset {args.config}?")
    if (args.config is None) == (args.preset is None):
        raise ValueError(f"give one of CONFIG.yaml, --preset ({', '.join(PRESETS)}) and --resume RUN")
    config = TrainConfig.from_yaml(args.config) if args.preset is None else preset(args.preset)
    output = [] if args.output is None else [f"output.output_path={json.dumps(args.output)}"]
    return with_settings(config, [*args.settings, *output])


def _resolved(config: Any) -> str:
    """The configuration as the run folder will have it, with a comment where a number was not given."""
    import torch

    from ..data.models import HubUnavailable
    from ..training.auto import resolved, widths_of
    from ..training.config_files import differences, to_yaml

    try:
        widths, max_length, embedded = widths_of(config)
    except OSError as error:
        if not isinstance(error.__cause__, HubUnavailable):
            raise
        print(f"sae-engine: {error}; what depends on it stays auto", file=sys.stderr)
        return config.expanded().to_yaml()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    found = resolved(config, widths, max_length=max_length, device_type=device_type, embedded=embedded).to_dict()
    said = config.expanded().to_dict()
    return to_yaml(found, {path: "auto" for path, before in differences(said, found) if before in ("auto", None)})


def _resume(args: argparse.Namespace) -> int:
    given = {"CONFIG.yaml": args.config, "--preset": args.preset, "--output": args.output,
             "--print-config": args.print_config or None}  # fmt: skip
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--resume goes on with the run's own configuration, without {wrong[0]}")
    from ..training.trainer import resume

    return _ended(lambda: resume(args.resume, settings=args.settings))


def _ended(work: Callable[[], Run]) -> int:
    """The status of a run: 0, or 128 + the signal that ended it."""
    from ..training.callbacks import Interrupted

    speaks = os.environ.get("RANK", "0") == "0"  # one of the processes that torchrun has started
    try:
        run = work()
    except Interrupted as stopped:
        if speaks:
            print(f"sae-engine: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    if speaks:
        print(run.summary())
    return 0
