from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_pair

from kas_libp2p.errors import ConnectionLost, GrpcError, LocalProtocolError
from kas_libp2p.kaspa import p2p_pb2
from kas_libp2p.kaspa.channel import BATCH, HIGH_WATER, MemoryChannel, Piece, memory_channel_pair, running
from kas_libp2p.kaspa.dialect import REFERENCE
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.messages import MessagesChannel
from kas_libp2p.kaspa.pump import LINGER, Pump, PumpEnd, Stuck

from .overlay import overlay_pair
from .test_channel import cut
from .test_messages import receiver_knows


class Rig:
    """alice <-> left =pump= right <-> bob"""

    def __init__(self, **options: int) -> None:
        self.alice, self.left = memory_channel_pair(**options)
        self.right, self.bob = memory_channel_pair(**options)
        self.end: PumpEnd | None = None

    async def run(self, nursery: trio.Nursery, **options: object) -> Pump:
        pump = Pump(self.left, self.right, **options)  # type: ignore[arg-type]

        async def go() -> None:
            self.end = await pump.run()

        nursery.start_soon(go)
        return pump


def reject(reason: str) -> bytes:
    return p2p_pb2.KaspadMessage(reject=p2p_pb2.Reject(reason=reason)).SerializeToString()


@given(
    there=st.lists(st.binary(max_size=400), max_size=6),
    back=st.lists(st.binary(max_size=400), max_size=6),
    sizes=st.lists(st.integers(1, 90), max_size=5),
    batch=st.integers(1, 200),
    high_water=st.integers(1, 500),
)
def test_both_ways_whatever_the_batches(
    there: list[bytes], back: list[bytes], sizes: list[int], batch: int, high_water: int
) -> None:
    got: dict[bool, list[bytes]] = {True: [], False: []}
    flows = []

    async def main() -> None:
        rig = Rig(batch=batch, high_water=high_water)
        async with trio.open_nursery() as nursery:
            pump = await rig.run(nursery)

            async def send(channel: MemoryChannel, messages: list[bytes]) -> None:
                for message in messages:
                    await channel.send_pieces(cut(message, sizes))

            async def receive(channel: MemoryChannel, count: int, into: list[bytes]) -> None:
                for _ in range(count):
                    message = await channel.receive()
                    assert message is not None
                    into.append(message)

            async with trio.open_nursery() as inner:
                inner.start_soon(send, rig.alice, there)
                inner.start_soon(send, rig.bob, back)
                inner.start_soon(receive, rig.bob, len(there), got[True])
                inner.start_soon(receive, rig.alice, len(back), got[False])
            await trio.testing.wait_all_tasks_blocked()
            flows.extend([pump.from_left, pump.from_right])
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert got == {True: there, False: back}
    for flow, messages in zip(flows, (there, back), strict=True):
        assert (flow.messages, flow.bytes) == (len(messages), sum(map(len, messages)))
        assert flow.waiting_since is None


async def test_back_pressure_goes_through(autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    sent = 0
    async with trio.open_nursery() as nursery:
        pump = await rig.run(nursery)

        async def send() -> None:
            nonlocal sent
            for _ in range(100):
                await rig.alice.send(bytes(100_000))
                sent += 1

        nursery.start_soon(send)
        await trio.sleep(20)
        assert sent * 100_000 <= 2 * HIGH_WATER + BATCH + 200_000
        assert pump.from_left.waiting_since == 0.0
        for _ in range(100):
            await rig.bob.receive()
        await trio.testing.wait_all_tasks_blocked()
        assert sent == 100
        assert pump.from_left.waiting_since is None
        nursery.cancel_scope.cancel()


async def test_an_end_in_order_is_passed_on_and_what_crosses_it_arrives(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await rig.alice.send(b"bye")
        await rig.alice.send_eof()
        assert await rig.bob.receive() == b"bye"
        assert await rig.bob.receive() is None
        await rig.bob.send(b"one last word")
        assert await rig.alice.receive() == b"one last word"
    assert trio.current_time() == LINGER
    assert rig.end == PumpEnd(True, None)


async def test_a_node_that_left_has_no_use_for_what_is_said_to_it(autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await rig.bob.send(b"bye")
        await rig.bob.send_eof()
    assert await rig.alice.receive() == b"bye"
    assert trio.current_time() == 0
    assert rig.end == PumpEnd(False, None)


@pytest.mark.parametrize("by_left", [True, False])
async def test_any_other_end_ends_both_at_once(by_left: bool, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await trio.testing.wait_all_tasks_blocked()
        await (rig.alice if by_left else rig.bob).aclose("a reason")
    assert trio.current_time() == 0
    assert rig.end is not None
    assert rig.end.by_left is by_left
    assert isinstance(rig.end.error, ConnectionLost)
    assert "a reason" in str(rig.end.error)


async def test_why_a_side_ended_comes_from_its_own_mouth(autojump_clock: trio.testing.MockClock) -> None:
    """A send fails first, without a reason; the receiving direction knows the status."""
    rig = Rig()

    async def broken(pieces: object) -> None:
        raise ConnectionLost("something broke")

    async def status() -> list[Piece]:
        await trio.sleep(LINGER / 2)
        raise GrpcError(8, "too many")

    rig.right._send_batch = broken  # type: ignore[method-assign]
    rig.right._receive_batch = status  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await rig.alice.send(b"x")
    assert rig.end is not None
    assert not rig.end.by_left
    assert isinstance(rig.end.error, GrpcError)


async def test_a_message_that_the_other_side_does_not_take_is_its_senders_fault(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig = Rig()
    rig.right.max_message = 100
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await rig.alice.send(bytes(101))
    assert rig.end is not None
    assert rig.end.by_left
    assert isinstance(rig.end.error, LocalProtocolError)


async def test_a_side_that_takes_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        await rig.run(nursery, right_stuck_after=30.0)
        for _ in range(6):
            await rig.alice.send(bytes(HIGH_WATER // 2))
    assert 30 <= trio.current_time() <= 35
    assert rig.end is not None
    assert not rig.end.by_left
    assert isinstance(rig.end.error, Stuck)


@pytest.mark.parametrize("from_left", [True, False])
async def test_rejects_are_passed_on_and_noted(from_left: bool, autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    source, sink = (rig.alice, rig.bob) if from_left else (rig.bob, rig.alice)
    async with trio.open_nursery() as nursery:
        await rig.run(nursery)
        await source.send(b"\xb2\x01 is no reject although it looks like one")
        await source.send(reject("DUPLICATE_CONNECTION"))
        await sink.receive()
        await source.send_eof()
        assert await sink.receive() == reject("DUPLICATE_CONNECTION")
    assert rig.end == PumpEnd(from_left, None, ("DUPLICATE_CONNECTION", from_left))


async def test_the_watch_sees_messages_until_it_has_enough(autojump_clock: trio.testing.MockClock) -> None:
    rig = Rig()
    seen = []

    def watch(from_left: bool, number: int | None) -> bool:
        seen.append((from_left, number))
        return len(seen) < 3

    async with trio.open_nursery() as nursery:
        await rig.run(nursery, watch=watch)
        for message in (
            p2p_pb2.KaspadMessage(verack=p2p_pb2.Empty()),
            p2p_pb2.KaspadMessage(ready=p2p_pb2.Empty(), request_id=7),
            p2p_pb2.KaspadMessage(),
            p2p_pb2.KaspadMessage(ready=p2p_pb2.Empty()),
        ):
            await rig.alice.send(message.SerializeToString())
            await rig.bob.receive()
        nursery.cancel_scope.cancel()
    assert seen == [(True, 19), (True, 50), (True, None)]


async def test_through_two_pumps_and_the_dialect(autojump_clock: trio.testing.MockClock) -> None:
    """As two bridges are: node, pump, overlay, pump, node; with a message that fits no buffer."""
    near, left_in = memory_channel_pair()
    right_in, far = memory_channel_pair()
    one, other = overlay_pair(window=65536)
    async with trio.open_nursery() as nursery:
        left, right = MessagesChannel(one), MessagesChannel(other)
        await nursery.start(left.run)
        await nursery.start(right.run)
        await receiver_knows(left, right)
        nursery.start_soon(Pump(left_in, left).run)
        nursery.start_soon(Pump(right, right_in).run)
        large = bytes(range(256)) * 40_000
        nursery.start_soon(near.send, large)
        nursery.start_soon(far.send, large)
        assert await far.receive() == large
        assert await near.receive() == large
        nursery.cancel_scope.cancel()


async def test_a_large_compressed_message_passes_as_it_is(autojump_clock: trio.testing.MockClock) -> None:
    """From a foreign peer, which packs whatever it says, to a kaspad: no bridge has to know how large it is."""
    alice, left = (
        make(end, settings=REFERENCE)
        for make, end in zip((GrpcChannel.client, GrpcChannel.server), overlay_pair(), strict=True)
    )
    right, bob = (
        make(end, passes_gzip=True)
        for make, end in zip((GrpcChannel.client, GrpcChannel.server), memory_stream_pair(), strict=True)
    )
    message = bytes(1 << 20) + random.Random(1).randbytes(1 << 20)
    async with running(alice), running(left), running(right), running(bob), trio.open_nursery() as nursery:
        await alice.send(b"hello")  # and the request with it, which says what is understood
        assert await left.receive() == b"hello"
        pump = Pump(left, right)
        nursery.start_soon(pump.run)
        nursery.start_soon(alice.send, message)
        assert await bob.receive() == message
        assert 1 << 20 < pump.from_left.bytes < len(message)
        nursery.start_soon(bob.send, message)
        assert await alice.receive() == message
        nursery.cancel_scope.cancel()
