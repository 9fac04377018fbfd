"""Files are whole or not there, also with several writers, after a killed one, and for other users to read."""
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

import sae_engine as se
from sae_engine import _files
from sae_engine._files import as_a_whole, replace_file, replace_files
from sae_engine.checkpoints import saelens
from sae_engine.testing import assert_same

D, F = 8, 32


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_files({tmp_path / "a": lambda temporary: temporary.write_text("new"), tmp_path / "b": fail})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}


def test_threads_do_not_mix_files_that_belong_together(tmp_path):
    errors = []
    paths = [tmp_path / name for name in "abcdefgh"]

    def save(text):
        try:
            for _ in range(40):
                replace_files({path: lambda temporary: temporary.write_text(text) for path in paths})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(tmp_path.iterdir()) == paths and len({path.read_text() for path in paths}) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
def test_processes_do_not_mix_files_that_belong_together(tmp_path):
    """Another process renames, and reads, while the folder is not being renamed in: it waits at either."""
    import fcntl

    script = """
import runpy, sys
from pathlib import Path
as_a_whole = runpy.run_path(sys.argv[3])["as_a_whole"]  # without the package, and so without torch
print("started", flush=True)
with as_a_whole(Path(sys.argv[1]), writes=sys.argv[2] == "write"):
    print("inside", flush=True)
"""
    for mine, theirs, waits in (("write", "write", True), ("write", "read", True), ("read", "read", False)):
        command = [sys.executable, "-c", script, str(tmp_path), theirs, _files.__file__]
        with as_a_whole(tmp_path, writes=mine == "write"):
            other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert other.stdout.readline() == "started\n"
            if waits:
                with pytest.raises(subprocess.TimeoutExpired):
                    other.wait(0.3)
            else:
                assert other.communicate()[0] == "inside\n"
        if waits:
            assert other.communicate()[0] == "inside\n"
    # Both files of a checkpoint are renamed, and both are read, inside of it.
    sae, held = se.SparseAutoencoder(D, F, se.TopK(2)), []

    def is_held(folder):
        with open_folder(folder) as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(True)
            else:
                held.append(False)

    with pytest.MonkeyPatch.context() as patch:
        rename = os.replace
        patch.setattr(os, "replace", lambda old, new: (is_held(tmp_path), rename(old, new)))
        sae.save_pretrained(tmp_path)
        load = saelens.load
        patch.setattr(saelens, "load", lambda files, **options: (is_held(tmp_path), load(files, **options))[1])
        se.SparseAutoencoder.from_pretrained(tmp_path)
    assert held == [True] * 3
    is_held(tmp_path)
    assert held[-1] is False


@contextmanager
def open_folder(folder):
    opened = os.open(folder, os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def test_saves_of_one_folder_at_the_same_time(tmp_path):
    saes = [se.SparseAutoencoder(D, F, se.TopK(k)) for k in (1, 2, 3, 4)]
    errors = []

    def save(sae):
        try:
            for _ in range(8):
                sae.save_pretrained(tmp_path / "sae")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(sae,)) for sae in saes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert_same(loaded.W_dec.detach(), saes[loaded.activation.k - 1].W_dec.detach())


KILLED = """
import os, signal, sys, sae_engine as se
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
se.SparseAutoencoder(8, 32, se.TopK(4)).save_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_save_blocks_neither_loading_nor_saving(tmp_path):
    sae = se.SparseAutoencoder(D, F, se.TopK(4))
    sae.save_pretrained(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.glob(".*.tmp"))) == 2
    for _ in range(2):
        assert_same(se.SparseAutoencoder.from_pretrained(tmp_path).W_dec.detach(), sae.W_dec.detach())
        sae.save_pretrained(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_a_file_that_is_opened_and_written(mask, tmp_path):
    before = os.umask(mask)
    try:
        for name, format in (("a", "saelens"), ("b", "sparsify"), ("c", "openai")):
            rule = se.ReLU() if format == "openai" else se.TopK(4)
            se.SparseAutoencoder(D, F, rule).save_pretrained(tmp_path / name, format=format)
        files = [file for folder in tmp_path.iterdir() for file in folder.iterdir()]
        assert len(files) == 5 and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}
        files[0].chmod(0o640)
        replace_file(files[0], lambda temporary: torch.save({}, temporary))
        assert files[0].stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
