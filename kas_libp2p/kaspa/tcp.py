"""The TCP connection to a kaspad: trio's stream, with less work for one small message after a silence."""

from __future__ import annotations

import os

import trio

FEW_BYTES = 16 * 1024
"""A read of less found the line nearly empty: the next one waits for it to be readable instead of trying at once."""


class KaspadStream(trio.abc.HalfCloseableStream):
    """A ``trio.SocketStream`` that can be written without waiting, and does not look for what is hardly there.

    Args:
        sock: connected. Belongs to this object from now on.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self._stream = trio.SocketStream(sock)
        self._rested = True

    def send_nowait(self, data: bytes) -> int:
        """Take as much of ``data`` as is possible without waiting. Nobody else may be writing.

        Returns:
            the number of bytes taken.

        Raises:
            trio.BrokenResourceError: the connection is gone.
        """
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._rested and isinstance(max_bytes, int) and max_bytes > 0 and self.socket.fileno() >= 0:
            await trio.lowlevel.wait_readable(self.socket.fileno())
            try:
                data = os.read(self.socket.fileno(), max_bytes)
            except OSError:
                data = await self._stream.receive_some(max_bytes)  # it tells what is wrong, or waits
        else:
            data = await self._stream.receive_some(max_bytes)
        self._rested = len(data) < FEW_BYTES
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()
