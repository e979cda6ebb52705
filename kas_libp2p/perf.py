"""perf 1.0.0: how much goes through in each direction.

The client says how many bytes it wants back (8 bytes, big endian), sends as many as it likes, and ends its direction.
The server reads to the end, then sends what was asked for, and ends its own.

No node serves this unasked: whoever connects could have it fill its uplink. To serve it, ``await
node.serve(perf.handle, perf.ID)``, as ``kas-libp2p listen`` does.

Source: libp2p specs ``perf/perf.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.metadata import OverlayStream

if TYPE_CHECKING:
    from kas_libp2p.transport.connection import Connection

ID = "/perf/1.0.0"
HEADER = 8
BLOCK = 64 * 1024
"""Bytes of one write."""
STALL_TIMEOUT = 30.0
"""Seconds without progress after which the server gives up."""
_ZEROS = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class PerfResult:
    """One measurement.

    Attributes:
        uploaded, downloaded: bytes.
        upload_seconds: from the first byte until the peer had read everything and its first byte (or its end) came.
        download_seconds: from then until the end.
    """

    uploaded: int
    downloaded: int
    upload_seconds: float
    download_seconds: float


async def handle(stream: OverlayStream) -> None:
    """Serve ``/perf/1.0.0``.

    Raises:
        RemoteProtocolError: the peer ended before it said how much it wants, or stalled.
    """
    header = bytearray()
    with trio.move_on_after(STALL_TIMEOUT) as stall:
        while data := await stream.receive_some():
            stall.deadline = trio.current_time() + STALL_TIMEOUT
            if len(header) < HEADER:
                header += data[: HEADER - len(header)]
        if len(header) < HEADER:
            raise RemoteProtocolError("perf ended before its header")
        left = int.from_bytes(header, "big")
        while left:
            await stream.send_all(_ZEROS if left >= BLOCK else _ZEROS[:left])
            left -= min(left, BLOCK)
            stall.deadline = trio.current_time() + STALL_TIMEOUT
        await stream.send_eof()
        return
    raise RemoteProtocolError(f"no progress for {STALL_TIMEOUT:g} s")


async def measure(
    connection: Connection,
    *,
    upload: int = 0,
    download: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PerfResult:
    """Measure as the client.

    Args:
        upload, download: bytes.
        progress: called with bytes sent and received so far, often.

    Raises:
        RemoteProtocolError: the peer sent another amount than was asked for.
        ConnectionLost, StreamReset, NegotiationError: the stream ended, or the peer does not serve it.
    """
    stream = await connection.open_stream(ID)
    try:
        started = trio.current_time()
        await stream.send_all(download.to_bytes(HEADER, "big"))
        sent = received = 0
        while sent < upload:
            size = min(BLOCK, upload - sent)
            await stream.send_all(_ZEROS if size == BLOCK else _ZEROS[:size])
            sent += size
            if progress is not None:
                progress(sent, 0)
        await stream.send_eof()
        turned: float | None = None
        while data := await stream.receive_some():
            turned = turned or trio.current_time()
            received += len(data)
            if received > download:
                break
            if progress is not None:
                progress(sent, received)
        ended = trio.current_time()
        if received != download:
            raise RemoteProtocolError(f"{download} bytes were asked for, {received} came")
    except BaseException:
        stream.reset()
        raise
    await stream.aclose()
    turned = turned or ended
    return PerfResult(sent, received, turned - started, ended - turned)
