"""Whole messages over gRPC's one stream on HTTP/2, on any stream of bytes: TCP, memory, or through the overlay.

The shell of `kas_libp2p.kaspa._grpc`: one task reads, one writes and keeps time. Both dialects of a Kaspa stream look
the same from above, as a `MessageChannel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p.errors import ConnectionLost, KasError, UpgradeError
from kas_libp2p.kaspa._grpc import CANCELLED, OK, P2P_PATH, RPC_PATH, GrpcMachine, GrpcSettings
from kas_libp2p.kaspa.channel import BATCH, HIGH_WATER, MessageChannel, Piece

__all__ = ["P2P_PATH", "RPC_PATH", "GrpcChannel", "GrpcSettings"]

READ_SIZE = 256 * 1024
"""Bytes read at once: as much as loopback gives, so that work per read is small beside work per byte."""
WRITE_SIZE = 256 * 1024
"""Bytes of messages per write."""
CLOSE_TIMEOUT = 1.0
"""Seconds that an orderly end may take to leave; the other side may not be reading."""
LINGER = 0.5
"""Seconds that the calling end waits, once all it said has left, for the called one to end too. Resetting the call at
once would have tonic drop what it has not read yet, such as a Reject. A round trip around the world fits."""


class GrpcChannel(MessageChannel):
    """One gRPC call as a channel of messages. Made by `client` or `server`; does nothing before `run`.

    Attributes:
        settings: how HTTP/2 is set up.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, machine: GrpcMachine) -> None:
        super().__init__(max_message=machine.settings.max_message)
        self.settings = machine.settings
        self._stream = stream
        self._machine = machine
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._kick = trio.Event()
        self._closing = False
        self._linger_until = 0.0
        self._flushed = trio.Event()
        self._scope = trio.CancelScope()

    @classmethod
    def client(
        cls, stream: trio.abc.HalfCloseableStream, *, settings: GrpcSettings | None = None, **changes: Any
    ) -> Self:
        """The end that makes the call.

        Args:
            stream: fresh; the channel owns it from now on.
            settings: how to set HTTP/2 up; or single settings of `GrpcSettings` by name.
        """
        return cls(stream, _machine(True, settings, changes))

    @classmethod
    def server(
        cls, stream: trio.abc.HalfCloseableStream, *, settings: GrpcSettings | None = None, **changes: Any
    ) -> Self:
        """The end that is called. Arguments as for `client`."""
        return cls(stream, _machine(False, settings, changes))

    # MessageChannel

    async def _receive_batch(self) -> list[Piece]:
        machine = self._machine
        while True:
            if machine.busy:
                await trio.lowlevel.checkpoint()  # a large message is unpacked by steps, and others run between them
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
            pieces = machine.take(BATCH)
            self._kick_writer()  # taking gives windows back, and finds faults
            if pieces or machine.ended:
                return pieces
            if machine.busy:
                continue
            if machine.error is not None:
                raise machine.error
            await self._readers.park()

    async def _send_batch(self, pieces: Sequence[Piece]) -> None:
        machine = self._machine
        machine.send(pieces)
        self._kick_writer()
        await trio.lowlevel.checkpoint_if_cancelled()
        while machine.queued > HIGH_WATER:
            await self._writers.park()
            if machine.error is not None:
                raise machine.error

    async def send_eof(self) -> None:
        self._machine.send_eof()
        self._kick.set()
        await trio.lowlevel.checkpoint()

    async def aclose(self, reason: str = "") -> None:
        machine = self._machine
        if not self._closing:
            self._closing = True
            self._linger_until = trio.current_time() + (LINGER if machine.client and not reason else 0)
            machine.send_eof(CANCELLED if reason else OK, reason)
            self._kick.set()
        try:
            with trio.move_on_after(CLOSE_TIMEOUT):
                await self._flushed.wait()
        finally:
            # Whoever still waits on the channel learns of the end before the stream goes away under it.
            machine.lose(ConnectionLost("closed by this side" + (f": {reason}" if reason else "")))
            self._wake_all()
            self._scope.cancel()
            if self._flushed.is_set():
                await self._stream.aclose()
            else:
                await trio.aclose_forcefully(self._stream)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    task_status.started()
                    await self._read()
        finally:
            self._machine.lose(ConnectionLost("the channel was ended by this side"))
            self._flushed.set()
            self._wake_all()
            if not self._closing:  # else whoever closes it closes the stream
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(self._stream)

    # Tasks

    async def _read(self) -> None:
        machine, stream = self._machine, self._stream
        while machine.error is None:
            try:
                data = await stream.receive_some(READ_SIZE)
            except _BROKEN as error:
                self._lose(error)
                return
            machine.receive(data, trio.current_time())
            self._readers.unpark_all()
            self._kick_writer()
            if machine.finished:
                self._writers.unpark_all()  # the stream is over, and what they wait for with it
        self._wake_all()

    async def _write(self) -> None:
        machine, stream = self._machine, self._stream
        try:
            while True:
                if over := self._closing and machine.finished and self._lingered():
                    machine.close()
                data = machine.data_to_send(WRITE_SIZE)
                self._writers.unpark_all()
                if data:
                    await stream.send_all(data)
                elif machine.error is not None or over:
                    return
                else:
                    self._kick = trio.Event()
                    deadline = machine.next_deadline()
                    if self._closing and machine.finished:
                        deadline = min(deadline, self._linger_until)
                    with trio.CancelScope(deadline=deadline):
                        await self._kick.wait()
                    machine.on_timeout(trio.current_time())
        except _BROKEN as error:
            self._lose(error)
        finally:
            self._flushed.set()
            if machine.error is not None:
                self._scope.cancel()  # the reader may wait for a peer that is silent

    def _kick_writer(self) -> None:
        if self._machine.sendable or self._closing:
            self._kick.set()

    def _lingered(self) -> bool:
        return self._machine.peer_ended or trio.current_time() >= self._linger_until

    def _lose(self, error: Exception) -> None:
        self._machine.lose(error if isinstance(error, KasError) else ConnectionLost("the connection broke"))
        self._wake_all()

    def _wake_all(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()
        self._kick.set()


_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, UpgradeError)
"""What a stream raises when it is gone, or when its protocol, taken for agreed, was not."""


def _machine(client: bool, settings: GrpcSettings | None, changes: dict[str, Any]) -> GrpcMachine:
    return GrpcMachine(client=client, settings=settings or GrpcSettings(**changes), now=trio.current_time())
