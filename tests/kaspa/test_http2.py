"""One HTTP/2 connection with one stream: against the library ``h2`` in both roles, and rule by rule."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded
from h2.settings import SettingCodes
from hypothesis import given, settings
from hypothesis import strategies as st

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.kaspa._http2 import (
    COLLECTED,
    CONTROL_BURST,
    CONTROL_RATE,
    KIB,
    MAX_CONTROL_FRAME,
    MAX_UNSENT_CONTROL,
    MAX_WINDOW,
    MIN_WINDOW,
    PINNED,
    SMALL,
    Broken,
    Ended,
    GoneAway,
    Happening,
    HeadersCame,
    Http2,
    Reset,
    TrailersCame,
)

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 7, 8, 9
UNKNOWN = 0x7F
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/x")]
RESPONSE = [(":status", "200")]
TRAILERS = [("grpc-status", "0")]
EVERYTHING = 1 << 30


def frame(kind: int, flags: int = 0, stream: int = 1, payload: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def padded(payload: bytes, padding: int, flags: int = 0) -> bytes:
    return frame(DATA, PADDED | flags, 1, bytes([padding]) + payload + bytes(padding))


def update(increment: int, stream: int = 1) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, increment.to_bytes(4, "big"))


def setting(code: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, struct.pack(">HI", code, value))


def goaway(last: int, code: int = 0, detail: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">II", last, code) + detail)


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream, payload of each."""
    found = []
    while data:
        word, flags, stream = struct.unpack_from(">IBI", data)
        found.append((word & 0xFF, flags, stream, data[9 : 9 + (word >> 8)]))
        data = data[9 + (word >> 8) :]
    return found


class Talk:
    """Ours, with the stream open in both directions, and a peer that says single frames."""

    def __init__(
        self, *, client: bool = False, window: int = 1 << 20, connection_window: int = 0, max_frame: int = 1 << 20
    ) -> None:
        self.now = 0.0
        self.ours = Http2(
            client=client,
            stream_window=window,
            connection_window=connection_window,
            max_frame=max_frame,
            max_header_list=16 * KIB,
            now=0,
        )
        self.h2 = H2Connection(H2Configuration(client_side=not client, header_encoding="utf-8"))
        self.h2.initiate_connection()
        if client:
            self.ours.open(REQUEST)
            self.h2.receive_data(self.ours.data_to_send(EVERYTHING))
            self.h2.send_headers(1, RESPONSE)
        else:
            self.h2.send_headers(1, REQUEST)
        (came,) = self.say(self.h2.data_to_send())
        assert isinstance(came, HeadersCame)
        if not client:
            self.ours.accept(RESPONSE)
        self.h2.receive_data(self.ours.data_to_send(EVERYTHING))

    def say(self, *data: bytes) -> list[Happening]:
        return self.ours.receive(b"".join(data), self.now)

    def heard(self) -> list[tuple[int, int, int, bytes]]:
        return frames(self.ours.data_to_send(EVERYTHING).removeprefix(PREFACE))

    def take(self) -> bytes:
        data = b"".join(self.ours.inbox)
        self.ours.inbox.clear()
        self.ours.consumed(len(data))
        return data

    def updates(self) -> tuple[int, int]:
        """Bytes that the peer was given back: for the stream, and for the connection."""
        given = {1: 0, 0: 0}
        for kind, _, stream, payload in self.heard():
            assert kind == WINDOW_UPDATE
            given[stream] += int.from_bytes(payload, "big")
        return given[1], given[0]

    def blamed(self, *data: bytes) -> tuple[str, ErrorCodes]:
        """Say what breaks a rule: what we raise, and the code that the peer is told."""
        *_, last = self.say(*data)
        assert isinstance(last, Broken)
        assert isinstance(last.error, RemoteProtocolError)
        told = [payload for kind, _, _, payload in self.heard() if kind == GOAWAY]
        assert len(told) == 1
        assert self.say(frame(PING, 0, 0, bytes(8)), b"anything") == []
        assert self.heard() == []
        return str(last.error), ErrorCodes(struct.unpack_from(">II", told[0])[1])


# Against h2


class Library:
    """The other end, by the library: it raises if we overstep its windows, and stops if we do not give ours back."""

    def __init__(self, *, client: bool, window: int, payload: bytes, padding: int | None) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=client))
        self.h2.initiate_connection()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.heard = bytearray()
        self.ended = False
        self._payload: bytes | None = payload
        self._padding = padding
        self._open = client
        if client:
            self.h2.send_headers(1, REQUEST)

    def receive(self, data: bytes, another_window: int | None) -> None:
        unread = 0
        for event in self.h2.receive_data(data):
            if isinstance(event, RequestReceived):
                self.h2.send_headers(1, RESPONSE)
                self._open = True
            elif isinstance(event, DataReceived):
                self.heard += event.data
                unread += event.flow_controlled_length
            self.ended |= isinstance(event, StreamEnded)
        if another_window is not None and not self.ended:
            self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: another_window})
        if unread and not self.ended:
            self.h2.increment_flow_control_window(unread)
            self.h2.increment_flow_control_window(unread, 1)

    def data_to_send(self) -> bytes:
        if self._open and self._payload is not None:
            room = min(self.h2.local_flow_control_window(1), self.h2.max_outbound_frame_size)
            room -= 0 if self._padding is None else self._padding + 1
            if not self._payload:
                self._payload = None
                self.h2.end_stream(1)
            elif room > 0:
                self.h2.send_data(1, self._payload[:room], pad_length=self._padding)
                self._payload = self._payload[room:]
        return self.h2.data_to_send()


def chunks(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


a_window = st.integers(0, 300) | st.integers(0, 200_000)
pages = st.integers(0, 500)


@settings(max_examples=60)
@given(
    client=st.booleans(),
    our_window=a_window,
    their_windows=st.lists(a_window, min_size=1, max_size=10),
    to_us=pages,
    to_them=pages,
    padding=st.none() | st.integers(0, 255),
    write=st.integers(1000, 200_000),
    limit=st.integers(1000, 200_000),
    chunk=st.integers(5, 100) | st.integers(100, 70_000),
)
def test_both_directions_whole_however_cut_and_whatever_windows(
    client: bool,
    our_window: int,
    their_windows: list[int],
    to_us: int,
    to_them: int,
    padding: int | None,
    write: int,
    limit: int,
    chunk: int,
) -> None:
    page = bytes(range(256))
    ours = Http2(
        client=client, stream_window=our_window, connection_window=0, max_frame=0, max_header_list=16 * KIB, now=0
    )
    theirs = Library(client=not client, window=their_windows[0], payload=page * to_us, padding=padding)
    if client:
        ours.open(REQUEST)
    for part in chunks(page * to_them, write):
        ours.send(part)
    ours.end(None if client else TRAILERS)

    turns = iter([*their_windows, 70_000])  # a window of 0 would hold for ever
    told, happenings = bytearray(), list[Happening]()
    while not (theirs.ended and Ended() in happenings):
        sendable = ours.sendable
        sent = ours.data_to_send(limit)
        assert bool(sent) == sendable
        for part in chunks(sent, chunk):
            theirs.receive(part, None)
        theirs.receive(b"", next(turns, None))
        answer = theirs.data_to_send()
        assert sent or answer, "both wait for each other"
        for part in chunks(answer, chunk):
            came = ours.receive(part, 0)
            assert not any(isinstance(each, Broken) for each in came)
            if not client and any(isinstance(each, HeadersCame) for each in came):
                ours.accept(RESPONSE)
            happenings += came
        took = b"".join(ours.inbox)
        ours.inbox.clear()
        ours.consumed(len(took))
        told += took
    assert theirs.heard == page * to_them
    assert told == page * to_us
    assert [type(each) for each in happenings] == [HeadersCame, Ended]
    assert (ours.queued, ours.waiting, ours.finished) == (0, 0, True)


@settings(max_examples=300)
@given(junk=st.binary(max_size=300), client=st.booleans(), chunk=st.integers(1, 50))
def test_junk_ends_in_broken_or_in_nothing(junk: bytes, client: bool, chunk: int) -> None:
    talk = Talk(client=client)
    for start in range(0, len(junk), chunk):
        talk.say(junk[start : start + chunk])
    talk.heard()


frame_of_any_kind = st.builds(frame, st.integers(0, 11), st.integers(0, 255), st.integers(0, 3), st.binary(max_size=40))


@settings(max_examples=300)
@given(said=st.lists(frame_of_any_kind, max_size=30), client=st.booleans(), chunk=st.integers(1, 200))
def test_any_frames_end_in_broken_or_in_nothing(said: list[bytes], client: bool, chunk: int) -> None:
    talk, data = Talk(client=client), b"".join(said)
    talk.ours.send(bytes(1000))
    broken = False
    for start in range(0, len(data), chunk):
        happenings = talk.say(data[start : start + chunk])
        assert not (broken and happenings)
        broken = broken or any(isinstance(each, Broken) for each in happenings)
    talk.heard()


# The beginning


@pytest.mark.parametrize("first", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, ACK, 0), frame(HEADERS), update(1, 0)])
@pytest.mark.parametrize("client", [True, False])
def test_the_first_frame_is_settings(first: bytes, client: bool) -> None:
    ours = Http2(client=client, stream_window=1, connection_window=1, max_frame=1, max_header_list=16 * KIB, now=0)
    (happening,) = ours.receive(b"" if client else PREFACE, 0) + ours.receive(first, 0)
    assert isinstance(happening, Broken)
    assert "first frame" in str(happening.error)


def test_a_wrong_preface_is_told_at_its_first_wrong_byte() -> None:
    ours = Http2(client=False, stream_window=1, connection_window=1, max_frame=1, max_header_list=1, now=0)
    assert ours.receive(b"P", 0) == []
    (happening,) = ours.receive(b"U", 0)
    assert isinstance(happening, Broken)


def test_a_peer_may_send_what_it_may_before_it_knows_our_settings() -> None:
    talk = Talk(window=100)
    assert talk.say(frame(DATA, payload=bytes(MIN_WINDOW))) == []
    assert len(talk.take()) == MIN_WINDOW


# Receiving data


@pytest.mark.parametrize("client", [True, False])
def test_payload_comes_as_it_arrives_not_frame_by_frame(client: bool) -> None:
    talk = Talk(client=client)
    data = frame(DATA, payload=bytes(range(256)) * 100)
    talk.say(data[:5000])
    assert talk.take() == data[9:5000]
    talk.say(data[5000:])
    assert talk.take() == data[5000:]


def test_a_frame_counts_with_its_padding_and_the_window_is_given_back_whole() -> None:
    talk = Talk(window=MIN_WINDOW)
    given_stream = given_connection = sent = 0
    for _ in range(2000):
        assert talk.say(padded(b"x", 255)) == []
        sent += 257
        assert talk.take() == b"x"
        stream, connection = talk.updates()
        given_stream += stream
        given_connection += connection
        assert sent - MIN_WINDOW // 4 < given_stream == given_connection <= sent
    assert sent > 7 * MIN_WINDOW


@pytest.mark.parametrize("connection_window", [0, 1 << 20])
@pytest.mark.parametrize("pad", [False, True])
def test_the_window_is_a_limit_to_the_byte(pad: bool, connection_window: int) -> None:
    def fill(size: int) -> bytes:
        return padded(bytes(size - 101), 100) if pad else frame(DATA, payload=bytes(size))

    talk = Talk(window=MIN_WINDOW, connection_window=connection_window, max_frame=MIN_WINDOW)
    assert talk.say(fill(40_000), fill(MIN_WINDOW - 40_000)) == []
    words, code = talk.blamed(padded(b"", 0) if pad else frame(DATA, payload=b"x"))
    assert "windows" in words
    assert code == ErrorCodes.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("connection_window", [0, 1 << 20])
def test_what_was_not_consumed_is_not_given_back(connection_window: int) -> None:
    talk = Talk(window=MIN_WINDOW, connection_window=connection_window)
    talk.say(*(frame(DATA, payload=bytes(MIN_WINDOW // 16)) for _ in range(16)))
    assert talk.updates() == (0, 0)
    assert talk.ours.waiting == MIN_WINDOW // 16 * 16
    talk.ours.consumed(MIN_WINDOW // 4)
    assert talk.updates() == (MIN_WINDOW // 4, MIN_WINDOW // 4)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(padded(b"", 0)[:9] + b"\1", ErrorCodes.PROTOCOL_ERROR, id="longer than its frame"),
        pytest.param(frame(DATA, PADDED), ErrorCodes.FRAME_SIZE_ERROR, id="without room for its length"),
    ],
)
def test_padding_has_to_fit(data: bytes, code: ErrorCodes) -> None:
    assert Talk().blamed(data)[1] == code


@pytest.mark.parametrize("cut", [1, 5, 9, 10, 11, 300])
def test_the_end_comes_after_the_payload_and_the_padding(cut: int) -> None:
    talk = Talk()
    data = padded(b"last", 200, END_STREAM)
    assert talk.say(data[:cut]) == ([] if cut < len(data) else [Ended()])
    assert talk.say(data[cut:]) == ([Ended()] if cut < len(data) else [])
    assert talk.take() == b"last"


@pytest.mark.parametrize(
    "end",
    [
        frame(DATA, END_STREAM, payload=b"x"),
        frame(DATA, END_STREAM),
        padded(b"", 0, END_STREAM),
        padded(b"", 9, END_STREAM),
        padded(b"x", 0, END_STREAM),
    ],
)
@pytest.mark.parametrize("client", [True, False])
def test_however_it_ends_it_ends_once(end: bytes, client: bool) -> None:
    talk = Talk(client=client)
    assert talk.say(end) == [Ended()]
    # Our side goes on.
    talk.ours.send(b"more")
    assert talk.heard() == [(DATA, 0, 1, b"more")]
    assert talk.say(frame(PING, 0, 0, bytes(8))) == []
    assert [kind for kind, *_ in talk.heard()] == [PING]


def test_trailers_end_the_peers_side() -> None:
    talk = Talk(client=True)
    talk.h2.send_headers(1, TRAILERS, end_stream=True)
    assert talk.say(talk.h2.data_to_send()) == [TrailersCame({"grpc-status": "0"}), Ended()]


@pytest.mark.parametrize("data", [frame(DATA, payload=b"late"), frame(DATA, END_STREAM), frame(HEADERS, END_HEADERS)])
def test_data_after_the_end_is_an_offence(data: bytes) -> None:
    talk = Talk()
    assert talk.say(frame(DATA, END_STREAM)) == [Ended()]
    assert talk.blamed(data)[1] == ErrorCodes.STREAM_CLOSED
    assert talk.take() == b""


@pytest.mark.parametrize("stream", [0, 2, 3])
def test_data_on_another_stream_is_an_offence(stream: int) -> None:
    talk = Talk()
    talk.blamed(frame(DATA, 0, stream, b"x"))
    assert talk.take() == b""


def test_what_was_under_way_when_we_reset_is_passed_over() -> None:
    talk = Talk()
    talk.say(frame(DATA, payload=bytes(3000))[:1000])
    talk.ours.reset(ErrorCodes.CANCEL)
    assert (RST_STREAM, 0, 1, b"\0\0\0\x08") in talk.heard()
    talk.take()
    assert talk.say(bytes(2009), frame(DATA, payload=b"late"), frame(DATA, END_STREAM)) == []
    assert talk.take() == b""
    assert talk.say(frame(PING, 0, 0, bytes(8))) == []
    assert PING in [kind for kind, *_ in talk.heard()]


@pytest.mark.parametrize("kind", [DATA, UNKNOWN])
def test_frames_above_their_limit_are_refused_before_they_arrive(kind: int) -> None:
    talk = Talk(max_frame=20_000)
    limit = 20_000 if kind == DATA else MAX_CONTROL_FRAME
    assert talk.say(frame(kind, payload=bytes(limit))) == []
    assert talk.blamed(struct.pack(">IBI", (limit + 1) << 8 | kind, 0, 1))[1] == ErrorCodes.FRAME_SIZE_ERROR


# Headers


def split_headers(stream: int = 3) -> tuple[bytes, bytes, bytes]:
    """A request in three frames."""
    (block,) = [payload for kind, _, _, payload in frames(request_of(stream)) if kind == HEADERS]
    return (
        frame(HEADERS, 0, stream, block[:5]),
        frame(CONTINUATION, 0, stream, block[5:9]),
        frame(CONTINUATION, END_HEADERS, stream, block[9:]),
    )


def request_of(stream: int) -> bytes:
    h2 = H2Connection(H2Configuration(client_side=True))
    h2.initiate_connection()
    h2.send_headers(stream, REQUEST)
    return h2.data_to_send().removeprefix(PREFACE)


def fresh_server() -> Http2:
    server = Http2(client=False, stream_window=1, connection_window=1, max_frame=1, max_header_list=16 * KIB, now=0)
    assert server.receive(PREFACE + frame(SETTINGS, 0, 0), 0) == []
    return server


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_headers_may_come_in_several_frames(chunk: int) -> None:
    server, data = fresh_server(), b"".join(split_headers())
    happenings = [each for at in range(0, len(data), chunk) for each in server.receive(data[at : at + chunk], 0)]
    assert happenings == [HeadersCame(dict(REQUEST))]
    assert server.stream_id == 3


@pytest.mark.parametrize(
    "between",
    [
        frame(DATA, 0, 3, b"x"),
        frame(PING, 0, 0, bytes(8)),
        update(1, 0),
        update(1, 3),
        goaway(0),
        setting(4, 1),
        frame(UNKNOWN, 0, 0),
        frame(CONTINUATION, END_HEADERS, 5),
        frame(HEADERS, END_HEADERS, 3),
    ],
)
def test_nothing_comes_between_the_frames_of_headers(between: bytes) -> None:
    first, second, _ = split_headers()
    server = fresh_server()
    (happening,) = server.receive(first + second + between, 0)
    assert isinstance(happening, Broken)


def test_trailers_in_parts_have_no_data_between_them() -> None:
    talk = Talk()
    words, _ = talk.blamed(frame(HEADERS, END_STREAM, 1, b""), frame(DATA, 0, 1, b"x"))
    assert "header block" in words
    assert talk.take() == b""


def test_a_continuation_of_nothing_is_an_offence() -> None:
    Talk().blamed(frame(CONTINUATION, END_HEADERS))


def test_a_second_stream_is_refused() -> None:
    talk = Talk()
    talk.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 2
    talk.h2.remote_settings.acknowledge()
    talk.h2.send_headers(3, REQUEST)
    talk.blamed(talk.h2.data_to_send())


def test_a_second_stream_after_the_first_is_refused() -> None:
    talk = Talk()
    talk.ours.end(TRAILERS)
    talk.h2.end_stream(1)
    assert talk.say(talk.h2.data_to_send()) == [Ended()]
    talk.h2.receive_data(talk.ours.data_to_send(EVERYTHING))
    talk.h2.send_headers(3, REQUEST)
    assert talk.blamed(talk.h2.data_to_send())[1] == ErrorCodes.REFUSED_STREAM


def test_headers_that_unpack_to_too_much_are_refused_before_our_settings_are_known() -> None:
    server = fresh_server()
    h2 = H2Connection(H2Configuration(client_side=True))
    h2.initiate_connection()
    h2.send_headers(1, [*REQUEST, ("x", "y" * 2000), *[("x", "y" * 2000)] * 20])  # repeated ones are packed to a byte
    data = h2.data_to_send().removeprefix(PREFACE)
    assert len(data) < 4000
    *_, happening = server.receive(data, 0)
    assert isinstance(happening, Broken)


@pytest.mark.parametrize("after", [frame(RST_STREAM, 0, 3, bytes(4)), frame(DATA, 0, 0, b"x")])
def test_a_request_that_is_over_when_it_is_answered(after: bytes) -> None:
    server = fresh_server()
    came, over = server.receive(b"".join(split_headers()) + after, 0)
    assert isinstance(came, HeadersCame)
    assert isinstance(over, Reset | Broken)
    server.accept(RESPONSE)
    server.send(b"lost")
    server.end(TRAILERS)
    assert server.queued == 0
    assert server.finished
    assert not [kind for kind, *_ in frames(server.data_to_send(EVERYTHING)) if kind in (DATA, HEADERS)]


# Sending


def sent_data(talk: Talk, limit: int = EVERYTHING) -> list[int]:
    return [len(payload) for kind, _, _, payload in frames(talk.ours.data_to_send(limit)) if kind == DATA]


@pytest.mark.parametrize("client", [True, False])
def test_the_smaller_of_the_two_windows_is_used_to_the_byte(client: bool) -> None:
    talk = Talk(client=client)
    talk.ours.send(bytes(200_000))
    assert sum(sent_data(talk)) == 65535
    assert not talk.ours.sendable
    assert talk.say(update(100)) == []
    assert sent_data(talk) == []
    assert talk.say(update(70, 0)) == []
    assert talk.ours.sendable
    assert sent_data(talk) == [70]
    assert talk.say(update(1000, 0)) == []
    assert sent_data(talk) == [30]
    assert talk.ours.queued == 200_000 - 65535 - 100


def test_another_initial_window_moves_the_window_of_the_stream_below_zero_too() -> None:
    talk = Talk()
    talk.ours.send(bytes(200_000))
    assert sum(sent_data(talk, 40_000)) == 40_000
    talk.say(update(1 << 20, 0), setting(4, 1000))  # 40,000 were used of 1000
    assert sent_data(talk) == []
    talk.say(update(39_000))
    assert sent_data(talk) == []
    talk.say(update(1))
    assert sent_data(talk) == [1]
    talk.say(setting(4, 1500))
    assert sent_data(talk) == [500]


def test_frames_are_as_large_as_the_peer_takes_them() -> None:
    talk = Talk()
    talk.ours.send(bytes(40_000))
    talk.ours.send(bytes(10_000))
    assert sent_data(talk) == [16384, 16384, 16384, 848]
    talk.say(update(1 << 20), update(1 << 20, 0), setting(5, 30_000))
    talk.heard()
    talk.ours.send(bytes(40_000))
    assert sent_data(talk) == [30_000, 10_000]


def test_a_limit_holds_for_payload() -> None:
    talk = Talk()
    talk.ours.send(bytes(40_000))
    assert sent_data(talk, 10_000) == [10_000]
    assert sent_data(talk, 20_000) == [16384, 3616]
    assert sent_data(talk, 20_000) == [10_000]


@pytest.mark.parametrize("client", [True, False])
def test_our_end_comes_after_all_payload_and_once(client: bool) -> None:
    talk = Talk(client=client)
    talk.ours.send(bytes(70_000))
    talk.ours.end(None if client else TRAILERS)
    assert all(flags == 0 for kind, flags, *_ in talk.heard() if kind == DATA)
    assert not talk.ours.finished
    talk.say(update(70_000), update(70_000, 0))
    kinds = [(kind, flags & END_STREAM) for kind, flags, *_ in talk.heard()]
    assert kinds == [(DATA, 0), (DATA if client else HEADERS, END_STREAM)]
    assert talk.ours.finished
    assert not talk.ours.sendable
    assert talk.heard() == []


@pytest.mark.parametrize("stream", [0, 1])
def test_a_window_update_of_zero_is_an_offence(stream: int) -> None:
    assert Talk().blamed(update(0, stream))[1] == ErrorCodes.PROTOCOL_ERROR


@pytest.mark.parametrize("stream", [0, 1])
def test_a_window_holds_2_gib_and_no_byte_more(stream: int) -> None:
    talk = Talk()
    assert talk.say(update(MAX_WINDOW - 65535, stream)) == []
    assert talk.blamed(update(1, stream))[1] == ErrorCodes.FLOW_CONTROL_ERROR


def test_another_initial_window_may_overflow_the_window() -> None:
    talk = Talk()
    talk.say(update(MAX_WINDOW - 65535))
    assert talk.blamed(setting(4, 65536))[1] == ErrorCodes.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("bad", [frame(WINDOW_UPDATE, 0, 1, bytes(3)), frame(WINDOW_UPDATE, 0, 0, bytes(5))])
def test_a_window_update_has_four_bytes(bad: bytes) -> None:
    Talk().blamed(bad)


@pytest.mark.parametrize("bad", [frame(SETTINGS, 0, 0, bytes(5)), frame(SETTINGS, 0, 1), setting(5, 100)])
def test_bad_settings_are_an_offence(bad: bytes) -> None:
    Talk().blamed(bad)


# Ends of the stream and of the connection


def test_a_reset_drops_what_is_queued_and_leaves_what_came() -> None:
    talk = Talk()
    talk.ours.send(bytes(100_000))
    assert talk.say(frame(DATA, payload=b"before"), frame(RST_STREAM, 0, 1, b"\0\0\0\x08")) == [Reset(8)]
    assert talk.ours.queued == 0
    talk.ours.send(b"lost")
    assert talk.ours.queued == 0
    assert talk.ours.finished
    assert talk.take() == b"before"
    assert sent_data(talk) == []


@pytest.mark.parametrize("client", [True, False])
def test_goaway_lets_the_stream_be_finished(client: bool) -> None:
    talk = Talk(client=client)
    talk.ours.send(b"under way")
    assert talk.say(goaway(MAX_WINDOW), goaway(1, 0, b"bye")) == [GoneAway(0, MAX_WINDOW, ""), GoneAway(0, 1, "bye")]
    assert talk.heard() == [(DATA, 0, 1, b"under way")]
    talk.say(frame(PING, 0, 0, b"12345678"))
    assert talk.heard() == [(PING, ACK, 0, b"12345678")]
    talk.ours.ping()
    assert talk.say(frame(PING, ACK, 0, talk.heard()[0][3])) == []
    talk.h2.send_headers(1, TRAILERS, end_stream=True)
    assert talk.say(frame(DATA, payload=b"the rest"), talk.h2.data_to_send()) == [
        TrailersCame({"grpc-status": "0"}),
        Ended(),
    ]
    assert talk.take() == b"the rest"
    talk.ours.end(None if client else TRAILERS)
    assert talk.heard()[0][1] & END_STREAM


@pytest.mark.parametrize("bad", [frame(GOAWAY, 0, 0, bytes(7)), frame(GOAWAY, 0, 1, bytes(8))])
def test_a_bad_goaway_is_an_offence(bad: bytes) -> None:
    Talk().blamed(bad)


def test_of_a_long_farewell_the_beginning_is_kept() -> None:
    (gone,) = Talk().say(goaway(1, 11, b"\xff" + bytes(5000)))
    assert isinstance(gone, GoneAway)
    assert gone.code == 11
    assert len(gone.detail) == 256


def test_after_our_goaway_nothing_is_sent_or_understood() -> None:
    talk = Talk()
    talk.ours.send(b"x")
    talk.ours.close()
    assert [kind for kind, *_ in talk.heard()] == [GOAWAY]
    assert talk.say(frame(DATA, payload=bytes(1 << 20)), b"junk") == []
    talk.ours.close()
    talk.ours.reset(ErrorCodes.CANCEL)
    talk.ours.ping()
    talk.ours.send(b"y")
    talk.ours.end(TRAILERS)
    assert talk.heard() == []
    assert talk.take() == b""


# Floods


CHEAP: dict[str, Callable[[], bytes]] = {
    "pings": lambda: frame(PING, 0, 0, bytes(8)),
    "answers to no ping": lambda: frame(PING, ACK, 0, bytes(8)),
    "settings": lambda: frame(SETTINGS, 0, 0),
    "updates of the connection": lambda: update(1, 0),
    "updates of the stream": lambda: update(1),
    "empty data": lambda: frame(DATA),
    "padding": lambda: padded(b"", 0),
    "more padding": lambda: padded(b"", 100),
    "priorities": lambda: frame(PRIORITY, 0, 1, bytes(4) + b"\1"),
    "unknown frames": lambda: frame(UNKNOWN, 0, 0),
    "farewells": lambda: goaway(1),
}


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("client", [True, False])
def test_a_flood_is_cut(name: str, client: bool) -> None:
    talk, one, count = Talk(client=client), CHEAP[name](), 0
    while not any(isinstance(each, Broken) for each in talk.say(one)):
        talk.heard()  # the peer reads, so it is not that which ends it
        count += 1
        assert count < CONTROL_BURST * 1.2
    assert count > CONTROL_BURST * 0.9
    assert struct.unpack_from(">II", talk.heard()[-1][3])[1] == ErrorCodes.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("name", CHEAP)
def test_what_costs_us_no_more_than_its_rate_goes_on(name: str) -> None:
    talk, one = Talk(), CHEAP[name]()
    for _ in range(3 * CONTROL_BURST):
        talk.now += 1 / CONTROL_RATE
        assert not any(isinstance(each, Broken) for each in talk.say(one))
        talk.heard()


def test_late_data_is_a_flood_too() -> None:
    talk = Talk()
    talk.ours.reset(ErrorCodes.CANCEL)
    words, code = talk.blamed(*[frame(DATA, payload=b"x")] * (CONTROL_BURST + 100))
    assert "flood" in words
    assert code == ErrorCodes.ENHANCE_YOUR_CALM


def test_headers_without_end_are_cut_at_what_headers_may_have() -> None:
    server = fresh_server()
    assert server.receive(frame(HEADERS, 0, 1, bytes(8000)), 0) == []
    (happening,) = server.receive(frame(CONTINUATION, 0, 1, bytes(9000)), 0)
    assert isinstance(happening, Broken)
    assert "headers of more than" in str(happening.error)


@pytest.mark.parametrize("receiving", [True, False])
def test_data_pays_for_updates(receiving: bool) -> None:
    talk = Talk()
    talk.say(update(1 << 30, 0), update(1 << 30))
    for _ in range(10 * CONTROL_BURST):
        if receiving:
            talk.say(frame(DATA, payload=bytes(KIB)))
            talk.take()
        else:
            talk.ours.send(bytes(KIB))
        talk.heard()
        assert talk.say(update(1)) == []


def test_who_makes_us_answer_and_does_not_read_is_given_up() -> None:
    talk = Talk()
    for _ in range(MAX_UNSENT_CONTROL // 17):
        talk.now += 1 / CONTROL_RATE
        assert talk.say(frame(PING, 0, 0, bytes(8))) == []
    words, code = talk.blamed(frame(PING, 0, 0, bytes(8)))
    assert "does not read" in words
    assert code == ErrorCodes.ENHANCE_YOUR_CALM


# Memory


def test_a_large_part_of_a_read_is_a_view_of_it() -> None:
    talk = Talk()
    data = frame(DATA, payload=bytes(100_000)) + frame(UNKNOWN, payload=bytes(10_000))
    talk.say(data)
    (chunk,) = talk.ours.inbox
    assert isinstance(chunk, memoryview)
    assert chunk.obj is data


def test_a_small_part_of_a_read_does_not_keep_the_read_alive() -> None:
    talk = Talk()
    rest = b"".join(frame(UNKNOWN, payload=bytes(MAX_CONTROL_FRAME)) for _ in range(15))
    talk.say(frame(DATA, payload=bytes(5000)))
    talk.say(rest + frame(DATA, payload=bytes(SMALL)) + frame(DATA, payload=b"tiny"))
    first, second, third = talk.ours.inbox
    assert isinstance(first, memoryview)  # of another read
    assert not isinstance(second, memoryview)
    assert not isinstance(third, memoryview)
    assert len(rest) > PINNED * SMALL
    assert talk.ours.waiting == 5000 + SMALL + 4


def test_tiny_payloads_are_collected() -> None:
    talk = Talk()
    talk.say(*[frame(DATA, payload=b"x")] * (COLLECTED + 1000))
    assert [len(chunk) for chunk in talk.ours.inbox] == [COLLECTED, 1000]


def test_unknown_settings_are_not_kept() -> None:
    talk = Talk()
    before = len(talk.ours._h2.remote_settings)
    entries = b"".join(struct.pack(">HI", code, 1) for code in range(9, 2000))
    assert talk.say(frame(SETTINGS, 0, 0, entries + struct.pack(">HI", 5, 20_000))) == []
    assert len(talk.ours._h2.remote_settings) == before
    talk.ours.send(bytes(20_000))
    assert sent_data(talk) == [20_000]
