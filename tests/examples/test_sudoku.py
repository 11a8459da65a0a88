"""The Sudoku example: its data, its metric, its idea of the rules, and a short run from outside."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sudoku

SCRIPT = Path(sudoku.__file__)
GRID = torch.tensor([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(sudoku.DATA) as file:
        return {name: file[name] for name in ("puzzles", "solutions")}


# The facts that examples/data/README.md states.


def test_every_solution_is_a_valid_grid_that_keeps_the_given_digits(stored):
    puzzles, solutions = stored["puzzles"], stored["solutions"]
    assert puzzles.shape == solutions.shape == (10_000, 4, 4)
    assert sudoku.is_valid(torch.from_numpy(solutions)).all()
    assert ((puzzles == 0) | (puzzles == solutions)).all()
    given = (puzzles > 0).sum((1, 2))
    assert given.min() == 4 and given.max() == 8


def test_72_test_puzzles_repeat_a_training_puzzle(stored):
    assert len({bytes(puzzle) for puzzle in stored["puzzles"]}) == 9_570
    assert int(sudoku.load_data().unseen.sum()) == 1_000 - 72


def test_every_puzzle_has_one_completion_among_all_288_grids(stored):
    grids = np.unique(stored["solutions"].reshape(-1, 16), axis=0)
    assert len(grids) == 288
    puzzles = stored["puzzles"].reshape(-1, 1, 16)
    completions = ((puzzles == 0) | (puzzles == grids)).all(-1).sum(-1)
    assert (completions == 1).all()


# The metric.


def test_a_grid_is_valid_when_rows_columns_and_blocks_are_permutations():
    repeated_in_row = GRID.clone()
    repeated_in_row[0, 0] = 2
    columns_and_blocks_wrong = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    blocks_wrong = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]])
    grids = torch.stack([GRID, repeated_in_row, columns_and_blocks_wrong, blocks_wrong])
    assert sudoku.is_valid(grids).tolist() == [True, False, False, False]


def test_one_hot_and_digits_are_inverse_and_a_blank_is_zero():
    assert torch.equal(sudoku.digits(sudoku.one_hot(GRID)), GRID)
    assert sudoku.one_hot(torch.zeros(4, 4)).sum() == 0


def test_a_failed_solve_counts_as_an_error():
    class SolvesAllButTheFirst(torch.nn.Module):
        dtype = torch.float64

        def forward(self, puzzles):
            ok = torch.ones(len(puzzles), dtype=torch.bool)
            ok[0] = False
            return data.test_solutions[: len(puzzles)], ok

    data = sudoku.load_data(limit=sudoku.TEST_BATCH)
    tested = sudoku.evaluate(SolvesAllButTheFirst(), data)
    assert tested["failed"] == 1
    assert tested["scores"]["test_error"] == tested["scores"]["exact_error"] == 1 / sudoku.TEST_BATCH
    assert tested["scores"]["test_loss"] == 0


# The rules.


def test_the_64_true_rules_have_rank_40_and_hold_for_every_solution(stored):
    rules = sudoku.true_rules()
    assert rules.shape == (64, 64)
    assert torch.linalg.matrix_rank(rules) == sudoku.RANK
    solutions = sudoku.one_hot(torch.from_numpy(stored["solutions"])).flatten(1)
    assert torch.equal(solutions @ rules.mT, torch.ones(10_000, 64, dtype=torch.float64))


def test_principal_angles_see_spaces_and_not_their_bases():
    rules = sudoku.true_rules()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.svd(rules).Vh[: sudoku.RANK]
    mixed = torch.randn(40, 40, generator=generator, dtype=torch.float64) @ basis
    # arccos near 1 halves the digits, and degrees multiply by 57: 1e-5 is rounding error.
    assert sudoku.principal_angles(mixed, rules).max() < 1e-5
    turned = torch.cat([basis[:-1], torch.linalg.svd(rules).Vh[-1:]])
    angles = sudoku.principal_angles(turned, rules)
    assert angles[-2] < 1e-5
    assert angles[-1] == pytest.approx(90)


# The whole script, as users run it.


def run_script(folder: Path, *options: str) -> tuple[str, dict]:
    command = [sys.executable, "-W", "error", str(SCRIPT), "--json", "results.json", *options]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads((folder / "results.json").read_text())


def test_a_short_run_learns_and_reports(tmp_path):
    printed, results = run_script(tmp_path, "--epochs", "2", "--limit", "600", "--seed", "1")
    (run,) = results["models"].values()
    assert results["settings"]["seed"] == 1
    assert [row["epoch"] for row in run["epochs"]] == [1, 2]
    assert set(run["epochs"][0]) == set(sudoku.Epoch.__dataclass_fields__)
    assert len(run["batch_losses"]) == 2 * 600 // sudoku.TRAIN_BATCH
    assert run["failed"] == 0
    assert run["seconds_per_batch"] > 0
    assert run["epochs"][1]["train_loss"] < run["epochs"][0]["train_loss"]
    angles = results["principal_angles_degrees"]
    assert len(angles["before"]) == len(angles["after"]) == sudoku.RANK
    assert (tmp_path / "output" / "sudoku.png").read_bytes().startswith(b"\x89PNG")
    assert "puzzle      prediction    solution" in printed
    assert str(tmp_path / "output" / "sudoku.png") in printed


def test_the_baseline_trains_beside_the_layer(tmp_path):
    _, results = run_script(tmp_path, "--epochs", "1", "--limit", "20", "--conv", "--output", "elsewhere")
    assert list(results["models"]) == ["QP layer", "conv net"]
    assert (tmp_path / "elsewhere" / "sudoku.png").exists()
