"""The role over time: windows, hysteresis, simulated days, changes of the network, servers that lie."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kas_libp2p.autonat._client import Verdict
from kas_libp2p.autonat._roles import (
    CALM,
    GRACE,
    HOLD,
    MAX_CONTACTS,
    MAX_TESTED,
    OLD_ENTRIES,
    RETRY,
    SERVERS,
    SETTLE,
    STRANGERS,
    V1_INTERVAL,
    V2_BURST,
    V2_INTERVAL,
    Ask,
    Candidate,
    Contacts,
    Filtering,
    Kind,
    Roles,
    Server,
)
from kas_libp2p.config import Role
from kas_libp2p.metadata import PeerId

HOME = "/ip4/11.9.0.1/tcp/16117"
CAFE = "/ip4/11.10.0.1/tcp/16117"
SIX = "/ip6/2d00:9::1/tcp/16117"
REFRESH = 900.0
DAY = 86_400.0


def server(
    number: int, *, v1: bool = False, v2: bool = True, stranger: bool = True, family: int = 4, chosen: bool = True
) -> Server:
    return Server(PeerId(f"peer {number}"), f"11.{number}.0.0/16", family, v1, v2, stranger, chosen)


@dataclass
class Truth:
    """What the network does: who gets in at an address."""

    servers: bool = True
    strangers: bool = True


Answer = tuple[Verdict, bool]


class Simulation:
    """A machine in a network, with time of its own.

    Attributes:
        truth: by address.
        lies: what a server answers instead of the truth, by peer.
        away: the share of servers that are not there at a time.
        changes: when the role became what.
    """

    def __init__(self, *servers: Server, setting: Role = Role.AUTO, seed: int = 0) -> None:
        self.now = 1000.0
        self.roles = Roles(setting, REFRESH, self.now)
        self.servers = list(servers)
        self.truth: dict[str, Truth] = {}
        self.lies: dict[str, Callable[[Kind], Answer]] = {}
        self.away = 0.0
        self.dice = random.Random(seed)
        self.changes: list[tuple[float, Role]] = []
        self.asked: list[tuple[float, str, str, Kind]] = []
        self._role = self.roles.role

    def offer(self, *addresses: str, confirmed: bool = True) -> None:
        families = {6 if each.startswith("/ip6") else 4 for each in addresses} or {4}
        self.roles.offer([Candidate(each, confirmed) for each in addresses], families, self.now)
        self.look()

    def look(self) -> None:
        if self.roles.role is not self._role:
            self._role = self.roles.role
            self.changes.append((self.now, self._role))

    def answer(self, address: str, peer: str, kind: Kind) -> Answer:
        if peer in self.lies:
            return self.lies[peer](kind)
        truth = self.truth.get(address, Truth(False, False))
        inside = truth.strangers if kind is Kind.STRANGER else truth.servers
        return (Verdict.REACHABLE if inside else Verdict.UNREACHABLE), kind is Kind.STRANGER and inside

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        turns = 0
        while True:
            turns += 1
            assert turns < 20 + seconds / 5, "it spins"
            there = [each for each in self.servers if self.dice.random() >= self.away]
            asks = self.roles.plan(there, self.now)
            for ask in asks:
                self.asked.append((self.now, ask.address, ask.server.peer, ask.kind))
                verdict, stranger = self.answer(ask.address, ask.server.peer, ask.kind)
                self.roles.heard(ask, verdict, self.now, stranger=stranger)
                self.roles.done(ask, self.now)
                self.look()
            if asks:
                self.now += 0.5
                continue
            wake = self.roles.next_deadline(self.now)
            assert wake > self.now
            self.now = min(wake, end)
            self.roles.update(self.now)
            self.look()
            if self.now >= end:
                return


def lab(*, count: int = 4, setting: Role = Role.AUTO, truth: Truth | None = None, seed: int = 0) -> Simulation:
    here = Simulation(*(server(number) for number in range(count)), setting=setting, seed=seed)
    here.truth[HOME] = truth or Truth()
    here.offer(HOME)
    return here


# What it takes


def test_two_networks_of_servers_and_a_stranger_make_public() -> None:
    here = lab()
    here.run(10)
    assert (here.roles.role, here.roles.public(here.now)) == (Role.PUBLIC, (HOME,))
    assert here.roles.filtering(4, here.now) is Filtering.OPEN


def test_servers_alone_do_not() -> None:
    here = lab(truth=Truth(strangers=False))
    here.run(DAY)
    assert (here.roles.role, here.changes) == (Role.PRIVATE, [])
    assert here.roles.filtering(4, here.now) is Filtering.ADDRESS
    assert "strangers did not" in here.roles.reason(here.now)


def test_without_anybody_who_finds_a_stranger_it_stays_private_until_one_comes() -> None:
    here = Simulation(*(server(number, stranger=False) for number in range(3)))
    here.truth[HOME] = Truth()
    here.offer(HOME)
    here.run(OLD_ENTRIES / 2)
    here.roles.stranger_came(4, here.now)  # perhaps one that an earlier process of ours had dialed
    here.look()
    assert (here.roles.role, here.roles.filtering(4, here.now)) == (Role.PRIVATE, Filtering.UNKNOWN)
    assert "no stranger" in here.roles.reason(here.now)
    here.run(OLD_ENTRIES)
    here.roles.stranger_came(6, here.now)
    here.look()
    assert here.roles.role is Role.PRIVATE
    here.roles.stranger_came(4, here.now)
    here.look()
    assert here.roles.role is Role.PUBLIC


def test_a_stranger_without_servers_does_not_either() -> None:
    here = Simulation()
    here.offer(HOME)
    here.run(OLD_ENTRIES)
    here.roles.stranger_came(4, here.now)
    here.run(DAY)
    assert here.changes == []


def test_who_does_not_listen_is_private_and_says_so() -> None:
    here = Simulation(*(server(number) for number in range(3)))
    here.roles.offer([], (), here.now)
    here.run(DAY)
    assert (here.roles.role, here.asked) == (Role.PRIVATE, [])
    assert "listens nowhere" in here.roles.reason(here.now)


def test_a_stranger_who_came_elsewhere_says_nothing_of_here() -> None:
    here = Simulation(*(server(number, stranger=False) for number in range(3)))
    here.offer(HOME)
    here.run(OLD_ENTRIES)
    here.roles.stranger_came(4, here.now)
    here.truth[CAFE] = Truth(strangers=False)
    here.offer(CAFE)
    here.roles.doubt(here.now)
    here.run(60)
    assert here.roles.filtering(4, here.now) is Filtering.UNKNOWN
    assert here.changes == []


def test_a_stranger_who_may_have_come_by_either_of_two_addresses_speaks_for_none() -> None:
    here = Simulation(*(server(number, stranger=False) for number in range(3)))
    here.truth = {HOME: Truth(), CAFE: Truth()}
    here.offer(HOME, CAFE)
    here.run(OLD_ENTRIES)
    here.roles.stranger_came(4, here.now)
    assert here.roles.role is Role.PRIVATE


def test_one_network_of_servers_is_one_voice() -> None:
    crowd = [Server(PeerId(f"peer {number}"), "11.1.0.0/16", 4, True, True, True) for number in range(50)]
    here = Simulation(*crowd)
    here.truth[HOME] = Truth()
    here.offer(HOME)
    here.run(DAY)
    assert here.changes == []


def test_an_address_that_one_observer_told_is_tested_but_not_told() -> None:
    here = Simulation(*(server(number) for number in range(3)))
    here.truth[HOME] = Truth()
    here.offer(HOME, confirmed=False)
    here.run(3600)
    assert (here.changes, here.roles.public(here.now)) == ([], ())
    assert here.asked
    here.offer(HOME)
    assert here.roles.role is Role.PUBLIC


def test_nobody_to_ask_is_no_evidence() -> None:
    here = lab(count=0)
    here.run(DAY)
    assert here.changes == []
    assert "no server has tested" in here.roles.reason(here.now)


def test_nothing_to_test_yet() -> None:
    here = Simulation(server(1))
    here.offer()
    here.run(DAY)
    assert here.asked == []
    assert "no peer has told" in here.roles.reason(here.now)


@pytest.mark.parametrize("setting", [Role.PUBLIC, Role.PRIVATE])
def test_a_role_that_is_configured_is_never_changed(setting: Role) -> None:
    for truth in (Truth(), Truth(False, False)):
        here = lab(setting=setting, truth=truth)
        assert here.roles.public(here.now) == ((HOME,) if setting is Role.PUBLIC else ())
        here.run(DAY)
        assert (here.roles.role, here.changes) == (setting, [])
        assert here.roles.public(here.now) == ((HOME,) if setting is Role.PUBLIC and truth.servers else ())


# The family


def test_ipv6_alone_makes_nobody_public_who_has_ipv4_too() -> None:
    here = Simulation(*(server(number) for number in range(3)), *(server(number, family=6) for number in range(10, 13)))
    here.truth = {SIX: Truth()}
    here.offer(HOME, SIX)
    here.run(3600)
    assert (here.changes, here.roles.public(here.now)) == ([], (SIX,))


def test_but_who_has_nothing_else() -> None:
    here = Simulation(*(server(number, family=6) for number in range(3)))
    here.truth = {SIX: Truth()}
    here.offer(SIX)
    here.run(3600)
    assert here.roles.role is Role.PUBLIC


def test_servers_of_the_other_family_are_asked_if_there_are_no_own() -> None:
    here = Simulation(*(server(number) for number in range(3)), server(7, v1=True, v2=False))
    here.truth = {SIX: Truth()}
    here.offer(SIX)
    here.run(60)
    assert {kind for _, _, _, kind in here.asked} == {
        Kind.V2
    }  # not v1, nor for a stranger: those dial where they see us


# Lies


def never(kind: Kind) -> Answer:
    return Verdict.UNREACHABLE, False


def always(kind: Kind) -> Answer:
    """Dials back from the port that we dialed, which any NAT lets in. It can't send a stranger."""
    return Verdict.REACHABLE, False


def useless(kind: Kind) -> Answer:
    return Verdict.REFUSED, False


@pytest.mark.parametrize("lie", [never, always, useless])
@pytest.mark.parametrize(
    ("truth", "role"),
    [(Truth(), Role.PUBLIC), (Truth(False, False), Role.PRIVATE), (Truth(strangers=False), Role.PRIVATE)],
)
def test_a_server_that_lies_alone_has_no_effect(truth: Truth, role: Role, lie: Callable[[Kind], Answer]) -> None:
    here = lab(count=5, truth=truth)
    here.lies["peer 0"] = lie
    here.run(3 * DAY)
    assert here.roles.role is role
    assert len(here.changes) == (role is Role.PUBLIC)


def test_even_many_that_lie_can_not_make_us_public() -> None:
    here = lab(count=6, truth=Truth(False, False))
    for number in range(5):
        here.lies[f"peer {number}"] = always
    here.run(3 * DAY)
    assert here.changes == []


def test_those_who_came_by_themselves_outvote_nobody_whom_we_chose() -> None:
    here = Simulation(
        *(server(number) for number in range(3)), *(server(number, chosen=False) for number in range(3, 99))
    )
    here.truth[HOME] = Truth()
    here.lies |= {f"peer {number}": never for number in range(3, 99)}
    here.offer(HOME)
    here.run(3 * DAY)
    assert (here.roles.role, len(here.changes)) == (Role.PUBLIC, 1)


# Time


@pytest.mark.parametrize(
    ("truth", "changes"), [(Truth(), 1), (Truth(strangers=False), 0), (Truth(False, False), 0), (Truth(False, True), 0)]
)
def test_a_week_on_a_stable_network_without_a_flap(truth: Truth, changes: int) -> None:
    here = lab(truth=truth)
    here.run(7 * DAY)
    assert len(here.changes) == changes
    per_day = len(here.asked) / 7
    assert per_day <= (SERVERS + STRANGERS) * DAY / REFRESH + 20


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 0.7), st.booleans(), st.integers(0, 2))
def test_days_on_a_stable_network_with_servers_that_come_and_go(
    seed: int, away: float, public: bool, liars: int
) -> None:
    here = lab(count=6, truth=Truth(public, public), seed=seed)
    here.away = away
    for number, lie in zip(range(liars), (never, useless), strict=False):
        here.lies[f"peer {number}"] = lie
    here.run(2 * DAY)
    assert [role for _, role in here.changes] == ([Role.PUBLIC] if public else [])


def test_silence_changes_nothing() -> None:
    here = lab()
    here.run(60)
    here.servers = []
    here.run(30 * DAY)
    assert (here.roles.role, here.roles.public(here.now)) == (Role.PUBLIC, (HOME,))
    assert "a while ago" in here.roles.reason(here.now)


def test_observers_that_fall_silent_take_no_verified_address_away() -> None:
    here = lab()
    here.run(60)
    here.roles.offer([], {4}, here.now)
    here.run(DAY)
    assert (here.roles.public(here.now), len(here.changes)) == ((HOME,), 1)


def test_a_refresh_that_is_missed_does_no_harm() -> None:
    here = lab()
    here.run(60)
    held, here.servers = here.servers, []
    here.run(2 * REFRESH)
    here.servers = held
    here.run(DAY)
    assert len(here.changes) == 1


def test_a_door_that_closes_is_noticed_within_two_refreshes_and_when_it_opens_again_it_has_to_stay_open() -> None:
    here = lab()
    here.run(60)
    here.truth[HOME] = Truth(False, False)
    closed = here.now
    here.run(3 * REFRESH)
    assert [role for _, role in here.changes] == [Role.PUBLIC, Role.PRIVATE]
    assert HOLD <= here.changes[1][0] - closed <= 2 * REFRESH
    assert here.roles.filtering(4, here.now) is Filtering.PORT
    here.truth[HOME] = Truth()
    here.asked.clear()
    here.run(3 * REFRESH)
    [(at, role)] = here.changes[2:]
    assert role is Role.PUBLIC
    assert CALM <= at - here.asked[0][0] <= CALM + 60


def test_a_door_that_is_shut_for_less_than_the_hold_is_not_noticed() -> None:
    here = lab()
    here.run(60)
    here.truth[HOME] = Truth(False, False)
    here.roles.doubt(here.now)
    here.run(HOLD / 4)
    here.truth[HOME] = Truth()
    here.run(DAY)
    assert len(here.changes) == 1


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_on_a_network_that_can_not_make_up_its_mind_the_role_changes_seldom(seed: int, share: float) -> None:
    here = lab(count=6, seed=seed)
    dice = random.Random(seed)
    for number in range(6):
        here.lies[f"peer {number}"] = lambda kind: (
            (Verdict.REACHABLE, kind is Kind.STRANGER) if dice.random() < share else never(kind)
        )
    here.run(DAY)
    back = [at for at, role in here.changes if role is Role.PUBLIC]
    assert all(later - earlier >= CALM for earlier, later in itertools.pairwise(back))


# The network changes


def test_another_address_that_is_reachable_too_changes_no_role() -> None:
    here = lab()
    here.run(60)
    here.truth = {CAFE: Truth()}
    here.offer(CAFE)
    here.roles.doubt(here.now)
    assert here.roles.public(here.now) == ()
    here.run(DAY)
    assert (len(here.changes), here.roles.public(here.now)) == (1, (CAFE,))


def test_another_address_that_is_not_makes_private_after_the_grace() -> None:
    here = lab()
    here.run(60)
    moved = here.now
    here.offer(CAFE)
    here.run(DAY)
    assert here.changes[1:] == [(moved + GRACE, Role.PRIVATE)]


def test_an_address_that_one_peer_makes_up_takes_none_away() -> None:
    here = lab()
    here.run(60)
    here.roles.offer([Candidate(CAFE, confirmed=False)], {4}, here.now)
    here.run(DAY)
    assert (here.roles.public(here.now), len(here.changes)) == ((HOME,), 1)


def test_an_interface_that_goes_takes_its_family_with_it() -> None:
    here = lab()
    here.run(60)
    gone = here.now
    here.offer(SIX)
    here.run(2 * GRACE)
    assert here.changes[1:] == [(gone + GRACE, Role.PRIVATE)]


def test_a_temporary_address_that_rotates_every_day_touches_no_role() -> None:
    here = Simulation(*(server(number) for number in range(4)), *(server(number, family=6) for number in range(10, 14)))
    here.truth = {HOME: Truth()} | {f"/ip6/2d00:9::{day:x}/tcp/1": Truth() for day in range(1, 11)}
    for day in range(1, 10):
        here.offer(HOME, f"/ip6/2d00:9::{day:x}/tcp/1", f"/ip6/2d00:9::{day + 1:x}/tcp/1")
        here.run(DAY)
    assert len(here.changes) == 1


def test_doubt_leads_to_a_test_at_once() -> None:
    here = lab()
    here.run(60)
    here.asked.clear()
    doubted = here.now
    here.roles.doubt(here.now)
    here.run(2)
    assert here.asked
    assert here.asked[0][0] - doubted <= 1.0


# What is asked


def begun(here: Simulation) -> list[Ask]:
    """Tests that are under way: nobody has answered yet."""
    asks = here.roles.plan(here.servers, here.now)
    assert asks
    return asks


def over(here: Simulation, asks: list[Ask], verdict: Verdict) -> None:
    for ask in asks:
        here.roles.heard(ask, verdict, here.now)
        here.roles.done(ask, here.now)


def test_doubt_while_tests_are_under_way_is_followed_when_they_are_over() -> None:
    here = lab(count=3)
    here.now += SETTLE
    unanswered = begun(here)
    here.now += 5
    here.roles.doubt(here.now)  # the router has given the port that it asked for
    over(here, unanswered, Verdict.UNREACHABLE)
    here.run(5)
    assert here.roles.role is Role.PUBLIC


def test_a_test_that_began_before_the_network_changed_says_nothing_of_it() -> None:
    here = lab(count=3)
    here.now += SETTLE
    unanswered = begun(here)
    here.now += 1
    here.roles.doubt(here.now)
    here.now += SETTLE
    over(here, begun(here), Verdict.REACHABLE)
    over(here, unanswered, Verdict.UNREACHABLE)
    here.run(5)
    assert here.roles.role is Role.PUBLIC


def test_nor_does_one_of_an_address_that_went_and_came_again() -> None:
    here = lab(count=3)
    here.now += SETTLE
    unanswered = begun(here)
    here.now += 1
    here.offer(CAFE)
    here.offer(HOME)
    here.now += SETTLE / 2
    over(here, unanswered, Verdict.UNREACHABLE)
    here.run(5)
    assert here.roles.role is Role.PUBLIC


def test_a_v1_server_is_not_asked_again_before_it_would_answer() -> None:
    here = Simulation(*(server(number, v1=True, v2=False, stranger=False) for number in range(3)))
    here.offer(HOME, CAFE)
    for _ in range(50):
        here.roles.server_came(here.now)
        here.run(10)
    for number in range(3):
        times = [at for at, _, peer, _ in here.asked if peer == f"peer {number}"]
        assert all(later - earlier >= V1_INTERVAL for earlier, later in itertools.pairwise(times))


def test_a_v2_server_is_asked_within_what_it_grants() -> None:
    here = lab()
    here.offer(HOME, CAFE)
    for _ in range(100):
        here.roles.doubt(here.now)
        here.run(5)
    for number in range(4):
        times = [at for at, _, peer, _ in here.asked if peer == f"peer {number}"]
        assert len(times) <= V2_BURST + (times[-1] - times[0]) / V2_INTERVAL + 1


def test_an_address_that_comes_a_moment_after_the_first_does_not_wait_for_it() -> None:
    here = Simulation(*(server(number) for number in range(3)))
    here.truth[HOME] = Truth()
    here.offer(CAFE)
    here.run(1.2)
    here.roles.offer([Candidate(CAFE, True), Candidate(HOME, True)], {4}, here.now)
    here.run(5)
    assert here.roles.role is Role.PUBLIC


def test_v2_is_asked_before_v1_and_each_in_its_turn() -> None:
    here = Simulation(*(server(number, v1=True, v2=number > 3) for number in range(10)))
    here.offer(HOME)
    here.run(2 * DAY)
    asked = [(peer, kind) for _, _, peer, kind in here.asked]
    assert {kind for _, kind in asked} == {Kind.V2}
    assert {peer for peer, _ in asked} == {f"peer {number}" for number in range(4, 10)}


def test_an_undecided_address_is_asked_for_less_and_less_often() -> None:
    here = lab(count=1)
    here.run(DAY)
    times = [at for at, _, _, kind in here.asked if kind is Kind.V2]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert RETRY <= gaps[0] <= RETRY + 1
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(gaps))
    assert REFRESH <= gaps[-1] <= REFRESH + 1


def test_a_thousand_addresses_are_not_all_tested() -> None:
    here = lab()
    here.offer(*(f"/ip4/11.9.{number >> 8}.{number & 255}/tcp/1" for number in range(1000)))
    here.run(60)
    assert len({address for _, address, _, _ in here.asked}) == MAX_TESTED


def test_crowding_never_pushes_a_verified_address_out() -> None:
    here = lab()
    here.run(60)
    here.offer(*(f"/ip4/11.9.{number >> 8}.{number & 255}/tcp/1" for number in range(1000)), HOME)
    here.run(DAY)
    assert (here.roles.public(here.now), len(here.changes)) == ((HOME,), 1)


# Contacts


def test_contacts_are_ips_and_networks_of_ipv6() -> None:
    contacts = Contacts()
    contacts.add("11.1.0.1")
    contacts.add("2d00:1::5")
    assert not contacts.is_stranger("11.1.0.1")
    assert not contacts.is_stranger("2d00:1::ffff")
    assert contacts.is_stranger("11.1.0.2")
    assert contacts.is_stranger("2d00:1:0:1::5")


def test_contacts_are_bounded_and_the_longest_unused_goes() -> None:
    contacts = Contacts()
    for number in range(MAX_CONTACTS + 100):
        contacts.add(f"11.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        contacts.add("11.0.0.0")
    assert len(contacts) == MAX_CONTACTS
    assert not contacts.is_stranger("11.0.0.0")
    assert contacts.is_stranger("11.0.0.1")
