"""What a relay decides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.config import RelayLimits
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._messages import Status
from kas_libp2p.relay._server import NETWORK_HOSTS, Asker, Circuit, Place, Refusal, Relay

FREE = {"requests_per_peer": 10**6, "requests_per_ip": 10**6}
"""No limit on requests, where another one is looked at."""


def asker(name: str, ip: str | None = "11.0.0.1", connection: int = 0) -> Asker[str]:
    return Asker(f"{name}/{connection}", PeerId(name), ip)


def relay(**limits: float) -> Relay[str]:
    return Relay(RelayLimits(**{**FREE, **limits}))  # type: ignore[arg-type]


def reserved(machine: Relay[str], who: Asker[str], now: float = 0.0) -> str:
    """Ask as the shell does. Returns the reason why not, or nothing."""
    refusal = machine.admit_reserve(who, now)
    answer = refusal if refusal is not None else machine.reserve(who, now)
    if isinstance(answer, Refusal):
        assert answer.status in (Status.RESERVATION_REFUSED, Status.PERMISSION_DENIED)
        return answer.reason
    return ""


def connected(machine: Relay[str], who: Asker[str], to: str, now: float = 0.0) -> Circuit[str] | Refusal:
    return machine.admit_connect(who, PeerId(to), now) or machine.connect(who, PeerId(to), now)


def places(machine: Relay[str], now: float = 0.0) -> list[str]:
    return [place.connection for place in machine.places(now)]


# Places


def test_a_place_lasts_and_is_renewed() -> None:
    machine = relay(reservation_seconds=3600)
    place = machine.reserve(asker("a"), 0.0)
    assert place == Place("a/0", PeerId("a"), 3600.0, "11.0.0.1", "11.0.0.0/16")
    assert machine.has_place("a/0", PeerId("a"), 3599.9)
    assert not reserved(machine, asker("a"), 3000.0)
    assert places(machine, 6599.9) == ["a/0"]
    assert places(machine, 6600.0) == []
    assert machine.in_use(6600.0)["max_reservations"] == 0
    assert not machine.has_place("a/0", PeerId("a"), 6600.0)


def test_a_place_ends_with_its_connection() -> None:
    machine = relay()
    machine.reserve(asker("a"), 0.0)
    machine.forget("a/7", PeerId("a"))  # another connection of the same peer
    assert places(machine) == ["a/0"]
    machine.forget("a/0", PeerId("a"))
    assert places(machine) == []
    machine.forget("a/0", PeerId("a"))


def test_a_place_goes_over_to_another_connection_of_its_peer() -> None:
    machine = relay(max_reservations=2, max_reservations_per_ip=1)
    assert not reserved(machine, asker("a", "11.0.0.1"), 0.0)
    assert not reserved(machine, asker("b", "12.0.0.1"), 10.0)
    machine.forget("a/0", PeerId("a"), asker("a", "13.0.0.1", 1))
    assert places(machine, 3599.9) == ["a/1", "b/0"]
    assert places(machine, 3600.0) == ["b/0"]  # it lasts no longer for that
    assert not reserved(machine, asker("a", "11.0.0.1"), 3600.0)
    machine.forget("a/0", PeerId("a"), asker("a", "12.0.0.1", 1))  # where there is one already
    assert places(machine, 3600.0) == ["b/0"]
    machine.forget("b/0", PeerId("b"), asker("b", None, 1))  # behind a relay
    assert places(machine, 3600.0) == []
    assert set(machine.in_use(3600.0).values()) == {0}


def test_a_peer_that_comes_back_takes_its_place_over() -> None:
    machine = relay(max_reservations=2, max_reservations_per_ip=1)
    assert not reserved(machine, asker("a", "11.0.0.1", 1))
    assert not reserved(machine, asker("b", "12.0.0.1"))
    assert not reserved(machine, asker("a", "13.0.0.1", 2))  # from another network, before the old line is known dead
    assert places(machine) == ["b/0", "a/2"]
    machine.forget("a/1", PeerId("a"))
    assert places(machine) == ["b/0", "a/2"]
    assert not reserved(machine, asker("b", "11.0.0.1", 1))  # what it left is free


@pytest.mark.parametrize(
    ("limit", "ips"),
    [
        ("max_reservations", ["11.0.0.1", "12.0.0.1", "13.0.0.1", "14.0.0.1"]),
        ("max_reservations_per_ip", ["11.0.0.1"] * 4),
        ("max_reservations_per_ip", [f"2d00:1:2:3::{n}" for n in range(4)]),
        ("max_reservations_per_ip", ["::ffff:11.0.0.1", "11.0.0.1", "11.0.0.1", "11.0.0.1"]),
        ("max_reservations_per_network", [f"11.0.{n}.1" for n in range(4)]),
        ("max_reservations_per_network", [f"2d00:1:2:{n}::1" for n in range(4)]),
    ],
)
def test_limits_of_places(limit: str, ips: list[str]) -> None:
    machine = relay(**{limit: 3})
    for number, ip in enumerate(ips[:3]):
        assert not reserved(machine, asker(f"p{number}", ip))
    assert machine.in_use(0.0)[limit] == 3
    assert reserved(machine, asker("late", ips[3])) == limit
    for number, ip in enumerate(ips[:3]):
        assert not reserved(machine, asker(f"p{number}", ip))  # who has a place renews it
    machine.forget("p1/0", PeerId("p1"))
    assert not reserved(machine, asker("late", ips[3]))
    assert machine.in_use(0.0)[limit] == 3


def test_a_refused_move_costs_nothing() -> None:
    machine = relay(max_reservations_per_ip=1)
    assert not reserved(machine, asker("a", "11.0.0.1"))
    assert not reserved(machine, asker("b", "12.0.0.1"))
    assert reserved(machine, asker("b", "11.0.0.1", 1)) == "max_reservations_per_ip"
    assert places(machine) == ["a/0", "b/0"]
    assert places(machine, 3600.0) == []


def test_loopback_is_no_ip() -> None:
    machine = relay(max_reservations_per_ip=1, max_reservations_per_network=1, requests_per_ip=1)
    for number in range(20):
        assert not reserved(machine, asker(f"p{number}", "127.0.0.1" if number % 2 else "::1"))
    assert machine.in_use(0.0)["max_reservations"] == 20
    assert machine.in_use(0.0)["max_reservations_per_ip"] == 0


def test_over_a_relay() -> None:
    machine = relay()
    assert reserved(machine, asker("a", None)) == "relayed"
    assert connected(machine, asker("a", None), "b") == Refusal(Status.PERMISSION_DENIED, "relayed")


# Circuits


def test_circuits_and_their_limits() -> None:
    machine = relay(max_circuits=3, max_circuits_per_peer=2)
    for name in "xyz":
        machine.reserve(asker(name), 0.0)
    first = connected(machine, asker("a", "127.0.0.1"), "x")
    assert first == Circuit(1, PeerId("a"), PeerId("x"), "x/0")
    second = connected(machine, asker("a", "127.0.0.1"), "y")
    assert isinstance(second, Circuit)
    assert second.number == 2
    refused = Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "max_circuits_per_peer")
    assert connected(machine, asker("a", "127.0.0.1"), "z") == refused
    assert isinstance(connected(machine, asker("b", "12.0.0.1"), "x"), Circuit)
    assert connected(machine, asker("c"), "z") == Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "max_circuits")
    assert machine.in_use(0.0)["max_circuits"] == 3
    machine.release(second)
    machine.release(second)
    assert connected(machine, asker("c"), "x") == refused  # the destination has two
    assert isinstance(connected(machine, asker("c"), "z"), Circuit)
    for circuit in machine.circuits():
        machine.release(circuit)
    assert machine.in_use(0.0)["max_circuits_per_peer"] == 0


@pytest.mark.parametrize(("most", "half"), [(1, 1), (3, 1), (16, 8)])
def test_one_network_has_half_of_all_circuits(most: int, half: int) -> None:
    """However many peers are in league there, callers and called."""
    machine = relay(max_circuits=most, max_circuits_per_peer=1, max_reservations_per_ip=100)
    for number in range(most + 1):
        machine.reserve(asker(f"x{number}"), 0.0)
    crowd = [connected(machine, asker(f"p{n}", f"66.1.1.{n}"), f"x{n}") for n in range(most)]
    crowd += [connected(machine, asker(f"p{n}", f"66.1.1.{n}"), f"x{n}") for n in range(most)]  # those that follow, too
    taken = [each for each in crowd if isinstance(each, Circuit)]
    assert len(taken) == half
    elsewhere = [connected(machine, asker(f"q{n}", f"20.{n}.0.1"), f"x{most - n}") for n in range(most - half)]
    assert all(isinstance(each, Circuit) for each in elsewhere)
    for each in machine.circuits():
        machine.release(each)
    assert not machine._sources


def test_strangers_who_call_somebody_leave_it_its_own_calls() -> None:
    machine = relay(max_circuits_per_peer=4)
    for name in "xy":
        machine.reserve(asker(name), 0.0)
    for number in range(4):
        assert isinstance(connected(machine, asker(f"p{number}", f"12.{number}.0.1"), "x"), Circuit)
    full = Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "max_circuits_per_peer")
    assert connected(machine, asker("late", "13.0.0.1"), "x") == full
    for _ in range(2):
        assert isinstance(connected(machine, asker("x"), "y"), Circuit)
    assert machine.in_use(0.0)["max_circuits_per_peer"] == 4


@pytest.mark.parametrize(("most", "half"), [(1, 1), (2, 1), (4, 2), (16, 8), (17, 8)])
@pytest.mark.parametrize("template", ["2d00:1:2:{:x}::1", "2d00:1:2:ab{:02x}::1", "66.1.{}.1"])
def test_a_crowd_in_one_network_leaves_room_for_all_others(template: str, most: int, half: int) -> None:
    machine = relay(max_circuits_per_peer=most)
    for name in "xy":
        machine.reserve(asker(name), 0.0)
    answers = [connected(machine, asker(f"p{n}", template.format(n)), "x") for n in range(50)]
    taken = [answer for answer in answers if isinstance(answer, Circuit)]
    assert len(taken) == half
    full = "one_network" if half < most else "max_circuits_per_peer"
    assert answers[-1] == Refusal(Status.RESOURCE_LIMIT_EXCEEDED, full)
    assert isinstance(connected(machine, asker("p", template.format(99)), "y"), Circuit)  # to others it may have some
    for number in range(most - half):
        assert isinstance(connected(machine, asker(f"q{number}", f"20.{number}.0.1"), "x"), Circuit)
    machine.release(taken[0])
    assert isinstance(connected(machine, asker("late", template.format(98)), "x"), Circuit)


def test_a_circuit_is_renewed_where_there_is_no_room_for_another() -> None:
    machine = relay(max_circuits_per_peer=2)
    for name in "xyz":
        machine.reserve(asker(name), 0.0)
    first, other = connected(machine, asker("a"), "x"), connected(machine, asker("a"), "y")
    assert isinstance(first, Circuit)
    assert isinstance(other, Circuit)
    full = Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "max_circuits_per_peer")
    for _ in range(3):
        assert connected(machine, asker("a"), "z") == full
        following = connected(machine, asker("a", "12.0.0.1"), "x")  # from another network, meanwhile
        assert isinstance(following, Circuit)
        assert connected(machine, asker("a"), "x") == full, "one beside it, no more"
        machine.release(first)
        first = following
    machine.release(first)
    third = connected(machine, asker("a"), "z")
    assert isinstance(third, Circuit)
    machine.release(third)
    machine.release(other)
    assert not any((machine._callers, machine._called, machine._crowds, machine._pairs))


def test_loopback_is_no_network() -> None:
    machine = relay(max_circuits_per_peer=4)
    machine.reserve(asker("x"), 0.0)
    for number in range(4):
        assert isinstance(connected(machine, asker(f"p{number}", "127.0.0.1"), "x"), Circuit)


def test_a_circuit_to_whom_there_is_no_way() -> None:
    machine = relay(reservation_seconds=100)
    assert connected(machine, asker("a"), "x") == Refusal(Status.NO_RESERVATION, "no_reservation")
    machine.reserve(asker("x"), 0.0)
    machine.reserve(asker("a"), 0.0)
    assert connected(machine, asker("a"), "a") == Refusal(Status.PERMISSION_DENIED, "oneself")
    assert connected(machine, asker("a"), "x", 100.0) == Refusal(Status.NO_RESERVATION, "no_reservation")
    machine.reserve(asker("x"), 100.0)
    machine.forget("x/0", PeerId("x"))
    assert connected(machine, asker("a"), "x", 100.0) == Refusal(Status.NO_RESERVATION, "no_reservation")


def test_a_circuit_outlives_the_place_that_it_was_made_by() -> None:
    machine = relay(reservation_seconds=100)
    machine.reserve(asker("x"), 0.0)
    circuit = connected(machine, asker("a"), "x")
    assert machine.places(200.0) == ()
    assert machine.circuits() == (circuit,)


# Requests


def test_a_flood_by_one_peer() -> None:
    machine = relay(requests_per_peer=30, request_interval=10)
    assert [reserved(machine, asker("a")) for _ in range(31)] == [*[""] * 30, "requests_per_peer"]
    assert not reserved(machine, asker("b"))
    refusal = Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "requests_per_peer")
    answers = [connected(machine, asker("a"), "b") for _ in range(31)]  # calling has tokens of its own
    assert [answer == refusal for answer in answers] == [*[False] * 30, True]
    assert not reserved(machine, asker("a"), 10.0)
    assert reserved(machine, asker("a"), 10.0) == "requests_per_peer"


def test_a_flood_by_one_ip_under_many_names() -> None:
    machine = relay(requests_per_ip=60, request_interval=10)
    machine.reserve(asker("x"), 0.0)
    for number in range(60):
        assert isinstance(connected(machine, asker(f"p{number}"), "nobody"), Refusal)
    for number in range(1000):
        answer = connected(machine, asker(f"q{number}"), "x")
        assert answer == Refusal(Status.RESOURCE_LIMIT_EXCEEDED, "requests_per_ip")
    # Neither those elsewhere, nor who has a place behind the same router and renews it, are touched.
    assert isinstance(connected(machine, asker("far", "12.0.0.1"), "x"), Circuit)
    for number in range(60):
        machine.admit_reserve(asker(f"r{number}"), 1.0)
    assert reserved(machine, asker("new"), 1.0) == "requests_per_ip"
    assert not reserved(machine, asker("x"), 1.0)


@pytest.mark.parametrize("template", ["2d00:1:2:{:x}::1", "2d00:1:2:ab{:02x}::1", "11.0.{}.1"])
def test_a_flood_by_a_network(template: str) -> None:
    """A /48, a /56, and an IPv4 /16 of which every IP is another one."""
    machine = relay(requests_per_ip=10, request_interval=10)
    answers = [connected(machine, asker(f"p{n}", template.format(n % 256)), "x") for n in range(1000)]
    reasons = [answer.reason for answer in answers if isinstance(answer, Refusal)]
    assert reasons.count("no_reservation") == 10 * NETWORK_HOSTS
    assert reasons.count("requests_per_network") == 1000 - 10 * NETWORK_HOSTS
    late = connected(machine, asker("late", template.format(7)), "x", 10.0)
    assert isinstance(late, Refusal)
    assert late.reason == "no_reservation"


def test_a_refused_request_takes_no_tokens() -> None:
    machine = relay(requests_per_ip=1, requests_per_peer=1, request_interval=10)
    assert not reserved(machine, asker("a", "11.0.0.1"))
    machine.forget("a/0", PeerId("a"))
    assert reserved(machine, asker("b", "11.0.0.1")) == "requests_per_ip"
    assert not reserved(machine, asker("b", "12.0.0.1"))  # its own token is still there


def test_what_is_remembered_of_a_flood_is_bounded_and_goes_away() -> None:
    machine = relay(requests_per_peer=30, requests_per_ip=60, request_interval=10)
    for number in range(20_000):
        machine.admit_reserve(asker(f"p{number}", f"2d00:{number:x}::1"), number / 1000)
    kept = [len(rates) for _, rates in machine._rates]
    assert max(kept) <= 8192
    for _ in range(2):
        machine.admit_reserve(asker("late"), 10_000.0)
    assert [len(rates) for _, rates in machine._rates] == [1, 1, 1]


def test_a_thousand_reconnects_leak_nothing() -> None:
    machine = relay(max_reservations=4, max_reservations_per_ip=2, max_circuits_per_peer=1)
    for number in range(1000):
        now = number * 10.0
        assert not reserved(machine, asker("a", "11.0.0.1", number), now)
        circuit = connected(machine, asker("b"), "a", now)
        assert isinstance(circuit, Circuit)
        if number % 3:  # else the old connection is only noticed when the next one is there
            machine.forget(f"a/{number}", PeerId("a"))
        machine.release(circuit)
    machine.forget("a/999", PeerId("a"))
    assert set(machine.in_use(10_000.0).values()) == {0}
    assert not machine._hosts
    assert not machine._networks
    assert not machine._callers
    assert not machine._called
    assert not machine._crowds
    assert not machine._pairs


_step = st.tuples(
    st.sampled_from(["reserve", "connect", "forget", "release", "wait"]),
    st.sampled_from("abcd"),
    st.sampled_from("abcd"),
    st.integers(0, 2),
    st.sampled_from(["11.0.0.1", "11.0.0.2", "12.0.0.1", "127.0.0.1"]),
)


@given(st.lists(_step, max_size=80))
def test_counts_are_what_is_there(steps: list[tuple[str, str, str, int, str]]) -> None:
    limits = RelayLimits(
        max_reservations=3,
        max_reservations_per_ip=2,
        max_reservations_per_network=2,
        reservation_seconds=50,
        max_circuits=4,
        max_circuits_per_peer=2,
        **FREE,
    )
    machine: Relay[str] = Relay(limits)
    now = 0.0
    circuits: list[Circuit[str]] = []
    for kind, who, to, number, ip in steps:
        match kind:
            case "reserve":
                reserved(machine, asker(who, ip, number), now)
            case "connect":
                answer = connected(machine, asker(who, ip), to, now)
                if isinstance(answer, Circuit):
                    circuits.append(answer)
            case "forget":
                machine.forget(f"{who}/{number}", PeerId(who), asker(who, ip, number + 1) if to == "b" else None)
            case "release" if circuits:
                machine.release(circuits.pop(number % len(circuits)))
            case "wait":
                now += 20 * number
        found = machine.places(now)
        assert all(now < place.until <= now + 50 for place in found)
        assert len({place.peer for place in found}) == len(found) <= 3
        for attribute, limit in (("host", "max_reservations_per_ip"), ("network", "max_reservations_per_network")):
            keys = [key for place in found if (key := getattr(place, attribute)) is not None]
            most = max((keys.count(key) for key in keys), default=0)
            assert most == machine.in_use(now)[limit] <= 2
        assert list(machine.circuits()) == circuits
        pairs = [(circuit.source, circuit.destination) for circuit in circuits]
        counted = [pair for pair in {*pairs} for _ in range(max(1, pairs.count(pair) - 1))]  # a second one is free
        most = max((sum(pair[end] == peer for pair in counted) for end in (0, 1) for peer in "abcd"), default=0)
        assert most == machine.in_use(now)["max_circuits_per_peer"] <= 2
        assert max(machine._crowds.values(), default=0) <= 1
        assert max(machine._sources.values(), default=0) <= 2
        assert sum(machine._callers.values()) == sum(machine._called.values()) == len(counted)
        assert len(circuits) <= 4
