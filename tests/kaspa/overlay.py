"""Overlay streams in memory, on trio's clock: with a window, a rate, a delay, and a path that can be made to hang."""

from __future__ import annotations

from collections import deque

import trio

from kas_libp2p.errors import SessionLost, StreamReset
from kas_libp2p.metadata import DIRECT, Dialect, Direction, OverlayStream, PeerId, TransportMetadata

ALICE = PeerId("12D3KooWAlice")
BOB = PeerId("12D3KooWBob")


class _Way:
    """One direction."""

    def __init__(self, window: int, delay: float, rate: float | None) -> None:
        self.window = window
        self.delay = delay
        self.rate = rate
        self.hung = False
        self.reset_by: MemoryOverlay | None = None
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.total = 0
        self.arrived = 0
        self.free_at = 0.0
        self.eof = False
        self.lot = trio.lowlevel.ParkingLot()

    def put(self, data: bytes) -> None:
        now = trio.current_time()
        if self.rate:
            self.free_at = max(now, self.free_at) + len(data) / self.rate
        self.chunks.append((max(now, self.free_at) + self.delay, data))
        self.size += len(data)
        self.total += len(data)
        self.lot.unpark_all()


class MemoryOverlay(OverlayStream):
    """One end. ``largest_read`` cuts what arrives to pieces.

    Attributes:
        was_reset: whether this end was reset, from here.
        watched: whether it finds out by itself that its path hangs, as a session does.
        gap_count: how often it was without a path, if it is one.
        lost: why it is over, if it is one.
    """

    def __init__(self, incoming: _Way, outgoing: _Way, metadata: TransportMetadata, watched: bool = False) -> None:
        self.watched = watched
        self.gap_count = 0
        self.lost: SessionLost | None = None
        self.incoming = incoming
        self.outgoing = outgoing
        self._metadata = metadata
        self.largest_read = 65536
        self.closed = False
        self.was_reset = False

    @property
    def metadata(self) -> TransportMetadata:
        return self._metadata

    @property
    def delivered(self) -> int:
        way, now = self.outgoing, trio.current_time()
        if not way.hung:
            way.arrived = way.total - sum(len(data) for at, data in way.chunks if at > now)
        return way.arrived

    @property
    def watches_paths(self) -> bool:
        return self.watched

    @property
    def gaps(self) -> int:
        return self.gap_count

    @property
    def over(self) -> bool:
        ended = self.closed or self.incoming.eof or self.incoming.reset_by is not None
        return self.lost is not None or (ended and not self.watched)

    def lose(self, code: str, reason: str, *, by_peer: bool = False) -> None:
        """End it as a session ends. Whoever waits finds out in its next turn."""
        self.lost = SessionLost(reason, code=code, by_peer=by_peer)
        for way in (self.incoming, self.outgoing):
            way.lot.unpark_all()

    def _check(self, way: _Way) -> None:
        if self.lost is not None:
            raise SessionLost(str(self.lost), code=self.lost.code, by_peer=self.lost.by_peer)
        if self.closed:
            raise trio.ClosedResourceError("closed here")
        if way.reset_by is self or (way.reset_by is not None and not way.hung):
            raise StreamReset(by_peer=way.reset_by is not self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        way, view = self.outgoing, memoryview(data)
        while True:
            self._check(way)
            if way.eof:
                raise trio.ClosedResourceError("ended here")
            room = way.window - way.size
            if view and room > 0:
                step = room if way.rate is None else min(room, max(1, int(way.rate * 0.01)))
                way.put(bytes(view[:step]))
                view = view[step:]
            if not view:
                return
            if way.window - way.size <= 0:
                await way.lot.park()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check(self.outgoing)
        self.outgoing.eof = True
        self.outgoing.lot.unpark_all()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        way = self.incoming
        while True:
            self._check(way)
            if way.chunks and not way.hung:
                at, data = way.chunks[0]
                wait = at - trio.current_time()
                if wait <= 0:
                    count = min(self.largest_read, len(data), max_bytes or len(data))
                    if count < len(data):
                        way.chunks[0] = (at, data[count:])
                    else:
                        way.chunks.popleft()
                    way.size -= count
                    way.lot.unpark_all()
                    return data[:count]
                with trio.move_on_after(wait):
                    await way.lot.park()
                continue
            if way.eof and not way.hung:
                return b""
            await way.lot.park()

    def reset(self, code: int = 0) -> None:
        self.was_reset = True
        for way in (self.incoming, self.outgoing):
            if way.reset_by is None or way.hung:
                way.reset_by = self
            way.lot.unpark_all()

    async def aclose(self) -> None:
        if not self.closed and self.outgoing.reset_by is None:
            self.outgoing.eof = True
        self.closed = True
        for way in (self.incoming, self.outgoing):
            way.lot.unpark_all()
        await trio.lowlevel.checkpoint()

    def hang(self) -> None:
        """From here on nothing arrives on either side any more."""
        self.incoming.hung = self.outgoing.hung = True


def overlay_pair(
    *,
    window: int = 256 * 1024,
    delay: float = 0.0,
    rate: float | None = None,
    protocol: str = Dialect.MESSAGES,
    opener: PeerId = ALICE,
    acceptor: PeerId = BOB,
    watched: bool = False,
) -> tuple[MemoryOverlay, MemoryOverlay]:
    """The opener's end and the acceptor's.

    Args:
        window: bytes that may be under way in one direction.
        delay: seconds one way.
        rate: bytes per second; ``None`` for as fast as can be.
        watched: see `MemoryOverlay`.
    """
    there, back = _Way(window, delay, rate), _Way(window, delay, rate)

    def metadata(peer: PeerId, direction: Direction) -> TransportMetadata:
        return TransportMetadata(
            peer=peer,
            path=DIRECT,
            direction=direction,
            initiator=direction is Direction.OUTBOUND,
            protocol=protocol,
            local_address="/memory/1",
            remote_address="/memory/2",
            connection_opened_at=trio.current_time(),
            stream_opened_at=trio.current_time(),
        )

    return (
        MemoryOverlay(back, there, metadata(acceptor, Direction.OUTBOUND), watched),
        MemoryOverlay(there, back, metadata(opener, Direction.INBOUND), watched),
    )
