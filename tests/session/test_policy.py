"""By which path a session goes."""

from __future__ import annotations

import math

import pytest

from kas_libp2p.config import STEADY
from kas_libp2p.metadata import CircuitLimits, PathKind, PeerId
from kas_libp2p.session._policy import (
    AVOID,
    CHECK,
    DWELL,
    FORGIVEN,
    LEAST_TIME,
    MOST_TIME,
    PROOF,
    QUIET_RTT,
    WAITS,
    Candidate,
    Choice,
    PathPolicy,
    ends_soon,
)
from tests.relay.test_renewal_machine import limits

RELAY, OTHER = PeerId("relay"), PeerId("other relay")


def circuit(
    number: int = 1, left: CircuitLimits | None = None, *, rtt: float | None = 0.1, relay: PeerId = RELAY
) -> Candidate:
    return Candidate(number, PathKind.RELAYED, relay, rtt, 100.0, limits=limits() if left is None else left)


def direct(number: int = 2, *, age: float = 3.0, proven: bool = True, rtt: float | None = 0.05) -> Candidate:
    return Candidate(number, PathKind.PUNCHED, RELAY, rtt, age, proven)


def on(current: Candidate, now: float = 0.0, *, quiet: bool = False) -> PathPolicy:
    policy = PathPolicy(quiet=quiet)
    policy.moved(current, now)
    return policy


def choose(policy: PathPolicy, current: int | None, *candidates: Candidate, now: float) -> int | None:
    choice = policy.choose(current, candidates, now)
    return choice.number if choice is not None else None


def lose_early(policy: PathPolicy, times: int, now: float, *, lasted: float = 1.0) -> None:
    """Direct paths that come, are moved to, and go, in the last moments before `now`."""
    for index in reversed(range(times)):
        policy.moved(direct(100 + index), now - index - lasted)
        policy.lost(100 + index, now - index)


# What ends soon


@pytest.mark.parametrize(
    ("left", "soon"),
    [
        (limits(MOST_TIME + 1), ""),
        (limits(MOST_TIME), "10 min of the circuit's 2 h are left"),
        (limits(LEAST_TIME + 0.1, max_seconds=120), ""),
        (limits(LEAST_TIME, max_seconds=120), "15 s of the circuit's 2 min are left"),
        (limits(max_seconds=None), ""),
        (limits(max_bytes=131072, bytes_left=8193), ""),
        (limits(max_bytes=131072, bytes_left=8192), "8.2 kB of the circuit's 131 kB are left"),
        (None, ""),
    ],
)
def test_what_ends_soon(left: CircuitLimits | None, soon: str) -> None:
    assert ends_soon(left) == soon


# By taste


def test_a_proven_direct_path_is_preferred() -> None:
    policy = on(circuit())
    assert policy.choose(1, [circuit()], 100.0) is None
    assert policy.reason == "there is no direct path"
    assert policy.choose(1, [circuit(), direct()], 100.0) == Choice(2, "the direct path has proven itself", False)
    assert policy.reason == ""


def test_one_that_nobody_proves_is_taken_once_it_has_lived() -> None:
    policy = on(circuit())
    assert choose(policy, 1, circuit(), direct(proven=False, age=PROOF - 4), now=100.0) is None
    assert policy.reason == "the direct path is not proven yet"
    assert policy.look_at == 104.0
    assert choose(policy, 1, circuit(), direct(proven=False, age=PROOF), now=104.0) == 2


def test_a_direct_path_is_never_left_for_anything() -> None:
    policy = on(direct(rtt=3.0))
    others = [circuit(rtt=0.001), direct(3, rtt=0.001), circuit(4, limits(max_seconds=None))]
    assert choose(policy, 2, direct(rtt=3.0), *others, now=1000.0) is None
    assert policy.reason == "the path is direct"


def test_circuits_that_last_are_not_exchanged() -> None:
    policy = on(circuit(rtt=1.0))
    assert choose(policy, 1, circuit(rtt=1.0), circuit(2, limits(max_seconds=None), rtt=0.01), now=100.0) is None


def test_from_its_beginning_it_moves_at_once() -> None:
    assert choose(on(circuit(), now=100.0), 1, circuit(), direct(), now=100.0) == 2


def test_between_two_moves_it_stays_for_a_moment() -> None:
    policy = on(circuit(3))
    policy.moved(circuit(), 100.0)
    assert choose(policy, 1, circuit(), direct(), now=101.0) is None
    assert policy.reason == "it has just moved, and stays for 4.0 s"
    assert policy.look_at == 100.0 + DWELL
    assert choose(policy, 1, circuit(), direct(), now=policy.look_at) == 2


# Quiet


@pytest.mark.parametrize(
    ("here", "to", "reason"),
    [
        (circuit(rtt=QUIET_RTT), direct(rtt=0.01), "the relay's 50 ms are good enough"),
        (circuit(rtt=0.2), direct(rtt=0.21), "the direct path is no shorter: 210 ms"),
        (circuit(rtt=0.2), direct(rtt=0.19), ""),
        (circuit(rtt=0.2), direct(rtt=None), ""),
        (circuit(rtt=None), direct(), ""),
        (
            circuit(rtt=0.01, left=limits(max_bytes=131072)),
            direct(),
            "",
        ),  # one after the other
    ],
)
def test_who_prefers_quiet_leaves_a_circuit_that_is_as_good(here: Candidate, to: Candidate, reason: str) -> None:
    policy = on(here, quiet=True)
    assert choose(policy, 1, here, to, now=100.0) == (None if reason else 2)
    assert policy.reason == reason
    assert choose(on(here), 1, here, to, now=100.0) == 2, "others do not"


# Circuits that end


def test_a_circuit_that_ends_is_left_for_what_lasts() -> None:
    ending = circuit(1, limits(14.0, max_seconds=120))
    policy = on(ending)
    assert choose(policy, 1, ending, now=100.0) is None
    assert policy.reason == "14 s of the circuit's 2 min are left, and there is no other path yet"
    assert choose(policy, 1, ending, circuit(2, limits(10.0, max_seconds=120)), now=100.0) is None
    choice = policy.choose(1, [ending, circuit(2, limits(max_seconds=120))], 100.0)
    assert choice == Choice(2, "14 s of the circuit's 2 min are left", at_once=True)


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ((circuit(2), circuit(3, limits(100, max_seconds=120)), direct(4)), 4),
        ((circuit(2), circuit(3, limits(100, max_seconds=120)), direct(4, proven=False)), 2),
        ((circuit(2, rtt=0.3), circuit(3, rtt=0.2, relay=OTHER)), 3),
        ((circuit(2, rtt=None), circuit(3, rtt=0.2)), 3),
        ((circuit(2, limits(300.0)), circuit(3, limits(900.0))), 3),
        ((direct(4, proven=False),), None),
    ],
)
def test_the_best_of_what_lasts(others: tuple[Candidate, ...], best: int | None) -> None:
    ending = circuit(1, limits(10.0))
    assert choose(on(ending), 1, ending, *others, now=100.0) == best


def test_after_direct_paths_that_came_and_went_a_circuit_comes_first() -> None:
    ending = circuit(1, limits(10.0))
    policy = on(ending)
    lose_early(policy, 2, 100.0)
    policy.moved(ending, 100.0)
    assert choose(policy, 1, ending, direct(age=20), circuit(3), now=101.0) == 3
    assert choose(policy, 1, ending, direct(age=20), now=101.0) == 2


def test_it_looks_again_before_the_end_if_there_is_somewhere_to_go() -> None:
    here = circuit(1, limits(100.0, max_seconds=120))
    policy = on(here)
    assert choose(policy, 1, here, now=200.0) is None
    assert policy.look_at == math.inf
    assert choose(policy, 1, here, circuit(2), now=200.0) is None
    assert policy.look_at == 285.0
    counted = circuit(1, limits(max_bytes=131072))
    assert choose(policy, 1, counted, circuit(2), now=200.0) is None
    assert policy.look_at == 200.0 + CHECK


def test_it_looks_again_when_a_direct_path_counts_as_proven_though_the_circuit_ends() -> None:
    ending = circuit(1, limits(14.0, max_seconds=120))
    policy = on(ending)
    young = direct(age=PROOF - 2, proven=False)
    assert choose(policy, 1, ending, young, now=100.0) is None
    assert policy.look_at == pytest.approx(102.0)
    assert choose(policy, 1, circuit(1, limits(12.0, max_seconds=120)), direct(age=PROOF, proven=False), now=102.0) == 2


# Lost


@pytest.mark.parametrize(
    ("left", "best"),
    [
        ((circuit(1), direct(3)), 3),
        ((circuit(1), direct(3, proven=False)), 1),
        ((circuit(1, limits(5.0)), direct(3, proven=False)), 3),
        ((circuit(1, limits(5.0)),), 1),
        ((), None),
    ],
)
def test_the_best_of_what_is_there(left: tuple[Candidate, ...], best: int | None) -> None:
    policy = on(circuit(9))
    policy.lost(9, 100.0)
    choice = policy.choose(None, left, 100.0)
    assert (choice.number if choice is not None else None) == best
    assert choice is None or choice.at_once
    assert policy.reason == ("" if best else "there is no other path")


def test_what_hung_is_not_taken_again_at_once() -> None:
    policy = on(direct())
    policy.lost(2, 1000.0)
    assert choose(policy, None, direct(), now=1000.0) is None
    assert policy.reason == "what is there has just failed"
    assert policy.look_at == 1000.0 + AVOID
    assert choose(policy, None, direct(), circuit(), now=1000.0) == 1
    assert choose(policy, None, direct(), now=policy.look_at) == 2


def test_a_direct_path_that_it_could_not_move_to_is_no_secret() -> None:
    policy = on(circuit())
    policy.lost(2, 1000.0)
    assert choose(policy, 1, circuit(), direct(), now=1000.0) is None
    assert policy.reason == "the direct path has just failed"
    assert choose(policy, 1, circuit(), direct(), now=policy.look_at) == 2


def test_what_was_attached_to_after_all_is_good_again() -> None:
    policy = on(circuit())
    policy.lost(2, 1000.0)
    policy.moved(direct(), 1001.0)
    assert choose(policy, None, direct(), now=1001.0) == 2


def test_what_is_avoided_is_forgotten() -> None:
    policy = on(circuit())
    for number in range(1000):
        policy.lost(number, float(number))
    assert len(policy._avoided) <= AVOID + 1


# No flapping


@pytest.mark.parametrize("times", range(1, len(WAITS)))
def test_each_direct_path_that_is_lost_early_makes_the_next_one_wait(times: int) -> None:
    policy = PathPolicy()
    lose_early(policy, times, 1000.0)
    policy.moved(circuit(), 1000.0)
    assert choose(policy, 1, circuit(), direct(age=3.0), now=1010.0) is None
    assert "the last one was lost after 1.0 s" in policy.reason
    assert policy.look_at == pytest.approx(1010.0 + WAITS[times] - 3.0)
    at = policy.look_at
    if at - 1000.0 < FORGIVEN:
        assert choose(policy, 1, circuit(), direct(age=WAITS[times] - 1), now=at - 1) is None
    assert choose(policy, 1, circuit(), direct(age=WAITS[times]), now=at) == 2


def test_more_of_them_do_not_matter() -> None:
    policy = PathPolicy()
    lose_early(policy, 100, 1000.0)
    assert policy._wait() == WAITS[-1]


def test_one_that_lasted_is_no_early_loss() -> None:
    policy = on(direct(), now=0.0)
    policy.lost(2, STEADY)
    assert policy._wait() == 0.0
    policy = on(direct(), now=0.0)
    policy.lost(2, STEADY - 1)
    assert policy._wait() == WAITS[1]


def test_what_lasting_means_is_a_setting() -> None:
    policy = PathPolicy(steady=STEADY / 100)
    lose_early(policy, 2, 1000.0, lasted=STEADY / 100 - 0.1)
    assert policy._wait() == WAITS[2] / 100
    policy.choose(1, [circuit(), direct()], 1000.0 + FORGIVEN / 100)
    assert policy._wait() == WAITS[1] / 100
    policy = PathPolicy(steady=STEADY / 100)
    policy.moved(direct(), 2000.0)
    policy.lost(2, 2000.0 + STEADY / 100)
    assert policy._wait() == 0.0


def test_one_is_forgiven_per_hour() -> None:
    policy = PathPolicy()
    lose_early(policy, 3, 1000.0)
    for hours, left in ((0, 3), (0.9, 3), (1, 2), (2, 1), (3, 0), (9, 0)):
        policy.choose(1, [circuit()], 1000.0 + hours * FORGIVEN)
        assert policy._wait() == WAITS[left]


def test_that_the_other_side_left_a_direct_path_counts_too() -> None:
    """It has seen it hang, and we have not yet."""
    policy = on(direct(), now=100.0)
    policy.moved(circuit(), 160.0)
    assert choose(policy, 1, circuit(), direct(age=9.0), now=166.0) is None
    assert policy.reason == "the direct path has to live for 1.0 s more: the last one was lost after 60 s"
    policy.lost(2, 170.0)
    assert policy._wait() == WAITS[1], "not twice"


# The spare


def test_no_circuit_is_kept_beside_a_direct_path() -> None:
    policy = on(direct(), now=100.0)
    assert choose(policy, 2, direct(), circuit(4), circuit(5, rtt=0.01), now=101.0) is None
    assert policy.spare is None, "the place on the relay is the spare"


def test_a_direct_path_that_has_to_wait_is_kept() -> None:
    policy = PathPolicy()
    lose_early(policy, 3, 1000.0)
    policy.moved(circuit(), 1000.0)
    assert choose(policy, 1, circuit(), circuit(3), direct(), now=1010.0) is None
    assert policy.spare == 2
    policy.choose(1, [circuit(), circuit(3)], 1010.0)
    assert policy.spare is None


def test_without_a_path_there_is_no_spare() -> None:
    policy = PathPolicy()
    assert choose(policy, None, circuit(1), circuit(2), now=0.0) == 1
    assert policy.spare is None
