"""Hole punching: the law, and samples of it in the kernel. `natlab matrix` does all."""

import random

import pytest

from natlab import matrix
from natlab.nat import TYPES
from natlab.punch import Group, Trial, expected, group_of, punch
from natlab.reflector import add_reflector


def test_groups():
    table = {name: group_of(name).name for name in TYPES}
    assert table == {
        **dict.fromkeys(("open", "fc", "fcx", "ar"), "G1"),
        **dict.fromkeys(("fw", "pr", "eimx", "cgn-fc", "cgn-fcx", "cgn-ar", "cgn-pr", "cgn-eimx"), "G2"),
        **dict.fromkeys(("pr-rst", "pr-icmp", "naive", "cgn-pr-rst", "cgn-pr-icmp", "cgn-naive"), "G3"),
        **dict.fromkeys(("adm", "sym", "symseq", "symblk"), "G4"),
        **dict.fromkeys(("cgn-adm", "cgn-sym", "cgn-symseq", "cgn-symblk"), "G4"),
    }


@pytest.mark.parametrize("a", matrix.TYPES)
@pytest.mark.parametrize("b", matrix.TYPES)
def test_the_law_is_the_same_seen_from_the_other_side(a, b):
    for protocol in ("tcp", "udp"):
        for skew in matrix.SKEWS:
            assert expected(a, b, protocol, skew) == expected(b, a, protocol, -skew)


def test_the_law_is_the_table():
    assert {
        (one, two): [expected(a, b, skew=skew) for skew in matrix.SKEWS]
        for one, a in zip(Group, ("fc", "pr", "pr-rst", "sym"), strict=True)
        for two, b in zip(Group, ("fc", "pr", "pr-rst", "sym"), strict=True)
        if one <= two
    } == {
        (Group.G1, Group.G1): [True] * 5,
        (Group.G1, Group.G2): [True] * 5,
        (Group.G1, Group.G3): [True] * 5,
        (Group.G1, Group.G4): [True] * 5,
        (Group.G2, Group.G2): [True] * 5,
        (Group.G2, Group.G3): [True, True, True, False, True],  # also if the one that refuses is first
        (Group.G2, Group.G4): [False] * 5,
        (Group.G3, Group.G3): [True, True, True, False, False],
        (Group.G3, Group.G4): [False] * 5,
        (Group.G4, Group.G4): [False] * 5,
    }


@pytest.mark.parametrize(
    ("first", "survives"), [("open", True), ("fw", True), ("fc", False), ("ar", False), ("pr", False), ("sym", False)]
)
def test_who_is_refused_by_icmp_does_not_survive_its_own_nat(first, survives):
    assert expected(first, "pr-icmp", skew=0.09) is survives
    assert expected(first, "pr-icmp", skew=0.01) is (first != "sym")
    assert expected(first, "pr-icmp", skew=-0.09) is (first != "sym")
    assert expected(first, "pr-icmp", "udp", 0.09) is (first != "sym")


@pytest.mark.parametrize(("first", "survives"), [("open", True), ("fc", True), ("fw", False), ("pr", False)])
def test_a_router_that_takes_packets_for_its_own_gives_the_late_one_another_port(first, survives):
    assert expected(first, "naive", "udp", skew=0.09) is survives
    assert expected(first, "naive", "udp", skew=-0.09)
    assert expected(first, "pr-rst", "udp", skew=0.09)


def test_one_of_each_group_against_each():
    types = ("fc", "pr-rst", "sym")
    cells = matrix.measure(types, protocols=["tcp"], skews=[0.0, 0.09])
    cells += matrix.measure(types, protocols=["udp"], skews=[0.0])
    assert [cell for cell in cells if cell.seen != cell.expected] == []
    lines = list(matrix.render(cells, types))
    assert "  G3: G1 100, G3 cross, G4 0" in lines
    assert lines.count("every trial as expected") == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_port_that_comes_again_by_chance_is_tried_again_once(monkeypatch, times):
    trials = iter([Trial(0.1, 0.0, foreseen=True)] * times + [Trial(None, 0.0, foreseen=False)])
    monkeypatch.setattr(matrix, "punch", lambda *_, **__: next(trials))
    (cell,) = matrix.measure(["symblk"], protocols=["tcp"], skews=[0.0])
    assert cell.seen == (times == 2)
    assert not cell.expected


@pytest.mark.natlab("alice=pr", "bob=pr-rst", wan="25ms")
def test_who_is_refused_may_try_again(lab):
    server = add_reflector(lab)
    lab.link("reflector").set(delay=0)
    alice, bob = lab["alice"], lab["bob"]
    ports = iter(range(20000, 20000 + 2 * matrix.ATTEMPTS))

    def late(retry=None):
        """A trial in which the second side really began later than the first by as much as a packet must not need."""
        for _ in range(matrix.ATTEMPTS):
            trial = punch(alice, bob, server, skew=0.1, port=next(ports), retry=retry)
            if abs(trial.skew - 0.1) < matrix.SLACK:
                return trial
        raise AssertionError("this machine is too busy to begin two things 100 ms apart")

    assert not late().succeeded
    assert late(retry=random.Random(1)).succeeded
