"""Imports point one way: sae_engine's modules → functional → sae_kernels.ops → (when first called) the launcher.

The first half reads the sources, the second runs fresh interpreters in which packages are missing.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from structure import ENGINE, KERNELS, ROOT, circles, imports, module_name, ours, within

# Of kernels/device, what a machine without Triton imports too: how launches are configured.
WITHOUT_TRITON = {"sae_kernels.device", "sae_kernels.device._autotune", "sae_kernels.device._tuning"}
# A training step works on entries that it made itself, and calls operators without functional's checks.
IS_TRAINING = re.compile(r"sae_engine\.(training|losses|distributed)(\.\w+)?").fullmatch
# functional and what it stands on. These know the package below, and none of the modules above.
IS_FOUNDATION = re.compile(r"sae_engine\.(functional|codes|_[a-z]\w*)").fullmatch


def is_device(name):
    """Whether a module may import Triton: all others are imported by machines without it."""
    return within(name, "sae_kernels.device") and name not in WITHOUT_TRITON


def kernel_files(chosen):
    return [pytest.param(path, id=module_name(path)) for path in KERNELS if chosen(module_name(path))]


def engine_files(chosen=lambda name: True):
    return [pytest.param(path, id=module_name(path)) for path in ENGINE if chosen(module_name(path))]


# --- in the sources ------------------------------------------------------------------------------------------------


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("path", kernel_files(lambda name: True))
def test_kernels_import_relatively_and_nothing_above(path):
    assert not [name for name in imports(path) if within(name, "sae_engine")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] not in {"kernels", "sae_kernels"}
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"kernels", "sae_kernels"}


@pytest.mark.parametrize("path", kernel_files(lambda name: not is_device(name)))
def test_torch_only_files_import_torch_only(path):
    allowed = {"torch", *sys.stdlib_module_names}
    found = imports(path, anywhere=False)
    assert {name for name in found - ours(found) if name.split(".")[0] not in allowed} == set()
    assert not [name for name in ours(found) if is_device(name)]


def test_reference_stands_alone():
    """On what the arguments are, and on no implementation."""
    assert ours(imports(ROOT / "kernels" / "reference.py")) == {"sae_kernels._terms", "sae_kernels._rounding"}


@pytest.mark.parametrize("path", kernel_files(lambda name: within(name, "sae_kernels.device")))
def test_kernel_files_share_underscored_files_only(path):
    """Neither one another, nor a contract: what two stems need lies in a file that says it is shared.

    GEMMs in place of gathers, and the ways of stock PyTorch that serve a GPU too, are any back end's.
    """
    names = ours(imports(path))
    assert [name for name in names if not (within(name, "sae_kernels.stock") or "._" in name)] == []


@pytest.mark.parametrize("path", kernel_files(lambda name: within(name, "sae_kernels.stock")))
def test_stock_pytorch_knows_no_contract_and_no_kernel(path):
    names = ours(imports(path)) - {"sae_kernels._terms", "sae_kernels._rounding"}
    assert [name for name in names if not within(name, "sae_kernels.stock")] == []


def test_nothing_imports_in_a_circle():
    """At no time: neither when it is imported, nor when it is first called, nor by a name put together then."""
    assert circles() == {}


@pytest.mark.parametrize("path", engine_files(lambda name: name != "sae_engine.cli.info"))
def test_engine_never_imports_triton(path):
    """`sae-engine info` alone tries whether it can be imported."""
    assert not [name for name in imports(path) if within(name, "triton")]


@pytest.mark.parametrize("path", engine_files(lambda name: not (IS_FOUNDATION(name) or IS_TRAINING(name))))
def test_modules_go_through_functional(path):
    """Beside it a module may ask which back end runs."""
    assert not [name for name in imports(path) if within(name, "sae_kernels") and name != "sae_kernels.dispatch"]


@pytest.mark.parametrize("path", engine_files(lambda name: IS_FOUNDATION(name) or IS_TRAINING(name)))
def test_functional_knows_contracts_and_no_launcher(path):
    below = {name for name in imports(path) if within(name, "sae_kernels")}
    assert not [name for name in below if is_device(name)]


@pytest.mark.parametrize("path", engine_files(IS_FOUNDATION))
def test_functional_imports_no_module_above(path):
    assert [name for name in imports(path) if within(name, "sae_engine") and not IS_FOUNDATION(name)] == []


# --- in fresh processes --------------------------------------------------------------------------------------------


def run(code, *, blocked=(), env=None):
    """Runs ``code`` in a new interpreter away from the root, in which ``blocked`` cannot be imported."""
    prelude = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    unset = {"TRITON_INTERPRET", "SAE_BACKEND"}
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=Path(sys.executable).anchor,
        env={**environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


OPTIONAL = ["triton", "transformers", "tokenizers", "safetensors", "tqdm", "matplotlib"]


def test_import_needs_torch_alone_and_says_nothing():
    done = run("import sae_engine, sae_kernels.ops", blocked=OPTIONAL)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_configuration_needs_torch_alone():
    """Reading one from a file takes pydantic and PyYAML, which say so."""
    code = """
from sae_engine.training.presets import preset
config = preset("embedded-tiny").expanded()
config.saes[0].build(8, 8, steps=10, seed=0)
try:
    type(config).from_dict(config.to_dict())
except ImportError as error:
    print(error)
"""
    assert "pip install pydantic" in run(code, blocked=[*OPTIONAL, "pydantic", "yaml"]).stdout


def test_import_without_numpy():
    run("import sae_engine", blocked=["numpy"])  # torch itself warns that it is not there


def test_import_loads_nothing_that_torch_does_not():
    code = """
import torch
before = set(sys.modules)
import sae_engine
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(loaded - {"sae_engine", "sae_kernels", "torch"}))
"""
    # The finder of an editable install is not ours to forbid.
    assert [name for name in run(code).stdout.split() if not name.startswith("__editable__")] == []


def test_public_names_are_there():
    run("import sae_engine as se\nfor name in se.__all__: getattr(se, name)\nassert se.__version__")


def test_cpu_works_without_triton():
    code = """
import torch, sae_engine as se
codes = se.functional.topk(torch.randn(4, 64), 3)
assert codes.values.shape == (12,), codes
assert se.functional.decode(codes, torch.randn(64, 5), torch.zeros(5)).shape == (4, 5)
"""
    run(code, blocked=OPTIONAL)


def test_triton_asked_for_and_missing_raises():
    code = """
import torch, sae_engine as se
try:
    se.functional.topk(torch.randn(4, 64), 3, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "triton" in run(code, blocked=["triton"]).stdout.lower()


def test_triton_without_gpu_or_interpreter_raises():
    code = """
import torch, sae_engine as se
try:
    se.functional.topk(torch.randn(4, 64), 3, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "triton" in run(code, env={"CUDA_VISIBLE_DEVICES": ""}).stdout.lower()
