"""Which relays to keep places on: a choice out of many candidates, as values. No I/O.

Candidates
    come from the configuration, from peers that say that they are relays, and from what peers tell of others. A network
    has room for `MAX_PER_NETWORK` that nobody has reached, and the fullest loses one when there are too many in all.
    Hearsay is worth little: all tellers of one network together have room for `MAX_PER_TELLER`, and what they tell
    changes nothing of a relay that we have met. Several may tell of the same one, so none can hide it behind a wrong
    address: that nobody was there counts neither against where others say it is, nor once we have met it. Nobody but
    the operator's own is asked for a place before a probe has reached it, seen that it is a relay and measured the
    round trip; who was only heard of and did not answer is left alone for `HEARD_WAIT` at least.

Score
    a product of what was measured: round trip, past success, how long its places lasted, and what a circuit may carry.
    What a relay says of itself moves it by a little (`_capacity`). Successes and failures fade by half in `HALF_LIFE`,
    so nothing grows with age alone, and nothing is held against anybody for ever. A relay of the operator's counts 1
    more, which puts it before every other.

Holding
    `target` places, never two that share a *tie*: a network (IPv4 /16, IPv6 /48) or the name of an operator, as the
    relay itself says it. Where that shows late, the lesser one is replaced and let go. While there are others, one
    teller's word leads to all places but one at most. A relay that was asked and is slow to answer gets company rather
    than patience, and the surplus is let go. A lost place is tried again at once by whoever holds it; if that takes
    longer than `RETRY_PATIENCE`, another relay is asked.

Turning over
    The worst is exchanged for one that is clearly better (`UPGRADE`), any one from time to time for one that is
    about as good (`ROTATION`), and a relay that was rotated out rests. The old place is given up when the new one has
    proved itself (`EARLY`), and none is while a circuit of ours runs through it. If nobody can take its place, the old
    one stays.

Waiting
    Whatever goes wrong has a cause, and each cause its waits, doubling. While we hold no place at all, failing to reach
    anybody says as much of our own network as of theirs: the waits stay short and nobody's score suffers.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from kas_libp2p import addresses as addr
from kas_libp2p.config import MAX_OPERATOR
from kas_libp2p.errors import AddressError
from kas_libp2p.metadata import PeerId
from kas_libp2p.statefile import read_entries

MAX_CANDIDATES = 1024
"""Relays that are known at once, at about 1 KiB each."""
MAX_PER_NETWORK = 4
"""Candidates from one network that nobody has reached yet: only one of a network can be held."""
MAX_PER_TELLER = 32
"""Candidates known from the word of peers of one network alone: identities cost nothing, networks do."""
MAX_TELLERS = 4
"""Networks whose peers are heard about one candidate that nobody has reached yet."""
MAX_ADDRESSES = 8
"""Addresses of one candidate; of one that was heard of, each teller has its part."""

EXTRA = 4
"""Places asked for, or not yet given up, beyond the target."""
ASK_PATIENCE = 2.0
"""Seconds until a relay that was asked gets company: dialing and asking takes 5 round trips of 300 ms, and a lost SYN
takes longer."""
RETRY_PATIENCE = 1.0
"""Seconds until a lost place is made elsewhere: a relay that was restarted, or a flap of the line, answers sooner."""
ASK_TIMEOUT = 30.0
"""Seconds until a relay that was asked counts as silent."""
ASK_PAUSE = 5.0
"""Seconds between two that are asked, at the most: reached after a dozen failures in a row (`HURRY`), so that an outage
of our own network costs a few dials a minute, and its end is noticed soon."""
PART_PATIENCE = 60.0
"""Seconds for which two places may share a tie that showed late, while somebody is asked to replace the lesser one."""
EARLY = 600.0
"""Seconds after which a place has proved itself. Lost before, it was dropped."""

ROTATION = 4 * 3600.0
"""Seconds between rotations, give or take a tenth. Spreads the load, and lets nobody keep us for ever."""
ROTATION_WORTH = 0.5
"""Part of the old relay's score that its successor must have: as a newcomer it has two thirds of what it will have."""
REST = ROTATION
"""Seconds for which a relay that was rotated out is not rotated in again."""
UPGRADE_INTERVAL = 600.0
"""Seconds between looks for a better one; a relay is not exchanged sooner after it was taken."""
UPGRADE = 1.5
"""How many times better a relay must be to replace another: less would follow the noise of round trips."""
CIRCUIT_CHECK = 5.0
"""Seconds until it is looked again whether the circuits through a relay that is to go have ended."""

TELLING = 3.0
"""Seconds until others know what we serve: a push of identify waits for a second of quiet, and has to travel."""
MAX_PROBES = 4
"""Probes at once."""
HURRY, HURRY_GROWTH = 0.1, 1.3
"""Seconds between probes while places are missing, and the factor with each that fails: the first ten start within five
seconds, and a machine without a network soon stops spinning."""
PROBE_INTERVAL = 30.0
"""Seconds between probes of new candidates while there are few (`ENOUGH`)."""
PROBE_INTERVAL_LATER = 300.0
ENOUGH = 64
"""Usable candidates: the best of so many is as good as one needs, and the others need not be bothered."""
SPARE = 2
"""Relays that can be used, for each place: with fewer, peers are asked for more."""
PROBE_AGAIN = 6 * 3600.0
"""Seconds after which the round trip of a candidate is measured again."""
PROBE_HELD_AGAIN = 600.0
"""The same for a relay that is held, where it costs a ping."""

HALF_LIFE = 12 * 3600.0
"""Seconds in which half of what was good or bad is forgotten."""
UNKNOWN_RTT = 0.3
"""Seconds that are assumed of a round trip nobody has measured."""
LARGE_BYTES, LONG_SECONDS = 64 * 1024 * 1024, 600.0
"""Circuits that may carry this much for this long carry Kaspa traffic (a node's blocks: some 100 kB/s)."""
TTL = 24 * 3600.0
"""Seconds after which a candidate is forgotten that was neither heard of nor reached."""
MAX_STREAK = 8
"""Failures in a row after which a candidate is forgotten, unless it is the operator's."""

HEARD_WAIT = 1800.0
"""Seconds of the shortest wait for one that was heard of and never reached: whoever tells many nodes of an address that
is no relay's makes each of them knock there twice an hour at the most, and less each time."""
LONGEST_CONFIGURED = 600.0
"""Seconds of the longest wait for a relay of the operator's, who may just have mended it."""
LONGEST_ALONE = 60.0
"""Seconds of the longest wait for unreachable relays while we hold no place."""

FORMAT = 1
"""Version of the file."""
MAX_SAVED = 128
"""Relays in the file: some 40 kB."""


class Source(StrEnum):
    """How we know a relay, the least trusted first."""

    HEARD = "heard of"
    MET = "met"
    CONFIGURED = "configured"


_TRUST = {source: index for index, source in enumerate(Source)}


class Place(StrEnum):
    """What we have on a relay."""

    NONE = "none"
    ASKED = "asked"
    RESERVED = "reserved"


class Appetite(StrEnum):
    """Whether others are to be asked for relays."""

    NONE = "none"
    """Nobody: no place is wanted, or there are enough to choose from."""
    SOME = "some"
    """Whoever is new."""
    HUNGRY = "hungry"
    """Everybody, again and again: there are too few, or too few of different networks and operators."""


class Cause(StrEnum):
    """Why a relay is left alone for a while."""

    UNREACHABLE = "unreachable"
    SILENT = "silent"
    FULL = "full"
    DENIED = "denied"
    NO_RELAY = "no relay"
    BROKEN = "broken"
    DROPPED = "dropped"


WAITS = {
    Cause.UNREACHABLE: (10.0, 3600.0),
    Cause.SILENT: (60.0, 3600.0),
    Cause.FULL: (600.0, 7200.0),
    Cause.DENIED: (86400.0, 86400.0),
    Cause.NO_RELAY: (6 * 3600.0, 86400.0),
    Cause.BROKEN: (3600.0, 86400.0),
    Cause.DROPPED: (60.0, 6 * 3600.0),
}
"""Seconds after the first failure, doubled with each in a row, and the longest."""
_PERHAPS_OURS = (Cause.UNREACHABLE, Cause.SILENT)


class Dice(Protocol):
    """A source of chance, such as ``random.Random``."""

    def uniform(self, low: float, high: float, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Told:
    """A relay as one peer tells another.

    Attributes:
        peer: who.
        addresses: where, as texts without peer id.
        operator: who runs it, as it says itself; empty if it says nothing.
        free: places that it said it has left; ``None`` if it said nothing.
        age: seconds since the teller last was in touch with it.
    """

    peer: PeerId
    addresses: tuple[str, ...]
    operator: str = ""
    free: int | None = None
    age: float = 0.0


@dataclass(frozen=True, slots=True)
class RelayStatus:
    """A relay as the pool sees it.

    Attributes:
        peer, addresses, operator: who and where; the operator as the relay says, or as the teller does of one that
            was only heard of.
        source: how we know it.
        teller: who was the first to tell of it; ``None`` if we met it before anybody did.
        place: what we have there.
        score: 0 to 1; one of the operator's has 1 more.
        rtt: seconds; ``None`` if nobody has measured it.
        seconds: how long the place has been held or asked for; 0 without one.
        leaving: whether it is given up as soon as its successor is there and no circuit runs through it.
        reason: what went wrong last; empty if nothing did.
        wait: seconds for which it is left alone because of that.
    """

    peer: PeerId
    addresses: tuple[str, ...]
    operator: str
    source: Source
    teller: PeerId | None
    place: Place
    score: float
    rtt: float | None
    seconds: float
    leaving: bool
    reason: str
    wait: float


@dataclass(slots=True)
class Relay:
    """What is known of one relay. Times are the machine's ``now``; see `RelayStatus` for what has the same name there.

    Attributes:
        remote: where it came from when it was met.
        origins: the networks of those who told of it before it was met.
        capacity: places that it says it has left; ``None`` if it says nothing.
        reached: the other end of the connection on which it was reached.
        dialed: where it answered us when we dialed it, one address of each IP version.
        seen: when it was last heard of or reached.
        probed, probing: when it was last probed; whether it is being probed.
        news: whether others have told where it is since the probe under way began, which knows nothing of that.
        good, bad, hours: successes, failures and hours of held places, as they stood at ``tallied``.
        large: whether its circuits carry Kaspa traffic; ``None`` if we don't know.
        since: when it was asked, or when the place was made.
        counts_until: until when an asked one counts as if it were held.
        proven: whether the place has lasted `EARLY`.
        double, part_at: whether it shares a tie with a better one that is held; until when that is borne.
        recalled: whether it was held when the file was written.
        wait_until, cause, streak: until when it is left alone, why, and for the how manieth time.
        rest_until: until when it is not rotated in.
        networks: in which it counts while nobody has reached it: whence it came, else where it is said to be.
        ties: what it must not share with another that is held.
    """

    peer: PeerId
    source: Source
    addresses: tuple[str, ...]
    seen: float
    remote: str = ""
    operator: str = ""
    teller: PeerId | None = None
    origins: tuple[str, ...] = ()
    capacity: int | None = None
    reached: str = ""
    dialed: tuple[str, ...] = ()
    rtt: float | None = None
    probed: float = -math.inf
    probing: bool = False
    news: bool = False
    good: float = 0.0
    bad: float = 0.0
    hours: float = 0.0
    tallied: float = 0.0
    large: bool | None = None
    place: Place = Place.NONE
    since: float = 0.0
    counts_until: float = 0.0
    proven: bool = False
    leaving: bool = False
    double: bool = False
    part_at: float = 0.0
    recalled: bool = False
    wait_until: float = -math.inf
    cause: Cause | None = None
    reason: str = ""
    streak: int = 0
    rest_until: float = -math.inf
    networks: frozenset[str] = frozenset()
    ties: frozenset[str] = frozenset()

    def tie(self) -> None:
        """Work out its networks, and what it shares with others: the network where it was reached; else whence it came,
        and all where it says to be.
        """
        said, came = _networks(self.addresses), _networks([self.remote] if self.remote else ())
        self.networks = came or said
        where = _networks([self.reached]) if self.reached else said | came
        self.ties = where | ({f"operator {self.operator.casefold().strip()}"} if self.operator else set())

    def meet(self) -> None:
        """It is there: from now on only its own word counts."""
        if self.source is Source.HEARD:
            self.source, self.operator, self.capacity = Source.MET, "", None
            self.wait_until, self.cause, self.reason, self.streak, self.bad = -math.inf, None, "", 0, 0.0

    def tally(self, now: float, *, good: float = 0.0, bad: float = 0.0, hours: float = 0.0) -> None:
        """Count something, after what was counted before has faded."""
        fade = _fade(now - self.tallied)
        self.good, self.bad, self.hours = self.good * fade + good, self.bad * fade + bad, self.hours * fade + hours
        self.tallied = now

    def score(self, now: float) -> float:
        """How good it is, see the module."""
        fade = _fade(now - self.tallied)
        held = (now - self.since) / 3600 if self.place is Place.RESERVED else 0.0
        return (self.source is Source.CONFIGURED) + (
            _speed(self.rtt)
            * _success(self.good * fade, self.bad * fade)
            * _stability(self.hours * fade + held, self.bad * fade)
            * _capacity(self.capacity, self.large)
        )


def _fade(seconds: float) -> float:
    return float(0.5 ** (max(seconds, 0.0) / HALF_LIFE))


def _speed(rtt: float | None) -> float:
    """1 at once, 1/2 at 100 ms, 1/4 at 300 ms."""
    return 1 / (1 + 10 * (UNKNOWN_RTT if rtt is None else rtt))


def _success(good: float, bad: float) -> float:
    """The part of the attempts that went well, as if 2 of 2.5 had before: the unknown gets a chance, the first failure
    counts."""
    return (good + 2) / (good + bad + 2.5)


def _stability(hours: float, bad: float) -> float:
    """By the mean hours of a place until something goes wrong, as if there had been six: 3/4 for a newcomer."""
    mean = (hours + 6) / (bad + 1)
    return mean / (mean + 2)


def _capacity(left: int | None, large: bool | None) -> float:
    """A fifth for circuits that end after some kilobytes, which a relay's answer proves; a tenth for what it claims."""
    return (0.2 if large is False else 1.0) * (0.9 if left is None else 0.9 + 0.1 * min(left, 64) / 64)


def network_of(address: str) -> str | None:
    """The network that may hold one relay of ours: an IPv4 /16 or IPv6 /48. ``None`` for names and for loopback."""
    where = addr.ip_port(address)
    if where is None or addr.is_loopback(address):
        return None
    ip = ipaddress.ip_address(where[0].partition("%")[0])
    return str(ipaddress.ip_network((ip, 16 if ip.version == 4 else 48), strict=False))


def _networks(addresses: Iterable[str]) -> frozenset[str]:
    return frozenset(network for each in addresses if (network := network_of(each)) is not None)


class Pool:
    """Candidates, and the choice among them. After anything was told, call `update`.

    Args:
        target: places to hold.
        dice: chance, for jitter and for whom to probe next.
        hearsay_from: until then nobody is dialed who was only heard of.

    Attributes:
        target: see there; may be changed.
        deadline: when to call `update` again if nothing happens before.
    """

    def __init__(self, *, target: int, dice: Dice, hearsay_from: float = -math.inf) -> None:
        self.target = target
        self.deadline = math.inf
        self._hearsay_from = hearsay_from
        self._dice = dice
        self._relays: dict[PeerId, Relay] = {}
        self._places: list[Relay] = []  # those that are held or asked
        self._last_ask = -math.inf
        self._failed_asks = 0  # in a row
        self._rotate_at: float | None = None
        self._upgrade_at = -math.inf
        self._last_probe = -math.inf
        self._probing = 0
        self._misses = 0  # probes that failed in a row
        self._hungry = False  # whether places were missing when it was last looked for somebody to probe
        self._look_at = -math.inf  # when to look again
        self._pruned = -math.inf

    # Candidates

    def add(
        self,
        peer: PeerId,
        addresses: Iterable[str],
        source: Source,
        now: float,
        *,
        remote: str = "",
        teller: PeerId | None = None,
        origin: str = "",
        operator: str = "",
        capacity: int | None = None,
        age: float = 0.0,
    ) -> bool:
        """A relay exists, or so it is said.

        Args:
            addresses: where, without its peer id; the first `MAX_ADDRESSES` count.
            remote: its end of the connection on which it was met.
            teller: whose word that is, if it was heard of.
            origin: the teller's network; the teller itself if left out.
            operator: who runs it, as it says.
            capacity: places it has left, as it says.
            age: seconds since the teller was in touch with it, as it says.

        Returns:
            whether it is a candidate now.
        """
        kept = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        origins = (origin or str(teller),) if source is Source.HEARD else ()
        if origins:
            kept = kept[: MAX_ADDRESSES // MAX_TELLERS]
        seen = now - min(age, TTL)
        relay = self._relays.get(peer)
        if relay is None:
            relay = Relay(peer, source, kept, seen, remote=remote, teller=teller, origins=origins, tallied=now)
            relay.tie()
            if not kept or (source is not Source.CONFIGURED and self._is_too_much(relay.networks, origins)):
                return False
            if len(self._relays) >= MAX_CANDIDATES and not self._make_room(source, origins, now):
                return False
            self._relays[peer] = relay
        elif source is Source.HEARD:
            if relay.source is Source.HEARD:
                self._hear_again(relay, kept, origins, seen)
            return True
        elif _TRUST[source] >= _TRUST[relay.source]:
            relay.meet()
            relay.source = source
            relay.addresses, relay.remote = kept or relay.addresses, remote or relay.remote
        if source is Source.MET and relay.cause is Cause.NO_RELAY:
            relay.wait_until, relay.cause, relay.reason = now, None, ""  # it says that it is one again
        relay.seen = seen
        relay.operator = operator[:MAX_OPERATOR] or relay.operator
        relay.capacity = capacity if capacity is not None else relay.capacity
        relay.tie()
        self._look_at = -math.inf
        return True

    def _hear_again(self, relay: Relay, addresses: tuple[str, ...], origins: tuple[str, ...], seen: float) -> None:
        """Somebody else tells of it, and may know better where it is."""
        relay.seen = max(relay.seen, seen)
        more = tuple(each for each in addresses if each not in relay.addresses)
        if not more or len(relay.origins) >= MAX_TELLERS or not set(origins).isdisjoint(relay.origins):
            return
        if not self._is_too_much(_networks(more) - relay.networks, origins):
            relay.addresses, relay.origins = (*more, *relay.addresses), relay.origins + origins
            relay.wait_until, relay.news = -math.inf, True
            relay.tie()
            self._look_at = -math.inf

    def said(self, peer: PeerId, operator: str, capacity: int | None, now: float) -> None:
        """A relay that we have met told of itself.

        Args:
            operator: who runs it; empty if it does not say.
            capacity: places it has left; ``None`` if it does not say.
        """
        relay = self._relays.get(peer)
        if relay is not None and relay.source is not Source.HEARD:
            relay.operator, relay.capacity, relay.seen = operator[:MAX_OPERATOR], capacity, now
            relay.tie()

    def _is_too_much(self, networks: Iterable[str], origins: Iterable[str]) -> bool:
        """Whether one of these networks, or of those who tell, has as many candidates as it may have."""
        told = self._told_by()
        if any(told[each] >= MAX_PER_TELLER for each in origins):
            return True
        crowd = Counter(network for each in self._relays.values() if not each.reached for network in each.networks)
        return any(crowd[each] >= MAX_PER_NETWORK for each in networks)

    def _told_by(self) -> Counter[str]:
        heard = (each for each in self._relays.values() if each.source is Source.HEARD)
        return Counter(origin for each in heard for origin in each.origins)

    def _make_room(self, source: Source, origins: tuple[str, ...], now: float) -> bool:
        """Forget one of whoever told most, unless that is who tells now; else, for one that we have met, the worst of
        the fullest network.
        """
        idle = [each for each in self._relays.values() if _is_idle(each)]
        told = self._told_by()
        heard = max(
            (each for each in idle if each.source is Source.HEARD),
            key=lambda each: told[each.origins[0]],
            default=None,
        )
        if source is Source.HEARD:
            victim = heard if heard is not None and told[heard.origins[0]] > told[origins[0]] + 1 else None
        else:
            met = [each for each in idle if each.source is Source.MET]
            crowd = Counter(tie for each in met for tie in each.ties)

            def worth(each: Relay) -> tuple[int, float]:
                return -max((crowd[tie] for tie in each.ties), default=0), each.score(now)

            victim = heard or min(met, key=worth, default=None)
        if victim is None:
            return False
        del self._relays[victim.peer]
        return True

    def _prune(self, now: float) -> None:
        if now - self._pruned < 3600:
            return
        self._pruned = now
        spared = (Source.MET, Source.CONFIGURED) if self._alone() else (Source.CONFIGURED,)
        for each in [*self._relays.values()]:
            old = each.streak >= MAX_STREAK or now - each.seen > TTL
            if old and _is_idle(each) and each.source not in spared:
                del self._relays[each.peer]

    # What happened

    def probed(self, peer: PeerId, rtt: float, address: str, now: float, *, dialed: bool = True) -> None:
        """A probe reached a relay.

        Args:
            rtt: seconds of a round trip.
            address: its end of the connection, without its peer id. Shows its network, even if nobody can dial it.
            dialed: whether it was dialed there, and did not come by itself.
        """
        relay = self._relays.get(peer)
        if relay is None:
            return
        self._misses = 0
        self._probe_ended(relay)
        relay.probed = relay.seen = now
        self._look_at = min(self._look_at, now + PROBE_HELD_AGAIN)
        relay.rtt = rtt if relay.rtt is None else 0.7 * relay.rtt + 0.3 * rtt
        relay.meet()
        relay.reached = address
        if dialed:
            family = addr.family(address)
            relay.dialed = (address, *(each for each in relay.dialed if addr.family(each) != family))
        relay.tie()

    def probe_failed(self, peer: PeerId, cause: Cause, reason: str, now: float) -> None:
        """A probe did not reach a relay, or what it reached is none."""
        relay = self._relays.get(peer)
        if relay is not None:
            self._misses += relay.probing
            outdated = relay.probing and relay.news
            self._probe_ended(relay)
            relay.probed = now
            if cause is Cause.NO_RELAY:
                self._place(relay, Place.NONE, now)  # if it stands: nobody is given a circuit by it any more
            if outdated:
                self._look_at = -math.inf
            elif relay.place is Place.NONE:  # else whoever holds the place, or asks for it, will notice
                self._wait(relay, cause, reason, now)

    def failed(self, peer: PeerId, cause: Cause, reason: str, now: float) -> None:
        """A place was not made, or not renewed. One that was not renewed still stands: another is made beside it."""
        relay = self._relays.get(peer)
        if relay is None or relay.place is Place.NONE:
            return
        if relay.place is Place.ASKED:
            self._failed_asks += 1
            self._place(relay, Place.NONE, now)
            self._wait(relay, cause, reason, now)
        else:
            relay.tally(now, bad=1)
            relay.leaving, relay.cause, relay.reason = True, cause, reason

    def reserved(self, peer: PeerId, now: float, *, max_bytes: int | None, max_seconds: float | None) -> None:
        """A place was made, or renewed.

        Args:
            max_bytes, max_seconds: what one circuit may carry, and how long it may last; ``None``: no limit.
        """
        relay = self._relays.get(peer)
        if relay is None or relay.place is Place.NONE:
            return
        relay.large = (max_bytes is None or max_bytes >= LARGE_BYTES) and (
            max_seconds is None or max_seconds >= LONG_SECONDS
        )
        relay.seen = now
        self._failed_asks = 0
        if relay.place is Place.ASKED:
            self._place(relay, Place.RESERVED, now)
            relay.recalled = False
        elif relay.cause is not None and relay.proven:
            relay.leaving, relay.cause, relay.reason = False, None, ""  # renewed at last

    def lost(self, peer: PeerId, reason: str, now: float, *, broke: bool = False) -> None:
        """A place is gone. Whoever held it tries again now, and has `RETRY_PATIENCE` for it.

        One that is lost early a second time was dropped. The first may have been our own line; and if nobody ended the
        connection, that is likelier each time.

        Args:
            broke: whether it was found dead, and neither side had ended it.
        """
        relay = self._relays.get(peer)
        if relay is None or relay.place is not Place.RESERVED:
            return
        held = now - relay.since
        self._place(relay, Place.NONE, now)
        early = held < EARLY and not broke
        if early and relay.streak:
            self._wait(relay, Cause.DROPPED, reason, now)
        else:
            relay.streak += early
            relay.tally(now, bad=1)
            relay.reason = reason
            self._ask(relay, now, RETRY_PATIENCE)

    def network_changed(self, now: float) -> None:
        """We are somewhere else: who could not be reached may be now, and round trips are to be measured again."""
        for each in self._relays.values():
            if each.cause in _PERHAPS_OURS:
                each.wait_until = now
            each.probed = -math.inf
        self._failed_asks = self._misses = 0
        self._look_at = -math.inf

    def offer_changed(self, now: float) -> None:
        """We serve something else: who denied us a place may think better of us, once it knows."""
        for each in self._relays.values():
            if each.cause is Cause.DENIED:
                each.wait_until = min(each.wait_until, now + TELLING)
        self._look_at = -math.inf

    def _wait(self, relay: Relay, cause: Cause, reason: str, now: float) -> None:
        first, longest = WAITS[cause]
        wait = min(first * 2.0 ** min(relay.streak, 16), longest)
        if relay.source is Source.CONFIGURED:
            wait = min(wait, LONGEST_CONFIGURED)
        if self._alone() and cause in _PERHAPS_OURS:
            wait = min(wait, LONGEST_ALONE)
            relay.streak = max(relay.streak, min(relay.streak + 1, 3))
        else:
            relay.tally(now, bad=1)
            relay.streak += 1
        if relay.source is Source.HEARD:
            wait = max(wait, HEARD_WAIT * 2.0 ** (relay.streak - 1))
        relay.cause, relay.reason, relay.recalled = cause, reason, False
        relay.wait_until = now + wait * self._dice.uniform(0.8, 1.2)
        self._look_at = min(self._look_at, relay.wait_until)

    def _alone(self) -> bool:
        return not any(each.place is Place.RESERVED for each in self._places)

    # Choosing

    @property
    def hold(self) -> tuple[PeerId, ...]:
        """The relays to hold places on, those that have to be asked last."""
        return tuple(each.peer for each in sorted(self._places, key=lambda each: each.place is Place.ASKED))

    def knows(self, peer: PeerId) -> bool:
        """Whether a peer is a candidate."""
        return peer in self._relays

    def addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """Where to dial a relay, first where it was reached."""
        relay = self._relays[peer]
        return tuple(sorted(relay.addresses, key=lambda each: each != relay.reached))

    def update(self, now: float, in_use: Collection[PeerId]) -> tuple[PeerId, ...]:
        """Choose anew. Afterwards `hold` and `deadline` say what to do.

        Args:
            in_use: relays through which circuits of ours run.

        Returns:
            The relays to be probed from now on; each probe ends in `probed` or `probe_failed`.
        """
        self._prune(now)
        self._settle(now)
        self._part(now)
        self._regret(now)
        self._fill(now)
        if self._turn_over(now, in_use):
            self._fill(now)
        self._trim(now, in_use)
        self._dismiss(now, in_use)
        probes = self._choose_probes(now)
        self.deadline = min(self._deadlines(now), default=math.inf)
        return probes

    def _settle(self, now: float) -> None:
        for each in [*self._places]:
            if each.place is Place.ASKED and now >= each.since + ASK_TIMEOUT:
                self._failed_asks += 1
                self._place(each, Place.NONE, now)
                self._wait(each, Cause.SILENT, f"no answer within {ASK_TIMEOUT:g} s", now)
            elif each.place is Place.RESERVED and not each.proven and now >= each.since + EARLY:
                each.proven, each.streak, each.cause, each.reason = True, 0, None, ""
                each.tally(now, good=1)

    def _part(self, now: float) -> None:
        """Where a relay really is shows only when it was reached, and who runs it when it was asked: two that share
        that may be held by then. The lesser one is to be replaced, see `_dismiss`.
        """
        kept: set[str] = set()
        for each in sorted(self._places, key=lambda each: (each.place is Place.ASKED, -each.score(now))):
            if kept.isdisjoint(each.ties):
                kept |= each.ties
                each.leaving &= not each.double
                each.double = False
            elif each.place is Place.ASKED:
                self._place(each, Place.NONE, now)
            elif not each.double:
                each.double, each.part_at = True, now + PART_PATIENCE
                each.leaving = True

    def _dismiss(self, now: float, in_use: Collection[PeerId]) -> None:
        """Let go who shares a tie, once nobody can be had in its place, or that takes too long."""
        doubles = [each for each in self._places if each.double and each.peer not in in_use]
        if doubles:
            hope = any(each.place is Place.ASKED for each in self._places) or self._best(now) is not None
            for each in doubles:
                if not hope or now >= each.part_at:
                    self._place(each, Place.NONE, now)

    def _regret(self, now: float) -> None:
        """A newcomer's answer may show that it is worth much less than was thought: then whom it replaces stays."""
        leaving = max(self._may_stay(), key=lambda each: each.score(now), default=None)
        newcomers = [each for each in self._places if each.place is Place.RESERVED and not each.proven]
        if leaving is not None and any(each.score(now) < ROTATION_WORTH * leaving.score(now) for each in newcomers):
            leaving.leaving = False

    def _may_stay(self) -> list[Relay]:
        return [each for each in self._places if each.leaving and not each.double]

    def _fill(self, now: float) -> None:
        while self._missing(now) > 0:
            best = self._best(now) if len(self._places) < self.target + EXTRA else None
            if best is None:
                leaving = self._may_stay()
                if not leaving:
                    return
                max(leaving, key=lambda each: each.score(now)).leaving = False  # nobody can take its place
            elif now < self._last_ask + self._ask_pause():
                return
            else:
                self._last_ask = now
                self._ask(best, now, ASK_PATIENCE)

    def _ask_pause(self) -> float:
        """None for as many as are wanted at once."""
        beyond = self._failed_asks - self.target - EXTRA
        return min(HURRY * HURRY_GROWTH ** min(beyond, 50), ASK_PAUSE) if beyond >= 0 else 0.0

    def _ask(self, relay: Relay, now: float, patience: float) -> None:
        self._place(relay, Place.ASKED, now)
        relay.counts_until = now + patience

    def _best(self, now: float) -> Relay | None:
        """Whom to ask next: before all, who was held when we were last here; who rests, or would leave us with nobody
        but those whom one teller named, only if there is nobody else.
        """
        taken = {tie for each in self._places for tie in each.ties}
        named = Counter(origin for each in self._places if not each.leaving for origin in each.origins)
        crowd = {origin for origin, count in named.items() if count >= max(1, self.target - 1)}
        return max(
            (each for each in self._relays.values() if self._usable(each, now) and taken.isdisjoint(each.ties)),
            key=lambda each: (
                each.recalled,
                each.rest_until <= now,
                not each.origins or not crowd.issuperset(each.origins),
                each.score(now),
            ),
            default=None,
        )

    def _usable(self, relay: Relay, now: float) -> bool:
        known = relay.rtt is not None or relay.source is Source.CONFIGURED
        return relay.place is Place.NONE and known and relay.wait_until <= now

    def _turn_over(self, now: float, in_use: Collection[PeerId]) -> bool:
        """Begin to exchange one relay for another, if it is time. Returns whether it did."""
        holding = self._places
        if self._rotate_at is None:
            self._rotate_at = now + ROTATION * self._dice.uniform(0.9, 1.1)
        if (
            not holding
            or len(holding) != self.target
            or any(each.place is Place.ASKED or each.leaving for each in holding)
        ):
            return False
        free = [each for each in holding if each.peer not in in_use and now - each.since >= UPGRADE_INTERVAL]
        best = self._best(now) if free and now >= min(self._rotate_at, self._upgrade_at) else None
        if best is None or best.rest_until > now:
            return False
        if now >= self._rotate_at:
            self._rotate_at = now + ROTATION * self._dice.uniform(0.9, 1.1)
            like_it = [each for each in free if best.score(now) >= ROTATION_WORTH * each.score(now)]
            if like_it:
                old = self._one_of(like_it)
                old.leaving, old.rest_until = True, now + REST
                return True
        worst = min(free, key=lambda each: each.score(now))
        if now >= self._upgrade_at:
            self._upgrade_at = now + UPGRADE_INTERVAL
            worst.leaving = best.score(now) >= UPGRADE * worst.score(now)
        return worst.leaving

    def _trim(self, now: float, in_use: Collection[PeerId]) -> None:
        """Let go what is beyond the target: who is on the way out, who was asked, who is worst."""
        staying = [each for each in self._places if each.place is Place.RESERVED and not each.leaving]
        if len(staying) < self.target:
            return
        staying.sort(key=lambda each: (each.peer in in_use, each.score(now)), reverse=True)
        kept = staying[: self.target]
        if not all(each.proven for each in kept):
            kept += self._may_stay()
        for each in [*self._places]:
            if each not in kept and each.peer not in in_use:
                self._place(each, Place.NONE, now)

    def _missing(self, now: float) -> int:
        counted = [
            each
            for each in self._places
            if not each.leaving and (each.place is Place.RESERVED or now < each.counts_until)
        ]
        return self.target - len(counted)

    def _place(self, relay: Relay, place: Place, now: float) -> None:
        if relay.place is Place.RESERVED and place is not Place.RESERVED:
            relay.tally(now, hours=(now - relay.since) / 3600)
        if (relay.place is Place.NONE) != (place is Place.NONE):
            self._places = [each for each in self._places if each is not relay] + [relay] * (place is not Place.NONE)
        relay.place, relay.since = place, now
        relay.leaving = relay.double = relay.proven = False
        self._look_at = -math.inf

    # Probing

    def _choose_probes(self, now: float) -> tuple[PeerId, ...]:
        """Relays that are held, as soon as it is time; of the others one at a time, as the pace allows."""
        hungry = self._missing(now) > 0
        if now < self._look_at and hungry == self._hungry:
            return ()
        self._hungry, self._look_at = hungry, math.inf
        room = MAX_PROBES - self._probing
        if not self.target or not room:
            return ()
        chosen: list[Relay] = []
        due: list[Relay] = []
        for each in self._relays.values():
            at = self._probe_due(each)
            if at > now:
                self._look_at = min(self._look_at, at)
            elif each.place is not Place.RESERVED:
                due.append(each)
            elif len(chosen) < room:
                chosen.append(each)
        if due and len(chosen) < room:
            pace = self._pace(now)
            if now >= self._last_probe + pace:
                chosen.append(self._draw(due))
                self._last_probe = now
            self._look_at = min(self._look_at, self._last_probe + pace)
        for each in chosen:
            each.probing, each.news = True, False
        self._probing += len(chosen)
        return tuple(each.peer for each in chosen)

    def _probe_ended(self, relay: Relay) -> None:
        if relay.probing:
            relay.probing = False
            if self._probing == MAX_PROBES:
                self._look_at = -math.inf
            self._probing -= 1

    def _pace(self, now: float) -> float:
        if self._hungry:
            return min(HURRY * HURRY_GROWTH ** min(self._misses, 50), PROBE_INTERVAL)
        usable = sum(self._usable(each, now) for each in self._relays.values())
        return PROBE_INTERVAL if usable < ENOUGH else PROBE_INTERVAL_LATER

    def _draw(self, due: list[Relay]) -> Relay:
        """One of those that were never probed, the more trusted first, at random, so that no order can be forced."""
        first = max((each.rtt is None, _TRUST[each.source]) for each in due)
        return self._one_of([each for each in due if (each.rtt is None, _TRUST[each.source]) == first])

    def _one_of(self, relays: list[Relay]) -> Relay:
        return relays[min(int(self._dice.uniform(0, len(relays))), len(relays) - 1)]

    def _probe_due(self, relay: Relay) -> float:
        if relay.probing or relay.place is Place.ASKED:
            return math.inf
        again = PROBE_HELD_AGAIN if relay.place is Place.RESERVED else PROBE_AGAIN
        fresh = relay.rtt is None and relay.place is Place.NONE  # then only its waits hold it back
        first = self._hearsay_from if relay.source is Source.HEARD else -math.inf
        return max(relay.wait_until, relay.probed + (0.0 if fresh else again), first)

    def _deadlines(self, now: float) -> Iterator[float]:
        holding = self._places
        staying = 0
        for each in holding:
            if each.place is Place.ASKED:
                yield each.counts_until if each.counts_until > now else each.since + ASK_TIMEOUT
            else:
                staying += not each.leaving
                if not each.proven:
                    yield each.since + EARLY
        if staying > self.target or any(each.leaving for each in holding):
            yield now + CIRCUIT_CHECK
        if not self.target:
            return
        if len(holding) == self.target == staying and self._rotate_at is not None:
            # Both are looked at together; what could not be done waits for the next look.
            yield max(min(self._rotate_at, self._upgrade_at), now + UPGRADE_INTERVAL / 10)
        if self._look_at > now:
            yield self._look_at
        if self._missing(now) > 0:
            if (ask_at := self._last_ask + self._ask_pause()) > now:
                yield ask_at
            for relay in self._relays.values():
                if relay.place is Place.NONE and relay.wait_until > now:
                    yield relay.wait_until

    # Telling and remembering

    def appetite(self, now: float) -> Appetite:
        """Whether others are to be asked for relays."""
        if not self.target:
            return Appetite.NONE
        usable = sum(each.place is Place.RESERVED or self._usable(each, now) for each in self._relays.values())
        if self._missing(now) > 0 or usable < SPARE * self.target:
            return Appetite.HUNGRY
        return Appetite.SOME if usable < ENOUGH else Appetite.NONE

    def tell(self, now: float) -> tuple[Told, ...]:
        """What others may be told: relays on which we hold a place, or held one and know of nothing against; where we
        reached them ourselves. The best first.
        """
        worth = [
            each
            for each in self._relays.values()
            if each.dialed and (each.place is Place.RESERVED or (each.hours > 0 and each.cause is None))
        ]
        worth.sort(key=lambda each: (each.place is Place.RESERVED, each.score(now)), reverse=True)
        return tuple(
            Told(
                each.peer,
                each.dialed,
                each.operator,
                each.capacity,
                0.0 if each.place is Place.RESERVED else now - each.seen,
            )
            for each in worth
        )

    def status(self, now: float) -> tuple[RelayStatus, ...]:
        """All relays: held ones first, then by score."""
        found = [
            RelayStatus(
                peer=each.peer,
                addresses=self.addresses_of(each.peer),
                operator=each.operator,
                source=each.source,
                teller=each.teller,
                place=each.place,
                score=each.score(now),
                rtt=each.rtt,
                seconds=0.0 if each.place is Place.NONE else now - each.since,
                leaving=each.leaving,
                reason=each.reason,
                wait=max(0.0, each.wait_until - now),
            )
            for each in self._relays.values()
        ]
        return tuple(sorted(found, key=lambda each: (each.place is Place.NONE, -each.score)))

    def dump(self, now: float, wall: float) -> str:
        """What is to be remembered over a restart.

        Args:
            wall: seconds since the epoch.
        """
        worth = [each for each in self._relays.values() if each.rtt is not None]
        worth.sort(key=lambda each: (each.place is Place.RESERVED, each.score(now)), reverse=True)
        return json.dumps(
            {"format": FORMAT, "relays": [_saved(each, now, wall) for each in worth[:MAX_SAVED]]}, indent=1
        )

    def load(self, text: str, now: float, wall: float) -> int:
        """Take what was remembered. Call it before anything else is told.

        Returns:
            How many entries were left out as they are damaged.

        Raises:
            ValueError: the text is no such file; says why.
        """

        def take(values: Any) -> None:
            relay = _loaded(values, now, wall)
            self._relays[relay.peer] = relay

        return read_entries(text, "relays", FORMAT, MAX_SAVED, take)


def _is_idle(relay: Relay) -> bool:
    return relay.place is Place.NONE and not relay.probing


def _saved(relay: Relay, now: float, wall: float) -> dict[str, Any]:
    held = (now - relay.since) / 3600 if relay.place is Place.RESERVED else 0.0
    fade = _fade(now - relay.tallied)
    return {
        "peer": relay.peer,
        "addresses": relay.addresses,
        "reached": relay.reached,
        "operator": relay.operator,
        "held": relay.place is Place.RESERVED and not relay.leaving,
        "rtt": relay.rtt,
        "good": round(relay.good * fade, 3),
        "bad": round(relay.bad * fade, 3),
        "hours": round(relay.hours * fade + held, 3),
        "large": relay.large,
        "seen": round(wall - (now - relay.seen)),
        "cause": relay.cause,
        "reason": relay.reason,
        "streak": relay.streak,
        "wait_until": round(wall + max(relay.wait_until - now, 0.0)),
        "rest_until": round(wall + max(relay.rest_until - now, 0.0)),
    }


def _loaded(values: dict[str, Any], now: float, wall: float) -> Relay:
    def number(name: str, low: float, high: float) -> float:
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}")
        return float(value)

    def text(name: str, longest: int) -> str:
        value = values[name]
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"{name} is {value!r}")
        return value

    def ahead(name: str, longest: float) -> float:
        """A time to come, as the clock may have been wrong no later than can be."""
        return now + min(max(number(name, 0, 1e12) - wall, 0.0), longest)

    if not isinstance(values["addresses"], list) or not isinstance(values["held"], bool):
        raise ValueError("an entry has no addresses")
    if values["large"] not in (None, True, False):
        raise ValueError(f"large is {values['large']!r}")
    reached = text("reached", addr.MAX_ADDRESS_LENGTH)
    relay = Relay(
        peer=addr.parse_peer_id(text("peer", addr.MAX_PEER_ID_LENGTH)),
        source=Source.MET,
        addresses=tuple(str(addr.parse(each)) for each in values["addresses"][:MAX_ADDRESSES]),
        reached=str(addr.parse(reached)) if reached else "",
        operator=text("operator", MAX_OPERATOR),
        recalled=values["held"],
        rtt=number("rtt", 0, 60),
        good=number("good", 0, 1e6),
        bad=number("bad", 0, 1e6),
        hours=number("hours", 0, 1e6),
        large=values["large"],
        tallied=now,
        seen=now - min(max(wall - number("seen", 0, 1e12), 0.0), TTL),
        cause=None if values["cause"] is None else Cause(values["cause"]),
        reason=text("reason", 1024),
        streak=int(number("streak", 0, 1e6)),
        wait_until=ahead("wait_until", max(longest for _, longest in WAITS.values())),
        rest_until=ahead("rest_until", REST),
    )
    if not relay.addresses:
        raise AddressError(f"{relay.peer} has no address")
    relay.tie()
    return relay
