"""The table of architectures is what the scan finds, of a few of them, and has all that transformers has."""

import sys
from pathlib import Path

import pytest
import transformers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def architectures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import architectures

    yield architectures
    sys.modules.pop("architectures", None)


def rows(architectures):
    text = architectures.TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"the table was not made with transformers {transformers.__version__}")
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_the_table_has_every_architecture(architectures):
    assert sorted(rows(architectures)) == architectures.kinds()


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bloom", "gemma3n_text", "inkling2_text"])
def test_the_table_says_what_the_scan_finds(architectures, kind):
    row = architectures.scan(kind)
    assert row.line() == rows(architectures)[kind] and not row.wrong
