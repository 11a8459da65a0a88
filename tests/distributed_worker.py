"""Every way of distributing trains what one process does; tests/examples/test_distributed.py starts it by torchrun.

Executors and dtypes; DistributedDataParallel, also of a static graph, and FSDP, of the model and of the layer by
itself, to which `solve` is then named as a second forward method. The model returns the whole `Solution`.
"""

import itertools
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import diffopt

N, FEATURES, COUNT = 4, 3, 8


class Model(nn.Module):
    def __init__(self, executor: str, dtype: torch.dtype) -> None:
        super().__init__()
        structure = diffopt.QPStructure(
            N,
            Q=diffopt.learned(torch.eye(N, dtype=dtype)),
            A=diffopt.learned(torch.ones(1, N, dtype=dtype)),
            b=diffopt.fixed(torch.ones(1, dtype=dtype)),
            lower=0.0,
        )
        self.costs = nn.Linear(FEATURES, N, dtype=dtype)
        self.program = diffopt.Layer(structure, settings=diffopt.Settings(executor=executor))

    def forward(self, features: Tensor) -> diffopt.Solution:
        return self.program.solve(q=self.costs(features))


def distributed(model: Model, way: str) -> nn.Module:
    if way == "sharded layer":
        fully_shard(model.program)
        register_fsdp_forward_method(model.program, "solve")
    if way.startswith("sharded"):
        return fully_shard(model)
    return DistributedDataParallel(model, static_graph=way == "static")


def trained(model: nn.Module, features: Tensor, targets: Tensor, way: str) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        solution = model(features)
        loss = (solution.x - targets).square().mean() + 0.1 * solution.nu.mean()
        if way != "sharded layer":
            loss = loss + 0.1 * solution.value.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def main() -> None:
    # (Fields of a Solution share memory, which FSDP says of any output: to change them in place would be wrong.)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    dist.init_process_group("gloo")
    rank, agreed = dist.get_rank(), 0
    for executor, dtype in itertools.product(("torch", "cpu"), (torch.float32, torch.float64)):
        for way in ("whole", "static", "sharded", "sharded layer"):
            torch.manual_seed(0)
            one, start = Model(executor, dtype), Model(executor, dtype)
            start.load_state_dict(one.state_dict())
            features, targets = torch.randn(COUNT, FEATURES, dtype=dtype), torch.rand(COUNT, N, dtype=dtype)
            first = {name: p.detach().clone() for name, p in one.named_parameters()}
            expected = trained(one, features, targets, way)
            found = trained(distributed(start, way), features[rank::2], targets[rank::2], way)
            if rank == 0:
                for name in first:
                    assert (expected[name] - first[name]).abs().max() > 1e-3, (name, way)
                    error = (found[name] - expected[name]).abs().max()
                    assert error <= (1e-12 if dtype == torch.float64 else 1e-5), (name, way, executor, dtype, error)
                agreed += 1
    if rank == 0:
        print(f"{agreed} ways agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
