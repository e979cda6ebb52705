"""Local addresses at which kaspad dials a peer by itself: one per peer, 127.0.k.1, the same over restarts.

For an operator who wants kaspad to dial (``--addpeer=127.0.3.1:16118``) instead of being joined. The address is open
only while its peer is reachable, so that kaspad does not wait for a peer that is not there: its dials are serial, and a
silent one holds up all others for ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kas_libp2p.errors import ListenError, RemoteProtocolError
from kas_libp2p.kaspa.sources import PoolExhausted as PoolExhausted
from kas_libp2p.kaspa.sources import PoolSources
from kas_libp2p.metadata import OverlayStream, PeerId

PING = "/ipfs/ping/1.0.0"
PING_SIZE = 32
"""Bytes of a libp2p ping (libp2p specs, ping)."""

PING_EVERY = 10.0
"""Seconds between two signs of life of a peer whose address is open."""

PING_TIMEOUT = 5.0
"""Seconds for a peer to answer before its address is closed."""

MAX_LISTENERS = 254
"""127.0.1.1 to 127.0.254.1."""


class LocalAddresses:
    """Which local address belongs to which peer, remembered in a file.

    Args:
        path: the file; ``None`` forgets everything at the end.
        port: TCP port of every address.
    """

    def __init__(self, path: Path | None, port: int) -> None:
        self._table = PoolSources([f"127.0.{k}.1/32" for k in range(1, MAX_LISTENERS + 1)], path=path)
        self.port = port

    @asynccontextmanager
    async def listening(
        self, peer: PeerId, on_dial: Callable[[trio.SocketStream], Awaitable[object]]
    ) -> AsyncIterator[str]:
        """Listen at the peer's address for the length of a block, and hand over who dials, each in a task of its own.

        Raises:
            ListenError: the address can't be listened on.
            PoolExhausted: every address is open for another peer.
        """
        with self._table.lease(peer) as host:
            try:
                listeners = await trio.open_tcp_listeners(self.port, host=host)
            except OSError as error:
                raise ListenError(
                    f"can't listen on {host}:{self.port} for kaspad: {error.strerror}; give another --listener-port"
                ) from error
            failure: BaseException | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, on_dial, listeners)
                try:
                    yield f"{host}:{self.port}"
                except trio.Cancelled:
                    raise
                except BaseException as error:  # noqa: BLE001 - raised below, outside of the nursery: no group wraps it
                    failure = error
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure


async def stay(stream: OverlayStream) -> None:
    """Return after `PING_EVERY` seconds in which the connection under a ping stream did not end.

    Raises:
        RemoteProtocolError: the peer ended the stream, or said something unasked.
        KasError: the connection ended.
    """
    with trio.move_on_after(PING_EVERY):
        data = await stream.receive_some(1)
        raise RemoteProtocolError("the peer ended its ping stream" if not data else "an answer to no ping")


async def ping(stream: OverlayStream) -> None:
    """One libp2p ping on a stream that was opened for `PING`.

    Raises:
        RemoteProtocolError: the answer is another one.
        trio.TooSlowError: none within `PING_TIMEOUT` seconds.
        KasError: the connection ended.
    """
    nonce = os.urandom(PING_SIZE)
    answer = b""
    with trio.fail_after(PING_TIMEOUT):
        await stream.send_all(nonce)
        while len(answer) < PING_SIZE:
            data = await stream.receive_some(PING_SIZE - len(answer))
            if not data:
                raise RemoteProtocolError("the peer ended its ping stream")
            answer += bytes(data)
    if answer != nonce:
        raise RemoteProtocolError("the peer answered a ping with other bytes")
