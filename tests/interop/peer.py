"""A node of another implementation in a process of its own, told what to do over its stdin.

The orders and events are documented in ``tests/interop/rust/src/node.rs`` and ``main.rs``, ``tests/interop/go/main.go``
and ``tests/interop/js/peer.js``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

PATIENCE = 60.0
"""Seconds that a test waits for anything of the other process before it fails: only reached when something is wrong."""

LAST_WORDS = 10
"""Lines of its stderr that are told with what went wrong."""

Json = dict[str, Any]


class PeerError(Exception):
    """An order failed on the other side; the text is what it says."""


class Peer:
    """A running peer.

    Attributes:
        events: everything it has told, in order.
        peer: its peer id.
        address: where it listens, with its peer id; empty if it does not.
        pid: its process.
    """

    def __init__(self, process: trio.Process, name: str) -> None:
        self.events: list[Json] = []
        self.peer = ""
        self.address = ""
        self.pid = process.pid
        self._process = process
        self._name = name
        self._complaints: deque[str] = deque(maxlen=LAST_WORDS)
        self._news = trio.lowlevel.ParkingLot()
        self._ended = False
        self._orders = 0
        self._writing = trio.Lock()

    async def _hear(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear_events)
            nursery.start_soon(self._hear_complaints)
        self._ended = True
        self._news.unpark_all()

    async def _hear_events(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        async for data in self._process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            self.events += map(json.loads, lines)
            self._news.unpark_all()

    async def _hear_complaints(self) -> None:
        assert self._process.stderr is not None
        rest = b""
        async for data in self._process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._complaints.append(line.decode(errors="replace"))
                print(f"{self._name} {self.peer[-4:]}: {self._complaints[-1]}", file=sys.stderr)

    def _last_words(self) -> str:
        return "".join(f"\n  {self._name}'s stderr: {line}" for line in self._complaints)

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
        __tracebackhide__ = True  # who waits for it says more
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
        said = "".join(f"\n  {each}" for each in self.events[-LAST_WORDS:])
        why = "has ended" if self._ended else f"is silent for {PATIENCE:g} s"
        raise AssertionError(f"no event {event} {fields or ''}: {self._name} {why}; it said{said}{self._last_words()}")

    def seen(self, event: str, **fields: Any) -> list[Json]:
        """The events of this name and with these fields so far."""
        return [each for each in self.events if each["event"] == event and fields.items() <= each.items()]

    async def order(self, do: str, **fields: Any) -> Json:
        """Give an order and wait until it is carried out.

        Raises:
            PeerError: it could not be carried out.
        """
        __tracebackhide__ = True
        assert self._process.stdin is not None
        self._orders += 1
        number = self._orders
        async with self._writing:
            await self._process.stdin.send_all(json.dumps({"id": number, "do": do, **fields}).encode() + b"\n")
        answer = await self.wait("done|failed", id=number)
        if answer["event"] == "failed":
            error = PeerError(answer["error"])
            error.add_note(f"{self._name} was told to {do} {fields}{self._last_words()}")
            raise error
        return answer

    def kill(self) -> None:
        """End the process as a crash of its machine would."""
        self._process.kill()


@asynccontextmanager
async def running_peer(binary: Path, *arguments: str) -> AsyncIterator[Peer]:
    """Run the peer for the length of a block. It ends by itself when its stdin is closed.

    Args:
        binary: from one of ``scripts/build-interop-*``.
        arguments: of its command line; without any, it listens on a port of 127.0.0.1.
    """
    command = [str(binary), *(arguments or ("listen",))]
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(command, stdin=pipe, stdout=pipe, stderr=pipe)
    peer = Peer(process, _implementation(binary))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer._hear)
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
            assert process.stderr is not None
            await process.stdin.aclose()
            with trio.move_on_after(5) as stuck:
                await process.wait()
            if stuck.cancelled_caught:
                process.kill()
                await process.wait()
            await process.stdout.aclose()
            await process.stderr.aclose()


def _implementation(binary: Path) -> str:
    """Which one a program of ``scripts/build-interop-*`` is: its folder is named interop-LANGUAGE-HASH."""
    return binary.parent.name.split("-")[1]


def leaves(error: BaseException) -> list[BaseException]:
    """What a group of errors is made of; an error that is none stands for itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in leaves(each)]
    return [error]
