"""What two NATs allow: which pairs can meet and how, and what would help those that can't. No I/O.

For TCP there are four kinds of NAT, and each pair of kinds either always works or never does (measured, 13 x 13 types):

======  ==================================================  ======  ======  ======  ======
        A \\ B                                               G1      G2      G3      G4
======  ==================================================  ======  ======  ======  ======
G1      lets in whoever was dialed, from any port; or all   yes     yes     yes     yes
G2      lets in what was dialed, drops the rest             yes     yes     cross   ports
G3      lets in what was dialed, refuses the rest           yes     cross   cross   ports
G4      another outer port for each destination             yes     ports   ports   ports
======  ==================================================  ======  ======  ======  ======

*cross*: the two first packets have to cross, as the one that comes too early is refused. *ports*: only by guessing a
port. Of a NAT that counts its ports up the next ones can be guessed. Of one that draws them at random many have to be
tried at once, which only a peer that agreed to it may see. Two NATs that draw at random never meet.

What is not known of a NAT makes it one of several kinds. Only what holds for all of them is a verdict.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._observed import TOGETHER, Mapping, NatView
from kas_libp2p.autonat._roles import Filtering

PREDICTED = 16
"""Next ports of a counting NAT that are tried: with up to 8 strangers' connections in between they held the right one
50 times of 50; 4 ports did 28 times."""
MIN_SIGHTINGS = 3
"""Outer ports that have to be known before anything follows from their order: two neighbours occur by chance."""
MAX_SIGHTINGS = 8
"""Of them the latest, which are told to the peer."""
MAX_STEP = 64
"""Ports between two connections up to which a NAT seems to count: ours are not the only ones."""
MAX_STEP_AT_ONCE = 16
"""The same of two that were made together, as a node's first ones are. Nobody knows their order, so they are taken as
sorted: three out of a block of 512 would look like a count one time in 12 with `MAX_STEP`; with this, one in 180."""
QUIET = 30.0
"""Seconds in which no stranger's connection was seen, as it were, before the first sighting: two in one instant don't
make a thousand in a minute."""
BLOCKS = ((512, 32, 64), (1024, 64, 64), (2048, 64, 128))
"""Sizes of the port blocks that providers give a customer (RFC 7422), with the sockets and the probes that find one
another in it in 98 of 100 cases: 32 x 64 in 512 ports met in 19 of 20."""
AT_RANDOM = (256, 512)
"""The same where all ports are drawn from: met in 17 of 20."""
SAFETY = 0.5
"""Part of a mapping's lifetime after which it is refreshed: one ping may be lost."""
MIN_KEEPALIVE = 5.0
"""Seconds between two pings of a connection, at least."""


class Ports(StrEnum):
    """Which outer port a NAT gives to a connection."""

    UNKNOWN = "unknown"
    KEPT = "kept"
    """The one that was dialed from."""
    CHANGED = "changed"
    """Another one, the same for every destination."""
    SEQUENTIAL = "sequential"
    """The one after the last."""
    BLOCK = "block"
    """One of a few hundred, at random."""
    RANDOM = "random"


class Unsolicited(StrEnum):
    """What a NAT does with a packet that it does not let in."""

    UNKNOWN = "unknown"
    DROPPED = "drop"
    REFUSED = "rst"
    """It answers with RST or ICMP."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """An outer port that somebody saw.

    Attributes:
        age: seconds since that connection was made.
        port: 1 to 65535.
    """

    age: float
    port: int


@dataclass(frozen=True, slots=True)
class Nat:
    """What is known of the NAT, or firewall, of one family.

    Attributes:
        mapping, ports, filtering, unsolicited: see there.
        lifetime: seconds after which an idle mapping was seen to be gone; ``None``: never seen.
        sightings: where it counts ports up, or draws them from a block, its latest ones, the oldest first.
    """

    mapping: Mapping = Mapping.UNKNOWN
    ports: Ports = Ports.UNKNOWN
    filtering: Filtering = Filtering.UNKNOWN
    unsolicited: Unsolicited = Unsolicited.UNKNOWN
    lifetime: float | None = None
    sightings: tuple[Sighting, ...] = ()


@dataclass(frozen=True, slots=True)
class NatFacts:
    """What one side knows of its NATs.

    Attributes:
        v4, v6: of each family; ``None``: it has no address of that family.
    """

    v4: Nat | None = None
    v6: Nat | None = None

    def of(self, family: int) -> Nat | None:
        """The NAT of IPv4 or IPv6."""
        return self.v6 if family == 6 else self.v4


class Group(StrEnum):
    """The kinds of the table above."""

    G1 = "G1"
    G2 = "G2"
    G3 = "G3"
    G4 = "G4"


class Chance(StrEnum):
    """What a pair of NATs allows, the best first."""

    DIRECT = "direct"
    """One side can be dialed by everybody."""
    PUNCH = "punch"
    CROSSING = "crossing"
    """A punch, if the first packets cross: tries with a random delay make them."""
    PREDICTION = "prediction"
    """A punch at guessed ports."""
    UNKNOWN = "unknown"
    """Too little is known: only trying tells."""
    BIRTHDAY = "birthday"
    """Only by trying many ports at once, with the peer's agreement."""
    HOPELESS = "hopeless"


_RANK = {chance: index for index, chance in enumerate(Chance)}
_WORKS = (Chance.DIRECT, Chance.PUNCH, Chance.CROSSING, Chance.PREDICTION)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether two sides can meet.

    Attributes:
        chance: see there.
        family: of the better way; ``None``: they have none in common.
        reason: in sentences.
        fixes: what would make it better, each without an end.
        attempts: punches in a row that are worth it. Where one side maps by destination, the first works, or none.
    """

    chance: Chance
    family: int | None
    reason: str
    fixes: tuple[str, ...] = ()
    attempts: int = 3

    def worth_trying(self, *, predict: bool = True, birthday: bool = False) -> bool:
        """Whether a punch may work.

        Args:
            predict, birthday: which techniques both sides have and want.
        """
        if self.chance is Chance.PREDICTION:
            return predict
        return birthday if self.chance is Chance.BIRTHDAY else self.chance is not Chance.HOPELESS


def groups(nat: Nat) -> frozenset[Group]:
    """The kinds that a NAT may be of, by what is known of it."""
    if nat.filtering in (Filtering.OPEN, Filtering.ADDRESS):
        return frozenset({Group.G1})  # even if it maps by destination: some port of it leads in
    if nat.mapping is Mapping.DEPENDENT:
        return frozenset({Group.G4})
    refusing = {
        Unsolicited.DROPPED: {Group.G2},
        Unsolicited.REFUSED: {Group.G3},
        Unsolicited.UNKNOWN: {Group.G2, Group.G3},
    }
    found = refusing[nat.unsolicited]
    if nat.filtering is Filtering.UNKNOWN:
        found |= {Group.G1}
    if nat.mapping is Mapping.UNKNOWN:
        found |= {Group.G4}
    return frozenset(found)


def possible(ours: NatFacts, theirs: NatFacts | None) -> Verdict:
    """Whether, and how, two sides can meet: the better of the families that they have in common, IPv6 first.

    Args:
        ours: what we know of our side.
        theirs: what they have told; ``None``: nothing yet.
    """
    if theirs is None:
        return Verdict(Chance.UNKNOWN, None, "They have not told what their NAT does.", _fixes(ours, theirs))
    found = []
    for family in (6, 4):
        our, their = ours.of(family), theirs.of(family)
        if our is not None and their is not None:
            chance = _chance(our, their)
            rare = chance is Chance.UNKNOWN and {Group.G4} in (groups(our), groups(their))
            attempts = 1 if rare else 3
            found.append(Verdict(chance, family, _reason(our, their, chance), _fixes(ours, theirs, chance), attempts))
    if not found:
        nowhere = any(facts.v4 is None and facts.v6 is None for facts in (ours, theirs))
        reason = "The two have no kind of address in common: one has IPv4 only, the other IPv6 only."
        reason = "One of the two listens nowhere, so nobody can meet it." if nowhere else reason
        return Verdict(Chance.HOPELESS, None, reason, _fixes(ours, theirs))
    return min(found, key=lambda each: _RANK[each.chance])


def _chance(our: Nat, their: Nat) -> Chance:
    if Filtering.OPEN in (our.filtering, their.filtering):
        return Chance.DIRECT
    found = {_cell(our, one, their, other) for one in groups(our) for other in groups(their)}
    works = [each for each in found if each in _WORKS]
    if works and len(works) < len(found):
        return Chance.UNKNOWN
    # Of what works the hardest: it is done as if it were that. Of what does not, whatever may be left.
    return max(works, key=_RANK.__getitem__) if works else min(found, key=_RANK.__getitem__)


def _cell(our: Nat, one: Group, their: Nat, other: Group) -> Chance:
    pair = {one, other}
    if Group.G1 in pair or pair == {Group.G2}:
        return Chance.PUNCH
    if Group.G4 not in pair:
        return Chance.CROSSING
    unknown = [nat.ports for nat, group in ((our, one), (their, other)) if group is Group.G4]
    if all(each is Ports.SEQUENTIAL for each in unknown):
        return Chance.PREDICTION
    return Chance.BIRTHDAY if len(unknown) == 1 else Chance.HOPELESS


# In words


def _maps(nat: Nat) -> str:
    match nat.ports:
        case Ports.SEQUENTIAL:
            return "gives every destination another port, counting up"
        case Ports.BLOCK:
            return "gives every destination another port, out of a few hundred"
        case Ports.RANDOM:
            return "gives every destination another port, at random"
    return "gives every destination another port"


def _lets_in(nat: Nat) -> str:
    if nat.mapping is Mapping.DEPENDENT and nat.filtering not in (Filtering.OPEN, Filtering.ADDRESS):
        return _maps(nat)
    words = {
        Filtering.OPEN: "lets everybody in",
        Filtering.ADDRESS: "lets in hosts that were dialed",
        Filtering.PORT: "only lets in what was dialed",
        Filtering.UNKNOWN: "is not known well yet",
    }[nat.filtering]
    return words + (", and refuses the rest" if nat.unsolicited is Unsolicited.REFUSED else "")


def in_words(nat: Nat) -> str:
    """``only lets in what was dialed; keeps the port``: what a NAT does, without its subject."""
    if nat.mapping is Mapping.NONE:
        return f"is a firewall at most: it {_lets_in(nat)}" if nat.filtering is not Filtering.OPEN else _lets_in(nat)
    keeps = {Ports.KEPT: "; keeps the port", Ports.CHANGED: "; changes the port"}.get(nat.ports, "")
    return _lets_in(nat) + keeps


def _reason(our: Nat, their: Nat, chance: Chance) -> str:
    sides = f"Their NAT {_lets_in(their)}. Ours {_lets_in(our)}."
    says = {
        Chance.DIRECT: "One side can be dialed.",
        Chance.PUNCH: "A punch works between the two.",
        Chance.CROSSING: "A punch works between the two if the first packets cross.",
        Chance.PREDICTION: "A punch works between the two if the next port is guessed.",
        Chance.UNKNOWN: "Whether a punch works between the two only a try can tell.",
        Chance.BIRTHDAY: "Only trying many ports at once could work between the two.",
        Chance.HOPELESS: "No punch can work between the two.",
    }
    return f"{sides} {says[chance]}"


def _fixes(ours: NatFacts, theirs: NatFacts | None, chance: Chance = Chance.UNKNOWN) -> tuple[str, ...]:
    if chance in (Chance.DIRECT, Chance.PUNCH, Chance.CROSSING):
        return ()
    our, their = (("yes" if facts is not None and facts.v6 else "none") for facts in (ours, theirs))
    found = ["a port mapping on either side"]
    if theirs is None or our == "none" or their == "none":
        found.append(f"IPv6 on both (ours: {our}; theirs: {their if theirs is not None else 'not told'})")
    if chance is Chance.BIRTHDAY:
        found.append("many ports tried at once, if both operators allow it (punch.birthday)")
    return tuple(found)


# What can be seen of a NAT


def families(addresses: Iterable[str], *, allow_private: bool = False) -> frozenset[int]:
    """The families in which a machine can be met from outside its site: IPv6 only where it has a public address, as
    nobody translates it; IPv4 wherever it has any.

    Args:
        addresses: of its interfaces, as multiaddr texts.
        allow_private: for laboratories: private IPv6 counts as well.
    """
    found = set()
    for each in addresses:
        family = addr.family(each)
        v6 = addr.is_public(each) or (allow_private and addr.is_private(each) and not addr.is_link_local(each))
        if family is not None and (v6 if family == 6 else not (addr.is_loopback(each) or addr.is_link_local(each))):
            found.add(int(family))
    return frozenset(found)


def seen(view: NatView, filtering: Filtering, sightings: Sequence[Sighting] = ()) -> Nat:
    """The NAT of one family, from what `kas_libp2p.autonat` knows.

    Args:
        sightings: outer ports of our connections, in the order in which these were made.
    """
    nat = Nat(view.mapping, Ports.UNKNOWN, filtering)
    if view.mapping is not Mapping.DEPENDENT:
        if view.keeps_port is None:
            return nat
        return replace(nat, ports=Ports.KEPT if view.keeps_port else Ports.CHANGED)
    ports = pattern(sightings)
    latest = tuple(sightings[-MAX_SIGHTINGS:]) if ports in (Ports.SEQUENTIAL, Ports.BLOCK) else ()
    return replace(nat, ports=ports, sightings=latest)


def pattern(sightings: Sequence[Sighting]) -> Ports:
    """How a NAT that maps by destination chooses its ports.

    Args:
        sightings: of ports that it gave, in order.
    """
    if len(sightings) < MIN_SIGHTINGS:
        return Ports.UNKNOWN
    if _counts_up(sightings, MAX_STEP_AT_ONCE):
        return Ports.SEQUENTIAL
    return Ports.BLOCK if _block(each.port for each in sightings) is not None else Ports.RANDOM


def _counts_up(sightings: Sequence[Sighting], at_once: int) -> bool:
    latest = sightings[-MIN_SIGHTINGS:]
    return len(latest) == MIN_SIGHTINGS and all(
        0 < after.port - before.port <= (at_once if abs(before.age - after.age) <= TOGETHER else MAX_STEP)
        for before, after in itertools.pairwise(latest)
    )


def _block(ports: Iterable[int]) -> tuple[int, int, int] | None:
    """The smallest of `BLOCKS` that holds them all, where such a block begins at a multiple of its size; none of them
    begins below `kas_libp2p.addresses.LEAST_PORT`, whatever a peer says that it saw.
    """
    found = set(ports)
    for each in BLOCKS:
        starts = {port - port % each[0] for port in found}
        if len(starts) == 1 and min(starts) >= addr.LEAST_PORT:
            return each
    return None


def may_draw(nat: Nat) -> bool:
    """Whether a NAT that seems to count its ports up may draw them from a block all the same: a few of these may stand
    in order by chance. That a guess has failed says so.
    """
    return nat.ports is Ports.SEQUENTIAL and _block(each.port for each in nat.sightings) is not None


# Guessing ports


def predict(sightings: Sequence[Sighting], count: int = PREDICTED) -> tuple[int, ...]:
    """The next ports of a NAT that counts up, the likeliest first; none if it does not.

    The window begins where the strangers' connections since the last sighting have brought it at least, at the pace at
    which they came between the first and the last. One that counts by twos is met at every second port.

    Args:
        sightings: the oldest first.
        count: ports at most.
    """
    if not _counts_up(sightings, MAX_STEP):
        return ()
    first, *between, last = sightings[-MIN_SIGHTINGS:]
    strangers = last.port - first.port - len(between) - 1
    expected = last.age * strangers / (max(first.age - last.age, 0.0) + QUIET)
    skipped = max(0, int(expected - 2 * math.sqrt(expected)))
    start = last.port + 1 + skipped
    return tuple(each for each in range(start, start + count) if addr.LEAST_PORT <= each <= 65535)


class Dice(Protocol):
    """A source of chance, such as ``random.Random``."""

    def uniform(self, low: float, high: float, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Spread:
    """Two sides that look for one another among many ports.

    Attributes:
        sockets: how many the side whose NAT draws ports opens, each from a port of its own, to the other's one address.
        ports: of the drawing side's address, which the other side dials from its listen port.
    """

    sockets: int
    ports: tuple[int, ...]


def spread(drawing: Nat, dice: Dice) -> Spread:
    """Whom to dial where a NAT draws its ports from a block, or from all.

    Only towards a peer that agreed: it looks like a port scan.

    Args:
        drawing: the NAT that maps by destination.
        dice: chance.
    """
    block = _block(each.port for each in drawing.sightings) if drawing.sightings else None
    if block is not None:
        size, sockets, probes = block
        low = drawing.sightings[0].port // size * size
    else:
        (sockets, probes), low, size = AT_RANDOM, addr.LEAST_PORT, 65536 - addr.LEAST_PORT
    chosen: dict[int, None] = {}
    while len(chosen) < probes:
        port = low + min(int(dice.uniform(0, size)), size - 1)
        if port >= addr.LEAST_PORT:
            chosen[port] = None
    return Spread(sockets, tuple(chosen))


def keepalive(setting: float, *nats: Nat | None, seen: float | None = None) -> float:
    """Seconds of silence after which a punched connection is pinged: below the shortest mapping lifetime on its way.

    Args:
        setting: ``punch.keepalive``, which counts where nothing was observed.
        nats: on its way, of its family.
        seen: seconds of silence after which a connection with the peer was found dead before.
    """
    lifetimes = [seen, *(each.lifetime for each in nats if each is not None)]
    return max(MIN_KEEPALIVE, min([setting, *(SAFETY * each for each in lifetimes if each is not None)]))
