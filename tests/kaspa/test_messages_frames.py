from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import LocalProtocolError, RemoteProtocolError
from kas_libp2p.kaspa._messages import (
    CUT,
    MAX_CONTROL,
    MAX_FRAME,
    MAX_PLAIN,
    SMALL_MAX_MESSAGE,
    Alive,
    Capability,
    Close,
    CloseCode,
    Control,
    Hello,
    Kind,
    MessageTooLarge,
    Probe,
    Reader,
    decode,
    encode,
    encode_pieces,
    frame,
)
from kas_libp2p.kaspa.channel import Piece

from .test_channel import cut

HELLO = encode(Hello())


def read(reader: Reader, data: bytes, chunk: int = 1 << 20, room: int = 1 << 20) -> tuple[list[Piece], list[Control]]:
    pieces: list[Piece] = []
    controls: list[Control] = []
    for start in range(0, len(data), chunk):
        reader.feed(data[start : start + chunk])
        while not reader.wants_data:
            taken = reader.take(room)
            assert sum(len(piece.data) for piece in taken) <= room
            pieces += taken
            controls += reader.controls
            reader.controls.clear()
    return pieces, controls


def whole(pieces: list[Piece]) -> list[bytes]:
    """The messages that pieces make up; each piece is checked against the one before it."""
    messages: list[bytes] = []
    parts: list[bytes] = []
    left = 0
    for data, remaining, first, size in pieces:
        if first:
            assert not left
            parts, left = [], size
        parts.append(bytes(data))
        left -= len(data)
        assert left == remaining
        if not left:
            messages.append(b"".join(parts))
    assert not left
    return messages


controls_ = st.one_of(
    st.builds(Alive, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
    st.just(Probe()),
)


@given(
    messages=st.lists(st.binary(max_size=300), max_size=8),
    sizes=st.lists(st.integers(1, 100), max_size=8),
    between=st.lists(controls_, max_size=4),
    chunk=st.integers(1, 400),
    room=st.integers(1, 400),
)
def test_any_cut_and_any_chunk_gives_the_messages_in_order(
    messages: list[bytes], sizes: list[int], between: list[Control], chunk: int, room: int
) -> None:
    pieces = [piece for message in messages for piece in cut(message, sizes)]
    buffers = encode_pieces(pieces)
    wire = bytearray(HELLO)
    for index in range(0, len(buffers), 2):
        wire += buffers[index]
        wire += buffers[index + 1]
        if index // 2 < len(between):
            wire += encode(between[index // 2])
    reader = Reader()
    got, controls = read(reader, bytes(wire), chunk, room)
    assert whole(got) == messages
    assert controls == [Hello(), *between[: len(buffers) // 2]]
    assert not reader.in_message


@given(
    content=st.lists(st.binary(max_size=200), min_size=1, max_size=5),
    chunk=st.integers(1, 300),
    room=st.integers(1, 99),
)
def test_packed_frames_stand_for_their_content(content: list[bytes], chunk: int, room: int) -> None:
    plain = b"".join(encode_pieces([Piece.of(message) for message in content]))
    reader = Reader(unpack=lambda data, size: bytes(data[::-1])[:size])
    wire = HELLO + frame(Kind.PACKED, struct.pack(">I", len(plain)) + plain[::-1]) + frame(Kind.MESSAGE, b"after")
    got, _ = read(reader, wire, chunk, room)
    assert whole(got) == [*content, b"after"]


def test_a_message_may_run_on_after_a_packed_part_of_it() -> None:
    begin, more = (b"".join(encode_pieces([piece])) for piece in cut(b"0123456789", [4]))
    reader = Reader(unpack=lambda data, size: bytes(data))
    got, _ = read(reader, HELLO + frame(Kind.PACKED, struct.pack(">I", len(begin)) + begin) + more)
    assert whole(got) == [b"0123456789"]


def test_a_large_message_in_one_piece_is_cut() -> None:
    message = bytes(range(256)) * 4096
    buffers = encode_pieces([Piece.of(message)])
    assert max(map(len, buffers)) == CUT
    got, _ = read(Reader(), HELLO + b"".join(buffers))
    assert whole(got) == [message]


@pytest.mark.parametrize(
    "control",
    [
        Hello(Capability.ZSTD, 2**32 - 1, "kaspa-mainnet"),
        Hello(),
        Alive(2**40, 7),
        Probe(),
        Close(CloseCode.BUSY, "too many handshakes are pending"),
        Close(200, ""),
    ],
)
def test_controls_survive_the_wire(control: Control) -> None:
    data = encode(control)
    assert decode(data[0], data[4:]) == control


def test_what_a_newer_side_appends_is_passed_over() -> None:
    hello = encode(Hello(Capability.ZSTD, 2**28, "kaspa-simnet"))
    longer = frame(Kind.HELLO, hello[4:] + b"and more")
    unknown = frame(0x80, b"whatever") + frame(0xFF, b"")
    got, controls = read(Reader(), longer + unknown + frame(Kind.MESSAGE, b"x"))
    assert controls == [Hello(Capability.ZSTD, 2**28, "kaspa-simnet")]
    assert whole(got) == [b"x"]


def test_unknown_capabilities_mean_nothing() -> None:
    payload = struct.pack(">BIIB", 9, 0xFFFFFFFF, SMALL_MAX_MESSAGE, 0)
    assert decode(Kind.HELLO, payload) == Hello(Capability.ZSTD, SMALL_MAX_MESSAGE, "")


def test_the_reason_of_a_close_is_cut_between_characters() -> None:
    data = encode(Close(1, "ü" * 1000))
    assert len(data) == 4 + 1 + 1024
    assert decode(data[0], data[4:]) == Close(1, "ü" * 512)


BAD = {
    "no hello": frame(Kind.MESSAGE, b"x"),
    "control before hello": encode(Probe()),
    "second hello": HELLO + HELLO,
    "short hello": frame(Kind.HELLO, b"\x01\0\0"),
    "hello of version 0": frame(Kind.HELLO, struct.pack(">BIIB", 0, 0, 2**28, 0)),
    "hello that takes nothing": frame(Kind.HELLO, struct.pack(">BIIB", 1, 0, 1000, 0)),
    "hello with a network that is not there": frame(Kind.HELLO, struct.pack(">BIIB", 1, 0, 2**28, 9) + b"kaspa"),
    "frame above the limit": HELLO + struct.pack(">I", MAX_FRAME + 1),
    "largest possible frame": HELLO + b"\0\xff\xff\xff",
    "unknown kind": HELLO + frame(5, b""),
    "unknown kind, large": HELLO + struct.pack(">I", 0x90 << 24 | MAX_CONTROL + 1),
    "large control": HELLO + struct.pack(">I", Kind.CLOSE << 24 | MAX_CONTROL + 1),
    "short alive": HELLO + frame(Kind.ALIVE, b"1234567"),
    "close without a code": HELLO + frame(Kind.CLOSE, b""),
    "message within a message": HELLO + frame(Kind.BEGIN, b"\0\0\0\x05abc") + frame(Kind.MESSAGE, b"x"),
    "begin within a message": HELLO + frame(Kind.BEGIN, b"\0\0\0\x05abc") * 2,
    "begin of nothing": HELLO + frame(Kind.BEGIN, b"\0\0\0\x05"),
    "short begin": HELLO + frame(Kind.BEGIN, b"\0\0\0") + b"1",
    "begin that ends at once": HELLO + frame(Kind.BEGIN, b"\0\0\0\x03abc"),
    "begin that says too little": HELLO + frame(Kind.BEGIN, b"\0\0\0\x02abc"),
    "continuation of nothing": HELLO + frame(Kind.MORE, b"x"),
    "empty continuation": HELLO + frame(Kind.BEGIN, b"\0\0\0\x05abc") + frame(Kind.MORE, b""),
    "too much continuation": HELLO + frame(Kind.BEGIN, b"\0\0\0\x05abc") + frame(Kind.MORE, b"def"),
    "data after close": HELLO + encode(Close(0, "")) + b"\0",
    "message after close": HELLO + encode(Close(0, "")) + frame(Kind.MESSAGE, b"late"),
    "packed without content": HELLO + frame(Kind.PACKED, b"\0\0\0\x05"),
    "packed of nothing": HELLO + frame(Kind.PACKED, b"\0\0\0\0x"),
    "packed above the limit": HELLO + frame(Kind.PACKED, struct.pack(">I", MAX_PLAIN + 1) + b"x"),
    "packed in packed": HELLO + frame(Kind.PACKED, b"\0\0\0\x09" + frame(Kind.PACKED, b"\0\0\0\x01x")),
    "control in packed": HELLO + frame(Kind.PACKED, b"\0\0\0\x04" + encode(Probe())),
    "half a header in packed": HELLO + frame(Kind.PACKED, b"\0\0\0\x03\0\0\0"),
    "half a frame in packed": HELLO + frame(Kind.PACKED, b"\0\0\0\x06\0\0\0\x05ab"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_what_is_not_allowed_is_said_so(name: str, chunk: int) -> None:
    reader = Reader(unpack=lambda data, size: bytes(data))
    with pytest.raises(RemoteProtocolError):
        read(reader, BAD[name], chunk)


def test_packed_frames_that_were_not_offered_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="did not offer"):
        read(Reader(), HELLO + frame(Kind.PACKED, b"\0\0\0\x05xxxxx"))


@pytest.mark.parametrize("chunk", [1, 1000])
def test_the_limit_of_a_message_counts_at_its_first_bytes(chunk: int) -> None:
    reader = Reader(max_message=100)
    got, _ = read(reader, HELLO + frame(Kind.MESSAGE, bytes(100)), chunk)
    assert len(whole(got)[0]) == 100
    with pytest.raises(MessageTooLarge, match="101 bytes is above the limit of 100"):
        read(reader, struct.pack(">I", 101), chunk)
    reader = Reader(max_message=100)
    with pytest.raises(MessageTooLarge):
        read(reader, HELLO + struct.pack(">II", Kind.BEGIN << 24 | 5, 2**32 - 1), chunk)


def test_a_flood_of_control_frames_is_handed_out_in_bounded_lots() -> None:
    reader = Reader()
    reader.feed(HELLO + encode(Probe()) * 10_000)
    lots = []
    while not reader.wants_data:
        assert reader.take(1000) == []
        lots.append(len(reader.controls))
        reader.controls.clear()
    assert sum(lots) == 10_001
    assert max(lots) == 64


def test_in_message_tells_a_clean_end_from_a_cut_one() -> None:
    wire = HELLO + frame(Kind.BEGIN, b"\0\0\0\x05abc") + frame(Kind.MORE, b"de") + encode(Probe())
    clean = {0, len(HELLO), len(HELLO) + 11 + 6, len(wire)}
    for end in range(len(wire) + 1):
        reader = Reader()
        read(reader, wire[:end])
        assert reader.in_message == (end not in clean)


def test_fed_too_early() -> None:
    reader = Reader()
    reader.feed(HELLO)
    with pytest.raises(LocalProtocolError):
        reader.feed(HELLO)


@given(data=st.binary(max_size=500), chunk=st.integers(1, 500))
def test_garbage_raises_nothing_else(data: bytes, chunk: int) -> None:
    reader = Reader(unpack=lambda data, size: bytes(size))
    try:
        read(reader, HELLO + data, chunk)
    except RemoteProtocolError:
        return
