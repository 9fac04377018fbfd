"""Operations without baselines of their own, beside the reference and stock PyTorch: all follows from their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from checks import once, require
from inputs import Inputs
from sizes import Case
from torch import Tensor

from sae_engine.testing import assert_within_budget, same_bits
from sae_kernels.operations import Operation, in_fp64
from sae_kernels.ops import ops

if TYPE_CHECKING:
    from registry import Provider


def inputs_of(operation: Operation, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    return Inputs(arguments=operation.example(case, dtype, device, seed=seed), case=case)


def run_by(operation: Operation, backend: str, i: Inputs) -> Callable[[], list[Tensor]]:
    """What is written in place is a copy of the provider's own."""
    arguments = operation.apart(i.arguments)
    call = getattr(ops, operation.name)
    return lambda: operation.outcome(call(*arguments, backend), arguments)


def check(operation: Operation, i: Inputs, provider: Provider, output: list[Tensor]) -> None:
    """The reference's result bit for bit, or a sum within the budget that the reference's own error gives."""
    def reference(arguments: tuple) -> list[Tensor]:
        return run_by(operation, "reference", Inputs(arguments=arguments))()

    want = once(i, "want", lambda: reference(i.arguments))
    if operation.is_exact:
        same = all(map(same_bits, output, want))
        require(same, operation.name, provider, "another result")
        return
    truth = once(i, "truth", lambda: reference(in_fp64(i.arguments)))
    for ours, exact, honest in zip(output, truth, want, strict=True):
        try:
            assert_within_budget(ours, exact, honest)
        except AssertionError as error:
            require(False, operation.name, provider, f"error of the {error}")
