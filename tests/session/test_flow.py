"""How what is written leaves: with what else there is, and without waiting for anything but room."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import KIB, MIB
from kas_libp2p.session._wire import HEADER_SIZE
from kas_libp2p.session.stream import SessionStream

from .sides import sides


async def read(stream: SessionStream, count: int) -> None:
    while count:
        count -= len(await stream.receive_some(count))


async def opened(ours: SessionStream, theirs: SessionStream) -> None:
    """Have all windows grow."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, theirs, 8 * MIB)
        await ours.send_all(bytes(8 * MIB))
    await trio.sleep(2)


@pytest.mark.parametrize(
    "sizes",
    [(100 * KIB, 200 * KIB), (1, 250 * KIB, 250 * KIB), (200 * KIB, 120 * KIB, 250 * KIB), (60 * KIB,) * 9],
    ids=str,
)
async def test_a_piece_too_large_for_the_room_beside_others_leaves_with_the_next(
    sizes: tuple[int, ...], autojump_clock: MockClock
) -> None:
    """And not when the peer acknowledges the others, a second later."""
    async with sides() as s:
        ours, theirs = await s.session()
        await opened(ours, theirs)
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, theirs, sum(sizes))
            for size in sizes:
                await ours.send_all(bytes(size))
        assert trio.current_time() - begun < 0.3


async def test_what_is_written_in_one_turn_shares_a_frame(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await opened(ours, theirs)
        before = ours.stream.sent
        for _ in range(40):
            await ours.send_all(bytes(5000))
        await read(theirs, 40 * 5000)
        heads = ours.stream.sent - before - 40 * 5000
        assert heads <= 2 * HEADER_SIZE, "the first one leaves at once, and the others together"


async def test_who_only_receives_acknowledges_seldom(autojump_clock: MockClock) -> None:
    async with sides() as s:
        ours, theirs = await s.session()
        await opened(ours, theirs)
        before = theirs.stream.sent
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, theirs, 64 * MIB)
            await ours.send_all(bytes(64 * MIB))
        assert theirs.stream.sent - before < 64 * 22
        await trio.sleep(2)
        assert ours.machine.in_flight == 0
