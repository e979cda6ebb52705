"""A node on a relay that a test writes the answers of: places kept, lies found out, circuits taken and refused."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p import Node, open_node
from kas_libp2p import addresses as addr
from kas_libp2p.config import Config, Limits, RelayConfig, Role
from kas_libp2p.errors import CircuitEnded, ConfigError, ConnectionLost, DialError, RelayRefused, Stage
from kas_libp2p.events import (
    ConnectionClosed,
    ConnectionOpened,
    EventBus,
    InboundRefused,
    InternalError,
    PeerMisbehaved,
    ReservationFailed,
    ReservationLost,
    ReservationMade,
    UpgradeFailed,
)
from kas_libp2p.framing import frame
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Direction, OverlayStream, Path, PathKind
from kas_libp2p.pb import relay_pb2 as pb
from kas_libp2p.relay import _client as machine
from kas_libp2p.relay import client as shell
from kas_libp2p.relay._messages import (
    Connect,
    HopMessage,
    HopStatus,
    Limit,
    Reservation,
    Reserve,
    Status,
    StopStatus,
    encode_hop,
    encode_stop,
)
from kas_libp2p.relay._voucher import seal_voucher
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from kas_libp2p.units import short
from tests.network import MemoryInternet, echo, eventually
from tests.relay.scripted import (
    RELAY,
    RELAY_ADDRESS,
    RELAY_AT,
    THROUGH,
    ScriptedRelay,
    Told,
    hidden_at,
    node_at,
    place,
    scripted_relay,
)

DELAY = 0.05
RTT = 2 * DELAY
ECHO = "/echo/1"
STRANGER = Identity.from_seed(bytes([9]) * 32).peer_id


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=DELAY)


async def made(told: Told, count: int = 1) -> ReservationMade:
    await eventually(lambda: len(told.of(ReservationMade)) >= count)
    return told.of(ReservationMade)[count - 1]


# Keeping a place


async def test_a_place_is_made_in_one_round_trip_once_the_connection_stands(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """A relay on which everything is known but the connection is asked with the first bytes that can go to it."""
    at: dict[str, float] = {}
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        node.swarm.on_connected.append(lambda _: at.setdefault("connected", trio.current_time()))
        node.relay_client.on_made.append(lambda _: at.setdefault("made", trio.current_time()))
        await made(Told(node))
        assert at["made"] - at["connected"] == pytest.approx(RTT)
        assert len(relay.requests) == 1


async def test_what_a_node_says_of_its_place(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.limit = Limit(120, 131072)
        told = Told(node)
        event = await made(told)
        mine = f"{THROUGH}/p2p/{node.peer_id}"
        assert (event.relay, event.addresses, event.renewed) == (RELAY.peer_id, (mine,), False)
        assert (event.max_bytes, event.max_seconds) == (131072, 120)
        assert event.lifetime == pytest.approx(3600, abs=2)
        assert node.addresses == (mine,)
        await trio.sleep(100)
        (status,) = node.status().reservations
        assert (status.relay, status.address, status.held) == (RELAY.peer_id, RELAY_ADDRESS, True)
        assert status.addresses == (mine,)
        assert status.seconds == pytest.approx(100, abs=1)
        assert status.seconds_left == pytest.approx(3500, abs=3)
        assert (status.max_bytes, status.max_seconds, status.circuits, status.renewals) == (131072, 120, 0, 0)
        assert (status.failures, status.reason) == (0, "")
        assert status.rtt == pytest.approx(RTT)


async def test_a_connected_peer_is_told_of_the_place_by_a_push(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    go = trio.Event()

    async def late(stream: YamuxStream, _: HopMessage) -> None:
        await go.wait()
        await stream.send_all(place())

    config = Config(listen=("/ip4/11.0.0.3/tcp/1",))
    async with scripted_relay(internet) as relay, node_at(internet, 3, config) as friend:
        relay.script = late
        async with hidden_at(internet, 2) as node:
            await node.ping(friend.addresses[0])
            await trio.sleep(5)
            info = friend.peer_info(node.peer_id)
            assert info is not None
            assert info.addresses == ()
            go.set()
            await trio.sleep(5)
            info = friend.peer_info(node.peer_id)
            assert info is not None
            assert info.addresses == (THROUGH,)
            assert info.signed
            node.relay_client.hold({})
            await trio.sleep(5)
            info = friend.peer_info(node.peer_id)
            assert info is not None
            assert info.addresses == ()


async def test_a_day_of_renewals(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """The relay is cut off twice, and refuses for ten minutes once: the place is there all but a few seconds."""
    changes: list[float] = []
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        told = Told(node)
        await made(told)
        node.relay_client.on_changed.append(lambda: changes.append(trio.current_time()))

        async def refuse(stream: YamuxStream, _: HopMessage) -> None:
            await stream.send_all(encode_hop(HopStatus(Status.RESERVATION_REFUSED)))

        async def trouble() -> None:
            await trio.sleep(3 * 3600)
            internet.pipes[-1][0].abort()
            await trio.sleep(4 * 3600)
            relay.script = refuse
            await trio.sleep(600)
            relay.script = None
            await trio.sleep(5 * 3600)
            internet.pipes[-1][1].abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trouble)
            await trio.sleep(86_400)
            nursery.cancel_scope.cancel()
        assert len(changes) == 4
        gone = (changes[1] - changes[0]) + (changes[3] - changes[2])
        assert gone == pytest.approx(6 * RTT), "a dial, a handshake and an answer each"
        assert len(told.of(ReservationLost)) == 2
        assert 30 <= len(relay.times(Reserve)) <= 50 + 20
        (status,) = node.status().reservations
        assert status.held
        assert status.renewals > 10
        assert len(relay.swarm.connections_to(node.peer_id)) == 1


async def test_a_relay_that_is_lost_is_asked_anew_at_once(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        told = Told(node)
        await made(told)
        await trio.sleep(100)
        (connection,) = relay.swarm.connections_to(node.peer_id)
        cut = trio.current_time()
        connection.connection.abort()
        assert not (await made(told, 2)).renewed
        assert trio.current_time() - cut == pytest.approx(3 * RTT), "the dial, the handshake, and the answer"
        (lost,) = told.of(ReservationLost)
        assert lost.relay == RELAY.peer_id
        assert lost.reason == "the connection broke: connection reset by peer"
        assert node.addresses


async def test_a_relay_that_can_not_be_reached_is_asked_again_with_growing_pauses(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with hidden_at(internet, 2) as node:
        told = Told(node)
        await trio.sleep(600)
        failed = told.of(ReservationFailed)
        assert 12 <= len(failed) <= 30
        assert "Connection refused" in node.status().reservations[0].reason
        assert not node.status().reservations[0].held
        async with scripted_relay(internet):
            await trio.sleep(machine.LONGEST_PAUSE + 1)
            assert node.status().reservations[0].held
            assert node.status().reservations[0].reason == ""


async def test_a_relay_that_says_no_to_renewals_is_not_hammered(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async def once(stream: YamuxStream, _: HopMessage) -> None:
        yes = len(relay.requests) == 1
        await stream.send_all(place() if yes else encode_hop(HopStatus(Status.RESERVATION_REFUSED)))

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.script = once
        told = Told(node)
        await made(told)
        await trio.sleep(3590)
        assert node.addresses, "it still lasts"
        await trio.sleep(20)
        assert not node.addresses
        (lost,) = told.of(ReservationLost)
        assert lost.reason == "it was not renewed in time"
        assert len(relay.requests) < 60
        await trio.sleep(3600)
        assert len(relay.requests) < 180


async def test_a_relay_that_grants_and_drops_is_not_hammered(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async def drop(stream: YamuxStream, _: HopMessage) -> None:
        await stream.send_all(place())
        await trio.sleep(DELAY)
        await stream.connection.aclose()

    async with scripted_relay(internet) as relay, hidden_at(internet, 2):
        relay.script = drop
        await trio.sleep(600)
        assert 5 < len(relay.requests) < 30


async def test_a_mistake_of_ours_costs_one_try(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, node_at(internet, 2) as node:
        reach = node.relay_client._reach

        async def wrong(*_: object) -> Connection:
            raise RuntimeError("on purpose")

        node.relay_client._reach = wrong
        told = Told(node)
        node.use_relays(RELAY_AT)
        await eventually(lambda: bool(told.of(InternalError)))
        assert told.of(InternalError)[0].reason == "RuntimeError: on purpose"
        assert not relay.requests
        node.relay_client._reach = reach
        await made(told)


@pytest.mark.parametrize("dead", [False, True])
async def test_after_a_change_of_our_network_silence_is_noticed_soon(
    dead: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        told = Told(node)
        await made(told)
        await trio.sleep(100)
        if dead:
            here, there = internet.pipes[-1]
            here._out.delay = there._out.delay = 1e9
        changed = trio.current_time()
        broke: list[bool] = []
        node.relay_client.on_lost.append(lambda relay, reason, by_the_way: broke.append(by_the_way))
        node.relay_client.network_changed()
        await trio.sleep(20)
        assert broke == [True] * dead, "our own line, and nothing that the relay did"
        assert len(relay.times(Reserve)) == 1 + dead
        if dead:
            (lost,) = told.of(ReservationLost)
            assert lost.reason == "it said nothing for 5 s after our network had changed"
            assert relay.times(Reserve)[-1] - changed == pytest.approx(5 + 2.5 * RTT)
        assert node.addresses


async def test_the_connection_with_a_relay_is_not_idle(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet), hidden_at(internet, 2) as node:
        await made(Told(node))
        await trio.sleep(1800)
        assert len(internet.pipes) == 1
        node.relay_client.hold({})
        assert not node.addresses
        await trio.sleep(100)
        assert not node.connections, "given up, and without a stream"


async def test_what_is_held_changes_by_the_difference(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, node_at(internet, 2) as node:
        told = Told(node)
        node.relay_client.hold({RELAY.peer_id: (RELAY_ADDRESS,)})
        await made(told)
        node.relay_client.hold({RELAY.peer_id: (RELAY_ADDRESS,), STRANGER: ("/ip4/11.0.0.9/tcp/1",)})
        await trio.sleep(1)
        assert len(relay.requests) == 1
        assert [each.held for each in node.status().reservations] == [True, False]
        node.relay_client.hold({STRANGER: ("/ip4/11.0.0.9/tcp/1",)})
        assert [each.reason for each in told.of(ReservationLost)] == ["it was given up"]
        node.relay_client.hold({})
        node.relay_client.hold({RELAY.peer_id: ()})  # connected: no address is needed
        await made(told, 2)


async def test_a_node_that_everybody_can_dial_needs_no_relay(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    config = Config(listen=(), relay=RelayConfig(relays=(RELAY_AT,)), role=Role.PUBLIC)
    async with scripted_relay(internet) as relay, node_at(internet, 2, config):
        await trio.sleep(10)
        assert not relay.requests


@pytest.mark.parametrize("wrong", ["nonsense", RELAY_ADDRESS, f"{THROUGH}/p2p/{STRANGER}"])
async def test_a_relay_in_the_settings_that_is_none(wrong: str, internet: MemoryInternet) -> None:
    config = Config(listen=(), relay=RelayConfig(relays=(wrong,)))
    with pytest.raises(ConfigError, match=r"relay\.relays"):
        async with open_node(config, network=internet.host("11.0.0.2")):
            pass


# Answers that are none, and lies

Answer = Callable[[YamuxStream], Awaitable[None]]


def says(data: bytes) -> Answer:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(data)

    return answer


def says_no_more_than(data: bytes) -> Answer:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(data)
        await trio.sleep_forever()

    return answer


def resets(data: bytes = b"") -> Answer:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(data)
        await trio.sleep(DELAY)
        stream.reset()

    return answer


def leaves(data: bytes = b"") -> Answer:
    async def answer(stream: YamuxStream) -> None:
        await stream.send_all(data)
        await trio.sleep(DELAY)
        stream.connection.abort()

    return answer


def crowd(count: int) -> bytes:
    """An answer with so many addresses, all of them good."""
    message = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK)
    message.reservation.expire = int(time.time()) + 3600
    message.reservation.addrs.extend(addr.from_ip_port(f"11.1.{n >> 8}.{n & 255}", 1).to_bytes() for n in range(count))
    return frame(message.SerializeToString())


ONE = place()
NOT_ANSWERS: dict[str, tuple[Answer, str, bool]] = {
    "nothing": (says(b""), "before a whole message", True),
    "half a message": (says(ONE[:9]), "before a whole message", True),
    "silence": (says_no_more_than(b""), "did not answer within 10 s", False),
    "silence in mid-frame": (says_no_more_than(ONE[:9]), "did not answer within 10 s", False),
    "a reset": (resets(), "reset by the peer", False),
    "a reset in mid-frame": (resets(ONE[:9]), "reset by the peer", False),
    "gone": (leaves(), "connection", False),
    "gone in mid-frame": (leaves(ONE[:9]), "connection", False),
    "garbage": (says(b"\x05\xff\xff\xff\xff\xff"), "protobuf", True),
    "an empty message": (says(b"\x00"), "says not what it is", True),
    "4097 bytes": (says(b"\x81\x20" + bytes(4097)), "4097 bytes is refused", True),
    "an endless length": (says(b"\xff" * 12), "varint", True),
    "a length of 2^63": (says(b"\x80" * 9 + b"\x01"), "varint", True),
    "10 000 addresses": (says(crowd(10_000)), "is refused", True),
    "a question": (says(encode_hop(Reserve())), "answered with a request", True),
    "yes to nothing": (says(encode_hop(HopStatus(Status.OK))), "reserved nothing", True),
    "a voucher signed by another": (
        says(place(voucher=seal_voucher(Identity.generate(), STRANGER, 1))),
        "signed by another peer",
        True,
    ),
    "a voucher for another": (says(place(voucher=seal_voucher(RELAY, STRANGER, 1))), "for another peer", True),
    "a voucher of nothing": (says(place(voucher=b"\x00\x01")), "envelope", True),
    **{
        f"{status.name}": (says(encode_hop(HopStatus(status))), f"says {status.name}: ", False)
        for status in Status
        if status is not Status.OK
    },
}


@pytest.mark.parametrize("name", NOT_ANSWERS)
async def test_an_answer_that_is_none(name: str, internet: MemoryInternet, autojump_clock: MockClock) -> None:
    answer, why, broken = NOT_ANSWERS[name]

    async def script(stream: YamuxStream, _: HopMessage) -> None:
        await answer(stream)

    config = Config(listen=("/ip4/11.0.0.3/tcp/1",))
    async with (
        scripted_relay(internet) as relay,
        node_at(internet, 3, config) as witness,
        hidden_at(internet, 2) as node,
    ):
        relay.script = script
        told = Told(node)
        await node.ping(witness.addresses[0])
        await eventually(lambda: bool(told.of(ReservationFailed)))
        failed = told.of(ReservationFailed)[0]
        assert failed.relay == RELAY.peer_id
        assert why in failed.reason
        misbehaved = [event for event in told.of(PeerMisbehaved) if event.peer == RELAY.peer_id]
        assert bool(misbehaved) is broken
        assert all(event.layer == shell.HOP for event in misbehaved)
        assert not node.addresses
        assert await node.ping(witness.addresses[0]) == pytest.approx(RTT)
        await trio.sleep(120)
        assert len(relay.requests) < 12, "not hammered"
        relay.script = None
        await trio.sleep(machine.LONGEST_PAUSE + 20)
        assert node.addresses, "forgiven when it tells the truth"


async def test_a_peer_that_is_no_relay(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.swarm.unhandle(shell.HOP)
        told = Told(node)
        errors: list[BaseException] = []
        node.relay_client.on_failed.append(lambda _, error: errors.append(error))
        await eventually(lambda: bool(told.of(ReservationFailed)))
        assert "does not speak /libp2p/circuit/relay/0.2.0/hop" in told.of(ReservationFailed)[0].reason
        assert type(errors[0]).__name__ == "NegotiationError"
        assert not told.of(PeerMisbehaved)


LIFETIMES = {0: machine.ASSUMED, 1: machine.ASSUMED, 2**63: 86_400, 2**64 - 1: 86_400}


@pytest.mark.parametrize("expire", LIFETIMES)
async def test_an_expiry_that_can_not_be_right(
    expire: int, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async def script(stream: YamuxStream, _: HopMessage) -> None:
        await stream.send_all(encode_hop(HopStatus(Status.OK, Reservation(expire))))

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.script = script
        event = await made(Told(node))
        assert event.lifetime == LIFETIMES[expire]
        await trio.sleep(7200)
        assert node.addresses
        assert len(relay.requests) <= 1 + 7200 / (0.6 * min(event.lifetime, 9000))


async def test_of_many_addresses_a_few_are_told_on(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async def script(stream: YamuxStream, _: HopMessage) -> None:
        await stream.send_all(crowd(200))

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.script = script
        assert len((await made(Told(node))).addresses) == machine.MAX_ADDRESSES


async def test_an_expiry_in_milliseconds(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async def script(stream: YamuxStream, _: HopMessage) -> None:
        expire = int((time.time() + 7200) * 1000)
        await stream.send_all(encode_hop(HopStatus(Status.OK, Reservation(expire), Limit(120_000, 131072))))

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.script = script
        event = await made(Told(node))
        assert event.lifetime == pytest.approx(7200, abs=2)
        assert event.max_seconds == 120


async def test_garbage_among_addresses_is_passed_over(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    listed = (b"\xff\xff\xff", b"", bytes(3), b"\x04\x0b", addr.parse("/ip4/11.0.0.7/tcp/1").to_bytes())
    message = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK)
    message.reservation.CopyFrom(pb.Reservation(expire=int(time.time()) + 3600, addrs=listed))

    async def script(stream: YamuxStream, _: HopMessage) -> None:
        await stream.send_all(frame(message.SerializeToString()))

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        relay.script = script
        event = await made(Told(node))
        assert event.addresses == (f"/ip4/11.0.0.7/tcp/1/p2p/{RELAY.peer_id}/p2p-circuit/p2p/{node.peer_id}",)


# Circuits to us


async def test_a_circuit_from_a_peer(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """From dialing to an echo, and what both ends know of the way."""
    async with (
        scripted_relay(internet) as relay,
        hidden_at(internet, 2) as bob,
        node_at(internet, 3) as alice,
    ):
        relay.limit = Limit(7200, 1 << 24)
        relay.observed = ("/ip4/11.9.9.9/tcp/9",)
        told_bob, told_alice = Told(bob), Told(alice)
        await bob.serve(echo, ECHO)
        await made(told_bob)
        stream = await alice.connect(bob.addresses[0], ECHO)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        told = stream.metadata
        assert told.path == Path(PathKind.RELAYED, RELAY.peer_id)
        assert (told.peer, told.initiator, told.remote_address) == (bob.peer_id, True, THROUGH)
        assert told.limits is not None
        assert (told.limits.max_bytes, told.limits.max_seconds) == (1 << 24, 7200)
        assert told.limits.bytes_left is not None
        assert 0 < (1 << 24) - told.limits.bytes_left < 5000
        (there,) = bob.swarm.connections_to(alice.peer_id)
        assert (there.path, there.connection.initiator) == (Path(PathKind.RELAYED, RELAY.peer_id), False)
        assert there.connection.circuit is not None
        assert str(there.connection.circuit.observed) == "/ip4/11.9.9.9/tcp/9"
        assert there.connection.circuit.limits.max_bytes == 1 << 24
        (here,) = alice.swarm.connections_to(bob.peer_id)
        assert here.connection.circuit is not None
        assert str(here.connection.circuit.observed) == "/ip4/11.9.9.9/tcp/9"
        assert bob.status().reservations[0].circuits == 1
        limits = next(each for each in bob.status().connections if each.peer == alice.peer_id).limits
        assert limits is not None
        assert limits.max_bytes == 1 << 24
        opened = {event.peer: event for event in told_bob.of(ConnectionOpened)}[alice.peer_id]
        assert (opened.path.kind, opened.direction, opened.address) == (PathKind.RELAYED, Direction.INBOUND, THROUGH)
        info = await bob.identify(alice.peer_id)
        assert info is not None
        assert info.observed == THROUGH
        await stream.aclose()
        await alice.disconnect(bob.peer_id)
        await eventually(lambda: not bob.swarm.connections_to(alice.peer_id))
        closed = {event.peer: event for event in told_bob.of(ConnectionClosed)}[alice.peer_id]
        assert closed.reason == "the peer closed it"
        assert bob.status().reservations[0].circuits == 0
        await trio.sleep(1)
        assert not told_alice.of(PeerMisbehaved)
        assert [event for event in told_bob.events if isinstance(event, UpgradeFailed | PeerMisbehaved)] == []


async def test_dialing_through_a_relay_that_is_connected_without_saying_where_it_is(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with (
        scripted_relay(internet),
        hidden_at(internet, 2) as bob,
        node_at(internet, 3) as alice,
    ):
        await bob.serve(echo, ECHO)
        await made(Told(bob))
        bare = f"/p2p/{RELAY.peer_id}/p2p-circuit/p2p/{bob.peer_id}"
        with pytest.raises(DialError, match="no address of it is known"):
            await alice.connect(bare, ECHO)
        await alice.ping(RELAY_AT)
        stream = await alice.connect(bare, ECHO)
        assert stream.metadata.path.relay == RELAY.peer_id
        await alice.disconnect(bob.peer_id)
        await alice.disconnect(RELAY.peer_id)
        again = await alice.connect(bob.peer_id, ECHO)
        assert again.metadata.remote_address == THROUGH, "remembered"


async def test_a_circuit_that_comes_with_the_yes_is_taken(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """The relay says OK and opens a circuit in one breath: whichever is looked at first, it is taken."""
    statuses: list[Status | None] = []

    async def script(stream: YamuxStream, _: HopMessage) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, stream.connection.peer)
            await stream.send_all(place())

    async def stop(peer: str) -> None:
        statuses.append((await relay.stop(peer, STRANGER))[0])  # type: ignore[arg-type]

    async with scripted_relay(internet) as relay:
        relay.script = script
        for number in range(2, 8):
            async with hidden_at(internet, number):
                await trio.sleep(1)
        assert statuses == [Status.OK] * 6


REFUSED: dict[str, tuple[str, Status, str]] = {
    "a banned source": ("ban", Status.PERMISSION_DENIED, "ban"),
    "a denied source": ("deny", Status.PERMISSION_DENIED, "deny"),
    "a source that is not allowed": ("allow", Status.PERMISSION_DENIED, "allow"),
    "a source that a policy refuses": ("policy", Status.PERMISSION_DENIED, "policy"),
    "ourselves": ("self", Status.PERMISSION_DENIED, "self"),
    "the relay itself": ("relay", Status.PERMISSION_DENIED, "self"),
    "a relay that is none of ours": ("given up", Status.PERMISSION_DENIED, "not_our_relay"),
    "one more than may come in": ("full", Status.RESOURCE_LIMIT_EXCEEDED, "relay.max_inbound_per_relay"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_circuit_that_is_refused(name: str, internet: MemoryInternet, autojump_clock: MockClock) -> None:
    how, status, limit = REFUSED[name]
    config = Config(listen=(), relay=RelayConfig(target=0, max_inbound_per_relay=0 if how == "full" else 1))
    if how == "deny":
        config = Config(listen=(), relay=config.relay, deny=(STRANGER,))
    if how == "allow":
        config = Config(listen=(), relay=config.relay, allow=(RELAY.peer_id,))
    async with scripted_relay(internet) as relay, hidden_at(internet, 2, config) as node:
        told = Told(node)
        await made(told)
        source = {"self": node.peer_id, "relay": RELAY.peer_id}.get(how, STRANGER)
        if how == "ban":
            node.ban(STRANGER, 1000)
        if how == "policy":
            node.set_policy(lambda candidate: "no strangers" if candidate.peer == STRANGER else None)
        if how == "given up":
            node.relay_client.hold({})
        answer, stream = await relay.stop(node.peer_id, source)
        assert answer is status
        assert await stream.receive_some() == b"", "and closed in order"
        (refused,) = told.of(InboundRefused)
        assert (refused.address, refused.reason) == (THROUGH, limit)
        assert not node.swarm.connections_to(STRANGER)
        assert len(node.connections) == 1
        await stream.aclose()
        await trio.sleep(1)
        assert not relay.swarm.connections_to(node.peer_id)[0].connection.streams


STOPS: dict[str, tuple[bytes, Status, str]] = {
    "garbage": (b"\x05\xff\xff\xff\xff\xff", Status.MALFORMED_MESSAGE, "protobuf"),
    "nothing in it": (b"\x00", Status.MALFORMED_MESSAGE, "says not what it is"),
    "no source": (b"\x02\x08\x00", Status.MALFORMED_MESSAGE, "peer"),
    "a source that is none": (b"\x07\x08\x00\x12\x03\x0a\x01\xff", Status.MALFORMED_MESSAGE, "peer"),
    "4097 bytes": (b"\x81\x20" + bytes(4097), Status.MALFORMED_MESSAGE, "4097"),
    "an endless length": (b"\xff" * 12, Status.MALFORMED_MESSAGE, "varint"),
    "an answer": (encode_stop(StopStatus(Status.OK)), Status.UNEXPECTED_MESSAGE, "nobody asked"),
}


@pytest.mark.parametrize("name", STOPS)
async def test_a_stop_that_is_none(name: str, internet: MemoryInternet, autojump_clock: MockClock) -> None:
    raw, status, why = STOPS[name]
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        told = Told(node)
        await made(told)
        answer, _ = await relay.stop(node.peer_id, STRANGER, raw=raw)
        assert answer is status
        (misbehaved,) = told.of(PeerMisbehaved)
        assert (misbehaved.peer, misbehaved.layer) == (RELAY.peer_id, shell.STOP)
        assert why in misbehaved.reason
        assert node.addresses, "the place stays"


async def test_a_stop_on_which_nothing_comes_is_reset(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        told = Told(node)
        await made(told)
        began = trio.current_time()
        answer, _ = await relay.stop(node.peer_id, STRANGER, raw=b"\x40half")
        assert answer is None
        assert trio.current_time() - began == pytest.approx(shell.STOP_TIMEOUT, abs=1)
        assert [event.layer for event in told.of(PeerMisbehaved)] == [shell.STOP]


async def test_stops_that_say_nothing_leave_room_for_one_that_does(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as node:
        await made(Told(node))
        connection = relay.swarm.connection_to(node.peer_id)
        assert connection is not None
        for _ in range(shell.STOPS_AT_ONCE + 5):
            await connection.open_stream(shell.STOP)
        await trio.sleep(shell.STOP_TIMEOUT + 1)
        assert (await relay.stop(node.peer_id, STRANGER))[0] is Status.OK


async def test_a_flood_of_silent_circuits_through_one_relay_costs_nobody_else(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    places = shell.STOPS_AT_ONCE // 2
    config = Config(listen=("/ip4/11.0.0.2/tcp/1",), limits=Limits(max_pending_inbound=places))
    async with (
        scripted_relay(internet) as relay,
        hidden_at(internet, 2, config) as bob,
        node_at(internet, 3) as witness,
    ):
        told = Told(bob)
        await made(told)
        await bob.serve(echo, ECHO)

        async def served() -> float:
            began = trio.current_time()
            stream = await witness.connect(f"/ip4/11.0.0.2/tcp/1/p2p/{bob.peer_id}", ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            took = trio.current_time() - began
            await stream.aclose()
            await witness.disconnect(bob.peer_id)
            await trio.sleep(1)
            return took

        alone = await served()
        for number in range(shell.STOPS_AT_ONCE):
            await relay.stop(bob.peer_id, Identity.from_seed(bytes([100 + number]) * 32).peer_id)
        assert bob.status().in_use["max_pending_inbound"] == places
        assert await served() == pytest.approx(alone)
        evicted = [event for event in told.of(UpgradeFailed) if event.stage == Stage.LIMITS]
        assert [event.address for event in evicted] == [THROUGH]
        assert bob.addresses, "the place on the relay stays"
        await trio.sleep(15)
        assert bob.status().in_use["max_pending_inbound"] == 0
        (connection,) = relay.swarm.connections_to(bob.peer_id)
        assert not connection.connection.streams


async def test_a_source_that_the_relay_lied_about_is_found_out(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async def script(stream: YamuxStream, request: HopMessage) -> None:
        if isinstance(request, Reserve):
            await stream.send_all(place())
            return
        assert isinstance(request, Connect)
        status, there = await relay.stop(request.peer, STRANGER)
        assert status is Status.OK
        await stream.send_all(encode_hop(HopStatus(Status.OK)))
        while data := await stream.receive_some():
            await there.send_all(data)
            await stream.send_all(await there.receive_some())

    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as bob, node_at(internet, 3) as alice:
        relay.script = script
        told = Told(bob)
        await made(told)
        with pytest.raises((DialError, ConnectionLost)):
            await alice.ping(bob.addresses[0])
        await eventually(lambda: bool(told.of(UpgradeFailed)))
        (failed,) = told.of(UpgradeFailed)
        assert (failed.address, failed.stage) == (THROUGH, Stage.NOISE)
        assert f"expected peer {STRANGER}, but {alice.peer_id} answered" in failed.reason
        assert bob.status().reservations[0].circuits == 0


# Circuits to others

NO_CIRCUITS: dict[str, tuple[Answer, str]] = {
    **{name: (answer, why) for name, (answer, why, _) in NOT_ANSWERS.items() if "voucher" not in name},
    "silence": (says_no_more_than(b""), "did not answer within 15 s"),
    "silence in mid-frame": (says_no_more_than(ONE[:9]), "did not answer within 15 s"),
}
del NO_CIRCUITS["yes to nothing"], NO_CIRCUITS["10 000 addresses"]


@pytest.mark.parametrize("name", NO_CIRCUITS)
async def test_a_circuit_that_is_not_made(name: str, internet: MemoryInternet, autojump_clock: MockClock) -> None:
    answer, why = NO_CIRCUITS[name]

    async def script(stream: YamuxStream, _: HopMessage) -> None:
        await answer(stream)

    async with scripted_relay(internet) as relay, node_at(internet, 3) as alice:
        relay.script = script
        with pytest.raises(DialError) as caught:
            await alice.connect(f"{THROUGH}/p2p/{STRANGER}", ECHO)
        (failure,) = caught.value.failures
        assert failure.stage is Stage.RELAY
        assert isinstance(failure.error, RelayRefused)
        assert failure.error.relay == RELAY.peer_id
        assert failure.error.status == (name if name in Status.__members__ else "")
        assert why in str(failure.error)
        await trio.sleep(1)
        for connection in alice.connections:
            assert not connection.connection.streams


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (f"{RELAY_ADDRESS}/p2p-circuit/p2p/{STRANGER}", "names its relay"),
        (f"/p2p-circuit/p2p/{STRANGER}", "names its relay"),
        (f"{RELAY_AT}/p2p-circuit/p2p/{RELAY.peer_id}", "its relay is the peer itself"),
        (f"{THROUGH}/p2p/{STRANGER}/p2p-circuit/p2p/{Identity.from_seed(bytes(32)).peer_id}", "through another relay"),
        (f"/ip4/11.0.0.8/tcp/1/p2p/{Identity.from_seed(bytes([3]) * 32).peer_id}/p2p-circuit/p2p/{STRANGER}", "itself"),
        (f"/ip4/11.0.0.8/tcp/1/p2p/{RELAY.peer_id}/p2p-circuit/p2p/{STRANGER}", "can't be reached.*refused"),
    ],
)
async def test_addresses_that_lead_nowhere(
    address: str, why: str, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with node_at(internet, 3) as alice:
        with pytest.raises(DialError, match=why):
            await alice.connect(address, ECHO)


async def test_a_circuit_address_names_whom_to_reach(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with node_at(internet, 3) as alice:
        with pytest.raises(DialError, match="ends with whom to reach"):
            await alice.connect(THROUGH, ECHO)


async def test_a_banned_relay_is_not_used(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with scripted_relay(internet) as relay, node_at(internet, 3) as alice:
        alice.ban(RELAY.peer_id, 1000)
        with pytest.raises(DialError) as caught:
            await alice.connect(f"{THROUGH}/p2p/{STRANGER}", ECHO)
        assert caught.value.failures[0].stage is Stage.GATE
        assert not relay.requests


async def test_another_peer_at_the_end_of_the_circuit_is_found_out(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as bob, node_at(internet, 3) as alice:
        await made(Told(bob))

        async def script(stream: YamuxStream, _: HopMessage) -> None:
            await relay.splice(stream, bob.peer_id)

        relay.script = script
        with pytest.raises(DialError, match=f"expected peer {STRANGER}, but {bob.peer_id} answered"):
            await alice.connect(f"{THROUGH}/p2p/{STRANGER}", ECHO)


# Ends


async def circuit_between(relay: ScriptedRelay, bob: Node, alice: Node) -> tuple[OverlayStream, Told, Told]:
    told_bob, told_alice = Told(bob), Told(alice)
    await bob.serve(echo, ECHO)
    await made(told_bob)
    stream = await alice.connect(bob.addresses[0], ECHO)
    await stream.send_all(b"x")
    assert await stream.receive_some() == b"x"
    return stream, told_bob, told_alice


async def test_the_loss_of_the_relay_ends_its_circuits_and_says_so(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as bob, node_at(internet, 3) as alice:
        stream, told_bob, told_alice = await circuit_between(relay, bob, alice)
        for here, there in internet.pipes:
            here.abort()
            there.abort()
        with pytest.raises(
            ConnectionLost, match=f"the relay {short(RELAY.peer_id)} is gone: the connection broke"
        ) as lost:
            await stream.receive_some()
        assert type(lost.value) is ConnectionLost, "no limit did that"
        await wait_all_tasks_blocked()
        for told, peer in ((told_bob, alice.peer_id), (told_alice, bob.peer_id)):
            closed = {event.peer: event for event in told.of(ConnectionClosed)}[peer]
            assert f"the relay {short(RELAY.peer_id)} is gone" in closed.reason
        await made(told_bob, 2)
        again = await alice.connect(bob.addresses[0], ECHO)
        await again.send_all(b"y")
        assert await again.receive_some() == b"y"


@pytest.mark.parametrize(
    ("limit", "seconds", "count", "why", "which"),
    [
        (Limit(120, None), 120, 0, ": its 120 s are over", "max_seconds"),
        (Limit(None, 131072), 0, 120_000, ": its 131 kB are used up", "max_bytes"),
        (Limit(None, None), 0, 120_000, "", ""),
    ],
)
async def test_a_circuit_that_the_relay_ends_says_which_limit_was_reached(
    limit: Limit,
    seconds: float,
    count: int,
    why: str,
    which: str,
    internet: MemoryInternet,
    autojump_clock: MockClock,
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as bob, node_at(internet, 3) as alice:
        relay.limit = limit
        stream, told_bob, _ = await circuit_between(relay, bob, alice)
        await trio.sleep(seconds)
        await stream.send_all(bytes(count // 2))
        while count > 0:
            count -= 2 * len(await stream.receive_some())
        for one, other in relay.circuits:
            one.reset()
            other.reset()
        other = await alice.connect(bob.peer_id, ECHO)
        text = f"the connection broke: the relay {short(RELAY.peer_id)} ended the circuit{why}"
        for each in (stream, other):
            with pytest.raises(CircuitEnded) as caught:
                await each.receive_some()
            assert str(caught.value) == text
            assert (caught.value.relay, caught.value.limit) == (RELAY.peer_id, which)
            assert (caught.value.seconds_left is None) is (limit.seconds is None)
            assert (caught.value.bytes_left is None) is (limit.bytes is None)
            assert (caught.value.seconds_left or 0) < 1
            assert (caught.value.bytes_left or 0) < 30_000
        await wait_all_tasks_blocked()
        closed = {event.peer: event for event in told_bob.of(ConnectionClosed)}[alice.peer_id]
        assert closed.reason == text


async def test_a_connection_that_carries_a_circuit_is_not_idle(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, hidden_at(internet, 2) as bob, node_at(internet, 3) as alice:
        stream, _, _ = await circuit_between(relay, bob, alice)
        await trio.sleep(1000)
        await stream.send_all(b"still there")
        assert await stream.receive_some() == b"still there"
        assert alice.swarm.connection_to(RELAY.peer_id) is not None
        await stream.aclose()
        await trio.sleep(200)
        assert not alice.connections, "first the circuit, then the way to the relay"


@pytest.mark.parametrize("who", ["alice", "bob"])
async def test_a_node_that_stops_closes_its_circuits_in_order(
    who: str, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with scripted_relay(internet) as relay, trio.open_nursery() as nursery:
        ready, done = trio.Event(), {"alice": trio.Event(), "bob": trio.Event()}
        told: dict[str, Told] = {}
        nodes: dict[str, Node] = {}

        async def live(name: str, at: AbstractAsyncContextManager[Node]) -> None:
            async with at as node:
                nodes[name], told[name] = node, Told(node)
                if len(nodes) == 2:
                    ready.set()
                await done[name].wait()

        nursery.start_soon(live, "alice", node_at(internet, 3))
        nursery.start_soon(live, "bob", hidden_at(internet, 2))
        await ready.wait()
        await circuit_between(relay, nodes["bob"], nodes["alice"])
        other = "bob" if who == "alice" else "alice"
        listener = Told(nodes[other])
        began = trio.current_time()
        done[who].set()
        await eventually(lambda: bool(listener.of(ConnectionClosed)))
        assert listener.of(ConnectionClosed)[0].reason == "the peer closed it"
        assert listener.of(ConnectionClosed)[0].peer == nodes[who].peer_id
        assert trio.current_time() - began < 2
        done[other].set()


# The end


async def test_a_relay_that_is_chosen_as_the_node_ends_is_no_fault(autojump_clock: MockClock) -> None:
    async def never(*_: object) -> Connection:
        raise DialError("nobody", hint="the node ends")

    for ticks in [*range(4)] * 5:  # tasks end in any order
        client = shell.RelayClient(
            Identity.from_seed(bytes([1]) * 32),
            RelayConfig(),
            EventBus(time.time),
            reach=never,
            upgrade=never,
            admit=lambda peer: None,
            wall_clock=time.time,
        )

        async def other(client: shell.RelayClient = client, ticks: int = ticks) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                client.hold({STRANGER: ()})

        async with trio.open_nursery() as node:
            await node.start(client.run)
            node.start_soon(other)
            await wait_all_tasks_blocked()
            node.cancel_scope.cancel()
        assert client.reservations
