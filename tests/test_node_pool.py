"""A node that chooses its relays: it meets them, keeps places on some, and gives them up when it needs none."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, Identity, Node, OverlayStream, open_node
from kas_libp2p.config import Purpose, RelayConfig, Role
from tests.network import MemoryInternet, eventually


async def relays(internet: MemoryInternet, stack: AsyncExitStack, count: int, purpose: Purpose) -> list[Node]:
    """Relays in networks of their own."""
    found = []
    for number in range(1, count + 1):
        config = Config(
            listen=(f"/ip4/11.{number}.0.1/tcp/1",), role=Role.PUBLIC, relay=RelayConfig(serve=True, purpose=purpose)
        )
        node = open_node(config, network=internet.host(f"11.{number}.0.1"))
        found.append(await stack.enter_async_context(node))
    return found


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=0.02)


async def never(_: OverlayStream) -> None:
    await trio.sleep_forever()


async def test_relays_that_are_met_are_used(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with AsyncExitStack() as stack:
        met = await relays(internet, stack, 5, Purpose.ANY)
        node = await stack.enter_async_context(
            open_node(Config(listen=(), relay=RelayConfig(target=2)), network=internet.host("11.9.0.1"))
        )
        for relay in met:
            await node.ping(relay.addresses[0])
        await eventually(lambda: len(node.addresses) >= 2)
        await trio.sleep(60)
        assert len(node.addresses) == 2
        status = node.status()
        assert {each.relay for each in status.reservations if each.held} < {each.peer_id for each in met}
        assert {each.peer for each in status.relays} == {each.peer_id for each in met}
        node._take_role(Role.PUBLIC)
        await eventually(lambda: not node.addresses)


async def test_who_serves_no_kaspa_at_first_is_let_in_later(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack:
        (relay,) = await relays(internet, stack, 1, Purpose.OVERLAY)
        config = Config(listen=(), relay=RelayConfig(relays=relay.addresses))
        node = await stack.enter_async_context(open_node(config, network=internet.host("11.9.0.1")))
        await trio.sleep(30)
        assert not node.addresses
        await node.serve(never)
        await eventually(lambda: bool(node.addresses))


async def test_a_restarted_node_has_its_places_within_a_second(
    internet: MemoryInternet, autojump_clock: MockClock, tmp_path: Path
) -> None:
    config = Config(listen=(), relay=RelayConfig(state_file=tmp_path / "relays.json"))
    identity = Identity.generate()
    async with AsyncExitStack() as stack:
        met = await relays(internet, stack, 3, Purpose.ANY)
        async with open_node(config, identity=identity, network=internet.host("11.9.0.1")) as node:
            for relay in met:
                await node.ping(relay.addresses[0])
            await eventually(lambda: len(node.addresses) == 3)
            await trio.sleep(700)
        began = trio.current_time()
        async with open_node(config, identity=identity, network=internet.host("11.9.0.1")) as node:
            await eventually(lambda: len(node.addresses) == 3)
            assert trio.current_time() - began < 1
