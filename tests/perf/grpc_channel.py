"""What gRPC costs: CPU of both ends of a `GrpcChannel` over loopback TCP, each in a process of its own.

usage: python -m tests.perf.grpc_channel [--rounds N] [--mb N] [--against CHECKOUT] [CASE ...]

Cases: large (240 kB, a full block), small (500 bytes, in batches, as a bridge passes them on), single (500 bytes, each
by itself). Only ratios of figures of one run say anything: with CHECKOUT, another state of this repository, the two are
measured in turn. Each figure is a median with its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import trio

from kas_libp2p.kaspa.channel import BATCH, MessageChannel, Piece, running
from kas_libp2p.kaspa.grpc import GrpcChannel

LARGE, SMALL = 240_000, 500
CASES = {"large": LARGE, "small": SMALL, "single": SMALL}
HERE = Path(__file__).parents[2]
Json = dict[str, Any]


async def fill(channel: MessageChannel, case: str, total: int) -> None:
    size = CASES[case]
    message = os.urandom(size)
    if case == "single":
        for _ in range(total // size):
            await channel.send(message)
        return
    batch = [Piece.of(message)] * max(1, BATCH // size)
    for _ in range(total // size // len(batch)):
        await channel.send_pieces(batch)


async def drain(channel: MessageChannel) -> None:
    while await channel.receive_pieces():
        pass


async def transfer(channel: MessageChannel, order: Json, *, sending: bool) -> float:
    """Returns the CPU seconds it took."""
    before = time.process_time()
    if sending:
        await fill(channel, order["case"], order["total"])
        await channel.send_eof()
    else:
        await drain(channel)
    return time.process_time() - before


async def listen() -> None:
    """Carry out one order, and print what it cost."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)
    async with running(GrpcChannel.server(await listener.accept())) as channel:
        order = json.loads(await channel.receive() or b"")
        cpu = await transfer(channel, order, sending=not order["up"])
        while await channel.receive_pieces():  # the client ends when it has all
            pass
    await listener.aclose()
    print(cpu, flush=True)


async def dial(port: int, order: Json) -> None:
    async with running(GrpcChannel.client(await trio.open_tcp_stream("127.0.0.1", port))) as channel:
        await channel.send(json.dumps(order).encode())
        print(await transfer(channel, order, sending=order["up"]), flush=True)
        await channel.send_eof()
        while await channel.receive_pieces():  # the server ends when it has all
            pass


def measure(checkout: Path, order: Json) -> tuple[float, float]:
    """CPU seconds of the client and of the server."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(checkout)}
        )

    with start("--listen") as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with start("--dial", str(port), json.dumps(order)) as client:
            assert client.stdout is not None
            return float(client.stdout.read()), float(server.stdout.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dial", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--against", type=Path)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    if arguments.listen:
        trio.run(listen)
        return
    if arguments.dial:
        trio.run(dial, int(arguments.dial[0]), json.loads(arguments.dial[1]))
        return
    cases = arguments.cases or list(CASES)
    if not set(cases) <= set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    subjects = {"here": HERE} | ({"there": arguments.against} if arguments.against else {})
    figures: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(arguments.rounds):
        for case in cases:
            for up in (True, False):
                for name, checkout in subjects.items():
                    total = arguments.mb * 1_000_000
                    costs = measure(checkout, {"case": case, "total": total, "up": up})
                    for role, cost in zip(("client", "server"), costs, strict=True):
                        work = "sends" if up == (role == "client") else "receives"
                        figures.setdefault((case, f"{role} {work}", name), []).append(cost / total * 1e9)
    print("| case | end | checkout | CPU s per GB | spread |")
    print("|---|---|---|---|---|")
    for (case, end, name), values in figures.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {case} | {end} | {name} | {statistics.median(values):.2f} | {spread} |")


if __name__ == "__main__":
    main()
