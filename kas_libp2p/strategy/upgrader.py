"""Makes relayed connections direct: carries out what `_upgrade` decides, remembers, and tells.

A direct connection is proven by pings of several full packets: some ways carry a handshake and drop what is as large as
a packet can be.

A relayed connection that was replaced is closed as soon as no stream is open on it. Who has a stream there is told by
`PathProven` that there is a better way, and moves when it likes; nothing is cut off.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p import addresses as addr
from kas_libp2p import ping
from kas_libp2p._rates import Rates
from kas_libp2p.autonat._observed import Mapping
from kas_libp2p.config import Config
from kas_libp2p.dcutr._machine import Reason
from kas_libp2p.dcutr._messages import PROTOCOL as DCUTR
from kas_libp2p.dcutr.service import Outcome
from kas_libp2p.errors import ConnectionLost, KasError, NegotiationError, Refused, StreamReset
from kas_libp2p.events import Event, EventBus, PathProven, Subscription
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.statefile import StateFile
from kas_libp2p.strategy._intent import Answer, Intent
from kas_libp2p.strategy._memory import Cause, Memory
from kas_libp2p.strategy._nat import PREDICTED, Dice, Nat, NatFacts, Ports, keepalive, may_draw, predict, spread
from kas_libp2p.strategy._plan import ConnectionStrategy, Way
from kas_libp2p.strategy._upgrade import Command, Drop, Prove, Replace, Stop, Try, Upgrades, UpgradeStatus, told_event
from kas_libp2p.strategy._why import Facts, History, explain
from kas_libp2p.strategy.intent import Intents
from kas_libp2p.transport._punch import Target
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream

MOST_PREDICTED = 48
"""Guessed ports in one attempt, which leaves room among a punch's targets for others. Each attempt before may have cost
the peer a port per dial, many where our NAT answers with refusals."""
SPREADS, SPREAD_INTERVAL = 4, 60.0
"""Attempts with many ports at once, with whomever, and seconds for each one more: some 100 packets each."""
SPREADS_PER_PEER, SPREAD_INTERVAL_PER_PEER = 3, 600.0
"""The same with one peer: a punch has three attempts."""
ROUNDS, PAUSE = 6, 0.5
"""Pings that a direct connection has to answer, and seconds between them: three in all, in which a NAT that only
lets the first packets through shows it."""
ROUND_TIMEOUT = 2.0
"""Seconds for each: a lost packet is sent again after one, at most."""
LOAD = 8 * 1024
"""Bytes of each: five or six full packets, there and back."""
LINGER = 1.0
"""Seconds from the proof on for which a relayed connection stays in any case: the other side proves the new one in its
own time, and streams move."""
USE_CHECK = 0.5
"""Seconds until it is looked again whether a replaced connection is in use."""
REFUSED = 1.0
"""Seconds for which DCUtR's invitations on a circuit are turned down after a no: the one that the no was an answer to
comes in one flight with the intent, and may be read after it."""
SAVE_INTERVAL = 600.0
"""Seconds between two writings of the file: what a crash may cost."""


class Upgrader:
    """The one object that a node needs of this room.

    Args:
        config: ``punch`` and ``dial`` are used.
        events: where everything is told.
        invite: makes a punch with the peer at the other end of a circuit that it made; `Dcutr.invite`.
        abandon: stops the punch with a peer; `Dcutr.abandon`.
        dial: makes a direct connection with a peer, at one address, from a fresh port, so that it is not in the way of
            a punch; raises a `KasError` if it can't.
        facts: what is known of our NATs, and our public addresses as multiaddr texts.
        wall_clock: seconds since the epoch.
        dice: chance.

    Attributes:
        strategy: makes the plans; a node asks it how to reach a peer.
        intents: to be served under `kas_libp2p.strategy._intent.PROTOCOL`.
        on_proven: called with a peer when a direct connection with it has proven itself; must not block nor raise.
    """

    def __init__(
        self,
        config: Config,
        events: EventBus,
        *,
        invite: Callable[[Connection], Awaitable[Outcome]],
        abandon: Callable[[PeerId, str], bool],
        dial: Callable[[PeerId, str], Awaitable[object]],
        facts: Callable[[], tuple[NatFacts, Sequence[str]]],
        wall_clock: Callable[[], float],
        dice: Dice,
    ) -> None:
        self.strategy = ConnectionStrategy(config.dial, config.punch)
        self.intents = Intents(events, answer=self._asked)
        self.on_proven: list[Callable[[PeerId], None]] = []
        self._config = config.punch
        self._events = events
        self._invite = invite
        self._abandon = abandon
        self._dial = dial
        self._facts = facts
        self._wall_clock = wall_clock
        self._dice = dice
        self._spreads = Rates(SPREADS, SPREAD_INTERVAL)
        self._spread_with = Rates(SPREADS_PER_PEER, SPREAD_INTERVAL_PER_PEER)
        self._memory = Memory(dice, steady=config.punch.steady)
        self._machine = Upgrades(config.punch, self.strategy, self._memory)
        self._history = History()
        self._told: Subscription | None = None
        self._file: StateFile | None = None
        if config.punch.state_file is not None:
            self._file = StateFile(config.punch.state_file, events, "known punches")
            self._file.load(lambda text: self._memory.load(text, trio.current_time(), wall_clock()))
        self._connections: dict[int, Connection] = {}
        self._asking: dict[PeerId, trio.Event] = {}  # whom we have asked what it wants, until it has told
        self._aimed: dict[PeerId, int] = {}  # attempts of the present punch
        self._kept: dict[int, float] = {}  # seconds of silence after which each punched connection is pinged
        self._refused: dict[int, float] = {}  # until when an invitation on a circuit is turned down
        self._scopes: dict[PeerId, set[trio.CancelScope]] = {}
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()

    # What a node tells; none of these waits or raises

    def connected(self, connection: Connection, claimed: Iterable[str] = ()) -> None:
        """A connection is up, of any path and direction.

        Args:
            claimed: addresses that the peer told before, if it was connected before.
        """
        self._connections[connection.number] = connection
        now, peer, path = trio.current_time(), connection.peer, connection.path
        if path.kind is PathKind.RELAYED:
            assert path.relay is not None
            seen_at = connection.circuit.observed if connection.circuit is not None else None
            self._refresh(now)
            self._apply(
                self._machine.circuit_up(
                    peer,
                    connection.number,
                    path.relay,
                    now,
                    inbound=not connection.initiator,
                    seen_at=str(seen_at) if seen_at is not None else "",
                    rtt=connection.rtt,
                    claimed=claimed,
                )
            )
        else:
            if path.kind is PathKind.PUNCHED:
                self._keep_alive(connection)
            self._apply(self._machine.direct_up(peer, connection.number, path, now))

    def disconnected(self, connection: Connection) -> None:
        """A connection has ended."""
        self._refused.pop(connection.number, None)
        if self._connections.pop(connection.number, None) is not None:
            self._apply(
                self._machine.gone(
                    connection.peer,
                    connection.number,
                    trio.current_time(),
                    broken=connection.broke,
                    text=connection.close_reason or "",
                    silence=self._silence(connection),
                )
            )
        if all(each.peer != connection.peer for each in self._connections.values()):
            self._aimed.pop(connection.peer, None)

    def identified(self, connection: Connection, addresses: Iterable[str], protocols: Iterable[str]) -> None:
        """A peer has told about itself, or told anew."""
        punches = DCUTR in protocols
        self._apply(self._machine.claims(connection.peer, addresses, trio.current_time(), punches=punches))

    def changed(self) -> None:
        """What is known of our NATs or addresses may have changed."""
        self._refresh(trio.current_time())

    def attempt_failed(self, peer: PeerId, attempt: int, text: str) -> None:
        """An attempt of a punch of ours made no connection; for `Dcutr.on_attempt_failed`."""
        self._apply(self._machine.attempt_failed(peer, attempt, text, trio.current_time()))

    def punched(self, outcome: Outcome) -> None:
        """A punch is over, of either side; for `Dcutr.on_done`."""
        self._aimed.pop(outcome.peer, None)
        if outcome.reason is Reason.ABANDONED:
            return  # by us, who know why
        cause = None if outcome.reason is Reason.PUNCHED else _cause_of(outcome)
        self._apply(self._machine.ended(outcome.peer, cause, outcome.text, trio.current_time()))

    # What a node asks

    def theirs(self, peer: PeerId) -> Intent | None:
        """What a peer of this project has told last; ``None``: nothing yet."""
        return self._machine.theirs(peer)

    def shares_local(self, peer: PeerId) -> bool:
        """Whether both sides agreed to tell each other their local addresses if they are behind the same router."""
        intent = self._machine.theirs(peer)
        return self._config.share_local and intent is not None and intent.shares_local

    def welcomes(self, connection: Connection) -> bool:
        """Whether an invitation to punch on a circuit is answered: not if we have just told that peer no."""
        return trio.current_time() >= self._refused.get(connection.number, 0.0)

    def proven(self, connection: Connection) -> bool:
        """Whether a direct connection that took a relayed one's place has answered for long enough."""
        return self._machine.is_replaced(connection.peer, connection.number)

    async def told(self, peer: PeerId, until: float) -> None:
        """Wait for what a peer that we have invited tells, which comes in one flight with its CONNECT.

        Args:
            until: when to go on without, on trio's clock.
        """
        asking = self._asking.get(peer)
        if asking is not None:
            with trio.move_on_at(until):
                await asking.wait()

    def tries_many(self, peer: PeerId) -> bool:
        """Whether many ports are to be tried in the present attempt; see `Upgrades.tries_many`."""
        return self._machine.tries_many(peer, self._aimed.get(peer, 0))

    def aim(self, peer: PeerId, targets: Sequence[Target]) -> tuple[Target, ...]:
        """What to dial in a punch.

        At a NAT that counts its ports up the next ports, in their order; at one that draws them, some that it may draw,
        if both sides agreed to that; after a wrong guess both, if it may be of either kind. Where others have seen the
        peer behind such a NAT, nothing leads to it. Where our own NAT draws ports, the peer is dialed from many, if
        both agreed. Further attempts take in more.

        Args:
            targets: where the peer may be met.
        """
        attempt = self._aimed[peer] = self._aimed.get(peer, 0) + 1
        seen = (addr.ip_port(each.address) for each in targets if each.trusted and not each.local)
        ips = dict.fromkeys(where[0] for where in seen if where is not None)
        spreads = self.tries_many(peer) and self._may_spread(peer)
        guessed = {ip: ports for ip in ips if (ports := self._guess(peer, ip, attempt, spreads))}
        found = [Target(addr.from_ip_port(ip, port)) for ip, ports in guessed.items() for port in ports]
        for each in targets:
            where = addr.ip_port(each.address)
            if where is not None and where[0] in guessed:
                continue
            found.append(each)
            if spreads and where is not None and where[0] in ips:
                found += [replace(each, source=number + 1) for number in range(self._sources(where[0]))]
        return tuple(found)

    def _guess(self, peer: PeerId, ip: str, attempt: int, spreads: bool) -> tuple[int, ...]:
        intent = self._machine.theirs(peer)
        nat = intent.nat.of(6 if ":" in ip else 4) if intent is not None else None
        if nat is None:
            return ()
        counts = nat.ports is Ports.SEQUENTIAL and self._config.predict
        found = predict(nat.sightings, min(attempt * PREDICTED, MOST_PREDICTED)) if counts else ()
        if spreads and _draws(nat):
            found += spread(nat, self._dice).ports
        return tuple(dict.fromkeys(found))

    def _sources(self, ip: str) -> int:
        nat = self._ours()[0].of(6 if ":" in ip else 4)
        return spread(nat, self._dice).sockets if nat is not None and _draws(nat) else 0

    def _may_spread(self, peer: PeerId) -> bool:
        return self._spreads.take(None, trio.current_time()) and self._spread_with.take(peer, trio.current_time())

    def status(self) -> tuple[UpgradeStatus, ...]:
        """How it stands with every peer that is, or was, reached through a relay."""
        return self._machine.status(trio.current_time())

    def why(self, peer: PeerId, facts: Facts) -> list[str]:
        """Why the path to a peer is what it is, in lines; see `kas_libp2p.strategy._why.explain`."""
        latest = self._told.pending() if self._told is not None else ()  # whoever asks may have heard of it already
        return explain(peer, (*self._history.of(peer), *latest), facts, self._wall_clock())

    # Running

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled. What happens before is not seen."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await nursery.start(self._record)
                    task_status.started()
                    await self._keep_time()
                finally:
                    self._nursery = None  # before it is closed: nobody may start anything in it then
        finally:
            self.save()

    async def _keep_time(self) -> None:
        save_at = trio.current_time() + SAVE_INTERVAL
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(min(self._machine.next_deadline(), save_at)):
                await self._wake.wait()
            now = trio.current_time()
            if now >= save_at:
                self.save()
                save_at = now + SAVE_INTERVAL
            if now >= self._machine.next_deadline():
                self._measure()
                self._apply(self._machine.on_timeout(now))

    def save(self) -> None:
        """Write the file. If that fails, an event says so."""
        if self._file is not None:
            self._file.save(self._memory.dump(trio.current_time(), self._wall_clock()))

    async def _record(self, *, task_status: TaskStatus[None]) -> None:
        with self._events.subscribe() as self._told:
            task_status.started()
            async for event in self._told:
                self._history.add(event)

    def _refresh(self, now: float) -> None:
        self._apply(self._machine.facts(*self._ours(), now))

    def _ours(self) -> tuple[NatFacts, Sequence[str]]:
        facts, at = self._facts()
        lifetime = self._memory.own_lifetime()
        if lifetime is not None:
            v4, v6 = (replace(each, lifetime=lifetime) if each is not None else None for each in (facts.v4, facts.v6))
            facts = NatFacts(v4, v6)
        return facts, at

    def _measure(self) -> None:
        for each in self._connections.values():
            if each.path.kind is PathKind.RELAYED and each.rtt is not None:
                self._machine.measured(each.peer, each.number, each.rtt)

    def _apply(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case PathProven(peer=peer):
                    self._events.emit(command)
                    for callback in self.on_proven:
                        callback(peer)
                case Event():
                    self._events.emit(command)
                case Stop(peer, text):
                    self._abandon(peer, text)
                    for scope in self._scopes.get(peer, ()):
                        scope.cancel()
                case Drop(_, number, text):
                    if (connection := self._connections.get(number)) is not None:
                        connection.abort(text)
                case Try():
                    self._try(command)
                case Prove(_, number):
                    self._start(self._prove, number)
                case Replace(_, circuit, by):
                    self._start(self._replace, circuit, by)
        self._wake.set()

    def _start(self, work: Callable[..., Awaitable[None]], number: int, *rest: object) -> None:
        connection = self._connections.get(number)
        if self._nursery is not None and connection is not None:
            self._nursery.start_soon(work, connection, *rest)

    # Trying

    def _try(self, command: Try) -> None:
        for attempt in command.plan.attempts:
            if attempt.way is Way.PUNCH:
                self._start(self._punch, command.circuit, attempt.start)
            else:
                self._start(self._dial_direct, command.circuit, attempt.address, attempt.start)

    @contextmanager
    def _stoppable(self, peer: PeerId) -> Iterator[None]:
        scope = trio.CancelScope()
        some = self._scopes.setdefault(peer, set())
        some.add(scope)
        try:
            with scope:
                yield
        finally:
            some.discard(scope)
            if not some:
                self._scopes.pop(peer, None)

    async def _dial_direct(self, connection: Connection, address: str, start: float) -> None:
        with self._stoppable(connection.peer):
            await trio.sleep(start)
            with suppress(KasError):  # a try beside the punch, which goes on
                await self._dial(connection.peer, address)

    async def _punch(self, connection: Connection, start: float) -> None:
        ready = False
        with self._stoppable(connection.peer):
            if start:
                await trio.sleep(start)
            ready = True
        if not ready:
            return
        stream = await self._tell(connection)  # before CONNECT, so that it is known when that is answered
        async with trio.open_nursery() as nursery:
            if stream is not None:
                nursery.start_soon(self._hear, connection, stream)
            await self._invite(connection)  # `punched` hears of its end
            nursery.cancel_scope.cancel()

    async def _tell(self, connection: Connection) -> YamuxStream | None:
        ours = self._machine.intent(Answer.YES, trio.current_time())
        try:
            stream = await self.intents.open(connection, ours)
        except (ConnectionLost, Refused):
            return None  # the punch will notice, too
        self._events.emit(told_event(connection.peer, connection.number, ours, by_us=True))
        return stream

    async def _hear(self, connection: Connection, stream: YamuxStream) -> None:
        peer = connection.peer
        event = self._asking[peer] = trio.Event()
        try:
            theirs = await self.intents.wait(stream)
            if theirs is not None:
                self._apply(self._machine.told(peer, connection.number, theirs, trio.current_time()))
        finally:
            event.set()
            if self._asking.get(peer) is event:
                del self._asking[peer]

    def _asked(self, connection: Connection, theirs: Intent) -> Intent:
        now = trio.current_time()
        self._refresh(now)
        answer, commands = self._machine.asked(connection.peer, connection.number, theirs, now)
        self._apply(commands)
        if answer.answer is not Answer.YES:
            self._refused[connection.number] = now + REFUSED
            self._abandon(connection.peer, f"we told the peer {answer.answer}: {answer.reason}")
        return answer

    # Proving and replacing

    async def _prove(self, connection: Connection) -> None:
        peer, number = connection.peer, connection.number
        rtts: list[float] = []
        try:
            for _ in range(ROUNDS):
                with trio.fail_after(ROUND_TIMEOUT):
                    rtts.append(await _loaded_ping(connection))
                await trio.sleep(PAUSE)
        except trio.TooSlowError:
            text = f"it answered {len(rtts)} of {ROUNDS} pings, and the next one not within {ROUND_TIMEOUT:g} s"
            self._apply(self._machine.unproven(peer, number, text, trio.current_time()))
        except ConnectionLost:
            pass  # `disconnected` tells
        else:
            self._keep_alive(connection)
            self._apply(self._machine.proven(peer, number, statistics.median(rtts), trio.current_time()))

    def _keep_alive(self, connection: Connection) -> None:
        """Once at the start, and again once both sides have told what their NATs forget."""
        family = addr.family(connection.remote_address) or 4
        ours, _ = self._ours()
        intent = self._machine.theirs(connection.peer)
        nats = [ours.of(family), intent.nat.of(family) if intent is not None else None]
        seconds = keepalive(self._config.keepalive, *nats, seen=self._memory.lifetime(connection.peer))
        connection.keep_alive(seconds)
        self._kept[connection.number] = seconds

    def _silence(self, connection: Connection) -> float:
        """Seconds of silence after which a connection was found dead, if a NAT's mapping may have died and not our
        line, which would have taken the others along; else 0.
        """
        kept = self._kept.pop(connection.number, 0.0)
        others = any(each.close_reason is None for each in self._connections.values())
        pinged = trio.current_time() - connection.opened_at >= kept
        return kept if connection.broke and others and pinged else 0.0

    async def _replace(self, circuit: Connection, by: int) -> None:
        await trio.sleep(LINGER)
        while self._machine.is_replaced(circuit.peer, by) and circuit.close_reason is None:
            if not circuit.streams:
                await circuit.aclose("a direct connection has taken its place")
                return
            await trio.sleep(USE_CHECK)


async def _loaded_ping(connection: Connection) -> float:
    """The round trip in seconds of several full packets; of a small one if it serves no pings, or we ping already.

    Raises:
        ConnectionLost: the connection ended.
    """
    turn = ping.turn(connection)
    if not turn.locked():
        with suppress(NegotiationError, Refused, StreamReset):
            async with turn:
                started = trio.current_time()
                stream = await connection.open_stream(ping.ID)
                try:
                    await stream.send_all(bytes(LOAD))
                    left = LOAD
                    while left and (data := await stream.receive_some(left)):
                        left -= len(data)
                finally:
                    stream.reset()
                if not left:
                    return trio.current_time() - started
    return await connection.ping()


def _draws(nat: Nat) -> bool:
    """Whether a NAT's ports are to be looked for among many: not if it counts them up and fits no block."""
    return nat.mapping is Mapping.DEPENDENT and (nat.ports is not Ports.SEQUENTIAL or may_draw(nat))


def _cause_of(outcome: Outcome) -> Cause:
    match outcome.reason:
        case Reason.UNSUPPORTED:
            return Cause.UNSUPPORTED
        case Reason.REFUSED | Reason.TIMEOUT:
            return Cause.DECLINED
        case Reason.NO_CANDIDATES:
            return Cause.NO_ADDRESS
        case Reason.PROTOCOL:
            return Cause.BROKEN
        case Reason.BUSY | Reason.RATE:
            return Cause.BUSY
        case Reason.PUNCH_FAILED:
            return Cause.BUSY if isinstance(outcome.failure, Refused) else Cause.UNREACHED
    return Cause.INTERRUPTED
