"""What a client believes of a relay's answers, and when it asks again."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses as addr
from kas_libp2p.errors import RelayRefused, RemoteProtocolError
from kas_libp2p.identity import Identity, seal_envelope
from kas_libp2p.pb import relay_pb2 as pb
from kas_libp2p.relay import _client as machine
from kas_libp2p.relay import _voucher
from kas_libp2p.relay._client import Due, Upkeep, lifetime_of, read_circuit, read_limit, read_reservation
from kas_libp2p.relay._messages import (
    UNLIMITED,
    Connect,
    HopMessage,
    HopStatus,
    Limit,
    Peer,
    Reservation,
    Reserve,
    Status,
    decode_hop,
    encode_hop,
)
from kas_libp2p.relay._voucher import seal_voucher
from kas_libp2p.units import short

RELAY, US, OTHER = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
WALL = 1_800_000_000.0
HOUR = 3600.0
AT = "/ip4/11.0.0.1/tcp/4001"
DAY = 24 * HOUR


def answered(
    status: Status = Status.OK,
    *,
    expire: float = WALL + HOUR,
    addresses: tuple[str, ...] = (),
    voucher: bytes | None = None,
    limit: Limit = UNLIMITED,
) -> HopMessage:
    """An answer to RESERVE that has been over the wire."""
    place = Reservation(int(expire), addresses, voucher) if status is Status.OK else None
    frame = encode_hop(HopStatus(status, place, limit))
    return decode_hop(frame[1 if len(frame) < 129 else 2 :])


def read(answer: HopMessage, at: str = AT) -> machine.Reservation:
    return read_reservation(answer, relay=RELAY.peer_id, peer=US.peer_id, at=at, wall_now=WALL)


def through(*ways: str) -> tuple[str, ...]:
    return tuple(f"{way}/p2p/{RELAY.peer_id}/p2p-circuit" for way in ways)


# Yes and no


def test_a_place() -> None:
    voucher = seal_voucher(RELAY, US.peer_id, int(WALL + HOUR))
    answer = answered(
        addresses=(f"/ip4/11.0.0.9/tcp/1/p2p/{RELAY.peer_id}",), voucher=voucher, limit=Limit(120, 131072)
    )
    place = read(answer)
    assert place.relay == RELAY.peer_id
    assert tuple(map(str, place.addresses)) == through("/ip4/11.0.0.9/tcp/1")
    assert (place.lifetime, place.max_bytes, place.max_seconds, place.voucher) == (HOUR, 131072, 120, voucher)


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_every_refusal_says_its_status_and_what_it_means(status: Status) -> None:
    with pytest.raises(RelayRefused) as caught:
        read(answered(status))
    assert (caught.value.relay, caught.value.status) == (RELAY.peer_id, status.name)
    start = f"the relay {short(RELAY.peer_id)} says {status.name}: "
    assert str(caught.value).startswith(start)
    assert len(str(caught.value)) > len(start)
    with pytest.raises(RelayRefused) as caught:
        read_circuit(answered(status), relay=RELAY.peer_id, peer=OTHER.peer_id)
    assert caught.value.status == status.name


@pytest.mark.parametrize("answer", [Reserve(), Connect(US.peer_id), HopStatus(Status.OK)])
def test_what_is_no_answer(answer: HopMessage) -> None:
    with pytest.raises(RemoteProtocolError):
        read(answer)


# Vouchers


@pytest.mark.parametrize(
    ("voucher", "why"),
    [
        (seal_voucher(OTHER, US.peer_id, int(WALL)), "signed by another peer"),
        (seal_voucher(RELAY, OTHER.peer_id, int(WALL)), "for another peer"),
        (seal_voucher(RELAY, US.peer_id, int(WALL))[:-3] + b"xyz", "signature"),
        (b"", "voucher|envelope"),
        (b"garbage", "malformed"),
    ],
)
def test_a_false_voucher_is_a_broken_protocol(voucher: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        read(answered(voucher=voucher))


def test_a_voucher_of_another_relay_signed_by_this_one() -> None:
    false = pb.Voucher(
        relay=addr.peer_id_to_bytes(OTHER.peer_id), peer=addr.peer_id_to_bytes(US.peer_id), expiration=int(WALL)
    )
    voucher = seal_envelope(RELAY, _voucher.DOMAIN, _voucher.TYPE, false.SerializeToString())
    with pytest.raises(RemoteProtocolError, match="another relay"):
        read(answered(voucher=voucher))


# Lifetimes


@pytest.mark.parametrize(
    ("expire", "lifetime"),
    [
        (WALL + HOUR, HOUR),
        (WALL + 10, 10),
        (WALL + 9, machine.ASSUMED),
        (WALL, machine.ASSUMED),
        (WALL - 2 * HOUR, machine.ASSUMED),
        (0, machine.ASSUMED),
        (WALL + DAY, DAY),
        (WALL + 30 * DAY, DAY),
        ((WALL + 2 * HOUR) * 1000, 2 * HOUR),
        ((WALL - HOUR) * 1000, DAY),
        (2**63, DAY),
        (2**64 - 1, DAY),
    ],
)
def test_lifetimes(expire: float, lifetime: float) -> None:
    assert lifetime_of(int(expire), WALL) == lifetime
    assert read(answered(expire=expire)).lifetime == lifetime


@given(st.integers(0, 2**64 - 1), st.floats(0, 4e9))
def test_a_lifetime_is_never_absurd(expire: int, wall: float) -> None:
    assert machine.SHORTEST <= lifetime_of(expire, wall) <= machine.LONGEST


# Limits


@pytest.mark.parametrize(
    ("limit", "seconds", "size"),
    [
        (UNLIMITED, None, None),
        (Limit(120, 131072), 120, 131072),
        (Limit(86_400, None), 86_400, None),
        (Limit(120_000, 131072), 120, 131072),  # js: milliseconds
        (Limit(2**32 - 1, 2**64 - 1), (2**32 - 1) / 1000, 2**64 - 1),
        (Limit(None, 1), None, 1),
    ],
)
def test_limits(limit: Limit, seconds: float | None, size: int | None) -> None:
    assert read_limit(limit) == (size, seconds)
    place = read(answered(limit=limit))
    assert (place.max_bytes, place.max_seconds) == (size, seconds)


def test_zeros_are_no_limits() -> None:
    message = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, limit=pb.Limit(duration=0, data=0))
    message.reservation.expire = int(WALL)
    answer = decode_hop(message.SerializeToString())
    assert read(answer).max_bytes is None
    assert read(answer).max_seconds is None


# Addresses

US_TEXT = f"/p2p/{US.peer_id}"
RELAY_TEXT = f"/p2p/{RELAY.peer_id}"


@pytest.mark.parametrize(
    ("at", "told", "expected"),
    [
        (AT, (), (AT,)),
        (AT, ("/ip4/11.0.0.2/tcp/1",), ("/ip4/11.0.0.2/tcp/1",)),
        (AT, ("/ip4/11.0.0.2/tcp/1" + RELAY_TEXT,), ("/ip4/11.0.0.2/tcp/1",)),
        (AT, ("/ip4/11.0.0.2/tcp/1" + RELAY_TEXT + "/p2p-circuit",), ("/ip4/11.0.0.2/tcp/1",)),
        (AT, ("/ip4/11.0.0.2/tcp/1" + RELAY_TEXT + "/p2p-circuit" + US_TEXT,), ("/ip4/11.0.0.2/tcp/1",)),
        (AT, (f"/ip4/11.0.0.2/tcp/1/p2p/{OTHER.peer_id}",), (AT,)),
        (AT, ("/ip4/11.0.0.2/tcp/1" + RELAY_TEXT + f"/p2p-circuit/p2p/{OTHER.peer_id}",), (AT,)),
        (AT, (f"/ip4/11.0.0.3/tcp/1/p2p/{OTHER.peer_id}/p2p-circuit" + RELAY_TEXT + "/p2p-circuit",), (AT,)),
        (AT, ("/ip4/11.0.0.2/tcp/0", "/ip4/0.0.0.0/tcp/1", "/ip4/224.0.0.1/tcp/1", RELAY_TEXT, "/p2p-circuit"), (AT,)),
        (AT, ("/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.1/tcp/1", "/ip4/11.0.0.2/tcp/1"), ("/ip4/11.0.0.2/tcp/1",)),
        ("/ip4/192.168.1.9/tcp/1", ("/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.1/tcp/1"), ("/ip4/192.168.1.1/tcp/1",)),
        ("/ip4/127.0.0.1/tcp/9", ("/ip4/127.0.0.1/tcp/1",), ("/ip4/127.0.0.1/tcp/1",)),
        (AT, ("/dns4/relay.example.org/tcp/1",), ("/dns4/relay.example.org/tcp/1",)),
        (AT, ("/ip4/11.0.0.2/tcp/1",) * 3, ("/ip4/11.0.0.2/tcp/1",)),
        (
            AT,
            tuple(f"/ip4/11.0.1.{n}/tcp/1" for n in range(16)),
            tuple(f"/ip4/11.0.1.{n}/tcp/1" for n in range(machine.MAX_ADDRESSES)),
        ),
    ],
)
def test_addresses(at: str, told: tuple[str, ...], expected: tuple[str, ...]) -> None:
    place = read(answered(addresses=told), at)
    assert tuple(map(str, place.addresses)) == through(*expected)


def test_where_the_relay_sees_the_peer() -> None:
    def circuit(peer: Peer | None) -> str | None:
        answer = HopStatus(Status.OK, None, Limit(120, None), peer)
        limit, seen = read_circuit(answer, relay=RELAY.peer_id, peer=OTHER.peer_id)
        assert limit == Limit(120, None)
        return str(seen) if seen is not None else None

    assert circuit(None) is None
    assert circuit(Peer(OTHER.peer_id)) is None
    assert circuit(Peer(OTHER.peer_id, ("/dns4/x/tcp/1", "/ip4/11.0.0.7/tcp/5"))) == "/ip4/11.0.0.7/tcp/5"
    assert circuit(Peer(US.peer_id, ("/ip4/11.0.0.7/tcp/5",))) is None


# Over time


def place(lifetime: float = HOUR) -> machine.Reservation:
    return machine.Reservation(RELAY.peer_id, (), lifetime, None, None, None)


def test_it_is_asked_for_at_once_and_renewed_well_before_it_ends() -> None:
    upkeep = Upkeep(100.0)
    assert upkeep.next_deadline() == 100.0
    assert upkeep.on_timeout(99.0) is None
    assert upkeep.on_timeout(100.0) is Due.ASK
    upkeep.granted(place(), 100.0, 0.0)
    assert upkeep.next_deadline() == pytest.approx(100 + 0.6 * HOUR)
    upkeep.granted(place(), 100.0, 1.0)
    assert upkeep.next_deadline() == pytest.approx(100 + 0.8 * HOUR)
    assert upkeep.renewals == 1
    assert upkeep.on_timeout(100 + 0.5 * HOUR) is None


def test_a_day_long_place_is_renewed_within_two_hours() -> None:
    upkeep = Upkeep(0.0)
    upkeep.granted(place(DAY), 0.0, 1.0)
    assert upkeep.next_deadline() == pytest.approx(machine.RENEW_WITHIN)


def test_a_refused_renewal_is_tried_with_growing_pauses_until_the_place_ends() -> None:
    upkeep = Upkeep(0.0)
    upkeep.granted(place(), 0.0, 0.5)
    tries, now = 0, 0.0
    while True:
        now = upkeep.next_deadline()
        due = upkeep.on_timeout(now)
        if due is Due.EXPIRED:
            break
        assert due is Due.ASK
        assert upkeep.reservation is not None
        tries += 1
        upkeep.failed(now, 1.0)
    assert now == HOUR
    assert upkeep.reservation is None
    assert 15 < tries < 25
    assert HOUR <= upkeep.next_deadline() <= HOUR + machine.LONGEST_PAUSE
    assert upkeep.on_timeout(upkeep.next_deadline()) is Due.ASK


def test_pauses_grow_to_a_minute() -> None:
    upkeep = Upkeep(0.0)
    now, pauses = 0.0, []
    for _ in range(8):
        assert upkeep.on_timeout(now) is Due.ASK
        upkeep.failed(now, 1.0)
        pauses.append(upkeep.next_deadline() - now)
        now = upkeep.next_deadline()
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    upkeep.granted(place(), now, 0.0)
    upkeep.granted(place(), now + 1, 0.0)
    assert upkeep.failures == 0


def test_a_lost_place_is_asked_for_at_once() -> None:
    upkeep = Upkeep(0.0)
    upkeep.granted(place(), 0.0, 0.0)
    upkeep.lost(61.0, 0.0)
    assert upkeep.reservation is None
    assert upkeep.next_deadline() == 61.0


def test_a_relay_that_grants_and_drops_is_left_alone_for_longer_each_time() -> None:
    upkeep = Upkeep(0.0)
    now, asked = 0.0, 0
    while now < HOUR:
        assert upkeep.on_timeout(now) is Due.ASK
        asked += 1
        upkeep.granted(place(), now, 0.0)
        upkeep.lost(now + 0.1, 1.0)
        now = upkeep.next_deadline()
    assert asked < 70


@pytest.mark.parametrize("lifetime", [machine.ASSUMED, HOUR, DAY])
def test_a_day_of_renewals(lifetime: float) -> None:
    """The relay is restarted six times, refuses now and then, and no place is ever left to run out."""
    dice = random.Random(5)
    upkeep = Upkeep(0.0)
    now, asked, held = 0.0, 0, 0.0
    restarts = [dice.uniform(0, DAY) for _ in range(6)]
    while now < DAY:
        deadline = upkeep.next_deadline()
        restart = min(restarts, default=math.inf)
        then = min(deadline, restart)
        if upkeep.reservation is not None:
            held += then - now
        now = then
        if restart <= deadline:
            restarts.remove(restart)
            upkeep.lost(now, dice.random())
            continue
        assert upkeep.on_timeout(now) is Due.ASK, "it ran out"
        asked += 1
        if dice.random() < 0.2:
            upkeep.failed(now, dice.random())
        else:
            upkeep.granted(place(lifetime), now, dice.random())
    assert held > 0.999 * DAY
    part = min(lifetime, machine.RENEW_WITHIN / machine.RENEW_TO)
    assert asked < 1.6 * DAY / (0.6 * part) + 20


def test_a_relay_that_was_not_there_is_asked_as_soon_as_it_is() -> None:
    upkeep = Upkeep(0.0)
    for _ in range(5):
        upkeep.failed(0.0, 1.0, unreached=True)
    assert upkeep.next_deadline() > 30
    upkeep.reached(10.0)
    assert upkeep.next_deadline() == 10
    assert upkeep.on_timeout(10.0) is Due.ASK


def test_after_a_line_that_came_and_went_a_relay_is_asked_as_soon_as_it_is_reached() -> None:
    upkeep = Upkeep(0.0)
    for now in range(0, 100, 20):
        upkeep.granted(place(), now, 0.0)
        upkeep.lost(now + 10, 1.0)
    assert upkeep.next_deadline() > 110
    upkeep.reached(95.0)
    assert upkeep.on_timeout(95.0) is Due.ASK


def test_a_relay_that_refuses_is_not_asked_for_being_there() -> None:
    upkeep = Upkeep(0.0)
    upkeep.failed(0.0, 1.0, unreached=True)
    upkeep.failed(2.0, 1.0)
    due = upkeep.next_deadline()
    upkeep.reached(3.0)
    assert upkeep.next_deadline() == due
