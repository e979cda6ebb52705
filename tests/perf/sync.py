"""How fast a kaspad syncs and follows: over plain TCP, and through two bridges. One run, rounds interleaved, medians.

usage: python tests/perf/sync.py [--delays none,50,100] [--rounds 3] [--ways plain,bridges,raw] [--full 1500] [--live]
                                 [--failures] [--json FILE]
       python tests/perf/sync.py --join FILE ...

--delays: milliseconds each way on a wire between two namespaces; "none" is this host's loopback, without a wire.
--ways: plain (kaspad dials kaspad), bridges (kas-bridge in front of each), streams (bridges without sessions), raw (the
    same bytes over one TCP stream: what the path itself allows).
--live: also live blocks, 10 per second, of 240 kB and empty: time from A to B, and the share of a core that each
    process took.
--failures: also what happens when a bridge or a kaspad is killed in the middle of a sync, or hangs.
--json: where the figures go as JSON, one object.
--join: the tables of several such files as of one run, for rounds that were made one by one.

Only ratios within one run mean anything on a shared machine. `nice -n -15` in front keeps others away from the CPU, as
far as they can be; "others" says how many cores they took all the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from kas_bridge.simnet.bridges import COMMAND, BridgeProcess, Bridges
from kas_bridge.simnet.measure import (
    HOST,
    Live,
    PlainTcp,
    Sync,
    Way,
    blocks_at,
    live,
    pair_of,
    raw_transfer,
    reach,
    state_of,
    sync,
    timed_sync,
    wait_synced,
)
from kas_bridge.simnet.mine import FULL, Chain, filled_chain
from kas_bridge.simnet.node import find_kaspad
from kas_bridge.simnet.wire import Wire


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ways_of(names: str) -> list[Way]:
    streams = ("env", "KAS_BRIDGE_SESSION_ENABLED=false", *COMMAND)
    known: dict[str, Callable[[], Way]] = {
        "plain": PlainTcp,
        "bridges": Bridges,
        "streams": lambda: Bridges("two bridges, no sessions", command=streams),
    }
    return [known[name]() for name in names.split(",") if name != "raw"]


def delays_of(text: str) -> list[float | None]:
    return [None if word == "none" else float(word) / 1000 for word in text.split(",") if word]


def label(delay: float | None) -> str:
    return "loopback" if delay is None else f"{delay * 1000:g} ms each way"


def spread(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:7.2f}" if len(values) == 1 else f"{middle:7.2f} ({min(values):.2f}-{max(values):.2f})"


@dataclass(frozen=True, slots=True)
class Failure:
    """A process that was killed in the middle of a sync, or hung, and what came of it.

    Attributes:
        what: what was done to whom.
        blocks: what the syncing node had by then.
        up: seconds from there until the process ran again and answered.
        resumed: seconds from there until the syncing node had more blocks than before.
        synced: seconds from there until both nodes had the same sink, tips and number of blocks.
    """

    what: str
    blocks: int
    up: float
    resumed: float
    synced: float


@dataclass(slots=True)
class Figures:
    """Everything that was measured."""

    chain: dict[str, int]
    raws: list[tuple[float | None, float]]
    syncs: list[tuple[float | None, Sync]]
    lives: list[Live]
    failures: list[Failure]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, files: list[Path]) -> Figures:
        """The figures of several files in one."""
        figures = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        chains = [each["chain"] for each in figures]
        if any(chain != chains[0] for chain in chains):
            raise SystemExit("these files are about different chains")
        return cls(
            chain=chains[0],
            raws=[(delay, seconds) for each in figures for delay, seconds in each["raws"]],
            syncs=[(delay, Sync(**sync)) for each in figures for delay, sync in each["syncs"]],
            lives=[Live(**live) for each in figures for live in each["lives"]],
            failures=[Failure(**failure) for each in figures for failure in each["failures"]],
        )


async def measure(options: argparse.Namespace) -> Figures:
    kaspad = find_kaspad(options.kaspad)
    counted = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal counted
        if done == total or done >= counted + 200 or done < counted:
            counted = done
            say(f"  {what}: {done} of {total}")

    chain = await filled_chain(kaspad, options.full, progress=progress)
    say(f"chain: {chain.blocks} blocks, {chain.full} of them with {chain.size} bytes of transactions")
    figures = Figures({"blocks": chain.blocks, "full": chain.full, "bytes": chain.bytes}, [], [], [], [])
    ways = ways_of(options.ways)
    for number in range(1, options.rounds + 1):
        for delay in delays_of(options.delays):
            if "raw" in options.ways.split(","):
                figures.raws.append((delay, await trio.to_thread.run_sync(raw_transfer, chain.bytes, delay)))
                say(f"round {number}, {label(delay)}, raw TCP: {figures.raws[-1][1]:.2f} s")
            for way in ways:
                result = await sync(chain, kaspad, way, delay=delay)
                figures.syncs.append((delay, result))
                say(f"round {number}, {label(delay)}, {way.name}: {result.seconds:.2f} s, others {result.others:.2f}")
        if options.live:
            small = await filled_chain(kaspad, 20, progress=progress)
            for size in (FULL, 0):
                for way in ways:
                    outcome = await live_once(small, kaspad, way, size, options.live_blocks, options.live_delay)
                    figures.lives.append(outcome)
                    say(
                        f"round {number}, live {size} bytes, {way.name}: {outcome.quantile(0.5) * 1000:.1f} ms,"
                        f" others {outcome.others:.2f}"
                    )
        if options.failures:
            for victim in ("bridge source", "bridge target", "kaspad source", "kaspad target"):
                figures.failures.append(await killed(chain, kaspad, victim))
                say(f"round {number}, {figures.failures[-1]}")
            figures.failures.append(await hung(chain, kaspad))
            say(f"round {number}, {figures.failures[-1]}")
    return figures


async def live_once(chain: Chain, kaspad: Path, way: Way, size: int, count: int, delay: float | None) -> Live:
    wire = None if delay is None else Wire(delay, HOST)
    try:
        async with pair_of(chain, kaspad, way, wire) as pair, way.prepare(pair) as link:
            await timed_sync(chain, pair, way, link, delay or 0.0)
            return await live(chain, pair, way, size=size, count=count, delay=delay or 0.0)
    finally:
        if wire is not None:
            wire.close()


def third(chain: Chain) -> int:
    """Blocks at which a third of the filled ones is there."""
    return chain.blocks - chain.full + chain.full // 3


async def killed(chain: Chain, kaspad: Path, victim: str) -> Failure:
    """Kill one of the four processes with SIGKILL, and start it again at once."""
    way = Bridges()
    kind, _, side = victim.partition(" ")
    async with pair_of(chain, kaspad, way) as pair, way.prepare(pair) as link:
        await link.connect()
        await reach(pair.target, third(chain))
        before = await blocks_at(pair.target)
        begun = trio.current_time()
        if kind == "kaspad":
            node = getattr(pair, side)
            node.kill()
            await node.start()
        else:
            bridge: BridgeProcess = getattr(link, side)
            bridge.process.kill()
            await bridge.start()
            pair.others[victim] = bridge.process
            if side == "target":
                await link.connect()  # what `kas-bridge connect` asked for ends with the process
        up = trio.current_time() - begun
        await reach(pair.target, max(before, await blocks_at(pair.target)) + 1)
        resumed = trio.current_time() - begun
        await wait_synced(pair)
        synced = trio.current_time() - begun
        if await state_of(pair.source) != await state_of(pair.target):
            raise RuntimeError(f"the nodes differ after {victim} was killed")
        return Failure(f"{victim} killed", before, up, resumed, synced)


async def hung(chain: Chain, kaspad: Path) -> Failure:
    """Let the source's bridge hang with all its connections open until the other one has found out."""
    way = Bridges()
    async with pair_of(chain, kaspad, way) as pair, way.prepare(pair) as link:
        await link.connect()
        await reach(pair.target, third(chain))
        begun = trio.current_time()
        link.source.process.suspend()
        try:
            before = await blocks_at(pair.target)
            await link.target.wait_joined(0)
        finally:
            link.source.process.resume()
        up = trio.current_time() - begun
        await reach(pair.target, max(before, await blocks_at(pair.target)) + 1)
        resumed = trio.current_time() - begun
        await wait_synced(pair)
        synced = trio.current_time() - begun
        if await state_of(pair.source) != await state_of(pair.target):
            raise RuntimeError("the nodes differ after a bridge hung")
        return Failure("bridge source hung until the other left it", before, up, resumed, synced)


def show(figures: Figures) -> None:
    if figures.syncs or figures.raws:
        show_syncs(figures)
    if figures.lives:
        show_lives(figures.lives)
    if figures.failures:
        show_failures(figures.failures)


def show_syncs(figures: Figures) -> None:
    blocks, size = figures.chain["blocks"], figures.chain["bytes"]
    by_delay: dict[float | None, dict[str, list[Sync]]] = defaultdict(lambda: defaultdict(list))
    for delay, result in figures.syncs:
        by_delay[delay][result.way].append(result)
    print(f"\nSync of an empty node: {blocks} blocks, {size / 1e6:.0f} MB of transactions\n")
    print("| path | way | seconds, median (range) | x plain TCP | MB/s | CPU s: kaspads | bridges | others, cores |")
    print("|---|---|---|---|---|---|---|---|")
    delays = {delay for delay, _ in (*figures.syncs, *figures.raws)}
    for delay in sorted(delays, key=lambda each: -1.0 if each is None else each):
        if raws := [seconds for at, seconds in figures.raws if at == delay]:
            rate = size / statistics.median(raws) / 1e6
            print(f"| {label(delay)} | raw TCP | {spread(raws)} | | {rate:.0f} | | | |")
        plain = [result.seconds for result in by_delay[delay].get(PlainTcp.name, [])]
        for name, results in by_delay[delay].items():
            seconds = [result.seconds for result in results]
            middle = statistics.median(seconds)
            ratio = f"{middle / statistics.median(plain):.2f}" if plain and name != PlainTcp.name else ""
            nodes = statistics.median(
                sum(value for process, value in result.cpu.items() if process.startswith("kaspad"))
                for result in results
            )
            rest = statistics.median(sum(result.cpu.values()) for result in results) - nodes
            others = statistics.median(result.others for result in results)
            print(
                f"| {label(delay)} | {name} | {spread(seconds)} | {ratio} | {size / middle / 1e6:.0f} "
                f"| {nodes:.1f} | {rest:.1f} | {others:.2f} |"
            )


def show_lives(lives: list[Live]) -> None:
    print("\nLive blocks, 10 per second: milliseconds from added at A to added at B; CPU in % of one core\n")
    print("| block | way | median (range) | p99 (range) | blocks | CPU | others, cores |")
    print("|---|---|---|---|---|---|---|")
    by_way: dict[tuple[int, str], list[Live]] = defaultdict(list)
    for outcome in lives:
        by_way[outcome.size, outcome.way].append(outcome)
    for (size, name), outcomes in by_way.items():
        figures = [spread([outcome.quantile(share) * 1000 for outcome in outcomes]) for share in (0.5, 0.99)]
        cpu = ", ".join(
            f"{process} {statistics.median(outcome.cpu[process] for outcome in outcomes) * 100:.1f}"
            for process in outcomes[0].cpu
        )
        block = f"{size / 1000:g} kB" if size else "empty"
        count = sum(len(outcome.latencies) for outcome in outcomes)
        others = statistics.median(outcome.others for outcome in outcomes)
        print(f"| {block} | {name} | {figures[0]} | {figures[1]} | {count} | {cpu} | {others:.2f} |")


def show_failures(failures: list[Failure]) -> None:
    print("\nIn the middle of a sync through two bridges; seconds from the failure, medians\n")
    print("| what | blocks by then | up again | next block | both in sync |")
    print("|---|---|---|---|---|")
    for what in dict.fromkeys(each.what for each in failures):
        same = [each for each in failures if each.what == what]
        blocks = statistics.median(each.blocks for each in same)
        times = [spread([getattr(each, name) for each in same]) for name in ("up", "resumed", "synced")]
        print(f"| {what} | {blocks:.0f} | {' | '.join(times)} |")


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
    parser.add_argument("--failures", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--join", type=Path, nargs="+")
    options = parser.parse_args()
    figures = Figures.read(options.join) if options.join else trio.run(measure, options)
    show(figures)
    if options.json:
        figures.write(options.json)


if __name__ == "__main__":
    main()
