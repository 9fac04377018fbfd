"""Runs a project's Triton tests on compiled code, on CPU tensors.

Settings come from the environment: PTX_EMULATOR_ARCH (sm_80, sm_90, sm_100), and PTX_EMULATOR_SEED (0), _RESIDENT (1),
_QUANTUM (0), _CHECKS (a list such as ``mem,init``; all), _RAISE (severe, all, none), which are those of
`driver.Settings`, and _LOG: a file that gets a line of JSON for each test, with its launches and its findings.
"""

import json
import os
import time

import pytest

import ptx_emulator


def pytest_configure(config):
    setting = {name.removeprefix("PTX_EMULATOR_"): value for name, value in os.environ.items()}
    checks = setting.get("CHECKS")
    ptx_emulator.install(
        arch=int(setting["ARCH"].removeprefix("sm_")),
        seed=int(setting.get("SEED", 0)),
        checks=True if checks is None else [check for check in checks.split(",") if check],
        resident=int(setting.get("RESIDENT", 1)),
        quantum=int(setting.get("QUANTUM", 0)),
        raise_on=setting.get("RAISE", "severe"),
    )


def pytest_report_header(config):
    settings = ptx_emulator.settings
    return (
        f"ptx_emulator: compiled kernels of {os.environ['PTX_EMULATOR_ARCH']}, seed {settings.seed}, "
        f"{settings.resident} resident programs, quantum {settings.quantum}"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    found, start = len(ptx_emulator.findings), time.time()
    ptx_emulator.records.clear()
    yield
    path = os.environ.get("PTX_EMULATOR_LOG")
    if path:
        kernels = {}
        for record in ptx_emulator.records:
            kernel = kernels.setdefault(record.kernel, [0, 0])  # launches, instructions of warps
            kernel[0] += 1
            kernel[1] += record.steps
        line = {
            "test": item.nodeid,
            "seconds": round(time.time() - start, 2),
            "kernels": kernels,
            "findings": [str(finding) for finding in ptx_emulator.findings[found:]],
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
