"""Whole nodes whose Kaspa streams live in sessions: paths come and go, and nobody above notices."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from kas_libp2p import Config, Node
from kas_libp2p.config import KIB, MIB, PunchConfig, Purpose, RelayConfig, RelayLimits, Role, SessionConfig
from kas_libp2p.errors import Refused, SessionLost
from kas_libp2p.events import (
    CircuitClosed,
    ConnectionClosed,
    Dialing,
    HandlerFailed,
    InternalError,
    PeerMisbehaved,
    SessionEnded,
    SessionMoved,
    SessionOpened,
    SessionWaiting,
)
from kas_libp2p.metadata import SESSION, Dialect, Direction, OverlayStream, PathKind
from kas_libp2p.node import GONE_WITHIN
from kas_libp2p.session.status import SessionState
from kas_libp2p.session.stream import SessionStream
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw
from tests.network import MemoryHost, MemoryInternet, echo, eventually
from tests.relay.scripted import Told, node_at

DELAY = 0.02
BOB_AT = "/ip4/11.0.0.2/tcp/1"
NO_PUNCH = PunchConfig(enabled=False)


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=DELAY)


async def talk(stream: OverlayStream, what: bytes = b"hello") -> None:
    async with trio.open_nursery() as nursery:  # whoever only writes is stopped: so is who echoes
        nursery.start_soon(stream.send_all, what)
        assert await read(stream, len(what)) == what


async def read(stream: OverlayStream, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = await stream.receive_some(count - len(got))
        assert piece
        got += piece
    return got


def pattern(count: int, seed: int = 0) -> bytes:
    """Bytes in which every place looks different from its neighbours."""
    return b"".join((index + seed << 32).to_bytes(8, "big") for index in range(count // 8))


@dataclass
class Served:
    """What a node's handler has got.

    Attributes:
        streams: every one, the oldest first.
        answer: whether what comes is sent back; else it is left for the test.
        let_go: set to have the handlers return.
    """

    answer: bool = True
    streams: list[OverlayStream] = field(default_factory=list)
    let_go: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, stream: OverlayStream) -> None:
        self.streams.append(stream)
        if self.answer:
            await echo(stream)
        else:
            await self.let_go.wait()

    @property
    def last(self) -> SessionStream:
        return [stream for stream in self.streams if isinstance(stream, SessionStream)][-1]


def private(*relays: Node, session: SessionConfig | None = None) -> Config:
    """The settings of a node that can't be dialed."""
    return Config(
        listen=(),
        role=Role.PRIVATE,
        relay=RelayConfig(relays=tuple(each.addresses[0] for each in relays)),
        punch=NO_PUNCH,
        session=session or SessionConfig(),
    )


def public(number: int, limits: RelayLimits | None = None) -> Config:
    """The settings of a relay."""
    relay = RelayConfig(serve=True, purpose=Purpose.ANY, limits=limits or RelayLimits.open())
    return Config(listen=(f"/ip4/11.0.0.{number}/tcp/1",), role=Role.PUBLIC, relay=relay, punch=NO_PUNCH)


@dataclass
class Village:
    """Alice has a session with bob, which she opened through the relay.

    Attributes:
        stream: hers.
        served: his.
        alice_told, bob_told, relay_told: events.
    """

    internet: MemoryInternet
    relay: Node
    alice: Node
    bob: Node
    served: Served
    stream: SessionStream
    alice_told: Told
    bob_told: Told
    relay_told: Told

    @property
    def his(self) -> SessionStream:
        return self.served.last

    async def direct(self) -> Connection:
        """A direct connection beside, that alice dials; nobody can dial another one."""
        await self.bob.listen(BOB_AT)
        connection = (await self.alice.swarm.dial(self.bob.peer_id, [BOB_AT], fresh=True)).connection
        self.bob.swarm._close_listeners()
        return connection

    def is_on(self, kind: PathKind) -> bool:
        """Whether both sides go by such a path, and by no other."""
        return all(
            each.connection is not None and each.connection.path.kind is kind and len(each.streams) == 1
            for each in (self.stream, self.his)
        )

    def quiet(self) -> None:
        """Nothing has gone wrong that nobody asked for."""
        for told in (self.alice_told, self.bob_told):
            assert not told.of(InternalError)
            assert not told.of(PeerMisbehaved)
            assert not told.of(HandlerFailed)


@asynccontextmanager
async def village(
    internet: MemoryInternet,
    *,
    limits: RelayLimits | None = None,
    session: SessionConfig | None = None,
    answer: bool = True,
) -> AsyncIterator[Village]:
    async with (
        node_at(internet, 1, public(1, limits)) as relay,
        node_at(internet, 2, private(relay, session=session)) as bob,
        node_at(internet, 3, private(relay, session=session)) as alice,
    ):
        told = [Told(alice), Told(bob), Told(relay)]
        served = Served(answer)
        await bob.serve(served)
        await eventually(lambda: bool(bob.addresses and alice.addresses))
        stream = await alice.connect(bob.addresses[0])
        assert isinstance(stream, SessionStream)
        await stream.send_all(b"hello")
        await eventually(lambda: bool(served.streams))
        assert await read(stream if answer else served.last, 5) == b"hello"
        place = Village(internet, relay, alice, bob, served, stream, *told)
        yield place
        place.quiet()


def hang(*pipes: MemoryRaw) -> None:
    """Nothing that is sent arrives any more, and nobody hears why."""
    for pipe in pipes:
        for wire in (pipe._in, pipe._out):
            wire.delay = math.inf


def pipes_between(internet: MemoryInternet, *numbers: int) -> list[MemoryRaw]:
    """Both ends of every connection between two hosts."""
    ips = {f"11.0.0.{number}" for number in numbers}
    return [
        end
        for pair in internet.pipes
        for end in pair
        if {address.split("/")[2] for address in (end.local_address, end.remote_address)} == ips
    ]


# -- With whom ---------------------------------------------------------------------------------------------------------


async def test_between_two_of_ours_the_kaspa_stream_is_a_session(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob, node_at(internet, 3) as alice:
        told = Told(alice), Told(bob)
        served = Served()
        await bob.serve(served)
        stream = await alice.connect(bob.addresses[0])
        assert isinstance(stream, SessionStream)
        assert stream.watches_paths
        await talk(stream, pattern(3 * MIB))
        for each, by_us in ((stream, True), (served.last, False)):
            metadata = each.metadata
            assert metadata.dialect is Dialect.MESSAGES
            assert metadata.direction is (Direction.OUTBOUND if by_us else Direction.INBOUND)
            assert metadata.path.kind is PathKind.DIRECT
            status = each.status()
            assert (status.state, status.by_us, status.moves, status.gaps) == (SessionState.ATTACHED, by_us, 0, 0)
        (ours,) = alice.status().sessions
        assert ours.id == bob.status().sessions[0].id
        await stream.aclose()
        await eventually(lambda: not alice.status().sessions and not bob.status().sessions)
        for each in told:
            (opened,), (ended,) = each.of(SessionOpened), each.of(SessionEnded)
            assert opened.session == ended.session == ours.id
            assert ended.code == "ended"
        assert SESSION not in alice.swarm.protocols(), "she serves nothing, and has none any more"


@pytest.mark.parametrize("without", ["alice", "bob"])
@pytest.mark.parametrize("bob_dials", [False, True])
async def test_a_peer_without_sessions_has_a_plain_stream(
    without: str, bob_dials: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    plain, usual = SessionConfig(enabled=False), SessionConfig()
    configs = {
        name: Config(listen=(f"/ip4/11.0.0.{number}/tcp/1",), session=plain if name == without else usual)
        for name, number in (("alice", 3), ("bob", 2))
    }
    async with node_at(internet, 2, configs["bob"]) as bob, node_at(internet, 3, configs["alice"]) as alice:
        await bob.serve(echo)
        if bob_dials:
            await bob.ping(alice.addresses[0])
            await alice.identify(bob.peer_id)
        stream = await alice.connect(bob.peer_id, addresses=bob.addresses)
        assert isinstance(stream, YamuxStream)
        assert stream.metadata.dialect is Dialect.MESSAGES
        assert not stream.watches_paths
        await talk(stream)
        assert len(alice.connections) == 1


async def test_the_responder_of_a_connection_opens_a_session_too(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob, node_at(internet, 3) as alice:
        await alice.serve(echo)
        await alice.ping(bob.addresses[0])
        stream = await bob.connect(alice.peer_id)
        assert isinstance(stream, SessionStream)
        await talk(stream)
        assert not stream.metadata.initiator


async def test_sessions_are_told_of_while_kaspa_streams_are_served(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        assert SESSION in v.bob._told_protocols()
        assert SESSION not in v.alice._told_protocols(), "nobody is to open one with her"
        v.bob.withdraw()
        assert SESSION not in v.bob._told_protocols()
        connection = await v.direct()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        await talk(v.stream, b"it moves all the same")
        surplus = await connection.open_stream(SESSION)
        session = v.alice.sessions.open(surplus)
        with pytest.raises(SessionLost, match="no Kaspa stream is served here") as refused:
            await session.receive_some()
        assert refused.value.code == "refused"
        await talk(v.stream, b"and is not touched")
        await v.stream.aclose()
        await eventually(lambda: SESSION not in v.bob.swarm.protocols())


async def test_a_second_stream_is_refused_while_a_session_lives(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        for node, peer in ((v.alice, v.bob), (v.bob, v.alice)):
            with pytest.raises(Refused, match="there is a Kaspa stream with"):
                await node.connect(peer.peer_id)
            with pytest.raises(Refused):
                await node.connect_past_relay(peer.peer_id)
        for connection in v.alice.swarm.connections_to(v.bob.peer_id):
            connection.connection.abort()
        await eventually(lambda: v.stream.connection is None)
        with pytest.raises(Refused, match="there is a Kaspa stream with"):
            await v.alice.connect(v.bob.peer_id)
        await talk(v.stream)


async def test_one_session_per_connection_but_any_may_move_there(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        connection = v.stream.connection
        assert connection is not None
        surplus = v.alice.sessions.open(await connection.open_stream(SESSION))
        with pytest.raises(SessionLost, match="this connection has a Kaspa stream already") as refused:
            await surplus.receive_some()
        assert refused.value.code == "busy"
        assert v.bob.status().limit_hits["one_kaspa_stream"] == 1
        assert v.bob.status().events["session-refused/busy"] == 1
        direct = await v.direct()
        plain = await direct.open_stream(Dialect.MESSAGES)
        await talk(plain, b"the connection has a Kaspa stream")
        await v.alice.sessions._attach(v.stream, direct, "for the test")
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        await talk(v.stream)
        await talk(plain, b"and keeps it")


# -- Moves -------------------------------------------------------------------------------------------------------------


async def test_relayed_direct_relayed_while_bytes_flow(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet) as v:
        sent = pattern(40 * MIB)
        got: list[bytes] = []

        async def write() -> None:
            for start in range(0, len(sent), 10_000):
                await v.stream.send_all(sent[start : start + 10_000])
                await trio.sleep(0.005)
            await v.stream.send_eof()

        async def collect() -> None:
            while data := await v.stream.receive_some():
                got.append(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(collect)
            for _ in range(2):
                direct = await v.direct()
                await eventually(lambda: v.is_on(PathKind.DIRECT))
                direct.abort("cut by the test")
                await eventually(lambda: v.is_on(PathKind.RELAYED))
        assert b"".join(got) == sent
        moves = v.alice_told.of(SessionMoved)
        assert [(each.previous.kind, each.path.kind) for each in moves] == [
            (PathKind.RELAYED, PathKind.DIRECT),
            (PathKind.DIRECT, PathKind.RELAYED),
        ] * 2
        assert moves[0].by_us
        assert moves[0].reason == "the direct path has proven itself"
        assert (moves[0].resent, moves[0].seconds_without) == (0, 0)
        assert moves[1].seconds_without < 0.5
        assert [each.by_us for each in v.bob_told.of(SessionMoved)] == [not each.by_us for each in moves]
        assert v.stream.gaps == v.his.gaps == 2
        await eventually(lambda: not v.alice.status().sessions and not v.bob.status().sessions)


async def test_an_old_path_is_over_soon(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet) as v:
        await trio.sleep(10)
        circuit = v.stream.connection
        assert circuit is not None
        await v.direct()
        await eventually(lambda: v.stream.connection is not circuit)
        moved = trio.current_time()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        assert trio.current_time() - moved < 10 * DELAY
        await eventually(lambda: circuit.close_reason is not None)
        assert circuit.close_reason == "a direct connection has taken its place"
        await talk(v.stream)


async def test_moves_that_cross_end_on_the_same_path(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet) as v:
        one, two = await v.direct(), await v.direct()
        await eventually(lambda: len(v.bob.swarm.connections_to(v.alice.peer_id)) == 3)
        his = {each.connection.remote_address: each.connection for each in v.bob.swarm.connections_to(v.alice.peer_id)}
        for there, here in ((one, two), (two, one)) * 3:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(v.alice.sessions._attach, v.stream, there, "first")
                nursery.start_soon(v.bob.sessions._attach, v.his, his[here.local_address], "second")
            await talk(v.stream, pattern(100_000))
            await eventually(lambda: len(v.stream.streams) == len(v.his.streams) == 1)
            assert v.stream.connection in (one, two)
            assert v.his.connection is not None
            assert v.stream.connection is not None
            assert v.stream.connection.local_address == v.his.connection.remote_address
        assert v.stream.gaps == 0


async def test_half_closed_it_moves(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet, answer=False) as v:
        await v.stream.send_eof()
        assert await v.his.receive_some() == b""
        await v.his.send_all(b"one way ")
        direct = await v.direct()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        await v.his.send_all(b"still open ")
        direct.abort()
        await eventually(lambda: v.is_on(PathKind.RELAYED))
        await v.his.send_all(b"to the end")
        v.served.let_go.set()
        assert await read(v.stream, 29) == b"one way still open to the end"
        assert await v.stream.receive_some() == b""
        await eventually(lambda: not v.alice.status().sessions and not v.bob.status().sessions)


async def test_a_move_whose_new_path_dies_at_once_goes_on_by_the_old_one(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        direct = await v.direct()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, v.stream, pattern(MIB))
            await v.alice.sessions._attach(v.stream, direct, "for the test")
            direct.abort()
        await talk(v.stream)
        await eventually(lambda: v.is_on(PathKind.RELAYED))
        assert v.stream.gaps == 0


# -- Losing paths ------------------------------------------------------------------------------------------------------


async def test_the_only_path_is_lost_and_another_is_found(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet) as v:
        sent = pattern(5 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, v.stream, sent)
            await trio.sleep(0.3)
            for connection in v.alice.swarm.connections_to(v.bob.peer_id):
                connection.connection.abort("cut by the test")
            await eventually(lambda: v.stream.status().state is SessionState.WAITING)
            assert v.alice_told.of(SessionWaiting)[0].path.kind is PathKind.RELAYED
            assert v.stream.metadata.path.kind is PathKind.RELAYED, "the last one"
        (moved,) = v.alice_told.of(SessionMoved)
        assert moved.seconds_without < 20 * DELAY
        assert moved.reason == "the path was lost"
        assert (v.stream.gaps, v.his.gaps) == (1, 1)


async def test_it_waits_until_the_peer_can_be_reached_again(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        kept = dict(internet.listeners)
        internet.listeners.clear()
        hang(*(end for pair in internet.pipes for end in pair))
        written = trio.current_time()
        await v.stream.send_all(b"is anybody there?")
        await eventually(lambda: v.stream.status().state is SessionState.WAITING)
        assert trio.current_time() - written < 5
        await trio.sleep(20)
        status = v.stream.status()
        assert status.waiting == pytest.approx(20, abs=0.1)
        assert status.reason
        internet.listeners.update(kept)
        back = trio.current_time()
        assert await read(v.stream, 17) == b"is anybody there?"
        assert trio.current_time() - back < 5  # the relay is asked for a place again, too
        assert v.stream.status().waiting == 0


async def test_without_a_path_for_too_long_it_ends_and_says_so(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet, session=SessionConfig(patience=5.0)) as v:
        internet.listeners.clear()
        hang(*(end for pair in internet.pipes for end in pair))
        await v.stream.send_all(b"is anybody there?")
        with pytest.raises(SessionLost, match="no path for 5 s") as lost:
            await v.stream.receive_some()
        assert (lost.value.code, lost.value.by_peer) == ("lost", False)
        with pytest.raises(SessionLost):
            await v.stream.send_all(b"more")
        (ended,) = v.alice_told.of(SessionEnded)
        assert ended.code == "lost"
        assert not v.alice.status().sessions
        await eventually(lambda: not v.bob.status().sessions)
        assert v.bob_told.of(SessionEnded)[0].code == "lost"


async def test_a_path_that_hangs_is_left_and_its_connection_aborted(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        direct = await v.direct()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        hang(*pipes_between(internet, 2, 3))
        hung = trio.current_time()
        await talk(v.stream)
        assert trio.current_time() - hung < 6
        assert v.is_on(PathKind.RELAYED)
        assert direct.close_reason is not None
        assert "nothing came from the peer" in direct.close_reason
        assert direct.broke
        assert v.stream.metadata.path.relay == v.relay.peer_id


@pytest.mark.parametrize("reached", [False, True])
async def test_a_machine_that_moves_to_another_network_knows_at_once_what_is_dead(
    reached: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        host = v.alice.swarm.network
        assert isinstance(host, MemoryHost)
        await v.alice.listen("/ip4/11.0.0.3/tcp/1")
        await v.direct()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        (with_relay,) = v.alice.swarm.connections_to(v.relay.peer_id)
        old = pipes_between(internet, 1, 3) + pipes_between(internet, 2, 3)
        if not reached:
            hang(*old)
            await trio.sleep(2 * DELAY)  # of what is under way
        host.move("11.0.0.33")
        moved = trio.current_time()
        await talk(v.stream)
        if reached:  # it had the address back before anybody missed it
            assert trio.current_time() - moved < 10 * DELAY
            await trio.sleep(10)
            assert v.is_on(PathKind.DIRECT)
            return
        assert GONE_WITHIN < trio.current_time() - moved < GONE_WITHIN + 0.5
        assert v.is_on(PathKind.RELAYED)
        gone = "it did not answer within 1 s, after this machine had lost its address 11.0.0.3"
        assert with_relay.connection.close_reason == gone


class Deaf:
    """A tap that takes nothing."""

    def changed(self) -> None:
        pass

    def drained(self) -> None:
        pass


async def test_a_path_that_hangs_on_a_connection_that_lives_is_left_alone(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """Something at the other side takes no stream of ours, and answers pings: nobody else's streams are to suffer."""
    async with village(internet) as v:
        direct = await v.direct()
        await eventually(lambda: v.is_on(PathKind.DIRECT))
        v.his.stream.tap(Deaf())
        await v.bob.serve(echo, "/echo/1")
        other = await direct.open_stream("/echo/1")
        async with trio.open_nursery() as nursery:

            async def chat() -> None:
                for _ in range(30):
                    await talk(other)
                    await trio.sleep(0.3)

            nursery.start_soon(chat)
            await talk(v.stream)
        assert direct.close_reason is None
        assert v.stream.metadata.path.kind is PathKind.RELAYED


async def test_many_that_need_a_relay_ask_it_once(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    """More pings than a handful are a flood, for which the relay would end the connection of all."""
    async with village(internet) as v:
        relay = v.alice.swarm.connection_to(v.relay.peer_id)
        assert relay is not None
        for _ in range(200):
            await v.alice._reach_again(v.bob.peer_id, False)
        await trio.sleep(1)
        assert relay.connection.close_reason is None
        await talk(v.stream)


@pytest.mark.parametrize("opener", [True, False])
async def test_whoever_can_dial_finds_the_path(
    opener: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """One side can be dialed and the other one can't; it does not matter which of them opened the session."""
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob, node_at(internet, 3) as alice:
        for node in (alice, bob):
            await node.serve(echo)
        await alice.ping(bob.addresses[0])
        stream = await (alice if opener else bob).connect((bob if opener else alice).peer_id)
        assert isinstance(stream, SessionStream)
        await talk(stream)
        for connection in bob.connections:
            connection.connection.abort()
        lost = trio.current_time()
        await talk(stream)
        assert stream.gaps == 1
        assert trio.current_time() - lost < 1.5


@pytest.mark.parametrize("invited", [False, True])
async def test_whoever_comes_by_itself_sends_us_to_nobody_else(
    invited: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """It tells of addresses, opens a session, and cuts it: these may be somebody else's, or in our own network."""
    relay = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    elsewhere = [
        "/ip4/11.0.0.77/tcp/8080",
        "/ip4/192.168.1.1/tcp/5000",
        f"/ip4/127.0.0.1/tcp/16110/p2p/{relay}/p2p-circuit",
        f"/ip4/11.0.0.77/tcp/22/p2p/{relay}/p2p-circuit",
    ]
    there = ["/ip4/11.0.0.3/tcp/1", f"/ip4/11.0.0.9/tcp/4001/p2p/{relay}/p2p-circuit"]
    config = Config(listen=("/ip4/11.0.0.3/tcp/1",), role=Role.PUBLIC, punch=NO_PUNCH)
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob:
        told, served = Told(bob), Served()
        await bob.serve(served)
        async with node_at(internet, 3, config) as alice:
            await alice.serve(served)
            await alice.ping(bob.addresses[0])
            stream = await (bob if invited else alice).connect((alice if invited else bob).peer_id)
            assert isinstance(stream, SessionStream)
            await talk(stream)
            bob._remember(bob.connections[0].connection, [*elsewhere, *there])  # as identify does
            internet.listeners.clear()
            hang(*(end for pair in internet.pipes for end in pair))
            for connection in bob.connections:
                connection.connection.abort()
            await trio.sleep(10)
        dialed = {address for each in told.of(Dialing) if each.target == alice.peer_id for address in each.addresses}
        tried = {each.removesuffix(f"/p2p/{alice.peer_id}") for each in dialed}
        assert tried == {*there, *(elsewhere if invited else ())}


# -- Circuits that end -------------------------------------------------------------------------------------------------


async def test_a_circuit_that_ends_is_left_before(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    limits = replace(RelayLimits.open(), max_circuit_seconds=120.0)
    async with village(internet, limits=limits) as v:
        for _ in range(100):
            await talk(v.stream, b"a block")
            await trio.sleep(6)
        assert v.stream.gaps == 0
        assert 4 <= v.stream.machine.moves <= 12
        assert not v.alice_told.of(SessionWaiting)
        assert "max_circuit_seconds" not in {each.reason for each in v.relay_told.of(CircuitClosed)}


async def test_the_bytes_of_a_circuit_are_never_used_up(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    limits = replace(RelayLimits.open(), max_circuit_bytes=128 * KIB)
    async with village(internet, limits=limits) as v:
        await talk(v.stream, pattern(300 * KIB))
        assert v.stream.machine.moves >= 3
        assert "max_circuit_bytes" not in {each.reason for each in v.relay_told.of(CircuitClosed)}


# -- The end -----------------------------------------------------------------------------------------------------------


async def test_closed_with_bytes_under_way_they_arrive(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet, answer=False) as v:
        sent = pattern(5 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(v.stream.send_all, sent)
            got = await read(v.his, 3 * MIB)  # the window opens as it is read
        assert v.stream.status().in_flight
        await v.stream.aclose()
        assert v.alice.status().sessions[0].state is SessionState.CLOSING
        assert got + await read(v.his, len(sent) - len(got)) == sent
        assert await v.his.receive_some() == b""
        v.served.let_go.set()
        await eventually(lambda: not v.alice.status().sessions and not v.bob.status().sessions)
        assert [each.of(SessionEnded)[0].code for each in (v.alice_told, v.bob_told)] == ["ended", "ended"]


async def test_a_session_that_was_closed_dials_nobody(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with village(internet, answer=False) as v:
        await v.stream.aclose()
        for connection in v.alice.swarm.connections_to(v.bob.peer_id):
            connection.connection.abort()
        dialed = len(v.alice_told.of(Dialing))
        await trio.sleep(20)
        assert len(v.alice_told.of(Dialing)) == dialed
        assert not v.alice.status().sessions


@pytest.mark.parametrize("who", ["alice", "bob"])
async def test_a_node_that_stops_ends_its_sessions_at_the_other_side(
    who: str, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    configs = {"alice": Config(listen=()), "bob": Config(listen=(BOB_AT,))}
    stays, goes = (2, 3) if who == "alice" else (3, 2)
    name = {2: "bob", 3: "alice"}
    async with node_at(internet, stays, configs[name[stays]]) as staying:
        told = Told(staying)
        served = Served()
        async with node_at(internet, goes, configs[name[goes]]) as going:
            bob, alice = (going, staying) if who == "bob" else (staying, going)
            await bob.serve(served)
            stream = await alice.connect(bob.addresses[0])
            await talk(stream)
            await stream.send_all(pattern(MIB))
            left = trio.current_time()
        await eventually(lambda: bool(told.of(SessionEnded)))
        assert trio.current_time() - left < 2
        (ended,) = told.of(SessionEnded)
        assert (ended.code, ended.by_peer) == ("stopped", True)
        with pytest.raises(SessionLost) as lost:
            await (stream if who == "bob" else served.last).receive_some()
        assert lost.value.code == "stopped"
        assert not staying.status().sessions
        assert not told.of(SessionWaiting)


@pytest.mark.parametrize("opened_by_it", [True, False])
async def test_a_node_that_was_killed_and_starts_anew(
    opened_by_it: bool, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """Nobody was told, and no state is on its disk: two seconds after it is back, the old session is over here."""
    async with node_at(internet, 3, Config(listen=("/ip4/11.0.0.3/tcp/1",))) as alice:
        told = Told(alice)
        await alice.serve(echo)
        async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob:
            await bob.serve(echo)
            one, other = (bob, alice) if opened_by_it else (alice, bob)
            stream = await one.connect(other.addresses[0])
            await talk(stream)
            hang(*pipes_between(internet, 2, 3))
        assert not told.of(SessionEnded)
        (session,) = alice.sessions
        await session.send_all(b"is anybody there?")
        await eventually(lambda: bool(told.of(SessionWaiting)))
        await trio.sleep(3)
        async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob:
            await bob.serve(echo)
            back = trio.current_time()
            await eventually(lambda: bool(told.of(SessionEnded)))
            assert trio.current_time() - back < 2
            assert told.of(SessionEnded)[0].code in ("unknown", "restarted")
            stream = await alice.connect(bob.peer_id)
            await talk(stream)


async def test_whoever_is_disconnected_or_banned_is_not_dialed_again(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        await v.alice.disconnect(v.bob.peer_id, "for the test")
        with pytest.raises(SessionLost):
            await v.stream.receive_some()
        await eventually(lambda: bool(v.bob_told.of(SessionEnded)))
        assert v.bob_told.of(SessionEnded)[0].reason == "for the test"
        await trio.sleep(10)
        assert not v.alice.swarm.connections_to(v.bob.peer_id)
        again = await v.alice.connect(v.bob.addresses[0])
        await talk(again)
        v.alice.ban(v.bob.peer_id, 100)
        with pytest.raises(SessionLost, match="banned"):
            await again.receive_some()
        assert not v.alice.status().sessions


@pytest.mark.parametrize("where", ["send_all", "receive_some", "connect", "waiting", "handler"])
async def test_cancelled_anywhere_it_ends_in_order(
    where: str, internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet, answer=False) as v:
        with trio.move_on_after(1) as scope:
            match where:
                case "send_all":
                    await v.stream.send_all(bytes(20 * MIB))
                case "receive_some":
                    await v.stream.receive_some()
                case "connect":
                    await v.alice.disconnect(v.bob.peer_id)
                    hang(*pipes_between(internet, 1, 3))
                    await v.alice.connect(v.bob.addresses[0])
                case "waiting":
                    internet.listeners.clear()
                    hang(*(end for pair in internet.pipes for end in pair))
                    await v.stream.send_all(b"is anybody there?")
                    await trio.sleep_forever()
                case "handler":
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        if where in ("send_all", "receive_some"):
            await v.his.send_all(b"still there")
            assert await read(v.stream, 11) == b"still there"
        if where == "waiting":
            await trio.sleep(5)
            assert v.stream.status().state is SessionState.WAITING
        # and the nodes end with whatever is under way


async def test_a_mistake_of_ours_ends_one_session_and_nothing_else(
    internet: MemoryInternet, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node_at(internet, 2, Config(listen=(BOB_AT,))) as bob, node_at(internet, 3) as alice:
        told = Told(bob)
        served = Served()
        await bob.serve(served)
        stream = await alice.connect(bob.addresses[0])
        await talk(stream)

        def broken(*_: object) -> None:
            raise RuntimeError("a mistake")

        machine = type(served.last.machine)
        mine = served.last.machine
        right = machine.receive
        monkeypatch.setattr(machine, "receive", lambda self, *rest: broken() if self is mine else right(self, *rest))
        await stream.send_all(b"hello")
        await eventually(lambda: bool(told.of(InternalError)))
        assert told.of(InternalError)[0].reason == "RuntimeError: a mistake"
        with pytest.raises(SessionLost, match="an internal error"):
            await served.last.receive_some()
        assert not bob.status().sessions
        assert await alice.ping(bob.peer_id) < 1
        assert not told.of(ConnectionClosed)
        with pytest.raises(SessionLost):
            await stream.receive_some()
        await talk(await alice.connect(bob.peer_id))


async def test_a_ban_ends_a_session_that_has_no_path_just_then(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with village(internet) as v:
        internet.listeners.clear()
        for pair in internet.pipes:
            for end in pair:
                end.abort()
        await eventually(lambda: v.stream.status().state is SessionState.WAITING)
        v.alice.ban(v.bob.peer_id, 100)
        banned = trio.current_time()
        with pytest.raises(SessionLost, match="banned"):
            await v.stream.receive_some()
        assert trio.current_time() == banned


async def test_a_connection_from_where_nobody_listens_is_not_asked_when_the_network_changes(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    """It has lost nothing. And it may be a slow one, to which a second is too little."""
    async with (
        node_at(internet, 2, Config(listen=(BOB_AT,))) as bob,
        node_at(internet, 3, Config(listen=("/ip4/11.0.0.3/tcp/1",))) as alice,
    ):
        await alice.swarm.dial(bob.peer_id, [BOB_AT])
        (connection,) = alice.connections
        connection.connection.local_address = "/ip4/192.0.2.1/tcp/50000"
        host = alice.swarm.network
        assert isinstance(host, MemoryHost)
        host.extra.append("/ip4/11.0.0.33/tcp/1")
        host.changed.set()
        await trio.lowlevel.checkpoint()
        assert "/ip4/11.0.0.33/tcp/1" in alice.swarm.listen_addresses(), "it has looked"
        assert not alice._checking
