"""The RPC client against a node that is made up: who gets which answer, and what becomes of those who wait."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from kas_libp2p.errors import ConnectionLost, RemoteProtocolError, RpcError
from kas_libp2p.kaspa import rpc_pb2 as pb
from kas_libp2p.kaspa.channel import running
from kas_libp2p.kaspa.grpc import RPC_PATH, GrpcChannel
from kas_libp2p.kaspa.rpc import ANSWER_TIMEOUT, NOTIFICATIONS, KaspadRpc, open_rpc


class Node:
    """The other end."""

    def __init__(self, channel: GrpcChannel) -> None:
        self.channel = channel

    async def asked(self) -> pb.RpcRequest:
        return pb.RpcRequest.FromString(await self.channel.receive() or b"")

    async def say(self, answer: pb.RpcResponse) -> None:
        await self.channel.send(answer.SerializeToString())

    async def add_block(self, nonce: int) -> None:
        block = pb.RpcBlock(header=pb.RpcBlockHeader(nonce=nonce))
        await self.say(pb.RpcResponse(blockAddedNotification=pb.BlockAddedNotification(block=block)))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[KaspadRpc, Node]]:
    here, there = memory_stream_pair()
    async with running(GrpcChannel.server(there, path=RPC_PATH)) as channel, open_rpc(here) as rpc:
        yield rpc, Node(channel)


async def test_each_gets_its_own_answer_whatever_the_order(autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, node), trio.open_nursery() as nursery:
        got: dict[str, object] = {}

        async def ask(name: str, call: Callable[[], object]) -> None:
            got[name] = await call()  # type: ignore[misc]

        nursery.start_soon(ask, "info", rpc.get_info)
        nursery.start_soon(ask, "synced", rpc.get_sync_status)
        requests = {each.WhichOneof("payload"): each.id for each in [await node.asked(), await node.asked()]}
        synced = pb.GetSyncStatusResponse(isSynced=True)
        for unasked in (7_000_000, requests["getSyncStatusRequest"]):
            await node.say(pb.RpcResponse(id=unasked, getSyncStatusResponse=synced))
        await wait_all_tasks_blocked()
        assert got == {"synced": True}
        info = pb.GetInfoResponse(p2pId="me")
        await node.say(pb.RpcResponse(id=requests["getInfoRequest"], getInfoResponse=info))
        await wait_all_tasks_blocked()
        assert got == {"synced": True, "info": info}


async def test_a_no_comes_in_the_nodes_words(autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, node), trio.open_nursery() as nursery:

        async def expect() -> None:
            with pytest.raises(RpcError, match="only in unsafe mode"):
                await rpc.ban("192.0.2.1")

        nursery.start_soon(expect)
        request = await node.asked()
        assert request.banRequest.ip == "192.0.2.1"
        no = pb.EmptyResponse(error=pb.RpcError(message="only in unsafe mode"))
        await node.say(pb.RpcResponse(id=request.id, banResponse=no))


async def test_an_answer_to_something_else_is_the_nodes_fault(autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, node), trio.open_nursery() as nursery:

        async def expect() -> None:
            with pytest.raises(RemoteProtocolError, match="getSyncStatusResponse is no answer to getInfoRequest"):
                await rpc.get_info()

        nursery.start_soon(expect)
        request = await node.asked()
        await node.say(pb.RpcResponse(id=request.id, getSyncStatusResponse=pb.GetSyncStatusResponse()))


async def test_no_answer(autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, _):
        begun = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await rpc.get_info()
        assert trio.current_time() - begun == pytest.approx(ANSWER_TIMEOUT)
        assert rpc._waiting == {}


@pytest.mark.parametrize("said", [None, b"\xff\xff"], ids=["it leaves", "garbage"])
async def test_whoever_waits_learns_of_the_end(said: bytes | None, autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, node), trio.open_nursery() as nursery:
        blocks = await subscribed(rpc, node)
        why = ConnectionLost if said is None else RemoteProtocolError

        async def expect() -> None:
            with pytest.raises(why):
                await rpc.get_info()

        async def expect_block() -> None:
            with pytest.raises(why):
                await anext(blocks)

        nursery.start_soon(expect)
        nursery.start_soon(expect_block)
        await node.asked()
        if said is None:
            await node.channel.aclose()
        else:
            await node.channel.send(said)
        with trio.fail_after(5):
            await wait_all_tasks_blocked()
            with pytest.raises(why):
                await rpc.get_info()


async def subscribed(rpc: KaspadRpc, node: Node) -> AsyncIterator[pb.RpcBlock]:
    async def agree() -> None:
        request = await node.asked()
        assert request.notifyBlockAddedRequest.command == 0
        await node.say(pb.RpcResponse(id=request.id, notifyBlockAddedResponse=pb.EmptyResponse()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(agree)
        blocks = await rpc.notify_block_added()
    return aiter(blocks)


async def test_blocks_go_to_every_reader_and_one_that_falls_behind_ends_alone(autojump_clock: trio.abc.Clock) -> None:
    async with connected() as (rpc, node):
        quick, slow = await subscribed(rpc, node), await subscribed(rpc, node)
        for nonce in range(NOTIFICATIONS + 1):
            await node.add_block(nonce)
            assert (await anext(quick)).header.nonce == nonce
        for nonce in range(NOTIFICATIONS):
            assert (await anext(slow)).header.nonce == nonce
        with pytest.raises(RpcError, match=f"fell {NOTIFICATIONS} blocks behind"):
            await anext(slow)
