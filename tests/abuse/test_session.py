"""Against sessions (docs/session-protocol.md), by peers that have shaken hands in order: a node on a network in memory,
whose Kaspa streams send back what comes. A friend has a session with it all the time, and notices nothing."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses
from kas_libp2p.config import KIB, MIB, Config, Limits, SessionConfig
from kas_libp2p.errors import ConnectionLost, NegotiationError, StreamReset
from kas_libp2p.events import HandlerFailed, InternalError, LimitHit, PeerMisbehaved, SessionEnded, SessionRefused
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import SESSION, OverlayStream
from kas_libp2p.node import Node
from kas_libp2p.session import _wire
from kas_libp2p.session._machine import INITIAL_LIMIT, MAX_PATHS, MAX_RUNS
from kas_libp2p.session._wire import (
    MAX_CONTROL,
    MAX_DATA,
    MAX_OFFSET,
    Ack,
    Attach,
    Code,
    Control,
    Data,
    Open,
    Parser,
    Reset,
    Welcome,
    encode_ack,
    encode_attach,
    encode_fin,
    encode_open,
    encode_welcome,
    pack_header,
)
from kas_libp2p.session.service import MOVE_INTERVAL, MOVES_AT_ONCE
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.abuse.house import ADDRESS, DELAY, node_and_friend
from tests.network import MemoryInternet, echo

WINDOW = MIB
ID = bytes(range(16))
ME = b"mallory."
NEVER = MAX_OFFSET


def data(offset: int, payload: bytes) -> bytes:
    return pack_header(_wire.DATA, len(payload), offset) + payload


class Script:
    """A stream of the protocol, spoken by hand."""

    def __init__(self, stream: YamuxStream) -> None:
        self.stream = stream
        self.heard: list[Control | Data] = []
        self._parser = Parser()

    async def say(self, *frames: bytes) -> None:
        """All in one write; whether the node still listens does not matter."""
        with suppress(StreamReset, ConnectionLost):
            await self.stream.send_all(b"".join(frames))

    async def hear(self, kind: type[Any] | None = None, *, within: float = 10.0) -> Any:
        """The next frame, or the next of a kind; ``None`` at the stream's end, and if nothing comes in time."""
        with trio.move_on_after(within):
            while True:
                while self.heard:
                    frame = self.heard.pop(0)
                    if kind is None or isinstance(frame, kind):
                        return frame
                try:
                    piece = await self.stream.receive_some()
                except (StreamReset, ConnectionLost, NegotiationError):
                    return None
                if not piece:
                    return None
                self.heard += self._parser.feed(piece)
        return None

    async def refused(self) -> Reset:
        """What the node says as it refuses this path, or ends the session."""
        frame = await self.hear(Reset)
        assert frame is not None
        assert frame.reason
        return frame


class Mallory:
    """A peer with any number of connections.

    Attributes:
        answers: does what the test wants with each stream of the session protocol that the node opens.
    """

    def __init__(self, scene: Scene, number: int) -> None:
        self.scene = scene
        self.identity = Identity.from_seed(number.to_bytes(32, "big"))
        self.ip = f"11.66.{number}.1"
        self.answers: Callable[[YamuxStream], Awaitable[None]] | None = None

    async def connect(self) -> Connection:
        raw = await self.scene.internet.host(self.ip).dial(self.scene.at)
        node = self.scene.node.peer_id
        connection = await upgrade(raw, identity=self.identity, initiator=True, expected=node, config=Config())
        await self.scene.nursery.start(self._run, connection)
        await trio.sleep(2 * DELAY)
        return connection

    async def _run(self, connection: Connection, *, task_status: trio.TaskStatus[None]) -> None:
        await connection.run(lambda stream: self._opened(connection, stream), task_status=task_status)

    def _opened(self, connection: Connection, stream: YamuxStream) -> None:
        self.scene.nursery.start_soon(self._answer, connection, stream)

    async def _answer(self, connection: Connection, stream: YamuxStream) -> None:
        """The node's streams: sessions only, and as the test says."""
        try:
            await connection.accept(stream, [SESSION])
            if self.answers is not None:
                await self.answers(stream)
        except (NegotiationError, StreamReset, ConnectionLost):
            pass

    async def stream(self, connection: Connection | None = None) -> Script:
        """A stream on a connection, or on a new one."""
        return Script(await (connection or await self.connect()).open_stream(SESSION))

    async def session(self, id: bytes = ID, connection: Connection | None = None) -> Script:
        """A session in order."""
        script = await self.stream(connection)
        await script.say(encode_open(Open(NEVER, id, ME)))
        welcome = await script.hear(Welcome)
        assert welcome is not None
        return script


class Scene:
    """A node, its friend with a session, and whoever attacks."""

    def __init__(self, nursery: trio.Nursery, internet: MemoryInternet, node: Node, friend: Node) -> None:
        self.nursery = nursery
        self.internet = internet
        self.node = node
        self.friend = friend
        self.at = addresses.parse(ADDRESS)
        self.talk: OverlayStream
        self.refused: Counter[str] = Counter()
        self.ended: list[SessionEnded] = []
        self.faults: list[PeerMisbehaved] = []
        self.limits: Counter[str] = Counter()
        self.mistakes: list[object] = []
        self._mallories = 0

    def mallory(self) -> Mallory:
        self._mallories += 1
        return Mallory(self, self._mallories)

    async def listen(self) -> None:
        async for event in self.node.events():
            match event:
                case SessionRefused():
                    self.refused[event.reason] += 1
                case SessionEnded():
                    self.ended.append(event)
                case PeerMisbehaved():
                    self.faults.append(event)
                case LimitHit():
                    self.limits[event.reason] += 1
                case InternalError() | HandlerFailed():
                    self.mistakes.append(event)

    async def speak(self) -> float:
        """The friend has a piece of everything sent back. Returns the seconds that took."""
        begun = trio.current_time()
        for piece in (b"good day", bytes(50_000)):
            await self.talk.send_all(piece)
            left = len(piece)
            while left:
                left -= len(await self.talk.receive_some())
        return trio.current_time() - begun

    @property
    def sessions(self) -> list[SessionStream]:
        """The node's with others than the friend."""
        return [each for each in self.node.sessions if each.peer != self.friend.peer_id]


@asynccontextmanager
async def scene(**settings: Any) -> AsyncIterator[Scene]:
    """Before, beside and after an attack the friend is served alike, on its one session."""
    internet = MemoryInternet(delay=DELAY)
    config = Config(
        listen=(ADDRESS,), limits=Limits(max_per_peer=16), session=SessionConfig(**{"window": WINDOW, **settings})
    )
    async with node_and_friend(internet, config) as (node, friend), trio.open_nursery() as nursery:
        found = Scene(nursery, internet, node, friend)
        await node.serve(echo)
        nursery.start_soon(found.listen)
        await trio.testing.wait_all_tasks_blocked()
        found.talk = await friend.connect(f"{ADDRESS}/p2p/{node.peer_id}")
        assert isinstance(found.talk, SessionStream)
        alone = await found.speak()
        [own] = list(node.sessions)
        yield found
        assert await found.speak() == pytest.approx(alone)
        assert own in node.sessions
        assert own.machine.moves == 0
        assert found.mistakes == []
        nursery.cancel_scope.cancel()


# Whose session it is


async def test_another_pair_s_session_looks_like_none(autojump_clock: MockClock) -> None:
    async with scene() as s:
        [theirs] = list(s.node.sessions)
        mallory = s.mallory()
        answers = []
        for id in (theirs.machine.id, bytes(16)):
            script = await mallory.stream()
            await script.say(encode_attach(Attach(0, id, ME, NEVER, 7, True)), data(0, b"give me that"))
            answers.append((await script.refused(), await script.hear()))
        assert answers[0] == answers[1]
        assert answers[0][0].code == Code.UNKNOWN
        assert answers[0][1] is None
        assert s.refused == {"unknown": 2}
        assert s.sessions == []


async def test_a_session_of_the_same_number_as_another_pair_s_is_another_one(autojump_clock: MockClock) -> None:
    async with scene() as s:
        [theirs] = list(s.node.sessions)
        script = await s.mallory().session(theirs.machine.id)
        await script.say(data(0, b"hello"))
        assert await script.hear(tuple) == (0, b"hello")
        await s.speak()
        assert len(s.sessions) == 1


async def test_an_open_that_is_replayed(autojump_clock: MockClock) -> None:
    async with scene() as s:
        mallory = s.mallory()
        script = await mallory.session()
        again = await mallory.stream()
        await again.say(encode_open(Open(NEVER, ID, ME)), data(0, b"again"))
        assert (await again.refused()).code == Code.REFUSED
        assert s.refused == {"replayed": 1}
        await script.say(data(0, b"first"))
        assert await script.hear(tuple) == (0, b"first")


# Offsets, credit and what was never sent


def beyond(offset: int, payload: bytes = b"x") -> tuple[bytes, ...]:
    return (data(offset, payload),)


BROKEN: dict[str, tuple[bytes, ...]] = {
    "a byte beyond what was granted": beyond(WINDOW),
    "far beyond": beyond(2**63),
    "a frame that ends beyond": beyond(WINDOW - 1, b"xx"),
    "beyond the largest offset": beyond(MAX_OFFSET),
    "a gap in every frame": tuple(data(2 * each + 1, b"x") for each in range(MAX_RUNS + 1)),
    "behind its own end": (encode_fin(3), data(3, b"x")),
    "an end beyond what was granted": (encode_fin(WINDOW + 1),),
    "an end before what has come": (data(0, b"xxx"), encode_fin(2)),
    "two ends": (encode_fin(3), encode_fin(4)),
    "acknowledges what was never sent": (encode_ack(1, NEVER, False),),
    "acknowledges an end that was never sent": (data(0, b"x"), encode_ack(2, NEVER, False)),
    "acknowledges the end of all numbers": (encode_ack(2**64 - 1, NEVER, False),),
    "grants more than there can be": (encode_ack(0, 2**64 - 1, False),),
    "a second OPEN": (encode_open(Open(NEVER, ID, ME)),),
    "an ATTACH behind an OPEN": (encode_attach(Attach(0, ID, ME, NEVER, 1, False)),),
    "a WELCOME for nothing": (encode_welcome(Welcome(0, ME, NEVER, False)),),
    "a frame of no kind": (pack_header(0, 0, 0),),
    "a frame of an unknown kind": (pack_header(100, 0, 0),),
    "DATA of nothing": (pack_header(_wire.DATA, 0, 0),),
    "DATA of more than a frame may have": (pack_header(_wire.DATA, MAX_DATA + 1, 0),),
    "DATA of 4 GiB": (pack_header(_wire.DATA, 2**32 - 1, 0),),
    "a control frame that is too large": (pack_header(_wire.ACK, MAX_CONTROL + 1, 0),),
    "a control frame that is too small": (pack_header(_wire.ACK, 8, 0) + bytes(8),),
    "something to pass over that is too large": (pack_header(200, MAX_DATA + 1, 0),),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_who_breaks_a_rule_is_told_and_ended(what: str, autojump_clock: MockClock) -> None:
    async with scene() as s:
        script = await s.mallory().session()
        await script.say(*BROKEN[what])
        assert (await script.refused()).code == Code.PROTOCOL
        assert await script.hear() is None
        await trio.sleep(1)
        assert [(each.code, each.by_peer) for each in s.ended] == [("protocol", False)]
        assert [each.layer for each in s.faults] == [SESSION]
        assert s.sessions == []


@pytest.mark.parametrize("what", ["acknowledges what was never sent", "grants more than there can be"])
async def test_so_is_who_breaks_it_in_an_attach(what: str, autojump_clock: MockClock) -> None:
    async with scene() as s:
        mallory = s.mallory()
        await mallory.session()
        received, limit = (1, NEVER) if "sent" in what else (0, 2**64 - 1)
        script = await mallory.stream()
        await script.say(encode_attach(Attach(received, ID, ME, limit, 1, False)))
        assert (await script.refused()).code == Code.PROTOCOL
        await trio.sleep(1)
        assert [each.code for each in s.ended] == ["protocol"]
        assert len(s.faults) == 1


async def test_what_comes_again_counts_once(autojump_clock: MockClock) -> None:
    """Replayed on the same path, on others, in part, and from behind."""
    async with scene() as s:
        mallory = s.mallory()
        script = await mallory.session()
        words = b"once upon a time"
        await script.say(*(data(0, words) for _ in range(100)), *(data(each, words[each:]) for each in range(16)))
        assert await script.hear(tuple) == (0, words)
        moved = await mallory.stream()
        await moved.say(encode_attach(Attach(len(words), ID, ME, NEVER, 1, False)), *(data(0, words) for _ in range(9)))
        assert await moved.hear(Welcome) is not None
        await moved.say(data(16, b"!"))
        assert await moved.hear(tuple) == (16, b"!")
        [session] = s.sessions
        assert session.machine.received == 17
        assert session.machine.duplicate >= 100 * 16
        assert s.faults == []


async def test_an_acknowledgement_that_goes_back_is_late_and_nothing_else(autojump_clock: MockClock) -> None:
    async with scene() as s:
        script = await s.mallory().session()
        await script.say(data(0, b"hello"))
        assert await script.hear(tuple) == (0, b"hello")
        await script.say(encode_ack(5, NEVER, False), encode_ack(0, 0, False), encode_ack(4, 10, True))
        await script.say(data(5, b"and?"))
        assert await script.hear(tuple) == (5, b"and?")
        assert s.ended == []


# First frames


FIRST: dict[str, bytes] = {
    "DATA": data(0, b"x"),
    "an ACK": encode_ack(0, NEVER, False),
    "a WELCOME": encode_welcome(Welcome(0, ME, NEVER, False)),
    "a FIN": encode_fin(0),
    "garbage": b"\xff" * 100,
    "a frame to pass over": pack_header(200, 0, 0),
    "an OPEN that is too small": pack_header(_wire.OPEN, 23, 0) + bytes(23),
    "an OPEN that is too large": pack_header(_wire.OPEN, MAX_CONTROL + 1, 0),
    "an ATTACH of 4 GiB": pack_header(_wire.ATTACH, 2**32 - 1, 0),
}


@pytest.mark.parametrize("what", FIRST)
async def test_what_is_no_first_frame(what: str, autojump_clock: MockClock) -> None:
    async with scene() as s:
        script = await s.mallory().stream()
        await script.say(FIRST[what])
        assert await script.hear() is None
        await trio.sleep(1)
        assert s.refused == {"protocol": 1}
        assert [each.layer for each in s.faults] == [SESSION]
        assert s.sessions == []


async def test_who_says_nothing_or_stops_in_the_middle(autojump_clock: MockClock) -> None:
    """Behind the negotiation, in a first frame; and in a session in the middle of a frame, which may last as long as
    its connection: what it holds is bounded."""
    async with scene() as s:
        mallory = s.mallory()
        silent = [await mallory.stream() for _ in range(3)]
        await silent[1].say(encode_open(Open(NEVER, ID, ME))[:20])
        await silent[2].say(b"\x02")
        stuck = await s.mallory().session()
        await stuck.say(pack_header(_wire.DATA, MAX_DATA, 0) + bytes(1000))
        begun = trio.current_time()
        for script in silent:
            assert (await script.refused()).code == Code.TIMEOUT
            assert trio.current_time() - begun < 15
        assert s.refused == {"timeout": 3}
        assert len(s.sessions) == 1
        await s.speak()


async def test_first_frames_that_never_come_keep_nobody_out(autojump_clock: MockClock) -> None:
    """A crowd that opens as many streams as it may, and says nothing."""
    async with scene() as s:
        for _ in range(8):
            mallory = s.mallory()
            connection = await mallory.connect()
            for _ in range(50):
                await mallory.stream(connection)
        await trio.sleep(2 * DELAY)
        await s.mallory().session()
        assert len(s.sessions) == 1
        await trio.sleep(30)
        assert 0 < s.refused["timeout"] <= 8 * s.node.sessions.max_streams_per_peer


# How many


async def test_sessions_without_end(autojump_clock: MockClock) -> None:
    """One peer: one for each connection, a few in all. Many peers: `max_sessions`."""
    async with scene(max_sessions=20, max_per_peer=3) as s:
        mallory = s.mallory()
        connection = await mallory.connect()
        await mallory.session(connection=connection)
        for number in range(100):
            script = await mallory.stream(connection)
            await script.say(encode_open(Open(NEVER, number.to_bytes(16, "big"), ME)))
            assert (await script.refused()).code == Code.BUSY
            await script.stream.aclose()
        assert s.limits["one_kaspa_stream"] == 100
        for number in range(1, 6):
            script = await mallory.stream()
            await script.say(encode_open(Open(NEVER, bytes([number]) * 16, ME)))
            assert (await script.hear(Welcome) is not None) is (number < 3)
        assert len(s.sessions) == 3
        for _ in range(20):
            script = await s.mallory().stream()
            await script.say(encode_open(Open(NEVER, ID, ME)))
            await trio.sleep(3 * DELAY)
        assert len(list(s.node.sessions)) == 20
        assert s.limits["session.max_sessions"] == 4


async def test_what_sessions_hold_goes_with_them(autojump_clock: MockClock) -> None:
    """Opened and ended, a thousand times, in every way."""
    async with scene() as s:
        mallory = s.mallory()
        connection = await mallory.connect()

        async def rounds(count: int) -> int:
            for number in range(count):
                script = await mallory.session(number.to_bytes(16, "big"), connection)
                await script.say(data(0, b"hello"))
                match number % 3:
                    case 0:
                        script.stream.reset()
                        other = await mallory.stream(connection)
                        await other.say(encode_attach(Attach(0, number.to_bytes(16, "big"), ME, NEVER, 1, True)))
                        await other.say(_wire.encode_reset(Code.STOPPED, "enough"))
                    case 1:
                        assert await script.hear(tuple) == (0, b"hello")
                        await script.say(encode_ack(5, NEVER, False), encode_fin(5))
                        assert await script.hear(_wire.Fin) is not None
                        await script.say(encode_ack(6, NEVER, False))
                    case 2:
                        await script.say(_wire.encode_reset(Code.STOPPED, "enough"))
                await trio.sleep(0.1)
                script.stream.reset()
            await trio.sleep(10)
            gc.collect()
            return len(gc.get_objects())

        await rounds(30)
        before = await rounds(30)
        after = await rounds(300)
        assert s.sessions == []
        assert after - before < 1000


# What it costs


@asynccontextmanager
async def memory() -> AsyncIterator[Callable[[], int]]:
    """Bytes more than at the beginning."""
    gc.collect()
    tracemalloc.start()
    begun = tracemalloc.get_traced_memory()[0]

    def more() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - begun

    try:
        yield more
    finally:
        tracemalloc.stop()


async def test_a_peer_that_attaches_and_never_reads(autojump_clock: MockClock) -> None:
    """It sends all that it may, has everything sent back, takes nothing of it, and acknowledges nothing."""
    async with scene() as s, memory() as more:
        mallory = s.mallory()
        await mallory.session()
        moved = await mallory.stream()
        await moved.say(encode_attach(Attach(0, ID, ME, NEVER, 1, False)))
        await trio.sleep(1)

        piece = bytes(64 * KIB)
        limit = WINDOW
        for offset in range(0, 8 * WINDOW, len(piece)):
            while offset + len(piece) > limit and (ack := await moved.hear(Ack, within=3)) is not None:
                limit = max(limit, ack.limit)  # it looks what it may send, and no further
            if offset + len(piece) > limit:
                break
            await moved.say(data(offset, piece))
        await trio.sleep(3)
        [session] = s.sessions
        assert session.machine.in_flight <= WINDOW + 64 * KIB
        assert session.machine.unread <= WINDOW
        assert session.machine.in_flight + session.machine.unread > WINDOW, "it has come to the bounds"
        assert more() < 4 * WINDOW
        del session
        await trio.sleep(60)  # nor does it answer when it is asked whether it lives
        assert s.sessions == []
        assert [(each.code, each.by_peer) for each in s.ended] == [("lost", False)]
        assert more() < WINDOW


@pytest.mark.parametrize("size", [1, 40])
async def test_small_pieces_and_gaps_take_no_more_than_the_window(size: int, autojump_clock: MockClock) -> None:
    """A hole at the front keeps everything waiting; all that follows comes byte by byte."""
    async with scene() as s, memory() as more:
        script = await s.mallory().session()
        frames = [data(offset, bytes(size)) for offset in range(1, 30_000, size)]
        for begin in range(0, len(frames), 4096):
            await script.say(*frames[begin : begin + 4096])
        await trio.sleep(5)
        [session] = s.sessions
        assert session.machine.ahead >= 29_000
        del frames
        assert more() < 20 * 30_000
        await script.say(data(0, b"x"))
        await trio.sleep(5)
        assert session.machine.received >= 29_000


async def test_probes_without_end_are_answered_once(autojump_clock: MockClock) -> None:
    """By a peer that does not read."""
    async with scene() as s, memory() as more:
        script = await s.mallory().session()
        for _ in range(5):
            await script.say(_wire.encoded_probe * 5000)
        await trio.sleep(5)
        assert more() < MIB
        acks = 0
        while await script.hear(Ack, within=1) is not None:
            acks += 1
        assert 0 < acks < 100


async def test_a_peer_that_attaches_a_thousand_times(autojump_clock: MockClock) -> None:
    """With turns that grow, that stay, that jump; each move costs the node something, so there is a rate."""
    async with scene() as s:
        mallory = s.mallory()
        connection = await mallory.connect()
        await mallory.session(connection=connection)
        [session] = s.sessions
        begun = trio.current_time()
        most = 0
        for number in range(1000):
            script = await mallory.stream(connection)
            await script.say(encode_attach(Attach(0, ID, ME, NEVER, number, number % 2 == 0)))
            if isinstance(await script.hear(), Reset):
                script.stream.reset()
            most = max(most, len(session.streams))
            if number % 100 == 0:
                await s.speak()
        seconds = trio.current_time() - begun
        assert most <= MAX_PATHS
        assert session.machine.moves <= MOVES_AT_ONCE + seconds / MOVE_INTERVAL
        assert s.refused["rate"] > 500
        assert sum(s.refused.values()) + session.machine.moves == 1000
        assert not session.over


async def test_the_last_of_all_turns(autojump_clock: MockClock) -> None:
    """Whoever takes it can't be overtaken, and harms itself alone: the node's own moves are refused by itself."""
    async with scene() as s:
        mallory = s.mallory()
        first, second = await mallory.connect(), await mallory.connect()
        await mallory.session(connection=first)
        script = await mallory.stream(second)
        await script.say(encode_attach(Attach(0, ID, ME, NEVER, 2**32 - 1, False)))
        assert await script.hear(Welcome) is not None
        second.abort("gone")
        await trio.sleep(40)
        assert s.faults == []


async def test_attaches_that_cross_and_are_never_answered(autojump_clock: MockClock) -> None:
    """The node looks for a path by all connections there are; each answers with a riddle, and attaches itself."""
    async with scene() as s:
        mallory = s.mallory()
        turns = iter(range(1, 1000))
        first = await mallory.connect()
        others = [await mallory.connect() for _ in range(3)]

        async def answer(stream: YamuxStream) -> None:
            script = Script(stream)
            attach = await script.hear(Attach)
            if attach is None:
                return
            match next(turns) % 5:
                case 0:
                    await script.say(_wire.encode_reset(Code.SUPERSEDED, "try again", 2**32 - 1))
                case 1:
                    await script.say(_wire.encode_reset(Code.BUSY, "not now"))
                case 2:
                    await script.say(encode_attach(Attach(0, ID, ME, NEVER, 1, False)))
                case 3:
                    stream.reset()
            for connection in others:
                crossing = await mallory.stream(connection)
                await crossing.say(encode_attach(Attach(0, ID, ME, NEVER, attach.turn, False)))
                crossing.stream.reset()

        mallory.answers = answer
        script = await mallory.session(connection=first)
        await script.say(data(0, b"hello"))
        await trio.sleep(1)
        first.abort("gone")
        await trio.sleep(40)
        assert s.sessions == []
        assert len(s.ended) == 1
        assert s.ended[0].reason


async def test_a_session_of_which_all_paths_are_gone_ends(autojump_clock: MockClock) -> None:
    """Whoever can't be found any more: for as long as `patience`, and nothing is left."""
    async with scene(patience=5.0) as s:
        mallory = s.mallory()
        script = await mallory.session()
        await script.say(data(0, bytes(INITIAL_LIMIT)))
        await trio.sleep(1)
        script.stream.connection.abort("gone")
        await trio.sleep(7)
        assert s.sessions == []
        assert [(each.code, each.by_peer) for each in s.ended] == [("lost", False)]
