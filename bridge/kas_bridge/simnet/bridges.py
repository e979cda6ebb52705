"""Two kas-bridges in front of two kaspads, as the way that joins them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from kas_bridge.control import ControlError, ask
from kas_bridge.datadir import socket_paths
from kas_bridge.simnet.measure import Link, Pair, Way
from kas_bridge.simnet.node import LOOPBACK, SimnetNode, free_port
from kas_bridge.simnet.process import Process, ProcessEnded

READY_TIMEOUT = 60.0
"""Seconds from start until the bridge has found its kaspad. Importing libp2p is most of it: 1, on a busy machine 10."""
JOIN_TIMEOUT = 60.0
"""Seconds from the request to connect until both kaspads are joined."""
POLL = 0.05

COMMAND = (sys.executable, "-m", "kas_bridge")
"""What runs a bridge. Another one (a profiler in front, an older version) may be given instead."""


class BridgeProcess:
    """``kas-bridge run`` in front of one simnet node. Its identity and port stay the same over restarts.

    Args:
        node: the kaspad; the bridge runs in the same namespace.
        folder: its data directory.
        command: what runs kas-bridge.
        flags: further flags of ``run``.

    Attributes:
        port: where other bridges reach it.
        process: the running or last process.
    """

    def __init__(
        self, node: SimnetNode, folder: Path, *, command: Sequence[str] = COMMAND, flags: Sequence[str] = ()
    ) -> None:
        self.node = node
        self.folder = folder
        self.host = node.inside.address if node.inside is not None else LOOPBACK
        self.port = free_port(node.inside, self.host)
        self._command = command
        self._flags = flags
        self.process: Process

    @property
    def argv(self) -> list[str]:
        """The command line: nothing that a user with two nodes on one machine would not type."""
        return [
            *self._command,
            "run",
            f"--data-dir={self.folder}",
            f"--kaspad={LOOPBACK}:{self.node.p2p_port}",
            "--network=simnet",
            f"--rpc={LOOPBACK}:{self.node.rpc_port}",
            f"--listen=/ip4/{self.host}/tcp/{self.port}",
            *self._flags,
        ]

    @property
    def log(self) -> Path:
        """What it said, over all its lives."""
        return self.folder.with_suffix(".log")

    async def start(self) -> None:
        """Start it and wait until it has found its kaspad.

        Raises:
            ProcessEnded: it ended instead; with its last lines.
            trio.TooSlowError: it did not find it in `READY_TIMEOUT` seconds.
        """
        self.process = Process.start(self.argv, log=self.log, inside=self.node.inside)
        with trio.fail_after(READY_TIMEOUT):
            while True:
                if not self.process.running:
                    raise ProcessEnded(f"kas-bridge ended while starting:\n{self.process.last_lines()}")
                with suppress(ControlError):
                    status = await self.ask("status")
                    if status["kaspad"]["condition"] == "up" and status["addresses"]:
                        return
                await trio.sleep(POLL)

    async def stop(self) -> int:
        """End it in order (SIGINT); returns its exit status."""
        return await self.process.stop()

    async def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """One request on its control socket.

        Raises:
            ControlError: it does not answer.
            ActionError: it said no.
        """
        return await ask(socket_paths(self.folder), {"action": action, **fields})

    async def address(self) -> str:
        """Its multiaddr, with its peer id."""
        status = await self.ask("status")
        return f"/ip4/{self.host}/tcp/{self.port}/p2p/{status['peer_id']}"

    async def wait_joined(self, count: int = 1) -> None:
        """Wait until so many peers are joined to its kaspad.

        Raises:
            trio.TooSlowError: they were not in `JOIN_TIMEOUT` seconds.
        """
        with trio.fail_after(JOIN_TIMEOUT):
            while (await self.ask("status"))["peers"]["joined"] != count:  # noqa: ASYNC110 - another process's state
                await trio.sleep(POLL)


class BridgeLink(Link):
    """Both bridges, running, not connected yet.

    Attributes:
        source, target: the bridges.
    """

    def __init__(self, source: BridgeProcess, target: BridgeProcess, address: str) -> None:
        self.source = source
        self.target = target
        self._address = address

    async def connect(self) -> None:
        await self.target.ask("connect", multiaddr=self._address)


class Bridges(Way):
    """``kas-bridge run`` in front of each kaspad; the target's bridge is asked to connect to the source's.

    Args:
        name: for tables, if several kinds are compared.
        command: what runs kas-bridge.
        flags: further flags of ``kas-bridge run``.
    """

    def __init__(
        self, name: str = "two bridges", *, command: Sequence[str] = COMMAND, flags: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._command = command
        self._flags = flags

    def prepare(self, pair: Pair) -> AbstractAsyncContextManager[BridgeLink]:
        return self._prepare(pair)

    @asynccontextmanager
    async def _prepare(self, pair: Pair) -> AsyncIterator[BridgeLink]:
        made = {
            name: BridgeProcess(node, pair.folder / f"bridge-{name}", command=self._command, flags=self._flags)
            for name, node in (("source", pair.source), ("target", pair.target))
        }
        try:
            async with trio.open_nursery() as nursery:
                for bridge in made.values():
                    nursery.start_soon(bridge.start)
            pair.others.update({f"bridge {name}": bridge.process for name, bridge in made.items()})
            yield BridgeLink(made["source"], made["target"], await made["source"].address())
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for bridge in made.values():
                        if hasattr(bridge, "process"):
                            nursery.start_soon(bridge.stop)
