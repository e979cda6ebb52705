"""Tells peers whether we want a relayed connection to become direct, and answers those that tell us."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kas_libp2p._rates import Rates
from kas_libp2p.errors import ConnectionLost, NegotiationError, RemoteProtocolError, StreamCode, StreamReset
from kas_libp2p.events import EventBus, LimitHit, PeerMisbehaved
from kas_libp2p.metadata import PathKind
from kas_libp2p.strategy._intent import MAX_MESSAGE, PROTOCOL, Intent, decode, encode
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream

TIMEOUT = 10.0
"""Seconds for the other side's intent: a round trip through a relay takes one at most, and this side waits for nothing
meanwhile."""
PEER_BURST, PEER_INTERVAL = 4, 15.0
"""Intents of one peer at once, and seconds for each one more: there is one per invitation, and these are rare."""
MAX_STREAMS, MAX_STREAMS_PER_PEER = 64, 2
"""Streams that are served at once: as many as there are punches."""


class Intents:
    """Serves and uses ``/kas-libp2p/upgrade/1.0.0``.

    Args:
        events: where everything is told.
        answer: given a relayed connection of ours and what the peer there wants, says what we want; must not wait nor
            raise.
    """

    def __init__(self, events: EventBus, *, answer: Callable[[Connection, Intent], Intent]) -> None:
        self._events = events
        self._answer = answer
        self._rate = Rates(PEER_BURST, PEER_INTERVAL)

    async def open(self, connection: Connection, intent: Intent) -> YamuxStream:
        """Tell what we want. Waits for no answer; see `wait`.

        Raises:
            ConnectionLost, Refused: no stream could be opened.
        """
        stream = await connection.open_stream(PROTOCOL)
        stream.send_nowait(encode(intent))
        return stream

    async def wait(self, stream: YamuxStream) -> Intent | None:
        """What the other side wants. ``None`` if it does not say: it is none of this project's nodes, or is too slow.

        Args:
            stream: of `open`; it is closed afterwards.
        """
        connection = stream.connection
        intent: Intent | None = None
        try:
            with trio.fail_after(TIMEOUT):
                intent = decode(await receive_frame(stream, MAX_MESSAGE))
                await stream.aclose()
        except RemoteProtocolError as error:
            at = connection.remote_address
            self._events.emit(PeerMisbehaved(peer=connection.peer, address=at, layer=PROTOCOL, reason=str(error)))
        except (trio.TooSlowError, NegotiationError, ConnectionLost, StreamReset, trio.ClosedResourceError):
            pass  # nothing was told, and nothing is lost by that
        finally:
            if not stream.over:
                stream.reset()
        return intent

    async def handle(self, stream: YamuxStream) -> None:
        """Serve it.

        Raises:
            RemoteProtocolError: the peer broke the protocol, asked on a connection where it must not, or said nothing.
        """
        connection = stream.connection
        if connection.path.kind is not PathKind.RELAYED:
            raise RemoteProtocolError("an upgrade intent on a connection that is direct")
        if not connection.initiator:
            raise RemoteProtocolError("an upgrade intent from the side that made the circuit")
        if not self._rate.take(connection.peer, trio.current_time()):
            stream.reset(StreamCode.RESOURCES)
            self._events.emit(LimitHit(reason="upgrade_intents", peer=connection.peer, address=""))
            return
        try:
            with trio.fail_after(TIMEOUT):
                theirs = decode(await receive_frame(stream, MAX_MESSAGE))
        except trio.TooSlowError:
            raise RemoteProtocolError(f"an upgrade intent did not come within {TIMEOUT:g} s") from None
        stream.send_nowait(encode(self._answer(connection, theirs)))
