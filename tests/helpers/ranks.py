"""Processes that are the ranks of a group, over gloo."""

import subprocess
import sys

BEGIN = """
import os
import sys
import torch
import torch.distributed as dist

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
"""
END = """
dist.barrier()  # a rank that leaves early takes its connections with it
os._exit(0)  # gloo's threads now and then abort an orderly exit
"""


def run_ranks(code, folder, *arguments, size=2, timeout=120):
    """Runs ``code`` in each rank, all of which have to come to its end.

    It knows ``torch``, ``dist``, ``rank``, ``size`` and ``folder``, and finds ``arguments`` in ``sys.argv[4:]``.
    """
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start = [sys.executable, "-c", BEGIN + code + END]
    ranks = [subprocess.Popen([*start, *map(str, (rank, size, folder, *arguments))], **said) for rank in range(size)]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * size, outputs
