"""The cap on upload, with channels of either dialect."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.kaspa._liveness import ANSWER_WITHIN, PROBE_AFTER
from kas_libp2p.kaspa.channel import MessageChannel
from kas_libp2p.kaspa.dialect import REFERENCE
from kas_libp2p.kaspa.grpc import GrpcChannel
from kas_libp2p.kaspa.messages import MessagesChannel
from kas_libp2p.kaspa.upload import UPLOAD_SLICE, UploadCap

from .overlay import overlay_pair

Pair = Callable[[UploadCap], tuple[MessageChannel, MessageChannel]]


def messages(cap: UploadCap) -> tuple[MessageChannel, MessageChannel]:
    left, right = overlay_pair()
    return MessagesChannel(left, upload=cap), MessagesChannel(right)


def http2(cap: UploadCap) -> tuple[MessageChannel, MessageChannel]:
    left, right = overlay_pair()
    return GrpcChannel.client(left, settings=REFERENCE, upload=cap), GrpcChannel.server(right, settings=REFERENCE)


both = pytest.mark.parametrize("pair", [messages, http2])
NOISE = random.Random(1).randbytes(1_000_000)


@both
async def test_it_is_kept_and_shared(pair: Pair, autojump_clock: MockClock) -> None:
    cap = UploadCap(100_000, burst=20_000)
    taken: list[list[float]] = [[], []]
    async with trio.open_nursery() as nursery:
        for times in taken:
            sender, receiver = pair(cap)
            await nursery.start(sender.run)
            await nursery.start(receiver.run)

            async def send(sender: MessageChannel = sender) -> None:
                for start in range(50):
                    await sender.send(NOISE[start * 10_000 :][:10_000])

            async def receive(receiver: MessageChannel = receiver, times: list[float] = times) -> None:
                for start in range(50):
                    assert await receiver.receive() == NOISE[start * 10_000 :][:10_000]
                    times.append(trio.current_time())
                if all(len(each) == 50 for each in taken):
                    nursery.cancel_scope.cancel()

            nursery.start_soon(send)
            nursery.start_soon(receive)
    for times in taken:
        assert times[-1] == pytest.approx(9.8, abs=0.3)  # a megabyte, less the burst, both at the same pace
        assert times[24] == pytest.approx(4.8, abs=0.5)


@both
async def test_who_waits_long_for_its_turn_is_not_taken_for_gone(pair: Pair, autojump_clock: MockClock) -> None:
    cap, many = UploadCap(40_000), 30
    assert many * UPLOAD_SLICE / cap.rate > 2 * (PROBE_AFTER + ANSWER_WITHIN)
    whole = 0
    async with trio.open_nursery() as nursery:
        for _ in range(many):
            sender, receiver = pair(cap)
            await nursery.start(sender.run)
            await nursery.start(receiver.run)

            async def receive(receiver: MessageChannel = receiver) -> None:
                nonlocal whole
                assert await receiver.receive() == NOISE[:100_000]
                whole += 1

            nursery.start_soon(sender.receive)
            nursery.start_soon(receive)
            nursery.start_soon(sender.send, NOISE[:100_000])
        await trio.sleep(many * 100_000 / cap.rate + 5)
        assert whole == many
        nursery.cancel_scope.cancel()
