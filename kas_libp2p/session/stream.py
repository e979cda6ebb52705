"""A session as a byte stream like any other: what the Kaspa side has.

How bytes pass
    No task carries them. Each path is a Yamux stream that the session has tapped. What comes is given to the machine in
    the turn of its connection's reader, which wakes whoever reads. What is written goes through the machine to the path
    in the same call, so a small message leaves with no turn of the scheduler, as on a plain stream. Pieces are passed
    on as they are.

How a path that is slow slows the writer
    No more than any stream may hold unsent waits in the path's queue, so a move leaves little behind. What the path has
    no room for stays in the session, and while something does, the writer waits. Without any path it may go on until
    as much waits here as else in the queue.

How a circuit that may carry so many bytes is used
    Each side sends no more than half of what is left of it, less a reserve. So the relay does not cut it in the middle,
    but for what both sides have under way at once; and a cut loses nothing, it costs a gap.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from operator import index
from typing import Protocol

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from kas_libp2p.config import KIB
from kas_libp2p.errors import SessionLost, StreamCode, StreamReset
from kas_libp2p.metadata import Dialect, Direction, OverlayStream, PeerId, TransportMetadata
from kas_libp2p.session._machine import Broken, Command, DropPath, End, Ended, EndPath, Hung, Session, Switched
from kas_libp2p.session._policy import PathPolicy
from kas_libp2p.session._wire import Code
from kas_libp2p.session.status import SessionState, SessionStatus
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.pipe import CircuitPipe
from kas_libp2p.transport.waiter import Waiter
from kas_libp2p.transport.yamux.stream import YIELD_AFTER, YamuxStream

RESERVE = 16 * KIB
"""Bytes of a circuit that are left for frames' heads, acknowledgements and the move away from it; at most a part in 64:
a session leaves it when a part in 16 is left, and has to come to that."""
LEAST_ROOM = 64 * KIB
"""Bytes that a path's queue has to have room for before it is given more: then pieces need not be cut."""


class Owner(Protocol):
    """What a session needs of who keeps it. None of these waits or raises."""

    def rearm(self, session: SessionStream) -> None:
        """Its deadline has come nearer."""

    def told(self, session: SessionStream, command: Command, stream: YamuxStream) -> None:
        """The machine has told something, and its paths follow it.

        Args:
            stream: the path that it is about; of `Switched` the one before; of what is about none, the last one.
        """

    def failed(self, session: SessionStream, error: Exception) -> None:
        """A mistake of ours. The session is to be abandoned."""


class SessionStream(OverlayStream):
    """A stream to a peer, whatever becomes of the connections under it.

    Reading and writing are independent; at most one task reads and one writes at a time. What came before the session
    ended in order can still be read.

    Args:
        machine: made for this stream, without a path yet.
        peer: with whom, proven by every path.
        by_us: whether this side opened it.
        window: bytes of each direction that it may hold.
        policy: which path it takes; for its owner, but told here of what failed.
        owner: who keeps it.

    Attributes:
        machine, peer, by_us, window, policy: as given.
        opened_at: seconds on trio's clock.
        stream: the Yamux stream that it goes by; while it waits, the last one.
        note: what came of the last try to find one, in words.
        armed: when its owner will look at it next. This and what follows is for the owner.
        look_at: when it wants to.
        wish: the connection to which the session is to move, since when, and why.
        moving: whether that is about to be done.
        reason: why it was done last, in words.
        attempt: the path that is to take the present one's place, until that is settled.
        tried_at: when that began.
        recovery: ends the search for a path; ``None``: there is none.
        got_on_at: when it was last seen that bytes have come to their end.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_gaps",
        "_got_on",
        "_next_path",
        "_owner",
        "_path",
        "_paths",
        "_readable",
        "_reset",
        "_since_yield",
        "_space",
        "_writable",
        "armed",
        "attempt",
        "by_us",
        "got_on_at",
        "look_at",
        "machine",
        "moving",
        "note",
        "opened_at",
        "peer",
        "policy",
        "reason",
        "recovery",
        "stream",
        "tried_at",
        "window",
        "wish",
    )

    stream: YamuxStream

    def __init__(
        self, machine: Session, peer: PeerId, *, by_us: bool, window: int, policy: PathPolicy, owner: Owner
    ) -> None:
        self.machine = machine
        self.peer = peer
        self.by_us = by_us
        self.window = window
        self.policy = policy
        self.opened_at = trio.current_time()
        self.note = ""
        self.armed = self.look_at = math.inf
        self.wish: tuple[int, float, str] | None = None
        self.moving = False
        self.reason = ""
        self.attempt: int | None = None
        self.tried_at = self.opened_at
        self.recovery: trio.CancelScope | None = None
        self._owner = owner
        self._path: _Path | None = None  # the current one
        self._paths: dict[int, _Path] = {}
        self._next_path = 0
        self._readable = Waiter()
        self._writable = Waiter()
        self._closed = False
        self._reset = False
        self._gaps = 0
        self._since_yield = 0
        self._got_on = 0  # bytes that had come to their end then
        self.got_on_at = self.opened_at
        self._space = 0  # bytes that may be written at least, nothing if that must be looked at; it may be more by now

    def __repr__(self) -> str:
        return f"<session {self.machine.id.hex()[:8]} with {self.peer}>"

    # What it is

    @property
    def metadata(self) -> TransportMetadata:
        """Who is at the other end, and by which way now; while there is none, by the last one."""
        return replace(
            self.stream.metadata,
            protocol=Dialect.MESSAGES,
            direction=Direction.OUTBOUND if self.by_us else Direction.INBOUND,
            stream_opened_at=self.opened_at,
        )

    @property
    def delivered(self) -> int:
        """See `OverlayStream`: bytes that the peer has acknowledged."""
        return self.machine.acked

    @property
    def watches_paths(self) -> bool:
        """See `OverlayStream`: yes."""
        return True

    @property
    def gaps(self) -> int:
        """See `OverlayStream`."""
        return self._gaps

    @property
    def over(self) -> bool:
        """Whether it has ended, by whomever; readers and writers may not have been told yet."""
        return self.machine.ended is not None

    @property
    def closed(self) -> bool:
        """Whether it was closed here in order. What was written may still be on its way."""
        return self._closed

    @property
    def talks(self) -> bool:
        """Whether a two-way talk is possible on it still: neither side has ended its direction, nor the whole."""
        machine = self.machine
        return not (self._closed or machine.finished or machine.ended is not None or machine.complete)

    @property
    def unsent(self) -> int:
        """Bytes written and not yet handed to a connection's transport."""
        return self.machine.unsent + (self.stream.unsent if self.machine.current is not None else 0)

    @property
    def held(self) -> int:
        """Bytes that it holds: of ours that the peer has not acknowledged, of the peer's that were not read."""
        return self.machine.in_flight + self.machine.unread + self.machine.ahead

    def look_at_progress(self, now: float) -> None:
        """See whether bytes of either direction have come to their end since the last look; for the owner."""
        machine = self.machine
        got_on = machine.acked + machine.received - machine.unread
        if got_on != self._got_on or not self.held:
            self._got_on, self.got_on_at = got_on, now

    @property
    def connection(self) -> Connection | None:
        """The connection by which it goes; ``None`` if it has no path."""
        return self._path.connection if self._path is not None else None

    @property
    def lost_at(self) -> float | None:
        """Since when it has no path, on trio's clock; ``None``: it has one, or is over."""
        return self.machine.lost_at

    @property
    def streams(self) -> Collection[YamuxStream]:
        """The Yamux streams that belong to it: the present path, old ones that are being drained, and new ones that are
        not agreed on yet."""
        return [path.stream for path in self._paths.values()]

    def status(self) -> SessionStatus:
        """How it stands at this moment."""
        machine, now = self.machine, trio.current_time()
        lost_at = machine.lost_at
        if self._closed:
            state = SessionState.CLOSING
        elif lost_at is not None:
            state = SessionState.WAITING
        else:
            state = SessionState.MOVING if len(self._paths) > 1 else SessionState.ATTACHED
        return SessionStatus(
            id=machine.id.hex(),
            peer=self.peer,
            by_us=self.by_us,
            path=self.stream.connection.path,
            state=state,
            moves=machine.moves,
            in_flight=machine.in_flight,
            unread=machine.unread,
            window=self.window,
            gaps=self._gaps,
            seconds=now - self.opened_at,
            waiting=now - lost_at if lost_at is not None else 0.0,
            reason=(self.note if lost_at is not None else "") or self.policy.reason,
        )

    # Writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write. Returns when the path has taken what was written, but for one stream's worth.

        If cancelled while it waits, the data is sent nevertheless.

        Raises:
            SessionLost: the session ended other than in order.
            StreamReset: it was reset here.
            trio.ClosedResourceError: it, or this direction, was closed here.
            trio.BusyResourceError: another task is writing.
        """
        await checkpoint_if_cancelled()
        if self._space <= 0:
            self._check_writable()
            if self._full():  # what a cancelled write left
                await self._room()
        if data:
            piece = data if type(data) is bytes else bytes(data)
            self.machine.write(piece)
            self._space -= len(piece)
            path = self._path
            if path is not None and not path.offered:
                self._offer(path, len(piece))
            if self._space <= 0 and self._full():
                await self._room()

    def _offer(self, path: _Path, size: int) -> None:
        """Have what was written framed, with what else there is by then, when the path's connection sends next."""
        path.offered = True
        path.connection.offers.append(path)
        path.connection.wrote(size)

    def send_nowait(self, data: bytes) -> bool:
        """Write if that needs no waiting; see `OverlayStream`."""
        if (
            self._path is None
            or self._closed
            or self.machine.finished
            or self._writable.task is not None
            or self.machine.ended is not None
            or (self._space <= len(data) and (self._full() or self._space <= len(data)))
        ):
            return False
        self.machine.write(data)
        self._space -= len(data)
        if not self._path.offered:
            self._offer(self._path, len(data))
        return True

    async def wait_send_all_might_not_block(self) -> None:
        """Return when a write would not have to wait."""
        await checkpoint()
        self._check_writable()
        await self._wait_for_room()

    async def send_eof(self) -> None:
        """End our direction, behind everything that was written. May be called again.

        Raises:
            SessionLost, StreamReset, trio.BusyResourceError: as `send_all`.
            trio.ClosedResourceError: the stream was closed here.
        """
        await checkpoint()
        if self.machine.finished and not self._closed and self.machine.ended is None:
            return
        self._check_writable()
        now = trio.current_time()
        self.machine.finish(now)
        self._space = 0
        self.settle(now)

    def _full(self) -> bool:
        """Whether a writer has to wait. Looks at how much it may write."""
        machine, path = self.machine, self._path
        unsent = machine.unsent if path is None else machine.unsent + path.stream.unsent
        self._space = min(self.stream.connection.send_high_water - unsent, machine.room)
        full = self._space <= 0
        if self._closed or machine.finished or machine.ended is not None:
            self._space = 0  # nobody has to wait, and nobody may write
        return full

    async def _room(self) -> None:
        if self._path is not None:
            self._path.connection.flush()
        if not self._full():
            await checkpoint()
        await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while self._full() and self.machine.ended is None and not self._closed:
            await self._writable.wait()
        if self.machine.ended is not None or self._closed:
            raise self._error()

    def _check_writable(self) -> None:
        if self._closed or self.machine.finished or self.machine.ended is not None:
            raise self._error()
        if self._writable.task is not None:
            raise trio.BusyResourceError("another task is writing to this stream")

    def _error(self) -> Exception:
        end = self.machine.ended
        if self._closed or end is None or end.code == Code.ENDED:
            return trio.ClosedResourceError("this stream, or its sending direction, was closed")
        if self._reset:
            return StreamReset(by_peer=False)
        return SessionLost(end.reason, code=word(end), by_peer=end.by_peer)

    # Reading

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read what is there, at least one byte.

        Args:
            max_bytes: read no more than this.

        Returns:
            ``b""`` at the end of the peer's direction.

        Raises:
            SessionLost: the session ended other than in order.
            StreamReset: it was reset here.
            trio.ClosedResourceError: the stream was closed here.
            trio.BusyResourceError: another task is reading.
        """
        if max_bytes is not None and index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        machine = self.machine
        await checkpoint_if_cancelled()
        while self._closed or (data := machine.read(max_bytes)) is None:
            if self._closed:
                raise self._error()
            if machine.eof:
                await checkpoint()
                return b""
            if machine.ended is not None:
                raise self._error()
            if self._readable.task is not None:
                raise trio.BusyResourceError("another task is reading from this stream")
            await self._readable.wait()
        if machine.ack_due and self._path is not None:  # more is granted
            self.settle(trio.current_time())
        self._since_yield += len(data)
        if self._since_yield >= YIELD_AFTER:
            self._since_yield = 0
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    # Ending

    def reset(self, code: int = 0) -> None:
        """End both directions at once, without waiting.

        Args:
            code: not told: a session's end has words of its own.
        """
        self._reset = self._reset or self.machine.ended is None
        self.end(Code.STOPPED, "the peer reset the stream")

    def end(self, code: Code, reason: str) -> None:
        """End the session on all paths, without waiting. Does nothing if it has ended.

        Args:
            reason: for the peer, in words.
        """
        if self.machine.ended is None:
            now = trio.current_time()
            self.machine.reset(code, reason, now)
            self.settle(now)

    def forget(self, code: Code, reason: str) -> None:
        """Give up what came before it ended and was not read. Reading raises from now on."""
        self.machine.forget(code, reason)

    async def aclose(self) -> None:
        """End our direction behind everything that was written, and read no more. Does not wait for the peer: the
        session lives until it has everything, for some seconds at most."""
        if not self._closed:
            self._closed = True
            self._space = 0
            now = trio.current_time()
            self.machine.close(now)
            self.settle(now)
        await checkpoint()

    # For its owner

    def add(self, stream: YamuxStream) -> int:
        """Take a Yamux stream for a path. The machine is to be told, then `begin` is to be called.

        Returns:
            the number of the path.
        """
        self._next_path += 1
        self._paths[self._next_path] = _Path(self, self._next_path, stream)
        if self._next_path == 1:
            self.stream = stream
        return self._next_path

    def begin(self, number: int) -> None:
        """Take in what has come on a new path so far, and say what is to be said on it."""
        path = self._paths[number]
        path.stream.tap(path, raw=True)
        self._find_current()
        path.changed()

    def lose(self, connection: Connection) -> None:
        """A connection has ended. Its streams that had come to their end in order have not told that."""
        now = trio.current_time()
        for path in [*self._paths.values()]:
            if path.stream.connection is connection:
                path.lost(connection.close_reason or "the connection ended", now)
        self.settle(now)

    def abandon(self, reason: str) -> None:
        """Forget about it, whatever its machine thinks."""
        machine = self.machine
        if machine.ended is None:
            machine.ended = End(Code.STOPPED, reason, by_peer=False)
        for path in self._paths.values():
            path.stream.tap(None)
            path.stream.reset()
        self._paths.clear()
        self._path = None
        self._space = 0
        self._readable.wake()
        self._writable.wake()

    @property
    def attaching(self) -> Connection | None:
        """The connection on which we try to attach; ``None``: on none."""
        number = self.machine.attaching
        path = self._paths.get(number) if number is not None else None
        return path.stream.connection if path is not None else None

    def on_time(self, now: float) -> None:
        """Its deadline has come."""
        machine = self.machine
        if (path := self._path) is not None:
            path.look_at_progress(now)
        if machine.deadline <= now:
            machine.on_timeout(now)
        self.settle(now)

    # Inside

    def _find_current(self) -> None:
        current = self.machine.current
        self._path = self._paths.get(current) if current is not None else None

    def settle(self, now: float) -> None:
        """Do what follows of what the machine was told: write what is due, end paths, wake who waits."""
        machine = self.machine
        while True:
            for path in tuple(self._paths.values()):
                if machine.pending(path.number):
                    path.pump(now)
            commands = machine.take_commands()
            if not commands:
                break
            self._obey(commands, now)
        ended = machine.ended is not None
        if self._readable.task is not None and (machine.readable or machine.eof or ended or self._closed):
            self._readable.wake()
        if self._writable.task is not None and (ended or self._closed or not self._full()):
            self._writable.wake()
            self._space = 0  # the next write has to look; and if it has ended, it is refused
        elif ended:
            self._space = 0
        if machine.deadline < self.armed:
            self._owner.rearm(self)

    def _obey(self, commands: Collection[Command], now: float) -> None:
        told: list[tuple[Command, YamuxStream]] = []
        for command in commands:
            path = None if isinstance(command, Broken | Ended) else self._paths.get(command.path)
            told.append((command, path.stream if path is not None else self.stream))
            if path is None:
                continue
            match command:
                case EndPath(_, last):
                    path.end(last)
                case DropPath(_, code, _, last):
                    if code == Code.BUSY:
                        self.policy.lost(path.stream.connection.number, now)
                    path.drop(last)
                case Hung() if command.asked:
                    self.policy.lost(path.stream.connection.number, now)
                case Switched():
                    told[-1] = command, self.stream
                    self.stream = path.stream
                    self._gaps += command.previous is None
        self._forget_paths()
        for each in told:
            self._owner.told(self, *each)

    def _forget_paths(self) -> None:
        left = self.machine.paths
        for number in [number for number in self._paths if number not in left]:
            stream = self._paths.pop(number).stream
            stream.tap(None)
            stream.close()
        self._find_current()


class _Path:
    """One Yamux stream of a session; its tap.

    Attributes:
        session, number, stream: whose, which, and what it is.
        connection: that carries the stream.
        offered: whether the connection will ask what there is to send.
    """

    __slots__ = (
        *("_asked_at", "_circuit", "_delivered", "_eof", "_given", "_least", "_mark", "_state", "_used"),
        *("connection", "number", "offered", "session", "stream"),
    )

    def __init__(self, session: SessionStream, number: int, stream: YamuxStream) -> None:
        self.session = session
        self.number = number
        self.stream = stream
        self.connection = stream.connection
        self.offered = False
        self._eof = False
        most, circuit = self.connection.send_high_water, self.connection.circuit
        self._least = min(LEAST_ROOM, most // 4)
        self._state = stream.state
        self._mark = self._state.mark = most - self._least + 1
        self._circuit: CircuitPipe | None = None
        self._used = self._given = 0
        self._delivered = 0
        self._asked_at = math.inf  # the end of the last PROBE, counted as `Connection.delivered` does
        if circuit is not None and circuit.limits.max_bytes is not None:
            self._circuit = circuit
            self._mark = self._state.mark = 1  # what has left makes room for half as much

    def changed(self) -> None:
        """Something came in, or the stream ended; see `Tap`."""
        try:
            self._take_in()
        except Exception as error:  # noqa: BLE001 - the connection's reader carries other streams
            self.session._owner.failed(self.session, error)

    def drained(self) -> None:
        """There is room, or our end has left; see `Tap`."""
        try:
            self.session.settle(trio.current_time())
        except Exception as error:  # noqa: BLE001 - the connection is flushing other streams
            self.session._owner.failed(self.session, error)

    def _take_in(self) -> None:
        state, session, now = self._state, self.session, trio.current_time()
        machine = session.machine
        chunks = state.chunks
        if chunks:
            offset = state.offset
            for chunk in chunks:
                machine.receive(self.number, chunk[offset:] if offset else chunk, now)
                offset = 0
            chunks.clear()
            state.offset = state.unread = 0
            if state.allowed <= state.grant_at:  # the session has a window of its own
                self.connection.consumed(state, now=False)
                machine.acknowledge()
        if state.eof and not self._eof:
            self._eof = True
            machine.path_eof(self.number, now)
        if state.reset == (True, StreamCode.NEGOTIATION) and machine.current in (self.number, None):
            session.end(Code.UNKNOWN, "the peer takes no sessions any more")
        elif (why := self.stream.broken) is not None:
            self.lost(why, now)
        session.settle(now)

    def lost(self, why: str, now: float) -> None:
        """Nothing more goes by it."""
        session = self.session
        machine = session.machine
        if self.number in (machine.current, machine.attaching):
            session.policy.lost(self.stream.connection.number, now)
        machine.path_lost(self.number, why, now)
        session._obey([DropPath(self.number, Code.LOST, why, b""), *machine.take_commands()], now)

    def fill(self) -> None:
        """Queue what was written; see `Source`."""
        session = self.session
        self.offered = False
        try:
            self.pump(trio.current_time())
            if session.machine.deadline < session.armed:
                session._owner.rearm(session)
        except Exception as error:  # noqa: BLE001 - the connection is flushing other streams
            session._owner.failed(session, error)

    def pump(self, now: float) -> None:
        """Write what is due on this path, and there is room for."""
        connection, state, machine = self.connection, self._state, self.session.machine
        room = connection.send_high_water - state.queued
        if room < -self._least:  # who asks on, and does not read, is answered when it does
            if machine.asks:
                self._asked_at = math.inf  # it has still to be asked
            return
        if room < self._least:
            room = 0
        if self._circuit is not None:
            room = min(room, self._share(self._circuit) - state.queued)
        asks = machine.asks
        pieces = machine.take(self.number, room, now)
        if pieces:
            connection.write_all(state, pieces)
            if asks and not machine.asks:
                self._delivered = connection.delivered
                self._asked_at = self._delivered + connection.undelivered + state.queued
            # Where a piece was too large for the room that was left, whatever leaves makes room for it.
            state.mark = min(self._mark, state.queued) if machine.unsent else self._mark

    def look_at_progress(self, now: float) -> None:
        """Tell the machine whether what was sent before it asked still moves. What was sent since says nothing: a host
        takes it, or a relay, whatever has become of who is to answer."""
        before, self._delivered = self._delivered, self.connection.delivered
        if before < self._asked_at:
            self.session.machine.delivered(self.number, self._delivered, now)

    def _share(self, circuit: CircuitPipe) -> int:
        """Bytes that may wait in a circuit's queue, as things stand.

        Each side has half of what was left when the other last acknowledged something. What the other sends meanwhile
        and is not seen here is in its own half.
        """
        limits, stream, machine = circuit.limits, self.stream, self.session.machine
        assert limits.max_bytes is not None
        assert limits.bytes_left is not None
        queued, sent = self._state.queued, circuit.sent
        given = stream.sent + queued
        # What is being sealed at this moment stands nowhere.
        used = max(sent + circuit.unsent + self.connection.sealed + queued, self._used + given - self._given)
        self._used, self._given = used, given
        # With the heads of all layers, which are most of it where messages are small.
        open_ = (machine.in_flight - machine.unsent) * max(1.0, sent / max(1, stream.sent))
        left = limits.bytes_left + sent - used
        return int(left - open_ - min(RESERVE, limits.max_bytes // 64)) // 2 + queued

    def end(self, last: bytes) -> None:
        """Say that nothing more comes from here."""
        if self.stream.finished:
            return
        if last:
            self.connection.write(self._state, last, now=False)
        self.connection.finish(self._state)

    def drop(self, last: bytes) -> None:
        """It is over. What the peer is still to be told goes behind what was sent: a reset would overtake it."""
        stream = self.stream
        stream.tap(None)
        if last and not stream.finished:
            stream.close(last)
        else:
            stream.reset()


def word(end: End) -> str:
    """How a session ended, in one word."""
    return Code(end.code).name.lower() if end.code in set(Code) else "other"
