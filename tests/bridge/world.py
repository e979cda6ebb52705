"""Bridges in one process, each in front of a Kaspa node in memory, joined by a network in memory, on trio's clock."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from kas_bridge.app import Bridge
from kas_bridge.config import Settings
from kas_libp2p.events import Event
from kas_libp2p.identity import Identity
from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa.channel import MessageChannel, memory_channel_pair, running
from kas_libp2p.kaspa.join import End, Ended, Joiner, JoinFailed, KaspadAddress, Side, VersionInfo
from kas_libp2p.kaspa.peer import LightPeer
from kas_libp2p.kaspa.sources import FixedSource, Sources
from kas_libp2p.metadata import PeerId
from kas_libp2p.node import Node, open_node
from tests.network import MemoryInternet

T = TypeVar("T")

NETWORK = "kaspa-simnet"
KASPAD = "127.0.0.1:1"
"""Where the bridges are told that theirs is. One looks there by TCP at times, and nothing must listen."""


class Kaspad:
    """A node with kaspad's manners, as far as a bridge meets them.

    Attributes:
        up: whether it runs.
        reject: what it answers to every Version instead of shaking hands.
        silent: takes connections and says nothing.
        stuck: says Version, and nothing after it.
        sources: from where it was dialed, in order.
        light: the node itself; a new one, with a new id, after each start.
    """

    def __init__(
        self, nursery: trio.Nursery, *, network: str = NETWORK, agent: str = "/kaspad:2.1.0/", protocol: int = 11
    ) -> None:
        self._nursery = nursery
        self._made = {"network": network, "user_agent": agent, "protocol_version": protocol}
        self._scope = trio.CancelScope()
        self.up = False
        self.reject: str | None = None
        self.silent = self.stuck = False
        self.sources: list[str | None] = []
        self.light = LightPeer(network)

    @property
    def node_id(self) -> str:
        return str(uuid.UUID(bytes=self.light.hello.node_id))

    async def start(self) -> Kaspad:
        await self._nursery.start(self._live)
        return self

    def stop(self) -> None:
        self.up = False
        self._scope.cancel()

    async def _live(self, *, task_status: Any) -> None:
        self._scope = trio.CancelScope()
        with self._scope:
            async with LightPeer(**self._made) as self.light:  # type: ignore[arg-type]
                self.up = True
                task_status.started()
                await trio.sleep_forever()

    async def open(self, address: KaspadAddress, source: str | None, max_message: int) -> MessageChannel:
        """In place of a TCP connection, see `kas_libp2p.kaspa.join.OpenKaspad`."""
        await trio.lowlevel.checkpoint()
        if not self.up:
            raise JoinFailed(Ended(End.NOT_RUNNING, Side.KASPAD, f"nothing listens on {address}"))
        self.sources.append(source)
        theirs, ours = memory_channel_pair()
        self._nursery.start_soon(self.answer, ours)
        return theirs

    async def look(self, address: KaspadAddress, sources: Sources) -> VersionInfo:
        return await Joiner(address, FixedSource(), open_kaspad=self.open).look()

    async def answer(self, channel: MessageChannel) -> None:
        """What stands behind the door."""
        if self.silent:
            async with running(channel):
                await trio.sleep_forever()
        if self.reject is None and not self.stuck:
            await self.light.handle(channel)
            return
        hello = self.light.hello
        version = pb.Version(
            protocolVersion=hello.protocol_version, id=hello.node_id, userAgent=hello.user_agent, network=hello.network
        )
        async with running(channel):
            await channel.send(pb.KaspadMessage(version=version).SerializeToString())
            if await channel.receive() is None:
                return
            if self.stuck:
                await trio.sleep_forever()
            await channel.send(pb.KaspadMessage(reject=pb.Reject(reason=self.reject)).SerializeToString())
            await channel.aclose()


class Machine:
    """One operator's machine: a kaspad, and a bridge in front of it."""

    def __init__(self, bridge: Bridge, node: Node, kaspad: Kaspad, events: list[Event]) -> None:
        self.bridge = bridge
        self.node = node
        self.kaspad = kaspad
        self.events = events

    @property
    def peer(self) -> PeerId:
        return self.node.peer_id

    @property
    def address(self) -> str:
        return self.node.addresses[0]

    def row(self, other: Machine) -> dict[str, Any]:
        """What `peers` shows of another one."""
        (row,) = (each for each in self.bridge.peers() if each["peer_id"] == other.peer)
        return row

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


class World:
    """Machines with bridges on one network."""

    def __init__(self, folder: Path, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.nursery = nursery
        self.internet = MemoryInternet(delay=0.01)
        self._stack = stack
        self._count = 0

    async def kaspad(self, **made: Any) -> Kaspad:
        return await Kaspad(self.nursery, **made).start()

    async def machine(self, kaspad: Kaspad | None = None, **settings: Any) -> Machine:
        """A bridge, running, in front of a new kaspad or the one that is given."""
        self._count += 1
        kaspad = kaspad or await self.kaspad()
        return await self._stack.enter_async_context(self._machine(self._count, kaspad, settings))

    async def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Have something else in this world, until its end."""
        return await self._stack.enter_async_context(manager)

    @asynccontextmanager
    async def _machine(self, number: int, kaspad: Kaspad, given: dict[str, Any]) -> AsyncIterator[Machine]:
        ip = f"10.0.0.{number}"
        options = {name: given.pop(name) for name in ("open_facts", "bans") if name in given}
        settings = Settings(
            **{
                "data_dir": self.folder / str(number),
                "listen": (f"/ip4/{ip}/tcp/16117",),
                "kaspad": KASPAD,
                "rpc": "off",
                "port_mapping": False,  # this machine's real router is none of theirs
            }
            | given
        )
        settings.data_dir.mkdir(exist_ok=True)
        identity = Identity.from_seed(bytes([number]) * 32)
        host = self.internet.host(ip)
        async with open_node(settings.overlay_config(), identity=identity, network=host) as node:
            events: list[Event] = []
            emit = node.bus.emit
            node.bus.emit = lambda event: (events.append(event), emit(event))[1]  # type: ignore[method-assign,func-returns-value]
            bridge = Bridge(
                settings,
                node,
                look=kaspad.look,
                open_kaspad=kaspad.open,
                wall_clock=trio.current_time,
                random=lambda: 0.5,
                **options,
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(bridge.run)
                yield Machine(bridge, node, kaspad, events)
                nursery.cancel_scope.cancel()

    def hang(self) -> None:
        """From here on nothing arrives any more on the connections that are up, and nobody is told."""
        for pipe in self.internet.pipes:
            for end in pipe:
                end._out.delay = math.inf


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """A network without machines."""
    async with trio.open_nursery() as nursery:
        async with AsyncExitStack() as stack:
            yield World(folder, nursery, stack)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], Any], seconds: float = 60.0, *, step: float = 0.01) -> float:
    """Wait, on the mock clock, until something is so; gives the seconds that it took."""
    begun = trio.current_time()
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - several objects' state, none of which sets an event for all
            await trio.sleep(step)
    return trio.current_time() - begun
