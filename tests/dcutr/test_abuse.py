"""What a hostile peer tries with DCUtR (group 7 of what a hostile network will try).

Each attack has its outcome and its count. A witness punches with the same node meanwhile, and that takes as long as
without the attack.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import addresses as addr
from kas_libp2p.dcutr._candidates import (
    HOST_BURST,
    HOST_INTERVAL,
    MAX_UNTRUSTED,
    PEER_BURST,
    RELAY_BURST,
    RELAY_INTERVAL,
    VOUCHED_BURST,
    VOUCHED_INTERVAL,
    Known,
    Own,
)
from kas_libp2p.dcutr._machine import CONNECT_TIMEOUT, SYNC_TIMEOUT, Reason
from kas_libp2p.dcutr._messages import MAX_MESSAGE, Connect, Sync, encode
from kas_libp2p.dcutr.service import PEER_BURST as ATTEMPTS_AT_ONCE
from kas_libp2p.dcutr.service import PEER_INTERVAL
from kas_libp2p.events import PeerMisbehaved, PunchEnded, PunchStarted
from kas_libp2p.framing import encode_varint, frame
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT
from kas_libp2p.pb import dcutr_pb2 as pb
from kas_libp2p.transport._punch import WINDOW
from kas_libp2p.transport.connection import Connection
from tests.dcutr.world import (
    BOB_AT,
    CAROL,
    CAROL_AT,
    ROUND_TRIP,
    Dialed,
    Peer,
    Script,
    World,
    circuit,
    inviting,
    scripted,
    world,
)

MALLORY_AT = "/ip4/11.66.0.1/tcp/16117"
VICTIM = "/ip4/11.99.0.1/tcp/16117"
Attack = Callable[[Script], Awaitable[None]]


class Scene:
    """A node, a witness who comes to it through a relay, and mallory.

    Attributes:
        node: who is attacked.
        inward: mallory's end of the circuit that it made: it may be invited there.
        outward: mallory's end of the circuit that the node made to it: it may invite there.
        to_mallory: the node's end of the first.
    """

    def __init__(self, here: World, node: Peer, mallory: Peer) -> None:
        self.here = here
        self.node = node
        self.mallory = mallory
        self.witness: Connection
        self.inward: Connection
        self.to_mallory: Connection
        self.outward: Connection

    def dialed(self) -> list[Dialed]:
        """What the node dialed because of mallory, or of others like it."""
        return [each for each in self.node.dialed if each.peer != CAROL.peer_id]

    def ended(self) -> list[PunchEnded]:
        return [each for each in self.node.bus.of(PunchEnded) if each.peer != CAROL.peer_id]

    async def usual(self) -> None:
        """The witness is punched to, as ever."""
        outcome = await self.node.service.invite(self.witness)
        assert outcome.reason is Reason.PUNCHED
        assert outcome.seconds == pytest.approx(1.5 * ROUND_TRIP)

    async def gather(self, attack: Callable[[], Awaitable[None]]) -> None:
        """Let the attack and the witness meet."""
        await self.usual()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attack)
            await self.usual()
            await trio.sleep(0.3)
            await self.usual()


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with world() as here:
        found = Scene(here, here.bob, here.peer(Identity.from_seed(bytes([66]) * 32), MALLORY_AT))
        carol = here.peer(CAROL, CAROL_AT)
        found.node.known[carol.id] = Known(observed=(CAROL_AT,))
        carol.known[found.node.id] = Known(observed=(BOB_AT,))
        found.witness = (await circuit(carol, found.node))[1]
        found.inward, found.to_mallory = await circuit(found.mallory, found.node)
        _, found.outward = await circuit(found.node, found.mallory)
        yield found
        assert not found.node.service.is_punching(found.mallory.id)
        assert not found.to_mallory.streams
        assert found.inward.close_reason is None  # what is behind a stream is not touched


def saying(data: bytes, *, end: bool = False) -> Attack:
    """Says something, and then nothing more."""

    async def say(script: Script) -> None:
        await script.stream.send_all(data)
        if end:
            await script.stream.send_eof()
        while await script.hear() is not None:
            pass

    return say


CONNECT = encode(Connect((MALLORY_AT,)))
MALFORMED = {
    "SYNC first": saying(encode(Sync())),
    "CONNECT twice": saying(CONNECT * 2),
    "junk": saying(frame(b"\xff" * 9)),
    "an empty message": saying(frame(b"")),
    "an unknown type": saying(frame(b"\x08\x63")),
    "4097 bytes": saying(encode_varint(MAX_MESSAGE + 1)),
    "2^62 bytes": saying(encode_varint(1 << 62)),
    "a varint of ten bytes": saying(b"\xff" * 10),
    "half a message": saying(CONNECT[:5], end=True),
}

# As one who invites


@pytest.mark.parametrize("attack", MALFORMED.values(), ids=MALFORMED)
async def test_a_broken_invitation(attack: Attack, autojump_clock: MockClock) -> None:
    async with scene() as here:

        async def attacks() -> None:
            began = trio.current_time()
            await attack(await inviting(here.outward))
            assert trio.current_time() - began == pytest.approx(ROUND_TRIP)  # reset at once

        await here.gather(attacks)
        assert here.dialed() == []
        assert [each.reason for each in here.ended()] == [Reason.PROTOCOL]
        [told] = here.node.bus.of(PeerMisbehaved)
        assert (told.peer, told.layer) == (here.mallory.id, "/libp2p/dcutr")


@pytest.mark.parametrize(
    ("data", "seconds"),
    [(b"", CONNECT_TIMEOUT), (CONNECT[:5], CONNECT_TIMEOUT), (CONNECT, SYNC_TIMEOUT)],
    ids=["nothing", "half a CONNECT", "no SYNC"],
)
async def test_an_invitation_that_stalls(data: bytes, seconds: float, autojump_clock: MockClock) -> None:
    async with scene() as here:

        async def attacks() -> None:
            began = trio.current_time()
            await saying(data)(await inviting(here.outward))
            assert trio.current_time() - began == pytest.approx(seconds + ROUND_TRIP)

        await here.gather(attacks)
        assert here.dialed() == []
        assert [each.reason for each in here.ended()] == [Reason.TIMEOUT]


async def test_on_a_direct_connection(autojump_clock: MockClock) -> None:
    async with scene() as here:
        inward, _ = await circuit(here.mallory, here.node, path=DIRECT)
        _, outward = await circuit(here.node, here.mallory, path=DIRECT)

        async def attacks() -> None:
            for connection in (inward, outward):
                script = await inviting(connection)
                await script.say(Connect((MALLORY_AT,)))
                assert await script.hear() is None

        await here.gather(attacks)
        assert here.dialed() == here.ended() == []
        assert [each.reason for each in here.node.bus.of(PeerMisbehaved)] == [
            "it invites to a punch on a direct connection"
        ] * 2
        assert inward.close_reason is outward.close_reason is None


async def test_from_the_side_that_made_the_circuit(autojump_clock: MockClock) -> None:
    async with scene() as here:

        async def attacks() -> None:
            script = await inviting(here.inward)
            await script.say(Connect((MALLORY_AT,)))
            assert await script.hear() is None

        await here.gather(attacks)
        assert here.dialed() == here.ended() == []
        assert len(here.node.bus.of(PeerMisbehaved)) == 1


async def invite(connection: Connection, *told: str) -> None:
    """One invitation, to its end."""
    script = await inviting(connection)
    await script.say(Connect(told))
    if await script.hear() is not None:
        await script.say(Sync())
        await script.stream.send_eof()
        await script.hear()


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.168.1.1/tcp/16117",
        "/ip4/100.64.0.1/tcp/16117",
        "/ip6/::ffff:192.168.1.1/tcp/16117",
        "/ip6/fd00::1/tcp/16117",
        "/ip4/127.0.0.1/tcp/16117",
        "/ip6/::1/tcp/16117",
        "/ip4/224.0.0.1/tcp/16117",
        "/ip4/255.255.255.255/tcp/16117",
        "/ip4/240.0.0.1/tcp/16117",
        "/ip4/0.0.0.0/tcp/16117",
        "/ip4/11.66.0.1/tcp/0",
        "/ip4/11.66.0.1/tcp/25",
        "/ip4/11.66.0.1/tcp/1023",
        "/dns4/router.example.org/tcp/16117",
    ],
)
async def test_an_address_that_is_never_dialed(address: str, autojump_clock: MockClock) -> None:
    """Whichever side names it, and whoever else says so."""
    async with scene() as here:
        here.node.known[here.mallory.id] = Known(observed=(address,), identified=(address,))
        here.node.identified = (address,)
        here.mallory.own = Own()

        async def talk(script: Script) -> None:
            await script.hear()
            await script.say(Connect((address,)))
            await script.hear()

        async def attacks() -> None:
            await invite(here.outward, address)
            scripted(here.mallory, talk)
            await here.node.service.invite(here.to_mallory)

        await here.gather(attacks)
        assert here.dialed() == []
        assert [each.reason for each in here.ended()] == [Reason.NO_CANDIDATES] * 2


async def test_500_addresses_and_the_same_one_a_hundred_times(autojump_clock: MockClock) -> None:
    async with scene() as here:
        many = [addr.from_ip_port(f"11.70.0.{n % 250 + 1}", 2000 + n).to_bytes() for n in range(500)]
        oversized = pb.HolePunch(type=pb.HolePunch.CONNECT, addrs=many).SerializeToString()
        fits = pb.HolePunch(type=pb.HolePunch.CONNECT, addrs=many[:400]).SerializeToString()
        assert len(oversized) > MAX_MESSAGE >= len(fits)

        async def attacks() -> None:
            for message in (oversized, fits):
                script = await inviting(here.outward)
                await script.stream.send_all(frame(message))
                if await script.hear() is not None:
                    await script.say(Sync())
                    await script.stream.send_eof()
                    await script.hear()
            await invite(here.outward, *[VICTIM] * 100)

        await here.gather(attacks)
        first, second = here.dialed()
        assert len(first.targets) == MAX_UNTRUSTED
        assert second.addresses == (VICTIM,)
        assert len(here.node.bus.of(PeerMisbehaved)) == 1


async def test_a_victim_s_address(autojump_clock: MockClock) -> None:
    """A crowd names it on every occasion, at every port, and it is dialed twice; once more after some minutes."""
    async with scene() as here:
        crowd = [here.here.peer(Identity.from_seed(bytes([150 + n]) * 32), MALLORY_AT) for n in range(5)]
        ends = [here.outward] + [(await circuit(here.node, each))[1] for each in crowd]
        for each in (here.mallory, *crowd):
            here.node.known[each.id] = Known(observed=(MALLORY_AT.replace("16117", "2000"),))

        async def attacks() -> None:
            for port in range(2000, 2006):
                for end in ends:
                    await invite(end, VICTIM.replace("16117", str(port)), MALLORY_AT)

        await here.gather(attacks)
        hits = [each for dialed in here.dialed() for each in dialed.addresses if "11.99.0.1" in each]
        assert len(hits) == HOST_BURST
        assert all(not target.trusted for each in here.dialed() for target in each.targets if "11.99" in str(target))
        assert here.node.bus.of(PunchStarted)[-1].refused.get("budget") or len(ends) > len(hits)
        before = len(here.dialed())
        await trio.sleep(HOST_INTERVAL)
        for end in ends:
            await invite(end, VICTIM)
        again = [each for dialed in here.dialed()[before:] for each in dialed.addresses if "11.99.0.1" in each]
        assert len(again) <= HOST_BURST


async def test_a_victim_s_address_by_a_relay_that_lies(autojump_clock: MockClock) -> None:
    """It says that all of its peers are there, and has a new one each time."""
    async with scene() as here:
        began = trio.current_time()

        async def attacks() -> None:
            for number in range(100):
                each = here.here.peer(Identity.from_seed(bytes([150, number]) + bytes(30)), MALLORY_AT)
                here.node.known[each.id] = Known(observed=(VICTIM,))
                await invite((await circuit(here.node, each))[1], VICTIM)
                await trio.sleep(1)

        await here.gather(attacks)
        seconds = trio.current_time() - began
        targets = [target for each in here.dialed() for target in each.targets]
        assert VOUCHED_BURST <= sum(each.trusted for each in targets) <= VOUCHED_BURST + seconds / VOUCHED_INTERVAL
        assert sum(not each.trusted for each in targets) <= HOST_BURST + seconds / HOST_INTERVAL


async def test_many_victims_addresses_by_a_relay_that_lies(autojump_clock: MockClock) -> None:
    """Each of its peers is somewhere else, and is new."""
    async with scene() as here:
        began = trio.current_time()

        async def attacks() -> None:
            for number in range(200):
                each = here.here.peer(Identity.from_seed(bytes([150, number]) + bytes(30)), MALLORY_AT)
                here.node.known[each.id] = Known(observed=(f"/ip4/11.99.{number}.1/tcp/16117",))
                await invite((await circuit(here.node, each))[1])
                await trio.sleep(0.2)

        await here.gather(attacks)
        targets = [target for each in here.dialed() for target in each.targets]
        by_carol = 10
        most = RELAY_BURST + (trio.current_time() - began) / RELAY_INTERVAL
        assert most - by_carol <= sum(each.trusted for each in targets) <= most


async def test_a_scan_through_us(autojump_clock: MockClock) -> None:
    """Another stranger in each invitation."""
    async with scene() as here:
        strangers = [f"/ip4/11.80.{n}.1/tcp/16117" for n in range(100)]

        async def attacks() -> None:
            while strangers:
                await invite(here.outward, *[strangers.pop() for _ in range(4)])
                await trio.sleep(0.1)

        await here.gather(attacks)
        assert sum(len(each.targets) for each in here.dialed()) <= PEER_BURST


async def test_one_that_asks_every_second(autojump_clock: MockClock) -> None:
    async with scene() as here:
        here.node.known[here.mallory.id] = Known(observed=(MALLORY_AT,))
        seconds = 60

        async def attacks() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(seconds):
                    nursery.start_soon(invite, here.outward, MALLORY_AT)
                    await trio.sleep(1)

        await here.gather(attacks)
        assert len(here.dialed()) == ATTEMPTS_AT_ONCE + (seconds - 1) // PEER_INTERVAL
        refused = here.node.bus.counts["punch-ended", "rate"]
        assert refused == seconds - len(here.dialed())
        await here.node.service.invite(here.to_mallory)  # nor do we ask it more often
        assert here.node.bus.counts["punch-ended", "rate"] == refused + 1
        await trio.sleep(WINDOW)


async def test_two_punches_to_one_peer_at_once(autojump_clock: MockClock) -> None:
    """The world's `punch` asserts that there is never more than one."""
    async with scene() as here:
        here.node.known[here.mallory.id] = Known(observed=(MALLORY_AT,))

        async def attacks() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(invite, here.outward, MALLORY_AT)
                nursery.start_soon(here.node.service.invite, here.to_mallory)

        scripted(here.mallory, saying(b""))
        await here.gather(attacks)
        assert 1 <= len(here.dialed()) <= 4
        assert {each.reason for each in here.ended()} <= {Reason.BUSY, Reason.PUNCH_FAILED, Reason.TIMEOUT}
        await trio.sleep(CONNECT_TIMEOUT)


# As one who is invited


@pytest.mark.parametrize(
    "name", ["SYNC first", "CONNECT twice", "junk", "an empty message", "4097 bytes", "2^62 bytes", "half a message"]
)
async def test_a_broken_answer(name: str, autojump_clock: MockClock) -> None:
    async with scene() as here:
        here.node.known[here.mallory.id] = Known(observed=(MALLORY_AT,))
        scripted(here.mallory, MALFORMED[name])

        async def attacks() -> None:
            outcome = await here.node.service.invite(here.to_mallory)
            assert outcome.reason is Reason.PROTOCOL
            assert outcome.connection is None

        await here.gather(attacks)
        assert all(each.began is None for each in here.dialed())
        [told] = here.node.bus.of(PeerMisbehaved)
        assert (told.peer, told.layer) == (here.mallory.id, "/libp2p/dcutr")


async def test_a_round_trip_that_is_forged(autojump_clock: MockClock) -> None:
    """Short, by answering the next CONNECT before it is there; or long, by waiting, which harms who waits."""
    async with scene() as here:
        here.node.known[here.mallory.id] = Known(observed=(MALLORY_AT,))

        async def early(script: Script) -> None:
            await script.hear()
            await script.say(Connect((MALLORY_AT,)))
            await script.hear()
            await script.say(Connect((MALLORY_AT,)))
            await script.hear()

        async def late(script: Script) -> None:
            await script.hear()
            await trio.sleep(9)
            await script.say(Connect((MALLORY_AT,)))
            await script.hear()
            script.stream.reset()
            here.mallory.protocols = []

        async def attacks() -> None:
            scripted(here.mallory, early)
            outcome = await here.node.service.invite(here.to_mallory)
            assert (outcome.reason, outcome.attempts) == (Reason.PROTOCOL, 1)
            assert outcome.rtt == pytest.approx(ROUND_TRIP)
            scripted(here.mallory, late)
            outcome = await here.node.service.invite(here.to_mallory)
            assert outcome.reason is Reason.PUNCH_FAILED

        await here.gather(attacks)
        second = here.dialed()[1]
        assert second.at - second.called == pytest.approx((9 + ROUND_TRIP) / 2)
