"""The life of an upgrade: a relayed connection that becomes direct, per peer. No I/O.

::

                  ┌───────────── a place is free ────────┐
    RELAYED ──► QUEUED ──► PUNCHING ──► PROVING ──► STABLE
       ▲  └─────────────────►  │  ANSWERING │          │
       │                       ▼            ▼          ▼
       └── the wait is over ── COOLING ◄────┴── it broke

- Who was called through the relay invites: of both sides exactly one. The other side answers (ANSWERING).
- At most `punch.max_concurrent` punches are under way. More wait, fairly: the relays that they came through take turns.
- A direct connection, however it came to be, is proven: it has to answer for some seconds under load. Until then the
  relayed one stays as it is; then it is replaceable, and closed as soon as nothing uses it (the shell sees to that).
- What failed is left alone for a while that `_memory` knows. A connection that broke before it had lasted
  `punch.steady` is such a failure, too, so a path that comes and goes is used less and less.
- A peer that said no is left alone; so is one that no punch can reach, as soon as both have told what their NATs do.

After every call the commands say what to do. Events among them are to be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from kas_libp2p import addresses as addr
from kas_libp2p.config import PunchConfig
from kas_libp2p.events import CircuitReplaced, Event, IntentTold, PathProven, UpgradeAbandoned, UpgradeDecided
from kas_libp2p.metadata import Path, PeerId
from kas_libp2p.strategy._intent import Answer, Intent
from kas_libp2p.strategy._memory import Cause, Entry, Memory, Side, side
from kas_libp2p.strategy._nat import Chance, NatFacts, Verdict, in_words, may_draw, possible
from kas_libp2p.strategy._plan import ConnectionStrategy, Plan, Relayed, Way
from kas_libp2p.units import seconds as duration

MAX_QUEUED = 256
"""Peers that wait for their punch: as many as there are connections by default. Beyond, the relay through which most of
them came loses its last."""
MAX_ENDED = 3
"""Direct connections in a row that the other side ended early, after which the way counts as unstable."""
ANSWERING_TIMEOUT = 30.0
"""Seconds for which an answered invitation takes a place: three attempts, with room."""
PUNCHING_TIMEOUT = 90.0
"""Seconds after which a punch of ours that nobody ended is given up: more than DCUtR gives itself."""
BUSY_WAIT = 2.0
"""Seconds that a peer is asked to wait while too many punches are under way: each takes one or two."""
_STILL_DIALED = (Cause.UNSUPPORTED, Cause.UNREACHED, Cause.HOPELESS)
"""What a door that is open all the same can't be ruled out by."""
_OF_THE_WAY = (Cause.UNREACHED, Cause.UNSTABLE, Cause.BROKEN)
"""What makes us ask a peer that invites us to wait: the others are over if it does."""
MAX_CLAIMED = 4
"""Addresses that a peer claims which are dialed beside a punch: of each family the observed one and a mapped one."""
MAX_DIALED = 8
"""Of them in all, if the peer tells others until the next punch: as it finds out where it is. Each is dialed once."""


class State(StrEnum):
    """Where an upgrade is."""

    RELAYED = "relayed"
    QUEUED = "queued"
    PUNCHING = "punching"
    ANSWERING = "answering"
    PROVING = "proving"
    STABLE = "stable"
    COOLING = "cooling"


@dataclass(frozen=True, slots=True)
class Try:
    """Carry out a plan for a peer; if it holds a punch, `Upgrades.ended` follows."""

    peer: PeerId
    circuit: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class Stop:
    """End what `Try` began with a peer, or the answer to its invitation; `Upgrades.ended` is not needed any more."""

    peer: PeerId
    text: str


@dataclass(frozen=True, slots=True)
class Prove:
    """See whether a direct connection answers for some seconds; `Upgrades.proven` or `Upgrades.unproven` follows."""

    peer: PeerId
    connection: int


@dataclass(frozen=True, slots=True)
class Replace:
    """Close a relayed connection as soon as nothing uses it; `Upgrades.gone` follows."""

    peer: PeerId
    circuit: int
    by: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Close a direct connection that does not answer, at once: it is preferred for new streams."""

    peer: PeerId
    connection: int
    text: str


Command: TypeAlias = Try | Stop | Prove | Replace | Drop | Event


@dataclass(slots=True)
class _Circuit:
    relay: PeerId
    inbound: bool
    since: float
    seen_at: str
    rtt: float | None = None


@dataclass(slots=True)
class _Peer:
    peer: PeerId
    state: State = State.RELAYED
    circuits: dict[int, _Circuit] = field(default_factory=dict)
    direct: dict[int, tuple[float, Path]] = field(default_factory=dict)
    circuit: int = 0  # that the state is about
    since: float = 0.0  # of the state
    began: float | None = None  # the last punch, or what else led to a direct connection
    until: float = math.inf  # when the state is looked at again
    using: int = 0  # the direct connection that is proven, or being
    proven_at: float | None = None
    lasted: bool = False
    intent: Intent | None = None  # theirs
    claimed: tuple[str, ...] = ()
    dialed: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class UpgradeStatus:
    """How it stands with one peer.

    Attributes:
        state: see `State`.
        seconds: for how long.
        wait: seconds until it is looked at again; infinite: not before something changes.
        theirs: what the peer has told of its NATs; ``None``: nothing.
        verdict: what the two NATs allow.
        cause, text: why it failed last, if it did; empty if not.
        successes: how often a direct connection with the peer was proven.
    """

    peer: PeerId
    state: State
    seconds: float
    wait: float
    theirs: NatFacts | None
    verdict: Verdict
    cause: str
    text: str
    successes: int


class Upgrades:
    """All of them.

    Args:
        config: the settings.
        strategy: makes the plans.
        memory: what came of it before; changed here.
    """

    def __init__(self, config: PunchConfig, strategy: ConnectionStrategy, memory: Memory) -> None:
        self._config = config
        self._strategy = strategy
        self._memory = memory
        self._peers: dict[PeerId, _Peer] = {}
        self._running: set[PeerId] = set()  # punching or answering
        self._queue: dict[PeerId, dict[PeerId, None]] = {}  # relay: peers, both in order
        self._ours = NatFacts()
        self._at: tuple[str, ...] = ()
        self._side = Side()

    def __len__(self) -> int:
        return len(self._peers)

    # What comes in

    def facts(self, ours: NatFacts, at: Sequence[str], now: float) -> list[Command]:
        """What is known of our own NATs, and our public addresses, as multiaddr texts. Whoever was left alone because
        of others is looked at again.
        """
        if ours == self._ours and tuple(at) == self._at:
            return []
        self._ours, self._at, self._side = ours, tuple(at), side(ours, at)
        out: list[Command] = []
        for each in [*self._peers.values()]:
            if each.state is State.COOLING and not self._recall(each, now).wait(now):
                out += self._decide(each, now)
        return out

    def circuit_up(
        self,
        peer: PeerId,
        circuit: int,
        relay: PeerId,
        now: float,
        *,
        inbound: bool,
        seen_at: str = "",
        rtt: float | None = None,
        claimed: Iterable[str] = (),
    ) -> list[Command]:
        """A relayed connection is up.

        Args:
            circuit: its number.
            inbound: whether the peer made the circuit; then we invite.
            seen_at: where the relay sees the peer, as multiaddr text; empty: it did not say.
            rtt: of the connection in seconds, if it is known.
            claimed: where the peer says that it can be dialed, as far as that is known before it tells again.
        """
        record = self._peers.setdefault(peer, _Peer(peer))
        record.circuits[circuit] = _Circuit(relay, inbound, now, seen_at, rtt)
        record.claimed = self._believable(record, claimed)
        if record.state is State.STABLE:
            # Would it come by a relay if it still had the other way? Whoever started anew would not.
            return self._prove(record, record.using, now)
        if record.state in (State.RELAYED, State.COOLING):
            return self._decide(record, now)
        return []

    def measured(self, peer: PeerId, circuit: int, rtt: float) -> None:
        """The round trip of a relayed connection, in seconds."""
        record = self._peers.get(peer)
        if record is not None and circuit in record.circuits:
            record.circuits[circuit].rtt = rtt

    def claims(self, peer: PeerId, addresses: Iterable[str], now: float, *, punches: bool) -> list[Command]:
        """The peer has told about itself, on any connection.

        Args:
            addresses: where it says it can be dialed.
            punches: whether it says that it speaks DCUtR.
        """
        record = self._peers.get(peer)
        if record is None:
            return []
        record.claimed = self._believable(record, addresses)
        cause = self._recall(record, now).cause if record.state is State.COOLING else None
        if cause is Cause.UNSUPPORTED and punches:
            self._memory.forgive(peer)  # it had not known yet where it is, as go has not at first
            return self._decide(record, now)
        fresh = [each for each in record.claimed if each not in record.dialed][: MAX_DIALED - len(record.dialed)]
        circuit = _of_ours(record)
        tries = record.state is State.PUNCHING or cause in _STILL_DIALED
        if not (fresh and tries) or circuit is None:
            return []
        plan = self._strategy.upgrade(self._relayed(record, circuit, now, claimed=fresh))
        record.dialed |= {*fresh}
        return [Try(peer, circuit, Plan(plan.of(Way.DIRECT), plan.verdict))]

    def told(self, peer: PeerId, circuit: int, intent: Intent, now: float) -> list[Command]:
        """A peer that we invited has told what it wants."""
        record = self._peers.get(peer)
        if record is None or circuit not in record.circuits:
            return []
        record.intent = intent
        out: list[Command] = [told_event(peer, circuit, intent, by_us=False)]
        self._recall(record, now)
        if record.state is not State.PUNCHING or record.circuit != circuit:
            return out
        verdict = self._verdict(record, circuit, now)
        if not self._is_worth_it(record, verdict):
            stop = Stop(peer, verdict.reason)
            return [*out, stop, *self._abandon(record, "intent", Cause.HOPELESS, verdict.reason, now)]
        if intent.answer is not Answer.YES:
            later = intent.answer is Answer.LATER
            text = f"the peer says {intent.answer}" + (f": {intent.reason}" if intent.reason else "")
            cause = Cause.BUSY if later else Cause.DECLINED
            if intent.reason == Cause.HOPELESS:
                cause = Cause.HOPELESS
            return [*out, Stop(peer, text), *self._abandon(record, "intent", cause, text, now, at_least=intent.wait)]
        return out

    def asked(self, peer: PeerId, circuit: int, intent: Intent, now: float) -> tuple[Intent, list[Command]]:
        """A peer whom we called through a relay tells what it wants, beside its invitation.

        Returns:
            what to answer; and what to do besides.
        """
        record = self._peers.get(peer)
        if record is None or circuit not in record.circuits:
            return self.intent(Answer.NO, now, "gone"), []
        record.intent = intent
        out: list[Command] = [told_event(peer, circuit, intent, by_us=False)]
        answer = self._answer(record, circuit, intent, now, out)
        out.append(told_event(peer, circuit, answer, by_us=True))
        return answer, out

    def _answer(self, record: _Peer, circuit: int, intent: Intent, now: float, out: list[Command]) -> Intent:
        entry = self._recall(record, now)
        if not self._config.enabled:
            return self.intent(Answer.NO, now, "disabled")
        if record.direct:
            return self.intent(Answer.LATER, now, "direct", wait=BUSY_WAIT)
        if record.state is State.PUNCHING:
            return self.intent(Answer.YES, now)  # each side made a circuit; DCUtR knows who comes first
        if intent.answer is not Answer.YES:
            return self.intent(Answer.NO, now, intent.reason)
        verdict = self._verdict(record, circuit, now)
        if not self._is_worth_it(record, verdict):
            out += self._abandon(record, "intent", Cause.HOPELESS, verdict.reason, now, circuit=circuit)
            return self.intent(Answer.NO, now, Cause.HOPELESS)
        if (wait := entry.wait(now)) and entry.cause in _OF_THE_WAY:
            return self.intent(Answer.LATER, now, entry.cause or "", wait=wait)
        quiet, wait = self._strategy.leave_alone(self._relayed(record, circuit, now))
        if quiet:
            out.append(_decided(record.peer, circuit, "leave", "quiet", verdict.chance, quiet, wait))
            return self.intent(Answer.LATER, now, "quiet", wait=wait)
        if len(self._running) >= self._config.max_concurrent and record.peer not in self._running:
            return self.intent(Answer.LATER, now, Cause.BUSY, wait=BUSY_WAIT)
        self._enter(record, State.ANSWERING, now, circuit, until=now + ANSWERING_TIMEOUT)
        out.append(_decided(record.peer, circuit, "punch", "invited", verdict.chance, verdict.reason, 0.0))
        return self.intent(Answer.YES, now)

    def intent(self, answer: Answer, now: float, reason: str = "", *, wait: float = 0.0) -> Intent:
        """What we tell a peer."""
        return Intent(
            answer,
            str(reason),
            wait,
            nat=self._ours,
            shares_local=self._config.share_local,
            predicts=self._config.predict,
            birthday=self._config.birthday,
        )

    def theirs(self, peer: PeerId) -> Intent | None:
        """What a peer has told last on its present connections; ``None``: nothing."""
        record = self._peers.get(peer)
        return record.intent if record is not None else None

    def tries_many(self, peer: PeerId, attempt: int) -> bool:
        """Whether many ports are to be tried at once: nothing else can work, or a guess has failed, and both sides have
        agreed to it.

        Args:
            attempt: counts from 1.
        """
        intent = self.theirs(peer)
        if intent is None or not (self._config.birthday and intent.birthday):
            return False
        verdict = possible(self._ours, intent.nat)
        if verdict.chance is not Chance.PREDICTION or verdict.family is None or attempt <= 1:
            return verdict.chance is Chance.BIRTHDAY
        nats = (facts.of(verdict.family) for facts in (self._ours, intent.nat))
        return any(may_draw(nat) for nat in nats if nat is not None)

    def is_replaced(self, peer: PeerId, by: int) -> bool:
        """Whether a direct connection is still proven, and so the relayed ones are replaceable."""
        record = self._peers.get(peer)
        return record is not None and record.state is State.STABLE and record.using == by

    def attempt_failed(self, peer: PeerId, attempt: int, text: str, now: float) -> list[Command]:
        """One attempt of a punch of ours made no connection; more follow, unless they are not worth it.

        Args:
            attempt: counts from 1.
            text: more words.
        """
        record = self._peers.get(peer)
        if record is None or record.state is not State.PUNCHING or record.circuit not in record.circuits:
            return []
        if attempt < self._verdict(record, record.circuit, now).attempts:
            return []
        stop = Stop(peer, "a second attempt would do no better")
        return [stop, *self._abandon(record, "punch", Cause.UNREACHED, text, now)]

    def ended(self, peer: PeerId, cause: Cause | None, text: str, now: float) -> list[Command]:
        """A punch with a peer is over, whoever invited.

        Args:
            cause: why it made no connection; ``None``: it did.
            text: more words.
        """
        record = self._peers.get(peer)
        if record is None or cause is None or record.direct:
            return []
        if record.state not in (State.PUNCHING, State.ANSWERING, State.RELAYED, State.COOLING):
            return []
        if record.state is State.COOLING and now < record.until:
            return []  # decided already
        return self._abandon(record, "punch", cause, text, now)

    def direct_up(self, peer: PeerId, connection: int, path: Path, now: float) -> list[Command]:
        """A connection that no relay carries is up, however it came to be."""
        record = self._peers.get(peer)
        if record is None:
            return []  # nothing relayed is to be replaced
        record.direct[connection] = now, path
        if record.state in (State.PROVING, State.STABLE):
            return []
        out: list[Command] = []
        if record.state in (State.PUNCHING, State.ANSWERING) and path.relay is None:
            out.append(Stop(peer, "there is a direct connection"))
        return [*out, *self._prove(record, connection, now)]

    def proven(self, peer: PeerId, connection: int, rtt: float, now: float) -> list[Command]:
        """A direct connection has answered for long enough.

        Args:
            rtt: its round trip in seconds.
        """
        record = self._peers.get(peer)
        if record is None or record.state is not State.PROVING or record.using != connection:
            return []
        since, path = record.direct[connection]
        if record.proven_at is None:
            record.proven_at = now
            took = since - record.began if record.began is not None else 0.0
            self._memory.succeeded(peer, now, seconds=took, rtt=rtt)
        self._enter(record, State.STABLE, now, record.circuit, until=record.proven_at + self._config.steady)
        rtts = [each.rtt for each in record.circuits.values() if each.rtt is not None]
        told = PathProven(
            peer=peer,
            connection=connection,
            path=path,
            replaces=tuple(record.circuits),
            rtt=rtt,
            relayed_rtt=min(rtts, default=None),
            seconds=now - since,
        )
        return [told, *(Replace(peer, circuit, connection) for circuit in record.circuits)]

    def unproven(self, peer: PeerId, connection: int, text: str, now: float) -> list[Command]:
        """A direct connection did not answer."""
        record = self._peers.get(peer)
        if record is None or record.state is not State.PROVING or record.using != connection:
            return []
        del record.direct[connection]
        return [Drop(peer, connection, text), *self._lost(record, text, now, broken=True)]

    def gone(
        self, peer: PeerId, connection: int, now: float, *, broken: bool, text: str = "", silence: float = 0.0
    ) -> list[Command]:
        """A connection with a peer has ended, relayed or not.

        Args:
            broken: whether the way broke, and neither side closed it.
            text: why, in words.
            silence: seconds without a byte before that.
        """
        record = self._peers.get(peer)
        if record is None:
            return []
        out: list[Command] = []
        if record.circuits.pop(connection, None) is not None:
            if record.state is State.STABLE:
                since = now - (now if record.proven_at is None else record.proven_at)
                out.append(CircuitReplaced(peer=peer, connection=connection, by=record.using, seconds=since))
            elif record.circuit == connection and record.state in (State.PUNCHING, State.ANSWERING, State.QUEUED):
                if record.state is not State.QUEUED:
                    out.append(Stop(peer, "the circuit has ended"))
                out += self._abandon(record, "punch", Cause.INTERRUPTED, text, now)
        elif record.direct.pop(connection, None) is not None and record.using == connection:
            if broken and silence:
                self._memory.mapping_lost(peer, silence)
            out += self._lost(record, text, now, broken=broken)
        if not record.circuits and not record.direct:
            self._leave(record)
            del self._peers[peer]
            out += self._next(now)
        return out

    def next_deadline(self) -> float:
        """When to call `on_timeout`."""
        return min((each.until for each in self._peers.values()), default=math.inf)

    def on_timeout(self, now: float) -> list[Command]:
        """Do what is due."""
        out: list[Command] = []
        for record in [each for each in self._peers.values() if each.until <= now]:
            match record.state:
                case State.STABLE:
                    record.lasted, record.until = True, math.inf
                    self._memory.forgive(record.peer)
                case State.ANSWERING:
                    text = f"the peer did nothing for {duration(ANSWERING_TIMEOUT)}"
                    out += [Stop(record.peer, text), *self._abandon(record, "punch", Cause.INTERRUPTED, text, now)]
                case State.PUNCHING:
                    text = f"it took more than {duration(PUNCHING_TIMEOUT)}"
                    out += [Stop(record.peer, text), *self._abandon(record, "punch", Cause.INTERRUPTED, text, now)]
                case _:
                    record.intent = None  # of a while ago; it is told anew
                    out += self._decide(record, now)
        return out

    # Deciding

    def _decide(self, record: _Peer, now: float) -> list[Command]:
        """What is done about a relayed connection with which nothing is under way."""
        peer, circuit = record.peer, _of_ours(record)
        self._enter(record, State.RELAYED, now, circuit or 0)
        if circuit is None:
            if not record.circuits:
                return []
            first = next(iter(record.circuits))
            return [_decided(peer, first, "wait", "invited", Chance.UNKNOWN, "the other side invites", 0.0)]
        if not self._config.enabled:
            return [_decided(peer, circuit, "leave", "disabled", Chance.UNKNOWN, "punch.enabled is off", 0.0)]
        entry = self._recall(record, now)
        verdict = self._verdict(record, circuit, now)
        if wait := entry.wait(now):
            self._enter(record, State.COOLING, now, circuit, until=entry.until)
            return [_decided(peer, circuit, "wait", entry.cause or "", verdict.chance, entry.text, wait)]
        quiet, wait = self._strategy.leave_alone(self._relayed(record, circuit, now))
        if quiet:
            record.until = now + wait
            return [_decided(peer, circuit, "leave", "quiet", verdict.chance, quiet, wait)]
        if not self._is_worth_it(record, verdict):
            return self._abandon(record, "intent", Cause.HOPELESS, verdict.reason, now)
        if len(self._running) >= self._config.max_concurrent:
            return self._wait_in_line(record, circuit, verdict, now)
        return self._begin(record, circuit, now)

    def _begin(self, record: _Peer, circuit: int, now: float) -> list[Command]:
        plan = self._strategy.upgrade(self._relayed(record, circuit, now))
        assert plan.verdict is not None
        record.dialed = {*record.claimed}
        self._enter(record, State.PUNCHING, now, circuit, until=now + PUNCHING_TIMEOUT)
        verdict = plan.verdict
        return [
            _decided(record.peer, circuit, "punch", "inviting", verdict.chance, verdict.reason, 0.0),
            Try(record.peer, circuit, plan),
        ]

    def _wait_in_line(self, record: _Peer, circuit: int, verdict: Verdict, now: float) -> list[Command]:
        out: list[Command] = []
        relay = record.circuits[circuit].relay
        if sum(map(len, self._queue.values())) >= MAX_QUEUED:
            longest = max(self._queue, key=lambda each: len(self._queue[each]))
            last = record if longest == relay else self._peers[next(reversed(self._queue[longest]))]
            out += self._abandon(last, "intent", Cause.BUSY, f"{MAX_QUEUED} others wait", now)
            if last is record:
                return out
        self._enter(record, State.QUEUED, now, circuit)
        self._queue.setdefault(relay, {})[record.peer] = None
        text = f"{len(self._running)} others are being punched"
        return [*out, _decided(record.peer, circuit, "queue", Cause.BUSY, verdict.chance, text, 0.0)]

    def _next(self, now: float) -> list[Command]:
        """Whose turn it is: the relays take turns, and of one relay who came first."""
        out: list[Command] = []
        while self._queue and len(self._running) < self._config.max_concurrent:
            relay = next(iter(self._queue))
            line = self._queue.pop(relay)
            peer = next(iter(line))
            del line[peer]
            if line:
                self._queue[relay] = line
            record = self._peers[peer]
            out += self._begin(record, record.circuit, now)
        return out

    def _prove(self, record: _Peer, connection: int, now: float) -> list[Command]:
        if connection != record.using:
            record.proven_at, record.lasted = None, False
        record.using = connection
        if record.began is None or record.state not in (State.PUNCHING, State.ANSWERING):
            record.began = now
        self._enter(record, State.PROVING, now, record.circuit)
        return [Prove(record.peer, connection), *self._next(now)]

    def _lost(self, record: _Peer, text: str, now: float, *, broken: bool) -> list[Command]:
        """The direct connection that was used, or was to be, is gone."""
        stage = "proving" if record.proven_at is None else "stable"
        early = not record.lasted
        record.using, record.proven_at, record.lasted = 0, None, False
        if record.direct:
            return self._prove(record, next(iter(record.direct)), now)
        if not early:
            return self._decide(record, now)
        # The peer may have started anew. If it does so again and again, it is something on the way that ends it. One of
        # another project (it told no intent) that is still here has ended what it does not use, and would again.
        entry = self._recall(record, now)
        again = entry.passing >= MAX_ENDED or entry.streak > 0
        unused = record.intent is None and bool(record.circuits)
        unstable = broken or again or unused
        return self._abandon(record, stage, Cause.UNSTABLE if unstable else Cause.INTERRUPTED, text, now)

    def _abandon(
        self, record: _Peer, stage: str, cause: Cause, text: str, now: float, *, at_least: float = 0.0, circuit: int = 0
    ) -> list[Command]:
        wait = self._memory.failed(record.peer, cause, text, now, at_least=at_least)
        began = now if record.began is None else record.began
        at = circuit or record.circuit or next(iter(record.circuits), 0)
        until = now + wait if _of_ours(record) is not None else math.inf
        self._enter(record, State.COOLING, now, at, until=until)
        told = UpgradeAbandoned(
            peer=record.peer, connection=at, stage=stage, reason=cause, text=text, wait=wait, seconds=now - began
        )
        record.began = None
        return [told, *self._next(now)]

    def _enter(self, record: _Peer, state: State, now: float, circuit: int, *, until: float = math.inf) -> None:
        self._leave(record)
        record.state, record.circuit, record.since, record.until = state, circuit, now, until
        if state in (State.PUNCHING, State.ANSWERING):
            self._running.add(record.peer)
            record.began = now

    def _leave(self, record: _Peer) -> None:
        """It is neither running nor waiting any more."""
        self._running.discard(record.peer)
        for relay, line in [*self._queue.items()]:
            if record.peer in line:
                del line[record.peer]
            if not line:
                del self._queue[relay]

    def _recall(self, record: _Peer, now: float) -> Entry:
        """What is remembered of a peer, given what is known of both sides now."""
        intent = record.intent
        seen = (each.seen_at for each in record.circuits.values() if each.seen_at)
        theirs = side(intent.nat if intent is not None else None, seen)
        return self._memory.recall(record.peer, self._side, theirs, now)

    def _relayed(self, record: _Peer, circuit: int, now: float, *, claimed: Sequence[str] | None = None) -> Relayed:
        at = record.circuits[circuit]
        intent = record.intent
        return Relayed(
            ours=self._ours,
            theirs=intent.nat if intent is not None else None,
            claimed=tuple(record.claimed if claimed is None else claimed),
            rtt=at.rtt,
            direct_rtt=self._recall(record, now).rtt,
            seconds=now - at.since,
            predict=self._config.predict and (intent is None or intent.predicts),
            birthday=self._config.birthday and intent is not None and intent.birthday,
        )

    def _verdict(self, record: _Peer, circuit: int, now: float) -> Verdict:
        verdict = self._strategy.upgrade(self._relayed(record, circuit, now)).verdict
        assert verdict is not None
        return verdict

    def _is_worth_it(self, record: _Peer, verdict: Verdict) -> bool:
        intent = record.intent
        return verdict.worth_trying(
            predict=self._config.predict and (intent is None or intent.predicts),
            birthday=self._config.birthday and intent is not None and intent.birthday,
        )

    def _believable(self, record: _Peer, addresses: Iterable[str]) -> tuple[str, ...]:
        """Of what a peer claims, where a relay has seen it, too: nobody may send us to somebody else, nor to a
        well-known port of who is behind the same NAT."""
        seen = {addr.subnet_key(each.seen_at) for each in record.circuits.values() if each.seen_at}
        found = [
            each
            for each in addresses
            if not addr.is_relayed(each)
            and (where := addr.ip_port(each)) is not None
            and where[1] >= addr.LEAST_PORT
            and addr.is_public(each)
            and addr.subnet_key(each) in seen
        ]
        return tuple(found[:MAX_CLAIMED])

    # Telling

    def status(self, now: float) -> tuple[UpgradeStatus, ...]:
        """How it stands with every peer that is, or was, reached through a relay."""
        return tuple(self._status(each, now) for each in self._peers.values())

    def _status(self, record: _Peer, now: float) -> UpgradeStatus:
        entry = self._recall(record, now)
        theirs = record.intent.nat if record.intent is not None else None
        return UpgradeStatus(
            peer=record.peer,
            state=record.state,
            seconds=now - record.since,
            wait=record.until - now,
            theirs=theirs,
            verdict=possible(self._ours, theirs),
            cause=entry.cause or "",
            text=entry.text,
            successes=entry.successes,
        )


def _of_ours(record: _Peer) -> int | None:
    """The circuit on which we invite: the newest that the peer made."""
    return next((number for number, each in reversed(record.circuits.items()) if each.inbound), None)


def _decided(
    peer: PeerId, circuit: int, decision: str, reason: str, chance: Chance, text: str, wait: float
) -> UpgradeDecided:
    return UpgradeDecided(
        peer=peer, connection=circuit, decision=decision, reason=str(reason), chance=str(chance), text=text, wait=wait
    )


def told_event(peer: PeerId, circuit: int, intent: Intent, *, by_us: bool) -> IntentTold:
    """That one side has told the other."""
    nats: Iterator[tuple[int, str]] = (
        (family, in_words(nat)) for family in (4, 6) if (nat := intent.nat.of(family)) is not None
    )
    return IntentTold(
        peer=peer,
        connection=circuit,
        by_us=by_us,
        answer=str(intent.answer),
        reason=intent.reason,
        wait=intent.wait,
        nat=dict(nats),
    )
