"""The reference is right: against a hand-computed problem, and against differences of its own solution."""

from __future__ import annotations

import numpy as np
import torch

import reference
from diffopt.check import known


def answer_of(problem: known.KnownProblem) -> reference.Answer:
    active = reference.active_set(problem.lam, problem.lam_lower, problem.lam_upper)
    return reference.solve(reference.instance(problem.arguments()), active)


def test_projection_onto_a_halfspace_by_hand() -> None:
    # min |x - c|^2 / 2 s.t. a'x <= h with a = (3, 4), c = (3, 4), h = 0: x = c - lam a, lam = 25 / 25 = 1.
    data = {
        "Q": torch.eye(2), "q": torch.tensor([-3.0, -4.0]), "G": torch.tensor([[3.0, 4.0]]), "h": torch.zeros(1),
    }  # fmt: skip
    nothing = np.zeros(2)
    answer = reference.solve(reference.instance(data), reference.active_set(np.ones(1), nothing, nothing))
    assert np.allclose(answer.point["x"], 0, atol=1e-18)
    assert np.allclose(answer.point["lam"], 1, atol=1e-18)
    # x = c - a (a'c - h) / a'a, so dx/dh = a / 25; lam = (a'c - h) / a'a, so dlam/dh = -1 / 25.
    grad = reference.gradients(answer, {"x": np.array([1.0, 0.0])})
    assert np.allclose(grad["h"], 3 / 25, atol=1e-18)
    assert np.allclose(grad["q"], [-(1 - 9 / 25), 12 / 25], atol=1e-17)
    assert np.allclose(reference.gradients(answer, {"lam": np.ones(1)})["h"], -1 / 25, atol=1e-18)


def test_the_known_point_is_found() -> None:
    for seed in range(30):
        problem = known.quadratic_program(seed, 6, seed % 3, 5, bounds=known.BOUNDS[seed % 5], singular=seed % 2 == 1)
        answer = answer_of(problem)
        for name in reference.OUTPUTS:
            assert reference.error(answer.point[name], np.asarray(getattr(problem, name))) < 1e-11, (seed, name)


def test_gradients_match_differences_in_extended_precision() -> None:
    # t = 2^-17: truncation about t^2 = 6e-11, and rounding of a solution with 16 digits or more about 1e-11.
    t = 2.0**-17
    for seed in range(12):
        problem = known.quadratic_program(100 + seed, 5, 1, 4, bounds="both", condition=10.0)
        answer = answer_of(problem)
        rng = np.random.default_rng(seed)
        cotangents = {name: rng.normal(size=answer.point[name].shape) for name in reference.OUTPUTS}
        cotangents["value"] = rng.normal(size=())
        gradient = reference.gradients(answer, cotangents)
        for name in reference.PIECES:
            direction = rng.normal(size=gradient[name].shape)
            if name == "Q":
                direction = direction + direction.T
            ends = []
            for sign in (1, -1):
                pieces = {k: getattr(answer.instance, k) for k in reference.PIECES}
                pieces[name] = pieces[name] + sign * t * direction
                moved = reference.Instance(**pieces)
                other = reference.solve(moved, answer.active)
                total = sum((cotangents[k] * other.point[k]).sum() for k in reference.OUTPUTS)
                ends.append(total + cotangents["value"] * reference.value(moved, other.point["x"]))
            numeric = (ends[0] - ends[1]) / (2 * t)
            analytic = (gradient[name] * direction).sum()
            assert abs(analytic - numeric) / (1 + abs(numeric)) < 1e-7, (seed, name)
