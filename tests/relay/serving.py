"""A relay of ours, two friends who talk through it all the time, and strangers who say what a test wants."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from kas_libp2p import Node
from kas_libp2p import addresses as addr
from kas_libp2p.config import Config, Limits, Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.errors import ConnectionLost, KasError, StreamReset, UpgradeError
from kas_libp2p.events import CircuitClosed, HandlerFailed, InternalError, PeerMisbehaved, RelayRequestServed
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import OverlayStream, PeerId
from kas_libp2p.relay._messages import (
    HOP,
    STOP,
    Connect,
    HopMessage,
    HopStatus,
    Reserve,
    Status,
    StopConnect,
    StopStatus,
    decode_hop,
    decode_stop,
    encode_hop,
    encode_stop,
)
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.network import MemoryInternet, echo
from tests.relay.scripted import RELAY, RELAY_ADDRESS, THROUGH, Told, node_at, private

DELAY = 0.01
ECHO = "/echo/1"
FREE = {"requests_per_peer": 10**6, "requests_per_ip": 10**6}
"""No limit on requests, where another one is looked at."""


class Stranger:
    """Somebody who is connected to the relay, and speaks hop and stop by hand.

    Attributes:
        identity, connection: its key, and its connection with the relay.
        speaks: the protocols that it serves.
        answer: what it answers to a STOP; ``None``: nothing at all.
        asked: each STOP that came.
    """

    def __init__(self, nursery: trio.Nursery, identity: Identity, connection: Connection) -> None:
        self.identity = identity
        self.peer: PeerId = identity.peer_id
        self.connection = connection
        self.answer: bytes | None = encode_stop(StopStatus(Status.OK))
        self.speaks: tuple[str, ...] = (STOP,)
        self.asked: list[StopConnect] = []
        self._nursery = nursery
        self._send, self.circuits = trio.open_memory_channel[YamuxStream](1000)

    def on_stream(self, stream: YamuxStream) -> None:
        self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: YamuxStream) -> None:
        try:
            await self.connection.accept(stream, self.speaks)
            request = decode_stop(await receive_frame(stream, 4096))
            assert isinstance(request, StopConnect)
            self.asked.append(request)
            if self.answer is not None:
                await stream.send_all(self.answer)
                self._send.send_nowait(stream)
        except (UpgradeError, ConnectionLost, StreamReset):
            pass  # identify, for instance

    async def open(self, data: bytes = b"") -> YamuxStream:
        """A hop stream on which something was said."""
        stream = await self.connection.open_stream(HOP)
        if data:
            await stream.send_all(data)
        return stream

    async def hear(self, stream: YamuxStream) -> HopStatus | None:
        """What the relay answers; ``None`` if it resets the stream, or ends it."""
        try:
            answer = decode_hop(await receive_frame(stream, 4096))
        except (KasError, trio.BrokenResourceError):
            return None
        assert isinstance(answer, HopStatus)
        return answer

    async def ask(self, request: HopMessage | bytes) -> HopStatus | None:
        """One request on a stream of its own, and the answer."""
        stream = await self.open(request if isinstance(request, bytes) else encode_hop(request))
        answer = await self.hear(stream)
        await stream.aclose()
        return answer

    async def status(self, request: HopMessage | bytes) -> str:
        """As `ask`; only the name of the status."""
        answer = await self.ask(request)
        return answer.status.name if answer is not None else ""

    async def reserve(self) -> str:
        return await self.status(Reserve())

    async def call(self, other: Stranger) -> tuple[YamuxStream, YamuxStream]:
        """A circuit: both ends."""
        stream = await self.open(encode_hop(Connect(other.peer)))
        answer = await self.hear(stream)
        assert answer is not None
        assert answer.status is Status.OK
        return stream, await other.circuits.receive()

    def leave(self) -> None:
        """Without a word, as a machine that is switched off and on again."""
        self.connection.abort()


class Serving:
    """The relay, and who is around it.

    Attributes:
        relay: a node of ours.
        told: what it tells.
        alice: a node that has a place on it.
        bob: a node that is connected to her through it.
        talk: what they say to one another.
    """

    talk: OverlayStream

    def __init__(self, nursery: trio.Nursery, internet: MemoryInternet, relay: Node, alice: Node, bob: Node) -> None:
        self.nursery = nursery
        self.internet = internet
        self.relay = relay
        self.told = Told(relay)
        self.alice = alice
        self.bob = bob
        self._strangers = 0

    async def meet(self) -> None:
        """Have Bob call Alice anew, through the relay."""
        await self.bob.disconnect(self.alice.peer_id)
        await trio.sleep(1)
        self.talk = await self.bob.connect(f"{THROUGH}/p2p/{self.alice.peer_id}", ECHO)

    async def stranger(self, ip: str | None = None, identity: Identity | None = None) -> Stranger:
        """Connect somebody.

        Args:
            ip: where from; an address in a network of its own if left out.
            identity: as whom; somebody new if left out.
        """
        self._strangers += 1
        number = self._strangers
        identity = identity or Identity.from_seed(number.to_bytes(32, "big"))
        host = self.internet.host(ip or f"20.{number % 256}.{number // 256}.1")
        raw = await host.dial(addr.parse(RELAY_ADDRESS))
        connection = await upgrade(raw, identity=identity, initiator=True, expected=RELAY.peer_id, config=Config())
        stranger = Stranger(self.nursery, identity, connection)
        self.nursery.start_soon(connection.run, stranger.on_stream)
        await trio.sleep(2 * DELAY)
        return stranger

    def in_use(self, limit: str) -> int:
        """How much of a limit is taken, the friends' part not counted."""
        friends = {"max_reservations": 1, "max_circuits": 1}
        return self.relay.relay_server.status().in_use[limit] - friends.get(limit, 0)

    def served(self) -> list[tuple[str, str, str]]:
        """Request, status and reason of each answer."""
        return [(each.request, each.status, each.reason) for each in self.told.of(RelayRequestServed)]

    def ends(self) -> list[str]:
        """Why each circuit ended."""
        return [each.reason for each in self.told.of(CircuitClosed)]

    def faults(self) -> list[str]:
        """What was held against peers."""
        return [each.reason for each in self.told.of(PeerMisbehaved)]


@asynccontextmanager
async def serving(*, purpose: Purpose = Purpose.ANY, **limits: float) -> AsyncIterator[Serving]:
    """A relay. The friends notice nothing of what happens in the block: what they say takes as long as before, and they
    can end what they have and begin anew as quickly.

    Args:
        limits: where they differ from `RelayLimits`.
    """
    internet = MemoryInternet(delay=DELAY)
    config = Config(
        listen=(RELAY_ADDRESS,),
        role=Role.PUBLIC,
        relay=RelayConfig(serve=True, purpose=purpose, limits=RelayLimits(**limits)),  # type: ignore[arg-type]
        limits=Limits(max_inbound=10_000, max_connections=10_000, max_pending_inbound=1000, max_per_ip=10_000),
    )
    async with (
        node_at(internet, 1, config) as relay,
        node_at(internet, 2, private()) as alice,
        node_at(internet, 3) as bob,
        trio.open_nursery() as nursery,
    ):
        for node in (alice, bob):
            await node.serve(echo)  # a Kaspa stream, as far as identify tells
        await alice.serve(echo, ECHO)
        await trio.sleep(1)
        world = Serving(nursery, internet, relay, alice, bob)
        await world.meet()
        before = await _round_trip(world.talk)
        world.told.events.clear()
        yield world
        assert await _round_trip(world.talk) == pytest.approx(before)
        await world.meet()
        assert await _round_trip(world.talk) == pytest.approx(before)
        assert world.told.of(InternalError) == world.told.of(HandlerFailed) == []
        nursery.cancel_scope.cancel()


async def _round_trip(stream: OverlayStream) -> float:
    await stream.send_all(b"?")
    assert await stream.receive_some() == b"?"
    begun = trio.current_time()
    await stream.send_all(b"good day")
    assert await stream.receive_some() == b"good day"
    return trio.current_time() - begun
