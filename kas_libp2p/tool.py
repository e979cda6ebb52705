"""What ``kas-libp2p`` does once its command line is understood: listen, dial, why, ping, perf.

Everything that happens goes over the node's event bus, also what the tool itself has to tell, and one task prints what
comes from there. So ``--json`` tells the same as the text for people, in the same order, and nothing less.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import trio

from kas_libp2p import perf, ping
from kas_libp2p.addresses import is_loopback, parse_target, relay_address
from kas_libp2p.config import Config, Limits, RelayConfig, Role
from kas_libp2p.dcutr._machine import ATTEMPTS, Reason
from kas_libp2p.errors import AddressError, ConnectionLost, DialError, KasError
from kas_libp2p.events import (
    AcceptFailed,
    AddressesChanged,
    AddressFailed,
    CircuitClosed,
    CircuitNotRenewed,
    CircuitOpened,
    CircuitRenewed,
    CircuitReplaced,
    ConnectionClosed,
    ConnectionOpened,
    Dialing,
    Event,
    EventsLost,
    HandlerFailed,
    IdentifyFailed,
    InboundRefused,
    IntentTold,
    InternalError,
    LimitHit,
    PathProven,
    PeerIdentified,
    PeerMisbehaved,
    PunchAdopted,
    PunchAttemptFailed,
    PunchConnect,
    PunchDialed,
    PunchEnded,
    PunchStarted,
    PunchSync,
    PunchTargetRefused,
    RelayRequestServed,
    ReservationFailed,
    ReservationLost,
    ReservationMade,
    SmallCircuits,
    StreamFailed,
    Subscription,
    UpgradeAbandoned,
    UpgradeDecided,
    UpgradeFailed,
    to_dict,
)
from kas_libp2p.metadata import CircuitLimits, Direction, Path, PathKind, PeerId
from kas_libp2p.node import AGENT, Node, SwarmConnection, open_node
from kas_libp2p.strategy._memory import Cause
from kas_libp2p.transport.yamux.stream import YamuxStream
from kas_libp2p.units import plural, rate, seconds, short, size

ECHO = "/echo/1.0.0"
"""Sends back what comes, as the examples of the other implementations do."""
PERF_STREAMS, PERF_STREAMS_PER_PEER = 16, 8
"""Measurements that ``listen`` serves at once."""
PROGRESS_EVERY = 0.5
"""Seconds between two `PerfProgress`."""
STALLED_AFTER = 30.0
"""Seconds without progress after which a measurement is given up; the server's patience (`perf.STALL_TIMEOUT`)."""
PING_INTERVAL = 1.0
"""Seconds between two pings, if nothing else is said."""
NEVER_IDLE = Limits(idle_timeout=math.inf)
"""Whoever tests decides when a connection ends; the tool ends none for being unused."""
RELAY_CONNECTIONS = Limits(max_connections=1024, max_inbound=960)
"""A relay has room for everybody who may hold a place on it, and for their callers; who is neither leaves when idle."""
NOTHING = "nothing came through"
"""What there is to say of a punch whose dials have been told."""
INVITED_WITHIN = 15.0
"""Seconds within which a peer that we called through a relay begins to punch, if it does: go and js first dial for 5,
rust takes 10 from one attempt to the next."""
CLEAR_LINE = "\r\x1b[2K"


# What the tool tells beside the events of the node


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The node runs.

    Attributes:
        peer_id, agent: who we are.
        addresses: where we listen, with our peer id; empty if we only dial.
        protocols: what we serve.
        key_file: where our key is kept; ``None`` for a key that ends with the process.
    """

    peer_id: PeerId
    agent: str
    addresses: tuple[str, ...]
    protocols: tuple[str, ...]
    key_file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping(Event):
    """A signal ended it.

    Attributes:
        signal: its name.
    """

    signal: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected(Event):
    """We are connected, and the peer has told about itself.

    Attributes:
        connection: number of the connection in this process.
        seconds: until the connection was usable.
        rtt: round trip in seconds, measured in the handshake.
        agent, protocol_version, protocols, addresses: what the peer tells of itself; empty if it does not.
        signed: whether the addresses are signed with the peer's key.
        observed: our address as the peer sees it, or ``None``.
        limits: what the relay allows the circuit, and what is left of it; ``None`` where no relay stands between.
    """

    connection: int
    peer: PeerId
    path: Path
    direction: Direction
    local_address: str
    remote_address: str
    seconds: float
    rtt: float | None
    agent: str
    protocol_version: str
    protocols: tuple[str, ...]
    addresses: tuple[str, ...]
    signed: bool
    observed: str | None
    limits: CircuitLimits | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained(Event):
    """Why the path to a peer is what it is.

    Attributes:
        lines: in words.
    """

    peer: PeerId
    path: Path
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamServed(Event):
    """A stream of ping, perf or echo that the peer opened has ended.

    Attributes:
        seconds: how long it was open.
        received, sent: bytes, those of the agreement on the protocol included.
    """

    peer: PeerId
    protocol: str
    seconds: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinged(Event):
    """A ping was answered.

    Attributes:
        seq: its number, from 1.
        seconds: the round trip.
    """

    peer: PeerId
    seq: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PingFailed(Event):
    """A ping was not answered. It is the last one: below it is TCP, which loses nothing."""

    peer: PeerId
    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PingSummary(Event):
    """All pings.

    Attributes:
        sent, answered: how many.
        min, median, mean, max, stdev: seconds; ``None`` if none was answered.
    """

    peer: PeerId
    sent: int
    answered: int
    min: float | None
    median: float | None
    mean: float | None
    max: float | None
    stdev: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfProgress(Event):
    """How far a measurement is.

    Attributes:
        uploaded, downloaded: bytes so far.
        seconds: since it began.
    """

    peer: PeerId
    uploaded: int
    downloaded: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfSummary(Event):
    """A measurement. What each direction's time covers is told at `kas_libp2p.perf.PerfResult`.

    Attributes:
        uploaded, downloaded: bytes.
        upload_seconds, download_seconds: for them.
        upload_rate, download_rate: bytes per second; ``None`` where nothing was sent.
    """

    peer: PeerId
    uploaded: int
    upload_seconds: float
    upload_rate: float | None
    downloaded: int
    download_seconds: float
    download_rate: float | None


# Printing


Words = Callable[[Event], Sequence[str]]
"""The lines for people about an event; none if it is of no interest."""


class Report:
    """Prints events: as JSON, one a line, or in words.

    Args:
        as_json: which of the two.
        words: the words.
    """

    def __init__(self, as_json: bool, words: Words) -> None:
        self._as_json = as_json
        self._words = words
        self._in_progress = False

    async def run(self, events: Subscription) -> None:
        """Print until the events end."""
        async for event in events:
            self._print(event)
        if self._in_progress:
            _write("\n")

    def interrupted(self) -> None:
        """What comes now begins on a line of its own, not behind the terminal's ``^C``."""
        self._in_progress = False
        if not self._as_json and sys.stdout.isatty():
            _write("\n")

    def _print(self, event: Event) -> None:
        if self._as_json:
            _write(json.dumps(to_dict(event), ensure_ascii=False) + "\n")
            return
        lines = self._words(event)
        progress = isinstance(event, PerfProgress)
        if not lines or (progress and not sys.stdout.isatty()):
            return
        _write((CLEAR_LINE if self._in_progress else "") + "\n".join(lines) + ("" if progress else "\n"))
        self._in_progress = progress


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# Running


class Interrupted(Exception):
    """A signal ended the work before it was done.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class StayedRelayed(KasError):
    """A relayed connection did not become direct; the text says why."""


async def with_node(
    config: Config,
    report: Report,
    work: Callable[[Node], Awaitable[None]],
    prepare: Callable[[Node], Awaitable[None]] | None = None,
) -> None:
    """Run a node, do the work, end in order, and print everything that happened until then.

    The first SIGINT or SIGTERM ends the work in order, a second one at once.

    Args:
        config: the node's settings.
        report: prints.
        work: what to do.
        prepare: what to do before it is told that the node has started.

    Raises:
        Interrupted: by a signal.
        BrokenPipeError: nobody reads what is printed.
        KasError, trio.TooSlowError: as ``work`` and `open_node`.
    """
    problem: Exception | None = None
    caught: list[int] = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        watching = trio.CancelScope()

        async def watch(*, task_status: Any) -> None:
            with watching, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for number in signals:
                    caught.append(number)
                    report.interrupted()
                    scope.cancel()
                    return

        async def show(events: Subscription) -> None:
            nonlocal problem
            try:
                await report.run(events)
            except BrokenPipeError as error:  # whoever read it is gone
                problem = error
                scope.cancel()

        await nursery.start(watch)
        try:
            with scope:
                async with open_node(config) as node:
                    nursery.start_soon(show, node.events())
                    if prepare is not None:
                        await prepare(node)
                    node.bus.emit(_started(node))
                    try:
                        await work(node)
                    finally:
                        if caught:
                            node.bus.emit(Stopping(signal=signal.Signals(caught[0]).name))
        except (KasError, trio.TooSlowError) as error:
            problem = error  # raised when all events are printed
        watching.cancel()
    if caught:
        raise Interrupted(caught[0])
    if problem is not None:
        raise problem


def _started(node: Node) -> Started:
    path = node.config.key_file
    return Started(
        peer_id=node.peer_id,
        agent=AGENT,
        addresses=node.addresses,
        protocols=node.status().protocols,
        key_file=str(path) if path is not None else None,
    )


# listen


async def listen(
    addresses: Sequence[str],
    *,
    key_file: FilePath | None,
    announce: Sequence[str],
    echo: bool,
    as_json: bool,
    verbose: bool,
    relays: Sequence[str] = (),
    serve: RelayConfig | None = None,
) -> None:
    """Listen and serve until a signal comes.

    Args:
        relays: hold places on these, to be reachable through them.
        serve: be a relay for others, in this way.

    Raises:
        Interrupted: the ordinary end.
        ListenError, AddressError, IdentityError: it could not begin.
    """

    async def prepare(node: Node) -> None:
        _serve(node, ping.ID, ping.handle, max_per_peer=ping.MAX_STREAMS_PER_PEER)
        _serve(node, perf.ID, perf.handle, max_streams=PERF_STREAMS, max_per_peer=PERF_STREAMS_PER_PEER)
        if echo:
            _serve(node, ECHO, _echo)
        await node.listen(*addresses)
        if relays:
            node.use_relays(*relays)  # when we listen: what a relay sees is where others may find us

    async def work(_: Node) -> None:
        await trio.sleep_forever()

    config = _config((), key_file, announce=tuple(announce))
    if serve is not None:
        config = replace(config, limits=RELAY_CONNECTIONS, role=Role.PUBLIC, relay=serve)
    await with_node(config, Report(as_json, _ListenWords(verbose)), work, prepare)


def _serve(node: Node, protocol: str, handle: Callable[[YamuxStream], Awaitable[None]], **limits: Any) -> None:
    """Serve a protocol, and tell of each stream when it has ended."""

    async def serve(stream: YamuxStream) -> None:
        try:
            await handle(stream)
        finally:
            served = StreamServed(
                peer=stream.connection.peer,
                protocol=protocol,
                seconds=trio.current_time() - stream.opened_at,
                received=stream.received,
                sent=stream.sent + stream.unsent,
            )
            node.bus.emit(served)

    node.swarm.unhandle(protocol)
    node.swarm.handle(protocol, serve, **limits)


async def _echo(stream: YamuxStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


class _ListenWords:
    """``listen`` for people."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._told: dict[PeerId, str] = {}  # what was printed of the peers that are here

    def __call__(self, event: Event) -> Sequence[str]:
        if isinstance(event, Started):
            return self._started(event)
        text = self._text(event)
        return [f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {text}"] if text else []

    def _started(self, event: Started) -> Sequence[str]:
        best = next((each for each in event.addresses if not is_loopback(each)), event.addresses[0])
        key = event.key_file or "new, for this run only (--key FILE keeps one)"
        return [
            f"{event.agent.replace('/', ' ')} · {event.peer_id}",
            *labelled("key", [key]),
            *labelled("listens", event.addresses),
            *labelled("serves", [", ".join(event.protocols)]),
            *labelled("try", [f"kas-libp2p ping {best}"]),
        ]

    def _text(self, event: Event) -> str | None:
        match event:
            case ConnectionOpened():
                return (
                    f"{short(event.peer)}  connected from {event.address}, {path_words(event.path)},"
                    f" in {seconds(event.seconds)}"
                )
            case PeerIdentified():
                sees = f", sees us at {event.observed}" if event.observed else ""
                text = f"{short(event.peer)}  is {event.agent or 'nameless'}{sees}"
                known = self._told.get(event.peer) == text
                self._told[event.peer] = text
                return text if self._verbose or not known else None
            case ConnectionClosed():
                self._told.pop(event.peer, None)
                return (
                    f"{short(event.peer)}  left after {seconds(event.seconds)}: {event.reason}"
                    f" (in {size(event.received)}, out {size(event.sent)})"
                )
            case StreamServed(protocol=ping.ID) if not self._verbose:
                return None
            case StreamServed():
                carried = f"{size(event.received)} in, {size(event.sent)} out"
                return f"{short(event.peer)}  {event.protocol} ended: {carried} in {seconds(event.seconds)}"
            case ReservationMade() if self._verbose or not event.renewed:
                kept = "keeps our place" if event.renewed else "has a place for us"
                where = "" if event.renewed else f": reachable at {', '.join(event.addresses)}"
                allows = _circuit_words(event.max_bytes, event.max_seconds)
                return f"{short(event.relay)}  {kept} for {seconds(event.lifetime)} ({allows} per circuit){where}"
            case ReservationFailed():
                return f"{short(event.relay)}  has no place for us: {event.reason}"
            case ReservationLost():
                return f"{short(event.relay)}  our place there is gone: {event.reason}"
            case RelayRequestServed() if event.reason:
                return f"{short(event.peer)}  asked to {event.request}: {event.status} ({event.reason})"
            case RelayRequestServed(request="reserve"):
                return f"{short(event.peer)}  has a place here"
            case CircuitOpened():
                return f"circuit {event.circuit}  from {short(event.source)} to {short(event.destination)}"
            case CircuitClosed():
                carried = f"{size(event.forth)} forth, {size(event.back)} back"
                return f"circuit {event.circuit}  ended after {seconds(event.seconds)}: {event.reason} ({carried})"
            case CircuitRenewed():
                return f"{short(event.peer)}  has a new circuit beside the one that is about to end: {event.reason}"
            case CircuitNotRenewed():
                return f"{short(event.peer)}  its circuit is about to end, and no new one was made: {event.reason}"
            case SmallCircuits():
                return f"{short(event.peer)}  a Kaspa stream with it lives on small circuits: {event.text}"
            case UpgradeFailed():
                return f"{event.address}  got no further than {event.stage}: {event.reason}"
            case InboundRefused():
                return f"{event.address}  refused: {event.reason}"
            case LimitHit():
                return f"{short(event.peer) if event.peer else event.address}  refused: {event.reason} is reached"
            case PeerMisbehaved():
                return f"{short(event.peer) if event.peer else event.address}  broke {event.layer}: {event.reason}"
            case IdentifyFailed():
                return f"{short(event.peer)}  tells nothing about itself: {event.reason}"
            case StreamFailed():
                return f"{short(event.peer)}  opened a stream that came to nothing: {event.reason}"
            case HandlerFailed():
                return f"{short(event.peer)}  a fault of ours ended a stream of {event.protocol}: {event.reason}"
            case InternalError():
                return f"a fault of ours ended {event.where}: {event.reason}"
            case AcceptFailed():
                return f"the system hands over no connection at {event.address}: {event.reason}"
            case AddressesChanged() if event.addresses:
                return f"listens now at {', '.join(event.addresses)}" if self._verbose else None
            case EventsLost():
                return f"{plural(event.count, 'event was', 'events were')} not shown: they came too fast"
            case Stopping():
                return f"stopping ({event.signal})"
            case (
                UpgradeDecided()
                | IntentTold()
                | PunchConnect()
                | PunchSync()
                | PunchStarted()
                | PunchTargetRefused()
                | PunchDialed()
                | PunchAdopted()
                | PunchAttemptFailed()
                | PunchEnded()
                | UpgradeAbandoned()
                | PathProven()
                | CircuitReplaced()
            ) if words := upgrade_words(event, self._verbose):
                return f"{short(event.peer)}  {words}"
        return None


# dial, ping, perf


def one_peer(targets: Sequence[str], relays: Sequence[str] = ()) -> tuple[PeerId | None, list[str]]:
    """Whom to dial, and where.

    Args:
        targets: multiaddrs or ``host:port`` of one peer; the peer id alone may be among them.
        relays: multiaddrs of relays; of a peer whose id is all that is given, it is reached through these.

    Raises:
        AddressError: one of them is neither, they are of different peers, or none says where.
    """
    parsed = [parse_target(each) for each in targets]
    peers = {each.peer for each in parsed if each.peer is not None}
    if len(peers) > 1:
        raise AddressError("these are addresses of different peers; dial one peer at a time")
    peer = next(iter(peers), None)
    found = [str(each.address) for each in parsed if each.address is not None]
    found = found or [f"{each}/p2p-circuit" for each in relays]
    if not found:
        raise AddressError(f"{peer} says who, not where; give an address too, as /ip4/192.0.2.1/tcp/16117/p2p/{peer}")
    if peer is None and len(found) > 1:
        raise AddressError("several addresses are tried for a named peer only; end one of them with /p2p/PEER")
    return peer, found


async def dial(
    targets: Sequence[str],
    *,
    key_file: FilePath | None,
    listen_on: Sequence[str],
    pings: int,
    stay: bool,
    as_json: bool,
    relays: Sequence[str] = (),
    wait: bool = False,
    why: bool = False,
    verbose: bool = False,
) -> None:
    """Connect, tell everything about the connection, and leave.

    Args:
        relays: relays to meet first, beside those of the circuits that are dialed: they say where others see us.
        wait: until no relay carries the connection, or it is clear that it stays so; then it is told why.
        why: tell in any case why the path is what it is; that it stayed relayed is no failure then.
        verbose: tell small events, too.

    Raises:
        DialError, AddressError, IdentityError, ListenError: no connection.
        StayedRelayed: with ``wait``, a relay still carries it.
        ConnectionLost: with ``wait``, ``stay`` or ``pings``, it ended first.
        Interrupted: by a signal.
    """
    peer, found = one_peer(targets, relays)

    async def work(node: Node) -> None:
        events = node.events()
        if wait:
            await _meet(node, (*relays, *(str(each) for each in map(relay_address, found) if each is not None)))
        began = trio.current_time()
        connection = await node.swarm.dial(peer, found)
        reason = ""
        if wait:
            connection, reason = await _until_direct(node, connection, events)
        await _tell(node, connection, trio.current_time() - began)
        if why or reason:
            lines = tuple(node.why(connection.peer))
            node.bus.emit(Explained(peer=connection.peer, path=connection.path, lines=lines))
        if pings:
            await _ping(node, connection, pings, PING_INTERVAL)
        if stay:
            await _until_gone(node, connection)
        if reason and not why:
            raise StayedRelayed(f"the connection with {connection.peer} stayed relayed: {reason}")

    words = _DialWords(peer, told=wait or stay or verbose, stay=stay, brief=why, verbose=verbose)
    config = _config(listen_on, key_file, relay=RelayConfig(target=0))
    await with_node(config, Report(as_json, words), work)


async def _meet(node: Node, relays: Iterable[str]) -> None:
    """Have relays say where they see us: there the peer can meet us, and two of them show what our NAT does."""
    for each in dict.fromkeys(relays):
        with suppress(DialError):  # events tell why; maybe another one will do
            await node.identify(each)


async def _until_direct(node: Node, connection: SwarmConnection, events: Subscription) -> tuple[SwarmConnection, str]:
    """Wait until no relay carries the connection with a peer, or it is clear that it stays so.

    Args:
        events: of the node, since before the connection was made.

    Returns:
        the connection to use; and why it is still relayed, empty if it is not.

    Raises:
        ConnectionLost: it ended first.
    """
    peer = connection.peer
    reason = f"the peer began no punch within {INVITED_WITHIN:g} s"
    attempts = 0
    with trio.move_on_after(INVITED_WITHIN) as patience:
        while (best := node.swarm.connection_to(peer)) is not None and best.path.kind is PathKind.RELAYED:
            match await anext(events):
                case PunchConnect(peer=about, by_us=by_us) if about == peer:
                    patience.deadline = math.inf  # it ends in time of its own
                    attempts += by_us
                case PunchEnded(peer=about) as ended if about == peer and not node.dcutr.is_punching(peer):
                    reason = NOTHING if ended.reason == Reason.PUNCH_FAILED else ended.text or ended.reason
                    if attempts >= ATTEMPTS:
                        break
                    patience.deadline = trio.current_time() + INVITED_WITHIN  # go and rust begin anew for each attempt
                case UpgradeAbandoned(peer=about) as left if about == peer and node.upgrader.theirs(peer) is not None:
                    reason = _left_words(left)  # and a peer of this project has made all attempts
                    break
                case UpgradeDecided(peer=about, decision="leave") as left if about == peer:
                    reason = _left_words(left)
                    break
    best = node.swarm.connection_to(peer)
    if best is None:
        raise ConnectionLost(f"the circuit with {peer} ended: {connection.connection.close_reason}")
    return best, reason if best.path.kind is PathKind.RELAYED else ""


async def _connect(node: Node, peer: PeerId | None, found: Sequence[str]) -> SwarmConnection:
    """Connect, and wait for what the peer tells about itself: what is measured after that is measured undisturbed.

    Raises:
        DialError, AddressError: no connection.
        ConnectionLost: the peer ended it at once.
    """
    began = trio.current_time()
    connection = await node.swarm.dial(peer, found)
    await _tell(node, connection, trio.current_time() - began)
    return connection


async def _tell(node: Node, connection: SwarmConnection, took: float) -> None:
    """Tell everything about a connection, once the peer has told about itself.

    Raises:
        ConnectionLost: the peer ended it at once.
    """
    transport = connection.connection
    info = await node.identify(transport.peer)
    if connection.is_closed:
        why = transport.close_reason or "it takes no streams"
        raise ConnectionLost(f"{transport.peer} let us go right after the handshake, as its limits or lists do: {why}")
    node.bus.emit(
        Connected(
            connection=transport.number,
            peer=transport.peer,
            path=transport.path,
            direction=transport.direction,
            local_address=transport.local_address,
            remote_address=transport.remote_address,
            seconds=took,
            rtt=transport.rtt,
            agent=info.agent if info is not None else "",
            protocol_version=info.protocol_version if info is not None else "",
            protocols=info.protocols if info is not None else (),
            addresses=info.addresses if info is not None else (),
            signed=info is not None and info.signed,
            observed=info.observed if info is not None else None,
            limits=transport.circuit.limits if transport.circuit is not None else None,
        )
    )


async def _until_gone(node: Node, connection: SwarmConnection) -> None:
    gone = trio.Event()

    def left(other: SwarmConnection) -> None:
        if other is connection:
            gone.set()

    node.swarm.on_disconnected.append(left)
    if not connection.is_closed:
        await gone.wait()


class _DialWords:
    """``dial`` and ``why`` for people.

    Args:
        peer: whom it is about; ``None``: whoever answers.
        told: whether it is told how a relayed connection becomes direct.
        stay: whether it is told how the connection ends.
        brief: whether the connection itself is not described.
        verbose: whether small events are told.
    """

    def __init__(self, peer: PeerId | None, *, told: bool, stay: bool, brief: bool, verbose: bool) -> None:
        self._peer = peer
        self._told = told
        self._stay = stay
        self._brief = brief
        self._verbose = verbose
        self._began = 0.0
        self._over = False  # what there is to tell of the connection is told
        self._failed: list[str] = []

    def __call__(self, event: Event) -> Sequence[str]:
        if self._told and (text := self._stage(event)):
            return [f"  {event.at - self._began:6.3f} s  {text}"]
        match event:
            case Dialing():
                self._began = self._began or event.at
                where = (
                    event.addresses[0]
                    if len(event.addresses) == 1
                    else plural(len(event.addresses), "address", "addresses")
                )
                return [f"dialing {where}"]
            case AddressFailed():
                self._failed.append(failure_words(event.address, event.stage, event.reason, event.seconds))
            case Connected():
                self._over = not self._stay
                return [] if self._brief else self._connected(event)
            case Explained():
                return event.lines
            case ConnectionClosed() if self._stay and event.peer == (self._peer or event.peer):
                return [f"the connection ended after {seconds(event.seconds)}: {event.reason}"]
        return _ping_words(event)

    def _stage(self, event: Event) -> str | None:
        match event:
            case PeerIdentified() if event.peer != (self._peer or event.peer):
                return f"{short(event.peer)} sees us at {event.observed}" if event.observed else None
            case ConnectionOpened() if event.peer == (self._peer or event.peer):
                where = f" at {event.address}" if event.path.kind is not PathKind.RELAYED else ""
                return f"connected, {path_words(event.path)}{where}"
            case UpgradeAbandoned() if self._over:
                return None  # as we leave
        return upgrade_words(event, self._verbose)

    def _connected(self, event: Connected) -> Sequence[str]:
        rtt = f"round trip {_ms(event.rtt)}" if event.rtt is not None else ""
        took = _ms(event.seconds) if event.seconds < 1 else seconds(event.seconds)
        lines = [
            f"connected to {event.peer}",
            *labelled("path", [f"{path_words(event.path)}, {event.local_address} to {event.remote_address}"]),
            *labelled("took", [", ".join(filter(None, (took, rtt)))]),
        ]
        if event.limits is not None:
            lines += labelled("limits", [_circuit_words(event.limits.max_bytes, event.limits.max_seconds)])
        if self._failed:
            lines += labelled("failed", self._failed)
        if not event.agent and not event.protocols:
            return [*lines, *labelled("identify", ["it tells nothing about itself"])]
        agent = event.agent or "nameless"
        lines += labelled("agent", [f"{agent} (protocol version {event.protocol_version or 'not told'})"])
        lines += labelled("sees us", [event.observed or "at an address that it does not tell"])
        signed = ["(signed with its key)"] if event.signed else ["(not signed)"]
        lines += labelled("listens", [*event.addresses, *signed] if event.addresses else ["nowhere"])
        return [*lines, *labelled("serves", [", ".join(event.protocols)])]


async def measure_pings(
    targets: Sequence[str], *, key_file: FilePath | None, count: int, interval: float, as_json: bool
) -> None:
    """Ping over one stream.

    Args:
        count: how many; 0 until a signal comes, which is the ordinary end then.
        interval: seconds from the start of one to the start of the next.

    Raises:
        DialError, AddressError, IdentityError: no connection.
        NegotiationError, ConnectionLost, StreamReset, RemoteProtocolError, trio.TooSlowError: one was not answered.
        Interrupted: by a signal.
    """
    peer, found = one_peer(targets)

    async def work(node: Node) -> None:
        await _ping(node, await _connect(node, peer, found), count, interval)

    try:
        await with_node(_config((), key_file), Report(as_json, _ping_words), work)
    except Interrupted:
        if count:
            raise


async def _ping(node: Node, connection: SwarmConnection, count: int, interval: float) -> None:
    peer = connection.peer
    times: list[float] = []
    sent = 0
    try:
        async with ping.open_pinger(connection.connection) as pinger:
            for sent in itertools.count(1):
                began = trio.current_time()
                try:
                    times.append(await pinger.ping())
                except trio.TooSlowError:
                    raise trio.TooSlowError(f"the peer did not answer a ping within {ping.TIMEOUT:g} s") from None
                node.bus.emit(Pinged(peer=peer, seq=sent, seconds=times[-1]))
                if sent == count:
                    break
                await trio.sleep_until(began + interval)
    except (KasError, trio.TooSlowError) as error:
        node.bus.emit(PingFailed(peer=peer, seq=sent, reason=str(error)))
        raise
    finally:
        if sent:
            node.bus.emit(_summary(peer, sent, times))


def _summary(peer: PeerId, sent: int, times: Sequence[float]) -> PingSummary:
    return PingSummary(
        peer=peer,
        sent=sent,
        answered=len(times),
        min=min(times, default=None),
        median=statistics.median(times) if times else None,
        mean=statistics.fmean(times) if times else None,
        max=max(times, default=None),
        stdev=statistics.pstdev(times) if times else None,
    )


def _ping_words(event: Event) -> Sequence[str]:
    match event:
        case Connected():
            return [f"ping {_header(event)}"]
        case Pinged():
            return [f"  {event.seq:<4} {_ms(event.seconds):>10}"]
        case PingFailed():
            return [f"  {event.seq:<4} no answer: {event.reason}"]
        case PingSummary(min=float(least), median=float(median), max=float(most), stdev=float(stdev)):
            return [
                f"{event.answered} of {event.sent} answered; min {_ms(least)}, median {_ms(median)},"
                f" max {_ms(most)}, deviation {_ms(stdev)}"
            ]
        case PingSummary():
            return [f"{event.answered} of {event.sent} answered"]
    return []


async def measure_perf(
    targets: Sequence[str], *, key_file: FilePath | None, upload: int, download: int, as_json: bool
) -> None:
    """Measure with ``/perf/1.0.0``.

    Args:
        upload, download: bytes.

    Raises:
        DialError, AddressError, IdentityError: no connection.
        NegotiationError, ConnectionLost, StreamReset, RemoteProtocolError, trio.TooSlowError: it came to nothing.
        Interrupted: by a signal.
    """
    peer, found = one_peer(targets)

    async def work(node: Node) -> None:
        connection = await _connect(node, peer, found)
        began = told = trio.current_time()

        def progress(uploaded: int, downloaded: int) -> None:
            nonlocal told
            now = trio.current_time()
            stall.deadline = now + STALLED_AFTER
            if now - told >= PROGRESS_EVERY:
                told = now
                node.bus.emit(
                    PerfProgress(peer=connection.peer, uploaded=uploaded, downloaded=downloaded, seconds=now - began)
                )

        with trio.move_on_after(STALLED_AFTER) as stall:
            result = await perf.measure(connection.connection, upload=upload, download=download, progress=progress)
            node.bus.emit(_perf_summary(connection.peer, result))
            return
        raise trio.TooSlowError(f"the measurement made no progress for {STALLED_AFTER:g} s")

    await with_node(_config((), key_file), Report(as_json, _PerfWords(upload, download)), work)


def _perf_summary(peer: PeerId, result: perf.PerfResult) -> PerfSummary:
    return PerfSummary(
        peer=peer,
        uploaded=result.uploaded,
        upload_seconds=result.upload_seconds,
        upload_rate=_rate(result.uploaded, result.upload_seconds),
        downloaded=result.downloaded,
        download_seconds=result.download_seconds,
        download_rate=_rate(result.downloaded, result.download_seconds),
    )


def _rate(count: int, took: float) -> float | None:
    return count / took if count and took else None


class _PerfWords:
    """``perf`` for people."""

    def __init__(self, upload: int, download: int) -> None:
        self._upload = upload
        self._download = download
        self._turned = 0.0  # seconds at which the first byte of the download had come

    def __call__(self, event: Event) -> Sequence[str]:
        match event:
            case Connected():
                return [f"perf {_header(event)}"]
            case PerfProgress():
                return [self._progress(event)]
            case PerfSummary():
                return [
                    *self._done("upload", event.uploaded, event.upload_seconds, event.upload_rate),
                    *self._done("download", event.downloaded, event.download_seconds, event.download_rate),
                ]
        return []

    def _progress(self, event: PerfProgress) -> str:
        if not event.downloaded:
            self._turned = event.seconds
            name, done, total, took = "upload", event.uploaded, self._upload, event.seconds
        else:
            name, done, total, took = "download", event.downloaded, self._download, event.seconds - self._turned
        speed = _rate(done, took)
        return f"  {name:<9} {size(done)} of {size(total)}, {100 * done // max(total, 1)} %" + (
            f", {rate(speed)}" if speed is not None else ""
        )

    def _done(self, name: str, count: int, took: float, speed: float | None) -> Sequence[str]:
        return [f"  {name:<9} {size(count):>8} in {seconds(took):>7}   {rate(speed)}"] if speed is not None else []


def _config(listen_on: Sequence[str], key_file: FilePath | None, **more: Any) -> Config:
    return Config(listen=tuple(listen_on), key_file=key_file, limits=NEVER_IDLE, **more)


# Words


def labelled(label: str, lines: Sequence[str]) -> list[str]:
    """Lines under a label."""
    return [f"  {label if index == 0 else '':<9} {line}" for index, line in enumerate(lines)]


def path_words(path: Path) -> str:
    """The way of a connection."""
    return f"relayed by {short(path.relay or '')}" if path.kind is PathKind.RELAYED else str(path.kind)


def upgrade_words(event: Event, verbose: bool) -> str | None:
    """How a relayed connection becomes direct, or does not: one event of it, without the peer's name."""
    match event:
        case UpgradeAbandoned(stage="proving" | "stable"):
            return f"the direct connection did not last: {event.text}"
        case UpgradeAbandoned():
            return f"stays relayed for now: {_left_words(event)}"
        case UpgradeDecided(decision="leave"):
            return f"stays relayed: {_left_words(event)}"
        case UpgradeDecided() if verbose:
            return f"{event.decision} ({event.reason}): {event.text}"
        case IntentTold() if verbose:
            says, whose = ("we say", "our") if event.by_us else ("it says", "its")
            nats = [f"{whose} NAT {each}" for each in event.nat.values()]
            return "; ".join((" ".join(filter(None, (says, event.answer, event.reason))), *nats))
        case PunchConnect():
            rtt = f" (round trip {_ms(event.rtt)})" if event.rtt is not None else ""
            return f"CONNECT: {'we are' if event.by_us else 'it is'} at {_listed(event.addresses)}{rtt}"
        case PunchSync():
            return f"SYNC: {'sent' if event.by_us else 'came'}"
        case PunchStarted():
            wait = f", in {_ms(event.wait)}" if event.wait > 0 else ""
            return f"attempt {event.attempt}: dials {_listed(event.targets)}{wait}"
        case PunchTargetRefused() if verbose:
            return f"{event.address} is not dialed: {event.reason}"
        case PunchDialed() if verbose:
            return f"dial {event.attempt} of {event.address}: {event.reason} after {seconds(event.seconds)}"
        case PunchAdopted():
            return f"its own dial came in from {event.address}"
        case PunchAttemptFailed():
            return f"attempt {event.attempt} failed: {event.text}"
        case PunchEnded(reason="punched"):
            return f"punched: direct, attempt {event.attempts}, {seconds(event.seconds)}"
        case PunchEnded() if verbose:
            return f"the punch ended ({event.reason}): {event.text}"
        case PathProven():
            relayed = f", {_ms(event.relayed_rtt)} through the relay" if event.relayed_rtt is not None else ""
            return f"the direct connection is stable: {_ms(event.rtt)}{relayed}"
        case CircuitReplaced() if verbose:
            return "its circuit is closed: the direct connection has taken its place"
    return None


def _left_words(event: UpgradeDecided | UpgradeAbandoned) -> str:
    """Why a connection stays relayed."""
    if event.reason == Cause.UNREACHED:
        return NOTHING
    return event.text or event.reason


def _listed(addresses: Sequence[str]) -> str:
    return ", ".join(addresses) or "no address"


def _circuit_words(max_bytes: int | None, max_seconds: float | None) -> str:
    """What a relay allows a circuit."""
    allowed = [size(max_bytes)] if max_bytes is not None else []
    allowed += [seconds(max_seconds)] if max_seconds is not None else []
    return " and ".join(allowed) or "no limit"


def _header(event: Connected) -> str:
    who = f", {event.agent}" if event.agent else ""
    return f"{event.peer} at {event.remote_address}, {path_words(event.path)}{who}"


def failure_words(address: str, stage: str, reason: str, took: float) -> str:
    """Why one address did not work."""
    return f"{address}: {stage} failed after {seconds(took)}: {reason}"


def _ms(value: float) -> str:
    return f"{value * 1000:.2f} ms"
