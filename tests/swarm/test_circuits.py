"""What the swarm offers to whoever makes circuits: a door for their addresses, streams that change hands, connections
that stay."""

from __future__ import annotations

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import MockClock

from kas_libp2p import addresses
from kas_libp2p.config import Config, Limits
from kas_libp2p.errors import AddressError, DialError, Refused, RelayRefused, Stage
from kas_libp2p.events import ConnectionClosed, HandlerFailed
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.swarm import Swarm
from kas_libp2p.swarm._admission import Admission
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import memory_pair
from tests.network import MemoryInternet, make_swarm, running

BOB_AT = "/ip4/11.0.0.2/tcp/1"
ECHO = "/echo/1"
RELAY = Identity.from_seed(bytes([9]) * 32).peer_id
RELAYED = Path(PathKind.RELAYED, RELAY)


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=0.01)


def through(peer: PeerId) -> str:
    return f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{peer}"


async def test_a_circuit_address_leads_through_the_door(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)
    bob, _ = make_swarm(internet.host("11.0.0.2"), 2)
    asked: list[str] = []

    async def door(address: Multiaddr) -> tuple[RawConnection, Path]:
        asked.append(str(address))
        here, there = memory_pair()
        here.remote_address = there.remote_address = f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit"
        nursery.start_soon(arrive, there)
        return here, RELAYED

    async def arrive(raw: RawConnection) -> None:
        await bob.upgrade_raw(raw, peer=alice.peer, initiator=False, path=RELAYED)

    async with running(alice), running(bob), trio.open_nursery() as nursery:
        alice.circuits = door
        connection = await alice.dial(bob.peer, [through(bob.peer).removesuffix(f"/p2p/{bob.peer}")])
        assert asked == [through(bob.peer)], "whom to reach is told, whoever left it out"
        assert (connection.path, connection.connection.initiator) == (RELAYED, True)
        await trio.sleep(0.1)
        (there,) = bob.connections_to(alice.peer)
        assert (there.path, there.connection.initiator) == (RELAYED, False)


async def test_why_a_circuit_was_not_made_is_kept(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)
    bob = Identity.from_seed(bytes([2]) * 32).peer_id

    async def door(_: Multiaddr) -> tuple[RawConnection, Path]:
        raise RelayRefused(RELAY, "NO_RESERVATION", "no")

    async with running(alice):
        with pytest.raises(DialError, match="this node dials no circuits"):
            await alice.dial(bob, [through(bob)])
        alice.circuits = door
        with pytest.raises(DialError) as caught:
            await alice.dial(bob, [through(bob)])
        (failure,) = caught.value.failures
        assert (failure.stage, failure.address) == (Stage.RELAY, through(bob))


async def test_a_direct_address_is_tried_before_a_circuit(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)
    bob, _ = make_swarm(internet.host("11.0.0.2"), 2)

    async def door(_: Multiaddr) -> tuple[RawConnection, Path]:
        raise AssertionError("nobody asked for it")

    async with running(alice), running(bob, BOB_AT):
        alice.circuits = door
        connection = await alice.dial(bob.peer, [through(bob.peer), BOB_AT])
        assert connection.path.kind is PathKind.DIRECT


async def test_a_stream_that_was_handed_over_stays_open(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    kept: list[YamuxStream] = []

    async def keep(stream: YamuxStream) -> None:
        kept.append(stream)
        if len(kept) == 4:
            raise RuntimeError("on purpose")

    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)
    bob, told = make_swarm(internet.host("11.0.0.2"), 2)
    bob.handle(ECHO, keep, max_per_peer=1, hands_over=True)
    async with running(alice), running(bob, BOB_AT):
        connection = await alice.dial(bob.peer, [BOB_AT])
        for _ in range(3):
            stream = await connection.open_stream(ECHO)
            await stream.send_all(b"x")
            await trio.sleep(1)
            await kept[-1].send_all(b"later")
            assert await stream.receive_some() == b"later"
        stream = await connection.open_stream(ECHO)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert len(told.of(HandlerFailed)) == 1


async def test_a_connection_that_somebody_keeps_is_not_idle(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    config = Config(limits=Limits(idle_timeout=10))
    alice, told = make_swarm(internet.host("11.0.0.1"), 1, config)
    bob, _ = make_swarm(internet.host("11.0.0.2"), 2)
    keep = True
    alice.keeps += (lambda _: False, lambda connection: keep and connection.peer == bob.peer)
    async with running(alice), running(bob, BOB_AT):
        await alice.dial(bob.peer, [BOB_AT])
        await trio.sleep(50)
        assert alice.connection_to(bob.peer) is not None
        keep = False
        await trio.sleep(13)
        assert [event.reason for event in told.of(ConnectionClosed)] == ["it was idle for 10 s"]


async def test_of_two_idle_connections_the_one_that_is_kept_stays(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1, Config(limits=Limits(max_per_peer=2)))
    bob, _ = make_swarm(internet.host("11.0.0.2"), 2)
    async with running(alice), running(bob, BOB_AT):
        first = await alice.dial(bob.peer, [BOB_AT])
        second = await alice.dial(bob.peer, [BOB_AT], fresh=True)
        alice.keeps.append(lambda connection: connection is first.connection)
        third = await alice.dial(bob.peer, [BOB_AT], fresh=True)
        assert [first.is_closed, second.is_closed, third.is_closed] == [False, True, False]


def test_a_peer_is_asked_about_before_it_comes() -> None:
    bob = Identity.from_seed(bytes([2]) * 32).peer_id
    for admission in (
        Admission(Limits(), deny=[bob]),
        Admission(Limits(), allow=[RELAY]),
        Admission(Limits(), allow=["10.0.0.0/8"]),
    ):
        with pytest.raises(Refused):
            admission.check_peer(bob, 0.0)
    admission = Admission(Limits(), allow=[bob])
    admission.check_peer(bob, 0.0)
    admission.ban(bob, 0.0, 10.0)
    with pytest.raises(Refused):
        admission.check_peer(bob, 5.0)
    admission.check_peer(bob, 15.0)
    admission.policy = lambda candidate: "no" if candidate.peer == bob else None
    with pytest.raises(Refused):
        admission.check_peer(bob, 15.0)
    assert admission.in_use()["max_connections"] == 0


async def test_a_circuit_to_nobody_is_no_address(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    alice: Swarm
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)

    async def door(_: Multiaddr) -> tuple[RawConnection, Path]:
        raise AssertionError("nobody asked for it")

    async with running(alice):
        alice.circuits = door
        for address in (f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY}/p2p-circuit", "/p2p-circuit"):
            with pytest.raises((DialError, AddressError)):
                await alice.dial(None, [addresses.parse(address)])
