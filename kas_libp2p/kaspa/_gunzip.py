"""One gzip-compressed message, by steps: bounded in memory whatever it unpacks to, and in time per step.

`Unpacker` unpacks it; `Passer` lets it pass as it is.

Who passes a message on has to say its size first, and only the end of a compressed one tells it. So what unpacks to
more than `KEPT` is unpacked twice: once to count it, thrown away, and again as it is taken. A message of a few KiB that
unpacks to the limit (gzip reaches 1 : 1030) then costs time, in small steps between which others run, but no memory.

Source: RFC 1952 (gzip), as gRPC's message encoding.
"""

from __future__ import annotations

import zlib
from collections import deque

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.kaspa.channel import PackedPiece, Piece

KEPT = 1024 * 1024
"""Bytes unpacked that are kept until the size is known; the messages of a synced node are smaller."""
STEP = 64 * 1024
"""Bytes that go into zlib in one step, or come out of it: some 0.3 ms."""
_GZIP = 31


class Unpacker:
    """Unpacks one message.

    Args:
        packed: the whole compressed message.
        limit: bytes that it may unpack to.

    Attributes:
        cost: bytes that went in and came out in the last step.
    """

    def __init__(self, packed: bytes | bytearray, limit: int) -> None:
        self.cost = 0
        self._limit = limit
        self._reader = _Reader(packed)
        self._kept: deque[bytes] = deque()
        self._again: _Reader | None = None
        self._size = 0
        self._given = 0

    def step(self, room: int) -> Piece | None:
        """Do some work: at most `STEP` bytes go in or come out.

        Args:
            room: bytes that a piece may have, at least 1.

        Returns:
            The next piece, or ``None`` if there is none yet. Nothing is left after the one with ``remaining`` 0.

        Raises:
            RemoteProtocolError: it is damaged, cut short, followed by something, or larger than the limit.
        """
        self.cost = 0
        if not self._reader.ended:
            self._count()
            if not self._reader.ended:
                return None
        if self._kept:
            data = self._kept.popleft()
            if len(data) > room:
                self._kept.appendleft(data[room:])
                data = data[:room]
        elif self._again is not None:
            data = self._again.read(room)
            self.cost += self._again.cost
            if not data:
                return None
        else:
            data = b""  # an empty message
        first = not self._given
        self._given += len(data)
        return Piece(data, self._size - self._given, first, self._size)

    def _count(self) -> None:
        """Unpack for the first time."""
        data = self._reader.read(STEP)
        self.cost = self._reader.cost
        self._size += len(data)
        if self._size > self._limit:
            raise RemoteProtocolError(f"gRPC: a compressed message unpacks to more than {self._limit} bytes")
        if data and self._again is None:
            self._kept.append(data)
            if self._size >= KEPT and not self._reader.ended:
                self._again = self._reader.copy()


class Passer:
    """Lets one message pass compressed, each part once what it unpacks to has been counted.

    So one that is damaged, or unpacks to more than it may, is cut before its end, and nobody will unpack it.

    Args:
        size: bytes of the compressed message.
        limit: bytes that it may unpack to.

    Attributes:
        cost: bytes that went in and came out in the last step.
    """

    def __init__(self, size: int, limit: int) -> None:
        self.cost = 0
        self._size = self._remaining = size
        self._limit = limit
        self._unpacked = 0
        self._part: bytes | memoryview = b""
        self._reader = _Reader(b"")

    def feed(self, part: memoryview) -> None:
        """The next bytes of the message, at least one; after the part before it was given by `step`."""
        self._part = part
        self._remaining -= len(part)
        self._reader.feed(part)

    def step(self, room: int) -> Piece | None:
        """Do some work: at most `STEP` bytes go in or come out. Returns the part, or ``None`` while it is not through.

        Raises:
            RemoteProtocolError: it is damaged, cut short, followed by something, or unpacks to more than the limit.
        """
        reader = self._reader
        self._unpacked += len(reader.read(STEP))
        self.cost = reader.cost
        if self._unpacked > self._limit:
            raise RemoteProtocolError(f"gRPC: a compressed message unpacks to more than {self._limit} bytes")
        if reader.hungry if self._remaining else reader.ended:
            first = self._remaining + len(self._part) == self._size
            return PackedPiece(self._part, self._remaining, first, self._size)
        return None


class _Reader:
    """Reads the unpacked bytes in turn.

    Attributes:
        cost: bytes that went in and came out in the last read.
    """

    def __init__(self, packed: bytes | bytearray) -> None:
        self.cost = 0
        self._packed = memoryview(packed)
        self._position = 0
        self._zlib = zlib.decompressobj(_GZIP)

    def copy(self) -> _Reader:
        """A second reader that goes on from here."""
        other = _Reader(b"")
        other._packed = self._packed
        other._position = self._position
        other._zlib = self._zlib.copy()
        return other

    def feed(self, packed: memoryview) -> None:
        """Hand over more of the message; what was handed over before must have been used up."""
        self._packed = packed
        self._position = 0

    @property
    def hungry(self) -> bool:
        """Whether everything that was handed over went in."""
        return self._position == len(self._packed) and not self._zlib.unconsumed_tail

    @property
    def ended(self) -> bool:
        """Whether everything was read."""
        return self._zlib.eof

    def read(self, limit: int) -> bytes:
        """The next bytes, at most ``limit`` and `STEP`; maybe none, as much in gzip unpacks to nothing."""
        left = self._zlib.unconsumed_tail  # zlib copies what it does not use, so it gets little at a time
        taken = self._packed[self._position : self._position + STEP - len(left)]
        self._position += len(taken)
        data = b"".join((left, taken)) if left else taken
        try:
            unpacked = self._zlib.decompress(data, min(limit, STEP))
        except zlib.error as error:
            raise RemoteProtocolError(f"gRPC: a compressed message is damaged: {error}") from error
        if self.ended:
            if self._zlib.unused_data or self._position < len(self._packed):
                raise RemoteProtocolError("gRPC: something follows on a compressed message within its frame")
        elif not data and not unpacked:
            raise RemoteProtocolError("gRPC: a compressed message is cut short")
        self.cost = len(data) - len(self._zlib.unconsumed_tail) + len(unpacked)
        return unpacked
