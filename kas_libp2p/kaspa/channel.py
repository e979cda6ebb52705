"""Whole Kaspa messages, in order, over whatever carries them.

A `MessageChannel` is what the light peer, the handshake and the bridge see, whichever dialect the stream speaks: HTTP/2
with gRPC towards kaspad and its overlay, length-framed messages between nodes of this project. A message here is the
protobuf encoding of one ``KaspadMessage``, uncompressed, as opaque bytes: what is not understood survives the passage.

Two ways to use it:

- ``send`` and ``receive``: one whole message as ``bytes``. For whoever reads messages.
- ``send_pieces`` and ``receive_pieces``: batches of `Piece`. For whoever passes messages on. A small message is one
  piece; one that is larger than the buffers streams through in several, so a bridge needs no memory for whole messages,
  and pays one call for many of them.

Rules for every channel:

- Messages arrive whole and in order, or the channel fails. Between two first pieces lie exactly ``size`` bytes.
- One task may send and one may receive at a time; a second one gets ``trio.BusyResourceError``.
- A send returns as soon as what is queued is below the channel's high-water mark, and waits before that: back pressure.
  If it is cancelled, its pieces are queued completely or not at all, so the channel stays usable.
- The end: ``receive`` gives ``None`` and ``receive_pieces`` an empty list when the peer ended its side in order. Every
  other end raises, with the reason: ``GrpcError`` (a status), ``RemoteProtocolError`` (the peer broke the protocol),
  ``ConnectionLost`` (the path went away, or the peer fell silent).
- A channel's ``run`` owns its tasks. Whoever makes a channel starts it in a nursery, or uses `running`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Self, TypeVar

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError
from kas_libp2p.metadata import OverlayStream

MAX_MESSAGE = 256 * 1024 * 1024
"""Bytes of one message: what kaspad 2.1.0 itself accepts (``P2P_MAX_MESSAGE_SIZE``)."""

BATCH = 256 * 1024
"""Bytes that one ``receive_pieces`` gives at most, and so the size of the largest piece."""


class Piece(NamedTuple):
    """A part of a message, or all of it.

    Attributes:
        data: the bytes. A view is valid for as long as it is held; it may keep a buffer of up to `BATCH` bytes alive.
        remaining: bytes of this message that come after this piece; 0 in the last.
        first: whether the message begins here.
        size: bytes of the whole message.
    """

    data: bytes | memoryview
    remaining: int
    first: bool
    size: int

    @classmethod
    def of(cls, message: bytes | memoryview) -> Piece:
        """A whole message as one piece."""
        return cls(message, 0, True, len(message))

    @property
    def whole(self) -> bool:
        """Whether this piece is a complete message."""
        return self.first and not self.remaining


class PackedPiece(Piece):
    """A part of a message that is passed on as it came: gzip-compressed, as gRPC has it. ``size`` and ``remaining``
    count compressed bytes. Given only by channels that were told to, see `MessageChannel.gives_packed`."""

    __slots__ = ()


class PathHung(ConnectionLost):
    """Nothing came from the peer although it was asked: the path under the stream carries nothing any more."""


class MessageChannel(ABC):
    """A two-way channel of whole messages. See the module for the rules.

    Args:
        max_message: bytes of one message, in both directions.

    Attributes:
        messages_received, messages_sent: messages begun.
        bytes_received, bytes_sent: bytes of their contents, uncompressed (but as they are in a `PackedPiece`) and
            without framing.
        gives_packed: whether ``receive_pieces`` may give `PackedPiece`: set by whoever passes everything on to a
            channel that takes them. So a large compressed message streams through, whose size nobody knows yet.
    """

    def __init__(self, *, max_message: int = MAX_MESSAGE) -> None:
        self.max_message = max_message
        self.messages_received = 0
        self.messages_sent = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.gives_packed = False
        self._batch: deque[Piece] = deque()
        self._parts: list[bytes | memoryview] = []
        self._receiving = False
        self._sending = False
        self._send_remaining = 0

    @property
    def takes_packed(self) -> bool:
        """Whether ``send_pieces`` takes `PackedPiece`."""
        return False

    @property
    def gaps(self) -> int:
        """How often nothing could come from the peer for a while, so that what gathered there comes at once."""
        return 0

    # What a dialect implements

    @abstractmethod
    async def _receive_batch(self) -> list[Piece]:
        """Wait for at least one piece and give what is there, at most `BATCH` bytes; ``[]`` at the peer's end."""

    @abstractmethod
    async def _send_batch(self, pieces: Sequence[Piece]) -> None:
        """Queue the pieces without waiting first, then wait while too much is queued."""

    @abstractmethod
    async def send_eof(self) -> None:
        """Tell the peer that no more messages come. Receiving goes on. Harmless if repeated."""

    @abstractmethod
    async def aclose(self, reason: str = "") -> None:
        """End the channel and the stream under it, in order and within a bounded time.

        Args:
            reason: told to the peer where the dialect can; empty means that all is well.
        """

    @abstractmethod
    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read, write and keep time until the channel has ended. Never raises for the peer's faults: those go to
        whoever sends or receives. Cancelling it ends the channel at once."""

    # What its users call

    async def send(self, message: bytes | memoryview) -> None:
        """Send one whole message.

        Raises:
            LocalProtocolError: it is larger than ``max_message``, or our side was ended.
            ConnectionLost, GrpcError, RemoteProtocolError: the channel ended.
        """
        await self.send_pieces((Piece(message, 0, True, len(message)),))

    async def send_pieces(self, pieces: Sequence[Piece]) -> None:
        """Send parts of messages, in order. A message may begin in one call and end in a later one.

        Raises:
            LocalProtocolError: pieces do not follow on one another, or a message is too large.
            ConnectionLost, GrpcError, RemoteProtocolError: the channel ended.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this channel")
        remaining = self._send_remaining
        count = total = 0
        for data, after, first, size in pieces:
            length = len(data)
            if first:
                if remaining:
                    raise LocalProtocolError(f"a message begins {remaining} bytes before the end of the one before it")
                if size > self.max_message:
                    raise LocalProtocolError(f"a message of {size} bytes is above the limit of {self.max_message}")
                remaining = size
                count += 1
            if after < 0 or length + after != remaining:
                raise LocalProtocolError("a piece does not follow on the one before it")
            remaining = after
            total += length
        self._send_remaining = remaining
        self.messages_sent += count
        self.bytes_sent += total
        self._sending = True
        try:
            await self._send_batch(pieces)
        finally:
            self._sending = False

    async def receive(self) -> bytes | None:
        """The next whole message, or ``None`` when the peer ended its side.

        Raises:
            ConnectionLost, GrpcError, RemoteProtocolError: the channel ended.
        """
        while True:
            while not self._batch:
                # Parts taken so far stay in the channel: a cancelled receive loses nothing.
                self._batch.extend(await self._next_batch())
                if not self._batch:
                    if self._parts:
                        raise RemoteProtocolError("the peer ended its side in the middle of a message")
                    return None
            piece = self._batch.popleft()
            if not piece.first and not self._parts:
                raise LocalProtocolError("receive() in the middle of a message that receive_pieces() began")
            if piece.whole:
                await trio.lowlevel.checkpoint_if_cancelled()
                return bytes(piece.data)
            self._parts.append(piece.data)
            if not piece.remaining:
                message = b"".join(self._parts)
                self._parts.clear()
                return message

    async def receive_pieces(self) -> list[Piece]:
        """What is there now, after waiting for at least one piece; an empty list when the peer ended its side.

        Raises:
            ConnectionLost, GrpcError, RemoteProtocolError: the channel ended.
        """
        if self._parts:
            raise LocalProtocolError("receive_pieces() in the middle of a message that receive() began")
        if self._batch:
            await trio.lowlevel.checkpoint_if_cancelled()
            pieces = list(self._batch)
            self._batch.clear()
            return pieces
        return await self._next_batch()

    async def _next_batch(self) -> list[Piece]:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this channel")
        self._receiving = True
        try:
            pieces = await self._receive_batch()
        finally:
            self._receiving = False
        for data, _, first, _ in pieces:
            self.bytes_received += len(data)
            self.messages_received += first
        return pieces

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


def delivered_of(stream: trio.abc.AsyncResource) -> int:
    """See `OverlayStream.delivered`; 0 where the stream is none."""
    return stream.delivered if isinstance(stream, OverlayStream) else 0


def abort(stream: trio.abc.AsyncResource) -> None:
    """End a stream at once where it can; others are to be closed."""
    if isinstance(stream, OverlayStream):
        stream.reset()


Channel = TypeVar("Channel", bound=MessageChannel)


@asynccontextmanager
async def beside(task: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run a task for the length of an ``async with`` block.

    An exception of the block comes out as it is, not in a group.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        try:
            yield
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 (raised below, outside of the nursery, so that no group wraps it)
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def running(channel: Channel) -> AsyncIterator[Channel]:
    """Run a channel for the length of an ``async with`` block, and close it at the end; exceptions as in `beside`."""
    async with beside(channel.run):
        yield channel
        await channel.aclose()


HIGH_WATER = 256 * 1024
"""Bytes queued for sending above which a send waits: one batch under way beside one that is being made."""


class MemoryChannel(MessageChannel):
    """One end of a pair in memory, for tests and for two parties in one process. See `memory_channel_pair`."""

    def __init__(self, *, max_message: int, high_water: int, batch: int) -> None:
        super().__init__(max_message=max_message)
        self._high_water = high_water
        self._batch_size = batch
        self._inbox: deque[Piece] = deque()
        self._inbox_bytes = 0
        self._eof_received = False
        self._eof_sent = False
        self._error: str | None = None
        self._changed = trio.lowlevel.ParkingLot()
        self._peer: MemoryChannel = self

    async def _receive_batch(self) -> list[Piece]:
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._eof_received:
                return []
            if self._error is not None:
                raise ConnectionLost(self._error)
            await self._changed.park()
        pieces: list[Piece] = []
        room = self._batch_size
        while self._inbox and (room > 0 or not pieces):
            data, remaining, first, size = self._inbox.popleft()
            taken = len(data)
            if taken > room:
                rest = memoryview(data)[room:]
                self._inbox.appendleft(Piece(rest, remaining, False, size))
                data, remaining, taken = memoryview(data)[:room], remaining + len(rest), room
            pieces.append(Piece(data, remaining, first, size))
            room -= taken
            self._inbox_bytes -= taken
        self._peer._changed.unpark_all()
        return pieces

    async def _send_batch(self, pieces: Sequence[Piece]) -> None:
        if self._eof_sent:
            raise LocalProtocolError("this side was ended")
        if self._error is not None:
            raise ConnectionLost(self._error)
        peer = self._peer
        peer._inbox.extend(pieces)
        peer._inbox_bytes += sum(len(piece.data) for piece in pieces)
        peer._changed.unpark_all()
        await trio.lowlevel.checkpoint()
        while peer._inbox_bytes > self._high_water:
            if self._error is not None:
                raise ConnectionLost(self._error)
            await self._changed.park()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._eof_sent and self._error is None:
            self._eof_sent = True
            self._peer._eof_received = True
            self._peer._changed.unpark_all()

    async def aclose(self, reason: str = "") -> None:
        for end, by in ((self, "this side"), (self._peer, "the peer")):
            if end._error is None:
                end._error = f"closed by {by}" + (f": {reason}" if reason else "")
                if end is not self and not reason:
                    end._eof_received = True
            end._changed.unpark_all()
        await trio.lowlevel.checkpoint()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while self._error is None:
            await self._changed.park()


def memory_channel_pair(
    *, max_message: int = MAX_MESSAGE, high_water: int = HIGH_WATER, batch: int = BATCH
) -> tuple[MemoryChannel, MemoryChannel]:
    """Two channels joined in memory.

    Args:
        max_message: bytes of one message.
        high_water: bytes that may be under way in one direction before the sender waits.
        batch: bytes that one ``receive_pieces`` gives at most; larger pieces are split.
    """
    left = MemoryChannel(max_message=max_message, high_water=high_water, batch=batch)
    right = MemoryChannel(max_message=max_message, high_water=high_water, batch=batch)
    left._peer, right._peer = right, left
    return left, right
