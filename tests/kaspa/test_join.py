from __future__ import annotations

import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from kas_libp2p.errors import ConnectionLost, GrpcError, KasError, LocalProtocolError
from kas_libp2p.events import EventBus, KaspaPeerEnded, KaspaPeerJoined
from kas_libp2p.kaspa import p2p_pb2
from kas_libp2p.kaspa._messages import Close, CloseCode, Hello, Kind, encode, frame
from kas_libp2p.kaspa.channel import MemoryChannel, MessageChannel, Piece, memory_channel_pair
from kas_libp2p.kaspa.handshake import Hello as KaspaHello
from kas_libp2p.kaspa.handshake import handshake
from kas_libp2p.kaspa.join import (
    End,
    Ended,
    Joined,
    Joiner,
    JoinFailed,
    JoinSettings,
    KaspadAddress,
    Patience,
    Side,
    dial_kaspad,
)
from kas_libp2p.kaspa.sources import FixedSource, PoolSources
from kas_libp2p.metadata import Dialect, Path, PathKind, PeerId

from .overlay import ALICE, BOB, MemoryOverlay, overlay_pair
from .test_messages import Said

NETWORK = "kaspa-simnet"


def message(**payload: Any) -> bytes:
    return p2p_pb2.KaspadMessage(**payload).SerializeToString()


class FakeKaspad:
    """A node in this process with kaspad's habits at the door: two pending handshakes per source, reasons in rejects.

    Attributes:
        refuse: raised instead of a connection.
        behave: what it does with a channel; a handshake and then quiet, by default.
        opened: the source of each connection, in order.
        ready: channels whose handshake is finished.
    """

    def __init__(self, nursery: trio.Nursery, network: str = NETWORK) -> None:
        self.nursery = nursery
        self.hello = KaspaHello(network=network, user_agent="/kaspad:2.1.0/")
        self.refuse: Exception | None = None
        self.behave: Callable[[MemoryChannel], Any] = self.well
        self.slots = 2
        self.pending: list[str | None] = []
        self.opened: list[str | None] = []
        self.ready: list[MemoryChannel] = []
        self.ended: list[str] = []

    @property
    def node_id(self) -> str:
        return str(uuid.UUID(bytes=self.hello.node_id))

    async def open(self, address: KaspadAddress, source: str | None, max_message: int) -> MessageChannel:
        await trio.lowlevel.checkpoint()
        if self.refuse is not None:
            raise self.refuse
        self.opened.append(source)
        bridge, ours = memory_channel_pair()
        if self.pending.count(source) >= self.slots:

            async def status() -> list[Piece]:
                raise GrpcError(8, "too many pending inbound handshakes")

            bridge._receive_batch = status  # type: ignore[method-assign]
            return bridge
        self.nursery.start_soon(self._serve, ours, source)
        return bridge

    async def _serve(self, channel: MemoryChannel, source: str | None) -> None:
        self.pending.append(source)
        try:
            await self.behave(channel)
        except KasError as error:
            self.ended.append(str(error))
        if source in self.pending:
            self.pending.remove(source)
        if channel in self.ready:
            self.ready.remove(channel)

    async def well(self, channel: MemoryChannel) -> None:
        try:
            await handshake(channel, self.hello)
        except KasError as error:
            if channel._error is None:
                await channel.send(message(reject=p2p_pb2.Reject(reason=str(error))))
                await channel.aclose()
            raise
        self.pending.pop()
        self.ready.append(channel)
        async for _ in channel:
            pass
        await channel.aclose()


class World:
    """Two nodes with a bridge each."""

    def __init__(self, nursery: trio.Nursery, **settings: Any) -> None:
        self.nursery = nursery
        self.a = FakeKaspad(nursery)
        self.b = FakeKaspad(nursery)
        self.events = EventBus(lambda: 0.0)
        self.joiner_a = self.joiner(self.a, ALICE, **settings)
        self.joiner_b = self.joiner(self.b, BOB, **settings)
        self.ends: dict[str, Ended] = {}

    def joiner(self, kaspad: FakeKaspad, own: PeerId, **settings: Any) -> Joiner:
        return Joiner(
            KaspadAddress(),
            PoolSources(),
            settings=JoinSettings(**settings),
            own_peer=own,
            events=self.events,
            open_kaspad=kaspad.open,
        )

    def carry(self, joiner: Joiner, stream: MemoryOverlay, name: str, **options: Any) -> None:
        async def go() -> None:
            self.ends[name] = await joiner.carry(stream, **options)

        self.nursery.start_soon(go)

    def join(self, **options: Any) -> tuple[MemoryOverlay, MemoryOverlay]:
        left, right = overlay_pair(**options)
        self.carry(self.joiner_a, left, "a")
        self.carry(self.joiner_b, right, "b")
        return left, right

    async def until_ready(self) -> None:
        with trio.fail_after(20):
            while not (self.a.ready and self.b.ready and self.pending == 0):  # noqa: ASYNC110 - several states
                await trio.sleep(0.01)

    @property
    def pending(self) -> int:
        return sum(each.ready_at is None for joiner in (self.joiner_a, self.joiner_b) for each in joiner.peers.values())

    @property
    def joined_a(self) -> Joined:
        return self.joiner_a.peers[BOB]

    @property
    def joined_b(self) -> Joined:
        return self.joiner_b.peers[ALICE]


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, **settings)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("protocol", list(Dialect))
async def test_two_nodes_meet(protocol: str, autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        with w.events.subscribe() as events:
            w.join(delay=0.1, protocol=protocol)
            await w.until_ready()
            assert w.a.opened == w.b.opened == ["127.1.0.1"]
            assert w.joined_a.theirs is not None
            assert w.joined_a.theirs.node_id == w.b.node_id
            assert w.joined_b.theirs is not None
            assert w.joined_b.theirs.node_id == w.a.node_id
            assert w.joiner_a.node is not None
            assert (w.joiner_a.node.node_id, w.joiner_a.network) == (w.a.node_id, NETWORK)
            assert w.joiner_a.pending == w.joiner_b.pending == 0

            await w.a.ready[0].send(b"\x82\x01\x00" + bytes(300_000))
            await trio.sleep(1)
            assert w.joined_b.from_peer.bytes > 300_000
            assert w.joined_a.from_kaspad.bytes == w.joined_b.from_peer.bytes

            await w.a.ready[0].aclose()
            await trio.sleep(2)
            assert w.ends["a"] == Ended(End.KASPAD_CLOSED, Side.KASPAD)
            assert (w.ends["b"].reason, w.ends["b"].by) == (End.PEER_CLOSED, Side.PEER)
            assert not w.joiner_a.peers
            assert not w.joiner_b.peers
            w.events.close()
            seen = [event async for event in events]
    joined = [event for event in seen if isinstance(event, KaspaPeerJoined)]
    ended = [event for event in seen if isinstance(event, KaspaPeerEnded)]
    assert {(event.peer, event.user_agent, event.dialect) for event in joined} == {
        (ALICE, "/kaspad:2.1.0/", protocol),
        (BOB, "/kaspad:2.1.0/", protocol),
    }
    assert all(event.seconds < 1 for event in joined)
    assert {(event.peer, event.joined, event.reason) for event in ended} == {
        (ALICE, True, "closed by the peer"),
        (BOB, True, "closed by kaspad"),
    }
    assert w.events.counts["kaspa-peer-ended", "closed by kaspad"] == 1


# -- The peer stalls or breaks it, at each step ------------------------------------------------------------------------


async def by_hand(w: World, **options: Any) -> tuple[MemoryOverlay, Said]:
    """Bob's bridge accepts a stream whose other end is in the test's hands."""
    left, right = overlay_pair(**options)
    w.carry(w.joiner_b, right, "b")
    return left, Said(left)


VERSION = message(
    version=p2p_pb2.Version(protocolVersion=11, id=bytes(16), userAgent="/x:1/", network=NETWORK, timestamp=1)
)


@pytest.mark.parametrize("said_first", [b"", encode(Hello()), encode(Hello()) + frame(Kind.MESSAGE, VERSION)[:20]])
async def test_a_stream_that_brings_no_version_is_cut_and_costs_kaspad_nothing(
    said_first: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as w:
        stream, said = await by_hand(w)
        await stream.send_all(said_first)
        close = await said.until(Close)
        assert close == Close(CloseCode.NO_VERSION, "no Version within 1.5 s")
        assert trio.current_time() == pytest.approx(1.5)
        await trio.sleep(0.1)
        assert w.ends["b"] == Ended(End.PEER_SILENT, Side.PEER, "no Version within 1.5 s")
        assert w.b.opened == []


async def test_an_opener_waits_longer_and_frees_its_place(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, _ = overlay_pair()
        w.carry(w.joiner_a, left, "a")
        await trio.sleep(3.4)
        assert w.joiner_a.pending == 1
        assert "a" not in w.ends
        await trio.sleep(0.5)
        assert w.ends["a"].reason is End.PEER_SILENT
        assert w.joiner_a.pending == 0
        assert w.a.ended == ["closed by the peer"] or len(w.a.ended) == 1, "kaspad was left, not kept waiting"
        assert w.a.pending == []


@pytest.mark.parametrize(
    "first",
    [
        message(verack=p2p_pb2.Empty()),
        b"",
        b"\xa2\x01\x05short",
        message(version=p2p_pb2.Version(id=b"short", network=NETWORK)),
    ],
)
async def test_something_else_than_a_version(first: bytes, autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        stream, said = await by_hand(w)
        await stream.send_all(encode(Hello()) + frame(Kind.MESSAGE, first))
        close = await said.until(Close)
        assert isinstance(close, Close)
        assert close.code == CloseCode.PROTOCOL
        await trio.sleep(0.1)
        assert w.ends["b"].reason is End.PEER_BROKE
        assert w.b.opened == []
        assert w.events.counts["peer-misbehaved", "messages"] == 1


async def test_garbage(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        stream, said = await by_hand(w)
        await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00")
        close = await said.until(Close)
        assert isinstance(close, Close)
        assert close.code == CloseCode.PROTOCOL
        await trio.sleep(0.1)
        assert w.ends["b"].reason is End.PEER_BROKE


async def test_a_peer_that_ends_a_plain_stream_behind_its_garbage_is_told_of_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as w:
        stream, _ = await by_hand(w)
        await stream.send_all(encode(Hello()) + frame(Kind.MESSAGE, VERSION)[:20])
        await stream.send_eof()
        await trio.sleep(0.1)
        assert w.ends["b"].reason is End.PEER_BROKE
        assert w.events.counts["peer-misbehaved", "messages"] == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_a_peer_that_stalls_later_is_ended_by_kaspad_itself(
    steps: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Version, then Verack, then Ready missing: kaspad waits 4 s, 4 s and 8 s, and the place is free after that."""
    async with world() as w:
        stream, said = await by_hand(w)
        sent = [VERSION, message(verack=p2p_pb2.Empty()), message(ready=p2p_pb2.Empty())][:steps]
        await stream.send_all(encode(Hello()) + b"".join(frame(Kind.MESSAGE, each) for each in sent))
        await trio.sleep(0.5)
        assert w.joiner_b.pending == (0 if steps == 3 else 1)

        async def keep_alive() -> None:
            while await said.more():
                pass

        w.nursery.start_soon(keep_alive)
        for _ in range(10):
            with trio.move_on_after(1):
                await trio.sleep_forever()
            if w.joiner_b.pending == 0:
                break
            await stream.send_all(b"\x12\0\0\0")  # alive, and saying nothing
        assert w.joiner_b.pending == 0
        if steps < 3:
            await trio.sleep(1)
            assert w.ends["b"].by is Side.KASPAD


async def test_a_hung_path_ends_the_peer_at_both_kaspads_within_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as w:
        left, _ = w.join(delay=0.1)
        await w.until_ready()
        await w.a.ready[0].send(b"request")
        left.hang()
        await trio.sleep(6)
        assert w.ends["a"].reason is w.ends["b"].reason is End.PATH_HUNG
        assert w.ends["a"].by is Side.PATH
        assert w.a.ready == w.b.ready == []


async def test_a_reset_ends_it_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, _ = w.join()
        await w.until_ready()
        left.reset()
        await trio.sleep(0.6)
        assert w.ends["a"].reason is w.ends["b"].reason is End.PATH_LOST
        assert w.a.ready == w.b.ready == []


# -- Refusals, by name, on both sides ----------------------------------------------------------------------------------


async def test_another_network(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.b.hello = KaspaHello(network="kaspa-mainnet")
        w.joiner_b.node = await w.joiner_b.look()
        w.b.opened.clear()
        w.join()
        await trio.sleep(1)
        assert (w.ends["b"].reason, w.ends["b"].by) == (End.NETWORK, Side.US)
        assert (w.ends["a"].reason, w.ends["a"].by) == (End.NETWORK, Side.PEER)
        assert "we are on kaspa-mainnet, the peer is on kaspa-simnet" in w.ends["a"].text
        assert w.b.opened == []
        assert not w.ends["a"].transient


async def test_our_own_node(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.b.hello = w.a.hello
        w.join()
        await trio.sleep(1)
        assert w.ends["a"].reason is w.ends["b"].reason is End.LOOPBACK


async def test_one_node_by_two_ways(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.join()
        await w.until_ready()
        carol = w.joiner(w.a, PeerId("12D3KooWCarol"))  # another bridge in front of the same node
        left, right = overlay_pair(opener=PeerId("12D3KooWCarol"))
        w.carry(carol, left, "carol")
        w.carry(w.joiner_b, right, "again")
        await trio.sleep(1)
        assert (w.ends["again"].reason, w.ends["again"].by) == (End.DUPLICATE, Side.US)
        assert (w.ends["carol"].reason, w.ends["carol"].by) == (End.DUPLICATE, Side.PEER)
        assert w.a.ready
        assert w.b.ready


@pytest.mark.parametrize(
    ("text", "reason"),
    [("peer is banned", End.BANNED), ("DUPLICATE_CONNECTION", End.DUPLICATE), ("misbehaving peer: x", End.REJECTED)],
)
async def test_a_reject_of_their_kaspad_is_passed_on(
    text: str, reason: End, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as w:

        async def reject(channel: MemoryChannel) -> None:
            await channel.send(VERSION)
            await channel.receive()
            await channel.send(message(reject=p2p_pb2.Reject(reason=text)))
            await channel.send_eof()

        w.b.behave = reject
        w.join()
        await trio.sleep(2)
        assert w.ends["b"] == Ended(reason, Side.KASPAD, text)
        assert w.ends["a"] == Ended(reason, Side.PEER, text)
        assert any(text in end for end in w.a.ended), "our kaspad heard it too"


async def test_a_ban_before_version(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:

        async def banned(channel: MemoryChannel) -> None:
            await channel.send(message(reject=p2p_pb2.Reject(reason="peer is banned")))
            await channel.send_eof()

        w.b.behave = banned
        w.join()
        await trio.sleep(2)
        assert w.ends["b"] == Ended(End.BANNED, Side.KASPAD, "peer is banned")
        assert w.ends["a"] == Ended(End.BANNED, Side.PEER, "peer is banned")


async def test_kaspad_is_not_there(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.b.refuse = JoinFailed(Ended(End.NOT_RUNNING, Side.KASPAD, "nothing listens on 127.0.0.1:16111"))
        w.join()
        await trio.sleep(1)
        assert w.ends["b"].reason is End.NOT_RUNNING
        assert w.joiner_b.kaspad_problem == w.ends["b"]
        # What the peer is told names no address of ours.
        assert w.ends["a"] == Ended(End.PEER_KASPAD, Side.PEER, "kaspad not running")
        w.b.refuse = None
        w.join()
        await w.until_ready()
        assert w.joiner_b.kaspad_problem is None


async def test_kaspad_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:

        async def silent(channel: MemoryChannel) -> None:
            assert await channel.receive() is None
            w.a.ended.append("left")

        w.a.behave = silent
        w.join()
        await trio.sleep(1.3)
        assert w.ends["a"].reason is End.KASPAD_SILENT
        await trio.sleep(1)
        assert w.ends["b"] == Ended(End.PEER_KASPAD, Side.PEER, "kaspad silent")
        assert w.b.opened == []
        assert w.a.ended == ["left"]


async def test_kaspad_without_a_place_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.b.slots = 0

        async def later() -> None:
            await trio.sleep(0.3)
            w.b.slots = 2

        w.nursery.start_soon(later)
        w.join()
        await w.until_ready()
        assert trio.current_time() < 0.6
        assert len(w.b.opened) > 3


async def test_or_is_busy(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.b.slots = 0
        w.join()
        await trio.sleep(3)
        assert w.ends["b"].reason is End.KASPAD_BUSY
        assert w.ends["a"] == Ended(End.PEER_BUSY, Side.PEER, "kaspad busy")
        assert w.ends["a"].transient


# -- Limits ------------------------------------------------------------------------------------------------------------


async def test_pending_handshakes_are_limited(autojump_clock: trio.testing.MockClock) -> None:
    async with world(max_pending=3) as w:

        async def no_verack(channel: MemoryChannel) -> None:
            await channel.send(VERSION)
            await channel.receive()
            await trio.sleep(4)
            await channel.aclose()

        w.b.behave = no_verack
        closes = []

        async def come(number: int) -> None:
            left, right = overlay_pair(opener=PeerId(f"12D3KooW{number}"))
            w.carry(w.joiner_b, right, str(number))
            version = p2p_pb2.Version(id=bytes([number + 1]) * 16, network=NETWORK)
            await left.send_all(encode(Hello()) + frame(Kind.MESSAGE, message(version=version)))
            closes.append(await Said(left).until(Close))

        for number in range(10):
            w.nursery.start_soon(come, number)
        await trio.sleep(1)
        assert w.joiner_b.pending == 3
        assert len(w.b.opened) == 3
        assert closes == [Close(CloseCode.BUSY, "too many handshakes are pending")] * 7
        assert w.events.counts["limit-hit", "max_pending"] == 7
        await trio.sleep(4)
        assert w.joiner_b.pending == 0


async def test_joined_peers_are_limited(autojump_clock: trio.testing.MockClock) -> None:
    async with world(max_joined=1) as w:
        w.join()
        await w.until_ready()
        left, right = overlay_pair(opener=PeerId("12D3KooWCarol"))
        w.carry(w.joiner_b, right, "carol")
        close = await Said(left).until(Close)
        assert close == Close(CloseCode.BUSY, "as many peers as are allowed")
        await trio.sleep(0.1)
        assert w.ends["carol"].reason is End.BUSY
        assert w.events.counts["limit-hit", "max_joined"] == 1


async def test_one_source_address_has_two_places(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.joiner_b.sources = FixedSource("10.0.0.5")
        for number in range(6):
            left, right = overlay_pair(opener=PeerId(f"12D3KooW{number}"))
            other = FakeKaspad(w.nursery)
            w.carry(w.joiner(other, PeerId(f"12D3KooW{number}")), left, f"a{number}")
            w.carry(w.joiner_b, right, f"b{number}")
        await trio.sleep(1)
        assert len(w.b.ready) == 6
        assert set(w.b.opened) == {"10.0.0.5"}


# -- Two streams of one peer -------------------------------------------------------------------------------------------


async def test_both_open_at_once_and_one_stream_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, right = overlay_pair(delay=0.05)
        w.carry(w.joiner_a, left, "a1")
        w.carry(w.joiner_b, right, "b1")
        back_left, back_right = overlay_pair(delay=0.05, opener=BOB, acceptor=ALICE)
        w.carry(w.joiner_b, back_left, "b2")
        w.carry(w.joiner_a, back_right, "a2")
        await trio.sleep(3)
        assert len(w.a.ready) == len(w.b.ready) == 1
        assert len(w.joiner_a.peers) == len(w.joiner_b.peers) == 1
        assert w.joined_a.opener != w.joined_b.opener
        assert len(w.ends) == 2


async def test_a_peer_that_comes_again_while_all_is_well_is_a_duplicate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as w:
        w.join()
        await w.until_ready()
        _, right = overlay_pair()
        w.carry(w.joiner_b, right, "again")
        await trio.sleep(0.1)
        assert w.ends["again"].reason is End.DUPLICATE
        assert w.b.ready


async def test_a_peer_that_left_may_come_again_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:

        async def in_no_hurry(channel: MemoryChannel) -> None:
            await handshake(channel, w.b.hello)
            w.b.ready.append(channel)
            await trio.sleep_forever()

        w.b.behave = in_no_hurry
        w.join(delay=0.05, protocol=Dialect.HTTP2)
        await w.until_ready()
        w.joiner_a.disconnect(BOB)
        await w.joined_a.wait_ended()
        await trio.sleep(0.06)
        assert w.joined_b.leaving, "its kaspad may still say why"
        w.join(delay=0.05, protocol=Dialect.HTTP2)
        await trio.sleep(2)
        assert w.joined_a.ready_at is not None
        assert w.joined_b.ready_at is not None


async def test_a_peer_that_lost_its_path_may_come_again_before_we_noticed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as w:
        left, _ = w.join()
        await w.until_ready()
        left.hang()
        await trio.sleep(3.5)
        w.joined_a.end(Ended(End.PATH_LOST, Side.PATH))
        await trio.sleep(0.1)
        w.join()
        await trio.sleep(0.5)
        await w.until_ready()
        assert len(w.b.ready) == 1
        assert w.b.opened == ["127.1.0.1", "127.1.0.1"]


async def test_a_newer_stream_does_not_wait_for_what_its_relayed_one_can_not_send(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as w:
        left, right = w.join(delay=0.05)
        await w.until_ready()
        for end in (left, right):
            end._metadata = replace(end._metadata, path=Path(PathKind.RELAYED, PeerId("12D3KooWRelay")))
        right.incoming.hung = True

        async def too_much() -> None:
            with suppress(KasError):
                await w.a.ready[0].send(b"\x82\x01\x00" + bytes(600_000))

        w.nursery.start_soon(too_much)
        await trio.sleep(0.5)
        began = trio.current_time()
        w.join(delay=0.05)
        await trio.sleep(0.1)
        await w.until_ready()
        assert w.joined_a.moved
        assert w.joined_b.moved
        assert trio.current_time() - began < 0.6


# -- Sessions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "by_peer", "ended"),
    [
        ("lost", False, Ended(End.PATH_LOST, Side.PATH, "no path for 30 s")),
        ("timeout", False, Ended(End.PATH_LOST, Side.PATH, "no path for 30 s")),
        ("lost", True, Ended(End.PATH_LOST, Side.PATH, "no path for 30 s")),
        ("restarted", False, Ended(End.PEER_RESTARTED, Side.PEER, "no path for 30 s")),
        ("unknown", True, Ended(End.PEER_RESTARTED, Side.PEER, "no path for 30 s")),
        ("stopped", True, Ended(End.PEER_STOPPED, Side.PEER, "no path for 30 s")),
        ("stopped", False, Ended(End.STOPPED, Side.US, "no path for 30 s")),
        ("refused", True, Ended(End.REFUSED, Side.PEER, "no path for 30 s")),
        ("refused", False, Ended(End.REFUSED, Side.US, "no path for 30 s")),
        ("busy", True, Ended(End.PEER_BUSY, Side.PEER, "no path for 30 s")),
        ("protocol", False, Ended(End.PEER_BROKE, Side.PEER, "no path for 30 s")),
        ("protocol", True, Ended(End.PEER_CLOSED, Side.PEER, "no path for 30 s")),
    ],
)
async def test_a_session_that_ends_says_why(
    code: str, by_peer: bool, ended: Ended, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as w:
        left, _ = w.join(watched=True)
        await w.until_ready()
        assert w.joined_a.moves_itself
        left.lose(code, "no path for 30 s", by_peer=by_peer)
        await trio.sleep(1)
        assert w.ends["a"] == ended
        assert w.a.ready == []
        assert not w.events.counts["peer-misbehaved", "messages"], "the session tells that itself"


async def test_a_peer_that_started_anew_takes_the_place_of_what_it_was(autojump_clock: trio.testing.MockClock) -> None:
    """Its new session ends the old one in the same moment: who notices first makes no difference."""
    async with world() as w:
        left, right = w.join(watched=True)
        await w.until_ready()
        right.lose("restarted", "the peer has started anew")
        again, theirs = overlay_pair(watched=True)
        await w.joiner_b._admit(Joined(ALICE, theirs, Dialect.MESSAGES, False))
        assert w.joiner_b.peers[ALICE].stream is theirs
        assert w.ends["b"].reason is End.PEER_RESTARTED
        del left, again


async def test_what_moves_by_itself_is_not_replaced_as_it_is_relayed(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, right = w.join(watched=True)
        await w.until_ready()
        for end in (left, right):
            end._metadata = replace(end._metadata, path=Path(PathKind.RELAYED, PeerId("12D3KooWRelay")))
        w.join()
        await trio.sleep(1)
        assert w.ends["a"].reason is End.DUPLICATE
        assert w.joined_a.stream is left


# -- By our own wish ---------------------------------------------------------------------------------------------------


async def test_disconnect(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        w.join()
        await w.until_ready()
        assert w.joiner_a.disconnect(BOB, "by the operator")
        assert not w.joiner_a.disconnect(PeerId("nobody"))
        await trio.sleep(1)
        assert w.ends["a"] == Ended(End.DISCONNECTED, Side.US, "by the operator")
        assert w.ends["b"] == Ended(End.PEER_CLOSED, Side.PEER, "by the operator")
        assert w.a.ready == w.b.ready == []


async def test_stop_ends_all_within_a_second_whatever_they_do(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, _ = w.join()
        await w.until_ready()
        stalled, _ = await by_hand(w)
        left.hang()
        await w.joiner_b.stop()
        assert trio.current_time() < 2
        assert not w.joiner_b.peers
        assert w.ends["b"].reason is End.STOPPED
        _, late = overlay_pair()
        w.carry(w.joiner_b, late, "late")
        await trio.sleep(0.1)
        assert w.ends["late"].reason is End.STOPPED
        del stalled


async def test_cancelling_carry_leaves_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, right = overlay_pair()
        w.carry(w.joiner_b, right, "b")
        with trio.move_on_after(1):
            await w.joiner_a.carry(left)
        assert not w.joiner_a.peers
        assert w.joiner_a.pending == 0
        assert left.was_reset
        await trio.sleep(1)
        assert w.ends["b"].reason is End.PATH_LOST


async def test_a_stream_that_is_no_kaspa_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as w:
        left, _ = overlay_pair(protocol="/ipfs/ping/1.0.0")
        with pytest.raises(LocalProtocolError, match="/ipfs/ping"):
            await w.joiner_a.carry(left)
        assert left.was_reset


async def test_a_node_that_takes_nothing_any_more(autojump_clock: trio.testing.MockClock) -> None:
    async with world(patience=Patience()) as w:

        async def stuck(channel: MemoryChannel) -> None:
            await handshake(channel, w.b.hello)
            w.b.ready.append(channel)
            await trio.sleep_forever()

        w.b.behave = stuck
        w.join()
        await w.until_ready()

        async def send() -> None:
            with pytest.raises(ConnectionLost):
                await w.a.ready[0].send(bytes(5_000_000))

        w.nursery.start_soon(send)
        await trio.sleep(25)
        assert not w.ends
        await trio.sleep(15)
        assert w.ends["b"].reason is End.KASPAD_STUCK
        assert w.ends["a"].by is Side.PEER


# -- Dialing, with real sockets ----------------------------------------------------------------------------------------


async def test_dialing_from_a_source_address() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    stream = await dial_kaspad(KaspadAddress("127.0.0.1", port), "127.77.3.4")
    accepted = await listeners[0].accept()
    assert accepted.socket.getpeername()[0] == "127.77.3.4"
    for each in (stream, accepted, *listeners):
        await each.aclose()


async def test_nothing_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(JoinFailed, match="is kaspad running") as info:
            await dial_kaspad(KaspadAddress("127.0.0.1", port), "127.1.0.1")
    assert info.value.ended.reason is End.NOT_RUNNING


async def test_a_source_address_that_is_not_ours() -> None:
    with pytest.raises(JoinFailed, match=r"192\.0\.2\.1 can't be used as a source address") as info:
        await dial_kaspad(KaspadAddress("127.0.0.1", 1), "192.0.2.1")
    assert info.value.ended.reason is End.NO_SOURCE


async def test_loopback_sources_do_not_reach_beyond_this_host() -> None:
    # Refused by the system before a packet leaves.
    with pytest.raises(JoinFailed, match="use one source address, or a pool") as info:
        await dial_kaspad(KaspadAddress("192.0.2.1", 16111), "127.1.0.1")
    assert info.value.ended.reason is End.UNREACHABLE


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b""])
async def test_something_else_listens_there(answer: bytes) -> None:
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            await stream.send_all(answer)
            await stream.aclose()

        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        joiner = Joiner(KaspadAddress("127.0.0.1", port), PoolSources())
        with pytest.raises(JoinFailed) as info:
            await joiner.look()
        assert info.value.ended.reason is End.NOT_KASPAD
        assert joiner.kaspad_problem == info.value.ended
        nursery.cancel_scope.cancel()
