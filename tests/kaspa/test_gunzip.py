"""Unpacking by steps: what comes out, what is refused, and what a bomb costs."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.kaspa._gunzip import KEPT, STEP, Passer, Unpacker
from kas_libp2p.kaspa.channel import PackedPiece, Piece

LIMIT = 64 << 20
EMPTY_BLOCK = b"\0\0\0\xff\xff"
"""Of deflate: stored, no bytes, not the last."""


def unpack(packed: bytes, room: int = 1 << 20, limit: int = LIMIT) -> list[Piece]:
    unpacker = Unpacker(packed, limit)
    pieces: list[Piece] = []
    while not pieces or pieces[-1].remaining:
        piece = unpacker.step(room)
        assert 0 <= unpacker.cost <= 4 * STEP
        assert piece is not None or unpacker.cost > 0
        if piece is not None:
            assert 0 < len(piece.data) <= min(room, STEP) or piece.size == 0
            pieces.append(piece)
    return pieces


def let_pass(packed: bytes, part: int = 1 << 20, limit: int = LIMIT) -> list[Piece]:
    passer = Passer(len(packed), limit)
    pieces: list[Piece] = []
    for start in range(0, len(packed), part):
        passer.feed(memoryview(packed)[start : start + part])
        while (piece := passer.step(1 << 20)) is None:
            assert 0 < passer.cost <= 4 * STEP
        pieces.append(piece)
    return pieces


def message_of(pieces: list[Piece]) -> bytes:
    message = b"".join(piece.data for piece in pieces)
    at = 0
    for data, remaining, first, size in pieces:
        assert first == (at == 0)
        at += len(data)
        assert (at + remaining, size) == (len(message), len(message))
    return message


@given(
    parts=st.lists(st.binary(max_size=300) | st.integers(0, 400_000).map(bytes), max_size=6),
    room=st.integers(1, 300) | st.integers(1000, 300_000),
    level=st.integers(0, 9),
)
def test_what_went_in_comes_out_in_pieces_that_say_the_size(parts: list[bytes], room: int, level: int) -> None:
    message = b"".join(parts)
    assert message_of(unpack(gzip.compress(message, level), max(room, len(message) // 1000 + 1))) == message


@given(
    parts=st.lists(st.binary(max_size=300) | st.integers(0, 400_000).map(bytes), max_size=6),
    cut=st.integers(1, 300) | st.integers(1000, 300_000),
    level=st.integers(0, 9),
)
def test_what_passes_is_not_changed(parts: list[bytes], cut: int, level: int) -> None:
    packed = gzip.compress(b"".join(parts), level)
    pieces = let_pass(packed, max(cut, len(packed) // 1000 + 1))
    assert message_of(pieces) == packed
    assert {type(each) for each in pieces} == {PackedPiece}


@pytest.mark.parametrize("size", [0, 1, KEPT - 1, KEPT, KEPT + 1, KEPT + STEP, 3 * KEPT + 7])
@pytest.mark.parametrize("dense", [True, False])
def test_below_and_above_what_is_kept(size: int, dense: bool) -> None:
    message = bytes(size) if dense else random.Random(size).randbytes(size)
    assert message_of(unpack(gzip.compress(message, 1))) == message


@pytest.mark.parametrize("size", [99, 100, 101, 5000])
def test_the_limit_holds_to_the_byte(size: int) -> None:
    packed = gzip.compress(bytes(size))
    if size <= 100:
        assert message_of(let_pass(packed, limit=100)) == packed
        assert len(message_of(unpack(packed, limit=100))) == size
    else:
        for through in (unpack, let_pass):
            with pytest.raises(RemoteProtocolError, match="more than 100 bytes"):
                through(packed, limit=100)


GOOD = gzip.compress(b"hello" * 100)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        pytest.param(b"junk", "damaged", id="junk"),
        pytest.param(b"\x1f\x8b", "cut short", id="within its head"),
        pytest.param(GOOD[:-9], "cut short", id="within its data"),
        pytest.param(GOOD[:-1], "cut short", id="within its checksum"),
        pytest.param(GOOD[:-5] + b"xxxxx", "damaged", id="wrong checksum"),
        pytest.param(GOOD + b"x", "follows", id="a byte more"),
        pytest.param(GOOD + GOOD, "follows", id="a second member"),
        pytest.param(zlib.compress(b"hello"), "damaged", id="zlib, not gzip"),
    ],
)
@pytest.mark.parametrize("part", [1, 7, 1 << 20])
def test_what_is_no_gzip_is_the_peers_fault(packed: bytes, words: str, part: int) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        unpack(packed)
    with pytest.raises(RemoteProtocolError, match=words):
        let_pass(packed, part)


def test_something_that_follows_far_behind_is_found() -> None:
    with pytest.raises(RemoteProtocolError, match="follows"):
        unpack(GOOD + bytes(10 * STEP))
    with pytest.raises(RemoteProtocolError, match="follows"):
        let_pass(GOOD + bytes(10 * STEP), STEP)


def test_a_bomb_costs_time_by_steps_and_no_memory() -> None:
    size = 40 << 20
    packed = gzip.compress(bytes(size), 9)
    assert len(packed) < size // 1000
    tracemalloc.start()
    try:
        unpacker, given, steps = Unpacker(packed, LIMIT), 0, 0
        while given < size:
            piece = unpacker.step(256 * 1024)
            steps += 1
            assert unpacker.cost <= 4 * STEP
            if piece is not None:
                assert piece.size == size
                given += len(piece.data)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert steps >= 2 * size // STEP - KEPT // STEP - 1
    assert most < KEPT + 16 * STEP


def test_a_bomb_above_the_limit_ends_when_it_is_seen() -> None:
    unpacker = Unpacker(gzip.compress(bytes(8 << 20)), 1 << 20)
    for _ in range((1 << 20) // STEP):
        assert unpacker.step(1000) is None
    with pytest.raises(RemoteProtocolError):
        unpacker.step(1000)


def test_input_that_unpacks_to_nothing_goes_by_steps_too() -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    head, tail = GOOD[:10], GOOD[-8:]
    body = packer.compress(b"hello" * 100) + packer.flush()
    packed = head + EMPTY_BLOCK * 100_000 + body + tail
    unpacker = Unpacker(packed, LIMIT)
    for _ in range(len(packed) // STEP):
        assert unpacker.step(1000) is None
        assert 0 < unpacker.cost <= STEP
    piece = unpacker.step(1000)
    assert piece is not None
    assert piece.whole
    assert piece.data == b"hello" * 100


def test_input_that_unpacks_to_nothing_goes_by_steps_the_second_time_too() -> None:
    message = bytes(2 * KEPT)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(message) + packer.flush(zlib.Z_FULL_FLUSH) + EMPTY_BLOCK * 100_000
    packed += packer.compress(b"end") + packer.flush()
    message += b"end"
    framed = gzip.compress(b"")[:10] + packed + zlib.crc32(message).to_bytes(4, "little")
    assert message_of(unpack(framed + len(message).to_bytes(4, "little"))) == message
