"""A session as a stream: it keeps trio's rules, and holds back whoever writes faster than the other side reads."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, check_half_closeable_stream, wait_all_tasks_blocked

from kas_libp2p.config import KIB, MIB, Config
from kas_libp2p.errors import SessionLost, StreamReset
from kas_libp2p.events import InternalError
from kas_libp2p.session._wire import Code
from kas_libp2p.session.stream import SessionStream

from .sides import configured, sides

QUEUE = Config().yamux.send_high_water


class Paced(trio.abc.HalfCloseableStream):
    """Lets others run at each call, and time pass: a peer that was closed takes what comes for some seconds, and the
    checks of trio write until that is over."""

    def __init__(self, stream: SessionStream) -> None:
        self.stream = stream
        self.sends = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sends += 1
        await trio.sleep(0.1 if self.sends % 10 == 0 else 0)
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.stream.aclose()


async def test_it_is_a_trio_stream(autojump_clock: MockClock) -> None:
    window = 256 * KIB
    async with sides(a=configured(window=window, max_per_peer=50, max_sessions=50)) as s:

        async def make() -> tuple[Paced, Paced]:
            ours, theirs = await s.session()
            return Paced(ours), Paced(theirs)

        async def clogged() -> tuple[Paced, Paced]:
            pair = await make()
            for stream in pair:
                with trio.move_on_after(1):
                    await stream.send_all(bytes(window + QUEUE))
                    await stream.send_all(b"x")
            return pair

        await check_half_closeable_stream(make, clogged)


async def test_bytes_pass_both_ways_and_end(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await ours.send_all(b"hello")
        assert await theirs.receive_some() == b"hello"
        await theirs.send_all(bytearray(b"good "))
        await theirs.send_all(memoryview(b"day"))
        await theirs.send_eof()
        await theirs.send_eof()
        got = b""
        while data := await ours.receive_some(3):
            assert len(data) <= 3
            got += data
        assert got == b"good day"
        assert await ours.receive_some() == b""
        await ours.send_all(b"and you?")
        assert await theirs.receive_some() == b"and you?"
        await ours.send_eof()
        assert await theirs.receive_some() == b""
        await trio.sleep(1)
        assert (len(s.a.sessions), len(s.b.sessions)) == (0, 0)
        for each in (ours, theirs):
            assert await each.receive_some() == b""
            with pytest.raises(trio.ClosedResourceError):
                await each.send_all(b"x")


async def test_only_one_task_reads_and_one_writes(autojump_clock: MockClock) -> None:
    async with sides(a=configured(window=256 * KIB)) as s:
        ours, _ = await s.session()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.receive_some)
            nursery.start_soon(ours.send_all, bytes(MIB))
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await ours.receive_some()
            for write in (ours.send_eof, ours.wait_send_all_might_not_block):
                with pytest.raises(trio.BusyResourceError):
                    await write()
            with pytest.raises(trio.BusyResourceError):
                await ours.send_all(b"x")
            assert not ours.send_nowait(b"x")
            nursery.cancel_scope.cancel()
        with pytest.raises(ValueError, match="at least 1"):
            await ours.receive_some(0)


async def test_who_does_not_read_holds_the_writer_back_by_the_window(autojump_clock: MockClock) -> None:
    window = 512 * KIB
    async with sides(a=configured(window=window)) as s:
        ours, theirs = await s.session()
        written = 0
        with trio.move_on_after(60):
            while True:
                await ours.send_all(bytes(16 * KIB))
                written += 16 * KIB
        assert theirs.machine.unread <= window
        assert ours.machine.in_flight <= window + 16 * KIB
        assert 256 * KIB <= written <= window + QUEUE
        assert theirs.stream.unread == 0, "the stream below is emptied, and has a window of its own"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.wait_send_all_might_not_block)
            read = 0
            while read < written:
                read += len(await theirs.receive_some())
        assert ours.send_nowait(b"x")


async def test_without_a_path_the_writer_may_go_on_for_a_queue_s_length(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        s.a.connections[0].abort()
        await trio.sleep(0.1)
        written = 0
        with trio.move_on_after(1):
            while True:
                await ours.send_all(bytes(16 * KIB))
                written += 16 * KIB
        assert QUEUE - 16 * KIB <= written <= QUEUE
        assert not ours.send_nowait(b"x")
        await s.connect()
        read = 0
        while read < written:
            read += len(await theirs.receive_some())
        assert ours.machine.unsent == 0


async def test_what_was_cancelled_is_sent_all_the_same(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        with trio.move_on_after(0.001) as scope:
            await ours.send_all(bytes(9 * MIB))
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await ours.send_all(b"never")
        with trio.CancelScope() as scope:
            scope.cancel()
            await theirs.receive_some()
        read = 0
        while read < 9 * MIB:
            read += len(await theirs.receive_some())
        await ours.send_all(b"x")
        assert await theirs.receive_some() == b"x"


@pytest.mark.parametrize("how", ["receive_some", "send_all", "wait_send_all_might_not_block"])
@pytest.mark.parametrize("end", ["reset", "aclose", "peer", "lost"])
async def test_whoever_waits_is_told_of_the_end(how: str, end: str, autojump_clock: MockClock) -> None:
    async with sides(a=configured(window=256 * KIB, patience=5.0)) as s:
        ours, theirs = await s.session()
        wait = {
            "receive_some": ours.receive_some,
            "send_all": lambda: ours.send_all(bytes(MIB)),
            "wait_send_all_might_not_block": ours.wait_send_all_might_not_block,
        }[how]
        if how == "wait_send_all_might_not_block":
            with trio.move_on_after(1):
                await ours.send_all(bytes(MIB))
        expected: type[Exception] = {"reset": StreamReset, "aclose": trio.ClosedResourceError}.get(end, SessionLost)
        async with trio.open_nursery() as nursery:

            async def told() -> None:
                with pytest.raises(expected) as error:
                    await wait()
                if isinstance(error.value, SessionLost):
                    assert (error.value.code, error.value.by_peer) == (
                        ("stopped", True) if end == "peer" else ("lost", False)
                    )

            nursery.start_soon(told)
            await wait_all_tasks_blocked()
            match end:
                case "reset":
                    ours.reset()
                    assert ours.over
                case "aclose":
                    await ours.aclose()
                case "peer":
                    theirs.reset()
                case "lost":
                    s.a.connections[0].abort()
        with pytest.raises(expected):
            await ours.send_all(b"x")


async def test_what_came_before_the_path_was_lost_can_be_read(autojump_clock: MockClock) -> None:
    async with sides(a=configured(patience=1.0)) as s:
        ours, theirs = await s.session()
        await ours.send_all(b"the last words")
        await trio.sleep(0.1)
        s.a.connections[0].abort()
        await trio.sleep(10)
        assert theirs.over
        assert await theirs.receive_some() == b"the last words"
        with pytest.raises(SessionLost):
            await theirs.receive_some()


async def test_send_nowait_takes_all_or_nothing(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        assert ours.send_nowait(b"hello")
        assert await theirs.receive_some() == b"hello"
        assert not ours.send_nowait(bytes(MIB))
        count = 0
        while ours.send_nowait(bytes(16 * KIB)):
            count += 1
        assert 1 <= count <= 16
        await ours.aclose()
        assert not ours.send_nowait(b"x")


async def test_a_small_message_leaves_with_no_turn_of_the_scheduler(autojump_clock: MockClock) -> None:
    async with sides(delay=0) as s:
        ours, theirs = await s.session()
        await trio.sleep(1)
        sent = s.a.connections[0].sent
        assert ours.send_nowait(b"hello")
        assert s.a.connections[0].sent > sent
        await trio.sleep(1)
        assert await theirs.receive_some() == b"hello"


async def test_the_end_has_a_word(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        theirs.end(Code.REFUSED, "we are many")
        with pytest.raises(SessionLost, match="we are many") as lost:
            await ours.receive_some()
        assert (lost.value.code, lost.value.by_peer) == ("refused", True)
        theirs.end(Code.STOPPED, "again")  # which says nothing any more
        with pytest.raises(SessionLost, match="we are many") as lost:
            await theirs.receive_some()
        assert not lost.value.by_peer
        assert not s.a.bus.of(InternalError)


async def test_nothing_is_written_to_a_session_that_a_mistake_of_ours_has_ended(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await ours.send_all(b"x")
        await theirs.receive_some()
        s.a.sessions.failed(ours, RuntimeError("a mistake"))
        with pytest.raises(SessionLost):
            await ours.send_all(b"lost")


async def test_an_end_between_the_wake_of_a_writer_and_its_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be two tasks' mistake; the answer is not to wait for ever."""
    settle = SessionStream.settle
    written: list[str] = []
    async with sides() as s:
        ours, theirs = await s.session()
        await ours.send_all(b"x")
        await theirs.receive_some()

        def hooked(session: SessionStream, now: float) -> None:
            waits = session._writable.task is not None
            settle(session, now)
            if session is ours and waits and session._writable.task is None:
                monkeypatch.setattr(SessionStream, "settle", settle)
                session.machine.finish(now)  # what `send_eof` does behind its checkpoint
                session._space = 0
                settle(session, now)

        monkeypatch.setattr(SessionStream, "settle", hooked)

        async def write() -> None:
            await ours.send_all(bytes(MIB))
            written.append("all")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            with trio.fail_after(60):
                while await theirs.receive_some():
                    pass
            assert written == ["all"]


async def test_closed_behind_its_end_it_holds_nothing(autojump_clock: MockClock) -> None:
    async with sides(a=configured(patience=1.0), b=configured(patience=1.0)) as s:
        ours, theirs = await s.session()
        await ours.send_all(bytes(100_000))
        await trio.sleep(1)
        s.a.connections[0].abort()
        await trio.sleep(100)
        assert (theirs.over, theirs.held) == (True, 100_000)
        await theirs.aclose()
        assert theirs.held == 0
