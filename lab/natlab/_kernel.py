"""The few system calls that Python 3.11 does not offer."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable

CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def unshare(flags: int) -> None:
    """Leave the shared namespaces of these kinds."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int = 0) -> None:
    """Enter a namespace; a kind of 0 takes any."""
    _check(_libc.setns(fd, kind))


def die_with_parent(signal: int) -> None:
    """Have the kernel send this signal when the parent's thread ends; only for parents of a single thread."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0))


def precise_timers() -> None:
    """Wake up within a nanosecond instead of 50 us of what was asked."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0))


class Timer:
    """A file descriptor that becomes readable at a time of the monotonic clock, to the microsecond.

    poll and epoll round their timeouts up to milliseconds.
    """

    class _Spec(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]

    def __init__(self) -> None:
        self.fd = _check(_libc.timerfd_create(1, os.O_CLOEXEC | os.O_NONBLOCK))  # CLOCK_MONOTONIC
        self._spec = self._Spec(0, 0, 0, 0)
        self._pointer = ctypes.byref(self._spec)
        self._set = _libc.timerfd_settime

    def set(self, at: float) -> None:
        """Be readable from then on; 0: never."""
        spec = self._spec
        spec.at_s = int(at)
        spec.at_ns = int((at - spec.at_s) * 1e9)
        self._set(self.fd, 1, self._pointer, None)  # TFD_TIMER_ABSTIME


def _packet_address(interface: int, protocol: int) -> ctypes.Array[ctypes.c_char]:
    """``struct sockaddr_ll``."""
    packed = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(protocol), interface, 0, 0, 0)
    return ctypes.create_string_buffer(packed, len(packed))


def bind_packets(fd: int) -> None:
    """Have a packet socket get the frames of all interfaces, which `socket.bind` knows no name for."""
    address = _packet_address(0, 3)  # ETH_P_ALL
    _check(_libc.bind(fd, ctypes.byref(address), len(address)))


def packet_sender(fd: int, interface: int) -> Callable[[bytes], int]:
    """What sends a frame from an interface without waiting; returns how many bytes, or less than 0."""
    address = _packet_address(interface, 0)
    size, sendto, pointer = len(address), _libc.sendto, ctypes.byref(address)
    return lambda frame: int(sendto(fd, frame, len(frame), 0x40, pointer, size))  # MSG_DONTWAIT


def inotify(path: str) -> int:
    """A file descriptor that becomes readable when the file is written to."""
    fd = _check(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        _check(_libc.inotify_add_watch(fd, os.fsencode(path), 0x2))  # IN_MODIFY
    except OSError:
        os.close(fd)
        raise
    return fd
