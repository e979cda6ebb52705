"""A client for kaspad's RPC: gRPC on the same core that the peer-to-peer side uses.

Many requests may be in flight; an answer finds its request by id. kaspad answers most reads in its default safe mode;
`KaspadRpc.add_peer`, `KaspadRpc.ban` and `KaspadRpc.unban` need ``--unsaferpc``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Self, TypeVar

import trio
from google.protobuf.message import DecodeError, Message

from kas_libp2p.errors import ConnectionLost, KasError, RemoteProtocolError, RpcError
from kas_libp2p.kaspa import rpc_pb2 as pb
from kas_libp2p.kaspa.channel import beside, running
from kas_libp2p.kaspa.grpc import RPC_PATH, GrpcChannel, GrpcSettings

ANSWER_TIMEOUT = 15.0
"""Seconds for one answer. kaspad answers reads in milliseconds, but waits up to 10 s for a peer that it dials."""
CONNECT_TIMEOUT = 2.0
"""Seconds for the TCP connection; kaspad is on this host or near."""
NOTIFICATIONS = 1024
"""Blocks held for one reader of `KaspadRpc.notify_block_added`: 100 seconds of Kaspa. One that falls behind ends."""

_SETTINGS = GrpcSettings(path=RPC_PATH)


Answer = TypeVar("Answer", bound=Message)


class _Slot:
    """A request that waits for its answer."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.answer: pb.RpcResponse | None = None
        self.done = trio.Event()


class BlocksAdded:
    """An async iterator over the blocks that kaspad adds.

    Raises why the connection ended; `RpcError` if its reader fell `NOTIFICATIONS` blocks behind.
    """

    def __init__(self) -> None:
        self._queue: deque[pb.RpcBlock] = deque()
        self._ended: KasError | None = None
        self._lot = trio.lowlevel.ParkingLot()

    def _put(self, block: pb.RpcBlock) -> None:
        if self._ended is not None:
            return
        if len(self._queue) == NOTIFICATIONS:
            self._end(RpcError(f"the reader of added blocks fell {NOTIFICATIONS} blocks behind"))
            return
        self._queue.append(block)
        self._lot.unpark_all()

    def _end(self, error: KasError) -> None:
        self._ended = self._ended or error
        self._lot.unpark_all()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.RpcBlock:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._queue:
            if self._ended is not None:
                raise self._ended
            await self._lot.park()
        return self._queue.popleft()


class KaspadRpc:
    """A connection to kaspad's RPC. Made by `open_rpc` and `connect_rpc`.

    Every method raises:
        RpcError: kaspad answered with an error; the text is kaspad's.
        ConnectionLost, GrpcError, RemoteProtocolError: the connection ended.
        trio.TooSlowError: no answer within `ANSWER_TIMEOUT` seconds.
    """

    def __init__(self, channel: GrpcChannel) -> None:
        self._channel = channel
        self._ids = count(1)
        self._waiting: dict[int, _Slot] = {}
        self._sending = trio.Lock()
        self._blocks: list[BlocksAdded] = []
        self._ended: KasError | None = None

    async def get_info(self) -> pb.GetInfoResponse:
        """Node id (``p2pId``), version, whether synced."""
        return await self._ask(pb.RpcRequest(getInfoRequest=pb.EmptyRequest()), pb.GetInfoResponse)

    async def get_server_info(self) -> pb.GetServerInfoResponse:
        """Network, version, whether synced."""
        return await self._ask(pb.RpcRequest(getServerInfoRequest=pb.EmptyRequest()), pb.GetServerInfoResponse)

    async def get_sync_status(self) -> bool:
        """Whether kaspad is synced."""
        request = pb.RpcRequest(getSyncStatusRequest=pb.EmptyRequest())
        return (await self._ask(request, pb.GetSyncStatusResponse)).isSynced

    async def get_connected_peer_info(self) -> list[pb.PeerInfo]:
        """kaspad's peers."""
        request = pb.RpcRequest(getConnectedPeerInfoRequest=pb.EmptyRequest())
        return list((await self._ask(request, pb.GetConnectedPeerInfoResponse)).infos)

    async def get_block_dag_info(self) -> pb.GetBlockDagInfoResponse:
        """Network, tips, block counts, sink."""
        return await self._ask(pb.RpcRequest(getBlockDagInfoRequest=pb.EmptyRequest()), pb.GetBlockDagInfoResponse)

    async def add_peer(self, address: str, *, permanent: bool = False) -> None:
        """Have kaspad dial a peer.

        Args:
            address: ``ip:port``.
            permanent: dial it again whenever it is lost.
        """
        request = pb.RpcRequest(addPeerRequest=pb.AddPeerRequest(address=address, isPermanent=permanent))
        await self._ask(request, pb.EmptyResponse)

    async def ban(self, ip: str) -> None:
        """Ban an address; its peers end at once."""
        await self._ask(pb.RpcRequest(banRequest=pb.IpRequest(ip=ip)), pb.EmptyResponse)

    async def unban(self, ip: str) -> None:
        """Lift a ban."""
        await self._ask(pb.RpcRequest(unbanRequest=pb.IpRequest(ip=ip)), pb.EmptyResponse)

    async def get_block_template(self, pay_address: str, extra_data: str = "") -> pb.RpcBlock:
        """The next block, for a miner.

        Args:
            pay_address: who gets the reward.
        """
        body = pb.GetBlockTemplateRequest(payAddress=pay_address, extraData=extra_data)
        answer = await self._ask(pb.RpcRequest(getBlockTemplateRequest=body), pb.GetBlockTemplateResponse)
        return answer.block

    async def submit_block(self, block: pb.RpcBlock) -> None:
        """Hand in a block.

        Raises:
            RpcError: also if kaspad does not take it.
        """
        request = pb.RpcRequest(submitBlockRequest=pb.SubmitBlockRequest(block=block, allowNonDAABlocks=False))
        answer = await self._ask(request, pb.SubmitBlockResponse)
        if answer.rejectReason:
            reasons = {1: "it is not valid", 2: "initial block download is running"}
            raise RpcError(f"the block was rejected: {reasons.get(answer.rejectReason, answer.rejectReason)}")

    async def submit_transaction(self, transaction: pb.RpcTransaction) -> str:
        """Hand in a transaction; returns its id."""
        body = pb.SubmitTransactionRequest(transaction=transaction, allowOrphan=False)
        request = pb.RpcRequest(submitTransactionRequest=body)
        return (await self._ask(request, pb.SubmitTransactionResponse)).transactionId

    async def get_utxos_by_addresses(self, addresses: Sequence[str]) -> list[pb.RpcUtxosByAddressesEntry]:
        """Unspent outputs. Needs kaspad's ``--utxoindex``."""
        request = pb.RpcRequest(getUtxosByAddressesRequest=pb.GetUtxosByAddressesRequest(addresses=addresses))
        return list((await self._ask(request, pb.GetUtxosByAddressesResponse)).entries)

    async def notify_block_added(self) -> BlocksAdded:
        """Blocks as kaspad adds them, from now on. Each reader costs memory until the connection ends."""
        blocks = BlocksAdded()
        self._blocks.append(blocks)
        await self._ask(pb.RpcRequest(notifyBlockAddedRequest=pb.NotifyRequest(command=0)), pb.EmptyResponse)
        return blocks

    async def _ask(self, request: pb.RpcRequest, kind: type[Answer]) -> Answer:
        request.id = next(self._ids)
        slot = self._waiting[request.id] = _Slot()
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                if self._ended is not None:
                    raise self._lost()
                async with self._sending:
                    await self._channel.send(request.SerializeToString())
                await slot.done.wait()
        finally:
            del self._waiting[request.id]
        if slot.answer is None:
            raise self._lost()
        name = slot.answer.WhichOneof("payload")
        body = None if name is None else getattr(slot.answer, name)
        if not isinstance(body, kind):
            raise RemoteProtocolError(f"RPC: {name} is no answer to {request.WhichOneof('payload')}")
        error: str = body.error.message  # type: ignore[attr-defined]  # every answer has one
        if error:
            raise RpcError(error)
        return body

    def _lost(self) -> KasError:
        return self._ended or ConnectionLost("the RPC connection was closed")

    async def run(self) -> None:
        """Hand out answers until the connection ends. For `open_rpc`."""
        try:
            async for data in self._channel:
                self._hand_out(data)
            self._ended = ConnectionLost("kaspad ended the RPC connection")
        except KasError as error:
            self._ended = error
        finally:
            for slot in self._waiting.values():
                slot.done.set()
            for blocks in self._blocks:
                blocks._end(self._lost())

    def _hand_out(self, data: bytes) -> None:
        try:
            answer = pb.RpcResponse.FromString(data)
        except DecodeError as error:
            raise RemoteProtocolError("RPC: an answer is no valid protobuf") from error
        if answer.WhichOneof("payload") == "blockAddedNotification":
            for blocks in self._blocks:
                blocks._put(answer.blockAddedNotification.block)
            return
        slot = self._waiting.get(answer.id)
        if slot is not None:
            slot.answer = answer
            slot.done.set()


@asynccontextmanager
async def open_rpc(stream: trio.abc.HalfCloseableStream) -> AsyncIterator[KaspadRpc]:
    """Speak RPC on a fresh stream to kaspad's RPC port, for the length of a block.

    An exception of the block comes out as it is, not in a group.
    """
    async with running(GrpcChannel.client(stream, settings=_SETTINGS)) as channel:
        rpc = KaspadRpc(channel)
        async with beside(rpc.run):
            yield rpc


@asynccontextmanager
async def connect_rpc(host: str = "127.0.0.1", port: int = 16110) -> AsyncIterator[KaspadRpc]:
    """Connect to kaspad's RPC, for the length of a block.

    Raises:
        OSError: nothing listens there.
        trio.TooSlowError: no connection within `CONNECT_TIMEOUT` seconds.
    """
    with trio.fail_after(CONNECT_TIMEOUT):
        stream = await trio.open_tcp_stream(host, port)
    async with open_rpc(stream) as rpc:
        yield rpc
