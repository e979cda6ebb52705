"""Two kaspads on relays that give away 128 KiB and two minutes at a time, or with lines that come and go: no peer is
ever missing.

``scripts/test soak -- -s tests/kaspad/test_soak.py`` takes twenty minutes for each kind of relay and of traffic, or
``KAS_SOAK_SECONDS``.
"""

from __future__ import annotations

import faulthandler
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import trio

from kas_bridge.simnet.mine import Chain, filled_chain
from kas_bridge.simnet.session import Scene, scene
from kas_bridge.simnet.watch import in_ms
from natlab import Host, RunningLab
from tests.interop.conftest import built

pytestmark = pytest.mark.soak  # and no other: who runs another group has no twenty minutes

SECONDS = float(os.environ.get("KAS_SOAK_SECONDS", "1200"))
EVERY = 60.0
"""Seconds between two lines about how it goes."""
LOOK = 0.2
"""Seconds between two looks at a kaspad's peers, for little CPU. Its log, which is read too, misses nothing."""
RATE, BEHIND = 10.0, 2.0
"""Live blocks per second, and seconds of them that are made up for after a hiccup: so it is this rate in the end."""
PORT = 4001
HOMES = ("alice=sym,delay=5ms", "bob=pr-rst,delay=5ms")
OUTAGES = (("alice", 8), ("bob", 15), ("alice", 22), ("bob", 25))
"""Whose line is away, and for how many seconds: less than a session waits, all within two minutes."""
ONE, THREE = ("one",), ("one", "two", "three")


@pytest.fixture
async def genesis(kaspad: Path) -> Chain:
    """A chain without blocks: there is nothing to sync, which no such circuit would carry."""
    return await filled_chain(kaspad, full=0)


def rust_relay(binary: Path, host: Host) -> str:
    """A relay of rust-libp2p with the library's limits; returns its multiaddr."""
    process = host.spawn([str(binary), "listen", "--relay", f"/ip4/{host.address}/tcp/{PORT}"], stdin=True)
    return str(process.expect(r'"(/ip4/11[^"]+/p2p/[^"]+)"')[1])


async def soak(at: Scene, live: bool) -> None:
    """Let it be, for `SECONDS`, and say how it goes."""
    faulthandler.cancel_dump_traceback_later()  # of pytest: this takes longer than it gives a test
    await at.link.connect()
    await at.wait_path("relayed")
    if live:
        at.nursery.start_soon(at.blocks.mine, 0, RATE, BEHIND)
    peer = (await at.rows())[1]["peer_id"]
    before, begun = await carried(at), time.monotonic()
    while (left := begun + SECONDS - time.monotonic()) > 0:
        await trio.sleep(min(EVERY, left))
        now, seconds = await carried(at), time.monotonic() - begun
        told = Counter(each["event"] for _, each in at.logs[1].events if each.get("peer") == peer)
        print(
            f"{seconds:5.0f} s: {(now - before) / seconds:6.0f} bytes/s both ways, {len(at.blocks.came)} blocks,"
            f" {told['connection-opened']} circuits, {told['session-moved']} moves;"
            f" {[f'{watch.missed} of {watch.looks}' for watch in at.watches]} looks without a peer",
            flush=True,
        )
        assert at.broken() == []
        assert at.ended() == []
    assert await at.blocks.settle() == []
    assert at.broken() == []
    if live:
        assert len(at.blocks.came) > 0.9 * RATE * SECONDS, "fewer came: try again when this machine has less to do"
        print(f"blocks: {in_ms(at.blocks.delays())}")
    print("\n".join((await at.link.target.ask("why", peer=peer))["explained"]))


async def carried(at: Scene) -> int:
    """Bytes of Kaspa messages so far, both ways."""
    row = (await at.rows())[1]
    return int(row["received"]) + int(row["sent"])


@pytest.mark.parametrize("live", [False, True], ids=["idle", "live"])
@pytest.mark.natlab(*HOMES, *(f"{name}=public,delay=5ms" for name in THREE))
async def test_on_relays_of_ours(genesis: Chain, kaspad: Path, lab: RunningLab, tmp_path: Path, live: bool) -> None:
    limits = ("--relay-limits=reference",)
    names = THREE if live else ONE
    async with scene(lab, kaspad, genesis, tmp_path, relays=names, flags=(), relay_flags=limits, look=LOOK) as at:
        await soak(at, live)


@pytest.mark.parametrize("live", [False, True], ids=["idle", "live"])
@pytest.mark.natlab(*HOMES, *(f"{name}=public,delay=5ms" for name in THREE))
async def test_on_relays_of_rust(genesis: Chain, kaspad: Path, lab: RunningLab, tmp_path: Path, live: bool) -> None:
    binary = built("rust")
    addresses = [rust_relay(binary, lab[name]) for name in (THREE if live else ONE)]
    flags = ("--session.small-circuits",) if live else ()
    async with scene(lab, kaspad, genesis, tmp_path, others=addresses, flags=flags, look=LOOK) as at:
        await soak(at, live)


@pytest.mark.natlab("alice=pr,delay=5ms", "bob=eimx,delay=5ms", "one=public,delay=5ms", "two=public,delay=5ms")
async def test_lines_that_come_and_go(kaspad: Path, chain: Chain, lab: RunningLab, tmp_path: Path) -> None:
    faulthandler.cancel_dump_traceback_later()
    async with scene(lab, kaspad, chain, tmp_path, relays=("one", "two")) as at:
        await at.link.connect()
        at.nursery.start_soon(at.blocks.mine, 0)
        for home, seconds in OUTAGES:
            await at.wait_path("punched")
            await at.blocks.caught_up()
            lab.link(home).cut()
            await trio.sleep(seconds)
            lab.link(home).heal()
            healed = time.monotonic()
            await at.wait_path("relayed", "punched")
            await at.blocks.caught_up()
            print(
                f"{home}'s line was away for {seconds} s; all blocks were there {time.monotonic() - healed:.1f} s later"
            )
            assert at.broken() == []
        assert await at.blocks.settle() == []
        assert await at.uneven() == []
        assert at.ended() == []
