"""How fast a kaspad syncs and follows: over plain TCP, and through two bridges. One run, rounds interleaved, medians.

usage: python tests/perf/sync.py [--delays none,50,100] [--rounds 3] [--ways plain,bridges,raw] [--full 1500] [--live]
                                 [--json FILE]

--delays: milliseconds each way on a wire between two namespaces; "none" is this host's loopback, without a wire.
--ways: plain (kaspad dials kaspad), bridges (kas-bridge in front of each), raw (the same bytes over one TCP stream:
    what the path itself allows).
--live: also live blocks, 10 per second, of 240 kB and empty: time from A to B, and the share of a core that each
    process took.
--json: where the figures go as JSON, one object.

Only ratios within one run mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from kas_bridge.simnet.bridges import Bridges
from kas_bridge.simnet.measure import HOST, Live, PlainTcp, Sync, Way, live, pair_of, raw_transfer, sync, timed_sync
from kas_bridge.simnet.mine import FULL, Chain, filled_chain
from kas_bridge.simnet.node import find_kaspad
from kas_bridge.simnet.wire import Wire


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ways_of(names: str) -> list[Way]:
    known: dict[str, type[Way]] = {"plain": PlainTcp, "bridges": Bridges}
    return [known[name]() for name in names.split(",") if name != "raw"]


def delays_of(text: str) -> list[float | None]:
    return [None if word == "none" else float(word) / 1000 for word in text.split(",")]


def label(delay: float | None) -> str:
    return "loopback" if delay is None else f"{delay * 1000:g} ms each way"


def spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:7.2f}" if len(values) == 1 else f"{middle:7.2f} ({min(values):.2f}-{max(values):.2f})"


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    kaspad = find_kaspad(options.kaspad)
    counted = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal counted
        if done == total or done >= counted + 200 or done < counted:
            counted = done
            say(f"  {what}: {done} of {total}")

    chain = await filled_chain(kaspad, options.full, progress=progress)
    say(f"chain: {chain.blocks} blocks, {chain.full} of them with {chain.size} bytes of transactions")
    ways = ways_of(options.ways)
    syncs: dict[float | None, dict[str, list[Sync]]] = defaultdict(lambda: defaultdict(list))
    raws: dict[float | None, list[float]] = defaultdict(list)
    lives: dict[tuple[int, str], list[Live]] = defaultdict(list)
    for number in range(1, options.rounds + 1):
        for delay in delays_of(options.delays):
            if "raw" in options.ways.split(","):
                raws[delay].append(await trio.to_thread.run_sync(raw_transfer, chain.bytes, delay))
                say(f"round {number}, {label(delay)}, raw TCP: {raws[delay][-1]:.2f} s")
            for way in ways:
                result = await sync(chain, kaspad, way, delay=delay)
                syncs[delay][way.name].append(result)
                say(f"round {number}, {label(delay)}, {way.name}: {result.seconds:.2f} s")
    if options.live:
        small = await filled_chain(kaspad, 20, progress=progress)
        for number in range(1, options.rounds + 1):
            for size in (FULL, 0):
                for way in ways:
                    outcome = await live_once(small, kaspad, way, size, options.live_blocks, options.live_delay)
                    lives[size, way.name].append(outcome)
                    say(f"round {number}, live {size} bytes, {way.name}: {outcome.quantile(0.5) * 1000:.1f} ms")
    show(chain, syncs, raws, lives)
    return {
        "chain": {"blocks": chain.blocks, "full": chain.full, "bytes": chain.bytes},
        "raw": [{"delay": delay, "seconds": seconds} for delay, seconds in raws.items()],
        "sync": [
            asdict(result) | {"loopback": delay is None}
            for delay, by_way in syncs.items()
            for results in by_way.values()
            for result in results
        ],
        "live": [asdict(outcome) for outcomes in lives.values() for outcome in outcomes],
    }


async def live_once(chain: Chain, kaspad: Path, way: Way, size: int, count: int, delay: float | None) -> Live:
    wire = None if delay is None else Wire(delay, HOST)
    try:
        async with pair_of(chain, kaspad, way, wire) as pair, way.prepare(pair) as link:
            await timed_sync(chain, pair, way, link, delay or 0.0)
            return await live(chain, pair, way, size=size, count=count, delay=delay or 0.0)
    finally:
        if wire is not None:
            wire.close()


def show(
    chain: Chain,
    syncs: dict[float | None, dict[str, list[Sync]]],
    raws: dict[float | None, list[float]],
    lives: dict[tuple[int, str], list[Live]],
) -> None:
    print(f"\nSync of an empty node: {chain.blocks} blocks, {chain.bytes / 1e6:.0f} MB of transactions\n")
    print("| path | way | seconds, median (range) | x plain TCP | MB/s | CPU s, both kaspads | CPU s, the rest |")
    print("|---|---|---|---|---|---|---|")
    for delay in sorted(set(syncs) | set(raws), key=lambda each: -1.0 if each is None else each):
        if raws[delay]:
            middle = statistics.median(raws[delay])
            print(f"| {label(delay)} | raw TCP | {spread(raws[delay])} | | {chain.bytes / middle / 1e6:.0f} | | |")
        plain = [result.seconds for result in syncs[delay].get(PlainTcp.name, [])]
        for name, results in syncs[delay].items():
            seconds = [result.seconds for result in results]
            middle = statistics.median(seconds)
            ratio = f"{middle / statistics.median(plain):.2f}" if plain and name != PlainTcp.name else ""
            nodes = statistics.median(
                sum(value for process, value in result.cpu.items() if process.startswith("kaspad"))
                for result in results
            )
            rest = statistics.median(sum(result.cpu.values()) for result in results) - nodes
            print(
                f"| {label(delay)} | {name} | {spread(seconds)} | {ratio} | {chain.bytes / middle / 1e6:.0f} "
                f"| {nodes:.1f} | {rest:.1f} |"
            )
    if lives:
        print("\nLive blocks, 10 per second: milliseconds from added at A to added at B; CPU in % of one core\n")
        print("| block | way | median | p99 | most | CPU |")
        print("|---|---|---|---|---|---|")
        for (size, name), outcomes in lives.items():
            figures = [
                statistics.median(outcome.quantile(share) * 1000 for outcome in outcomes) for share in (0.5, 0.99, 1)
            ]
            cpu = ", ".join(
                f"{process} {statistics.median(outcome.cpu[process] for outcome in outcomes) * 100:.1f}"
                for process in outcomes[0].cpu
            )
            block = f"{size / 1000:g} kB" if size else "empty"
            print(f"| {block} | {name} | {figures[0]:.1f} | {figures[1]:.1f} | {figures[2]:.1f} | {cpu} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kaspad", help="the binary; found if not given")
    parser.add_argument("--delays", default="none,50,100")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="plain,bridges,raw")
    parser.add_argument("--full", type=int, default=1500, help="filled blocks in the chain")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--live-blocks", type=int, default=200)
    parser.add_argument(
        "--live-delay", type=lambda text: float(text) / 1000, help="milliseconds each way; else loopback"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = trio.run(measure, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
