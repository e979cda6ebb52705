"""A pair of byte pipes in memory, for tests: deterministic, on trio's clock, with delay and small socket buffers."""

from __future__ import annotations

from collections import deque

import trio


class _Wire:
    """One direction.

    Attributes:
        transferred: bytes that were taken in.
    """

    def __init__(self, delay: float, capacity: int) -> None:
        self.delay = delay
        self.capacity = capacity
        self.transferred = 0
        self.size = 0
        self.chunks: deque[tuple[float, bytes]] = deque()  # when it arrives, and what; b"" is the end
        self.broken = False
        self.lot = trio.lowlevel.ParkingLot()

    def room(self) -> int:
        return self.capacity - self.size

    def put(self, data: bytes) -> None:
        self.chunks.append((trio.current_time() + self.delay, data))
        self.size += len(data)
        self.transferred += len(data)
        self.lot.unpark_all()

    def delivered(self) -> int:
        now = trio.current_time()
        return self.transferred - sum(len(data) for at, data in self.chunks if at > now)

    def arrived(self) -> bool:
        return bool(self.chunks) and self.chunks[0][0] <= trio.current_time()

    def break_(self) -> None:
        self.broken = True
        self.lot.unpark_all()


class MemoryRaw:
    """One end of a pair: a `kas_libp2p.transport.raw.RawConnection`.

    Attributes:
        largest_read: bytes that one read gives at most; small values cut everything to pieces.
        writes: the size of each write, in order.
        closed: how it was closed here, ``""``, ``"closed"`` or ``"aborted"``.
    """

    def __init__(self, incoming: _Wire, outgoing: _Wire, local: str, remote: str) -> None:
        self.local_address = local
        self.remote_address = remote
        self.largest_read = 1 << 30
        self.writes: list[int] = []
        self.closed = ""
        self._in = incoming
        self._out = outgoing
        self._eof_sent = False

    @property
    def received(self) -> int:
        return self._in.transferred

    @property
    def sent(self) -> int:
        return self._out.transferred

    def delivered(self) -> int:
        return self._out.delivered()

    def undelivered(self) -> int:
        return self._out.transferred - self._out.delivered()

    def _check(self, wire: _Wire) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this pipe was closed here")
        if wire.broken:
            raise trio.BrokenResourceError("connection reset by peer")

    def receive_nowait(self, buffer: memoryview) -> int | None:
        self._check(self._in)
        wire = self._in
        if not wire.arrived():
            return None
        count = 0
        while wire.arrived() and count < len(buffer):
            at, data = wire.chunks[0]
            if not data:
                break
            piece = data[: min(len(buffer) - count, self.largest_read - count)]
            if not piece:
                break
            buffer[count : count + len(piece)] = piece
            count += len(piece)
            if len(piece) == len(data):
                wire.chunks.popleft()
            else:
                wire.chunks[0] = (at, data[len(piece) :])
        wire.size -= count
        if count:
            wire.lot.unpark_all()
        return count

    async def wait_readable(self) -> None:
        wire = self._in
        await trio.lowlevel.checkpoint()
        while True:
            self._check(wire)
            if wire.arrived():
                return
            if wire.chunks:
                with trio.move_on_at(wire.chunks[0][0]):
                    await wire.lot.park()
            else:
                await wire.lot.park()

    async def receive_into(self, buffer: memoryview) -> int:
        while (count := self.receive_nowait(buffer)) is None:
            await self.wait_readable()
        return count

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        self._check(self._out)
        if self._eof_sent:
            raise trio.ClosedResourceError("the sending direction was closed here")
        count = min(len(data), self._out.room())
        if count:
            self._out.put(bytes(data[:count]))
            self.writes.append(count)
        return count

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while True:
            self._check(self._out)
            if self._out.room() > 0:
                return
            await self._out.lot.park()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        await trio.lowlevel.checkpoint()
        while view:
            count = self.send_nowait(view)
            view = view[count:]
            if view:
                await self.wait_writable()

    def send_eof(self) -> None:
        if not self._eof_sent and not self.closed and not self._out.broken:
            self._eof_sent = True
            self._out.put(b"")

    async def aclose(self) -> None:
        self.send_eof()
        self._close("closed")
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        if not self.closed:
            self._out.break_()
        self._close("aborted")

    def _close(self, how: str) -> None:
        self.closed = self.closed or how
        self._in.lot.unpark_all()
        self._out.lot.unpark_all()


def memory_pair(*, delay: float = 0.0, capacity: int = 1 << 20) -> tuple[MemoryRaw, MemoryRaw]:
    """Two ends.

    Args:
        delay: seconds from a write to its arrival, on trio's clock.
        capacity: bytes that one direction holds before a write has to wait.
    """
    there, back = _Wire(delay, capacity), _Wire(delay, capacity)
    addresses = "/ip4/127.0.0.1/tcp/1001", "/ip4/127.0.0.1/tcp/1002"
    return MemoryRaw(back, there, *addresses), MemoryRaw(there, back, *addresses[::-1])
