"""The console command ``sae-engine``.

A subcommand is one file of this folder, named in ``_COMMANDS``: ``add(commands)`` declares its arguments, and
``run(args) -> int`` runs and imports what it needs itself, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
from collections.abc import Sequence

from . import collect, compare, convert, dashboard, evaluate, features, info, lm, push, train, verify
from ._options import INTERRUPTED

READER_GONE = 141  # the exit status that a shell reports for SIGPIPE
# As --help lists them.
_COMMANDS = (info, train, collect, verify, evaluate, convert, compare, features, dashboard, push, lm)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status.

    0; 1 after an error (one line on stderr); 130 after Ctrl-C; 141 where nobody reads the output, as behind ``| head``.
    """
    parser = argparse.ArgumentParser(prog="sae-engine", description="Fast sparse autoencoders on real activations.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="sae-engine: %(levelname)s: %(message)s")
    try:
        status = args.run(args)
        sys.stdout.flush()  # where nobody reads any more, that is seen here and not when the interpreter ends
        return status
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return READER_GONE
        # One line, also of what other packages say in many.
        print(f"sae-engine: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sae-engine: interrupted", file=sys.stderr)
        return INTERRUPTED


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; what is left of the output then goes nowhere."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)  # of errors one is told always
    if not any(event & select.POLLERR for _, event in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
