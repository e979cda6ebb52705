"""The test protocols on our side, in both roles; ``tests/interop/rust/src/protocols.rs`` describes them.

The pattern repeats after a prime number of bytes near 64 KiB, so that no lost, doubled or swapped piece of a usual size
goes unnoticed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import trio

from kas_libp2p import Node, OverlayStream

ECHO = "/kas-interop/echo/1.0.0"
HALF_CLOSE = "/kas-interop/half-close/1.0.0"
FIRST_CLOSE = "/kas-interop/first-close/1.0.0"
BULK = "/kas-interop/bulk/1.0.0"
HOLD = "/kas-interop/hold/1.0.0"
RESET = "/kas-interop/reset/1.0.0"

PERIOD = 65_521
_PATTERN = bytes((i % PERIOD * 167 + i % PERIOD // 251) & 0xFF for i in range(2 * PERIOD))
BULK_HEADER = struct.Struct(">QQIIII")
ANSWER = struct.Struct(">Q?")


def pattern(offset: int, size: int) -> bytes:
    """``size`` bytes of the pattern from ``offset`` on."""
    start = offset % PERIOD
    if start + size <= len(_PATTERN):
        return _PATTERN[start : start + size]
    whole, rest = divmod(start + size, PERIOD)
    return (_PATTERN[:PERIOD] * whole + _PATTERN[:rest])[start:]


@dataclass(slots=True)
class Received:
    """What was read until the end of a stream."""

    size: int = 0
    intact: bool = True

    def take(self, data: bytes) -> None:
        self.intact &= data == pattern(self.size, len(data))
        self.size += len(data)


async def drain(stream: OverlayStream, *, stall: float = 0, pause: float = 0, chunk: int | None = None) -> Received:
    """Read until the end: nothing for ``stall`` seconds, then ``pause`` seconds after each ``chunk`` bytes."""
    if stall:
        await trio.sleep(stall)
    received = Received()
    while data := await stream.receive_some(chunk):
        received.take(data)
        if pause:
            await trio.sleep(pause)
    return received


async def pour(stream: OverlayStream, size: int, *, write: int = 65_536) -> None:
    """Write ``size`` bytes of the pattern in pieces, then end this direction."""
    for offset in range(0, size, write):
        await stream.send_all(pattern(offset, min(write, size - offset)))
    await stream.send_eof()


async def both_ways(
    stream: OverlayStream,
    send: int,
    *,
    write: int = 65_536,
    stall: float = 0,
    pause: float = 0,
    chunk: int | None = None,
) -> Received:
    """Write and read at once, until both directions ended."""
    received = Received()

    async def read() -> None:
        nonlocal received
        received = await drain(stream, stall=stall, pause=pause, chunk=chunk)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await pour(stream, send, write=write)
    return received


async def read_exactly(stream: OverlayStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        assert more, f"the stream ended after {len(data)} of {size} bytes"
        data += more
    return data


async def round_trip(stream: OverlayStream, message: bytes = b"0123456789abcdef0123456789abcdef") -> None:
    await stream.send_all(message)
    assert await read_exactly(stream, len(message)) == message


async def counted(stream: OverlayStream) -> tuple[int, bool]:
    """The other side's answer to half-close and hold."""
    count, intact = ANSWER.unpack(await read_exactly(stream, ANSWER.size))
    assert await stream.receive_some() == b""
    return count, intact


class Served:
    """What our side of the test protocols does and saw.

    Attributes:
        release: lets streams of the hold protocol be read.
        results: what came on streams of bulk and first-close; the other side may be done before us.
    """

    def __init__(self) -> None:
        self.release = trio.Event()
        self._results, self.results = trio.open_memory_channel[Received](16)

    async def echo(self, stream: OverlayStream) -> None:
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()

    async def half_close(self, stream: OverlayStream) -> None:
        received = await drain(stream)
        await stream.send_all(ANSWER.pack(received.size, received.intact))
        await stream.send_eof()

    async def first_close(self, stream: OverlayStream) -> None:
        await stream.send_eof()
        await self._results.send(await drain(stream))

    async def bulk(self, stream: OverlayStream) -> None:
        header = BULK_HEADER.unpack(await read_exactly(stream, BULK_HEADER.size))
        _up, down, write, chunk, pause, stall = header
        await self._results.send(
            await both_ways(stream, down, write=write, stall=stall / 1e3, pause=pause / 1e6, chunk=chunk or None)
        )

    async def hold(self, stream: OverlayStream) -> None:
        await self.release.wait()
        await self.half_close(stream)

    async def reset(self, stream: OverlayStream) -> None:
        await stream.receive_some(1)
        stream.reset()


async def serve(node: Node) -> Served:
    """Serve the test protocols on a node."""
    served = Served()
    await node.serve(served.echo, ECHO, max_per_peer=64)
    await node.serve(served.half_close, HALF_CLOSE)
    await node.serve(served.first_close, FIRST_CLOSE)
    await node.serve(served.bulk, BULK)
    await node.serve(served.hold, HOLD)
    await node.serve(served.reset, RESET)
    return served
