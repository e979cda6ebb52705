"""The session's machine: what each rule says, one by one."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kas_libp2p.errors import LocalProtocolError
from kas_libp2p.session import _machine, _wire
from kas_libp2p.session._machine import (
    DRAIN_WITHIN,
    Broken,
    Command,
    DropPath,
    Ended,
    EndPath,
    Hung,
    PathOver,
    Session,
    Switched,
    Waiting,
)
from kas_libp2p.session._wire import Code, Parser

ID = bytes(range(16))
ONE, TWO = b"instance", b"another."
KIB = 1024
MIB = 1024 * KIB


def session(*, opener: bool, window: int = MIB, now: float = 0.0, patience: float = 30.0) -> Session:
    return Session(ID, opener=opener, window=window, instance=ONE if opener else TWO, patience=patience, now=now)


class Both:
    """Two sides, and streams between them that deliver at once, in order, when told to. Side 0 is the opener."""

    def __init__(self, *, window: int = MIB, patience: float = 30.0) -> None:
        self.now = 0.0
        self.sides = [
            session(opener=True, window=window, patience=patience),
            session(opener=False, window=window, patience=patience),
        ]
        self.seen: list[list[Command]] = [[], []]
        self.got = [b"", b""]
        self.known: list[set[int]] = [set(), set()]
        self.cut: set[int] = set()
        self.wire: dict[tuple[int, int], list[bytes | None]] = {}  # by path and sender; None is the end
        self.sides[0].open(1, self.now)
        self.known[0].add(1)
        self.settle()

    def settle(self, *, read: bool = True) -> None:
        """Carry everything until nothing moves any more."""
        moved = True
        while moved:
            moved = self.pump(0) | self.pump(1)
            for path, sender in list(self.wire):
                while self.deliver(path, sender):
                    moved = True
            if read:
                for number, side in enumerate(self.sides):
                    while (piece := side.read(None)) is not None:
                        self.got[number] += piece
                        moved = True

    def pump(self, number: int) -> bool:
        side = self.sides[number]
        moved = False
        for path in side.paths:
            if side.pending(path):
                for piece in side.take(path, 64 * KIB, self.now):
                    self.put(path, number, piece)
                    moved = True
        for command in side.take_commands():
            moved = True
            self.seen[number].append(command)
            if isinstance(command, EndPath):
                if command.last:
                    self.put(command.path, number, command.last)
                self.put(command.path, number, None)
            elif isinstance(command, DropPath):
                if command.last:
                    self.put(command.path, number, command.last)
                self.lose(command.path, 1 - number)
        return moved

    def put(self, path: int, number: int, piece: bytes | None) -> None:
        if path not in self.cut:
            self.wire.setdefault((path, number), []).append(piece)

    def deliver(self, path: int, sender: int) -> bool:
        queue = self.wire.get((path, sender))
        if not queue:
            return False
        piece = queue.pop(0)
        other = self.sides[1 - sender]
        if piece is None:
            other.path_eof(path, self.now)
        elif path in self.known[1 - sender]:
            other.receive(path, piece, self.now)
        else:
            self.known[1 - sender].add(path)
            parser = Parser()
            first = parser.first(piece)
            if isinstance(first, _wire.Open):
                other.accept(path, parser, first, self.now)
            elif first is not None:
                other.attached(path, parser, first, self.now)
        return True

    def lose(self, path: int, *numbers: int) -> None:
        """What is under way is lost, and these sides are told."""
        self.settle_drop(path)
        for number in numbers or (0, 1):
            self.sides[number].path_lost(path, "cut", self.now)

    def settle_drop(self, path: int) -> None:
        # A RESET that was written before the stream is dropped arrives nevertheless.
        for number in (0, 1):
            queue = self.wire.get((path, number))
            while queue and queue[0] is not None and queue[0][0] == _wire.RESET:
                self.deliver(path, number)
            if queue:
                queue.clear()

    def attach(self, number: int, path: int, *, lost: bool = False) -> None:
        self.known[number].add(path)
        self.sides[number].attach(path, self.now, lost=lost)

    def pass_time(self, seconds: float, *, step: float = 0.1) -> None:
        """Let time pass, with everything carried in each step."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step)
            for side in self.sides:
                if self.now >= side.deadline:
                    side.on_timeout(self.now)
            self.settle()

    def commands(self, number: int, kind: type[Command]) -> list[Command]:
        return [each for each in self.seen[number] if isinstance(each, kind)]


def test_bytes_in_both_directions() -> None:
    both = Both()
    both.sides[0].write(b"hello")
    both.sides[1].write(b"x" * 200_000)
    both.settle()
    assert both.got == [b"x" * 200_000, b"hello"]
    assert both.sides[0].established
    both.pass_time(1.5)
    assert both.sides[0].in_flight == both.sides[1].in_flight == 0


def test_the_opener_does_not_wait_for_the_answer() -> None:
    side = session(opener=True)
    side.open(1, 0.0)
    side.write(b"z" * 300 * KIB)
    pieces = b"".join(side.take(1, MIB, 0.0))
    first = _wire.encode_open(_wire.Open(256 * KIB, ID, ONE))
    assert pieces[: len(first)] == first
    assert side.sent == 256 * KIB
    with pytest.raises(LocalProtocolError):
        side.attach(2, 0.0)


def test_a_move_loses_nothing_and_ends_the_old_path() -> None:
    both = Both()
    both.sides[0].write(b"a" * 100)
    both.sides[1].write(b"b" * 100)
    both.attach(0, 2)
    both.settle()
    assert both.got == [b"b" * 100, b"a" * 100]
    for number in (0, 1):
        assert both.sides[number].current == 2
        assert both.commands(number, Switched) == [Switched(2, 1, number == 0, 0, 0.0)]
        assert both.commands(number, EndPath) == [EndPath(1, b"")]
    both.sides[0].write(b"c")
    both.sides[1].write(b"d")
    both.pass_time(1.5)
    assert [each[-1:] for each in both.got] == [b"d", b"c"]
    for number in (0, 1):
        assert both.commands(number, PathOver) == [PathOver(1)]
        assert both.sides[number].paths == (2,)
        assert both.sides[number].resent == both.sides[number].duplicate == 0


@pytest.mark.parametrize("mover", [0, 1])
def test_the_mover_goes_on_with_the_old_path_until_it_is_welcome(mover: int) -> None:
    both = Both()
    side = both.sides[mover]
    both.attach(mover, 2)
    side.write(b"before")
    both.pump(mover)
    assert side.current == 1
    assert side.attaching == 2
    assert both.deliver(1, mover)
    both.settle()
    assert side.current == 2
    assert both.got[1 - mover] == b"before"


def test_what_was_on_a_lost_path_is_sent_again() -> None:
    both = Both()
    both.sides[0].write(b"a" * 1000)
    both.pump(0)
    both.lose(1)
    assert both.sides[0].current is None
    both.settle()
    assert both.commands(0, Waiting) == [Waiting(1, "cut")]
    both.now += 3.0
    both.attach(0, 2)
    both.settle()
    assert both.got[1] == b"a" * 1000
    assert both.sides[0].resent == 1000
    assert both.commands(0, Switched) == [Switched(2, None, True, 1000, 3.0)]


def test_the_other_side_is_told_of_a_loss_that_it_has_not_noticed() -> None:
    both = Both()
    both.sides[1].write(b"b" * 1000)
    both.pump(1)
    both.lose(1, 0)
    both.attach(0, 2)
    both.settle()
    assert both.got[0] == b"b" * 1000
    assert both.sides[1].current == 2
    assert DropPath(1, Code.LOST, "the peer has lost it", b"") in both.seen[1]


def test_the_answer_to_an_attach_tells_of_a_loss_as_well() -> None:
    both = Both()
    both.sides[0].write(b"a" * 1000)
    both.pump(0)
    both.lose(1, 1)
    both.attach(0, 2)
    both.settle()
    assert both.got[1] == b"a" * 1000


def test_what_was_lost_behind_the_attach_is_told_with_an_acknowledgement() -> None:
    both = Both()
    both.sides[1].write(b"b" * 1000)
    both.pump(1)
    both.attach(0, 2)
    both.pump(0)
    both.lose(1, 0)
    both.settle()
    assert both.got[0] == b"b" * 1000


@pytest.mark.parametrize("first", [0, 1])
def test_crossing_moves_end_on_the_opener_s_path(first: int) -> None:
    both = Both()
    both.attach(0, 2)
    both.attach(1, 3)
    for side in both.sides:
        side.write(b"during")
    both.pump(0)
    both.pump(1)
    both.deliver(2 + first, first)
    both.settle()
    for side in both.sides:
        side.write(b" after")
    both.pass_time(7.0)
    assert both.got == [b"during after"] * 2
    assert [side.paths for side in both.sides] == [(2,), (2,)]
    assert both.sides[0].resent == both.sides[1].resent == 0


def test_without_a_path_it_ends_after_its_patience() -> None:
    both = Both()
    both.lose(1)
    both.pass_time(29.5)
    assert both.sides[0].ended is None
    both.pass_time(1.0)
    for side in both.sides:
        assert side.ended is not None
        assert side.ended.code == Code.LOST
        assert side.ended.reason == "no path for 30 s (cut)"
        assert side.deadline == math.inf


def test_a_path_that_hangs_is_dropped_and_an_idle_one_is_left_alone() -> None:
    both = Both()
    both.sides[0].write(b"a")
    both.pass_time(200)
    assert both.sides[0].deadline == math.inf
    assert both.sides[0].current == 1
    both.cut.add(1)
    both.pass_time(1000)
    assert both.sides[0].current == 1
    both.sides[0].write(b"b")
    both.settle()
    both.pass_time(3.9)
    assert not both.commands(0, Hung)
    both.pass_time(0.3)
    (hung,) = both.commands(0, Hung)
    assert isinstance(hung, Hung)
    assert hung.path == 1
    assert 3.9 < hung.silent_for < 4.2
    assert both.sides[0].current is None


def test_close_in_order() -> None:
    both = Both()
    both.sides[0].write(b"last words")
    both.sides[0].close(both.now)
    both.settle()
    assert both.got[1] == b"last words"
    assert both.sides[1].eof
    both.sides[1].write(b"thrown away")
    both.sides[1].finish(both.now)
    both.settle()
    for number in (0, 1):
        (ended,) = both.commands(number, Ended)
        assert isinstance(ended, Ended)
        assert ended.end.code == Code.ENDED
    assert both.got[0] == b""


def test_reset() -> None:
    both = Both()
    both.sides[0].reset(Code.STOPPED, "the node stops", both.now)
    both.settle()
    assert both.sides[0].ended == _machine.End(Code.STOPPED, "the node stops", by_peer=False)
    assert both.sides[1].ended == _machine.End(Code.STOPPED, "the node stops", by_peer=True)
    assert not both.commands(1, Broken)


# Moves, one by one


def test_a_move_in_a_half_closed_session() -> None:
    both = Both()
    both.sides[0].write(b"question")
    both.sides[0].finish(both.now)
    both.settle()
    assert both.sides[1].eof
    both.attach(1, 2)
    both.sides[1].write(b"answer")
    both.settle()
    both.sides[1].finish(both.now)
    both.settle()
    assert both.got == [b"answer", b"question"]
    assert [side.ended and side.ended.code for side in both.sides] == [Code.ENDED, Code.ENDED]


def test_an_end_on_a_lost_path_is_sent_again() -> None:
    both = Both()
    both.sides[0].finish(both.now)
    both.pump(0)
    both.lose(1)
    both.attach(0, 2)
    both.settle()
    assert both.sides[1].eof
    assert both.sides[0].resent == 0


def test_a_move_during_a_move() -> None:
    both = Both()
    both.attach(0, 2)
    both.pump(0)  # its ATTACH is under way
    both.attach(0, 3)
    assert both.sides[0].attaching == 3
    both.settle()
    both.sides[1].write(b"by three")
    both.pass_time(1.5)
    assert both.got[0] == b"by three"
    assert [side.paths for side in both.sides] == [(3,), (3,)]


def test_an_attach_that_never_left_is_dropped() -> None:
    both = Both()
    both.attach(0, 2)
    both.attach(0, 3)
    both.settle()
    assert both.commands(0, DropPath) == [DropPath(2, Code.SUPERSEDED, "another path is attached", b"")]
    assert both.sides[0].current == 3


@pytest.mark.parametrize("welcomed", [False, True])
def test_a_new_path_that_dies_at_once(welcomed: bool) -> None:
    both = Both()
    both.attach(0, 2)
    both.sides[1].write(b"b" * 100)
    both.pump(0)
    if welcomed:
        both.deliver(2, 0)
        both.pump(1)
    both.lose(2)
    both.settle()
    assert both.sides[0].attaching is None
    assert both.sides[0].current == 1
    assert both.sides[1].current == (None if welcomed else 1)
    both.attach(0, 3)
    both.sides[0].write(b"a")
    both.settle()
    assert both.got == [b"b" * 100, b"a"]


def test_who_lost_an_attach_wins_the_next_one() -> None:
    both = Both()
    for _ in range(3):  # the opener's turn is far ahead, and its last attach hangs
        path = both.sides[0].paths[-1] + 1
        both.cut.add(path)
        both.attach(0, path)
        both.settle()
    both.lose(1)
    both.attach(1, 8)
    both.settle()
    (refused,) = [each for each in both.commands(1, DropPath) if isinstance(each, DropPath) and each.path == 8]
    assert refused.code == Code.SUPERSEDED
    both.attach(1, 9)
    both.settle()
    assert [side.current for side in both.sides] == [9, 9]


def test_a_busy_peer_costs_the_attempt_only() -> None:
    both = Both()
    both.attach(0, 2)
    both.pump(0)
    both.sides[0].receive(2, _wire.encode_reset(Code.BUSY, "too many"), both.now)
    assert both.sides[0].take_commands() == [DropPath(2, Code.BUSY, "too many", b"")]
    assert both.sides[0].current == 1


def test_a_peer_that_does_not_know_the_session() -> None:
    both = Both()
    both.lose(1, 0)
    both.settle()
    both.attach(0, 2)
    both.pump(0)
    both.sides[0].receive(2, _wire.encode_reset(Code.UNKNOWN, "no such session"), both.now)
    assert both.sides[0].ended == _machine.End(Code.UNKNOWN, "no such session", by_peer=True)


def test_a_peer_that_has_been_started_anew() -> None:
    both = Both()
    parser = Parser()
    frame = parser.first(_wire.encode_attach(_wire.Attach(0, ID, b"some new", 10, 1, True)))
    assert isinstance(frame, _wire.Attach)
    both.sides[0].attached(2, parser, frame, both.now)
    assert both.sides[0].ended == _machine.End(Code.RESTARTED, "the peer has been started anew", by_peer=True)
    both.attach(1, 3)
    both.pump(1)
    both.sides[1].receive(3, _wire.encode_welcome(_wire.Welcome(0, b"some new", 10, False)), both.now)
    assert both.sides[1].ended is not None
    assert both.sides[1].ended.code == Code.RESTARTED


def test_the_oldest_path_makes_room() -> None:
    both = Both()
    for path in range(2, 7):
        both.cut |= {path - 1}  # nothing arrives there any more, not even its end
        both.attach(0, path)
        both.settle()
    assert both.sides[0].current == both.sides[1].current == 6
    assert len(both.sides[0].paths) <= _machine.MAX_PATHS
    assert DropPath(1, Code.LOST, "too many paths", b"") in both.seen[0]


# Time


def test_silence_is_asked_about_and_the_answer_is_enough() -> None:
    both = Both()
    both.sides[0].write(b"a")
    both.settle()
    both.pass_time(100)
    assert both.sides[0].current == both.sides[1].current == 1
    assert both.sides[0].deadline < math.inf


def test_a_path_on_which_something_moves_does_not_hang() -> None:
    both = Both()
    both.sides[0].write(b"a")
    both.cut.add(1)
    for second in range(20):
        for side in both.sides:
            side.delivered(1, second * 1000, both.now)
        both.pass_time(1.0)
    assert both.sides[0].current == 1
    both.pass_time(3.0)
    assert both.sides[0].current is None


def test_a_process_that_was_stopped_asks_again() -> None:
    both = Both()
    both.sides[0].write(b"a")
    both.cut.add(1)
    both.settle()
    both.pass_time(3.0)
    both.pass_time(60.0, step=60.0)
    assert both.sides[0].current == 1
    both.pass_time(2.6)
    assert both.sides[0].current is None


def test_an_attach_that_nobody_answers() -> None:
    both = Both()
    both.cut.add(2)
    both.attach(0, 2)
    both.pass_time(3.9)
    assert both.sides[0].attaching == 2
    both.pass_time(0.3)
    (hung,) = both.commands(0, Hung)
    assert isinstance(hung, Hung)
    assert hung.path == 2
    assert both.sides[0].current == 1
    assert both.sides[0].attaching is None


def test_an_old_path_that_does_not_end() -> None:
    both = Both()
    both.sides[1].write(b"b" * 100)
    both.pump(1)
    both.cut.add(1)
    both.wire[1, 1].clear()  # what was under way there is lost, and nobody is told
    both.attach(0, 2)
    both.settle()
    both.sides[1].write(b"c")
    both.settle()
    assert both.sides[0].ahead == 1
    both.pass_time(2.8)
    assert both.got[0] == b""
    both.pass_time(0.4)
    assert both.got[0] == b"b" * 100 + b"c"
    assert both.sides[1].resent == 100
    assert both.sides[0].paths == both.sides[1].paths == (2,)


def test_what_was_under_way_when_both_had_ended_the_old_path() -> None:
    both = Both()
    both.attach(1, 2)
    both.settle()
    old = both.sides[0]._paths[0] if len(both.sides[0]._paths) > 1 else None
    assert old is None  # in order, it is over at once
    # The same, but what side 0 had sent there does not arrive: its end is seen, and the bytes are not acknowledged.
    both = Both()
    both.sides[0].write(b"a" * 100)
    both.pump(0)
    both.wire[1, 0].clear()
    both.attach(1, 2)
    both.settle()
    assert both.sides[0].paths == (1, 2)
    both.pass_time(3.2)
    assert both.got[1] == b"a" * 100


def test_a_peer_that_ends_the_path_and_does_not_come_back() -> None:
    both = Both()
    both.sides[0].path_eof(1, both.now)
    both.pass_time(0.9)
    assert both.sides[0].current == 1
    both.pass_time(0.2)
    assert both.sides[0].current is None


def test_an_end_within_a_frame_is_a_loss() -> None:
    both = Both()
    both.sides[0].receive(1, _wire.pack_header(_wire.DATA, 10, 0) + b"1234", both.now)
    assert both.sides[0].read(None) == b"1234"
    both.sides[0].path_eof(1, both.now)
    assert both.sides[0].current is None
    assert both.sides[0].ended is None


def test_a_close_that_does_not_come_to_its_end() -> None:
    both = Both()
    both.sides[0].close(both.now)
    both.sides[0].close(both.now)
    both.pass_time(4.8)
    assert both.sides[0].ended is None
    both.pass_time(0.4)
    assert both.sides[0].ended is not None
    assert both.sides[0].ended.code == Code.TIMEOUT
    assert both.sides[1].ended is not None
    assert both.sides[1].ended.code == Code.TIMEOUT
    assert both.sides[1].ended.by_peer


def test_closed_it_takes_what_comes_and_throws_it_away() -> None:
    both = Both()
    both.sides[1].write(b"b" * MIB)
    both.settle(read=False)
    assert both.sides[0].unread == 256 * KIB
    both.sides[0].close(both.now)
    assert both.sides[0].unread == 0
    both.sides[1].write(b"b" * MIB)
    both.sides[1].finish(both.now)
    both.settle()
    assert both.sides[0].ended is not None
    assert both.sides[0].ended.code == Code.ENDED


def test_an_end_whose_last_word_was_lost() -> None:
    both = Both()
    both.sides[1].finish(both.now)
    both.settle()
    both.sides[0].finish(both.now)
    both.pump(0)
    both.deliver(1, 0)
    assert both.sides[1].ended == _machine.End(Code.ENDED, "", by_peer=False)
    both.sides[1].take_commands()  # the last acknowledgement does not arrive
    assert both.sides[0].ended is None
    both.lose(1, 0)
    both.attach(0, 2)
    both.settle()
    assert both.sides[0].ended == _machine.End(Code.ENDED, "", by_peer=True)


def test_after_its_end_nothing_happens() -> None:
    both = Both()
    side = both.sides[0]
    side.reset(Code.STOPPED, "stop", both.now)
    side.take_commands()
    side.write(b"x")
    side.finish(both.now)
    side.close(both.now)
    side.reset(Code.STOPPED, "stop", both.now)
    side.receive(1, b"rubbish", both.now)
    side.path_lost(1, "lost", both.now)
    side.path_eof(1, both.now)
    side.on_timeout(1e9)
    assert side.take(1, 10, both.now) == []
    assert not side.pending(1)
    assert side.take_commands() == []
    side.attach(2, both.now)
    assert side.take_commands() == [DropPath(2, Code.STOPPED, "stop", b"")]


def test_behind_the_end_nothing_is_written() -> None:
    side = session(opener=True)
    side.finish(0.0)
    with pytest.raises(LocalProtocolError):
        side.write(b"more")


# Bytes


def test_small_pieces_share_a_frame_and_large_ones_are_not_copied() -> None:
    both = Both()
    side = both.sides[0]
    for _ in range(1000):
        side.write(b"forty bytes, as many messages of Kaspa's")
    large = bytes(100 * KIB)
    side.write(large)
    taken = side.take(1, MIB, both.now)
    assert sum(map(len, taken)) == 40_000 + len(large) + _wire.HEADER_SIZE
    assert taken[-1] is large
    assert len(side._sent) <= 11


def test_a_small_message_is_one_piece() -> None:
    both = Both()
    both.sides[0].write(b"ping")
    assert both.sides[0].take(1, MIB, both.now) == [_wire.pack_header(_wire.DATA, 4, 0) + b"ping"]


def test_room_is_kept_to_the_byte() -> None:
    both = Both()
    side = both.sides[0]
    side.write(b"a" * 1000)
    side.write(b"b" * 5000)
    for room in (1, 10, 500, 489, 100, 4900):
        before = side.sent
        side.take(1, room, both.now)
        assert side.sent == before + room
    assert side.take(1, 1000, both.now) == []
    assert side.take(1, 0, both.now) == []


def test_a_writer_is_held_back_and_memory_is_bounded() -> None:
    both = Both()
    side = both.sides[0]
    while side.room > 0:
        side.write(b"x" * 10_000)
        both.settle(read=False)
    assert MIB <= side.in_flight < MIB + 10_000
    assert side.sent == both.sides[1].unread == 256 * KIB
    both.pass_time(300.0)
    both.settle()
    assert both.got[1] == b"x" * len(both.got[1])
    assert side.in_flight == 0
    assert side.room == MIB


def test_a_window_grows_as_it_is_read() -> None:
    both = Both(window=8 * MIB)
    side = both.sides[1]
    held = []
    for _ in range(12):
        both.sides[0].write(bytes(9 * MIB))
        both.settle(read=False)
        held.append(side.unread)
        while side.read():
            pass
        both.settle(read=False)
        held.append(side.unread)
        while side.read():
            pass
    assert held[:5] == [256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB]
    assert max(held) == 8 * MIB


def test_acknowledgements_are_rare() -> None:
    both = Both(window=8 * MIB)
    frames = 0
    for _ in range(160):
        both.sides[0].write(bytes(64 * KIB))
        for piece in both.sides[0].take(1, MIB, both.now):
            both.sides[1].receive(1, piece, both.now)
        while both.sides[1].read(None):
            pass
        for piece in both.sides[1].take(1, MIB, both.now):
            frames += 1
            both.sides[0].receive(1, piece, both.now)
    assert frames == 15  # more at first, as the window grows
    assert both.sides[0].in_flight <= 2 * MIB


def test_whoever_keeps_less_than_the_other_side_acknowledges_by_asks() -> None:
    """The other side acknowledges by the quarter of its own window, of which this one does not know."""
    sides = session(opener=True, window=256 * KIB), session(opener=False, window=8 * MIB)
    sides[0].open(1, 0.0)
    parser = Parser()
    first = parser.first(b"".join(sides[0].take(1, 0, 0.0)))
    assert isinstance(first, _wire.Open)
    sides[1].accept(1, parser, first, 0.0)
    frames = [0, 0]
    for _ in range(4 * MIB // (16 * KIB)):
        assert sides[0].room > 0
        sides[0].write(bytes(16 * KIB))
        for number in (0, 1):
            for piece in sides[number].take(1, MIB, 0.0):
                frames[number] += len(piece) < 100
                sides[1 - number].receive(1, piece, 0.0)
            while sides[1 - number].read(None):
                pass
    assert sides[1].received == 4 * MIB
    assert frames[0] < 256 + 40
    assert frames[1] < 50


def test_reading_in_parts() -> None:
    both = Both()
    both.sides[0].write(b"0123456789")
    both.settle(read=False)
    side = both.sides[1]
    assert side.readable
    assert [side.read(3), side.read(3), side.read(100), side.read(1)] == [b"012", b"345", b"6789", None]


# What a peer may not do


def data(offset: int, payload: bytes) -> bytes:
    return _wire.pack_header(_wire.DATA, len(payload), offset) + payload


def ack(received: int, limit: int = 10**6, *, lost: bool = False) -> bytes:
    return _wire.encode_ack(received, limit, lost)


OPEN = _wire.encode_open(_wire.Open(10**6, ID, ONE))
ATTACH = _wire.encode_attach(_wire.Attach(0, ID, ONE, 10**6, 1, False))
WELCOME = _wire.encode_welcome(_wire.Welcome(0, TWO, 10**6, False))
RULES = {
    "data beyond the limit": data(MIB - 3, b"1234"),
    "data far beyond the limit": data(2**63, b"1"),
    "data that would wrap": data(2**64 - 2, b"123"),
    "an ACK of bytes never sent": ack(101),
    "an ACK of an end never sent": ack(100) + ack(101),
    "a limit that overflows": ack(0, 2**64 - 1),
    "an empty DATA": _wire.pack_header(_wire.DATA, 0, 0),
    "a DATA that is too long": _wire.pack_header(_wire.DATA, MIB + 1, 0),
    "a kind that is not defined": _wire.pack_header(9, 0, 0),
    "kind 0": _wire.pack_header(0, 0, 0),
    "a frame to pass over that is too long": _wire.pack_header(128, MIB + 1, 0),
    "an ACK that is too short": _wire.pack_header(_wire.ACK, 8, 0) + bytes(8),
    "an ACK that is too long": _wire.pack_header(_wire.ACK, 513, 0) + bytes(513),
    "a second OPEN": OPEN,
    "an ATTACH on a path in use": ATTACH,
    "a WELCOME that answers nothing": WELCOME,
    "a FIN below what came": data(0, b"1234") + _wire.encode_fin(3),
    "a FIN below what came beyond a gap": data(10, b"1234") + _wire.encode_fin(13),
    "a FIN beyond the limit": _wire.encode_fin(MIB + 1),
    "two FINs": _wire.encode_fin(7) + _wire.encode_fin(8),
    "data behind the FIN": _wire.encode_fin(7) + data(5, b"123"),
    "too many gaps": b"".join(data(2 * each + 1, b"x") for each in range(_machine.MAX_RUNS + 1)),
}


def broken(side: Session) -> str:
    """How it ended, as the peer's fault."""
    commands = side.take_commands()
    assert side.ended is not None
    assert side.ended.code == Code.PROTOCOL
    assert not side.ended.by_peer
    assert isinstance(commands[-2], DropPath)
    assert commands[-2].last.endswith(_wire.encode_reset(Code.PROTOCOL, side.ended.reason, side._turn))
    assert commands[-3:] == [Broken(side.ended.reason), commands[-2], Ended(side.ended)]
    assert side.deadline == math.inf
    assert side.ahead == side.unread == 0
    return side.ended.reason


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", [1, 10**6])
def test_who_breaks_the_protocol_is_reset(rule: str, step: int) -> None:
    both = Both()
    side = both.sides[1]
    side.write(b"x" * 100)
    side.take(1, MIB, both.now)
    for at in range(0, len(RULES[rule]), step):
        side.receive(1, RULES[rule][at : at + step], both.now)
        if side.ended is not None:
            break
    assert broken(side)


@pytest.mark.parametrize("frame", [data(0, b"1"), ack(0), _wire.encode_fin(0), _wire.encoded_probe, OPEN, ATTACH])
def test_before_the_answer_nothing_may_come(frame: bytes) -> None:
    side = session(opener=True)
    side.open(1, 0.0)
    side.receive(1, frame, 0.0)
    assert broken(side)


def test_a_second_welcome() -> None:
    side = session(opener=True)
    side.open(1, 0.0)
    side.receive(1, WELCOME + WELCOME, 0.0)
    assert broken(side) == "a WELCOME that answers nothing"


@pytest.mark.parametrize(("received", "limit"), [(1, 0), (2**63, 0), (0, 2**64 - 1)])
def test_an_attach_that_can_t_be(received: int, limit: int) -> None:
    both = Both()
    parser = Parser()
    frame = parser.first(_wire.encode_attach(_wire.Attach(received, ID, ONE, limit, 1, False)))
    assert isinstance(frame, _wire.Attach)
    both.sides[1].attached(2, parser, frame, both.now)
    assert both.sides[1].ended is not None
    assert both.sides[1].ended.code == Code.PROTOCOL


def test_an_open_whose_limit_overflows() -> None:
    side = session(opener=False)
    side.accept(1, Parser(), _wire.Open(2**64 - 1, ID, ONE), 0.0)
    assert side.ended is not None
    assert side.ended.code == Code.PROTOCOL


def test_a_replayed_attach_is_refused_and_changes_nothing() -> None:
    both = Both()
    both.attach(0, 2)
    both.settle()
    side = both.sides[1]
    for turn in (0, 1):
        parser = Parser()
        frame = parser.first(_wire.encode_attach(_wire.Attach(0, ID, ONE, 10**6, turn, True)))
        assert isinstance(frame, _wire.Attach)
        side.attached(10 + turn, parser, frame, both.now)
        (refused,) = side.take_commands()
        assert isinstance(refused, DropPath)
        assert refused.code == Code.SUPERSEDED
        assert refused.last == _wire.encode_reset(Code.SUPERSEDED, "another path is attached", 1)
    assert side.paths == (2,)
    assert side.ended is None


def test_a_turn_can_t_be_outbid() -> None:
    both = Both()
    parser = Parser()
    frame = parser.first(_wire.encode_attach(_wire.Attach(0, ID, ONE, 10**6, 2**32 - 1, False)))
    assert isinstance(frame, _wire.Attach)
    both.sides[1].attached(2, parser, frame, both.now)
    both.sides[1].attach(3, both.now)
    assert both.sides[1].ended is None


def test_what_may_be_odd() -> None:
    both = Both()
    side = both.sides[1]
    side.write(b"x" * 100)
    side.take(1, MIB, both.now)
    odd = [
        _wire.pack_header(200, 70_000, 5) + bytes(70_000),  # passed over
        _wire.pack_header(_wire.ACK, 20, 60) + (10**6).to_bytes(8, "big") + bytes(12),  # longer than we know
        ack(50, 10),  # late
        data(0, b"1234"),
        data(0, b"1234"),  # again
        data(2, b"34567"),
        data(20, b"later"),
        data(18, b"67lat"),
        data(22, b"terr"),
        _wire.pack_header(_wire.PROBE, 3, 0) + b"new",
    ]
    whole = b"".join(odd)
    for at in range(0, len(whole), 999):
        side.receive(1, whole[at : at + 999], both.now)
    assert side.ended is None
    assert side.acked == 60
    assert side.received == 7
    assert side.ahead == 8
    assert side.duplicate == 4 + 2 + 3 + 3
    side.receive(1, data(7, b"8" * 11), both.now)
    assert side.received == 26
    assert side.ahead == 0
    pieces = b""
    while (piece := side.read(None)) is not None:
        pieces += piece
    assert pieces == b"1234567" + b"8" * 11 + b"67laterr"


def test_gaps_filled_in_every_order() -> None:
    text = bytes(range(60))
    for order in itertools.permutations(range(6)):
        both = Both()
        for each in order:
            both.sides[1].receive(1, data(10 * each, text[10 * each : 10 * each + 10]), both.now)
            both.sides[1].receive(1, data(max(10 * each - 3, 0), text[max(10 * each - 3, 0) : 10 * each + 5]), both.now)
        assert both.sides[1].received == 60
        got = b""
        while (piece := both.sides[1].read(None)) is not None:
            got += piece
        assert got == text


def test_single_bytes_cost_what_they_are() -> None:
    both = Both()
    side = both.sides[1]
    for at in range(40_000, 20_000, -1):
        side.receive(1, data(at, b"x"), both.now)
    for at in range(20_000):
        side.receive(1, data(at, b"y"), both.now)
    assert side.unread == 20_000
    assert side.ahead == 20_000
    assert side._ahead is not None
    assert len(side._unread) + sum(len(run.pieces) for run in side._ahead) < 20
    for _ in range(20_000):
        side.write(b"z")
    assert len(side._unsent) < 10
    for _ in range(20_000):
        side.take(1, 1, both.now)
    assert len(side._sent) < 10
    assert side.sent == 20_000


HEADERS = st.builds(
    lambda kind, length, value, payload: _wire.pack_header(kind, length, value) + payload,
    st.integers(1, 10) | st.integers(0, 255),
    st.integers(0, 40) | st.sampled_from([512, 513, MIB, MIB + 1, 2**32 - 1]),
    st.integers(0, 300) | st.sampled_from([MIB - 1, MIB, 2**63, 2**64 - 1]),
    st.binary(max_size=40),
)
NEARLY = st.one_of(
    st.builds(data, st.integers(0, 60), st.binary(min_size=1, max_size=20)),
    st.builds(ack, st.integers(0, 101), st.integers(0, 300)),
    st.builds(_wire.encode_fin, st.integers(0, 80)),
    st.just(_wire.encoded_probe),
    st.builds(_wire.encode_reset, st.integers(0, 12), st.text(max_size=5), st.integers(0, 2**32 - 1)),
    HEADERS,
    st.binary(max_size=30),
)


@settings(max_examples=300)
@given(st.lists(NEARLY, max_size=12), st.integers(1, 60), st.booleans(), st.booleans())
def test_garbage(frames: list[bytes], step: int, opener: bool, answered: bool) -> None:
    both = Both()
    side = both.sides[not opener]
    side.write(b"x" * 100)
    side.take(1, MIB, both.now)
    path = 1
    if not answered:
        path = 2
        side.attach(2, both.now)
    whole = b"".join(frames)
    for at in range(0, len(whole), step):
        side.receive(path, whole[at : at + step], both.now)
        side.take(path, MIB, both.now)
        side.take_commands()
        assert side.unread + side.ahead <= MIB
        entry = side._find(path)
        assert entry is None or len(entry.parser._kept) <= _wire.HEADER_SIZE + _wire.MAX_CONTROL
    for seconds in (0.5, 1.5, 2.0, 3.0, 40.0, 200.0):
        side.on_timeout(both.now + seconds)
    assert side.ended is None or side.deadline == math.inf


def test_refused_on_a_path_that_the_other_side_has_left_it_waits_for_the_other_s_attach() -> None:
    both = Both()
    both.attach(0, 2)
    both.pump(0)
    both.attach(0, 3)
    both.pump(0)
    both.deliver(2, 0)  # side 1 switches to 2,
    both.sides[1].write(b"by two")
    both.pump(1)
    both.attach(1, 4)
    both.pump(1)
    both.deliver(2, 0)  # sees that side 0 has left it,
    both.deliver(4, 1)
    both.pump(0)
    both.deliver(4, 0)  # and is refused
    assert both.sides[1].attaching is None
    assert both.sides[1].current == 2
    both.settle()
    assert both.sides[1].current == both.sides[0].current == 3
    assert both.got[0] == b"by two"
    assert both.sides[1].resent == 0


def idle_session(number: int) -> Session:
    """One that has done something, and has no timer any more."""
    id = number.to_bytes(16, "big")
    side = Session(id, opener=False, window=8 * MIB, instance=TWO, patience=30.0, now=number / 7)
    parser = Parser()
    first = parser.first(_wire.encode_open(_wire.Open(8 * MIB, id, b"the peer")))
    assert isinstance(first, _wire.Open)
    side.accept(1, parser, first, number / 7)
    for at in range(10):
        side.write(bytes(300))
        side.take(1, MIB, at + number / 7)
        side.receive(1, data(at * 300, bytes(300)) + ack(at * 300 + 300, 9 * MIB + at), at + number / 7)
        assert side.read() == bytes(300)
    for after in (10, 500):
        side.on_timeout(after + number / 7)
        side.take(1, MIB, after + number / 7)
    assert side.deadline == math.inf
    return side


def test_an_idle_session_is_small() -> None:
    idle_session(0)
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        sessions = [idle_session(number) for number in range(200)]
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / len(sessions) < 2 * KIB


def test_what_comes_again_is_acknowledged_again() -> None:
    both = Both()
    both.sides[1].receive(1, data(0, b"1234"), both.now)
    both.sides[1].on_timeout(1.0)
    assert both.sides[1].take(1, MIB, 1.0)[0][0] == _wire.ACK  # which is lost
    both.sides[1].receive(1, data(0, b"1234"), 2.0)
    assert both.sides[1].deadline <= 3.0
    both.sides[1].on_timeout(3.0)
    assert both.sides[1].take(1, MIB, 3.0)[0] == ack(4, 256 * KIB)


def test_what_an_attach_told_that_was_refused_is_told_again() -> None:
    both = Both()
    both.sides[0].write(b"a" * 100)
    both.pump(0)
    both.attach(0, 2)
    both.pump(0)
    both.lose(1, 1)  # side 1 alone notices,
    both.attach(1, 3)  # and says so, but the other one's attach wins
    both.settle()
    assert both.sides[0].current == both.sides[1].current == 2
    assert both.got[1] == b"a" * 100


def test_what_has_come_is_not_sent_again() -> None:
    both = Both()
    for piece in (b"a" * 10_000, b"b" * 5000):
        both.sides[0].write(piece)
        both.pump(0)
    both.sides[1].receive(1, data(0, b"a" * 10_000) + data(10_000, b"b" * 5000)[:-4000], both.now)
    both.lose(1)
    both.attach(0, 2)
    both.settle()
    assert both.sides[0].resent == 4000
    assert both.sides[1].duplicate == 0
    assert both.got[1] == b"a" * 10_000 + b"b" * 5000


def test_a_probe_is_answered_at_once() -> None:
    side = Both().sides[1]
    assert not side.pending(1)
    side.receive(1, _wire.encoded_probe, 0.0)
    assert side.pending(1)
    assert side.take(1, 0, 0.0) == [ack(0, 256 * KIB)]


def test_traffic_on_a_new_path_keeps_no_old_one_alive() -> None:
    both = Both()
    both.sides[0].write(b"by the old path")
    both.settle()
    put = both.put
    both.put = lambda path, number, piece: None if (path, number, piece) == (1, 1, None) else put(path, number, piece)  # type: ignore[method-assign]
    both.attach(0, 2)
    both.settle()
    assert both.sides[0].paths == (1, 2), "the other side's end does not come"
    for _ in range(math.ceil(DRAIN_WITHIN)):
        both.sides[0].write(b"by the new one")
        both.settle()
        both.pass_time(1.0)
    assert both.sides[0].paths == (2,)


def test_that_a_path_is_lost_is_told_although_one_that_ranks_higher_is_lost_as_well() -> None:
    both = Both()
    a, b = both.sides
    b.write(b"b" * 1000)
    both.pump(1)
    both.lose(1, 0)  # a alone notices
    both.attach(0, 2)
    both.pump(0)
    both.cut.add(2)
    both.wire.clear()
    a.path_lost(2, "cut", both.now)
    both.attach(1, 3)  # for reasons of its own; it ranks between the two
    both.settle()
    assert a.current == b.current == 3
    assert both.got[0] == b"b" * 1000, "at once, and not when the old path is given up"


def test_an_end_in_order_is_none_before_both_have_ended() -> None:
    both = Both()
    a, _ = both.sides
    a.write(b"under way")
    a.receive(1, _wire.encode_reset(Code.ENDED, "all is well"), both.now)
    assert a.ended is not None
    assert (a.ended.code, a.ended.by_peer) == (Code.PROTOCOL, False)
    assert [each.reason for each in a.take_commands() if isinstance(each, Broken)] == [
        "an end in order before the end of both directions"
    ]


def test_who_was_attached_to_waits_with_the_old_path_until_the_new_one_works() -> None:
    both = Both()
    both.attach(1, 2)
    both.pump(1)
    both.deliver(2, 1)
    both.cut.add(2)  # the answer is lost
    both.settle()
    assert both.sides[0].paths == (1, 2)
    for number in both.sides:
        number.take_commands()
    both.now += DRAIN_WITHIN
    both.sides[0].on_timeout(both.now)
    assert both.sides[0].paths == (1, 2), "the other side may still go by it"
    both.sides[0].path_lost(2, "cut", both.now)
    both.now += DRAIN_WITHIN
    both.sides[0].on_timeout(both.now)
    assert both.sides[0].paths == ()
    (hung,) = (each for each in both.sides[0].take_commands() if isinstance(each, Hung))
    assert not hung.asked, "its connection may be healthy"
