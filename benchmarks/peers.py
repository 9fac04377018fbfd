"""A whole training step, optimizer included: ours, plain PyTorch and other libraries, side by side in one process.

``make bench-peers`` runs this in an environment with the other libraries; what is not installed is left out and named.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence

import torch
from guarded import Entrant, Prepared, time_in_turn
from progress import announce
from rows import Row, environment
from sizes import Case
from steps import CONTESTANTS, SEED, Contestant, check, contestants, make_setup, peer_versions, true_error
from timing import method, peak_memory_bytes

BUDGET_SECONDS = {"quick": 0.5, "default": 12.0, "full": 400.0}  # of one size; a GPU needs a tenth
LEAST_ROUNDS = {"quick": 2, "default": 3, "full": 10}


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, extent: str, chosen: Sequence[Contestant] | None = None,
    *, without: Collection[str] = (),
) -> list[Row]:  # fmt: skip
    """A row for each contestant at one size that can run here: its times, or why it has none.

    Args:
        chosen: None takes all of this size.
        without: names of contestants that are left out.
    """
    prepare_libraries(device)
    where = f"training step {case.name}"
    chosen = contestants(case) if chosen is None else chosen
    announce(f"{where}: the first error in fp64")
    setup = make_setup(case, device, dtype)
    expected = true_error(setup)
    about = {
        "kind": "step", "case": case.name, "group": case.group, "shape": case.shape("BdFki"),
        "dtype": str(dtype).removeprefix("torch."), "seed": SEED, "method": method(device), **environment(device),
        "packages": peer_versions(),
    }  # fmt: skip

    def prepare(contestant: Contestant) -> Prepared:
        call = contestant.build(setup)
        check(contestant, call, setup, expected)
        return Prepared([call], {"peak_mem_bytes": peak_memory_bytes(call, device)})

    entrants = [
        Entrant(
            {**about, "provider": contestant.name, "contestant": contestant.kind, "baseline": contestant.baseline,
             "auxk": contestant.dead, "note": contestant.note},
            lambda c=contestant: prepare(c),
        )
        for contestant in chosen if contestant.missing(device) is None and contestant.name not in without
    ]  # fmt: skip
    return time_in_turn(
        entrants, device, where, least_rounds=LEAST_ROUNDS[extent],
        budget_seconds=BUDGET_SECONDS[extent] / (10 if device.type == "cuda" else 1),
    )  # fmt: skip


def missing(device: torch.device) -> dict[str, str]:
    """Contestants that cannot run here, and why; each library once."""
    prepare_libraries(device)
    absent = ((contestant, contestant.missing(device)) for contestant in CONTESTANTS)
    return {c.package or f"training step, {c.name}": reason for c, reason in absent if reason}


def prepare_libraries(device: torch.device) -> None:
    """Before another library is imported: what they need, and what they warn about."""
    if device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder takes no CPU tensors; read at its import
    warnings.filterwarnings("ignore", module=r"(sae_lens|sparsify|dictionary_learning|nnsight|transformer_lens)\b")
