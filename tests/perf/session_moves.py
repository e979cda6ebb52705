"""A Kaspa connection from a relay to the direct way, back as that is cut, and again: what two kaspads notice.

    python -m tests.perf.session_moves [--cycles 10] [--delay 5] [--size 20000] [--full 300]

Two kaspads behind NATs (pr, eimx) and two relays; the sync begins on a relay and moves; then live blocks, ten a second,
while the way between the homes is cut, in silence, and healed. Every line (home, relay) has the delay each way: the
round trip is four of them directly, and eight through a relay. More than 10 ms say nothing: kaspad asks a peer for one
live block after the other, a round trip each, and falls behind. Fails if a kaspad noticed anything, or if a move to the
direct way held a block up for more than two relayed round trips at p95.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import trio

from kas_bridge.simnet import measure
from kas_bridge.simnet.mine import filled_chain
from kas_bridge.simnet.node import find_kaspad
from kas_bridge.simnet.session import Cycle, cycle, scene
from kas_bridge.simnet.watch import in_ms, quantile
from natlab import RunningLab
from natlab.topology import lab_from_text

RELAYS = ("one", "two")
PAUSE = 2
"""Round trips of the slower path that a move may hold a block up for, at p95."""


async def measured(cycles: int, delay: float, size: int, full: int) -> list[str]:
    """Run it and print; returns what was noticed."""
    kaspad = find_kaspad()
    chain = await filled_chain(kaspad, full=full)
    sites = [f"{name}={kind},delay={delay:g}ms" for name, kind in (("alice", "pr"), ("bob", "eimx"))]
    sites += [f"{name}=public,delay={delay:g}ms" for name in RELAYS]
    found: list[Cycle] = []
    with tempfile.TemporaryDirectory(prefix="kas-moves-") as name, RunningLab(lab_from_text(sites)) as lab:
        async with scene(lab, kaspad, chain, Path(name), relays=RELAYS) as at:
            await at.link.connect()
            await at.wait_path("punched")
            await measure.wait_synced(at.pair)
            at.nursery.start_soon(at.blocks.mine, size)
            print("| cycle | to the relay, s | back, s | held up, ms | relayed, ms | by the move, ms | else, ms |")
            print("|---|---|---|---|---|---|---|", flush=True)
            for number in range(1, cycles + 1):
                found.append(each := await cycle(at))
                figures = (each.held_up, each.relayed, each.moved, each.calm)
                late, usual, moved, calm = (round(value * 1000) for value in figures)
                print(
                    f"| {number} | {each.lost:.1f} | {each.back:.1f} | {late} | {usual} | {moved} | {calm} |",
                    flush=True,
                )
            noticed = await at.blocks.settle()
            noticed += await at.uneven() + at.broken()
            noticed += [f"a session ended: {each['reason']}" for each in at.ended()]
            print(f"\n{len(at.blocks.came)} blocks: {in_ms(at.blocks.delays())}")
            for side, log in zip(("source", "target"), at.logs, strict=True):
                moves = [event for _, event in log.of("session-moved")]
                again = sum(event["resent"] for event in moves)
                print(f"the {side}'s bridge: {len(moves)} moves, {again} bytes sent again")
    print(f"a cut held a block up for {in_ms(each.held_up for each in found)}")
    print(f"a move to the direct way, by {in_ms(each.moved for each in found)}; a relayed round trip: {8 * delay:g} ms")
    print(f"what blocks are late by when nothing moves: {in_ms(each.calm for each in found)}")
    paused = quantile([each.moved for each in found], 0.95) * 1000
    if paused > PAUSE * 8 * delay:
        noticed.append(f"a move held a block up for {paused:.0f} ms at p95, and {PAUSE * 8 * delay:g} are allowed")
    return noticed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--delay", type=float, default=5, help="milliseconds each way, of every line")
    parser.add_argument("--size", type=int, default=20_000, help="bytes of transactions in a live block")
    parser.add_argument("--full", type=int, default=300, help="filled blocks in the chain")
    options = parser.parse_args()
    noticed = trio.run(measured, options.cycles, options.delay, options.size, options.full)
    print("\n".join(noticed) or "no kaspad noticed anything")
    return bool(noticed)


if __name__ == "__main__":
    sys.exit(main())
