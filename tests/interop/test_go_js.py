"""With go-libp2p and js-libp2p: connections both ways, and streams with a half-close."""

from __future__ import annotations

from pathlib import Path

import trio

from kas_libp2p import Node
from tests.interop.peer import running_peer
from tests.interop.protocols import ECHO, Served, pattern

SIZE = 3 * 1024 * 1024
"""Bytes: more than windows of 256 KiB let out at once, so that updates have to come."""


async def test_we_dial(node: Node, other: Path) -> None:
    async with running_peer(other, "listen") as peer:
        assert await node.ping(peer.address) > 0
        info = await node.identify(peer.peer)
        assert info is not None
        assert ECHO in info.protocols
        assert info.observed == str(node.swarm.listen_addresses()[0])
        sent = pattern(0, SIZE)
        got = bytearray()
        async with await node.connect(peer.peer, ECHO) as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            nursery.start_soon(send)
            while data := await stream.receive_some():
                got += data
        assert len(got) == SIZE
        assert bytes(got) == sent
        connected = await peer.wait("connected")
        assert (connected["peer"], connected["direction"]) == (node.peer_id, "inbound")
        await node.disconnect(peer.peer)
        await peer.wait("disconnected")


async def test_we_are_dialed(node: Node, served: Served, other: Path) -> None:
    async with running_peer(other, "listen") as peer:
        await peer.order("connect", address=node.addresses[0])
        answer = await peer.order("echo", peer=node.peer_id, size=SIZE)
        assert answer["intact"]
        info = node.peer_info(peer.peer)
        assert info is not None
        assert ECHO in info.protocols
        await peer.order("disconnect", peer=node.peer_id)
        await peer.wait("disconnected")
