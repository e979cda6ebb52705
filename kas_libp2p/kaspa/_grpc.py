"""gRPC's one bidirectional stream on HTTP/2, as a machine: bytes in, pieces of messages out, and the other way round.

Rules:

- Prior knowledge: no upgrade, no TLS. One request per connection, ``POST`` to one path; any further stream is refused.
- A server answers with its headers at once, since kaspad as client waits for them before it says anything.
- A message is a flag, four bytes of length, and its bytes. An uncompressed one passes in pieces as it arrives; a
  compressed one is collected and unpacked whole, as only then its size is known. Its size is capped before and after.
- What was received is granted again only while little of it waits to be read, so a reader that does not read stops the
  peer after one window, and never the connection's pings.
- A stream ends in order with trailers that say status 0; every other end is an error with its reason.

Sources: RFC 9113, gRPC over HTTP2 (``PROTOCOL-HTTP2.md``), and what kaspad 2.1.0 does on the wire.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    PingAckReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error, StreamClosedError
from h2.settings import SettingCodes, Settings

from kas_libp2p.errors import ConnectionLost, GrpcError, KasError, LocalProtocolError, RemoteProtocolError
from kas_libp2p.kaspa.channel import BATCH, MAX_MESSAGE, Piece

KIB, MIB = 1024, 1024 * 1024

P2P_PATH = "/protowire.P2P/MessageStream"
RPC_PATH = "/protowire.RPC/MessageStream"

PREFIX = 5
"""Bytes before each message: a flag (1 = compressed) and the length."""
GZIP_LEVEL = 1
"""What is won by higher levels on Kaspa's messages, which are mostly hashes and signatures, is not worth their time."""
GZIP_WORTHWHILE = 128
"""Bytes below which gzip's own 18 bytes eat the gain."""
MAX_REASON = 256
"""Characters of a peer's ``grpc-message`` that are kept."""

OK, CANCELLED, UNKNOWN, UNIMPLEMENTED, INTERNAL = 0, 1, 2, 12, 13
"""gRPC status codes that are used here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """How one HTTP/2 connection is set up.

    Attributes:
        path: of the call.
        authority: host of the request (client only).
        gzip: as client: offer gzip, and compress what is sent; as server: compress what is sent if it was offered.
            Compressed messages are understood in any case.
        max_message: bytes of one message, unpacked.
        stream_window, connection_window: bytes that may be under way to us. One stream is all there is, so the
            connection's is at least the stream's.
        max_frame: bytes of one frame to us; larger ones cost less per byte.
        max_header_list: bytes of headers.
        keepalive: seconds of silence after which a ping is sent; 0 for never.
        keepalive_timeout: seconds after which an unanswered ping ends the connection.
    """

    path: str = P2P_PATH
    authority: str = "kas-libp2p"
    gzip: bool = False
    max_message: int = MAX_MESSAGE
    stream_window: int = 2 * MIB
    connection_window: int = 4 * MIB
    max_frame: int = MIB
    max_header_list: int = 16 * KIB
    keepalive: float = 30.0
    keepalive_timeout: float = 10.0


class GrpcMachine:
    """One call, seen from one of its ends.

    Args:
        client: whether this end makes the call.
        settings: see there.
        now: seconds, on the clock of all later calls.

    Attributes:
        error: why it ended other than in order, or ``None``.
        ended: whether the peer ended its side in order.
        accepted: whether the call stands: the request was seen, or the response's headers.
        queued: bytes given to `send` that are not in `data_to_send` yet.
        waiting: bytes received and not taken yet.
        granted: set when there is a window update to send; cleared by `data_to_send`.
    """

    def __init__(self, *, client: bool, settings: GrpcSettings, now: float) -> None:
        self.client = client
        self.settings = settings
        self.error: KasError | None = None
        self.ended = False
        self.accepted = False
        self.queued = 0
        self.waiting = 0
        self.granted = False
        self._last_heard = now
        self._ping_sent: float | None = None
        self._pieces: deque[Piece] = deque()
        self._ungranted = 0
        self._outgoing: deque[memoryview] = deque()
        self._eof_queued = False
        self._eof_sent = False
        self._goodbye = False
        self._trailers = (OK, "")
        self._gzip_out = False
        self._prefix = b""
        self._remaining = 0
        self._fresh = False
        self._size = 0
        self._compressed: bytearray | None = None
        self._stream_id = 1
        self._open = False
        connection = H2Connection(
            H2Configuration(client_side=client, header_encoding="utf-8", validate_outbound_headers=False)
        )
        values: dict[SettingCodes, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: settings.stream_window,
            SettingCodes.MAX_FRAME_SIZE: min(max(settings.max_frame, 16 * KIB), 16 * MIB - 1),
            SettingCodes.MAX_HEADER_LIST_SIZE: settings.max_header_list,
        }
        if client:
            values[SettingCodes.ENABLE_PUSH] = 0
        else:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = 1
        connection.local_settings = Settings(client=client, initial_values=values)
        connection.max_inbound_frame_size = values[SettingCodes.MAX_FRAME_SIZE]
        self._h2 = connection
        connection.initiate_connection()
        extra = max(settings.connection_window, settings.stream_window) - 65535
        if extra > 0:
            connection.increment_flow_control_window(extra)
        if client:
            self._request()

    def _request(self) -> None:
        settings = self.settings
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", settings.authority),
            (":path", settings.path),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "kas-libp2p"),
        ]
        if settings.gzip:
            headers += [("grpc-encoding", "gzip"), ("grpc-accept-encoding", "gzip,identity")]
            self._gzip_out = True
        self._h2.send_headers(self._stream_id, headers)
        self._open = True

    @property
    def failed(self) -> bool:
        """Whether it ended other than in order."""
        return self.error is not None

    # Receiving

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take in bytes from the peer; empty ones mean that the stream under us ended. Never raises: see ``error``."""
        if self.error is not None:
            return
        self._last_heard = now
        if not data:
            self._fail(ConnectionLost("the peer closed the connection"))
            return
        try:
            for event in self._h2.receive_data(bytes(data)):
                self._handle(event)
                if self.failed:
                    return
        except (H2Error, UnicodeDecodeError) as error:
            self._fail(RemoteProtocolError(f"HTTP/2: {_words(error)}"))
        except RemoteProtocolError as error:
            self._fail(error)
        self._grant()

    def _handle(self, event: object) -> None:
        match event:
            case DataReceived():
                if event.stream_id == self._stream_id and self.accepted:
                    self._ungranted += event.flow_controlled_length or 0
                    self._cut(event.data or b"")
                elif event.flow_controlled_length:
                    self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case RequestReceived():
                self._requested(event.stream_id, _headers(event.headers))
            case ResponseReceived() if event.stream_id == self._stream_id:
                self._responded(_headers(event.headers))
            case TrailersReceived() if event.stream_id == self._stream_id:
                self._status(_headers(event.headers))
            case StreamEnded() if event.stream_id == self._stream_id:
                if self._prefix or self._remaining:
                    raise RemoteProtocolError("the peer ended its side in the middle of a message")
                self.ended = True
            case StreamReset() if event.stream_id == self._stream_id:
                if not self.ended:
                    code = event.error_code
                    name = ErrorCodes(code).name if code in set(ErrorCodes) else f"{code:#x}"
                    self._fail(ConnectionLost(f"the peer cancelled the call (HTTP/2 {name})"))
            case ConnectionTerminated():
                if event.error_code and not self.ended:
                    detail = (event.additional_data or b"")[:MAX_REASON].decode("ascii", "replace")
                    self._fail(
                        ConnectionLost(f"the peer ended HTTP/2 with code {int(event.error_code)} {detail}".strip())
                    )
            case PingAckReceived():
                self._ping_sent = None

    def _requested(self, stream_id: int, headers: dict[str, str]) -> None:
        if self._open:
            self._h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        if headers.get(":method") != "POST" or headers.get(":path") != self.settings.path:
            self._refuse(stream_id, f"there is no {headers.get(':path', '')[:MAX_REASON]} here")
            return
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._refuse(stream_id, "this is no gRPC")
            return
        self._stream_id = stream_id
        self._open = self.accepted = True
        response = [(":status", "200"), ("content-type", "application/grpc")]
        if "gzip" in headers.get("grpc-accept-encoding", "") and self.settings.gzip:
            response.append(("grpc-encoding", "gzip"))
            self._gzip_out = True
        response.append(("grpc-accept-encoding", "gzip,identity"))
        self._h2.send_headers(stream_id, response)

    def _refuse(self, stream_id: int, why: str) -> None:
        headers = [
            (":status", "200"),
            ("content-type", "application/grpc"),
            ("grpc-status", str(UNIMPLEMENTED)),
            ("grpc-message", quote(why)),
        ]
        self._h2.send_headers(stream_id, headers, end_stream=True)
        raise RemoteProtocolError(f"HTTP/2: {why}")

    def _responded(self, headers: dict[str, str]) -> None:
        status = headers.get(":status")
        if "grpc-status" in headers:
            self._status(headers)
        elif status != "200":
            self._fail(GrpcError(UNKNOWN, f"HTTP status {status}"))
        elif not headers.get("content-type", "").startswith("application/grpc"):
            raise RemoteProtocolError("HTTP/2: the answer is no gRPC")
        else:
            self.accepted = True

    def _status(self, headers: dict[str, str]) -> None:
        text = headers.get("grpc-status", "")
        status = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else UNKNOWN
        if status != OK:
            message = unquote(headers.get("grpc-message", ""), errors="replace")[:MAX_REASON]
            self._fail(GrpcError(status, message))

    def _cut(self, data: bytes) -> None:
        """Cut received bytes into pieces."""
        position, end = 0, len(data)
        view = memoryview(data)
        while position < end:
            if not self._remaining:
                head = self._prefix + data[position : position + PREFIX - len(self._prefix)]
                position += len(head) - len(self._prefix)
                if len(head) < PREFIX:
                    self._prefix = head
                    return
                self._prefix = b""
                self._begin(head[0], int.from_bytes(head[1:], "big"))
                continue
            part = view[position : position + self._remaining]
            position += len(part)
            first = self._fresh
            self._fresh = False
            self._remaining -= len(part)
            if self._compressed is not None:
                self._compressed += part
                if not self._remaining:
                    packed, self._compressed = self._compressed, None
                    self._add_whole(self._unpack(packed))
            else:
                self._add(Piece(part, self._remaining, first, self._size))

    def _begin(self, flag: int, size: int) -> None:
        if flag > 1:
            raise RemoteProtocolError(f"gRPC: a message with flag {flag}")
        if size > self.settings.max_message:
            raise RemoteProtocolError(
                f"gRPC: a message of {size} bytes, at most {self.settings.max_message} are allowed"
            )
        self._remaining = self._size = size
        self._fresh = True
        self._compressed = bytearray() if flag else None
        if not size:
            if flag:
                raise RemoteProtocolError("gRPC: an empty message is said to be compressed")
            self._add(Piece(b"", 0, True, 0))

    def _unpack(self, packed: bytearray) -> bytes:
        unpacker = zlib.decompressobj(wbits=31)
        limit = self.settings.max_message
        try:
            data = unpacker.decompress(packed, limit + 1)
        except zlib.error as error:
            raise RemoteProtocolError(f"gRPC: a compressed message is damaged: {error}") from error
        if len(data) > limit:
            raise RemoteProtocolError(f"gRPC: a compressed message unpacks to more than {limit} bytes")
        if not unpacker.eof or unpacker.unused_data:
            raise RemoteProtocolError("gRPC: a compressed message is cut short")
        return data

    def _add_whole(self, message: bytes) -> None:
        size = len(message)
        if size <= BATCH:
            self._add(Piece(message, 0, True, size))
            return
        view = memoryview(message)
        for start in range(0, size, BATCH):
            data = view[start : start + BATCH]
            self._add(Piece(data, size - start - len(data), start == 0, size))

    def _add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.waiting += len(piece.data)

    @property
    def readable(self) -> bool:
        """Whether a piece waits; an empty message is one."""
        return bool(self._pieces)

    def take(self, limit: int) -> list[Piece]:
        """The pieces that wait, at most about ``limit`` bytes of them; what is taken is granted to the peer again."""
        pieces: list[Piece] = []
        while self._pieces and limit > 0:
            piece = self._pieces.popleft()
            pieces.append(piece)
            limit -= len(piece.data)
            self.waiting -= len(piece.data)
        self._grant()
        return pieces

    def _grant(self) -> None:
        # A message that is being collected can't be taken, so its bytes are granted whatever waits.
        if self._ungranted and (self.waiting < BATCH or self._compressed is not None) and self.error is None:
            count, self._ungranted = self._ungranted, 0
            self.granted = True
            try:
                self._h2.acknowledge_received_data(count, self._stream_id)
            except StreamClosedError:
                pass
            except H2Error as error:
                self._fail(RemoteProtocolError(f"HTTP/2: {_words(error)}"))

    # Sending

    def send(self, pieces: Sequence[Piece]) -> None:
        """Queue pieces.

        Raises:
            LocalProtocolError: our side was ended.
            KasError: the call ended; as ``error``.
        """
        if self.error is not None:
            raise self.error
        if self._eof_queued:
            raise LocalProtocolError("this side was ended")
        outgoing = self._outgoing
        for data, _, first, size in pieces:
            if first:
                if self._gzip_out and len(data) == size and size >= GZIP_WORTHWHILE:
                    data = zlib.compress(data, GZIP_LEVEL, 31)
                    head = b"\1" + len(data).to_bytes(4, "big")
                else:
                    head = b"\0" + size.to_bytes(4, "big")
                if len(data) < 16 * KIB:
                    data = head + data
                else:
                    outgoing.append(memoryview(head))
                    self.queued += PREFIX
            if data:
                outgoing.append(memoryview(data))
                self.queued += len(data)

    def send_eof(self, status: int = OK, message: str = "") -> None:
        """Say after what is queued that nothing more comes.

        Args:
            status, message: as server, what the trailers say.
        """
        if not self._eof_queued:
            self._eof_queued = True
            self._trailers = (status, message)

    def data_to_send(self, limit: int) -> bytes:
        """Bytes for the peer: control frames, and about ``limit`` bytes of messages as its windows allow."""
        self.granted = False
        try:
            if self._open and self.error is None:
                self._fill(limit)
        except H2Error as error:  # the stream was reset or ended under us; what was queued can't leave
            if self.error is None and not self.ended:
                self._fail(ConnectionLost(f"HTTP/2: {_words(error)}"))
            self._drop_outgoing()
        return self._h2.data_to_send()

    def _fill(self, limit: int) -> None:
        h2, stream_id, outgoing = self._h2, self._stream_id, self._outgoing
        if self._eof_sent:
            return
        if outgoing:
            window = min(h2.local_flow_control_window(stream_id), limit)
            frame_size = h2.max_outbound_frame_size
            while outgoing and window > 0:
                size = min(window, frame_size)
                frame = self._gather(size)
                h2.send_data(stream_id, frame)
                window -= len(frame)
                self.queued -= len(frame)
        if self._eof_queued and not outgoing:
            self._eof_sent = True
            if self.client:
                h2.end_stream(stream_id)
            else:
                status, message = self._trailers
                trailers = [("grpc-status", str(status))]
                if message:
                    trailers.append(("grpc-message", quote(message[:MAX_REASON])))
                h2.send_headers(stream_id, trailers, end_stream=True)

    def _gather(self, size: int) -> bytes:
        outgoing = self._outgoing
        head = outgoing[0]
        if len(head) >= size:
            if len(head) == size:
                outgoing.popleft()
            else:
                outgoing[0] = head[size:]
            return bytes(head[:size])
        parts = []
        while outgoing and size > 0:
            head = outgoing.popleft()
            if len(head) > size:
                outgoing.appendleft(head[size:])
                head = head[:size]
            parts.append(head)
            size -= len(head)
        return b"".join(parts)

    def _drop_outgoing(self) -> None:
        self._outgoing.clear()
        self.queued = 0

    @property
    def finished(self) -> bool:
        """Whether all that was queued, and the end, has been given to `data_to_send`."""
        return self._eof_sent

    # Time and ends

    def next_deadline(self) -> float:
        """When `on_timeout` is due."""
        if self.error is not None or not self.settings.keepalive:
            return float("inf")
        if self._ping_sent is not None:
            return self._ping_sent + self.settings.keepalive_timeout
        return self._last_heard + self.settings.keepalive

    def on_timeout(self, now: float) -> None:
        """Send a ping into silence, or end the call if the last one was not answered."""
        if now < self.next_deadline():
            return
        if self._ping_sent is not None:
            if self._last_heard > self._ping_sent:
                self._ping_sent = None
                return
            self._fail(ConnectionLost(f"no answer to an HTTP/2 ping within {self.settings.keepalive_timeout:g} s"))
            return
        self._ping_sent = now
        self._h2.ping(b"kas-ping")

    def close(self) -> None:
        """Say that the connection ends, once. What is queued is dropped if the end was not queued before."""
        if self._goodbye:
            return
        self._goodbye = True
        try:
            if self._open and not (self._eof_sent and self.ended) and self.error is None:
                self._h2.reset_stream(self._stream_id, ErrorCodes.CANCEL if self.client else ErrorCodes.NO_ERROR)
            self._h2.close_connection()
        except H2Error:
            pass  # it is over already
        self._drop_outgoing()

    def lose(self, error: KasError) -> None:
        """The stream under us is gone."""
        self._fail(error)

    def _fail(self, error: KasError) -> None:
        if self.error is None:
            self.error = error
            self._drop_outgoing()


def _headers(headers: Iterable[tuple[str | bytes, str | bytes]] | None) -> dict[str, str]:
    # They are text by our configuration; the library's types can't tell.
    return {str(name): str(value) for name, value in headers or ()}


def _words(error: BaseException) -> str:
    return str(error)[:MAX_REASON] or type(error).__name__
