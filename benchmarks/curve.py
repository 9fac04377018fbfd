"""The loss curve of a TrainStep beside dense PyTorch's: same initial weights, same batches, real activations.

``make bench`` runs it. Two runs that differ in the last bit drift apart, because entries near the cut fall on different
sides of it; how far is measured too, by dense runs whose initial weights are a few roundings away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from progress import announce
from reconstruction import SPACE, normalized
from rows import Row, environment, now_utc
from sizes import Case
from steps import Setup, dense, make_setup, train_step
from torch import Tensor

from sae_engine.data import evaluation_text, load_language_model, stream_activations

OURS, DENSE, NEARBY = "sae_engine", "dense PyTorch", "dense PyTorch, other roundings"
CASE = Case("curve", B=256, d=256, F=2048, k=32, group="curve")
STEPS = {"quick": 20, "default": 200, "full": 200}
TOKENS = 8192
LEARNING_RATE = 1e-3


def activations(tokens: int, device: torch.device) -> tuple[Tensor, Row]:
    """(tokens, d) of the embedded model, normalized, and what a row says of them."""
    lm = load_language_model(device=device)
    layer = round(lm.num_layers * 2 / 3)
    found = list(stream_activations(lm, evaluation_text(), layer=layer, max_tokens=tokens))
    about = {
        "model": "embedded model (GPT-2 architecture)", "sha256": lm.sha256, "d": lm.d_model, "layer": layer,
        "space": SPACE, "tokens": tokens,
    }  # fmt: skip
    return normalized(torch.cat(found).float().to(device)), about


def setup_on(x: Tensor, case: Case, steps: int, *, seed: int = 0, nearby: int | None = None) -> Setup:
    """``steps`` batches drawn from ``x`` (tokens, d).

    ``nearby``: every weight is moved by up to sqrt(d) roundings, as far as two ways to sum d products differ.
    """
    setup = make_setup(case, x.device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    setup.x = [x[torch.randint(len(x), (case.B,), generator=generator).to(x.device)] for _ in range(steps)]
    setup.learning_rate = LEARNING_RATE
    if nearby is not None:
        moves = 2 * torch.rand(setup.W_dec.shape, generator=torch.Generator().manual_seed(nearby + 1)) - 1
        setup.W_dec = setup.W_dec * (1 + moves.to(x.device) * case.d**0.5 * torch.finfo(torch.float32).eps)
    return setup


def errors(call: Callable[[], Tensor], steps: int) -> list[float]:
    """The squared error per token of each batch, before its update."""
    found = []
    for step in range(steps):
        announce(f"loss curves: step {step + 1} of {steps}")
        found.append(call())
    return torch.stack(found).tolist()


def curves(x: Tensor, case: Case, steps: int, nearby: int = 2) -> Iterator[tuple[str, int, list[float]]]:
    """Provider, number and errors of each run: ours, dense, and ``nearby`` dense ones beside it."""
    yield OURS, 0, errors(train_step()(setup_on(x, case, steps)), steps)
    yield DENSE, 0, errors(dense()(setup_on(x, case, steps)), steps)
    for number in range(nearby):
        yield NEARBY, number, errors(dense()(setup_on(x, case, steps, nearby=number)), steps)


def measure(device: torch.device, extent: str, *, case: Case = CASE) -> Iterator[Row]:
    announce("loss curves: activations")
    x, about = activations(TOKENS, device)
    steps = STEPS[extent]
    for provider, number, found in curves(x, case, steps):
        yield {
            "kind": "curve", "provider": provider, "seed": number, **about, "d_sae": case.F, "k": case.k,
            "batch_tokens": case.B, "steps": steps, "method": f"Adam {LEARNING_RATE}, unit-norm decoder rows",
            **environment(device), "errors": [float(f"{error:.7g}") for error in found], "utc": now_utc(),
        }  # fmt: skip
