"""Our side of `tests.perf.relay`: a relay, peers that are reached through it, and peers that call, as processes.

usage: python -m tests.perf.relay_peers relay
       python -m tests.perf.relay_peers listen RELAY [--count N]     N nodes, each with a place on the relay
       python -m tests.perf.relay_peers dial                         one node that calls
       python -m tests.perf.relay_peers crowd RELAY                  identities that hold places and do nothing else

They speak as ``tests/interop/rust`` does. Orders: ``connect``, ``perf``, ``echo``, ``blocks`` (dial); ``join``,
``reserve`` (crowd).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import trio

from kas_libp2p import Config, Node, addresses, identify, open_node
from kas_libp2p._identify import statement
from kas_libp2p.config import DialConfig, Limits, Purpose, RelayConfig, RelayLimits, Role, YamuxConfig
from kas_libp2p.errors import ConnectionLost, StreamReset, UpgradeError
from kas_libp2p.events import EventBus
from kas_libp2p.identity import Identity
from kas_libp2p.relay._messages import HOP, HopStatus, Reserve, Status, decode_hop, encode_hop
from kas_libp2p.swarm.network import TcpNetwork
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.perf.peers import (
    ECHO,
    LOOPBACK,
    MANY,
    PERF,
    SERVICES,
    Json,
    echoes,
    percentiles,
    read_orders,
    say,
    upload,
)

WIDE = Limits(
    max_connections=2 * MANY,
    max_inbound=MANY,
    max_outbound=MANY,
    max_per_peer=MANY,
    max_pending_inbound=MANY,
    idle_timeout=3600.0,
)
STREAMS = YamuxConfig(max_inbound_streams=MANY, max_outbound_streams=MANY, max_memory=1 << 30)
OPEN = RelayLimits(
    max_reservations=MANY,
    max_reservations_per_ip=MANY,
    max_reservations_per_network=MANY,
    max_circuits=MANY,
    max_circuits_per_peer=MANY,
    max_circuit_seconds=0.0,
    max_circuit_rate=0,
    requests_per_peer=MANY,
    requests_per_ip=MANY,
)
BLOCK = 600
"""Bytes of an empty block in its message, about."""
JOINING = 16
"""Identities that connect at the same time."""


class Caller:
    """A node that calls others."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def act(self, order: Json) -> Json:
        match order["do"]:
            case "connect":
                address = order["addr"]
                peer = addresses.peer_of(address)
                assert peer is not None
                begun = time.perf_counter()
                await self._node.swarm.dial(peer, [address], fresh=True)
                return {"peer": peer, "seconds": time.perf_counter() - begun}
            case "perf":
                stream = await self._node.connect(order["peer"], PERF)
                return {"upload_seconds": await upload(stream, order["upload"], order["write"])}
            case "echo":
                return await echoes(await self._node.connect(order["peer"], ECHO), order["size"], order["count"])
            case "blocks":
                return await self._blocks(order["rate"], order["seconds"])
        raise ValueError(f"unknown order {order['do']}")

    async def _blocks(self, rate: float, seconds: float) -> Json:
        """On every circuit, send so many blocks per second and have each answered."""
        times: list[float] = []
        circuits = [each for each in self._node.connections if each.connection.path.relay is not None]

        async def one(connection: Connection, number: int) -> None:
            stream = await connection.open_stream(ECHO)
            data = bytes(BLOCK)
            await trio.sleep(number / len(circuits) / rate)
            due = trio.current_time()
            for _ in range(int(seconds * rate)):
                begun = time.perf_counter()
                await stream.send_all(data)
                missing = BLOCK
                while missing:
                    missing -= len(await stream.receive_some())
                times.append(time.perf_counter() - begun)
                due += 1 / rate
                await trio.sleep_until(due)
            await stream.aclose()

        begun = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number, each in enumerate(circuits):
                nursery.start_soon(one, each.connection, number)
        took = time.perf_counter() - begun - 1 / rate  # they begin one after the other
        return {"circuits": len(circuits), "per_second": len(times) / took, **percentiles(times)}


class Crowd:
    """Many identities on one relay."""

    def __init__(self, relay: str, nursery: trio.Nursery) -> None:
        self._address = addresses.without_peer(relay)
        self._relay = addresses.peer_of(relay)
        self._nursery = nursery
        self._network = TcpNetwork(DialConfig(), EventBus(time.time))
        self._connections: list[Connection] = []
        self._turns = trio.CapacityLimiter(JOINING)

    async def act(self, order: Json) -> Json:
        match order["do"]:
            case "join":
                async with trio.open_nursery() as nursery:
                    for _ in range(order["count"]):
                        nursery.start_soon(self._join)
                return {}
            case "reserve":
                times: list[float] = []
                async with trio.open_nursery() as nursery:
                    for each in self._connections:
                        nursery.start_soon(self._reserve, each, times)
                return percentiles(times)
        raise ValueError(f"unknown order {order['do']}")

    async def _join(self) -> None:
        async with self._turns:
            identity = Identity.generate()
            raw = await self._network.dial(self._address)
            connection = await upgrade(raw, identity=identity, initiator=True, expected=self._relay, config=Config())
            self._connections.append(connection)
            self._nursery.start_soon(
                connection.run, lambda stream: self._nursery.start_soon(_identify, stream, identity)
            )

    async def _reserve(self, connection: Connection, times: list[float]) -> None:
        async with self._turns:
            begun = time.perf_counter()
            stream = await connection.open_stream(HOP)
            await stream.send_all(encode_hop(Reserve()))
            answer = decode_hop(await receive_frame(stream, 4096))
            assert isinstance(answer, HopStatus)
            assert answer.status is Status.OK
            times.append(time.perf_counter() - begun)
            await stream.aclose()


async def _identify(stream: YamuxStream, identity: Identity) -> None:
    try:
        await stream.connection.accept(stream, (identify.ID,))
        await stream.send_all(
            statement(
                identity,
                agent="crowd",
                protocol_version="/crowd",
                protocols=(identify.ID,),
                listen=(),
                seq=1,
                observed=None,
            )
        )
        await stream.aclose()
    except (UpgradeError, ConnectionLost, StreamReset):
        pass


async def run_relay() -> None:
    relay = RelayConfig(serve=True, purpose=Purpose.ANY, limits=OPEN)
    config = Config(listen=(LOOPBACK,), limits=WIDE, yamux=STREAMS, role=Role.PUBLIC, relay=relay)
    async with open_node(config) as node:
        say("started", peer=node.peer_id)
        say("listening", address=node.addresses[0])
        await read_orders(nothing)


async def nothing(order: Json) -> Json:
    raise ValueError(f"unknown order {order['do']}")


async def run_listen(relay: str, count: int) -> None:
    config = Config(
        listen=(), limits=WIDE, yamux=STREAMS, relay=RelayConfig(relays=(relay,), max_inbound_per_relay=MANY)
    )
    ready = []

    async def one(*, task_status: Any) -> None:
        async with open_node(config) as node:
            for protocol, service in SERVICES.items():
                await node.serve(service, protocol, max_streams=MANY, max_per_peer=MANY)
            while not any(each.held for each in node.relay_client.reservations):  # noqa: ASYNC110 - another's measurement
                await trio.sleep(0.01)
            ready.append(node.peer_id)
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            await nursery.start(one)
        say("started", peer=ready[0])
        say("reserved", peers=ready)
        await read_orders(nothing)
        nursery.cancel_scope.cancel()


async def run_dial() -> None:
    async with open_node(Config(listen=(), limits=WIDE, yamux=STREAMS)) as node:
        say("started", peer=node.peer_id)
        await read_orders(Caller(node).act)


async def run_crowd(relay: str) -> None:
    async with trio.open_nursery() as nursery:
        say("started", peer="")
        await read_orders(Crowd(relay, nursery).act)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("relay", "listen", "dial", "crowd"))
    parser.add_argument("relay", nargs="?", default="")
    parser.add_argument("--count", type=int, default=1)
    options = parser.parse_args()
    match options.role:
        case "relay":
            trio.run(run_relay)
        case "listen":
            trio.run(run_listen, options.relay, options.count)
        case "dial":
            trio.run(run_dial)
        case "crowd":
            trio.run(run_crowd, options.relay)


if __name__ == "__main__":
    main()
