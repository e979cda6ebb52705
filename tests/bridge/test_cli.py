"""The command itself, as processes: two bridges, each in front of a light node that listens as kaspad does."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from kas_bridge.config import Settings
from kas_bridge.control import ControlError, ask
from kas_bridge.datadir import socket_paths
from kas_bridge.run import serve
from kas_libp2p.kaspa.peer import LightPeer

NETWORK = "kaspa-simnet"
COMMAND = (sys.executable, "-m", "kas_bridge")
STOP_TIME = 2.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""Seconds. Two are promised, on a machine that is not busy with more than it can do."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("KAS_BRIDGE_", "FORCE_COLOR")):
            monkeypatch.delenv(name)


class BridgeCommand:
    """``kas-bridge`` with one data directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: trio.Process
        self.lines: list[dict[str, Any]] = []

    async def call(self, *arguments: str, code: int = 0) -> str:
        """One command; gives what it wrote to standard output, or to standard error if it is to fail."""
        run = partial(
            trio.run_process,
            [*COMMAND, *arguments, f"--data-dir={self.folder}"],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        with trio.fail_after(30):
            done = await run()
        assert done.returncode == code, done.stderr.decode()
        return (done.stderr if code else done.stdout).decode()

    async def ask(self, *arguments: str) -> Any:
        return json.loads(await self.call(*arguments, "--json"))

    async def event(self, name: str) -> dict[str, Any]:
        """The next event of a kind in the output of ``run --json``."""
        assert self.process.stdout is not None
        while True:
            for index, each in enumerate(self.lines):
                if each["event"] == name:
                    del self.lines[: index + 1]
                    return each
            with trio.fail_after(30):
                data = await self.process.stdout.receive_some()
            assert data, "it ended"
            *lines, self._rest = (self._rest + bytes(data)).split(b"\n")
            self.lines += [json.loads(line) for line in lines]

    _rest = b""


@asynccontextmanager
async def bridge(folder: Path, kaspad: int, *flags: str) -> AsyncIterator[BridgeCommand]:
    """``kas-bridge run``, until the end of the block."""
    it = BridgeCommand(folder)
    argv = [*COMMAND, "run", f"--data-dir={folder}", f"--kaspad=127.0.0.1:{kaspad}", "--rpc=off", "--json"]
    argv += [f"--listen=/ip4/127.0.0.1/tcp/{it.port}", *flags]
    it.process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    try:
        yield it
    finally:
        if it.process.returncode is None:
            it.process.kill()
        with trio.CancelScope(shield=True):
            await it.process.wait()
            assert it.process.stdout is not None
            await it.process.stdout.aclose()


@asynccontextmanager
async def light_kaspad() -> AsyncIterator[tuple[LightPeer, int]]:
    async with LightPeer(NETWORK, user_agent="/kaspad:2.1.0/") as light, trio.open_nursery() as nursery:
        yield light, await nursery.start(light.listen)
        nursery.cancel_scope.cancel()


async def timed_end(process: trio.Process) -> float:
    begun = time.monotonic()
    with trio.fail_after(60):
        await process.wait()
    return time.monotonic() - begun


async def test_a_day_in_the_life(tmp_path: Path) -> None:
    async with (
        light_kaspad() as (light_a, port_a),
        light_kaspad() as (light_b, port_b),
        bridge(tmp_path / "a", port_a) as a,
        bridge(tmp_path / "b", port_b) as b,
    ):
        started = await a.event("bridge-started")
        await b.event("bridge-started")
        (address,) = started["addresses"]
        assert started["control"] == str(tmp_path / "a" / "control.sock")
        assert stat.S_IMODE((tmp_path / "a" / "control.sock").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "a" / "key").stat().st_mode) == 0o600

        told = await b.call("connect", address)
        assert "is kept connected until the bridge stops" in told
        joined = await b.event("kaspa-peer-joined")
        assert (joined["user_agent"], joined["direction"]) == ("/kaspad:2.1.0/", "outbound")
        await a.event("kaspa-peer-joined")
        with trio.fail_after(10):
            while not (light_a.peers and light_b.peers):  # noqa: ASYNC110 - lists without an event
                await trio.sleep(0.005)
        assert await light_a.peers[0].ping() < 5

        answers: dict[str, str] = {}

        async def keep(name: str, *arguments: str, code: int = 0) -> None:
            answers[name] = await b.call(*arguments, code=code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, "status", "status")
            nursery.start_soon(keep, "peers", "peers")
            nursery.start_soon(keep, "json", "peers", "--json")
            nursery.start_soon(keep, "why", "why", started["peer_id"][-6:])
            nursery.start_soon(partial(keep, "nobody", "why", "nobody", code=1))
        assert "1 joined of at most 64, 1 kept connected" in answers["status"]
        assert f"2.1.0 on {NETWORK} at 127.0.0.1:{port_b}" in answers["status"]
        assert re.search(r"kaspad 2\.1\.0 +direct .*127\.1\.0\.1", answers["peers"])
        (row,) = json.loads(answers["json"])["peers"]
        assert (row["peer_id"], row["state"], row["source"]) == (started["peer_id"], "joined", "127.1.0.1")
        assert "is joined, direct" in answers["why"]
        assert answers["nobody"] == "kas-bridge: no peer nobody is known here; kas-bridge peers lists them\n"

        told = await b.call("disconnect", started["peer_id"])
        assert told.endswith("… left, and is kept connected no longer.\n")
        assert (await b.event("kaspa-peer-ended"))["by"] == "us"
        assert (await a.event("kaspa-peer-ended"))["by"] == "peer"

        # A peer that takes no goodbye holds up nobody's end.
        await b.ask("connect", address)
        await a.event("kaspa-peer-joined")
        a.process.send_signal(signal.SIGSTOP)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep, "stop", "stop")
                await b.event("bridge-stopping")
                assert await timed_end(b.process) < STOP_TIME
            assert b.process.returncode == 0
            assert answers["stop"] == "The bridge has stopped.\n"
        finally:
            a.process.send_signal(signal.SIGCONT)

        a.process.send_signal(signal.SIGTERM)
        assert await timed_end(a.process) < STOP_TIME
        assert a.process.returncode == 0
        assert not (tmp_path / "a" / "control.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
async def test_without_a_kaspad_it_stays_up_and_ends_with_its_terminal(number: signal.Signals, tmp_path: Path) -> None:
    async with bridge(tmp_path / "a", free_port()) as a:
        changed = await a.event("kaspad-changed")
        assert changed["condition"] == "not running"
        assert "start kaspad" in changed["help"]
        await a.event("bridge-started")
        a.process.send_signal(number)
        assert await timed_end(a.process) < STOP_TIME
        assert a.process.returncode == 0


async def test_a_relay_as_its_operator_runs_it(tmp_path: Path) -> None:
    relay = BridgeCommand(tmp_path / "relay")
    argv = [*COMMAND, "relay", f"--data-dir={relay.folder}", f"--listen=/ip4/127.0.0.1/tcp/{relay.port}", "--json"]
    relay.process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    try:
        started = await relay.event("bridge-started")
        (address,) = started["addresses"]
        flags = (f"--relay={address}", "--role=private", "--no-port-mapping")
        async with light_kaspad() as (_, port), bridge(tmp_path / "a", port, *flags) as a:
            made = await a.event("reservation-made")
            assert (await relay.event("relay-request-served"))["status"] == "OK"
            status = await relay.ask("status")
            assert (status["mode"], status["reachability"]["role"]) == ("relay", "public")
            assert "1 place of 256" in await relay.call("status")
            (row,) = (await relay.ask("peers"))["peers"]
            assert row["place"]
            assert "yes" in await relay.call("peers")
            assert (await a.ask("status"))["reachability"]["reachable"] == made["addresses"]
            told = await relay.call("connect", address, code=1)
            assert "this is a relay, in front of no kaspad" in told
        assert await relay.call("stop") == "The relay has stopped.\n"
        assert await timed_end(relay.process) < STOP_TIME
        assert relay.process.returncode == 0
    finally:
        if relay.process.returncode is None:
            relay.process.kill()
        with trio.CancelScope(shield=True):
            await relay.process.wait()
            assert relay.process.stdout is not None
            await relay.process.stdout.aclose()


async def test_what_run_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ghost = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/12D3KooWKWQMLKnDg9BizoExsXWiuebcitxtJa3LCHdcWT2jP7yG"
    async with light_kaspad() as (_, port):
        settings = Settings(
            data_dir=tmp_path,
            kaspad=f"127.0.0.1:{port}",
            rpc="off",
            listen=("/ip4/127.0.0.1/tcp/0",),
            peer=(ghost,),
            port_mapping=False,
        )
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, settings)
                failures = 0
                while failures < 2:
                    with suppress(ControlError):
                        status = await ask(socket_paths(tmp_path), {"action": "status"})
                        failures = status["events"].get("peer-failed", 0)
                    await trio.sleep(0.05)
                await ask(socket_paths(tmp_path), {"action": "stop"})
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("kas-bridge 0.1.0 · 12D3KooW")
    assert f"2.1.0 on {NETWORK} at 127.0.0.1:{port}; its flags are fine" in lines[1]
    assert lines[2].startswith("  role      private: ")
    assert "none known yet: name one with --relay MULTIADDR" in lines[3]
    assert lines[4].split()[0] == "listens"
    assert "1 peer to keep connected; at most 64 joined at once" in lines[5]
    assert f"{tmp_path}/control.sock" in lines[6]
    # The same failure is said once.
    assert "Connection refused; next try in" in lines[7]
    assert lines[8].endswith("stopping by kas-bridge stop")
    assert len(lines) == 9


async def test_a_reader_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    argv = [*COMMAND, "run", f"--data-dir={tmp_path}", f"--kaspad=127.0.0.1:{free_port()}", "--rpc=off", "--no-listen"]
    try:
        process = await trio.lowlevel.open_process([*argv, "--json"], stdout=writing)
        try:
            with trio.fail_after(30):
                while not socket_paths(tmp_path)[0].exists():  # noqa: ASYNC110 - another process makes it
                    await trio.sleep(0.05)
                for number in range(100):  # more lines than fit
                    await ask(socket_paths(tmp_path), {"action": "ban", "target": f"192.0.2.{number}"})
            process.send_signal(signal.SIGTERM)
            assert await timed_end(process) < STOP_TIME
            assert process.returncode == 0
        finally:
            if process.returncode is None:
                process.kill()
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, ""),
        (["frob"], 2, "unknown command 'frob'; there are: run, relay, status, peers"),
        (["statu"], 2, "(did you mean status?)"),
        (["why"], 2, "why needs PEER"),
        (["connect"], 2, "connect needs MULTIADDR"),
        (["status", "--frob"], 2, "unknown option: --frob"),
        (["ban", "10.0.0.1", "--hours=0"], 2, "--hours must be above 0"),
        (["run", "--max-joined=0"], 2, "--max-joined must be 1 to 4096, not 0"),
        (["status"], 1, "start it with kas-bridge run, or name the one that runs with --data-dir"),
        (["events"], 1, "no bridge runs with this data directory"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, told: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from kas_bridge import cli

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(cli, "_DATA_DIR", tmp_path)
    flags = [f"--data-dir={tmp_path}"] if arguments else []
    try:
        cli.main([*arguments, *flags])
        left: Any = 0
    except SystemExit as exited:
        left = exited.code
    output = capsys.readouterr()
    if arguments:
        assert left == code
        assert output.err.startswith("kas-bridge: ")
        assert told in output.err
        assert not output.out
    else:
        assert "Usage: kas-bridge COMMAND" in output.out
