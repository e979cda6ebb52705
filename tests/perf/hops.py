"""Where the time of a live block goes: each passage of its three messages, from the packets on loopback. Needs root.

usage: python -m tests.perf.hops [--blocks 300] [--size 0] [--kaspad FILE]

A node tells of a block (Inv), the other asks for it (RequestRelayBlocks), the first sends it (Block). Over plain TCP
that is three packets from kaspad to kaspad, through two bridges three times three. The kernel's receive times of the
packets say how long each process had a message: a bridge from the packet that brings it to the packet that takes it on.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import trio

from kas_bridge.simnet.bridges import BridgeLink, Bridges
from kas_bridge.simnet.measure import Link, Pair, PlainTcp, Way, live, pair_of, timed_sync
from kas_bridge.simnet.mine import Chain, filled_chain
from kas_bridge.simnet.node import find_kaspad

SO_TIMESTAMPNS = 35
QUIET = 0.02
"""Seconds without a packet that separate one block from the next; they come every 0.1 s."""
HEADERS = 128
"""Bytes of a packet that are looked at."""

Packet = tuple[float, str]
"""When it was received, and its passage, as ``node A > bridge A``."""


class Capture:
    """Notes the packets with payload of some TCP flows on loopback, in a thread."""

    def __init__(self, flows: Mapping[tuple[str, int], str]) -> None:
        """``flows``: the passage for ``("from", port)`` and ``("to", port)``."""
        self._flows = flows
        self._packets: list[Packet] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("lo", 0))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.settimeout(0.2)
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            try:
                data, ancillary, _, address = self._socket.recvmsg(HEADERS, 64)
            except TimeoutError:
                continue
            if address[2] == socket.PACKET_OUTGOING or data[12:14] != b"\x08\x00" or data[23] != socket.IPPROTO_TCP:
                continue
            source, target = struct.unpack_from(">HH", data, 34)
            payload = struct.unpack_from(">H", data, 16)[0] - 20 - (data[46] >> 4) * 4
            name = self._flows.get(("from", source)) or self._flows.get(("to", target))
            if payload > 0 and name is not None:
                seconds, nanoseconds = struct.unpack_from("qq", ancillary[0][2])
                self._packets.append((seconds + nanoseconds / 1e9, name))

    def end(self) -> list[Packet]:
        self._stop = True
        self._thread.join()
        self._socket.close()
        return self._packets


def blocks(packets: list[Packet]) -> Iterator[list[Packet]]:
    """The packets of one block after the other."""
    group: list[Packet] = []
    for packet in packets:
        if group and packet[0] - group[-1][0] > QUIET:
            yield group
            group = []
        group.append(packet)
    yield group


def flows_of(pair: Pair, link: Link) -> dict[tuple[str, int], str]:
    a, b = pair.source.p2p_port, pair.target.p2p_port
    if not isinstance(link, BridgeLink):
        return {("from", a): "node A > node B", ("to", a): "node B > node A"}
    between = link.source.port
    return {
        ("from", a): "node A > bridge A",
        ("from", between): "bridge A > bridge B",
        ("to", b): "bridge B > node B",
        ("from", b): "node B > bridge B",
        ("to", between): "bridge B > bridge A",
        ("to", a): "bridge A > node A",
    }


def expected(flows: Mapping[tuple[str, int], str]) -> list[str]:
    """The passages of one block: there, back, and there again."""
    names = list(flows.values())
    half = len(names) // 2
    return names[:half] + names[half:] + names[:half]


async def measure(chain: Chain, kaspad: Path, way: Way, count: int, size: int) -> None:
    async with pair_of(chain, kaspad, way) as pair, way.prepare(pair) as link:
        await timed_sync(chain, pair, way, link, 0.0)
        flows = flows_of(pair, link)
        capture = Capture(flows)
        try:
            outcome = await live(chain, pair, way, size=size, count=count)
        finally:
            packets = await trio.to_thread.run_sync(capture.end)
    order = expected(flows)
    steps: dict[int, list[float]] = defaultdict(list)
    complete = 0
    for group in blocks(packets):
        firsts: list[Packet] = []
        for packet in group:  # the first packet of each passage, in order; a full block takes many
            if len(firsts) < len(order) and packet[1] == order[len(firsts)]:
                firsts.append(packet)
        if len(firsts) == len(order):
            complete += 1
            for index in range(1, len(firsts)):
                steps[index].append((firsts[index][0] - firsts[index - 1][0]) * 1e6)
    print(
        f"\n{way.name}: {complete} of {count} blocks; {outcome.quantile(0.5) * 1000:.1f} ms from added to added,",
        end="",
    )
    print(f" others took {outcome.others:.2f} cores\n")
    print("| who | message | µs, median | p90 |\n|---|---|---|---|")
    total = 0.0
    for index, values in sorted(steps.items()):
        who = order[index].split(" > ")[0]
        message = ("Inv", "Request", "Block")[index // (len(order) // 3)]
        middle = statistics.median(values)
        total += middle if who.startswith("bridge") else 0.0
        print(f"| {who} | {message} | {middle:.0f} | {statistics.quantiles(values, n=10)[8]:.0f} |")
    print(f"\nin bridges: {total:.0f} µs (sum of medians)")


async def run(options: argparse.Namespace) -> None:
    kaspad = find_kaspad(options.kaspad)
    chain = await filled_chain(kaspad, 20)
    for way in (PlainTcp(), Bridges()):
        await measure(chain, kaspad, way, options.blocks, options.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=300)
    parser.add_argument("--size", type=int, default=0, help="bytes of transactions in each block")
    parser.add_argument("--kaspad", help="the binary; found if not given")
    trio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
