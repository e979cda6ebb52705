"""gRPC's one bidirectional stream on HTTP/2, as a machine: bytes in, pieces of messages out, and the other way round.

Rules:

- Prior knowledge: no upgrade, no TLS. One request per connection, ``POST`` to one path; any further stream is refused.
- A server answers with its headers at once, since kaspad as client waits for them before it says anything.
- A message is a flag, four bytes of length, and its bytes. An uncompressed one passes in pieces as it arrives; a
  compressed one is collected and unpacked by steps, as only its end tells its size, which has to be said first. A large
  one passes in pieces too, as it is, where whoever gets it can take that. Its size is capped before and after.
- Messages are cut and unpacked as they are taken, one batch ahead. What was not cut is not granted again, so a reader
  that does not read stops the peer after one window, and never the connection's pings.
- A stream ends in order with trailers that say status 0; every other end is an error with its reason.

Sources: gRPC over HTTP2 (``PROTOCOL-HTTP2.md``), and what kaspad 2.1.0 does on the wire.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from h2.errors import ErrorCodes

from kas_libp2p.errors import ConnectionLost, GrpcError, KasError, LocalProtocolError, RemoteProtocolError
from kas_libp2p.kaspa._gunzip import Passer, Unpacker
from kas_libp2p.kaspa._http2 import (
    Broken,
    Ended,
    GoneAway,
    Happening,
    HeadersCame,
    Http2,
    Reset,
    TrailersCame,
)
from kas_libp2p.kaspa._liveness import ANSWER_WITHIN, PROBE_AFTER, Act, Liveness
from kas_libp2p.kaspa.channel import BATCH, MAX_MESSAGE, PackedPiece, PathHung, Piece

KIB, MIB = 1024, 1024 * 1024

P2P_PATH = "/protowire.P2P/MessageStream"
RPC_PATH = "/protowire.RPC/MessageStream"

PREFIX = 5
"""Bytes before each message: a flag (1 = compressed) and the length."""
PIECE_COST = 256
"""Bytes that a piece costs beside its data: so tiny messages make no huge batches."""
JOINED = 16 * KIB
"""Pieces below this are joined before they are queued; copying larger ones once more would cost more than it saves."""
GZIP_LEVEL = 1
"""What is won by higher levels on Kaspa's messages, which are mostly hashes and signatures, is not worth their time."""
GZIP_WORTHWHILE = 128
"""Bytes below which gzip's own 18 bytes eat the gain."""
COLLECTED = BATCH
"""Bytes of a compressed message that is collected and unpacked here in any case."""
MAX_REASON = 256
"""Characters of a peer's ``grpc-message`` that are kept."""

OK, CANCELLED, UNKNOWN, UNIMPLEMENTED, INTERNAL = 0, 1, 2, 12, 13
"""gRPC status codes that are used here."""

_PREFIX = struct.Struct(">BI")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    """How one HTTP/2 connection is set up.

    Attributes:
        path: of the call.
        authority: host of the request (client only).
        gzip: as client: offer gzip, and compress what is sent; as server: compress what is sent if it was offered.
            Compressed messages are understood in any case.
        passes_gzip: as client: say that some messages will be compressed, to pass on those that came so.
        max_message: bytes of one message, unpacked.
        stream_window, connection_window: bytes that may be under way to us. One stream is all there is, so the
            connection's is at least the stream's.
        max_frame: bytes of one frame to us; larger ones cost less per byte.
        max_header_list: bytes of headers.
        keepalive: seconds of silence after which a ping is sent; infinite for never.
        keepalive_timeout: seconds after which an unanswered ping ends the connection, unless what was sent still moves.
        liveness: find a path that hangs while something may be owed within seconds, as the message dialect does: pings
            then follow the times of `kas_libp2p.kaspa._liveness`, and ``keepalive`` counts on an idle connection only.
    """

    path: str = P2P_PATH
    authority: str = "kas-libp2p"
    gzip: bool = False
    passes_gzip: bool = False
    max_message: int = MAX_MESSAGE
    stream_window: int = 2 * MIB
    connection_window: int = 4 * MIB
    max_frame: int = MIB
    max_header_list: int = 16 * KIB
    keepalive: float = 30.0
    keepalive_timeout: float = 10.0
    liveness: bool = False


class GrpcMachine:
    """One call, seen from one of its ends.

    Args:
        client: whether this end makes the call.
        settings: see there.
        now: seconds, on the clock of all later calls.

    Attributes:
        error: why it ended other than in order, or ``None``.
        accepted: whether the call stands: the request was seen, or the response's headers.
        busy: whether `take` has more to do without any more bytes.
        peer_ended: whether the peer ended its side in order, though not everything may have been taken.
        takes_packed: whether `send` takes a `PackedPiece`.
        gives_packed: whether `take` may give one.
    """

    def __init__(self, *, client: bool, settings: GrpcSettings, now: float) -> None:
        self.client = client
        self.settings = settings
        self.error: KasError | None = None
        self.accepted = False
        self.busy = False
        self._liveness = Liveness(
            now,
            probe_after=PROBE_AFTER if settings.liveness else settings.keepalive,
            idle_probe_after=settings.keepalive,
            answer_within=ANSWER_WITHIN if settings.liveness else settings.keepalive_timeout,
        )
        self._liveness.on_reading(now)
        self.peer_ended = False
        self._eof_queued = False
        self._gzip_out = False
        self.takes_packed = False
        self.gives_packed = False
        # Cut ahead.
        self._pieces: list[Piece] = []
        # The message that is being received: what is there of its prefix ...
        self._prefix = b""
        # ... or its size and what is missing of it, and its bytes if they are compressed.
        self._size = 0
        self._remaining = 0
        self._fresh = False
        self._packed: bytearray | None = None
        self._passer: Passer | None = None
        # What has to be done before more is cut.
        self._work: Unpacker | Passer | None = None
        self._http2 = Http2(
            client=client,
            stream_window=settings.stream_window,
            connection_window=settings.connection_window,
            max_frame=settings.max_frame,
            max_header_list=settings.max_header_list,
            now=now,
        )
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
            self._gzip_out = self.takes_packed = True
        elif settings.passes_gzip:
            headers.append(("grpc-encoding", "gzip"))
            self.takes_packed = True
        self._http2.open(headers)

    @property
    def failed(self) -> bool:
        """Whether it ended other than in order."""
        return self.error is not None

    # Receiving

    def receive(self, data: bytes | bytearray | memoryview, now: float) -> None:
        """Take in bytes from the peer; empty ones mean that the stream under us ended. Never raises: see ``error``.

        Args:
            data: stays as it is from now on; pieces are views of it.
        """
        if self.error is not None:
            return
        if not data:
            self._fail(ConnectionLost("the peer closed the connection"))
            return
        self._liveness.on_received(len(data), now)
        self._liveness.on_reading(now)
        for happening in self._http2.receive(data, now):
            if self.error is None:
                self._handle(happening)
        if self._http2.inbox:
            self._liveness.on_moved(now)
        if not self._pieces:
            self._pieces = self._cut(BATCH)

    def _handle(self, happening: Happening) -> None:
        match happening:
            case HeadersCame(headers):
                if self.client:
                    self._responded(headers)
                else:
                    self._requested(headers)
            case TrailersCame(headers):
                self._status(headers)
            case Ended():
                self.peer_ended = True
            case Reset(code) if not self.peer_ended:
                name = ErrorCodes(code).name if code in set(ErrorCodes) else f"{code:#x}"
                self._fail(ConnectionLost(f"the peer cancelled the call (HTTP/2 {name})"))
            case GoneAway(code, last, detail) if not self.peer_ended:
                if code:
                    self._fail(ConnectionLost(f"the peer ended HTTP/2 with code {code} {detail}".strip()))
                elif self.client and last < self._http2.stream_id:
                    self._fail(ConnectionLost("the peer is leaving and did not take up the call"))
            case Broken(error):
                self._fail(error)

    def _requested(self, headers: dict[str, str]) -> None:
        if headers.get(":method") != "POST" or headers.get(":path") != self.settings.path:
            self._refuse(f"there is no {headers.get(':path', '')[:MAX_REASON]} here")
            return
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._refuse("this is no gRPC")
            return
        self.accepted = True
        response = [(":status", "200"), ("content-type", "application/grpc")]
        if "gzip" in headers.get("grpc-accept-encoding", "") and self.settings.gzip:
            response.append(("grpc-encoding", "gzip"))
            self._gzip_out = self.takes_packed = True
        response.append(("grpc-accept-encoding", "gzip,identity"))
        self._http2.accept(response)

    def _refuse(self, why: str) -> None:
        self._http2.refuse(
            [
                (":status", "200"),
                ("content-type", "application/grpc"),
                ("grpc-status", str(UNIMPLEMENTED)),
                ("grpc-message", quote(why)),
            ]
        )
        self._fail(RemoteProtocolError(f"HTTP/2: {why}"))

    def _responded(self, headers: dict[str, str]) -> None:
        status = headers.get(":status")
        if "grpc-status" in headers:
            self._status(headers)
        elif status != "200":
            self._fail(GrpcError(UNKNOWN, f"HTTP status {status}"))
        elif not headers.get("content-type", "").startswith("application/grpc"):
            self._fail(RemoteProtocolError("HTTP/2: the answer is no gRPC"))
        else:
            self.accepted = True

    def _status(self, headers: dict[str, str]) -> None:
        text = headers.get("grpc-status", "")
        status = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else UNKNOWN
        if status != OK:
            message = unquote(headers.get("grpc-message", ""), errors="replace")[:MAX_REASON]
            self._fail(GrpcError(status, message))

    def _cut(self, limit: int) -> list[Piece]:
        """Cut received bytes into pieces: about ``limit`` bytes of them, or as much work without any."""
        pieces: list[Piece] = []
        self.busy = False
        try:
            while limit > 0:
                if self._work is not None:
                    limit -= self._step(self._work, pieces, limit)
                elif self._http2.inbox:
                    limit -= self._cut_chunk(pieces, limit)
                else:
                    break
            else:
                self.busy = True
            if not self.busy and self.peer_ended and (self._prefix or self._remaining):
                raise RemoteProtocolError("the peer ended its side in the middle of a message")
        except RemoteProtocolError as error:
            self._fail(error)
            self._http2.inbox.clear()
            self._work = None
            self._http2.close(ErrorCodes.PROTOCOL_ERROR)
        return pieces

    def _cut_chunk(self, pieces: list[Piece], limit: int) -> int:
        """Cut the first chunk of the inbox. Returns what it cost."""
        inbox = self._http2.inbox
        view = memoryview(inbox.popleft())
        position, end, left = 0, len(view), limit
        most = self.settings.max_message
        while position < end and left > 0 and self._work is None:
            if self._remaining:
                data = view[position : position + self._remaining]
                length = len(data)
                position += length
                self._remaining -= length
                if self._passer is not None:
                    self._passer.feed(data)
                    self._work = self._passer
                elif self._packed is not None:
                    self._packed += data
                    if not self._remaining:
                        self._work = Unpacker(self._packed, most)
                        self._packed = None
                else:
                    pieces.append(Piece(data, self._remaining, self._fresh, self._size))
                    left -= length + PIECE_COST
                    self._fresh = False
                continue
            if not self._prefix and end - position >= PREFIX:
                flag, size = _PREFIX.unpack_from(view, position)
                position += PREFIX
            else:
                part = view[position : position + PREFIX - len(self._prefix)]
                position += len(part)
                self._prefix += part
                if len(self._prefix) < PREFIX:
                    break
                flag, size = _PREFIX.unpack(self._prefix)
                self._prefix = b""
            if not flag and size <= most and size <= end - position:
                pieces.append(Piece(view[position : position + size], 0, True, size))
                position += size
                left -= size + PIECE_COST
            else:
                self._begin(flag, size)
        self._http2.consumed(position)
        if position < end:
            inbox.appendleft(view[position:])
        return limit - left

    def _begin(self, flag: int, size: int) -> None:
        if flag > 1:
            raise RemoteProtocolError(f"gRPC: a message with flag {flag}")
        if size > self.settings.max_message:
            raise RemoteProtocolError(
                f"gRPC: a message of {size} bytes, at most {self.settings.max_message} are allowed"
            )
        if flag:
            if not size:
                raise RemoteProtocolError("gRPC: an empty message is said to be compressed")
            if self.gives_packed and size > COLLECTED:
                self._passer = Passer(size, self.settings.max_message)
            else:
                self._packed = bytearray()
        self._remaining = self._size = size
        self._fresh = True

    def _step(self, work: Unpacker | Passer, pieces: list[Piece], limit: int) -> int:
        """Do a step of unpacking. Returns what it cost."""
        piece = work.step(limit)
        if piece is None:
            return work.cost
        pieces.append(piece)
        if not piece.remaining:
            self._work = self._passer = None
        elif work is self._passer:
            self._work = None
        return work.cost + len(piece.data) + PIECE_COST

    @property
    def waiting(self) -> int:
        """Bytes received and not taken yet, of messages that are there in part or whole."""
        return sum(len(piece.data) for piece in self._pieces) + self._http2.waiting

    @property
    def ended(self) -> bool:
        """Whether the peer ended its side in order, and everything was taken."""
        left = self._pieces or self.busy or self._http2.inbox or self._prefix or self._remaining
        return self.peer_ended and not left

    def take(self, limit: int) -> list[Piece]:
        """The pieces that wait, about ``limit`` bytes of them; what is taken is granted to the peer again.

        It gives none while it is ``busy`` with a compressed message: call it again.
        """
        pieces, self._pieces = self._pieces, []
        return pieces or self._cut(limit)

    # Sending

    @property
    def queued(self) -> int:
        """Bytes given to `send` that are not in `data_to_send` yet."""
        return self._http2.queued

    def send(self, pieces: Sequence[Piece], now: float) -> None:
        """Queue pieces.

        Raises:
            LocalProtocolError: our side was ended.
            KasError: the call ended; as ``error``.
        """
        if self.error is not None:
            raise self.error
        if self._eof_queued:
            raise LocalProtocolError("this side was ended")
        self._liveness.on_moved(now)
        parts: list[bytes | memoryview] = []
        for piece in pieces:
            data, _, first, size = piece
            if first:
                flag = int(isinstance(piece, PackedPiece))
                if self._gzip_out and not flag and len(data) == size and size >= GZIP_WORTHWHILE:
                    data = zlib.compress(data, GZIP_LEVEL, 31)
                    flag, size = 1, len(data)
                parts.append(_PREFIX.pack(flag, size))
            if len(data) < JOINED:
                parts.append(data)
            else:
                self._queue(parts)
                self._http2.send(data)
        self._queue(parts)

    def _queue(self, parts: list[bytes | memoryview]) -> None:
        if parts:
            self._http2.send(b"".join(parts))
            parts.clear()

    def send_eof(self, status: int = OK, message: str = "") -> None:
        """Say after what is queued that nothing more comes.

        Args:
            status, message: as server, what the trailers say.
        """
        if self._eof_queued:
            return
        self._eof_queued = True
        if self.client:
            self._http2.end(None)
            return
        trailers = [("grpc-status", str(status))]
        if message:
            trailers.append(("grpc-message", quote(message[:MAX_REASON])))
        self._http2.end(trailers)

    @property
    def sendable(self) -> bool:
        """Whether `data_to_send` would give something."""
        return self._http2.sendable

    def data_to_send(self, limit: int) -> bytes:
        """Bytes for the peer: control frames, and up to ``limit`` bytes of messages as its windows allow."""
        return self._http2.data_to_send(limit)

    @property
    def finished(self) -> bool:
        """Whether all that was queued, and the end, has been given to `data_to_send`."""
        return self._http2.finished

    # Time and ends

    @property
    def last_heard(self) -> float:
        """When anything came from the peer."""
        return self._liveness.last_heard

    def next_deadline(self) -> float:
        """When `on_timeout` is due."""
        deadline = None if self.error is not None else self._liveness.next_deadline()
        return float("inf") if deadline is None else deadline

    def on_timeout(self, now: float, delivered: int = 0) -> None:
        """Send a ping into silence, or end the call if the last one was not answered. Harmless when nothing is due.

        Args:
            delivered: see `kas_libp2p.metadata.OverlayStream.delivered`: while it grows, the ping may be on its way.
        """
        if self.error is not None:
            return
        self._liveness.on_delivered(delivered, now)
        for act in self._liveness.on_timeout(now):
            if act is Act.PROBE:
                self._http2.ping()
            elif act is Act.HUNG:
                silent = now - self._liveness.last_heard
                self._fail(PathHung(f"the path hangs: nothing came for {silent:.1f} s, not even the answer to a ping"))

    def close(self) -> None:
        """Say that the connection ends, once. What is queued is dropped if the end was not queued before."""
        if not (self.finished and self.peer_ended) and self.error is None:
            self._http2.reset(ErrorCodes.CANCEL if self.client else ErrorCodes.NO_ERROR)
        self._http2.close()

    def lose(self, error: KasError) -> None:
        """The stream under us is gone."""
        self._fail(error)

    def _fail(self, error: KasError) -> None:
        if self.error is None:
            self.error = error
            self._http2.abandon()
