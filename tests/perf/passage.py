"""What a bridge takes for one small message at a time: its CPU per passage, and how long each way lasts.

usage: python -m tests.perf.passage [--rounds N] [--messages N] [--gap MS] [--against CHECKOUT]

A pump in a process of its own joins a `GrpcChannel` over loopback TCP, as towards kaspad, and a `MessagesChannel` on a
stream of a connection, as towards a peer. The other ends of both are here: a message goes through one way, then one the
other way, then there is silence for ``--gap`` milliseconds, as between live blocks. Only ratios of figures of one run
say anything: with CHECKOUT, another state of this repository, the two are measured in turn.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import trio

from kas_libp2p.config import Config
from kas_libp2p.identity import Identity
from kas_libp2p.kaspa.channel import MessageChannel, running
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.join import KaspadAddress, default_open_kaspad
from kas_libp2p.kaspa.messages import MessagesChannel
from kas_libp2p.kaspa.pump import Pump
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.tcp import TcpRaw
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream

HERE = Path(__file__).parents[2]
BRIDGE, PEER = Identity.from_seed(bytes(32)), Identity.from_seed(bytes(range(32)))
PROTOCOL = "/messages"
MESSAGE = os.urandom(40)
"""Of about the size of an Inv or a request."""
WARM_UP = 20
FIGURES = ("CPU, µs", "node to peer, µs", "peer to node, µs")


async def connection_on(stream: trio.SocketStream, *, initiator: bool) -> Connection:
    sock = socket.socket(fileno=os.dup(stream.socket.fileno()))
    await stream.aclose()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return await upgrade(
        TcpRaw(sock, sock.getpeername()),
        identity=BRIDGE if initiator else PEER,
        initiator=initiator,
        expected=PEER.peer_id if initiator else None,
        config=Config(),
    )


async def bridge(node: int, peer: int) -> None:
    async with trio.open_nursery() as nursery:
        connection = await connection_on(await trio.open_tcp_stream("127.0.0.1", peer), initiator=True)
        await nursery.start(connection.run, lambda stream: None)
        overlay = MessagesChannel(await connection.open_stream(PROTOCOL))
        kaspad = await default_open_kaspad(KaspadAddress("127.0.0.1", node), None, 1 << 28)
        async with running(overlay), running(kaspad):
            nursery.start_soon(Pump(overlay, kaspad).run)
            while await trio.to_thread.run_sync(sys.stdin.readline):
                print(time.process_time(), flush=True)
        nursery.cancel_scope.cancel()


async def pass_on(source: MessageChannel, sink: MessageChannel) -> float:
    began = time.perf_counter()
    await source.send(MESSAGE)
    await sink.receive()
    return (time.perf_counter() - began) * 1e6


async def measure(checkout: Path, messages: int, gap: float) -> dict[str, float]:
    (node_listener,), (peer_listener,) = [await trio.open_tcp_listeners(0, host="127.0.0.1") for _ in "12"]
    ports = [str(each.socket.getsockname()[1]) for each in (node_listener, peer_listener)]
    process = subprocess.Popen(  # noqa: ASYNC220 - takes no time that is measured
        [sys.executable, __file__, "--bridge", *ports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def cpu() -> float:
        print(file=process.stdin, flush=True)
        return float(process.stdout.readline())

    there: list[float] = []
    back: list[float] = []
    with process:
        async with trio.open_nursery() as nursery:
            streams = trio.open_memory_channel[YamuxStream](1)
            connection = await connection_on(await peer_listener.accept(), initiator=False)
            await nursery.start(connection.run, streams[0].send_nowait)
            stream = await streams[1].receive()
            await connection.accept(stream, (PROTOCOL,))
            node_stream = await node_listener.accept()
            async with running(GrpcChannel.server(node_stream)) as node, running(MessagesChannel(stream)) as peer:
                before = 0.0
                for number in range(messages + WARM_UP):
                    if number == WARM_UP:
                        there.clear()
                        back.clear()
                        before = await trio.to_thread.run_sync(cpu)
                    there.append(await pass_on(node, peer))
                    back.append(await pass_on(peer, node))
                    await trio.sleep(gap)
                spent = await trio.to_thread.run_sync(cpu) - before
            nursery.cancel_scope.cancel()
        process.stdin.close()
    values = (spent / messages / 2 * 1e6, statistics.median(there), statistics.median(back))
    return dict(zip(FIGURES, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("--gap", type=float, default=5.0)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    if arguments.bridge:
        trio.run(bridge, *arguments.bridge)
        return
    subjects = {"here": HERE} | ({"there": arguments.against} if arguments.against else {})
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.rounds):
        for name, checkout in subjects.items():
            for figure, value in trio.run(measure, checkout, arguments.messages, arguments.gap / 1000).items():
                found.setdefault((figure, name), []).append(value)
    print("| figure | checkout | median | spread |")
    print("|---|---|---|---|")
    for (figure, name), values in sorted(found.items()):
        print(f"| {figure} | {name} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")


if __name__ == "__main__":
    main()
