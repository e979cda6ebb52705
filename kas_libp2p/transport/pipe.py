"""A circuit as a byte pipe: one stream through a relay, on which an upgrade works as it does on a TCP connection.

The pipe has no task and no buffer of its own. It reads and writes the stream's state in the task that asks, so what the
relay's connection brought is copied once, to where the connection on the circuit opens it, and what that one seals is
queued for the relay's connection and leaves in the same turn. That connection, too, reads in the turn of the relay's
reader (`CircuitPipe.serve`): a task of its own would cost a turn of the scheduler per read.

A relay may allow a circuit so many bytes and so many seconds. It ends the circuit then, without a word, so the pipe
counts along: what is left is known before it is used up, and an end in that instant is told for what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from multiaddr import Multiaddr

from kas_libp2p.config import KIB
from kas_libp2p.errors import CircuitEnded, ConnectionLost, StreamReset
from kas_libp2p.metadata import CircuitLimits, PeerId
from kas_libp2p.transport.yamux.stream import YamuxStream
from kas_libp2p.units import short, size

NEARLY_BYTES = 512 * KIB
"""Bytes below the limit at which a reset still counts as the limit's doing: two windows may be under way when it bites,
which the relay has counted and we have not."""
NEARLY_SECONDS = 2.0
"""Seconds below the limit at which it does: the relay's clock started earlier than ours, by half a second at most, and
ticks."""


class CircuitPipe:
    """A `kas_libp2p.transport.raw.RawConnection` made of a stream to or from a relay, which belongs to the pipe then.

    Args:
        stream: agreed on, and past the messages that made the circuit.
        relay: who carries it.
        max_bytes: bytes that it may carry, both directions together; ``None``: no limit.
        max_seconds: seconds that it may last; ``None``: no limit.
        observed: where the relay sees the other end.

    Attributes:
        relay, observed: as given.
        local_address: our end of the connection with the relay.
        remote_address: the relay's address, and that it leads on from there: ``/…/p2p/RELAY/p2p-circuit``.
        ended: how the relay has ended it; ``None`` if it has not.
    """

    __slots__ = (
        "_before",
        "_connection",
        "_mark",
        "_max_bytes",
        "_max_seconds",
        "_opened_at",
        "_reader",
        "_sent",
        "_sent_before",
        "_state",
        "_stream",
        "_writer",
        "ended",
        "local_address",
        "observed",
        "relay",
        "remote_address",
    )

    def __init__(
        self,
        stream: YamuxStream,
        relay: PeerId,
        *,
        max_bytes: int | None = None,
        max_seconds: float | None = None,
        observed: Multiaddr | None = None,
    ) -> None:
        self._stream = stream
        self._state = stream._state
        self._connection = stream.connection
        self.relay = relay
        self.observed = observed
        self.local_address: str = stream.connection.local_address
        self.remote_address: str = f"{stream.connection.remote_address}/p2p/{relay}/p2p-circuit"
        self.ended: CircuitEnded | None = None
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._opened_at = trio.current_time()
        self._before = stream.received - stream.unread + stream.sent + stream.unsent
        self._sent_before = stream.sent + stream.unsent
        self._reader: Callable[[], None]
        self._writer: Callable[[], None]
        self._sent = -1
        self._mark = 0

    def __repr__(self) -> str:
        return f"<circuit on {self._stream!r}>"

    @property
    def closed(self) -> bool:
        """Whether it carries nothing any more, whoever ended it."""
        return self._stream._ended()

    @property
    def limits(self) -> CircuitLimits:
        """What the relay allows it, and what is left of that."""
        stream = self._stream
        used = stream.received + stream.sent - self._before
        left = None if self._max_bytes is None else max(0, self._max_bytes - used)
        age = trio.current_time() - self._opened_at
        return CircuitLimits(
            max_bytes=self._max_bytes,
            max_seconds=self._max_seconds,
            bytes_left=left,
            seconds_left=None if self._max_seconds is None else max(0.0, self._max_seconds - age),
        )

    @property
    def unsent(self) -> int:
        """Bytes that have still to leave for the relay, and are not counted as used yet."""
        return self._state.queued

    @property
    def sent(self) -> int:
        """Bytes sent by it; they count for `limits`."""
        return max(0, self._stream.sent - self._sent_before)

    # Reading

    def receive_nowait(self, buffer: memoryview) -> int | None:
        """Read what is there; see `RawConnection`."""
        state = self._state
        chunks = state.chunks
        if not chunks:
            stream = self._stream
            if stream._closed or state.reset is not None or (stream._lost is not None and not state.eof):
                raise self._told(stream._read_error())
            return 0 if state.eof else None
        room = len(buffer)
        filled = 0
        while chunks and filled < room:
            chunk = memoryview(chunks[0])[state.offset :]
            count = min(len(chunk), room - filled)
            buffer[filled : filled + count] = chunk[:count]
            filled += count
            if count == len(chunk):
                chunks.popleft()
                state.offset = 0
            else:
                state.offset += count
        state.unread -= filled
        if state.unread + state.allowed <= state.grant_at:
            self._connection.consumed(state)
        return filled

    async def wait_readable(self) -> None:
        """Wait for data or the end; see `RawConnection`."""
        await self._stream.wait_unread()

    def serve(self, reader: Callable[[], None], writer: Callable[[], None]) -> None:
        """Have the connection on the circuit read and write in the turns of the one with the relay.

        Args:
            reader: called whenever there may be something to read; must not wait nor raise. `wait_readable` is not
                called any more.
            writer: called when there is room again where there was none, while the relay's connection is flushing. The
                same goes for it.
        """
        self._reader = reader
        self._writer = writer
        self._stream.tap(self)

    def changed(self) -> None:
        """Something came in, or the stream ended; see `Tap`."""
        self._reader()

    def drained(self) -> None:
        """There is room; see `Tap`."""
        self._writer()

    async def receive_into(self, buffer: memoryview) -> int:
        """Read at least one byte; see `RawConnection`."""
        await trio.lowlevel.checkpoint()
        while (count := self.receive_nowait(buffer)) is None:
            await self.wait_readable()
        return count

    # Writing

    @property
    def full(self) -> bool:
        """Whether there is no room for anything now."""
        return self._state.queued >= self._connection.send_high_water

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Queue what there is room for; see `RawConnection`."""
        stream, state, connection = self._stream, self._state, self._connection
        if stream._ended() or state.fin_wanted:
            raise self._told(stream._write_error())
        if state.queued >= connection.send_high_water:
            return 0
        connection.write(state, bytes(data))
        return len(data)

    async def wait_writable(self) -> None:
        """Wait for room; see `RawConnection`."""
        try:
            await self._stream.wait_send_all_might_not_block()
        except (ConnectionLost, StreamReset, trio.ClosedResourceError) as error:
            raise self._told(error) from None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; see `RawConnection`."""
        view = memoryview(data)
        await trio.lowlevel.checkpoint()
        while view:
            view = view[self.send_nowait(view) :]
            if view:
                await self.wait_writable()

    def delivered(self) -> int:
        """Bytes that have reached the relay's host, up to the last one of this circuit; see `RawConnection`.

        What other circuits have on the relay's connection moves it no further.
        """
        connection = self._connection
        if self._stream.sent != self._sent:
            self._sent = self._stream.sent
            self._mark = connection.sent + connection.sealed
        return min(connection.delivered, self._mark)

    def undelivered(self) -> int:
        """Bytes of this circuit that have not reached the relay's host; see `RawConnection`."""
        delivered = self.delivered()  # which brings the mark up to date
        return max(0, self._mark - delivered) + self._state.queued if not self.closed else 0

    # Ending

    def send_eof(self) -> None:
        """End our direction; see `RawConnection`."""
        if not self._stream._ended():
            self._connection.finish(self._state)

    async def aclose(self) -> None:
        """End it in order; see `RawConnection`."""
        await self._stream.aclose()

    def abort(self) -> None:
        """Reset the stream; see `RawConnection`."""
        self._stream.reset()

    def _told(self, error: Exception) -> Exception:
        """The same error in words for whoever does not know that there is a relay."""
        if isinstance(error, ConnectionLost):
            return ConnectionLost(f"the relay {short(self.relay)} is gone: {error}")
        if isinstance(error, StreamReset) and error.by_peer:
            return self.end()
        return error

    @property
    def used_up(self) -> bool:
        """Whether nothing is left of one of its limits."""
        limits = self.limits
        return limits.bytes_left == 0 or limits.seconds_left == 0

    def end(self) -> CircuitEnded:
        """The relay has ended it: which of its limits is used up, or nearly so. Remembered as `ended`."""
        words, limit = f"the relay {short(self.relay)} ended the circuit", ""
        limits = self.limits
        whole, left = limits.max_bytes, limits.bytes_left
        if limits.seconds_left is not None and limits.seconds_left <= NEARLY_SECONDS:
            words, limit = f"{words}: its {limits.max_seconds:g} s are over", "max_seconds"
        elif whole is not None and left is not None and left <= min(NEARLY_BYTES, whole // 2):
            words, limit = f"{words}: its {size(whole)} are used up", "max_bytes"
        self.ended = CircuitEnded(
            words, relay=self.relay, limit=limit, bytes_left=left, seconds_left=limits.seconds_left
        )
        return self.ended
