"""What needs a network of its own: SYNs that cross on the way, and interfaces that change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kas_bridge.simnet.wire import Namespace, Wire, WireError

pytestmark = pytest.mark.lab

DELAY = 0.1
"""Seconds one way: far more than lies between the two dials of a test."""

PORT = 16117

NODE = """
import json, sys, trio
from kas_libp2p.transport.tcp import Dialer, Source, listen

async def read(raw):
    buffer = bytearray(100)
    return bytes(buffer[: await raw.receive_into(memoryview(buffer))]).decode()

async def echo(listener):
    while True:
        raw = await listener.accept()
        text = await read(raw)
        if text:
            await raw.send_all(b"echo of " + text.encode())
        await raw.aclose()

async def main(ip, peer, source):
    listener = await listen(f"/ip4/{ip}/tcp/PORT" if ":" not in ip else f"/ip6/{ip}/tcp/PORT")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo, listener)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        version = 6 if ":" in peer else 4
        raw = await Dialer([listener]).dial(f"/ip{version}/{peer}/tcp/PORT", source=Source(source))
        await raw.send_all(f"hello from {ip}".encode())
        heard = await read(raw)
        print(json.dumps({"local": raw.local_address, "heard": heard}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)  # both have heard each other
        raw.abort()
        nursery.cancel_scope.cancel()

trio.run(main, *sys.argv[1:])
""".replace("PORT", str(PORT))

WATCHER = """
import json, subprocess, trio
from kas_libp2p.transport.interfaces import POLL, InterfaceWatch
from kas_libp2p.transport.tcp import listen

async def main():
    watch = InterfaceWatch()
    listener = await listen("/ip4/0.0.0.0/tcp/PORT")
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        for argv in (["add", "11.9.9.9/32"], ["del", "11.9.9.9/32"], ["add", "2d00:9::9/128"]):
            known = watch.addresses
            with trio.fail_after(POLL / 2):  # by message, not by chance
                await trio.run_process(["ip", "addr", argv[0], argv[1], "dev", "lo"])
                await watch.wait_change(known)
            print(json.dumps([watch.addresses, [str(each) for each in listener.addresses(watch.addresses)]]))
        nursery.cancel_scope.cancel()
    listener.close()

trio.run(main)
""".replace("PORT", str(PORT))


@pytest.fixture
def wire() -> Iterator[Wire]:
    try:
        wire = Wire(DELAY)
    except WireError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with wire:
        yield wire


class Node:
    """A program in a namespace, spoken to by lines."""

    def __init__(self, namespace: Namespace, *arguments: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = namespace.popen([sys.executable, "-c", NODE, *arguments], **pipes)

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        return line.strip() if not line.startswith("{") else json.loads(line)

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._process.kill()
        with self._process:
            pass
        assert self._process.returncode == 0 or error[0] is not None


def dial_each_other(a: Namespace, b: Namespace, ips: tuple[str, str], source: str) -> list[dict[str, str]]:
    with Node(a, ips[0], ips[1], source) as one, Node(b, ips[1], ips[0], source) as other:
        nodes = (one, other)
        assert [node.read() for node in nodes] == ["ready", "ready"]
        for node in nodes:
            node.go_on()
        results = [node.read() for node in nodes]
        for node in nodes:
            node.go_on()
        return results


def ips_of(wire: Wire, version: int) -> tuple[str, str]:
    return (wire.a.address, wire.b.address) if version == 4 else (wire.a.address6, wire.b.address6)


@pytest.mark.parametrize("version", [4, 6])
def test_crossed_syns_end_in_a_connection_each(wire: Wire, version: int) -> None:
    """Each side is heard by the other's listener: nobody is left on a connection where both speak first."""
    ips = ips_of(wire, version)
    results = dial_each_other(wire.a, wire.b, ips, "prefer")
    assert [each["heard"] for each in results] == [f"echo of hello from {ip}" for ip in ips]
    for each in results:
        assert not each["local"].endswith(f"/tcp/{PORT}")


def test_crossed_syns_are_one_connection_where_that_is_wanted(wire: Wire) -> None:
    """As in hole punching: what one side says, the other hears on its own dialed connection."""
    ips = ips_of(wire, 4)
    results = dial_each_other(wire.a, wire.b, ips, "only")
    assert [each["heard"] for each in results] == [f"hello from {ip}" for ip in reversed(ips)]
    assert [each["local"] for each in results] == [f"/ip4/{ip}/tcp/{PORT}" for ip in ips]


def test_interfaces_that_change(wire: Wire) -> None:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian: iproute2)")
    with wire.a.popen([sys.executable, "-c", WATCHER], stdout=subprocess.PIPE) as process:
        output = process.communicate()[0].decode().splitlines()
    assert process.returncode == 0
    (added, with_it), (removed, without_it), (added6, _) = map(json.loads, output)
    assert set(added) - set(removed) == {"11.9.9.9"}
    assert f"/ip4/11.9.9.9/tcp/{PORT}" in with_it
    assert f"/ip4/11.9.9.9/tcp/{PORT}" not in without_it
    assert f"/ip4/{wire.a.address}/tcp/{PORT}" in without_it
    assert set(added6) - set(removed) == {"2d00:9::9"}
