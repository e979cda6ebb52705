"""When circuits are renewed."""

from __future__ import annotations

import math

import pytest

from kas_libp2p.metadata import CircuitLimits, PeerId
from kas_libp2p.relay import _renewal as machine
from kas_libp2p.relay._renewal import (
    BRIEF,
    BURST,
    CHECK,
    INTERVAL,
    KEPT_BADLY,
    LEAST_AGE,
    LEAST_LOOK,
    PAUSE,
    Line,
    Renewals,
    ends_soon,
    follows,
)

US, BOB, CAROL = PeerId("us"), PeerId("bob"), PeerId("carol")
RELAY, OTHER = PeerId("relay"), PeerId("other relay")
HOURS = 7200.0
MARGIN = 600.0
"""Seconds that are left of two hours when they are renewed."""


def limits(
    seconds_left: float | None = None,
    bytes_left: int | None = None,
    *,
    max_seconds: float | None = HOURS,
    max_bytes: int | None = None,
) -> CircuitLimits:
    left = max_seconds if seconds_left is None else seconds_left
    return CircuitLimits(max_bytes, max_seconds, max_bytes if bytes_left is None else bytes_left, left)


def line(
    left: CircuitLimits | None,
    number: int = 1,
    peer: PeerId = BOB,
    *,
    relay: PeerId | None = RELAY,
    ours: bool = True,
    age: float = 3600.0,
    busy: bool = True,
) -> Line:
    return Line(number, peer, relay, ours, age, busy, left)


def renewals(spread: float = 0.0) -> Renewals:
    return Renewals(lambda: spread)


def due(decides: Renewals, *lines: Line, now: float = 0.0) -> list[int]:
    return [each.line.number for each in decides.due(lines, now)]


# What ends soon


@pytest.mark.parametrize(
    ("left", "soon"),
    [
        (limits(MARGIN + 1), ""),
        (limits(MARGIN), "10 min of 2 h are left"),
        (limits(0.0), "0.0 ms of 2 h are left"),
        (limits(61, max_seconds=400), ""),
        (limits(60, max_seconds=400), "60 s of 7 min are left"),
        (limits(601, max_seconds=86_400), ""),
        (limits(max_seconds=None), ""),
        (limits(max_seconds=None, max_bytes=8_000_000, bytes_left=1_000_001), ""),
        (limits(max_seconds=None, max_bytes=8_000_000, bytes_left=1_000_000), "1.0 MB of 8.0 MB are left"),
        (limits(max_bytes=8_000_000, bytes_left=0), "0 B of 8.0 MB are left"),
        (None, ""),
    ],
)
def test_what_ends_soon(left: CircuitLimits | None, soon: str) -> None:
    assert ends_soon(left) == soon


def test_what_lasts_longest() -> None:
    assert limits(max_seconds=None).lasts == math.inf
    assert limits(100).lasts == 100
    assert limits(max_seconds=None, max_bytes=10_000_000).lasts == 100
    assert limits(50, max_bytes=10_000_000).lasts == 50
    assert limits(120, max_seconds=120).lasts < limits(HOURS / 2).lasts


# When


def test_a_circuit_in_use_is_renewed_in_good_time() -> None:
    decides = renewals()
    fresh = line(limits(HOURS))
    assert due(decides, fresh) == []
    assert decides.look_at == HOURS - MARGIN  # and not before
    assert due(decides, line(limits(MARGIN)), now=HOURS - MARGIN) == [1]


def test_not_all_at_once() -> None:
    decides = renewals(1.0)
    assert due(decides, line(limits(HOURS))) == []
    assert decides.look_at == HOURS - 0.75 * MARGIN
    assert due(decides, line(limits(MARGIN)), now=HOURS - MARGIN) == []
    assert due(decides, line(limits(0.75 * MARGIN)), now=HOURS - 0.75 * MARGIN) == [1]


def test_where_bytes_are_counted_it_is_looked_often() -> None:
    decides = renewals()
    left = limits(max_seconds=None, max_bytes=80_000_000)
    assert due(decides, line(left)) == []
    assert decides.look_at == CHECK
    left = limits(max_seconds=None, max_bytes=80_000_000, bytes_left=10_000_000)
    assert due(decides, line(left), now=CHECK) == [1]


def test_with_nothing_to_renew_nobody_wakes() -> None:
    decides = renewals()
    assert due(decides, line(None, relay=None), line(limits(10.0), 2, CAROL, ours=False)) == []
    assert decides.look_at == math.inf
    assert due(decides, line(limits(max_seconds=None))) == []
    assert decides.look_at == math.inf
    assert due(decides, line(limits(60, max_seconds=120), age=60)) == []
    assert decides.look_at == math.inf, "as short as the reference's: it is left to whoever uses it"


# Which


@pytest.mark.parametrize(
    "spared",
    [
        line(limits(100), ours=False),
        line(limits(100), busy=False),
        line(limits(60, max_seconds=120), age=60),
        line(limits(max_seconds=None, max_bytes=131072, bytes_left=1000), age=LEAST_AGE - 1),
    ],
)
def test_those_that_are_spared(spared: Line) -> None:
    assert due(renewals(), spared) == []


def test_one_that_is_idle_is_renewed_once_it_is_used() -> None:
    decides = renewals()
    assert due(decides, line(limits(100), busy=False)) == []
    assert decides.look_at == CHECK
    assert due(decides, line(limits(95)), now=CHECK) == [1]


@pytest.mark.parametrize(
    ("other", "spared"),
    [
        (line(None, 2, relay=None), True),  # direct
        (line(limits(HOURS), 2, busy=False), True),  # the next one
        (line(limits(HOURS), 2, ours=False), True),  # the peer's
        (line(limits(max_seconds=None), 2, relay=OTHER), True),
        (line(limits(0.0), 2), False),  # what it follows itself, which its relay has not ended yet
        (line(limits(HOURS), 2, CAROL), False),  # with somebody else
    ],
)
def test_another_way_to_the_peer_is_enough(other: Line, spared: bool) -> None:
    assert (1 not in due(renewals(), line(limits(100)), other)) is spared


# How often


def test_one_peer_is_tried_for_once_a_minute() -> None:
    decides = renewals()
    tries = []
    now = 0.0
    while now < MARGIN:
        if due(decides, line(limits(MARGIN - now)), now=now):
            tries.append(now)
        assert now < decides.look_at <= now + PAUSE
        now = decides.look_at
    assert tries == [n * PAUSE for n in range(10)]


def test_a_relay_is_not_hammered() -> None:
    """30 circuits of which each is about to end, through one relay that makes none, and one through another."""
    decides = renewals()
    lines = [line(limits(100), n, PeerId(f"peer {n}")) for n in range(30)]
    lines.append(line(limits(100), 99, relay=OTHER))
    asked = []
    for step in range(int(1200 / CHECK)):
        asked += [(step * CHECK, number) for number in due(decides, *lines, now=step * CHECK) if number != 99]
        assert decides.look_at <= step * CHECK + PAUSE
    assert len([at for at, _ in asked if at == 0]) == BURST
    assert len(asked) <= BURST + 1200 / INTERVAL
    assert len({number for _, number in asked}) > BURST, "not always the same ones"


def test_what_is_remembered_goes_away() -> None:
    decides = renewals()
    for number in range(1000):
        due(decides, line(limits(100), number, PeerId(f"peer {number}")), now=number * INTERVAL)
    assert len(decides._shares) == len(decides._tried) == 1
    due(decides, now=1000 * INTERVAL + PAUSE)
    assert not decides._shares
    assert not decides._tried


def test_for_a_peer_that_keeps_no_idle_connection_it_is_made_shortly_before_the_end() -> None:
    decides = renewals()
    made, now = [], 0.0
    while now <= MARGIN:
        for _ in due(decides, line(limits(MARGIN - now)), now=now):
            decides.made(BOB)
            made.append(now)
        now = max(decides.look_at, now + 0.001)
    assert made == [0.0, PAUSE, MARGIN - BRIEF]
    counted = line(limits(max_seconds=None, max_bytes=8_000_000, bytes_left=1000))
    assert due(decides, counted, now=10_000.0) == []  # nobody knows how soon
    assert due(decides, now=10_000.0) == []
    assert due(decides, counted, now=10_001.0) == [1], "forgotten with the circuits"


# What is kept for it


def test_the_next_one_is_kept_at_both_ends_while_it_is_needed() -> None:
    ending = line(limits(100), 1)
    following = line(limits(HOURS), 2, busy=False)
    for ours in (True, False):
        following = line(limits(HOURS), 2, busy=False, ours=ours)
        assert follows(following, [ending, following])
    assert not follows(following, [following])
    assert not follows(following, [line(limits(100), 1, busy=False), following]), "nobody needs it"
    assert not follows(following, [line(limits(HOURS / 2), 1), following]), "a second one, that nobody made for this"
    assert not follows(following, [line(limits(100), 1, CAROL), following])
    assert not follows(ending, [ending, line(limits(50), 3)]), "it ends itself"
    assert not follows(line(None, 2, relay=None), [ending])


def test_two_hours_for_a_day() -> None:
    """One circuit after the other, each made beside the last one."""
    decides = renewals(0.5)
    made = [0.0]
    now = 0.0
    while now < 86_400:
        lines = [
            line(limits(HOURS - (now - at)), number, age=now - at, busy=number == 0 or now - made[number] >= MARGIN)
            for number, at in enumerate(made)
            if now - at < HOURS
        ]
        assert lines, "there was a gap"
        for _ in decides.due(lines, now):
            made.append(now)
        now = min(decides.look_at, now + 300)
    assert len(made) == 86_400 // (HOURS - MARGIN * 0.875) + 1
    assert machine.LEAST_TIME <= MARGIN <= machine.MOST_TIME


def test_a_look_is_never_due_at_once_again() -> None:
    """What is left of a circuit may be a hair above what is waited for, by how floats add up; then time has to pass."""
    renewals = Renewals(lambda: 0.0)
    nearly = line(limits(math.nextafter(BRIEF, math.inf)))
    for _ in range(KEPT_BADLY):
        renewals.made(BOB)
    assert renewals.due([nearly], 10_000.0) == []
    assert renewals.look_at == 10_000.0 + LEAST_LOOK
