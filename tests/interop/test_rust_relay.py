"""With rust-libp2p: its peers on our relay, ours on its relay, and both on either."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.errors import DialError, RelayRefused
from kas_libp2p.events import CircuitClosed, RelayRequestServed, ReservationMade
from kas_libp2p.metadata import PathKind
from tests.interop.peer import PATIENCE, Peer, PeerError, running_peer
from tests.interop.protocols import ECHO, round_trip, serve
from tests.network import E, eventually
from tests.relay.scripted import Told

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MIB = 1 << 20


@asynccontextmanager
async def our_relay(**limits: float) -> AsyncIterator[tuple[Node, Told]]:
    relay = RelayConfig(serve=True, purpose=Purpose.ANY, limits=RelayLimits(**limits))  # type: ignore[arg-type]
    async with open_node(Config(listen=(LOOPBACK,), role=Role.PUBLIC, relay=relay)) as node:
        yield node, Told(node)


@asynccontextmanager
async def rust_through(binary: Path, relay: str) -> AsyncIterator[tuple[Peer, str]]:
    """A rust peer with a place on a relay, and its address through it."""
    async with running_peer(binary, "dial", relay) as peer:
        await peer.wait("connected")  # asked for a place while it dials, it forgets about it
        await peer.order("listen", addr=f"{relay}/p2p-circuit")
        await peer.wait("reserved")
        yield peer, f"{relay}/p2p-circuit/p2p/{peer.peer}"


@asynccontextmanager
async def ours_through(relay: str) -> AsyncIterator[tuple[Node, str]]:
    """A node of ours with a place on a relay, and its address through it."""
    config = Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=(relay,)))
    async with open_node(config) as node:
        await serve(node)
        await eventually(lambda: bool(node.relay_client.addresses()))
        yield node, f"{relay}/p2p-circuit/p2p/{node.peer_id}"


async def until(told: Told, kind: type[E], count: int = 1) -> list[E]:
    """Wait for events of a kind."""
    await eventually(lambda: len(told.of(kind)) >= count)
    return told.of(kind)


# rust's peers, our relay


async def test_rust_reserves_and_calls_through_our_relay(rust_binary: Path) -> None:
    async with (
        our_relay(max_circuit_bytes=500 * MIB, max_circuit_seconds=600) as (relay, told),
        rust_through(rust_binary, relay.addresses[0]) as (called, address),
        running_peer(rust_binary, "dial", relay.addresses[0]) as caller,
    ):
        limit = {"seconds": 600, "bytes": 500 * MIB}
        assert (await called.wait("reserved"))["limit"] == limit
        assert relay.relay_server.status().reservations[0].peer == called.peer
        await caller.wait("connected")
        assert (await caller.order("connect", addr=address))["peer"] == called.peer
        assert (await caller.wait("circuit-out"))["limit"] == (await called.wait("circuit-in"))["limit"] == limit
        answer = await caller.order("half-close", peer=called.peer, bytes=3_000_000)
        assert answer["counted"] == 3_000_000
        assert answer["intact"]
        both = await caller.order("bulk", peer=called.peer, up=5_000_000, down=4_000_000)
        assert both["complete"]
        assert both["intact"]
        circuit = relay.relay_server.status().circuits[0]
        assert (circuit.source, circuit.destination) == (caller.peer, called.peer)
        assert circuit.forth > 3_000_000  # and what is under way
        assert circuit.back > 4_000_000
        await caller.order("disconnect", peer=called.peer)
        closed = (await until(told, CircuitClosed))[0]
        assert closed.forth > 3_000_000


async def test_rust_renews(rust_binary: Path) -> None:
    """At three quarters of the time, by itself."""
    async with (
        our_relay(reservation_seconds=4) as (relay, told),
        rust_through(rust_binary, relay.addresses[0]) as (called, _),
    ):
        await called.wait("reserved", renewal=True)
        served = told.of(RelayRequestServed)
        assert [each.status for each in served] == ["OK", "OK"]
        assert len(relay.relay_server.status().reservations) == 1


async def test_rust_is_told_no(rust_binary: Path) -> None:
    async with (
        our_relay(max_reservations=1) as (relay, told),
        rust_through(rust_binary, relay.addresses[0]) as (called, address),
        running_peer(rust_binary, "dial", relay.addresses[0]) as late,
    ):
        await late.wait("connected")
        await late.order("listen", addr=f"{relay.addresses[0]}/p2p-circuit")
        assert (await until(told, RelayRequestServed, 2))[1].reason == "max_reservations"
        with pytest.raises(PeerError, match=r"(?i)reservation"):
            await called.order("connect", addr=address.replace(called.peer, late.peer))
        assert told.of(RelayRequestServed)[-1].status == "NO_RESERVATION"


async def test_rust_at_the_limit_of_bytes(rust_binary: Path) -> None:
    async with (
        our_relay(max_circuit_bytes=MIB) as (relay, told),
        rust_through(rust_binary, relay.addresses[0]) as (called, address),
        running_peer(rust_binary, "dial", relay.addresses[0]) as caller,
    ):
        await caller.wait("connected")
        await caller.order("connect", addr=address)
        with pytest.raises(PeerError):
            await caller.order("half-close", peer=called.peer, bytes=4 * MIB)
        closed = (await until(told, CircuitClosed))[0]
        assert (closed.reason, closed.forth + closed.back) == ("max_circuit_bytes", MIB)
        await caller.order("connect", addr=address)  # and another one is no problem
        assert (await caller.order("half-close", peer=called.peer, bytes=1000))["intact"]


async def test_rust_at_the_limit_of_seconds(rust_binary: Path) -> None:
    async with (
        our_relay(max_circuit_seconds=4) as (relay, told),
        rust_through(rust_binary, relay.addresses[0]) as (called, address),
        running_peer(rust_binary, "dial", relay.addresses[0]) as caller,
    ):
        await caller.wait("connected")
        await caller.order("connect", addr=address)
        await caller.wait("disconnected", peer=called.peer)
        closed = (await until(told, CircuitClosed))[0]
        assert closed.reason == "max_circuit_seconds"
        assert 3.9 < closed.seconds < 14, "a busy machine may hold us up"


# Our peers, rust's relay


async def test_ours_through_rust_s_relay(rust_binary: Path) -> None:
    async with (
        running_peer(rust_binary, "listen", "--relay") as relay,
        ours_through(relay.address) as (called, address),
        open_node(Config(listen=())) as caller,
    ):
        stream = await caller.connect(address, ECHO)
        await round_trip(stream)
        metadata = stream.metadata
        assert (metadata.peer, metadata.path.kind, metadata.path.relay) == (
            called.peer_id,
            PathKind.RELAYED,
            relay.peer,
        )
        place = called.relay_client.reservations[0]
        assert (place.max_bytes, place.max_seconds) == (131072, 120)


async def test_ours_is_told_no_by_rust_s_relay(rust_binary: Path) -> None:
    async with (
        running_peer(rust_binary, "listen", "--relay") as relay,
        open_node(Config(listen=())) as caller,
        open_node(Config(listen=())) as nobody,
    ):
        with pytest.raises(DialError) as info:
            await caller.connect(f"{relay.address}/p2p-circuit/p2p/{nobody.peer_id}", ECHO)
        cause = info.value.failures[0].error
        assert isinstance(cause, RelayRefused)
        assert cause.status == "NO_RESERVATION"


async def test_ours_renews_on_rust_s_relay(rust_binary: Path) -> None:
    """In good time: the shortest one that is taken as it is told."""
    async with running_peer(rust_binary, "listen", "--relay-reservation", "14") as relay:
        config = Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=(relay.address,)))
        async with open_node(config) as node:
            events = node.events()
            with trio.fail_after(PATIENCE):
                async for event in events:
                    if isinstance(event, ReservationMade) and event.renewed:
                        break
            await relay.wait("relay", lambda told: "renewed: true" in told["what"])
            assert not [each for each in relay.seen("relay") if "TimedOut" in each["what"]]


# Both


@pytest.mark.parametrize("whose", ["ours", "rust"])
async def test_rust_calls_ours_and_ours_calls_rust(whose: str, rust_binary: Path) -> None:
    async with (
        our_relay() as (node, _),
        running_peer(rust_binary, "listen", "--relay-open") as foreign,
    ):
        relay = node.addresses[0] if whose == "ours" else foreign.address
        async with (
            ours_through(relay) as (ours, our_address),
            rust_through(rust_binary, relay) as (rust, rust_address),
            running_peer(rust_binary, "dial", relay) as rust_caller,
            open_node(Config(listen=())) as our_caller,
        ):
            await rust_caller.wait("connected")
            assert (await rust_caller.order("connect", addr=our_address))["peer"] == ours.peer_id
            assert (await rust_caller.order("half-close", peer=ours.peer_id, bytes=2_000_000))["intact"]
            stream = await our_caller.connect(rust_address, ECHO)
            assert stream.metadata.peer == rust.peer
            await round_trip(stream)
