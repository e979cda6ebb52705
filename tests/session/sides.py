"""Two sides that keep sessions with each other over connections in memory, without nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from kas_libp2p.config import Config
from kas_libp2p.errors import ConnectionLost, KasError, StreamReset
from kas_libp2p.metadata import SESSION, PeerId
from kas_libp2p.session.service import Sessions
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw, memory_pair
from tests.network import RecordingBus, eventually
from tests.transport.pairs import upgraded


class Side:
    """One side.

    Attributes:
        sessions: its sessions.
        bus: what it tells.
        connections: those that are up, oldest first.
        inbound: sessions that the other side opened; left open until the test is over.
        proven: numbers of the connections that have shown that they last.
        reach: makes a connection, if it can.
    """

    def __init__(self, nursery: trio.Nursery, config: Config) -> None:
        self.bus = RecordingBus()
        self.connections: list[Connection] = []
        self.inbound: list[SessionStream] = []
        self.proven: set[int] = set()
        self.handler: Callable[[SessionStream], Awaitable[None]] = self._keep
        self.reach: Callable[[], Awaitable[Connection]] | None = None
        self.asked = 0
        self._nursery = nursery
        self.sessions = Sessions(
            config,
            self.bus,
            connections=self._usable,
            reach=self._reach,
            proven=lambda connection: connection.number in self.proven,
            surplus=lambda _: False,
        )
        self.sessions.handler = self._handle

    def _usable(self, peer: PeerId) -> Sequence[Connection]:
        return [each for each in self.connections if each.peer == peer and not each.closing]

    async def _reach(self, peer: PeerId, beside: bool) -> Connection:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.reach is None:
            raise ConnectionLost("there is no way")
        return await self.reach()

    async def _handle(self, session: SessionStream) -> None:
        await self.handler(session)

    async def _keep(self, session: SessionStream) -> None:
        self.inbound.append(session)
        await trio.sleep_forever()

    async def carry(self, connection: Connection, task_status: trio.TaskStatus[None]) -> None:
        """Run a connection, as a swarm does."""
        self.connections.append(connection)
        self.sessions.connected(connection)
        try:
            await connection.run(lambda stream: self._nursery.start_soon(self._serve, stream), task_status=task_status)
        finally:
            self.connections.remove(connection)
            self.sessions.disconnected(connection)

    async def _serve(self, stream: YamuxStream) -> None:
        try:
            await stream.connection.accept(stream, [SESSION])
            await self.sessions.handle(stream)
        except (KasError, StreamReset):
            stream.reset()

    async def open(self) -> SessionStream:
        """Open a session on the newest connection."""
        return self.sessions.open(await self.connections[-1].open_stream(SESSION))


class Sides:
    """Both.

    Attributes:
        a, b: who dials, and who is dialed.
        raws: both ends of each connection.
    """

    def __init__(self, nursery: trio.Nursery, delay: float, a: Config, b: Config) -> None:
        self.a = Side(nursery, a)
        self.b = Side(nursery, b)
        self.raws: list[tuple[MemoryRaw, MemoryRaw]] = []
        self.delay = delay
        self._nursery = nursery

    async def connect(self) -> Connection:
        """One more connection. Returns a's end."""
        raws = memory_pair(delay=self.delay)
        self.raws.append(raws)
        ends = await upgraded(raws)
        for side, connection in zip((self.a, self.b), ends, strict=True):
            await self._nursery.start(side.carry, connection)
        return ends[0]

    async def connect_back(self) -> Connection:
        """The same. Returns b's end."""
        await self.connect()
        return self.b.connections[-1]

    async def session(self) -> tuple[SessionStream, SessionStream]:
        """A session that a opened, and b's end of it."""
        ours = await self.a.open()
        before = len(self.b.inbound)
        await eventually(lambda: len(self.b.inbound) > before)
        return ours, self.b.inbound[-1]


@asynccontextmanager
async def sides(*, delay: float = 0.01, a: Config | None = None, b: Config | None = None) -> AsyncIterator[Sides]:
    """Two sides with one connection."""
    # A test that waits for what never comes would let the clock jump from ping to ping for ever.
    with trio.fail_after(20_000):
        async with trio.open_nursery() as nursery:
            both = Sides(nursery, delay, a or Config(), b or a or Config())
            for side in (both.a, both.b):
                await nursery.start(side.sessions.run)
            await both.connect()
            yield both
            nursery.cancel_scope.cancel()


def configured(**session: float) -> Config:
    """With these settings of sessions."""
    return Config(session=replace(Config().session, **session))
