"""One HTTP/2 connection that carries one stream, as a machine: what gRPC's single bidirectional call needs.

Two hands do the work. The library ``h2`` keeps the rules of the connection and of the stream: preface, settings,
headers and their compression, pings, resets, GOAWAY. The bulk passes by it: payloads of DATA frames and their flow
control (WINDOW_UPDATE) are done here, because ``h2`` copies each payload three times, waits for whole frames, and takes
11 µs to send one of 16 KiB and 25 µs to receive it, most of what a bridge would cost. So:

- ``h2`` sees every frame but WINDOW_UPDATEs of our stream and of the connection; of DATA it sees an empty frame, and
  only where that says something: the end of the stream, or DATA where there may be none, which ``h2`` then judges.
- A payload is handed on as it arrives, as views of what was read; a frame of 16 MiB needs no memory here.
- Frames of control cost tokens, which come back with time and with the data that we send. A peer that floods us with
  pings, settings, updates or empty frames runs out of them.
- What waits to be sent, other than data, is bounded: a peer that makes us answer and does not read is given up.

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
    ConnectionTerminated,
    Event,
    PingAckReceived,
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
SMALL = 1024
"""Payloads below this are collected, so that a peer's tiny frames cost us no object each."""
COLLECTED = 64 * KIB
"""Bytes to which small payloads are collected."""
MAX_WINDOW = 2**31 - 1
MAX_DETAIL = 256
"""Bytes of a peer's words in GOAWAY that are kept."""

_HEADER = struct.Struct(">IBI")
"""Of a frame: three bytes of length and one of type; flags; stream."""
_UPDATE = struct.Struct(">IBII")
_DATA, _HEADERS, _RST_STREAM, _PUSH_PROMISE, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 5, 6, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_PREFACE = 24


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
    """The peer ends the connection. With code 0 what is under way may still be finished.

    Attributes:
        code: of HTTP/2.
        detail: the peer's words, shortened.
    """

    code: int
    detail: str


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The peer answered our ping."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke the protocol; `Http2.data_to_send` gives what tells it so. Nothing comes after it."""

    error: RemoteProtocolError


Happening: TypeAlias = HeadersCame | TrailersCame | Ended | Reset | GoneAway | PingAnswered | Broken
Chunk: TypeAlias = bytes | bytearray | memoryview
P = ParamSpec("P")


class Http2:
    """One end of the connection.

    Args:
        client: whether this end opens the stream.
        stream_window, connection_window: bytes that may be under way to us and not consumed.
        max_frame: bytes of one frame to us.
        max_header_list: bytes of headers to us.
        now: seconds, on the clock of all later calls.

    Attributes:
        stream_id: of the one stream; 0 before there is one.
        inbox: payload that was received and not taken: whoever takes it tells `consumed` how much it was.
        queued: bytes given to `send` that `data_to_send` did not give out yet.
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
        self.queued = 0
        self._max_frame = min(max(max_frame, 16 * KIB), 16 * MIB - 1)
        self._stream_window = min(stream_window, MAX_WINDOW)
        self._connection_window = min(max(connection_window, stream_window, 65535), MAX_WINDOW)
        self._stream_credit = self._stream_window
        self._connection_credit = self._connection_window
        self._stream_due = self._connection_due = 0
        self._send_window = self._connection_send_window = 65535
        self._tokens = float(CONTROL_BURST)
        self._tokens_at = now
        # The frame that is being received: its header or, if it is no DATA, the whole of it ...
        self._partial = bytearray()
        self._need = 0 if client else _PREFACE
        # ... or what is left of its payload and padding, and whether it ends the stream.
        self._payload_left = 0
        self._padding_left = 0
        self._padded = 0
        self._await_padding = False
        self._wanted = False
        self._ends_stream = False
        self._preface = not client
        self._gone = False
        self._closed = False
        self._in_headers = False
        self._receiving = False
        self._sending = False
        self._outgoing: deque[Chunk] = deque()
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
        self._h2.initiate_connection()
        if self._connection_window > 65535:
            self._h2.increment_flow_control_window(self._connection_window - 65535)
        self._pull()

    # Receiving

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> list[Happening]:
        """Take in bytes from the peer, and tell what happened. Payload of the stream goes to ``inbox``."""
        earned = (now - self._tokens_at) * CONTROL_RATE + len(data) / DATA_PER_TOKEN
        self._tokens = min(self._tokens + earned, CONTROL_BURST)
        self._tokens_at = now
        happenings: list[Happening] = []
        try:
            self._parse(data, happenings)
        except RemoteProtocolError as error:
            happenings.append(Broken(error))
        return happenings

    def _parse(self, data: bytes | bytearray | memoryview, happenings: list[Happening]) -> None:
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
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
                    self._data_begins(length, flags, stream_id, happenings)
                elif end - position >= 9 + length:
                    self._check_control(length)
                    self._control_frame(view[position : position + 9 + length], happenings)
                    position += 9 + length
                else:
                    self._check_control(length)
                    self._need = 9 + length
            else:
                position = self._collect(view, position, happenings)

    def _collect(self, view: memoryview, position: int, happenings: list[Happening]) -> int:
        """Collect a frame's header, or a whole control frame, that came in parts."""
        partial = self._partial
        need = self._need or 9
        part = view[position : position + need - len(partial)]
        partial += part
        position += len(part)
        if self._preface:
            # Garbage is told at its first wrong byte, not after 24.
            self._judge(bytes(part), happenings)
            if len(partial) == _PREFACE:
                self._preface = False
                self._need = 0
                partial.clear()
            return position
        if len(partial) < need:
            return position
        if self._await_padding:
            self._await_padding = False
            self._need = 0
            padding = partial[0]
            partial.clear()
            self._padding_begins(padding, happenings)
        elif self._need:
            self._need = 0
            self._partial = bytearray()
            self._control_frame(memoryview(partial), happenings)
        else:
            word, flags, stream_id = _HEADER.unpack(partial)
            kind, length = word & 0xFF, word >> 8
            if kind == _DATA:
                partial.clear()
                self._data_begins(length, flags, stream_id, happenings)
            else:
                self._check_control(length)
                if length:
                    self._need = 9 + length
                else:
                    self._partial = bytearray()
                    self._control_frame(memoryview(partial), happenings)
        return position

    def _data_begins(self, length: int, flags: int, stream_id: int, happenings: list[Happening]) -> None:
        if length > self._max_frame:
            self._blame(
                f"a frame of {length} bytes, at most {self._max_frame} are allowed", ErrorCodes.FRAME_SIZE_ERROR
            )
        self._wanted = self._receiving and not self._in_headers and (stream_id & 0x7FFFFFFF) == self.stream_id
        self._ends_stream = bool(flags & _END_STREAM)
        self._connection_credit -= length
        if self._wanted:
            self._stream_credit -= length
        else:
            # h2 knows whether this is a late frame of a stream that we reset, or an offence.
            self._judge(_HEADER.pack(_DATA, flags & _END_STREAM, stream_id), happenings)
            self._ends_stream = False
            self._connection_due += length
        if self._connection_credit < 0 or self._stream_credit < 0:
            self._blame("more data than the windows allow", ErrorCodes.FLOW_CONTROL_ERROR)
        if flags & _PADDED:
            if not length:
                self._blame("padding without room for its length", ErrorCodes.FRAME_SIZE_ERROR)
            self._await_padding = True
            self._need = 1
            self._padded = length - 1
            if self._wanted:
                self.consumed(1)
            return
        self._payload_left = length
        if not length:
            if not self._ends_stream:
                self._spend()
            self._data_done(happenings)

    def _padding_begins(self, padding: int, happenings: list[Happening]) -> None:
        if padding > self._padded:
            self._blame("padding is longer than its frame")
        self._payload_left = self._padded - padding
        self._padding_left = padding
        if self._wanted:
            self.consumed(padding)
        if not self._payload_left:
            self._spend()
            if not padding:
                self._data_done(happenings)

    def _data_done(self, happenings: list[Happening]) -> None:
        if self._ends_stream:
            self._ends_stream = False
            self._judge(_HEADER.pack(_DATA, _END_STREAM, self.stream_id), happenings)
        self.consumed(0)

    def _deliver(self, part: memoryview) -> None:
        if len(part) >= SMALL:
            self.inbox.append(part)
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
        if kind in (_HEADERS, _PUSH_PROMISE, _CONTINUATION):
            self._in_headers = not flags & _END_HEADERS
        elif kind == _WINDOW_UPDATE and len(frame) == 13 and not self._in_headers:
            stream_id &= 0x7FFFFFFF
            if not stream_id or stream_id == self.stream_id:
                self._window_grew(stream_id, int.from_bytes(frame[9:], "big") & 0x7FFFFFFF)
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
        if self._gone:
            self._after_goaway(frame, happenings)
            return
        try:
            for event in self._h2.receive_data(frame):
                self._translate(event, happenings)
        except (H2Error, UnicodeDecodeError) as error:
            self._closed = isinstance(error, H2ProtocolError)  # then h2 has said it to the peer
            self.close(ErrorCodes.PROTOCOL_ERROR)
            raise RemoteProtocolError(f"HTTP/2: {_words(error)}") from error
        self._pull()
        if len(self._control) > MAX_UNSENT_CONTROL:
            self._blame("it makes us answer and does not read", ErrorCodes.ENHANCE_YOUR_CALM)

    def _after_goaway(self, frame: bytes | memoryview, happenings: list[Happening]) -> None:
        # To h2 the connection is over with GOAWAY, though what is under way may still be finished (RFC 9113, 6.8).
        word, flags, stream_id = _HEADER.unpack_from(frame)
        kind = word & 0xFF
        if kind == _PING and len(frame) == 17 and not flags & _ACK:
            self._control += _HEADER.pack(8 << 8 | _PING, _ACK, 0) + frame[9:]
        elif kind == _RST_STREAM and stream_id == self.stream_id and len(frame) == 13:
            self._receiving = self._sending = False
            self._drop()
            happenings.append(Reset(int.from_bytes(frame[9:], "big")))
        elif kind in (_DATA, _HEADERS) and flags & _END_STREAM and stream_id == self.stream_id and self._receiving:
            self._receiving = False
            happenings.append(Ended())

    def _translate(self, event: Event, happenings: list[Happening]) -> None:
        match event:
            case RequestReceived() | ResponseReceived():
                if not self.client and not self.stream_id:
                    self.stream_id = int(event.stream_id or 0)
                if event.stream_id != self.stream_id:
                    self._blame("a second stream on a connection for one", ErrorCodes.REFUSED_STREAM)
                self._receiving = True
                happenings.append(HeadersCame(_texts(event.headers)))
            case TrailersReceived() if event.stream_id == self.stream_id:
                happenings.append(TrailersCame(_texts(event.headers)))
            case StreamEnded() if event.stream_id == self.stream_id:
                self._receiving = False
                happenings.append(Ended())
            case StreamReset() if event.stream_id == self.stream_id:
                self._receiving = self._sending = False
                self._drop()
                happenings.append(Reset(int(event.error_code)))
            case ConnectionTerminated():
                detail = (event.additional_data or b"")[:MAX_DETAIL].decode("ascii", "replace")
                self._gone = True
                happenings.append(GoneAway(int(event.error_code or 0), detail))
            case PingAckReceived():
                happenings.append(PingAnswered())
            case RemoteSettingsChanged():
                changed = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
                if changed is not None:
                    before = 65535 if changed.original_value is None else changed.original_value
                    self._send_window += changed.new_value - before
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
        """Bytes of payload were taken from ``inbox`` and may come again."""
        self._stream_due += count
        self._connection_due += count
        if self._stream_due >= self._stream_window // 4 or self._connection_due >= self._connection_window // 4:
            if self._receiving and self._stream_due:
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
        """As server: answer the request with headers."""
        self._h2.send_headers(self.stream_id, headers)
        self._sending = True
        self._pull()

    def refuse(self, headers: list[tuple[str, str]]) -> None:
        """As server: answer the request with headers alone, and end the connection."""
        self._h2.send_headers(self.stream_id, headers, end_stream=True)
        self.close()

    def send(self, chunk: Chunk) -> None:
        """Queue payload."""
        self._outgoing.append(chunk)
        self.queued += len(chunk)

    def end(self, trailers: list[tuple[str, str]] | None) -> None:
        """End our side, after what `data_to_send` gave out so far; with trailers if there are any."""
        if self._sending:
            self._sending = False
            if trailers is None:
                self._quietly(self._h2.end_stream, self.stream_id)
            else:
                self._quietly(self._h2.send_headers, self.stream_id, trailers, end_stream=True)

    def ping(self) -> None:
        """Queue a ping."""
        self._quietly(self._h2.ping, b"kas-ping")

    def reset(self, code: ErrorCodes) -> None:
        """Reset the stream, if it is open in any direction."""
        if self._sending or self._receiving:
            self._sending = self._receiving = False
            self._drop()
            self._quietly(self._h2.reset_stream, self.stream_id, code)

    def close(self, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Queue a GOAWAY. Nothing else can be done after it."""
        if not self._closed:
            self._closed = True
            self._quietly(self._h2.close_connection, code)
        self._pull()
        self._sending = self._receiving = False
        self._drop()

    @property
    def sendable(self) -> bool:
        """Whether `data_to_send` would give something."""
        if self._control:
            return True
        return bool(self._outgoing) and self._sending and self._send_window > 0 and self._connection_send_window > 0

    def data_to_send(self, limit: int) -> bytes:
        """Bytes for the peer: control frames, and up to ``limit`` bytes of payload as its windows allow."""
        out: list[Chunk] = [bytes(self._control)]
        self._control.clear()
        outgoing = self._outgoing
        if outgoing and self._sending:
            window = min(self._send_window, self._connection_send_window, limit, self.queued)
            frame_size = self._h2.max_outbound_frame_size
            left = window
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
            if window > 0:
                self.queued -= window
                self._send_window -= window
                self._connection_send_window -= window
                self._tokens += window / DATA_PER_TOKEN
        return b"".join(out)

    def _drop(self) -> None:
        self._outgoing.clear()
        self.queued = 0

    def _quietly(self, action: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
        # The connection may be over already, by the peer's word or by its fault.
        with suppress(H2Error):
            action(*arguments, **options)
        self._pull()

    def _pull(self) -> None:
        self._control += self._h2.data_to_send()


def _texts(headers: object) -> dict[str, str]:
    # They are text by our configuration; the library's types can't tell.
    return {str(name): str(value) for name, value in headers or ()}  # type: ignore[attr-defined]


def _words(error: BaseException) -> str:
    return str(error)[:MAX_DETAIL] or type(error).__name__
