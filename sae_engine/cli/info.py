"""``sae-engine info``: versions, devices and back ends."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices and back ends: what can run here, and why not")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = collect_info()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        print(section.replace("_", " "))
        for name, value in entries.items():
            if isinstance(value, dict):
                value = ", ".join(f"{v}" if k in ("runs", "why", "name") else f"{k} {v}" for k, v in value.items())
            print(f"  {name:<14} {'-' if value is None else value}")
    return 0


def collect_info() -> dict[str, dict[str, Any]]:
    """What ``sae-engine info`` reports: plain dictionaries, strings and numbers."""
    import torch

    from sae_engine import __version__
    from sae_engine.data import EMBEDDED_FOLDER, weights_sha256

    packages = ("torch", "triton", "transformers", "safetensors")
    versions: dict[str, Any] = {"sae_engine": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in packages} | {"cuda": torch.version.cuda}
    devices: dict[str, Any] = {"cpu": {"name": platform.machine(), "threads": torch.get_num_threads()}}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    always = {"runs": "yes", "why": "needs torch alone"}
    return {
        "versions": versions,
        "tested_versions": _tested_versions(versions),
        "devices": devices,
        "backends": {"reference": always, "torch": always, "triton": triton_status()},
        "environment": {"SAE_BACKEND": os.environ.get("SAE_BACKEND", "auto"),
                        "SAE_AUTOTUNE_TABLE": os.environ.get("SAE_AUTOTUNE_TABLE")},
        "embedded_model": {"sha256": weights_sha256(EMBEDDED_FOLDER), "folder": str(EMBEDDED_FOLDER)},
    }


def triton_status() -> dict[str, str]:
    """Whether Triton kernels run natively, interpreted or not at all, and why."""
    import torch

    from sae_kernels.dispatch import has_triton, interprets_triton

    if not has_triton():
        return {"runs": "no", "why": "the package triton is not installed"}
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return {"runs": "no", "why": f"triton cannot be imported: {error}"}
    if interprets_triton():
        return {"runs": "interpreted", "why": "TRITON_INTERPRET is set: on the CPU, slow, for tests"}
    if not torch.cuda.is_available():
        return {"runs": "no", "why": "no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels interpreted"}
    return {"runs": "natively", "why": f"on {torch.cuda.get_device_name()}"}


def _tested_versions(installed: dict[str, Any]) -> dict[str, str]:
    """The tested range of torch and of Triton, and whether what is installed lies outside it."""
    from sae_engine._versions import PACKAGES, oldest_and_newest, within_tested_range

    ranges = {name: " to ".join(oldest_and_newest(name)) for name in PACKAGES}
    for name in PACKAGES:
        if installed[name] is not None and not within_tested_range(name, installed[name]):
            ranges[name] += f": {installed[name]} lies outside, no test has been run with it"
    return ranges


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
