"""One stream of a connection, as trio streams are. All that it decides is decided by the machine."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Protocol

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from kas_libp2p.errors import ConnectionLost, NegotiationError, Stage, StreamCode, StreamReset, UpgradeTimeout
from kas_libp2p.metadata import Direction, OverlayStream, TransportMetadata
from kas_libp2p.transport._multistream import Proposer, Responder
from kas_libp2p.transport.waiter import Waiter
from kas_libp2p.transport.yamux._machine import Stream

if TYPE_CHECKING:
    from kas_libp2p.transport.connection import Connection

YIELD_AFTER = 1024 * 1024
"""Bytes after which a reader that never has to wait lets other tasks run: about a millisecond's worth."""


class Tap(Protocol):
    """What takes the place of a stream's reader and writer, see `YamuxStream.tap`. Neither call may wait or raise."""

    def changed(self) -> None:
        """Something came in, or the stream ended: in the turn of the connection's reader, or of who ended it."""

    def drained(self) -> None:
        """The queue fell below its mark, or its end left. The connection is flushing: others may do so only later."""


class YamuxStream(OverlayStream):
    """A stream to a peer.

    Reading and writing are independent; at most one task reads and one writes at a time. Data that arrived before the
    connection was lost can still be read; data before a reset can not.

    Attributes:
        connection: the connection that carries it.
        protocol: the negotiated protocol; empty while there is none.
        direction: who opened it.
        opened_at: seconds on trio's clock.
    """

    __slots__ = (
        "_closed",
        "_lost",
        "_proposer",
        "_readable",
        "_refusal",
        "_since_yield",
        "_state",
        "_tap",
        "_writable",
        "connection",
        "direction",
        "opened_at",
        "protocol",
    )

    def __init__(self, connection: Connection, state: Stream, now: float) -> None:
        self.connection = connection
        self.direction = Direction.OUTBOUND if state.outbound else Direction.INBOUND
        self.protocol = ""
        self.opened_at = now
        self._state = state
        self._proposer: Proposer | None = None
        self._refusal: NegotiationError | None = None
        self._readable = Waiter()
        self._writable = Waiter()
        self._tap: Tap | None = None
        self._closed = False
        self._lost: str | None = None
        self._since_yield = 0

    def __repr__(self) -> str:
        return f"<stream {self._state.id} of connection {self.connection.number} {self.protocol or '(no protocol)'}>"

    @property
    def id(self) -> int:
        """Its number on the wire."""
        return self._state.id

    @property
    def received(self) -> int:
        """Payload bytes received, those of the negotiation included."""
        return self._state.received

    @property
    def sent(self) -> int:
        """Payload bytes handed to the connection's transport, those of the negotiation included."""
        return self._state.sent

    @property
    def unread(self) -> int:
        """Bytes received and not read yet."""
        return self._state.unread

    @property
    def unsent(self) -> int:
        """Bytes written and not yet handed to the connection's transport."""
        return self._state.queued

    @property
    def closed(self) -> bool:
        """Whether it was closed here in order."""
        return self._closed

    @property
    def over(self) -> bool:
        """Whether either side has closed it, or it was reset: no two-way talk is possible on it any more."""
        return self._closed or self._lost is not None or self._state.eof or self._state.reset is not None

    @property
    def finished(self) -> bool:
        """Whether nothing more can be written: our direction was ended, or the whole stream."""
        return self._ended() or self._state.fin_wanted

    @property
    def broken(self) -> str | None:
        """Why it ended other than in order, in words; ``None``: it has not."""
        if self._lost is None and self._state.reset is None:
            return None
        return self._lost or str(self._read_error())

    @property
    def state(self) -> Stream:
        """What the connection's machine knows of it, for a tap that reads and writes it (`tap`)."""
        return self._state

    @property
    def delivered(self) -> int:
        """See `OverlayStream`: of the whole connection, whose bytes all pass one after the other."""
        return self.connection.delivered

    @property
    def metadata(self) -> TransportMetadata:
        """Who is at the other end, and by which way."""
        connection = self.connection
        return TransportMetadata(
            peer=connection.peer,
            path=connection.path,
            direction=self.direction,
            initiator=connection.initiator,
            protocol=self.protocol,
            local_address=connection.local_address,
            remote_address=connection.remote_address,
            connection_opened_at=connection.opened_at,
            stream_opened_at=self.opened_at,
            rtt=connection.rtt,
            limits=connection.circuit.limits if connection.circuit is not None else None,
        )

    # Writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write. Returns when less than ``yamux.send_high_water`` bytes of this stream are left to be sent.

        If cancelled while it waits, the data is sent nevertheless.

        Raises:
            ConnectionLost, StreamReset: it can't be delivered.
            NegotiationError: the peer refused the protocol.
            trio.ClosedResourceError: this direction was closed here.
            trio.BusyResourceError: another task is writing.
        """
        state = self._state
        await checkpoint_if_cancelled()
        if self._closed or self._lost is not None or state.fin_wanted or state.reset is not None:
            raise self._write_error()
        if self._writable.task is not None:
            raise trio.BusyResourceError("another task is writing to this stream")
        connection = self.connection
        high_water = connection.send_high_water
        if state.queued >= high_water:  # what a cancelled write left
            await self._room(high_water)
        if data:
            connection.write(state, data if type(data) is bytes else bytes(data))
            if state.queued >= high_water:
                await self._room(high_water)

    def send_nowait(self, data: bytes) -> bool:
        """Write if that needs no waiting; see `OverlayStream`."""
        state, connection = self._state, self.connection
        if (
            self._closed
            or self._lost is not None
            or state.fin_wanted
            or state.reset is not None
            or self._writable.task is not None
            or state.queued + len(data) >= connection.send_high_water
        ):
            return False
        connection.write(state, data)
        return True

    async def _room(self, high_water: int) -> None:
        state = self._state
        self.connection.flush()
        if state.queued < high_water:
            await checkpoint()
        while state.queued >= high_water and not self._ended():
            await self._writable.wait()
        if self._ended():
            raise self._write_error()

    def _ended(self) -> bool:
        return self._closed or self._lost is not None or self._state.reset is not None

    def _write_error(self) -> Exception:
        state = self._state
        if self._refusal is not None:
            return self._refusal
        if self._lost is not None:
            return self._loss(self._lost)
        if state.reset is not None and not self._closed:
            by_peer, code = state.reset
            return StreamReset(by_peer=by_peer, code=code)
        return trio.ClosedResourceError("this stream, or its sending direction, was closed")

    async def wait_send_all_might_not_block(self) -> None:
        """Return when a write would not have to wait."""
        await checkpoint()
        state = self._state
        if self._writable.task is not None:
            raise trio.BusyResourceError("another task is writing to this stream")
        if self._ended() or state.fin_wanted:
            raise self._write_error()
        while state.queued >= self.connection.send_high_water and not self._ended():
            await self._writable.wait()
        if self._ended():
            raise self._write_error()

    async def send_eof(self) -> None:
        """End our direction, behind everything that was written. May be called again.

        Raises:
            ConnectionLost, StreamReset, NegotiationError, trio.BusyResourceError: as `send_all`.
            trio.ClosedResourceError: the stream was closed here.
        """
        await checkpoint()
        state = self._state
        if self._writable.task is not None:
            raise trio.BusyResourceError("another task is writing to this stream")
        if self._ended():
            raise self._write_error()
        self.connection.finish(state)

    # Reading

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Read what is there, at least one byte.

        Args:
            max_bytes: read no more than this.

        Returns:
            ``b""`` at the end of the peer's direction.

        Raises:
            ConnectionLost, StreamReset: the stream ended without an end.
            NegotiationError: the peer refused the protocol.
            trio.ClosedResourceError: the stream was closed here.
            trio.BusyResourceError: another task is reading.
        """
        if max_bytes is not None and index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        state = self._state
        chunks = state.chunks
        await checkpoint_if_cancelled()
        while not chunks or self._proposer is not None:
            if self._closed or state.reset is not None or (self._lost is not None and not state.eof):
                raise self._read_error()
            if state.eof:
                if self._proposer is not None:
                    raise NegotiationError("the peer closed the stream before it agreed on the protocol")
                await checkpoint()
                return b""
            if self._readable.task is not None:
                raise trio.BusyResourceError("another task is reading from this stream")
            await self._readable.wait()
        chunk = chunks[0]
        offset = state.offset
        size = len(chunk) - offset
        if max_bytes is not None and max_bytes < size:
            chunk = chunk[offset : offset + max_bytes]
            state.offset = offset + max_bytes
            size = max_bytes
        else:
            chunks.popleft()
            if offset:
                chunk = chunk[offset:]
                state.offset = 0
        state.unread = held = state.unread - size
        if held + state.allowed <= state.grant_at:
            self.connection.consumed(state)
        self._since_yield += size
        if self._since_yield >= YIELD_AFTER:
            self._since_yield = 0
            await trio.lowlevel.cancel_shielded_checkpoint()
        return chunk

    def _read_error(self) -> Exception:
        if self._refusal is not None:
            return self._refusal
        if self._closed:
            return trio.ClosedResourceError("this stream was closed")
        if self._lost is not None:
            return self._loss(self._lost)
        assert self._state.reset is not None
        by_peer, code = self._state.reset
        return StreamReset(by_peer=by_peer, code=code)

    def _loss(self, reason: str) -> ConnectionLost:
        circuit = self.connection.circuit
        ended = circuit.ended if circuit is not None else None
        return ended.again(reason) if ended is not None else ConnectionLost(reason)

    async def wait_unread(self) -> None:
        """Return when there is something to read, or nothing more will come. For the negotiation of protocols."""
        state = self._state
        await checkpoint_if_cancelled()
        while not state.chunks and not state.eof and state.reset is None and self._lost is None and not self._closed:
            if self._readable.task is not None:
                raise trio.BusyResourceError("another task is reading from this stream")
            await self._readable.wait()

    async def negotiate(self, side: Proposer | Responder, timeout: float) -> str:
        """Agree on the protocol before anything else is read or written.

        Args:
            side: the proposer, whose proposal has been written, or the responder.
            timeout: seconds.

        Returns:
            the protocol.

        Raises:
            NegotiationError, UpgradeTimeout: they did not agree; the stream is reset.
            ConnectionLost, StreamReset: the stream ended.
        """
        state = self._state
        try:
            with trio.fail_after(timeout):
                while side.selected is None:
                    await self.wait_unread()
                    if not state.chunks:
                        if state.eof and state.reset is None:
                            raise NegotiationError("the peer ended the stream before they agreed on a protocol")
                        raise self._read_error()
                    answer = side.receive(self._take_unread())
                    if answer:
                        # An agreement may wait for the data that follows it, a refusal for nothing.
                        self.connection.write(state, answer, now=side.selected is None)
        except trio.TooSlowError:
            raise UpgradeTimeout(Stage.STREAM, timeout) from None
        finally:
            if side.selected is None:
                self.reset(StreamCode.NEGOTIATION)
        self.protocol = side.selected
        self._put_back(side.rest())
        return self.protocol

    # Ending

    def reset(self, code: int = 0) -> None:
        """End both directions at once, without waiting.

        Args:
            code: libp2p stream error code that the peer is told, 0 for none.
        """
        self.connection.reset(self._state, code)
        self._wake()

    async def aclose(self) -> None:
        """End our direction behind everything that was written, and read no more. Does not wait for the peer."""
        self.close()
        await checkpoint()

    def close(self, last: bytes = b"") -> None:
        """Do what `aclose` does, in the turn of whoever calls.

        Args:
            last: to be written before, if that can be.
        """
        if last and not self.finished:
            self.connection.write(self._state, last, now=False)
        if not self._closed:
            self._closed = True
            self.connection.close(self._state)
            self._wake()

    # For the connection, and for what is spliced

    def tap(self, tap: Tap | None, *, raw: bool = False) -> None:
        """Have ``tap`` called in place of waking tasks: nobody else reads or writes the stream meanwhile.

        Args:
            tap: ``None`` to give the stream back.
            raw: whether it takes all chunks in each call, and keeps none of them: they are parts of a buffer.
        """
        self._tap = tap
        self._state.raw = raw

    def _drained(self) -> None:
        """The queue fell below its mark, or its end left."""
        if self._tap is not None:
            self._tap.drained()
        else:
            self._writable.wake()

    def _start(self, proposer: Proposer) -> None:
        """Propose a protocol, take it for agreed, and go on without waiting for the answer."""
        self._proposer = proposer
        self.connection.write(self._state, proposer.start(), now=False)
        self.protocol = proposer.proposed

    def _changed(self) -> None:
        """Something came in, or the stream ended."""
        if self._proposer is not None and self._state.chunks:
            self._negotiate(self._proposer)
        if self._tap is not None:
            return self._tap.changed()
        self._readable.wake()
        if self._state.reset is not None:
            proposer = self._proposer
            if proposer is not None and self._state.reset == (True, StreamCode.NEGOTIATION):
                self._refusal = NegotiationError(f"the peer does not speak {proposer.proposed}")
            self._writable.wake()
        return None

    def _negotiate(self, proposer: Proposer) -> None:
        data = self._take_unread()
        try:
            answer = proposer.receive(data)
        except NegotiationError as error:
            self._proposer = None
            self._refusal = error
            self.reset(StreamCode.NEGOTIATION)
            return
        if answer:
            self.connection.write(self._state, answer, now=False)
        if proposer.selected is not None:
            self._proposer = None
            self._put_back(proposer.rest())

    def _take_unread(self) -> bytes:
        """Take out what is unread; it counts as unread until `_put_back` says what is left of it."""
        state = self._state
        data = b"".join(state.chunks)[state.offset :]
        state.chunks.clear()
        state.offset = 0
        return data

    def _put_back(self, rest: bytes) -> None:
        state = self._state
        if rest:
            state.chunks.appendleft(rest)
        state.unread = sum(map(len, state.chunks))
        if state.unread + state.allowed <= state.grant_at:
            self.connection.consumed(state)

    def _lose(self, reason: str) -> None:
        self._lost = reason
        self._wake()

    def _wake(self) -> None:
        if self._tap is not None:
            return self._tap.changed()
        self._readable.wake()
        self._writable.wake()
        return None
