"""Learn what a planner optimises from its decisions, on any number of processes.

A planner divides one unit over goods, x >= 0 with sum x = 1, where x'Qx/2 + q'x is least. Seen are features of a day
and the division that it chose; learned are Q, as L'L + I/10, and the map from features to q: a linear layer and a
quadratic program, trained together. Nothing in it is diffopt's own way of distributing: a layer is a module, so
``torch.distributed`` gives each process its share of every batch and averages gradients.

    python examples/distributed.py                                    # one process
    torchrun --nproc-per-node 2 examples/distributed.py               # two here (on two GPUs, where there are any)
    torchrun --nproc-per-node 2 examples/distributed.py --shard       # and each keeps half of the weights (FSDP)

On two hosts with eight GPUs each, run on both of them:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/distributed.py

Weights come out the same, up to rounding, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

try:
    import diffopt
except ModuleNotFoundError:  # not installed: take the package beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import diffopt

GOODS, FEATURES, DAYS, BATCH = 6, 8, 240, 24


class Planner(diffopt.QuadraticProgram):
    """minimise x'(L'L + I/10)x/2 + q'x subject to sum x = 1, x >= 0."""

    def form(self, q: Tensor, L: Tensor) -> diffopt.QPForm:
        Q = L.mT @ L + 0.1 * torch.eye(GOODS, dtype=q.dtype, device=q.device)
        return diffopt.QPForm(Q, q, A=q.new_ones(1, GOODS), b=1.0, lower=0.0)


class Model(nn.Module):
    """From features ``(batch, FEATURES)`` to decisions ``(batch, GOODS)``."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = nn.Linear(FEATURES, GOODS, dtype=torch.float64)
        self.plan = diffopt.Layer(Planner(L=diffopt.learned(torch.eye(GOODS, dtype=torch.float64))))

    def forward(self, features: Tensor) -> Tensor:
        return self.plan(q=self.costs(features))


@contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """Join the other processes, if torchrun started this one: our number, how many there are, and our device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def observed_days(seed: int) -> TensorDataset:
    """Return features and the decisions of a planner that is drawn from the seed: the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    features, matrix, L = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((DAYS, FEATURES), (FEATURES, GOODS), (GOODS, GOODS))
    )
    return TensorDataset(features, diffopt.solve(Planner(), {"q": features @ matrix, "L": L}).x)


def train(model: nn.Module, data: TensorDataset, epochs: int, rank: int, count: int, device: torch.device) -> None:
    # The sampler deals a shuffled deck: the shares of one step are together the batch that one process would take.
    sampler = DistributedSampler(data, num_replicas=count, rank=rank, seed=0)
    loader = DataLoader(data, batch_size=BATCH // count, sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for features, decisions in loader:
            # A mean over a share of the batch, and shares of equal size: the mean of their gradients is the batch's.
            loss = (model(features.to(device)) - decisions.to(device)).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() / len(loader)
        if count > 1:
            dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1:2d}: mean squared error of a decision {float(total) / count:.5f}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn what a planner optimises, on any number of processes.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the observed days (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the planner and of the start (default 0)")
    parser.add_argument("--shard", action="store_true", help="shard the weights too (FSDP); needs torchrun")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the trained weights to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with processes() as (rank, count, device):
        if BATCH % count:
            raise SystemExit(f"{count} processes cannot share a batch of {BATCH} equally. Choose a divisor of {BATCH}.")
        if options.shard and not dist.is_initialized():
            raise SystemExit("--shard needs processes to share the weights. Start it with torchrun.")
        torch.manual_seed(options.seed)  # the same start everywhere
        model: nn.Module = Model().to(device)
        if options.shard:
            fully_shard(model)
        elif count > 1:
            model = DistributedDataParallel(model)
        train(model, observed_days(options.seed), options.epochs, rank, count, device)
        if options.save:
            # In whole and on the CPU, under the names of Model, whichever way it was distributed.
            whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                torch.save(whole, options.save)


if __name__ == "__main__":
    main()
