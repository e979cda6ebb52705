"""Two services on a circuit in memory, and a sky under which their dials meet. No node, no socket, a mock clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from kas_libp2p.config import Config
from kas_libp2p.dcutr._candidates import Known, Own
from kas_libp2p.dcutr._messages import MAX_MESSAGE, PROTOCOL, Message, decode, encode
from kas_libp2p.dcutr.service import Dcutr, Outcome
from kas_libp2p.errors import ConnectionLost, KasError, PunchFailed, RemoteProtocolError, StreamReset
from kas_libp2p.events import PeerMisbehaved
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.transport._punch import Target
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import memory_pair
from tests.network import RecordingBus

RELAY = Identity.from_seed(bytes([1]) * 32).peer_id
RELAYED = Path(PathKind.RELAYED, RELAY)
ALICE, BOB, CAROL = (Identity.from_seed(bytes([n]) * 32) for n in (2, 3, 4))
ALICE_AT, BOB_AT, CAROL_AT = "/ip4/11.2.0.1/tcp/16117", "/ip4/11.3.0.1/tcp/16117", "/ip4/11.4.0.1/tcp/16117"
DELAY = 0.05
"""Seconds one way through the relay."""
ROUND_TRIP = 2 * DELAY


@dataclass
class Dialed:
    """One call of `punch`.

    Attributes:
        called, began, ended: when; ``ended`` is ``None`` while it goes on.
    """

    peer: PeerId
    targets: tuple[Target, ...]
    initiator: bool
    relay: PeerId
    at: float
    window: float
    called: float
    began: float | None = None
    ended: float | None = None
    met: trio.Event = field(default_factory=trio.Event)

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(str(each.address) for each in self.targets)


class Sky:
    """Where dials meet: two peers that dial each other at the same time are connected.

    Attributes:
        fails: how many attempts of each side fail before one can succeed.
    """

    def __init__(self) -> None:
        self.fails = 0
        self.now: dict[tuple[PeerId, PeerId], Dialed] = {}


class Peer:
    """A node, as far as this room needs one.

    Attributes:
        own, known: what its service is told; `known` by peer.
        identified_after: seconds until identify of the other side is there, which adds `identified` to what is known.
        dialed: every call of `punch`.
        outcomes: of all punches, in order.
        protocols: what it serves.
        handle: how; by its service, unless a test says otherwise.
        welcomes: whether it answers invitations.
        lingers: seconds that a punch that was stopped needs to clean up.
    """

    def __init__(self, nursery: trio.Nursery, identity: Identity, at: str, sky: Sky) -> None:
        self.nursery = nursery
        self.identity = identity
        self.sky = sky
        self.bus = RecordingBus()
        self.own = Own(observed=(at,))
        self.known: dict[PeerId, Known] = {}
        self.identified_after = 0.0
        self.identified: tuple[str, ...] = ()
        self.dialed: list[Dialed] = []
        self.outcomes: list[Outcome] = []
        self.connections: list[Connection] = []
        self.protocols = [PROTOCOL]
        self.lingers = 0.0
        self.welcomes = True
        self.service = self.serving()
        self.handle: Callable[[YamuxStream], Awaitable[None]] = lambda stream: self.service.handle(stream)

    def serving(self, *, allow_private: bool = False) -> Dcutr:
        service = Dcutr(
            self.id,
            self.bus,
            punch=self.punch,
            own=lambda _: self.own,
            known=lambda connection: self.known.get(connection.peer, Known()),
            identified=self._identified,
            welcomes=lambda _: self.welcomes,
            allow_private=allow_private,
        )
        service.on_done.append(self.outcomes.append)
        return service

    @property
    def id(self) -> PeerId:
        return self.identity.peer_id

    async def _identified(self, connection: Connection) -> None:
        await trio.sleep(self.identified_after)
        self.known[connection.peer] = Known(identified=self.identified)

    async def punch(
        self, peer: PeerId, targets: Sequence[Target], *, initiator: bool, relay: PeerId, at: float, window: float
    ) -> Connection:
        dialed = Dialed(peer, tuple(targets), initiator, relay, at, window, trio.current_time())
        assert (self.id, peer) not in self.sky.now, "two punches with one peer at once"
        self.sky.now[self.id, peer] = dialed
        self.dialed.append(dialed)
        try:
            await trio.sleep_until(at)
            dialed.began = trio.current_time()
            other = self.sky.now.get((peer, self.id))
            if other is not None and other.began is not None and len(self.dialed) > self.sky.fails:
                dialed.met.set()
                other.met.set()
            with trio.move_on_after(window):
                await dialed.met.wait()
            if not dialed.met.is_set():
                raise PunchFailed(peer, (), trio.current_time() - at)
            return next(each for each in self.connections if each.peer == peer)  # whatever it is
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.lingers)
            raise
        finally:
            dialed.ended = trio.current_time()
            del self.sky.now[self.id, peer]

    def attach(self, connection: Connection) -> None:
        self.connections.append(connection)

    async def run(self, connection: Connection, *, task_status: trio.TaskStatus[None]) -> None:
        await connection.run(
            lambda stream: self.nursery.start_soon(self._serve, connection, stream), task_status=task_status
        )

    async def _serve(self, connection: Connection, stream: YamuxStream) -> None:
        """As a swarm does."""
        try:
            await connection.accept(stream, self.protocols)
            await self.handle(stream)
            await stream.aclose()
        except RemoteProtocolError as error:
            self.bus.emit(
                PeerMisbehaved(
                    peer=connection.peer, address=connection.remote_address, layer=PROTOCOL, reason=str(error)
                )
            )
            stream.reset()
        except (KasError, trio.BrokenResourceError):
            stream.reset()


async def circuit(
    caller: Peer, called: Peer, *, delay: float = DELAY, path: Path = RELAYED
) -> tuple[Connection, Connection]:
    """A circuit that the first made to the second: their ends of it, which run."""
    raws = memory_pair(delay=delay)
    ends: dict[Peer, Connection] = {}

    async def one(peer: Peer, raw: int, expected: PeerId | None) -> None:
        ends[peer] = await upgrade(
            raws[raw],
            identity=peer.identity,
            initiator=expected is not None,
            expected=expected,
            config=Config(),
            path=path,
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, caller, 0, called.id)
        nursery.start_soon(one, called, 1, None)
    for peer, end in ends.items():
        peer.attach(end)
        await peer.nursery.start(peer.run, end)
    return ends[caller], ends[called]


class World:
    """Alice has called bob through a relay: bob invites, alice is invited.

    Attributes:
        alice, bob: the two.
        to_bob, to_alice: the ends of their circuit.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.sky = Sky()
        self.alice = Peer(nursery, ALICE, ALICE_AT, self.sky)
        self.bob = Peer(nursery, BOB, BOB_AT, self.sky)
        self.to_bob: Connection
        self.to_alice: Connection

    def peer(self, identity: Identity, at: str) -> Peer:
        return Peer(self.nursery, identity, at, self.sky)


@asynccontextmanager
async def world(*, delay: float = DELAY, path: Path = RELAYED) -> AsyncIterator[World]:
    with trio.fail_after(10_000):  # the mock clock jumps from ping to ping for ever
        async with trio.open_nursery() as nursery:
            found = World(nursery)
            found.to_bob, found.to_alice = await circuit(found.alice, found.bob, delay=delay, path=path)
            yield found
            nursery.cancel_scope.cancel()


class Script:
    """A peer that says what a test says, on a stream of DCUtR."""

    def __init__(self, stream: YamuxStream) -> None:
        self.stream = stream

    async def say(self, *messages: Message) -> None:
        await self.stream.send_all(b"".join(map(encode, messages)))

    async def hear(self) -> Message | None:
        """The next message; ``None`` if the stream has ended."""
        try:
            return decode(await receive_frame(self.stream, MAX_MESSAGE))
        except (RemoteProtocolError, ConnectionLost, StreamReset):
            return None


async def inviting(connection: Connection) -> Script:
    """What a peer does as an inviter."""
    return Script(await connection.open_stream(PROTOCOL))


def scripted(peer: Peer, talk: Callable[[Script], Awaitable[None]]) -> None:
    """Have a peer do what a test says on each stream of DCUtR, in place of its service."""
    peer.handle = lambda stream: talk(Script(stream))
