"""Which pairs of NATs can meet: every pair of natlab's types against the table that was measured there."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.autonat._observed import TOGETHER, Mapping, NatView
from kas_libp2p.autonat._roles import Filtering
from kas_libp2p.strategy._nat import (
    AT_RANDOM,
    MIN_KEEPALIVE,
    PREDICTED,
    Chance,
    Group,
    Nat,
    NatFacts,
    Ports,
    Sighting,
    Unsolicited,
    families,
    groups,
    in_words,
    keepalive,
    pattern,
    possible,
    predict,
    seen,
    spread,
)
from natlab import nat as lab

TABLE = """
         open fc fcx ar fw pr eimx cgn-pr pr-rst pr-icmp naive adm sym symseq symblk cgn-sym
open     D D D D D D D D D D D D D D D D
fc       D D D D D D D D D D D D D D D D
fcx      D D D D D D D D D D D D D D D D
ar       D D D P P P P P P P P P P P P P
fw       D D D P P P P P X X X B B S B B
pr       D D D P P P P P X X X B B S B B
eimx     D D D P P P P P X X X B B S B B
cgn-pr   D D D P P P P P X X X B B S B B
pr-rst   D D D P X X X X X X X B B S B B
pr-icmp  D D D P X X X X X X X B B S B B
naive    D D D P X X X X X X X B B S B B
adm      D D D P B B B B B B B - - - - -
sym      D D D P B B B B B B B - - - - -
symseq   D D D P S S S S S S S - - S - -
symblk   D D D P B B B B B B B - - - - -
cgn-sym  D D D P B B B B B B B - - - - -
"""
LETTERS = {
    "D": Chance.DIRECT,
    "P": Chance.PUNCH,
    "X": Chance.CROSSING,
    "S": Chance.PREDICTION,
    "B": Chance.BIRTHDAY,
    "-": Chance.HOPELESS,
}
TYPES = TABLE.split("\n")[1].split()
PAIRS = [
    (row.split()[0], column, LETTERS[letter])
    for row in TABLE.strip().split("\n")[1:]
    for column, letter in zip(TYPES, row.split()[1:], strict=True)
]


def nat_of(name: str) -> Nat:
    """A type of natlab's, as who is behind it may know it."""
    chain = [lab.nat_named(each) for each in lab.chain_of(name)]
    outer = chain[0]
    mapping = {lab.Mapping.NONE: Mapping.NONE, lab.Mapping.EIM: Mapping.INDEPENDENT}.get(
        outer.mapping, Mapping.DEPENDENT
    )
    ports = {
        lab.Port.KEEP: Ports.KEPT,
        lab.Port.CHANGE: Ports.CHANGED,
        lab.Port.PLUS_ONE: Ports.SEQUENTIAL,
        lab.Port.BLOCK: Ports.BLOCK,
    }.get(outer.port, Ports.RANDOM)
    filtering = {
        lab.Filtering.NONE: Filtering.OPEN,
        lab.Filtering.EIF: Filtering.OPEN,
        lab.Filtering.ADF: Filtering.ADDRESS,
        lab.Filtering.APDF: Filtering.PORT,
    }[max((each.filtering for each in chain), key=list(lab.Filtering).index)]
    dropped = outer.refusal is lab.Refusal.DROP
    return Nat(mapping, ports, filtering, Unsolicited.DROPPED if dropped else Unsolicited.REFUSED)


def test_the_table_holds_every_pair_of_sixteen_types() -> None:
    assert len(TYPES) == 16
    assert len(PAIRS) == 256


@pytest.mark.parametrize(("one", "other", "chance"), PAIRS, ids=lambda value: str(value))
def test_what_a_pair_of_types_allows(one: str, other: str, chance: Chance) -> None:
    verdict = possible(NatFacts(v4=nat_of(one)), NatFacts(v4=nat_of(other)))
    assert verdict.chance is chance
    assert verdict.family == 4
    assert bool(verdict.fixes) is (chance in (Chance.PREDICTION, Chance.BIRTHDAY, Chance.HOPELESS))
    assert verdict.worth_trying() is (chance not in (Chance.BIRTHDAY, Chance.HOPELESS))


def test_what_is_not_known_is_one_of_several_kinds() -> None:
    assert groups(Nat()) == {Group.G1, Group.G2, Group.G3, Group.G4}
    assert groups(Nat(Mapping.INDEPENDENT)) == {Group.G1, Group.G2, Group.G3}
    assert groups(Nat(filtering=Filtering.PORT)) == {Group.G2, Group.G3, Group.G4}
    assert groups(Nat(Mapping.NONE, filtering=Filtering.PORT, unsolicited=Unsolicited.REFUSED)) == {Group.G3}
    assert groups(Nat(Mapping.DEPENDENT)) == {Group.G4}
    assert groups(Nat(Mapping.DEPENDENT, filtering=Filtering.OPEN)) == {Group.G1}


def test_only_what_holds_for_all_kinds_is_a_verdict() -> None:
    cone, symmetric = Nat(Mapping.INDEPENDENT), Nat(Mapping.DEPENDENT, Ports.RANDOM)
    assert possible(NatFacts(cone), None).chance is Chance.UNKNOWN
    assert possible(NatFacts(Nat()), NatFacts(Nat())).chance is Chance.UNKNOWN
    assert possible(NatFacts(symmetric), NatFacts(cone)).chance is Chance.UNKNOWN  # it may let hosts in that it dialed
    assert possible(NatFacts(symmetric), NatFacts(symmetric)).chance is Chance.HOPELESS
    assert possible(NatFacts(cone), NatFacts(cone)).chance is Chance.CROSSING  # the hardest of what it may be
    assert possible(NatFacts(Nat()), NatFacts(nat_of("ar"))).chance is Chance.PUNCH


PROBABLE = st.builds(
    Nat, st.sampled_from(Mapping), st.sampled_from(Ports), st.sampled_from(Filtering), st.sampled_from(Unsolicited)
)


@given(PROBABLE, PROBABLE)
def test_both_sides_come_to_the_same_verdict(one: Nat, other: Nat) -> None:
    verdict = possible(NatFacts(one), NatFacts(other))
    assert verdict.chance is possible(NatFacts(other), NatFacts(one)).chance
    assert verdict.reason
    assert in_words(one)


@given(PROBABLE, PROBABLE, st.sampled_from(Unsolicited), st.sampled_from(Filtering))
def test_to_know_more_turns_no_yes_into_a_no(one: Nat, other: Nat, unsolicited: Unsolicited, to: Filtering) -> None:
    before = possible(NatFacts(one), NatFacts(other))
    if one.filtering is not Filtering.UNKNOWN:
        to = one.filtering
    if one.unsolicited is not Unsolicited.UNKNOWN:
        unsolicited = one.unsolicited
    after = possible(NatFacts(replace(one, filtering=to, unsolicited=unsolicited)), NatFacts(other))
    assert before.worth_trying() <= after.worth_trying() or before.chance is Chance.UNKNOWN


def test_ipv6_on_both_sides_beats_two_hopeless_nats() -> None:
    firewall = Nat(Mapping.NONE, Ports.KEPT, Filtering.PORT, Unsolicited.DROPPED)
    symmetric = nat_of("sym")
    verdict = possible(NatFacts(symmetric, firewall), NatFacts(symmetric, firewall))
    assert (verdict.chance, verdict.family) == (Chance.PUNCH, 6)
    alone = possible(NatFacts(symmetric), NatFacts(symmetric, firewall))
    assert alone.chance is Chance.HOPELESS
    assert "IPv6 on both (ours: none; theirs: yes)" in alone.fixes
    assert possible(NatFacts(v4=symmetric), NatFacts(v6=firewall)).family is None
    assert "listens nowhere" in possible(NatFacts(v4=symmetric), NatFacts()).reason


def test_the_words_for_a_pair_that_can_not() -> None:
    verdict = possible(NatFacts(nat_of("pr")), NatFacts(nat_of("sym")))
    assert verdict.reason == (
        "Their NAT gives every destination another port, at random. Ours only lets in what was dialed."
        " Only trying many ports at once could work between the two."
    )
    assert verdict.fixes[0] == "a port mapping on either side"
    assert not verdict.worth_trying()
    assert verdict.worth_trying(birthday=True)


# What is seen of a NAT


@pytest.mark.parametrize(
    ("addresses", "found", "in_lab"),
    [
        (["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1", "/ip6/fe80::1/tcp/1"], set(), set()),
        (["/ip4/192.168.1.7/tcp/1", "/ip6/fd00::7/tcp/1"], {4}, {4, 6}),
        (["/ip4/100.64.0.7/tcp/1", "/ip6/2d00:1::7/tcp/1"], {4, 6}, {4, 6}),
        (["/ip4/169.254.0.7/tcp/1"], set(), set()),
    ],
)
def test_the_families_in_which_a_machine_can_be_met(addresses: list[str], found: set[int], in_lab: set[int]) -> None:
    assert families(addresses) == found
    assert families(addresses, allow_private=True) == in_lab


def sightings(*ports: int, every: float = 1.0, since: float = 0.0) -> tuple[Sighting, ...]:
    last = len(ports) - 1
    return tuple(Sighting(since + (last - index) * every, port) for index, port in enumerate(ports))


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ((), Ports.UNKNOWN),
        ((40001, 40002), Ports.UNKNOWN),
        ((40001, 40002, 40003), Ports.SEQUENTIAL),
        ((9, 40001, 40005, 40040), Ports.SEQUENTIAL),  # it wrapped, and others dial too
        ((41100, 41002, 41471), Ports.BLOCK),
        ((41100, 41002, 41471, 43008), Ports.RANDOM),
        ((1025, 50000, 33333), Ports.RANDOM),
    ],
)
def test_how_ports_are_chosen(ports: tuple[int, ...], expected: Ports) -> None:
    assert pattern(sightings(*ports, every=TOGETHER + 1)) is expected


def test_a_block_is_rarely_taken_for_a_count_though_ports_of_one_moment_come_sorted() -> None:
    dice = Random(7)
    drawn = [sightings(*sorted(dice.sample(range(40960, 41472), 3)), every=0.1) for _ in range(10_000)]
    assert sum(pattern(each) is Ports.BLOCK for each in drawn) > 9_900
    assert pattern(sightings(40000, 40003, 40019, every=0.1)) is Ports.SEQUENTIAL, "a node dials many when it starts"
    assert pattern(sightings(40000, 40003, 40020, every=0.1)) is Ports.BLOCK


def test_what_autonat_knows_becomes_a_nat() -> None:
    assert seen(NatView(Mapping.INDEPENDENT, True), Filtering.PORT) == Nat(
        Mapping.INDEPENDENT, Ports.KEPT, Filtering.PORT
    )
    assert seen(NatView(Mapping.UNKNOWN, None), Filtering.UNKNOWN) == Nat()
    counting = seen(NatView(Mapping.DEPENDENT, False), Filtering.PORT, sightings(*range(40000, 40020)))
    assert counting.ports is Ports.SEQUENTIAL
    assert [each.port for each in counting.sightings] == list(range(40012, 40020))
    assert seen(NatView(Mapping.DEPENDENT, False), Filtering.PORT, sightings(1025, 50000, 33333)).sightings == ()


def test_the_next_ports_follow_the_last_one() -> None:
    assert predict(sightings(40000, 40001, 40002)) == tuple(range(40003, 40003 + PREDICTED))
    assert 40006 in predict(sightings(40000, 40002, 40004))  # it keeps the parity
    assert predict(sightings(1025, 50000, 33333)) == ()
    assert predict(sightings(65530, 65532, 65534)) == (65535,)


def test_strangers_move_the_window_with_time() -> None:
    busy = sightings(40000, 40021, 40042, every=60.0, since=60.0)  # twenty strangers a minute
    first, *_, last = predict(busy)
    assert 40043 < first < 40042 + 20 < last
    assert predict(sightings(40000, 40021, 40042, every=60.0))[0] == 40043  # seen just now
    assert predict(sightings(40000, 40002, 40003, every=0.01, since=60.0))[0] == 40004  # one is no crowd


@given(
    st.integers(1024, 60000),
    st.lists(st.integers(0, 4), min_size=2, max_size=7),
    st.integers(0, 8),
)
def test_up_to_eight_strangers_do_not_hide_the_port(start: int, between: list[int], strangers: int) -> None:
    ports = [start]
    for each in between:
        ports.append(ports[-1] + 1 + each)
    found = predict(sightings(*ports, every=5.0))
    assert ports[-1] + 1 + strangers in found


def test_a_block_is_searched_within_itself_and_all_ports_elsewhere() -> None:
    block = Nat(Mapping.DEPENDENT, Ports.BLOCK, sightings=sightings(41100, 41002, 41471))
    found = spread(block, Random(1))
    assert (found.sockets, len(found.ports)) == (32, 64)
    assert all(40960 <= port < 41472 for port in found.ports)
    wide = spread(Nat(Mapping.DEPENDENT, Ports.RANDOM), Random(1))
    assert (wide.sockets, len(set(wide.ports))) == AT_RANDOM
    assert min(wide.ports) >= 1024


@pytest.mark.parametrize("ports", [(1, 200, 511), (1, 513, 1023), (1, 513, 2047)])
def test_no_block_lies_where_no_nat_gives_ports_whatever_a_peer_has_seen(ports: tuple[int, ...]) -> None:
    found = spread(Nat(Mapping.DEPENDENT, Ports.BLOCK, sightings=sightings(*ports)), Random(1))
    assert (found.sockets, len(found.ports)) == AT_RANDOM  # it used to look for a port in there for ever
    assert pattern(sightings(*ports)) is not Ports.BLOCK


def test_the_two_sides_of_a_block_meet_in_nearly_all_cases() -> None:
    dice = Random(7)
    block = Nat(Mapping.DEPENDENT, Ports.BLOCK, sightings=sightings(41100, 41002, 41471))
    met = 0
    for _ in range(200):
        found = spread(block, dice)
        opened = set(dice.sample(range(40960, 41472), found.sockets))
        met += bool(opened & set(found.ports))
    assert met >= 190


def test_silence_is_broken_before_the_mapping_is_gone() -> None:
    assert keepalive(20.0) == 20.0
    assert keepalive(20.0, Nat(), None, Nat(lifetime=30.0)) == 15.0
    assert keepalive(20.0, Nat(lifetime=300.0)) == 20.0
    assert keepalive(20.0, Nat(lifetime=2.0)) == MIN_KEEPALIVE
