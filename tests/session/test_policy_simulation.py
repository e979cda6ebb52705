"""A day of paths that come and go, under one session."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from kas_libp2p.metadata import CircuitLimits, PathKind, PeerId
from kas_libp2p.session._policy import Candidate, PathPolicy, _margin, ends_soon

HOUR, DAY = 3600.0, 86_400.0
PROVING = 3.0
"""Seconds until a direct connection is proven."""
REDIAL = 1.0
"""Seconds until there is another path where there was none."""
BETWEEN = 2.0
"""Seconds that it takes to have another circuit beside one that ends soon."""


@dataclass
class World:
    """The connections of two peers. Circuits are made anew before they end; a direct one comes and goes, and beside it
    there is no circuit.

    Args:
        up, down: seconds that a direct connection lasts, and until the next one, in the mean; up 0: there is none.
        seconds: that a circuit may last.
        most, rate: bytes that it may carry, and how many per second it carries.
        hangs: the part of the direct ones that hang before they end.
    """

    seed: int
    up: float
    down: float
    seconds: float = HOUR
    most: int | None = None
    rate: float = 0.0
    hangs: float = 0.0
    quiet: bool = False
    relay_rtt: float = 0.15
    now: float = 0.0
    policy: PathPolicy = field(init=False)
    current: int | None = None
    moves: list[tuple[float, int, str]] = field(default_factory=list)
    without: float = 0.0
    on_direct: float = 0.0
    longest_spurned: float = 0.0

    def __post_init__(self) -> None:
        self.dice = Random(self.seed)
        self.policy = PathPolicy(quiet=self.quiet)
        self._numbers = itertools.count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._opened: dict[int, tuple[Candidate, float]] = {}
        self._used: dict[int, float] = {}
        self.hung: set[int] = set()
        self._following = False
        self._spurned_since = 0.0
        self._circuit()
        if self.up:
            self.at(self.dice.expovariate(1 / self.down), self._direct)

    def at(self, after: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + after, next(self._numbers), do))

    # What there is

    def candidates(self) -> list[Candidate]:
        found = []
        for number, (each, opened) in self._opened.items():
            age = self.now - opened
            left = None
            if each.relayed:
                rest = None if self.most is None else max(0, int(self.most - self._used[number]))
                left = CircuitLimits(self.most, self.seconds, rest, max(0.0, self.seconds - age))
            rtt = each.rtt * self.dice.uniform(0.7, 1.5) if each.rtt is not None else None
            found.append(replace(each, age=age, proven=age >= PROVING, limits=left, rtt=rtt))
        return found

    def _open(self, kind: PathKind, rtt: float) -> int:
        number = next(self._numbers)
        self._opened[number] = (Candidate(number, kind, PeerId("relay"), rtt), self.now)
        self._used[number] = 0.0
        return number

    def _circuit(self) -> None:
        self._following = False
        number = self._open(PathKind.RELAYED, self.relay_rtt)
        self.at(self.seconds, lambda: self._close(number))
        self.at(self.seconds - _margin(self.seconds), self._renew)

    def _renew(self) -> None:
        """Have another circuit made, if none lasts."""
        if not self._on_relay() or self._following:
            return
        if all(ends_soon(each.limits) for each in self.candidates() if each.relayed):
            self._following = True
            self.at(BETWEEN, self._circuit)

    def _direct(self) -> None:
        if not any(each.relayed for each, _ in self._opened.values()):
            self.at(REDIAL, self._direct)  # a punch is agreed on over a circuit
            return
        number = self._open(PathKind.PUNCHED, 0.1)
        self.at(PROVING, lambda: None)  # it is told that it is proven
        lasts = self.dice.expovariate(1 / self.up)

        def end() -> None:
            if self.dice.random() < self.hangs:
                self.hung.add(number)
                self.at(4.0, lambda: self._close(number))
            else:
                self._close(number)

        self.at(lasts, end)
        self.at(lasts + self.dice.expovariate(1 / self.down), self._direct)

    def _close(self, number: int) -> None:
        if self._opened.pop(number, None) is None:
            return
        self.hung.discard(number)
        if self.current == number:
            self.policy.lost(number, self.now)
            self.current = None
        if self._on_relay() and not self._following and not any(each.relayed for each in self.candidates()):
            self._following = True
            self.at(REDIAL, self._circuit)

    def _on_relay(self) -> bool:
        """Whether circuits are made: beside a direct path none is."""
        here = self._opened.get(self.current) if self.current is not None else None
        return here is None or here[0].relayed

    def _let_go(self) -> None:
        """Circuits that nobody uses beside a direct path are closed, unless they are to be kept."""
        if not self._on_relay():
            for number, (each, _) in [*self._opened.items()]:
                if each.relayed and number != self.policy.spare:
                    del self._opened[number]

    # What the session does

    def _look(self) -> None:
        candidates = self.candidates()
        by_number = {each.number: each for each in candidates}
        choice = self.policy.choose(self.current, candidates, self.now)
        while choice is not None:
            assert choice.number != self.current
            if choice.number not in self.hung:
                self.policy.moved(by_number[choice.number], self.now)
                self.moves.append((self.now, choice.number, choice.reason))
                self.current = choice.number
                break
            self.policy.lost(choice.number, self.now)
            choice = self.policy.choose(self.current, candidates, self.now)
        here = by_number.get(self.current) if self.current is not None else None
        assert (here is None) == (not candidates) or self.policy.reason == "what is there has just failed"
        if here is not None and ends_soon(here.limits):
            self._renew()
        self._let_go()
        self._watch(here, candidates)

    def _watch(self, here: Candidate | None, candidates: list[Candidate]) -> None:
        better = any(not each.relayed for each in candidates)
        if here is None or not here.relayed or not better:
            self._spurned_since = self.now
        self.longest_spurned = max(self.longest_spurned, self.now - self._spurned_since)

    def run(self, until: float) -> World:
        self._look()
        while True:
            at = min(self._events[0][0], max(self.policy.look_at, self.now + 0.001), until)
            here = self._opened.get(self.current) if self.current is not None else None
            counted = here is not None and here[0].relayed and self.most is not None and self.rate > 0
            if counted:
                at = min(at, self.now + 1.0)
            passed = at - self.now
            if here is None:
                self.without += passed
            else:
                assert self.current is not None
                self._used[self.current] += passed * self.rate
                self.on_direct += passed * (not here[0].relayed)
            self.now = at
            if at >= until:
                return self
            if counted and self.current is not None and self._used[self.current] >= (self.most or 0):
                self._close(self.current)
            while self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._look()

    def most_moves_in_an_hour(self) -> int:
        times = [at for at, *_ in self.moves]
        return max((sum(at <= other < at + HOUR for other in times) for at in times), default=0)

    def flaps(self) -> int:
        """Moves by taste that came less than 5 s after another move; the beginning is none."""
        return sum(
            after - before < 5.0
            for (before, *_), (after, _, reason) in itertools.pairwise(self.moves[1:])
            if reason == "the direct path has proven itself"
        )


FLAPPING = [4.0, 8.0, 20.0, 45.0, 90.0, 240.0, 500.0]


@pytest.mark.parametrize("up", FLAPPING)
def test_whatever_a_direct_path_does_the_session_moves_rarely(up: float) -> None:
    """It comes again a second after it went, all day, and circuits last for an hour."""
    world = World(int(up), up=up, down=4.0, hangs=0.5).run(DAY)
    circuits = DAY / (HOUR - 450)
    assert world.most_moves_in_an_hour() <= 14
    assert len(world.moves) <= 50 + circuits
    assert world.flaps() == 0
    assert world.without <= len(world.moves) * REDIAL


def test_a_path_that_becomes_stable_is_used() -> None:
    """Two hours of flapping, and then it lasts."""
    world = World(1, up=5.0, down=1.0).run(2 * HOUR)
    assert world.moves
    world.up = 10 * DAY
    before = len(world.moves)
    world.run(2 * HOUR + HOUR + 60)
    assert world.current is not None
    assert not world._opened[world.current][0].relayed
    world.run(DAY)
    assert len(world.moves) - before <= 4
    assert world.on_direct > 20 * HOUR


def test_a_healthy_day_is_direct_from_the_beginning() -> None:
    """A direct path that lasts for hours is back within seconds each time."""
    world = World(2, up=4 * HOUR, down=20.0).run(DAY)
    assert world.on_direct > 0.98 * DAY
    assert len(world.moves) <= 40
    assert world.longest_spurned < 120


def test_without_any_direct_path_it_moves_with_the_circuits_and_is_never_without() -> None:
    world = World(3, up=0.0, down=0.0).run(DAY)
    assert world.without == 0.0
    assert len(world.moves) <= DAY / (HOUR - 450) + 2
    assert all("left" in reason for *_, reason in world.moves[1:])


def test_small_circuits() -> None:
    """128 KiB and two minutes, at a rate that uses them up by bytes, and by time."""
    for rate in (0.0, 500.0, 1500.0, 2500.0):
        world = World(4, up=0.0, down=0.0, seconds=120.0, most=128 * 1024, rate=rate).run(6 * HOUR)
        lasts = min(120 - 15 + BETWEEN, 0.9375 * 128 * 1024 / max(rate, 1) + BETWEEN)
        assert world.without == 0.0
        assert len(world.moves) == pytest.approx(6 * HOUR / lasts, rel=0.05)


def test_who_prefers_quiet_stays_on_a_near_relay() -> None:
    world = World(5, up=2 * HOUR, down=60.0, quiet=True, relay_rtt=0.03, seconds=2 * DAY).run(DAY)
    assert len(world.moves) == 1
    far = World(5, up=2 * HOUR, down=60.0, quiet=True, relay_rtt=0.3, seconds=2 * DAY).run(DAY)
    assert far.on_direct > 0.9 * DAY
