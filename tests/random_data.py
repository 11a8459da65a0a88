"""Small data of tests of gradients, and every output of a solve in one tensor."""

import torch

import diffopt

f64 = torch.float64


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=f64, requires_grad=grad)


def random_qp(batch=3, n=5, m=6, p=2, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    L, q, A, G, x0 = (torch.randn(batch, *s, dtype=f64, generator=g) for s in ((n, n), (n,), (p, n), (m, n), (n,)))
    slack = torch.rand(batch, m, dtype=f64, generator=g)
    b, h = (A @ x0[..., None])[..., 0], (G @ x0[..., None])[..., 0] + slack
    data = [L @ L.mT + torch.eye(n, dtype=f64), q, A, b, G, h, x0 - 2, x0 + 0.7]
    return [t.requires_grad_(grad) for t in data]


def everything(*data, **kwargs):
    s = diffopt.solve_qp(*data, **kwargs)
    return torch.cat([s.x, s.s, s.lam, s.nu, s.lam_lower, s.lam_upper, s.value.unsqueeze(-1)], -1)
