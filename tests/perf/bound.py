"""How fast Noise and Yamux framing can be in Python on trio: the ceiling that the library's data path is held against.

`Framed` is one stream on one TCP connection. It seals, frames, enforces windows and carries back pressure, as no data
path can do without. It lacks what a connection of ours has beyond that: a handshake, other streams and fairness between
them, limits, deadlines, growing windows, and errors that say what happened.
"""

from __future__ import annotations

import struct
from collections import deque

import trio

from kas_libp2p.config import KIB, MIB
from kas_libp2p.transport._noise import FULL_FRAME, MAX_PLAINTEXT, Opener, Sealer, sealed_size
from kas_libp2p.transport.waiter import Waiter

KEY = bytes(32)
WINDOW = 16 * MIB
HIGH_WATER = 256 * KIB
BATCH = 4 * MAX_PLAINTEXT
"""Plaintext bytes sealed at once."""
READ = 16 * FULL_FRAME
_header = struct.Struct(">BBHII")
_DATA, _UPDATE = 0, 1
_FIN = 4


class Framed:
    """A stream with trio's words.

    Args:
        sock: connected. Belongs to this object from now on; `run` closes it.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._sealer, self._opener = Sealer(KEY), Opener(KEY)
        self._queue: list[bytes] = []
        self._queued = 0
        self._need = 0  # payload bytes to come of the frame under way
        self._window = WINDOW
        self._fin = self._closed = self._eof = False
        self._chunks: deque[bytes] = deque()
        self._consumed = 0
        self._readable, self._writable, self._flusher = Waiter(), Waiter(), Waiter()

    async def run(self) -> None:
        """Carry the stream until both sides have closed it."""
        sock = self._sock
        with sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                nursery.start_soon(self._flush)

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._window < len(data) or self._queued >= HIGH_WATER:
            await self._writable.wait()
        self._window -= len(data)
        self._say(_DATA, 0, len(data), data)

    async def send_eof(self) -> None:
        if not self._fin:
            self._fin = True
            self._say(_DATA, _FIN, 0)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self.send_eof()
        self._closed = True
        self._flusher.wake()

    async def receive_some(self) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if self._eof:
                return b""
            await self._readable.wait()
        data = self._chunks.popleft()
        self._consumed += len(data)
        if self._consumed >= WINDOW // 2:
            self._say(_UPDATE, 0, self._consumed)
            self._consumed = 0
        return data

    def _say(self, kind: int, flags: int, length: int, data: bytes = b"") -> None:
        self._queue += (_header.pack(0, kind, flags, 1, length), data)
        self._queued += _header.size + len(data)
        self._flusher.wake()

    async def _flush(self) -> None:
        sock, seal_into = self._sock, self._sealer.seal_into
        wire = memoryview(bytearray(sealed_size(2 * HIGH_WATER + BATCH)))
        while True:
            while not self._queue:
                if self._closed:
                    sock.shutdown(trio.socket.SHUT_WR)
                    return
                await self._flusher.wait()
            plain = b"".join(self._queue)
            self._queue.clear()
            self._queued = 0
            self._writable.wake()
            for start in range(0, len(plain), BATCH):
                size = seal_into(memoryview(plain)[start : start + BATCH], wire)
                sent = 0
                while sent < size:
                    sent += await sock.send(wire[sent:size])

    async def _read(self) -> None:
        sock, open_into = self._sock, self._opener.open_into
        wire, plain = memoryview(bytearray(READ)), memoryview(bytearray(READ))
        filled = kept = 0  # bytes of a cut message, and of a cut header, at the front of the two
        while count := await sock.recv_into(wire[filled:]):
            filled += count
            used, made = open_into(wire[:filled], plain[kept:])
            wire[: filled - used] = wire[used:filled]
            filled -= used
            made += kept
            kept = made - self._parse(plain[:made])
            plain[:kept] = plain[made - kept : made]
        self._eof = self._closed = True
        self._readable.wake()
        self._flusher.wake()

    def _parse(self, plain: memoryview) -> int:
        """Take whole headers and what there is of payload. Returns the number of bytes taken."""
        start, size, need = 0, len(plain), self._need
        payload = []
        while True:
            if need:
                stop = min(start + need, size)
                payload.append(plain[start:stop])
                need -= stop - start
                start = stop
            if size - start < _header.size:
                break
            _, kind, flags, _, length = _header.unpack_from(plain, start)
            start += _header.size
            if kind == _DATA:
                need = length
                self._eof = bool(flags & _FIN)
            else:
                self._window += length
                self._writable.wake()
        self._need = need
        if data := b"".join(payload):
            self._chunks.append(data)
        self._readable.wake()
        return start
