"""A node as its user has it: what it does unasked, and what it tells."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from kas_libp2p import Config, ConfigError, NegotiationError, addresses, open_node, perf
from kas_libp2p.events import ConnectionOpened
from tests.network import MemoryInternet
from tests.transport.pairs import Foreign

ADDRESS = "/ip4/11.0.0.2/tcp/1"


async def test_perf_is_not_served_unasked(autojump_clock: MockClock) -> None:
    internet = MemoryInternet(delay=0.01)
    async with (
        open_node(Config(listen=()), network=internet.host("11.0.0.1")) as alice,
        open_node(Config(listen=(ADDRESS,)), network=internet.host("11.0.0.2")) as bob,
    ):
        assert {"/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"} <= set(bob.status().protocols)
        assert perf.ID not in bob.status().protocols
        assert await alice.ping(ADDRESS) == pytest.approx(0.02)
        (connection,) = alice.connections
        with pytest.raises(NegotiationError, match="does not speak /perf"):
            await perf.measure(connection.connection, download=1 << 30)
        await bob.serve(perf.handle, perf.ID)
        result = await perf.measure(connection.connection, upload=1 << 20, download=1 << 20)
        assert (result.uploaded, result.downloaded) == (1 << 20, 1 << 20)


async def test_a_peer_is_known_where_it_was_seen_and_not_where_it_says_others_are(autojump_clock: MockClock) -> None:
    internet = MemoryInternet()
    told = ("/ip4/11.0.0.9/tcp/1", "/ip4/11.0.0.1/tcp/7")
    async with (
        open_node(Config(listen=(), announce=told), network=internet.host("11.0.0.1")) as alice,
        open_node(Config(listen=(ADDRESS,)), network=internet.host("11.0.0.2")) as bob,
    ):
        await alice.ping(ADDRESS)
        await trio.sleep(1)
        info = bob.peer_info(alice.peer_id)
        assert info is not None
        assert info.addresses == told
        assert bob.known_peer_at("11.0.0.9", 1) is None
        assert bob.known_peer_at("11.0.0.1", 7) == alice.peer_id
        assert alice.known_peer_at("11.0.0.2", 1) == bob.peer_id


async def test_a_listen_address_that_nobody_can_dial_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "/ip4/11.0.0.2/tcp/2"
    for announce, told in (((), [other]), ((ADDRESS,), [ADDRESS])):
        config = Config(listen=(ADDRESS, other), announce=announce)
        async with open_node(config, network=MemoryInternet().host("11.0.0.2")) as bob:
            monkeypatch.setattr(bob.reachability, "is_refuted", ADDRESS.__eq__)
            assert [str(addresses.without_peer(each)) for each in bob.addresses] == told


async def test_peers_that_leave_at_once_are_forgotten(autojump_clock: MockClock) -> None:
    internet = MemoryInternet()
    async with open_node(Config(listen=(ADDRESS,)), network=internet.host("11.0.0.2")) as bob:
        for _ in range(50):
            raw = await internet.host("11.0.0.1").dial(addresses.parse(ADDRESS))
            await Foreign(raw, initiator=True).shake_first()
            await raw.aclose()
            await trio.sleep(1)
        assert bob.status().events["connection-closed"] == 50
        assert bob._identify._asking == bob._identify._allowances == {}


@pytest.mark.parametrize("setting", ["listen", "announce", "allow", "deny"])
async def test_a_wrong_entry_of_a_list_is_refused_by_the_setting_s_name(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}: nonsense is n|^{setting}: 'nonsense' is neither"):
        async with open_node(Config(**{"listen": (), setting: ("nonsense",)})):  # type: ignore[arg-type]
            pass


async def test_events_end_with_the_node(autojump_clock: MockClock) -> None:
    internet = MemoryInternet()
    async with trio.open_nursery() as nursery:
        told = []

        async with open_node(Config(listen=(ADDRESS,)), network=internet.host("11.0.0.2")) as bob:

            async def listen() -> None:
                async for event in bob.events():
                    told.append(event)

            nursery.start_soon(listen)
            async with open_node(Config(listen=()), network=internet.host("11.0.0.1")) as alice:
                await alice.ping(ADDRESS)
        assert [event.peer for event in told if isinstance(event, ConnectionOpened)] == [alice.peer_id]
