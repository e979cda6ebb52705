"""The same schedule in every run: what a test sees does not depend on luck.

trio runs the tasks that are ready in random order, which finds tests and code that rely on an order, on somebody else's
machine and never again. Here the order is drawn from a seed, and so are hypothesis' examples, so that what fails fails
again. ``KAS_TEST_SEED=7 scripts/test`` draws others.
"""

from __future__ import annotations

import os

import pytest
import trio
from hypothesis import HealthCheck, settings

SEED = os.environ.get("KAS_TEST_SEED", "0")

settings.register_profile(
    "kas-libp2p",
    derandomize=SEED == "0",
    deadline=None,  # how long an example takes says how busy the machine is
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kas-libp2p")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    # pytest-trio has trio keep to this generator, for hypothesis' sake; there is no public name for it.
    trio._core._run._r.seed(f"{SEED} {request.node.nodeid}")  # type: ignore[attr-defined]


def pytest_report_header() -> str:
    return f"schedule: KAS_TEST_SEED={SEED}"
