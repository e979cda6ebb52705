"""``/kas-libp2p/session/1.0.0`` without I/O: its frames, written and read. ``docs/session-protocol.md`` describes the
same wire for other implementations.

A frame is a header of 13 bytes (kind, length of the payload, a value) and a payload. The first frame of whoever opened
the stream is an OPEN or an ATTACH, the first of the other one a WELCOME or a RESET.

Offsets count the bytes of one direction of the session from 0, whatever stream they take. An acknowledgement of one
more than a direction's final offset says that its FIN has come as well.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from kas_libp2p.errors import RemoteProtocolError

ID_SIZE = 16
"""Bytes of a session's id, drawn at random by who opens it."""
INSTANCE_SIZE = 8
"""Bytes that a node draws at random when it starts: with others in their place, the peer has started anew."""
MAX_DATA = 1024 * 1024
"""Bytes of a DATA frame, and of a frame that is passed over."""
MAX_CONTROL = 512
"""Bytes of any other frame's payload. What follows the known fields is for later versions."""
MAX_REASON = 256
"""Bytes of a RESET's reason."""
MAX_OFFSET = 2**64 - 2
"""The largest offset or limit. One more has to fit, for the FIN."""
IGNORABLE = 128
"""Kinds from here on are passed over by whoever does not know them."""

OPEN, ATTACH, WELCOME, DATA, ACK, FIN, RESET, PROBE = range(1, 9)
LOST = 1
"""Flag of ATTACH, WELCOME and ACK."""


class Code(IntEnum):
    """Why a session ended, or a path was refused. Others may come from newer peers, and are kept as numbers."""

    ENDED = 0
    """In order, by both sides."""
    PROTOCOL = 1
    """The other side broke this protocol."""
    UNKNOWN = 2
    """There is no such session, or it is with somebody else."""
    BUSY = 3
    """Too many sessions or paths at once: the same may work in a moment. Ends the path only."""
    SUPERSEDED = 4
    """Another path was attached, or is about to be, with a higher turn. Ends the path only."""
    REFUSED = 5
    """This side does not want the session."""
    LOST = 6
    """There was no path for too long."""
    STOPPED = 7
    """This side stops, or was told to end it."""
    RESTARTED = 8
    """The other side has been started anew."""
    TIMEOUT = 9
    """The other side did not answer in time."""


@dataclass(frozen=True, slots=True)
class Open:
    """Begins a session on this stream.

    Attributes:
        limit: offset up to which its sender takes data.
        id: of the session.
        instance: of its sender's node.
    """

    limit: int
    id: bytes
    instance: bytes


@dataclass(frozen=True, slots=True)
class Attach:
    """Moves a session to this stream.

    Attributes:
        received: up to where its sender has everything.
        id, instance, limit: as in `Open`.
        turn: one more than the highest that its sender knows of.
        lost: what the peer sent by other paths, beyond ``received``, may not come any more.
    """

    received: int
    id: bytes
    instance: bytes
    limit: int
    turn: int
    lost: bool


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers either. Attributes as in `Attach`, where ``lost`` concerns older paths than this one."""

    received: int
    instance: bytes
    limit: int
    lost: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """What came, and what may be sent. Attributes as in `Welcome`."""

    received: int
    limit: int
    lost: bool


@dataclass(frozen=True, slots=True)
class Fin:
    """Its sender's direction ends at this offset."""

    final: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Ends the session, or this path only; see `Code`.

    Attributes:
        code: a `Code`, or one that we don't know.
        turn: the highest that its sender knows of.
        reason: for people. Comes from a stranger; printable.
    """

    code: int
    turn: int
    reason: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks for an `Ack` at once."""


Data = tuple[int, bytes]
"""Offset, and some bytes of a DATA frame: as many as have come."""
Control = Open | Attach | Welcome | Ack | Fin | Reset | Probe

_HEADER = struct.Struct(">BIQ")
HEADER_SIZE = _HEADER.size
pack_header = _HEADER.pack
"""Kind, length, value."""
_unpack_header = _HEADER.unpack_from
_OPEN = struct.Struct(f">{ID_SIZE}s{INSTANCE_SIZE}s")
_ATTACH = struct.Struct(f">{ID_SIZE}s{INSTANCE_SIZE}sQIB")
_WELCOME = struct.Struct(f">{INSTANCE_SIZE}sQB")
_ACK = struct.Struct(">QB")
_LENGTHS = {OPEN: _OPEN.size, ATTACH: _ATTACH.size, WELCOME: _WELCOME.size, ACK: _ACK.size, FIN: 0, RESET: 0, PROBE: 0}
_whole_ack = struct.Struct(">BIQQB").pack

encoded_probe = pack_header(PROBE, 0, 0)


def encode_open(frame: Open) -> bytes:
    """An OPEN."""
    return pack_header(OPEN, _OPEN.size, frame.limit) + _OPEN.pack(frame.id, frame.instance)


def encode_attach(frame: Attach) -> bytes:
    """An ATTACH."""
    payload = _ATTACH.pack(frame.id, frame.instance, frame.limit, frame.turn, frame.lost)
    return pack_header(ATTACH, _ATTACH.size, frame.received) + payload


def encode_welcome(frame: Welcome) -> bytes:
    """A WELCOME."""
    return pack_header(WELCOME, _WELCOME.size, frame.received) + _WELCOME.pack(frame.instance, frame.limit, frame.lost)


def encode_ack(received: int, limit: int, lost: bool) -> bytes:
    """An ACK."""
    return _whole_ack(ACK, _ACK.size, received, limit, lost)


def encode_fin(final: int) -> bytes:
    """A FIN."""
    return pack_header(FIN, 0, final)


def encode_reset(code: int, reason: str, turn: int = 0) -> bytes:
    """A RESET. The reason is cut at `MAX_REASON` bytes."""
    text = reason.encode("utf-8", "replace")[:MAX_REASON].decode("utf-8", "ignore").encode()
    return pack_header(RESET, len(text), turn << 32 | code) + text


def _decode(kind: int, value: int, payload: bytes) -> Control:
    if kind == ACK:
        limit, flags = _ACK.unpack_from(payload)
        return Ack(value, limit, bool(flags & LOST))
    if kind == FIN:
        return Fin(value)
    if kind == PROBE:
        return Probe()
    if kind == WELCOME:
        instance, limit, flags = _WELCOME.unpack_from(payload)
        return Welcome(value, instance, limit, bool(flags & LOST))
    if kind == OPEN:
        id, instance = _OPEN.unpack_from(payload)
        return Open(value, id, instance)
    if kind == ATTACH:
        id, instance, limit, turn, flags = _ATTACH.unpack_from(payload)
        return Attach(value, id, instance, limit, turn, bool(flags & LOST))
    reason = payload[:MAX_REASON].decode("utf-8", "replace")
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in reason)
    return Reset(value & 0xFFFF_FFFF, value >> 32, shown)


class Parser:
    """Makes frames of what comes on one path. Keeps no more than one control frame.

    Attributes:
        inside: whether the stream's end here would cut a frame.
    """

    __slots__ = ("_kept", "_left", "_offset")

    def __init__(self) -> None:
        self._kept = b""
        self._left = 0  # bytes of payload still to come, of a DATA frame or of one that is passed over
        self._offset = -1  # of the next of them; -1: they are passed over

    @property
    def inside(self) -> bool:
        return bool(self._kept or self._left)

    def first(self, data: bytes | memoryview) -> Open | Attach | None:
        """The first frame of a stream that the peer opened. What follows it is kept for `feed`.

        Args:
            data: some more bytes. As what follows is kept, the caller bounds how much it reads.

        Returns:
            ``None``: more bytes are needed.

        Raises:
            RemoteProtocolError: it is something else.
        """
        kept = self._kept = self._kept + data
        if not kept:
            return None
        if kept[0] not in (OPEN, ATTACH):
            raise RemoteProtocolError(f"a stream begins with a frame of kind {kept[0]}, and not with OPEN or ATTACH")
        if len(kept) < HEADER_SIZE:
            return None
        kind, length, value = _unpack_header(kept)
        self._check(kind, length)
        end = HEADER_SIZE + length
        if len(kept) < end:
            return None
        frame = _decode(kind, value, kept[HEADER_SIZE:end])
        self._kept = kept[end:]
        assert isinstance(frame, Open | Attach)
        return frame

    def feed(self, data: bytes | memoryview) -> list[Data | Control]:
        """What some bytes bring, in order. They may be reused afterwards.

        Raises:
            RemoteProtocolError: the peer broke the protocol. Nothing can be read after that.
        """
        if not (self._kept or self._left) and len(data) > HEADER_SIZE:  # a message alone, as most are
            kind, length, value = _unpack_header(data)
            if kind == DATA and length == len(data) - HEADER_SIZE <= MAX_DATA and value + length <= MAX_OFFSET:
                return [(value, bytes(data[HEADER_SIZE:]))]
        frames: list[Data | Control] = []
        at, left, kept = 0, self._left, self._kept
        if kept:
            self._kept = b""
            at = HEADER_SIZE - len(kept)
            if at > 0 and kept[0] == DATA and len(data) >= at:  # do not copy what follows its header
                _, length, value = _unpack_header(kept + data[:at])
                left, self._offset = self._begin(length, value)
            else:
                data, at = kept + data, 0
        end = len(data)
        while True:
            if left:
                stop = at + left
                if stop > end:
                    stop = end
                if self._offset >= 0 and stop > at:
                    frames.append((self._offset, bytes(data[at:stop])))
                    self._offset += stop - at
                left -= stop - at
                at = stop
                if left:
                    break
            if end - at < HEADER_SIZE:
                self._kept = bytes(data[at:])
                break
            kind, length, value = _unpack_header(data, at)
            if kind == DATA:
                left, self._offset = self._begin(length, value)
            else:
                self._check(kind, length)
                if kind >= IGNORABLE:
                    left, self._offset = length, -1
                elif end - at < HEADER_SIZE + length:
                    self._kept = bytes(data[at:])
                    break
                else:
                    payload = bytes(data[at + HEADER_SIZE : at + HEADER_SIZE + length])
                    frames.append(_decode(kind, value, payload))
                    at += length
            at += HEADER_SIZE
        self._left = left
        return frames

    @staticmethod
    def _begin(length: int, offset: int) -> tuple[int, int]:
        if not 0 < length <= MAX_DATA:
            raise RemoteProtocolError(f"a DATA frame of {length} bytes")
        if offset + length > MAX_OFFSET:
            raise RemoteProtocolError("data beyond the largest offset")
        return length, offset

    @staticmethod
    def _check(kind: int, length: int) -> None:
        if kind >= IGNORABLE:
            if length > MAX_DATA:
                raise RemoteProtocolError(f"a frame of {length} bytes")
            return
        shortest = _LENGTHS.get(kind)
        if shortest is None:
            raise RemoteProtocolError(f"a frame of kind {kind}, which is not defined")
        if not shortest <= length <= MAX_CONTROL:
            raise RemoteProtocolError(f"a frame of kind {kind} with {length} bytes")
