"""Our side of `tests.perf.session`: two nodes with Kaspa streams between them, in sessions or plain, as processes.

usage: python -m tests.perf.session_peers session|plain listen|dial [--many] [--traced]

They speak as ``tests/interop/rust`` does. The first byte on a Kaspa stream names what the listener does with it: reads
it to the end, or sends back what comes. Orders: ``connect``, ``perf``, ``echo``, ``hold`` and ``release`` (a stream
that does nothing), ``open`` (so many that do nothing, with ``--many``), ``traced`` (bytes that Python has, with
``--traced``).
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from contextlib import suppress

import trio

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import SessionConfig, YamuxConfig
from kas_libp2p.errors import Refused
from kas_libp2p.metadata import SESSION, Dialect, Direction, OverlayStream
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.perf.peers import LOOPBACK, Json, echoes, read_orders, say, serve_echo, serve_perf, upload

SERVICES = {b"p": serve_perf, b"e": serve_echo}
ANY = "/kas-perf/1"
"""A protocol of which there may be any number of streams."""
MANY = 4000
"""Sessions, and streams, that are allowed where memory is measured."""
MANY_WITHIN = 60.0
"""Seconds to open a thousand, on a busy machine."""
IDENTIFIED = 0.5
"""Seconds for both sides to have heard what the other serves."""


async def serve(stream: OverlayStream) -> None:
    """Do what the stream's first byte says."""
    await SERVICES[await stream.receive_some(1)](stream)
    await stream.aclose()


class Caller:
    """A node that opens Kaspa streams."""

    def __init__(self, node: Node, sessions: bool) -> None:
        self._node = node
        self._sessions = sessions
        self._peer = ""
        self._held: OverlayStream | None = None
        self._under: YamuxStream
        self._many: list[OverlayStream] = []

    async def act(self, order: Json) -> Json:
        match order["do"]:
            case "connect":
                self._peer = order["addr"].rpartition("/")[2]
                await self._node.swarm.dial(self._peer, [order["addr"]])
                await trio.sleep(IDENTIFIED)
                return {}
            case "perf":
                stream = await self._open(b"p")
                under = self._under
                seconds = await upload(stream, order["upload"], order["write"])
                return {"upload_seconds": seconds, "back": under.received}
            case "echo":
                return await echoes(await self._open(b"e"), order["size"], order["count"])
            case "hold":
                self._held = await self._open(b"e")
                return {}
            case "release":
                assert self._held is not None
                await self._held.aclose()
                return {}
            case "open":
                with trio.fail_after(MANY_WITHIN):
                    for _ in range(order["count"]):
                        self._many.append(await self._open_one_more())
                return {}
            case "traced":
                gc.collect()
                return {"bytes": tracemalloc.get_traced_memory()[0]}
        raise ValueError(f"unknown order {order['do']}")

    async def _open_one_more(self) -> OverlayStream:
        """Beside others on the same connection, which a node does not do by itself."""
        up = self._node.connections[0].connection
        while True:
            with suppress(Refused):  # as long as too many of them are not acknowledged
                stream = await up.open_stream(SESSION if self._sessions else ANY)
                break
            await trio.sleep(0.05)
        one = self._node.sessions.open(stream) if self._sessions else stream
        await one.send_all(b"e")
        return one

    async def _open(self, service: bytes) -> OverlayStream:
        stream = await self._node.connect(self._peer)
        [self._under] = [each for each in self._streams() if each.direction is Direction.OUTBOUND and not each.closed]
        await stream.send_all(service)
        return stream

    def _streams(self) -> list[YamuxStream]:
        """What Kaspa streams are made of."""
        protocol = SESSION if self._sessions else Dialect.MESSAGES
        return [each for up in self._node.connections for each in up.connection.streams if each.protocol == protocol]


async def run(sessions: bool, listen: bool, many: bool) -> None:
    config = Config(
        listen=(LOOPBACK,) if listen else (),
        session=SessionConfig(enabled=sessions, **({"max_sessions": MANY, "max_per_peer": MANY} if many else {})),
        yamux=YamuxConfig(max_inbound_streams=MANY, max_outbound_streams=MANY, max_memory=1 << 30),
    )
    async with open_node(config) as node:
        say("started", peer=node.peer_id)
        await node.serve(serve)
        if many:
            await node.serve(serve, ANY, max_streams=MANY, max_per_peer=MANY)
            node.sessions._surplus = lambda stream: False
        if listen:
            say("listening", address=node.addresses[0])
        await read_orders(Caller(node, sessions).act)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("session", "plain"))
    parser.add_argument("role", choices=("listen", "dial"))
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--traced", action="store_true")
    options = parser.parse_args()
    if options.traced:
        tracemalloc.start()
    trio.run(run, options.subject == "session", options.role == "listen", options.many)


if __name__ == "__main__":
    main()
