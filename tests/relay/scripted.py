"""A relay that does what a test says: tells the truth, lies, says nothing, goes away in the middle."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from kas_libp2p import Config, Node, open_node, ping
from kas_libp2p.config import RelayConfig
from kas_libp2p.errors import KasError
from kas_libp2p.events import Event
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._messages import (
    HOP,
    STOP,
    UNLIMITED,
    Connect,
    HopMessage,
    HopStatus,
    Limit,
    Peer,
    Reservation,
    Reserve,
    Status,
    StopConnect,
    StopStatus,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.network import E, MemoryInternet, make_swarm, running

RELAY_ADDRESS = "/ip4/11.0.0.1/tcp/1"
RELAY = Identity.from_seed(bytes([1]) * 32)
RELAY_AT = f"{RELAY_ADDRESS}/p2p/{RELAY.peer_id}"
THROUGH = f"{RELAY_AT}/p2p-circuit"
Script = Callable[[YamuxStream, HopMessage], Awaitable[None]]


def place(
    *, lifetime: float = 3600, addresses: tuple[str, ...] = (), voucher: bytes | None = None, limit: Limit = UNLIMITED
) -> bytes:
    """Yes to a RESERVE."""
    expire = int(time.time() + lifetime)
    return encode_hop(HopStatus(Status.OK, Reservation(expire, addresses, voucher), limit))


class ScriptedRelay:
    """A relay.

    Attributes:
        requests: every request, with the time at which it came.
        script: what it does with one; `grant` and `splice` if nothing else is set.
        limit: what it says of each circuit.
        observed: what it says of where it sees the other end.
    """

    def __init__(self, internet: MemoryInternet) -> None:
        self.swarm, self.bus = make_swarm(internet.host("11.0.0.1"), 1)
        self.swarm.handle(HOP, self._hop, max_per_peer=64)
        self.swarm.handle(ping.ID, ping.handle)
        self.swarm.keeps.append(lambda _: True)
        self.requests: list[tuple[float, HopMessage]] = []
        self.script: Script | None = None
        self.limit = UNLIMITED
        self.observed: tuple[str, ...] = ()
        self.circuits: list[tuple[YamuxStream, YamuxStream]] = []

    async def _hop(self, stream: YamuxStream) -> None:
        request = decode_hop(await receive_frame(stream, 4096))
        self.requests.append((trio.current_time(), request))
        if self.script is not None:
            return await self.script(stream, request)
        match request:
            case Reserve():
                await stream.send_all(place(limit=self.limit))
            case Connect(peer):
                await self.splice(stream, peer)
        return None

    def times(self, kind: type[HopMessage]) -> list[float]:
        """When requests of a kind came."""
        return [at for at, request in self.requests if isinstance(request, kind)]

    async def stop(
        self, to: PeerId, source: PeerId, *, raw: bytes | None = None, limit: Limit | None = None
    ) -> tuple[Status | None, YamuxStream]:
        """Tell a peer of a circuit, or something else; returns its answer, ``None`` if it gives none."""
        connection = self.swarm.connection_to(to)
        assert connection is not None
        stream = await connection.open_stream(STOP)
        wanted = StopConnect(Peer(source, self.observed), self.limit if limit is None else limit)
        await stream.send_all(encode_stop(wanted) if raw is None else raw)
        try:
            answer = decode_stop(await receive_frame(stream, 4096))
        except (KasError, trio.BrokenResourceError):
            return None, stream
        assert isinstance(answer, StopStatus)
        return answer.status, stream

    async def splice(self, stream: YamuxStream, peer: PeerId) -> None:
        """Make a circuit, and carry it until it ends."""
        status, there = await self.stop(peer, stream.connection.peer)
        if status is not Status.OK:
            await stream.send_all(encode_hop(HopStatus(Status.CONNECTION_FAILED)))
            return
        told = Peer(peer, self.observed) if self.observed else None
        await stream.send_all(encode_hop(HopStatus(Status.OK, None, self.limit, told)))
        self.circuits.append((stream, there))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, stream, there)
                nursery.start_soon(_copy, there, stream)
        finally:
            there.reset()
            stream.reset()


async def _copy(source: YamuxStream, sink: YamuxStream) -> None:
    try:
        while data := await source.receive_some():
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        source.reset()
        sink.reset()


class Told:
    """A node's events, from the beginning."""

    def __init__(self, node: Node) -> None:
        self.events: list[Event] = []
        emit = node.bus.emit

        def record(event: Event) -> None:
            self.events.append(event)
            emit(event)

        node.bus.emit = record  # type: ignore[method-assign]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def scripted_relay(internet: MemoryInternet) -> AsyncIterator[ScriptedRelay]:
    relay = ScriptedRelay(internet)
    async with running(relay.swarm, RELAY_ADDRESS):
        yield relay


def private(**settings: object) -> Config:
    """The settings of a node that listens nowhere and keeps a place on the relay."""
    return Config(listen=(), relay=replace(RelayConfig(relays=(RELAY_AT,)), **settings))  # type: ignore[arg-type]


@asynccontextmanager
async def node_at(internet: MemoryInternet, number: int, config: Config | None = None) -> AsyncIterator[Node]:
    """A node that keeps places on the relays of its settings, and on no other."""
    config = config or Config(listen=())
    alone = replace(config, relay=replace(config.relay, relays=(), target=0))
    identity = Identity.from_seed(bytes([number]) * 32)
    async with open_node(alone, identity=identity, network=internet.host(f"11.0.0.{number}")) as node:
        if config.relay.relays:
            node.use_relays(*config.relay.relays)
        yield node


@asynccontextmanager
async def hidden_at(internet: MemoryInternet, number: int, config: Config | None = None) -> AsyncIterator[Node]:
    """A node that keeps a place on the relay and on no other, whatever comes of it: no pool has a say."""
    async with node_at(internet, number, config) as node:
        node.use_relays(RELAY_AT)
        yield node
