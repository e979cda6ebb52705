"""A peer that stalls at each step: why is told and counted, its place is free in time, and nobody beside it waits.

Ten of them stall at once, each from an address of its own. A friend comes before and while they do, connects, speaks,
and joins the node's kaspad; on the mock clock that takes exactly as long both times.
"""

from __future__ import annotations

from contextlib import aclosing

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses, identify
from kas_libp2p.config import Config
from kas_libp2p.errors import DialError, Stage, UpgradeTimeout
from kas_libp2p.events import (
    AddressFailed,
    ConnectionClosed,
    IdentifyFailed,
    KaspaPeerEnded,
    LimitHit,
    PeerMisbehaved,
    StreamFailed,
    UpgradeFailed,
)
from kas_libp2p.kaspa import p2p_pb2
from kas_libp2p.kaspa._messages import Hello, Kind, encode, frame
from kas_libp2p.kaspa.join import End
from kas_libp2p.metadata import Dialect
from kas_libp2p.transport._multistream import HEADER
from kas_libp2p.transport.connection import Connection
from tests.abuse.house import DELAY, ECHO, STRANGERS, house
from tests.kaspa.test_join import NETWORK, message
from tests.memory import MemoryRaw
from tests.transport.pairs import Foreign
from tests.transport.test_upgrade import STEPS

UPGRADE = Config().dial.upgrade_timeout
NEGOTIATION = Config().dial.negotiation_timeout


async def take_steps(raw: MemoryRaw, initiator: bool, count: int) -> Stage:
    """Take some steps of an upgrade, and stop. Returns the stage at which the other side then waits."""
    foreign = Foreign(raw, initiator=initiator, muxers=())
    async with aclosing(STEPS[not initiator][0](foreign)) as steps:
        taken = 0
        async for stage in steps:
            if taken == count:
                return Stage(stage)
            taken += 1
    raise AssertionError("there are not so many steps")


# TCP accept, multistream, Noise, Yamux


@pytest.mark.parametrize("step", range(STEPS[False][1]))
async def test_one_who_dials_us(step: int, autojump_clock: MockClock) -> None:
    async with house() as h:
        alone = await h.friend_is_served()
        begun = trio.current_time()
        stages = {await take_steps(await h.pipe(), True, step) for _ in range(STRANGERS)}
        await trio.sleep(DELAY)
        in_use = h.node.status().in_use
        assert in_use["max_pending_inbound"] == in_use["max_inbound"] == STRANGERS
        assert await h.friend_is_served() == pytest.approx(alone)
        assert h.of(UpgradeFailed) == []

        await trio.sleep(UPGRADE)
        failed = h.of(UpgradeFailed)
        assert len(failed) == STRANGERS
        assert {event.stage for _, event in failed} == stages
        for at, event in failed:
            assert event.reason == str(UpgradeTimeout(Stage(event.stage), UPGRADE))
            assert event.seconds == pytest.approx(UPGRADE)
            assert at - begun <= UPGRADE + STRANGERS * 10 * DELAY
        assert h.count("upgrade-failed", *stages) == STRANGERS
        assert set(h.node.status().in_use.values()) == {0}
        assert all(there.closed == "aborted" for _, there in h.internet.pipes[1 : 1 + STRANGERS])


@pytest.mark.parametrize("step", range(STEPS[True][1]))
async def test_one_whom_we_dial(step: int, autojump_clock: MockClock) -> None:
    async with house() as h:
        alone = await h.friend_is_served()
        stages: set[Stage] = set()

        async def dial(number: int) -> None:
            address = f"/ip4/12.0.0.{number}/tcp/1"
            host = h.internet.host(f"12.0.0.{number}")
            (listener,) = await host.listen([addresses.parse(address)])

            async def stall() -> None:
                raw = await listener.accept()
                assert isinstance(raw, MemoryRaw)
                stages.add(await take_steps(raw, False, step))

            h.nursery.start_soon(stall)
            with pytest.raises(DialError) as caught:
                await h.node.connect(address, ECHO)
            assert f"within {UPGRADE:g} s" in str(caught.value)

        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(STRANGERS):
                nursery.start_soon(dial, number)
            await trio.sleep(1)
            assert h.node.status().in_use["max_connections"] == STRANGERS
            assert await h.friend_is_served() == pytest.approx(alone)
        assert trio.current_time() - begun == pytest.approx(UPGRADE + 2 * DELAY)
        await trio.testing.wait_all_tasks_blocked()
        failed = h.of(AddressFailed)
        assert {event.stage for _, event in failed} == stages
        assert h.count("address-failed", *stages) == STRANGERS
        assert set(h.node.status().in_use.values()) == {0}


# Identify, streams


async def test_one_who_tells_nothing_about_itself(autojump_clock: MockClock) -> None:
    """It stays: who says nothing does no harm. It is closed as one that is idle."""
    async with house() as h:
        alone = await h.friend_is_served()
        for _ in range(STRANGERS):
            await h.connected()
        assert await h.friend_is_served() == pytest.approx(alone)
        await trio.sleep(identify.TIMEOUT)
        failed = [event for _, event in h.of(IdentifyFailed)]
        assert [event.reason for event in failed] == [f"silent for {identify.TIMEOUT:g} s"] * STRANGERS
        assert h.count("identify-failed") == STRANGERS
        assert all(not each.connection.streams for each in h.node.connections)

        limits = h.node.config.limits
        await trio.sleep(limits.idle_timeout * 1.5)
        closed = [event for _, event in h.of(ConnectionClosed) if event.reason.startswith("it was idle")]
        assert len(closed) == STRANGERS
        assert set(h.node.status().in_use.values()) == {0}


async def test_one_whose_push_never_ends(autojump_clock: MockClock) -> None:
    async with house() as h:
        alone = await h.friend_is_served()
        for _ in range(STRANGERS):
            stream = await (await h.connected()).open_stream(identify.PUSH)
            await stream.send_all(b"\xff")  # the beginning of a length
        assert await h.friend_is_served() == pytest.approx(alone)
        await trio.sleep(identify.TIMEOUT)
        told = [event for _, event in h.of(PeerMisbehaved)]
        assert [(event.layer, event.reason) for event in told] == [
            ("identify", f"a push took longer than {identify.TIMEOUT:g} s")
        ] * STRANGERS
        assert h.count("peer-misbehaved", "identify") == STRANGERS
        assert all(not each.connection.streams for each in h.node.connections)


async def test_one_whose_second_push_does_not_wait_for_the_first(autojump_clock: MockClock) -> None:
    async with house() as h:
        stranger = await h.connected()
        for _ in range(2):
            stream = await stranger.open_stream(identify.PUSH)
            await stream.send_all(b"\xff")
            await trio.sleep(5 * DELAY)
        assert [event.reason for _, event in h.of(LimitHit)] == ["max_streams_per_peer"]
        await trio.sleep(identify.TIMEOUT)
        third = await stranger.open_stream(identify.PUSH)
        await third.send_all(b"\xff")
        await trio.sleep(5 * DELAY)
        assert len(h.of(LimitHit)) == 1, "the first one's place was free"


@pytest.mark.parametrize("said", [b"", HEADER[:9], HEADER, HEADER + b"\x20"])
async def test_one_who_proposes_nothing_on_a_stream(said: bytes, autojump_clock: MockClock) -> None:
    async with house() as h:
        alone = await h.friend_is_served()
        for _ in range(STRANGERS):
            stream = await (await h.connected()).open_stream()
            await stream.send_all(said)
        assert await h.friend_is_served() == pytest.approx(alone)
        await trio.sleep(NEGOTIATION)
        failed = [event.reason for _, event in h.of(StreamFailed)]
        assert failed == [str(UpgradeTimeout(Stage.STREAM, NEGOTIATION))] * STRANGERS
        assert h.count("stream-failed") == STRANGERS
        assert all(not each.connection.streams for each in h.node.connections)


# Kaspa: preface, Version, Verack, Ready

VERACK, READY = message(verack=p2p_pb2.Empty()), message(ready=p2p_pb2.Empty())


def version(number: int) -> bytes:
    body = p2p_pb2.Version(protocolVersion=11, id=number.to_bytes(16, "big"), network=NETWORK, timestamp=1)
    return message(version=body)


async def in_messages(stranger: Connection, said: list[bytes]) -> None:
    stream = await stranger.open_stream(Dialect.MESSAGES)
    await stream.send_all(encode(Hello()) + b"".join(frame(Kind.MESSAGE, each) for each in said))


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("said", [b"", b"PRI * HTTP"])
async def test_no_kaspa_preface(dialect: Dialect, said: bytes, autojump_clock: MockClock) -> None:
    if said and dialect is Dialect.MESSAGES:
        said = encode(Hello())[:1]
    async with house() as h:
        alone = await h.friend_is_served()
        before = len(h.kaspad.opened)
        for _ in range(STRANGERS):
            stream = await (await h.connected()).open_stream(dialect)
            await stream.send_all(said)
        await trio.sleep(2 * DELAY)
        assert await h.friend_is_served() == pytest.approx(alone)
        await trio.sleep(1.5)
        ended = [event for _, event in h.of(KaspaPeerEnded) if event.reason == End.PEER_SILENT]
        assert [event.text for event in ended] == ["no Version within 1.5 s"] * STRANGERS
        assert h.count("kaspa-peer-ended", End.PEER_SILENT) == STRANGERS
        assert len(h.kaspad.opened) == before + 1, "kaspad saw the friend alone"
        assert not h.joiner.peers


@pytest.mark.parametrize(
    ("said", "within"),
    [([], 1.5), (["version"], 4.0), (["version", "verack"], 8.0)],
    ids=["Version", "Verack", "Ready"],
)
async def test_a_kaspa_handshake_that_stops(said: list[str], within: float, autojump_clock: MockClock) -> None:
    async with house() as h:
        alone = await h.friend_is_served()
        before = len(h.of(KaspaPeerEnded))
        for number in range(STRANGERS):
            words = {"version": version(number + 1), "verack": VERACK}
            await in_messages(await h.connected(), [words[each] for each in said])
        begun = trio.current_time()
        await trio.sleep(5 * DELAY)
        assert len(h.joiner.peers) == STRANGERS
        assert await h.friend_is_served() == pytest.approx(alone)
        await trio.sleep(within)
        ended = [(at, event) for at, event in h.of(KaspaPeerEnded)[before:] if not event.joined]
        assert len(ended) == STRANGERS
        assert all(event.text for _, event in ended)
        assert all(at - begun <= within + 0.5 for at, _ in ended)
        assert len({event.reason for _, event in ended}) == 1
        assert h.count("kaspa-peer-ended", ended[0][1].reason) >= STRANGERS
        assert h.joiner.pending == 0
        assert not h.joiner.peers
        assert h.kaspad.pending == []


def _parse(address: str):  # type: ignore[no-untyped-def]
    from kas_libp2p import addresses

    return addresses.parse(address)
