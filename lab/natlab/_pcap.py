"""Packet captures in the pcapng format, written by the lab itself: one interface block per interface, with its name.

Format: draft-ietf-opsawg-pcapng. Any number of files may be read by wireshark, tshark or tcpdump.
"""

from __future__ import annotations

import os
import socket
import struct
import time

SNAP = 256
"""Bytes kept of each frame: all headers, and the start of what they carry."""
MAX_BYTES = 64 << 20
"""Size at which a capture stops: it is for the first seconds of a test that failed."""

_ETH_P_ALL = 3


def _block(kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack("=I", len(body) + 12)
    return struct.pack("=I", kind) + size + body + size


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + value + bytes(-len(value) % 4)


def section() -> bytes:
    """The start of a file."""
    return _block(0x0A0D0D0A, struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(name: str) -> bytes:
    """An Ethernet interface; the next frames may name it by its number in the file. Times in nanoseconds."""
    options = _option(2, name.encode()) + _option(9, b"\x09") + _option(0, b"")
    return _block(1, struct.pack("=HHI", 1, 0, SNAP) + options)


def packet(number: int, nanoseconds: int, frame: bytes, size: int, outgoing: bool) -> bytes:
    """One frame, of which the start may be all that was kept."""
    high, low = nanoseconds >> 32, nanoseconds & 0xFFFFFFFF
    body = struct.pack("=IIIII", number, high, low, len(frame), size) + frame + bytes(-len(frame) % 4)
    return _block(6, body + _option(2, struct.pack("=I", 2 if outgoing else 1)) + _option(0, b""))


def listen() -> socket.socket:
    """What gets every frame of this namespace."""
    return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))


def record(sock: socket.socket, file: int, telling: int) -> None:
    """Write every frame into a file, until there are too many; say so through a pipe once the file has begun."""
    written = os.write(file, section())
    numbers: dict[str, int] = {}
    buffer = bytearray(SNAP)
    os.write(telling, b"!")
    os.close(telling)
    while written < MAX_BYTES:
        size, _, _, origin = sock.recvmsg_into([buffer], 0, socket.MSG_TRUNC)
        name, kind = origin[0], origin[2]
        out = b""
        if name not in numbers:
            numbers[name] = len(numbers)
            out = interface(name)
        frame = bytes(buffer[: min(size, SNAP)])
        out += packet(numbers[name], time.time_ns(), frame, size, kind == socket.PACKET_OUTGOING)
        written += os.write(file, out)
