from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kas_libp2p.kaspa import p2p_pb2 as pb
from kas_libp2p.kaspa._join import payload_number
from kas_libp2p.kaspa._pacing import LONGEST, QUIET, RATE, ROUTE, Pacing
from kas_libp2p.kaspa.channel import BATCH, HIGH_WATER, MemoryChannel, Piece, memory_channel_pair
from kas_libp2p.kaspa.pump import Pump, Stuck

PING, INV, TRANSACTION, UNKNOWN = 16, 14, 3, 1000


def ping(nonce: int) -> bytes:
    return pb.KaspadMessage(ping=pb.Ping(nonce=nonce)).SerializeToString()


@given(numbers=st.lists(st.sampled_from([PING, INV, TRANSACTION, UNKNOWN, None]), max_size=2000))
def test_no_route_ever_holds_more_than_it_may_and_everything_passes(numbers: list[int | None]) -> None:
    """kaspad is played as it was assumed to be: each route is emptied at `RATE`."""
    pacing, now = Pacing(0.0), 0.0
    passed: dict[int, list[float]] = {}
    for number in numbers:
        while (pause := pacing.admit(number, now)) > 0:
            now += pause
        route = number if number is not None and number < 128 else 0
        passed.setdefault(route, []).append(now)
    for route, times in passed.items():
        held, at = 0.0, 0.0
        for each in times:
            held, at = max(0.0, held - (each - at) * RATE) + 1, each
            assert held <= ROUTE + 1e-6 or route == TRANSACTION
    assert now <= max(Counter(0 if n in (None, UNKNOWN) else n for n in numbers).values(), default=0) / RATE


def test_many_kinds_that_nobody_knows_are_one() -> None:
    pacing = Pacing(0.0)
    assert [pacing.admit(number, 0.0) > 0 for number in range(1000, 1000 + ROUTE + 1)] == [False] * ROUTE + [True]


def test_when_it_is_over() -> None:
    pacing = Pacing(100.0)
    assert not pacing.over(101.0, 0.0)
    assert pacing.over(101.0, QUIET)
    assert pacing.over(100.0 + LONGEST, 0.0)


class Rig:
    """A peer's channel, a pump, and a node's that is read as fast as it comes; when each message came."""

    def __init__(self) -> None:
        self.peer, self.left = memory_channel_pair()
        self.right, self.node = memory_channel_pair()
        self.arrived: list[tuple[float, bytes]] = []
        self.gaps = 0

    async def run(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(Pump(self.left, self.right).run)

        async def read() -> None:
            async for message in self.node:
                self.arrived.append((trio.current_time(), message))

        nursery.start_soon(read)

    async def burst(self, messages: list[bytes]) -> None:
        await self.peer.send_pieces([Piece.of(each) for each in messages])
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = Rig()
    monkeypatch.setattr(MemoryChannel, "gaps", property(lambda channel: rig.gaps if channel is rig.left else 0))
    return rig


async def test_a_backlog_after_a_gap_is_paced_and_nothing_else_is(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        first = [ping(n) for n in range(1000)]
        await rig.burst(first)
        assert [message for _, message in rig.arrived] == first, "without a gap all at once"
        assert trio.current_time() == 0
        rig.arrived.clear()
        await trio.sleep(30)
        rig.gaps = 1
        backlog = [ping(n) for n in range(1000, 2000)] + [b"\x1a\x02\x08\x01"] * 10
        assert payload_number(backlog[-1]) == TRANSACTION
        await rig.burst(backlog)
        assert len(rig.arrived) <= ROUTE
        await trio.sleep(QUIET + 1)
        assert [message for _, message in rig.arrived] == backlog, "whole, in order"
        for second in (0.0, 0.1, 0.3, 0.5):
            assert sum(at <= 30 + second for at, _ in rig.arrived) <= ROUTE + second * RATE + 1
        rig.arrived.clear()
        await rig.burst([ping(0)])  # after a pause: no backlog any more
        await rig.burst(first)
        assert len(rig.arrived) == 1001
        nursery.cancel_scope.cancel()


async def test_a_backlog_that_comes_in_flights_of_a_round_trip_is_paced_to_its_end(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    """On a path that is young each flight is twice the last one, and there is nothing between them."""
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        rig.gaps = 1
        for flight in (70, 140, 280, 560, 1120):
            await rig.burst([ping(n) for n in range(flight)])
            await trio.sleep(0.6)  # a long relayed round trip
        await trio.sleep(2)
        came = [at for at, _ in rig.arrived]
        assert len(came) == 70 + 140 + 280 + 560 + 1120
        for first in range(0, len(came) - ROUTE - 1, 10):
            for last in (first + ROUTE, len(came) - 1):
                assert last - first <= ROUTE + (came[last] - came[first]) * RATE + 1
        nursery.cancel_scope.cancel()


async def test_a_sync_is_not_held_up_for_long(rig: Rig, autojump_clock: trio.testing.MockClock) -> None:
    """A flood without a pause is no backlog after a while."""
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        rig.gaps = 1

        async def flood() -> None:
            for n in range(60_000):
                await rig.peer.send(bytes(ping(n)) + bytes([0x18, 1]) * 50)  # more than the channels hold

        nursery.start_soon(flood)
        await trio.sleep(LONGEST + BATCH / 103 / RATE)  # what was taken before is passed on as it began
        assert len(rig.arrived) == 60_000
        nursery.cancel_scope.cancel()


async def test_a_node_that_takes_nothing_of_a_backlog_is_given_up(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    pump = Pump(rig.left, rig.right, right_stuck_after=30.0)
    rig.gaps = 1
    size = HIGH_WATER // (ROUTE - 2)  # the channel is full just before the first pause, within a batch
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            rig.peer.send_pieces, [Piece.of(ping(n) + bytes([0x18, 1]) * (size // 2)) for n in range(2 * ROUTE)]
        )
        with trio.fail_after(60):
            end = await pump.run()
        nursery.cancel_scope.cancel()
    assert not end.by_left
    assert isinstance(end.error, Stuck)
