"""py-libp2p 0.8.1's known defects, none of which a user of ours meets. Each by its number in docs/py-libp2p.md.

1   Inbound slots are never released.
    test_pylibp2p.py: test_inbound_slots_come_back
    test_swarm.py: test_limits_are_released_whatever_ends_a_connection
2   Connecting has a floor of 250 ms.
    test_pylibp2p.py: test_connecting_and_closing_wait_for_nothing
3   Plaintext is accepted.
    test_pylibp2p.py: test_plaintext_is_not_spoken
4   The multiplexer's options are ignored: test_defect_4_*
5   Peers are dialed that nobody asked for.
    test_pylibp2p.py: test_nobody_is_dialed_that_was_not_asked_for
6   0.0.0.0 is told as an address; a notifee that is stuck stalls a dial.
    test_pylibp2p.py: test_wildcards_are_expanded_and_ipv6_has_addresses,
    test_a_stuck_notifee_stalls_nobody_and_the_others_hear_all_in_order
7   The choice among several connections ends at ``id()``: test_defect_7_*
8   No addresses over IPv6; closing sleeps for 205 ms.
    test_pylibp2p.py: test_wildcards_are_expanded_and_ipv6_has_addresses, test_connecting_and_closing_wait_for_nothing
16  The observed address is another connection's, or empty over IPv6; changes are not pushed: test_defect_16_*
17  A writer is reset if its reader pauses: test_defect_17_*
18  A window update per read: test_defect_18_*. Frames that take two Noise messages, windows that are not enforced, `ls`
    in a form of its own:
    transport/test_noise.py: test_plaintext_goes_into_full_messages
    transport/yamux/test_machine.py: test_one_byte_above_the_window_ends_the_connection_before_it_comes
    transport/test_multistream.py: test_a_listing_holds_every_protocol_and_does_not_end_the_negotiation
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p.config import Config, YamuxConfig
from kas_libp2p.errors import StreamReset
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import OverlayStream, Path, PathKind
from kas_libp2p.node import Node, open_node
from kas_libp2p.swarm import SwarmConnection
from tests.memory import memory_pair
from tests.network import MemoryHost, MemoryInternet

ECHO, SINK = "/echo/1", "/sink/1"
RELAY = Identity.from_seed(b"r" * 32).peer_id


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


class Two:
    """Two nodes on a network in memory; bob listens and echoes."""

    def __init__(self, alice: Node, bob: Node, bob_host: MemoryHost, address: str) -> None:
        self.alice = alice
        self.bob = bob
        self.bob_host = bob_host
        self.address = address

    async def dial(self) -> SwarmConnection:
        """Another connection from alice to bob."""
        connection = await self.alice.swarm.dial(self.bob.peer_id, [self.address], fresh=True)
        await trio.sleep(1)
        return connection

    async def relayed(self) -> SwarmConnection:
        """A connection from alice to bob that a relay carries."""
        here, there = memory_pair(delay=0.01)
        here.remote_address = there.local_address = f"/ip4/13.0.0.1/tcp/1/p2p/{RELAY}/p2p-circuit"
        there.remote_address = f"/ip4/13.0.0.1/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/{self.alice.peer_id}"
        path = Path(PathKind.RELAYED, RELAY)
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                await self.bob.swarm.upgrade_raw(there, peer=self.alice.peer_id, initiator=False, path=path)

            nursery.start_soon(accept)
            connection = await self.alice.swarm.upgrade_raw(here, peer=self.bob.peer_id, initiator=True, path=path)
        await trio.sleep(1)
        return connection


@asynccontextmanager
async def two(ip: str = "11.0.0.%d", **yamux: int) -> AsyncIterator[Two]:
    internet = MemoryInternet(delay=0.01)
    hosts = internet.host(ip % 1), internet.host(ip % 2)
    family = "ip6" if ":" in ip else "ip4"
    listen = f"/{family}/{ip % 2}/tcp/1"
    config = Config(listen=(listen,), yamux=replace(YamuxConfig(), **yamux))
    async with (
        open_node(Config(listen=()), identity=Identity.from_seed(b"a" * 32), network=hosts[0]) as alice,
        open_node(config, identity=Identity.from_seed(b"b" * 32), network=hosts[1]) as bob,
    ):
        await bob.serve(echo, ECHO)
        yield Two(alice, bob, hosts[1], listen)


async def test_defect_4_the_multiplexer_keeps_to_what_was_set(autojump_clock: MockClock) -> None:
    async with two(max_inbound_streams=3) as pair:
        connection = await pair.dial()
        await trio.sleep(10)  # what the two tell each other of themselves takes streams, too
        streams = [await connection.open_stream(ECHO) for _ in range(4)]
        await trio.sleep(1)
        with pytest.raises(StreamReset):
            await streams[3].receive_some()
        assert pair.bob.status().limit_hits == {"yamux.max_inbound_streams": 1}


async def test_defect_7_direct_before_relayed_then_the_busiest_then_the_newest(autojump_clock: MockClock) -> None:
    async with two() as pair:
        alice, bob = pair.alice, pair.bob.peer_id
        relayed = await pair.relayed()
        assert alice.swarm.connection_to(bob) is relayed
        for _ in range(3):
            await relayed.open_stream(ECHO)
        first = await pair.dial()
        assert alice.swarm.connection_to(bob) is first, "direct, though the relayed one is busier"
        await relayed.close()
        newest = await pair.dial()
        assert alice.swarm.connection_to(bob) is newest
        await first.open_stream(ECHO)
        assert alice.swarm.connection_to(bob) is first, "the busiest"


async def test_defect_16_each_connection_has_its_own_observed_address(autojump_clock: MockClock) -> None:
    async with two() as pair:
        relayed, direct = await pair.relayed(), await pair.dial()
        observed = {each.number: each.observed for each in pair.alice.status().connections}
        assert observed[direct.connection.number] == direct.connection.local_address
        assert observed[relayed.connection.number] == f"/ip4/13.0.0.1/tcp/1/p2p/{RELAY}/p2p-circuit"


async def test_defect_16_over_ipv6_too(autojump_clock: MockClock) -> None:
    async with two("2d00::%d") as pair:
        direct = await pair.dial()
        ((here,), (there,)) = (each.status().connections for each in (pair.alice, pair.bob))
        assert here.observed == direct.connection.local_address
        assert here.observed.startswith("/ip6/2d00::1/tcp/")
        assert there.observed == pair.address


async def test_defect_16_changes_are_pushed(autojump_clock: MockClock) -> None:
    async with two() as pair:
        await pair.dial()
        before = pair.alice.peer_info(pair.bob.peer_id)
        assert before is not None
        assert before.addresses == (pair.address,)
        pair.bob_host.extra.append("/ip4/11.0.0.3/tcp/1")
        pair.bob_host.changed.set()
        await trio.sleep(2)
        after = pair.alice.peer_info(pair.bob.peer_id)
        assert after is not None
        assert after.addresses == (pair.address, "/ip4/11.0.0.3/tcp/1")
        assert after.signed
        await pair.bob.serve(echo, "/new/1")
        await trio.sleep(2)
        last = pair.alice.peer_info(pair.bob.peer_id)
        assert last is not None
        assert "/new/1" in last.protocols


async def test_defect_17_a_writer_waits_for_as_long_as_its_reader_pauses(autojump_clock: MockClock) -> None:
    size = 4 << 20
    async with two() as pair, trio.open_nursery() as nursery:
        got = 0
        whole = trio.Event()

        async def pausing(stream: OverlayStream) -> None:
            nonlocal got
            await trio.sleep(3600)
            while data := await stream.receive_some():
                got += len(data)
            whole.set()

        await pair.bob.serve(pausing, SINK)
        stream = await pair.alice.connect(pair.address, SINK)

        async def write() -> None:
            await stream.send_all(bytes(size))
            await stream.send_eof()

        nursery.start_soon(write)
        await trio.sleep(3599)
        assert got == 0
        beside = await pair.alice.connect(pair.address, ECHO)
        await beside.send_all(b"beside it")
        assert await beside.receive_some() == b"beside it"
        await whole.wait()
        assert got == size


async def test_defect_18_reading_costs_few_window_updates(autojump_clock: MockClock) -> None:
    size = 8 << 20
    async with two() as pair:
        whole = trio.Event()
        reads = 0

        async def sink(stream: OverlayStream) -> None:
            nonlocal reads
            while await stream.receive_some(4096):
                reads += 1
            whole.set()

        await pair.bob.serve(sink, SINK)
        stream = await pair.alice.connect(pair.address, SINK)
        await trio.sleep(1)
        (there,) = pair.bob.status().connections
        await stream.send_all(bytes(size))
        await stream.send_eof()
        await whole.wait()
        (after,) = pair.bob.status().connections
        sealed_update = 12 + 16 + 2
        assert reads >= size / 4096
        assert after.sent - there.sent <= sealed_update * size / (128 * 1024), "one per half a window at most"
