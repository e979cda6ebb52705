"""NAT-PMP and PCP as conversations with a router, on a clock of the test's own."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.portmap._gateway import default_gateway, default_gateway6
from kas_libp2p.portmap._keeper import (
    CHECK,
    LIFETIME,
    LONGEST,
    LONGEST_REFUSED_PAUSE,
    REFUSED_PAUSE,
    SHORTEST_PAUSE,
    Codec,
    Keeper,
    Mapped,
    is_useful,
)
from kas_libp2p.portmap._natpmp import NatPmp
from kas_libp2p.portmap._pcp import Pcp

PORT, NONCE = 16117, b"n" * 12
ME, OUTSIDE = "192.168.1.10", "11.0.1.2"
OUTSIDE_BYTES = bytes((11, 0, 1, 2))
PCP = Pcp(ME)
NATPMP = NatPmp()


def keeper_of(codec: Codec, *ports: int) -> Keeper:
    return Keeper(codec, ports or (PORT,), lambda port: NONCE, Random(0), 0.0)


def pcp_map(
    *,
    result: int = 0,
    lifetime: int = LIFETIME,
    epoch: int = 100,
    nonce: bytes = NONCE,
    port: int = PORT,
    external: int = PORT,
    protocol: int = 6,
    version: int = 2,
    opcode: int = 0x81,
) -> bytes:
    head = struct.pack("!BBxBII12x", version, opcode, result, lifetime, epoch)
    return head + struct.pack("!12sB3xHH16s", nonce, protocol, port, external, bytes(10) + b"\xff\xff" + OUTSIDE_BYTES)


def natpmp_map(
    *,
    result: int = 0,
    lifetime: int = LIFETIME,
    epoch: int = 100,
    port: int = PORT,
    external: int = PORT,
    opcode: int = 130,
) -> bytes:
    return struct.pack("!BBHIHHI", 0, opcode, result, epoch, port, external, lifetime)


def natpmp_address(*, epoch: int = 100, address: bytes = OUTSIDE_BYTES) -> bytes:
    return struct.pack("!BBHI4s", 0, 128, 0, epoch, address)


def pcp_announce(*, epoch: int) -> bytes:
    return struct.pack("!BBxBII12x", 2, 0x80, 0, 0, epoch)


def mapped(codec: Codec, *ports: int) -> Keeper:
    """A keeper that has its ports since now = 0, of a router that has been up for 100 s."""
    keeper = keeper_of(codec, *ports)
    keeper.datagrams(0.0)
    if codec.tells_address:
        keeper.receive(natpmp_address(), 0.0)
    make: Callable[..., bytes] = natpmp_map if codec.tells_address else pcp_map
    for port in ports or (PORT,):
        keeper.receive(make(port=port, external=port), 0.0)
    assert [each.port for each in keeper.mappings(0.0)] == list(ports or (PORT,))
    return keeper


both = pytest.mark.parametrize("codec", [PCP, NATPMP], ids=lambda codec: codec.name)


# What is asked


def test_pcp_asks_for_the_port_as_the_rfc_has_it() -> None:
    (sent,) = keeper_of(PCP).datagrams(0.0)
    assert struct.unpack_from("!BBHI", sent) == (2, 1, 0, LIFETIME)
    assert sent[8:24] == bytes(10) + b"\xff\xff" + bytes((192, 168, 1, 10))
    assert struct.unpack_from("!12sB3xHH", sent, 24) == (NONCE, 6, PORT, PORT)
    assert len(sent) == 60


def test_pcp_asks_a_firewall_for_a_port_of_ours() -> None:
    ours = "2a00::10"
    keeper = keeper_of(Pcp(ours))
    (sent,) = keeper.datagrams(0.0)
    packed = ipaddress.IPv6Address(ours).packed
    assert (sent[8:24], sent[44:60]) == (packed, bytes(16))
    answer = struct.pack("!BBBBII12x12sB3xHH", 2, 0x81, 0, 0, 3600, 100, NONCE, 6, PORT, PORT)
    keeper.receive(answer + bytes(10) + b"\xff\xff" + bytes(4), 0.0)  # an IPv4 address is nothing of ours
    assert keeper.mappings(0.0) == ()
    keeper.receive(answer + packed, 0.0)
    (mapped,) = keeper.mappings(0.0)
    assert (mapped.address, mapped.external) == (ours, PORT)
    (again,) = [each for each in keeper.datagrams(3600 * 0.625) if each[1] == 1]
    assert again[44:60] == packed


def test_natpmp_asks_for_the_port_and_the_address() -> None:
    request, address = keeper_of(NATPMP).datagrams(0.0)
    assert struct.unpack("!BBHHHI", request) == (0, 2, 0, PORT, PORT, LIFETIME)
    assert address == b"\0\0"


@both
def test_a_request_is_repeated_with_growing_pauses_and_then_given_up(codec: Codec) -> None:
    keeper = keeper_of(codec)
    times, now = [], 0.0
    while True:
        if any(len(each) > 2 for each in keeper.datagrams(now)):
            times.append(now)
        if keeper.failed is not None:
            break
        now = keeper.next_deadline(now)
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == codec.tries
    assert pauses[0] == pytest.approx(codec.first_pause, rel=0.1)
    assert all(later > earlier for earlier, later in pairwise(pauses))
    assert now < 15
    assert keeper.failed == ""


# What is granted


@both
def test_a_granted_port_is_asked_for_again_at_half_of_its_lifetime(codec: Codec) -> None:
    keeper = mapped(codec)
    assert keeper.mappings(1.0) == (Mapped(PORT, OUTSIDE, PORT, LIFETIME, 0),)
    now, sent = 1.0, []
    while not sent and now < LIFETIME:
        now = keeper.next_deadline(now)
        sent = [each for each in keeper.datagrams(now) if len(each) > 24 or len(each) == 12]
        epoch = 100 + int(now)
        keeper.receive(natpmp_address(epoch=epoch) if codec is NATPMP else pcp_announce(epoch=epoch), now)
    assert 0.5 * LIFETIME <= now <= 0.625 * LIFETIME
    keeper.receive((natpmp_map if codec is NATPMP else pcp_map)(epoch=100 + int(now)), now)
    assert keeper.mappings(LIFETIME + 1.0)[0].renewals == 1


@both
def test_a_port_that_is_not_renewed_runs_out(codec: Codec) -> None:
    keeper = mapped(codec)
    now = 0.0
    while keeper.failed is None:
        keeper.datagrams(now)
        now = keeper.next_deadline(now)
    assert LIFETIME <= now < LIFETIME + 130
    assert keeper.mappings(now) == ()


@pytest.mark.parametrize(("lifetime", "pause"), [(1, SHORTEST_PAUSE), (2**32 - 1, LONGEST / 2)])
def test_an_absurd_lifetime_leads_to_no_absurd_pause(lifetime: int, pause: float) -> None:
    keeper = keeper_of(PCP)
    keeper.datagrams(0.0)
    keeper.receive(pcp_map(lifetime=lifetime), 0.0)
    now = 0.0
    while not any(each[1] == 1 for each in keeper.datagrams(now)):
        assert now < 1.3 * pause
        now = keeper.next_deadline(now)
        keeper.receive(pcp_announce(epoch=100 + int(now)), now)
    assert now >= pause or lifetime == 1


def test_another_port_outside_is_taken_as_it_is() -> None:
    keeper = keeper_of(PCP)
    keeper.datagrams(0.0)
    keeper.receive(pcp_map(external=40000), 0.0)
    assert keeper.mappings(0.0)[0].external == 40000


# What is refused


@pytest.mark.parametrize(
    ("codec", "answer"),
    [
        (PCP, pcp_map(result=8, lifetime=600)),
        (PCP, pcp_map(lifetime=0)),
        (PCP, pcp_map(external=0)),
        (NATPMP, natpmp_map(result=2)),
    ],
)
def test_a_refusal_ends_it_if_there_is_nothing_else(codec: Codec, answer: bytes) -> None:
    keeper = keeper_of(codec)
    keeper.datagrams(0.0)
    keeper.receive(answer, 0.0)
    assert keeper.failed
    assert keeper.refusals() == {PORT: keeper.failed}
    assert keeper.mappings(0.0) == ()


@pytest.mark.parametrize(("told", "waited"), [(1, REFUSED_PAUSE), (600, 600), (10**9, LONGEST_REFUSED_PAUSE)])
def test_a_refused_port_is_asked_for_again_when_the_router_says(told: int, waited: float) -> None:
    keeper = mapped(PCP, 1000, 2000)
    keeper.receive(pcp_map(port=2000, result=8, lifetime=told), 0.0)
    assert keeper.failed is None
    assert [each.port for each in keeper.mappings(0.0)] == [1000]
    now = 0.0
    while not (sent := [each for each in keeper.datagrams(now) if each[1] == 1]):
        now = keeper.next_deadline(now)
        keeper.receive(pcp_announce(epoch=100 + int(now)), now)
    assert now == waited
    assert struct.unpack_from("!H", sent[0], 40) == (2000,)


def test_a_router_that_speaks_only_the_other_protocol_is_left_at_once() -> None:
    for codec, answer in ((PCP, b"\0\x81\0\1\0\0\0\0"), (NATPMP, b"\2\x80\0\1" + bytes(20))):
        keeper = keeper_of(codec)
        keeper.datagrams(0.0)
        keeper.receive(answer, 0.1)
        assert keeper.failed == ""


@both
def test_nobody_there_counts_only_while_we_have_nothing(codec: Codec) -> None:
    keeper = keeper_of(codec)
    keeper.unreachable(0.0, "can't be reached")
    assert keeper.failed == "can't be reached"
    keeper = mapped(codec)
    keeper.unreachable(1.0, "can't be reached")
    assert keeper.failed is None


# Reboots


@both
def test_a_rebooted_router_is_asked_anew(codec: Codec) -> None:
    keeper = mapped(codec, 1000, 2000)
    keeper.datagrams(CHECK)
    keeper.receive(natpmp_address(epoch=3) if codec is NATPMP else pcp_announce(epoch=3), CHECK)
    assert len([each for each in keeper.datagrams(CHECK) if len(each) > 24 or len(each) == 12]) == 2


@both
def test_a_router_that_stayed_up_is_not_asked_anew(codec: Codec) -> None:
    keeper = mapped(codec, 1000, 2000)
    for tick in range(1, 20):
        now = tick * CHECK
        keeper.datagrams(now)
        epoch = 100 + int(now * 1.01)  # its clock is a little fast
        keeper.receive(natpmp_address(epoch=epoch) if codec is NATPMP else pcp_announce(epoch=epoch), now)
        assert keeper.datagrams(now) == []


def test_a_new_outside_address_is_told_and_the_ports_asked_for_anew() -> None:
    keeper = mapped(NATPMP)
    keeper.datagrams(CHECK)
    keeper.receive(natpmp_address(epoch=160, address=bytes((11, 0, 9, 9))), CHECK)
    assert keeper.mappings(CHECK)[0].address == "11.0.9.9"
    assert len(keeper.datagrams(CHECK)) == 1


def test_a_lost_sign_of_life_ends_nothing() -> None:
    keeper = mapped(PCP)
    now, sent = 0.0, 0
    while now < 10 * CHECK:
        now = keeper.next_deadline(now)
        sent += len(keeper.datagrams(now))
    assert keeper.failed is None
    assert 10 <= sent <= 20


# Hostile answers


@pytest.mark.parametrize(
    "answer",
    [
        pcp_map(nonce=b"x" * 12),
        pcp_map(port=PORT + 1),
        pcp_map(port=0),
        pcp_map(protocol=17),
        pcp_map(version=3),
        pcp_map(opcode=0x01),
        pcp_map(opcode=0x82),
        pcp_map()[:59],
        pcp_map()[:24],
        pcp_map() + bytes(1100),
        b"",
        b"\2",
        b"\x00\x81\x00\x05",
    ],
)
def test_what_is_no_answer_to_pcp_is_passed_over(answer: bytes) -> None:
    keeper = keeper_of(PCP)
    keeper.datagrams(0.0)
    before = keeper.next_deadline(0.0)
    keeper.receive(answer, 0.1)
    assert keeper.mappings(0.1) == ()
    assert keeper.failed is None
    assert keeper.next_deadline(0.1) == before


@pytest.mark.parametrize(
    "answer",
    [
        natpmp_map(port=1),
        natpmp_map(port=0),
        natpmp_map(opcode=129),
        natpmp_map(opcode=2),
        natpmp_map()[:15],
        b"\0",
        b"\7\x82" + bytes(14),
    ],
)
def test_what_is_no_answer_to_natpmp_is_passed_over(answer: bytes) -> None:
    keeper = keeper_of(NATPMP)
    keeper.datagrams(0.0)
    keeper.receive(natpmp_address(), 0.0)
    keeper.receive(answer, 0.1)
    assert keeper.mappings(0.1) == ()
    assert keeper.failed is None


def test_a_wrong_nonce_changes_nothing_of_a_mapping_that_stands() -> None:
    keeper = mapped(PCP)
    keeper.receive(pcp_map(nonce=b"x" * 12, external=666, epoch=1), 1.0)
    keeper.receive(pcp_map(nonce=b"x" * 12, result=2, epoch=1), 1.0)
    assert keeper.mappings(1.0) == (Mapped(PORT, OUTSIDE, PORT, LIFETIME, 0),)
    assert keeper.datagrams(1.0) == []


@both
@given(st.lists(st.binary(max_size=80), max_size=20))
def test_garbage_does_no_harm(codec: Codec, garbage: list[bytes]) -> None:
    keeper = keeper_of(codec)
    now = 0.0
    for data in garbage:
        for prefix in (b"", b"\2\x81\0\0", b"\0\x82\0\0", b"\0\x80\0\0"):
            keeper.datagrams(now)
            keeper.receive(prefix + data, now)
            if keeper.failed is None:
                assert keeper.next_deadline(now) > now or keeper.datagrams(now)
        now += 1.0
    assert len(keeper.mappings(now)) <= 1


# The end


@both
def test_at_the_end_ports_are_removed_and_a_lost_removal_is_repeated(codec: Codec) -> None:
    keeper = mapped(codec, 1000, 2000)
    keeper.stop(10.0)
    first = keeper.datagrams(10.0)
    lifetimes = [struct.unpack_from("!I", each, 8 if codec is NATPMP else 4)[0] for each in first]
    assert lifetimes == [0, 0]
    make: Callable[..., bytes] = natpmp_map if codec is NATPMP else pcp_map
    keeper.receive(make(port=1000, lifetime=0, external=0, epoch=110), 10.1)
    assert not keeper.done
    again = keeper.next_deadline(10.1)
    assert again < 11
    assert len(keeper.datagrams(again)) == 1
    keeper.receive(make(port=2000, lifetime=0, external=0, epoch=110), again)
    assert keeper.done


def test_what_was_never_granted_is_not_removed() -> None:
    keeper = keeper_of(PCP)
    keeper.datagrams(0.0)
    keeper.stop(0.1)
    assert keeper.done


# Where


ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
vpn0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
broken line
"""


def test_the_default_gateway_is_the_one_with_the_least_metric() -> None:
    assert default_gateway(ROUTES) == "192.168.1.1"
    assert default_gateway("") is None
    assert default_gateway(ROUTES.splitlines()[0]) is None


ROUTES6 = """\
20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000003 00000000 00000003 wlan0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000002 00000064 00000003 00000000 00450003 eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200 lo
broken line
"""  # noqa: E501 - as the kernel writes it


def test_the_same_of_ipv6() -> None:
    assert default_gateway6(ROUTES6) == ("fe80::2", "eth0")
    assert default_gateway6("") is None
    assert default_gateway6(ROUTES6.splitlines()[3]) is None


@given(st.text())
def test_any_text_is_a_routing_table(text: str) -> None:
    default_gateway("head\n" + text)
    default_gateway6(text)


@pytest.mark.parametrize(
    ("address", "useful"),
    [
        ("11.0.1.2", True),
        ("192.168.0.2", False),
        ("100.64.0.9", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("", False),
    ],
)
def test_an_outside_address_is_on_the_internet_or_useless(address: str, useful: bool) -> None:
    assert is_useful(address) is useful
