"""The pool in whole nodes, among relays of ours: found, replaced, rotated, remembered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, Node, open_node
from kas_libp2p.config import Purpose, RelayConfig, RelayLimits, Role
from kas_libp2p.identity import Identity
from kas_libp2p.metadata import PeerId
from kas_libp2p.relay._pool import EARLY, ROTATION, UPGRADE_INTERVAL
from tests.network import MemoryInternet, echo, eventually

DELAY = 0.02
ECHO = "/echo/1"


@pytest.fixture
def internet() -> MemoryInternet:
    return MemoryInternet(delay=DELAY)


@asynccontextmanager
async def relay_at(internet: MemoryInternet, number: int, operator: str = "") -> AsyncIterator[Node]:
    """A relay in a network of its own."""
    ip = f"20.{number}.0.1"
    relay = RelayConfig(serve=True, purpose=Purpose.ANY, limits=RelayLimits.open(), operator=operator)
    config = Config(listen=(f"/ip4/{ip}/tcp/1",), role=Role.PUBLIC, relay=relay)
    identity = Identity.from_seed(bytes([number]) * 32)
    async with open_node(config, identity=identity, network=internet.host(ip)) as node:
        yield node


@asynccontextmanager
async def private(
    internet: MemoryInternet, *relays: Node, target: int = 3, state_file: Path | None = None, number: int = 100
) -> AsyncIterator[Node]:
    ip = f"20.{number}.0.1"
    known = tuple(each.addresses[0] for each in relays)
    config = Config(listen=(), role=Role.PRIVATE, relay=RelayConfig(relays=known, target=target, state_file=state_file))
    identity = Identity.from_seed(bytes([number]) * 32)
    async with open_node(config, identity=identity, network=internet.host(ip)) as node:
        yield node


def places(node: Node) -> set[PeerId]:
    return {each.relay for each in node.status().reservations if each.held}


async def test_places_are_there_soon_and_after_a_restart_within_a_second(
    internet: MemoryInternet, autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relay_at(internet, number)) for number in range(1, 6)]
        async with private(internet, *relays, state_file=tmp_path / "relays.json") as node:
            await eventually(lambda: len(places(node)) == 3)
            await trio.sleep(300)  # in which all five are measured
            held = places(node)
        async with private(internet, state_file=tmp_path / "relays.json") as node:
            with trio.fail_after(1.0):
                await eventually(lambda: places(node) == held)


async def test_a_relay_that_is_met_is_used(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with relay_at(internet, 1) as relay, private(internet) as node:
        await trio.sleep(10)
        assert places(node) == set()
        await node.ping(relay.addresses[0])
        await eventually(lambda: places(node) == {relay.peer_id})
        (address,) = node.addresses
        assert address == f"{relay.addresses[0]}/p2p-circuit/p2p/{node.peer_id}"


async def test_why_calls_a_relay_by_its_operator_s_name(internet: MemoryInternet, autojump_clock: MockClock) -> None:
    async with relay_at(internet, 1, operator="relays.example") as relay, private(internet, relay) as node:
        await eventually(lambda: bool(node.addresses))
        async with private(internet, target=0, number=101) as friend:
            await friend.ping(node.addresses[0])
            await eventually(lambda: " is relayed by relays.example, " in node.why(friend.peer_id)[0])


async def test_a_relay_that_ends_is_replaced_within_two_seconds(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        scopes: dict[PeerId, trio.CancelScope] = {}
        started: list[Node] = []

        async def live(number: int) -> None:
            with trio.CancelScope() as scope:
                async with relay_at(internet, number) as relay:
                    scopes[relay.peer_id] = scope
                    started.append(relay)
                    await trio.sleep_forever()

        for number in (1, 2, 3):
            nursery.start_soon(live, number)
        await eventually(lambda: len(started) == 3)
        node = await stack.enter_async_context(private(internet, *started, target=1))
        await eventually(lambda: bool(places(node)))
        await trio.sleep(EARLY + 60)
        (held,) = places(node)
        scopes[held].cancel()
        with trio.fail_after(2.0):
            await eventually(lambda: bool(places(node) - {held}))
        await stack.aclose()
        nursery.cancel_scope.cancel()


async def test_a_relay_that_stops_being_one_is_replaced_and_its_circuits_stay(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relay_at(internet, number)) for number in (1, 2)]
        node = await stack.enter_async_context(private(internet, *relays, target=1))
        friend = await stack.enter_async_context(private(internet, target=0, number=101))
        await node.serve(echo, ECHO)
        await eventually(lambda: bool(places(node)))
        await trio.sleep(EARLY + 60)
        (held,) = places(node)
        stream = await friend.connect(node.addresses[0], ECHO)
        (old,) = (each for each in relays if each.peer_id == held)
        old._take_role(Role.PRIVATE)
        with trio.fail_after(2.0):
            await eventually(lambda: places(node) == {each.peer_id for each in relays} - {held})
        assert not any(held in address for address in node.addresses)
        await trio.sleep(60)
        await stream.send_all(b"still there?")
        assert await stream.receive_some()


async def test_hours_of_rotation_cut_no_circuit_and_leave_no_moment_without_a_place(
    internet: MemoryInternet, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relay_at(internet, number)) for number in range(1, 4)]
        node = await stack.enter_async_context(private(internet, *relays, target=1))
        friend = await stack.enter_async_context(private(internet, target=0, number=101))
        await node.serve(echo, ECHO)
        await eventually(lambda: bool(places(node)))
        await trio.sleep(UPGRADE_INTERVAL + EARLY + 60)  # in which the better ones are found
        first = places(node)
        stream = await friend.connect(node.addresses[0], ECHO)
        for _ in range(int(2 * ROTATION // 600)):
            await trio.sleep(600)
            await stream.send_all(b"still there?")
            assert await stream.receive_some()
            assert places(node) == first
        stream.reset()
        while places(node) == first:
            await trio.sleep(60)
            assert places(node)
            assert trio.current_time() < 5 * ROTATION
