"""Everything that happens, as frozen values. Logs, metrics, status and the live views read events and nothing else.

Emitting never waits and never fails: each subscriber has a bounded queue, and a slow one loses the oldest events
and is told how many (`EventsLost`). Every event is counted by its type and, if it has one, its ``reason``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import trio

from kas_libp2p.metadata import Direction, Path, PeerId

SUBSCRIBER_QUEUE = 1024
"""Events held for one subscriber: some seconds of a busy node, at a few hundred bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        at: seconds since the epoch, filled in by the bus.
    """

    at: float = 0.0

    @property
    def name(self) -> str:
        """The event's name as it stands in ``--json`` output: ``ConnectionOpened`` becomes ``connection-opened``."""
        return _name(type(self))


def _name(kind: type) -> str:
    return "".join("-" + c.lower() if c.isupper() else c for c in kind.__name__).lstrip("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening(Event):
    """A listener is open."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressesChanged(Event):
    """The set of addresses at which this node listens changed, for instance as an interface came or went."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialing(Event):
    """An attempt to connect begins: nobody is connected, and nobody else is trying.

    Attributes:
        target: the peer id, or the address if the peer is not known yet.
        addresses: what will be tried, names not resolved yet.
    """

    target: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DialFailed(Event):
    """No address led to a verified connection. Each has said why (`AddressFailed`)."""

    target: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressFailed(Event):
    """One address of a peer did not work; others may still be tried."""

    peer: PeerId | None
    address: str
    stage: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptFailed(Event):
    """The system could not hand over an inbound connection. The listener goes on.

    Attributes:
        address: the listener.
        reason: the system's name of the error, as ``EMFILE``.
        pause: seconds for which the listener waits before it tries again; 0 if it went on at once.
    """

    address: str
    reason: str
    pause: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundRefused(Event):
    """An inbound connection was refused before the handshake.

    Attributes:
        address: the remote address.
        reason: the name of the limit, list or gate.
    """

    address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeFailed(Event):
    """An inbound connection did not get through its handshakes."""

    address: str
    stage: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(Event):
    """A connection to a verified peer is up.

    Attributes:
        connection: number of the connection in this process.
        seconds: from the first SYN or the accept to usable.
    """

    connection: int
    peer: PeerId
    path: Path
    direction: Direction
    address: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed(Event):
    """A connection ended.

    Attributes:
        reason: why, in words.
        seconds: how long it lived.
        received, sent: bytes on the wire.
    """

    connection: int
    peer: PeerId
    reason: str
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerIdentified(Event):
    """A peer told about itself (identify, or a push)."""

    peer: PeerId
    agent: str
    protocol_version: str
    protocols: tuple[str, ...]
    addresses: tuple[str, ...]
    observed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifyFailed(Event):
    """A peer did not tell about itself. It stays connected, and counts as one that speaks what it proposes."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFailed(Event):
    """A stream that a peer opened ended before both sides agreed on a protocol."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Banned(Event):
    """A peer or an IP may not connect for a while.

    Attributes:
        target: peer id or IP.
        seconds: for how long.
    """

    target: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitHit(Event):
    """A limit said no.

    Attributes:
        reason: the limit's name, as in the configuration.
    """

    reason: str
    peer: PeerId | None
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMisbehaved(Event):
    """A peer broke a protocol; what was open with it at that layer is closed.

    Attributes:
        layer: noise, yamux, identify, http2, messages; or the protocol of the stream, as ``/ipfs/ping/1.0.0``.
        reason: what it did.
    """

    peer: PeerId | None
    address: str
    layer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerFailed(Event):
    """A stream handler raised; its stream was reset and nothing else was touched."""

    peer: PeerId
    protocol: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KaspaPeerJoined(Event):
    """A peer's node and ours have finished their handshake through the overlay.

    Attributes:
        node_id: the id that the peer's node goes by in kaspad's RPC.
        source: the address from which kaspad sees it; ``None`` if the system chose.
        dialect: the protocol id of the stream.
        seconds: from the stream to both nodes being ready.
    """

    peer: PeerId
    node_id: str
    user_agent: str
    network: str
    protocol_version: int
    source: str | None
    direction: Direction
    dialect: str
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KaspaPeerEnded(Event):
    """A Kaspa stream to a peer ended, joined or in its handshake.

    Attributes:
        joined: whether the handshake had been finished.
        reason: one of the texts of `kas_libp2p.kaspa.join.End`.
        by: kaspad, peer, path or us.
        text: more words, kaspad's or the peer's own.
        seconds: how long the stream lived.
        received, sent: bytes of Kaspa messages from and to the peer.
    """

    peer: PeerId
    node_id: str | None
    joined: bool
    reason: str
    by: str
    text: str
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalError(Event):
    """A mistake in this library ended one connection, dial or stream, and nothing else. Worth a report.

    Attributes:
        peer: whom it was about, if it was known.
        where: which part failed.
        reason: the exception; the log has its traceback.
    """

    peer: PeerId | None
    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost(Event):
    """This subscriber was too slow.

    Attributes:
        count: how many events were dropped, the oldest first.
    """

    count: int


def to_dict(event: Event) -> dict[str, object]:
    """The event as plain values for JSON, with its name under ``event``."""
    return {"event": event.name, **dataclasses.asdict(event)}


class Subscription:
    """An async iterator over the events that were emitted since it was made. Ends when the bus is closed."""

    def __init__(self) -> None:
        self._queue: deque[Event] = deque()
        self._lost = 0
        self._closed = False
        self._lot = trio.lowlevel.ParkingLot()

    def _put(self, event: Event) -> None:
        if len(self._queue) >= SUBSCRIBER_QUEUE:
            self._queue.popleft()
            self._lost += 1
        self._queue.append(event)
        self._lot.unpark()

    def _close(self) -> None:
        self._closed = True
        self._lot.unpark_all()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._queue and not self._lost:
            if self._closed:
                raise StopAsyncIteration
            await self._lot.park()
        if self._lost:
            lost, self._lost = self._lost, 0
            return EventsLost(count=lost)
        return self._queue.popleft()


class EventBus:
    """Hands every event to every subscriber, and counts it.

    Args:
        wall_clock: returns seconds since the epoch, to stamp events with.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        self.counts: Counter[tuple[str, str]] = Counter()
        """How often each event occurred, by name and ``reason`` (or ``stage``, or empty)."""

    def emit(self, event: Event) -> None:
        """Count the event and hand it to all subscribers. Never waits."""
        detail = getattr(event, "layer", None) or getattr(event, "stage", None) or ""
        if isinstance(event, AcceptFailed | InboundRefused | LimitHit | KaspaPeerEnded):
            detail = event.reason
        self.counts[event.name, detail] += 1
        if self._subscriptions:
            event = dataclasses.replace(event, at=self._wall_clock())
            for subscription in self._subscriptions:
                subscription._put(event)

    def listen(self) -> Subscription:
        """Subscribe from now on, for as long as the caller keeps the subscription."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        return subscription

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Subscribe for the length of a ``with`` block."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            subscription._close()

    def close(self) -> None:
        """End every subscription once it has read what is queued."""
        for subscription in self._subscriptions:
            subscription._close()
