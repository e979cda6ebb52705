"""The control socket: a Unix socket that only its owner can open. See ``_control`` for the protocol."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from kas_bridge._control import ActionError, Lines, RequestError, encode, event_values, parse_request
from kas_libp2p.errors import KasError
from kas_libp2p.events import Subscription

if TYPE_CHECKING:
    from kas_bridge.daemon import Daemon

MAX_CONNECTIONS = 32
"""Open at once. A few programs watch events; more is a mistake, and then the operator's own question still gets in: in
its place the connection is closed that has asked nothing for the longest."""

SILENCE = 60.0
"""Seconds after which a connection that asks nothing is closed. Events are not silence."""

WRITE_TIMEOUT = 5.0
"""Seconds for a client to take its answer."""

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path that the system takes."""

MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of one answer that a client reads: several hundred times the longest."""


class ControlError(KasError):
    """The control socket can't be opened, or no bridge answers there. The text says what helps."""


@contextmanager
def _usable(path: Path) -> Iterator[str]:
    """The path in a form that fits into a socket address: a long one is reached through its open directory."""
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def open_socket(paths: Sequence[Path]) -> tuple[Path, socket.socket]:
    """Listen at the first path where that is possible. The caller holds the data directory's lock, so what lies
    there is a socket that a bridge left behind.

    Raises:
        ControlError: at none.
    """
    problems = []
    for path in paths:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise OSError(errno.EEXIST, "there is a file of another kind")
                path.unlink()
            before = os.umask(0o177)
            try:
                with _usable(path) as name:
                    listener.bind(name)
            finally:
                os.umask(before)
            listener.listen()
        except OSError as error:
            listener.close()
            problems.append(f"{path}: {error.strerror}")
            continue
        return path, listener
    raise ControlError(f"can't open a control socket ({'; '.join(problems)}); give another --data-dir")


class ControlServer:
    """Answers on a control socket.

    Args:
        bridge: who does what is asked.
        listener: from `open_socket`.
        path: where it is, to be removed in the end.

    Attributes:
        refused: connections refused or closed because there were more than `MAX_CONNECTIONS`.
        malformed: requests that could not be understood.
    """

    def __init__(self, bridge: Daemon, listener: socket.socket, path: Path) -> None:
        self._bridge = bridge
        self._listener = trio.socket.from_stdlib_socket(listener)
        self._path = path
        self._open = 0
        self._waiting: dict[trio.SocketStream, trio.CancelScope] = {}
        """Connections that wait for a request, the one that has waited longest first."""
        self.refused = 0
        self.malformed = 0

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    try:
                        sock, _ = await self._listener.accept()
                    except OSError as error:
                        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                            raise
                        await trio.sleep(0.1)
                        continue
                    nursery.start_soon(self._serve, trio.SocketStream(sock))
        finally:
            self._listener.close()
            with suppress(OSError):
                self._path.unlink()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._open += 1
        try:
            async with stream:
                if self._open > MAX_CONNECTIONS:
                    self.refused += 1
                    if not self._waiting:
                        error = f"{MAX_CONNECTIONS} control connections are open already, and all are in use"
                        await _write(stream, {"ok": False, "error": error})
                        return
                    self._waiting.pop(next(iter(self._waiting))).cancel()
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client went away, or takes no answer
        except Exception as error:  # noqa: BLE001 - the one place where control connections are isolated from the rest
            self._bridge.trouble("control", error)
        finally:
            self._waiting.pop(stream, None)
            self._open -= 1

    async def _converse(self, stream: trio.SocketStream) -> None:
        lines = Lines()
        while True:
            data = b""
            with trio.move_on_after(SILENCE) as scope:
                self._waiting[stream] = scope
                data = bytes(await stream.receive_some(64 * 1024))
            self._waiting.pop(stream, None)
            if not data:
                return
            try:
                requests = lines.feed(data)
            except RequestError as error:
                self.malformed += 1
                await _write(stream, {"ok": False, "error": str(error)})
                return
            for request in requests:
                if await self._answer(stream, request) == "events":
                    with self._bridge.events.subscribe() as events:
                        await _write(stream, {"ok": True})
                        await _stream_events(stream, events)
                    return

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> str:
        """Do what one line asks, and answer; ``events`` is left to the caller. Returns the action."""
        bridge = self._bridge
        try:
            action, fields = parse_request(line)
        except RequestError as error:
            self.malformed += 1
            await _write(stream, {"ok": False, "error": str(error)})
            return ""
        if action == "events":
            return action
        try:
            answer = await self._do(action, fields)
        except ActionError as error:
            answer = {"ok": False, "error": str(error)}
        else:
            answer = {"ok": True, **answer}
        try:
            await _write(stream, answer)
        finally:
            if action == "stop":
                bridge.stop("by kas-bridge stop")
        return action

    async def _do(self, action: str, fields: dict[str, Any]) -> dict[str, Any]:
        bridge = self._bridge
        match action:
            case "status":
                return bridge.status() | {"control_refused": self.refused, "control_malformed": self.malformed}
            case "peers":
                return {"mode": bridge.mode, "peers": bridge.peers(), "upgrades": bridge.upgrades()}
            case "why":
                return bridge.why(fields["peer"])
            case "connect":
                return bridge.connect(fields["multiaddr"])
            case "disconnect":
                return await bridge.disconnect(fields["peer"])
            case "ban":
                return await bridge.ban(fields["target"], **{k: v for k, v in fields.items() if k != "target"})
            case "unban":
                return bridge.unban(fields["target"])
            case _:
                return {"pid": os.getpid(), "mode": bridge.mode}


async def _stream_events(stream: trio.SocketStream, events: Subscription) -> None:
    async with trio.open_nursery() as nursery:

        async def until_closed() -> None:
            while await stream.receive_some(4096):
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_closed)
        async for event in events:
            await _write(stream, event_values(event))
        nursery.cancel_scope.cancel()


async def _write(stream: trio.SocketStream, values: dict[str, Any]) -> None:
    with trio.fail_after(WRITE_TIMEOUT):
        await stream.send_all(encode(values))


# -- The client --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _connected(paths: Sequence[Path]) -> AsyncIterator[trio.SocketStream]:
    problem = ""
    for path in paths:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _usable(path) as name:
                await sock.connect(name)
        except PermissionError:
            sock.close()
            problem = f"the bridge at {path} belongs to another user: ask as that user, for instance with sudo -u"
            continue
        except OSError:
            sock.close()
            continue
        async with trio.SocketStream(sock) as stream:
            yield stream
        return
    where = " or ".join(str(path) for path in paths)
    raise ControlError(
        problem
        or f"no bridge runs with this data directory (nothing answers at {where}): start it with kas-bridge run,"
        " or name the one that runs with --data-dir"
    )


class _Reader:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lines = Lines(MAX_ANSWER)
        self._ready: list[bytes] = []

    async def line(self) -> bytes | None:
        while not self._ready:
            data = await self._stream.receive_some(256 * 1024)
            if not data:
                return None
            self._ready = self._lines.feed(data)
        return self._ready.pop(0)


async def ask(paths: Sequence[Path], request: dict[str, Any], *, timeout: float = 10.0) -> dict[str, Any]:
    """Ask the bridge one thing.

    Args:
        paths: where its socket may be.
        timeout: seconds for the answer.

    Raises:
        ControlError: nobody answers there.
        ActionError: the bridge said no; the text is its own.
    """
    with trio.move_on_after(timeout):
        async with _connected(paths) as stream:
            try:
                await stream.send_all(encode(request))
                line = await _Reader(stream).line()
            except trio.BrokenResourceError:
                line = None
            if line is None:
                raise ControlError("the bridge closed the connection without an answer")
            answer: dict[str, Any] = json.loads(line)
            if not answer.get("ok"):
                raise ActionError(str(answer.get("error", "the bridge gave no reason")))
            if request["action"] == "stop":
                # It is gone when its end of the socket is.
                with suppress(trio.BrokenResourceError):
                    while await stream.receive_some(4096):
                        pass
            return answer
    raise ControlError(f"the bridge did not answer within {timeout:g} s")


async def follow(
    paths: Sequence[Path], on_event: Callable[[dict[str, Any]], None], on_start: Callable[[], None] = lambda: None
) -> None:
    """Hand over each event as it happens, until the bridge ends.

    Raises:
        ControlError, ActionError: as `ask`.
    """
    async with _connected(paths) as stream:
        reader = _Reader(stream)
        await stream.send_all(encode({"action": "events"}))
        line = await reader.line()
        answer = json.loads(line) if line else {"error": "the bridge closed the connection"}
        if not answer.get("ok"):
            raise ActionError(str(answer.get("error")))
        on_start()
        with suppress(trio.BrokenResourceError):
            while (line := await reader.line()) is not None:
                on_event(json.loads(line))
