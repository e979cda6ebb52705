"""The choice of relays, over 24 hours among 1000 candidates, most of them bad. Runs in seconds: nothing here is real.

Each kind of relay is made to be as tempting as it can: who drops its clients, who cuts circuits after 128 KiB, and
fifty of one network have the best round trips of all.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from random import Random

from kas_libp2p.addresses import peer_id_from_bytes
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._exchange import ASK_AGAIN, MAX_RELAYS, Asking, answer_to
from kas_libp2p.relay._pool import (
    EARLY,
    MAX_PER_TELLER,
    PART_PATIENCE,
    ROTATION,
    Cause,
    Pool,
    RelayStatus,
    Source,
    Told,
    network_of,
)

HOUR, DAY = 3600.0, 86400.0
TARGET = 3
LIFETIME = HOUR
KEEPALIVE = 40.0
"""Seconds until a dead line is noticed."""
WALL = 1.8e9

KINDS = {
    "dead": 600,
    "dropper": 100,
    "full": 50,
    "no relay": 50,
    "tiny": 50,
    "clone": 50,
    "flapping": 50,
    "steady": 50,
}
GOOD = ("steady", "clone")


@dataclass
class Relay:
    """What a relay is really like."""

    peer: PeerId
    kind: str
    address: str
    rtt: float
    up: bool = True
    operator: str = ""


def peer(number: int) -> PeerId:
    return peer_id_from_bytes(b"\x12\x20" + hashlib.sha256(b"%d" % number).digest())


def make(number: int, kind: str, dice: Random) -> Relay:
    address = f"/ip4/20.{number % 250}.{number // 250}.1/tcp/16117"
    rtt = {"dropper": (0.004, 0.02), "tiny": (0.004, 0.02), "clone": (0.008, 0.012)}.get(kind, (0.015, 0.4))
    if kind == "clone":
        address = f"/ip4/45.7.{number % 250}.1/tcp/16117"
    elif kind in ("steady", "flapping"):
        address = f"/ip4/{60 + number % 100}.{number // 100}.0.1/tcp/16117"
    return Relay(peer(number), kind, address, dice.uniform(*rtt), operator="Clones Inc." if kind == "clone" else "")


@dataclass
class World:
    """Relays, a line to them, and a client that does what the pool says."""

    seed: int
    dice: Random = field(init=False)
    relays: dict[PeerId, Relay] = field(init=False)

    def __post_init__(self) -> None:
        self.dice = Random(self.seed)
        kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        self.dice.shuffle(kinds)
        made = [make(number, kind, self.dice) for number, kind in enumerate(kinds)]
        self.relays = {each.peer: each for each in made}
        self.now = 0.0
        self.line_up = True
        self.in_use: set[PeerId] = set()
        self.given_up: list[tuple[float, PeerId]] = []  # places that had proved themselves
        self.probes = 0
        self.shares: defaultdict[tuple[int, int], float] = defaultdict(float)  # seconds by hour and number of places
        self.held_kinds: defaultdict[str, float] = defaultdict(float)  # seconds of places on each kind, second half
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._generation: Counter[PeerId] = Counter()  # of attempts and places: an older one's outcome means nothing
        self._live: dict[PeerId, float] = {}  # and since when
        self.pool = Pool(target=TARGET, dice=self.dice)
        for index, each in enumerate(self.relays.values()):
            self._introduce(index, each)
            if each.kind in ("flapping", "steady"):
                self._churn(each)

    def _introduce(self, index: int, relay: Relay) -> None:
        if index % 5 == 0:
            self.pool.add(relay.peer, [relay.address], Source.MET, 0.0, operator=relay.operator)
        else:
            teller = PeerId(f"teller {index % 40}")
            self.pool.add(
                relay.peer,
                [relay.address],
                Source.HEARD,
                0.0,
                teller=teller,
                operator=relay.operator,
                capacity=1000 if relay.kind in ("dropper", "tiny", "dead") else self.dice.randrange(200),
            )

    # Time

    def at(self, seconds: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, do))

    def run(self, until: float) -> None:
        self._choose()
        while self.next_at() < until:
            self.step()
        self._account(until - self.now)
        self.now = until

    def next_at(self) -> float:
        return min(self._deadline(), self._events[0][0] if self._events else math.inf)

    def _deadline(self) -> float:
        return self.pool.deadline

    def step(self) -> None:
        at = self.next_at()
        assert at > self.now - 1e-9
        self._account(at - self.now)
        self.now = at
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        self._choose()

    def _account(self, seconds: float) -> None:
        self.shares[int(self.now // HOUR), len(self._live)] += seconds
        if self.now >= DAY / 2:
            for each in self._live:
                self.held_kinds[self.relays[each].kind] += seconds

    # What relays do

    def _churn(self, relay: Relay) -> None:
        up, down = (3 * DAY, 600.0) if relay.kind == "steady" else (HOUR, 600.0)

        def fall() -> None:
            relay.up = False
            if relay.peer in self._live:
                self._lose(relay.peer, "the connection was reset")
            self.at(self.dice.expovariate(1 / down), rise)

        def rise() -> None:
            relay.up = True
            self.at(self.dice.expovariate(1 / up), fall)

        self.at(self.dice.expovariate(1 / up), fall)

    def _reachable(self, relay: Relay) -> bool:
        return self.line_up and relay.up and relay.kind != "dead"

    def cut_line(self) -> None:
        self.line_up = False
        for each in sorted(self._live):
            self.at(
                self.dice.uniform(0, KEEPALIVE), lambda each=each: each in self._live and self._lose(each, "silent")
            )

    # What the client does

    def _choose(self) -> None:
        before = set(self.pool.hold)
        probes = self.pool.update(self.now, self.in_use)
        hold = set(self.pool.hold)
        self._check(hold)
        gone = before - hold
        assert not gone & self.in_use, "a live circuit was given up"
        for each in sorted(gone):
            if self.now - self._live.pop(each, self.now) > EARLY:
                self.given_up.append((self.now, each))
            self._generation[each] += 1
        for each in sorted(hold - before):
            self._try(each)
        for each in probes:
            self.probes += 1
            self._probe(each)

    def _check(self, hold: Collection[PeerId]) -> None:
        networks = [network_of(self.relays[each].address) for each in hold]
        assert len(set(networks)) == len(networks)
        assert sum(self.relays[each].kind == "clone" for each in hold) <= 1

    def _probe(self, peer: PeerId) -> None:
        relay = self.relays[peer]
        if not self._reachable(relay):
            self.at(5.0, lambda: self.pool.probe_failed(peer, Cause.UNREACHABLE, "timeout", self.now))
        elif relay.kind == "no relay":
            self.at(6 * relay.rtt, lambda: self.pool.probe_failed(peer, Cause.NO_RELAY, "none", self.now))
        else:
            rtt = relay.rtt * self.dice.uniform(1.0, 1.3)
            self.at(6 * relay.rtt, lambda: self._reached(relay, rtt))

    def _reached(self, relay: Relay, rtt: float) -> None:
        self.pool.probed(relay.peer, rtt, relay.address, self.now)

    def _try(self, peer: PeerId) -> None:
        self._generation[peer] += 1
        generation = self._generation[peer]
        relay = self.relays[peer]

        def outcome() -> None:
            if generation != self._generation[peer] or peer not in self.pool.hold:
                return
            if not self._reachable(relay):
                self.pool.failed(peer, Cause.UNREACHABLE, "refused", self.now)
            elif relay.kind == "full":
                self.pool.failed(peer, Cause.FULL, "RESERVATION_REFUSED", self.now)
            else:
                self._made(peer, generation)

        self.at(5 * relay.rtt if self._reachable(relay) else self.dice.choice((0.05, 5.0)), outcome)

    def _made(self, peer: PeerId, generation: int) -> None:
        relay = self.relays[peer]
        self._live[peer] = self.now
        limit = 128 * 1024 if relay.kind == "tiny" else None
        self.pool.reserved(peer, self.now, max_bytes=limit, max_seconds=120.0 if limit else 7200.0)
        if relay.kind == "dropper":
            self.at(self.dice.uniform(5, 120), lambda: self._drop(peer, generation))

        def renew() -> None:
            if generation == self._generation[peer] and peer in self._live:
                self.pool.reserved(peer, self.now, max_bytes=limit, max_seconds=120.0 if limit else 7200.0)
                self.at(LIFETIME * self.dice.uniform(0.6, 0.75), renew)

        self.at(LIFETIME * self.dice.uniform(0.6, 0.75), renew)

    def _drop(self, peer: PeerId, generation: int) -> None:
        if generation == self._generation[peer] and peer in self._live:
            self._lose(peer, "the relay closed the connection")

    def _lose(self, peer: PeerId, reason: str) -> None:
        self._live.pop(peer, None)
        self.in_use.discard(peer)
        self.pool.lost(peer, reason, self.now)
        if peer in self.pool.hold:
            self._try(peer)

    @property
    def live(self) -> set[PeerId]:
        return set(self._live)

    def share(self, hours: range, at_least: int) -> float:
        """The part of the time in these hours in which there were so many places."""
        spent = [(count, seconds) for (hour, count), seconds in self.shares.items() if hour in hours]
        return sum(seconds for count, seconds in spent if count >= at_least) / sum(seconds for _, seconds in spent)

    def run_until_full(self, within: float) -> float:
        """Seconds until all places are there."""
        start = self.now
        while len(self._live) < TARGET:
            assert self.now < start + within, f"{len(self._live)} places after {within} s"
            self.run(self.now + 0.25)
        return self.now - start


def test_a_day_among_a_thousand() -> None:
    world = World(1)
    world.run_until_full(within=30)

    world.run(8 * HOUR)
    world.cut_line()
    world.run(8 * HOUR + 1200)
    assert not world.live
    world.line_up = True
    world.run_until_full(within=90)
    world.run(DAY)

    before, after = range(8), range(9, 24)
    assert world.share(before, 1) > 0.999
    assert world.share(before, TARGET) > 0.998
    assert world.share(after, 1) > 0.9999
    assert world.share(after, TARGET) > 0.999
    # It has found the good ones, of which one in ten is, and the clones together get one place.
    kinds = world.held_kinds
    assert sum(kinds[each] for each in GOOD) > 0.8 * sum(kinds.values())
    assert kinds["clone"] <= 12 * HOUR + ROTATION
    # It stays with them, but for a rotation every four hours and one for each that falls and comes back.
    given_up = [each for at, each in world.given_up if at > 12 * HOUR and world.relays[each].kind in GOOD]
    assert len(given_up) <= 15
    assert world.probes < 3000


def test_no_circuit_is_cut() -> None:
    """`World` checks it at each choice; here there is always something to be cut."""
    world = World(2)
    world.run_until_full(within=30)
    for _ in range(25):
        world.in_use = set(world.dice.sample(sorted(world.live), min(2, len(world.live))))
        world.run(world.now + world.dice.uniform(0, 2 * ROTATION / 10))
    world.in_use.clear()
    world.run(world.now + ROTATION)
    assert world.share(range(1, 8), 1) == 1.0


def test_a_rotation_changes_the_relay_and_costs_no_place() -> None:
    world = World(3)
    world.run(4.5 * HOUR)
    held = world.live
    world.given_up.clear()
    relays = world.pool._relays  # there are other reasons to give one up
    while not (old := [each for _, each in world.given_up if each in held and relays[each].rest_until > world.now]):
        world.run(world.now + 60)
        assert len(world.live) >= TARGET
    assert world.live - held
    world.run(world.now + ROTATION / 2)
    assert old[0] not in world.live


def test_after_a_restart_the_same_places_are_there_within_a_second() -> None:
    world = World(4)
    world.run(2 * HOUR)
    held = {each for each in world.live if world.relays[each].kind in GOOD}
    assert held
    text = world.pool.dump(world.now, WALL)

    again = World(4)
    again.pool = Pool(target=TARGET, dice=again.dice)
    assert again.pool.load(text, again.now, WALL + 60) == 0
    again.run(1.0)
    assert again.live >= held
    assert again.share(range(1), TARGET) > 0.0


def test_who_tells_of_many_relays_is_believed_a_few() -> None:
    world = World(5)
    liar = PeerId("liar")
    taken = [
        world.pool.add(peer(10_000 + n), [f"/ip4/9.{n % 250}.{n // 250}.1/tcp/1"], Source.HEARD, 0.0, teller=liar)
        for n in range(5000)
    ]
    assert sum(taken) == MAX_PER_TELLER


# What peers tell


@dataclass
class Listener(World):
    """Knows nobody, and asks whoever is connected. Its relays tell who runs them, but only some time after a visit."""

    tellers: dict[PeerId, Callable[[float], tuple[Told, ...]]] = field(default_factory=dict)
    says_after: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asking = Asking(self.dice)
        self.asked: Counter[PeerId] = Counter()
        self.doubled = 0.0  # the longest time for which the same two places had one operator, in seconds
        self._doubles: dict[tuple[PeerId, PeerId], float] = {}  # and since when

    def _introduce(self, index: int, relay: Relay) -> None:
        pass

    def meet(self, peer: PeerId, tell: Callable[[float], tuple[Told, ...]]) -> None:
        self.tellers[peer] = tell
        self.asking.met(peer, self.now)

    def _deadline(self) -> float:
        return min(self.pool.deadline, self.asking.deadline)

    def _choose(self) -> None:
        super()._choose()
        while (teller := self.asking.choose(self.pool.appetite(self.now), self.now)) is not None:
            self.asked[teller] += 1
            self.asking.asked(teller, self.now)
            self.at(0.1, lambda teller=teller: self._hear(teller))

    def _hear(self, teller: PeerId) -> None:
        answer = answer_to(PeerId("us"), MAX_RELAYS, self.tellers[teller](self.now), operator="", free=None)
        for each in answer.relays:
            if each.peer not in self.relays:  # made up
                self.relays[each.peer] = Relay(each.peer, "dead", each.addresses[0], 0.1)
            self.pool.add(
                each.peer, each.addresses, Source.HEARD, self.now, teller=teller, origin=str(teller)[:7], age=each.age
            )

    def _reached(self, relay: Relay, rtt: float) -> None:
        super()._reached(relay, rtt)
        after = self.dice.uniform(0, self.says_after)
        self.at(after, lambda: self.pool.said(relay.peer, relay.operator, 100, self.now))

    def _check(self, hold: Collection[PeerId]) -> None:
        clones = [each for each in hold if each in self._live and self.relays[each].operator]
        pairs = itertools.combinations(sorted(clones), 2)
        self._doubles = {pair: self._doubles.get(pair, self.now) for pair in pairs}
        self.doubled = max([self.doubled, *(self.now - since for since in self._doubles.values())])

    @property
    def known(self) -> Collection[RelayStatus]:
        return self.pool.status(self.now)


def honest(world: Listener, dice: Random) -> Callable[[float], tuple[Told, ...]]:
    """One that has used five relays, of which most are good."""
    kinds = ["steady", "steady", "steady", "clone", "flapping"]
    used = [dice.choice([each for each in world.relays.values() if each.kind == kind]) for kind in kinds]
    told = tuple(Told(each.peer, (each.address,), each.operator) for each in used)
    return lambda _now: told


def liar(world: Listener, number: int) -> Callable[[float], tuple[Told, ...]]:
    """One that makes relays up, each time others, and says of the good ones that they are elsewhere."""
    numbers = itertools.count(1_000_000 * (number + 1))
    good = [each.peer for each in world.relays.values() if each.kind in GOOD]

    def tell(_: float) -> tuple[Told, ...]:
        ids = [*world.dice.sample(good, 8), *(peer(next(numbers)) for _ in range(10_000 - 8))]
        world.dice.shuffle(ids)
        return tuple(
            Told(each, (f"/ip4/{world.dice.randrange(1, 200)}.{world.dice.randrange(250)}.6.6/tcp/6666",))
            for each in ids
        )

    return tell


def test_who_knows_nobody_finds_relays_among_liars_that_tell_10_000_each() -> None:
    world = Listener(6)
    dice = Random(7)
    liars = [PeerId(f"liar {number % 3} {number}") for number in range(12)]  # in three networks
    for number, each in enumerate(liars):
        world.meet(each, liar(world, number))
    for number in range(6):
        world.meet(PeerId(f"friend{number}"), honest(world, dice))
    world.run_until_full(within=600)

    world.run(6 * HOUR)
    assert world.share(range(1, 6), TARGET) > 0.999
    assert all(world.relays[each].kind in (*GOOD, "flapping") for each in world.live)
    lies = [each for each in world.known if world.relays[each.peer].kind == "dead"]
    assert len(lies) <= 3 * MAX_PER_TELLER
    assert max(world.asked.values()) <= 6 * HOUR / ASK_AGAIN
    assert world.probes < 1500


def test_one_operator_with_many_relays_gets_one_place() -> None:
    """The clones are the nearest of all, and here each in a network of its own."""
    world = Listener(8)
    for number, each in enumerate(each for each in world.relays.values() if each.kind == "clone"):
        each.address = f"/ip4/{150 + number}.1.0.1/tcp/16117"
    clones = tuple(Told(each.peer, (each.address,)) for each in world.relays.values() if each.kind == "clone")
    for number in range(4):
        world.meet(PeerId(f"clerk{number}"), lambda _now, part=clones[12 * number : 12 * number + 12]: part)
    world.meet(PeerId("friend "), honest(world, Random(9)))
    world.run_until_full(within=120)

    world.run(12 * HOUR)
    assert 0.0 < world.doubled <= PART_PATIENCE + 5  # it does show late, and is put right
    assert sum(world.relays[each].kind == "clone" for each in world.live) == 1
    assert world.share(range(1, 12), TARGET) > 0.995
    assert world.share(range(1, 12), 1) == 1.0


def test_in_a_village_word_gets_around() -> None:
    """Each knows one relay and four neighbours; two of the thirty lie to whoever asks."""
    dice = Random(10)
    village = [Listener(11) for _ in range(30)]  # the same relays for all
    names = [PeerId(f"house{number}") for number in range(len(village))]
    steady = [each for each in village[0].relays.values() if each.kind == "steady"]
    for number, world in enumerate(village):
        world.dice.seed(number)
        world.pool._dice = world.dice
        first = steady[number]
        world.pool.add(first.peer, [first.address], Source.MET, 0.0)
        for other in dice.sample(range(len(village)), 4):
            if other < 2:
                world.meet(names[other], liar(world, other))
            elif other != number:
                world.meet(names[other], lambda now, other=other: village[other].pool.tell(now))
        world._choose()

    def run(until: float) -> None:
        while (world := min(village, key=Listener.next_at)).next_at() < until:
            world.step()

    def full() -> int:
        return sum(len(world.live) >= TARGET for world in village)

    run(60)
    assert full() >= 0.9 * len(village)
    run(3600)
    assert full() == len(village)
    for world in village:
        networks = {network_of(world.relays[each].address) for each in world.live}
        assert len(networks) == len(world.live)
        assert len(world.known) <= len(steady) + 2 * MAX_PER_TELLER
