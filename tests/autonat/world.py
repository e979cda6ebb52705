"""A small internet in memory, with NATs of every type that natlab has, and peers that run `Reachability` on it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.autonat.roles import Reachability
from kas_libp2p.config import AutoNatConfig, Config, Limits, Role
from kas_libp2p.identify import ID, PUSH, Identify
from kas_libp2p.identity import Identity
from kas_libp2p.swarm import Swarm, SwarmConnection
from kas_libp2p.transport.connection import Connection
from natlab.nat import Filtering, Mapping, Nat, Port, Refusal, chain_of, nat_named
from tests.memory import MemoryRaw, memory_pair
from tests.network import MemoryHost, MemoryInternet, MemoryListener, RecordingBus

Endpoint = tuple[str, int]
PORT = 16117
DELAY = 0.02
LOST = 5.0
"""Seconds until a SYN without an answer is given up."""


class Router:
    """One router of a type of natlab's, for TCP."""

    def __init__(self, nat: Nat, wan: str) -> None:
        self.nat = nat
        self.wan = wan
        self._ports: dict[tuple[object, ...], int] = {}
        self._inner: dict[int, Endpoint] = {}
        self._sent: set[tuple[Endpoint, Endpoint]] = set()
        self._fresh = itertools.count(40_000)

    def out(self, source: Endpoint, target: Endpoint) -> Endpoint:
        """As which endpoint a packet leaves."""
        outer = source
        if self.nat.translates:
            towards = {Mapping.EIM: (), Mapping.ADM: target[:1], Mapping.APDM: target}[self.nat.mapping]
            key = (source, *towards)
            if key not in self._ports:
                keeps = self.nat.port is Port.KEEP and source[1] not in self._inner
                port = self._ports[key] = source[1] if keeps else next(self._fresh)
                self._inner[port] = source
            outer = self.wan, self._ports[key]
        self._sent.add((outer, target))
        return outer

    def into(self, source: Endpoint, target: Endpoint) -> Endpoint | None:
        """Where a packet from outside goes, ``None`` if nowhere."""
        match self.nat.filtering:
            case Filtering.ADF if not any(outer == target and to[0] == source[0] for outer, to in self._sent):
                return None
            case Filtering.APDF if (target, source) not in self._sent:
                return None
        return self._inner.get(target[1]) if self.nat.translates else target


class Internet(MemoryInternet):
    """Routes by IP, through NATs."""

    def __init__(self) -> None:
        super().__init__(delay=DELAY)
        self.hosts: dict[str, Host] = {}
        self.down: set[str] = set()

    def connect(self, host: Host, port: int, target: Endpoint) -> tuple[MemoryListener | None, Endpoint, bool]:
        """The listener that a SYN reaches, the endpoint that it seems to come from, and whether it is refused."""
        source = host.ip, port
        for each in host.routers:
            source = each.out(source, target)
        there = self.hosts.get(target[0])
        if there is None or target[0] in self.down:
            return None, source, False
        at = target
        for each in reversed(there.routers):
            inner = each.into(source, at)
            if inner is None:
                return None, source, each.nat.refusal is not Refusal.DROP
            at = inner
        return self.listeners.get(str(addresses.from_ip_port(*at))), source, True


class Host(MemoryHost):
    """A host, perhaps behind NATs. Dials from its listen port where that is possible, as the real one does."""

    def __init__(self, internet: Internet, ip: str, routers: Sequence[Router]) -> None:
        super().__init__(internet, ip)
        self.world = internet
        self.routers = routers
        self.used: set[Endpoint] = set()
        self.fresh: list[tuple[int, Endpoint]] = []
        self.on_contact: Callable[[str], None] = lambda ip: None
        outer = routers[-1]
        internet.hosts[outer.wan if outer.nat.translates else ip] = self

    async def dial(self, address: Multiaddr) -> MemoryRaw:
        target = addresses.ip_port(address)
        assert target is not None
        port = PORT
        if target in self.used:
            port = next(self.world._ports)
        else:
            self.used.add(target)
            self.on_contact(target[0])
        return await self._connect(port, target)

    async def dial_fresh(self, address: Multiaddr) -> MemoryRaw:
        target = addresses.ip_port(address)
        assert target is not None
        self.fresh.append((next(self.world._ports), target))
        return await self._connect(*self.fresh[-1])

    async def _connect(self, port: int, target: Endpoint) -> MemoryRaw:
        listener, source, refused = self.world.connect(self, port, target)
        if listener is None:
            await trio.sleep(2 * DELAY if refused else LOST)
            raise ConnectionRefusedError(111, "Connection refused") if refused else TimeoutError(110, "timed out")
        await trio.sleep(2 * DELAY)
        here, there = memory_pair(delay=DELAY)
        here.local_address = addresses.ip_port_text(self.ip, port)
        here.remote_address = addresses.ip_port_text(*target)
        there.local_address = str(listener.address)
        there.remote_address = addresses.ip_port_text(*source)
        self.world.pipes.append((here, there))
        listener._send.send_nowait(there)
        return here


class Peer:
    """A swarm with identify and `Reachability`, wired as a node wires them."""

    def __init__(self, host: Host, seed: int, config: Config) -> None:
        self.host = host
        self.bus = RecordingBus()
        identity = Identity.from_seed(seed.to_bytes(2, "big") * 16)
        self.swarm = Swarm(identity, config, events=self.bus, network=host)
        self.identify = Identify(
            identity,
            self.bus,
            listen=lambda: [addresses.parse(each) for each in self.swarm.listen_addresses()],
            protocols=self.swarm.protocols,
            agent="test",
            protocol_version="test",
            wall_clock=trio.current_time,
        )
        self.reachability = Reachability(
            identity.peer_id,
            config,
            self.bus,
            listen=self.swarm.listen_addresses,
            connections=lambda: [each.connection for each in self.swarm.all_connections()],
            protocols_of=self.protocols_of,
            dial=host.dial_fresh,
        )
        host.on_contact = self.reachability.contacted
        self.swarm.on_connected.append(self.connected)
        self.swarm.on_disconnected.append(self.disconnected)
        self.swarm.on_addresses.append(self.reachability.listening)
        self.swarm.handle(ID, self.identify.handle)
        self.swarm.handle(PUSH, self.identify.handle_push)
        for each in self.reachability.services:
            self.swarm.handle(each.protocol, each.handle, max_streams=each.max_streams, max_per_peer=each.max_per_peer)
        self.nursery: trio.Nursery | None = None

    @property
    def address(self) -> str:
        return f"/ip4/{self.host.ip}/tcp/{PORT}/p2p/{self.swarm.peer}"

    def protocols_of(self, peer: str) -> tuple[str, ...]:
        info = self.identify.peers.get(peer)  # type: ignore[call-overload]
        return info.protocols if info is not None else ()

    def connected(self, connection: SwarmConnection) -> None:
        self.reachability.connected(connection.connection)
        assert self.nursery is not None
        self.nursery.start_soon(self.get_to_know, connection.connection)

    async def get_to_know(self, connection: Connection) -> None:
        await self.identify.ask(connection)
        self.reachability.identified(connection, self.identify.observed.get(connection.number))

    def disconnected(self, connection: SwarmConnection) -> None:
        self.reachability.disconnected(connection.connection)
        self.identify.forget(connection.connection, last=not self.swarm.connections_to(connection.peer))

    async def dial(self, other: Peer) -> SwarmConnection:
        return await self.swarm.dial(other.swarm.peer, [other.address])

    async def run(self, quiet: bool, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            await nursery.start(self.swarm.carry)
            await self.swarm.listen(addresses.parse(f"/ip4/{self.host.ip}/tcp/{PORT}"))
            if not quiet:
                nursery.start_soon(self.reachability.run)
            task_status.started()


class World:
    """Peers on an internet."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.internet = Internet()
        self.nursery = nursery
        self.peers: list[Peer] = []

    async def peer(
        self, ip: str, kind: str = "open", *, role: Role = Role.AUTO, serve: bool = True, quiet: bool = False
    ) -> Peer:
        """A peer at a public IP; behind a NAT with that IP if it is of a kind that translates.

        Args:
            serve: whether it serves AutoNAT.
            quiet: whether it has no tests made of its own accord.
        """
        number = len(self.peers) + 1
        outer, *nearer = map(nat_named, chain_of(kind))
        routers = [Router(each, f"100.64.0.{number}") for each in nearer] + [Router(outer, ip)]
        config = Config(
            role=role,
            autonat=AutoNatConfig(serve=serve),
            limits=Limits(idle_timeout=1e9),  # a node keeps what its relays and Kaspa streams use
        )
        inside = f"192.168.{number}.10" if outer.translates else ip
        peer = Peer(Host(self.internet, inside, routers), number, config)
        self.peers.append(peer)
        await self.nursery.start(peer.run, quiet)
        return peer

    async def servers(self, count: int, *, meshed: bool = False) -> list[Peer]:
        """Public servers in networks of their own, and a stranger that is connected to each.

        Args:
            meshed: whether they are connected to one another as well.
        """
        found = [await self.peer(f"11.{number + 1}.0.1") for number in range(count)]
        for one, other in itertools.combinations(found, 2) if meshed else ():
            await one.dial(other)
        stranger = await self.peer("11.100.0.1")
        for each in found:
            await stranger.dial(each)
        return found


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery)
        nursery.cancel_scope.cancel()
