"""From a byte pipe to a connection: the round trips it takes, and every way in which a peer may spoil it."""

import random
from contextlib import aclosing, suppress

import pytest
import trio

from kas_libp2p.config import Config
from kas_libp2p.errors import NegotiationError, PeerIdMismatch, SecurityError, Stage, UpgradeError, UpgradeTimeout
from kas_libp2p.metadata import Path, PathKind, PeerId
from kas_libp2p.transport._multistream import HEADER, line
from kas_libp2p.transport._noise import Handshake
from kas_libp2p.transport.upgrade import upgrade
from tests.memory import memory_pair
from tests.transport.pairs import ALICE, BOB, Foreign, upgraded
from tests.transport.yamux.test_machine import ACK, PING, SYN, UPDATE, frame, frames

NOISE = line(b"/noise")
YAMUX = line(b"/yamux/1.0.0")
TIMEOUT = Config().dial.upgrade_timeout


def ours(raw, initiator, **kwargs):
    arguments = {"identity": ALICE, "initiator": initiator, "expected": None, "config": Config()} | kwargs
    return upgrade(raw, **arguments)


async def test_two_of_ours_need_one_round_trip(autojump_clock):
    raws = memory_pair(delay=0.1)
    start = trio.current_time()
    alice, bob = await upgraded(raws)
    # Three messages, each in one write; the third reaches the responder half a round trip after alice can go on.
    assert trio.current_time() - start == pytest.approx(0.3)
    assert len(raws[0].writes) == 2
    assert len(raws[1].writes) == 1
    assert alice.rtt == pytest.approx(0.2)
    assert bob.rtt == pytest.approx(0.2)
    assert (alice.peer, bob.peer) == (BOB.peer_id, ALICE.peer_id)


async def test_a_greeting_that_was_sent_unasked_measures_nothing(autojump_clock):
    """As go sends one as soon as it has accepted."""
    raws = memory_pair(delay=0.1)
    foreign = Foreign(raws[1])
    await foreign.raw.send_all(HEADER)
    await trio.sleep(0.15)

    async def answer():
        await foreign.read_exactly(len(HEADER + NOISE))
        await foreign.raw.send_all(NOISE)
        foreign._handshake.read(await foreign.read_message())
        await foreign.raw.send_all(foreign._handshake.write())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        connection = await ours(raws[0], True)
    assert connection.rtt == pytest.approx(0.2)


async def test_the_path_is_kept():
    raws = memory_pair()
    path = Path(PathKind.RELAYED, PeerId("relay"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake_as_far_as_it_goes, Foreign(raws[1]))
        connection = await ours(raws[0], True, path=path)
    assert connection.path == path


async def test_bytes_may_trickle():
    raws = memory_pair()
    for raw in raws:
        raw.largest_read = 1
    alice, bob = await upgraded(raws)
    assert (alice.peer, bob.peer) == (BOB.peer_id, ALICE.peer_id)


# A peer that stops, at each step


async def steps_of_a_responder(foreign):
    """What a responder does, a step at a time. After each one it may fall silent."""
    handshake = foreign._handshake
    yield Stage.SECURITY_NEGOTIATION
    await foreign.raw.send_all(HEADER[:5])
    yield Stage.SECURITY_NEGOTIATION
    await foreign.raw.send_all(HEADER[5:])
    yield Stage.SECURITY_NEGOTIATION
    await foreign.raw.send_all(NOISE)
    yield Stage.NOISE
    await foreign.read_exactly(len(HEADER + NOISE))
    handshake.read(await foreign.read_message())
    message = handshake.write()
    await foreign.raw.send_all(message[:1])
    yield Stage.NOISE
    await foreign.raw.send_all(message[1:-1])
    yield Stage.NOISE
    await foreign.raw.send_all(message[-1:])
    handshake.read(await foreign.read_message())
    foreign.secured = handshake.secured()
    yield Stage.MUXER_NEGOTIATION
    await foreign.say(HEADER)
    yield Stage.MUXER_NEGOTIATION
    await foreign.say(YAMUX[:-1])
    yield Stage.MUXER_NEGOTIATION
    await foreign.say(YAMUX[-1:])


async def steps_of_an_initiator(foreign):
    handshake = foreign._handshake
    yield Stage.SECURITY_NEGOTIATION
    await foreign.raw.send_all(HEADER)
    yield Stage.SECURITY_NEGOTIATION
    await foreign.read_exactly(len(HEADER))  # greeted at once
    await foreign.raw.send_all(NOISE[:3])
    yield Stage.SECURITY_NEGOTIATION
    await foreign.raw.send_all(NOISE[3:])
    yield Stage.NOISE
    await foreign.read_exactly(len(NOISE))  # agreed at once, as this peer waits for it
    message = handshake.write()
    await foreign.raw.send_all(message[:20])
    yield Stage.NOISE
    await foreign.raw.send_all(message[20:])
    yield Stage.NOISE
    handshake.read(await foreign.read_message())
    message = handshake.write()
    await foreign.raw.send_all(message[:-1])
    yield Stage.NOISE
    await foreign.raw.send_all(message[-1:])
    foreign.secured = handshake.secured()
    yield Stage.MUXER_NEGOTIATION
    await foreign.say(HEADER + YAMUX[:4])
    yield Stage.MUXER_NEGOTIATION
    await foreign.say(YAMUX[4:])


STEPS = {True: (steps_of_a_responder, 9), False: (steps_of_an_initiator, 9)}
CASES = [(initiator, step) for initiator, (_, count) in STEPS.items() for step in range(count)]


async def walk(initiator, step, raws, then):
    """Upgrade while the peer takes some steps. Returns the stage that it stopped in."""
    foreign = Foreign(raws[1], initiator=not initiator, muxers=())
    taken = 0
    async with aclosing(STEPS[initiator][0](foreign)) as steps:
        async for stage in steps:
            if taken == step:
                await then()
                return stage
            taken += 1
    return None


@pytest.mark.parametrize(("initiator", "step"), CASES)
async def test_a_peer_that_stalls(initiator, step, autojump_clock):
    raws = memory_pair(delay=0.01)
    stages = []

    async def peer():
        stages.append(await walk(initiator, step, raws, trio.lowlevel.checkpoint))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        with pytest.raises(UpgradeTimeout) as caught:
            await ours(raws[0], initiator)
    assert caught.value.stage is stages[0]
    assert caught.value.seconds == TIMEOUT
    assert trio.current_time() - start == pytest.approx(TIMEOUT)
    assert raws[0].closed == "aborted"


@pytest.mark.parametrize(("initiator", "step"), CASES)
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_peer_that_leaves(initiator, step, how):
    raws = memory_pair()
    stages = []

    async def leave():
        if how == "close":
            await raws[1].aclose()
        else:
            raws[1].abort()

    async def peer():
        stages.append(await walk(initiator, step, raws, leave))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        with pytest.raises(UpgradeError) as caught:
            await ours(raws[0], initiator)
    if how == "close":
        assert caught.value.stage is stages[0]
        assert str(caught.value) == f"the peer closed the connection during {stages[0]}"
    else:
        assert "connection reset by peer during" in str(caught.value)
    assert raws[0].closed == "aborted"


@pytest.mark.parametrize("initiator", [True, False])
async def test_a_peer_without_early_multiplexer(initiator):
    raws = memory_pair()
    foreign = Foreign(raws[1], initiator=not initiator, muxers=())
    done = trio.Event()

    async def peer():
        async for _ in STEPS[initiator][0](foreign):
            await trio.lowlevel.checkpoint()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        connection = await ours(raws[0], initiator)
    assert connection.peer == BOB.peer_id
    heard = b""
    while heard != HEADER + YAMUX:
        heard += await foreign.hear()


async def test_what_follows_a_late_multiplexer_is_not_lost():
    raws = memory_pair()
    foreign = Foreign(raws[1], muxers=())

    async def peer():
        await foreign.shake()
        await foreign.say(HEADER + YAMUX + frame(UPDATE, SYN, 2, 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        connection = await ours(raws[0], True)
    await first_stream(connection, foreign, [(UPDATE, ACK, 2, 0)])


async def test_what_an_initiator_sends_behind_its_last_message_is_not_lost():
    raws = memory_pair()
    foreign = Foreign(raws[1], initiator=True)

    async def peer():
        handshake = foreign._handshake
        await raws[1].send_all(HEADER + NOISE + handshake.write())
        await foreign.read_exactly(len(HEADER + NOISE))
        handshake.read(await foreign.read_message())
        last = handshake.write()
        foreign.secured = handshake.secured()
        held = []
        raws[1].send_all = hold(held)
        await foreign.say(frame(UPDATE, SYN, 1, 0))
        await foreign.say(frame(PING, SYN, 0, 5))
        del raws[1].send_all
        await raws[1].send_all(last + b"".join(held))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        connection = await ours(raws[0], False)
    await first_stream(connection, foreign, [(UPDATE, ACK, 1, 0), (PING, ACK, 0, 5)])


def hold(held):
    async def send_all(data):
        await trio.lowlevel.checkpoint()
        held.append(bytes(data))

    return send_all


async def first_stream(connection, foreign, answers):
    """Run until the peer's first stream is there and answered."""
    streams = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run, streams.append)
        heard = b""
        while len(heard) < 12 * len(answers):
            heard += (await foreign.hear()).removeprefix(HEADER + YAMUX)
        assert frames(heard) == answers
        assert len(streams) == 1
        nursery.cancel_scope.cancel()


# A peer that says the wrong thing


async def refused(raws, initiator, said, error, match, **kwargs):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raws[1].send_all, said)
        with pytest.raises(error, match=match) as caught:
            await ours(raws[0], initiator, **kwargs)
        assert raws[0].closed == "aborted"
        nursery.cancel_scope.cancel()
    return caught.value


async def test_a_peer_without_noise():
    error = await refused(memory_pair(), True, HEADER + line(b"na"), NegotiationError, "does not speak /noise")
    assert error.stage is Stage.SECURITY_NEGOTIATION


@pytest.mark.parametrize("initiator", [True, False])
@pytest.mark.parametrize(
    "junk",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x80\x80\x40", bytes(65536)],
    ids=["ssh", "http", "1 MiB line", "zeros"],
)
async def test_a_peer_that_speaks_something_else(initiator, junk):
    error = await refused(memory_pair(), initiator, junk, NegotiationError, "does not speak multistream")
    assert error.stage is Stage.SECURITY_NEGOTIATION


async def test_64_kib_of_junk_instead_of_noise():
    junk = random.Random(4).randbytes(65536)
    await refused(memory_pair(), True, HEADER + NOISE + b"\xff\xff" + junk, SecurityError, "does not fit")
    # The responder takes any 32 bytes for a key, answers, and finds the junk in what should prove something.
    junk = junk[:0x8000] + b"\x7f\xfe" + junk[0x8002:]
    await refused(memory_pair(), False, HEADER + NOISE + b"\x80\x00" + junk, SecurityError, "does not fit")


async def test_endless_proposals():
    said = HEADER + line(b"/tls/1.0.0") * 40
    await refused(memory_pair(), False, said, NegotiationError, "more than 32 proposals")


async def test_a_listing_before_the_proposal():
    raws = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raws[1].send_all, HEADER + line(b"ls"))
        nursery.start_soon(ours, raws[0], False)
        foreign = Foreign(raws[1], initiator=True)
        assert await foreign.read_exactly(len(HEADER)) == HEADER
        assert await foreign.read_exactly(10) == b"\x09" + NOISE + b"\n"
        nursery.cancel_scope.cancel()


async def test_another_peer_than_expected():
    raws = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake_as_far_as_it_goes, Foreign(raws[1]))
        with pytest.raises(PeerIdMismatch) as caught:
            await ours(raws[0], True, expected=ALICE.peer_id)
        nursery.cancel_scope.cancel()
    assert caught.value.actual == BOB.peer_id
    assert len(raws[0].writes) == 1, "our identity was not told"


async def test_a_peer_that_multiplexes_differently():
    raws = memory_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake_as_far_as_it_goes, Foreign(raws[1], muxers=("/mplex/6.7.0",)))
        with pytest.raises(NegotiationError, match="/mplex/6") as caught:
            await ours(raws[0], True)
        nursery.cancel_scope.cancel()
    assert caught.value.stage is Stage.MUXER_NEGOTIATION


async def shake_as_far_as_it_goes(foreign):
    with suppress(trio.BrokenResourceError):
        await foreign.shake()


async def test_cancelling_closes_the_pipe():
    raws = memory_pair()
    with trio.move_on_after(0.01) as scope:
        await ours(raws[0], True)
    assert scope.cancelled_caught
    assert raws[0].closed == "aborted"


async def test_signatures_of_others_are_refused(monkeypatch):
    raws = memory_pair()
    foreign = Foreign(raws[1])
    monkeypatch.setattr(Handshake, "_payload", forged(Handshake._payload, foreign._handshake))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake_as_far_as_it_goes, foreign)
        with pytest.raises(SecurityError, match="not signed"):
            await ours(raws[0], True)
        nursery.cancel_scope.cancel()


def forged(honest, who):
    """Bob's handshake claims to be alice."""

    def payload(handshake):
        data = honest(handshake)
        return data.replace(BOB.public_key, ALICE.public_key) if handshake is who else data

    return payload
