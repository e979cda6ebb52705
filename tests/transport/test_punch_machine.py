"""Which target is dialed when, and how often, whatever comes of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.errors import MAX_OUTCOMES, PunchFailed, PunchOutcome
from kas_libp2p.transport._punch import (
    AGAIN,
    LOOK_AGAIN,
    MANY_TARGETS,
    MAX_DIALS,
    MAX_TARGETS,
    OTHER_PEER,
    QUICK_DIALS,
    SHARE,
    SOONEST,
    TAKEN,
    UNANSWERED,
    UNTRUSTED_DIALS,
    UNTRUSTED_PATIENCE,
    WINDOW,
    Dial,
    Machine,
    Target,
    sift,
)

AT = 100.0
HERE = "/ip4/11.0.0.2/tcp/4001"


def target(address: str, *, trusted: bool = True) -> Target:
    return Target(Multiaddr(address), trusted)


def machine(*targets: Target, at: float = AT, share: float = 0.5) -> Machine:
    return Machine(targets, at=at, window=WINDOW, uniform=lambda low, high: low + share * (high - low))


class TestSift:
    @pytest.mark.parametrize(
        ("address", "why"),
        [
            ("/ip4/127.0.0.1/tcp/4001", "loopback"),
            ("/ip6/::1/tcp/4001", "loopback"),
            ("/ip6/::ffff:127.0.0.1/tcp/4001", "loopback"),
            ("/ip4/224.0.0.1/tcp/4001", "multicast"),
            ("/ip6/ff02::1/tcp/4001", "multicast"),
            ("/ip4/192.168.1.1/tcp/4001", "private"),
            ("/ip4/10.1.2.3/tcp/4001", "private"),
            ("/ip4/172.16.0.1/tcp/4001", "private"),
            ("/ip4/100.64.0.1/tcp/4001", "private"),
            ("/ip4/169.254.1.1/tcp/4001", "private"),
            ("/ip6/fd00::1/tcp/4001", "private"),
            ("/ip6/fe80::1/tcp/4001", "private"),
            ("/ip6/::ffff:192.168.1.1/tcp/4001", "private"),
            ("/ip4/0.0.0.0/tcp/4001", "reserved"),
            ("/ip6/::/tcp/4001", "reserved"),
            ("/ip4/240.0.0.1/tcp/4001", "reserved"),
            ("/ip4/255.255.255.255/tcp/4001", "reserved"),
            ("/ip4/192.0.2.1/tcp/4001", "reserved"),
            ("/ip6/2001:db8::1/tcp/4001", "reserved"),
            ("/ip4/11.0.0.2/tcp/0", "port"),
            ("/ip4/11.0.0.2/tcp/25", "port"),
            ("/ip4/11.0.0.2/tcp/1023", "port"),
            ("/ip4/11.0.0.2/udp/4001", "not_tcp"),
            ("/ip4/11.0.0.2/tcp/4001/ws", "not_tcp"),
            ("/dns4/example.org/tcp/4001", "not_tcp"),
            ("/ip4/11.0.0.1/tcp/16117", "own"),
        ],
    )
    def test_what_must_not_be_dialed(self, address: str, why: str) -> None:
        kept, refused = sift([target(address)], own=("/ip4/11.0.0.1/tcp/16117",))
        assert not kept
        assert refused == [PunchOutcome(address, 0, why, 0.0)]

    def test_private_ones_where_that_was_agreed(self) -> None:
        local = Target(Multiaddr("/ip4/192.168.1.7/tcp/4001"), local=True)
        loopback = Target(Multiaddr("/ip4/127.0.0.1/tcp/4001"), local=True)
        assert sift([local, loopback])[0] == [local]
        assert sift([target("/ip4/192.168.1.7/tcp/4001"), loopback], allow_private=True)[0] == [
            target("/ip4/192.168.1.7/tcp/4001")
        ]

    def test_the_gate_is_asked_about_what_is_left(self) -> None:
        asked: list[str] = []

        def gate(ip: str) -> str | None:
            asked.append(ip)
            return "deny" if ip == "11.0.0.3" else None

        kept, refused = sift(
            [target(HERE), target("/ip4/11.0.0.3/tcp/4001"), target("/ip4/10.0.0.1/tcp/4001")], gate=gate
        )
        assert asked == ["11.0.0.2", "11.0.0.3"]
        assert kept == [target(HERE)]
        assert [each.reason for each in refused] == ["deny", "private"]

    def test_duplicates_are_one_and_trusted_if_one_is(self) -> None:
        named = f"{HERE}/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
        assert sift([target(HERE, trusted=False), target(HERE), target(named, trusted=False)])[0] == [target(HERE)]

    def test_there_is_an_end(self) -> None:
        kept, refused = sift(target(f"/ip4/11.0.0.2/tcp/{port}") for port in range(2000, 4000))
        assert len(kept) == len(refused) == MAX_TARGETS
        assert {each.reason for each in refused} == {"too_many"}

    def test_further_on_where_both_sides_agreed(self) -> None:
        kept, _ = sift((target(f"/ip4/11.0.0.2/tcp/{port}") for port in range(2000, 4000)), most=MANY_TARGETS)
        assert len(kept) == MANY_TARGETS

    def test_one_address_from_several_ports_of_ours_is_none_too_many(self) -> None:
        several = [replace(target(HERE), source=number) for number in (0, 1, 2, 1)]
        assert sift(several) == (several[:3], [])


class TestDials:
    def test_nothing_before_the_instant_and_all_at_once_then(self) -> None:
        this = machine(target(HERE), target("/ip6/2d00::2/tcp/4001"))
        assert this.due(AT - 0.001) == []
        assert this.wake_at() == AT
        dials = this.due(AT)
        assert [(each.number, str(each.address), each.attempt, each.patience) for each in dials] == [
            (0, HERE, 1, math.inf),
            (1, "/ip6/2d00::2/tcp/4001", 1, math.inf),
        ]
        assert this.due(AT) == []
        assert this.wake_at() == this.until == AT + WINDOW

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("reason", ["ECONNREFUSED", "ECONNRESET", "EACCES", "noise"])
    def test_refused_again_after_a_short_rest(self, reason: str, share: float) -> None:
        this = machine(target(HERE), share=share)
        (dial,) = this.due(AT)
        assert this.failed(dial, reason, AT + 0.05)
        again = AT + 0.05 + 0.05 * SHARE * (0.1 + 0.9 * share)
        assert this.wake_at() == pytest.approx(again)
        assert this.due(again - 1e-4) == []
        assert [each.attempt for each in this.due(again + 1e-9)] == [2]

    @pytest.mark.parametrize("reason", ["EHOSTUNREACH", "ENETUNREACH"])
    def test_refused_by_icmp_again_at_once(self, reason: str) -> None:
        this = machine(target(HERE))
        (dial,) = this.due(AT)
        this.failed(dial, reason, AT + 0.001)
        for attempt in range(2, QUICK_DIALS + 2):
            (dial,) = this.due(AT + 0.001)
            assert dial.attempt == attempt
            this.failed(dial, reason, AT + 0.001)
        assert this.due(AT + 0.001) == []

    def test_near_hosts_not_all_the_time(self) -> None:
        for share, soonest in ((0.0, SOONEST / 2), (1.0, SOONEST)):
            this = machine(target(HERE), share=share)
            (dial,) = this.due(AT)
            this.failed(dial, "ECONNREFUSED", AT + 0.001)
            assert this.wake_at() == pytest.approx(AT + soonest)

    @pytest.mark.parametrize(("count", "quick"), [(1, QUICK_DIALS), (8, MAX_DIALS // 8 // 2)])
    def test_long_rests_once_it_has_been_tried_often(self, count: int, quick: int) -> None:
        this = machine(*(target(f"/ip4/11.0.0.{number}/tcp/4001") for number in range(2, 2 + count)), share=1)
        now = AT
        for number in range(quick + 3):
            dial, *others = [each for each in this.due(now) if each.number == 0 or number == 0]
            for each in others:
                this.failed(each, UNANSWERED, now)
            this.failed(dial, "ECONNREFUSED", now + 0.02)
            rest = 0.02 * SHARE if number < quick else AGAIN[1]
            assert this.wake_at() == pytest.approx(now + 0.02 + rest)
            now = this.wake_at()

    def test_what_is_under_way_is_left_alone(self) -> None:
        this = machine(target(HERE))
        this.due(AT)
        assert [this.due(AT + seconds) for seconds in (0.5, 1.5, 2.4)] == [[], [], []]

    @pytest.mark.parametrize("reason", [UNANSWERED, OTHER_PEER])
    def test_not_again(self, reason: str) -> None:
        this = machine(target(HERE))
        (dial,) = this.due(AT)
        this.failed(dial, reason, AT + 1)
        assert this.due(AT + 2) == []
        assert not this.hopeless, "it may still come in, from another port even"

    def test_taken_is_looked_at_again_told_once_and_costs_nothing(self) -> None:
        this = machine(target(HERE, trusted=False))
        now = AT
        for number in range(20):
            (dial,) = this.due(now)
            assert dial.attempt == 1
            assert this.failed(dial, TAKEN, now) is (number == 0)
            now += LOOK_AGAIN
        assert this.outcomes(now) == (PunchOutcome(HERE, 0, TAKEN, 0.0),)

    def test_what_was_accepted_is_not_dialed_until_it_has_failed(self) -> None:
        this = machine(target(HERE), share=0)
        (dial,) = this.due(AT)
        this.failed(dial, "ECONNREFUSED", AT + 0.05)
        this.accepted("11.0.0.2", 4001)
        assert this.due(AT + 0.5) == []
        assert this.wake_at() == this.until
        this.released("11.0.0.2", 4001, "noise", AT + 0.6)
        assert [each.attempt for each in this.due(AT + 0.6 + AGAIN[0])] == [2]

    def test_what_was_accepted_before_the_instant(self) -> None:
        this = machine(target(HERE), share=0)
        this.accepted("11.0.0.2", 4001)
        this.released("11.0.0.2", 4001, "noise", AT - 1)
        assert this.wake_at() == AT
        this.accepted("11.0.0.2", 4001)
        assert this.due(AT) == []
        this.released("11.0.0.2", 4001, "noise", AT + 0.6)
        assert [each.attempt for each in this.due(AT + 0.6 + AGAIN[0])] == [1]

    def test_another_port_of_the_same_host_holds_nothing_up(self) -> None:
        this = machine(target(HERE))
        this.accepted("11.0.0.2", 4002)
        assert (this.expects("11.0.0.2"), this.expects("11.0.0.3")) == (True, False)
        assert machine(target("/ip6/2d00::2/tcp/4001")).expects("2d00::ffff:3")
        assert (this.is_target("11.0.0.2", 4001), this.is_target("11.0.0.2", 4002)) == (True, False)
        (dial,) = this.due(AT)
        this.released("11.0.0.2", 4002, "noise", AT)
        assert this.wake_at() == this.until
        this.failed(dial, "ECONNREFUSED", AT + 0.05)

    def test_untrusted_ones_share_a_few_dials_of_one_syn_each(self) -> None:
        this = machine(*(target(f"/ip4/11.0.{n}.1/tcp/4001", trusted=False) for n in range(3)), target(HERE), share=0)
        dials = this.due(AT)
        assert [each.patience for each in dials] == [UNTRUSTED_PATIENCE] * 3 + [math.inf]
        for dial in dials[:3]:
            this.failed(dial, "ECONNREFUSED", AT + 0.05)
        assert [each.number for each in this.due(AT + 0.06)] == [0]
        assert [each.dials for each in this.outcomes(AT + 1)] == [2, 1, 1, 1]
        assert this.wake_at() == this.until

    def test_what_comes_in_holds_back_the_dial_from_the_listen_port_only(self) -> None:
        this = machine(target(HERE), replace(target(HERE), source=1))
        this.accepted("11.0.0.2", 4001)
        assert [(each.number, each.elsewhere) for each in this.due(AT)] == [(1, True)]
        this.released("11.0.0.2", 4001, OTHER_PEER, AT)
        assert [(each.number, each.elsewhere) for each in this.due(AT + 1)] == [(0, False)]

    def test_many_targets_share_the_budget(self) -> None:
        this = machine(*(target(f"/ip4/11.0.0.2/tcp/{port}") for port in range(2000, 2000 + MAX_TARGETS)), share=0)
        now = AT
        while dials := this.due(now):
            for dial in dials:
                this.failed(dial, "ECONNREFUSED", now)
            now += 2 * AGAIN[0]
        assert {each.dials for each in this.outcomes(now)} == {MAX_DIALS // MAX_TARGETS}

    def test_hopeless_only_when_nothing_can_be_sent_anywhere(self) -> None:
        this = machine(target(HERE), target("/ip6/2d00::2/tcp/4001"))
        four, six = this.due(AT)
        this.impossible(six, AT)
        assert not this.hopeless
        this.failed(four, "ECONNREFUSED", AT)
        assert not this.hopeless
        (four,) = this.due(AT + 1)
        this.impossible(four, AT + 1)
        assert this.hopeless
        assert machine().hopeless, "no target at all"

    def test_outcomes_say_what_came_last_and_when(self) -> None:
        this = machine(target(HERE), target("/ip4/11.0.0.3/tcp/4001"), share=0)
        first, _ = this.due(AT)
        this.failed(first, "ECONNREFUSED", AT + 0.25)
        refused, silent = this.outcomes(AT + 1)
        assert refused == PunchOutcome(HERE, 1, "ECONNREFUSED", 0.25)
        assert silent == PunchOutcome("/ip4/11.0.0.3/tcp/4001", 1, UNANSWERED, 1.0)
        assert str(refused) == f"{HERE}: dialed once, ECONNREFUSED after 0.25 s"
        (waiting,) = machine(target(HERE)).outcomes(AT - 1)
        assert str(waiting) == f"{HERE}: not dialed"

    @pytest.mark.parametrize(("count", "last"), [(MAX_OUTCOMES, "unanswered after 2.50 s"), (48, "and 44 more")])
    def test_of_many_a_few_are_told_in_words(self, count: int, last: str) -> None:
        found = tuple(PunchOutcome(f"/ip4/11.0.0.3/tcp/{4000 + n}", 1, UNANSWERED, 2.5) for n in range(count))
        error = PunchFailed("bob", found, 2.5)
        assert error.outcomes == found
        assert len(error.told) <= MAX_OUTCOMES + 1
        assert error.told[-1].endswith(last)
        assert str(error).splitlines()[1:] == [f"  {each}" for each in error.told]


HOSTS = [f"/ip4/11.0.0.{n}/tcp/4001" for n in range(1, 9)]
STEP = st.tuples(
    st.floats(0.0, 0.2),
    st.sampled_from(["poll", "ECONNREFUSED", TAKEN, UNANSWERED, "noise", OTHER_PEER, "impossible", "in", "out"]),
    st.integers(0, 7),
)


@given(
    trusted=st.lists(st.booleans(), min_size=1, max_size=8),
    steps=st.lists(STEP, max_size=120),
    share=st.floats(0, 1),
)
def test_whatever_happens(trusted: list[bool], steps: list[tuple[float, str, int]], share: float) -> None:
    this = machine(*(target(HOSTS[n], trusted=each) for n, each in enumerate(trusted)), share=share)
    under_way: dict[int, Dial] = {}
    held: Counter[int] = Counter()
    sent: Counter[bool] = Counter()
    ended: dict[int, float] = {}
    now = AT - 0.1
    for seconds, what, number in steps:
        now += seconds
        number %= len(trusted)
        for dial in this.due(now):
            assert AT <= now < this.until
            assert dial.number not in under_way, "a SYN is under way there"
            assert not held[dial.number], "a connection from there is in its handshake"
            if dial.number in ended:
                assert now > ended[dial.number]
            under_way[dial.number] = dial
            sent[trusted[dial.number]] += 1
        assert this.wake_at() > now or now >= this.until
        if what == "in":
            this.accepted(f"11.0.0.{number + 1}", 4001)
            held[number] += 1
        elif what == "out" and held[number]:
            this.released(f"11.0.0.{number + 1}", 4001, "noise", now)
            held[number] -= 1
        elif what == "impossible" and number in under_way:
            this.impossible(under_way.pop(number), now)
        elif what not in ("in", "out", "poll") and number in under_way:
            this.failed(under_way.pop(number), what, now)
            ended[number] = now
            sent[trusted[number]] -= what == TAKEN
        assert sent[False] <= UNTRUSTED_DIALS
        assert sum(sent.values()) <= MAX_DIALS
        assert this.wake_at() <= this.until
    assert sum(each.dials for each in this.outcomes(now)) == sum(sent.values())


@given(st.binary(max_size=40))
def test_no_bytes_of_a_peer_get_past_the_sieve(data: bytes) -> None:
    try:
        address = addresses.parse(Multiaddr(data))
    except (ValueError, addresses.AddressError):
        return
    for each in sift([Target(address)])[0]:
        assert addresses.is_public(each.address)
