"""The main job: two unmodified kaspads sync through two bridges, whatever dies in between."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kas_bridge.simnet import measure
from kas_bridge.simnet.bridges import BridgeLink, Bridges
from kas_bridge.simnet.measure import Pair, blocks_at, reach, state_of
from kas_bridge.simnet.mine import FULL, Chain
from kas_bridge.simnet.node import SimnetNode
from kas_bridge.simnet.wire import Wire

pytestmark = pytest.mark.kaspad


@asynccontextmanager
async def joined(chain: Chain, kaspad: Path, wire: Wire | None = None) -> AsyncIterator[tuple[Pair, BridgeLink]]:
    """Two nodes and their bridges, started and not connected."""
    way = Bridges()
    async with measure.pair_of(chain, kaspad, way, wire) as pair, way.prepare(pair) as link:
        yield pair, link


async def test_an_empty_node_syncs_and_follows(kaspad: Path, chain: Chain) -> None:
    async with joined(chain, kaspad) as (pair, link):
        result = await measure.timed_sync(chain, pair, Bridges(), link, 0.0)
        assert result.blocks == chain.blocks
        assert await state_of(pair.source) == await state_of(pair.target)
        for node in (pair.source, pair.target):
            async with node.rpc() as rpc:
                (peer,) = await rpc.get_connected_peer_info()
                # Each sees an ordinary inbound peer, from an address of loopback that stands for the remote bridge.
                assert peer.address.startswith("127.")
                assert not peer.address.startswith("127.0.0.")
                assert not peer.isOutbound
        outcome = await measure.live(chain, pair, Bridges(), size=FULL, count=5)
        assert len(outcome.latencies) == 5
        assert await state_of(pair.source) == await state_of(pair.target)
        for bridge in (link.source, link.target):
            assert await bridge.stop() == 0


@pytest.mark.lab
async def test_over_a_wire_in_two_namespaces(kaspad: Path, chain: Chain) -> None:
    with Wire(0.01) as wire:
        async with joined(chain, kaspad, wire) as (pair, link):
            result = await measure.timed_sync(chain, pair, Bridges(), link, 0.01)
            assert result.blocks == chain.blocks
            assert result.wire is not None
            assert result.wire > chain.bytes


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_a_bridge_is_killed_in_the_middle_of_a_sync(kaspad: Path, long_chain: Chain, victim: str) -> None:
    empty = long_chain.blocks - long_chain.full
    async with joined(long_chain, kaspad) as (pair, link):
        bridge = getattr(link, victim)
        await link.connect()
        await reach(pair.target, empty + 20)
        bridge.process.kill()
        assert await blocks_at(pair.target) < long_chain.blocks, "the sync was over before the bridge was killed"
        await bridge.start()
        pair.others[f"bridge {victim}"] = bridge.process
        if victim == "target":
            await link.connect()  # what `kas-bridge connect` asked for ends with the process
        assert await measure.wait_synced(pair) == long_chain.blocks
        assert await state_of(pair.source) == await state_of(pair.target)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_a_kaspad_is_killed_in_the_middle_of_a_sync(kaspad: Path, long_chain: Chain, victim: str) -> None:
    empty = long_chain.blocks - long_chain.full
    async with joined(long_chain, kaspad) as (pair, link):
        node: SimnetNode = getattr(pair, victim)
        await link.connect()
        await reach(pair.target, empty + 20)
        node.kill()
        if victim == "source":
            assert await blocks_at(pair.target) < long_chain.blocks, "the sync was over before the node was killed"
        await node.start()
        # Nobody tells the bridges: they find it, and one another, by themselves.
        assert await measure.wait_synced(pair) == long_chain.blocks
        assert await state_of(pair.source) == await state_of(pair.target)
        for bridge in (link.source, link.target):
            assert bridge.process.running


async def test_a_bridge_that_hangs_is_left_and_found_again(kaspad: Path, long_chain: Chain) -> None:
    empty = long_chain.blocks - long_chain.full
    async with joined(long_chain, kaspad) as (pair, link):
        await link.connect()
        await reach(pair.target, empty + 20)
        link.source.process.suspend()
        with contextlib.ExitStack() as stack:
            stack.callback(link.source.process.resume)
            # Long before kaspad's own 120 s.
            await link.target.wait_joined(0)
        assert await measure.wait_synced(pair) == long_chain.blocks
        assert await state_of(pair.source) == await state_of(pair.target)
