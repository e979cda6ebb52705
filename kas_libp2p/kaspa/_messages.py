"""``/kas-libp2p/messages/1.0.0`` without I/O: its frames, written and read. ``docs/messages-protocol.md`` describes the
same wire for other implementations.

A direction of a stream is a sequence of frames, each four bytes of header (kind, and the length of what follows as a
24-bit number, big-endian) and a payload. The first frame is a hello. After that a side sends messages, and now and then
a control frame between two of them or between two parts of a long one. The bytes depend on nothing under them: the same
sequence can be moved from one stream to another by whoever carries it.

Nobody waits for the other's hello to begin: only compression, and messages above `SMALL_MAX_MESSAGE`, do.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from kas_libp2p.errors import LocalProtocolError, RemoteProtocolError
from kas_libp2p.kaspa.channel import MAX_MESSAGE, Piece

PROTOCOL = "/kas-libp2p/messages/1.0.0"
VERSION = 1
"""Version of the hello. A newer side may append to it; what is appended is passed over."""

HEADER = 4
MAX_FRAME = 1024 * 1024
"""Bytes of one frame's payload that everybody must accept."""

MAX_CONTROL = 4096
"""Bytes of a control frame's payload, and of a frame of unknown kind that is passed over: these are kept whole."""

MAX_PLAIN = 1024 * 1024
"""Bytes that one compressed frame may unpack to. Bounds memory, and what a few bytes of a bomb can cost."""

SMALL_MAX_MESSAGE = 1024 * 1024
"""Bytes of a message that may be sent before the other side's hello has told its limit; nobody may announce less."""

MAX_REASON = 1024
"""Bytes of a close's text."""

MAX_NETWORK = 64
"""Bytes of a network's name in the hello."""


class Kind(IntEnum):
    """First byte of a frame."""

    MESSAGE = 0
    """A whole message."""
    BEGIN = 1
    """Size of a message (4 bytes), then its first bytes. At least one more byte follows in another frame."""
    MORE = 2
    """The next bytes of the message that was begun."""
    PACKED = 3
    """Size unpacked (4 bytes), then one zstd frame of that content: whole frames of the kinds above."""
    HELLO = 16
    ALIVE = 17
    PROBE = 18
    CLOSE = 19


IGNORABLE = 0x80
"""Kinds from here on may be passed over by whoever does not know them. An unknown kind below ends the channel."""


class CloseCode(IntEnum):
    """First byte of a close. The text after it is for people; this is for programs."""

    ENDED = 0
    """Done, nothing wrong."""
    BUSY = 1
    """Too much at once; the same may work in a moment."""
    REJECTED = 2
    """A kaspad rejected the other; the text is its reason."""
    NETWORK = 3
    LOOPBACK = 4
    DUPLICATE = 5
    NO_VERSION = 6
    """No Kaspa Version came in time."""
    NO_KASPAD = 7
    """The node behind this side can't be reached."""
    PROTOCOL = 8
    TOO_LARGE = 9
    STALLED = 10
    GOING_AWAY = 11
    REFUSED = 12
    """By this side's own lists."""


class Capability(IntFlag):
    """What a side understands, as bits of its hello. Unknown bits mean nothing."""

    NONE = 0
    ZSTD = 1
    """Frames of kind PACKED."""


# -- Control frames ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame of each direction.

    Attributes:
        capabilities: what the sender of the hello understands.
        max_message: bytes of one message that it accepts, at least `SMALL_MAX_MESSAGE`.
        network: the Kaspa network of the node behind it; empty where not known yet.
    """

    capabilities: Capability = Capability.NONE
    max_message: int = MAX_MESSAGE
    network: str = ""


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life, and what became of the other side's bytes.

    Attributes:
        received: bytes of the other side's direction that were taken from the stream, framing included.
        busy: milliseconds, modulo 2**32, in which its sender did not read, since the start.
    """

    received: int
    busy: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks for an `Alive` at once."""


@dataclass(frozen=True, slots=True)
class Close:
    """The last frame of a direction, where there is something to say."""

    code: int
    reason: str


class MessageTooLarge(RemoteProtocolError):
    """The peer began a message above the limit that our hello told."""


Control = Hello | Alive | Probe | Close

_HEADER = struct.Struct(">I")
_HELLO = struct.Struct(">BIIB")
_ALIVE = struct.Struct(">QI")


def frame(kind: int, payload: bytes) -> bytes:
    """One frame."""
    return _HEADER.pack(kind << 24 | len(payload)) + payload


def encode(control: Control) -> bytes:
    """A control frame."""
    if isinstance(control, Hello):
        network = control.network.encode()[:MAX_NETWORK]
        return frame(
            Kind.HELLO,
            _HELLO.pack(VERSION, control.capabilities, min(control.max_message, 0xFFFFFFFF), len(network)) + network,
        )
    if isinstance(control, Alive):
        return frame(Kind.ALIVE, _ALIVE.pack(control.received, control.busy & 0xFFFFFFFF))
    if isinstance(control, Probe):
        return frame(Kind.PROBE, b"")
    reason = control.reason.encode()[:MAX_REASON].decode("utf-8", "ignore").encode()
    return frame(Kind.CLOSE, bytes([control.code]) + reason)


def decode(kind: int, payload: bytes) -> Control:
    """A control frame from its payload.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    try:
        if kind == Kind.HELLO:
            version, capabilities, max_message, length = _HELLO.unpack_from(payload)
            network = payload[_HELLO.size : _HELLO.size + length]
            if version < 1 or max_message < SMALL_MAX_MESSAGE or length > MAX_NETWORK or len(network) != length:
                raise RemoteProtocolError("malformed hello")
            return Hello(Capability(capabilities) & Capability.ZSTD, max_message, network.decode("utf-8", "replace"))
        if kind == Kind.ALIVE:
            return Alive(*_ALIVE.unpack_from(payload))
        if kind == Kind.PROBE:
            return Probe()
        return Close(payload[0], payload[1 : 1 + MAX_REASON].decode("utf-8", "replace"))
    except (struct.error, IndexError):
        raise RemoteProtocolError(f"malformed {Kind(kind).name.lower()}") from None


CUT = 256 * 1024
"""Bytes of the parts into which a message is cut that comes in one piece: control frames may go between them."""


def encode_pieces(pieces: Sequence[Piece], cut: int = CUT) -> list[bytes | memoryview]:
    """The frames of some pieces, two buffers a frame (header and data), the data uncopied.

    Args:
        cut: bytes of message in one frame at most.
    """
    buffers: list[bytes | memoryview] = []
    pack = _HEADER.pack
    for data, remaining, first, size in pieces:
        length = len(data)
        if length > cut:
            buffers += encode_pieces(_cut(data, remaining, first, size, cut), cut)
        elif first and not remaining:
            buffers.append(pack(length))
            buffers.append(data)
        elif first:
            buffers.append(pack(Kind.BEGIN << 24 | length + 4) + pack(size))
            buffers.append(data)
        elif length:
            buffers.append(pack(Kind.MORE << 24 | length))
            buffers.append(data)
    return buffers


def _cut(data: bytes | memoryview, remaining: int, first: bool, size: int, cut: int) -> list[Piece]:
    view = memoryview(data)
    parts = []
    for start in range(0, len(view), cut):
        part = view[start : start + cut]
        parts.append(Piece(part, remaining + len(view) - start - len(part), first, size))
        first = False
    return parts


# -- Reading -----------------------------------------------------------------------------------------------------------

MAX_CONTROLS = 64
"""Control frames that one `Reader.take` gathers: a flood of them costs time, never memory."""

Unpack = Callable[[memoryview, int], bytes]
"""Unpacks one zstd frame that claims to hold so many bytes; `RemoteProtocolError` unless it holds exactly those."""


class Reader:
    """Makes pieces and control frames of received bytes, a bounded amount at a time.

    `feed` takes what the stream gave; `take` then gives pieces, until `wants_data`. Control frames are put into
    ``controls`` as they are met, in order among themselves; whoever calls `take` empties it before the next call.

    Args:
        max_message: bytes of one message, as our hello says.
        unpack: unpacks a packed frame's content; ``None`` where our hello did not offer it.
    """

    def __init__(self, *, max_message: int = MAX_MESSAGE, unpack: Unpack | None = None) -> None:
        self._max_message = max_message
        self._unpack = unpack
        self._view = memoryview(b"")
        self._at = 0
        self._outer: tuple[memoryview, int] | None = None  # where to go on after the content of a packed frame
        self._kept = bytearray()  # an incomplete header, or the payload of a frame that is kept whole
        self._kind = -1  # of the frame that is kept whole
        self._length = 0  # of its payload
        self._size = 0  # of the message under way
        self._remaining = 0  # bytes of it still to come, in this frame and in others
        self._body = 0  # bytes of it still to come in this frame
        self._first = False  # whether no byte of it has been given
        self._empty = False  # whether an empty message waits to be given
        self._greeted = False
        self._closed = False
        self.controls: deque[Control] = deque()
        self.control_bytes = 0
        """Bytes of complete control frames so far, with their headers."""

    @property
    def in_message(self) -> bool:
        """Whether the stream's end here would cut a message or a frame."""
        return bool(self._remaining or self._kept or self._kind >= 0)

    @property
    def wants_data(self) -> bool:
        """Whether `take` has nothing more to work on."""
        return self._at >= len(self._view) and self._outer is None and not self._empty

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Hand over received bytes. Everything handed over before must have been taken."""
        if not self.wants_data:
            raise LocalProtocolError("fed before everything was taken")
        self._view = memoryview(data)
        self._at = 0

    def take(self, room: int) -> list[Piece]:
        """The next pieces, of at most ``room`` bytes in all, an empty message counted as one byte.

        Raises:
            RemoteProtocolError: the peer broke the protocol. Nothing can be read after that.
        """
        pieces: list[Piece] = []
        append = pieces.append
        unpack_from = _HEADER.unpack_from
        view, at, end = self._view, self._at, len(self._view)
        limit = self._whole_limit()
        while room > 0 and len(self.controls) < MAX_CONTROLS:
            if self._empty:
                self._empty = False
                append(Piece(b"", 0, True, 0))
                room -= 1
            elif self._body and at < end:
                count = min(self._body, end - at, room)
                self._body -= count
                self._remaining -= count
                append(Piece(view[at : at + count], self._remaining, self._first, self._size))
                self._first = False
                at += count
                room -= count
            elif at >= end:
                if self._outer is None:
                    break
                if self._body or self._kept or self._kind >= 0:
                    raise RemoteProtocolError("a packed frame ends within a frame")
                view, at = self._outer
                end, self._outer = len(view), None
            else:
                if self._kind < 0 and not self._kept and end - at >= HEADER and not self._remaining:
                    (word,) = unpack_from(view, at)
                    # A whole message that is all there: the common case, without the detours of the others.
                    if 0 < word <= end - at - HEADER and word <= room and word <= limit:
                        at += HEADER
                        append(Piece(view[at : at + word], 0, True, word))
                        at += word
                        room -= word
                        continue
                self._view = view
                at = self._collect(at)
                view, end = self._view, len(self._view)
                limit = self._whole_limit()
        if at >= end and self._outer is None:
            view, at = memoryview(b""), 0  # let the buffer go
        self._view, self._at = view, at
        return pieces

    def _whole_limit(self) -> int:
        """Bytes of a MESSAGE frame that is welcome now."""
        return min(self._max_message, MAX_FRAME) if self._greeted and not self._closed else 0

    def _fill(self, at: int, wanted: int) -> int:
        count = min(wanted - len(self._kept), len(self._view) - at)
        self._kept += self._view[at : at + count]
        return at + count

    def _collect(self, at: int) -> int:
        """Gather a header, or the payload of a frame that is kept whole, and act on it once it is complete."""
        if self._closed:
            raise RemoteProtocolError("data after the close")
        if self._kind < 0:
            if len(self._kept) < HEADER:
                at = self._fill(at, HEADER)
            if len(self._kept) >= HEADER and self._kept[0] == Kind.BEGIN:
                at = self._fill(at, HEADER + 4)
                if len(self._kept) < HEADER + 4:
                    return at
            if len(self._kept) < HEADER:
                return at
            self._header(*_HEADER.unpack_from(self._kept))
            if self._kind < 0:
                return at
        at = self._fill(at, self._length)
        return self._complete(at) if len(self._kept) == self._length else at

    def _header(self, word: int) -> None:
        kind, length = word >> 24, word & 0xFFFFFF
        if not self._greeted and kind != Kind.HELLO:
            raise RemoteProtocolError("the first frame is no hello")
        if length > MAX_FRAME:
            raise RemoteProtocolError(f"a frame of {length} bytes is above the limit of {MAX_FRAME}")
        if kind in (Kind.MESSAGE, Kind.BEGIN):
            if self._remaining:
                raise RemoteProtocolError("a message begins before the end of the one before it")
            size = length
            if kind == Kind.BEGIN:
                (size,) = _HEADER.unpack_from(self._kept, HEADER)
                length -= 4
                if not 0 < length < size:
                    raise RemoteProtocolError("a message is begun that has no byte here, or none elsewhere")
            if size > self._max_message:
                raise MessageTooLarge(f"a message of {size} bytes is above the limit of {self._max_message}")
            self._size = self._remaining = size
            self._body = length
            self._first = True
            self._empty = not size
        elif kind == Kind.MORE:
            if not 0 < length <= self._remaining:
                raise RemoteProtocolError("a continuation of nothing, or beyond the end of its message")
            self._body = length
        else:
            self._check_kept_whole(kind, length)
            self._kind, self._length = kind, length
        self._kept.clear()

    def _check_kept_whole(self, kind: int, length: int) -> None:
        if self._outer is not None:
            raise RemoteProtocolError("a packed frame holds something else than messages")
        if kind == Kind.PACKED:
            if self._unpack is None:
                raise RemoteProtocolError("a packed frame that our hello did not offer")
            if length <= 4:
                raise RemoteProtocolError("a packed frame without content")
        elif length > MAX_CONTROL:
            raise RemoteProtocolError(f"a control frame of {length} bytes is above the limit of {MAX_CONTROL}")
        elif kind == Kind.HELLO:
            if self._greeted:
                raise RemoteProtocolError("a second hello")
        elif kind < IGNORABLE and kind not in (Kind.ALIVE, Kind.PROBE, Kind.CLOSE):
            raise RemoteProtocolError(f"a frame of unknown kind {kind}")

    def _complete(self, at: int) -> int:
        kind, payload = self._kind, bytes(self._kept)
        self._kind = -1
        self._kept.clear()
        if kind == Kind.PACKED:
            assert self._unpack is not None
            (size,) = _HEADER.unpack_from(payload)
            if not 0 < size <= MAX_PLAIN:
                raise RemoteProtocolError(f"a packed frame of {size} bytes is above the limit of {MAX_PLAIN}")
            self._outer = self._view, at
            self._view = memoryview(self._unpack(memoryview(payload)[4:], size))
            return 0
        self.control_bytes += HEADER + len(payload)
        if kind < IGNORABLE:
            control = decode(kind, payload)
            if isinstance(control, Hello):
                self._greeted = True
            elif isinstance(control, Close):
                self._closed = True
            self.controls.append(control)
        return at
