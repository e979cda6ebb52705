from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses
from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.identity import Identity
from kas_libp2p.pb import relay_pb2 as pb
from kas_libp2p.relay._messages import (
    MAX_ADDRESSES,
    MAX_MESSAGE,
    UNLIMITED,
    Connect,
    HopMessage,
    HopStatus,
    Limit,
    Peer,
    Reservation,
    Reserve,
    Status,
    StopConnect,
    StopMessage,
    StopStatus,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
BOB_BYTES = addresses.peer_id_to_bytes(BOB)
HERE = "/ip4/11.0.0.1/tcp/16117"


def unframed(data: bytes) -> bytes:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    message = decoder.next_frame()
    assert message is not None
    assert not decoder.pending
    return message


@pytest.mark.parametrize(
    "message",
    [
        Reserve(),
        Connect(BOB),
        HopStatus(Status.NO_RESERVATION),
        HopStatus(Status.OK, Reservation(1_800_000_000, (f"{HERE}/p2p/{ALICE}",), b"seal"), Limit(120.0, 131072)),
        HopStatus(Status.OK, Reservation(2**64 - 1), Limit(None, 1)),
        HopStatus(Status.OK, limit=Limit(7200.0), peer=Peer(BOB, (HERE,))),
    ],
)
def test_hop_messages_there_and_back(message: HopMessage) -> None:
    assert decode_hop(unframed(encode_hop(message))) == message


@pytest.mark.parametrize(
    "message",
    [
        StopConnect(Peer(BOB)),
        StopConnect(Peer(BOB, (HERE, "/ip6/2d00::1/tcp/1")), Limit(1.0, 2)),
        StopStatus(Status.OK),
        StopStatus(Status.CONNECTION_FAILED),
    ],
)
def test_stop_messages_there_and_back(message: StopMessage) -> None:
    assert decode_stop(unframed(encode_stop(message))) == message


def test_no_limit_is_no_field_and_zeros_are_no_limit() -> None:
    assert not pb.HopMessage.FromString(unframed(encode_hop(HopStatus(Status.OK)))).HasField("limit")
    rust = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, limit=pb.Limit(duration=0, data=0))
    answer = decode_hop(rust.SerializeToString())
    assert isinstance(answer, HopStatus)
    assert answer.limit == UNLIMITED
    assert not answer.limit


def test_a_limit_is_never_rounded_down_to_none() -> None:
    assert pb.StopMessage.FromString(unframed(encode_stop(StopConnect(Peer(BOB), Limit(0.2))))).limit.duration == 1
    huge = pb.StopMessage.FromString(unframed(encode_stop(StopConnect(Peer(BOB), Limit(1e12)))))
    assert huge.limit.duration == 2**32 - 1
    endless = pb.StopMessage.FromString(unframed(encode_stop(StopConnect(Peer(BOB), Limit(math.inf, 2**70)))))
    assert (endless.limit.duration, endless.limit.data) == (2**32 - 1, 2**64 - 1)


def test_a_peer_that_reserves_for_another_reserves_for_itself() -> None:
    claim = pb.HopMessage(type=pb.HopMessage.RESERVE, peer=pb.Peer(id=BOB_BYTES))
    assert decode_hop(claim.SerializeToString()) == Reserve()


def test_what_is_unknown_is_passed_over() -> None:
    later = b"\x08\x02" + b"\x28\xff\x07" + b"\xfa\x01\x03abc"  # STATUS, status 1023, field 31
    assert decode_hop(later) == HopStatus(Status.UNUSED)
    bare = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.OK, peer=pb.Peer(id=b"junk", addrs=[b"x"]))
    assert decode_hop(bare.SerializeToString()) == HopStatus(Status.OK)


def test_addresses_that_cannot_be_read_are_passed_over() -> None:
    listed = [b"", b"junk", b"\x04\x0b", addresses.parse(HERE).to_bytes(), addresses.parse(HERE).to_bytes()]
    source = pb.StopMessage(type=pb.StopMessage.CONNECT, peer=pb.Peer(id=BOB_BYTES, addrs=listed))
    assert decode_stop(source.SerializeToString()) == StopConnect(Peer(BOB, (HERE,)))


def test_ten_thousand_addresses_are_as_many_as_we_believe() -> None:
    listed = [addresses.parse(f"/ip4/11.0.0.1/tcp/{n}").to_bytes() for n in range(10_000)]
    answer = decode_hop(
        pb.HopMessage(
            type=pb.HopMessage.STATUS, status=pb.OK, reservation=pb.Reservation(expire=1, addrs=listed)
        ).SerializeToString()
    )
    assert isinstance(answer, HopStatus)
    assert answer.reservation is not None
    assert len(answer.reservation.addresses) == MAX_ADDRESSES


def test_an_answer_fits_what_everybody_reads() -> None:
    name = ".".join(["a" * 60] * 4)
    listed = tuple(f"/dns/{name}/tcp/{n}/p2p/{ALICE}" for n in range(1, 100))
    message = unframed(encode_hop(HopStatus(Status.OK, Reservation(1, listed, bytes(300)), Limit(1.0, 1))))
    assert MAX_MESSAGE - 400 < len(message) <= MAX_MESSAGE
    decode_hop(message)


@pytest.mark.parametrize(
    "data",
    [
        b"",  # no type
        b"\x08\x07",  # type 7
        b"\x08",  # cut short
        b"\xff" * 11,
        b"\x08\x01",  # CONNECT to nobody
        b"\x08\x01\x12\x04\x0a\x02\x12\x20",  # CONNECT, a hash cut short
    ],
)
def test_hop_refuses(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_hop(data)


@pytest.mark.parametrize("data", [b"", b"\x08\x02", b"\x08\x00", b"\x08\x00\x12\x02\x0a\x00", b"\x12"])
def test_stop_refuses(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_stop(data)


_likely = st.builds(
    lambda kind, rest: bytes((8, kind)) + rest,
    st.integers(0, 3),
    st.binary(max_size=200),
)


@given(st.binary(max_size=300) | _likely)
def test_decoding_is_total(data: bytes) -> None:
    for decode in (decode_hop, decode_stop):
        with suppress(RemoteProtocolError):
            decode(data)
