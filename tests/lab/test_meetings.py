"""Real nodes behind every pair of NAT types: who can be direct is, at once, and who can't is told at once."""

from __future__ import annotations

import itertools
import statistics

import pytest

from kas_bridge.simnet.meet import TYPES, Meeting, matrix, meetings, possible
from natlab.punch import Group, group_of

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("lab")]

EACH_GROUP = (
    ("fcx", "ar"),
    ("pr", "fc"),
    ("fc", "naive"),
    ("ar", "sym"),
    ("pr", "eimx"),
    ("pr-rst", "cgn-pr"),
    ("pr-rst", "naive"),
)
"""A pair of each two groups that can be direct."""


def shown(found: list[Meeting]) -> str:
    wrong = [each for each in found if possible(*each.nats) and not each.direct]
    return "\n".join(
        [*matrix(found, TYPES), *(f"{' x '.join(each.nats)}: {each.path} {each.reason}" for each in wrong)]
    )


def test_every_pair() -> None:
    found = meetings(itertools.product(TYPES, TYPES))
    print(shown(found))
    assert [each.nats for each in found if possible(*each.nats) and "symseq" not in each.nats and not each.direct] == []
    assert [each.nats for each in found if each.direct and each.attempts > 1 and "symblk" not in each.nats] == []
    counting = [each for each in found if possible(*each.nats) and "symseq" in each.nats]
    assert sum(each.direct for each in counting) >= 0.9 * len(counting), "ports of a NAT that counts are guessed"
    hopeless = [each for each in found if not possible(*each.nats) and not {"symseq", "symblk"} & set(each.nats)]
    assert hopeless
    for each in hopeless:
        assert (each.path, each.attempts) == ("relayed", 0), each
        assert each.given_up is not None
        assert "every destination another port" in each.reason
    assert statistics.median(each.given_up for each in hopeless if each.given_up is not None) < 1, (
        "0.1 s on an idle one"
    )


@pytest.mark.parametrize("pair", EACH_GROUP, ids=" x ".join)
def test_one_pair_of_each_two_groups_twenty_times(pair: tuple[str, str]) -> None:
    found = meetings([pair, pair[::-1]] * 10, settled=False)
    print(shown(found))
    assert [(each.direct, each.attempts <= 1) for each in found] == [(True, True)] * 20


def test_nats_that_draw_ports_are_hit_where_both_sides_agreed() -> None:
    blocks = [*[("symblk", "pr"), ("eimx", "symblk")] * 4, ("symblk", "naive"), ("pr-rst", "symblk")] * 2
    found = meetings([*blocks, ("sym", "pr"), ("eimx", "adm"), ("sym", "symblk")], many=True, at_once=2)
    print(shown(found))
    for each in found:
        print(f"{' x '.join(each.nats)}: {each.path}, {each.attempts} attempts: {each.reason}")
    assert sum(each.direct for each in found[: len(blocks)]) >= 0.9 * len(blocks), "out of a few hundred ports"
    assert any(each.direct for each in found[len(blocks) : -1]), "out of all: nine of ten, and three attempts"
    assert (found[-1].path, found[-1].attempts) == ("relayed", 0), "two that draw never meet"


def test_every_two_groups_are_there() -> None:
    every = {tuple(sorted((group_of(a), group_of(b)))) for a, b in EACH_GROUP}
    assert every == {(a, b) for a, b in itertools.combinations_with_replacement(Group, 2) if Group.G4 not in (a, b)} | {
        (Group.G1, Group.G4)
    }
