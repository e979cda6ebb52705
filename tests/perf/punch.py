"""The campaign: every pair of NAT types meets again and again, with real nodes, and a journal that is gone on with.

    python -m tests.perf.punch [--rounds 20] [--journal punch.jsonl] [--types open,fw,…] [--loss 0] [--jitter 0]
                               [--delay 25] [--at-once 4] [--fresh]

Each round is one lab in which every pair meets once. What is in the journal is not done again, so a campaign can be
interrupted; another line quality is another campaign, and needs another journal. `--fresh`: nodes that have just
started, and don't know yet what their NATs do.

Times run from the circuit, secured end to end, to a verified direct connection, in round trips of the circuit, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kas_bridge.simnet.meet import DELAY, TYPES, Meeting, matrix, meetings, possible
from natlab.punch import Group, group_of


def read(journal: Path) -> list[tuple[int, Meeting]]:
    """What has been done, by round."""
    if not journal.exists():
        return []
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        number = values.pop("round")
        found.append((number, Meeting(**values | {"nats": tuple(values["nats"])})))
    return found


def run(journal: Path, pairs: Sequence[tuple[str, str]], rounds: int, **how: Any) -> None:
    """Do what is not in the journal yet."""
    begun = time.monotonic()
    for number in range(rounds):
        done = [meeting.nats for each, meeting in read(journal) if each == number]
        missing = [pair for pair in pairs if pair not in done]
        if not missing:
            continue
        with journal.open("a", encoding="utf-8") as file:

            def note(meeting: Meeting, number: int = number, file: Any = file) -> None:
                file.write(json.dumps({"round": number, **asdict(meeting)}) + "\n")
                file.flush()

            found = meetings(missing, seed=number, progress=note, **how)
        odd = [each for each in found if each.direct is not possible(*each.nats)]
        print(
            f"round {number + 1} of {rounds}: {sum(each.direct for each in found)} of {len(found)} direct,"
            f" {len(odd)} unexpected, {time.monotonic() - begun:.0f} s so far",
            file=sys.stderr,
        )
        for each in odd:
            print(f"  {' x '.join(each.nats)}: {each.path or 'not met'}: {each.reason}", file=sys.stderr)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def report(found: Iterable[Meeting], types: Sequence[str], circuit_rtt: float) -> None:
    """Tables by group of NATs.

    Args:
        circuit_rtt: seconds; each end has its delay to the relay and back.
    """
    every = list(found)
    print("\n".join(matrix(every, types)))
    print("\n| pair | meetings | direct | at the first attempt | s, p50 | p95 | circuit round trips, p50 | p95 |")
    print("|---|---|---|---|---|---|---|---|")
    for a, b in itertools.combinations_with_replacement(Group, 2):
        of = [each for each in every if sorted(map(group_of, each.nats)) == [a, b]]
        if not of:
            continue
        direct = [each for each in of if each.direct]
        first = [each for each in direct if each.attempts <= 1]
        times = [each.seconds for each in direct if each.seconds is not None]
        figures = "- | - | - | -"
        if times:
            p50, p95 = statistics.median(times), quantile(times, 0.95)
            figures = f"{p50:.3f} | {p95:.3f} | {p50 / circuit_rtt:.2f} | {p95 / circuit_rtt:.2f}"
        print(f"| {a.name} x {b.name} | {len(of)} | {len(direct)} | {len(first)} | {figures} |")
    hopeless = [each for each in every if not possible(*each.nats)]
    told = [each.given_up for each in hopeless if each.given_up is not None and not each.direct]
    if told:
        soon = sum(each < 1 for each in told)
        print(
            f"\nPairs that can't: {len(hopeless)} meetings, {len(told)} told so, after {statistics.median(told):.2f} s"
            f" (p50), {soon} of them within 1 s."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--journal", type=Path, default=Path("punch.jsonl"))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--pairs", nargs="*", default=[], help="only these, as pr,eimx")
    parser.add_argument("--loss", type=float, default=0, help="per cent, on each home's line")
    parser.add_argument("--jitter", type=float, default=0, help="milliseconds, on each home's line")
    parser.add_argument("--delay", type=float, help="milliseconds one way, of each home's line; at least the jitter")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    types = options.types.split(",")
    pairs = [(a, b) for a, _, b in (each.partition(",") for each in options.pairs)] or [
        *itertools.product(types, types)
    ]
    delay = max(DELAY, options.jitter / 1000) if options.delay is None else options.delay / 1000
    line = (f",loss={options.loss:g}%" if options.loss else "") + (
        f",jitter={options.jitter:g}ms" if options.jitter else ""
    )
    how = {"delay": delay, "at_once": options.at_once, "settled": not options.fresh}
    run(options.journal, pairs, options.rounds, options=line, **how)
    report([meeting for _, meeting in read(options.journal)], types, 4 * delay)


if __name__ == "__main__":
    main()
