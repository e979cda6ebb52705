"""One HTTP/2 connection that carries one stream, as a machine: what gRPC's single bidirectional call needs.

Two hands do the work. The library ``h2`` keeps the rules of the connection and of the stream: preface, settings,
headers and their compression, pings, resets, GOAWAY. The bulk passes by it: payloads of DATA frames and their flow
control (WINDOW_UPDATE) are done here, because ``h2`` copies each payload three times, waits for whole frames, and takes
11 µs to send one of 16 KiB and 25 µs to receive it, most of what a bridge would cost. So:

- ``h2`` sees every frame but GOAWAY, and WINDOW_UPDATEs of our stream and of the connection; of DATA it sees an empty
  frame, and only where that says something: the end of the stream, or DATA where there may be none.
- A payload is handed on as it arrives, as views of what was read; a frame of 16 MiB needs no memory here.
- What is received and not taken keeps at most `PINNED` times its own size alive, and is bounded by the windows.
- Frames of control cost tokens, which come back with time and with the bytes that pass. A peer that floods us with
  pings, settings, updates or empty frames runs out of them.
- What waits to be sent, other than data, is bounded: a peer that makes us answer and does not read is given up.
- Any fault of the peer ends the connection, also where the RFC would let the stream alone end: there is no other.

Source: RFC 9113; its flood attacks: CVE-2019-9511 to 9518.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeAlias

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings

from kas_libp2p.errors import RemoteProtocolError

KIB, MIB = 1024, 1024 * 1024

MAX_CONTROL_FRAME = 16 * KIB
"""Bytes of a frame that is no DATA: what every HTTP/2 peer may send, and far more than headers of ours need."""
MAX_UNSENT_CONTROL = 64 * KIB
"""Bytes of answers to the peer's control frames that may wait to be sent: some thousand, which no honest peer needs."""
CONTROL_BURST = 1000
"""Control frames that may come at once."""
CONTROL_RATE = 100.0
"""Control frames per second beyond that. kaspad sends one update per half window of data, a ping at most every 10 s."""
DATA_PER_TOKEN = KIB
"""Bytes that pass, in either direction, for one more control frame: a peer may send an update per KiB that it gets."""
PINNED = 4
"""How many times its size a payload may keep alive: a smaller part of what was read is copied, not viewed."""
SMALL = 1024
"""Payloads below this are collected, so that a peer's tiny frames cost us no object each."""
COLLECTED = 64 * KIB
"""Bytes to which small payloads are collected."""
MIN_WINDOW = 65535
"""What a peer may send before it has seen our settings (RFC 9113, 6.9.2)."""
MAX_WINDOW = 2**31 - 1
MAX_DETAIL = 256
"""Bytes of a peer's words in GOAWAY that are kept."""

_HEADER = struct.Struct(">IBI")
"""Of a frame: three bytes of length and one of type; flags; stream."""
_UPDATE = struct.Struct(">IBII")
_DATA, _HEADERS, _SETTINGS, _PUSH_PROMISE, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 4, 5, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_ID = 0x7FFFFFFF
_PREFACE = 24
_LAST_SETTING = 8
"""The highest setting that ``h2`` knows."""


@dataclass(frozen=True, slots=True)
class HeadersCame:
    """Headers of the request (server) or of the response (client).

    Attributes:
        headers: by name; of repeated ones the last counts.
    """

    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class TrailersCame:
    """Headers after the data."""

    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer ended its side in order."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The peer reset the stream.

    Attributes:
        code: of HTTP/2; 8 is CANCEL.
    """

    code: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer ends the connection. With code 0 the stream may still be finished, if the peer has taken it up.

    Attributes:
        code: of HTTP/2.
        last: the last stream of ours that the peer has taken up.
        detail: the peer's words, shortened.
    """

    code: int
    last: int
    detail: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke the protocol; `Http2.data_to_send` gives what tells it so. Nothing comes after it."""

    error: RemoteProtocolError


Happening: TypeAlias = HeadersCame | TrailersCame | Ended | Reset | GoneAway | Broken
Chunk: TypeAlias = bytes | bytearray | memoryview
P = ParamSpec("P")


class Http2:
    """One end of the connection.

    Args:
        client: whether this end opens the stream.
        stream_window, connection_window: bytes that may be under way to us and not consumed; at least `MIN_WINDOW`.
        max_frame: bytes of one frame of DATA to us.
        max_header_list: bytes of headers to us.
        now: seconds, on the clock of all later calls.

    Attributes:
        stream_id: of the one stream; 0 before there is one.
        inbox: payload that was received and not taken: whoever takes it tells `consumed` how much it was.
        waiting: bytes received and not `consumed`.
        queued: bytes given to `send` that `data_to_send` did not give out yet.
        finished: whether our side's end was given out, or the stream is over.
    """

    def __init__(
        self,
        *,
        client: bool,
        stream_window: int,
        connection_window: int,
        max_frame: int,
        max_header_list: int,
        now: float,
    ) -> None:
        self.client = client
        self.stream_id = 0
        self.inbox: deque[Chunk] = deque()
        self.waiting = 0
        self.queued = 0
        self.finished = False
        # What we allow the peer, what it has left of it, and what is to be given back.
        self._max_frame = min(max(max_frame, 16 * KIB), 16 * MIB - 1)
        self._max_header_list = max_header_list
        self._stream_window = min(max(stream_window, MIN_WINDOW), MAX_WINDOW)
        self._connection_window = min(max(connection_window, self._stream_window), MAX_WINDOW)
        self._stream_credit = self._stream_window
        self._connection_credit = self._connection_window
        self._stream_due = self._connection_due = 0
        # What the peer allows us.
        self._send_window = self._connection_send_window = 65535
        self._tokens = float(CONTROL_BURST)
        self._tokens_at = now
        # The frame that is being received: its first bytes, and how many are needed (0: a header) ...
        self._partial = bytearray()
        self._need = 0 if client else _PREFACE
        # ... or, of DATA, what is left of its payload and padding, and what to do with it.
        self._payload_left = 0
        self._padding_left = 0
        self._padded = 0
        self._await_padding = False
        self._wanted = False
        self._ends_stream = False
        self._viewed = 0
        self._preface = not client
        self._greeted = False
        self._header_block = 0
        self._in_headers = False
        self._receiving = False
        self._sending = False
        self._over = False
        self._closed = False
        self._outgoing: deque[Chunk] = deque()
        self._ending = False
        self._trailers: list[tuple[str, str]] | None = None
        self._control = bytearray()
        values: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: self._stream_window,
            SettingCodes.MAX_FRAME_SIZE: self._max_frame,
            SettingCodes.MAX_HEADER_LIST_SIZE: max_header_list,
        }
        if client:
            values[SettingCodes.ENABLE_PUSH] = 0
        else:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = 1
        self._h2 = H2Connection(
            H2Configuration(client_side=client, header_encoding="utf-8", validate_outbound_headers=False)
        )
        self._h2.local_settings = Settings(client=client, initial_values=values)
        self._h2.max_inbound_frame_size = self._max_frame
        self._h2.decoder.max_header_list_size = max_header_list
        self._h2.initiate_connection()
        if self._connection_window > MIN_WINDOW:
            self._h2.increment_flow_control_window(self._connection_window - MIN_WINDOW)
        self._pull()

    # Receiving

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> list[Happening]:
        """Take in bytes from the peer, and tell what happened. Payload of the stream goes to ``inbox``.

        Args:
            data: stays as it is from now on; what is handed on are views of it.
        """
        earned = (now - self._tokens_at) * CONTROL_RATE + len(data) / DATA_PER_TOKEN
        self._tokens = min(self._tokens + earned, CONTROL_BURST)
        self._tokens_at = now
        happenings: list[Happening] = []
        known = len(self.inbox)
        self._viewed = 0
        try:
            self._parse(memoryview(data), happenings)
        except RemoteProtocolError as error:
            happenings.append(Broken(error))
        if 0 < self._viewed * PINNED < len(data):
            for index in range(known, len(self.inbox)):
                if isinstance(self.inbox[index], memoryview):
                    self.inbox[index] = bytes(self.inbox[index])
        return happenings

    def _parse(self, view: memoryview, happenings: list[Happening]) -> None:
        position, end = 0, len(view)
        while position < end and not self._closed:
            if self._payload_left:
                part = view[position : position + self._payload_left]
                position += len(part)
                self._payload_left -= len(part)
                if self._wanted:
                    self._deliver(part)
                if not self._payload_left and not self._padding_left:
                    self._data_done(happenings)
            elif self._padding_left:
                count = min(self._padding_left, end - position)
                position += count
                self._padding_left -= count
                if not self._padding_left:
                    self._data_done(happenings)
            elif not self._partial and not self._need and end - position >= 9:
                word, flags, stream_id = _HEADER.unpack_from(view, position)
                kind, length = word & 0xFF, word >> 8
                if kind == _DATA:
                    position += 9
                    self._data_begins(length, flags, stream_id & _ID, happenings)
                else:
                    self._check_control(length)
                    if end - position >= 9 + length:
                        self._control_frame(view[position : position + 9 + length], happenings)
                        position += 9 + length
                    else:
                        self._need = 9 + length
            else:
                position = self._collect(view, position, happenings)

    def _collect(self, view: memoryview, position: int, happenings: list[Happening]) -> int:
        """Collect what came in parts: the preface, a frame's header, a padding's length, or a whole control frame."""
        partial = self._partial
        need = self._need or 9
        part = view[position : position + need - len(partial)]
        partial += part
        position += len(part)
        if self._preface:
            self._judge(part, happenings)  # garbage is told at its first wrong byte
        if len(partial) < need:
            return position
        self._partial = bytearray()
        if self._preface:
            self._preface = False
            self._need = 0
        elif self._await_padding:
            self._await_padding = False
            self._need = 0
            self._padding_begins(partial[0], happenings)
        elif self._need:
            self._need = 0
            self._control_frame(memoryview(partial), happenings)
        else:
            word, flags, stream_id = _HEADER.unpack(partial)
            kind, length = word & 0xFF, word >> 8
            if kind == _DATA:
                self._data_begins(length, flags, stream_id & _ID, happenings)
                return position
            self._check_control(length)
            if length:
                self._partial = partial
                self._need = 9 + length
            else:
                self._control_frame(memoryview(partial), happenings)
        return position

    def _data_begins(self, length: int, flags: int, stream_id: int, happenings: list[Happening]) -> None:
        if length > self._max_frame:
            self._blame(
                f"a frame of {length} bytes, at most {self._max_frame} are allowed", ErrorCodes.FRAME_SIZE_ERROR
            )
        self._wanted = self._receiving and not self._in_headers and stream_id == self.stream_id
        self._ends_stream = self._wanted and bool(flags & _END_STREAM)
        # The whole frame counts, padding and its length too (RFC 9113, 6.1).
        self._connection_credit -= length
        if self._wanted:
            self._stream_credit -= length
        else:
            # h2 knows whether this is a late frame of a stream that we reset, or an offence.
            self._spend()
            self._judge(_HEADER.pack(_DATA, flags & _END_STREAM, stream_id), happenings)
        if self._connection_credit < 0 or self._stream_credit < 0:
            self._blame("more data than the windows allow", ErrorCodes.FLOW_CONTROL_ERROR)
        if flags & _PADDED:
            if not length:
                self._blame("padding without room for its length", ErrorCodes.FRAME_SIZE_ERROR)
            self._await_padding = True
            self._need = 1
            self._padded = length - 1
            return
        self._payload_left = length
        if not length:
            self._data_done(happenings, empty=True)

    def _padding_begins(self, padding: int, happenings: list[Happening]) -> None:
        if padding > self._padded:
            self._blame("padding is longer than its frame")
        self._payload_left = self._padded - padding
        self._padding_left = padding
        if self._wanted:
            self._give_back(1 + padding)
        if not self._payload_left:
            self._spend()
            if not padding:
                self._data_done(happenings)

    def _data_done(self, happenings: list[Happening], *, empty: bool = False) -> None:
        if self._ends_stream:
            self._judge(_HEADER.pack(_DATA, _END_STREAM, self.stream_id), happenings)
        elif empty:
            self._spend()

    def _deliver(self, part: memoryview) -> None:
        self.waiting += len(part)
        if len(part) >= SMALL:
            self.inbox.append(part)
            self._viewed += len(part)
            return
        last = self.inbox[-1] if self.inbox else None
        if isinstance(last, bytearray) and len(last) < COLLECTED:
            last += part
        else:
            self.inbox.append(bytearray(part))

    def _check_control(self, length: int) -> None:
        if length > MAX_CONTROL_FRAME:
            self._blame(f"a control frame of {length} bytes", ErrorCodes.FRAME_SIZE_ERROR)

    def _control_frame(self, frame: memoryview, happenings: list[Happening]) -> None:
        self._spend()
        word, flags, stream_id = _HEADER.unpack_from(frame)
        kind = word & 0xFF
        stream_id &= _ID
        if not self._greeted:
            if kind != _SETTINGS or flags & _ACK:
                self._blame("the first frame is no SETTINGS")
            self._greeted = True
        if kind in (_HEADERS, _PUSH_PROMISE, _CONTINUATION):
            self._header_block = (self._header_block if self._in_headers else 0) + len(frame)
            if self._header_block > self._max_header_list:
                self._blame(f"headers of more than {self._max_header_list} bytes", ErrorCodes.ENHANCE_YOUR_CALM)
            self._in_headers = not flags & _END_HEADERS
        elif not self._in_headers:
            if kind == _WINDOW_UPDATE and len(frame) == 13 and stream_id in (0, self.stream_id):
                self._window_grew(stream_id, int.from_bytes(frame[9:], "big") & _ID)
                return
            if kind == _GOAWAY and len(frame) >= 17 and not stream_id:
                # To h2 the connection would be over, though the stream may still be finished (RFC 9113, 6.8).
                last, code = struct.unpack_from(">II", frame, 9)
                detail = bytes(frame[17 : 17 + MAX_DETAIL]).decode("ascii", "replace")
                happenings.append(GoneAway(code, last & _ID, detail))
                return
            if kind == _SETTINGS:
                self._judge(_known_settings(frame), happenings)
                return
        self._judge(frame, happenings)

    def _window_grew(self, stream_id: int, increment: int) -> None:
        if not increment:
            self._blame("a window update of 0")
        if stream_id:
            self._send_window += increment
        else:
            self._connection_send_window += increment
        self._check_windows()

    def _check_windows(self) -> None:
        if max(self._send_window, self._connection_send_window) > MAX_WINDOW:
            self._blame("a window above 2^31-1", ErrorCodes.FLOW_CONTROL_ERROR)

    def _judge(self, frame: bytes | memoryview, happenings: list[Happening]) -> None:
        """Let ``h2`` see a frame."""
        try:
            events = self._h2.receive_data(frame)
        except (H2Error, UnicodeDecodeError) as error:
            self._closed = isinstance(error, H2ProtocolError)  # then h2 has told the peer
            self.close(ErrorCodes.PROTOCOL_ERROR)
            raise RemoteProtocolError(f"HTTP/2: {_words(error)}") from error
        for event in events:
            self._translate(event, happenings)
        self._pull()
        if len(self._control) > MAX_UNSENT_CONTROL:
            self._blame("it makes us answer and does not read", ErrorCodes.ENHANCE_YOUR_CALM)

    def _translate(self, event: Event, happenings: list[Happening]) -> None:
        match event:
            case RequestReceived() | ResponseReceived():
                if not self.client and not self.stream_id:
                    self.stream_id = int(event.stream_id or 0)
                if event.stream_id != self.stream_id:
                    self._blame("a second stream on a connection for one", ErrorCodes.REFUSED_STREAM)
                self._receiving = True
                happenings.append(HeadersCame(_texts(event.headers)))
            case TrailersReceived():
                happenings.append(TrailersCame(_texts(event.headers)))
            case StreamEnded():
                self._receiving = False
                happenings.append(Ended())
            case StreamReset() if not self._over:
                if not event.remote_reset:
                    self._blame("data after its end", ErrorCodes.STREAM_CLOSED)
                self.abandon()
                happenings.append(Reset(int(event.error_code)))
            case RemoteSettingsChanged():
                changed = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
                if changed is not None:
                    # May make the window negative (RFC 9113, 6.9.2).
                    self._send_window += changed.new_value - int(changed.original_value or 0)
                    self._check_windows()

    def _spend(self) -> None:
        self._tokens -= 1
        if self._tokens < 0:
            self._blame("a flood of control frames", ErrorCodes.ENHANCE_YOUR_CALM)

    def _blame(self, what: str, code: ErrorCodes = ErrorCodes.PROTOCOL_ERROR) -> None:
        """Tell the peer what it did wrong, and raise it."""
        self.close(code)
        raise RemoteProtocolError(f"HTTP/2: {what}")

    def consumed(self, count: int) -> None:
        """Bytes of payload were taken from ``inbox``, and as many may come again."""
        self.waiting -= count
        self._give_back(count)

    def _give_back(self, count: int) -> None:
        self._stream_due += count
        self._connection_due += count
        # With quarters no sender ever waits for what is held back, and an update costs next to nothing.
        if self._stream_due < self._stream_window // 4 and self._connection_due < self._connection_window // 4:
            return
        if self._receiving:
            self._control += _UPDATE.pack(4 << 8 | _WINDOW_UPDATE, 0, self.stream_id, self._stream_due)
            self._stream_credit += self._stream_due
            self._control += _UPDATE.pack(4 << 8 | _WINDOW_UPDATE, 0, 0, self._connection_due)
            self._connection_credit += self._connection_due
        self._stream_due = self._connection_due = 0

    # Sending

    def open(self, headers: list[tuple[str, str]]) -> None:
        """As client: open the stream with a request."""
        self.stream_id = self._h2.get_next_available_stream_id()
        self._h2.send_headers(self.stream_id, headers)
        self._sending = True
        self._pull()

    def accept(self, headers: list[tuple[str, str]]) -> None:
        """As server: answer the request with headers. It may be over already, by what came with it."""
        self._quietly(self._h2.send_headers, self.stream_id, headers)
        self._sending = not self._over

    def refuse(self, headers: list[tuple[str, str]]) -> None:
        """As server: answer the request with headers alone, and end the connection."""
        self._quietly(self._h2.send_headers, self.stream_id, headers, end_stream=True)
        self.close()

    def send(self, chunk: Chunk) -> None:
        """Queue payload. It may be queued before the stream is open, and is lost once it is over."""
        if not self._over:
            self._outgoing.append(chunk)
            self.queued += len(chunk)

    def end(self, trailers: list[tuple[str, str]] | None) -> None:
        """End our side, after what is queued; with trailers if there are any."""
        self._ending = True
        self._trailers = trailers

    def ping(self) -> None:
        """Queue a ping."""
        self._quietly(self._h2.ping, b"kas-ping")

    def reset(self, code: ErrorCodes) -> None:
        """Reset the stream, if it is open in any direction. What is queued is lost."""
        self.abandon()
        self._quietly(self._h2.reset_stream, self.stream_id, code)

    def abandon(self) -> None:
        """The stream is over: forget what is queued, and want nothing more of it."""
        self._receiving = self._sending = self._wanted = self._ends_stream = False
        self._over = self.finished = True
        self._outgoing.clear()
        self.queued = 0

    def close(self, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Queue a GOAWAY. Nothing is sent or understood after it."""
        self.abandon()
        if not self._closed:
            self._closed = True
            self._quietly(self._h2.close_connection, code)
        self._pull()

    @property
    def sendable(self) -> bool:
        """Whether `data_to_send` would give something."""
        if self._control:
            return True
        if not self._sending:
            return False
        if self._outgoing:
            return self._send_window > 0 and self._connection_send_window > 0
        return self._ending

    def data_to_send(self, limit: int) -> bytes:
        """Bytes for the peer: control frames, and up to ``limit`` bytes of payload as its windows allow."""
        out: list[Chunk] = [self._control]
        self._control = bytearray()
        if self._sending:
            if self._outgoing:
                self._give_out(out, min(self._send_window, self._connection_send_window, limit, self.queued))
            if self._ending and not self._outgoing:
                self._sending = False
                self.finished = True
                if self._trailers is None:
                    self._h2.end_stream(self.stream_id)
                else:
                    self._h2.send_headers(self.stream_id, self._trailers, end_stream=True)
                out.append(self._h2.data_to_send())
        return b"".join(out)

    def _give_out(self, out: list[Chunk], count: int) -> None:
        outgoing = self._outgoing
        frame_size = self._h2.max_outbound_frame_size
        left = count
        while left > 0:
            size = room = min(left, frame_size)
            out.append(_HEADER.pack(size << 8, 0, self.stream_id))
            while room:
                chunk = outgoing[0]
                length = len(chunk)
                if length <= room:
                    out.append(chunk)
                    outgoing.popleft()
                    room -= length
                else:
                    view = memoryview(chunk)
                    out.append(view[:room])
                    outgoing[0] = view[room:]
                    room = 0
            left -= size
        if count > 0:
            self.queued -= count
            self._send_window -= count
            self._connection_send_window -= count
            self._tokens += count / DATA_PER_TOKEN

    def _quietly(self, action: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
        # The stream or the connection may be over already, by the peer's word or by its fault.
        with suppress(H2Error):
            action(*arguments, **options)
        self._pull()

    def _pull(self) -> None:
        self._control += self._h2.data_to_send()


def _known_settings(frame: memoryview) -> memoryview | bytes:
    """A SETTINGS frame without unknown settings: ``h2`` would keep a queue for each of the 65536 that there may be."""
    if (len(frame) - 9) % 6:
        return frame
    entries = (frame[at : at + 6] for at in range(9, len(frame), 6))
    known = b"".join(entry for entry in entries if not entry[0] and entry[1] <= _LAST_SETTING)
    return _HEADER.pack(len(known) << 8 | _SETTINGS, *_HEADER.unpack_from(frame)[1:]) + known


def _texts(headers: object) -> dict[str, str]:
    # They are text by our configuration; the library's types can't tell.
    return {str(name): str(value) for name, value in headers or ()}  # type: ignore[attr-defined]


def _words(error: BaseException) -> str:
    return str(error)[:MAX_DETAIL] or type(error).__name__
