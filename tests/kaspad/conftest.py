"""Real kaspads for tests. Nothing here runs a mock: a missing kaspad is a visible skip that says how to get one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from kas_bridge.simnet.mine import Chain, filled_chain
from kas_bridge.simnet.node import VERSION, KaspadMissing, SimnetNode, find_kaspad, simnet_node, version_of

MakeNode = Callable[..., Awaitable[SimnetNode]]


@pytest.fixture(scope="session")
def kaspad() -> Path:
    """The binary."""
    try:
        found = find_kaspad()
    except KaspadMissing as error:
        pytest.skip(str(error))
    if (version := version_of(found)) != VERSION:
        pytest.skip(f"{found} is {version}; these tests are about {VERSION}: scripts/build-kaspad")
    return found


@pytest.fixture
async def make_node(kaspad: Path) -> AsyncIterator[MakeNode]:
    """Starts nodes (arguments of `simnet_node`); they end with the test."""
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> SimnetNode:
            return await stack.enter_async_context(simnet_node(kaspad, **options))

        yield make


@pytest.fixture
async def chain(kaspad: Path) -> Chain:
    """A small chain with filled blocks (20 of 240 kB), made once and kept in the cache."""
    return await filled_chain(kaspad, full=20)


@pytest.fixture
async def long_chain(kaspad: Path) -> Chain:
    """Long enough to be cut in the middle: 1312 blocks, 300 of them filled, 72 MB."""
    return await filled_chain(kaspad, full=300)
