"""One gzip-compressed message, unpacked by steps: bounded in memory whatever it unpacks to, and in time per step.

Who passes a message on has to say its size first, and only the end of a compressed one tells it. So what unpacks to
more than `KEPT` is unpacked twice: once to count it, thrown away, and again as it is taken. A message of a few KiB that
unpacks to the limit (gzip reaches 1 : 1030) then costs time, in small steps between which others run, but no memory.

Source: RFC 1952 (gzip), as gRPC's message encoding.
"""

from __future__ import annotations

import zlib

from kas_libp2p.errors import RemoteProtocolError
from kas_libp2p.kaspa.channel import BATCH, Piece

KEPT = 1024 * 1024
"""Bytes unpacked that are kept until the size is known; the messages of a synced node are smaller."""
INPUT = 32 * 1024
"""Compressed bytes given to zlib at a time; what it does not use at once it copies."""
_GZIP = 31


class Unpacker:
    """Unpacks one message.

    Args:
        packed: the whole compressed message.
        limit: bytes that it may unpack to.

    Attributes:
        done: whether all pieces were given.
    """

    def __init__(self, packed: bytes | bytearray, limit: int) -> None:
        self.done = False
        self._limit = limit
        self._reader = _Reader(packed)
        self._kept: list[bytes] = []
        self._later: _Reader | None = None
        self._count = 0
        self._size: int | None = None
        self._given = 0

    def step(self, room: int) -> list[Piece]:
        """Do some work: at most `BATCH` bytes are unpacked.

        Args:
            room: bytes that the pieces may have, at least 1.

        Returns:
            Pieces, or an empty list while the size is not known.

        Raises:
            RemoteProtocolError: it is damaged, cut short, followed by something, or larger than the limit.
        """
        if self._size is None:
            self._look()
            return []
        pieces: list[Piece] = []
        if not self._size:
            pieces.append(Piece(b"", 0, True, 0))
        while room > 0 and self._given < self._size:
            if self._kept:
                data = self._kept[0]
                if len(data) > room:
                    self._kept[0] = data[room:]
                    data = data[:room]
                else:
                    self._kept.pop(0)
            elif pieces:
                break
            else:
                assert self._later is not None
                data = self._later.read(min(room, BATCH))
            first = not self._given
            self._given += len(data)
            pieces.append(Piece(data, self._size - self._given, first, self._size))
            room -= len(data)
        self.done = self._given == self._size
        return pieces

    def _look(self) -> None:
        """Unpack for the first time."""
        data = self._reader.read(BATCH)
        self._count += len(data)
        if self._count > self._limit:
            raise RemoteProtocolError(f"gRPC: a compressed message unpacks to more than {self._limit} bytes")
        if self._later is None and data:
            self._kept.append(data)
            if self._count >= KEPT:
                self._later = self._reader.copy()
        if self._reader.ended:
            self._size = self._count


class _Reader:
    """Reads the unpacked bytes in turn."""

    def __init__(self, packed: bytes | bytearray) -> None:
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

    @property
    def ended(self) -> bool:
        """Whether everything was read."""
        return self._zlib.eof

    def read(self, limit: int) -> bytes:
        """At least a byte, unless this is the end."""
        while not self._zlib.eof:
            data: bytes | memoryview = self._zlib.unconsumed_tail
            if not data:
                data = self._packed[self._position : self._position + INPUT]
                self._position += len(data)
            try:
                unpacked = self._zlib.decompress(data, limit)
            except zlib.error as error:
                raise RemoteProtocolError(f"gRPC: a compressed message is damaged: {error}") from error
            if self.ended and (self._zlib.unused_data or self._position < len(self._packed)):
                raise RemoteProtocolError("gRPC: something follows on a compressed message within its frame")
            if unpacked:
                return unpacked
            if not data:
                raise RemoteProtocolError("gRPC: a compressed message is cut short")
        return b""
