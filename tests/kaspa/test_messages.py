from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionLost
from kas_libp2p.kaspa import messages
from kas_libp2p.kaspa._messages import (
    MAX_PLAIN,
    SMALL_MAX_MESSAGE,
    Alive,
    Capability,
    Close,
    CloseCode,
    Hello,
    Kind,
    Probe,
    Reader,
    encode,
    encode_pieces,
    frame,
)
from kas_libp2p.kaspa.channel import HIGH_WATER, PathHung, Piece
from kas_libp2p.kaspa.messages import MessagesChannel, PeerClosed
from kas_libp2p.kaspa.upload import UploadCap

from .overlay import MemoryOverlay, overlay_pair
from .test_channel import cut
from .test_messages_frames import whole


@asynccontextmanager
async def channels(
    left: MemoryOverlay, right: MemoryOverlay, **options: object
) -> AsyncIterator[tuple[MessagesChannel, MessagesChannel]]:
    """Both ends, running."""
    async with trio.open_nursery() as nursery:
        pair = MessagesChannel(left, **options), MessagesChannel(right, **options)  # type: ignore[arg-type]
        for channel in pair:
            await nursery.start(channel.run)
        yield pair
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def against(stream: MemoryOverlay, **options: object) -> AsyncIterator[MessagesChannel]:
    """A channel on one end; the test writes bytes into the other."""
    async with trio.open_nursery() as nursery:
        channel = MessagesChannel(stream, **options)  # type: ignore[arg-type]
        await nursery.start(channel.run)
        yield channel
        nursery.cancel_scope.cancel()


class Said:
    """What a channel wrote, read by hand."""

    def __init__(self, stream: MemoryOverlay) -> None:
        self.stream = stream
        self.reader = Reader()
        self.pieces: list[Piece] = []
        self.controls: list[object] = []

    async def until(self, kind: type) -> object:
        while not any(isinstance(control, kind) for control in self.controls):
            assert await self.more(), f"ended without {kind.__name__}"
        found = next(control for control in self.controls if isinstance(control, kind))
        self.controls.remove(found)
        return found

    async def more(self) -> bool:
        data = await self.stream.receive_some()
        if not data:
            return False
        self.reader.feed(data)
        while not self.reader.wants_data:
            self.pieces += self.reader.take(1 << 20)
            self.controls += self.reader.controls
            self.reader.controls.clear()
        return True


async def everything(channel: MessagesChannel) -> list[bytes]:
    return [message async for message in channel]


# -- Messages ----------------------------------------------------------------------------------------------------------


async def test_both_ways(autojump_clock: trio.testing.MockClock) -> None:
    async with channels(*overlay_pair(delay=0.05)) as (left, right):
        await left.send(b"version")
        assert await right.receive() == b"version"
        await right.send(b"verack")
        await right.send(b"")
        assert await left.receive() == b"verack"
        assert await left.receive() == b""
        assert trio.current_time() == pytest.approx(0.1)  # no round trip before the first message
        await left.send_eof()
        assert await right.receive() is None
        await right.send(b"still")
        assert await left.receive() == b"still"
        await right.aclose()
        assert await left.receive() is None


@given(
    data=st.lists(st.binary(max_size=2000), max_size=12),
    sizes=st.lists(st.integers(1, 700), max_size=6),
    largest_read=st.integers(1, 3000),
    window=st.integers(1, 5000),
    high_water=st.integers(1, 2000),
    packed=st.booleans(),
)
def test_any_chunks_windows_and_batches(
    data: list[bytes], sizes: list[int], largest_read: int, window: int, high_water: int, packed: bool
) -> None:
    got: list[bytes] = []

    async def main() -> None:
        left, right = overlay_pair(window=window)
        right.largest_read = largest_read
        async with channels(left, right, high_water=high_water) as (sender, receiver):
            assert sender.packing is not None
            sender.packing.on = packed

            async def send() -> None:
                await sender.send_pieces([piece for message in data for piece in cut(message, sizes)])
                await sender.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                pieces: list[Piece] = []
                while batch := await receiver.receive_pieces():
                    pieces += batch
            got.extend(whole(pieces))
            # Everything that was sent was taken, and what became of it is known to a byte.
            assert receiver.wire_received == sender.wire_sent

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert got == data


async def test_a_large_message_streams_through_in_bounded_memory(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=65536)
    size = 20 * 1024 * 1024
    block = bytes(range(256)) * 256
    async with channels(left, right) as (sender, receiver):
        await receiver_knows(sender, receiver)

        async def send() -> None:
            remaining, first = size, True
            while remaining:
                remaining -= len(block)
                await sender.send_pieces([Piece(block, remaining, first, size)])
                assert sender._out_bytes <= HIGH_WATER
                first = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received, largest = 0, 0
            while received < size:
                pieces = await receiver.receive_pieces()
                largest = max(largest, sum(len(piece.data) for piece in pieces))
                for piece in pieces:
                    assert bytes(piece.data[:1]) == bytes([received % 256])
                    received += len(piece.data)
            assert largest <= 65536
            assert receiver.messages_received == 2


async def receiver_knows(sender: MessagesChannel, receiver: MessagesChannel) -> None:
    """Exchange a message each way, so that both have the other's hello."""
    for one, other in ((sender, receiver), (receiver, sender)):
        await one.send(b"hello")
        assert await other.receive() == b"hello"


async def test_a_sender_waits_for_a_slow_reader(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=1000)
    async with channels(left, right, high_water=5000) as (sender, receiver):
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(100):
                await sender.send(bytes(1000))
                sent += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(60)  # alive all the time, although nothing moves
            assert sent < 20
            for _ in range(100):
                assert await receiver.receive() == bytes(1000)


async def test_small_messages_leave_together(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    writes = []
    real = left.send_all

    async def send_all(data: bytes) -> None:
        writes.append(len(data))
        await real(data)

    left.send_all = send_all  # type: ignore[method-assign]
    async with channels(left, right) as (sender, receiver):
        for index in range(1000):
            await sender.send(b"inv %d" % index)
        for index in range(1000):
            assert await receiver.receive() == b"inv %d" % index
    assert len(writes) <= 3


class Prompt(MemoryOverlay):
    """Takes small things at once, unless told otherwise."""

    takes = True

    def send_nowait(self, data: bytes) -> bool:
        if not self.takes or len(data) >= self.outgoing.window - self.outgoing.size:
            return False
        self.outgoing.put(data)
        return True


@asynccontextmanager
async def prompt(**options: object) -> AsyncIterator[tuple[Prompt, MessagesChannel, MessagesChannel]]:
    """A stream that takes things at once, the channel on it, and the peer's. Both have said hello."""
    left, right = overlay_pair(window=1000)
    stream = Prompt(left.incoming, left.outgoing, left.metadata)
    async with channels(stream, right, **options) as (sender, receiver):
        await trio.testing.wait_all_tasks_blocked()
        yield stream, sender, receiver


async def test_a_message_leaves_in_the_turn_of_who_sends(autojump_clock: trio.testing.MockClock) -> None:
    async with prompt() as (stream, sender, receiver):
        before = stream.outgoing.total
        await sender.send(b"inv")
        assert stream.outgoing.total == before + 4 + 3 == sender.wire_sent
        assert await receiver.receive() == b"inv"
        await trio.sleep(3)  # the peer tells what it has, which is believed
        await sender.send(b"again")
        assert await receiver.receive() == b"again"


async def test_what_does_not_leave_at_once_is_not_overtaken(autojump_clock: trio.testing.MockClock) -> None:
    async with prompt() as (stream, sender, receiver):
        sent = [b"small", bytes(3000), b"behind", bytes(2000), b"last"]
        for message in sent[:3]:
            await sender.send(message)
        await trio.testing.wait_all_tasks_blocked()  # the writer waits for the window
        for message in sent[3:]:
            await sender.send(message)
        for message in sent:
            assert await receiver.receive() == message
        stream.takes = False
        await sender.send(b"by the writer")
        assert await receiver.receive() == b"by the writer"


async def test_under_an_upload_cap_the_writer_alone_writes(autojump_clock: trio.testing.MockClock) -> None:
    async with prompt(upload=UploadCap(1000.0)) as (stream, sender, receiver):
        before = stream.outgoing.total
        await sender.send(bytes(100))
        assert stream.outgoing.total == before
        assert await receiver.receive() == bytes(100)


async def test_limits_of_a_message(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with trio.open_nursery() as nursery:
        generous = MessagesChannel(left)
        strict = MessagesChannel(right, max_message=SMALL_MAX_MESSAGE)
        await nursery.start(generous.run)
        await nursery.start(strict.run)
        with pytest.raises(LocalProtocolError, match="above the limit"):
            await strict.send(bytes(SMALL_MAX_MESSAGE + 1))
        await strict.send(b"x")
        await generous.receive()
        assert generous.peer_hello is not None
        assert generous.peer_hello.max_message == SMALL_MAX_MESSAGE
        with pytest.raises(LocalProtocolError, match="the peer takes messages of at most 1048576 bytes"):
            await generous.send(bytes(SMALL_MAX_MESSAGE + 1))
        nursery.cancel_scope.cancel()


async def test_a_large_first_message_waits_for_the_hello(autojump_clock: trio.testing.MockClock) -> None:
    async with channels(*overlay_pair()) as (left, right):
        large = bytes(SMALL_MAX_MESSAGE + 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.send, b"small")
            assert await right.receive() == b"small"
            nursery.start_soon(left.send, large)
            nursery.start_soon(right.send, b"hello comes with me")
            await trio.testing.wait_all_tasks_blocked()
            assert left.wire_sent < 1000
            assert await left.receive() == b"hello comes with me"
            assert await right.receive() == large


# -- The end -----------------------------------------------------------------------------------------------------------


async def test_a_close_says_why(autojump_clock: trio.testing.MockClock) -> None:
    async with channels(*overlay_pair(delay=0.05)) as (left, right):
        await left.send(b"last words")
        await left.aclose("too many handshakes are pending", CloseCode.BUSY)
        assert await right.receive() == b"last words"
        with pytest.raises(PeerClosed, match=r"busy.*too many handshakes") as info:
            await right.receive()
        assert (info.value.code, info.value.reason) == (CloseCode.BUSY, "too many handshakes are pending")
        with pytest.raises(ConnectionLost):
            await right.send(b"x")
        with pytest.raises(ConnectionLost):
            await left.send(b"x")


async def test_a_close_does_not_wait_for_a_peer_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=1000)
    async with channels(left, right) as (sender, _):
        with trio.move_on_after(0.1):
            await sender.send(bytes(HIGH_WATER + 1000))
        started = trio.current_time()
        await sender.aclose()
        assert trio.current_time() - started <= messages.CLOSE_WITHIN
        assert left.was_reset
        assert right.outgoing.reset_by is left


async def test_an_end_within_a_message_is_no_clean_end(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel:
        await right.send_all(encode(Hello()) + frame(Kind.MESSAGE, b"whole") + struct.pack(">I", 10) + b"half")
        await right.send_eof()
        assert await channel.receive() == b"whole"
        with pytest.raises(RemoteProtocolError, match="within a message"):
            await channel.receive()
        assert isinstance(await Said(right).until(Close), Close)


async def test_a_reset_is_a_lost_connection(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with channels(left, right) as (one, other):
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(ConnectionLost, match="reset by the peer"):
                    await one.receive()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            right.reset()
        with pytest.raises(ConnectionLost):
            await one.send(b"x")
        with pytest.raises(ConnectionLost, match="reset by this side"):
            await other.receive()


async def test_what_came_before_a_reset_of_the_writer_is_still_read(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel:
        await right.send_all(encode(Hello()) + frame(Kind.MESSAGE, b"one") + encode(Close(CloseCode.NETWORK, "other")))
        await right.send_eof()
        assert await channel.receive() == b"one"
        with pytest.raises(PeerClosed, match="network"):
            await channel.receive()


async def test_garbage_ends_it_with_a_reason_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel:
        said = Said(right)
        await right.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(RemoteProtocolError, match="no hello"):
            await channel.receive()
        with pytest.raises(RemoteProtocolError, match="no hello"):
            await channel.send(b"x")
        close = await said.until(Close)
        assert close == Close(CloseCode.PROTOCOL, "the first frame is no hello")


async def test_cancelling_run_resets(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with channels(left, right):
        pass
    assert left.was_reset
    assert right.was_reset


# -- Signs of life -----------------------------------------------------------------------------------------------------


async def test_a_path_that_hangs_while_data_is_owed_is_found_within_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    left, right = overlay_pair(delay=0.2)
    async with channels(left, right) as (one, other):
        await receiver_knows(one, other)
        async with trio.open_nursery() as nursery:

            async def expect_hung(channel: MessagesChannel) -> None:
                with pytest.raises(PathHung, match="nothing came for"):
                    await everything(channel)

            nursery.start_soon(expect_hung, one)
            nursery.start_soon(expect_hung, other)
            await trio.sleep(30)  # quiet and well: nobody gives up
            await one.send(b"request")
            await trio.sleep(0.5)
            left.hang()
            hung_at = trio.current_time()
        assert trio.current_time() - hung_at <= 5.5
        assert left.was_reset
        assert right.was_reset


async def test_an_idle_path_that_hangs_is_found_too(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with channels(left, right) as (one, other):
        await receiver_knows(one, other)
        async with trio.open_nursery() as nursery:

            async def read(channel: MessagesChannel) -> None:
                with pytest.raises(PathHung):
                    await channel.receive()

            nursery.start_soon(read, one)
            nursery.start_soon(read, other)
            await trio.sleep(1000)
            before = left.outgoing.total
            await trio.sleep(300)
            assert left.outgoing.total - before <= 300 / 30 * 2 * 16  # a probe or an answer now and then
            left.hang()
            hung_at = trio.current_time()
        assert trio.current_time() - hung_at <= 34


async def test_a_reader_that_is_held_up_is_alive(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=10_000)
    async with channels(left, right, high_water=1) as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, bytes(100_000))
        nursery.start_soon(sender.receive)
        await trio.sleep(100)
        assert len(await receiver.receive() or b"") == 100_000
        nursery.cancel_scope.cancel()


async def test_both_held_up_is_no_hung_path(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=10_000)
    async with channels(left, right, high_water=1) as (one, other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, bytes(100_000))
            nursery.start_soon(other.send, bytes(100_000))
            await trio.sleep(100)  # neither reads
            for channel in (one, other):
                nursery.start_soon(channel.receive)
        assert (one.messages_received, other.messages_received) == (1, 1)


async def test_a_slow_link_with_a_long_queue_is_alive(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=4 << 20, rate=100_000)  # forty seconds of queue
    async with channels(left, right) as (sender, receiver):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.receive)
            nursery.start_soon(sender.send, bytes(1 << 20))
            assert len(await receiver.receive() or b"") == 1 << 20
            assert trio.current_time() > 10
            await trio.sleep(1.5)
            nursery.cancel_scope.cancel()
        assert sender.unacknowledged < 200_000


async def test_a_probe_is_answered_at_once(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive)
        said = Said(right)
        await said.until(Hello)
        sent = encode(Hello()) + encode(Probe())
        await right.send_all(sent)
        assert await said.until(Alive) == Alive(len(sent), 0)
        assert trio.current_time() == 0
        nursery.cancel_scope.cancel()


async def test_a_flood_of_probes_is_answered_once_in_a_while(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(window=1 << 20)
    async with against(left) as channel, trio.open_nursery() as nursery:
        nursery.start_soon(channel.receive)
        await right.send_all(encode(Hello()) + encode(Probe()) * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        assert left.outgoing.total < 16 * 100
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("claims", [[10**9], [10, 9]])
async def test_an_impossible_acknowledgement(claims: list[int], autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel:
        await channel.send(b"something")
        await trio.testing.wait_all_tasks_blocked()
        await right.send_all(encode(Hello()) + b"".join(encode(Alive(claim, 0)) for claim in claims))
        with pytest.raises(RemoteProtocolError, match="not possible"):
            await channel.receive()


# -- Where the stream watches its paths --------------------------------------------------------------------------------


async def test_nobody_asks_whether_the_path_lives(autojump_clock: trio.testing.MockClock) -> None:
    """A session does that: here nothing is sent but messages, and no path is given up."""
    left, right = overlay_pair(watched=True)
    async with channels(left, right) as (one, other), trio.open_nursery() as nursery:
        await receiver_knows(one, other)
        nursery.start_soon(one.receive)
        nursery.start_soon(other.receive)
        before = left.outgoing.total, right.outgoing.total
        await trio.sleep(1000)
        assert (left.outgoing.total, right.outgoing.total) == before
        left.hang()
        await one.send(b"request")
        await trio.sleep(100)
        assert not left.was_reset
        assert not right.was_reset
        nursery.cancel_scope.cancel()


async def test_an_end_of_the_session_keeps_its_kind(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(watched=True)
    async with channels(left, right) as (one, _), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(SessionLost, match="no path for 30 s") as caught:
                await one.receive()
            assert (caught.value.code, caught.value.by_peer) == ("lost", False)

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        left.lose("lost", "no path for 30 s")
    with pytest.raises(SessionLost, match="no path for 30 s"):
        await one.send(b"more")


async def test_gaps_are_the_streams(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(watched=True)
    async with channels(left, right) as (one, _):
        left.gap_count = 3
        assert one.gaps == 3
    plain, _ = overlay_pair()
    plain.gap_count = 3
    async with against(plain) as channel:
        assert channel.gaps == 0


# -- Compression -------------------------------------------------------------------------------------------------------


def compressible(count: int) -> list[bytes]:
    return [(b"block %d " % index) * 1500 for index in range(count)]


async def transfer(
    rate: float | None, count: int, watched: bool = False
) -> tuple[float, MessagesChannel, MessagesChannel]:
    """Send messages over a link; the seconds it took, and both ends."""
    sent = compressible(count)
    async with channels(*overlay_pair(window=128 * 1024, rate=rate, watched=watched)) as (sender, receiver):
        await receiver_knows(sender, receiver)
        got = []

        async def send() -> None:
            for message in sent:
                await sender.send(message)
            await sender.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(sender.receive)
            while (message := await receiver.receive()) is not None:
                got.append(message)
            nursery.cancel_scope.cancel()
        assert got == sent
        return trio.current_time(), sender, receiver


@pytest.mark.parametrize("watched", [False, True])
async def test_a_slow_link_is_packed_for(watched: bool, autojump_clock: trio.testing.MockClock) -> None:
    seconds, sender, receiver = await transfer(200_000, 400, watched)
    plain = sum(map(len, compressible(400)))
    assert sender.packing is not None
    assert sender.packing.on
    assert sender.packing.rate == pytest.approx(200_000, rel=0.6)
    assert receiver.wire_received < plain / 2
    assert seconds < plain / 200_000 / 2


@pytest.mark.parametrize("watched", [False, True])
async def test_a_fast_link_is_not(watched: bool, autojump_clock: trio.testing.MockClock) -> None:
    _, sender, receiver = await transfer(None, 400, watched)
    assert sender.packing is not None
    assert not sender.packing.on
    assert receiver.wire_received > receiver.bytes_received


async def test_compression_is_negotiated(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair(rate=50_000)
    async with trio.open_nursery() as nursery:
        able, unable = MessagesChannel(left), MessagesChannel(right, compression=False)
        await nursery.start(able.run)
        await nursery.start(unable.run)
        await receiver_knows(able, unable)
        assert able.packing is None
        assert unable.peer_hello is not None
        assert unable.peer_hello.capabilities == Capability.ZSTD
        nursery.cancel_scope.cancel()


async def test_without_the_package(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert not messages.compression_available()
    async with channels(*overlay_pair()) as (left, right):
        await receiver_knows(left, right)
        assert left.peer_hello == Hello()


def packed(content: bytes, size: int | None = None) -> bytes:
    return frame(Kind.PACKED, struct.pack(">I", len(content) if size is None else size) + content)


BOMB = zstandard.ZstdCompressor().compress(bytes(100 * MAX_PLAIN))
HONEST = b"".join(encode_pieces([Piece.of(bytes(1000))]))
BOMBS = {
    "claims little, holds much": packed(BOMB, 1000),
    "claims all of it": packed(BOMB, 100 * MAX_PLAIN),
    "claims the limit, holds more": packed(BOMB, MAX_PLAIN),
    "says no size": packed(zstandard.ZstdCompressor(write_content_size=False).compress(HONEST), len(HONEST)),
    "lies in its own header": packed(zstandard.ZstdCompressor().compress(HONEST), len(HONEST) + 1),
    "more after the frame": packed(zstandard.ZstdCompressor().compress(HONEST) * 2, len(HONEST)),
    "is cut": packed(zstandard.ZstdCompressor().compress(HONEST)[:-3], len(HONEST)),
    "is no zstd": packed(b"not zstd at all", 100),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused(name: str, autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    async with against(left) as channel:
        await right.send_all(encode(Hello()) + BOMBS[name])
        with pytest.raises(RemoteProtocolError, match="packed frame"):
            await channel.receive()


async def test_packed_messages_are_given_a_batch_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    left, right = overlay_pair()
    message = frame(Kind.MESSAGE, bytes(1000)) * 1000
    async with against(left) as channel:
        await right.send_all(encode(Hello()) + packed(zstandard.ZstdCompressor().compress(message), len(message)) * 20)
        total = 0
        while total < 20 * 1000 * 1000:
            batch = sum(len(piece.data) for piece in await channel.receive_pieces())
            assert batch <= 256 * 1024
            total += batch
