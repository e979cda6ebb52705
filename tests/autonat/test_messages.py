"""What is written is read, and anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.autonat._messages import (
    MAX_ADDRESSES,
    MAX_MESSAGE,
    MAX_PIECE,
    MAX_TEXT,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    V1Dial,
    V1Response,
    V1Status,
    V2Message,
    check_dial_back_response,
    decode,
    decode_dial_back,
    decode_v1,
    encode,
    encode_dial_back,
    encode_dial_back_response,
    encode_v1,
)
from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder
from kas_libp2p.pb import autonat_pb2 as pb

UINT64 = st.integers(0, 2**64 - 1)
UINT32 = st.integers(0, 2**32 - 1)
ADDRESSES = st.lists(st.binary(max_size=60), max_size=MAX_ADDRESSES).map(tuple)
V2 = st.one_of(
    st.builds(DialRequest, ADDRESSES, UINT64),
    st.builds(DialDataRequest, UINT32, UINT64),
    st.builds(DialData, st.binary(max_size=MAX_PIECE)),
    st.builds(DialResponse, st.sampled_from(ResponseStatus), UINT32, st.sampled_from(DialStatus)),
)
V1 = st.one_of(
    st.builds(V1Dial, st.binary(max_size=40), ADDRESSES),
    st.builds(V1Response, st.sampled_from(V1Status), st.text("abc ", max_size=MAX_TEXT), st.binary(max_size=40)),
)


def unframed(data: bytes) -> bytes:
    decoder = FrameDecoder(MAX_MESSAGE)
    decoder.feed(data)
    message = decoder.next_frame()
    assert message is not None
    assert not decoder.pending
    return message


@given(V2)
def test_v2_is_read_as_it_was_written(message: V2Message) -> None:
    assert decode(unframed(encode(message))) == message


@given(V1)
def test_v1_is_read_as_it_was_written(message: V1Dial | V1Response) -> None:
    assert decode_v1(unframed(encode_v1(message))) == message


@given(UINT64)
def test_a_dial_back_is_read_as_it_was_written(nonce: int) -> None:
    assert decode_dial_back(unframed(encode_dial_back(nonce))) == nonce
    check_dial_back_response(unframed(encode_dial_back_response()))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_the_peers_fault(data: bytes) -> None:
    for read in (decode, decode_v1, decode_dial_back, check_dial_back_response):
        try:
            read(data)
        except RemoteProtocolError:
            continue


@given(V2, st.integers(0, 100))
def test_a_message_cut_short_is_a_value_or_the_peers_fault(message: V2Message, size: int) -> None:
    try:
        decode(unframed(encode(message))[:size])
    except RemoteProtocolError:
        return


def test_what_proto3_leaves_out_is_zero() -> None:
    assert decode(pb.V2(dialResponse=pb.DialResponse()).SerializeToString()) == DialResponse(
        ResponseStatus.E_INTERNAL_ERROR, 0, DialStatus.UNUSED
    )
    assert decode(pb.V2(dialRequest=pb.DialRequest(addrs=[b"a"])).SerializeToString()) == DialRequest((b"a",), 0)


def test_an_unknown_status_tells_nothing() -> None:
    unknown = b"\x12\x03\x08\xac\x02"  # dialResponse, status 300
    assert decode(unknown) == DialResponse(ResponseStatus.E_INTERNAL_ERROR)


def test_in_v1_where_zero_is_success_a_missing_or_unknown_status_is_an_error() -> None:
    for answer in (b"\x08\x01\x1a\x00", b"\x08\x01\x1a\x02\x08\x07"):
        with pytest.raises(RemoteProtocolError, match="without a status"):
            decode_v1(answer)


def test_nothing_in_a_message_is_an_error() -> None:
    for read in (decode, decode_v1):
        with pytest.raises(RemoteProtocolError, match="holds nothing"):
            read(b"")


def test_more_addresses_than_anybody_has_are_not_looked_at() -> None:
    many = DialRequest(tuple([b"x"] * 500), 1)
    read = decode(unframed(encode(many)))
    assert isinstance(read, DialRequest)
    assert len(read.addresses) == MAX_ADDRESSES


def test_a_servers_words_are_safe_to_show() -> None:
    read = decode_v1(unframed(encode_v1(V1Response(V1Status.E_DIAL_ERROR, "\x1b[31m" + "x" * 1000))))
    assert isinstance(read, V1Response)
    assert read.text.isprintable()
    assert len(read.text) == MAX_TEXT
