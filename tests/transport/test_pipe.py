"""A connection on a stream of another connection: what a relay's stream is once it has become a circuit.

Alice and bob have a connection, on one stream of which carol (at alice's end) and dave (at bob's) have theirs. Who of
the two is the relay matters to the words only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import Config
from kas_libp2p.errors import CircuitEnded, ConnectionLost, StreamReset
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import Path, PathKind
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.pipe import CircuitPipe
from kas_libp2p.transport.raw import RawConnection
from kas_libp2p.transport.upgrade import upgrade
from kas_libp2p.transport.yamux.stream import YamuxStream
from kas_libp2p.units import short
from tests.transport.pairs import ALICE, BOB, Pair, connected

CAROL, DAVE = (Identity.from_seed(bytes([n]) * 32) for n in (3, 4))
INNER = "/inner/1"
DATA = bytes(range(256)) * 1024
"""As much as a window."""


@dataclass
class Circuit:
    """The pair under it, both ends of the circuit, and the streams that it is made of."""

    pair: Pair
    here: CircuitPipe
    there: CircuitPipe
    streams: tuple[YamuxStream, YamuxStream]


@asynccontextmanager
async def circuit(
    *,
    delay: float = 0.0,
    max_bytes: int | None = None,
    max_seconds: float | None = None,
    config: Config | None = None,
) -> AsyncIterator[Circuit]:
    async with connected(delay=delay, alice=config, bob=config) as pair:
        mine, theirs = await pair.streams()
        await mine.send_all(b"may I?")
        assert await theirs.receive_some() == b"may I?"
        await theirs.send_all(b"OK")
        assert await mine.receive_some() == b"OK"
        here = CircuitPipe(mine, BOB.peer_id, max_bytes=max_bytes, max_seconds=max_seconds)
        there = CircuitPipe(theirs, ALICE.peer_id)
        yield Circuit(pair, here, there, (mine, theirs))


class Inner:
    """Carol's and dave's connection, which runs."""

    def __init__(self, carol: Connection, dave: Connection, arrived: trio.MemoryReceiveChannel[YamuxStream]) -> None:
        self.carol = carol
        self.dave = dave
        self._arrived = arrived

    async def streams(self) -> tuple[YamuxStream, YamuxStream]:
        mine = await self.carol.open_stream(INNER)
        theirs = await self._arrived.receive()
        await self.dave.accept(theirs, (INNER,))
        return mine, theirs


@asynccontextmanager
async def inner(over: Circuit) -> AsyncIterator[Inner]:
    ends: dict[str, Connection] = {}

    async def shake(name: str, raw: RawConnection, identity: Identity, relay: Identity, initiator: bool) -> None:
        ends[name] = await upgrade(
            raw,
            identity=identity,
            initiator=initiator,
            expected=(DAVE if initiator else CAROL).peer_id,
            config=Config(),
            path=Path(PathKind.RELAYED, relay.peer_id),
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake, "carol", over.here, CAROL, BOB, True)
        nursery.start_soon(shake, "dave", over.there, DAVE, ALICE, False)
    send, receive = trio.open_memory_channel[YamuxStream](100)
    async with trio.open_nursery() as nursery:
        await nursery.start(ends["carol"].run, lambda stream: stream.reset())
        await nursery.start(ends["dave"].run, send.send_nowait)
        yield Inner(ends["carol"], ends["dave"], receive)
        nursery.cancel_scope.cancel()


async def copy(source: YamuxStream, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await source.receive_some()
        assert piece
        data += piece
    return bytes(data)


async def test_a_connection_on_a_circuit(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        await mine.send_all(b"hello")
        assert await theirs.receive_some() == b"hello"
        await theirs.send_all(b"and back")
        assert await mine.receive_some() == b"and back"
        told = mine.metadata
        assert told.path == Path(PathKind.RELAYED, BOB.peer_id)
        assert told.peer == DAVE.peer_id
        assert told.remote_address == f"{over.pair.alice.remote_address}/p2p/{BOB.peer_id}/p2p-circuit"
        assert told.local_address == over.pair.alice.local_address
        assert over.pair.alice.circuit is None
        assert ends.carol.circuit is over.here


@pytest.mark.parametrize("window", [1 << 18, 1 << 24])
async def test_megabytes_in_both_directions_arrive_whole(window: int, autojump_clock: MockClock) -> None:
    data = bytes(range(256)) * 4096 * 3
    config = Config.from_mapping({"yamux": {"max_window": window}})
    async with circuit(delay=0.01, config=config) as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.send_all, data)
            nursery.start_soon(theirs.send_all, data[::-1])
            assert await copy(theirs, len(data)) == data
            assert await copy(mine, len(data)) == data[::-1]


async def test_a_reader_that_does_not_read_stalls_the_writer_and_nobody_else(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        with trio.move_on_after(1) as scope:
            await mine.send_all(bytes(1 << 22))
            await mine.send_all(bytes(1 << 22))
        assert scope.cancelled_caught
        other, arrived = await ends.streams()
        await other.send_all(b"x")
        assert await arrived.receive_some() == b"x"
        beside, below = await over.pair.streams()
        await beside.send_all(b"y")
        assert await below.receive_some() == b"y"
        assert await theirs.receive_some()


async def test_pieces_smaller_than_a_chunk_and_larger(autojump_clock: MockClock) -> None:
    async with circuit() as over:
        await over.here.send_all(b"abcdef")
        await over.there.wait_readable()
        small = bytearray(4)
        assert over.there.receive_nowait(memoryview(small)) == 4
        assert small == b"abcd"
        await over.here.send_all(b"ghi")
        await trio.testing.wait_all_tasks_blocked()
        large = bytearray(10)
        assert over.there.receive_nowait(memoryview(large)) == 5
        assert large[:5] == b"efghi"
        assert over.there.receive_nowait(memoryview(large)) is None


async def test_a_mistake_of_ours_on_a_circuit_ends_the_circuit_alone(autojump_clock: MockClock) -> None:
    def fail(_: YamuxStream) -> None:
        raise ZeroDivisionError

    async with circuit() as over:
        with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
            async with inner(over) as ends:
                ends.dave._on_stream = fail
                await ends.carol.open_stream(INNER)
                await trio.sleep_forever()
        assert ends.dave.close_reason == "an internal error on this side"
        beside, below = await over.pair.streams()
        await beside.send_all(b"y")
        assert await below.receive_some() == b"y"


async def test_a_relay_that_is_lost_while_its_circuit_is_read(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        await trio.testing.wait_all_tasks_blocked()
        await mine.send_all(bytes(200_000))
        over.pair.bob_raw._out.break_()  # so that granting what was read of the circuit fails
        assert len(await copy(theirs, 100_000)) >= 100_000
        with pytest.raises(ConnectionLost, match=r"the relay .* is gone"):
            await copy(theirs, 200_000)
        assert ends.dave.misbehaviour is None


async def test_what_is_sealed_together_is_taken_together(autojump_clock: MockClock) -> None:
    async with circuit() as over:
        size = 300_000
        pieces = list(iter(lambda: over.here.send_nowait(bytes(size)), 0))
        assert set(pieces) == {size}
        high_water = over.pair.alice.send_high_water
        assert high_water <= over.here._stream.unsent < high_water + size
        buffer = memoryview(bytearray(len(pieces) * size))
        count = 0
        while count < len(buffer):
            count += await over.there.receive_into(buffer[count:])
        await over.here.wait_writable()
        assert over.here.send_nowait(b"x") == 1


async def write(stream: YamuxStream) -> None:
    with suppress(ConnectionLost):
        await stream.send_all(DATA)


async def fill(over: Circuit, writers: list[YamuxStream], nursery: trio.Nursery) -> None:
    """Write more than the circuit has room for, while the relay's connection sends nothing."""
    with pytest.MonkeyPatch.context() as held:
        held.setattr(over.pair.alice, "flush", lambda: None)
        for writer in writers:
            nursery.start_soon(write, writer)
            await trio.testing.wait_all_tasks_blocked()
    assert over.here.full
    assert writers[-1].unsent == len(DATA)


async def test_what_a_circuit_has_no_room_for_is_not_sealed(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends, trio.open_nursery() as nursery:
        (first, one), (second, other) = await ends.streams(), await ends.streams()
        await fill(over, [first, second], nursery)
        assert ends.carol.sealed == 0
        over.pair.alice.flush()
        assert second.unsent < len(DATA)  # it went on in the relay's turn
        assert await copy(one, len(DATA)) == DATA
        assert await copy(other, len(DATA)) == DATA


async def test_a_mistake_of_ours_while_the_relay_is_flushing_ends_the_circuit_alone(autojump_clock: MockClock) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with circuit() as over:
        with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
            async with inner(over) as ends, trio.open_nursery() as nursery:
                writers = [(await ends.streams())[0] for _ in range(2)]
                await fill(over, writers, nursery)
                ends.carol._seal = fail  # type: ignore[method-assign]
                over.pair.alice.flush_soon()
                await trio.sleep_forever()
        assert ends.carol.close_reason == "an internal error on this side"
        beside, below = await over.pair.streams()
        await beside.send_all(b"y")
        assert await below.receive_some() == b"y"


async def test_the_end_of_one_direction(autojump_clock: MockClock) -> None:
    async with circuit() as over:
        await over.here.send_all(b"last words")
        over.here.send_eof()
        over.here.send_eof()
        buffer = memoryview(bytearray(100))
        assert await over.there.receive_into(buffer) == 10
        assert await over.there.receive_into(buffer) == 0
        with pytest.raises(trio.ClosedResourceError):
            over.here.send_nowait(b"more")
        await over.there.send_all(b"answer")
        assert await over.here.receive_into(buffer) == 6
        await over.there.aclose()
        assert over.there.closed
        assert not over.here.closed
        assert await over.here.receive_into(buffer) == 0
        with pytest.raises(trio.ClosedResourceError):
            over.there.receive_nowait(buffer)


async def test_closing_in_order_reaches_the_other_end(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        await mine.send_all(b"bye")
        await mine.aclose()
        await ends.carol.aclose("enough")
        assert await theirs.receive_some() == b"bye"
        await ends.dave.wait_closed()
        assert ends.dave.close_reason == "the peer closed it"
        assert over.here.closed
        assert over.there.closed
        assert over.pair.alice.close_reason is None
        assert not over.pair.alice.streams


async def test_aborting_is_seen_as_the_relays_reset(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        _, theirs = await ends.streams()
        ends.carol.abort("enough")
        with pytest.raises(ConnectionLost, match=f"the relay {short(ALICE.peer_id)} ended the circuit$"):
            await theirs.receive_some()
        await ends.dave.wait_closed()


async def test_the_loss_of_the_relay_ends_the_circuit_and_says_so(autojump_clock: MockClock) -> None:
    async with circuit() as over, inner(over) as ends:
        mine, _ = await ends.streams()
        over.pair.alice_raw.abort()
        over.pair.bob_raw.abort()
        with pytest.raises(ConnectionLost, match=f"the relay {short(BOB.peer_id)} is gone: the connection broke"):
            await mine.receive_some()
        assert over.here.closed


def everything(pipe: CircuitPipe) -> list[Coroutine[None, None, object]]:
    return [pipe.send_all(b"x"), pipe.wait_writable(), pipe.receive_into(memoryview(bytearray(1)))]


async def test_errors_after_the_loss(autojump_clock: MockClock) -> None:
    async with circuit() as over:
        over.pair.alice.abort("the cable was cut")
        for attempt in everything(over.here):
            with pytest.raises(ConnectionLost, match="is gone: the cable was cut"):
                await attempt
        over.here.send_eof()
        over.here.abort()
        await over.here.aclose()


async def test_errors_after_closing_here(autojump_clock: MockClock) -> None:
    async with circuit() as over:
        over.here.abort()
        for attempt in everything(over.here):
            with pytest.raises((trio.ClosedResourceError, StreamReset)):
                await attempt
        assert over.here.closed


async def test_limits_are_counted_down(autojump_clock: MockClock) -> None:
    async with circuit(max_bytes=1000, max_seconds=120) as over:
        limits = over.here.limits
        assert (limits.max_bytes, limits.bytes_left, limits.max_seconds, limits.seconds_left) == (1000, 1000, 120, 120)
        await over.here.send_all(bytes(300))
        await over.there.send_all(bytes(200))
        await over.here.receive_into(memoryview(bytearray(1000)))
        await trio.sleep(20)
        limits = over.here.limits
        assert (limits.bytes_left, limits.seconds_left) == (500, pytest.approx(100))
        await over.here.send_all(bytes(600))
        await trio.sleep(200)
        limits = over.here.limits
        assert (limits.bytes_left, limits.seconds_left) == (0, 0)
        unlimited = over.there.limits
        assert (unlimited.bytes_left, unlimited.seconds_left) == (None, None)


@pytest.mark.parametrize(
    ("max_bytes", "max_seconds", "wait", "why"),
    [
        (None, 120.0, 119.0, ": its 120 s are over"),
        (131072, None, 0.0, ": its 131 kB are used up"),
        (131072, 120.0, 0.0, ": its 131 kB are used up"),
        (1 << 24, 120.0, 10.0, ""),
        (None, None, 10.0, ""),
    ],
)
async def test_a_reset_at_a_limit_says_which(
    max_bytes: int | None, max_seconds: float | None, wait: float, why: str, autojump_clock: MockClock
) -> None:
    async with circuit(max_bytes=max_bytes, max_seconds=max_seconds) as over:
        await over.here.send_all(bytes(100_000))
        await trio.sleep(wait)
        over.streams[1].reset()
        with pytest.raises(CircuitEnded) as caught:
            await over.here.receive_into(memoryview(bytearray(1)))
        assert str(caught.value) == f"the relay {short(BOB.peer_id)} ended the circuit{why}"
        ended = {"s are": "max_seconds", "used": "max_bytes"}
        assert caught.value.limit == next((limit for words, limit in ended.items() if words in why), "")
        assert (caught.value.bytes_left, caught.value.seconds_left) == (
            None if max_bytes is None else max_bytes - 100_000,
            None if max_seconds is None else pytest.approx(max_seconds - wait),
        )


async def test_an_end_in_order_at_a_limit_is_the_relays(autojump_clock: MockClock) -> None:
    """go's relays end a direction when its bytes are used up, as if the peer had."""
    async with circuit(max_bytes=131072) as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        await mine.send_all(bytes(140_000))
        await copy(theirs, 140_000)
        over.streams[1].connection.finish(over.streams[1]._state)
        with pytest.raises(CircuitEnded, match=r"ended the circuit: its 131 kB are used up$") as caught:
            await mine.receive_some()
        assert (caught.value.relay, caught.value.limit, caught.value.bytes_left) == (BOB.peer_id, "max_bytes", 0)


async def test_a_peer_that_leaves_in_order_near_a_limit_has_left(autojump_clock: MockClock) -> None:
    async with circuit(max_bytes=131072) as over, inner(over) as ends:
        mine, theirs = await ends.streams()
        await mine.send_all(bytes(140_000))
        await copy(theirs, 140_000)
        await ends.dave.aclose()
        await ends.carol.wait_closed()
        assert ends.carol.close_reason == "the peer closed it"


async def test_what_others_send_on_the_relays_connection_delivers_nothing_of_ours(autojump_clock: MockClock) -> None:
    async with circuit(delay=1.0) as over:
        await trio.sleep(5)
        before = over.here.delivered()
        await over.here.send_all(bytes(1000))
        assert over.here.delivered() < before + 1000
        await trio.sleep(1.5)
        after = over.here.delivered()
        assert after >= before + 1000
        beside = await over.pair.alice.open_stream("/beside/1")
        await beside.send_all(bytes(5000))
        await trio.sleep(1.5)
        assert over.pair.alice.delivered >= after + 5000
        assert over.here.delivered() == after
