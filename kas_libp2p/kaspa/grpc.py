"""Whole messages over gRPC's one stream on HTTP/2, on any stream of bytes: TCP, memory, or through the overlay.

The shell of `kas_libp2p.kaspa._grpc`: one task reads, one writes, one keeps time. Both dialects of a Kaspa stream look
the same from above, as a `MessageChannel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p.errors import ConnectionLost, KasError, UpgradeError
from kas_libp2p.kaspa._grpc import CANCELLED, OK, P2P_PATH, RPC_PATH, GrpcMachine, GrpcSettings
from kas_libp2p.kaspa.channel import BATCH, HIGH_WATER, MessageChannel, PathHung, Piece, abort, delivered_of
from kas_libp2p.kaspa.tcp import FEW_BYTES, KaspadStream
from kas_libp2p.kaspa.upload import UPLOAD_SLICE, UploadCap

__all__ = ["P2P_PATH", "RPC_PATH", "GrpcChannel", "GrpcSettings"]

READ_SIZE = 256 * 1024
"""Bytes read at once: as much as loopback gives, so that work per read is small beside work per byte."""
READ_FEW = 64 * 1024
"""Bytes of a read after one that found less than `FEW_BYTES`: memory for `READ_SIZE` comes from the system each time,
which takes ten times as long as the read."""
WRITE_SIZE = 256 * 1024
"""Bytes of messages per write."""
CLOSE_TIMEOUT = 1.0
"""Seconds that an orderly end may take to leave; the other side may not be reading."""
LOOK_EVERY = 1.0
"""Seconds between two looks at the clock where a hung path is to be found soon: what is sent after a long pause moves
deadlines nearer, and while a ping is not answered, what still moves towards the peer puts them off."""
LINGER = 0.5
"""Seconds that the calling end waits, once all it said has left, for the called one to end too. Resetting the call at
once would have tonic drop what it has not read yet, such as a Reject. A round trip around the world fits."""


class GrpcChannel(MessageChannel):
    """One gRPC call as a channel of messages. Made by `client` or `server`; does nothing before `run`.

    Attributes:
        settings: how HTTP/2 is set up.
    """

    def __init__(
        self, stream: trio.abc.HalfCloseableStream, machine: GrpcMachine, upload: UploadCap | None = None
    ) -> None:
        super().__init__(max_message=machine.settings.max_message)
        self.settings = machine.settings
        self._stream = stream
        self._machine = machine
        self._upload = upload
        self._turn: tuple[float, int] | None = None  # when the next bytes may leave, and how many
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        self._kick = trio.lowlevel.ParkingLot()  # the writer is here whenever it has nothing to write
        self._rest: bytes | memoryview = b""  # what the stream did not take of a write by who sends
        self._closing = False
        self._linger_until = 0.0
        self._flushed = trio.Event()
        self._scope = trio.CancelScope()

    @classmethod
    def client(
        cls,
        stream: trio.abc.HalfCloseableStream,
        *,
        settings: GrpcSettings | None = None,
        upload: UploadCap | None = None,
        **changes: Any,
    ) -> Self:
        """The end that makes the call.

        Args:
            stream: fresh; the channel owns it from now on.
            settings: how to set HTTP/2 up; or single settings of `GrpcSettings` by name.
            upload: a cap on what leaves, shared with others.
        """
        return cls(stream, _machine(True, settings, changes), upload)

    @classmethod
    def server(
        cls,
        stream: trio.abc.HalfCloseableStream,
        *,
        settings: GrpcSettings | None = None,
        upload: UploadCap | None = None,
        **changes: Any,
    ) -> Self:
        """The end that is called. Arguments as for `client`."""
        return cls(stream, _machine(False, settings, changes), upload)

    @property
    def last_heard(self) -> float:
        """When anything came from the peer, on trio's clock."""
        return self._machine.last_heard

    # MessageChannel

    @property
    def takes_packed(self) -> bool:
        return self._machine.takes_packed

    async def _receive_batch(self) -> list[Piece]:
        machine = self._machine
        machine.gives_packed = self.gives_packed
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
        machine.send(pieces, trio.current_time())
        stream = self._stream
        if self._kick and self._upload is None and isinstance(stream, KaspadStream) and machine.sendable:
            self._write_now(stream)
        self._kick_writer()
        await trio.lowlevel.checkpoint_if_cancelled()
        while machine.queued > HIGH_WATER:
            await self._writers.park()
            if machine.error is not None:
                raise machine.error

    async def send_eof(self) -> None:
        self._machine.send_eof()
        self._kick.unpark_all()
        await trio.lowlevel.checkpoint()

    async def aclose(self, reason: str = "") -> None:
        machine = self._machine
        if not self._closing:
            self._closing = True
            self._linger_until = trio.current_time() + (LINGER if machine.client and not reason else 0)
            machine.send_eof(CANCELLED if reason else OK, reason)
            self._kick.unpark_all()
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
                    nursery.start_soon(self._keep_time)
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
        size = READ_FEW
        while machine.error is None:
            try:
                data = await stream.receive_some(size)
            except _BROKEN as error:
                self._lose(error)
                return
            size = READ_FEW if len(data) < FEW_BYTES else READ_SIZE
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
                rest, self._rest = self._rest, b""
                data, until = (rest, math.inf) if rest else self._leaving()
                self._writers.unpark_all()
                if data:
                    await stream.send_all(data)
                elif machine.error is not None or over:
                    return
                else:
                    if self._closing and machine.finished:
                        until = self._linger_until
                    with trio.CancelScope(deadline=until):
                        await self._kick.park()
        except _BROKEN as error:
            self._lose(error)
        finally:
            self._flushed.set()
            if machine.error is not None:
                self._scope.cancel()  # the reader may wait for a peer that is silent

    def _write_now(self, stream: KaspadStream) -> None:
        """Write what the stream takes at once, in the task of who sends; the writer, which has nothing to do, is woken
        for the rest only."""
        data = self._machine.data_to_send(WRITE_SIZE)
        try:
            taken = stream.send_nowait(data)
        except _BROKEN as error:
            self._lose(error)
            return
        if taken < len(data):
            self._rest = memoryview(data)[taken:]
            self._kick.unpark_all()

    def _leaving(self) -> tuple[bytes | memoryview, float]:
        """What may leave now, and when to look again at the latest. For the upload cap only messages wait: what keeps
        the connection alive goes before them, and is counted."""
        machine, upload = self._machine, self._upload
        if upload is None:
            return machine.data_to_send(WRITE_SIZE), math.inf
        data = machine.data_to_send(0)
        upload.charge(len(data))
        if data or not (machine.queued and machine.sendable):
            return data, math.inf
        if self._turn is None:
            size = min(machine.queued, UPLOAD_SLICE)
            self._turn = upload.reserve(size), size
        at, size = self._turn
        if at > trio.current_time():
            return b"", at
        self._turn = None
        return machine.data_to_send(size), math.inf

    async def _keep_time(self) -> None:
        """In a task of its own: the writer may wait for ever on a path that hangs."""
        machine = self._machine
        look_every = LOOK_EVERY if self.settings.liveness else math.inf
        while machine.error is None:
            await trio.sleep_until(min(machine.next_deadline(), trio.current_time() + look_every))
            machine.on_timeout(trio.current_time(), delivered_of(self._stream))
            self._kick_writer()
        if isinstance(machine.error, PathHung):
            abort(self._stream)
        self._wake_all()
        self._scope.cancel()

    def _kick_writer(self) -> None:
        if self._machine.sendable or self._closing:
            self._kick.unpark_all()

    def _lingered(self) -> bool:
        return self._machine.peer_ended or trio.current_time() >= self._linger_until

    def _lose(self, error: Exception) -> None:
        self._machine.lose(error if isinstance(error, KasError) else ConnectionLost("the connection broke"))
        self._wake_all()

    def _wake_all(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()
        self._kick.unpark_all()


_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, UpgradeError)
"""What a stream raises when it is gone, or when its protocol, taken for agreed, was not."""


def _machine(client: bool, settings: GrpcSettings | None, changes: dict[str, Any]) -> GrpcMachine:
    return GrpcMachine(client=client, settings=settings or GrpcSettings(**changes), now=trio.current_time())
