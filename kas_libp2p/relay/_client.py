"""What a client makes of a relay's answers, and when it asks again. No I/O.

What is believed
    The addresses that the relay tells, as far as they lead to it and mean something where it is: not loopback ones of a
    relay on the internet. If it tells none, the one at which we have it is known to work.

    The lifetime is the relay's clock less ours, and either may be wrong, so only lifetimes from ten seconds to a day
    are taken as they come. A longer one counts as a day (js relays give milliseconds at times, which are read as
    such); one in the past tells of a clock that is off, or of a liar, and the place is held for a few minutes and asked
    for again.

    A limit of more than a day in seconds is a js relay's milliseconds, of which the smaller reading is assumed: whoever
    assumes too little loses nothing. The byte limit is taken for both directions together, as rust and js count.

    A voucher is not needed, but a relay that signs what is not true is not used.

When it is asked again
    After 60 to 80 % of the lifetime, at random, so that a relay that was restarted is not asked by all at once, and at
    most two hours after the last time. Then with growing pauses until it answers, while the place still lasts. A place
    that is lost is asked for again at once, unless it was lost just as soon: then after a pause as well.

Source: libp2p specs ``relay/circuit-v2.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.errors import AddressError, RelayRefused, RemoteProtocolError, SecurityError
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._messages import HopMessage, HopStatus, Limit, Status
from kas_libp2p.relay._voucher import open_voucher
from kas_libp2p.units import short

MAX_ADDRESSES = 4
"""Addresses of one relay that are told on: three relays' fit into identify beside our own."""
SHORTEST, LONGEST = 10.0, 86_400.0
"""Seconds of a lifetime that is taken as it comes."""
ASSUMED = 300.0
"""Seconds for which a place is held whose lifetime can't be right; rust and go give an hour, js two."""
RENEW_FROM, RENEW_TO = 0.6, 0.8
"""Parts of the lifetime between which it is renewed: the rest is for many more tries."""
RENEW_WITHIN = 7200.0
"""Seconds after which it is renewed at the latest: what was promised for a day may be forgotten by a restart."""
STEADY = 60.0
"""Seconds for which a place must have lasted, to be asked for again at once when it is lost."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds between tries that fail: doubled each time, up to the longest."""
MILLISECONDS = 86_400.0
"""Seconds of a circuit's time limit above which it is read as milliseconds."""

_SAID: dict[Status, str] = {
    Status.UNUSED: "it gave no status that we know",
    Status.RESERVATION_REFUSED: "it has no place for us",
    Status.RESOURCE_LIMIT_EXCEEDED: "it carries no more circuits, from us or to that peer",
    Status.PERMISSION_DENIED: "its rules forbid it",
    Status.CONNECTION_FAILED: "it could not reach that peer, or the peer did not want us",
    Status.NO_RESERVATION: "that peer has no place there",
    Status.MALFORMED_MESSAGE: "it did not understand us",
    Status.UNEXPECTED_MESSAGE: "it did not expect this from us",
}


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place that a relay keeps for us.

    Attributes:
        relay: its peer id.
        addresses: where we can be reached through it: ``/…/p2p/RELAY/p2p-circuit``, without our peer id.
        lifetime: seconds that it lasts, from when it was given.
        max_bytes: bytes that one circuit may carry, both directions together; ``None``: no limit.
        max_seconds: seconds that one circuit may last; ``None``: no limit.
        voucher: the relay's signature, verified; ``None`` if it gave none.
    """

    relay: PeerId
    addresses: tuple[Multiaddr, ...]
    lifetime: float
    max_bytes: int | None
    max_seconds: float | None
    voucher: bytes | None


def read_reservation(answer: HopMessage, *, relay: PeerId, peer: PeerId, at: str, wall_now: float) -> Reservation:
    """Judge the answer to a RESERVE.

    Args:
        relay, peer: its peer id, and ours.
        at: where we have it, without its peer id.
        wall_now: seconds since the epoch.

    Raises:
        RelayRefused: it said no.
        RemoteProtocolError: the answer is none, or can't be true.
    """
    status = _granted(answer, relay)
    found = status.reservation
    if found is None:
        raise RemoteProtocolError("a relay reserved nothing and said OK")
    if found.voucher is not None:
        try:
            open_voucher(found.voucher, relay=relay, peer=peer)
        except SecurityError as error:
            raise RemoteProtocolError(str(error)) from error
    max_bytes, max_seconds = read_limit(status.limit)
    return Reservation(
        relay=relay,
        addresses=circuit_addresses(found.addresses, relay=relay, peer=peer, at=at),
        lifetime=lifetime_of(found.expire, wall_now),
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        voucher=found.voucher,
    )


def read_circuit(answer: HopMessage, *, relay: PeerId, peer: PeerId) -> tuple[Limit, Multiaddr | None]:
    """Judge the answer to a CONNECT.

    Returns:
        the circuit's limit, and where the relay sees the peer.

    Raises:
        RelayRefused: it said no.
        RemoteProtocolError: the answer is none.
    """
    status = _granted(answer, relay)
    told = status.peer
    return status.limit, seen_at(told.addresses) if told is not None and told.id == peer else None


def _granted(answer: HopMessage, relay: PeerId) -> HopStatus:
    if not isinstance(answer, HopStatus):
        raise RemoteProtocolError("a relay answered with a request")
    if answer.status is not Status.OK:
        name = answer.status.name
        raise RelayRefused(relay, name, f"the relay {short(relay)} says {name}: {_SAID[answer.status]}")
    return answer


def seen_at(addresses: Iterable[str]) -> Multiaddr | None:
    """Where a relay sees a peer: the first address that a hole could be punched to."""
    return next((addr.parse(each) for each in addresses if addr.ip_port(each) is not None), None)


def lifetime_of(expire: int, wall_now: float) -> float:
    """Seconds for which a place is held that expires at ``expire``, in seconds since the epoch. See the module."""
    left = expire - wall_now
    if left > LONGEST and SHORTEST <= expire / 1000 - wall_now <= LONGEST:
        left = expire / 1000 - wall_now
    return min(left, LONGEST) if left >= SHORTEST else ASSUMED


def read_limit(limit: Limit) -> tuple[int | None, float | None]:
    """Bytes, both directions together, and seconds that a circuit may count on; ``None``: no limit. See the module."""
    seconds = limit.seconds
    return limit.bytes, seconds / 1000 if seconds is not None and seconds > MILLISECONDS else seconds


def circuit_addresses(told: Iterable[str], *, relay: PeerId, peer: PeerId, at: str) -> tuple[Multiaddr, ...]:
    """Where we can be reached through a relay, without our peer id.

    Args:
        told: what the relay says of its own addresses, `MAX_ADDRESSES` of which are believed.
        relay, peer: its peer id, and ours.
        at: where we have it, without its peer id.
    """
    found: dict[Multiaddr, None] = {}
    for each in told:
        try:
            found[_through(each, relay, peer, at)] = None
        except AddressError:
            continue
        if len(found) == MAX_ADDRESSES:
            break
    return tuple(found) or (addr.parse(f"{at}/p2p/{relay}/p2p-circuit"),)


def _through(told: str, relay: PeerId, peer: PeerId, at: str) -> Multiaddr:
    """A circuit address made of an address of a relay, with or without ``/p2p/RELAY``, ``/p2p-circuit``, ``/p2p/US``.

    Raises:
        AddressError: it leads elsewhere, or means nothing to others.
    """
    way: addr.Address = told
    if addr.is_relayed(told):
        if addr.peer_of(told) not in (None, peer):
            raise AddressError(f"{told} leads to another peer")
        way = addr.relay_address(told) or ""
    way = addr.without_peer(addr.with_peer(way, relay))
    where = addr.ip_port(way)
    if where is not None and not where[1]:
        raise AddressError(f"{told} has no port")
    if addr.is_relayed(way) or addr.is_wildcard(way) or addr.is_multicast(way):
        raise AddressError(f"{told} is no address of a relay")
    if addr.is_public(at) and not addr.is_public(way):
        raise AddressError(f"{told} is not public, and the relay is")
    if addr.is_loopback(way) and not addr.is_loopback(at):
        raise AddressError(f"{told} is the relay's own machine")
    return addr.parse(f"{way}/p2p/{relay}/p2p-circuit")


class Due(Enum):
    """What the time has come for."""

    ASK = "ask"
    """Reserve, connecting if need be."""
    EXPIRED = "expired"
    """The place is gone: it was not renewed in time."""


class Upkeep:
    """One place on one relay, over time.

    Args:
        now: it is asked for at once.

    Attributes:
        reservation: what is held; ``None`` while nothing is.
        since: when it was first given, of the unbroken time that it is held.
        until: when it ends, if it is not renewed.
        renewals: how often it was renewed.
        failures: tries that failed since the last success.
        unreached: whether the last of them found nobody there, or the connection was lost.
    """

    def __init__(self, now: float) -> None:
        self.unreached = False
        self.reservation: Reservation | None = None
        self.since = now
        self.until = now
        self.renewals = 0
        self.failures = 0
        self._ask_at = now

    def next_deadline(self) -> float:
        """When to call `on_timeout`."""
        return self._ask_at if self.reservation is None else min(self._ask_at, self.until)

    def on_timeout(self, now: float) -> Due | None:
        """What is due. After `Due.ASK`, `granted` or `failed` follows."""
        if self.reservation is not None and now >= self.until:
            self.reservation = None
            self._ask_at = max(self._ask_at, now)
            return Due.EXPIRED
        return Due.ASK if now >= self._ask_at else None

    def granted(self, reservation: Reservation, now: float, spread: float) -> None:
        """The relay said yes.

        Args:
            spread: at random, from 0 to 1.
        """
        if self.reservation is None:
            self.since = now
            self.renewals = 0
        else:
            self.renewals += 1
            self.failures = 0
        self.unreached = False
        self.reservation = reservation
        self.until = now + reservation.lifetime
        part = RENEW_FROM + (RENEW_TO - RENEW_FROM) * spread
        self._ask_at = now + part * min(reservation.lifetime, RENEW_WITHIN / RENEW_TO)

    def failed(self, now: float, spread: float, *, unreached: bool = False) -> None:
        """It said no, or nothing; or it could not be reached.

        Args:
            spread: at random, from 0 to 1.
            unreached: whether nobody was there to ask.
        """
        self.unreached = unreached
        pause = min(FIRST_PAUSE * 2.0 ** min(self.failures, 16), LONGEST_PAUSE)
        self.failures += 1
        self._ask_at = now + pause * (0.5 + 0.5 * spread)

    def reached(self, now: float) -> None:
        """There is a connection with the relay: where that alone was missing, it is asked at once."""
        if self.reservation is None and self.unreached:
            self.unreached = False
            self._ask_at = now

    def withdrawn(self, now: float, spread: float) -> None:
        """The relay said that it is none any more, and what was held is worth nothing.

        Args:
            spread: at random, from 0 to 1.
        """
        self.reservation = None
        self.failed(now, spread)

    def lost(self, now: float, spread: float) -> None:
        """The connection with the relay has ended, and what was held with it.

        Args:
            spread: at random, from 0 to 1.
        """
        self.reservation = None
        if now - self.since >= STEADY:
            self.failures = 0
            self._ask_at = now
        else:
            self.failed(now, spread, unreached=True)  # a line that comes and goes says nothing of the relay
