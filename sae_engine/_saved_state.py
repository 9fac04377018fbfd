"""A state of nested dictionaries and lists as JSON and named tensors, so that no pickle is needed to keep it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _INTEGERS = "tensor:", "integers"  # marks: a tensor by its name; a dictionary whose keys are integers


def split(state: Any, name: str = "", *, contiguous: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold of ``state``, and its tensors by names that begin with ``name``.

    Tensors that are not ``contiguous`` are copied, for what can write no others; without that none is.

    Raises:
        TypeError: something in it is neither a tensor nor of JSON's types; says where.

    Example:
        >>> plain, tensors = split({"step": 3, "moments": {0: torch.ones(2)}}, "optimizer")
        >>> plain
        {'step': 3, 'moments': {'integers': {'0': 'tensor:optimizer/moments/0'}}}
        >>> sorted(tensors)
        ['optimizer/moments/0']
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().contiguous() if contiguous else value.detach()
            return _TENSOR + path
        if isinstance(value, Mapping):
            inner = {str(key): walk(item, f"{path}/{key}".lstrip("/")) for key, item in value.items()}
            if all(isinstance(key, str) for key in value):
                return inner
            if all(isinstance(key, int) for key in value):
                return {_INTEGERS: inner}
        if isinstance(value, (list, tuple)):
            return [walk(item, f"{path}/{number}") for number, item in enumerate(value)]
        if isinstance(value, str) and value.startswith(_TENSOR):
            raise TypeError(f"{path}: a string may not begin with {_TENSOR!r}, got {value!r}")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path} must be a tensor or of JSON's types to be saved, got {type(value).__name__}")

    return walk(state, name), tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`split` took apart; tuples come back as lists.

    Raises:
        KeyError: a tensor is missing.

    Example:
        >>> join(*split({"a": [torch.ones(1), 2.5], "b": {7: None}}))
        {'a': [tensor([1.]), 2.5], 'b': {7: None}}
    """
    if isinstance(plain, dict):
        if plain.keys() == {_INTEGERS}:
            return {int(key): join(item, tensors) for key, item in plain[_INTEGERS].items()}
        return {key: join(item, tensors) for key, item in plain.items()}
    if isinstance(plain, list):
        return [join(item, tensors) for item in plain]
    if isinstance(plain, str) and plain.startswith(_TENSOR):
        return tensors[plain.removeprefix(_TENSOR)]
    return plain


def random_state() -> dict[str, Any]:
    """The generators that a rule, a loss or a callback of the user's may draw from: torch's, of every device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Back to :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
