"""The wires that do something: a process that holds, drops and passes on packets.

Each direction of a link is a `Schedule`, which decides by packet number alone: the fate of the 17th packet is the same
in every run with the same seed, whatever the clock says. ARP, multicast and neighbour discovery pass at once and count
for nothing, so the first packet of a test is as fast as the next.

Frames are read from a ring that the kernel writes into (``PACKET_RX_RING``), so bursts need no large socket buffer,
which only root could ask for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import mmap
import os
import random
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from . import _channel, _kernel

QUEUE_BYTES = 256 << 10
"""What waits before a link of limited rate, at most; then packets are dropped, as a router's buffer does."""
HELD_BYTES = 64 << 20
"""What is on its way in one direction, at most: 1 Gbit/s at half a second."""
BATCH = 64
"""Frames read from one side before those that are due are sent, so that no one waits for long."""

_SLOT = 2048
_SLOTS = 8192
_BLOCK = 1 << 16
_SOL_PACKET, _RX_RING, _VERSION, _IGNORE_OUTGOING = 263, 5, 10, 23
_STATUS_USER = 1
_HEADER = struct.Struct("=IIIH22xi")
"""``struct tpacket2_hdr``: status, length, captured length, where the frame starts; then ``sockaddr_ll``: interface."""


class Schedule:
    """When a packet arrives at the other end, or that it never does. Pure: its random numbers are those of a seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random
        self._free = 0.0
        self._last = 0.0
        self.set(0.0, 0.0, 0.0, 0.0)

    def set(self, delay: float, jitter: float, loss: float, rate: float) -> None:
        """Change what happens to packets from now on; those under way keep their times."""
        self._delay, self._jitter, self._loss, self._rate = delay, jitter, loss, rate

    def due(self, now: float, size: int) -> float | None:
        """The time at which a packet of so many bytes, read now, is to be passed on; None: it is lost.

        Every packet takes two random numbers, so that a change of one setting changes nothing for the others.
        """
        dice, sway = self._random(), self._random()
        if dice < self._loss:
            return None
        at = now
        if self._rate:
            start = max(now, self._free)
            if (start - now) * self._rate > QUEUE_BYTES * 8:
                return None
            at = self._free = start + size * 8 / self._rate
        at += self._delay + self._jitter * (2 * sway - 1)
        self._last = at = max(at, self._last)
        return at


def is_neighbour(frame: bytes) -> bool:
    """What neighbours say to each other: ARP, multicast, ICMPv6 router and neighbour discovery (types 133 to 137)."""
    if frame[0] & 1:
        return True
    kind = frame[12:14]
    return kind == b"\x08\x06" or (
        kind == b"\x86\xdd" and len(frame) > 54 and frame[20] == 58 and 133 <= frame[54] <= 137
    )


class _Direction:
    """One way through a link: frames from an interface, to the other when their time has come."""

    def __init__(self, ring: _Ring, source: str, target: str, seed: str) -> None:
        self.schedule = Schedule(seed)
        self.source = socket.if_nametoindex(source)
        self.open = True
        self.held = 0
        self.frames = self.lost = 0
        self._send = ring.sender(socket.if_nametoindex(target))

    def take(self, now: float, frame: bytes) -> float | None:
        """The time at which a frame that has come is to be sent; None: never, or it already was."""
        if is_neighbour(frame):
            self.send(frame)
            return None
        size = len(frame)
        at = self.schedule.due(now, size)
        if at is None or self.held > HELD_BYTES:
            self.lost += 1
            return None
        self.held += size
        return at

    def send(self, frame: bytes) -> None:
        if self._send(frame) == len(frame):
            self.frames += 1
        else:  # the interface is being taken apart, or its queue is full, which is a loss like any other
            self.lost += 1


class _Ring:
    """One packet socket for all interfaces of the namespace, with memory that the kernel puts frames into.

    One, because the kernel takes tens of milliseconds to end each. A filter keeps out what plain links carry.
    """

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        self.socket.setsockopt(_SOL_PACKET, _VERSION, 1)
        self.socket.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        blocks = _SLOT * _SLOTS // _BLOCK
        self.socket.setsockopt(_SOL_PACKET, _RX_RING, struct.pack("=IIII", _BLOCK, blocks, _SLOT, _SLOTS))
        self._memory = mmap.mmap(self.socket.fileno(), _SLOT * _SLOTS)
        self._slot = 0
        self.listen_to([])
        _kernel.bind_packets(self.socket.fileno())

    def listen_to(self, interfaces: list[int]) -> None:
        """Take frames of these interfaces only: a classic BPF program that compares the frame's interface."""
        load = (0x20, 0, 0, 0xFFFFF000 + 8)  # the interface's number, an ancillary word of every packet
        tests = [step for each in interfaces for step in ((0x15, 0, 1, each), (0x06, 0, 0, _SLOT))]
        program = [load, *tests, (0x06, 0, 0, 0)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
        self.socket.setsockopt(socket.SOL_SOCKET, 26, struct.pack("@HP", len(program), ctypes.addressof(code)))

    def read(self) -> Iterator[tuple[int, bytes]]:
        """What has come, in order: the number of the interface, and the frame."""
        memory, unpack = self._memory, _HEADER.unpack_from
        for _ in range(BATCH):
            base = self._slot * _SLOT
            status, _, size, start, interface = unpack(memory, base)
            if not status & _STATUS_USER:
                return
            frame = memory[base + start : base + start + size]
            memory[base : base + 4] = b"\0\0\0\0"
            self._slot = (self._slot + 1) % _SLOTS
            yield interface, frame

    def sender(self, interface: int) -> Callable[[bytes], int]:
        """What sends a frame from an interface, and returns its size; `socket.sendto` would look up the name."""
        return _kernel.packet_sender(self.socket.fileno(), interface)

    def overrun(self) -> int:
        """Frames that found the memory full since the last look."""
        dropped: int = struct.unpack("=II", self.socket.getsockopt(_SOL_PACKET, 6, 8))[1]  # PACKET_STATISTICS
        return dropped


def serve(control: socket.socket) -> None:
    """The wire process: forward, and obey, until the control socket is closed."""
    _kernel.precise_timers()
    with contextlib.suppress(PermissionError):  # a path costs no CPU; where we may, go before those whom we join
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    gc.disable()  # nothing here makes cycles, and a collection is a jitter of its own
    ring = _Ring()
    directions: dict[str, _Direction] = {}
    by_source: dict[int, _Direction] = {}
    heap: list[tuple[float, int, _Direction, bytes]] = []
    number, late, armed = 0, 0.0, 0.0
    timer = _kernel.Timer()
    poll = select.epoll()
    for fd in (control.fileno(), timer.fd, ring.socket.fileno()):
        poll.register(fd, select.EPOLLIN)
    while True:
        soonest = heap[0][0] if heap else 0.0
        if soonest != armed:
            timer.set(soonest)
            armed = soonest
        for fd, _ in poll.poll():
            if fd == timer.fd:
                armed = -1.0
            elif fd == control.fileno():
                try:
                    request, _ = _channel.receive(control)
                except _channel.Closed:
                    return
                answer: dict[str, Any] = {}
                if "stats" in request:
                    answer = {key: {"frames": each.frames, "lost": each.lost} for key, each in directions.items()}
                    answer |= {"overrun": ring.overrun(), "late": late, "cpu": time.process_time()}
                    late = 0.0
                else:
                    try:
                        _set(request, directions, ring)
                    except OSError as error:
                        answer = {"error": f"the wire {request['key']} can't be set: {error}"}
                    by_source = {each.source: each for each in directions.values()}
                    ring.listen_to(list(by_source))
                _channel.send(control, answer)
            else:
                now = time.monotonic()
                for interface, frame in ring.read():
                    if (direction := by_source.get(interface)) and (at := direction.take(now, frame)) is not None:
                        number += 1  # keeps equal times in order
                        heapq.heappush(heap, (at, number, direction, frame))
        now = time.monotonic()
        while heap and heap[0][0] <= now:
            at, _, direction, frame = heapq.heappop(heap)
            direction.held -= len(frame)
            if direction.open:
                direction.send(frame)
                now = time.monotonic()
                if now - at > late:
                    late = now - at


def _set(request: dict[str, Any], directions: dict[str, _Direction], ring: _Ring) -> None:
    key, link = request["key"], request["link"]
    if link is None:
        if direction := directions.pop(key, None):
            direction.open = False  # what is under way is lost, as on a cable that is cut
        return
    if key not in directions:
        directions[key] = _Direction(ring, request["source"], request["target"], request["seed"])
    directions[key].schedule.set(link["delay"], link["jitter"], link["loss"], link["rate"])


def start(namespace: int) -> tuple[int, socket.socket]:
    """Fork the wire process into its namespace; returns its process id and our end of its control socket."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        signal.set_wakeup_fd(-1)
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(kind, signal.SIG_DFL)
        ours.close()
        _kernel.setns(namespace, _kernel.CLONE_NEWNET)
        serve(theirs)
    except BaseException:  # noqa: BLE001 - whatever it is, this child ends here
        traceback.print_exc()
    finally:
        os._exit(0)
