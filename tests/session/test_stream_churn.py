"""Sessions on connections that come, hang and go, with moves from both sides at any time: every byte arrives once."""

from __future__ import annotations

import math
import random

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import KIB
from kas_libp2p.events import InternalError, PeerMisbehaved, SessionEnded
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection

from .sides import Side, Sides, configured, sides

PATTERN = random.Random(7).randbytes(1 << 20)
SECONDS = 15.0


class Churn:
    """What befalls two sides, drawn at random.

    Attributes:
        did: how often what was done.
    """

    def __init__(self, s: Sides, ends: tuple[SessionStream, SessionStream], dice: random.Random) -> None:
        self.s = s
        self.ends = ends
        self.dice = dice
        self.did: dict[str, int] = {}

    async def run(self) -> None:
        until = trio.current_time() + SECONDS
        while trio.current_time() < until:
            await trio.sleep(self.dice.expovariate(4.0))
            act = self.dice.choice(
                [self.connect, self.connect, self.abort, self.close, self.hang, self.move, self.cross]
            )
            self.did[act.__name__] = self.did.get(act.__name__, 0) + 1
            await act()
        for connection in [*self.s.a.connections, *self.s.b.connections]:  # what hangs is noticed in the end
            connection.abort()

    async def connect(self) -> None:
        if len(self.s.a.connections) < 3:
            self.s.delay = self.dice.choice([0.0, 0.01, 0.1, 0.4])
            await self.s.connect()

    def _some(self, side: Side) -> Connection | None:
        return self.dice.choice(side.connections) if side.connections else None

    async def abort(self) -> None:
        side = self.dice.choice([self.s.a, self.s.b])
        if (connection := self._some(side)) is not None:
            connection.abort("cut by the test")

    async def close(self) -> None:
        if (connection := self._some(self.s.a)) is not None:
            await connection.aclose("closed by the test")

    async def hang(self) -> None:
        if self.dice.random() < 0.3:
            for raw in self.dice.choice(self.s.raws):
                raw._in.delay = raw._out.delay = math.inf

    async def move(self) -> None:
        which = self.dice.randrange(2)
        await self._attach(which)

    async def cross(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._attach, 0)
            nursery.start_soon(self._attach, 1)

    async def _attach(self, which: int) -> None:
        side, session = (self.s.a, self.s.b)[which], self.ends[which]
        connection = self._some(side)
        if connection is not None and session.machine.established and not session.over:
            await side.sessions._attach(session, connection, "by chance")


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, 300))]
)
async def test_every_byte_arrives_once(seed: int, autojump_clock: MockClock) -> None:
    dice = random.Random(seed)
    config = configured(window=dice.choice([256, 512, 4096]) * KIB, patience=1000.0)
    async with sides(a=config) as s:
        ends = await s.session()
        s.a.reach = s.connect
        s.b.reach = s.connect_back

        async def write(stream: SessionStream) -> None:
            at, pace = 0, random.Random(seed)
            until = trio.current_time() + SECONDS
            while trio.current_time() < until:
                size = pace.choice([1, 20, 3000, 70_000, 300_000])
                for start in range(at, at + size, len(PATTERN)):
                    first = start % len(PATTERN)
                    piece = (PATTERN + PATTERN)[first : first + min(size, len(PATTERN))]
                    await stream.send_all(piece)
                at += size
                await trio.sleep(pace.expovariate(8.0))
            await stream.send_eof()
            wrote[stream] = at

        async def read(stream: SessionStream) -> None:
            at = 0
            while data := await stream.receive_some():
                first = at % len(PATTERN)
                assert data == (PATTERN + PATTERN)[first : first + len(data)]
                at += len(data)
            got[stream] = at

        wrote: dict[SessionStream, int] = {}
        got: dict[SessionStream, int] = {}
        churn = Churn(s, ends, dice)
        with trio.fail_after(300):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(churn.run)
                for end in ends:
                    nursery.start_soon(write, end)
                    nursery.start_soon(read, end)
        assert got[ends[0]] == wrote[ends[1]] > 0
        assert got[ends[1]] == wrote[ends[0]] > 0
        assert ends[0].machine.moves > 1
        await trio.sleep(20)
        for side in (s.a, s.b):
            assert not side.bus.of(InternalError)
            assert not side.bus.of(PeerMisbehaved)
            assert [each.code for each in side.bus.of(SessionEnded)] == ["ended"]
            assert not len(side.sessions)
            for connection in side.connections:
                assert not connection.streams, "nothing is left on any connection"
