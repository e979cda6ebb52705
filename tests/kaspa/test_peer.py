"""The light peer against itself, in both HTTP/2 roles, and what it says to those who break the rules."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import memory_stream_pair

from kas_libp2p.errors import ConnectionLost, HandshakeError, RemoteProtocolError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa.channel import MessageChannel, memory_channel_pair, running
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.handshake import Hello, handshake
from kas_libp2p.kaspa.peer import KaspaPeer, LightPeer

NETWORK = "kaspa-simnet"


def block(hash_: bytes, size: int = 1000) -> pb.Block:
    return pb.Block(header=pb.BlockHeader(version=2), transactions=[pb.Transaction(payload=hash_ * (size // 32))])


def grpc_pair(gzip: bool) -> tuple[MessageChannel, MessageChannel]:
    left, right = memory_stream_pair()
    return GrpcChannel.client(left, gzip=gzip), GrpcChannel.server(right, gzip=gzip)


@asynccontextmanager
async def two_peers(channels: tuple[MessageChannel, MessageChannel]) -> AsyncIterator[tuple[KaspaPeer, KaspaPeer]]:
    async with LightPeer(NETWORK, blocks=block) as one, LightPeer(NETWORK, user_agent="/two:1.0/", blocks=block) as two:
        made: list[KaspaPeer] = []

        async def answer() -> None:
            made.append(await two.handshake(channels[1]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            first = await one.handshake(channels[0])
        yield first, made[0]


@pytest.mark.parametrize("gzip", [False, True])
async def test_two_light_peers_meet_ping_and_exchange_blocks(gzip: bool) -> None:
    async with two_peers(grpc_pair(gzip)) as (one, two):
        assert one.info.user_agent == "/two:1.0/"
        assert one.info.network == two.info.network == NETWORK
        assert await one.ping() >= 0
        assert await two.ping() >= 0
        hashes = [hashlib.sha256(bytes([n])).digest() for n in range(100)]
        got = [each async for each in one.request_blocks(hashes)]
        assert [each.transactions[0].payload[:32] for each in got] == hashes


@pytest.mark.parametrize("theirs", [9, 10, 11])
@pytest.mark.parametrize("client", [True, False])
async def test_every_version_that_is_spoken_meets_ours(client: bool, theirs: int) -> None:
    ours, other = grpc_pair(gzip=True) if client else reversed(grpc_pair(gzip=True))
    async with running(ours), running(other), trio.open_nursery() as nursery:
        nursery.start_soon(handshake, other, Hello(network=NETWORK, protocol_version=theirs))
        assert (await handshake(ours, Hello(network=NETWORK))).protocol_version == theirs


async def test_a_version_that_is_too_old_is_refused_by_name() -> None:
    ours, other = memory_channel_pair()
    async with running(ours), running(other), trio.open_nursery() as nursery:

        async def old() -> None:
            with pytest.raises(HandshakeError, match="we speak 9 to 11, the peer 8") as caught:
                await handshake(other, Hello(network=NETWORK, protocol_version=8))
            assert caught.value.rejected

        nursery.start_soon(old)
        with pytest.raises(HandshakeError, match="version mismatch"):
            await handshake(ours, Hello(network=NETWORK))


async def test_what_a_node_may_ask_is_answered_and_the_rest_is_ignored() -> None:
    ours, theirs = memory_channel_pair()
    async with LightPeer(NETWORK) as light, trio.open_nursery() as nursery:
        nursery.start_soon(light.handle, theirs)
        async with running(ours):
            await handshake(ours, Hello(network=NETWORK))
            for message in (
                pb.KaspadMessage(invTransactions=pb.InvTransactions(ids=[pb.Hash(bytes=bytes(32))])),
                pb.KaspadMessage(invRelayBlock=pb.InvRelayBlock(hash=pb.Hash(bytes=bytes(32)))),
                pb.KaspadMessage(requestAddresses=pb.RequestAddresses(), request_id=7),
                pb.KaspadMessage(ping=pb.Ping(nonce=9)),
            ):
                await ours.send(message.SerializeToString())
            addresses = pb.KaspadMessage.FromString(await ours.receive() or b"")
            assert addresses.WhichOneof("payload") == "addresses"
            assert addresses.response_id == 7
            assert pb.KaspadMessage.FromString(await ours.receive() or b"").pong.nonce == 9


async def test_a_wrong_network_is_refused_by_name_on_both_sides() -> None:
    ours, theirs = memory_channel_pair()
    reasons = []

    async def shake(channel: MessageChannel, network: str) -> None:
        with pytest.raises((HandshakeError, ConnectionLost)) as caught:
            await handshake(channel, Hello(network=network))
        reasons.append(str(caught.value))

    async with running(ours), running(theirs), trio.open_nursery() as nursery:
        nursery.start_soon(shake, ours, "kaspa-mainnet")
        nursery.start_soon(shake, theirs, "kaspa-simnet")
    assert any("expected kaspa-mainnet, got kaspa-simnet" in reason for reason in reasons)


async def test_our_own_echo_is_refused() -> None:
    ours, theirs = memory_channel_pair()
    hello = Hello(network=NETWORK)
    async with running(ours), running(theirs), trio.open_nursery() as nursery:

        async def echo() -> None:
            with suppress(ConnectionLost):
                async for message in theirs:
                    await theirs.send(message)

        nursery.start_soon(echo)
        with pytest.raises(HandshakeError, match="loopback"):
            await handshake(ours, hello)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("said", "missing", "seconds"),
    [
        ([], "Version", 4),
        ([pb.KaspadMessage(version=pb.Version(id=bytes(16), network=NETWORK, protocolVersion=11))], "Verack", 4),
        (
            [
                pb.KaspadMessage(version=pb.Version(id=bytes(16), network=NETWORK, protocolVersion=11)),
                pb.KaspadMessage(verack=pb.Empty()),
            ],
            "Ready",
            8,
        ),
    ],
)
async def test_a_peer_that_stalls_is_given_up_at_its_step(
    said: list[pb.KaspadMessage], missing: str, seconds: float, autojump_clock: trio.abc.Clock
) -> None:
    ours, theirs = memory_channel_pair()
    async with running(ours), running(theirs):
        for message in said:
            await theirs.send(message.SerializeToString())
        begun = trio.current_time()
        with pytest.raises(HandshakeError, match=f"no {missing} within {seconds} s"):
            await handshake(ours, Hello(network=NETWORK))
        assert trio.current_time() - begun == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (pb.KaspadMessage(reject=pb.Reject(reason="DUPLICATE_CONNECTION")), HandshakeError, "DUPLICATE_CONNECTION"),
        (pb.KaspadMessage(ready=pb.Empty()), HandshakeError, "expected Version, got ready"),
    ],
)
async def test_a_peer_that_says_something_else_is_told_apart(
    message: pb.KaspadMessage, kind: type[Exception], words: str
) -> None:
    ours, theirs = memory_channel_pair()
    async with running(ours), running(theirs):
        await theirs.send(message.SerializeToString())
        with pytest.raises(kind, match=words):
            await handshake(ours, Hello(network=NETWORK))


async def test_garbage_is_the_peers_fault() -> None:
    ours, theirs = memory_channel_pair()
    async with running(ours), running(theirs):
        await theirs.send(b"\xff\xff\xff")
        with pytest.raises(RemoteProtocolError):
            await handshake(ours, Hello(network=NETWORK))


async def test_a_second_ready_ends_the_peer_and_nobody_waits_for_ever() -> None:
    async with two_peers(memory_channel_pair()) as (one, two):
        await two.channel.send(pb.KaspadMessage(ready=pb.Empty()).SerializeToString())
        assert "after the handshake" in await one.wait_ended()
        with pytest.raises(ConnectionLost):
            await one.ping()
