"""What a hostile peer tries with AutoNAT (group 8 of what a hostile network will try) and observed addresses (group 9).

Each attack has its outcome and its count. A witness who is tested at the same time gets the verdict in the time that it
takes without the attack.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from kas_libp2p import addresses as addr
from kas_libp2p.autonat._client import MAX_PAID, Outcome, Verdict
from kas_libp2p.autonat._messages import (
    DIAL_BACK,
    DIAL_REQUEST,
    MAX_MESSAGE,
    MAX_PIECE,
    STRANGER,
    STRANGER_DIAL,
    V1,
    DialData,
    DialDataRequest,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    V1Dial,
    V1Response,
    V1Status,
    decode,
    decode_v1,
    encode,
    encode_dial_back,
    encode_dial_back_response,
    encode_v1,
)
from kas_libp2p.autonat._roles import Kind
from kas_libp2p.autonat.client import DIAL_BACK_TIMEOUT, TIMEOUT
from kas_libp2p.autonat.server import ASK_TIMEOUT, DATA_TIMEOUT
from kas_libp2p.config import Role
from kas_libp2p.errors import StreamReset
from kas_libp2p.events import DialBackServed, HandlerFailed, InternalError, ObservationRefused, PeerMisbehaved
from kas_libp2p.metadata import Path, PathKind
from kas_libp2p.swarm import SwarmConnection
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.autonat.world import PORT, Peer, World, world
from tests.memory import MemoryRaw, memory_pair

ALICE = "11.9.0.1"
HOME = f"/ip4/{ALICE}/tcp/{PORT}"
OTHER = f"/ip4/11.200.0.1/tcp/{PORT}"
Wicked = Callable[[YamuxStream], Awaitable[None]]


class Scene:
    """A good server, a witness who uses it, and alice, who is public.

    Attributes:
        mallory: on good terms with everybody, so far.
    """

    def __init__(self, here: World, server: Peer, witness: Peer, alice: Peer, mallory: Peer) -> None:
        self.here = here
        self.server = server
        self.witness = witness
        self.alice = alice
        self.mallory = mallory

    async def test(
        self, by: Peer, address: str = HOME, kind: Kind = Kind.V2, *, asker: Peer | None = None
    ) -> tuple[Outcome, float]:
        asker = asker or self.alice
        connection = await asker.dial(by)
        started = trio.current_time()
        outcome = await asker.reachability._client.test(connection.connection, address, kind)
        return outcome, trio.current_time() - started

    async def usual(self) -> float:
        """The witness has itself tested, and that takes how long."""
        address = f"/ip4/{self.witness.host.ip}/tcp/{PORT}"
        outcome, seconds = await self.test(self.server, address, asker=self.witness)
        assert outcome.verdict is Verdict.REACHABLE
        return seconds

    def good(self) -> None:
        """Nothing of ours broke."""
        for peer in self.here.peers:
            assert not peer.bus.of(InternalError)
            assert not peer.bus.of(HandlerFailed)


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with world() as here:
        server, witness, alice, mallory = [
            await here.peer(ip, quiet=True, serve=ip == "11.1.0.1")
            for ip in ("11.1.0.1", "11.2.0.1", ALICE, "11.66.0.1")
        ]
        found = Scene(here, server, witness, alice, mallory)
        for peer in (witness, alice, mallory):
            await peer.dial(server)
        await alice.dial(mallory)
        yield found
        found.good()


async def gather(scene: Scene, attack: Callable[[], Awaitable[None]]) -> None:
    """Let the attack and the witness meet."""
    usual = await scene.usual()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attack)
        assert await scene.usual() == pytest.approx(usual, abs=1e-6)


# Servers that are not what they say


async def request_of(stream: YamuxStream) -> DialRequest:
    request = decode(await receive_frame(stream, MAX_MESSAGE))
    assert isinstance(request, DialRequest)
    return request


def saying(*said: bytes) -> Wicked:
    """A server that says this to whatever it is asked."""

    async def handle(stream: YamuxStream) -> None:
        await receive_frame(stream, MAX_MESSAGE)
        for each in said:
            await stream.send_all(each)

    return handle


def ok(index: int = 0, dial: DialStatus = DialStatus.OK) -> bytes:
    return encode(DialResponse(ResponseStatus.OK, index, dial))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((ok(),), "never came"),
        ((ok(index=1),), "address 1 of one"),
        ((ok(index=2**32 - 1, dial=DialStatus.E_DIAL_ERROR),), "of one"),
        ((encode(DialDataRequest(5, 40_000)),), "address 5 of one"),
        ((encode(DialDataRequest(0, MAX_PAID + 1)),), "at most"),
        ((encode(DialDataRequest(0, 2**64 - 1)),), "at most"),
        ((encode(DialDataRequest(0, 30_000)), encode(DialDataRequest(0, 30_000))), "twice"),
        ((encode(DialData(b"x" * 200)),), "only an asker"),
        ((encode(DialRequest((), 1)),), "only an asker"),
        ((b"\x05abcde",), "no protobuf"),
        ((b"\x00",), "holds nothing"),
        ((b"\x81" * 10,), "varint"),
        ((b"\xff" * 8 + b"\x7f",), "at most 8192"),
        ((b"\x81\x40",), "at most 8192"),
        ((ok()[:-1],), "before a whole message"),
        ((), "before a whole message"),
    ],
)
@pytest.mark.parametrize("kind", [Kind.V2, Kind.STRANGER])
async def test_a_server_that_lies_or_breaks_the_rules(
    said: tuple[bytes, ...], why: str, kind: Kind, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        protocol = DIAL_REQUEST if kind is Kind.V2 else STRANGER
        here.mallory.swarm.handle(protocol, saying(*said))

        async def attack() -> None:
            outcome, _ = await here.test(here.mallory, kind=kind)
            assert (outcome.verdict, outcome.proof) == (Verdict.REFUSED, None)
            assert why in outcome.reason

        await gather(here, attack)
        [event] = here.alice.bus.of(PeerMisbehaved)
        assert (event.peer, event.layer) == (here.mallory.swarm.peer, protocol)
        assert why in event.reason


@pytest.mark.parametrize("kind", [Kind.V1, Kind.V2, Kind.STRANGER])
async def test_a_server_that_is_silent(kind: Kind, autojump_clock: trio.abc.Clock) -> None:
    async def forever(stream: YamuxStream) -> None:
        await trio.sleep_forever()

    async with scene() as here:
        protocol = {Kind.V1: V1, Kind.V2: DIAL_REQUEST, Kind.STRANGER: STRANGER}[kind]
        here.mallory.swarm.handle(protocol, forever)

        async def attack() -> None:
            outcome, seconds = await here.test(here.mallory, kind=kind)
            assert (outcome.verdict, seconds) == (Verdict.REFUSED, pytest.approx(TIMEOUT))

        await gather(here, attack)


@pytest.mark.parametrize(
    ("answer", "verdict", "lie"),
    [
        (V1Response(V1Status.OK), Verdict.REFUSED, True),
        (V1Response(V1Status.E_DIAL_ERROR), Verdict.UNREACHABLE, False),
        (V1Response(V1Status.E_DIAL_REFUSED), Verdict.REFUSED, False),
        (V1Response(V1Status.E_BAD_REQUEST), Verdict.REFUSED, False),
        (V1Response(V1Status.E_INTERNAL_ERROR), Verdict.REFUSED, False),
    ],
)
async def test_what_a_v1_server_says(
    answer: V1Response, verdict: Verdict, lie: bool, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        here.mallory.swarm.handle(V1, saying(encode_v1(answer)))
        outcome, _ = await here.test(here.mallory, kind=Kind.V1)
        assert (outcome.verdict, outcome.lie) == (verdict, lie)
        assert len(here.alice.bus.of(PeerMisbehaved)) == lie


async def bring(here: Scene, nonce: int, *, over: Connection | None = None) -> None:
    """Bring a number to alice, on a fresh connection or another one."""
    connection = over
    if connection is None:
        fresh = await here.mallory.swarm.dial(here.alice.swarm.peer, [HOME], fresh=True)
        connection = fresh.connection
    stream = await connection.open_stream(DIAL_BACK)
    await stream.send_all(encode_dial_back(nonce))
    await receive_frame(stream, 1024)


async def test_a_wrong_number_proves_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def handle(stream: YamuxStream) -> None:
            request = await request_of(stream)
            with pytest.raises(StreamReset):
                await bring(here, request.nonce ^ 1)
            await stream.send_all(ok())

        here.mallory.swarm.handle(DIAL_REQUEST, handle)

        async def attack() -> None:
            outcome, _ = await here.test(here.mallory)
            assert (outcome.verdict, outcome.lie) == (Verdict.REFUSED, True)

        await gather(here, attack)
        assert {(each.layer, each.reason) for each in here.alice.bus.of(PeerMisbehaved)} == {
            (DIAL_BACK, "a dial-back that nobody waits for"),
            (DIAL_REQUEST, "it claims a dial-back that never came"),
        }


async def test_the_number_on_a_connection_that_was_there_before_proves_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def handle(stream: YamuxStream) -> None:
            request = await request_of(stream)
            with pytest.raises(StreamReset):
                await bring(here, request.nonce, over=stream.connection)
            await stream.send_all(ok())

        here.mallory.swarm.handle(DIAL_REQUEST, handle)
        outcome, _ = await here.test(here.mallory)
        assert (outcome.verdict, outcome.lie) == (Verdict.REFUSED, True)
        assert "proves nothing" in here.alice.bus.of(PeerMisbehaved)[0].reason


@pytest.mark.parametrize("victim", ["/ip4/11.77.0.1/tcp/443", "/ip6/2d00:77::1/tcp/443"])
async def test_the_number_at_another_address_proves_nothing(victim: str, autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def handle(stream: YamuxStream) -> None:
            request = await request_of(stream)
            with pytest.raises(StreamReset):
                await bring(here, request.nonce)  # to where alice is, not to what was asked for
            await stream.send_all(ok())

        here.mallory.swarm.handle(DIAL_REQUEST, handle)
        outcome, _ = await here.test(here.mallory, victim)
        assert (outcome.verdict, outcome.lie) == (Verdict.REFUSED, True)


async def test_the_number_is_proof_enough_whatever_the_server_says(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def handle(stream: YamuxStream) -> None:
            request = await request_of(stream)
            await bring(here, request.nonce)
            await stream.send_all(ok(dial=DialStatus.E_DIAL_ERROR))

        here.mallory.swarm.handle(DIAL_REQUEST, handle)
        outcome, _ = await here.test(here.mallory)
        assert outcome.verdict is Verdict.REACHABLE


async def test_a_dial_back_that_nobody_asked_for(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def attack() -> None:
            for _ in range(20):
                with pytest.raises(StreamReset):
                    await bring(here, 7)

        await gather(here, attack)
        assert len(here.alice.bus.of(PeerMisbehaved)) == 20
        assert here.alice.reachability.role is Role.PRIVATE


async def test_a_dial_back_that_says_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def attack() -> None:
            fresh = await here.mallory.swarm.dial(here.alice.swarm.peer, [HOME], fresh=True)
            stream = await fresh.connection.open_stream(DIAL_BACK)
            await stream.send_all(b"\x09")
            started = trio.current_time()
            with pytest.raises(StreamReset):
                await stream.receive_some()
            assert trio.current_time() - started <= DIAL_BACK_TIMEOUT + 1

        await gather(here, attack)
        assert "said nothing" in here.alice.bus.of(PeerMisbehaved)[0].reason


async def test_dial_data_has_a_budget(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:
        paid = 0

        async def handle(stream: YamuxStream) -> None:
            nonlocal paid
            await request_of(stream)
            await stream.send_all(encode(DialDataRequest(0, MAX_PAID)))
            while data := await stream.receive_some():
                paid += len(data)
                if paid % (25 * 4105) < len(data):
                    await stream.send_all(ok(dial=DialStatus.E_DIAL_ERROR))
                    return

        here.mallory.swarm.handle(DIAL_REQUEST, handle)
        verdicts = [(await here.test(here.mallory))[0] for _ in range(30)]
        assert "bytes of dial data" in verdicts[-1].reason
        assert 19 * MAX_PAID <= paid <= 22 * MAX_PAID


# Askers


async def ask(peer: Peer, server: Peer, protocol: str, request: bytes) -> YamuxStream:
    connection = await peer.dial(server)
    stream = await connection.open_stream(protocol)
    await stream.send_all(request)
    return stream


def served(peer: Peer) -> list[tuple[str, str]]:
    return [(each.status, each.reason) for each in peer.bus.of(DialBackServed)]


@pytest.mark.parametrize(
    ("text", "protocol", "reason"),
    [
        ("/ip4/192.168.1.1/tcp/80", DIAL_REQUEST, "private_target"),
        ("/ip4/127.0.0.1/tcp/80", DIAL_REQUEST, "private_target"),
        ("/ip4/169.254.169.254/tcp/80", DIAL_REQUEST, "private_target"),
        ("/ip4/11.1.0.1/tcp/22", DIAL_REQUEST, "private_target"),
        ("/ip4/192.168.1.1/tcp/80", STRANGER, "private_target"),
        (OTHER, STRANGER, "other_ip"),
        (OTHER, STRANGER_DIAL, "private_target"),  # it names no peer
        ("/ip4/11.66.0.1/udp/1/quic-v1", DIAL_REQUEST, "no_address"),
    ],
)
async def test_a_target_that_is_not_dialed(
    text: str, protocol: str, reason: str, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        dialed = len(here.server.host.fresh)

        async def attack() -> None:
            request = encode(DialRequest((bytes(addr.parse(text)),), 1))
            stream = await ask(here.mallory, here.server, protocol, request)
            answer = decode(await receive_frame(stream, MAX_MESSAGE))
            assert answer == DialResponse(ResponseStatus.E_DIAL_REFUSED)

        await gather(here, attack)
        assert ("E_DIAL_REFUSED", reason) in served(here.server)
        assert here.server.bus.counts["dial-back-served", reason] == 1
        assert len(here.server.host.fresh) == dialed + 2  # the witness', twice


async def test_nobody_sends_a_server_to_the_router_before_it(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:
        behind = await here.here.peer("11.5.0.1", "fc", quiet=True)
        for each in (here.server, here.witness, here.mallory):
            await behind.dial(each)
        behind.reachability.mapped(["/ip4/11.6.0.1/tcp/5555"])
        await trio.sleep(1)
        [connection] = here.mallory.swarm.connections_to(behind.swarm.peer)
        for target in ("/ip4/11.5.0.1/tcp/80", "/ip4/11.6.0.1/tcp/80"):
            outcome = await here.mallory.reachability._client.test(connection.connection, target, Kind.V2)
            assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, "E_DIAL_REFUSED")
        assert behind.host.fresh == []


async def test_v1_dials_no_other_ip_than_the_askers(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:
        me = addr.peer_id_to_bytes(here.mallory.swarm.peer)
        stream = await ask(
            here.mallory, here.server, V1, encode_v1(V1Dial(me, (bytes(addr.parse("/ip4/11.200.0.1/tcp/7")),)))
        )
        answer = decode_v1(await receive_frame(stream, MAX_MESSAGE))
        assert isinstance(answer, V1Response)
        assert answer.status is V1Status.E_DIAL_ERROR
        assert [target for _, target in here.server.host.fresh] == [("11.66.0.1", 7)]


async def relayed(peer: Peer, server: Peer) -> SwarmConnection:
    """A connection that calls itself relayed at both ends."""
    ours, theirs = memory_pair()
    path = Path(PathKind.RELAYED, peer.swarm.peer)
    found: dict[bool, SwarmConnection] = {}

    async def one(end: Peer, other: Peer, raw: MemoryRaw, initiator: bool) -> None:
        found[initiator] = await end.swarm.upgrade_raw(raw, peer=other.swarm.peer, initiator=initiator, path=path)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, peer, server, ours, True)
        nursery.start_soon(one, server, peer, theirs, False)
    return found[True]


@pytest.mark.parametrize("protocol", [DIAL_REQUEST, STRANGER, STRANGER_DIAL, V1])
async def test_over_a_relay_nobody_is_dialed(protocol: str, autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:
        connection = await relayed(here.mallory, here.server)
        dialed = len(here.server.host.fresh)

        async def attack() -> None:
            stream = await connection.open_stream(protocol)
            target = bytes(addr.parse(f"{HOME}/p2p/{here.alice.swarm.peer}"))
            if protocol == V1:
                me = addr.peer_id_to_bytes(here.mallory.swarm.peer)
                await stream.send_all(encode_v1(V1Dial(me, (target,))))
                answer = decode_v1(await receive_frame(stream, MAX_MESSAGE))
                assert answer == V1Response(V1Status.E_DIAL_REFUSED, "relayed")
            else:
                await stream.send_all(encode(DialRequest((target,), 1)))
                answer2 = decode(await receive_frame(stream, MAX_MESSAGE))
                assert answer2 == DialResponse(ResponseStatus.E_REQUEST_REJECTED)

        await gather(here, attack)
        assert here.server.bus.counts["dial-back-served", "relayed"] == 1
        assert len(here.server.host.fresh) == dialed + 2


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([DialData(bytes(MAX_PIECE))] * 5, "before a whole message"),
        ([DialData(bytes(99))], "at least 100"),
        ([DialData(b"")], "at least 100"),
        ([DialData(bytes(MAX_PIECE)), DialRequest((), 1)], "something else"),
        ([DialData(bytes(MAX_MESSAGE))], "at most 8192"),
    ],
)
async def test_dial_data_that_is_not_what_was_asked_for(
    pieces: list[DialData | DialRequest], why: str, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        dialed = len(here.server.host.fresh)

        async def attack() -> None:
            request = encode(DialRequest((bytes(addr.parse(OTHER)),), 1))
            stream = await ask(here.mallory, here.server, DIAL_REQUEST, request)
            demand = decode(await receive_frame(stream, MAX_MESSAGE))
            assert isinstance(demand, DialDataRequest)
            for piece in pieces:
                await stream.send_all(encode(piece))
            await stream.send_eof()
            with pytest.raises(StreamReset):
                await receive_frame(stream, MAX_MESSAGE)

        await gather(here, attack)
        assert len(here.server.host.fresh) == dialed + 2
        [event] = here.server.bus.of(PeerMisbehaved)
        assert (event.peer, event.layer) == (here.mallory.swarm.peer, DIAL_REQUEST)
        assert why in event.reason


@pytest.mark.parametrize("protocol", [DIAL_REQUEST, STRANGER, STRANGER_DIAL, V1])
async def test_an_asker_that_is_silent(protocol: str, autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def attack() -> None:
            started = trio.current_time()
            stream = await ask(here.mallory, here.server, protocol, b"\x7f")
            with pytest.raises(StreamReset):
                await stream.receive_some()
            assert ASK_TIMEOUT <= trio.current_time() - started <= ASK_TIMEOUT + 0.2

        await gather(here, attack)
        [event] = here.server.bus.of(PeerMisbehaved)
        assert "did not come within" in event.reason


async def test_dial_data_that_trickles(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def attack() -> None:
            request = encode(DialRequest((bytes(addr.parse(OTHER)),), 1))
            stream = await ask(here.mallory, here.server, DIAL_REQUEST, request)
            await receive_frame(stream, MAX_MESSAGE)
            started = trio.current_time()
            with suppress(StreamReset):
                while True:
                    await stream.send_all(encode(DialData(bytes(100))))
                    await trio.sleep(1)
            assert trio.current_time() - started <= DATA_TIMEOUT + 2

        await gather(here, attack)
        assert ("11.200.0.1", PORT) not in [target for _, target in here.server.host.fresh]


async def test_who_pays_has_another_ip_dialed_once(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:
        outcome, _ = await here.test(here.server, OTHER, asker=here.mallory)
        assert outcome.verdict is Verdict.UNREACHABLE
        assert [target for _, target in here.server.host.fresh] == [("11.200.0.1", PORT)]


async def test_an_answer_comes_while_rusts_client_waits(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.autonat.world.LOST", 60.0)
    monkeypatch.setattr("random.random", lambda: 1.0)  # the most data, and the longest pause
    async with scene() as here:
        outcome, seconds = await here.test(here.server, OTHER)
        assert outcome.reason == "E_DIAL_ERROR"
        assert seconds < 9  # rust waits 10


async def answer_and_reset(stream: YamuxStream) -> None:
    """As rust does it."""
    await receive_frame(stream, MAX_MESSAGE)
    await stream.send_all(encode_dial_back_response())
    stream.reset()


async def just_end(stream: YamuxStream) -> None:
    await stream.aclose()


@pytest.mark.parametrize(
    ("handle", "status"),
    [
        (answer_and_reset, DialStatus.OK),
        (just_end, DialStatus.E_DIAL_BACK_ERROR),
        (None, DialStatus.E_DIAL_BACK_ERROR),
    ],
)
async def test_how_a_dial_back_is_taken(
    handle: Wicked | None, status: DialStatus, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        here.alice.swarm.unhandle(DIAL_BACK)
        if handle is not None:
            here.alice.swarm.handle(DIAL_BACK, handle)
        stream = await ask(here.alice, here.server, DIAL_REQUEST, encode(DialRequest((bytes(addr.parse(HOME)),), 1)))
        answer = decode(await receive_frame(stream, MAX_MESSAGE))
        assert answer == DialResponse(ResponseStatus.OK, 0, status)


async def test_a_flood_of_requests_ends_at_the_rate(autojump_clock: trio.abc.Clock) -> None:
    async with scene() as here:

        async def attack() -> None:
            request = encode(DialRequest((bytes(addr.parse("/ip4/11.66.0.1/tcp/9")),), 1))
            for _ in range(100):
                stream = await ask(here.mallory, here.server, DIAL_REQUEST, request)
                await receive_frame(stream, MAX_MESSAGE)

        await gather(here, attack)
        assert here.server.bus.counts["dial-back-served", "autonat_per_peer"] >= 80


async def test_whom_a_stranger_is_to_dial_decides_the_one_who_asks_for_himself_only(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with scene() as here:
        helper = await here.here.peer("11.3.0.1", quiet=True)
        await helper.dial(here.server)
        await trio.sleep(1)
        outcome, _ = await here.test(here.server, OTHER, Kind.STRANGER, asker=here.mallory)
        assert (outcome.verdict, helper.host.fresh) == (Verdict.REFUSED, [])
        outcome, _ = await here.test(here.server, HOME, Kind.STRANGER)
        assert outcome.proof is not None
        assert outcome.proof.remote_address.startswith("/ip4/11.3.0.1/")
        assert served(here.server)[-1] == ("OK", "stranger")


async def test_a_helper_that_asks_for_too_much_or_says_nothing_costs_the_asker_nothing(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with scene() as here:
        here.mallory.swarm.handle(STRANGER_DIAL, saying(encode(DialDataRequest(0, 10**9))))
        here.mallory.identify.changed()
        await here.mallory.swarm.dial(here.server.swarm.peer, [here.server.address], fresh=True)
        await trio.sleep(1)
        outcome, _ = await here.test(here.server, HOME, Kind.STRANGER)
        assert (outcome.verdict, outcome.reason) == (Verdict.REFUSED, "E_DIAL_REFUSED")
        assert served(here.server)[-1] == ("E_DIAL_REFUSED", "no_stranger")


# Observed addresses


@pytest.mark.parametrize("seen", ["/ip4/192.168.1.10/tcp/1", "/ip4/244.152.12.79/tcp/15020"])
async def test_a_peer_that_sees_us_where_nobody_can_is_counted_and_not_believed(
    seen: str, autojump_clock: trio.abc.Clock
) -> None:
    async with scene() as here:
        connection = here.alice.swarm.connection_to(here.mallory.swarm.peer)
        assert connection is not None
        before = here.alice.reachability.candidates()
        here.alice.reachability.identified(connection.connection, seen)
        assert here.alice.reachability.candidates() == before
        [event] = here.alice.bus.of(ObservationRefused)
        assert (event.peer, event.reason) == (here.mallory.swarm.peer, "private")
        assert here.alice.bus.counts["observation-refused", "private"] == 1


@pytest.mark.parametrize("kind", ["fc", "pr"])
async def test_peers_of_one_network_that_all_lie_change_no_verdict(kind: str, autojump_clock: trio.abc.Clock) -> None:
    lie = "/ip4/11.250.0.1/tcp/666"
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(ALICE, kind, serve=False)
        liars = [await here.peer(f"11.66.{number}.1", quiet=True, serve=False) for number in range(5)]
        for server in servers:
            await alice.dial(server)
        for liar in liars:
            connection = await alice.dial(liar)
            alice.reachability.identified(connection.connection, lie)
        await trio.sleep(60)
        for liar in liars:
            alice.reachability.identified(alice.swarm.connections_to(liar.swarm.peer)[0].connection, lie)
        await trio.sleep(3600)
        status = alice.reachability.status()
        assert status.role is (Role.PUBLIC if kind == "fc" else Role.PRIVATE)
        assert lie not in status.candidates
        assert lie not in status.public_addresses
