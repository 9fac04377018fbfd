"""The checkpoints of a run: exact, verified, nothing lost when the disk is full."""
from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine import _saved_state as saved_state
from sae_engine.training import checkpoint

FILES = {"saes": {"a/sae/W": torch.arange(6.0).view(2, 3)}, "optimizer": {"a/m": torch.ones(2, dtype=torch.bfloat16)}}


def write(run: Path, update: int) -> Path:
    return checkpoint.write(run, update, {"note": update}, FILES)


def test_a_state_of_every_kind_comes_back_as_it_was():
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": torch.tensor(0.5), "betas": [0.9, 1]}],
        },
        "none": None, "flag": True, "name": "x", "small": 1e-30,
    }  # fmt: skip
    plain, tensors = saved_state.split(state, "a")
    back = saved_state.join(json.loads(json.dumps(plain)), tensors)
    assert back["optimizer"]["state"].keys() == {0, 1}
    assert torch.equal(back["optimizer"]["state"][0]["step"], torch.tensor(3.0))
    assert all(back[name] == state[name] for name in ("none", "flag", "name", "small"))
    assert sorted(tensors) == ["a/optimizer/groups/0/lr", "a/optimizer/state/0/step"]


@pytest.mark.parametrize("value", [object(), {1: 2, "a": 3}, b"bytes", "tensor:x"])
def test_what_json_cannot_hold_is_refused_by_its_place(value):
    with pytest.raises(TypeError, match="outer/inner"):
        saved_state.split({"inner": value}, "outer")


def test_what_was_written_is_read(tmp_path):
    place = write(tmp_path, 12)
    saved, complaints = checkpoint.newest(tmp_path)
    assert (saved.update, saved.plain, complaints) == (12, {"note": 12}, [])
    assert all(torch.equal(saved.tensors[name], t) for part in FILES.values() for name, t in part.items())
    modes = {file.stat().st_mode & 0o777 for file in place.iterdir()}
    (tmp_path / "made").touch()
    assert modes == {(tmp_path / "made").stat().st_mode & 0o777}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda place: flip(place / "optimizer.safetensors"),
    lambda place: (place / "saes.safetensors").unlink(),
    lambda place: (place / "state.json").write_text("{"),
    lambda place: (place / "state.json").write_text("[]"),
    lambda place: (place / "state.json").unlink(),
])  # fmt: skip
def test_a_damaged_one_is_named_and_an_earlier_one_taken(tmp_path, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    saved, complaints = checkpoint.newest(tmp_path)
    assert saved.update == 1
    assert len(complaints) == 1 and "step-000000002" in complaints[0]
    damage(checkpoint.listed(tmp_path)[1])
    with pytest.raises(checkpoint.Damaged, match="no checkpoint of this run is whole"):
        checkpoint.newest(tmp_path)


def test_a_damaged_one_is_written_again(tmp_path):
    flip(write(tmp_path, 1) / "saes.safetensors")
    write(tmp_path, 1)
    assert checkpoint.newest(tmp_path)[0].update == 1


def test_without_any_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def raises(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", raises)
    said = "update 2 could not be written, earlier ones are whole: No space left on device; make room, then sae-eng"
    with pytest.raises(OSError, match=said):
        write(tmp_path, 2)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 100,000 bytes: the system's own refusal, as of a full disk."""
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_the_system_refuses_is_an_error_of_the_system(tmp_path, small_files):
    """Not one of safetensors' own kind, which nobody expects of writing."""
    write(tmp_path, 1)
    large = {"saes": {"a": torch.zeros(100_000)}}
    small_files()
    with pytest.raises(OSError, match="update 2 could not be written, earlier ones are whole: File too large"):
        checkpoint.write(tmp_path, 2, {}, large)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step-000000001"]
    sae = se.SparseAutoencoder(64, 1024, se.TopK(4))
    with pytest.raises(OSError, match="File too large"):
        sae.save_pretrained(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_only_the_newest_are_kept_and_nothing_of_killed_attempts(tmp_path):
    for update in (1, 2, 10):
        write(tmp_path, update)
    shutil.copytree(tmp_path / "checkpoints" / "step-000000001", tmp_path / "checkpoints" / ".step-000000011.ab.tmp")
    checkpoint.prune(tmp_path, 2)
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["step-000000002", "step-000000010"]
