from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.config import Limits
from kas_libp2p.errors import AddressError, ConfigError, Refused
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Direction, PeerId
from kas_libp2p.swarm._admission import HANDSHAKE_GRACE, MAX_BANS, Admission, Candidate, Ticket

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
NOTHING = {
    "max_connections": 0,
    "max_inbound": 0,
    "max_outbound": 0,
    "max_pending_inbound": 0,
    "max_per_peer": 0,
    "max_per_ip": 0,
}


def refusal(action: object) -> str:
    assert callable(action)
    with pytest.raises(Refused) as caught:
        action()
    return caught.value.limit


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [("max_connections", 3), ("max_inbound", 3), ("max_pending_inbound", 3), ("max_per_ip", 3)],
)
def test_each_limit_says_no_by_its_name_and_frees_on_release(limit: str, allowed: int) -> None:
    admission = Admission(replace(Limits(), **{limit: allowed}))
    tickets = [admission.admit_inbound("192.0.2.1", 0) for _ in range(allowed)]
    assert refusal(lambda: admission.admit_inbound("192.0.2.1", 0)) == limit
    tickets[0].release()
    tickets[0].release()  # once is enough
    admission.admit_inbound("192.0.2.1", 0)
    assert refusal(lambda: admission.admit_inbound("192.0.2.1", 0)) == limit


def test_room_for_our_own_dials_is_kept() -> None:
    admission = Admission(Limits(max_connections=4, max_inbound=3))
    for n in range(3):
        admission.admit_inbound(f"192.0.2.{n}", 0)
    assert refusal(lambda: admission.admit_inbound("192.0.2.9", 0)) == "max_inbound"
    admission.admit_dial(ALICE, 0)
    assert refusal(lambda: admission.admit_dial(BOB, 0)) == "max_connections"


def test_room_for_who_dials_us_is_kept() -> None:
    admission = Admission(Limits(max_connections=4, max_outbound=2))
    dialed = [admission.admit_dial(ALICE, 0) for _ in range(2)]
    assert refusal(lambda: admission.admit_dial(BOB, 0)) == "max_outbound"
    admission.admit_inbound("192.0.2.1", 0)
    dialed[0].establish(ALICE, 0)
    assert refusal(lambda: admission.admit_dial(BOB, 0)) == "max_outbound"
    dialed[0].release()
    admission.admit_dial(BOB, 0)
    assert admission.in_use()["max_outbound"] == 2


def test_established_connections_are_not_pending() -> None:
    admission = Admission(Limits(max_pending_inbound=1))
    admission.admit_inbound("192.0.2.1", 0).establish(ALICE, 0)
    admission.admit_inbound("192.0.2.1", 0)
    assert admission.in_use()["max_pending_inbound"] == 1


def shaking(admission: Admission, ip: str | None, now: float, gone: list[str], relay: PeerId | None = None) -> Ticket:
    ticket = admission.admit_inbound(ip, now, relay)
    ticket.evict = lambda: gone.append(ip or relay or "")
    return ticket


def test_a_host_that_has_most_places_in_handshakes_gives_its_oldest() -> None:
    admission, gone = Admission(Limits(max_pending_inbound=6)), list[str]()
    for ip in ("192.0.2.1", "192.0.2.2", "192.0.2.2", "192.0.2.3", "192.0.2.3", "192.0.2.3"):
        shaking(admission, ip, 0, gone)
    shaking(admission, "192.0.2.4", 0, gone)
    assert gone == ["192.0.2.3"]
    assert refusal(lambda: admission.admit_inbound("192.0.2.2", 0)) == "max_pending_inbound", "it has as many itself"
    shaking(admission, "192.0.2.5", 0, gone)
    assert sorted(gone) == ["192.0.2.2", "192.0.2.3"]
    assert admission.in_use()["max_pending_inbound"] == 6


def test_where_each_host_has_one_place_the_oldest_goes_once_it_had_its_time() -> None:
    admission, gone = Admission(Limits(max_pending_inbound=3)), list[str]()
    tickets = [shaking(admission, f"192.0.2.{n}", n / 10, gone) for n in range(3)]
    assert refusal(lambda: admission.admit_inbound("192.0.2.9", HANDSHAKE_GRACE - 0.01)) == "max_pending_inbound"
    assert gone == []
    shaking(admission, "192.0.2.9", HANDSHAKE_GRACE, gone)
    assert gone == ["192.0.2.0"]
    tickets[0].release()  # as its own task does in the end
    assert admission.in_use()["max_pending_inbound"] == 3
    tickets[1].establish(ALICE, HANDSHAKE_GRACE)
    shaking(admission, "192.0.2.9", HANDSHAKE_GRACE, gone)
    assert gone == ["192.0.2.0"], "who is through keeps its place"


def test_who_comes_through_one_relay_crowds_out_nobody_else() -> None:
    admission, gone = Admission(Limits(max_pending_inbound=4, max_per_ip=1)), list[str]()
    for relay in (ALICE, ALICE, ALICE, BOB):
        shaking(admission, None, 0, gone, relay)
    assert refusal(lambda: admission.admit_inbound(None, 0, ALICE)) == "max_pending_inbound", "one relay is one host"
    shaking(admission, "192.0.2.1", 0, gone)
    assert gone == [ALICE]
    assert refusal(lambda: admission.admit_inbound(None, 0, BOB)) == "max_pending_inbound", "it would have as many"


def test_a_host_without_limit_is_not_crowded() -> None:
    admission, gone = Admission(Limits(max_pending_inbound=2)), list[str]()
    for _ in range(2):
        shaking(admission, "127.0.0.1", 0, gone)
    assert refusal(lambda: admission.admit_inbound("192.0.2.1", 1)) == "max_pending_inbound"
    shaking(admission, "192.0.2.1", HANDSHAKE_GRACE, gone)
    assert gone == ["127.0.0.1"]


def test_one_ipv6_network_is_one_host_and_loopback_has_no_limit() -> None:
    admission = Admission(Limits(max_per_ip=1))
    admission.admit_inbound("2001:db8:1:1::1", 0)
    assert refusal(lambda: admission.admit_inbound("2001:db8:1:1:ffff::2", 0)) == "max_per_ip"
    admission.admit_inbound("2001:db8:1:2::1", 0)
    for _ in range(10):
        admission.admit_inbound("127.0.0.1", 0)
        admission.admit_inbound("::1", 0)


def test_per_peer() -> None:
    admission = Admission(Limits(max_per_peer=2))
    tickets = [admission.admit_inbound("192.0.2.1", 0) for _ in range(3)]
    tickets[0].establish(ALICE, 0)
    tickets[1].establish(ALICE, 0)
    assert refusal(lambda: tickets[2].establish(ALICE, 0)) == "max_per_peer"
    tickets[2].release()
    tickets[0].release()
    admission.admit_dial(ALICE, 0).establish(ALICE, 0)


def test_deny_works_in_both_directions_and_by_network_and_peer() -> None:
    admission = Admission(Limits(), deny=["198.51.100.0/24", ALICE])
    assert refusal(lambda: admission.admit_inbound("198.51.100.7", 0)) == "deny"
    assert refusal(lambda: admission.admit_inbound("::ffff:198.51.100.7", 0)) == "deny"
    assert refusal(lambda: admission.check_address("198.51.100.7", BOB, 0)) == "deny"
    assert refusal(lambda: admission.admit_dial(ALICE, 0)) == "deny"
    ticket = admission.admit_inbound("192.0.2.1", 0)
    assert refusal(lambda: ticket.establish(ALICE, 0)) == "deny"
    ticket.release()
    assert admission.in_use() == NOTHING


def test_allow_of_networks_costs_nothing_and_of_peers_waits_for_proof() -> None:
    networks = Admission(Limits(), allow=["192.0.2.0/24"])
    networks.admit_inbound("192.0.2.1", 0).establish(BOB, 0)
    assert refusal(lambda: networks.admit_inbound("198.51.100.1", 0)) == "allow"
    networks.admit_dial(ALICE, 0).establish(ALICE, 0)  # whom we dial is our own choice
    both = Admission(Limits(), allow=["192.0.2.0/24", ALICE])
    both.admit_inbound("192.0.2.1", 0).establish(BOB, 0)
    both.admit_inbound("198.51.100.1", 0).establish(ALICE, 0)
    assert refusal(lambda: both.admit_inbound("198.51.100.1", 0).establish(BOB, 0)) == "allow"


def test_a_wrong_entry_is_named() -> None:
    with pytest.raises(ConfigError, match=r"deny: '192\.0\.2\.0/99' is neither a peer id nor an IP network"):
        Admission(Limits(), deny=["192.0.2.0/99"])


def test_bans_end_by_themselves() -> None:
    admission = Admission(Limits())
    admission.ban(ALICE, 100, 10)
    admission.ban("2001:db8::5", 100, 20)
    assert refusal(lambda: admission.admit_dial(ALICE, 109.9)) == "ban"
    assert refusal(lambda: admission.admit_inbound("2001:db8::77", 109.9)) == "ban"
    assert admission.bans(109) == {ALICE: 1, "2001:db8::/64": 11}
    admission.admit_dial(ALICE, 110)
    assert admission.unban("2001:db8::1")
    assert not admission.unban("2001:db8::1")
    admission.admit_inbound("2001:db8::77", 110)
    with pytest.raises(AddressError, match="neither a peer id nor an IP"):
        admission.ban("frankfurt", 0, 1)


def test_bans_are_bounded_and_the_first_to_end_goes() -> None:
    admission = Admission(Limits())
    for n in range(MAX_BANS + 1):
        admission.ban(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", n, 1e6)
    assert len(admission.bans(MAX_BANS)) == MAX_BANS
    admission.admit_inbound("10.0.0.0", MAX_BANS)
    assert refusal(lambda: admission.admit_inbound("10.0.0.1", MAX_BANS)) == "ban"


def test_the_policy_is_asked_last_with_what_is_known() -> None:
    asked: list[Candidate] = []

    def policy(candidate: Candidate) -> str | None:
        asked.append(candidate)
        return "no friends of Bob" if candidate.peer == BOB else None

    admission = Admission(Limits(), deny=["198.51.100.0/24"])
    admission.policy = policy
    refusal(lambda: admission.admit_inbound("198.51.100.1", 0))
    assert asked == []
    ticket = admission.admit_inbound("192.0.2.1", 0)
    with pytest.raises(Refused, match="no friends of Bob") as caught:
        ticket.establish(BOB, 0)
    assert caught.value.limit == "policy"
    assert asked == [
        Candidate(Direction.INBOUND, "192.0.2.1", None),
        Candidate(Direction.INBOUND, "192.0.2.1", BOB),
    ]


@given(st.lists(st.tuples(st.sampled_from(["in", "out", "up", "end"]), st.integers(0, 7), st.integers(0, 3))))
def test_whatever_happens_nothing_leaks(steps: list[tuple[str, int, int]]) -> None:
    limits = Limits(
        max_connections=6, max_inbound=4, max_outbound=4, max_pending_inbound=3, max_per_ip=2, max_per_peer=2
    )
    admission = Admission(limits)
    tickets: list[Ticket] = []
    established: set[int] = set()
    for action, which, who in steps:
        peer = PeerId(f"peer {who}")
        try:
            if action == "in":
                tickets.append(admission.admit_inbound(f"192.0.2.{who}", 0))
            elif action == "out":
                tickets.append(admission.admit_dial(peer, 0))
            elif action == "up" and which < len(tickets) and which not in established:
                established.add(which)
                tickets[which].establish(peer, 0)
            elif action == "end" and which < len(tickets):
                tickets[which].release()
                established.add(which)
        except Refused:
            pass
        used = admission.in_use()
        assert all(0 <= used[name] <= getattr(admission.limits, name) for name in used)
    for ticket in tickets:
        ticket.release()
    assert admission.in_use() == NOTHING
    assert not admission._per_peer
    assert not admission._per_host
