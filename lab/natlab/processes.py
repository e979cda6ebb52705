"""What runs in a host: programs and functions, seen from the process that started them."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _kernel, _remote
from .errors import LabError

if TYPE_CHECKING:
    from .running import Host

COMMAND_TIMEOUT = 60.0
"""Seconds for a program in a host unless told otherwise: no test should wait longer for a stuck one."""
END_TIMEOUT = 10.0
"""Seconds for the lab to be gone; the kernel kills what is left at once."""
TAIL = 800
"""Characters of output that an error cites."""


class Log:
    """What is written by somebody else: into a file without a name, and from `settle` on in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by settle or close
        self._settled: bytes | None = None

    def fileno(self) -> int:
        return self._file.fileno()

    def content(self) -> bytes:
        """All of it so far.

        Raises:
            LabError: the lab was closed.
        """
        if self._settled is not None:
            return self._settled
        if self._file.closed:
            raise LabError("the lab is closed: read before that what was written in it")
        return os.pread(self.fileno(), os.fstat(self.fileno()).st_size, 0)

    def settle(self) -> None:
        """Nobody writes any more: free the file descriptor."""
        if not self._file.closed:
            self._settled = self.content()
            self._file.close()

    def close(self) -> None:
        self._file.close()
        self._settled = None


class Process:
    """Something that runs in a host. Its output is kept by the lab, whoever reads it or not.

    Attributes:
        host, name: where, and what it is called in logs.
        pid: process id, as outside of the lab; also of its group.
        stdin: to write to, if it was asked for.
    """

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name = host, name
        self.pid = 0
        self.stdin: Any = None
        self._out, self._err = Log(), Log()
        self._report, self._reporting = os.pipe2(os.O_CLOEXEC)
        self._status: int | None = None
        self._lock = threading.Lock()

    @property
    def _logs(self) -> tuple[Log, ...]:
        return self._out, self._err

    def _settle(self) -> None:
        """It has ended: keep no file descriptors for it."""
        for log in self._logs:
            log.settle()
        self._stop_writing()

    def _close(self) -> None:
        for log in self._logs:
            log.close()
        self._stop_writing()
        with self._lock:
            self._stop_waiting()

    def _stop_writing(self) -> None:
        if self.stdin:
            with contextlib.suppress(OSError):
                self.stdin.close()

    def _stop_waiting(self) -> None:
        for name in ("_report", "_reporting"):
            fd: int = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def _started(self, pid: int) -> None:
        self.pid = pid
        os.close(self._reporting)
        self._reporting = -1

    @property
    def status(self) -> int | None:
        """Exit status; negative: the signal that ended it; None: it runs."""
        with self._lock:
            if self._status is None and self._report >= 0 and select.select([self._report], [], [], 0)[0]:
                said = os.read(self._report, 32)
                self._status = int(said) if said else -signal.SIGKILL  # nobody was left to tell
                self._stop_waiting()
            return self._status

    @property
    def stdout(self) -> str:
        """Everything it wrote so far."""
        return self._out.content().decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.content().decode(errors="replace")

    def wait(self, timeout: float | None = COMMAND_TIMEOUT) -> int:
        """Wait for its end; returns the exit status.

        Raises:
            LabError: it runs longer.
        """
        poll = select.poll()
        if (report := self._report) >= 0:
            poll.register(report, select.POLLIN)
            poll.poll(None if timeout is None else timeout * 1000)
        status = self.status
        if status is None:
            raise LabError(f"{self} did not end within {timeout:g} s{self._tail()}")
        return status

    def expect(self, pattern: str, timeout: float = COMMAND_TIMEOUT) -> re.Match[str]:
        """Wait until it has written something that matches a regular expression, to stdout or stderr.

        Raises:
            LabError: it did not within so many seconds, or ended before.
        """
        deadline = time.monotonic() + timeout
        wanted = re.compile(pattern, re.MULTILINE)
        with contextlib.ExitStack() as stack:
            poll = select.poll()
            if (report := self._report) >= 0:
                poll.register(report, select.POLLIN)
                for log in (self._out, self._err):
                    watch = _kernel.inotify(f"/proc/self/fd/{log.fileno()}")
                    stack.callback(os.close, watch)
                    poll.register(watch, select.POLLIN)
            while True:
                status = self.status
                for text in (self.stdout, self.stderr):
                    if match := wanted.search(text):
                        return match
                left = deadline - time.monotonic()
                if status is not None:
                    raise LabError(f"{self} ended with status {status} and never wrote {pattern!r}{self._tail()}")
                if left <= 0:
                    raise LabError(f"{self} did not write {pattern!r} within {timeout:g} s{self._tail()}")
                for fd, _ in poll.poll(left * 1000):
                    if fd != report:
                        os.read(fd, 65536)

    def signal(self, number: int) -> None:
        """Send a signal to it and its children; nothing happens if it has ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children, and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait(END_TIMEOUT)

    def _tail(self) -> str:
        said = (self.stdout + self.stderr).strip()
        return f"; it wrote: …{said[-TAIL:]}" if len(said) > TAIL else f"; it wrote: {said}" if said else ""

    def __str__(self) -> str:
        return f"{self.name} in {self.host.name}"


class Call(Process):
    """A function that runs in a host."""

    def __init__(self, host: Host, name: str) -> None:
        super().__init__(host, name)
        self._outcome = Log()

    def result(self, timeout: float | None = COMMAND_TIMEOUT) -> Any:
        """Wait for what it returns.

        Raises:
            LabError: it took longer, or its process was killed.
            BaseException: what it raised itself.
        """
        status = self.wait(timeout)
        data = self._outcome.content()
        if status or not data:
            raise LabError(f"{self} came to no result, its process ended with status {status}{self._tail()}")
        return _remote.unpack(data)

    @property
    def _logs(self) -> tuple[Log, ...]:
        return self._out, self._err, self._outcome


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that has run."""

    status: int
    stdout: str
    stderr: str
