"""Reachability: runs the tests, hears what peers say, and tells the role.

What is decided is decided in `_observed` (where others see us), `_client` (what a test shows) and `_roles` (what is
tested when, and what follows). Here streams are opened and dials are made.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import filterfalse

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._messages import DIAL_BACK, DIAL_REQUEST, STRANGER, STRANGER_DIAL, V1
from kas_libp2p.autonat._observed import GroupOf, Mapping, NatView, Observed
from kas_libp2p.autonat._roles import Ask, Candidate, Contacts, Filtering, Roles, Server
from kas_libp2p.autonat.client import Client
from kas_libp2p.autonat.server import Server as DialBackServer
from kas_libp2p.config import Config, Role
from kas_libp2p.events import EventBus, ObservationRefused, ReachabilityTested, RoleChanged
from kas_libp2p.metadata import Direction, PathKind, PeerId
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.yamux.stream import YamuxStream

__all__ = ["Filtering", "Mapping", "Reachability", "ReachabilityStatus", "Service"]

DOUBT_GAP = 60.0
"""Seconds between two rounds of tests because a peer sees us elsewhere: one that lies must not keep us busy."""


@dataclass(frozen=True, slots=True)
class Service:
    """A protocol to be served.

    Attributes:
        protocol: its id.
        handle: called with each stream; what it raises ends at the stream.
        max_streams, max_per_peer: streams that may be open at once.
    """

    protocol: str
    handle: Callable[[YamuxStream], Awaitable[None]]
    max_streams: int
    max_per_peer: int


@dataclass(frozen=True, slots=True)
class ReachabilityStatus:
    """What is known of who can dial us, and why.

    Attributes:
        role: private or public.
        reason: what it rests on, in words.
        public_addresses: addresses at which others can dial us, without our peer id.
        candidates: where others see our listen port, and how many groups do.
        mapping, keeps_port, filtering: of the NAT of the main family.
        servers: connected peers that can be asked to dial us.
    """

    role: Role
    reason: str
    public_addresses: tuple[str, ...]
    candidates: dict[str, int]
    mapping: Mapping
    keeps_port: bool | None
    filtering: Filtering
    servers: int


class Reachability:
    """Who can dial us: the one object that a node needs of this room.

    Args:
        peer: our peer id.
        config: ``role``, ``autonat``, ``dial`` and ``yamux`` are used.
        events: where everything is told.
        listen: our listen addresses now, wildcards replaced, without our peer id, as text.
        connections: the connections that are up, those through relays too.
        protocols_of: what a connected peer serves, as identify told; empty if it has not.
        dial: connects to an address from a fresh port (`kas_libp2p.transport.tcp.Source.ANY_PORT`), not counting it as
            a connection of ours.

    Attributes:
        services: what is to be served, for as long as the node runs.
        on_changed: called when the role, the public or refuted addresses or `offers_dcutr` changed; must not block nor
            raise.
    """

    def __init__(
        self,
        peer: PeerId,
        config: Config,
        events: EventBus,
        *,
        listen: Callable[[], Sequence[str]],
        connections: Callable[[], Iterable[Connection]],
        protocols_of: Callable[[PeerId], Collection[str]],
        dial: Callable[[Multiaddr], Awaitable[RawConnection]],
    ) -> None:
        lab = config.autonat.allow_private
        now = trio.current_time()
        self.on_changed: list[Callable[[], None]] = []
        self._lab = lab
        self._events = events
        self._listen = listen
        self._connections = connections
        self._protocols_of = protocols_of
        self._group_of = GroupOf(laboratory=lab)
        self._observed = Observed(self._group_of, allow_private=lab)
        self._contacts = Contacts()
        self._roles = Roles(config.role, config.autonat.refresh, now)
        self._client = Client(peer, events)
        self._mapped: tuple[str, ...] = ()
        self._near: frozenset[str] = frozenset()
        self._seen = False
        self._doubted = float("-inf")
        self._told: tuple[Role, tuple[str, ...], tuple[str, ...], bool] = (self.role, (), (), False)
        self._wake = trio.Event()
        self.services: tuple[Service, ...] = (Service(DIAL_BACK, self._client.handle_dial_back, 32, 4),)
        if config.autonat.serve:
            server = DialBackServer(
                events,
                config,
                dial=dial,
                own=self._own_addresses,
                dialed_us=self._was_dialed_by,
                helpers=self._helpers,
            )
            self.services += (
                Service(V1, server.handle_v1, 16, 2),
                Service(DIAL_REQUEST, server.handle_v2, 32, 4),
                Service(STRANGER, server.handle_stranger, 16, 2),
                Service(STRANGER_DIAL, server.handle_stranger_dial, 16, 4),
            )

    # What a node asks

    @property
    def role(self) -> Role:
        """Private or public, never ``auto``."""
        return self._roles.role

    @property
    def offers_hop(self) -> bool:
        """Whether this node may be a relay: exactly while it is public."""
        return self.role is Role.PUBLIC

    @property
    def offers_dcutr(self) -> bool:
        """Whether a punch can be tried with this node: from the first time on that its public address was seen."""
        return self._seen

    def public_addresses(self) -> tuple[str, ...]:
        """Addresses to tell to others beside what a node tells anyway: verified ones, without our peer id."""
        return self._roles.public(trio.current_time())

    def is_refuted(self, address: str) -> bool:
        """Whether tests have shown that others can't dial this address of ours: then it is not worth telling."""
        return self._roles.is_refuted(address, trio.current_time())

    def candidates(self) -> tuple[str, ...]:
        """Addresses to punch with: where others see our listen port, whatever a NAT makes of it. The best first."""
        now = trio.current_time()
        return tuple(each for family in (4, 6) for each in self._observed.candidates(family, now))

    def nat(self, family: int) -> tuple[NatView, Filtering]:
        """The NAT of IPv4 or IPv6: how it maps ports, and whom it lets in."""
        now = trio.current_time()
        return self._observed.nat(family, now), self._roles.filtering(family, now)

    def sightings(self, family: int) -> tuple[tuple[float, int], ...]:
        """Outer ports of our latest connections to different networks: seconds since each, and the port, in order."""
        return self._observed.sightings(family, trio.current_time())

    def dials_since(self, family: int, age: float) -> int:
        """To how many IPs we have dialed from our listen port within so many seconds."""
        return self._observed.dials_since(family, trio.current_time() - age)

    def status(self) -> ReachabilityStatus:
        """Everything at this moment."""
        now = trio.current_time()
        view, filtering = self.nat(self._roles.main_family)
        return ReachabilityStatus(
            role=self.role,
            reason=self._roles.reason(now),
            public_addresses=self.public_addresses(),
            candidates={
                addr.ip_port_text(*endpoint): groups
                for family in (4, 6)
                for endpoint, groups in self._observed.endpoints(family, now).items()
            },
            mapping=view.mapping,
            keeps_port=view.keeps_port,
            filtering=filtering,
            servers=len(self._servers()),
        )

    # What a node tells; none of these waits or raises

    def contacted(self, ip: str) -> None:
        """A dial from our listen port to this IP is about to begin."""
        self._contacts.add(ip)
        self._observed.dialed(ip, trio.current_time())

    def connected(self, connection: Connection) -> None:
        """A connection is up, of any path and direction."""
        ip = self._ip_of(connection)
        if ip is None:
            return
        if connection.direction is Direction.OUTBOUND or connection.path.kind is PathKind.PUNCHED:
            self._contacts.add(ip)
            return
        self._client.came(connection)
        if self._is_outside(ip) and self._contacts.is_stranger(ip):
            self._roles.stranger_came(_family(ip), trio.current_time())
            self._wake.set()

    def identified(self, connection: Connection, observed: str | None) -> None:
        """A peer has told about itself on a connection, or told anew.

        Args:
            observed: where it sees us; ``None`` if it did not say.
        """
        ip = self._ip_of(connection)
        if ip is None or not self._is_outside(ip):
            return  # it sees nothing of what stands between us and the others
        now = trio.current_time()
        if observed is not None:
            self._hear(connection, observed, now)
        self._refresh(now)
        if self._as_server(connection) is not None:
            self._roles.server_came(now)
            self._wake.set()

    def disconnected(self, connection: Connection) -> None:
        """A connection has ended."""
        self._observed.ended(connection.number, trio.current_time())

    def listening(self) -> None:
        """The listen addresses have changed."""
        now = trio.current_time()
        self._refresh(now)
        self._roles.doubt(now)
        self._wake.set()

    def mapped(self, addresses: Iterable[str]) -> None:
        """These are the addresses that routers have given us, all of them."""
        now = trio.current_time()
        before, self._mapped = self._mapped, tuple(addresses)
        self._refresh(now)
        if set(before) != set(self._mapped):
            self._roles.doubt(now)  # others may see us there with and without: what is new is who gets in

    # The work

    async def run(self) -> None:
        """Test, for ever."""
        self._refresh(trio.current_time())
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                self._observed.prune(now)
                self._roles.update(now)
                self._notice(now)
                by_server: dict[PeerId, list[Ask]] = {}
                for ask in self._roles.plan(self._servers(), now):
                    by_server.setdefault(ask.server.peer, []).append(ask)
                for some in by_server.values():
                    nursery.start_soon(self._ask, some)
                self._wake = trio.Event()
                with trio.move_on_at(self._roles.next_deadline(now)):
                    await self._wake.wait()

    async def _ask(self, asks: list[Ask]) -> None:
        """Make tests by one server, one after the other."""
        for ask in asks:
            await self._ask_one(ask)
            self._roles.done(ask, trio.current_time())
            self._wake.set()

    async def _ask_one(self, ask: Ask) -> None:
        usable = (each for each in self._connections() if each.peer == ask.server.peer and self._as_server(each))
        if (server := next(usable, None)) is None:
            return
        outcome = await self._client.test(server, ask.address, ask.kind)
        stranger = False
        if outcome.proof is not None and (where := addr.ip_port(outcome.proof.remote_address)) is not None:
            stranger = self._is_outside(where[0]) and self._contacts.is_stranger(where[0])
        self._roles.heard(ask, outcome.verdict, trio.current_time(), stranger=stranger)
        self._events.emit(
            ReachabilityTested(
                by=ask.server.peer, address=ask.address, verdict=str(outcome.verdict), reason=outcome.reason
            )
        )

    def _hear(self, connection: Connection, observed: str, now: float) -> None:
        ports = {where[1] for each in self._listen() if (where := addr.ip_port(each)) is not None}
        fault = self._observed.record(
            connection=connection.number,
            remote=connection.remote_address,
            local=connection.local_address,
            observed=observed,
            outbound=connection.direction is Direction.OUTBOUND,
            listen_ports=ports,
            now=now,
        )
        if fault is not None:
            self._events.emit(ObservationRefused(peer=connection.peer, address=observed, reason=fault))
            return
        where = addr.ip_port(observed)
        if where is not None and self._counts(where[0]):
            self._seen = True
            others = [each for each in self.public_addresses() if addr.family(each) == _family(where[0])]
            moved = others and not any(each.split("/")[2] == where[0] for each in others)
            if moved and now - self._doubted >= DOUBT_GAP:
                self._doubted = now
                self._roles.doubt(now)

    def _refresh(self, now: float) -> None:
        listen = self._listen()
        self._near = frozenset(map(addr.subnet_key, filterfalse(addr.is_loopback, listen)))
        own = [each for each in listen if (where := addr.ip_port(each)) is not None and self._counts(where[0])]
        own = [each for each in own if not addr.is_loopback(each)] or own
        found = [Candidate(each, confirmed=True) for each in (*self._mapped, *own)]
        for family in (4, 6):
            told = self._observed.confirmed(family, now)
            # Behind some NATs there is one for each observer, and none leads anywhere.
            found += [Candidate(each, confirmed=True) for each in told] or [
                Candidate(each, confirmed=False) for each in self._observed.candidates(family, now)[:1]
            ]
        found.sort(key=lambda each: not addr.is_public(each.address))  # private ones, in a laboratory, come last
        families = {addr.family(each) or 4 for each in listen if self._lab or not addr.is_loopback(each)}
        self._seen = self._seen or bool(own)
        self._roles.offer(found, families, now)
        self._wake.set()

    def _notice(self, now: float) -> None:
        refuted = tuple(each for each in self._listen() if self.is_refuted(each))
        told = self.role, self.public_addresses(), refuted, self.offers_dcutr
        if told == self._told:
            return
        before, self._told = self._told, told
        if before[0] is not self.role:
            self._events.emit(RoleChanged(role=str(self.role), reason=self._roles.reason(now)))
        for callback in self.on_changed:
            callback()

    # Others

    def _servers(self) -> list[Server]:
        found = {each.peer: each for each in map(self._as_server, self._connections()) if each is not None}
        return list(found.values())

    def _as_server(self, connection: Connection) -> Server | None:
        ip = self._ip_of(connection)
        if ip is None or not self._is_outside(ip) or connection.closing:
            return None
        protocols = self._protocols_of(connection.peer)
        v1, v2, stranger = (each in protocols for each in (V1, DIAL_REQUEST, STRANGER))
        if not (v1 or v2):
            return None
        chosen = connection.direction is Direction.OUTBOUND
        return Server(connection.peer, self._group_of(ip), _family(ip), v1, v2, stranger, chosen)

    def _own_addresses(self) -> list[str]:
        """Where this machine and the router before it can be reached: nobody may send us there."""
        now = trio.current_time()
        seen = (each for family in (4, 6) for each in self._observed.confirmed(family, now))
        return [*self._listen(), *self._mapped, *seen]

    def _helpers(self, asker: Connection) -> list[Connection]:
        """Connections to those who may dial a peer in our place: in another network than the peer, in any order."""
        group = self._group_of(asker.remote_address)
        found: dict[PeerId, Connection] = {}
        for each in self._connections():
            ip = self._ip_of(each)
            if ip is None or each.closing or each.peer == asker.peer or not self._counts(ip):
                continue
            if STRANGER_DIAL in self._protocols_of(each.peer) and self._group_of(ip) != group:
                found[each.peer] = each
        helpers = list(found.values())
        random.shuffle(helpers)
        return helpers

    def _was_dialed_by(self, peer: PeerId) -> bool:
        """Whether a connection with this peer counts for it as what `connected` calls a contact."""
        return any(
            each.peer == peer and (each.path.kind is PathKind.PUNCHED or each.direction is Direction.INBOUND)
            for each in self._connections()
            if self._ip_of(each) is not None
        )

    def _ip_of(self, connection: Connection) -> str | None:
        """The other end's IP; ``None`` where a relay stands between."""
        if connection.path.kind is PathKind.RELAYED:
            return None
        where = addr.ip_port(connection.remote_address)
        return where[0].partition("%")[0] if where is not None else None

    def _is_outside(self, ip: str) -> bool:
        """Whether who comes from there shows that others can: not from this machine, nor from our own IPv6 /64, where
        no router stands between.
        """
        return self._counts(ip) and addr.subnet_key(ip) not in self._near

    def _counts(self, ip: str) -> bool:
        return addr.is_public(ip) or (self._lab and (addr.is_private(ip) or addr.is_loopback(ip)))


def _family(ip: str) -> int:
    return 6 if ":" in ip else 4
