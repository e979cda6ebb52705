"""Being reachable through relays, and reaching others through theirs: circuit relay v2, the client's side.

`RelayClient.hold` says on which relays to keep a place. Each has a task of its own, which asks, renews, notices at once
that the relay is gone, and asks anew; what it asks and when is decided in `kas_libp2p.relay._client`.

A circuit is made of one stream through a relay. Whoever asked for it is the initiator of the connection on it, and that
connection is like any other: Noise and Yamux of its own, so the relay sees who talks with whom and how much, not what.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.config import RelayConfig
from kas_libp2p.errors import (
    AddressError,
    ConnectionLost,
    DialError,
    KasError,
    NegotiationError,
    Refused,
    RelayRefused,
    RemoteProtocolError,
    StreamReset,
    UpgradeError,
    in_words,
)
from kas_libp2p.events import (
    EventBus,
    InboundRefused,
    InternalError,
    PeerMisbehaved,
    ReservationFailed,
    ReservationLost,
    ReservationMade,
    UpgradeFailed,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import CircuitLimits, Path, PathKind, PeerId
from kas_libp2p.relay._client import (
    Due,
    Reservation,
    Upkeep,
    read_circuit,
    read_limit,
    read_reservation,
    seen_at,
)
from kas_libp2p.relay._messages import (
    HOP,
    MAX_MESSAGE,
    STOP,
    Connect,
    HopMessage,
    Limit,
    Reserve,
    Status,
    StopConnect,
    StopStatus,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.pipe import CircuitPipe
from kas_libp2p.transport.yamux.stream import YamuxStream
from kas_libp2p.units import short

logger = logging.getLogger(__name__)

__all__ = ["HOP", "STOP", "RelayClient", "Reservation", "ReservationStatus"]

RESERVE_TIMEOUT = 10.0
"""Seconds for a relay to answer a RESERVE, about which it has to ask nobody."""
CONNECT_TIMEOUT = 15.0
"""Seconds for a relay to answer a CONNECT: it asks the peer first, for which rust gives it 10 s."""
STOP_TIMEOUT = 10.0
"""Seconds for a relay to say on the stream that it opened from whom the circuit is."""
PROBE_TIMEOUT = 5.0
"""Seconds for a relay to answer when our network has changed: some round trips, and a lost packet. Otherwise silence is
noticed by the keepalive of the connection."""
STOPS_AT_ONCE = 16
"""Circuits of one relay that may be in their handshakes, beside the limit on those that are up."""


@dataclass(frozen=True, slots=True)
class ReservationStatus:
    """A relay on which a place is wanted.

    Attributes:
        relay: its peer id.
        address: where it is reached now; empty if it is not.
        held: whether there is a place.
        addresses: where we can be reached through it, our peer id included.
        seconds: since when the place is held, or wanted.
        seconds_left: until it has to be renewed at the latest; 0 if there is none.
        renewals: how often it was renewed.
        max_bytes, max_seconds: of one circuit; ``None``: no limit.
        circuits: connections that came in through it and are up.
        rtt: seconds to the relay and back; ``None`` if it is not known.
        failures: tries that failed in a row.
        reason: why the last one failed; empty if none has.
    """

    relay: PeerId
    address: str
    held: bool
    addresses: tuple[str, ...]
    seconds: float
    seconds_left: float
    renewals: int
    max_bytes: int | None
    max_seconds: float | None
    circuits: int
    rtt: float | None
    failures: int
    reason: str

    @property
    def limits(self) -> CircuitLimits | None:
        """What the relay said of circuits to us; ``None``: there is no place."""
        if not self.held:
            return None
        return CircuitLimits(self.max_bytes, self.max_seconds, self.max_bytes, self.max_seconds)


class _Held:
    """One relay on which a place is wanted, and its task.

    Attributes:
        addresses: where to dial it, without its peer id.
        connection: where the place is, or was asked for last.
        asking: set while a RESERVE is under way; the event is set when it has been answered.
        waiting: in which the task waits until something is due.
    """

    def __init__(self, relay: PeerId, addresses: tuple[str, ...], now: float) -> None:
        self.relay = relay
        self.addresses = addresses
        self.upkeep = Upkeep(now)
        self.since = now
        self.connection: Connection | None = None
        self.asking: trio.Event | None = None
        self.waiting = trio.CancelScope()
        self.reason = ""
        self.scope = trio.CancelScope()


class RelayClient:
    """The client's side of circuit relay v2. Places are kept for as long as `run` runs.

    Args:
        identity: our key.
        config: how many connections may come in through one relay.
        events: where everything is told.
        reach: connects to a relay directly, at addresses without peer id, or returns the connection that there is.
            Without addresses it knows where to look. Raises a `KasError`.
        upgrade: makes a connection of a circuit on which we are the responder; raises a `KasError`, closes the pipe
            then, and carries the connection otherwise.
        admit: raises `Refused` if a peer may not connect.
        wall_clock: seconds since the epoch.
        spread: a number from 0 to 1, at random.

    Attributes:
        on_changed: called when `addresses` has changed.
        on_asked: called with a relay that is about to be asked for a circuit. May not block or raise.
        on_made, on_failed, on_lost: called with what comes of each relay that is held: a place made or renewed; a try
            that failed, with its error; a place lost that was not given up, with the reason, and whether the way to the
            relay broke, so that neither side ended it. None may block or raise.
    """

    def __init__(
        self,
        identity: Identity,
        config: RelayConfig,
        events: EventBus,
        *,
        reach: Callable[[PeerId, tuple[str, ...]], Awaitable[Connection]],
        upgrade: Callable[[CircuitPipe, PeerId, Path], Awaitable[object]],
        admit: Callable[[PeerId], None],
        wall_clock: Callable[[], float],
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.on_changed: list[Callable[[], None]] = []
        self.on_asked: list[Callable[[PeerId], None]] = []
        self.on_made: list[Callable[[ReservationMade], None]] = []
        self.on_failed: list[Callable[[PeerId, BaseException], None]] = []
        self.on_lost: list[Callable[[PeerId, str, bool], None]] = []
        self._peer = identity.peer_id
        self._config = config
        self._events = events
        self._reach = reach
        self._upgrade = upgrade
        self._admit = admit
        self._wall_clock = wall_clock
        self._spread = spread
        self._held: dict[PeerId, _Held] = {}
        self._inbound: dict[PeerId, set[CircuitPipe]] = {}
        self._told: tuple[Multiaddr, ...] = ()
        self._nursery: trio.Nursery | None = None

    # What is held

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep places until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for held in self._held.values():
                    nursery.start_soon(self._keep, held)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None  # before it is closed: nobody may start anything in it then

    def hold(self, relays: Mapping[PeerId, tuple[str, ...]]) -> None:
        """Keep a place on each of these relays from now on, and on no other.

        Each is asked at once, and again whenever its place is lost; a relay that does not answer, or says no, is asked
        again with growing pauses. A place that is given up ends with the connection to its relay, which is left to the
        circuits that are on it, and closed as idle when there are none.

        Args:
            relays: and their addresses, without peer id; none if it is connected, or known otherwise.
        """
        now = trio.current_time()
        for relay in [*self._inbound]:
            self._inbound_of(relay)  # nobody may ask again for what came in through a relay that was given up
        for relay in self._held.keys() - relays.keys():
            held = self._held.pop(relay)
            held.scope.cancel()
            if held.upkeep.reservation is not None:
                self._events.emit(ReservationLost(relay=relay, reason="it was given up"))
        for relay, addresses in relays.items():
            if relay in self._held:
                self._held[relay].addresses = addresses
                continue
            held = self._held[relay] = _Held(relay, addresses, now)
            if self._nursery is not None:
                self._nursery.start_soon(self._keep, held)
        self._changed()

    def withdrawn(self, relay: PeerId) -> None:
        """A relay says that it is none any more: nobody is given a circuit to us by it, whatever it promised.

        It is asked again, with growing pauses, as one that refuses.
        """
        held = self._held.get(relay)
        if held is not None and held.upkeep.reservation is not None:
            held.upkeep.withdrawn(trio.current_time(), self._spread())
            held.waiting.deadline = held.upkeep.next_deadline()
            self._lost(held, "it says that it is no relay any more")

    def connected(self, connection: Connection) -> None:
        """A connection has come up, whoever wanted it: a relay that could not be reached need not be waited for."""
        held = self._held.get(connection.peer)
        if held is not None and held.asking is None and connection.path.kind is not PathKind.RELAYED:
            held.upkeep.reached(trio.current_time())
            held.waiting.deadline = held.upkeep.next_deadline()

    def network_changed(self) -> None:
        """Our own addresses have changed: the connections with relays may be dead, which nobody tells."""
        silent = f"it said nothing for {PROBE_TIMEOUT:g} s after our network had changed"
        for held in self._held.values():
            if self._nursery is not None and held.connection is not None and not held.connection.closing:
                self._nursery.start_soon(held.connection.check_alive, PROBE_TIMEOUT, silent)

    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where we can be reached through relays now: ``/…/p2p/RELAY/p2p-circuit``, without our peer id."""
        places = (held.upkeep.reservation for held in self._held.values())
        return tuple(address for place in places if place is not None for address in place.addresses)

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection has to stay although no stream is open on it, as a place of ours depends on it."""
        held = self._held.get(connection.peer)
        return held is not None and held.connection is connection and held.upkeep.reservation is not None

    @property
    def reservations(self) -> tuple[ReservationStatus, ...]:
        """The relays on which a place is wanted, in the order in which they came."""
        return tuple(map(self._status, self._held.values()))

    def _status(self, held: _Held) -> ReservationStatus:
        now = trio.current_time()
        upkeep, place, connection = held.upkeep, held.upkeep.reservation, held.connection
        if connection is not None and connection.close_reason is not None:
            connection = None
        return ReservationStatus(
            relay=held.relay,
            address=connection.remote_address if connection is not None else "",
            held=place is not None,
            addresses=tuple(str(addr.with_peer(each, self._peer)) for each in place.addresses) if place else (),
            seconds=now - (upkeep.since if place is not None else held.since),
            seconds_left=max(0.0, upkeep.until - now) if place is not None else 0.0,
            renewals=upkeep.renewals,
            max_bytes=place.max_bytes if place is not None else None,
            max_seconds=place.max_seconds if place is not None else None,
            circuits=len(self._inbound_of(held.relay)),
            rtt=connection.rtt if connection is not None else None,
            failures=upkeep.failures,
            reason=held.reason,
        )

    async def _keep(self, held: _Held) -> None:
        upkeep = held.upkeep
        with held.scope:
            while True:
                ended = await self._wait(held)
                now = trio.current_time()
                if ended is not None:
                    upkeep.lost(now, self._spread())
                    self._lost(held, ended, broke=held.connection is not None and held.connection.broke)
                    continue
                match upkeep.on_timeout(now):
                    case Due.EXPIRED:
                        self._lost(held, "it was not renewed in time")
                    case Due.ASK:
                        await self._ask(held)

    async def _wait(self, held: _Held) -> str | None:
        """Wait until something is due. Returns why the connection ended on which there is a place, if it did before."""
        connection = held.connection if held.upkeep.reservation is not None else None
        ended: str | None = None
        held.waiting = trio.CancelScope(deadline=held.upkeep.next_deadline())
        with held.waiting:
            if connection is None:
                await trio.sleep_forever()
            else:
                await connection.wait_closed()
                ended = connection.close_reason
        return ended if held.upkeep.reservation is not None else None

    def _lost(self, held: _Held, reason: str, *, broke: bool = False) -> None:
        held.reason = reason
        self._events.emit(ReservationLost(relay=held.relay, reason=reason))
        self._changed()
        for callback in self.on_lost:
            callback(held.relay, reason, broke)

    async def _ask(self, held: _Held) -> None:
        began = trio.current_time()
        asking = held.asking = trio.Event()
        try:
            connection = held.connection
            if connection is None or connection.closing:
                connection = await self._reach(held.relay, held.addresses)
            place = await self.reserve(connection)
        except KasError as error:
            self._failed(held, error, in_words(error), began)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.error("an internal error ended a reservation", exc_info=error)
            self._events.emit(InternalError(peer=held.relay, where="a reservation", reason=reason))
            self._failed(held, error, reason, began)
        else:
            self._granted(held, connection, place, began)
        finally:
            held.asking = None
            asking.set()

    def _failed(self, held: _Held, error: Exception, reason: str, began: float) -> None:
        now = trio.current_time()
        held.upkeep.failed(now, self._spread(), unreached=isinstance(error, DialError))
        held.reason = reason
        self._events.emit(ReservationFailed(relay=held.relay, reason=reason, seconds=now - began))
        for callback in self.on_failed:
            callback(held.relay, error)

    def _granted(self, held: _Held, connection: Connection, place: Reservation, began: float) -> None:
        now = trio.current_time()
        renewed = held.upkeep.reservation is not None
        held.connection = connection
        held.upkeep.granted(place, now, self._spread())
        held.reason = ""
        event = ReservationMade(
            relay=held.relay,
            addresses=tuple(str(addr.with_peer(each, self._peer)) for each in place.addresses),
            lifetime=place.lifetime,
            max_bytes=place.max_bytes,
            max_seconds=place.max_seconds,
            renewed=renewed,
            seconds=now - began,
        )
        self._events.emit(event)
        self._changed()
        for callback in self.on_made:
            callback(event)

    def _changed(self) -> None:
        now = self.addresses()
        if set(now) != set(self._told):
            self._told = now
            for callback in self.on_changed:
                callback()

    # Asking relays

    async def reserve(self, connection: Connection) -> Reservation:
        """Ask a relay for a place, once, on a connection with it. One round trip.

        Raises:
            RelayRefused: it said no, or nothing.
            NegotiationError: it is no relay.
            RemoteProtocolError: its answer is none, or can't be true. That is told as an event, too.
            Refused, ConnectionLost, StreamReset: no stream could be opened, or it ended.
        """
        relay = connection.peer
        if connection.path.kind is PathKind.RELAYED:
            raise RelayRefused(relay, "", f"{short(relay)} is reached through a relay itself, and can't be one for us")
        stream, answer = await self._request(connection, Reserve(), RESERVE_TIMEOUT)
        await stream.aclose()
        try:
            return read_reservation(
                answer, relay=relay, peer=self._peer, at=connection.remote_address, wall_now=self._wall_clock()
            )
        except RemoteProtocolError as error:
            self._misbehaved(connection, HOP, str(error))
            raise

    async def dial(self, address: Multiaddr) -> tuple[CircuitPipe, Path]:
        """Make a circuit to a peer, with us as its initiator.

        Args:
            address: ``[/…]/p2p/RELAY/p2p-circuit/p2p/PEER``. Without the way to the relay it has to be connected, or
                known otherwise.

        Returns:
            the circuit, and the path of a connection on it.

        Raises:
            RelayRefused: the relay said no, or nothing, or can't be reached; the text says which.
            Refused: a list or limit of ours forbids it.
            AddressError: it is no such address.
        """
        relay, peer, way = addr.relay_of(address), addr.peer_of(address), addr.relay_address(address)
        if relay is None or peer is None or way is None:
            raise AddressError(f"{address} is no circuit address: /…/p2p/RELAY/p2p-circuit/p2p/PEER")
        at = (str(addr.without_peer(way)),) if len(addr.components(way)) > 1 else ()
        who = f"the relay {short(relay)}"
        try:
            connection = await self._reach(relay, at)
        except (DialError, ConnectionLost) as error:
            raise RelayRefused(relay, "", f"{who} can't be reached: {in_words(error)}") from error
        try:
            return await self._connect(connection, peer), Path(PathKind.RELAYED, relay)
        except NegotiationError as error:
            raise RelayRefused(relay, "", f"{short(relay)} is no relay: {error}") from error
        except RemoteProtocolError as error:
            raise RelayRefused(relay, "", f"{who} broke the protocol: {error}") from error
        except (ConnectionLost, StreamReset) as error:
            raise RelayRefused(relay, "", f"{who} ended the request without an answer: {error}") from error

    async def _connect(self, connection: Connection, peer: PeerId) -> CircuitPipe:
        for callback in self.on_asked:
            callback(connection.peer)
        stream, answer = await self._request(connection, Connect(peer), CONNECT_TIMEOUT)
        try:
            limit, observed = read_circuit(answer, relay=connection.peer, peer=peer)
        except KasError as error:
            stream.reset()
            if isinstance(error, RemoteProtocolError):
                self._misbehaved(connection, HOP, str(error))
            raise
        return _pipe(stream, limit, observed)

    async def _request(
        self, connection: Connection, request: HopMessage, timeout: float
    ) -> tuple[YamuxStream, HopMessage]:
        """Ask on a stream of its own, which leaves together with the question."""
        stream: YamuxStream | None = None
        answer: HopMessage | None = None
        try:
            with trio.fail_after(timeout):
                stream = await connection.open_stream(HOP)
                await stream.send_all(encode_hop(request))
                answer = decode_hop(await receive_frame(stream, MAX_MESSAGE))
                return stream, answer
        except trio.TooSlowError:
            relay = connection.peer
            raise RelayRefused(relay, "", f"the relay {short(relay)} did not answer within {timeout:g} s") from None
        except RemoteProtocolError as error:
            self._misbehaved(connection, HOP, str(error))
            raise
        finally:
            if stream is not None and answer is None:
                stream.reset()

    def _misbehaved(self, connection: Connection, layer: str, reason: str) -> None:
        self._events.emit(
            PeerMisbehaved(peer=connection.peer, address=connection.remote_address, layer=layer, reason=reason)
        )

    # Circuits to us

    async def handle_stop(self, stream: YamuxStream) -> None:
        """Serve ``/libp2p/circuit/relay/0.2.0/stop``: a relay has a circuit to us. It hands the stream over.

        It is taken from relays only on which we hold a place, and from peers that may connect.
        """
        connection = stream.connection
        try:
            with trio.fail_after(STOP_TIMEOUT):
                message = decode_stop(await receive_frame(stream, MAX_MESSAGE))
        except trio.TooSlowError:
            raise RemoteProtocolError(f"nothing came within {STOP_TIMEOUT:g} s") from None
        except RemoteProtocolError as error:
            self._misbehaved(connection, STOP, str(error))
            return await _answer(stream, Status.MALFORMED_MESSAGE)
        if not isinstance(message, StopConnect):
            self._misbehaved(connection, STOP, "it answered what nobody asked")
            return await _answer(stream, Status.UNEXPECTED_MESSAGE)
        try:
            await self._wait_asked(connection)
            self._check_stop(connection, message.source.id)
        except Refused as error:
            address = f"{connection.remote_address}/p2p/{connection.peer}/p2p-circuit"
            self._events.emit(InboundRefused(address=address, reason=error.limit))
            full = error.limit.startswith(("max_", "relay.max_"))
            return await _answer(stream, Status.RESOURCE_LIMIT_EXCEEDED if full else Status.PERMISSION_DENIED)
        await stream.send_all(encode_stop(StopStatus(Status.OK)))
        return await self._take(stream, message)

    async def _wait_asked(self, connection: Connection) -> None:
        """A circuit may be here before the answer to our RESERVE has been read, as each has a task of its own."""
        held = self._held.get(connection.peer)
        if held is not None and held.upkeep.reservation is None and held.asking is not None:
            with trio.move_on_after(STOP_TIMEOUT):
                await held.asking.wait()

    def _check_stop(self, connection: Connection, source: PeerId) -> None:
        relay = connection.peer
        held = self._held.get(relay)
        if held is None or held.upkeep.reservation is None or connection.path.kind is PathKind.RELAYED:
            raise Refused("not_our_relay", f"we hold no place on {relay}")
        if source in (self._peer, relay):
            raise Refused("self", "a circuit from one of its own ends")
        self._admit(source)
        if len(self._inbound_of(relay)) >= self._config.max_inbound_per_relay:
            raise Refused("relay.max_inbound_per_relay", f"there are {self._config.max_inbound_per_relay} circuits")

    def _inbound_of(self, relay: PeerId) -> set[CircuitPipe]:
        live = {pipe for pipe in self._inbound.pop(relay, ()) if not pipe.closed}
        if live:
            self._inbound[relay] = live
        return live

    async def _take(self, stream: YamuxStream, message: StopConnect) -> None:
        relay = stream.connection.peer
        pipe = _pipe(stream, message.limit, seen_at(message.source.addresses))
        self._inbound.setdefault(relay, set()).add(pipe)
        began = trio.current_time()
        try:
            await self._upgrade(pipe, message.source.id, Path(PathKind.RELAYED, relay))
        except UpgradeError as error:
            seconds = trio.current_time() - began
            self._events.emit(
                UpgradeFailed(address=pipe.remote_address, stage=error.stage, reason=str(error), seconds=seconds)
            )
        except Refused as error:
            self._events.emit(InboundRefused(address=pipe.remote_address, reason=error.limit))


def _pipe(stream: YamuxStream, limit: Limit, observed: Multiaddr | None) -> CircuitPipe:
    max_bytes, max_seconds = read_limit(limit)
    return CircuitPipe(stream, stream.connection.peer, max_bytes=max_bytes, max_seconds=max_seconds, observed=observed)


async def _answer(stream: YamuxStream, status: Status) -> None:
    await stream.send_all(encode_stop(StopStatus(status)))
    await stream.aclose()
