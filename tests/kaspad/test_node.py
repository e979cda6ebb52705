"""Finding kaspad, and its life: start, stop, power cut, restart. And those of its habits that the bridge relies on."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kas_bridge.simnet.mine import Miner
from kas_bridge.simnet.node import KaspadMissing, find_kaspad, simnet_node, version_of
from kas_bridge.simnet.process import Process, ProcessEnded
from kas_libp2p.errors import RpcError
from tests.kaspad.conftest import MakeNode


def program(path: Path, text: str = "kaspad 9.8.7") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without kaspad."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("KAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KASPAD", raising=False)
    return tmp_path


def test_it_is_looked_for_in_order(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KaspadMissing, match="scripts/build-kaspad"):
        find_kaspad()
    cached = program(nowhere / "cache" / "kaspad-2.1.0" / "bin" / "kaspad")
    assert find_kaspad() == cached
    on_path = program(nowhere / "bin" / "kaspad")
    assert find_kaspad() == on_path
    named = program(nowhere / "elsewhere")
    monkeypatch.setenv("KASPAD", str(named))
    assert find_kaspad() == named
    given = program(nowhere / "given")
    assert find_kaspad(given) == given


def test_one_that_was_named_and_is_missing_is_not_replaced(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(nowhere / "bin" / "kaspad")
    with pytest.raises(KaspadMissing, match="nothing-here"):
        find_kaspad(nowhere / "nothing-here")
    monkeypatch.setenv("KASPAD", str(nowhere / "nor-here"))
    with pytest.raises(KaspadMissing, match="KASPAD"):
        find_kaspad()


def test_version(tmp_path: Path) -> None:
    assert version_of(program(tmp_path / "kaspad")) == "9.8.7"
    with pytest.raises(KaspadMissing, match="does not run"):
        version_of(tmp_path)


async def test_a_process_ends_with_its_own_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Process.start(["sh", "-c", "echo said; exit 3"], log=log)
    assert await process.wait() == 3
    assert await process.stop() == 3
    assert process.last_lines() == "said"
    assert process.memory() == 0


async def test_a_process_that_ignores_the_polite_signal_is_killed(tmp_path: Path) -> None:
    process = Process.start(["sh", "-c", "trap '' INT; echo ready; while :; do sleep 60; done"], log=tmp_path / "log")
    with trio.fail_after(10):
        while "ready" not in process.last_lines():  # noqa: ASYNC110 - another process writes it
            await trio.sleep(0.01)
    assert await process.stop(timeout=0.1) == -9


async def test_a_process_that_is_cancelled_ends(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        process = Process.start(["sleep", "60"], log=tmp_path / "log")
        scope.cancel()
        with pytest.raises(trio.Cancelled):
            await process.wait()
    await process.stop()
    assert not process.running


@pytest.mark.kaspad
async def test_a_node_that_can_not_start_says_why(kaspad: Path) -> None:
    with pytest.raises(ProcessEnded, match="no-such-flag"):
        async with simnet_node(kaspad, flags=["--no-such-flag"]):
            pass


@pytest.mark.kaspad
async def test_a_killed_node_comes_back_with_its_chain(make_node: MakeNode) -> None:
    node = await make_node(mining=True)
    async with node.rpc() as rpc:
        await Miner(rpc).mine(30)
        before = await rpc.get_block_dag_info()
        identity = (await rpc.get_info()).p2pId
    node.kill()
    assert not node.process.running
    await node.start()
    async with node.rpc() as rpc:
        after = await rpc.get_block_dag_info()
        assert after.sink == before.sink
        assert (await rpc.get_info()).p2pId != identity, "a node has a new id at every start"


@pytest.mark.kaspad
async def test_a_default_node_refuses_what_the_bridge_never_asks(make_node: MakeNode) -> None:
    node = await make_node()
    async with node.rpc() as rpc:
        with pytest.raises(RpcError, match="unsafe"):
            await rpc.add_peer("127.0.0.1:1")
        assert not await rpc.get_connected_peer_info()
