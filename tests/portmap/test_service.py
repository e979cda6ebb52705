"""The port mapper and a router on this machine: which protocol, what is told, what is left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from kas_libp2p.events import Event, EventBus, PortMapped, PortMappingFailed, Subscription
from kas_libp2p.portmap import service
from kas_libp2p.portmap.service import Mapping, PortMapper
from kas_libp2p.portmap.upnp import UpnpError
from natlab.services import Mapping as TableEntry
from natlab.services import Pmp, Table
from tests.network import eventually

GATEWAY, LOCAL = "127.0.0.1", "127.0.0.1"
OUTSIDE = "11.0.1.2"
SOON = 5.0
"""Seconds for what takes milliseconds, on a machine that does other things as well."""


def routes(gateway: str = GATEWAY) -> str:
    word = bytes(int(part) for part in gateway.split("."))[::-1].hex()
    return f"head\neth0\t00000000\t{word}\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"


class Router:
    """natlab's NAT-PMP and PCP on a port of its own."""

    def __init__(
        self, *, natpmp: bool = True, pcp: bool = True, outside: str = OUTSIDE, firewall: bool = False
    ) -> None:
        self.table = Table(lambda mapping, lifetime: None, lambda mapping: None, firewall)
        self.outside = outside
        self.deaf = False
        self.requests = 0
        self.liar: Router | None = None  # answers first, from another port
        self.pmp = Pmp(self.table, lambda: self.outside, 0.0, natpmp, pcp)

    async def run(self, task_status: trio.TaskStatus[int]) -> None:
        firewall = self.table.firewall
        family = trio.socket.AF_INET6 if firewall else trio.socket.AF_INET
        with trio.socket.socket(family, trio.socket.SOCK_DGRAM) as sock:
            await sock.bind(("::1" if firewall else GATEWAY, 0))
            task_status.started(sock.getsockname()[1])
            while True:
                data, client = await sock.recvfrom(1100)
                self.requests += 1
                if self.liar is not None and (lie := self.liar.pmp.answer(data, client[0], trio.current_time())):
                    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as stranger:
                        await stranger.sendto(lie, client)
                answer = None if self.deaf else self.pmp.answer(data, client[0], trio.current_time())
                if answer is not None:
                    await sock.sendto(answer, client)

    @property
    def ports(self) -> list[int]:
        return [each.inside for each in self.table.mappings.values()]


class NoIgd:
    def __init__(self, gateway: str, local: str) -> None:
        raise UpnpError


class FakeIgd:
    """A router that speaks UPnP only."""

    mappings: dict[int, int]
    outside = OUTSIDE

    def __init__(self, gateway: str, local: str) -> None:
        type(self).mappings = {}

    def address(self) -> str:
        return self.outside

    def map(self, port: int, external: int, others: list[int], lifetime: int) -> tuple[int, int]:
        self.mappings[external] = port
        return external, lifetime

    def holds(self, port: int, external: int) -> bool:
        return self.mappings.get(external) == port

    def unmap(self, external: int) -> None:
        del self.mappings[external]


class Rig:
    def __init__(
        self,
        listen: Callable[[], list[str]],
        routes: Callable[[], str],
        secret: bytes | None,
        routes6: Callable[[], str] = str,
    ) -> None:
        self.events = EventBus(lambda: 1.8e9)
        self.subscription: Subscription = self.events.listen()
        self.mapper = PortMapper(
            self.events, listen=listen, dice=Random(0), secret=secret, read_routes=routes, read_routes6=routes6
        )
        self.changes = 0
        self.mapper.on_changed.append(self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def event(self) -> Event:
        with trio.fail_after(SOON):
            return await anext(self.subscription)


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch,
    router: Router | None,
    *,
    igd: Any = NoIgd,
    listen: Callable[[], list[str]] = lambda: ["/ip4/0.0.0.0/tcp/16117", "/ip6/::/tcp/16117", "/ip4/10.9.9.9/tcp/1"],
    routes: Callable[[], str] = routes,
    secret: bytes | None = None,
    routes6: Callable[[], str] = str,
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(service, "Igd", igd)
    async with trio.open_nursery() as nursery:
        if router is None:
            with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as nobody:
                await nobody.bind((GATEWAY, 0))
                port = nobody.getsockname()[1]
        else:
            port = await nursery.start(router.run)
        monkeypatch.setattr(service, "PORT", port)
        rig = Rig(listen, routes, secret, routes6)
        async with trio.open_nursery() as inner:
            inner.start_soon(rig.mapper.run)
            yield rig
            inner.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("offered", "by"),
    [({"natpmp": True, "pcp": True}, "pcp"), ({"natpmp": False}, "pcp"), ({"pcp": False}, "nat-pmp")],
)
async def test_the_best_that_the_router_speaks_is_used_and_nothing_left_behind(
    monkeypatch: pytest.MonkeyPatch, offered: dict[str, bool], by: str
) -> None:
    router = Router(**offered)
    async with running(monkeypatch, router) as rig:
        event = await rig.event()
        assert isinstance(event, PortMapped)
        assert (event.by, event.external) == (by, f"/ip4/{OUTSIDE}/tcp/16117")
        assert rig.mapper.mappings == (Mapping(by, f"/ip4/{LOCAL}/tcp/16117", event.external, 7200),)
        assert router.ports == [16117]
        assert rig.changes == 1
    assert router.ports == []
    assert rig.mapper.mappings == ()
    assert rig.changes == 2


async def test_several_ports_are_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    listen = [f"/ip4/0.0.0.0/tcp/{port}" for port in (4001, 4002, 4003)]
    async with running(monkeypatch, router, listen=lambda: listen) as rig:
        for _ in listen:
            assert isinstance(await rig.event(), PortMapped)
        assert router.ports == [4001, 4002, 4003]
        assert len(rig.mapper.mappings) == 3


async def test_a_port_that_is_refused_beside_others_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(natpmp=False)
    router.table.add(TableEntry("tcp", 4002, LOCAL, 4002, math.inf, b"another nonce"), 7200)
    listen = ["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/tcp/4002"]
    async with running(monkeypatch, router, listen=lambda: listen) as rig:
        events = {type(each): each for each in (await rig.event(), await rig.event())}
        failed, mapped = events[PortMappingFailed], events[PortMapped]
        assert isinstance(failed, PortMappingFailed)
        assert isinstance(mapped, PortMapped)
        assert mapped.local.endswith("/4001")
        assert failed.local.endswith("/4002")
        assert "NOT_AUTHORIZED" in failed.reason


async def test_after_a_crash_a_port_is_ours_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PCP router gives nobody else's port away; only the same secret makes us the same."""
    router = Router(natpmp=False)
    async with running(monkeypatch, router, secret=b"ours") as rig:
        await rig.event()
        left = dict(router.table.mappings)
    router.table.mappings.update(left)
    async with running(monkeypatch, router, secret=b"ours") as rig:
        assert isinstance(await rig.event(), PortMapped)
    router.table.mappings.update(left)
    async with running(monkeypatch, router, secret=b"theirs") as rig:
        assert isinstance(await rig.event(), PortMappingFailed)


async def test_a_router_without_any_of_it_is_told_once_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(service, "RETRY", 0.01)
    tries = 0

    class Counted(NoIgd):
        def __init__(self, gateway: str, local: str) -> None:
            nonlocal tries
            tries += 1
            super().__init__(gateway, local)

    async with running(monkeypatch, None, igd=Counted) as rig:
        event = await rig.event()
        await eventually(lambda: tries >= 3)
        assert rig.events.counts["port-mapping-failed", ""] == 1
        assert isinstance(event, PortMappingFailed)
        assert event.local == f"/ip4/{LOCAL}/tcp/16117"
        assert "neither PCP, NAT-PMP nor UPnP" in event.reason
        assert "by hand" in event.reason
        assert rig.mapper.problem == event.reason
        assert rig.changes == 0


async def test_a_router_is_asked_again_soon_and_sooner_after_a_change(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    at: list[float] = []
    table = [""]

    def read() -> str:
        at.append(trio.current_time())
        return table[0]

    async with running(monkeypatch, Router(), listen=list, routes=read) as rig:
        await trio.sleep(16)
        assert at == [0, 5, 15]
        await trio.sleep(1000)
        rig.mapper.network_changed()  # to the same as before: nothing is asked
        await trio.sleep(1)
        table[0], before = routes(), trio.current_time()
        at.clear()
        rig.mapper.network_changed()
        await trio.sleep(16)
        assert at == [before, before, before + 5, before + 15]


async def test_each_port_that_is_not_mapped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    listen = ["/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/tcp/4002"]
    async with running(monkeypatch, None, listen=lambda: listen) as rig:
        told = [await rig.event() for _ in listen]
        assert [each.local[-4:] for each in told if isinstance(each, PortMappingFailed)] == ["4001", "4002"]


async def test_a_router_that_is_behind_another_nat_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(outside="100.64.3.4")
    async with running(monkeypatch, router) as rig:
        event = await rig.event()
        assert isinstance(event, PortMappingFailed)
        assert "100.64.3.4" in event.reason
        assert "IPv6" in event.reason
        assert router.ports == []


async def test_without_a_gateway_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router()
    async with running(monkeypatch, router, routes=lambda: "") as rig:
        event = await rig.event()
        assert isinstance(event, PortMappingFailed)
        assert "no IPv4 default gateway" in event.reason
        assert router.requests == 0


async def test_upnp_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch, None, igd=FakeIgd) as rig:
        event = await rig.event()
        assert isinstance(event, PortMapped)
        assert event.by == "upnp"
        assert FakeIgd.mappings == {16117: 16117}
    assert FakeIgd.mappings == {}


async def test_a_upnp_mapping_that_was_being_made_is_removed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()
    lock = threading.Lock()  # as the real one has

    class Slow(FakeIgd):
        def map(self, port: int, external: int, others: list[int], lifetime: int) -> tuple[int, int]:
            with lock:
                asked.set()
                assert go_on.wait(SOON)
                return super().map(port, external, others, lifetime)

        def holds(self, port: int, external: int) -> bool:
            go_on.set()
            with lock:
                return super().holds(port, external)

    async with running(monkeypatch, None, igd=Slow):
        await trio.to_thread.run_sync(asked.wait, SOON)
    assert go_on.is_set()
    assert Slow.mappings == {}


async def test_a_upnp_mapping_that_is_gone_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "UPNP_CHECK", 0.02)
    async with running(monkeypatch, None, igd=FakeIgd) as rig:
        await rig.event()
        FakeIgd.mappings.clear()
        assert isinstance(await rig.event(), PortMapped)
        assert FakeIgd.mappings == {16117: 16117}
        assert rig.changes == 1


async def test_who_listens_elsewhere_is_mapped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    router, listen = Router(), ["/ip4/0.0.0.0/tcp/4001"]
    async with running(monkeypatch, router, listen=lambda: listen) as rig:
        await rig.event()
        asked = router.requests
        rig.mapper.network_changed()
        await trio.testing.wait_all_tasks_blocked()
        assert router.requests == asked
        listen[:] = ["/ip4/0.0.0.0/tcp/4002"]
        rig.mapper.network_changed()
        await rig.event()
        assert router.ports == [4002]


async def test_a_network_that_comes_up_later_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    router, table = Router(), [""]
    async with running(monkeypatch, router, routes=lambda: table[0]) as rig:
        assert isinstance(await rig.event(), PortMappingFailed)
        table[0] = routes()
        rig.mapper.network_changed()
        assert isinstance(await rig.event(), PortMapped)
        assert rig.mapper.problem == ""


async def test_a_router_that_has_gone_deaf_delays_the_end_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "REMOVE_TIMEOUT", 0.1)
    router = Router()
    async with running(monkeypatch, router) as rig:
        await rig.event()
        router.deaf = True
        asked = router.requests
        start = trio.current_time()
    assert trio.current_time() - start < SOON
    assert router.requests > asked


async def test_what_others_send_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops what does not come from the gateway's port, even an answer that would be believed otherwise."""
    router = Router(pcp=False)
    router.liar = Router(pcp=False, outside="66.6.6.6")
    async with running(monkeypatch, router) as rig:
        event = await rig.event()
        assert isinstance(event, PortMapped)
        assert event.external == f"/ip4/{OUTSIDE}/tcp/16117"


# IPv6


def routes6() -> str:
    zero, one = "0" * 32, "0" * 31 + "1"
    return f"{zero} 00 {zero} 00 {one} 00000400 00000001 00000000 00000003 lo\n"


@pytest.fixture
def ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose only address is ::1, and counts as one on the internet."""

    async def source() -> str:
        await trio.lowlevel.checkpoint()
        return "::1"

    monkeypatch.setattr(service, "_source6", source)


async def test_a_firewall_is_opened_and_closed_again(monkeypatch: pytest.MonkeyPatch, ipv6: None) -> None:
    router = Router(natpmp=False, firewall=True)
    async with running(monkeypatch, router, routes=str, routes6=routes6) as rig:
        while not isinstance(event := await rig.event(), PortMapped):
            assert "no IPv4 default gateway" in event.reason  # type: ignore[attr-defined]
        here = "/ip6/::1/tcp/16117"
        assert rig.mapper.mappings == (Mapping("pcp", here, here, 7200),)
        assert rig.mapper.problem == ""
        assert router.ports == [16117]
        assert rig.changes == 1
    assert router.ports == []
    assert rig.mapper.mappings == ()


async def test_a_firewall_that_says_no_is_told(monkeypatch: pytest.MonkeyPatch, ipv6: None) -> None:
    router = Router(natpmp=False, firewall=True)
    router.table.add(TableEntry("tcp", 16117, "::1", 16117, math.inf, b"another nonce"), 7200)
    async with running(monkeypatch, router, routes=str, routes6=routes6) as rig:
        while "firewall" not in (event := await rig.event()).reason:  # type: ignore[attr-defined]
            pass
        assert isinstance(event, PortMappingFailed)
        assert event.local == "/ip6/::1/tcp/16117"
        assert "NOT_AUTHORIZED" in event.reason
        assert "by hand" in event.reason


async def test_a_firewall_that_does_not_answer_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, ipv6: None, autojump_clock: trio.testing.MockClock
) -> None:
    rig = Rig(lambda: ["/ip6/::/tcp/16117"], str, None, routes6)
    with trio.move_on_after(3600):
        await rig.mapper.run()
    assert rig.events.counts["port-mapping-failed", ""] == 1  # no IPv4 gateway
    assert rig.mapper.mappings == ()


async def test_who_has_no_address_on_the_internet_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ANYWHERE6", "::1")
    assert await service._source6() is None
