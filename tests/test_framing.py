import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.framing import FrameDecoder, decode_varint, encode_varint, frame


@given(st.integers(0, (1 << 63) - 1))
def test_a_varint_survives_the_round_trip_and_every_prefix_asks_for_more(value: int) -> None:
    data = encode_varint(value)
    assert decode_varint(data) == (value, len(data))
    for end in range(len(data)):
        assert decode_varint(data[:end]) is None


@pytest.mark.parametrize("value", [-1, 1 << 63])
def test_what_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="63 bits"):
        encode_varint(value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff" * 10 + b"\x01", id="ten bytes and more"),
        pytest.param(b"\x80" * 8 + b"\x80\x01", id="2^63"),
        pytest.param(b"\x80\x00", id="zero in two bytes"),
        pytest.param(b"\xff\x80\x00", id="127 in three bytes"),
    ],
)
def test_a_malformed_varint_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_varint(data)


@given(st.lists(st.binary(max_size=300)), st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(map(frame, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    decoder = FrameDecoder(max_size=300)
    seen = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        decoder.feed(wire[start:end])
        seen += list(decoder)
    assert seen == payloads
    assert decoder.pending == 0


def test_a_length_over_the_cap_is_refused_before_its_bytes_arrive() -> None:
    decoder = FrameDecoder(max_size=4096)
    decoder.feed(frame(bytes(4096)) + encode_varint(4097))
    assert decoder.next_frame() == bytes(4096)
    with pytest.raises(RemoteProtocolError, match="4097"):
        decoder.next_frame()


def test_what_follows_a_frame_can_be_taken_over_by_the_next_protocol() -> None:
    decoder = FrameDecoder(max_size=10)
    decoder.feed(frame(b"last") + b"\xff\xff\xff")
    assert decoder.next_frame() == b"last"
    assert decoder.take_rest() == b"\xff\xff\xff"
    assert decoder.pending == 0
