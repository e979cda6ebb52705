"""Nodes whose circuits are renewed: a relay of ours, alice who called bob, and the relay's limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, Node
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.errors import CircuitEnded, Refused
from kas_libp2p.events import (
    CircuitNotRenewed,
    CircuitOpened,
    CircuitRenewed,
    ConnectionClosed,
    ConnectionOpened,
    RelayRequestServed,
)
from kas_libp2p.metadata import OverlayStream, Path, PathKind
from kas_libp2p.relay._renewal import LEAST_TIME, PAUSE
from tests.network import MemoryInternet, echo, eventually, talk
from tests.relay.scripted import Told, node_at

ECHO = "/echo/1"
HOURS = 7200.0


def relay(number: int, limits: RelayLimits) -> Config:
    settings = RelayConfig(serve=True, purpose=Purpose.ANY, limits=limits)
    return Config(listen=(f"/ip4/11.0.0.{number}/tcp/1",), role=Role.PUBLIC, relay=settings)


class World:
    """The relays, bob who has places on all of them, alice; and what each of them tells."""

    def __init__(self, relays: tuple[Node, ...], bob: Node, alice: Node) -> None:
        self.relays, self.bob, self.alice = relays, bob, alice
        self.told, self.told_bob = Told(alice), Told(bob)
        self.told_relays = tuple(map(Told, relays))

    def lines(self, node: Node) -> list[int]:
        """Numbers of the connections with the other one."""
        peer = self.bob.peer_id if node is self.alice else self.alice.peer_id
        return [each.connection.number for each in node.swarm.connections_to(peer)]

    async def call(self) -> OverlayStream:
        stream = await self.alice.connect(self.bob.peer_id, ECHO, addresses=self.bob.addresses)
        await talk(stream)
        return stream

    def circuits(self) -> int:
        return sum(len(told.of(CircuitOpened)) for told in self.told_relays)


@asynccontextmanager
async def world(count: int = 1, **limits: float) -> AsyncIterator[World]:
    internet = MemoryInternet(delay=0.02)
    given = RelayLimits(**limits)  # type: ignore[arg-type]
    async with (
        node_at(internet, 11, relay(11, given)) as first,
        node_at(internet, 12, relay(12, given)) as second,
    ):
        relays = (first, second)[:count]
        places = RelayConfig(relays=tuple(each.addresses[0] for each in relays))
        private = Config(listen=(), role=Role.PRIVATE, relay=places)
        async with node_at(internet, 2, private) as bob, node_at(internet, 3) as alice:
            await bob.serve(echo, ECHO)
            await eventually(lambda: len(bob.addresses) == count)
            yield World(relays, bob, alice)


async def test_a_circuit_in_use_is_followed_by_another_without_a_gap(autojump_clock: MockClock) -> None:
    async with world() as w:
        stream = await w.call()
        (old,) = w.lines(w.alice)
        began = trio.current_time()
        await trio.sleep(HOURS - 601)
        assert not w.told.of(CircuitRenewed)
        assert w.circuits() == 1
        await trio.sleep(160)
        (event,) = w.told.of(CircuitRenewed)
        assert (event.peer, event.relay, event.connection) == (w.bob.peer_id, w.relays[0].peer_id, old)
        assert event.path == Path(PathKind.RELAYED, w.relays[0].peer_id)
        assert "of 2 h are left" in event.reason
        assert event.seconds < 1
        assert w.lines(w.alice) == [old, event.following]
        assert not w.told_bob.of(CircuitRenewed), "who asked for the one asks for the other"
        # New streams go there, and what is open on the old one stays.
        limits = (await w.call()).metadata.limits
        assert limits is not None
        assert limits.seconds_left is not None
        assert limits.seconds_left > 6500
        back = w.bob.swarm.connection_to(w.alice.peer_id)
        assert back is not None
        assert back.connection.circuit is not None
        assert back.connection.circuit.limits.lasts == pytest.approx(limits.seconds_left, abs=1)
        await talk(stream)
        with pytest.raises(CircuitEnded) as caught:
            await stream.receive_some()
        assert caught.value.limit == "max_seconds"
        assert trio.current_time() - began == pytest.approx(HOURS, abs=2)
        await trio.sleep(1)
        assert w.lines(w.alice) == [event.following]
        await w.call()
        assert w.circuits() == 2


async def test_the_next_kaspa_stream_goes_to_the_next_one(autojump_clock: MockClock) -> None:
    async with world() as w:
        await w.bob.serve(echo)
        stream = await w.alice.connect(w.bob.peer_id, addresses=w.bob.addresses)
        await talk(stream)
        (old,) = w.lines(w.alice)
        await trio.sleep(HOURS - 440)
        assert len(w.told.of(CircuitRenewed)) == 1
        with pytest.raises(Refused, match="there is a Kaspa stream"):
            await w.alice.connect(w.bob.peer_id)
        await talk(stream)
        await stream.aclose()
        again = await w.alice.connect(w.bob.peer_id)
        await talk(again)
        limits = again.metadata.limits
        assert limits is not None
        assert limits.lasts > HOURS / 2
        await trio.sleep(400)
        assert old not in w.lines(w.alice)
        await talk(again)


async def test_the_next_one_is_kept_though_nobody_uses_it_yet(autojump_clock: MockClock) -> None:
    """At both ends: a minute without streams would close it, and the old one lasts for ten."""
    async with world() as w:
        stream = await w.call()
        await trio.sleep(HOURS - 400)
        for node in (w.alice, w.bob):
            assert len(w.lines(node)) == 2
        following = w.lines(w.alice)[1]
        with pytest.raises(CircuitEnded):
            await stream.receive_some()
        await trio.sleep(1)
        for node in (w.alice, w.bob):
            assert len(w.lines(node)) == 1
        stream = await w.call()
        assert w.lines(w.alice) == [following]
        opened = [event for event in w.told.of(ConnectionOpened) if event.peer == w.bob.peer_id]
        assert len(opened) == 2, "no third one was needed"
        await stream.aclose()
        await trio.sleep(200)
        assert not w.lines(w.alice), "nobody uses it any more"


async def test_a_peer_that_closes_what_nobody_uses_is_reachable_without_a_gap_all_the_same(
    autojump_clock: MockClock,
) -> None:
    """As kaspad's own overlay: after ten seconds."""
    async with world() as w:

        async def close_idle() -> None:
            while True:
                await trio.sleep(1)
                for each in w.bob.swarm.connections_to(w.alice.peer_id):
                    if not each.connection.streams and trio.current_time() - each.connection.opened_at > 10:
                        await each.close("idle")

        stream = await w.call()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_idle)
            with pytest.raises(CircuitEnded):
                await stream.receive_some()
            await trio.sleep(0.5)
            assert len(w.lines(w.alice)) == 1
            await w.call()
            nursery.cancel_scope.cancel()
        assert len(w.told.of(CircuitRenewed)) == 3
        assert w.circuits() == 4


async def test_the_old_one_is_closed_when_its_streams_are(autojump_clock: MockClock) -> None:
    async with world() as w:
        stream = await w.call()
        (old,) = w.lines(w.alice)
        await trio.sleep(HOURS - 440)
        again = await w.call()
        await stream.aclose()
        await trio.sleep(100)
        closed = {event.connection: event.reason for event in w.told.of(ConnectionClosed)}
        assert closed[old] in ("it was idle for 60 s", "the peer closed it")
        await talk(again)


async def test_a_day_of_circuits(autojump_clock: MockClock) -> None:
    """Somebody who comes back each time that its stream ends is never without a connection."""
    async with world() as w:
        gaps = 0

        async def watch() -> None:
            nonlocal gaps
            while True:
                gaps += w.alice.swarm.connection_to(w.bob.peer_id) is None
                await trio.sleep(10)

        await w.call()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            with trio.move_on_after(86_400):
                while True:
                    stream = await w.call()
                    with pytest.raises(CircuitEnded):
                        await stream.receive_some()
            nursery.cancel_scope.cancel()
        assert gaps == 0
        assert 12 <= len(w.told.of(CircuitRenewed)) <= 14
        assert not w.told.of(CircuitNotRenewed)
        assert w.circuits() == len(w.told.of(CircuitRenewed)) + 1
        assert len(w.lines(w.alice)) <= 2


async def test_bytes_that_are_nearly_used_up(autojump_clock: MockClock) -> None:
    async with world(max_circuit_bytes=40_000_000, max_circuit_seconds=0) as w:
        stream = await w.call()
        while not w.told.of(CircuitRenewed):
            await talk(stream, 100_000)
            await trio.sleep(3)
        (event,) = w.told.of(CircuitRenewed)
        assert event.reason.endswith("of 40.0 MB are left")
        limits = (await w.call()).metadata.limits
        assert limits is not None
        assert limits.bytes_left is not None
        assert limits.bytes_left > 39_000_000


async def test_bytes_that_are_used_up_in_no_time_are_not_asked_for_again(autojump_clock: MockClock) -> None:
    async with world(max_circuit_bytes=40_000_000, max_circuit_seconds=0) as w:
        stream = await w.call()

        async def pour() -> None:
            while True:
                await talk(stream, 100_000)
                await trio.sleep(0.5)

        with pytest.raises(CircuitEnded):
            await pour()
        assert not w.told.of(CircuitRenewed)
        assert w.circuits() == 1


async def test_circuits_like_the_reference_s_are_left_alone(autojump_clock: MockClock) -> None:
    async with world(max_circuit_seconds=120.0) as w:
        for number in range(3):
            stream = await w.call()
            with pytest.raises(CircuitEnded):
                await stream.receive_some()
            assert w.circuits() == number + 1


async def test_one_that_carries_nothing_is_left_alone(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.alice.swarm.keeps.append(lambda _: True)
        w.bob.swarm.keeps.append(lambda _: True)
        await (await w.call()).aclose()
        await trio.sleep(HOURS - 5)
        assert len(w.lines(w.alice)) == 1
        await trio.sleep(10)
        assert w.circuits() == 1


async def test_another_relay_does_as_well(autojump_clock: MockClock) -> None:
    """The first one has become private: it carries what it carries, and takes nothing new."""
    async with world(2) as w:
        stream = await w.call()
        (used,) = [each for each in w.relays if each.peer_id == stream.metadata.path.relay]
        (other,) = [each for each in w.relays if each is not used]
        await trio.sleep(1000)
        used._take_role(Role.PRIVATE)
        await trio.sleep(HOURS - 1200)
        (event,) = w.told.of(CircuitRenewed)
        assert (event.relay, event.path.relay) == (used.peer_id, other.peer_id)
        await talk(stream)


async def test_a_relay_that_refuses_is_asked_once_a_minute(autojump_clock: MockClock) -> None:
    async with world(max_circuits=1) as w:
        stream = await w.call()
        with pytest.raises(CircuitEnded):
            await stream.receive_some()
        failed = w.told.of(CircuitNotRenewed)
        assert 5 <= len(failed) <= 600 // PAUSE
        assert all("RESOURCE_LIMIT_EXCEEDED" in event.reason for event in failed)
        served = [event.status for event in w.told_relays[0].of(RelayRequestServed) if event.request == "connect"]
        assert len(served) == len(failed) + 1
        await w.call()  # as ever


async def test_the_shortest_that_is_renewed(autojump_clock: MockClock) -> None:
    async with world(max_circuit_seconds=300.0 + LEAST_TIME + 10) as w:
        w.alice._renewal._machine._spread = lambda: 0.0
        await w.call()
        await trio.sleep(350)
        assert len(w.told.of(CircuitRenewed)) == 1


async def test_a_destination_that_has_no_room_for_more_callers_has_room_for_the_next_one(
    autojump_clock: MockClock,
) -> None:
    async with world(max_circuits_per_peer=1) as w:
        await w.call()
        await trio.sleep(HOURS - 100)
        assert len(w.told.of(CircuitRenewed)) == 1
