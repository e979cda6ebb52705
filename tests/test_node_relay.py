"""Three nodes and more: who can't be dialed is reached through a relay of ours, as anybody else would be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, DialError, Node, OutboundConnector, open_node, serve_with_incoming
from kas_libp2p.config import KIB, Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.errors import ConnectionLost, RelayRefused, Stage
from kas_libp2p.events import CircuitClosed, PeerMisbehaved, RelayRequestServed, ReservationFailed, ReservationLost
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Dialect, Direction, OverlayStream, Path, PathKind
from kas_libp2p.relay.client import HOP
from kas_libp2p.units import short
from tests.network import MemoryInternet, eventually
from tests.relay.scripted import Told, node_at

DELAY = 0.02
RTT = 2 * DELAY
ECHO = "/echo/1"
OPEN = RelayLimits()


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


def public(number: int, limits: RelayLimits = OPEN, purpose: Purpose = Purpose.ANY) -> Config:
    """The settings of a relay."""
    relay = RelayConfig(serve=True, purpose=purpose, limits=limits)
    return Config(listen=(f"/ip4/11.0.0.{number}/tcp/1",), role=Role.PUBLIC, relay=relay)


def private(*relays: Node) -> Config:
    """The settings of a node that can't be dialed."""
    return Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=tuple(each.addresses[0] for each in relays)))


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=DELAY)


@asynccontextmanager
async def three(
    internet: MemoryInternet, limits: RelayLimits = OPEN, purpose: Purpose = Purpose.ANY
) -> AsyncIterator[tuple[Node, Node, Node]]:
    """A relay, alice, and bob, who has a place on it."""
    async with (
        node_at(internet, 1, public(1, limits, purpose)) as relay,
        node_at(internet, 2, private(relay)) as bob,
        node_at(internet, 3) as alice,
    ):
        await bob.serve(echo, ECHO)
        if purpose is Purpose.ANY:
            await eventually(lambda: bool(bob.addresses))
        yield relay, alice, bob


def identity_of(number: int) -> str:
    """The peer id of the node with this number, see `node_at`."""
    return Identity.from_seed(bytes([number]) * 32).peer_id


async def talk(stream: OverlayStream, what: bytes = b"hello") -> None:
    await stream.send_all(what)
    got = b""
    while len(got) < len(what):
        piece = await stream.receive_some()
        assert piece
        got += piece
    assert got == what


async def test_a_circuit_is_a_connection_like_any_other(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with three(internet) as (relay, alice, bob):
        (address,) = bob.addresses
        assert address == f"{relay.addresses[0]}/p2p-circuit/p2p/{bob.peer_id}"
        stream = await alice.connect(address, ECHO)
        await talk(stream)
        told = stream.metadata
        assert (told.path, told.peer, told.initiator) == (Path(PathKind.RELAYED, relay.peer_id), bob.peer_id, True)
        assert told.rtt == pytest.approx(2 * RTT)
        assert told.limits is not None
        assert (told.limits.max_bytes, told.limits.max_seconds) == (None, 7200)
        assert await alice.ping(bob.peer_id) == pytest.approx(2 * RTT)
        info = await alice.identify(bob.peer_id)
        assert info is not None
        assert info.addresses == (str(address).removesuffix(f"/p2p/{bob.peer_id}"),)
        other = await bob.connect(alice.peer_id, "/ipfs/ping/1.0.0")
        assert (other.metadata.path.kind, other.metadata.initiator) == (PathKind.RELAYED, False)
        status = relay.status().relay
        assert status is not None
        assert [(each.source, each.destination) for each in status.circuits] == [(alice.peer_id, bob.peer_id)]
        assert [each.peer for each in status.reservations] == [bob.peer_id]
        for node in (alice, bob):
            assert node.status().relay is None
            assert not [name for name in node.bus.counts if name[0] in ("peer-misbehaved", "internal-error")]


async def test_both_ends_are_told_where_the_relay_sees_the_other(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with three(internet) as (relay, alice, bob):
        await talk(await alice.connect(bob.addresses[0], ECHO))
        (at_alice,) = alice.swarm.connections_to(bob.peer_id)
        (at_bob,) = bob.swarm.connections_to(alice.peer_id)
        seen = {each.peer: each.connection.remote_address for each in relay.connections}
        for end, peer in ((at_alice, bob.peer_id), (at_bob, alice.peer_id)):
            assert end.connection.circuit is not None
            assert str(end.connection.circuit.observed) == seen[peer]


async def test_kaspa_over_a_circuit_is_as_over_anything(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """The default relay carries for the overlay only, and whoever dialed the circuit opens the Kaspa stream."""
    arrived: list[OverlayStream] = []

    async def kaspa(stream: OverlayStream) -> None:
        arrived.append(stream)
        await echo(stream)

    async with three(internet, purpose=Purpose.OVERLAY) as (relay, alice, bob):
        await trio.sleep(5)
        assert not bob.addresses, "it serves no Kaspa stream yet"
        await serve_with_incoming(bob, kaspa)
        await serve_with_incoming(alice, kaspa)
        await trio.sleep(20)
        assert bob.addresses
        stream = await OutboundConnector(alice).connect(bob.addresses[0])
        await talk(stream)
        assert stream.metadata.dialect is Dialect.MESSAGES
        assert stream.metadata.path == Path(PathKind.RELAYED, relay.peer_id)
        assert stream.metadata.initiator
        (there,) = arrived
        told = there.metadata
        assert (told.peer, told.path, told.direction) == (alice.peer_id, stream.metadata.path, Direction.INBOUND)
        assert not told.initiator
        async with node_at(internet, 4) as stranger:
            with pytest.raises(DialError) as caught:
                await stranger.connect(bob.addresses[0], ECHO)
            (failure,) = caught.value.failures
            assert failure.stage is Stage.RELAY
            assert isinstance(failure.error, RelayRefused)
            assert failure.error.status == "PERMISSION_DENIED"


async def test_a_place_for_the_overlay_takes_two_round_trips_once_the_connection_stands(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    at: dict[str, float] = {}
    async with node_at(internet, 1, public(1, purpose=Purpose.OVERLAY)) as relay, node_at(internet, 2) as bob:
        await bob.serve(echo)
        bob.swarm.on_connected.append(lambda _: at.setdefault("connected", trio.current_time()))
        bob.relay_client.on_made.append(lambda _: at.setdefault("made", trio.current_time()))
        bob.use_relays(f"/ip4/11.0.0.1/tcp/1/p2p/{relay.peer_id}")
        await eventually(lambda: "made" in at)
        assert at["made"] - at["connected"] <= 2 * RTT + 1e-6


async def test_hop_is_offered_by_the_public_who_want_it(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    for role in Role:
        for serve in (False, True):
            config = replace(public(1), role=role, relay=RelayConfig(serve=serve))
            async with node_at(internet, 1, config) as node:
                offered = role is Role.PUBLIC and serve
                assert (HOP in node.status().protocols) is offered
                assert (node.status().relay is not None) is offered


async def test_a_role_that_changes_changes_what_is_served_and_held(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with node_at(internet, 1, public(1)) as relay:
        config = replace(public(2), role=Role.PRIVATE)
        config = replace(config, relay=replace(config.relay, relays=relay.addresses))
        async with node_at(internet, 2, config) as node:
            await eventually(lambda: len(node.addresses) == 2)
            node._take_role(Role.PUBLIC)
            await eventually(lambda: len(node.addresses) == 1)
            assert HOP in node.status().protocols
            node._take_role(Role.PUBLIC)
            node._take_role(Role.PRIVATE)
            assert HOP not in node.status().protocols
            await eventually(lambda: len(node.addresses) == 2)


async def test_a_relay_that_is_none_any_more_says_so_and_its_places_are_looked_for_elsewhere(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    chosen = RelayConfig(relays=tuple(f"/ip4/11.0.0.{n}/tcp/1/p2p/{identity_of(n)}" for n in (1, 2)), target=1)
    async with (
        node_at(internet, 1, public(1)) as first,
        node_at(internet, 2, public(2)) as second,
        open_node(Config(listen=(), role=Role.PRIVATE, relay=chosen), network=internet.host("12.0.0.3")) as bob,
        open_node(Config(listen=()), network=internet.host("12.0.0.4")) as alice,
    ):
        relays = {each.peer_id: each for each in (first, second)}
        pinned, told = Told(alice), Told(bob)
        await bob.serve(echo, ECHO)
        await eventually(lambda: bool(bob.addresses))
        left = relays.pop(bob.relay_client.reservations[0].relay)
        (other,) = relays.values()
        alice.use_relays(left.addresses[0])
        await eventually(lambda: bool(alice.addresses))
        stream = await alice.connect(bob.addresses[0], ECHO)
        await talk(stream)
        await trio.sleep(100)
        left._take_role(Role.PRIVATE)
        assert not left.relay_server.status().reservations
        await trio.sleep(5)
        for each in (pinned, told):
            assert [event.reason for event in each.of(ReservationLost)] == ["it says that it is no relay any more"]
        assert [each.relay for each in bob.relay_client.reservations if each.held] == [other.peer_id]
        assert not alice.addresses
        await trio.sleep(600)
        assert len(pinned.of(ReservationFailed)) < 20, "not hammered"
        await talk(stream)
        left._take_role(Role.PUBLIC)
        await trio.sleep(70)
        assert alice.addresses


async def test_refusals_name_their_reason(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with three(internet, replace(OPEN, max_reservations=1, max_circuits=1)) as (relay, alice, bob):
        told = Told(relay)
        async with node_at(internet, 4, private(relay)) as late, node_at(internet, 5) as dave:
            refused = Told(late)
            await eventually(lambda: bool(refused.of(ReservationFailed)))
            assert "RESERVATION_REFUSED" in refused.of(ReservationFailed)[0].reason
            assert told.of(RelayRequestServed)[0].reason == "max_reservations"
            nowhere = f"{relay.addresses[0]}/p2p-circuit/p2p/{late.peer_id}"
            with pytest.raises(DialError, match="NO_RESERVATION: that peer has no place there"):
                await alice.connect(nowhere, ECHO)
            await alice.connect(bob.addresses[0], ECHO)
            with pytest.raises(DialError, match="RESOURCE_LIMIT_EXCEEDED"):
                await dave.connect(bob.addresses[0], ECHO)
            bob.ban(dave.peer_id, 1000)
            await alice.disconnect(bob.peer_id)
            await trio.sleep(1)
            with pytest.raises(DialError, match="CONNECTION_FAILED"):
                await dave.connect(bob.addresses[0], ECHO)
        assert not told.of(PeerMisbehaved)


async def test_the_byte_limit_is_known_to_both_ends_before_it_bites(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with three(internet, RelayLimits.reference()) as (relay, alice, bob):
        told = Told(relay)
        stream = await alice.connect(bob.addresses[0], ECHO)
        await talk(stream, bytes(20 * KIB))
        await trio.sleep(1)  # what else is said at the beginning has been said
        left = stream.metadata.limits
        assert left is not None
        assert left.bytes_left is not None
        assert 82 * KIB < left.bytes_left < 88 * KIB
        (there,) = bob.swarm.connections_to(alice.peer_id)
        assert there.connection.circuit is not None
        assert there.connection.circuit.limits.bytes_left == pytest.approx(left.bytes_left, abs=256)
        status = next(each for each in alice.status().connections if each.peer == bob.peer_id)
        assert status.limits is not None
        assert status.limits.bytes_left == left.bytes_left
        with pytest.raises(ConnectionLost, match=f"the relay {short(relay.peer_id)} ended the circuit: its 131 kB are"):
            await talk(stream, bytes(100 * KIB))
        await trio.sleep(1)
        (closed,) = told.of(CircuitClosed)
        assert (closed.reason, closed.forth + closed.back) == ("max_circuit_bytes", 128 * KIB)
        again = await alice.connect(bob.addresses[0], ECHO)
        await talk(again)


async def test_the_time_limit_bites_while_nothing_is_said(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with three(internet, RelayLimits.reference()) as (relay, alice, bob):
        stream = await alice.connect(bob.addresses[0], ECHO)
        await talk(stream)
        began = trio.current_time()
        with pytest.raises(ConnectionLost, match=f"the relay {short(relay.peer_id)} ended the circuit: its 120 s are"):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(120, abs=1)
        assert len(bob.addresses) == 1, "the place stays"


async def test_half_closed_streams_and_ends_in_order_pass(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async def answer_at_the_end(stream: OverlayStream) -> None:
        got = b""
        while data := await stream.receive_some():
            got += data
        await stream.send_all(got[::-1])

    async with three(internet) as (relay, alice, bob):
        told = Told(relay)
        await bob.serve(answer_at_the_end, "/late/1")
        stream = await alice.connect(bob.addresses[0], "/late/1")
        await stream.send_all(b"abc")
        await stream.send_eof()
        assert await stream.receive_some() == b"cba"
        assert await stream.receive_some() == b""
        await alice.disconnect(bob.peer_id)
        await eventually(lambda: bool(told.of(CircuitClosed)))
        assert told.of(CircuitClosed)[0].reason == "closed"
        assert bob.status().reservations[0].circuits == 0


async def test_a_relay_that_stops_is_replaced_by_the_place_on_another(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with node_at(internet, 5, public(5)) as second, trio.open_nursery() as nursery:
        stop = trio.Event()
        first: list[Node] = []

        async def live() -> None:
            async with node_at(internet, 1, public(1)) as relay:
                first.append(relay)
                await stop.wait()

        nursery.start_soon(live)
        await eventually(lambda: bool(first))
        async with node_at(internet, 2, private(first[0], second)) as bob, node_at(internet, 3) as alice:
            await bob.serve(echo, ECHO)
            await eventually(lambda: len(bob.addresses) == 2)
            told = Told(bob)
            through_first = await alice.connect(bob.addresses[0], ECHO)
            await talk(through_first)
            async with node_at(internet, 4) as dave:
                through_second = await dave.connect(bob.addresses[1], ECHO)
                await talk(through_second)
                stop.set()
                with pytest.raises(ConnectionLost):
                    await through_first.receive_some()
                await eventually(lambda: bool(told.of(ReservationLost)))
                assert [each.relay for each in told.of(ReservationLost)] == [first[0].peer_id]
                assert len(bob.addresses) == 1
                await talk(through_second)
                again = await alice.connect(bob.peer_id, ECHO, addresses=bob.addresses)
                assert again.metadata.path.relay == second.peer_id
                await talk(again)
            async with node_at(internet, 1, public(1)):
                await trio.sleep(70)
                assert len(bob.addresses) == 2, "back on the first"


async def test_a_peer_that_lost_its_network_has_its_place_back_at_once(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """Nobody tells the relay that the old connection is dead."""
    async with three(internet, replace(OPEN, max_reservations=1)) as (relay, alice, bob):
        await trio.sleep(100)
        (connection,) = bob.swarm.connections_to(relay.peer_id)
        told = Told(bob)
        connection.connection._raw.abort = lambda: None  # type: ignore[method-assign]
        connection.connection.abort("the cable was pulled")
        await eventually(lambda: bool(told.of(ReservationLost)) and bool(bob.addresses))
        assert told.of(ReservationLost)[0].reason == "the cable was pulled"
        assert len(relay.swarm.connections_to(bob.peer_id)) == 2
        await talk(await alice.connect(bob.addresses[0], ECHO))


async def test_a_node_whose_addresses_change_finds_out_what_is_dead(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    config = Config(listen=("/ip4/11.0.0.2/tcp/1",), role=Role.PRIVATE, relay=RelayConfig(target=0))
    host = internet.host("11.0.0.2")
    async with node_at(internet, 1, public(1)) as relay, open_node(config, network=host) as bob:
        bob.use_relays(relay.addresses[0])
        await eventually(lambda: len(bob.addresses) == 2)
        told = Told(bob)
        await trio.sleep(100)
        for here, there in internet.pipes:
            here._out.delay = there._out.delay = 1e9
        host.extra.append("/ip4/11.0.0.22/tcp/1")
        host.changed.set()
        await trio.sleep(7)
        (lost,) = told.of(ReservationLost)
        assert lost.reason == "it said nothing for 5 s after our network had changed"
        assert len(bob.addresses) == 3, "and has a place again"


async def test_what_came_in_through_relays_is_forgotten_with_them(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with three(internet) as (_, alice, bob):
        await talk(await alice.connect(bob.addresses[0], ECHO))
        bob.use_relays()
        assert [len(each) for each in bob.relay_client._inbound.values()] == [1]
        await alice.disconnect(bob.peer_id)
        await trio.sleep(1)
        bob.use_relays()
        assert not bob.relay_client._inbound


async def test_hours_of_places_and_circuits(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """One circuit after the other, each as long as the relay allows it, and made before the last one has ended."""
    async with three(internet) as (relay, alice, bob):
        for _ in range(4):
            stream = await alice.connect(bob.addresses[0], ECHO)
            await talk(stream)
            with pytest.raises(ConnectionLost, match="its 7200 s are over"):
                await stream.receive_some()
            assert bob.addresses
        await trio.sleep(200)  # nothing is open on the last one
        status = relay.status().relay
        assert status is not None
        assert len(status.reservations) == 1
        assert not status.circuits
        assert bob.status().reservations[0].renewals >= 9
        assert [each.peer for each in relay.connections] == [bob.peer_id]


async def test_many_circuits_at_once(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    data = bytes(range(256)) * 2048
    async with three(internet) as (relay, _, bob):
        done = []

        async def come(number: int) -> None:
            async with open_node(Config(listen=()), network=internet.host(f"{number}.0.0.1")) as node:
                await talk(await node.connect(bob.addresses[0], ECHO), data)
                done.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(12, 24):
                nursery.start_soon(come, number)
        assert len(done) == 12
        await eventually(lambda: not relay.status().relay.circuits)  # type: ignore[union-attr]


# Over TCP


@asynccontextmanager
async def over_tcp(**relay: object) -> AsyncIterator[tuple[Node, Node, Node]]:
    serving = RelayConfig(serve=True, purpose=Purpose.ANY, **relay)  # type: ignore[arg-type]
    here = ("/ip4/127.0.0.1/tcp/0",)
    async with open_node(Config(listen=here, role=Role.PUBLIC, relay=serving)) as one:
        using = RelayConfig(relays=one.addresses)
        async with open_node(Config(listen=(), relay=using)) as bob, open_node(Config(listen=())) as alice:
            await bob.serve(echo, ECHO)
            with trio.fail_after(10):
                while not bob.addresses:
                    async for _ in bob.events():
                        break
            yield one, alice, bob


async def test_megabytes_through_a_relay_over_tcp() -> None:
    data = bytes(range(256)) * 16384
    async with over_tcp() as (relay, alice, bob):
        stream = await alice.connect(bob.addresses[0], ECHO)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                got = bytearray()
                while len(got) < len(data):
                    got += await stream.receive_some()
        assert got == data
        assert stream.metadata.path.relay == relay.peer_id
        await stream.aclose()


async def test_leaving_takes_no_longer_with_circuits() -> None:
    began = trio.current_time()
    async with over_tcp() as (_, alice, bob):
        await talk(await alice.connect(bob.addresses[0], ECHO))
        began = trio.current_time()
    assert trio.current_time() - began < 5
