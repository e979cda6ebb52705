"""Two network namespaces, joined by a wire that delays each way. Linux and the standard library, nothing else.

::

    namespace a            the wire's own namespace            namespace b
    eth0 11.0.0.1  <veth>  a ── read, hold, write ── b  <veth>  eth0 11.0.0.2
         2d00::1           (AF_PACKET, one process)                  2d00::2

A delaying proxy would end TCP in the middle, and so hide what a long path does to windows; this wire carries frames, so
both kernels see the real round trip. It belongs to one helper process, which makes the three namespaces (anonymous: no
name in ``/run/netns``, so any number of wires exist side by side with the same addresses), forwards, and hands out
sockets. It ends when its control socket is closed, hence with the process that made the wire, however that ends; the
namespaces go with it, and with the last process inside.

Frames keep their offload header (``PACKET_VNET_HDR``): the kernels hand over up to 64 KiB of segments at once, as they
do with any local virtual network, while TCP counts and acknowledges segments of 1448 bytes. So segmentation costs
nothing here, windows and slow start are those of a real path, and hundreds of MB/s fit through one interpreter.
ARP and neighbour discovery are never delayed, so the first packet of a test is as fast as the next.

Without the right to make namespaces (no root), the helper takes it in a user namespace, where the system allows that.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
VNET_HEADER = 10
"""Bytes of ``struct virtio_net_hdr`` before each frame."""
ETH_P_ALL = 3

MAX_FRAME = 65536 + 256
"""The largest frame: 64 KiB of segments with headers."""
KERNEL_BUFFER = 64 << 20
"""Bytes that the kernel may hold for the forwarder, so that a burst waits while the interpreter is busy."""
QUEUE_BYTES = 512 << 20
"""Bytes on the wire in one direction before frames are dropped: 1 GB/s at 0.5 s."""
BATCH = 32
"""Frames read from one side before those that are due are sent: keeps lateness below a millisecond."""
ANSWER_TIMEOUT = 10.0
"""Seconds within which the helper answers; making the namespaces takes about 0.1."""


class WireError(Exception):
    """The namespaces could not be made; the text says what the system refused."""


@dataclass(frozen=True, slots=True)
class WireStats:
    """What the wire carried so far.

    Attributes:
        frames, bytes: forwarded, from a to b and from b to a. A frame may hold up to 64 KiB of segments.
        dropped: frames lost because a queue was full. Zero, or the figures of that run mean nothing.
        late: seconds by which the latest frame missed its time.
        cpu: seconds of CPU that the wire's process took.
    """

    frames: tuple[int, int]
    bytes: tuple[int, int]
    dropped: int
    late: float
    cpu: float


class Namespace:
    """One end of a wire: a network namespace with ``lo`` and ``eth0``.

    Attributes:
        address, address6: of ``eth0``.
    """

    def __init__(self, wire: Wire, index: int, fds: tuple[int, ...], address: str, address6: str) -> None:
        self._wire = wire
        self._index = index
        self._fds = fds
        self.address = address
        self.address6 = address6

    def command(self, argv: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
        """What runs a command inside: the arguments, and the file descriptors to pass on (``pass_fds``).

        The process that is started becomes the command (exec), so its id, signals and exit status are the command's.
        """
        fds = ",".join(map(str, self._fds))
        return [sys.executable, "-I", "-S", os.path.abspath(__file__), "enter", fds, *argv], self._fds

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command inside, with the options of `subprocess.Popen`."""
        command, fds = self.command(argv)
        return subprocess.Popen(command, pass_fds=fds, **options)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new socket that lives in this namespace, for use by this process.

        Raises:
            WireError: the wire is closed.
        """
        return self._wire._new_socket(self._index, family, kind)


class Wire:
    """Make two namespaces and the wire between them. A context manager; also ends with this process.

    Args:
        delay: seconds that each frame is held, each way. 0 forwards at once.
        settings: what to write into files under ``/proc/sys/net`` at both ends, such as
            ``{"ipv4/tcp_congestion_control": "cubic"}``; what is not named is as on this host.

    Attributes:
        a, b: the two ends.

    Raises:
        WireError: the system does not let us make network namespaces, or refuses a setting.
    """

    def __init__(self, delay: float = 0.0, settings: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", os.path.abspath(__file__)),
                    *("hold", str(theirs.fileno()), repr(delay), json.dumps(dict(settings or {}))),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the test, which then closes the wire
            )
        self._control = ours
        self._control.settimeout(ANSWER_TIMEOUT)
        self._fds: list[int] = []
        try:
            fds = self._receive()[1]
            user, nets = tuple(fds[2:]), fds[:2]
            self.a, self.b = (
                Namespace(self, index, (*user, net), f"11.0.0.{index + 1}", f"2d00::{index + 1}")
                for index, net in enumerate(nets)
            )
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the helper."""
        return self._process.pid

    @property
    def delay(self) -> float:
        """Seconds that each frame is held. Setting it counts for frames that arrive from then on."""
        return float(self._ask(do="stats")["delay"])

    @delay.setter
    def delay(self, seconds: float) -> None:
        self._ask(do="delay", seconds=seconds)

    def stats(self) -> WireStats:
        """What was carried so far."""
        answer = self._ask(do="stats")
        return WireStats(
            tuple(answer["frames"]), tuple(answer["bytes"]), answer["dropped"], answer["late"], answer["cpu"]
        )

    def close(self) -> None:
        """End the wire. The namespaces vanish with the last process or socket inside."""
        self._control.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        try:
            self._process.wait(ANSWER_TIMEOUT)
        except subprocess.TimeoutExpired:  # pragma: no cover - only if the machine is stuck
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _new_socket(self, index: int, family: int, kind: int) -> socket.socket:
        self._send(do="socket", index=index, family=int(family), kind=int(kind))
        _, fds = self._receive(keep=False)
        return socket.socket(fileno=fds[0])

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._send(**request)
        return self._receive()[0]

    def _send(self, **request: Any) -> None:
        try:
            self._control.send(json.dumps(request).encode())
        except OSError as error:
            raise WireError(f"the wire is closed: {error}") from error

    def _receive(self, keep: bool = True) -> tuple[dict[str, Any], list[int]]:
        room = socket.CMSG_SPACE(8 * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._control.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise WireError(f"the wire does not answer: {error}") from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if keep:
            self._fds += fds
        if not data:
            raise WireError("the wire's process ended")
        answer = json.loads(data)
        if "error" in answer:
            raise WireError(answer["error"])
        return answer, list(fds)


# ── inside the helper ────────────────────────────────────────────────────────────────────────────────────────────────

_libc = ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _setns(fd: int, kind: int) -> None:
    if _libc.setns(fd, kind):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _namespace_fd(kind: str) -> int:
    return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


class _Netlink:
    """Just enough of rtnetlink (RFC 3549, ``linux/rtnetlink.h``) to make and address a link."""

    NEWLINK, NEWADDR = 16, 20
    IFNAME, LINKINFO, NET_NS_FD, AF_SPEC = 3, 18, 28, 26
    REQUEST, ACK, CREATE_EXCLUSIVE = 0x01, 0x04, 0x600
    UP = 1
    NODAD = 0x02

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.bind((0, 0))

    @staticmethod
    def attribute(kind: int, content: bytes) -> bytes:
        return struct.pack("=HH", len(content) + 4, kind) + content + bytes(-len(content) % 4)

    def veth(self, name: str, peer: str, peer_namespace: int) -> None:
        """A pair of virtual interfaces: ``name`` here, ``peer`` in another namespace, both of MTU 1500."""
        nest = self.attribute
        there = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        there += nest(self.IFNAME, peer.encode() + b"\0") + nest(self.NET_NS_FD, struct.pack("=I", peer_namespace))
        info = nest(1, b"veth\0") + nest(2, nest(1, there))
        header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
        body = header + nest(self.IFNAME, name.encode() + b"\0") + nest(self.LINKINFO, info)
        self._request(self.NEWLINK, self.CREATE_EXCLUSIVE, body)

    def up(self, name: str, mute: bool = False) -> None:
        """Switch an interface on; ``mute``: without a link-local address (IFLA_INET6_ADDR_GEN_MODE none)."""
        header = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), self.UP, self.UP)
        nest = self.attribute
        spec = nest(self.AF_SPEC, nest(socket.AF_INET6, nest(8, b"\x01"))) if mute else b""
        self._request(self.NEWLINK, 0, header + spec)

    def address(self, name: str, address: str, prefix: int) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        raw = socket.inet_pton(family, address)
        head = struct.pack("=BBBBI", family, prefix, self.NODAD, 0, socket.if_nametoindex(name))
        self._request(self.NEWADDR, self.CREATE_EXCLUSIVE, head + self.attribute(1, raw) + self.attribute(2, raw))

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        message = struct.pack("=IHHII", 16 + len(body), kind, self.REQUEST | self.ACK | flags, 1, 0) + body
        self._socket.send(message)
        answer = self._socket.recv(65536)
        (code,) = struct.unpack_from("=i", answer, 16)
        if code:
            raise OSError(-code, os.strerror(-code))

    def close(self) -> None:
        self._socket.close()


def _make_namespaces(settings: Mapping[str, str]) -> tuple[list[int], list[int]]:
    """Make both ends and the wire's namespace, in which this process then is; returns the ends' fds and a user's."""
    user: list[int] = []
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        for file, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{file}", "w", encoding="ascii") as target:
                target.write(content)
        user.append(_namespace_fd("user"))
    ends = [_namespace_fd("net")]
    _unshare(CLONE_NEWNET)
    ends.append(_namespace_fd("net"))
    _unshare(CLONE_NEWNET)
    wire = _namespace_fd("net")
    netlink = _Netlink()
    for name, fd in zip("ab", ends, strict=True):
        netlink.veth(name, "eth0", fd)
        netlink.up(name, mute=True)
    netlink.close()
    for number, fd in enumerate(ends, 1):
        _setns(fd, CLONE_NEWNET)
        netlink = _Netlink()
        netlink.up("lo")
        netlink.up("eth0")
        netlink.address("eth0", f"11.0.0.{number}", 24)
        netlink.address("eth0", f"2d00::{number}", 64)
        netlink.close()
        for name, value in settings.items():  # /proc/sys/net is that of the namespace in which the reader is
            with open(f"/proc/sys/net/{name}", "w", encoding="ascii") as target:
                target.write(value)
    _setns(wire, CLONE_NEWNET)
    return [*ends, wire], user


def _is_neighbour(frame: memoryview) -> bool:
    """ARP, or ICMPv6 router and neighbour discovery (types 133 to 137)."""
    kind = frame[12] << 8 | frame[13]
    return kind == 0x0806 or (kind == 0x86DD and len(frame) > 54 and frame[20] == 58 and 133 <= frame[54] <= 137)


class _Side:
    """One interface of the wire, and the frames that were read from it and wait."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self.socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        for option, plain in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, option, KERNEL_BUFFER)
            except PermissionError:
                self.socket.setsockopt(socket.SOL_SOCKET, plain, KERNEL_BUFFER)
        self.socket.bind((name, ETH_P_ALL))
        self.other: _Side
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.held = 0
        self.frames = 0
        self.bytes = 0


class _Forwarder:
    """Reads frames at either side and writes them at the other when their time has come."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.sides = [_Side("a"), _Side("b")]
        self.sides[0].other, self.sides[1].other = self.sides[1], self.sides[0]
        self.dropped = 0
        self.late = 0.0
        self._buffer = bytearray(VNET_HEADER + MAX_FRAME)
        self._view = memoryview(self._buffer)

    def read(self, side: _Side) -> None:
        view, wait = self._view, self.delay
        for _ in range(BATCH):
            try:
                size = side.socket.recv_into(view)
            except BlockingIOError:
                return
            except OSError:  # the interface went down: it is being taken apart
                return
            frame = view[:size]
            if not wait or _is_neighbour(frame[VNET_HEADER:]):
                self._write(side, frame)
            elif side.held > QUEUE_BYTES:
                self.dropped += 1
            else:
                side.waiting.append((time.monotonic() + wait, bytes(frame)))
                side.held += size

    def send_due(self) -> float | None:
        """Write what is due; returns the seconds until the next is, or ``None``."""
        soonest: float | None = None
        for side in self.sides:
            waiting = side.waiting
            while waiting:
                due = waiting[0][0]
                now = time.monotonic()
                if due > now:
                    soonest = due - now if soonest is None else min(soonest, due - now)
                    break
                self.late = max(self.late, now - due)
                frame = waiting.popleft()[1]
                side.held -= len(frame)
                self._write(side, frame)
        return soonest

    def _write(self, side: _Side, frame: bytes | memoryview) -> None:
        try:
            side.other.socket.send(frame)
        except OSError:
            self.dropped += 1
            return
        side.frames += 1
        side.bytes += len(frame) - VNET_HEADER

    def stats(self) -> dict[str, Any]:
        lost = 0
        for side in self.sides:  # PACKET_STATISTICS: frames that found the kernel's buffer full, since the last look
            lost += struct.unpack("=II", side.socket.getsockopt(SOL_PACKET, 6, 8))[1]
        self.dropped += lost
        return {
            "delay": self.delay,
            "frames": [side.frames for side in self.sides],
            "bytes": [side.bytes for side in self.sides],
            "dropped": self.dropped,
            "late": self.late,
            "cpu": time.process_time(),
        }


def _hold(control_fd: int, delay: float, settings: Mapping[str, str]) -> None:
    """The helper's whole life: make the namespaces, say so, forward until the control socket is closed."""
    control = socket.socket(fileno=control_fd)
    try:
        namespaces, user = _make_namespaces(settings)
        forwarder = _Forwarder(delay)
    except OSError as error:
        message = f"can't make network namespaces here ({error.strerror}); run as root, or allow user namespaces"
        control.send(json.dumps({"error": message}).encode())
        return
    wire = namespaces.pop()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: sys.exit(0))
    # The wire stands for a path that costs no CPU: where we may, it goes before those whom it joins.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
        with open("/proc/self/autogroup", "w", encoding="ascii") as group:  # where sessions are what is weighed
            group.write("-15")
    _libc.prctl(29, 1, 0, 0, 0)  # PR_SET_TIMERSLACK: 1 ns instead of 50 us
    socket.send_fds(control, [b"{}"], namespaces + user)
    sides = {side.socket.fileno(): side for side in forwarder.sides}
    watched = [*sides, control_fd]
    while True:
        # select and not epoll: its timeout is in microseconds instead of milliseconds.
        ready = select.select(watched, (), (), forwarder.send_due())[0]
        for fd in ready:
            if fd != control_fd:
                forwarder.read(sides[fd])
                continue
            request = control.recv(65536)
            if not request:
                return
            match json.loads(request):
                case {"do": "delay", "seconds": seconds}:
                    forwarder.delay = seconds
                    control.send(b"{}")
                case {"do": "stats"}:
                    control.send(json.dumps(forwarder.stats()).encode())
                case {"do": "socket", "index": index, "family": family, "kind": kind}:
                    _setns(namespaces[index], CLONE_NEWNET)
                    with socket.socket(family, kind) as made:
                        _setns(wire, CLONE_NEWNET)
                        socket.send_fds(control, [b"{}"], [made.fileno()])


def _enter(fds: list[int], argv: list[str]) -> None:
    """Become a command inside a namespace; the user namespace, if there is one, comes first."""
    for fd in fds:
        _setns(fd, 0)
        os.close(fd)
    os.execvp(argv[0], argv)  # noqa: S606 - becoming the command is the purpose


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        _hold(int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        _enter([int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:])
