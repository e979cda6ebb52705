"""What a session costs: Kaspa streams between two nodes of ours with it and without it, in one run.

usage: python -m tests.perf.session [--quick] [--rounds N] [--seconds N] [--figures NAME,...] [--json FILE]

Each end is a process of its own (`tests.perf.session_peers`) on this host's loopback. As in `tests.perf.compare`,
rounds go by turns, a figure is the median of its rounds, and only what was measured in one run says anything.

Figures: bulk64, bulk4 (a stream of 64 KiB or 4 KiB writes until it is read; what the reader sends back meanwhile), echo
(32 bytes), idle (CPU of a stream that does nothing, as long as signs of life are wanted, and after that; takes two
minutes and more), memory (1000 streams that do nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kas_libp2p.session._machine import OWED_FOR
from kas_libp2p.session._wire import encode_ack
from tests.perf.compare import MARKS, Json, Pair, Process, Results, Setting, listed, say, spread

SUBJECTS = {"plain": "plain streams", "session": "sessions"}
FIGURES = ("bulk64", "bulk4", "echo", "idle", "memory")
WRITE = {"bulk64": 65536, "bulk4": 4096}
WARM_UP = 4_000_000
"""Bytes that tell how many to send in a measurement."""
ACK = len(encode_ack(0, 0, False))
"""Bytes of an acknowledgement."""
ECHOES = 1000
IDLE = 10.0
"""Seconds for which an idle stream is watched."""
COUNT = 1000
"""Streams whose memory is counted."""
SETTLE = 3.0
"""Seconds until all that was said at their start is acknowledged and forgotten."""
QUICK = {"rounds": 2, "seconds": 0.3}

PEERS = [sys.executable, "-m", "tests.perf.session_peers"]
Add = Callable[[str, float], None]


def start(subject: str, setting: Setting, *flags: str) -> Pair:
    """Both ends, connected and identified."""
    listener = Process([*PEERS, subject, "listen", *flags], setting.listener)
    address = listener.event("listening")["address"]
    dialer = Process([*PEERS, subject, "dial", *flags], setting.dialer)
    dialer.order("connect", addr=address)
    return Pair(dialer, listener, address)


# The measurements


def bulk(subject: str, pair: Pair, name: str, seconds: float, add: Add) -> None:
    size = WRITE[name]

    def upload(total: int) -> Json:
        return pair.dialer.order("perf", upload=max(1, total // size) * size, write=size)

    if name not in pair.rates:
        pair.rates[name] = WARM_UP / upload(WARM_UP)["upload_seconds"]
    total = max(WARM_UP, int(pair.rates[name] * seconds))
    before = pair.cpu()
    found = upload(total)
    after = pair.cpu()
    pair.rates[name] = rate = total / found["upload_seconds"]
    add(f"{name}, MB/s", rate / 1e6)
    for side, begun, ended in zip(("writer", "reader"), before, after, strict=True):
        add(f"{name}, {side}, CPU s/GB", (ended - begun) / total * 1e9)
    add(f"{name}, sent back per MB, bytes", found["back"] / total * 1e6)
    if subject == "session":
        add(f"{name}, acknowledgements per second", found["back"] / ACK / found["upload_seconds"])


def echo(pair: Pair, add: Add) -> None:
    before = pair.cpu()
    times = pair.dialer.order("echo", size=32, count=ECHOES)
    after = pair.cpu()
    add("echo p50, us", times["p50"])
    add("echo p95, us", times["p95"])
    add("echo, CPU us, both sides", (sum(after) - sum(before)) / ECHOES * 1e6)


def idle(running: dict[str, Pair], add: Callable[[str, str, float], None]) -> None:
    for pair in running.values():
        pair.dialer.order("hold")
    for when, wait in (("at first", 2.0), ("later", OWED_FOR)):
        time.sleep(wait)
        before = {subject: pair.cpu() for subject, pair in running.items()}
        time.sleep(IDLE)
        for subject, pair in running.items():
            share = (sum(pair.cpu()) - sum(before[subject])) / IDLE
            add(subject, f"idle {when}, % of a core, both sides", 100 * share)
    for pair in running.values():
        pair.dialer.order("release")


def memory(subject: str, setting: Setting, add: Add) -> None:
    """What each of many streams that do nothing takes, on one connection."""
    for traced in (False, True):
        pair = start(subject, setting, "--many", *(["--traced"] if traced else []))
        try:

            def taken(pair: Pair = pair, traced: bool = traced) -> tuple[float, float]:
                time.sleep(SETTLE)
                one, other = pair.dialer, pair.listener
                if traced:
                    return one.order("traced")["bytes"], other.order("traced")["bytes"]
                return one.resident() * 1024, other.resident() * 1024

            pair.dialer.order("open", count=COUNT // 10)  # what is allocated once
            before = taken()
            pair.dialer.order("open", count=COUNT)
            for side, begun, ended in zip(("opener", "acceptor"), before, taken(), strict=True):
                what = "traced" if traced else "RSS"
                add(f"idle stream, {side}, bytes, {what}", (ended - begun) / COUNT)
        finally:
            pair.close()


# Goals


def judge(results: Results) -> list[tuple[str, float | None, bool | None]]:
    """What is wanted, what was reached, and whether that is enough; nothing where it was not measured."""

    def both(figure: str) -> tuple[float, float] | None:
        plain, session = (results.median(figure, each) for each in ("plain", "session"))
        return None if plain is None or session is None else (plain, session)

    found: list[tuple[str, float | None, bool | None]] = []
    for name in WRITE:
        rates = both(f"{name}, MB/s")
        ratio = rates[1] / rates[0] if rates else None
        found.append((f"{name}: at least 0.9 x without", ratio, None if ratio is None else ratio >= 0.9))
    times = both("echo p50, us")
    more = times[1] - times[0] if times else None
    found.append(("echo p50: at most 30 us more", more, None if more is None else more <= 30))
    for side in ("opener", "acceptor"):
        sizes = both(f"idle stream, {side}, bytes, traced")
        size = sizes[1] - sizes[0] if sizes else None
        found.append((f"idle session, {side}: at most 4096 bytes more", size, None if size is None else size <= 4096))
    return found


# The run


def measure(options: argparse.Namespace, setting: Setting) -> Results:
    results = Results()
    with ExitStack() as stack:
        running = {}
        for subject in SUBJECTS if set(options.figures) - {"memory"} else ():
            running[subject] = start(subject, setting)
            stack.callback(running[subject].close)
        for number in range(options.rounds + 1 if running else 0):
            say(f"round {number} of {options.rounds}" if number else "warming up")
            kept = results if number else Results()
            for figure in options.figures:
                for subject, pair in running.items():
                    if figure in WRITE:
                        bulk(subject, pair, figure, options.seconds, partial(kept.add, subject))
                    elif figure == "echo":
                        echo(pair, partial(kept.add, subject))
        if "idle" in options.figures:
            say("idle")
            idle(running, results.add)
    if "memory" in options.figures:
        for subject in SUBJECTS:
            say(f"memory of {COUNT} {SUBJECTS[subject]}")
            memory(subject, setting, partial(results.add, subject))
    return results


def show(results: Results) -> None:
    """Tables for people, in Markdown."""
    print("\n| median (least to most) | " + " | ".join(SUBJECTS.values()) + " | ratio |")
    print("|---" * (len(SUBJECTS) + 2) + "|")
    for figure, by_subject in results.values.items():
        cells = [spread(by_subject.get(each, [])) for each in SUBJECTS]
        values = [statistics.median(by_subject[each]) for each in SUBJECTS if each in by_subject]
        ratio = f"{values[1] / values[0]:.2f}" if len(values) == 2 and values[0] else ""
        print(f"| {figure} | " + " | ".join(cells) + f" | {ratio} |")
    print("\n| goal | reached | |\n|---|---|---|")
    for goal, value, reached in judge(results):
        print(f"| {goal} | {'-' if value is None else f'{value:.2f}'} | {MARKS[reached]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look: two short rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a bulk measurement takes")
    parser.add_argument("--figures", type=listed(FIGURES), default=list(FIGURES))
    parser.add_argument("--json", type=Path, help="where every value goes, and the goals")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results = measure(options, Setting.halves(None))
    show(results)
    print(f"\nload of the machine when it began: {load:.1f}")
    if options.json:
        goals = [{"goal": goal, "value": value, "reached": reached} for goal, value, reached in judge(results)]
        options.json.write_text(json.dumps({"values": results.values, "goals": goals}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
