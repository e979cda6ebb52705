"""Two nodes' services on a circuit, from end to end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.dcutr._candidates import Known, Own
from kas_libp2p.dcutr._machine import CONNECT_TIMEOUT, Reason
from kas_libp2p.dcutr._messages import Connect, Sync
from kas_libp2p.dcutr.service import Outcome
from kas_libp2p.errors import LocalProtocolError, PunchFailed
from kas_libp2p.events import (
    PeerMisbehaved,
    PunchAttemptFailed,
    PunchConnect,
    PunchEnded,
    PunchStarted,
    PunchSync,
)
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import DIRECT, PeerId
from kas_libp2p.transport._punch import WINDOW
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.dcutr.world import ALICE_AT, BOB_AT, DELAY, RELAY, ROUND_TRIP, Script, circuit, inviting, scripted, world
from tests.memory import MemoryRaw


def raw_of(connection: Connection) -> MemoryRaw:
    return cast(MemoryRaw, connection._raw)


# One that works


async def test_at_one_and_a_half_round_trips_both_dial(autojump_clock: MockClock) -> None:
    async with world() as here:
        began = trio.current_time()
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.text, outcome.attempts) == (Reason.PUNCHED, "", 1)
        assert outcome.connection is here.to_alice
        assert outcome.rtt == pytest.approx(ROUND_TRIP)
        [alice], [bob] = here.alice.dialed, here.bob.dialed
        assert alice.began is not None
        assert alice.began - began == pytest.approx(1.5 * ROUND_TRIP)
        assert bob.began == pytest.approx(alice.began)
        assert bob.called - began == pytest.approx(ROUND_TRIP)  # time to get ready
        assert (alice.initiator, bob.initiator) == (True, False)
        assert (alice.relay, bob.relay) == (RELAY, RELAY)
        assert alice.addresses == (BOB_AT,)
        assert bob.addresses == (ALICE_AT,)
        assert here.bob.outcomes == [outcome]
        assert not here.bob.service.is_punching(here.alice.id)
        await trio.sleep(1)
        [invited] = here.alice.outcomes
        assert (invited.reason, invited.inviter, invited.attempts) == (Reason.PUNCHED, False, 1)
        assert not here.to_alice.streams
        assert not here.to_bob.streams


async def test_the_protocol_and_connect_leave_as_one(autojump_clock: MockClock) -> None:
    async with world() as here:
        bob = raw_of(here.to_alice)
        before = len(bob.writes)
        here.nursery.start_soon(here.bob.service.invite, here.to_alice)
        await trio.sleep(1.01 * DELAY)
        assert len(bob.writes) == before + 1
        theirs, ours = here.alice.bus.of(PunchConnect)
        assert (theirs.addresses, ours.addresses) == ((BOB_AT,), (ALICE_AT,))


async def test_a_circuit_that_is_slower_one_way_costs_half_of_the_difference(autojump_clock: MockClock) -> None:
    async with world() as here:
        raw_of(here.to_alice)._out.delay = 0.08  # type: ignore[attr-defined]
        raw_of(here.to_bob)._out.delay = 0.02  # type: ignore[attr-defined]
        began = trio.current_time()
        await here.bob.service.invite(here.to_alice)
        assert here.bob.dialed[0].at - began == pytest.approx(0.15)
        assert here.alice.dialed[0].at - began == pytest.approx(0.18)


async def test_what_is_told_of_it(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.bob.known[here.alice.id] = Known(observed=("/ip4/11.2.0.1/tcp/40001",))
        here.alice.own = Own(observed=(ALICE_AT,), listen=("/ip4/192.168.1.2/tcp/16117", "/ip6/2d00:2::1/tcp/16117"))
        here.bob.bus.events.clear()
        await here.bob.service.invite(here.to_alice)
        number, alice = here.to_alice.number, here.alice.id
        told = ("/ip6/2d00:2::1/tcp/16117", ALICE_AT)
        assert here.bob.bus.events == [
            PunchConnect(
                peer=alice, connection=number, by_us=True, attempt=1, addresses=(BOB_AT,), rtt=None, seconds=0.0
            ),
            PunchConnect(
                peer=alice,
                connection=number,
                by_us=False,
                attempt=1,
                addresses=told,
                rtt=pytest.approx(ROUND_TRIP),
                seconds=pytest.approx(ROUND_TRIP),
            ),
            PunchSync(peer=alice, connection=number, by_us=True, attempt=1, seconds=pytest.approx(ROUND_TRIP)),
            PunchStarted(
                peer=alice,
                connection=number,
                inviter=True,
                attempt=1,
                targets=("/ip4/11.2.0.1/tcp/40001", ALICE_AT, "/ip6/2d00:2::1/tcp/16117"),
                untrusted=("/ip6/2d00:2::1/tcp/16117",),
                refused={},
                wait=pytest.approx(DELAY),
                seconds=pytest.approx(ROUND_TRIP),
            ),
            PunchEnded(
                peer=alice,
                connection=number,
                inviter=True,
                reason="punched",
                text="",
                attempts=1,
                rtt=pytest.approx(ROUND_TRIP),
                seconds=pytest.approx(1.5 * ROUND_TRIP),
            ),
        ]
        assert here.bob.bus.counts["punch-ended", "punched"] == 1
        await trio.sleep(DELAY)
        names = [each.name for each in here.alice.bus.events]
        assert names == ["punch-connect", "punch-connect", "punch-sync", "punch-started", "punch-ended"]


# More attempts


async def test_another_attempt_on_the_same_stream_with_what_is_so_then(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.sky.fails = 1
        again = "/ip4/11.3.0.1/tcp/40002"

        async def move() -> None:
            await trio.sleep(1)
            here.bob.own = Own(observed=(again,))
            raw_of(here.to_alice)._out.delay = raw_of(here.to_bob)._out.delay = 0.2  # type: ignore[attr-defined]

        here.nursery.start_soon(move)
        served: list[YamuxStream] = []

        async def serve(stream: YamuxStream) -> None:
            served.append(stream)
            await here.alice.service.handle(stream)

        here.alice.handle = serve
        outcome = await here.bob.service.invite(here.to_alice)
        assert len(served) == 1
        assert (outcome.reason, outcome.attempts) == (Reason.PUNCHED, 2)
        assert outcome.rtt == pytest.approx(0.4)
        assert [each.addresses for each in here.alice.dialed] == [(BOB_AT,), (again,)]
        first, second = here.bob.dialed
        assert first.ended is not None
        assert second.at - first.ended == pytest.approx(1.5 * 0.4)
        assert here.alice.dialed[1].at == pytest.approx(second.at)


async def test_three_attempts_and_no_more(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.sky.fails = 100
        for peer, other, at in ((here.bob, here.alice, ALICE_AT), (here.alice, here.bob, BOB_AT)):
            peer.known[other.id] = Known(observed=(at,))
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts, outcome.connection) == (Reason.PUNCH_FAILED, 3, None)
        assert isinstance(outcome.failure, PunchFailed)
        assert outcome.seconds == pytest.approx(3 * (1.5 * ROUND_TRIP + WINDOW))
        assert len(here.bob.dialed) == len(here.alice.dialed) == 3
        assert len(here.bob.bus.of(PunchAttemptFailed)) == 3
        await trio.sleep(1)
        [invited] = here.alice.outcomes
        assert (invited.reason, invited.attempts) == (Reason.PUNCH_FAILED, 3)
        assert not here.to_bob.streams


async def test_a_punch_that_is_abandoned_as_an_attempt_fails_begins_no_other(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.sky.fails = 100
        told: list[tuple[PeerId, int, str]] = []

        def abandon(peer: PeerId, attempt: int, text: str) -> None:
            told.append((peer, attempt, text))
            here.bob.service.abandon(peer, "it is not worth it")

        here.bob.service.on_attempt_failed.append(abandon)
        here.alice.service.on_attempt_failed.append(abandon)
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.text, outcome.attempts) == (Reason.ABANDONED, "it is not worth it", 1)
        assert [each[:2] for each in told] == [(here.alice.id, 1)], "only who invited decides about more"
        await trio.sleep(WINDOW)
        assert len([each for each in here.alice.bus.of(PunchConnect) if not each.by_us]) == 1


async def test_where_nobody_else_has_seen_the_peer_two_attempts_are_made(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.sky.fails = 100
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts) == (Reason.PUNCH_FAILED, 3)
        assert len(here.bob.dialed) == len(here.alice.dialed) == 2


@pytest.mark.parametrize("in_order", [True, False], ids=["go", "rust"])
async def test_a_peer_that_ends_the_stream_behind_sync(in_order: bool, autojump_clock: MockClock) -> None:
    """go and rust as the invited."""
    async with world() as here:
        here.bob.known[here.alice.id] = Known(observed=(ALICE_AT,))
        streams = 0

        async def talk(script: Script) -> None:
            nonlocal streams
            streams += 1
            assert await script.hear() == Connect((BOB_AT,))
            await script.say(Connect((ALICE_AT,)))
            assert await script.hear() == Sync()
            if not in_order:
                script.stream.reset()

        scripted(here.alice, talk)
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts, streams) == (Reason.PUNCH_FAILED, 3, 3)
        assert len(here.bob.dialed) == 3


@pytest.mark.parametrize("waits", [True, False], ids=["go", "rust"])
async def test_a_peer_that_invites_on_a_new_stream_each_time(waits: bool, autojump_clock: MockClock) -> None:
    """go ends each stream behind SYNC and dials for longer than we do, rust dials for less."""
    async with world() as here:
        here.alice.known[here.bob.id] = Known(observed=(BOB_AT,))
        for _ in range(3):
            script = await inviting(here.to_alice)
            await script.say(Connect((BOB_AT,)))
            assert await script.hear() == Connect((ALICE_AT,))
            await script.say(Sync())
            await script.stream.aclose()
            await trio.sleep(WINDOW + 1 if waits else 0.5)
        await trio.sleep(WINDOW)
        assert len(here.alice.dialed) == 3
        expected = [Reason.PUNCH_FAILED] * 3 if waits else [Reason.BUSY, Reason.BUSY, Reason.PUNCH_FAILED]
        assert [each.reason for each in here.alice.bus.of(PunchEnded)] == expected
        assert [each.reason for each in here.alice.outcomes] == expected[-len(here.alice.outcomes) :]
        assert len(here.alice.outcomes) == (3 if waits else 1)
        assert here.alice.bus.of(PeerMisbehaved) == []


async def test_a_new_attempt_on_the_same_stream_while_we_still_dial(autojump_clock: MockClock) -> None:
    async with world() as here:
        script = await inviting(here.to_alice)
        for _ in range(2):
            await script.say(Connect((BOB_AT,)))
            assert await script.hear() == Connect((ALICE_AT,))
            await script.say(Sync())
            await trio.sleep(1)
        first, second = here.alice.dialed
        assert first.ended is not None
        assert first.ended < second.called
        assert here.alice.bus.of(PunchAttemptFailed) == []


@pytest.mark.parametrize("new_stream", [True, False])
async def test_a_punch_that_was_stopped_is_over_before_the_next_one_begins(
    new_stream: bool, autojump_clock: MockClock
) -> None:
    async with world() as here:
        here.alice.lingers = 0.5
        script = await inviting(here.to_alice)
        for _ in range(2):
            await script.say(Connect((BOB_AT,)))
            assert await script.hear() == Connect((ALICE_AT,))
            await script.say(Sync())
            await trio.sleep(1)
            if new_stream:
                script = await inviting(here.to_alice)
        first, second = here.alice.dialed
        assert first.ended is not None
        assert second.at < first.ended == second.called


# The peer has nothing to tell


async def test_a_connect_that_tells_nothing(autojump_clock: MockClock) -> None:
    """The reference overlay's: its listen addresses stand in identify, which is here a little later."""
    async with world() as here:
        here.alice.own = Own()
        here.bob.identified_after, here.bob.identified = 0.02, ("/ip4/192.168.1.2/tcp/1111", ALICE_AT)
        began = trio.current_time()
        outcome = await here.bob.service.invite(here.to_alice)
        assert outcome.reason is Reason.PUNCHED
        assert here.bob.dialed[0].addresses == (ALICE_AT,)
        assert here.bob.dialed[0].at - began == pytest.approx(1.5 * ROUND_TRIP + 0.02)
        assert here.alice.dialed[0].at == pytest.approx(here.bob.dialed[0].at)


async def test_a_connect_that_tells_nothing_and_a_relay_that_does(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.alice.own = Own()
        here.bob.known[here.alice.id] = Known(observed=(ALICE_AT,))
        here.bob.identified_after = 100
        outcome = await here.bob.service.invite(here.to_alice)
        assert outcome.reason is Reason.PUNCHED
        assert outcome.seconds == pytest.approx(1.5 * ROUND_TRIP)


async def test_nothing_is_known_of_the_peer_at_all(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.alice.own = Own()
        here.bob.identified_after = 100
        outcome = await here.bob.service.invite(here.to_alice)
        assert outcome.reason is Reason.NO_CANDIDATES
        assert outcome.seconds == pytest.approx(ROUND_TRIP + 1)
        assert here.bob.dialed == []
        await trio.sleep(2 * DELAY)
        assert here.alice.dialed[0].addresses == (BOB_AT,)  # it may get through to us


# Peers that do not want


async def test_a_peer_that_does_not_speak_it(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.alice.protocols = ["/other/1.0.0"]
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts) == (Reason.UNSUPPORTED, 1)
        assert outcome.seconds == pytest.approx(ROUND_TRIP)
        assert "/libp2p/dcutr" in outcome.text


async def _resets(script: Script) -> None:
    await script.hear()
    script.stream.reset()


async def _ends(script: Script) -> None:
    await script.hear()


@pytest.mark.parametrize("talk", [_resets, _ends])
async def test_a_peer_that_says_no(talk: Callable[[Script], Awaitable[None]], autojump_clock: MockClock) -> None:
    async with world() as here:
        scripted(here.alice, talk)
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts) == (Reason.REFUSED, 1)
        assert outcome.seconds == pytest.approx(ROUND_TRIP)


async def test_who_was_told_no_is_not_answered(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.alice.welcomes = False
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.attempts) == (Reason.REFUSED, 1)
        assert here.alice.bus.of(PunchConnect) == here.alice.dialed == []


async def test_a_circuit_that_ends_before_sync(autojump_clock: MockClock) -> None:
    async with world() as here:

        async def cut() -> None:
            await trio.sleep(DELAY)
            here.to_alice.abort("the relay has gone")

        here.nursery.start_soon(cut)
        outcome = await here.bob.service.invite(here.to_alice)
        assert (outcome.reason, outcome.text) == (Reason.LOST, "the relay has gone")
        again = await here.bob.service.invite(here.to_alice)
        assert again.reason is Reason.LOST


async def test_a_circuit_that_ends_behind_sync_is_not_needed_any_more(autojump_clock: MockClock) -> None:
    async with world() as here:
        here.alice.known[here.bob.id] = here.bob.known[here.alice.id] = Known()

        async def cut() -> None:
            await trio.sleep(1.4 * ROUND_TRIP)
            here.to_alice.abort("the relay has gone")

        here.nursery.start_soon(cut)
        raw_of(here.to_alice)._out.delay = 0.4 * ROUND_TRIP  # type: ignore[attr-defined]
        outcome = await here.bob.service.invite(here.to_alice)
        assert outcome.reason is Reason.PUNCHED


# One at a time


async def test_a_second_invitation_of_ours(autojump_clock: MockClock) -> None:
    async with world() as here:
        _, other = await circuit(here.alice, here.bob)
        outcomes: list[Outcome] = []

        async def invite(connection: Connection) -> None:
            outcomes.append(await here.bob.service.invite(connection))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(invite, here.to_alice)
            await trio.sleep(0.01)
            nursery.start_soon(invite, other)
        assert [each.reason for each in outcomes] == [Reason.BUSY, Reason.PUNCHED]
        assert len(here.alice.dialed) == 1


@pytest.mark.parametrize("alice_first", [0.0, 0.01, -0.01])
async def test_both_invite_each_other_at_once(alice_first: float, autojump_clock: MockClock) -> None:
    """On two circuits, one made by each."""
    async with world() as here:
        _, back = await circuit(here.bob, here.alice)
        outcomes: dict[str, Outcome] = {}

        async def invite(name: str, connection: Connection, wait: float) -> None:
            await trio.sleep(wait)
            peer = here.alice if name == "alice" else here.bob
            outcomes[name] = await peer.service.invite(connection)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(invite, "bob", here.to_alice, max(0.0, alice_first))
            nursery.start_soon(invite, "alice", back, max(0.0, -alice_first))
        smaller = min(here.alice, here.bob, key=lambda peer: peer.id)
        larger = here.alice if smaller is here.bob else here.bob
        first, second = ("alice", "bob") if smaller is here.alice else ("bob", "alice")
        assert outcomes[first].reason is Reason.PUNCHED
        assert outcomes[second].reason is Reason.BUSY
        assert len(here.alice.dialed) == len(here.bob.dialed) == 1
        assert smaller.dialed[0].initiator is False
        assert larger.dialed[0].initiator is True
        assert here.alice.bus.of(PeerMisbehaved) == here.bob.bus.of(PeerMisbehaved) == []


async def test_an_invitation_that_comes_while_ours_dials_is_refused(autojump_clock: MockClock) -> None:
    async with world() as here:
        back, there = await circuit(here.bob, here.alice)
        here.sky.fails = 100
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.bob.service.invite, here.to_alice)
            await trio.sleep(1)
            script = await inviting(there)
            await script.say(Connect((ALICE_AT,)))
            assert await script.hear() is None
            assert here.bob.bus.of(PunchEnded)[-1].reason == Reason.BUSY
            assert here.bob.outcomes == []
            nursery.cancel_scope.cancel()
        assert not back.streams


# Stopped from here


@pytest.mark.parametrize("who", ["alice", "bob"])
@pytest.mark.parametrize("after", [0.7 * ROUND_TRIP, 2 * ROUND_TRIP], ids=["before SYNC", "while dialing"])
async def test_abandoned_by_either_side_at_any_time(who: str, after: float, autojump_clock: MockClock) -> None:
    async with world() as here:
        here.sky.fails = 100
        peer, other = (here.alice, here.bob) if who == "alice" else (here.bob, here.alice)
        assert peer.service.abandon(other.id, "no") is False

        async def abandon() -> None:
            await trio.sleep(after)
            assert peer.service.abandon(other.id, "no") is True

        here.nursery.start_soon(abandon)
        began = trio.current_time()
        here.nursery.start_soon(here.bob.service.invite, here.to_alice)
        await trio.sleep(after + 0.001)
        assert [(each.reason, each.text) for each in peer.outcomes] == [(Reason.ABANDONED, "no")]
        assert all(each.ended is not None and each.ended - began == pytest.approx(after) for each in peer.dialed)
        assert not peer.service.is_punching(other.id)


async def test_an_invitation_that_is_cancelled_leaves_nothing(autojump_clock: MockClock) -> None:
    async with world() as here:
        for seconds in (0.2 * ROUND_TRIP, 1.2 * ROUND_TRIP, 1.4 * ROUND_TRIP):
            with trio.move_on_after(seconds):
                await here.bob.service.invite(here.to_alice)
            assert not here.bob.service.is_punching(here.alice.id)
            assert not here.to_alice.streams
            await trio.sleep(100)
            assert not here.to_bob.streams
            assert not here.alice.service.is_punching(here.bob.id)
        assert here.bob.outcomes == []


# Not from here


async def test_who_made_the_circuit_is_invited_and_does_not_invite(autojump_clock: MockClock) -> None:
    async with world() as here:
        with pytest.raises(LocalProtocolError):
            await here.alice.service.invite(here.to_bob)


async def test_nobody_invites_on_a_direct_connection(autojump_clock: MockClock) -> None:
    async with world(path=DIRECT) as here:
        with pytest.raises(LocalProtocolError):
            await here.bob.service.invite(here.to_alice)


async def test_many_at_once(autojump_clock: MockClock) -> None:
    """Fifty punches on one node take as long as one."""
    async with world() as here:
        peers = [
            here.peer(Identity.from_seed(bytes([100 + n]) * 32), f"/ip4/11.100.{n}.1/tcp/16117") for n in range(50)
        ]
        ends = [(await circuit(peer, here.bob))[1] for peer in peers]
        outcomes: list[Outcome] = []

        async def invite(connection: Connection) -> None:
            outcomes.append(await here.bob.service.invite(connection))

        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(invite, end)
        assert {each.reason for each in outcomes} == {Reason.PUNCHED}
        assert max(each.seconds for each in outcomes) == pytest.approx(1.5 * ROUND_TRIP)


async def test_silence_takes_its_time_and_no_more(autojump_clock: MockClock) -> None:
    async with world() as here:

        async def talk(script: Script) -> None:
            await trio.sleep_forever()

        scripted(here.alice, talk)
        outcome = await here.bob.service.invite(here.to_alice)
        assert outcome.reason is Reason.TIMEOUT
        assert outcome.seconds == pytest.approx(CONNECT_TIMEOUT)
        assert [each.name for each in here.bob.bus.events] == ["punch-connect", "punch-ended"]
