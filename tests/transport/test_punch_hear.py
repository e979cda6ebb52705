"""Who speaks first on a new connection, when that was agreed on and the other side may hold it otherwise."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import Config
from kas_libp2p.transport._multistream import HEADER, line
from kas_libp2p.transport._punch import DEADLOCK, GREETED
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.punch import hear
from kas_libp2p.transport.upgrade import NOTHING, Opening, upgrade
from tests.memory import MemoryRaw, memory_pair
from tests.transport.pairs import ALICE, BOB, Foreign

Other = Callable[[MemoryRaw], Awaitable[None]]
NOISE = line(b"/noise")
DELAY = 0.05


async def ours(raw: MemoryRaw, after_greeting: float = GREETED) -> Connection:
    """Hear, and do accordingly."""
    first, opening = await hear(raw, DEADLOCK, after_greeting=after_greeting)
    return await upgrade(raw, identity=ALICE, initiator=first, expected=BOB.peer_id, config=Config(), opening=opening)


async def greeting_responder(raw: MemoryRaw) -> None:
    """go's: it greets without being greeted."""
    foreign = Foreign(raw)
    await raw.send_all(HEADER)
    assert await foreign.read_exactly(len(HEADER + NOISE)) == HEADER + NOISE
    await raw.send_all(NOISE)
    foreign._handshake.read(await foreign.read_message())
    await raw.send_all(foreign._handshake.write())
    foreign._handshake.read(await foreign.read_message())


async def silent_responder(raw: MemoryRaw) -> None:
    """rust's."""
    await Foreign(raw).shake()


async def greeting_initiator(raw: MemoryRaw) -> None:
    """nim's, and py-libp2p's: it goes on when it is greeted."""
    foreign = Foreign(raw, initiator=True)
    for each in (HEADER[:7], HEADER[7:]):
        await raw.send_all(each)
    assert await foreign.read_exactly(len(HEADER)) == HEADER
    await raw.send_all(NOISE)
    assert await foreign.read_exactly(len(NOISE)) == NOISE
    await raw.send_all(foreign._handshake.write())
    foreign._handshake.read(await foreign.read_message())
    await raw.send_all(foreign._handshake.write())


async def hasty_initiator(raw: MemoryRaw) -> None:
    """Everybody else's."""
    await Foreign(raw, initiator=True).shake_first()


@pytest.mark.parametrize(
    ("other", "first", "seconds"),
    [
        (greeting_responder, True, DELAY + GREETED + 2 * DELAY),
        (silent_responder, True, DEADLOCK + 2 * DELAY),
        (greeting_initiator, False, 7 * DELAY),
        (hasty_initiator, False, 3 * DELAY),
    ],
)
async def test_whoever_the_other_side_is(autojump_clock: MockClock, other: Other, first: bool, seconds: float) -> None:
    here, there = memory_pair(delay=DELAY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other, there)
        started = trio.current_time()
        connection = await ours(here)
        assert (connection.peer, connection.initiator) == (BOB.peer_id, first)
        assert trio.current_time() - started == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("other", "first", "seconds"), [(greeting_responder, True, 3 * DELAY), (hasty_initiator, False, 3 * DELAY)]
)
async def test_one_who_is_to_be_spoken_to_may_greet(
    autojump_clock: MockClock, other: Other, first: bool, seconds: float
) -> None:
    here, there = memory_pair(delay=DELAY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other, there)
        started = trio.current_time()
        connection = await ours(here, 0.0)
        assert connection.initiator == first
        assert trio.current_time() - started == pytest.approx(seconds)


async def test_what_is_no_greeting_is_left_to_the_upgrade(autojump_clock: MockClock) -> None:
    here, there = memory_pair()
    await there.send_all(b"\x13/http")
    assert await hear(here, DEADLOCK, after_greeting=GREETED) == (False, Opening(b"\x13/http"))


async def test_it_hangs_up(autojump_clock: MockClock) -> None:
    here, there = memory_pair()
    await there.aclose()
    assert await hear(here, DEADLOCK, after_greeting=GREETED) == (False, NOTHING)


async def test_cancelled_it_is_closed(autojump_clock: MockClock) -> None:
    here, there = memory_pair()
    with trio.move_on_after(DEADLOCK / 2):
        await hear(here, DEADLOCK, after_greeting=GREETED)
    with pytest.raises(trio.BrokenResourceError):
        await there.receive_into(memoryview(bytearray(1)))
