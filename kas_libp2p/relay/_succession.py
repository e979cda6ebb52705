"""The next circuit of a session, before its relay ends the present one. No I/O.

A session (`kas_libp2p.session`) moves to the next circuit as soon as that is there, so it lives on circuits of two
minutes or 128 KiB, too. What relays give is the scarce thing then.

Who
    Both ends can ask: each on the relays where the other one has a place, and each within what it has left there
    (`kas_libp2p.relay._allowance`). They take turns without a word. Each turn has its own margin (`LEADS`), and who has
    it acts if nobody has before: first the one that did not ask for the present circuit, if it has one that costs
    nothing in the long run; then, if it has, the one that did; and last both, with what relays give at once.

When
    So many seconds before its end (of hours: minutes), or before its bytes are used up at the present rate. What costs
    nothing is taken early, the rest late.

Through which relay
    One whose circuits last, else by turns: where one comes back that would be lost otherwise, and most is left.

Whom it concerns
    Who gives two minutes or 128 KiB has not thought of a live Kaspa node. So of relays that are not of this project no
    more is taken than what comes back, one such circuit in two minutes, unless the operator of this node says that they
    may be used (``session.small_circuits``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from kas_libp2p.config import MIB
from kas_libp2p.metadata import TAIL, CircuitLimits, PeerId
from kas_libp2p.relay._allowance import BURST, INTERVAL, KEEP, Allowances, Ceiling, Supply, ceiling
from kas_libp2p.relay._renewal import CHECK, LEAST_LOOK, MOST_TIME, PART_OF_TIME, PAUSE, Due, Line

LEADS = (20.0, 16.0, 12.0, 8.0)
"""Seconds that are left of a circuit, by turn. Between two of them a dial is through: five round trips of 300 ms, and a
lost packet."""
LATER = 0.125
"""Part of the first turn's margin by which each following one is shorter, where circuits last for hours."""
MOST_OF_TIME = 0.5
"""Part of its time that is left at the most, so that a circuit of seconds is used as well."""
LEADS_OF_BYTES = (20.0, 16.0, 3.0, 2.0)
"""Seconds for which its bytes last, by turn. What costs nothing is taken as soon as it can be: it is lost otherwise."""
MOST_OF_BYTES = (0.75, 0.5, 0.375, 0.25)
"""Part of its bytes that are left at the most, by turn, so that turns don't fall together at high rates."""
SMALL_BYTES, SMALL_TIME = MIB, 300.0
"""Bytes, and seconds: a circuit that has no more of either is small. A live node spends it within minutes."""
SMALL_PAUSE, SMALL_CHECK = 3.0, 1.0
"""Seconds between two tries for one peer, and between two looks, where circuits are small."""
AVOID = 60.0
"""Seconds for which a relay comes last that made none."""
RATE_OVER = 10.0
"""Seconds over which it is averaged how fast a session uses circuits up."""
MAX_KNOWN = 256
"""Relays of which is remembered what their circuits are like."""


@dataclass(frozen=True, slots=True)
class Way:
    """A relay through which circuits with a peer can be made.

    Attributes:
        relay: which.
        calls: whether we can ask for them: the peer has a place there.
        called: whether the peer can: we have one.
        foreign: whether the relay is not of this project.
        limits: what it told us of circuits to us; ``None``: nothing.
    """

    relay: PeerId
    calls: bool = True
    called: bool = False
    foreign: bool = False
    limits: CircuitLimits | None = None


Ways = Callable[[PeerId], Sequence[Way]]
"""All of them with a peer."""


@dataclass(slots=True)
class _Use:
    """How fast the session with a peer uses circuits up.

    Attributes:
        number, at, left: of its connection, at the last look: which, when, and the bytes that were left.
        rate: bytes per second.
    """

    number: int
    at: float
    left: int
    rate: float = 0.0


class _Price(NamedTuple):
    """What a circuit through a relay costs; the smaller the better.

    Attributes:
        unusable: it may not be had now.
        avoided: the last one failed.
        small: it is a small one.
        taken: it is taken of what is given at once; else it costs nothing in the long run.
        spare: what is left there, negative.
        waited: seconds since it was used last, negative.
    """

    unusable: bool
    avoided: bool
    small: bool
    taken: bool
    spare: int
    waited: float


def is_small(limits: CircuitLimits) -> bool:
    """Whether a live node spends such a circuit within minutes."""
    by_bytes = limits.max_bytes is not None and limits.max_bytes <= SMALL_BYTES
    return by_bytes or (limits.max_seconds is not None and limits.max_seconds <= SMALL_TIME)


def nears_end(limits: CircuitLimits | None, turn: int = 0, rate: float = 0.0) -> str:
    """Why a circuit with a session is to be followed by another one, in words; empty if it is not.

    Args:
        limits: of the circuit; ``None`` if the way is direct.
        turn: index into `LEADS`.
        rate: bytes per second that go by it.
    """
    if limits is None:
        return ""
    return limits.scarce(lambda most: _lead(most, turn), lambda most: TAIL * most + _lead_of_bytes(most, turn, rate))


def _lasts(limits: CircuitLimits | None, rate: float) -> bool:
    """Whether a session could go on by it for a while."""
    if limits is None:
        return True
    return not nears_end(replace(limits, bytes_left=None)) and not nears_end(limits, len(LEADS) - 1, rate)


def _lead(max_seconds: float, turn: int) -> float:
    of_long = min(PART_OF_TIME * max_seconds, MOST_TIME) * (1 - turn * LATER)
    return min(max(LEADS[turn], of_long), MOST_OF_TIME * max_seconds)


def _lead_of_bytes(max_bytes: int, turn: int, rate: float) -> float:
    return min(rate * LEADS_OF_BYTES[turn], MOST_OF_BYTES[turn] * max_bytes)


class Succession:
    """Decides over time for all sessions.

    Args:
        small_circuits: whether small circuits of relays that are not of this project may be used as fast as they are
            given.

    Attributes:
        look_at: when to call `due` again, if nothing changes before; on the clock that ``now`` comes from.
        over: numbers of connections on small circuits that a session has left and that are about to end: they can be
            closed, so that their relays have room. As of the last call of `due`.
    """

    def __init__(self, *, small_circuits: bool) -> None:
        self.look_at = float("inf")
        self.over: list[int] = []
        self._consent = small_circuits
        self._allowances = Allowances()
        self._tried: dict[PeerId, float] = {}
        self._uses: dict[PeerId, _Use] = {}
        self._short: dict[PeerId, float] = {}
        self._known: dict[PeerId, CircuitLimits] = {}
        self._failed: dict[PeerId, float] = {}
        self._carried: set[int] = set()

    # What is told

    def asked(self, relay: PeerId, now: float) -> None:
        """We have asked a relay for a circuit, for whatever reason."""
        self._allowances.asked(relay, now)

    def failed(self, relay: PeerId, now: float, *, used_up: bool) -> None:
        """A relay made no circuit for a session.

        Args:
            used_up: whether it says that a limit was reached.
        """
        self._failed[relay] = now
        if used_up:
            self._allowances.refused(relay, now)

    # What follows

    def due(self, lines: Sequence[Line], now: float, ways: Ways) -> list[Due]:
        """What is to be followed by another one now. Each of them counts as a try.

        Args:
            lines: all connections.
            ways: asked about peers with a session on a circuit.
        """
        with_session = [line for line in lines if line.session and line.relay is not None]
        self._note(lines, with_session, now)
        self.look_at = float("inf")
        for line in lines:
            if line.limits is not None and not line.session:
                self._look_within(now, _until_needed(line, line.limits))
        return [due for line in with_session if (due := self._decide(line, lines, now, ways)) is not None]

    def _note(self, lines: Sequence[Line], with_session: Sequence[Line], now: float) -> None:
        for line in with_session:
            if line.relay is not None and line.limits is not None:
                self._known.pop(line.relay, None)
                self._known[line.relay] = line.limits
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]
        peers = {line.peer for line in with_session}
        self._tried = {peer: at for peer, at in self._tried.items() if peer in peers}
        self._uses = {peer: use for peer, use in self._uses.items() if peer in peers}
        self._short = {peer: until for peer, until in self._short.items() if peer in peers}
        self._failed = {relay: at for relay, at in self._failed.items() if now - at < AVOID}
        self._carried &= {line.number for line in lines}
        self._carried.update(line.number for line in with_session)
        self.over = [line.number for line in lines if line.number in self._carried and _is_over(line)]

    def _decide(self, line: Line, lines: Sequence[Line], now: float, ways: Ways) -> Due | None:
        limits, relay = line.limits, line.relay
        assert limits is not None
        assert relay is not None
        rate = self._rate(line, limits, now)
        if not nears_end(limits, 0, rate):
            self._short.pop(line.peer, None)
        self._look_within(now, SMALL_CHECK if is_small(limits) else CHECK)
        others = [each for each in lines if each.peer == line.peer and each.number != line.number]
        if any(_lasts(each.limits, rate) for each in others):
            return None
        calls = [way for way in ways(line.peer) if way.calls]
        if line.ours and all(way.relay != relay for way in calls):
            calls.append(Way(relay, limits=limits))
        if not calls:
            return None  # the peer can, as it did
        price, way = min(((self._price(each, now), each) for each in calls), key=lambda each: each[0])
        reason = nears_end(limits, 2 * price.taken + line.ours, rate)
        if not reason or now - self._tried.get(line.peer, -PAUSE) < (SMALL_PAUSE if is_small(limits) else PAUSE):
            return None
        if price.unusable:
            self._short[line.peer] = now + INTERVAL - max(self._allowances.waited(each.relay, now) for each in calls)
            return None
        self._tried[line.peer] = now
        return Due(line, reason, way.relay)

    def _price(self, way: Way, now: float) -> _Price:
        limits = way.limits or self._known.get(way.relay)
        small = is_small(limits) if limits is not None else way.foreign
        allowances = self._allowances
        spare, waited = allowances.spare(way.relay, now), allowances.waited(way.relay, now)
        free = waited >= INTERVAL
        reserved = small and way.foreign and not self._consent
        unusable = not free and (reserved or not spare)
        return _Price(unusable, way.relay in self._failed, small, not free, -spare, -waited)

    def _rate(self, line: Line, limits: CircuitLimits, now: float) -> float:
        left = limits.bytes_left
        if left is None:
            return 0.0
        use = self._uses.get(line.peer)
        if use is None or use.number != line.number:
            use = self._uses[line.peer] = _Use(line.number, now, left, use.rate if use is not None else 0.0)
        recent = 0.0
        if (passed := now - use.at) >= LEAST_LOOK:
            recent = (use.left - left) / passed
            use.rate += min(1.0, passed / RATE_OVER) * (recent - use.rate)
            use.at, use.left = now, left
        return max(recent, use.rate)

    def _look_within(self, now: float, after: float) -> None:
        self.look_at = min(self.look_at, now + max(after, LEAST_LOOK))

    # Telling

    def shortage(self, peer: PeerId, now: float) -> float:
        """Seconds until the session with a peer can have another circuit; 0 if it is not short of them."""
        return max(0.0, self._short.get(peer, now) - now)

    def ceiling(self, ways: Sequence[Way]) -> Ceiling:
        """What a session can carry over circuits, given all ways to make them."""
        return ceiling(supply for way in ways if (supply := self._supply(way)) is not None)

    def _supply(self, way: Way) -> Supply | None:
        limits = way.limits or self._known.get(way.relay)
        sources = way.calls + way.called
        if limits is None or not sources:
            return None
        reserved = way.foreign and is_small(limits) and not self._consent
        return Supply(limits.max_bytes, limits.max_seconds, sources, 0 if reserved else BURST - KEEP)


def _until_needed(line: Line, limits: CircuitLimits) -> float:
    """Seconds after which it is seen in time if a session goes by it then, of which nobody tells."""
    if is_small(limits):
        return SMALL_CHECK if line.busy else CHECK
    if limits.max_bytes is not None:
        return CHECK
    if limits.max_seconds is None or limits.seconds_left is None:
        return float("inf")
    return max(CHECK, limits.seconds_left - _lead(limits.max_seconds, 0))


def _is_over(line: Line) -> bool:
    if line.session or line.busy or line.limits is None:
        return False
    return is_small(line.limits) and bool(nears_end(line.limits))
