"""The data path beside others: raw trio TCP, framing alone, ours, stock py-libp2p and rust-libp2p, in one run.

usage: python -m tests.perf.compare [--quick] [--rounds N] [--seconds N] [--connections N] [--json FILE]
                                    [--subjects NAME,...] [--figures NAME,...] [--loose]

Each end is a process of its own (`tests.perf.peers`; ``tests/interop/rust`` where Rust is at hand). Rounds go by turns
through all subjects, after one that is thrown away; a figure is the median of its rounds, with the least and the most.
Only ratios within one run say anything, and they are what the goals are about.

Each end has half of the CPUs for itself, as two hosts would. Left to itself (``--loose``), the system likes to run both
ends of an echo on one CPU, by turns, where a message wakes nobody up.

Figures: bulk64, bulk4 (a stream of 64 KiB or 4 KiB writes until it is read), echo (32 bytes), dial (to the first echo
on a stream of the new connection; the CPU is that of all until it is closed again, identify included), mixed (echo
beside a bulk stream on the same connection), memory (resident, per idle connection that has identified itself).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]

SUBJECTS = {
    "raw": "raw trio TCP",
    "bound": "framing alone",
    "ours": "kas-libp2p",
    "stock": "py-libp2p 0.8.1",
    "rust": "rust-libp2p 0.57",
    "rust1": "the same, 1 thread",
}
FIGURES = ("bulk64", "bulk4", "echo", "dial", "mixed", "memory")
PLAIN = {"raw", "bound"}
"""Subjects without connections to dial, and with no streams beside each other on one."""
RUST: dict[str, list[str]] = {"rust": [], "rust1": ["--threads", "1"]}
WRITE = {"bulk64": 65536, "bulk4": 4096}
WARM_UP = 4_000_000
"""Bytes that tell how many to send in a measurement."""
QUICK = {"rounds": 2, "seconds": 0.2, "connections": 100}
ECHOES, DIALS, BESIDE = 500, 20, 100
WARM_CONNECTIONS = 50
"""Connections before memory is counted: what is allocated once."""
SETTLE = 1.0
"""Seconds for identify and its like to be over."""


class PeerError(Exception):
    """A peer could not carry out an order; the text is what it says."""


class Process:
    """One end.

    Args:
        cpus: where it may run; anywhere if empty.
    """

    def __init__(self, command: list[str], cpus: Collection[int] = ()) -> None:
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus or everywhere)  # inherited
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT
            )
        finally:
            os.sched_setaffinity(0, everywhere)
        self._orders = 0
        self._answers: dict[int, Json] = {}

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def event(self, name: str) -> Json:
        """Wait for an event."""
        while (event := self._read())["event"] != name:
            pass
        return event

    def _read(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{' '.join(self._process.args)} ended")  # type: ignore[arg-type]
        event: Json = json.loads(line)
        return event

    def begin(self, do: str, **fields: Any) -> int:
        """Give an order."""
        assert self._process.stdin is not None
        self._orders += 1
        self._process.stdin.write(json.dumps({"id": self._orders, "do": do, **fields}) + "\n")
        return self._orders

    def answer(self, order: int) -> Json:
        """Wait until an order is carried out."""
        while order not in self._answers:
            event = self._read()
            if event["event"] in ("done", "failed"):
                self._answers[event["id"]] = event
        answer = self._answers.pop(order)
        if answer["event"] == "failed":
            raise PeerError(answer["error"])
        return answer

    def order(self, do: str, **fields: Any) -> Json:
        """Give an order and wait until it is carried out."""
        return self.answer(self.begin(do, **fields))

    def answered(self, order: int) -> bool:
        """Whether the answer came before one that was waited for."""
        return order in self._answers

    def cpu(self) -> float:
        """Seconds of CPU of all its threads."""
        # The kernel's clock of a process has this number (linux/posix-timers.h); Python names it for threads only.
        return time.clock_gettime(~self._process.pid << 3 | 2)

    def resident(self) -> float:
        """KiB of memory."""
        text = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text(encoding="ascii")
        return float(text.partition("\nRss:")[2].split()[0])


@dataclass(frozen=True)
class Setting:
    """Where the ends run, and the rust peer's program if there is one."""

    rust: Path | None
    dialer: Collection[int] = ()
    listener: Collection[int] = ()

    @classmethod
    def halves(cls, rust: Path | None) -> Setting:
        cpus = sorted(os.sched_getaffinity(0))
        half = len(cpus) // 2
        return cls(rust, cpus[:half], cpus[half:] if half else ())


@dataclass
class Pair:
    """A subject's two ends: the dialer, which writes, and the listener."""

    dialer: Process
    listener: Process
    address: str
    rates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, subject: str, setting: Setting, *, many: bool = False) -> Pair:
        """Both ends, connected."""
        if subject in RUST:
            rust, options = str(setting.rust), ["--quiet", "--idle", "3600", *RUST[subject]]
            listener = Process([rust, "listen", *options], setting.listener)
            address = listener.event("listening")["address"]
            dialer = Process([rust, "dial", address, *options], setting.dialer)
            dialer.answer(0)
        else:
            command = [sys.executable, "-m", "tests.perf.peers", subject, *(["--many"] if many else [])]
            listener = Process([*command, "listen"], setting.listener)
            address = listener.event("listening")["address"]
            dialer = Process([*command, "dial"], setting.dialer)
            dialer.order("connect", addr=address)
        return cls(dialer, listener, address)

    def close(self) -> None:
        self.dialer.close()
        self.listener.close()

    def connect(self) -> None:
        self.dialer.order("connect", addr=self.address)

    def cpu(self) -> tuple[float, float]:
        return self.dialer.cpu(), self.listener.cpu()


class Results:
    """Values by figure and subject."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, subject: str, figure: str, value: float) -> None:
        self.values.setdefault(figure, {}).setdefault(subject, []).append(value)

    def median(self, figure: str, subject: str) -> float | None:
        values = self.values.get(figure, {}).get(subject)
        return statistics.median(values) if values else None


Add = Callable[[str, float], None]


# The measurements


def bulk(pair: Pair, name: str, seconds: float, add: Add) -> None:
    size = WRITE[name]

    def upload(total: int) -> float:
        total = max(1, total // size) * size
        took: float = pair.dialer.order("perf", upload=total, write=size)["upload_seconds"]
        return total / took

    if name not in pair.rates:
        pair.rates[name] = upload(WARM_UP)
    total = int(pair.rates[name] * seconds)
    before = pair.cpu()
    pair.rates[name] = rate = upload(total)
    after = pair.cpu()
    add(f"{name}, MB/s", rate / 1e6)
    for side, begun, ended in zip(("writer", "reader"), before, after, strict=True):
        add(f"{name}, {side}, CPU s/GB", (ended - begun) / total * 1e9)


def echo(pair: Pair, add: Add) -> None:
    times = pair.dialer.order("echo", size=32, count=ECHOES)
    add("echo p50, us", times["p50"])
    add("echo p95, us", times["p95"])


def mixed(pair: Pair, seconds: float, add: Add) -> None:
    alone = pair.dialer.order("echo", size=32, count=BESIDE)
    total = int(pair.rates.get("bulk64", 100e6) * 2 * seconds) // 65536 * 65536
    while True:
        fill = pair.dialer.begin("perf", upload=total, write=65536)
        beside = pair.dialer.order("echo", size=32, count=BESIDE)
        short = pair.dialer.answered(fill)
        pair.dialer.answer(fill)
        if not short:
            break
        total *= 2  # the bulk stream ended before the echo did
    add("echo p95 beside bulk minus alone, ms", (beside["p95"] - alone["p95"]) / 1e3)


def dial(pair: Pair, add: Add) -> None:
    pair.dialer.order("disconnect")
    before = pair.cpu()
    times = pair.dialer.order("redial", addr=pair.address, count=DIALS)
    after = pair.cpu()
    add("dial to first echo, ms", times["p50"] / 1e3)
    for side, begun, ended in zip(("dialer", "listener"), before, after, strict=True):
        add(f"dial, {side}, CPU ms", (ended - begun) * 1e3 / DIALS)
    pair.connect()


def memory(subject: str, setting: Setting, count: int, add: Add) -> None:
    with ExitStack() as stack:
        pair = Pair.start(subject, setting, many=True)
        stack.callback(pair.close)

        def grow(count: int) -> tuple[float, float]:
            for _ in range(count):
                pair.connect()
            time.sleep(SETTLE)
            return pair.dialer.resident(), pair.listener.resident()

        before = grow(WARM_CONNECTIONS)
        after = grow(count)
        for side, begun, ended in zip(("dialer", "listener"), before, after, strict=True):
            add(f"idle connection, {side}, KiB", (ended - begun) / count)


# Goals


@dataclass(frozen=True)
class Goal:
    """A ratio to another subject, or a bound in the figure's own unit (``other`` is empty)."""

    figure: str
    other: str
    limit: float
    least: bool = False

    def __str__(self) -> str:
        want = f"{self.figure}: {'at least' if self.least else 'at most'} {self.limit:g}"
        return f"{want} x {SUBJECTS[self.other]}" if self.other else want

    def judge(self, results: Results) -> tuple[float | None, bool | None]:
        """What was reached and whether that is enough; nothing if it was not measured."""
        value = results.median(self.figure, "ours")
        if value is not None and self.other:
            theirs = results.median(self.figure, self.other)
            value = value / theirs if theirs else None
        if value is None:
            return None, None
        return value, value >= self.limit if self.least else value <= self.limit


GOALS = (
    Goal("bulk64, MB/s", "rust", 1.2, least=True),
    Goal("bulk64, MB/s", "stock", 4, least=True),
    Goal("bulk4, MB/s", "rust", 2, least=True),
    Goal("bulk4, MB/s", "stock", 15, least=True),
    Goal("echo p50, us", "stock", 0.4),
    Goal("echo p50, us", "rust", 2.5),
    Goal("dial to first echo, ms", "stock", 0.3),
    Goal("dial, dialer, CPU ms", "", 3),
    Goal("dial, listener, CPU ms", "", 3),
    Goal("idle connection, dialer, KiB", "", 25),
    Goal("idle connection, listener, KiB", "", 25),
    Goal("echo p95 beside bulk minus alone, ms", "", 5),
)


MARKS = {True: "✓", False: "✗", None: "not measured"}


# The run


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_rust() -> tuple[Path | None, str]:
    """The rust peer, built if need be, or why there is none."""
    done = subprocess.run([ROOT / "scripts" / "build-interop-rust"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return None, "scripts/build-interop-rust could not build it, see above"
    return Path(done.stdout.strip()), ""


def measure(options: argparse.Namespace, setting: Setting) -> Results:
    results = Results()
    with ExitStack() as stack:
        running = {}
        for subject in options.subjects:
            running[subject] = Pair.start(subject, setting)
            stack.callback(running[subject].close)
        for number in range(options.rounds + 1):
            say(f"round {number} of {options.rounds}" if number else "warming up")
            kept = results if number else Results()
            for figure in options.figures:
                for subject, pair in running.items():
                    one(figure, subject, pair, options.seconds, partial(kept.add, subject))
    if "memory" in options.figures:
        for subject in options.subjects:
            if subject not in PLAIN:
                say(f"memory of {options.connections} connections: {SUBJECTS[subject]}")
                memory(subject, setting, options.connections, partial(results.add, subject))
    return results


def one(figure: str, subject: str, pair: Pair, seconds: float, add: Add) -> None:
    """One measurement, where the subject has such a thing."""
    match figure:
        case "bulk64" | "bulk4":
            bulk(pair, figure, seconds, add)
        case "echo" if subject != "bound":  # it is made for bulk
            echo(pair, add)
        case "dial" if subject not in PLAIN:
            dial(pair, add)
        case "mixed" if subject not in PLAIN:
            mixed(pair, seconds, add)


def show(results: Results, subjects: list[str]) -> None:
    """Tables for people, in Markdown."""
    print("\n| median (least to most) | " + " | ".join(SUBJECTS[each] for each in subjects) + " |")
    print("|---" * (len(subjects) + 1) + "|")
    for figure, by_subject in results.values.items():
        cells = [spread(by_subject.get(each, [])) for each in subjects]
        print(f"| {figure} | " + " | ".join(cells) + " |")
    print("\n| goal | reached | |\n|---|---|---|")
    for goal in GOALS:
        value, reached = goal.judge(results)
        print(f"| {goal} | {'-' if value is None else f'{value:.2f}'} | {MARKS[reached]} |")


def spread(values: list[float]) -> str:
    if not values:
        return ""
    middle, low, high = (
        f"{value:.3g}" if value < 100 else f"{value:.0f}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look: two short rounds, few connections")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long a bulk measurement takes")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--loose", action="store_true", help="the ends may run on any CPU")
    parser.add_argument("--subjects", type=listed(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--figures", type=listed(FIGURES), default=list(FIGURES))
    parser.add_argument("--json", type=Path, help="where every value goes, and the goals")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    rust = None
    if RUST.keys() & options.subjects:
        rust, why = find_rust()
        if rust is None:
            say(f"SKIPPED rust-libp2p: {why}")
            options.subjects = [each for each in options.subjects if each not in RUST]
    results = measure(options, Setting(rust) if options.loose else Setting.halves(rust))
    show(results, options.subjects)
    if options.json:
        judged = [(str(goal), *goal.judge(results)) for goal in GOALS]
        goals = [{"goal": goal, "value": value, "reached": reached} for goal, value, reached in judged]
        options.json.write_text(json.dumps({"values": results.values, "goals": goals}, indent=1), encoding="utf-8")


def listed(allowed: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(allowed):
            raise argparse.ArgumentTypeError(f"there are {', '.join(allowed)}")
        return names

    return parse


if __name__ == "__main__":
    main()
