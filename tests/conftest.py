"""What all tests share: reproducible randomness, and the axes of dtype, device and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import diffopt

# Derandomised: the same examples in every run, so a failure in CI is a failure here (and nothing to
# remember between runs). No deadline: the first solve of a process warms caches up.
settings.register_profile(
    "diffopt",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("diffopt")

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):  # (keywords hold folder names, too)
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set how many threads a solve may take, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the library takes."""
    return request.param


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device; skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(scope="session", params=diffopt.backends.names())
def backend(request: pytest.FixtureRequest) -> str:
    """Each registered backend: a new one is tested by registering it."""
    return request.param
