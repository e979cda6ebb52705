"""Two unmodified kaspads at home, behind NATs that nobody touched: relayed, then direct, and none the wiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kas_bridge.simnet import measure
from kas_bridge.simnet.bridges import BridgeProcess, Bridges
from kas_bridge.simnet.lab import inside, pair_at, relay_at
from kas_bridge.simnet.measure import state_of
from kas_bridge.simnet.mine import FULL, Chain
from kas_bridge.simnet.watch import PeerWatch
from natlab import RunningLab

pytestmark = [pytest.mark.kaspad, pytest.mark.lab]

DIRECT_TIMEOUT = 30.0
"""Seconds until the bridges carry their peers directly: they prove the new way for three, on an idle machine."""


async def wait_direct(bridge: BridgeProcess) -> dict[str, object]:
    with trio.fail_after(DIRECT_TIMEOUT):
        while True:
            rows: list[dict[str, object]] = (await bridge.ask("peers"))["peers"]
            if rows and (rows[0]["state"], rows[0]["path"]) == ("joined", "punched"):
                return rows[0]
            await trio.sleep(0.05)


@pytest.mark.natlab("alice=pr,delay=5ms", "bob=eimx,delay=5ms", "relay=public,delay=5ms")
async def test_an_empty_node_syncs_while_its_peer_becomes_direct(
    kaspad: Path, chain: Chain, lab: RunningLab, tmp_path: Path
) -> None:
    async with (
        inside(lab, lab["alice"], lab["bob"], lab["relay"]) as (alice, bob, at),
        relay_at(tmp_path / "relay", at) as (relay, address),
        pair_at(chain, kaspad, tmp_path / "punched", alice, bob) as pair,
        (way := Bridges("relayed", relays=(address,))).prepare(pair) as link,
        trio.open_nursery() as nursery,
    ):
        watches = [PeerWatch(node) for node in (pair.source, pair.target)]
        for watch in watches:
            nursery.start_soon(watch.run)
        synced = await measure.timed_sync(chain, pair, way, link, 0.01)
        assert synced.blocks == chain.blocks
        rows = [await wait_direct(bridge) for bridge in (link.source, link.target)]
        assert [row["relay_id"] for row in rows] == [address.split("/")[-1]] * 2, "the relay that helped"
        for bridge in (link.source, link.target):
            (row,) = (await bridge.ask("peers"))["peers"]
            told = (await bridge.ask("why", peer=row["peer_id"]))["explained"]
            assert any("first attempt" in line for line in told), told
            status = await bridge.ask("status")
            assert status["reachability"]["role"] == "private"
            assert [place["held"] for place in status["reservations"]] == [True], "it stays as the spare"
            assert not status["ends"], "the peer never left"
            assert row["session"]["moves"] == 1
            assert any("Its Kaspa session moved to the punched path" in line for line in told), told
        with trio.fail_after(DIRECT_TIMEOUT):
            while (await relay.ask("status"))["relay"]["circuits"]:  # noqa: ASYNC110 - another process's state
                await trio.sleep(0.05)
        live = await measure.live(chain, pair, way, size=FULL, count=5)
        assert len(live.latencies) == 5
        assert await state_of(pair.source) == await state_of(pair.target)
        nursery.cancel_scope.cancel()
    for watch in watches:
        assert (len(watch.peers), watch.missed) == (1, 0), "one and the same peer throughout"
    print(f"{synced.blocks} blocks in {synced.seconds:.2f} s; live blocks within {max(live.latencies) * 1000:.0f} ms")
