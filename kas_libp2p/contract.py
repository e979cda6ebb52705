"""A peer for the hole-punch test of the libp2p project (unified-testing, ``hole-punch``), in both roles.

The test starts a relay, two routers and two peers, and tells each peer by its environment what it is. The peers find
one another by a Redis server, which a network joins to both that has no part in the test. Listener: hold a place on the
relay, tell who we are, serve. Dialer: dial the listener through the relay, wait for the direct connection, ping on it,
print how long that took, and leave.

Its networks are private ones (10.0.0.0/8), so this peer, and no other, punches to private addresses.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self

import trio

from kas_libp2p import ping, redis
from kas_libp2p.addresses import ip_port, parse_peer_id
from kas_libp2p.config import AutoNatConfig, Config, PunchConfig, RelayConfig, Role
from kas_libp2p.errors import ConfigError, DialError, KasError
from kas_libp2p.events import ReservationMade, to_dict
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.node import Node, SwarmConnection, open_node

RELAY_PATIENCE = 150.0
"""Seconds for the relay to tell its address, Redis to be there included; as the test's other peers have it."""
LISTENER_PATIENCE = 15.0
"""Seconds for the listener to tell its peer id; the same."""
POLL = 0.5
"""Seconds between two looks at a key; the same."""
CIRCUIT_PATIENCE = 15.0
"""Seconds for the circuit: a listener may tell its peer id before it has its place."""
CIRCUIT_PAUSE = 0.5
"""Seconds between two dials of the circuit; the relay there takes 30 at once, and then one in two minutes."""
PUNCH_PATIENCE = 60.0
"""Seconds from the circuit to the direct connection: room for each attempt of any implementation."""


class ContractFailed(KasError):
    """The test can't be passed; the text says where it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What the test tells one peer.

    Attributes:
        dialer: whether we dial; else we listen.
        redis: host and port of the server.
        key: before the names of all values on the server.
        ip: where we listen, and what we dial from.
        route: what to reach by which router, to be set first: a network and an address; ``None``: nothing.
        debug: whether everything that happens is logged.
    """

    dialer: bool
    redis: tuple[str, int]
    key: str
    ip: str
    route: tuple[str, str] | None
    debug: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read it.

        Raises:
            ConfigError: something is missing, or is not what this peer can do; the text names it.
        """
        dialer = _flag(environment, "IS_DIALER", None)
        for name, only in (("TRANSPORT", "tcp"), ("SECURE_CHANNEL", "noise"), ("MUXER", "yamux")):
            if (value := _text(environment, name)) != only:
                raise ConfigError(f"{name} must be {only}, not {value!r}: this peer speaks nothing else")
        host, _, port = _text(environment, "REDIS_ADDR").partition(":")
        if not host or (port and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
            raise ConfigError("REDIS_ADDR must be host:port, as redis:6379")
        ip = environment.get("DIALER_IP" if dialer else "LISTENER_IP", "0.0.0.0")  # noqa: S104 - the test's default
        subnet, router = environment.get("WAN_SUBNET", ""), environment.get("WAN_ROUTER_IP", "")
        if bool(subnet) != bool(router):
            raise ConfigError("WAN_SUBNET and WAN_ROUTER_IP belong together: set both, or none")
        try:
            ipaddress.IPv4Address(ip)
            route = (str(ipaddress.IPv4Network(subnet)), str(ipaddress.IPv4Address(router))) if subnet else None
        except ValueError as error:
            raise ConfigError(f"DIALER_IP, LISTENER_IP, WAN_SUBNET or WAN_ROUTER_IP is wrong: {error}") from None
        return cls(
            dialer=dialer,
            redis=(host, int(port or redis.PORT)),
            key=_text(environment, "TEST_KEY"),
            ip=ip,
            route=route,
            debug=_flag(environment, "DEBUG", "false"),
        )


def _text(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name} is missing")
    return value


def _flag(environment: Mapping[str, str], name: str, default: str | None) -> bool:
    value = environment.get(name, default)
    if value not in ("true", "false"):
        raise ConfigError(f"the environment variable {name} must be true or false, not {value!r}")
    return value == "true"


async def run(contract: Contract) -> None:
    """Do our part. The dialer returns when it has printed the result, the listener never.

    Raises:
        ContractFailed: the test is not passed.
        KasError, OSError: what it failed with.
    """
    if contract.route is not None:
        await _add_route(*contract.route)
    config = Config(
        listen=(f"/ip4/{contract.ip}/tcp/0",),
        role=Role.PRIVATE,
        relay=RelayConfig(target=0 if contract.dialer else 1),
        autonat=AutoNatConfig(serve=False, allow_private=True),
        punch=PunchConfig(allow_private=True),
    )
    async with open_node(config) as node, trio.open_nursery() as nursery:
        _log(f"{node.peer_id} listens at {', '.join(node.addresses)}")
        if contract.debug:
            nursery.start_soon(_log_events, node)
        async with await _reach(*contract.redis) as server:
            relay = await _value(server, f"{contract.key}_relay_multiaddr", RELAY_PATIENCE)
            _log(f"relay {relay}")
            act = _dial if contract.dialer else _listen
            await act(contract, node, server, relay)
        nursery.cancel_scope.cancel()


async def _add_route(network: str, router: str) -> None:
    """Reach the outside by the router, not by the network that Redis is in."""
    try:
        await trio.run_process(["ip", "route", "replace", network, "via", router], capture_stderr=True)
    except FileNotFoundError:
        raise ContractFailed("the command ip is missing: install iproute2") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ContractFailed(f"no route to {network} via {router}: {said}; it needs CAP_NET_ADMIN") from None


async def _reach(host: str, port: int) -> redis.Redis:
    """Connect to Redis, which may be a moment late."""
    async with _patient(RELAY_PATIENCE, f"Redis at {host}:{port} could not be reached"):
        while True:
            try:
                return await redis.connect(host, port)
            except OSError as error:
                _log(f"Redis: {error}")
                await trio.sleep(POLL)
    raise AssertionError  # pragma: no cover - the block above does not end


@asynccontextmanager
async def _patient(seconds: float, otherwise: str) -> AsyncIterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise ContractFailed(f"{otherwise} within {seconds:.0f} s") from None


async def _value(server: redis.Redis, key: str, patience: float) -> str:
    async with _patient(patience, f"nobody set {key}"):
        while (value := await server.get(key)) is None:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(POLL)
    return value


async def _listen(contract: Contract, node: Node, server: redis.Redis, relay: str) -> None:
    events = node.events()
    node.use_relays(relay)
    async for event in events:
        if isinstance(event, ReservationMade):
            break
    await server.set(f"{contract.key}_listener_peer_id", node.peer_id)
    _log("has its place, and told its peer id")
    await trio.sleep_forever()


async def _dial(contract: Contract, node: Node, server: redis.Redis, relay: str) -> None:
    info = await node.identify(relay)  # it tells where others see us, which is where we can be met
    _log(f"the relay sees us at {info.observed if info is not None else None}")
    peer = parse_peer_id(await _value(server, f"{contract.key}_listener_peer_id", LISTENER_PATIENCE))
    direct = _Direct(node, peer)
    began = await _connect(node, peer, f"{relay}/p2p-circuit/p2p/{peer}")
    async with _patient(PUNCH_PATIENCE, f"no direct connection with {peer}"):
        connection, came = await direct.wait()
    remote = connection.connection.remote_address
    _log(f"direct connection with {remote}")
    if contract.route is not None and not _is_in(remote, contract.route[0]):
        raise ContractFailed(f"it leads to {remote}, past the routers, as that is not in {contract.route[0]}")
    async with ping.open_pinger(connection.connection) as pinger:
        rtt = await pinger.ping()
    handshake, once = (came - began + rtt) * 1000, rtt * 1000
    sys.stdout.write(f"latency:\n  handshake_plus_one_rtt: {handshake:.2f}\n  ping_rtt: {once:.2f}\n  unit: ms\n")
    sys.stdout.flush()


def _is_in(address: str, network: str) -> bool:
    where = ip_port(address)
    return where is not None and ipaddress.ip_address(where[0]) in ipaddress.ip_network(network)


class _Direct:
    """Waits for a connection with a peer that no relay carries."""

    def __init__(self, node: Node, peer: PeerId) -> None:
        self._peer = peer
        self._came = trio.Event()
        self._found: tuple[SwarmConnection, float] | None = None
        node.swarm.on_connected.append(self._on_connected)

    def _on_connected(self, connection: SwarmConnection) -> None:
        if connection.peer == self._peer and connection.path.kind is not PathKind.RELAYED and self._found is None:
            self._found = connection, trio.current_time()
            self._came.set()

    async def wait(self) -> tuple[SwarmConnection, float]:
        """The connection, and when it was there on trio's clock."""
        await self._came.wait()
        assert self._found is not None
        return self._found


async def _connect(node: Node, peer: PeerId, circuit: str) -> float:
    """Dial through the relay; returns when the dial that succeeded began."""
    deadline = trio.current_time() + CIRCUIT_PATIENCE
    while True:
        began = trio.current_time()
        try:
            await node.swarm.dial(peer, [circuit])
            return began
        except DialError as error:
            if trio.current_time() > deadline:
                raise
            _log(f"circuit: {error}")
            await trio.sleep(CIRCUIT_PAUSE)


async def _log_events(node: Node) -> None:
    async for event in node.events():
        _log(json.dumps(to_dict(event)))


def _log(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
