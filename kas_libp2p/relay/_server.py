"""What a relay decides: who gets a place, and who gets a circuit. No I/O.

Places
    A peer has one place at most, whatever it claims: only its proven id counts. The place belongs to the connection
    that asked for it and ends with it, unless the peer has another one, as the specification has it: go and js ask
    anew only once the last is gone. When the peer comes back, from wherever, and asks, the new connection takes the
    place over at once, so that one that changed its network is never kept out by what it left behind.

Circuits
    A circuit is made to a peer that has a place, over the connection that the place belongs to. It counts for both of
    its ends from the moment it is asked for, so that a destination that does not answer is no way around the limits.
    go and js count likewise, but all circuits of a peer together; here those that it calls and those by which it is
    called are counted apart, so that strangers who call somebody never keep it from calling others. And of the circuits
    to one peer, and of all circuits, those from one network may be half, so that a crowd in one place leaves room for
    all others. A second circuit beside the one that two peers have is not counted for them: it is how a circuit is
    renewed before it ends.

Requests
    Each costs a token of the peer, of its IP, and of its network. The two kinds have tokens of their own, so that none
    who only wants to keep its place suffers from a crowd of callers behind the same router; whoever has a place pays
    for its renewal with its own tokens alone. Loopback counts as no IP.

The statuses are those that go answers; a reason is the name of a limit, or one word.

Source: libp2p specs ``relay/circuit-v2.md``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kas_libp2p import addresses as addr
from kas_libp2p._rates import Rates
from kas_libp2p.config import RelayLimits
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._messages import Status

NETWORK_HOSTS = 8
"""A network (IPv4 /16, IPv6 /48) has the tokens of so many IPs: one that has a /48 has 65 536 IPs of its own."""

C = TypeVar("C", bound=Hashable)
"""The shell's connections; here they are only told apart."""
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Asker(Generic[C]):
    """Who asks for something.

    Attributes:
        connection: on which connection.
        peer: its proven id.
        ip: where it is; ``None`` if it is behind a relay.
    """

    connection: C
    peer: PeerId
    ip: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not.

    Attributes:
        status: what the asker is told.
        reason: a limit by its name in the configuration, or one word.
    """

    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Place(Generic[C]):
    """A reservation.

    Attributes:
        connection, peer: whose.
        until: when it ends unless it is renewed, on the clock that ``now`` comes from.
        host, network: what it counts for; ``None`` for loopback.
    """

    connection: C
    peer: PeerId
    until: float
    host: str | None
    network: str | None


@dataclass(frozen=True, slots=True)
class Circuit(Generic[C]):
    """A circuit, from the moment it is granted until `Relay.release`.

    Attributes:
        number: counts the circuits.
        source, destination: its ends.
        connection: over which the destination is reached.
    """

    number: int
    source: PeerId
    destination: PeerId
    connection: C


@dataclass(slots=True)
class _Pair:
    """The circuits from one peer to another.

    Attributes:
        network: where the source was at the first of them; ``None`` for loopback.
        circuits: how many there are.
    """

    network: str | None
    circuits: int = 0


class Relay(Generic[C]):
    """Places and circuits of one relay.

    Args:
        limits: what it gives away.
    """

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self._places: dict[PeerId, Place[C]] = {}  # the one that ends first is the first
        self._hosts: Counter[str] = Counter()
        self._networks: Counter[str] = Counter()
        self._circuits: dict[int, Circuit[C]] = {}
        self._pairs: dict[tuple[PeerId, PeerId], _Pair] = {}
        self._callers: Counter[PeerId] = Counter()
        self._called: Counter[PeerId] = Counter()
        self._crowds: Counter[tuple[PeerId, str]] = Counter()
        self._sources: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        interval = limits.request_interval
        self._rates = [
            (name, Rates(burst, each))
            for name, burst, each in (
                ("requests_per_peer", limits.requests_per_peer, interval),
                ("requests_per_ip", limits.requests_per_ip, interval),
                ("requests_per_network", NETWORK_HOSTS * limits.requests_per_ip, interval / NETWORK_HOSTS),
            )
        ]

    # Asking

    def admit_reserve(self, asker: Asker[C], now: float) -> Refusal | None:
        """Somebody asks for a place: may it ask at all? To be called once per request, before anything is spent."""
        if asker.ip is None:
            return Refusal(Status.PERMISSION_DENIED, "relayed")
        self._expire(now)
        limit = self._pay("reserve", asker, now, alone=asker.peer in self._places)
        return Refusal(Status.RESERVATION_REFUSED, limit) if limit is not None else None

    def admit_connect(self, asker: Asker[C], destination: PeerId, now: float) -> Refusal | None:
        """Somebody asks for a circuit: may it ask at all? To be called once per request, before anything is spent."""
        if asker.ip is None:
            return Refusal(Status.PERMISSION_DENIED, "relayed")
        limit = self._pay("connect", asker, now, alone=False)
        if limit is not None:
            return Refusal(Status.RESOURCE_LIMIT_EXCEEDED, limit)
        if asker.peer == destination:
            return Refusal(Status.PERMISSION_DENIED, "oneself")
        return None

    def reserve(self, asker: Asker[C], now: float) -> Place[C] | Refusal:
        """Give a place, or renew it."""
        self._expire(now)
        limit = self._full_for(asker)
        if limit is not None:
            return Refusal(Status.RESERVATION_REFUSED, limit)
        old = self._places.get(asker.peer)
        if old is not None:
            self._drop(old)
        place = self._places[asker.peer] = self._place(asker, now + self.limits.reservation_seconds)
        return place

    def _full_for(self, asker: Asker[C]) -> str | None:
        """The limit that leaves no place for somebody. What the peer has already does not stand in its way."""
        assert asker.ip is not None
        limits = self.limits
        host, network = _host_and_network(asker.ip)
        old = self._places.get(asker.peer)
        taken = len(self._places) - (old is not None)
        from_host = self._hosts[host] - (old is not None and old.host == host) if host else 0
        from_network = self._networks[network] - (old is not None and old.network == network) if network else 0
        for limit, full in (
            ("max_reservations", taken >= limits.max_reservations),
            ("max_reservations_per_ip", from_host >= limits.max_reservations_per_ip),
            ("max_reservations_per_network", from_network >= limits.max_reservations_per_network),
        ):
            if full:
                return limit
        return None

    def _place(self, asker: Asker[C], until: float) -> Place[C]:
        assert asker.ip is not None
        host, network = _host_and_network(asker.ip)
        if host and network:
            self._hosts[host] += 1
            self._networks[network] += 1
        return Place(asker.connection, asker.peer, until, host, network)

    def connect(self, asker: Asker[C], destination: PeerId, now: float) -> Circuit[C] | Refusal:
        """Grant a circuit. It has to be released, whatever becomes of it."""
        self._expire(now)
        limits = self.limits
        place = self._places.get(destination)
        if place is None:
            return Refusal(Status.NO_RESERVATION, "no_reservation")
        if len(self._circuits) >= limits.max_circuits:
            return Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "max_circuits")
        assert asker.ip is not None
        key = asker.peer, destination
        pair = self._pairs.get(key) or _Pair(_host_and_network(asker.ip)[1])
        if pair.network and self._sources[pair.network] >= max(1, limits.max_circuits // 2):
            return Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "one_network")
        if pair.circuits != 1:
            limit = self._full_circuits(pair, *key)
            if limit is not None:
                return Refusal(Status.RESOURCE_LIMIT_EXCEEDED, limit)
            self._callers[asker.peer] += 1
            self._called[destination] += 1
            if pair.network:
                self._crowds[destination, pair.network] += 1
        if pair.network:
            self._sources[pair.network] += 1
        pair.circuits += 1
        self._pairs[key] = pair
        circuit = Circuit(next(self._numbers), *key, place.connection)
        self._circuits[circuit.number] = circuit
        return circuit

    def _full_circuits(self, pair: _Pair, source: PeerId, destination: PeerId) -> str | None:
        """What leaves no room for another circuit between two peers."""
        most = self.limits.max_circuits_per_peer
        if max(self._callers[source], self._called[destination]) >= most:
            return "max_circuits_per_peer"
        crowded = pair.network is not None and self._crowds[destination, pair.network] >= max(1, most // 2)
        return "one_network" if crowded else None

    def _pay(self, kind: str, asker: Asker[C], now: float, *, alone: bool) -> str | None:
        """Take a token of each kind.

        Args:
            alone: of the peer's only.

        Returns:
            the limit that has none left, in which case none is taken.
        """
        assert asker.ip is not None
        host, network = _host_and_network(asker.ip)
        keys = (asker.peer,) if alone else (asker.peer, host, network)
        due = [(name, rates, (kind, key)) for (name, rates), key in zip(self._rates, keys, strict=False) if key]
        for name, rates, key in due:
            if not rates.allows(key, now):
                return name
        for _, rates, key in due:
            rates.take(key, now)
        return None

    # Ending

    def forget(self, connection: C, peer: PeerId, heir: Asker[C] | None = None) -> None:
        """A connection is gone, and the place with it, if it had one.

        Args:
            heir: another connection of the peer, which has the place from now on if its IP may have one more.
        """
        place = self._places.get(peer)
        if place is None or place.connection != connection:
            return
        if heir is None or heir.ip is None or self._full_for(heir) is not None:
            self._drop(place)
        else:
            self._uncount(place)
            self._places[peer] = self._place(heir, place.until)  # where it was in the order

    def clear(self) -> None:
        """Take all places back."""
        for place in [*self._places.values()]:
            self._drop(place)

    def release(self, circuit: Circuit[C]) -> None:
        """A circuit is no more. May be called again."""
        if self._circuits.pop(circuit.number, None) is None:
            return
        key = circuit.source, circuit.destination
        pair = self._pairs[key]
        if pair.circuits != 2:
            _decrement(self._callers, circuit.source)
            _decrement(self._called, circuit.destination)
            if pair.network:
                _decrement(self._crowds, (circuit.destination, pair.network))
        if pair.network:
            _decrement(self._sources, pair.network)
        pair.circuits -= 1
        if not pair.circuits:
            del self._pairs[key]

    def _expire(self, now: float) -> None:
        while self._places:
            place = next(iter(self._places.values()))
            if place.until > now:
                return
            self._drop(place)

    def _drop(self, place: Place[C]) -> None:
        del self._places[place.peer]
        self._uncount(place)

    def _uncount(self, place: Place[C]) -> None:
        if place.host and place.network:
            _decrement(self._hosts, place.host)
            _decrement(self._networks, place.network)

    # Telling

    def places(self, now: float) -> tuple[Place[C], ...]:
        """The reservations."""
        self._expire(now)
        return tuple(self._places.values())

    def has_place(self, connection: C, peer: PeerId, now: float) -> bool:
        """Whether a peer's connection is one that a place belongs to."""
        self._expire(now)
        place = self._places.get(peer)
        return place is not None and place.connection == connection

    def circuits(self) -> tuple[Circuit[C], ...]:
        """The circuits, those that are being made included."""
        return tuple(self._circuits.values())

    def in_use(self, now: float) -> dict[str, int]:
        """How many places and circuits are taken, by the names of the limits."""
        self._expire(now)
        return {
            "max_reservations": len(self._places),
            "max_reservations_per_ip": max(self._hosts.values(), default=0),
            "max_reservations_per_network": max(self._networks.values(), default=0),
            "max_circuits": len(self._circuits),
            "max_circuits_per_peer": max((*self._callers.values(), *self._called.values()), default=0),
        }


def _host_and_network(ip: str) -> tuple[str | None, str | None]:
    if addr.is_loopback(ip):
        return None, None
    return addr.subnet_key(ip), addr.network_key(ip)


def _decrement(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
