"""What a pair of kaspads and their bridges notice while the paths between them change: peers, blocks, events."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio
from trio import TaskStatus  # type: ignore[attr-defined,unused-ignore]  # libp2p brings stubs that lack it

from kas_bridge.control import ControlError, follow
from kas_bridge.datadir import socket_paths
from kas_bridge.simnet.bridges import BridgeProcess
from kas_bridge.simnet.measure import Pair, state_of
from kas_bridge.simnet.mine import Chain
from kas_bridge.simnet.node import SimnetNode

LOOK = 0.02
"""Seconds between two questions to a kaspad about its peers or its blocks; each costs it half a millisecond of CPU."""
FOLLOW_AGAIN = 0.05
"""Seconds until it is tried again to hear a bridge that does not run."""
CATCH_UP = 60.0
"""Seconds for the blocks of a path that was lost: found after 4, another one after some more, on a busy machine."""
AROUND = 1.0
"""Seconds before and after a move in which a block counts as one that the move may have held up."""

_CAME = re.compile(r"P2P Connected to \w+ peer (\S+)")
_WENT = re.compile(r"P2P, (?:incoming stream ended|network error).* from peer (\S+)")


class PeerWatch:
    """A kaspad's peers, as it says itself.

    Args:
        every: seconds between two questions.

    Attributes:
        peers: node id, and address with port, of every peer that was seen.
        looks: how often it was asked.
        missed: how often it had no peer, after the first one was seen.
    """

    def __init__(self, node: SimnetNode, every: float = LOOK) -> None:
        self.node = node
        self._every = every
        self.peers: set[tuple[str, str]] = set()
        self.looks = self.missed = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        async with self.node.rpc() as rpc:
            while True:
                peers = await rpc.get_connected_peer_info()
                self.looks += 1
                self.missed += bool(self.peers) and not peers
                self.peers |= {(each.id, each.address) for each in peers}
                await trio.sleep(self._every)


def peers_in(log: Path) -> tuple[list[str], list[str]]:
    """The addresses of peers that came, and of those that went again, by a kaspad's own log.

    Who was refused in the handshake, or left in it, counts as neither: so does a bridge that asks who its kaspad is.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    came = _CAME.findall(text)
    return came, [each for each in _WENT.findall(text) if each in came]


class Blocks:
    """When blocks are added at either node of a pair; and live ones, made at a steady rate whatever arrives.

    Attributes:
        made, came: when each block was added at the source and at the target (`time.monotonic`), by hash.
    """

    def __init__(self, chain: Chain, pair: Pair) -> None:
        self.made: dict[str, float] = {}
        self.came: dict[str, float] = {}
        self._chain = chain
        self._pair = pair
        self._mining = trio.CancelScope()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled."""

        async def listen(node: SimnetNode, times: dict[str, float], ready: trio.Event) -> None:
            async with node.rpc() as rpc:
                blocks = await rpc.notify_block_added()
                ready.set()
                async for block in blocks:
                    times.setdefault(block.verboseData.hash, time.monotonic())

        async with trio.open_nursery() as nursery:
            for node, times in ((self._pair.source, self.made), (self._pair.target, self.came)):
                ready = trio.Event()
                nursery.start_soon(listen, node, times, ready)
                await ready.wait()
            task_status.started()

    async def mine(self, size: int, rate: float = 10.0, behind: float = 0.0) -> None:
        """Make blocks on the source until `settle` or cancelled. Call it once if ``size`` is not 0: coins go on from
        the chain's.

        Args:
            size: bytes of transactions in each; 0 for none.
            rate: blocks per second.
            behind: seconds of blocks that may follow a hiccup at once; 0 for none, as such a crowd comes late.
        """
        with self._mining:
            async with self._pair.source.rpc() as rpc:
                miner = self._chain.miner(rpc)
                due = trio.current_time()
                while True:
                    block = await miner.template(size)
                    await trio.sleep_until(due)
                    await rpc.submit_block(block)
                    due = max(due + 1 / rate, trio.current_time() - behind)

    async def settle(self) -> list[str]:
        """Mine no more, and wait until everything has come; returns how the two kaspads differ then, in words.

        Raises:
            trio.TooSlowError: not in `CATCH_UP` seconds.
        """
        self._mining.cancel()
        await self.caught_up()
        deadline = trio.current_time() + CATCH_UP
        while True:
            source, target = await state_of(self._pair.source), await state_of(self._pair.target)
            if source == target:
                return []
            if trio.current_time() > deadline:
                return [f"the source is at {source[:3]}, the target at {target[:3]}"]
            await trio.sleep(LOOK)  # a block that was handed in last may be on its way

    async def caught_up(self) -> None:
        """Wait until every block that was made by now has come.

        Raises:
            trio.TooSlowError: not in `CATCH_UP` seconds.
        """
        wanted = set(self.made)
        with trio.fail_after(CATCH_UP):
            while wanted - self.came.keys():  # noqa: ASYNC110 - another process's state
                await trio.sleep(LOOK)

    def delays(self, since: float = -math.inf, until: float = math.inf) -> list[float]:
        """Seconds from the source to the target, of blocks made in a time of `time.monotonic`, that have come."""
        return [self.came[each] - at for each, at in [*self.made.items()] if since <= at <= until and each in self.came]

    def pause(self, at: float, usual: float) -> float:
        """Seconds by which a block around a moment was later than usual, at most."""
        return max(self.delays(at - AROUND, at + AROUND), default=0.0) - usual

    def longest_gap(self, since: float, until: float = math.inf) -> float:
        """The longest time between two blocks that came one after the other at the target, of which the second came
        after ``since`` and the first before ``until``."""
        times = sorted(self.came.values())
        return max((b - a for a, b in itertools.pairwise(times) if b > since and a < until), default=0.0)


class EventLog:
    """What a bridge tells, over all its lives.

    Attributes:
        events: each with the time of `time.monotonic` at which it happened.
    """

    def __init__(self, bridge: BridgeProcess) -> None:
        self.bridge = bridge
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._news = trio.Event()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled. `started` once it hears the bridge that runs."""
        offset = time.monotonic() - time.time()

        def take(event: dict[str, Any]) -> None:
            self.events.append((event["at"] + offset, event))
            self._news.set()
            self._news = trio.Event()

        started = False

        def on_start() -> None:
            nonlocal started
            if not started:
                started = True
                task_status.started()

        while True:
            with suppress(ControlError):  # it is not there
                await follow(socket_paths(self.bridge.folder), take, on_start)
            await trio.sleep(FOLLOW_AGAIN)

    def of(self, name: str, since: float = -math.inf) -> list[tuple[float, dict[str, Any]]]:
        """Events of a kind that happened after a time."""
        return [each for each in self.events if each[1]["event"] == name and each[0] > since]

    async def wait(self, condition: Callable[[], bool], timeout: float) -> None:
        """Wait until a condition that depends on events holds.

        Raises:
            trio.TooSlowError: it did not in ``timeout`` seconds.
        """
        with trio.fail_after(timeout):
            while not condition():
                await self._news.wait()


def quantile(values: Iterable[float], share: float) -> float:
    """What this share of the values does not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def in_ms(values: Iterable[float]) -> str:
    """Median, 95 % and longest, in words."""
    known = [*values]
    if not known:
        return "none"
    middle, high, top = (each * 1000 for each in (statistics.median(known), quantile(known, 0.95), max(known)))
    return f"p50 {middle:.0f}, p95 {high:.0f}, longest {top:.0f} ms, of {len(known)}"
