from __future__ import annotations

import pytest

from kas_libp2p.config import DialConfig, PunchConfig, Role
from kas_libp2p.errors import AddressError
from kas_libp2p.identity import Identity
from kas_libp2p.strategy._nat import Chance, NatFacts
from kas_libp2p.strategy._plan import (
    LEAST_HEAD_START,
    MOST_HEAD_START,
    PUBLIC_HEAD_START,
    ConnectionStrategy,
    Known,
    Relayed,
    Way,
)
from tests.strategy.test_nat import nat_of

ALICE, NEAR, FAR = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2, 3))
V4, V6 = "/ip4/11.1.0.1/tcp/16117", "/ip6/2d00:1::1/tcp/16117"
LAN = "/ip4/192.168.1.7/tcp/16117"
BY_NEAR, BY_FAR = (f"/ip4/11.9.0.1/tcp/1/p2p/{relay}/p2p-circuit/p2p/{ALICE}" for relay in (NEAR, FAR))
RTTS = {NEAR: 0.02, FAR: 0.2}
DELAY = DialConfig().attempt_delay
STRATEGY = ConnectionStrategy(DialConfig(), PunchConfig())


def starts(known: Known) -> dict[str, tuple[Way, float]]:
    return {each.address: (each.way, each.start) for each in STRATEGY.connect(known).attempts}


def test_direct_addresses_are_dialed_ipv6_first_a_moment_after_one_another() -> None:
    assert starts(Known((V4, V6))) == {V6: (Way.DIRECT, 0.0), V4: (Way.DIRECT, DELAY)}


def test_a_private_peers_circuits_are_dialed_at_once_the_nearest_relay_first() -> None:
    known = Known((V4, BY_FAR, BY_NEAR), Role.PRIVATE, relay_rtts=RTTS)
    assert starts(known) == {
        V4: (Way.DIRECT, 0.0),
        BY_NEAR: (Way.RELAYED, 0.0),
        BY_FAR: (Way.RELAYED, DELAY),
    }


@pytest.mark.parametrize(
    ("known", "start"),
    [
        (Known((V4, BY_NEAR)), DELAY),
        (Known((V4, BY_NEAR), Role.PUBLIC), PUBLIC_HEAD_START),
        (Known((LAN, BY_NEAR)), 0.0),
        (Known(("/dns4/example.com/tcp/1", BY_NEAR)), DELAY),
        (Known((BY_NEAR,), Role.PUBLIC), PUBLIC_HEAD_START),
        (Known((BY_NEAR,)), 0.0),
    ],
)
def test_the_head_start_of_direct_addresses(known: Known, start: float) -> None:
    assert STRATEGY.connect(known).start_of(Way.RELAYED) == start


def test_a_plan_is_bounded_in_order_and_says_why() -> None:
    crowd = [f"/ip4/11.1.0.{n}/tcp/1" for n in range(1, 200)]
    plan = STRATEGY.connect(Known((*crowd, BY_NEAR)))
    assert [each.address for each in plan.of(Way.RELAYED)] == [BY_NEAR]
    assert len(plan.attempts) == DialConfig().max_addresses
    assert [each.start for each in plan.attempts] == sorted(each.start for each in plan.attempts)
    assert all(each.reason for each in plan.attempts)
    assert plan.start_of(Way.PUNCH) == float("inf")
    with pytest.raises(AddressError):
        STRATEGY.connect(Known(("junk",)))


def test_the_punch_waits_for_a_round_trip_if_there_is_something_to_dial() -> None:
    nats = NatFacts(nat_of("pr"))
    for rtt, start in ((0.1, 0.1), (0.001, LEAST_HEAD_START), (5.0, MOST_HEAD_START), (None, 0.3)):
        plan = STRATEGY.upgrade(Relayed(nats, nats, (V4,), rtt))
        assert [(each.way, each.start) for each in plan.attempts] == [(Way.DIRECT, 0.0), (Way.PUNCH, start)]
    assert STRATEGY.upgrade(Relayed(nats, nats)).start_of(Way.PUNCH) == 0.0


def test_a_hopeless_pair_has_no_punch_in_its_plan() -> None:
    sym = NatFacts(nat_of("sym"))
    plan = STRATEGY.upgrade(Relayed(sym, sym, (V4,)))
    assert [each.way for each in plan.attempts] == [Way.DIRECT]
    assert plan.verdict is not None
    assert plan.verdict.chance is Chance.HOPELESS


@pytest.mark.parametrize(
    ("relayed", "words"),
    [
        (Relayed(NatFacts(), seconds=1.0, rtt=1.0), "it may be gone in a moment"),
        (Relayed(NatFacts(), seconds=60.0, rtt=0.03), "the relay's 30 ms are good enough"),
        (Relayed(NatFacts(), seconds=60.0, rtt=0.1, direct_rtt=0.12), "the direct way was no shorter: 120 ms"),
        (Relayed(NatFacts(), seconds=60.0, rtt=0.1, direct_rtt=0.05), ""),
        (Relayed(NatFacts(), seconds=60.0, rtt=0.1), ""),
        (Relayed(NatFacts(), seconds=60.0), ""),
    ],
)
def test_what_quiet_leaves_alone(relayed: Relayed, words: str) -> None:
    why, wait = ConnectionStrategy(DialConfig(), PunchConfig(quiet=True)).leave_alone(relayed)
    assert why == words
    assert (wait > 0) is bool(words)
    assert STRATEGY.leave_alone(relayed) == ("", 0.0)
