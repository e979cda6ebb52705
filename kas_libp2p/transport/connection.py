"""One secured, multiplexed connection: the Noise ciphers and the Yamux machine on a byte pipe.

How bytes come in
    One task reads. It borrows two large buffers from a pool, reads as much as there is into the one, opens every whole
    Noise message into the other, and hands it all to the machine, which copies payload out once. Each stream is woken
    once per read. Before it waits, the task gives the buffers back: an idle connection holds none. It never stops
    reading to slow a stream down; windows do that. A connection on a circuit is read in the turn of the relay's reader.

How bytes go out
    A write appends to the queue of its stream. `Connection.flush` takes what all streams have, by turns, seals it into
    full Noise messages and gives it to the pipe in one call. It waits for nothing and runs in whichever task has a
    reason to: the writer that is the first since the line was idle (a small message leaves with no turn of the
    scheduler), the writer that filled its queue, or the flusher task, to which everybody else leaves it and which is
    the only one that waits for the pipe. So small writes are gathered under load, and never held back without.

    A connection on a circuit seals nothing that the circuit has no room for, and goes on in the turn of the relay's
    flusher: what it seals fills the batches of the relay's connection.

    How much is sealed ahead follows what the pipe takes at once, so a slow line holds little that can't be overtaken.

How it ends
    `aclose` sends what is queued, says "go away", ends the pipe, and waits a bounded time for the peer to do the same.
    Whatever else ends it (the peer, a broken rule, silence, cancellation) is a reason that every stream is told.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, Protocol

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from kas_libp2p.config import KIB, YamuxConfig
from kas_libp2p.errors import ConnectionLost, LocalProtocolError, Refused, RemoteProtocolError, SecurityError
from kas_libp2p.metadata import Direction, Path, PeerId
from kas_libp2p.transport._multistream import Proposer, Responder
from kas_libp2p.transport._noise import FULL_FRAME, MAX_PLAINTEXT, Secured, sealed_size
from kas_libp2p.transport.pipe import CircuitPipe
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.waiter import Waiter
from kas_libp2p.transport.yamux._machine import TURNS, Batch, GoAway, Machine, Stream
from kas_libp2p.transport.yamux.stream import YamuxStream

READ_BUFFER = 5 * FULL_FRAME
"""Bytes read at once: the work per read becomes small beside the work per byte, and it fits the second-level cache. As
many Noise messages as are sealed at once, so that what a relay reads in one call leaves in one."""
FEW_BYTES = 16 * KIB
"""A read of less found the line nearly empty: the next one waits for it to be readable instead of trying at once."""
MAX_BATCH = 5 * MAX_PLAINTEXT
"""Plaintext bytes sealed at once at most: five full Noise messages, so that a stream's whole queue (256 KiB by default)
leaves in one system call."""
MIN_BATCH = 16 * KIB
"""Plaintext bytes sealed at once at least, on a line that takes little."""
SMALL_WRITE = 16 * KIB
"""Bytes of a write up to which it may leave in its own turn. A larger one is part of something long, and better
gathered with what follows: sealed alone, every second batch of a writer of 64 KiB pieces would be one piece."""
FULL_WRITE = 128 * KIB
"""Bytes of a write from which on it gains nothing by being gathered: a batch that another connection has made."""
REST = 0.001
"""Seconds without a write after which the next one leaves in its own turn again."""
FLUSH_BUDGET = 4 * MAX_BATCH
"""Bytes after which a flush lets other tasks run: about a millisecond's worth."""
POOLED = 4
"""Idle buffers of each kind that are kept: as many connections as are likely to be in the middle of a read or write."""
PING_ON_WIRE = 64
"""Bytes that a ping takes on the wire, with room: if no more has reached the peer's host, nothing is in its way."""
CLOSE_TIMEOUT = 1.0
"""Seconds that `Connection.aclose` gives what is queued to leave, as far as the peer's windows let it."""
CLOSE_LINGER = 0.25
"""Seconds that it then waits for the peer's end: closing a socket with unread data would destroy what is under way."""
SMALL_REST = 4 * KIB
"""Sealed bytes that the pipe had no room for, up to which they leave together with what is sealed next. A kernel takes
whole segments: what a batch has beyond them would cost a system call and a packet of its own, each time."""
WIRE_BUFFER = SMALL_REST + sealed_size(MAX_BATCH + MAX_BATCH // TURNS + 4 * KIB)
KEPT_HEAP = 2048 * KIB
"""glibc keeps what is freed up to twice the largest block that was ever freed, 256 KiB at first. With less than a few
batches, the pages of nearly every batch go back to the system and are cleared again for the next: up to 0.2 s of CPU
per GB."""

FAILURES = (SecurityError, RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError)

_numbers = itertools.count(1)


class Source(Protocol):
    """What has something to send, and queues it at the last moment: so it knows all that goes together."""

    def fill(self) -> None:
        """Queue it now. The connection is flushing. Must not wait nor raise."""


class _Pool:
    """Buffers that are in use only while there is data in them."""

    __slots__ = ("_buffers", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffers: list[memoryview] = []

    def take(self) -> memoryview:
        try:
            return self._buffers.pop()
        except IndexError:
            return memoryview(bytearray(self._size))

    def give(self, buffer: memoryview) -> None:
        if len(self._buffers) < POOLED:
            self._buffers.append(buffer)


_reading = _Pool(READ_BUFFER)
_writing = _Pool(WIRE_BUFFER)
bytearray(KEPT_HEAP)  # freed at once


class Layer(StrEnum):
    """Whose rules a peer broke; the words of `kas_libp2p.events.PeerMisbehaved`."""

    NOISE = "noise"
    YAMUX = "yamux"


class Connection:
    """One secured, multiplexed connection to a proven peer. Made by `kas_libp2p.transport.upgrade.upgrade`.

    Nothing happens before `run`.

    Attributes:
        number: counts the connections of this process.
        peer: the proven peer id.
        public_key: its key as libp2p protobuf.
        path: the way it takes.
        circuit: the circuit that carries it; ``None`` if no relay does.
        initiator: whether this side is the initiator, whoever accepted the TCP connection.
        direction: outbound for the initiator.
        local_address, remote_address: multiaddrs as text.
        opened_at: seconds on trio's clock.
        received, sent: bytes on the wire since the handshake.
        close_reason: why it ended; ``None`` while it has not.
        broke: whether it ended as the way broke, by silence or an error of the network, and neither side closed or
            reset it.
        misbehaviour: the layer whose rules the peer broke, and how, if that is why it ended.
        limit_hits: how often each limit refused a stream.
        send_high_water: bytes that one stream may hold unsent before its writer waits.
    """

    def __init__(
        self,
        raw: RawConnection,
        secured: Secured,
        *,
        initiator: bool,
        path: Path,
        config: YamuxConfig,
        negotiation_timeout: float,
        rtt: float | None = None,
        wire: bytes = b"",
        plain: bytes = b"",
    ) -> None:
        now = trio.current_time()
        self.number = next(_numbers)
        self.peer: PeerId = secured.peer
        self.public_key = secured.public_key
        self.path = path
        self.circuit = raw if isinstance(raw, CircuitPipe) else None
        self.initiator = initiator
        self.direction = Direction.OUTBOUND if initiator else Direction.INBOUND
        self.local_address = raw.local_address
        self.remote_address = raw.remote_address
        self.opened_at = now
        self.received = 0
        self.sent = 0
        self.close_reason: str | None = None
        self.broke = False
        self.misbehaviour: tuple[Layer, str] | None = None
        self.send_high_water = config.send_high_water
        self._raw = raw
        self._seal_into = secured.sealer.seal_into
        self._open_into = secured.opener.open_into
        self._machine = Machine(config, initiator=initiator, now=now, rtt=rtt)
        self._negotiation_timeout = negotiation_timeout
        self._unopened = wire
        self._early = plain
        self._on_stream: Callable[[YamuxStream], None] | None = None
        self._on_limit: Callable[[str], None] | None = None
        self._scope: trio.CancelScope | None = None
        self._timer: trio.CancelScope | None = None
        self._ended: trio.Event | None = None
        self._ready = True
        self._flusher = Waiter()
        self._kicked = False
        self._blocked = False
        self.offers: list[Source] = []
        self._flushing = False
        self._quiet = True
        self._wrote_at = now
        self._batch = MAX_BATCH
        self._wire: memoryview | None = None
        self._wire_start = 0
        self._wire_end = 0
        self._reading = False
        self._mistake: Exception | None = None
        self._closing: str | None = None
        self._aborted = False
        self._delivered = 0
        self._pinged_at = 0  # what `delivered` is once all that went before the ping reached the peer's host
        self._finished = False
        self._drained: trio.Event | None = None
        self._pings: dict[int, trio.Event] = {}
        self._pongs: dict[int, float] = {}

    def __repr__(self) -> str:
        return f"<connection {self.number} {self.direction} to {self.peer} at {self.remote_address}>"

    @property
    def rtt(self) -> float | None:
        """The last measured round trip in seconds; the first comes from the handshake."""
        return self._machine.rtt

    @property
    def delivered(self) -> int:
        """Bytes on the wire that have reached the peer's host, as far as is known."""
        return self._raw.delivered()

    @property
    def undelivered(self) -> int:
        """Bytes on the wire, or about to be, that have not reached the peer's host, as far as is known."""
        return self._raw.undelivered() + self.sealed

    @property
    def heard_at(self) -> float:
        """When anything came from the peer last, or what was sent while it was asked moved on; on trio's clock."""
        return self._machine.heard_at

    @property
    def sealed(self) -> int:
        """Bytes that are ready for the wire, and not sent yet."""
        return self._wire_end - self._wire_start if self._wire is not None else 0

    @property
    def streams(self) -> Collection[YamuxStream]:
        """The streams that are not closed by both sides."""
        return [stream.owner for stream in self._machine.streams.values()]

    @property
    def limit_hits(self) -> Counter[str]:
        """How often each limit refused a stream."""
        return self._machine.hits

    @property
    def closing(self) -> bool:
        """Whether it takes no new streams, or has ended."""
        machine = self._machine
        return self.close_reason is not None or machine.stopped or machine.go_away_received is not None

    # Running

    async def run(
        self,
        on_stream: Callable[[YamuxStream], None],
        *,
        on_limit: Callable[[str], None] | None = None,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Carry the streams until the connection ends, for whatever reason. Runs once.

        Args:
            on_stream: called with each stream that the peer opens; must not raise nor block. Usually it starts a task.
            on_limit: called with the name of the limit each time that a stream of the peer is refused.
        """
        if self._on_stream is not None:
            raise LocalProtocolError("a connection runs once")
        self._on_stream = on_stream
        self._on_limit = on_limit
        try:
            if self.close_reason is None:
                async with trio.open_nursery() as nursery:
                    self._scope = nursery.cancel_scope
                    nursery.start_soon(self._flush_loop)
                    task_status.started()
                    await self._read_loop()
                    nursery.cancel_scope.cancel()
                if self._mistake is not None:
                    raise self._mistake
            else:
                task_status.started()
                await checkpoint()
        except Exception:
            self._aborted = True
            self._end("an internal error on this side")
            raise
        finally:
            if self.close_reason is None:
                self._aborted = True
                self._end("it was cancelled on this side")
            if self._aborted:
                self._raw.abort()
            else:
                with trio.CancelScope(shield=True):  # never waits for the peer
                    await self._raw.aclose()
            self._release_wire()
            self._finished = True
            if self._ended is not None:
                self._ended.set()

    async def _read_loop(self) -> None:
        raw = self._raw
        receive_nowait = raw.receive_nowait
        try:
            if self._early:
                early, self._early = self._early, b""
                self._deliver(memoryview(early))
            if self.circuit is not None:
                self.circuit.serve(self._read_circuit, self._write_circuit)
                self._read_circuit()
                await trio.sleep_forever()
            while self.close_reason is None:
                wire, plain = _reading.take(), _reading.take()
                try:
                    count: int | None = READ_BUFFER
                    rested = True
                    filled = len(self._unopened)
                    wire[:filled] = self._unopened
                    while True:
                        if filled:
                            filled = self._open(wire, filled, plain)
                        if count is None or count < FEW_BYTES:
                            break
                        if not rested:
                            await checkpoint()  # a peer may send faster than this reads, and never let it wait
                        rested = False
                        count = receive_nowait(wire[filled:])
                        if not count:
                            break
                        self.received += count
                        filled += count
                    self._unopened = bytes(wire[:filled])
                finally:
                    _reading.give(wire)
                    _reading.give(plain)
                if count == 0:
                    return self._end(self._eof_reason())
                await raw.wait_readable()
        except FAILURES as error:
            self._failed(error)

    def _read_circuit(self) -> None:
        """Read all that a circuit has brought. Called in the turn of its relay's reader, which nothing here may end."""
        if self._reading or self.close_reason is not None:
            return
        self._reading = True  # what is delivered may end the relay's connection, and that calls this again
        wire, plain = _reading.take(), _reading.take()
        try:
            filled = len(self._unopened)
            wire[:filled] = self._unopened
            while True:
                if filled:
                    filled = self._open(wire, filled, plain)
                count = self._raw.receive_nowait(wire[filled:])
                if not count:
                    break
                self.received += count
                filled += count
            self._unopened = bytes(wire[:filled])
            if count == 0:
                self._end(self._eof_reason())
        except FAILURES as error:
            self._failed(error)
        except Exception as error:  # noqa: BLE001 - `run` raises it
            self._mistaken(error)
        finally:
            self._reading = False
            _reading.give(wire)
            _reading.give(plain)

    def _write_circuit(self) -> None:
        """A circuit has room again. Called while its relay's connection is flushing, which nothing here may end."""
        if self._blocked:
            self._blocked = self._kicked = False
            try:
                self.flush()
            except Exception as error:  # noqa: BLE001 - `run` raises it
                self._mistaken(error)

    def _mistaken(self, error: Exception) -> None:
        self._mistake = error
        assert self._scope is not None
        self._scope.cancel()

    def _open(self, wire: memoryview, filled: int, plain: memoryview) -> int:
        """Open and deliver what is whole of so many bytes; returns how many are left, moved to the front."""
        used, made = self._open_into(wire[:filled], plain)
        if made:
            self._deliver(plain[:made])
        else:
            self._machine.heard(trio.current_time())
        left = filled - used
        if used and left:
            wire[:left] = wire[used:filled]
        return left

    def _failed(self, error: Exception) -> None:
        if isinstance(error, SecurityError):
            self._misbehaved(Layer.NOISE, str(error))
        elif isinstance(error, RemoteProtocolError):
            self._misbehaved(Layer.YAMUX, str(error))
        else:
            self._broke(error)

    def _eof_reason(self) -> str:
        code = self._machine.go_away_received
        if code is not None and code != GoAway.NORMAL:
            names = {GoAway.PROTOCOL_ERROR: "a protocol error", GoAway.INTERNAL_ERROR: "an internal error"}
            return f"the peer closed it because of {names.get(GoAway(code)) if code in (1, 2) else f'code {code:#x}'}"
        if code is None and self.circuit is not None and self.circuit.used_up:
            return str(self.circuit.end())  # go's relays end it in order; a peer would have said a word
        return "the peer closed it" + (" in the middle of a message" if self._unopened else "")

    def _misbehaved(self, layer: Layer, what: str) -> None:
        if self.close_reason is None:
            self.misbehaviour = (layer, what)
            if layer is Layer.YAMUX:
                self.flush()  # the "go away", as far as it leaves at once
        self._end(what)

    def _deliver(self, plain: memoryview) -> None:
        machine = self._machine
        batch = machine.receive(plain, trio.current_time())
        self._quiet = True
        if batch.opened or batch.refused or batch.pongs:
            self._notice(batch)
        for stream in batch.changed:
            owner = stream.owner
            if owner is not None:
                owner._changed()
        if machine.pending:
            self.flush_soon()

    def _notice(self, batch: Batch) -> None:
        on_stream, on_limit = self._on_stream, self._on_limit
        assert on_stream is not None
        for state in batch.opened:
            if state.reset is None:  # opened and reset in one breath
                state.owner = stream = YamuxStream(self, state, trio.current_time())
                on_stream(stream)
        for value, seconds in batch.pongs:
            event = self._pings.pop(value, None)
            if event is not None:
                self._pongs[value] = seconds
                event.set()
        if on_limit is not None:
            for limit in batch.refused:
                on_limit(limit)

    # Sending

    def write(self, stream: Stream, data: bytes, *, now: bool = True) -> None:
        """Queue data of a stream; for `YamuxStream`.

        Args:
            now: whether it may leave in this call. Else it leaves with what else is written in this turn of the
                scheduler.
        """
        self._machine.write(stream, data)
        if now:
            self.wrote(len(data))
        elif not self._kicked:
            self.flush_soon()

    def wrote(self, size: int) -> None:
        """So many bytes were queued, or offered (`offers`). Send them now, or with what follows in this turn."""
        kicked = self._kicked
        if size >= FULL_WRITE or (
            size <= SMALL_WRITE and (self._quiet or (not kicked and trio.current_time() - self._wrote_at > REST))
        ):
            # What follows in this turn is gathered, until the flusher has had its turn, something was heard, or the
            # line has rested.
            self._quiet = False
            self._wrote_at = trio.current_time()
            self.flush()
        elif not kicked:
            self.flush_soon()

    def write_all(self, stream: Stream, pieces: Sequence[bytes]) -> None:
        """Queue several pieces of a stream, which leave with what else is written in this turn; for sessions.

        Unlike `write`, it may be called while this connection is flushing: they leave with what is being flushed.
        """
        self._machine.write_all(stream, pieces)
        if not (self._flushing or self._kicked):
            self.flush_soon()

    def flush_soon(self) -> None:
        """Have the flusher send what is queued, in the next turn of the scheduler."""
        if not self._kicked:
            self._kicked = True
            self._flusher.wake()

    def flush(self) -> None:
        """Send what is queued as far as the pipe takes it now. Never waits, never fails."""
        if self._blocked or self._flushing or self.close_reason is not None:
            return
        self._flushing = True
        machine = self._machine
        send_nowait = self._raw.send_nowait
        circuit = self.circuit
        budget = FLUSH_BUDGET
        try:
            while True:
                while self.offers:
                    self.offers.pop().fill()
                left = self.sealed
                if left <= SMALL_REST:
                    if circuit is not None and circuit.full and machine.pending:
                        self._blocked = True  # until `_write_circuit`
                        return
                    pieces, size = machine.take(self._batch)
                    if size:
                        if machine.drained:
                            for stream in machine.drained:
                                if stream.owner is not None:
                                    stream.owner._drained()
                            machine.drained.clear()
                        self._seal(pieces, size)
                        budget -= size
                    elif not left:
                        if self._drained is not None:
                            self._drained.set()
                        return
                wire, start, end = self._wire, self._wire_start, self._wire_end
                assert wire is not None
                count = send_nowait(wire[start:end])
                self.sent += count
                if start + count < end:
                    self._wire_start = start + count
                    self._batch = max(MIN_BATCH, min(MAX_BATCH, count * MAX_PLAINTEXT // FULL_FRAME))
                    self._blocked = True
                    self._flusher.wake()
                    return
                self._release_wire()
                if self._batch < MAX_BATCH:
                    self._batch = min(MAX_BATCH, 2 * self._batch)
                if budget <= 0:
                    self.flush_soon()
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._broke(error)
        finally:
            self._flushing = False

    def _seal(self, pieces: list[bytes | memoryview], size: int) -> None:
        """Seal what has ``size`` bytes together behind what is left of the last batch."""
        rest, left = self._wire, self.sealed
        room = left + sealed_size(size)  # beyond a batch only with a crowd of answers
        wire = _writing.take() if room <= WIRE_BUFFER else memoryview(bytearray(room))
        if rest is not None:
            wire[:left] = rest[self._wire_start : self._wire_end]
            self._release_wire()
        made = self._seal_into(pieces[0] if len(pieces) == 1 else b"".join(pieces), wire[left:])
        self._wire, self._wire_start, self._wire_end = wire, 0, left + made

    def _release_wire(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None and len(wire) == WIRE_BUFFER:
            _writing.give(wire)

    async def _flush_loop(self) -> None:
        machine = self._machine
        raw = self._raw
        while self._alive():
            with trio.CancelScope(deadline=machine.next_deadline()) as self._timer:
                while self._alive():
                    if self._blocked and self.circuit is None:
                        try:
                            await raw.wait_writable()
                        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                            self._broke(error)
                            return
                        self._blocked = False
                        self._kicked = False
                        self.flush()
                    elif self._kicked and not self._blocked:
                        self._kicked = False
                        self.flush()
                        self._quiet = True
                        if self._kicked:
                            await checkpoint()
                    else:
                        await self._flusher.wait()
            if self._alive():
                now = trio.current_time()
                before, self._delivered = self._delivered, raw.delivered()
                pinging = machine.pinging
                if pinging and before < self._pinged_at and self._delivered - before > PING_ON_WIRE:
                    machine.heard(now)  # what was sent before still moves: the ping lies behind it
                dead = machine.on_timeout(now)
                if machine.pinging and not pinging:
                    self._pinged_at = self._delivered + self.undelivered
                if dead is not None:
                    self._aborted = self.broke = True
                    self._end(dead)
                elif machine.pending:
                    self.flush()

    def _alive(self) -> bool:
        return self.close_reason is None

    def keep_alive(self, seconds: float) -> None:
        """Ping after so many seconds of silence from now on, where a NAT on the way forgets sooner than configured."""
        self._machine.keepalive = seconds
        self._rearm()

    def _rearm(self) -> None:
        """A deadline may have come nearer."""
        timer = self._timer
        if timer is not None:
            deadline = self._machine.next_deadline()
            if deadline < timer.deadline:
                timer.deadline = deadline

    # Streams

    async def open_stream(self, *protocols: str) -> YamuxStream:
        """Open a stream.

        Args:
            protocols: one: it is proposed and taken for agreed, without a round trip; if the peer does not speak it,
                reading and writing raise `NegotiationError`. Several: negotiated before this returns, in order of
                preference. None: the stream is bare.

        Raises:
            NegotiationError: the peer speaks none of several protocols.
            UpgradeTimeout: it did not answer in time.
            Refused: a limit of ours is reached.
            ConnectionLost: the connection ended, or is about to.
        """
        await checkpoint_if_cancelled()
        if self.close_reason is not None:
            raise ConnectionLost(self.close_reason)
        if self._on_stream is None:
            raise LocalProtocolError("the connection is not running")
        proposer = Proposer(protocols) if protocols else None
        now = trio.current_time()
        try:
            state = self._machine.open(now)
        except LocalProtocolError as error:
            raise ConnectionLost(str(error)) from None
        except Refused as error:
            if self._on_limit is not None:
                self._on_limit(error.limit)
            raise
        state.owner = stream = YamuxStream(self, state, now)
        if proposer is None:
            self.flush_soon()
        elif len(protocols) == 1:
            stream._start(proposer)
        else:
            self.write(state, proposer.start(), now=False)
            await stream.negotiate(proposer, self._negotiation_timeout)
        return stream

    async def accept(self, stream: YamuxStream, protocols: Collection[str]) -> str:
        """Agree with the peer on the protocol of a stream that it opened.

        Args:
            protocols: what is spoken here.

        Returns:
            the protocol; also as ``stream.protocol``.

        Raises:
            NegotiationError: the peer broke the rules, proposed too often, or went away. The stream is reset.
            UpgradeTimeout: it said nothing for too long. The stream is reset.
            ConnectionLost, StreamReset: the stream ended.
        """
        return await stream.negotiate(Responder(protocols), self._negotiation_timeout)

    async def ping(self) -> float:
        """Measure the round trip in seconds, to the peer's multiplexer and back.

        Raises:
            ConnectionLost: the connection ended before the answer came.
        """
        await checkpoint_if_cancelled()
        if self.close_reason is not None:
            raise ConnectionLost(self.close_reason)
        if not self._machine.pinging:
            self._delivered = self.delivered
            self._pinged_at = self._delivered + self.undelivered
        value = self._machine.ping(trio.current_time())
        event = self._pings[value] = trio.Event()
        self.flush_soon()
        self._rearm()
        try:
            await event.wait()
        finally:
            self._pings.pop(value, None)
        if value in self._pongs:
            return self._pongs.pop(value)
        raise ConnectionLost(f"the connection ended: {self.close_reason}")

    async def check_alive(self, within: float, reason: str) -> None:
        """Ping, and abort it if nothing came from the peer meanwhile, nor anything of what was sent has reached it.

        Args:
            within: seconds for the answer.
            reason: what it is aborted with, in words.
        """
        before = self.received, self.delivered
        with trio.move_on_after(within) as scope, suppress(ConnectionLost):
            await self.ping()
        if scope.cancelled_caught and (self.received, self.delivered) == before:  # else it is only slow
            self.abort(reason, broke=True)

    def finish(self, stream: Stream) -> None:
        """End our direction of a stream; for `YamuxStream`."""
        self._machine.finish(stream)
        self.flush_soon()

    def reset(self, stream: Stream, code: int) -> None:
        """Reset a stream; for `YamuxStream`."""
        self._machine.reset(stream, code)
        self.flush_soon()

    def close(self, stream: Stream) -> None:
        """Close a stream; for `YamuxStream`."""
        self._machine.close(stream, trio.current_time())
        self._rearm()
        self.flush_soon()

    def consumed(self, stream: Stream, *, now: bool = True) -> None:
        """Grant what was read of a stream; for `YamuxStream`.

        Args:
            now: whether the peer may be told in this call; it must not be where another connection is flushing.
        """
        if self._machine.consumed(stream, trio.current_time()):
            self._rearm()
            if now:
                self.flush()
            else:
                self.flush_soon()

    # Ending

    async def aclose(self, reason: str = "") -> None:
        """End in order: what is queued leaves as far as the peer takes it, then "go away", then the end of the pipe.

        Takes at most `CLOSE_TIMEOUT` + `CLOSE_LINGER`. If cancelled, the connection is aborted.

        Args:
            reason: why, in words; the streams are told.
        """
        reason = reason or "it was closed on this side"
        if self._on_stream is None:
            self._end(reason)
            await self._raw.aclose()
            return
        if self.close_reason is not None or self._closing is not None:
            await self.wait_closed()
            return
        self._closing = reason
        self._machine.stop()
        done = False
        try:
            for stream in list(self._machine.streams.values()):
                if stream.owner is not None:
                    stream.owner._lose(reason)
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self._drain()
            self._machine.go_away()
            with trio.move_on_after(CLOSE_LINGER):
                await self._drain()
                self._raw.send_eof()
                await self.wait_closed()
            done = True
        finally:
            self._aborted = self._aborted or not done
            self._end(reason)
        await self.wait_closed()

    async def _drain(self) -> None:
        """Wait until all that can be sent is sent."""
        self.flush()
        while self.close_reason is None and (self._wire is not None or self._machine.sendable()):
            self._drained = trio.Event()
            await self._drained.wait()
        self._drained = None
        await checkpoint()

    def abort(self, reason: str = "", *, broke: bool = False) -> None:
        """End at once, without telling the peer why.

        Args:
            reason: why, in words.
            broke: whether the way to the peer is found broken; see the attribute.
        """
        self._aborted = True
        self.broke = self.broke or broke
        self._end(reason or "it was aborted on this side")
        if self._on_stream is None:
            self._raw.abort()

    async def wait_closed(self) -> None:
        """Return when `run` has ended."""
        if self._on_stream is None or self._finished:
            await checkpoint()
            return
        if self._ended is None:
            self._ended = trio.Event()
        await self._ended.wait()

    def _broke(self, error: Exception) -> None:
        if self.close_reason is None and self._closing is None:
            reset = isinstance(error.__cause__, ConnectionResetError | BrokenPipeError)  # it came by the way
            self.broke = not reset
        self._end(f"the connection broke: {error}" if str(error) else "the connection broke")

    def _end(self, reason: str) -> None:
        """Remember why it ended, and tell everybody who waits for it. What was received can still be read."""
        if self.close_reason is not None:
            return
        self.close_reason = reason = self._closing or reason
        for state in list(self._machine.streams.values()):
            if state.owner is not None:
                state.owner._lose(reason)
        for event in self._pings.values():
            event.set()
        if self._drained is not None:
            self._drained.set()
        self._flusher.wake()
        if self._scope is not None:
            self._scope.cancel()
