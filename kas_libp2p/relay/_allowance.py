"""How many circuits a relay gives to one who asks, and what a session can carry over them for ever. No I/O.

The reference's relay gives one peer `BURST` circuits at once and one more every `INTERVAL`, of two minutes or 128 KiB
each. It counts who asks, so both ends of a session have such an allowance on each relay on which the other one has a
place.

Its counter adds what is due only when somebody asks, and forgets the part of an interval that has passed beyond. So
between two requests of ours there is one more for certain if an interval lies between them, and from there on one for
every two: others may have asked in the worst instants. What is counted here is never more than what is there, as long
as nobody else behind our IP takes part in it: all peers of one IP get 60 at once and one more per minute.

Source: rust-libp2p, ``protocols/relay`` (rate limiter, default configuration).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kas_libp2p.config import KIB, MIB
from kas_libp2p.metadata import TAIL, PeerId
from kas_libp2p.units import plural, rate, seconds, size

BURST, INTERVAL = 30, 120.0
"""Circuits that the reference gives a peer at once, and seconds for each one more."""
KEEP = 6
"""Circuits of one relay that sessions leave for calls."""
COST = 3000
"""Bytes that a circuit takes itself, measured between two nodes of ours, both directions: 570 for Noise and Yamux, 1800
for identify, 480 for two minutes of keepalive."""
OVERLAP = 20.0
"""Seconds that a circuit has left when the next one is there."""


@dataclass(slots=True)
class _Count:
    """What is left on one relay, as of a request of ours at `at`."""

    left: int
    at: float


class Allowances:
    """What is left of them, on all relays that we have asked."""

    def __init__(self) -> None:
        self._counts: dict[PeerId, _Count] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def asked(self, relay: PeerId, now: float) -> None:
        """We have asked a relay for a circuit, whatever comes of it."""
        for each in [each for each in self._counts if self.left(each, now) >= BURST]:
            del self._counts[each]
        count = self._counts.setdefault(relay, _Count(BURST, now))
        if now - count.at >= INTERVAL:
            count.left, count.at = self.left(relay, now), now
        count.left = max(0, count.left - 1)

    def refused(self, relay: PeerId, now: float) -> None:
        """It says that there is nothing left."""
        self._counts[relay] = _Count(0, now)

    def left(self, relay: PeerId, now: float) -> int:
        """Circuits that it would give now."""
        count = self._counts.get(relay)
        if count is None:
            return BURST
        passed = now - count.at
        more = 0 if passed < INTERVAL else 1 + int((passed - INTERVAL) / (2 * INTERVAL))
        return min(BURST, count.left + more)

    def spare(self, relay: PeerId, now: float) -> int:
        """Of them, those that sessions may take."""
        return max(0, self.left(relay, now) - KEEP)

    def waited(self, relay: PeerId, now: float) -> float:
        """Seconds since what came back was counted last. From `INTERVAL` on one costs nothing: another one has come."""
        count = self._counts.get(relay)
        return math.inf if count is None else now - count.at


@dataclass(frozen=True, slots=True)
class Supply:
    """Where a session can have circuits.

    Attributes:
        max_bytes, max_seconds: of one; ``None``: no limit.
        sources: which of its two ends can ask there: 1 or 2.
        burst: circuits that each of them may take at once, beside one more every `INTERVAL`; 0 where that is left
            alone.
    """

    max_bytes: int | None
    max_seconds: float | None
    sources: int = 2
    burst: int = BURST - KEEP


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a session can carry over some circuits, both directions together.

    Attributes:
        sustained: bytes per second for ever; infinite without limits; 0 if not even an idle session would live.
        burst: bytes beyond that, until what the relays give at once is used up.
        idle: seconds for which an idle session lives.
        text: in words.
    """

    sustained: float
    burst: float
    idle: float
    text: str

    def lasts(self, per_second: float) -> float:
        """Seconds for which it carries so much."""
        if per_second <= self.sustained:
            return math.inf
        return min(self.idle, self.burst / (per_second - self.sustained))


def ceiling(supplies: Iterable[Supply]) -> Ceiling:
    """What relays let a session carry.

    Args:
        supplies: one per relay.
    """
    supplies = tuple(supplies)
    sustained = burst = needed = at_once = 0.0  # the last two are circuits, per second or in all
    for each in supplies:
        net = math.inf if each.max_bytes is None else max(0.0, each.max_bytes * (1 - TAIL) - COST)
        if each.max_bytes is None and each.max_seconds is None:
            return Ceiling(math.inf, math.inf, math.inf, "a relay without limits carries whatever comes")
        sustained += net * each.sources / INTERVAL
        burst += net * each.sources * each.burst if each.burst else 0.0
        at_once += each.sources * each.burst
        lasts = each.max_seconds - min(OVERLAP, each.max_seconds / 2) if each.max_seconds is not None else math.inf
        needed = max(needed, 1 / lasts)
    sources = sum(each.sources for each in supplies)
    turn = sources / needed if needed else math.inf
    # One end on one relay asks more often than one comes back, and the relay counts when it asks.
    given = sources / (INTERVAL if turn >= INTERVAL else turn * math.ceil(INTERVAL / turn))
    idle = math.inf if supplies and needed <= given else at_once / (needed - given) if supplies else 0.0
    if idle < math.inf:
        sustained = 0.0
    return Ceiling(sustained, burst, idle, _in_words(supplies, sustained, burst, idle))


def _in_words(supplies: tuple[Supply, ...], sustained: float, burst: float, idle: float) -> str:
    if not supplies:
        return "no relay is known through which another circuit could be made"
    kinds = Counter((each.max_bytes, each.max_seconds) for each in supplies)
    who = " and ".join(f"{plural(count, 'relay')} with {_limits(*kind)} circuits" for kind, count in kinds.items())
    verb = "carries" if len(supplies) == 1 else "carry"
    if idle < math.inf:
        return f"{who} {verb} a session for {seconds(idle)} at most: there are too few circuits for ever"
    if sustained == math.inf:
        return f"{who} {verb} whatever comes, one circuit after the other"
    text = f"{who} {verb} {rate(sustained)} for ever"
    return f"{text}, {rate(2 * sustained)} for the first {seconds(burst / sustained)}" if burst else text


def _limits(max_bytes: int | None, max_seconds: float | None) -> str:
    found = [] if max_bytes is None else [f"{max_bytes // KIB} KiB" if max_bytes < MIB else size(max_bytes)]
    if max_seconds is not None:
        found.append(seconds(max_seconds))
    return " / ".join(found)
