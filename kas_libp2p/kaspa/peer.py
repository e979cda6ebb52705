"""A light Kaspa peer: it shakes hands, answers what a node may ask, measures round trips, and never misbehaves.

It follows no chain. To whoever is at the other end it is an ordinary, quiet peer: it answers every Ping and every
RequestAddresses (with none), ignores inventories, and serves the blocks that it was given. That is enough to watch the
network, to test a path, and to stand in for a kaspad where there is none.

::

    async with open_node() as node, LightPeer(network="kaspa-mainnet") as kaspa:
        await node.serve(kaspa.handle)                        # Kaspa peers arrive here, whatever the way
        peer = await kaspa.handshake(await node.connect(address))
        print(peer.info.user_agent, await peer.ping())
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Self

import trio
from google.protobuf.message import DecodeError
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p.errors import ConnectionLost, KasError, RemoteProtocolError
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa._join import VersionInfo
from kas_libp2p.kaspa.channel import MessageChannel
from kas_libp2p.kaspa.dialect import channel_of
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.handshake import (
    OVERLAY_READY_TIMEOUT,
    OVERLAY_VERSION_TIMEOUT,
    PROTOCOL_VERSION,
    USER_AGENT,
    Hello,
    handshake,
)
from kas_libp2p.metadata import OverlayStream

PING_TIMEOUT = 120.0
"""Seconds for a Pong, as kaspad gives them."""
MAX_REQUESTED = 1000
"""Blocks that one request may ask for; kaspad asks for far fewer."""
CLOSE_WITHIN = 1.0
"""Seconds for an orderly end, even while being cancelled."""
BLOCKS_QUEUE = 64
"""Blocks held for a reader of `KaspaPeer.request_blocks`; beyond it the peer waits."""

Blocks = Callable[[bytes], pb.Block | None]
"""Finds a block by its hash of 32 bytes."""


class KaspaPeer:
    """A Kaspa node at the other end of a channel, after the handshake. Made by `LightPeer`.

    Attributes:
        info: what it says of itself.
        channel: carries the messages.
        rtt: the last measured round trip in seconds, or ``None``.
        ended: why it ended, or ``None`` while it lives.
    """

    def __init__(self, channel: MessageChannel, info: VersionInfo, blocks: Blocks) -> None:
        self.channel = channel
        self.info = info
        self.rtt: float | None = None
        self.ended: str | None = None
        self._find = blocks
        self._pings: dict[int, trio.Event] = {}
        self._wanted: trio.MemorySendChannel[pb.Block] | None = None
        self._over = trio.Event()

    async def ping(self) -> float:
        """Measure the round trip in seconds.

        Raises:
            ConnectionLost: the peer ended first.
            trio.TooSlowError: no Pong within `PING_TIMEOUT` seconds.
        """
        nonce = random.getrandbits(64)  # it only tells one Ping from another
        answered = self._pings[nonce] = trio.Event()
        begun = trio.current_time()
        try:
            await self._say(pb.KaspadMessage(ping=pb.Ping(nonce=nonce)))
            with trio.fail_after(PING_TIMEOUT):
                await answered.wait()
        finally:
            self._pings.pop(nonce, None)
        if self.ended is not None:
            raise ConnectionLost(self.ended)
        self.rtt = trio.current_time() - begun
        return self.rtt

    async def request_blocks(self, hashes: Sequence[bytes]) -> AsyncIterator[pb.Block]:
        """Ask for blocks, and give them as they arrive. One request at a time.

        Args:
            hashes: of 32 bytes; at most `MAX_REQUESTED`.

        Raises:
            ConnectionLost: the peer ended first.
        """
        if self._wanted is not None:
            raise trio.BusyResourceError("a request for blocks is under way")
        if len(hashes) > MAX_REQUESTED:
            raise ValueError(f"at most {MAX_REQUESTED} blocks per request")
        self._wanted, arrived = trio.open_memory_channel[pb.Block](BLOCKS_QUEUE)
        try:
            body = pb.RequestRelayBlocks(hashes=[pb.Hash(bytes=each) for each in hashes])
            await self._say(pb.KaspadMessage(requestRelayBlocks=body))
            for _ in hashes:
                try:
                    yield await arrived.receive()
                except trio.EndOfChannel:
                    raise ConnectionLost(self.ended or "the peer is gone") from None
        finally:
            self._wanted = None
            arrived.close()

    async def wait_ended(self) -> str:
        """Wait until the peer is gone, and return why."""
        await self._over.wait()
        return self.ended or "it ended"

    async def aclose(self, reason: str = "") -> None:
        """End the peer in order."""
        await self.channel.aclose(reason)

    async def run(self) -> None:
        """Answer the peer until it ends. For `LightPeer`."""
        try:
            async for raw in self.channel:
                await self._answer(raw)
            self.ended = "the peer ended the connection"
        except KasError as error:
            self.ended = str(error)
        finally:
            self.ended = self.ended or "ended by this side"
            self._over.set()
            for event in self._pings.values():
                event.set()
            if self._wanted is not None:
                self._wanted.close()

    async def _answer(self, raw: bytes) -> None:
        try:
            message = pb.KaspadMessage.FromString(raw)
        except DecodeError as error:
            raise RemoteProtocolError("a Kaspa message is no valid protobuf") from error
        request = message.request_id
        match message.WhichOneof("payload"):
            case "ping":
                await self._say(pb.KaspadMessage(pong=pb.Pong(nonce=message.ping.nonce), response_id=request))
            case "pong":
                event = self._pings.get(message.pong.nonce)
                if event is not None:
                    event.set()
            case "requestAddresses":
                await self._say(pb.KaspadMessage(addresses=pb.Addresses(), response_id=request))
            case "requestRelayBlocks":
                hashes = message.requestRelayBlocks.hashes
                if len(hashes) > MAX_REQUESTED:
                    raise RemoteProtocolError(
                        f"a request for {len(hashes)} blocks, at most {MAX_REQUESTED} are allowed"
                    )
                for each in hashes:
                    block = self._find(each.bytes)
                    if block is None:
                        raise RemoteProtocolError("a request for a block that was never announced")
                    await self._say(pb.KaspadMessage(block=block, response_id=request))
            case "block" if self._wanted is not None:
                await self._hand_over(message.block)
            case "requestTransactions":
                for wanted in message.requestTransactions.ids:
                    missing = pb.TransactionNotFound(id=wanted)
                    await self._say(pb.KaspadMessage(transactionNotFound=missing, response_id=request))
            case "reject":
                raise ConnectionLost(f"the peer said no: {message.reject.reason[:256]}")
            case "version" | "verack" | "ready":
                raise RemoteProtocolError("a handshake message after the handshake")
            case _:
                pass  # inventories, and whatever a light peer has nothing to do with

    async def _hand_over(self, block: pb.Block) -> None:
        assert self._wanted is not None
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # its reader may have gone
            await self._wanted.send(block)

    async def _say(self, message: pb.KaspadMessage) -> None:
        await self.channel.send(message.SerializeToString())


class LightPeer:
    """Holds any number of Kaspa peers. Use it as an ``async with`` block, which owns their tasks.

    Args:
        network: for instance ``kaspa-mainnet``.
        user_agent: what others see.
        protocol_version: the highest that is spoken.
        blocks: finds the blocks that it can serve; none by default.

    Attributes:
        hello: what is said to every peer.
        peers: those that are here now.
    """

    def __init__(
        self,
        network: str,
        *,
        user_agent: str = USER_AGENT,
        protocol_version: int = PROTOCOL_VERSION,
        blocks: Blocks = lambda _: None,
    ) -> None:
        self.hello = Hello(
            network=network,
            user_agent=user_agent,
            protocol_version=protocol_version,
            version_timeout=OVERLAY_VERSION_TIMEOUT,
            ready_timeout=OVERLAY_READY_TIMEOUT,
        )
        self.peers: list[KaspaPeer] = []
        self._blocks = blocks
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        return await self._stack.__aexit__(kind, error, trace)

    async def handshake(self, stream: OverlayStream | MessageChannel) -> KaspaPeer:
        """Shake hands on a fresh stream; the peer is answered from then on.

        Args:
            stream: an overlay stream in either dialect, or a channel that does not run yet.

        Raises:
            HandshakeError, ConnectionLost, GrpcError, RemoteProtocolError: it failed; the stream is closed.
        """
        if self._nursery is None:
            raise RuntimeError("a LightPeer is used as an `async with` block")
        channel = stream if isinstance(stream, MessageChannel) else channel_of(stream)
        await self._nursery.start(channel.run)
        try:
            info = await handshake(channel, self.hello)
        except BaseException:
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_WITHIN, shield=True):
                await channel.aclose()
            raise
        peer = KaspaPeer(channel, info, self._blocks)
        self._nursery.start_soon(self._attend, peer)
        return peer

    async def handle(self, stream: OverlayStream | MessageChannel) -> None:
        """Shake hands on an incoming stream, and return when that peer is gone. For ``node.serve``."""
        try:
            peer = await self.handshake(stream)
        except KasError:
            return  # its reason is the peer's affair; the stream is closed
        await peer.wait_ended()

    async def _attend(self, peer: KaspaPeer) -> None:
        self.peers.append(peer)
        try:
            await peer.run()
        finally:
            self.peers.remove(peer)
            with trio.CancelScope(deadline=trio.current_time() + CLOSE_WITHIN, shield=True):
                await peer.channel.aclose()

    async def listen(
        self, host: str = "127.0.0.1", port: int = 0, *, task_status: TaskStatus[int] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen for Kaspa peers on plain TCP, as a kaspad does. For ``nursery.start``, which returns the port."""

        async def serve(stream: trio.SocketStream) -> None:
            await self.handle(GrpcChannel.server(stream))

        listeners = await trio.open_tcp_listeners(port, host=host)
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(serve, listeners)
