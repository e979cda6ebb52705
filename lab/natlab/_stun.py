"""STUN messages (RFC 8489) with what RFC 5780 adds to find out about NATs. Pure.

Over TCP RFC 5780 knows no way to ask for filtering. There, a server of ours takes CHANGE-REQUEST as "connect to me from
there, and tell me how that went", which it answers in two attributes of its own, from the range that others ignore.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

COOKIE = 0x2112A442
REQUEST, RESPONSE = 0x0001, 0x0101
MAX_SIZE = 512
"""Bytes of a message that we read; ours have about 100."""
DEFAULT_PORT = 3478

_HEADER = struct.Struct("!HHI12s")
_CHANGE_ADDRESS, _CHANGE_PORT = 4, 2


class _Kind(IntEnum):
    """Attributes; the last three are ours."""

    MAPPED = 0x0001
    CHANGE = 0x0003
    XOR_MAPPED = 0x0020
    RESPONSE_PORT = 0x0027
    OTHER = 0x802C
    OUTCOME = 0xC0A1
    UDP = 0xC0A2
    POKE = 0xC0A3


Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Message:
    """A binding request or its response.

    Attributes:
        mapped: the endpoint that the server sees.
        other: an endpoint of the server with another address and another port.
        change_address, change_port: answer (TCP: connect) from there.
        response_port: answer to this port of the requester's address.
        outcome: ours, over TCP: how a connection or a packet to the requester went.
        udp: ours, over TCP: send a packet instead of connecting.
        poke: ours, over TCP: say something on the requester's connection from ``response_port``.
    """

    id: bytes
    is_request: bool = True
    mapped: Endpoint | None = None
    other: Endpoint | None = None
    change_address: bool = False
    change_port: bool = False
    response_port: int | None = None
    outcome: str | None = None
    udp: bool = False
    poke: bool = False

    @classmethod
    def request(cls, **attributes: object) -> Message:
        return cls(os.urandom(12), **attributes)  # type: ignore[arg-type]

    def pack(self) -> bytes:
        parts: list[tuple[int, bytes]] = []
        if self.mapped:
            parts.append((_Kind.XOR_MAPPED, _endpoint(self.mapped, self.id)))
        if self.other:
            parts.append((_Kind.OTHER, _endpoint(self.other)))
        if flags := _CHANGE_ADDRESS * self.change_address | _CHANGE_PORT * self.change_port:
            parts.append((_Kind.CHANGE, struct.pack("!I", flags)))
        if self.response_port is not None:
            parts.append((_Kind.RESPONSE_PORT, struct.pack("!HH", self.response_port, 0)))
        if self.udp:
            parts.append((_Kind.UDP, b""))
        if self.poke:
            parts.append((_Kind.POKE, b""))
        if self.outcome is not None:
            parts.append((_Kind.OUTCOME, self.outcome.encode()))
        body = b"".join(struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4) for kind, value in parts)
        return _HEADER.pack(REQUEST if self.is_request else RESPONSE, len(body), COOKIE, self.id) + body

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """Read one message.

        Raises:
            ValueError: it is none, or no binding.
        """
        try:
            kind, length, cookie, id = _HEADER.unpack_from(data)
            if cookie != COOKIE or kind not in (REQUEST, RESPONSE) or length != len(data) - _HEADER.size:
                raise ValueError("not a binding message of STUN")
            found: dict[str, object] = {}
            at = _HEADER.size
            while at < len(data):
                attribute, size = struct.unpack_from("!HH", data, at)
                value = data[at + 4 : at + 4 + size]
                if len(value) != size:
                    raise ValueError("an attribute is cut off")
                at += 4 + size + -size % 4
                match attribute:
                    case _Kind.XOR_MAPPED:
                        found["mapped"] = _read_endpoint(value, id)
                    case _Kind.MAPPED:
                        found.setdefault("mapped", _read_endpoint(value))
                    case _Kind.OTHER:
                        found["other"] = _read_endpoint(value)
                    case _Kind.CHANGE:
                        (flags,) = struct.unpack("!I", value)
                        found["change_address"] = bool(flags & _CHANGE_ADDRESS)
                        found["change_port"] = bool(flags & _CHANGE_PORT)
                    case _Kind.RESPONSE_PORT:
                        (found["response_port"],) = struct.unpack_from("!H", value)
                    case _Kind.OUTCOME:
                        found["outcome"] = value.decode("ascii")
                    case _Kind.UDP:
                        found["udp"] = True
                    case _Kind.POKE:
                        found["poke"] = True
                    case _:
                        if attribute < 0x8000 and kind == REQUEST:
                            raise ValueError(f"an attribute {attribute:#x} that we would have to know")
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"a STUN message that makes no sense: {error}") from None
        return cls(id, kind == REQUEST, **found)  # type: ignore[arg-type]


def size_of(head: bytes) -> int:
    """The size of the message that begins with these 20 bytes, for streams.

    Raises:
        ValueError: it is none, or too large.
    """
    _, length, cookie, _ = _HEADER.unpack(head)
    if cookie != COOKIE or length > MAX_SIZE:
        raise ValueError("not a STUN message")
    return _HEADER.size + int(length)


HEAD = _HEADER.size


def _mask(id: bytes) -> bytes:
    return struct.pack("!I", COOKIE) + id


def _endpoint(endpoint: Endpoint, id: bytes | None = None) -> bytes:
    host, port = endpoint
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    raw = socket.inet_pton(family, host)
    if id is not None:
        port ^= COOKIE >> 16
        raw = bytes(a ^ b for a, b in zip(raw, _mask(id), strict=False))
    return struct.pack("!xBH", 2 if family == socket.AF_INET6 else 1, port) + raw


def _read_endpoint(value: bytes, id: bytes | None = None) -> Endpoint:
    kind, port = struct.unpack_from("!xBH", value)
    raw = value[4:]
    if (kind, len(raw)) not in ((1, 4), (2, 16)):
        raise ValueError("an address of no known kind")
    if id is not None:
        port ^= COOKIE >> 16
        raw = bytes(a ^ b for a, b in zip(raw, _mask(id), strict=False))
    return socket.inet_ntop(socket.AF_INET6 if kind == 2 else socket.AF_INET, raw), port
