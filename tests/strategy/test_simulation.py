"""A node behind a home router over a day, with 200 peers that come and go. Nothing here is real; it takes seconds.

Every kind of peer is there: those that a punch reaches, those that none can reach, some whose connections break again
and again, some that say no, and some that move to another network.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from kas_libp2p.config import DialConfig, PunchConfig
from kas_libp2p.events import CircuitReplaced, UpgradeAbandoned
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.strategy._intent import Answer, Intent
from kas_libp2p.strategy._memory import MAX_PEERS, WAITS, Cause, Memory
from kas_libp2p.strategy._nat import NatFacts, possible
from kas_libp2p.strategy._plan import ConnectionStrategy, Way
from kas_libp2p.strategy._upgrade import Command, Drop, Prove, Replace, State, Stop, Try, Upgrades
from tests.strategy.test_nat import nat_of

HOUR, DAY = 3600.0, 86400.0
RTT = 0.1
PROVING = 3.0
RELAYS = [PeerId(f"relay {n}") for n in range(3)]
KINDS = {"pr": 80, "eimx": 20, "ar": 10, "sym": 40, "symblk": 20, "flapping": 15, "no": 10, "lost": 5}
"""How many peers of each kind. ``lost``: the NATs would allow a punch, and something on the way eats it."""


@dataclass
class Peer:
    """What a peer is really like, and what we have with it."""

    name: PeerId
    kind: str
    address: str
    facts: NatFacts
    circuits: set[int] = field(default_factory=set)
    direct: set[int] = field(default_factory=set)
    punches: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=lambda: [0.0])


class World:
    """Peers, relays and lines, and a shell that does what the machine says."""

    def __init__(self, seed: int, ours: str) -> None:
        self.dice = Random(seed)
        self.now = 0.0
        self.memory = Memory(self.dice)
        config = PunchConfig(max_concurrent=8)
        self.machine = Upgrades(config, ConnectionStrategy(DialConfig(), config), self.memory)
        self.ours = NatFacts(nat_of(ours))
        self.peers: dict[PeerId, Peer] = {}
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.biggest = Counter[str]()
        self.abandoned = Counter[str]()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._numbers = itertools.count(1)
        self._runs: dict[PeerId, int] = {}  # a run that was stopped is one that nobody hears of
        self.machine.facts(self.ours, ("/ip4/11.1.0.1/tcp/16117",), 0.0)
        for number, kind in enumerate(kind for kind, count in KINDS.items() for _ in range(count)):
            facts = NatFacts(nat_of(kind if kind in ("pr", "eimx", "ar", "sym", "symblk") else "pr"))
            name = PeerId(f"{kind} {number}")
            self.peers[name] = Peer(name, kind, self._somewhere(), facts)
            self.at(self.dice.uniform(0, HOUR), self._comes, self.peers[name])

    def _somewhere(self) -> str:
        return f"/ip4/12.{self.dice.randrange(250)}.{self.dice.randrange(250)}.1/tcp/40000"

    def at(self, seconds: float, do: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._count), lambda: do(*arguments)))

    def run(self, until: float) -> None:
        while self.now < until:
            deadline = self.machine.next_deadline()
            at = min(deadline, self._events[0][0] if self._events else until, until)
            assert at >= self.now - 1e-6
            self._count_time(at - self.now)
            self.now = max(self.now, at)
            if deadline <= self.now:
                self.do(self.machine.on_timeout(self.now))
                assert self.machine.next_deadline() > self.now
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._measure()

    def _count_time(self, seconds: float) -> None:
        for peer in self.peers.values():
            if peer.circuits or peer.direct:
                self.seconds[peer.kind, "direct" if peer.direct else "relayed"] += seconds

    def _measure(self) -> None:
        running = len(self.machine._running)
        for name, count in (
            ("running", running),
            ("peers", len(self.machine)),
            ("memory", len(self.memory)),
            ("queued", sum(map(len, self.machine._queue.values()))),
        ):
            self.biggest[name] = max(self.biggest[name], count)
        connected = sum(bool(each.circuits or each.direct) for each in self.peers.values())
        assert len(self.machine) <= connected

    # Peers

    def _comes(self, peer: Peer) -> None:
        """It calls us through a relay, stays for a while, and calls again as long as it does."""
        self.at(self.dice.expovariate(1 / (2 * HOUR)), self._goes, peer)
        self._calls(peer)

    def _calls(self, peer: Peer) -> None:
        number = next(self._numbers)
        peer.circuits.add(number)
        relay = self.dice.choice(RELAYS)
        self.do(
            self.machine.circuit_up(peer.name, number, relay, self.now, inbound=True, seen_at=peer.address, rtt=RTT)
        )

    def _goes(self, peer: Peer) -> None:
        for number in [*peer.direct, *peer.circuits]:
            self.ends(peer, number, broken=False)
        if self.dice.random() < 0.1:
            peer.address = self._somewhere()
            peer.moved.append(self.now)
        self.at(self.dice.expovariate(1 / HOUR), self._comes, peer)

    def ends(self, peer: Peer, number: int, *, broken: bool) -> None:
        if number in peer.circuits | peer.direct:
            peer.circuits.discard(number)
            peer.direct.discard(number)
            self.do(self.machine.gone(peer.name, number, self.now, broken=broken, text="it ended"))

    def _breaks(self, peer: Peer, number: int) -> None:
        """Where nothing is left, the peer calls again at once: its node wants ours."""
        if number in peer.direct:
            peer.switches.append(self.now)
            self.ends(peer, number, broken=self.dice.random() < 0.5)
            if not peer.circuits:
                self._calls(peer)

    # The shell

    def do(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Try(name, circuit, plan):
                    peer = self.peers[name]
                    assert circuit in peer.circuits
                    assert plan.of(Way.PUNCH)
                    self._runs[name] = run = next(self._count)
                    peer.asked.append(self.now)
                    self.at(RTT, self._told, peer, circuit, run)
                case Stop(name, _):
                    self._runs.pop(name, None)
                case Prove(name, number):
                    self.at(PROVING, self._proven, self.peers[name], number)
                case Replace(name, circuit, _):
                    self.at(1.0, self._replaced, self.peers[name], circuit)
                case Drop(name, number, _):
                    self.peers[name].direct.discard(number)
                case CircuitReplaced(peer=name):
                    self.peers[name].switches.append(self.now)
                case UpgradeAbandoned(reason=reason):
                    self.abandoned[reason] += 1

    def _replaced(self, peer: Peer, circuit: int) -> None:
        if any(self.machine.is_replaced(peer.name, each) for each in peer.direct):
            self.ends(peer, circuit, broken=False)

    def _told(self, peer: Peer, circuit: int, run: int) -> None:
        if self._runs.get(peer.name) == run:
            no = peer.kind == "no"
            intent = Intent(Answer.NO if no else Answer.YES, "disabled" if no else "", nat=peer.facts, predicts=True)
            self.do(self.machine.told(peer.name, circuit, intent, self.now))
            if self._runs.get(peer.name) == run:
                peer.punches.append(self.now)
                works = peer.kind != "lost" and self.allows(peer)
                self.at(2 * RTT if works else 8.0, self._punched, peer, run, works)

    def allows(self, peer: Peer) -> bool:
        return possible(self.ours, peer.facts).worth_trying()

    def _punched(self, peer: Peer, run: int, works: bool) -> None:
        if self._runs.pop(peer.name, None) != run:
            return
        if not works:
            self.do(self.machine.ended(peer.name, Cause.UNREACHED, "nothing came through", self.now))
            return
        number = next(self._numbers)
        peer.direct.add(number)
        self.do(self.machine.direct_up(peer.name, number, Path(PathKind.PUNCHED, RELAYS[0]), self.now))
        life = self.dice.uniform(1.0, 120.0) if peer.kind == "flapping" else self.dice.expovariate(1 / (12 * HOUR))
        self.at(life, self._breaks, peer, number)

    def _proven(self, peer: Peer, number: int) -> None:
        if number in peer.direct:
            self.do(self.machine.proven(peer.name, number, RTT / 2, self.now))


@pytest.fixture(scope="module", params=[("pr", 1), ("pr", 2), ("sym", 3)], ids=lambda param: f"{param[0]}-{param[1]}")
def day(request: pytest.FixtureRequest) -> World:
    ours, seed = request.param
    world = World(seed, ours)
    world.run(DAY)
    return world


def kinds(world: World, *names: str) -> list[Peer]:
    return [each for each in world.peers.values() if each.kind in names]


def test_who_can_be_reached_directly_is(day: World) -> None:
    for kind in ("pr", "eimx", "ar"):
        direct, relayed = day.seconds[kind, "direct"], day.seconds[kind, "relayed"]
        if day.allows(kinds(day, kind)[0]):
            assert direct / (direct + relayed) > 0.99
        else:
            assert direct == 0


def test_nothing_is_sent_to_who_can_not_be_reached(day: World) -> None:
    """They tell what their NATs do, and that is all; not even that while they are left alone."""
    hopeless = [each for each in day.peers.values() if not day.allows(each) and each.kind != "no"]
    assert len(hopeless) >= 60
    for peer in hopeless:
        assert peer.punches == []
        for before, after in itertools.pairwise(peer.asked):
            same_place = not any(before < moved <= after for moved in peer.moved)
            assert after - before >= 0.8 * WAITS[Cause.HOPELESS][0] or not same_place
        assert len(peer.asked) <= 5 * len(peer.moved)  # after 1 hour, 2, 4, 8 in one place


def test_who_said_no_is_asked_rarely(day: World) -> None:
    for peer in kinds(day, "no"):
        assert peer.punches == []
        assert len(peer.asked) <= 9 + 4 * len(peer.moved)  # after 10 minutes, 20, 40 …


def test_what_comes_and_goes_is_used_less_and_less(day: World) -> None:
    """Two switches per attempt, to the direct connection and back. In one place there are three at once, as if the peer
    had started anew, and then after 1 minute, 2, 4 … 512.
    """
    for peer in kinds(day, "flapping"):
        if day.allows(peer):
            assert len(peer.switches) <= 2 * 14 * len(peer.moved)
            assert len(peer.punches) <= 14 * len(peer.moved)
            assert peer.punches  # it is not given up either


def test_steady_connections_do_not_flap(day: World) -> None:
    for peer in kinds(day, "pr", "eimx", "ar"):
        for before, after in itertools.pairwise(peer.punches):
            assert after - before > 1.0
        assert len(peer.punches) <= 40  # as often as it comes, or the line breaks


def test_a_way_that_eats_packets_is_tried_a_dozen_times_a_day(day: World) -> None:
    for peer in kinds(day, "lost"):
        if day.allows(peer):
            assert 3 <= len(peer.punches) <= 10 + 8 * len(peer.moved)


def test_what_is_held_is_bounded(day: World) -> None:
    assert day.biggest["running"] <= 8
    assert day.biggest["peers"] <= 200
    assert day.biggest["memory"] <= min(200, MAX_PEERS)
    assert day.biggest["queued"] <= 200
    assert all(value >= 0 for value in day.biggest.values())
    text = day.memory.dump(day.now, 1.8e9)
    assert len(text) < 400_000


def test_all_two_hundred_come_back_at_once() -> None:
    """After an outage of our line everybody calls in one second: nobody waits for long, and no more run than may."""
    world = World(5, "pr")
    world._events.clear()
    reachable = kinds(world, "pr", "eimx", "ar")
    for peer in world.peers.values():
        world.at(world.dice.uniform(0, 1), world._calls, peer)
    world.run(60.0)
    assert world.biggest["running"] == 8
    assert all(each.direct for each in reachable)
    assert max(each.punches[0] for each in reachable) < 30.0
    assert {each.state for each in world.machine.status(world.now)} <= {State.STABLE, State.COOLING}
