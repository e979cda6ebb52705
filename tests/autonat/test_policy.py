"""Whom a server dials back. A table of requests and what comes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._messages import DialRequest, ResponseStatus, V1Dial, V1Status
from kas_libp2p.autonat._server import (
    ALL_BURST,
    IP_BURST,
    MAX_DATA,
    MAX_PAUSE,
    MAX_V1_DIALS,
    MIN_DATA,
    PEER_BURST,
    PEER_INTERVAL,
    Asker,
    Dial,
    Policy,
    Refusal,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PeerId

ALICE = Identity.from_seed(bytes(32)).peer_id
BOB = Identity.from_seed(bytes(range(32))).peer_id
HERE = "/ip4/11.0.0.1/tcp/4001"
SEEN = "/ip4/11.5.0.7/tcp/50123"
OWN = "/ip4/11.5.0.7/tcp/16117"


def policy(
    *,
    lab: bool = False,
    draw: float = 0.5,
    own: tuple[str, ...] = (HERE, "/ip4/127.0.0.1/tcp/4001"),
    dialed_us: tuple[PeerId, ...] = (),
) -> Policy:
    return Policy(allow_private=lab, own=lambda: own, dialed_us=lambda peer: peer in dialed_us, draw=lambda: draw)


def asker(address: str = SEEN, *, peer: PeerId = ALICE, relayed: bool = False) -> Asker:
    return Asker(peer, address, relayed)


def request(*texts: str) -> DialRequest:
    return DialRequest(tuple(bytes(addr.parse(text)) for text in texts), 7)


def v1(*texts: str, peer: PeerId = ALICE) -> V1Dial:
    return V1Dial(addr.peer_id_to_bytes(peer), request(*texts).addresses)


def reason(decision: object) -> str:
    assert isinstance(decision, Refusal), decision
    return decision.reason


def test_the_address_at_which_the_asker_is_seen_is_dialed_for_nothing() -> None:
    for text in (OWN, f"{OWN}/p2p/{ALICE}"):
        assert policy().v2(request(text), asker(), 0.0) == Dial(0, addr.parse(OWN), ALICE)


@pytest.mark.parametrize(("draw", "size"), [(0.0, MIN_DATA), (1.0, MAX_DATA)])
def test_another_ip_has_its_price(draw: float, size: int) -> None:
    decision = policy(draw=draw).v2(request("/ip4/11.6.0.1/tcp/1"), asker(), 0.0)
    assert decision == Dial(0, addr.parse("/ip4/11.6.0.1/tcp/1"), ALICE, size, draw * MAX_PAUSE)


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/10.0.0.1/tcp/80",
        "/ip4/127.0.0.1/tcp/80",
        "/ip4/0.0.0.0/tcp/80",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/224.0.0.1/tcp/80",
        "/ip4/100.64.0.1/tcp/80",
        "/ip4/240.0.0.1/tcp/80",
        "/ip6/::1/tcp/80",
        "/ip6/fe80::1/tcp/80",
        "/ip6/fd00::1/tcp/80",
        "/ip6/::ffff:192.168.1.1/tcp/80",
        "/ip6/2002:c0a8:101::/tcp/80",
        "/ip4/11.5.0.7/tcp/0",
        HERE,
        "/ip4/11.0.0.1/tcp/22",  # another service of this machine, which may trust who comes from here
        "/ip6/2d00::1/tcp/1",  # this machine has no IPv6: it could not tell
        f"{OWN}/p2p/{BOB}",
    ],
)
def test_a_private_own_or_impossible_target_is_never_dialed(text: str) -> None:
    where = asker()
    assert reason(policy().v2(request(text), where, 0.0)) == "private_target"
    assert reason(policy().stranger(request(text), where, 0.0)) == "private_target"


def test_a_zone_makes_no_address_of_ours_anothers() -> None:
    rules = policy(own=("/ip6/2d00::1/tcp/4001",))
    for text in ("/ip6/2d00::1/tcp/22", "/ip6zone/eth0/ip6/2d00::1/tcp/22", "/ip6zone/1/ip6/2d00::2/tcp/22"):
        assert reason(rules.v2(request(text), asker("/ip6/2d01::1/tcp/1"), 0.0)) == "private_target"


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/11.0.0.9/tcp/1/p2p/{BOB}/p2p-circuit",
        f"/ip4/11.0.0.9/tcp/1/p2p/{BOB}/p2p-circuit/p2p/{ALICE}",
        "/ip4/11.5.0.7/udp/1/quic-v1",
        "/dns4/victim.example.org/tcp/1",
        "/ip4/11.5.0.7/tcp/1/ws",
    ],
)
def test_nothing_but_plain_tcp_to_an_ip_is_dialed(text: str) -> None:
    assert reason(policy().v2(request(text), asker(), 0.0)) == "no_address"


def test_garbage_is_passed_over() -> None:
    listed = (b"", b"\x00", b"\xff" * 50, bytes(addr.parse(OWN)))
    assert policy().v2(DialRequest(listed, 1), asker(), 0.0) == Dial(3, addr.parse(OWN), ALICE)


def test_the_first_that_may_be_dialed_is() -> None:
    decision = policy().v2(request("/ip4/10.0.0.1/tcp/1", OWN, "/ip4/11.6.0.1/tcp/1"), asker(), 0.0)
    assert isinstance(decision, Dial)
    assert decision.index == 1


def test_over_a_relay_nobody_is_served() -> None:
    relayed = asker(f"/ip4/11.9.0.1/tcp/1/p2p/{BOB}/p2p-circuit", relayed=True)
    for decision in (
        policy().v2(request(OWN), relayed, 0.0),
        policy().stranger(request(OWN), relayed, 0.0),
        policy().stranger_dial(request(f"{OWN}/p2p/{BOB}"), relayed, 0.0),
        policy().v1(v1(OWN), relayed, 0.0),
    ):
        assert decision == Refusal(ResponseStatus.E_REQUEST_REJECTED, "relayed")


def test_who_sits_in_our_own_site_is_told_nothing() -> None:
    inside = asker("/ip4/192.168.1.5/tcp/1")
    assert reason(policy().v2(request(OWN), inside, 0.0)) == "same_site"
    assert isinstance(policy(lab=True).v2(request(OWN), inside, 0.0), Dial)
    rules = policy(own=("/ip6/2d00::1/tcp/4001",))
    neighbour, other = "/ip6/2d00::9/tcp/1", "/ip6/2d00:0:0:1::9/tcp/1"
    assert reason(rules.v2(request(neighbour), asker(neighbour), 0.0)) == "same_site"
    assert isinstance(rules.v2(request(other), asker(other), 0.0), Dial)


def test_a_laboratory_dials_private_addresses_but_not_itself() -> None:
    inside, lab = asker("/ip4/127.0.0.1/tcp/1"), policy(lab=True, own=("/ip4/127.0.0.1/tcp/4001",))
    assert isinstance(lab.v2(request("/ip4/127.0.0.1/tcp/80"), inside, 0.0), Dial)
    assert reason(lab.v2(request("/ip4/127.0.0.1/tcp/4001"), inside, 0.0)) == "private_target"


def test_a_stranger_is_sent_to_the_askers_own_ip_only() -> None:
    assert policy().stranger(request(OWN), asker(), 0.0) == Dial(0, addr.parse(OWN), ALICE)
    assert reason(policy().stranger(request("/ip4/11.6.0.1/tcp/1"), asker(), 0.0)) == "other_ip"


def test_as_a_stranger_we_dial_who_is_named_and_never_for_nothing() -> None:
    decision = policy(draw=0.0).stranger_dial(request(f"{OWN}/p2p/{BOB}"), asker(), 0.0)
    assert decision == Dial(0, addr.parse(OWN), BOB, MIN_DATA, 0.0)
    assert reason(policy().stranger_dial(request(OWN), asker(), 0.0)) == "private_target"


def test_to_a_peer_that_dialed_us_we_are_no_stranger() -> None:
    wanted = request(f"{OWN}/p2p/{BOB}")
    assert reason(policy(dialed_us=(BOB,)).stranger_dial(wanted, asker(), 0.0)) == "known"
    assert isinstance(policy(dialed_us=(ALICE,)).stranger_dial(wanted, asker(), 0.0), Dial)


# v1


def test_v1_dials_the_ports_that_are_named_at_the_ip_that_is_seen() -> None:
    decision = policy().v1(
        v1("/ip4/192.168.1.10/tcp/16117", OWN, "/ip4/11.200.0.1/tcp/22", "/ip6/2d00::1/tcp/1"), asker(), 0.0
    )
    assert decision == (addr.parse(OWN), addr.parse("/ip4/11.5.0.7/tcp/22"))


def test_v1_dials_a_few_at_most() -> None:
    decision = policy().v1(v1(*(f"/ip4/11.5.0.7/tcp/{port}" for port in range(1, 50))), asker(), 0.0)
    assert isinstance(decision, tuple)
    assert len(decision) == MAX_V1_DIALS


def test_v1_for_another_peer_is_a_bad_request() -> None:
    decision = policy().v1(v1(OWN, peer=BOB), asker(), 0.0)
    assert isinstance(decision, Refusal)
    assert (decision.v1, decision.reason) == (V1Status.E_BAD_REQUEST, "other_peer")


@given(st.lists(st.binary(max_size=40), max_size=8), st.booleans())
def test_whatever_is_asked_for_v1_dials_no_other_ip_and_v2_takes_its_price(listed: list[bytes], relayed: bool) -> None:
    texts = [bytes(addr.parse("/ip4/11.77.0.1/tcp/5")), *listed]
    dialed = policy().v1(V1Dial(addr.peer_id_to_bytes(ALICE), tuple(texts)), asker(relayed=relayed), 0.0)
    assert isinstance(dialed, Refusal) or all(str(each).startswith("/ip4/11.5.0.7/") for each in dialed)
    decision = policy().v2(DialRequest(tuple(texts), 1), asker(relayed=relayed), 0.0)
    if isinstance(decision, Dial):
        assert decision.data >= MIN_DATA or str(decision.address).startswith("/ip4/11.5.0.7/")
        assert addr.is_public(decision.address)


# Rates


def test_each_peer_has_its_rate() -> None:
    rules = policy()
    assert all(isinstance(rules.v2(request(OWN), asker(), 0.0), Dial) for _ in range(PEER_BURST))
    assert reason(rules.v2(request(OWN), asker(), 0.0)) == "autonat_per_peer"
    assert reason(rules.v1(v1(OWN), asker(), 0.0)) == "autonat_per_peer"
    assert isinstance(rules.v2(request(OWN), asker(peer=BOB), 0.0), Dial)
    assert isinstance(rules.v2(request(OWN), asker(), PEER_INTERVAL + 0.1), Dial)


def peers(count: int) -> list[PeerId]:
    return [Identity.from_seed(number.to_bytes(32, "big")).peer_id for number in range(count)]


@pytest.mark.parametrize("seen", ["/ip4/11.5.0.7/tcp/{0}", "/ip6/2d00:0:0:1::{0:x}/tcp/1"])
def test_a_thousand_peers_at_one_ip_have_the_rate_of_one_ip(seen: str) -> None:
    rules = policy(own=(HERE, "/ip6/2d00::1/tcp/1"))
    decisions = [
        rules.v2(request(seen.format(number + 1)), asker(seen.format(number + 1), peer=peer), 0.0)
        for number, peer in enumerate(peers(50))
    ]
    assert sum(isinstance(each, Dial) for each in decisions) == IP_BURST
    assert reason(decisions[-1]) == "autonat_per_ip"


def test_there_is_a_rate_in_all() -> None:
    rules = policy()
    decisions = []
    for number, peer in enumerate(peers(100)):
        where = f"/ip4/11.{number + 10}.0.1/tcp/1"
        decisions.append(rules.v2(request(where), asker(where, peer=peer), 0.0))
    assert sum(isinstance(each, Dial) for each in decisions) == ALL_BURST
    assert reason(decisions[-1]) == "autonat_in_all"


def test_who_is_refused_for_a_rate_uses_up_no_other() -> None:
    rules = policy()
    for _ in range(1000):
        rules.v2(request(OWN), asker(), 0.0)
    other = asker("/ip4/11.5.0.8/tcp/1", peer=BOB)
    assert isinstance(rules.v2(request("/ip4/11.5.0.8/tcp/1"), other, 0.0), Dial)
