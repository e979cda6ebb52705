"""With rust-libp2p: connections, what the two tell one another, and how protocols are agreed on."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
import trio

from kas_libp2p import Config, DialError, Identity, NegotiationError, Node, open_node
from kas_libp2p.addresses import parse
from kas_libp2p.dcutr._messages import PROTOCOL as DCUTR
from kas_libp2p.errors import PeerIdMismatch
from kas_libp2p.events import ConnectionClosed, Event, PeerIdentified, Subscription, UpgradeFailed
from kas_libp2p.node import AGENT, PROTOCOL_VERSION
from tests.interop.peer import PATIENCE, Peer, PeerError, running_peer
from tests.interop.protocols import ECHO, Served, round_trip
from tests.network import eventually

E = TypeVar("E", bound=Event)
ALWAYS_SERVED = {"/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0", "/perf/1.0.0"}


def port_of(address: str) -> str:
    return str(parse(address).value_for_protocol("tcp"))


async def until(events: Subscription, *kinds: type[E]) -> E:
    """The next event of these types."""
    with trio.fail_after(PATIENCE):
        async for event in events:
            if isinstance(event, kinds):
                return event
    raise AssertionError(f"no {kinds}")


class TestDialing:
    """We dial."""

    async def test_streams_work_and_both_see_the_end(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, ECHO)
        await round_trip(stream)
        assert stream.metadata.peer == rust.peer
        assert stream.metadata.initiator
        connected = await rust.wait("connected")
        assert (connected["peer"], connected["direction"]) == (node.peer_id, "inbound")
        await stream.aclose()
        assert await node.disconnect(rust.peer) == 1
        assert (await rust.wait("disconnected"))["left"] == 0
        assert node.connections == ()

    async def test_from_the_listen_port(self, node: Node, rust: Peer) -> None:
        await node.ping(rust.address)
        connected = await rust.wait("connected")
        assert port_of(connected["remote"]) == port_of(node.addresses[0])

    async def test_another_peer_than_expected_is_not_connected_to(self, node: Node, rust: Peer) -> None:
        wrong = Identity.generate().peer_id
        with pytest.raises(DialError) as caught:
            await node.connect(rust.address.replace(rust.peer, wrong), ECHO)
        (failure,) = caught.value.failures
        assert isinstance(failure.error, PeerIdMismatch)
        assert (failure.error.expected, failure.error.actual) == (wrong, rust.peer)
        assert node.connections == ()

    async def test_ipv6(self, rust_binary: Path) -> None:
        async with (
            running_peer(rust_binary, "listen", "/ip6/::1/tcp/0") as rust,
            open_node(Config(listen=("/ip6/::1/tcp/0",))) as node,
        ):
            assert await node.ping(rust.address) > 0
            info = await node.identify(rust.peer)
            assert info is not None
            assert info.observed is not None
            assert info.observed.startswith("/ip6/::1/tcp/")

    async def test_it_goes_away(self, node: Node, rust_binary: Path) -> None:
        async with running_peer(rust_binary) as rust:
            await node.ping(rust.address)
            with_events = node.events()
        closed = await until(with_events, ConnectionClosed)
        assert closed.peer == rust.peer

    async def test_it_closes_in_order(self, node: Node, rust: Peer) -> None:
        await node.ping(rust.address)
        events = node.events()
        await rust.order("disconnect")
        closed = await until(events, ConnectionClosed)
        assert closed.peer == rust.peer
        assert closed.reason

    async def test_a_connection_that_neither_uses_is_closed(self, node: Node, rust_binary: Path) -> None:
        async with running_peer(rust_binary, "listen", "--idle", "0.2") as rust:
            stream = await node.connect(rust.address, ECHO)
            events = node.events()
            await trio.sleep(0.5)  # twice its idle time: a stream that is open keeps the connection
            await round_trip(stream)
            await stream.aclose()
            await until(events, ConnectionClosed)
            assert (await rust.wait("disconnected"))["left"] == 0


class TestListening:
    """The Rust peer dials."""

    async def test_streams_work_and_both_see_the_end(self, node: Node, served: Served, rust: Peer) -> None:
        answer = await rust.order("connect", addr=node.addresses[0])
        assert answer["peer"] == node.peer_id
        assert (await rust.order("echo", count=3))["count"] == 3
        (connection,) = node.status().connections
        assert (connection.peer, connection.direction) == (rust.peer, "inbound")
        events = node.events()
        await rust.order("disconnect")
        closed = await until(events, ConnectionClosed)
        assert closed.peer == rust.peer
        assert node.connections == ()

    async def test_we_close(self, node: Node, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        await rust.wait("identified")
        assert await node.disconnect(rust.peer) == 1
        assert (await rust.wait("disconnected"))["left"] == 0

    async def test_another_peer_than_expected(self, node: Node, rust: Peer) -> None:
        wrong = Identity.generate().peer_id
        events = node.events()
        with pytest.raises(PeerError, match=r"(?i)peer id"):
            await rust.order("connect", addr=node.addresses[0].replace(node.peer_id, wrong))
        assert (await rust.wait("dial-failed"))["kind"] == "wrong-peer-id"
        # It closes as soon as Noise has told it who we are: for us before or after the connection is up.
        await until(events, ConnectionClosed, UpgradeFailed)
        assert node.connections == ()

    async def test_with_another_port_of_its(self, node: Node, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0], new_port=True)
        assert (await rust.order("ping"))["rtt"] > 0

    async def test_a_second_connection_beside_the_first(self, node: Node, served: Served, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        await rust.order("connect", addr=node.addresses[0], new_port=True)
        await eventually(lambda: len(node.connections) == 2)  # it is up for the one who dialed before it is for us
        assert (await rust.order("echo", count=3))["count"] == 3

    async def test_a_protocol_that_we_do_not_serve(self, node: Node, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        with pytest.raises(PeerError, match="does not support /nobody/1"):
            await rust.order("open", protocol="/nobody/1")
        assert (await rust.order("ping"))["rtt"] > 0


class TestNegotiation:
    """multistream-select in all four combinations of what the Rust peer can do; we are lazy always."""

    @pytest.mark.parametrize("streams", ["v1", "lazy"])
    @pytest.mark.parametrize("connection", ["v1", "lazy"])
    async def test_both_ways(
        self, node: Node, served: Served, rust_binary: Path, connection: str, streams: str
    ) -> None:
        async with running_peer(rust_binary, "listen", "--connection", connection, "--streams", streams) as rust:
            stream = await node.connect(rust.address, ECHO)
            await round_trip(stream)
            await stream.aclose()
            await node.disconnect(rust.peer)
            await rust.wait("disconnected")
            await rust.order("connect", addr=node.addresses[0])
            assert (await rust.order("echo", count=3))["count"] == 3
            assert (await rust.order("new-stream", count=20))["count"] == 20
            with pytest.raises(PeerError):
                await rust.order("open", protocol="/nobody/1")

    async def test_one_of_several(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, ("/nobody/1", "/nobody/2", ECHO))
        assert stream.metadata.protocol == ECHO
        await round_trip(stream)

    async def test_none_of_several(self, node: Node, rust: Peer) -> None:
        with pytest.raises(NegotiationError):
            await node.connect(rust.address, ("/nobody/1", "/nobody/2"))
        assert await node.ping(rust.peer) > 0

    async def test_a_refused_lazy_proposal_is_told_at_the_first_read(self, node: Node, rust: Peer) -> None:
        stream = await node.connect(rust.address, "/nobody/1")
        with pytest.raises(NegotiationError), trio.fail_after(PATIENCE):
            await stream.receive_some()
        assert await node.ping(rust.peer) > 0


class TestIdentify:
    """What each tells the other."""

    async def test_what_we_tell(self, node: Node, served: Served, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        told = await rust.wait("identified")
        assert told["peer"] == told["key"] == node.peer_id
        assert (told["agent"], told["protocol_version"]) == (AGENT, PROTOCOL_VERSION)
        # A punch is offered once somebody has seen us at a public address, which loopback is not.
        assert set(told["protocols"]) == {*node.status().protocols} - {DCUTR}
        assert ALWAYS_SERVED | {ECHO} <= set(told["protocols"])
        assert [f"{each}/p2p/{node.peer_id}" for each in told["addresses"]] == list(node.addresses)
        assert port_of(told["observed"]) == port_of(rust.address), "it dials from its listen port"

    async def test_what_it_tells(self, node: Node, rust: Peer) -> None:
        info = await node.identify(rust.address)
        assert info is not None
        assert info.agent.startswith("rust-libp2p/")
        assert info.protocol_version == "/kaspad/libp2p/1.1.0"
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/perf/1.0.0", "/kaspad/transport/1.0.0"} <= set(info.protocols)
        assert not info.signed
        assert info.observed is not None
        assert port_of(info.observed) == port_of(node.addresses[0])
        # Rust tells external addresses and listen addresses alike; here it is the one it listens on.
        assert rust.address.removesuffix(f"/p2p/{rust.peer}") in info.addresses

    async def test_its_signed_record(self, node: Node, rust_binary: Path) -> None:
        """Rust seals it under names of its own (domain ``libp2p-routing-state``), not those of RFC 0003."""
        async with running_peer(rust_binary, "listen", "--signed-record") as rust:
            info = await node.identify(rust.address)
            assert info is not None
            assert info.signed
            assert info.seq > 0
            assert rust.address.removesuffix(f"/p2p/{rust.peer}") in info.addresses

    async def test_its_push_of_a_new_address(self, node: Node, rust_binary: Path) -> None:
        async with running_peer(rust_binary, "listen", "--push") as rust:
            await node.identify(rust.address)
            events = node.events()
            await rust.order("listen", addr="/ip4/127.0.0.1/tcp/0")
            new = (await rust.wait("listening", lambda each: each["address"] != rust.address))["address"]
            identified = await until(events, PeerIdentified)
            assert new.removesuffix(f"/p2p/{rust.peer}") in identified.addresses

    async def test_our_push_of_a_new_protocol_and_address(self, node: Node, rust: Peer) -> None:
        async def nothing(stream: object) -> None: ...

        await rust.order("connect", addr=node.addresses[0])
        await rust.wait("identified")
        await node.serve(nothing, "/new/1")
        await node.listen("/ip4/127.0.0.1/tcp/0")
        new = node.addresses[-1].removesuffix(f"/p2p/{node.peer_id}")
        await rust.wait("identified", lambda told: "/new/1" in told["protocols"] and new in told["addresses"])

    async def test_more_than_fits_into_one_message_of_its(self, node: Node, rust: Peer) -> None:
        """Rust reads one message of at most 4096 bytes: what matters to it has to be in the first."""

        async def nothing(stream: object) -> None: ...

        many = [f"/kas-interop/one-of-many-protocols/{number:03}" for number in range(80)]
        await node.serve(nothing, many)
        await rust.order("connect", addr=node.addresses[0])
        told = await rust.wait("identified")
        assert set(many) <= set(told["protocols"])
        assert told["addresses"]


class TestPing:
    async def test_ours(self, node: Node, rust: Peer) -> None:
        assert 0 < await node.ping(rust.address) < PATIENCE
        (connection,) = node.status().connections
        assert connection.rtt is None or connection.rtt > 0

    async def test_its(self, node: Node, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        automatic = await rust.wait("ping")
        assert "error" not in automatic
        # On a second stream beside the automatic one, which stays open; two per peer are what the specification allows.
        assert (await rust.order("ping"))["rtt"] > 0

    async def test_its_go_on_for_as_long_as_it_likes(self, node: Node, rust_binary: Path) -> None:
        async with running_peer(rust_binary, "dial", node.addresses[0], "--ping", "0.05") as rust:
            await rust.wait("ping", count=10)
            assert not [each for each in rust.seen("ping") if "error" in each]
