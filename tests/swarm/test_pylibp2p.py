"""py-libp2p's own services on our swarm, with ours and with theirs at the other end.

Over loopback TCP, as their side has no other network.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.exceptions import StreamFailure
from libp2p.host.ping import ID as PING
from libp2p.host.ping import PingService
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from kas_libp2p.config import Config, Limits
from kas_libp2p.identity import Identity
from kas_libp2p.swarm import Swarm
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.network import RecordingBus, eventually

ANY = Multiaddr("/ip4/127.0.0.1/tcp/0")
ECHO = TProtocol("/echo/1")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of theirs
    pytest.mark.usefixtures("their_sockets"),
]


@pytest.fixture
def their_sockets() -> Iterator[None]:
    """What they leave open is found here, and not in another test."""
    yield
    gc.collect()


async def echo(stream: INetStream) -> None:
    try:
        while True:
            await stream.write(await stream.read(1024))
    except StreamEOF:
        await stream.close()


@asynccontextmanager
async def ours(config: Config | None = None) -> AsyncIterator[tuple[BasicHost, Swarm]]:
    swarm = Swarm(Identity.generate(), config, events=RecordingBus())
    host = BasicHost(swarm)
    host.set_stream_handler(ECHO, echo)
    async with host.run([ANY]):
        yield host, swarm


@asynccontextmanager
async def stock() -> AsyncIterator[IHost]:
    host = new_host(key_pair=create_new_key_pair())
    host.set_stream_handler(ECHO, echo)
    async with host.run([ANY]):
        yield host


def where(host: IHost) -> PeerInfo:
    address = host.get_network().listeners
    return PeerInfo(host.get_id(), [each for listener in address.values() for each in listener.get_addrs()])


async def speak(host: IHost, other: ID) -> None:
    stream = await host.new_stream(other, [TProtocol("/not/there"), ECHO])
    assert stream.get_protocol() == ECHO
    await stream.write(b"good day")
    assert await stream.read(8) == b"good day"
    await stream.close()


async def test_a_host_on_ours_speaks_with_another_on_ours() -> None:
    async with ours() as (alice, alice_swarm), ours() as (bob, _):
        await alice.connect(where(bob))
        await speak(alice, bob.get_id())
        await speak(bob, alice.get_id())
        connection = alice_swarm.get_connection(bob.get_id())
        assert connection is not None
        assert alice.get_connected_peers() == [bob.get_id()]
        await alice.disconnect(bob.get_id())
        assert alice.get_connected_peers() == []


async def test_a_host_on_ours_dials_a_stock_host() -> None:
    async with ours() as (alice, _), stock() as bob:
        await alice.connect(where(bob))
        await speak(alice, bob.get_id())
        await speak(bob, alice.get_id())


async def test_a_stock_host_dials_a_host_on_ours() -> None:
    async with ours() as (alice, _), stock() as bob:
        await bob.connect(where(alice))
        await speak(bob, alice.get_id())
        await speak(alice, bob.get_id())


async def test_their_ping_and_identify_run_on_ours() -> None:
    async with ours() as (alice, _), stock() as bob:
        await alice.connect(where(bob))
        assert (await PingService(alice).ping(bob.get_id()))[0] >= 0
        assert (await PingService(bob).ping(alice.get_id()))[0] >= 0
        await eventually(lambda: PING in _known_protocols(alice, bob.get_id()))
        await eventually(lambda: ECHO in _known_protocols(bob, alice.get_id()))
        assert alice.get_addrs()


def _known_protocols(host: IHost, peer: ID) -> list[str]:
    return list(host.get_peerstore().get_protocols(peer)) if host.get_peerstore().has_peer(peer) else []


async def test_ours_and_theirs_are_served_side_by_side() -> None:
    async with ours() as (alice, swarm), stock() as bob:

        async def greet(stream: YamuxStream) -> None:
            await stream.send_all(b"ours")

        swarm.handle("/greet/1", greet)
        await bob.connect(where(alice))
        await speak(bob, alice.get_id())
        stream = await bob.new_stream(alice.get_id(), [TProtocol("/greet/1")])
        assert await stream.read(4) == b"ours"
        listed = await ours_listing(swarm)
        assert {"/greet/1", str(ECHO), str(PING)} <= set(listed)
        with pytest.raises(StreamFailure):
            await bob.new_stream(alice.get_id(), [TProtocol("/nobody/1")])


async def ours_listing(swarm: Swarm) -> tuple[str, ...]:
    await trio.lowlevel.checkpoint()
    return swarm.protocols()


async def test_a_failing_handler_of_theirs_resets_only_its_stream() -> None:
    async with ours() as (alice, swarm), stock() as bob:

        async def fails(stream: INetStream) -> None:
            raise RuntimeError("their bug")

        alice.set_stream_handler(TProtocol("/fails/1"), fails)
        await bob.connect(where(alice))
        with pytest.raises((StreamFailure, StreamReset, StreamEOF)):  # whichever their side notices first
            await (await bob.new_stream(alice.get_id(), [TProtocol("/fails/1")])).read(1)
        await speak(bob, alice.get_id())
        assert swarm.events.counts["handler-failed", ""] == 1


async def test_a_handler_before_negotiation_gets_the_bare_stream() -> None:
    swarm = Swarm(Identity.generate())
    seen: list[bytes] = []

    async def raw(stream: INetStream) -> None:
        seen.append(await stream.read(1))

    swarm.set_stream_handler(raw)
    async with background_trio_service(swarm), ours() as (_, dialer):
        await swarm.listen(ANY)
        connection = await dialer.dial(swarm.peer, swarm.listen_addresses())
        stream = await connection.open_stream()
        await stream.send_all(b"x")
        assert await stream.receive_some() == b""
    assert b"x" in seen  # beside what the identify of the other host says


class Recorder(INotifee):
    """Tells what it was told; or is stuck."""

    def __init__(self, stuck: bool = False) -> None:
        self.stuck = stuck
        self.seen: list[str] = []

    async def _tell(self, what: str) -> None:
        self.seen.append(what)
        if self.stuck:
            await trio.sleep_forever()

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        await self._tell("opened stream")

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        await self._tell("closed stream")

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        await self._tell("connected")

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        await self._tell("disconnected")

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await self._tell("listen")

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        await self._tell("listen close")


async def test_a_stuck_notifee_stalls_nobody_and_the_others_hear_all_in_order() -> None:
    async with ours() as (alice, swarm), ours() as (bob, _):
        stuck, well = Recorder(stuck=True), Recorder()
        swarm.register_notifee(stuck)
        swarm.register_notifee(well)
        await alice.connect(where(bob))
        await speak(alice, bob.get_id())
        await alice.disconnect(bob.get_id())
        await eventually(lambda: "disconnected" in well.seen)
        assert stuck.seen == ["connected"]
        assert well.seen[0] == "connected"
        assert "opened stream" in well.seen
        assert "closed stream" in well.seen
        swarm.remove_notifee(stuck)


async def test_failures_are_theirs_to_understand() -> None:
    async with ours() as (alice, swarm):
        nobody = ID.from_base58(Identity.generate().peer_id)
        with pytest.raises(SwarmException, match="no address"):
            await swarm.new_stream(nobody)
        with pytest.raises(SwarmException):
            await alice.connect(PeerInfo(nobody, [Multiaddr("/ip4/127.0.0.1/tcp/1")]))


# Defects of the base (facts about py-libp2p 0.8.1) that must not show


async def test_inbound_slots_come_back() -> None:
    config = Config(limits=Limits(max_connections=2, max_inbound=1, max_per_peer=1))
    async with ours(config) as (alice, swarm), ours() as (bob, _):
        for _ in range(10):
            await bob.connect(where(alice))
            await speak(bob, alice.get_id())
            await bob.disconnect(alice.get_id())
            await eventually(lambda: not swarm.all_connections())


async def test_connecting_and_closing_wait_for_nothing(autojump_clock: trio.testing.MockClock) -> None:
    from tests.network import MemoryInternet, make_swarm, running

    internet = MemoryInternet()
    alice, _ = make_swarm(internet.host("11.0.0.1"), 1)
    bob, _ = make_swarm(internet.host("11.0.0.2"), 2)
    async with running(alice), running(bob, "/ip4/11.0.0.2/tcp/1"):
        started = trio.current_time()
        connection = await alice.dial(bob.peer, ["/ip4/11.0.0.2/tcp/1"])
        await connection.close()
        assert trio.current_time() == started  # the clock moves only if somebody sleeps


async def test_plaintext_is_not_spoken() -> None:
    async with ours() as (alice, swarm):
        (address,) = where(alice).addrs
        stream = await trio.open_tcp_stream("127.0.0.1", int(address.value_for_protocol("tcp") or 0))
        async with stream:
            await stream.send_all(b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n")
            got = b""
            while not got.endswith(b"na\n"):
                got += await stream.receive_some()
        assert swarm.all_connections() == []


async def test_nobody_is_dialed_that_was_not_asked_for() -> None:
    async with ours() as (alice, swarm), ours() as (bob, _):
        info = where(bob)
        alice.get_peerstore().add_addrs(info.peer_id, info.addrs, 1000)
        await trio.sleep(0.05)
        assert swarm.events.counts["dialing", ""] == 0
        assert swarm.all_connections() == []


async def test_wildcards_are_expanded_and_ipv6_has_addresses() -> None:
    async with ours() as (alice, swarm), ours() as (bob, bob_swarm):
        await swarm.listen(Multiaddr("/ip4/0.0.0.0/tcp/0"), Multiaddr("/ip6/::1/tcp/0"))
        shown = list(map(str, alice.get_addrs()))
        assert not any("0.0.0.0" in each for each in shown)
        (v6,) = [each for each in swarm.listen_addresses() if each.startswith("/ip6/::1/")]
        connection = await bob_swarm.dial(swarm.peer, [v6])
        assert list(map(str, connection.get_transport_addresses())) == [v6]
        assert connection.get_remote_address() == ("::1", int(v6.rpartition("/")[2]))
        assert bob.get_connected_peers() == [alice.get_id()]


def test_its_dead_parts_hold_nothing() -> None:
    swarm = Swarm(Identity.generate())
    assert swarm.notifees == []
    assert OrderedDict(swarm.connections) == OrderedDict()
