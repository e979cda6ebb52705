"""`Reachability` in a network: what it finds out, how fast, and what it tells."""

from __future__ import annotations

import random

import pytest
import trio

from kas_libp2p.autonat._client import Verdict
from kas_libp2p.autonat._messages import DIAL_REQUEST, STRANGER, STRANGER_DIAL, V1
from kas_libp2p.autonat._roles import GRACE, OLD_ENTRIES, RETRY, Kind
from kas_libp2p.autonat.roles import Filtering, Mapping
from kas_libp2p.config import AutoNatConfig, Config, Role
from kas_libp2p.events import DialBackServed, EventBus, ReachabilityTested, RoleChanged
from kas_libp2p.swarm.network import TcpNetwork
from kas_libp2p.transport.connection import Connection
from kas_libp2p.transport.yamux.stream import YamuxStream
from tests.autonat.world import PORT, Peer, Router, world

HOME = "11.9.0.1"


def seen(peer: Peer) -> list[str]:
    return [str(event.verdict) for event in peer.bus.of(ReachabilityTested)]


def only(peer: Peer, *protocols: str) -> None:
    """Have a peer serve these of AutoNAT's protocols, and no other."""
    for protocol in {V1, DIAL_REQUEST, STRANGER, STRANGER_DIAL} - set(protocols):
        peer.swarm.unhandle(protocol)


async def test_public_within_seconds_and_everybody_is_told(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "fcx", serve=False)
        told: list[tuple[Role, tuple[str, ...], bool]] = []
        reachability = alice.reachability
        reachability.on_changed.append(
            lambda: told.append((reachability.role, reachability.public_addresses(), reachability.offers_dcutr))
        )
        assert not reachability.offers_dcutr
        started = trio.current_time()
        for server in servers:
            await alice.dial(server)
        while reachability.role is Role.PRIVATE:  # noqa: ASYNC110
            await trio.sleep(0.1)
        assert trio.current_time() - started < 6  # two SETTLEs' worth of waiting, and a pause of up to 3 s
        address = f"/ip4/{HOME}/tcp/40000"
        await trio.sleep(1)
        assert told == [(Role.PRIVATE, (), True), (Role.PUBLIC, (address,), True)]
        [event] = alice.bus.of(RoleChanged)
        assert event.role == "public"
        assert "and so did strangers" in event.reason
        assert reachability.candidates() == (address,)
        assert reachability.nat(4)[1] is Filtering.OPEN
        assert reachability.nat(6)[0].mapping is Mapping.UNKNOWN


@pytest.mark.parametrize("kind", ["fc", "ar"])
async def test_servers_that_are_connected_to_one_another_find_who_is_a_stranger_to_us(
    kind: str, autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stranger_last(helpers: list[Connection]) -> None:
        helpers.sort(key=lambda each: each.remote_address.startswith("/ip4/11.100."))

    monkeypatch.setattr(random, "shuffle", stranger_last)
    async with world() as here:
        servers = await here.servers(3, meshed=True)
        alice = await here.peer(HOME, kind, serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(RETRY / 2)
        assert alice.reachability.nat(4)[1] is (Filtering.OPEN if kind == "fc" else Filtering.ADDRESS)


async def test_one_server_that_stalls_holds_up_nobody(autojump_clock: trio.abc.Clock) -> None:
    async def forever(stream: YamuxStream) -> None:
        await trio.sleep_forever()

    async with world() as here:
        servers = await here.servers(3)
        only(servers[0])
        for protocol in (DIAL_REQUEST, STRANGER):
            servers[0].swarm.handle(protocol, forever)
        alice = await here.peer(HOME, "fc", serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(10)
        assert alice.reachability.role is Role.PUBLIC


async def test_v1_servers_and_a_peer_that_comes(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        for server in servers:
            only(server, V1)
        alice = await here.peer(HOME, "fc", serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(OLD_ENTRIES)
        assert set(seen(alice)) == {"reachable"}
        assert alice.reachability.role is Role.PRIVATE
        bob = await here.peer("11.50.0.1", serve=False, quiet=True)
        await bob.swarm.dial(alice.swarm.peer, [f"/ip4/{HOME}/tcp/{PORT}"])
        await trio.sleep(1)
        assert alice.reachability.role is Role.PUBLIC


@pytest.mark.parametrize("kind", ["pr", "sym", "pr-rst"])
async def test_v1_servers_see_that_nobody_gets_in(kind: str, autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        for server in servers:
            only(server, V1)
        alice = await here.peer(HOME, kind, serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(3600)
        assert set(seen(alice)) == {"unreachable"}
        assert (alice.reachability.role, alice.bus.of(RoleChanged)) == (Role.PRIVATE, [])


async def test_servers_with_one_of_our_own_among_them_is_enough(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        for server in servers[:2]:
            only(server, V1)
        alice = await here.peer(HOME, "ar", serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(7200)
        assert alice.reachability.role is Role.PRIVATE
        bob = await here.peer("11.10.0.1", "fc", serve=False)
        for server in servers:
            await bob.dial(server)
        await trio.sleep(600)
        assert bob.reachability.role is Role.PUBLIC


async def test_the_network_changes(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "fc", serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(60)
        assert alice.reachability.role is Role.PUBLIC

        def move(wan: str, router: Router) -> None:
            here.internet.hosts.pop(alice.host.routers[-1].wan)
            alice.host.routers = [Router(router.nat, wan)]
            alice.host.used.clear()
            here.internet.hosts[wan] = alice.host

        async def again() -> None:
            for server in servers:
                await alice.swarm.disconnect(server.swarm.peer)
                await alice.dial(server)

        # another IP of the same provider, as at night: stays public
        move("11.9.7.7", alice.host.routers[0])
        await again()
        await trio.sleep(60)
        assert alice.reachability.public_addresses() == (f"/ip4/11.9.7.7/tcp/{PORT}",)
        assert len(alice.bus.of(RoleChanged)) == 1

        # a café: private within the grace
        move("11.33.0.1", (await here.peer("11.34.0.1", "sym")).host.routers[0])
        await again()
        await trio.sleep(10)
        await again()
        await trio.sleep(GRACE + 300)
        status = alice.reachability.status()
        assert (status.role, status.public_addresses) == (Role.PRIVATE, ())
        assert status.mapping is Mapping.DEPENDENT
        assert [each.role for each in alice.bus.of(RoleChanged)] == ["public", "private"]


async def test_a_port_that_a_router_gave_is_told_once_it_is_verified(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "pr", serve=False)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(60)
        assert alice.reachability.role is Role.PRIVATE
        mapped = f"/ip4/{HOME}/tcp/5555"
        alice.reachability.mapped([mapped])
        await trio.sleep(60)
        assert alice.reachability.public_addresses() == ()
        router = alice.host.routers[0]
        into = router.into
        router.into = lambda source, target: (  # type: ignore[method-assign]
            (alice.host.ip, PORT) if target[1] == 5555 else into(source, target)
        )
        await trio.sleep(900)
        assert alice.reachability.public_addresses() == (mapped,)
        assert alice.reachability.role is Role.PUBLIC


async def test_a_port_that_the_router_gave_or_took_back_is_tested_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "pr", serve=False)
        mapped = f"/ip4/{HOME}/tcp/{PORT}"  # where others see it as well
        router = alice.host.routers[0]
        into = router.into
        for server in servers:
            await alice.dial(server)
        await trio.sleep(30)
        assert alice.reachability.nat(4)[1] is Filtering.PORT
        router.into = lambda source, target: (alice.host.ip, PORT)  # type: ignore[method-assign]
        alice.reachability.mapped([mapped])
        await trio.sleep(30)
        assert alice.reachability.public_addresses() == (mapped,)
        alice.reachability.mapped([])
        alice.reachability.mapped([mapped])  # a router that was restarted
        await trio.sleep(120)
        assert alice.reachability.public_addresses() == (mapped,)
        router.into = into  # type: ignore[method-assign]
        alice.reachability.mapped([])
        await trio.sleep(120)
        assert alice.reachability.public_addresses() == ()
        assert [each.role for each in alice.bus.of(RoleChanged)] == ["public", "private"]


async def test_who_needs_no_router_to_reach_us_is_no_stranger(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    async with world() as here:
        alice = await here.peer(HOME)
        bob = await here.peer("11.50.0.1", quiet=True)
        came: list[int] = []
        monkeypatch.setattr(alice.reachability._roles, "stranger_came", lambda family, now: came.append(family))
        monkeypatch.setattr(alice.reachability, "_listen", lambda: [f"/ip6/2d00:9::1/tcp/{PORT}", alice.address])
        alice.reachability.listening()
        await bob.dial(alice)
        await trio.sleep(1)
        [connection] = alice.swarm.connections_to(bob.swarm.peer)
        assert (came, alice.reachability.status().servers) == ([4], 1)
        for near in ("/ip6/2d00:9::77/tcp/1", f"/ip4/{HOME}/tcp/1"):
            monkeypatch.setattr(connection.connection, "remote_address", near)
            alice.reachability.connected(connection.connection)
            assert (came, alice.reachability.status().servers) == ([4], 0)


@pytest.mark.parametrize("role", Role)
async def test_an_address_behind_a_firewall_is_told_until_it_is_refuted(
    role: Role, autojump_clock: trio.abc.Clock
) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "fw", role=role, serve=False)
        address = f"/ip4/{HOME}/tcp/{PORT}"
        refuted: list[bool] = []
        alice.reachability.on_changed.append(lambda: refuted.append(alice.reachability.is_refuted(address)))
        for server in servers:
            await alice.dial(server)
        assert not alice.reachability.is_refuted(address)
        await trio.sleep(2000)
        assert alice.reachability.is_refuted(address) is (role is not Role.PUBLIC)
        assert refuted.count(True) == (role is not Role.PUBLIC)


@pytest.mark.parametrize("role", [Role.PUBLIC, Role.PRIVATE])
async def test_a_configured_role(role: Role, autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(2)
        alice = await here.peer(HOME, "open", role=role, serve=False)
        assert (alice.reachability.role, alice.reachability.offers_hop) == (role, role is Role.PUBLIC)
        for server in servers:
            await alice.dial(server)
        await trio.sleep(60)
        public = (f"/ip4/{HOME}/tcp/{PORT}",) if role is Role.PUBLIC else ()
        assert alice.reachability.public_addresses() == public
        assert alice.bus.of(RoleChanged) == []
        assert alice.reachability.status().reason == "it is configured"


async def test_who_does_not_serve_is_not_asked(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        alice = await here.peer(HOME, serve=False)
        bob = await here.peer("11.50.0.1", serve=False)
        await alice.dial(bob)
        await trio.sleep(600)
        assert alice.reachability.status().servers == 0
        assert (seen(alice), bob.bus.of(DialBackServed)) == ([], [])


async def test_two_in_one_house_do_not_ask_each_other(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        alice = await here.peer(HOME, "fc")
        bob = await here.peer("11.50.0.1", "fc")
        alice.host.routers = bob.host.routers = []  # as if on one LAN
        here.internet.hosts |= {alice.host.ip: alice.host, bob.host.ip: bob.host}
        await alice.dial(bob)
        await trio.sleep(600)
        assert alice.reachability.status().servers == bob.reachability.status().servers == 0
        assert not alice.reachability.offers_dcutr


async def test_servers_that_come_and_go_without_a_flap(autojump_clock: trio.abc.Clock) -> None:
    async with world() as here:
        servers = await here.servers(3)
        alice = await here.peer(HOME, "fc", serve=False)
        for server in servers:
            await alice.dial(server)
        for turn in range(6):
            await trio.sleep(300)
            gone = servers[turn % 3]
            await alice.swarm.disconnect(gone.swarm.peer)
            await trio.sleep(300)
            await alice.dial(gone)
        assert [each.role for each in alice.bus.of(RoleChanged)] == ["public"]


async def test_over_real_tcp_the_dial_back_comes_from_a_fresh_port() -> None:
    config = Config(autonat=AutoNatConfig(allow_private=True))
    networks = [TcpNetwork(config.dial, EventBus(lambda: 0.0)) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        peers = []
        for seed, network in enumerate(networks):
            peers.append(Peer(TcpHost(network), seed, config))  # type: ignore[arg-type]
            await nursery.start(peers[-1].run, True)
        alice, bob = peers
        [address], [there] = alice.swarm.listen_addresses(), bob.swarm.listen_addresses()
        connection = await alice.swarm.dial(bob.swarm.peer, [there])
        with trio.fail_after(10):
            for kind in (Kind.V2, Kind.V1):
                outcome = await alice.reachability._client.test(connection.connection, address, kind)
                assert outcome.verdict is Verdict.REACHABLE, outcome
                assert outcome.proof is not None
                assert outcome.proof.remote_address != there
        assert not alice.reachability._contacts.is_stranger("127.0.0.1")
        assert bob.reachability._contacts.is_stranger("127.0.0.1")
        nursery.cancel_scope.cancel()


class TcpHost:
    """A `TcpNetwork` that `Peer` takes for a host; listens on loopback at a free port."""

    ip = "127.0.0.1"

    def __init__(self, network: TcpNetwork) -> None:
        self._network = network
        self.resolve, self.watch = network.resolve, network.watch
        self.dial, self.dial_fresh = network.dial, network.dial_fresh

    @property
    def on_contact(self) -> object:
        return self._network.on_contact

    @on_contact.setter
    def on_contact(self, told: object) -> None:
        self._network.on_contact = told  # type: ignore[assignment]

    async def listen(self, wanted: object) -> object:
        from kas_libp2p import addresses

        return await self._network.listen([addresses.parse("/ip4/127.0.0.1/tcp/0")])
