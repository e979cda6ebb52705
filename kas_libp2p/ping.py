"""ping 1.0.0: 32 random bytes go there and come back.

Source: libp2p specs ``ping/ping.md``. Unlike the ping of Yamux, which the peer's multiplexer answers, this one goes
through everything that a stream goes through.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import trio

from kas_libp2p.errors import ConnectionLost, RemoteProtocolError

if TYPE_CHECKING:
    from kas_libp2p.transport.connection import Connection
    from kas_libp2p.transport.yamux.stream import YamuxStream

ID = "/ipfs/ping/1.0.0"
SIZE = 32
TIMEOUT = 10.0
"""Seconds to wait for an answer; go and js wait as long."""
IDLE_TIMEOUT = 60.0
"""Seconds that a peer may leave its ping stream unused; it can always open another."""
MAX_STREAMS_PER_PEER = 2
"""As the specification has it: one, and one that is just closing."""


_turns: WeakKeyDictionary[Connection, trio.Lock] = WeakKeyDictionary()


def turn(connection: Connection) -> trio.Lock:
    """To be held by whoever has a stream for pings open: a side opens but one, and rust drops the old one for a new."""
    return _turns.setdefault(connection, trio.Lock())


async def handle(stream: YamuxStream) -> None:
    """Serve ``/ipfs/ping/1.0.0``: send back what comes.

    Raises:
        RemoteProtocolError: the peer ended in the middle of a ping.
    """
    held = bytearray()
    with trio.move_on_after(IDLE_TIMEOUT) as idle:
        while data := await stream.receive_some():
            idle.deadline = trio.current_time() + IDLE_TIMEOUT
            held += data
            whole = len(held) - len(held) % SIZE
            if whole:
                await stream.send_all(bytes(held[:whole]))
                del held[:whole]
        if held:
            raise RemoteProtocolError(f"a ping of {len(held)} bytes, it has {SIZE}")


class Pinger:
    """Pings one peer over one stream, one ping at a time. Made by `open_pinger`."""

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream

    async def ping(self) -> float:
        """The round trip in seconds.

        Raises:
            RemoteProtocolError: the answer is another than what was sent.
            trio.TooSlowError: no answer within `TIMEOUT`.
            ConnectionLost, StreamReset, NegotiationError: the stream ended.
        """
        sent = secrets.token_bytes(SIZE)
        got = b""
        with trio.fail_after(TIMEOUT):
            started = trio.current_time()
            await self._stream.send_all(sent)
            while len(got) < SIZE:
                data = await self._stream.receive_some(SIZE - len(got))
                if not data:
                    raise ConnectionLost("the peer ended the ping stream")
                got += data
            seconds = trio.current_time() - started
        if got != sent:
            raise RemoteProtocolError("the answer to a ping is not what was sent")
        return seconds


@asynccontextmanager
async def open_pinger(connection: Connection) -> AsyncIterator[Pinger]:
    """A stream for pings. The first one includes the agreement on the protocol, but no round trip for it.

    Waits while another one is open on the connection.

    Raises:
        ConnectionLost, Refused: no stream could be opened.
    """
    async with turn(connection):
        stream = await connection.open_stream(ID)
        try:
            yield Pinger(stream)
        except BaseException:
            stream.reset()
            raise
        await stream.aclose()
