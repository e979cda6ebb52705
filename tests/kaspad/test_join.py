"""Joining real kaspads, in this process: no bridge, no libp2p, only `kas_libp2p.kaspa` and a link in memory."""

from __future__ import annotations

import gzip
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kas_bridge.simnet.measure import blocks_at, reach
from kas_bridge.simnet.mine import Chain, Miner
from kas_bridge.simnet.node import SimnetNode
from kas_libp2p.errors import GrpcError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa._join import VERACK, VERSION, payload_number
from kas_libp2p.kaspa.channel import BATCH, MAX_MESSAGE, PackedPiece, Piece, running
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.join import End, Ended, Joiner, KaspadAddress, Side, default_open_kaspad, dial_kaspad
from kas_libp2p.kaspa.peer import LightPeer
from kas_libp2p.kaspa.sources import FixedSource, PoolSources, Sources
from kas_libp2p.metadata import Dialect, PeerId

from ..kaspa.overlay import ALICE, BOB, MemoryOverlay, overlay_pair
from .conftest import MakeNode

pytestmark = pytest.mark.kaspad

PLENTY = 60.0
"""Seconds for anything here, on a busy machine."""


def joiner_of(node: SimnetNode, own: PeerId, sources: Sources | None = None) -> Joiner:
    return Joiner(KaspadAddress(node.host, node.p2p_port), sources or PoolSources(), own_peer=own)


class Link:
    """Two joiners and a stream between them."""

    def __init__(self, left: Joiner, right: Joiner, protocol: str = Dialect.MESSAGES) -> None:
        self.left = left
        self.right = right
        self.protocol = protocol
        self.ends: dict[str, Ended] = {}
        self.stream: MemoryOverlay
        self._ready = trio.Event()

    async def ready(self) -> None:
        """Wait until the right side's node has finished its first handshake."""
        with trio.fail_after(PLENTY):
            await self._ready.wait()

    async def run(self) -> None:
        """One stream, from its beginning to its end on both sides."""
        self.stream, other = overlay_pair(window=4 << 20, protocol=self.protocol)
        self.ends.clear()

        async def carry(name: str, joiner: Joiner, stream: MemoryOverlay) -> None:
            self.ends[name] = await joiner.carry(stream, on_ready=lambda _: name == "right" and self._ready.set())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry, "left", self.left, self.stream)
            nursery.start_soon(carry, "right", self.right, other)


@asynccontextmanager
async def linked(link: Link) -> AsyncIterator[Link]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


async def sink_of(node: SimnetNode) -> str:
    async with node.rpc() as rpc:
        return str((await rpc.get_block_dag_info()).sink)


async def mine(node: SimnetNode, count: int) -> int:
    """Mine; how many blocks the node has then."""
    async with node.rpc() as rpc:
        await Miner(rpc).mine(count)
    return await blocks_at(node)


@pytest.mark.parametrize("protocol", list(Dialect))
async def test_a_chain_is_synced_and_new_blocks_follow(
    make_node: MakeNode, long_chain: Chain, tmp_path: Path, protocol: str
) -> None:
    source = await make_node(mining=True, folder=long_chain.use(tmp_path / "source"))
    target = await make_node(mining=True)
    blocks = long_chain.blocks
    async with linked(Link(joiner_of(source, ALICE), joiner_of(target, BOB), protocol)) as link:
        await reach(target, blocks)
        assert await sink_of(target) == await sink_of(source)
        joined = link.right.peers[ALICE]
        assert joined.theirs is not None
        assert joined.theirs.network == "kaspa-simnet"
        assert joined.theirs.version == "2.1.0"
        assert joined.ready_at is not None
        # Both ways: what is mined at either end arrives at the other.
        await reach(target, await mine(source, 5))
        await reach(source, await mine(target, 5))
        for node, joiner in ((source, link.left), (target, link.right)):
            async with node.rpc() as rpc:
                (peer,) = await rpc.get_connected_peer_info()
            assert peer.address.startswith("127.1.0.1:")
            assert not peer.isOutbound
            (mate,) = joiner.peers.values()
            assert mate.theirs is not None
            assert peer.id == mate.theirs.node_id


async def test_a_message_that_stays_compressed_is_understood(make_node: MakeNode) -> None:
    node = await make_node()
    channel = await default_open_kaspad(KaspadAddress(node.host, node.p2p_port), None, MAX_MESSAGE)
    assert channel.takes_packed
    async with running(channel):
        assert payload_number(await channel.receive() or b"") == VERSION
        ours = pb.Version(protocolVersion=11, id=bytes(range(16)), userAgent="/test:1/", network="kaspa-simnet")
        # A field that kaspad passes over: its key, its length, its content.
        unknown = b"\xfa\x3f\xc0\x8d\xb7\x01" + random.Random(1).randbytes(3_000_000)
        packed = gzip.compress(pb.KaspadMessage(version=ours).SerializeToString() + unknown)
        for start in range(0, len(packed), BATCH):
            part = packed[start : start + BATCH]
            piece = PackedPiece(part, len(packed) - start - len(part), start == 0, len(packed))
            await channel.send_pieces([piece])
        with trio.fail_after(PLENTY):
            assert payload_number(await channel.receive() or b"") == VERACK


async def test_a_cut_and_a_new_stream_go_on_where_it_was(
    make_node: MakeNode, long_chain: Chain, tmp_path: Path
) -> None:
    source = await make_node(folder=long_chain.use(tmp_path / "source"))
    target = await make_node()
    blocks = long_chain.blocks
    link = Link(joiner_of(source, ALICE), joiner_of(target, BOB))
    cuts = 0
    with trio.fail_after(PLENTY):
        while await blocks_at(target) < blocks:
            async with linked(link):
                before = await blocks_at(target)
                # The first streams are cut in the middle of the sync; the last has all the time that there is.
                with trio.move_on_after(2.0 if cuts < 3 else PLENTY):
                    await reach(target, min(blocks, before + 400) if cuts < 3 else blocks)
                link.stream.reset()
            cuts += 1
    assert await sink_of(target) == await sink_of(source)


async def test_kaspad_restarts(make_node: MakeNode) -> None:
    source, target = await make_node(mining=True), await make_node()
    link = Link(joiner_of(source, ALICE), joiner_of(target, BOB))
    blocks = await mine(source, 50)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await reach(target, blocks)
        target.kill()
    assert (link.ends["right"].reason, link.ends["right"].by) == (End.KASPAD_CLOSED, Side.KASPAD)
    assert (link.ends["left"].reason, link.ends["left"].by) == (End.PEER_CLOSED, Side.PEER)
    await link.run()
    assert link.ends["right"].reason is End.NOT_RUNNING
    assert link.ends["left"].reason is End.PEER_KASPAD
    await target.start()
    async with linked(link):
        await reach(target, await mine(source, 10))


async def test_kaspad_says_who_it_is(make_node: MakeNode) -> None:
    node = await make_node()
    joiner = joiner_of(node, ALICE)
    version = await joiner.look()
    async with node.rpc() as rpc:
        info = await rpc.get_info()
    assert (version.node_id, version.version, version.network) == (info.p2pId, "2.1.0", "kaspa-simnet")
    assert joiner.network == "kaspa-simnet"


# -- kaspad's refusals, in its own words -------------------------------------------------------------------------------


async def test_its_own_node(make_node: MakeNode) -> None:
    node = await make_node()
    link = Link(joiner_of(node, ALICE), joiner_of(node, BOB))
    await link.run()
    assert {end.reason for end in link.ends.values()} == {End.LOOPBACK}


async def test_a_banned_address(make_node: MakeNode) -> None:
    source, target = await make_node(), await make_node(unsafe_rpc=True)
    link = Link(joiner_of(source, ALICE), joiner_of(target, BOB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await link.ready()
        async with target.rpc() as rpc:
            await rpc.ban("127.1.0.1")
    assert link.ends["right"].by is Side.KASPAD
    await link.run()
    assert link.ends["right"] == Ended(End.BANNED, Side.KASPAD, "peer is banned")
    assert link.ends["left"] == Ended(End.BANNED, Side.PEER, "peer is banned")


async def test_the_same_node_from_the_same_address(make_node: MakeNode) -> None:
    """Past our own check: two bridges that share the target node, and a source address."""
    source, target = await make_node(), await make_node()
    first = Link(joiner_of(source, ALICE), joiner_of(target, BOB, FixedSource("127.1.0.1")))
    second = Link(joiner_of(source, ALICE, FixedSource("127.5.0.1")), joiner_of(target, BOB, FixedSource("127.1.0.1")))
    async with linked(first):
        await first.ready()
        await second.run()
    assert second.ends["right"].reason is second.ends["left"].reason is End.DUPLICATE


async def test_too_many_pending_handshakes(make_node: MakeNode) -> None:
    node, other = await make_node(), await make_node()
    address = KaspadAddress(node.host, node.p2p_port)
    link = Link(joiner_of(other, BOB), joiner_of(node, ALICE, FixedSource("127.5.0.1")))
    async with trio.open_nursery() as nursery:
        silent = []
        for _ in range(2):
            channel = await default_open_kaspad(address, "127.5.0.1", 1 << 20)
            await nursery.start(channel.run)
            assert await channel.receive()
            silent.append(channel)
        third = GrpcChannel.client(await dial_kaspad(address, "127.5.0.1"))
        await nursery.start(third.run)
        with pytest.raises(GrpcError, match="too many pending inbound handshakes"):
            await third.receive()

        async def leave() -> None:
            await trio.sleep(0.2)
            await silent[0].aclose()

        nursery.start_soon(leave)
        started = trio.current_time()
        nursery.start_soon(link.run)
        await link.ready()
        assert trio.current_time() - started < 3, "kaspad itself forgets the silent ones after four"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("gap", [False, True])
async def test_a_backlog_does_not_cost_the_peer(gap: bool, make_node: MakeNode) -> None:
    """kaspad ends a peer of which 256 messages wait for one of its parts. What comes at once after a gap is paced."""
    node = await make_node()
    joiner = joiner_of(node, BOB)
    left, right = overlay_pair(window=4 << 20, protocol=Dialect.MESSAGES, watched=True)
    ended: list[Ended] = []

    async def carry() -> None:
        ended.append(await joiner.carry(right))

    async with LightPeer("kaspa-simnet") as light, trio.open_nursery() as nursery:
        nursery.start_soon(carry)
        with trio.fail_after(PLENTY):
            peer = await light.handshake(left)
            right.gap_count += gap
            pings = [pb.KaspadMessage(ping=pb.Ping(nonce=n)).SerializeToString() for n in range(2000)]
            await peer.channel.send_pieces([Piece.of(each) for each in pings])
            if gap:
                assert await peer.ping() < 30
                assert not ended
            else:
                await peer.wait_ended()
                while not ended:  # noqa: ASYNC110 - it is told by another task
                    await trio.sleep(0.01)
                assert ended[0].by is Side.KASPAD
        nursery.cancel_scope.cancel()
