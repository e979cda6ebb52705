"""Nodes with a session between them that lives on circuits of two minutes or 128 KiB."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, Node
from kas_libp2p.config import PunchConfig, Purpose, RelayConfig, RelayLimits, Role, SessionConfig
from kas_libp2p.events import (
    CircuitClosed,
    CircuitNotRenewed,
    CircuitOpened,
    RelayRequestServed,
    SessionEnded,
    SessionMoved,
    SessionOpened,
    SessionWaiting,
    SmallCircuits,
)
from kas_libp2p.metadata import CircuitLimits, OverlayStream, PeerId
from kas_libp2p.relay._renewal import Line
from kas_libp2p.relay._succession import Succession, Way
from kas_libp2p.relay.exchange import RELAYS
from tests.network import MemoryInternet, echo, eventually, talk
from tests.relay.scripted import Told, node_at

KIB = 1024
BLOCK = 512
"""Bytes that an empty block of simnet takes, both directions."""


class World:
    """Two private nodes that have places on the same relays, a Kaspa stream from alice to bob, and what each tells."""

    def __init__(self, relays: tuple[Node, ...], alice: Node, bob: Node) -> None:
        self.relays, self.alice, self.bob = relays, alice, bob
        self.told = Told(alice), Told(bob)
        self.told_relays = tuple(map(Told, relays))

    async def call(self) -> OverlayStream:
        stream = await self.alice.connect(self.bob.peer_id, addresses=self.bob.addresses)
        await talk(stream)
        return stream

    def asked(self) -> list[list[str]]:
        """Who asked for circuits, by relay."""
        return [
            [event.peer for event in told.of(RelayRequestServed) if event.request == "connect"]
            for told in self.told_relays
        ]

    def check(self) -> None:
        """It was without a path never, and nobody asked for too much."""
        for told in self.told:
            assert len(told.of(SessionOpened)) == 1
            assert not told.of(SessionWaiting)
            assert not told.of(SessionEnded)
            assert not told.of(CircuitNotRenewed)
            assert all(event.seconds_without == 0 for event in told.of(SessionMoved))
        for told in self.told_relays:
            assert all(event.status == "OK" for event in told.of(RelayRequestServed))


@asynccontextmanager
async def world(
    count: int = 1, *, consent: bool = True, foreign: bool = False, requests: int = 30
) -> AsyncIterator[World]:
    internet = MemoryInternet(delay=0.02)
    limits = replace(RelayLimits.reference(), requests_per_peer=requests, request_interval=3600.0)
    settings = RelayConfig(serve=True, purpose=Purpose.ANY, limits=limits)
    relays: list[Node] = []
    async with trio.open_nursery() as nursery:

        async def run(number: int, task_status: trio.TaskStatus[Node]) -> None:
            config = Config(listen=(f"/ip4/11.0.0.{number}/tcp/1",), role=Role.PUBLIC, relay=settings)
            async with node_at(internet, number, config) as node:
                if foreign:
                    node.swarm.unhandle(RELAYS)
                task_status.started(node)
                await trio.sleep_forever()

        for number in range(count):
            relays.append(await nursery.start(run, 11 + number))
        private = Config(
            listen=(),
            role=Role.PRIVATE,
            relay=RelayConfig(relays=tuple(each.addresses[0] for each in relays)),
            punch=PunchConfig(enabled=False),
            session=SessionConfig(small_circuits=consent),
        )
        async with node_at(internet, 2, private) as bob, node_at(internet, 3, private) as alice:
            await bob.serve(echo)
            await alice.serve(echo)
            await eventually(lambda: len(bob.addresses) == len(alice.addresses) == count)
            yield World(tuple(relays), alice, bob)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("foreign", [False, True])
async def test_an_idle_session_lives_on_one_relay(autojump_clock: MockClock, foreign: bool) -> None:
    async with world(consent=False, foreign=foreign) as w:
        stream = await w.call()
        for _ in range(15):
            await trio.sleep(120)
            await talk(stream)
        w.check()
        (asked,) = w.asked()
        assert 1800 / 120 <= len(asked) <= 1800 / 96 + 1
        ours, theirs = (asked.count(each.peer_id) for each in (w.alice, w.bob))
        assert abs(ours - theirs) <= 1, "they take turns"
        assert ours <= 1800 / 120 + 1
        for told in w.told:
            (event,) = told.of(SmallCircuits)
            assert (event.max_bytes, event.max_seconds) == (128 * KIB, 120)
            assert event.text.startswith("1 relay with 128 KiB / 2 min circuits carries 2.0 kB/s for ever")
            assert ("for the first" not in event.text) is foreign
        assert w.alice.ceiling(w.bob.peer_id).text == w.told[0].of(SmallCircuits)[0].text
        assert w.alice.shortage(w.bob.peer_id) == 0
        (line,) = [each for each in w.alice.why(w.bob.peer_id) if "small circuit" in each]
        assert line == f"  Its session goes from one small circuit to the next: {event.text}."


async def test_what_is_spent_is_closed_at_once(autojump_clock: MockClock) -> None:
    """A relay has room for four circuits of a peer."""
    async with world() as w:
        await w.call()
        await trio.sleep(600)
        (told,) = w.told_relays
        lived = [event.seconds for event in told.of(CircuitClosed)]
        assert len(lived) == 5
        assert all(100 <= each <= 110 for each in lived)
        assert len(told.of(CircuitOpened)) == 6


async def test_ten_empty_blocks_per_second(autojump_clock: MockClock) -> None:
    """Over three relays: no block waits for more than a moment, little of a circuit is lost, and all are used alike."""
    count = 10 * 240
    async with world(3) as w:
        stream = await w.call()

        async def mine() -> None:
            begun = trio.current_time()
            for number in range(count):
                await stream.send_all(bytes(BLOCK // 2))  # and as much back
                await trio.sleep_until(begun + number / 10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine)
            got, longest = 0, 0.0
            while got < count * (BLOCK // 2):
                before = trio.current_time()
                got += len(await stream.receive_some())
                longest = max(longest, trio.current_time() - before)
        w.check()
        assert longest < 0.4, "a tenth of a second, and a round trip of 160 ms"
        closed = [event for told in w.told_relays for event in told.of(CircuitClosed)]
        assert len(closed) >= 9
        assert all(0.93 * 128 * KIB < event.forth + event.back < 128 * KIB for event in closed)
        used = [len(each) for each in w.asked()]
        assert max(used) - min(used) <= 2


async def test_a_bulk_goes_from_circuit_to_circuit(autojump_clock: MockClock) -> None:
    """Each side keeps to its half of what is left, so no relay cuts one in the middle."""
    async with world(3) as w:
        stream = await w.call()
        began = trio.current_time()
        await talk(stream, 512 * KIB)
        w.check()
        closed = [event for told in w.told_relays for event in told.of(CircuitClosed)]
        assert len(closed) >= 6
        assert {event.reason for event in closed} == {"closed"}
        assert trio.current_time() - began < 30


async def test_a_session_that_is_short_of_circuits_says_so(autojump_clock: MockClock) -> None:
    """Without consent: what is written waits for the next circuit."""
    async with world(consent=False, foreign=True) as w:
        stream = await w.call()
        with trio.move_on_after(30) as enough:
            await talk(stream, 300 * KIB)
        assert enough.cancelled_caught
        assert 0 < min(w.alice.shortage(w.bob.peer_id), w.bob.shortage(w.alice.peer_id)) < 120
        assert w.alice.why(w.bob.peer_id)[-1].endswith("with session.small_circuits, if the relays' operators agree.")
        for told in w.told:
            assert not told.of(SessionWaiting)
        (asked,) = w.asked()
        assert sorted(asked) == sorted([w.alice.peer_id, w.bob.peer_id]), "one by each"


async def test_a_relay_that_has_no_more_is_believed(autojump_clock: MockClock) -> None:
    """It gives each of the two one circuit; who asked in vain does not ask again."""
    async with world(requests=1) as w:
        await w.call()
        await trio.sleep(215)
        (told,) = w.told_relays
        served = [(event.peer, event.status) for event in told.of(RelayRequestServed) if event.request == "connect"]
        assert served == [
            (w.alice.peer_id, "OK"),
            (w.bob.peer_id, "OK"),
            (w.alice.peer_id, "RESOURCE_LIMIT_EXCEEDED"),
            (w.bob.peer_id, "RESOURCE_LIMIT_EXCEEDED"),
        ]
        for told in w.told:
            (event,) = told.of(CircuitNotRenewed)
            assert "RESOURCE_LIMIT_EXCEEDED" in event.reason
        assert w.alice.shortage(w.bob.peer_id) > 60


def test_who_goes_by_a_fresh_circuit_lacks_none() -> None:
    peer, relay = PeerId("peer"), PeerId("relay")
    limits = CircuitLimits(128 * KIB, 120.0, 100_000, 120.0)
    ways = [Way(relay, foreign=True, limits=limits)]
    machine = Succession(small_circuits=False)
    machine.asked(relay, 1000.0)
    old = Line(1, peer, relay, True, 113.0, True, replace(limits, seconds_left=7.0), True)
    assert machine.due([old], 1010.0, lambda _: ways) == []
    assert machine.shortage(peer, 1010.0) > 60
    fresh = Line(2, peer, relay, False, 1.0, True, replace(limits, seconds_left=119.0), True)
    assert machine.due([fresh], 1015.0, lambda _: ways) == []
    assert machine.shortage(peer, 1015.0) == 0
