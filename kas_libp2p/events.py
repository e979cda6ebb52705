"""Everything that happens, as frozen values. Logs, metrics, status and the live views read events and nothing else.

Emitting never waits and never fails: each subscriber has a bounded queue, and a slow one loses the oldest events
and is told how many (`EventsLost`). Every event is counted by its name and, where there are few, by its layer, stage,
code or reason.
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
        moved: whether it goes on from a stream of the same peer through a relay, which this one has replaced.
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
    moved: bool
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
class ReservationMade(Event):
    """A relay keeps a place for us, or keeps it for longer.

    Attributes:
        addresses: where we can be reached through it.
        lifetime: seconds until it has to be renewed.
        max_bytes, max_seconds: what the relay allows one circuit; ``None``: no limit.
        renewed: whether we had it before.
        seconds: how long the answer took.
    """

    relay: PeerId
    addresses: tuple[str, ...]
    lifetime: float
    max_bytes: int | None
    max_seconds: float | None
    renewed: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationFailed(Event):
    """A relay kept no place for us."""

    relay: PeerId
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReservationLost(Event):
    """A place on a relay is gone: the connection ended, it was given up, or it ran out."""

    relay: PeerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaysHeard(Event):
    """A peer told us of relays.

    Attributes:
        told: of how many.
        taken: how many of them are candidates now, or were already.
    """

    peer: PeerId
    told: int
    taken: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayRequestServed(Event):
    """As a relay, we answered a request.

    Attributes:
        request: ``reserve`` or ``connect``; empty if it was neither.
        status: the status of circuit relay v2 that was answered, as ``OK``.
        reason: why not: a limit by its name in the configuration, or one word: ``relayed``, ``oneself``, ``purpose``,
            ``no_reservation``, ``one_network``, ``malformed`` …; ``unheard`` if it was granted, and the asker was gone;
            else empty.
    """

    peer: PeerId
    request: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """As a relay, we began to carry a circuit between two peers."""

    circuit: int
    source: PeerId
    destination: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """As a relay, we carry a circuit no longer.

    Attributes:
        reason: why, in one word of `kas_libp2p.transport.splice.End`; a limit by its name in the configuration.
        forth, back: bytes from and to the source.
    """

    circuit: int
    source: PeerId
    destination: PeerId
    reason: str
    seconds: float
    forth: int
    back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRenewed(Event):
    """A circuit is about to end, and we have made another connection beside it. New streams go there, and sessions
    move; other streams that are open end with the old one.

    Attributes:
        peer: with whom.
        relay: whose circuit is about to end.
        connection: number of the connection on it.
        following: number of the next one.
        path: which way that one takes.
        reason: what is left of which limit.
        seconds: how long it took.
    """

    peer: PeerId
    relay: PeerId
    connection: int
    following: int
    path: Path
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitNotRenewed(Event):
    """A circuit of ours is about to end, and there is no other way to the peer yet. It is tried again until it ends."""

    peer: PeerId
    relay: PeerId
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallCircuits(Event):
    """A session lives on circuits that a live Kaspa node uses up within minutes, and goes from one to the next.

    Attributes:
        relay: one that carries it.
        max_bytes, max_seconds: what its circuits may carry; ``None``: no limit.
        sustained: bytes per second, both directions together, that all known relays of the two carry for ever.
        text: what they carry, in words.
    """

    peer: PeerId
    relay: PeerId
    max_bytes: int | None
    max_seconds: float | None
    sustained: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened(Event):
    """A session with a peer began: a Kaspa stream that may move between paths.

    Attributes:
        session: its id in hex; also in the other events of it.
        by_us: whether this side opened it.
        path: where it begins.
    """

    peer: PeerId
    session: str
    by_us: bool
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMoved(Event):
    """A session goes on by another path, or by the same way on another connection.

    Attributes:
        path: where it goes on.
        previous: where it was before.
        by_us: whether this side moved it.
        reason: why, in words; empty if the other side moved it, and this one had no reason to.
        resent: bytes that were sent again, as they were lost with a path or may have been.
        seconds_without: for how long it had no path; 0 for a move from one that lived.
    """

    peer: PeerId
    session: str
    path: Path
    previous: Path
    by_us: bool
    reason: str
    resent: int
    seconds_without: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionWaiting(Event):
    """A session lost its last path and waits for another one, for at most ``session.patience`` seconds.

    Attributes:
        path: which one was lost.
        reason: how, in words.
    """

    peer: PeerId
    session: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionNotMoved(Event):
    """This side wanted to move a session to a path, which came to nothing. It stays where it is, or waits on.

    Attributes:
        path: where it was to go.
        code: why, in one word: ``lost`` (with its connection), ``timeout`` (the peer did not answer), ``superseded``
            (the peer moved it at the same time) or ``busy`` (the peer had too much to do).
        reason: in words.
    """

    peer: PeerId
    session: str
    path: Path
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnded(Event):
    """A session ended.

    Attributes:
        code: why, in one word of `kas_libp2p.session._wire.Code`, as ``ended``, ``lost`` or ``restarted``.
        reason: in words.
        by_peer: whether the other side ended it.
        seconds: how long it lived.
        moves: how often it changed its path.
    """

    peer: PeerId
    session: str
    code: str
    reason: str
    by_peer: bool
    seconds: float
    moves: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRefused(Event):
    """What a peer wanted of a session was refused.

    Attributes:
        reason: why, in one word: ``unknown`` (no such session with this peer), ``ended`` (not any more),
            ``superseded`` (this side moved it at the same time), ``busy`` (the connection has a Kaspa stream),
            ``withdrawn`` (none is served), ``replayed`` (there is this session), ``timeout`` or ``protocol`` (no first
            message, or a wrong one), or the limit that was reached.
    """

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DialBackServed(Event):
    """A peer asked us to dial it back (AutoNAT), and was answered.

    Attributes:
        address: what was dialed; empty if nothing was.
        status: AutoNAT's word for the outcome, as ``OK`` or ``E_DIAL_REFUSED``.
        reason: why not, in one word: a limit by its name, ``relayed``, ``private_target`` …; ``stranger`` where
            another server dialed in our place.
    """

    peer: PeerId
    address: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationRefused(Event):
    """A peer told an address that it can't have seen us at. It counts for nothing.

    Attributes:
        address: what it told.
        reason: why not, in one word: ``private``, ``relayed``, ``family``, ``malformed``.
    """

    peer: PeerId
    address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachabilityTested(Event):
    """A peer tried to dial an address of ours (AutoNAT).

    Attributes:
        by: the peer.
        address: what it dialed; empty if it did not say.
        verdict: reachable, unreachable, or refused, in which case nothing is known.
        reason: more words.
    """

    by: PeerId
    address: str
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged(Event):
    """This node counts itself differently.

    Attributes:
        role: private or public.
        reason: what showed it.
    """

    role: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapped(Event):
    """The router gave us a port, or gave it for longer.

    Attributes:
        by: pcp, nat-pmp or upnp.
        external: the address outside.
        lifetime: seconds; 0: until it is removed.
    """

    by: str
    local: str
    external: str
    lifetime: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMappingFailed(Event):
    """The router gave us no port."""

    local: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeDecided(Event):
    """What is done about a relayed connection that might become direct.

    Attributes:
        connection: number of the relayed connection.
        decision: ``punch``, ``queue`` (others are first), ``wait`` (for the other side, or for a while) or ``leave``.
        reason: why, in one word of `kas_libp2p.strategy`.
        chance: what the two NATs allow, in one of its words; ``unknown`` while one side is.
        text: more words.
        wait: seconds until it is looked at again; 0: not before something changes.
    """

    peer: PeerId
    connection: int
    decision: str
    reason: str
    chance: str
    text: str
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentTold(Event):
    """One side has told the other whether it wants a relayed connection to become direct.

    Attributes:
        by_us: whether we told it.
        answer: ``yes``, ``no`` or ``later``.
        reason: one word, as the side that told it gave it.
        wait: seconds, with ``later``.
        nat: what it told of its NATs, in words, by family; a family is missing if it has none.
    """

    peer: PeerId
    connection: int
    by_us: bool
    answer: str
    reason: str
    wait: float
    nat: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchConnect(Event):
    """CONNECT of DCUtR: one side has told the other where it may be met.

    Attributes:
        connection: number of the relayed connection.
        by_us: whether we told it.
        attempt: counts from 1.
        addresses: what was told.
        rtt: seconds from our CONNECT to this answer; ``None`` where it is none.
        seconds: since the punch began.
    """

    peer: PeerId
    connection: int
    by_us: bool
    attempt: int
    addresses: tuple[str, ...]
    rtt: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchSync(Event):
    """SYNC of DCUtR: who gets it dials, who sent it does half a round trip later.

    Attributes:
        connection, by_us, attempt, seconds: as in `PunchConnect`.
    """

    peer: PeerId
    connection: int
    by_us: bool
    attempt: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchStarted(Event):
    """One attempt begins to dial.

    Attributes:
        connection, attempt, seconds: as in `PunchConnect`.
        inviter: whether we invited the peer (it came to us through the relay), or it invited us.
        targets: what is dialed.
        untrusted: of them, those at hosts where only the peer says that it is.
        refused: how many of the peer's addresses are not dialed, by reason (`kas_libp2p.dcutr`).
        wait: seconds until the moment agreed on.
    """

    peer: PeerId
    connection: int
    inviter: bool
    attempt: int
    targets: tuple[str, ...]
    untrusted: tuple[str, ...]
    refused: dict[str, int]
    wait: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchAttemptFailed(Event):
    """One attempt made no connection. More may follow.

    Attributes:
        connection, inviter, attempt, seconds: as in `PunchStarted`.
        text: why.
    """

    peer: PeerId
    connection: int
    inviter: bool
    attempt: int
    text: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchEnded(Event):
    """No more attempts: there is a direct connection, or there will be none by this punch.

    Attributes:
        connection, inviter, seconds: as in `PunchStarted`.
        reason: ``punched``, or why not, in one word of `kas_libp2p.dcutr`.
        text: more words.
        attempts: how many were begun.
        rtt: round trip of the circuit in seconds, as last measured; ``None`` if it was not.
    """

    peer: PeerId
    connection: int
    inviter: bool
    reason: str
    text: str
    attempts: int
    rtt: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchTargetRefused(Event):
    """An address of a peer is not dialed in a punch, as nobody may make us send anything there.

    Attributes:
        address: what was asked for.
        reason: why not, in one word: ``loopback``, ``multicast``, ``private``, ``reserved``, ``port``, ``own``,
            ``not_tcp``; or the list of ours that forbids it.
    """

    peer: PeerId
    address: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchDialed(Event):
    """A dial of a punch has ended, or is over with it.

    Attributes:
        attempt: counts the dials to this address, from 1.
        reason: ``connected``; the system's name of the error, as ``ECONNREFUSED`` (a NAT refused it: it is dialed
            again) or ``EADDRNOTAVAIL`` (the other side's connection is there already); ``unanswered``; ``impossible``.
        after: seconds from the agreed instant to when it began.
        seconds: how long it took.
    """

    peer: PeerId
    address: str
    attempt: int
    reason: str
    after: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchAdopted(Event):
    """What came in during a punch was the peer: its dial reached our listener before ours reached its own.

    Attributes:
        address: from where.
        foreseen: whether exactly that was dialed; if not, the NAT of the peer gave it another port for us.
        after: seconds from the agreed instant to when it came.
        seconds: from then until it was verified.
    """

    peer: PeerId
    address: str
    foreseen: bool
    after: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeAbandoned(Event):
    """A relayed connection stays relayed for now: no direct one was made, or it did not last.

    Attributes:
        connection: number of the relayed connection.
        stage: how far it had come: intent, punch or proving.
        reason: why, in one word of `kas_libp2p.strategy`.
        text: more words.
        wait: seconds until it may be tried again.
        seconds: since it began.
    """

    peer: PeerId
    connection: int
    stage: str
    reason: str
    text: str
    wait: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PathProven(Event):
    """A direct connection has answered for long enough: the relayed ones with the peer can be replaced by it.

    Attributes:
        connection: number of the direct connection.
        path: direct or punched.
        replaces: numbers of the relayed connections.
        rtt, relayed_rtt: round trips in seconds; ``None``: not known.
        seconds: since the direct connection was up.
    """

    peer: PeerId
    connection: int
    path: Path
    replaces: tuple[int, ...]
    rtt: float
    relayed_rtt: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitReplaced(Event):
    """A relayed connection has ended after a direct one had taken its place; mostly one of the two sides closed it.

    Attributes:
        connection: number of the relayed connection.
        by: number of the direct one.
        seconds: since that one was proven: how long streams stayed behind.
    """

    peer: PeerId
    connection: int
    by: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDamaged(Event):
    """A file of ours, whose loss costs time and nothing else, can't be read or written. It is made anew.

    Attributes:
        path: which.
        reason: what is wrong with it, and what that costs.
    """

    path: str
    reason: str


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


_COUNTED_BY_REASON = (
    AcceptFailed,
    CircuitClosed,
    DialBackServed,
    InboundRefused,
    KaspaPeerEnded,
    LimitHit,
    ObservationRefused,
    PunchDialed,
    PunchEnded,
    PunchTargetRefused,
    RelayRequestServed,
    SessionRefused,
    UpgradeDecided,
)
"""Events whose reason is one of few words."""


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

    def pending(self) -> tuple[Event, ...]:
        """What has happened and is not read yet, as things are. It stays to be read."""
        return tuple(self._queue)

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
        """How often each event occurred, by name and detail: its ``layer``, ``stage``, ``code``, ``reason`` or
        nothing."""

    def emit(self, event: Event) -> None:
        """Count the event and hand it to all subscribers. Never waits."""
        detail = getattr(event, "layer", None) or getattr(event, "stage", None) or getattr(event, "code", None) or ""
        if isinstance(event, _COUNTED_BY_REASON):
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
