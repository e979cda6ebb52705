"""Which addresses of ours a peer is told, and which of its addresses are dialed. Facts in, a list out; no I/O.

Ours
    Where a SYN from outside can arrive at our listen port: IPv6 first, as there is often no NAT to cross; then where
    others see us, what a router has mapped, and what we listen on. Public ones only. Local ones are told when both
    sides have agreed on it, which the caller knows.

Theirs
    What the peer says is a claim, and each SYN that it makes us send could be meant for somebody else. So an address
    counts as the peer's if somebody else has seen the peer at its host (IPv6: its /64): the relay, or we ourselves. All
    others are untrusted: few of them are dialed, and each host only a few times, however many peers name it (`Budget`).
    Ports below 1024, our own addresses, and everything that is not public are never dialed.

    Where the relay sees the peer comes first, whatever the peer says: rust-libp2p 0.57 writes its listen port over the
    port that its NAT gave it. A peer that names nothing usable (the reference overlay's CONNECT is empty) is looked for
    at what it told by identify.

Predicted ports are not listed here: who dials extrapolates them.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain

from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.errors import AddressError
from kas_libp2p.metadata import PeerId
from kas_libp2p.transport._punch import Target

MAX_OURS = 8
"""Addresses that a peer is told: two families, each observed, mapped and listened on, and one to spare."""
MAX_TARGETS = 8
"""Addresses of a peer that are dialed at once."""
MAX_UNTRUSTED = 4
"""Of them, those where nobody else has seen the peer: its IPv6 address behind an IPv4 relay, mostly."""
HOST_BURST, HOST_INTERVAL = 2, 300.0
"""Attempts in which one untrusted host is dialed at once, and seconds for each one more, whoever names it: two for an
honest peer. A victim gets two SYNs, or eight if it refuses them (`kas_libp2p.transport._punch.UNTRUSTED_DIALS`)."""
PEER_BURST, PEER_INTERVAL = 8, 60.0
"""Dials to untrusted hosts that one peer can cause at once, and seconds for each one more: nobody scans through us."""
ALL_BURST, ALL_INTERVAL = 64, 1.0
"""Dials to untrusted hosts in all at once, and seconds for each one more: peer ids cost nothing."""
VOUCHED_BURST, VOUCHED_INTERVAL = 12, 20.0
"""Attempts at once in which one trusted host is dialed without end, and seconds for each one more, whoever is said to
be there. Beyond, it is as untrusted as any other. A relay can name a victim, too, and peers as many as it likes, and a
victim that refuses gets all dials of an attempt (`kas_libp2p.transport._punch.MAX_DIALS`). A dozen peers behind one
router come back at once after an outage, and most are met at the first attempt."""
RELAY_BURST, RELAY_INTERVAL = 64, 5.0
"""Trusted hosts that are dialed at once for peers of one relay, each attempt counted, and seconds for each one more.
Beyond, they are as untrusted as any other: who names another victim each time has no more of them. All peers that one
relay brings by default come back at once after an outage, each seen in both families."""


@dataclass(frozen=True, slots=True)
class Own:
    """Where we can be met, as multiaddr texts; the best first.

    Attributes:
        observed: where others see our listen port.
        mapped: ports that routers gave us.
        listen: what we listen on, wildcards replaced.
        local: addresses inside our site; empty unless both sides share a public address and have agreed to try them.
    """

    observed: Sequence[str] = ()
    mapped: Sequence[str] = ()
    listen: Sequence[str] = ()
    local: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """What we know of a peer without its CONNECT, and what must not be dialed.

    Attributes:
        observed: where others have seen it, as multiaddr texts: the relay of this circuit first, then we ourselves.
        identified: its listen addresses as it told by identify.
        own: addresses of our own.
        local: networks of ours (``192.168.1.0/24``) in which its private addresses may be dialed; empty unless both
            sides share a public address and have agreed to try them.
    """

    observed: Sequence[str] = ()
    identified: Sequence[str] = ()
    own: Collection[str] = ()
    local: Sequence[str] = ()


class Fault(StrEnum):
    """Why an address is not dialed, or not told."""

    NOT_TCP = "not_tcp"
    """No plain TCP address: another transport, a name, a circuit, an address with a zone."""
    OTHER_PEER = "other_peer"
    """It names another peer."""
    NO_PORT = "no_port"
    LOW_PORT = "low_port"
    LOOPBACK = "loopback"
    MULTICAST = "multicast"
    PRIVATE = "private"
    RESERVED = "reserved"
    """None of the kinds above, and not public."""
    OWN = "own"
    TOO_MANY = "too_many"
    """Beyond `MAX_TARGETS`, or untrusted and beyond `MAX_UNTRUSTED`."""
    BUDGET = "budget"
    """Untrusted, and its host has had its dials: see `Budget`."""


@dataclass(frozen=True, slots=True)
class Found:
    """What comes of a peer's addresses.

    Attributes:
        targets: what to dial, the trusted ones first.
        refused: how many addresses were left out, and why.
    """

    targets: tuple[Target, ...]
    refused: Counter[Fault]


def ours(own: Own, *, allow_private: bool = False) -> tuple[Multiaddr, ...]:
    """The addresses to tell a peer, without our peer id.

    Args:
        allow_private: for laboratories: private addresses count as public ones do.
    """
    told = [(each, allow_private) for each in chain(own.observed, own.mapped, own.listen)]
    told += [(each, True) for each in own.local]
    found: dict[Multiaddr, None] = {}
    for each, private in told:
        address = _plain(each)
        if isinstance(address, Multiaddr) and _fault(address, private) is None:
            found[address] = None
    return tuple(sorted(found, key=lambda each: addr.family(each) != 6))[:MAX_OURS]


def theirs(told: Iterable[str], known: Known, peer: PeerId, *, allow_private: bool = False) -> Found:
    """What to dial of a peer's addresses.

    Args:
        told: what its CONNECT lists.
        known: what we know beside.
        peer: who it is.
        allow_private: for laboratories: private addresses may be dialed.
    """
    refused: Counter[Fault] = Counter()
    own = {_plain(each) for each in known.own}
    hosts = {addr.subnet_key(each) for each in map(_plain, known.observed) if isinstance(each, Multiaddr)}
    networks = [ipaddress.ip_network(each) for each in known.local]

    def usable(texts: Iterable[str]) -> dict[Multiaddr, None]:
        found: dict[Multiaddr, None] = {}
        for each in texts:
            address = _plain(each, peer)
            if isinstance(address, Fault):
                refused[address] += 1
                continue
            fault = _fault(address, allow_private or _is_in(address, networks))
            if address in own:
                fault = Fault.OWN
            if fault is None:
                found[address] = None
            else:
                refused[fault] += 1
        return found

    seen = usable(known.observed)
    claimed = usable(told) or usable(known.identified)
    rest = [
        Target(each, trusted=addr.subnet_key(each) in hosts, local=_is_in(each, networks))
        for each in claimed
        if each not in seen
    ]
    rest.sort(key=lambda each: (not each.trusted, addr.family(each.address) != 6))
    kept: list[Target] = []
    untrusted = 0
    for target in chain((Target(each, trusted=True) for each in seen), rest):
        untrusted += not target.trusted
        if len(kept) == MAX_TARGETS or untrusted > MAX_UNTRUSTED:
            refused[Fault.TOO_MANY] += 1
        else:
            kept.append(target)
    return Found(tuple(kept), refused)


class Budget:
    """How often hosts are dialed: those at which nobody but the peer that names them has seen it, and all others."""

    def __init__(self) -> None:
        self._vouched = Rates(VOUCHED_BURST, VOUCHED_INTERVAL)
        self._per_relay = Rates(RELAY_BURST, RELAY_INTERVAL)
        self._per_host = Rates(HOST_BURST, HOST_INTERVAL)
        self._per_peer = Rates(PEER_BURST, PEER_INTERVAL)
        self._in_all = Rates(ALL_BURST, ALL_INTERVAL)

    def spend(self, found: Found, peer: PeerId, relay: PeerId, now: float) -> Found:
        """What of it may be dialed now, which is counted as dialed.

        Args:
            peer: whose addresses they are.
            relay: through which the peer was met.
        """
        kept: list[Target] = []
        refused = Counter(found.refused)
        vouched = {addr.subnet_key(each.address) for each in found.targets if each.trusted}
        trusted = {host for host in vouched if _take(now, (self._vouched, host), (self._per_relay, relay))}
        for target in found.targets:
            host = addr.subnet_key(target.address)
            if target.trusted and host in trusted:
                kept.append(target)
            elif _take(now, (self._per_host, host), (self._per_peer, peer), (self._in_all, None)):
                kept.append(replace(target, trusted=False))
            else:
                refused[Fault.BUDGET] += 1
        return Found(tuple(kept), refused)


def _take(now: float, *rates: tuple[Rates, str | None]) -> bool:
    """Take one of each, if all of them have it."""
    return all(rate.allows(key, now) for rate, key in rates) and all(rate.take(key, now) for rate, key in rates)


def _plain(text: str, peer: PeerId | None = None) -> Multiaddr | Fault:
    """The address as ``/ip4|ip6/…/tcp/…`` in its one form, a mapped IPv4 address as IPv4; or what is wrong with it."""
    try:
        where = addr.ip_port(text)
        if where is None or "%" in where[0]:
            return Fault.NOT_TCP
        if peer is not None and addr.peer_of(text) not in (None, peer):
            return Fault.OTHER_PEER
        return addr.from_ip_port(*where)
    except AddressError:
        return Fault.NOT_TCP


def _fault(address: Multiaddr, private: bool) -> Fault | None:
    where = addr.ip_port(address)
    assert where is not None
    if not where[1]:
        return Fault.NO_PORT
    if where[1] < addr.LEAST_PORT:
        return Fault.LOW_PORT
    if addr.is_public(address):
        return None
    if addr.is_loopback(address):
        return Fault.LOOPBACK
    if addr.is_multicast(address):
        return Fault.MULTICAST
    if addr.is_private(address):
        return None if private and not addr.is_link_local(address) else Fault.PRIVATE
    return Fault.RESERVED


def _is_in(address: Multiaddr, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    where = addr.ip_port(address)
    return where is not None and any(ipaddress.ip_address(where[0]) in network for network in networks)
