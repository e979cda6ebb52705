"""The command kas-libp2p: what it prints, and how it ends. What needs a peer runs as real processes on loopback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kas_libp2p.cli import Exit, main
from kas_libp2p.identity import Identity
from kas_libp2p.units import parse_size
from tests.command import COMMAND, PATIENCE, Running, events_of, run_command, running

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Main:
    """Calls the command in this process, for what needs no peer: exit code, output, errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(each) for each in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def listener() -> Iterator[Running]:
    """``kas-libp2p listen --json``, with an echo."""
    with running("listen", "/ip4/127.0.0.1/tcp/0", "--echo", "--json") as process:
        process.wait_for("started")
        yield process


def call_on(call: Main, command: str, script: str) -> tuple[int, str, str]:
    """Calls the command on the address that a script listens at: it says so with ``started``."""
    started = 'def started(address): print(\'{"event": "started", "addresses": ["%s"]}\' % address, flush=True)\n'
    with Running([sys.executable, "-c", started + script]) as peer:
        return call(command, peer.address)


class TestHelp:
    @pytest.mark.parametrize("command", ["listen", "dial", "why", "ping", "perf", "key", "key show", "key import"])
    def test_every_command_has_one(self, call: Main, command: str) -> None:
        code, out, _ = call(*command.split(), "--help")
        assert code == Exit.DONE
        assert f"Usage: kas-libp2p {command}" in out
        assert "[default: False]" not in out

    def test_it_needs_no_libp2p(self) -> None:
        """Which takes a second to import: the help, and keys, are there at once."""
        script = (
            "import sys; from kas_libp2p.cli import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: pass\n"
            "import kas_libp2p.identity\n"
            "sys.exit('libp2p' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr


class TestMisuse:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ("ping", "TARGET requires an argument"),
            ("pong", 'unknown command "pong"'),
            ("ping /ip4/127.0.0.1/tcp/1 --count -1", "--count must be 0 or more"),
            ("ping /ip4/127.0.0.1/tcp/1 --interval -1", "--interval must be 0 or more"),
            ("listen /ip4/127.0.0.1/tcp/0 --port 1", "not both"),
            ("listen --port 65536", "65536 is no port"),
            ("dial /ip4/127.0.0.1/tcp/1 --wait forever", "punched"),
            ("dial /ip4/127.0.0.1/tcp/1 --listen /ip4/127.0.0.1/tcp/0 --port 1", "not both"),
            ("why /ip4/127.0.0.1/tcp/1 --relay elsewhere", "elsewhere"),
            ("perf /ip4/127.0.0.1/tcp/1 --upload 5x", "'5x' is no size: write 64MiB"),
            ("perf /ip4/127.0.0.1/tcp/1 --upload 0", "nothing to measure"),
            ("perf /ip4/127.0.0.1/tcp/1 --download 999999999999GiB", "64 bits"),
            ("dial elsewhere", "elsewhere is no peer id"),
            ("dial 192.0.2.1", "lacks a port: 192.0.2.1:16111"),
            ("dial /ip4/192.0.2.1/tcp/65536", "65536 is no port"),
            ("dial 192.0.2.1:1 192.0.2.1:2", "end one of them with /p2p/PEER"),
            ("dial 12D3KooWDxzbYi9JivZZxT7StM3pGGw1DMshva24XZTYKiUNLEdV", "says who, not where"),
            ("listen /ip4/127.0.0.1", "/ip4/127.0.0.1"),
        ],
    )
    def test_it_is_said_in_one_sentence(self, call: Main, arguments: str, says: str) -> None:
        code, out, err = call(*arguments.split())
        assert code == Exit.MISUSED
        assert says in err
        assert not out

    def test_as_json(self, call: Main) -> None:
        code, out, err = call("ping", "--json")
        (error,) = events_of(out)
        assert code == error["code"] == Exit.MISUSED
        assert (error["event"], error["help"], error["failures"]) == ("error", "kas-libp2p ping --help", [])
        assert not err

    def test_peers_are_not_mixed(self, call: Main) -> None:
        ours, theirs = Identity.generate().peer_id, Identity.generate().peer_id
        code, _, err = call("dial", f"/ip4/127.0.0.1/tcp/1/p2p/{ours}", f"/ip4/127.0.0.1/tcp/2/p2p/{theirs}")
        assert code == Exit.MISUSED
        assert "one peer at a time" in err


class TestKeys:
    def test_new_and_show(self, call: Main, tmp_path: Path) -> None:
        file = tmp_path / "node.key"
        assert call("key", "new", file)[0] == Exit.DONE
        assert file.stat().st_mode & 0o777 == 0o600
        identity = Identity.load(file)
        code, out, _ = call("key", "show", file)
        assert code == Exit.DONE
        assert identity.peer_id in out
        code, out, _ = call("key", "show", file, "--json")
        (shown,) = events_of(out)
        assert (shown["event"], shown["peer_id"], shown["type"]) == ("key", identity.peer_id, "ed25519")

    def test_a_key_is_never_overwritten(self, call: Main, tmp_path: Path) -> None:
        file = tmp_path / "node.key"
        call("key", "new", file)
        before = file.read_bytes()
        for arguments in (
            ("new", file),
            ("import", file, file),
            ("export", file, file),
            ("export", file, file, "--raw"),
        ):
            code, _, err = call("key", *arguments)
            assert code == Exit.KEY
            assert str(file) in err
        assert file.read_bytes() == before

    def test_readable_by_others(self, call: Main, tmp_path: Path) -> None:
        file = tmp_path / "node.key"
        call("key", "new", file)
        file.chmod(0o640)
        for arguments in (("key", "show", file), ("key", "export", file), ("ping", "127.0.0.1:1", "--key", file)):
            code, _, err = call(*arguments)
            assert code == Exit.KEY
            assert f"chmod 600 {file}" in err

    def test_missing(self, call: Main, tmp_path: Path) -> None:
        code, _, err = call("key", "show", tmp_path / "none")
        assert code == Exit.KEY
        assert f"kas-libp2p key new {tmp_path / 'none'}" in err

    def test_unreadable(self, call: Main, tmp_path: Path) -> None:
        code, _, err = call("key", "show", tmp_path)
        assert code == Exit.KEY
        assert f"can't read the key file {tmp_path}" in err

    def test_damaged(self, call: Main, tmp_path: Path) -> None:
        file = tmp_path / "node.key"
        call("key", "new", file)
        file.write_bytes(file.read_bytes()[:20])
        code, _, err = call("key", "show", file)
        assert code == Exit.KEY
        assert str(file) in err

    @pytest.mark.parametrize("raw", [True, False])
    def test_out_and_in_again(self, call: Main, tmp_path: Path, raw: bool) -> None:
        call("key", "new", tmp_path / "a.key")
        flags = ("--raw",) if raw else ()
        assert call("key", "export", tmp_path / "a.key", tmp_path / "exported", *flags)[0] == Exit.DONE
        assert (tmp_path / "exported").stat().st_mode & 0o777 == 0o600
        assert call("key", "import", tmp_path / "b.key", tmp_path / "exported")[0] == Exit.DONE
        assert (tmp_path / "a.key").read_bytes() == (tmp_path / "b.key").read_bytes()

    def test_over_standard_input_and_output(self, call: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        call("key", "new", tmp_path / "a.key")
        _, exported, _ = call("key", "export", tmp_path / "a.key")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(exported.encode())))
        assert call("key", "import", tmp_path / "b.key")[0] == Exit.DONE
        assert Identity.load(tmp_path / "b.key").peer_id == Identity.load(tmp_path / "a.key").peer_id

    @pytest.mark.parametrize("content", [b"", b"nonsense\n", b"CAESQGKh\n", b"\x08\x01\x12\x03abc", b"A" * 5000])
    def test_no_key_to_import(self, call: Main, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "source").write_bytes(content)
        code, _, err = call("key", "import", tmp_path / "a.key", tmp_path / "source")
        assert code == Exit.KEY
        assert "what helps: " in err
        assert not (tmp_path / "a.key").exists()


class TestDialing:
    """The listener is a process of its own. Who dials is one in the first test, and then this one, which is faster."""

    def test_dial(self, listener: Running, tmp_path: Path) -> None:
        key = tmp_path / "node.key"
        done = run_command("dial", listener.address, "--ping", "1", "--key", key, "--json")
        assert done.returncode == Exit.DONE, done.stderr
        events = {each["event"]: each for each in events_of(done.stdout)}
        us = Identity.load(key).peer_id
        assert (events["started"]["peer_id"], events["started"]["key_file"]) == (us, str(key))
        connected = events["connected"]
        assert connected["peer"] == listener.started["peer_id"]
        assert connected["path"] == {"kind": "direct", "relay": None}
        assert connected["direction"] == "outbound"
        assert connected["agent"].startswith("kas-libp2p/")
        assert {"/ipfs/ping/1.0.0", "/perf/1.0.0", "/echo/1.0.0"} <= set(connected["protocols"])
        assert connected["observed"] == connected["local_address"]
        assert connected["signed"]
        assert events["pinged"]["seq"] == 1
        assert 0 < events["pinged"]["seconds"] < PATIENCE
        opened = listener.wait_for("connection-opened", peer=us)
        assert opened["direction"] == "inbound"
        listener.wait_for("stream-served", peer=us, protocol="/ipfs/ping/1.0.0")
        listener.wait_for("connection-closed", peer=us)

    def test_dial_for_people(self, listener: Running, call: Main) -> None:
        code, out, err = call("dial", "/ip4/127.0.0.1/tcp/1", listener.address)
        assert code == Exit.DONE, err
        assert f"connected to {listener.started['peer_id']}" in out
        for label in ("path      direct, ", "agent     kas-libp2p/", "sees us   /ip4/127.0.0.1/tcp/", "serves    /"):
            assert label in out
        assert "failed    /ip4/127.0.0.1/tcp/1: tcp failed" in out

    def test_ping(self, listener: Running, call: Main) -> None:
        code, out, err = call("ping", listener.address, "--count", "3", "--interval", "0", "--json")
        assert code == Exit.DONE, err
        events = events_of(out)
        assert [each["seq"] for each in events if each["event"] == "pinged"] == [1, 2, 3]
        (summary,) = (each for each in events if each["event"] == "ping-summary")
        assert (summary["sent"], summary["answered"]) == (3, 3)
        assert summary["min"] <= summary["median"] <= summary["max"]

    def test_perf(self, listener: Running, call: Main) -> None:
        code, out, err = call("perf", listener.address, "--upload", "2MB", "--download", "1MiB", "--json")
        assert code == Exit.DONE, err
        events = events_of(out)
        us = events[0]["peer_id"]
        (summary,) = (each for each in events if each["event"] == "perf-summary")
        assert (summary["uploaded"], summary["downloaded"]) == (2_000_000, 1 << 20)
        assert summary["upload_rate"] == pytest.approx(2_000_000 / summary["upload_seconds"])
        served = listener.wait_for("stream-served", protocol="/perf/1.0.0", peer=us)
        assert served["received"] > 2_000_000
        assert served["sent"] > 1 << 20

    def test_perf_for_people(self, listener: Running, call: Main) -> None:
        code, out, err = call("perf", listener.address, "--download", "1MiB")
        assert code == Exit.DONE, err
        last = out.splitlines()[-1]
        assert last.split()[:3] == ["download", "1.0", "MB"]
        assert last.endswith("B/s")

    def test_another_peer_than_expected(self, listener: Running, call: Main) -> None:
        wrong = Identity.generate().peer_id
        code, out, _ = call("ping", listener.address.replace(listener.started["peer_id"], wrong), "--json")
        assert code == Exit.WRONG_PEER
        error = events_of(out)[-1]
        assert (error["event"], error["code"]) == ("error", Exit.WRONG_PEER)
        assert f"/p2p/{listener.started['peer_id']}" in error["help"]
        assert error["failures"][0]["stage"] == "noise"

    def test_a_protocol_that_the_peer_does_not_serve(self, call: Main) -> None:
        script = (
            "import trio, kas_libp2p\n"
            "async def main():\n"
            "    async with kas_libp2p.open_node(kas_libp2p.Config(listen=('/ip4/127.0.0.1/tcp/0',))) as node:\n"
            "        node.withdraw('/ipfs/ping/1.0.0')\n"
            "        started(node.addresses[0])\n"
            "        await trio.sleep_forever()\n"
            "trio.run(main)"
        )
        code, out, err = call_on(call, "ping", script)
        assert code == Exit.PEER
        assert "kas-libp2p dial shows what the peer serves" in err
        assert "0 of 1 answered" in out

    def test_nobody_there(self, call: Main) -> None:
        code, _, err = call("ping", "127.0.0.1:1")
        assert code == Exit.UNREACHABLE
        assert "/ip4/127.0.0.1/tcp/1: tcp failed" in err
        assert "what helps: nothing listens at that port" in err

    def test_something_else_there(self, call: Main) -> None:
        script = (
            "import socket\n"
            "with socket.create_server(('127.0.0.1', 0)) as server:\n"
            "    started('127.0.0.1:%d' % server.getsockname()[1])\n"
            "    with server.accept()[0] as client: client.sendall(b'HTTP/1.1 400 Bad Request\\r\\n')"
        )
        code, _, err = call_on(call, "dial", script)
        assert code == Exit.UNREACHABLE
        assert "is that a libp2p port?" in err


class TestListening:
    def test_a_port_that_is_taken(self, listener: Running, call: Main) -> None:
        code, out, err = call("listen", listener.address.partition("/p2p/")[0])
        assert code == Exit.LISTEN
        assert f"(pid {listener.process.pid})" in err
        assert not out

    def test_a_signal_ends_it_in_order(self) -> None:
        with (
            running("listen", "/ip4/127.0.0.1/tcp/0") as listening,
            running("dial", listening.wait_for_line("127.0.0.1/tcp").split()[-1], "--stay", "--json") as dialing,
        ):
            dialing.wait_for("connected")
            listening.process.terminate()
            assert listening.process.wait(PATIENCE) == Exit.DONE
            closed = dialing.wait_for("connection-closed")
            assert "closed" in closed["reason"]
            assert dialing.process.wait(PATIENCE) == Exit.DONE
        assert "stopping (SIGTERM)" in listening.text

    def test_a_signal_ends_a_dial(self, listener: Running) -> None:
        with running("dial", listener.address, "--stay", "--json") as dialing:
            dialing.wait_for("connected")
            dialing.process.send_signal(signal.SIGINT)
            assert dialing.process.wait(PATIENCE) == 128 + signal.SIGINT
            assert dialing.wait_for("stopping")["signal"] == "SIGINT"

    def test_the_ordinary_end_of_endless_pings(self, listener: Running) -> None:
        with running("ping", listener.address, "--count", "0", "--interval", "0.01", "--json") as pinging:
            pinging.wait_for("pinged", seq=2)
            pinging.process.send_signal(signal.SIGINT)
            assert pinging.process.wait(PATIENCE) == Exit.DONE
            assert pinging.wait_for("ping-summary")["sent"] >= 2

    def test_whoever_reads_is_gone(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(
                [*COMMAND, "listen", "/ip4/127.0.0.1/tcp/0"],
                stdout=writing,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1500", 1500), ("1k", 1000), ("64MiB", 64 << 20), ("64 mib", 64 << 20), ("1.5GB", 1_500_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e6", "1.2.3", "5x", "٣"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_the_reference_knows_every_event_and_exit_code() -> None:
    """docs/kas-libp2p.md, against the code."""
    from dataclasses import fields

    from kas_libp2p import events, tool

    text = (Path(__file__).parents[1] / "docs" / "kas-libp2p.md").read_text()
    kinds: list[type[Any]] = [
        each
        for module in (events, tool)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, events.Event) and each is not events.Event
    ]
    rows = {line.split("|")[1].strip(" `"): line for line in text.splitlines() if line.startswith("| `")}
    for kind in kinds:
        if "Kaspa" in kind.__name__:
            continue  # this tool has no Kaspa side
        row = rows[kind().name if not fields(kind) else events._name(kind)]
        for field in fields(kind):
            assert field.name == "at" or f"`{field.name}`" in row, f"{kind.__name__}.{field.name}"
    for code in Exit:
        assert f"| {code.value} |" in text
