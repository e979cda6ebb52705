"""Who may connect, and how many: the gate and the limits. No I/O.

A connection holds one `Ticket` from the moment it is accepted or dialed until it is gone. Whatever ends it, releasing
the ticket gives back every place that it held, once. So a limit can't leak as long as tickets are released in a
``finally``.

What is asked, and when

* An inbound connection: before the first byte is read. The IP must not be denied or banned, must be allowed where only
  networks are, and there must be room: in all, inbound, in handshakes, and for this IP (an IPv6 /64 counts as one).
* An address that we would dial: that its IP is not denied or banned.
* A proven peer: that it is not denied or banned, is allowed, and has room (connections per peer).
* The policy, if there is one, last, each time: what is refused by a list never reaches it.

Each refusal is a `Refused` that names the setting.

Places in handshakes are few, and who says nothing holds one until its time is up. So when they are all taken, one is
given to the newcomer: of the host that has more of them than the newcomer would have, the oldest; else the oldest of
all, once it has had the time that an honest handshake takes. All who come through one relay count as one host here. A
crowd of silent strangers keeps nobody out.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from kas_libp2p import addresses
from kas_libp2p.config import Limits
from kas_libp2p.errors import AddressError, ConfigError, Refused
from kas_libp2p.metadata import Direction, PeerId

HANDSHAKE_GRACE = 2.0
"""Seconds in which no handshake has to make room for one of another host: two round trips of 500 ms, and a lost SYN."""
MAX_BANS = 4096
"""Bans held at once. Beyond it the one that ends first is dropped."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy is asked about.

    Attributes:
        direction: who opens the connection.
        ip: the remote IP, ``None`` where a relay stands between.
        peer: the proven peer (or the one to be dialed); ``None`` before the handshake of an inbound connection.
    """

    direction: Direction
    ip: str | None
    peer: PeerId | None


Policy = Callable[[Candidate], str | None]
"""Returns why not, or ``None`` to let the connection pass. Must not block."""


class _Rules:
    """Peer ids and IP networks."""

    def __init__(self, entries: Iterable[str], setting: str) -> None:
        self.peers: set[PeerId] = set()
        self.networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in entries:
            try:
                self.networks.append(ipaddress.ip_network(entry, strict=False))
                continue
            except ValueError:
                pass
            try:
                self.peers.add(addresses.parse_peer_id(entry))
            except AddressError:
                raise ConfigError(
                    f"{setting}: {entry!r} is neither a peer id nor an IP network like 192.0.2.0/24"
                ) from None

    def __bool__(self) -> bool:
        return bool(self.peers or self.networks)

    def has_ip(self, ip: str | None) -> bool:
        if ip is None or not self.networks:
            return False
        where = ipaddress.ip_address(ip)
        if isinstance(where, ipaddress.IPv6Address) and where.ipv4_mapped is not None:
            where = where.ipv4_mapped
        return any(where in network for network in self.networks)


class Ticket:
    """The places that one connection holds. Made by `Admission`.

    Attributes:
        direction, ip, peer: as far as they are known.
        since: when it was given.
        evict: called if it was taken back for another one's sake, while in its handshake; ``None``: it can't be.
    """

    __slots__ = ("_admission", "_crowd", "_host", "_open", "_pending", "direction", "evict", "ip", "peer", "since")

    def __init__(
        self,
        admission: Admission,
        direction: Direction,
        ip: str | None,
        host: str | None,
        since: float,
        relay: PeerId | None = None,
    ) -> None:
        self._admission = admission
        self._host = host
        self._crowd = host or relay
        self._pending = True
        self._open = True
        self.direction = direction
        self.ip = ip
        self.peer: PeerId | None = None
        self.since = since
        self.evict: Callable[[], None] | None = None

    def establish(self, peer: PeerId, now: float, ip: str | None = None) -> None:
        """The handshake is done. The ticket stays to be released also if this refuses.

        Args:
            peer: who it is.
            ip: the remote IP, if it was not known before.

        Raises:
            Refused: the peer may not connect.
        """
        self.ip = ip or self.ip
        self._admission._establish(self, peer, now)

    def release(self) -> None:
        """Give everything back. May be called again."""
        if self._open:
            self._open = False
            self._admission._release(self)


class Admission:
    """The gate and the limits of one node.

    Args:
        limits: how many.
        allow, deny: peer ids and IP networks, as in the configuration.

    Attributes:
        policy: asked last, see `Policy`.

    Raises:
        ConfigError: a list has a wrong entry.
    """

    def __init__(self, limits: Limits, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        self.limits = limits
        self.policy: Policy | None = None
        self._allow = _Rules(allow, "allow")
        self._deny = _Rules(deny, "deny")
        self._bans: dict[str, float] = {}
        self._total = 0
        self._inbound = 0
        self._shaking: dict[Ticket, None] = {}  # inbound, the oldest first
        self._outbound = 0
        self._per_host: Counter[str] = Counter()
        self._per_peer: Counter[PeerId] = Counter()

    # Asking

    def admit_inbound(self, ip: str | None, now: float, relay: PeerId | None = None) -> Ticket:
        """An inbound connection was accepted, nothing was read yet.

        Args:
            ip: where from; ``None`` where a relay stands between.
            relay: which.

        Raises:
            Refused: it has to be dropped.
        """
        host = _host(ip)
        self._check_ip(ip, now)
        if self._allow and not self._allow.peers and not self._allow.has_ip(ip):
            raise Refused("allow", f"{ip} is not on the allow list")
        limits = self.limits
        if self._total >= limits.max_connections:
            raise Refused("max_connections", f"there are {self._total} connections")
        if self._inbound >= limits.max_inbound:
            raise Refused("max_inbound", f"there are {self._inbound} inbound connections")
        if host is not None and self._per_host[host] >= limits.max_per_ip:
            raise Refused("max_per_ip", f"there are {self._per_host[host]} connections from {host}")
        self._ask(Candidate(Direction.INBOUND, ip, None))
        if len(self._shaking) >= limits.max_pending_inbound and not self._make_room(host or relay, now):
            raise Refused("max_pending_inbound", f"{len(self._shaking)} inbound connections are in their handshakes")
        ticket = Ticket(self, Direction.INBOUND, ip, host, now, relay)
        self._total += 1
        self._inbound += 1
        self._shaking[ticket] = None
        if host is not None:
            self._per_host[host] += 1
        return ticket

    def admit_dial(self, peer: PeerId | None, now: float) -> Ticket:
        """We are about to dial, or to take the initiator's part on a pipe that was made otherwise.

        Raises:
            Refused: the peer is denied or banned, or there is no room.
        """
        if peer is not None:
            self._check_peer(peer, now)
        if self._total >= self.limits.max_connections:
            raise Refused("max_connections", f"there are {self._total} connections")
        if self._outbound >= self.limits.max_outbound:
            raise Refused("max_outbound", f"there are {self._outbound} outbound connections")
        self._ask(Candidate(Direction.OUTBOUND, None, peer))
        self._total += 1
        self._outbound += 1
        return Ticket(self, Direction.OUTBOUND, None, None, now)

    def check_peer(self, peer: PeerId, now: float) -> None:
        """A peer wants to come in, as a relay says. It is asked about as any other once it has proven who it is.

        Raises:
            Refused: it is denied or banned, or not allowed.
        """
        self._check_peer(peer, now)
        if self._allow and peer not in self._allow.peers:
            raise Refused("allow", f"{peer} is not on the allow list")
        self._ask(Candidate(Direction.INBOUND, None, peer))

    def _make_room(self, newcomer: str | None, now: float) -> bool:
        """Take a place in the handshakes back, if one can be taken in fairness."""
        shaking = [ticket for ticket in self._shaking if ticket.evict is not None]
        crowds = Counter(ticket._crowd for ticket in self._shaking if ticket._crowd is not None)
        crowded = max(shaking, key=lambda ticket: crowds[ticket._crowd or ""], default=None)
        if crowded is None:
            return False
        if crowds[crowded._crowd or ""] <= crowds[newcomer or ""] + 1:
            crowded = shaking[0]
            if now - crowded.since < HANDSHAKE_GRACE:
                return False
        assert crowded.evict is not None
        crowded.evict()
        crowded.release()
        return True

    def check_address(self, ip: str | None, peer: PeerId | None, now: float) -> None:
        """We are about to dial this IP.

        Raises:
            Refused: it is denied or banned.
        """
        self._check_ip(ip, now)
        self._ask(Candidate(Direction.OUTBOUND, ip, peer))

    def _check_ip(self, ip: str | None, now: float) -> None:
        if ip is None:
            return
        if self._deny.has_ip(ip):
            raise Refused("deny", f"{ip} is on the deny list")
        if self._bans and self._banned(addresses.subnet_key(ip), now):
            raise Refused("ban", f"{ip} is banned")

    def _check_peer(self, peer: PeerId, now: float) -> None:
        if peer in self._deny.peers:
            raise Refused("deny", f"{peer} is on the deny list")
        if self._bans and self._banned(peer, now):
            raise Refused("ban", f"{peer} is banned")

    def _establish(self, ticket: Ticket, peer: PeerId, now: float) -> None:
        self._settle(ticket)
        self._check_peer(peer, now)
        allowed = not self._allow or peer in self._allow.peers or self._allow.has_ip(ticket.ip)
        if ticket.direction is Direction.INBOUND and not allowed:
            raise Refused("allow", f"{peer} is not on the allow list")
        self._ask(Candidate(ticket.direction, ticket.ip, peer))
        if self._per_peer[peer] >= self.limits.max_per_peer:
            raise Refused("max_per_peer", f"there are {self._per_peer[peer]} connections to {peer}")
        self._per_peer[peer] += 1
        ticket.peer = peer

    def _ask(self, candidate: Candidate) -> None:
        why = self.policy(candidate) if self.policy is not None else None
        if why is not None:
            raise Refused("policy", why)

    def _settle(self, ticket: Ticket) -> None:
        if ticket._pending:
            ticket._pending = False
            if ticket.direction is Direction.INBOUND:
                del self._shaking[ticket]

    def _release(self, ticket: Ticket) -> None:
        self._settle(ticket)
        self._total -= 1
        if ticket.direction is Direction.INBOUND:
            self._inbound -= 1
        else:
            self._outbound -= 1
        if ticket._host is not None:
            _decrement(self._per_host, ticket._host)
        if ticket.peer is not None:
            _decrement(self._per_peer, ticket.peer)

    # Bans

    def ban(self, target: str, now: float, seconds: float) -> str:
        """Keep a peer or an IP (an IPv6 address stands for its /64) out.

        Returns:
            what is banned.

        Raises:
            AddressError: it is neither.
        """
        key = _ban_key(target)
        if len(self._bans) >= MAX_BANS and key not in self._bans:
            del self._bans[min(self._bans, key=self._bans.__getitem__)]
        self._bans[key] = now + seconds
        return key

    def unban(self, target: str) -> bool:
        """Lift a ban. Returns whether there was one.

        Raises:
            AddressError: neither a peer id nor an IP.
        """
        return self._bans.pop(_ban_key(target), None) is not None

    def bans(self, now: float) -> dict[str, float]:
        """What is banned, and for how many seconds more."""
        self._bans = {key: until for key, until in self._bans.items() if until > now}
        return {key: until - now for key, until in self._bans.items()}

    def _banned(self, key: str, now: float) -> bool:
        until = self._bans.get(key)
        if until is None:
            return False
        if until <= now:
            del self._bans[key]
            return False
        return True

    # Telling

    def in_use(self) -> dict[str, int]:
        """How many places are taken, by the names of the limits."""
        return {
            "max_connections": self._total,
            "max_inbound": self._inbound,
            "max_outbound": self._outbound,
            "max_pending_inbound": len(self._shaking),
            "max_per_peer": max(self._per_peer.values(), default=0),
            "max_per_ip": max(self._per_host.values(), default=0),
        }


def _host(ip: str | None) -> str | None:
    """What counts as one host; ``None`` for what has no limit: loopback, and peers behind a relay."""
    if ip is None or addresses.is_loopback(ip):
        return None
    return addresses.subnet_key(ip)


def _ban_key(target: str) -> str:
    try:
        return addresses.parse_peer_id(target)
    except AddressError:
        pass
    try:
        return addresses.subnet_key(target)
    except AddressError:
        raise AddressError(f"{target} is neither a peer id nor an IP address") from None


K = TypeVar("K")


def _decrement(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
