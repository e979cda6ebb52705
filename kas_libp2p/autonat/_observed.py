"""Where others see us, how far that can be believed, and what it says of our NAT. No I/O.

**Groups.** One who runs a thousand peers can tell us a thousand times where we are. So what counts is not peers but
groups: the /16 of an IPv4 address, the /48 of an IPv6 address. Each group has one voice, its latest. One voice is
enough to try a punch with, for that costs one SYN; two that say the same are needed before an address is told to
others.

**The thin waist.** An observation is about the port that the connection used on this side. Only our listen port leads
back to us, so a connection from any other port says which IP we have, and nothing about ports.

**Lies.** Where two groups agree on our IP, who says another is not heard. Where two agree on IP and port, the same,
unless the NAT gives each destination a port of its own. What can't be seen from outside is refused: private and
synthetic addresses, other families, circuits. Who sits in our own site sees us from within, which is true and no use.

**The mapping.** From one port to two places: the same endpoint at both, and the mapping is endpoint-independent;
another one at each, and it is not. More voices decide by majority, so from three groups on one liar changes nothing.

State: one observation per observer's IP (IPv6: /64), direction, and whether our listen port was used, `MAX_OBSERVERS`
at most. Beyond, the loudest group loses its oldest, those of ended connections first.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError

MAX_OBSERVERS = 128
"""Observations held, at some 300 bytes each."""
MAX_CANDIDATES = 4
"""Endpoints of one family that a punch is tried with."""
KEEP = 1800.0
"""Seconds that an observation counts after its connection has ended: we keep our IP for longer, and peers come back."""
DIALS = 64
"""Dials that are remembered, to know how far a NAT has counted. Ports further ahead are not guessed anyway."""
TOGETHER = 2.0
"""Seconds within which connections may have been dialed at once: a slow one is up so much later than a fast one."""
CONFIRMED = 2
"""Groups that have to agree."""


class Mapping(StrEnum):
    """How a NAT chooses the outer port (RFC 4787 section 4.1)."""

    UNKNOWN = "unknown"
    """Less than two groups have told."""
    NONE = "none"
    """There is no NAT: others see the address that we have."""
    INDEPENDENT = "endpoint-independent"
    """One outer port, whoever is dialed: it can be told to others."""
    DEPENDENT = "endpoint-dependent"
    """Another outer port for each destination: nobody can know it."""


@dataclass(frozen=True, slots=True)
class NatView:
    """What is known of the NAT of one family.

    Attributes:
        mapping: see there.
        keeps_port: whether the outer port is the one that we dialed from; ``None``: not known.
    """

    mapping: Mapping
    keeps_port: bool | None


@dataclass(frozen=True, slots=True)
class _Observation:
    connection: int
    group: str
    endpoint: tuple[str, int]
    local: tuple[str, int]
    through_listener: bool
    outbound: bool
    at: float
    alive: bool = True


class GroupOf:
    """Which group an address belongs to.

    Args:
        laboratory: /24 instead of /16, as whole internets fit into one /16 there.
    """

    def __init__(self, *, laboratory: bool = False) -> None:
        self._bits = {4: 24 if laboratory else 16, 6: 48}

    def __call__(self, address: str) -> str:
        """The network as text; the IP may stand alone or in a multiaddr.

        Raises:
            AddressError: it holds no IP.
        """
        where = addr.ip_port(address) if address.startswith("/") else (address, 0)
        try:
            ip = ipaddress.ip_address(where[0].partition("%")[0] if where is not None else "")
        except ValueError:
            raise AddressError(f"{address} holds no IP address") from None
        return str(ipaddress.ip_network((ip, self._bits[ip.version]), strict=False))


class Observed:
    """What others have told about where they see us.

    Args:
        group_of: see `GroupOf`.
        allow_private: whether private addresses are believed too, for laboratories.
    """

    def __init__(self, group_of: GroupOf, *, allow_private: bool = False) -> None:
        self._group_of = group_of
        self._allow_private = allow_private
        self._known: dict[tuple[str, bool, bool], _Observation] = {}  # the longest unheard first
        self._dials: deque[tuple[float, str]] = deque(maxlen=DIALS)

    def __len__(self) -> int:
        return len(self._known)

    def record(
        self,
        *,
        connection: int,
        remote: str,
        local: str,
        observed: str,
        outbound: bool,
        listen_ports: Iterable[int],
        now: float,
    ) -> str | None:
        """A peer told where it sees us.

        Args:
            connection: number of the direct connection that it is about.
            remote, local: the ends of it, as multiaddr text.
            observed: what the peer told.
            outbound: whether we dialed.
            listen_ports: ports that we listen on.
            now: seconds on a monotonic clock.

        Returns:
            ``None``, or why it is not believed, in one word.
        """
        try:
            there, here, seen = addr.ip_port(remote), addr.ip_port(local), addr.ip_port(observed)
            if addr.is_relayed(observed):
                return "relayed"
        except AddressError:
            return "malformed"
        if there is None or here is None:
            return "relayed"
        if seen is None or not seen[1] or "%" in seen[0]:  # zones are ours to give
            return "malformed"
        if (":" in seen[0]) is not (":" in here[0]):
            return "family"
        if not self._counts(there[0]):
            return None  # from within our site: true, and no use
        if not self._counts(seen[0]):
            return "private"
        through_listener = here[1] in set(listen_ports)
        key = addr.subnet_key(there[0]), outbound, through_listener
        self._known.pop(key, None)
        self._known[key] = _Observation(
            connection, self._group_of(there[0]), seen, here, through_listener, outbound, now
        )
        if len(self._known) > MAX_OBSERVERS:
            self._evict()
        return None

    def ended(self, connection: int, now: float) -> None:
        """A connection ended: what was told on it counts for a while."""
        for key, each in self._known.items():
            if each.connection == connection and each.alive:
                self._known[key] = replace(each, alive=False, at=now)

    def _evict(self) -> None:
        crowds = Counter(each.group for each in self._known.values())
        loudest = max(crowds.values())
        crowded = [key for key, each in self._known.items() if crowds[each.group] == loudest]
        del self._known[next((key for key in crowded if not self._known[key].alive), crowded[0])]

    def prune(self, now: float) -> None:
        """Forget what has become too old."""
        self._known = {key: each for key, each in self._known.items() if each.alive or now - each.at < KEEP}

    def endpoints(self, family: int, now: float) -> dict[tuple[str, int], int]:
        """Where our listen port is seen, and by how many groups, the most first. One voice against two is left out."""
        voices = self._voices(family, now, through_listener=True)
        ips = Counter(each.endpoint[0] for each in self._voices(family, now).values())
        agreed = max(ips.values(), default=0) >= CONFIRMED
        found = Counter(each.endpoint for each in voices.values() if not agreed or ips[each.endpoint[0]] >= CONFIRMED)
        if max(found.values(), default=0) >= CONFIRMED:
            found = Counter({endpoint: count for endpoint, count in found.items() if count >= CONFIRMED})
        return dict(found.most_common())  # of equals the longest known first

    def confirmed(self, family: int, now: float) -> tuple[str, ...]:
        """Addresses that enough groups agree on: they may be told to others once they are verified."""
        return tuple(
            addr.ip_port_text(*endpoint)
            for endpoint, groups in self.endpoints(family, now).items()
            if groups >= CONFIRMED
        )

    def candidates(self, family: int, now: float) -> tuple[str, ...]:
        """Addresses to punch with, the best first."""
        return tuple(addr.ip_port_text(*endpoint) for endpoint in self.endpoints(family, now))[:MAX_CANDIDATES]

    def nat(self, family: int, now: float) -> NatView:
        """What kind of NAT there is."""
        voices = list(self._voices(family, now, through_listener=True, outbound=True).values())
        seen = Counter(each.endpoint for each in voices)
        if len(voices) < CONFIRMED:
            return NatView(Mapping.UNKNOWN, None)
        (endpoint, count), *_ = seen.most_common(1)
        if count >= CONFIRMED and 2 * count > len(voices):
            local = next(each.local for each in reversed(voices) if each.endpoint == endpoint)
            return NatView(Mapping.NONE if endpoint == local else Mapping.INDEPENDENT, endpoint[1] == local[1])
        one_ip = Counter(each.endpoint[0] for each in voices).most_common(1)[0][1] == len(voices)
        if count == 1 and (one_ip or len(voices) > CONFIRMED):
            return NatView(Mapping.DEPENDENT, all(each.endpoint[1] == each.local[1] for each in voices))
        return NatView(Mapping.UNKNOWN, None)

    def dialed(self, ip: str, now: float) -> None:
        """A dial from our listen port is about to begin."""
        self._dials.append((now, ip))

    def sightings(self, family: int, now: float) -> tuple[tuple[float, int], ...]:
        """The outer ports that were seen of what we dialed from our listen port: seconds since then, and the port.

        In the order in which the dials began; those of one moment (`TOGETHER`), of which nobody knows which packet left
        first, by their ports.
        """
        found: list[tuple[float, int]] = []
        moment: list[tuple[float, int]] = []
        voices = self._voices(family, now, through_listener=True, outbound=True).values()
        for each in sorted(voices, key=lambda each: each.at):
            if moment and moment[0][0] - (now - each.at) > TOGETHER:
                found += sorted(moment, key=lambda sighting: sighting[1])
                moment = []
            moment.append((now - each.at, each.endpoint[1]))
        found += sorted(moment, key=lambda sighting: sighting[1])
        return tuple(found)

    def dials_since(self, family: int, at: float) -> int:
        """To how many IPs we have dialed from our listen port since then: so far has a NAT counted that counts."""
        return len({ip for when, ip in self._dials if when > at and (6 if ":" in ip else 4) == family})

    def _voices(
        self, family: int, now: float, *, through_listener: bool = False, outbound: bool = False
    ) -> dict[str, _Observation]:
        """The latest observation of each group; of ended connections only where no open one has told, and last."""
        open_ones: dict[str, _Observation] = {}
        ended: dict[str, _Observation] = {}
        for each in self._known.values():
            if (6 if ":" in each.endpoint[0] else 4) != family:
                continue
            if (through_listener and not each.through_listener) or (outbound and not each.outbound):
                continue
            if each.alive:
                open_ones[each.group] = each
            elif now - each.at < KEEP:
                ended[each.group] = each
        return open_ones | {group: each for group, each in ended.items() if group not in open_ones}

    def _counts(self, ip: str) -> bool:
        if addr.is_public(ip):
            return True
        return self._allow_private and (addr.is_private(ip) or addr.is_loopback(ip))
