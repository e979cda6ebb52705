"""A network in memory for swarms and nodes: addresses, listeners, delay; deterministic, on trio's clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio
from multiaddr import Multiaddr

from kas_libp2p import addresses
from kas_libp2p.config import Config
from kas_libp2p.errors import AddressFailure, ResolveError, Stage
from kas_libp2p.events import Event, EventBus
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import OverlayStream
from kas_libp2p.swarm import Swarm
from kas_libp2p.transport.raw import RawConnection
from tests.memory import MemoryRaw, memory_pair

E = TypeVar("E", bound=Event)


class MemoryListener:
    """What `MemoryHost.listen` gives."""

    def __init__(self, host: MemoryHost, address: str) -> None:
        self._host = host
        self.address = addresses.parse(address)
        self._send, self._receive = trio.open_memory_channel[MemoryRaw](math.inf)

    def addresses(self) -> Sequence[Multiaddr]:
        where = addresses.ip_port(self.address)
        assert where is not None
        return (addresses.from_ip_port(self._host.ip, where[1]), *map(addresses.parse, self._host.extra))

    async def accept(self) -> RawConnection:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError from None

    def close(self) -> None:
        self._host.internet.listeners.pop(str(self.address), None)
        self._send.close()


class MemoryInternet:
    """Who listens where.

    Attributes:
        delay: seconds one way.
        pipes: both ends of every connection that was made, the dialer's first.
        names: what ``/dns/...`` addresses resolve to.
        name_delay: seconds until a name is resolved, or known not to be.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self.delay = delay
        self.listeners: dict[str, MemoryListener] = {}
        self.pipes: list[tuple[MemoryRaw, MemoryRaw]] = []
        self.names: dict[str, list[str]] = {}
        self.name_delay = 0.0
        self.refused: dict[str, Exception] = {}
        self._ports = itertools.count(50_000)

    def host(self, ip: str) -> MemoryHost:
        return MemoryHost(self, ip)


class MemoryHost:
    """One host: a `kas_libp2p.swarm.Network`."""

    def __init__(self, internet: MemoryInternet, ip: str) -> None:
        self.internet = internet
        self.ip = ip
        self.on_contact: Callable[[str], None] | None = None
        self.dialed: list[str] = []
        self.changed = trio.Event()
        self.extra: list[str] = []

    def move(self, ip: str) -> None:
        """It is in another network from now on; what goes by its connections is another thing."""
        self.ip = ip
        self.changed.set()

    async def listen(self, wanted: Sequence[Multiaddr]) -> Sequence[MemoryListener]:
        await trio.lowlevel.checkpoint()
        listeners = []
        for address in wanted:
            where = addresses.ip_port(address)
            assert where is not None
            listener = MemoryListener(self, str(addresses.from_ip_port(self.ip, where[1])))
            self.internet.listeners[str(listener.address)] = listener
            listeners.append(listener)
        return listeners

    async def dial_fresh(self, address: Multiaddr) -> MemoryRaw:
        return await self.dial(address)

    async def dial_punch(self, address: Multiaddr) -> MemoryRaw:
        return await self.dial(address)

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

    async def resolve(self, wanted: Iterable[Multiaddr]) -> tuple[list[Multiaddr], list[AddressFailure]]:
        await trio.sleep(self.internet.name_delay)
        found: list[Multiaddr] = []
        failures: list[AddressFailure] = []
        for address in wanted:
            if addresses.name_of(address) is None:
                found.append(address)
            elif str(address) in self.internet.names:
                found += map(addresses.parse, self.internet.names[str(address)])
            else:
                failures.append(AddressFailure(str(address), Stage.RESOLVE, ResolveError("no such name"), 0.0))
        return found, failures

    async def watch(self, changed: Callable[[], None]) -> None:
        while True:
            await self.changed.wait()
            self.changed = trio.Event()
            changed()


@asynccontextmanager
async def running(swarm: Swarm, *listen: str) -> AsyncIterator[Swarm]:
    """A swarm that runs, and listens."""
    async with trio.open_nursery() as nursery:
        await nursery.start(swarm.carry)
        await swarm.listen(*map(addresses.parse, listen))
        yield swarm
        nursery.cancel_scope.cancel()


class RecordingBus(EventBus):
    """An event bus that also remembers."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)
        super().emit(event)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one type."""
        return [event for event in self.events if isinstance(event, kind)]


def make_swarm(host: MemoryHost, seed: int, config: Config | None = None) -> tuple[Swarm, RecordingBus]:
    """A swarm on a host, and what it tells."""
    bus = RecordingBus()
    return Swarm(Identity.from_seed(bytes([seed]) * 32), config, events=bus, network=host), bus


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so that nobody can be asked to tell, as what another library does in its own time."""
    with trio.fail_after(60):  # only reached when something is wrong
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


async def echo(stream: OverlayStream) -> None:
    """Send back what comes, until it ends."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def talk(stream: OverlayStream, size: int = 5) -> None:
    """Send so many bytes to somebody who echoes, and wait until they are back."""
    await stream.send_all(bytes(size))
    got = 0
    while got < size:
        piece = await stream.receive_some()
        assert piece
        got += len(piece)
