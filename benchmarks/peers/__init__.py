"""The peers, by name, in the order of the tables."""

from benchmarks.peers.base import Peer
from benchmarks.peers.cvxpylayers_ import Cvxpylayers
from benchmarks.peers.diffopt_ import Diffopt, DiffoptTorch
from benchmarks.peers.loops import Clarabel, Daqp, DaqpFromTorch, Gurobi, Piqp
from benchmarks.peers.moreau_ import Moreau, MoreauInterior
from benchmarks.peers.proxsuite_ import Proxsuite
from benchmarks.peers.qpax_ import Qpax
from benchmarks.peers.qpth_ import Qpth

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        Diffopt, DiffoptTorch, Qpth, Moreau, MoreauInterior, Proxsuite, Qpax, Cvxpylayers,
        Daqp, DaqpFromTorch, Piqp, Clarabel, Gurobi,
    )
}  # fmt: skip

__all__ = ["PEERS", "Peer"]
