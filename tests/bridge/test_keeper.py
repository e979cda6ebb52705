"""When a kept peer is tried again. Pure: the clock is a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_bridge._keeper import (
    JITTER,
    LONGEST_DELAY,
    MAX_ADDRESSES,
    MAX_KEPT,
    STABLE_AFTER,
    STANDING_NO_DELAY,
    Full,
    Keeper,
    KeptState,
)
from kas_libp2p.metadata import PeerId

BOB = PeerId("12D3KooWBob")


def keeper(random: float = 0.5) -> Keeper:
    made = Keeper(lambda: random)
    made.set_open(True, 0.0)
    return made


def one(random: float = 0.5) -> Keeper:
    made = keeper(random)
    made.add(BOB, "/ip4/192.0.2.1/tcp/1", "settings", 0.0)
    return made


def test_a_new_peer_is_tried_at_once() -> None:
    it = one()
    assert it.next_deadline() == 0.0
    assert [kept.peer for kept in it.take_due(0.0)] == [BOB]
    assert it.take_due(100.0) == []
    assert it.next_deadline() is None


def test_failures_double_the_pause_up_to_a_minute() -> None:
    it, now, pauses = one(), 0.0, []
    for _ in range(9):
        it.take_due(now)
        pause = it.ended(BOB, now, problem="refused")
        assert pause is not None
        pauses.append(pause)
        now += pause
        assert it.next_deadline() == now
        assert it.take_due(now - 0.001) == []
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert it.all()[0].problem == "refused"


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 60))
def test_pauses_are_spread_and_bounded(random: float, failures: int) -> None:
    it, pause = one(random), 0.0
    for _ in range(failures + 1):
        it.take_due(1e9)
        pause = it.ended(BOB, 0.0) or 0.0
    assert 0.75 <= pause <= LONGEST_DELAY * (1 + JITTER)


def test_a_standing_no_is_asked_again_rarely() -> None:
    it = one()
    it.take_due(0.0)
    assert it.ended(BOB, 0.0, standing=True) == STANDING_NO_DELAY


def test_a_peer_that_stayed_comes_back_at_once() -> None:
    it = one()
    for _ in range(6):
        it.take_due(1e9)
        it.ended(BOB, 0.0)
    it.take_due(1e9)
    it.is_here(BOB)
    assert it.all()[0].state is KeptState.HERE
    assert it.ended(BOB, 0.0, joined_for=STABLE_AFTER) == 1.0


def test_a_peer_that_did_not_stay_waits_longer() -> None:
    it = one()
    for expected in (1, 2, 4):
        it.take_due(1e9)
        it.is_here(BOB)
        assert it.ended(BOB, 0.0, joined_for=STABLE_AFTER - 1) == expected


def test_asking_may_be_cheap() -> None:
    it = one()
    for _ in range(9):
        it.take_due(1e9)
        pause = it.ended(BOB, 0.0, longest=5.0)
    assert pause == 5.0


def test_nobody_is_tried_while_our_kaspad_is_away() -> None:
    it = one()
    for _ in range(5):
        it.take_due(1e9)
        it.ended(BOB, 100.0)
    it.set_open(False, 100.0)
    assert it.next_deadline() is None
    assert it.take_due(1e9) == []
    it.set_open(True, 101.0)
    assert it.next_deadline() == 101.0
    it.take_due(101.0)
    assert it.ended(BOB, 101.0) == 1.0, "failures from before count no longer"
    it.set_open(True, 101.5)
    assert it.next_deadline() == 102.0, "it was open already"


def test_addresses_are_collected_the_newest_first() -> None:
    it = one()
    it.add(BOB, "/ip4/192.0.2.2/tcp/1", "control", 0.0)
    it.add(BOB, "/ip4/192.0.2.1/tcp/1", "control", 0.0)
    assert it.all()[0].addresses == ("/ip4/192.0.2.2/tcp/1", "/ip4/192.0.2.1/tcp/1")
    assert it.all()[0].origin == "settings"
    for port in range(50):
        it.add(BOB, f"/ip4/192.0.2.2/tcp/{port}", "control", 0.0)
    assert len(it.all()[0].addresses) == MAX_ADDRESSES


def test_asking_for_a_waiting_peer_tries_it_at_once() -> None:
    it = one()
    it.take_due(0.0)
    it.ended(BOB, 0.0, standing=True)
    it.add(BOB, "", "control", 5.0)
    assert it.next_deadline() == 5.0


def test_forgotten() -> None:
    it = one()
    assert it.remove(BOB)
    assert not it.remove(BOB)
    assert it.ended(BOB, 0.0) is None
    it.is_here(BOB)
    assert len(it) == 0


def test_there_is_an_end() -> None:
    it = keeper()
    for number in range(MAX_KEPT):
        it.add(PeerId(f"peer {number}"), "", "control", 0.0)
    with pytest.raises(Full, match="kas-bridge disconnect"):
        it.add(BOB, "", "control", 0.0)
    it.add(PeerId("peer 0"), "/ip4/192.0.2.1/tcp/1", "control", 0.0)
