"""Whom to dial back, and at what price. No I/O.

A server of AutoNAT dials where a stranger tells it to, so each rule here is about not being somebody's weapon.

* Who asks must be connected directly: over a relay nobody knows where it is.
* Only plain TCP to a public address is dialed, never one of this machine's own, and never one of a family that this
  machine has no address of: it could not get out, and its "unreachable" would be about itself.
* Who is in our own site (a private observed address, or one in our IPv6 /64) is told nothing: seen from within,
  everything is reachable.
* v2: an address whose IP is not the one that the asker is seen at costs the asker 30 to 100 kB, more than the handshake
  that somebody else would be made to pay for; and then some seconds pass, so that many servers, asked at once, don't
  strike together. v1 has no such payment: it dials the observed IP and no other.
* To a peer that dialed us and is connected we are no stranger. Who asks for one is refused before anything is paid.
* All of it within rates: per peer, per IP (an IPv6 /64 is one), and in all.

In a laboratory (``allow_private``) private and loopback addresses are as good as public ones.

Sources: libp2p specs ``autonat/autonat-v1.md``, ``autonat/autonat-v2.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.autonat._messages import DialRequest, ResponseStatus, V1Dial, V1Status
from kas_libp2p.errors import AddressError
from kas_libp2p.metadata import PeerId

MIN_DATA, MAX_DATA = 30_000, 100_000
"""Bytes of dial data that are demanded, drawn between these (specification)."""
MAX_PAUSE = 3.0
"""Seconds that may pass, drawn from zero, before an address that is not the asker's is dialed (go)."""
MAX_V1_DIALS = 4
"""Addresses of one v1 request that are dialed: a node has one or two ports."""

PEER_BURST, PEER_INTERVAL = 10, 15.0
"""Requests of one peer: three addresses, tested in v2 and by a stranger, and a few more when its network changed."""
IP_BURST, IP_INTERVAL = 20, 7.5
"""Requests from one IP: two peers at home."""
ALL_BURST, ALL_INTERVAL = 60, 1.0
"""Requests in all, as in go: 60 a minute."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks.

    Attributes:
        peer: its proven id.
        address: where its connection comes from, as multiaddr text.
        relayed: whether a relay stands between.
    """

    peer: PeerId
    address: str
    relayed: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """No.

    Attributes:
        status: what the asker is told, in v2.
        reason: one word, as it is counted: ``relayed``, ``autonat_per_peer``, ``autonat_per_ip``, ``autonat_in_all``,
            ``same_site``, ``private_target``, ``other_ip``, ``other_peer``, ``no_address``, ``known``.
    """

    status: ResponseStatus
    reason: str

    @property
    def v1(self) -> V1Status:
        """What the asker is told, in v1."""
        return V1Status.E_BAD_REQUEST if self.reason == "other_peer" else V1Status.E_DIAL_REFUSED


@dataclass(frozen=True, slots=True)
class Dial:
    """Yes.

    Attributes:
        index: which of the asker's addresses.
        address: the same, without its peer id.
        peer: who has to be there.
        data: bytes that the asker has to send before; 0: none.
        pause: seconds to wait before.
    """

    index: int
    address: Multiaddr
    peer: PeerId
    data: int = 0
    pause: float = 0.0


class Policy:
    """Decides on requests, and counts what was granted.

    Args:
        allow_private: whether private addresses are dialed.
        own: where this machine can be reached, as multiaddr texts.
        dialed_us: whether this peer is connected and dialed us.
        draw: a random number from 0 to 1.
    """

    def __init__(
        self,
        *,
        allow_private: bool,
        own: Callable[[], Collection[str]],
        dialed_us: Callable[[PeerId], bool],
        draw: Callable[[], float],
    ) -> None:
        self._allow_private = allow_private
        self._own = own
        self._dialed_us = dialed_us
        self._draw = draw
        self._per_peer = Rates(PEER_BURST, PEER_INTERVAL)
        self._per_ip = Rates(IP_BURST, IP_INTERVAL)
        self._in_all = Rates(ALL_BURST, ALL_INTERVAL)

    def v2(self, request: DialRequest, asker: Asker, now: float) -> Dial | Refusal:
        """Decide on a v2 request: the first address that may be dialed is."""
        refusal = self._check(asker, now)
        if refusal is not None:
            return refusal
        seen = _ip_of(asker.address)
        for index, data in enumerate(request.addresses):
            address = self._dialable(data, asker.peer)
            if address is not None:
                return self._dial(index, address, asker.peer, free=_ip_of(address) == seen)
        return _refused_all(request.addresses)

    def stranger(self, request: DialRequest, asker: Asker, now: float) -> Dial | Refusal:
        """Decide on a request that somebody else dials back: the observed IP and no other, whatever is paid."""
        decision = self.v2(request, asker, now)
        if isinstance(decision, Dial) and decision.data:
            return Refusal(ResponseStatus.E_DIAL_REFUSED, "other_ip")
        return decision

    def stranger_dial(self, request: DialRequest, asker: Asker, now: float) -> Dial | Refusal:
        """Decide on a request to dial back another peer than the one that asks: never for nothing."""
        refusal = self._check(asker, now)
        if refusal is not None:
            return refusal
        for index, data in enumerate(request.addresses):
            peer = _peer_of(data)
            address = self._dialable(data, peer) if peer is not None else None
            if peer is not None and address is not None:
                if self._dialed_us(peer):
                    return Refusal(ResponseStatus.E_DIAL_REFUSED, "known")
                return self._dial(index, address, peer, free=False)
        return _refused_all(request.addresses)

    def _dial(self, index: int, address: Multiaddr, peer: PeerId, *, free: bool) -> Dial:
        if free:
            return Dial(index, address, peer)
        size = MIN_DATA + round(self._draw() * (MAX_DATA - MIN_DATA))
        return Dial(index, address, peer, size, self._draw() * MAX_PAUSE)

    def v1(self, request: V1Dial, asker: Asker, now: float) -> tuple[Multiaddr, ...] | Refusal:
        """Decide on a v1 request.

        Returns:
            what to dial: the ports that the asker named, at the IP that it is seen at. rust names the private address
            that it listens on and expects exactly this; go names the observed IP itself.
        """
        refusal = self._check(asker, now)
        if refusal is not None:
            return refusal
        if request.peer != addr.peer_id_to_bytes(asker.peer):
            return Refusal(ResponseStatus.E_REQUEST_REJECTED, "other_peer")
        found: dict[Multiaddr, None] = {}
        for data in request.addresses:
            there = _at_ip_of(asker.address, data)
            address = self._dialable(there, asker.peer) if there is not None else None
            if address is not None and len(found) < MAX_V1_DIALS:
                found[address] = None
        return tuple(found) or _refused_all(request.addresses)

    def _check(self, asker: Asker, now: float) -> Refusal | None:
        if asker.relayed:
            return Refusal(ResponseStatus.E_REQUEST_REJECTED, "relayed")
        host = addr.subnet_key(asker.address)
        near = not self._allow_private and host in map(addr.subnet_key, self._own())
        if near or not self._is_usable(asker.address):
            return Refusal(ResponseStatus.E_DIAL_REFUSED, "same_site")
        rates = (
            (self._per_peer, asker.peer, "autonat_per_peer"),
            (self._per_ip, host, "autonat_per_ip"),
            (self._in_all, None, "autonat_in_all"),
        )
        for rate, key, name in rates:
            if not rate.allows(key, now):
                return Refusal(ResponseStatus.E_REQUEST_REJECTED, name)
        for rate, key, _ in rates:
            rate.take(key, now)
        return None

    def _dialable(self, data: bytes, peer: PeerId) -> Multiaddr | None:
        where = _ip_port(data)
        if where is None or not where[1] or "%" in where[0]:  # a zone hides whose address it is, and leads nowhere here
            return None
        address = addr.parse(data)
        if addr.peer_of(address) not in (None, peer) or not self._is_usable(address):
            return None
        own = [each for each in map(addr.ip_port, self._own()) if each is not None]
        if where in own or (not self._allow_private and where[0] in {ip for ip, _ in own}):
            return None  # whatever else runs here may trust who comes from here
        families = {_family(ip) for ip, _ in own if self._allow_private or not addr.is_loopback(ip)}
        return addr.without_peer(address) if _family(where[0]) in families else None

    def _is_usable(self, address: Multiaddr | str) -> bool:
        if addr.is_public(address):
            return True
        return self._allow_private and (addr.is_private(address) or addr.is_loopback(address))


def _refused_all(listed: Collection[bytes]) -> Refusal:
    return Refusal(ResponseStatus.E_DIAL_REFUSED, "private_target" if any(map(_ip_port, listed)) else "no_address")


def _at_ip_of(seen: str, data: bytes) -> bytes | None:
    """The address with the IP of another one of its family; ``None`` where that can't be."""
    ip, where = _ip_of(seen), _ip_port(data)
    if ip is None or where is None or _family(ip) != _family(where[0]):
        return None
    there = addr.from_ip_port(ip, where[1])
    peer = addr.peer_of(addr.parse(data))
    return bytes(there if peer is None else addr.with_peer(there, peer))


def _ip_port(data: bytes) -> tuple[str, int] | None:
    try:
        return addr.ip_port(addr.parse(data))
    except AddressError:
        return None


def _peer_of(data: bytes) -> PeerId | None:
    return addr.peer_of(addr.parse(data)) if _ip_port(data) is not None else None


def _ip_of(address: Multiaddr | str) -> str | None:
    where = addr.ip_port(address)
    return where[0] if where is not None else None


def _family(ip: str) -> int:
    return 6 if ":" in ip else 4
