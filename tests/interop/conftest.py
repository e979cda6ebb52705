"""The peers of other implementations, each built once; and everything here is marked as interop."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Generator
from pathlib import Path

import pytest

from kas_libp2p import Config, Node, open_node, perf
from tests.interop import protocols
from tests.interop.peer import Peer, leaves, running_peer

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
MISSING = 69
"""Exit code of the build script where the machine lacks something."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what went wrong, not the nurseries that it went through: each peer and each node is one, or two."""
    if call.excinfo is not None:
        first, *others = leaves(call.excinfo.value)
        for each in others:
            first.add_note(f"also: {each!r}")
        if isinstance(first.__context__, BaseExceptionGroup):
            first.__suppress_context__ = True  # these nurseries again
        if first is not call.excinfo.value:
            call.excinfo = pytest.ExceptionInfo.from_exception(first)
    return (yield)


def built(language: str) -> Path:
    """The program of a peer. Builds it if need be, which takes some minutes."""
    script = SCRIPTS / f"build-interop-{language}"
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    said = done.stderr.strip().rpartition("\n")[2]
    if done.returncode == MISSING:
        pytest.skip(f"{said} (then run scripts/{script.name})")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def rust_binary() -> Path:
    """rust-libp2p's."""
    return built("rust")


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """All of them, by language."""
    return {language: built(language) for language in ("go", "js", "rust")}


@pytest.fixture(scope="session", params=["go", "js"])
def other(request: pytest.FixtureRequest) -> Path:
    """go-libp2p's, and js-libp2p's."""
    return built(request.param)


@pytest.fixture
async def rust(rust_binary: Path) -> AsyncIterator[Peer]:
    """A Rust peer that listens, with its defaults."""
    async with running_peer(rust_binary) as peer:
        yield peer


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    """A node of ours that listens, with its defaults, and serves perf."""
    async with open_node(Config(listen=("/ip4/127.0.0.1/tcp/0",))) as node:
        await node.serve(perf.handle, perf.ID)
        yield node


@pytest.fixture
async def served(node: Node) -> protocols.Served:
    """The test protocols, served by ``node``."""
    return await protocols.serve(node)
