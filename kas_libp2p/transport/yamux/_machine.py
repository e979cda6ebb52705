"""Yamux: many streams over one connection. No I/O: plaintext goes in and out, time is passed in.

::

    version 0 | type | flags | stream id | length          12 bytes, big endian
                data            length bytes follow, and count against the receiver's window
                window update   the receiver may be sent length bytes more (with RST: length is an error code)
                ping            length is echoed
                go away         length is an error code

Rules

* The initiator's streams have odd ids, the responder's even ones. Each id is used once. Ids may arrive out of order by
  a little, as a peer with threads takes an id first and sends it later.
* A stream may be used at once; its acknowledgement leaves at once, as go opens no stream beyond 256 unacknowledged.
* Both sides start with 256 KiB of window per stream. Nobody sends more than was granted: a peer that does ends the
  connection, be it on an open stream, in the frame that opens one, or on a stream that is already closed.
* A frame may be as large as the window. Its payload is handed on as it comes.
* Reading grants again what was read, half a window at a time. A reader that does not read stalls its own stream only.
* A window doubles while its stream is read faster than one window per two round trips, so it settles at two to four
  times rate x round trip. If the peer has nothing left to send with until a grant reaches it, that waiting hides the
  rate: then one window per four is fast enough. Where the round trip is shorter than `NEAR`, up to `BUSY_WINDOW` it
  doubles while it is read in less than `BUSY`.
* All windows of a connection together stay below ``max_memory``; growth may take half of it, the other half is kept for
  new streams. When growth is refused, streams with larger windows than their share give back: what they read is not
  granted again until they are down to it.
* A closed stream (`close`) takes a little more from a peer that has not heard of it yet, then answers with a reset. A
  peer that does not close it too hears a reset after a while.
* Sending goes by turns; a stream that had nothing to send goes before those that always have.
* Whatever a peer can make us remember or answer is bounded: streams, unread bytes, answers that it does not fetch;
  floods of pings, of resets and of refused streams end the connection.

Sources: libp2p specs ``yamux/README.md`` (the hashicorp specification and its additions), ``error-codes``; the
behaviour of rust, go and js peers as measured.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NoReturn

from kas_libp2p.config import KIB, YamuxConfig
from kas_libp2p.errors import LocalProtocolError, Refused, RemoteProtocolError, StreamCode

PROTOCOL = "/yamux/1.0.0"
"""Its name in multistream-select and in Noise extensions."""
INITIAL_WINDOW = 256 * KIB
"""What the protocol grants every stream from the start."""
MAX_FRAME = 260 * KIB
"""Payload bytes of a frame we send: a stream's whole queue, with the heads that a session adds. rust refuses frames of
more than 1 MiB."""
TURNS = 5
"""Streams that share what is taken at once: a turn is a Noise message of five on a fast line, so that a frame costs
little beside its bytes on every connection of a circuit, and little on a slow one."""
NEAR = 0.01
"""Seconds: where the round trip is shorter, it is scheduling that takes the time, not distance, and what is under way
fills no router's queue."""
BUSY = 0.2
"""Seconds that the window of a near stream should last at least, up to `BUSY_WINDOW`. Until every process on the way
had its turn, many time slices of the system's may pass, of 3 ms each. And streams on one way share it equally only if
all their windows hold more than can be under way: with less, who has the larger window gets more. So all that are fast
get the same."""
BUSY_WINDOW = 4096 * KIB
"""Bytes: about what a circuit at full speed has under way on a host that its three processes share with others. With
half of it, one circuit was a tenth slower there; the first small message behind it waits 3 ms instead of 2."""
SMALL = 4 * KIB
"""Unread pieces below this size are joined, so that a peer's tiny frames don't cost more than their bytes."""
CONTROL_LIMIT = 64 * KIB
"""Bytes of answers (pongs, acknowledgements, grants, resets) that a peer may leave unfetched: 5461 frames."""
LINGER = 30.0
"""Seconds that a stream which is closed here may wait for the other side to close it too, before it is reset."""
SHORT_LINGER = 2.0
"""The same if the peer's writer is likely to wait for us to read: time for it to fetch what we sent last."""
RTT_SAMPLES = 8
"""Round trips of which the shortest counts: a single one may have waited behind bulk data."""
RTT_MAX_AGE = 10.0
"""Seconds after which a growing window wants a new round trip."""
ACK_BACKLOG = 256
"""Streams of ours that the peer may leave unacknowledged, before no more are opened (yamux/README.md, ACK backlog)."""
SKIPPED_IDS = 256
"""Ids that may still come after a higher one: a peer's unacknowledged streams."""

PING_BURST, PING_RATE = 64, 16.0
"""Pings that a peer may send at once, and per second; implementations send one per 10 to 30 s."""
RESET_BURST, RESET_RATE = 512, 64.0
"""Streams that a peer may open and reset itself; rust resets what its users drop."""
REFUSED_BURST, REFUSED_RATE = 1024, 64.0
"""Streams that a peer may open beyond its limits; it can't know them."""

HEADER_SIZE = 12
_header = struct.Struct(">BBHII")
_pack = _header.pack
_unpack_from = _header.unpack_from

_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_MAX_WINDOW = 0xFFFF_FFFF


class GoAway(IntEnum):
    """Why a side ends the connection."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


class Stream:
    """The state of one stream. Belongs to `Machine`; the shell reads it, and sets ``owner``, ``mark``, ``max_window``,
    ``raw``.

    Attributes:
        id: its number on the wire.
        outbound: whether we opened it.
        owner: what the shell keeps beside it.
        chunks: received, unread pieces, oldest first; of the first one ``offset`` bytes are read already.
        unread: their bytes.
        eof: whether the peer ended its direction.
        reset: ``(by_peer, code)`` once it was reset.
        queued: bytes to send that were not handed out yet.
        raw: whether ``chunks`` may be parts of what `Machine.receive` was given, which have to be taken before that is
            reused: that saves whoever takes them apart a copy.
        mark: `Machine.drained` tells when ``queued`` falls below it; the high-water mark, if nobody changes it.
        send_window: bytes that the peer still grants us.
        window: bytes that the peer may have sent beyond what was read, at most.
        max_window: to which it may grow; what is configured, if nobody changes it.
        allowed: bytes that the peer may still send.
        received, sent: payload bytes in all.
    """

    __slots__ = (
        "acknowledged",
        "allowed",
        "chunks",
        "closed",
        "eof",
        "epoch",
        "fin_sent",
        "fin_wanted",
        "fresh",
        "grant_at",
        "granted_at",
        "id",
        "incoming",
        "listed",
        "mark",
        "max_window",
        "offset",
        "outbound",
        "owner",
        "queue",
        "queue_offset",
        "queued",
        "raw",
        "read_before",
        "received",
        "reset",
        "send_window",
        "sent",
        "starved",
        "unread",
        "window",
    )

    def __init__(self, id: int, config: YamuxConfig, *, outbound: bool, now: float) -> None:
        self.id = id
        self.mark = config.send_high_water
        self.max_window = config.max_window
        self.raw = False
        self.outbound = outbound
        self.owner: Any = None
        self.chunks: deque[bytes] = deque()
        self.offset = 0
        self.unread = 0
        self.incoming: list[memoryview] = []
        self.eof = False
        self.reset: tuple[bool, int] | None = None
        self.closed = False
        self.acknowledged = False
        self.window = self.allowed = INITIAL_WINDOW
        self.grant_at = INITIAL_WINDOW // 2  # grant when allowed + unread is down to this
        self.epoch = self.granted_at = now  # the last grant but one, and the last
        self.read_before = 0.0
        self.fresh = -1  # the last grant, until what was granted before is used up; -1 from then on
        self.starved = False  # whether that was used up before the grant can have reached the peer
        self.queue: deque[bytes] = deque()
        self.queue_offset = 0
        self.queued = 0
        self.send_window = INITIAL_WINDOW
        self.listed = False
        self.fin_wanted = False
        self.fin_sent = False
        self.received = 0
        self.sent = 0

    def __repr__(self) -> str:
        return f"<yamux stream {self.id}>"


@dataclass(slots=True)
class Batch:
    """What a piece of plaintext brought.

    Attributes:
        opened: streams that the peer opened.
        changed: streams that have something for their reader, or that ended.
        pongs: value and seconds of each ping that was answered.
        refused: the limit that refused a stream, for each one.
    """

    opened: list[Stream] = field(default_factory=list)
    changed: list[Stream] = field(default_factory=list)
    pongs: list[tuple[int, float]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class _Bucket:
    """A token bucket: how often something may happen."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, burst: int, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = float(burst)
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Machine:
    """One side of one connection.

    Args:
        config: limits.
        initiator: whether we are the initiator: our ids are odd.
        now: seconds on a monotonic clock.
        rtt: a first round trip in seconds, if one was measured.

    Attributes:
        streams: open streams by id.
        drained: streams whose queue fell below its mark in `take`, or whose end left; the shell empties it.
        heard_at: seconds when the peer was last known to be alive; see `receive` and `heard`.
        rtt: the last round trip in seconds.
        stopped: whether this side takes no more streams.
        go_away_sent: whether the peer was told so.
        go_away_received: the peer's code, if it takes no more streams.
        hits: how often each limit said no.
        keepalive: seconds of silence after which a ping is sent; as configured, and may be changed.
    """

    __slots__ = (
        "_buckets",
        "_carry",
        "_config",
        "_control",
        "_frame",
        "_frame_fin",
        "_fresh",
        "_grown",
        "_growth_budget",
        "_highest",
        "_inbound",
        "_large",
        "_late",
        "_lingering",
        "_need",
        "_next_id",
        "_next_ping",
        "_parity",
        "_pings",
        "_ready",
        "_reserved",
        "_rtt_at",
        "_rtts",
        "_skipped",
        "_squeezed",
        "_touched",
        "_unacknowledged",
        "drained",
        "go_away_received",
        "go_away_sent",
        "heard_at",
        "hits",
        "keepalive",
        "rtt",
        "stopped",
        "streams",
    )

    def __init__(self, config: YamuxConfig, *, initiator: bool, now: float, rtt: float | None = None) -> None:
        self._config = config
        self.streams: dict[int, Stream] = {}
        self._next_id = 1 if initiator else 2
        self._parity = 0 if initiator else 1  # of the peer's ids
        self._highest = self._parity - 2 if self._parity else 0
        self._skipped: set[int] = set()
        self._inbound = 0
        self._unacknowledged = 0
        self._carry = b""
        self._need = 0
        self._frame: Stream | None = None
        self._frame_fin = False
        self._touched: list[Stream] = []
        self._control = bytearray()
        self._fresh: deque[Stream] = deque()
        self._ready: deque[Stream] = deque()
        self.drained: list[Stream] = []
        self._reserved = 0
        self._grown = 0
        self._growth_budget = config.max_memory // 2
        self._large = 0  # streams with more than the first window
        self._squeezed = 0  # streams that shared the growth when some was refused; 0 if none was
        self._late = 0
        self._lingering: dict[Stream, float] = {}
        self.heard_at = now
        self._pings: dict[int, float] = {}
        self._next_ping = 0
        self.rtt = rtt
        self._rtts: deque[float] = deque(() if rtt is None else (rtt,), maxlen=RTT_SAMPLES)
        self._rtt_at = now - RTT_MAX_AGE
        self.stopped = False
        self.go_away_sent = False
        self.go_away_received: int | None = None
        self._buckets: dict[str, _Bucket] = {}
        self.hits: Counter[str] = Counter()
        self.keepalive = config.keepalive

    # From the wire

    def receive(self, data: memoryview, now: float) -> Batch:
        """Take plaintext from the peer. ``data`` may be reused afterwards.

        Raises:
            RemoteProtocolError: the peer broke a rule. A "go away" is ready to be sent, the connection is over.
        """
        self.heard_at = now
        batch = Batch()
        try:
            self._parse(data, now, batch)
        finally:
            touched = self._touched
            if touched:
                for stream in touched:
                    self._settle(stream)
                batch.changed += touched
                touched.clear()
        if len(self._control) > CONTROL_LIMIT:
            self._violation("the peer keeps asking, but does not fetch the answers")
        return batch

    def heard(self, now: float) -> None:
        """The peer is alive, though what came is no whole message yet: on a slow line one may take long."""
        self.heard_at = now

    def _parse(self, data: memoryview, now: float, batch: Batch) -> None:
        start = 0
        size = len(data)
        if self._carry:
            start = min(HEADER_SIZE - len(self._carry), size)
            self._carry += data[:start]
            if len(self._carry) < HEADER_SIZE:
                return
            carry, self._carry = self._carry, b""
            self._begin_frame(carry, 0, now, batch)
        while True:
            need = self._need
            if need:
                stop = start + need
                if stop > size:
                    stop = size
                stream = self._frame
                if stream is not None and stop > start:
                    if not stream.incoming:
                        self._touched.append(stream)
                    stream.incoming.append(data[start:stop])
                    stream.allowed -= stop - start
                self._need = need - (stop - start)
                start = stop
                if self._need:
                    return
                if self._frame_fin:
                    self._frame_fin = False
                    if stream is not None:
                        self._end(stream, batch)
                self._frame = None
            if size - start < HEADER_SIZE:
                if start < size:
                    self._carry = bytes(data[start:])
                return
            self._begin_frame(data, start, now, batch)
            start += HEADER_SIZE

    def _begin_frame(self, data: bytes | memoryview, start: int, now: float, batch: Batch) -> None:
        version, kind, flags, id, length = _unpack_from(data, start)
        if version:
            self._violation(f"version {version} in a header")
        if kind <= _WINDOW_UPDATE:
            stream = self.streams.get(id)
            if flags & _SYN:
                stream = self._accept(id, kind, length, now, batch)
            if stream is None:
                self._stray(id, kind, flags, length)
                return
            if flags & _ACK and not stream.acknowledged:
                stream.acknowledged = True
                if stream.outbound:
                    self._unacknowledged -= 1
            if flags & _RST:
                self._reset_by_peer(stream, length if kind == _WINDOW_UPDATE else 0, now, batch)
                if kind == _DATA:
                    self._need = length
                return
            if kind == _DATA:
                if length:
                    if length > stream.allowed:
                        self._violation(f"stream {id} got {length} bytes, but only {stream.allowed} were granted")
                    if stream.eof:
                        self._violation(f"stream {id} got data behind its end")
                    self._need = length
                    if stream.closed and stream.allowed - length <= stream.grant_at and stream.fin_sent:
                        stream.allowed -= length
                        self.reset(stream)
                    else:
                        self._frame = stream
                        self._frame_fin = bool(flags & _FIN)
                    return
            elif length:
                stream.send_window += length
                if stream.send_window > _MAX_WINDOW:
                    self._violation(f"stream {id} was granted more than {_MAX_WINDOW} bytes")
                if stream.queued and not stream.listed:
                    stream.listed = True
                    self._ready.append(stream)
            if flags & _FIN:
                self._end(stream, batch)
        elif kind == _PING:
            if flags & _SYN:
                if not self._bucket("ping", PING_BURST, PING_RATE, now):
                    self._violation("a flood of pings")
                self._say(_PING, _ACK, 0, length)
            else:
                sent = self._pings.pop(length, None)
                if sent is not None:  # an answer that nobody asked for harms nobody
                    self.rtt = now - sent
                    self._rtts.append(self.rtt)
                    self._rtt_at = now
                    batch.pongs.append((length, self.rtt))
        elif kind == _GO_AWAY:
            self.go_away_received = length
        else:
            self._violation(f"frame type {kind}")

    def _accept(self, id: int, kind: int, length: int, now: float, batch: Batch) -> Stream | None:
        if id & 1 != self._parity or not id:
            self._violation(f"the peer opened stream {id}, whose id is not its to use")
        if id in self.streams:
            self._violation(f"the peer opened stream {id} twice")
        if id > self._highest:
            self._skipped.update(range(max(self._highest + 2, id - 2 * SKIPPED_IDS), id, 2))
            if len(self._skipped) > SKIPPED_IDS:
                self._skipped = set(sorted(self._skipped)[-SKIPPED_IDS:])
            self._highest = id
        elif id in self._skipped:
            self._skipped.remove(id)
        else:
            self._violation(f"the peer opened stream {id} again")
        if kind == _DATA and length > INITIAL_WINDOW:
            self._violation(f"stream {id} was opened with {length} bytes, but only {INITIAL_WINDOW} are granted")
        limit = ""
        if self.stopped:
            limit = "closing"
        elif self._inbound >= self._config.max_inbound_streams:
            limit = "yamux.max_inbound_streams"
        elif self._reserved + INITIAL_WINDOW > self._config.max_memory:
            limit = "yamux.max_memory"
        if limit:
            self._late += INITIAL_WINDOW
            self._say(_WINDOW_UPDATE, _RST, id, StreamCode.RESOURCES)
            self.hits[limit] += 1
            batch.refused.append(limit)
            if not self._bucket("refused", REFUSED_BURST, REFUSED_RATE, now):
                self._violation("a flood of streams beyond the limit")
            return None
        stream = Stream(id, self._config, outbound=False, now=now)
        stream.acknowledged = True
        self.streams[id] = stream
        self._inbound += 1
        self._reserved += INITIAL_WINDOW
        self._say(_WINDOW_UPDATE, _ACK, id, 0)
        batch.opened.append(stream)
        return stream

    def _stray(self, id: int, kind: int, flags: int, length: int) -> None:
        """A frame for a stream that is no more: the peer may not have heard yet. Or for one that never was."""
        ours = id & 1 != self._parity
        known = id and (id < self._next_id if ours else id <= self._highest and id not in self._skipped)
        if not known:
            self._violation(f"a frame for stream {id}, which was never opened")
        if kind == _DATA:
            self._late -= length
            if self._late < 0:
                self._violation(f"closed streams got more bytes than were granted, the last one was stream {id}")
            self._need = length
            self._frame = None

    def _settle(self, stream: Stream) -> None:
        views = stream.incoming
        pieces: list[bytes | memoryview]
        pieces = [*views] if stream.raw else [bytes(views[0]) if len(views) == 1 else b"".join(views)]
        views.clear()
        if stream.closed:  # closed by what follows in the same batch
            return
        size = sum(map(len, pieces))
        stream.received += size
        stream.unread += size
        if stream.allowed <= stream.fresh:
            stream.fresh = -1
            stream.starved = self.heard_at - stream.granted_at < min(self._rtts, default=0.0)
        chunks = stream.chunks
        if size < SMALL and chunks and len(chunks[-1]) < SMALL and (len(chunks) > 1 or not stream.offset):
            chunks[-1] = b"".join([chunks[-1], *pieces])
        else:
            chunks += pieces  # type: ignore[arg-type]  # whoever sets `raw` knows

    def _end(self, stream: Stream, batch: Batch) -> None:
        if stream.eof:
            return
        stream.eof = True
        batch.changed.append(stream)
        # Nothing more will come: keep room for what is unread only. What this batch holds is not settled yet.
        coming = 0 if stream.closed else sum(map(len, stream.incoming))
        self._resize(stream, stream.unread + coming)
        stream.allowed = 0
        if stream.closed:
            self._lingering.pop(stream, None)
        if stream.fin_sent:
            self._forget(stream)

    def _reset_by_peer(self, stream: Stream, code: int, now: float, batch: Batch) -> None:
        if not stream.outbound and not self._bucket("reset", RESET_BURST, RESET_RATE, now):
            self._violation("a flood of streams that are opened and reset")
        self._drop(stream, (True, code))
        batch.changed.append(stream)

    # From this side

    def open(self, now: float) -> Stream:
        """Open a stream. It can be used at once.

        Raises:
            Refused: a limit of ours is reached; says which.
            LocalProtocolError: a side has said that it goes away, or all ids are used up.
        """
        if self.stopped or self.go_away_received is not None:
            raise LocalProtocolError("the connection is closing, it takes no new streams")
        if self._next_id > 0xFFFF_FFFF:
            raise LocalProtocolError("all stream ids of this connection are used up")
        for limit, full in (
            ("yamux.max_outbound_streams", len(self.streams) - self._inbound >= self._config.max_outbound_streams),
            ("yamux acknowledgements", self._unacknowledged >= ACK_BACKLOG),
            ("yamux.max_memory", self._reserved + INITIAL_WINDOW > self._config.max_memory),
        ):
            if full:
                self.hits[limit] += 1
                raise Refused(limit, f"this connection has {len(self.streams)} streams, {limit} allows no more")
        stream = Stream(self._next_id, self._config, outbound=True, now=now)
        self._next_id += 2
        self.streams[stream.id] = stream
        self._reserved += INITIAL_WINDOW
        self._unacknowledged += 1
        # In a frame of its own: some peers ignore the payload of the frame that opens a stream.
        self._say(_WINDOW_UPDATE, _SYN, stream.id, 0)
        return stream

    def write(self, stream: Stream, data: bytes) -> None:
        """Queue data. The caller sees to it that ``queued`` stays bounded, and that the stream can be written to."""
        stream.queue.append(data)
        stream.queued += len(data)
        if not stream.listed and stream.send_window:
            stream.listed = True
            self._fresh.append(stream)

    def write_all(self, stream: Stream, pieces: Sequence[bytes]) -> None:
        """Queue several pieces; see `write`."""
        stream.queue += pieces
        stream.queued += sum(map(len, pieces))
        if not stream.listed and stream.send_window:
            stream.listed = True
            self._fresh.append(stream)

    def finish(self, stream: Stream) -> None:
        """End our direction, behind what is queued."""
        if not stream.fin_wanted and stream.reset is None:
            stream.fin_wanted = True
            if not stream.listed and (not stream.queued or stream.send_window):
                stream.listed = True
                self._fresh.append(stream)

    def reset(self, stream: Stream, code: int = 0) -> None:
        """End both directions at once."""
        if stream.id in self.streams and stream.reset is None:
            self._late += stream.allowed - (self._need if self._frame is stream else 0)
            self._say(_WINDOW_UPDATE, _RST, stream.id, code)
        self._drop(stream, stream.reset or (False, code))

    def close(self, stream: Stream, now: float) -> None:
        """End our direction behind what is queued, and read no more."""
        if stream.closed:
            return
        stream.closed = True
        stream.chunks.clear()
        stream.incoming.clear()
        stream.offset = 0
        stream.unread = 0
        if stream.eof:
            self._resize(stream, 0)
        if stream.id in self.streams:
            self.finish(stream)
            self._lingering[stream] = now + (SHORT_LINGER if stream.allowed <= stream.grant_at else LINGER)

    def consumed(self, stream: Stream, now: float) -> bool:
        """Grant what was read. To be called when ``allowed + unread <= grant_at``; harmless otherwise.

        Returns:
            whether there is something to send now.
        """
        if stream.eof:
            self._resize(stream, stream.unread)
            return False
        if stream.closed or stream.reset is not None:
            return False
        held = stream.allowed + stream.unread
        read, before = 1 - held / stream.window, stream.read_before  # parts of a window
        elapsed, in_all = now - stream.granted_at, now - stream.epoch
        stream.epoch, stream.granted_at, stream.read_before = stream.granted_at, now, read
        rtt = min(self._rtts, default=0.0)
        span = BUSY if rtt < NEAR and stream.window < BUSY_WINDOW else (4 if stream.starved else 2) * rtt
        asked = False
        # Over the last two grants as well: a burst gives two in a row, however long the next burst takes to come.
        if read * span > elapsed and (read + before) * span > in_all:
            if stream.window < stream.max_window:
                self._grow(stream)
            if now - self._rtt_at >= RTT_MAX_AGE and not self._pings:
                self.ping(now)
                asked = True
        if self._squeezed:
            self._squeeze(stream, held)
        grant = stream.window - held
        if held > stream.grant_at or not grant:
            return asked
        # Little left says nothing: it is soon used up in a window that has just grown, too.
        stream.fresh, stream.starved = grant if stream.allowed > stream.window // 4 else -1, False
        stream.allowed += grant
        self._say(_WINDOW_UPDATE, 0, stream.id, grant)
        return True

    def _grow(self, stream: Stream) -> None:
        window = min(2 * stream.window, stream.max_window)
        more = window - stream.window
        if self._grown + more <= self._growth_budget and self._reserved + more <= self._config.max_memory:
            self._resize(stream, window)
        else:
            self._squeezed = self._large + (stream.window == INITIAL_WINDOW)

    def _squeeze(self, stream: Stream, held: int) -> None:
        if self._grown <= self._growth_budget // 2:
            self._squeezed = 0
            return
        share = INITIAL_WINDOW + self._growth_budget // self._squeezed
        if stream.window > share:
            self._resize(stream, max(share, held))

    def _resize(self, stream: Stream, window: int) -> None:
        self._reserved += window - stream.window
        self._grown += max(0, window - INITIAL_WINDOW) - max(0, stream.window - INITIAL_WINDOW)
        self._large += (window > INITIAL_WINDOW) - (stream.window > INITIAL_WINDOW)
        stream.window = window
        stream.grant_at = window // 2

    def ping(self, now: float) -> int:
        """Send a ping.

        Returns:
            the value that `Batch.pongs` will name.
        """
        value = self._next_ping
        self._next_ping = (value + 1) & 0xFFFF_FFFF
        self._pings[value] = now
        self._say(_PING, _SYN, 0, value)
        return value

    def stop(self) -> None:
        """Open and take no more streams. The peer is told with the reset of a stream that it opens."""
        self.stopped = True

    def go_away(self, code: int = GoAway.NORMAL) -> None:
        """Tell the peer that no more streams are taken, and why."""
        self.stopped = True
        if not self.go_away_sent:
            self.go_away_sent = True
            self._say(_GO_AWAY, 0, 0, code)

    @property
    def reserved(self) -> int:
        """Bytes of received, unread data that this connection may come to hold at most, as things stand."""
        return self._reserved

    # To the wire

    @property
    def pending(self) -> bool:
        """Whether `take` would give something."""
        return bool(self._control or self._fresh or self._ready)

    def sendable(self) -> bool:
        """Whether anything is queued, be it only as the peer's windows allow it later."""
        return self.pending or any(stream.queued for stream in self.streams.values())

    def take(self, limit: int) -> tuple[list[bytes | memoryview], int]:
        """Take what is to be sent next, in order.

        Args:
            limit: about how many bytes; answers come on top, and the rest of a turn of a `TURNS`th of it.

        Returns:
            pieces, and how many bytes they have together; nothing if there is nothing to send.
        """
        pieces: list[bytes | memoryview] = []
        size = 0
        turn = max(1, -(-limit // TURNS) - HEADER_SIZE)
        if self._control:
            pieces.append(bytes(self._control))
            size = len(self._control)
            self._control.clear()
            limit += size
        fresh, ready = self._fresh, self._ready
        while size < limit and (fresh or ready):
            stream = fresh.popleft() if fresh else ready.popleft()
            most = turn if fresh or ready else max(limit - size - HEADER_SIZE, 1)
            queued = stream.queued
            count = min(queued, stream.send_window, most, MAX_FRAME)
            rest = queued - count
            fin = stream.fin_wanted and not rest
            if count:
                pieces.append(_pack(0, _DATA, 0, stream.id, count))
                size += HEADER_SIZE + count
                stream.queued = rest
                stream.send_window -= count
                stream.sent += count
                self._pull(stream, count, pieces)
                if rest < stream.mark <= queued:
                    self.drained.append(stream)
            if fin:  # in a frame of its own: js-libp2p drops the data of a frame that ends its stream
                pieces.append(_pack(0, _DATA, _FIN, stream.id, 0))
                size += HEADER_SIZE
            if rest and stream.send_window:
                ready.append(stream)
            else:
                stream.listed = False
            if fin:
                stream.fin_sent = True
                self.drained.append(stream)
                if stream.eof:
                    self._forget(stream)
        return pieces, size

    def _pull(self, stream: Stream, count: int, pieces: list[bytes | memoryview]) -> None:
        queue = stream.queue
        offset = stream.queue_offset
        if not offset and not stream.queued:
            pieces += queue
            queue.clear()
            return
        while count:
            piece = queue[0]
            here = len(piece) - offset
            if here <= count:
                queue.popleft()
                pieces.append(memoryview(piece)[offset:] if offset else piece)
                offset = 0
                count -= here
            else:
                pieces.append(memoryview(piece)[offset : offset + count])
                offset += count
                count = 0
        stream.queue_offset = offset

    # Time

    @property
    def pinging(self) -> bool:
        """Whether a ping waits for its answer."""
        return bool(self._pings)

    def next_deadline(self) -> float:
        """When `on_timeout` wants to be called. May move later by itself, never earlier but by a call of this side."""
        if self._pings:
            deadline = max(self.heard_at, next(iter(self._pings.values()))) + self._config.ping_timeout
        else:
            deadline = self.heard_at + self.keepalive
        return min(deadline, *self._lingering.values()) if self._lingering else deadline

    def on_timeout(self, now: float) -> str | None:
        """Do what is due.

        Returns:
            why the connection is dead, or ``None``.
        """
        for stream in [stream for stream, due in self._lingering.items() if due <= now]:
            self.reset(stream)
        # The same sums as in `next_deadline`: rounded otherwise, a deadline would be met and nothing be due.
        if self._pings:
            since = max(self.heard_at, next(iter(self._pings.values())))
            if now >= since + self._config.ping_timeout:
                return f"the peer said nothing and left a ping unanswered for {now - since:.0f} s"
        elif now >= self.heard_at + self.keepalive:
            self.ping(now)
        return None

    # Inside

    def _say(self, kind: int, flags: int, id: int, length: int) -> None:
        self._control += _pack(0, kind, flags, id, length)

    def _bucket(self, name: str, burst: int, rate: float, now: float) -> bool:
        bucket = self._buckets.get(name)
        if bucket is None:  # made when needed: most connections never need one
            bucket = self._buckets[name] = _Bucket(burst, rate)
        return bucket.take(now)

    def _violation(self, what: str) -> NoReturn:
        self._need = 0
        self.go_away(GoAway.PROTOCOL_ERROR)
        raise RemoteProtocolError(f"yamux: {what}")

    def _drop(self, stream: Stream, reset: tuple[bool, int]) -> None:
        stream.reset = reset
        stream.closed = True
        stream.queue.clear()
        stream.queued = stream.queue_offset = 0
        stream.chunks.clear()
        stream.incoming.clear()
        stream.unread = stream.offset = stream.allowed = 0
        if stream.listed:
            stream.listed = False
            for streams in (self._fresh, self._ready):
                if stream in streams:
                    streams.remove(stream)
        if self._frame is stream:
            self._frame = None
            self._frame_fin = False
        self._resize(stream, 0)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        self._lingering.pop(stream, None)
        if stream.outbound:
            if not stream.acknowledged:
                self._unacknowledged -= 1
        else:
            self._inbound -= 1
