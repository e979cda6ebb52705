"""Nodes that tell one another of relays; and those who mean it ill, while friends get their places."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import MockClock

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import AutoNatConfig, Purpose, RelayConfig, Role
from kas_libp2p.errors import KasError, StreamReset
from kas_libp2p.events import HandlerFailed, InternalError, PeerMisbehaved, RelaysHeard
from kas_libp2p.framing import encode_varint, frame
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PathKind, PeerId
from kas_libp2p.pb import relays_pb2 as pb
from kas_libp2p.relay._exchange import (
    ASK_AGAIN,
    MAX_MESSAGE,
    MAX_RELAYS,
    PEER_BURST,
    RELAYS,
    Answer,
    decode_answer,
    encode_answer,
    encode_request,
)
from kas_libp2p.relay._pool import PART_PATIENCE, PROBE_HELD_AGAIN, Source
from kas_libp2p.relay._pool import Told as Known
from kas_libp2p.relay.exchange import ANSWER_TIMEOUT, REQUEST_TIMEOUT
from kas_libp2p.transport.framed import receive_frame
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.memory import MemoryRaw
from tests.network import MemoryHost, MemoryInternet, eventually
from tests.relay.scripted import Told

PORT = 4001


@asynccontextmanager
async def node_in(
    internet: MemoryInternet, network: int, config: RelayConfig, role: Role, ip: str = ""
) -> AsyncIterator[Node]:
    """A node in a network of its own, that listens."""
    ip = ip or f"20.{network}.0.1"
    made = Config(listen=(f"/ip4/{ip}/tcp/{PORT}",), role=role, relay=config, autonat=AutoNatConfig(serve=False))
    identity = Identity.from_seed(bytes([network]) * 32)
    async with open_node(made, identity=identity, network=internet.host(ip)) as node:
        yield node


class Village:
    """Who is there; each is at ``20.<number>.0.1``."""

    def __init__(self, internet: MemoryInternet, stack: AsyncExitStack) -> None:
        self.internet = internet
        self._stack = stack

    async def relay(self, network: int, operator: str = "", *, ip: str = "") -> Node:
        config = RelayConfig(serve=True, purpose=Purpose.ANY, operator=operator)
        return await self._stack.enter_async_context(node_in(self.internet, network, config, Role.PUBLIC, ip))

    async def private(self, network: int, *relays: Node, target: int = 3) -> Node:
        config = RelayConfig(relays=tuple(each.addresses[0] for each in relays), target=target)
        return await self._stack.enter_async_context(node_in(self.internet, network, config, Role.PRIVATE))

    async def liar(self, network: int, script: Callable[[YamuxStream], Awaitable[None]]) -> Node:
        """One that answers questions about relays by hand."""
        node = await self.private(network, target=0)
        node.swarm.unhandle(RELAYS)
        node.swarm.handle(RELAYS, script, max_per_peer=64)
        return node


@asynccontextmanager
async def a_village() -> AsyncIterator[Village]:
    async with AsyncExitStack() as stack:
        yield Village(MemoryInternet(delay=0.02), stack)


def places(node: Node) -> set[PeerId]:
    return {each.relay for each in node.status().reservations if each.held}


def at(network: int) -> str:
    return f"/ip4/20.{network}.0.1/tcp/{PORT}"


def where(node: Node) -> str:
    """Its own address, not one through a relay."""
    return next(each for each in node.addresses if "p2p-circuit" not in each)


async def test_who_knows_one_peer_gets_places_on_the_relays_that_it_uses(autojump_clock: MockClock) -> None:
    async with a_village() as village:
        relays = [await village.relay(number, operator=f"operator {number}") for number in (1, 2, 3)]
        alice = await village.private(11, *relays)
        await eventually(lambda: len(places(alice)) == 3)
        await trio.sleep(PROBE_HELD_AGAIN)  # in which she has asked them
        bob = await village.private(12)
        told = Told(bob)
        await bob.ping(where(alice))
        with trio.fail_after(10):
            await eventually(lambda: len(places(bob)) == 3)
        assert {(each.operator, each.source, each.teller) for each in bob.status().relays} == {
            (f"operator {number}", Source.MET, alice.peer_id) for number in (1, 2, 3)
        }
        assert [(each.peer, each.told, each.taken) for each in told.of(RelaysHeard)][:1] == [(alice.peer_id, 3, 3)]


async def test_word_comes_through_circuits_too(autojump_clock: MockClock) -> None:
    """Of private nodes that is all there is: they meet through a relay."""
    async with a_village() as village:
        relays = [await village.relay(number) for number in (1, 2, 3)]
        alice = await village.private(11, *relays)
        await eventually(lambda: len(places(alice)) == 3)
        await trio.sleep(5)  # in which they are visited
        bob = await village.private(12, relays[0])
        await bob.ping(f"{where(relays[0])}/p2p-circuit/p2p/{alice.peer_id}")
        assert {each.path.kind for each in bob.connections if each.peer == alice.peer_id} == {PathKind.RELAYED}
        await eventually(lambda: places(bob) == {each.peer_id for each in relays})


async def test_a_relay_tells_who_runs_it_and_what_is_free(autojump_clock: MockClock) -> None:
    async with a_village() as village:
        relay = await village.relay(1, "Relays Ltd")
        alice = await village.private(11, relay)
        await eventually(lambda: bool(places(alice)))
        await eventually(lambda: alice.status().relays[0].operator == "Relays Ltd")
        stream = await alice.connect(relay.peer_id, RELAYS)
        assert isinstance(stream, YamuxStream)
        await stream.send_all(encode_request())
        assert decode_answer(await receive_frame(stream, MAX_MESSAGE)) == Answer("Relays Ltd", 255)


async def test_two_of_one_operator_are_parted_and_no_moment_is_without_a_place(autojump_clock: MockClock) -> None:
    """The operator's own relays are asked at once, before anybody knows who runs them."""
    async with a_village() as village:
        one, other = [await village.relay(number, "Relays Ltd") for number in (1, 2)]
        third = await village.relay(3, "Others Ltd")
        alice = await village.private(11, one, other, target=2)
        await alice.ping(where(third))
        await eventually(lambda: len(places(alice)) >= 2)
        for _ in range(10 * int(PART_PATIENCE)):
            await trio.sleep(0.1)
            assert len(places(alice)) >= 2
        assert third.peer_id in places(alice)
        assert len(places(alice)) == 2


async def test_nobody_is_asked_by_who_needs_no_relay(autojump_clock: MockClock) -> None:
    async with a_village() as village:
        relay = await village.relay(1)
        alice = await village.private(11, relay)
        await relay.ping(where(alice))
        await trio.sleep(60)
        assert [each.peer for each in Told(relay).of(RelaysHeard)] == []
        assert alice.bus.counts["relays-heard", ""] == 1


async def test_who_lacks_relays_asks_again_but_seldom(autojump_clock: MockClock) -> None:
    async with a_village() as village:
        asked: list[float] = []

        async def nothing(stream: YamuxStream) -> None:
            asked.append(trio.current_time())
            await stream.send_all(encode_answer(Answer()))

        peer = await village.liar(13, nothing)
        bob = await village.private(12)
        await bob.serve(_hold, "/hold")
        await peer.connect(where(bob), "/hold")
        await trio.sleep(3600)
        assert 8 <= len(asked) <= 3600 / ASK_AGAIN + 1


async def _hold(stream: object) -> None:
    await trio.sleep_forever()


# Those who mean it ill


def lie(number: int) -> Known:
    return Known(Identity.from_seed(number.to_bytes(32, "big")).peer_id, (f"/ip4/66.{number}.6.6/tcp/6666",))


async def ten_thousand(stream: YamuxStream) -> None:
    await receive_frame(stream, MAX_MESSAGE)
    relay = pb.Relay(id=b"\x12\x20" + bytes(32), addrs=[b"\x04\x42\x06\x06\x06\x06\x1a\x0a"])
    await stream.send_all(frame(pb.Answer(relays=[relay] * 10_000).SerializeToString()))


async def garbage(stream: YamuxStream) -> None:
    await stream.send_all(frame(b"\xff" * 100))


async def cut_short(stream: YamuxStream) -> None:
    await stream.send_all(encode_answer(Answer("me", 5, (lie(1), lie(2))))[:-10])
    await stream.send_eof()
    await trio.sleep_forever()


async def reset(stream: YamuxStream) -> None:
    stream.reset()


async def silence(stream: YamuxStream) -> None:
    await trio.sleep_forever()


async def trickle(stream: YamuxStream) -> None:
    for byte in encode_answer(Answer("me", 5, tuple(map(lie, range(MAX_RELAYS))))):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.5)


async def inside(stream: YamuxStream) -> None:
    """Into our own network, to everybody's mail server, and to where nobody is."""
    addresses = (
        "/ip4/192.168.1.1/tcp/8080",
        "/ip4/127.0.0.1/tcp/16110",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip6/fe80::1/tcp/4001",
        "/ip6/fd00::1/tcp/4001",
        "/ip4/66.6.6.6/tcp/25",
        "/dns4/router.example.org/tcp/4001",
        f"/ip4/66.6.6.6/tcp/4001/p2p/{lie(1).peer}/p2p-circuit",
    )
    told = tuple(replace(lie(number), addresses=(each,)) for number, each in enumerate(addresses))
    await stream.send_all(encode_answer(Answer("me", 5, told)))


@pytest.mark.parametrize(
    ("script", "broke"),
    [
        (ten_thousand, True),
        (garbage, True),
        (cut_short, True),
        (reset, False),
        (silence, False),
        (trickle, False),
        (inside, False),
    ],
)
async def test_an_answer_that_is_none(
    autojump_clock: MockClock, script: Callable[[YamuxStream], Awaitable[None]], broke: bool
) -> None:
    """Nobody is dialed for it, and a friend who answers after it leads to a place as soon as ever."""
    async with a_village() as village:
        relay = await village.relay(1)
        alice = await village.private(11, relay)
        await eventually(lambda: bool(places(alice)))
        await trio.sleep(5)
        liar = await village.liar(13, script)
        bob = await village.private(12)
        told = Told(bob)
        await bob.ping(where(liar))
        await trio.sleep(2 * ANSWER_TIMEOUT)
        assert bob.status().relays == ()
        assert [each.layer for each in told.of(PeerMisbehaved)] == [RELAYS] * broke
        await bob.ping(where(alice))
        with trio.fail_after(10):
            await eventually(lambda: places(bob) == {relay.peer_id})
        assert told.of(InternalError) == told.of(HandlerFailed) == []
        assert {each.peer for each in bob.connections} == {relay.peer_id, alice.peer_id, liar.peer_id}


@pytest.mark.parametrize("refused", [True, False])
async def test_lies_are_tried_one_after_the_other_and_cost_a_friend_s_word_little(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Though the friend tells of the same relays, while it is tried whether they are where the liar says."""
    async with a_village() as village:
        relays = [await village.relay(number) for number in (1, 2, 3)]
        alice = await village.private(11, *relays)
        await eventually(lambda: len(places(alice)) == 3)
        await trio.sleep(5)

        async def lies(stream: YamuxStream) -> None:
            honest = tuple(replace(lie(number), peer=each.peer_id) for number, each in enumerate(relays))
            made_up = tuple(lie(number) for number in range(50, 50 + MAX_RELAYS))
            await stream.send_all(encode_answer(Answer("me", 5, (*honest, *made_up))))

        liar = await village.liar(13, lies)
        bob = await village.private(12)
        host = bob.swarm.network
        assert isinstance(host, MemoryHost)
        dial = host.dial

        async def nobody_answers(address: Multiaddr) -> MemoryRaw:
            if not refused and str(address).startswith("/ip4/66."):
                host.dialed.append(str(address))
                await trio.sleep_forever()
            return await dial(address)

        monkeypatch.setattr(host, "dial", nobody_answers)
        await bob.ping(where(liar))
        await trio.sleep(5)
        await bob.ping(where(alice))
        with trio.fail_after(60 if refused else 120):
            await eventually_slowly(lambda: len(places(bob)) == 3)
        await trio.sleep(900)
        knocks = [each for each in host.dialed if each.startswith("/ip4/66.")]
        assert len(knocks) == len(set(knocks)) <= MAX_RELAYS


async def eventually_slowly(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - there is no event for it
        await trio.sleep(0.1)


async def test_a_flood_of_questions_and_silent_ones_keep_nobody_waiting(autojump_clock: MockClock) -> None:
    async with a_village() as village:
        relay = await village.relay(1, "Relays Ltd")
        mallory = await village.private(13, target=0)
        bob = await village.private(12)
        told = Told(relay)
        answered = silent = refused = 0

        async def ask(data: bytes) -> None:
            nonlocal answered, silent, refused
            stream = await mallory.connect(relay.peer_id, RELAYS, addresses=[where(relay)])
            assert isinstance(stream, YamuxStream)
            try:
                if data:
                    await stream.send_all(data)
                with trio.move_on_after(2 * REQUEST_TIMEOUT) as scope:
                    decode_answer(await receive_frame(stream, MAX_MESSAGE))
                    answered += 1
                silent += scope.cancelled_caught
            except (KasError, StreamReset):
                refused += 1
            stream.reset()

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask, b"")
            await trio.sleep(1)
            await bob.ping(where(relay))
            with trio.fail_after(2):
                await eventually(lambda: "Relays Ltd" in {each.operator for each in bob.status().relays})
        assert answered == silent == 0
        for data in (frame(b"\xff\xff\xff"), encode_varint(2**62), frame(bytes(MAX_MESSAGE + 1))):
            await trio.sleep(600)
            await ask(data)
        assert answered == 0
        assert {each.layer for each in told.of(PeerMisbehaved)} == {RELAYS}
        await trio.sleep(600)
        for _ in range(100):
            await ask(encode_request())
        assert answered == PEER_BURST
        assert relay.status().limit_hits["relays_per_peer"] >= 90
        assert told.of(InternalError) == told.of(HandlerFailed) == []
