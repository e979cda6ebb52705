"""What a relay does with those who mean it ill, while two friends talk through it: see `tests.relay.serving`."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses as addr
from kas_libp2p.config import KIB
from kas_libp2p.errors import StreamReset
from kas_libp2p.events import CircuitClosed
from kas_libp2p.framing import encode_varint, frame
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Path, PathKind
from kas_libp2p.pb import relay_pb2 as pb
from kas_libp2p.relay._messages import HOP, Connect, HopStatus, Reserve, Status, decode_hop, encode_hop
from kas_libp2p.relay._server import NETWORK_HOSTS
from kas_libp2p.relay.server import REQUEST_TIMEOUT, STOP_TIMEOUT
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.splice import STALLED
from tests.relay.scripted import THROUGH
from tests.relay.serving import DELAY, FREE, serving

# 1: lengths, sizes, garbage


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 9 + b"\x01",  # a varint of ten bytes
        b"\xff" * 20,
        b"\x80" * 8 + b"\x40" + b"\x00",  # one that is not in its shortest form
        encode_varint((1 << 63) - 1),
        b"\x80" * 9 + b"\x01",  # 2^63
        frame(bytes(4097)),
        frame(b""),
        frame(b"\xff\xff\xff"),
        frame(b"\x08\x09"),  # no such type
        frame(b"\x08\x01"),  # CONNECT, to nobody
        frame(b"\x08\x01\x12\x05\x0a\x03abc"),  # CONNECT, to no peer id
        frame(b"\x08\x01\x12\x84\x01\x0a\x81\x01" + b"\x00\x7f" + bytes(127)),  # a key of 127 bytes within a peer id
        frame(encode_hop(Reserve())),  # framed twice
    ],
)
async def test_malformed(data: bytes, autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory = await s.stranger()
        assert await mallory.status(data) == "MALFORMED_MESSAGE"
        assert s.served() == [("", "MALFORMED_MESSAGE", "malformed")]
        assert len(s.faults()) == 1
        assert s.relay.bus.counts["peer-misbehaved", "relay"] == 1
        assert await mallory.reserve() == "OK"  # one bad stream costs that stream


async def test_an_answer_in_place_of_a_question(autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory = await s.stranger()
        assert await mallory.status(HopStatus(Status.OK)) == "UNEXPECTED_MESSAGE"
        assert s.served() == [("", "UNEXPECTED_MESSAGE", "unexpected")]
        assert len(s.faults()) == 1


@pytest.mark.parametrize("cut", [1, 2, 20])
async def test_a_request_that_is_cut_short(cut: int, autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory = await s.stranger()
        stream = await mallory.open(encode_hop(Connect(s.alice.peer_id))[:cut])
        await stream.send_eof()
        answer = await mallory.hear(stream)
        assert answer is not None
        assert answer.status is Status.MALFORMED_MESSAGE


# 2: stalls


@pytest.mark.parametrize(
    "said", [b"", b"\x05", b"\x02\x08", encode_hop(Connect(addr.parse_peer_id("QmP" + "1" * 43)))[:-1]]
)
async def test_silence_at_hop(said: bytes, autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory = await s.stranger()
        streams = [await mallory.open(said) for _ in range(10)]
        begun = trio.current_time()
        for stream in streams:
            with pytest.raises(StreamReset):
                await stream.receive_some()
        assert trio.current_time() - begun == pytest.approx(REQUEST_TIMEOUT, abs=5 * DELAY)
        assert len(s.faults()) == 10
        assert await mallory.reserve() == "OK"


async def test_no_more_streams_than_a_peer_can_use(autojump_clock: MockClock) -> None:
    async with serving(max_circuits_per_peer=4) as s:
        mallory = await s.stranger()
        streams = [await mallory.open(b"\x80") for _ in range(20)]
        await trio.sleep(1)
        refused = [stream for stream in streams if stream._state.reset is not None]
        assert len(refused) == 8
        assert s.relay.bus.counts["limit-hit", "max_streams_per_peer"] == 8


async def test_silence_at_stop_holds_places_no_longer_than_it_may(autojump_clock: MockClock) -> None:
    """A destination that never answers, and callers that are in league with it."""
    async with serving(max_circuits=5) as s:
        mallory = await s.stranger()
        mallory.answer = None
        assert await mallory.reserve() == "OK"
        callers = [await s.stranger() for _ in range(4)]
        for caller in callers:
            await caller.open(encode_hop(Connect(mallory.peer)))
        await trio.sleep(1)
        assert s.in_use("max_circuits") == 4
        honest = await s.stranger()
        assert await honest.status(Connect(s.alice.peer_id)) == "RESOURCE_LIMIT_EXCEEDED"
        await trio.sleep(STOP_TIMEOUT)
        assert s.in_use("max_circuits") == 0
        assert [each[2] for each in s.served()].count("destination_silent") == 4


async def test_a_side_that_never_reads_stalls_itself_alone(autojump_clock: MockClock) -> None:
    """Its circuit holds two windows, and the friends, on the same relay, notice nothing."""
    async with serving() as s:
        mallory, caller = await s.stranger(), await s.stranger()
        assert await mallory.reserve() == "OK"
        stream, _ = await caller.call(mallory)
        with trio.move_on_after(60):
            await stream.send_all(bytes(64 * KIB * KIB))
        connection = s.relay.swarm.connection_to(mallory.peer)
        assert connection is not None
        assert connection.connection._machine.reserved <= s.relay.config.yamux.max_memory
        unsent = sum(each.unsent for each in connection.connection.streams)
        assert unsent <= 1 << 20
        stream.reset()


async def test_a_stalled_crowd_holds_no_more_than_all_may(autojump_clock: MockClock) -> None:
    """20 circuits whose ends do not read would hold 5 MB; those that have waited for longest go."""
    most = 1 << 20
    async with serving(max_circuit_memory=most, max_circuits_per_peer=100, **FREE) as s, trio.open_nursery() as nursery:
        mallory = await s.stranger()
        assert await mallory.reserve() == "OK"
        for number in range(20):
            caller = await s.stranger()
            stream, _ = await caller.call(mallory)
            nursery.start_soon(_write_until_reset, stream, bytes(1 << 20))
            await trio.sleep(1)
            assert s.in_use("max_circuit_memory") <= most
            assert s.in_use("max_circuits") == number + 1 - len(s.ends())
        left = s.in_use("max_circuits")
        assert 2 <= left <= 4  # a window each, which may have doubled
        assert s.ends() == ["max_circuit_memory"] * (20 - left)
        assert s.relay.bus.counts["circuit-closed", "max_circuit_memory"] == 20 - left
        await s.meet()
        await trio.sleep(2 * STALLED)
        assert s.ends().count("destination_stalled") + s.ends().count("max_circuit_memory") == 20
        assert s.in_use("max_circuit_memory") == s.in_use("max_circuits") == 0


# 3: over a relay, oneself, nobody, another's name, floods


async def test_over_a_relayed_connection(autojump_clock: MockClock) -> None:
    """Bob reaches the relay through the relay: by hand, as the relay itself dials nobody."""
    async with serving() as s:
        dora = await s.stranger()
        for connection in s.relay.swarm.connections_to(dora.peer):
            connection.connection.path = Path(PathKind.RELAYED, s.alice.peer_id)
        assert await dora.reserve() == "PERMISSION_DENIED"
        assert await dora.status(Connect(s.alice.peer_id)) == "PERMISSION_DENIED"
        assert [each[2] for each in s.served()] == ["relayed", "relayed"]
        assert s.in_use("max_reservations") == s.in_use("max_circuits") == 0


async def test_a_relay_behind_a_relay_serves_nobody_through_it(autojump_clock: MockClock) -> None:
    """The same with real circuits: Alice is a relay too, and Bob asks her through ours."""
    async with serving() as s:
        s.alice.swarm.handle(HOP, s.alice.relay_server.handle)
        stream = await s.bob.connect(f"{THROUGH}/p2p/{s.alice.peer_id}", HOP)
        for request in (Reserve(), Connect(s.relay.peer_id)):
            stream = await s.bob.connect(s.alice.peer_id, HOP)
            await stream.send_all(encode_hop(request))
            answer = decode_hop(await receive_frame(stream, 4096))  # type: ignore[arg-type]
            assert isinstance(answer, HopStatus)
            assert answer.status is Status.PERMISSION_DENIED


async def test_to_oneself_and_to_the_relay(autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory = await s.stranger()
        assert await mallory.reserve() == "OK"
        assert await mallory.status(Connect(mallory.peer)) == "PERMISSION_DENIED"
        assert await mallory.status(Connect(s.relay.peer_id)) == "NO_RESERVATION"
        assert [each[2] for each in s.served()[1:]] == ["oneself", "no_reservation"]
        assert mallory.asked == []


async def test_to_whom_has_no_place(autojump_clock: MockClock) -> None:
    async with serving() as s:
        mallory, dora = await s.stranger(), await s.stranger()  # connected, which is not enough
        assert await mallory.status(Connect(dora.peer)) == "NO_RESERVATION"
        assert await mallory.status(Connect(s.bob.peer_id)) == "NO_RESERVATION"
        assert s.served()[-1] == ("connect", "NO_RESERVATION", "no_reservation")


async def test_in_another_s_name(autojump_clock: MockClock) -> None:
    """In py-libp2p one peer fills every place under names that it claims."""
    async with serving() as s:
        mallory, dora, emil = await s.stranger(), await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        for victim in (dora.peer, s.alice.peer_id, emil.peer):
            claim = pb.HopMessage(type=pb.HopMessage.RESERVE, peer=pb.Peer(id=addr.peer_id_to_bytes(victim)))
            assert await mallory.status(frame(claim.SerializeToString())) == "OK"
        assert s.in_use("max_reservations") == 2  # Dora's, and one of Mallory's own
        _, there = await emil.call(dora)
        assert there.connection is dora.connection
        assert await dora.status(Connect(emil.peer)) == "NO_RESERVATION"


async def test_a_flood_by_one_peer(autojump_clock: MockClock) -> None:
    async with serving(requests_per_peer=30, request_interval=10) as s:
        mallory = await s.stranger()
        answers = [await mallory.reserve() for _ in range(200)]
        assert answers.count("OK") == 30
        assert answers.count("RESERVATION_REFUSED") == 170
        calls = [await mallory.status(Connect(s.alice.peer_id)) for _ in range(60)]
        assert calls.count("RESOURCE_LIMIT_EXCEEDED") >= 27
        assert s.relay.bus.counts["relay-request-served", "requests_per_peer"] >= 197
        assert s.in_use("max_reservations") == 1


async def test_a_flood_by_one_ip(autojump_clock: MockClock) -> None:
    """A new name each time."""
    async with serving(max_reservations_per_ip=8, requests_per_ip=40, request_interval=10) as s:
        answers = []
        for _ in range(100):
            mallory = await s.stranger("66.1.2.3")
            answers.append(await mallory.reserve())
        assert answers.count("OK") == 8
        reasons = [each[2] for each in s.served()]
        assert reasons.count("max_reservations_per_ip") >= 32
        assert reasons.count("requests_per_ip") == 100 - 8 - reasons.count("max_reservations_per_ip")
        assert s.in_use("max_reservations_per_ip") == 8
        assert await (await s.stranger()).reserve() == "OK"


@pytest.mark.parametrize("template", ["2d00:1:2:{:x}::1", "2d00:1:2:aa{:02x}::1", "66.1.{}.1"])
async def test_a_flood_by_one_network(template: str, autojump_clock: MockClock) -> None:
    """A /48, a /56, an IPv4 /16: each stranger with a name and an IP of its own."""
    async with serving(max_reservations_per_network=32, requests_per_ip=8, request_interval=1000) as s:
        for number in range(100):
            mallory = await s.stranger(template.format(number))
            await mallory.reserve()
        reasons = [each[2] for each in s.served()]
        assert reasons.count("") == 32
        assert reasons.count("max_reservations_per_network") == 8 * NETWORK_HOSTS - 32
        assert reasons.count("requests_per_network") == 100 - 8 * NETWORK_HOSTS
        assert await (await s.stranger()).reserve() == "OK"


async def test_a_crowd_that_calls_one_destination(autojump_clock: MockClock) -> None:
    """From one network it gets half of the destination's circuits, and from one peer no more than a peer may have."""
    async with serving(max_circuits_per_peer=16, **FREE) as s:
        crowd = [await s.stranger(f"66.1.{number}.1") for number in range(16)]
        streams = [await each.open(encode_hop(Connect(s.alice.peer_id))) for each in crowd]
        answers = [await each.hear(stream) for each, stream in zip(crowd, streams, strict=True)]
        assert [each.status for each in answers if each is not None].count(Status.OK) == 8
        assert s.relay.bus.counts["relay-request-served", "one_network"] == 8
        assert s.in_use("max_circuits") == 8
        await s.meet()  # while they are there
        dora = await s.stranger()
        assert await dora.reserve() == "OK"
        await s.alice.relay_client.dial(addr.parse(f"{THROUGH}/p2p/{dora.peer}"))  # nor is she kept from calling


async def test_a_thousand_reconnects_leak_nothing(autojump_clock: MockClock) -> None:
    """With a place and a circuit each time; every third one without a goodbye."""
    async with serving(max_reservations=3, max_reservations_per_ip=1, max_circuits_per_peer=2, **FREE) as s:
        caller = await s.stranger()
        identity = Identity.from_seed(b"d" * 32)
        for number in range(1000):
            dora = await s.stranger("66.1.2.3", identity)
            assert await dora.reserve() == "OK"
            stream, there = await caller.call(dora)
            if number % 3:
                await dora.connection.aclose()
            else:
                dora.leave()
            with pytest.raises(StreamReset):
                await stream.receive_some()
            del stream, there
        await trio.sleep(1)
        status = s.relay.relay_server.status()
        assert (len(status.reservations), len(status.circuits)) == (1, 1)  # the friends'
        assert s.in_use("max_reservations") == s.in_use("max_circuits") == 0
        assert len(s.told.of(CircuitClosed)) == 1000
        assert not s.relay.relay_server._relay._networks.keys() - {addr.network_key("11.0.0.2")}


async def test_all_places_are_taken_and_who_has_one_keeps_it(autojump_clock: MockClock) -> None:
    async with serving(max_reservations=50, reservation_seconds=1000, **FREE) as s:
        holders = [await s.stranger() for _ in range(49)]
        assert {await each.reserve() for each in holders} == {"OK"}
        crowd = [await s.stranger() for _ in range(50)]
        for _ in range(3):
            await trio.sleep(600)
            assert {await each.reserve() for each in crowd if not each.connection.closing} <= {"RESERVATION_REFUSED"}
            assert {await each.reserve() for each in holders} == {"OK"}


# 4: the limits of a circuit


@pytest.mark.parametrize(("less", "over"), [(1, False), (0, False), (-1, True)])
async def test_bytes(less: int, over: bool, autojump_clock: MockClock) -> None:
    """One byte below, equal, above, both directions together; the friends' own circuit is far below."""
    async with serving(max_circuit_bytes=20_000) as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        stream, there = await emil.call(dora)
        await there.send_all(bytes(5000))
        got = 0
        while got < 5000:
            got += len(await stream.receive_some())
        await stream.send_all(bytes(15_000 - less))
        await trio.sleep(1)
        if not over:
            assert s.ends() == []
            await stream.send_eof()
            await there.send_eof()
            await trio.sleep(1)
            assert s.ends() == ["closed"]
            return
        assert s.ends() == ["max_circuit_bytes"]
        closed = s.told.of(CircuitClosed)[0]
        assert closed.forth + closed.back == 20_000
        for each in (stream, there):
            with pytest.raises(StreamReset) as info:
                await each.receive_some()
            assert info.value.code == 0x1002


async def test_seconds_while_idle_and_in_mid_frame(autojump_clock: MockClock) -> None:
    async with serving(max_circuit_seconds=50) as s:
        dora, emil, frida = await s.stranger(), await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        idle, _ = await emil.call(dora)
        busy, sink = await frida.call(dora)
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            # More than the windows: it hangs in the middle of what it says.
            nursery.start_soon(_write_until_reset, busy, bytes(4 << 20))
            with pytest.raises(StreamReset):
                await idle.receive_some()
        assert trio.current_time() - begun == pytest.approx(50, abs=0.1)
        with pytest.raises(StreamReset):
            await sink.receive_some()
        await trio.sleep(1)
        assert s.ends() == ["max_circuit_seconds"] * 3  # the friends' too
        assert all(each.seconds == pytest.approx(50, abs=0.01) for each in s.told.of(CircuitClosed))
        await s.meet()


async def _write_until_reset(stream: object, data: bytes) -> None:
    with pytest.raises(StreamReset):
        await stream.send_all(data)  # type: ignore[attr-defined]


async def test_zeros_are_no_limits(autojump_clock: MockClock) -> None:
    async with serving(max_circuit_bytes=0, max_circuit_seconds=0, max_circuit_rate=0) as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        stream, there = await emil.call(dora)
        await trio.sleep(10_000)
        await stream.send_all(bytes(200_000))
        got = 0
        while got < 200_000:
            got += len(await there.receive_some())
        assert s.ends() == []


async def test_half_close(autojump_clock: MockClock) -> None:
    async with serving() as s:
        dora, emil = await s.stranger(), await s.stranger()
        assert await dora.reserve() == "OK"
        stream, there = await emil.call(dora)
        await stream.send_eof()
        assert await there.receive_some() == b""
        await trio.sleep(100)
        await there.send_all(b"the other half")
        assert await stream.receive_some() == b"the other half"
        await there.send_eof()
        await trio.sleep(1)
        assert s.ends() == ["closed"]
