"""The measure itself, on plain TCP: what a bridge is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kas_bridge.simnet import measure
from kas_bridge.simnet.measure import Live, PlainTcp
from kas_bridge.simnet.mine import FULL, Chain

pytestmark = pytest.mark.kaspad


def test_quantiles() -> None:
    outcome = Live(way="", delay=0, size=0, rate=10, latencies=[4, 1, 3, 2], cpu={}, others=0)
    assert [outcome.quantile(share) for share in (0.0, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.kaspad
async def test_a_sync_is_timed(kaspad: Path, chain: Chain) -> None:
    told: list[int] = []
    result = await measure.sync(chain, kaspad, PlainTcp(), progress=lambda _, done, __: told.append(done))
    assert result.blocks == chain.blocks == told[-1]
    assert result.seconds > 0
    assert result.wire is None
    assert set(result.cpu) == {"kaspad source", "kaspad target"}


@pytest.mark.kaspad
@pytest.mark.lab
async def test_a_sync_over_a_wire_takes_its_round_trips(kaspad: Path, chain: Chain) -> None:
    delay = 0.01
    result = await measure.sync(chain, kaspad, PlainTcp(), delay=delay)
    # The handshake, the headers, and 99 bodies at a time: at least 13 round trips.
    assert result.seconds > 13 * 2 * delay
    assert result.wire is not None
    assert result.wire > chain.bytes


@pytest.mark.kaspad
@pytest.mark.parametrize("size", [0, FULL])
async def test_live_blocks_are_timed(kaspad: Path, chain: Chain, size: int) -> None:
    way = PlainTcp()
    async with measure.pair_of(chain, kaspad, way) as pair, way.prepare(pair) as link:
        await measure.timed_sync(chain, pair, way, link, 0.0)
        outcome = await measure.live(chain, pair, way, size=size, count=5, rate=50)
        assert len(outcome.latencies) == 5
        assert set(outcome.cpu) == {"kaspad source", "kaspad target"}
        async with pair.target.rpc() as rpc:
            assert (await rpc.get_block_dag_info()).blockCount == chain.blocks + 5
