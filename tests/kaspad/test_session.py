"""The session with real kaspads behind real NATs: the paths of a connection come and go, and no kaspad notices."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import trio

from kas_bridge.simnet import measure
from kas_bridge.simnet.measure import reach
from kas_bridge.simnet.mine import Chain
from kas_bridge.simnet.session import Scene, cycle, scene
from kas_bridge.simnet.watch import in_ms
from natlab import RunningLab

pytestmark = [pytest.mark.kaspad, pytest.mark.lab]

CYCLES = 2
"""Ten take too long for every change: ``python -m tests.perf.session_moves``."""
SIZE = 20_000
"""Bytes of transactions in a live block; ten of them a second."""
RESUMED = 2.0
"""Seconds without a block that the death of a relay may cost a sync."""
ENDED = 2.0
"""Seconds until a session has ended at the other side after its bridge was told to stop."""
FORGOTTEN = 2.0
"""The same after a bridge that was killed has a place on a relay again, and can be reached: the other side tries that
every 1.25 s."""
PATIENCE = 60.0
"""Seconds for what another process does in one or two, on a busy machine."""
RELAYED = ("--punch.no-enabled",)
HOMES = ("alice=pr,delay=5ms", "bob=eimx,delay=5ms")
RELAYS = ("one=public,delay=5ms", "two=public,delay=5ms")


@pytest.mark.natlab(*HOMES, *RELAYS)
async def test_relayed_punched_relayed_and_again(
    kaspad: Path, long_chain: Chain, lab: RunningLab, tmp_path: Path
) -> None:
    async with scene(lab, kaspad, long_chain, tmp_path, relays=("one", "two")) as at:
        await at.link.connect()
        await at.wait_path("relayed")
        assert await measure.blocks_at(at.pair.target) < long_chain.blocks, "the sync was over before it moved"
        await at.wait_path("punched")
        await measure.wait_synced(at.pair)
        at.nursery.start_soon(at.blocks.mine, SIZE)
        cycles = [await cycle(at) for _ in range(CYCLES)]
        assert await at.blocks.settle() == []
        assert await at.uneven() == []
        assert at.broken() == []
        assert at.ended() == []
        for log in at.logs:
            assert len(log.of("session-opened")) == 1
            assert len(log.of("session-moved")) >= 2 * CYCLES + 1
    print(f"{len(at.blocks.came)} blocks: {in_ms(at.blocks.delays())}")
    print(f"the cut held blocks up for {in_ms(each.held_up for each in cycles)}")
    print(f"the move to the direct way for {in_ms(each.moved for each in cycles)}")


async def syncing(at: Scene, chain: Chain) -> str:
    """Connect, and wait until the sync has reached the filled blocks; returns the id of the relay that carries it."""
    await at.link.connect()
    await reach(at.pair.target, chain.blocks - chain.full + 20)
    assert await measure.blocks_at(at.pair.target) < chain.blocks, "the sync was over before anything happened"
    return str((await at.rows())[1]["relay_id"])


@pytest.mark.natlab(*HOMES, *RELAYS)
async def test_a_sync_goes_on_over_the_other_relay_when_one_is_killed(
    kaspad: Path, long_chain: Chain, lab: RunningLab, tmp_path: Path
) -> None:
    async with scene(lab, kaspad, long_chain, tmp_path, relays=("one", "two"), flags=RELAYED) as at:
        carrying = await syncing(at, long_chain)
        killed = time.monotonic()
        (relay,) = (process for address, process in at.relays.items() if address.endswith(carrying))
        relay.process.kill()
        assert await measure.wait_synced(at.pair) == long_chain.blocks
        assert await at.blocks.settle() == []
        assert await at.uneven() == []
        assert at.broken() == []
        assert at.ended() == []
        assert {row["relay_id"] for row in await at.rows()} == {
            address.split("/")[-1] for address in at.relays if not address.endswith(carrying)
        }
        gap = at.blocks.longest_gap(killed)
        before = at.blocks.longest_gap(0.0, killed)
        for log in at.logs:
            # Its end is seen, and not found out by silence; and the other one is at hand.
            assert all(" is gone: " in event["reason"] for _, event in log.of("session-waiting", killed))
            assert [event["path"]["relay"] == carrying for _, event in log.of("session-moved", killed)] == [False]
    print(f"without a block for {gap:.2f} s when the relay was killed, and for {before:.2f} s before that")
    assert gap < RESUMED


@pytest.mark.natlab(*HOMES, *RELAYS)
async def test_a_session_ends_when_a_bridge_starts_anew_and_the_sync_resumes(
    kaspad: Path, long_chain: Chain, lab: RunningLab, tmp_path: Path
) -> None:
    async with scene(lab, kaspad, long_chain, tmp_path, relays=("one", "two"), flags=RELAYED) as at:
        source, other = at.link.source, at.logs[1]

        async def seconds_until_it_ended(since: float, count: int) -> float:
            await other.wait(lambda: len(other.of("session-ended")) == count, PATIENCE)
            return other.of("session-ended")[-1][0] - since

        await syncing(at, long_chain)
        source.process.kill()
        await source.start()
        await source.relayed_address()
        after_kill = await seconds_until_it_ended(time.monotonic(), 1)  # nobody can know before
        at.pair.others["bridge source"] = source.process
        assert await measure.wait_synced(at.pair) == long_chain.blocks

        at.nursery.start_soon(at.blocks.mine, SIZE)
        asked = time.monotonic()
        os.kill(source.process.pid, signal.SIGTERM)
        assert await source.process.wait() == 0
        after_term = await seconds_until_it_ended(asked, 2)
        await source.start()
        assert await at.blocks.settle() == []
        opened = [event["session"] for _, event in other.of("session-opened")]
        assert len({*opened}) == len(opened) == 3
        # It was told so each time. Who waits for a path that does not come again loses the session for that reason.
        forgotten, stopped = (event["code"] for _, event in other.of("session-ended"))
        assert forgotten in ("restarted", "unknown")
        assert stopped == "stopped"
        assert [len(watch.peers) for watch in at.watches] == [3, 3], "each kaspad had one peer after the other"
    print(
        f"it ended {after_kill:.2f} s after it could be reached again (kill -9), and {after_term:.2f} s after SIGTERM"
    )
    assert after_term < ENDED
    assert after_kill < FORGOTTEN


def address_of_the_source(at: Scene) -> None:
    at.lab.router("alice").change_address()


def address_of_the_target(at: Scene) -> None:
    at.lab.router("bob").change_address()


def another_network_of_the_target(at: Scene) -> None:
    """As a laptop that is carried elsewhere: its machine has another address, and knows it."""
    host = at.lab["bob"]
    host.run("ip -4 address flush dev eth0")
    host.run("ip address add 192.168.1.77/24 dev eth0")
    host.run("ip route add default via 192.168.1.1")


def reboot_of_both_routers(at: Scene) -> None:
    at.lab.router("alice").reboot()
    at.lab.router("bob").reboot()


def sleep(at: Scene) -> None:
    async def nap() -> None:
        at.link.target.process.suspend()
        try:
            await trio.sleep(10)
        finally:
            at.link.target.process.resume()

    at.nursery.start_soon(nap)


@pytest.mark.natlab(*HOMES, *RELAYS)
async def test_it_survives_new_addresses_reboots_of_routers_and_sleep(
    kaspad: Path, chain: Chain, lab: RunningLab, tmp_path: Path
) -> None:
    told = []
    async with scene(lab, kaspad, chain, tmp_path, relays=("one", "two")) as at:
        await at.link.connect()
        await measure.wait_synced(at.pair)
        at.nursery.start_soon(at.blocks.mine, SIZE)
        for happens in (
            address_of_the_source,
            address_of_the_target,
            another_network_of_the_target,
            reboot_of_both_routers,
            sleep,
        ):
            await at.wait_path("punched")
            await at.blocks.caught_up()
            begun = time.monotonic()
            happens(at)
            await trio.sleep(1)  # of blocks that have to find a way
            await at.blocks.caught_up()
            told.append(f"{happens.__name__}: {max(at.blocks.delays(begun - 1)):.1f} s")
            assert at.broken() == [], happens.__name__
        assert await at.blocks.settle() == []
        assert await at.uneven() == []
        assert at.ended() == []
    print("a block took at most, after\n  " + "\n  ".join(told))
