"""The versions of torch and Triton that are tested: the one place that says so. It imports nothing but `re`.

``make test-versions`` runs a row of :data:`MATRIX` each; the lower ends are the bounds of pyproject.toml. There are no
upper bounds: a newer version may work, and ``sae-engine info`` says that nobody has tried it.
"""
import re

# torch and the Triton that it brings along, oldest first
MATRIX = (("2.10.0", "3.6.0"), ("2.13.0", "3.7.1"), ("2.14.1", "3.8.0"), ("2.15.0", "3.9.0"))
PACKAGES = ("torch", "triton")


def minor(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu". Raises ValueError for what begins with no two numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"version must begin with two numbers, as in 2.13.0, got {version!r}")
    return int(found[1]), int(found[2])


def oldest_and_newest(package: str) -> tuple[str, str]:
    """The oldest and the newest tested minor version of "torch" or "triton", as in ("2.10", "2.15")."""
    tested = sorted(minor(row[PACKAGES.index(package)]) for row in MATRIX)
    oldest, newest = (".".join(map(str, version)) for version in (tested[0], tested[-1]))
    return oldest, newest


def within_tested_range(package: str, version: str) -> bool:
    """Whether a version of "torch" or "triton" lies between the tested ones, by its first two numbers."""
    oldest, newest = map(minor, oldest_and_newest(package))
    return oldest <= minor(version) <= newest
