"""A Kaspa stream to a foreign node over a real line: slow is not hung, and hung is found within seconds."""

from __future__ import annotations

import random
import time

import pytest
import trio

from kas_libp2p import Config, Dialect, OverlayStream, open_node
from kas_libp2p.kaspa._liveness import OWED_FOR
from kas_libp2p.kaspa.channel import PathHung, running
from kas_libp2p.kaspa.dialect import channel_of
from natlab import RunningLab

pytestmark = pytest.mark.lab

BYTES = 600_000
SECONDS = 8
"""They take longer than this at 50 kB/s, the queues on the way and the handshakes included."""
SOON = OWED_FOR / 2
"""Seconds, long before kaspad itself would give up. It takes five, and as many again each time the process was held up:
silence that it has slept through counts for nothing (`tests/kaspa/test_liveness.py` holds the seconds)."""


async def take(stream: OverlayStream) -> None:
    async with running(channel_of(stream)) as channel:
        print("took", len(await channel.receive() or b""), flush=True)
        await trio.sleep_forever()


async def serve() -> None:
    async with open_node(Config(listen=("/ip4/0.0.0.0/tcp/16117",))) as node:
        await node.serve(take, Dialect.HTTP2)
        print(*node.addresses, sep="\n", flush=True)
        await trio.sleep_forever()


async def send(address: str) -> None:
    async with open_node(Config(listen=())) as node:
        stream = await node.connect(address)
        try:
            async with running(channel_of(stream)) as channel:
                await channel.send(random.Random(1).randbytes(BYTES))
                await channel.receive()
        except PathHung as error:
            print("hung:", error, flush=True)


@pytest.mark.natlab("alice=pr")
def test_a_slow_line_is_waited_for_and_a_cut_one_left(lab: RunningLab) -> None:
    relay, alice = lab.public("relay"), lab["alice"]
    lab.link("alice").set(rate="400kbit", delay="20ms")
    node = relay.spawn_python(serve)
    begun = time.monotonic()
    client = alice.spawn_python(send, node.expect(rf"^/ip4/{relay.address}/\S+$")[0])
    node.expect(f"^took {BYTES}$", timeout=60)
    assert time.monotonic() - begun > SECONDS
    lab.link("alice").cut()
    client.expect("^hung: the path hangs", timeout=SOON)
