"""The choice of relays, rule by rule; and the shell that feeds it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.config import RelayConfig
from kas_libp2p.errors import ConfigError, DialError, KasError, RelayRefused, RemoteProtocolError
from kas_libp2p.events import EventBus, FileDamaged, ReservationMade
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._pool import (
    ASK_PATIENCE,
    ASK_PAUSE,
    ASK_TIMEOUT,
    EARLY,
    ENOUGH,
    HEARD_WAIT,
    LONGEST_ALONE,
    LONGEST_CONFIGURED,
    MAX_ADDRESSES,
    MAX_CANDIDATES,
    MAX_OPERATOR,
    MAX_PER_NETWORK,
    MAX_PER_TELLER,
    MAX_SAVED,
    PART_PATIENCE,
    RETRY_PATIENCE,
    ROTATION,
    TTL,
    UPGRADE_INTERVAL,
    WAITS,
    Appetite,
    Cause,
    Place,
    Pool,
    Relay,
    Source,
    Told,
    network_of,
)
from kas_libp2p.relay.pool import SAVE_DELAY, Probe, RelayPool
from kas_libp2p.statefile import MAX_FILE
from tests.relay.test_pool_simulation import peer

A, B, C, D, E = map(peer, range(5))
WALL = 1.8e9


def at(number: int) -> str:
    return f"/ip4/20.{number}.0.1/tcp/16117"


def pool_of(*peers: PeerId, target: int = 2, rtt: float = 0.02) -> Pool:
    """Candidates that were met and measured, each in a network of its own."""
    pool = Pool(target=target, dice=Random(0))
    for number, each in enumerate(peers):
        pool.add(each, [at(number)], Source.MET, 0.0)
        pool.probed(each, rtt * (number + 1), at(number), 0.0)
    return pool


def reserve(pool: Pool, *peers: PeerId, now: float = 0.0, max_bytes: int | None = None) -> None:
    for each in peers:
        pool.reserved(each, now, max_bytes=max_bytes, max_seconds=None)


def standing(*peers: PeerId, target: int = 2) -> Pool:
    """All places are there, and have proved themselves by now = EARLY."""
    pool = pool_of(*peers, target=target)
    pool.update(0.0, ())
    reserve(pool, *peers[:target])
    pool.update(EARLY, ())
    assert pool.hold == peers[:target]
    return pool


def place_of(pool: Pool, peer: PeerId, now: float = 0.0) -> Place:
    return next(each.place for each in pool.status(now) if each.peer == peer)


# Candidates


def test_nobody_is_asked_before_a_probe_has_measured_it() -> None:
    pool = Pool(target=1, dice=Random(0))
    pool.add(A, [at(0)], Source.HEARD, 0.0, teller=B)
    assert pool.update(0.0, ()) == (A,)
    assert pool.hold == ()
    pool.probed(A, 0.1, at(0), 0.5)
    pool.update(0.5, ())
    assert pool.hold == (A,)


def test_who_was_only_heard_of_is_left_alone_while_strangers_are_needed() -> None:
    pool = Pool(target=1, dice=Random(0), hearsay_from=15.0)
    pool.add(A, [at(0)], Source.HEARD, 1.0, teller=B)
    assert pool.update(1.0, ()) == ()
    assert pool.deadline == 15.0
    pool.add(C, [at(1)], Source.MET, 2.0)
    assert pool.update(2.0, ()) == (C,)
    pool.probe_failed(C, Cause.NO_RELAY, "none", 3.0)
    assert pool.update(15.0, ()) == (A,)


def test_the_operators_relays_are_asked_at_once() -> None:
    pool = Pool(target=1, dice=Random(0))
    pool.add(A, [at(0)], Source.CONFIGURED, 0.0)
    pool.update(0.0, ())
    assert pool.hold == (A,)
    assert pool.addresses_of(A) == (at(0),)


def test_the_operators_relays_come_before_better_ones() -> None:
    pool = pool_of(A, B, target=1)
    pool.add(C, [at(9)], Source.CONFIGURED, 0.0)
    pool.probed(C, 2.0, at(9), 0.0)
    pool.update(0.0, ())
    assert pool.hold == (C,)


def test_hearsay_changes_nothing_of_what_is_known() -> None:
    pool = pool_of(A)
    assert pool.add(A, ["/ip4/66.6.6.6/tcp/6"], Source.HEARD, 1.0, teller=E, operator="evil", capacity=10**6)
    assert pool.addresses_of(A) == (at(0),)
    assert pool.status(1.0)[0].operator == ""


def test_hearsay_of_an_operator_ends_where_the_relay_speaks_for_itself() -> None:
    """Else a liar could tie relays together that have nothing in common."""
    pool = pool_of(A, target=2)
    pool.said(A, "Relays Ltd", 5, 0.0)
    pool.add(B, [at(1)], Source.HEARD, 0.0, teller=E, operator="Relays Ltd")
    pool.said(B, "who?", 1, 0.0)  # nobody has met it
    assert next(each.operator for each in pool.status(0.0) if each.peer == B) == "Relays Ltd"
    pool.probed(B, 0.1, at(1), 0.0)
    status = next(each for each in pool.status(0.0) if each.peer == B)
    assert (status.operator, status.source, status.teller) == ("", Source.MET, E)
    pool.update(0.0, ())
    assert set(pool.hold) == {A, B}


def test_a_wrong_address_does_not_hide_a_relay() -> None:
    pool = Pool(target=1, dice=Random(0))
    assert pool.add(A, ["/ip4/66.6.6.6/tcp/6", "/ip4/66.7.6.6/tcp/6", at(3)], Source.HEARD, 0.0, teller=E)
    assert pool.update(0.0, ()) == (A,)
    pool.probe_failed(A, Cause.UNREACHABLE, "refused", 1.0)
    pool.add(A, [at(4)], Source.HEARD, 2.0, teller=E)
    assert pool.update(10.0, ()) == ()
    pool.add(A, [at(0)], Source.HEARD, 11.0, teller=B)
    assert pool.update(11.0, ()) == (A,)
    assert set(pool.addresses_of(A)) == {at(0), "/ip4/66.6.6.6/tcp/6", "/ip4/66.7.6.6/tcp/6"}
    for number in range(50):
        pool.add(
            A,
            [f"/ip4/77.{number}.0.1/tcp/1", f"/ip4/78.{number}.0.1/tcp/1"],
            Source.HEARD,
            12.0,
            teller=peer(900 + number),
        )
    assert at(0) in pool.addresses_of(A)
    assert len(pool.addresses_of(A)) <= MAX_ADDRESSES


def test_where_others_say_a_relay_is_is_tried_though_it_is_told_while_a_wrong_address_is_tried() -> None:
    pool = Pool(target=1, dice=Random(0))
    pool.add(A, ["/ip4/66.6.6.6/tcp/6"], Source.HEARD, 0.0, teller=E)
    assert pool.update(0.0, ()) == (A,)
    pool.add(A, [at(0)], Source.HEARD, 1.0, teller=B)
    assert pool.update(1.0, ()) == ()
    pool.probe_failed(A, Cause.UNREACHABLE, "refused", 2.0)
    assert pool.update(2.0, ()) == (A,)
    assert at(0) in pool.addresses_of(A)
    pool.probe_failed(A, Cause.UNREACHABLE, "refused", 3.0)
    assert pool.update(100.0, ()) == ()
    assert pool.update(1.3 * HEARD_WAIT, ()) == (A,)
    pool.probe_failed(A, Cause.UNREACHABLE, "refused", 1.3 * HEARD_WAIT)
    assert pool.update(1.3 * HEARD_WAIT + 100, ()) == ()


def test_a_relay_that_comes_by_itself_is_not_left_alone_for_where_others_said_it_is() -> None:
    pool = Pool(target=1, dice=Random(0))
    pool.add(A, ["/ip4/66.6.6.6/tcp/6"], Source.HEARD, 0.0, teller=E)
    assert pool.update(0.0, ()) == (A,)
    pool.probe_failed(A, Cause.UNREACHABLE, "refused", 1.0)
    pool.add(A, [at(0)], Source.MET, 2.0, remote=at(0))
    assert pool.status(2.0)[0].reason == ""
    assert pool.update(2.0, ()) == (A,)


@pytest.mark.parametrize("alone", [True, False])
def test_an_address_that_is_no_relays_is_knocked_at_seldom(alone: bool) -> None:
    pool = Pool(target=1, dice=Random(0)) if alone else standing(B, target=1)
    start = 0.0 if alone else EARLY
    knocks = []
    now = start
    while now < start + 24 * 3600:
        pool.add(A, [at(7)], Source.HEARD, now, teller=E)  # again and again
        for each in pool.update(now, ()):
            if each == A:
                knocks.append(now)
                pool.probe_failed(A, Cause.UNREACHABLE, "refused", now)
            else:
                pool.probed(B, 0.02, at(0), now)
        now += 10
    assert 3 <= len(knocks) <= 20
    assert min(after - before for before, after in itertools.pairwise(knocks)) >= 0.8 * HEARD_WAIT


def test_who_is_a_relay_again_waits_no_longer() -> None:
    pool = pool_of(A, target=1)
    pool.probe_failed(A, Cause.NO_RELAY, "says that it is no relay", 0.0)
    pool.update(1.0, ())
    assert pool.hold == ()
    pool.add(A, [at(0)], Source.HEARD, 2.0, teller=B)
    pool.update(2.0, ())
    assert pool.hold == ()
    pool.add(A, [at(0)], Source.MET, 3.0)
    pool.update(3.0, ())
    assert pool.hold == (A,)


def test_a_network_has_few_candidates_that_nobody_has_reached() -> None:
    pool = Pool(target=1, dice=Random(0))
    taken = [
        pool.add(peer(n), [f"/ip4/20.5.{n}.1/tcp/1"], Source.HEARD, 0.0, teller=peer(1000 + n)) for n in range(100)
    ]
    assert sum(taken) == MAX_PER_NETWORK
    assert pool.add(A, ["/ip4/20.6.0.1/tcp/1"], Source.HEARD, 0.0, teller=B)


def claims(number: int) -> list[str]:
    return [f"/ip4/{30 + number % 100}.{number // 100}.0.1/tcp/1"]


def test_a_crowd_that_comes_from_one_network_is_probed_a_few_at_a_time() -> None:
    pool = Pool(target=1, dice=Random(0))
    crowd = [peer(1000 + number) for number in range(2 * MAX_PER_NETWORK)]
    taken = [
        pool.add(each, claims(number), Source.MET, 0.0, remote=f"/ip4/66.6.0.{number}/tcp/50000")
        for number, each in enumerate(crowd)
    ]
    assert taken == [True] * MAX_PER_NETWORK + [False] * MAX_PER_NETWORK
    assert pool.add(A, [at(0)], Source.MET, 0.0, remote=at(0))
    pool.probed(crowd[0], 0.1, "/ip4/66.6.0.0/tcp/50000", 0.0)
    assert pool.add(crowd[-1], claims(0), Source.MET, 0.0, remote="/ip4/66.6.0.1/tcp/50000")


def test_a_crowd_that_comes_from_one_network_crowds_out_itself() -> None:
    honest = [peer(number) for number in range(20)]
    pool = pool_of(*honest, rtt=0.1)
    for number in range(MAX_CANDIDATES):
        each = peer(1000 + number)
        assert pool.add(each, claims(number), Source.MET, 1.0, remote="/ip4/66.6.0.1/tcp/50000")
        pool.probed(each, 0.001, "/ip4/66.6.0.1/tcp/50000", 1.0)
    known = {each.peer for each in pool.status(1.0)}
    assert known >= set(honest)
    assert len(known) == MAX_CANDIDATES


def test_tellers_of_one_network_have_room_for_a_few_in_all() -> None:
    pool = Pool(target=1, dice=Random(0))
    taken = [
        pool.add(
            peer(n),
            [f"/ip4/{n // 250 + 1}.{n % 250}.0.1/tcp/1"],
            Source.HEARD,
            0.0,
            teller=peer(9000 + n),
            origin="66.6",
        )
        for n in range(1000)
    ]
    assert sum(taken) == MAX_PER_TELLER
    assert pool.add(A, [at(0)], Source.HEARD, 0.0, teller=B, origin="20.0")


def test_a_full_pool_forgets_whom_the_loudest_told_of() -> None:
    pool = Pool(target=1, dice=Random(0))
    for n in range(MAX_CANDIDATES):
        loud = n < 30
        assert pool.add(
            peer(n),
            [f"/ip4/{n // 250 + 1}.{n % 250}.0.1/tcp/1"],
            Source.HEARD,
            0.0,
            teller=peer(1 if loud else 2000 + n),
        )
    assert not pool.add(peer(5000), ["/ip4/99.1.0.1/tcp/1"], Source.HEARD, 0.0, teller=peer(1))
    assert pool.add(peer(5000), ["/ip4/99.1.0.1/tcp/1"], Source.HEARD, 0.0, teller=peer(9999))
    assert pool.add(peer(5001), ["/ip4/99.2.0.1/tcp/1"], Source.MET, 0.0)
    told = {each.peer for each in pool.status(0.0)}
    assert len(told) == MAX_CANDIDATES
    assert sum(peer(n) in told for n in range(30)) == 28
    pool.add(peer(5002), ["/ip4/99.3.0.1/tcp/1"], Source.CONFIGURED, 0.0)
    assert peer(5002) in {each.peer for each in pool.status(0.0)}


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("/ip4/20.1.2.3/tcp/1", "20.1.0.0/16"),
        ("/ip6/2001:db8:1:2::3/tcp/1", "2001:db8:1::/48"),
        ("/ip4/127.0.0.1/tcp/1", None),
        ("/ip6/::1/tcp/1", None),
        ("/dns4/relay.example.org/tcp/1", None),
    ],
)
def test_networks(address: str, network: str | None) -> None:
    assert network_of(address) == network


# Diversity


def test_never_two_of_one_network() -> None:
    pool = Pool(target=2, dice=Random(0))
    for n, each in enumerate((A, B)):
        pool.add(each, [f"/ip4/20.1.{n}.1/tcp/1"], Source.CONFIGURED, 0.0)
    pool.update(0.0, ())
    assert len(pool.hold) == 1


def test_never_two_of_one_operator() -> None:
    pool = pool_of(A, B)
    for each in (A, B):
        pool.add(each, [], Source.MET, 0.0, operator="Relays Ltd")
    pool.update(0.0, ())
    assert pool.hold == (A,)


def of_one_operator(*peers: PeerId, target: int = 2) -> Pool:
    """Places that stand when the first two turn out to have one operator."""
    pool = standing(*peers, target=target)
    for each, name in ((A, "Relays Ltd"), (B, " relays LTD")):
        pool.said(each, name, None, EARLY)
    return pool


def test_an_operator_that_is_learnt_late_is_left_once_another_place_is_there() -> None:
    pool = of_one_operator(A, B, C)
    pool.update(EARLY, ())
    assert set(pool.hold) == {A, B, C}  # C is asked
    pool.update(EARLY + 1, ())
    assert set(pool.hold) == {A, B, C}
    reserve(pool, C, now=EARLY + 2)
    pool.update(EARLY + 2, ())
    assert set(pool.hold) == {A, C}


def test_or_as_soon_as_nobody_else_can_be_had() -> None:
    pool = of_one_operator(A, B)
    pool.update(EARLY, ())
    assert pool.hold == (A,)
    pool = of_one_operator(A, B, C)
    pool.update(EARLY, ())
    pool.failed(C, Cause.FULL, "RESERVATION_REFUSED", EARLY + 1)
    pool.update(EARLY + 1, ())
    assert pool.hold == (A,)


def test_or_when_others_do_not_answer() -> None:
    pool = of_one_operator(A, B, *map(peer, range(10, 60)))
    now = EARLY
    while B in pool.hold or now == EARLY:
        pool.update(now, ())
        now = max(pool.deadline, now + 0.1)
    assert PART_PATIENCE <= now - EARLY <= PART_PATIENCE + 10
    assert A in pool.hold


def test_but_not_while_a_circuit_runs_through_it() -> None:
    pool = of_one_operator(A, B, C)
    pool.update(EARLY, (B,))
    reserve(pool, C, now=EARLY + 1)
    for seconds in (1, 100, 1000):
        pool.update(EARLY + seconds, (B,))
        assert set(pool.hold) == {A, B, C}
    pool.update(EARLY + 1001, ())
    assert set(pool.hold) == {A, C}


def test_an_operator_that_is_learnt_before_the_answer_costs_nothing() -> None:
    pool = Pool(target=2, dice=Random(0))
    for n, each in enumerate((A, B)):
        pool.add(each, [at(n)], Source.CONFIGURED, 0.0)
    pool.update(0.0, ())
    reserve(pool, A)
    for each in (A, B):
        pool.said(each, "Relays Ltd", None, 0.0)
    pool.update(0.1, ())
    assert pool.hold == (A,)


def test_two_operators_after_all() -> None:
    pool = of_one_operator(A, B, C)
    pool.update(EARLY, ())
    pool.said(B, "Others Ltd", None, EARLY + 1)
    pool.failed(C, Cause.FULL, "RESERVATION_REFUSED", EARLY + 1)
    pool.update(EARLY + 1, ())
    assert pool.hold == (A, B)


def test_one_teller_s_word_does_not_lead_to_all_places() -> None:
    pool = Pool(target=3, dice=Random(0))
    fast, slow = [peer(number) for number in range(10, 20)], peer(20)
    for number, each in enumerate(fast):
        pool.add(each, [at(number)], Source.HEARD, 0.0, teller=E, origin="66.6")
        pool.probed(each, 0.001, at(number), 0.0)
    pool.add(slow, [at(77)], Source.HEARD, 0.0, teller=D, origin="20.0")
    pool.probed(slow, 0.3, at(77), 0.0)
    pool.update(0.0, ())
    assert len(pool.hold) == 3
    assert slow in pool.hold
    pool.failed(slow, Cause.FULL, "RESERVATION_REFUSED", 1.0)
    pool.update(1.0, ())
    assert len(set(pool.hold) & set(fast)) == 3  # better than an empty place


def test_two_that_turn_out_to_be_of_one_network_are_parted() -> None:
    """A name does not say where it leads; the connection does."""
    pool = Pool(target=2, dice=Random(0))
    for n, each in enumerate((A, B)):
        pool.add(each, [f"/dns4/relay{n}.example.org/tcp/1"], Source.CONFIGURED, 0.0)
    pool.update(0.0, ())
    assert set(pool.hold) == {A, B}
    reserve(pool, A, B)
    for n, each in enumerate((A, B)):
        pool.probed(each, 0.1 * (n + 1), f"/ip4/20.1.0.{n}/tcp/1", 1.0)
    pool.update(1.0, (B,))
    assert set(pool.hold) == {A, B}  # a circuit runs through it
    pool.update(2.0, ())
    assert pool.hold == (A,)


# Holding


def test_a_slow_one_gets_company_and_the_surplus_is_let_go() -> None:
    pool = pool_of(A, B, target=1)
    pool.update(0.0, ())
    assert pool.hold == (A,)
    assert pool.deadline <= ASK_PATIENCE
    pool.update(ASK_PATIENCE, ())
    assert pool.hold == (A, B)
    reserve(pool, B, now=3.0)
    pool.update(3.0, ())
    assert pool.hold == (B,)


def test_one_that_is_asked_and_says_that_it_is_no_relay_is_given_up_at_once() -> None:
    pool = pool_of(A, B, target=1)
    pool.update(0.0, ())
    pool.probe_failed(A, Cause.NO_RELAY, "says that it is no relay", 0.1)
    pool.update(0.1, ())
    assert pool.hold == (B,)


def test_a_silent_one_is_given_up() -> None:
    pool = pool_of(A, target=1)
    pool.update(0.0, ())
    pool.update(ASK_TIMEOUT, ())
    assert pool.hold == ()
    (status,) = pool.status(ASK_TIMEOUT)
    assert "no answer" in status.reason
    assert 0 < status.wait <= LONGEST_ALONE * 1.2


def test_a_lost_place_is_tried_again_and_soon_made_elsewhere() -> None:
    pool = standing(A, B, C)
    pool.lost(A, "the connection was reset", EARLY + 1)
    pool.update(EARLY + 1, ())
    assert set(pool.hold) == {A, B}
    pool.update(EARLY + 1 + RETRY_PATIENCE, ())
    assert set(pool.hold) == {A, B, C}
    pool.failed(A, Cause.UNREACHABLE, "refused", EARLY + 1.5)
    pool.update(EARLY + 2, ())
    assert set(pool.hold) == {B, C}


def test_who_takes_and_drops_waits_longer_each_time() -> None:
    pool = pool_of(A, B, target=1)
    waits = []
    now = 0.0
    for _ in range(4):
        pool.update(now, ())
        reserve(pool, *pool.hold, now=now)
        held = pool.hold[0]
        pool.lost(held, "closed", now + 5)
        status = next(each for each in pool.status(now + 5) if each.peer == held)
        waits.append(status.wait)
        now += 5 + max(each.wait for each in pool.status(now + 5))
    first, _ = WAITS[Cause.DROPPED]
    assert waits[0] < 1.2 * first
    assert waits[-1] > 1.5 * first


def test_whose_line_came_and_went_is_asked_again_at_once_each_time() -> None:
    pool = standing(A, B, target=2)
    for now in range(50, 400, 50):
        for each in (A, B):
            pool.lost(each, "it did not answer", float(now), broke=True)
        assert {*pool.hold} == {A, B}
        assert [each.wait for each in pool.status(float(now))] == [0.0, 0.0]
        reserve(pool, A, B, now=now + 1.0)


def test_a_failure_while_we_hold_nothing_is_held_against_nobody() -> None:
    pool = pool_of(A, target=1)
    score = pool.status(0.0)[0].score
    for now in range(0, 6000, 100):
        pool.update(float(now), ())
        pool.failed(A, Cause.UNREACHABLE, "network is unreachable", float(now))
        assert pool.status(float(now))[0].wait <= LONGEST_ALONE * 1.2
    assert pool.status(6000.0)[0].score == pytest.approx(score)


def test_an_outage_of_days_makes_us_forget_nobody_and_a_dead_relay_is_forgotten() -> None:
    pool = standing(A, B, target=1)
    pool.lost(A, "the connection was reset", EARLY + 1)
    now = EARLY + 1
    while now < 3 * TTL:
        for each in pool.update(now, ()):
            pool.probe_failed(each, Cause.UNREACHABLE, "network is unreachable", now)
        for each in pool.hold:
            pool.failed(each, Cause.UNREACHABLE, "network is unreachable", now)
        now += 1800
    assert {each.peer for each in pool.status(now)} == {A, B}
    pool.update(now, ())
    reserve(pool, *pool.hold, now=now)
    (held,) = pool.hold
    for _ in range(2):
        for each in pool.update(now, ()):
            pool.probed(each, 0.02, at(0), now) if each == held else pool.probe_failed(each, Cause.UNREACHABLE, "", now)
        now += 2 * TTL
    assert {each.peer for each in pool.status(now)} == {held}


def test_an_outage_costs_a_few_dials_a_minute_and_its_end_is_noticed_soon() -> None:
    pool = pool_of(*map(peer, range(100)), target=3, rtt=0.001)
    now, dials = 0.0, 0
    while now < 3600:
        for each in pool.update(now, ()):
            pool.probe_failed(each, Cause.UNREACHABLE, "network is unreachable", now)
        for each in pool.hold:
            dials += now > 60
            pool.failed(each, Cause.UNREACHABLE, "network is unreachable", now)
        now = max(pool.deadline, now + 0.01)
    assert 0 < dials < 3600 / ASK_PAUSE + 10
    pool.network_changed(now)
    pool.update(now, ())
    assert len(pool.hold) == 3


def test_the_operators_relay_never_waits_long() -> None:
    pool = standing(A, target=1)
    pool.add(B, [at(7)], Source.CONFIGURED, EARLY)
    for n in range(12):
        pool.target = 2
        now = EARLY + n * 1000.0
        pool.update(now, ())
        pool.failed(B, Cause.FULL, "RESERVATION_REFUSED", now)
        assert next(each for each in pool.status(now) if each.peer == B).wait <= LONGEST_CONFIGURED * 1.2


def test_all_is_let_go_when_nothing_is_wanted_but_what_is_in_use() -> None:
    pool = standing(A, B)
    pool.target = 0
    assert pool.update(EARLY + 1, (B,)) == ()
    assert pool.hold == (B,)
    pool.update(EARLY + 10, ())
    assert pool.hold == ()
    assert pool.deadline == float("inf")


def test_a_place_that_is_not_renewed_stays_until_there_is_another() -> None:
    pool = standing(A, B, target=1)
    pool.failed(A, Cause.FULL, "RESERVATION_REFUSED", EARLY + 1)
    pool.update(EARLY + 1, ())
    assert pool.hold == (A, B)
    pool.reserved(A, EARLY + 5, max_bytes=None, max_seconds=None)
    pool.update(EARLY + 5, ())
    assert pool.hold == (A,)
    pool.failed(A, Cause.FULL, "RESERVATION_REFUSED", EARLY + 6)
    pool.update(EARLY + 6, ())
    reserve(pool, B, now=EARLY + 7)
    pool.update(EARLY + 7, ())
    assert pool.hold == (A, B)
    pool.lost(A, "it was not renewed in time", EARLY + 100)
    pool.update(EARLY + 100, ())
    assert pool.hold == (B,)


# Turning over


def test_a_clearly_better_one_replaces_the_worst_once_it_has_proved_itself() -> None:
    pool = pool_of(A, target=1, rtt=0.4)
    pool.update(0.0, ())
    reserve(pool, A)
    pool.add(B, [at(5)], Source.MET, 1.0)
    pool.probed(B, 0.02, at(5), 1.0)
    pool.update(1.0, ())
    assert pool.hold == (A,)
    now = UPGRADE_INTERVAL + 1
    pool.update(now, ())
    assert set(pool.hold) == {A, B}
    reserve(pool, B, now=now)
    pool.update(now + 1, ())
    assert set(pool.hold) == {A, B}
    pool.update(now + EARLY, (A,))
    assert set(pool.hold) == {A, B}  # a circuit runs through the old one
    pool.update(now + EARLY + 60, ())
    assert pool.hold == (B,)


def test_the_old_one_stays_if_the_new_one_fails() -> None:
    pool = standing(A, B, target=1)
    now = 2 * ROTATION
    pool.update(now, ())
    assert set(pool.hold) == {A, B}
    pool.failed(B, Cause.FULL, "RESERVATION_REFUSED", now + 1)
    pool.update(now + 1, ())
    assert pool.hold == (A,)
    assert not next(each for each in pool.status(now) if each.peer == A).leaving


def test_the_old_one_stays_if_the_new_one_gives_little() -> None:
    pool = standing(A, B, target=1)
    now = 2 * ROTATION
    pool.update(now, ())
    reserve(pool, B, now=now + 1, max_bytes=128 * 1024)
    pool.update(now + 1, ())
    assert pool.hold == (A,)


def test_a_rotation_needs_somebody_else() -> None:
    pool = standing(A, target=1)
    pool.update(3 * ROTATION, ())
    assert pool.hold == (A,)


def test_who_was_rotated_out_is_not_rotated_in_at_once() -> None:
    pool = standing(A, B, target=1)
    pool.probed(B, 0.2, at(1), EARLY)  # good enough for a rotation, and so much worse that A would be taken back
    now = 1.2 * ROTATION
    pool.update(now, ())
    reserve(pool, B, now=now)
    pool.update(now + EARLY, ())
    assert pool.hold == (B,)
    pool.update(now + EARLY + UPGRADE_INTERVAL, ())
    assert pool.hold == (B,)
    pool.lost(B, "closed", now + EARLY + UPGRADE_INTERVAL + 1)
    pool.update(now + EARLY + UPGRADE_INTERVAL + 10, ())
    assert A in pool.hold  # better than nobody


def test_no_relay_is_rotated_out_while_a_circuit_runs_through_it() -> None:
    pool = standing(A, B, target=1)
    pool.update(2 * ROTATION, (A,))
    assert pool.hold == (A,)


# Score


unit = st.floats(0, 1)
counts = st.floats(0, 1000)


@given(rtt=st.floats(0, 10), good=counts, bad=counts, hours=counts, more=st.floats(0.01, 100))
def test_the_score_goes_the_right_way_and_is_bounded(
    rtt: float, good: float, bad: float, hours: float, more: float
) -> None:
    def score(**changes: float) -> float:
        values: dict[str, Any] = {"rtt": rtt, "good": good, "bad": bad, "hours": hours, **changes}
        return Relay(A, Source.MET, (at(0),), 0.0, **values).score(0.0)

    assert 0 < score() <= 1
    assert score(rtt=rtt + more) < score()
    assert score(bad=bad + more) < score()
    assert score(good=good + more) >= score()
    assert score(hours=hours + more) >= score()


def test_what_a_relay_says_of_itself_moves_its_score_by_little() -> None:
    def score(capacity: int | None) -> float:
        return Relay(A, Source.HEARD, (at(0),), 0.0, rtt=0.1, capacity=capacity).score(0.0)

    assert score(None) == score(0) < score(10) < score(10**9) < 1.12 * score(None)


# Telling and asking others


def test_told_is_on_whom_we_have_held_a_place_and_where_we_reached_it() -> None:
    pool = pool_of(A, B, C, D, target=2)
    pool.add(E, [at(9)], Source.HEARD, 0.0, teller=A)
    assert pool.tell(0.0) == ()
    pool.update(0.0, ())
    reserve(pool, A, B)
    pool.said(A, "Relays Ltd", 7, 1.0)
    assert pool.tell(2.0) == (Told(A, (at(0),), "Relays Ltd", 7), Told(B, (at(1),)))
    pool.probed(B, 0.04, "/ip6/2a00::1/tcp/1", 3.0)
    pool.probed(B, 0.04, "/ip4/66.6.6.6/tcp/50000", 3.0, dialed=False)
    assert pool.tell(3.0)[1].addresses == ("/ip6/2a00::1/tcp/1", at(1))
    pool.failed(A, Cause.FULL, "RESERVATION_REFUSED", 4.0)
    pool.lost(A, "closed", 600.0)
    pool.update(610.0, ())
    pool.failed(A, Cause.UNREACHABLE, "refused", 620.0)
    assert [each.peer for each in pool.tell(620.0)] == [B]


def test_who_was_given_up_is_told_with_its_age() -> None:
    pool = standing(A, B, target=1)
    pool.target = 0
    pool.update(EARLY + 10, ())
    (told,) = pool.tell(EARLY + 100)
    assert (told.peer, told.age) == (A, EARLY + 100)


def test_appetite() -> None:
    pool = Pool(target=0, dice=Random(0))
    assert pool.appetite(0.0) is Appetite.NONE
    pool.target = 2
    assert pool.appetite(0.0) is Appetite.HUNGRY
    pool = standing(A, B, C)
    assert pool.appetite(EARLY) is Appetite.HUNGRY  # one in reserve is not enough
    pool = standing(A, B, C, D)
    assert pool.appetite(EARLY) is Appetite.SOME
    pool.lost(A, "closed", EARLY)
    pool.lost(A, "closed", EARLY)
    pool.update(EARLY + RETRY_PATIENCE, ())
    pool.failed(A, Cause.FULL, "RESERVATION_REFUSED", EARLY + RETRY_PATIENCE)
    assert pool.appetite(EARLY + RETRY_PATIENCE) is Appetite.HUNGRY
    many = pool_of(*map(peer, range(ENOUGH)), target=1)
    many.update(0.0, ())
    reserve(many, *many.hold)
    assert many.appetite(0.0) is Appetite.NONE


def test_many_relays_of_one_operator_leave_us_hungry() -> None:
    pool = pool_of(*map(peer, range(20)), target=2)
    for each in map(peer, range(20)):
        pool.said(each, "Relays Ltd", None, 0.0)
    pool.update(0.0, ())
    reserve(pool, *pool.hold)
    assert len(pool.hold) == 1
    assert pool.appetite(0.0) is Appetite.HUNGRY


# Remembering


def test_what_is_saved_is_loaded() -> None:
    pool = standing(A, B, C)
    pool.add(C, [], Source.MET, EARLY, operator="Relays Ltd")
    pool.probe_failed(C, Cause.FULL, "RESERVATION_REFUSED", EARLY)
    text = pool.dump(EARLY + 10, WALL)
    again = Pool(target=2, dice=Random(1))
    assert again.load(text, 5.0, WALL + 5) == 0
    assert again.add(peer(77), [at(77)], Source.MET, 5.0)
    again.probed(peer(77), 0.001, at(77), 5.0)
    again.update(5.0, ())
    assert set(again.hold) == {A, B}  # and not the newcomer, although it has the best score
    before = {each.peer: each for each in pool.status(EARLY + 15)}
    for each in again.status(5.0):
        if each.peer == peer(77):
            continue
        old = before[each.peer]
        assert (each.addresses, each.rtt, each.operator, each.reason) == (
            old.addresses,
            old.rtt,
            old.operator,
            old.reason,
        )
        assert each.wait == pytest.approx(old.wait, abs=2)
        assert each.score == pytest.approx(old.score, rel=0.01)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.data())
def test_a_damaged_file_is_refused_and_a_damaged_entry_left_out(value: Any, data: st.DataObject) -> None:
    pool = Pool(target=1, dice=Random(0))
    for text in (json.dumps(value), json.dumps({"format": 1, "relays": value})):
        try:
            assert pool.load(text, 0.0, WALL) >= 0
        except ValueError as error:
            assert str(error)  # noqa: PT017
    saved = json.loads(standing(A, B).dump(EARLY, WALL))
    key = data.draw(st.sampled_from(sorted(saved["relays"][0])))
    saved["relays"][0][key] = value
    assert pool.load(json.dumps(saved), 0.0, WALL) <= 1
    pool.update(0.0, ())
    json.loads(pool.dump(0.0, WALL))


# The shell


class Rig:
    """A pool with relays that answer as told, and whoever makes reservations."""

    def __init__(
        self,
        config: RelayConfig,
        relays: Mapping[PeerId, Probe | KasError] | None = None,
        *,
        allow_private: bool = False,
    ) -> None:
        self.events = EventBus(lambda: WALL)
        self.listening = self.events.listen()
        self.held: list[set[PeerId]] = []
        self.addresses: dict[PeerId, tuple[str, ...]] = {}
        self.in_use: set[PeerId] = set()
        self.relays = dict(relays or {})
        self.visits: list[PeerId] = []
        self.pool = RelayPool(
            config,
            self.events,
            hold=self._hold,
            probe=self._probe,
            in_use=lambda: self.in_use,
            wall_clock=lambda: WALL + trio.current_time(),
            dice=Random(0),
            allow_private=allow_private,
        )

    def _hold(self, relays: Mapping[PeerId, tuple[str, ...]]) -> None:
        self.held.append(set(relays))
        self.addresses.update(relays)

    async def _probe(self, peer: PeerId, addresses: tuple[str, ...]) -> Probe:
        self.visits.append(peer)
        answer = self.relays.get(peer)
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, KasError):
            raise answer
        assert isinstance(answer, Probe)
        await trio.sleep(answer.rtt)
        return answer

    def made(self, *peers: PeerId) -> None:
        for each in peers:
            self.pool.made(
                ReservationMade(
                    relay=each,
                    addresses=(),
                    lifetime=3600,
                    max_bytes=None,
                    max_seconds=None,
                    renewed=False,
                    seconds=0.1,
                )
            )

    async def damaged(self) -> FileDamaged:
        with trio.fail_after(1):
            event = await anext(self.listening)
        assert isinstance(event, FileDamaged)
        return event


def configured(*peers: PeerId, **more: Any) -> RelayConfig:
    return RelayConfig(relays=tuple(f"{at(n)}/p2p/{each}" for n, each in enumerate(peers)), **more)


async def test_configured_relays_are_held_before_run_has_started(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    rig = Rig(configured(A, B, C, D))
    await nursery.start(rig.pool.run)
    assert [len(each) for each in rig.held] == [3]
    peer = min(rig.held[0])
    assert rig.addresses[peer][0].startswith("/ip4/20.")
    assert "p2p" not in rig.addresses[peer][0]


async def test_a_met_relay_is_visited_and_held(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig(RelayConfig(), {A: Probe(0.05, f"{at(1)}/p2p/{A}", offers_hop=True)})
    await nursery.start(rig.pool.run)
    rig.pool.identified(
        A, offers_hop=True, addresses=[at(1), "/ip4/10.0.0.1/tcp/1", "junk"], remote="/ip4/20.1.0.1/tcp/9"
    )
    await trio.sleep(0.5)
    assert rig.held[-1] == {A}
    assert rig.addresses[A] == (at(1),)


@pytest.mark.parametrize("answer", [Probe(0.05, at(1), offers_hop=False), DialError("A"), None])
async def test_who_is_no_relay_or_not_there_is_not_held(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, answer: Probe | KasError | None
) -> None:
    rig = Rig(RelayConfig(), {} if answer is None else {A: answer})
    await nursery.start(rig.pool.run)
    assert rig.pool.heard(Told(A, (at(1),)), teller=B, origin="b")
    await trio.sleep(20)
    assert rig.visits
    assert not any(rig.held)
    (status,) = rig.pool.status()
    assert status.reason
    assert status.wait > 0 or answer is None


@pytest.mark.parametrize(
    "addresses",
    [
        ["/ip4/192.168.1.1/tcp/80"],
        ["/ip4/127.0.0.1/tcp/1"],
        ["/ip6/::ffff:192.168.1.1/tcp/80"],
        ["/ip6zone/eth0/ip6/2d00::1/tcp/80"],
        ["/dns4/leads-to-your-router.example.org/tcp/80"],
        ["/dnsaddr/example.org"],
        [f"/ip4/20.1.1.1/tcp/1/p2p/{B}/p2p-circuit"],
        ["/ip4/20.1.1.1/tcp/0"],
        ["/ip4/224.0.0.1/tcp/4001"],
        ["x"],
        [],
    ],
)
async def test_hearsay_sends_us_nowhere_inside(addresses: list[str]) -> None:
    rig = Rig(RelayConfig())
    assert not rig.pool.heard(Told(A, tuple(addresses)), teller=B, origin="b")
    rig.pool.identified(A, offers_hop=True, addresses=addresses, remote="/ip4/20.1.1.1/tcp/9")
    assert rig.pool.status() == ()


async def test_nor_to_what_runs_on_others_machines() -> None:
    rig = Rig(RelayConfig())
    assert not rig.pool.heard(Told(A, ("/ip4/20.1.1.1/tcp/25", "/ip6/2a00::1/tcp/1023")), teller=B, origin="b")
    assert rig.pool.heard(Told(A, ("/ip4/20.1.1.1/tcp/25", "/ip6/2a00::1/tcp/1024")), teller=B, origin="b")
    assert rig.pool.status()[0].addresses == ("/ip6/2a00::1/tcp/1024",)


async def test_a_laboratory_has_private_addresses() -> None:
    rig = Rig(RelayConfig(), allow_private=True)
    where = ("/ip4/127.0.0.1/tcp/25", "/ip4/10.0.0.1/tcp/1")
    assert rig.pool.heard(Told(A, where), teller=B, origin="b")
    assert rig.pool.status()[0].addresses == where


async def test_only_what_means_something_to_everybody_is_told(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    at_home = "/ip4/192.168.1.7/tcp/16117"
    for allow_private, told in ((False, ()), (True, (at_home,))):
        relays = {A: Probe(0.05, f"{at_home}/p2p/{A}", offers_hop=True)}
        config = RelayConfig(relays=(f"{at_home}/p2p/{A}",))
        rig = Rig(config, relays, allow_private=allow_private)
        await nursery.start(rig.pool.run)
        rig.made(A)
        await trio.sleep(10)
        assert [each.addresses for each in rig.pool.tell()] == [told]


async def test_a_change_of_appetite_is_told(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    relays = {peer(n): Probe(0.05, f"{at(n)}/p2p/{peer(n)}", offers_hop=True) for n in range(4)}
    rig = Rig(RelayConfig(target=1), relays)
    seen: list[Appetite] = []
    rig.pool.on_appetite.append(lambda: seen.append(rig.pool.appetite))
    await nursery.start(rig.pool.run)
    for n in range(4):
        rig.pool.heard(Told(peer(n), (at(n),)), teller=A, origin=str(n))
    await trio.sleep(2)
    rig.made(*rig.held[-1])
    await trio.sleep(60)
    rig.pool.target = 0
    await trio.sleep(1)
    assert seen == [Appetite.HUNGRY, Appetite.SOME, Appetite.NONE]


@pytest.mark.parametrize(
    ("remote", "known"),
    [
        ("/ip4/127.0.0.1/tcp/9", {"127.0.0.1", "192.168.1.7", "20.1.1.1"}),
        ("/ip4/192.168.1.7/tcp/9", {"192.168.1.7", "20.1.1.1"}),
        ("/ip4/20.1.1.1/tcp/9", {"20.1.1.1"}),
    ],
)
async def test_a_relay_sends_us_no_further_inside_than_it_is(remote: str, known: set[str]) -> None:
    rig = Rig(RelayConfig())
    addresses = [f"/ip4/{ip}/tcp/4001" for ip in ("127.0.0.1", "192.168.1.7", "20.1.1.1")]
    rig.pool.identified(A, offers_hop=True, addresses=addresses, remote=remote)
    [status] = rig.pool.status()
    assert {each.split("/")[2] for each in status.addresses} == known


def test_whatever_relays_say_the_file_is_not_too_large_to_be_read() -> None:
    peers = [peer(number) for number in range(MAX_SAVED)]
    pool = Pool(target=3, dice=Random(0))
    for each in peers:
        listed = [f"/ip6/2d00:1000:1000:1000:1000:1000:1000:{n}/tcp/16117" for n in range(1000, 1000 + MAX_ADDRESSES)]
        pool.add(each, listed, Source.MET, 0.0, operator="\0" * MAX_OPERATOR)
        pool.probed(each, 0.1, listed[0], 0.0)
        pool.probe_failed(each, Cause.UNREACHABLE, "\0" * 256, 1.0)
    assert 256 * 1024 < len(pool.dump(2.0, WALL)) < MAX_FILE


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RelayRefused(A, "PERMISSION_DENIED", "no"), Cause.DENIED),
        (RelayRefused(A, "RESERVATION_REFUSED", "full"), Cause.FULL),
        (RelayRefused(A, "RESOURCE_LIMIT_EXCEEDED", "full"), Cause.FULL),
        (RelayRefused(A, "MALFORMED_MESSAGE", "what"), Cause.BROKEN),
        (RemoteProtocolError("junk"), Cause.BROKEN),
        (DialError("A"), Cause.UNREACHABLE),
    ],
)
async def test_each_failure_has_its_wait(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, error: KasError, cause: Cause
) -> None:
    rig = Rig(RelayConfig(target=1), {A: Probe(0.05, at(1), offers_hop=True)})
    await nursery.start(rig.pool.run)
    rig.pool.heard(Told(A, (at(1),)), teller=B, origin="b")
    await trio.sleep(0.5)
    rig.pool.failed(A, error)
    (status,) = rig.pool.status()
    assert status.place is Place.NONE
    assert status.reason == str(error).splitlines()[0]
    assert 0.8 * WAITS[cause][0] <= status.wait <= 1.2 * WAITS[cause][0]


async def test_a_lost_place_is_made_elsewhere_in_time(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    answers = {each: Probe(0.05, at(n), offers_hop=True) for n, each in enumerate((A, B))}
    rig = Rig(configured(A, B, target=1), answers)
    await nursery.start(rig.pool.run)
    (first,) = rig.held[-1]
    rig.made(first)
    await trio.sleep(EARLY + 1)
    rig.pool.lost(first, "the connection was reset")
    await trio.sleep(2.0)
    assert rig.held[-1] == {A, B}


async def test_over_a_restart(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    config = RelayConfig(state_file=tmp_path / "sub" / "relays.json", target=2)
    relays = {each: Probe(0.05, at(n), offers_hop=True) for n, each in enumerate((A, B))}
    rig = Rig(config, relays)
    async with trio.open_nursery() as inner:
        await inner.start(rig.pool.run)
        for n, each in enumerate((A, B)):
            rig.pool.heard(Told(each, (at(n),)), teller=C, origin="c")
        await trio.sleep(1)
        rig.made(A, B)
        await trio.sleep(SAVE_DELAY + 1)
        assert json.loads(config.state_file.read_text())["format"] == 1
        inner.cancel_scope.cancel()
    again = Rig(config)
    await nursery.start(again.pool.run)
    assert again.held == [{A, B}]
    assert [each.name for each in (tmp_path / "sub").iterdir()] == ["relays.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 99, "relays": []}', b"[1]", b"\xff\xfe", b"[" * 100_000])
async def test_a_damaged_file_is_told_kept_and_replaced(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "relays.json"
    path.write_bytes(content)
    rig = Rig(configured(A, state_file=path))
    assert "relays.json.damaged" in (await rig.damaged()).reason
    assert (tmp_path / "relays.json.damaged").read_bytes() == content
    rig.pool.save()
    assert json.loads(path.read_text()) == {"format": 1, "relays": []}


async def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    rig = Rig(configured(A, state_file=tmp_path / "in the way" / "relays.json"))
    await rig.damaged()
    rig.pool.save()
    assert "can't be saved" in (await rig.damaged()).reason


@pytest.mark.parametrize("relay", ["junk", "/ip4/20.0.0.1/tcp/1", f"{at(1)}/p2p/{A}/p2p-circuit/p2p/{B}"])
async def test_a_wrong_relay_in_the_configuration_is_named(relay: str) -> None:
    with pytest.raises(ConfigError, match=r"relay\.relays"):
        Rig(RelayConfig(relays=(relay,)))
