"""What a relay costs a sync: two kaspads through a relay, behind NATs, beside the same two bridges without either.

    python -m tests.perf.relayed [--full 1500] [--delay 10] [--rounds 3] [--ways direct default open]

All paths have the same delay, as the relay's own line has none: half of it lies on either side of the relay. With its
default limits a relay carries 16 MiB/s each way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import trio

from kas_bridge.simnet.bridges import Bridges
from kas_bridge.simnet.lab import inside, pair_at, relay_at
from kas_bridge.simnet.measure import Sync, timed_sync
from kas_bridge.simnet.mine import Chain, filled_chain
from kas_bridge.simnet.node import find_kaspad
from natlab import RunningLab
from natlab.topology import lab_from_text

DIRECT = "direct"


async def sync(chain: Chain, kaspad: Path, delay: float, limits: str) -> Sync:
    """One sync of an empty node, in a lab of its own; through a relay with these limits, unless they are "direct"."""
    relayed = limits != DIRECT
    kinds = ("sym", "pr-rst") if relayed else ("public", "public")
    sites = [f"{name}={kind},delay={delay * 500:g}ms" for name, kind in zip(("alice", "bob"), kinds, strict=True)]
    with (
        tempfile.TemporaryDirectory(prefix="kas-relayed-") as name,
        RunningLab(lab_from_text([*sites, "relay=public"])) as lab,
    ):
        folder = Path(name)
        async with (
            inside(lab, lab["alice"], lab["bob"], lab["relay"]) as (alice, bob, at),
            relay_at(folder / "relay", at, f"--relay-limits={limits if relayed else 'default'}") as (relay, address),
            pair_at(chain, kaspad, folder, alice, bob) as pair,
            (way := Bridges("relayed", relays=(address,)) if relayed else Bridges("direct")).prepare(pair) as link,
        ):
            pair.others["relay"] = relay.process
            result = await timed_sync(chain, pair, way, link, delay)
            (row,) = (await link.target.ask("peers"))["peers"]
            if row["path"] != way.name:
                raise RuntimeError(f"it went {row['path']}, not {way.name}")
            return result


async def measure(full: int, delay: float, rounds: int, ways: list[str]) -> dict[str, list[Sync]]:
    kaspad = find_kaspad()
    chain = await filled_chain(kaspad, full=full)
    found: dict[str, list[Sync]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(await sync(chain, kaspad, delay, name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=int, default=1500, help="filled blocks in the chain")
    parser.add_argument("--delay", type=float, default=10, help="milliseconds each way, end to end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", default=[DIRECT, "default", "open"], help="direct, and limits of the relay"
    )
    options = parser.parse_args()
    found = trio.run(measure, options.full, options.delay / 1000, options.rounds, options.ways)
    first = statistics.median(each.seconds for each in found[options.ways[0]])
    print(
        "\n| way | blocks | MB | seconds, median (all) | x first | CPU s: kaspads | bridges | relay | others, cores |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, results in found.items():
        middle = sorted(results, key=lambda each: each.seconds)[len(results) // 2]
        nodes, bridges = (
            sum(seconds for process, seconds in middle.cpu.items() if process.startswith(kind))
            for kind in ("kaspad", "bridge")
        )
        title = name if name == DIRECT else f"relay, {name} limits"
        print(
            f"| {title} | {middle.blocks} | {middle.bytes / 1e6:.0f} | {middle.seconds:.2f}"
            f" ({', '.join(f'{each.seconds:.2f}' for each in results)}) | {middle.seconds / first:.2f}"
            f" | {nodes:.1f} | {bridges:.1f} | {middle.cpu['relay']:.2f} | {middle.others:.2f} |"
        )


if __name__ == "__main__":
    main()
