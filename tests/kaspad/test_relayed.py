"""Two unmodified kaspads whose bridges nobody can dial sync through a relay, behind real NATs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kas_bridge.simnet import measure
from kas_bridge.simnet.bridges import Bridges
from kas_bridge.simnet.lab import inside, pair_at, relay_at
from kas_bridge.simnet.measure import state_of
from kas_bridge.simnet.mine import FULL, Chain
from natlab import RunningLab

pytestmark = [pytest.mark.kaspad, pytest.mark.lab]


@pytest.mark.natlab(
    *("alice=sym,delay=5ms", "bob=pr-rst,delay=5ms", "relay=public"),
    *("ann=public,delay=5ms", "ben=public,delay=5ms"),
)
async def test_an_empty_node_syncs_through_a_relay(kaspad: Path, chain: Chain, lab: RunningLab, tmp_path: Path) -> None:
    async with (
        inside(lab, lab["alice"], lab["bob"], lab["relay"]) as (alice, bob, at),
        relay_at(tmp_path / "relay", at) as (relay, address),
        pair_at(chain, kaspad, tmp_path / "relayed", alice, bob) as pair,
        (way := Bridges("relayed", relays=(address,))).prepare(pair) as link,
    ):
        relayed = await measure.timed_sync(chain, pair, way, link, 0.01)
        assert relayed.blocks == chain.blocks
        assert await state_of(pair.source) == await state_of(pair.target)
        for bridge in (link.source, link.target):
            (row,) = (await bridge.ask("peers"))["peers"]
            assert (row["state"], row["path"], row["relay_id"]) == ("joined", "relayed", address.split("/")[-1])
            assert (await bridge.ask("status"))["reachability"]["role"] == "private"
        (circuit,) = (await relay.ask("status"))["relay"]["circuits"]
        assert circuit["forth"] + circuit["back"] > chain.bytes / 2  # zstd between the bridges saves some
        live = await measure.live(chain, pair, way, size=FULL, count=5)
        assert len(live.latencies) == 5
    async with (
        inside(lab, lab["ann"], lab["ben"]) as (ann, ben),
        pair_at(chain, kaspad, tmp_path / "direct", ann, ben) as pair,
        (way := Bridges("direct")).prepare(pair) as link,
    ):
        direct = await measure.timed_sync(chain, pair, way, link, 0.01)
    print(
        f"{relayed.blocks} blocks through a relay in {relayed.seconds:.2f} s, directly in {direct.seconds:.2f} s:"
        f" {relayed.seconds / direct.seconds:.2f} times; live blocks within {max(live.latencies) * 1000:.0f} ms"
    )
