from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p import addresses as addr
from kas_libp2p.dcutr._messages import MAX_LISTED, MAX_MESSAGE, Connect, Message, Sync, decode, encode
from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.pb import dcutr_pb2 as pb

HERE, THERE = "/ip4/11.0.0.1/tcp/16117", "/ip6/2d00::1/udp/4001/quic-v1"


def unframed(data: bytes) -> bytes:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    message = decoder.next_frame()
    assert message is not None
    assert not decoder.pending
    return message


@pytest.mark.parametrize("message", [Connect(), Connect((HERE, THERE)), Sync()])
def test_there_and_back(message: Message) -> None:
    assert decode(unframed(encode(message))) == message


def test_as_the_specification_has_them() -> None:
    address = addr.parse(HERE).to_bytes()
    assert encode(Connect((HERE,))) == b"\x0c\x08\x64\x12\x08" + address
    assert encode(Sync()) == b"\x03\x08\xac\x02"


def test_what_cannot_be_read_is_passed_over() -> None:
    listed = [b"", b"junk", b"\x04\x0b", addr.parse(HERE).to_bytes(), addr.parse(HERE).to_bytes()]
    message = pb.HolePunch(type=pb.HolePunch.CONNECT, addrs=listed)
    assert decode(message.SerializeToString() + b"\xfa\x01\x03abc") == Connect((HERE,))


def test_of_many_addresses_the_first_are_read() -> None:
    listed = [addr.from_ip_port("11.0.0.1", port).to_bytes() for port in range(2000, 2400)]
    message = pb.HolePunch(type=pb.HolePunch.CONNECT, addrs=listed).SerializeToString()
    assert len(message) <= MAX_MESSAGE
    read = decode(message)
    assert isinstance(read, Connect)
    assert len(read.addresses) == MAX_LISTED


@pytest.mark.parametrize(
    "data",
    [b"", b"\x12\x01\x04", b"\x08\x00", b"\x08\x63", b"\x0a\xff", b"\xff" * 20],
    ids=["nothing", "no type", "unused type", "unknown type", "cut short", "junk"],
)
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


@given(st.binary(max_size=300))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    assert decode(unframed(encode(message))) == message
