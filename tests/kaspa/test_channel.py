from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError
from kas_libp2p.kaspa.channel import MemoryChannel, Piece, memory_channel_pair, running


def cut(message: bytes, sizes: list[int]) -> list[Piece]:
    """Pieces of a message, cut at the given sizes."""
    pieces, at = [], 0
    for size in [*sizes, len(message)]:
        data = message[at : at + size]
        if data or not at:
            pieces.append(Piece(data, len(message) - at - len(data), at == 0, len(message)))
        at += len(data)
        if at == len(message):
            break
    return pieces


async def test_messages_arrive_whole_and_in_order() -> None:
    left, right = memory_channel_pair()
    for message in (b"one", b"", b"three" * 1000):
        await left.send(message)
    assert [await right.receive() for _ in range(3)] == [b"one", b"", b"three" * 1000]
    assert (left.messages_sent, left.bytes_sent) == (right.messages_received, right.bytes_received) == (3, 5003)


@given(
    messages=st.lists(st.binary(max_size=300), max_size=8),
    sizes=st.lists(st.integers(1, 100), max_size=8),
    batch=st.integers(1, 64),
)
def test_however_it_is_cut(messages: list[bytes], sizes: list[int], batch: int) -> None:
    async def main() -> list[bytes]:
        left, right = memory_channel_pair(batch=batch)

        async def send() -> None:
            for message in messages:
                for piece in cut(message, sizes):
                    await left.send_pieces([piece])
            await left.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            return [message async for message in right]

    assert trio.run(main) == messages


async def test_a_large_message_streams_through_a_small_buffer() -> None:
    left, right = memory_channel_pair(batch=1000, high_water=2000)
    message = bytes(range(256)) * 100
    largest = 0
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for piece in cut(message, [700] * 100):
                await left.send_pieces([piece])

        nursery.start_soon(send)
        received = b""
        while len(received) < len(message):
            largest = max(largest, right._inbox_bytes)
            received += b"".join(piece.data for piece in await right.receive_pieces())
    assert received == message
    assert largest <= 2700


async def test_a_sender_waits_above_the_high_water_mark(autojump_clock: trio.testing.MockClock) -> None:
    left, right = memory_channel_pair(high_water=100)
    await left.send(bytes(100))
    with trio.move_on_after(10) as scope:
        await left.send(b"x")
    assert scope.cancelled_caught
    # It was queued all the same: cancelling a send never cuts a message.
    assert await right.receive() == bytes(100)
    assert await right.receive() == b"x"


async def test_a_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    left, right = memory_channel_pair()
    await left.send_pieces([Piece(b"half", 4, True, 8)])
    with trio.move_on_after(1):
        await right.receive()
    await left.send_pieces([Piece(b"half", 0, False, 8)])
    assert await right.receive() == b"halfhalf"


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(b"x", 0, False, 1)],
        [Piece(b"x", 1, True, 3)],
        [Piece(b"x", 1, True, 2), Piece(b"y", 0, True, 1)],
        [Piece(b"x", 1, True, 2), Piece(b"yz", 0, False, 2)],
        [Piece(b"xx", -1, True, 1)],
        [Piece(bytes(2000), 0, True, 2000)],
    ],
)
async def test_pieces_that_do_not_fit_are_refused_before_they_are_sent(pieces: list[Piece]) -> None:
    left, right = memory_channel_pair(max_message=1000)
    with pytest.raises(LocalProtocolError):
        await left.send_pieces(pieces)
    await left.send(b"well")
    assert await right.receive() == b"well"


async def test_the_end_in_order_and_the_other_ends() -> None:
    left, right = memory_channel_pair()
    await left.send(b"last")
    await left.send_eof()
    assert await right.receive() == b"last"
    assert await right.receive() is None
    assert await right.receive_pieces() == []
    with pytest.raises(LocalProtocolError):
        await left.send(b"after")
    await right.send(b"the other way goes on")
    assert await left.receive() == b"the other way goes on"
    await right.aclose("tired")
    with pytest.raises(ConnectionLost, match="closed by the peer: tired"):
        await left.receive()


async def test_an_end_within_a_message_is_the_peers_fault() -> None:
    left, right = memory_channel_pair()
    await left.send_pieces([Piece(b"half", 4, True, 8)])
    await left.send_eof()
    with pytest.raises(RemoteProtocolError):
        await right.receive()


async def test_one_task_at_a_time() -> None:
    left, _ = memory_channel_pair(high_water=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.receive)
        nursery.start_soon(left.send, b"xx")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await left.receive()
        with pytest.raises(trio.BusyResourceError):
            await left.send(b"yy")
        nursery.cancel_scope.cancel()


async def test_running_closes_and_passes_errors_as_they_are() -> None:
    left, right = memory_channel_pair()
    with pytest.raises(KeyError):
        async with running(left):
            raise KeyError
    async with running(right) as channel:
        assert isinstance(channel, MemoryChannel)
    with pytest.raises(ConnectionLost):
        await left.send(b"x")
