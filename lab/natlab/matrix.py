"""The punch matrix: every NAT type against every other, as measured, next to what is expected."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .errors import LabError
from .punch import Group, expected, group_of, punch
from .reflector import add_reflector
from .running import RunningLab
from .topology import Lab, home

TYPES = (
    *("open", "fc", "fcx", "ar"),
    *("fw", "pr", "eimx", "cgn-pr"),
    *("pr-rst", "naive"),
    *("sym", "symseq", "cgn-sym"),
)
"""The types of the table unless others are asked for, by group."""
DELAY = 0.04
"""Seconds one way between the two. Below 0.02 a refusal comes back before the other side could have begun."""
SKEWS = (0.0, 0.01, -0.01, 0.09, -0.09)
"""Seconds by which one begins after the other: three where the first packets cross, two where they do not."""
SLACK = 0.008
"""Seconds by which a skew may be missed on a busy machine; then the trial is done again."""
LATE = 0.015
"""Seconds by which a wire may miss its delay, for the same reason; then the round is done again."""
ATTEMPTS = 8
"""Times that a trial or a round is done again."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One trial between two types, and what should have come of it."""

    a: str
    b: str
    protocol: str
    skew: float
    expected: bool
    seen: bool
    seconds: float | None


def measure(
    types: Sequence[str] = TYPES,
    *,
    protocols: Sequence[str] = ("tcp", "udp"),
    skews: Sequence[float] = SKEWS,
    retry: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cell]:
    """Try every type against every type, once per protocol and skew.

    One lab holds two homes of each type, and in every round each home takes part in one trial, so as many trials as
    there are types go on at once: about 2 s a round.

    Args:
        retry: whether a refused side tries again at a random time, which makes TCP behave as UDP does.
        progress: told after each round, with the number of rounds.

    Raises:
        LabError: the machine is too busy to keep a skew.
    """
    sites = [home(f"{side}{index}", kind, delay=DELAY / 2) for side in "ab" for index, kind in enumerate(types)]
    cells: list[Cell] = []
    with RunningLab(Lab(tuple(sites))) as lab, ThreadPoolExecutor(max(1, len(types))) as pool:
        server = add_reflector(lab)
        ports = iter(range(10_000, 30_000))  # each trial its own, or routers remember the last
        dice = random.Random(seed) if retry else None

        def play(shift: int, protocol: str, skew: float) -> list[Cell]:
            lab.stats()
            for _ in range(ATTEMPTS):
                pairs = [(index, (index + shift) % len(types)) for index in range(len(types))]
                jobs = [pool.submit(trial, a, b, protocol, skew) for a, b in pairs]
                found = [job.result() for job in jobs]
                if lab.stats()["late"] < LATE:
                    return found
            raise LabError(f"this machine is too busy to keep a delay within {LATE * 1e3:g} ms, {ATTEMPTS} times")

        def trial(a: int, b: int, protocol: str, skew: float) -> Cell:
            # Who tries again when refused is as well off as with UDP.
            wanted = expected(types[a], types[b], "udp" if retry else protocol, skew, DELAY)
            lucky = False
            for _ in range(ATTEMPTS):
                try:
                    seen = punch(
                        lab[f"a{a}"], lab[f"b{b}"], server, protocol=protocol, skew=skew, port=next(ports), retry=dice
                    )
                except TimeoutError:  # before it began: one could not ask how it is seen
                    continue
                if seen.foreseen and not wanted and not lucky:
                    lucky = True  # a port of 512 at random is the same again once in 512 times, but not twice in a row
                elif abs(seen.skew - skew) < SLACK:
                    return Cell(types[a], types[b], protocol, skew, wanted, seen.succeeded, seen.seconds)
            raise LabError(f"this machine is too busy to begin two things {skew * 1e3:g} ms apart, {ATTEMPTS} times")

        rounds = [(shift, protocol, skew) for protocol in protocols for skew in skews for shift in range(len(types))]
        for done, (shift, protocol, skew) in enumerate(rounds, 1):
            cells += play(shift, protocol, skew)
            progress(done, len(rounds))
    return cells


def groups(cells: Sequence[Cell], protocol: str) -> dict[tuple[Group, Group], str]:
    """The table of groups: "100", "0", "cross" if it is only those whose first packets cross, or a percentage."""
    table: dict[tuple[Group, Group], str] = {}
    for one in Group:
        for two in Group:
            mine = [
                cell for cell in cells if (group_of(cell.a), group_of(cell.b), cell.protocol) == (one, two, protocol)
            ]
            if mine:
                table[one, two] = _verdict(mine)
    return table


def _verdict(cells: Sequence[Cell]) -> str:
    crossing = [cell.seen for cell in cells if abs(cell.skew) < DELAY]
    others = [cell.seen for cell in cells if abs(cell.skew) >= DELAY]
    good = sum(crossing) + sum(others)
    if good in (0, len(cells)):
        return "100" if good else "0"
    if all(crossing) and not all(others):
        # Of the two orders that do not cross, one may serve: whose router refuses must be first.
        return "cross" if not any(others) else "cross or in order"
    return f"{good * 100 // len(cells)} %"


def render(cells: Sequence[Cell], types: Sequence[str] = TYPES) -> Iterator[str]:
    """The matrix for a terminal, line by line: the share of trials that succeeded, ``!`` if one is not as expected."""
    for protocol in dict.fromkeys(cell.protocol for cell in cells):
        width = max(map(len, types))
        yield f"{protocol.upper()}, % of {len({cell.skew for cell in cells})} skews; group, type A, then type B:"
        yield " " * (width + 5) + " ".join(f"{name:>7}" for name in types)
        for a in types:
            row = []
            for b in types:
                mine = [cell for cell in cells if (cell.a, cell.b, cell.protocol) == (a, b, protocol)]
                share = f"{sum(cell.seen for cell in mine) * 100 // len(mine)}"
                row.append(share + ("!" if any(cell.seen != cell.expected for cell in mine) else ""))
            yield f"{group_of(a).name}  {a:<{width}} " + " ".join(f"{each:>7}" for each in row)
        yield "by group:"
        table = groups(cells, protocol)
        present = sorted({one for one, _ in table})
        for one in present:
            yield f"  {one.name}: " + ", ".join(f"{two.name} {table[one, two]}" for two in present)
        wrong = sum(cell.seen != cell.expected for cell in cells if cell.protocol == protocol)
        yield f"{'every trial as expected' if not wrong else f'{wrong} trials not as expected'}"
        yield ""
