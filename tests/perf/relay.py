"""Circuits beside rust-libp2p's, and what a relay of ours costs, in one run.

usage: python -m tests.perf.relay [--quick] [--rounds N] [--seconds N] [--figures NAME,...] [--subjects NAME,...]
                                  [--json FILE]

Subjects: ours (our peers through our relay), rust (rust's through rust's), mixed (rust's through ours), stock (those of
py-libp2p through ours, as its own relay doesn't do). Relay, caller and called are processes of their own
(`tests.perf.relay_peers`, `tests.perf.stock_relayed`; ``tests/interop/rust``). As in `tests.perf.compare`, rounds go by
turns, a figure is the median of its rounds, and only ratios within one run say anything.

Figures: one (a stream of 64 KiB writes through a circuit until it is read, and the CPU of all three), echo (32 bytes),
fair (16 circuits to 16 peers at once: how long the fastest took for the same number of bytes, as part of the slowest),
blocks (200 circuits on which 10 empty blocks per second are echoed), crowd (1000 peers of a relay of ours: a place
costs how much CPU and memory, and what do they cost while nothing happens).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.perf.compare import MARKS, Goal, Process, Results, find_rust, listed, say, spread

SUBJECTS = {
    "ours": "kas-libp2p",
    "rust": "rust-libp2p 0.57",
    "mixed": "rust's peers, our relay",
    "stock": "py-libp2p 0.8.1's peers, our relay",
}
FIGURES = ("one", "echo", "fair", "blocks", "crowd")
WRITE = 65536
WARM_UP = 4_000_000
"""Bytes that tell how many to send in a measurement."""
ECHOES = 500
CIRCUITS = 16
"""At once, in ``fair``."""
BLOCK_CIRCUITS, BLOCK_RATE = 200, 10
CROWD = 1000
IDLE = 35.0
"""Seconds for which the crowd is watched: longer than the keepalive of Yamux, which is what it costs."""
QUICK = {"rounds": 2, "seconds": 0.3}

OUR = [sys.executable, "-m", "tests.perf.relay_peers"]
STOCK = [sys.executable, "-m", "tests.perf.stock_relayed"]
Add = Callable[[str, float], None]


@dataclass
class Trio:
    """A relay, a caller, and those that it calls through the relay.

    Attributes:
        called: their peer ids.
        listeners: the processes that they are in.
    """

    relay: Process
    address: str
    dialer: Process
    listeners: list[Process]
    called: list[str]
    rate: float = 0.0

    @classmethod
    def start(cls, stack: ExitStack, subject: str, rust: Path | None, count: int = 1) -> Trio:
        """All of them; every peer has a place on the relay, and a circuit from the caller."""

        def process(command: list[str]) -> Process:
            started = Process(command)
            stack.callback(started.close)
            return started

        theirs = [str(rust)]
        options = ["--quiet", "--idle", "3600"]
        relay = process([*theirs, "listen", "--relay-open", *options] if subject == "rust" else [*OUR, "relay"])
        address = relay.event("listening")["address"]
        if subject == "ours":
            listeners = [process([*OUR, "listen", address, "--count", str(count)])]
            called = listeners[0].event("reserved")["peers"]
            dialer = process([*OUR, "dial"])
            dialer.event("started")
        elif subject == "stock":
            listeners = [process([*STOCK, "listen", address])]
            called = listeners[0].event("reserved")["peers"]
            dialer = process([*STOCK, "dial", address])
            dialer.event("started")
        else:
            listeners, called = [], []
            for _ in range(count):
                listener = process([*theirs, "dial", address, "--idle", "3600"])
                called.append(listener.event("started")["peer"])
                listener.answer(0)
                listener.order("listen", addr=f"{address}/p2p-circuit")
                listener.event("reserved")
                listeners.append(listener)
            dialer = process([*theirs, "dial", address, *options])
            dialer.answer(0)
        for peer in called:
            dialer.order("connect", addr=f"{address}/p2p-circuit/p2p/{peer}")
        return cls(relay, address, dialer, listeners, called)

    def upload(self, total: int) -> float:
        """Bytes per second of one circuit."""
        total = max(1, total // WRITE) * WRITE
        took: float = self.dialer.order("perf", peer=self.called[0], upload=total, write=WRITE)["upload_seconds"]
        return total / took

    def cpu(self) -> tuple[float, float, float]:
        return self.dialer.cpu(), sum(each.cpu() for each in self.listeners), self.relay.cpu()


# The measurements


def one(trio: Trio, seconds: float, add: Add) -> None:
    if not trio.rate:
        trio.rate = trio.upload(WARM_UP)
    total = max(WARM_UP, int(trio.rate * seconds))
    before = trio.cpu()
    trio.rate = trio.upload(total)
    after = trio.cpu()
    add("one circuit, MB/s", trio.rate / 1e6)
    for who, begun, ended in zip(("dialer", "listener", "relay"), before, after, strict=True):
        add(f"one circuit, {who}, CPU s/GB", (ended - begun) / total * 1e9)


def echo(trio: Trio, add: Add) -> None:
    times = trio.dialer.order("echo", peer=trio.called[0], size=32, count=ECHOES)
    add("echo p50, us", times["p50"])
    add("echo p95, us", times["p95"])


def fair(trio: Trio, seconds: float, add: Add) -> None:
    each = max(1, int(trio.rate * seconds / CIRCUITS) // WRITE) * WRITE
    orders = [trio.dialer.begin("perf", peer=peer, upload=each, write=WRITE) for peer in trio.called]
    took = [trio.dialer.answer(order)["upload_seconds"] for order in orders]
    add("16 circuits, slowest / fastest", min(took) / max(took))
    add("16 circuits, MB/s", CIRCUITS * each / max(took) / 1e6)


def blocks(add: Add) -> None:
    with ExitStack() as stack:
        trio = Trio.start(stack, "ours", None)
        for _ in range(BLOCK_CIRCUITS - 1):
            trio.dialer.order("connect", addr=f"{trio.address}/p2p-circuit/p2p/{trio.called[0]}")
        begun, before = time.perf_counter(), trio.cpu()
        answer = trio.dialer.order("blocks", rate=BLOCK_RATE, seconds=5)
        took = time.perf_counter() - begun
        assert answer["circuits"] == BLOCK_CIRCUITS
        add("200 circuits, blocks per second", answer["per_second"])
        add("200 circuits, block there and back p50, ms", answer["p50"] / 1e3)
        add("200 circuits, block there and back p95, ms", answer["p95"] / 1e3)
        for who, begun_cpu, ended_cpu in zip(("dialer", "listener", "relay"), before, trio.cpu(), strict=True):
            add(f"200 circuits, {who}, % of a core", 100 * (ended_cpu - begun_cpu) / took)


def crowd(add: Add) -> None:
    with ExitStack() as stack:

        def process(*command: str) -> Process:
            started = Process([*OUR, *command])
            stack.callback(started.close)
            return started

        relay = process("relay")
        address = relay.event("listening")["address"]
        first, rest = process("crowd", address), process("crowd", address)
        for each in (first, rest):
            each.event("started")
        first.order("join", count=100)  # what is allocated once
        first.order("reserve")
        time.sleep(1)
        empty = relay.resident()
        rest.order("join", count=CROWD)
        time.sleep(2)
        connected, cpu = relay.resident(), relay.cpu()
        rest.order("reserve")
        add("place, CPU ms", (relay.cpu() - cpu) * 1e3 / CROWD)
        add("connection without a place, KiB", (connected - empty) / CROWD)
        time.sleep(1)
        add("place on top, KiB", (relay.resident() - connected) / CROWD)
        cpu = relay.cpu()
        time.sleep(IDLE)
        add("1000 places held, % of a core", 100 * (relay.cpu() - cpu) / IDLE)


GOALS = (
    Goal("one circuit, MB/s", "rust", 1.0, least=True),
    Goal("one circuit, MB/s", "stock", 8, least=True),
    Goal("one circuit, relay, CPU s/GB", "", 2.55),
    Goal("one circuit, relay, CPU s/GB", "rust", 1.0),
    Goal("echo p50, us", "rust", 3.0),
    Goal("16 circuits, slowest / fastest", "", 0.8, least=True),
    Goal("200 circuits, blocks per second", "", 0.95 * BLOCK_CIRCUITS * BLOCK_RATE, least=True),
    Goal("place, CPU ms", "", 1.0),
    Goal("connection without a place, KiB", "", 30),
    Goal("place on top, KiB", "", 4),
    Goal("1000 places held, % of a core", "", 3),
)


# The run


def measure(options: argparse.Namespace, rust: Path | None) -> Results:
    results = Results()
    with ExitStack() as stack:
        count = CIRCUITS if "fair" in options.figures else 1
        steady = {"one", "echo", "fair"} & set(options.figures)
        running = {}
        for each in options.subjects if steady else ():
            running[each] = Trio.start(stack, each, rust, 1 if each == "stock" else count)
        for number in range(options.rounds + 1 if steady else 0):
            say(f"round {number} of {options.rounds}" if number else "warming up")
            kept = results if number else Results()
            for subject, trio in running.items():
                add = partial(kept.add, subject)
                if "one" in options.figures or not trio.rate:
                    one(trio, options.seconds, add)
                if "echo" in options.figures:
                    echo(trio, add)
                if "fair" in options.figures and subject != "stock":
                    fair(trio, options.seconds, add)
    if "ours" in options.subjects:
        for figure, run in (("blocks", blocks), ("crowd", crowd)):
            if figure in options.figures:
                say(figure)
                run(partial(results.add, "ours"))
    return results


def show(results: Results, subjects: list[str]) -> None:
    """Tables for people, in Markdown."""
    print("\n| median (least to most) | " + " | ".join(SUBJECTS[each] for each in subjects) + " |")
    print("|---" * (len(subjects) + 1) + "|")
    for figure, by_subject in results.values.items():
        print(f"| {figure} | " + " | ".join(spread(by_subject.get(each, [])) for each in subjects) + " |")
    print("\n| goal | reached | |\n|---|---|---|")
    for goal in GOALS:
        value, reached = goal.judge(results)
        print(f"| {goal} | {'-' if value is None else f'{value:.2f}'} | {MARKS[reached]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look: two short rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a bulk measurement takes")
    parser.add_argument("--figures", type=listed(FIGURES), default=list(FIGURES))
    parser.add_argument("--subjects", type=listed(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--json", type=Path, help="where every value goes, and the goals")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    rust = None
    if {"rust", "mixed"} & set(options.subjects):
        rust, why = find_rust()
        if rust is None:
            say(f"SKIPPED rust-libp2p: {why}")
            options.subjects = [each for each in options.subjects if each not in ("rust", "mixed")]
    load = os.getloadavg()[0]
    results = measure(options, rust)
    show(results, options.subjects)
    print(f"\nload of the machine when it began: {load:.1f}")
    if options.json:
        judged = [(str(goal), *goal.judge(results)) for goal in GOALS]
        goals = [{"goal": goal, "value": value, "reached": reached} for goal, value, reached in judged]
        options.json.write_text(json.dumps({"values": results.values, "goals": goals}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
