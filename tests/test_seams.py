"""The two seams: which way a target leads, what falls back, and which Kaspa stream belongs on a connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p import seams
from kas_libp2p.config import Config, Mode
from kas_libp2p.errors import (
    AddressError,
    ConnectionLost,
    DialError,
    KasError,
    NegotiationError,
    Refused,
    SessionLost,
    StreamReset,
)
from kas_libp2p.events import HandlerFailed, InternalError
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, Dialect, Direction, OverlayStream, PeerId
from kas_libp2p.node import Node, open_node
from kas_libp2p.seams import (
    KASPA,
    MAX_COOLDOWNS,
    OVERLAY_TIMEOUT,
    TCP_TIMEOUT,
    KaspaStreams,
    OutboundConnector,
    TcpStream,
    serve_with_incoming,
)
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.kaspa.overlay import overlay_pair
from tests.network import MemoryInternet

PEER = Identity.from_seed(b"p" * 32).peer_id
Handler = Callable[[OverlayStream], Awaitable[None]]


# -- OutboundConnector -------------------------------------------------------------------------------------------------


@dataclass
class FakeOverlay:
    """An overlay whose dials end as they are told to.

    Attributes:
        answer: what they raise; ``None`` for a stream, ``...`` for no answer ever.
        asked: every target, with the addresses that were given beside it.
        known: peers by where they are known to be.
    """

    config: Config = field(default_factory=Config)
    answer: KasError | None = None
    silent: bool = False
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    known: dict[tuple[str, int], PeerId] = field(default_factory=dict)

    async def connect(
        self, target: str, protocol: str | Sequence[str] = KASPA, *, addresses: Iterable[str] = ()
    ) -> OverlayStream:
        await trio.lowlevel.checkpoint()
        assert tuple(protocol) == KASPA
        self.asked.append((target, tuple(addresses)))
        if self.silent:
            await trio.sleep_forever()
        if self.answer is not None:
            raise self.answer
        return overlay_pair()[0]

    async def serve(self, handler: Handler, protocol: str | Sequence[str] = KASPA) -> None:
        raise NotImplementedError

    def known_peer_at(self, ip: str, port: int) -> PeerId | None:
        return self.known.get((ip, port))


@dataclass
class Kaspad:
    """A TCP listener, and how often it was dialed."""

    target: str
    dialed: int = 0


@asynccontextmanager
async def kaspad() -> AsyncIterator[Kaspad]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        here = Kaspad(f"127.0.0.1:{listener.socket.getsockname()[1]}")

        async def echo(stream: trio.SocketStream) -> None:
            here.dialed += 1
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(trio.serve_listeners, echo, [listener])
        yield here
        nursery.cancel_scope.cancel()


async def by_plain_tcp(connector: OutboundConnector, target: str) -> bool:
    """Connect. Whether that was past the overlay."""
    async with await connector.connect(target) as stream:
        return isinstance(stream, TcpStream)


async def test_off_is_plain_tcp_and_nothing_else() -> None:
    overlay = FakeOverlay(Config(mode=Mode.OFF))
    connector = OutboundConnector(overlay)
    async with kaspad() as node:
        stream = await connector.connect(node.target)
        metadata = stream.metadata
        assert (metadata.peer, metadata.dialect, metadata.path) == (None, None, DIRECT)
        assert (metadata.initiator, metadata.direction) == (True, Direction.OUTBOUND)
        host, _, port = node.target.partition(":")
        assert metadata.remote_address == f"/ip4/{host}/tcp/{port}"
        await stream.send_all(b"hello")
        await stream.send_eof()
        assert await stream.receive_some() == b"hello"
        assert await stream.receive_some() == b""
        await stream.aclose()
        for target in (PEER, f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"):
            with pytest.raises(Refused, match="mode is off") as caught:
                await connector.connect(target)
            assert caught.value.limit == "mode"
        assert overlay.asked == []


async def test_bridge_takes_the_overlay_where_it_leads() -> None:
    overlay = FakeOverlay(known={("127.0.0.1", 2): PEER})
    connector = OutboundConnector(overlay)
    for target, asked in (
        ("127.0.0.1:1", "/ip4/127.0.0.1/tcp/1"),
        ("127.0.0.1:2", PEER),
        ("[2001:db8::1]:3", "/ip6/2001:db8::1/tcp/3"),
        ("node.example:4", "/dns/node.example/tcp/4"),
    ):
        stream = await connector.connect(target, addresses=["/ip4/127.0.0.1/tcp/9"])
        assert stream.metadata.dialect is Dialect.MESSAGES
        assert overlay.asked.pop() == (asked, ("/ip4/127.0.0.1/tcp/9",))


async def test_bridge_falls_back_and_leaves_that_address_alone_for_ten_minutes(mock_clock: MockClock) -> None:
    overlay = FakeOverlay(answer=DialError("it"))
    connector = OutboundConnector(overlay)
    async with kaspad() as one, kaspad() as other:
        assert await by_plain_tcp(connector, one.target)
        assert len(overlay.asked) == 1
        assert connector.cooling(one.target) == 600
        mock_clock.jump(599)
        assert await by_plain_tcp(connector, one.target)
        assert len(overlay.asked) == 1, "it is left alone"
        assert await by_plain_tcp(connector, other.target)
        assert len(overlay.asked) == 2, "the other is not"
        mock_clock.jump(1)
        overlay.answer = None
        assert not await by_plain_tcp(connector, one.target)
        assert connector.cooling(one.target) == 0
        assert (one.dialed, other.dialed) == (2, 1)


async def test_bridge_waits_for_the_overlay_as_long_as_kaspad_would(mock_clock: MockClock) -> None:
    connector = OutboundConnector(FakeOverlay(silent=True))
    ways: list[bool] = []

    async def connect(target: str) -> None:
        ways.append(await by_plain_tcp(connector, target))

    async with kaspad() as node, trio.open_nursery() as nursery:
        nursery.start_soon(connect, node.target)
        await wait_all_tasks_blocked()
        mock_clock.jump(OVERLAY_TIMEOUT - 0.1)
        await wait_all_tasks_blocked()
        assert ways == []
        mock_clock.jump(0.1)
    assert ways == [True]


async def test_our_own_no_is_no_reason_to_try_another_way() -> None:
    connector = OutboundConnector(FakeOverlay(answer=Refused("ban", "banned")))
    async with kaspad() as node:
        with pytest.raises(Refused, match="banned"):
            await connector.connect(node.target)
        assert node.dialed == 0
        assert connector.cooling(node.target) == 0


@pytest.mark.parametrize("mode", [Mode.BRIDGE, Mode.FULL])
async def test_a_named_peer_is_never_looked_for_by_plain_tcp(mode: Mode) -> None:
    overlay = FakeOverlay(Config(mode=mode), answer=DialError("it"))
    connector = OutboundConnector(overlay)
    async with kaspad() as node:
        host, _, port = node.target.partition(":")
        targets = (f"/ip4/{host}/tcp/{port}", f"/ip4/{host}/tcp/{port}/p2p/{PEER}", PEER)
        for target in targets:
            with pytest.raises(DialError, match="can't connect to it"):
                await connector.connect(target, addresses=["/ip4/127.0.0.1/tcp/1"])
            assert connector.cooling(target) == 0
        assert overlay.asked == [(target, ("/ip4/127.0.0.1/tcp/1",)) for target in targets]
        assert node.dialed == 0


async def test_full_looks_an_ip_and_port_up_among_known_peers_or_refuses_it_by_name() -> None:
    overlay = FakeOverlay(Config(mode=Mode.FULL), known={("127.0.0.1", 2): PEER})
    connector = OutboundConnector(overlay)
    assert not await by_plain_tcp(connector, "127.0.0.1:2")
    assert overlay.asked == [(PEER, ())]
    async with kaspad() as node:
        with pytest.raises(Refused, match=f"no known overlay peer is at {node.target}.*use mode bridge"):
            await connector.connect(node.target)
        overlay.answer = DialError("it")
        with pytest.raises(DialError):
            await connector.connect("127.0.0.1:2")
        assert node.dialed == 0


async def test_when_neither_way_leads_there_both_reasons_are_told(mock_clock: MockClock) -> None:
    connector = OutboundConnector(FakeOverlay(answer=NegotiationError("it speaks something else")))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    target = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    await listener.aclose()
    with pytest.raises(DialError) as caught:
        await connector.connect(target)
    assert "not by the overlay (it speaks something else), nor by plain TCP" in str(caught.value)
    (failure,) = caught.value.failures
    assert isinstance(failure.error, ConnectionRefusedError)


async def test_a_host_that_swallows_packets_is_given_up(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_answer(*_: object) -> trio.SocketStream:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "open_tcp_stream", no_answer)
    mock_clock.autojump_threshold = 0
    with pytest.raises(DialError, match=f"no answer within {TCP_TIMEOUT:g} s"):
        await OutboundConnector(FakeOverlay(), mode=Mode.OFF).connect("192.0.2.1:16111")
    assert trio.current_time() == TCP_TIMEOUT


async def test_few_cooldowns_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_COOLDOWNS >= 1000
    monkeypatch.setattr(seams, "MAX_COOLDOWNS", 1)
    connector = OutboundConnector(FakeOverlay(answer=DialError("it")), cooldown=60)
    async with kaspad() as one, kaspad() as other:
        for target in (one.target, other.target):
            assert await by_plain_tcp(connector, target)
        assert connector.cooling(one.target) == 0
        assert 59 < connector.cooling(other.target) <= 60


@pytest.mark.parametrize("target", ["", "somewhere", "127.0.0.1", "127.0.0.1:0x1", "/ip4/1.2.3"])
async def test_what_is_no_target(target: str) -> None:
    with pytest.raises(AddressError):
        await OutboundConnector(FakeOverlay()).connect(target)


async def test_reset_of_a_plain_stream() -> None:
    async with kaspad() as node:
        stream = await OutboundConnector(FakeOverlay(), mode=Mode.OFF).connect(node.target)
        stream.reset()
        stream.reset()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")


# -- serve_with_incoming, and one Kaspa stream per connection ----------------------------------------------------------


@asynccontextmanager
async def two_nodes(delay: float = 0.01) -> AsyncIterator[tuple[Node, Node]]:
    """Two nodes that serve nothing yet. Whatever happens, nothing of ours may go wrong."""
    internet = MemoryInternet(delay=delay)
    async with (
        open_node(
            Config(listen=("/ip4/10.0.0.1/tcp/1",)),
            identity=Identity.from_seed(b"a" * 32),
            network=internet.host("10.0.0.1"),
        ) as one,
        open_node(
            Config(listen=("/ip4/10.0.0.2/tcp/1",)),
            identity=Identity.from_seed(b"b" * 32),
            network=internet.host("10.0.0.2"),
        ) as other,
    ):
        yield one, other
        for node in (one, other):
            assert not {InternalError.name, HandlerFailed.name} & {name for name, _ in node.bus.counts}


class Incoming:
    """A handler that keeps every stream until it is told to let go.

    Attributes:
        streams: those that were handed over.
    """

    def __init__(self) -> None:
        self.streams: list[OverlayStream] = []
        self.let_go = trio.Event()

    async def __call__(self, stream: OverlayStream) -> None:
        self.streams.append(stream)
        await self.let_go.wait()


async def answer(stream: OverlayStream) -> None:
    """Says once what it heard, and ends as soon as the other side does."""
    try:
        while data := await stream.receive_some():
            await stream.send_all(data)
    except (KasError, trio.ClosedResourceError):
        pass  # it was reset


async def talks(stream: OverlayStream) -> bool:
    await stream.send_all(b"are you there")
    return await stream.receive_some() == b"are you there"


async def test_full_finds_a_peer_by_where_it_listens(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        await other.serve(answer)
        connector = OutboundConnector(one, mode=Mode.FULL)
        with pytest.raises(Refused, match=r"no known overlay peer is at 10\.0\.0\.2:1"):
            await connector.connect("10.0.0.2:1")
        await one.identify(other.addresses[0])
        await trio.sleep(1)
        stream = await connector.connect("10.0.0.2:1")
        assert await talks(stream)
        assert stream.metadata.peer == other.peer_id


async def test_bridge_mode_reaches_an_overlay_peer_by_ip_and_port_alone(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        await other.serve(answer)
        stream = await OutboundConnector(one, mode=Mode.BRIDGE).connect("10.0.0.2:1")
        assert await talks(stream)
        metadata = stream.metadata
        assert (metadata.peer, metadata.path, metadata.path.relay) == (other.peer_id, DIRECT, None)
        assert metadata.direction is Direction.OUTBOUND
        assert metadata.connection_opened_at <= metadata.stream_opened_at <= trio.current_time()


async def test_streams_are_handed_over_at_once_and_a_silent_peer_holds_up_nobody(autojump_clock: MockClock) -> None:
    internet = MemoryInternet(delay=0.01)
    incoming = Incoming()
    async with open_node(Config(listen=("/ip4/10.0.0.1/tcp/1",)), network=internet.host("10.0.0.1")) as node:
        await serve_with_incoming(node, incoming)
        for number in range(2, 10):
            # Each of them opens its stream and says nothing after that; no handler has returned.
            async with open_node(Config(listen=()), network=internet.host(f"10.0.0.{number}")) as peer:
                begun = trio.current_time()
                await peer.connect(node.addresses[0])
                await trio.sleep(0.05)
                assert trio.current_time() - begun < 0.5
                assert len(incoming.streams) == number - 1
                assert incoming.streams[-1].metadata.peer == peer.peer_id
        incoming.let_go.set()


@pytest.mark.parametrize(
    ("served", "spoken"), [(KASPA, Dialect.MESSAGES), ((Dialect.HTTP2,), Dialect.HTTP2)], ids=["ours", "foreign"]
)
async def test_the_metadata_says_which_dialect(
    served: tuple[str, ...], spoken: Dialect, autojump_clock: MockClock
) -> None:
    async with two_nodes() as (one, other):
        incoming = Incoming()
        await other.serve(incoming, served)
        stream = await one.connect(other.addresses[0])
        await trio.sleep(1)
        for end, initiator in ((stream, True), (incoming.streams[0], False)):
            assert (end.metadata.dialect, end.metadata.initiator) == (spoken, initiator)
        incoming.let_go.set()


@pytest.mark.parametrize("served", [KASPA, (Dialect.HTTP2,)], ids=["ours", "foreign"])
async def test_who_was_dialed_opens_our_dialect_on_that_connection_and_dials_for_http2(
    served: tuple[str, ...], autojump_clock: MockClock
) -> None:
    async with two_nodes() as (one, other):
        await one.serve(answer, served)
        await one.ping(other.addresses[0])
        stream = await other.connect(one.peer_id)
        assert await talks(stream)
        assert stream.metadata.initiator == (served != KASPA)
        assert len(one.connections) == (1 if served == KASPA else 2)


async def test_a_second_stream_is_refused_here_and_reset_there(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        await other.serve(answer)
        await one.serve(answer)
        stream = await one.connect(other.addresses[0])
        assert await talks(stream)
        for node, peer in ((one, other), (other, one)):
            with pytest.raises(Refused, match="there is a Kaspa stream with") as refused:
                await node.connect(peer.peer_id)
            assert refused.value.limit == "one_kaspa_stream"
        (connection,) = one.connections
        for dialect in KASPA:  # as a peer would that keeps to no rule
            surplus = await connection.connection.open_stream(dialect)
            with pytest.raises(StreamReset) as reset:
                await surplus.receive_some()
            assert reset.value.code == 0x1002
        assert other.status().limit_hits["one_kaspa_stream"] == 2
        assert await talks(stream), "it is not touched"


async def test_http2_from_whom_we_dialed_is_surplus(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        await one.serve(answer)
        await one.ping(other.addresses[0])
        (connection,) = other.connections
        surplus = await connection.connection.open_stream(Dialect.HTTP2)
        with pytest.raises(StreamReset):
            await surplus.receive_some()
        assert one.status().limit_hits["one_kaspa_stream"] == 1


async def test_of_two_that_are_opened_at_once_the_initiators_stays(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        for node in (one, other):
            await node.serve(answer)
        await one.ping(other.addresses[0])
        await other.identify(one.peer_id)
        streams: dict[Node, OverlayStream] = {}

        async def connect(node: Node, peer: Node) -> None:
            streams[node] = await node.connect(peer.peer_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, one, other)
            nursery.start_soon(connect, other, one)
        assert await talks(streams[one])
        with pytest.raises(SessionLost) as lost:
            await streams[other].receive_some()
        assert (lost.value.code, lost.value.by_peer) == ("busy", True)


@pytest.mark.parametrize("we_dialed", [True, False], ids=["initiator", "responder"])
@pytest.mark.parametrize("theirs_stays_open", [True, False])
async def test_the_next_stream_may_follow_at_once_on_our_own_close(
    we_dialed: bool, theirs_stays_open: bool, autojump_clock: MockClock
) -> None:
    async with two_nodes() as (one, other):
        incoming = Incoming()
        await other.serve(incoming if theirs_stays_open else answer)
        if we_dialed:
            await one.ping(other.addresses[0])
        else:
            await other.ping(one.addresses[0])
            await one.identify(other.peer_id)
        for _ in range(5):
            stream = await one.connect(other.peer_id)
            await stream.send_all(b"hello")
            await stream.aclose()
        stream = await one.connect(other.peer_id)
        if theirs_stays_open:
            await trio.sleep(1)
            (theirs,) = (each for each in incoming.streams if isinstance(each, SessionStream) and each.talks)
            with trio.fail_after(1):
                await theirs.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            incoming.let_go.set()
        else:
            assert await talks(stream)
        assert len(one.connections) == 1


async def test_the_next_stream_does_not_wait_for_what_nobody_reads(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        incoming = Incoming()
        await other.serve(incoming)
        stream = await one.connect(other.addresses[0])
        with trio.move_on_after(1):
            await stream.send_all(bytes(9 << 20))
        assert isinstance(stream, SessionStream)
        assert stream.unsent
        await stream.aclose()
        following = await one.connect(other.peer_id)
        await trio.sleep(1)
        assert len(incoming.streams) == 2
        await incoming.streams[-1].send_all(b"hello")
        assert await following.receive_some() == b"hello"
        incoming.let_go.set()


async def test_the_next_stream_may_follow_when_the_peer_has_left(autojump_clock: MockClock) -> None:
    async with two_nodes() as (one, other):
        await other.serve(lambda stream: stream.aclose())
        for _ in range(3):
            stream = await one.connect(other.addresses[0])
            assert await stream.receive_some() == b""
        assert len(one.connections) == 1


async def test_a_connection_that_ends_while_a_stream_is_agreed_on_is_told_as_lost() -> None:
    streams = KaspaStreams()

    async def lost(*protocols: str) -> YamuxStream:
        streams.forget(connection)  # whoever knows connections may hear of it first
        raise ConnectionLost("it broke")

    connection = cast(Connection, SimpleNamespace(number=1, streams=(), open_stream=lost))
    with pytest.raises(ConnectionLost):
        await streams.open(connection, KASPA)
    assert not streams.busy(connection)
