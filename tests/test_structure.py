"""The shape of the code, as ``make structure`` prints it: short ways, few files for an operation, no long file."""

import re

import pytest
import structure
from structure import ROOT, files_of_operations, folders, lines, ways

from sae_kernels.operations import OPERATIONS

FILES = files_of_operations()
# Of one call, in files above the implementations. Whoever shortens a way lowers its number.
LONGEST_WAYS = {"sae(x), no gradient": 8, "sae(x)": 9, "TrainStep": 12}
# reference, contract, row, stock, device, who calls it, and one more: its GEMM or its baselines
MOST_FILES = 7
# Targets, predictions, sizes and reasons of the benchmarks speak of these by name, which adding one does not need.
SINGLED_OUT = {"topk", "batch_topk", "norm_match", "threshold", "decode", "decode_error", "decode_backward_values",
               "decode_backward_weight", "to_dense", "gather", "sparse_mlp"}  # fmt: skip


def test_the_ways_are_short():
    assert {name: len(found.files) <= LONGEST_WAYS[name] for name, found in ways().items()} == dict.fromkeys(
        LONGEST_WAYS, True
    ), {name: found.files for name, found in ways().items()}


def test_a_way_holds_what_is_entered_and_nothing_else():
    from sae_kernels import dispatch

    found = structure.way(dispatch.interprets_triton)
    assert found == (["kernels/dispatch.py"], 0)
    assert structure.way(lambda: None) == ([], 0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_adding_an_operation_touches_few_files(name):
    """In the packages; and with the benchmarks, where they do not single it out."""
    files = FILES[name]
    assert files.to_add <= MOST_FILES, files
    if name not in SINGLED_OUT:
        assert files.to_add + len(files.benchmarks) <= MOST_FILES, files


def test_what_defines_an_operation_is_found():
    files = FILES["feature_topm"]
    assert set(files.kernels) == {f"kernels/{name}.py" for name in (
        "reference", "ops", "operations", "stock/feature_topm", "device/feature_topm")}  # fmt: skip
    assert (files.callers, files.benchmarks) == (
        ["sae_engine/_running.py", "sae_engine/functional.py"], ["benchmarks/registry.py"]
    )


def test_an_operation_in_another_list_would_be_seen(tmp_path):
    """Calls are uses; a set, a dictionary's key or a function of the name is one more place to touch."""
    file = tmp_path / "other.py"
    for text, seen in (('KINDS = {"topk", "other"}', True), ('RUN = {"topk": 1}', True), ("def topk(): pass", True),
                       ('define("topk(Tensor pre) -> Tensor")', True), ('Operation("topk", "row_topk.launch")', True),
                       ("functional.topk(pre)", False), ('find("topk")', False), ('RUN["topk"]', False)):  # fmt: skip
        file.write_text(text)
        assert ("topk" in set(structure._said(file))) is seen, text


def test_programs_find_the_files_beside_them():
    """`make` sets PYTHONSAFEPATH, with which Python looks for no module beside the program that it runs."""
    programs = {path: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    siblings = "|".join(path.stem for path in programs)
    needing = [path.name for path, text in programs.items() if '__name__ == "__main__"' in text and re.search(
        rf'^ *(?:import|from) (?:{siblings})\b|import_module\("(?:{siblings})"\)', text, re.MULTILINE)]  # fmt: skip
    assert "kernel_report.py" in needing and "run.py" in needing
    assert [name for name in needing if "sys.path.insert(0, " not in (ROOT / "benchmarks" / name).read_text()] == []


def test_no_file_is_long():
    long = {str(path.relative_to(ROOT)): lines(path) for paths in folders().values() for path in paths}
    assert {name: count for name, count in long.items() if count > structure.LONGEST} == {}
