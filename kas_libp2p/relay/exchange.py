"""Asking peers for relays, and telling them of ours. What is asked and told is decided in `kas_libp2p.relay._exchange`;
what comes of it, in `kas_libp2p.relay._pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from kas_libp2p.errors import KasError, RemoteProtocolError
from kas_libp2p.events import EventBus, LimitHit, PeerMisbehaved, RelaysHeard
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.relay._exchange import (
    MAX_MESSAGE,
    RELAYS,
    Answer,
    Answering,
    Asking,
    answer_to,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
    origin_of,
)
from kas_libp2p.relay._pool import Dice
from kas_libp2p.relay.pool import RelayPool
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream

__all__ = ["MAX_STREAMS", "RELAYS", "RelayExchange"]

MAX_STREAMS = 64
"""Requests that are served at once; of one peer there is one."""
REQUEST_TIMEOUT = 10.0
"""Seconds for a request to come: it is a few bytes."""
ANSWER_TIMEOUT = 5.0
"""Seconds for an answer, about which the peer has to ask nobody. Whoever visits a relay waits for it as well."""


class RelayExchange:
    """Both sides of ``/kas-libp2p/relays/1.0.0``. Peers are asked for as long as `run` runs.

    Args:
        peer: our peer id.
        events: where everything is told.
        pool: what is known of relays, and whether more are wanted.
        connections: the connection to each peer that is the best for it.
        operator: who runs this node, if it is a relay; empty: not told.
        free: places left here; ``None`` while we are no relay.
        dice: chance.
    """

    def __init__(
        self,
        peer: PeerId,
        events: EventBus,
        pool: RelayPool,
        *,
        connections: Callable[[], Iterable[Connection]],
        operator: str,
        free: Callable[[], int | None],
        dice: Dice,
    ) -> None:
        self._peer = peer
        self._events = events
        self._pool = pool
        self._connections = connections
        self._operator = operator
        self._free = free
        self._asking = Asking(dice)
        self._answering = Answering()
        self._wake = trio.Event()
        pool.on_appetite.append(self._wake_up)

    # Asking

    def met(self, peer: PeerId) -> None:
        """A peer is connected that serves the protocol."""
        self._asking.met(peer, trio.current_time())
        self._wake_up()

    def gone(self, peer: PeerId) -> None:
        """A peer is connected no longer."""
        self._asking.gone(peer, trio.current_time())

    async def run(self) -> None:
        """Ask whenever the pool wants more, one peer after the other, until cancelled."""
        while True:
            self._wake = trio.Event()
            peer = self._asking.choose(self._pool.appetite, trio.current_time())
            if peer is None:
                with trio.move_on_at(self._asking.deadline):
                    await self._wake.wait()
                continue
            connection = next((each for each in self._connections() if each.peer == peer), None)
            if connection is None:
                self.gone(peer)
            else:
                await self.ask(connection)

    async def ask(self, connection: Connection) -> None:
        """Ask a peer, unless it was asked a short while ago. What it does wrong is told as an event, never raised."""
        peer = connection.peer
        if not self._asking.may_ask(peer, trio.current_time()):
            return
        self._asking.asked(peer, trio.current_time())
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                answer = await self._ask(connection)
        except RemoteProtocolError as error:
            where = connection.remote_address
            self._events.emit(PeerMisbehaved(peer=peer, address=where, layer=RELAYS, reason=str(error)))
        except (KasError, trio.TooSlowError):
            pass  # it tells nothing, as a peer may
        else:
            self._heard(connection, answer)

    async def _ask(self, connection: Connection) -> Answer:
        stream = await connection.open_stream(RELAYS)
        try:
            await stream.send_all(encode_request())
            answer = decode_answer(await receive_frame(stream, MAX_MESSAGE))
            await stream.aclose()
        except BaseException:
            stream.reset()
            raise
        return answer

    def _heard(self, connection: Connection, answer: Answer) -> None:
        teller = connection.peer
        origin = _origin(connection)
        self._pool.said(teller, operator=answer.operator, free=answer.free)
        others = [each for each in answer.relays if each.peer not in (self._peer, teller)]
        taken = sum(self._pool.heard(each, teller=teller, origin=origin) for each in others)
        self._events.emit(RelaysHeard(peer=teller, told=len(others), taken=taken))

    def _wake_up(self) -> None:
        self._wake.set()

    # Answering

    async def handle(self, stream: YamuxStream) -> None:
        """Serve the protocol.

        Raises:
            RemoteProtocolError: what came is no request, or nothing came in time.
        """
        connection = stream.connection
        limit = self._answering.admit(connection.peer, _origin(connection), trio.current_time())
        if limit is not None:
            self._events.emit(LimitHit(reason=limit, peer=connection.peer, address=connection.remote_address))
            stream.reset()
            return
        try:
            with trio.fail_after(REQUEST_TIMEOUT):
                most = decode_request(await receive_frame(stream, MAX_MESSAGE))
        except trio.TooSlowError:
            raise RemoteProtocolError(f"its request did not come within {REQUEST_TIMEOUT:g} s") from None
        answer = answer_to(connection.peer, most, self._pool.tell(), operator=self._operator, free=self._free())
        await stream.send_all(encode_answer(answer))


def _origin(connection: Connection) -> str:
    relay = connection.path.relay if connection.path.kind is PathKind.RELAYED else None
    return origin_of(connection.peer, connection.remote_address, relay)
