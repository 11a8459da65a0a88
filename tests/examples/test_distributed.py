"""The distributed example: two processes train what one trains, with whole weights and with sharded ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed
from tolerances import EXACT_ALGEBRA

SCRIPT = Path(distributed.__file__)
WORKER = Path(__file__).resolve().parents[1] / "distributed_worker.py"


def torchrun(*command: object, processes: int = 2) -> str:
    """Run a script as torchrun does, and return what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONWARNINGS": "error", "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process trains on whole batches."""
    file = tmp_path_factory.mktemp("alone") / "weights.pt"
    distributed.main(["--epochs", "2", "--save", str(file)])
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options",
    [pytest.param([], id="whole"), pytest.param(["--shard"], id="sharded", marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_trains(alone, options, tmp_path):
    printed = torchrun(SCRIPT, "--epochs", "2", "--save", tmp_path / "weights.pt", *options)
    together = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert together.keys() == alone.keys() == {"costs.weight", "costs.bias", "plan.L"}
    for name, weight in alone.items():
        assert torch.allclose(together[name], weight, rtol=0, atol=EXACT_ALGEBRA), name
    assert (together["plan.L"] - torch.eye(distributed.GOODS)).abs().max() > 0.1  # it has learned something
    assert [line[:8] for line in printed.splitlines()] == ["epoch  1", "epoch  2"]  # one process speaks


def test_one_process_may_shard_too(alone, monkeypatch, tmp_path):
    # What torchrun says to a process; here to this one.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    distributed.main(["--epochs", "2", "--shard", "--save", str(tmp_path / "weights.pt")])
    for name, weight in torch.load(tmp_path / "weights.pt", weights_only=True).items():
        assert torch.allclose(weight, alone[name], rtol=0, atol=EXACT_ALGEBRA), name


def test_the_saved_weights_are_those_of_the_model(alone):
    model = distributed.Model()
    assert any(not torch.equal(value, alone[name]) for name, value in model.state_dict().items())
    model.load_state_dict(alone)
    assert all(torch.equal(value, alone[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_shared_is_said(monkeypatch):
    with pytest.raises(SystemExit, match="--shard needs processes"):
        distributed.main(["--shard"])
    monkeypatch.setattr(distributed, "BATCH", 7)
    monkeypatch.setattr(
        distributed, "processes", lambda: __import__("contextlib").nullcontext((0, 2, torch.device("cpu")))
    )
    with pytest.raises(SystemExit, match="2 processes cannot share a batch of 7 equally. Choose a divisor of 7"):
        distributed.main([])


@pytest.mark.slow
def test_ways_of_distributing_agree():
    assert "16 ways agree" in torchrun(WORKER)
