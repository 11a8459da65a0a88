"""The central rule against the central path itself."""

import torch

from diffopt.linalg import Dense
from diffopt.linalg.central import central_ratio
from diffopt.linalg.saddle import Rows, Saddle, Shift

f64 = torch.float64


def central_point(Q, a, mu, sign):
    """Minimise 1/2 (x-a)'Q(x-a) - mu sum log(sign x) by damped Newton steps."""
    x = sign.clone()
    for _ in range(300):
        gradient, hessian = Q @ (x - a) - mu / x, Q + torch.diag(mu / x**2)
        step = -torch.linalg.solve(hessian, gradient)
        x = x + min(1.0, 0.9 / max(1e-30, float((-step / x).max()))) * step
    return x, mu / x


def test_ratio_is_the_limit_along_the_path():
    P = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=f64)
    Q = torch.linalg.inv(P)
    empty = torch.zeros(0, 2, dtype=f64)
    ones = torch.full((2,), 1e-10, dtype=f64)
    saddle = Saddle(Dense(Q), empty, empty, "primal", Shift(1e-9, ones[:0], ones[:0], ones))
    no_row, no_bound = torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    strict = Rows(no_row, torch.zeros(1, 0, dtype=f64), no_bound, torch.zeros(1, 2, dtype=f64))
    for sign in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])):
        x, lam = central_point(Q, torch.zeros(2, dtype=f64), 1e-12, sign.double())
        _, ratio = central_ratio(saddle, strict, no_row, -sign.long()[None])
        assert torch.allclose(ratio[0], x / lam, rtol=1e-5), (ratio, x / lam)
