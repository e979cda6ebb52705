"""Sessions that live on the reference's circuits, two minutes or 128 KiB each: both ends, and relays that count so.

What a block costs was measured: two unmodified kaspads on simnet with ten empty blocks per second, through relays of
ours with these limits, the circuits themselves not counted. 512 bytes are messages, the rest is heads of all layers.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kas_libp2p.metadata import CircuitLimits, PathKind, PeerId
from kas_libp2p.relay._allowance import COST, Ceiling
from kas_libp2p.relay._renewal import Line
from kas_libp2p.relay._succession import Succession, Way
from kas_libp2p.session._policy import Candidate, PathPolicy

HOUR = 3600.0
MAX_BYTES, MAX_SECONDS = 128 * 1024, 120.0
BLOCK = 653
PING = 2 * (2 * 20 + 2 * 43)
DIAL, DENY = 1.0, 0.3
"""Seconds until a circuit is there, and until a relay has said no."""
MOVE = 0.3
"""Seconds until a session has moved."""


class RustLimiter:
    """Tokens of one kind of key, as rust-libp2p counts them (its text describes it, see `_allowance`)."""

    def __init__(self, burst: int, interval: float) -> None:
        self._burst, self._interval = burst, interval
        self._tokens: dict[str, int] = {}
        self._filled: dict[str, float] = {}

    def take(self, key: str, now: float) -> bool:
        for each in [each for each, at in self._filled.items() if now - at >= self._interval]:
            self._tokens[each] += int((now - self._filled[each]) / self._interval)
            self._filled[each] = now
            if self._tokens[each] >= self._burst:
                del self._tokens[each], self._filled[each]
        if key not in self._tokens:
            self._tokens[key], self._filled[key] = self._burst, now
        if self._tokens[key] == 0:
            return False
        self._tokens[key] -= 1
        return True


@dataclass
class Relay:
    """One, and whom it has refused."""

    name: PeerId
    peers: RustLimiter = field(default_factory=lambda: RustLimiter(30, 120.0))
    ips: RustLimiter = field(default_factory=lambda: RustLimiter(60, 60.0))
    asked: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def ask(self, peer: str, ip: str, now: float) -> bool:
        self.asked[peer] += 1
        if self.peers.take(peer, now) and self.ips.take(ip, now):
            return True
        self.refused += 1
        return False


@dataclass
class Circuit:
    number: int
    relay: PeerId
    by: int
    opened: float
    used: float = COST - 500.0

    def limits(self, now: float) -> CircuitLimits:
        left = max(0, int(MAX_BYTES - self.used - 4 * (now - self.opened)))
        return CircuitLimits(MAX_BYTES, MAX_SECONDS, left, max(0.0, MAX_SECONDS - (now - self.opened)))


class World:
    """Two ends, a session between them, and relays.

    Args:
        relays: how many; both ends have a place on each, unless `one_sided`.
        rate: bytes per second of the session.
        every: seconds between two times at which it says something.
        consent, foreign: see `Succession` and `Way`.
        one_sided: whether only the first end can ask.
    """

    def __init__(
        self,
        relays: int,
        rate: float,
        *,
        every: float = 1.0,
        consent: bool = True,
        foreign: bool = True,
        one_sided: bool = False,
        same_ip: bool = False,
    ) -> None:
        self.now = 0.0
        self.rate, self.every = rate, every
        self.relays = {PeerId(f"relay {n}"): Relay(PeerId(f"relay {n}")) for n in range(relays)}
        self.ends = [Succession(small_circuits=consent) for _ in range(2)]
        self.policy = PathPolicy()
        self.circuits: dict[int, Circuit] = {}
        self.current: int | None = None
        self.moves = 0
        self.missing = 0.0
        self.owed = 0.0
        self.most_at_once = 0
        self._ips = ("1.1.1.1", "1.1.1.1" if same_ip else "2.2.2.2")
        self._foreign, self._one_sided = foreign, one_sided
        self._numbers = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._moving = False
        self._ask(0, next(iter(self.relays)))
        self._talk()

    def at(self, after: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + after, next(self._numbers), do))

    def ways(self, end: int) -> Sequence[Way]:
        alone = self._one_sided
        return [Way(each, not alone or end == 0, not alone or end == 1, self._foreign) for each in self.relays]

    @property
    def ceiling(self) -> Ceiling:
        return self.ends[0].ceiling(self.ways(0))

    # Relays

    def _ask(self, end: int, relay: PeerId) -> None:
        self.ends[end].asked(relay, self.now)
        if self.relays[relay].ask(f"end {end}", self._ips[end], self.now):
            self.at(DIAL, lambda: self._opened(end, relay))
        else:
            self.at(DENY, lambda: self.ends[end].failed(relay, self.now, used_up=True))

    def _opened(self, end: int, relay: PeerId) -> None:
        circuit = Circuit(next(self._numbers), relay, end, self.now)
        self.circuits[circuit.number] = circuit
        self.most_at_once = max(self.most_at_once, len(self.circuits))
        self.at(MAX_SECONDS, lambda: self._end(circuit.number))

    def _end(self, number: int) -> None:
        if self.circuits.pop(number, None) is not None and self.current == number:
            self.policy.lost(number, self.now)
            self.current = None

    # The session

    def _talk(self) -> None:
        self.owed += self.rate * self.every
        self.at(self.every, self._talk)

    def _send(self) -> None:
        if self.current is None:
            return
        circuit = self.circuits[self.current]
        left = circuit.limits(self.now).bytes_left or 0
        sent = max(0.0, min(self.owed, left - 1024.0))
        circuit.used += sent
        self.owed -= sent

    def _move(self) -> None:
        candidates = [
            Candidate(
                each.number, PathKind.RELAYED, each.relay, 0.2, self.now - each.opened, limits=each.limits(self.now)
            )
            for each in self.circuits.values()
        ]
        choice = self.policy.choose(self.current, candidates, self.now)
        if choice is not None and not self._moving:
            self._moving = True
            self.at(MOVE, lambda: self._moved(choice.number))

    def _moved(self, number: int) -> None:
        self._moving = False
        if number in self.circuits:
            to = self.circuits[number]
            self.policy.moved(Candidate(number, PathKind.RELAYED, to.relay), self.now)
            self.current = number
            self.moves += 1

    def _lines(self, end: int) -> list[Line]:
        return [
            Line(
                each.number,
                PeerId("the other end"),
                each.relay,
                each.by == end,
                self.now - each.opened,
                each.number == self.current,
                each.limits(self.now),
                each.number == self.current,
            )
            for each in self.circuits.values()
        ]

    # Time

    def run(self, until: float, *, enough: Callable[[], bool] = lambda: False) -> World:
        while self.now < until and not enough():
            looks = (self.policy.look_at, *(each.look_at for each in self.ends))
            at = max(self.now, min(self._events[0][0], *looks))
            if self.current is None and self.moves:
                self.missing += at - self.now
            self.now = at
            while self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._send()
            self._move()
            for end, succession in enumerate(self.ends):
                for due in succession.due(self._lines(end), self.now, lambda _, end=end: self.ways(end)):
                    assert due.relay is not None
                    self._ask(end, due.relay)
                for number in succession.over:
                    self._end(number)
        return self

    @property
    def asked(self) -> int:
        return sum(each.asked.total() for each in self.relays.values())

    @property
    def refused(self) -> int:
        return sum(each.refused for each in self.relays.values())

    def stalled(self) -> bool:
        """Whether it has not got through for ten seconds; a moment before the circuits for it run out."""
        return self.owed > 10 * self.rate


IDLE = {"rate": PING / 120, "every": 120.0}
"""Of kaspad, which says something once in two minutes."""


@pytest.mark.parametrize("consent", [True, False])
def test_an_idle_session_lives_on_one_relay(consent: bool) -> None:
    """For 12 hours and more, as both ends take turns, and neither takes more than what comes back."""
    world = World(1, consent=consent, **IDLE).run(12 * HOUR)
    (relay,) = world.relays.values()
    assert world.missing == 0.0
    assert relay.refused == 0
    assert max(relay.asked.values()) <= 12 * HOUR / 120
    assert world.most_at_once <= 2
    assert world.ceiling.lasts(world.rate) == math.inf


def test_an_idle_session_of_which_one_end_can_ask() -> None:
    """One relay gives too few for ever, and as many as it says; three give enough."""
    world = World(1, one_sided=True, **IDLE)
    world.run(12 * HOUR, enough=lambda: world.missing > 0)
    assert world.now == pytest.approx(world.ceiling.idle, rel=0.15)
    assert "carries a session for 80 min at most" in world.ceiling.text
    world = World(3, one_sided=True, **IDLE).run(12 * HOUR)
    assert world.missing == 0.0
    assert world.refused == 0
    assert world.ceiling.idle == math.inf


def test_ten_empty_blocks_per_second_over_three_relays() -> None:
    world = World(3, 10 * BLOCK).run(4 * HOUR)
    assert not world.stalled()
    assert world.missing == 0.0
    assert world.refused == 0
    assert world.ceiling.text == (
        "3 relays with 128 KiB / 2 min circuits carry 6.0 kB/s for ever, 12.0 kB/s for the first 48 min"
    )
    # What is given at once lasts for nine hours, and so says the ceiling.
    used = sum(24 - world.ends[end]._allowances.spare(relay, world.now) for end in (0, 1) for relay in world.relays)
    assert used <= 0.55 * 24 * 6
    assert world.ceiling.lasts(world.rate) == pytest.approx(8.9 * HOUR, rel=0.01)


@pytest.mark.parametrize("rate", [8000.0, 12_000.0, pytest.param(10.0 * BLOCK, marks=pytest.mark.nightly)])
def test_it_lasts_as_long_as_the_ceiling_says(rate: float) -> None:
    world = World(3, rate)
    world.run(24 * HOUR, enough=world.stalled)
    assert world.stalled()
    assert 0.9 < world.now / world.ceiling.lasts(rate) < 1.5, "it promises nothing that does not hold"
    assert world.refused == 0
    assert world.missing == 0.0


def test_what_comes_back_is_enough_for_what_the_ceiling_says_of_ever() -> None:
    world = World(3, 5700.0, consent=False).run(1.5 * HOUR)
    assert not world.stalled()
    assert world.refused == 0
    assert max(count for each in world.relays.values() for count in each.asked.values()) <= 1.5 * HOUR / 120 + 1


def test_without_consent_a_live_session_takes_no_more_than_what_comes_back() -> None:
    world = World(3, 10 * BLOCK, consent=False).run(HOUR)
    assert world.stalled()
    assert world.missing == 0.0
    assert world.refused == 0
    assert max(count for each in world.relays.values() for count in each.asked.values()) <= HOUR / 120 + 1
    assert world.ceiling.lasts(world.rate) == 0.0
    own = World(3, 10 * BLOCK, consent=False, foreign=False).run(HOUR)
    assert not own.stalled(), "it is our own relays' business what they give"


def test_two_ends_behind_one_ip() -> None:
    """The relay gives one IP 60 at once and one more per minute: as much as to two peers."""
    world = World(3, 10 * BLOCK, same_ip=True).run(1.5 * HOUR)
    assert not world.stalled()
    assert world.refused == 0
