"""A session: one byte stream in each direction, over paths that come and go. No I/O.

A path is one libp2p stream, known here by a number that is used once. Data is sent on one of them, the *current* one,
and taken from all. What was sent is kept until the other side says that it has it, and what comes is put in order by
its offset, so it does not matter which path brings it, or how often.

Moving
    Who moves sends ATTACH on a new path, and goes on with the old one until WELCOME comes. The other side switches when
    the ATTACH comes. Both end their direction of the old path behind what they sent there, and read it to its end. A
    path is over when both directions have ended, and all that was sent there is acknowledged.

    ATTACH has a rank: its turn, and with equal turns the session's opener goes first. What ranks below something that
    is known already is refused with SUPERSEDED. So two attaches that cross end on the same path on both sides: each
    sees the other one's, and the one with the lower rank is withdrawn. Whoever is refused learns the highest turn, so
    the next attempt is above it.

    Who switches by a WELCOME acknowledges anew on the new path: what it acknowledged on the old one meanwhile may be
    lost without anybody noticing, if that one's connection ends after both have ended the stream.

Losing
    What was sent on a path that is lost is sent again on the current one, as far as it is not acknowledged. Each path
    knows the lowest and the highest offset that it carried; all between is sent again, which may be more than needed,
    as duplicates cost nothing but their bytes.

    The other side may not notice that a path is gone. So the next frame that can say so has the flag LOST: what was
    sent on paths older than this one has to be sent again. Where nobody says anything, timers do.

    Without any path the session waits for ``patience`` seconds.

Memory
    What is written and not acknowledged stays within the window, if the writer heeds ``room``; what came and is not
    read, within the window, or the other side has broken the protocol. That one begins small, and grows by what is
    read. Small pieces are joined, so that their number is bounded, too.

Signs of life
    While anything may be owed, silence on the current path for `PROBE_AFTER` is answered with a PROBE, and silence for
    `ANSWER_WITHIN` after that means that the path hangs. It is dropped as if it were lost. A session on which nothing
    has moved for `OWED_FOR` has no timer: the connection under it has its own keepalive.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from kas_libp2p.config import KIB
from kas_libp2p.errors import LocalProtocolError, RemoteProtocolError
from kas_libp2p.session import _wire
from kas_libp2p.session._wire import Ack, Attach, Code, Control, Fin, Open, Parser, Reset, Welcome

INITIAL_LIMIT = 256 * KIB
"""Bytes that everybody takes before a WELCOME or an OPEN has told more: what is said first need not wait. The window
grows from there by what is read, as a stranger's whose first bytes nobody has read yet need not be larger."""
FRAME = 256 * KIB
"""Bytes up to which pieces that wait to be sent share a frame. A frame costs both sides 3 us in all, as much as 64 KiB
of data."""
SMALL = 4 * KIB
"""Bytes below which a piece is joined with the one before it: a window full of single bytes would take forty times its
size. Also those below which header and payload are one piece."""
MAX_RUNS = 16
"""Pieces of the other direction that are kept beyond a gap. Each path that is stuck makes a gap or two."""
MAX_PATHS = 4
"""Paths at once: the current one, one that is being attached, and old ones, of which the oldest is given up."""
MAX_TURN = 2**32 - 1

ACK_PART = 4
"""An acknowledgement is due for each quarter of the window that came, if it did not leave with something else before:
one that leaves alone costs what 64 KiB of data do."""
LIMIT_PART = 4
"""And for each quarter of it that was read since the last one."""
ASK_PART = 2
"""A side whose window is half full asks: the other one's, by which that acknowledges, may be larger."""
TELL_AFTER = 1.0
"""Seconds until whoever sends hears of what came, however little it was: below `PROBE_AFTER`, so that a flow in one
direction needs no probes."""
PROBE_AFTER = 1.5
"""Seconds of silence, while something may be owed, after which the other side is asked. On a healthy path that carries
something, something comes every `TELL_AFTER` and a round trip."""
ANSWER_WITHIN = 2.5
"""Seconds for the answer: a long relayed round trip (0.6 s at the 95th percentile), and TCP sending it again once."""
ATTACH_WITHIN = PROBE_AFTER + ANSWER_WITHIN
"""Seconds for the answer to an ATTACH."""
DRAIN_WITHIN = 3.0
"""Seconds without progress that an old path may take to come to its end: two long round trips, and time for TCP to send
its last segment again. Whoever is wrong about it has sent some bytes twice; who waits holds up what came by the new
path."""
MOVED_AWAY = 1.0
"""Seconds for the ATTACH of a side that has ended the current path: it left on another path before that."""
OWED_FOR = 120.0
"""Seconds after the last byte for which something may be owed above: kaspad's own patience (``DEFAULT_TIMEOUT``)."""
LINGER = 5.0
"""Seconds for an end in order after `Session.close`."""
LATE = 1.0
"""Seconds by which a timer may be late before its silence counts for nothing: the process was stopped, not the path."""


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended.

    Attributes:
        code: a `Code`, or a peer's that we don't know.
        reason: in words.
        by_peer: whether the other side ended it.
    """

    code: int
    reason: str
    by_peer: bool


@dataclass(frozen=True, slots=True)
class EndPath:
    """End our direction of this path's stream, behind everything that was taken for it, and read on.

    Attributes:
        last: to be written before.
    """

    path: int
    last: bytes


@dataclass(frozen=True, slots=True)
class DropPath:
    """Reset this path's stream. It is none of the session's any more.

    Attributes:
        last: if not empty, to be written before, and to be given the time to leave.
    """

    path: int
    code: int
    reason: str
    last: bytes


@dataclass(frozen=True, slots=True)
class PathOver:
    """This path has come to its end in order. It is none of the session's any more."""

    path: int


@dataclass(frozen=True, slots=True)
class Hung:
    """This path hangs. `DropPath` follows.

    Attributes:
        silent_for: seconds in which nothing was heard on it.
        asked: whether the other side was asked for something on it meanwhile. Of an old path nothing is asked.
    """

    path: int
    silent_for: float
    asked: bool


@dataclass(frozen=True, slots=True)
class Switched:
    """Data is sent on this path from now on.

    Attributes:
        previous: the path on which it was sent before; ``None`` if there was none just now.
        by_us: whether this side has attached it.
        resent: bytes that have to be sent again.
        waited: seconds without any path.
    """

    path: int
    previous: int | None
    by_us: bool
    resent: int
    waited: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The last path was lost. The session ends unless another one is attached within its patience."""

    path: int
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke the protocol. `Ended` follows."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over. Comes once, and last."""

    end: End


Command = EndPath | DropPath | PathOver | Hung | Switched | Waiting | Broken | Ended


class _Path:
    """One stream.

    Attributes:
        rank: twice the turn, plus one if the session's opener has attached it.
        by_us: whether we opened the stream.
        answered: whether the first frame of the other side has come.
        control: first frame, as long as it was not taken.
        low, high: the lowest offset that was sent on it, and the end of the highest; equal if there was none.
        heard: seconds when it last brought something, or made progress.
        probed: seconds when its silence was last asked about; later than ``heard``: and not answered yet.
        delivered: what was last told of it.
        ended: whether our direction is over.
        eof_at: seconds when the other direction ended; infinite before.
        gone: whether it is none of ours any more.
        proven: whether the other side is known to send on it, or to be able to: something came behind an ATTACH.
        told_lost: the highest rank of a lost path when our ATTACH was made, if that said LOST.
    """

    __slots__ = (
        "answered",
        "by_us",
        "control",
        "delivered",
        "ended",
        "eof_at",
        "gone",
        "heard",
        "high",
        "low",
        "number",
        "parser",
        "probed",
        "proven",
        "rank",
        "told_lost",
    )

    def __init__(self, number: int, rank: int, parser: Parser, now: float, *, by_us: bool) -> None:
        self.number = number
        self.rank = rank
        self.parser = parser
        self.by_us = by_us
        self.answered = not by_us
        self.control = b""
        self.low = self.high = 0
        self.heard = now
        self.probed = -math.inf
        self.delivered = -1
        self.ended = False
        self.eof_at = math.inf
        self.gone = False
        self.proven = False
        self.told_lost = 0


class Session:
    """One side of one session.

    Its offsets count payload bytes of one direction from the start of the session.

    Args:
        id: 16 bytes.
        opener: whether this side opens it.
        window: bytes of each direction that may be kept here; `INITIAL_LIMIT` at least.
        instance: 8 bytes, ours.
        patience: seconds that it may be without any path.
        now: seconds on a monotonic clock.

    Attributes:
        established: whether the other side is known to have it.
        ended: how it ended; ``None`` while it has not.
        closed: whether `close` was called.
        peer_instance: of the other side's node; ``None`` while it has said nothing.
        moves: how often another path became the current one.
        received: bytes of the other direction that came, without a gap.
        unread: bytes of it that wait to be read.
        ahead: bytes of it that are kept beyond a gap.
        acked: bytes of ours that the other side is known to have.
        ack_due: whether an acknowledgement is to be sent.
        sent: bytes of ours that were sent at least once.
        duplicate: bytes that came again.
        resent: bytes that were sent again.
        deadline: seconds at which `on_timeout` has to be called; may be earlier than needed, infinite if there is none.
    """

    __slots__ = (
        "_ack_each",
        "_again",
        "_again_at",
        "_again_head",
        "_ahead",
        "_ask_at",
        "_awake",
        "_base",
        "_coming",
        "_commands",
        "_current",
        "_fin_acked",
        "_fin_ever",
        "_fin_sent",
        "_fin_wanted",
        "_grant_at",
        "_instance",
        "_limit",
        "_linger_at",
        "_lost_at",
        "_lost_ranks",
        "_moved",
        "_opener",
        "_paths",
        "_patience",
        "_peer_final",
        "_probe_due",
        "_rank",
        "_read_head",
        "_reason",
        "_sent",
        "_tell_at",
        "_told_limit",
        "_told_received",
        "_turn",
        "_unread",
        "_unsent",
        "_unsent_head",
        "_window",
        "_written",
        "ack_due",
        "acked",
        "ahead",
        "closed",
        "deadline",
        "duplicate",
        "ended",
        "established",
        "id",
        "moves",
        "peer_instance",
        "received",
        "resent",
        "sent",
        "unread",
    )

    def __init__(self, id: bytes, *, opener: bool, window: int, instance: bytes, patience: float, now: float) -> None:
        self.id = id
        self._opener = opener
        self._window = window = max(window, INITIAL_LIMIT)
        self._ack_each = window // ACK_PART
        self._instance = instance
        self._patience = patience
        self.peer_instance: bytes | None = None
        self.established = not opener
        self.ended: End | None = None
        self.closed = False

        self._paths: list[_Path] = []
        self._current: _Path | None = None
        self._coming: _Path | None = None  # our ATTACH is on its way
        self._turn = 0  # the highest seen
        self._rank = 0  # of the path that became the current one last
        self._lost_ranks: frozenset[int] = frozenset()  # of paths whose loss the other side may not know of
        self._lost_at = now
        self._reason = "no path yet"
        self.moves = 0
        self._commands: list[Command] = []

        self._unsent: list[bytes] = []
        self._unsent_head = 0  # bytes of its first piece that are sent already
        self._sent: list[bytes] = []  # and not acknowledged
        self._base = 0  # offset of its first byte
        self._again: list[bytes] = []  # to be sent again
        self._again_head = 0
        self._again_at = 0  # offset of its next byte
        self._written = 0
        self.sent = 0
        self.acked = 0
        self._ask_at = window // ASK_PART  # when so much was sent, and as much is in flight, an answer is asked for
        self._limit = INITIAL_LIMIT  # offset up to which we may send
        self._fin_wanted = False
        self._fin_sent = False  # and, as far as we know, on its way
        self._fin_ever = False
        self._fin_acked = False
        self.resent = 0

        self._unread: list[bytes] = []
        self._read_head = 0  # bytes of its first piece that are read already
        self.unread = 0
        self.received = 0
        self._ahead: list[_Run] | None = None
        self.ahead = 0
        self.duplicate = 0
        self._peer_final: int | None = None
        self._told_received = 0
        self._told_limit = INITIAL_LIMIT
        self._grant_at: float = INITIAL_LIMIT // LIMIT_PART  # when so much is read, more may be granted

        self.ack_due = False
        self._probe_due = False
        self._awake = False  # whether silence is watched
        self._moved = now
        self._tell_at = math.inf
        self._linger_at = math.inf
        self.deadline = now + patience

    def __repr__(self) -> str:
        return f"<session {self.id.hex()[:8]}>"

    # Facts

    @property
    def current(self) -> int | None:
        """The path on which data is sent."""
        return self._current.number if self._current is not None else None

    @property
    def lost_at(self) -> float | None:
        """Since when, in seconds, there is no path; ``None``: there is one, or the session has ended."""
        return self._lost_at if self._current is None and self.ended is None else None

    @property
    def attaching(self) -> int | None:
        """The path on which our ATTACH was not answered yet."""
        return self._coming.number if self._coming is not None else None

    @property
    def paths(self) -> tuple[int, ...]:
        """All paths that belong to it, oldest first."""
        return tuple([each.number for each in self._paths])

    @property
    def in_flight(self) -> int:
        """Bytes written here that the other side is not known to have."""
        return self._written - self.acked

    @property
    def unsent(self) -> int:
        """Bytes written here that were never sent."""
        return self._written - self.sent

    @property
    def room(self) -> int:
        """Bytes that may be written; negative if one piece went beyond."""
        return self._window + self.acked - self._written

    @property
    def readable(self) -> bool:
        """Whether `read` gives something."""
        return bool(self._unread)

    @property
    def complete(self) -> bool:
        """Whether the other direction has come, its end included."""
        return self.received == self._peer_final

    @property
    def eof(self) -> bool:
        """Whether the other direction is over, and was read."""
        return self.received == self._peer_final and not self._unread

    @property
    def finished(self) -> bool:
        """Whether our direction was ended: nothing more may be written."""
        return self._fin_wanted

    @property
    def asks(self) -> bool:
        """Whether the next `take` for the current path has a PROBE in it because that path is silent."""
        return self._probe_due

    # The user's side

    def write(self, data: bytes) -> None:
        """Queue some bytes, which are kept by reference. May go beyond `room` by one piece.

        Raises:
            LocalProtocolError: our direction was ended.
        """
        if self.ended is not None or not data:
            return
        if self._fin_wanted:
            raise LocalProtocolError("written behind the end of this direction")
        size = len(data)
        self._written += size
        if size < SMALL:
            _append(self._unsent, data)
        else:
            self._unsent.append(data)

    def read(self, max_bytes: int | None = None) -> bytes | None:
        """One piece of what came; ``None`` if there is none.

        Args:
            max_bytes: no more than this.
        """
        unread = self._unread
        if not unread:
            return None
        piece, head = unread[0], self._read_head
        size = len(piece) - head
        if max_bytes is not None and max_bytes < size:
            self._read_head = head + max_bytes
            piece = piece[head : head + max_bytes]
            size = max_bytes
        else:
            del unread[0]
            if head:
                piece = piece[head:]
                self._read_head = 0
        self.unread -= size
        if not self.ack_due and self.received - self.unread >= self._grant_at:
            self.ack_due = True
        return piece

    def finish(self, now: float) -> None:
        """End our direction behind what was written. May be called again."""
        if self.ended is None and not self._fin_wanted:
            self._fin_wanted = True
            self._stir(now)

    def close(self, now: float) -> None:
        """End it in order: what was written is delivered, what comes is thrown away. Over within `LINGER`."""
        if self.closed:
            return
        self._unread.clear()
        self.unread = self._read_head = 0
        if self.ended is not None:
            return
        self.closed = True
        self._linger_at = now + LINGER
        self.ack_due = True
        self.finish(now)
        self._schedule(now)

    def reset(self, code: int, reason: str, now: float) -> None:
        """End it at once, and tell the other side why."""
        if self.ended is None:
            self._end(End(code, reason, by_peer=False))

    def forget(self, code: int, reason: str) -> None:
        """Give up what came before it ended and was not read. Who reads is told this reason, and no end in order."""
        if self.ended is not None and self._unread:
            self._unread = []
            self.unread = self._read_head = 0
            self._peer_final = None
            self.ended = End(code, reason, by_peer=False)

    # Paths

    def open(self, path: int, now: float) -> None:
        """The opener's first path."""
        entry = self._add(path, 1, Parser(), now, by_us=True)
        entry.control = _wire.encode_open(Open(self._grant(), self.id, self._instance))
        self._current, self._rank = entry, 1
        self._stir(now)
        self._schedule(now)

    def accept(self, path: int, parser: Parser, first: Open, now: float) -> None:
        """The other side's first path.

        Args:
            parser: which has parsed ``first``.
        """
        entry = self._add(path, 1, parser, now, by_us=False)
        self.peer_instance = first.instance
        self._current, self._rank = entry, 1
        entry.control = self._welcome(entry)
        try:
            self._take_limit(first.limit)
        except RemoteProtocolError as error:
            self._break(error)
            return
        self._stir(now)
        self._schedule(now)
        self.receive(path, b"", now)

    def attach(self, path: int, now: float, *, lost: bool = False) -> None:
        """Move to this path, or begin to. An attempt that is under way is withdrawn.

        Args:
            lost: whether all other paths are known to be gone; they are if there is no current one.

        Raises:
            LocalProtocolError: the other side may not know the session yet.
        """
        if self.ended is not None:
            self._commands.append(DropPath(path, self.ended.code, self.ended.reason, b""))
            return
        if not (self.established or self._current is None or lost):
            raise LocalProtocolError("a session moves when the other side has answered")
        if self._coming is not None:
            self._retire(self._coming, now)
        turn = self._turn = min(self._turn + 1, MAX_TURN)
        entry = self._add(path, 2 * turn + self._opener, Parser(), now, by_us=True)
        self._coming = entry
        if lost or self._current is None:
            lost = True
            self._lose_others(entry, "given up for another path", now)
            entry.told_lost = max(self._lost_ranks, default=0)
        frame = Attach(self._acknowledge(), self.id, self._instance, self._grant(), turn, lost)
        entry.control = _wire.encode_attach(frame)
        self._schedule(now)

    def attached(self, path: int, parser: Parser, first: Attach, now: float) -> None:
        """The other side moves to this path, or wants to.

        Args:
            parser: which has parsed ``first``.
        """
        if self.ended is not None:
            in_order = self.ended.code == Code.ENDED
            self._refuse(path, Code.ENDED if in_order else Code.UNKNOWN, "" if in_order else "no such session")
            return
        if self._is_new(first.instance):
            self._refuse(path, Code.RESTARTED, "you have been started anew")
            self._end(End(Code.RESTARTED, "the peer has been started anew", by_peer=True))
            return
        rank = 2 * first.turn + (not self._opener)
        if rank <= self._rank or (self._coming is not None and rank < self._coming.rank):
            self._refuse(path, Code.SUPERSEDED, "another path is attached")
            return
        self.established = True
        self._turn = max(self._turn, first.turn)
        if self._coming is not None:
            self._retire(self._coming, now)
        entry = self._add(path, rank, parser, now, by_us=False)
        try:
            self._take_ack(first.received, first.limit, now)
        except RemoteProtocolError as error:
            self._break(error)
            return
        if self.ended is None:
            self._switch(entry, now, lost=first.lost)
            entry.control = self._welcome(entry)
            self._schedule(now)
            self.receive(path, b"", now)

    def path_eof(self, path: int, now: float) -> None:
        """The other side has ended its direction of this path's stream."""
        entry = self._find(path)
        if entry is None or entry.eof_at < math.inf:
            return
        if entry.parser.inside:
            self._drop(entry, "the stream ended within a frame", now)
            return
        entry.eof_at = now
        if not entry.answered:
            self._drop(entry, "the stream ended without an answer", now)
        elif entry is not self._current:
            self._look_over(entry)
        if self.ended is None:
            self._schedule(now)

    def path_lost(self, path: int, reason: str, now: float) -> None:
        """This path's stream was reset, or its connection is gone."""
        entry = self._find(path)
        if entry is not None:
            self._lose(entry, reason, now)
            self._schedule(now)

    def delivered(self, path: int, total: int, now: float) -> None:
        """So many bytes have reached the other side's host by this path, as far as is known."""
        entry = self._find(path)
        if entry is not None and total != entry.delivered:
            entry.delivered = total
            if entry.probed > entry.heard:
                entry.probed = now

    # Bytes

    def receive(self, path: int, data: bytes | memoryview, now: float) -> None:
        """Bytes came on this path. They may be reused afterwards."""
        entry = self._current
        if entry is None or entry.number != path:
            entry = self._find(path)
            if entry is None:
                return
        if entry.probed > entry.heard:  # from now on the next silence counts
            self.deadline = min(self.deadline, now + PROBE_AFTER)
        entry.heard = now
        if data and not entry.proven:
            entry.proven = True
            self._drain_from(now)
        came = False
        try:
            for frame in entry.parser.feed(data):
                if isinstance(frame, tuple):
                    if not entry.answered:
                        raise RemoteProtocolError("data comes before the answer")
                    offset, piece = frame
                    end = offset + len(piece)
                    if end > self._told_limit or (self._peer_final is not None and end > self._peer_final):
                        self._beyond(end)
                    came = True
                    if offset == self.received and self._ahead is None:
                        self.received = end
                        if not self.closed:
                            self.unread += len(piece)
                            _append(self._unread, piece)
                    else:
                        self._place(offset, piece)
                else:
                    self._control(entry, frame, now)
                    if entry.gone or self.ended is not None:
                        return
        except RemoteProtocolError as error:
            self._break(error)
            return
        if came:
            self._moved = now
            if not self._awake:
                self._stir(now)
            if self.received - self._told_received >= self._ack_each:
                self.ack_due = True
            elif self._tell_at == math.inf:  # also of what came again: the last word on it may be lost
                self._tell_at = now + TELL_AFTER
                if self._tell_at < self.deadline:
                    self.deadline = self._tell_at
            if self.closed and self.received >= self._grant_at:
                self.ack_due = True
            if self.received == self._peer_final:
                self.ack_due = True
                self._look_ended()

    def acknowledge(self) -> None:
        """An acknowledgement costs little now, as something else leaves as well: it is due if half of it is."""
        if self.received - self._told_received >= self._ack_each // 2:
            self.ack_due = True

    def pending(self, path: int) -> bool:
        """Whether `take` has something for this path."""
        current = self._current
        if current is None or current.number != path:
            entry = self._find(path)
            return entry is not None and bool(entry.control)
        return bool(
            self.ack_due
            or current.control
            or self._probe_due
            or self._again
            or (self._unsent and self._limit > self.sent)
            or (self._fin_wanted and not self._fin_sent and not self._unsent and not self._again)
        )

    def take(self, path: int, room: int, now: float) -> list[bytes]:
        """What to write on this path now.

        Args:
            room: bytes of data at most; headers and control frames come on top.
        """
        out: list[bytes] = []
        current = self._current
        if current is None or current.number != path:
            entry = self._find(path)
            if entry is not None and entry.control:
                out.append(entry.control)
                entry.control = b""
            return out
        if current.control:
            out.append(current.control)
            current.control = b""
        if self.ack_due:
            out.append(self._ack(current))
        if self._probe_due:
            self._probe_due = False
            out.append(_wire.encoded_probe)
        moved = False
        while self._again and room > 0:
            pieces, size, self._again_head = _cut(self._again, self._again_head, min(room, _wire.MAX_DATA))
            self._put(out, current, self._again_at, pieces, size)
            self._again_at += size
            self.resent += size
            room -= size
            moved = True
        if not self._again:
            unsent = self._unsent
            while unsent and room > 0:
                most = min(room, self._limit - self.sent, _wire.MAX_DATA)
                if most <= 0 or (moved and len(unsent[0]) - self._unsent_head > room):  # rather not cut it
                    break
                if len(unsent) == 1 and not self._unsent_head and len(unsent[0]) <= most:  # a message, as most are
                    pieces, size = [unsent[0]], len(unsent[0])
                    unsent.clear()
                else:
                    pieces, size, self._unsent_head = _cut(unsent, self._unsent_head, most)
                self._put(out, current, self.sent, pieces, size)
                self.sent += size
                room -= size
                _extend(self._sent, pieces)
                moved = True
            if self.sent >= self._ask_at:
                part = self._window // ASK_PART
                self._ask_at = self.sent + part
                if self.sent >= self.acked + part:
                    out.append(_wire.encoded_probe)
            if self._fin_wanted and not unsent and not self._fin_sent:
                self._fin_sent = self._fin_ever = moved = True
                out.append(_wire.encode_fin(self.sent))
                if current.low == current.high:
                    current.low = self.sent
                current.high = self.sent + 1
        if moved:
            self._moved = now
        if not self._awake and (moved or self._unsent):
            self._stir(now)
        return out

    # Time

    def on_timeout(self, now: float) -> None:
        """Time has passed; see ``deadline``."""
        if not self._goes_on():
            return
        if now >= self._tell_at:
            self._tell_at = math.inf
            self.ack_due = True
        for entry in list(self._paths):
            if entry.gone:
                continue
            due = self._due(entry, now)
            if now < due:
                continue
            if entry is self._current:
                self._silent(entry, now)
            elif now > due + LATE:
                entry.heard = now
            else:
                self._hang(entry, "the peer did not answer" if entry is self._coming else "it did not drain", now)
        if self._current is None and now >= self._lost_at + self._patience:
            waited = f"no path for {self._patience:g} s ({self._reason})"
            self._end(End(Code.LOST, waited, by_peer=False))
        elif now >= self._linger_at:
            self._end(End(Code.TIMEOUT, f"it did not end within {LINGER:g} s", by_peer=False))
        if self._goes_on():
            self._schedule(now)

    def take_commands(self) -> list[Command]:
        """What has to be done, in this order."""
        commands = self._commands
        if commands:
            self._commands = []
        return commands

    def _due(self, entry: _Path, now: float) -> float:
        """When this path has been silent for too long."""
        if entry is self._coming:
            return entry.heard + ATTACH_WITHIN
        if entry is not self._current:
            # Our WELCOME may be lost: then the other side still sends on the old path, if it has anything to send.
            waits = self._current is not None and not self._current.proven
            return math.inf if waits else entry.heard + DRAIN_WITHIN
        return min(self._silence_due(entry, now), self._left_due(entry))

    def _silence_due(self, entry: _Path, now: float) -> float:
        if not self._owed(now):
            return math.inf
        return entry.probed + ANSWER_WITHIN if entry.probed > entry.heard else entry.heard + PROBE_AFTER

    def _drain_from(self, now: float) -> None:
        """From now on old paths have to come to their end: the new one works, or is gone."""
        for entry in self._paths:
            if entry.ended:
                entry.heard = now
                self.deadline = min(self.deadline, now + DRAIN_WITHIN)

    def _left_due(self, entry: _Path) -> float:
        return entry.eof_at + MOVED_AWAY if self._coming is None else math.inf

    def _silent(self, entry: _Path, now: float) -> None:
        """The current path has been silent for too long."""
        late = now - self._left_due(entry)
        if late > LATE:
            entry.eof_at = now
        elif late >= 0:
            self._drop(entry, "the peer has left this path, and did not come by another one", now)
            return
        late = now - self._silence_due(entry, now)
        if late < 0:
            return
        if entry.probed <= entry.heard or late > LATE:
            entry.probed = now
            self._probe_due = True
        else:
            self._hang(entry, "the path hangs", now)

    def _hang(self, entry: _Path, reason: str, now: float) -> None:
        asked = entry is self._current or entry is self._coming
        self._commands.append(Hung(entry.number, now - entry.heard, asked))
        self._drop(entry, reason, now, Code.TIMEOUT)

    def _owed(self, now: float) -> bool:
        return (
            self._written > self.acked
            or (self._fin_wanted and not self._fin_acked)
            or now < self._moved + OWED_FOR
            or not self.established
        )

    def _stir(self, now: float) -> None:
        """Something may be owed from now on."""
        self._moved = now
        if not self._awake:
            self._awake = True
            if self._current is not None:
                self._current.heard = now
        self.deadline = min(self.deadline, now + PROBE_AFTER)

    def _schedule(self, now: float) -> None:
        deadline = min(self._tell_at, self._linger_at)
        if self._current is None:
            deadline = min(deadline, self._lost_at + self._patience)
        self._awake = self._owed(now)
        for entry in self._paths:
            deadline = min(deadline, self._due(entry, now))
        self.deadline = deadline

    # Coming and going of paths

    def _find(self, path: int) -> _Path | None:
        for entry in self._paths:
            if entry.number == path:
                return entry
        return None

    def _add(self, path: int, rank: int, parser: Parser, now: float, *, by_us: bool) -> _Path:
        if len(self._paths) >= MAX_PATHS:
            old = min(
                (each for each in self._paths if each is not self._current and each is not self._coming),
                key=lambda each: each.rank,
            )
            self._drop(old, "too many paths", now)
        entry = _Path(path, rank, parser, now, by_us=by_us)
        self._paths.append(entry)
        return entry

    def _switch(self, entry: _Path, now: float, *, lost: bool) -> None:
        """Send on this path from now on."""
        previous = self._current
        self._current = entry
        self._rank = entry.rank
        self._probe_due = False
        entry.heard = now
        if lost:
            self._lose_others(entry, "the peer has lost it", now)
        if previous is not None and not previous.gone:
            self._retire(previous, now)
        self.moves += 1
        self._commands.append(
            Switched(
                entry.number,
                previous.number if previous is not None else None,
                entry.by_us,
                sum(map(len, self._again)) - self._again_head,
                0.0 if previous is not None else now - self._lost_at,
            )
        )

    def _retire(self, entry: _Path, now: float) -> None:
        """Nothing more is sent on this path."""
        if entry is self._coming:
            self._coming = None
            if entry.control:  # the ATTACH has never left
                entry.eof_at = now
                self._drop(entry, "another path is attached", now, Code.SUPERSEDED)
                return
        entry.ended = True
        entry.heard = now
        self._commands.append(EndPath(entry.number, entry.control))
        entry.control = b""
        self._look_over(entry)

    def _look_over(self, entry: _Path) -> None:
        """Whether this path has come to its end."""
        if entry.ended and entry.eof_at < math.inf and entry.high <= self.acked + self._fin_acked:
            self._paths.remove(entry)
            entry.gone = True
            self._commands.append(PathOver(entry.number))

    def _lose_others(self, entry: _Path, reason: str, now: float) -> None:
        """What was sent on paths older than this one does not arrive."""
        for other in list(self._paths):
            if other.rank < entry.rank and not other.gone:
                self._drop(other, reason, now)

    def _drop(self, entry: _Path, reason: str, now: float, code: int = Code.LOST) -> None:
        self._commands.append(DropPath(entry.number, code, reason, b""))
        self._lose(entry, reason, now)

    def _lose(self, entry: _Path, reason: str, now: float) -> None:
        self._paths.remove(entry)
        entry.gone = True
        if entry.eof_at == math.inf:  # the other side may have sent more
            self._lost_ranks |= {entry.rank}
        self.ack_due = True  # the last one may be lost
        self._send_again(entry)
        current = self._current
        if entry is self._coming:
            self._coming = None
            if current is None:
                self._commands.append(Waiting(entry.number, reason))
            elif current.eof_at < math.inf:
                if entry.eof_at == math.inf:  # the other side has moved to the path that is lost
                    self._drop(current, reason, now)
                else:  # we were refused: the other side's ATTACH is on its way
                    current.eof_at = now
        elif entry is current:
            self._current = None
            self._lost_at = now
            self._reason = reason
            self._probe_due = False
            if not entry.proven:
                self._drain_from(now)
            if self._coming is None:
                self._commands.append(Waiting(entry.number, reason))

    def _send_again(self, entry: _Path) -> None:
        """What this path carried goes to what is to be sent again, as far as it is not acknowledged."""
        low, high = max(entry.low, self.acked), entry.high
        if high > self.sent:
            high = self.sent
            if not self._fin_acked:
                self._fin_sent = False
        if low >= high:
            return
        if self._again:
            low = min(low, self._again_at)
            high = max(high, self._again_at + sum(map(len, self._again)) - self._again_head)
            low = max(low, self.acked)
        self._again = []
        self._again_head = 0
        self._again_at = low
        at = self._base
        for piece in self._sent:
            end = at + len(piece)
            if end > low and at < high:
                self._again.append(piece[max(0, low - at) : high - at])
            at = end

    def _refuse(self, path: int, code: int, reason: str) -> None:
        self._commands.append(DropPath(path, code, reason, _wire.encode_reset(code, reason, self._turn)))

    def _is_new(self, instance: bytes) -> bool:
        """Whether the peer has been started anew."""
        if self.peer_instance is None:
            self.peer_instance = instance
        return self.peer_instance != instance

    # Frames that come

    def _control(self, entry: _Path, frame: Control, now: float) -> None:
        if type(frame) is Ack:
            if not entry.answered:
                raise RemoteProtocolError("an ACK comes before the answer")
            self._take_ack(frame.received, frame.limit, now)
            if frame.lost and not entry.gone and self.ended is None:
                self._lose_others(entry, "the peer has lost it", now)
                self._schedule(now)
        elif type(frame) is Welcome:
            self._welcomed(entry, frame, now)
        elif type(frame) is Reset:
            self._reset_by_peer(entry, frame, now)
        elif not entry.answered:
            raise RemoteProtocolError("something comes before the answer")
        elif type(frame) is Fin:
            self._take_fin(frame.final, now)
        elif isinstance(frame, Open | Attach):
            raise RemoteProtocolError("a second OPEN or ATTACH on a stream")
        else:
            self.ack_due = True

    def _welcomed(self, entry: _Path, frame: Welcome, now: float) -> None:
        if entry.answered:
            raise RemoteProtocolError("a WELCOME that answers nothing")
        if self._is_new(frame.instance):
            self._end(End(Code.RESTARTED, "the peer has been started anew", by_peer=True))
            return
        entry.answered = self.established = True
        self._take_ack(frame.received, frame.limit, now)
        if self.ended is not None:
            return
        if entry is self._coming:
            self._coming = None
            # Of what was lost before it, our ATTACH has told, and was heard.
            self._lost_ranks = frozenset(each for each in self._lost_ranks if each > entry.told_lost)
            self._switch(entry, now, lost=frame.lost)
            self.ack_due = True
        elif frame.lost:
            self._lose_others(entry, "the peer has lost it", now)
        self._schedule(now)

    def _reset_by_peer(self, entry: _Path, frame: Reset, now: float) -> None:
        self._turn = max(self._turn, frame.turn)
        if not entry.answered and entry.rank > 1 and frame.code in (Code.SUPERSEDED, Code.BUSY):
            entry.eof_at = now  # nothing was sent behind it
            self._drop(entry, frame.reason or "refused", now, frame.code)
            self._schedule(now)
        elif frame.code == Code.UNKNOWN and self._fin_ever and self.complete and self.acked == self._written:
            self._end(End(Code.ENDED, "", by_peer=True))  # the other side has ended it already
        elif frame.code == Code.ENDED and not (self._fin_ever and self.complete):
            raise RemoteProtocolError("an end in order before the end of both directions")
        else:
            code = Code(frame.code) if frame.code in set(Code) else frame.code
            self._end(End(code, frame.reason, by_peer=True))

    def _take_limit(self, limit: int) -> None:
        if limit > _wire.MAX_OFFSET:
            raise RemoteProtocolError("a limit beyond the largest offset")
        if limit > self._limit:  # else it is late, from an older path
            self._limit = limit

    def _take_ack(self, received: int, limit: int, now: float) -> None:
        self._take_limit(limit)
        if received <= self.acked + self._fin_acked:  # nothing new, or late, from an older path
            return
        if received > self.sent:
            if received > self.sent + 1 or not self._fin_ever:
                raise RemoteProtocolError(f"{received} bytes are acknowledged, of {self.sent} that were sent")
            received = self.sent
            self._fin_acked = self._fin_sent = True
        before, self.acked = self.acked, received
        sent, base = self._sent, self._base
        count = 0
        for size in map(len, sent):
            if base + size > received:
                break
            base += size
            count += 1
        if count:
            del sent[:count]
            self._base = base
        if self._again and self._again_at < received:
            self._skip(received)
        if len(self._paths) > 1:
            for entry in list(self._paths):
                if entry.ended:
                    if entry.low < received + self._fin_acked and entry.high > before:
                        entry.heard = now  # something of what went by it has come
                    self._look_over(entry)
        if self._fin_acked:
            self._look_ended()

    def _skip(self, received: int) -> None:
        """What is acknowledged need not be sent again."""
        again = self._again
        at = self._again_at - self._again_head  # of the first piece
        while again and at + len(again[0]) <= received:
            at += len(again[0])
            del again[0]
        self._again_head = max(received - at, 0) if again else 0
        self._again_at = received

    def _take_fin(self, final: int, now: float) -> None:
        if self._peer_final is None:
            highest = self._ahead[-1].end if self._ahead is not None else self.received
            if final < highest or final > self._told_limit:
                raise RemoteProtocolError(f"a FIN at {final}, where {highest} bytes have come")
            self._peer_final = final
            self._grant_at = math.inf
            self._stir(now)
        elif final != self._peer_final:
            raise RemoteProtocolError(f"a FIN at {final} after one at {self._peer_final}")
        self.ack_due = True
        self._look_ended()

    def _beyond(self, end: int) -> None:
        if end > self._told_limit:
            raise RemoteProtocolError(f"data up to {end}, where {self._told_limit} was granted")
        raise RemoteProtocolError(f"data up to {end}, behind a FIN at {self._peer_final}")

    def _place(self, offset: int, piece: bytes) -> None:
        """Data that is not simply the next."""
        late = min(self.received - offset, len(piece))
        if late > 0:
            self.duplicate += late
            if late == len(piece):
                return
            piece = piece[late:]
            offset += late
        runs = self._ahead if self._ahead is not None else []
        last = runs[-1] if runs else None
        if last is not None and offset == last.end:
            _append(last.pieces, piece)
            last.end += len(piece)
            self.ahead += len(piece)
        else:
            self._insert(runs, offset, piece)
        if runs[0].start == self.received:
            run = runs.pop(0)
            self.received = run.end
            self.ahead -= run.end - run.start
            if not self.closed:
                self.unread += run.end - run.start
                _extend(self._unread, run.pieces)
        elif len(runs) > MAX_RUNS:
            raise RemoteProtocolError(f"data with more than {MAX_RUNS} gaps")
        self._ahead = runs or None

    def _insert(self, runs: list[_Run], offset: int, piece: bytes) -> None:
        """What of a piece is new becomes part of the runs, which stay sorted and apart."""
        end = offset + len(piece)
        first = 0
        while first < len(runs) and runs[first].end < offset:
            first += 1
        after = first
        start, at = offset, offset
        pieces: list[bytes] = []
        while after < len(runs) and runs[after].start <= end:
            run = runs[after]
            if at < run.start:
                _append(pieces, piece[at - offset : run.start - offset])
                self.ahead += run.start - at
            start = min(start, run.start)
            self.duplicate += max(0, min(end, run.end) - max(at, run.start))
            _extend(pieces, run.pieces)
            at = max(at, run.end)
            after += 1
        if at < end:
            _append(pieces, piece[at - offset :])
            self.ahead += end - at
        runs[first:after] = [_Run(start, max(at, end), pieces)]

    # Frames that leave

    def _put(self, out: list[bytes], entry: _Path, offset: int, pieces: list[bytes], size: int) -> None:
        """A DATA frame."""
        if size < SMALL and len(pieces) == 1:
            out.append(_wire.pack_header(_wire.DATA, size, offset) + pieces[0])
        else:
            out.append(_wire.pack_header(_wire.DATA, size, offset))
            out += pieces
        end = offset + size
        if entry.low == entry.high:
            entry.low, entry.high = offset, end
        else:
            if offset < entry.low:
                entry.low = offset
            if end > entry.high:
                entry.high = end

    def _grant(self) -> int:
        read = self.received - self.unread
        window = min(self._window, INITIAL_LIMIT + read)
        self._told_limit = max(self._told_limit, read + window)
        if self._peer_final is None:
            self._grant_at = read + window // LIMIT_PART
        return self._told_limit

    def _acknowledge(self) -> int:
        self._told_received = self.received
        self._tell_at = math.inf
        self.ack_due = False
        return self.received + self.complete

    def _tell_lost(self, entry: _Path) -> bool:
        """Whether a frame on this path has to say that older ones are lost."""
        if not self._lost_ranks:
            return False
        untold = frozenset(each for each in self._lost_ranks if each >= entry.rank)
        told = len(untold) < len(self._lost_ranks)
        self._lost_ranks = untold
        return told

    def _ack(self, entry: _Path) -> bytes:
        return _wire.encode_ack(self._acknowledge(), self._grant(), self._tell_lost(entry))

    def _welcome(self, entry: _Path) -> bytes:
        frame = Welcome(self._acknowledge(), self._instance, self._grant(), self._tell_lost(entry))
        return _wire.encode_welcome(frame)

    # The end

    def _goes_on(self) -> bool:
        return self.ended is None

    def _look_ended(self) -> None:
        if self._fin_acked and self.complete and self.ended is None:
            self._end(End(Code.ENDED, "", by_peer=False))

    def _break(self, error: RemoteProtocolError) -> None:
        self._commands.append(Broken(str(error)))
        self._end(End(Code.PROTOCOL, str(error), by_peer=False))

    def _end(self, end: End) -> None:
        self.ended = end
        tell = _wire.encode_reset(end.code, end.reason, self._turn) if not end.by_peer else b""
        for entry in self._paths:
            if end.code == Code.ENDED and entry is self._current:
                last = entry.control + self._ack(entry)
                self._commands.append(EndPath(entry.number, last))
            else:
                last = entry.control + tell if tell and not entry.ended and end.code != Code.ENDED else b""
                self._commands.append(DropPath(entry.number, end.code, end.reason, last))
            entry.gone = True
        self._paths = []
        self._current = self._coming = None
        self._unsent, self._sent, self._again, self._ahead = [], [], [], None
        self._written = self.sent = self.acked
        self.ahead = 0
        if end.code not in (Code.ENDED, Code.LOST) and not self.complete:
            self._unread = []
            self.unread = self._read_head = 0
        self.deadline = math.inf
        self._commands.append(Ended(end))


class _Run:
    """Bytes beyond a gap, from ``start`` to ``end``."""

    __slots__ = ("end", "pieces", "start")

    def __init__(self, start: int, end: int, pieces: list[bytes]) -> None:
        self.start = start
        self.end = end
        self.pieces = pieces


def _append(pieces: list[bytes], piece: bytes) -> None:
    """Add a piece, as a part of the last one if both are small."""
    if pieces and len(piece) < SMALL and len(pieces[-1]) < SMALL:
        pieces[-1] += piece
    else:
        pieces.append(piece)


def _extend(pieces: list[bytes], more: list[bytes]) -> None:
    _append(pieces, more[0])
    if len(more) > 1:
        pieces += more[1:]


def _cut(pieces: list[bytes], head: int, most: int) -> tuple[list[bytes], int, int]:
    """Take the payload of a frame off some pieces.

    Args:
        head: bytes of the first one that are not meant.
        most: bytes at most.

    Returns:
        the payload, its size, and ``head`` of what is left.
    """
    piece = pieces[0]
    size = len(piece) - head
    if size > most:
        return [piece[head : head + most]], most, head + most
    if head:
        pieces[0] = piece[head:]
    count = 1
    most = min(most, FRAME)
    for more in map(len, itertools.islice(pieces, 1, None)):
        if size + more > most:
            break
        size += more
        count += 1
    taken = pieces[:count]
    del pieces[:count]
    return taken, size, 0
