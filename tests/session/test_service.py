"""Who keeps the sessions: where each goes on, what is refused, and what it costs."""

from __future__ import annotations

import gc
import math
import tracemalloc

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import KIB, MIB, Config
from kas_libp2p.errors import ConnectionLost, Refused, SessionLost, StreamCode
from kas_libp2p.events import (
    InternalError,
    LimitHit,
    PeerMisbehaved,
    SessionEnded,
    SessionMoved,
    SessionNotMoved,
    SessionRefused,
    SessionWaiting,
)
from kas_libp2p.metadata import SESSION, Path, PathKind, PeerId
from kas_libp2p.session import _wire, service
from kas_libp2p.session._machine import ANSWER_WITHIN, OWED_FOR, PROBE_AFTER
from kas_libp2p.session._wire import Attach, Code, Open, Parser, Reset, Welcome
from kas_libp2p.session.service import STALE
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.abuse.house import DELAY, besieged
from tests.network import eventually

from .sides import Side, Sides, configured, sides

RELAY = PeerId("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
ID, OTHER_ID = bytes(16), bytes(range(16))
INSTANCE = b"instance"
NEGOTIATION = Config().dial.negotiation_timeout


async def pass_on(ours: SessionStream, theirs: SessionStream, what: bytes = b"hello") -> None:
    got = b""
    async with trio.open_nursery() as nursery:  # whoever is not read may not write for long
        nursery.start_soon(ours.send_all, what)
        while len(got) < len(what):
            got += await theirs.receive_some()
    assert got == what


# -- Where it goes on --------------------------------------------------------------------------------------------------


async def test_a_peer_that_takes_no_sessions_any_more(autojump_clock: MockClock) -> None:
    """It says so on a path to which we move: that one is none. And then on the only one."""
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await s.connect()

        async def refuse(stream: YamuxStream) -> None:
            await stream.receive_some(1)
            stream.reset(StreamCode.NEGOTIATION)

        async def no_attach(session: SessionStream, connection: Connection, reason: str) -> None:
            await trio.sleep_forever()

        s.b._serve = refuse  # type: ignore[method-assign]
        s.b.sessions._attach = no_attach  # type: ignore[assignment]
        await s.a.sessions._attach(ours, s.a.connections[1], "for the test")
        await trio.sleep(0.1)
        assert ours.connection is s.a.connections[0]
        await pass_on(ours, theirs)
        s.a.connections[0].abort()
        with pytest.raises(SessionLost, match="takes no sessions any more") as lost:
            await ours.receive_some()
        assert lost.value.code == "unknown"


@pytest.mark.parametrize("writes", [False, True])
async def test_a_path_hangs_though_a_host_or_a_relay_takes_what_is_written(
    writes: bool, autojump_clock: MockClock
) -> None:
    """The other side has stopped. What was sent since it was asked says nothing of it."""
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await pass_on(theirs, ours)
        _, there = s.raws[0]
        there._in.capacity = 6 * MIB
        there.receive_nowait = lambda buffer: None  # type: ignore[method-assign]
        there.wait_readable = trio.sleep_forever  # type: ignore[method-assign]
        there.send_nowait = lambda data: 0  # type: ignore[method-assign]
        there.wait_writable = trio.sleep_forever  # type: ignore[method-assign]
        s.b.sessions._table.clear()
        await trio.sleep(1)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                while True:
                    await ours.send_all(bytes(500))
                    await trio.sleep(0.1 if writes else math.inf)

            nursery.start_soon(write)
            await eventually(lambda: bool(s.a.bus.of(SessionWaiting)))
            nursery.cancel_scope.cancel()
        assert s.a.bus.of(SessionWaiting)[0].reason == "the path hangs"
        assert trio.current_time() - began < PROBE_AFTER + 2 * ANSWER_WITHIN


@pytest.mark.parametrize("idle", [0.0, OWED_FOR + 10])
async def test_a_move_whose_new_path_dies_at_once_leaves_the_old_connection_alone(
    idle: float, autojump_clock: MockClock
) -> None:
    """The other side has answered, and that was lost: neither is to think ill of the connection that it has left."""
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await trio.sleep(5 + idle)
        await s.connect()
        here, _ = s.raws[1]
        here._in.delay = math.inf
        await s.a.sessions._attach(ours, s.a.connections[1], "for the test")
        await trio.sleep(0.1)
        assert theirs.connection is s.b.connections[1]
        assert ours.connection is s.a.connections[0]
        await trio.sleep(6)
        await pass_on(theirs, ours)
        assert s.a.connections[0].close_reason is s.b.connections[0].close_reason is None
        assert theirs.connection is s.b.connections[0]


@pytest.mark.parametrize("attempt", range(5))
async def test_both_look_for_a_path_and_meet_on_one(attempt: int, autojump_clock: MockClock) -> None:
    """Both sides dial at once, each gets a connection, and both try both."""
    async with sides(delay=0.03 * attempt) as s:
        ours, theirs = await s.session()
        s.a.reach, s.b.reach = s.connect, s.connect_back
        for _ in range(3):
            for connection in [*s.a.connections, *s.b.connections]:
                connection.abort()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, ours, theirs, bytes(MIB))
                nursery.start_soon(pass_on, theirs, ours, bytes(MIB))
            await trio.sleep(10)
            assert len(ours.streams) == len(theirs.streams) == 1
        assert not s.a.bus.of(InternalError)
        assert not s.b.bus.of(PeerMisbehaved)


async def test_the_other_side_leaves_it_to_the_opener_for_a_moment(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, _ = await s.session()
        s.b.reach = s.connect
        s.a.connections[0].abort()
        await trio.sleep(0.2)
        assert (s.a.asked, s.b.asked) == (1, 0)
        await trio.sleep(1)
        assert s.b.asked == 1
        assert ours.lost_at is None


async def test_it_is_tried_again_and_again_until_patience_is_over(autojump_clock: MockClock) -> None:
    async with sides(a=configured(patience=20.0)) as s:
        ours, _ = await s.session()
        s.a.connections[0].abort()
        await trio.sleep(10)
        assert s.a.asked == 9  # at 0, 0.5, 1.5, 2.75, 4, …
        assert ours.status().reason == "there is no way"
        with pytest.raises(SessionLost, match="no path for 20 s"):
            await ours.receive_some()
        asked = s.a.asked
        await trio.sleep(100)
        assert s.a.asked == asked
        (waiting,), (ended,) = s.a.bus.of(SessionWaiting), s.a.bus.of(SessionEnded)
        assert ended.seconds == pytest.approx(20, abs=0.2)
        assert waiting.session == ended.session


async def test_a_path_that_does_not_answer_is_not_waited_for(autojump_clock: MockClock) -> None:
    """The next connection hangs from the start, and another one comes up meanwhile."""
    async with sides() as s:
        ours, theirs = await s.session()
        await s.connect()
        for raw in s.raws[-1]:
            raw._in.delay = raw._out.delay = math.inf
        s.a.connections[0].abort()
        began = trio.current_time()
        await trio.sleep(1.5)
        await s.connect()
        await pass_on(ours, theirs)
        assert trio.current_time() - began < 2.6
        assert ours.connection is s.a.connections[-1]


async def test_an_old_path_whose_connection_ends_is_known_to_be_lost(autojump_clock: MockClock) -> None:
    """Its stream has come to its end on both sides, as it seems here, and nobody hears of it any more."""
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await s.connect()
        here, _ = s.raws[0]
        here._out.delay = math.inf
        here.abort = lambda: None  # type: ignore[method-assign]  # the other side notices nothing
        await ours.send_all(b"on its way")
        await s.a.sessions._attach(ours, s.a.connections[1], "for the test")
        await trio.sleep(0.2)
        assert len(ours.streams) == 2
        began = trio.current_time()
        s.a.connections[0].abort()
        assert await theirs.receive_some() == b"on its way"
        assert trio.current_time() - began < 0.2


async def test_a_session_that_closes_moves_by_no_taste(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await ours.send_all(bytes(100))
        await ours.aclose()
        await trio.sleep(1)
        s.a.connections[0].abort()
        await trio.sleep(1)
        assert s.a.asked == 0
        await s.connect()  # what is there is used
        await trio.sleep(1)
        assert await theirs.receive_some() == bytes(100)
        assert await theirs.receive_some() == b""
        await theirs.aclose()
        await trio.sleep(1)
        assert (len(s.a.sessions), len(s.b.sessions)) == (0, 0)


async def test_nobody_is_started_once_it_is_over(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        alone = Side(nursery, Config())
        with pytest.raises(ConnectionLost, match="not running"):
            alone.sessions.admit(ID)  # type: ignore[arg-type]
        with trio.CancelScope() as scope:
            await nursery.start(alone.sessions.run)
            scope.cancel()
        nursery.cancel_scope.cancel()
    async with sides() as s:
        ours, theirs = await s.session()
    for each in (ours, theirs):
        assert each.over
        with pytest.raises(SessionLost) as lost:
            await each.receive_some()
        assert lost.value.code == "stopped"


async def test_attaches_that_cross_are_counted_and_harm_nobody(autojump_clock: MockClock) -> None:
    async with sides(delay=0.05) as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await s.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.a.sessions._attach, ours, s.a.connections[1], "one")
            nursery.start_soon(s.b.sessions._attach, theirs, s.b.connections[0], "other")
        await trio.sleep(1)
        await pass_on(theirs, ours)
        assert ours.connection is s.a.connections[1], "the opener's goes first"
        assert theirs.connection is s.b.connections[1]
        assert [each.reason for each in s.a.bus.of(SessionRefused)] == ["superseded"]
        (moved,) = s.a.bus.of(SessionMoved)
        assert (moved.by_us, moved.reason) == (True, "one")
        (moved,) = s.b.bus.of(SessionMoved)
        assert (moved.by_us, moved.reason) == (False, "")


async def test_whoever_comes_back_for_one_that_has_ended_is_told_so(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await ours.aclose()
        await theirs.aclose()
        await trio.sleep(1)
        assert not len(s.a.sessions)
        asking = await attach(s.b.connections[0], ours.machine.id)
        assert (await asking.reset()).code == Code.ENDED
        for stranger in (OTHER_ID, ID):
            asking = await attach(s.b.connections[0], stranger)
            assert (await asking.reset()).code == Code.UNKNOWN
        assert [each.reason for each in s.a.bus.of(SessionRefused)] == ["ended", "unknown", "unknown"]


async def relayed_and_direct(s: Sides) -> tuple[SessionStream, SessionStream]:
    """A session that goes by a circuit, as it seems, and beside it a direct connection."""
    for side in (s.a, s.b):
        side.connections[0].path = Path(PathKind.RELAYED, RELAY)
    ours, theirs = await s.session()
    await pass_on(ours, theirs)
    await s.connect()
    await trio.sleep(1)
    assert ours.connection is s.a.connections[0]
    return ours, theirs


async def test_the_opener_moves_it_at_once_when_there_is_a_better_path(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await relayed_and_direct(s)
        for side in (s.a, s.b):
            side.proven.add(side.connections[1].number)
            side.sessions.on_direct(side.connections[1].peer)
        await trio.sleep(0.1)
        assert ours.connection is s.a.connections[1]
        (moved,) = s.a.bus.of(SessionMoved)
        assert moved.by_us
        assert moved.previous == Path(PathKind.RELAYED, RELAY)
        (followed,) = s.b.bus.of(SessionMoved)
        assert not followed.by_us
        assert followed.reason == moved.reason == "the direct path has proven itself", "both can say why"
        await pass_on(theirs, ours)


async def test_the_other_side_moves_it_if_the_opener_does_not(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await relayed_and_direct(s)
        s.b.proven.add(s.b.connections[1].number)
        s.b.sessions.on_direct(s.b.connections[1].peer)
        await trio.sleep(service.OPENER_FIRST - 0.1)
        assert theirs.connection is s.b.connections[0]
        await trio.sleep(0.3)
        assert theirs.connection is s.b.connections[1]
        assert ours.connection is s.a.connections[1]
        assert s.b.bus.of(SessionMoved)[0].by_us


@pytest.mark.parametrize("delay", [0.01, 0.1])
@pytest.mark.parametrize("politely", [True, False])
async def test_a_move_that_is_refused_is_tried_again(politely: bool, delay: float, autojump_clock: MockClock) -> None:
    async with sides(delay=delay) as s:
        ours, theirs = await relayed_and_direct(s)
        refused = 0

        async def refuse(stream: YamuxStream) -> None:
            nonlocal refused
            refused += 1
            if politely:
                s.b.sessions._refuse(stream, Code.BUSY, "not now", "busy")
            else:
                stream.reset()

        right, s.b.sessions.handle = s.b.sessions.handle, refuse  # type: ignore[method-assign]
        s.a.proven.add(s.a.connections[1].number)
        s.a.sessions.on_direct(s.a.connections[1].peer)
        await trio.sleep(5)
        assert refused == 1, "it is left alone for a while"
        s.b.sessions.handle = right  # type: ignore[method-assign]
        assert ours.connection is s.a.connections[0], "it has never left"
        (told,) = s.a.bus.of(SessionNotMoved)
        assert (told.path, told.code) == (s.a.connections[1].path, "busy" if politely else "lost")
        await trio.sleep(20)
        assert ours.connection is s.a.connections[1]
        await pass_on(ours, theirs)


# -- What it costs -----------------------------------------------------------------------------------------------------


async def test_a_thousand_idle_sessions_take_four_megabytes(autojump_clock: MockClock) -> None:
    """Beside the streams under them, which plain ones would have as well."""
    async with sides(a=configured(max_per_peer=200), delay=0) as s:
        await s.session()  # what is made once is made
        count = 50
        gc.collect()
        tracemalloc.start()
        for _ in range(count):
            await s.a.open()
        await trio.sleep(200)  # nothing is owed any more
        gc.collect()
        room = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/kas_libp2p/session/*")])
        tracemalloc.stop()
        each = sum(trace.size for trace in room.traces) / count / 2  # both ends are here
        assert len(s.b.sessions) == count + 1
        assert 1 * KIB < each < 4 * KIB


async def test_no_task_and_no_timer_for_one_that_is_idle(autojump_clock: MockClock) -> None:
    async with sides(delay=0) as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await trio.sleep(1000)
        before = len(s.a.sessions._nursery.child_tasks)  # type: ignore[union-attr]
        assert before == 0
        assert ours.machine.deadline == ours.look_at == math.inf
        assert s.a.sessions._table == []


async def test_the_table_of_times_stays_small(autojump_clock: MockClock) -> None:
    async with sides(a=configured(max_per_peer=200), delay=0) as s:
        for _ in range(6):
            some = [await s.a.open() for _ in range(50)]
            await trio.sleep(125)  # nothing is owed any more
            assert min(each.armed for each in some) > trio.current_time() + 100, "it wants to look in minutes"
            for each in some:
                each.reset()
            await trio.sleep(1)
        for side in (s.a, s.b):
            assert len(side.sessions._table) <= STALE + 2 * 50 + 1
            assert not len(side.sessions)
            assert not side.sessions._of


async def test_limits_in_all_and_per_peer(autojump_clock: MockClock) -> None:
    async with sides(a=configured(max_sessions=3), b=configured(max_per_peer=2)) as s:
        one, two = [await s.a.open() for _ in range(2)]
        await trio.sleep(1)
        third = await s.a.open()
        with pytest.raises(SessionLost, match="as many sessions as are allowed") as refused:
            await third.receive_some()
        assert refused.value.code == "busy"
        assert [each.reason for each in s.b.bus.of(SessionRefused)] == ["session.max_per_peer"]
        assert [each.reason for each in s.b.bus.of(LimitHit)] == ["session.max_per_peer"]
        third = await s.a.open()
        with pytest.raises(Refused, match=r"session\.max_sessions says no"):
            await s.a.open()
        for each in (one, two, third):
            each.reset()
        await trio.sleep(1)
        await pass_on(*await s.session())


async def test_all_sessions_together_hold_no_more_than_is_allowed(autojump_clock: MockClock) -> None:
    async with sides(a=configured(max_per_peer=9), b=configured(max_per_peer=9, max_memory=600 * KIB)) as s:
        pairs = [await s.session() for _ in range(3)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pairs[0][0].send_all, bytes(250 * KIB))  # which nobody reads
            await trio.sleep(20)
            nursery.start_soon(pairs[1][0].send_all, bytes(250 * KIB))
            await trio.sleep(5)
            assert not any(theirs.over for _, theirs in pairs)
            await pass_on(*pairs[2], bytes(MIB))
            nursery.start_soon(pairs[2][0].send_all, bytes(250 * KIB))
            await trio.sleep(5)
        assert [theirs.over for _, theirs in pairs] == [True, False, False], "who has held most for longest"
        with pytest.raises(SessionLost, match="hold too much") as lost:
            await pairs[0][0].receive_some()
        assert lost.value.code == "busy"
        assert [each.reason for each in s.b.bus.of(LimitHit)] == ["session.max_memory"]
        assert sum(each.held for each in s.b.sessions) == 500 * KIB


async def test_what_nobody_reads_counts_although_the_session_is_over(autojump_clock: MockClock) -> None:
    settings = configured(max_per_peer=9, max_memory=MIB, patience=5.0)
    async with sides(a=settings, b=settings) as s:
        for end in (True, False):
            for _ in range(4):
                ours, _ = await s.session()
                await ours.send_all(bytes(200 * KIB))
            await trio.sleep(2)
            if end:
                s.a.connections[0].abort()
                await eventually(lambda: not len(s.b.sessions))
                assert sum(each.machine.unread for each in s.b.inbound) == 800 * KIB, "it can still be read"
                assert all(each.machine.in_flight == 0 for each in s.b.inbound)
                await s.connect()
        assert sum(each.machine.unread for each in s.b.inbound) <= MIB
        forgotten = s.b.inbound[0]
        with pytest.raises(SessionLost, match="hold too much"):
            await forgotten.receive_some()


# -- What a peer can do ------------------------------------------------------------------------------------------------


class Raw:
    """A stream of sessions as a peer has one that keeps to no rule."""

    def __init__(self, stream: YamuxStream) -> None:
        self.stream = stream
        self.parser = Parser()
        self.frames: list[object] = []

    async def send(self, *frames: bytes) -> None:
        await self.stream.send_all(b"".join(frames))

    async def answer(self) -> object:
        """The next frame."""
        while not self.frames:
            data = await self.stream.receive_some()
            assert data, "the stream has ended"
            self.frames += self.parser.feed(data)
        return self.frames.pop(0)

    async def reset(self) -> Reset:
        """The RESET that has to come, whatever else does before."""
        while not isinstance(frame := await self.answer(), Reset):
            pass
        return frame

    async def welcome(self) -> Welcome:
        """The WELCOME that has to come."""
        frame = await self.answer()
        assert isinstance(frame, Welcome)
        return frame


def opening(id: bytes = ID, instance: bytes = INSTANCE, limit: int = MIB) -> bytes:
    return _wire.encode_open(Open(limit, id, instance))


def attaching(id: bytes, turn: int = 1, received: int = 0, limit: int = MIB, instance: bytes = INSTANCE) -> bytes:
    return _wire.encode_attach(Attach(received, id, instance, limit, turn, lost=False))


async def raw(connection: Connection) -> Raw:
    return Raw(await connection.open_stream(SESSION))


async def attach(connection: Connection, id: bytes, turn: int = 1, instance: bytes = INSTANCE) -> Raw:
    stream = await raw(connection)
    await stream.send(attaching(id, turn, instance=instance))
    return stream


async def test_somebody_else_s_session_looks_like_none(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        await h.friend.connect(h.node.peer_id, addresses=h.node.addresses)
        await trio.sleep(5 * DELAY)
        (theirs,) = h.node.sessions
        answers = []
        for id in (theirs.machine.id, OTHER_ID):
            stranger = await attach(await h.connected(), id)
            answers.append(await stranger.reset())
        assert answers[0] == answers[1] == Reset(Code.UNKNOWN, 0, "there is no such session")
        assert h.count("session-refused", "unknown") == 2
        assert not theirs.over
        assert theirs.machine.moves == 0
        h.node.sessions.end(h.friend.peer_id, "for the test")
        await h.friend.disconnect(h.node.peer_id)
        await trio.sleep(1)


@pytest.mark.parametrize("said", [b"", b"\x01", opening()[:30], attaching(ID)[:-1]])
async def test_a_first_frame_that_does_not_come(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await raw(await h.connected())
        await stranger.send(said)
        began = trio.current_time()
        assert (await stranger.reset()).code == Code.TIMEOUT
        assert trio.current_time() - began == pytest.approx(NEGOTIATION, abs=5 * DELAY)
        assert h.count("session-refused", "timeout") == 1
        assert not len(h.node.sessions)


@pytest.mark.parametrize("said", [b"\x04" * 40, b"PRI * HTTP/2.0\r\n\r\n", b"\x01\xff\xff\xff\xff" + bytes(8)])
async def test_a_first_frame_that_is_none(said: bytes, autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await raw(await h.connected())
        await stranger.send(said)
        await trio.sleep(5 * DELAY)
        assert h.count("session-refused", "protocol") == 1
        (misbehaved,) = h.of(PeerMisbehaved)
        assert misbehaved[1].layer == SESSION


async def test_a_stream_that_ends_before_its_first_frame(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        stranger = await raw(await h.connected())
        await stranger.stream.send_eof()
        await trio.sleep(5 * DELAY)
        assert h.count("session-refused", "protocol") == 1


async def test_an_open_that_is_replayed(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        first = await raw(await h.connected())
        await first.send(opening())
        await first.welcome()
        again = await raw(first.stream.connection)
        await again.send(opening())
        assert await again.reset() == Reset(Code.REFUSED, 0, "there is this session already")
        other = await raw(await h.connected())  # of somebody else, it is another session
        await other.send(opening())
        await other.welcome()
        assert len(h.node.sessions) == 2
        for each in (first, other):
            each.stream.connection.abort()
        await trio.sleep(40)
        assert not len(h.node.sessions)


async def test_sessions_opened_without_end(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        connection = await h.connected()
        most = 0
        for number in range(60):
            stranger = await raw(connection)
            await stranger.send(opening(number.to_bytes(16, "big")), _wire.encode_fin(0))
            await trio.sleep(DELAY / 2)
            most = max(most, len(h.node.sessions))
        limits = h.node.config.session
        assert most <= limits.max_per_peer + service.ENDING
        assert len(h.node.connections) == 1
        await trio.sleep(10)
        assert not len(h.node.sessions)


async def test_attaches_without_end(autojump_clock: MockClock) -> None:
    async with besieged() as h:
        connection = await h.connected()
        first = await raw(connection)
        await first.send(opening())
        await first.welcome()
        (session,) = h.node.sessions
        for turn in range(1, 100):
            await attach(connection, ID, turn)
            await trio.sleep(DELAY / 2)
            assert len(session.streams) <= 4
        connection.abort()
        await trio.sleep(40)
        assert not len(h.node.sessions)


async def test_whoever_attaches_and_never_reads_costs_a_window(autojump_clock: MockClock) -> None:
    async with sides(a=configured(window=256 * KIB, patience=10.0)) as s:
        wrote = 0

        async def write(session: SessionStream) -> None:
            nonlocal wrote
            while True:
                await session.send_all(bytes(16 * KIB))
                wrote += 16 * KIB

        s.b.handler = write
        stream = await raw(s.a.connections[0])
        await stream.send(opening(limit=64 * MIB))
        for turn in range(1, 4):
            await trio.sleep(2)
            stream = await attach(s.a.connections[0], ID, turn)
        (session,) = s.b.sessions
        assert session.machine.in_flight <= 256 * KIB + 16 * KIB
        assert wrote <= 256 * KIB + 16 * KIB
        await trio.sleep(40)
        assert not len(s.b.sessions), "nothing was heard on any path"


async def test_whoever_asks_on_and_never_reads_costs_a_queue(autojump_clock: MockClock) -> None:
    async with sides(delay=0) as s:

        async def write(session: SessionStream) -> None:
            while True:
                await session.send_all(bytes(64 * KIB))

        s.b.handler = write
        stream = await raw(s.a.connections[0])
        await stream.send(opening(limit=64 * MIB))
        await trio.sleep(0.1)
        ((theirs,),) = [each.streams for each in s.b.sessions]
        for _ in range(8000):
            await stream.send(_wire.encoded_probe)
            await trio.sleep(0.01)
        assert theirs.unsent < (256 + 64 + 4) * KIB


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(_wire.encode_ack(1, MIB, lost=False), id="of bytes never sent"),
        pytest.param(_wire.encode_ack(0, 2**64 - 1, lost=False), id="credit overflow"),
        pytest.param(_wire.pack_header(_wire.DATA, 1, 9 * MIB) + b"x", id="beyond the window"),
        pytest.param(_wire.pack_header(_wire.DATA, 1, 2**64 - 1) + b"x", id="beyond all offsets"),
        pytest.param(_wire.encode_fin(9 * MIB), id="an end beyond the window"),
        pytest.param(opening(), id="a second OPEN"),
        pytest.param(b"\x63" + bytes(12), id="no kind"),
    ],
)
async def test_who_breaks_a_rule_loses_the_session_and_nothing_else(said: bytes, autojump_clock: MockClock) -> None:
    async with sides() as s:
        stream = await raw(s.a.connections[0])
        await stream.send(opening())
        await stream.welcome()
        await stream.send(said)
        reset = await stream.reset()
        assert reset.code == Code.PROTOCOL
        (misbehaved,) = s.b.bus.of(PeerMisbehaved)
        assert (misbehaved.layer, misbehaved.peer) == (SESSION, s.b.connections[0].peer)
        assert [each.code for each in s.b.bus.of(SessionEnded)] == ["protocol"]
        with pytest.raises(SessionLost):
            await s.b.inbound[0].receive_some()
        assert s.b.connections[0].close_reason is None
        assert not s.b.bus.of(InternalError)
        await pass_on(*await s.session())


async def test_a_stream_that_a_peer_leaves_open_is_not_kept(autojump_clock: MockClock) -> None:
    """Its session has ended in order, both sides have said so, and the peer never ends the stream."""
    async with sides() as s:
        s.b.handler = SessionStream.aclose
        stream = await raw(s.a.connections[0])
        await stream.send(opening(), _wire.encode_fin(0))
        await stream.welcome()
        await stream.send(_wire.encode_ack(1, MIB, lost=False))
        await eventually(lambda: bool(s.b.bus.of(SessionEnded)))
        assert s.b.bus.of(SessionEnded)[0].code == "ended"
        await trio.sleep(40)
        assert not s.b.connections[0].streams


async def test_another_instance_ends_what_was(autojump_clock: MockClock) -> None:
    async with sides() as s:
        for number, instance in enumerate((b"first...", b"second..")):
            stream = await raw(s.a.connections[0])
            await stream.send(opening(bytes([number] * 16), instance))
            await stream.welcome()
        first, second = s.b.inbound
        assert first.over
        with pytest.raises(SessionLost, match="started anew") as lost:
            await first.receive_some()
        assert lost.value.code == "restarted"
        assert not second.over
        await attach(s.a.connections[0], bytes([1] * 16), instance=b"third...")
        await eventually(lambda: second.over)


async def test_who_opens_another_one_has_forgotten_the_one_that_waits(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        s.a.connections[0].abort()
        await trio.sleep(0.1)
        ours.end(Code.STOPPED, "which nobody hears")
        await trio.sleep(3)
        assert not theirs.over
        await s.connect()
        await pass_on(*await s.session())
        assert theirs.over
        with pytest.raises(SessionLost, match="opened another one"):
            await theirs.receive_some()


async def test_a_stranger_s_reason_can_be_shown(autojump_clock: MockClock) -> None:
    async with sides() as s:
        stream = await raw(s.a.connections[0])
        await stream.send(opening())
        await stream.welcome()
        await stream.send(_wire.encode_reset(Code.STOPPED, "a\x1b[31mred\nline"))
        with pytest.raises(SessionLost, match=r"^a\ufffd\[31mred\ufffdline$"):
            await s.b.inbound[0].receive_some()
        assert s.b.bus.of(SessionEnded)[0].reason.isprintable()


async def test_a_peer_that_says_nothing_to_an_attach(autojump_clock: MockClock) -> None:
    """It takes the stream, and no more: the session stays where it is, and the connection is left alone for a while."""
    async with sides() as s:
        ours, theirs = await s.session()
        await pass_on(ours, theirs)
        await s.connect()
        s.b.sessions.handle = _nothing  # type: ignore[method-assign]
        await s.a.sessions._attach(ours, s.a.connections[1], "for the test")
        await pass_on(ours, theirs, bytes(MIB))
        await trio.sleep(10)
        assert ours.machine.attaching is None
        assert ours.connection is s.a.connections[0]
        await pass_on(theirs, ours)


async def _nothing(stream: YamuxStream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("where", ["path_lost", "attach", "choose", "_reach"])
async def test_a_mistake_of_ours_ends_one_session(
    where: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sides() as s:
        (ours, theirs), (other, _) = await s.session(), await s.session()
        await pass_on(ours, theirs)
        if where != "_reach":
            await s.connect()
        at = {"choose": ours.policy, "_reach": s.a.sessions}.get(where, ours.machine)
        right = getattr(at, where)

        def wrong(self: object, *args: object, **more: object) -> object:
            if self is at:
                raise RuntimeError("a mistake")
            return right.__func__(self, *args, **more)

        if where == "_reach":
            monkeypatch.setattr(at, where, lambda *_: wrong(at))
        else:
            monkeypatch.setattr(type(at), where, wrong)
        s.a.connections[0].abort()
        await trio.sleep(1)
        assert {each.reason for each in s.a.bus.of(InternalError)} == {"RuntimeError: a mistake"}
        assert ours.over
        assert ours not in [*s.a.sessions]
        assert other.over == (where == "_reach")
