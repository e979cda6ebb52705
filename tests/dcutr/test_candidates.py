"""What is told and what is dialed."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses as addr
from kas_libp2p.dcutr._candidates import (
    ALL_BURST,
    HOST_BURST,
    HOST_INTERVAL,
    MAX_OURS,
    MAX_TARGETS,
    MAX_UNTRUSTED,
    PEER_BURST,
    RELAY_BURST,
    RELAY_INTERVAL,
    VOUCHED_BURST,
    VOUCHED_INTERVAL,
    Budget,
    Fault,
    Found,
    Known,
    Own,
    ours,
    theirs,
)
from kas_libp2p.identity import Identity
from kas_libp2p.transport._punch import Target, sift
from tests.dcutr.world import ALICE, BOB, CAROL, RELAY

PEER, OTHER = ALICE.peer_id, BOB.peer_id
SEEN = "/ip4/11.2.0.1/tcp/40001"


def told(own: Own, *, allow_private: bool = False) -> list[str]:
    return [str(each) for each in ours(own, allow_private=allow_private)]


def dialed(found: Found) -> list[tuple[str, bool]]:
    return [(str(each.address), each.trusted) for each in found.targets]


# Ours


def test_ipv6_first_then_observed_mapped_and_listened_on() -> None:
    own = Own(
        observed=("/ip4/11.1.0.1/tcp/40000", "/ip4/11.1.0.1/tcp/16117"),
        mapped=("/ip4/11.1.0.1/tcp/50000",),
        listen=("/ip4/11.1.0.2/tcp/16117", "/ip6/2d00::1/tcp/16117"),
    )
    assert told(own) == [
        "/ip6/2d00::1/tcp/16117",
        "/ip4/11.1.0.1/tcp/40000",
        "/ip4/11.1.0.1/tcp/16117",
        "/ip4/11.1.0.1/tcp/50000",
        "/ip4/11.1.0.2/tcp/16117",
    ]


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.168.1.2/tcp/16117",
        "/ip4/127.0.0.1/tcp/16117",
        "/ip4/0.0.0.0/tcp/16117",
        "/ip6/fe80::1/tcp/16117",
        "/ip6/fd00::1/tcp/16117",
        "/ip4/11.1.0.1/tcp/0",
        "/ip4/11.1.0.1/tcp/443",
        "/ip4/11.1.0.1/udp/16117/quic-v1",
        "/ip4/11.1.0.1/tcp/16117/ws",
        "/dns4/example.org/tcp/16117",
        f"/ip4/11.1.0.1/tcp/16117/p2p/{RELAY}/p2p-circuit",
        "not an address",
    ],
)
def test_what_is_told_to_nobody(address: str) -> None:
    assert told(Own(listen=(address,), observed=(address,), mapped=(address,))) == []


def test_each_once_and_without_our_peer_id() -> None:
    own = Own(observed=(SEEN, f"{SEEN}/p2p/{PEER}"), listen=(SEEN,))
    assert told(own) == [SEEN]


def test_local_ones_only_where_they_were_agreed_on_or_in_a_laboratory() -> None:
    local = "/ip4/192.168.1.2/tcp/16117"
    assert told(Own(listen=(local,), local=(local,))) == [local]
    assert told(Own(listen=(local,)), allow_private=True) == [local]
    never = ("/ip4/127.0.0.1/tcp/16117", "/ip6/fe80::1/tcp/16117", "/ip4/192.168.1.2/tcp/80")
    assert told(Own(listen=never, local=never), allow_private=True) == []


# Theirs


def test_where_the_relay_sees_it_comes_first() -> None:
    """As rust-libp2p 0.57 tells its listen port where its NAT gave it another one."""
    found = theirs(["/ip4/11.2.0.1/tcp/4803"], Known(observed=(SEEN,)), PEER)
    assert dialed(found) == [(SEEN, True), ("/ip4/11.2.0.1/tcp/4803", True)]
    assert not found.refused


def test_what_nobody_else_has_seen_is_untrusted() -> None:
    claimed = ["/ip4/11.9.9.9/tcp/16117", "/ip6/2d00:2::1/tcp/16117", "/ip4/11.2.0.1/tcp/16117"]
    assert dialed(theirs(claimed, Known(), PEER)) == [
        ("/ip6/2d00:2::1/tcp/16117", False),
        ("/ip4/11.9.9.9/tcp/16117", False),
        ("/ip4/11.2.0.1/tcp/16117", False),
    ]
    assert dialed(theirs(claimed, Known(observed=(SEEN,)), PEER)) == [
        (SEEN, True),
        ("/ip4/11.2.0.1/tcp/16117", True),
        ("/ip6/2d00:2::1/tcp/16117", False),
        ("/ip4/11.9.9.9/tcp/16117", False),
    ]


def test_ipv6_counts_by_its_64() -> None:
    known = Known(observed=("/ip6/2d00:2::1/tcp/16117",))
    near, far = "/ip6/2d00:2::ffff/tcp/16117", "/ip6/2d00:2:0:1::1/tcp/16117"
    assert dialed(theirs([near, far], known, PEER))[1:] == [(near, True), (far, False)]


def test_who_is_seen_at_a_port_that_is_never_dialed_is_known_all_the_same() -> None:
    known = Known(observed=("/ip4/11.2.0.1/tcp/500",))
    assert dialed(theirs([SEEN], known, PEER)) == [(SEEN, True)]


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("/ip4/192.168.1.2/tcp/16117", Fault.PRIVATE),
        ("/ip4/100.64.0.1/tcp/16117", Fault.PRIVATE),
        ("/ip4/169.254.169.254/tcp/16117", Fault.PRIVATE),
        ("/ip6/fd00::1/tcp/16117", Fault.PRIVATE),
        ("/ip6/::ffff:10.0.0.1/tcp/16117", Fault.PRIVATE),
        ("/ip4/127.0.0.1/tcp/16117", Fault.LOOPBACK),
        ("/ip6/::1/tcp/16117", Fault.LOOPBACK),
        ("/ip6/::ffff:127.0.0.1/tcp/16117", Fault.LOOPBACK),
        ("/ip4/224.0.0.1/tcp/16117", Fault.MULTICAST),
        ("/ip6/ff02::1/tcp/16117", Fault.MULTICAST),
        ("/ip4/0.0.0.0/tcp/16117", Fault.RESERVED),
        ("/ip4/255.255.255.255/tcp/16117", Fault.RESERVED),
        ("/ip4/240.1.2.3/tcp/16117", Fault.RESERVED),
        ("/ip4/192.0.2.1/tcp/16117", Fault.RESERVED),
        ("/ip6/2002:0b02:1::1/tcp/16117", Fault.RESERVED),
        ("/ip4/11.2.0.1/tcp/0", Fault.NO_PORT),
        ("/ip4/11.2.0.1/tcp/25", Fault.LOW_PORT),
        ("/ip4/11.2.0.1/tcp/1023", Fault.LOW_PORT),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/16117", Fault.NOT_TCP),
        ("/ip4/11.2.0.1/udp/16117", Fault.NOT_TCP),
        ("/dns4/example.org/tcp/16117", Fault.NOT_TCP),
        (f"/ip4/11.2.0.1/tcp/16117/p2p/{RELAY}/p2p-circuit/p2p/{PEER}", Fault.NOT_TCP),
        (f"/ip4/11.2.0.1/tcp/16117/p2p/{OTHER}", Fault.OTHER_PEER),
        ("/ip4/11.1.0.1/tcp/16117", Fault.OWN),
    ],
)
def test_what_is_never_dialed(address: str, fault: Fault) -> None:
    """Not even at the word of a relay, nor by identify."""
    own = ("/ip4/11.1.0.1/tcp/16117",)
    for known in (Known(own=own), Known(own=own, observed=(address,)), Known(own=own, identified=(address,))):
        found = theirs([address], known, PEER)
        assert found.targets == ()
        assert set(found.refused) == {fault}


def test_in_a_laboratory_private_ones_are_dialed_and_nothing_else() -> None:
    claimed = ["/ip4/10.0.0.1/tcp/16117", "/ip4/127.0.0.1/tcp/16117", "/ip4/10.0.0.1/tcp/25", "/ip6/fe80::1/tcp/16117"]
    assert dialed(theirs(claimed, Known(), PEER, allow_private=True)) == [("/ip4/10.0.0.1/tcp/16117", False)]


def test_local_ones_where_both_agreed_and_in_our_own_networks_alone() -> None:
    known = Known(local=("192.168.1.0/24", "fd00::/64"))
    claimed = ["/ip4/192.168.1.9/tcp/16117", "/ip4/192.168.2.9/tcp/16117", "/ip4/127.0.0.1/tcp/16117"]
    found = theirs(claimed, known, PEER)
    assert dialed(found) == [("/ip4/192.168.1.9/tcp/16117", False)]
    assert sift(found.targets) == (list(found.targets), [])  # the last line of defence, too


def test_an_empty_connect_falls_back_to_identify() -> None:
    """The reference overlay's."""
    known = Known(observed=(SEEN,), identified=("/ip4/11.2.0.1/tcp/16117", "/ip4/192.168.1.2/tcp/16117"))
    expected = [(SEEN, True), ("/ip4/11.2.0.1/tcp/16117", True)]
    assert dialed(theirs([], known, PEER)) == expected
    assert dialed(theirs(["/ip4/192.168.1.2/tcp/16117"], known, PEER)) == expected
    assert dialed(theirs([SEEN], known, PEER)) == expected[:1]


def test_duplicates_are_dialed_once() -> None:
    claimed = [SEEN, f"{SEEN}/p2p/{PEER}", "/ip6/::ffff:11.2.0.1/tcp/40001"] * 3
    assert dialed(theirs(claimed, Known(), PEER)) == [(SEEN, False)]


def test_of_many_a_few_are_dialed() -> None:
    many = [f"/ip4/11.2.0.1/tcp/{port}" for port in range(2000, 2500)]
    found = theirs(many, Known(), PEER)
    assert len(found.targets) == MAX_UNTRUSTED
    assert found.refused == {Fault.TOO_MANY: 500 - MAX_UNTRUSTED}
    assert len(theirs(many, Known(observed=(SEEN,)), PEER).targets) == MAX_TARGETS


def test_nothing_that_a_peer_tells_pushes_out_what_others_saw() -> None:
    known = Known(observed=(SEEN, "/ip6/2d00:2::1/tcp/16117"))
    many = [f"/ip6/2d00:2::1/tcp/{port}" for port in range(2000, 2050)]
    found = dialed(theirs(many, known, PEER))
    assert found[:3] == [(SEEN, True), ("/ip6/2d00:2::1/tcp/16117", True), ("/ip6/2d00:2::1/tcp/2000", True)]
    assert len(found) == MAX_TARGETS


# What may be anything

PORTS = st.integers(0, 65535) | st.sampled_from([0, 25, 1023, 1024, 16117])
IPS = st.one_of(
    st.ip_addresses(),
    st.sampled_from(["11.2.0.1", "11.1.0.1", "10.0.0.1", "127.0.0.1", "2d00:2::1", "::1", "ff02::1", "0.0.0.0"]),
).map(str)
TEXTS = st.one_of(
    st.builds(lambda ip, port: str(addr.from_ip_port(ip, port)), IPS, PORTS),
    st.sampled_from(
        [
            "",
            "/",
            "junk",
            f"/p2p/{PEER}",
            f"{SEEN}/p2p/{OTHER}",
            f"{SEEN}/p2p/{RELAY}/p2p-circuit",
            "/ip4/11.2.0.1/udp/4001/quic-v1",
        ]
    ),
)
LISTS = st.lists(TEXTS, max_size=20)


def check_dialable(addresses: Iterable[str], *, private: bool) -> None:
    for each in addresses:
        where = addr.ip_port(each)
        assert where is not None
        assert where[1] >= addr.LEAST_PORT
        ip = ipaddress.ip_address(where[0])
        assert not any((ip.is_loopback, ip.is_multicast, ip.is_unspecified, ip.is_link_local))
        assert addr.is_public(each) or (private and addr.is_private(each))


@given(LISTS, LISTS, LISTS, LISTS, st.booleans())
def test_whatever_the_facts_what_is_told_makes_sense(
    observed: list[str], mapped: list[str], listen: list[str], local: list[str], allow_private: bool
) -> None:
    found = told(Own(observed, mapped, listen, local), allow_private=allow_private)
    assert len(found) <= MAX_OURS
    assert len(set(found)) == len(found)
    check_dialable(found, private=allow_private or bool(local))
    families = [addr.family(each) for each in found]
    assert families == sorted(families, key=lambda family: family != 6)


@given(LISTS, LISTS, LISTS, LISTS, st.booleans())
def test_whatever_a_peer_tells_what_is_dialed_is_allowed(
    claimed: list[str], observed: list[str], identified: list[str], own: list[str], allow_private: bool
) -> None:
    known = Known(observed, identified, own)
    found = theirs(claimed, known, PEER, allow_private=allow_private)
    addresses = [str(each.address) for each in found.targets]
    assert len(found.targets) <= MAX_TARGETS
    assert len(set(addresses)) == len(addresses)
    assert not set(addresses) & set(own)
    check_dialable(addresses, private=allow_private)
    seen = {addr.subnet_key(each) for each in observed if each.startswith("/ip") and addr.ip_port(each) is not None}
    trusted = [each.trusted for each in found.targets]
    assert trusted == sorted(trusted, reverse=True)
    assert trusted.count(False) <= MAX_UNTRUSTED
    for target in found.targets:
        assert target.trusted == (addr.subnet_key(target.address) in seen)


# The budget


def untrusted(*ips: str) -> Found:
    return theirs([f"/ip4/{ip}/tcp/16117" for ip in ips], Known(), PEER)


def test_an_untrusted_host_has_few_dials_whoever_names_it() -> None:
    budget = Budget()
    victim = untrusted("11.66.0.1")
    for _ in range(HOST_BURST):
        assert budget.spend(victim, PEER, RELAY, 0.0).targets == victim.targets
    for peer in (PEER, OTHER, CAROL.peer_id):
        refused = budget.spend(victim, peer, RELAY, 1.0)
        assert refused.targets == ()
        assert refused.refused == {Fault.BUDGET: 1}
    assert budget.spend(victim, PEER, RELAY, HOST_INTERVAL).targets == victim.targets


def test_one_peer_has_few_untrusted_hosts_dialed() -> None:
    budget = Budget()
    hosts = [untrusted(f"11.66.0.{number}") for number in range(PEER_BURST + 5)]
    assert sum(len(budget.spend(each, PEER, RELAY, 0.0).targets) for each in hosts) == PEER_BURST
    assert len(budget.spend(untrusted("11.67.0.1"), OTHER, RELAY, 0.0).targets) == 1


def test_many_peers_have_few_untrusted_hosts_dialed() -> None:
    budget = Budget()
    names = [RELAY + str(number) for number in range(ALL_BURST * 2)]
    hosts = [untrusted(f"11.66.{number}.1") for number in range(ALL_BURST * 2)]
    spent = [budget.spend(host, name, RELAY, 0.0) for host, name in zip(hosts, names, strict=True)]  # type: ignore[arg-type]
    assert sum(len(each.targets) for each in spent) == ALL_BURST


def test_where_a_peer_was_seen_is_dialed_often_and_then_as_any_other() -> None:
    budget = Budget()
    seen = Found((Target(addr.parse(SEEN), trusted=True),), Counter())
    for number in range(VOUCHED_BURST):
        peer = Identity.from_seed(bytes([9, number]) + bytes(30)).peer_id
        assert budget.spend(seen, peer, RELAY, 0.0).targets == seen.targets
    for _ in range(HOST_BURST):
        assert dialed(budget.spend(seen, PEER, RELAY, 0.0)) == [(SEEN, False)]
    left = budget.spend(seen, PEER, RELAY, 0.0)
    assert (left.targets, left.refused) == ((), {Fault.BUDGET: 1})
    assert budget.spend(seen, PEER, RELAY, VOUCHED_INTERVAL).targets == seen.targets


def test_a_relay_that_names_another_victim_each_time_has_few_dialed_as_trusted() -> None:
    budget = Budget()
    names = [Identity.from_seed(bytes([9, number]) + bytes(30)).peer_id for number in range(2 * RELAY_BURST)]
    victims = [
        Found((Target(addr.from_ip_port(f"11.66.{number}.1", 16117), trusted=True),), Counter())
        for number in range(2 * RELAY_BURST)
    ]
    spent = [budget.spend(each, name, RELAY, 0.0) for each, name in zip(victims, names, strict=True)]
    dials = [target.trusted for each in spent for target in each.targets]
    assert dials == [True] * RELAY_BURST + [False] * ALL_BURST
    assert budget.spend(victims[-1], PEER, CAROL.peer_id, 0.0).targets == victims[-1].targets, "another relay"
    assert budget.spend(victims[-2], PEER, RELAY, RELAY_INTERVAL).targets == victims[-2].targets
