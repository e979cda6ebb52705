"""The first message of a stream on which something else may follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.transport.yamux.stream import YamuxStream

T_ = TypeVar("T_")


async def receive_frame(stream: YamuxStream, max_size: int) -> bytes:
    """Read one message. What came behind it stays unread.

    Args:
        max_size: bytes that it may have.

    Raises:
        RemoteProtocolError: its length is malformed or over the cap, or the peer ended the stream before its end.
        ConnectionLost, StreamReset, NegotiationError, trio.ClosedResourceError: as `YamuxStream.receive_some`.
    """
    decoder = FrameDecoder(max_size)

    def take(data: bytes) -> tuple[bytes, bytes] | None:
        decoder.feed(data)
        message = decoder.next_frame()
        return None if message is None else (message, decoder.take_rest())

    return await receive_first(stream, take)


async def receive_first(stream: YamuxStream, take: Callable[[bytes], tuple[T_, bytes] | None]) -> T_:
    """Read as much as somebody needs who takes what comes apart.

    Args:
        take: is given what has come since the last time. Returns what it made of it all, and the bytes that are to stay
            unread; ``None``: it needs more. What it raises comes out as it is.

    Raises:
        RemoteProtocolError: the peer ended the stream before.
        ConnectionLost, StreamReset, NegotiationError, trio.ClosedResourceError: as `YamuxStream.receive_some`.
    """
    while True:
        await stream.wait_unread()
        if not stream._state.chunks:
            await stream.receive_some()  # raises, unless it ended in order
            raise RemoteProtocolError("the peer ended the stream before a whole message had come")
        taken = take(stream._take_unread())
        if taken is not None:
            made, rest = taken
            stream._put_back(rest)
            return made
