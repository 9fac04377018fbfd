"""What is installed: a wheel built from the sdist, used away from here and beside Hugging Face's `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import sae_engine as se

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
NO_SOURCES = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info", "results")


def python(*arguments, cwd, path=()):
    """A new interpreter without `site`, so that nothing editable can be seen, and with ``path`` before all else."""
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONSAFEPATH", "TRITON_INTERPRET"}}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *libraries])
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_package_is_listed():
    if sys.version_info < (3, 11):
        tomllib = pytest.importorskip("tomli")
    else:
        import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    present = {path.parent for path in (ROOT / "sae_engine").rglob("*.py")}
    names = [".".join(folder.relative_to(ROOT).parts) for folder in present]
    assert sorted(listed) == sorted([*names, "sae_kernels", "sae_kernels.device", "sae_kernels.stock"])
    assert all((folder / "__init__.py").is_file() for folder in present)


def test_a_release_is_described_everywhere():
    """The version is said in one place; how to cite it, and what is new, say the same."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    released = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    newest = re.findall(r"^## \[(\d\S*)\] - (\S+)$", changes, re.MULTILINE)[0]
    assert [(*cited, *released)] == [newest]
    assert newest[0] == se.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the sdist, built from a copy of the sources."""
    work = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, work / "sources", ignore=NO_SOURCES)
    build = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    python("-c", build, "sdist", work, cwd=work / "sources")
    (sdist,) = work.glob("sae_engine-*.tar.gz")
    with tarfile.open(sdist) as archive:
        # `filter` came with security releases of 3.10 and 3.11; without it, those that have it warn.
        archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    python("-c", build, "wheel", work, cwd=work / sdist.name.removesuffix(".tar.gz"))
    (built,) = work.glob("sae_engine-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds what the wheel installs and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    engine = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sae_engine").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == engine | {f"sae_kernels/{name}" for name in KERNELS}


@pytest.mark.slow
def test_wheel_works_away_from_the_repository(installed, tmp_path):
    code = """
import importlib.metadata, pathlib, sys
import torch, sae_engine as se, sae_kernels.ops
folder = pathlib.Path(sys.argv[1]).resolve()
for module in (se, sae_kernels.ops):
    assert folder in pathlib.Path(module.__file__).resolve().parents, module.__file__
assert [pathlib.Path(p).resolve() for p in sae_kernels.__path__] == [folder / "sae_kernels"]

codes = se.functional.topk(torch.randn(4, 64), 3)
assert se.functional.decode(codes, torch.randn(64, 5), torch.zeros(5)).shape == (4, 5)

distribution = importlib.metadata.distribution("sae-engine")
assert distribution.version == se.__version__
(command,) = [e for e in distribution.entry_points if e.group == "console_scripts"]
assert command.name == "sae-engine" and callable(command.load())
"""
    python("-c", code, installed, cwd=tmp_path, path=[installed])


@pytest.mark.slow
def test_hugging_face_kernels_keeps_its_name(installed, tmp_path):
    """With the repository as working directory and on the path, `import kernels` is still theirs."""
    pytest.importorskip("transformers")
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    # Older than any version that transformers accepts, so that it looks at it and leaves it alone.
    (theirs / "__init__.py").write_text('__version__ = "0.0.1"\n', encoding="utf-8")
    code = """
import sys
import kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels
from transformers import GPT2LMHeadModel
import sae_engine, sae_kernels.ops
assert sys.modules["kernels"] is kernels
"""
    python("-c", code, tmp_path, cwd=ROOT, path=[ROOT, tmp_path, installed])


@pytest.mark.slow
def test_transformers_import_beside_the_folder(installed):
    """The same without their package: our folder must not pass for it."""
    pytest.importorskip("transformers")
    code = "from transformers import GPT2LMHeadModel\nimport sae_engine, sae_kernels.ops"
    python("-c", code, cwd=ROOT, path=[ROOT, installed])


def test_the_workflow_runs_the_parts_of_ci():
    """On GitHub's runners, side by side; every command of .ci/run is some job's, and the wheel's check beside them."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    jobs = {word for line in workflow["jobs"]["part"]["strategy"]["matrix"]["make"] for word in line.split()}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].split() for line in script.splitlines()]
    ours = {word for line in lines if line[:1] == ["make"] and "&" not in line for word in line[1:]}
    assert {"lint", "test", "docs"} <= ours and ours <= jobs
