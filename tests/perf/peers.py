"""One side of a measurement, as a process that is told what to do: the same orders, whatever the subject is.

usage: python -m tests.perf.peers SUBJECT listen|dial [--many]

Subjects: raw (plain trio TCP), bound (framing and nothing else), ours (a node of this library with all its services),
stock (py-libp2p as it comes). ``--many`` lifts the limits on connections.

It speaks as ``tests/interop/rust`` does, so that one driver commands both: JSON lines, ``started`` and ``listening``
first, then orders on stdin, until stdin closes. Orders: ``connect``, ``disconnect``, ``perf``, ``echo``, ``redial``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

import trio

from tests.perf.bound import Framed

PERF = "/perf/1.0.0"
ECHO = "/kas-interop/echo/1.0.0"
HEADER = 8
READ = 65536
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
FOREVER = 3600.0
"""Seconds that idle connections stay."""
MANY = 4000
"""Connections allowed where memory per connection is measured."""

Stream = Any  # send_all, send_eof, receive_some, aclose: trio's, ours, or `StockStream`
Json = dict[str, Any]


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


# The two services and their clients, on any stream


async def serve_perf(stream: Stream) -> None:
    """Read a header and everything until the end, then end."""
    while await stream.receive_some():
        pass
    await stream.send_eof()


async def serve_echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


Service = Callable[[Stream], Awaitable[None]]
SERVICES: dict[str, Service] = {PERF: serve_perf, ECHO: serve_echo}


async def upload(stream: Stream, total: int, size: int) -> float:
    """Write so many bytes and wait until they are read. Returns seconds."""
    data = bytes(size)
    start = time.perf_counter()
    await stream.send_all(bytes(HEADER))
    for _ in range(total // size):
        await stream.send_all(data)
    await stream.send_eof()
    while await stream.receive_some():
        pass
    seconds = time.perf_counter() - start
    await stream.aclose()
    return seconds


async def round_trip(stream: Stream, data: bytes) -> None:
    await stream.send_all(data)
    missing = len(data)
    while missing:
        got = await stream.receive_some()
        if not got:
            raise EOFError("the echo ended")
        missing -= len(got)


async def echoes(stream: Stream, size: int, count: int) -> Json:
    data = bytes(size)
    times = []
    await round_trip(stream, data)
    for _ in range(count):
        start = time.perf_counter()
        await round_trip(stream, data)
        times.append(time.perf_counter() - start)
    await stream.aclose()
    return percentiles(times)


def percentiles(times: list[float]) -> Json:
    """Seconds in, microseconds out."""
    times = sorted(times)
    return {"count": len(times), **{f"p{share}": times[len(times) * share // 100] * 1e6 for share in (50, 95)}}


# The subjects


class Peer(Protocol):
    """A subject's side of a connection."""

    async def listen(self) -> str:
        """Serve. Returns the address."""

    async def connect(self, address: str) -> None: ...

    async def open(self, protocol: str) -> Stream:
        """A stream on the connection."""

    async def disconnect(self) -> None:
        """End all connections."""


class Raw:
    """Plain trio TCP: a connection per stream, whose first byte names the service."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._port = 0

    async def listen(self) -> str:
        serve: Any = trio.serve_tcp
        listeners = await self._nursery.start(serve, self._serve, 0)
        return f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"

    async def connect(self, address: str) -> None:
        self._port = int(address.split("/")[4])

    async def open(self, protocol: str) -> Stream:
        stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        await stream.send_all(bytes((list(SERVICES).index(protocol),)))
        return self._wrap(stream)

    async def disconnect(self) -> None:
        pass

    def _wrap(self, stream: trio.SocketStream) -> Stream:
        return stream

    async def _serve(self, stream: trio.SocketStream) -> None:
        service = list(SERVICES.values())[(await stream.receive_some(1))[0]]
        with suppress(trio.BrokenResourceError):
            await self._serve_with(service, stream)

    async def _serve_with(self, service: Service, stream: trio.SocketStream) -> None:
        await service(stream)


class Bound(Raw):
    """Noise and Yamux frames on trio TCP, and nothing more: see `tests.perf.bound`."""

    def _wrap(self, stream: trio.SocketStream) -> Stream:
        framed = Framed(stream.socket)
        self._nursery.start_soon(framed.run)
        return framed

    async def _serve_with(self, service: Service, stream: trio.SocketStream) -> None:
        framed = Framed(stream.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(framed.run)
            await service(framed)
            await framed.aclose()


class Ours:
    """A node, with identify and whatever else it does by itself."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._peer = ""

    async def listen(self) -> str:
        from kas_libp2p import perf

        await self._node.serve(perf.handle, perf.ID)
        await self._node.serve(serve_echo, ECHO)
        address: str = self._node.addresses[0]
        return address

    async def connect(self, address: str) -> None:
        self._peer = address.rpartition("/")[2]
        await self._node.swarm.dial(self._peer, [address], fresh=True)

    async def open(self, protocol: str) -> Stream:
        return await self._node.connect(self._peer, protocol)

    async def disconnect(self) -> None:
        await self._node.disconnect(self._peer)


class StockStream:
    """A stream of stock py-libp2p with trio's words."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.send_all = stream.write
        self.send_eof = stream.close_write
        self.aclose = stream.close

    async def receive_some(self) -> bytes:
        from libp2p.network.stream.exceptions import StreamEOF

        try:
            data: bytes = await self._stream.read(READ)
        except StreamEOF:
            return b""
        return data


class Stock:
    """py-libp2p's own host, TCP, Noise and Yamux; only its plaintext and its limits are out of the way."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._peer: Any = None
        self._connections: list[Any] = []

    async def listen(self) -> str:
        for protocol, service in SERVICES.items():
            self._host.set_stream_handler(protocol, self._handler(service))
        return str(self._host.get_addrs()[0])

    @staticmethod
    def _handler(service: Service) -> Callable[[Any], Awaitable[None]]:
        async def handle(stream: Any) -> None:
            await service(StockStream(stream))

        return handle

    async def connect(self, address: str) -> None:
        from libp2p.peer.peerinfo import info_from_p2p_addr
        from multiaddr import Multiaddr

        info = info_from_p2p_addr(Multiaddr(address))
        self._peer = info.peer_id
        # Not host.connect(): it never takes less than 250 ms.
        self._connections.append(await self._host.get_network().dial_addr(info.addrs[0], info.peer_id))

    async def open(self, protocol: str) -> Stream:
        return StockStream(await self._host.new_stream(self._peer, [protocol]))

    async def disconnect(self) -> None:
        for connection in self._connections:
            await connection.close()
        self._connections.clear()


@asynccontextmanager
async def raw_peer(listen: bool, many: bool) -> AsyncIterator[Peer]:
    async with trio.open_nursery() as nursery:
        yield Raw(nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def bound_peer(listen: bool, many: bool) -> AsyncIterator[Peer]:
    async with trio.open_nursery() as nursery:
        yield Bound(nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def our_peer(listen: bool, many: bool) -> AsyncIterator[Peer]:
    from kas_libp2p import Config, open_node
    from kas_libp2p.config import Limits

    limits = Limits(max_connections=MANY, max_inbound=MANY, max_outbound=MANY, max_per_peer=MANY, idle_timeout=FOREVER)
    config = Config(listen=(LOOPBACK,) if listen else (), limits=limits if many else Limits())
    async with open_node(config) as node:
        yield Ours(node)


@asynccontextmanager
async def stock_peer(listen: bool, many: bool) -> AsyncIterator[Peer]:
    import libp2p
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_pair
    from libp2p.network.config import ConnectionConfig
    from libp2p.rcmgr.connection_limits import ConnectionLimits
    from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport
    from multiaddr import Multiaddr

    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_noise_pair().private_key)
    limits = ConnectionConfig(  # its inbound slots are never released, and it dials peers by itself below low_watermark
        max_connections=MANY, high_watermark=MANY, max_connections_per_peer=MANY, low_watermark=0, min_connections=0
    )
    manager = ResourceManager(ResourceLimits(MANY), connection_limits=ConnectionLimits(), enable_rate_limiting=False)
    host = libp2p.new_host(
        key_pair=keys, sec_opt={PROTOCOL_ID: noise}, connection_config=limits, resource_manager=manager
    )
    async with host.run(listen_addrs=[Multiaddr(LOOPBACK)] if listen else []):
        yield Stock(host)


PEERS = {"raw": raw_peer, "bound": bound_peer, "ours": our_peer, "stock": stock_peer}


# Orders


async def act(peer: Any, order: Json) -> Json:
    match order["do"]:
        case "connect":
            await peer.connect(order["addr"])
            return {}
        case "disconnect":
            await peer.disconnect()
            return {}
        case "perf":
            return {"upload_seconds": await upload(await peer.open(PERF), order["upload"], order["write"])}
        case "echo":
            return await echoes(await peer.open(ECHO), order["size"], order["count"])
        case "redial":
            times = []
            for _ in range(order["count"]):
                start = time.perf_counter()
                await peer.connect(order["addr"])
                stream = await peer.open(ECHO)
                await round_trip(stream, bytes(32))
                times.append(time.perf_counter() - start)
                await stream.aclose()
                await peer.disconnect()
            return percentiles(times)
        case other:
            raise ValueError(f"unknown order {other}")


Act = Callable[[Json], Awaitable[Json]]


async def obey(act: Act, order: Json) -> None:
    try:
        fields = await act(order)
    except Exception as error:  # noqa: BLE001 - one order fails, the process goes on
        say("failed", id=order["id"], error=repr(error))
    else:
        say("done", id=order["id"], **fields)


async def read_orders(act: Act) -> None:
    """Carry out what stdin says, until it closes."""
    rest = b""
    async with trio.open_nursery() as nursery:
        async for data in trio.lowlevel.FdStream(sys.stdin.fileno()):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                nursery.start_soon(obey, act, json.loads(line))
        nursery.cancel_scope.cancel()


async def run(subject: str, listen: bool, many: bool) -> None:
    async with PEERS[subject](listen, many) as peer:
        say("started", peer="")
        if listen:
            say("listening", address=await peer.listen())
        await read_orders(partial(act, peer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=PEERS)
    parser.add_argument("role", choices=("listen", "dial"))
    parser.add_argument("--many", action="store_true")
    options = parser.parse_args()
    trio.run(run, options.subject, options.role == "listen", options.many)


if __name__ == "__main__":
    main()
