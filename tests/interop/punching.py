"""Peers that punch, in hosts of a natlab, ours and others': what they tell, and how long it took them.

Their commands and events are documented in ``tests/interop/rust/src/punch.rs``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import trio

from kas_libp2p import Config, Node, open_node
from kas_libp2p.addresses import parse_peer_id
from kas_libp2p.config import Purpose, RelayConfig, Role
from kas_libp2p.events import ReservationMade, to_dict
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.node import SwarmConnection
from natlab import Host
from natlab.processes import Process
from tests.interop.protocols import ECHO, round_trip, serve

PATIENCE = 60.0
"""Seconds for anything of a peer: only reached when something is wrong."""
LISTEN = "/ip4/0.0.0.0/tcp/4001"
RELAY_PORT = 16117
Json = dict[str, Any]


class Puncher:
    """A peer in a host that tells what happens in lines of JSON."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @property
    def events(self) -> list[Json]:
        """All that it told so far."""
        return [json.loads(line) for line in self.process.stdout.splitlines(keepends=True) if line.endswith("}\n")]

    def seen(self, event: str, **fields: Any) -> list[Json]:
        """The events of a name and with these fields so far."""
        return [each for each in self.events if each["event"] == event and fields.items() <= each.items()]

    def wait(self, *names: str, timeout: float = PATIENCE) -> Json:
        """The first event of one of these names.

        Raises:
            LabError: there is none in time.
        """
        found = self.process.expect(rf'^.*"event": ?"({"|".join(names)})".*}}$', timeout)
        event: Json = json.loads(found[0])
        return event


def reserve(program: Path | None, host: Host, relay: str) -> tuple[Puncher, str]:
    """Start a peer with a place on a relay: it, and its address there.

    Args:
        program: ``None`` for ours.
    """
    if program is None:
        peer = Puncher(host.spawn_python(hold, relay))
    else:
        peer = Puncher(host.spawn([str(program), "reserve", relay, LISTEN], stdin=True))
    address: str = peer.wait("reserved")["address"]
    return peer, address


def dial(program: Path | None, host: Host, circuit: str) -> Puncher:
    """Start a peer that dials another through a relay, and then uses the direct connection that comes of it.

    Args:
        program: ``None`` for ours.
    """
    if program is None:
        return Puncher(host.spawn_python(call, circuit))
    return Puncher(host.spawn([str(program), "dial", circuit, LISTEN], stdin=True))


def ip_of(address: str) -> str:
    """The IP in a multiaddr."""
    found = re.match(r"/ip[46]/([^/]+)/", address)
    assert found, address
    return found[1]


# What runs in the hosts


async def relay(host: str) -> None:
    """A relay of ours that prints its address."""
    config = Config(
        listen=(f"/ip4/{host}/tcp/{RELAY_PORT}",), role=Role.PUBLIC, relay=RelayConfig(serve=True, purpose=Purpose.ANY)
    )
    async with open_node(config) as node:
        print(node.addresses[0], flush=True)
        await trio.sleep_forever()


async def hold(at: str) -> None:
    """Ours: hold a place on the relay at an address, and serve."""
    config = Config(listen=(LISTEN,), role=Role.PRIVATE, relay=RelayConfig(relays=(at,), target=1))
    async with open_node(config) as node:
        _Meetings(node)
        await serve(node)
        async for event in node.events():
            if isinstance(event, ReservationMade):
                _tell("reserved", address=f"{at}/p2p-circuit/p2p/{node.peer_id}")
            _tell(**to_dict(event))


async def call(circuit: str) -> None:
    """Ours: dial through a relay, wait for the direct connection, and use it."""
    at, _, other = circuit.partition("/p2p-circuit/p2p/")
    config = Config(listen=(LISTEN,), role=Role.PRIVATE, relay=RelayConfig(target=0))
    async with open_node(config) as node, trio.open_nursery() as nursery:

        async def tell_all() -> None:
            async for event in node.events():
                _tell(**to_dict(event))

        nursery.start_soon(tell_all)
        meetings = _Meetings(node)
        await serve(node)
        await node.identify(at)  # as the others do: it tells where we can be met
        peer = parse_peer_id(other)
        await node.swarm.dial(peer, [circuit])
        await meetings.direct.wait()
        stream = await node.connect(peer, ECHO)
        await round_trip(stream)
        _tell("echoed", intact=True, relayed=stream.metadata.path.kind is PathKind.RELAYED)
        await trio.sleep_forever()


class _Meetings:
    """Tells when a direct connection comes up beside a circuit."""

    def __init__(self, node: Node) -> None:
        self.direct = trio.Event()
        self._since: dict[PeerId, float] = {}
        node.swarm.on_connected.append(self._on_connected)

    def _on_connected(self, connection: SwarmConnection) -> None:
        now = trio.current_time()
        if connection.path.kind is PathKind.RELAYED:
            self._since.setdefault(connection.peer, now)
        elif connection.peer in self._since and not self.direct.is_set():
            seconds, remote = now - self._since[connection.peer], connection.connection.remote_address
            _tell("direct", peer=connection.peer, remote=remote, seconds=seconds, path=str(connection.path.kind))
            self.direct.set()


def _tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)
