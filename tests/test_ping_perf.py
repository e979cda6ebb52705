"""ping and perf: what a peer may do wrong, and how long it may take."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import perf, ping
from kas_libp2p.errors import ConnectionLost, RemoteProtocolError
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.transport.pairs import Pair, connected

Handler = Callable[[YamuxStream], Awaitable[None]]


@asynccontextmanager
async def answered_by(handler: Handler, protocol: str) -> AsyncIterator[Connection]:
    """A connection to a peer that serves one stream."""
    async with connected(delay=0.05) as pair:

        async def serve() -> None:
            stream = await pair.accept(pair.bob, protocol)
            await handler(stream)
            await stream.aclose()

        pair.nursery.start_soon(serve)
        yield pair.alice


async def served(pair: Pair, protocol: str) -> tuple[YamuxStream, YamuxStream]:
    mine = await pair.alice.open_stream(protocol)
    return mine, await pair.accept(pair.bob, protocol)


# ping


async def test_the_round_trip_is_measured_again_and_again(autojump_clock: MockClock) -> None:
    async with answered_by(ping.handle, ping.ID) as connection, ping.open_pinger(connection) as pinger:
        assert [await pinger.ping() for _ in range(3)] == pytest.approx([0.1] * 3)


async def test_one_stream_at_a_time(autojump_clock: MockClock) -> None:
    """More than one open at once is against the specification, and rust-libp2p drops the older."""
    served = 0
    async with connected(delay=0.05) as pair:

        async def serve() -> None:
            nonlocal served
            while True:
                stream = await pair.accept(pair.bob, ping.ID)
                await ping.handle(stream)  # to its end, before another one is answered
                await stream.aclose()
                served += 1

        async def measure() -> None:
            async with ping.open_pinger(pair.alice) as pinger:
                assert [await pinger.ping() for _ in range(2)] == pytest.approx([0.1] * 2)

        pair.nursery.start_soon(serve)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(measure)
        await trio.sleep(0.1)
        assert served == 3


async def test_another_answer(autojump_clock: MockClock) -> None:
    async def lie(stream: YamuxStream) -> None:
        await stream.receive_some()
        await stream.send_all(bytes(ping.SIZE))

    async with answered_by(lie, ping.ID) as connection:
        with pytest.raises(RemoteProtocolError, match="not what was sent"):
            async with ping.open_pinger(connection) as pinger:
                await pinger.ping()
        assert not connection.streams


async def test_no_answer(autojump_clock: MockClock) -> None:
    async def leave(stream: YamuxStream) -> None:
        await stream.receive_some()

    async def say_nothing(stream: YamuxStream) -> None:
        await trio.sleep_forever()

    for handler, error in ((leave, ConnectionLost), (say_nothing, trio.TooSlowError)):
        async with answered_by(handler, ping.ID) as connection:
            started = trio.current_time()
            with pytest.raises(error):
                async with ping.open_pinger(connection) as pinger:
                    await pinger.ping()
            assert trio.current_time() - started <= ping.TIMEOUT


async def test_pings_may_come_in_any_pieces_and_pauses_end_the_stream(autojump_clock: MockClock) -> None:
    async with connected() as pair:
        mine, theirs = await served(pair, ping.ID)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping.handle, theirs)
            await mine.send_all(b"x" * 40)
            assert await mine.receive_some() == b"x" * 32
            await mine.send_all(b"y" * 24)
            assert await mine.receive_some() == b"x" * 8 + b"y" * 24
            started = trio.current_time()
        assert trio.current_time() - started == ping.IDLE_TIMEOUT


# perf


async def test_both_directions_are_measured(autojump_clock: MockClock) -> None:
    seen: list[tuple[int, int]] = []
    async with answered_by(perf.handle, perf.ID) as connection:
        result = await perf.measure(
            connection, upload=100_000, download=50_000, progress=lambda sent, received: seen.append((sent, received))
        )
    assert (result.uploaded, result.downloaded) == seen[-1] == (100_000, 50_000)
    assert result.upload_seconds == pytest.approx(0.1)
    assert result.download_seconds == pytest.approx(0)


async def test_another_amount_than_was_asked_for(autojump_clock: MockClock) -> None:
    async def send(stream: YamuxStream, count: int) -> None:
        while await stream.receive_some():
            pass
        await stream.send_all(bytes(count))

    for count in (9, 11):

        async def wrong(stream: YamuxStream, count: int = count) -> None:
            await send(stream, count)

        async with answered_by(wrong, perf.ID) as connection:
            with pytest.raises(RemoteProtocolError, match=f"10 bytes were asked for, {count} came"):
                await perf.measure(connection, download=10)
            assert not connection.streams


async def test_a_client_that_ends_in_its_header(autojump_clock: MockClock) -> None:
    async with connected() as pair:
        mine, theirs = await served(pair, perf.ID)
        await mine.send_all(b"1234")
        await mine.send_eof()
        with pytest.raises(RemoteProtocolError, match="before its header"):
            await perf.handle(theirs)


@pytest.mark.parametrize("ends", [False, True])
async def test_a_client_that_stalls_sending_or_fetching(ends: bool, autojump_clock: MockClock) -> None:
    async with connected() as pair:
        mine, theirs = await served(pair, perf.ID)
        await mine.send_all((1 << 30).to_bytes(8, "big"))
        if ends:
            await mine.send_eof()
        started = trio.current_time()
        with pytest.raises(RemoteProtocolError, match="no progress for 30 s"):
            await perf.handle(theirs)
        assert trio.current_time() - started == pytest.approx(perf.STALL_TIMEOUT)
