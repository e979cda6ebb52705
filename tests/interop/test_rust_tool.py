"""With rust-libp2p: the command ``kas-libp2p``, in both roles."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tests.command import COMMAND, events_of
from tests.interop.peer import PATIENCE, Json, Peer


async def tool(*arguments: str | Path) -> tuple[int, list[Json]]:
    """Run ``kas-libp2p --json`` to its end."""
    with trio.fail_after(PATIENCE):
        command = [*COMMAND, *map(str, arguments), "--json"]
        done = await trio.run_process(command, capture_stdout=True, check=False)
    return done.returncode, events_of(done.stdout.decode())


def only(events: list[Json], name: str) -> Json:
    (event,) = (each for each in events if each["event"] == name)
    return event


class TestDialing:
    """We dial."""

    async def test_dial(self, rust: Peer) -> None:
        code, events = await tool("dial", rust.address, "--ping", "1")
        assert code == 0, events
        connected = only(events, "connected")
        assert connected["peer"] == rust.peer
        assert {"/ipfs/ping/1.0.0", "/perf/1.0.0"} <= set(connected["protocols"])
        assert connected["observed"] == connected["local_address"]
        assert only(events, "ping-summary")["answered"] == 1
        seen = await rust.wait("connected")
        assert (seen["peer"], seen["direction"]) == (only(events, "started")["peer_id"], "inbound")
        assert (await rust.wait("disconnected"))["left"] == 0

    async def test_perf(self, rust: Peer) -> None:
        code, events = await tool("perf", rust.address, "--upload", "8MiB", "--download", "8MiB")
        assert code == 0, events
        summary = only(events, "perf-summary")
        assert (summary["uploaded"], summary["downloaded"]) == (8 << 20, 8 << 20)

    async def test_wrong_peer(self, rust: Peer) -> None:
        wrong = "12D3KooWDxzbYi9JivZZxT7StM3pGGw1DMshva24XZTYKiUNLEdV"
        code, events = await tool("ping", rust.address.replace(rust.peer, wrong))
        assert code == 4
        assert rust.peer in only(events, "error")["help"]


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[str, trio.MemoryReceiveChannel[Json]]]:
    """``kas-libp2p listen``: its address, and what it tells from then on."""
    command = [*COMMAND, "listen", "/ip4/127.0.0.1/tcp/0", "--json"]
    tell, told = trio.open_memory_channel[Json](1000)

    async def read(process: trio.Process) -> None:
        rest = b""
        assert process.stdout is not None
        async for data in process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                tell.send_nowait(json.loads(line))

    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE))
        nursery.start_soon(read, process)
        started = await until(told, "started")
        yield started["addresses"][0], told
        process.terminate()


async def until(told: trio.MemoryReceiveChannel[Json], name: str, **fields: object) -> Json:
    with trio.fail_after(PATIENCE):
        async for event in told:
            if event["event"] == name and fields.items() <= event.items():
                return event
    raise AssertionError(f"no event {name}")


class TestListening:
    """The Rust peer dials."""

    async def test_connect_ping_leave(self, rust: Peer) -> None:
        async with listening() as (address, told):
            await rust.order("connect", addr=address)
            opened = await until(told, "connection-opened", peer=rust.peer)
            assert opened["direction"] == "inbound"
            assert (await rust.order("ping"))["rtt"] > 0
            await until(told, "peer-identified", peer=rust.peer)
            await rust.order("disconnect")
            await until(told, "connection-closed", peer=rust.peer)

    async def test_perf(self, rust: Peer) -> None:
        async with listening() as (address, told):
            await rust.order("connect", addr=address)
            await rust.order("perf", upload=8 << 20, download=8 << 20)
            served = await until(told, "stream-served", protocol="/perf/1.0.0", peer=rust.peer)
            assert served["received"] > 8 << 20
            assert served["sent"] > 8 << 20
