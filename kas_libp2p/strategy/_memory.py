"""What came of punching with whom: it keeps a pair that can't from being tried again and again. No I/O.

One entry per peer says how often it failed in a row, why, and until when it is left alone; and when it worked. An entry
is about two *sides*: where each is, and what its NAT does. As soon as one of these is known to be another, the failures
mean nothing any more. What was unknown and is known now is no other side.

A wait doubles with each failure in a row. The row ends when a direct connection has lasted (`Memory.forgive`), not when
it merely came up: one that comes and goes is the worst of all, as everything moves twice each time.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kas_libp2p import addresses as addr
from kas_libp2p.config import STEADY
from kas_libp2p.metadata import PeerId
from kas_libp2p.statefile import read_entries
from kas_libp2p.strategy._nat import Dice, NatFacts

MAX_PEERS = 1024
"""Peers that are remembered, at about 500 bytes each; whom we had to do with least recently is forgotten first."""
MAX_SAVED = 512
"""Of them, those that are written: some 300 kB."""
MAX_IPS = 8
"""Places of one side: some IPv4 addresses and IPv6 networks."""
MAX_TEXT = 200
"""Characters of the words about a failure."""
KEEP = 30 * 86400.0
"""Seconds after which an entry is no longer written: addresses don't last longer, mostly."""
FORMAT = 1
"""Version of the file."""

RESET_GAP = 30.0
"""Seconds from a failure until what the peer says of itself can end the wait: who says another thing each time must not
have us punch each time."""

UNKNOWN = "unknown"
"""Of anything about a NAT, as `kas_libp2p.strategy._nat` has it."""


class Cause(StrEnum):
    """Why a connection stays relayed."""

    HOPELESS = "hopeless"
    """The two NATs allow no punch."""
    UNREACHED = "unreached"
    """A punch was tried, and nothing got through."""
    UNSTABLE = "unstable"
    """A direct connection came up, and did not last."""
    DECLINED = "declined"
    """The peer wants none."""
    BUSY = "busy"
    """The peer, or this node, has no time for it now."""
    UNSUPPORTED = "unsupported"
    """The peer does not speak DCUtR."""
    BROKEN = "broken"
    """The peer broke the protocol, or could not prove who it is."""
    INTERRUPTED = "interrupted"
    """The circuit ended meanwhile."""
    NO_ADDRESS = "no_address"
    """Nobody has told yet where this node is seen."""


WAITS = {
    Cause.HOPELESS: (3600.0, 86400.0),
    Cause.UNREACHED: (120.0, 6 * 3600.0),
    Cause.UNSTABLE: (60.0, 6 * 3600.0),
    Cause.DECLINED: (600.0, 86400.0),
    Cause.BUSY: (2.0, 600.0),
    Cause.UNSUPPORTED: (3600.0, 86400.0),
    Cause.BROKEN: (600.0, 86400.0),
    Cause.INTERRUPTED: (1.0, 60.0),
    Cause.NO_ADDRESS: (10.0, 600.0),
}
"""Seconds after the first failure, doubled with each in a row, and the longest. What passes by itself is short; a punch
costs a second and a few packets, so `UNREACHED` is tried again while a person still looks. All but those of `PASSING`
are for the default of `punch.steady`, and change with it."""
PASSING = (Cause.BUSY, Cause.INTERRUPTED, Cause.NO_ADDRESS)
"""Those that say nothing of the way between the two. Their rows count for themselves."""
LONGEST = max(longest for _, longest in WAITS.values())


@dataclass(frozen=True, slots=True)
class Side:
    """Where one side is, as far as is known, and what its NATs do.

    Attributes:
        ips: IPv4 addresses and IPv6 /64 networks, without ports.
        nats: mapping, ports, filtering and what happens to the rest, of IPv4 and then of IPv6.
    """

    ips: frozenset[str] = frozenset()
    nats: tuple[str, ...] = (UNKNOWN,) * 8

    def is_other(self, than: Side) -> bool:
        """Whether something that is known of both differs: all addresses of a family, or what a NAT does."""
        if any(one != other for one, other in zip(self.nats, than.nats, strict=True) if UNKNOWN not in (one, other)):
            return True
        for in_family in (lambda ip: ":" in ip, lambda ip: ":" not in ip):
            here, before = set(filter(in_family, self.ips)), set(filter(in_family, than.ips))
            if here and before and here.isdisjoint(before):
                return True
        return False

    def or_else(self, older: Side) -> Side:
        """This, with what is unknown taken from before."""
        nats = (new if new != UNKNOWN else old for new, old in zip(self.nats, older.nats, strict=True))
        return Side(self.ips or older.ips, tuple(nats))


def side(facts: NatFacts | None, where: Iterable[str]) -> Side:
    """One side, as it is remembered.

    Args:
        facts: what is known of its NATs.
        where: public addresses of it, as multiaddr texts.
    """
    direct = [each for each in where if addr.ip_port(each) is not None and not addr.is_relayed(each)]
    ips = frozenset(addr.subnet_key(each) for each in direct[:MAX_IPS])
    nats: list[str] = []
    for nat in (facts.v4, facts.v6) if facts is not None else (None, None):
        nats += [nat.mapping, nat.ports, nat.filtering, nat.unsolicited] if nat is not None else [UNKNOWN] * 4
    return Side(ips, tuple(map(str, nats)))


@dataclass(slots=True)
class Entry:
    """What is remembered of one peer. Times are the machine's ``now``.

    Attributes:
        ours, theirs: the two sides that it is about.
        streak, cause, text, until: failures in a row, the last one's reason, and until when the peer is left alone.
        passing: failures in a row that were `PASSING`.
        failed: when it failed last.
        successes, succeeded: how often a direct connection was proven, and when last.
        seconds, rtt: how long the last one took from the decision on, and its round trip.
        lifetime: seconds after which a mapping on the way was found to be gone.
    """

    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)
    streak: int = 0
    passing: int = 0
    cause: Cause | None = None
    text: str = ""
    until: float = -math.inf
    failed: float = -math.inf
    successes: int = 0
    succeeded: float = -math.inf
    seconds: float | None = None
    rtt: float | None = None
    lifetime: float | None = None

    def wait(self, now: float) -> float:
        """Seconds for which it is still left alone."""
        return max(0.0, self.until - now)


class Memory:
    """All of them.

    Args:
        dice: chance: two sides that failed at once, and a thousand peers of one relay, don't come back at once.
        steady: `punch.steady`, in seconds.
    """

    def __init__(self, dice: Dice, *, steady: float = STEADY) -> None:
        self._dice = dice
        self._pace = steady / STEADY
        self._entries: OrderedDict[PeerId, Entry] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._entries)

    def recall(self, peer: PeerId, ours: Side, theirs: Side, now: float) -> Entry:
        """What is known of a peer, given where and what both sides are now. Not to be changed by the caller."""
        entry = self._of(peer)
        if now < entry.failed + RESET_GAP:
            theirs = entry.theirs
        known_now = entry.cause is Cause.NO_ADDRESS and bool(ours.ips) and not entry.ours.ips
        if known_now or ours.is_other(entry.ours) or theirs.is_other(entry.theirs):
            entry = self._entries[peer] = Entry(ours, theirs, successes=entry.successes, succeeded=entry.succeeded)
        else:
            entry.ours, entry.theirs = ours.or_else(entry.ours), theirs.or_else(entry.theirs)
        return entry

    def failed(self, peer: PeerId, cause: Cause, text: str, now: float, *, at_least: float = 0.0) -> float:
        """It did not work.

        Args:
            text: more words.
            at_least: seconds that the peer asked to be left alone for.

        Returns:
            Seconds for which the peer is left alone.
        """
        entry = self._of(peer)
        first, longest = WAITS[cause]
        passing = cause in PASSING
        before = entry.passing if passing else entry.streak
        wait = min(first * 2.0 ** min(before, 30), longest) * (1.0 if passing else self._pace)
        wait = min(max(wait * self._dice.uniform(0.8, 1.2), at_least), LONGEST)
        entry.passing = before + 1 if passing else 0
        entry.streak += not passing
        entry.cause, entry.text, entry.until, entry.failed = cause, text[:MAX_TEXT], now + wait, now
        return wait

    def succeeded(self, peer: PeerId, now: float, *, seconds: float, rtt: float) -> None:
        """A direct connection was proven."""
        entry = self._of(peer)
        entry.successes += 1
        entry.succeeded, entry.seconds, entry.rtt = now, seconds, rtt
        entry.until = -math.inf

    def forgive(self, peer: PeerId) -> None:
        """What failed before counts no more: a direct connection has lasted, or what was missing is there."""
        entry = self._of(peer)
        entry.streak, entry.passing, entry.cause, entry.text, entry.until = 0, 0, None, "", -math.inf

    def lifetime(self, peer: PeerId) -> float | None:
        """What `mapping_lost` told of a peer."""
        entry = self._entries.get(peer)
        return entry.lifetime if entry is not None else None

    def own_lifetime(self) -> float | None:
        """Seconds after which our own NAT forgets a mapping, it seems: so it was found with two peers at least."""
        known = sorted(each.lifetime for each in self._entries.values() if each.lifetime is not None)
        return known[1] if len(known) > 1 else None

    def mapping_lost(self, peer: PeerId, silence: float) -> None:
        """A direct connection was found dead after so many seconds of silence: a NAT had forgotten it, perhaps."""
        entry = self._of(peer)
        entry.lifetime = silence if entry.lifetime is None else min(entry.lifetime, silence)

    def _of(self, peer: PeerId) -> Entry:
        entry = self._entries.get(peer)
        if entry is None:
            entry = self._entries[peer] = Entry()
            if len(self._entries) > MAX_PEERS:
                self._entries.popitem(last=False)
        self._entries.move_to_end(peer)
        return entry

    # Over a restart

    def dump(self, now: float, wall: float) -> str:
        """What is to be remembered over a restart.

        Args:
            wall: seconds since the epoch.
        """
        worth = {peer: each for peer, each in self._entries.items() if now - max(each.failed, each.succeeded) < KEEP}
        latest = list(worth.items())[-MAX_SAVED:]
        return json.dumps({"format": FORMAT, "peers": [_saved(*each, now, wall) for each in latest]}, indent=1)

    def load(self, text: str, now: float, wall: float) -> int:
        """Take what was remembered. Call it before anything else is told.

        Returns:
            How many entries were left out as they are damaged.

        Raises:
            ValueError: the text is no such file; says why.
        """

        def take(values: Any) -> None:
            peer, entry = _loaded(values, now, wall)
            self._entries[peer] = entry

        return read_entries(text, "peers", FORMAT, MAX_PEERS, take)


def _saved(peer: PeerId, entry: Entry, now: float, wall: float) -> dict[str, Any]:
    def at(when: float) -> int | None:
        return None if when == -math.inf else round(wall + when - now)

    return {
        "peer": peer,
        "ours": {"ips": sorted(entry.ours.ips), "nats": entry.ours.nats},
        "theirs": {"ips": sorted(entry.theirs.ips), "nats": entry.theirs.nats},
        "streak": entry.streak,
        "cause": entry.cause,
        "text": entry.text,
        "until": at(max(entry.until, now)),
        "failed": at(entry.failed),
        "successes": entry.successes,
        "succeeded": at(entry.succeeded),
        "seconds": entry.seconds,
        "rtt": entry.rtt,
        "lifetime": entry.lifetime,
    }


def _loaded(values: dict[str, Any], now: float, wall: float) -> tuple[PeerId, Entry]:
    def number(name: str, high: float) -> float:
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ValueError(f"{name} is {value!r}")
        return float(value)

    def maybe(name: str, high: float) -> float | None:
        return None if values[name] is None else number(name, high)

    def past(name: str) -> float:
        when = maybe(name, 1e12)
        return -math.inf if when is None else now - max(0.0, wall - when)

    def a_side(name: str) -> Side:
        ips, nats = values[name]["ips"], values[name]["nats"]
        if not isinstance(ips, list) or len(ips) > MAX_IPS or not isinstance(nats, list) or len(nats) != 8:
            raise ValueError(f"{name} is {values[name]!r}")
        if any(not isinstance(each, str) or len(each) > 64 for each in (*ips, *nats)):
            raise ValueError(f"{name} is {values[name]!r}")
        return Side(frozenset(ips), tuple(nats))

    text = values["text"]
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r}")
    entry = Entry(
        ours=a_side("ours"),
        theirs=a_side("theirs"),
        streak=int(number("streak", 1e6)),
        cause=None if values["cause"] is None else Cause(values["cause"]),
        text=text[:MAX_TEXT],
        until=now + min(max(number("until", 1e12) - wall, 0.0), LONGEST),  # the clock may have been wrong
        failed=past("failed"),
        successes=int(number("successes", 1e9)),
        succeeded=past("succeeded"),
        seconds=maybe("seconds", 1e6),
        rtt=maybe("rtt", 60),
        lifetime=maybe("lifetime", 1e6),
    )
    return addr.parse_peer_id(values["peer"]), entry
