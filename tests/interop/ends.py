"""Relays and ends of circuits, whoever wrote them, behind one interface: ours, go's, js's and rust's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits, Role
from tests.interop.peer import Json, Peer, PeerError, running_peer
from tests.interop.protocols import ECHO, both_ways, serve
from tests.network import eventually

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
Programs = dict[str, Path]


class End(Protocol):
    """A peer that others reach through a relay, or that reaches others.

    Attributes:
        peer: its peer id.
    """

    peer: str

    async def connect(self, address: str) -> None:
        """Connect to an address through a relay. Raises."""

    async def echo(self, peer: str, size: int) -> None:
        """Have a connected peer send so many bytes back, on a stream whose directions are ended in turn. Raises."""

    async def told(self, peer: str) -> Json:
        """What a connected peer said of itself: its ``addresses``, and where it sees us: ``observed``. Raises."""

    def ways(self, peer: str) -> list[str]:
        """Where the connections with a peer lead, or have led."""

    async def disconnected(self, peer: str) -> None:
        """Wait until a connection with a peer has ended."""


class Ours:
    """A node of ours."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.peer = node.peer_id

    async def connect(self, address: str) -> None:
        await self.node.identify(address)

    async def echo(self, peer: str, size: int) -> None:
        stream = await self.node.connect(peer, ECHO)
        received = await both_ways(stream, size)
        assert received.intact
        assert received.size == size

    async def told(self, peer: str) -> Json:
        info = await self.node.identify(peer)
        assert info is not None
        return {"addresses": list(info.addresses), "observed": info.observed}

    def ways(self, peer: str) -> list[str]:
        return [each.connection.remote_address for each in self.node.swarm.connections_to(peer)]

    async def disconnected(self, peer: str) -> None:
        await eventually(lambda: not self.ways(peer))


class Theirs:
    """A go peer, and what others have in common with it."""

    def __init__(self, process: Peer) -> None:
        self.process = process
        self.peer = process.peer

    async def connect(self, address: str) -> None:
        await self.process.order("connect", address=address)

    async def echo(self, peer: str, size: int) -> None:
        answer = await self.process.order("echo", peer=peer, size=size)
        assert answer["intact"]

    async def told(self, peer: str) -> Json:
        return await self.process.wait("identified", peer=peer)

    def ways(self, peer: str) -> list[str]:
        return [each["remote"] for each in self.process.seen("connected", peer=peer)]

    async def disconnected(self, peer: str) -> None:
        await self.process.wait("disconnected", peer=peer)


class Js(Theirs):
    """A js peer, which is asked what it was told: it does not tell when it could make nothing of it."""

    async def told(self, peer: str) -> Json:
        return await self.process.order("identify", peer=peer)


class Rust(Theirs):
    """A rust peer, which has its own orders."""

    async def connect(self, address: str) -> None:
        await self.process.order("connect", addr=address)

    async def echo(self, peer: str, size: int) -> None:
        answer = await self.process.order("streams", peer=peer, count=1, size=size)
        assert answer["complete"]

    def ways(self, peer: str) -> list[str]:  # of a circuit to it, it has the relay in its own address
        return [f"{each['local'] or ''}{each['remote']}" for each in self.process.seen("connected", peer=peer)]


@asynccontextmanager
async def relay(
    kind: str, programs: Programs, *arguments: str, **limits: Any
) -> AsyncIterator[tuple[str, Peer | Node]]:
    """A relay and its address.

    Args:
        arguments: of a foreign one's command line; without any, it has no limits.
        limits: of ours, see `RelayLimits`.
    """
    if kind != "ours":
        async with running_peer(programs[kind], "listen", *(arguments or ("--relay-open",))) as process:
            yield process.address, process
        return
    settings = RelayConfig(serve=True, purpose=Purpose.ANY, limits=RelayLimits(**limits))
    async with open_node(Config(listen=(LOOPBACK,), role=Role.PUBLIC, relay=settings)) as node:
        yield node.addresses[0], node


@asynccontextmanager
async def caller(kind: str, programs: Programs, address: str) -> AsyncIterator[End]:
    """An end that is about to reach others through the relay at an address, and holds no place there."""
    if kind == "ours":
        async with open_node(Config(listen=())) as node:
            await serve(node)
            yield Ours(node)
    elif kind == "rust":
        async with running_peer(programs[kind], "dial", address) as process:
            await process.wait("connected")
            yield Rust(process)
    else:
        async with running_peer(programs[kind]) as process:
            yield Js(process) if kind == "js" else Theirs(process)


@asynccontextmanager
async def called(kind: str, programs: Programs, address: str) -> AsyncIterator[End]:
    """An end that holds a place on the relay at an address.

    Raises:
        PeerError: it could not get one.
    """
    if kind == "ours":
        async with open_node(Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=(address,)))) as node:
            await serve(node)
            await eventually(lambda: bool(node.relay_client.addresses()))
            yield Ours(node)
        return
    async with caller(kind, programs, address) as end:
        assert isinstance(end, Theirs)
        if kind == "rust":  # asked for a place while it dials, it forgets about it
            await end.process.order("listen", addr=f"{address}/p2p-circuit")
            answer = await end.process.wait("reserved|listener-failed")
            if answer["event"] != "reserved":
                raise PeerError(answer["error"])
        else:
            await end.process.order("reserve", address=address)
        yield end
