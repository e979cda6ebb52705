"""Punching in the swarm: one connection comes of it, whoever dialed and accepted, and nobody else is harmed."""

from __future__ import annotations

import itertools
import os
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p.config import Config, Limits, PunchConfig
from kas_libp2p.errors import (
    AddressError,
    ConnectionLost,
    LocalProtocolError,
    PunchFailed,
    Refused,
    Stage,
    UpgradeError,
)
from kas_libp2p.events import (
    AddressFailed,
    ConnectionOpened,
    DialFailed,
    Dialing,
    PunchAdopted,
    PunchDialed,
    PunchTargetRefused,
    UpgradeFailed,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Direction, Path, PathKind
from kas_libp2p.swarm import Swarm, SwarmConnection
from kas_libp2p.transport import _punch
from kas_libp2p.transport._punch import (
    AT_ONCE,
    DEADLOCK,
    LOOK_AGAIN,
    SHARE,
    SILENCE,
    UNTRUSTED_DIALS,
    UNTRUSTED_PATIENCE,
    WINDOW,
    Target,
)
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw, memory_pair
from tests.network import MemoryHost, MemoryInternet, RecordingBus, eventually, make_swarm, running

DELAY = 0.025
ROUND_TRIP = 2 * DELAY
ALICE_AT, BOB_AT, CAROL_AT = (f"/ip4/11.0.0.{n}/tcp/4001" for n in (1, 2, 3))
BOB_AT_6 = "/ip6/2d00::2/tcp/4001"
RELAY = Identity.from_seed(bytes([9]) * 32).peer_id
PUNCHED = Path(PathKind.PUNCHED, RELAY)
RELAYED = Path(PathKind.RELAYED, RELAY)


class Hole(MemoryHost):
    """A host whose dials from the listen port come to what a test says, one after the other: an error after a round
    trip, an end of a pipe after as long, or nothing ever (``None``)."""

    def __init__(self, internet: MemoryInternet, ip: str) -> None:
        super().__init__(internet, ip)
        self.outcomes: dict[str, deque[OSError | AddressError | MemoryRaw | None]] = {}
        self.punched: list[tuple[float, str]] = []

    async def dial_punch(self, address: Multiaddr) -> MemoryRaw:
        self.punched.append((trio.current_time(), str(address)))
        queue = self.outcomes.get(str(address))
        outcome = queue.popleft() if queue else None
        match outcome:
            case AddressError():
                raise outcome
            case OSError():
                await trio.sleep(0 if outcome.errno == 99 else ROUND_TRIP)
                raise outcome
            case None:
                await trio.sleep_forever()
            case _:
                await trio.sleep(ROUND_TRIP)
                return outcome
        raise AssertionError

    def then(self, address: str, *outcomes: OSError | AddressError | MemoryRaw | None) -> None:
        self.outcomes.setdefault(address, deque()).extend(outcomes)

    def accepts(self, raw: MemoryRaw) -> None:
        (listener,) = (each for each in self.internet.listeners.values() if each._host is self)
        listener._send.send_nowait(raw)


REFUSED = ConnectionRefusedError(111, "Connection refused")
TAKEN = OSError(99, "Cannot assign requested address")


def ends(ours: str, theirs: str) -> tuple[MemoryRaw, MemoryRaw]:
    """A TCP connection between two addresses."""
    here, there = memory_pair(delay=DELAY)
    here.local_address, here.remote_address = ours, theirs
    there.local_address, there.remote_address = theirs, ours
    return here, there


@dataclass
class Side:
    swarm: Swarm
    told: RecordingBus
    host: Hole

    def in_use(self) -> dict[str, int]:
        return {name: count for name, count in self.swarm.admission.in_use().items() if count}

    def dials(self) -> list[tuple[str, str]]:
        return [(each.address, each.reason) for each in self.told.of(PunchDialed)]


@dataclass
class World:
    internet: MemoryInternet
    alice: Side
    bob: Side
    results: dict[str, SwarmConnection | Exception] = field(default_factory=dict)

    async def punch(
        self, *, alice: bool = True, bob: bool = True, first: bool = True, wait: float = 0.1, late: float = 0.0
    ) -> None:
        """Both at once; ``first``: whether Alice is the initiator; ``late``: seconds by which Bob is."""
        at = trio.current_time() + wait

        async def one(name: str, side: Side, other: Side, to: list[str], initiator: bool, at: float) -> None:
            try:
                self.results[name] = await side.swarm.punch(
                    other.swarm.peer, [Target(Multiaddr(each)) for each in to], initiator=initiator, relay=RELAY, at=at
                )
            except (PunchFailed, Refused, ConnectionLost) as error:
                self.results[name] = error

        async with trio.open_nursery() as nursery:
            if alice:
                nursery.start_soon(one, "alice", self.alice, self.bob, [BOB_AT], first, at)
            if bob:
                nursery.start_soon(one, "bob", self.bob, self.alice, [ALICE_AT], not first, at + late)

    def both(self) -> tuple[SwarmConnection, SwarmConnection]:
        alice, bob = self.results["alice"], self.results["bob"]
        assert isinstance(alice, SwarmConnection), alice
        assert isinstance(bob, SwarmConnection), bob
        assert alice.path == bob.path == PUNCHED
        assert (alice.peer, bob.peer) == (self.bob.swarm.peer, self.alice.swarm.peer)
        assert self.alice.in_use()["max_connections"] == self.bob.in_use()["max_connections"] == 1
        for side in (self.alice, self.bob):
            assert not [*side.told.of(AddressFailed), *side.told.of(DialFailed), *side.told.of(Dialing)]
        return alice, bob


def make_side(internet: MemoryInternet, ip: str, seed: int, config: Config | None = None) -> Side:
    host = Hole(internet, ip)
    swarm, told = make_swarm(host, seed, config)
    return Side(swarm, told, host)


@asynccontextmanager
async def world(config: Config | None = None) -> AsyncIterator[World]:
    internet = MemoryInternet(delay=DELAY)
    alice, bob = make_side(internet, "11.0.0.1", 1, config), make_side(internet, "11.0.0.2", 2, config)
    async with running(alice.swarm, ALICE_AT), running(bob.swarm, BOB_AT):
        yield World(internet, alice, bob)
    for side in (alice, bob):
        assert not side.in_use()


class TestOneConnection:
    @pytest.mark.parametrize("first", [True, False])
    async def test_crossed(self, autojump_clock: MockClock, first: bool) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, here)
            this.bob.host.then(ALICE_AT, there)
            start = trio.current_time() + 0.1
            await this.punch(first=first)
            alice, bob = this.both()
            assert (alice.is_initiator, bob.is_initiator) == (first, not first)
            assert trio.current_time() == pytest.approx(start + ROUND_TRIP + AT_ONCE + 3 * DELAY)
            assert this.alice.host.punched == [(start, BOB_AT)]
            assert this.alice.dials() == [(BOB_AT, "connected")]
            (opened,) = this.alice.told.of(ConnectionOpened)
            assert opened.direction is (Direction.OUTBOUND if first else Direction.INBOUND)
            assert opened.seconds == pytest.approx(ROUND_TRIP + AT_ONCE + (2 if first else 3) * DELAY)

    async def test_accepted_by_the_responder(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, here)
            this.bob.host.accepts(there)
            this.bob.host.then(ALICE_AT, TAKEN)
            await this.punch(late=0.03)
            alice, bob = this.both()
            assert alice.is_initiator
            assert not bob.is_initiator
            (adopted,) = this.bob.told.of(PunchAdopted)
            assert (adopted.address, adopted.foreseen) == (ALICE_AT, True)
            assert this.bob.in_use() == {"max_connections": 1, "max_inbound": 1, "max_per_peer": 1, "max_per_ip": 1}

    @pytest.mark.parametrize(("seen", "foreseen"), [(BOB_AT, True), ("/ip4/11.0.0.2/tcp/40404", False)])
    async def test_accepted_by_the_initiator(self, autojump_clock: MockClock, seen: str, foreseen: bool) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, seen)
            there.local_address = BOB_AT
            start = trio.current_time() + 0.1
            this.bob.host.then(ALICE_AT, there)

            async def arrive() -> None:
                await trio.sleep(0.1 + 3 * DELAY)
                this.alice.host.accepts(here)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(arrive)
                await this.punch()
            alice, bob = this.both()
            assert alice.is_initiator
            assert not bob.is_initiator
            (adopted,) = this.alice.told.of(PunchAdopted)
            assert adopted.foreseen is foreseen
            assert adopted.after == pytest.approx(3 * DELAY)
            assert adopted.seconds == pytest.approx(SILENCE + ROUND_TRIP)
            assert trio.current_time() == pytest.approx(start + 3 * DELAY + SILENCE + 3 * DELAY)
            assert this.alice.dials() == [(BOB_AT, "unanswered")]

    async def test_refused_and_dialed_again(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, REFUSED, REFUSED, here)
            this.bob.host.then(ALICE_AT, REFUSED, there)
            await this.punch()
            this.both()
            assert this.alice.dials() == [(BOB_AT, "ECONNREFUSED")] * 2 + [(BOB_AT, "connected")]
            times = [at for at, _ in this.alice.host.punched]
            for earlier, later in itertools.pairwise(times):
                assert 0 < later - earlier - ROUND_TRIP <= SHARE * ROUND_TRIP + 1e-9

    async def test_taken_for_nothing_and_dialed_once_it_is_free(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, TAKEN, TAKEN, TAKEN, here)
            this.bob.host.then(ALICE_AT, there)
            start = trio.current_time() + 0.1
            await this.punch()
            this.both()
            assert this.alice.dials() == [(BOB_AT, "EADDRNOTAVAIL"), (BOB_AT, "connected")], "told once"
            assert [at - start for at, _ in this.alice.host.punched] == pytest.approx(
                [0, LOOK_AGAIN, 2 * LOOK_AGAIN, 3 * LOOK_AGAIN]
            )

    async def test_what_failed_in_its_handshake_is_made_again(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            broken, _ = ends(ALICE_AT, BOB_AT)
            here, there = ends(ALICE_AT, BOB_AT)
            broken._in.break_()
            this.alice.host.then(BOB_AT, broken, here)
            this.bob.host.then(ALICE_AT, there)
            await this.punch()
            this.both()
            assert this.alice.dials() == [(BOB_AT, "connected")] * 2

    async def test_the_first_of_two_and_the_circuit_stays(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            one, other = memory_pair(delay=DELAY)
            async with trio.open_nursery() as nursery:

                async def circuit(side: Side, raw: MemoryRaw, other: Side, initiator: bool) -> None:
                    raw.remote_address = f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit"
                    await side.swarm.upgrade_raw(raw, peer=other.swarm.peer, initiator=initiator, path=RELAYED)

                nursery.start_soon(circuit, this.alice, one, this.bob, True)
                nursery.start_soon(circuit, this.bob, other, this.alice, False)
            alice_at_6 = "/ip6/2d00::1/tcp/4001"
            four, six = ends(ALICE_AT, BOB_AT), ends(alice_at_6, BOB_AT_6)
            this.alice.host.then(BOB_AT, four[0])
            this.alice.host.then(BOB_AT_6, six[0])
            this.bob.host.then(ALICE_AT, four[1])
            this.bob.host.accepts(six[1])
            at = trio.current_time()
            found: list[SwarmConnection] = []

            async def one_side(side: Side, other: Side, to: list[str], initiator: bool) -> None:
                targets = [Target(Multiaddr(each)) for each in to]
                found.append(await side.swarm.punch(other.swarm.peer, targets, initiator=initiator, relay=RELAY, at=at))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one_side, this.alice, this.bob, [BOB_AT, BOB_AT_6], True)
                nursery.start_soon(one_side, this.bob, this.alice, [ALICE_AT, alice_at_6], False)
            await trio.sleep(1)
            alice, bob = found
            assert alice.connection.remote_address.replace("::2", "::1").replace("0.2", "0.1") == (
                bob.connection.remote_address
            )
            for side, other in ((this.alice, this.bob), (this.bob, this.alice)):
                paths = [each.path for each in side.swarm.connections_to(other.swarm.peer) if not each.is_closed]
                assert paths == [RELAYED, PUNCHED]
                assert side.in_use()["max_per_peer"] == 2

    async def test_the_second_that_an_initiator_of_other_make_completes_is_closed(
        self, autojump_clock: MockClock
    ) -> None:
        async with world() as this:
            pipes = [ends(ALICE_AT, f"/ip4/11.0.0.2/tcp/{port}") for port in (5001, 5002)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: this.punch(bob=False, first=False))
                await trio.sleep(0.2)
                for here, there in pipes:
                    this.alice.host.accepts(here)
                    nursery.start_soon(
                        lambda raw=there: this.bob.swarm.upgrade_raw(raw, peer=this.alice.swarm.peer, initiator=True)
                    )
            await trio.sleep(0.1)
            (left,) = this.alice.swarm.connections_to(this.bob.swarm.peer)
            assert left is this.results["alice"]
            assert sorted(here.closed for here, _ in pipes) == ["", "aborted"]

    @pytest.mark.parametrize("busy", [False, True])
    async def test_a_direct_one_that_is_dead_makes_room_and_the_circuit_never(
        self, autojump_clock: MockClock, busy: bool
    ) -> None:
        async with world(Config(limits=Limits(max_per_peer=2))) as this:
            circuit, dead, hole = (ends(ALICE_AT, BOB_AT) for _ in range(3))
            for raw in circuit:
                raw.remote_address = f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit"
            for (here, there), path in ((circuit, RELAYED), (dead, DIRECT)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        lambda raw=here, path=path: this.alice.swarm.upgrade_raw(
                            raw, peer=this.bob.swarm.peer, initiator=True, path=path
                        )
                    )
                    nursery.start_soon(
                        lambda raw=there, path=path: this.bob.swarm.upgrade_raw(
                            raw, peer=this.alice.swarm.peer, initiator=False, path=path
                        )
                    )
            relayed, direct = this.alice.swarm.connections_to(this.bob.swarm.peer)
            if busy:
                this.bob.swarm.handle("/anything/1", stay)
                stream = await direct.open_stream("/anything/1")
                await stream.send_all(b"x")
                await trio.sleep(0.1)
            this.alice.host.then(BOB_AT, hole[0])
            this.bob.host.then(ALICE_AT, hole[1])
            await this.punch()
            assert not relayed.is_closed
            assert direct.is_closed is not busy
            assert isinstance(this.results["alice"], Refused if busy else SwarmConnection)

    async def test_there_is_room_beside_two_circuits_in_use(self, autojump_clock: MockClock) -> None:
        """Each side made one, or the second follows the first, which is about to end."""
        async with world() as this:
            this.bob.swarm.handle("/anything/1", stay)
            for _ in range(2):
                here, there = ends(ALICE_AT, BOB_AT)
                here.remote_address = there.remote_address = f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit"
                async with trio.open_nursery() as nursery:
                    for raw, side, other, first in (
                        (here, this.alice, this.bob, True),
                        (there, this.bob, this.alice, False),
                    ):
                        nursery.start_soon(
                            partial(side.swarm.upgrade_raw, raw, peer=other.swarm.peer, initiator=first, path=RELAYED)
                        )
            circuits = this.alice.swarm.connections_to(this.bob.swarm.peer)
            for each in circuits:
                await (await each.open_stream("/anything/1")).send_all(b"x")
            await trio.sleep(0.1)
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, here)
            this.bob.host.then(ALICE_AT, there)
            await this.punch()
            assert isinstance(this.results["alice"], SwarmConnection), this.results
            assert isinstance(this.results["bob"], SwarmConnection), this.results
            assert not any(each.is_closed for each in circuits)
            assert this.alice.in_use()["max_per_peer"] == this.bob.in_use()["max_per_peer"] == 3

    async def test_any_connection_without_a_relay_will_do(self, autojump_clock: MockClock) -> None:
        async with world() as this, trio.open_nursery() as nursery:
            nursery.start_soon(this.punch)
            await trio.sleep(0.2)
            direct = await this.alice.swarm.dial(this.bob.swarm.peer, ["/ip4/11.0.0.2/tcp/4001"])
            await trio.sleep(1)
            assert this.results["alice"] is direct
            assert direct.path == DIRECT
            there = this.results["bob"]
            assert isinstance(there, SwarmConnection)
            assert there.connection.remote_address == direct.connection.local_address
            assert this.alice.in_use()["max_connections"] == this.bob.in_use()["max_connections"] == 1

    async def test_whom_we_spoke_to_beside_is_left(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            other, _ = ends(ALICE_AT, "/ip4/11.0.0.2/tcp/40404")
            this.alice.host.then(BOB_AT, here)
            this.bob.host.then(ALICE_AT, there)

            async def arrive() -> None:
                await trio.sleep(0.1)
                this.alice.host.accepts(other)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(arrive)
                await this.punch()
            this.both()
            assert [sum(raw.writes) > 0 for raw in (here, other)] == [True, True]
            assert other.closed == "aborted"
            assert not this.alice.told.of(UpgradeFailed)
            assert this.alice.in_use()["max_connections"] == 1


class TestPlaces:
    @pytest.mark.parametrize("accepts", ["nobody", "alice", "bob"])
    async def test_cancelled_at_any_moment_it_holds_none(self, autojump_clock: MockClock, accepts: str) -> None:
        found = set()
        for step in range(60):
            async with world() as this, trio.open_nursery() as nursery:
                here, there = ends(ALICE_AT, BOB_AT)
                if accepts != "alice":
                    this.alice.host.then(BOB_AT, here)
                if accepts != "bob":
                    this.bob.host.then(ALICE_AT, there)
                nursery.start_soon(partial(this.punch, alice=False))
                with trio.move_on_after(0.1 + 0.005 * step):
                    nursery.start_soon(partial(self.accept, this, accepts, here, there))
                    await this.punch(bob=False)
                await trio.sleep(12)
                for side in (this.alice, this.bob):
                    there_are = len(side.swarm.all_connections())
                    in_use = [side.in_use().get(name, 0) for name in ("max_connections", "max_per_peer")]
                    assert in_use == [there_are] * 2, step
                    assert not side.in_use().get("max_pending_inbound"), step
                found.add(there_are)
        assert found == {0, 1}

    async def accept(self, this: World, who: str, here: MemoryRaw, there: MemoryRaw) -> None:
        await trio.sleep(0.1 + ROUND_TRIP)
        if who == "alice":
            this.alice.host.accepts(here)
        elif who == "bob":
            this.bob.host.accepts(there)


class TestRoles:
    async def test_who_waits_in_vain_to_be_spoken_to_begins(self, autojump_clock: MockClock) -> None:
        """As rust-libp2p, Alice takes what she accepts for an ordinary connection, whatever was agreed."""
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.bob.host.then(ALICE_AT, there)
            this.alice.host.accepts(here)
            started = trio.current_time()
            await this.punch(alice=False, wait=0)
            bob = this.results["bob"]
            assert isinstance(bob, SwarmConnection)
            assert (bob.path, bob.is_initiator) == (PUNCHED, True)
            assert trio.current_time() == pytest.approx(started + ROUND_TRIP + DEADLOCK + ROUND_TRIP)

    async def test_the_initiator_answers_whom_it_hears_first(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, here)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: this.bob.swarm.upgrade_raw(there, peer=this.alice.swarm.peer, initiator=True, path=PUNCHED)
                )
                await this.punch(bob=False)
            alice = this.results["alice"]
            assert isinstance(alice, SwarmConnection)
            assert (alice.path, alice.is_initiator) == (PUNCHED, False)


class TestNeighbours:
    """Carol lives behind the same NAT as Bob."""

    @pytest.mark.parametrize("first", [True, False])
    async def test_one_who_dials_us_meanwhile_gets_in(self, autojump_clock: MockClock, first: bool) -> None:
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm), trio.open_nursery() as nursery:
                nursery.start_soon(lambda: this.punch(first=first))
                await trio.sleep(0.2)
                connection = await carol.swarm.dial(this.alice.swarm.peer, [ALICE_AT])
                await trio.sleep(0.1)
                (there,) = this.alice.swarm.connections_to(carol.swarm.peer)
                assert connection.path == there.path == DIRECT
                assert not there.is_initiator
                await trio.sleep(0.2)
                assert not this.results, "the punch goes on"
                here, other = ends(ALICE_AT, BOB_AT)
                this.bob.host.accepts(other)
                await this.alice.swarm.upgrade_raw(here, peer=this.bob.swarm.peer, initiator=True, path=PUNCHED)
                await trio.sleep(1)
                assert len(this.results) == 2
                assert not there.is_closed

    async def test_two_behind_one_nat_are_met_at_once(self, autojump_clock: MockClock) -> None:
        """What comes from where Carol was said to be is hers, however soon Bob is there."""
        carol_at = "/ip4/11.0.0.2/tcp/4002"
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            bobs, carols = ends(ALICE_AT, BOB_AT), ends(ALICE_AT, carol_at)
            bobs[0].remote_address, carols[0].remote_address = BOB_AT, carol_at
            async with running(carol.swarm), trio.open_nursery() as nursery:
                at = trio.current_time() + 0.1
                met: dict[str, SwarmConnection] = {}

                async def punch(name: str, other: Side, where: str) -> None:
                    targets = [Target(Multiaddr(where))]
                    met[name] = await this.alice.swarm.punch(
                        other.swarm.peer, targets, initiator=True, relay=RELAY, at=at
                    )

                async def answer(other: Side, raw: MemoryRaw) -> None:
                    await other.swarm.upgrade_raw(raw, peer=this.alice.swarm.peer, initiator=False, path=PUNCHED)

                nursery.start_soon(punch, "bob", this.bob, BOB_AT)
                nursery.start_soon(punch, "carol", carol, carol_at)
                await trio.sleep(0.2)
                this.alice.host.accepts(bobs[0])
                nursery.start_soon(answer, this.bob, bobs[1])
                await trio.sleep(DELAY)
                this.alice.host.accepts(carols[0])
                nursery.start_soon(answer, carol, carols[1])
                await trio.sleep(WINDOW)
                assert {name: each.peer for name, each in met.items()} == {
                    "bob": this.bob.swarm.peer,
                    "carol": carol.swarm.peer,
                }

    async def test_one_who_says_nothing_is_not_taken_for_the_peer(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm), trio.open_nursery() as nursery:
                nursery.start_soon(this.punch)
                await trio.sleep(0.2)
                here, there = ends(ALICE_AT, BOB_AT)
                this.alice.host.accepts(here)
                with pytest.raises(UpgradeError):
                    await carol.swarm.upgrade_raw(there, peer=None, initiator=False)
                assert not carol.swarm.all_connections()
                (failed,) = this.alice.told.of(UpgradeFailed)
                assert this.bob.swarm.peer in failed.reason
            assert isinstance(this.results["alice"], PunchFailed)

    async def test_one_who_listens_where_the_peer_was_said_to_be(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm), trio.open_nursery() as nursery:
                here, there = ends(ALICE_AT, BOB_AT)
                this.alice.host.then(BOB_AT, here)
                nursery.start_soon(lambda: this.punch(bob=False))
                await trio.sleep(0.1)
                with pytest.raises(UpgradeError):
                    await carol.swarm.upgrade_raw(there, peer=None, initiator=False)
            error = this.results["alice"]
            assert isinstance(error, PunchFailed)
            assert [(each.reason, each.dials) for each in error.outcomes] == [("other_peer", 1)]

    async def test_one_who_is_slow_to_speak_is_answered_once_the_punch_is_over(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm), trio.open_nursery() as nursery:
                nursery.start_soon(lambda: this.punch(bob=False))
                await trio.sleep(0.1 + WINDOW - SILENCE / 2)
                ours, hers = ends(ALICE_AT, "/ip4/11.0.0.2/tcp/40404")
                this.alice.host.accepts(ours)
                await trio.sleep(2 * SILENCE)
                assert isinstance(this.results["alice"], PunchFailed)
                connection = await carol.swarm.upgrade_raw(hers, peer=this.alice.swarm.peer, initiator=True)
                assert connection.path == DIRECT

    async def test_one_who_comes_from_where_the_peer_was_expected(self, autojump_clock: MockClock) -> None:
        """The NAT has given Bob's port to Carol for now. While she is taken for Bob he is not dialed."""
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm), trio.open_nursery() as nursery:
                here, there = ends(ALICE_AT, BOB_AT)
                this.alice.host.then(BOB_AT, REFUSED, here)
                this.bob.host.then(ALICE_AT, there)
                nursery.start_soon(this.punch)
                await trio.sleep(0.1 + ROUND_TRIP)
                ours, hers = ends(ALICE_AT, BOB_AT)
                this.alice.host.accepts(ours)
                await carol.swarm.upgrade_raw(hers, peer=this.alice.swarm.peer, initiator=True)
                assert len(this.alice.host.punched) == 1
            alice, bob = this.results["alice"], this.results["bob"]
            assert isinstance(alice, SwarmConnection)
            assert isinstance(bob, SwarmConnection)
            assert alice.peer == this.bob.swarm.peer
            assert len(this.alice.host.punched) == 2

    async def test_two_peers_behind_one_nat_are_told_apart(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            carol = make_side(this.internet, "11.0.0.2", 3)
            async with running(carol.swarm, "/ip4/11.0.0.2/tcp/4002"), trio.open_nursery() as nursery:
                nursery.start_soon(this.punch)
                found: list[SwarmConnection] = []
                at = trio.current_time() + 0.1

                async def other(side: Side, peer: Side, to: str, first: bool) -> None:
                    targets = [Target(Multiaddr(to))]
                    found.append(await side.swarm.punch(peer.swarm.peer, targets, initiator=first, relay=RELAY, at=at))

                nursery.start_soon(other, this.alice, carol, "/ip4/11.0.0.2/tcp/4002", True)
                nursery.start_soon(other, carol, this.alice, ALICE_AT, False)
                for number, host in enumerate((this.bob.host, carol.host)):
                    here, there = ends(ALICE_AT, f"/ip4/11.0.0.2/tcp/{5000 + number}")
                    host.then(ALICE_AT, there)
                    nursery.start_soon(arrive_later, this.alice.host, here)
            alice, bob = this.results["alice"], this.results["bob"]
            assert isinstance(alice, SwarmConnection)
            assert isinstance(bob, SwarmConnection)
            assert alice.peer == this.bob.swarm.peer
            assert {each.peer for each in found} == {this.alice.swarm.peer, carol.swarm.peer}
            assert all(each.path == PUNCHED for each in (alice, bob, *found))


async def stay(_: YamuxStream) -> None:
    await trio.sleep_forever()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def arrive_later(host: Hole, raw: MemoryRaw) -> None:
    await trio.sleep(0.1 + 3 * DELAY)
    host.accepts(raw)


class TestTheEnd:
    async def test_nothing_comes(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            started = trio.current_time()
            await this.punch()
            assert trio.current_time() == pytest.approx(started + 0.1 + WINDOW)
            for name, side in (("alice", this.alice), ("bob", this.bob)):
                error = this.results[name]
                assert isinstance(error, PunchFailed)
                assert error.seconds == pytest.approx(WINDOW)
                assert [each.reason for each in error.outcomes] == ["unanswered"]
                assert "dialed once, unanswered after 2.50 s" in str(error)
                assert [reason for _, reason in side.dials()] == ["unanswered"]
            await this.punch()  # and it may be tried again

    @pytest.mark.parametrize("accepted", [False, True])
    async def test_the_responder_does_not_end_a_handshake_that_has_begun(
        self, autojump_clock: MockClock, accepted: bool
    ) -> None:
        """The other side has the connection as soon as it is answered."""
        async with world() as this, trio.open_nursery() as nursery:
            here, there = ends(ALICE_AT, BOB_AT)
            if accepted:
                this.bob.host.accepts(there)
            else:
                this.bob.host.then(ALICE_AT, there)
            window = 0.5

            async def bob() -> None:
                targets = [Target(Multiaddr(ALICE_AT))]
                this.results["bob"] = await this.bob.swarm.punch(
                    this.alice.swarm.peer, targets, initiator=False, relay=RELAY, at=0, window=window
                )

            nursery.start_soon(bob)
            await trio.sleep(window - 1.5 * DELAY)
            this.results["alice"] = await this.alice.swarm.upgrade_raw(
                here, peer=this.bob.swarm.peer, initiator=True, path=PUNCHED
            )
            assert trio.current_time() > window
            await trio.sleep(2 * DELAY)
            this.both()

    async def test_whom_nobody_speaks_to_ends_with_the_window(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            _, there = ends(ALICE_AT, BOB_AT)
            this.bob.host.then(ALICE_AT, there)
            with pytest.raises(PunchFailed) as caught:
                await this.bob.swarm.punch(
                    this.alice.swarm.peer,
                    [Target(Multiaddr(ALICE_AT))],
                    initiator=False,
                    relay=RELAY,
                    at=0,
                    window=0.5,
                )
            assert caught.value.seconds == pytest.approx(0.5)
            assert there.closed == "aborted"

    async def test_refused_until_the_end(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            this.alice.host.then(BOB_AT, *[REFUSED] * 100)
            await this.punch(bob=False)
            error = this.results["alice"]
            assert isinstance(error, PunchFailed)
            assert error.seconds == pytest.approx(WINDOW), "the peer may still come in"

    async def test_at_once_if_nothing_can_be_sent(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            this.alice.host.then(BOB_AT, AddressError("no route"))
            started = trio.current_time()
            await this.punch(bob=False, wait=0)
            error = this.results["alice"]
            assert isinstance(error, PunchFailed)
            assert trio.current_time() == started
            assert [each.reason for each in error.outcomes] == ["impossible"]

    async def test_an_instant_that_has_passed_is_now(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, there = ends(ALICE_AT, BOB_AT)
            this.alice.host.then(BOB_AT, here)
            this.bob.host.then(ALICE_AT, there)
            await trio.sleep(10)
            await this.punch(wait=-10)
            this.both()

    async def test_cancelled_everything_is_closed(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            here, _ = ends(ALICE_AT, BOB_AT)
            accepted, _ = ends(ALICE_AT, "/ip4/11.0.0.2/tcp/40404")
            this.alice.host.then(BOB_AT, here)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: this.punch(bob=False))
                await trio.sleep(0.2)
                this.alice.host.accepts(accepted)
                await trio.sleep(0.2)
                nursery.cancel_scope.cancel()
            await wait_all_tasks_blocked()
            assert here.closed == accepted.closed == "aborted"
            assert not this.alice.in_use()
            assert [reason for _, reason in this.alice.dials()] == ["connected"]

    async def test_one_punch_with_a_peer_at_a_time(self, autojump_clock: MockClock) -> None:
        async with world() as this, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: this.punch(bob=False))
            await wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError, match="already"):
                await this.alice.swarm.punch(this.bob.swarm.peer, [], initiator=True, relay=RELAY, at=0)
            await trio.sleep(0.5)
            assert this.alice.host.punched == [(0.1, BOB_AT)]

    async def test_not_with_a_peer_that_is_banned(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            this.alice.swarm.ban(this.bob.swarm.peer, 60)
            await this.punch(bob=False)
            assert isinstance(this.results["alice"], Refused)

    async def test_not_on_a_node_that_does_not_run(self, autojump_clock: MockClock) -> None:
        this = make_side(MemoryInternet(), "11.0.0.1", 1)
        with pytest.raises(ConnectionLost, match="not running"):
            await this.swarm.punch(RELAY, [], initiator=True, relay=RELAY, at=0)

    async def test_the_node_ends_in_the_middle(self, autojump_clock: MockClock) -> None:
        internet = MemoryInternet()
        side = make_side(internet, "11.0.0.1", 1)
        here, _ = ends(ALICE_AT, BOB_AT)
        side.host.then(BOB_AT, here)
        with trio.CancelScope() as scope:
            async with running(side.swarm, ALICE_AT), trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: side.swarm.punch(RELAY, [Target(Multiaddr(BOB_AT))], initiator=True, relay=RELAY, at=0)
                )
                await trio.sleep(1)
                scope.cancel()
        assert here.closed == "aborted"


class TestForbidden:
    async def test_nothing_is_sent_where_nobody_may_make_us_send(self, autojump_clock: MockClock) -> None:
        internet = MemoryInternet()
        side = make_side(internet, "11.0.0.1", 1)
        bad = ["/ip4/127.0.0.1/tcp/4001", "/ip4/192.168.1.1/tcp/4001", "/ip4/224.0.0.1/tcp/4001", ALICE_AT]
        bad += ["/ip4/240.0.0.1/tcp/4001", "/ip4/11.0.0.2/tcp/25", "/ip4/11.0.0.2/udp/4001", "/ip4/11.0.0.7/tcp/4001"]
        side.swarm.ban("11.0.0.7", 60)
        async with running(side.swarm, ALICE_AT):
            with pytest.raises(PunchFailed, match="loopback") as caught:
                await side.swarm.punch(
                    RELAY, [Target(Multiaddr(each)) for each in bad], initiator=True, relay=RELAY, at=0
                )
        assert caught.value.seconds == 0
        assert not side.host.punched
        why = ["loopback", "private", "multicast", "own", "reserved", "port", "not_tcp", "ban"]
        assert [each.reason for each in caught.value.outcomes] == why
        assert [each.reason for each in side.told.of(PunchTargetRefused)] == why
        assert side.told.counts["punch-target-refused", "loopback"] == 1

    async def test_private_ones_in_a_laboratory(self, autojump_clock: MockClock) -> None:
        config = Config(punch=PunchConfig(allow_private=True))
        side = make_side(MemoryInternet(), "11.0.0.1", 1, config)
        async with running(side.swarm, ALICE_AT):
            with pytest.raises(PunchFailed):
                await side.swarm.punch(
                    RELAY, [Target(Multiaddr("/ip4/10.0.0.1/tcp/4001"))], initiator=True, relay=RELAY, at=0
                )
        assert [address for _, address in side.host.punched] == ["/ip4/10.0.0.1/tcp/4001"]

    async def test_a_few_syns_where_only_the_peer_says_it_is(self, autojump_clock: MockClock) -> None:
        side = make_side(MemoryInternet(), "11.0.0.1", 1)
        victims = [f"/ip4/11.0.1.{number}/tcp/4001" for number in range(60)]
        for each in victims:
            side.host.then(each, *[REFUSED] * 10)
        async with running(side.swarm, ALICE_AT):
            with pytest.raises(PunchFailed):
                await side.swarm.punch(
                    RELAY,
                    [Target(Multiaddr(each), trusted=False) for each in victims],
                    initiator=True,
                    relay=RELAY,
                    at=0,
                )
        assert len(side.host.punched) == UNTRUSTED_DIALS

    async def test_an_untrusted_syn_is_given_up_before_it_is_sent_again(self, autojump_clock: MockClock) -> None:
        side = make_side(MemoryInternet(), "11.0.0.1", 1)
        async with running(side.swarm, ALICE_AT):
            with pytest.raises(PunchFailed):
                await side.swarm.punch(
                    RELAY, [Target(Multiaddr(CAROL_AT), trusted=False)], initiator=True, relay=RELAY, at=0
                )
        (dialed,) = side.told.of(PunchDialed)
        assert dialed.reason == "unanswered"
        assert dialed.seconds == pytest.approx(UNTRUSTED_PATIENCE)

    async def test_many_predicted_ports(self, autojump_clock: MockClock) -> None:
        async with world() as this:
            ports = [f"/ip4/11.0.0.2/tcp/{port}" for port in range(40000, 40064)]
            here, there = ends(ALICE_AT, ports[-1])
            this.alice.host.then(ports[-1], here)
            this.bob.host.then(ALICE_AT, there)
            at = trio.current_time() + 0.1

            async def alice() -> None:
                this.results["alice"] = await this.alice.swarm.punch(
                    this.bob.swarm.peer,
                    [Target(Multiaddr(each)) for each in ports],
                    initiator=True,
                    relay=RELAY,
                    at=at,
                )

            async with trio.open_nursery() as nursery:
                nursery.start_soon(alice)
                nursery.start_soon(lambda: this.punch(alice=False))
            this.both()
            assert {when for when, _ in this.alice.host.punched} == {at}
            assert len(this.alice.host.punched) == len(ports)


class TestTcp:
    """Over this machine's own TCP, in real time."""

    @pytest.fixture(autouse=True)
    def _loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_punch, "_forbidden", lambda *_: None)

    @pytest.mark.parametrize("late", [0.0, 0.02, -0.02])
    async def test_one_connection_whoever_is_first(self, late: float) -> None:
        alice, bob = (Swarm(Identity.from_seed(bytes([n]) * 32)) for n in (1, 2))
        async with running(alice, "/ip4/127.0.0.1/tcp/0"), running(bob, "/ip4/127.0.0.1/tcp/0"):
            for first in (True, False):
                found: list[SwarmConnection] = []
                at = trio.current_time() + 0.05

                async def one(ours: Swarm, theirs: Swarm, first: bool, at: float, into: list[SwarmConnection]) -> None:
                    targets = [Target(Multiaddr(each)) for each in theirs.listen_addresses()]
                    into.append(await ours.punch(theirs.peer, targets, initiator=first, relay=RELAY, at=at))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one, alice, bob, first, at, found)
                    nursery.start_soon(one, bob, alice, not first, at + late, found)
                a, b = sorted(found, key=lambda each: each.peer == alice.peer)
                assert a.path == b.path == PUNCHED
                assert (a.is_initiator, b.is_initiator) == (first, not first)
                assert a.connection.remote_address == bob.listen_addresses()[0]
                assert b.connection.remote_address == alice.listen_addresses()[0]
                a.connection.abort("for the next")
                await eventually(lambda: not alice.all_connections() and not bob.all_connections())

    async def test_no_socket_is_left(self) -> None:
        swarm = Swarm(Identity.from_seed(bytes([1]) * 32))
        with socket.socket() as deaf:  # once its queue is full the kernel drops further SYNs
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            with socket.create_connection(deaf.getsockname()):
                port = deaf.getsockname()[1]
                targets = [Target(Multiaddr(f"/ip4/127.0.0.1/tcp/{port + number}")) for number in range(-3, 3)]
                async with running(swarm, "/ip4/127.0.0.1/tcp/0"):
                    await wait_all_tasks_blocked()  # the watch of the interfaces has a socket, too
                    before = open_files()
                    with trio.move_on_after(0.1) as scope:
                        await swarm.punch(RELAY, targets, initiator=True, relay=RELAY, at=0)
                    assert scope.cancelled_caught
                    assert open_files() == before
                    with pytest.raises(PunchFailed) as caught:
                        await swarm.punch(RELAY, targets, initiator=False, relay=RELAY, at=0, window=0.1)
                    assert open_files() == before
                reasons = {each.reason for each in caught.value.outcomes}
                assert reasons <= {"unanswered", "ECONNREFUSED", "impossible"} | {str(each) for each in Stage}
                assert {"unanswered", "ECONNREFUSED"} <= reasons

    async def test_nothing_can_come_where_nothing_listens(self) -> None:
        swarm = Swarm(Identity.from_seed(bytes([1]) * 32))
        async with running(swarm):
            with pytest.raises(PunchFailed, match="impossible") as caught:
                await swarm.punch(RELAY, [Target(Multiaddr(BOB_AT))], initiator=True, relay=RELAY, at=0)
            assert caught.value.seconds < WINDOW / 2
