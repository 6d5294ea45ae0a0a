"""The real launchers: processes started by popen, by spawn, and by two launch commands of `torchrun`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("rank_script.py"))

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def finish(commands: list[list[str]]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    for process in running:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == 0, output


def require_escape(folder: Path) -> None:
    """Both ranks have the same bits, and have left the saddle."""
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert float((first[0] @ first[1] - torch.eye(2)).norm()) < 0.8 < float(torch.eye(2).norm())


@pytest.mark.parametrize("strategy", ["sfn_ddp", "sfn_ddp_spawn"])
def test_one_command_starts_all_ranks(strategy: str, tmp_path: Path) -> None:
    finish([[sys.executable, SCRIPT, strategy, str(tmp_path)]])
    require_escape(tmp_path)


def test_two_nodes_are_started_by_a_torchrun_each(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
    finish([[*torchrun, f"--node-rank={rank}", SCRIPT, "sfn_ddp", str(tmp_path), "2"] for rank in (0, 1)])
    require_escape(tmp_path)
