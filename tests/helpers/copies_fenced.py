"""What the emulator says of products whose operands come by cp.async, in each version of Triton."""

import contextlib

import pytest
import triton

from ptx_emulator import EmulatorError

FENCES = tuple(map(int, triton.__version__.split(".")[:3])) >= (3, 7, 1)


@contextlib.contextmanager
def copies_are_fenced(stages):
    """Before 3.7.1 Triton forgot the fence between cp.async and a product (triton-lang/triton#10537)."""
    by_async_proxy = triton.runtime.driver.active.get_current_target().arch >= 90
    if stages == 1 or FENCES or not by_async_proxy:
        yield
    else:
        with pytest.raises(EmulatorError, match=r"without fence\.proxy\.async"):
            yield
