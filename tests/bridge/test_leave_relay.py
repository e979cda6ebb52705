"""A direct way comes up beside the relay's, and there are no sessions: the peer is carried on there by another stream,
and kaspad misses it for a moment only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from kas_bridge._keeper import KeptState
from kas_libp2p.events import KaspaPeerEnded, KaspaPeerJoined, StreamFailed
from kas_libp2p.kaspa.join import End
from kas_libp2p.metadata import PathKind

from .test_relay import PLAIN, Box, private, relay_in
from .world import Machine, World, until, world


async def plain(w: World, *through: Box, **settings: Any) -> Machine:
    return await private(w, *through, session=PLAIN, **settings)


async def opened_by(a: Machine, b: Machine, b_opens: bool) -> None:
    """Connect them, on a connection of a's."""
    if b_opens:
        await a.node.ping(b.address)
        b.bridge.connect(a.address)
    else:
        a.bridge.connect(b.address)


async def direct_beside(a: Machine, b: Machine) -> None:
    """What a punch would bring: another connection, that a dialed as it did the circuit."""
    before = set(b.node.swarm.listen_addresses())
    await b.node.listen(f"/ip4/10.0.0.{b.bridge.settings.data_dir.name}/tcp/16117")
    (address,) = set(b.node.swarm.listen_addresses()) - before
    await a.node.swarm.dial(b.peer, [address], fresh=True)
    await until(lambda: len(b.node.swarm.connections_to(a.peer)) == 2)


def proven(*pair: Machine) -> None:
    a, b = pair
    for here, there in ((a, b), (b, a)):
        for callback in here.node.on_direct:
            callback(there.peer)


@pytest.mark.parametrize("b_opens", [False, True])
async def test_the_peer_moves_to_the_direct_way(b_opens: bool, tmp_path: Path, autojump_clock: MockClock) -> None:
    """Whoever opened the Kaspa stream opens the new one, also if the other one is the initiator of the connection."""
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await plain(w, box)
        a = await plain(w, box)
        await opened_by(a, b, b_opens)
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        opener = b if b_opens else a
        assert [machine.row(other)["direction"] for machine, other in ((a, b), (b, a))] == (
            ["inbound", "outbound"] if b_opens else ["outbound", "inbound"]
        )
        await direct_beside(a, b)
        assert not any(each.moved for each in a.of("kaspa-peer-joined") if isinstance(each, KaspaPeerJoined))
        began = {machine: len(machine.events) for machine in (a, b)}
        proven(a, b)
        seconds = await until(
            lambda: all(machine.row(other)["path"] == PathKind.DIRECT for machine, other in ((a, b), (b, a)))
        )
        assert seconds < 0.2
        await until(lambda: len(a.kaspad.light.peers) == len(b.kaspad.light.peers) == 1)
        assert await a.kaspad.light.peers[0].ping() < 0.1
        for machine in (a, b):
            told = [e for e in machine.events[began[machine] :] if isinstance(e, KaspaPeerEnded | KaspaPeerJoined)]
            assert [type(each) for each in told] == [KaspaPeerEnded, KaspaPeerJoined]
            assert isinstance(told[0], KaspaPeerEnded)
            assert told[0].reason in (End.SUPERSEDED, End.DUPLICATE)
            assert isinstance(told[1], KaspaPeerJoined)
            assert told[1].moved
            assert not machine.of("peer-failed"), "nobody is dialed anew"
        (kept,) = opener.bridge.keeper.all()
        assert kept.state is KeptState.HERE


async def test_without_such_a_way_it_stays_where_it_is(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await plain(w, box)
        a = await plain(w, box, peer=(b.address,))
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        proven(a, b)
        await until(lambda: a.of("stream-failed"))
        (failed,) = a.of("stream-failed")
        assert isinstance(failed, StreamFailed)
        assert "but through a relay" in failed.reason
        assert a.row(b)["path"] == PathKind.RELAYED
        assert await a.kaspad.light.peers[0].ping() < 0.1


async def test_what_is_proven_after_the_bridge_has_ended_concerns_nobody(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await plain(w, box)
        a = await plain(w, box, peer=(b.address,))
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        for machine in (a, b):
            machine.bridge.stop("enough")
        await until(lambda: not a.node.on_direct and not b.node.on_direct)  # it used to raise, in the node's own task


async def test_what_fails_at_first_is_tried_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as w:
        box = await relay_in(w, 1)
        b = await plain(w, box)
        a = await plain(w, box, peer=(b.address,))
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        proven(a, b)
        await until(lambda: a.of("stream-failed"))
        await direct_beside(a, b)
        await until(lambda: a.row(b)["path"] == b.row(a)["path"] == PathKind.DIRECT)
        assert len(a.of("stream-failed")) == 1
        await until(lambda: a.kaspad.light.peers and b.kaspad.light.peers)
        assert await a.kaspad.light.peers[0].ping() < 0.1
