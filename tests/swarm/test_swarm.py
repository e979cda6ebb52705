from __future__ import annotations

import gc
from contextlib import suppress

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p import addresses
from kas_libp2p.config import Config, DialConfig, Limits
from kas_libp2p.errors import (
    AddressError,
    ConnectionLost,
    DialError,
    PeerIdMismatch,
    Refused,
    Stage,
    StreamReset,
)
from kas_libp2p.events import (
    AddressesChanged,
    AddressFailed,
    Banned,
    ConnectionClosed,
    ConnectionOpened,
    DialFailed,
    Dialing,
    HandlerFailed,
    InboundRefused,
    InternalError,
    LimitHit,
    PeerMisbehaved,
    StreamFailed,
    UpgradeFailed,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Path, PathKind
from kas_libp2p.swarm import Swarm, SwarmConnection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw, memory_pair
from tests.network import MemoryHost, MemoryInternet, make_swarm, running
from tests.transport.pairs import BOB, Foreign

ADDRESS = "/ip4/11.0.0.2/tcp/1"
ECHO = "/echo/1"


async def echo(stream: YamuxStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=0.01)


@pytest.fixture
def alice_host(internet: MemoryInternet) -> MemoryHost:
    return internet.host("11.0.0.1")


@pytest.fixture
def bob_host(internet: MemoryInternet) -> MemoryHost:
    return internet.host("11.0.0.2")


async def test_a_stream_there_and_back(alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock) -> None:
    alice, told_alice = make_swarm(alice_host, 1)
    bob, told_bob = make_swarm(bob_host, 2)
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        assert connection.peer == bob.peer
        assert connection.path == DIRECT
        stream = await connection.open_stream(ECHO)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        await stream.aclose()
    assert [event.target for event in told_alice.of(Dialing)] == [bob.peer]
    (opened,) = told_alice.of(ConnectionOpened)
    assert (opened.peer, opened.address, opened.direction) == (bob.peer, ADDRESS, "outbound")
    (there,) = told_bob.of(ConnectionOpened)
    assert (there.peer, there.direction) == (alice.peer, "inbound")
    assert len(told_alice.of(ConnectionClosed)) == len(told_bob.of(ConnectionClosed)) == 1


async def test_leaving_closes_connections_in_order(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told_bob = make_swarm(bob_host, 2)
    async with running(bob, ADDRESS):
        async with running(alice):
            await alice.dial(bob.peer, [ADDRESS])
            started = trio.current_time()
        assert trio.current_time() - started < 2
        await wait_all_tasks_blocked(0.1)
        (closed,) = told_bob.of(ConnectionClosed)
        assert closed.reason == "the peer closed it"
        assert bob.admission.in_use()["max_connections"] == 0


async def test_a_known_connection_is_used_again(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        assert await alice.dial(bob.peer, []) is connection
        assert await alice.dial(None, [ADDRESS]) is connection
        await trio.sleep(0.1)
        (back,) = bob.connections_to(alice.peer)
        assert await bob.dial(alice.peer, []) is back
        assert alice_host.dialed == [ADDRESS]
        fresh = await alice.dial(bob.peer, [ADDRESS], fresh=True)
        assert fresh is not connection
        assert alice.connections_to(bob.peer) == [connection, fresh]


async def test_concurrent_dials_share_one_attempt(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    found: list[SwarmConnection] = []
    async with running(alice), running(bob, ADDRESS):

        async def dial(address: str) -> None:
            found.append(await alice.dial(bob.peer, [address]))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(dial, ADDRESS)
            for _ in range(2):
                await trio.lowlevel.checkpoint()  # all have begun
            nursery.start_soon(dial, "/ip4/11.0.0.9/tcp/1")  # joins, and so needs not be tried
        assert len(set(map(id, found))) == 1
        assert alice_host.dialed == [ADDRESS]


async def test_who_joins_a_failing_dial_with_another_address_has_it_tried(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        async with trio.open_nursery() as nursery:

            async def hopeless() -> None:
                with pytest.raises(DialError):
                    await alice.dial(bob.peer, ["/ip4/11.0.0.9/tcp/1"])

            nursery.start_soon(hopeless)
            await trio.testing.wait_all_tasks_blocked()
            connection = await alice.dial(bob.peer, [ADDRESS])
        assert connection.connection.remote_address == ADDRESS


async def test_a_dial_that_nobody_waits_for_ends(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, told = make_swarm(alice_host, 1)
    bob, told_bob = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        with trio.move_on_after(0.03):  # SYN and answer took 0.02 s
            await alice.dial(bob.peer, [ADDRESS])
        await trio.sleep(1)
        assert alice.admission.in_use()["max_connections"] == 0
        assert not alice._attempts
        assert told.of(ConnectionOpened) == []
        assert len(told_bob.of(UpgradeFailed)) == 1
        assert bob.admission.in_use()["max_connections"] == 0
        await alice.dial(bob.peer, [ADDRESS])


async def test_one_who_stops_waiting_takes_nothing_from_the_others(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS), trio.open_nursery() as nursery:

        async def impatient() -> None:
            with trio.move_on_after(0.01):
                await alice.dial(bob.peer, [ADDRESS])

        nursery.start_soon(impatient)
        assert (await alice.dial(bob.peer, [ADDRESS])).peer == bob.peer


async def test_a_peer_that_ends_every_connection_at_once_is_dialed_once(
    internet: MemoryInternet, alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, told = make_swarm(alice_host, 1)
    (listener,) = await bob_host.listen([addresses.parse(ADDRESS)])
    async with running(alice), trio.open_nursery() as nursery:

        async def answer_and_leave() -> None:
            while True:
                raw = await listener.accept()
                assert isinstance(raw, MemoryRaw)
                await Foreign(raw).shake(finish=False)
                await raw.aclose()

        nursery.start_soon(answer_and_leave)
        with pytest.raises(ConnectionLost, match="ended at once: the peer closed it"):
            await alice.dial(BOB.peer_id, [ADDRESS])
        await trio.sleep(1)
        assert len(internet.pipes) == 1
        assert len(told.of(ConnectionOpened)) == len(told.of(ConnectionClosed)) == 1
        assert alice.admission.in_use()["max_connections"] == 0
        nursery.cancel_scope.cancel()


async def test_every_failed_address_keeps_its_reason(
    internet: MemoryInternet, alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, told = make_swarm(alice_host, 1, Config(deny=("198.51.100.0/24",)))
    bob, _ = make_swarm(bob_host, 2)
    carol = Identity.from_seed(bytes([3]) * 32).peer_id
    internet.refused["/ip4/11.0.0.8/tcp/1"] = OSError(113, "No route to host")
    internet.names["/dns4/node.example.org/tcp/1"] = ["/ip4/11.0.0.7/tcp/1"]
    async with running(alice), running(bob, ADDRESS):
        with pytest.raises(DialError) as caught:
            await alice.dial(
                carol,
                [
                    "/ip4/11.0.0.8/tcp/1",
                    "/dns4/node.example.org/tcp/1",
                    "/dns4/unknown.example.org/tcp/1",
                    f"/ip4/11.0.0.9/tcp/1/p2p/{bob.peer}/p2p-circuit",
                    "/ip4/198.51.100.1/tcp/1",
                    "/ip4/11.0.0.8/udp/1/quic-v1",
                    ADDRESS,
                ],
            )
    error = caught.value
    by_address = {failure.address: failure for failure in error.failures}
    assert by_address["/ip4/11.0.0.8/tcp/1"].stage is Stage.TCP
    assert by_address["/ip4/11.0.0.7/tcp/1"].stage is Stage.TCP
    assert by_address["/ip4/198.51.100.1/tcp/1"].stage is Stage.GATE
    assert "deny list" in str(by_address["/ip4/198.51.100.1/tcp/1"])
    assert "only TCP" in str(by_address["/ip4/11.0.0.8/udp/1/quic-v1"].error)
    assert by_address[ADDRESS].stage is Stage.NOISE
    assert isinstance(by_address[ADDRESS].error, PeerIdMismatch)
    assert len(told.of(AddressFailed)) == len(error.failures) == 7
    (failed,) = told.of(DialFailed)
    assert failed.target == carol
    assert alice.admission.in_use()["max_connections"] == 0


async def test_a_name_server_that_does_not_answer_holds_up_only_its_names(
    internet: MemoryInternet, alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    internet.name_delay = 5
    internet.names["/dns4/bob.example.org/tcp/1"] = [ADDRESS]
    async with running(alice), running(bob, ADDRESS):
        started = trio.current_time()
        connection = await alice.dial(bob.peer, ["/dns4/bob.example.org/tcp/1", ADDRESS])
        assert trio.current_time() - started == pytest.approx(0.04)
        await connection.close()
        await alice.dial(bob.peer, ["/dns4/bob.example.org/tcp/1"])
        assert alice_host.dialed == [ADDRESS, ADDRESS]


async def test_one_self_is_not_dialed(alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(alice_host, 1)
    address = "/ip4/11.0.0.1/tcp/5"
    async with running(alice, address):
        with pytest.raises(DialError, match="this node itself"):
            await alice.dial(alice.peer, [address])
        with pytest.raises(DialError, match="this node itself"):
            await alice.dial(None, [address])
        alice._last_addresses = ()  # as behind a NAT, where only the handshake tells
        with pytest.raises(DialError, match="this node itself"):
            await alice.dial(None, [address])
        await trio.sleep(1)
        assert alice.all_connections() == []
        assert alice.admission.in_use()["max_connections"] == 0


async def test_what_can_not_be_dialed_says_so(alice_host: MemoryHost, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, carol = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (2, 3))
    async with running(alice):
        with pytest.raises(DialError, match="no address of it is known"):
            await alice.dial(bob, [])
        with pytest.raises(AddressError, match="another peer"):
            await alice.dial(bob, [f"{ADDRESS}/p2p/{carol}"])
        with pytest.raises(AddressError, match="exactly one"):
            await alice.dial(None, [ADDRESS, "/ip4/11.0.0.3/tcp/1"])


async def test_at_most_so_many_addresses_of_a_peer_are_tried(alice_host: MemoryHost, autojump_clock: MockClock) -> None:
    alice, _ = make_swarm(alice_host, 1, Config(dial=DialConfig(max_addresses=4)))
    async with running(alice):
        with pytest.raises(DialError):
            await alice.dial(
                Identity.from_seed(bytes([2]) * 32).peer_id, [f"/ip4/11.1.{n}.1/tcp/1" for n in range(100)]
            )
    assert len(alice_host.dialed) == 4


# Limits and the gate


async def test_refusal_costs_no_handshake(
    internet: MemoryInternet, alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2, Config(deny=("11.0.0.1",)))
    async with running(alice), running(bob, ADDRESS):
        with pytest.raises(DialError):
            await alice.dial(bob.peer, [ADDRESS])
        (pipe,) = internet.pipes
        assert pipe[1].closed == "aborted"
        assert pipe[1].sent == 0
        assert [event.reason for event in told.of(InboundRefused)] == ["deny"]
        assert bob.events.counts["inbound-refused", "deny"] == 1


async def test_a_denied_peer_is_refused_once_proven(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, told_alice = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2, Config(deny=(alice.peer,)))
    async with running(alice), running(bob, ADDRESS):
        await alice.dial(bob.peer, [ADDRESS])  # up for us, until the other side has spoken
        await trio.sleep(1)
        assert [event.reason for event in told.of(InboundRefused)] == ["deny"]
        assert told.of(ConnectionOpened) == []
        assert bob.admission.in_use()["max_connections"] == 0
        assert len(told_alice.of(ConnectionClosed)) == 1
        with pytest.raises(Refused, match="deny list"):
            await bob.dial(alice.peer, ["/ip4/11.0.0.1/tcp/1"])


async def test_a_ban_ends_what_there_is_and_keeps_out(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        for target in (alice.peer, "11.0.0.1"):
            await alice.dial(bob.peer, [ADDRESS])
            await trio.sleep(0.1)
            bob.ban(target, 60)
            await trio.sleep(0.1)
            assert bob.all_connections() == alice.all_connections() == []
            assert told.of(ConnectionClosed)[-1].reason == "the peer was banned"
            refused = len(told.of(InboundRefused))
            if target == alice.peer:  # known only by its handshake, of which it sees the end as a success
                await (await alice.dial(bob.peer, [ADDRESS])).connection.wait_closed()
            else:
                with pytest.raises(DialError):
                    await alice.dial(bob.peer, [ADDRESS])
            assert [event.reason for event in told.of(InboundRefused)[refused:]] == ["ban"]
            await trio.sleep(61)
        await alice.dial(bob.peer, [ADDRESS])
    assert [event.target for event in told.of(Banned)] == [alice.peer, "11.0.0.1"]


async def test_the_policy_decides_before_and_after_the_handshake(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2)
    bob.admission.policy = lambda candidate: "not today" if candidate.peer == alice.peer else None
    async with running(alice), running(bob, ADDRESS):
        await alice.dial(bob.peer, [ADDRESS])
        await trio.sleep(0.1)
        assert [event.reason for event in told.of(InboundRefused)] == ["policy"]
        assert bob.all_connections() == []


async def test_limits_are_released_whatever_ends_a_connection(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    limits = Limits(max_per_peer=1, max_inbound=1, max_per_ip=1, max_pending_inbound=1, max_connections=1)
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2, Config(limits=limits))

    async def by_peer(ours: SwarmConnection, theirs: SwarmConnection) -> None:
        await theirs.close()

    async def by_us(ours: SwarmConnection, theirs: SwarmConnection) -> None:
        await ours.close()

    async def by_abort(ours: SwarmConnection, theirs: SwarmConnection) -> None:
        theirs.connection.abort()

    async def by_garbage(ours: SwarmConnection, theirs: SwarmConnection) -> None:
        await theirs.connection._raw.send_all(b"\x00\x20" + bytes(32))

    async with running(alice), running(bob, ADDRESS):
        for end in (by_peer, by_us, by_abort, by_garbage):
            for _ in range(3):
                connection = await alice.dial(bob.peer, [ADDRESS])
                await trio.sleep(0.1)
                (there,) = bob.connections_to(alice.peer)
                await end(there, connection)
                await trio.sleep(2)
                assert bob.all_connections() == alice.all_connections() == []
                assert set(bob.admission.in_use().values()) == {0}
    assert len(told.of(ConnectionClosed)) == 12
    assert [event.layer for event in told.of(PeerMisbehaved)] == ["noise"] * 3


async def test_a_peer_that_comes_back_replaces_its_idle_connection(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1, Config(limits=Limits(max_per_peer=9)))
    bob, told = make_swarm(bob_host, 2, Config(limits=Limits(max_per_peer=2)))
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):
        first, second = [await alice.dial(bob.peer, [ADDRESS], fresh=True) for _ in range(2)]
        busy = await first.open_stream(ECHO)
        await busy.send_all(b"x")
        await busy.receive_some()
        await alice.dial(bob.peer, [ADDRESS], fresh=True)
        await trio.sleep(0.1)
        assert first in alice.all_connections()
        assert second not in alice.all_connections()
        assert told.of(ConnectionClosed)[-1].reason == "it was replaced by a newer connection"
        for connection in alice.all_connections():
            stream = await connection.open_stream(ECHO)
            await stream.send_all(b"x")
            await stream.receive_some()
        await alice.dial(bob.peer, [ADDRESS], fresh=True)
        await trio.sleep(0.1)
        assert [event.reason for event in told.of(InboundRefused)] == ["max_per_peer"]
        assert len(bob.connections_to(alice.peer)) == 2


async def test_idle_connections_are_closed_and_used_ones_are_not(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1, Config(limits=Limits(idle_timeout=1e6)))
    bob, told = make_swarm(bob_host, 2, Config(limits=Limits(idle_timeout=60)))
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        stream = await connection.open_stream(ECHO)
        await stream.send_all(b"x")
        await trio.sleep(600)
        assert len(bob.all_connections()) == 1
        await stream.aclose()
        started = trio.current_time()
        await connection.connection.wait_closed()
        assert 60 <= trio.current_time() - started <= 80
        await trio.sleep(0.1)
        (closed,) = told.of(ConnectionClosed)
        assert closed.reason == "it was idle for 60 s"
        await alice.dial(bob.peer, [ADDRESS])
        await trio.sleep(0.1)
        bob.protect(bob.all_connections()[0].peer_id, "relay")
        await trio.sleep(600)
        assert len(bob.all_connections()) == 1


async def test_1000_connections_leave_nothing_behind(
    alice_host: MemoryHost, bob_host: MemoryHost, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    alice, told_alice = make_swarm(alice_host, 1)
    bob, told_bob = make_swarm(bob_host, 2)
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):

        async def round_trip(n: int) -> None:
            connection = await alice.dial(bob.peer, [ADDRESS])
            stream = await connection.open_stream(ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            match n % 3:
                case 0:
                    await connection.close()
                case 1:
                    connection.connection.abort()
                case _:
                    await bob.disconnect(alice.peer)
            await trio.sleep(2)
            internet.pipes.clear()
            told_alice.events.clear()
            told_bob.events.clear()

        for n in range(20):
            await round_trip(n)
        gc.collect()
        tasks, objects = _tasks(), len(gc.get_objects())
        for n in range(1000):
            await round_trip(n)
        gc.collect()
        assert _tasks() == tasks
        assert len(gc.get_objects()) - objects < 200  # a few per connection would be thousands
        for swarm in (alice, bob):
            assert set(swarm.admission.in_use().values()) == {0}
            assert swarm.connections == {}
            assert swarm._feeds == {}
        assert bob.events.counts["connection-opened", ""] == 1020


def _tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_failures_at_each_stage_leave_nothing_behind(
    internet: MemoryInternet, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    bob, told = make_swarm(bob_host, 2, Config(limits=Limits(max_pending_inbound=2)))
    where = addresses.parse(ADDRESS)
    stages = [
        b"",
        b"\x13/multistream/1.0.0\n",
        b"\x13/multistream/1.0.0\n\x07/noise\n",
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(32),
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20" + bytes(range(32)) + b"\x00\x10" + bytes(16),
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    async with running(bob, ADDRESS):
        tasks = _tasks()
        for n, sent in enumerate(stages * 5):
            raw = await internet.host(f"11.1.0.{n}").dial(where)
            if sent:
                await raw.send_all(sent)
            match n % 3:
                case 0:
                    await trio.sleep(11)  # silent for longer than the handshake may take
                case 1:
                    await raw.aclose()
                case _:
                    raw.abort()
            await trio.sleep(0.1)
        await trio.sleep(11)
        assert _tasks() == tasks
        assert set(bob.admission.in_use().values()) == {0}
    failed = told.of(UpgradeFailed)
    assert len(failed) == 30
    assert {event.stage for event in failed} == {Stage.SECURITY_NEGOTIATION, Stage.NOISE}
    assert all(event.reason for event in failed)
    assert all(there.closed for _, there in internet.pipes)


async def test_silent_ones_take_no_room_for_long(
    internet: MemoryInternet, alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2, Config(limits=Limits(max_pending_inbound=8)))
    async with running(alice), running(bob, ADDRESS):
        for n in range(20):
            await internet.host(f"11.1.0.{n}").dial(addresses.parse(ADDRESS))
        await trio.sleep(0.1)
        assert [event.reason for event in told.of(InboundRefused)] == ["max_pending_inbound"] * 12
        await trio.sleep(10)
        assert len(told.of(UpgradeFailed)) == 8
        started = trio.current_time()
        await alice.dial(bob.peer, [ADDRESS])
        assert trio.current_time() - started < 0.1


# Streams


async def test_a_handler_that_fails_touches_nothing_else(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2)

    async def fails(stream: YamuxStream) -> None:
        await stream.receive_some()
        raise KeyError("what a pity")

    async def fails_in_a_nursery(stream: YamuxStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await fails(stream)

    bob.handle("/fails/1", fails)
    bob.handle("/fails/2", fails_in_a_nursery)
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        well = await connection.open_stream(ECHO)
        for protocol in ("/fails/1", "/fails/2"):
            bad = await connection.open_stream(protocol)
            await bad.send_all(b"x")
            with pytest.raises(StreamReset):
                await bad.receive_some()
        await well.send_all(b"still here")
        assert await well.receive_some() == b"still here"
    failed = told.of(HandlerFailed)
    assert [event.protocol for event in failed] == ["/fails/1", "/fails/2"]
    assert failed[0].reason == "KeyError: 'what a pity'"
    assert failed[0].peer == alice.peer


async def test_a_peer_that_leaves_is_no_failure_of_the_handler(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2)
    bob.handle(ECHO, echo)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        for _ in range(2):
            stream = await connection.open_stream(ECHO)
            await stream.send_all(b"x")
            await stream.receive_some()
            stream.reset()
        await stream.connection.open_stream(ECHO)
        connection.connection.abort()
        await trio.sleep(1)
    assert told.of(HandlerFailed) == []


async def test_a_handler_that_returns_closes_its_stream(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)

    async def greet(stream: YamuxStream) -> None:
        await stream.send_all(b"good day")

    bob.handle("/greet/1", greet)
    async with running(alice), running(bob, ADDRESS):
        stream = await (await alice.dial(bob.peer, [ADDRESS])).open_stream("/greet/1")
        assert await stream.receive_some() == b"good day"
        assert await stream.receive_some() == b""


async def test_streams_of_a_protocol_are_limited(
    alice_host: MemoryHost, bob_host: MemoryHost, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    carol, _ = make_swarm(internet.host("11.0.0.3"), 3)
    bob, told = make_swarm(bob_host, 2)
    bob.handle(ECHO, echo, max_streams=3, max_per_peer=2)
    async with running(alice), running(carol), running(bob, ADDRESS):
        to_bob = await alice.dial(bob.peer, [ADDRESS])
        streams = []
        for _ in range(3):
            streams.append(await to_bob.open_stream(ECHO))
            await trio.sleep(0.1)  # of those that come at once, any may be first
        with pytest.raises(StreamReset) as caught:
            await streams[2].receive_some()
        assert caught.value.code == 0x1002
        others = []
        for _ in range(2):
            others.append(await (await carol.dial(bob.peer, [ADDRESS])).open_stream(ECHO))
            await trio.sleep(0.1)
        with pytest.raises(StreamReset):
            await others[1].receive_some()
        assert [event.reason for event in told.of(LimitHit)] == ["max_streams_per_peer", "max_streams"]
        await streams[0].aclose()
        await trio.sleep(0.1)
        again = await to_bob.open_stream(ECHO)
        await again.send_all(b"x")
        assert await again.receive_some() == b"x"


async def test_a_stream_that_agrees_on_nothing_is_told_and_bounded(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, told = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        connection = await alice.dial(bob.peer, [ADDRESS])
        bare = await connection.open_stream()
        await trio.sleep(10.5)
        with pytest.raises(StreamReset):
            await bare.receive_some()
        (failed,) = told.of(StreamFailed)
        assert (failed.peer, failed.reason) == (alice.peer, "the peer did not finish stream negotiation within 10 s")
        assert bob.all_connections()[0].connection.streams == []


# Addresses


async def test_addresses_follow_the_interfaces(alice_host: MemoryHost, autojump_clock: MockClock) -> None:
    alice, told = make_swarm(alice_host, 1)
    seen: list[tuple[str, ...]] = []
    alice.on_addresses.append(lambda: seen.append(alice.listen_addresses()))
    alice_host.extra.append("/ip6/2d00::1/tcp/1")
    async with running(alice, "/ip4/0.0.0.0/tcp/1"):
        await wait_all_tasks_blocked()
        alice_host.extra[:] = ["/ip6/2d00::2/tcp/1"]
        alice_host.changed.set()
        await wait_all_tasks_blocked()
        alice_host.changed.set()
        await wait_all_tasks_blocked()
    assert seen == [
        ("/ip4/11.0.0.1/tcp/1", "/ip6/2d00::1/tcp/1"),
        ("/ip4/11.0.0.1/tcp/1", "/ip6/2d00::2/tcp/1"),
    ]
    assert [event.addresses for event in told.of(AddressesChanged)] == seen


# Byte pipes from elsewhere


async def test_roles_and_path_of_a_given_pipe(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    relay = Identity.from_seed(bytes([3]) * 32).peer_id
    here, there = memory_pair()
    path = Path(PathKind.RELAYED, relay)
    found: list[SwarmConnection] = []
    async with running(alice), running(bob):
        async with trio.open_nursery() as nursery:

            async def upgrade() -> None:
                found.append(await alice.upgrade_raw(here, peer=bob.peer, initiator=False, path=path))

            nursery.start_soon(upgrade)
            connection = await bob.upgrade_raw(there, peer=alice.peer, initiator=True, path=path)
        assert connection.path == found[0].path == path
        assert (connection.is_initiator, found[0].is_initiator) == (True, False)
        direct, _ = await connection_beside(alice, bob, connection)
        assert alice.connection_to(bob.peer) is direct


async def test_who_hears_that_a_connection_is_up_may_stop_whoever_made_it(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    """As an upgrader does: it needs no other dial any more."""
    alice, _ = make_swarm(alice_host, 1)
    bob, _ = make_swarm(bob_host, 2)
    here, there = memory_pair(delay=0.01)
    async with running(alice), running(bob), trio.open_nursery() as nursery:
        stopped = trio.CancelScope()
        alice.on_connected.append(lambda _: stopped.cancel())
        nursery.start_soon(lambda: bob.upgrade_raw(there, peer=alice.peer, initiator=False))
        with stopped:
            await alice.upgrade_raw(here, peer=bob.peer, initiator=True)
        connection = alice.connection_to(bob.peer)
        assert connection is not None
        await connection.connection.ping()


async def connection_beside(alice: object, bob: object, other: object) -> tuple[SwarmConnection, SwarmConnection]:
    from kas_libp2p.swarm import Swarm

    assert isinstance(alice, Swarm)
    assert isinstance(bob, Swarm)
    await bob.listen(addresses.parse(ADDRESS))
    ours = await alice.dial(bob.peer, [ADDRESS], fresh=True)
    return ours, bob.connections_to(alice.peer)[-1]


async def test_a_swarm_that_does_not_run_says_so(alice_host: MemoryHost) -> None:
    alice, _ = make_swarm(alice_host, 1)
    with pytest.raises(ConnectionLost, match="not running"):
        await alice.dial(Identity.from_seed(bytes([2]) * 32).peer_id, [ADDRESS])
    here, _there = memory_pair()
    with pytest.raises(ConnectionLost, match="not running"):
        await alice.upgrade_raw(here, peer=None, initiator=True)
    assert here.closed == "aborted"


async def test_one_address_is_dialed_from_a_fresh_port_unless_it_is_forbidden(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[str] = []

    async def dial_fresh(address: Multiaddr) -> MemoryRaw:
        fresh.append(str(address))
        return await alice_host.dial(address)

    monkeypatch.setattr(alice_host, "dial_fresh", dial_fresh)
    alice, _ = make_swarm(alice_host, 1, Config(deny=("11.0.0.3",)))
    bob, _ = make_swarm(bob_host, 2)
    own, closed = "/ip4/11.0.0.1/tcp/1", "/ip4/11.0.0.4/tcp/1"
    async with running(alice, own), running(bob, ADDRESS):
        connection = await alice.dial_from_fresh_port(bob.peer, ADDRESS)
        assert (connection.peer, connection.path, connection.is_initiator) == (bob.peer, DIRECT, True)
        with pytest.raises(DialError, match="Connection refused"):
            await alice.dial_from_fresh_port(bob.peer, closed)
        assert fresh == [ADDRESS, closed]
        alice.ban("11.0.0.4", 10)
        for forbidden in ("/ip4/11.0.0.3/tcp/1", closed, own, f"{ADDRESS}/p2p/{alice.peer}"):
            with pytest.raises((Refused, AddressError)):
                await alice.dial_from_fresh_port(bob.peer, forbidden)
        assert fresh == [ADDRESS, closed]


async def test_who_dials_as_the_swarm_ends_is_told_so(alice_host: MemoryHost, autojump_clock: MockClock) -> None:
    for ticks in [*range(4)] * 5:  # tasks end in any order
        alice, _ = make_swarm(alice_host, 1)

        async def dial(alice: Swarm = alice, ticks: int = ticks) -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                    with pytest.raises(ConnectionLost):
                        await alice.dial(BOB.peer_id, [ADDRESS])

        async with trio.open_nursery() as node:
            await node.start(alice.carry)
            node.start_soon(dial)
            await wait_all_tasks_blocked()
            node.cancel_scope.cancel()


async def test_a_connection_is_gone_if_who_is_told_of_it_fails(
    alice_host: MemoryHost, bob_host: MemoryHost, autojump_clock: MockClock
) -> None:
    def mistaken(connection: SwarmConnection) -> None:
        raise ZeroDivisionError

    alice, told_alice = make_swarm(alice_host, 1)
    bob, told_bob = make_swarm(bob_host, 2)
    async with running(alice), running(bob, ADDRESS):
        for swarm, told in ((bob, told_bob), (alice, told_alice)):
            swarm.on_connected.append(mistaken)
            with suppress(DialError, ConnectionLost):
                await alice.dial(bob.peer, [ADDRESS])
            await trio.sleep(1)
            assert alice.all_connections() == bob.all_connections() == []
            assert told.of(InternalError)[0].reason.startswith("ZeroDivisionError")
            assert set(swarm.admission.in_use().values()) == {0}
            swarm.on_connected.remove(mistaken)
        assert (await alice.dial(bob.peer, [ADDRESS])).peer == bob.peer
