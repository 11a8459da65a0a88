"""Learn the rules of 4x4 Sudoku from puzzles and their solutions alone.

The layer is a quadratic program over the 64 entries of a one-hot grid (cell, digit),

    minimise 0.05 |x|^2 - puzzle'x   subject to   A x = A exp(w),  x >= 0,

that knows nothing of rows, columns or blocks: the 40 x 64 matrix A and the vector w are learned,
A from random numbers. (exp(w) is positive and feasible, so every puzzle has a solution.)
With ``--conv``, a convolutional network learns the same task beside it.

    python examples/sudoku.py --epochs 5 --seed 0 --conv --json results.json --output output

References: Amos, Kolter, "OptNet: Differentiable Optimization as a Layer in Neural Networks"
(ICML 2017), section 4.3; b = A exp(w) is from the later code of its authors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

try:
    import diffopt
except ModuleNotFoundError:  # not installed: take the package beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import diffopt

# A grid is one-hot, (SIDE, SIDE, SIDE): row, column, digit.
SIDE = 4
ENTRIES = SIDE**3
# Rows of the learned A: how many of the true rules are independent. The only hint that the layer gets.
RANK = 40

TRAIN_PUZZLES = 9000
TRAIN_BATCH, TEST_BATCH = 150, 200
DATA = Path(__file__).resolve().parent / "data" / "mini_sudoku.npz"


# ------------------------------------------------------------------------------ the two models


class LearnedRules(diffopt.QuadraticProgram):
    """The grid nearest to a puzzle among those that satisfy learned linear rules."""

    def __init__(self) -> None:
        super().__init__(
            A=diffopt.learned(torch.rand(RANK, ENTRIES, dtype=torch.float64)),
            w=diffopt.learned(torch.zeros(ENTRIES, dtype=torch.float64)),
        )

    def form(self, puzzle: Tensor, A: Tensor, w: Tensor) -> diffopt.QPForm:
        Q = diffopt.Diagonal(torch.full_like(w, 0.1))
        return diffopt.QPForm(Q=Q, q=-puzzle, A=A, b=A @ w.exp(), lower=0.0)


class QPModel(nn.Module):
    """The layer, from one-hot puzzles ``(batch, 4, 4, 4)`` to grids of the same shape."""

    name, dtype, learning_rate = "QP layer", torch.float64, 1e-1
    # Where the active rows are almost dependent, the exact gradient is large: its norm, about 1e-2 as a rule,
    # reaches 20 times that in one batch of some hundreds, and at this learning rate one such step undoes
    # an epoch. So it is clipped (not so in the paper).
    largest_gradient = 0.01

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.rules = diffopt.Layer(LearnedRules(), backend=backend, on_failure="return")

    def forward(self, puzzles: Tensor) -> tuple[Tensor, Tensor]:
        """Return grids, and ``(batch,)`` whether each was solved."""
        solution = self.rules.solve(puzzle=puzzles.flatten(1))
        return solution.x.reshape(puzzles.shape), solution.ok


class ConvModel(nn.Module):
    """The baseline: ten layers of 512 filters; the rows of the grid are the channels."""

    name, dtype, learning_rate = "conv net", torch.float32, 1e-3
    largest_gradient = float("inf")

    def __init__(self, filters: int = 512, layers: int = 10) -> None:
        super().__init__()
        widths = [SIDE] + [filters] * layers
        hidden = [
            module
            for width, following in itertools.pairwise(widths)
            for module in (nn.Conv2d(width, following, 3, padding=1), nn.ReLU())
        ]
        self.net = nn.Sequential(*hidden, nn.Conv2d(filters, SIDE, 3, padding=1), nn.Softmax(dim=-1))

    def forward(self, puzzles: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(puzzles), torch.ones(len(puzzles), dtype=torch.bool)


Model = QPModel | ConvModel


# ------------------------------------------------------------------------------ data and rules


@dataclass
class Data:
    """One-hot puzzles and solutions, ``(count, 4, 4, 4)``; ``unseen`` marks test puzzles not trained on."""

    train_puzzles: Tensor
    train_solutions: Tensor
    test_puzzles: Tensor
    test_solutions: Tensor
    unseen: Tensor


def load_data(limit: int | None = None) -> Data:
    """Read the puzzles; ``limit`` keeps the first so many of each part."""
    with np.load(DATA) as stored:
        puzzles, solutions = torch.from_numpy(stored["puzzles"]), torch.from_numpy(stored["solutions"])
    train, test = slice(0, TRAIN_PUZZLES), slice(TRAIN_PUZZLES, None)
    seen = {bytes(puzzle.numpy()) for puzzle in puzzles[train]}
    unseen = torch.tensor([bytes(puzzle.numpy()) not in seen for puzzle in puzzles[test]])
    parts = [one_hot(grids[part])[:limit] for part in (train, test) for grids in (puzzles, solutions)]
    return Data(*parts, unseen=unseen[:limit])


def one_hot(grids: Tensor) -> Tensor:
    """Return digits ``(..., 4, 4)`` as 0/1 entries ``(..., 4, 4, 4)``; a blank (0) is all zeros."""
    return (grids.unsqueeze(-1) == torch.arange(1, SIDE + 1)).double()


def digits(grids: Tensor) -> Tensor:
    """Return the digit with the largest entry in each cell, ``(..., 4, 4)``."""
    return grids.argmax(-1) + 1


def groups() -> Tensor:
    """Return the rows, columns and blocks as 0/1 memberships of the cells, ``(12, 16)``."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    block = 2 * (row // 2) + column // 2
    each = torch.arange(SIDE).reshape(SIDE, 1, 1)
    return torch.cat([(labels == each).flatten(1) for labels in (row, column, block)]).double()


def is_valid(grids: Tensor) -> Tensor:
    """Return whether each grid of digits ``(count, 4, 4)`` has every digit once in every group."""
    counts = groups() @ one_hot(grids).reshape(-1, SIDE * SIDE, SIDE)
    return (counts == 1).flatten(1).all(-1)


def true_rules() -> Tensor:
    """Return the 64 equations C x = 1 of Sudoku, ``(64, 64)``, of which 40 are independent.

    Each cell holds one digit (16); each row, column and block holds each digit once (48).
    """
    one_digit_a_cell = torch.kron(torch.eye(SIDE * SIDE), torch.ones(1, SIDE))
    each_digit_once = torch.kron(groups(), torch.eye(SIDE))
    return torch.cat([one_digit_a_cell, each_digit_once]).double()


def principal_angles(rows: Tensor, others: Tensor) -> Tensor:
    """Return the angles in degrees, ascending, between the row spaces of two matrices, each of rank `RANK`.

    A is learned only up to combinations of its rows, so spaces are compared and not entries.
    (Any two spaces of dimension 40 in 64 dimensions share 16, so at least 16 angles are zero.)
    """
    bases = [torch.linalg.svd(matrix).Vh[:RANK] for matrix in (rows, others)]
    cosines = torch.linalg.svdvals(bases[0] @ bases[1].mT)
    return torch.rad2deg(torch.arccos(cosines.clamp(0, 1)))


# ------------------------------------------------------------------------------ training


@dataclass
class Epoch:
    """What is reported after each epoch. Errors are shares of puzzles, between 0 and 1.

    ``*_error``: the digits do not form a valid grid; ``exact_error``: they differ from the solution
    somewhere. ``train_*`` is measured while learning. A puzzle that could not be solved is an error.
    """

    epoch: int
    train_loss: float
    train_error: float
    test_loss: float
    test_error: float
    unseen_error: float
    exact_error: float
    failed: int
    seconds: float


def train(model: Model, data: Data, epochs: int) -> dict[str, Any]:
    """Train a model, print one line an epoch, and return its history."""
    optimizer = torch.optim.Adam(model.parameters(), lr=model.learning_rate)
    history, losses, seconds = [], [], []
    print(f"\n{model.name}: {sum(p.numel() for p in model.parameters())} learned numbers")
    print("epoch   loss: train     test   invalid: train     test   unseen   inexact   failed   seconds")
    for number in range(1, epochs + 1):
        start = time.perf_counter()
        trained = train_epoch(model, optimizer, data, f"{model.name}, epoch {number}/{epochs}")
        tested = evaluate(model, data)
        row = Epoch(
            epoch=number,
            train_loss=statistics.fmean(trained["losses"]),
            train_error=trained["invalid"] / len(data.train_puzzles),
            **tested["scores"],
            failed=trained["failed"] + tested["failed"],
            seconds=time.perf_counter() - start,
        )
        print(
            f"{row.epoch:5d}{row.train_loss:14.4f}{row.test_loss:9.4f}{row.train_error:17.2%}{row.test_error:9.2%}"
            f"{row.unseen_error:9.2%}{row.exact_error:10.2%}{row.failed:9d}{row.seconds:10.1f}",
            flush=True,
        )
        history.append(asdict(row))
        losses += trained["losses"]
        seconds += trained["seconds"]
    return {
        "epochs": history,
        "batch_losses": losses,
        "seconds_per_batch": statistics.median(seconds),
        "failed": sum(row["failed"] for row in history),
    }


def train_epoch(model: Model, optimizer: torch.optim.Optimizer, data: Data, label: str) -> dict[str, Any]:
    """Take one pass over the training puzzles, in order."""
    losses, seconds, invalid, failed = [], [], 0, 0
    puzzles, targets = (part.to(model.dtype).split(TRAIN_BATCH) for part in (data.train_puzzles, data.train_solutions))
    with tqdm(total=len(puzzles), desc=label, unit="batch", leave=False) as progress:
        for puzzle, target in zip(puzzles, targets, strict=True):
            start = time.perf_counter()
            prediction, ok = model(puzzle)
            # Failed solves leave by indexing: a NaN that is only masked would still reach the gradient.
            loss = (prediction[ok] - target[ok]).square().mean()
            if ok.any():
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), model.largest_gradient)
                optimizer.step()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            invalid += int((~is_valid(digits(prediction)) | ~ok).sum())
            failed += int((~ok).sum())
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return {"losses": losses, "seconds": seconds, "invalid": invalid, "failed": failed}


@torch.no_grad()
def evaluate(model: Model, data: Data) -> dict[str, Any]:
    """Predict all test puzzles."""
    outputs = [model(puzzle) for puzzle in data.test_puzzles.to(model.dtype).split(TEST_BATCH)]
    predictions, ok = (torch.cat(pieces) for pieces in zip(*outputs, strict=True))
    found, target = digits(predictions), digits(data.test_solutions)
    invalid = ~is_valid(found) | ~ok
    inexact = (found != target).flatten(1).any(-1) | ~ok
    scores = {
        "test_loss": (predictions[ok] - data.test_solutions[ok]).square().mean().item(),
        "test_error": share(invalid),
        "unseen_error": share(invalid[data.unseen]),
        "exact_error": share(inexact),
    }
    return {"scores": scores, "failed": int((~ok).sum())}


def share(mask: Tensor) -> float:
    """Return the share of True in a mask."""
    return mask.double().mean().item()


# ------------------------------------------------------------------------------ what was learned


def show_puzzle(model: Model, data: Data) -> str:
    """Return the first unseen test puzzle beside its prediction and its solution, as text."""
    index = int(data.unseen.nonzero()[0])
    puzzle = data.test_puzzles[index]
    with torch.no_grad():
        prediction, _ = model(puzzle[None].to(model.dtype))
    given = digits(puzzle) * puzzle.sum(-1).long()
    grids = (given, digits(prediction[0]), digits(data.test_solutions[index]))
    lines = [f"{'puzzle':12}{'prediction':14}solution"]
    for rows in zip(*(grid.tolist() for grid in grids), strict=True):
        lines.append("     ".join(" ".join(str(digit) if digit else "." for digit in row) for row in rows))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw losses, errors and principal angles of a run into a PNG file."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss_axes, error_axes, angle_axes = figure.subplots(1, 3)
    for color, (name, run) in zip(("tab:blue", "tab:orange"), results["models"].items(), strict=False):
        epochs = [row["epoch"] for row in run["epochs"]]
        batches = np.arange(1, len(run["batch_losses"]) + 1) * len(epochs) / len(run["batch_losses"])
        loss_axes.plot(batches, run["batch_losses"], color=color, alpha=0.4, lw=1, label=f"{name}, training batch")
        loss_axes.plot(epochs, [row["test_loss"] for row in run["epochs"]], "o-", color=color, label=f"{name}, test")
        for key, style in (("train_error", "--"), ("test_error", "o-"), ("unseen_error", "x:")):
            values = [100 * row[key] for row in run["epochs"]]
            error_axes.plot(epochs, values, style, color=color, label=f"{name}, {key.removesuffix('_error')}")
    loss_axes.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title="Loss")
    error_axes.set(xlabel="epoch", ylabel="predictions that are no valid grid (%)", ylim=(-3, 103), title="Error")
    for when, angles in results["principal_angles_degrees"].items():
        angle_axes.plot(range(1, len(angles) + 1), angles, ".-", label=f"A {when} training")
    angle_axes.set(
        xlabel="index", ylabel="degrees", ylim=(-3, 93), title="Principal angles, rows of A to the rules of Sudoku"
    )
    for axes in (loss_axes, error_axes):
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss_axes, error_axes, angle_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn the rules of 4x4 Sudoku with a QP layer.")
    parser.add_argument("--backend", default="auto", help="the solver: auto, or a name from diffopt.backends.names()")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training puzzles (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random start (default 0)")
    parser.add_argument("--conv", action="store_true", help="train the convolutional baseline too (slow)")
    parser.add_argument("--limit", type=int, help="use only so many training and test puzzles, for a quick look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR", help="where the picture goes")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    data = load_data(options.limit)
    print(
        f"{len(data.train_puzzles)} training puzzles, {len(data.test_puzzles)} test puzzles, "
        f"{int(data.unseen.sum())} of them not among the training puzzles; seed {options.seed}"
    )
    torch.manual_seed(options.seed)
    model = QPModel(options.backend)
    angles = {"before": principal_angles(model.rules.get_parameter("A").detach(), true_rules()).tolist()}
    runs = {model.name: train(model, data, options.epochs)}
    angles["after"] = principal_angles(model.rules.get_parameter("A").detach(), true_rules()).tolist()
    if options.conv:
        torch.manual_seed(options.seed)
        baseline = ConvModel()
        runs[baseline.name] = train(baseline, data, options.epochs)

    results = {
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "versions": {"diffopt": diffopt.__version__, "torch": torch.__version__},
        "models": runs,
        "principal_angles_degrees": angles,
    }
    picture = options.output / "sudoku.png"
    draw(results, picture)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))

    print(f"\n{show_puzzle(model, data)}\n")
    for name, run in runs.items():
        print(f"{name}: {run['seconds_per_batch']:.3f} s a training batch (median), {run['failed']} failed solves")
    print(
        f"Largest principal angle between the rows of A and the rules of Sudoku: "
        f"{max(angles['before']):.1f} degrees before training, {max(angles['after']):.1f} after"
    )
    print(f"Picture: {picture.resolve()}")


if __name__ == "__main__":
    main()
