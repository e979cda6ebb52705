"""Ports mapped by routers of a lab: strangers get in while we are there, and not afterwards."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

pytestmark = pytest.mark.lab

PORT = 16117


def mapper() -> None:
    """Keeps a port mapped in a host, prints what happens, and ends when its input does."""
    import sys
    import time
    from random import Random

    import trio

    from kas_libp2p.events import EventBus
    from kas_libp2p.portmap import _keeper, service

    _keeper.CHECK = service.UPNP_CHECK = 0.5  # a rebooted router is noticed while the test looks

    async def main() -> None:
        events = EventBus(time.time)
        listen = [f"/ip4/0.0.0.0/tcp/{PORT}", f"/ip6/::/tcp/{PORT}"]
        port = service.PortMapper(events, listen=lambda: listen, dice=Random(0))
        async with trio.open_nursery() as nursery:

            async def tell() -> None:
                with events.subscribe() as subscription:
                    async for event in subscription:
                        print(event, flush=True)

            nursery.start_soon(tell)
            nursery.start_soon(port.run)
            await trio.to_thread.run_sync(sys.stdin.readline)
            nursery.cancel_scope.cancel()

    trio.run(main)


def knock(lab: Any, port: int = PORT) -> bool:
    """Whether a stranger's TCP connection to an outside port gets to alice."""
    with lab["alice"].socket() as listener, lab["relay"].socket() as stranger:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", PORT))
        listener.listen()
        stranger.settimeout(0.5)
        try:
            stranger.connect((lab["alice"].public_address, port))
        except OSError:
            return False
        return True


def leave(call: Any) -> None:
    call.stdin.write(b"\n")
    call.stdin.flush()
    call.result()


def check_mapping(lab: Any, by: str) -> None:
    assert not knock(lab)
    call = lab["alice"].spawn_python(mapper)
    call.expect(f"PortMapped.*by='{by}'.*external='/ip4/{lab['alice'].public_address}/tcp/{PORT}'")
    assert knock(lab)
    leave(call)
    lab.router("alice").reboot()  # also forgets the connection of the last knock, but has no mapping to keep
    assert not knock(lab)


@pytest.mark.natlab("alice=pr,services=pcp", "relay=public")
def test_pcp(lab: Any) -> None:
    check_mapping(lab, "pcp")


@pytest.mark.natlab("alice=sym,services=natpmp", "relay=public")
def test_natpmp(lab: Any) -> None:
    check_mapping(lab, "nat-pmp")


@pytest.mark.natlab("alice=pr,services=upnp", "relay=public")
def test_upnp(lab: Any) -> None:
    check_mapping(lab, "upnp")


@pytest.mark.natlab("alice=pr,services=upnp+natpmp+pcp", "relay=public")
def test_all_three(lab: Any) -> None:
    check_mapping(lab, "pcp")


def knock6(lab: Any) -> bool:
    with lab["alice"].socket(socket.AF_INET6) as listener, lab["relay"].socket(socket.AF_INET6) as stranger:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", PORT))
        listener.listen()
        stranger.settimeout(1.0)
        try:
            stranger.connect((lab["alice"].address6, PORT))
        except OSError:
            return False
        return True


@pytest.mark.natlab("alice=pr,ipv6=fw,services=pcp", "relay=public,ipv6=open")
def test_pcp_opens_an_ipv6_firewall(lab: Any) -> None:
    assert not knock6(lab)
    call = lab["alice"].spawn_python(mapper)
    call.expect(f"PortMapped.*by='pcp'.*external='/ip6/{lab['alice'].address6}/tcp/{PORT}'")
    assert knock6(lab)
    leave(call)
    assert not knock6(lab)


@pytest.mark.natlab("alice=cgn-pr,services=pcp", "relay=public")
def test_a_carriers_nat_is_named(lab: Any) -> None:
    call = lab["alice"].spawn_python(mapper)
    call.expect("PortMappingFailed.*behind another NAT")
    leave(call)


@pytest.mark.natlab("alice=pr", "relay=public")
def test_a_router_that_gives_nothing(lab: Any) -> None:
    call = lab["alice"].spawn_python(mapper)
    call.expect("PortMappingFailed.*neither PCP, NAT-PMP nor UPnP")
    leave(call)


@pytest.mark.parametrize("by", ["pcp", "natpmp", "upnp"])
@pytest.mark.parametrize("what", ["reboot", "change_address"])
def test_a_rebooted_router_and_a_new_address_are_noticed(lab: Any, by: str, what: str) -> None:
    lab.home("alice", nat="pr", services=(by,))
    lab.public("relay")
    call = lab["alice"].spawn_python(mapper)
    call.expect(f"PortMapped.*{lab['alice'].public_address}")
    time.sleep(4)  # a router that reboots within its first seconds has lost less time than clocks may differ
    getattr(lab.router("alice"), what)()
    call.expect(rf"(?s)PortMapped.*PortMapped.*{lab['alice'].public_address}", timeout=20)
    assert knock(lab)
    leave(call)


@pytest.mark.parametrize("by", ["pcp", "natpmp", "upnp"])
def test_a_neighbour_that_has_the_port_leaves_us_another(lab: Any, by: str) -> None:
    lab.home("home", nat="pr", services=(by,), hosts=("alice", "bob"))
    lab.public("relay")
    first = lab["bob"].spawn_python(mapper)
    first.expect(f"PortMapped.*tcp/{PORT}'.*external='[^']*/tcp/{PORT}'")
    second = lab["alice"].spawn_python(mapper)
    found = second.expect(r"PortMapped.*external='[^']*/tcp/(\d+)'")
    assert int(found[1]) != PORT
    assert knock(lab, int(found[1]))
    leave(second)
    leave(first)
