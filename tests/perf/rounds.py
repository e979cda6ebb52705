"""Where the time of a sync through two bridges goes: who waits for whom, request by request.

usage: python -m tests.perf.rounds [--delay 50] [--full 1500] [--kaspad FILE]

kaspad asks for the next part of a chain when it has dealt with the one before, so a sync is a row of rounds. Both
bridges note when a request or an answer passes, on the host's one monotonic clock. Of each round:

    ask       ms from the syncing kaspad's request to the other bridge having it: the path, and what we add to it
    source    ms until the source's kaspad has given the whole answer (beside which most of the answer travels)
    rest      ms until the last of it is at the syncing kaspad's bridge: the path, and what we add to it
    think     ms until the syncing kaspad asks for the next part
"""

from __future__ import annotations

import argparse
import atexit
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from kas_bridge.simnet.bridges import Bridges
from kas_bridge.simnet.measure import HOST, pair_of, timed_sync
from kas_bridge.simnet.mine import filled_chain
from kas_bridge.simnet.node import find_kaspad
from kas_bridge.simnet.wire import Wire
from kas_libp2p.kaspa._join import payload_number
from kas_libp2p.kaspa.channel import Piece
from kas_libp2p.kaspa.pump import Flow, Pump

RECORDER = (sys.executable, "-m", "tests.perf.rounds", "bridge")
ANSWER = 100
"""Bytes: what is smaller is no answer worth a row (a ping, an address request)."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A batch of pieces that passed a bridge: when, from which side, the kinds of the messages begun, and bytes."""

    at: float
    from_peer: bool
    kinds: tuple[int | None, ...]
    bytes: int


def run_bridge(arguments: list[str]) -> None:
    """kas-bridge, with a recorder in its pump."""
    from kas_bridge.cli import main

    seen: list[Passed] = []
    look_at = Pump._look_at

    def look(self: Pump, pieces: list[Piece], flow: Flow, from_left: bool) -> None:
        kinds = tuple(payload_number(piece.data) for piece in pieces if piece.first)
        seen.append(Passed(time.monotonic(), from_left, kinds, sum(len(piece.data) for piece in pieces)))
        look_at(self, pieces, flow, from_left)

    Pump._look_at = look  # type: ignore[method-assign]
    folder = next(each.partition("=")[2] for each in arguments if each.startswith("--data-dir="))
    rows = Path(folder).with_suffix(".rounds")
    atexit.register(
        lambda: rows.write_text(json.dumps([[each.at, each.from_peer, each.kinds, each.bytes] for each in seen]))
    )
    sys.argv = ["kas-bridge", *arguments]
    main()


def recorded(file: Path) -> list[Passed]:
    return [Passed(at, bool(left), tuple(kinds), size) for at, left, kinds, size in json.loads(file.read_text())]


def rounds(passed: list[Passed], asks_from_peer: bool) -> Iterator[tuple[Passed, float, int]]:
    """Each request that was answered: the request, when the last of its answer passed, and bytes of the answer."""
    ask: Passed | None = None
    last, size = 0.0, 0
    for each in passed:
        if each.from_peer == asks_from_peer and each.kinds:
            if ask is not None and size >= ANSWER:
                yield ask, last, size
            ask, size = each, 0
        elif each.from_peer != asks_from_peer:
            last, size = each.at, size + each.bytes
    if ask is not None and size >= ANSWER:
        yield ask, last, size


def show(source: list[Passed], target: list[Passed], delay: float) -> None:
    here, there = list(rounds(target, False)), list(rounds(source, True))
    begun = target[0].at
    sums = [0.0] * 4
    print("| at, s | asked | answer, kB | ask | source | rest | think |\n|---|---|---|---|---|---|---|")
    for index, ((ask, got, size), (asked, gave, _)) in enumerate(zip(here, there, strict=False)):
        following = here[index + 1][0].at if index + 1 < len(here) else got
        parts = [asked.at - ask.at, gave - asked.at, got - gave, following - got]
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
        shown = " | ".join(f"{part * 1000:.0f}" for part in parts)
        print(f"| {ask.at - begun:.2f} | {ask.kinds[0]} | {size / 1000:.0f} | {shown} |")
    ways = 2 * delay * len(here)
    print(
        f"\n{len(here)} rounds, {sum(sums):.2f} s: {ways:.2f} on the path at the least (2 x {delay * 1000:g} ms each);"
        f" the source's kaspad answered for {sums[1]:.2f}, the syncing one thought for {sums[3]:.2f};"
        f" all else, the filling of the path and the bridges: {sums[0] + sums[2] - ways:.2f}"
    )


async def measure(options: argparse.Namespace) -> None:
    kaspad = find_kaspad(options.kaspad)
    chain = await filled_chain(kaspad, options.full)
    delay = options.delay / 1000
    way = Bridges(command=RECORDER)
    with Wire(delay, HOST) as wire:
        async with pair_of(chain, kaspad, way, wire) as pair:
            async with way.prepare(pair) as link:
                result = await timed_sync(chain, pair, way, link, delay)
            source, target = (recorded(pair.folder / f"bridge-{side}.rounds") for side in ("source", "target"))
            show(source, target, delay)
    print(f"whole sync: {result.seconds:.2f} s; others took {result.others:.2f} cores")


def main() -> None:
    if sys.argv[1:2] == ["bridge"]:
        return run_bridge(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=50.0, help="milliseconds each way")
    parser.add_argument("--full", type=int, default=1500, help="filled blocks in the chain")
    parser.add_argument("--kaspad", help="the binary; found if not given")
    return trio.run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
