"""The next circuit of a session: when, who asks, and through which relay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from kas_libp2p.metadata import CircuitLimits, PeerId
from kas_libp2p.relay._allowance import BURST, INTERVAL, KEEP
from kas_libp2p.relay._renewal import CHECK, PAUSE, Line
from kas_libp2p.relay._succession import (
    AVOID,
    LEADS,
    MAX_KNOWN,
    SMALL_CHECK,
    SMALL_PAUSE,
    Due,
    Succession,
    Way,
    is_small,
    nears_end,
)

BOB, CAROL = PeerId("bob"), PeerId("carol")
RELAY, OTHER, OWN = PeerId("relay"), PeerId("other relay"), PeerId("own relay")
KIB = 1024


def reference(seconds_left: float = 120.0, bytes_left: int = 128 * KIB) -> CircuitLimits:
    return CircuitLimits(128 * KIB, 120.0, bytes_left, seconds_left)


def hours(seconds_left: float = 7200.0) -> CircuitLimits:
    return CircuitLimits(None, 7200.0, None, seconds_left)


def line(
    limits: CircuitLimits | None,
    number: int = 1,
    peer: PeerId = BOB,
    *,
    relay: PeerId | None = RELAY,
    ours: bool = False,
    session: bool = True,
    busy: bool = True,
) -> Line:
    return Line(number, peer, relay, ours, 100.0, busy, limits, session)


def due(
    decides: Succession, *lines: Line, now: float = 1000.0, ways: Sequence[Way] = (Way(RELAY),)
) -> list[PeerId | None]:
    return [each.relay for each in decides.due(lines, now, lambda _: ways)]


def succession(*, consent: bool = True) -> Succession:
    return Succession(small_circuits=consent)


def taken(*relays: PeerId, count: int = BURST - KEEP, now: float = 1000.0) -> Succession:
    """One that has taken all that it may."""
    decides = succession()
    for relay in relays:
        for _ in range(count):
            decides.asked(relay, now)
    return decides


# When


@pytest.mark.parametrize(
    ("limits", "turn", "rate", "reason"),
    [
        (reference(20.1), 0, 0.0, ""),
        (reference(20.0), 0, 0.0, "20 s of 2 min are left"),
        (reference(8.1), 3, 0.0, ""),
        (reference(8.0), 3, 0.0, "8.0 s of 2 min are left"),
        (reference(bytes_left=8193), 3, 0.0, ""),
        (reference(bytes_left=8192), 3, 0.0, "8.2 kB of 131 kB are left"),
        (reference(bytes_left=8192 + 2001), 3, 1000.0, ""),
        (reference(bytes_left=8192 + 2000), 3, 1000.0, "10.2 kB of 131 kB are left"),
        (reference(bytes_left=8192 + 20_000), 0, 1000.0, "28.2 kB of 131 kB are left"),
        (reference(bytes_left=65_000), 3, 1e9, ""),
        (hours(601), 0, 0.0, ""),
        (hours(600), 0, 0.0, "10 min of 2 h are left"),
        (hours(376), 3, 0.0, ""),
        (hours(375), 3, 0.0, "6 min of 2 h are left"),
        (CircuitLimits(None, 30.0, None, 15.1), 0, 0.0, ""),
        (CircuitLimits(None, None, None, None), 0, 1e9, ""),
        (None, 0, 0.0, ""),
    ],
)
def test_when_it_is_followed(limits: CircuitLimits | None, turn: int, rate: float, reason: str) -> None:
    assert nears_end(limits, turn, rate) == reason


def test_what_is_small() -> None:
    assert is_small(reference())
    assert is_small(CircuitLimits(None, 300.0, None, 300.0))
    assert is_small(CircuitLimits(1 << 20, None, 1 << 20, None))
    assert not is_small(hours())
    assert not is_small(CircuitLimits(1 << 30, None, 1 << 30, None))
    assert not is_small(CircuitLimits(None, None, None, None))


def test_a_circuit_with_a_session_is_followed_in_time_whatever_its_age() -> None:
    decides = succession()
    assert due(decides, line(reference(21.0))) == []
    assert decides.look_at == 1000.0 + SMALL_CHECK
    assert decides.due([line(reference(20.0))], 1001.0, lambda _: [Way(RELAY)]) == [
        Due(line(reference(20.0)), "20 s of 2 min are left", RELAY)
    ]
    assert due(succession(), line(hours(601))) == []
    assert due(succession(), line(hours(600))) == [RELAY]


def test_the_rate_says_when_bytes_are_used_up() -> None:
    decides = succession()
    for second in range(6):
        left = 128 * KIB - second * 4000
        assert due(decides, line(reference(119.0 - second, left)), now=1000.0 + second) == []
    # A new circuit, and the same rate: it is known from the one before.
    assert due(decides, line(reference(110.0, 90_000), 2), now=1006.0) == []
    assert due(decides, line(reference(109.0, 86_000), 2), now=1007.0) == [RELAY]


def test_where_nothing_small_is_used_it_is_looked_rarely() -> None:
    decides = succession()
    assert due(decides, line(hours())) == []
    assert decides.look_at == 1000.0 + CHECK


def test_a_session_that_comes_to_a_circuit_is_seen() -> None:
    decides = succession()
    assert due(decides, line(None, relay=None)) == []
    assert decides.look_at == math.inf
    assert due(decides, line(None, relay=None), line(hours(), 2, session=False)) == []
    assert decides.look_at == 1000.0 + 7200 - 600
    assert due(decides, line(None, relay=None), line(reference(), 2, session=False)) == []
    assert decides.look_at == 1000.0 + SMALL_CHECK
    assert due(decides, line(None, relay=None), line(reference(), 2, session=False, busy=False)) == []
    assert decides.look_at == 1000.0 + CHECK
    assert due(decides, line(CircuitLimits(None, None, None, None), session=False)) == []
    assert decides.look_at == math.inf


# Who


@pytest.mark.parametrize(
    ("ours", "decides", "lead"),
    [
        (False, succession(), LEADS[0]),
        (True, succession(), LEADS[1]),
        (False, taken(RELAY, count=1), LEADS[2]),
        (True, taken(RELAY, count=1), LEADS[3]),
    ],
)
def test_the_two_ends_take_turns(ours: bool, decides: Succession, lead: float) -> None:
    assert due(decides, line(reference(lead + 0.1), ours=ours)) == []
    assert due(decides, line(reference(lead), ours=ours)) == [RELAY]


@pytest.mark.parametrize(
    ("other", "enough"),
    [
        (line(None, 2, relay=None, session=False), True),
        (line(reference(100.0), 2, session=False, busy=False), True),
        (line(reference(20.0), 2, session=False, busy=False), False),
        (line(reference(100.0, 9000), 2, session=False, busy=False), True),
        (line(reference(100.0, 8000), 2, session=False, busy=False), False),
        (line(hours(), 2, CAROL, session=False), False),
    ],
)
def test_who_comes_first_has_done_it_for_both(other: Line, enough: bool) -> None:
    assert (due(succession(), line(reference(5.0)), other) == []) is enough


def test_who_can_not_ask_leaves_it_to_the_other() -> None:
    assert due(succession(), line(reference(5.0)), ways=[]) == []
    assert due(succession(), line(reference(5.0)), ways=[Way(RELAY, calls=False, called=True)]) == []
    assert due(succession(), line(reference(5.0), ours=True), ways=[]) == [RELAY], "it did before"


# How often


def test_one_peer_is_tried_for_every_few_seconds() -> None:
    decides = succession()
    tries = [second for second in range(8) if due(decides, line(reference(8.0 - second)), now=1000.0 + second)]
    assert tries == [0, SMALL_PAUSE, 2 * SMALL_PAUSE]
    decides = succession()
    tries = [second for second in range(130) if due(decides, line(hours(300.0 - second)), now=1000.0 + second)]
    assert tries == [0, PAUSE, 2 * PAUSE]


def test_no_more_is_taken_than_what_is_left() -> None:
    decides = taken(RELAY)
    assert due(decides, line(reference(5.0))) == []
    assert decides.shortage(BOB, 1000.0) == INTERVAL
    assert decides.shortage(BOB, 1010.0) == INTERVAL - 10.0
    assert decides.shortage(CAROL, 1000.0) == 0.0
    assert due(decides, line(reference(5.0)), now=1000.0 + INTERVAL - 1) == []
    assert due(decides, line(reference(5.0)), now=1000.0 + INTERVAL) == [RELAY]
    assert due(decides, now=1000.0 + INTERVAL) == []
    assert decides.shortage(BOB, 1001.0) == 0.0, "it has no session any more"


def test_what_the_relay_refuses_is_believed() -> None:
    decides = succession()
    decides.failed(RELAY, 1000.0, used_up=True)
    assert due(decides, line(reference(5.0))) == []
    assert decides.shortage(BOB, 1000.0) == INTERVAL
    assert due(decides, line(reference(5.0)), now=1000.0 + INTERVAL) == [RELAY]


# Through which


def test_what_comes_back_is_taken_first_and_where_most_is_left() -> None:
    decides = taken(RELAY, count=3, now=900.0)
    ways = [Way(RELAY, limits=reference()), Way(OTHER, limits=reference())]
    assert due(decides, line(reference(5.0)), ways=ways) == [OTHER]
    decides.asked(OTHER, 1000.0)
    assert due(decides, line(reference(5.0)), now=1010.0, ways=ways) == [OTHER], "there is more"
    for _ in range(5):
        decides.asked(OTHER, 1010.0)
    assert due(decides, line(reference(5.0)), now=1015.0, ways=ways) == [RELAY]
    assert due(decides, line(reference(5.0)), now=1030.0, ways=ways) == [RELAY], "it has come back there"


def test_they_are_used_by_turns() -> None:
    decides = succession()
    ways = [Way(PeerId(f"relay {n}")) for n in range(3)]
    asked = []
    for number in range(9):
        now = 1000.0 + number * 100
        (relay,) = due(decides, line(reference(20.0), number), now=now, ways=ways)
        assert relay is not None
        decides.asked(relay, now)
        asked.append(relay)
    assert [asked.count(way.relay) for way in ways] == [3, 3, 3]


def test_one_that_made_none_comes_last() -> None:
    decides = succession()
    ways = [Way(RELAY, limits=reference()), Way(OTHER, limits=reference())]
    decides.failed(RELAY, 1000.0, used_up=False)
    for _ in range(9):
        decides.asked(OTHER, 1000.0)
    assert due(decides, line(reference(5.0)), ways=ways) == [OTHER]
    assert due(decides, line(reference(5.0)), now=1000.0 + AVOID, ways=ways) == [RELAY]


def test_circuits_that_last_are_better_than_any_other() -> None:
    decides = taken(OWN, count=9)
    ways = [Way(RELAY, limits=reference()), Way(OWN, limits=hours())]
    assert due(decides, line(reference(5.0)), ways=ways) == [OWN]


# Other people's relays


def test_without_consent_no_more_is_taken_than_what_comes_back() -> None:
    decides = succession(consent=False)
    ways = [Way(RELAY, foreign=True), Way(OTHER, foreign=True)]
    asked = []
    for second in range(0, 360, 4):
        now = 1000.0 + second
        for relay in due(decides, line(reference(5.0)), now=now, ways=ways):
            assert relay is not None
            decides.asked(relay, now)
            asked.append(second)
    assert asked == [0, 4, 120, 124, 240, 244]


def test_one_whose_circuits_last_needs_no_consent() -> None:
    decides = succession(consent=False)
    decides.asked(RELAY, 999.0)
    assert due(decides, line(reference(5.0)), ways=[Way(RELAY, foreign=True)]) == []
    assert due(decides, line(reference(5.0)), ways=[Way(RELAY, foreign=True, limits=hours())]) == [RELAY]
    decides = succession(consent=False)
    decides.asked(OWN, 999.0)
    assert due(decides, line(reference(5.0)), ways=[Way(OWN)]) == [OWN]


# What is over, and what follows


def test_what_a_session_has_left_and_that_ends_can_be_closed() -> None:
    decides = succession()
    due(decides, line(reference(10.0)), line(reference(5.0), 9, session=False, busy=False))
    assert decides.over == []
    following = line(reference(119.0), 2)
    due(decides, line(reference(9.0), session=False), following)
    assert decides.over == [], "something is under way on it"
    due(decides, line(reference(9.0), session=False, busy=False), following)
    assert decides.over == [1]
    due(decides, line(reference(90.0), session=False, busy=False), following)
    assert decides.over == [], "it may be the spare"
    due(decides, line(hours(9.0), session=False, busy=False), following)
    assert decides.over == [], "nobody needs its place"


def test_the_ceiling_of_what_is_known() -> None:
    decides = succession()
    due(decides, line(reference()))
    ways = [
        Way(RELAY, foreign=True),
        Way(OTHER, calls=False, called=True, foreign=True, limits=reference()),
        Way(PeerId("unknown"), foreign=True),
    ]
    assert decides.ceiling(ways).text == (
        "2 relays with 128 KiB / 2 min circuits carry 2.0 kB/s for ever, 4.0 kB/s for the first 48 min"
    )
    decides = succession(consent=False)
    due(decides, line(reference()))
    assert decides.ceiling(ways).text == "2 relays with 128 KiB / 2 min circuits carry 2.0 kB/s for ever"


def test_what_is_remembered_is_bounded() -> None:
    decides = succession()
    for number in range(2 * MAX_KNOWN):
        relay = PeerId(f"relay {number}")
        decides.failed(relay, 1000.0 + number, used_up=False)
        due(decides, line(reference(5.0), number, PeerId(f"peer {number}"), relay=relay), now=1000.0 + number)
    assert len(decides._known) == MAX_KNOWN
    assert len(decides._failed) <= AVOID + 1
    assert len(decides._tried) == len(decides._uses) == len(decides._carried) == 1
    due(decides, now=9000.0)
    assert not decides._tried
    assert not decides._uses
    assert not decides._carried
