"""Runs Triton's compiled NVIDIA code (PTX) on a CPU, with checks. The README beside this folder says how."""


def __getattr__(name):  # triton is imported only when it is needed: TRITON_INTERPRET is read at its import
    if name in ("install", "installed", "configured", "settings", "records", "findings", "kernels"):
        from . import driver

        return getattr(driver, name)
    if name in ("EmulatorError", "Finding"):
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(name)
