"""How long one kaspad takes to sync from another, and how fast live blocks arrive, whatever joins the two.

A *way* joins the pair: `PlainTcp` lets kaspad dial kaspad, as it would without us; a bridge brings its own. Both are
measured by the same code, on fresh copies of the same chain, with the same flags.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from kas_bridge.simnet.mine import Chain, Progress, quiet
from kas_bridge.simnet.node import SimnetNode, simnet_node
from kas_bridge.simnet.process import Process, ProcessEnded, within
from kas_bridge.simnet.wire import Wire

HOST = {"ipv4/tcp_congestion_control": "reno"}
"""What the ends of a measured wire have whatever this host has. Without loss Reno does what Linux' default, Cubic,
does, and it is the one that may be chosen in any namespace. (With BBR a connection that was idle takes seconds to find
its rate again.)"""
POLL = 0.05
"""Seconds between two looks at a syncing node. Each costs either side half a millisecond of CPU."""
SYNC_TIMEOUT = 600.0
"""Seconds for one sync; ten times what the slowest one took (plain TCP, 100 ms each way, busy machine)."""
REACH_TIMEOUT = 120.0
"""Seconds for a part of a sync. After a process was killed it takes 15 at most until it goes on."""
ARRIVAL_TIMEOUT = 30.0
"""Seconds for one live block."""


class Pair:
    """Two nodes: ``source`` has the chain, ``target`` starts empty.

    Attributes:
        source, target: the nodes.
        wire: the wire between their namespaces, or ``None``: both on this host's loopback.
        folder: temporary folder for whatever joins them.
        others: further processes whose CPU is counted, by name.
    """

    def __init__(self, source: SimnetNode, target: SimnetNode, wire: Wire | None, folder: Path) -> None:
        self.source = source
        self.target = target
        self.wire = wire
        self.folder = folder
        self.others: dict[str, Process] = {}

    def cpu(self) -> dict[str, float]:
        """Seconds of CPU so far, by process, and what the whole machine took: ``machine``."""
        processes = {"kaspad source": self.source.process, "kaspad target": self.target.process, **self.others}
        return {name: process.cpu() for name, process in processes.items()} | {"machine": machine_cpu()}


def machine_cpu() -> float:
    """Seconds of CPU that this machine's processes took since it started, in all."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=4)[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


class Way(ABC):
    """Something that joins two nodes.

    Attributes:
        name: for tables.
        needs_unsafe_rpc: whether the target must let RPC add peers.
    """

    name: str
    needs_unsafe_rpc = False

    @abstractmethod
    def prepare(self, pair: Pair) -> AbstractAsyncContextManager[Link]:
        """Start what it takes, short of the connection that makes the target sync. Ended with the block."""


class Link(ABC):
    """A prepared way."""

    @abstractmethod
    async def connect(self) -> None:
        """Make the connection. The time of a sync runs from here."""


class PlainTcp(Way):
    """kaspad dials kaspad (AddPeer on the target)."""

    name = "plain TCP"
    needs_unsafe_rpc = True

    @asynccontextmanager
    async def _prepare(self, pair: Pair) -> AsyncIterator[Link]:
        async with pair.target.rpc() as rpc:

            class Dial(Link):
                async def connect(self) -> None:
                    await rpc.add_peer(pair.source.p2p_address)

            yield Dial()

    def prepare(self, pair: Pair) -> AbstractAsyncContextManager[Link]:
        return self._prepare(pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """One sync.

    Attributes:
        way: what joined the nodes.
        delay: seconds each way.
        seconds: from the request to connect until both had the same tip.
        blocks, bytes: what was synced; bytes of transactions.
        wire: bytes on the wire, both directions with all headers; ``None`` on loopback.
        cpu: seconds of CPU by process.
        others: cores that everything else on this machine kept busy meanwhile: above 0.2 the figures are disturbed.
    """

    way: str
    delay: float
    seconds: float
    blocks: int
    bytes: int
    wire: int | None
    cpu: Mapping[str, float]
    others: float

    @property
    def rate(self) -> float:
        """Bytes of transactions per second."""
        return self.bytes / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A run of live blocks.

    Attributes:
        way, delay: as in `Sync`.
        size: bytes of transactions per block.
        rate: blocks per second that were made.
        latencies: seconds from the block being added at the source to it being added at the target, one per block.
        cpu: share of one core by process (0.03 is 3 %).
        others: as in `Sync`.
    """

    way: str
    delay: float
    size: int
    rate: float
    latencies: Sequence[float] = field(repr=False)
    cpu: Mapping[str, float]
    others: float

    def quantile(self, share: float) -> float:
        """The latency that this share of the blocks did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@asynccontextmanager
async def pair_of(chain: Chain, kaspad: Path, way: Way, wire: Wire | None = None) -> AsyncIterator[Pair]:
    """A node with a copy of a chain and an empty one, on loopback or at the ends of a wire.

    The source may mine; that is its only flag besides those that every test node has.
    """
    with tempfile.TemporaryDirectory(prefix="kas-pair-") as name:
        folder = Path(name)
        copy = chain.use(folder / "source")
        async with (
            simnet_node(kaspad, copy, mining=True, inside=wire.a if wire else None) as source,
            simnet_node(
                kaspad, folder / "target", unsafe_rpc=way.needs_unsafe_rpc, inside=wire.b if wire else None
            ) as target,
        ):
            yield Pair(source, target, wire, folder)


async def blocks_at(node: SimnetNode) -> int:
    """How many blocks a node has, bodies included."""
    async with node.rpc() as rpc:
        return int((await rpc.get_block_dag_info()).blockCount)


async def reach(node: SimnetNode, blocks: int) -> None:
    """Wait until a node has so many blocks.

    Raises:
        trio.TooSlowError: it had not in `REACH_TIMEOUT` seconds.
    """
    with within(REACH_TIMEOUT, "a part of a sync"):
        async with node.rpc() as rpc:
            while (await rpc.get_block_dag_info()).blockCount < blocks:  # noqa: ASYNC110 - another process's state
                await trio.sleep(0.01)


async def state_of(node: SimnetNode) -> tuple[str, int, int, tuple[str, ...]]:
    """What two nodes that are in sync have in common: sink, blocks, virtual DAA score, tips."""
    async with node.rpc() as rpc:
        info = await rpc.get_block_dag_info()
        return info.sink, info.blockCount, info.virtualDaaScore, tuple(sorted(info.tipHashes))


async def wait_synced(pair: Pair, progress: Progress = quiet) -> int:
    """Wait until the target's tip is the source's; returns the number of blocks.

    Raises:
        ProcessEnded: one of the processes ended meanwhile.
        trio.TooSlowError: it took longer than `SYNC_TIMEOUT`.
    """
    watched = [pair.source.process, pair.target.process, *pair.others.values()]
    with within(SYNC_TIMEOUT, "the sync of the second kaspad"):
        async with pair.source.rpc() as ours, pair.target.rpc() as theirs:
            goal = await ours.get_block_dag_info()
            while True:
                state = await theirs.get_block_dag_info()
                progress("blocks synced", state.blockCount, goal.blockCount)
                if state.sink == goal.sink:
                    # kaspad reads its count before its sink, and blocks may have come in between.
                    return int((await theirs.get_block_dag_info()).blockCount)
                for process in watched:
                    if not process.running:
                        raise ProcessEnded(f"{process.argv[0]} ended:\n{process.last_lines()}")
                await trio.sleep(POLL)


async def sync(chain: Chain, kaspad: Path, way: Way, *, delay: float | None = None, progress: Progress = quiet) -> Sync:
    """Time one sync of an empty node.

    Args:
        chain: what is synced.
        kaspad: the binary of both nodes.
        way: what joins them.
        delay: seconds each way on a wire between two namespaces; ``None``: on loopback, without a wire.
        progress: told how far it is.

    Raises:
        RuntimeError: the wire lost frames, so the figure would mean nothing.
    """
    with Wire(delay, HOST) if delay is not None else contextlib.nullcontext() as wire:
        async with pair_of(chain, kaspad, way, wire) as pair, way.prepare(pair) as link:
            return await timed_sync(chain, pair, way, link, delay or 0.0, progress)


async def timed_sync(chain: Chain, pair: Pair, way: Way, link: Link, delay: float, progress: Progress = quiet) -> Sync:
    """The measured part of `sync`: from the request to connect to the same tip."""
    wire = pair.wire
    carried = sum(wire.stats().bytes) if wire else 0
    cpu = pair.cpu()
    begun = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.connect)
        blocks = await wait_synced(pair, progress)
        seconds = time.monotonic() - begun
    used, others = _used(cpu, pair.cpu(), seconds)
    stats = wire.stats() if wire else None
    if stats and stats.dropped:
        raise RuntimeError(f"the wire lost {stats.dropped} frames")
    return Sync(
        way=way.name,
        delay=delay,
        seconds=seconds,
        blocks=blocks,
        bytes=chain.bytes,
        wire=sum(stats.bytes) - carried if stats else None,
        cpu={name: each * seconds for name, each in used.items()},
        others=others,
    )


def _used(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> tuple[dict[str, float], float]:
    """Cores that each process used between two looks, and all others together."""
    used = {name: (each - before.get(name, 0.0)) / seconds for name, each in after.items()}
    return used, max(0.0, used.pop("machine") - sum(used.values()))


async def live(
    chain: Chain,
    pair: Pair,
    way: Way,
    *,
    size: int,
    delay: float = 0.0,
    count: int = 100,
    rate: float = 10.0,
    progress: Progress = quiet,
) -> Live:
    """Mine on the source and see when each block is added at the target, on a pair that is in sync and connected.

    The next block is made while nothing is under way, so that this process has nothing to do but listen when a block
    travels. A block's time begins when the source tells of it (its RPC has then received and checked it).

    Args:
        chain: the chain that the source's folder was copied from, not mined on since if ``size`` is not 0.
        pair, way, delay: as in `sync`.
        size: bytes of transactions in each block; 0 for none.
        count: blocks.
        rate: blocks per second.
        progress: told after every block.

    Raises:
        trio.TooSlowError: a block did not arrive in `ARRIVAL_TIMEOUT` seconds.
    """
    latencies: list[float] = []
    async with pair.source.rpc() as ours, pair.target.rpc() as theirs, pair.source.rpc() as submit:
        miner = chain.miner(submit)
        seen: dict[str, list[float]] = {}
        arrived = trio.Event()

        async def listen(blocks: AsyncIterator[object], place: int) -> None:
            nonlocal arrived
            async for block in blocks:
                now = time.monotonic()
                times = seen.setdefault(block.verboseData.hash, [math.nan, math.nan])  # type: ignore[attr-defined]
                times[place] = now
                if not any(map(math.isnan, times)):
                    latencies.append(times[1] - times[0])
                    arrived.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, await ours.notify_block_added(), 0)
            nursery.start_soon(listen, await theirs.notify_block_added(), 1)
            cpu, begun = pair.cpu(), time.monotonic()
            first = trio.current_time() + 0.2
            for number in range(count):
                block = await miner.template(size)
                arrived = trio.Event()
                await trio.sleep_until(first + number / rate)
                await submit.submit_block(block)
                with within(ARRIVAL_TIMEOUT, "the way of a live block to the second kaspad"):
                    await arrived.wait()
                progress("live blocks", number + 1, count)
            elapsed = time.monotonic() - begun
            used, others = _used(cpu, pair.cpu(), elapsed)
            nursery.cancel_scope.cancel()
    return Live(
        way=way.name,
        delay=delay,
        size=size,
        rate=count / elapsed,
        latencies=latencies,
        cpu=used,
        others=others,
    )


def raw_transfer(size: int, delay: float | None = None) -> float:
    """Seconds that one plain TCP stream takes for so many bytes, connecting included: what the path itself allows."""
    with Wire(delay, HOST) if delay is not None else contextlib.nullcontext() as wire:
        listener = wire.b.socket() if wire else socket.socket()
        sender = wire.a.socket() if wire else socket.socket()
        with listener, sender:
            listener.bind((wire.b.address if wire else "127.0.0.1", 0))
            listener.listen()

            def send() -> None:
                piece = memoryview(bytes(1 << 20))
                sender.connect(listener.getsockname())
                left = size
                while left > 0:
                    left -= sender.send(piece[:left])
                sender.shutdown(socket.SHUT_WR)

            begun = time.monotonic()
            thread = threading.Thread(target=send)
            thread.start()
            accepted, _ = listener.accept()
            with accepted:
                room = bytearray(1 << 20)
                while accepted.recv_into(room):
                    pass
            thread.join()
            return time.monotonic() - begun
