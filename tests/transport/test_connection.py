"""A connection over pipes in memory, on a clock that jumps: what trio tasks see of the machines under it."""

import itertools
import random

import pytest
import trio
from trio.testing import assert_checkpoints, check_half_closeable_stream, wait_all_tasks_blocked

from kas_libp2p.errors import (
    ConnectionLost,
    LocalProtocolError,
    NegotiationError,
    Refused,
    Stage,
    StreamReset,
    UpgradeTimeout,
)
from kas_libp2p.metadata import DIRECT, Direction
from kas_libp2p.transport._multistream import HEADER
from kas_libp2p.transport._noise import FULL_FRAME, MAX_PLAINTEXT
from kas_libp2p.transport.connection import CLOSE_LINGER, CLOSE_TIMEOUT, Layer
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux._machine import INITIAL_WINDOW
from tests.memory import MemoryRaw, memory_pair
from tests.transport.pairs import ALICE, BOB, ECHO, Foreign, Pair, config, connected, upgraded
from tests.transport.yamux.test_machine import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, UPDATE, frame, frames

KIB = 1 << 10
MIB = 1 << 20


async def write_on(stream):
    """Write now and then, and never read."""
    for _ in range(1000):
        await stream.send_all(bytes(10_000))
        await trio.sleep(1)


async def read_all(stream):
    data = bytearray()
    async for piece in stream:
        data += piece
    return bytes(data)


async def test_bytes_go_both_ways_and_ends_arrive():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"question")
        assert await theirs.receive_some() == b"question"
        await theirs.send_all(b"answer")
        assert await mine.receive_some() == b"answer"
        await mine.send_eof()
        assert await theirs.receive_some() == b""
        await theirs.send_all(b"more")
        await theirs.aclose()
        assert await read_all(mine) == b"more"
        await mine.aclose()
        await wait_all_tasks_blocked()
        assert not pair.alice.streams
        assert not pair.bob.streams


class Yielding(trio.abc.HalfCloseableStream):
    """Lets other tasks run at each call. Our streams do so by bytes; the checks of trio want it by calls."""

    def __init__(self, stream):
        self.stream = stream

    async def send_all(self, data):
        await trio.lowlevel.checkpoint()
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self):
        await self.stream.wait_send_all_might_not_block()

    async def send_eof(self):
        await self.stream.send_eof()

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        return await self.stream.receive_some(max_bytes)

    async def aclose(self):
        await self.stream.aclose()


async def test_a_stream_is_a_trio_stream(autojump_clock):
    small = config(send_high_water=1000)
    async with connected(alice=small, bob=small) as pair:

        async def make():
            mine, theirs = await pair.streams()
            return Yielding(mine), Yielding(theirs)

        async def clogged():
            mine, theirs = await make()
            for stream in (mine, theirs):
                with trio.move_on_after(1):
                    await stream.send_all(bytes(INITIAL_WINDOW + 2000))
            return mine, theirs

        await check_half_closeable_stream(make, clogged)


async def test_metadata():
    async with connected(delay=0.02) as pair:
        mine, theirs = await pair.streams()
        assert mine.metadata.peer == BOB.peer_id
        assert mine.metadata.path == DIRECT
        assert mine.metadata.direction is Direction.OUTBOUND
        assert mine.metadata.initiator
        assert theirs.metadata.peer == ALICE.peer_id
        assert theirs.metadata.direction is Direction.INBOUND
        assert not theirs.metadata.initiator
        assert theirs.metadata.protocol == ECHO
        assert theirs.metadata.remote_address == mine.metadata.local_address
        assert mine.id == theirs.id == 1
        assert pair.alice.peer == BOB.peer_id
        assert pair.alice.public_key == BOB.public_key
        assert pair.alice.direction is Direction.OUTBOUND
        assert pair.bob.direction is Direction.INBOUND
        assert pair.alice.streams == [mine]
        assert pair.alice.number != pair.bob.number


@pytest.mark.parametrize("seed", range(8))
async def test_any_writes_and_reads_arrive_over_a_link_that_cuts(seed, autojump_clock):
    chance = random.Random(seed)
    delay, capacity = chance.choice([0, 0.001, 0.05]), chance.choice([100, 5000, 1 << 20])
    async with connected(delay=delay, capacity=capacity) as pair:
        pair.alice_raw.largest_read = chance.choice([1 << 30, 3000, 500])
        pair.bob_raw.largest_read = chance.choice([1 << 30, 3000, 500])
        data = chance.randbytes(10_000 if capacity < 1000 else 500_000)
        await pair.alice.ping()

        async def write(stream):
            start = 0
            while start < len(data):
                size = chance.choice([1, 100, 5000, 300_000])
                kind = chance.choice([bytes, bytearray, memoryview])
                await stream.send_all(kind(data[start : start + size]))
                start += size
            await stream.send_eof()

        async def read(stream, done):
            got = bytearray()
            while piece := await stream.receive_some(chance.choice([None, 10_000, 300_000])):
                got += piece
            done.append(bytes(got) == data)
            if len(done) == 4:
                all_done.set()

        done: list[bool] = []
        all_done = trio.Event()
        for _ in range(2):
            mine, theirs = await pair.streams()
            for stream in (mine, theirs):
                pair.nursery.start_soon(write, stream)
                pair.nursery.start_soon(read, stream, done)
        assert await all_done.wait() is None
        assert done == [True] * 4


# Writing


async def test_a_small_message_leaves_in_the_call_that_writes_it():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"first")
        assert await theirs.receive_some() == b"first"
        await wait_all_tasks_blocked()
        before = pair.bob_raw.sent
        await theirs.send_all(b"second")
        assert pair.bob_raw.sent > before


async def test_a_line_at_rest_takes_a_small_message_at_once_though_nothing_was_heard(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await trio.sleep(0.1)
        for _ in range(4):
            before = pair.alice_raw.sent
            await mine.send_all(b"live")
            assert pair.alice_raw.sent > before
            assert await theirs.receive_some() == b"live"
            await trio.sleep(0.1)


async def test_writing_what_needs_no_waiting(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await trio.sleep(0.1)
        before = pair.alice_raw.sent
        assert mine.send_nowait(b"live")
        assert pair.alice_raw.sent > before
        assert await theirs.receive_some() == b"live"

        taken = 0
        while mine.send_nowait(bytes(10_000)):
            taken += 10_000
        assert taken <= INITIAL_WINDOW + pair.alice.send_high_water
        assert await read_at_least(theirs, taken) == bytes(taken)
        await mine.wait_send_all_might_not_block()
        assert mine.send_nowait(b"again")
        assert await theirs.receive_some() == b"again"

        pair.nursery.start_soon(mine.send_all, bytes(2 * MIB))
        await wait_all_tasks_blocked()
        assert not mine.send_nowait(b"between")
        assert await read_at_least(theirs, 2 * MIB) == bytes(2 * MIB)


@pytest.mark.parametrize("end", ["ended", "closed", "reset", "lost"])
async def test_what_can_not_be_delivered_is_not_taken(end, autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        match end:
            case "ended":
                await mine.send_eof()
            case "closed":
                await mine.aclose()
            case "reset":
                theirs.reset()
            case "lost":
                pair.bob.abort()
        await wait_all_tasks_blocked()
        assert not mine.send_nowait(b"x")


async def read_at_least(stream, count):
    data = b""
    while len(data) < count:
        data += await stream.receive_some()
    return data


async def test_many_small_writes_leave_together(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await wait_all_tasks_blocked()
        before = len(pair.alice_raw.writes)
        for number in range(100):
            await mine.send_all(b"%03d" % number)
        await wait_all_tasks_blocked()
        assert len(pair.alice_raw.writes) - before <= 2
        assert await theirs.receive_some() == b"".join(b"%03d" % number for number in range(100))


async def test_large_pieces_leave_together_and_a_whole_batch_at_once(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await wait_all_tasks_blocked()
        writes = pair.alice_raw.writes
        before = len(writes)
        for _ in range(3):
            await mine.send_all(bytes(64 * KIB))
        assert len(writes) == before
        await wait_all_tasks_blocked()
        assert len(writes) == before + 1
        await mine.send_all(bytes(3 * 64 * KIB))
        assert len(writes) == before + 2
        assert await read_at_least(theirs, 6 * 64 * KIB) == bytes(6 * 64 * KIB)


class Segments(MemoryRaw):
    """A pipe that takes whole segments as long as it can, as the kernel's TCP does."""

    SIZE = 65483

    def __init__(self, raw):
        self.__dict__.update(raw.__dict__)

    def send_nowait(self, data):
        return super().send_nowait(data[: len(data) // self.SIZE * self.SIZE or len(data)])


async def test_what_a_batch_has_beyond_whole_segments_leaves_with_the_next(autojump_clock):
    async with connected() as pair:
        pair.alice._raw = raw = Segments(pair.alice_raw)
        streams = [await pair.streams() for _ in range(3)]
        await wait_all_tasks_blocked()
        before = len(raw.writes)
        data = bytes(range(250)) * 786  # a little more than three segments
        for mine, _ in streams:
            await mine.send_all(data)
        await wait_all_tasks_blocked()
        *whole, last = raw.writes[before:]
        assert all(size % Segments.SIZE == 0 for size in whole)
        assert 0 < last < Segments.SIZE
        for _, theirs in streams:
            assert theirs.unread == len(data)


async def test_a_writer_waits_for_a_reader(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        room = INITIAL_WINDOW + pair.alice.send_high_water
        with trio.move_on_after(1) as scope:
            for _ in range(100):
                await mine.send_all(bytes(10_000))
        assert scope.cancelled_caught
        assert mine.unsent + theirs.unread <= room + 20_000
        with trio.move_on_after(1) as scope:
            await mine.wait_send_all_might_not_block()
        assert scope.cancelled_caught
        got = 0
        while got < 300_000:
            got += len(await theirs.receive_some())
        await mine.wait_send_all_might_not_block()
        await mine.send_all(b"x")


async def test_a_cancelled_write_is_sent_nevertheless_and_in_order(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        data = random.Random(1).randbytes(MIB)
        with trio.move_on_after(1):
            await mine.send_all(data)

        async def rest():
            await mine.send_all(b"the rest")
            await mine.send_eof()

        pair.nursery.start_soon(rest)
        assert await read_all(theirs) == data + b"the rest"


async def test_what_the_caller_changes_afterwards_is_not_sent(autojump_clock):
    async with connected(capacity=100) as pair:
        mine, theirs = await pair.streams()
        data = bytearray(b"a" * 5000)
        await mine.send_all(data)
        data[:] = b"b" * 5000
        await mine.send_eof()
        assert await read_all(theirs) == b"a" * 5000


async def test_one_task_writes_and_one_reads(autojump_clock):
    async with connected() as pair:
        mine, _theirs = await pair.streams()
        pair.nursery.start_soon(mine.receive_some)
        pair.nursery.start_soon(mine.send_all, bytes(2 * MIB))
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await mine.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await mine.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await mine.send_eof()
        with pytest.raises(trio.BusyResourceError):
            await mine.wait_send_all_might_not_block()


async def test_nothing_is_written_behind_the_end():
    async with connected() as pair:
        mine, _ = await pair.streams()
        await mine.send_eof()
        await mine.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await mine.send_all(b"x")


# Reading


async def test_reading_in_pieces():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"0123456789")
        assert [await theirs.receive_some(4) for _ in range(3)] == [b"0123", b"4567", b"89"]
        with pytest.raises(ValueError):
            await theirs.receive_some(0)


async def test_a_cancelled_read_loses_nothing(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        with trio.move_on_after(1) as scope:
            await theirs.receive_some()
        assert scope.cancelled_caught
        await mine.send_all(b"data")
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await theirs.receive_some()
        assert scope.cancelled_caught
        assert await theirs.receive_some() == b"data"


async def test_a_reader_that_never_reads_stalls_nobody_else(autojump_clock):
    async with connected(delay=0.01) as pair:
        lazy, _ = await pair.streams()
        pair.nursery.start_soon(lazy.send_all, bytes(10 * MIB))
        mine, theirs = await pair.streams()
        data = random.Random(2).randbytes(3 * MIB)

        async def write():
            await mine.send_all(data)
            await mine.send_eof()

        pair.nursery.start_soon(write)
        assert await read_all(theirs) == data
        await trio.sleep(3600)
        assert lazy._state.reset is None
        assert pair.alice.close_reason is None


async def test_windows_carry_the_rate_over_a_distance(autojump_clock):
    """16 MiB over a round trip of 200 ms: with the first window alone it would take 13 s."""
    async with connected(delay=0.1, capacity=64 * MIB) as pair:
        mine, theirs = await pair.streams()

        async def write():
            for _ in range(16):
                await mine.send_all(bytes(MIB))
            await mine.send_eof()

        pair.nursery.start_soon(write)
        start = trio.current_time()
        assert len(await read_all(theirs)) == 16 * MIB
        assert trio.current_time() - start < 3


# Ending a stream


class NeverDry(MemoryRaw):
    """A pipe on which more is always there than one read takes, from the second read on."""

    def __init__(self, raw, sealer):
        self.__dict__.update(raw.__dict__)
        self.sealer = sealer
        self.reads = 0
        self.frames = itertools.cycle(frame(UPDATE, 0, 1, 0))

    async def wait_readable(self):
        await trio.lowlevel.checkpoint()
        if not self.reads:
            await super().wait_readable()

    def receive_nowait(self, buffer):
        if self.reads:
            self.reads += 1
            assert self.reads < 100, "nobody else had a turn"
            size = len(buffer) // FULL_FRAME * MAX_PLAINTEXT
            return self.sealer.seal_into(bytes(itertools.islice(self.frames, size)), buffer)
        count = super().receive_nowait(buffer)
        self.reads += bool(count)
        return count


async def test_a_peer_that_sends_faster_than_we_read_lets_others_run():
    here, there = memory_pair()
    foreign = Foreign(there, initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(foreign.shake_first)
        connection = await upgrade(here, identity=BOB, initiator=False, expected=None, config=config())
        await foreign.say(frame(UPDATE, SYN, 1, 0))
        connection._raw = raw = NeverDry(here, foreign.secured.sealer)
        nursery.start_soon(connection.run, lambda stream: None)
        while raw.reads < 10:
            await trio.lowlevel.checkpoint()
        assert connection.close_reason is None
        nursery.cancel_scope.cancel()


async def test_a_reset_is_seen_with_its_code():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"unread")
        await wait_all_tasks_blocked()
        mine.reset(0x1234)
        with pytest.raises(StreamReset) as caught:
            await mine.receive_some()
        assert not caught.value.by_peer
        await wait_all_tasks_blocked()
        for call in (theirs.receive_some(), theirs.send_all(b"x"), theirs.send_eof()):
            with pytest.raises(StreamReset, match="0x1234") as caught:
                await call
            assert caught.value.by_peer
        await theirs.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive_some()
        assert not pair.bob.streams


async def test_a_reset_wakes_who_waits(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()

        async def expect(call, *args):
            with pytest.raises(StreamReset):
                await call(*args)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, mine.receive_some)
            nursery.start_soon(expect, mine.send_all, bytes(2 * MIB))
            await wait_all_tasks_blocked()
            theirs.reset()


async def test_closing_wakes_who_waits(autojump_clock):
    async with connected() as pair:
        mine, _ = await pair.streams()

        async def expect(call, *args):
            with pytest.raises(trio.ClosedResourceError):
                await call(*args)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, mine.receive_some)
            await wait_all_tasks_blocked()
            await mine.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await mine.send_all(b"x")
        with assert_checkpoints():
            await mine.aclose()


async def test_closing_delivers_what_was_written(autojump_clock):
    async with connected(capacity=1000, delay=0.1) as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(bytes(100_000))
        await mine.aclose()
        assert len(await read_all(theirs)) == 100_000


async def test_a_peer_that_writes_on_to_a_closed_stream_is_told(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await theirs.aclose()
        with pytest.raises(StreamReset):
            await write_on(mine)


# Negotiation


async def test_a_proposal_needs_no_round_trip():
    async with connected() as pair:
        mine = await pair.alice.open_stream(ECHO)
        await mine.send_all(b"early")
        before = len(pair.alice_raw.writes)
        theirs = await pair.accept(pair.bob)
        assert await theirs.receive_some() == b"early"
        assert len(pair.alice_raw.writes) == before
        assert mine.protocol == ECHO  # taken for agreed
        await theirs.send_all(b"late")
        assert await mine.receive_some() == b"late"
        assert mine.protocol == ECHO


async def test_a_proposal_leaves_though_nothing_is_written():
    async with connected() as pair:
        mine = await pair.alice.open_stream(ECHO)
        theirs = await pair.accept(pair.bob)
        await theirs.send_all(b"the listener speaks first")
        assert await mine.receive_some() == b"the listener speaks first"


async def test_a_refused_proposal_is_an_error_of_reading():
    async with connected() as pair:
        mine = await pair.alice.open_stream("/other")
        theirs = await pair.inbound(pair.bob)
        pair.nursery.start_soon(expect_no_agreement, pair.bob, theirs)
        with pytest.raises(NegotiationError, match="does not speak /other"):
            await mine.receive_some()
        with pytest.raises(NegotiationError, match="does not speak /other"):
            await mine.send_all(b"x")
        assert not pair.alice.streams


async def expect_no_agreement(connection, stream):
    # Data that came behind a proposal that is refused is read as another one.
    with pytest.raises((StreamReset, NegotiationError)):
        await connection.accept(stream, [ECHO])


async def test_a_refused_proposal_is_an_error_of_who_only_writes(autojump_clock):
    async with connected() as pair:
        mine = await pair.alice.open_stream("/other")
        theirs = await pair.inbound(pair.bob)
        pair.nursery.start_soon(expect_no_agreement, pair.bob, theirs)
        with pytest.raises(NegotiationError, match="does not speak /other"):
            await write_on(mine)


async def test_several_protocols_are_negotiated(autojump_clock):
    async with connected(delay=0.1) as pair:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.accept, pair.bob, "/b", "/c")
            mine = await pair.alice.open_stream("/a", "/b", "/c")
        assert mine.protocol == "/b"


async def test_several_protocols_and_none_in_common():
    async with connected() as pair:

        async def bob():
            await expect_no_agreement(pair.bob, await pair.inbound(pair.bob))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bob)
            with pytest.raises(NegotiationError, match="/a or /b"):
                await pair.alice.open_stream("/a", "/b")
        assert not pair.alice.streams


async def test_a_peer_that_proposes_nothing(autojump_clock):
    async with connected() as pair:
        mine = await pair.alice.open_stream()
        theirs = await pair.inbound(pair.bob)
        start = trio.current_time()
        with pytest.raises(UpgradeTimeout) as caught:
            await pair.bob.accept(theirs, [ECHO])
        assert caught.value.stage is Stage.STREAM
        assert trio.current_time() - start == pytest.approx(10)
        with pytest.raises(StreamReset, match="0x1001"):
            await mine.receive_some()


async def test_a_peer_that_answers_nothing(autojump_clock):
    async with connected() as pair:
        with pytest.raises(UpgradeTimeout):
            await pair.alice.open_stream("/a", "/b")
        assert not pair.alice.streams


async def test_a_peer_that_ends_the_stream_instead_of_answering():
    async with connected() as pair:
        mine = await pair.alice.open_stream(ECHO)
        theirs = await pair.inbound(pair.bob)
        await theirs.send_eof()
        with pytest.raises(NegotiationError, match="before it agreed"):
            await mine.receive_some()
        other = await pair.alice.open_stream()
        await other.send_eof()
        with pytest.raises(NegotiationError, match="before they agreed"):
            await pair.bob.accept(await pair.inbound(pair.bob), [ECHO])


async def test_junk_instead_of_a_proposal():
    async with connected() as pair:
        mine = await pair.alice.open_stream()
        await mine.send_all(HEADER + b"\x80\x80\x40" + bytes(1000))
        theirs = await pair.inbound(pair.bob)
        with pytest.raises(NegotiationError, match="1048576 bytes"):
            await pair.bob.accept(theirs, [ECHO])
        with pytest.raises(StreamReset):
            await mine.receive_some()
        assert pair.bob.close_reason is None


async def test_negotiation_gives_back_its_window():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(bytes(100))
        await theirs.send_all(bytes(100))
        await mine.receive_some()
        await theirs.receive_some()
        assert mine._state.unread == theirs._state.unread == 0


# Limits


async def test_streams_beyond_the_limit(autojump_clock):
    async with connected(bob=config(max_inbound_streams=2)) as pair:
        first, second, third = [await pair.alice.open_stream(ECHO) for _ in range(3)]
        with pytest.raises(StreamReset, match="0x1002"):
            await third.receive_some()
        assert pair.refused == ["yamux.max_inbound_streams"]
        assert pair.bob.limit_hits == {"yamux.max_inbound_streams": 1}
        for stream in (first, second):
            await stream.aclose()


async def test_our_own_limit():
    async with connected(alice=config(max_outbound_streams=1)) as pair:
        await pair.alice.open_stream(ECHO)
        with pytest.raises(Refused) as caught:
            await pair.alice.open_stream(ECHO)
        assert caught.value.limit == "yamux.max_outbound_streams"
        assert pair.refused == ["yamux.max_outbound_streams"]


# Ping and silence


async def test_ping_measures_the_round_trip(autojump_clock):
    async with connected(delay=0.05) as pair:
        assert pair.alice.rtt == pytest.approx(0.1)
        assert pair.bob.rtt == pytest.approx(0.1)
        assert await pair.alice.ping() == pytest.approx(0.1)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(pair.bob.ping)


async def test_an_idle_connection_stays(autojump_clock):
    async with connected(delay=0.05) as pair:
        before = pair.alice_raw.sent
        await trio.sleep(3600)
        assert pair.alice.close_reason is None
        pings = (pair.alice_raw.sent - before) // (12 + 18)
        assert 60 <= pings <= 3600 / 30 * 2


async def test_a_peer_that_went_silent_is_noticed(autojump_clock):
    raws = memory_pair()
    alice, _ = await upgraded(raws)
    start = trio.current_time()
    await alice.run(lambda stream: None)  # bob does not run
    assert trio.current_time() - start == pytest.approx(40)
    assert alice.close_reason == "the peer said nothing and left a ping unanswered for 10 s"
    assert raws[0].closed == "aborted"


async def test_a_slow_line_is_waited_for(autojump_clock):
    """A ping lies behind what was sent before it, for as long as that moves."""
    raws = memory_pair(capacity=1 << 20)
    alice, _ = await upgraded(raws)
    async with trio.open_nursery() as nursery:
        await nursery.start(run, alice)  # bob does not run
        stream = await alice.open_stream()
        for second in range(29, 130):  # a kilobyte arrives every second
            raws[0]._out.delay = second
            await stream.send_all(bytes(1000))
            await wait_all_tasks_blocked()
        await trio.sleep(129)
        assert alice.close_reason is None
        begun = trio.current_time()
        await alice.wait_closed()
        assert trio.current_time() - begun <= 10 + 10
        assert "unanswered" in alice.close_reason


async def test_what_is_sent_behind_a_ping_says_nothing(autojump_clock):
    """The peer has stopped, and its host, or a relay, takes what we send: for hours, if that is little."""
    raws = memory_pair(capacity=1 << 20)
    alice, _ = await upgraded(raws)
    async with trio.open_nursery() as nursery:
        await nursery.start(run, alice)  # bob does not run
        stream = await alice.open_stream()
        for _ in range(50):
            if alice.close_reason is None:
                await stream.send_all(bytes(100))
                await trio.sleep(1)
        assert alice.close_reason == "the peer said nothing and left a ping unanswered for 10 s"


async def test_what_arrived_long_before_a_ping_says_nothing_of_it(autojump_clock):
    raws = memory_pair(capacity=1 << 20)
    alice, _ = await upgraded(raws)
    async with trio.open_nursery() as nursery:
        await nursery.start(run, alice)  # bob does not run
        stream = await alice.open_stream()
        await stream.send_all(bytes(1000))
        await trio.sleep(5)
        with pytest.raises(ConnectionLost, match="unanswered for 10 s"):
            await alice.ping()
        assert trio.current_time() == pytest.approx(15)


async def test_a_ping_that_is_never_answered(autojump_clock):
    raws = memory_pair()
    alice, _ = await upgraded(raws)
    async with trio.open_nursery() as nursery:
        await nursery.start(run, alice)
        with pytest.raises(ConnectionLost, match="unanswered for 10 s"):
            await alice.ping()


async def run(connection, task_status=trio.TASK_STATUS_IGNORED):
    await connection.run(lambda stream: None, task_status=task_status)


async def test_a_peer_that_fetches_nothing_is_noticed_and_blocks_no_one(autojump_clock):
    async with connected(capacity=10_000) as pair:
        mine, _ = await pair.streams()
        pair.nursery.start_soon(expect_lost, mine.send_all, bytes(10 * MIB))
        pair.bob_raw.receive_nowait = lambda buffer: None
        pair.bob_raw.wait_readable = trio.sleep_forever
        await trio.sleep(100)
        assert "unanswered" in pair.alice.close_reason


async def expect_lost(call, *args):
    with pytest.raises(ConnectionLost):
        await call(*args)


# Ending the connection


async def test_closing_tells_both_sides(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"unread")
        await pair.alice.aclose("that is enough")
        await pair.bob.wait_closed()
        assert pair.alice.close_reason == "that is enough"
        assert pair.bob.close_reason == "the peer closed it"
        assert pair.alice_raw.closed == pair.bob_raw.closed == "closed"
        with pytest.raises(ConnectionLost, match="that is enough"):
            await mine.send_all(b"x")
        assert await theirs.receive_some() == b"unread"
        with pytest.raises(ConnectionLost, match="the peer closed it"):
            await theirs.receive_some()
        with pytest.raises(ConnectionLost, match="the peer closed it"):
            await theirs.send_all(b"x")
        with pytest.raises(ConnectionLost):
            await pair.alice.open_stream(ECHO)
        with pytest.raises(ConnectionLost):
            await pair.bob.ping()
        await pair.alice.aclose()
        await pair.alice.wait_closed()


async def test_closing_delivers_what_was_written_before(autojump_clock):
    async with connected(delay=0.05, capacity=10_000) as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(bytes(150_000))
        await mine.aclose()
        got = []

        async def read():
            got.append(len(await read_all(theirs)))

        pair.nursery.start_soon(read)
        await pair.alice.aclose()
        await pair.bob.wait_closed()
        await wait_all_tasks_blocked()
        assert got == [150_000]


async def test_closing_takes_a_bounded_time(autojump_clock):
    async with connected() as pair:
        mine, _ = await pair.streams()
        with trio.move_on_after(1):
            await mine.send_all(bytes(MIB))  # more than bob's window: it can't leave
        pair.bob_raw.receive_nowait = lambda buffer: None
        pair.bob_raw.wait_readable = trio.sleep_forever
        start = trio.current_time()
        await pair.alice.aclose()
        assert trio.current_time() - start <= CLOSE_TIMEOUT + CLOSE_LINGER + 0.01


async def test_who_is_closed_says_go_away_last(autojump_clock):
    raws = memory_pair()
    foreign = Foreign(raws[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(foreign.shake)
        alice = await upgrade(raws[0], identity=ALICE, initiator=True, expected=None, config=config())
    async with trio.open_nursery() as nursery:
        await nursery.start(run, alice)
        stream = await alice.open_stream()
        await stream.send_all(b"bye")
        nursery.start_soon(alice.aclose)
        plain = b""
        while piece := await foreign.hear():
            plain += piece
        assert frames(plain) == [(UPDATE, SYN, 1, 0), (DATA, 0, 1, b"bye"), (GO_AWAY, 0, 0, 0)]


async def test_a_cancelled_close_aborts(autojump_clock):
    async with connected() as pair:
        mine, _ = await pair.streams()
        with trio.move_on_after(1):
            await mine.send_all(bytes(MIB))
        with trio.move_on_after(0.1) as scope:
            await pair.alice.aclose()
        assert scope.cancelled_caught
        await pair.alice.wait_closed()
        assert pair.alice_raw.closed == "aborted"


async def test_an_abort_tells_every_stream(autojump_clock):
    async with connected() as pair:
        mine, theirs = await pair.streams()
        waiting = []

        async def wait(stream):
            with pytest.raises(ConnectionLost) as caught:
                await stream.receive_some()
            waiting.append(str(caught.value))

        pair.nursery.start_soon(wait, mine)
        pair.nursery.start_soon(wait, theirs)
        await wait_all_tasks_blocked()
        pair.alice.abort("the node is shutting down")
        await wait_all_tasks_blocked()
        assert sorted(waiting) == ["the connection broke: connection reset by peer", "the node is shutting down"]


async def test_cancelling_run_aborts():
    raws = memory_pair()
    alice, bob = await upgraded(raws)
    async with trio.open_nursery() as nursery:
        await nursery.start(run, bob)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                await inner.start(run, alice)
                stream = await alice.open_stream(ECHO)
                scope.cancel()
        with pytest.raises(ConnectionLost, match="cancelled on this side"):
            await stream.receive_some()
    assert raws[0].closed == "aborted"
    assert bob.close_reason == "the connection broke: connection reset by peer"


async def test_a_mistake_of_ours_ends_the_connection_and_says_so():
    alice, bob = await upgraded(memory_pair())

    async def run_bob():
        with pytest.RaisesGroup(ZeroDivisionError):
            await bob.run(lambda stream: 1 / 0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_bob)
        await nursery.start(alice.run, lambda stream: None)
        stream = await alice.open_stream(ECHO)
        with pytest.raises(ConnectionLost):
            await stream.receive_some()
    assert bob.close_reason == "an internal error on this side"


async def test_a_connection_that_never_ran_can_be_closed():
    raws = memory_pair()
    alice, bob = await upgraded(raws)
    await alice.aclose("not wanted")
    assert alice.close_reason == "not wanted"
    assert raws[0].closed == "closed"
    bob.abort()
    assert raws[1].closed == "aborted"
    await alice.wait_closed()
    await alice.run(lambda stream: None)
    with pytest.raises(LocalProtocolError):
        await alice.run(lambda stream: None)


async def test_streams_are_opened_on_running_connections_only():
    alice, _ = await upgraded(memory_pair())
    with pytest.raises(LocalProtocolError):
        await alice.open_stream(ECHO)


# Peers that break rules


class Break:
    """Alice runs; bob says what he likes."""

    def __init__(self):
        self.raws = memory_pair()
        self.foreign = Foreign(self.raws[1])

    async def __aenter__(self):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.foreign.shake)
            self.alice = await upgrade(self.raws[0], identity=ALICE, initiator=True, expected=None, config=config())
        self.streams = []
        self._nursery = trio.open_nursery()
        self.nursery = await self._nursery.__aenter__()
        await self.nursery.start(self._run)
        return self

    async def _run(self, task_status):
        await self.alice.run(self.streams.append, task_status=task_status)

    async def __aexit__(self, *exc):
        self.nursery.cancel_scope.cancel()
        return await self._nursery.__aexit__(*exc)


async def test_a_broken_rule_ends_the_connection_with_its_reason():
    async with Break() as talk:
        stream = await talk.alice.open_stream()
        await talk.foreign.say(frame(UPDATE, SYN, 1, 0))
        await talk.alice.wait_closed()
        reason = "yamux: the peer opened stream 1, whose id is not its to use"
        assert talk.alice.close_reason == reason
        assert talk.alice.misbehaviour == (Layer.YAMUX, reason)
        with pytest.raises(ConnectionLost, match="not its to use"):
            await stream.receive_some()
        plain = b""
        while piece := await talk.foreign.hear():
            plain += piece
        assert frames(plain)[-1] == (GO_AWAY, 0, 0, 1)


async def test_forged_noise_ends_the_connection():
    async with Break() as talk:
        await talk.foreign.say(frame(UPDATE, SYN, 2, 0))
        await wait_all_tasks_blocked()
        await talk.raws[1].send_all(b"\x00\x20" + bytes(32))
        await talk.alice.wait_closed()
        assert talk.alice.misbehaviour is not None
        assert talk.alice.misbehaviour[0] is Layer.NOISE
        assert "was not sealed with the key of this connection" in talk.alice.close_reason
        assert len(talk.streams) == 1


async def test_an_end_in_the_middle_of_a_message():
    async with Break() as talk:
        await talk.raws[1].send_all(b"\x10\x00junk")
        await talk.raws[1].aclose()
        await talk.alice.wait_closed()
        assert talk.alice.close_reason == "the peer closed it in the middle of a message"
        assert talk.alice.misbehaviour is None


@pytest.mark.parametrize(
    ("code", "reason"), [(0, "the peer closed it"), (1, "because of a protocol error"), (0x1002, "code 0x1002")]
)
async def test_the_reason_of_the_peer_is_known(code, reason):
    async with Break() as talk:
        await talk.foreign.say(frame(GO_AWAY, 0, 0, code))
        await wait_all_tasks_blocked()
        assert talk.alice.closing
        with pytest.raises(ConnectionLost, match="closing"):
            await talk.alice.open_stream(ECHO)
        await talk.raws[1].aclose()
        await talk.alice.wait_closed()
        assert reason in talk.alice.close_reason


async def test_a_peer_that_waits_for_acknowledgements_gets_them_at_once():
    async with Break() as talk:
        await talk.foreign.say(frame(UPDATE, SYN, 2, 0) + frame(PING, SYN, 0, 9))
        assert frames(await talk.foreign.hear()) == [(UPDATE, ACK, 2, 0), (PING, ACK, 0, 9)]


async def test_a_stream_that_is_opened_and_reset_in_one_breath_is_no_stream():
    async with Break() as talk:
        await talk.foreign.say(frame(UPDATE, SYN, 2, 0) + frame(UPDATE, RST, 2, 0))
        await wait_all_tasks_blocked()
        assert talk.streams == []
        assert talk.alice.close_reason is None


async def test_a_stream_that_is_opened_written_and_ended_in_one_breath():
    async with Break() as talk:
        await talk.foreign.say(frame(DATA, SYN | FIN, 2, b"all of it"))
        await wait_all_tasks_blocked()
        (stream,) = talk.streams
        assert await read_all(stream) == b"all of it"


async def test_a_js_frame_as_large_as_the_window_is_read_as_it_comes(autojump_clock):
    raws = memory_pair()
    foreign = Foreign(raws[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(foreign.shake)
        alice = await upgrade(raws[0], identity=ALICE, initiator=True, expected=None, config=config())
    streams = []

    async def run(task_status):
        await alice.run(streams.append, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        wire = frame(DATA, SYN, 2, random.Random(3).randbytes(INITIAL_WINDOW))
        await foreign.say(wire[:100_000])
        await wait_all_tasks_blocked()
        got = await streams[0].receive_some()
        assert got
        nursery.start_soon(foreign.say, wire[100_000:])
        while len(got) < INITIAL_WINDOW:
            got += await streams[0].receive_some()
        assert got == wire[12:]
        nursery.cancel_scope.cancel()


async def test_an_idle_connection_holds_no_buffers():
    async with connected() as pair:
        mine, theirs = await pair.streams()
        pair.nursery.start_soon(mine.send_all, bytes(MIB))
        got = 0
        while got < MIB:
            got += len(await theirs.receive_some())
        await wait_all_tasks_blocked()
        assert pair.alice._wire is pair.bob._wire is None
        assert pair.alice._unopened == pair.bob._unopened == b""


async def test_events_of_one_pair_do_not_reach_another():
    async with connected() as one, connected() as two:
        assert isinstance(one, Pair)
        mine, theirs = await two.streams()
        one.alice.abort()
        await mine.send_all(b"fine")
        assert await theirs.receive_some() == b"fine"
