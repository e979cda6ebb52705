"""The stream to kaspad: as trio wants streams to be, and written without waiting."""

import socket

import pytest
import trio
import trio.testing

from kas_libp2p.kaspa.tcp import KaspadStream

Streams = tuple[KaspadStream, KaspadStream]


async def pair() -> Streams:
    one, other = socket.socketpair()
    return KaspadStream(trio.socket.from_stdlib_socket(one)), KaspadStream(trio.socket.from_stdlib_socket(other))


def fill(stream: KaspadStream) -> int:
    """Write until nothing more is taken."""
    total = 0
    while count := stream.send_nowait(bytes(65536)):
        total += count
    return total


async def clogged_pair() -> Streams:
    streams = await pair()
    for stream in streams:
        fill(stream)
    return streams


async def test_it_is_what_trio_calls_a_stream() -> None:
    await trio.testing.check_half_closeable_stream(pair, clogged_pair)


async def test_what_is_taken_without_waiting_arrives() -> None:
    left, right = await pair()
    async with left, right:
        total = fill(left)
        assert total > 65536
        received = 0
        while received < total:
            received += len(await right.receive_some(1 << 20))
        assert received == total
        assert left.send_nowait(b"again") == 5
        assert await right.receive_some(1 << 20) == b"again"


async def test_writing_without_waiting_to_who_has_gone() -> None:
    left, right = await pair()
    await right.aclose()
    with pytest.raises(trio.BrokenResourceError):
        left.send_nowait(b"x")
    await left.aclose()
    with pytest.raises(trio.BrokenResourceError):
        left.send_nowait(b"x")
