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
from kas_bridge.simnet.process import Process, ProcessEnded, within
from kas_bridge.simnet.wire import Namespace

READY_TIMEOUT = 60.0
"""Seconds from start until the bridge has found its kaspad. Importing libp2p is most of it: 1, on a busy machine 10."""
JOIN_TIMEOUT = 60.0
"""Seconds from the request to connect until both kaspads are joined."""
PLACE_TIMEOUT = 20.0
"""Seconds from start until the bridge has a place on a relay that it was named: a few round trips."""
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
        self._listen = "0.0.0.0" if node.inside is not None else self.host  # noqa: S104 - a namespace of its own
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
            f"--listen=/ip4/{self._listen}/tcp/{self.port}",
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
        with within(READY_TIMEOUT, "the start of kas-bridge run"):
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

    async def relayed_address(self) -> str:
        """Its multiaddr through a relay, as soon as it has one.

        Raises:
            trio.TooSlowError: it had none in `PLACE_TIMEOUT` seconds.
        """
        with within(PLACE_TIMEOUT, "getting a place on a relay"):
            while True:
                for place in (await self.ask("status"))["reservations"]:
                    for address in place["reachable"]:
                        return str(address)
                await trio.sleep(POLL)

    async def wait_joined(self, count: int = 1) -> None:
        """Wait until so many peers are joined to its kaspad.

        Raises:
            trio.TooSlowError: they were not in `JOIN_TIMEOUT` seconds.
        """
        with within(JOIN_TIMEOUT, "joining the two kaspads"):
            while (await self.ask("status"))["peers"]["joined"] != count:  # noqa: ASYNC110 - another process's state
                await trio.sleep(POLL)


class RelayProcess:
    """``kas-bridge relay`` on a host of its own.

    Args:
        folder: its data directory.
        inside: the namespace in which it runs.
        flags: further flags of ``relay``.

    Attributes:
        port: where it is reached.
        process: the running or last process.
    """

    def __init__(
        self, folder: Path, inside: Namespace, *, command: Sequence[str] = COMMAND, flags: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.inside = inside
        self.port = free_port(inside, inside.address)
        self._argv = [
            *command,
            "relay",
            f"--data-dir={folder}",
            f"--listen=/ip4/{inside.address}/tcp/{self.port}",
            *flags,
        ]
        self.process: Process

    async def start(self) -> str:
        """Start it; returns its multiaddr, with its peer id.

        Raises:
            ProcessEnded: it ended instead; with its last lines.
            trio.TooSlowError: it did not answer in `READY_TIMEOUT` seconds.
        """
        self.process = Process.start(self._argv, log=self.folder.with_suffix(".log"), inside=self.inside)
        with within(READY_TIMEOUT, "the start of kas-bridge relay"):
            while True:
                if not self.process.running:
                    raise ProcessEnded(f"kas-bridge relay ended while starting:\n{self.process.last_lines()}")
                with suppress(ControlError):
                    status = await self.ask("status")
                    return f"/ip4/{self.inside.address}/tcp/{self.port}/p2p/{status['peer_id']}"
                await trio.sleep(POLL)

    async def ask(self, action: str) -> dict[str, Any]:
        """One request on its control socket.

        Raises:
            ControlError: it does not answer.
        """
        return await ask(socket_paths(self.folder), {"action": action})


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
        relays: multiaddrs of relays; then the source is dialed through one of them.
    """

    def __init__(
        self,
        name: str = "two bridges",
        *,
        command: Sequence[str] = COMMAND,
        flags: Sequence[str] = (),
        relays: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._relayed = bool(relays)
        flags = (*flags, *(f"--relay={each}" for each in relays))
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
            source = made["source"]
            address = await (source.relayed_address() if self._relayed else source.address())
            yield BridgeLink(source, made["target"], address)
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for bridge in made.values():
                        if hasattr(bridge, "process"):
                            nursery.start_soon(bridge.stop)
