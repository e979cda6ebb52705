"""The control socket, with a bridge behind it that only answers. Real sockets, real time."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from kas_bridge import control
from kas_bridge._control import ACTIONS, MAX_LINE, ActionError, Lines, RequestError, encode, event_values, parse_request
from kas_bridge.control import ControlError, ControlServer, ask, follow, open_socket
from kas_bridge.events import BanLifted, Trouble
from kas_libp2p.events import EventBus


class Answers:
    """What a bridge is to its control socket."""

    def __init__(self) -> None:
        self.events = EventBus(lambda: 0.0)
        self.rows: list[dict[str, Any]] = []
        self.mode = "bridge"
        self.stopped: list[str] = []
        self.faults: list[str] = []

    def status(self) -> dict[str, Any]:
        return {"version": "1", "nan": float("nan")}

    def peers(self) -> list[dict[str, Any]]:
        return self.rows

    def upgrades(self) -> list[dict[str, Any]]:
        return []

    def why(self, peer: str) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    def connect(self, multiaddr: str) -> dict[str, Any]:
        if not multiaddr:
            raise ActionError("no address; one looks like this")
        return {"state": "trying"}

    async def disconnect(self, peer: str) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"peer_id": peer}

    async def ban(self, target: str, seconds: float | None = 5.0, reason: str = "") -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"target": target, "seconds": seconds, "reason": reason}

    def unban(self, target: str) -> dict[str, Any]:
        return {"target": target}

    def stop(self, reason: str) -> None:
        self.stopped.append(reason)

    def trouble(self, where: str, error: BaseException) -> None:
        self.faults.append(f"{where}: {error}")


class Socket:
    """The socket, and who answers there."""

    def __init__(self, path: Path, server: ControlServer, bridge: Answers) -> None:
        self.path = path
        self.server = server
        self.bridge = bridge

    async def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        with trio.fail_after(5):
            return await ask([self.path], {"action": action, **fields})

    async def open(self) -> trio.SocketStream:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(str(self.path))
        return trio.SocketStream(sock)

    async def say(self, data: bytes) -> list[dict[str, Any]]:
        """Send bytes and read until the other side closes."""
        async with await self.open() as stream:
            try:
                await stream.send_all(data)
                await stream.send_eof()
            except trio.BrokenResourceError:
                pass
            with trio.fail_after(5):
                told = b""
                try:
                    while data := bytes(await stream.receive_some()):
                        told += data
                except trio.BrokenResourceError:
                    pass
        return [json.loads(line) for line in told.splitlines()]


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Socket]:
    bridge = Answers()
    path, listener = open_socket([folder / "control.sock"])
    server = ControlServer(bridge, listener, path)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield Socket(path, server, bridge)
        nursery.cancel_scope.cancel()


# -- The protocol ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"\xff\xfe", "must be UTF-8"),
        (b"status", "one JSON object a line"),
        (b"[" * 5000, "one JSON object a line"),
        (b"[]", "must be a JSON object"),
        (b'"status"', "must be a JSON object"),
        (b"{}", "unknown action none; allowed: status, peers, why, connect, disconnect, ban, unban, events, stop"),
        (b'{"action": 5}', "unknown action no text"),
        (b'{"action": "dance"}', "unknown action 'dance'"),
        (b'{"action": "status", "x": 1}', "unknown field 'x' for status; allowed: none"),
        (b'{"action": "connect"}', "connect needs the field multiaddr"),
        (b'{"action": "connect", "multiaddr": 5}', "multiaddr must be a text"),
        (b'{"action": "ban", "target": "a", "seconds": "5"}', "seconds must be a number or null"),
        (b'{"action": "ban", "target": "a", "seconds": true}', "seconds must be a number or null"),
        (b'{"action": "ban", "target": "a", "seconds": NaN}', "seconds must be a finite number"),
    ],
)
def test_requests_that_are_refused_by_name(line: bytes, problem: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request(line)
    assert problem in str(refused.value)


def test_requests() -> None:
    assert parse_request(b'{"action": "status"}') == ("status", {})
    assert parse_request(b'{"action": "ban", "target": "a", "seconds": null}') == (
        "ban",
        {"target": "a", "seconds": None},
    )


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    try:
        action, _ = parse_request(data)
    except RequestError:
        return
    assert action in ACTIONS


@given(st.lists(st.binary(max_size=50).map(lambda data: data.replace(b"\n", b"")), max_size=8), st.integers(1, 9))
def test_lines_survive_any_cut(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    reader = Lines()
    found = [line for at in range(0, len(data), size) for line in reader.feed(data[at : at + size])]
    assert found == [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_have_a_limit(end: bytes) -> None:
    reader = Lines(10)
    assert reader.feed(b"a" * 10 + b"\n") == [b"a" * 10]
    with pytest.raises(RequestError, match="more than 10 bytes"):
        reader.feed(b"a" * 11 + end)


def test_what_is_written_is_json() -> None:
    line = encode({"a": float("inf"), "b": {1: ("x", None)}, "c": Path("/tmp"), "d": "\udcff"})
    assert line.endswith(b"\n")
    assert json.loads(line) == {"a": None, "b": {"1": ["x", None]}, "c": "/tmp", "d": "?"}
    event = Trouble(where="here", reason="for fun")
    assert event_values(event) == {"event": "trouble", "at": 0.0, "where": "here", "reason": "for fun"}


# -- Who may -----------------------------------------------------------------------------------------------------------


async def test_only_the_owner_may_open_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        assert stat.S_IMODE(it.path.stat().st_mode) == 0o600
        assert it.path.stat().st_uid == os.getuid()
    assert not it.path.exists()


async def test_what_a_dead_bridge_left_is_replaced(tmp_path: Path) -> None:
    _, listener = open_socket([tmp_path / "control.sock"])
    listener.close()
    async with serving(tmp_path) as it:
        assert await it.ask("status")


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("precious")
    with pytest.raises(ControlError, match=r"a file of another kind.*--data-dir"):
        open_socket([tmp_path / "control.sock"])
    path, listener = open_socket([tmp_path / "control.sock", tmp_path / "other.sock"])
    listener.close()
    assert path.name == "other.sock"
    assert (tmp_path / "control.sock").read_text() == "precious"


async def test_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    folder.mkdir(parents=True)
    async with serving(folder) as it:
        assert await it.ask("status")


# -- Questions ---------------------------------------------------------------------------------------------------------


async def test_questions_and_answers(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        assert await it.ask("status") == {
            "ok": True,
            "version": "1",
            "nan": None,
            "control_refused": 0,
            "control_malformed": 0,
        }
        assert await it.ask("peers") == {"ok": True, "mode": "bridge", "peers": [], "upgrades": []}
        assert (await it.ask("connect", multiaddr="x"))["state"] == "trying"
        assert (await it.ask("disconnect", peer="x"))["peer_id"] == "x"
        assert await it.ask("ban", target="x") == {"ok": True, "target": "x", "seconds": 5.0, "reason": ""}
        assert (await it.ask("ban", target="x", seconds=None))["seconds"] is None
        assert (await it.ask("unban", target="x"))["target"] == "x"
        with pytest.raises(ActionError, match="no address; one looks like this"):
            await it.ask("connect", multiaddr="")


async def test_several_questions_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        told = await it.say(b'{"action": "peers"}\n\n  \n{"action": "dance"}\n{"action": "unban", "target": "x"}\n')
        assert [each["ok"] for each in told] == [True, False, True]
        assert it.server.malformed == 1


async def test_events_until_the_bridge_ends(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    async with serving(tmp_path) as it:
        bus = it.bridge.events
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                def started() -> None:
                    bus.emit(BanLifted(target="x"))
                    bus.close()

                nursery.start_soon(follow, [it.path], seen.append, started)
    assert [(each["event"], each["target"]) for each in seen] == [("ban-lifted", "x")]


async def test_stop_is_answered_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        (told,) = await it.say(b'{"action": "stop"}\n')
        assert told == {"ok": True, "pid": os.getpid(), "mode": "bridge"}
        assert it.bridge.stopped == ["by kas-bridge stop"]


async def test_a_fault_of_ours_ends_one_connection_and_is_told(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        assert await it.say(b'{"action": "why", "peer": "x"}\n') == []
        assert it.bridge.faults == ["control: a bug"]
        assert await it.ask("status")


async def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"no bridge runs with this data directory.*kas-bridge run.*--data-dir"):
        await ask([tmp_path / "control.sock"], {"action": "status"})


async def test_a_bridge_that_does_not_answer(tmp_path: Path) -> None:
    _, listener = open_socket([tmp_path / "control.sock"])
    with listener, pytest.raises(ControlError, match=r"did not answer within 0.05 s"):
        await ask([tmp_path / "control.sock"], {"action": "status"}, timeout=0.05)


# -- Abuse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"a" * (1 << 20), b"a" * MAX_LINE + b"a\n", b'{"action": "' + b"x" * (1 << 20) + b'"}\n']
)
async def test_a_line_without_end(data: bytes, tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        told = await it.say(data)
        # The answer may be lost: what was not read when we closed makes the system reset the connection.
        assert told in ([], [{"ok": False, "error": f"a line has more than {MAX_LINE} bytes"}])
        assert it.server.malformed == 1
        assert await it.ask("status")


async def test_garbage(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        for data in (b"\x00\xff\n" * 50, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\n" * 1000, b"{" * 1000 + b"\n", b""):
            assert not any(each["ok"] for each in await it.say(data))
        assert await it.ask("status")


async def test_a_thousand_connections_do_not_lock_the_operator_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        streams = [await it.open() for _ in range(300)]
        assert (await it.ask("status"))["control_refused"] >= 300 - control.MAX_CONNECTIONS
        assert it.server._open <= control.MAX_CONNECTIONS + 1
        for stream in streams:
            await stream.aclose()
        for _ in range(700):
            await (await it.open()).aclose()
        assert await it.ask("status")
        with trio.fail_after(5):
            while it.server._open:  # noqa: ASYNC110 - the server's own count
                await trio.sleep(0.001)
        assert not it.server._waiting


async def test_whoever_watches_events_is_not_put_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        watchers = []
        for _ in range(control.MAX_CONNECTIONS):
            stream = await it.open()
            await stream.send_all(b'{"action": "events"}\n')
            assert await stream.receive_some() == b'{"ok": true}\n'
            watchers.append(stream)
        with pytest.raises(ActionError, match="32 control connections are open already"):
            await it.ask("status")
        await watchers.pop().aclose()
        with trio.fail_after(5):
            while it.server._open == control.MAX_CONNECTIONS:  # noqa: ASYNC110 - the server's own count
                await trio.sleep(0.001)
        assert await it.ask("status")
        for stream in watchers:
            await stream.aclose()


async def test_a_silent_connection_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SILENCE", 0.05)
    async with serving(tmp_path) as it, await it.open() as stream:
        await stream.send_all(b'{"action":')
        with trio.fail_after(5):
            assert await stream.receive_some() == b""


async def test_a_client_that_never_reads_is_dropped(tmp_path: Path, mock_clock: MockClock) -> None:
    async with serving(tmp_path) as it:  # no time passes but what we let pass
        it.bridge.rows = [{"peer_id": "x" * 1000}] * 1000
        async with await it.open() as deaf:
            await deaf.send_all(b'{"action": "peers"}\n' * 100)
            assert len((await it.ask("peers"))["peers"]) == 1000
            assert it.server._open >= 1, "another one waited for it"
            await wait_all_tasks_blocked()
            mock_clock.jump(control.WRITE_TIMEOUT)
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert not it.server._open


async def test_a_watcher_that_never_reads_loses_events_and_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "WRITE_TIMEOUT", 0.2)
    async with serving(tmp_path) as it:
        async with await it.open() as deaf:
            await deaf.send_all(b'{"action": "events"}\n')
            assert await deaf.receive_some(13) == b'{"ok": true}\n'
            with trio.fail_after(5):
                while it.server._open:
                    for _ in range(100):
                        it.bridge.events.emit(Trouble(where="x" * 1000, reason="x"))
                    await trio.sleep(0.001)
        assert await it.ask("status")


async def test_a_slow_reader_gets_it_all(tmp_path: Path) -> None:
    async with serving(tmp_path) as it:
        it.bridge.rows = [{"peer_id": "x" * 1000}] * 1000
        async with await it.open() as stream:
            await stream.send_all(b'{"action": "peers"}\n')
            told = bytearray()
            with trio.fail_after(5):
                while not told.endswith(b"\n"):
                    told += await stream.receive_some(20_000)
                    await trio.sleep(0.001)
        assert len(json.loads(told)["peers"]) == 1000
