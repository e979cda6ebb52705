"""The process from which functions in hosts are forked: imports are done once, not once per call.

One per test process, started fresh on first use, outside of any lab. A fork of it enters the lab's user and PID
namespaces, forks once more (a PID namespace counts for children only), enters the host, and runs the function; so it is
killed with the lab like any process there. This process ends with the control socket, hence with the test process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence

from . import _channel, _fresh, _kernel, _remote
from .errors import LabError

PRELOAD_TIMEOUT = 60.0
"""Seconds that the imports may take: large libraries need 3."""


class Zygote:
    """The test process' side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        path = [*sys.path, root]
        code = f"import sys; sys.path[:] = {path!r}; from natlab._zygote import serve; serve({theirs.fileno()})"
        with theirs:
            self._process = _fresh.start("natlab-functions", code, theirs.fileno())
        self._socket = ours
        self._socket.settimeout(PRELOAD_TIMEOUT)
        self._loaded: set[str] = set()
        self.is_open = True

    def preload(self, modules: Iterable[str]) -> None:
        """Import modules in the process that is forked.

        Raises:
            LabError: one can't be imported.
        """
        if new := [name for name in modules if name not in self._loaded]:
            self._ask({"modules": new})
            self._loaded.update(new)

    def start(self, fds: Sequence[int]) -> int:
        """Run a call in a host; returns its process id.

        Args:
            fds: of the call, its outcome, the report of its end, standard input, output and error, the network
                namespace, the user namespace, if there is one, and the PID namespace.
        """
        return int(self._ask({}, fds)["pid"])

    def _ask(self, request: dict[str, object], fds: Sequence[int] = ()) -> dict[str, int]:
        with self._lock:
            try:
                _channel.send(self._socket, request, fds)
                answer, _ = _channel.receive(self._socket)
            except _channel.Closed as error:
                self.close()
                raise LabError(f"the process that runs functions in hosts is gone: {error}") from None
        if "error" in answer:
            raise LabError(answer["error"])
        return answer

    def close(self) -> None:
        self.is_open = False
        self._socket.close()
        self._process.kill()  # it may be in the middle of an import
        self._process.wait()


_shared: tuple[int, Zygote] | None = None
_wanted: dict[str, None] = {}
_sharing = threading.Lock()


def preload(*modules: str) -> None:
    """Have these modules imported before a function runs in a host: once per test process, not once per call."""
    _wanted.update(dict.fromkeys(modules))


def shared() -> Zygote:
    """The one of this process."""
    global _shared
    with _sharing:
        if _shared is None or _shared[0] != os.getpid() or not _shared[1].is_open:
            zygote = Zygote()
            atexit.register(zygote.close)
            _shared = os.getpid(), zygote
        zygote = _shared[1]
    zygote.preload(_wanted)
    return zygote


def serve(control_fd: int) -> None:
    """The process' life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries our children
    control = socket.socket(fileno=control_fd)
    while True:
        try:
            request, fds = _channel.receive(control)
        except _channel.Closed:
            return
        answer: dict[str, object] = {}
        if "modules" in request:
            try:
                for name in request["modules"]:
                    importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - an import runs anything
                answer = {"error": f"{name} can't be imported for functions in hosts: {error}"}
        else:
            hearing, telling = os.pipe()
            if not os.fork():
                control.close()
                os.close(hearing)
                _middle(fds, telling)
            os.close(telling)
            said = b""
            while part := os.read(hearing, 4096):
                said += part
            os.close(hearing)
            answer = {"pid": int(said)} if said.isdigit() else {"error": f"can't enter the host: {said.decode()}"}
        for fd in fds:
            os.close(fd)
        _channel.send(control, answer)


def _middle(fds: list[int], telling: int) -> None:
    """Stands between: enters the PID namespace, waits for the function's process, reports its end."""
    data, outcome, report, stdin, stdout, stderr, net, *user, pids = fds
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in user:
            _kernel.setns(each, _kernel.CLONE_NEWUSER)
        _kernel.setns(pids, _kernel.CLONE_NEWPID)
        ready, begun = os.pipe()
        pid = os.fork()
        if not pid:
            _kernel.setns(net, _kernel.CLONE_NEWNET)
            os.setsid()
            os.write(begun, b"!")
            for each in (telling, begun, ready, report, net, *user, pids):
                os.close(each)
            _run(data, outcome, (stdin, stdout, stderr))
        os.close(begun)
        os.read(ready, 1)
        os.write(telling, b"%d" % pid)
        os.close(telling)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException as error:  # noqa: BLE001 - whatever it is, this child ends here
        os.write(telling, str(error).encode())
    finally:
        with contextlib.suppress(OSError):  # nobody waits for it any more
            os.write(report, b"%d\n" % status)
        os._exit(0)


def _run(data: int, outcome: int, standard: tuple[int, int, int]) -> None:
    """Be the function's process."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, fd in enumerate(standard):
            os.dup2(fd, target)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        result = _remote.call(os.pread(data, os.fstat(data).st_size, 0))
        view = memoryview(result)
        while view:
            view = view[os.write(outcome, view) :]
        status = 0
    except BaseException:  # noqa: BLE001 - as above
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
