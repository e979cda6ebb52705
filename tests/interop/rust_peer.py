"""A rust-libp2p node in a process of its own, told what to do over its stdin.

Its orders and events are documented in ``tests/interop/rust/src/node.rs`` and ``main.rs``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

PATIENCE = 60.0
"""Seconds that a test waits for anything of the other process before it fails: only reached when something is wrong."""

Json = dict[str, Any]


class RustError(Exception):
    """An order failed on the other side; the text is what it says."""


class RustPeer:
    """A running peer.

    Attributes:
        events: everything it has told, in order.
        peer: its peer id.
        address: where it listens, with its peer id; empty if it does not.
        pid: its process.
    """

    def __init__(self, process: trio.Process) -> None:
        self.events: list[Json] = []
        self.peer = ""
        self.address = ""
        self.pid = process.pid
        self._process = process
        self._news = trio.lowlevel.ParkingLot()
        self._ended = False
        self._orders = 0

    async def _read(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        async for data in self._process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            self.events += map(json.loads, lines)
            self._news.unpark_all()
        self._ended = True
        self._news.unpark_all()

    async def wait(
        self, event: str, where: Callable[[Json], bool] = lambda _: True, *, count: int = 1, **fields: Any
    ) -> Json:
        """Wait for an event, which may have happened already.

        Args:
            event: its name, or several, separated by bars.
            where: what else has to be true of it.
            count: which of the matching events.
            fields: fields that have to be equal.
        """
        names = event.split("|")
        seen = 0
        with trio.move_on_after(PATIENCE):
            while True:
                matching = (
                    each
                    for each in self.events[seen:]
                    if each["event"] in names and fields.items() <= each.items() and where(each)
                )
                seen = len(self.events)
                for each in matching:
                    count -= 1
                    if count == 0:
                        return each
                if self._ended:
                    break
                await self._news.park()
        raise AssertionError(f"no event {event} {fields or ''}; it said {self.events[-20:]}")

    def seen(self, event: str, **fields: Any) -> list[Json]:
        """The events of this name and with these fields so far."""
        return [each for each in self.events if each["event"] == event and fields.items() <= each.items()]

    async def order(self, do: str, **fields: Any) -> Json:
        """Give an order and wait until it is carried out.

        Raises:
            RustError: it could not be carried out.
        """
        assert self._process.stdin is not None
        self._orders += 1
        number = self._orders
        await self._process.stdin.send_all(json.dumps({"id": number, "do": do, **fields}).encode() + b"\n")
        answer = await self.wait("done|failed", id=number)
        if answer["event"] == "failed":
            raise RustError(answer["error"])
        return answer


@asynccontextmanager
async def rust_peer(binary: Path, *arguments: str) -> AsyncIterator[RustPeer]:
    """Run the peer for the length of a block. It ends by itself when its stdin is closed.

    Args:
        binary: from ``scripts/build-interop-rust``.
        arguments: see ``main.rs``; without any, it listens on a port of 127.0.0.1.
    """
    command = [str(binary), *(arguments or ("listen",))]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    peer = RustPeer(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer._read)
            peer.peer = (await peer.wait("started"))["peer"]
            if command[1] == "listen":
                peer.address = (await peer.wait("listening"))["address"]
            try:
                yield peer
            finally:
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()
            with trio.move_on_after(5) as stuck:
                await process.wait()
            if stuck.cancelled_caught:
                process.kill()
                await process.wait()
            await process.stdout.aclose()
