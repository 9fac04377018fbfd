"""The process that measures for ``run.py``: takes the number of a job from stdin, and answers on stdout, line by line.

Both speak JSON. It says first what it is and which jobs there are; then of each job what runs now, with the rows that
are at stake, the rows themselves, and that the job is done. After an error of which the device does not recover it says
so and ends: a fresh process goes on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent))

import progress
import torch
from guarded import DeviceLost, reason, still_there
from jobs import left_out, plan
from rows import Row, device_name, device_slug

AT_MOST_EVERY = 0.2  # seconds, of two messages about the same rows


class Announcer:
    """Tells the parent what runs now."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.told, self.at_stake = out, 0.0, None

    def __call__(self, text: str, at_stake: Sequence[Row] = ()) -> None:
        now = time.monotonic()
        if list(at_stake) != self.at_stake or now - self.told > AT_MOST_EVERY:
            self.told, self.at_stake = now, list(at_stake)
            send(self.out, now=text, at_stake=self.at_stake)


def send(out: TextIO, **message: Any) -> None:
    out.write(json.dumps(message, allow_nan=False) + "\n")
    out.flush()


def chosen_device(name: str | None) -> torch.device:
    """None takes a GPU where there is one. ValueError: no such device here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such kind of device") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: the benchmarks run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch {torch.__version__} sees no GPU")
    return device


def end_with(parent: int) -> None:
    """A process whose parent has gone measures for nobody, and may hang in a kernel."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    options = json.loads(sys.argv[1])
    try:
        device = chosen_device(options.pop("device"))
    except ValueError as error:
        send(out, refused=str(error))
        return
    jobs = plan(device, **options)
    progress.listen(Announcer(out))
    send(
        out, device=device_name(device), slug=device_slug(device), torch=torch.__version__,
        jobs=[job.name for job in jobs], remarks=left_out(device, options["stages"]),
    )  # fmt: skip
    for line in sys.stdin:
        order = json.loads(line)
        try:
            failed = None
            for rows in jobs[order["job"]].measure(order["without"]):
                send(out, rows=rows)
        except DeviceLost as error:
            send(out, lost=str(error))
            return
        except Exception as error:
            traceback.print_exc()
            failed = reason(error)
        try:
            still_there(device)
        except DeviceLost as error:
            send(out, lost=f"{failed}; {error}" if failed else str(error))
            return
        send(out, done=True, failed=failed)


if __name__ == "__main__":
    main()
