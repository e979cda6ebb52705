"""GET and SET on a Redis server: what the peers of the libp2p project's tests tell one another with.

Source: the Redis serialization protocol (RESP2), https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

import trio

from kas_libp2p.errors import ConnectionLost, RemoteProtocolError

PORT = 6379
MAX_VALUE = 4096
"""Bytes of a line or a value; both are an address at most."""
CHUNK = 1024


class Redis(trio.abc.AsyncResource):
    """One connection, one command at a time. Made by `connect`; a context manager."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._held = bytearray()

    async def aclose(self) -> None:
        """Hang up."""
        await self._stream.aclose()

    async def get(self, key: str) -> str | None:
        """The value of a key; ``None`` if it has none.

        Raises:
            ConnectionLost: the server hung up.
            RemoteProtocolError: it answered with an error, or with nothing that is an answer.
        """
        answer = await self._command("GET", key)
        size = int(answer[1:]) if answer[:1] == "$" and answer[1:].lstrip("-").isdecimal() else None
        if size is None or size > MAX_VALUE:
            raise RemoteProtocolError(f"redis answers GET with {answer!r}")
        if size < 0:
            return None
        while len(self._held) < size + 2:
            await self._receive()
        value = self._held[:size].decode(errors="replace")
        del self._held[: size + 2]
        return value

    async def set(self, key: str, value: str) -> None:
        """Give a key a value.

        Raises:
            ConnectionLost, RemoteProtocolError: as `get`.
        """
        answer = await self._command("SET", key, value)
        if answer != "+OK":
            raise RemoteProtocolError(f"redis answers SET with {answer!r}")

    async def _command(self, *words: str) -> str:
        """Send a command; returns the first line of the answer."""
        parts = [f"*{len(words)}\r\n".encode()]
        for word in words:
            data = word.encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(data), data))
        try:
            await self._stream.send_all(b"".join(parts))
        except trio.BrokenResourceError as error:
            raise ConnectionLost("redis hung up") from error
        while (end := self._held.find(b"\r\n")) < 0:
            if len(self._held) > MAX_VALUE:
                raise RemoteProtocolError("redis answers with a line that does not end")
            await self._receive()
        line = self._held[:end].decode(errors="replace")
        del self._held[: end + 2]
        return line

    async def _receive(self) -> None:
        try:
            data = await self._stream.receive_some(CHUNK)
        except trio.BrokenResourceError as error:
            raise ConnectionLost("redis hung up") from error
        if not data:
            raise ConnectionLost("redis hung up")
        self._held += data


async def connect(host: str, port: int = PORT) -> Redis:
    """Connect to a server.

    Raises:
        OSError: it can't be reached.
    """
    return Redis(await trio.open_tcp_stream(host, port))
