"""kaspads, bridges and relays in the hosts of a NAT lab."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kas_bridge.simnet.bridges import RelayProcess
from kas_bridge.simnet.measure import Pair
from kas_bridge.simnet.mine import Chain
from kas_bridge.simnet.node import simnet_node
from kas_bridge.simnet.wire import Namespace
from natlab import Host, RunningLab


class LabHost(Namespace):
    """A host of a lab as what simnet's processes run in. `close` it when they have been started and ended."""

    def __init__(self, lab: RunningLab, host: Host) -> None:
        # Not the PID namespace: it would count for children only, and kaspad has threads.
        *users, pids, network = lab.entrance(host.name)
        os.close(pids)
        self._fds = (*users, network)
        self._host = host
        self.address = host.address
        self.address6 = host.address6 or ""

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        return self._host.socket(family, kind)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@asynccontextmanager
async def inside(lab: RunningLab, *hosts: Host) -> AsyncIterator[list[LabHost]]:
    """Hosts, for the length of a block."""
    entered = [LabHost(lab, each) for each in hosts]
    try:
        yield entered
    finally:
        for each in entered:
            each.close()


@asynccontextmanager
async def pair_at(chain: Chain, kaspad: Path, folder: Path, source: LabHost, target: LabHost) -> AsyncIterator[Pair]:
    """A kaspad with a copy of a chain in one host, and an empty one in another."""
    async with (
        simnet_node(kaspad, chain.use(folder / "source"), mining=True, inside=source) as full,
        simnet_node(kaspad, folder / "target", inside=target) as empty,
    ):
        yield Pair(full, empty, None, folder)


@asynccontextmanager
async def relay_at(folder: Path, host: LabHost, *flags: str) -> AsyncIterator[tuple[RelayProcess, str]]:
    """``kas-bridge relay`` in a host, and its multiaddr."""
    relay = RelayProcess(folder, host, flags=flags)
    try:
        yield relay, await relay.start()
    finally:
        if hasattr(relay, "process"):
            with trio.CancelScope(shield=True):
                await relay.process.stop()
