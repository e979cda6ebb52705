"""What needs a network of its own: SYNs that cross on the way, and interfaces that change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from kas_bridge.simnet.wire import Namespace, Wire, WireError

pytestmark = pytest.mark.lab

DELAY = 0.1
"""Seconds one way: more than lies between the two dials of a test."""
SOON = 0.2
"""Seconds until the two dial, for both to hear of it."""
ATTEMPTS = 8
"""Times that it is tried to have them dial at once."""

PORT = 16117

NODE = """
import json, sys, time, trio
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
        at = float(await trio.to_thread.run_sync(sys.stdin.readline))
        version = 6 if ":" in peer else 4
        await trio.sleep(at - time.monotonic())
        print(json.dumps({"late": time.monotonic() - at}), flush=True)
        raw = await Dialer([listener]).dial(f"/ip{version}/{peer}/tcp/PORT", source=Source(source))
        await raw.send_all(f"hello from {ip}".encode())
        heard = await read(raw)
        print(json.dumps({"local": raw.local_address, "heard": heard}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)  # both have heard each other
        raw.abort()
        nursery.cancel_scope.cancel()

trio.run(main, *sys.argv[1:])
""".replace("PORT", str(PORT))

DIALS = """
import sys, trio
from kas_libp2p.transport.tcp import Dialer, listen

async def main(ip, peer):
    listener = await listen(f"/ip4/{ip}/tcp/PORT")
    print("ready", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)
    print("dials", flush=True)
    raw = await Dialer([listener]).dial(f"/ip4/{peer}/tcp/PORT")
    print(raw.local_address, flush=True)
    raw.abort()
    listener.close()

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


@contextmanager
def new_wire() -> Iterator[Wire]:
    try:
        wire = Wire(DELAY)
    except WireError as error:
        pytest.skip(f"no network namespaces here: {error}")
    with wire:
        yield wire


@pytest.fixture
def wire() -> Iterator[Wire]:
    with new_wire() as wire:
        yield wire


class Node:
    """A program in a namespace, spoken to by lines."""

    def __init__(self, namespace: Namespace, *arguments: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = namespace.popen([sys.executable, "-c", NODE, *arguments], **pipes)
        self._killed = False

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        return line.strip() if not line.startswith("{") else json.loads(line)

    def go_on(self, at: float = 0.0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%f\n" % at)
        self._process.stdin.flush()

    def kill(self) -> None:
        self._killed = True
        self._process.kill()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._process.kill()
        with self._process:
            pass
        expected = -signal.SIGKILL if self._killed else 0
        assert self._process.returncode == expected or error[0] is not None


def dial_each_other(version: int, source: str) -> tuple[tuple[str, str], list[dict[str, str]]]:
    """Dial at one instant, and again where the machine has held one of them up for as long as a SYN is under way."""
    for _ in range(ATTEMPTS):
        with ExitStack() as stack:
            wire = stack.enter_context(new_wire())
            ips = (wire.a.address, wire.b.address) if version == 4 else (wire.a.address6, wire.b.address6)
            one = stack.enter_context(Node(wire.a, ips[0], ips[1], source))
            other = stack.enter_context(Node(wire.b, ips[1], ips[0], source))
            nodes = (one, other)
            assert [node.read() for node in nodes] == ["ready", "ready"]
            at = time.monotonic() + SOON
            for node in nodes:
                node.go_on(at)
            if max(node.read()["late"] for node in nodes) > DELAY / 2:
                for node in nodes:
                    node.kill()
                continue
            results = [node.read() for node in nodes]
            for node in nodes:
                node.go_on()
            return ips, results
    raise AssertionError(f"this machine is too busy to begin two things within {DELAY / 2} s")


@pytest.mark.parametrize("version", [4, 6])
def test_crossed_syns_end_in_a_connection_each(version: int) -> None:
    """Each side is heard by the other's listener: nobody is left on a connection where both speak first."""
    ips, results = dial_each_other(version, "prefer")
    assert [each["heard"] for each in results] == [f"echo of hello from {ip}" for ip in ips]
    for each in results:
        assert not each["local"].endswith(f"/tcp/{PORT}")


def test_crossed_syns_are_one_connection_where_that_is_wanted() -> None:
    """As in hole punching: what one side says, the other hears on its own dialed connection."""
    ips, results = dial_each_other(4, "only")
    assert [each["heard"] for each in results] == [f"hello from {ip}" for ip in reversed(ips)]
    assert [each["local"] for each in results] == [f"/ip4/{ip}/tcp/{PORT}" for ip in ips]


def test_a_syn_that_was_answered_twice_did_not_cross_another(wire: Wire) -> None:
    """The wire stands still until the SYN has been sent again, and both are answered: it stays the listen port."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    wire.delay = 0.001
    with wire.b.socket() as listener, wire.a.socket() as first:
        listener.bind((wire.b.address, PORT))
        listener.listen()
        first.connect(listener.getsockname())  # each knows its neighbour from now on
        with wire.a.popen([sys.executable, "-c", DIALS, wire.a.address, wire.b.address], **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.kill(wire.pid, signal.SIGSTOP)
            try:
                process.stdin.write(b"\n")
                process.stdin.flush()
                assert process.stdout.readline() == b"dials\n"
                time.sleep(1.4)  # the system sends a SYN again after one second
            finally:
                os.kill(wire.pid, signal.SIGCONT)
            assert process.stdout.readline().decode() == f"/ip4/{wire.a.address}/tcp/{PORT}\n"
        assert process.returncode == 0


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
