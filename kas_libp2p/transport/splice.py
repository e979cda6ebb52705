"""Two streams joined into a circuit: what comes on the one leaves on the other.

How bytes pass
    No task carries them. When the reader of a connection finds something for one of the two streams, it calls the
    splice in its own turn. The pieces are moved to the queue of the other stream as they are, and leave as everything
    that is written does: at once on an idle line, else with what its flusher gathers.

How a slow side slows the other
    What was moved still counts as unread on the stream that it came from, until it has left. So its sender is granted
    more only as the other side takes it, and a circuit never holds more than the two windows of its streams. They grow
    as everybody's, where there is a rate to no more than it can use: what a relay holds for somebody who stops reading
    costs the relay. The queue's mark is set to where the next grant is due: one call per half window.

    A side that takes nothing for `STALLED` seconds ends the circuit. And what all circuits hold together is bounded
    (`Memory`): beyond that, the one ends for which most has waited for longest.

How it is limited
    In bytes, to the byte: what goes beyond is not passed on, and ends the circuit. In seconds, idle or not. In bytes
    per second and direction, by a token bucket; what has no token waits, unread, and the task that owns the circuit
    wakes to pass it on.

How it ends
    In order, when both ends have been passed on. A reset, or a lost connection, on one side resets the other; but who
    has said all and leaves is heard to the end.
"""

from __future__ import annotations

import sys
from enum import StrEnum

import trio

from kas_libp2p.config import KIB
from kas_libp2p.errors import StreamCode
from kas_libp2p.transport.waiter import Waiter
from kas_libp2p.transport.yamux._machine import INITIAL_WINDOW
from kas_libp2p.transport.yamux.stream import YamuxStream

BURST_SECONDS = 1.0
"""A circuit that was idle may pass on so many seconds' worth of its rate at once: a block of Kaspa does not wait."""
STEP_SECONDS = 0.05
"""A circuit that has used up its rate waits for so many seconds' worth: small enough for windows to stay small."""
WINDOW_SECONDS = 0.25
"""So many seconds' worth of its rate is what its windows may grow to: a round trip to a peer at the other end of the
world."""
MIN_STEP = 4 * KIB
"""Bytes that are waited for at least."""
STALLED = 60.0
"""Seconds after which a side that takes nothing is given up: an end of a circuit reads all the time, whatever is done
with what it reads, and one whose line is dead is noticed by the keepalive before that. Found out at the latest after
twice as long. A side that takes less than a first window in that time, 4 kB/s, carries no Kaspa traffic."""
SMALL = 4 * KIB
"""Bytes of a piece up to which pieces that wait are joined: a window full of single bytes would take fifty times its
size."""
UNLIMITED = sys.maxsize


class End(StrEnum):
    """Why a circuit ended; limits by their names in the configuration."""

    CLOSED = "closed"
    """By both sides, in order."""
    SOURCE_RESET = "source_reset"
    DESTINATION_RESET = "destination_reset"
    SOURCE_LOST = "source_lost"
    """The connection with the source ended."""
    DESTINATION_LOST = "destination_lost"
    BYTES = "max_circuit_bytes"
    SECONDS = "max_circuit_seconds"
    MEMORY = "max_circuit_memory"
    """The circuits together held too much, and this one most of it for longest."""
    SOURCE_STALLED = "source_stalled"
    """The source took nothing for too long."""
    DESTINATION_STALLED = "destination_stalled"
    RELAY = "relay"
    """It was ended here."""


class Memory:
    """What the circuits of a relay hold together for sides that do not read.

    Args:
        limit: bytes; beyond it circuits are ended.

    Attributes:
        held: bytes, now.
    """

    __slots__ = ("_limit", "_splices", "held")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._splices: dict[Splice, None] = {}
        self.held = 0

    def count(self, splice: Splice, more: int) -> None:
        """A circuit holds so much more, or less. Those end that have to."""
        self._splices[splice] = None
        self.held += more
        if more > 0 and self.held > self._limit:
            now = trio.current_time()
            while self.held > self._limit:
                worst = max(self._splices, key=lambda each: each.burden(now))
                worst._finish(End.MEMORY, StreamCode.RESOURCES)

    def forget(self, splice: Splice) -> None:
        """A circuit has ended."""
        if splice in self._splices:
            del self._splices[splice]
            self.held -= splice.held


class Splice:
    """A circuit between two streams, which belong to it from now on.

    Args:
        source: the stream of the side that asked for the circuit.
        destination: the stream of the other one.
        max_bytes: both directions together; 0: no limit.
        max_seconds: from now on; 0: no limit.
        max_rate: bytes per second in each direction; 0: no limit.
        memory: of all circuits; one of its own without a limit if left out.

    Attributes:
        opened_at: seconds on trio's clock.
        end: why it ended; ``None`` while it has not.
    """

    __slots__ = (
        "_back",
        "_deadline",
        "_destination",
        "_forth",
        "_left",
        "_memory",
        "_source",
        "_timer",
        "_waiter",
        "end",
        "opened_at",
    )

    def __init__(
        self,
        source: YamuxStream,
        destination: YamuxStream,
        *,
        max_bytes: int = 0,
        max_seconds: float = 0.0,
        max_rate: int = 0,
        memory: Memory | None = None,
    ) -> None:
        self.opened_at = trio.current_time()
        self.end: End | None = None
        self._source = source
        self._destination = destination
        self._left = max_bytes or UNLIMITED
        self._deadline = self.opened_at + max_seconds if max_seconds else float("inf")
        self._memory = memory if memory is not None else Memory(UNLIMITED)
        self._timer: trio.CancelScope | None = None
        self._waiter = Waiter()
        ends = (End.SOURCE_RESET, End.SOURCE_LOST, End.SOURCE_STALLED)
        self._forth = _Way(self, source, destination, max_rate, ends)
        ends = (End.DESTINATION_RESET, End.DESTINATION_LOST, End.DESTINATION_STALLED)
        self._back = _Way(self, destination, source, max_rate, ends)
        self._forth.other, self._back.other = self._back, self._forth

    @property
    def forth(self) -> int:
        """Bytes that came from the source."""
        return self._forth.carried

    @property
    def back(self) -> int:
        """Bytes that came from the destination."""
        return self._back.carried

    @property
    def held(self) -> int:
        """Bytes that wait here, in both directions."""
        return self._forth.held + self._back.held

    def burden(self, now: float) -> tuple[float, int]:
        """How much has waited for how long, in byte seconds; and how much waits."""
        return max(way.burden(now) for way in (self._forth, self._back)), self.held

    async def run(self) -> End:
        """Carry the circuit to its end, whatever that is. If cancelled, both streams are reset. Runs once."""
        ways = (self._forth, self._back)
        for way in ways:
            way.source.tap(way)
        try:
            for way in ways:
                way.changed()
            while self.end is None:
                due = min(self._deadline, *(min(way.resume_at, way.look_at) for way in ways))
                with trio.CancelScope(deadline=due) as self._timer:
                    await self._waiter.wait()
                now = trio.current_time()
                if now >= self._deadline:
                    self._finish(End.SECONDS, StreamCode.RESOURCES)
                for way in ways:
                    if way.look_at <= now:
                        way.look(now)
                    if way.resume_at <= now:
                        way.changed()
        finally:
            self._finish(End.RELAY)
        await trio.lowlevel.checkpoint()
        return self.end

    def _finish(self, end: End, code: int = 0) -> None:
        """It is over: tell whoever has not heard of it."""
        if self.end is not None:
            return
        self.end = end
        self._memory.forget(self)
        for stream in (self._source, self._destination):
            stream.tap(None)
            if end is not End.CLOSED:
                stream.reset(code)
        self._waiter.wake()

    def _rearm(self, at: float) -> None:
        if self._timer is not None and at < self._timer.deadline:
            self._timer.deadline = at


class _Way:
    """One direction of a circuit; at the same time the tap of the stream that it comes from.

    Attributes:
        source: where it comes from.
        other: the other direction.
        carried: bytes passed on.
        held: bytes that wait here, for tokens or for the sink to take them.
        resume_at: when there are tokens again for what waits; infinity if nothing waits for any.
        look_at: when to look whether the sink takes anything; infinity if nothing waits for it.
    """

    __slots__ = (
        "_before",
        "_burst",
        "_ends",
        "_from",
        "_level",
        "_rate",
        "_refilled_at",
        "_since",
        "_sink",
        "_splice",
        "_target",
        "_to",
        "carried",
        "held",
        "look_at",
        "other",
        "resume_at",
        "source",
    )

    other: _Way

    def __init__(
        self, splice: Splice, source: YamuxStream, sink: YamuxStream, rate: int, ends: tuple[End, End, End]
    ) -> None:
        self.source = source
        self.carried = 0
        self.held = 0
        self.resume_at = self.look_at = float("inf")
        self._since = splice.opened_at
        self._target = 0
        self._splice = splice
        self._sink = sink
        self._from = source._state
        self._to = sink._state
        self._before = source.received - source.unread
        self._ends = ends
        self._rate = rate
        self._burst = self._level = max(MIN_STEP, rate * BURST_SECONDS)
        self._refilled_at = splice.opened_at
        if rate:
            self._from.max_window = min(self._from.max_window, max(INITIAL_WINDOW, int(rate * WINDOW_SECONDS)))

    def changed(self) -> None:
        """Something came, or may be passed on now, or the stream ended."""
        state = self._from
        if state.reset is not None:
            by_peer, code = state.reset
            return self._splice._finish(self._ends[0] if by_peer else End.RELAY, code)
        lost = self.source._lost is not None
        if lost and not state.eof:
            return self._splice._finish(self._ends[1])
        if self._sink._lost is not None and (lost or state.chunks or (state.eof and state.fin_sent)):
            return self._splice._finish(self.other._ends[1])  # nobody is left to take it, nor to be heard
        if state.chunks:
            self._pass_on()
            if self._splice.end is not None:
                return None
        if state.eof and not state.chunks:
            self._sink.connection.finish(self._to)
        self._grant()
        return None

    def drained(self) -> None:
        """The queue of ``source``, into which the other direction leads, fell below its mark, or its end left."""
        if self._from.fin_sent and self._to.fin_sent:
            self._splice._finish(End.CLOSED)
        elif self._sink._lost is not None:
            self.changed()
        else:
            self.other._grant()

    def _pass_on(self) -> None:
        """Move what the limits allow."""
        state, splice, to = self._from, self._splice, self._to
        chunks, queue = state.chunks, to.queue
        write = self._sink.connection.write
        allowed = splice._left
        if self._rate:
            allowed = min(allowed, self._tokens())
        moved = 0
        while chunks and moved < allowed:
            offset, chunk = state.offset, chunks[0]
            size = len(chunk) - offset
            if size <= allowed - moved:
                chunks.popleft()
                state.offset = 0
                if offset:
                    chunk = chunk[offset:]
            else:
                size = allowed - moved
                chunk = chunk[offset : offset + size]
                state.offset += size
            last = queue[-1] if size < SMALL and queue else b""
            if last and len(last) < SMALL and (len(queue) > 1 or not to.queue_offset):
                queue[-1] = last + chunk
                to.queued += size
            else:
                write(to, chunk)
            moved += size
        self.carried += moved
        if splice._left != UNLIMITED:
            splice._left -= moved
            if chunks and not splice._left:
                self._sink.connection.flush()
                return splice._finish(End.BYTES, StreamCode.RESOURCES)
        if self._rate:
            self._spend(moved, waiting=bool(chunks))
        return None

    def _tokens(self) -> int:
        now = trio.current_time()
        self._level = min(self._burst, self._level + (now - self._refilled_at) * self._rate)
        self._refilled_at = now
        return 0 if now < self.resume_at < float("inf") else int(self._level)

    def _spend(self, count: int, *, waiting: bool) -> None:
        self._level -= count
        if not waiting:
            self.resume_at = float("inf")
        elif count or self.resume_at == float("inf"):
            step = max(MIN_STEP, self._rate * STEP_SECONDS)
            self.resume_at = self._refilled_at + max(0.0, step - self._level) / self._rate
            self._splice._rearm(self.resume_at)

    def _grant(self) -> None:
        """Grant the sender what has left, and have the queue say when the next grant is due."""
        state, queue = self._from, self._to
        waiting = state.received - self._before - self.carried
        state.unread = held = queue.queued + waiting
        if held + state.allowed <= state.grant_at:
            self.source.connection.consumed(state, now=False)
        queue.mark = max(1, state.grant_at - state.allowed - waiting + 1)
        if held != self.held and self._splice.end is None:
            more, self.held = held - self.held, held
            if queue.queued and self.look_at == float("inf"):
                self._expect(trio.current_time())
                self._splice._rearm(self.look_at)
            self._splice._memory.count(self._splice, more)

    # Whether the sink takes anything

    def _expect(self, now: float) -> None:
        """What waits for the sink now, as far as a first window, has to have left in good time."""
        queued = self._to.queued
        self._since = now
        self._target = self.carried - queued + min(queued, INITIAL_WINDOW)
        self.look_at = now + STALLED

    def look(self, now: float) -> None:
        """See whether it has; then expect the same of what waits now."""
        if not self._to.queued:
            self.look_at = float("inf")
        elif self._takes():
            self._expect(now)
        else:
            self._splice._finish(self.other._ends[2], StreamCode.RESOURCES)

    def _takes(self) -> bool:
        return self.carried - self._to.queued >= self._target

    def burden(self, now: float) -> float:
        """How much waits for the sink, times the seconds for which it has not taken what it was expected to."""
        if self._takes():
            self._expect(now)
        return self._to.queued * (now - self._since)
