"""With rust-libp2p: bytes through yamux streams, in both directions, fast and slow, to every kind of end."""

from __future__ import annotations

import pytest
import trio

from kas_libp2p import Node, StreamReset, perf
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.interop.peer import PATIENCE, Peer
from tests.interop.protocols import (
    BULK,
    BULK_HEADER,
    ECHO,
    FIRST_CLOSE,
    HALF_CLOSE,
    HOLD,
    RESET,
    Served,
    both_ways,
    counted,
    drain,
    pattern,
    pour,
    read_exactly,
    round_trip,
)
from tests.network import eventually

KIB, MIB = 1024, 1024 * 1024
INITIAL_WINDOW = 256 * KIB
SIZES = [0, 1, 65_519, 1_000_003]
"""Nothing, a byte, a full Noise message, and more than the first window."""


AMOUNTS = [(0, 0), (3 * MIB + 1, 0), (0, 3 * MIB + 1), (1, 1), (8 * MIB, 8 * MIB)]


async def join(rust: Peer, node: Node) -> None:
    await rust.order("connect", addr=node.addresses[0])


class TestPerf:
    @pytest.mark.parametrize(("upload", "download"), AMOUNTS)
    async def test_ours(self, node: Node, rust: Peer, upload: int, download: int) -> None:
        await node.ping(rust.address)
        (connection,) = node.connections
        result = await perf.measure(connection.connection, upload=upload, download=download)
        assert (result.uploaded, result.downloaded) == (upload, download)
        served = await rust.wait("served", protocol="/perf/1.0.0")
        assert (served["received"], served["sent"]) == (upload, download)

    @pytest.mark.parametrize(("upload", "download"), AMOUNTS)
    async def test_its(self, node: Node, rust: Peer, upload: int, download: int) -> None:
        await join(rust, node)
        result = await rust.order("perf", upload=upload, download=download)
        assert (result["upload"], result["received"]) == (upload, download)

    async def test_small_writes(self, node: Node, rust: Peer) -> None:
        await join(rust, node)
        await rust.order("perf", upload=2 * MIB, write=100)


class TestEnds:
    """Half-close in both orders, and resets."""

    @pytest.mark.parametrize("size", SIZES)
    async def test_we_end_our_direction_and_read_on(self, node: Node, rust: Peer, size: int) -> None:
        stream = await node.connect(rust.address, HALF_CLOSE)
        with trio.fail_after(PATIENCE):
            await pour(stream, size)
            assert await counted(stream) == (size, True)

    @pytest.mark.parametrize("size", SIZES)
    async def test_it_ends_its_direction_and_reads_on(self, node: Node, served: Served, rust: Peer, size: int) -> None:
        await join(rust, node)
        answer = await rust.order("half-close", bytes=size)
        assert (answer["counted"], answer["intact"]) == (size, True)

    @pytest.mark.parametrize("size", SIZES)
    async def test_it_ends_first_and_we_write_on(self, node: Node, rust: Peer, size: int) -> None:
        stream = await node.connect(rust.address, FIRST_CLOSE)
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b""
            await pour(stream, size)
            received = await rust.wait("served", protocol=FIRST_CLOSE)
            assert (received["received"], received["intact"]) == (size, True)

    @pytest.mark.parametrize("size", SIZES)
    async def test_we_end_first_and_it_writes_on(self, node: Node, served: Served, rust: Peer, size: int) -> None:
        await join(rust, node)
        answer = await rust.order("first-close", bytes=size)
        assert answer["early"] == 0
        received = await served.results.receive()
        assert (received.size, received.intact) == (size, True)

    async def test_it_resets_a_stream_of_ours(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, RESET)
        await stream.send_all(b"x")
        with pytest.raises(StreamReset) as caught, trio.fail_after(PATIENCE):
            await stream.receive_some()
        assert caught.value.by_peer
        assert await node.ping(rust.peer) > 0, "nothing else is touched"

    async def test_we_reset_a_stream_of_its(self, node: Node, served: Served, rust: Peer) -> None:
        await join(rust, node)
        answer = await rust.order("be-reset")
        assert (answer["kind"], answer["bytes"]) == (None, 0), "rust tells its reader of a reset as of an end"
        assert (await rust.order("ping"))["rtt"] > 0

    async def test_it_resets_a_stream_of_its(self, node: Node, rust: Peer) -> None:
        ended = trio.Event()

        async def echo_until_reset(stream: object) -> None:
            assert isinstance(stream, YamuxStream)
            await stream.send_all(await stream.receive_some())
            with pytest.raises(StreamReset):
                await stream.receive_some()
            ended.set()

        await node.serve(echo_until_reset, ECHO)
        await join(rust, node)
        await rust.order("reset")
        with trio.fail_after(PATIENCE):
            await ended.wait()
        assert (await rust.order("ping"))["rtt"] > 0

    async def test_we_reset_a_stream_of_ours(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, ECHO)
        await round_trip(stream)
        stream.reset()
        # Rust tells its reader of a reset as of an end.
        assert (await rust.wait("served", protocol=ECHO))["received"] == 32
        assert await node.ping(rust.peer) > 0


class TestBulk:
    """Both directions at once."""

    async def test_64_mib_each_way(self, node: Node, rust: Peer) -> None:
        size = 64 * MIB
        stream = await node.connect(rust.address, BULK)
        await stream.send_all(BULK_HEADER.pack(size, size, 65_536, 0, 0, 0))
        with trio.fail_after(PATIENCE):
            received = await both_ways(stream, size)
        assert (received.size, received.intact) == (size, True)
        theirs = await rust.wait("served", protocol=BULK)
        assert (theirs["received"], theirs["intact"], theirs["complete"]) == (size, True, True)

    async def test_64_mib_each_way_to_a_slow_reader(self, node: Node, rust: Peer) -> None:
        """It reads 256 KiB every 5 ms, at first nothing for 6 s: a pause that ends streams elsewhere."""
        size = 64 * MIB
        stream = await node.connect(rust.address, BULK)
        await stream.send_all(BULK_HEADER.pack(size, size, 65_536, 256 * KIB, 5_000, 6_000))
        with trio.fail_after(PATIENCE):
            received = await both_ways(stream, size)
        assert (received.size, received.intact) == (size, True)
        theirs = await rust.wait("served", protocol=BULK)
        assert (theirs["received"], theirs["intact"], theirs["complete"]) == (size, True, True)

    async def test_64_mib_each_way_and_we_are_the_slow_reader(self, node: Node, served: Served, rust: Peer) -> None:
        size = 64 * MIB
        await join(rust, node)
        answer = await rust.order(
            "bulk", up=size, down=size, peer_stall_ms=6_000, peer_pause_us=5_000, peer_chunk=256 * KIB
        )
        assert (answer["received"], answer["intact"], answer["complete"]) == (size, True, True)
        ours = await served.results.receive()
        assert (ours.size, ours.intact) == (size, True)

    @pytest.mark.parametrize("write", [1, 13, 4096, MIB])
    async def test_writes_of_every_size(self, node: Node, served: Served, rust: Peer, write: int) -> None:
        size = min(8 * MIB, write * 20_000)
        await join(rust, node)
        answer = await rust.order("bulk", up=size, down=size, write=write)
        assert (answer["received"], answer["intact"], answer["complete"]) == (size, True, True)
        ours = await served.results.receive()
        assert (ours.size, ours.intact) == (size, True)

    async def test_many_streams_at_once(self, node: Node, served: Served, rust: Peer) -> None:
        await join(rust, node)
        answer = await rust.order("streams", count=50, size=200_000)
        assert answer["complete"]


class TestWindows:
    """Flow control: a stream that is not read stops alone."""

    async def test_it_does_not_read(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, HOLD)
        await rust.wait("holding")
        assert isinstance(stream, YamuxStream)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await stream.send_all(pattern(sent, 16 * KIB))
                sent += 16 * KIB

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await eventually(lambda: stream.sent >= INITIAL_WINDOW - 32 * KIB)
            await trio.sleep(1)  # for what it might grant, and we might send, beyond
            nursery.cancel_scope.cancel()
        on_the_way = stream.sent
        assert INITIAL_WINDOW - 32 * KIB <= on_the_way <= INITIAL_WINDOW, "it granted no more than its first window"
        # The others go on as if nothing were.
        assert await node.ping(rust.peer) > 0
        other = await node.connect(rust.peer, HALF_CLOSE)
        with trio.fail_after(PATIENCE):
            await pour(other, 4 * MIB)
            assert await counted(other) == (4 * MIB, True)
        await rust.order("release")
        with trio.fail_after(PATIENCE):
            await stream.send_eof()
            count, intact = await counted(stream)
        assert intact
        assert sent <= count <= sent + 16 * KIB, "a write that was cancelled may have been sent"

    async def test_we_do_not_read(self, node: Node, served: Served, rust: Peer) -> None:
        await join(rust, node)
        filled = await rust.order("fill", protocol=HOLD, quiet_ms=1000)
        # The window less the negotiation; rust takes no more than it may send.
        assert INITIAL_WINDOW - 100 <= filled["bytes"] <= INITIAL_WINDOW
        (held,) = [each for each in node.connections[0].connection.streams if each.protocol == HOLD]
        assert held.unread <= INITIAL_WINDOW
        assert (await rust.order("ping"))["rtt"] > 0
        assert (await rust.order("half-close", bytes=4 * MIB))["counted"] == 4 * MIB
        served.release.set()
        answer = await rust.order("finish", stream=filled["stream"])
        assert (answer["counted"], answer["intact"]) == (filled["bytes"], True)

    async def test_our_window_grows_for_it(self, node: Node, served: Served, rust: Peer) -> None:
        """After a bulk the window may have grown; what a stalled reader is sent is still bounded by it."""
        await join(rust, node)
        await rust.order("perf", upload=64 * MIB)
        assert (await rust.order("half-close", bytes=64 * MIB, write=MIB))["intact"]

    async def test_one_slow_stream_beside_fast_ones(self, node: Node, rust: Peer) -> None:
        # At its pace the slow one takes over six seconds, the fast ones a fraction of one.
        slow = await node.connect(rust.address, BULK)
        await slow.send_all(BULK_HEADER.pack(8 * MIB, 0, 0, 64 * KIB, 50_000, 0))
        finished: list[str] = []

        async def finish_slow() -> None:
            await pour(slow, 8 * MIB)
            await rust.wait("served", protocol=BULK)
            finished.append("slow")

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finish_slow)
                for _ in range(3):
                    fast = await node.connect(rust.peer, HALF_CLOSE)
                    await pour(fast, 4 * MIB)
                    assert await counted(fast) == (4 * MIB, True)
                    finished.append("fast")
        assert finished == ["fast", "fast", "fast", "slow"]

    async def test_a_stream_is_open_before_a_byte_is_sent(self, node: Node, rust: Peer) -> None:
        """The opener may be the one who listens first: the proposal has to leave all the same."""
        stream = await node.connect(rust.address, FIRST_CLOSE)
        with trio.fail_after(PATIENCE):
            assert await stream.receive_some() == b""

    async def test_more_streams_than_its_backlog_of_unacknowledged_ones(self, node: Node, rust: Peer) -> None:
        streams = []
        for _ in range(100):
            stream = await node.connect(rust.address, ECHO)
            await round_trip(stream)
            streams.append(stream)
        for stream in streams:
            await stream.send_eof()
            assert (await drain(stream)).size == 0
        for _ in range(300):
            stream = await node.connect(rust.peer, ECHO)
            await stream.send_all(b"x")
            assert await read_exactly(stream, 1) == b"x"
            await stream.aclose()
        assert await node.ping(rust.peer) > 0
