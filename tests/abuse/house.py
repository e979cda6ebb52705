"""A node under attack: on a network in memory, with a kaspad behind it, a friend who comes by, and strangers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
import trio

from kas_libp2p import addresses
from kas_libp2p.config import Config
from kas_libp2p.events import Event, HandlerFailed, InternalError
from kas_libp2p.identity import Identity
from kas_libp2p.kaspa.join import Joiner, JoinSettings, KaspadAddress
from kas_libp2p.kaspa.peer import LightPeer
from kas_libp2p.kaspa.sources import PoolSources
from kas_libp2p.node import Node, open_node
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.kaspa.test_join import NETWORK, FakeKaspad
from tests.memory import MemoryRaw
from tests.network import MemoryInternet, echo
from tests.transport.pairs import Foreign

ADDRESS = "/ip4/11.0.0.1/tcp/1"
ECHO = "/echo/1"
DELAY = 0.01
STRANGERS = 10
"""At once: fewer than any limit, so that what is seen is the stall and not a limit."""

E = TypeVar("E", bound=Event)


class House:
    """The node, who is around it, and what it tells.

    Attributes:
        told: each event of the node, with the time at which it was told.
        kaspad, joiner: what stands behind the node's Kaspa streams.
    """

    def __init__(self, nursery: trio.Nursery, internet: MemoryInternet, node: Node, friend: Node) -> None:
        self.nursery = nursery
        self.internet = internet
        self.node = node
        self.friend = friend
        self.told: list[tuple[float, Event]] = []
        self.kaspad = FakeKaspad(nursery)
        self.joiner = Joiner(
            KaspadAddress(),
            PoolSources(),
            settings=JoinSettings(),
            own_peer=node.peer_id,
            events=node.bus,
            open_kaspad=self.kaspad.open,
        )
        self._strangers = 0

    async def listen(self) -> None:
        """Write down what the node tells."""
        events = self.node.events()
        async for event in events:
            self.told.append((trio.current_time(), event))

    def of(self, kind: type[E]) -> list[tuple[float, E]]:
        """When the node told what, of one kind."""
        return [(at, event) for at, event in self.told if isinstance(event, kind)]

    def count(self, event: str, detail: str = "") -> int:
        """The node's counter."""
        return self.node.bus.counts[event, detail]

    # Strangers

    def stranger(self) -> Identity:
        """Somebody who was never here."""
        self._strangers += 1
        return Identity.from_seed(self._strangers.to_bytes(32, "big"))

    async def pipe(self, ip: str | None = None) -> MemoryRaw:
        """A TCP connection to the node, from an address of its own."""
        self._strangers += 1
        return await self.internet.host(ip or f"11.1.{self._strangers}.1").dial(addresses.parse(ADDRESS))

    async def foreign(self) -> Foreign:
        """A stranger that has shaken hands, and says whatever the test wants in place of Yamux."""
        foreign = Foreign(await self.pipe(), initiator=True, identity=self.stranger())
        await foreign.shake_first()
        return foreign

    async def connected(
        self, on_stream: Callable[[YamuxStream], None] | None = None, *, ip: str | None = None
    ) -> Connection:
        """A stranger whose Noise and Yamux are in order.

        Args:
            on_stream: takes the node's streams. Left out: they are not answered.
            ip: where it is.
        """
        raw = await self.pipe(ip)
        connection = await upgrade(
            raw, identity=self.stranger(), initiator=True, expected=self.node.peer_id, config=Config()
        )
        self.nursery.start_soon(connection.run, on_stream or _ignore)
        await trio.sleep(2 * DELAY)
        return connection

    # The friend

    async def friend_is_served(self) -> float:
        """Have the friend connect, speak, and join the kaspad. Returns how many seconds that took."""
        begun = trio.current_time()
        stream = await self.friend.connect(f"{ADDRESS}/p2p/{self.node.peer_id}", ECHO)
        await stream.send_all(b"good day")
        assert await stream.receive_some() == b"good day"
        async with LightPeer(NETWORK) as light:
            peer = await light.handshake(await self.friend.connect(self.node.peer_id))
            await peer.aclose()
        await stream.aclose()
        seconds = trio.current_time() - begun
        await self.friend.disconnect(self.node.peer_id)
        await trio.sleep(1)
        return seconds


def _ignore(stream: YamuxStream) -> None:
    pass


@asynccontextmanager
async def node_and_friend(internet: MemoryInternet, config: Config) -> AsyncIterator[tuple[Node, Node]]:
    """A node at `ADDRESS`, and one that listens nowhere."""
    here, elsewhere = internet.host("11.0.0.1"), internet.host("11.0.0.9")
    async with (
        open_node(config, identity=Identity.from_seed(b"n" * 32), network=here) as node,
        open_node(Config(listen=()), identity=Identity.from_seed(b"f" * 32), network=elsewhere) as friend,
    ):
        yield node, friend


@asynccontextmanager
async def house(config: Config | None = None) -> AsyncIterator[House]:
    """A node that serves an echo and Kaspa streams."""
    internet = MemoryInternet(delay=DELAY)
    config = config or Config(listen=(ADDRESS,))
    async with node_and_friend(internet, config) as (node, friend), trio.open_nursery() as nursery:
        house = House(nursery, internet, node, friend)
        await node.serve(echo, ECHO)
        await node.serve(house.joiner.carry)
        nursery.start_soon(house.listen)
        await trio.testing.wait_all_tasks_blocked()
        yield house
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def besieged() -> AsyncIterator[House]:
    """A house whose friend, after the block, is served as quickly as before it; nobody's places are left taken."""
    async with house() as h:
        alone = await h.friend_is_served()
        yield h
        await trio.sleep(10 * DELAY)
        assert await h.friend_is_served() == pytest.approx(alone)
        assert h.of(InternalError) == h.of(HandlerFailed) == []
        await trio.sleep(10)
        assert h.joiner.pending == 0
        assert h.kaspad.pending == []
