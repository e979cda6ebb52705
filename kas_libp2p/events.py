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
class AddressFailed(Event):
    """One address of a peer did not work; others may still be tried."""

    peer: PeerId | None
    address: str
    stage: str
    reason: str
    seconds: float


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
        layer: noise, yamux, multistream, identify, ping, http2, kaspa, messages.
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
        self._subscriptions: set[Subscription] = set()
        self.counts: Counter[tuple[str, str]] = Counter()
        """How often each event occurred, by name and ``reason`` (or ``stage``, or empty)."""

    def emit(self, event: Event) -> None:
        """Count the event and hand it to all subscribers. Never waits."""
        detail = getattr(event, "layer", None) or getattr(event, "stage", None) or ""
        if isinstance(event, InboundRefused | LimitHit):
            detail = event.reason
        self.counts[event.name, detail] += 1
        if self._subscriptions:
            event = dataclasses.replace(event, at=self._wall_clock())
            for subscription in self._subscriptions:
                subscription._put(event)

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
