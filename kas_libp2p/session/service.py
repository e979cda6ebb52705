"""The sessions of a node: who has which, on which paths, and where each goes on.

Who moves a session
    Who opened it, as soon as `PathPolicy` says so; the other side a little later if it still has to. So the two sides
    seldom cross, and if they do, both end on the same path.

When it has no path
    Each session that waits has a task, which tries whatever connection there is, then dials, again and again, until
    there is a path or the session has ended. It ends with the session, or with the service.

What it costs
    A session that has a path has no task. One task keeps the time of all. The sessions of one node are bounded in all
    and per peer, and each by its window.

What a peer can do
    It can open sessions up to its limit, attach to its own ones, and end them. What it wants beyond that is refused
    with a word and counted (`SessionRefused`). Somebody else's session looks to it like one that does not exist.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from weakref import WeakSet

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p._rates import Rates
from kas_libp2p.config import Config
from kas_libp2p.errors import ConnectionLost, KasError, Refused, RemoteProtocolError, in_words
from kas_libp2p.events import (
    EventBus,
    InternalError,
    LimitHit,
    PeerMisbehaved,
    SessionEnded,
    SessionMoved,
    SessionNotMoved,
    SessionOpened,
    SessionRefused,
    SessionWaiting,
)
from kas_libp2p.metadata import SESSION, PeerId
from kas_libp2p.session._machine import Broken, Command, DropPath, Ended, Hung, Session, Switched, Waiting
from kas_libp2p.session._policy import TICK, Candidate, PathPolicy
from kas_libp2p.session._wire import ID_SIZE, INSTANCE_SIZE, Attach, Code, Open, Parser, encode_reset
from kas_libp2p.session.stream import SessionStream, word
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_first
from kas_libp2p.transport.yamux.stream import YamuxStream

logger = logging.getLogger(__name__)

Handler = Callable[[SessionStream], Awaitable[None]]
"""Serves one session. It is closed when it returns, and reset if it raises."""

FIRST_FRAMES = 4
"""Streams of one peer that may be at their first frame at once: a move, one that crosses it, and as many again."""
ENDING = 4
"""Sessions with one peer that may be about to end beside those that it may have."""
MOVES_AT_ONCE, MOVE_INTERVAL = 32, 0.5
"""Moves of one peer's sessions to its paths at once, and seconds for each one more: each costs us a millisecond and an
event. Who looks for a path tries a few connections every `RETRIES`."""
OPENER_FIRST = 2.0
"""Seconds for which the side that did not open a session leaves it to the other one to move it to a better path."""
OPENER_FIRST_AT_ONCE = 0.3
"""The same where the path is lost or about to end: a round trip around the world."""
RETRIES = (0.5, 1.0, 1.25)
"""Seconds between two tries to find a path; the last one again and again, as a peer that was started anew is to be
found within 2 s. At a relay of rust-libp2p each may cost one of thirty circuits: all of them last for `patience`."""
UNANSWERED = 1.0
"""Seconds after which a path is tried beside one that the peer has not answered on, if the session has no other."""
NOT_YET = 1.0
"""Seconds after which a session is looked at again that the peer has not answered to yet, or has refused to move."""
HEARD = 0.1
"""Seconds by which something that was heard on a connection has to be later than what was heard on the path, for the
connection to live."""
MEASURE_EVERY = 1.0
"""Seconds between two looks at what all sessions hold."""
LATELY = 64
"""Sessions that ended in order of which the ids are kept: their last acknowledgement may be lost with its path, and the
other side asks for them once more."""
STALE = 64
"""Entries of the time table that may be out of date before it is made anew."""


class Sessions:
    """The one object that a node needs of this room.

    Args:
        config: ``session``, ``punch``, ``dial`` and ``limits`` are used.
        events: where everything is told.
        connections: those with a peer that take streams.
        reach: makes a connection with a peer, in whatever way, or returns one that there is; if told so, makes another
            one beside those. Raises a `KasError`.
        proven: whether a direct connection has shown that it lasts.
        surplus: whether a session that is opened on this stream is one too many on its connection.

    Attributes:
        handler: gets each session that a peer opens; ``None``: they are refused.
        on_some: called when there is a session again, or none any more; must not block nor raise.
        max_streams, max_streams_per_peer: for whoever serves `handle`: no peer can keep another one out.
    """

    def __init__(
        self,
        config: Config,
        events: EventBus,
        *,
        connections: Callable[[PeerId], Sequence[Connection]],
        reach: Callable[[PeerId, bool], Awaitable[Connection]],
        proven: Callable[[Connection], bool],
        surplus: Callable[[YamuxStream], bool],
    ) -> None:
        self.handler: Handler | None = None
        self.on_some: Callable[[], None] = lambda: None
        self.max_streams_per_peer = config.session.max_per_peer + ENDING + FIRST_FRAMES
        self.max_streams = config.session.max_sessions + FIRST_FRAMES * config.limits.max_connections
        self._config = config.session
        self._punch = config.punch
        self._rate = Rates(MOVES_AT_ONCE, MOVE_INTERVAL)
        self._first_within = config.dial.negotiation_timeout
        self._events = events
        self._connections = connections
        self._reach = reach
        self._proven = proven
        self._surplus = surplus
        self._instance = secrets.token_bytes(INSTANCE_SIZE)
        self._of: dict[PeerId, list[SessionStream]] = {}
        self._count = 0
        self._unread: WeakSet[SessionStream] = WeakSet()  # that are over, and were not read to their end
        self._lately: OrderedDict[bytes, PeerId] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._timer: trio.CancelScope | None = None
        self._table: list[tuple[float, int, SessionStream]] = []
        self._entries = itertools.count()
        self._earliest = -math.inf
        self._measure_at = -math.inf

    # What there is

    def __iter__(self) -> Iterator[SessionStream]:
        """All sessions, those that were closed here and are not over yet included."""
        return iter([session for some in self._of.values() for session in some])

    def __len__(self) -> int:
        return self._count

    def of(self, peer: PeerId) -> Collection[SessionStream]:
        """Those with a peer."""
        return self._of.get(peer, ())

    def lives(self, peer: PeerId) -> bool:
        """Whether there is one with a peer on which both sides still talk, be it without a path."""
        return any(session.talks for session in self.of(peer))

    def carries(self, connection: Connection) -> bool:
        """Whether a session goes by a connection now."""
        return any(session.connection is connection for session in self.of(connection.peer))

    def keeps(self, connection: Connection) -> bool:
        """Whether a connection has to stay although nothing is on it: a session may need it soon."""
        return any(session.policy.spare == connection.number for session in self.of(connection.peer))

    def talks(self, stream: YamuxStream) -> bool:
        """Whether a stream belongs to a session on which both sides still talk."""
        return any(session.talks and stream in session.streams for session in self.of(stream.connection.peer))

    # Beginning

    def admit(self, peer: PeerId) -> None:
        """See whether there may be one more session with a peer.

        Raises:
            Refused: names the limit that says no.
            ConnectionLost: the node is not running.
        """
        if self._nursery is None:
            raise ConnectionLost("this node is not running")
        config, some = self._config, self.of(peer)
        for limit, full in (
            ("session.max_sessions", self._count >= config.max_sessions),
            ("session.max_per_peer", sum(each.talks for each in some) >= config.max_per_peer),
            ("session.max_per_peer", len(some) >= config.max_per_peer + ENDING),
        ):
            if full:
                raise Refused(limit, f"there are {len(some)} sessions with {peer}, of {self._count}: {limit} says no")

    def open(self, stream: YamuxStream) -> SessionStream:
        """Open a session on a stream that was opened here and agreed on. It can be used at once.

        Raises:
            Refused, ConnectionLost: as `admit`; the stream is reset.
        """
        peer, now = stream.connection.peer, trio.current_time()
        try:
            self.admit(peer)
        except KasError:
            stream.reset()
            raise
        session = self._make(secrets.token_bytes(ID_SIZE), peer, by_us=True, now=now)
        number = session.add(stream)
        session.machine.open(number, now)
        self._begin(session, number, now)
        return session

    def _make(self, id: bytes, peer: PeerId, *, by_us: bool, now: float) -> SessionStream:
        config = self._config
        machine = Session(
            id, opener=by_us, window=config.window, instance=self._instance, patience=config.patience, now=now
        )
        policy = PathPolicy(quiet=self._punch.quiet, steady=self._punch.steady)
        return SessionStream(machine, peer, by_us=by_us, window=config.window, policy=policy, owner=self)

    def _begin(self, session: SessionStream, number: int, now: float) -> None:
        connection = session.stream.connection
        self._of.setdefault(session.peer, []).append(session)
        self._count += 1
        if self._count == 1:
            self.on_some()
        session.policy.moved(self._candidate(connection, now), now)
        session.look_at = now
        self._events.emit(
            SessionOpened(
                peer=session.peer, session=session.machine.id.hex(), by_us=session.by_us, path=connection.path
            )
        )
        session.begin(number)
        self.rearm(session)

    def make_way(self, connection: Connection) -> None:
        """Give up what was closed here and has not left by a connection yet. Its end would come behind the beginning of
        the next one, which would be taken for one too many."""
        for session in [*self.of(connection.peer)]:
            if session.closed and session.connection is connection and session.unsent:
                stream = session.stream
                session.end(Code.STOPPED, "another one takes its place")
                stream.reset()

    def end(self, peer: PeerId, reason: str) -> None:
        """End all sessions with a peer, and tell it.

        Args:
            reason: why, in words.
        """
        for session in [*self.of(peer)]:
            session.end(Code.STOPPED, reason)

    # What peers want

    async def handle(self, stream: YamuxStream) -> None:
        """Serve a stream that a peer opened, until the session that it opens is over; or give it to the session that it
        is for. To be served so that the stream is ours when this returns.

        Raises:
            RemoteProtocolError: the peer broke the protocol.
        """
        peer, parser = stream.connection.peer, Parser()
        try:
            with trio.fail_after(self._first_within):
                first = await receive_first(stream, lambda data: (got, b"") if (got := parser.first(data)) else None)
        except trio.TooSlowError:
            self._refuse(stream, Code.TIMEOUT, "no session was named in time", "timeout")
            return
        except RemoteProtocolError:
            self._events.emit(SessionRefused(peer=peer, reason="protocol"))
            raise
        self._restarted(peer, first.instance)
        if isinstance(first, Attach):
            self._attached(stream, parser, first)
        else:
            await self._opened(stream, parser, first)

    def _restarted(self, peer: PeerId, instance: bytes) -> None:
        """End the sessions of a peer whose process is not the same any more."""
        for session in [*self.of(peer)]:
            if session.machine.peer_instance not in (None, instance):
                session.end(Code.RESTARTED, "the peer has been started anew")

    async def _opened(self, stream: YamuxStream, parser: Parser, first: Open) -> None:
        connection, now = stream.connection, trio.current_time()
        peer = connection.peer
        handler = self.handler
        for session in [*self.of(peer)]:
            if session.lost_at is not None:  # who has one that lives opens no other
                session.end(Code.UNKNOWN, "the peer has opened another one")
        if self._find(peer, first.id) is not None:
            return self._refuse(stream, Code.REFUSED, "there is this session already", "replayed")
        if handler is None:
            return self._refuse(stream, Code.REFUSED, "no Kaspa stream is served here", "withdrawn")
        if self._surplus(stream):
            self._limit(stream, "one_kaspa_stream")
            return self._refuse(stream, Code.BUSY, "this connection has a Kaspa stream already", "busy")
        try:
            self.admit(peer)
        except Refused as error:
            self._limit(stream, error.limit)
            return self._refuse(stream, Code.BUSY, "as many sessions as are allowed", error.limit)
        session = self._make(first.id, peer, by_us=False, now=now)
        number = session.add(stream)
        session.machine.accept(number, parser, first, now)
        self._begin(session, number, now)
        done = False
        try:
            await handler(session)
            await session.aclose()
            done = True
        except Exception:
            session.reset()
            raise
        finally:
            if not done:  # cancelled: this node is stopping
                session.end(Code.STOPPED, "the peer is stopping")

    def _attached(self, stream: YamuxStream, parser: Parser, first: Attach) -> None:
        peer = stream.connection.peer
        session, now = self._find(peer, first.id), trio.current_time()
        if session is None and self._lately.get(first.id) == peer:
            self._refuse(stream, Code.ENDED, "", "ended")
        elif session is None:
            self._refuse(stream, Code.UNKNOWN, "there is no such session", "unknown")
        elif not self._rate.take(peer, now):
            self._refuse(stream, Code.BUSY, "too many moves", "rate")
        else:
            number = session.add(stream)
            session.machine.attached(number, parser, first, now)
            session.begin(number)

    def _find(self, peer: PeerId, id: bytes) -> SessionStream | None:
        return next((session for session in self.of(peer) if session.machine.id == id), None)

    def _refuse(self, stream: YamuxStream, code: Code, text: str, reason: str) -> None:
        self._events.emit(SessionRefused(peer=stream.connection.peer, reason=reason))
        stream.close(encode_reset(code, text))

    def _limit(self, stream: YamuxStream, limit: str) -> None:
        connection = stream.connection
        self._events.emit(LimitHit(reason=limit, peer=connection.peer, address=connection.remote_address))

    # What a node tells; none of these waits or raises

    def connected(self, connection: Connection) -> None:
        """A connection is up, of any path and direction."""
        now = trio.current_time()
        for session in self.of(connection.peer):
            if session.lost_at is None:
                self._look_soon(session, now)
            elif self._nursery is not None:
                self._nursery.start_soon(self._isolate, session, self._join, connection)

    def disconnected(self, connection: Connection) -> None:
        """A connection has ended."""
        now = trio.current_time()
        for session in [*self.of(connection.peer)]:
            try:
                session.lose(connection)
            except Exception as error:  # noqa: BLE001 - the node has other things to do when a connection ends
                self.failed(session, error)
            self._look_soon(session, now)

    def on_direct(self, peer: PeerId) -> None:
        """A direct connection with a peer has proven itself."""
        for session in self.of(peer):
            self._look_soon(session, trio.current_time())

    # Running

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the sessions until cancelled; then end them all, and tell the peers."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    task_status.started()
                    await self._keep_time()
                finally:
                    self._nursery = None  # before it is closed: nobody may start anything in it then
        finally:
            for session in self:
                session.end(Code.STOPPED, "the peer is stopping")

    async def _keep_time(self) -> None:
        table = self._table
        while True:
            with trio.CancelScope(deadline=table[0][0] if table else math.inf) as self._timer:
                await trio.sleep(math.inf)
            self._timer = None
            now = trio.current_time()
            due = []
            while table and table[0][0] <= now:
                at, _, session = heapq.heappop(table)
                if at == session.armed:
                    due.append(session)
            self._earliest = now + TICK
            for session in due:
                session.armed = math.inf
                if session.over:
                    continue
                try:
                    session.on_time(now)
                    if session.look_at <= now:
                        self._look(session, now)
                except Exception as error:  # noqa: BLE001 - one session is isolated from all others
                    self.failed(session, error)
                self.rearm(session)
            if now >= self._measure_at:  # whatever holds something has a timer, or had one when it ended
                self._measure_at = now + MEASURE_EVERY
                self._bound_memory(now)

    def _bound_memory(self, now: float) -> None:
        """A peer that acknowledges nothing has us hold a window full; many of them shall not take all the memory."""
        some = [*self, *self._unread]
        for session in some:
            session.look_at_progress(now)
        some.sort(key=lambda each: (each.held * (now - each.got_on_at), each.held))
        held = sum(each.held for each in some)
        reason = "all sessions together hold too much, and this one most of it for longest"
        while held > self._config.max_memory:
            worst = some.pop()
            held -= worst.held
            self._limit(worst.stream, "session.max_memory")
            worst.end(Code.BUSY, reason)
            worst.forget(Code.BUSY, reason)

    def rearm(self, session: SessionStream) -> None:
        """Its deadline may have come nearer."""
        at = max(min(session.machine.deadline, session.look_at), self._earliest)
        if at >= session.armed:
            return
        session.armed = at
        table = self._table
        if len(table) > STALE + 2 * self._count:
            table[:] = [each for each in table if each[0] == each[2].armed and not each[2].over]
            heapq.heapify(table)
        heapq.heappush(table, (at, next(self._entries), session))
        if self._timer is not None and at < self._timer.deadline:
            self._timer.deadline = at

    def told(self, session: SessionStream, command: Command, stream: YamuxStream) -> None:
        """What a session's machine has told, once the paths follow it.

        Args:
            stream: the path that it is about; of `Switched` the one before; of others the present one.
        """
        peer, id, now = session.peer, session.machine.id.hex(), trio.current_time()
        match command:
            case Switched():
                self._switched(session, command, stream, now)
            case Hung() if command.asked:
                connection = stream.connection
                if now - connection.heard_at >= command.silent_for - HEARD and connection.close_reason is None:
                    silence = f"nothing came from the peer for {command.silent_for:.1f} s, though it was asked"
                    connection.abort(silence, broke=True)
            case Waiting() if session.machine.current is None and session.recovery is None:
                path = stream.connection.path
                self._events.emit(SessionWaiting(peer=peer, session=id, path=path, reason=command.reason))
                if self._nursery is not None:
                    session.recovery = trio.CancelScope()
                    self._nursery.start_soon(self._isolate, session, self._recover, session.recovery)
            case DropPath(number, code, reason, last):
                if number == session.attempt and not session.over:
                    session.attempt = None
                    path, name = stream.connection.path, Code(code).name.lower()
                    self._events.emit(SessionNotMoved(peer=peer, session=id, path=path, code=name, reason=reason))
                elif last and code in (Code.SUPERSEDED, Code.UNKNOWN):
                    self._events.emit(SessionRefused(peer=peer, reason=Code(code).name.lower()))
                session.look_at = min(session.look_at, now + NOT_YET)  # it may have been where it was to go
                self.rearm(session)
            case Broken():
                address = stream.connection.remote_address
                self._events.emit(PeerMisbehaved(peer=peer, address=address, layer=SESSION, reason=command.reason))
            case Ended():
                self._forget(session)
                end = command.end
                self._events.emit(
                    SessionEnded(
                        peer=peer,
                        session=id,
                        code=word(end),
                        reason=end.reason,
                        by_peer=end.by_peer,
                        seconds=now - session.opened_at,
                        moves=session.machine.moves,
                    )
                )

    def _switched(self, session: SessionStream, command: Switched, before: YamuxStream, now: float) -> None:
        connection = session.stream.connection
        self._stop_recovery(session)
        reason = session.reason if command.by_us else _as_here(session, connection, command)
        session.wish = session.attempt = None
        session.policy.moved(self._candidate(connection, now), now)
        self._look_soon(session, now)
        self._events.emit(
            SessionMoved(
                peer=session.peer,
                session=session.machine.id.hex(),
                path=connection.path,
                previous=before.connection.path,
                by_us=command.by_us,
                reason=reason,
                resent=command.resent,
                seconds_without=command.waited,
            )
        )

    def _forget(self, session: SessionStream) -> None:
        some = self._of.get(session.peer, [])
        if session not in some:
            return
        some.remove(session)
        if not some:
            del self._of[session.peer]
        if session.machine.unread:
            self._unread.add(session)
        if session.machine.ended is not None and session.machine.ended.code == Code.ENDED:
            self._lately[session.machine.id] = session.peer
            if len(self._lately) > LATELY:
                self._lately.popitem(last=False)
        self._count -= 1
        self._stop_recovery(session)
        if not self._count:
            self.on_some()

    @staticmethod
    def _stop_recovery(session: SessionStream) -> None:
        if session.recovery is not None:
            session.recovery.cancel()
            session.recovery = None

    def failed(self, session: SessionStream, error: Exception) -> None:
        """A mistake of ours ends one session, and nothing else."""
        logger.error("an internal error ended %r", session, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        self._events.emit(InternalError(peer=session.peer, where="a session", reason=reason))
        self._forget(session)
        session.abandon("an internal error")

    async def _isolate(self, session: SessionStream, task: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await task(session, *args)
        except Exception as error:  # noqa: BLE001 - one session is isolated from all others
            self.failed(session, error)

    # Where each goes on

    def _candidate(self, connection: Connection, now: float) -> Candidate:
        path, circuit = connection.path, connection.circuit
        return Candidate(
            number=connection.number,
            kind=path.kind,
            relay=path.relay,
            rtt=connection.rtt,
            age=now - connection.opened_at,
            proven=circuit is None and self._proven(connection),
            limits=circuit.limits if circuit is not None else None,
        )

    def _look_soon(self, session: SessionStream, now: float) -> None:
        session.look_at = now
        self.rearm(session)

    def _look(self, session: SessionStream, now: float) -> None:
        """See whether a session that has a path should have a better one."""
        session.look_at = math.inf
        here, machine = session.connection, session.machine
        if here is None or session.closed or session.moving or machine.attaching is not None:
            return
        if not machine.established:
            session.look_at = now + NOT_YET
            return
        there = self._connections(session.peer)
        choice = session.policy.choose(here.number, [self._candidate(each, now) for each in there], now)
        session.look_at = session.policy.look_at
        if choice is None:
            session.wish = None
            return
        if session.wish is None or session.wish[0] != choice.number:
            session.wish = choice.number, now, choice.reason
        delay = OPENER_FIRST_AT_ONCE if choice.at_once else OPENER_FIRST
        due = session.wish[1] + (0.0 if session.by_us else delay)
        if due > now:
            session.look_at = min(session.look_at, due)
        elif self._nursery is not None:
            connection = next(each for each in there if each.number == choice.number)
            session.moving = True
            self._nursery.start_soon(self._isolate, session, self._move, connection, choice.reason)

    async def _move(self, session: SessionStream, connection: Connection, reason: str) -> None:
        try:
            if not session.over and session.connection is not connection:
                await self._attach(session, connection, reason)
        finally:
            session.moving = False
            self._look_soon(session, trio.current_time())

    async def _attach(self, session: SessionStream, connection: Connection, reason: str) -> None:
        now = trio.current_time()
        try:
            stream = await connection.open_stream(SESSION)  # one protocol: this waits for nothing
        except KasError:
            session.policy.lost(connection.number, now)
            return
        session.reason = reason
        session.tried_at = now
        number = session.attempt = session.add(stream)
        session.machine.attach(number, now)
        session.begin(number)

    async def _join(self, session: SessionStream, connection: Connection) -> None:
        """A connection has come up while a session waits for one."""
        if not session.by_us:
            await trio.sleep(OPENER_FIRST_AT_ONCE)
        if not connection.closing and self._may_try(session, connection):
            await self._attach(session, connection, "the path was lost")

    def _may_try(self, session: SessionStream, connection: Connection | None) -> bool:
        """Whether a session needs a path, and none is being tried, or another one than this for too long."""
        if session.over or session.lost_at is None:
            return False
        tried = session.attaching
        return tried is None or (tried is not connection and trio.current_time() - session.tried_at >= UNANSWERED)

    async def _recover(self, session: SessionStream, scope: trio.CancelScope) -> None:
        with scope:
            if not session.by_us:
                await trio.sleep(OPENER_FIRST_AT_ONCE)
            for pause in itertools.chain(RETRIES, itertools.repeat(RETRIES[-1])):
                if self._may_try(session, None):
                    await self._find_path(session)
                await trio.sleep(pause)

    async def _find_path(self, session: SessionStream) -> None:
        now, tried = trio.current_time(), session.attaching
        there = self._connections(session.peer)
        candidates = [self._candidate(each, now) for each in there if each is not tried]
        choice = session.policy.choose(None, candidates, now)
        if choice is not None:
            connection = next(each for each in there if each.number == choice.number)
        elif session.closed:
            return  # what was written last is not worth a dial
        else:
            try:
                connection = await self._reach(session.peer, bool(there))
            except KasError as error:
                session.note = in_words(error)
                return
        if self._may_try(session, connection):
            await self._attach(session, connection, "the path was lost")


def _as_here(session: SessionStream, connection: Connection, command: Switched) -> str:
    """Why the other side has moved a session, if this one had the same reason to."""
    if command.waited:
        return "the path was lost"
    return session.wish[2] if session.wish is not None and session.wish[0] == connection.number else ""
