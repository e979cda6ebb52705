"""The Rust peer, built once; and everything here is marked as interop."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kas_libp2p import Config, Node, open_node
from tests.interop import protocols
from tests.interop.rust_peer import RustPeer, rust_peer

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "scripts" / "build-interop-rust"
MISSING = 69
"""Exit code of the build script where the machine lacks something."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(scope="session")
def rust_binary() -> Path:
    """The peer's program. Builds it if need be, which takes some minutes."""
    done = subprocess.run([BUILD], capture_output=True, text=True, check=False)
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode == MISSING:
        pytest.skip(f"{said} (then run scripts/build-interop-rust)")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture
async def rust(rust_binary: Path) -> AsyncIterator[RustPeer]:
    """A Rust peer that listens, with its defaults."""
    async with rust_peer(rust_binary) as peer:
        yield peer


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node of ours that listens, with its defaults."""
    async with open_node(Config(listen=("/ip4/127.0.0.1/tcp/0",))) as node:
        yield node


@pytest.fixture
async def served(node: Node) -> protocols.Served:
    """The test protocols, served by ``node``."""
    return await protocols.serve(node)
