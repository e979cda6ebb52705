"""A network in memory for swarms and nodes: addresses, listeners, delay; deterministic, on trio's clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Sequence

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.transport.raw import RawConnection
from tests.memory import MemoryRaw, memory_pair


class MemoryListener:
    """What `MemoryHost.listen` gives."""

    def __init__(self, internet: MemoryInternet, address: str) -> None:
        self._internet = internet
        self.address = addresses.parse(address)
        self._send, self._receive = trio.open_memory_channel[MemoryRaw](math.inf)

    def addresses(self) -> Sequence[Multiaddr]:
        return (self.address,)

    async def accept(self) -> RawConnection:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    def close(self) -> None:
        self._internet.listeners.pop(str(self.address), None)
        self._send.close()


class MemoryInternet:
    """Who listens where.

    Attributes:
        delay: seconds one way.
        pipes: both ends of every connection that was made, the dialer's first.
        names: what ``/dns/...`` addresses resolve to.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self.delay = delay
        self.listeners: dict[str, MemoryListener] = {}
        self.pipes: list[tuple[MemoryRaw, MemoryRaw]] = []
        self.names: dict[str, list[str]] = {}
        self.refused: dict[str, Exception] = {}
        self._ports = itertools.count(50_000)

    def host(self, ip: str) -> MemoryHost:
        return MemoryHost(self, ip)


class MemoryHost:
    """One host: a `kas_libp2p.swarm.Network`."""

    def __init__(self, internet: MemoryInternet, ip: str) -> None:
        self.internet = internet
        self.ip = ip
        self.dialed: list[str] = []
        self.changed = trio.Event()
        self.extra: list[str] = []

    async def listen(self, address: Multiaddr) -> MemoryListener:
        await trio.lowlevel.checkpoint()
        where = addresses.ip_port(address)
        assert where is not None
        listener = MemoryListener(self.internet, str(addresses.from_ip_port(self.ip, where[1])))
        if self.extra:
            listener.addresses = lambda: (listener.address, *map(addresses.parse, self.extra))  # type: ignore[method-assign]
        self.internet.listeners[str(listener.address)] = listener
        return listener

    async def dial(self, address: Multiaddr) -> MemoryRaw:
        self.dialed.append(str(address))
        await trio.sleep(2 * self.internet.delay)
        if (error := self.internet.refused.get(str(address))) is not None:
            raise error
        listener = self.internet.listeners.get(str(address))
        if listener is None:
            raise ConnectionRefusedError(111, "Connection refused")
        here, there = memory_pair(delay=self.internet.delay)
        ours = str(addresses.from_ip_port(self.ip, next(self.internet._ports)))
        here.local_address = there.remote_address = ours
        here.remote_address = there.local_address = str(address)
        self.internet.pipes.append((here, there))
        listener._send.send_nowait(there)
        return here

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        await trio.lowlevel.checkpoint()
        return [addresses.parse(each) for each in self.internet.names[str(address)]]

    async def address_changes(self) -> AsyncIterator[object]:
        while True:
            await self.changed.wait()
            self.changed = trio.Event()
            yield None
