"""Connections by the hundred and thousand, over real TCP: no task, file, object or memory is left behind.

``pytest -s -m soak tests/abuse/test_many_connections.py`` prints the figures of 1000 in a row; a round takes about 7 ms
of CPU for both ends, identify in both directions included.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from kas_libp2p.config import Config
from kas_libp2p.node import Node, open_node
from tests.abuse.house import ECHO, echo
from tests.network import eventually

WARM_UP = 30
"""Rounds after which caches are full and pools have their size."""
LOOPBACK = Config(listen=("/ip4/127.0.0.1/tcp/0",))
OURS = ("kas_libp2p", "socket", "trio._socket")
KIB = 1024


@dataclass(frozen=True)
class Left:
    """What there is in this process.

    Attributes:
        tasks, files, rss: of trio, of the system; bytes.
        objects: all that the garbage collector knows. Caches fill, and trio keeps up to 1000 timeouts that are over.
        ours: of them those of this library, and sockets.
    """

    tasks: int
    files: int
    objects: int
    ours: int
    rss: int

    @classmethod
    def now(cls) -> Left:
        gc.collect()
        objects = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            tasks=trio.lowlevel.current_statistics().tasks_living,
            files=len(os.listdir("/proc/self/fd")),
            objects=len(objects),
            ours=sum(str(type(each).__module__).startswith(OURS) for each in objects),
            rss=pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def __str__(self) -> str:
        objects = f"{self.objects} objects ({self.ours} of ours)"
        return f"{self.tasks} tasks, {self.files} files, {objects}, {self.rss // KIB} KiB resident"


async def close(ours: Node, theirs: Node) -> None:
    await ours.disconnect(theirs.peer_id)


async def closed_by_them(ours: Node, theirs: Node) -> None:
    await theirs.disconnect(ours.peer_id)


async def abort(ours: Node, theirs: Node) -> None:
    for each in ours.connections:
        each.connection.abort()


WAYS = (close, closed_by_them, abort)


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.soak)])
async def test_in_a_row(rounds: int) -> None:
    async with open_node(LOOPBACK) as node, open_node(Config(listen=())) as dialer:
        await node.serve(echo, ECHO)

        async def once(number: int) -> None:
            stream = await dialer.connect(node.addresses[0], ECHO)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            await WAYS[number % len(WAYS)](dialer, node)
            await eventually(lambda: not node.swarm.all_connections() and not dialer.swarm.all_connections())

        for number in range(WARM_UP):
            await once(number)
        before, begun = Left.now(), time.perf_counter()
        for number in range(rounds):
            await once(number)
        seconds, after = time.perf_counter() - begun, Left.now()
        print(f"\n{rounds} connections in {seconds:.2f} s\nbefore: {before}\nafter:  {after}")
        for each in (node, dialer):
            assert set(each.status().in_use.values()) == {0}
            assert (
                each.bus.counts["connection-opened", ""] == each.bus.counts["connection-closed", ""] == rounds + WARM_UP
            )
            assert each.bus.counts["internal-error", ""] == 0
        assert after.tasks == before.tasks
        assert after.files == before.files
        assert after.ours - before.ours < 20
        assert after.objects - before.objects < 5000
        if rounds >= 1000:  # below that it is the allocator's mood that shows
            assert after.rss - before.rss < rounds * KIB, "not one KiB per connection"


async def test_at_once() -> None:
    crowd = 20  # with a hundred, the ten seconds of a handshake are over on a busy machine
    async with open_node(LOOPBACK) as node:

        async def come() -> None:
            async with open_node(Config(listen=())) as dialer:
                await dialer.ping(node.addresses[0])

        await come()
        before = Left.now()
        async with trio.open_nursery() as nursery:
            for _ in range(crowd):
                nursery.start_soon(come)
        await eventually(lambda: not node.swarm.all_connections())
        after = Left.now()
        assert (after.tasks, after.files) == (before.tasks, before.files)
        assert set(node.status().in_use.values()) == {0}
        assert node.bus.counts["connection-closed", ""] == crowd + 1
