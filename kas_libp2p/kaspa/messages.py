"""The message dialect: whole Kaspa messages over any byte stream, with signs of life, compression and a cap on upload.

::

    send_pieces ─> queue (HIGH_WATER) ─> writer ─> [pack] ─> [upload cap] ─> stream
    receive_pieces <──────────── reader (parses at most BATCH at a time) <── stream

Nothing reads ahead: what the consumer does not take stays in the stream, whose windows hold the peer back. So memory
per direction is the queue and a batch. One task writes, so that a sign of life never waits for whoever is sending, nor
holds up whoever is receiving; another keeps the time. What is decided is decided in ``_messages``, ``_liveness``,
``_packing`` and ``_bucket``, which do no I/O.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_libp2p.errors import ConnectionLost, LocalProtocolError, ProtocolError, RemoteProtocolError, SessionLost
from kas_libp2p.kaspa._liveness import Act, Liveness
from kas_libp2p.kaspa._messages import (
    CUT,
    PROTOCOL,
    SMALL_MAX_MESSAGE,
    Alive,
    Capability,
    Close,
    CloseCode,
    Hello,
    Kind,
    MessageTooLarge,
    Probe,
    Reader,
    Unpack,
    encode,
    encode_pieces,
    frame,
)
from kas_libp2p.kaspa._packing import MIN_PLAIN, Packing, worth_sending
from kas_libp2p.kaspa.channel import (
    BATCH,
    HIGH_WATER,
    MAX_MESSAGE,
    MessageChannel,
    PathHung,
    Piece,
    abort,
    delivered_of,
)
from kas_libp2p.kaspa.upload import UPLOAD_SLICE, UploadCap
from kas_libp2p.metadata import OverlayStream

if TYPE_CHECKING:
    import zstandard

__all__ = ["PROTOCOL", "CloseCode", "MessagesChannel", "PeerClosed", "compression_available"]

CLOSE_WITHIN = 1.0
"""Seconds that an orderly end may take. The bridge has 2 s to stop, and a peer that does not read must not hold it."""

AT_ONCE = 64 * 1024
"""Bytes that whoever sends writes itself at most. For more, another turn of the scheduler makes no difference."""

LEVEL = 1
"""zstd level: the links that are packed for carry 1-20 MB/s, and a home's machine has better to do; see docs."""

MAX_WINDOW = 1 << 20
"""zstd window that we are willing to hold: as much as one frame may unpack to."""


class PeerClosed(ConnectionLost):
    """The other side closed the channel and said why.

    Attributes:
        code: a `CloseCode`, or a number that this version does not know.
        reason: its words; from the peer, so not to be trusted.
    """

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        try:
            name = CloseCode(code).name.lower().replace("_", " ")
        except ValueError:
            name = f"code {code}"
        super().__init__(f"closed by the peer ({name})" + (f": {reason}" if reason else ""))


def compression_available() -> bool:
    """Whether the optional package ``zstandard`` is installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def _unpacker() -> Unpack:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)

    def unpack(data: memoryview, size: int) -> bytes:
        try:
            # The frame's own claim decides how much is allocated, whatever max_output_size says: check it first.
            if zstandard.get_frame_parameters(data).content_size != size:
                raise RemoteProtocolError("a packed frame that does not say its size, or lies about it")
            plain = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise RemoteProtocolError(f"a packed frame that does not unpack: {error}") from None
        if len(plain) != size:
            raise RemoteProtocolError("a packed frame of another size than it says")
        return plain

    return unpack


class MessagesChannel(MessageChannel):
    """The message dialect on a stream. ``run`` has to run; see `kas_libp2p.kaspa.channel`.

    Args:
        stream: any byte stream that can be half-closed; the channel owns it from here on.
        max_message: bytes of one message that we accept and send.
        network: the Kaspa network behind us, told in our hello; empty if not known.
        compression: whether packed frames are offered and used. Without the package ``zstandard`` they are not.
        upload: a cap that we share with others.
        liveness: whether a path that hangs is to be found here. It never is on a stream that watches its paths itself:
            there is no timer then, and what the peer has got is told with the data that comes, for compression only.
        high_water: bytes queued above which a send waits.

    Attributes:
        peer_hello: the other side's hello, once it came.
        wire_sent, wire_received: bytes on the stream, framing and compression included.
        packing: how compression is decided, or ``None`` where it is not used.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        *,
        max_message: int = MAX_MESSAGE,
        network: str = "",
        compression: bool = True,
        upload: UploadCap | None = None,
        liveness: bool = True,
        high_water: int = HIGH_WATER,
    ) -> None:
        super().__init__(max_message=max_message)
        self.stream = stream
        compression = compression and compression_available()
        self._reader = Reader(max_message=max_message, unpack=self._unpack if compression else None)
        self._unpacker: Unpack | None = None
        self._compressor: zstandard.ZstdCompressor | None = None
        self._upload = upload
        self._cut = CUT if upload is None else UPLOAD_SLICE
        self._high_water = high_water
        now = trio.current_time()
        self._liveness = Liveness(now)
        self._gaps = 0
        self._watched = stream if isinstance(stream, OverlayStream) and stream.watches_paths else None
        self._liveness_wanted = liveness and self._watched is None
        self.packing = Packing(now) if compression else None
        self.peer_hello: Hello | None = None
        self._peer_close: Close | None = None
        self._send_limit = SMALL_MAX_MESSAGE

        self._out: list[bytes | memoryview] = []  # two buffers a frame
        self._held: list[bytes | memoryview] = []  # what waits for the peer's hello, as it may be too large
        self._slices: deque[tuple[bytes, int]] = deque()  # what waits for the upload cap, and its bytes of the queue
        self._turn: float | None = None  # when the first of them may leave
        self._out_bytes = 0  # in all three
        self._hello: Hello | None = Hello(
            Capability.ZSTD if compression else Capability.NONE, max(max_message, SMALL_MAX_MESSAGE), network
        )
        self._alive_due = False
        self._probe_due = False
        self._close: Close | None = None
        self._eof_wanted = False
        self._eof_done = False
        self._eof_received = False
        self._failure: Callable[[], Exception] | None = None
        self._writing = False
        self._closed = False
        self._wake_writer = trio.lowlevel.ParkingLot()
        self._wrote = trio.lowlevel.ParkingLot()
        self._over = trio.Event()

    # -- State ---------------------------------------------------------------------------------------------------------

    @property
    def wire_sent(self) -> int:
        return self._liveness.sent

    @property
    def wire_received(self) -> int:
        return self._liveness.received

    @property
    def unacknowledged(self) -> int:
        """Bytes that we handed to the stream and of which the peer has not said that it took them."""
        return self._liveness.sent - self._liveness.acknowledged

    @property
    def last_heard(self) -> float:
        """When anything came from the peer, on trio's clock."""
        return self._liveness.last_heard

    @property
    def gaps(self) -> int:
        """See `MessageChannel.gaps`."""
        return 0 if self._watched is None else self._watched.gaps

    def _fail(self, failure: Callable[[], Exception]) -> None:
        if self._failure is None:
            self._failure = failure
            self._wrote.unpark_all()
            self._wake_writer.unpark_all()

    def _fail_lost(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if isinstance(error, SessionLost):
            code, by_peer = error.code, error.by_peer
            self._fail(lambda: SessionLost(text, code=code, by_peer=by_peer))
        else:
            self._fail(lambda: ConnectionLost(text))

    def _abort_stream(self) -> None:
        """End the stream at once; what can't be is closed by `run`."""
        abort(self.stream)
        self._over.set()

    # -- Receiving -----------------------------------------------------------------------------------------------------

    def _unpack(self, data: memoryview, size: int) -> bytes:
        if self._unpacker is None:
            self._unpacker = _unpacker()  # made when first needed: it holds some hundred kB
        return self._unpacker(data, size)

    async def _receive_batch(self) -> list[Piece]:
        reader, liveness = self._reader, self._liveness
        if not reader.wants_data:
            await trio.lowlevel.checkpoint()
        while True:
            while not reader.wants_data:
                if pieces := self._take():
                    return pieces
            if self._peer_close is not None:
                return self._peer_said_goodbye(self._peer_close)
            if self._eof_received:
                await trio.lowlevel.checkpoint()
                return []
            if self._failure is not None:
                raise self._failure()
            liveness.on_reading(trio.current_time())
            try:
                data = await self.stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail_lost(error)
                assert self._failure is not None
                raise self._failure() from error
            if not data:
                self._eof_received = True
                if reader.in_message:
                    self._break(RemoteProtocolError("the stream ended within a message"))
                return []
            liveness.on_received(len(data), trio.current_time())
            control_bytes = reader.control_bytes
            reader.feed(data)
            pieces = self._take()
            if pieces or reader.control_bytes - control_bytes < len(data):
                liveness.on_data(liveness.last_heard)
                if not self._liveness_wanted and self.packing is not None and liveness.tell_due(liveness.last_heard):
                    self._alive_due = True  # the peer's compression goes by it
                    self._wake_writer.unpark_all()
            if pieces:
                return pieces

    def _take(self) -> list[Piece]:
        try:
            pieces = self._reader.take(BATCH)
            controls = self._reader.controls
            while controls:
                self._on_control(controls.popleft())
        except ProtocolError as error:
            self._break(error)
        return pieces

    def _on_control(self, control: Hello | Alive | Probe | Close) -> None:
        if isinstance(control, Alive):
            if not self._liveness.on_alive(control.received):
                raise RemoteProtocolError(f"acknowledged {control.received} bytes, which is not possible")
            if self.packing is not None:
                gap, self._gaps = self.gaps != self._gaps, self.gaps
                self.packing.on_alive(control.received, control.busy, trio.current_time(), gap=gap)
        elif isinstance(control, Probe):
            self._alive_due = True
            self._wake_writer.unpark_all()
        elif isinstance(control, Hello):
            self.peer_hello = control
            self._send_limit = control.max_message
            if not control.capabilities & Capability.ZSTD:
                self.packing = None
            self._out += self._held
            self._held.clear()
            self._wake_writer.unpark_all()
        else:
            self._peer_close = control
            if control.code != CloseCode.ENDED or control.reason:
                code, reason = control.code, control.reason
                self._fail(lambda: PeerClosed(code, reason))

    def _peer_said_goodbye(self, close: Close) -> list[Piece]:
        if close.code == CloseCode.ENDED and not close.reason:
            if self._reader.in_message:
                self._break(RemoteProtocolError("closed within a message"))
            return []
        raise PeerClosed(close.code, close.reason)

    def _break(self, error: ProtocolError) -> None:
        """The peer broke the protocol: tell it, and everybody here."""
        text = str(error)
        code = CloseCode.TOO_LARGE if isinstance(error, MessageTooLarge) else CloseCode.PROTOCOL
        kind = type(error)
        if self._close is None:
            self._close = Close(code, text)
        self._fail(lambda: kind(text))
        raise error

    # -- Sending -------------------------------------------------------------------------------------------------------

    async def _send_batch(self, pieces: Sequence[Piece]) -> None:
        if self._failure is not None:
            raise self._failure()
        if self._eof_wanted:
            raise LocalProtocolError("this side was ended")
        largest = max(piece.size for piece in pieces) if pieces else 0
        buffers = encode_pieces(pieces, self._cut)
        if largest > self._send_limit and self.peer_hello is not None:
            # The message was counted as begun: nothing can follow it.
            self._fail(lambda: LocalProtocolError(f"the peer takes messages of at most {self._send_limit} bytes"))
            assert self._failure is not None
            raise self._failure()
        self._liveness.on_moved(trio.current_time())
        if self._held or largest > self._send_limit:
            self._held += buffers
            self._out_bytes += sum(map(len, buffers))
        elif not (self._wake_writer and self._wrote_now(buffers)):
            self._out += buffers
            self._out_bytes += sum(map(len, buffers))
            self._wake_writer.unpark_all()
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._out_bytes > self._high_water:
            if self._failure is not None:
                raise self._failure()
            await self._wrote.park()

    def _wrote_now(self, buffers: list[bytes | memoryview]) -> bool:
        """Write in the task of who sends, where the stream takes it at once. Only while the writer has nothing to do,
        which is spared a turn."""
        stream, packing = self.stream, self.packing
        if self._upload is not None or (packing is not None and packing.on) or not isinstance(stream, OverlayStream):
            return False
        if sum(map(len, buffers)) > AT_ONCE:
            return False
        data = b"".join(buffers)
        if not stream.send_nowait(data):
            return False
        self._liveness.on_sent(len(data))
        return True

    async def _write(self) -> None:
        while True:
            while not (self._out or self._slices or self._alive_due or self._probe_due or self._hello):
                if self._failure is not None or (self._eof_wanted and not self._held):
                    await self._write_end()
                    return
                await self._wake_writer.park()
            if self._upload is None:
                await self._write_once()
            else:
                await self._write_capped(self._upload)

    async def _write_once(self) -> None:
        control = self._due()
        out, _, queued = self._take_out()
        try:
            await self._send_bytes(b"".join([control, *out]))
        finally:
            self._has_left(queued)

    async def _write_capped(self, upload: UploadCap) -> None:
        """Write a slice, when it is its turn; what keeps the channel alive goes before it, and is counted."""
        if control := self._due():
            upload.charge(len(control))
            await self._send_bytes(control)
            return
        if not self._slices:
            self._slices.extend(_sliced(*self._take_out()))
        data, queued = self._slices[0]
        now = trio.current_time()
        if self._turn is None:
            self._turn = upload.reserve(len(data))
        if self._turn > now:
            with trio.move_on_at(self._turn):
                await self._wake_writer.park()
            if self.packing is not None:
                self.packing.on_waited(trio.current_time() - now)
            return
        self._turn = None
        self._slices.popleft()
        try:
            await self._send_bytes(data)
        finally:
            self._has_left(queued)

    def _due(self) -> bytes:
        """The control frames that are due."""
        control = bytearray()
        now = trio.current_time()
        if self._hello is not None:
            control += encode(self._hello)
            self._hello = None
        if self._probe_due:
            control += encode(Probe())
            self._probe_due = False
        if self._alive_due:
            control += encode(Alive(self._liveness.received, self._liveness.busy_ms(now)))
            self._alive_due = False
            self._liveness.on_told(now)
        return bytes(control)

    def _take_out(self) -> tuple[list[bytes | memoryview], int, int]:
        """The frames that wait, packed if that pays; of how many buffers each is; how much of the queue they were."""
        out, self._out = self._out, []
        queued = sum(map(len, out))
        if self.packing is not None and self.packing.on and queued >= MIN_PLAIN:
            return self._pack(out), 1, queued
        return out, 2, queued

    def _has_left(self, queued: int) -> None:
        self._out_bytes -= queued
        if self._out_bytes <= self._high_water:
            self._wrote.unpark_all()

    async def _send_bytes(self, data: bytes | memoryview) -> None:
        # Counted before: the peer may acknowledge a part of it while the rest is being sent.
        self._liveness.on_sent(len(data))
        began = trio.current_time()
        await self.stream.send_all(data)
        if self.packing is not None:
            self.packing.on_waited(trio.current_time() - began)

    def _pack(self, out: list[bytes | memoryview]) -> list[bytes | memoryview]:
        import zstandard

        if self._compressor is None:
            self._compressor = zstandard.ZstdCompressor(level=LEVEL)
        packing, compressor = self.packing, self._compressor
        assert packing is not None
        packed: list[bytes | memoryview] = []
        group: list[bytes | memoryview] = []
        size = 0

        def flush() -> None:
            plain = b"".join(group)
            began = time.perf_counter()
            content = compressor.compress(plain)
            packing.on_packed(len(plain), len(content), time.perf_counter() - began, trio.current_time())
            if worth_sending(len(plain), len(content)):
                packed.append(frame(Kind.PACKED, len(plain).to_bytes(4, "big") + content))
            else:
                packed.append(plain)

        for index in range(0, len(out), 2):
            length = len(out[index]) + len(out[index + 1])
            if group and size + length > self._cut:
                flush()
                group, size = [], 0
            group += out[index : index + 2]
            size += length
        flush()
        return packed

    async def _write_end(self) -> None:
        if self._close is not None:
            await self._send_bytes(encode(self._close))
            self._close = None
        await self.stream.send_eof()
        self._eof_done = True
        self._wrote.unpark_all()

    # -- Life ----------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write and keep time until the channel has ended. See `MessageChannel.run`."""
        self._writing = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_writer)
                if self._liveness_wanted:
                    nursery.start_soon(self._keep_time)
                task_status.started()
                await self._over.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._fail(lambda: ConnectionLost("the channel was ended by this side"))
            if not self._closed:
                self._closed = True
                await self._close_forcefully()

    async def _run_writer(self) -> None:
        try:
            await self._write()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            # The peer may have said why before it went: whoever receives will find that first.
            self._fail_lost(error)
        finally:
            self._writing = False
            self._wrote.unpark_all()

    async def _keep_time(self) -> None:
        liveness = self._liveness
        while True:
            deadline = liveness.next_deadline()
            # Deadlines move towards us only as messages are sent after a long pause: a look each second finds that.
            # And it finds whether what was sent still moves.
            latest = trio.current_time() + 1.0
            await trio.sleep_until(latest if deadline is None else min(deadline, latest))
            liveness.on_delivered(delivered_of(self.stream), trio.current_time())
            for act in liveness.on_timeout(trio.current_time()):
                if act is Act.TELL:
                    self._alive_due = True
                elif act is Act.PROBE:
                    self._probe_due = True
                else:
                    silent = trio.current_time() - liveness.last_heard
                    owed = self.unacknowledged
                    self._fail(
                        lambda silent=silent, owed=owed: PathHung(  # type: ignore[misc]
                            f"the path hangs: nothing came for {silent:.1f} s, {owed} bytes are not acknowledged"
                        )
                    )
                    self._abort_stream()
                    return
                self._wake_writer.unpark_all()

    async def send_eof(self) -> None:
        """Send what is queued, then end our side. Receiving goes on."""
        self._eof_wanted = True
        self._wake_writer.unpark_all()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._eof_done:
            if self._failure is not None:
                raise self._failure()
            await self._wrote.park()

    async def aclose(self, reason: str = "", code: CloseCode = CloseCode.ENDED) -> None:
        """Send what is queued and why it ends, then close the stream; all within `CLOSE_WITHIN`.

        Args:
            reason: text for the peer, at most `MAX_REASON` bytes of it.
            code: the same for programs.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        orderly = False
        try:
            with trio.move_on_after(CLOSE_WITHIN):
                if self._close is None and (reason or code is not CloseCode.ENDED):
                    self._close = Close(code, reason)
                self._eof_wanted = True
                self._wake_writer.unpark_all()
                while self._writing:
                    await self._wrote.park()
                await self.stream.aclose()
                orderly = True
        finally:
            self._fail(lambda: ConnectionLost("the channel was closed by this side"))
            if not orderly:
                await self._close_forcefully()
            self._over.set()

    async def _close_forcefully(self) -> None:
        self._abort_stream()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self.stream)


def _sliced(out: list[bytes | memoryview], each: int, queued: int) -> list[tuple[bytes, int]]:
    """Frames of ``each`` buffers, joined to slices of `UPLOAD_SLICE` bytes at most, if none is larger itself; the queue
    counts with the last one."""
    slices: list[tuple[bytes, int]] = []
    begin = size = 0
    for start in range(0, len(out), each):
        length = sum(map(len, out[start : start + each]))
        if size and size + length > UPLOAD_SLICE:
            slices.append((b"".join(out[begin:start]), 0))
            begin, size = start, 0
        size += length
    slices.append((b"".join(out[begin:]), queued))
    return slices
