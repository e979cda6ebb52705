"""Nodes behind real NATs, reached through relays of ours; relays that die; routers that map a port."""

from __future__ import annotations

import time

import pytest
import trio

from kas_libp2p import Config, OverlayStream, open_node
from kas_libp2p.config import Purpose, RelayConfig, Role
from kas_libp2p.events import PortMapped, ReservationLost, ReservationMade, RoleChanged
from natlab import Host, RunningLab
from natlab.processes import Call

pytestmark = pytest.mark.lab

ECHO = "/test/echo/1.0.0"
LISTEN = ("/ip4/0.0.0.0/tcp/16117",)
SOON = 2.0
"""Seconds in which a lost place is made elsewhere."""


async def echo(stream: OverlayStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def relay(known: list[str]) -> None:
    """A public relay for anybody, connected to other nodes."""
    config = Config(listen=LISTEN, role=Role.PUBLIC, relay=RelayConfig(serve=True, purpose=Purpose.ANY))
    async with open_node(config) as node:
        for each in known:
            await node.identify(each)
        print(*node.addresses, sep="\n", flush=True)
        await trio.sleep_forever()


async def reachable(relays: list[str], target: int) -> None:
    """A node at home that chooses among relays, and tells what becomes of its places."""
    config = Config(listen=LISTEN, relay=RelayConfig(relays=tuple(relays), target=target))
    async with open_node(config) as node:
        await node.serve(echo, ECHO)
        async for event in node.events():
            if isinstance(event, ReservationMade) and not event.renewed:
                print(f"{time.monotonic():.3f} made {event.relay} {event.addresses[0]}/p2p/{node.peer_id}", flush=True)
            elif isinstance(event, ReservationLost):
                print(f"{time.monotonic():.3f} lost {event.relay}", flush=True)


async def talk(addresses: list[str]) -> None:
    """Open a stream through each address, one node each; say what is heard for every line on standard input."""
    import sys

    async def one(number: int, address: str) -> None:
        async with open_node(Config(listen=LISTEN if not number else (), relay=RelayConfig(target=0))) as node:
            stream = await node.connect(address, ECHO)
            path = stream.metadata.path
            print(f"open {number} {path.kind} {path.relay}", flush=True)
            while True:
                await asked[number].wait()
                asked[number] = trio.Event()
                try:
                    await stream.send_all(b"x")
                    print(f"heard {number} {(await stream.receive_some()) == b'x'}", flush=True)
                except trio.BrokenResourceError as error:
                    print(f"ended {number} {error}", flush=True)
                    return

    asked = [trio.Event() for _ in addresses]
    async with trio.open_nursery() as nursery:
        for number, address in enumerate(addresses):
            nursery.start_soon(one, number, address)
        while await trio.to_thread.run_sync(sys.stdin.readline):
            for each in asked:
                each.set()
        nursery.cancel_scope.cancel()


def started(host: Host, known: list[str]) -> tuple[Call, str, str]:
    """A relay: its process, address and peer id."""
    call = host.spawn_python(relay, known)
    address = call.expect(rf"^/ip4/{host.address}/\S+$")[0]
    return call, address, address.rpartition("/")[2]


@pytest.mark.nat_types("sym", "pr-rst", "cgn-eimx")
def test_a_relay_that_is_killed_is_replaced_and_other_circuits_go_on(lab: RunningLab, nat_type: str) -> None:
    relays: list[tuple[Call, str, str]] = []
    for name in ("ashburn", "frankfurt", "singapore"):
        relays.append(started(lab.public(name), [address for _, address, _ in relays]))
    processes = {peer: process for process, _, peer in relays}
    bob = lab.home("bob", nat=nat_type, delay="20ms")
    alice = lab.home("alice", nat="sym", delay="5ms")

    home = bob.spawn_python(reachable, [address for _, address, _ in relays], 2)
    died, through_first = home.expect(r"^\S+ made (\S+) (\S+)$").groups()
    stays, through_second = home.expect(rf"^\S+ made (?!{died})(\S+) (\S+)$").groups()
    talking = alice.spawn_python(talk, [through_first, through_second])
    assert talking.expect(r"^open 0 relayed (\S+)$")[1] == died
    assert talking.expect(r"^open 1 relayed (\S+)$")[1] == stays

    killed = time.monotonic()
    processes[died].kill()
    lost = home.expect(rf"^(\S+) lost {died}$")
    made = home.expect(rf"^(\S+) made (?!{died}|{stays})\S+ \S+$")
    assert float(lost[1]) - killed < SOON
    assert float(made[1]) - killed < SOON

    assert talking.stdin is not None
    talking.stdin.write(b"\n")
    talking.stdin.flush()
    talking.expect(r"^ended 0 .*$")
    talking.expect(r"^heard 1 True$")
    print(f"{nat_type}: elsewhere {float(made[1]) - killed:.2f} s after the relay was killed")


async def home_with_router(servers: list[str]) -> tuple[str, ...]:
    """What a node tells of its addresses once its router's port is known to let strangers in."""
    async with open_node(Config(listen=LISTEN, port_mapping=True)) as node:
        events = node.events()
        for each in servers:
            await node.identify(each)
        mapped, public = "", False
        async for event in events:
            print(f"{time.monotonic():.3f} {event}", flush=True)  # what a failure shows
            match event:
                case PortMapped(external=external):
                    mapped = external
                case RoleChanged(role="public"):
                    public = True  # before it knows of its port, perhaps: the router lets in before it answers
            if mapped and public:
                assert mapped in node.status().reachability.public_addresses
                return node.addresses
        raise AssertionError


@pytest.mark.parametrize("service", ["pcp", "natpmp", "upnp"])
def test_a_mapped_port_makes_a_home_public_once_strangers_got_in(lab: RunningLab, service: str) -> None:
    servers: list[str] = []
    for name in ("ashburn", "frankfurt", "singapore", "stranger"):
        servers.append(started(lab.public(name), servers)[1])
    alice = lab.home("alice", nat="pr", services=(service,))
    addresses = alice.python(home_with_router, servers[:3])
    assert addresses[0].startswith(f"/ip4/{alice.public_address}/tcp/")


async def settled(relays: list[str]) -> None:
    """A node at home that prints its addresses once it can tell others of all these relays."""
    async with open_node(Config(listen=LISTEN, relay=RelayConfig(relays=tuple(relays)))) as node:
        while len(node.relay_pool.tell()) < len(relays):  # noqa: ASYNC110 - no event tells
            await trio.sleep(0.1)
        print("settled", *node.addresses, flush=True)
        await trio.sleep_forever()


async def newcomer(relay: str, peer: str) -> None:
    """A node at home that knows one relay, and one peer behind it."""
    async with open_node(Config(listen=LISTEN, relay=RelayConfig(relays=(relay,)))) as node:
        events = node.events()
        await node.identify(peer)
        async for event in events:
            print(event, flush=True)


def test_who_knows_one_relay_hears_of_others_from_a_peer_behind_it(lab: RunningLab) -> None:
    relays = [started(lab.public(name), []) for name in ("ashburn", "frankfurt", "singapore")]
    peers = [peer for _, _, peer in relays]
    bob = lab.home("bob", nat="pr", delay="20ms")
    alice = lab.home("alice", nat="sym", delay="5ms")
    home = bob.spawn_python(settled, [address for _, address, _ in relays])
    addresses = home.expect(r"^settled (.*)$")[1].split()
    through = next(each for each in addresses if f"{peers[0]}/p2p-circuit" in each)
    came = alice.spawn_python(newcomer, relays[0][1], through)
    for peer in peers:
        came.expect(rf"ReservationMade\(.*relay='{peer}'")
    assert "RelaysHeard" in came.stdout
