"""How the lab's processes talk: JSON with its length before it, over a Unix stream socket, with file descriptors."""

from __future__ import annotations

import array
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

MAX_FDS = 16
"""File descriptors in one message: more than any of them has."""
MAX_MESSAGE = 64 << 20
"""Bytes of one message. A plan of 1000 sites of the wordiest type is about 40 MB."""

_LENGTH = struct.Struct("=I")


class Closed(Exception):
    """The other side is gone."""


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        Closed: the other side is gone.
    """
    data = json.dumps(message).encode()
    data = _LENGTH.pack(len(data)) + data
    try:
        sent = sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        if sent < len(data):  # sending nothing would fail, too, if the other side has read all and left
            sock.sendall(memoryview(data)[sent:])
    except OSError as error:
        raise Closed(str(error)) from error


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message, with the file descriptors that came with it, which the caller has to close.

    Raises:
        Closed: the other side is gone.
    """
    descriptors: list[int] = []
    head = _read(sock, _LENGTH.size, descriptors)
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE:
        raise Closed(f"a message of {length} bytes is not one of ours")
    message: dict[str, Any] = json.loads(_read(sock, length, descriptors))
    return message, descriptors


def _read(sock: socket.socket, size: int, descriptors: list[int]) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part, ancillary, _, _ = sock.recvmsg(
                size - len(data), socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise Closed(str(error)) from error
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % 4])
                descriptors += fds
        if not part:
            raise Closed("it hung up")
        data += part
    return bytes(data)
