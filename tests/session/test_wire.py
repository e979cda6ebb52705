"""Frames of the session, and what ``docs/session-protocol.md`` says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.metadata import SESSION
from kas_libp2p.session import _machine, _wire
from kas_libp2p.session._wire import Ack, Attach, Code, Control, Data, Fin, Open, Parser, Probe, Reset, Welcome
from tests.session.transcript import TRANSCRIPTS

PAGE = (Path(__file__).parents[2] / "docs" / "session-protocol.md").read_text()
ID, INSTANCE = bytes(range(16)), b"instance"
KINDS = "OPEN", "ATTACH", "WELCOME", "DATA", "ACK", "FIN", "RESET", "PROBE"
U64 = st.integers(0, 2**64 - 1)


def encode(frame: Data | Control) -> bytes:
    match frame:
        case (int(offset), bytes(payload)):
            return _wire.pack_header(_wire.DATA, len(payload), offset) + payload
        case Open():
            return _wire.encode_open(frame)
        case Attach():
            return _wire.encode_attach(frame)
        case Welcome():
            return _wire.encode_welcome(frame)
        case Ack(received, limit, lost):
            return _wire.encode_ack(received, limit, lost)
        case Fin(final):
            return _wire.encode_fin(final)
        case Reset(code, turn, reason):
            return _wire.encode_reset(code, reason, turn)
    return _wire.encoded_probe


PRINTABLE = st.characters(codec="utf-8").filter(str.isprintable)
FRAMES = st.one_of(
    st.builds(Open, U64, st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8)),
    st.builds(
        Attach,
        U64,
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=8, max_size=8),
        U64,
        st.integers(0, 2**32 - 1),
        st.booleans(),
    ),
    st.builds(Welcome, U64, st.binary(min_size=8, max_size=8), U64, st.booleans()),
    st.tuples(st.integers(0, 2**63), st.binary(min_size=1, max_size=60)),
    st.builds(Ack, U64, U64, st.booleans()),
    st.builds(Fin, U64),
    st.builds(Reset, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.text(PRINTABLE, max_size=20)),
    st.builds(Probe),
)


def joined(frames: list[Data | Control]) -> list[Data | Control]:
    """With the parts of a DATA frame, or of two that follow each other, as one."""
    out: list[Data | Control] = []
    for frame in frames:
        last = out[-1] if out else None
        if isinstance(frame, tuple) and isinstance(last, tuple) and last[0] + len(last[1]) == frame[0]:
            out[-1] = last[0], last[1] + frame[1]
        else:
            out.append(frame)
    return out


@given(st.lists(FRAMES, max_size=8), st.integers(1, 50))
def test_what_is_written_is_read_however_it_is_cut(frames: list[Data | Control], step: int) -> None:
    whole = b"".join(map(encode, frames))
    parser = Parser()
    got: list[Data | Control] = []
    for at in range(0, len(whole), step):
        buffer = bytearray(whole[at : at + step])
        got += parser.feed(memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # is used for other things
    assert joined(got) == joined(frames)
    assert not parser.inside


@given(st.lists(st.binary(max_size=40), max_size=5))
@settings(max_examples=200)
def test_garbage_is_refused_or_waited_for(pieces: list[bytes]) -> None:
    parser = Parser()
    try:
        for piece in pieces:
            parser.feed(piece)
            assert len(parser._kept) <= _wire.HEADER_SIZE + _wire.MAX_CONTROL
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_the_first_frame_and_what_follows(step: int) -> None:
    attach = Attach(5, ID, INSTANCE, 6, 7, False)
    whole = encode(attach) + encode((0, b"data")) + encode(Probe())
    parser = Parser()
    got: list[Data | Control] = []
    first = None
    for at in range(0, len(whole), step):
        piece = whole[at : at + step]
        if first is None:
            first = parser.first(piece)
            if first is not None:
                got += parser.feed(b"")
        else:
            got += parser.feed(piece)
    assert first == attach
    assert joined(got) == [(0, b"data"), Probe()]


def test_a_stream_that_begins_otherwise() -> None:
    assert Parser().first(b"") is None
    for begin in (b"\x04", b"\x03", b"\x00", b"GET / HTTP/1.1", _wire.pack_header(_wire.OPEN, 23, 0)):
        with pytest.raises(RemoteProtocolError):
            Parser().first(begin)


def test_data_is_handed_on_as_it_comes_and_without_a_copy() -> None:
    parser = Parser()
    header = _wire.pack_header(_wire.DATA, 1000, 50)
    assert parser.feed(header) == []
    assert parser.inside
    piece = bytes(600)
    ((offset, got),) = parser.feed(piece)  # type: ignore[misc]
    assert offset == 50
    assert got is piece
    assert parser.feed(bytes(400)) == [(650, bytes(400))]
    assert not parser.inside


def test_a_reason_is_cut_between_letters() -> None:
    (reset,) = Parser().feed(_wire.encode_reset(1, "ä" * 200))
    assert reset == Reset(1, 0, "ä" * 128)
    (reset,) = Parser().feed(_wire.pack_header(_wire.RESET, 300, 1) + b"\xff" * 300)
    assert isinstance(reset, Reset)
    assert len(reset.reason) == _wire.MAX_REASON
    (reset,) = Parser().feed(_wire.encode_reset(1, "\x1b[31mred"))
    assert reset == Reset(1, 0, "\N{REPLACEMENT CHARACTER}[31mred")


# The page


def test_the_bytes_on_the_page() -> None:
    """A stranger's implementation that is made from the page reads and writes what ours does."""
    rows = re.findall(r"^\| `([0-9a-f ]+)` \| (\w+)", PAGE, re.M)
    assert [name for _, name in rows] == list(KINDS)
    meant: list[Data | Control] = [
        Open(8388608, ID, INSTANCE),
        Attach(70000, ID, INSTANCE, 8454144, 3, True),
        Welcome(1048576, b"another.", 9437184, False),
        (70000, b"kaspa!"),
        Ack(70006, 9437184, False),
        Fin(70006),
        Reset(Code.SUPERSEDED, 7, "another path is attached"),
        Probe(),
    ]
    for (code, _), frame in zip(rows, meant, strict=True):
        assert Parser().feed(bytes.fromhex(code)) == [frame]
        assert encode(frame) == bytes.fromhex(code)


def test_the_numbers_on_the_page() -> None:
    """Every kind, every code and every time is there."""
    assert PAGE.startswith(f"# {SESSION}\n")
    for number, name in enumerate(KINDS, 1):
        assert getattr(_wire, name) == number
        assert re.search(rf"^\| {number} \| {name} \|", PAGE, re.M), name
    for code in Code:
        assert re.search(rf"^\| {code.value} \| {code.name} \|", PAGE, re.M), code
    for sentence in (
        f"told, that is {_machine.INITIAL_LIMIT:_} (256 KiB)".replace("_", " "),
        f"able to keep {_machine.MAX_RUNS} runs",
        f"come on the current path for {_machine.PROBE_AFTER:g} s",
        f"After {_machine.ANSWER_WITHIN:g} s more",
        f"not answered within {_machine.ATTACH_WITHIN:g} s",
        f"was acknowledged for {_machine.DRAIN_WITHIN:g} s",
        f"for {_machine.OWED_FOR:g} s after the last byte",
        f"After {_machine.MOVED_AWAY:g} s the path counts as lost",
        f"up to {_wire.MAX_CONTROL} bytes",
        f"1 to {_wire.MAX_DATA:_} bytes".replace("_", " "),
    ):
        assert sentence in " ".join(PAGE.split()), sentence


@pytest.mark.parametrize("title", TRANSCRIPTS)
def test_the_transcripts_on_the_page(title: str) -> None:
    """Two machines say what the page has them say."""
    section = re.split(rf"^###? {title}\n", PAGE, flags=re.M)[1]
    (block, *_) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    lines = [re.split(r"  +", line)[0] for line in block.splitlines()]
    assert TRANSCRIPTS[title]().lines == lines
