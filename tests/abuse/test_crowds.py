"""Crowds that want to keep others out, or to be remembered without end."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses
from kas_libp2p.config import Config
from kas_libp2p.errors import Stage
from kas_libp2p.events import InboundRefused, LimitHit, UpgradeFailed
from kas_libp2p.metadata import Dialect
from tests.abuse.house import ADDRESS, DELAY, ECHO, besieged, house
from tests.abuse.test_stalls import in_messages, version

LIMITS = Config().limits


async def test_silent_strangers_from_a_few_hosts_keep_nobody_out(autojump_clock: MockClock) -> None:
    """Four hosts could hold every place in the handshakes: 16 connections each, for 10 seconds, and come again."""
    async with house() as h:
        alone = await h.friend_is_served()
        hosts = [h.internet.host(f"12.0.0.{n}") for n in range(8)]
        for _ in range(LIMITS.max_per_ip):
            for host in hosts:
                await host.dial(addresses.parse(ADDRESS))
        await trio.sleep(DELAY)
        assert h.node.status().in_use["max_pending_inbound"] == LIMITS.max_pending_inbound
        assert await h.friend_is_served() == pytest.approx(alone)
        gave = [event for _, event in h.of(UpgradeFailed) if event.stage == Stage.LIMITS]
        assert gave
        assert h.count("upgrade-failed", Stage.LIMITS) == len(gave)
        assert {event.reason for _, event in h.of(InboundRefused)} <= {"max_pending_inbound", "max_per_ip"}
        await trio.sleep(Config().dial.upgrade_timeout)
        assert set(h.node.status().in_use.values()) == {0}


async def test_silent_strangers_from_as_many_hosts_hold_a_place_for_two_seconds(autojump_clock: MockClock) -> None:
    async with house() as h:
        await h.friend_is_served()
        for _ in range(LIMITS.max_pending_inbound):
            await h.pipe()
        await trio.sleep(2.0)
        for _ in range(LIMITS.max_pending_inbound):
            await h.pipe()  # a second wave takes the places of the first
        await trio.sleep(2.0)
        begun = trio.current_time()
        await h.friend.connect(f"{ADDRESS}/p2p/{h.node.peer_id}", ECHO)
        assert trio.current_time() - begun < 10 * DELAY


async def test_one_host_has_so_many_connections(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        host = h.internet.host("12.0.0.1")
        for _ in range(3 * LIMITS.max_per_ip):
            await host.dial(addresses.parse(ADDRESS))
        await trio.sleep(DELAY)
        assert h.node.status().in_use["max_per_ip"] == LIMITS.max_per_ip
        assert [event.reason for _, event in h.of(InboundRefused)] == ["max_per_ip"] * 2 * LIMITS.max_per_ip
        assert h.node.status().limit_hits["max_per_ip"] == 2 * LIMITS.max_per_ip


async def test_one_that_never_reads_stalls_its_own_stream_alone(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        stalled = await stranger.open_stream(ECHO)

        async def pour() -> None:
            await stalled.send_all(bytes(64 << 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await trio.sleep(1)
            well = await stranger.open_stream(ECHO)
            await well.send_all(b"beside it")
            assert await well.receive_some() == b"beside it"
            (there,) = [each.connection for each in h.node.connections]
            unread = sum(stream._state.unread for stream in there.streams)
            queued = sum(stream._state.queued for stream in there.streams)
            assert unread <= Config().yamux.max_window
            assert queued <= Config().yamux.send_high_water + 64 * 1024
            nursery.cancel_scope.cancel()


async def test_streams_without_end_meet_their_limit_and_the_connection_stays(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        for _ in range(100):
            await stranger.open_stream(ECHO)
        await trio.sleep(5 * DELAY)
        assert h.node.status().limit_hits["max_streams_per_peer"] == 100 - 16
        assert len(h.of(LimitHit)) == 100 - 16
        assert len(h.node.connections) == 1


async def test_a_peer_has_one_kaspa_stream(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await h.connected()
        for _ in range(10):
            await stranger.open_stream(Dialect.MESSAGES)
        await trio.sleep(5 * DELAY)
        assert len(h.joiner.peers) == 1
        hits = h.node.status().limit_hits
        assert hits["one_kaspa_stream"] == 9
        await trio.sleep(1.5)


async def test_made_up_peers_of_one_host_leave_places_in_kaspad_s_handshakes(autojump_clock: MockClock) -> None:
    """Each of them says Version and no more, and so would hold one of 16 places for 4 s."""
    async with besieged() as h:
        for number in range(LIMITS.max_per_ip):
            await in_messages(await h.connected(ip="12.0.0.1"), [version(number + 1)])
        await trio.sleep(5 * DELAY)
        assert h.joiner.pending == h.joiner.settings.max_pending_per_host


async def test_peers_that_come_and_go_are_forgotten(autojump_clock: MockClock) -> None:
    """CVE-2023-40583: what is remembered of peers is bounded, however many there are."""
    async with house() as h:
        for _ in range(30):
            stranger = await h.connected()
            await stranger.open_stream("/ipfs/id/push/1.0.0")
            stranger.abort()
            await trio.sleep(5 * DELAY)
        node = h.node
        assert node.swarm.connections == {}
        assert node._identify.peers == node._identify.observed == node._identify._allowances == {}
        assert node._identify._asking == {}
        assert node._kaspa._opened == {}
        assert len(list(node.swarm.peerstore.peer_ids())) == 1, "ourselves"
