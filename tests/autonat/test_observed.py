"""Where others see us: groups, lies, the mapping of a NAT."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.autonat._observed import KEEP, MAX_CANDIDATES, MAX_OBSERVERS, GroupOf, Mapping, NatView, Observed
from kas_libp2p.errors import AddressError

PORT = 16117
HOME = f"/ip4/192.168.1.10/tcp/{PORT}"
TRUE = f"/ip4/11.9.0.1/tcp/{PORT}"
LIE = "/ip4/11.66.0.1/tcp/666"


class Told:
    """An `Observed`, and peers that tell it things."""

    def __init__(self, *, lab: bool = False) -> None:
        self.observed = Observed(GroupOf(laboratory=lab), allow_private=lab)
        self.now = 0.0
        self._numbers = itertools.count(1)

    def by(self, ip: str, seen: str, *, local: str = HOME, outbound: bool = True) -> str | None:
        """A peer at this IP tells."""
        self.number = next(self._numbers)
        family = "ip6" if ":" in ip else "ip4"
        return self.observed.record(
            connection=self.number,
            remote=f"/{family}/{ip}/tcp/4001",
            local=local,
            observed=seen,
            outbound=outbound,
            listen_ports=[PORT],
            now=self.now,
        )

    @property
    def candidates(self) -> tuple[str, ...]:
        return self.observed.candidates(4, self.now)

    @property
    def confirmed(self) -> tuple[str, ...]:
        return self.observed.confirmed(4, self.now)

    @property
    def nat(self) -> NatView:
        return self.observed.nat(4, self.now)


def test_one_observer_is_enough_to_punch_with_and_two_networks_to_tell_others() -> None:
    told = Told()
    told.by("11.1.0.1", TRUE)
    assert (told.candidates, told.confirmed) == ((TRUE,), ())
    told.by("11.1.200.7", TRUE)  # the same /16
    assert (told.candidates, told.confirmed) == ((TRUE,), ())
    told.by("11.2.0.1", TRUE)
    assert (told.candidates, told.confirmed) == ((TRUE,), (TRUE,))


def test_groups_of_ipv6_are_48s() -> None:
    told = Told()
    seen, local = f"/ip6/2d00:9::1/tcp/{PORT}", f"/ip6/2d00:9::1/tcp/{PORT}"
    told.by("2d00:0:1::1", seen, local=local)
    told.by("2d00:0:1:ffff::1", seen, local=local)
    assert told.observed.confirmed(6, 0.0) == ()
    told.by("2d00:0:2::1", seen, local=local)
    assert told.observed.confirmed(6, 0.0) == (seen,)
    assert told.observed.nat(6, 0.0) == NatView(Mapping.NONE, True)
    assert told.confirmed == ()


# Poisoning


def test_one_ip_that_lies_has_no_effect() -> None:
    told = Told()
    for number in (1, 2, 3):
        told.by(f"11.{number}.0.1", TRUE)
    before = told.candidates, told.confirmed, told.nat
    for _ in range(100):
        told.by("11.4.0.1", LIE)
    assert (told.candidates, told.confirmed, told.nat) == before


def test_nor_has_one_network() -> None:
    told = Told()
    for number in (1, 2, 3):
        told.by(f"11.{number}.0.1", TRUE)
    before = told.candidates, told.confirmed, told.nat
    for number in range(2000):
        told.by(f"11.66.{number >> 8}.{number & 255}", LIE, outbound=bool(number & 1))
    assert (told.candidates, told.confirmed, told.nat) == before
    assert len(told.observed) <= MAX_OBSERVERS


def test_nor_has_the_relay_once_two_others_have_told() -> None:
    told = Told()
    told.by("11.66.0.1", LIE)
    assert told.candidates == (LIE,)  # who believes nobody else has nothing better to try
    told.by("11.1.0.1", TRUE)
    told.by("11.2.0.1", TRUE)
    assert (told.candidates, told.confirmed) == ((TRUE,), (TRUE,))


def test_one_that_lies_about_the_port_alone_is_outvoted_too() -> None:
    told = Told()
    for number in (1, 2, 3):
        told.by(f"11.{number}.0.1", TRUE)
    told.by("11.4.0.1", "/ip4/11.9.0.1/tcp/1")
    assert told.candidates == (TRUE,)
    assert told.nat == NatView(Mapping.INDEPENDENT, True)


def test_behind_a_nat_with_a_port_for_each_a_lie_about_the_ip_is_not_heard() -> None:
    told = Told()
    for number in (1, 2, 3):
        told.by(f"11.{number}.0.1", f"/ip4/11.9.0.1/tcp/{40000 + number}")
    told.by("11.4.0.1", LIE)
    assert LIE not in told.candidates
    assert len(told.candidates) == 3
    assert told.nat == NatView(Mapping.DEPENDENT, False)


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ("/ip4/192.168.1.10/tcp/1", "private"),
        ("/ip4/10.0.0.1/tcp/1", "private"),
        ("/ip4/100.64.0.9/tcp/1", "private"),
        ("/ip4/127.0.0.1/tcp/1", "private"),
        ("/ip4/244.152.12.79/tcp/15020", "private"),  # as the reference makes them up for its gossip
        ("/ip4/0.0.0.0/tcp/1", "private"),
        ("/ip4/224.0.0.1/tcp/1", "private"),
        ("/ip6/fdff::1/tcp/1", "family"),
        ("/ip6/2d00:9::1/tcp/1", "family"),
        ("/ip4/11.9.0.1/tcp/0", "malformed"),
        ("/ip4/11.9.0.1/udp/1/quic-v1", "malformed"),
        ("/dns4/example.org/tcp/1", "malformed"),
        ("/ip6zone/eth0/ip6/2d00:9::1/tcp/1", "malformed"),
        ("rubbish", "malformed"),
        (
            "/ip4/11.1.0.1/tcp/1/p2p/12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG/p2p-circuit",
            "relayed",
        ),
    ],
)
def test_what_can_not_have_been_seen_is_refused(seen: str, why: str) -> None:
    told = Told()
    assert told.by("11.1.0.1", seen) == why
    assert told.by("11.2.0.1", seen) == why
    assert (len(told.observed), told.candidates) == (0, ())


def test_synthetic_addresses_of_ipv6_are_refused_too() -> None:
    told = Told()
    assert told.by("2d00:1::1", "/ip6/fdff::1/tcp/1", local=f"/ip6/2d00:9::1/tcp/{PORT}") == "private"


def test_a_laboratory_believes_private_addresses_and_tells_smaller_networks_apart() -> None:
    told = Told(lab=True)
    assert told.by("10.0.1.1", "/ip4/10.0.9.1/tcp/1") is None
    told.by("10.0.2.1", "/ip4/10.0.9.1/tcp/1")
    assert told.confirmed == ("/ip4/10.0.9.1/tcp/1",)


def test_who_sees_us_from_within_our_site_does_not_count() -> None:
    told = Told()
    assert told.by("192.168.1.20", HOME) is None
    assert told.by("192.168.1.20", LIE) is None
    assert told.candidates == ()


def test_a_circuit_has_no_ends_that_anybody_sees() -> None:
    told = Told()
    why = told.observed.record(
        connection=1,
        remote="/ip4/11.1.0.1/tcp/1/p2p/12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG/p2p-circuit",
        local=HOME,
        observed=TRUE,
        outbound=True,
        listen_ports=[PORT],
        now=0.0,
    )
    assert why == "relayed"


# The thin waist


def test_a_connection_from_another_port_tells_our_ip_and_nothing_of_ports() -> None:
    told = Told()
    for number in (1, 2):
        told.by(f"11.{number}.0.1", "/ip4/11.9.0.1/tcp/50000", local="/ip4/192.168.1.10/tcp/50000")
    assert (told.candidates, told.nat.mapping) == ((), Mapping.UNKNOWN)
    told.by("11.3.0.1", LIE)
    assert told.candidates == ()  # two say another IP
    told.by("11.4.0.1", TRUE)
    assert told.candidates == (TRUE,)


def test_who_dialed_us_confirms_an_address_but_says_nothing_of_the_mapping() -> None:
    told = Told()
    told.by("11.1.0.1", TRUE, outbound=False)
    told.by("11.2.0.1", TRUE, outbound=False)
    assert told.confirmed == (TRUE,)
    assert told.nat == NatView(Mapping.UNKNOWN, None)


@pytest.mark.parametrize(
    ("ports", "view"),
    [
        ((), NatView(Mapping.UNKNOWN, None)),
        ((PORT,), NatView(Mapping.UNKNOWN, None)),
        ((PORT, PORT), NatView(Mapping.INDEPENDENT, True)),
        ((61000, 61000), NatView(Mapping.INDEPENDENT, False)),
        ((61000, 61001), NatView(Mapping.DEPENDENT, False)),
        ((61000, 61001, 61002), NatView(Mapping.DEPENDENT, False)),
        ((61000, 61000, 5), NatView(Mapping.INDEPENDENT, False)),
        ((61000, 61000, 5, 5), NatView(Mapping.UNKNOWN, None)),
    ],
)
def test_the_mapping(ports: tuple[int, ...], view: NatView) -> None:
    told = Told()
    for number, port in enumerate(ports):
        told.by(f"11.{number}.0.1", f"/ip4/11.9.0.1/tcp/{port}")
    assert told.nat == view


def test_two_that_disagree_about_our_ip_leave_the_mapping_open() -> None:
    told = Told()
    told.by("11.1.0.1", TRUE)
    told.by("11.2.0.1", LIE)
    assert told.nat == NatView(Mapping.UNKNOWN, None)


def test_without_a_nat_others_see_what_we_have() -> None:
    told = Told()
    for number in (1, 2):
        told.by(f"11.{number}.0.1", TRUE, local=TRUE)
    assert told.nat == NatView(Mapping.NONE, True)


# Time and state


def test_what_was_told_on_a_connection_counts_for_a_while_after_its_end() -> None:
    told = Told()
    for number in (1, 2):
        told.by(f"11.{number}.0.1", TRUE)
        told.observed.ended(told.number, 0.0)
    told.now = KEEP - 1
    assert told.confirmed == (TRUE,)
    told.now = KEEP
    assert told.candidates == ()
    told.observed.prune(told.now)
    assert len(told.observed) == 0


def test_while_a_connection_lasts_it_counts_however_old_it_is() -> None:
    told = Told()
    told.by("11.1.0.1", TRUE)
    told.now = 1e6
    told.observed.prune(told.now)
    assert told.candidates == (TRUE,)


def test_a_new_word_of_an_observer_takes_the_place_of_its_old_one() -> None:
    told = Told()
    for seen in (TRUE, "/ip4/11.10.0.1/tcp/5"):
        for number in (1, 2):
            told.by(f"11.{number}.0.1", seen)
    assert told.confirmed == ("/ip4/11.10.0.1/tcp/5",)
    assert len(told.observed) == 2


def test_a_loud_network_pushes_out_its_own_only() -> None:
    told = Told()
    for number in (1, 2):
        told.by(f"11.{number}.0.1", TRUE)
    for number in range(10 * MAX_OBSERVERS):
        told.by(f"11.66.{number >> 8}.{number & 255}", LIE)
    assert told.confirmed == (TRUE,)


STATEMENTS = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(0, 300), st.sampled_from([TRUE, LIE, "/ip4/11.9.0.1/tcp/7"]), st.booleans()
    ),
    max_size=300,
)


@given(STATEMENTS)
def test_whatever_is_told_state_is_bounded_and_the_bars_hold(statements: list[tuple[int, int, str, bool]]) -> None:
    told = Told()
    groups: dict[str, set[int]] = {}
    for network, host, seen, outbound in statements:
        told.now += 1
        told.by(f"11.{network}.{host >> 8}.{host & 255}", seen, outbound=outbound)
        groups.setdefault(seen, set()).add(network)
        if host % 3 == 0:
            told.observed.ended(told.number, told.now)
    assert len(told.observed) <= MAX_OBSERVERS
    assert len(told.candidates) <= MAX_CANDIDATES
    assert all(len(groups[each]) >= 2 for each in told.confirmed)
    assert set(told.confirmed) <= set(told.candidates)


def test_a_group_needs_an_ip() -> None:
    group_of = GroupOf()
    assert group_of("11.1.2.3") == group_of("/ip4/11.1.200.9/tcp/1") == "11.1.0.0/16"
    assert group_of("2d00:0:1:2::3") == "2d00:0:1::/48"
    for text in ("/dns4/example.org/tcp/1", "rubbish"):
        with pytest.raises(AddressError):
            group_of(text)


def test_sightings_are_in_the_order_of_the_dials() -> None:
    """Of dials of one moment nobody knows which packet left first: a NAT that counts its ports up is known by them."""
    told = Told()
    for number, (at, port) in enumerate([(0.0, 40001), (0.5, 40000), (1.0, 40002), (60.0, 40003), (120.0, 39000)]):
        told.now = at
        assert told.by(f"11.{number + 1}.0.2", f"/ip4/11.9.0.1/tcp/{port}") is None
    assert told.observed.sightings(4, 130.0) == (
        (129.5, 40000),
        (130.0, 40001),
        (129.0, 40002),
        (70.0, 40003),
        (10.0, 39000),
    )
    assert told.observed.sightings(6, 130.0) == ()


def test_dials_are_counted_by_ip() -> None:
    told = Told()
    for at, ip in ((0.0, "11.1.0.2"), (5.0, "11.7.0.1"), (5.0, "11.8.0.1"), (6.0, "11.8.0.1"), (6.0, "2d00::7")):
        told.observed.dialed(ip, at)
    assert told.observed.dials_since(4, 1.0) == 2, "one was dialed twice: that is one mapping"
    assert (told.observed.dials_since(6, 1.0), told.observed.dials_since(4, 6.0)) == (1, 0)
