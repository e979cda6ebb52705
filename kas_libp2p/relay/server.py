"""A relay: answers requests for places and circuits, and carries the circuits. What it gives away is decided in
`kas_libp2p.relay._server`; how a circuit is carried is told in `kas_libp2p.transport.splice`.

A circuit belongs to the task that serves the stream of whoever asked for it, and ends with it. That task sleeps while
the circuit is carried.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits
from kas_libp2p.errors import ConnectionLost, NegotiationError, Refused, RemoteProtocolError, StreamReset
from kas_libp2p.events import CircuitClosed, CircuitOpened, EventBus, PeerMisbehaved, RelayRequestServed
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.relay._messages import (
    HOP,
    MAX_MESSAGE,
    STOP,
    Connect,
    HopStatus,
    Limit,
    Peer,
    Reservation,
    Reserve,
    Status,
    StopConnect,
    StopStatus,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)
from kas_libp2p.relay._server import Asker, Circuit, Refusal, Relay
from kas_libp2p.relay._voucher import seal_voucher
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.splice import Memory, Splice
from kas_libp2p.transport.yamux.stream import YamuxStream

__all__ = ["HOP", "RelayServer", "RelayStatus"]

REQUEST_TIMEOUT = 10.0
"""Seconds that a request may take to come: a stream that says nothing holds a place among the streams."""
STOP_TIMEOUT = 10.0
"""Seconds that a destination has to take a circuit, as in rust: some round trips, and a lost packet. A place among the
circuits is held meanwhile."""
LONGEST_TOLD = 365 * 86_400.0
"""Seconds of a place that are told at most: others' clocks overflow long before the field does."""
LONGEST_CIRCUIT_TOLD = 86_400.0
"""Seconds of a circuit that are told at most: js relays give milliseconds, as which clients of ours read any more."""
SPARE_STREAMS = 4
"""Hop streams of one peer beyond its circuits, and those by which they are renewed: requests under way."""


@dataclass(frozen=True, slots=True)
class ReservationStatus:
    """A place that a peer has here.

    Attributes:
        peer: whose.
        address: where it is.
        seconds: for which it lasts unless it is renewed.
    """

    peer: PeerId
    address: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CircuitStatus:
    """A circuit that is carried here.

    Attributes:
        number: counts the circuits.
        source, destination: its ends.
        seconds: how long it has been up.
        forth, back: bytes from and to the source.
    """

    number: int
    source: PeerId
    destination: PeerId
    seconds: float
    forth: int
    back: int


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """A relay at one moment.

    Attributes:
        reservations: the one that ends first is the first.
        circuits: the oldest first.
        limits: what is given away.
        in_use: how much of each limit is taken.
    """

    reservations: tuple[ReservationStatus, ...]
    circuits: tuple[CircuitStatus, ...]
    limits: RelayLimits
    in_use: Mapping[str, int]


class RelayServer:
    """Being a relay.

    Args:
        identity: our key.
        config: for whom, and what is given away.
        events: where everything is told.
        addresses: what a peer is told about where we can be reached, without our peer id.
        offers_kaspa: whether a peer's identify offers a Kaspa stream; may wait for it. Asked if the purpose demands it.
        wall_clock: seconds since the epoch, in which expiries are told.

    Attributes:
        max_streams, max_streams_per_peer: hop streams that have to be allowed for the limits to be reached.
    """

    def __init__(
        self,
        identity: Identity,
        config: RelayConfig,
        events: EventBus,
        *,
        addresses: Callable[[Connection], Sequence[Multiaddr]],
        offers_kaspa: Callable[[Connection], Awaitable[bool]],
        wall_clock: Callable[[], float],
    ) -> None:
        limits = config.limits
        self.max_streams = limits.max_circuits + limits.max_reservations
        self.max_streams_per_peer = 2 * limits.max_circuits_per_peer + SPARE_STREAMS
        self._identity = identity
        self._events = events
        self._addresses = addresses
        self._offers_kaspa = offers_kaspa
        self._wall_clock = wall_clock
        self._purpose = config.purpose
        seconds = limits.max_circuit_seconds
        told = min(seconds, LONGEST_CIRCUIT_TOLD) if 0 < seconds < math.inf else None
        self._limit = Limit(told, limits.max_circuit_bytes or None)
        self._relay: Relay[Connection] = Relay(limits)
        self._splices: dict[int, Splice] = {}
        self._memory = Memory(limits.max_circuit_memory)
        self._withdrawals = 0

    async def handle(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/circuit/relay/0.2.0/hop``: one request, and the circuit that it may lead to."""
        try:
            with trio.fail_after(REQUEST_TIMEOUT):
                message = decode_hop(await receive_frame(stream, MAX_MESSAGE))
        except trio.TooSlowError:
            self._misbehaved(stream.connection, f"no request within {REQUEST_TIMEOUT:g} s")
            stream.reset()
            return
        except RemoteProtocolError as error:
            self._misbehaved(stream.connection, str(error))
            await self._refuse(stream, "", Refusal(Status.MALFORMED_MESSAGE, "malformed"))
            return
        match message:
            case Reserve():
                await self._reserve(stream)
            case Connect(peer):
                await self._connect(stream, peer)
            case HopStatus():
                self._misbehaved(stream.connection, "a status in place of a request")
                await self._refuse(stream, "", Refusal(Status.UNEXPECTED_MESSAGE, "unexpected"))

    # Places

    async def _reserve(self, stream: YamuxStream) -> None:
        connection = stream.connection
        asker, before = _asker(connection), self._withdrawals
        refusal = self._relay.admit_reserve(asker, trio.current_time()) or await self._check_purpose(connection)
        if self._withdrawals != before:  # while we waited
            refusal = Refusal(Status.PERMISSION_DENIED, "withdrawn")
        if refusal is not None:
            return await self._refuse(stream, "reserve", refusal)
        if connection.close_reason is not None:  # while we waited: `forget` would not be called again
            return None
        place = self._relay.reserve(asker, trio.current_time())
        if isinstance(place, Refusal):
            return await self._refuse(stream, "reserve", place)
        expire = int(self._wall_clock() + min(self._relay.limits.reservation_seconds, LONGEST_TOLD))
        # Without any address a client could not tell others, and rust's fails: then the one that it has found us at.
        told = [str(each) for each in self._addresses(connection)] or [connection.local_address]
        reservation = Reservation(
            expire,
            tuple(str(addr.with_peer(each, self._identity.peer_id)) for each in told),
            seal_voucher(self._identity, connection.peer, expire),
        )
        await self._answer(stream, "reserve", HopStatus(Status.OK, reservation, self._limit))
        return None

    async def _check_purpose(self, connection: Connection) -> Refusal | None:
        if self._purpose is Purpose.ANY or await self._offers_kaspa(connection):
            return None
        return Refusal(Status.PERMISSION_DENIED, "purpose")

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection has to stay although it carries no stream: its peer has its place by it."""
        return self._relay.has_place(connection, connection.peer, trio.current_time())

    def withdraw(self) -> None:
        """This node is no relay any more, which identify tells: the places are gone. Circuits stay to their end."""
        self._withdrawals += 1
        self._relay.clear()

    def forget(self, connection: Connection, other: Connection | None = None) -> None:
        """A connection ended.

        Args:
            other: one that the peer has still.
        """
        self._relay.forget(connection, connection.peer, _asker(other) if other is not None else None)

    # Circuits

    async def _connect(self, stream: YamuxStream, destination: PeerId) -> None:
        connection = stream.connection
        asker = _asker(connection)
        refusal = self._relay.admit_connect(asker, destination, trio.current_time())
        refusal = refusal or await self._check_purpose(connection)
        if refusal is not None:
            return await self._refuse(stream, "connect", refusal)
        circuit = self._relay.connect(asker, destination, trio.current_time())
        if isinstance(circuit, Refusal):
            return await self._refuse(stream, "connect", circuit)
        try:
            other = await self._reach(circuit, connection)
            if isinstance(other, Refusal):
                return await self._refuse(stream, "connect", other)
            try:
                there = Peer(destination, (circuit.connection.remote_address,))
                await self._answer(stream, "connect", HopStatus(Status.OK, limit=self._limit, peer=there))
                await self._carry(circuit, stream, other)
            except BaseException:
                other.reset()
                raise
            await other.aclose()
        finally:
            self._relay.release(circuit)
        return None

    async def _reach(self, circuit: Circuit[Connection], source: Connection) -> YamuxStream | Refusal:
        """Have the destination take the circuit."""
        connection = circuit.connection
        reason = "destination_lost"
        try:
            stream = await connection.open_stream(STOP)
        except Refused:
            return Refusal(Status.CONNECTION_FAILED, "destination_streams")
        except ConnectionLost:
            return Refusal(Status.CONNECTION_FAILED, reason)
        taken = False
        try:
            with trio.fail_after(STOP_TIMEOUT):
                here = Peer(source.peer, (source.remote_address,))
                await stream.send_all(encode_stop(StopConnect(here, self._limit)))
                answer = decode_stop(await receive_frame(stream, MAX_MESSAGE))
            if not isinstance(answer, StopStatus):
                raise RemoteProtocolError("it was told of a circuit, and asked for one in place of an answer")
            taken = answer.status is Status.OK
            if taken:
                return stream
            reason = "destination_refused"
        except trio.TooSlowError:
            reason = "destination_silent"
        except NegotiationError:
            reason = "destination_unable"
        except RemoteProtocolError as error:
            self._misbehaved(connection, str(error))
            reason = "destination_misbehaved"
        except (ConnectionLost, StreamReset):
            pass
        finally:
            if not taken:
                stream.reset()
        return Refusal(Status.CONNECTION_FAILED, reason)

    async def _carry(self, circuit: Circuit[Connection], source: YamuxStream, destination: YamuxStream) -> None:
        limits = self._relay.limits
        splice = self._splices[circuit.number] = Splice(
            source,
            destination,
            max_bytes=limits.max_circuit_bytes,
            max_seconds=limits.max_circuit_seconds,
            max_rate=limits.max_circuit_rate,
            memory=self._memory,
        )
        number, here, there = circuit.number, circuit.source, circuit.destination
        self._events.emit(CircuitOpened(circuit=number, source=here, destination=there))
        try:
            await splice.run()
        finally:
            del self._splices[number]
            self._events.emit(
                CircuitClosed(
                    circuit=number,
                    source=here,
                    destination=there,
                    reason=str(splice.end),
                    seconds=trio.current_time() - splice.opened_at,
                    forth=splice.forth,
                    back=splice.back,
                )
            )

    # Answering

    async def _refuse(self, stream: YamuxStream, request: str, refusal: Refusal) -> None:
        await self._answer(stream, request, HopStatus(refusal.status), refusal.reason)

    async def _answer(self, stream: YamuxStream, request: str, answer: HopStatus, reason: str = "") -> None:
        heard = False
        try:
            await stream.send_all(encode_hop(answer))
            heard = True
        finally:
            self._events.emit(
                RelayRequestServed(
                    peer=stream.connection.peer,
                    request=request,
                    status=answer.status.name,
                    reason=reason or ("" if heard else "unheard"),
                )
            )

    def _misbehaved(self, connection: Connection, reason: str) -> None:
        self._events.emit(
            PeerMisbehaved(peer=connection.peer, address=connection.remote_address, layer="relay", reason=reason)
        )

    # Telling

    def status(self) -> RelayStatus:
        """Everything at this moment."""
        now = trio.current_time()
        circuits = ((circuit, self._splices.get(circuit.number)) for circuit in self._relay.circuits())
        return RelayStatus(
            reservations=tuple(
                ReservationStatus(place.peer, place.connection.remote_address, place.until - now)
                for place in self._relay.places(now)
            ),
            circuits=tuple(
                CircuitStatus(
                    circuit.number,
                    circuit.source,
                    circuit.destination,
                    now - splice.opened_at,
                    splice.forth,
                    splice.back,
                )
                for circuit, splice in circuits
                if splice is not None
            ),
            limits=self._relay.limits,
            in_use={**self._relay.in_use(now), "max_circuit_memory": self._memory.held},
        )


def _asker(connection: Connection) -> Asker[Connection]:
    where = addr.ip_port(connection.remote_address) if connection.path.kind is not PathKind.RELAYED else None
    return Asker(connection, connection.peer, where[0] if where is not None else None)
