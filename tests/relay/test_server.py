"""A relay of ours, asked by hand: places, circuits, what it says of both."""

from __future__ import annotations

import math
import time

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_libp2p.config import Purpose, Role
from kas_libp2p.errors import StreamReset
from kas_libp2p.events import (
    CircuitClosed,
    CircuitOpened,
    ConnectionClosed,
    ConnectionOpened,
    Event,
    RelayRequestServed,
    ReservationMade,
)
from kas_libp2p.relay._messages import (
    UNLIMITED,
    Connect,
    HopStatus,
    Limit,
    Peer,
    Reserve,
    Status,
    StopConnect,
    StopStatus,
    encode_hop,
    encode_stop,
)
from kas_libp2p.relay._voucher import open_voucher
from kas_libp2p.relay.server import LONGEST_CIRCUIT_TOLD, LONGEST_TOLD, STOP_TIMEOUT
from kas_libp2p.transport.splice import End
from tests.network import eventually
from tests.relay.scripted import RELAY, RELAY_AT, node_at, private
from tests.relay.serving import DELAY, echo, serving

# Places


async def test_a_place(autojump_clock: MockClock) -> None:
    async with serving(max_circuit_bytes=5_000_000, max_circuit_seconds=600) as s:
        dora = await s.stranger()
        begun = trio.current_time()
        answer = await dora.ask(Reserve())
        assert trio.current_time() - begun == pytest.approx(2 * DELAY)  # the agreement on hop costs no round trip
        assert answer is not None
        assert (answer.status, answer.limit) == (Status.OK, Limit(600, 5_000_000))
        place = answer.reservation
        assert place is not None
        assert place.addresses == (RELAY_AT,)
        assert place.expire == pytest.approx(time.time() + 3600, abs=60)
        assert place.voucher is not None
        assert open_voucher(place.voucher, relay=RELAY.peer_id, peer=dora.peer) == place.expire
        assert s.told.of(RelayRequestServed) == [
            RelayRequestServed(peer=dora.peer, request="reserve", status="OK", reason="")
        ]
        kept = {each.peer: each for each in s.relay.relay_server.status().reservations}
        assert kept.keys() == {s.alice.peer_id, dora.peer}
        assert kept[dora.peer].address == dora.connection.local_address
        assert kept[dora.peer].seconds == pytest.approx(3600, abs=1)


@pytest.mark.parametrize("seconds", [0, math.inf])
async def test_no_limits_are_no_field(seconds: float, autojump_clock: MockClock) -> None:
    async with serving(max_circuit_seconds=seconds) as s:
        answer = await (await s.stranger()).ask(Reserve())
        assert answer is not None
        assert answer.limit == UNLIMITED


async def test_of_a_longer_circuit_a_day_is_told(autojump_clock: MockClock) -> None:
    """More would be read as the milliseconds of a js relay, by our own peers, too."""
    async with serving(max_circuit_seconds=172_800) as s:
        dora = await s.stranger()
        answer = await dora.ask(Reserve())
        assert answer is not None
        assert answer.limit == Limit(LONGEST_CIRCUIT_TOLD)
        (place,) = s.alice.relay_client.reservations
        assert place.max_seconds == 86_400
        limits = s.talk.metadata.limits
        assert limits is not None
        assert limits.max_seconds == 86_400
        await trio.sleep(86_400 + 100)
        assert s.ends() == [], "it lasts as long as the setting says"


async def test_without_any_address_the_one_that_the_peer_came_by(autojump_clock: MockClock) -> None:
    """A relay that listens on 0.0.0.0 of a host without public addresses has nothing to tell somebody outside."""
    async with serving() as s:
        dora = await s.stranger()
        s.relay.relay_server._addresses = lambda _: ()
        answer = await dora.ask(Reserve())
        assert answer is not None
        assert answer.reservation is not None
        assert answer.reservation.addresses == (RELAY_AT,)


async def test_a_place_holds_its_connection_and_ends_with_it(autojump_clock: MockClock) -> None:
    async with serving(reservation_seconds=1000) as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        await trio.sleep(900)
        closed = [each.connection for each in s.told.of(ConnectionClosed)]
        assert len(closed) == 1  # Emil's, which was of no use to anybody
        assert emil.connection.close_reason
        assert s.in_use("max_reservations") == 1
        dora.leave()
        await trio.sleep(1)
        assert s.in_use("max_reservations") == 0


async def test_a_place_without_end_is_told_with_one(autojump_clock: MockClock) -> None:
    async with serving(reservation_seconds=math.inf) as s:
        dora = await s.stranger()
        answer = await dora.ask(Reserve())
        assert answer is not None
        assert answer.reservation is not None
        assert answer.reservation.expire == pytest.approx(time.time() + LONGEST_TOLD, abs=60)
        await trio.sleep(3700)
        assert s.in_use("max_reservations") == 1


async def test_a_place_ends_with_its_time(autojump_clock: MockClock) -> None:
    async with serving(reservation_seconds=1000) as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        source, _ = await emil.call(dora)
        await trio.sleep(990)
        assert s.in_use("max_reservations") == 1
        await trio.sleep(20)
        assert s.in_use("max_reservations") == 0
        assert await emil.status(Connect(dora.peer)) == "NO_RESERVATION"
        await source.send_all(b"what was made stays")
        assert s.in_use("max_circuits") == 1


async def test_who_comes_back_takes_the_place_over(autojump_clock: MockClock) -> None:
    """The relay has not noticed yet that the old line is dead, and there is no other place."""
    async with serving(max_reservations=2) as s:
        dora = await s.stranger()
        assert await dora.reserve() == "OK"
        assert await (await s.stranger()).reserve() == "RESERVATION_REFUSED"
        back = await s.stranger(identity=dora.identity)
        assert await back.reserve() == "OK"
        emil = await s.stranger()
        _, there = await emil.call(back)  # over the new line
        assert there.connection is back.connection
        dora.leave()
        await trio.sleep(1)
        assert s.in_use("max_reservations") == 1


async def test_a_place_stays_with_the_connection_that_is_left(autojump_clock: MockClock) -> None:
    """go and js have several connections with a relay at times, and ask anew once the last one is gone."""
    async with serving() as s:
        dora = await s.stranger()
        other = await s.stranger(identity=dora.identity)
        assert await dora.reserve() == "OK"
        dora.leave()
        await trio.sleep(300)  # it is not closed as idle
        emil = await s.stranger()
        _, there = await emil.call(other)
        assert there.connection is other.connection
        other.leave()
        await trio.sleep(1)
        assert s.in_use("max_reservations") == 0


# Circuits


async def test_a_circuit(autojump_clock: MockClock) -> None:
    async with serving(max_circuit_bytes=10_000, max_circuit_seconds=600) as s:
        dora, emil = await s.stranger("20.1.0.1"), await s.stranger("21.1.0.1")
        assert await dora.reserve() == "OK"
        begun = trio.current_time()
        stream = await emil.open(encode_hop(Connect(dora.peer)))
        answer = await emil.hear(stream)
        assert trio.current_time() - begun == pytest.approx(4 * DELAY)
        # Each is told where the relay sees the other.
        limit = Limit(600, 10_000)
        assert answer == HopStatus(Status.OK, None, limit, Peer(dora.peer, (dora.connection.local_address,)))
        assert dora.asked == [StopConnect(Peer(emil.peer, (emil.connection.local_address,)), limit)]
        there = await dora.circuits.receive()
        await stream.send_all(b"good day")
        assert await there.receive_some() == b"good day"
        carried = s.relay.relay_server.status().circuits[-1]
        assert (carried.source, carried.destination) == (emil.peer, dora.peer)
        assert (carried.forth, carried.back) == (8, 0)
        await there.send_all(b"you too!!")
        await there.send_eof()
        assert await stream.receive_some() == b"you too!!"
        await stream.send_eof()
        await trio.sleep(1)
        opened, closed = s.told.of(CircuitOpened)[0], s.told.of(CircuitClosed)[0]
        assert (opened.circuit, opened.source, opened.destination) == (carried.number, emil.peer, dora.peer)
        assert (closed.circuit, closed.reason, closed.forth, closed.back) == (carried.number, End.CLOSED, 8, 9)
        assert s.in_use("max_circuits") == 0
        assert not dora.connection.streams
        assert not emil.connection.streams


async def test_what_the_source_says_too_early_is_not_lost(autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        stream = await emil.open(encode_hop(Connect(dora.peer)) + b"already here")
        there = await dora.circuits.receive()
        assert await there.receive_some() == b"already here"
        await stream.aclose()


@pytest.mark.parametrize("who", ["source", "destination"])
async def test_a_reset_goes_through(who: str, autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        ends = await emil.call(dora)
        one, other = ends if who == "source" else ends[::-1]
        one.reset(0x1002)
        with pytest.raises(StreamReset) as info:
            await other.receive_some()
        assert info.value.code == 0x1002
        assert s.ends() == [f"{who}_reset"]
        assert s.in_use("max_circuits") == 0


@pytest.mark.parametrize("who", ["source", "destination"])
async def test_a_side_leaves(who: str, autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        ends = await emil.call(dora)
        one, other = (emil, ends[1]) if who == "source" else (dora, ends[0])
        one.leave()
        with pytest.raises(StreamReset):
            await other.receive_some()
        assert s.ends() == [f"{who}_lost"]
        assert s.in_use("max_circuits") == 0


async def test_two_circuits_to_one_destination_are_two(autojump_clock: MockClock) -> None:
    """In py-libp2p, the end of one ends the other."""
    async with serving() as s:
        dora, emil, frida = await s.stranger(), await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        mine, theirs = await emil.call(dora), await frida.call(dora)
        mine[0].reset()
        await trio.sleep(1)
        await theirs[0].send_all(b"still here")
        assert await theirs[1].receive_some() == b"still here"


async def test_both_may_call(autojump_clock: MockClock) -> None:
    """Two circuits between the same two, one in each direction."""
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == await emil.reserve() == "OK"
        for ends in (await emil.call(dora), await dora.call(emil)):
            await ends[0].send_all(b"hello")
            assert await ends[1].receive_some() == b"hello"


async def test_the_relay_stops_being_one_and_ends_nothing(autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        stream, there = await emil.call(dora)
        s.relay._take_role(Role.PRIVATE)
        assert s.in_use("max_reservations") == -1  # the friends' is gone, too
        assert await emil.status(Connect(dora.peer)) == ""
        await stream.send_all(b"still here")
        assert await there.receive_some() == b"still here"
        await trio.sleep(5)  # it is told
        s.relay._take_role(Role.PUBLIC)
        assert await emil.status(Connect(dora.peer)) == "NO_RESERVATION"
        await eventually(lambda: s.in_use("max_reservations") == 0)  # alice asks anew


async def test_the_relay_stops_being_one_while_it_asks_who_wants_a_place(autojump_clock: MockClock) -> None:
    async with serving(purpose=Purpose.OVERLAY) as s:
        dora = await s.stranger()
        held = trio.Event()

        async def slowly(_: object) -> bool:
            await held.wait()
            return True

        offers = s.relay.relay_server._offers_kaspa
        s.relay.relay_server._offers_kaspa = slowly
        stream = await dora.open(encode_hop(Reserve()))
        await trio.sleep(1)
        s.relay._take_role(Role.PRIVATE)
        held.set()
        answer = await dora.hear(stream)
        assert answer is not None
        assert answer.status is Status.PERMISSION_DENIED
        assert s.served() == [("reserve", "PERMISSION_DENIED", "withdrawn")]
        s.relay.relay_server._offers_kaspa = offers
        await trio.sleep(5)  # it is told
        s.relay._take_role(Role.PUBLIC)
        await eventually(lambda: s.in_use("max_reservations") == 0)  # alice asks anew


async def test_an_answer_that_nobody_hears_is_told_as_such(autojump_clock: MockClock) -> None:
    async with serving(purpose=Purpose.OVERLAY) as s:
        dora = await s.stranger()
        held = trio.Event()

        async def slowly(_: object) -> bool:
            await held.wait()
            return True

        offers = s.relay.relay_server._offers_kaspa
        s.relay.relay_server._offers_kaspa = slowly
        stream = await dora.open(encode_hop(Reserve()))
        await trio.sleep(1)
        stream.reset()
        await trio.sleep(1)
        assert s.served() == []
        held.set()
        await wait_all_tasks_blocked()
        assert s.served() == [("reserve", "OK", "unheard")]
        s.relay.relay_server._offers_kaspa = offers


# A destination that takes no circuit


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (encode_stop(StopStatus(Status.CONNECTION_FAILED)), "destination_refused"),
        (encode_stop(StopStatus(Status.UNUSED)), "destination_refused"),
        (b"\x02\xff\xff", "destination_misbehaved"),
        (encode_stop(StopConnect(Peer(RELAY.peer_id))), "destination_misbehaved"),
        (b"\xff" * 10, "destination_misbehaved"),
        (b"\x81\x20" + bytes(4097), "destination_misbehaved"),
        (None, "destination_silent"),
    ],
)
async def test_a_destination_that_says_no(answer: bytes | None, reason: str, autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        dora.answer = answer
        begun = trio.current_time()
        assert await emil.status(Connect(dora.peer)) == "CONNECTION_FAILED"
        assert trio.current_time() - begun <= STOP_TIMEOUT + 10 * DELAY
        assert s.served()[-1] == ("connect", "CONNECTION_FAILED", reason)
        assert s.in_use("max_circuits") == 0
        await trio.sleep(1)
        assert not dora.connection.streams
        assert bool(s.faults()) == (reason == "destination_misbehaved")


async def test_a_destination_that_does_not_speak_stop(autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        dora.speaks = ("/other/1",)
        assert await emil.status(Connect(dora.peer)) == "CONNECTION_FAILED"
        assert s.served()[-1][2] == "destination_unable"


async def test_a_destination_that_leaves_when_asked(autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        dora.answer = None
        stream = await emil.open(encode_hop(Connect(dora.peer)))
        await trio.sleep(5 * DELAY)
        dora.leave()
        answer = await emil.hear(stream)
        assert answer is not None
        assert answer.status is Status.CONNECTION_FAILED
        assert s.served()[-1][2] == "destination_lost"
        assert await emil.status(Connect(dora.peer)) == "NO_RESERVATION"


# For whom


async def test_only_for_those_who_offer_a_kaspa_stream(autojump_clock: MockClock) -> None:
    async with serving(purpose=Purpose.OVERLAY) as s:  # the friends do
        dora, emil = await s.stranger(), await s.stranger()  # they do not even answer when asked who they are
        assert await dora.reserve() == "PERMISSION_DENIED"
        assert await emil.status(Connect(s.alice.peer_id)) == "PERMISSION_DENIED"
        assert s.served() == [
            ("reserve", "PERMISSION_DENIED", "purpose"),
            ("connect", "PERMISSION_DENIED", "purpose"),
        ]
        assert s.in_use("max_reservations") == s.in_use("max_circuits") == 0


@pytest.mark.parametrize("purpose", Purpose)
async def test_a_place_is_there_two_round_trips_after_the_connection(
    purpose: Purpose, autojump_clock: MockClock
) -> None:
    """Also where the relay has to know first whether the peer offers a Kaspa stream."""
    async with serving(purpose=purpose) as s, node_at(s.internet, 5, private()) as carl:
        await carl.serve(echo)
        events = carl.events()
        times: dict[type[Event], float] = {}
        while not times.keys() >= {ConnectionOpened, ReservationMade}:
            event = await anext(events)
            times[type(event)] = trio.current_time()
        assert times[ReservationMade] - times[ConnectionOpened] <= 2 * 2 * DELAY


async def test_one_who_leaves_while_it_is_asked_who_it_is_has_no_place(autojump_clock: MockClock) -> None:
    async with serving(purpose=Purpose.OVERLAY) as s:
        dora = await s.stranger()
        held = trio.Event()

        async def slowly(_: object) -> bool:
            await held.wait()
            return True

        s.relay.relay_server._offers_kaspa = slowly
        await dora.open(encode_hop(Reserve()))
        await trio.sleep(1)
        dora.leave()
        await trio.sleep(1)
        held.set()
        await wait_all_tasks_blocked()
        assert s.in_use("max_reservations") == 0
