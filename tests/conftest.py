"""The same schedule in every run: what a test sees does not depend on luck.

trio runs the tasks that are ready in random order, which finds tests and code that rely on an order, on somebody else's
machine and never again. Here the order is drawn from a seed, so that what fails fails again. ``KAS_TEST_SEED=7
scripts/test`` draws another one.
"""

from __future__ import annotations

import os

import pytest
import trio

SEED = os.environ.get("KAS_TEST_SEED", "0")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    # pytest-trio has trio keep to this generator, for hypothesis' sake; there is no public name for it.
    trio._core._run._r.seed(f"{SEED} {request.node.nodeid}")  # type: ignore[attr-defined]


def pytest_report_header() -> str:
    return f"schedule: KAS_TEST_SEED={SEED}"
