"""Just enough of netlink (RFC 3549; linux/rtnetlink.h, nfnetlink_conntrack.h) to build a network.

A program per change (`ip`) would take longer than the whole lab may.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

_NEWLINK, _NEWADDR, _DELADDR, _NEWROUTE = 16, 20, 21, 24
_REQUEST_ACK = 0x05
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400

_IFNAME, _MASTER, _LINKINFO, _AF_SPEC, _NET_NS_FD = 3, 10, 18, 26, 28
_IFF_UP = 1
_NODAD = 0x02
_NETLINK_NETFILTER = 12
_CT_DELETE = 0x0102


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", len(content) + 4, kind) + content + bytes(-len(content) % 4)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _link(index: int = 0, flags: int = 0) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, flags, flags)


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _request(sock: socket.socket, kind: int, flags: int, body: bytes) -> None:
    sock.send(struct.pack("=IHHII", 16 + len(body), kind, _REQUEST_ACK | flags, 1, 0) + body)
    (code,) = struct.unpack_from("=i", sock.recv(65536), 16)
    if code:
        raise OSError(-code, os.strerror(-code))


class Links:
    """Interfaces, addresses and routes of the namespace in which this was made."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))

    def veth(self, name: str, namespace: int, peer: str, peer_namespace: int) -> None:
        """A cable, each end in the namespace of a file descriptor."""
        there = _link() + _text(_IFNAME, peer) + _number(_NET_NS_FD, peer_namespace)
        info = _text(1, "veth") + _attribute(2, _attribute(1, there))
        here = _link() + _text(_IFNAME, name) + _number(_NET_NS_FD, namespace)
        _request(self._socket, _NEWLINK, _CREATE | _EXCLUSIVE, here + _attribute(_LINKINFO, info))

    def bridge(self, name: str, ports: list[str]) -> None:
        info = _attribute(_LINKINFO, _text(1, "bridge"))
        _request(self._socket, _NEWLINK, _CREATE | _EXCLUSIVE, _link() + _text(_IFNAME, name) + info)
        index = socket.if_nametoindex(name)
        for port in ports:
            body = _link(socket.if_nametoindex(port)) + _number(_MASTER, index)
            _request(self._socket, _NEWLINK, 0, body)

    def up(self, name: str) -> None:
        """Switch an interface on, without a link-local address (IFLA_INET6_ADDR_GEN_MODE none)."""
        index = socket.if_nametoindex(name)
        if name != "lo":  # before: within one request the kernel would switch it on first
            inet6 = _attribute(_AF_SPEC, _attribute(socket.AF_INET6, _attribute(8, b"\x01")))
            _request(self._socket, _NEWLINK, 0, _link(index) + inet6)
        _request(self._socket, _NEWLINK, 0, _link(index, _IFF_UP))

    def address(self, name: str, address: str, remove: bool) -> None:
        """Add or remove an address with its prefix length; IPv6 without waiting for duplicates."""
        text, _, length = address.partition("/")
        family, raw = _packed(text)
        body = struct.pack("=BBBBI", family, int(length), _NODAD, 0, socket.if_nametoindex(name))
        body += _attribute(1, raw) + _attribute(2, raw)
        _request(self._socket, _DELADDR if remove else _NEWADDR, 0 if remove else _CREATE | _EXCLUSIVE, body)

    def route(self, prefix: str, via: str) -> None:
        """Send a prefix, or "default", by a neighbour, in place of an older such route."""
        family, gateway = _packed(via)
        length, destination = 0, b""
        if prefix != "default":
            text, _, bits = prefix.partition("/")
            length, destination = int(bits), _attribute(1, _packed(text)[1])
        # Table main, protocol static, scope universe, kind unicast.
        body = struct.pack("=BBBBBBBBI", family, length, 0, 0, 254, 4, 0, 1, 0)
        _request(self._socket, _NEWROUTE, _CREATE | _REPLACE, body + destination + _attribute(5, gateway))

    def close(self) -> None:
        self._socket.close()


def forget_connections() -> None:
    """Empty the connection table of the namespace we are in."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.bind((0, 0))
        _request(sock, _CT_DELETE, 0, bytes(4))


def set_checksum_offload(name: str, on: bool) -> None:
    """Have an interface hand on finished packets (off), or leave checksums and segments to whoever receives (on).

    Without checksum offload the kernel gives up segmentation offload, too: every frame is a packet of the path's MTU.
    """
    value = ctypes.create_string_buffer(struct.pack("=II", 0x17, int(on)))  # ETHTOOL_STXCSUM
    request = struct.pack("16sP16x", name.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        fcntl.ioctl(sock, 0x8946, request)  # SIOCETHTOOL
