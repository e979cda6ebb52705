"""With rust-libp2p and tonic: the Kaspa stream of kaspad's own overlay, in both HTTP/2 roles.

The Rust side has that overlay's HTTP/2 settings and its order of events: it waits for response headers before it says
Version, asks for addresses after Ready, and answers pings.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from kas_libp2p import Dialect, Node
from kas_libp2p.errors import HandshakeError, KasError, NegotiationError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa._liveness import PROBE_AFTER
from kas_libp2p.kaspa.channel import MessageChannel, running
from kas_libp2p.kaspa.dialect import channel_of
from kas_libp2p.kaspa.handshake import PROTOCOL_VERSION, USER_AGENT, Hello, handshake
from kas_libp2p.kaspa.peer import KaspaPeer, LightPeer
from kas_libp2p.metadata import OverlayStream
from tests.interop.peer import PATIENCE, Peer, PeerError, running_peer

NETWORK = "kaspa-simnet"
MIB = 1024 * 1024


@pytest.fixture
async def kaspa() -> AsyncIterator[LightPeer]:
    async with LightPeer(network=NETWORK) as peer:
        yield peer


def inventory(ids: int) -> pb.KaspadMessage:
    one = pb.Hash(bytes=bytes(range(32)))
    return pb.KaspadMessage(invTransactions=pb.InvTransactions(ids=[one] * ids))


async def the_only(kaspa: LightPeer) -> KaspaPeer:
    """The peer that is there, or about to be."""
    with trio.fail_after(PATIENCE):
        while not kaspa.peers:  # noqa: ASYNC110 (nothing tells)
            await trio.sleep(0.01)
    (peer,) = kaspa.peers
    return peer


async def join(rust: Peer, node: Node, kaspa: LightPeer, *, we_dial: bool) -> KaspaPeer:
    """A Kaspa connection: as HTTP/2 client if we dial, else as its server."""
    if we_dial:
        stream = await node.connect(rust.address)
        assert stream.metadata.dialect is Dialect.HTTP2
        return await kaspa.handshake(stream)
    await node.serve(kaspa.handle)
    await rust.order("connect", addr=node.addresses[0])
    await rust.order("kaspa")
    return await the_only(kaspa)


both_roles = pytest.mark.parametrize("we_dial", [True, False], ids=["we are the client", "we are the server"])


@both_roles
class TestHandshake:
    async def test_what_each_learns(self, node: Node, kaspa: LightPeer, rust: Peer, we_dial: bool) -> None:
        peer = await join(rust, node, kaspa, we_dial=we_dial)
        assert peer.info.user_agent == "/kas-interop-peer:0.1.0/"
        assert (peer.info.protocol_version, peer.info.network) == (11, NETWORK)
        ready = await rust.wait("kaspa-ready", role="server" if we_dial else "client", peer=node.peer_id)
        assert (ready["user_agent"], ready["protocol_version"]) == (USER_AGENT, PROTOCOL_VERSION)
        assert (ready["network"], ready["node_id"]) == (NETWORK, kaspa.hello.node_id.hex())

    async def test_it_is_well_behaved(self, node: Node, kaspa: LightPeer, rust: Peer, we_dial: bool) -> None:
        peer = await join(rust, node, kaspa, we_dial=we_dial)
        addresses = await rust.wait("kaspa-addresses")
        assert (addresses["count"], addresses["response_id"]) == (0, 77)
        for _ in range(3):
            assert (await rust.order("kaspa-ping"))["rtt"] > 0
            assert await peer.ping() > 0
        await rust.order("kaspa-send", count=100, ids=10)
        assert await peer.ping() > 0, "inventories are passed over"
        assert peer.ended is None

    async def test_we_end(self, node: Node, kaspa: LightPeer, rust: Peer, we_dial: bool) -> None:
        peer = await join(rust, node, kaspa, we_dial=we_dial)
        await rust.wait("kaspa-addresses")
        await peer.aclose()
        assert (await rust.wait("kaspa-closed"))["end"] == "end of stream"
        assert await node.ping(rust.peer) > 0, "the connection stays"

    async def test_it_ends(self, node: Node, kaspa: LightPeer, rust: Peer, we_dial: bool) -> None:
        peer = await join(rust, node, kaspa, we_dial=we_dial)
        await rust.wait("kaspa-addresses")
        await rust.order("kaspa-close")
        with trio.fail_after(PATIENCE):
            assert await peer.wait_ended()

    async def test_its_process_ends(self, node: Node, kaspa: LightPeer, rust_binary: Path, we_dial: bool) -> None:
        async with running_peer(rust_binary) as rust:
            peer = await join(rust, node, kaspa, we_dial=we_dial)
        with trio.fail_after(PATIENCE):
            assert await peer.wait_ended()

    async def test_its_process_hangs(self, node: Node, kaspa: LightPeer, rust: Peer, we_dial: bool) -> None:
        peer = await join(rust, node, kaspa, we_dial=we_dial)
        await rust.wait("kaspa-addresses")
        with trio.move_on_after(PROBE_AFTER + 0.5):  # it answers our ping
            await peer.wait_ended()
        assert peer.ended is None
        os.kill(rust.pid, signal.SIGSTOP)
        try:
            with trio.fail_after(PATIENCE):  # half of what kaspad itself would wait
                assert "the path hangs" in await peer.wait_ended()
        finally:
            os.kill(rust.pid, signal.SIGCONT)

    @pytest.mark.parametrize("version", [9, 10, 11, 12])
    async def test_its_version(
        self, node: Node, kaspa: LightPeer, rust_binary: Path, we_dial: bool, version: int
    ) -> None:
        async with running_peer(rust_binary, "listen", "--kaspa-version", str(version)) as rust:
            peer = await join(rust, node, kaspa, we_dial=we_dial)
            assert peer.info.protocol_version == version
            assert await peer.ping() > 0

    @pytest.mark.parametrize("version", [9, 10, 11])
    async def test_our_version(self, node: Node, rust: Peer, we_dial: bool, version: int) -> None:
        async with LightPeer(network=NETWORK, protocol_version=version) as kaspa:
            peer = await join(rust, node, kaspa, we_dial=we_dial)
            assert (await rust.wait("kaspa-ready"))["protocol_version"] == version
            assert await peer.ping() > 0

    async def test_without_gzip(self, node: Node, kaspa: LightPeer, rust_binary: Path, we_dial: bool) -> None:
        async with running_peer(rust_binary, "listen", "--no-gzip") as rust:
            peer = await join(rust, node, kaspa, we_dial=we_dial)
            assert await peer.ping() > 0
            await rust.order("kaspa-send", count=10, ids=30_000)
            assert await peer.ping() > 0


class TestRefusals:
    async def test_it_refuses_our_version_when_we_dial(self, node: Node, kaspa: LightPeer, rust_binary: Path) -> None:
        async with running_peer(rust_binary, "listen", "--kaspa-oldest", "12") as rust:
            with pytest.raises(HandshakeError, match="version mismatch - local: 11, remote: 11") as caught:
                await kaspa.handshake(await node.connect(rust.address))
            assert caught.value.rejected
            assert kaspa.peers == []

    async def test_it_refuses_our_version_when_it_dials(self, node: Node, rust_binary: Path) -> None:
        failures: list[KasError] = []
        told = trio.Event()

        async def handle(stream: OverlayStream) -> None:
            async with running(channel_of(stream)) as channel:
                try:
                    await handshake(channel, Hello(network=NETWORK))
                except KasError as error:
                    failures.append(error)
                    told.set()

        await node.serve(handle)
        async with running_peer(rust_binary, "listen", "--kaspa-oldest", "12") as rust:
            await rust.order("connect", addr=node.addresses[0])
            with pytest.raises(PeerError, match="version mismatch - local: 11, remote: 11"):
                await rust.order("kaspa")
            with trio.fail_after(PATIENCE):
                await told.wait()
        (failure,) = failures
        assert isinstance(failure, HandshakeError)
        assert failure.rejected

    @both_roles
    async def test_another_network(self, node: Node, kaspa: LightPeer, rust_binary: Path, we_dial: bool) -> None:
        async with running_peer(rust_binary, "listen", "--network", "kaspa-devnet") as rust:
            with pytest.raises((HandshakeError, PeerError), match="network"):
                await join(rust, node, kaspa, we_dial=we_dial)
            failed = await rust.wait("kaspa-handshake-failed")
            assert "network" in failed["error"]
            assert await node.ping(rust.peer) > 0

    @both_roles
    async def test_we_refuse_a_version_that_is_too_old(
        self, node: Node, kaspa: LightPeer, rust_binary: Path, we_dial: bool
    ) -> None:
        async with running_peer(rust_binary, "listen", "--kaspa-version", "8") as rust:
            with pytest.raises((HandshakeError, PeerError), match="version"):
                await join(rust, node, kaspa, we_dial=we_dial)
            assert "rejected: P2P protocol version mismatch" in (await rust.wait("kaspa-handshake-failed"))["error"]


class TestStreams:
    """Which Kaspa stream belongs on a connection."""

    async def test_a_stream_from_whom_we_dialed_is_surplus(self, node: Node, kaspa: LightPeer, rust: Peer) -> None:
        await node.serve(kaspa.handle)
        peer = await join_as_client(node, kaspa, rust)
        with pytest.raises(PeerError):
            await rust.order("kaspa")
        with pytest.raises(PeerError):
            await rust.order("kaspa-as-server")  # as after a hole punch
        assert await peer.ping() > 0, "ours is not touched"
        assert node.status().limit_hits["one_kaspa_stream"] == 2

    async def test_a_second_stream_is_surplus(self, node: Node, kaspa: LightPeer, rust: Peer) -> None:
        peer = await join(rust, node, kaspa, we_dial=False)
        with pytest.raises(PeerError):
            await rust.order("kaspa")
        assert await peer.ping() > 0
        assert node.status().limit_hits["one_kaspa_stream"] == 1

    async def test_the_next_one_after_the_end(self, node: Node, kaspa: LightPeer, rust: Peer) -> None:
        for number in range(1, 4):
            peer = await join(rust, node, kaspa, we_dial=True)
            await rust.wait("kaspa-addresses", count=number)
            await peer.aclose()
            await rust.wait("kaspa-closed", count=number)

    async def test_nobody_serves_kaspa_here(self, node: Node, rust: Peer) -> None:
        await rust.order("connect", addr=node.addresses[0])
        with pytest.raises(PeerError, match="does not support /kaspad/transport"):
            await rust.order("kaspa")

    async def test_our_own_dialect_is_not_spoken_there(self, node: Node, rust: Peer) -> None:
        with pytest.raises(NegotiationError):
            await node.connect(rust.address, ("/nobody/1", Dialect.MESSAGES))
        stream = await node.connect(rust.address)
        assert stream.metadata.protocol == Dialect.HTTP2


async def join_as_client(node: Node, kaspa: LightPeer, rust: Peer) -> KaspaPeer:
    return await kaspa.handshake(await node.connect(rust.address))


class TestMessages:
    """Large and many, with and without gzip, beside pings."""

    @both_roles
    @pytest.mark.parametrize("gzip", [True, False], ids=["gzip", "plain"])
    @pytest.mark.parametrize(
        ("count", "ids"), [(3000, 1), (40, 30_000), (2, 500_000)], ids=["3000 small", "40 of 1 MB", "2 of 18 MB"]
    )
    async def test_both_ways_at_once(
        self, node: Node, rust_binary: Path, we_dial: bool, gzip: bool, count: int, ids: int
    ) -> None:
        message = inventory(ids).SerializeToString()
        done = trio.Event()
        received: list[int] = []

        async def talk(channel: MessageChannel) -> None:
            await handshake(channel, Hello(network=NETWORK))

            async def read() -> None:
                async for raw in channel:
                    kind = pb.KaspadMessage.FromString(raw)
                    match kind.WhichOneof("payload"):
                        case "requestAddresses":
                            answer = pb.KaspadMessage(addresses=pb.Addresses(), response_id=kind.request_id)
                            await channel.send(answer.SerializeToString())
                        case "invTransactions":
                            received.append(len(raw))
                            if len(received) == count:
                                done.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for _ in range(count):
                    await channel.send(message)
                await done.wait()
                await channel.send_eof()

        async def handle(stream: OverlayStream) -> None:
            async with running(channel_of(stream)) as channel:
                await talk(channel)

        arguments = ["listen"] if gzip else ["listen", "--no-gzip"]
        async with running_peer(rust_binary, *arguments) as rust:
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    if we_dial:
                        nursery.start_soon(handle, await node.connect(rust.address))
                        await rust.wait("kaspa-ready")
                    else:
                        await node.serve(handle)
                        await rust.order("connect", addr=node.addresses[0])
                        await rust.order("kaspa")
                    sent = await rust.order("kaspa-send", count=count, ids=ids)
                closed = await rust.wait("kaspa-closed")
        assert (closed["inventories"], closed["transaction_ids"]) == (count, count * ids)
        assert sum(received) == sent["bytes"] == count * len(message)
        if we_dial and gzip:
            request = await rust.wait("kaspa-request")
            assert (request["encoding"], "gzip" in request["accept_encoding"]) == ("gzip", True)
