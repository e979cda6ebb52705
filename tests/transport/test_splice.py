"""A circuit of two streams: source, relay and destination in one test."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p.config import KIB, MIB
from kas_libp2p.errors import StreamReset
from kas_libp2p.transport.splice import BURST_SECONDS, MIN_STEP, SMALL, STALLED, STEP_SECONDS, End, Memory, Splice
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.transport.pairs import Pair, connected

RESOURCES = 0x1002


class Circuit:
    """A splice that runs.

    Attributes:
        source, destination: the ends.
        relay: the relay's two streams: from the source, and to the destination.
        pairs: the connections: source and relay, relay and destination.
        splice: what joins them.
        end: why it ended; ``None`` while it has not.
    """

    def __init__(self, pairs: tuple[Pair, Pair], ends: tuple[YamuxStream, ...]) -> None:
        self.pairs = pairs
        self.source, relay_in, relay_out, self.destination = ends
        self.relay = relay_in, relay_out
        self.end: End | None = None
        self.ended = trio.Event()
        self.splice: Splice

    async def run(self, **limits: Any) -> None:
        self.splice = Splice(*self.relay, **limits)
        self.end = await self.splice.run()
        self.ended.set()
        for stream in self.relay:  # as the swarm and the server do
            await stream.aclose()


@asynccontextmanager
async def unspliced(*, delay: float = 0.0, capacity: int = 1 << 20) -> AsyncIterator[Circuit]:
    async with connected(delay=delay, capacity=capacity) as first, connected(delay=delay, capacity=capacity) as second:
        ends = (*await first.streams(), *await second.streams())
        await trio.sleep(2 * delay)
        await wait_all_tasks_blocked()  # all have agreed on their protocol
        yield Circuit((first, second), ends)


@asynccontextmanager
async def circuit(*, delay: float = 0.0, capacity: int = 1 << 20, **limits: Any) -> AsyncIterator[Circuit]:
    async with unspliced(delay=delay, capacity=capacity) as c, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: c.run(**limits))
        await wait_all_tasks_blocked()
        yield c
        nursery.cancel_scope.cancel()


async def read_all(stream: YamuxStream, count: int | None = None) -> bytes:
    data = bytearray()
    while (count is None or len(data) < count) and (piece := await stream.receive_some()):
        data += piece
    return bytes(data)


async def send(stream: YamuxStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_there_and_back(autojump_clock: MockClock) -> None:
    async with circuit(delay=0.01) as c:
        begun = trio.current_time()
        await c.source.send_all(b"good day")
        assert await c.destination.receive_some() == b"good day"
        await c.destination.send_all(b"and to you")
        assert await c.source.receive_some() == b"and to you"
        assert trio.current_time() - begun == pytest.approx(0.04)  # the relay adds nothing
        assert (c.splice.forth, c.splice.back, c.end) == (8, 10, None)


async def test_what_came_before_is_passed_on() -> None:
    async with unspliced() as c, trio.open_nursery() as nursery:
        await c.source.send_all(b"early")
        await c.destination.send_all(b"welcome, ")
        await c.destination.send_eof()
        await wait_all_tasks_blocked()
        assert await c.relay[0].receive_some(3) == b"ear"  # what the relay read itself is no part of the circuit
        nursery.start_soon(c.run)
        assert await c.destination.receive_some() == b"ly"
        assert await read_all(c.source) == b"welcome, "
        assert (c.splice.forth, c.splice.back) == (2, 9)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seed", range(4))
async def test_any_bytes_both_ways_at_once(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    forth, back = dice.randbytes(dice.randrange(3 * MIB)), dice.randbytes(dice.randrange(3 * MIB))
    async with circuit(delay=0.005, capacity=50_000) as c:
        for pair in c.pairs:
            pair.alice_raw.largest_read = dice.choice((1000, 30_000, 1 << 20))
            pair.bob_raw.largest_read = dice.choice((1000, 30_000, 1 << 20))
        got: dict[str, bytes] = {}

        async def read(name: str, stream: YamuxStream) -> None:
            got[name] = await read_all(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, c.source, forth)
            nursery.start_soon(send, c.destination, back)
            nursery.start_soon(read, "forth", c.destination)
            nursery.start_soon(read, "back", c.source)
        assert got == {"forth": forth, "back": back}
        await trio.sleep(1)
        assert (c.end, c.splice.forth, c.splice.back) == (End.CLOSED, len(forth), len(back))


async def test_half_close(autojump_clock: MockClock) -> None:
    async with circuit() as c:
        await send(c.source, b"question")
        assert await read_all(c.destination) == b"question"
        await trio.sleep(1000)
        assert c.end is None
        await c.destination.send_all(b"answer")
        assert await c.source.receive_some() == b"answer"
        await c.destination.send_eof()
        assert await c.source.receive_some() == b""
        await wait_all_tasks_blocked()
        assert c.end is End.CLOSED
        await trio.sleep(100)
        assert not any(connection.streams for pair in c.pairs for connection in (pair.alice, pair.bob))


async def test_the_end_waits_for_the_last_byte(autojump_clock: MockClock) -> None:
    """Both sides have said all; the line to the destination is slow, and nothing of it is lost."""
    async with circuit(delay=0.5, capacity=20_000) as c:
        await send(c.destination, b"")
        data = bytes(range(256)) * 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, c.source, data)
            assert await read_all(c.destination) == data
        await trio.sleep(10)
        assert c.end is End.CLOSED


async def test_the_bytes_come_out_in_order_with_a_reader_that_sleeps(autojump_clock: MockClock) -> None:
    async with circuit(delay=0.001) as c, trio.open_nursery() as nursery:
        data = random.Random(1).randbytes(4 * MIB)
        nursery.start_soon(send, c.source, data)
        await trio.sleep(STALLED - 1)
        held = sum(stream.unread for stream in c.relay)
        assert 0 < held <= c.relay[0]._state.window
        assert c.destination.unread + held < len(data)
        assert await read_all(c.destination) == data


async def test_a_side_that_does_not_read_stops_the_other_and_nobody_else(autojump_clock: MockClock) -> None:
    async with circuit() as c, trio.open_nursery() as nursery:
        nursery.start_soon(c.source.send_all, bytes(2 * MIB))
        await trio.sleep(1)
        assert c.splice.forth <= 256 * KIB + c.relay[0]._state.window
        assert c.relay[0].unread == c.relay[1].unsent <= c.relay[0]._state.window
        assert c.relay[0]._state.window <= 512 * KIB
        # The other direction, and another stream of each connection, go on.
        await c.destination.send_all(b"still here")
        assert await c.source.receive_some() == b"still here"
        for pair in c.pairs:
            mine, theirs = await pair.streams()
            await mine.send_all(b"beside")
            assert await theirs.receive_some() == b"beside"
        nursery.cancel_scope.cancel()


async def test_windows_grow_as_on_a_direct_connection(autojump_clock: MockClock) -> None:
    """20 MB over 50 + 50 ms: with windows of 256 KiB it would take 8 s."""
    async with circuit(delay=0.05, capacity=1 << 26) as c, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(send, c.source, bytes(20_000_000))
        assert len(await read_all(c.destination)) == 20_000_000
        assert trio.current_time() - begun < 3
        await trio.sleep(1)
        assert c.relay[0]._state.window <= 16 * MIB


# How it ends


@pytest.mark.parametrize("code", [0, 0x1003])
async def test_a_reset_by_the_source(code: int) -> None:
    async with circuit() as c:
        c.source.reset(code)
        with pytest.raises(StreamReset) as info:
            await c.destination.receive_some()
        assert (info.value.by_peer, info.value.code, c.end) == (True, code, End.SOURCE_RESET)


async def test_a_reset_by_the_destination_in_the_middle_of_a_transfer() -> None:
    async with circuit() as c, trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(StreamReset):
                await c.source.send_all(bytes(4 * MIB))

        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        c.destination.reset()
        await wait_all_tasks_blocked()
        assert c.end is End.DESTINATION_RESET
        # What was queued, and what was held, is given back.
        for pair in c.pairs:
            assert not pair.alice.streams
            assert not pair.bob.streams


async def test_a_connection_is_lost() -> None:
    async with circuit() as c:
        c.pairs[1].bob.abort()
        with pytest.raises(StreamReset):
            await c.source.receive_some()
        assert c.end is End.DESTINATION_LOST
        assert c.pairs[0].alice.close_reason is None
    async with circuit() as c:
        await c.pairs[0].alice.aclose()
        with pytest.raises(StreamReset):
            await c.destination.receive_some()
        assert c.end is End.SOURCE_LOST


@pytest.mark.parametrize("ends_first", [True, False])
async def test_who_has_said_all_and_leaves_is_heard_to_the_end(ends_first: bool, autojump_clock: MockClock) -> None:
    """The destination reads late; what the relay has of the source is not lost with its connection."""
    async with circuit() as c:
        data = bytes(range(256)) * 1600  # more than the destination's window
        if ends_first:
            await send(c.destination, b"")
        await send(c.source, data)
        await wait_all_tasks_blocked()
        c.pairs[0].alice.abort()
        await wait_all_tasks_blocked()
        assert c.end is None
        assert await read_all(c.destination) == data
        if not ends_first:
            await trio.sleep(100)
            assert c.end is None
            await c.destination.send_eof()
        await trio.sleep(2)
        assert c.end in (End.SOURCE_LOST, End.CLOSED)
        assert not c.pairs[1].alice.streams
        assert not c.pairs[1].bob.streams


async def test_an_answer_to_who_has_left_is_a_reset() -> None:
    async with circuit() as c:
        await send(c.source, b"question")
        await wait_all_tasks_blocked()
        c.pairs[0].alice.abort()
        await wait_all_tasks_blocked()
        assert await read_all(c.destination) == b"question"
        assert c.end is None
        await c.destination.send_all(b"answer")
        await wait_all_tasks_blocked()
        assert c.end is End.SOURCE_LOST
        with pytest.raises(StreamReset):
            await c.destination.send_all(b"and more")


async def test_both_have_left() -> None:
    """The destination took nothing any more, and can take no more."""
    async with circuit() as c:
        await send(c.destination, b"")
        await send(c.source, bytes(600 * KIB))
        c.pairs[0].alice.abort()
        await wait_all_tasks_blocked()
        c.pairs[1].bob.abort()
        await wait_all_tasks_blocked()
        assert c.end in (End.SOURCE_LOST, End.DESTINATION_LOST)


async def test_the_relay_leaves() -> None:
    async with unspliced() as c:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(c.run)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for stream in (c.source, c.destination):
            with pytest.raises(StreamReset):
                await stream.receive_some()
        assert c.splice.end is End.RELAY


async def test_the_relay_s_connection_ends_under_it() -> None:
    async with circuit() as c:
        await c.pairs[0].bob.aclose("a limit")
        for stream in (c.source, c.destination):
            with pytest.raises(StreamReset):  # told before the connection says goodbye
                await stream.receive_some()
        assert c.end is End.SOURCE_LOST


async def test_a_stream_that_was_reset_before() -> None:
    async with unspliced() as c:
        c.source.reset()
        await wait_all_tasks_blocked()
        await c.run()
        assert c.end is End.SOURCE_RESET
        with pytest.raises(StreamReset):
            await c.destination.receive_some()


# Limits


@pytest.mark.parametrize(("sent", "over"), [(999, False), (1000, False), (1001, True), (5000, True)])
async def test_bytes(sent: int, over: bool) -> None:
    """One below, equal, above: both directions together."""
    async with circuit(max_bytes=1000) as c:
        await c.destination.send_all(bytes(400))
        assert len(await read_all(c.source, 400)) == 400
        await c.source.send_all(bytes(sent - 400))
        await wait_all_tasks_blocked()
        assert c.splice.forth + c.splice.back == min(sent, 1000)
        if over:
            assert c.end is End.BYTES
            for stream in (c.source, c.destination):
                with pytest.raises(StreamReset) as info:
                    await stream.receive_some()
                assert info.value.code == RESOURCES
        else:
            assert len(await read_all(c.destination, sent - 400)) == sent - 400
            await c.destination.send_eof()  # the end of a direction costs nothing
            await c.source.send_eof()
            await wait_all_tasks_blocked()
            assert c.end is End.CLOSED


async def test_byte_by_byte_the_last_one_arrives() -> None:
    async with circuit(max_bytes=20) as c:
        for number in range(20):
            await c.source.send_all(bytes([number]))
            assert await c.destination.receive_some() == bytes([number])
        await c.source.send_all(b"!")
        await wait_all_tasks_blocked()
        assert c.end is End.BYTES
        assert c.splice.forth == 20


async def test_seconds_while_idle(autojump_clock: MockClock) -> None:
    async with circuit(max_seconds=120) as c:
        await trio.sleep_until(c.splice.opened_at + 119.9)
        await wait_all_tasks_blocked()
        assert c.end is None
        with pytest.raises(StreamReset) as info:
            await c.destination.receive_some()
        assert trio.current_time() == pytest.approx(c.splice.opened_at + 120)
        assert (c.end, info.value.code) == (End.SECONDS, RESOURCES)


async def test_seconds_in_the_middle_of_a_transfer(autojump_clock: MockClock) -> None:
    async with circuit(delay=0.01, capacity=10_000, max_seconds=2) as c, trio.open_nursery() as nursery:

        async def write() -> None:
            with suppress(StreamReset):
                while True:
                    await c.source.send_all(bytes(100_000))

        nursery.start_soon(write)
        with pytest.raises(StreamReset):
            await read_all(c.destination)
        assert trio.current_time() == pytest.approx(c.splice.opened_at + 2, abs=0.1)
        assert c.end is End.SECONDS
        assert c.splice.forth > 1_000_000


async def test_zeros_are_no_limits(autojump_clock: MockClock) -> None:
    async with circuit(max_bytes=0, max_seconds=0, max_rate=0) as c:
        await trio.sleep(15_000)
        await c.source.send_all(bytes(100_000))
        assert len(await read_all(c.destination, 100_000)) == 100_000
        assert c.end is None


@pytest.mark.parametrize("rate", [1000, 100_000, 4 * MIB])
async def test_a_rate(rate: int, autojump_clock: MockClock) -> None:
    """A second's worth at once, then so much per second, in each direction by itself."""
    burst = int(max(MIN_STEP, rate * BURST_SECONDS))
    step = max(STEP_SECONDS, MIN_STEP / rate)

    async def read(stream: YamuxStream) -> None:
        begun = trio.current_time()
        assert len(await read_all(stream, burst)) == burst
        assert trio.current_time() == begun
        assert len(await read_all(stream)) == 5 * rate
        assert 5 <= trio.current_time() - begun <= 5 + step

    async with circuit(max_rate=rate, capacity=1 << 26) as c:
        await trio.sleep(100)
        async with trio.open_nursery() as nursery:
            for stream in (c.source, c.destination):
                nursery.start_soon(send, stream, bytes(burst + 5 * rate))
                nursery.start_soon(read, stream)
        await wait_all_tasks_blocked()
        assert c.end is End.CLOSED


async def test_windows_grow_to_what_a_rate_can_use(autojump_clock: MockClock) -> None:
    """4 MiB per second over 50 + 50 ms, which takes 400 KiB at a time."""
    async with circuit(delay=0.05, capacity=1 << 26, max_rate=4 * MIB) as c, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(send, c.source, bytes(44 * MIB))
        assert len(await read_all(c.destination)) == 44 * MIB
        assert trio.current_time() - begun == pytest.approx(10, abs=0.5)
        assert 400 * KIB < c.relay[0]._state.max_window <= MIB


async def test_below_its_rate_nothing_waits(autojump_clock: MockClock) -> None:
    async with circuit(max_rate=100_000) as c:
        for _ in range(50):
            begun = trio.current_time()
            await c.source.send_all(bytes(50_000))
            assert len(await read_all(c.destination, 50_000)) == 50_000
            assert trio.current_time() == begun
            await trio.sleep(0.5)


async def test_what_waits_for_its_rate_is_held_by_the_sender(autojump_clock: MockClock) -> None:
    async with circuit(max_rate=1000) as c, trio.open_nursery() as nursery:
        nursery.start_soon(c.source.send_all, bytes(MIB))
        await trio.sleep(60)
        assert c.splice.forth == pytest.approx(MIN_STEP + 60 * 1000, abs=MIN_STEP)
        assert c.relay[0].unread + c.relay[0]._state.allowed <= 256 * KIB
        nursery.cancel_scope.cancel()


async def test_limits_together(autojump_clock: MockClock) -> None:
    async with circuit(max_rate=10_000, max_bytes=50_000, max_seconds=100) as c, trio.open_nursery() as nursery:
        begun = trio.current_time()
        nursery.start_soon(c.source.send_all, bytes(60_000))
        with pytest.raises(StreamReset):
            await read_all(c.destination)
        assert trio.current_time() - begun == pytest.approx(4, abs=0.1)
        assert (c.end, c.splice.forth) == (End.BYTES, 50_000)


# Among each other


async def test_circuits_on_the_same_two_connections_share_them(autojump_clock: MockClock) -> None:
    async with connected(delay=0.005, capacity=200_000) as first, connected(delay=0.005, capacity=200_000) as second:
        circuits = [Circuit((first, second), (*await first.streams(), *await second.streams())) for _ in range(16)]
        with trio.move_on_after(20):
            async with trio.open_nursery() as nursery:

                async def pour(stream: YamuxStream) -> None:
                    while True:
                        await stream.send_all(bytes(65536))

                for each in circuits:
                    nursery.start_soon(each.run)
                    nursery.start_soon(pour, each.source)
                    nursery.start_soon(read_all, each.destination)
        shares = [each.splice.forth for each in circuits]
        assert min(shares) >= 0.8 * max(shares)


# Sides that do not read


@pytest.mark.parametrize("who", ["source", "destination"])
async def test_a_side_that_takes_nothing_is_given_up(who: str, autojump_clock: MockClock) -> None:
    async with circuit() as c, trio.open_nursery() as nursery:
        writer, reader = (c.source, c.destination) if who == "destination" else (c.destination, c.source)

        async def pour() -> None:
            with pytest.raises(StreamReset) as info:
                await writer.send_all(bytes(MIB))
            assert info.value.code == RESOURCES

        await trio.sleep(1000)  # idle is not stalled
        begun = trio.current_time()
        nursery.start_soon(pour)
        await reader.wait_unread()
        await c.ended.wait()
        assert c.end == f"{who}_stalled"
        assert STALLED <= trio.current_time() - begun <= STALLED + 2


async def test_a_side_that_stops_later_is_given_up_within_twice_the_time(autojump_clock: MockClock) -> None:
    async with circuit() as c, trio.open_nursery() as nursery:
        nursery.start_soon(_pour, c.source)
        for _ in range(100):
            await c.destination.receive_some()
            await trio.sleep(1)
        stopped = trio.current_time()
        await c.ended.wait()
        assert c.end is End.DESTINATION_STALLED
        assert trio.current_time() - stopped <= 2 * STALLED


async def _pour(stream: YamuxStream) -> None:
    with suppress(StreamReset):
        while True:
            await stream.send_all(bytes(100 * KIB))


async def _drain(stream: YamuxStream) -> None:
    with suppress(StreamReset):
        await read_all(stream)


@pytest.mark.parametrize(("rate", "ends"), [(256 * KIB / STALLED * 1.1, False), (256 * KIB / STALLED * 0.5, True)])
async def test_a_side_that_takes_little(rate: float, ends: bool, autojump_clock: MockClock) -> None:
    """Little, but enough; and too little to be of use."""
    async with circuit() as c, trio.open_nursery() as nursery:
        nursery.start_soon(_pour, c.source)
        with suppress(StreamReset):
            for _ in range(600):
                await c.destination.receive_some(max(1, int(rate)))
                await trio.sleep(1)
        assert (c.end is End.DESTINATION_STALLED) is ends
        nursery.cancel_scope.cancel()


async def test_waiting_for_tokens_is_nobody_s_fault(autojump_clock: MockClock) -> None:
    async with circuit(max_rate=1000) as c, trio.open_nursery() as nursery:
        nursery.start_soon(_pour, c.source)
        with trio.move_on_after(10 * STALLED):
            await read_all(c.destination)
        assert c.end is None
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def crowd(count: int, memory: Memory) -> AsyncIterator[list[Circuit]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(circuit(delay=0.01, capacity=50_000, memory=memory)) for _ in range(count)
        ]


async def test_what_all_hold_together_is_bounded(autojump_clock: MockClock) -> None:
    """Those whose ends have stopped for longest go first, and whose end reads is not touched."""
    memory = Memory(MIB)
    async with crowd(6, memory) as circuits, trio.open_nursery() as nursery:
        flowing, *stalled = circuits
        nursery.start_soon(_pour, flowing.source)
        nursery.start_soon(_drain, flowing.destination)
        for each in stalled:
            nursery.start_soon(_pour, each.source)
            await trio.sleep(1)
            if each is stalled[0]:
                memory._limit = memory.held * 5 // 2
            assert memory.held <= memory._limit
            assert memory.held == sum(circuit.splice.held for circuit in circuits if circuit.end is None)
        assert [each.end for each in stalled] == [End.MEMORY] * 3 + [None] * 2
        assert flowing.end is None
        carried = flowing.splice.forth
        await trio.sleep(1)
        assert flowing.splice.forth > carried
        with pytest.raises(StreamReset) as info:
            await read_all(stalled[0].destination)
        assert info.value.code == RESOURCES
        for each in stalled:
            each.source.reset()
        flowing.source.reset()
        await trio.sleep(1)
        assert memory.held == 0
        assert not memory._splices
        nursery.cancel_scope.cancel()


async def test_single_bytes_that_wait_take_no_more_room_than_others(autojump_clock: MockClock) -> None:
    """In frames of their own, a read each: a window full of them would be 12 MB of objects."""
    async with circuit() as c:
        await c.source.send_all(bytes(256 * KIB))  # all that the destination has granted
        await wait_all_tasks_blocked()
        pieces = bytes(range(250)) * 40
        for byte in pieces:
            await c.source.send_all(bytes((byte,)))
            await wait_all_tasks_blocked()
        queue = c.relay[1]._state.queue
        assert c.relay[1].unsent >= len(pieces)
        assert len(queue) <= 2 * len(pieces) // SMALL + 2
        assert await read_all(c.destination, 256 * KIB + len(pieces)) == bytes(256 * KIB) + pieces
