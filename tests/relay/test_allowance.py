"""How many circuits relays give, and what follows for a session."""

from __future__ import annotations

import math
from random import Random

import pytest

from kas_libp2p.metadata import TAIL, PeerId
from kas_libp2p.relay._allowance import BURST, COST, INTERVAL, KEEP, Allowances, Supply, ceiling
from tests.relay.test_succession_simulation import RustLimiter

RELAY, OTHER = PeerId("relay"), PeerId("other relay")
REFERENCE = Supply(128 * 1024, 120.0)


def test_at_once_and_one_more_each_interval() -> None:
    counts = Allowances()
    assert counts.left(RELAY, 0.0) == BURST
    assert counts.waited(RELAY, 0.0) == math.inf
    for number in range(BURST):
        assert counts.left(RELAY, 1.0) == BURST - number
        counts.asked(RELAY, 1.0)
    assert counts.left(RELAY, 120.0) == counts.spare(RELAY, 120.0) == 0
    assert counts.left(RELAY, 121.0) == 1
    assert counts.left(RELAY, 121.0 + 2 * INTERVAL) == 2, "others' requests may have wasted every other one"
    assert counts.left(OTHER, 1.0) == BURST


def test_some_are_left_for_calls() -> None:
    counts = Allowances()
    for _ in range(BURST - KEEP):
        counts.asked(RELAY, 0.0)
    assert counts.spare(RELAY, 0.0) == 0
    assert counts.left(RELAY, 0.0) == KEEP


def test_one_per_interval_costs_nothing() -> None:
    counts = Allowances()
    for number in range(100):
        assert counts.waited(RELAY, number * INTERVAL) >= INTERVAL
        counts.asked(RELAY, number * INTERVAL)
        assert counts.left(RELAY, number * INTERVAL) == BURST - 1
        assert counts.waited(RELAY, number * INTERVAL) == 0.0
    counts.asked(RELAY, 99.5 * INTERVAL)
    assert counts.waited(RELAY, 99.5 * INTERVAL) == 0.5 * INTERVAL, "what comes back is counted from before"


def test_what_the_relay_says_counts() -> None:
    counts = Allowances()
    counts.refused(RELAY, 10.0)
    assert counts.left(RELAY, 129.0) == 0
    assert counts.left(RELAY, 130.0) == 1


def test_what_is_full_again_is_forgotten() -> None:
    counts = Allowances()
    for number in range(100):
        counts.asked(PeerId(f"relay {number}"), 0.0)
    counts.asked(RELAY, INTERVAL)
    assert len(counts) == 1


def test_rust_never_gives_less() -> None:
    """Whatever we and others ask of it, and when."""
    dice = Random(1)
    for _ in range(300):
        theirs, counts, now = RustLimiter(BURST, INTERVAL), Allowances(), 0.0
        pace = dice.choice([5.0, 60.0, 110.0, 120.0, 130.0, 300.0])
        for _ in range(200):
            now += dice.choice([dice.uniform(0, 2 * pace), pace, 1.0])
            if dice.random() < 0.4:
                theirs.take("somebody else", now)
            elif counts.left(RELAY, now):
                counts.asked(RELAY, now)
                assert theirs.take("us", now)


# What follows


def test_the_reference() -> None:
    found = ceiling([REFERENCE] * 3)
    assert found.sustained == pytest.approx(6 * (128 * 1024 * (1 - TAIL) - COST) / 120)
    assert found.lasts(found.sustained) == math.inf
    assert found.lasts(2 * found.sustained) == pytest.approx(24 * 120)
    assert found.text == (
        "3 relays with 128 KiB / 2 min circuits carry 6.0 kB/s for ever, 12.0 kB/s for the first 48 min"
    )


@pytest.mark.parametrize(
    ("supplies", "text"),
    [
        ([], "no relay is known through which another circuit could be made"),
        ([REFERENCE], "1 relay with 128 KiB / 2 min circuits carries 2.0 kB/s for ever, 4.0 kB/s for the first 48 min"),
        ([Supply(131072, 120.0, burst=0)], "1 relay with 128 KiB / 2 min circuits carries 2.0 kB/s for ever"),
        (
            [Supply(131072, 120.0, 1, burst=0)],
            "1 relay with 128 KiB / 2 min circuits carries a session for 0.0 ms at most: "
            "there are too few circuits for ever",
        ),
        ([Supply(None, 7200.0)], "1 relay with 2 h circuits carries whatever comes, one circuit after the other"),
        ([REFERENCE, Supply(None, None)], "a relay without limits carries whatever comes"),
        (
            [REFERENCE, Supply(1 << 30, None)],
            "1 relay with 128 KiB / 2 min circuits and 1 relay with 1.1 GB circuits carry 16.8 MB/s for ever, "
            "33.6 MB/s for the first 48 min",
        ),
    ],
)
def test_in_words(supplies: list[Supply], text: str) -> None:
    assert ceiling(supplies).text == text


def test_nothing_lasts_no_time() -> None:
    assert ceiling([]).lasts(1.0) == 0.0
    assert ceiling([Supply(None, 120.0)]).lasts(1e9) == math.inf
