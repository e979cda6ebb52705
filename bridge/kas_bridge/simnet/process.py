"""A child process that ends with us, whatever happens, and tells what it costs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import trio

from kas_bridge.simnet.wire import Namespace

STOP_TIMEOUT = 20.0
"""Seconds after the polite signal before a process is killed. kaspad closes its database in 0.5, when busy in 5."""

# Asks the kernel to kill this process when the thread that started it is gone, then becomes the command. A killed test
# run leaves no node behind. (PR_SET_PDEATHSIG is 1, SIGKILL is 9; the parent may be gone before we asked.)
_LEASH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


def pass_on_niceness(pid: int) -> None:
    """Give a child with a session of its own our nice value, where we may.

    With autogroups (sched(7)) the scheduler weighs sessions, and each begins at 0 whatever its processes' own values:
    ``nice -n -15`` before a measuring program would not reach what it measures.
    """
    if niceness := os.getpriority(os.PRIO_PROCESS, 0):
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness), encoding="ascii")


class ProcessEnded(Exception):
    """A process ended that was to stay. The text holds the last lines that it wrote."""


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Bound a step, as `trio.fail_after` does, and say which one it was.

    Args:
        seconds: for the block.
        what: the step, as the subject of a sentence.

    Raises:
        trio.TooSlowError: the block took longer; the text names the step, and says what to do.
    """
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise trio.TooSlowError(f"{what} took more than {seconds:g} s: try again when this machine has less to do")


class Process:
    """One child process. Start it in the main thread with `start`; end it with `stop` or `kill`.

    Attributes:
        argv: the command.
        log: file that takes what it writes.
        pid: its process id.
    """

    def __init__(self, argv: Sequence[str], popen: subprocess.Popen[bytes], log: Path) -> None:
        self.argv = tuple(argv)
        self.log = log
        self.pid = popen.pid
        self._popen = popen
        self._cpu = 0.0

    @classmethod
    def start(
        cls, argv: Sequence[str], *, log: Path, inside: Namespace | None = None, env: Mapping[str, str] | None = None
    ) -> Self:
        """Start a command.

        Args:
            argv: the command and its arguments.
            log: file to which its output is appended.
            inside: namespace in which it runs.
            env: its environment instead of ours.

        Raises:
            OSError: it can't be started.
        """
        command: list[str] = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *argv]
        fds: tuple[int, ...] = ()
        if inside is not None:
            # The leash comes second: entering a user namespace would take it off.
            command, fds = inside.command(command)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                env=env,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we then end it in order
            )
        pass_on_niceness(popen.pid)
        return cls(argv, popen, log)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    async def wait(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._popen.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)
        return self._popen.wait()

    async def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """End it politely (SIGINT), then by force; returns the exit status. Also when it is cancelled."""
        if self.running:
            self.cpu()
            self._popen.send_signal(signal.SIGINT)
            try:
                with trio.CancelScope(shield=True), trio.move_on_after(timeout):
                    return await self.wait()
            finally:
                if self.running:
                    self._popen.kill()
        return self._popen.wait()

    def kill(self) -> None:
        """End it at once (SIGKILL), as a power cut would."""
        self.cpu()
        self._popen.kill()
        self._popen.wait()

    def suspend(self) -> None:
        """Stop it from running (SIGSTOP): it hangs, with its connections open."""
        self._popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again (SIGCONT)."""
        self._popen.send_signal(signal.SIGCONT)

    def cpu(self) -> float:
        """Seconds of CPU taken so far, by user and system; the last figure known if it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return self._cpu
        if fields[0] != "Z":
            self._cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return self._cpu

    def memory(self) -> int:
        """Bytes resident; 0 if it has ended."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
                "SC_PAGESIZE"
            )
        except OSError:
            return 0

    def last_lines(self, count: int = 12) -> str:
        """The end of what it wrote."""
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
        except OSError:
            return ""
