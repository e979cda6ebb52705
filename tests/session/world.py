"""Two sides of a session, and a network between them that does whatever its tape says."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from kas_libp2p.session import _machine
from kas_libp2p.session._machine import Broken, DropPath, Ended, EndPath, PathOver, Session
from kas_libp2p.session._wire import Attach, Code, Open, Parser

ID = bytes(range(16))
INSTANCES = b"instance", b"another."
EOF, RST = "eof", "rst"
PATTERNS = [random.Random(each).randbytes(1 << 16) for each in (1, 2)]
"""What each side writes: no two places of it look alike."""


@contextmanager
def small_numbers() -> Iterator[None]:
    """Sizes at which a few hundred bytes fill every window and meet every rule."""
    with mock.patch.multiple(_machine, INITIAL_LIMIT=64, FRAME=32, SMALL=8):
        yield


class Stream:
    """One stream between the two.

    Attributes:
        opener: who opened it.
        queues: what is under way, by who sent it: bytes, `EOF`, `RST`.
        hung: nothing arrives any more, and nobody hears why.
        lost: the connection is gone.
        noticed: whether each side was told that, or has left the stream itself.
        parsers: of the first frame, which the side that did not open it has yet to read.
        eof: whether each side's end has arrived at the other.
        over: whether each side's machine is done with it.
    """

    __slots__ = ("eof", "hung", "lost", "noticed", "number", "opener", "over", "parser", "queues")

    def __init__(self, number: int, opener: int) -> None:
        self.number = number
        self.opener = opener
        self.queues: tuple[deque[bytes | str], deque[bytes | str]] = deque(), deque()
        self.hung = self.lost = False
        self.noticed = [False, False]
        self.over = [False, False]
        self.eof = [False, False]
        self.parser: Parser | None = Parser()


class World:
    """Both sides (side 0 opened the session), what they wrote and read, and all streams.

    Args:
        window: bytes.
        piece: bytes that are written at once, at most.
    """

    def __init__(self, *, window: int = 128, piece: int = 64, patience: float = 30.0) -> None:
        self.now = 100.0
        self.window, self.piece = window, piece
        self.sides = [
            Session(ID, opener=each == 0, window=window, instance=INSTANCES[each], patience=patience, now=self.now)
            for each in (0, 1)
        ]
        self.written = [0, 0]
        self.read = [0, 0]
        self.streams: list[Stream] = []
        self.first_frames: list[tuple[int, bytes]] = []  # who sent it
        self.attached: set[tuple[int, Attach]] = set()  # who took it, for good
        self.accepted = False
        self.disturbed = False  # whether somebody ended the session before its end
        stream = self.new_stream(0)
        self.sides[0].open(stream.number, self.now)

    # What the shell does

    def new_stream(self, opener: int) -> Stream:
        stream = Stream(len(self.streams) + 1, opener)
        self.streams.append(stream)
        return stream

    def write(self, side: int, size: int) -> None:
        session = self.sides[side]
        if session.room > 0 and not session.finished and session.ended is None:
            size = min(size, self.piece)
            at = self.written[side]
            session.write(PATTERNS[side][at : at + size])
            self.written[side] += size

    def read_some(self, side: int, most: int | None) -> bool:
        piece = self.sides[side].read(most)
        if piece is None:
            return False
        at = self.read[side]
        assert piece == PATTERNS[1 - side][at : at + len(piece)], "other bytes than those written"
        assert piece
        assert most is None or len(piece) <= most
        self.read[side] += len(piece)
        return True

    def may_attach(self, side: int) -> bool:
        session = self.sides[side]
        return session.ended is None and (session.established or session.current is None)

    def attach(self, side: int, *, lost: bool = False) -> Stream:
        stream = self.new_stream(side)
        self.sides[side].attach(stream.number, self.now, lost=lost)
        self.obey(side)
        return stream

    def obey(self, side: int) -> None:
        """Do what the machine says."""
        for command in self.sides[side].take_commands():
            if isinstance(command, EndPath):
                queue = self.streams[command.path - 1].queues[side]
                if command.last:
                    queue.append(command.last)
                queue.append(EOF)
            elif isinstance(command, DropPath):
                stream = self.streams[command.path - 1]
                queue = stream.queues[side]
                if command.last:
                    queue.append(command.last)
                else:
                    queue.clear()
                queue.append(RST)
                stream.over[side] = True
            elif isinstance(command, PathOver):
                stream = self.streams[command.path - 1]
                assert stream.eof[1 - side]
                stream.over[side] = True
            elif isinstance(command, Broken):
                raise AssertionError(f"side {side} says that the other one broke the protocol: {command.reason}")
            elif isinstance(command, Ended):
                assert self.sides[side].paths == ()

    def pump(self, side: int, room: int = 1 << 20) -> bool:
        """Write what the machine has to send."""
        session = self.sides[side]
        any_taken = False
        for path in session.paths:
            if session.pending(path):
                taken = session.take(path, room, self.now)
                assert taken or not room, "pending, but nothing to take"
                stream = self.streams[path - 1]
                first = stream.opener == side and taken and taken[0][0] == 2
                if first:
                    self.first_frames.append((side, taken[0]))
                stream.queues[side].extend(taken)
                any_taken = any_taken or bool(taken)
        self.obey(side)
        return any_taken

    # What the network does

    def deliver(self, stream: Stream, sender: int, most: int = 1 << 20) -> bool:
        """Bring so many bytes of what is under way, or its end."""
        queue = stream.queues[sender]
        if stream.hung or stream.lost or not queue:
            return False
        to = 1 - sender
        piece = queue[0]
        if isinstance(piece, bytes):
            if most >= len(piece):
                queue.popleft()
                if len(piece) < 40 and queue and isinstance(queue[0], bytes) and most > 100:
                    piece += queue.popleft()  # type: ignore[operator]
            else:
                queue[0] = piece[most:]
                piece = piece[:most]
        else:
            queue.popleft()
        if stream.over[to]:
            return True
        session = self.sides[to]
        if to != stream.opener and stream.parser is not None:
            if not isinstance(piece, bytes):
                stream.parser = None
                stream.over[to] = True
                return True
            first = stream.parser.first(piece)
            if first is None:
                return True
            parser, stream.parser = stream.parser, None
            if isinstance(first, Open):
                self.accepted = True
                session.accept(stream.number, parser, first, self.now)
            else:
                assert isinstance(first, Attach)
                session.attached(stream.number, parser, first, self.now)
                if session.current == stream.number:
                    assert (to, first) not in self.attached, "a replay was taken"
                    self.attached.add((to, first))
        elif isinstance(piece, bytes):
            session.receive(stream.number, piece, self.now)
        elif piece == EOF:
            stream.eof[sender] = True
            session.path_eof(stream.number, self.now)
        else:
            stream.noticed[to] = stream.over[to] = True
            stream.queues[to].clear()
            session.path_lost(stream.number, "reset", self.now)
        self.obey(to)
        return True

    def lose(self, stream: Stream, *, now_noticed: tuple[int, ...]) -> None:
        stream.lost = True
        for queue in stream.queues:
            queue.clear()
        for side in now_noticed:
            self.notice(stream, side)

    def notice(self, stream: Stream, side: int) -> None:
        """A side hears that the connection is gone."""
        if stream.lost and not stream.noticed[side]:
            stream.noticed[side] = True
            if not stream.over[side]:
                stream.over[side] = True
                self.sides[side].path_lost(stream.number, "lost", self.now)
                self.obey(side)

    def replay(self, side: int, frame: bytes) -> None:
        """An ATTACH of this side comes a second time, on a stream of its own."""
        stream = self.new_stream(side)
        stream.over[side] = True
        stream.queues[side].append(frame)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for side in (0, 1):
            session = self.sides[side]
            if self.now >= session.deadline:
                session.on_timeout(self.now)
                assert session.deadline > self.now
                self.obey(side)

    # What must hold

    def check(self) -> None:
        for side, session in enumerate(self.sides):
            assert 0 <= session.unread + session.ahead <= self.window
            assert session.in_flight <= self.window + self.piece
            assert self.read[side] <= self.written[1 - side]
            assert len(session.paths) <= _machine.MAX_PATHS
            kept = sum(map(len, session._sent)) + sum(map(len, session._unsent)) - session._unsent_head
            assert kept <= self.window + 2 * (self.piece + _machine.SMALL)
            assert sum(map(len, session._unread)) - session._read_head == session.unread
            if session._ahead is not None:
                assert sum(sum(map(len, each.pieces)) for each in session._ahead) == session.ahead
            if session.ended is None:
                due = [session._due(each, self.now) for each in session._paths]
                if session.current is None:
                    due.append(session._lost_at + session._patience)
                assert session.deadline <= min([session._tell_at, session._linger_at, *due]), "a timer is forgotten"

    def settle(self, *, seconds: float = 10.0) -> None:
        """From now on new paths are healthy, everybody reads, and who has no path attaches one. What hangs stays so.

        Until nothing is owed any more, or so many seconds are over: a path that hangs is noticed within 4, one that
        does not drain within 3, and one may come after the other.
        """
        end = self.now + seconds
        while self.now < end:
            moved = True
            while moved:
                moved = self.pump(0) | self.pump(1)
                for stream in self.streams:
                    for sender in (0, 1):
                        while self.deliver(stream, sender):
                            moved = True
                for side in (0, 1):
                    while self.read_some(side, None):
                        moved = True
                self.check()
            if self.is_done():
                return
            for side in (0, 1):
                session = self.sides[side]
                if session.current is None and session.attaching is None and self.may_attach(side):
                    self.attach(side)
                    break
            self.tick(0.25)

    def is_done(self) -> bool:
        if all(each.ended is not None for each in self.sides):
            return True
        return self.sides[0].current == self.sides[1].current and all(
            each.ended is None
            and not each.closed
            and each.current is not None
            and each.attaching is None
            and len(each.paths) == 1
            and each.acked == size
            and (not each.finished or each._fin_acked)
            for each, size in zip(self.sides, self.written, strict=True)
        )


DELAYS = 0.05, 0.2, 0.5, 1.0, 1.5, 2.5, 4.0, 5.5


class Tape:
    """Decisions, read from bytes. Behind its end everything is 0."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def next(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)


def play(world: World, tape: Tape) -> None:
    """Let the tape decide what happens, in which order. Its first byte says how often paths are lost."""
    sides = world.sides
    steady = tape.next()
    while not tape.over:
        byte = tape.next()
        act, side, arg = byte & 15, byte >> 4 & 1, byte >> 5
        if act == 0:
            world.pump(side)
        elif act == 1:
            world.pump(side, 1 << arg)
        elif act == 2:
            world.write(side, 1 + arg)
        elif act == 3:
            world.write(side, 1 + tape.next() % world.piece)
        elif act == 4:
            world.read_some(side, None if arg < 5 else arg)
        elif act <= 7:
            live = [each for each in world.streams if each.queues[side] and not each.hung and not each.lost]
            if live:
                stream = live[-1 - arg % len(live)]
                if act == 7:
                    world.deliver(stream, side, 1 + tape.next() % 40)
                elif act == 6:
                    world.deliver(stream, side)
                else:
                    while world.deliver(stream, side):
                        pass
        elif act == 8:
            for each in (0, 1):
                world.pump(each)
            for stream in world.streams:
                for sender in (0, 1):
                    world.deliver(stream, sender)
        elif act == 9:
            if world.may_attach(side) and len(world.streams) < 16:
                world.attach(side)
                if arg & 1:
                    world.pump(side)
        elif act == 10:
            byte = tape.next()
            live = [each for each in world.streams if not each.lost]
            if live and tape.next() >= steady:
                stream = live[-1 - (byte >> 2) % len(live)]
                for sender in (0, 1):  # some of it still arrives
                    if byte >> 6:
                        world.deliver(stream, sender, byte >> 3)
                noticed = ((0, 1), (0,), (1,), ())[byte & 3]
                world.lose(stream, now_noticed=noticed)
        elif act == 11:
            world.tick(DELAYS[arg])
        elif act == 12:
            if arg >= 4 and len(world.streams) > side:
                world.streams[-1 - side].hung = arg >= 6  # or it goes on
            for stream in world.streams:
                world.notice(stream, side)
        elif act == 13:
            if not (world.accepted or side == 0):
                pass
            elif arg < 4:
                sides[side].finish(world.now)
            elif arg == 6 and tape.next() < 64:
                world.disturbed = True
                sides[side].close(world.now)
            elif arg == 7 and tape.next() < 16:
                world.disturbed = True
                sides[side].reset(Code.STOPPED, "enough", world.now)
            world.obey(side)
        elif act == 14:
            if world.first_frames and arg < 3:
                world.replay(*world.first_frames[tape.next() % len(world.first_frames)])
        else:
            current = sides[side].current
            if current is not None:
                sides[side].delivered(current, tape.next(), world.now)
        world.check()
