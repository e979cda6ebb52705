from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.addresses import peer_id_from_bytes
from kas_libp2p.autonat._observed import Mapping
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.config import PunchConfig
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PeerId
from kas_libp2p.statefile import MAX_FILE
from kas_libp2p.strategy._memory import (
    LONGEST,
    MAX_IPS,
    MAX_PEERS,
    MAX_TEXT,
    RESET_GAP,
    UNKNOWN,
    WAITS,
    Cause,
    Memory,
    Side,
    side,
)
from kas_libp2p.strategy._nat import Nat, NatFacts, Ports, Unsolicited

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
WALL = 1.8e9
PR = NatFacts(Nat(Mapping.INDEPENDENT, Ports.KEPT, Filtering.PORT, Unsolicited.DROPPED))
SYM = NatFacts(Nat(Mapping.DEPENDENT, Ports.RANDOM, Filtering.PORT, Unsolicited.DROPPED))
HERE = side(PR, ["/ip4/11.1.0.1/tcp/16117", "/ip6/2d00:1::7/tcp/16117"])
THERE = side(PR, ["/ip4/11.2.0.1/tcp/1"])


def memory() -> Memory:
    return Memory(Random(1))


def test_a_side_is_where_it_is_without_ports_and_what_its_nats_do() -> None:
    assert HERE.ips == {"11.1.0.1", "2d00:1::/64"}
    assert HERE.nats == ("endpoint-independent", "kept", "port-restricted", "drop", *[UNKNOWN] * 4)
    assert side(None, ["/dns4/example.com/tcp/1", "/ip4/11.1.0.1/tcp/1/p2p-circuit"]) == Side()
    assert len(side(None, [f"/ip4/11.1.0.{n}/tcp/1" for n in range(20)]).ips) == MAX_IPS
    assert set(Side().nats) == {Mapping.UNKNOWN, Ports.UNKNOWN, Filtering.UNKNOWN, Unsolicited.UNKNOWN} == {UNKNOWN}


@pytest.mark.parametrize(
    ("other", "is_other"),
    [
        (Side(), False),
        (side(PR, ["/ip4/11.1.0.1/tcp/9"]), False),  # another port is no other place
        (side(PR, ["/ip4/11.1.0.2/tcp/16117"]), True),
        (side(PR, ["/ip6/2d00:1::8/tcp/16117"]), False),  # the same network
        (side(PR, ["/ip6/2d00:2::7/tcp/16117"]), True),
        (side(None, ["/ip4/11.1.0.1/tcp/16117"]), False),
        (side(SYM, ["/ip4/11.1.0.1/tcp/16117"]), True),
        (side(NatFacts(v6=Nat(Mapping.NONE)), ()), False),  # what was unknown is known now
    ],
)
def test_what_makes_it_another_side(other: Side, is_other: bool) -> None:
    assert other.is_other(HERE) is is_other
    assert HERE.is_other(other) is is_other


@pytest.mark.parametrize("cause", Cause)
def test_each_cause_has_its_waits_which_double_up_to_a_longest(cause: Cause) -> None:
    known = memory()
    first, longest = WAITS[cause]
    for row in range(12):
        wait = known.failed(ALICE, cause, "because", 0.0)
        assert 0.8 * min(first * 2**row, longest) <= wait <= min(1.2 * min(first * 2**row, longest), LONGEST)
    assert known.recall(ALICE, Side(), Side(), 0.0).cause is cause


def test_waits_are_counted_in_what_lasting_means() -> None:
    hasty = Memory(Random(1), steady=PunchConfig().steady / 100)
    assert hasty.failed(ALICE, Cause.UNREACHED, "", 0.0) == memory().failed(ALICE, Cause.UNREACHED, "", 0.0) / 100
    assert Memory(Random(1), steady=math.inf).failed(ALICE, Cause.UNREACHED, "", 0.0) == LONGEST
    # A peer that is busy is asked no sooner.
    assert Memory(Random(1), steady=1.0).failed(ALICE, Cause.BUSY, "", 0.0) == memory().failed(
        ALICE, Cause.BUSY, "", 0.0
    )


def test_what_passes_by_itself_does_not_lengthen_other_waits() -> None:
    known = memory()
    for _ in range(8):
        known.failed(ALICE, Cause.BUSY, "", 0.0)
    assert known.failed(ALICE, Cause.UNREACHED, "", 0.0) <= 1.2 * WAITS[Cause.UNREACHED][0]
    assert known.failed(ALICE, Cause.BUSY, "", 0.0) <= 1.2 * WAITS[Cause.BUSY][0]


def test_a_peer_can_not_ask_to_be_left_alone_for_ever() -> None:
    assert memory().failed(ALICE, Cause.BUSY, "", 0.0, at_least=1e12) == LONGEST


def test_the_pair_is_left_alone_until_either_side_is_another() -> None:
    known = memory()
    known.recall(ALICE, HERE, THERE, 0.0)
    wait = known.failed(ALICE, Cause.UNREACHED, "nothing came through", 0.0)
    later = RESET_GAP + 1
    assert known.recall(ALICE, HERE, THERE, later).wait(later) == wait - later
    assert known.recall(ALICE, HERE, Side(), later).wait(later) > 0
    moved = known.recall(ALICE, HERE, side(PR, ["/ip4/11.3.0.1/tcp/1"]), later)
    assert (moved.wait(later), moved.streak, moved.cause) == (0.0, 0, None)


def test_success_is_remembered_over_a_move_and_ends_no_row_by_itself() -> None:
    known = memory()
    known.recall(ALICE, HERE, THERE, 0.0)
    known.failed(ALICE, Cause.UNSTABLE, "", 0.0)
    known.succeeded(ALICE, 100.0, seconds=0.3, rtt=0.05)
    entry = known.recall(ALICE, HERE, THERE, 100.0)
    assert (entry.wait(100.0), entry.streak, entry.rtt) == (0.0, 1, 0.05)
    known.forgive(ALICE)
    assert known.recall(ALICE, HERE, THERE, 100.0).streak == 0
    assert known.recall(ALICE, side(SYM, ()), THERE, 100.0).successes == 1


def test_without_an_address_of_ours_it_is_tried_again_once_there_is_one() -> None:
    known = memory()
    known.recall(ALICE, Side(), Side(), 0.0)
    known.failed(ALICE, Cause.NO_ADDRESS, "", 0.0)
    assert known.recall(ALICE, Side(), Side(), 1.0).wait(1.0) > 0
    assert known.recall(ALICE, HERE, Side(), 1.0).wait(1.0) == 0


def test_the_shortest_lifetime_counts() -> None:
    known = memory()
    assert known.lifetime(ALICE) is None
    for silence in (20.0, 40.0, 10.0):
        known.mapping_lost(ALICE, silence)
    assert known.lifetime(ALICE) == 10.0
    assert known.own_lifetime() is None  # it may be hers
    known.mapping_lost(BOB, 15.0)
    assert known.own_lifetime() == 15.0


def many(count: int) -> list[PeerId]:
    return [peer_id_from_bytes(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(count)]


def test_who_was_not_needed_for_the_longest_time_is_forgotten_first() -> None:
    known = memory()
    peers = many(MAX_PEERS + 1)
    for each in peers[:-1]:
        known.failed(each, Cause.HOPELESS, "", 0.0)
    known.recall(peers[0], Side(), Side(), 1.0)
    known.failed(peers[-1], Cause.HOPELESS, "", 1.0)
    assert len(known) == MAX_PEERS
    assert known.recall(peers[0], Side(), Side(), 1.0).streak == 1
    assert known.recall(peers[1], Side(), Side(), 1.0).streak == 0


# Over a restart


def test_a_restart_changes_nothing() -> None:
    known = memory()
    known.recall(ALICE, HERE, THERE, 50.0)
    wait = known.failed(ALICE, Cause.HOPELESS, "No punch can work.", 100.0)
    known.succeeded(BOB, 100.0, seconds=0.3, rtt=0.05)
    known.mapping_lost(BOB, 20.0)
    text = known.dump(200.0, WALL)
    again = memory()
    assert again.load(text, 5.0, WALL + 60) == 0
    entry = again.recall(ALICE, HERE, THERE, 5.0 + RESET_GAP)
    assert entry.wait(5.0) == pytest.approx(wait - 160, abs=1)
    assert (entry.streak, entry.cause, entry.text) == (1, Cause.HOPELESS, "No punch can work.")
    other = again.recall(BOB, Side(), Side(), 5.0)
    assert (other.successes, other.seconds, other.rtt, other.lifetime) == (1, 0.3, 0.05, 20.0)
    assert again.dump(5.0, WALL + 60) == again.dump(5.0, WALL + 60)


def test_a_clock_that_was_wrong_does_not_lock_a_peer_out() -> None:
    known = memory()
    known.failed(ALICE, Cause.HOPELESS, "", 0.0)
    again = memory()
    again.load(known.dump(0.0, WALL + 1e9), 0.0, WALL)
    assert again.recall(ALICE, Side(), Side(), 0.0).wait(0.0) <= LONGEST


def test_the_largest_file_can_be_read() -> None:
    known = memory()
    ips = [f"/ip6/2d00:{n}:3333:4444::1/tcp/1" for n in range(MAX_IPS)]
    for each in many(MAX_PEERS):
        known.recall(each, side(SYM, ips), side(SYM, ips), 0.0)
        known.failed(each, Cause.UNREACHED, "ü" * MAX_TEXT, 0.0)
    text = known.dump(0.0, WALL)
    assert len(text) < MAX_FILE
    assert memory().load(text, 0.0, WALL) == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format": 2, "peers": []}', '{"format": 1}', "[" * 9999]
)
def test_what_is_no_such_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        memory().load(text, 0.0, WALL)


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(ANYTHING, st.data())
def test_a_damaged_entry_is_left_out(value: Any, data: st.DataObject) -> None:
    known = memory()
    for each in (ALICE, BOB):
        known.recall(each, HERE, THERE, 0.0)
        known.failed(each, Cause.UNREACHED, "", 0.0)
    values = json.loads(known.dump(0.0, WALL))
    key = data.draw(st.sampled_from(sorted(values["peers"][0])))
    values["peers"][0][key] = value
    again = memory()
    left_out = again.load(json.dumps(values), 0.0, WALL)
    assert left_out in (0, 1)
    assert again.recall(BOB, HERE, THERE, 0.0).streak == 1
    again.dump(0.0, WALL)
    again.failed(ALICE, Cause.UNREACHED, "", 0.0)
