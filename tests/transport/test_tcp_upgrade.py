"""Upgrades over real TCP: strangers by the hundred that say nothing, or nonsense, and a friend beside them."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses
from kas_libp2p.config import Config
from kas_libp2p.errors import Stage, UpgradeError, UpgradeTimeout
from kas_libp2p.identity import Identity
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.tcp import Dialer, Listener, TcpRaw, listen
from kas_libp2p.transport.upgrade import upgrade

US, FRIEND = Identity.from_seed(b"u" * 32), Identity.from_seed(b"f" * 32)
CONFIG = Config()
SILENT = 500

HTTP = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
TLS = bytes.fromhex("1603010200010001fc0303") + bytes(512)
GREETING = b"\x13/multistream/1.0.0\n"
NOISE = GREETING + b"\x07/noise\n"


class Server:
    """Accepts and upgrades everything, each connection in a task of its own, and keeps what came of it."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.accepted = 0
        self.connections: list[Connection] = []
        self.failures: list[UpgradeError] = []
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            with suppress(trio.ClosedResourceError):
                while True:
                    nursery.start_soon(self._upgrade, await self.listener.accept())
                    self.accepted += 1
                    self._changed.unpark_all()

    async def _upgrade(self, raw: TcpRaw) -> None:
        try:
            connection = await upgrade(raw, identity=US, initiator=False, expected=None, config=CONFIG)
            self.connections.append(connection)
        except UpgradeError as error:
            self.failures.append(error)
        self._changed.unpark_all()

    async def until(self, *, accepted: int = 0, failed: int = 0, connected: int = 0) -> None:
        while self.accepted < accepted or len(self.failures) < failed or len(self.connections) < connected:
            await self._changed.park()


@pytest.fixture
async def server(nursery: trio.Nursery) -> AsyncIterator[Server]:
    listener = await listen("/ip4/127.0.0.1/tcp/0")
    server = Server(listener)
    nursery.start_soon(server.run)
    yield server
    listener.close()
    for connection in server.connections:
        connection.abort("the test is over")


async def befriend(server: Server) -> Connection:
    raw = await Dialer().dial(server.listener.address)
    return await upgrade(raw, identity=FRIEND, initiator=True, expected=US.peer_id, config=CONFIG)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def is_reset(raw: TcpRaw) -> bool:
    buffer = memoryview(bytearray(4096))
    try:
        while await raw.receive_into(buffer):
            pass
    except trio.BrokenResourceError:
        return True
    return False


@pytest.mark.parametrize(
    ("said", "stage"),
    [(b"", Stage.SECURITY_NEGOTIATION), (GREETING[:7], Stage.SECURITY_NEGOTIATION), (NOISE + b"\x00\x20", Stage.NOISE)],
    ids=["nothing", "half a greeting", "half a Noise message"],
)
async def test_hundreds_that_stall_at_once(server: Server, mock_clock: MockClock, said: bytes, stage: Stage) -> None:
    before = open_files()
    silent = [await Dialer().dial(server.listener.address) for _ in range(SILENT)]
    for each in silent:
        await each.send_all(said)
    await server.until(accepted=SILENT)

    friend = await befriend(server)
    await server.until(connected=1)
    assert server.connections[0].peer == FRIEND.peer_id
    assert trio.current_time() == 0  # the clock stands: the friend waited for nobody's timeout
    assert server.failures == []

    mock_clock.jump(CONFIG.dial.upgrade_timeout)
    await server.until(failed=SILENT)
    assert {(type(error), error.stage) for error in server.failures} == {(UpgradeTimeout, stage)}
    assert all([await is_reset(each) for each in silent])
    for each in silent:
        each.abort()
    assert open_files() == before + 2
    friend.abort("done")


@pytest.mark.parametrize(
    "junk",
    [HTTP, TLS, random.Random(7).randbytes(65536), bytes(65536), b"\xff" * 100, NOISE + b"\xff\xff" + bytes(65535)],
    ids=["HTTP", "TLS", "random", "zeros", "endless length", "64 KiB of Noise"],
)
async def test_hundreds_that_talk_nonsense(server: Server, mock_clock: MockClock, junk: bytes) -> None:
    before = open_files()
    friend = await befriend(server)
    await server.until(connected=1)
    for _ in range(100):
        with socket.socket() as stranger:
            stranger.connect(ip_port(server.listener))
            stranger.setblocking(False)
            stranger.send(junk)
    await server.until(failed=100)
    assert trio.current_time() == 0  # all were refused for what they said, none for being slow
    assert not [error for error in server.failures if isinstance(error, UpgradeTimeout)]
    assert all(str(error) for error in server.failures)
    assert len(server.connections) == 1
    assert open_files() == before + 2
    friend.abort("done")


async def test_strangers_that_vanish(server: Server, mock_clock: MockClock) -> None:
    """Reset by the dialer, some of them before they are accepted."""
    before = open_files()
    for _ in range(200):
        with socket.socket() as stranger:
            stranger.connect(ip_port(server.listener))
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await server.until(failed=200)
    assert open_files() == before
    (await befriend(server)).abort("done")


def ip_port(listener: Listener) -> tuple[str, int]:
    found = addresses.ip_port(listener.address)
    assert found is not None
    return found
