"""What an upgrade needs from below: a byte pipe. A TCP socket, or a stream through a relay."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class RawConnection(Protocol):
    """A reliable, ordered byte pipe to one remote address.

    The data path reads and writes with the ``_nowait`` methods and waits only when they say so: most reads and writes
    then cost one system call and no turn of the scheduler. The other methods serve the handshakes.

    At most one task reads and one task writes at a time. Every method but `aclose` and `abort` raises
    ``trio.BrokenResourceError`` when the pipe broke, and ``trio.ClosedResourceError`` after it was closed here.

    Attributes:
        local_address: this end, as multiaddr text.
        remote_address: the other end, as multiaddr text.
    """

    @property
    def local_address(self) -> str: ...

    @property
    def remote_address(self) -> str: ...

    def receive_nowait(self, buffer: memoryview) -> int | None:
        """Read what is there into ``buffer``.

        Returns:
            the number of bytes; 0 at the end of the stream; ``None`` if nothing is there yet.
        """

    async def wait_readable(self) -> None:
        """Return when `receive_nowait` would not return ``None``."""

    async def receive_into(self, buffer: memoryview) -> int:
        """Read at least one byte into ``buffer``, waiting for it.

        Returns:
            the number of bytes; 0 at the end of the stream.
        """

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Take as much of ``data`` as is possible without waiting.

        Returns:
            the number of bytes taken; 0 if there is no room.
        """

    async def wait_writable(self) -> None:
        """Return when `send_nowait` would take at least one byte."""

    def delivered(self) -> int:
        """Bytes that have reached the other end, as far as the pipe knows. Never fails; 0 once it is closed."""

    def undelivered(self) -> int:
        """Bytes that the pipe has taken and that have not reached the other end. Never fails; 0 once it is closed."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of ``data``. If cancelled, part of it may have been sent."""

    def send_eof(self) -> None:
        """Tell the other side that nothing more follows. Does not wait. Does nothing if the pipe is broken."""

    async def aclose(self) -> None:
        """Close in order: what was taken is still delivered. Never waits for the other side."""

    def abort(self) -> None:
        """Close at once, telling the other side by a TCP reset where there is one. Never fails."""
